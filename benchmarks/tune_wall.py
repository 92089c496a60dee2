"""16 trials of a tiny model, 2 at a time: how much of the time two trials could fill a sweep does fill.

    bound: sum of trial times / 2. A trial's time is what it takes itself, and for the first in each process also the
    process's start. Ray's own start stands apart; what Ray Tune takes between trials is in none.

Beside it the same 16 trainings, same values, through Optuna in two plain processes that share one study on disk: each
builds model, optimiser and loader in its process and calls avray's loop, with no Ray anywhere.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TINY = ["family.segment_s=1", "family.num_layers=1", "family.num_heads=4", "family.feed_forward=64",
        "trainer.validate_every_steps=25", "trainer.log_every_steps=25", "trainer.num_samples=0",
        "data.demo_minutes=2"]


def avray(base: Path, steps: int, trials: int) -> dict[str, float]:
    """The sweep, as a person starts it. Its wall time is from the first trial's start to the last one's end."""
    folder = base / f"sweep-{time.time_ns()}"
    began = time.perf_counter()
    subprocess.run([sys.executable, str(ROOT / "tune" / "sweep.py"), *TINY, f"trainer.max_steps={steps}", "tune=random",
                    f"tune.num_samples={trials}", "tune.max_concurrent=2", f"run.dir={folder}", "logging.progress=off"],
                   check=True, cwd=base)
    whole = time.perf_counter() - began
    events = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    ends = [event for event in events if event["event"] == "end"]
    assert all(event["state"] == "finished" for event in ends) and len(ends) == trials
    wall = ends[-1]["at_s"] - events[0]["at_s"]
    starts = {event["number"]: event["at_s"] for event in events if event["event"] == "start"}
    whole_of_first = sum(event["at_s"] - starts[event["number"]] for event in ends if event["number"] < 2)
    total = whole_of_first + sum(event["seconds"] for event in ends if event["number"] >= 2)
    return {"wall_s": wall, "sum_of_trials_s": total, "ratio": wall / (total / 2), "with_start_s": whole}


def plain(base: Path, steps: int, trials: int) -> dict[str, float]:
    """Optuna in two processes."""
    import optuna

    storage = f"sqlite:///{base}/study-{time.time_ns()}.db"
    optuna.create_study(study_name="plain", storage=storage, direction="minimize")
    began = time.perf_counter()
    context = multiprocessing.get_context("spawn")
    done: Any = context.Queue()
    workers = [context.Process(target=work, args=(storage, str(base), steps, trials // 2, index, time.time(), done))
               for index in range(2)]
    for worker in workers:
        worker.start()
    total = sum(done.get() for _ in workers)
    for worker in workers:
        worker.join()
    wall = time.perf_counter() - began
    return {"wall_s": wall, "sum_of_trials_s": total, "ratio": wall / (total / 2), "with_start_s": wall}


def work(storage: str, base: str, steps: int, trials: int, index: int, began_s: float, done: Any) -> None:
    import optuna
    import torch

    from avray.cli import SWEEP, compose
    from avray.data.cache import Cache
    from avray.data.loader import PreparedSource
    from avray.data.prepare import prepare_training
    from avray.registry import family_from_settings
    from avray.train.loop import Loop, Place
    from avray.train.trainer import make_job
    from avray.tuning.space import read_space
    from avray.tuning.trial import trial_settings

    sweep = compose(SWEEP, [*TINY, f"trainer.max_steps={steps}"])
    space = read_space(sweep.tune.space)
    study = optuna.load_study(study_name="plain", storage=storage)
    seconds: list[float] = []

    def objective(trial: optuna.Trial) -> float:
        began = time.perf_counter()
        params = space.draw(0, index + 2 * trial.number)
        settings = trial_settings(sweep, params, f"{base}/plain-{time.time_ns()}-{os.getpid()}")
        Path(settings.run.dir).mkdir(parents=True)
        family = family_from_settings(settings.family)
        prepared = prepare_training(family, settings.data, Path(settings.run.dir))
        job = make_job(settings, family, prepared)
        cache = Cache(settings.data.cache)
        source = PreparedSource(job.train, job.train_order, cache, job.columns)
        place = Place(0, 1, torch.device("cpu"), lambda epoch, step: source,
                      PreparedSource(job.validation, job.validation_order, cache, job.columns))
        outcome = Loop(job, place).run()
        seconds.append(time.perf_counter() - began)
        assert outcome.best_validation_loss is not None
        return outcome.best_validation_loss

    seconds.append(time.time() - began_s)
    study.optimize(objective, n_trials=trials)
    done.put(sum(seconds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="/tmp/avray-tune-wall")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--skip-plain", action="store_true")
    options = parser.parse_args()
    base = Path(options.base)
    base.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["PYTHONPATH"] = str(ROOT)
    found = {"avray": avray(base, options.steps, options.trials)}
    if not options.skip_plain:
        found["Optuna in two plain processes"] = plain(base, options.steps, options.trials)
    print("| 16 trials, 2 at a time | wall | sum of trials | wall / (sum / 2) | with Ray's start |")
    print("|---|---|---|---|---|")
    for name, one in found.items():
        print(f"| {name} | {one['wall_s']:.0f} s | {one['sum_of_trials_s']:.0f} s | {one['ratio']:.2f} | "
              f"{one['with_start_s']:.0f} s |")
    shutil.rmtree(base)


if __name__ == "__main__":
    main()
