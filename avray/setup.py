"""Whether what a run needs works here, found by trying it: each check is a function that says what it found, or raises
the sentence that says what is wrong and what cures it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import av
import numpy as np
import psutil
import torch

from avray import cluster_file, jobs
from avray.config import CheckSettings, RunSettings, TrainSettings
from avray.devices import device_of
from avray.media import Audio, read_audio, write_audio
from avray.registry import family_from_settings
from avray.store import Store
from avray.train.trainer import needs, train

GIB = 1 << 30
LEAST_DISK = 2 * GIB
OBJECT_STORE = GIB
"""What a Ray of our own asks for in shared memory."""
CODECS = ("libx264", "aac", "flac", "libmp3lame", "libopus")
RAY = ("raylet", "gcs_server", "ray::", "dashboard")


@dataclass(frozen=True)
class Finding:
    name: str
    state: Literal["ok", "warning", "failed"]
    said: str


class Doubt(Exception):
    """Works, but not as one would want it."""


def check_all(settings: CheckSettings) -> list[Finding]:
    """In order; a check never keeps the next from being made."""
    return [_found(name, check, settings) for name, check in CHECKS.items()]


def _found(name: str, check: Callable[[CheckSettings], str], settings: CheckSettings) -> Finding:
    try:
        return Finding(name, "ok", check(settings))
    except Doubt as doubt:
        return Finding(name, "warning", str(doubt))
    except Exception as error:
        return Finding(name, "failed", " ".join(str(error).split()) or repr(error))


def as_text(findings: Sequence[Finding]) -> str:
    width = max(len(finding.name) for finding in findings)
    return "\n".join(f"{finding.state:<8}{finding.name:<{width}}  {finding.said}" for finding in findings)


def as_json(findings: Sequence[Finding]) -> str:
    return json.dumps({"ok": all(finding.state != "failed" for finding in findings),
                       "checks": [asdict(finding) for finding in findings]}, indent=1)


def versions(settings: CheckSettings) -> str:
    """Every package that avray asks for, within its bounds."""
    from packaging.requirements import Requirement

    wrong, seen = [], {}
    for line in importlib.metadata.requires("avray") or []:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = seen[requirement.name] = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is not installed")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} is {version} and must be {requirement.specifier}")
    if wrong:
        raise ValueError(f"{'; '.join(wrong)}: pip install -e . again.")
    return ", ".join(f"{name} {seen[name]}" for name in ("torch", "ray", "transformers", "numpy", "pyarrow"))


def device(settings: CheckSettings) -> str:
    """The device asked for, with a product on it."""
    name = device_of(settings.trainer.device_name)
    numbers = torch.ones(8, 8, device=name, dtype=torch.bfloat16 if settings.trainer.precision == "bf16" else None)
    if float((numbers @ numbers).sum()) != 512:
        raise ValueError(f"{name} multiplies wrongly: its driver does not fit this torch ({torch.__version__}).")
    if name != "cuda":
        return f"{name}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
    found = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return ", ".join(f"{one.name} ({one.total_memory / GIB:.0f} GiB)" for one in found)


def memory(settings: CheckSettings) -> str:
    """Of the machine, and of /dev/shm, where Ray keeps what travels between processes."""
    free = psutil.virtual_memory()
    said = f"{free.available / GIB:.1f} of {free.total / GIB:.1f} GiB are free"
    if Path("/dev/shm").is_dir():
        shared = shutil.disk_usage("/dev/shm").free
        said += f", {shared / GIB:.1f} GiB of shared memory"
        if shared < OBJECT_STORE:
            raise Doubt(f"{said}: Ray would use the disk instead; give the container --shm-size=2g.")
    return said


def storage(settings: CheckSettings) -> str:
    """A file written, read and removed where the cache and the run are to lie."""
    said = []
    for key, root in (("data.cache", settings.data.cache), ("run.dir", settings.run.dir)):
        store = Store(str(root))
        store.check_writable(key)
        free = shutil.disk_usage(root).free if store.is_local else None
        said.append(f"{key} {root}" + ("" if free is None else f" ({free / GIB:.0f} GiB free)"))
        if free is not None and free < LEAST_DISK:
            raise Doubt(f"{said[-1]}: that fills up soon; give another place.")
    return ", ".join(said)


def ffmpeg(settings: CheckSettings) -> str:
    """The encoders that the server and the videos need, and a sound there and back."""
    missing = []
    for name in CODECS:
        try:
            av.Codec(name, "w")
        except av.codec.codec.UnknownCodecError:
            missing.append(name)
    if missing:
        raise ValueError(f"PyAV {av.__version__} lacks {', '.join(missing)}: take its wheel (pip install av).")
    wave = 0.5 * np.sin(2 * np.pi * 440 * np.arange(16_000, dtype=np.float32) / 16_000)
    with tempfile.TemporaryDirectory(prefix="avray-") as folder:
        for suffix in ("wav", "mp3"):
            write_audio(f"{folder}/a.{suffix}", Audio(wave[None], 16_000))
            level = float(np.sqrt((read_audio(f"{folder}/a.{suffix}").samples ** 2).mean()))
            if not 0.3 < level < 0.4:
                raise ValueError(f"{suffix} comes back at another level ({level:.2f}): reinstall av and soundfile.")
    return f"PyAV {av.__version__}: {', '.join(CODECS)}"


def weights(settings: CheckSettings) -> str:
    """Of every frozen network that the family and its codec ask for."""
    columns = family_from_settings(settings.family).columns(None)
    return ", ".join(f"{column.name} {column.encoder.column_id()}" for column in columns) or "none are needed"


def authentication(settings: CheckSettings) -> str:
    """Whether a Ray that others can reach asks for a token."""
    mode, token = os.environ.get("RAY_AUTH_MODE"), Path.home() / ".ray" / "auth_token"
    has_token = bool(os.environ.get("RAY_AUTH_TOKEN")) or token.exists()
    if mode == "token" and not has_token:
        raise ValueError("RAY_AUTH_MODE=token and there is no token: ray get-auth-token --generate.")
    if settings.cluster is not None and not has_token:
        raise ValueError(f"cluster={settings.cluster} and there is no token, without which whoever reaches its ports "
                         "runs code: ray get-auth-token --generate, and RAY_AUTH_MODE=token on every node.")
    if mode == "token":
        return "a token is asked for"
    return f"there is a token for {settings.cluster}" if settings.cluster else "a Ray of our own, on this machine"


def ports(settings: CheckSettings) -> str:
    """Which of Ray's ports this machine shows to others."""
    open_ports = []
    listening = [one for one in psutil.net_connections("tcp") if one.status == psutil.CONN_LISTEN and one.pid]
    for connection in (one for one in listening if one.laddr.ip not in cluster_file.LOOPBACK):
        try:
            process = psutil.Process(connection.pid)
            name = next((word for word in RAY if word in process.name() or word in " ".join(process.cmdline()[:2])), "")
            # Ray's workers write their names over what shows of their environment; the raylet they come from does not.
            asks = any(one.environ().get("RAY_AUTH_MODE") == "token" for one in (process, *process.parents()[:1]))
        except psutil.Error:
            continue
        if name:
            open_ports.append((connection.laddr.port, name, asks))
    unguarded = sorted({f"{port} ({name})" for port, name, asks in open_ports if not asks})
    if unguarded:
        raise ValueError(f"Ray listens beyond this machine without asking for a token: {', '.join(unguarded[:6])}; "
                         "start it with RAY_AUTH_MODE=token, or with --node-ip-address=127.0.0.1.")
    return f"{len(open_ports)} of Ray's are open, all ask for a token" if open_ports else "none of Ray's is open"


