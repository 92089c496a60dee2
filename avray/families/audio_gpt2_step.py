"""One token of a GPT-2 that listens, as few operations as it takes: at this size Python and calls cost more than the
arithmetic, and transformers' own forward makes five times as many of both.

It is the arithmetic of transformers' GPT2LMHeadModel and of ``avray.nn.listening`` (a test holds it to both), over the
keys and values that ``SlotCache`` keeps. What is folded beforehand: the gates into the products behind them, and the
mask of the sound into numbers to be added. Bases of other kinds, and adapters, go through transformers' forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from avray.families.audio_gpt2_model import Listener, SlotCache
from avray.nn.listening import Gated, Heard, Last

ROUND = 64
"""Several rows attend to a length rounded up to this, of which each is masked to its own."""


def is_plain_gpt2(model: Listener) -> bool:
    """Whether ``GPT2Step`` is this model's arithmetic."""
    config = model.base.config
    return (config.model_type == "gpt2" and not len(model.adapters) and config.activation_function == "gelu_new"
            and config.scale_attn_weights and not config.scale_attn_by_inverse_layer_idx
            and not config.add_cross_attention)


@dataclass(frozen=True)
class _Norm:
    weight: Tensor
    bias: Tensor
    eps: float

    @classmethod
    def of(cls, norm: nn.Module) -> _Norm:
        return cls(norm.weight, norm.bias, norm.eps)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


@dataclass(frozen=True)
class _Listening:
    """What one cross-attention needs a step; its gate is in ``out``."""

    norm: _Norm
    query: tuple[Tensor, Tensor]
    out: tuple[Tensor, Tensor]
    num_heads: int

    @classmethod
    def of(cls, listener: Gated | Last) -> _Listening:
        attention = listener.attention
        gate = listener.gate.tanh() if isinstance(listener, Gated) else torch.ones((), device=attention.out.bias.device)
        return cls(_Norm.of(listener.norm), (attention.query.weight, attention.query.bias),
                   (attention.out.weight * gate, attention.out.bias * gate), attention.num_heads)


@dataclass(frozen=True)
class _Block:
    norm1: _Norm
    qkv: tuple[Tensor, Tensor]
    out: tuple[Tensor, Tensor]
    norm2: _Norm
    up: tuple[Tensor, Tensor]
    down: tuple[Tensor, Tensor]
    listening: int | None
    """Which listener comes after it."""


class GPT2Step:
    """``listen`` once for each new sound, then call for each token. Weights are those at the time it is made."""

    @torch.inference_mode()
    def __init__(self, model: Listener) -> None:
        core, every = model.base.transformer, model.config.listen_every
        gated = model.config.listen == "gated"
        self.num_heads = model.base.config.num_attention_heads
        self.tokens, self.places = core.wte.weight, core.wpe.weight
        self.head = model.base.lm_head.weight
        self.norm = _Norm.of(core.ln_f)
        self.listeners = [_Listening.of(listener) for listener in model.listeners]  # type: ignore[arg-type]
        self.last = None if gated else self.listeners[0]

        def product(conv: nn.Module) -> tuple[Tensor, Tensor]:
            return conv.bias, conv.weight

        self.blocks = [
            _Block(_Norm.of(block.ln_1), product(block.attn.c_attn), product(block.attn.c_proj), _Norm.of(block.ln_2),
                   product(block.mlp.c_fc), product(block.mlp.c_proj),
                   (index + 1) // every - 1 if gated and (index + 1) % every == 0 else None)
            for index, block in enumerate(core.h)]
        self.heard: list[tuple[Tensor, Tensor]] = []
        self.mask: Tensor | None = None
        self.present: Tensor | None = None

    def listen(self, heard: Sequence[Heard]) -> None:
        """All rows' sounds, as they are now. One row's is cut to its length, and needs no mask."""
        inside, present = heard[0].mask, heard[0].present
        if len(inside) == 1:
            count = int(inside.sum())
            self.heard = [(one.keys[:, :, :count], one.values[:, :, :count]) for one in heard]
            self.mask = None
        else:
            self.heard = [(one.keys, one.values) for one in heard]
            self.mask = torch.zeros(inside.shape, dtype=heard[0].keys.dtype, device=inside.device)
            self.mask.masked_fill_(~inside, -torch.inf)
        self.present = None if bool(present.all()) else present[:, 0].to(heard[0].keys.dtype)

    def __call__(self, cache: SlotCache, tokens: Int[Tensor, " rows"], at: Sequence[int]) -> Float[Tensor, "rows ids"]:
        """Each row's next token, standing at ``at``; the logits after it."""
        rows, heads, longest = len(at), self.num_heads, max(at) + 1
        places = torch.tensor(at, device=tokens.device)
        x = F.embedding(tokens, self.tokens) + F.embedding(places, self.places)
        width = x.shape[1]
        head = width // heads
        if not cache.layers:
            shape = (rows, heads, cache.context, head)
            cache.layers = {index: (x.new_zeros(shape), x.new_zeros(shape)) for index in range(len(self.blocks))}
        mask, length = None, longest
        if rows > 1:
            length = min(-(-longest // ROUND) * ROUND, cache.context)
            mask = torch.where(cache.places[:length] <= places[:, None], 0.0, -torch.inf).to(x.dtype)[:, None, None]
        for index, block in enumerate(self.blocks):
            bias, weight = block.qkv
            query, key, value = torch.addmm(bias, block.norm1(x), weight).view(rows, 3, heads, 1, head).unbind(1)
            keys, values = cache.layers[index]
            if rows == 1:
                keys[:, :, longest - 1 : longest] = key
                values[:, :, longest - 1 : longest] = value
            else:
                keys[cache.every, :, places] = key[:, :, 0]
                values[cache.every, :, places] = value[:, :, 0]
            mixed = F.scaled_dot_product_attention(query, keys[:, :, :length], values[:, :, :length], attn_mask=mask)
            bias, weight = block.out
            x = x + torch.addmm(bias, mixed.view(rows, width), weight)
            bias, weight = block.up
            inner = F.gelu(torch.addmm(bias, block.norm2(x), weight), approximate="tanh")
            bias, weight = block.down
            x = x + torch.addmm(bias, inner, weight)
            if block.listening is not None:
                listener = self.listeners[block.listening]
                x = x + self._attend(listener, block.listening, listener.norm(x))
        x = self.norm(x)
        if self.last is not None:
            x = self.last.norm(x + self._attend(self.last, 0, x))
        return F.linear(x, self.head)

    def _attend(self, listener: _Listening, index: int, x: Tensor) -> Tensor:
        rows, width = x.shape
        keys, values = self.heard[index]
        query = F.linear(x, *listener.query).view(rows, listener.num_heads, 1, -1)
        mixed = F.scaled_dot_product_attention(query, keys, values, attn_mask=self.mask).view(rows, width)
        out = F.linear(mixed, *listener.out)
        return out if self.present is None else out * self.present
