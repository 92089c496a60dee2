"""How ``codec_lm`` generates: slots that each stand at their own step of their own window, advanced together.

A step embeds each slot's last tokens, runs the cached transformer once for all slots (twice where a text guides), and
draws; a frame goes out as soon as its last codebook is drawn. What comes after the model is always the same shape, so
a slot's tokens depend on its request, its seed and the number of slots alone.

A window that is full slides by whole frames: the later half of its frames is encoded again from position 0 and the
text, if any, stays in front. That keeps the codebooks' phase and what the model saw in training (a window that begins
on a frame), and costs one prompt's encoding for every half context. A prompt that does not fit starts from its last
half context in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from avray.codecs.base import Codec
from avray.codecs.together import ToDecode
from avray.family import Batch, FrameStream, Modality, Options, Piece
from avray.nn.kv_cache import CachedTransformer, Weights
from avray.nn.patterns import NOTHING, Layout
from avray.nn.sampling import Draw, Drawer, uniforms

if TYPE_CHECKING:
    from avray.families.codec_lm import CodecTransformer


_AHEAD = 256


@dataclass(frozen=True)
class Generation:
    """Options with their defaults filled in."""

    seconds: float
    temperature: float
    top_k: int | None
    top_p: float | None
    guidance_scale: float

    def __post_init__(self):
        if not 0 < self.seconds < math.inf:
            raise ValueError(f"seconds = {self.seconds} must be above 0 and finite.")
        if not 0 <= self.guidance_scale < math.inf:
            raise ValueError(f"guidance_scale = {self.guidance_scale} must be 0 or more; 1 is no guidance.")
        self.draw  # noqa: B018 - checks the other three

    @property
    def draw(self) -> Draw:
        return Draw(self.temperature, self.top_k, self.top_p)


class _Slot:
    """One request under way. Steps and frames are counted from the start of its window."""

    def __init__(self, codes: np.ndarray, text: Tensor, seed: int, how: Generation, num_frames: int, layout: Layout,
                 context: int):
        self.text, self.seed, self.draw, self.layout = text, seed, how.draw, layout
        self.scale = how.guidance_scale if len(text) else 1.0
        self.room = context - len(text)
        if len(codes) * layout.stride >= self.room:
            codes = codes[len(codes) - self.room // 2 // layout.stride :]
        self.tokens = np.full((self.room + layout.lag, layout.num_streams), NOTHING)
        known = layout.tokens(codes)
        self.tokens[: len(known)] = known
        self.step = len(codes) * layout.stride
        self.done_frames = len(codes)
        self.end_frame = len(codes) + num_frames
        self.drawn_at: list[list[tuple[int, int]]] = [[] for _ in range(layout.stride)]
        for codebook, delay in enumerate(layout.delays):
            self.drawn_at[delay % layout.stride].append((codebook, layout.streams[codebook]))
        self.delays, self.streams, self.offsets = map(np.array, (layout.delays, layout.streams, layout.offsets))
        self.drawn = 0
        self._numbers = np.zeros((0, layout.num_streams))

    @property
    def numbers(self) -> np.ndarray:
        """The step's uniform numbers ``[streams]``, made a few hundred steps ahead."""
        if self.drawn % _AHEAD == 0:
            self._numbers = uniforms(self.seed, self.drawn, _AHEAD, self.layout.num_streams)
        return self._numbers[self.drawn % _AHEAD]

    def slide(self) -> None:
        """Move the later half of the frames to the window's start; nothing stands before their first step."""
        stride = self.layout.stride
        frames = self.step // stride - self.room // 2 // stride
        self.tokens[: len(self.tokens) - frames * stride] = self.tokens[frames * stride :].copy()
        self.tokens[len(self.tokens) - frames * stride :] = NOTHING
        for step in range(self.layout.lag):
            for stream in range(self.layout.num_streams):
                if self.layout.codebook_at(step, stream) is None:
                    self.tokens[step, stream] = NOTHING
        self.step -= frames * stride
        self.done_frames -= frames
        self.end_frame -= frames

    def take(self, ids: np.ndarray, stop_id: int | None) -> np.ndarray | None:
        """Put the step's drawn ids where nothing is known yet, and return the codes of frames that are now complete,
        None where there are none."""
        layout = self.layout
        for codebook, stream in self.drawn_at[self.step % layout.stride]:
            frame = (self.step - layout.delays[codebook]) // layout.stride
            if 0 <= frame < self.end_frame and self.tokens[self.step, stream] == NOTHING:
                self.tokens[self.step, stream] = ids[stream]
                if codebook == 0 and ids[stream] == stop_id:
                    self.end_frame = frame
        self.step += 1
        self.drawn += 1
        first = self.done_frames
        self.done_frames = max(first, min(layout.num_frames(self.step), self.end_frame))
        if self.done_frames == first and not self.done:
            return None
        at = np.arange(first, self.done_frames)[:, None] * layout.stride + self.delays
        return self.tokens[at, self.streams] - self.offsets

    @property
    def done(self) -> bool:
        return self.done_frames >= self.end_frame


