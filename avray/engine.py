"""One engine for every kind of model: it admits, steps and drops requests over a family's ``Sampler``. No Ray in it.

``generate.py``, validation samples and serving drive this same loop. Slots are fixed in number and requests are encoded
and admitted one by one, because in float32 a row's bits change with the number of rows: so a request gives the same
result alone and in company. Everything here belongs to one thread; a second one that calls torch brings its own team of
OpenMP threads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import soxr
import torch
from torch import nn

from avray.checkpoint import Checkpoint
from avray.codecs.together import ToDecode, decode
from avray.errors import DataError
from avray.family import Column, Family, Fitted, Media, Modality, Network, Options, Render, Request, Row, role_columns
from avray.media import Audio, Video, joined, read_audio, resampled_length, rescaled
from avray.registry import saved_family


@dataclass(frozen=True)
class Output:
    """What a request got from one step: media that is final now (None where nothing is yet) and whether it was the
    last. With ``error`` the request could not be started, and nothing came of it."""

    ticket: int
    media: Any
    done: bool
    error: Exception | None = None


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

    @property
    def audio(self) -> Audio:
        """ValueError where the model makes none."""
        if not isinstance(self.media, Audio):
            raise ValueError(f"This model makes no audio but {_modality(self.media)}.")
        return self.media

    def with_prompt(self) -> Generated:
        """The given recording, as it was but for the output's rate and channels, in front of what was generated."""
        if self.prompt is None or not isinstance(self.media, Audio):
            raise ValueError("include_prompt=true needs a recording to continue.")
        before = resampled(self.prompt, self.media.sample_rate_hz)[None].repeat(len(self.media.samples), 0)
        return replace(self, media=replace(self.media, samples=np.concatenate([before, self.media.samples], 1)))


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

    def check(self, request: Request) -> None:
        """ValueError, naming the field, for a request this model cannot take."""
        if request.audio is not None:
            check_audio(request.audio)
        self.family.prompt(request)

    def submit(self, request: Request) -> int:
        """A ticket. ValueError as ``check`` raises it."""
        self.check(request)
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
        outputs = []
        while self.waiting and self.free:
            ticket, request = self.waiting.popleft()
            try:
                self._admit(ticket, request)
            except (ValueError, DataError) as error:
                outputs.append(Output(ticket, None, True, error))
        pieces = self.sampler.step() if self.running else []
        made = [self.running[piece.slot].render.push(piece.data, piece.done) for piece in pieces]
        sound = iter(decode([one for one in made if isinstance(one, ToDecode)]))
        for piece, media in zip(pieces, made, strict=True):
            media = next(sound)[None] if isinstance(media, ToDecode) else media
            outputs.append(Output(self.running[piece.slot].ticket, media, piece.done))
            if piece.done:
                self._release(piece.slot)
        return outputs

    def _admit(self, ticket: int, request: Request) -> None:
        batch = self.family.collate([self.row(request)], self.fitted).to(self.device)
        render = self.renderer.open()
        self.sampler.admit([self.free[-1]], batch, [request.seed], [request.options])
        self.running[self.free.pop()] = _Running(ticket, render)

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
            for role in role_columns(column, modalities):
                row[f"{role}.{column.name}"] = self._encode(column, prompt.media[role])
        return row

    def _encode(self, column: Column, media: Media) -> np.ndarray:
        network = self._networks.get(column.id())
        if network is None:
            network = self._networks[column.id()] = column.encoder.load(self.device)
        value: Any = media
        if isinstance(media, Audio):
            value = resampled(media, network.sample_rate_hz)
        elif isinstance(media, Video):
            value = rescaled(media, network.sampling_hz, network.size)  # type: ignore[attr-defined]
        return network.encode_batch([value])[0].astype(column.dtype)

    def media(self, pieces: Sequence[Any]) -> Media:
        """A request's outputs joined."""
        whole = _joined(pieces)
        if whole is None and self.renderer.modality == "audio" and not hasattr(self.renderer, "tasks"):
            whole = np.zeros((1, 0), np.float32)
        if whole is None or isinstance(whole, str | Video):
            return whole or ""
        return Audio(whole, self.renderer.sample_rate_hz)


