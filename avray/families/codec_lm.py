"""A language model over codec tokens: trains on any codec with codes, continues sound, and speaks a text put in front.

A window of K codebooks becomes token steps by a pattern (``flatten``, ``delay``, ``parallel``). A sequence is the
text's bytes (where the model takes text), a start, and the steps, padded at the end only; the step drawn from position
p stands at p + 1, so that a context of n draws n steps. Bytes have an embedding of their own, apart from the codes, and
a row without text simply starts at once: that is also what guidance compares with, and what a row whose text is dropped
while training is moved to. With ``Flatten(offsets=False)``, 4 codebooks of 1024 and no text this is the original's
model to the number; its windows began anywhere, here they begin on a frame.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from avray.codecs.base import Codec, CodecConfig, Codes, Latents
from avray.families.codec_lm_sampler import CodecSampler, CodesRenderer, Generation
from avray.family import Batch, Column, Example, Fitted, Mean, Metric, Options, Prompt, Question, Request, Row, Unit
from avray.media import Audio
from avray.metrics.accumulators import LevelError, LogSpectralDistance, SilenceFraction
from avray.metrics.frechet import FrechetDistance
from avray.nn.bigram import Bigram
from avray.nn.kv_cache import Weights
from avray.nn.patterns import Delay, Layout, Pattern, read_pattern
from avray.nn.transformer import Mlp, Norm, Positions, Transformer, TransformerConfig

Text = Literal["none", "caption", "transcript"]
CODEC, BIGRAM = "codec.", "bigram."
MIN_REMAINDER_S, MIN_ROW_S = 0.5, 0.1


@dataclass(frozen=True)
class CodecLM:
    """``text`` is what stands in front: a ``caption`` holds for every window of its recording, a ``transcript`` only
    for the first, whose speech it spells out from the beginning. ``stop`` adds an id that ends a recording, so that
    the model can end by itself. ``condition_dropout`` of the rows lose their text in training, for guidance. Then come
    the transformer's settings (``TransformerConfig``) and the defaults of ``Options``. ``weights`` is how it generates:
    ``torch`` on any device, or ``float32``, ``bfloat16`` or ``int8`` weights in a step compiled for this CPU, which
    needs gcc (``avray.nn.native``); ``cuda_graph`` captures torch's step on an NVIDIA GPU."""

    codec: CodecConfig
    num_codebooks: int = 4
    pattern: Pattern | str | Mapping[str, Any] = Delay()
    segment_s: float = 4.0
    text: Text = "none"
    text_bytes: int = 256
    stop: bool = False
    condition_dropout: float = 0.1

    context: int = 2048
    width: int = 384
    num_layers: int = 6
    num_heads: int = 6
    num_kv_heads: int | None = None
    mlp: Mlp = "gelu"
    mlp_width: int | None = None
    norm: Norm = "layer"
    positions: Positions = "learned"
    rotary_base: float = 10_000.0
    qk_norm: bool = False
    tied: bool = False
    bias: bool = True
    dropout: float = 0.0
    attention_dropout: float = 0.0

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    guidance_scale: float = 3.0
    weights: Weights = "torch"
    cuda_graph: bool = False

    def __post_init__(self):
        object.__setattr__(self, "pattern", read_pattern(self.pattern))
        if self.num_codebooks < 1:
            raise ValueError(f"family.num_codebooks = {self.num_codebooks} must be at least 1.")
        if self.segment_s <= 0:
            raise ValueError(f"family.segment_s = {self.segment_s} must be above 0.")
        if self.text not in ("none", "caption", "transcript"):
            raise ValueError(f"family.text = {self.text!r} is not one of none, caption, transcript.")
        if self.weights not in get_args(Weights):
            raise ValueError(f"family.weights = {self.weights!r} is not one of {', '.join(get_args(Weights))}.")
        if not 0 <= self.condition_dropout < 1:
            raise ValueError(f"family.condition_dropout = {self.condition_dropout} must be at least 0 and below 1.")
        self._transformer(self.num_codebooks, 1)
        self._generation(Options())

    # Data

    def segment(self, rows: Sequence[Row]) -> list[Example]:
        """Consecutive windows of ``segment_s``; a remainder of half a second or more is a shorter one, and so is a
        whole row of a tenth of a second or more: a spoken digit takes four."""
        examples = []
        for row in rows:
            text = self._text(row)
            if not row.get("audio") or (self.text == "transcript" and not text):
                continue
            stop = row["start_s"] + row["duration_s"]
            num_windows = int((row["duration_s"] + self.segment_s - MIN_REMAINDER_S) / self.segment_s)
            num_windows = max(num_windows, int(row["duration_s"] >= MIN_ROW_S))
            for i in range(num_windows if self.text != "transcript" else min(num_windows, 1)):
                start = row["start_s"] + i * self.segment_s
                duration = min(self.segment_s, stop - start)
                ends = stop - start <= self.segment_s
                units = {"audio": Unit(row["audio"], "audio", start, duration)}
                examples.append(Example(f"{row['id']}@{start:.3f}", units, {"text": text, "ends": ends},
                                        row.get("weight", 1.0)))
        return examples

    def _text(self, row: Mapping[str, object]) -> str:
        """The row's text, "" where it has none or the model takes none. ValueError where it is too long."""
        text = str(row.get("text") or "") if self.text != "none" else ""
        if len(text.encode()) > self.text_bytes:
            raise ValueError(f"The text of {row.get('id', 'the request')} has {len(text.encode())} bytes, more than "
                             f"family.text_bytes = {self.text_bytes}: shorten it, or train with more.")
        return text

    def columns(self, fitted: Fitted | None) -> list[Column]:
        if fitted is None and self.codec.needs_fit:
            return [Column("latents", Latents(self.codec))]
        state = codec_state(fitted) if fitted and self.codec.needs_fit else None
        return [Column("codes", Codes(self.codec, self.num_codebooks, state), dtype="uint16")]

    def fit(self, rows: Iterator[Row]) -> Fitted:
        """Codebooks where the codec has none, then the counts of the bigram, on the sample's codes."""
        state = None
        if self.codec.needs_fit:
            latents = [row["audio.latents"] for row in rows if row.get("audio.latents") is not None]
            state = self.codec.fit(np.concatenate(latents).astype(np.float32))
        codec = self.codec.load("cpu", state)
        self._check(codec)
        if self.codec.needs_fit:
            recordings = [to_codes(codec, sample, self.num_codebooks) for sample in latents]
        else:
            recordings = [row["audio.codes"] for row in rows if row.get("audio.codes") is not None]
        layout = read_pattern(self.pattern).layout(self.num_codebooks, codec.cardinality)
        depth = all(before < after for before, after in zip(layout.delays, layout.delays[1:], strict=False))
        bigram = Bigram.fit(recordings, codec.cardinality, depth)
        arrays = {BIGRAM + name: array for name, array in bigram.arrays().items()}
        data = {"codec": self.codec.column_id(), "cardinality": codec.cardinality,
                "frame_rate_hz": codec.frame_rate_hz}
        if state is not None:
            arrays |= {CODEC + name: array for name, array in state.arrays.items()}
            data["codec_data"] = dict(state.data)
        return Fitted(arrays, data)

    def _check(self, codec: Codec) -> None:
        if self.num_codebooks > codec.num_codebooks:
            raise ValueError(f"family.num_codebooks = {self.num_codebooks}, but codec {self.codec.name} has "
                             f"{codec.num_codebooks}.")
        layout = read_pattern(self.pattern).layout(self.num_codebooks, codec.cardinality)
        name, least = read_pattern(self.pattern).name, layout.num_steps(4)
        room = self.context - (self.text_bytes if self.text != "none" else 0)
        steps = layout.num_steps(round(self.segment_s * codec.frame_rate_hz) + self.stop)
        if room < least:
            raise ValueError(f"family.context leaves {room} steps for {self.num_codebooks} codebooks with pattern "
                             f"{name}: it takes at least {least}.")
        if steps > room:
            most = layout.num_frames(room) / codec.frame_rate_hz
            raise ValueError(f"family.segment_s = {self.segment_s:g} makes {steps} steps with pattern {name}, but "
                             f"family.context leaves {room}: use at most {int(most * 100) / 100:g} s or a larger "
                             "context.")

    def collate(self, rows: Sequence[Row], fitted: Fitted) -> Batch:
        """``inputs`` and ``targets`` ``[batch, steps, streams]`` (-1 is nothing), ``text`` ``[batch, steps]`` bytes in
        front (-1 elsewhere), ``start`` ``[batch]`` where the steps begin, and the ``codes`` ``[batch, frames,
        codebooks]`` themselves. Rows of weight 0 have no targets."""
        layout = self.layout(fitted)
        codes = [self._codes(row, layout) for row in rows]
        tokens = [layout.tokens(c) for c in codes]
        texts = [self._text(row).encode() for row in rows]
        window = layout.num_steps(round(self.segment_s * fitted.data["frame_rate_hz"]) + self.stop)
        steps = max(window, *(len(text) + len(t) for text, t in zip(texts, tokens, strict=True)))
        if any(texts):
            steps = -(-steps // 64) * 64  # few shapes, so that a compiled step is compiled a few times
        inputs = np.full((len(rows), steps, layout.num_streams), -1, np.int64)
        targets, text = inputs.copy(), np.full((len(rows), steps), -1, np.int64)
        first = np.array([o if layout.num_streams > 1 else 0 for o in layout.offsets])[: layout.num_streams]
        weights = np.array([row.get("weight", 1.0) for row in rows], np.float32)
        for i, (bytes_, token) in enumerate(zip(texts, tokens, strict=True)):
            begin = len(bytes_)
            text[i, :begin] = list(bytes_)
            inputs[i, begin + 1 : begin + len(token)] = token[:-1]
            if weights[i] > 0:
                targets[i, begin : begin + len(token)] = np.where(token < 0, -1, token - first)
        padded = np.full((len(rows), max(map(len, codes)), self.num_codebooks), -1, np.int64)
        for i, c in enumerate(codes):
            padded[i, : len(c)] = c if weights[i] > 0 else -1
        tensors = {"inputs": inputs, "targets": targets, "text": text, "codes": padded,
                   "start": np.array([len(b) for b in texts], np.int64), "weight": weights}
        return Batch({name: torch.from_numpy(array) for name, array in tensors.items()},
                     {"ce": float((targets >= 0).sum((1, 2)) @ weights)}, [str(row.get("id", "")) for row in rows])

    def _codes(self, row: Row, layout: Layout) -> np.ndarray:
        """``[frames, codebooks]``; after a recording's last frame one more with the stop id in its first codebook."""
        codes = row.get("audio.codes")
        if codes is None:
            return np.zeros((0, self.num_codebooks), np.int64)
        codes = codes.astype(np.int64)
        if self.stop and row.get("ends"):
            codes = np.concatenate([codes, np.full((1, self.num_codebooks), -1)])
            codes[-1, 0] = layout.cardinality - 1
        return codes

    # Model

    def layout(self, fitted: Fitted) -> Layout:
        """The pattern over the codec's ids, and one more where there is a stop."""
        return read_pattern(self.pattern).layout(self.num_codebooks, fitted.data["cardinality"] + self.stop)

    def build(self, fitted: Fitted) -> CodecTransformer:
        if fitted.data["codec"] != self.codec.column_id():
            raise ValueError(f"codec = {self.codec.name} ({self.codec.column_id()}), but the checkpoint was trained "
                             f"with {fitted.data['codec']}: ask for that one, or train anew.")
        layout = self.layout(fitted)
        return CodecTransformer(self._transformer(layout.vocabulary, layout.num_streams), self.text != "none")

    def _transformer(self, vocabulary: int, num_streams: int) -> TransformerConfig:
        own = {f.name for f in fields(self)}
        shared = {f.name: getattr(self, f.name) for f in fields(TransformerConfig) if f.name in own}
        return TransformerConfig(vocabulary=vocabulary, num_streams=num_streams, **shared)

    def init(self, model: CodecTransformer, generator: torch.Generator) -> None:
        model.init(generator)

    @property
    def terms(self) -> Mapping[str, float]:
        return {"ce": 1.0}

    def loss(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        tensors = {name: batch[name] for name in ("inputs", "targets", "text", "start", "weight")}
        if self.text != "none" and model.training and self.condition_dropout:
            drawn = torch.rand(len(tensors["start"]), generator=generator, device=generator.device)
            tensors = without_text(tensors, drawn.to(tensors["start"].device) < self.condition_dropout)
        return {"ce": model(**tensors)}

    def baselines(self, batch: Batch, fitted: Fitted) -> dict[str, dict[str, Tensor]]:
        """Equal chances for every id; the frequencies of each codebook's ids; and a smoothed bigram. A stop, which
        the counts know nothing of, costs each of them nothing."""
        arrays = {name.removeprefix(BIGRAM): array for name, array in fitted.arrays.items() if name.startswith(BIGRAM)}
        bigram = Bigram(fitted.data["cardinality"], **arrays)
        codes = batch["codes"].cpu().numpy()
        codes = np.where(codes < bigram.ids, codes, -1)
        nats = {"uniform": (codes >= 0).sum((1, 2)) * np.log(bigram.ids),
                "unigram": np.array([np.nansum(bigram.unigram_nats(row)) for row in codes]),
                "bigram": np.array([np.nansum(bigram.nats(row)) for row in codes])}
        weight = batch["weight"].cpu().numpy()
        return {name: {"ce": torch.tensor(float(rows @ weight))} for name, rows in nats.items()}

    # Generation

    def question(self, example: Example) -> Question:
        """A window with a text is asked for by its text; another one is continued from its first half."""
        unit, text = example.units["audio"], example.fields["text"]
        if text:
            return Question(target=unit, text=text, seconds=unit.duration_s)
        half = unit.duration_s / 2
        rest = replace(unit, start_s=unit.start_s + half, duration_s=half)
        return Question(replace(unit, duration_s=half), rest, seconds=half)

    def prompt(self, request: Request) -> Prompt:
        """Audio to continue and, where the model takes it, a text; both may be absent."""
        if request.video is not None:
            raise ValueError("video has no meaning for this model; it takes audio and text.")
        if request.text and self.text == "none":
            raise ValueError("text has no meaning for this model: it was trained with family.text=none.")
        if request.audio is not None and request.audio.samples.shape[-1] == 0:
            raise ValueError("audio holds no samples: leave it out to start from nothing.")
        self._generation(request.options)
        if request.options.guidance_scale is not None and not request.text:
            raise ValueError("guidance_scale needs a text to be guided by.")
        media = {} if request.audio is None else {"audio": request.audio}
        return Prompt(media, {"text": self._text({"text": request.text}), "ends": False})

    def _generation(self, options: Options) -> Generation:
        """What an options' request means here. ValueError naming an option that does not fit."""
        options.allow("seconds", "temperature", "top_k", "top_p", "guidance_scale")
        own = Generation(self.segment_s, self.temperature, self.top_k, self.top_p, self.guidance_scale)
        return replace(own, **options.given())  # type: ignore[arg-type]

    def sampler(self, model: CodecTransformer, fitted: Fitted, slots: int) -> CodecSampler:
        return CodecSampler(model, self.layout(fitted), fitted.data["frame_rate_hz"], self.stop, slots,
                            self.weights, self.cuda_graph, self._generation)

    def renderer(self, fitted: Fitted, device: torch.device | str) -> CodesRenderer:
        return CodesRenderer(self.codec.load(device, codec_state(fitted) if self.codec.needs_fit else None), device)

    # Judgement

    @torch.no_grad()
    def figures(self, model: CodecTransformer, batch: Batch, fitted: Fitted) -> dict[str, Mean]:
        """Bits a token and the share of tokens that were the likeliest, by codebook and over all, stops left out."""
        layout, targets = self.layout(fitted), batch["targets"]
        x = model.transformer(model.embed(batch["inputs"], batch["text"], batch["start"]))
        logits = model.transformer.logits(x).float()
        bits = F.cross_entropy(logits.flatten(0, 2), targets.clamp(min=0).flatten(), reduction="none") / np.log(2)
        hits = (logits.argmax(-1) == targets).double()
        step = torch.arange(targets.shape[1], device=targets.device) - batch["start"][:, None]
        weight = batch["weight"].double()[:, None]
        found = {name: Mean() for name in ("bits_per_token", "token_accuracy")}
        for k, (delay, stream) in enumerate(zip(layout.delays, layout.streams, strict=True)):
            target = targets[..., stream]
            at = (target >= 0) & (step >= delay) & ((step - delay) % layout.stride == 0)
            if self.stop and k == 0:
                at &= target < layout.cardinality - 1
            share = at * weight
            for name, values in (("bits_per_token", bits.view(targets.shape)), ("token_accuracy", hits)):
                mean = Mean(float((values[..., stream] * share).sum()), float(share.sum()))
                found[f"{name}_codebook_{k + 1}"] = mean
                found[name].merge(mean)
        return found

    def metrics(self) -> dict[str, Callable[[], Metric]]:
        """Of what it continues or speaks: how far the codec's own latents are from held-out sound's, and what goes
        wrong first, level and silence."""
        return {"frechet_distance_codec_latents": self._frechet, "level_error_db": LevelError,
                "silence_fraction": SilenceFraction, "log_spectral_distance_db": LogSpectralDistance}

    def _frechet(self) -> Metric:
        codec = self.codec.load("cpu")

        def latents(audio: Audio) -> np.ndarray:
            return codec.encode_batch([audio.samples.mean(0, dtype=np.float32)])[0]

        return FrechetDistance(latents, f"latents of {self.codec.column_id()}, a frame each", codec.sample_rate_hz)


class CodecTransformer(nn.Module):
    """The root module: a transformer over codes, bytes in front where the model takes text, and a learnt start. With
    learned positions and no text position 0 already is one, and nothing is added."""

    def __init__(self, config: TransformerConfig, text: bool):
        super().__init__()
        self.transformer = Transformer(config)
        self.text = nn.Embedding(256, config.width) if text else None
        self.start = nn.Parameter(torch.empty(config.width)) if text or config.positions != "learned" else None

    def init(self, generator: torch.Generator) -> None:
        self.transformer.init(generator)
        for parameter in (self.start, None if self.text is None else self.text.weight):
            if parameter is not None:
                nn.init.normal_(parameter, std=0.02, generator=generator)

    def embed(self, inputs: Int[Tensor, "batch time streams"], text: Int[Tensor, "batch time"],
              start: Int[Tensor, " batch"]) -> Float[Tensor, "batch time width"]:
        """Codes, bytes and the start, each where it stands."""
        x = self.transformer.embed(inputs)
        if self.text is not None:
            x = x + self.text(text.clamp(min=0)) * (text >= 0).unsqueeze(-1)
        if self.start is not None:
            at = torch.arange(x.shape[1], device=x.device) == start[:, None]
            x = x + at.unsqueeze(-1) * self.start
        return x

    def forward(self, inputs: Int[Tensor, "batch time streams"], targets: Int[Tensor, "batch time streams"],
                text: Int[Tensor, "batch time"], start: Int[Tensor, " batch"],
                weight: Float[Tensor, " batch"]) -> Float[Tensor, ""]:
        """The cross-entropy in nats, summed over the targets that are not -1, each with its row's weight."""
        logits = self.transformer.logits(self.transformer(self.embed(inputs, text, start)))
        nats = F.cross_entropy(logits.flatten(0, 2), targets.flatten(), ignore_index=-1, reduction="none")
        return nats.view(len(weight), -1).sum(1) @ weight


def without_text(tensors: Mapping[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    """The batch with the text of ``rows`` (booleans ``[batch]``) taken out and what follows it moved to the front."""
    steps = tensors["inputs"].shape[1]
    shift = torch.where(rows, tensors["start"], 0)
    at = torch.arange(steps, device=shift.device) + shift[:, None]
    inside, at = (at < steps).unsqueeze(-1), at.clamp(max=steps - 1).unsqueeze(-1)
    moved = {name: torch.where(inside, torch.take_along_dim(tensors[name], at, 1), -1)
             for name in ("inputs", "targets")}
    text = tensors["text"].masked_fill(rows[:, None], -1)
    return {**tensors, **moved, "text": text, "start": tensors["start"] - shift}


def codec_state(fitted: Fitted) -> Fitted:
    """The codec's own part of what was fitted: its codebooks, without the baselines' counts."""
    arrays = {name.removeprefix(CODEC): array for name, array in fitted.arrays.items() if name.startswith(CODEC)}
    return Fitted(arrays, fitted.data.get("codec_data", {}))


def to_codes(codec: Codec, latents: np.ndarray, num_codebooks: int) -> np.ndarray:
    """Latents ``[time, width]`` -> codes ``[time, codebooks]``."""
    batch = torch.from_numpy(np.ascontiguousarray(latents.T, np.float32))[None]
    return codec.to_codes(batch, num_codebooks)[0].T.numpy()
