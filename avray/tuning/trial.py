"""One trial: the very driver of ``train.py``, in a process of Ray Tune's, with its figures reported as they come.

Notable: the trial's own folder is what it goes on from after a crash, a pause or a killed sweep. Ray gets no weights
from us; a checkpoint reported to it holds one line, the path of ours. That is enough for PBT: a trial that restarts
with another trial's line copies that checkpoint into its own folder, weights, averages and moments, and trains on with
its own learning rate. The process is used for one trial after another, and trains itself where one worker is asked for:
Ray Train's would take ten times as long to start as a tiny trial takes. A trial that Ray stops ends after its step, or
ends its workers at once. Workers of a paused trial train on until its process is taken, so one that goes on with its
own line first goes back to it.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import os
import queue
import shutil
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
import ray.tune

from avray.checkpoint import checkpoints, follow, newest, point
from avray.config import SweepSettings, TrainSettings, from_mapping, to_mapping
from avray.data.cache import Cache
from avray.data.prepare import Prepared, embed, prepare_training
from avray.errors import CheckpointError, DataError, MissingDependency, OutOfMemory, TrainingFailed, WorkerFailed
from avray.family import Family
from avray.registry import family_from_settings
from avray.train.trainer import train
from avray.tuning.space import Params, put

STEP_S = 3600
"""What a step may take, before Ray Tune gives up a trial that is to end."""
POINTER = "avray-checkpoint.json"
ON_DISK = ("validation_loss", "parameters", "seconds")
"""Objectives that every run has; the others are the family's metrics."""


@dataclass(frozen=True)
class Plan:
    """What every trial is given. ``prepared`` is in Ray's object store; without it ``preparer`` is asked."""

    settings: SweepSettings
    prepared: list[ray.ObjectRef] = dataclasses.field(default_factory=list)
    preparer: Any = None
    report_saved: bool = False
    """Report when a checkpoint is whole instead of when its loss is known: PBT copies it."""
    keep_every_steps: int = 0


def trial_folder(sweep_dir: str | Path, number: int) -> Path:
    return Path(sweep_dir) / "trials" / f"{number:04d}"


def trial_settings(settings: SweepSettings, params: Params, folder: str | Path) -> TrainSettings:
    """The sweep's settings with one trial's values, in a folder of its own. ValueError for values that cannot be."""
    mapping = to_mapping(settings)
    del mapping["tune"]
    mapping = put(mapping, params)
    mapping["run"] = {"dir": str(folder)}
    mapping["dry_run"] = False
    mapping["resume"] = False
    mapping["logging"]["progress"] = "off"
    return from_mapping(TrainSettings, mapping)


def prepare_shared(family: Family, settings: TrainSettings, folder: Path) -> Prepared:
    """Plans, fitted state, and every row of every split embedded: trials only read."""
    data = settings.data
    prepared = prepare_training(family, data, folder, settings.logging.progress)
    embed(list(prepared.dataset.plans.values()), prepared.columns, Cache(data.cache), data, prepared.dataset,
          settings.logging.progress, "all rows")
    return prepared


@ray.remote(num_cpus=0)
class Preparer:
    """Prepares for trials whose data differ, each kind once, one after another: nothing is embedded twice."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.known: dict[str, ray.ObjectRef] = {}

    def prepared(self, settings: TrainSettings) -> list[ray.ObjectRef]:
        key = json.dumps([to_mapping(settings.family), to_mapping(settings.data)], sort_keys=True)
        if key not in self.known:
            from avray.data.cluster import Needs, start_ray

            start_ray(Needs(), None, settings.data.no_progress_timeout_s)
            prepared = prepare_shared(family_from_settings(settings.family), settings, Path(self.folder))
            self.known[key] = ray.put(prepared)
        return [self.known[key]]


@dataclass(frozen=True)
class Clock:
    """How often a trial was started, and the time of its starts before this one."""

    attempts: int = 0
    seconds: float = 0.0

    @classmethod
    def read(cls, folder: Path) -> Clock:
        path = folder / "clock.json"
        return cls(**json.loads(path.read_text())) if path.exists() else cls()

    def write(self, folder: Path) -> None:
        (folder / "clock.json").write_text(json.dumps(dataclasses.asdict(self)))


class Cancelled(BaseException):
    """A training in this process that was told to end."""


class Reporter:
    """Takes what the training says, in a thread of the training's, and queues what Ray Tune is to know."""

    def __init__(self, plan: Plan, seconds_before: float = 0.0) -> None:
        self.plan = plan
        self.began = time.perf_counter() - seconds_before
        self.queue: queue.Queue[tuple[dict[str, Any], Path | None] | None] = queue.Queue()
        self.losses: dict[int, float] = {}
        self.workers: list[Any] = []
        self.cancelled = False

    def worker(self, handle: Any) -> None:
        self.workers.append(handle)
        if self.cancelled:
            self.cancel()

    def figures(self, step: int, figures: Mapping[str, float]) -> None:
        if "validation/loss" in figures and step > 0:
            self.losses[step] = figures["validation/loss"]
            if not self.plan.report_saved:
                self.queue.put((self._result(step), None))

    def saved(self, checkpoint: Path, step: int) -> None:
        if self.plan.report_saved and step in self.losses:
            self.queue.put((self._result(step), checkpoint))

    def between_steps(self) -> None:
        """Where the process trains itself: PBT's pauses begin at a report, so nothing is done before it is answered."""
        while self.plan.report_saved and self.queue.unfinished_tasks and not self.cancelled:
            time.sleep(0.01)
        if self.cancelled:
            raise Cancelled

    def _result(self, step: int) -> dict[str, Any]:
        return {"step": step, "loss": self.losses[step], "seconds": self.seconds}

    @property
    def seconds(self) -> float:
        return round(time.perf_counter() - self.began, 2)

    def cancel(self) -> None:
        """End the training: its workers now, in this process after its step."""
        self.cancelled = True
        for handle in self.workers:
            with contextlib.suppress(Exception):
                ray.kill(handle)
                ray.get(handle.__ray_ready__.remote(), timeout=5)  # an error, once it is gone: it writes nothing more


