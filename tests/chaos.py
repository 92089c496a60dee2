"""Embedding, training, sweeps and serving over three nodes while their processes are killed at random moments.

    python -m tests.chaos [--seeds 20] [--work prepare train sweep serve] [--journal chaos.jsonl]

A run of a seed has three faults, in an order and at moments of the seed's: SIGKILL for a worker process (any process
with work on any node, Ray's own actors among them), for a whole node (another takes its place) and for the driver
(started again, with ``resume=true`` where there is something to go on from). What came of it is held against an
undisturbed run on the same nodes. The head is spared: a Ray without an outside store ends with it. The journal has a
line for each run, and a run that is in it is not made again.
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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import requests

from tests.commands import BIN, ROOT, SMALL, TOKEN, free_port, tones

FAULTS = ("worker", "node", "driver")
SPAN = 0.6
"""The most between two faults, as a share of an undisturbed run."""
SERVE_S = 10.0
"""The same of a server, in seconds."""
LIMIT_S = 400.0
"""What a run may take after its last fault."""
IDLE = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent")


@dataclass
class Record:
    """A run: what was done to it, and what is wrong with what came of it."""

    work: str
    seed: int
    faults: list[dict[str, Any]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
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
        self.start(f"--address={self.address}", "--num-cpus=3")

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
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}


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
        if not self.fast.exists():
            time.sleep(0.5)


@dataclass(frozen=True)
class Pipeline:
    """A command with an end. ``marks``: the files by which one sees that ``resume=true`` has something to go on from;
    ``result``: what a run's folder holds, to be equal to that of an undisturbed run."""

    name: str
    script: str
    settings: tuple[str, ...]
    marks: str
    result: Callable[[Path], Any]

    def command(self, nodes: Nodes, wavs: Path, folder: Path) -> list[str]:
        again = ["resume=true"] if self.marks and any((folder / "run").glob(self.marks)) else []
        hook = f"[{{_target_: tests.chaos.Slow, folder: {folder}}}]"
        slow = [] if self.name == "prepare" else [f"trainer.hooks={hook}"]
        return [sys.executable, str(ROOT / self.script), f"cluster={nodes.address}", f"data.path={wavs}",
                f"data.cache={folder}/cache", f"run.dir={folder}/run", "logging.progress=off", *SMALL, *self.settings,
                *slow, *again]


def shards(folder: Path) -> dict[str, str]:
    """Every file of embeddings, by the hash that its commit holds."""
    found = {}
    for commit in sorted((folder / "cache" / "shards").rglob("*.json")):
        held = hashlib.sha256(commit.with_suffix(".parquet").read_bytes()).hexdigest()
        assert json.loads(commit.read_text())["sha256"] == held, commit
        found[str(commit.relative_to(folder / "cache"))] = held
    return found


def losses(folder: Path) -> dict[str, list[str]]:
    """What was logged of each step: one line, and the same digits."""
    found: dict[str, list[str]] = {}
    with open(folder / "run" / "metrics.csv") as file:
        for row in csv.DictReader(file):
            if row["train/loss"]:
                found.setdefault(row["step"], []).append(row["train/loss"])
    summary = json.loads((folder / "run" / "summary.json").read_text())
    return found | {"rows": [str(summary["rows"])], "steps": [str(summary["steps"])],
                    "best": [f"{summary['best_validation_loss']:.6g}"]}


def trials(folder: Path) -> list[dict[str, str]]:
    with open(folder / "run" / "results.csv") as file:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]


TRAINING = ("trainer.batch_size=4", "trainer.num_samples=1", "trainer.log_every_steps=1", "trainer.max_failures=20",
            "trainer.cpus_per_worker=1.5", "trainer.threads_per_worker=1", "trainer.schedule.warmup_steps=0")
PIPELINES = (
    Pipeline("prepare", "pipelines/prepare.py", ("data.embed_workers=3", "data.embed_num_cpus=1.5"), "", shards),
    Pipeline("train", "pipelines/train.py",
             (*TRAINING, "trainer.num_workers=2", "trainer.max_steps=120", "trainer.checkpoint_every_steps=10",
              "trainer.validate_every_steps=40", "data.embed_num_cpus=0.5"), "checkpoints/*/manifest.json", losses),
    Pipeline("sweep", "tune/sweep.py",
             (*TRAINING, "trainer.max_steps=30", "trainer.validate_every_steps=10", "tune=random",
              "tune.num_samples=3", "tune.max_concurrent=2", "tune.max_failures=20", "data.embed_num_cpus=0.5",
              "tune.min_steps=10"), "journal.jsonl", trials),
)
NUM_RECORDINGS = {"prepare": 600, "train": 12, "sweep": 12}


