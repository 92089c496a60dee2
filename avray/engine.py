"""One engine for every kind of model: it admits, steps and drops requests over a family's ``Sampler``. No Ray in it.

``generate.py``, validation samples and serving drive this same loop. Slots are fixed in number and requests are admitted
one by one, because in float32 a row's bits change with the number of rows: so a request gives the same result alone and
in company. Everything here belongs to one thread; a second one that calls torch brings its own team of OpenMP threads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soxr
import torch
from torch import nn

from avray.checkpoint import Checkpoint
from avray.family import Column, Family, Fitted, Media, Network, Options, Render, Request, Row, role_columns
from avray.media import Audio, Video, read_audio
from avray.registry import family_from_settings


@dataclass(frozen=True)
class Output:
    """What a request got from one step: media that is final now (None where nothing is yet), and whether it was the last."""

    ticket: int
    media: Any
    done: bool


@dataclass
class _Running:
    ticket: int
    render: Render


@dataclass(frozen=True)
class Generated:
    """A finished request. ``prompt`` is the recording it continues, where there was one."""

    media: Media
    seed: int
    options: Options
    prompt: Audio | None = None

    def with_prompt(self) -> Generated:
        """The given recording, brought to the output's rate and channels, in front of what was generated."""
        if self.prompt is None or not isinstance(self.media, Audio):
            raise ValueError("include_prompt=true needs a recording to continue.")
        before = resampled(self.prompt, self.media.sample_rate_hz)[None].repeat(len(self.media.samples), 0)
        joined = Audio(np.concatenate([before, self.media.samples], 1), self.media.sample_rate_hz)
        return Generated(joined, self.seed, self.options, self.prompt)


class Engine:
    """``submit`` and ``cancel`` at any time, ``step`` until nothing is busy."""

    def __init__(self, family: Family, model: nn.Module, fitted: Fitted, slots: int = 1,
                 device: torch.device | str = "cpu") -> None:
        self.family, self.fitted, self.device = family, fitted, torch.device(device)
        self.model = model.to(self.device).eval()
        self.columns = family.columns(fitted)
        self.sampler = family.sampler(self.model, fitted, slots)
        self.renderer = family.renderer(fitted, self.device)
        self.free = list(range(slots))[::-1]
        self.running: dict[int, _Running] = {}
        self.waiting: deque[tuple[int, Request]] = deque()
        self._networks: dict[str, Network] = {}
        self._next_ticket = 0

    @property
    def busy(self) -> bool:
        return bool(self.running or self.waiting)

    def submit(self, request: Request) -> int:
        """A ticket. ValueError, naming the field, for a request this model cannot take."""
        self.family.prompt(request)
        self._next_ticket += 1
        self.waiting.append((self._next_ticket, request))
        return self._next_ticket

    def cancel(self, ticket: int) -> None:
        """No more output comes for it, and its slot is free at once. Unknown and finished tickets are ignored."""
        self.waiting = deque(item for item in self.waiting if item[0] != ticket)
        for slot, running in list(self.running.items()):
            if running.ticket == ticket:
                self.sampler.drop(slot)
                self._release(slot)

    @torch.inference_mode()
    def step(self) -> list[Output]:
        """Admit what fits, advance every busy slot once, and hand out what is final."""
        while self.waiting and self.free:
            self._admit(*self.waiting.popleft())
        outputs = []
        for piece in self.sampler.step() if self.running else []:
            running = self.running[piece.slot]
            media = None if piece.data is None else running.render.push(piece.data)
            if piece.done:
                media = _joined([media, running.render.finish()])
                self._release(piece.slot)
            outputs.append(Output(running.ticket, media, piece.done))
        return outputs

    def _admit(self, ticket: int, request: Request) -> None:
        slot = self.free.pop()
        batch = self.family.collate([self.row(request)], self.fitted).to(self.device)
        self.sampler.admit([slot], batch, [request.seed], [request.options])
        self.running[slot] = _Running(ticket, self.renderer.open())

    def _release(self, slot: int) -> None:
        del self.running[slot]
        self.free.append(slot)
        self.free.sort(reverse=True)

    def row(self, request: Request) -> Row:
        """A request as a row: its media through the columns' networks, as training rows went."""
        prompt = self.family.prompt(request)
        row: Row = {**prompt.fields, "id": "request", "weight": 1.0}
        modalities = {role: _modality(media) for role, media in prompt.media.items()}
        for column in self.columns:
            for role in role_columns(column, modalities):  # type: ignore[arg-type]
                row[f"{role}.{column.name}"] = self._encode(column, prompt.media[role])
        return row

    def _encode(self, column: Column, media: Media) -> np.ndarray:
        network = self._networks.get(column.id())
        if network is None:
            network = self._networks[column.id()] = column.encoder.load(self.device)
        value = resampled(media, network.sample_rate_hz) if isinstance(media, Audio) else media
        return network.encode_batch([value])[0].astype(column.dtype)  # type: ignore[list-item]

    def media(self, pieces: Sequence[Any]) -> Media:
        """A request's outputs joined."""
        joined = _joined(pieces)
        if self.renderer.modality == "audio":
            return Audio(joined, self.renderer.sample_rate_hz)
        return joined  # type: ignore[no-any-return]


