"""Real clips and sounds beside the demo set, through both paths: the rows to train on, and what became of them.

    python -m benchmarks.multitask_real rows DATA FOLDER         # DATA has env/esc10 and video; FOLDER gets all below
    python pipelines/train.py experiment=multitask_demo data.path=FOLDER/mixed.jsonl data.allowed_roots=[DATA] \\
        run.dir=runs/real
    python pipelines/train.py experiment=multitask_demo data.path=FOLDER/files.jsonl data.allowed_roots=[DATA] \\
        'family.encoder={path: FOLDER/ears}' 'family.video_encoder={path: FOLDER/eyes}' family.audio_width=32 \\
        family.video_width=32 run.dir=runs/pretrained
    python -m benchmarks.multitask_real judge FOLDER runs/real runs/pretrained

``ears`` and ``eyes`` are a Wav2Vec2 and a VideoMAE of random weights: what they say of files is little, but not
nothing. A sound is right where its mean log-mel frame is nearest to that of its class among the ten, over all its
recordings; a clip where its DCT is nearest to its own among the four. Both are generated as files first, a clip with
its sound, and read again.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from avray.codecs.clip_dct import CLIP_S, FRAME_RATE_HZ, SIZE, encode_clip
from avray.codecs.spectral import Spectral
from avray.data.demo_tasks import task_rows
from avray.engine import Generator, resampled
from avray.family import Request
from avray.media import read_audio, read_video, write_audio, write_video

CLASSES = ("dog", "rain", "sea waves", "baby", "clock", "sneeze", "helicopter", "chainsaw", "rooster", "fire")


def real_rows(data: Path) -> list[dict[str, Any]]:
    """A sound's prompt is its class, a clip's its name."""
    sounds = [{"task": "audio", "instruction": "Play", "input": CLASSES[int(path.parent.name) - 1], "audio": str(path),
               "split": "train"}
              for path in sorted((data / "env" / "esc10").rglob("*.ogg"))]
    clips = [{"task": "video", "instruction": "Show", "input": path.stem.replace("_", " "), "video": str(path),
              "split": "train"} for path in sorted((data / "video").glob("*.mp4"))]
    return sounds + clips


def write_rows(data: Path, folder: Path) -> None:
    import torch
    from transformers import VideoMAEConfig, VideoMAEModel, Wav2Vec2Config, Wav2Vec2Model

    folder.mkdir(parents=True, exist_ok=True)
    real, demo = real_rows(data), task_rows()
    for name, rows in (("mixed", real + demo), ("files", real + [row for row in demo if row["embedding"] is None])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    Wav2Vec2Model(Wav2Vec2Config(**small, conv_dim=(32,) * 7, num_conv_pos_embeddings=4,
                                 num_conv_pos_embedding_groups=2)).save_pretrained(folder / "ears")
    VideoMAEModel(VideoMAEConfig(**small, image_size=32, patch_size=16, num_frames=4)).save_pretrained(folder / "eyes")
    print(f"{len(real)} files and {len(demo)} rows of the demo set are in {folder}")


def mean_frame(path: str) -> np.ndarray:
    [frames] = Spectral().load("cpu").encode_batch([resampled(read_audio(path), 24_000)])
    return frames.mean(0)


def numbers(path: str) -> np.ndarray:
    return encode_clip(read_video(path, 0.0, CLIP_S, FRAME_RATE_HZ, SIZE).frames)


def right(made: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> int:
    """How many are nearer to their own than to all others."""
    return sum(min(wanted, key=lambda name: float(((made[prompt] - wanted[name]) ** 2).sum())) == prompt
               for prompt in made)


def judge(folder: Path, runs: list[str]) -> None:
    rows = [row for row in map(json.loads, (folder / "files.jsonl").read_text().splitlines())
            if row["task"] in ("audio", "video")]
    heard: dict[str, list[np.ndarray]] = defaultdict(list)
    for row in rows:
        if row["task"] == "audio":
            heard[row["input"]].append(mean_frame(row["audio"]))
    classes = {name: np.mean(frames, 0) for name, frames in heard.items()}
    clips = {row["input"]: numbers(row["video"]) for row in rows if row["task"] == "video"}
    for run in runs:
        generator, sounds, shown = Generator.open(run), {}, {}
        for name in classes:
            path = folder / "made.wav"
            write_audio(path, generator.generate(f"Play {name}", task="audio", seed=0).audio)
            sounds[name] = mean_frame(str(path))
        for name in clips:
            [made] = generator.generate_many([Request(f"Show {name}", task="video", fields={"sound": True})])
            write_video(folder / "made.mp4", made.media)  # type: ignore[arg-type]
            shown[name] = numbers(str(folder / "made.mp4"))
            assert read_audio(str(folder / "made.mp4")).seconds >= CLIP_S
        print(f"{run}: {right(sounds, classes)} of {len(classes)} sounds, {right(shown, clips)} of {len(clips)} clips")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    rows = verbs.add_parser("rows")
    rows.add_argument("data", type=Path)
    rows.add_argument("folder", type=Path)
    judged = verbs.add_parser("judge")
    judged.add_argument("folder", type=Path)
    judged.add_argument("runs", nargs="+")
    given = parser.parse_args()
    if given.verb == "rows":
        write_rows(given.data.resolve(), given.folder.resolve())
    else:
        judge(given.folder, given.runs)


if __name__ == "__main__":
    main()
