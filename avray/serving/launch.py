"""From settings to Serve applications: the gateway at ``/``, and each checkpoint in an application of its own."""

from __future__ import annotations

import math
import os
import re
import signal
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from avray.serving.environment import set_environment

set_environment()

import ray  # noqa: E402
import ray.serve  # noqa: E402
from ray.serve.config import AutoscalingConfig, HTTPOptions, ProxyLocation  # noqa: E402
from ray.serve.schema import LoggingConfig  # noqa: E402

from avray.checkpoint.remote import find  # noqa: E402
from avray.checkpoint.store import LINKS, checkpoints, resolve  # noqa: E402
from avray.config import AppSettings  # noqa: E402
from avray.data.cluster import quiet  # noqa: E402
from avray.errors import CheckpointError  # noqa: E402
from avray.serving.auth import ENVIRONMENT as KEYS  # noqa: E402
from avray.serving.auth import Keys  # noqa: E402
from avray.serving.directory import PREFIX  # noqa: E402
from avray.serving.gateway import Gateway, GatewaySettings  # noqa: E402
from avray.serving.model import Model, ModelSettings  # noqa: E402
from avray.settings.serve import ServeSettings, is_loopback  # noqa: E402
from avray.store import is_url  # noqa: E402

GATEWAY = "gateway"
_NAME = re.compile(r"[A-Za-z0-9][\w.\-]{0,99}", re.ASCII)
LOGGING = LoggingConfig(encoding="JSON", enable_access_log=False)


@dataclass(frozen=True)
class Named:
    """A model's name and the folder of its checkpoint."""

    name: str
    path: str


def named(specs: Sequence[str]) -> list[Named]:
    """``runs/a/best`` is called ``a``, ``b:runs/a`` is called ``b``. ValueError for a bad name or one given twice,
    CheckpointError for what is no checkpoint."""
    found = []
    for spec in specs:
        name, colon, path = spec.partition(":")
        if not colon or not _NAME.fullmatch(name) or path.startswith("//"):
            name, path = "", spec
        if is_url(path):
            folder, called = checkpoint_url(path)
        else:
            resolved = resolve(os.path.abspath(os.path.expanduser(path)))
            run = Path(os.path.abspath(path))
            folder, called = str(resolved), (run.parent if run.name in LINKS else resolved.parent.parent).name
        name = name or re.sub(r"[^\w.\-]", "-", called)
        if not _NAME.fullmatch(name):
            raise ValueError(f"{spec}: a model's name has letters, digits, dots and dashes; write name:path.")
        found.append(Named(name, folder))
    names = [model.name for model in found]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"Two models would be called {name}: write name:path to tell them apart.")
    return found


def checkpoint_url(path: str) -> tuple[str, str]:
    """The URL of the checkpoint that one stands for, so that every replica has the same, and its run's name."""
    found = find(path)
    return found.url, Path(found.store.root).name


def newest_run(folder: Path = Path("runs")) -> Path:
    """The run under ``folder`` whose newest checkpoint is the youngest. CheckpointError where there is none."""
    runs = {checkpoint[-1].stat().st_mtime: run for run in (folder.iterdir() if folder.is_dir() else ())
            if (checkpoint := checkpoints(run))}
    if not runs:
        raise CheckpointError(f"There is no run in {folder.absolute()}: train one (python pipelines/train.py), or give "
                              "checkpoints=[…].")
    return runs[max(runs)]


def models_of(settings: AppSettings) -> list[Named]:
    specs = list(settings.checkpoints) or ([settings.checkpoint] if settings.checkpoint else [])
    if not specs:
        run = newest_run()
        print(f"No checkpoint was given: serving the newest run, {run}.", flush=True)
        specs = [str(run)]
    return named(specs)


