"""Hours of load while the model is replaced again and again: what was accepted is made, memory stays where it is.

    python -m benchmarks.serve_soak [--minutes 60] [--update-s 60] [--clients 6] [--json FILE]

Every ``update-s`` seconds the model is deployed anew from another checkpoint, as ``serve/app.py cluster=…`` does it.
One request in ten asks for what the model refuses, one in ten leaves in the middle of its stream. Counted: answers by
status, requests that broke off, answers of each checkpoint; resident memory and open files of all processes after each
update.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.serve_http import SECONDS, form, free_port, memory_mib, recording, save_model


class Clients:
    """``count`` threads that ask until ``ended``."""

    def __init__(self, port: int, count: int) -> None:
        self.port, self.ended, self.seen = port, threading.Event(), Counter[str]()
        self.threads = [threading.Thread(target=self.run, args=(number,)) for number in range(count)]
        for thread in self.threads:
            thread.start()

    def run(self, number: int) -> None:
        chance = random.Random(number)
        while not self.ended.is_set():
            kind = chance.choices(["whole", "stream", "refused", "leaves"], [5, 3, 1, 1])[0]
            try:
                self.seen[self.one(kind)] += 1
            except (OSError, http.client.HTTPException) as error:
                self.seen[f"{kind} broke off: {type(error).__name__}"] += 1

    def one(self, kind: str) -> str:
        fields = {"model": "bench", "seconds": str(SECONDS)} | ({"temperature": "1"} if kind == "refused" else {})
        fields |= {"stream": "true"} if kind in ("stream", "leaves") else {}
        body, content_type = form(fields, recording())
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            connection.request("POST", "/v1/audio/continuations", body, {"content-type": content_type})
            response = connection.getresponse()
            if kind == "leaves":
                return f"leaves: {response.status}"
            response.read()
            made = response.getheader("x-avray-checkpoint", "")[:4]
            return f"{kind}: {response.status} {made}".strip()
        finally:
            connection.close()


def files_of(root: int) -> int:
    """Open files of a process and its descendants."""
    listing = subprocess.run(["ps", "-eo", "pid,ppid"], capture_output=True, text=True, check=True).stdout
    rows = [tuple(map(int, line.split())) for line in listing.splitlines()[1:]]
    family = {root}
    for _ in range(8):
        family |= {pid for pid, parent in rows if parent in family}
    total = 0
    for pid in family:
        try:
            total += len(os.listdir(f"/proc/{pid}/fd"))
        except OSError:
            continue
    return total


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--update-s", type=float, default=60.0)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--json")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for step, name in enumerate("ab", start=1):
            save_model(Path(folder) / name, step)
        figures = soak(folder, given)
    print(json.dumps(figures, indent=1))
    if given.json:
        Path(given.json).write_text(json.dumps(figures, indent=1))


def soak(folder: str, given: argparse.Namespace) -> dict[str, Any]:
    port = free_port()
    arguments = ["serve/app.py", f"serve.port={port}", f"serve.jobs.folder={folder}/jobs", "serve.replica.num_cpus=0.5"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    server = subprocess.Popen([sys.executable, *arguments, f"checkpoints=[bench:{folder}/a]"], env=environment,
                              stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert server.stdout is not None
    address = next(match.group(1) for line in server.stdout if (match := re.search(r"cluster=(\S+)", line)))
    time.sleep(3)
    clients, minutes, updates, failures = Clients(port, given.clients), [], 0, 0
    end = time.monotonic() + 60 * given.minutes
    try:
        while time.monotonic() < end:
            time.sleep(given.update_s)
            updates += 1
            run = f"{folder}/{'ab'[updates % 2]}"
            again = [sys.executable, *arguments, f"checkpoints=[bench:{run}]", f"cluster={address}"]
            failures += subprocess.run(again, env=environment, capture_output=True, check=False).returncode != 0
            minutes.append({"mib": round(memory_mib(server.pid)), "files": files_of(server.pid)})
            print(updates, minutes[-1], dict(clients.seen), file=sys.stderr, flush=True)
    finally:
        clients.ended.set()
        for thread in clients.threads:
            thread.join()
        server.terminate()
        server.wait(60)
    return {"answers": dict(sorted(clients.seen.items())), "updates": updates, "failed_updates": failures,
            "memory_and_files": minutes}


if __name__ == "__main__":
    main()
