"""The contract that every model family meets, and nothing else.

A family is a small frozen dataclass that *is* its configuration: cheap to build, compare and pickle; it opens no
weights until asked. The platform owns the loop, the optimiser, precision, checkpoints, sweeps and serving, and calls a
family through these methods only, in this order:

    segment(rows) -> examples            once per recording, while preparing
    columns(fitted) -> columns           the frozen networks whose output it trains on
    fit(rows) -> Fitted                  what is learnt from the data before the loop
    collate(rows) -> Batch               named tensors, and what each loss term is divided by
    build(fitted) -> nn.Module           one root module, also on the meta device
    init(model, generator)               base weights, once, before step 0
    loss(model, batch, generator)        sums, so that masks, accumulation and uneven ranks stay right
    question(example) -> Question        a held-out example asked as a request: samples, evaluation
    prompt(request) -> Prompt            a request takes the same columns and collate as training does
    sampler(model, fitted, slots)        how every kind of model generates
    renderer(fitted, device)             what turns its pieces into sound, pictures or text

Nothing here imports Ray.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from avray.media import Audio, Video

Row = dict[str, Any]
"""One manifest row: ``id``, ``audio``/``target_audio``/``video`` (absolute path or URL), ``text``, ``task``,
``start_s``, ``duration_s``, ``group``, ``split``, ``weight`` and whatever else the input carried."""

Modality = Literal["audio", "video", "text"]
Media = Audio | Video | str


@dataclass(frozen=True)
class Unit:
    """A span of one source: the thing that is encoded once, whoever uses it.

    ``source`` is a path or URL for audio and video, the text itself for text. ``recipe`` names a seeded change made
    before the frozen encoder (``"noise:snr_db=0:seed=3"``) and is part of the cache key.
    """

    source: str
    modality: Modality
    start_s: float = 0.0
    duration_s: float = 0.0
    recipe: str = ""


@dataclass(frozen=True)
class Example:
    """One training row before its columns exist: the unit behind each role, and plain fields (text, task, …)."""

    id: str
    units: Mapping[str, Unit]
    fields: Mapping[str, Any] = field(default_factory=dict)
    weight: float = 1.0


class FrameStream(Protocol):
    """Encodes or decodes one recording in pieces; the pieces joined are the whole, whatever their sizes were."""

    def push(self, piece: np.ndarray) -> np.ndarray:
        """Take the next piece and return what is now final (possibly empty)."""

    def finish(self) -> np.ndarray:
        """No more input: return the rest."""


class Network(Protocol):
    """A loaded frozen audio network: float32 mono ``[samples]`` in, frames ``[time, *shape]`` out."""

    sample_rate_hz: int
    frame_rate_hz: float

    def encode_batch(self, recordings: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Whole recordings ``[samples]`` of any lengths -> frames ``[time, *shape]`` of each, batched by length."""

    def stream(self) -> FrameStream:
        """An encoder for one long recording; its frames are those of ``encode_batch`` on the whole."""


class Encoder(Protocol):
    """The configuration of a frozen network: hashable, picklable, opens nothing until ``load``."""

    def column_id(self) -> str:
        """A name that changes with the network, its revision, its settings and its fitted state."""

    def load(self, device: torch.device | str) -> Network:
        """Open the weights. MissingDependency if they are not at hand."""


@dataclass(frozen=True)
class Column:
    """What a frozen network gives for each unit of one modality: stored flat in Parquet, shape beside it.

    ``dtype`` is float16 for latents, uint16 for codes. ``context_s`` of audio before a span is encoded and thrown
    away when a recording is entered in the middle, so that a network with memory is warm.
    """

    name: str
    encoder: Encoder
    modality: Modality = "audio"
    dtype: Literal["float16", "float32", "uint16", "int32"] = "float16"
    roles: tuple[str, ...] | None = None
    context_s: float = 2.0

    def id(self) -> str:
        return f"{self.name}-{self.encoder.column_id()}-{self.dtype}"


