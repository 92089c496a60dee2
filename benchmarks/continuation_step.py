"""One training step of the 859,520-parameter model beside a plain loop over stock ``nn.TransformerEncoder``.

    python -m benchmarks.continuation_step [--batch 4] [--frames 1200] [--threads 1] [--repeats 5] [--json FILE]

Both have the same weights (checked: equal outputs without dropout), batch, float32, threads and dropout, and do what a
loop does: zero the gradients, forward, squared error, backward, clip, AdamW. The optimiser is a row of its own, so that
the model's part and the optimiser's can be told apart. The bound is the floating-point operations of the step's matrix
products (recomputing not counted) at the rate of a 2048 x 2048 product, measured in each turn.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from avray.codecs.spectral import Spectral
from avray.families.continuation import Continuation, Predictor
from avray.family import Batch, Fitted
from avray.nn.encoder import sinusoidal_positions
from benchmarks.measure import Table, interleaved

WIDTH, LAYERS, PARAMETERS = 128, 4, 859_520


class Stock(nn.Module):
    """The original's model as one would write it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 8, 512, 0.1, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, LAYERS)
        self.out_norm = nn.LayerNorm(WIDTH)
        self.head = nn.Sequential(nn.Linear(WIDTH, 256), nn.GELU(), nn.Dropout(0.1), nn.Linear(256, WIDTH))

    def forward(self, frames: Tensor) -> Tensor:
        frames = self.norm(frames) + sinusoidal_positions(frames.shape[1], WIDTH, frames.device)
        return self.head(self.out_norm(self.encoder(frames)))


def stock_step(model: Stock, batch: Batch, fused: bool) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=fused)
    criterion = nn.MSELoss()

    def step() -> None:
        optimizer.zero_grad()
        criterion(model(batch["input"]), batch["output"]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def avray_step(family: Continuation, model: Predictor, batch: Batch, fused: bool) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=fused)
    generator = torch.Generator()

    def step() -> None:
        optimizer.zero_grad()
        (family.loss(model, batch, generator)["mse"] / batch.counts["mse"]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def same_weights(family: Continuation, fitted: Fitted) -> tuple[Stock, Predictor]:
    torch.manual_seed(0)
    stock, ours = Stock(), family.build(fitted)
    for own, other in ((ours.norm, stock.norm), (ours.out_norm, stock.out_norm), (ours.widen, stock.head[0]),
                       (ours.narrow, stock.head[3])):
        own.load_state_dict(other.state_dict())
    ours.encoder.load_stock(stock.encoder)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in stock.parameters()) == PARAMETERS
    frames = torch.randn(1, 100, WIDTH)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(frames), stock.eval()(frames), atol=1e-5, rtol=1e-5)
    return stock.train(), ours.train()


def flops_per_frame(frames: int) -> float:
    """Forward and twice that backward: two operations a weight, and both products of attention in each layer."""
    weights = LAYERS * (4 * WIDTH**2 + 2 * WIDTH * 512) + 2 * WIDTH * 256
    return 3 * (2 * weights + LAYERS * 2 * 2 * frames * WIDTH)


def product_flops() -> float:
    """Of this machine with the threads it was given, now."""
    one = torch.randn(2048, 2048)
    began = time.perf_counter()
    for _ in range(3):
        one @ one
    return 3 * 2 * 2048**3 / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default, text in (("batch", 4, "rows"), ("frames", 1200, "frames a row"), ("threads", 1, "torch threads"),
                                ("steps", 1, "steps a turn"), ("repeats", 5, "turns")):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text}; {default} by default")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    family = Continuation(Spectral(), segment_s=args.frames / 75)
    constants = {name: np.ones(WIDTH, np.float32) for name in ("mean", "scale", "kept")}
    fitted = Fitted(constants, {"codec": family.codec.column_id(), "width": WIDTH, "frame_rate_hz": 75.0})
    random = np.random.default_rng(0)
    rows = [{"id": str(i), "weight": 1.0, "input.latents": random.normal(size=(args.frames, WIDTH)),
             "output.latents": random.normal(size=(args.frames, WIDTH))} for i in range(args.batch)]
    batch = family.collate(rows, fitted)
    stock, ours = same_weights(family, fitted)
    steps = {"stock nn.TransformerEncoder, AdamW": stock_step(stock, batch, fused=False),
             "the same, AdamW(fused=True)": stock_step(stock, batch, fused=True),
             "avray, AdamW": avray_step(family, ours, batch, fused=False),
             "avray, AdamW(fused=True)": avray_step(family, ours, batch, fused=True)}

    def frames_per_s(step: Callable[[], None]) -> float:
        began = time.perf_counter()
        for _ in range(args.steps):
            step()
        return args.steps * args.batch * args.frames / (time.perf_counter() - began)

    for step in steps.values():
        step()
    candidates = {name: (lambda step=step: frames_per_s(step)) for name, step in steps.items()}
    candidates["bound by matrix products"] = lambda: product_flops() / flops_per_frame(args.frames)
    title = f"training step, batch {args.batch} x {args.frames} frames, float32, {args.threads} thread(s)"
    table = Table(title, "frames/s", interleaved(candidates, args.repeats), "stock nn.TransformerEncoder, AdamW")
    print(table.markdown())
    if args.json:
        args.json.write_text(json.dumps({"title": title, **table.as_dict()}, indent=2))


if __name__ == "__main__":
    main()
