"""How multitask answers: slots that write token by token or foresee vector by vector, side by side, and what makes
text, sound, pictures (with the sound of the same prompt, where it is asked for) or JSON of it. A slot's result depends
on its request, its seed and the number of slots alone."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from avray.codecs import clip_dct
from avray.codecs.base import Codec
from avray.codecs.together import ToDecode
from avray.encoders.tokens import Tokens
from avray.families.multitask_model import EMBEDDED, TASKS, WRITTEN, MultitaskModel, noise_of
from avray.family import Batch, FrameStream, Modality, Options, Piece
from avray.media import Audio, Video
from avray.nn.kv_cache import CachedTransformer
from avray.nn.sampling import Draw, Drawer, uniforms

MODALITIES: dict[str, Modality] = {**dict.fromkeys(WRITTEN, "text"), "audio": "audio", "video": "video"}


@dataclass(frozen=True)
class Generation:
    """Options with their defaults filled in. ``max_tokens`` is at most so many tokens, or vectors."""

    max_tokens: int | None
    temperature: float
    top_k: int | None
    top_p: float | None
    num_steps: int
    seconds: float | None

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens = {self.max_tokens} must be at least 1.")
        if not 1 <= self.num_steps <= 1000:
            raise ValueError(f"num_steps = {self.num_steps} must be from 1 to 1000.")
        if self.seconds is not None and not 0 < self.seconds < math.inf:
            raise ValueError(f"seconds = {self.seconds} must be above 0 and finite.")
        self.draw  # noqa: B018 - checks the other three

    @property
    def draw(self) -> Draw:
        return Draw(self.temperature, self.top_k, self.top_p)


@dataclass(frozen=True)
class Foreseen:
    """One vector ``[width]`` of an embedding, and what it decodes to ``[frames, decoded]``. ``is_track``: the sound of
    a clip that is to come."""

    task: str
    vector: np.ndarray
    decoded: np.ndarray
    as_json: bool
    is_track: bool = False


@dataclass
class Slot:
    """One request under way: ``x`` is what goes in at step ``at``. With ``clip`` it makes the sound of one, which the
    slot goes on with: its prompt, and how."""

    task: str
    x: Tensor
    at: int
    how: Generation
    seed: int
    as_json: bool
    made: int = 0
    clip: tuple[Tensor, Generation] | None = None


class MultitaskSampler:
    """A ``Sampler`` whose pieces are lists of text ids or ``Foreseen``. ``frames`` says how many of the codec's
    a vector stands for, from the seconds asked."""

    def __init__(self, model: MultitaskModel, tokens: Tokens, slots: int,
                 generation: Callable[[Options, str], Generation], vector_s: float | None,
                 frames: Callable[[float | None], int], untrained: Sequence[str]) -> None:
        self.model, self.tokens, self.slots = model.eval(), tokens, slots
        self.generation, self.vector_s, self.frames, self.untrained = generation, vector_s, frames, untrained
        self.context = model.transformer.config.context
        self.cache = CachedTransformer(model.transformer, slots)
        self.busy: dict[int, Slot] = {}
        self.given: dict[int, list[Foreseen]] = {}
        self.device = model.transformer.norm.weight.device

    @torch.inference_mode()
    def admit(self, slots: Sequence[int], batch: Batch, seeds: Sequence[int], options: Sequence[Options]) -> None:
        for i, slot in enumerate(slots):
            assert slot not in self.busy and slot not in self.given, f"slot {slot} is busy"
            task = TASKS[int(batch["task"][i])]
            if task in self.untrained:
                raise ValueError(f"task {task}: this model saw no row of it.")
            if batch["given"][i]:
                at = int((batch[f"{task}.row"] == i).nonzero())
                vectors = batch[task][at, : int(batch[f"{task}.count"][at])]
                plain = self.model.unscale(task, vectors).float().cpu().numpy()
                self.given[slot] = [Foreseen(task, vector, vector[None], True) for vector in plain]
                continue
            line, how = batch["tokens"][i, : int(batch["length"][i])].to(self.device), self.generation(options[i], task)
            if not batch["sound"][i]:
                self._begin(slot, task, line, how, seeds[i], bool(batch["as_json"][i]))
                continue
            if "audio" in self.untrained:
                raise ValueError("sound: this model saw no row of audio.")
            self._begin(slot, "audio", self._as_task("audio", line), self._of_track(how), seeds[i], False, (line, how))

    def _begin(self, slot: int, task: str, line: Tensor, how: Generation, seed: int, as_json: bool,
               clip: tuple[Tensor, Generation] | None = None) -> None:
        prompt = self.model.embed(line[None])[0]
        self.cache.prefill(slot, prompt[:-1])
        self.busy[slot] = Slot(task, prompt[-1], len(prompt) - 1, how, seed, as_json, clip=clip)

    def _as_task(self, task: str, line: Tensor) -> Tensor:
        """The same prompt behind another task's token."""
        return torch.cat([line.new_tensor([self.tokens.size + TASKS.index(task)]), line[1:]])

    def _of_track(self, how: Generation) -> Generation:
        """For the sound of a clip: as long as its pictures at most."""
        if self.vector_s is None:
            return replace(how, seconds=clip_dct.CLIP_S)
        if how.max_tokens is None:
            return how
        return replace(how, max_tokens=math.ceil(how.max_tokens * clip_dct.CLIP_S / self.vector_s))

    def drop(self, slot: int) -> None:
        self.busy.pop(slot, None)
        self.given.pop(slot, None)

    @torch.inference_mode()
    def step(self) -> list[Piece]:
        pieces = [Piece(slot, vector, vector is vectors[-1]) for slot, vectors in self.given.items()
                  for vector in vectors]
        self.given.clear()
        return pieces + (self._generate() if self.busy else [])

    def _generate(self) -> list[Piece]:
        rows = [self.busy.get(slot) for slot in range(self.slots)]
        nothing = torch.zeros_like(next(iter(self.busy.values())).x)
        x = torch.stack([row.x if row else nothing for row in rows])
        hidden = self.cache.hidden(x, [row.at if row else 0 for row in rows])
        pieces = []
        if any(row and row.task in WRITTEN for row in rows):
            pieces += self._write(rows, hidden)
        for task in EMBEDDED:
            if any(row and row.task == task for row in rows):
                pieces += self._foresee(task, rows, hidden)
        return [self._ended(piece) if piece.done else piece for piece in pieces]

    def _ended(self, piece: Piece) -> Piece:
        """Its slot is free, or goes on with the clip whose sound is there."""
        row = self.busy.pop(piece.slot)
        if row.clip is None:
            return piece
        self._begin(piece.slot, "video", *row.clip, row.seed, False)
        return replace(piece, done=False)

    def _write(self, rows: Sequence[Slot | None], hidden: Tensor) -> list[Piece]:
        written = [row if row and row.task in WRITTEN else None for row in rows]
        drawer = Drawer([row.how.draw if row else Draw() for row in written], self.device)
        numbers = np.stack([uniforms(row.seed, row.made, 1, 1)[0] if row else np.full(1, 0.5) for row in written])
        drawn = drawer(self.model.text_logits(hidden)[:, None], numbers)[:, 0]
        pieces = []
        for slot, row in enumerate(written):
            if row:
                ids = int(drawn[slot])
                ends = ids == self.tokens.end
                row.x = self.model.embed(drawn[slot].view(1, 1))[0, 0]
                pieces.append(Piece(slot, [] if ends else [ids], self._advance(row) or ends))
        return pieces

    def _foresee(self, task: str, rows: Sequence[Slot | None], hidden: Tensor) -> list[Piece]:
        head = self.model.heads[task]
        noise = torch.stack([row.how.temperature * noise_of(row.seed, row.made, head.size) if row
                             else torch.zeros(head.size) for row in rows]).to(self.device)
        how = {row.how.num_steps for row in rows if row and row.task == task}
        drawn = {steps: head.draw(hidden, noise, steps) for steps in how}
        pieces = []
        for slot, row in enumerate(rows):
            if row is None or row.task != task:
                continue
            vector = drawn[row.how.num_steps][slot]
            ends = self.vector_s is None
            if head.into is not None:
                ends = bool(head.end(hidden)[slot, 0] > 0)
                row.x = head.into(vector)
            decoded = self.model.decode(task, vector)
            if task == "audio":
                frames = self.frames(row.how.seconds)
                decoded = decoded[:frames] if len(decoded) > 1 else decoded.repeat(frames, 0)
            plain = self.model.unscale(task, vector).float().cpu().numpy()
            made = Foreseen(task, plain, decoded, row.as_json, row.clip is not None)
            pieces.append(Piece(slot, made, self._advance(row) or ends))
        return pieces

    def _advance(self, row: Slot) -> bool:
        """One step further; whether that was the last that was asked for, or that there is room for."""
        row.made, row.at = row.made + 1, row.at + 1
        return row.at >= self.context or row.made == row.how.max_tokens


