"""Training tokens a second: avray's codec language model beside a plain loop in nanoGPT's manner.

    python -m benchmarks.codec_lm_train [--batch 1] [--context 2048] [--dropout 0.2] [--compile] [--threads 1]
                                        [--loss_steps 60] [--repeats 5] [--json FILE]

Both have the original's size (12,213,504 parameters), the same initial weights, batches, float32, threads and dropout
(on the attention weights as well), and do what a loop does: zero the gradients, forward, cross-entropy, backward, clip,
AdamW. The peer is written below as nanoGPT writes it; ``torch.compile``, which nanoGPT uses where it can, is
``--compile`` for both. ``--loss_steps`` trains both on the same stream of tokens and compares the loss after it.

The bound is the floating-point operations of the step's matrix products (recomputing not counted) at the rate of a
2048 x 2048 product, measured in each turn.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from avray.codecs.spectral import Spectral
from avray.families.codec_lm import CodecLM, CodecTransformer
from avray.family import Batch, Fitted
from avray.nn.patterns import Flatten
from benchmarks.measure import Table, interleaved

IDS, CODEBOOKS, WIDTH, LAYERS, HEADS, PARAMETERS = 1024, 4, 384, 6, 6, 12_213_504
PEER = "plain loop"


class PlainAttention(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.c_attn = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.c_proj = nn.Linear(WIDTH, WIDTH)
        self.resid_dropout = nn.Dropout(dropout)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        batch, time_, width = x.size()
        q, k, v = self.c_attn(x).split(width, dim=2)
        q, k, v = (part.view(batch, time_, HEADS, width // HEADS).transpose(1, 2) for part in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0, is_causal=True)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).contiguous().view(batch, time_, width)))


class PlainBlock(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.ln_1, self.attn, self.ln_2 = nn.LayerNorm(WIDTH), PlainAttention(dropout), nn.LayerNorm(WIDTH)
        self.c_fc, self.gelu, self.c_proj = nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.dropout(self.c_proj(self.gelu(self.c_fc(self.ln_2(x)))))


class Plain(nn.Module):
    """A GPT as one writes it."""

    def __init__(self, context: int, dropout: float) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(IDS, WIDTH), nn.Embedding(context, WIDTH)
        self.drop = nn.Dropout(dropout)
        self.h = nn.ModuleList(PlainBlock(dropout) for _ in range(LAYERS))
        self.ln_f = nn.LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, IDS, bias=False)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.drop(self.wte(ids) + self.wpe(torch.arange(ids.size(1))))
        for block in self.h:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)


def same_weights(ours: CodecTransformer, context: int, dropout: float) -> Plain:
    plain, own = Plain(context, dropout), ours.transformer
    pairs = [(plain.wte, own.embedding), (plain.wpe, own.position), (plain.ln_f, own.norm), (plain.lm_head, own.head)]
    for theirs, block in zip(plain.h, own.blocks, strict=True):
        pairs += [(theirs.ln_1, block.norm1), (theirs.attn.c_attn, block.attention.qkv),
                  (theirs.attn.c_proj, block.attention.out), (theirs.ln_2, block.norm2), (theirs.c_fc, block.mlp.up),
                  (theirs.c_proj, block.mlp.down)]
    for theirs, mine in pairs:
        theirs.load_state_dict(mine.state_dict())
    return plain


class Run:
    """One candidate in training: a call is a step on the next batch."""

    def __init__(self, model: nn.Module, loss: Callable[[nn.Module, Batch], Tensor], fused: bool,
                 compiled: bool) -> None:
        self.model = model.train()
        self.called: Any = torch.compile(model) if compiled else model
        self.loss = loss
        self.optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=fused)

    def __call__(self, batch: Batch) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(self.called, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.item()


def plain_loss(model: nn.Module, batch: Batch) -> Tensor:
    return model(batch["inputs"][..., 0], batch["targets"][..., 0])


def codes_like(num_frames: int, seed: int) -> np.ndarray:
    """Codes that can be learnt: a random walk a codebook, half of each frame a function of the codebook before."""
    random = np.random.default_rng(seed)
    codes = np.zeros((num_frames, CODEBOOKS), np.int64)
    codes[:, 0] = random.integers(-3, 4, num_frames).cumsum()
    for k in range(1, CODEBOOKS):
        codes[:, k] = codes[:, k - 1] * (2 * k + 1) + random.integers(0, 3, num_frames)
    return (codes % IDS).astype(np.uint16)


def flops_per_token(context: int) -> float:
    """Forward and twice that backward: two operations a weight, and both products of causal attention."""
    weights = LAYERS * 12 * WIDTH**2 + IDS * WIDTH
    return 3 * (2 * weights + LAYERS * 2 * context * WIDTH)


def product_flops() -> float:
    """Of this machine with the threads it was given, now."""
    one = torch.randn(2048, 2048)
    began = time.perf_counter()
    for _ in range(3):
        one @ one
    return 3 * 2 * 2048**3 / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default, text in (("batch", 1, "windows a step"), ("context", 2048, "tokens a window"),
                                ("threads", 1, "torch threads"), ("steps", 1, "steps a turn"),
                                ("loss_steps", 0, "steps to compare the loss after"), ("repeats", 5, "turns")):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text}; {default} by default")
    parser.add_argument("--dropout", type=float, default=0.2, help="the original's 0.2 by default")
    parser.add_argument("--compile", action="store_true", help="torch.compile both")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    family = CodecLM(Spectral(), CODEBOOKS, Flatten(offsets=False), segment_s=args.context / CODEBOOKS / 75,
                     context=args.context, dropout=args.dropout, attention_dropout=args.dropout)
    fitted = Fitted({}, {"codec": family.codec.column_id(), "cardinality": IDS, "frame_rate_hz": 75.0})
    ours = family.build(fitted)
    family.init(ours, torch.Generator().manual_seed(0))
    plain = same_weights(ours, args.context, args.dropout)
    count = sum(p.numel() for p in ours.parameters())
    assert count == sum(p.numel() for p in plain.parameters()) == PARAMETERS - (2048 - args.context) * WIDTH

    def batch_of(step: int) -> Batch:
        rows = [{"id": "", "weight": 1.0, "audio.codes": codes_like(args.context // CODEBOOKS, 1000 * step + i)}
                for i in range(args.batch)]
        batch = family.collate(rows, fitted)
        batch["inputs"][:, 0] = 0  # the peer knows no empty start; with id 0 for both, both compute the same
        return batch

    generator = torch.Generator()

    def our_loss(model: nn.Module, batch: Batch) -> Tensor:
        return family.loss(model, batch, generator)["ce"] / batch.counts["ce"]

    runs = {PEER: Run(plain, plain_loss, False, args.compile), "avray": Run(ours, our_loss, True, args.compile)}
    batch = batch_of(0)
    for run in runs.values():
        run(batch)

    def tokens_per_s(run: Run) -> float:
        began = time.perf_counter()
        for _ in range(args.steps):
            run(batch)
        return args.steps * args.batch * args.context / (time.perf_counter() - began)

    candidates = {name: (lambda run=run: tokens_per_s(run)) for name, run in runs.items()}
    candidates["bound by matrix products"] = lambda: product_flops() / flops_per_token(args.context)
    title = (f"training, {args.batch} x {args.context} tokens a step, dropout {args.dropout:g}, float32, "
             f"{args.threads} thread(s){', compiled' if args.compile else ''}")
    table = Table(title, "tokens/s", interleaved(candidates, args.repeats), PEER)
    print(table.markdown())
    figures: dict[str, Any] = {"title": title, **table.as_dict()}
    if args.loss_steps:
        family.init(ours, torch.Generator().manual_seed(0))
        plain.load_state_dict(same_weights(ours, args.context, args.dropout).state_dict())
        losses = {}
        for name, run in runs.items():
            torch.manual_seed(0)
            fresh = Run(run.model, run.loss, name != PEER, False)
            fresh.called = run.called
            losses[name] = [fresh(batch_of(1 + step)) for step in range(args.loss_steps)]
        last = {name: float(np.mean(values[-10:])) for name, values in losses.items()}
        tokens = args.loss_steps * args.batch * args.context
        print(f"\nLoss after {tokens:,} tokens (mean of the last 10 steps): " + ", ".join(
            f"{name} {value:.4f}" for name, value in last.items()) + f" ({last['avray'] / last[PEER] - 1:+.2%})")
        figures["loss"] = losses
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