def run_trial(config: dict[str, Any], plan: Plan) -> None:
    """What Ray Tune calls. ``config["trial"]``: ``number`` and ``params``."""
    os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = str(STEP_S)
    number, params = config["trial"]["number"], config["trial"]["params"]
    folder = trial_folder(plan.settings.run.dir, number)
    folder.mkdir(parents=True, exist_ok=True)
    fork(folder)
    clock = Clock.read(folder)
    attempt = clock.attempts + 1
    replace(clock, attempts=attempt).write(folder)
    reporter = Reporter(plan, clock.seconds)
    outcome: list[dict[str, Any] | BaseException] = []

    def work() -> None:
        try:
            outcome.append(train_trial(plan, params, folder, reporter))
        except BaseException as error:
            outcome.append(error)
        reporter.queue.put(None)

    if not plan.report_saved:
        for step, loss in validated(folder).items():  # which a killed driver may not have heard; twice does no harm
            reporter.figures(step, {"validation/loss": loss})
    thread = threading.Thread(target=work, name="avray-trial", daemon=True)
    thread.start()
    try:
        for result, checkpoint in iter(reporter.queue.get, None):
            report(result, checkpoint)
            reporter.queue.task_done()
    except BaseException as error:
        reporter.cancel()
        thread.join()
        if isinstance(error, SystemExit):  # Ray stops or pauses the trial here, while it reports: no failure
            Clock(attempt - 1, reporter.seconds).write(folder)
        raise
    thread.join()
    ended = outcome[0]
    final = finish(plan, ended, attempt) if isinstance(ended, BaseException) else {
        "state": "finished", **{f"values/{name}": value for name, value in ended.items()}}
    # Only the last line says that it was the last: what is under way has no state.
    ray.tune.report({"seconds": reporter.seconds, "step": max(reporter.losses, default=0),
                     "loss": reporter.losses[max(reporter.losses)] if reporter.losses else float("nan"), **final})
    if isinstance(ended, WorkerFailed) and trains_itself(plan.settings):
        raise ended  # or the next trial would have this process, and a CUDA that may be past use


def validated(folder: Path) -> dict[int, float]:
    """The validation losses that a run goes on from, by step."""
    table, start = folder / "metrics.csv", newest(folder)
    if start is None or not table.exists():
        return {}
    last = int(start.name.rpartition("-")[2])
    with open(table, newline="") as file:
        rows = [(int(row["step"]), row.get("validation/loss")) for row in csv.DictReader(file)]
    return {step: float(loss) for step, loss in rows if loss and 0 < step <= last}


