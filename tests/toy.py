"""A family and a data set so small that the platform can be tested without any codec."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from avray.config import DataSettings, RunSettings, TrainerSettings, TrainSettings, from_mapping
from avray.data.cache import Cache
from avray.data.loader import PreparedSource
from avray.data.plan import Plan, Shards, make_shard
from avray.family import Batch, Column, Example, Fitted, Question, Unit
from avray.train.job import Job
from avray.train.loop import Loop, Place

WIDTH = 4


@dataclass(frozen=True)
class ToyEncoder:
    scale: float = 1.0

    def column_id(self):
        return f"toy{self.scale:g}"

    def load(self, device):
        return ToyNetwork(self.scale)


class ToyNetwork:
    """Mean of each 0.1 s at 1 kHz, times a scale, in WIDTH copies."""

    sample_rate_hz, frame_rate_hz = 1000, 10.0

    def __init__(self, scale):
        self.scale = scale

    def encode_batch(self, recordings):
        frames = [np.add.reduceat(r, np.arange(0, len(r), 100)) / 100 if len(r) else np.zeros(0) for r in recordings]
        return [np.repeat(f[:, None] * self.scale, WIDTH, 1).astype(np.float32) for f in frames]

    def stream(self):
        raise AssertionError("recordings here are short")


@dataclass(frozen=True)
class ToyFamily:
    """Predict an example's target from its input by a linear layer with dropout."""

    segment_s: float = 1.0
    dropout: float = 0.1
    poison: str = ""
    name: str = field(default="toy")

    def segment(self, rows):
        return [Example(f"{row['id']}:{i}", {"input": Unit(row["audio"], "audio", i * self.segment_s, self.segment_s)},
                        {"text": row.get("text") or ""}, row.get("weight", 1.0))
                for row in rows for i in range(int(row["duration_s"] / self.segment_s))]

    def columns(self, fitted):
        return [Column("toy", ToyEncoder(), dtype="float32", context_s=0.0)]

    def fit(self, rows):
        return Fitted({"mean": np.mean([row["input.toy"].mean(0) for row in rows], 0)}, {"seen": "toy"})

    def collate(self, rows, fitted):
        kept = [row if row["weight"] else None for row in rows]
        x = np.stack([row["input.toy"].mean(0) if row else np.zeros(WIDTH) for row in kept])
        weight = torch.tensor([row["weight"] if row else 0.0 for row in kept])
        target = x[:, ::-1] * 2 + 1
        if any(row and row["id"] == self.poison for row in kept):
            target = target * np.nan
        return Batch({"x": torch.tensor(x).float(), "y": torch.tensor(target.copy()).float(), "weight": weight},
                     {"mse": float(weight.sum()) * WIDTH}, [row["id"] if row else "" for row in kept])

    def build(self, fitted):
        return nn.Sequential(nn.Linear(WIDTH, 8), nn.Dropout(self.dropout), nn.Tanh(), nn.Linear(8, WIDTH))

    def init(self, model, generator):
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3, generator=generator)

    @property
    def terms(self):
        return {"mse": 1.0}

    def loss(self, model, batch, generator):
        noise = 0.01 * torch.randn(batch["x"].shape, generator=generator)
        error = (model(batch["x"] + noise) - batch["y"]).square().sum(1)
        return {"mse": (error * batch["weight"]).nan_to_num(nan=torch.nan).sum()}

    def baselines(self, batch, fitted):
        return {"zero": {"mse": (batch["y"].square().sum(1) * batch["weight"]).sum()}}

    def question(self, example):
        return Question(prompt=example.units["input"], seconds=self.segment_s)


def toy_plan(cache, split="train", recordings=5, examples=7, seed=0, reject=()):
    """Shards of random columns, written to the cache without any encoder."""
    random = np.random.default_rng(seed)
    shards = []
    for r in range(recordings):
        shard = make_shard([Example(f"{split}{r}:{i}", {"input": Unit(f"{split}{r}.wav", "audio", float(i), 1.0)})
                            for i in range(examples)], {f"{split}{r}.wav": f"{seed}{r}"})
        values = [random.normal(size=(10, WIDTH)).astype(np.float32) for _ in shard.units]
        rejects = {i: "it is bad" for i in range(examples) if f"{split}{r}:{i}" in reject}
        kept = [None if i in rejects else v for i, v in enumerate(values)]
        cache.write(shard, ToyFamily().columns(None)[0], kept, rejects)
        shards.append(shard)
    return Plan(split, Shards(shards))


def toy_job(folder, trainer=None, family=None, run="run", seed=0, **settings):
    cache = Cache(str(folder / "cache"))
    train, validation = toy_plan(cache, "train"), toy_plan(cache, "validation", recordings=2, seed=1)
    trainer = from_mapping(TrainerSettings, {
        "max_steps": 12, "batch_size": 12, "log_every_steps": 4, "validate_every_steps": 6, "num_samples": 0,
        "checkpoint_every_steps": 4, "ema_decay": 0.0,
        "optimizer": {"lr": 0.01}, "loggers": {"tensorboard": False}, **(trainer or {})})
    settings = TrainSettings(seed=seed, run=RunSettings(str(folder / run)),
                             data=DataSettings(cache=str(folder / "cache")), trainer=trainer, **settings)
    return Job(settings, family or ToyFamily(), Fitted({"mean": np.zeros(WIDTH)}), train, validation,
               family_record={"name": "toy"})


def toy_place(job, rank=0, world_size=1, device="cpu", **callbacks):
    cache = Cache(job.settings.data.cache)
    source = PreparedSource(job.train, job.train_order, cache, job.columns)
    return Place(rank, world_size, torch.device(device), lambda epoch, step: source,
                 PreparedSource(job.validation, job.validation_order, cache, job.columns), **callbacks)


def run_loop(job, **callbacks):
    loop = Loop(job, toy_place(job, **callbacks))
    return loop, loop.run()
