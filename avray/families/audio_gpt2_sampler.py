"""How ``audio_gpt2`` writes: slots that hear their sound once and step token by token, or a beam of texts each.

Keys and values of text and sound have fixed shapes, so a slot's tokens depend on its request, its seed and the number
of slots alone. A recording longer than a window is heard window by window, and what two windows both heard is written
once: the longest end of one text that begins the next.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from avray.encoders.tokens import Tokens
from avray.families.audio_gpt2_model import Listener, SlotCache
from avray.families.audio_gpt2_step import GPT2Step, is_plain_gpt2
from avray.family import Batch, Modality, Options, Piece
from avray.nn.listening import Heard
from avray.nn.sampling import Draw, Drawer, uniforms

GREEDY = Draw(temperature=0.0)


@dataclass(frozen=True)
class Generation:
    """Options with their defaults filled in."""

    max_tokens: int | None
    temperature: float
    top_k: int | None
    top_p: float | None
    beams: int

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens = {self.max_tokens} must be at least 1.")
        if not 1 <= self.beams <= 64:
            raise ValueError(f"beams = {self.beams} must be from 1 to 64.")
        if self.beams > 1 and self.temperature > 0:
            raise ValueError("beams keep the likeliest texts: give temperature=0 with them, or beams=1.")
        self.draw  # noqa: B018 - checks the other three

    @property
    def draw(self) -> Draw:
        return Draw(self.temperature, self.top_k, self.top_p)


@dataclass(frozen=True)
class Written:
    """Ids of one window's text; ``ends`` it."""

    ids: list[int]
    ends: bool


@dataclass
class Slot:
    """One request under way: ``windows`` still to be heard, the tokens of this one (its prompt included)."""

    windows: list[Tensor]
    prompt: list[int]
    how: Generation
    seed: int
    tokens: list[int] = field(default_factory=list)
    drawn: int = 0
    beam: Beam | None = None


