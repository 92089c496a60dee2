"""What the tests of commands share: processes in a session of their own, and a Ray head with its dashboard."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import requests
import soundfile

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "5f" * 32}
"""Of every Ray here, whatever token this user has."""
SMALL = ["family.segment_s=0.4", "family.num_layers=1", "family.num_heads=4", "family.feed_forward=32"]
"""A ``continuation`` of moments."""
TWO_STEPS = [*SMALL, "trainer.max_steps=2", "trainer.batch_size=4", "trainer.num_samples=1",
             "trainer.schedule.warmup_steps=0"]


def tones(folder: Path, count: int, seconds: float) -> Path:
    """``count`` recordings, each of a pitch of its own."""
    folder.mkdir()
    time_s = np.arange(round(seconds * 16_000)) / 16_000
    for index in range(count):
        tone = 0.3 * np.sin(2 * np.pi * (200 + 7 * index) * time_s)
        soundfile.write(folder / f"tone{index:03d}.wav", tone, 16_000)
    return folder


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@contextmanager
def running(command: list[str], cwd: Path, **environment: str) -> Iterator[subprocess.Popen[str]]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_SERVE_")}
    given = {**inherited, **TOKEN, "PYTHONPATH": str(ROOT), **environment}
    process = subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               env=given, start_new_session=True)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def wait_listening(port: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 90
    while True:
        assert process.poll() is None and time.monotonic() < deadline
        try:
            requests.get(f"http://127.0.0.1:{port}/api/version", timeout=5)
            return
        except (requests.ConnectionError, requests.Timeout):
            time.sleep(0.5)


@contextmanager
def ray_head(folder: Path, port: int, dashboard: int) -> Iterator[subprocess.Popen[str]]:
    """``ray start --head`` apart from every other Ray here, until the block ends; ``folder`` has a short path."""
    command = [str(BIN / "ray"), "start", "--head", "--block", f"--port={port}", f"--dashboard-port={dashboard}",
               f"--dashboard-agent-listen-port={free_port()}", "--node-ip-address=127.0.0.1", "--num-cpus=4",
               f"--temp-dir={folder}/ray", "--dashboard-host=127.0.0.1",
               f"--object-store-memory={256 << 20}", "--disable-usage-stats"]
    with running(command, folder) as process:
        wait_listening(dashboard, process)
        yield process
