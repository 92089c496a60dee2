"""What the tests of serving share: two tiny checkpoints of different families, and a server without Ray.

``Local`` stands for Serve's handle: the real replica's class, called in this process's event loop, or one that fails.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import requests
import torch
import uvicorn
from starlette.testclient import TestClient

from avray import checkpoint as checkpoints
from avray.checkpoint import Content
from avray.codecs.spectral import Spectral
from avray.config import ServeSettings
from avray.families.audio_gpt2 import AudioGPT2
from avray.families.codec_lm import CodecLM
from avray.families.continuation import Continuation
from avray.families.instruct import Instruct
from avray.families.multitask import Multitask, TaskWeights
from avray.nn.dit import DiTConfig
from avray.registry import family_settings
from avray.serving.auth import Keys
from avray.serving.gateway import Gateway, GatewaySettings
from avray.serving.model import Model, ModelSettings

CONTINUATION = Continuation(Spectral(), segment_s=0.4, num_layers=1, num_heads=2, feed_forward=16, normalise="scale")
CODEC_LM = CodecLM(Spectral(), num_codebooks=2, segment_s=0.4, text="caption", text_bytes=32, context=128, width=16,
                   num_layers=1, num_heads=2)
INSTRUCT = Instruct(Spectral(), segment_s=1.0, network=DiTConfig(width=16, num_layers=2, num_heads=2), text_layers=1,
                    text_heads=2, num_steps=2)
AUDIO_GPT2 = AudioGPT2(Spectral(), segment_s=1.0, overlap_s=0.25, context=64, width=16, num_layers=1, num_heads=2,
                       stem_layers=1)
MULTITASK = Multitask(Spectral(), segment_s=0.4, width=16, num_layers=1, num_heads=2, head="flow",
                      task_weights=TaskWeights(image=0.0, video=0.0))

NO_KEYS = Keys()


def save_continuation(run: Path, step: int = 3, seed: int = 0) -> Path:
    random = np.random.default_rng(seed)
    rows = [{f"{role}.latents": random.normal(-8, 1, (30, 128)).astype(np.float16) for role in ("input", "output")}
            for _ in range(4)]
    return _save(run, CONTINUATION, rows, step, seed)


def save_codec_lm(run: Path) -> Path:
    random = np.random.default_rng(0)
    return _save(run, CODEC_LM, [{"audio.latents": random.normal(-8, 1, (600, 128)).astype(np.float16)}], 5, 0)


def save_instruct(run: Path, *tasks: str) -> Path:
    random = np.random.default_rng(0)
    rows = [{"output.latents": random.normal(-8, 1, (length, 128)).astype(np.float16)} for length in (30, 45, 60)]
    return _save(run, replace(INSTRUCT, tasks=tasks or INSTRUCT.tasks), rows, 4, 0)


def save_audio_gpt2(run: Path) -> Path:
    random = np.random.default_rng(0)
    return _save(run, AUDIO_GPT2, [{"id": "x", "weight": 1.0, "text": "some words",
                                    "audio.features": random.normal(-8, 1, (60, 128)).astype(np.float16)}], 7, 0)


def save_multitask(run: Path) -> Path:
    rows = [{"id": task, "weight": 1.0, "task": task, "prompt": "say a", "output": "aaa"} for task in ("text", "code")]
    rows += [{"id": str(n), "weight": 1.0, "task": "audio", "prompt": "say a", "embedding": [[-8.0 + n] * 128]}
             for n in (0, 1)]
    return _save(run, MULTITASK, rows, 1, 0)


def save_clips(run: Path, **options: Any) -> Path:
    """A ``multitask`` of sounds and clips, whose tones and colours are those of ``tone`` and ``clip``."""
    family = Multitask(Spectral(), segment_s=0.4, width=16, num_layers=1, num_heads=2,
                       task_weights=TaskWeights(text=0.0, code=0.0, image=0.0), **options)
    rows = [{"id": f"{task}{n}", "weight": 1.0, "task": task, "prompt": "show a", "embedding": [[-8.0 + n] * width]}
            for n in (0, 1) for task, width in (("audio", 128), ("video", 256))]
    return _save(run, family, rows, 1, 0)


def _save(run: Path, family: Any, rows: list[dict[str, Any]], step: int, seed: int) -> Path:
    fitted = family.fit(iter(rows))
    model = family.build(fitted)
    family.init(model, torch.Generator().manual_seed(seed))
    content = Content(model=model.state_dict(), family=family_settings(family), fitted=fitted, settings={}, ema=None,
                      trainer=None, figures={}, card="")
    checkpoints.save(run, step, content, ("last", "best"))
    return run


class Call:
    """Serve's response generator."""

    def __init__(self, parts: Any) -> None:
        self.parts = parts

    def __aiter__(self) -> Call:
        return self

    async def __anext__(self) -> Any:
        return await anext(self.parts)

    def cancel(self) -> None:
        asyncio.get_running_loop().create_task(self.parts.aclose())


class Local:
    """A handle to a replica in this process; it is made in the server's own event loop, at the first call."""

    def __init__(self, settings: ModelSettings) -> None:
        self.settings, self.model = settings, None

    def options(self, stream: bool) -> Local:
        return self

    @property
    def generate(self) -> Any:
        return self

    def remote(self, ask: Any) -> Call:
        return Call(self._generate(ask))

    async def _generate(self, ask: Any) -> Any:
        async for part in (await self._model()).generate(ask):
            yield part

    @property
    def card(self) -> Any:
        handle = self

        class Card:
            async def remote(self) -> Any:
                return await (await handle._model()).card()

        return Card()

    async def _model(self) -> Model:
        if self.model is None:
            self.model = Model.__new__(Model)
            await self.model.__init__(self.settings)
        return self.model


@contextlib.contextmanager
def listening(models: dict[str, Path], serve: ServeSettings, keys: Keys = NO_KEYS) -> Iterator[int]:
    """The port of a gateway behind uvicorn, for clients that need one."""
    handles = {name: Local(ModelSettings(name, str(run), serve.replica, serve.limits)) for name, run in models.items()}
    app = Gateway(GatewaySettings(serve, keys), handles).__serve_build_asgi_app__()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    running = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error"))
    thread = threading.Thread(target=running.run)
    thread.start()
    try:
        for _ in range(200):
            with contextlib.suppress(requests.ConnectionError, requests.Timeout):
                if requests.get(f"http://127.0.0.1:{port}/v1/health/ready", timeout=10).status_code == 200:
                    break
            time.sleep(0.1)
        yield port
    finally:
        running.should_exit = True
        thread.join()


@contextlib.contextmanager
def server(models: dict[str, Any], serve: ServeSettings | None = None, keys: Keys = NO_KEYS,
           address: str = "127.0.0.1") -> Iterator[TestClient]:
    """A client of a gateway over ``models`` (name → run folder, or a handle), all of them loaded."""
    serve = serve or ServeSettings()
    handles = {name: Local(ModelSettings(name, str(what), serve.replica, serve.limits)) if isinstance(what, Path)
               else what for name, what in models.items()}
    gateway = Gateway(GatewaySettings(serve, keys), handles)
    with TestClient(gateway.__serve_build_asgi_app__(), base_url=f"http://{address}",
                    raise_server_exceptions=False) as client:
        client.gateway = gateway
        client.handles = handles
        for _ in range(200):
            if client.get("/v1/health/ready").status_code == 200:
                break
            time.sleep(0.1)
        yield client
