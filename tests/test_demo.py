"""The demo set is what its captions say, the same every time, and songs whose continuation can be learnt."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile as sf

from avray.codecs.clip_dct import encode_clip
from avray.codecs.spectral import FLOOR, Spectral
from avray.data import demo
from avray.data.demo import (
    DemoSummary,
    Recording,
    ensure_demo,
    make_demo,
    short_recording,
    song_recording,
    split_of,
)
from avray.data.demo_shorts import KINDS
from avray.data.demo_songs import compose
from avray.data.demo_sound import SAMPLE_RATE_HZ
from avray.data.demo_video import DIRECTIONS, SHAPES, Clip, draw_clip
from avray.data.manifest import load_manifest

NOTE = re.compile(r"([A-G]#?)(-?\d)")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> DemoSummary:
    """Two minutes: every kind of sound, and songs of both splits."""
    return make_demo(tmp_path_factory.mktemp("demo") / "set", minutes=2.0)


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def first_of(kind: str, number: int, seed: int = 0) -> list[Recording]:
    """The first ``number`` short sounds of a kind."""
    turn = [kind.__name__ for kind in KINDS].index(kind)
    return [short_recording(turn + len(KINDS) * index, seed) for index in range(number)]


def peak_hz(samples: np.ndarray, low_hz: float = 30.0, high_hz: float = 6000.0) -> float:
    """Frequency of the strongest partial, by a parabola through the logarithm of a Hann-windowed spectrum."""
    size = 8 * len(samples)
    spectrum = np.log(np.abs(np.fft.rfft(samples * np.hanning(len(samples)), size)) + 1e-12)
    bins = np.fft.rfftfreq(size, 1 / SAMPLE_RATE_HZ)
    inside = np.flatnonzero((bins > low_hz) & (bins < high_hz))
    top = inside[spectrum[inside].argmax()]
    left, middle, right = spectrum[top - 1:top + 2]
    return (top + 0.5 * (left - right) / (left - 2 * middle + right)) * SAMPLE_RATE_HZ / size


def cents(measured_hz: float, wanted_hz: float) -> float:
    return 1200 * abs(np.log2(measured_hz / wanted_hz))


def hz_of(name: str) -> float:
    letter, octave = NOTE.fullmatch(name).groups()
    names = ["C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B"]
    return 440 * 2 ** ((names.index(letter) - 9) / 12 + int(octave) - 4)


def files_of(folder: Path) -> dict[str, bytes]:
    """Everything but the MP4s and their sizes: x264 does not always give the same bytes for the same frames."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file() and path.suffix != ".mp4" and path.name != demo.MARKER}


