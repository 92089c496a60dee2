"""Starting Ray, and the one plan of logical CPUs and GPUs for readers, actors, trainers and trials.

Ray Data waits silently, for half an hour, when its actors and the trainers leave it no CPU to read with. So a run is
counted out beforehand, with one CPU to spare; a Ray of our own gets as many logical CPUs as that takes (they are
numbers, not cores), and on someone else's cluster a run that can never be scheduled is refused at once.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import ray
from ray.data import DataContext

from avray.cluster_file import ceiling
from avray.data.shared import check_shared

SPARE_CPUS = 1.0
BOOTSTRAP = Path("~/ray_bootstrap_config.yaml")
"""Where ``ray up`` leaves its file on a head."""


@dataclass(frozen=True)
class Needs:
    """Logical resources of one run: ``pools`` frozen networks of ``embed_workers`` actors, and the trainers."""

    pools: int = 0
    embed_workers: int = 1
    embed_num_cpus: float = 1.0
    embed_num_gpus: float = 0.0
    trainers: int = 0
    trainer_cpus: float = 1.0
    trainer_gpus: float = 0.0
    trials: int = 1
    fewest_trainers: int | None = None
    """Where there may be fewer than ``trainers``."""

    @property
    def cpus(self) -> float:
        actors = self.pools * self.embed_workers * self.embed_num_cpus
        return self.trials * (actors + self.trainers * self.trainer_cpus) + SPARE_CPUS

    @property
    def gpus(self) -> float:
        return self.trials * (self.pools * self.embed_workers * self.embed_num_gpus + self.trainers * self.trainer_gpus)

    def refusal(self, available: Mapping[str, float]) -> str | None:
        """One sentence with the cure, where these resources can never hold the run."""
        if self.fewest_trainers is not None:
            return replace(self, trainers=self.fewest_trainers, fewest_trainers=None).refusal(available)
        parts = (f"{self.pools * self.embed_workers} embedding actors of {self.embed_num_cpus:g} CPU and "
                 f"{self.embed_num_gpus:g} GPU, {self.trainers} trainers of {self.trainer_cpus:g} CPU and "
                 f"{self.trainer_gpus:g} GPU, times {self.trials}, and one CPU for reading")
        for kind, needed in (("CPU", self.cpus), ("GPU", self.gpus)):
            have = available.get(kind, 0.0)
            if needed > have + 1e-6:
                return (f"The run needs {needed:g} logical {kind}s ({parts}) and the cluster has {have:g} at most: "
                        "lower trainer.num_workers, data.embed_workers or data.embed_num_cpus, or give it more.")
        return None


def start_ray(needs: Needs, address: str | None, no_progress_timeout_s: float, verbose: bool = False,
              shared: Mapping[str, str | None] | None = None) -> None:
    """Connect to ``address``, or start a Ray of our own that fits the run; an existing session is used as it is.

    ValueError where the run can never be scheduled, and for a path of ``shared`` (by its setting) that a node does not
    see.
    """
    quiet(verbose)
    if not ray.is_initialized():
        if address is not None or os.environ.get("RAY_ADDRESS"):
            ray.init(address=address or "auto", log_to_driver=verbose, logging_level="ERROR")
        else:
            # How often the controller of a training looks after its workers: a start and an end wait for it.
            os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
            cpus = max(os.cpu_count() or 1, math.ceil(needs.cpus))
            ray.init(num_cpus=cpus, include_dashboard=False, log_to_driver=verbose, logging_level="ERROR",
                     object_store_memory=1 << 30)
    refusal = needs.refusal(available())
    if refusal:
        raise ValueError(refusal)
    check_shared(shared or {})
    quiet(verbose)  # once more: Ray sets its loggers up when it starts
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    context.execution_no_progress_timeout_s = no_progress_timeout_s


def grows() -> bool:
    """Whether this is the head of a cluster whose nodes come with the work."""
    return BOOTSTRAP.expanduser().is_file()


def available() -> dict[str, float]:
    """The logical CPUs and GPUs that this cluster has, or can grow to where it was started by ``ray up`` and this is
    its head."""
    here = ray.cluster_resources()
    if not grows():
        return here
    most = ceiling(BOOTSTRAP.expanduser()) or {"CPU": math.inf, "GPU": math.inf}
    return {kind: max(here.get(kind, 0.0), most[kind]) for kind in most}


def quiet(verbose: bool) -> None:
    """No usage report, no workers started ahead of need; Ray's own lines on the terminal only when asked for."""
    names = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0", "RAY_DEDUP_LOGS": "1",
             "RAY_enable_worker_prestart": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    if not verbose:
        # Ray 2.60 complains in C++ of every Data actor that it would restart; the lines stay in its log files.
        names["RAY_BACKEND_LOG_LEVEL"] = "fatal"
        for name in ("ray", "ray.data", "ray.train", "ray.tune"):
            logging.getLogger(name).setLevel(logging.ERROR)
    for name, value in names.items():
        os.environ.setdefault(name, value)
