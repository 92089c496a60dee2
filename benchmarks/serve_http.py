"""What HTTP and Ray Serve add to the call in process, beside uvicorn with a hand-written batcher and LitServe.

    python -m benchmarks.serve_http [--seconds 8] [--repeats 3] [--overload 60] [--streams] [--json FILE]

One model (859,520 parameters, random weights, 4 slots, one thread) behind three servers that run at the same time and
are asked in turn, at 1, 8 and 32 clients; each request sends 2 s of WAV and gets 0.5 s back. The clients, one process
of threads, share the machine's cores with the server. The call in process decodes, generates and encodes the same
bytes; for 8 clients it keeps 8 requests under way, while the same client process talks to a server of canned answers
at the rate that avray reached, so that the clients' own cost falls on both. Milliseconds and requests a second.

``--streams`` measures the time to the first sound alone: a language model over codec tokens (8 slots), 2 s streamed.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import io
import json
import os
import queue
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import wave
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

SLOTS, SECONDS, RATE_HZ = 4, 0.5, 24_000
LEVELS = (1, 8, 32)
LITSERVE = "/base64"
"""Its queue between processes takes no uploaded files (0.2.19)."""


STREAMS = "/v1/audio/generate"


def recording() -> bytes:
    samples = (np.sin(np.arange(2 * RATE_HZ) / RATE_HZ * 2 * np.pi * 440) * 8000).astype("<i2")
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(RATE_HZ)
        sound.writeframes(samples.tobytes())
    return file.getvalue()


def form(fields: dict[str, str], file: bytes) -> tuple[bytes, str]:
    parts = [f'--b\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
             for name, value in fields.items()]
    head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'
    return b"".join([*parts, head, file, b"\r\n--b--\r\n"]), "multipart/form-data; boundary=b"


# ── the client, a process of its own ─────────────────────


@dataclass
class Load:
    """What a closed loop of clients saw."""

    p50_ms: float
    p95_ms: float
    per_s: float
    first_ms: float
    statuses: dict[str, int]


def client(port: int, path: str, clients: int, seconds: float, stream: bool) -> Load:
    fields = {"model": "bench", "seconds": str(SECONDS), "seed": "1"} | ({"stream": "true"} if stream else {})
    body, kind = form(fields, recording())
    if path == STREAMS:
        asked = {"model": "bench", "seconds": 2.0, "stream": stream, "response_format": "pcm"}
        body, kind = json.dumps(asked).encode(), "application/json"
    if path == LITSERVE:
        body, kind = json.dumps({"file": base64.b64encode(recording()).decode()}).encode(), "application/json"
    took: list[float] = []
    first: list[float] = []
    statuses: dict[str, int] = {}
    begin = time.monotonic()

    def one() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        while time.monotonic() < begin + seconds:
            start = time.perf_counter()
            connection.request("POST", path, body, {"content-type": kind})
            response = connection.getresponse()
            response.read(64)
            first.append(time.perf_counter() - start)
            response.read()
            took.append(time.perf_counter() - start)
            statuses[str(response.status)] = statuses.get(str(response.status), 0) + 1
            if response.status == 429:
                time.sleep(0.05)

    threads = [threading.Thread(target=one) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ordered, whole = sorted(took), time.monotonic() - begin
    return Load(1e3 * statistics.median(ordered), 1e3 * ordered[int(0.95 * len(ordered))],
                statuses.get("200", 0) / whole, 1e3 * statistics.median(first), statuses)


def ask(port: int, path: str, clients: int, seconds: float, stream: bool = False) -> Load:
    arguments = [sys.executable, "-m", "benchmarks.serve_http", "--client", str(port), path, str(clients), str(seconds),
                 str(int(stream))]
    return Load(**json.loads(subprocess.run(arguments, check=True, capture_output=True, text=True).stdout))


# ── the servers ──────────────────────────────────────────


def save_model(run: Path, step: int = 1) -> None:
    """The original's size, fitted on noise, weights drawn."""
    import torch

    from avray import checkpoint
    from avray.codecs.spectral import Spectral
    from avray.families.continuation import Continuation
    from avray.registry import family_settings

    family = Continuation(Spectral(), segment_s=2.0, normalise="scale")
    random = np.random.default_rng(0)
    rows = [{f"{role}.latents": random.normal(-8, 1, (150, 128)).astype(np.float16) for role in ("input", "output")}
            for _ in range(4)]
    fitted = family.fit(iter(rows))
    model = family.build(fitted)
    family.init(model, torch.Generator().manual_seed(0))
    content = checkpoint.Content(model=model.state_dict(), family=family_settings(family), fitted=fitted, settings={},
                                 ema=None, trainer=None, figures={}, card="")
    checkpoint.save(run, step, content, ("last", "best"))


