"""Each task's preset from recordings to a loss and a sound, without Ray: what it is given reaches the model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from avray.cli import TRAIN, compose
from avray.data.cache import Cache
from avray.data.dataset import open_dataset
from avray.data.embed import Embedder
from avray.data.rows import example_row
from avray.engine import Engine, Generator
from avray.family import Options
from avray.media import Audio, Video, write_video
from avray.nn.dit import DiTConfig
from avray.registry import family_from_settings
from avray.train.samples import answer, questions

PRESETS = {"demo": "text_to_audio", "music": "text_to_music", "singing": "singing", "speech": "speech",
           "enhancement": "enhancement", "super_resolution": "super_resolution", "video": "video_to_audio"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten clips of a light that goes on with a tone, in the middle of a second or at its end; and one without sound."""
    folder = tmp_path_factory.mktemp("clips")
    for index in range(10):
        frames, samples = np.zeros((30, 48, 64, 3), np.uint8), np.zeros((1, 24_000), np.float32)
        first = 10 + index
        frames[first:] = 255
        at = first * 800
        samples[0, at:] = 0.4 * np.sin(2 * np.pi * 500 * np.arange(24_000 - at) / 24_000)
        write_video(folder / f"light{index}.mp4", Video(frames, 30.0, Audio(samples, 24_000)))
    write_video(folder / "mute.mp4", Video(frames, 30.0))
    return folder


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_learns_and_generates(preset: str, folder: Path, clips: Path) -> None:
    data = [f"data.path={clips}", "data.max_reject_fraction=0.1"] if preset == "video" else [
        "data.demo_minutes=0.5", "data.max_reject_fraction=0.5"]  # two of its nine rows are songs, which are too long
    settings = compose(TRAIN, [f"experiment=instruct_{preset}", *data, f"data.demo_dir={folder}",
                               f"data.cache={folder / 'cache'}"])
    family = family_from_settings(settings.family)
    family = dataclasses.replace(family, network=DiTConfig(width=16, num_layers=2, num_heads=2), text_heads=2,
                                 num_steps=2)
    task = PRESETS[preset]
    dataset = open_dataset(family, settings.data)
    plan = dataset.plans["train"]
    if task == "video_to_audio":
        [reject] = dataset.manifest.rejects
        assert reject.reason == f"{clips}/mute.mp4 has no sound in it that can be decoded."
    columns, cache = family.columns(None), Cache(settings.data.cache)
    for shard in plan.shards:
        for column in columns:
            Embedder(column, cache).ensure(shard)
    rows = [example_row(shard, example, cache, columns) for shard in plan.shards for example in shard.examples][:6]
    assert {row["task"] for row in rows} == {task} and all(row["weight"] for row in rows)
    fitted = family.fit(iter(rows))
    model = family.build(fitted)
    family.init(model, torch.Generator().manual_seed(0))
    batch = family.collate(rows, fitted)
    sums = family.loss(model.train(), batch, torch.Generator().manual_seed(0))
    sum(sums.values()).backward()
    assert 1 < float(sums["flow"].detach()) / batch.counts["flow"] < 4
    if task in ("enhancement", "super_resolution"):
        given, wanted = (rows[0][f"{role}.latents"].astype(float) for role in ("sound", "output"))
        assert given.shape == wanted.shape and np.abs(given - wanted).mean() > 0.2
    if task == "video_to_audio":
        row = max(rows, key=lambda row: str(row["id"]))
        lit, loud = batch["video"][rows.index(row), :, 0], row["output.latents"].max(1)
        assert row["video.frames"].shape == (25, 160) and lit.shape == (75,)
        onset = int(np.argmax(loud > loud.mean()))
        assert abs(int((lit > 0.5).int().argmax()) - onset) <= 6, "a picture stands where its sound does"
    generator = Generator(Engine(family, model.eval(), fitted, slots=2))
    made = answer(generator, questions(family, plan, 2), Options())
    assert all(np.isfinite(item.generated.audio.samples).all() for item in made)
    if task in ("enhancement", "super_resolution", "video_to_audio"):
        assert all(abs(item.generated.audio.seconds - item.target.seconds) < 0.02 for item in made)
