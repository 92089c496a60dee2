"""What comes next, in a codec's continuous latents: a transformer that maps one segment of sound to the next.

Every output frame is predicted from the whole input segment at once, so a segment costs one forward pass; longer
continuations chain segments, each made from the one before. With its preset this is the original's model to the
number (859,520 parameters). Its squared error predicts the mean, so the output is quieter and smoother than music is.

``normalise`` is ours, and costs no parameters. The original feeds latents as they are, which suits EnCodec's (around 0)
and not log-mel frames (around -8). ``scale`` takes the fitted mean and scale off the input and puts them back on the
output. ``change`` also adds what a segment usually keeps of the one before's mean frame, by channel and fitted (0.9 in
real music, 0.2 in the demo's fading phrases), so that the model begins at the best guess a mean frame allows. As shares
of the best baseline's loss after 240 steps on pairs 0.5 s apart, on held-out spans of two real songs and held-out songs
of the demo: ``none`` 1.03 and 0.67, ``scale`` 0.97 and 0.57, ``change`` 0.88 and 0.58.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from avray.codecs.base import Codec, CodecConfig, Latents
from avray.codecs.together import ToDecode
from avray.families.continuation_flow import (
    FlowHeadConfig,
    FlowOptions,
    FlowPredictor,
    FrameSampler,
    flow_loss,
    sequences,
)
from avray.family import (
    Batch,
    Column,
    Example,
    Fitted,
    FrameStream,
    Metric,
    Modality,
    Options,
    Piece,
    Prompt,
    Question,
    Request,
    Row,
    Unit,
)
from avray.media import Audio
from avray.metrics.accumulators import audio_metrics
from avray.nn.encoder import Encoder, dropout, sinusoidal_positions
from avray.nn.flow import best_linear_loss

Normalise = Literal["none", "scale", "change"]
Head = Literal["mse", "flow"]
INPUT, OUTPUT, LATENTS = "input", "output", "latents"
GRID_S = 0.08
"""Segments begin on multiples of this, and a prompt is as many of these long: whole frames at 12.5, 25, 50, 75 and 100
a second, so that what follows a prompt follows its last sample."""


@dataclass(frozen=True)
class Continuation:
    codec: CodecConfig
    segment_s: float = 16.0
    """Seconds of input, and of output."""
    num_layers: int = 4
    num_heads: int = 8
    feed_forward: int = 512
    dropout: float = 0.1
    stride_s: float | None = None
    """From the start of one pair to the next's; None: ``segment_s``. Less gives more pairs of the same sound."""
    max_pairs_per_song: int | None = 10
    """Spread over the recording; None: all."""
    head: Head = "mse"
    """``mse`` foresees the mean of what follows, a segment at a time; ``flow`` draws it frame by frame."""
    normalise: Normalise = "none"
    """With ``flow`` frames are always brought to mean 0 and scale 1."""
    flow: FlowHeadConfig = FlowHeadConfig()

    def __post_init__(self) -> None:
        for name in ("segment_s", "num_layers", "num_heads", "feed_forward", "max_pairs_per_song", "stride_s"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"family.{name} must be above 0, got {value}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"family.dropout must be from 0 to below 1, got {self.dropout}.")
        if self.head not in get_args(Head):
            raise ValueError(f"family.head must be one of mse, flow, got {self.head!r}.")
        if self.normalise not in get_args(Normalise):
            raise ValueError(f"family.normalise must be one of none, scale, change, got {self.normalise!r}.")

    # Data

    def segment(self, rows: Sequence[Row]) -> list[Example]:
        """Pairs of consecutive, not overlapping segments, at most ``max_pairs_per_song`` of a recording. A row with
        ``target_audio`` is one pair: the end of its ``audio``, and as much from the start of the other."""
        pairs: list[Example] = []
        for row in rows:
            if row.get("audio"):
                pairs += [self._given_pair(row)] if row.get("target_audio") else self._pairs(row)
        most = self.max_pairs_per_song or len(pairs)
        if len(pairs) <= most:
            return pairs
        return [pairs[i] for i in np.linspace(0, len(pairs) - 1, most).round().astype(int)]

    def _pairs(self, row: Row) -> list[Example]:
        begin, length, stride = row.get("start_s") or 0.0, self.segment_s, self.stride_s or self.segment_s
        first = math.ceil(begin / GRID_S - 1e-6) * GRID_S
        room = begin + row["duration_s"] - first - 2 * length
        number = int(room / stride + 1e-6) + 1 if room > -1e-6 else 0
        starts = [round(first + i * stride, 6) for i in range(number)]
        return [self._example(f"{row['id']}@{start:.3f}", row, row["audio"], start, start + length, length)
                for start in starts]

    def _given_pair(self, row: Row) -> Example:
        begin, duration = row.get("start_s") or 0.0, row["duration_s"]
        length = min(self.segment_s, duration)
        return self._example(str(row["id"]), row, row["target_audio"], begin + duration - length, 0.0, length)

    def _example(self, name: str, row: Row, target: str, start_s: float, target_s: float, length_s: float) -> Example:
        units = {INPUT: Unit(row["audio"], "audio", round(start_s, 6), length_s),
                 OUTPUT: Unit(target, "audio", round(target_s, 6), length_s)}
        return Example(name, units, weight=row.get("weight", 1.0))

    def columns(self, fitted: Fitted | None) -> list[Column]:
        return [Column(LATENTS, Latents(self.codec))]

    def fit(self, rows: Iterator[Row]) -> Fitted:
        """The latents' mean and standard deviation by channel, how much of a segment's own mean frame the next one
        keeps (least squares, from 0 to 1), and what the codec makes of silence."""
        codec = self.codec.load("cpu")
        if codec.width % self.num_heads:
            raise ValueError(f"family.num_heads = {self.num_heads} must divide the codec's width of {codec.width}.")
        number, total, squares = 0, np.zeros(codec.width), np.zeros(codec.width)
        means: dict[str, list[np.ndarray]] = {INPUT: [], OUTPUT: []}
        for row in rows:
            for role, role_means in means.items():
                frames = row[f"{role}.{LATENTS}"].astype(np.float64)
                number, total, squares = number + len(frames), total + frames.sum(0), squares + (frames**2).sum(0)
                role_means.append(frames.mean(0))
        mean = total / number
        scale = np.sqrt(np.maximum(squares / number - mean**2, 0))
        scale = np.maximum(scale, max(0.01 * scale.max(), 1e-6))  # a channel silent in the sample may not be elsewhere
        before, after = (np.array(role_means) - mean for role_means in means.values())
        kept = np.clip((before * after).sum(0) / np.maximum((before**2).sum(0), 1e-8), 0, 1)
        silence = codec.encode_batch([np.zeros(round(self.segment_s * codec.sample_rate_hz), np.float32)])[0]
        arrays = {"mean": mean, "scale": scale, "kept": kept, "silence": silence}
        return Fitted({name: array.astype(np.float32) for name, array in arrays.items()},
                      {"codec": self.codec.column_id(), "width": codec.width, "frame_rate_hz": codec.frame_rate_hz})

    def collate(self, rows: Sequence[Row], fitted: Fitted) -> Batch:
        """``input`` and ``output`` ``[batch, time, width]``, ``weight`` ``[batch, time]`` of each output frame in the
        loss; and ``valid`` ``[batch, time]``, the frames of the input, only where some row is shorter than the rest.
        Rows of weight 0 are all zeros. A request has no output, and a weight of 0 in every frame."""
        width, nominal = fitted.data["width"], round(self.segment_s * fitted.data["frame_rate_hz"])
        arrays = {role: [row.get(f"{role}.{LATENTS}") if row["weight"] else None for row in rows]
                  for role in (INPUT, OUTPUT)}
        lengths = [len(array) for role in arrays.values() for array in role if array is not None]
        time = max(lengths, default=nominal)
        tensors = {role: np.zeros((len(rows), time, width), np.float32) for role in arrays}
        valid, weight = np.zeros((len(rows), time), bool), np.zeros((len(rows), time), np.float32)
        for index, (row, given, wanted) in enumerate(zip(rows, arrays[INPUT], arrays[OUTPUT], strict=True)):
            heard = time if given is None else len(given)
            valid[index, :heard] = True
            if given is not None:
                tensors[INPUT][index, :heard] = given
            if given is not None and wanted is not None:
                both = min(heard, len(wanted))
                tensors[OUTPUT][index, :both] = wanted[:both]
                weight[index, :both] = row["weight"]
        named = {name: torch.from_numpy(array) for name, array in {**tensors, "weight": weight}.items()}
        if not valid.all():
            named["valid"] = torch.from_numpy(valid)
        if self.head == "mse":
            counts = {"mse": float(weight.sum(dtype=np.float64)) * width}
        else:
            heard, made = ([0 if array is None else len(array) for array in arrays[role]] for role in (INPUT, OUTPUT))
            joined = sequences(tensors[INPUT], tensors[OUTPUT], heard, made, [row["weight"] for row in rows])
            named |= {"sequence": torch.from_numpy(joined[0]), "sequence_weight": torch.from_numpy(joined[1])}
            counts = {"flow": float(joined[1].sum(dtype=np.float64)) * width}
        return Batch(named, counts, [str(row.get("id", "")) for row in rows])

    # Model

    def build(self, fitted: Fitted) -> Predictor | FlowPredictor:
        if fitted.data["codec"] != self.codec.column_id():
            raise ValueError(f"codec = {self.codec.name} ({self.codec.column_id()}), but this model was fitted with "
                             f"{fitted.data['codec']}: ask for that one, or train anew.")
        if self.head == "flow":
            longest = 2 * round(self.segment_s * fitted.data["frame_rate_hz"])
            if longest > self.flow.context:
                raise ValueError(f"family.flow.context = {self.flow.context} must hold two segments, which are "
                                 f"{longest} frames of this codec.")
            return FlowPredictor(self.flow, self.num_layers, self.num_heads, self.feed_forward, self.dropout, fitted)
        return Predictor(self, fitted)

    def init(self, model: nn.Module, generator: torch.Generator) -> None:
        """Matrices as Glorot has them, biases 0; the last one 0 too where the model predicts a change."""
        if isinstance(model, FlowPredictor):
            return model.init(generator)
        for module in model.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, generator=generator)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        assert isinstance(model, Predictor)
        if self.normalise == "change":
            nn.init.zeros_(model.narrow.weight)

    @property
    def terms(self) -> Mapping[str, float]:
        return {self.head: 1.0}

    def loss(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        if isinstance(model, FlowPredictor):
            return {"flow": flow_loss(model, batch, generator)}
        predicted = model(batch[INPUT], batch.tensors.get("valid"))
        return {"mse": squared_error(predicted, batch)}

    def baselines(self, batch: Batch, fitted: Fitted) -> dict[str, dict[str, Tensor]]:
        """The input again, its mean frame, and silence; of a flow, the best guess were the data white noise."""
        if self.head == "flow":
            return {"best_linear": {"flow": best_linear_loss() * batch["sequence_weight"].sum() * fitted.data["width"]}}
        given = batch[INPUT]
        silence = torch.from_numpy(fitted.arrays["silence"]).to(given.device)
        at = torch.arange(given.shape[1], device=given.device).clamp(max=len(silence) - 1)
        guesses = {"repeat": given, "mean": mean_frame(given, batch.tensors.get("valid")).expand_as(given),
                   "silence": silence[at].expand_as(given)}
        return {name: {"mse": squared_error(guess, batch)} for name, guess in guesses.items()}

    # Generation

    def question(self, example: Example) -> Question:
        answer = example.units[OUTPUT]
        return Question(prompt=example.units[INPUT], target=answer, seconds=answer.duration_s)

    def prompt(self, request: Request) -> Prompt:
        """Audio to continue, at any rate; nothing before its last segment (with ``flow`` its last minute, as far as
        ``flow.context`` holds it) and the codec's warm-up is looked at."""
        for name in ("text", "video", "task"):
            if getattr(request, name):
                raise ValueError(f"{name} has no meaning for this model; it takes audio.")
        audio = request.audio
        if audio is None:
            raise ValueError("audio is missing: this model continues a recording.")
        if audio.seconds < GRID_S:
            raise ValueError(f"audio holds {audio.seconds:.3g} s: this model continues at least {GRID_S:g} s.")
        self._num_frames(request.options, 1.0)
        if self.head == "flow":
            self._flow_options(request.options, 1.0)
        [column] = self.columns(None)
        heard_s = self.segment_s if self.head == "mse" else max(self.segment_s, 60.0)
        whole_s = heard_s if audio.seconds >= heard_s else 0.0
        further_s = min(audio.seconds - whole_s, column.context_s if whole_s else math.inf)
        kept_s = whole_s + int(further_s / GRID_S + 1e-6) * GRID_S
        return Prompt({INPUT: Audio(audio.samples[:, -round(kept_s * audio.sample_rate_hz) :], audio.sample_rate_hz)})

    def _num_frames(self, options: Options, frame_rate_hz: float) -> int:
        options.allow(*(("seconds",) if self.head == "mse" else ("seconds", "num_steps", "temperature")))
        seconds = self.segment_s if options.seconds is None else options.seconds
        if not 0 < seconds < math.inf:
            raise ValueError(f"seconds must be above 0 and finite, got {seconds}.")
        return max(1, round(seconds * frame_rate_hz))

    def _flow_options(self, options: Options, frame_rate_hz: float) -> FlowOptions:
        given = options.given()
        how = replace(self.flow, num_steps=int(given.get("num_steps", self.flow.num_steps)),
                      temperature=given.get("temperature", self.flow.temperature))
        return FlowOptions(self._num_frames(options, frame_rate_hz), how.num_steps, how.temperature)

    def sampler(self, model: nn.Module, fitted: Fitted, slots: int) -> WindowSampler | FrameSampler:
        rate = fitted.data["frame_rate_hz"]
        if isinstance(model, FlowPredictor):
            return FrameSampler(model, slots, functools.partial(self._flow_options, frame_rate_hz=rate))
        wanted = functools.partial(self._num_frames, frame_rate_hz=rate)
        return WindowSampler(model, slots, round(self.segment_s * rate), wanted)

    def renderer(self, fitted: Fitted, device: torch.device | str) -> LatentsRenderer:
        return LatentsRenderer(self.codec.load(device))

    def metrics(self) -> dict[str, Callable[[], Metric]]:
        return audio_metrics()


class Predictor(nn.Module):
    """LayerNorm, positions, encoder, LayerNorm, and two linear layers."""

    def __init__(self, config: Continuation, fitted: Fitted) -> None:
        super().__init__()
        width = fitted.data["width"]
        self.dropout, self.normalise = config.dropout, config.normalise
        self.norm = nn.LayerNorm(width)
        self.encoder = Encoder(width, config.num_layers, config.num_heads, config.feed_forward, config.dropout)
        self.out_norm = nn.LayerNorm(width)
        self.widen = nn.Linear(width, 2 * width)
        self.narrow = nn.Linear(2 * width, width)
        self.mean, self.scale, self.kept = (torch.from_numpy(fitted.arrays[name]) for name in ("mean", "scale", "kept"))

    def forward(self, frames: Float[Tensor, "batch time width"],
                valid: Bool[Tensor, "batch time"] | None = None) -> Float[Tensor, "batch time width"]:
        """The segment that follows ``frames``, of the same length; both in the codec's own latents."""
        mean, scale, kept = (tensor.to(frames.device) for tensor in (self.mean, self.scale, self.kept))
        if self.normalise == "none":
            return self.predict(frames, valid)
        predicted = mean + scale * self.predict((frames - mean) / scale, valid)
        return predicted + kept * (mean_frame(frames, valid) - mean) if self.normalise == "change" else predicted

    def predict(self, frames: Tensor, valid: Tensor | None) -> Tensor:
        frames = self.norm(frames) + sinusoidal_positions(frames.shape[1], frames.shape[2], frames.device)
        frames = self.out_norm(self.encoder(frames, valid))
        hidden = dropout(nn.functional.gelu(self.widen(frames)), self.dropout if self.training else 0.0)
        return self.narrow(hidden)


def mean_frame(frames: Float[Tensor, "batch time width"],
               valid: Bool[Tensor, "batch time"] | None) -> Float[Tensor, "batch 1 width"]:
    if valid is None:
        return frames.mean(1, keepdim=True)
    return (frames * valid[..., None]).sum(1, keepdim=True) / valid.sum(1)[:, None, None]


def squared_error(predicted: Float[Tensor, "batch time width"], batch: Batch) -> Float[Tensor, ""]:
    """Summed over channels and over frames by their weight, in float32 whatever the precision."""
    return ((predicted.float() - batch[OUTPUT]).square().sum(-1) * batch["weight"]).sum()


@dataclass
class _Slot:
    window: Float[Tensor, "time width"]
    left: int
    """Frames still to be made."""


class WindowSampler:
    """A ``Sampler`` whose step makes one segment for each busy slot, from the one before; a piece is latents
    ``[time, width]``. Every step runs all slots at the full segment's length, so that a slot's frames are the same
    bits whatever the others do; a shorter prompt is continued in steps of its own length."""

    def __init__(self, model: nn.Module, slots: int, num_frames: int, wanted: Callable[[Options], int]) -> None:
        self.model, self.slots, self.num_frames, self.wanted = model.eval(), slots, num_frames, wanted
        self.device = next(model.parameters()).device
        self.busy: dict[int, _Slot] = {}

    def admit(self, slots: Sequence[int], batch: Batch, seeds: Sequence[int], options: Sequence[Options]) -> None:
        for row, slot in enumerate(slots):
            assert slot not in self.busy, f"slot {slot} is busy"
            valid = batch.tensors.get("valid")
            frames = batch[INPUT][row] if valid is None else batch[INPUT][row, valid[row]]
            self.busy[slot] = _Slot(frames[-self.num_frames :].to(self.device), self.wanted(options[row]))

    def drop(self, slot: int) -> None:
        self.busy.pop(slot, None)

    @torch.inference_mode()
    def step(self) -> list[Piece]:
        if not self.busy:
            return []
        width = next(iter(self.busy.values())).window.shape[1]
        frames = torch.zeros(self.slots, self.num_frames, width, device=self.device)
        valid = torch.ones(self.slots, self.num_frames, dtype=torch.bool, device=self.device)
        for index, slot in self.busy.items():
            frames[index, : len(slot.window)] = slot.window
            valid[index, len(slot.window) :] = False
        predicted = self.model(frames, valid)
        pieces = []
        for index, slot in list(self.busy.items()):
            slot.window = predicted[index, : len(slot.window)]
            made = slot.window[: slot.left]
            slot.left -= len(made)
            pieces.append(Piece(index, made.float().cpu().numpy(), slot.left == 0))
            if slot.left == 0:
                self.drop(index)
        return pieces


@dataclass(frozen=True)
class LatentsRenderer:
    """Latents to sound, through the codec's only decoder."""

    codec: Codec
    modality: Modality = "audio"

    @property
    def sample_rate_hz(self) -> int:
        return self.codec.sample_rate_hz

    def open(self) -> LatentsRender:
        return LatentsRender(self.codec.decoder())


@dataclass
class LatentsRender:
    """One request's latents ``[time, width]``."""

    decoder: FrameStream

    def push(self, data: np.ndarray, last: bool) -> ToDecode:
        return ToDecode(self.decoder, data, last)
