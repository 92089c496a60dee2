"""The network of ``audio_gpt2``: any decoder-only model of transformers, a stem that makes frames of sound as wide as
it is, and cross-attention hooked onto its layers.

Hooks leave the base untouched: its weights keep their names, its file loads as it is, and with gates at 0 its logits
are its own. A row without sound (dropped in training, or none given) hears nothing, so that the same network also tells
how likely a text is by itself.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from avray.nn.encoder import Encoder, sinusoidal_positions
from avray.nn.listening import Gated, Heard, Last, LowRank

Listen = Literal["gated", "last"]
Stem = Literal["conv", "linear"]
Adapt = Literal["all", "frozen", "lora"]


@dataclass(frozen=True)
class ListenerConfig:
    """What is added to the base: see ``avray.families.audio_gpt2.AudioGPT2``."""

    listen: Listen
    listen_every: int
    open_gates: bool
    stem: Stem
    stem_layers: int
    adapt: Adapt
    lora_rank: int
    dropout: float


class Listener(nn.Module):
    """``forward`` gives logits ``[batch, time, ids]``. ``hear`` and ``listening`` are for generation, which hears once
    and steps many times. Features come as they are, and are brought around 0 by their ``mean`` and ``scale``."""

    def __init__(self, base: Mapping[str, Any], config: ListenerConfig, mean: np.ndarray, scale: np.ndarray) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("scale", torch.tensor(scale))
        self.base = make_base(base)
        width, num_heads = self.base.config.hidden_size, self.base.config.num_attention_heads
        linear = config.stem == "linear"
        self.stem = LinearStem(len(mean), width) if linear else ConvStem(len(mean), config, width, num_heads)
        layers = decoder_layers(self.base)
        places = range(config.listen_every - 1, len(layers), config.listen_every)
        if config.listen == "last":
            self.listeners = nn.ModuleList([Last(width, num_heads)])
            self.base.get_output_embeddings().register_forward_pre_hook(self._before_head)
        else:
            self.listeners = nn.ModuleList(Gated(width, num_heads) for _ in places)
            for index, place in enumerate(places):
                layers[place].register_forward_hook(self._after_layer(index))
        self.adapters = nn.ModuleList()
        if config.adapt != "all":
            self.base.requires_grad_(False)
        if config.adapt == "lora":
            self._adapt(layers)
        self._heard: Sequence[Heard] = ()

    def _after_layer(self, index: int) -> Any:
        def hook(layer: nn.Module, arguments: Any, output: Any) -> Any:
            if not self._heard:
                return output
            hidden = output[0] if isinstance(output, tuple) else output
            hidden = self.listeners[index](hidden, self._heard[index])
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return hook

    def _before_head(self, head: nn.Module, arguments: tuple[Tensor, ...]) -> Any:
        return (self.listeners[0](arguments[0], self._heard[0]),) if self._heard else None

    def _adapt(self, layers: nn.ModuleList) -> None:
        """Adapters beside every product of the base's layers (GPT-2 keeps its own transposed, as Conv1D)."""
        for module in layers.modules():
            weight = getattr(module, "weight", None)
            if weight is None or weight.ndim != 2 or isinstance(module, nn.Embedding):
                continue
            sizes = weight.shape if not isinstance(module, nn.Linear) else weight.shape[::-1]
            adapter = LowRank(sizes[0], sizes[1], self.config.lora_rank, 2.0 * self.config.lora_rank)
            self.adapters.append(adapter)
            module.register_forward_hook(lambda _, arguments, output, adapter=adapter: output + adapter(arguments[0]))

    def hear(self, audio: Float[Tensor, "batch frames features"], lengths: Int[Tensor, " batch"]) -> list[Heard]:
        """Keys and values of every listening layer, 0 frames being no sound."""
        inside = _inside(audio.shape[1], lengths)[..., None]
        frames, valid = self.stem((audio - self.mean) / self.scale * inside, lengths)
        return [listener.attention.hear(frames, valid) for listener in self.listeners]

    @contextlib.contextmanager
    def listening(self, heard: Sequence[Heard]) -> Iterator[None]:
        """The base hears this until the block ends; nothing, where it is empty."""
        before, self._heard = self._heard, heard
        try:
            yield
        finally:
            self._heard = before

    def forward(self, tokens: Int[Tensor, "batch time"], audio: Float[Tensor, "batch frames features"],
                lengths: Int[Tensor, " batch"]) -> Float[Tensor, "batch time ids"]:
        """Texts are padded at the end only, where causality hides the padding."""
        self._heard = self.hear(audio, lengths)  # and stays, for activations that are computed again
        # transformers looks at the positions to make its causal mask, which has no values on the meta device.
        mask = causal_mask(tokens.shape[1], tokens.device) if tokens.is_meta else None
        return self.base(input_ids=tokens, attention_mask=mask, use_cache=False).logits