@dataclass(frozen=True)
class Fitted:
    """What was learnt from the data before the loop (k-means codes, a vocabulary, mean and scale). Kept in the
    checkpoint as safetensors and JSON, never pickled."""

    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)

    def digest(self) -> str:
        """16 hex digits of the content."""
        digest = hashlib.blake2b(json.dumps(dict(self.data), sort_keys=True).encode(), digest_size=8)
        for name in sorted(self.arrays):
            array = np.ascontiguousarray(self.arrays[name])
            digest.update(f"{name}:{array.dtype}:{array.shape}".encode())
            digest.update(array.tobytes())
        return digest.hexdigest()


@dataclass
class Batch:
    """Named tensors, batch dimension first, and the denominator of each loss term.

    ``counts[name]`` is what the term is divided by once summed over the whole global batch (unmasked frames, tokens).
    It depends on the data alone, so every rank can add them up before the forward pass and masks, accumulation,
    padding rows (weight 0) and uneven ranks all stay exact.
    """

    tensors: dict[str, Tensor]
    counts: dict[str, float]
    ids: list[str] = field(default_factory=list)

    def to(self, device: torch.device | str) -> Batch:
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in self.tensors.items()}
        return Batch(moved, self.counts, self.ids)

    def pin(self) -> Batch:
        return Batch({name: tensor.pin_memory() for name, tensor in self.tensors.items()}, self.counts, self.ids)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]


@dataclass(frozen=True)
class Options:
    """How one request wants to be generated. None means the family's default; a family refuses, with a ValueError
    naming the option, what it has no use for."""

    seconds: float | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    guidance_scale: float | None = None
    aligned_guidance_scale: float | None = None
    num_steps: int | None = None
    beams: int | None = None

    def given(self) -> dict[str, float]:
        return {name: value for name, value in vars(self).items() if value is not None}

    def allow(self, *names: str) -> None:
        """ValueError for an option that was given and is not among ``names``."""
        for name in self.given():
            if name not in names:
                raise ValueError(f"{name} has no meaning for this model; it takes {', '.join(names)}.")


@dataclass(frozen=True)
class Request:
    """One thing to generate."""

    text: str | None = None
    audio: Audio | None = None
    video: Video | None = None
    task: str | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)
    options: Options = Options()
    seed: int = 0


@dataclass(frozen=True)
class Question:
    """A held-out example asked as a request: what is given, and the sound (or text) that was the answer."""

    prompt: Unit | None = None
    target: Unit | None = None
    text: str | None = None
    seconds: float | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Prompt:
    """A request as a row-to-be: each role's media (to be encoded by the columns of its modality) and plain fields."""

    media: Mapping[str, Media] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Piece:
    """What one step gave one slot. ``data`` is for the family's renderer; a slot is free after ``done``."""

    slot: int
    data: Any
    done: bool = False


class Sampler(Protocol):
    """Generates for a fixed number of slots; one thread calls it. A step is one token frame, or one solver step,
    each slot at its own time; a one-shot model ends in one."""

    slots: int

    def admit(self, slots: Sequence[int], batch: Batch, seeds: Sequence[int], options: Sequence[Options]) -> None:
        """Start row i of ``batch`` in ``slots[i]``, all of which are free."""

    def step(self) -> list[Piece]:
        """Advance every busy slot once."""

    def drop(self, slot: int) -> None:
        """Free a slot at once; no more pieces come from it."""


class Render(Protocol):
    """Turns one request's pieces into media as they come."""

    def push(self, data: Any, last: bool) -> Any:
        """Media that is final now: float32 ``[channels, samples]``, a Video of the next frames, text, or None; or, for
        sound that a codec has to make, ``codecs.together.ToDecode``, which the engine does for all requests at once.
        ``data`` is a piece's, and ``last`` whether it was the last one."""


class Renderer(Protocol):
    """What a family's output is, and how to make it. ``open()`` starts one request's rendering."""

    modality: Modality
    sample_rate_hz: int
    """Of the audio; 0 where there is none. A renderer whose requests choose by their task what they get has a mapping
    ``tasks`` from each task to its modality as well."""

    def open(self) -> Render: ...