@pytest.fixture
def few_clips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Video is half of the time that a small set takes."""
    monkeypatch.setattr(demo, "NUM_CLIPS", 3)


@pytest.mark.usefixtures("few_clips")
def test_same_seed_same_bytes(tmp_path: Path) -> None:
    first, second, other = (make_demo(tmp_path / name, 0.4, seed) for name, seed in (("a", 3), ("b", 3), ("c", 4)))
    assert files_of(first.folder) == files_of(second.folder)
    sounds = [{name: data for name, data in files_of(each.folder).items() if name.endswith(".wav")}
              for each in (first, other)]
    assert not set(sounds[0].values()) & set(sounds[1].values())


@pytest.mark.usefixtures("few_clips")
def test_a_set_of_short_sounds_holds_two_songs(tmp_path: Path) -> None:
    make_demo(tmp_path / "set", minutes=1, song_share=0.0)
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "set/audio/metadata.jsonl").read_text().splitlines()]
    assert kinds.count("song") == 2 and len(kinds) > 10
    assert demo.ensure_demo(tmp_path / "set", minutes=1, song_share=0.0).num_recordings == len(kinds)
    assert demo.ensure_demo(tmp_path / "set", minutes=1).num_recordings < len(kinds), "of another share: made anew"


def test_longer_set_begins_with_shorter(tmp_path: Path) -> None:
    short, long = make_demo(tmp_path / "short", 0.4), make_demo(tmp_path / "long", 0.8)
    assert short.seconds >= 24 and 48 <= long.seconds <= 48 + 30
    beginning = rows_of(short.folder / "audio/metadata.jsonl")
    assert rows_of(long.folder / "audio/metadata.jsonl")[:len(beginning)] == beginning
    for row in beginning:
        name = f"audio/{row['file_name']}"
        assert (short.folder / name).read_bytes() == (long.folder / name).read_bytes()


def test_summary_is_what_is_there(made: DemoSummary) -> None:
    rows = rows_of(made.folder / "audio/metadata.jsonl")
    assert made.num_recordings == len(rows) == len(list(made.folder.glob("audio/*.wav")))
    assert made.num_videos == len(rows_of(made.folder / "video/metadata.jsonl")) == len(
        list(made.folder.glob("video/*.mp4")))
    assert made.seconds == pytest.approx(sum(row["length_s"] for row in rows), abs=0.01)
    assert (made.folder / "README.txt").read_text().startswith("SYNTHETIC")


def test_levels_lengths_and_ends(made: DemoSummary) -> None:
    for row in rows_of(made.folder / "audio/metadata.jsonl"):
        samples, rate_hz = sf.read(made.folder / "audio" / row["file_name"])
        info = sf.info(made.folder / "audio" / row["file_name"])
        assert (rate_hz, info.channels, info.subtype) == (24_000, 1, "PCM_16")
        assert -30 < 20 * np.log10(np.sqrt(np.mean(samples**2))) < -19, row
        assert np.abs(samples).max() < 0.92
        assert max(abs(samples[0]), abs(samples[-1])) < 1e-3
        assert row["length_s"] == pytest.approx(len(samples) / rate_hz, abs=1e-4)
        assert f"{row['length_s']:.2f} seconds long." in row["text"]
        assert all(note["start_s"] < row["length_s"] for note in row.get("notes", []))


def test_groups_kinds_and_splits(made: DemoSummary) -> None:
    rows = rows_of(made.folder / "audio/metadata.jsonl")
    assert len({row["group"] for row in rows}) == len(rows)
    assert {row["kind"] for row in rows} == {"song", *(kind.__name__ for kind in KINDS)}
    songs = [row for row in rows if row["kind"] == "song"]
    assert {row["split"] for row in songs} == {"train", "validation"}
    assert all(8 <= row["length_s"] <= 30 for row in songs)
    assert all(1 <= row["length_s"] < 4 for row in rows if row["kind"] != "song")
    assert 0.7 < sum(row["length_s"] for row in songs) / made.seconds < 0.9


def test_every_kind_is_validated_in_a_longer_set() -> None:
    turns = [(compose(index, np.random.default_rng(index)).form, split_of(index)) for index in range(40)]
    turns += [(KINDS[index % len(KINDS)].__name__, split_of(index)) for index in range(40)]
    for name in {name for name, _ in turns}:
        assert {split for other, split in turns if other == name} == {"train", "validation"}, name


def test_manifest_takes_every_row(made: DemoSummary) -> None:
    for name in ("audio", "video", "mixed_multimodal_av.jsonl"):
        manifest = load_manifest(str(made.folder / name))
        assert manifest.rows and not manifest.rejects, manifest.rejects[:1]
    rows = load_manifest(str(made.folder / "audio")).rows
    assert {row["split"] for row in rows} == {"train", "validation"} and all(row["text"] for row in rows)


@pytest.mark.parametrize(("kind", "tolerance_cents"), [("tone", 2.0), ("pluck", 5.0), ("bell", 5.0)])
def test_single_notes_have_the_pitch_in_their_caption(kind: str, tolerance_cents: float) -> None:
    for recording in first_of(kind, 8):
        said = re.search(r"at ([A-G]#?\d) \((\d+\.\d+) Hz\)", str(recording.row["text"]))
        wanted_hz = float(said[2])
        assert cents(wanted_hz, hz_of(said[1])) < 0.1 and wanted_hz == recording.row["pitch_hz"]
        near = 1.0 if kind == "tone" else 2 ** (1 / 4)  # a tone has one partial; a string and a bell have more
        band = (30.0, 6000.0) if kind == "tone" else (wanted_hz / near, wanted_hz * near)
        assert cents(peak_hz(recording.samples, *band), wanted_hz) < tolerance_cents, recording.row


def test_pure_tones_hold_nothing_else() -> None:
    for recording in first_of("tone", 3):
        spectrum = np.abs(np.fft.rfft(recording.samples * np.hanning(len(recording.samples)))) ** 2
        hz = np.fft.rfftfreq(len(recording.samples), 1 / SAMPLE_RATE_HZ)
        inside = np.abs(hz - recording.row["pitch_hz"]) < 20
        assert spectrum[~inside].sum() < 1e-3 * spectrum.sum()


def test_melodies_play_the_notes_in_their_caption_at_their_tempo() -> None:
    for recording in first_of("melody", 8):
        row = recording.row
        names = NOTE.findall(str(row["text"]).split("bpm, ")[1].split(", ")[0])
        notes = row["notes"]
        assert ["".join(name) for name in names] == [note["pitch"] for note in notes]
        beat_s = 60 / row["tempo_bpm"]
        for index, note in enumerate(notes):
            assert note["start_s"] == pytest.approx(index * beat_s, abs=1e-3)
            start, stop = (int((index + part) * beat_s * SAMPLE_RATE_HZ) for part in (0.15, 0.85))
            heard_hz = peak_hz(recording.samples[start:stop], note["hz"] / 1.12, note["hz"] * 1.12)
            assert cents(heard_hz, note["hz"]) < 12, (row["text"], note)


def test_chirps_go_from_one_end_to_the_other() -> None:
    for recording in first_of("chirp", 5):
        row, samples = recording.row, recording.samples
        num = SAMPLE_RATE_HZ // 20
        start_hz, stop_hz = (peak_hz(piece, 50) for piece in (samples[:num], samples[-num:]))
        slack = row["from_hz"] / row["to_hz"]
        allowed_cents = 60 + 1200 * abs(np.log2(slack)) * 0.1 / row["length_s"]
        assert cents(start_hz, row["from_hz"]) < allowed_cents and cents(stop_hz, row["to_hz"]) < allowed_cents
        assert ("rising" in row["text"]) == (stop_hz > start_hz)


def test_drums_are_hit_where_the_notes_say() -> None:
    codec = Spectral().load("cpu")
    for recording in first_of("drums", 5):
        row = recording.row
        frames = codec.encode_batch([recording.samples])[0]
        rise = np.maximum(np.diff(frames, axis=0, prepend=frames[:1] * 0 + np.log(FLOOR)), 0).sum(1)
        hits = {round(note["start_s"] * codec.frame_rate_hz) for note in row["notes"]}
        near = {hit + offset for hit in hits for offset in (-2, -1, 0, 1, 2)}
        at_hits = np.mean([rise[max(hit - 2, 0):hit + 3].max() for hit in hits])
        elsewhere = np.mean([value for index, value in enumerate(rise) if index not in near])
        assert at_hits > 2 * elsewhere, row["text"]
        half_beat_s = 30 / row["tempo_bpm"]
        assert all(abs(note["start_s"] / half_beat_s % 1 - 0.5) > 0.49 for note in row["notes"])


def test_noise_has_its_colour() -> None:
    slopes = {"brown": -6, "pink": -3, "white": 0, "blue": 3}
    for recording in first_of("noise", 6):
        power = np.abs(np.fft.rfft(recording.samples)) ** 2
        hz = np.fft.rfftfreq(len(recording.samples), 1 / SAMPLE_RATE_HZ)
        octaves = [power[(hz > low) & (hz <= 2 * low)].mean() for low in (100, 200, 400, 800, 1600)]
        slope = np.polyfit(range(5), 10 * np.log10(octaves), 1)[0]
        assert slope == pytest.approx(slopes[str(recording.row["instrument"]).split()[0]], abs=1.0)


def _ridge_gain(seed: int) -> float:
    """How much better than the best baseline a ridge regression continues the held-out songs of seventeen.

    For each band, seven neighbours of: the last, an earlier, the first frames, the second half and the mean of two
    seconds; out come fifteen steps of the next two, as differences from the mean.
    """
    codec = Spectral().load("cpu")
    inputs, targets, splits = [], [], []
    for index in range(17):
        song = song_recording(index, seed)
        frames = codec.encode_batch([song.samples])[0]
        for start in range(0, len(frames) - 299, 150):
            inputs.append(frames[start:start + 150])
            targets.append(frames[start + 150:start + 300])
            splits.append(song.row["split"])
    x, y, held_out = np.stack(inputs), np.stack(targets), np.array(splits) == "validation"
    mean = x.mean(1, keepdims=True)
    level = x[~held_out].mean()
    looks = np.stack([x[:, -10:].mean(1), x[:, -40:-30].mean(1), x[:, :10].mean(1), x[:, 75:].mean(1)], 1) - mean
    looks = np.pad(np.concatenate([looks, mean - level], 1), ((0, 0), (0, 0), (3, 3)), mode="edge")
    features = np.stack([looks[:, :, near:near + 128] for near in range(7)], -1).transpose(0, 2, 1, 3)
    features = features.reshape(len(x), 128, 35)
    steps = (y - mean).reshape(len(y), 15, 10, 128).mean(2).transpose(0, 2, 1)
    a, b = features[~held_out].reshape(-1, 35), steps[~held_out].reshape(-1, 15)
    weights = np.linalg.solve(a.T @ a + 30 * np.eye(35), a.T @ b)
    guess = mean[held_out] + np.repeat((features[held_out] @ weights).transpose(0, 2, 1), 10, 1)
    wanted = y[held_out]
    baselines = [np.mean((wanted - other) ** 2) for other in (x[held_out], mean[held_out], np.log(FLOOR))]
    return 1 - float(np.mean((wanted - guess) ** 2)) / min(baselines)


def test_songs_can_be_continued_better_than_any_baseline() -> None:
    assert _ridge_gain(seed=0) > 0.2


def test_tasks_have_their_numbers(made: DemoSummary) -> None:
    sizes = {"audio": 128, "video": 256}
    for task, size in sizes.items():
        rows = rows_of(made.folder / f"sample_{task}.jsonl")
        assert rows and all(row["task"] == task and len(row["embedding"]) == size for row in rows)
        assert all(np.isfinite(row["embedding"]).all() for row in rows)
    mixed = rows_of(made.folder / "mixed_multimodal_av.jsonl")
    assert {row["task"] for row in mixed[:5]} == {"text", "code", "image", "audio", "video"}
    assert all({"task", "instruction", "input", "output", "embedding"} <= row.keys() for row in mixed)
    for task, size in sizes.items():
        rows = [row for row in mixed if row["task"] == task]
        by_file = [row for row in rows if row["embedding"] is None]
        assert all((made.folder / row[task]).is_file() for row in by_file) and 0 < len(by_file) < len(rows)
        assert all(len(row["embedding"]) == size and task not in row for row in rows if row not in by_file)


def test_tasks_fit_the_smallest_context(made: DemoSummary) -> None:
    for row in rows_of(made.folder / "mixed_multimodal_av.jsonl"):
        read = row["instruction"] + row["input"] + (row["output"] if row["task"] in ("text", "code", "image") else "")
        assert len(read) < 62, read


def centroids(frames: np.ndarray) -> np.ndarray:
    """(x, y) of what differs from the corner's colour, frame by frame."""
    differs = np.abs(frames.astype(int) - frames[:1, :1, :1].astype(int)).sum(-1) > 60
    return np.array([[columns.mean(), lines.mean()] for lines, columns in map(np.nonzero, differs)])


