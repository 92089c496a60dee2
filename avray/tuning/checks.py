"""What is refused before a trial is started: one sentence each, with the key and the cure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from avray.config import SweepSettings, TrainSettings, to_mapping
from avray.registry import family_from_settings
from avray.settings.convert import did_you_mean
from avray.settings.describe import describe, hint_of
from avray.store import MARK, is_url
from avray.tuning.scheduling import perturb_every
from avray.tuning.space import Space, look_up
from avray.tuning.trial import ON_DISK, trial_settings

FIXED = ("run", "tune", "resume", "dry_run", "cluster", "logging", "init_from", "data.cache", "trainer.num_workers",
         "trainer.cpus_per_worker", "trainer.parallel", "trainer.use_gpu", "trainer.device", "trainer.hooks",
         "trainer.stop_at_step")
"""The sweep's own: where it runs, on what, and where its results go."""
COMPARED = ("trainer.max_steps", "trainer.max_epochs", "trainer.validate_every_steps", "trainer.validate_max_rows")
"""Not searched where trials are compared at the same step."""
MOVES = ("trainer.optimizer.lr", "trainer.optimizer.weight_decay", "trainer.optimizer.betas", "trainer.optimizer.eps",
         "trainer.clip_norm", "trainer.ema_decay", "trainer.schedule", "family.dropout", "family.attention_dropout")
"""What may change while the weights and their moments stay."""


def below(key: str, groups: tuple[str, ...]) -> bool:
    return any(key == group or key.startswith(f"{group}.") for group in groups)


def check(settings: SweepSettings, space: Space) -> None:
    """ValueError for a space, a scheduler or an objective that cannot be."""
    mapping = to_mapping(settings)
    for key in space.keys:
        check_key(key, mapping, settings)
    check_values(settings, space, mapping)
    if settings.trainer.is_elastic:
        raise ValueError("trainer.num_workers has a fewest and a most: the trials of a sweep take one number.")
    check_scheduler(settings, space)
    check_objectives(settings)


def check_key(key: str, mapping: Mapping[str, Any], settings: SweepSettings) -> None:
    if below(key, FIXED):
        raise ValueError(f"tune.space.{key} cannot be searched: it is the same for all trials; give it as {key}=….")
    if settings.tune.stops_early and below(key, COMPARED):
        raise ValueError(f"tune.space.{key} cannot be searched with tune.scheduler={settings.tune.scheduler}, which "
                         "compares trials at the same steps: take tune=random or tune=optuna.")
    if settings.tune.scheduler == "pbt" and not below(key, MOVES):
        raise ValueError(f"tune.space.{key} cannot be searched with tune=pbt, where weights move from trial to trial: "
                         f"search any of {', '.join(MOVES)}, or take another tune=.")
    group, _, rest = key.partition(".")
    try:
        look_up(mapping, key)
    except KeyError:
        names = [one.key for one in describe(TrainSettings)] + [
            f"{name}.{field}" for name in ("family", "codec") for field in mapping[name]]
        own = group == "family" and "_target_" in mapping["family"]
        if not own and (hint_of(TrainSettings, key) is None or group in ("family", "codec")):
            raise ValueError(f"tune.space.{key}: {key} is not a setting{did_you_mean(key, names)}") from None


def check_values(settings: SweepSettings, space: Space, mapping: Mapping[str, Any]) -> None:
    """The settings' own checks, with both ends of each range and every choice."""
    for distribution in space.distributions:
        for value in distribution.ends():
            given = {distribution.key: value} | {key: values[0] for key, values in distribution.when}
            try:
                built = trial_settings(settings, given, settings.run.dir)
                if below(distribution.key, ("family", "codec")):
                    family_from_settings(built.family)
            except ValueError as error:
                raise ValueError(f"tune.space.{distribution.key} has {value!r} among its values: {error}") from error


def check_scheduler(settings: SweepSettings, space: Space) -> None:
    tune, trainer = settings.tune, settings.trainer
    if trainer.validate_every_steps == 0:
        raise ValueError("trainer.validate_every_steps=0 leaves a sweep nothing to compare: give a number of steps.")
    if not tune.stops_early:
        return
    if trainer.max_steps is None:
        raise ValueError(f"tune.scheduler={tune.scheduler} counts in steps: give trainer.max_steps.")
    if tune.min_steps is not None and tune.min_steps > trainer.max_steps:
        raise ValueError(f"tune.min_steps ({tune.min_steps}) must be at most trainer.max_steps ({trainer.max_steps}).")
    if trainer.validate_every_steps > trainer.max_steps:
        raise ValueError(f"trainer.validate_every_steps ({trainer.validate_every_steps}) must be at most "
                         f"trainer.max_steps ({trainer.max_steps}), or {tune.scheduler} has nothing to compare.")
    every = perturb_every(settings)
    if tune.scheduler == "pbt" and every % trainer.validate_every_steps:
        raise ValueError(f"tune.perturb_every_steps ({every}) must be a multiple of trainer.validate_every_steps "
                         f"({trainer.validate_every_steps}): trials are compared when they validate.")


def check_objectives(settings: SweepSettings) -> None:
    family = family_from_settings(settings.family)
    known = [*ON_DISK, *sorted(family.metrics())]
    for objective in settings.tune.objectives:
        if objective.metric not in known:
            raise ValueError(f"tune.objectives: family {settings.family.get('name')} reports no {objective.metric}"
                             f"{did_you_mean(objective.metric, known)}")


def check_folder(settings: SweepSettings, journal: Path) -> None:
    """A sweep is never continued or overwritten by accident."""
    if is_url(settings.run.dir):
        raise ValueError(f"run.dir={settings.run.dir} is a URL, and a sweep keeps its journal and its trials in a "
                         "folder: give a local or shared one (data.path and data.cache may be URLs).")
    folder = journal.parent
    if settings.resume and not journal.exists():
        raise ValueError(f"resume=true and {folder} holds no sweep: start it without resume, or name one in run.dir.")
    if not settings.resume and folder.exists() and any(not path.name.startswith(MARK) for path in folder.iterdir()):
        what = "a sweep: go on with it by resume=true, or" if journal.exists() else "files already:"
        raise ValueError(f"run.dir={folder} holds {what} give another run.dir.")