def cluster(settings: CheckSettings) -> str:
    """The file, or the cluster itself; else what a Ray of our own will be given."""
    plan = needs(settings, len(family_from_settings(settings.family).columns(None)))
    where = settings.cluster
    if jobs.is_file(where):
        assert where is not None
        if found := cluster_file.problems(where):
            raise ValueError(" ".join(found))
        return f"{where} asks for a token, shows no dashboard, and has Ray {importlib.metadata.version('ray')}"
    if where is not None and jobs.is_remote(where):
        with jobs.connected(where) as client:
            return f"{where} answers with Ray {client.get_version()}"
    return (f"{plan.cpus:g} logical CPUs and {plan.gpus:g} GPUs are needed" + (
        f" of {where}" if where else "; a Ray of our own is given as many CPUs"))


def step(settings: CheckSettings) -> str:
    """Model, codec, loss and optimiser for one step, saved, opened again and sampled, as ``dry_run=true`` does."""
    with tempfile.TemporaryDirectory(prefix="avray-check-") as folder:
        data = settings.data
        if data.path is None:
            data = replace(data, demo_minutes=min(1.0, data.demo_minutes), demo_songs=min(0.5, data.demo_songs))
        here = settings.cluster if not jobs.is_remote(settings.cluster) else None
        plain = TrainSettings(seed=settings.seed, cluster=here, data=data, logging=settings.logging, dry_run=True,
                              run=RunSettings(f"{folder}/run"), family=settings.family, codec=settings.codec,
                              trainer=settings.trainer)
        summary = train(plain, family_from_settings(settings.family))
    needed, loss = summary["memory_bytes"]["total"] / GIB, summary["best_validation_loss"]
    return (f"{summary['family']}: {summary['parameters']:,} parameters, a loss of {loss:.4g}, {needed:.2f} GiB a "
            "worker")


CHECKS: dict[str, Callable[[CheckSettings], str]] = {
    "versions": versions, "device": device, "memory": memory, "storage": storage, "ffmpeg": ffmpeg, "weights": weights,
    "authentication": authentication, "ports": ports, "cluster": cluster, "training step": step}
