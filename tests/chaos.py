"""Training that embeds as it goes, a sweep and a server on three nodes at once, while processes are killed at random.

    python -m tests.chaos [--seeds 20] [--together 3] [--journal chaos.jsonl]

In the round of a seed, or of several in turn, at moments of the seed's, SIGKILL goes to workers (any process with work
on any node, Ray's own actors among them), to a whole node (another takes its place) and to the driver of each work
(started again, with ``resume=true`` where there is something to go on from; Ray's own files in the run are cut short
before). What came of it is held against an undisturbed round on the same nodes. The head is spared: a Ray
without an outside store ends with it. The journal has a line for each round, and a seed that is in it has no other.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import requests

from tests.commands import BIN, ROOT, SMALL, TOKEN, free_port, tones

NUM_WORKERS = 2
"""Killed for each seed."""
SPAN = 0.4
"""Of an undisturbed round's time, in which the faults come."""
EPOCH_S = 4.0
"""What an epoch takes while there are faults to come."""
LIMIT_S = 600.0
"""What a run may take after its last fault."""
IDLE = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent")


@dataclass
class Record:
    """A round: what was done, and what is wrong with what came of each work."""

    seeds: list[int]
    faults: list[dict[str, Any]] = field(default_factory=list)
    wrong: dict[str, str] = field(default_factory=dict)
    seen: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


class Nodes:
    """Three nodes of one Ray on this machine, each a process group of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.nodes: list[subprocess.Popen[bytes]] = []
        self.started = 0

    def __enter__(self) -> Nodes:
        self.start("--head", f"--port={self.port}", "--num-cpus=2", f"--temp-dir={self.folder}/ray",
                   "--include-dashboard=false", "--disable-usage-stats")
        self.wait()
        for _ in range(2):
            self.add()
            self.wait()
        return self

    def __exit__(self, *_: object) -> None:
        for node in reversed(self.nodes):
            end(node)

    def add(self) -> None:
        self.start(f"--address={self.address}", "--num-cpus=8")

    def mend(self) -> None:
        """Start again a node that ended by itself: on a busy machine a raylet may, in its first seconds."""
        for node in [node for node in self.nodes[1:] if node.poll() is not None]:
            self.nodes.remove(node)
            end(node)
            self.add()

    def wait(self) -> None:
        """Until the newest node runs. One after another: a raylet gives up where its agents take over 15 s to start."""
        deadline = time.monotonic() + 120
        while "Ray runtime started" not in (text := self.log().read_text()):
            assert time.monotonic() < deadline and self.nodes[-1].poll() is None, text
            time.sleep(0.2)

    def log(self) -> Path:
        return self.folder / f"node{self.started}.log"

    def start(self, *given: str) -> None:
        command = [str(BIN / "ray"), "start", "--block", "--node-ip-address=127.0.0.1",
                   f"--dashboard-agent-listen-port={free_port()}", f"--object-store-memory={128 << 20}", *given]
        self.started += 1
        with open(self.log(), "wb") as log:
            self.nodes.append(subprocess.Popen(command, cwd=self.folder, stdout=log, stderr=log, env=environment(),
                                               start_new_session=True))

    def kill_node(self, rng: random.Random) -> str:
        at = rng.randrange(1, len(self.nodes))
        node = self.nodes.pop(at)
        had = sorted({title(process) for process in working(node)})
        end(node)
        self.add()
        return " ".join(had)

    def kill_worker(self, rng: random.Random) -> str:
        found = [process for node in self.nodes for process in working(node)]
        if not found:
            return ""
        victim = rng.choice(found)
        name = title(victim)
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.kill()
        return name


def environment() -> dict[str, str]:
    """Without what this process's own Ray or Serve were told; a node that is gone is seen in seconds."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return {**kept, **TOKEN, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1",
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_initial_delay_ms": "1000", "RAY_health_check_failure_threshold": "5",
            "RAY_enable_worker_prestart": "0", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0", "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5", "RAY_worker_niceness": "0"}