def test_shapes_move_as_the_caption_says(made: DemoSummary) -> None:
    rows = rows_of(made.folder / "video/metadata.jsonl")
    assert {row["direction"] for row in rows} == set(DIRECTIONS) and {row["shape"] for row in rows} == set(SHAPES)
    for row in rows:
        with av.open(str(made.folder / "video" / row["file_name"])) as container:
            stream = container.streams.video[0]
            assert (stream.codec_context.name, float(stream.average_rate)) == ("h264", 10.0)
            frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
        assert frames.shape == (20, 64, 64, 3)
        path = centroids(frames)
        axis, sign = {"left": (0, -1), "right": (0, 1), "up": (1, -1), "down": (1, 1)}[row["direction"]]
        assert sign * (path[-1, axis] - path[0, axis]) > 20 and (sign * np.diff(path[:, axis]) > 0).all()
        assert np.ptp(path[:, 1 - axis]) < 2
        assert row["text"].split()[1:5] == [row["colour"], row["shape"], "moves", row["direction"]]
        assert (frames[0, 0, 0].mean() > 128) == (row["background"] == "bright")


@pytest.mark.parametrize("shape", SHAPES)
def test_clip_numbers_tell_the_direction(shape: str) -> None:
    there = draw_clip(Clip(shape, "red", "right", "dark", 9.0, (12.0, 30.0), (50.0, 30.0)))
    back = encode_clip(there[::-1])
    numbers = encode_clip(there)
    assert numbers.shape == (256,)
    red, green, blue = (there[..., channel].mean() / 255 for channel in range(3))
    assert numbers[0] == pytest.approx(0.299 * red + 0.587 * green + 0.114 * blue, abs=1e-5)
    time_and_width = 1 * 64 + 0 * 8 + 1  # first coefficient in time and across: its sign is the direction
    assert numbers[time_and_width] == pytest.approx(-back[time_and_width], abs=1e-6)
    assert abs(numbers[time_and_width]) > 0.005


