"""``tune.*``: what a sweep searches, how, and what it does about trials that fail."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from avray.settings.convert import check_above_zero, check_at_least, check_fraction


@dataclass(frozen=True)
class ObjectiveSettings:
    """One of ``tune.objectives``"""

    metric: str = "validation_loss"
    """``validation_loss``, ``parameters``, ``seconds``, or a metric of the family's (a wrong one is answered with
    what there is)."""
    mode: Literal["min", "max"] = "min"
    """Whether less or more is better."""

    def __post_init__(self) -> None:
        if not self.metric:
            raise ValueError("tune.objectives: a metric is empty; give validation_loss or a metric of the family's.")


@dataclass(frozen=True)
class TuneSettings:
    """``tune``"""

    search: Literal["random", "grid", "optuna"] = "random"
    """Where a trial's values come from: drawn, every point of a grid, or Optuna's TPE after the trials so far."""
    scheduler: Literal["none", "asha", "hyperband", "pbt"] = "asha"
    """Which trials go on: all; asha and hyperband (ASHA in three brackets) stop the worse ones early; pbt has the worse
    ones go on from a copy of a better one's weights, its values changed a little."""
    space: Mapping[str, Any] = field(default_factory=dict)
    """``key: {loguniform: [1e-5, 1e-2]}`` for any key of the settings; uniform, int, logint and choice likewise,
    ``step:`` for a raster, ``when: {other.key: value}`` for a condition; null takes a key out."""
    num_samples: int | None = 16
    """Trials; null: as many as the grid has points."""
    max_concurrent: int | None = None
    """Trials at a time; null: as many as the CPUs and GPUs hold."""
    include_default: bool = True
    """Trial 0 takes the settings as they stand, so that the best is never worse than they are."""
    objectives: tuple[ObjectiveSettings, ...] = (ObjectiveSettings(),)
    """The first decides ``best``; several give a Pareto table too."""
    metric_samples: int = 8
    """Held-out examples each finished trial generates for, where an objective is a metric of the family's."""

    min_steps: int | None = None
    """asha, hyperband: steps every trial gets; null: an eighth of ``trainer.max_steps``, one validation at least."""
    reduction_factor: float = 4.0
    """asha, hyperband: one trial in so many goes on from a rung to the next, so many times longer."""
    perturb_every_steps: int | None = None
    """pbt: steps between two comparisons; null: a quarter of ``trainer.max_steps``."""
    quantile: float = 0.25
    """pbt: share of trials that give up their weights for those of as many best ones."""
    resample_probability: float = 0.25
    """pbt: how often a value is drawn anew instead of taken a fifth up or down."""
    grid_points: int = 3
    """grid: points of a range that is not a choice."""

    max_failures: int = 1
    """Times a trial whose worker or process died starts again, from its last checkpoint."""
    retry_out_of_memory: bool = False
    """Whether that goes for running out of memory too."""

    def __post_init__(self) -> None:
        check_at_least("tune", self, 1, "num_samples", "max_concurrent", "min_steps", "perturb_every_steps",
                       "metric_samples")
        check_at_least("tune", self, 0, "max_failures")
        check_at_least("tune", self, 2, "grid_points")
        check_above_zero("tune", self, "quantile")
        check_fraction("tune", self, "resample_probability")
        if self.quantile > 0.5:
            raise ValueError(f"tune.quantile must be at most 0.5, got {self.quantile}.")
        if self.reduction_factor <= 1:
            raise ValueError(f"tune.reduction_factor must be above 1, got {self.reduction_factor}.")
        if not self.objectives:
            raise ValueError("tune.objectives is empty: give [{metric: validation_loss, mode: min}] or others.")
        names = [objective.metric for objective in self.objectives]
        if len(set(names)) < len(names):
            raise ValueError(f"tune.objectives names a metric twice: {', '.join(names)}.")
        if self.num_samples is None and self.search != "grid":
            raise ValueError("tune.num_samples=null is for tune.search=grid: give the number of trials.")
        if self.scheduler == "pbt":
            if self.search != "random":
                raise ValueError("tune.scheduler=pbt finds values of its own: take tune.search=random, not "
                                 f"{self.search}.")
            if (self.num_samples or 0) < 2:
                raise ValueError("tune.scheduler=pbt needs tune.num_samples of at least 2: trials copy from others.")

    @property
    def stops_early(self) -> bool:
        """Whether trials are compared before they end, by their validation loss."""
        return self.scheduler != "none"
