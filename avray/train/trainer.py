"""The driver: from settings to a trained run folder.

    manifest and splits -> plans -> fit -> Ray Train workers running the loop -> best checkpoint, samples, summary.json

Ray is given metrics and no checkpoints: its manager would prune and restore by its own rules. What makes a checkpoint
exist is its manifest, and what a restarted group goes on from is the newest of them.
"""

from __future__ import annotations

import functools
import gc
import os
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from omegaconf import OmegaConf
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from avray.checkpoint import Checkpoint, remote, sweep
from avray.checkpoint.store import step_of
from avray.config import TrainSettings, to_mapping
from avray.data.cache import Cache
from avray.data.cluster import Needs, start_ray
from avray.data.prepare import Prepared, pool_of, prepare_training
from avray.data.rows import gather
from avray.data.shared import check_cache, shared_paths
from avray.data.stream import InOrder, block_dataset
from avray.devices import device_of
from avray.errors import CheckpointError, DataError, MissingDependency, OutOfMemory, TrainingFailed, WorkerFailed
from avray.family import Column, Family
from avray.media import Limits
from avray.mirror import mirrored, working_copy
from avray.registry import family_settings
from avray.store import Store
from avray.train.board import Listener, Watch
from avray.train.board_actor import open_board
from avray.train.elastic import ElasticTrainer
from avray.train.job import Job
from avray.train.leftovers import release
from avray.train.memory import Memory, count_parameters, estimate
from avray.train.samples import awaited, no_longer_await
from avray.train.summary import rejected_rows, write_summary
from avray.train.validation import checkpoint_loss
from avray.train.worker import run_here, work

REJECTS = "rejects.jsonl"


def train(settings: TrainSettings, family: Family, prepared: Prepared | None = None,
          listener: Listener | None = None, here: bool = False) -> dict[str, Any]:
    """Train a family as the settings say; returns what ``summary.json`` holds. A sweep gives what its trials share,
    ``prepared`` and embedded, and listens; ``here`` is in this process, for one worker.

    Raises ValueError for settings that cannot be, DataError for data, TrainingFailed when a worker fails for good.
    """
    if settings.dry_run:
        settings = dry(settings)
    with mirrored(settings.run.dir, only=(REJECTS,)) as folder:
        return train_in(folder, settings, family, prepared, listener, here)


def train_in(folder: Path, settings: TrainSettings, family: Family, prepared: Prepared | None,
             listener: Listener | None, here: bool) -> dict[str, Any]:
    """``folder`` is the run's, or this node's copy of it."""
    began = time.perf_counter()
    check_run_dir(settings)
    check_device(settings)
    check_cache(settings.data)
    Store(settings.run.dir).write("config.yaml", OmegaConf.to_yaml(to_mapping(settings)).encode())
    start_ray(needs(settings, len(family.columns(None))), settings.cluster, settings.data.no_progress_timeout_s,
              settings.logging.level == "debug", shared_paths(settings.data, settings.run.dir))
    if prepared is None:
        prepared = prepare_training(family, settings.data, folder, settings.logging.progress)
    job = make_job(settings, family, prepared)
    trainer = settings.trainer
    job.train_order.worker_counts(trainer.min_workers, trainer.max_workers, trainer.accumulate)
    watch = Watch(job, listener)
    outcome = fit_here(job, watch) if here else fit(job, prepared.columns, prepared.dataset.limits, watch)
    watch.finish()
    extra = held_out(job, prepared) | ({"memory_bytes": memory_needed(job).as_figures()} if settings.dry_run else {})
    rows = rejected_rows(job, Cache(settings.data.cache), folder / REJECTS)
    parameters = count_parameters(family, prepared.fitted)
    return write_summary(job, outcome, rows, parameters, time.perf_counter() - began, extra)


def make_job(settings: TrainSettings, family: Family, prepared: Prepared) -> Job:
    """What every worker is given."""
    return Job(settings, family, prepared.fitted, prepared.train, prepared.validation, to_mapping(settings),
               family_settings(family), prepared.dataset.counts())