@pytest.mark.usefixtures("few_clips")
def test_whole_set_is_reused(tmp_path: Path) -> None:
    first = ensure_demo(tmp_path / "set", 0.3)
    before = (first.folder / demo.MARKER).stat()
    assert ensure_demo(tmp_path / "set", 0.3) == first
    after = (first.folder / demo.MARKER).stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


@pytest.mark.parametrize("harm", ["delete_sound", "cut_sound", "delete_marker", "cut_marker", "other_seed"])
@pytest.mark.usefixtures("few_clips")
def test_half_made_set_is_replaced(tmp_path: Path, harm: str) -> None:
    first = ensure_demo(tmp_path / "set", 0.3)
    whole = files_of(first.folder)
    sound, marker = first.folder / "audio/song-0000.wav", first.folder / demo.MARKER
    if harm == "other_seed":
        ensure_demo(tmp_path / "set", 0.3, seed=1)
        assert sound.read_bytes() != whole["audio/song-0000.wav"]
    else:
        harmed = sound if harm.endswith("sound") else marker
        harmed.unlink() if harm.startswith("delete") else os.truncate(harmed, 100)
    assert ensure_demo(tmp_path / "set", 0.3) == first
    assert files_of(first.folder) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


@pytest.mark.usefixtures("few_clips")
def test_interrupted_making_leaves_the_old_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = ensure_demo(tmp_path / "set", 0.3)
    whole = files_of(first.folder)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(demo, "write_tasks", fail)
    with pytest.raises(OSError, match="No space"):
        ensure_demo(tmp_path / "set", 0.3, seed=1)
    assert files_of(first.folder) == whole and [path.name for path in tmp_path.iterdir()] == ["set"]


