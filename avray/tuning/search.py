"""Where the next trial's values come from, as a Ray Tune searcher.

Notable: it keeps no state. Random and grid search know all trials beforehand; Optuna's study is built anew from the
journal each time a trial is asked for (milliseconds for hundreds), so that a resumed sweep goes on where it was.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import optuna
from ray.tune.search import Searcher

from avray.config import TuneSettings
from avray.tuning.journal import Journal, Record
from avray.tuning.space import Distribution, Params, Space

optuna.logging.set_verbosity(optuna.logging.ERROR)


class Suggest(Searcher):
    """First the trials that were under way, then those that have not begun."""

    def __init__(self, journal: Journal, asker: Asker, count: int) -> None:
        super().__init__(metric="loss", mode="min")
        self.journal, self.asker = journal, asker
        self.again = [record.number for record in journal.unfinished]
        self.fresh = [number for number in range(count) if number not in journal.records]

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        if self.again:
            number = self.again.pop(0)
        elif self.fresh:
            number = self.fresh.pop(0)
        else:
            return Searcher.FINISHED
        known = self.journal.records.get(number)
        params = known.params if known else self.asker.ask(number)
        self.journal.write("start", number, params=params)
        return {"trial": {"number": number, "params": params}}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        pass

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        pass

    def save(self, checkpoint_path: str) -> None:
        pass  # the journal is what is kept

    def restore(self, checkpoint_path: str) -> None:
        pass


class Asker:
    """Values of trial ``number``."""

    def ask(self, number: int) -> Params:
        raise NotImplementedError


class Listed(Asker):
    """Values known beforehand."""

    def __init__(self, candidates: Sequence[Params]) -> None:
        self.candidates = candidates

    def ask(self, number: int) -> Params:
        return self.candidates[number]


class Tpe(Asker):
    """Optuna's tree-structured Parzen estimator, several objectives included (Bergstra et al. 2011; Ozaki et al. 2022).

    Trials under way count as bad ones nearby (constant liar), so that two at a time do not ask for the same.
    """

    def __init__(self, space: Space, journal: Journal, tune: TuneSettings, seed: int, default: Params | None) -> None:
        self.space, self.journal, self.tune, self.seed, self.default = space, journal, tune, seed, default

    def ask(self, number: int) -> Params:
        if number == 0 and self.default is not None:
            return self.default
        startup = max(2, min(10, (self.tune.num_samples or 10) // 3))
        sampler = optuna.samplers.TPESampler(seed=self.seed * 100_003 + number, n_startup_trials=startup,
                                             constant_liar=True)
        trial = study_of(self.journal.trials, self.space, self.tune, sampler).ask()
        params: Params = {}
        for distribution in self.space.applying(params):
            params[distribution.key] = read_value(
                distribution, trial._suggest(distribution.key, optuna_distribution(distribution)))
        return params


def study_of(records: Sequence[Record], space: Space, tune: TuneSettings,
             sampler: optuna.samplers.BaseSampler | None = None) -> optuna.Study:
    """The trials so far as a study in memory."""
    directions = [{"min": "minimize", "max": "maximize"}[objective.mode] for objective in tune.objectives]
    study = optuna.create_study(directions=directions, sampler=sampler)
    for record in records:
        study.add_trial(_as_trial(record, space, tune))
    return study


def _as_trial(record: Record, space: Space, tune: TuneSettings) -> optuna.trial.FrozenTrial:
    # A value out of its range (the settings as they stand may have one) is left out; the trial still counts.
    known = {key: value for key, value in record.params.items() if space[key].holds(value)}
    distributions = {key: optuna_distribution(space[key]) for key in known}
    values = [record.values.get(objective.metric, math.nan) for objective in tune.objectives]
    states = optuna.trial.TrialState
    state, steps = states.RUNNING, {step: loss for step, loss in record.results if math.isfinite(loss)}
    if record.state == "finished" and all(map(math.isfinite, values)):
        state = states.COMPLETE
    elif record.state == "stopped" and len(values) == 1 and steps:
        state = states.PRUNED
    elif record.ended:
        state = states.FAIL
    return optuna.trial.create_trial(
        state=state, values=values if state == states.COMPLETE else None, distributions=distributions,
        params={key: write_value(space[key], value) for key, value in known.items()},
        intermediate_values=steps if len(values) == 1 else {})


def optuna_distribution(distribution: Distribution) -> optuna.distributions.BaseDistribution:
    kinds = optuna.distributions
    if distribution.kind == "choice":
        return kinds.CategoricalDistribution([json.dumps(choice) for choice in distribution.choices])
    if distribution.is_int:
        step = int(distribution.step or 1)
        return kinds.IntDistribution(int(distribution.low), int(distribution.high), log=distribution.is_log,
                                     step=1 if distribution.is_log else step)
    return kinds.FloatDistribution(distribution.low, distribution.high, log=distribution.is_log,
                                   step=None if distribution.is_log else distribution.step)


def write_value(distribution: Distribution, value: Any) -> Any:
    """Optuna's categories are text: lists and mappings may be choices too."""
    return json.dumps(value) if distribution.kind == "choice" else value


def read_value(distribution: Distribution, value: Any) -> Any:
    return json.loads(value) if distribution.kind == "choice" else distribution.fit(value)
