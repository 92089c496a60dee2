"""A replica of one model: an engine in a thread of its own, and an async generator that Serve can cancel."""

from __future__ import annotations

import asyncio
import os
import re
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar, get_args

import numpy as np
import torch

from avray.checkpoint import Checkpoint
from avray.checkpoint.store import MANIFEST
from avray.devices import device_of
from avray.engine import Engine, Generator, Output
from avray.errors import DataError
from avray.family import Options, Request
from avray.media import Audio, Limits, Video, joined, read_audio, read_video
from avray.serving.engine_thread import EngineThread, Stream
from avray.serving.messages import Ask, Card, Part, Refusal, Takes
from avray.serving.metrics import ReplicaMetrics
from avray.settings.serve import LimitSettings, ReplicaSettings

Media = TypeVar("Media", Audio, Video)
SOUND, CLIP = Audio(np.zeros((1, 16_000), np.float32), 16_000), Video(np.zeros((10, 8, 8, 3), np.uint8), 10.0)
"""A second of each, to ask a family with."""
PART_S = 0.1
"""Sound of one Part after the first, at least: each costs about a millisecond on its way."""
REPORT_S = 2.0
_TRIED = Options(seconds=1.0, max_tokens=8, temperature=1.0, top_k=4, top_p=0.9, guidance_scale=2.0,
                 aligned_guidance_scale=2.0, num_steps=4, beams=2)


@dataclass(frozen=True)
class ModelSettings:
    """What a replica is started with; plain, and printed in no log."""

    name: str
    checkpoint: str
    replica: ReplicaSettings
    limits: LimitSettings


class Model:
    """The deployment's class. ``generate`` yields Parts, or one Refusal at any point."""

    async def __init__(self, settings: ModelSettings) -> None:  # type: ignore[misc]  # Serve awaits it
        self.settings = settings
        # The engine's Python would keep the event loop waiting for up to 5 ms each time.
        sys.setswitchinterval(0.0005)
        self.thread = EngineThread(self._build, asyncio.get_running_loop())
        self.thread.start()
        self.engine = await self.thread.ready
        self.reporting = asyncio.create_task(self._report())

    async def _report(self) -> None:
        """What the engine does, to Prometheus, once in a while."""
        metrics, steps = ReplicaMetrics(self.settings.name), 0
        while True:
            before, steps = steps, self.thread.steps
            if steps > before:
                metrics.steps.inc(steps - before)
            metrics.batch.set(self.thread.active)
            metrics.queue.set(len(self.engine.waiting))
            await asyncio.sleep(REPORT_S)

    def _build(self) -> Engine:
        replica = self.settings.replica
        torch.set_num_threads(replica.num_threads)
        generator = Generator.open(self.settings.checkpoint, device_of(replica.device_name), replica.slots)
        assert generator.checkpoint is not None
        self._card = make_card(self.settings, generator.engine, generator.checkpoint)
        return generator.engine

    async def card(self) -> Card:
        return self._card

    async def process(self) -> int:
        """The process id, for tests that kill it."""
        return os.getpid()

    async def load(self) -> dict[str, int]:
        return {"active": self.thread.active, "steps": self.thread.steps}

    async def check_health(self) -> None:
        if not self.thread.is_alive() or self.thread.failures >= self.settings.replica.unhealthy_after:
            raise RuntimeError("The engine does not run any more.")

    async def generate(self, ask: Ask) -> AsyncIterator[Part | Refusal]:
        try:
            request = await asyncio.to_thread(self._request, ask) if ask.audio or ask.video else self._request(ask)
        except (ValueError, DataError) as error:
            yield refusal(error)
            return
        stream = self.thread.submit(request)
        try:
            async for part in self._parts(stream, ask.stream):
                yield part
        finally:
            stream.cancel()

    def _request(self, ask: Ask) -> Request:
        options = Options(**ask.options)  # type: ignore[arg-type]
        file, clip = ask.audio, ask.video
        if file is not None and self._sees(ask.task):
            file, clip = None, file
        audio = None if file is None else decoded(file, self.settings.limits, read_audio)
        video = None if clip is None else decoded(clip, self.settings.limits, read_video)
        fields = {name: True for name, asked in (("embedding", ask.embeds), ("sound", ask.sound)) if asked}
        return Request(text=ask.text, audio=audio, video=video, task=ask.task, options=options, seed=ask.seed,
                       fields=fields)

    def _sees(self, task: str | None) -> bool:
        """Whether a file is a clip to this task."""
        return _takes(self.engine, Request(video=CLIP, task=task)) and not _takes(self.engine, Request(audio=SOUND,
                                                                                                     task=task))

    async def _parts(self, stream: Stream, in_parts: bool) -> AsyncIterator[Part | Refusal]:
        held: list[Any] = []
        num_held, first = 0, True
        async for outputs in stream.batches():
            last: Output = outputs[-1]
            made = [output.media for output in outputs if output.media is not None]
            held = held + made
            num_held += sum(map(_length, made))
            if last.error is not None:
                yield refusal(last.error)
                return
            least = 1 if held and isinstance(held[0], str | Video) else PART_S * self.engine.renderer.sample_rate_hz
            enough = num_held > 0 and (first or num_held >= least)
            if last.done or (in_parts and enough):
                yield self._part(held, last.done, stream.request.audio)
                held, num_held, first = [], 0, False

    def _part(self, held: list[Any], done: bool, heard: Audio | None) -> Part:
        rate = self.engine.renderer.sample_rate_hz
        if held and isinstance(held[0], Video):
            clip = joined(held)
            sound, channels = (samples16(clip.audio.samples), len(clip.audio.samples)) if clip.audio else (b"", 0)
            return Part(clip.frames.tobytes(), done, rate, channels, self._card.checkpoint, size=clip.frames.shape[1:3],
                        frame_rate_hz=clip.frame_rate_hz, sound=sound)
        if (isinstance(held[0], str) if held else self.engine.renderer.modality == "text"):
            return Part("".join(held), done, checkpoint=self._card.checkpoint, heard_s=heard.seconds if heard else 0.0)
        channels = held[0].shape[0] if held else 1
        return Part(b"".join(map(samples16, held)), done, rate, channels, self._card.checkpoint)