@dataclass(frozen=True)
class MediaRenderer:
    """Text, sound or pictures, as each request's task has it: ``modality`` is that of the first task."""

    tokens: Tokens
    codec: Codec | None
    trained: tuple[str, ...]
    vector_s: float
    frame_rate_hz: float = clip_dct.FRAME_RATE_HZ
    """Of the pictures."""
    size: int = clip_dct.SIZE

    @property
    def modality(self) -> Modality:
        return MODALITIES[self.trained[0]]

    @property
    def tasks(self) -> Mapping[str, Modality]:
        return {task: MODALITIES[task] for task in self.trained}

    @property
    def embeds(self) -> tuple[str, ...]:
        """The tasks whose embeddings may be asked for, of a text or of a file."""
        return tuple(task for task in self.trained if task in EMBEDDED)

    @property
    def sample_rate_hz(self) -> int:
        return self.codec.sample_rate_hz if self.codec else 0

    def open(self) -> MediaRender:
        return MediaRender(self)


@dataclass
class MediaRender:
    """One request's: samples ``[1, n]``, clips of 64 x 64 or text; a character once its last byte is there."""

    renderer: MediaRenderer
    ids: list[int] = field(default_factory=list)
    shown: int = 0
    decoder: FrameStream | None = None
    vectors: list[list[float]] = field(default_factory=list)
    track: list[np.ndarray] = field(default_factory=list)
    """The sound of a clip that is to come, or what is left of it."""

    def push(self, data: list[int] | Foreseen, last: bool) -> str | Video | ToDecode | None:
        if isinstance(data, Foreseen):
            return self._foreseen(data, last)
        self.ids += data
        text = self.renderer.tokens.decode(self.ids)
        if text.endswith("\N{REPLACEMENT CHARACTER}") and not last:
            return ""
        new, self.shown = text[self.shown :], len(text)
        return new

    def _foreseen(self, data: Foreseen, last: bool) -> str | Video | ToDecode | None:
        if data.as_json:
            self.vectors.append([round(float(number), 6) for number in data.vector])
            if not last:
                return ""
            return json.dumps({"task": data.task,
                               "embedding": self.vectors if len(self.vectors) > 1 else self.vectors[0]})
        if data.task == "video":
            frames = np.concatenate([clip_dct.decode_clip(numbers) for numbers in data.decoded])
            return Video(frames, self.renderer.frame_rate_hz, self._sound_of(len(frames)))
        assert self.renderer.codec is not None
        self.decoder = self.decoder or self.renderer.codec.decoder()
        latents = np.ascontiguousarray(data.decoded, np.float32)
        if not data.is_track:
            return ToDecode(self.decoder, latents, last)
        self.track.append(self.decoder.push(latents))
        return None

    def _sound_of(self, num_frames: int) -> Audio | None:
        """Of the next pictures, silence behind its end; None where none was asked for."""
        if not self.track:
            return None
        if self.decoder is not None:
            self.track, self.decoder = [np.concatenate([*self.track, self.decoder.finish()])], None
        [rest], number = self.track, round(num_frames / self.renderer.frame_rate_hz * self.renderer.sample_rate_hz)
        self.track = [rest[number:]]
        return Audio(np.pad(rest[:number], (0, max(0, number - len(rest))))[None], self.renderer.sample_rate_hz)
