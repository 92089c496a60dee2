"""Sweeps on the shared Ray, on real files: what they leave, weights that travel, a driver killed and resumed."""

from __future__ import annotations

import csv
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from avray.checkpoint import Checkpoint
from avray.cli import GENERATE, SWEEP, compose
from avray.errors import TrainingFailed
from avray.tuning.journal import Journal
from avray.tuning.sweep import sweep

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

TINY = ["family.segment_s=0.4", "family.num_layers=1", "family.num_heads=4", "family.feed_forward=32",
        "data.embed_num_cpus=0.5", "trainer.cpus_per_worker=0.5", "trainer.batch_size=6", "trainer.log_every_steps=1",
        "trainer.validate_every_steps=2", "trainer.max_steps=4", "tune.max_concurrent=2", "tune.min_steps=2"]


@pytest.fixture(scope="module")
def common(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """12 recordings of 3 s, gliding tones, and one cache for all sweeps."""
    folder = tmp_path_factory.mktemp("wavs")
    time_s = np.arange(3 * 16_000) / 16_000
    for index in range(12):
        pitch = 200 * 1.1**index * (1 + 0.1 * time_s)
        soundfile.write(folder / f"tone{index}.wav", 0.3 * np.sin(2 * np.pi * pitch * time_s), 16_000)
    return [f"data.path={folder}", f"data.cache={tmp_path_factory.mktemp('cache')}", *TINY]


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "results.csv") as file:
        return list(csv.DictReader(file))


class Breaks:
    """A hook that fails as its trial's batch size says: always, or with its process and once only where it is 4."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_epoch_start(self, loop: Any) -> None:
        size = loop.trainer.batch_size
        if size == 3:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 10 bytes")
        if size == 5:
            raise KeyError("broken")
        if size == 4 and not (self.folder / "broken").exists():
            (self.folder / "broken").touch()
            os._exit(1)


class Dawdles:
    """A hook that keeps every trial but the one with the default settings waiting."""

    def on_validation_start(self, loop: Any) -> None:
        if loop.trainer.optimizer.weight_decay != 0.01:
            time.sleep(4)


def test_a_sweep_leaves_its_best_whatever_fails(ray_session: None, common: list[str], tmp_path: Path,
                                                capsys: pytest.CaptureFixture[str]) -> None:
    """Four batch sizes: one fine, one whose worker dies once, one out of memory, one that breaks each time. Two
    objectives, a family's metric."""
    from avray.generation.one import generate

    folder = tmp_path / "sweep"
    said = sweep(compose(SWEEP, [
        *common, f"run.dir={folder}", "tune=grid", "tune.space.trainer.batch_size={choice: [6, 4, 3, 5]}",
        "tune.space.trainer.optimizer.lr=null", "tune.space.trainer.optimizer.weight_decay=null",
        "tune.space.family.dropout=null", "tune.metric_samples=1",
        "tune.objectives=[{metric: validation_loss}, {metric: log_mel_distance_db}]",
        f"trainer.hooks=[{{_target_: {__name__}.Breaks, folder: {tmp_path}}}]"]))
    found = {int(row["trainer.batch_size"]): row for row in rows(folder)}
    assert {size: row["state"] for size, row in found.items()} == {6: "finished", 4: "finished", 3: "failed",
                                                                   5: "failed"}
    assert (tmp_path / "broken").exists(), "the trial whose worker died was started again"
    assert found[3]["error"].startswith("A worker ran out of memory: lower trainer.batch_size")
    assert found[5]["error"] == "A worker failed: KeyError: 'broken'"
    assert all(np.isfinite(float(found[size]["log_mel_distance_db"])) for size in (4, 6))
    assert "2 trials at a time, as tune.max_concurrent=2" in capsys.readouterr().err
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["trials"] == {"finished": 2, "stopped": 0, "failed": 2} and 1 <= len(summary["pareto"]) <= 2
    assert (folder / "pareto.csv").exists() and (folder / "loss.png").exists() and (folder / "parallel.png").exists()
    assert f"{folder}/best" in said
    best = Checkpoint.open(folder / "best")
    assert best.figures["validation_loss"] == pytest.approx(summary["best"]["values"]["validation_loss"])
    wav = next(Path(common[0].removeprefix("data.path=")).glob("*.wav"))
    generate(compose(GENERATE, [f"checkpoint={folder}/best", f"audio={wav}", "seconds=0.4",
                                f"output={tmp_path}/out.wav"]))
    assert soundfile.info(tmp_path / "out.wav").frames == 9600
    with pytest.raises(ValueError, match="holds a sweep"):
        sweep(compose(SWEEP, [*common, f"run.dir={folder}"]))