def samples16(samples: np.ndarray) -> bytes:
    """float32 ``[channels, time]`` -> interleaved 16-bit samples, clipped: the bits that libsndfile writes, which
    rounds at 32 bits and then drops 16 of them."""
    wide = np.rint(samples.T.astype(np.float64) * 2**31).astype(np.int64) >> 16
    return np.clip(wide, -32768, 32767).astype("<i2").tobytes()


def _length(media: Any) -> int:
    return len(media.frames if isinstance(media, Video) else media if isinstance(media, str) else media.T)


def decoded(data: bytes, limits: LimitSettings, read: Callable[..., Media]) -> Media:
    """The recording or clip that a file's bytes hold, bounded by its header before memory is taken. DataError, without
    a path in it, for what is none."""
    bounds = Limits(max_file_bytes=limits.body_bytes, max_seconds=limits.audio_seconds_in,
                    max_decoded_bytes=limits.decoded_bytes)
    with tempfile.NamedTemporaryFile(prefix="avray-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as file:
        file.write(data)
        file.flush()
        try:
            return read(file.name, limits=bounds)
        except DataError as error:
            raise DataError(str(error).replace(file.name, "file").replace("data.limits", "serve.limits")) from None


def refusal(error: Exception) -> Refusal:
    """ValueErrors and DataErrors are the request's fault and name the field; all else is ours."""
    if not isinstance(error, (ValueError, DataError)):
        return Refusal(500, "The model failed on this request.")
    message = str(error)
    names = {field.name for field in fields(Options)} | {"text", "prompt", "audio", "video", "task", "file",
                                                            "sound"}
    named = next((word for word in re.findall(r"\w+", message) if word in names), None)
    fields_of = {"text": "input", "prompt": "input", "audio": "file", "num_steps": "steps"}
    return Refusal(400, message, fields_of.get(named or "", named))


def make_card(settings: ModelSettings, engine: Engine, checkpoint: Checkpoint) -> Card:
    """Ask the family about a request of each kind, and about each option with the first kind that it takes."""
    kinds = {"nothing": Request(), "text": Request(text="a"), "audio": Request(audio=SOUND),
             "text+audio": Request(text="a", audio=SOUND), "video": Request(video=CLIP)}
    tasks = dict(getattr(engine.renderer, "tasks", {}))
    asked = [(kind, replace(request, task=task)) for task in tasks or (None,) for kind, request in kinds.items()]
    accepted = [(kind, request) for kind, request in asked if _takes(engine, request)]
    taken = [kind for kind in kinds if any(kind == other for other, _ in accepted)]
    options = {task: tuple(name for name in _TRIED.given() if any(
        _takes(engine, replace(request, options=Options(**{name: getattr(_TRIED, name)})))
        for _, request in accepted if request.task == task)) for task in tasks or (None,)}
    assert set(kinds) == set(get_args(Takes))
    size = getattr(engine.renderer, "size", None)
    return Card(
        name=settings.name, family=str(checkpoint.family["name"]), modality=engine.renderer.modality,
        takes=tuple(taken), options=options,  # type: ignore[arg-type]
        sample_rate_hz=engine.renderer.sample_rate_hz, segment_s=engine.family.segment_s,
        checkpoint=str(checkpoint.manifest["sha256"]), step=checkpoint.step,
        created=int((checkpoint.path / MANIFEST).stat().st_mtime), slots=settings.replica.slots,
        max_replicas=settings.replica.max_replicas, tasks=tasks, embeds=tuple(getattr(engine.renderer, "embeds", ())),
        video_size=f"{size}x{size}" if "video" in tasks.values() else "")


def _takes(engine: Engine, request: Request) -> bool:
    try:
        engine.check(request)
    except ValueError:
        return False
    return True
