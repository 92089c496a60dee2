import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from avray.checkpoint import Checkpoint, checkpoints, newest
from avray.errors import CheckpointError, TrainingFailed
from avray.train.loop import averaged
from avray.train.optim import Ema
from tests.toy import ToyFamily, run_loop, toy_job


def weights(run_dir, which="model"):
    return Checkpoint.open(run_dir / "last").weights(which)


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a) and set(a) == set(b)


@pytest.mark.parametrize("stop_at", [1, 5, 8])
def test_stopping_and_resuming_gives_the_same_bits(tmp_path, stop_at):
    trainer = {"ema_decay": 0.9, "schedule": {"name": "cosine", "warmup_steps": 2}, "accumulate": 2}
    run_loop(toy_job(tmp_path, trainer, run="whole"))
    run_loop(toy_job(tmp_path, {**trainer, "stop_at_step": stop_at}, run="cut"))
    assert newest(tmp_path / "cut").name == f"step-{stop_at:08d}"
    run_loop(toy_job(tmp_path, trainer, run="cut"))
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    assert same(weights(tmp_path / "whole", "ema"), weights(tmp_path / "cut", "ema"))
    assert not same(weights(tmp_path / "whole"), weights(tmp_path / "whole", "ema"))


def test_accumulation_does_not_change_the_gradient(tmp_path):
    family = dataclasses.replace(ToyFamily(), dropout=0.0)
    for accumulate in (1, 3):
        job = toy_job(tmp_path, {"accumulate": accumulate, "optimizer": {"name": "sgd"}, "max_steps": 6}, family,
                      run=f"a{accumulate}")
        run_loop(job)
    one, three = weights(tmp_path / "a1"), weights(tmp_path / "a3")
    # The loss draws noise per micro-batch, so not to the bit.
    assert all(torch.allclose(one[name], three[name], atol=5e-3) for name in one)


def test_a_row_of_weight_zero_changes_nothing(tmp_path):
    """35 rows in batches of 12 leave the last step with one padding row."""
    job = toy_job(tmp_path)
    rows = [row for step in range(job.train_order.steps_per_epoch) for row in job.train_order.step(0, step)]
    assert sum(row[0] < 0 for row in rows) == 1
    loop, outcome = run_loop(job)
    assert outcome.step == 12


def test_validation_counts_every_row_once_and_reports_baselines(tmp_path):
    loop, outcome = run_loop(toy_job(tmp_path))
    assert loop.validation.loss == pytest.approx(outcome.validation_loss)
    assert outcome.best_validation_loss <= outcome.validation_loss
    assert outcome.baselines["zero"] > 0
    other = run_loop(toy_job(tmp_path, {"batch_size": 4, "max_steps": 1, "optimizer": {"lr": 1e-12}}, run="b4"))[0]
    first = run_loop(toy_job(tmp_path, {"batch_size": 7, "max_steps": 1, "optimizer": {"lr": 1e-12}}, run="b7"))[0]
    assert other.validation.baselines["zero"] == pytest.approx(first.validation.baselines["zero"], rel=1e-6)


def test_early_stopping_ends_the_run_and_keeps_the_best(tmp_path):
    job = toy_job(tmp_path, {"max_steps": 200, "validate_every_steps": 2, "early_stopping_patience": 2,
                             "optimizer": {"lr": 3.0, "name": "sgd"}, "clip_norm": None})
    loop, outcome = run_loop(job)
    assert outcome.stopped_early and outcome.step < 200
    best = Checkpoint.open(tmp_path / "run" / "best")
    assert best.figures["validation_loss"] == outcome.best_validation_loss


def test_nan_stops_with_the_step_and_the_rows(tmp_path):
    family = dataclasses.replace(ToyFamily(), poison="train2:3")
    with pytest.raises(TrainingFailed, match=r"not finite at step \d+ .*train2:3"):
        run_loop(toy_job(tmp_path, {"batch_size": 5}, family))
    assert Checkpoint.open(newest(tmp_path / "run"))
    skipping = toy_job(tmp_path, {"batch_size": 5, "nan_policy": "skip"}, family, run="skip")
    _, outcome = run_loop(skipping)
    assert outcome.step == 12
    assert all(torch.isfinite(tensor).all() for tensor in weights(tmp_path / "skip").values())


def test_a_notice_makes_one_checkpoint_in_time(tmp_path):
    """Nodes that are to be taken away, as each line of figures hears of them: a second one later."""
    heard = iter([(), ("a",), ("a",), (), ("b", "a")])
    trainer = {"log_every_steps": 2, "checkpoint_every_steps": 0, "validate_every_steps": 0, "keep_last": 9,
               "max_steps": 11}
    run_loop(toy_job(tmp_path, trainer), leaving=lambda: next(heard, ("b", "a")))
    assert [path.name for path in checkpoints(tmp_path / "run")] == [f"step-{step:08d}" for step in (4, 10, 11)]


def test_init_from_takes_weights_and_starts_at_step_0(tmp_path):
    run_loop(toy_job(tmp_path, run="base"))
    job = toy_job(tmp_path, {"max_steps": 1, "optimizer": {"lr": 1e-12}}, run="tuned", init_from=str(tmp_path / "base"))
    _, outcome = run_loop(job)
    base, tuned = weights(tmp_path / "base"), weights(tmp_path / "tuned")
    assert outcome.step == 1
    assert all(torch.allclose(base[name], tuned[name], atol=1e-8) for name in base)