class CodecSampler:
    """A ``Sampler`` whose pieces are codes ``[frames, codebooks]``."""

    def __init__(self, model: CodecTransformer, layout: Layout, frame_rate_hz: float, stop: bool, slots: int,
                 weights: Weights, cuda_graph: bool, generation: Callable[[Options], Generation]):
        self.model, self.layout, self.frame_rate_hz, self.slots = model.eval(), layout, frame_rate_hz, slots
        self.stop_id = layout.cardinality - 1 if stop else None
        self.generation = generation
        self.context = model.transformer.config.context
        self.device = model.transformer.norm.weight.device
        self.new_cache = lambda: CachedTransformer(model.transformer, slots, weights, cuda_graph)
        self.cache = self.new_cache()
        self.free_cache: CachedTransformer | None = None  # made for the first request that is guided
        self.busy: dict[int, _Slot] = {}
        self.drawer = Drawer([Draw()] * slots, self.device)
        # The embeddings, then a row for nothing and one for the start: a step's input is one lookup.
        table, start = model.transformer.embedding.weight, model.start
        nothing = torch.zeros_like(table[:1])
        self.table = torch.cat([table, nothing, nothing if start is None else start[None]]).detach()
        self.nothing, self.start = len(table), len(table) + 1
        self.first = np.array([layout.offsets[s] if layout.num_streams > 1 else 0 for s in range(layout.num_streams)])
        self.idle_numbers = np.full(layout.num_streams, 0.5)
        self.allowed = self._allowed()

    def _allowed(self) -> Tensor | None:
        """0 or -inf for each id ``[phase, stream, id]`` of a step, None where every id is always allowed: an id of
        another codebook never is, nor is a stop in any codebook but the first."""
        layout, ids = self.layout, self.layout.vocabulary // self.layout.num_streams
        table = np.full((layout.stride, layout.num_streams, ids), -np.inf, np.float32)
        for k, (delay, stream, offset) in enumerate(zip(layout.delays, layout.streams, layout.offsets, strict=True)):
            begin = offset - self.first[stream]
            usable = layout.cardinality - (self.stop_id is not None and k > 0)
            table[delay % layout.stride, stream, begin : begin + usable] = 0
        return torch.from_numpy(table).to(self.device) if np.isinf(table).any() else None

    def admit(self, slots: Sequence[int], batch: Batch, seeds: Sequence[int], options: Sequence[Options]) -> None:
        for i, slot in enumerate(slots):
            assert slot not in self.busy, f"slot {slot} is busy"
            codes = batch["codes"][i].cpu().numpy()
            text = batch["text"][i, : int(batch["start"][i])].to(self.device)
            how = self.generation(options[i])
            num_frames = max(1, round(how.seconds * self.frame_rate_hz))
            state = _Slot(codes[codes[:, 0] >= 0], text, seeds[i], how, num_frames, self.layout, self.context)
            self._encode(slot, state)
            self.busy[slot] = state

    def drop(self, slot: int) -> None:
        self.busy.pop(slot, None)

    @torch.inference_mode()
    def _encode(self, slot: int, state: _Slot) -> None:
        """Fill the slot's cache with all but the last tokens, which the next step embeds."""
        caches = [(self.cache, state.text)]
        if state.scale != 1:
            self.free_cache = self.free_cache or self.new_cache()
            caches.append((self.free_cache, state.text[:0]))
        for cache, text in caches:
            inputs = torch.full((1, len(text) + state.step, self.layout.num_streams), NOTHING)
            inputs[0, len(text) + 1 :] = torch.from_numpy(state.tokens[: max(0, state.step - 1)])
            padded = torch.full(inputs.shape[:2], NOTHING, device=self.device)
            padded[0, : len(text)] = text
            start = torch.tensor([len(text)], device=self.device)
            cache.prefill(slot, self.model.embed(inputs.to(self.device), padded, start)[0])

    @torch.inference_mode()
    def step(self) -> list[Piece]:
        if not self.busy:
            return []
        for slot, state in self.busy.items():
            if state.step >= state.room:
                state.slide()
                self._encode(slot, state)
        rows = [self.busy.get(slot) for slot in range(self.slots)]
        ids = self._draw(rows, self._logits(rows)) + self.first
        pieces = []
        for slot, state in list(self.busy.items()):
            codes = state.take(ids[slot], self.stop_id)
            if codes is not None:
                pieces.append(Piece(slot, codes, state.done))
            if state.done:
                self.drop(slot)
        return pieces

    def _logits(self, rows: Sequence[_Slot | None]) -> Tensor:
        """``[slots, streams, ids]``, guided where a row asks for it."""
        last = np.full((self.slots, self.layout.num_streams), self.nothing)
        for slot, row in enumerate(rows):
            if row and row.step:
                tokens = row.tokens[row.step - 1]
                last[slot] = np.where(tokens < 0, self.nothing, tokens)
            elif row:
                last[slot, 0] = self.start
        x = F.embedding_bag(torch.from_numpy(last).to(self.device), self.table, mode="sum")
        logits = self.cache.step(x, [len(row.text) + row.step if row else 0 for row in rows])
        scales = [row.scale if row else 1.0 for row in rows]
        if any(scale != 1 for scale in scales):
            assert self.free_cache is not None
            free = self.free_cache.step(x, [row.step if row and row.scale != 1 else 0 for row in rows])
            scale = torch.tensor(scales, device=self.device)[:, None, None]
            logits = torch.where(scale == 1, logits, free + scale * (logits - free))
        return logits

    def _draw(self, rows: Sequence[_Slot | None], logits: Tensor) -> np.ndarray:
        if self.allowed is not None:
            logits = logits + self.allowed[[row.step % self.layout.stride if row else 0 for row in rows]]
        how = [row.draw if row else Draw() for row in rows]
        if how != self.drawer.how:
            self.drawer = Drawer(how, self.device)
        numbers = np.stack([row.numbers if row else self.idle_numbers for row in rows])
        return self.drawer(logits, numbers).cpu().numpy()


@dataclass(frozen=True)
class CodesRenderer:
    """Codes to sound through the codec's only decoder."""

    codec: Codec
    device: torch.device | str
    modality: Modality = "audio"

    @property
    def sample_rate_hz(self) -> int:
        return self.codec.sample_rate_hz

    def open(self) -> CodesRender:
        return CodesRender(self.codec, self.device, self.codec.decoder())


@dataclass
class CodesRender:
    """One request's codes ``[frames, codebooks]``."""

    codec: Codec
    device: torch.device | str
    decoder: FrameStream

    def push(self, data: Any, last: bool) -> ToDecode:
        if not len(data):
            return ToDecode(self.decoder, None, last)
        latents = self.codec.from_codes(torch.from_numpy(data.T.copy())[None].to(self.device))
        return ToDecode(self.decoder, latents[0].T.cpu().numpy(), last)
