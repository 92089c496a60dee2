"""How many trials run at a time, and why: counted out before the first one starts."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from avray.config import SweepSettings
from avray.data.cluster import SPARE_CPUS, Needs, available, grows, start_ray
from avray.data.shared import shared_paths
from avray.tuning.trial import trains_itself

DRIVER_CPUS = 0.01
"""Of a trial's driver where it has workers: it waits for them nearly all the time."""


@dataclass(frozen=True)
class Room:
    """``trials`` at a time, and the sentence that says why."""

    trials: int
    why: str


def of_trial(settings: SweepSettings) -> dict[str, float]:
    """What a trial's process holds: a worker's share where it is its own, else next to nothing."""
    trainer = settings.trainer
    if not trains_itself(settings):
        return {"CPU": DRIVER_CPUS}
    return {"CPU": trainer.cpus_per_worker, "GPU": float(trainer.use_gpu)}


def driver_cpus(settings: SweepSettings) -> float:
    return 0.0 if trains_itself(settings) else DRIVER_CPUS


def needs_of(settings: SweepSettings, pools: int, trials: int) -> Needs:
    """Embedding is shared, so its actors count once; ``trials`` drivers and their workers beside them."""
    trainer, data = settings.trainer, settings.data
    return Needs(pools, data.embed_workers, data.embed_num_cpus, data.embed_num_gpus, trainer.max_workers * trials,
                 trainer.cpus_per_worker + driver_cpus(settings) / trainer.max_workers, float(trainer.use_gpu))


def start(settings: SweepSettings, pools: int, count: int, embeds_beside: bool) -> Room:
    """Start or join Ray; ``embeds_beside``: encoders run while trials do. ValueError where not even one trial can ever
    be scheduled."""
    tune, trainer, verbose = settings.tune, settings.trainer, settings.logging.level == "debug"
    own = settings.cluster is None and not os.environ.get("RAY_ADDRESS") and not ray.is_initialized()
    cores = os.cpu_count() or 1
    wanted = min(count, tune.max_concurrent or max(1, int(cores // (trainer.max_workers * trainer.cpus_per_worker))))
    one = needs_of(settings, pools, 1)
    # A Ray of our own counts logical CPUs, as many as the trials asked for; GPUs are there or not.
    cpus_alone = Needs(one.pools, one.embed_workers, one.embed_num_cpus, 0.0, trainer.max_workers * wanted,
                       one.trainer_cpus) if own else Needs()
    start_ray(cpus_alone, settings.cluster, settings.data.no_progress_timeout_s, verbose,
              shared_paths(settings.data, settings.run.dir))
    resources, nodes = available(), [node["Resources"] for node in ray.nodes() if node["Alive"]]
    refusal = one.refusal(resources) or (None if grows() else too_big(settings, nodes))
    if refusal:
        raise ValueError(f"Not even one trial fits. {refusal}")
    return room_for(settings, pools, count, resources, cores if own else None, embeds_beside)


def too_big(settings: SweepSettings, nodes: Sequence[Mapping[str, Any]]) -> str | None:
    """A worker that fits on no single machine, however many there are."""
    trainer = settings.trainer
    if any(node.get("CPU", 0) >= trainer.cpus_per_worker and node.get("GPU", 0) >= float(trainer.use_gpu)
           for node in nodes):
        return None
    gpu = " and 1 GPU" if trainer.use_gpu else ""
    return (f"A worker needs {trainer.cpus_per_worker:g} CPUs{gpu} on one machine, and none of {len(nodes)} has them: "
            "lower trainer.cpus_per_worker, or give the cluster a larger one.")


def room_for(settings: SweepSettings, pools: int, count: int, resources: Mapping[str, float],
             cores: int | None = None, embeds_beside: bool = False) -> Room:
    """As many as are asked for, as there are trials, and as the CPUs and GPUs hold."""
    tune, trainer, data = settings.tune, settings.trainer, settings.data
    cpus = trainer.max_workers * trainer.cpus_per_worker + driver_cpus(settings)
    kept = SPARE_CPUS + pools * data.embed_workers * data.embed_num_cpus
    have = resources.get("CPU", 0.0)
    limits = {f"{have - kept:g} of {have:g} CPUs are left for trials": max(1, math.floor((have - kept) / cpus + 1e-6))}
    if trainer.use_gpu:
        has = resources.get("GPU", 0.0)
        gpus = has - (pools * data.embed_workers * data.embed_num_gpus if embeds_beside else 0)
        why = f"there are {has:g} GPUs" if gpus == has else f"{gpus:g} of {has:g} GPUs are left for trials"
        limits[why] = max(1, int(gpus // trainer.max_workers))
    if tune.max_concurrent is not None:
        limits[f"tune.max_concurrent={tune.max_concurrent}"] = tune.max_concurrent
    limits[f"there are {count} trials"] = count
    trials = min(limits.values())
    why = next(reason for reason, limit in reversed(limits.items()) if limit == trials)
    each = f"{trainer.max_workers} worker{'s' * (trainer.max_workers > 1)} of {trainer.cpus_per_worker:g} CPU" + (
        " and 1 GPU" if trainer.use_gpu else "")
    said = f"{trials} trial{'s' * (trials > 1)} at a time, as {why}; each takes {each}."
    if cores is not None and trials * trainer.max_workers > cores:
        said += f" They share {cores} cores: more at a time will not be faster."
    return Room(trials, said)