@pytest.mark.parametrize("workers", [1, 2])
def test_best_yaml_drops_into_train(ray_session: None, common: list[str], tmp_path: Path, workers: int) -> None:
    """Optuna and Hyperband, in the trials' own processes and in two workers of each; then the very loss of the best
    trial from its best.yaml."""
    from avray.config import TrainSettings, from_mapping
    from avray.registry import family_from_settings
    from avray.settings import composing
    from avray.train.trainer import train

    folder = tmp_path / "sweep"
    sweep(compose(SWEEP, [*common, f"run.dir={folder}", "tune=hyperband", f"tune.num_samples={4 - workers}",
                          f"trainer.num_workers={workers}"]))
    summary = json.loads((folder / "summary.json").read_text())
    assert sum(summary["trials"].values()) == 4 - workers and summary["trials"]["failed"] == 0
    mapping = composing.compose("best", TrainSettings, [f"run.dir={tmp_path}/again"], config_dir=folder,
                                config_name="best")
    settings = from_mapping(TrainSettings, mapping)
    again = train(settings, family_from_settings(settings.family))
    assert again["best_validation_loss"] == summary["best"]["values"]["validation_loss"]


def test_pbt_copies_weights_and_moments(ray_session: None, common: list[str], tmp_path: Path) -> None:
    """After an exploit the trial's parameters are the donor's, bit for bit, its rate its own, and it trains on. One
    trial is faster and has to wait, and what it does meanwhile must not count."""
    folder = tmp_path / "sweep"
    sweep(compose(SWEEP, [*common, f"run.dir={folder}", "tune=pbt", "tune.num_samples=2", "trainer.max_steps=6",
                          "tune.perturb_every_steps=2", "tune.quantile=0.5",
                          f"trainer.hooks=[{{_target_: {__name__}.Dawdles}}]"]))
    journal = Journal(folder / "journal.jsonl")
    for number in (0, 1):
        assert [event["step"] for event in journal.events
                if (event["event"], event["number"]) == ("result", number)] == [2, 4, 6]
    exploits = [event for event in journal.events if event["event"] == "exploit"]
    assert exploits, "of two trials the worse one always copies"
    last = {event["number"]: event for event in exploits}
    for number, event in last.items():
        step = f"step-{event['step']:08d}"
        copied, donor = (Checkpoint.open(folder / "trials" / f"{one:04d}" / "checkpoints" / step)
                         for one in (number, event["donor"]))
        for name in ("model", "ema"):
            mine, theirs = copied.weights(name), donor.weights(name)
            assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)
        end = Checkpoint.open(folder / "trials" / f"{number:04d}" / "last")
        assert end.step == 6
        trained = end.weights("model")
        assert any(not torch.equal(trained[key], mine) for key, mine in copied.weights("model").items())
        state = end.trainer_state()
        assert state is not None
        group = state["optimizer"]["param_groups"][0]
        assert group["weight_decay"] == event["params"]["trainer.optimizer.weight_decay"], "its own"
    assert all(record.state == "finished" for record in journal.trials)


def test_a_sweep_in_which_all_fails_says_the_first_reason(ray_session: None, common: list[str], tmp_path: Path) -> None:
    with pytest.raises(TrainingFailed, match="None of 1 trials .* the first: A worker ran out of memory"):
        sweep(compose(SWEEP, [*common, f"run.dir={tmp_path}/sweep", "tune=random", "tune.num_samples=1",
                              "trainer.batch_size=3", "tune.max_failures=0",
                              f"trainer.hooks=[{{_target_: {__name__}.Breaks, folder: {tmp_path}}}]"]))
