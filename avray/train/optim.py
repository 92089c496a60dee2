"""Optimiser, learning rate, averaged weights, early stopping.

Notable: the rate is a pure function of the step, except for the plateau's factor, which changes only when a
validation loss is observed. So a resumed run needs a handful of JSON numbers to go on exactly, nothing is
counted twice, and a rate given anew on the command line takes effect (``torch.optim.lr_scheduler`` would
restore the old one).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from avray.settings.trainer import OptimizerSettings, ScheduleSettings

OPTIMIZERS = ("adamw", "adam", "nadam", "radam", "adafactor", "sgd")
SCHEDULES = ("constant", "linear", "cosine", "plateau")

# One kernel over all tensors instead of several a tensor; the others fall back to torch's own choice (foreach
# on CUDA).
_FUSED_DEVICES = {"cpu", "cuda", "mps"}


def build_optimizer(model: nn.Module, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """The optimiser over the model's trainable parameters, fused where torch has it (adamw, adam, sgd).

    ``settings.decay`` is ``"all"`` (as ``torch.optim.AdamW`` does) or ``"matrices"`` (GPT-2, Llama: nothing
    with fewer than two dimensions, so no bias and no norm). ``betas[0]`` is sgd's momentum; adafactor has
    neither betas nor eps.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise ValueError("The model has no trainable parameter: unfreeze one or leave training out.")
    groups = _decay_groups(parameters, settings)
    lr, betas, eps = settings.lr, settings.betas, settings.eps
    fused = {parameter.device.type for parameter in parameters} <= _FUSED_DEVICES
    match settings.name:
        case "adamw":
            return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=fused)
        case "adam":
            return torch.optim.Adam(groups, lr=lr, betas=betas, eps=eps, fused=fused)
        case "nadam":
            return torch.optim.NAdam(groups, lr=lr, betas=betas, eps=eps, decoupled_weight_decay=True)
        case "radam":
            return torch.optim.RAdam(groups, lr=lr, betas=betas, eps=eps, decoupled_weight_decay=True)
        case "adafactor":
            return torch.optim.Adafactor(groups, lr=lr)
        case "sgd":
            return torch.optim.SGD(groups, lr=lr, momentum=betas[0], fused=fused)
    raise ValueError(f"trainer.optimizer.name={settings.name} is unknown: use one of {OPTIMIZERS}.")