def working(node: subprocess.Popen[bytes]) -> list[psutil.Process]:
    try:
        below = psutil.Process(node.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    return [one for one in below if title(one).startswith("ray::") and not title(one).startswith(IDLE)]


def title(process: psutil.Process) -> str:
    try:
        return (process.cmdline() or [""])[0].split(".")[0]
    except psutil.Error:
        return ""


def end(node: subprocess.Popen[bytes]) -> None:
    """All of a node at once, without a word."""
    with contextlib.suppress(psutil.NoSuchProcess):
        first = psutil.Process(node.pid)
        first.suspend()  # or it would end its raylet in order
        for process in [*first.children(recursive=True), first]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    node.wait()


class Slow:
    """A hook that takes its time at each epoch, until there is a file ``fast``."""

    def __init__(self, folder: str) -> None:
        self.fast = Path(folder) / "fast"

    def on_epoch_start(self, loop: Any) -> None:
        until = time.monotonic() + EPOCH_S
        while time.monotonic() < until and not self.fast.exists():
            time.sleep(0.1)


@dataclass(frozen=True)
class Pipeline:
    """A command with an end. ``marks``: the files by which one sees that ``resume=true`` has something to go on from;
    ``result``: what a run's folder holds, to be equal to that of an undisturbed run."""

    name: str
    script: str
    settings: tuple[str, ...]
    marks: str
    result: Callable[[Path], Any]

    def command(self, nodes: Nodes, wavs: Path, folder: Path, round_: Path) -> list[str]:
        again = ["resume=true"] if self.marks and any((folder / "run").glob(self.marks)) else []
        hook = f"[{{_target_: tests.chaos.Slow, folder: {round_}}}]"
        return [sys.executable, str(ROOT / self.script), f"cluster={nodes.address}", f"data.path={wavs}",
                f"data.cache={folder}/cache", f"run.dir={folder}/run", "logging.progress=off",
                f"trainer.hooks={hook}", *SMALL, *self.settings, *again]


def shards(folder: Path) -> dict[str, str]:
    """Every file of embeddings, by the hash that its commit holds."""
    found = {}
    for commit in sorted((folder / "cache" / "shards").rglob("*.json")):
        held = hashlib.sha256(commit.with_suffix(".parquet").read_bytes()).hexdigest()
        assert json.loads(commit.read_text())["sha256"] == held, commit
        found[str(commit.relative_to(folder / "cache"))] = held
    return found


def trained(folder: Path) -> dict[str, Any]:
    """What was logged of each step (one line, and the same digits), and every file of embeddings."""
    logged: dict[str, list[str]] = {}
    with open(folder / "run" / "metrics.csv") as file:
        for row in csv.DictReader(file):
            if row["train/loss"]:
                logged.setdefault(row["step"], []).append(row["train/loss"])
    summary = json.loads((folder / "run" / "summary.json").read_text())
    return {**logged, **shards(folder), **{key: summary[key] for key in ("rows", "steps", "best_validation_loss")}}


def trials(folder: Path) -> list[dict[str, str]]:
    with open(folder / "run" / "results.csv") as file:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]


TRAINING = ("trainer.batch_size=4", "trainer.num_samples=1", "trainer.log_every_steps=1", "trainer.max_failures=20",
            "trainer.cpus_per_worker=1.5", "trainer.threads_per_worker=1", "trainer.schedule.warmup_steps=0")
PIPELINES = (
    Pipeline("train", "pipelines/train.py",
             (*TRAINING, "trainer.num_workers=2", "trainer.max_steps=160", "trainer.checkpoint_every_steps=10",
              "trainer.validate_every_steps=40", "data.embed_workers=2", "data.embed_num_cpus=0.5"),
             "checkpoints/*/manifest.json", trained),
    Pipeline("sweep", "tune/sweep.py",
             (*TRAINING, "trainer.max_steps=30", "trainer.validate_every_steps=10", "tune=random",
              "tune.num_samples=2", "tune.max_concurrent=2", "tune.max_failures=20", "data.embed_num_cpus=0.5",
              "tune.min_steps=10"), "journal.jsonl", trials),
)
NUM_RECORDINGS = {"train": 24, "sweep": 12}