class Site:
    """Three nodes, recordings, and what undisturbed runs came to."""

    def __init__(self, nodes: Nodes, folder: Path) -> None:
        self.nodes, self.folder = nodes, folder
        self.undisturbed: dict[str, Any] = {}
        self.spans_s: dict[str, float] = {}

    def run(self, work: str, seed: int) -> Record:
        if work == "serve":
            return serve(self, seed)
        pipeline, = (one for one in PIPELINES if one.name == work)
        wavs = self.folder / f"{work}-wavs"
        if not wavs.exists():
            tones(wavs, NUM_RECORDINGS[work], 1.0)
        if work not in self.undisturbed:
            folder = self.folder / work
            folder.mkdir()
            (folder / "fast").touch()
            began = time.monotonic()
            with Driver(pipeline.command(self.nodes, wavs, folder), folder / "log") as driver:
                assert driver.ended(LIMIT_S) == 0, driver.said()
            self.spans_s[work] = SPAN * (time.monotonic() - began)
            self.undisturbed[work] = pipeline.result(folder)
        return self.disturbed(pipeline, wavs, seed)

    def disturbed(self, pipeline: Pipeline, wavs: Path, seed: int) -> Record:
        record, rng, began = Record(pipeline.name, seed), random.Random(f"{pipeline.name} {seed}"), time.monotonic()
        folder = self.folder / f"{pipeline.name}-{seed}"
        folder.mkdir()
        with Driver(pipeline.command(self.nodes, wavs, folder), folder / "log") as driver:
            for fault in rng.sample(FAULTS, len(FAULTS)):
                moment = time.monotonic() + rng.uniform(0, self.spans_s[pipeline.name])
                while time.monotonic() < moment and driver.process.poll() is None:
                    time.sleep(0.02)
                if driver.process.poll() is not None:
                    break
                victim = ""
                if fault == "worker":
                    victim = self.nodes.kill_worker(rng)
                elif fault == "node":
                    victim = self.nodes.kill_node(rng)
                else:
                    driver.kill()
                    driver.start(pipeline.command(self.nodes, wavs, folder))
                record.faults.append({"fault": fault, "after_s": round(time.monotonic() - began, 1), "victim": victim})
            (folder / "fast").touch()
            code = driver.ended(LIMIT_S)
            if code != 0:
                record.wrong.append(f"exit {code}: {driver.said()[-1500:]}")
        if not record.wrong:
            got, expected = pipeline.result(folder), self.undisturbed[pipeline.name]
            if got != expected:
                record.wrong.append(f"another result: {difference(got, expected)}")
        record.seconds = round(time.monotonic() - began, 1)
        return record


def difference(got: Any, expected: Any) -> str:
    pairs = got.items() if isinstance(got, dict) else enumerate(got)
    wanted = expected if isinstance(expected, dict) else dict(enumerate(expected))
    other = [f"{key}: {value} for {wanted.get(key)}" for key, value in pairs if wanted.get(key) != value]
    return f"{len(got)} for {len(expected)}; " + "; ".join(other[:3])


class Driver:
    """A command whose process may be killed and started again; all it says is in one file."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self.log = log
        self.start(command)

    def start(self, command: Sequence[str]) -> None:
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(command, cwd=self.log.parent, stdout=log, stderr=log, env=environment(),
                                            start_new_session=True)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def ended(self, seconds: float) -> int | None:
        """Its exit status; None where it has not ended by then."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


SECONDS = 3.0
"""Of a generation."""
SEEDS = 4


