"""A data set made here: captioned sound, clips and tasks, every sample a function of the seed. Wholly synthetic.

It is the default input, so that a first run needs no data. Recordings come in one endless order that ``minutes`` cuts
short: a longer set begins with the shorter one. Four fifths of the sound are songs to be continued (``demo_songs``),
the rest short sounds to be asked for by caption (``demo_shorts``).

    audio/*.wav, audio/metadata.jsonl     24 kHz mono 16-bit; file_name, text, group, split, and what is in it
    video/*.mp4, video/metadata.jsonl     64 x 64, 10 frames a second, 2 s
    sample_audio.jsonl, sample_video.jsonl, mixed_multimodal_av.jsonl     rows of the five-task model
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from avray.codecs.clip_dct import FRAME_RATE_HZ, encode_clip
from avray.codecs.spectral import Spectral
from avray.data.demo_jsonl import Embedded, write_jsonl, write_tasks
from avray.data.demo_shorts import KINDS
from avray.data.demo_songs import compose, perform
from avray.data.demo_sound import SAMPLE_RATE_HZ, master
from avray.data.demo_video import draw_clip, plan_clip
from avray.media import Audio, Video, write_audio, write_video

VERSION = 1
"""Of the content: a set made by another version is made anew."""
MARKER = "demo.json"
SONG_SHARE = 0.8
MIN_SONGS = 2
"""One to train on and one to validate on, however few the minutes."""
NUM_CLIPS = 36
MOST_MINUTES = 6000.0
MOST_TASK_SOUNDS = 64
HELD_OUT = 5
"""Every fifth song, short sound and clip is for validation: prime to the turns that forms, kinds and shapes take."""
LEFTOVER_AGE_S = 3600.0

README = """\
SYNTHETIC DATA. Everything in this folder was computed by avray (avray/data/demo.py); nothing was recorded, and no
person, instrument or place is in it. It is here to try avray with, not to judge a model by. Use it as you like.

minutes = {minutes:g}, seed = {seed}: the same settings give the same samples.