def _decay_groups(parameters: list[nn.Parameter], settings: OptimizerSettings) -> list[dict[str, Any]]:
    decay = settings.weight_decay
    if settings.decay == "all":
        return [{"params": parameters, "weight_decay": decay}]
    if settings.decay != "matrices":
        raise ValueError(f"trainer.optimizer.decay={settings.decay} is unknown; use all or matrices.")
    matrices = [parameter for parameter in parameters if parameter.ndim >= 2]
    others = [parameter for parameter in parameters if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


class Schedule:
    """Sets each group's rate to its base rate × warm-up × shape × plateau factor, never below
    ``min_lr_ratio`` of the base rate once warm.

    Warm-up is linear: step s of w warm-up steps has (s+1)/(w+1) of the rate, so that step 0 already learns
    and step w is the first at the full rate. ``linear`` and ``cosine`` then fall to ``min_lr_ratio`` at
    ``max_steps``. ``plateau`` multiplies by ``factor`` after more than ``patience`` validations in a row
    without an improvement of 0.01 %, which is torch's ``ReduceLROnPlateau`` with its defaults.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, settings: ScheduleSettings, max_steps: int) -> None:
        self.optimizer, self.settings, self.max_steps = optimizer, settings, max_steps
        self.base_rates = [group["lr"] for group in optimizer.param_groups]
        self.plateau_factor = 1.0
        self.best: float | None = None
        self.num_bad = 0

    def ratio(self, step: int) -> float:
        """The rate of ``step`` (from 0) as a share of the base rate."""
        settings, warmup = self.settings, self.settings.warmup_steps
        warm = min(1.0, (step + 1) / (warmup + 1))
        if settings.name == "constant":
            return warm
        if settings.name == "plateau":
            return warm * max(self.plateau_factor, settings.min_lr_ratio)
        progress = min(1.0, max(0.0, (step - warmup) / max(1, self.max_steps - warmup)))
        shape = 1 - progress if settings.name == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
        return warm * (settings.min_lr_ratio + (1 - settings.min_lr_ratio) * shape)

    def step(self, step: int) -> float:
        """Call before the update of ``step``; returns the first group's rate."""
        ratio = self.ratio(step)
        for group, base in zip(self.optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = base * ratio
        return self.base_rates[0] * ratio

    def observe(self, validation_loss: float) -> None:
        """Take a validation loss (the same on every rank). Only ``plateau`` listens; NaN counts as no
        improvement."""
        if self.settings.name != "plateau":
            return
        threshold = math.inf if self.best is None else self.best - 1e-4 * abs(self.best)
        if validation_loss < threshold and math.isfinite(validation_loss):
            self.best, self.num_bad = validation_loss, 0
            return
        self.num_bad += 1
        if self.num_bad > self.settings.patience:
            self.plateau_factor *= self.settings.factor
            self.num_bad = 0

    def state_dict(self) -> dict[str, Any]:
        return {"plateau_factor": self.plateau_factor, "best": self.best, "num_bad": self.num_bad}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.plateau_factor = float(state["plateau_factor"])
        self.best, self.num_bad = state["best"], int(state["num_bad"])


def build_schedule(optimizer: torch.optim.Optimizer, settings: ScheduleSettings, max_steps: int) -> Schedule:
    """The schedule of an optimiser just built: its present rates are the base rates, so build it before the
    optimiser's state is restored. ValueError for an unknown name or a warm-up that never ends."""
    if settings.name not in SCHEDULES:
        raise ValueError(f"trainer.schedule.name={settings.name} is unknown: use one of {SCHEDULES}.")
    if settings.warmup_fraction:
        settings = replace(settings, warmup_steps=int(settings.warmup_fraction * max_steps), warmup_fraction=0.0)
    if settings.name in ("linear", "cosine") and settings.warmup_steps >= max_steps > 1:
        raise ValueError(f"trainer.schedule.warmup_steps={settings.warmup_steps} leaves nothing of "
                         f"trainer.max_steps={max_steps} for {settings.name}: lower it or train longer.")
    return Schedule(optimizer, settings, max_steps)


class Ema:
    """An exponential moving average of the trainable parameters, kept in float32: 1 - 0.9999 of a bfloat16
    weight is below its precision and would be lost.

    The decay is min(``decay``, (1+step)/(10+step)) (TensorFlow's ``num_updates`` rule), so that a short run
    does not average in its own initial weights; it depends on the step alone, so there is no counter to save.
    ``warmup=False`` uses ``decay`` from the first step.
    """

    def __init__(self, model: nn.Module, decay: float, *, warmup: bool = True) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"trainer.ema_decay={decay} must be at least 0 and below 1.")
        self.decay, self.warmup = decay, warmup
        self.names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.averages: list[Tensor] = []
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Start again from the model's present weights."""
        self.averages = [parameter.detach().float().clone() for parameter in self.parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after the update of ``step`` (from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay
        torch._foreach_lerp_(self.averages, [parameter.float() for parameter in self.parameters], 1 - decay)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The model has the averaged weights inside the block and its own, to the bit, after it. Costs one
        more copy of the parameters meanwhile."""
        own = [parameter.detach().clone() for parameter in self.parameters]
        self._write(self.averages)
        try:
            yield
        finally:
            self._write(own)

    @torch.no_grad()
    def _write(self, tensors: list[Tensor]) -> None:
        for parameter, tensor in zip(self.parameters, tensors, strict=True):
            parameter.copy_(tensor)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by parameter name, float32. Frozen parameters and buffers are not in it: for weights
        that serve alone, save the model inside ``swapped``."""
        return dict(zip(self.names, self.averages, strict=True))

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take averages by name; further names (frozen weights, buffers) are left alone."""
        missing = [name for name in self.names if name not in state]
        if missing:
            raise ValueError(f"The averaged weights are of another model: {len(missing)} parameters absent, "
                             f"{missing[0]} first.")
        for name, average in zip(self.names, self.averages, strict=True):
            average.copy_(state[name])


@dataclass
class EarlyStopping:
    """Stops after ``patience`` validations in a row without an improvement of more than ``min_delta``; 0
    never stops.

    Feed it the loss every rank agrees on, and every rank decides alike. ``best`` is also what makes a
    checkpoint ``best``.
    """

    patience: int
    min_delta: float = 0.0
    best: float | None = None
    num_bad: int = 0

    def observe(self, validation_loss: float) -> bool:
        """True if this is the best so far. NaN and Inf never are."""
        better = math.isfinite(validation_loss) and (
            self.best is None or validation_loss < self.best - self.min_delta)
        self.best = validation_loss if better else self.best
        self.num_bad = 0 if better else self.num_bad + 1
        return better

    @property
    def stop(self) -> bool:
        return 0 < self.patience <= self.num_bad

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "num_bad": self.num_bad}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.num_bad = state["best"], int(state["num_bad"])