class TextSampler:
    """A ``Sampler`` whose pieces are ``Written``. ``window`` and ``overlap`` are in frames of the features."""

    def __init__(self, model: Listener, tokens: Tokens, context: int, window: int, overlap: int, slots: int,
                 generation: Callable[[Options], Generation]) -> None:
        self.model, self.tokens, self.context, self.slots = model.eval(), tokens, context, slots
        self.window, self.overlap, self.generation = window, overlap, generation
        self.cache = SlotCache(model.base, slots, context)
        self.busy: dict[int, Slot] = {}
        self.heard: list[Heard] = []
        self.device = model.base.get_input_embeddings().weight.device
        self.lean = GPT2Step(model) if is_plain_gpt2(model) else None
        self.drawers: dict[tuple[Draw, ...], Drawer] = {}

    def admit(self, slots: Sequence[int], batch: Batch, seeds: Sequence[int], options: Sequence[Options]) -> None:
        for i, slot in enumerate(slots):
            assert slot not in self.busy, f"slot {slot} is busy"
            audio = batch["audio"][i, : int(batch["frames"][i])]
            prompt = batch["tokens"][i, : int(batch["length"][i])].tolist()
            how = self.generation(options[i])
            if len(prompt) + (how.max_tokens or 1) > self.context:
                raise ValueError(f"The text and max_tokens make {len(prompt) - 1 + (how.max_tokens or 1)} tokens, and "
                                 f"this model holds {self.context - 1}: ask for less.")
            state = Slot(self.windows(audio), prompt, how, seeds[i])
            self._open(slot, state)
            self.busy[slot] = state

    def windows(self, audio: Tensor) -> list[Tensor]:
        """A recording's windows; the last begins early enough to be whole."""
        if len(audio) <= self.window:
            return [audio]
        stride = self.window - self.overlap
        number = math.ceil((len(audio) - self.window) / stride) + 1
        starts = [min(i * stride, len(audio) - self.window) for i in range(number)]
        return [audio[start : start + self.window] for start in starts]

    def drop(self, slot: int) -> None:
        self.busy.pop(slot, None)

    @torch.inference_mode()
    def _open(self, slot: int, state: Slot) -> None:
        """Hear the next window and put the prompt, all but its last token, into the cache."""
        window = state.windows.pop(0)
        padded = F.pad(window, (0, 0, 0, max(0, self.window - len(window))))[None]
        own = self.model.hear(padded, torch.tensor([len(window)], device=self.device))
        state.tokens = list(state.prompt)
        if state.how.beams > 1:
            state.beam = Beam(self.model, own, state.prompt, state.how.beams, self.tokens.end, self.context)
            return
        if not self.heard:
            self.heard = [Heard(*(part.new_zeros(self.slots, *part.shape[1:]) for part in vars(heard).values()))
                          for heard in own]
            for heard in self.heard:
                heard.mask[..., 0] = True
        for kept, heard in zip(self.heard, own, strict=True):
            for name, part in vars(heard).items():
                getattr(kept, name)[slot] = part[0]
        if self.lean is not None:
            self.lean.listen(self.heard)
        with self.model.listening(own):
            before = torch.tensor(state.tokens[:-1], dtype=torch.int64, device=self.device)
            self.cache.prefill(self.model.base, slot, before)

    @torch.inference_mode()
    def step(self) -> list[Piece]:
        if not self.busy:
            return []
        pieces = []
        chosen = self._draw() if any(state.beam is None for state in self.busy.values()) else None
        for slot, state in list(self.busy.items()):
            if state.beam is not None:
                new = state.beam.step(self._room(state))
                ends = new is not None
            else:
                assert chosen is not None
                ids = int(chosen[slot])
                state.tokens.append(ids)
                state.drawn += 1
                ends = ids == self.tokens.end or self._room(state) < 1
                new = [] if ids == self.tokens.end else [ids]
            if new is None:
                continue
            done = ends and not state.windows
            pieces.append(Piece(slot, Written(new, ends), done))
            if done:
                self.drop(slot)
            elif ends:
                self._open(slot, state)
        return pieces

    def _room(self, state: Slot) -> int:
        """Tokens that may still be drawn for this window."""
        length = len(state.tokens) if state.beam is None else state.beam.length
        asked = state.how.max_tokens
        left = self.context - length
        return left if asked is None else min(left, asked - (length - len(state.prompt)))

    def _draw(self) -> np.ndarray:
        rows = [self.busy.get(slot) for slot in range(self.slots)]
        plain = [row if row is not None and row.beam is None else None for row in rows]
        last = torch.tensor([row.tokens[-1] if row else self.tokens.end for row in plain], device=self.device)
        at = [len(row.tokens) - 1 if row else 0 for row in plain]
        logits = stepped(self.lean, self.model, self.heard, self.cache, last, at)[:, : self.tokens.size]
        likeliest = logits.argmax(-1).cpu().numpy()
        drawn = [row is not None and row.how.temperature > 0 for row in plain]
        if not any(drawn):
            return likeliest
        how = tuple(row.how.draw if row else GREEDY for row in plain)
        if how not in self.drawers:
            self.drawers = {how: Drawer(how, self.device)}
        numbers = np.stack([uniforms(row.seed, row.drawn, 1, 1)[0] if row else np.full(1, 0.5) for row in plain])
        return np.where(drawn, self.drawers[how](logits[:, None], numbers)[:, 0].cpu().numpy(), likeliest)


def stepped(lean: GPT2Step | None, model: Listener, heard: Sequence[Heard], cache: SlotCache, tokens: Tensor,
            at: Sequence[int]) -> Tensor:
    """Each row's next token; the logits after it."""
    if lean is not None:
        return lean(cache, tokens, at)
    with model.listening(heard):
        return cache.step(model.base, tokens, at)


