"""Workers that come and go: a node announced to be taken away, taken away, and another in its place."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.commands import BIN, ROOT, SMALL, TOKEN, free_port, ray_head, running, tones

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]
NUM_STEPS = 400
STEPS = [f"trainer.max_steps={NUM_STEPS}", "trainer.batch_size=4", "trainer.num_samples=0", "trainer.log_every_steps=1",
         "trainer.validate_every_steps=0", "trainer.checkpoint_every_steps=0", "trainer.schedule.warmup_steps=0",
         "family.dropout=0", "trainer.keep_last=20", "data.embed_num_cpus=0.5"]


class Slow:
    """A hook that notes how many work, and takes its time."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_epoch_start(self, loop: Any) -> None:
        if loop.place.rank == 0:
            with open(self.folder / "counts", "a") as file:
                print(loop.step, loop.place.world_size, file=file)
        if not (self.folder / "fast").exists():
            time.sleep(3.0)


def counts(folder: Path) -> list[tuple[int, int]]:
    path = folder / "counts"
    return [tuple(map(int, line.split())) for line in path.read_text().splitlines()] if path.exists() else []  # type: ignore[misc]


def node(head: int) -> list[str]:
    return [str(BIN / "ray"), "start", f"--address=127.0.0.1:{head}", "--block", "--node-ip-address=127.0.0.1",
            "--num-cpus=4", f"--dashboard-agent-listen-port={free_port()}", f"--object-store-memory={128 << 20}"]


def drain(head: int, seconds: int) -> None:
    """Announce the end of the node that is not the head's."""
    script = (f"import ray; ray.init('127.0.0.1:{head}', log_to_driver=False, logging_level='ERROR');"
              "print(*[n['NodeID'] for n in ray.nodes() if n['Alive'] "
              "and 'node:__internal_head__' not in n['Resources']])")
    environment = {**os.environ, **TOKEN}
    found = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    subprocess.run([str(BIN / "ray"), "drain-node", f"--address=127.0.0.1:{head}", "--node-id",
                    found.stdout.split()[-1], "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot",
                    "--deadline-remaining-seconds", str(seconds)], env=environment, check=True, capture_output=True)


def losses(run: Path) -> dict[int, float]:
    with open(run / "metrics.csv") as file:
        return {int(row["step"]): float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]}


def test_a_node_goes_and_another_comes(short_folder: Path) -> None:
    """Four workers, two, four again; a checkpoint at the notice, every step once, and the loss of one worker alone."""
    tones(short_folder / "wavs", 8, 1.0)
    head, run = free_port(), short_folder / "run"
    common = [*SMALL, *STEPS, f"data.path={short_folder}/wavs", f"data.cache={short_folder}/cache"]

    def train(*given: str) -> list[str]:
        return [sys.executable, str(ROOT / "pipelines" / "train.py"), *common, *given]

    def until(done: Callable[[], bool], process: subprocess.Popen[str]) -> None:
        deadline = time.monotonic() + 200
        while not done():
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
            time.sleep(0.2)

    alone = subprocess.run(train(f"run.dir={short_folder}/alone"), cwd=short_folder, capture_output=True, text=True,
                           env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=300)
    assert alone.returncode == 0, alone.stdout + alone.stderr
    elastic = [f"cluster=127.0.0.1:{head}", f"run.dir={run}", "trainer.num_workers=[2,4]", "trainer.cpus_per_worker=2",
               "trainer.threads_per_worker=1", "trainer.max_failures=3", "trainer.resize_interval_s=3",
               f"trainer.hooks=[{{_target_: tests.test_elastic.Slow, folder: {short_folder}}}]"]
    with ray_head(short_folder, head, free_port()), ExitStack() as rest:
        with running(node(head), short_folder) as first:
            assert first.stdout is not None and any("Ray runtime started" in line for line in first.stdout)
            training = rest.enter_context(running(train(*elastic), short_folder))
            until(lambda: any(number == 4 for _, number in counts(short_folder)), training)
            drain(head, 120)
            until(lambda: any((run / "checkpoints").glob("step-*/manifest.json")), training)
        noticed, = (int(path.name[5:]) for path in (run / "checkpoints").iterdir())
        until(lambda: counts(short_folder)[-1][1] == 2, training)
        rest.enter_context(running(node(head), short_folder))
        until(lambda: counts(short_folder)[-1][1] == 4, training)
        (short_folder / "fast").touch()
        said = training.communicate(timeout=200)[0]
        assert training.returncode == 0, said
    began = [step for (step, number), (_, before) in pairwise(counts(short_folder)) if number != before]
    assert json.loads((run / "summary.json").read_text())["steps"] == NUM_STEPS
    whole, disturbed = losses(short_folder / "alone"), losses(run)
    assert sorted(disturbed) == sorted(whole) == list(range(1, NUM_STEPS + 1))
    assert disturbed == pytest.approx(whole, rel=1e-2)
    assert noticed <= began[0], "nothing before the notice is done again"