audio/     {num_recordings} recordings, {seconds:.0f} s, captions in metadata.jsonl
video/     {num_videos} clips of moving shapes, captions in metadata.jsonl
*.jsonl    rows of the five-task model: task, instruction, input, output, embedding
demo.json  written last: a folder without it is incomplete. avray replaces the whole folder when it is.
"""


@dataclass(frozen=True)
class DemoSummary:
    """What a set holds. ``seconds`` is of sound."""

    folder: Path
    num_recordings: int
    seconds: float
    num_videos: int


@dataclass(frozen=True)
class Recording:
    """One WAV to be: float32 samples ``[time]``, its name in a few words, and its metadata row."""

    samples: np.ndarray
    label: str
    row: dict[str, object]


def make_demo(folder: str | os.PathLike[str], minutes: float = 4.0, seed: int = 0,
              song_share: float = SONG_SHARE) -> DemoSummary:
    """Make the set in ``folder``, in place of a set that is there: built beside it, then renamed.

    ``minutes`` is of sound, overshot by at most a recording; ``song_share`` of it are songs, two at least. About 200
    times faster than it plays on one core.

    Raises:
        ValueError: minutes or seed out of range, or a folder that holds anything else than a demo set.
    """
    target = Path(folder).absolute()
    _check(target, minutes, seed)
    return _replace(target, minutes, seed, song_share, keep_if_made_meanwhile=False)


def ensure_demo(folder: str | os.PathLike[str], minutes: float = 4.0, seed: int = 0,
                song_share: float = SONG_SHARE) -> DemoSummary:
    """The set in ``folder``: as it is where it is whole and has these settings, else made as by ``make_demo``."""
    target = Path(folder).absolute()
    _check(target, minutes, seed)
    return (_read_marker(target, minutes, seed, song_share)
            or _replace(target, minutes, seed, song_share, keep_if_made_meanwhile=True))


def recordings(seed: int, song_share: float = SONG_SHARE) -> Iterator[Recording]:
    """All recordings there could be, songs and short sounds in proportion."""
    song_s = short_s = 0.0
    num_songs = num_shorts = 0
    while True:
        if num_songs < MIN_SONGS or song_s <= song_share * (song_s + short_s):
            made = song_recording(num_songs, seed)
            num_songs, song_s = num_songs + 1, song_s + len(made.samples) / SAMPLE_RATE_HZ
        else:
            made = short_recording(num_shorts, seed)
            num_shorts, short_s = num_shorts + 1, short_s + len(made.samples) / SAMPLE_RATE_HZ
        yield made


def song_recording(index: int, seed: int) -> Recording:
    """The ``index``-th song."""
    rng = np.random.default_rng([seed, 0, index])
    song = compose(index, rng)
    samples = master(perform(song), rng)
    return Recording(samples, song.form, _audio_row("song", index, index, samples, song.caption(), song.fields()))


def short_recording(index: int, seed: int) -> Recording:
    """The ``index``-th short sound; kinds take turns."""
    rng = np.random.default_rng([seed, 1, index])
    short = KINDS[index % len(KINDS)](rng)
    samples = master(short.samples, rng)
    row = _audio_row(short.kind, index // len(KINDS), index, samples, short.text, short.fields)
    return Recording(samples, short.label, row)


def _audio_row(kind: str, number: int, turn: int, samples: np.ndarray, text: str,
               fields: dict[str, object]) -> dict[str, object]:
    name = f"{kind}-{number:04d}"
    return {"file_name": f"{name}.wav", "text": text, "group": name, "split": split_of(turn), "kind": kind,
            "length_s": round(len(samples) / SAMPLE_RATE_HZ, 4), **fields}


def split_of(turn: int) -> str:
    """The side that the ``turn``-th song, short sound or clip is on."""
    return "validation" if turn % HELD_OUT == 1 else "train"


@dataclass
class Sounds:
    """What was written: rows of ``audio/metadata.jsonl``, and the short sounds for the five tasks."""

    rows: list[dict[str, object]] = field(default_factory=list)
    shorts: list[Embedded] = field(default_factory=list)
    seconds: float = 0.0
    num_songs: int = 0


def _write_audio(folder: Path, minutes: float, seed: int, song_share: float) -> Sounds:
    (folder / "audio").mkdir()
    codec = Spectral().load("cpu")
    written = Sounds()
    for made in recordings(seed, song_share):
        if written.seconds >= 60 * minutes and written.num_songs >= MIN_SONGS:
            break
        file = f"audio/{made.row['file_name']}"
        write_audio(folder / file, Audio(made.samples[None], SAMPLE_RATE_HZ))
        written.rows.append(made.row)
        written.seconds += len(made.samples) / SAMPLE_RATE_HZ
        if made.row["kind"] == "song":
            written.num_songs += 1
        elif len(written.shorts) < MOST_TASK_SOUNDS:
            mean_frame = codec.encode_batch([made.samples])[0].mean(0)
            written.shorts.append(Embedded(file, made.label, str(made.row["text"]), mean_frame))
    write_jsonl(folder / "audio" / "metadata.jsonl", written.rows)
    return written


def _write_video(folder: Path, seed: int) -> list[Embedded]:
    (folder / "video").mkdir()
    rows, embedded = [], []
    for index in range(NUM_CLIPS):
        clip = plan_clip(index, np.random.default_rng([seed, 2, index]))
        frames = draw_clip(clip)
        name = f"clip-{index:04d}"
        write_video(folder / "video" / f"{name}.mp4", Video(frames, FRAME_RATE_HZ))
        rows.append({"file_name": f"{name}.mp4", "text": clip.caption(), "group": name, "split": split_of(index),
                     **clip.fields()})
        embedded.append(Embedded(f"video/{name}.mp4", clip.label, clip.caption(), encode_clip(frames)))
    write_jsonl(folder / "video" / "metadata.jsonl", rows)
    return embedded


def _build(folder: Path, minutes: float, seed: int, song_share: float) -> None:
    """Write a whole set into an empty folder, its marker last."""
    sounds = _write_audio(folder, minutes, seed, song_share)
    write_tasks(folder, sounds.shorts, _write_video(folder, seed))
    facts = {"num_recordings": len(sounds.rows), "seconds": round(sounds.seconds, 3), "num_videos": NUM_CLIPS}
    (folder / "README.txt").write_text(README.format(minutes=minutes, seed=seed, **facts), encoding="utf-8")
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*.*"))}
    marker = {"version": VERSION, "minutes": minutes, "seed": seed, "songs": song_share, **facts, "bytes": sizes}
    (folder / MARKER).write_text(json.dumps(marker, indent=1), encoding="utf-8")


def _replace(target: Path, minutes: float, seed: int, song_share: float, keep_if_made_meanwhile: bool) -> DemoSummary:
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep(target)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    try:
        made = scratch / "new"
        made.mkdir()
        _build(made, minutes, seed, song_share)
        # Several processes of one run may have found it missing at once: the first one's set is already being read.
        if keep_if_made_meanwhile and (summary := _read_marker(target, minutes, seed, song_share)):
            return summary
        if target.exists():
            os.rename(target, scratch / "old")
        os.rename(made, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    summary = _read_marker(target, minutes, seed, song_share)
    assert summary is not None
    return summary


def _sweep(target: Path) -> None:
    """Remove what a killed process left half made."""
    for scratch in target.parent.glob(f".{target.name}.partial-*"):
        if time.time() - scratch.stat().st_mtime > LEFTOVER_AGE_S:
            shutil.rmtree(scratch, ignore_errors=True)


def _read_marker(folder: Path, minutes: float, seed: int, song_share: float) -> DemoSummary | None:
    """The set's summary, or None where it is not there, not whole or not this one."""
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        made_with = (marker["version"], marker["minutes"], marker["seed"], marker.get("songs", SONG_SHARE))
        if made_with != (VERSION, minutes, seed, song_share):
            return None
        if any((folder / name).stat().st_size != size for name, size in marker["bytes"].items()):
            return None
        return DemoSummary(folder, marker["num_recordings"], marker["seconds"], marker["num_videos"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _check(target: Path, minutes: float, seed: int) -> None:
    if not 0 < minutes <= MOST_MINUTES:
        raise ValueError(f"data.demo_minutes = {minutes}: a demo set has more than 0 and at most {MOST_MINUTES:g}.")
    if seed < 0:
        raise ValueError(f"seed = {seed}: a demo set's seed is 0 or more.")
    if target.exists() and not _is_ours(target):
        raise ValueError(f"{target} holds something other than a demo set; name a new or empty folder "
                         "(data.demo_dir=…).")


def _is_ours(target: Path) -> bool:
    """An empty folder, or one that says it is synthetic: only such a folder is ever replaced."""
    if not target.is_dir():
        return False
    readme = target / "README.txt"
    return ((target / MARKER).is_file() or not any(target.iterdir())
            or (readme.is_file() and readme.read_text(encoding="utf-8", errors="replace").startswith(README[:15])))
