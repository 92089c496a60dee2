"""Which trials go on: Ray Tune's schedulers, each decision written to the journal before it counts.

Notable: ASHA and PBT know trials by their number in the sweep, not by Ray's random ids, so that a resumed sweep replays
the results so far into a new scheduler and every rung stands as it stood.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    PopulationBasedTraining,
    TrialScheduler,
)

from avray.config import SweepSettings
from avray.tuning.journal import Journal
from avray.tuning.space import Space

BRACKETS = 3
"""Of hyperband: rungs that begin at min_steps, and one and two reductions later."""


@dataclass(frozen=True)
class Numbered:
    """What the rungs see of a trial."""

    trial_id: str


class Asha(AsyncHyperBandScheduler):
    """Asynchronous successive halving (Li et al. 2020); several brackets make it asynchronous Hyperband.

    Three things are otherwise than in Ray: a trial's bracket is its number modulo their count instead of a draw; the
    last validation never stops a trial, which has nothing left to save; and a rung compares the best loss of each trial
    so far, as the sweep does in the end, since a trial keeps the checkpoint of its best.
    """

    def __init__(self, max_steps: int, min_steps: int, reduction_factor: float, brackets: int) -> None:
        super().__init__(time_attr="step", metric="loss", mode="min", max_t=max_steps, grace_period=min_steps,
                         reduction_factor=reduction_factor, brackets=brackets, stop_last_trials=False)
        self.max_steps = max_steps
        self.best: dict[int, float] = {}

    def bracket(self, number: int) -> Any:
        return self._brackets[number % len(self._brackets)]

    def judge(self, number: int, step: int, loss: float) -> str:
        """CONTINUE or STOP. Also what a resume replays."""
        # A loss that is not finite is worse than any other, and must not turn a rung's cut-off into NaN.
        reward = max(-loss if math.isfinite(loss) else -1e30, self.best.get(number, -1e30))
        self.best[number] = reward
        decision: str = self.bracket(number).on_result(Numbered(str(number)), step, reward)
        return TrialScheduler.CONTINUE if step >= self.max_steps else decision

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        pass

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        return self.judge(trial.config["trial"]["number"], result["step"], result["loss"])

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        pass

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        pass


class Pbt(PopulationBasedTraining):
    """Population based training (Jaderberg et al. 2017). What travels from donor to trial is a pointer to the
    donor's checkpoint on disk; the trial copies it (avray.tuning.trial.fork). Synchronous: trials are compared at the
    same step, whichever was faster, so that two sweeps alike give two tables alike."""

    def __init__(self, settings: SweepSettings, space: Space, journal: Journal, every_steps: int) -> None:
        tune = settings.tune
        super().__init__(time_attr="step", metric="loss", mode="min", perturbation_interval=every_steps,
                         quantile_fraction=tune.quantile, custom_explore_fn=lambda config: config, log_config=False,
                         synch=True)
        assert settings.trainer.max_steps is not None
        self.max_steps = settings.trainer.max_steps
        self.space, self.journal, self.seed, self.resample = space, journal, settings.seed, tune.resample_probability
        random.seed(settings.seed)  # with which Ray chooses among the best

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        """Ray compares when the last trial comes to the step, and waits for ever where that one ended on its way."""
        live = [*tune_controller.get_live_trials()]
        if live and all(trial.status == Trial.PAUSED and self._trial_state[trial].last_train_time
                        >= self._next_perturbation_sync for trial in live):
            super().on_trial_result(tune_controller, live[0], self._trial_state[live[0]].last_result)
        return super().choose_trial_to_run(tune_controller)

    def _get_new_config(self, trial: Any, trial_to_clone: Any) -> tuple[dict[str, Any], dict[str, str]]:
        number, donor = (one.config["trial"]["number"] for one in (trial, trial_to_clone))
        state = self._trial_state[trial_to_clone]
        step = state.last_result["step"]
        params = self.space.explore(trial_to_clone.config["trial"]["params"], self.seed, number, step, self.resample)
        self.journal.write("exploit", number, donor=donor, params=params, step=step, loss=state.last_result["loss"])
        return {"trial": {"number": number, "params": params}}, {}


class Journalled(TrialScheduler):
    """Any of them, with the journal: results once, ends, failures."""

    def __init__(self, inner: TrialScheduler, journal: Journal) -> None:
        super().__init__()
        self.inner, self.journal = inner, journal
        self._metric = "loss"

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        self.inner.on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        number = trial.config["trial"]["number"]
        record = self.journal.records[number]
        if record.ended:
            return TrialScheduler.CONTINUE  # Ray repeats the last result when a function returns
        if "state" in result:
            self.journal.write("end", number, state=result["state"], error=result.get("error", ""),
                               seconds=result["seconds"],
                               values={key.removeprefix("values/"): value for key, value in result.items()
                                       if key.startswith("values/")})
            return TrialScheduler.CONTINUE
        step, loss = result["step"], result["loss"]
        if step <= record.step and not isinstance(self.inner, Pbt):
            return TrialScheduler.CONTINUE  # repeated after a restart: it was decided then
        said = {"step": step, "loss": loss if math.isfinite(loss) else None, "seconds": result["seconds"]}
        if isinstance(self.inner, Pbt):  # which goes on from another's result, so this one's stands before it
            self.journal.write("result", number, **said, decision=TrialScheduler.CONTINUE)
            if step >= self.inner.max_steps:
                return TrialScheduler.CONTINUE
            return self.inner.on_trial_result(tune_controller, trial, result)
        decision = self.inner.on_trial_result(tune_controller, trial, result)
        self.journal.write("result", number, **said, decision=decision)
        return decision

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        self.inner.on_trial_error(tune_controller, trial)
        number = trial.config["trial"]["number"]
        # Ray says so of a trial that it starts again, too.
        if not self.journal.records[number].ended and not trial.should_recover():
            self.journal.write("end", number, state="failed", error=reason_of(trial))

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        self.inner.on_trial_complete(tune_controller, trial, result)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        self.inner.on_trial_remove(tune_controller, trial)

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        return self.inner.choose_trial_to_run(tune_controller)

    def debug_string(self) -> str:
        return self.inner.debug_string()

    def save(self, checkpoint_path: str) -> None:
        pass  # the journal is what is kept

    def restore(self, checkpoint_path: str) -> None:
        pass


def reason_of(trial: Any) -> str:
    """Why a trial's own process ended, in one line."""
    text = str(trial.get_error() or "").strip()
    if "out of memory" in text.lower() or "OutOfMemory" in text:
        return "The trial ran out of memory: search smaller models or batches, or lower tune.max_concurrent."
    return f"The trial's process died: {text.splitlines()[-1] if text else 'no reason is known'}"[:500]