def test_resuming_with_another_batch_or_data_is_refused(tmp_path):
    run_loop(toy_job(tmp_path, {"stop_at_step": 4}))
    with pytest.raises(CheckpointError, match="batch_size was 12 and is 6 now"):
        run_loop(toy_job(tmp_path, {"batch_size": 6}))
    with pytest.raises(CheckpointError, match="seed was 0 and is 9 now"):
        run_loop(toy_job(tmp_path, seed=9))


class Recorder:
    moments: list = []

    def on_train_start(self, loop):
        Recorder.moments.append("train start")

    def on_epoch_end(self, loop):
        Recorder.moments.append("epoch end")

    def on_validation_end(self, loop):
        Recorder.moments.append(loop.validation.loss)


def test_hooks_are_called(tmp_path):
    Recorder.moments = []
    run_loop(toy_job(tmp_path, {"hooks": [{"_target_": "tests.test_loop.Recorder"}]}))
    assert Recorder.moments[0] == "train start"
    assert Recorder.moments.count("epoch end") == 4
    assert sum(isinstance(moment, float) for moment in Recorder.moments) == 3


def test_profile_writes_a_trace(tmp_path):
    run_loop(toy_job(tmp_path, {"profile": True}))
    assert (tmp_path / "run" / "profile" / "trace.json").stat().st_size > 1000


def test_activation_checkpointing_gives_the_same_gradient(tmp_path):
    with pytest.raises(ValueError, match="no repeated blocks"):
        run_loop(toy_job(tmp_path, {"activation_checkpointing": True}))


WORKER = """
import sys, torch, torch.distributed as dist, os
from pathlib import Path
from tests.toy import *
folder, run, stop, workers, rank, parallel = sys.argv[1:]
meeting = f"file://{folder}/rendezvous-{run}-{stop}"
dist.init_process_group("gloo", init_method=meeting, rank=int(rank), world_size=int(workers))
trainer = {"num_workers": int(workers), "parallel": parallel, "max_steps": 9, "ema_decay": 0.5}
if int(stop): trainer["stop_at_step"] = int(stop)
job = toy_job(Path(folder), trainer, run=run)
Loop(job, toy_place(job, int(rank), int(workers))).run()
dist.destroy_process_group()
sys.stdout.flush()
os._exit(0)  # FSDP2's mesh keeps gloo's threads, and one that drops a tensor while Python ends would abort
"""


def run_ranks(folder, run, stop, workers, parallel="ddp"):
    ranks = [subprocess.Popen(
        [sys.executable, "-c", WORKER, str(folder), run, str(stop), str(workers), str(rank), parallel],
        cwd=Path(__file__).parents[1], env={**os.environ, "OMP_NUM_THREADS": "1"}) for rank in range(workers)]
    assert [rank.wait(timeout=120) for rank in ranks] == [0] * workers


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "parallel"), [(2, "ddp"), (3, "ddp"), (2, "fsdp2")])
def test_workers_resume_to_the_same_bits(tmp_path, workers, parallel):
    toy_job(tmp_path)  # one process writes the cache before many read it
    run_ranks(tmp_path, "whole", 0, workers, parallel)
    run_ranks(tmp_path, "cut", 4, workers, parallel)
    run_ranks(tmp_path, "cut", 0, workers, parallel)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    assert same(weights(tmp_path / "whole", "ema"), weights(tmp_path / "cut", "ema"))
    alone = run_loop(toy_job(tmp_path, {"max_steps": 9, "ema_decay": 0.5}, run="alone"))[1]
    figures = Checkpoint.open(tmp_path / "whole").figures
    assert alone.validation_loss == pytest.approx(figures["validation_loss"], abs=0.05)


def test_a_checkpoint_waits_for_its_samples(tmp_path):
    """However late they are made; afterwards it is pruned like any other."""
    from avray.checkpoint import checkpoints
    from avray.train.samples import WAITING, await_samples, awaited, sample_folder

    job = toy_job(tmp_path, {"max_steps": 6, "checkpoint_every_steps": 1, "keep_last": 1, "sample_every_steps": 6,
                             "num_samples": 1})
    run_dir = Path(job.settings.run.dir)
    run_loop(job, sample=lambda checkpoint, step: await_samples(str(run_dir), step))
    assert {path.name for path in awaited(str(run_dir))} == {"step-00000000", "step-00000006"}
    assert {"step-00000000", "step-00000006"} <= {path.name for path in checkpoints(run_dir)}
    (sample_folder(run_dir, 0) / WAITING).unlink()
    assert {path.name for path in awaited(str(run_dir))} == {"step-00000006"}


def test_a_tied_weight_is_averaged_under_both_its_names():
    model = torch.nn.ModuleDict({"table": torch.nn.Embedding(3, 2), "head": torch.nn.Linear(2, 3)})
    model["head"].weight = model["table"].weight
    ema = Ema(model, 0.5)
    with torch.no_grad():
        model["table"].weight.add_(1)
    ema.update(0)
    state = averaged(model, model.state_dict(), ema.state_dict())
    assert set(state) == {"table.weight", "head.weight", "head.bias"}
    assert state["head.weight"] is state["table.weight"] and not torch.equal(state["head.weight"], model["head"].weight)
