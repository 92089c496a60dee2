"""One GPT for text, code, image, audio and video: a task token, a prompt, then text, or an embedding that is played.

What the original did otherwise: its embedding loss was never reached; task ids were those of characters and of padding,
and padding was learnt. Here a task token has an id of its own that no text can draw, embeddings have heads of their own
beside the text's, in [-1, 1] by a scale that is fitted, kept and undone, and nothing is lost on padding or on prompts.

An embedding stands for ``segment_s`` of sound or two seconds of pictures. Where it is the codec's own (log-mel frames,
DCT coefficients) it decodes as it is; a pretrained encoder's goes through a small decoder that is trained beside.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from avray.codecs import clip_dct
from avray.codecs.base import CodecConfig, Latents
from avray.encoders.clips import ClipNumbers, ClipStates
from avray.encoders.hidden_states import HiddenStates
from avray.encoders.tokens import CHARACTERS, Tokens, open_tokens, read_characters, read_tokens
from avray.families.multitask_figures import Retrieval, figures
from avray.families.multitask_losses import alike, bigram_loss, embedding_losses, hidden_states, mean_losses
from avray.families.multitask_model import (
    EMBEDDED,
    TASKS,
    WRITTEN,
    EmbeddingSizes,
    HeadKind,
    MultitaskModel,
    drawable,
    init,
)
from avray.families.multitask_rows import TaskRow, limits, pooled, prompt_of, read_row, scaled
from avray.families.multitask_sampler import Generation, MediaRenderer, MultitaskSampler
from avray.family import Batch, Column, Example, Fitted, Mean, Metric, Options, Prompt, Question, Request, Row, Unit
from avray.media import Audio, Video
from avray.nn.bigram import Bigram
from avray.nn.transformer import Mlp, Norm, Positions, TransformerConfig

FEATURES, CLIP = "features", "clip"
LATENTS, NUMBERS = "latents", "numbers"
TARGETS = {"audio": LATENTS, "video": NUMBERS}
"""What a decoder learns to make, where an embedding is not that itself."""


@dataclass(frozen=True)
class TaskWeights:
    """Each task's weight in the loss; 0 leaves its rows out."""

    text: float = 1.0
    code: float = 1.0
    image: float = 1.0
    audio: float = 1.0
    video: float = 1.0