@pytest.mark.usefixtures("few_clips")
def test_killed_makers_leftovers_are_swept(tmp_path: Path) -> None:
    for name, age_s in (("old", 2 * demo.LEFTOVER_AGE_S), ("new", 0.0)):
        leftover = tmp_path / f".set.partial-{name}"
        leftover.mkdir()
        os.utime(leftover, (leftover.stat().st_mtime - age_s,) * 2)
    ensure_demo(tmp_path / "set", 0.3)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".set.partial-new", "set"]


@pytest.mark.usefixtures("few_clips")
def test_first_of_two_makers_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both found nothing; the second, done later, keeps the set that others may be reading."""
    ready = make_demo(tmp_path / "ready", 0.3)
    build = demo._build

    def build_while_another_finishes(folder: Path, minutes: float, seed: int, song_share: float) -> None:
        build(folder, minutes, seed, song_share)
        shutil.copytree(ready.folder, tmp_path / "set")
        (tmp_path / "set" / "mine").write_text("still here")

    monkeypatch.setattr(demo, "_build", build_while_another_finishes)
    ensure_demo(tmp_path / "set", 0.3)
    assert (tmp_path / "set" / "mine").exists()


@pytest.mark.parametrize("make", [make_demo, ensure_demo])
def test_a_folder_of_other_things_is_left_alone(tmp_path: Path, make) -> None:
    (tmp_path / "README.txt").write_text("My recordings")
    with pytest.raises(ValueError, match="other than a demo set"):
        make(tmp_path, 0.3)
    with pytest.raises(ValueError, match="other than a demo set"):
        make(tmp_path / "README.txt", 0.3)
    assert [path.name for path in tmp_path.iterdir()] == ["README.txt"]


@pytest.mark.parametrize(("minutes", "seed"), [(0.0, 0), (-1.0, 0), (float("nan"), 0), (float("inf"), 0), (0.3, -1)])
def test_settings_out_of_range(tmp_path: Path, minutes: float, seed: int) -> None:
    with pytest.raises(ValueError, match="demo set"):
        make_demo(tmp_path / "set", minutes, seed)
    assert not (tmp_path / "set").exists()
