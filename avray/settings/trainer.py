"""``trainer.*``: the loop, its optimiser, its workers, and what it writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from avray.settings.convert import check_above_zero, check_at_least, check_fraction


@dataclass(frozen=True)
class OptimizerSettings:
    """``trainer.optimizer``"""

    name: Literal["adamw", "adam", "nadam", "radam", "adafactor", "sgd"] = "adamw"
    """As in torch.optim; nadam's and radam's weight decay is decoupled too."""
    lr: float = 5e-4
    """Learning rate at the top of the schedule."""
    weight_decay: float = 0.01
    """Decoupled but for adam and sgd."""
    decay: Literal["all", "matrices"] = "all"
    """What it applies to: every parameter (torch's way), or none with fewer than two dimensions (GPT-2's)."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Of the two moments; for sgd the first is the momentum; adafactor has none."""
    eps: float = 1e-8
    """Added to the root of the second moment."""

    def __post_init__(self) -> None:
        check_above_zero("trainer.optimizer", self, "lr", "eps")
        check_at_least("trainer.optimizer", self, 0, "weight_decay")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"trainer.optimizer.betas must be from 0 to below 1, got {list(self.betas)}.")


@dataclass(frozen=True)
class ScheduleSettings:
    """``trainer.schedule``: the learning rate over the steps, as a factor of ``optimizer.lr``."""

    name: Literal["constant", "linear", "cosine", "plateau"] = "cosine"
    """After the warm-up: constant, down in a line, down a half cosine, or cut when validation stalls."""
    warmup_steps: int = 0
    """Steps from 0 to the full rate, in a line."""
    warmup_fraction: float = 0.0
    """The same as a share of the whole run, instead of ``warmup_steps``."""
    min_lr_ratio: float = 0.0
    """What linear and cosine end at and plateau stops at, as a share of ``lr``."""
    factor: float = 0.5
    """plateau: the cut."""
    patience: int = 5
    """plateau: validations without improvement before a cut."""

    def __post_init__(self) -> None:
        check_at_least("trainer.schedule", self, 0, "warmup_steps", "patience")
        check_fraction("trainer.schedule", self, "min_lr_ratio")
        check_fraction("trainer.schedule", self, "factor", "warmup_fraction", below_one=True)
        if self.warmup_steps and self.warmup_fraction:
            raise ValueError("trainer.schedule.warmup_steps and warmup_fraction say the same: give one of them.")


@dataclass(frozen=True)
class LoggerSettings:
    """``trainer.loggers``: where figures go besides the progress line."""

    tensorboard: bool = True
    """``tensorboard/`` in the run: curves, sound and pictures."""
    csv: bool = True
    """``metrics.csv`` in the run, one line for each logged step."""
    wandb: bool = False
    """Weights & Biases; needs the extra ``avray[wandb]``."""
    wandb_project: str = "avray"
    """The project's name there."""
    mlflow: bool = False
    """MLflow, to MLFLOW_TRACKING_URI; needs the extra ``avray[mlflow]``."""


