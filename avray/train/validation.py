"""The loss on held-out rows, every row once, and what trivial predictors lose on the same rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from avray.checkpoint import Checkpoint
from avray.data.cache import Cache
from avray.data.loader import Loader, PreparedSource, Source
from avray.data.order import Order
from avray.data.plan import Plan
from avray.family import Family, Fitted
from avray.train.parallel import LossModule, agreed, total

Forward = Callable[[dict[str, Tensor], torch.Generator], Tensor]


@dataclass(frozen=True)
class Validation:
    """The total loss, each term's mean, and the total loss of each baseline."""

    loss: float
    terms: dict[str, float]
    baselines: dict[str, float]

    def figures(self) -> dict[str, float]:
        """By the names they are logged under."""
        return {"validation/loss": self.loss, **{f"validation/{name}": value for name, value in self.terms.items()},
                **{f"baseline/{name}": value for name, value in self.baselines.items()}}


@torch.no_grad()
def validation_loss(family: Family, fitted: Fitted, order: Order, source: Source, forward: Forward,
                    device: torch.device, rank: int = 0, world_size: int = 1,
                    max_rows: int | None = None) -> Validation:
    """Over the rows of all ranks; the same on every rank. ``forward`` gives the terms' sums, in evaluation mode.

    Each batch draws from a generator of its own place, so a loss that samples is compared on the same draws each time.
    """
    names, weights = list(family.terms), list(family.terms.values())
    last = order.steps_per_epoch if max_rows is None else min(order.steps_per_epoch, -(-max_rows // order.batch_size))
    loader = Loader(order, lambda rows: family.collate(rows, fitted), rank, world_size)
    counts = torch.zeros(len(names), dtype=torch.float64)
    sums: dict[str, Tensor] = {"": torch.zeros(len(names), dtype=torch.float64)}
    steps = loader.epoch(source, 0)
    for step in steps:
        if step.step >= last:
            steps.close()
            break
        for batch in step.micro_batches:
            batch = batch.to(device)
            counts += torch.tensor([batch.counts[name] for name in names], dtype=torch.float64)
            sums[""] += forward(batch.tensors, torch.Generator(device).manual_seed(1_000_003 * step.step + rank)).cpu()
            for name, terms in family.baselines(batch, fitted).items():
                part = torch.stack([terms[term].double().cpu() for term in names])
                sums[name] = sums[name] + part if name in sums else part
    known = sorted(sums)
    assert agreed(known) == known, "every rank has rows, padding at least, and so the same baselines"
    everything = total([*counts.tolist(), *(value for name in known for value in sums[name].tolist())], device)
    size = len(names)
    all_counts = everything[:size]

    def means(index: int) -> list[float]:
        part = everything[(1 + index) * size : (2 + index) * size]
        return [value / count if count else 0.0 for value, count in zip(part, all_counts, strict=True)]

    losses = {name: sum(w * mean for w, mean in zip(weights, means(index), strict=True))
              for index, name in enumerate(known)}
    return agreed(Validation(losses.pop(""), dict(zip(names, means(0), strict=True)), losses))


def checkpoint_loss(checkpoint: Checkpoint, family: Family, plan: Plan, cache: Cache, device: str = "cpu",
                    batch_size: int = 16, max_rows: int | None = None) -> Validation:
    """A checkpoint's loss on a plan whose columns are in the cache, with the weights it would generate with."""
    fitted = checkpoint.fitted
    model = family.build(fitted)
    checkpoint.load_into(model)
    module = LossModule(family, model.to(device)).eval()
    order = plan.order(min(batch_size, plan.num_examples), 0, batch_size * 4, shuffle=False)
    source = PreparedSource(plan, order, cache, family.columns(fitted))
    return validation_loss(family, fitted, order, source, module, torch.device(device), max_rows=max_rows)
