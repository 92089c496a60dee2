"""The two heads of multitask on the demo set, trained for as many steps each: level and spectral distance of the sounds
that they make of held-out prompts, and how many of them, and of the clips, are as the prompt says.

    python -m benchmarks.multitask_heads [--steps 1000] [--json FILE]

The settings are those of ``experiment=multitask_demo``, the loop is the trainer's without its processes, on one thread.
Level and distance are beside the codec's own round trip of the embedding that was held out. ``flow, from the middle``
is drawn at temperature 0, from the noise's mean.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from avray.cli import TRAIN, compose
from avray.data.demo_tasks import task_rows
from avray.engine import Engine, Generator
from avray.families.multitask import Multitask
from avray.family import Row
from avray.registry import family_from_settings
from avray.train.optim import Ema, Schedule, build_optimizer
from benchmarks.multitask_demo import judge_clips, judge_sounds


def trained(head: str, rows: list[Row], num_steps: int) -> tuple[Multitask, torch.nn.Module, Any]:
    """With averaged weights, as a run keeps them."""
    settings = compose(TRAIN, ["experiment=multitask_demo", f"family.head={head}", f"trainer.max_steps={num_steps}"])
    family, trainer = family_from_settings(settings.family), settings.trainer
    assert isinstance(family, Multitask)
    examples = [{**example.fields, "id": example.id, "weight": 1.0} for example in family.segment(rows)]
    fitted = family.fit(iter(examples))
    model = family.build(fitted)
    family.init(model, torch.Generator().manual_seed(0))
    optimizer = build_optimizer(model, trainer.optimizer)
    schedule, ema = Schedule(optimizer, trainer.schedule, num_steps), Ema(model, trainer.ema_decay)
    random, generator, order = np.random.default_rng(0), torch.Generator().manual_seed(0), np.zeros(0, int)
    began = time.perf_counter()
    for step in range(num_steps):
        if len(order) < trainer.batch_size:
            order = np.concatenate([order, random.permutation(len(examples))])
        chosen, order = np.split(order, [trainer.batch_size])
        batch = family.collate([examples[i] for i in chosen], fitted)
        losses = family.loss(model.train(), batch, generator)
        optimizer.zero_grad()
        torch.stack([weight * losses[name] / batch.counts[name] for name, weight in family.terms.items()
                     if batch.counts[name]]).sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), trainer.clip_norm or float("inf"))
        schedule.step(step)
        optimizer.step()
        ema.update(step)
    print(f"head={head}: {num_steps} steps in {time.perf_counter() - began:.0f} s", flush=True)
    ema.swapped().__enter__()
    return family, model.eval(), fitted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = [{**row, "id": str(index), "weight": 1.0} for index, row in enumerate(task_rows())]
    train, held = ([row for row in rows if row["split"] == split] for split in ("train", "validation"))
    found: dict[str, dict[str, float]] = {}
    for name, head, temperature in (("mse", "mse", None), ("flow, from the middle", "flow", 0.0),
                                    ("flow, temperature 0.8", "flow", 0.8)):
        if head not in found:
            family, model, fitted = trained(head, train, given.steps)
        found.setdefault(head, {})
        generator = Generator(Engine(family, model, fitted))
        kept = [{**example.fields, "id": example.id, "weight": 1.0} for example in family.segment(held)]
        figures = {key: figure.value() for key, figure in family.figures(model, family.collate(kept, fitted),
                                                                         fitted).items()}
        found[name] = {**judge_sounds(generator, temperature), **judge_clips(generator, temperature),
                       **{f"{task}_top_1": figures[f"{task}_retrieval_top_1"] for task in ("audio", "video")}}
        print(f"{name}: " + ", ".join(f"{key} {value:.3g}" for key, value in found[name].items()), flush=True)
    if given.json:
        Path(given.json).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