class Site:
    """Three nodes, recordings, a server, and what an undisturbed round came to."""

    def __init__(self, nodes: Nodes, folder: Path) -> None:
        self.nodes, self.folder = nodes, folder
        for name, number in NUM_RECORDINGS.items():
            tones(folder / f"{name}-wavs", number, 1.0)
        self.served = Served(nodes, folder / "serve")
        first = self.round()
        assert not first.wrong, first
        self.span_s = SPAN * first.seconds

    def round(self, *seeds: int) -> Record:
        """The faults of these seeds, one seed's after the other's; of none, an undisturbed round."""
        record, began = Record([*seeds]), time.monotonic()
        folder = self.folder / f"round{len(list(self.folder.glob('round*')))}"
        folder.mkdir()
        if not seeds:
            (folder / "fast").touch()
        with contextlib.ExitStack() as stack:
            drivers = {one.name: stack.enter_context(Driver(one, self, folder)) for one in PIPELINES}
            load = Load(self.served, folder.name)
            for seed in seeds:
                self.disturb(record, drivers, random.Random(seed))
                drivers["train"].until_under_way()
            (folder / "fast").touch()
            self.until_ended([*drivers.values()])
            for name, driver in drivers.items():
                if (code := driver.process.poll()) != 0:
                    record.wrong[name] = f"exit {code}: {driver.said()[-1500:]}"
            if not self.served.came_back():
                record.wrong["serve"] = "the server did not come back"
            load.end()
        record.seconds = round(time.monotonic() - began, 1)
        record.seen = {"streams": load.streams, "jobs": len(load.jobs)}
        if not (load.jobs and load.streams["whole"]):
            record.wrong["serve"] = f"it made nothing: {record.seen}"
        if load.wrong:
            record.wrong.setdefault("serve", "; ".join(load.wrong)[:1500])
        for one in PIPELINES:
            if one.name not in record.wrong:
                got = one.result(folder / one.name)
                expected = one.result(self.folder / "round0" / one.name)
                if got != expected:
                    record.wrong[one.name] = f"another result: {difference(got, expected)}"
        return record

    def until_ended(self, drivers: Iterable[Driver]) -> None:
        deadline = time.monotonic() + LIMIT_S
        while any(driver.process.poll() is None for driver in drivers) and time.monotonic() < deadline:
            self.nodes.mend()
            time.sleep(0.2)

    def disturb(self, record: Record, drivers: Mapping[str, Driver], rng: random.Random) -> None:
        faults = ["worker"] * NUM_WORKERS + ["node", *drivers]
        rng.shuffle(faults)
        moments = sorted(rng.uniform(0, self.span_s) for _ in faults)
        began = time.monotonic()
        for fault, moment in zip(faults, moments, strict=True):
            time.sleep(max(0.0, began + moment - time.monotonic()))
            if fault == "worker":
                victim = self.nodes.kill_worker(rng)
            elif fault == "node":
                victim = self.nodes.kill_node(rng)
            else:
                victim = drivers[fault].kill_and_start()
            record.faults.append({"fault": fault, "at_s": round(time.monotonic() - began, 1), "victim": victim})