class LinearStem(nn.Module):
    """The original's: one product."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.product = nn.Linear(features, width)

    def forward(self, audio: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        return self.product(audio), _inside(audio.shape[1], lengths)


class ConvStem(nn.Module):
    """Two convolutions, the second of stride 2, positions, and an encoder (the front of Whisper: Radford et al.,
    2022)."""

    def __init__(self, features: int, config: ListenerConfig, width: int, num_heads: int) -> None:
        super().__init__()
        self.first = nn.Conv1d(features, width, 3, padding=1)
        self.second = nn.Conv1d(width, width, 3, stride=2, padding=1)
        self.encoder = Encoder(width, config.stem_layers, num_heads, 4 * width, config.dropout)
        self.norm = nn.LayerNorm(width)

    def forward(self, audio: Float[Tensor, "batch frames features"],
                lengths: Int[Tensor, " batch"]) -> tuple[Float[Tensor, "batch half width"], Bool[Tensor, "batch half"]]:
        inside = _inside(audio.shape[1], lengths)[:, None]
        x = F.gelu(self.first(audio.transpose(1, 2))) * inside
        x = F.gelu(self.second(x)).transpose(1, 2)
        x = self.norm(x) + sinusoidal_positions(x.shape[1], x.shape[2], x.device)
        valid = _inside(x.shape[1], (lengths + 1) // 2)
        some = valid.clone()
        some[:, 0] = True
        return self.encoder(x, some), valid


def _inside(size: int, lengths: Tensor) -> Tensor:
    return torch.arange(size, device=lengths.device) < lengths[:, None]


def causal_mask(size: int, device: torch.device) -> Bool[Tensor, "1 1 time time"]:
    return torch.ones(size, size, dtype=torch.bool, device=device).tril()[None, None]


def make_base(settings: Mapping[str, Any]) -> nn.Module:
    """A causal language model of transformers from its configuration as plain data; on the meta device too, where its
    small constant buffers (rotary frequencies) are made nevertheless, since no checkpoint holds them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    given = dict(settings)
    config = AutoConfig.for_model(given.pop("model_type"), **given)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    wanted = {name for name, buffer in model.named_buffers() if buffer.is_meta}
    if wanted:
        one_layer = copy.deepcopy(config)
        one_layer.num_hidden_layers, one_layer.vocab_size = 1, 8
        one_layer.bos_token_id = one_layer.eos_token_id = one_layer.pad_token_id = None
        with torch.device("cpu"):
            small = AutoModelForCausalLM.from_config(one_layer, dtype=torch.float32)
        for name, buffer in small.named_buffers():
            if name in wanted:
                owner, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(owner), leaf, buffer)
    return model


def decoder_layers(base: nn.Module) -> nn.ModuleList:
    """The list of as many modules as the model has layers. ValueError where none is."""
    for module in base.modules():
        if isinstance(module, nn.ModuleList) and len(module) == base.config.num_hidden_layers:
            return module
    raise ValueError(f"family.base: a {type(base).__name__} has no list of its layers to listen from; take another.")


class SlotCache:
    """Keys and values of a fixed number of rows, each at its own place, in the form that models of transformers call:
    ``update`` and ``get_seq_length``. ``at`` ``[rows]`` is where each row's next token goes."""

    def __init__(self, base: nn.Module, rows: int, context: int) -> None:
        self.rows, self.context = rows, context
        self.device = base.get_input_embeddings().weight.device
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        self.row: int | None = None
        """The one row that a prompt goes into; None while all rows step."""
        self.at = torch.zeros(rows, dtype=torch.int64, device=self.device)
        self.places = torch.arange(context, device=self.device)
        self.every = torch.arange(rows, device=self.device)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if layer_idx not in self.layers:
            shape = (self.rows, keys.shape[1], self.context, keys.shape[3])
            self.layers[layer_idx] = (keys.new_zeros(shape), values.new_zeros(shape))
        kept = self.layers[layer_idx]
        if self.row is not None:
            for old, new in zip(kept, (keys, values), strict=True):
                old[self.row, :, : new.shape[2]] = new[0]
            return keys, values
        for old, new in zip(kept, (keys, values), strict=True):
            old[self.every, :, self.at] = new[:, :, 0]
        return kept

    def prefill(self, base: nn.Module, row: int, tokens: Int[Tensor, " time"]) -> None:
        """Fill a row with a prompt."""
        if not len(tokens):
            return
        self.row = row
        try:
            mask = causal_mask(len(tokens), self.device)
            base(input_ids=tokens[None], attention_mask=mask, past_key_values=self, use_cache=True,
                 position_ids=self.places[None, : len(tokens)], logits_to_keep=1)
        finally:
            self.row = None

    def step(self, base: nn.Module, tokens: Int[Tensor, " rows"], at: Sequence[int]) -> Float[Tensor, "rows ids"]:
        """Each row's next token, standing at ``at``; the logits after it. A row nobody uses may stand at 0."""
        self.at = torch.tensor(at, device=self.device)
        mask = (self.places <= self.at[:, None])[:, None, None]
        return base(input_ids=tokens[:, None], attention_mask=mask, past_key_values=self, use_cache=True,
                    position_ids=self.at[:, None]).logits[:, -1]

    def pick(self, rows: Int[Tensor, " rows"]) -> None:
        """Row i becomes what row ``rows[i]`` was."""
        self.layers = {index: (keys[rows], values[rows]) for index, (keys, values) in self.layers.items()}