def train_trial(plan: Plan, params: Params, folder: Path, reporter: Reporter) -> dict[str, float]:
    """Train (or find it done), and measure the objectives."""
    settings = trial_settings(plan.settings, params, folder)
    if plan.keep_every_steps:
        trainer = replace(settings.trainer, keep_every_steps=plan.keep_every_steps,
                          checkpoint_every_steps=plan.keep_every_steps)
        settings = replace(settings, trainer=trainer)
    settings = replace(settings, resume=newest(folder) is not None, trainer=replace(settings.trainer, max_failures=0))
    if settings.resume:
        settings = replace(settings, init_from=None)
    family = family_from_settings(settings.family)
    references = plan.prepared or ray.get(plan.preparer.prepared.remote(settings))
    prepared: Prepared = ray.get(references[0])
    summary_path = folder / "summary.json"
    summary = json.loads(summary_path.read_text()) if summary_path.exists() else train(
        settings, family, prepared, reporter, here=trains_itself(plan.settings))
    values = {"validation_loss": summary["best_validation_loss"], "parameters": summary["parameters"],
              "seconds": reporter.seconds}
    wanted = [one.metric for one in plan.settings.tune.objectives if one.metric not in ON_DISK]
    if wanted:
        measured = measure_family(plan.settings, family, prepared, summary["checkpoint"])
        values |= {name: measured[name] for name in wanted}
    return values


def trains_itself(settings: SweepSettings) -> bool:
    """Whether a trial's process is its worker."""
    return settings.trainer.max_workers == 1 and settings.trainer.parallel == "ddp"


def measure_family(settings: SweepSettings, family: Family, prepared: Prepared, checkpoint: str) -> dict[str, float]:
    """The family's metrics over what the checkpoint generates for held-out examples, always the same ones."""
    from avray.engine import Generator
    from avray.evaluation.evaluate import measure
    from avray.family import Options
    from avray.train.samples import answer, questions

    asked = questions(family, prepared.validation, settings.tune.metric_samples)
    generator = Generator.open(checkpoint, device=settings.trainer.device_name, slots=min(4, len(asked)),
                               family=settings.family.get("_target_"))
    return measure(family, answer(generator, asked, Options(), settings.seed)).values


def finish(plan: Plan, error: BaseException, attempt: int) -> dict[str, Any]:
    """What a failure comes to: raised again for Ray to start the trial anew, or the end of the trial in one sentence.

    Settings, data and divergence fail the same way each time; only what nobody foresaw is worth another attempt.
    """
    tune = plan.settings.tune
    foreseen = isinstance(error, ValueError | DataError | MissingDependency | CheckpointError | TrainingFailed)
    again = not foreseen or isinstance(error, WorkerFailed)
    if isinstance(error, OutOfMemory | MemoryError):
        again = tune.retry_out_of_memory
    if again and attempt <= tune.max_failures:
        raise error
    text = str(error).strip() or repr(error)
    return {"state": "failed", "error": (text if foreseen else f"{type(error).__name__}: {text}").splitlines()[0][:500]}


def report(result: dict[str, Any], checkpoint: Path | None) -> None:
    if checkpoint is None:
        ray.tune.report(result)
        return
    with tempfile.TemporaryDirectory() as pointer:
        (Path(pointer) / POINTER).write_text(json.dumps({"checkpoint": str(checkpoint)}))
        ray.tune.report(result, checkpoint=ray.tune.Checkpoint.from_directory(pointer))


def fork(folder: Path) -> Path | None:
    """After an exploit: put the donor's checkpoint in the place of this trial's own. Returns the donor's, if any. After
    a mere pause: back to where it was.

    Copied beside and renamed, own checkpoints removed first: killed in between, the trial begins anew or goes on from
    the donor, and never mixes the two.
    """
    given = ray.tune.get_checkpoint()
    if given is None:
        return None
    with given.as_directory() as place:
        source = Path(json.loads((Path(place) / POINTER).read_text())["checkpoint"])
    if source.is_relative_to(folder):
        go_back(folder, source)
        return None
    copy_checkpoint(source, folder)
    return source


def go_back(folder: Path, source: Path) -> None:
    """Forget what a run did after one of its checkpoints: another trial may be copying that one, so it stays put."""
    found = checkpoints(folder)
    later = found[found.index(source) + 1 :]
    (folder / "summary.json").unlink(missing_ok=True)
    point(folder, "last", source)
    if follow(folder, "best") in (None, *later):
        point(folder, "best", source)
    for path in later:
        shutil.rmtree(path)


def copy_checkpoint(source: Path, folder: Path) -> Path:
    """``source`` becomes the only checkpoint of the run in ``folder``, its best and its last."""
    from avray.checkpoint import Checkpoint

    opened = Checkpoint.open(source)  # hashed: a donor that was pruned or damaged is an error, not a silent mixture
    beside = folder / f"donor-{time.time_ns()}"
    shutil.copytree(source, beside / source.name)
    if opened.base is not None:
        shutil.copy(opened.base, beside / opened.base.name)
    for name in ("best", "last", "summary.json"):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    beside.rename(folder / "checkpoints")
    copied = folder / "checkpoints" / source.name
    for name in ("best", "last"):
        point(folder, name, copied)
    return copied
