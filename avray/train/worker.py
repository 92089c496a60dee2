"""Where the loop is called: by Ray Train, with ranks, devices and sources in its terms, or by a process on its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch

from avray.checkpoint import FOLDER, remote
from avray.data.cache import Cache
from avray.data.loader import PreparedSource, Source
from avray.data.stream import StreamedSource
from avray.devices import device_of
from avray.mirror import Mirror, working_copy
from avray.train.job import Job
from avray.train.loggers import LoggerGroup, open_loggers
from avray.train.loop import Loop, Place
from avray.train.parallel import agreed
from avray.train.samples import await_samples, awaited


def work(config: dict[str, Any]) -> None:
    """One rank's run; rank 0 tells the board what came of it (Ray keeps metrics only beside a checkpoint)."""
    job: Job = ray.get(config["job"])
    board = config["board"]
    context = ray.train.get_context()
    rank = context.get_world_rank()
    name = job.settings.trainer.device_name
    device = ray.train.torch.get_device() if name == "cuda" else torch.device(name)
    cache = Cache(job.settings.data.cache)
    prepared = PreparedSource(job.train, job.train_order, cache, job.columns)
    shard = ray.train.get_dataset_shard("train") if config["streaming"] else None
    streamed: list[StreamedSource] = []

    def train_source(epoch: int, first_step: int) -> Source:
        """Ray Data while the cache is being filled, the cache itself once it is whole."""
        missing = agreed(bool(cache.missing(job.train, job.columns)) if rank == 0 else None)
        if not missing or shard is None:
            return prepared
        if not streamed:
            streamed.append(StreamedSource(shard))
        return streamed[0]

    def leaving() -> tuple[str, ...]:
        notice = ray.train.get_preemption_info() if config["on_cluster"] else None
        return () if notice is None else tuple(notice.preempted_node_ids)

    if rank == 0:
        board.tell.remote("worker", (ray.get_runtime_context().current_actor,))
    place = Place(rank, context.get_world_size(), device, train_source, held_out(job, cache), leaving=leaving)
    outcome = run_rank(job, place, board.tell.remote)
    if rank == 0:
        ray.get(board.tell.remote("outcome", outcome))
    # Once, and no checkpoint: a report waits until the controller looks at its workers, 1.8 s of its 2 s in the mean.
    ray.train.report({name: value for name, value in outcome.items() if isinstance(value, int | float)})


def run_here(job: Job, tell: Callable[[str, Any], Any], between_steps: Callable[[], None]) -> dict[str, Any]:
    """The only rank's run, in this process and on rows that are all embedded; returns its outcome."""
    cache, device = Cache(job.settings.data.cache), torch.device(device_of(job.settings.trainer.device_name))
    prepared = PreparedSource(job.train, job.train_order, cache, job.columns)
    place = Place(0, 1, device, lambda epoch, step: prepared, held_out(job, cache), between_steps=between_steps)
    return run_rank(job, place, tell)


def held_out(job: Job, cache: Cache) -> Source:
    return PreparedSource(job.validation, job.validation_order, cache, job.columns)


def run_rank(job: Job, place: Place, tell: Callable[[str, Any], Any]) -> dict[str, Any]:
    """The loop at ``place``, its figures told and its folder kept up to date wherever that is; returns the outcome."""
    run_dir, trainer, is_first = job.settings.run.dir, job.settings.trainer, place.rank == 0
    remote.restore(run_dir)
    if is_first:
        remote.restore_file(run_dir, "metrics.csv")
    mirror = Mirror(run_dir, ("metrics.csv", "tensorboard/", "profile/"))

    def loggers(resume_step: int | None) -> LoggerGroup:
        return open_loggers(trainer.loggers, working_copy(run_dir), job.settings_record, resume_step) if is_first \
            else LoggerGroup([])

    def report(figures: Mapping[str, Any]) -> None:
        if is_first:
            tell("figures", (figures["step"], dict(figures)))

    def saved(checkpoint: Path, step: int) -> None:
        mirror.push()
        remote.publish(run_dir, checkpoint)
        remote.prune(run_dir, trainer.keep_last, trainer.keep_every_steps, awaited(run_dir))
        tell("saved", (checkpoint, step))

    def sample(checkpoint: Path, step: int) -> None:
        await_samples(run_dir, step)
        tell("sample", (f"{run_dir}/{FOLDER}/{checkpoint.name}", step))

    loop = Loop(job, replace(place, progress=lambda progress: tell("progress", progress), report=report, saved=saved,
                             sample=sample, loggers=loggers))
    outcome = dataclasses.asdict(loop.run())
    if is_first:
        mirror.push()
    return outcome