def cut_short(folder: Path) -> None:
    """What Ray left there to go on from: a driver that is started again is not to need it."""
    for path in folder.rglob("*"):
        if path.is_file():
            os.truncate(path, path.stat().st_size // 2)


def difference(got: Any, expected: Any) -> str:
    pairs = got.items() if isinstance(got, dict) else enumerate(got)
    wanted = expected if isinstance(expected, dict) else dict(enumerate(expected))
    other = [f"{key}: {value} for {wanted.get(key)}" for key, value in pairs if wanted.get(key) != value]
    return f"{len(got)} for {len(expected)}; " + "; ".join(other[:3])


class Driver:
    """A pipeline's command, whose process may be killed and started again; all it says is in one file."""

    def __init__(self, pipeline: Pipeline, site: Site, folder: Path) -> None:
        self.pipeline, self.site, self.round = pipeline, site, folder
        self.folder = folder / pipeline.name
        self.folder.mkdir()
        self.start()

    def start(self) -> None:
        wavs = self.site.folder / f"{self.pipeline.name}-wavs"
        command = self.pipeline.command(self.site.nodes, wavs, self.folder, self.round)
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen(command, cwd=self.folder, stdout=log, stderr=log, env=environment(),
                                            start_new_session=True)

    def kill_and_start(self) -> str:
        """Empty where it had ended before."""
        if self.process.poll() is not None:
            return ""
        self.process.kill()
        self.process.wait()
        cut_short(self.folder / "run" / "ray")
        self.start()
        return self.pipeline.script

    def until_under_way(self) -> None:
        """Until it writes again, so that not all the next seed's faults meet a start."""
        since, deadline = time.time(), time.monotonic() + LIMIT_S
        while self.process.poll() is None and time.monotonic() < deadline:
            self.site.nodes.mend()
            with contextlib.suppress(FileNotFoundError):
                if (self.folder / "run" / "metrics.csv").stat().st_mtime > since:
                    break
            time.sleep(0.2)

    def said(self) -> str:
        """Without what Ray's nodes say in between."""
        lines = (self.folder / "log").read_text(errors="replace").splitlines()
        return "\n".join(line for line in lines if "(raylet)" not in line and not line.startswith("\t"))

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


SECONDS = 2.0
"""Of a generation."""
SEEDS = 4
PAUSE_S = 2.0
"""Of a client: two works more have to share the machine."""


class Served:
    """A server over the nodes with two replicas of a model, and what undisturbed requests of it come to."""

    def __init__(self, nodes: Nodes, folder: Path) -> None:
        from tests.serving import save_codec_lm

        save_codec_lm(folder / "speech")
        port = free_port()
        self.address = f"http://127.0.0.1:{port}"
        command = [sys.executable, str(ROOT / "serve" / "app.py"), f"checkpoints=[{folder}/speech]",
                   f"cluster={nodes.address}", f"serve.port={port}", f"serve.jobs.folder={folder}/jobs",
                   "serve.jobs.lease_s=3", "serve.replica.min_replicas=2", "serve.replica.max_replicas=2",
                   "serve.replica.num_cpus=1", "serve.replica.slots=2", "serve.limits.queue=8"]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=LIMIT_S, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert self.came_back()
        self.expected = [self.post(seed).content for seed in range(SEEDS)]

    def post(self, seed: int, stream: bool = False, **headers: str) -> requests.Response:
        body = {"model": "speech", "seconds": SECONDS, "seed": seed, "response_format": "pcm", "stream": stream}
        return requests.post(f"{self.address}/v1/audio/generate", json=body, headers=headers, timeout=60, stream=stream)

    def came_back(self) -> bool:
        """Whether it makes sound, soon or after a while."""
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            with contextlib.suppress(requests.RequestException):
                if self.post(0).status_code == 200:
                    return True
            time.sleep(0.5)
        return False


class Load:
    """Clients: one that streams without end, one that hands in jobs and asks again, with the same key, where it was
    not answered."""

    def __init__(self, served: Served, run: str) -> None:
        self.served, self.run = served, run
        self.stop = threading.Event()
        self.streams = {"whole": 0, "broken off": 0, "refused": 0, "no answer": 0}
        self.wrong: list[str] = []
        self.jobs: dict[str, int] = {}
        self.threads = [threading.Thread(target=work, daemon=True) for work in (self._stream, self._hand_in)]
        for thread in self.threads:
            thread.start()

    def end(self) -> None:
        """No more of them; what was accepted comes to its end."""
        self.stop.set()
        for thread in self.threads:
            thread.join(120)
        self._settle()

    def _stream(self) -> None:
        number = 0
        while not self.stop.is_set():
            number += 1
            outcome, received = "no answer", b""
            with contextlib.suppress(requests.RequestException):
                response = self.served.post(number % SEEDS, stream=True)
                outcome = "refused" if response.status_code in (429, 500, 502, 503, 504) else "broken off"
                if response.status_code == 200:
                    received = b"".join(response.iter_content(4096))
                    outcome = "whole"
                elif outcome == "broken off":
                    self.wrong.append(f"a stream was answered {response.status_code}: {response.text[:200]}")
            self.streams[outcome] += 1
            if outcome == "whole" and received != self.served.expected[number % SEEDS]:
                self.wrong.append(f"a stream ended cleanly after {len(received)} other bytes")
            time.sleep(PAUSE_S)

    def _hand_in(self) -> None:
        number = 0
        while not self.stop.is_set():
            headers = {"prefer": "respond-async", "idempotency-key": f"{self.run}-{number}"}
            with contextlib.suppress(requests.RequestException):
                accepted = self.served.post(number % SEEDS, **headers)
                if accepted.status_code == 202:
                    self.jobs[accepted.headers["location"]] = number % SEEDS
                    number += 1
            time.sleep(PAUSE_S)

    def _settle(self) -> None:
        deadline = time.monotonic() + LIMIT_S
        for location, seed in self.jobs.items():
            status: dict[str, Any] = {}
            while status.get("status") not in ("succeeded", "failed", "cancelled") and time.monotonic() < deadline:
                with contextlib.suppress(requests.RequestException, ValueError):
                    status = requests.get(self.served.address + location, timeout=30).json()
                time.sleep(0.1)
            if status.get("status") != "succeeded":
                self.wrong.append(f"an accepted job ended as {status}")
            elif requests.get(self.served.address + status["content"], timeout=60).content \
                    != self.served.expected[seed]:
                self.wrong.append(f"job {location} came to another sound")


@contextlib.contextmanager
def opened() -> Iterator[Site]:
    """Ray's sockets have to lie under a short path."""
    with tempfile.TemporaryDirectory(prefix="avray-chaos-", dir="/tmp", ignore_cleanup_errors=True) as folder, \
            Nodes(Path(folder)) as nodes:
        yield Site(nodes, Path(folder))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--together", type=int, default=3, help="seeds a round")
    parser.add_argument("--journal", type=Path, default=Path("chaos.jsonl"))
    given = parser.parse_args()
    lines = given.journal.read_text().splitlines() if given.journal.exists() else []
    records = [Record(**json.loads(line)) for line in lines]
    wanted = sorted({*range(given.seeds)} - {seed for record in records for seed in record.seeds})
    if wanted:
        with opened() as site:
            for at in range(0, len(wanted), given.together):
                records.append(site.round(*wanted[at : at + given.together]))
                with open(given.journal, "a") as file:
                    print(json.dumps(asdict(records[-1])), file=file)
                print(json.dumps(asdict(records[-1]), indent=1), flush=True)
    print(table(records))


def table(records: Sequence[Record]) -> str:
    """A line for each work; a fault counts where it met something."""
    met = [one["fault"] for record in records for one in record.faults if one["victim"]]
    seeds = sum(len(record.seeds) for record in records)
    lines = [f"{seeds} seeds in {len(records)} rounds; at work when killed: {met.count('worker')} workers, "
             f"{met.count('node')} nodes", "", "| work | its driver killed | as if undisturbed |", "|---|---|---|"]
    for work in (*(one.name for one in PIPELINES), "serve"):
        right = sum(work not in record.wrong for record in records)
        lines.append(f"| {work} | {met.count(work)} | {right} of {len(records)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