@dataclass(frozen=True)
class Multitask:
    """``task`` trains one alone. ``audio_width`` and ``video_width`` are the numbers of an embedding.

    ``encoder`` and ``video_encoder`` embed files; None takes the codec's frames and the DCT. ``vector_s`` None makes
    one vector of a file; else audio is a sequence of vectors, one every so many seconds, and video one every two.
    """

    codec: CodecConfig
    encoder: HiddenStates | None = None
    video_encoder: ClipStates | None = None
    segment_s: float = 2.0
    audio_width: int = 128
    video_width: int = clip_dct.WIDTH
    vector_s: float | None = None
    task: Literal["text", "code", "image", "audio", "video"] | None = None
    task_weights: TaskWeights = TaskWeights()
    tokenizer: str = CHARACTERS
    download: bool = False
    head: HeadKind = "mse"

    context: int = 64
    width: int = 64
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int | None = None
    mlp: Mlp = "gelu"
    norm: Norm = "layer"
    positions: Positions = "sinusoidal"
    qk_norm: bool = False
    tied: bool = False
    head_bias: bool = True
    dropout: float = 0.0

    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    num_steps: int = 20

    def __post_init__(self) -> None:
        for name in ("segment_s", "audio_width", "video_width", "context", "num_steps"):
            if getattr(self, name) <= 0:
                raise ValueError(f"family.{name} must be above 0, got {getattr(self, name)}.")
        if self.vector_s is not None and not 0 < self.vector_s <= self.segment_s:
            raise ValueError(f"family.vector_s = {self.vector_s} must be above 0 and at most family.segment_s.")
        for name, allowed in (("task", (None, *TASKS)), ("head", get_args(HeadKind))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"family.{name} must be one of {', '.join(map(str, allowed))}, got "
                                 f"{getattr(self, name)!r}.")
        if any(weight < 0 for weight in vars(self.task_weights).values()) or not self.tasks:
            raise ValueError("family.task_weights must be at least 0 each, and one of those trained above 0.")
        self._transformer(8)
        self._generation(Options())

    @property
    def tasks(self) -> tuple[str, ...]:
        """Those trained."""
        return tuple(name for name in TASKS if getattr(self.task_weights, name) > 0 and self.task in (None, name))

    # Data

    def refusal(self, row: Row) -> str | None:
        """Why a row cannot be used, or None."""
        try:
            self._read(row)
        except ValueError as error:
            return str(error)
        return None

    def _read(self, row: Row) -> TaskRow:
        read = read_row(row, {"audio": self.audio_width, "video": self.video_width}, self.vector_s is not None)
        count = len if self.tokenizer == CHARACTERS else lambda text: len(self._tokens().encode(text))
        vectors = 1 if read.embedding is None else len(read.embedding)
        need = 1 + count(read.prompt) + (count(read.output) if read.task in WRITTEN else vectors - 1)
        if need > self.context:
            raise ValueError(f"it has {need} tokens, those of its task and prompt included, over family.context = "
                             f"{self.context}")
        return read

    def _tokens(self) -> Tokens:
        return open_tokens(read_tokens(self.tokenizer, self.download))

    def segment(self, rows: Sequence[Row]) -> list[Example]:
        """A row is an example; a file longer than an embedding stands for gives one for each part of it."""
        examples = []
        for row in rows:
            read = self._read(row)
            if read.task not in self.tasks:
                continue
            plain: dict[str, Any] = {"task": read.task, "prompt": read.prompt}
            weight = row.get("weight", 1.0)
            if read.task in WRITTEN:
                examples.append(Example(str(row["id"]), {}, {**plain, "output": read.output}, weight))
            elif read.embedding is not None:
                examples.append(Example(str(row["id"]), {}, {**plain, "embedding": read.embedding.tolist()}, weight))
            else:
                examples += [Example(f"{row['id']}@{unit.start_s:.3f}", {read.task: unit}, plain, weight)
                             for unit in self._units(row, read.task)]
        return examples

    def _units(self, row: Row, task: str) -> list[Unit]:
        length = clip_dct.CLIP_S if task == "video" and self.vector_s is None else self.segment_s
        start, duration = row.get("start_s") or 0.0, row["duration_s"]
        number = max(1, int(duration / length + 0.01))
        return [Unit(row[task], task, round(start + i * length, 6), round(min(length, duration), 6))  # type: ignore[arg-type]
                for i in range(number)]

    def columns(self, fitted: Fitted | None) -> list[Column]:
        columns = []
        if "audio" in self.tasks:
            columns.append(Column(FEATURES, self.encoder or Latents(self.codec)))
            if self.encoder is not None:
                columns.append(Column(LATENTS, Latents(self.codec)))
        if "video" in self.tasks:  # of clips, where an Encoder is otherwise of sound
            clips = self.video_encoder or ClipNumbers()
            columns.append(Column(CLIP, clips, "video"))  # type: ignore[arg-type]
            if self.video_encoder is not None:
                columns.append(Column(NUMBERS, ClipNumbers(), "video"))  # type: ignore[arg-type]
        return columns

    def fit(self, rows: Iterator[Row]) -> Fitted:
        """The tokeniser, the bigram of each written task, and of each embedded one its scale, mean and deviation."""
        kept = list(rows)
        texts = (text for row in kept for text in (row["prompt"], row.get("output", "")))
        tokens = read_characters(texts) if self.tokenizer == CHARACTERS else read_tokens(self.tokenizer, self.download)
        codec = self.codec.load("cpu") if "audio" in self.tasks else None
        arrays: dict[str, np.ndarray] = {}
        data: dict[str, Any] = {"tokens": tokens, "codec": self.codec.column_id(), "sizes": {},
                                "frame_rate_hz": codec.frame_rate_hz if codec else 0.0}
        if codec:
            data["features_hz"] = (self.encoder.load("cpu") if self.encoder else codec).frame_rate_hz
        found = Fitted(arrays, data)
        for task in (task for task in self.tasks if any(row["task"] == task for row in kept)):
            mine = [row for row in kept if row["task"] == task]
            if task in WRITTEN:
                recordings = [np.array(self._ids(row, open_tokens(tokens), True))[:, None] for row in mine]
                bigram = Bigram.fit(recordings, open_tokens(tokens).size, depth=False)
                arrays |= {f"bigram.{task}.{name}": array for name, array in bigram.arrays().items()}
                continue
            vectors = np.concatenate([self._vectors(row, found) for row in mine])
            if vectors.shape[1] != getattr(self, f"{task}_width"):
                raise ValueError(f"family.{task}_width = {getattr(self, f'{task}_width')}, but the encoder gives "
                                 f"{vectors.shape[1]} numbers: set it to that.")
            arrays |= {**limits(task, vectors), f"{task}.mean": vectors.mean(0), f"{task}.deviation": vectors.std(0)}
            decoded = [made for row in mine if (made := row.get(f"{task}.{TARGETS[task]}")) is not None]
            data["sizes"][task] = [vectors.shape[1], 0, 0]
            if decoded:
                data["sizes"][task] = [vectors.shape[1], self._decoded_frames(task, found), decoded[0].shape[1]]
                arrays |= limits(f"{task}.decoded", np.concatenate(decoded).astype(np.float32))
        return found

    def _decoded_frames(self, task: str, fitted: Fitted) -> int:
        if task == "video":
            return 1
        return max(1, round((self.vector_s or self.segment_s) * fitted.data["frame_rate_hz"]))

    def _vectors(self, row: Row, fitted: Fitted) -> np.ndarray:
        """``[vectors, width]`` float32 of a row's embedding."""
        task = row["task"]
        if "embedding" in row:
            return np.array(row["embedding"], np.float32)
        frames = row[f"{task}.{FEATURES if task == 'audio' else CLIP}"]
        each = None if self.vector_s is None else 1
        if task == "audio" and self.vector_s is not None:
            each = max(1, round(self.vector_s * fitted.data["features_hz"]))
        return pooled(frames, each)

    def _ids(self, row: Row, tokens: Tokens, with_output: bool) -> list[int]:
        """The task's token, the prompt's and, asked for, the output's and the end."""
        task = tokens.size + TASKS.index(row["task"])
        output = [*tokens.encode(row["output"]), tokens.end] if with_output else []
        return [*([] if with_output else [task]), *tokens.encode(row["prompt"]), *output]

    def collate(self, rows: Sequence[Row], fitted: Fitted) -> Batch:
        """``tokens`` and ``targets`` ``[batch, time]`` (-1 is nothing), ``length`` of the prompts, ``task``,
        ``weight``, ``as_json`` and ``given`` ``[batch]``; and of each embedded task ``<task>`` ``[k, vectors, width]``
        in [-1, 1], its ``<task>.row`` and its number of vectors ``<task>.count`` ``[k]``; where a decoder learns,
        ``<task>.decoded`` ``[k, frames, width]`` and its weight ``<task>.known`` ``[k]``, 0 where it is not known.
        ``alike0.row`` and on are the rows by length, ``alike0.step`` the steps that the longest of each group needs."""
        tokens = open_tokens(fitted.data["tokens"])
        prompts = [self._ids(row, tokens, False) if "task" in row else [tokens.end] for row in rows]
        outputs = [self._outputs(row, tokens) for row in rows]
        for row, prompt in zip(rows, prompts, strict=True):
            self._check_request(row, prompt, tokens)
        vectors = {index: self._vectors(row, fitted) for index, row in enumerate(rows)
                   if row.get("task") in EMBEDDED and row["weight"] and (row.get("given") or not row.get("asked"))}
        needed = [len(prompt) - 1 + max(1, len(output), len(vectors.get(index, ())))
                  for index, (prompt, output) in enumerate(zip(prompts, outputs, strict=True))]
        length = max(needed)
        inputs, targets = np.full((len(rows), length), tokens.end), np.full((len(rows), length), -1)
        for index, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
            line = [*prompt, *output][:length]
            inputs[index, : len(line)] = line
            if rows[index]["weight"] and output:
                first = len(prompt) - 1
                targets[index, first : first + len(output)] = output
        targets[targets >= drawable(tokens)] = -1  # an unseen character is not scored: nothing can foresee it
        weight = np.array([row["weight"] for row in rows], np.float32)
        named = {"tokens": inputs, "targets": targets, "weight": weight, "length": np.array(list(map(len, prompts))),
                 "task": np.array([TASKS.index(row.get("task", TASKS[0])) for row in rows]),
                 "as_json": np.array([bool(row.get("as_json")) for row in rows]),
                 "given": np.array([bool(row.get("given")) for row in rows]),
                 "sound": np.array([bool(row.get("sound")) for row in rows])}
        for index, group in enumerate(alike(needed)):
            longest = max((needed[row] for row in group), default=0)
            named |= {f"alike{index}.row": group, f"alike{index}.step": np.arange(longest)}
        counts = dict.fromkeys(self.terms, 0.0)
        for index, task in enumerate(WRITTEN):
            if task in counts:
                mine = (named["task"] == index) & (weight > 0)
                counts[task] = float(((targets >= 0).sum(1) * weight * mine).sum())
        for task in (task for task in EMBEDDED if task in fitted.data["sizes"]):
            named |= self._embedded(task, rows, vectors, fitted, counts)
        return Batch({name: torch.from_numpy(array) for name, array in named.items()}, counts,
                     [str(row.get("id", "")) for row in rows])

    def _embedded(self, task: str, rows: Sequence[Row], vectors: Mapping[int, np.ndarray], fitted: Fitted,
                  counts: dict[str, float]) -> dict[str, np.ndarray]:
        """One task's tensors; its counts go into ``counts``."""
        width, frames, decoded_width = fitted.data["sizes"][task]
        chosen = [index for index in vectors if rows[index]["task"] == task]
        number = max((len(vectors[index]) for index in chosen), default=1)
        values = np.zeros((len(chosen), number, width), np.float32)
        for at, index in enumerate(chosen):
            values[at, : len(vectors[index])] = scaled(vectors[index], task, fitted)
        count = np.array([len(vectors[index]) for index in chosen], np.int64)
        weight = np.array([rows[index]["weight"] for index in chosen], np.float32)
        named = {task: values, f"{task}.row": np.array(chosen, np.int64), f"{task}.count": count}
        if task in counts:
            counts[task] = float(count @ weight) * width
            counts[f"{task}_end"] = float(count @ weight) if self.vector_s is not None else 0.0
        if frames:
            made = [self._decoded(task, rows[index], frames, fitted) for index in chosen]
            named[f"{task}.decoded"] = np.stack([array for array, _ in made]) if made else np.zeros(
                (0, frames, decoded_width), np.float32)
            named[f"{task}.known"] = np.array([known for _, known in made], np.float32) * weight
            if task in counts:
                counts[f"{task}_decoder"] = float(named[f"{task}.known"].sum()) * frames * decoded_width
        return named

    def _decoded(self, task: str, row: Row, frames: int, fitted: Fitted) -> tuple[np.ndarray, float]:
        """What the decoder is to make of the row's first vector, the last frame held to the end; and whether it is
        known, which it is of files alone."""
        target = row.get(f"{task}.{TARGETS[task]}")
        if target is None:
            return np.zeros((frames, fitted.data["sizes"][task][2]), np.float32), 0.0
        target = target[:frames].astype(np.float32)
        target = np.concatenate([target, np.repeat(target[-1:], frames - len(target), 0)])
        return scaled(target, f"{task}.decoded", fitted), 1.0

    def _outputs(self, row: Row, tokens: Tokens) -> list[int]:
        if row.get("task") not in WRITTEN or row.get("asked"):
            return []
        return [*tokens.encode(row["output"]), tokens.end]

    def _check_request(self, row: Row, prompt: Sequence[int], tokens: Tokens) -> None:
        """What ``prompt`` could not know without what was fitted."""
        if not row.get("asked"):
            return
        unknown = getattr(tokens, "unknown", None)
        unseen = sorted({character for character in row["prompt"] if tokens.encode(character) == [unknown]})
        if unseen:
            raise ValueError(f"prompt holds {''.join(unseen)!r}, which was in no training text: leave it out, or train "
                             "with family.tokenizer=bytes.")
        if len(prompt) > self.context:
            raise ValueError(f"prompt has {len(prompt)} tokens, the task's among them, and this model holds "
                             f"{self.context}: shorten it.")

    # Model

    def build(self, fitted: Fitted) -> MultitaskModel:
        if "audio" in fitted.data["sizes"] and fitted.data["codec"] != self.codec.column_id():
            raise ValueError(f"codec = {self.codec.name} ({self.codec.column_id()}), but this model was fitted with "
                             f"{fitted.data['codec']}: ask for that one, or train anew.")
        tokens = open_tokens(fitted.data["tokens"])
        sizes = {task: EmbeddingSizes(*size) for task, size in fitted.data["sizes"].items()}
        scales = {name: array for name, array in fitted.arrays.items() if name.endswith((".low", ".high"))}
        return MultitaskModel(self._transformer(tokens.size + len(TASKS)), drawable(tokens), sizes, self.head,
                              self.vector_s is not None, scales)

    def _transformer(self, vocabulary: int) -> TransformerConfig:
        own = {f.name for f in fields(self)}
        shared = {f.name: getattr(self, f.name) for f in fields(TransformerConfig) if f.name in own}
        return TransformerConfig(vocabulary=vocabulary, **shared)

    def init(self, model: nn.Module, generator: torch.Generator) -> None:
        assert isinstance(model, MultitaskModel)
        init(model, generator)

    @property
    def terms(self) -> Mapping[str, float]:
        weights = {task: getattr(self.task_weights, task) for task in self.tasks}
        for task in EMBEDDED:
            if task in weights and self.vector_s is not None:
                weights[f"{task}_end"] = weights[task]
            if task in weights and getattr(self, "encoder" if task == "audio" else "video_encoder") is not None:
                weights[f"{task}_decoder"] = weights[task]
        return weights

    def loss(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Cross-entropy in nats of what is written; squared errors in the scale of [-1, 1]."""
        assert isinstance(model, MultitaskModel)
        hidden = hidden_states(model, batch)
        zero = hidden.sum() * 0
        losses = dict.fromkeys(self.terms, zero)
        if any(task in losses for task in WRITTEN):
            row, at = (batch["targets"] >= 0).nonzero(as_tuple=True)  # a third of the steps
            nats = F.cross_entropy(model.text_logits(hidden[row, at]).float(), batch["targets"][row, at],
                                   reduction="none") * batch["weight"][row]
            losses |= {task: (nats * (batch["task"][row] == TASKS.index(task))).sum()
                       for task in WRITTEN if task in losses}
        for task in (task for task in EMBEDDED if task in losses and task in model.heads):
            losses |= embedding_losses(model, task, batch, hidden, generator)
        return losses

    def baselines(self, batch: Batch, fitted: Fitted) -> dict[str, dict[str, Tensor]]:
        """``simple``: of what is written a smoothed bigram of the task's training texts, of embeddings their mean (with
        ``head=flow``, their mean and deviation), of ends and decoders the mean as well."""
        lost = {name: torch.zeros((), dtype=torch.float64) for name in self.terms}
        for task in (task for task in self.tasks if task in WRITTEN and f"bigram.{task}.pairs" in fitted.arrays):
            lost[task] = bigram_loss(task, batch, fitted)
        for task in (task for task in self.tasks if task in fitted.data["sizes"]):
            lost |= mean_losses(task, batch, fitted, self.head, self.vector_s is not None)
        return {"simple": lost}

    # Generation

    def question(self, example: Example) -> Question:
        task = example.fields["task"]
        asked = {"task": task}
        if task in WRITTEN:
            return Question(None, Unit(example.fields["output"], "text"), example.fields["prompt"], fields=asked)
        return Question(None, example.units.get(task), example.fields["prompt"], fields=asked)

    def prompt(self, request: Request) -> Prompt:
        """A task and a text; ``fields={"embedding": True}`` asks for the numbers as JSON in place of the medium, and
        with a recording or a clip in place of the text for what the frozen network says of it. ``{"sound": True}``
        puts under a clip what task audio makes of the same prompt and seed."""
        if request.fields.get("embedding") is True and (request.audio or request.video):
            return self._given(request)
        for name in ("audio", "video"):
            if getattr(request, name) is not None and not request.fields.get(name):  # a row's file is its own answer
                raise ValueError(f"{name} has no meaning for this model; it takes a task and a text.")
        task = request.task or request.fields.get("task")
        if task is None and len(self.tasks) == 1:
            task = self.tasks[0]
        if task not in self.tasks:
            given = "task is missing" if task is None else f"task {task!r} is none of this model's"
            raise ValueError(f"{given}: give one of {', '.join(self.tasks)}.")
        as_json = request.fields.get("embedding") is True
        if as_json and task in WRITTEN:
            raise ValueError(f"embedding has no meaning for task {task}: it writes text.")
        sound = request.fields.get("sound") is True
        if sound and (task != "video" or as_json or "audio" not in self.tasks):
            raise ValueError("sound has no meaning here: it is that of a clip, and of a model of both audio and video.")
        how = self._generation(request.options, task)
        if self.encoder is not None and how.seconds is not None and how.seconds > self.segment_s:
            raise ValueError(f"seconds = {how.seconds:g}: this model's decoder makes up to {self.segment_s:g}.")
        text = prompt_of(request.fields) or request.text or ""
        if not text and task in EMBEDDED:
            raise ValueError(f"prompt is missing: say what the {task} is to be.")
        return Prompt({}, {"task": task, "prompt": text, "asked": True, "as_json": as_json, "sound": sound})

    def _given(self, request: Request) -> Prompt:
        """A file to be embedded: nothing is generated."""
        media: Audio | Video
        task, media = ("audio", request.audio) if request.audio else ("video", request.video)  # type: ignore[assignment]
        if task not in self.tasks or request.task not in (None, task):
            raise ValueError(f"{task} has no embedding for task {request.task or 'none'} of this model: it knows "
                             f"{', '.join(self.tasks)}.")
        request.options.allow()
        seconds = media.seconds if isinstance(media, Audio) else len(media.frames) / media.frame_rate_hz
        most = clip_dct.CLIP_S if task == "video" and self.vector_s is None else self.segment_s
        if seconds > most + 0.05:
            raise ValueError(f"{task} lasts {seconds:.2f} s, and an embedding stands for up to {most:g}: send a part.")
        return Prompt({task: media}, {"task": task, "prompt": "", "asked": True, "as_json": True, "given": True})

    def _generation(self, options: Options, task: str | None = None) -> Generation:
        written = ("max_tokens", "temperature", "top_k", "top_p")
        drawn = ("max_tokens", "temperature", *(("num_steps",) if self.head == "flow" else ()))
        if task in WRITTEN:
            options.allow(*written)
        elif task is not None:
            options.allow(*drawn, *(("seconds",) if task == "audio" and self.vector_s is None else ()))
        own = Generation(None, self.temperature, self.top_k, self.top_p, self.num_steps, None)
        return replace(own, **options.given())  # type: ignore[arg-type]

    def sampler(self, model: nn.Module, fitted: Fitted, slots: int) -> MultitaskSampler:
        assert isinstance(model, MultitaskModel)
        tokens = open_tokens(fitted.data["tokens"])
        missing = [task for task in self.tasks if task in EMBEDDED and task not in model.heads]
        frames = functools.partial(self._sound_frames, fitted)
        return MultitaskSampler(model, tokens, slots, self._generation, self.vector_s, frames, missing)

    def _sound_frames(self, fitted: Fitted, seconds: float | None) -> int:
        """The codec's frames that a vector stands for; a single one lasts as long as asked."""
        return max(1, round((self.vector_s or seconds or self.segment_s) * fitted.data["frame_rate_hz"]))

    def renderer(self, fitted: Fitted, device: torch.device | str) -> MediaRenderer:
        codec = self.codec.load(device) if "audio" in fitted.data["sizes"] else None
        return MediaRenderer(open_tokens(fitted.data["tokens"]), codec, self.tasks, self.vector_s or self.segment_s)

    # Judgement

    def figures(self, model: nn.Module, batch: Batch, fitted: Fitted) -> dict[str, Mean | Retrieval]:
        assert isinstance(model, MultitaskModel)
        return figures(model, batch, fitted, self.num_steps)

    def metrics(self) -> dict[str, Callable[[], Metric]]:
        return {}