def save_streams(run: Path) -> None:
    """``codec_lm_small`` over 4 codebooks of 128, weights drawn."""
    import torch

    from avray import checkpoint
    from avray.cli import TRAIN, compose
    from avray.registry import family_from_settings, family_settings

    sizes = ["codec.cardinality=128", "codec.frames_per_centroid=16"]
    family = family_from_settings(compose(TRAIN, ["family=codec_lm_small", *sizes]).family)
    frames = np.random.default_rng(0).normal(-8, 1, (4000, 128)).astype(np.float16)
    fitted = family.fit(iter([{"audio.latents": frames}]))
    model = family.build(fitted)
    family.init(model, torch.Generator().manual_seed(0))
    content = checkpoint.Content(model=model.state_dict(), family=family_settings(family), fitted=fitted, settings={},
                                 ema=None, trainer=None, figures={}, card="")
    checkpoint.save(run, 1, content, ("last", "best"))


def streams(folder: str, seconds: float, repeats: int) -> str:
    """The time to the first sound at 1 and at 8 clients, each asking again at once."""
    run, port = f"{folder}/bench", free_port()
    save_streams(Path(run))
    first: dict[int, list[float]] = {1: [], 8: []}
    arguments = [word.replace(f"slots={SLOTS}", "slots=8") for word in server_of("avray", run, port)]
    with serving(arguments, port, STREAMS):
        ask(port, STREAMS, 8, 4.0, True)
        for _ in range(repeats):
            for clients in first:
                first[clients].append(ask(port, STREAMS, clients, seconds, True).first_ms)
    ratio = statistics.median(eight / one for one, eight in zip(*first.values(), strict=True))
    one, eight = map(statistics.median, first.values())
    return f"First sound of a stream after {one:.0f} ms at 1 and {eight:.0f} ms at 8 clients: {ratio:.2f} times."


class Direct:
    """The call in process: WAV bytes in, WAV bytes out, a batch at a time."""

    def __init__(self, run: str) -> None:
        import torch

        import avray

        torch.set_num_threads(1)
        self.generator = avray.load(run, slots=SLOTS)

    def request(self, data: bytes) -> Any:
        from avray.engine import make_request
        from avray.media import read_audio
        from avray.serving.model import decoded
        from avray.settings.serve import LimitSettings

        return make_request(None, decoded(data, LimitSettings(), read_audio), None, None, SECONDS, None, None, 1)

    def __call__(self, batch: list[bytes]) -> list[bytes]:
        return [self.encoded(made.audio) for made in self.generator.generate_many(list(map(self.request, batch)))]

    def encoded(self, audio: Any) -> bytes:
        from avray.media import write_audio

        file = io.BytesIO()
        write_audio(file, audio, "wav")
        return file.getvalue()


def batcher(run: str, port: int) -> None:
    """uvicorn, Starlette, and the batcher that one writes in an afternoon: a thread that takes what waits."""
    import asyncio

    import uvicorn
    from starlette.applications import Starlette
    from starlette.responses import Response
    from starlette.routing import Route

    waiting: queue.Queue[Any] = queue.Queue()
    direct: list[Direct] = []

    def work() -> None:
        direct.append(Direct(run))
        while True:
            batch = [waiting.get()]
            while len(batch) < SLOTS and not waiting.empty():
                batch.append(waiting.get())
            for (_, loop, future), made in zip(batch, direct[0]([data for data, _, _ in batch]), strict=True):
                loop.call_soon_threadsafe(future.set_result, made)

    async def predict(request: Any) -> Response:
        data = await (await request.form())["file"].read()
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        waiting.put((data, loop, future))
        return Response(await future, media_type="audio/wav")

    threading.Thread(target=work, daemon=True).start()
    uvicorn.run(Starlette(routes=[Route("/predict", predict, methods=["POST"])]), port=port, log_level="error")