class Beam:
    """Beam search over one window: the ``size`` likeliest texts so far, a step at a time. A text's score is its mean
    log probability a token, the end included, as transformers has it."""

    def __init__(self, model: Listener, heard: Sequence[Heard], prompt: list[int], size: int, end: int,
                 context: int) -> None:
        self.model, self.size, self.end, self.prompt = model, size, end, prompt
        self.cache = SlotCache(model.base, size, context)
        self.heard = [Heard(*(part.expand(size, *part.shape[1:]) for part in vars(one).values())) for one in heard]
        self.device = self.cache.device
        self.texts: list[list[int]] = [[] for _ in range(size)]
        self.scores = torch.full((size,), -math.inf, device=self.device)
        self.scores[0] = 0.0
        self.finished: list[tuple[float, list[int]]] = []
        self.length = len(prompt)
        self.lean = GPT2Step(model) if is_plain_gpt2(model) else None
        if self.lean is not None:
            self.lean.listen(self.heard)
        with model.listening(heard):
            for row in range(size):
                self.cache.prefill(model.base, row, torch.tensor(prompt[:-1], dtype=torch.int64, device=self.device))

    def step(self, room: int) -> list[int] | None:
        """The best text once nothing can overtake it or there is no room; None before."""
        last = torch.tensor([(self.prompt + text)[-1] for text in self.texts], device=self.device)
        logits = stepped(self.lean, self.model, self.heard, self.cache, last, [self.length - 1] * self.size)
        scores = self.scores[:, None] + torch.log_softmax(logits.float(), -1)
        best = scores.flatten().topk(2 * self.size)
        drawn = len(self.texts[0]) + 1
        rows: list[int] = []
        texts, kept = [], []
        for score, place in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            row, token = divmod(place, logits.shape[1])
            if score == -math.inf or len(rows) == self.size:
                continue
            if token == self.end:
                self.finished.append((score / drawn, self.texts[row]))
            else:
                rows.append(row)
                texts.append([*self.texts[row], token])
                kept.append(score)
        self.finished = sorted(self.finished, key=lambda one: -one[0])[: self.size]
        if room <= 1 or not rows or (len(self.finished) == self.size and self.finished[-1][0] >= kept[0] / drawn):
            alive = [(score / drawn, text) for score, text in zip(kept, texts, strict=True)] if room <= 1 else []
            return max([*self.finished, *alive], key=lambda one: one[0])[1]
        rows += [rows[0]] * (self.size - len(rows))
        self.texts = texts + [texts[0]] * (self.size - len(texts))
        kept += [-math.inf] * (self.size - len(kept))
        self.scores = torch.tensor(kept, device=self.device)
        self.cache.pick(torch.tensor(rows, device=self.device))
        self.length += 1
        return None


@dataclass(frozen=True)
class TextRenderer:
    """Ids to text."""

    tokens: Tokens
    modality: Modality = "text"
    sample_rate_hz: int = 0

    def open(self) -> TextRender:
        return TextRender(self.tokens)


@dataclass
class TextRender:
    """One request's. The first window's text comes as it is written, a character when its last byte is there; each
    later window's once it is whole and what was written already is found in it."""

    tokens: Tokens
    before: str = ""
    """What the windows so far say."""
    ids: list[int] = field(default_factory=list)
    shown: int = 0

    def push(self, data: Written, last: bool) -> str:
        self.ids += data.ids
        text = self.tokens.decode(self.ids)
        if not data.ends:
            if self.before or text.endswith("\N{REPLACEMENT CHARACTER}"):
                return ""
            new, self.shown = text[self.shown :], len(text)
            return new
        new = joined(self.before, text) if self.before else text[self.shown :]
        self.before += new if self.before else text
        self.ids, self.shown = [], 0
        return new


def joined(before: str, text: str) -> str:
    """What ``text`` adds to ``before``, whose last words it may begin with: words compare without case and marks, and
    the first word heard may be a cut one."""
    words, last = text.split(), before.split()
    plain = [[re.sub(r"[^\w']", "", word.lower()) for word in part] for part in (last, words)]
    for count in range(min(len(words), len(last)), 0, -1):
        for skipped in (0, 1):
            if count - skipped > 0 and plain[0][-(count - skipped):] == plain[1][skipped:count]:
                rest = words[count:]
                return "".join(f" {word}" for word in rest)
    return "".join(f" {word}" for word in words)