def held_out(job: Job, prepared: Prepared) -> dict[str, Any]:
    """The best checkpoint's loss and baselines on the groups that were held out altogether, where there are any."""
    if prepared.test is None:
        return {}
    checkpoint = Checkpoint.open(job.settings.run.dir)
    loss = checkpoint_loss(checkpoint, job.family, prepared.test, Cache(job.settings.data.cache),
                           job.settings.trainer.device_name, job.settings.trainer.batch_size)
    return {"held_out": {"loss": loss.loss, "baselines": loss.baselines, "examples": prepared.test.num_examples}}


def memory_needed(job: Job) -> Memory:
    """An estimate for one worker, from one micro-batch of validation rows on the meta device."""
    trainer = job.settings.trainer
    size = trainer.batch_size // (trainer.min_workers * trainer.accumulate)
    order = job.validation.order(size, 0, size, shuffle=False)
    rows = gather(job.validation, Cache(job.settings.data.cache), job.columns, order.step(0, 0))
    return estimate(job.family, job.fitted, job.family.collate(rows, job.fitted), trainer)


def check_run_dir(settings: TrainSettings) -> None:
    """A run is never continued or overwritten by accident."""
    run_dir = settings.run.dir
    existing = remote.newest(run_dir)
    if settings.resume and existing is None:
        raise CheckpointError(f"resume=true and {run_dir} has no complete checkpoint: start it without resume, or name "
                              "the run to go on with in run.dir.")
    if existing is not None and not settings.resume:
        raise ValueError(f"run.dir={run_dir} already holds a run (newest checkpoint: {Path(existing).name}): go on "
                         "with it by resume=true, or give another run.dir.")
    sweep(working_copy(run_dir))
    remote.sweep(run_dir)
    for checkpoint in awaited(run_dir):  # of a driver that died
        no_longer_await(run_dir, step_of(checkpoint.name))


def check_device(settings: TrainSettings) -> None:
    """MissingDependency where the device asked for is not in this machine (a cluster's are Ray's to check)."""
    if settings.cluster is None:
        device_of(settings.trainer.device_name)


def needs(settings: TrainSettings, pools: int, trials: int = 1) -> Needs:
    trainer, data = settings.trainer, settings.data
    return Needs(pools, data.embed_workers, data.embed_num_cpus, data.embed_num_gpus, trainer.max_workers,
                 trainer.cpus_per_worker, float(trainer.use_gpu), trials, trainer.min_workers)


def fit(job: Job, columns: list[Column], limits: Limits, watch: Watch) -> Mapping[str, Any]:
    """Run the workers; returns rank 0's outcome.

    Ray's controller starts lost workers again, and nobody the controller: where it is lost itself, or what rank 0 said
    at the end, the group is started anew from the newest checkpoint, as often as ``trainer.max_failures`` allows.
    """
    settings, trainer = job.settings, job.settings.trainer
    run_name, storage = Path(settings.run.dir).name, Store(settings.run.dir)
    cache = Cache(settings.data.cache)
    reference = ray.put(job)
    board = open_board()
    streaming = bool(cache.missing(job.train, columns))
    # Built anew at each start of the group, from where the newest checkpoint stands then.
    datasets = {"train": lambda: first_blocks(ray.get(reference), limits)} if streaming else {}
    kind: Callable[..., TorchTrainer] = TorchTrainer
    if trainer.is_elastic:
        counts = job.train_order.worker_counts(trainer.min_workers, trainer.max_workers, trainer.accumulate)
        kind = functools.partial(ElasticTrainer, counts=counts)
    lost: ray.exceptions.RayActorError | None = None
    for _ in range(trainer.max_failures + 1):
        with watch.following(board):
            try:
                kind(
                    work,
                    train_loop_config={"job": reference, "board": board, "streaming": streaming,
                                       "on_cluster": bool(settings.cluster or os.environ.get("RAY_ADDRESS"))},
                    scaling_config=ScalingConfig(num_workers=trainer.num_workers, use_gpu=trainer.use_gpu,
                                                 elastic_resize_monitor_interval_s=trainer.resize_interval_s,
                                                 resources_per_worker={"CPU": trainer.cpus_per_worker,
                                                                       **({"GPU": 1} if trainer.use_gpu else {})}),
                    torch_config=TorchConfig(backend="nccl" if trainer.use_gpu else "gloo"),
                    run_config=RunConfig(name=f"{run_name}-{time.time_ns()}", storage_path=storage.inner("ray"),
                                         storage_filesystem=storage.arrow(),
                                         failure_config=FailureConfig(max_failures=trainer.max_failures)),
                    datasets=datasets or None,
                    dataset_config=InOrder(),
                ).fit()
            except ray.train.TrainingFailedError as error:
                raise explained(error) from error
            except ray.exceptions.RayActorError as error:
                lost = error
                release(error.actor_id)
        if watch.outcome is not None:
            return watch.outcome
    raise WorkerFailed(f"The process that leads the workers was lost, with trainer.max_failures = "
                       f"{trainer.max_failures}: go on by resume=true.") from lost