@dataclass
class Mean:
    """A weighted mean that merges: the simplest Metric."""

    total: float = 0.0
    count: float = 0.0

    def add(self, value: float, count: float = 1.0) -> None:
        self.total += value * count
        self.count += count

    def merge(self, other: Mean) -> None:
        self.total += other.total
        self.count += other.count

    def value(self) -> float:
        return self.total / self.count if self.count else float("nan")


class Perplexity(Mean):
    """Of nats: the exponential of their mean."""

    def value(self) -> float:
        return math.exp(min(super().value(), 700.0)) if self.count else float("nan")


class Merging(Protocol):
    """A figure that grows."""

    def merge(self, other: Any) -> None: ...

    def value(self) -> float: ...


class Metric(Protocol):
    """A figure over generated media, fed one example at a time and merged across workers."""

    def update(self, generated: Media, target: Media | None, row: Row) -> None: ...

    def merge(self, other: Any) -> None: ...

    def value(self) -> float: ...


@runtime_checkable
class Judged(Protocol):
    """What a family may add: figures of how well it foresees held-out rows, given the truth so far. ``evaluate.py``
    reports them beside the metrics."""

    def figures(self, model: nn.Module, batch: Batch, fitted: Fitted) -> Mapping[str, Merging]:
        """One batch's; those of the same name merge over batches."""


@runtime_checkable
class Choosy(Protocol):
    """What a family may add: rows that it cannot learn from are rejected before the split, with a reason."""

    def refusal(self, row: Row) -> str | None:
        """Why a manifest row cannot be used; None for one that can."""


@runtime_checkable
class ByTask(Protocol):
    """What a family of several tasks may add: figures for each of them, which ``evaluate.py`` reports as one table.
    An example's task is its field ``task``."""

    def task_metrics(self, task: str) -> dict[str, Callable[[], Metric]]: ...


@runtime_checkable
class Family(Protocol):
    """See the module's docstring for the order of calls. Rows handed to ``fit`` and ``collate`` are an example's
    fields plus ``"<role>.<column>"`` arrays ``[time, *shape]``, ``id`` and ``weight`` (0 for padding and for rows
    rejected after planning, whose arrays may be missing)."""

    segment_s: float

    def segment(self, rows: Sequence[Row]) -> list[Example]:
        """Examples of one recording. ``rows`` all name the same media file, in order of start; a split's span of a
        long recording comes as a row of its own."""

    def columns(self, fitted: Fitted | None) -> list[Column]:
        """With None, what ``fit`` wants to see; with its result, what training wants."""

    def fit(self, rows: Iterator[Row]) -> Fitted:
        """Learn from a sample of training rows, in order."""

    def collate(self, rows: Sequence[Row], fitted: Fitted) -> Batch: ...

    def build(self, fitted: Fitted) -> nn.Module: ...

    def init(self, model: nn.Module, generator: torch.Generator) -> None: ...

    @property
    def terms(self) -> Mapping[str, float]:
        """Each loss term's weight in the total."""

    def loss(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Each term's sum over the batch (a scalar); the platform divides by the global count."""

    def baselines(self, batch: Batch, fitted: Fitted) -> dict[str, dict[str, Tensor]]:
        """What trivial predictors lose on this batch: name -> term -> sum."""

    def question(self, example: Example) -> Question:
        """What to ask with a held-out example, and the answer to hold the result against."""

    def prompt(self, request: Request) -> Prompt:
        """ValueError, naming the field, for a request this model cannot take."""

    def sampler(self, model: nn.Module, fitted: Fitted, slots: int) -> Sampler: ...

    def renderer(self, fitted: Fitted, device: torch.device | str) -> Renderer: ...

    def metrics(self) -> dict[str, Callable[[], Metric]]:
        """The figures ``evaluate.py`` reports on what this family generates."""


def role_columns(column: Column, modalities: Mapping[str, Modality]) -> Iterable[str]:
    """Names of the roles a column is computed for: those of its modality, or the ones it lists."""
    return [role for role, modality in modalities.items()
            if modality == column.modality and (column.roles is None or role in column.roles)]