@dataclass(frozen=True)
class TrainerSettings:
    """``trainer``. ``max_steps`` and ``max_epochs``: whichever ends first; null is no limit."""

    max_steps: int | None = 200
    """Optimiser steps."""
    max_epochs: int | None = None
    """Passes over the training rows."""
    stop_at_step: int | None = None
    """End at this step as an interruption would: checkpoint written, schedule unchanged, ``resume=true`` goes on."""

    batch_size: int = 16
    """Rows of one optimiser step over all workers and micro-batches (global)."""
    accumulate: int = 1
    """Micro-batches a step."""
    num_workers: int | tuple[int, int] = 1
    """Ray Train workers; their number changes neither the batch nor the order of rows. A pair ``[fewest, most]``: as
    many as the cluster has room for, again after each node that is lost or gained."""
    resize_interval_s: float = 60.0
    """Seconds between two looks for more room, where ``num_workers`` is a pair. A resize goes on from the newest
    checkpoint: longer than the time between two of them."""
    cpus_per_worker: float = 1.0
    """Logical CPUs Ray reserves for each."""
    threads_per_worker: int | None = None
    """torch threads of each; null: ``cpus_per_worker`` rounded down, at least 1."""
    use_gpu: bool = False
    """Reserve one GPU for each worker."""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """``auto``: cuda with ``use_gpu``, else cpu. A device that is not there is an error, never another one."""
    max_failures: int = 0
    """Worker failures to recover from, each from the newest checkpoint."""

    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the forward and backward pass (autocast); weights and optimiser stay float32. fp16 scales its loss."""
    compile: bool = False
    """torch.compile of the model."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: about a third more time for much less memory."""
    parallel: Literal["ddp", "fsdp2"] = "ddp"
    """``fsdp2`` shards weights, gradients and moments over the workers."""

    optimizer: OptimizerSettings = OptimizerSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    clip_norm: float | None = 1.0
    """Largest global gradient norm; null: none."""
    ema_decay: float = 0.98
    """Of the averaged weights that are validated, sampled and kept as ``ema``; 0: none."""
    nan_policy: Literal["stop", "skip"] = "stop"
    """On a loss or gradient that is not finite: stop (exit 5), or leave the step out."""
    max_skipped: int = 10
    """Steps left out in a row before ``skip`` stops as well."""

    validate_every_steps: int = 50
    """0: never."""
    validate_max_rows: int | None = None
    """Validation rows to use, always the same; null: all."""
    early_stopping_patience: int = 0
    """Validations without improvement before the run ends; 0: never."""
    sample_every_steps: int | None = None
    """Generate from fixed validation rows; null: whenever validating; 0: never."""
    num_samples: int = 4
    """Samples each time."""
    log_every_steps: int = 10
    """Steps between two lines of figures."""

    checkpoint_every_steps: int = 100
    """Steps between two checkpoints; the last step is always kept. 0: the last alone."""
    keep_last: int = 3
    """Newest checkpoints to keep besides the best."""
    keep_every_steps: int = 0
    """Checkpoints at multiples of this are never deleted; 0: none."""

    profile: bool = False
    """Write a torch profiler trace of a few steps into the run."""
    hooks: tuple[Mapping[str, Any], ...] = ()
    """Objects given by ``_target_`` with any of on_train_start/end, on_epoch_start/end, on_validation_start/end."""
    loggers: LoggerSettings = LoggerSettings()

    def __post_init__(self) -> None:
        check_at_least("trainer", self, 1, "max_steps", "max_epochs", "stop_at_step", "batch_size", "accumulate",
                       "min_workers", "threads_per_worker", "validate_max_rows", "log_every_steps", "keep_last")
        check_at_least("trainer", self, 0, "max_failures", "max_skipped", "validate_every_steps", "num_samples",
                       "early_stopping_patience", "sample_every_steps", "checkpoint_every_steps", "keep_every_steps")
        check_above_zero("trainer", self, "cpus_per_worker", "clip_norm", "resize_interval_s")
        check_fraction("trainer", self, "ema_decay", below_one=True)
        self._check_together()

    def _check_together(self) -> None:
        if self.max_steps is None and self.max_epochs is None:
            raise ValueError("trainer.max_steps and trainer.max_epochs are both null; give one, or the run never ends.")
        if self.is_elastic:
            if self.min_workers > self.max_workers:
                raise ValueError(f"trainer.num_workers=[{self.min_workers},{self.max_workers}] must be the fewest "
                                 "workers and the most.")
            if not self.max_failures:
                raise ValueError("trainer.num_workers with a fewest and a most needs trainer.max_failures above 0: a "
                                 "node that is lost is a failure to recover from.")
            if self.cpus_per_worker % 1:
                raise ValueError(f"trainer.cpus_per_worker ({self.cpus_per_worker:g}) must be a whole number where "
                                 "trainer.num_workers has a fewest and a most.")
        smallest = self.max_workers * self.accumulate
        if self.batch_size < smallest:
            raise ValueError(f"trainer.batch_size ({self.batch_size}) must be at least trainer.num_workers × "
                             f"trainer.accumulate ({smallest}): every micro-batch needs a row.")
        if (self.device == "cuda") != self.use_gpu and self.device != "auto":
            cure = "trainer.use_gpu=true" if self.device == "cuda" else "trainer.use_gpu=false or trainer.device=cuda"
            raise ValueError(f"trainer.device={self.device} needs {cure}.")
        if self.precision == "fp16" and self.device_name == "cpu":
            raise ValueError("trainer.precision=fp16 needs a GPU; on a CPU take bf16 or fp32.")
        if self.validate_every_steps == 0:
            for key, used in (("early_stopping_patience", self.early_stopping_patience > 0),
                              ("schedule.name=plateau", self.schedule.name == "plateau")):
                if used:
                    raise ValueError(f"trainer.{key} needs trainer.validate_every_steps above 0.")
        if self.max_steps is not None and self.schedule.warmup_steps >= self.max_steps:
            raise ValueError(f"trainer.schedule.warmup_steps ({self.schedule.warmup_steps}) must be below "
                             f"trainer.max_steps ({self.max_steps}).")
        for index, hook in enumerate(self.hooks):
            if "_target_" not in hook:
                raise ValueError(f"trainer.hooks[{index}] needs a _target_, got {dict(hook)}.")

    @property
    def is_elastic(self) -> bool:
        return not isinstance(self.num_workers, int)

    @property
    def min_workers(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @property
    def device_name(self) -> str:
        """``cuda``, ``mps`` or ``cpu``."""
        return self.device if self.device != "auto" else ("cuda" if self.use_gpu else "cpu")

    @property
    def num_threads(self) -> int:
        """torch threads of one worker."""
        return self.threads_per_worker or max(1, int(self.cpus_per_worker))

    @property
    def samples_every(self) -> int:
        """``sample_every_steps`` with its default filled in; 0: never."""
        return self.validate_every_steps if self.sample_every_steps is None else self.sample_every_steps