def canned(port: int, pause_s: float) -> None:
    """Half a second of silence, after a pause."""
    import asyncio

    import uvicorn

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        while (await receive()).get("more_body"):
            pass
        await asyncio.sleep(pause_s)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"24044")]})
        await send({"type": "http.response.body", "body": b"\0" * 24044})

    uvicorn.run(app, port=port, log_level="error")


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@contextmanager
def serving(arguments: list[str], port: int, path: str) -> Iterator[subprocess.Popen[bytes]]:
    """A server's process, once it answers."""
    process = subprocess.Popen([sys.executable, *arguments], env=os.environ | {"OMP_NUM_THREADS": "1"},
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        for _ in range(120):
            try:
                if "200" in ask(port, path, 1, 0.2).statuses:
                    break
            except (subprocess.CalledProcessError, OSError):
                pass
            time.sleep(1)
            assert process.poll() is None, arguments
        yield process
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # LitServe leaves its worker behind


def server_of(name: str, run: str, port: int) -> list[str]:
    if name in ("avray", "haproxy"):
        return ["serve/app.py", f"checkpoints=[bench:{run}]", f"serve.port={port}", f"serve.replica.slots={SLOTS}",
                f"serve.jobs.folder={Path(run).parent / 'jobs'}",
                f"serve.proxy={'haproxy' if name == 'haproxy' else 'python'}"]
    if name == "litserve":
        return ["-m", "benchmarks.serve_litserve", run, str(port)]
    return ["-m", "benchmarks.serve_http", "--server", name, run, str(port)]


# ── what is measured ─────────────────────────────────────


def in_process(run: str, seconds: float) -> dict[str, float]:
    """Milliseconds of one request alone, and requests a second with 8 under way; the second beside the clients of a
    canned server where one runs."""
    direct, data = Direct(run), recording()
    direct([data])
    took = []
    while sum(took) < seconds:
        start = time.perf_counter()
        direct([data])
        took.append(time.perf_counter() - start)
    return {"p50_ms": 1e3 * statistics.median(took)}


def in_process_8(run: str, seconds: float, per_s: float) -> float:
    """Requests a second in process, while 8 clients talk to canned answers at ``per_s``."""
    direct, data, port = Direct(run), recording(), free_port()
    direct([data])
    with serving(["-m", "benchmarks.serve_http", "--canned", str(port), str(max(0.0, 8 / per_s - 0.004))], port, "/"):
        beside = threading.Thread(target=ask, args=(port, "/", 8, seconds + 1))
        beside.start()
        time.sleep(0.5)
        done, start = 0, time.perf_counter()
        while time.perf_counter() < start + seconds:
            done += len(direct([data] * 8))
        rate = done / (time.perf_counter() - start)
        beside.join()
    return rate


def memory_mib(root: int) -> float:
    """Resident memory of a process and all that descend from it (Ray's included)."""
    listing = subprocess.run(["ps", "-eo", "pid,ppid,rss"], capture_output=True, text=True, check=True).stdout
    rows = [tuple(map(int, line.split())) for line in listing.splitlines()[1:]]
    family = {root}
    for _ in range(8):
        family |= {pid for pid, parent, _ in rows if parent in family}
    return sum(rss for pid, _, rss in rows if pid in family) / 1024


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--repeats", type=int, default=3, help="0: overload alone")
    parser.add_argument("--overload", type=float, default=60.0, help="seconds; 0: leave it out")
    parser.add_argument("--peers", default="avray,haproxy,batcher,litserve", help="haproxy: avray behind it")
    parser.add_argument("--streams", action="store_true")
    parser.add_argument("--json")
    parser.add_argument("--client", nargs=5)
    parser.add_argument("--server", nargs=3)
    parser.add_argument("--canned", nargs=2)
    given = parser.parse_args()
    if given.client:
        port, path, clients, seconds, stream = given.client
        print(json.dumps(asdict(client(int(port), path, int(clients), float(seconds), stream == "1"))))
    elif given.server:
        name, run, port = given.server
        assert name == "batcher"
        batcher(run, int(port))
    elif given.canned:
        canned(int(given.canned[0]), float(given.canned[1]))
    else:
        compare(given)


def compare(given: argparse.Namespace) -> None:
    paths = {"avray": "/v1/audio/continuations", "batcher": "/predict", "litserve": LITSERVE}
    paths["haproxy"] = paths["avray"]
    with tempfile.TemporaryDirectory() as folder:
        if given.streams:
            print(streams(folder, given.seconds, given.repeats))
            return
        run = f"{folder}/bench"
        save_model(Path(run))
        if given.repeats == 0:
            print(overload(run, given.overload))
            return
        figures: dict[str, Any] = {"in process": [], "avray": [], "haproxy": [], "batcher": [], "litserve": []}
        for turn in range(given.repeats):
            figures["in process"].append(in_process(run, given.seconds))
            for name in given.peers.split(","):
                port = free_port()
                with serving(server_of(name, run, port), port, paths[name]):
                    ask(port, paths[name], 8, 2.0)
                    found = {str(clients): asdict(ask(port, paths[name], clients, given.seconds)) for clients in LEVELS}
                    if name in ("avray", "haproxy"):
                        found["stream"] = {str(clients): asdict(ask(port, paths[name], clients, given.seconds, True))
                                           for clients in (1, 8)}
                figures[name].append(found)
                print(turn + 1, name, {level: (round(found[level]["p50_ms"], 1), round(found[level]["per_s"], 2))
                                       for level in map(str, LEVELS)}, file=sys.stderr, flush=True)
            rate = figures["avray"][-1]["8"]["per_s"]
            figures["in process"][-1]["per_s_8"] = in_process_8(run, given.seconds, rate)
            print(turn + 1, "in process", figures["in process"][-1], file=sys.stderr, flush=True)
        if given.overload:
            figures["overload"] = overload(run, given.overload)
    print(markdown(figures))
    if given.json:
        Path(given.json).write_text(json.dumps(figures, indent=1))


def overload(run: str, seconds: float) -> dict[str, Any]:
    """Ten times as many clients as slots and queue hold."""
    port = free_port()
    arguments = [*server_of("avray", run, port), "serve.limits.queue=4"]
    with serving(arguments, port, "/v1/audio/continuations") as process:
        ask(port, "/v1/audio/continuations", 80, 10.0)
        before = memory_mib(process.pid)
        load = ask(port, "/v1/audio/continuations", 10 * (SLOTS + 4), seconds)
        return {"before_mib": before, "after_mib": memory_mib(process.pid), **asdict(load)}


def markdown(figures: dict[str, Any]) -> str:
    def middle(values: Callable[[dict[str, Any]], float], name: str) -> float:
        return statistics.median(values(turn) for turn in figures[name])

    alone, at_8 = middle(lambda t: t["p50_ms"], "in process"), middle(lambda t: t["per_s_8"], "in process")
    lines = ["| server | p50 at 1 client, ms | added, ms | p50 / p95 at 8 | requests/s at 8 | p50 / p95 at 32 | "
             "requests/s at 32 |", "|---|---|---|---|---|---|---|",
             f"| in process | {alone:.1f} | | | {at_8:.1f} | | |"]
    for name in ("avray", "haproxy", "batcher", "litserve"):
        if figures[name]:
            cells = [middle(lambda t: t["1"]["p50_ms"], name), middle(lambda t: t["1"]["p50_ms"], name) - alone]
            row = f"| {name} | {cells[0]:.1f} | {cells[1]:.1f} |"
            for level in ("8", "32"):
                p50, p95, rate = (middle(lambda t, key=key, level=level: t[level][key], name)
                                  for key in ("p50_ms", "p95_ms", "per_s"))
                row += f" {p50:.0f} / {p95:.0f} | {rate:.1f} |"
            lines.append(row)
    for name in (name for name in ("avray", "haproxy") if figures[name]):
        first = {level: middle(lambda t, level=level: t["stream"][level]["first_ms"], name) for level in ("1", "8")}
        share = statistics.median(t["8"]["per_s"] / p["per_s_8"]
                                  for t, p in zip(figures[name], figures["in process"], strict=True))
        lines.append(f"\nAt 8 clients {name} makes {share:.2f} of the requests in process; first sound after "
                     f"{first['1']:.0f} ms at 1 and {first['8']:.0f} ms at 8 clients.")
    if "overload" in figures:
        lines.append(f"Overload: {figures['overload']}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
