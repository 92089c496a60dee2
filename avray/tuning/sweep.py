"""The driver of a sweep: from a search space to the best checkpoint.

    space and checks -> room -> shared data -> Ray Tune: searcher, scheduler, trials -> results, best, pictures

Notable: all trials share one prepared data set. The manifest, the plans, what is learnt from the data and every
embedding are computed once, by the driver, where only ``trainer.*`` and ``seed`` are searched; where the search touches
the data, one actor prepares each kind of data once for the trials that ask for it.
"""

from __future__ import annotations

import functools
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import ray.tune
from omegaconf import OmegaConf
from ray.air.execution._internal.actor_manager import RayActorManager

from avray.config import SweepSettings, from_mapping, to_mapping
from avray.data.shared import check_cache
from avray.errors import TrainingFailed
from avray.registry import family_from_settings
from avray.store import Store
from avray.tuning import resources
from avray.tuning.checks import MOVES, below, check, check_folder
from avray.tuning.journal import Journal
from avray.tuning.pictures import draw
from avray.tuning.results import best_of, value_of, write_best, write_results, write_summary
from avray.tuning.scheduling import make_scheduler, perturb_every
from avray.tuning.search import Listed, Suggest, Tpe
from avray.tuning.space import Params, Space, candidates, default_params, read_space
from avray.tuning.table import Watching
from avray.tuning.trial import Plan, Preparer, prepare_shared, run_trial, trial_folder, trial_settings

OWN_DATA = ("data", "codec", "family")
"""Keys that may change what is embedded or learnt from the data; with others all trials share one preparation."""


def sweep(settings: SweepSettings) -> str:
    """Run it, or go on with it; returns the line that says where the best is.

    ValueError for settings, spaces and resources that cannot be, TrainingFailed where no trial has a result.
    """
    began = time.monotonic()
    folder = Path(settings.run.dir)
    check_folder(settings, folder / "journal.jsonl")
    settings = recorded(settings) if settings.resume else settings
    space = read_space(settings.tune.space)
    check(settings, space)
    check_cache(settings.data)
    default = default_params(space, to_mapping(settings)) if settings.tune.include_default else None
    trials = known_trials(settings, space, default)
    count = len(trials) if trials is not None else settings.tune.num_samples
    assert count is not None
    family = family_from_settings(settings.family)
    room = resources.start(settings, len(family.columns(None)), count, has_own_data(space))
    say(settings, described(settings, space, count) + "\n" + room.why)
    if settings.dry_run:
        return "Nothing was trained: dry_run=true."
    Store(settings.run.dir).check_writable("run.dir")
    Store(str(folder)).write("config.yaml", OmegaConf.to_yaml(to_mapping(settings)).encode())
    journal = Journal(folder / "journal.jsonl")
    journal.path.touch()
    with Watching(settings, space, count) as watching:
        journal.changed = watching.show
        if len([one for one in journal.trials if one.ended]) < count:
            run(settings, space, journal, plan_of(settings, space), trials, count, room.trials, default)
        watching.show(journal)
    return conclude(settings, space, journal, time.monotonic() - began, room.trials)


def recorded(settings: SweepSettings) -> SweepSettings:
    """A sweep that goes on has the settings it was started with; where it runs and what it prints may differ."""
    config = OmegaConf.load(Path(settings.run.dir) / "config.yaml")
    mapping = OmegaConf.to_container(config)
    assert isinstance(mapping, dict)
    before = from_mapping(SweepSettings, mapping)  # type: ignore[arg-type]
    say(settings, f"Going on with {settings.run.dir}: its own settings count, those in its config.yaml.")
    return replace(before, run=settings.run, cluster=settings.cluster, logging=settings.logging,
                   dry_run=settings.dry_run)


def known_trials(settings: SweepSettings, space: Space, default: Params | None) -> list[Params] | None:
    """The trials that are known beforehand; None where Optuna finds them on the way."""
    tune = settings.tune
    if tune.search == "optuna":
        return None
    return list(candidates(space, tune.search, settings.seed, tune.num_samples, tune.grid_points, default))


def described(settings: SweepSettings, space: Space, count: int) -> str:
    tune = settings.tune
    how = {"none": "each to its end", "asha": "the worse stopped early (asha)",
           "hyperband": "the worse stopped early (hyperband)", "pbt": "weights copied from the better (pbt)"}
    goals = ", ".join(f"{one.metric} ({one.mode})" for one in tune.objectives)
    early = [one.metric for one in tune.objectives if one.metric != "validation_loss"]
    note = " Before a trial ends only its validation loss is known and compared." if tune.stops_early and early else ""
    return (f"{count} trials of {settings.family.get('name')}, {tune.search}, {how[tune.scheduler]}; "
            f"{', '.join(space.keys)} for {goals}.{note}")


def has_own_data(space: Space) -> bool:
    """Whether trials differ in what is embedded or learnt from the data, so that it is prepared while they run."""
    return any(below(key, OWN_DATA) and not below(key, MOVES) for key in space.keys)


