"""Examples a second of training on the mix beside each task alone, the same model and batch, collating included.

    python -m benchmarks.multitask_mixed [--batch 32] [--steps 20] [--repeats 5] [--threads 1]

The mix is held against the mean of the single tasks of the same turn. Rows are the demo set's; a batch of the mix is as
long as its longest row, which is what mixing costs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from avray.cli import TRAIN, compose
from avray.data.demo_tasks import task_rows
from avray.families.multitask import Multitask
from avray.families.multitask_model import TASKS
from avray.family import Row
from avray.registry import family_from_settings
from benchmarks.measure import interleaved


def runner(rows: list[Row], family: Multitask, fitted: Any, batch_size: int, num_steps: int) -> Callable[[], float]:
    """Trains a model of its own for some steps and says the examples a second."""
    model = family.build(fitted)
    family.init(model, torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
    random, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)

    def run() -> float:
        began = time.perf_counter()
        for _ in range(num_steps):
            batch = family.collate([rows[i] for i in random.integers(len(rows), size=batch_size)], fitted)
            losses = family.loss(model, batch, generator)
            optimizer.zero_grad()
            torch.stack([losses[name] / batch.counts[name] for name in losses if batch.counts[name]]).sum().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        return batch_size * num_steps / (time.perf_counter() - began)

    run()
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("batch", 32), ("steps", 20), ("repeats", 5), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    family = family_from_settings(compose(TRAIN, ["experiment=multitask_demo"]).family)
    assert isinstance(family, Multitask)
    rows = [{**row, "id": str(index), "weight": 1.0} for index, row in enumerate(task_rows())]
    examples = [{**example.fields, "id": example.id, "weight": 1.0} for example in family.segment(rows)]
    fitted = family.fit(iter(examples))
    sets = {"mixed": examples, **{task: [row for row in examples if row["task"] == task] for task in TASKS}}
    found = interleaved({name: runner(own, family, fitted, args.batch, args.steps) for name, own in sets.items()},
                        args.repeats)
    ratios = [mixed / statistics.mean(found[task][turn] for task in TASKS)
              for turn, mixed in enumerate(found["mixed"])]
    for name, values in found.items():
        print(f"{name}: {statistics.median(values):,.0f} ({min(values):,.0f} to {max(values):,.0f}) examples a second")
    print(f"mixed beside the mean of the single tasks: {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