class Generator:
    """A checkpoint opened for generation: ``avray.load``."""

    def __init__(self, engine: Engine, checkpoint: Checkpoint) -> None:
        self.engine, self.checkpoint = engine, checkpoint

    @classmethod
    def open(cls, path: str | Path, device: str = "cpu", slots: int = 1) -> Generator:
        """A run, a link or a checkpoint folder; its averaged weights where it has them. CheckpointError for what is none."""
        checkpoint = Checkpoint.open(path)
        family = family_from_settings(checkpoint.family)
        with torch.device("meta"):
            model = family.build(checkpoint.fitted)
        checkpoint.load_into(model)
        return cls(Engine(family, model, checkpoint.fitted, slots, device), checkpoint)

    def check(self, request: Request) -> None:
        """ValueError, naming the field, for a request this model cannot take."""
        self.engine.family.prompt(request)

    def generate(self, prompt: str | None = None, audio: Audio | str | Path | None = None, *, seconds: float | None = None,
                 task: str | None = None, options: Options | None = None, seed: int = 0) -> Generated:
        """One request. ``options`` holds what else there is (temperature, guidance …); ``seconds`` goes before its own."""
        return self.generate_many([make_request(prompt, audio, seconds, task, options, seed)])[0]

    def stream(self, prompt: str | None = None, audio: Audio | str | Path | None = None, *, seconds: float | None = None,
               task: str | None = None, options: Options | None = None, seed: int = 0) -> Iterator[Media]:
        """The same, piece by piece as it is made; the pieces joined are what ``generate`` gives. Closing it stops."""
        engine = self.engine
        ticket = engine.submit(make_request(prompt, audio, seconds, task, options, seed))
        try:
            done = False
            while not done:
                for output in engine.step():
                    done |= output.done
                    if output.media is not None and len(_last_axis(output.media)):
                        yield engine.media([output.media])
        finally:
            engine.cancel(ticket)

    def generate_many(self, requests: Sequence[Request]) -> list[Generated]:
        """All of them, as many side by side as there are slots, in the order given."""
        engine = self.engine
        tickets = [engine.submit(request) for request in requests]
        pieces: dict[int, list[Any]] = {ticket: [] for ticket in tickets}
        while engine.busy:
            for output in engine.step():
                if output.media is not None and output.ticket in pieces:
                    pieces[output.ticket].append(output.media)
        return [Generated(engine.media(pieces[ticket]), request.seed, request.options, request.audio)
                for ticket, request in zip(tickets, requests, strict=True)]


def make_request(prompt: str | None, audio: Audio | str | Path | None, seconds: float | None, task: str | None,
                 options: Options | None, seed: int) -> Request:
    given = (options or Options()).given() | ({} if seconds is None else {"seconds": seconds})
    sound = audio if audio is None or isinstance(audio, Audio) else read_audio(str(audio))
    return Request(text=prompt, audio=sound, task=task, options=Options(**given), seed=seed)  # type: ignore[arg-type]


def resampled(audio: Audio, sample_rate_hz: int) -> np.ndarray:
    """Mono float32 ``[samples]`` at another rate (soxr, high quality). ValueError for no samples or samples not finite."""
    mono = audio.samples.mean(0, dtype=np.float32)
    if not len(mono):
        raise ValueError("audio holds no samples: give a recording that is not empty.")
    if not np.isfinite(mono).all():
        raise ValueError("audio holds samples that are not finite numbers.")
    if audio.sample_rate_hz == sample_rate_hz:
        return mono
    return soxr.resample(mono, audio.sample_rate_hz, sample_rate_hz)  # type: ignore[no-any-return]


def _modality(media: Media) -> str:
    return "audio" if isinstance(media, Audio) else "video" if isinstance(media, Video) else "text"


def _last_axis(media: Any) -> Any:
    return media if isinstance(media, str) else media.reshape(-1)


def _joined(pieces: Sequence[Any]) -> Any:
    """Text end to end; sound ``[channels, samples]`` along time; frames ``[time, …]`` one after another."""
    pieces = [piece for piece in pieces if piece is not None]
    if not pieces or isinstance(pieces[0], str):
        return "".join(pieces)
    return np.concatenate(pieces, axis=1 if pieces[0].ndim == 2 else 0)
