"""How well multitask foresees held-out rows: perplexity and accuracy of what it writes; of embeddings the error, the
cosine, and whether the right item is the nearest of all held-out ones, beside the mean embedding as a guess."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from avray.families.multitask_losses import foreseen, hidden_states
from avray.families.multitask_model import EMBEDDED, TASKS, WRITTEN, MultitaskModel, noise_of
from avray.families.multitask_rows import scaled
from avray.family import Batch, Fitted, Mean, Perplexity


@dataclass
class Retrieval:
    """The share of guesses to which fewer than ``most`` of all targets are nearer than the right one, in the scale of
    [-1, 1]; targets that are equal to the right one count as it."""

    most: int
    guesses: list[np.ndarray] = field(default_factory=list)
    targets: list[np.ndarray] = field(default_factory=list)

    def merge(self, other: Retrieval) -> None:
        self.guesses += other.guesses
        self.targets += other.targets

    def value(self) -> float:
        if not self.guesses:
            return float("nan")
        guesses, targets = np.stack(self.guesses).astype(np.float64), np.stack(self.targets).astype(np.float64)
        distances = ((guesses[:, None] - targets[None]) ** 2).sum(-1)
        nearer = (distances < np.diag(distances)[:, None]).sum(1)
        return float((nearer < self.most).mean())


@torch.no_grad()
def figures(model: MultitaskModel, batch: Batch, fitted: Fitted,
            num_steps: int) -> dict[str, Mean | Retrieval]:
    """One batch's. A flow draws once for each embedding, from the same noise every time."""
    hidden = hidden_states(model, batch)
    found: dict[str, Mean | Retrieval] = {}
    logits = model.text_logits(hidden).float()
    nats = F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), ignore_index=-1, reduction="none")
    hits = (logits.argmax(-1) == batch["targets"]).double()
    for task in WRITTEN:
        weight = (batch["targets"] >= 0) * batch["weight"][:, None] * (batch["task"] == TASKS.index(task))[:, None]
        count = float(weight.sum())
        if count:
            found[f"{task}_perplexity"] = Perplexity(float((nats.view_as(weight) * weight).sum()), count)
            found[f"{task}_accuracy"] = Mean(float((hits * weight).sum()), count)
    for task in EMBEDDED:
        if task in model.heads and len(batch[f"{task}.row"]):
            found |= _embedded(model, task, batch, hidden, fitted, num_steps)
    return found


def _embedded(model: MultitaskModel, task: str, batch: Batch, hidden: Tensor, fitted: Fitted,
              num_steps: int) -> dict[str, Mean | Retrieval]:
    states, there = foreseen(task, batch, hidden)
    number, width = there.shape[1], batch[task].shape[2]
    noise = torch.stack([noise_of(0, at, width) for at in range(number)]).to(states.device)
    guesses = model.heads[task].draw(states.flatten(0, 1), noise.repeat(len(states), 1), num_steps)
    guesses = guesses.view(*there.shape, width).float()
    mean = torch.from_numpy(scaled(fitted.arrays[f"{task}.mean"], task, fitted)).to(states.device)
    weight = there * batch["weight"][batch[f"{task}.row"]][:, None]
    count, found = float(weight.sum()), dict[str, Mean | Retrieval]()
    for name, guess in ((task, guesses), (f"{task}_mean_embedding", mean.expand_as(guesses))):
        error = (guess - batch[task]).square().mean(-1)
        plain, target = model.unscale(task, guess), model.unscale(task, batch[task])
        cosine = F.cosine_similarity(plain, target, dim=-1)
        found[f"{name}_mse"] = Mean(float((error * weight).sum()), count)
        found[f"{name}_cosine"] = Mean(float((cosine * weight).sum()), count)
        pooled = [(values * there[..., None]).sum(1) / there.sum(1, keepdim=True) for values in (guess, batch[task])]
        rows = [[row for row, kept in zip(values.cpu().numpy(), weight[:, 0].tolist(), strict=True) if kept]
                for values in pooled]
        for most in (1, 5):
            found[f"{name}_retrieval_top_{most}"] = Retrieval(most, list(rows[0]), list(rows[1]))
    return found