def plan_of(settings: SweepSettings, space: Space) -> Plan:
    """What trials share."""
    every = perturb_every(settings) if settings.tune.scheduler == "pbt" else 0
    folder = Path(settings.run.dir)
    if has_own_data(space):
        return Plan(settings, [], Preparer.remote(str(folder)), bool(every), every)  # type: ignore[attr-defined]
    family = family_from_settings(settings.family)
    say(settings, "Preparing the data once for all trials.")
    prepared = prepare_shared(family, trial_settings(settings, {}, folder), folder)
    return Plan(settings, [ray.put(prepared)], None, bool(every), every)


def run(settings: SweepSettings, space: Space, journal: Journal, plan: Plan, trials: list[Params] | None, count: int,
        concurrent: int, default: Params | None) -> None:
    """Ray Tune, until every trial has ended."""
    tune, folder = settings.tune, Path(settings.run.dir)
    for record in journal.unfinished:
        (trial_folder(folder, record.number) / "clock.json").unlink(missing_ok=True)  # a killed driver is no failure
    scheduler = make_scheduler(settings, space, journal)
    search = None
    space_of_ray: dict[str, Any] = {}
    left = count - sum(record.ended for record in journal.trials)
    if tune.scheduler == "pbt":  # which Ray runs without a searcher
        assert trials is not None
        starts = []
        for number in range(count):
            if number not in journal.records:
                journal.write("start", number, params=trials[number])
            if not journal.records[number].ended:
                starts.append({"number": number, "params": journal.records[number].params})
        space_of_ray = {"trial": ray.tune.grid_search(starts)}
    else:
        asker = Listed(trials) if trials is not None else Tpe(space, journal, tune, settings.seed, default)
        search = Suggest(journal, asker, count)
    quiet_tune()
    heed_memory_kills()
    tuner = ray.tune.Tuner(
        ray.tune.with_resources(ray.tune.with_parameters(run_trial, plan=plan), resources.of_trial(settings)),
        param_space=space_of_ray,
        tune_config=ray.tune.TuneConfig(num_samples=1 if search is None else left, search_alg=search,
                                        scheduler=scheduler, max_concurrent_trials=concurrent, reuse_actors=True,
                                        trial_dirname_creator=lambda trial: f"trial-{trial.trial_id}"),
        run_config=ray.tune.RunConfig(
            # A new name each time: Ray would otherwise go on with what it finds there.
            name=f"tune-{time.time_ns()}", storage_path=str(folder / "ray"), verbose=0,
            failure_config=ray.tune.FailureConfig(max_failures=tune.max_failures)),
    )
    tuner.fit()
    for record in journal.unfinished:
        journal.write("end", record.number, state="failed", error="Its process could not be started.")


def quiet_tune() -> None:
    """No loggers of Ray's beside ours, no snapshots every few seconds, Ctrl-C as anywhere else."""
    for name, value in {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "TUNE_GLOBAL_CHECKPOINT_S": "3600",
                        "TUNE_DISABLE_SIGINT_HANDLER": "1", "RAY_AIR_NEW_OUTPUT": "0"}.items():
        os.environ.setdefault(name, value)


def heed_memory_kills() -> None:
    """Ray kills what has the most memory before a node runs out. Where that is a trial's process, Ray Tune 2.60 knows
    no such error and ends the sweep: it is told of a process that died, which is what it can deal with."""
    inner = RayActorManager._actor_task_failed
    if hasattr(inner, "__wrapped__"):
        return

    @functools.wraps(inner)
    def failed(self: Any, tracked_actor_task: Any, exception: Exception) -> None:
        if isinstance(exception, ray.exceptions.OutOfMemoryError):
            exception = ray.exceptions.RayActorError(error_msg=f"OutOfMemory: {exception}")
        inner(self, tracked_actor_task, exception)

    RayActorManager._actor_task_failed = failed


def conclude(settings: SweepSettings, space: Space, journal: Journal, seconds: float, concurrent: int) -> str:
    """Write what the sweep leaves; TrainingFailed where no trial came to anything."""
    objectives, folder = settings.tune.objectives, settings.run.dir
    write_results(settings, space, journal.trials)
    best = best_of(journal.trials, objectives)
    if best is None:
        reason = next((record.error for record in journal.trials if record.error), "no trial ended")
        raise TrainingFailed(f"None of {len(journal.trials)} trials came to a result; the first: {reason} All are in "
                             f"{folder}/results.csv.")
    write_best(settings, best)
    write_summary(settings, journal.trials, best, seconds, concurrent)
    for missing in draw(settings, space, journal.trials):
        say(settings, missing)
    first = objectives[0]
    value = value_of(best, first)
    default = journal.records.get(0) if settings.tune.include_default else None
    default_value = value_of(default, first) if default is not None else None
    beside = "" if default_value is None else f", {default_value:.4g} with the settings as they stand"
    said = "" if value is None else f" with {first.metric} {value:.4g}{beside}"
    return f"The best is trial {best.number}{said} · {folder}/best, best.yaml, results.csv"


def say(settings: SweepSettings, text: str) -> None:
    if settings.logging.progress != "off":
        print(text, file=sys.stderr, flush=True)