def make_scheduler(settings: SweepSettings, space: Space, journal: Journal) -> Journalled:
    """The scheduler asked for, with the results of the journal in it."""
    tune, trainer = settings.tune, settings.trainer
    inner: TrialScheduler
    match tune.scheduler:
        case "none":
            inner = FIFOScheduler()
        case "pbt":
            inner = Pbt(settings, space, journal, perturb_every(settings))
        case kind:
            assert trainer.max_steps is not None
            asha = Asha(trainer.max_steps, first_rung(settings), tune.reduction_factor,
                        BRACKETS if kind == "hyperband" else 1)
            for event in journal.events:
                if event["event"] == "result":
                    loss = event["loss"]
                    asha.judge(event["number"], event["step"], math.nan if loss is None else loss)
            inner = asha
    return Journalled(inner, journal)


def first_rung(settings: SweepSettings) -> int:
    """``tune.min_steps``, or an eighth of the training and one validation at least."""
    trainer = settings.trainer
    assert trainer.max_steps is not None
    return settings.tune.min_steps or min(trainer.max_steps, max(trainer.validate_every_steps, trainer.max_steps // 8))


def perturb_every(settings: SweepSettings) -> int:
    """``tune.perturb_every_steps``, or a quarter of the training, in whole validations."""
    every = settings.trainer.validate_every_steps
    assert settings.trainer.max_steps is not None
    return settings.tune.perturb_every_steps or max(1, settings.trainer.max_steps // 4 // every) * every