class Served:
    """A server over the nodes with two replicas of a model, and what undisturbed requests of it come to."""

    def __init__(self, nodes: Nodes, folder: Path) -> None:
        from tests.serving import save_codec_lm

        save_codec_lm(folder / "speech")
        self.folder, port = folder, free_port()
        self.address = f"http://127.0.0.1:{port}"
        self.command = [sys.executable, str(ROOT / "serve" / "app.py"), f"checkpoints=[{folder}/speech]",
                        f"cluster={nodes.address}", f"serve.port={port}", f"serve.jobs.folder={folder}/jobs",
                        "serve.jobs.lease_s=3", "serve.replica.min_replicas=2", "serve.replica.max_replicas=2",
                        "serve.replica.num_cpus=1", "serve.replica.slots=2", "serve.limits.queue=8",
                        "serve.limits.requests_per_minute=100000"]
        with Driver(self.command, folder / "log") as driver:
            assert driver.ended(LIMIT_S) == 0, driver.said()
        self.until_ready()
        self.expected = [self.post(seed).content for seed in range(SEEDS)]

    def post(self, seed: int, stream: bool = False, **headers: str) -> requests.Response:
        body = {"model": "speech", "seconds": SECONDS, "seed": seed, "response_format": "pcm", "stream": stream}
        return requests.post(f"{self.address}/v1/audio/generate", json=body, headers=headers, timeout=60, stream=stream)

    def until_ready(self, seconds: float = 90.0) -> None:
        """Until it makes sound again. TimeoutError where it does not."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            with contextlib.suppress(requests.RequestException):
                if self.post(0).status_code == 200:
                    return
            time.sleep(0.5)
        raise TimeoutError("the server did not come back")


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
        self.stop.set()
        for thread in self.threads:
            thread.join(120)

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
            if outcome != "whole":
                time.sleep(0.2)

    def _hand_in(self) -> None:
        number = 0
        while not self.stop.is_set():
            headers = {"prefer": "respond-async", "idempotency-key": f"{self.run}-{number}"}
            with contextlib.suppress(requests.RequestException):
                accepted = self.served.post(number % SEEDS, **headers)
                if accepted.status_code == 202:
                    self.jobs[accepted.headers["location"]] = number % SEEDS
                    number += 1
            time.sleep(0.5)

    def settle(self) -> None:
        """Every job that was accepted ends, with the sound that it is to have."""
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


def serve(site: Site, seed: int) -> Record:
    """Here the driver is the command that brings a new version, killed while it does and given again."""
    if "serve" not in site.undisturbed:
        folder = site.folder / "serve"
        folder.mkdir()
        site.undisturbed["serve"] = Served(site.nodes, folder)
    served: Served = site.undisturbed["serve"]
    record, rng, began = Record("serve", seed), random.Random(f"serve {seed}"), time.monotonic()
    load = Load(served, f"{seed}-{time.time_ns()}")
    for fault in rng.sample(FAULTS, len(FAULTS)):
        time.sleep(rng.uniform(0, SERVE_S))
        victim = ""
        if fault == "worker":
            victim = site.nodes.kill_worker(rng)
        elif fault == "node":
            victim = site.nodes.kill_node(rng)
        else:
            with Driver(served.command, served.folder / "log") as driver:
                driver.ended(rng.uniform(0, SERVE_S))
        record.faults.append({"fault": fault, "after_s": round(time.monotonic() - began, 1), "victim": victim})
    with Driver(served.command, served.folder / "log") as driver:
        if (code := driver.ended(LIMIT_S)) != 0:
            record.wrong.append(f"the deployment ended with {code}: {driver.said()[-1000:]}")
    try:
        served.until_ready()
    except TimeoutError as error:
        record.wrong.append(str(error))
    load.end()
    load.settle()
    record.wrong += load.wrong
    record.seen = {"streams": load.streams, "jobs": len(load.jobs)}
    record.seconds = round(time.monotonic() - began, 1)
    return record


WORKS = (*(one.name for one in PIPELINES), "serve")


@contextlib.contextmanager
def opened() -> Iterator[Site]:
    """Ray's sockets have to lie under a short path."""
    with tempfile.TemporaryDirectory(prefix="avray-chaos-", dir="/tmp", ignore_cleanup_errors=True) as folder, \
            Nodes(Path(folder)) as nodes:
        yield Site(nodes, Path(folder))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--work", nargs="+", choices=WORKS, default=list(WORKS))
    parser.add_argument("--journal", type=Path, default=Path("chaos.jsonl"))
    given = parser.parse_args()
    done = [Record(**json.loads(line)) for line in given.journal.read_text().splitlines()] \
        if given.journal.exists() else []
    made = {(record.work, record.seed) for record in done}
    wanted = [(work, seed) for work in given.work for seed in range(given.seeds) if (work, seed) not in made]
    if wanted:
        with opened() as site:
            for work, seed in wanted:
                record = site.run(work, seed)
                done.append(record)
                with open(given.journal, "a") as file:
                    print(json.dumps(asdict(record)), file=file)
                print(work, seed, record.seconds, [(one["fault"], one["victim"]) for one in record.faults], record.seen,
                      record.wrong, flush=True)
    print(table(done))


def table(records: Sequence[Record]) -> str:
    lines = ["| work | runs | workers, nodes, drivers killed | as if undisturbed |", "|---|---|---|---|"]
    for work in WORKS:
        some = [record for record in records if record.work == work]
        kinds = [one["fault"] for record in some for one in record.faults if one["fault"] != "worker" or one["victim"]]
        if some:
            lines.append(f"| {work} | {len(some)} | {', '.join(str(kinds.count(fault)) for fault in FAULTS)} | "
                         f"{sum(not record.wrong for record in some)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
