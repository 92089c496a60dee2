"""A language model that listens: it writes down what is said, or goes on with a text about what it hears.

The base is any decoder-only model of transformers, from scratch or with its own weights; sound comes in as a frozen
network's frames (the codec's latents, log-mel frames by default) through a small stem and cross-attention. With
``listen=last``, ``stem=linear`` and GPT-2 medium over 768 features this is the original's model to the number
(359,811,072 parameters). What the original did otherwise: it kept only the first frame of its features, and took the
padding for the end of text, so that it never learnt to stop; here all frames are there, masked, and the end is learnt.

Texts are ``end, tokens…, end``. Rows whose sound is dropped (``audio_dropout``) teach the model the texts alone, and
the difference between ``per_word`` and ``per_word_without_audio`` (nats; their exponentials are perplexities) is what
listening adds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from avray.codecs.base import CodecConfig, Latents
from avray.encoders.given import Given
from avray.encoders.hidden_states import HiddenStates
from avray.encoders.tokens import BYTES, Tokens, open_tokens, read_tokens
from avray.errors import MissingDependency
from avray.families.audio_gpt2_model import Adapt, Listen, Listener, ListenerConfig, Stem
from avray.families.audio_gpt2_sampler import Generation, TextRenderer, TextSampler
from avray.families.audio_gpt2_windows import spans_of, windows
from avray.family import (
    Batch,
    Column,
    Example,
    Fitted,
    Mean,
    Metric,
    Options,
    Perplexity,
    Prompt,
    Question,
    Request,
    Row,
    Unit,
)
from avray.metrics.text import Bleu, RougeL, TextErrorRate
from avray.nn.augment import Augment
from avray.progress import no_weight_bars

Hears = Literal["sound", "embedding"]
AUDIO, FEATURES = "audio", "features"
MIN_S = 0.1
"""Sound shorter than this holds no word; a stem of stride 2 and encoders of 20 ms a frame would see a frame or two."""


@dataclass(frozen=True)
class AudioGPT2:
    """Sound is heard as ``encoder``'s hidden states or, where that is None, as ``codec``'s latents; with
    ``hears=embedding`` the rows bring vectors of their own instead (the original's ``.pt``).
    ``segment_s`` is the longest window of sound, ``overlap_s`` how far windows of a long recording overlap.

    ``base`` is a folder or hub name of transformers' (``download`` to fetch it); None makes a GPT-2 of ``width``,
    ``num_layers`` and ``num_heads``. ``context`` is the longest text in tokens. ``listen`` is ``gated`` after every
    ``listen_every``-th layer or ``last``; gates begin at 0 unless ``open_gates``, which suits a base without weights.
    ``adapt`` trains ``all`` weights, keeps the base ``frozen``, or puts ``lora`` adapters of ``lora_rank`` beside it.
    """

    codec: CodecConfig
    encoder: HiddenStates | None = None
    hears: Hears = "sound"
    segment_s: float = 20.0
    overlap_s: float = 5.0
    tokenizer: str = BYTES
    base: str | None = None
    download: bool = False
    context: int = 256
    width: int = 192
    num_layers: int = 4
    num_heads: int = 4
    listen: Listen = "gated"
    listen_every: int = 1
    open_gates: bool = True
    stem: Stem = "conv"
    stem_layers: int = 2
    adapt: Adapt = "all"
    lora_rank: int = 8
    dropout: float = 0.1
    audio_dropout: float = 0.1
    augment: Augment = Augment()

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    beams: int = 1

    def __post_init__(self) -> None:
        for name in ("segment_s", "context", "width", "num_layers", "num_heads", "listen_every", "lora_rank", "beams"):
            if getattr(self, name) <= 0:
                raise ValueError(f"family.{name} must be above 0, got {getattr(self, name)}.")
        if not 0 <= self.overlap_s < self.segment_s:
            raise ValueError(f"family.overlap_s = {self.overlap_s} must be at least 0 and below family.segment_s.")
        for name, allowed in (("listen", Listen), ("stem", Stem), ("adapt", Adapt), ("hears", Hears)):
            if getattr(self, name) not in get_args(allowed):
                raise ValueError(f"family.{name} must be one of {', '.join(get_args(allowed))}, got "
                                 f"{getattr(self, name)!r}.")
        for name in ("dropout", "audio_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"family.{name} must be from 0 to below 1, got {getattr(self, name)}.")
        if self.adapt != "all" and self.base is None:
            raise ValueError(f"family.adapt={self.adapt} keeps the base's weights, and there are none: give "
                             "family.base.")
        if self.width % self.num_heads:
            raise ValueError(f"family.num_heads = {self.num_heads} must divide family.width = {self.width}.")
        log_mel = self.encoder is None and self.codec.name == "spectral" and self.hears == "sound"
        if any(vars(self.augment).values()) and not log_mel:
            raise ValueError("family.augment changes log-mel frames: take codec=spectral and no encoder, or no "
                             "augmentation.")
        self._generation(Options())

    # Data

    def segment(self, rows: Sequence[Row]) -> list[Example]:
        """A row with sound and text is one example; utterances of one turn, and their words where they have times,
        are joined to windows of up to ``segment_s``."""
        examples: dict[str, Example] = {}
        turns: dict[str, list[Row]] = {}
        for row in rows:
            if self.refusal(row) is not None:
                continue
            if self.hears == "embedding":
                unit = Unit(json.dumps(row["embedding"]), "text")
                examples[str(row["id"])] = Example(str(row["id"]), {AUDIO: unit}, {"text": str(row["text"]).strip()})
                continue
            if "turn" in row:
                turns.setdefault(str(row["turn"]), []).append(row)
                continue
            unit = Unit(row["audio"], "audio", row.get("start_s") or 0.0, row["duration_s"])
            text = str(row["text"]).strip()
            examples[str(row["id"])] = Example(str(row["id"]), {AUDIO: unit}, {"text": text}, row.get("weight", 1.0))
        for said in turns.values():
            first, spans = said[0], [span for row in said for span in spans_of(row)]
            spans.sort(key=lambda span: (span.start_s, span.stop_s))
            for window in windows(spans, self.segment_s, self.overlap_s):
                unit = Unit(first["audio"], "audio", window.start_s, window.stop_s - window.start_s)
                if unit.duration_s < MIN_S:
                    continue
                stem = str(first["id"]).rpartition("@")[0] or str(first["id"])
                name = f"{stem}@{window.start_s:.3f}-{window.stop_s:.3f}"
                name += f"#{first['turn']}" if name in examples else ""
                examples[name] = Example(name, {AUDIO: unit}, {"text": window.text}, first.get("weight", 1.0))
        return sorted(examples.values(), key=lambda example: example.units[AUDIO].start_s)

    def refusal(self, row: Row) -> str | None:
        """Sound and its words are needed both, at a length that is one window or can be cut to some."""
        if not row.get("embedding" if self.hears == "embedding" else "audio"):
            return "it has no sound to go with its text"
        if not str(row.get("text") or "").strip():
            return "it has no text to go with its sound, or an empty one"
        if self.hears == "embedding":
            return None
        if row["duration_s"] < MIN_S:
            return f"its {row['duration_s']:.3f} s are too short to be heard: {MIN_S:g} s are the least"
        if row["duration_s"] > self.segment_s + 1e-6 and not row.get("word_times"):
            return (f"its {row['duration_s']:.1f} s are longer than family.segment_s = {self.segment_s:g} and its text "
                    "does not say when each word comes: give a transcript with times, or shorter recordings")
        return None

    def columns(self, fitted: Fitted | None) -> list[Column]:
        if self.hears == "embedding":
            return [Column(FEATURES, self._features, "text", "float32")]
        return [Column(FEATURES, self._features)]

    @property
    def _features(self) -> HiddenStates | Latents | Given:
        return Given() if self.hears == "embedding" else self.encoder or Latents(self.codec)

    def fit(self, rows: Iterator[Row]) -> Fitted:
        """Mean and scale of each feature, the tokeniser, the base's configuration, and how often each token occurs."""
        network = self._features.load("cpu")
        kept = read_tokens(self.tokenizer, self.download)
        tokens = open_tokens(kept)
        number, total, squares = 0, np.zeros(()), np.zeros(())
        counts = np.zeros(tokens.size, np.int64)
        for row in rows:
            frames = row[f"{AUDIO}.{FEATURES}"].astype(np.float64)
            number, total, squares = number + len(frames), total + frames.sum(0), squares + (frames**2).sum(0)
            np.add.at(counts, [*tokens.encode(row["text"]), tokens.end], 1)
        width = len(np.atleast_1d(total))
        mean, scale = np.zeros(width), np.ones(width)
        if self.stem == "conv":  # the original's product takes features as they are
            mean = total / number
            scale = np.sqrt(np.maximum(squares / number - mean**2, 0))
            scale = np.maximum(scale, max(0.01 * scale.max(), 1e-6))
        arrays = {"mean": mean, "scale": scale}
        return Fitted({**{name: array.astype(np.float32) for name, array in arrays.items()}, "counts": counts},
                      {"features": self._features.column_id(), "width": width,
                       "frame_rate_hz": network.frame_rate_hz, "tokens": kept, "base": self._base_settings(tokens)})

    def _base_settings(self, tokens: Tokens) -> dict[str, Any]:
        """The base's configuration as plain data. MissingDependency, naming the cure, where it is not at hand."""
        if self.base is None:
            return {"model_type": "gpt2", "vocab_size": tokens.size, "n_positions": self.context, "n_embd": self.width,
                    "n_layer": self.num_layers, "n_head": self.num_heads, "resid_pdrop": self.dropout,
                    "embd_pdrop": self.dropout, "attn_pdrop": self.dropout, "bos_token_id": tokens.end,
                    "eos_token_id": tokens.end}
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(self.base, local_files_only=not self.download)
        except (OSError, ValueError) as error:
            raise MissingDependency(f"family.base = {self.base} is not at hand: give a folder with config.json and "
                                    "*.safetensors, or family.download=true to fetch it once.") from error
        if tokens.size > config.vocab_size:
            raise ValueError(f"family.tokenizer = {self.tokenizer} has {tokens.size} ids and family.base = {self.base} "
                             f"{config.vocab_size}: take the tokeniser that belongs to it.")
        most = getattr(config, "max_position_embeddings", self.context)
        if self.context > most:
            raise ValueError(f"family.context = {self.context}, but family.base = {self.base} has {most} positions.")
        return {**config.to_diff_dict(), "model_type": config.model_type}

    def collate(self, rows: Sequence[Row], fitted: Fitted) -> Batch:
        """``tokens`` and ``targets`` ``[batch, time]`` (-1 is nothing), ``audio`` ``[batch, frames, features]``
        with ``frames`` ``[batch]`` of it, ``length`` of the texts and ``weight`` ``[batch]``."""
        tokens = open_tokens(fitted.data["tokens"])
        texts = [[tokens.end, *self._ids(row, tokens)] for row in rows]
        audio = [row.get(f"{AUDIO}.{FEATURES}") if row["weight"] else None for row in rows]
        lengths = [0 if frames is None else len(frames) for frames in audio]
        padded = np.zeros((len(rows), max(1, *lengths), fitted.data["width"]), np.float32)
        inputs = np.full((len(rows), max(map(len, texts))), tokens.end)
        targets = np.full(inputs.shape, -1)
        for index, (row, text, frames) in enumerate(zip(rows, texts, audio, strict=True)):
            inputs[index, : len(text)] = text
            if row["weight"]:
                targets[index, : len(text)] = [*text[1:], tokens.end]
            if frames is not None:
                padded[index, : len(frames)] = frames
        weight = np.array([row["weight"] for row in rows], np.float32)
        number = float(((targets >= 0).sum(1) * weight).sum())
        words = float(sum(len(row["text"].split()) * row["weight"] for row in rows if row.get("text")))
        tensors = {"tokens": inputs, "targets": targets, "audio": padded, "frames": np.array(lengths), "weight": weight,
                   "length": np.array([len(text) for text in texts])}
        return Batch({name: torch.from_numpy(array) for name, array in tensors.items()},
                     {"text": number, "per_word": words, "per_word_without_audio": words},
                     [str(row.get("id", "")) for row in rows])

    def _ids(self, row: Row, tokens: Tokens) -> list[int]:
        ids = tokens.encode(str(row.get("text") or ""))
        if len(ids) >= self.context:
            raise ValueError(f"The text of {row.get('id', 'the request')} has {len(ids)} tokens, and family.context = "
                             f"{self.context} holds one less: shorten it (a window's: lower family.segment_s), or "
                             "train with more.")
        return ids

    # Model

    def build(self, fitted: Fitted) -> Listener:
        if fitted.data["features"] != self._features.column_id():
            raise ValueError(f"This model hears {fitted.data['features']}, and {self._features.column_id()} was asked "
                             "for: take the encoder or codec it was trained with, or train anew.")
        config = ListenerConfig(self.listen, self.listen_every, self.open_gates, self.stem,
                                self.stem_layers, self.adapt, self.lora_rank, self.dropout)
        return Listener(fitted.data["base"], config, fitted.arrays["mean"], fitted.arrays["scale"])

    def init(self, model: nn.Module, generator: torch.Generator) -> None:
        """The base's weights, or GPT-2's normal of 0.02; Glorot's in what listens, which at 0.02 took ten times as
        long to be heard; adapters from zero, gates from 0 or, opened, from 1."""
        assert isinstance(model, Listener)
        for module, around in ((model.base, "gpt2"), (model.stem, "glorot"), (model.listeners, "glorot")):
            if module is model.base and self.base is not None:
                continue
            for name, parameter in module.named_parameters():
                if parameter.ndim >= 2 and around == "gpt2":
                    nn.init.normal_(parameter, std=0.02, generator=generator)
                elif parameter.ndim >= 2:
                    nn.init.xavier_uniform_(parameter, generator=generator)
                elif name.endswith("bias"):
                    nn.init.zeros_(parameter)
                elif parameter.ndim == 1:
                    nn.init.ones_(parameter)
        for adapter in model.adapters:
            nn.init.normal_(adapter.down.weight, std=0.02, generator=generator)
            nn.init.zeros_(adapter.up.weight)
        for gate in (parameter for name, parameter in model.listeners.named_parameters() if name.endswith("gate")):
            nn.init.constant_(gate, 1.0 if self.open_gates else 0.0)
        if self.base is not None:
            self._load_base(model)

    def _load_base(self, model: Listener) -> None:
        from transformers import AutoModelForCausalLM

        with no_weight_bars():
            base = AutoModelForCausalLM.from_pretrained(self.base, local_files_only=not self.download,
                                                        use_safetensors=True, dtype=torch.float32)
        model.base.load_state_dict(base.state_dict())

    @property
    def terms(self) -> Mapping[str, float]:
        return {"text": 1.0, "per_word": 0.0, "per_word_without_audio": 0.0}

    def loss(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Cross-entropy in nats. The text alone is scored in evaluation only."""
        assert isinstance(model, Listener)
        audio, frames = batch["audio"], batch["frames"]
        if model.training:
            audio, frames = self.augment(audio, frames, generator)
            kept = torch.rand(len(frames), generator=generator, device=frames.device) >= self.audio_dropout
            frames = frames * kept
        text = cross_entropy(model(batch["tokens"], audio, frames), batch)
        alone = text.detach() * 0
        if not model.training:
            alone = cross_entropy(model(batch["tokens"], audio, torch.zeros_like(frames)), batch)
        return {"text": text, "per_word": text.detach(), "per_word_without_audio": alone}

    def baselines(self, batch: Batch, fitted: Fitted) -> dict[str, dict[str, Tensor]]:
        """How often each token occurs in the training texts."""
        counts = torch.from_numpy(fitted.arrays["counts"]).to(batch["targets"].device) + 0.5
        nats = -(counts / counts.sum()).log()
        targets = batch["targets"]
        total = ((nats[targets.clamp(min=0)] * (targets >= 0)).sum(1) * batch["weight"]).sum()
        return {"unigram": {"text": total, "per_word": total, "per_word_without_audio": total}}

    def figures(self, model: nn.Module, batch: Batch, fitted: Fitted) -> dict[str, Mean]:
        """How many words it hesitates between, with the sound and without: the difference is what listening adds."""
        sums = self.loss(model, batch, torch.Generator(batch["weight"].device))
        return {f"perplexity_{name}": Perplexity(float(sums[name].detach()), batch.counts[name])
                for name in ("per_word", "per_word_without_audio")}

    # Generation

    def question(self, example: Example) -> Question:
        unit = example.units[AUDIO]
        fields = {"embedding": json.loads(unit.source)} if self.hears == "embedding" else {}
        return Question(unit, Unit(example.fields["text"], "text"), fields=fields)

    def prompt(self, request: Request) -> Prompt:
        if self.hears == "embedding":
            if "embedding" not in request.fields:
                raise ValueError("embedding is missing: this model was trained on vectors that rows bring with them.")
            self._generation(request.options)
            return Prompt({AUDIO: json.dumps(request.fields["embedding"])}, {"text": request.text or ""})
        if request.audio is None and not (request.text and self.audio_dropout):
            also = ", or a text to go on with" if self.audio_dropout else ""
            raise ValueError(f"audio is missing: this model writes down what it hears; give a recording{also}.")
        if request.video is not None or request.task is not None:
            raise ValueError(f"{'video' if request.video is not None else 'task'} has no meaning for this model; it "
                             "takes audio, and a text to go on with.")
        self._generation(request.options)
        return Prompt({} if request.audio is None else {AUDIO: request.audio}, {"text": request.text or ""})

    def _generation(self, options: Options) -> Generation:
        options.allow("max_tokens", "temperature", "top_k", "top_p", "beams")
        given = options.given()
        defaults = {name: getattr(self, name) for name in ("temperature", "top_k", "top_p", "beams")}
        chosen: dict[str, Any] = {name: given.get(name, default) for name, default in defaults.items()}
        return Generation(options.max_tokens, **chosen)

    def sampler(self, model: nn.Module, fitted: Fitted, slots: int) -> TextSampler:
        assert isinstance(model, Listener)
        rate = fitted.data["frame_rate_hz"]
        return TextSampler(model, open_tokens(fitted.data["tokens"]), self.context, round(self.segment_s * rate),
                           round(self.overlap_s * rate), slots, self._generation)

    def renderer(self, fitted: Fitted, device: torch.device | str) -> TextRenderer:
        return TextRenderer(open_tokens(fitted.data["tokens"]))

    def metrics(self) -> dict[str, Callable[[], Metric]]:
        return {"wer": lambda: TextErrorRate("word"), "cer": lambda: TextErrorRate("character"), "bleu": Bleu,
                "rouge_l": RougeL}


def cross_entropy(logits: Tensor, batch: Batch) -> Tensor:
    """The weighted sum over all tokens, ends included."""
    nats = F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), ignore_index=-1, reduction="none")
    return (nats.view(logits.shape[:2]).sum(1) * batch["weight"]).sum()