def fit_here(job: Job, watch: Watch) -> Mapping[str, Any]:
    """The same in this process: what a worker of Ray Train takes ten seconds to start for."""
    listener = watch.listener
    if job.settings.trainer.compile:
        torch.compiler.reset()  # of what this process compiled for other models
    try:
        return run_here(job, watch.hear, listener.between_steps if listener is not None else lambda: None)
    except Exception as error:
        raise cause_of(error) from error
    finally:
        gc.collect()  # the loop refers to itself, and holds the model


def first_blocks(job: Job, limits: Limits) -> ray.data.Dataset:
    """The stream from the step the newest checkpoint stands at."""
    start = remote.newest(job.settings.run.dir)
    step = step_of(Path(start).name) if start is not None else 0
    order = job.train_order
    epoch, in_epoch = divmod(step, order.steps_per_epoch)
    data = job.settings.data
    return block_dataset(job.train, order, job.columns, Cache(data.cache), pool_of(data), limits, epoch,
                         in_epoch // order.steps_per_round)


def explained(error: BaseException) -> Exception:
    """The worker's own error where there is one, as one sentence; the traceback stays chained."""
    failures = list((getattr(error, "worker_failures", None) or {}).values())
    controller = getattr(error, "controller_failure", None)
    if failures or controller is not None:
        return cause_of([*failures, controller][0])
    return TrainingFailed(str(error).strip().splitlines()[0])


def cause_of(failure: BaseException) -> Exception:
    """What a worker failed of, as an error of ours."""
    cause: BaseException | None = failure
    while cause is not None:
        if isinstance(cause, TrainingFailed | DataError | CheckpointError | MissingDependency | ValueError):
            known = type(cause) if type(cause).__module__.startswith("avray") else ValueError
            return known(str(cause).split("\n")[0])
        cause = getattr(cause, "cause", None) or cause.__cause__
    text = "".join(traceback.format_exception_only(failure)).strip()
    words = ("out of memory", "can't allocate memory", "memoryerror")
    if any(word in text.lower() for word in words) or "OutOfMemory" in type(failure).__name__:
        return OutOfMemory("A worker ran out of memory: lower trainer.batch_size or raise trainer.accumulate, "
                           "or take trainer.activation_checkpointing=true; see docs/troubleshooting.md.")
    return WorkerFailed(f"A worker failed: {text.splitlines()[-1]}")


def dry(settings: TrainSettings) -> TrainSettings:
    """One step of everything: batch, save, reload, sample."""
    return replace(settings, trainer=replace(settings.trainer, max_steps=1, max_epochs=None, stop_at_step=None,
                                             schedule=replace(settings.trainer.schedule, warmup_steps=0),
                                             validate_every_steps=1, validate_max_rows=settings.trainer.batch_size,
                                             sample_every_steps=1, num_samples=1))
