"""What a worker is given: one picklable value, the same for every rank and for every restart of the group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from avray.config import TrainSettings
from avray.data.order import Order
from avray.data.plan import Plan
from avray.family import Column, Family, Fitted


@dataclass(frozen=True)
class Job:
    """``settings_record`` and ``family_record`` are plain data for the checkpoint."""

    settings: TrainSettings
    family: Family
    fitted: Fitted
    train: Plan
    validation: Plan
    settings_record: Mapping[str, Any] = field(default_factory=dict)
    family_record: Mapping[str, Any] = field(default_factory=dict)
    rows: Mapping[str, int] = field(default_factory=dict)

    @property
    def columns(self) -> list[Column]:
        return self.family.columns(self.fitted)

    @property
    def train_order(self) -> Order:
        trainer, data = self.settings.trainer, self.settings.data
        return self.train.order(trainer.batch_size, self.settings.seed, data.window_rows)

    @property
    def validation_order(self) -> Order:
        """Never shuffled. The batch is the trainer's, so that it fits the same memory."""
        return self.validation.order(self.settings.trainer.batch_size, 0, self.settings.data.window_rows, shuffle=False)

    @property
    def max_steps(self) -> int:
        """Where the schedule ends."""
        trainer = self.settings.trainer
        limits = [trainer.max_steps]
        if trainer.max_epochs is not None:
            limits.append(trainer.max_epochs * self.train_order.steps_per_epoch)
        return min(limit for limit in limits if limit is not None)

    @property
    def identity(self) -> dict[str, Any]:
        """What must be equal for a resume to be exact."""
        order = self.train_order
        return {"batch_size": order.batch_size, "seed": order.seed, "window_rows": order.window_rows,
                "examples": order.num_rows, "fitted": self.fitted.digest(),
                "first_shard": self.train.shards[0].name, "last_shard": self.train.shards[-1].name}