def model_app(model: Named, serve: ServeSettings) -> Any:
    """The Serve application of one model."""
    replica = serve.replica
    room = replica.slots + math.ceil(serve.limits.queue / replica.max_replicas) + serve.jobs.at_once
    deployment = ray.serve.deployment(Model).options(
        name="Model", max_ongoing_requests=room, max_queued_requests=-1,
        ray_actor_options={"num_cpus": replica.num_cpus, "num_gpus": replica.num_gpus},
        autoscaling_config=AutoscalingConfig(
            min_replicas=replica.min_replicas, initial_replicas=max(1, replica.min_replicas),
            max_replicas=replica.max_replicas, target_ongoing_requests=replica.slots,
            upscale_delay_s=2.0, downscale_delay_s=replica.idle_s),
        graceful_shutdown_timeout_s=replica.shutdown_s, graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=5.0, max_surge_percent=100, logging_config=LOGGING, max_constructor_retry_count=2)
    return deployment.bind(ModelSettings(model.name, model.path, replica, serve.limits))


def gateway_app(serve: ServeSettings, models: Mapping[str, Any] | None = None) -> Any:
    """The Serve application at ``/``. ``models`` are applications to hold inside it (``serve run``); else it finds
    those that Serve has. ValueError for a server that would be open to others without a key."""
    keys = Keys.from_environment()
    check_open(serve.host, keys)
    deployment = ray.serve.deployment(ray.serve.ingress()(Gateway)).options(
        name="Gateway", num_replicas=1, max_ongoing_requests=10_000, max_queued_requests=-1,
        ray_actor_options={"num_cpus": 0}, graceful_shutdown_timeout_s=serve.limits.request_timeout_s,
        logging_config=LOGGING)
    return deployment.bind(GatewaySettings(serve, keys), dict(models) if models is not None else None)


def check_open(host: str, keys: Keys) -> None:
    if not is_loopback(host) and not keys.digests:
        raise ValueError(f"serve.host={host} would let anybody in: set {KEYS} (keys, commas between), or listen on "
                         "127.0.0.1.")


def start(settings: AppSettings, num_models: int) -> None:
    """Ray and Serve's proxy, unless they run already."""
    serve, verbose = settings.serve, settings.logging.level == "debug"
    quiet(verbose)
    if not ray.is_initialized():
        if settings.cluster is not None or os.environ.get("RAY_ADDRESS"):
            ray.init(address=settings.cluster or "auto", log_to_driver=verbose)
        else:
            os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 lets any other program go first
            cpus = max(os.cpu_count() or 1, math.ceil(num_models * serve.replica.max_replicas
                                                      * serve.replica.num_cpus * 2) + 1)
            ray.init(num_cpus=cpus, include_dashboard=False, log_to_driver=verbose, logging_level="ERROR",
                     object_store_memory=1 << 30, _metrics_export_port=serve.metrics_port)
    quiet(verbose)
    ray.serve.start(proxy_location=ProxyLocation.HeadOnly,
                    http_options=HTTPOptions(host=serve.host, port=serve.port), logging_config=LOGGING)


def run(settings: AppSettings, wait: bool = True) -> str:
    """Serve until interrupted, or with ``cluster=`` hand the models to the server that runs there and leave."""
    check_open(settings.serve.host, Keys.from_environment())
    models = [] if settings.unload else models_of(settings)
    start(settings, len(models))
    if settings.unload:
        for name in settings.unload:
            ray.serve.delete(PREFIX + name)
        return f"Unloaded {', '.join(settings.unload)}."
    for model in models:
        ray.serve.run(model_app(model, settings.serve), name=PREFIX + model.name, route_prefix=None)
    if GATEWAY not in ray.serve.status().applications:
        ray.serve.run(gateway_app(settings.serve), name=GATEWAY, route_prefix="/")
    names = ", ".join(model.name for model in models)
    line = (f"Serving {names} at http://{settings.serve.host}:{settings.serve.port}/ (the playground; /docs), "
            f"cluster={ray.get_runtime_context().gcs_address}")
    if settings.cluster is not None or not wait:
        return line
    print(line, flush=True)
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    while not ended.wait(1.0):
        pass
    ray.serve.shutdown()
    return "Stopped."
