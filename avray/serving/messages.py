"""What travels between the gateway and a model's replica. No torch here, as in all of the gateway.

Sound travels as 16-bit samples, which every format ends in and half the bytes of float32. What went wrong travels as a
value: an exception would bring a traceback with paths along.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Ask:
    """One thing to generate, as the gateway checked it. ``options`` are those of ``avray.family.Options`` that were
    given; ``audio`` and ``video`` are a file's bytes. With ``embeds`` the numbers are wanted, as JSON."""

    text: str | None = None
    audio: bytes | None = None
    video: bytes | None = None
    task: str | None = None
    options: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0
    stream: bool = False
    """False: all of it in one Part."""
    embeds: bool = False
    sound: bool = False
    """Of a clip: with that of the same prompt."""


@dataclass(frozen=True)
class Part:
    """What is final now: interleaved 16-bit samples, little-endian, or text; or frames ``[time, *size, 3]`` uint8,
    where ``frame_rate_hz`` is above 0, whose ``sound`` is such samples."""

    data: bytes | str
    done: bool
    sample_rate_hz: int = 0
    channels: int = 0
    checkpoint: str = ""
    """Of the replica that made it, which an update may just be replacing."""
    heard_s: float = 0.0
    """Of the recording sent along."""
    frame_rate_hz: float = 0.0
    size: tuple[int, int] = (0, 0)
    """Height and width."""
    sound: bytes = b""

    @property
    def seconds(self) -> float:
        """Of sound or pictures; 0 of text."""
        if self.frame_rate_hz:
            return len(self.data) / (3 * self.size[0] * self.size[1]) / self.frame_rate_hz
        return len(self.data) / (2 * self.channels * self.sample_rate_hz) if self.channels else 0.0


@dataclass(frozen=True)
class Refusal:
    """Nothing (more) comes. ``status`` is HTTP's; below 500 it is the request's fault."""

    status: int
    message: str
    param: str | None = None


TEXT_ROUTES = ("/v1/completions", "/v1/audio/transcriptions")
EMBEDDING_ROUTES = ("/v1/embeddings", "/v1/media/embeddings")
VIDEO_ROUTES = ("/v1/videos", "/v1/videos/sync")
Takes = Literal["nothing", "text", "audio", "text+audio", "video"]


@dataclass(frozen=True)
class Card:
    """What a model is and answers, found by asking its family about requests of each kind."""

    name: str
    family: str
    modality: str
    takes: tuple[Takes, ...]
    options: Mapping[str | None, tuple[str, ...]]
    """Fields of ``avray.family.Options`` that mean something, by task; None where there are no tasks."""
    sample_rate_hz: int
    segment_s: float
    checkpoint: str
    """The SHA-256 of its manifest."""
    step: int
    created: int
    slots: int
    max_replicas: int
    tasks: Mapping[str, str] = field(default_factory=dict)
    """Each task's modality, where a request's task chooses what it gets."""
    embeds: tuple[str, ...] = ()
    """The tasks whose embeddings may be asked for."""
    video_size: str = ""
    """``width``x``height`` of the clips it makes."""

    def tasks_of(self, route: str) -> list[str]:
        """Those that a route answers."""
        if route in EMBEDDING_ROUTES:
            return [*self.embeds]
        modality = "text" if route in TEXT_ROUTES else "video" if route in VIDEO_ROUTES else "audio"
        return [task for task, made in self.tasks.items() if made == modality]

    @property
    def routes(self) -> tuple[str, ...]:
        """The HTTP routes that this model answers."""
        asked = any(kind in self.takes for kind in ("nothing", "text"))
        heard = any(kind in self.takes for kind in ("audio", "text+audio", "video"))
        routes: tuple[str, ...] = ()
        modalities = set(self.tasks.values()) or {self.modality}
        if "audio" in modalities:
            routes += (("/v1/audio/generate", "/v1/audio/speech") if asked else ()) + (
                ("/v1/audio/continuations",) if heard else ())
        if "video" in modalities and asked:
            routes += VIDEO_ROUTES
        if self.embeds:
            routes += EMBEDDING_ROUTES
        if "text" in modalities:
            routes += (("/v1/completions",) if asked else ()) + (("/v1/audio/transcriptions",) if heard else ())
        return routes

    @property
    def capacity(self) -> int:
        """Requests under way at once, at most."""
        return self.slots * self.max_replicas
