"""Sound from an instruction, by flow matching in a codec's latents: one model for many tasks.

A sample may carry a description, which is asked by cross-attention, and what lies along its time (notes, a noisy
recording, moving pictures, the characters of a text), which is added to the frames; either may be absent, and each is
guided by a scale of its own. Where nothing says how long the sound is, its duration is foreseen from the text.

It takes up UniFlow-Audio, and does its two to-dos: both kinds of conditions at once, and figures by task. What it does
otherwise: one scale for each kind of condition, a seed a request, averaged weights.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from avray.codecs.base import CodecConfig, Latents
from avray.encoders.clips import ClipStates, PictureNumbers
from avray.encoders.text_states import TextStates
from avray.errors import DataError
from avray.families.continuation import LatentsRenderer
from avray.families.instruct_batch import (
    FRAMES,
    LATENTS,
    OUTPUT,
    SOUND,
    STATES,
    VIDEO,
    Layout,
    byte_ids,
    collate,
)
from avray.families.instruct_figures import task_metrics
from avray.families.instruct_model import InstructModel
from avray.families.instruct_sampler import FlowSampler, Generation
from avray.families.instruct_tasks import (
    ROLL_WIDTH,
    TASKS,
    Condition,
    conditions_of,
    parse_notes,
)
from avray.family import (
    Batch,
    Column,
    Example,
    Fitted,
    Mean,
    Metric,
    Options,
    Prompt,
    Question,
    Request,
    Row,
    Unit,
)
from avray.media import Video, probe
from avray.metrics.accumulators import PitchError, audio_metrics
from avray.nn.conditioning import AdapterConfig
from avray.nn.dit import DiTConfig
from avray.nn.flow import Solver, Walk, best_linear_loss, draw_levels, mixed

_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg")
_SLACK_S = 1e-6


@dataclass(frozen=True)
class Instruct:
    """``tasks`` are those of ``instruct_tasks.TASKS`` that the model learns; a row without one is of the first.
    ``segment_s`` is the longest sound. ``condition_dropout`` is the share of rows that go without their conditions."""

    codec: CodecConfig
    tasks: tuple[str, ...] = ("text_to_audio",)
    segment_s: float = 4.0
    network: DiTConfig = DiTConfig()
    adapter: AdapterConfig = AdapterConfig()
    text_encoder: TextStates | None = None
    """Reads descriptions and instructions, frozen, its output kept in the cache; null: bytes, trained with the model.
    Spoken texts are bytes in any case."""
    video_encoder: ClipStates | None = None
    """Sees the pictures of ``video_to_audio``, frozen; null: 160 numbers a picture, 25 pictures a second."""
    text_layers: int = 2
    text_heads: int = 3
    max_text: int = 512
    """Bytes of the longest text."""
    noise_snr_db: float = 0.0
    """Of the noise added for ``enhancement`` where a row brings no noisy version."""
    noise_folder: str | None = None
    """Recordings to add as noise; null: white noise."""
    noisy_versions: int = 1
    """Of each piece for ``enhancement``, every one an example under a noise of its own: with a few minutes of speech, a
    model of one version learns these noises by heart."""
    lowpass_hz: float = 8000.0
    """The sample rate that ``super_resolution`` starts from where a row brings no version of its own."""
    condition_dropout: float = 0.2
    level_mean: float = 2.0
    level_spread: float = 1.0
    duration_weight: float = 1.0

    num_steps: int = 20
    solver: Solver = "euler"
    sway: float = -1.0
    guidance_scale: float = 1.0
    aligned_guidance_scale: float = 1.0
    rescale: float = 0.0

    def __post_init__(self) -> None:
        for name in ("segment_s", "text_layers", "text_heads", "max_text", "level_spread", "noisy_versions"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"family.{name} must be above 0 and finite, got {getattr(self, name)}.")
        unknown = [task for task in self.tasks if task not in TASKS]
        if unknown or not self.tasks:
            raise ValueError(f"family.tasks must name some of {', '.join(TASKS)}, got {', '.join(unknown) or 'none'}.")
        if not 0 <= self.condition_dropout <= 0.6:
            raise ValueError(f"family.condition_dropout must be from 0 to 0.6, got {self.condition_dropout}.")
        if self.network.width % self.text_heads or self.network.width // self.text_heads % 2:
            raise ValueError(f"family.text_heads = {self.text_heads} must divide family.network.width = "
                             f"{self.network.width} into even parts.")
        if self.adapter.name == "prefix":
            for task in self.tasks:
                if "text" not in TASKS[task].takes:
                    raise ValueError(f"family.adapter.name = prefix puts the instruction in front of a description, "
                                     f"which task {task} has not: take cross_attention or plain.")
        self._generation(Options())

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """What the tasks take, in one order."""
        taken = {condition for task in self.tasks for condition in TASKS[task].takes}
        return tuple(name for name in ("text", "spoken", "notes", "sound", "video") if name in taken)  # type: ignore[misc]

    # Data

    def refusal(self, row: Row) -> str | None:
        """Of the rows of this model's tasks, those that lack what their task needs, have notes that are none or begin
        beyond the clip, whose text is too long, or the whole sound that it describes (``family.Choosy``)."""
        task = row.get("task") or self.tasks[0]
        if task not in self.tasks:
            return None
        wanted = _wanted(row, task)
        if not wanted:
            return "audio is missing: it is what the model learns to make"
        try:
            given = conditions_of(task, row)
            parse_notes(given.get("notes") or (), "its notes", row["duration_s"])
            byte_ids(str(row.get("text") or ""), "its text", self.max_text)
            byte_ids(str(row.get("instruction") or ""), "its instruction", self.max_text)
            if _is_whole(given) and row["duration_s"] > self.segment_s + _SLACK_S:
                return (f"it lasts {row['duration_s']:g} s, over family.segment_s = {self.segment_s:g}: raise that, "
                        "or cut it, with a text for each piece")
            if wanted == row.get("video"):
                probe(wanted)  # many a clip has no sound
        except (ValueError, DataError) as error:
            return str(error)
        return None

    def segment(self, rows: Sequence[Row]) -> list[Example]:
        """A row whose task is among ``tasks`` is one example, unless its task goes from sound or pictures to sound:
        then it is cut into pieces of ``segment_s``. A clip's own sound is what is wanted of it where it brings no
        other."""
        examples = []
        for row in rows:
            task = row.get("task") or self.tasks[0]
            if task in self.tasks and _wanted(row, task):
                examples += self._examples(row, task, conditions_of(task, row))
        return examples

    def _examples(self, row: Row, task: str, given: Mapping[Condition, Any]) -> list[Example]:
        start, duration = row.get("start_s") or 0.0, row["duration_s"]
        fields = {"task": task, "instruction": row.get("instruction") or TASKS[task].instruction}
        fields |= {name: given[name] for name in ("text", "notes") if name in given}
        fields |= {"text": given["spoken"]} if "spoken" in given else {}
        if _is_whole(given):
            units = {OUTPUT: Unit(row["audio"], "audio", start, duration), **self._text_units(fields)}
            return [Example(str(row["id"]), units, fields, row.get("weight", 1.0))]
        length = min(self.segment_s, duration)
        made_noisy = TASKS[task].recipe == "noise" and not row.get("target_audio")
        examples = []
        for index, version in product(range(int(duration / length + 1e-6)),
                                      range(self.noisy_versions if made_noisy else 1)):
            at = round(start + index * length, 6)
            name = f"{row['id']}@{at:.3f}" + (f"~{version}" if version else "")
            units = {OUTPUT: Unit(str(_wanted(row, task)), "audio", at, length), **self._text_units(fields)}
            if "video" in given:
                units[VIDEO] = Unit(given["video"], "video", at, length)
            else:
                recipe = "" if row.get("target_audio") else self._recipe(task, name)
                units[SOUND] = Unit(given["sound"], "audio", at, length, recipe)
            examples.append(Example(name, units, fields, row.get("weight", 1.0)))
        return examples

    def _read(self, fields: Mapping[str, Any]) -> dict[str, str]:
        """The texts that a frozen encoder reads for a row or request of these fields."""
        if self.text_encoder is None:
            return {}
        described = "text" in TASKS[fields["task"]].takes
        names = [name for name in ("text", "instruction")
                 if fields.get(name) and (described if name == "text" else self.adapter.name != "plain")]
        return {name: str(fields[name]) for name in names}

    def _text_units(self, fields: Mapping[str, Any]) -> dict[str, Unit]:
        return {name: Unit(text, "text") for name, text in self._read(fields).items()}

    def _recipe(self, task: str, example: str) -> str:
        if TASKS[task].recipe == "lowpass":
            return f"lowpass:rate_hz={self.lowpass_hz:g}"
        seed = zlib.crc32(example.encode())
        source = ""
        if self.noise_folder is not None:
            noises = _recordings(self.noise_folder)
            source = f":source={noises[seed % len(noises)]}"
        return f"noise:snr_db={self.noise_snr_db:g}:seed={seed}{source}"

    def columns(self, fitted: Fitted | None) -> list[Column]:
        columns = [Column(LATENTS, Latents(self.codec))]
        if self.text_encoder is not None:
            columns.append(Column(STATES, self.text_encoder, "text", roles=("text", "instruction")))  # type: ignore[arg-type]
        if "video" in self.conditions:
            columns.append(Column(FRAMES, self._sees, "video", roles=(VIDEO,)))  # type: ignore[arg-type]
        return columns

    @property
    def _sees(self) -> ClipStates | PictureNumbers:
        return self.video_encoder or PictureNumbers()

    def fit(self, rows: Iterator[Row]) -> Fitted:
        """Mean and scale of each channel, and of the logarithm of the seconds."""
        codec = self.codec.load("cpu")
        number, total, squares = 0, np.zeros(codec.width), np.zeros(codec.width)
        seconds = []
        for row in rows:
            frames = row[f"{OUTPUT}.{LATENTS}"].astype(np.float64)
            number, total, squares = number + len(frames), total + frames.sum(0), squares + (frames**2).sum(0)
            seconds.append(math.log(len(frames) / codec.frame_rate_hz))
        sees = self._sees.load("cpu") if "video" in self.conditions else None
        pictures = {} if sees is None else {"video_width": sees.width, "video_rate_hz": sees.frame_rate_hz,
                                            "video_column": self._sees.column_id()}
        mean = total / number
        scale = np.sqrt(np.maximum(squares / number - mean**2, 0))
        scale = np.maximum(scale, max(0.01 * scale.max(), 1e-6))
        return Fitted({"mean": mean.astype(np.float32), "scale": scale.astype(np.float32)},
                      {"codec": self.codec.column_id(), "width": codec.width, "frame_rate_hz": codec.frame_rate_hz,
                       "text_width": self.text_encoder.load("cpu").width if self.text_encoder else 0,
                       "text_column": self.text_encoder.column_id() if self.text_encoder else "",
                       "log_seconds": [float(np.mean(seconds)), max(float(np.std(seconds)), 0.1)], **pictures})

    @property
    def _layout(self) -> Layout:
        return Layout(self.conditions, self.segment_s, self.max_text, self.adapter.name != "plain",
                      self.text_encoder is not None)

    def collate(self, rows: Sequence[Row], fitted: Fitted) -> Batch:
        return collate(rows, fitted, self._layout)

    # Model

    def build(self, fitted: Fitted) -> InstructModel:
        if fitted.data["codec"] != self.codec.column_id():
            raise ValueError(f"codec = {self.codec.name} ({self.codec.column_id()}), but this model was fitted with "
                             f"{fitted.data['codec']}: ask for that one, or train anew.")
        column = self.text_encoder.column_id() if self.text_encoder else ""
        if fitted.data.get("text_column", "") != column:
            raise ValueError("family.text_encoder is not the one that this model was fitted with: ask for that one, or "
                             "train anew.")
        if "video" in self.conditions and fitted.data["video_column"] != self._sees.column_id():
            raise ValueError("family.video_encoder is not the one that this model was fitted with: ask for that one, "
                             "or train anew.")
        widths = {"text": 0, "spoken": 0, "notes": ROLL_WIDTH, "sound": fitted.data["width"],
                  "video": fitted.data.get("video_width", 0)}
        return InstructModel(self.network, self.adapter, self.text_layers, self.text_heads,
                             {name: widths[name] for name in self.conditions}, fitted.data.get("text_width", 0), fitted)

    def init(self, model: nn.Module, generator: torch.Generator) -> None:
        assert isinstance(model, InstructModel)
        model.init(generator)

    @property
    def terms(self) -> Mapping[str, float]:
        return {"flow": 1.0, "duration": self.duration_weight}

    def loss(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Squared errors of the direction over frames and of the logarithm of the seconds over texts. In evaluation a
        row's level and noise are its own, whatever the batch."""
        assert isinstance(model, InstructModel)
        rows, device = len(batch["lengths"]), batch["lengths"].device
        with_text = with_aligned = torch.ones(rows, dtype=torch.bool, device=device)
        if model.training:
            share = self.condition_dropout
            drawn = torch.rand(rows, generator=generator, device=device)
            with_text = drawn >= share
            with_aligned = ~((drawn < share / 2) | ((drawn >= share) & (drawn < 1.5 * share)))
            levels = draw_levels(rows, generator, device, self.level_mean, self.level_spread)
            noise = torch.randn(batch["output"].shape, generator=generator, device=device)
        else:
            levels, noise = self._own_draws(batch)
        asked = model.ask(batch.tensors)
        frames = model.normalised(batch["output"])
        valid = torch.arange(frames.shape[1], device=device) < batch["lengths"][:, None]
        conditions = model.condition(asked, batch.tensors, batch["lengths"], frames.shape[1], with_text, with_aligned)
        found = model.network(mixed(frames, noise, levels), levels, conditions, valid)
        error = (found.float() - (noise - frames)).square().sum(-1)
        flow = ((error * valid).sum(1) * batch["weight"]).sum()
        off = (asked.log_seconds.float() - batch["log_seconds"]).square()
        return {"flow": flow, "duration": (off * batch["told"]).sum()}

    def _own_draws(self, batch: Batch) -> tuple[Tensor, Tensor]:
        levels, noise = torch.empty(len(batch["seed"])), torch.zeros(batch["output"].shape)
        for row, (seed, length) in enumerate(zip(batch["seed"].tolist(), batch["lengths"].tolist(), strict=True)):
            own = torch.Generator().manual_seed(seed)
            levels[row] = draw_levels(1, own, "cpu", self.level_mean, self.level_spread)
            noise[row, :length] = torch.randn(length, noise.shape[2], generator=own)
        return levels.to(batch["output"].device), noise.to(batch["output"].device)

    def baselines(self, batch: Batch, fitted: Fitted) -> dict[str, dict[str, Tensor]]:
        """The best guess of the direction for white noise of the data's spread, and the mean duration."""
        mean, scale = fitted.data["log_seconds"]
        flow = best_linear_loss(self.level_mean, self.level_spread) * (batch["lengths"] * batch["weight"]).sum()
        duration = ((batch["log_seconds"] - mean).square() * batch["told"]).sum()
        return {"best_linear": {"flow": flow * fitted.data["width"], "duration": duration}}

    def figures(self, model: nn.Module, batch: Batch, fitted: Fitted) -> dict[str, Mean]:
        """How well durations are foreseen (``family.Judged``)."""
        assert isinstance(model, InstructModel)
        told = batch["told"] > 0
        if not bool(told.any()):
            return {}
        ratio = (model.ask(batch.tensors).log_seconds.detach() - batch["log_seconds"]).exp()[told]
        count = float(told.sum())
        return {"duration_within_10_percent": Mean(float(((ratio - 1).abs() <= 0.1).sum()), count),
                "duration_error_percent": Mean(float(100 * (ratio - 1).abs().sum()), count)}

    # Generation

    def question(self, example: Example) -> Question:
        return Question(prompt=example.units.get(SOUND) or example.units.get(VIDEO), target=example.units[OUTPUT],
                        text=example.fields.get("text"), fields=example.fields)

    def prompt(self, request: Request) -> Prompt:
        """What the request's task takes; without a task, the first of the model's that it has enough for."""
        fields = {"text": request.text or "", "audio": request.audio, "video": request.video,
                  "notes": request.fields.get("notes")}
        task = request.task or request.fields.get("task") or self._task_for(fields)
        if task not in self.tasks:
            raise ValueError(f"task = {task} is not one of this model's: {', '.join(self.tasks)}.")
        given = conditions_of(task, fields)
        for name, condition in (("text", "text"), ("audio", "sound"), ("video", "video"), ("notes", "notes")):
            if fields[name] and condition not in TASKS[task].takes and not (name == "text" and "spoken" in given):
                raise ValueError(f"{name} has no meaning for task {task}; it takes {', '.join(TASKS[task].takes)}.")
        self._generation(request.options)
        for name, media in (("audio", request.audio), ("video", request.video)):
            rate_hz = media.frame_rate_hz if isinstance(media, Video) else 1e6  # a clip is as long as its last frame
            if media is not None and media.seconds > self.segment_s + 1 / rate_hz:
                raise ValueError(f"{name} holds {media.seconds:.3g} s: this model takes at most {self.segment_s:g}.")
        plain = {"task": task, "instruction": str(request.fields.get("instruction") or TASKS[task].instruction)}
        if "notes" in given:
            parse_notes(given["notes"], "The request", request.options.seconds or self.segment_s)
            plain["notes"] = given["notes"]
        if fields["text"]:
            plain["text"] = fields["text"]
        byte_ids(str(fields["text"]), "text", self.max_text)
        byte_ids(plain["instruction"], "instruction", self.max_text)
        heard = {SOUND: request.audio} if request.audio is not None else {}
        seen = {VIDEO: request.video} if request.video is not None else {}
        return Prompt({**heard, **seen, **self._read(plain)}, plain)

    def _task_for(self, fields: Mapping[str, Any]) -> str:
        for task in self.tasks:
            try:
                conditions_of(task, fields)
            except ValueError:
                continue
            return task
        return self.tasks[0]

    def _generation(self, options: Options) -> Generation:
        options.allow("seconds", "guidance_scale", "aligned_guidance_scale", "num_steps")
        if options.seconds is not None and not 0 < options.seconds <= self.segment_s:
            raise ValueError(f"seconds must be above 0 and at most {self.segment_s:g}, which this model was trained "
                             f"with, got {options.seconds:g}.")
        given = options.given()
        walk = Walk(int(given.get("num_steps", self.num_steps)), self.solver, self.sway, self.rescale)
        return Generation(walk, given.get("guidance_scale", self.guidance_scale),
                          given.get("aligned_guidance_scale", self.aligned_guidance_scale), options.seconds)

    def sampler(self, model: nn.Module, fitted: Fitted, slots: int) -> FlowSampler:
        assert isinstance(model, InstructModel)
        rate = fitted.data["frame_rate_hz"]
        return FlowSampler(model, slots, rate, round(self.segment_s * rate), self._generation)

    def renderer(self, fitted: Fitted, device: torch.device | str) -> LatentsRenderer:
        return LatentsRenderer(self.codec.load(device))

    def metrics(self) -> dict[str, Callable[[], Metric]]:
        return {**audio_metrics(), "pitch_error_cents": PitchError}

    def task_metrics(self, task: str) -> dict[str, Callable[[], Metric]]:
        """What tells whether this task is done (``family.ByTask``)."""
        return task_metrics(task, self.codec)


def _is_whole(given: Mapping[Condition, Any]) -> bool:
    """Whether what a row is given is of its sound as a whole, so that no piece can be learnt."""
    return not {"sound", "video"} & set(given)


def _wanted(row: Row, task: str) -> str | None:
    """The recording that a row's task is to make."""
    if "video" in TASKS[task].takes:
        return row.get("target_audio") or row.get("audio") or row.get("video")
    return (row.get("target_audio") if "sound" in TASKS[task].takes else None) or row.get("audio")


@functools.cache
def _recordings(folder: str) -> tuple[str, ...]:
    """Paths of a folder's recordings. DataError where there are none."""
    found = sorted(str(path) for path in Path(folder).absolute().rglob("*") if path.suffix.lower() in _SUFFIXES)
    if not found:
        raise DataError(f"family.noise_folder = {folder} holds no recording.")
    return tuple(found)
