"""``serve.*``: the HTTP server, its limits, its jobs, and the replicas of a model."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import ip_address
from typing import Literal

from avray.settings.convert import check_above_zero, check_at_least, make_absolute


@dataclass(frozen=True)
class LimitSettings:
    """``serve.limits``: checked before any work is done."""

    body_bytes: int = 32 << 20
    """Of one request's body; more is a 413."""
    body_timeout_s: float = 60.0
    """Seconds in which a body has to arrive; later is a 408."""
    form_fields: int = 64
    """Parts of a multipart body."""
    prompt_characters: int = 4096
    """Of ``input``."""
    audio_seconds_in: float = 600.0
    """Of a recording sent along."""
    audio_seconds_out: float = 120.0
    """Of what one request may ask for."""
    decoded_bytes: int = 512 << 20
    """Of a recording sent along: rate x channels x seconds x 4, by its header, before memory is taken."""
    steps: int = 250
    """Solver steps of a flow."""
    request_timeout_s: float = 300.0
    """Seconds from arrival to the last byte, waiting included."""
    queue: int = 32
    """Requests of one model that may wait beside those in its slots; more get a 429."""
    per_minute: int | None = None
    """Requests a key may make in a minute; null: any number."""
    retry_after_s: int = 2
    """What a 429 tells the client to wait at least."""

    def __post_init__(self) -> None:
        check_above_zero("serve.limits", self, "body_bytes", "body_timeout_s", "form_fields", "prompt_characters",
                         "audio_seconds_in", "audio_seconds_out", "decoded_bytes", "steps", "request_timeout_s",
                         "per_minute")
        check_at_least("serve.limits", self, 0, "queue")
        if not 1 <= self.retry_after_s <= 120:
            raise ValueError(f"serve.limits.retry_after_s must be from 1 to 120, got {self.retry_after_s}.")


@dataclass(frozen=True)
class JobSettings:
    """``serve.jobs``: requests answered with 202, and made whether or not the client waits."""

    folder: str = "runs/serve"
    """Where each job has a folder of its own; shared by all that share the database."""
    database: str | None = None
    """SQLAlchemy's URL of the store; null: SQLite in ``folder``."""
    keep_s: float = 24 * 3600.0
    """Seconds after its end that a job and its file are kept."""
    queue: int = 1000
    """Jobs that may wait; more get a 429."""
    at_once: int = 2
    """Jobs of one model under way at a time."""
    attempts: int = 3
    """How often a job is begun, when its replica or the server dies under it."""
    lease_s: float = 15.0
    """Seconds without a sign of life after which a job counts as left behind."""

    def __post_init__(self) -> None:
        make_absolute(self, "folder")
        check_above_zero("serve.jobs", self, "keep_s", "lease_s")
        check_at_least("serve.jobs", self, 1, "queue", "at_once", "attempts")


@dataclass(frozen=True)
class ReplicaSettings:
    """``serve.replica``: the processes that hold a model."""

    slots: int = 4
    """Requests generated side by side in one replica. Fixed, so that a request's bytes do not depend on its company."""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """``auto``: cuda where ``num_gpus`` is above 0, else cpu."""
    num_cpus: float = 1.0
    """Logical CPUs of one replica."""
    threads: int | None = None
    """torch's threads of one replica; null: ``num_cpus``, rounded down, at least 1."""
    num_gpus: float = 0.0
    """GPUs of one replica; a fraction shares one."""
    min_replicas: int = 1
    """0 lets an unused model go; the next request waits for it to load."""
    max_replicas: int = 1
    """Reached when all slots are taken."""
    idle_s: float = 300.0
    """Seconds without need before a replica is given back."""
    shutdown_s: float = 330.0
    """Seconds that a replica that is replaced has to finish what it began."""
    unhealthy_after: int = 3
    """Failures of the engine one after another, after which a replica is started anew."""

    def __post_init__(self) -> None:
        check_at_least("serve.replica", self, 1, "slots", "max_replicas", "threads", "unhealthy_after")
        check_at_least("serve.replica", self, 0, "num_cpus", "num_gpus", "min_replicas", "idle_s", "shutdown_s")
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"serve.replica.min_replicas ({self.min_replicas}) is above serve.replica.max_replicas "
                             f"({self.max_replicas}).")
        if self.device == "cuda" and self.num_gpus == 0:
            raise ValueError("serve.replica.device=cuda needs serve.replica.num_gpus above 0.")

    @property
    def device_name(self) -> str:
        return ("cuda" if self.num_gpus else "cpu") if self.device == "auto" else self.device

    @property
    def num_threads(self) -> int:
        return self.threads or max(1, int(self.num_cpus))


@dataclass(frozen=True)
class ServeSettings:
    """``serve``"""

    host: str = "127.0.0.1"
    """What to listen on; anything but loopback needs AVRAY_API_KEYS."""
    port: int = 8000
    """Of HTTP."""
    proxy: str = "python"
    """Serve's proxy in front of the gateway: python, or haproxy, which takes a third of the time a request, and opens
    two more ports: the gateway's own on ``host``, and HAProxy's counters for Prometheus on every interface."""
    metrics_port: int | None = None
    """Of Prometheus' metrics, by Ray, where avray starts Ray itself; null: Ray's choice."""
    limits: LimitSettings = LimitSettings()
    jobs: JobSettings = JobSettings()
    replica: ReplicaSettings = ReplicaSettings()
    note: bool = True
    """Files say that they were generated."""
    log_prompts: bool = False
    """Prompts stand in the log."""

    def __post_init__(self) -> None:
        if not 1 <= self.port < 65536:
            raise ValueError(f"serve.port must be from 1 to 65535, got {self.port}.")
        if self.proxy not in ("python", "haproxy"):
            raise ValueError(f"serve.proxy must be python or haproxy, got {self.proxy}.")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches ``host``."""
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
