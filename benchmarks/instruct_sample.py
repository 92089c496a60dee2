"""Sampling by flow matching: avray's slots beside a plain eager Euler loop over the very same network and weights.

    python -m benchmarks.instruct_sample [--preset instruct] [--seconds 2.4] [--repeats 5] [--json FILE]

The peer encodes the conditions once and then, at each of 20 levels, calls the whole network on a batch of two rows,
with and without the text (classifier-free guidance as it is mostly written). Both give the same latents (checked). The
bound is the transformer's matrix products alone, at the same shapes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from avray.cli import TRAIN, compose
from avray.families.instruct import Instruct
from avray.families.instruct_model import InstructModel
from avray.family import Batch, Fitted, Options
from avray.nn.flow import Walk
from avray.registry import family_from_settings
from benchmarks.measure import Table, interleaved

TEXT = "A plucked string at C#4 (277.18 Hz), 2.40 seconds long."
STEPS, SCALE = 20, 3.0


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--preset", default="instruct")
    parser.add_argument("--seconds", type=float, default=2.4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    family = family_from_settings(compose(TRAIN, [f"family={given.preset}"]).family)
    assert isinstance(family, Instruct)
    fitted = Fitted({"mean": np.zeros(128, np.float32), "scale": np.ones(128, np.float32)},
                    {"codec": family.codec.column_id(), "width": 128, "frame_rate_hz": 75.0, "log_seconds": [0.0, 1.0]})
    model = family.build(fitted).eval()
    generator = torch.Generator().manual_seed(0)
    family.init(model, generator)
    for parameter in model.network.parameters():  # a new network says nothing, and nothing is faster than nothing
        torch.nn.init.normal_(parameter, std=0.03, generator=generator)
    row = {"id": "", "weight": 1.0, "task": "text_to_audio", "instruction": "", "text": TEXT}
    batch, frames = family.collate([row], fitted), round(given.seconds * 75)
    made: dict[str, np.ndarray] = {}

    def with_avray() -> float:
        sampler = family.sampler(model, fitted, 1)
        began = time.perf_counter()
        sampler.admit([0], batch, [0], [Options(seconds=given.seconds, guidance_scale=SCALE, num_steps=STEPS)])
        pieces = [piece for _ in range(STEPS) for piece in sampler.step()]
        made["avray"] = pieces[0].data
        return given.seconds / (time.perf_counter() - began)

    def eagerly() -> float:
        began = time.perf_counter()
        made["eager"] = eager(model, batch, frames)
        return given.seconds / (time.perf_counter() - began)

    def products() -> float:
        return given.seconds / bound(model, frames)

    peer = "a plain eager Euler loop, two rows a step"
    results = interleaved({"avray": with_avray, peer: eagerly, "bound: the matrix products alone": products},
                          given.repeats)
    np.testing.assert_allclose(made["avray"], made["eager"], atol=1e-3)
    title = f"`instruct_sample`: {given.preset}, {given.seconds:g} s in {STEPS} Euler steps, guided"
    table = Table(title, "s of latents a second", results, peer)
    print(table.markdown())
    if given.json:
        Path(given.json).write_text(json.dumps(table.as_dict()))


@torch.inference_mode()
def eager(model: InstructModel, batch: Batch, frames: int) -> np.ndarray:
    both = {name: tensor.expand(2, *tensor.shape[1:]) for name, tensor in batch.tensors.items()}
    conditions = model.condition(model.ask(both), both, torch.tensor([frames] * 2), frames,
                                 torch.tensor([False, True]), torch.tensor([True, True]))
    x = torch.randn(1, frames, 128, generator=torch.Generator().manual_seed(0))
    levels = Walk(STEPS).levels()
    for start, stop in itertools.pairwise(levels):
        without, wanted = model.network(x.expand(2, -1, -1), torch.tensor([start] * 2), conditions)
        x = x + (stop - start) * (without + SCALE * (wanted - without))
    return model.restored(x[0]).numpy()


@torch.inference_mode()
def bound(model: InstructModel, frames: int) -> float:
    """Seconds of the transformer's products over frames, for both rows and all steps."""
    positions = -(-frames // model.network.config.patch)
    weights = [module.weight for name, module in model.network.named_modules()
               if isinstance(module, torch.nn.Linear) and not any(part in name for part in (
                   "level", "modulate", "shared", "last", "answer", "ask", "fuse", "gather"))]
    inputs = {weight.shape[1]: torch.randn(positions, weight.shape[1]) for weight in weights}
    began = time.perf_counter()
    for _ in range(2 * STEPS):
        for weight in weights:
            inputs[weight.shape[1]] @ weight.T
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