class Generator:
    """A checkpoint opened for generation: ``avray.load``."""

    def __init__(self, engine: Engine, checkpoint: Checkpoint | None = None) -> None:
        self.engine, self.checkpoint = engine, checkpoint
        self._outputs: dict[int, list[Output]] = {}

    @classmethod
    def open(cls, path: str | Path, device: str = "cpu", slots: int = 1, family: str | None = None) -> Generator:
        """A run, a link or a checkpoint folder; its averaged weights where it has them. ``family`` is the dotted path
        of a class of one's own. CheckpointError for what is none."""
        checkpoint = Checkpoint.open(path)
        own = saved_family(checkpoint.family, family)
        with torch.device("meta"):
            model = own.build(checkpoint.fitted)
        checkpoint.load_into(model)
        return cls(Engine(own, model, checkpoint.fitted, slots, device), checkpoint)

    def check(self, request: Request) -> None:
        """ValueError, naming the field, for a request this model cannot take."""
        self.engine.check(request)

    def generate(self, prompt: str | None = None, audio: Audio | str | Path | None = None, *,
                 video: Video | None = None, task: str | None = None, seconds: float | None = None,
                 temperature: float | None = None, options: Options | None = None, seed: int = 0) -> Generated:
        """One request. ``options`` holds what else there is (top_k, guidance …); ``seconds`` and ``temperature`` go
        before its own. ValueError, naming it, for what this model has no use for; DataError for a file that is none."""
        return self.generate_many([make_request(prompt, audio, video, task, seconds, temperature, options, seed)])[0]

    def stream(self, prompt: str | None = None, audio: Audio | str | Path | None = None, *, video: Video | None = None,
               task: str | None = None, seconds: float | None = None, temperature: float | None = None,
               options: Options | None = None, seed: int = 0) -> Iterator[Media]:
        """The same, piece by piece as it is made; the pieces joined are what ``generate`` gives. Closing it stops. Up
        to ``slots`` streams may be open and advance together."""
        request = make_request(prompt, audio, video, task, seconds, temperature, options, seed)
        return self.stream_request(request)

    def stream_request(self, request: Request) -> Iterator[Media]:
        """``stream`` of a Request."""
        self.check(request)
        return self._stream(request)

    def _stream(self, request: Request) -> Iterator[Media]:
        ticket = self._submit(request)
        try:
            done = False
            while not done:
                if not self._outputs[ticket]:
                    self._step()
                    continue
                output = self._outputs[ticket].pop(0)
                done = output.done
                if output.error is not None:
                    raise output.error
                if output.media is not None and not _is_empty(output.media):
                    yield self.engine.media([output.media])
        finally:
            self._forget(ticket)

    def generate_many(self, requests: Sequence[Request]) -> list[Generated]:
        """All of them, as many side by side as there are slots, in the order given. ValueError for the first that
        cannot be made, before any is."""
        for request in requests:
            self.check(request)
        tickets = [self._submit(request) for request in requests]
        try:
            while not all(self._outputs[ticket] and self._outputs[ticket][-1].done for ticket in tickets):
                self._step()
            return [self._generated(request, self._outputs[ticket])
                    for ticket, request in zip(tickets, requests, strict=True)]
        finally:
            for ticket in tickets:
                self._forget(ticket)

    def _generated(self, request: Request, outputs: Sequence[Output]) -> Generated:
        if outputs[-1].error is not None:
            raise outputs[-1].error
        media = self.engine.media([output.media for output in outputs])
        return Generated(media, request.seed, request.options, request.audio)

    def _submit(self, request: Request) -> int:
        ticket = self.engine.submit(request)
        self._outputs[ticket] = []
        return ticket

    def _step(self) -> None:
        """Advance everything that is under way; each output waits for whoever asked for it."""
        for output in self.engine.step():
            if output.ticket in self._outputs:
                self._outputs[output.ticket].append(output)

    def _forget(self, ticket: int) -> None:
        self.engine.cancel(ticket)
        self._outputs.pop(ticket, None)


def make_request(prompt: str | None, audio: Audio | str | Path | None, video: Video | None, task: str | None,
                 seconds: float | None, temperature: float | None, options: Options | None, seed: int) -> Request:
    """A request from plain arguments. DataError for a file that is no recording."""
    options = options or Options()
    options = replace(options, seconds=options.seconds if seconds is None else seconds,
                      temperature=options.temperature if temperature is None else temperature)
    sound = audio if audio is None or isinstance(audio, Audio) else read_audio(str(audio))
    return Request(text=prompt, audio=sound, video=video, task=task, options=options, seed=seed)


def check_audio(audio: Audio) -> None:
    """ValueError for what is no recording."""
    if audio.samples.ndim != 2 or not audio.samples.size:
        raise ValueError(f"audio must be samples [channels, time], at least one, got shape {audio.samples.shape}.")
    if not audio.sample_rate_hz > 0:
        raise ValueError(f"audio must have a sample rate above 0 Hz, got {audio.sample_rate_hz}.")
    if not np.isfinite(audio.samples).all():
        raise ValueError("audio holds samples that are not finite numbers.")


def resampled(audio: Audio, sample_rate_hz: int) -> np.ndarray:
    """Mono float32 ``[samples]`` at another rate (soxr, high quality), of the length every reader here keeps to."""
    mono = audio.samples.mean(0, dtype=np.float32)
    if audio.sample_rate_hz == sample_rate_hz:
        return mono
    length = resampled_length(len(mono), audio.sample_rate_hz, sample_rate_hz)
    made = soxr.resample(mono, audio.sample_rate_hz, sample_rate_hz)[:length]
    return np.pad(made, (0, length - len(made)))


def _modality(media: Media) -> Modality:
    return "audio" if isinstance(media, Audio) else "video" if isinstance(media, Video) else "text"


def _is_empty(media: Any) -> bool:
    return not (media.frames.size if isinstance(media, Video) else media if isinstance(media, str) else media.size)


def _joined(pieces: Sequence[Any]) -> Any:
    """Text end to end; sound ``[channels, samples]`` along time; clips one after another; None for nothing."""
    pieces = [piece for piece in pieces if piece is not None]
    if not pieces:
        return None
    if isinstance(pieces[0], str):
        return "".join(pieces)
    return joined(pieces) if isinstance(pieces[0], Video) else np.concatenate(pieces, axis=1)
