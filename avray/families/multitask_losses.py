"""What multitask loses: where its embeddings stand among the tokens, the terms of each embedded task, and what simple
guesses lose on the same rows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from avray.encoders.tokens import open_tokens
from avray.families.multitask_model import TASKS, HeadKind, MultitaskModel, gaussian_flow_loss
from avray.families.multitask_rows import scaled
from avray.family import Batch, Fitted
from avray.nn.bigram import Bigram

LENGTH_GROUPS = 4
"""Rows of a batch go through the transformer in so many groups of like length: an answer of one vector needs half
the steps of a line of code. On one core a fourth group gained 5 % of the examples a second, six lost it again."""


def alike(needed: Sequence[int]) -> list[np.ndarray]:
    """Indices of the rows in ``LENGTH_GROUPS`` groups, some of which may be empty: those in which padding every row to
    the longest beside it takes the fewest steps."""
    order, ends = np.argsort(needed, kind="stable"), np.arange(len(needed) + 1)
    longest = np.concatenate([[0], np.array(needed, np.int64)[order]])
    group = np.where(ends[:, None] <= ends, (ends - ends[:, None]) * longest, np.iinfo(np.int64).max // 2)
    best, begins = group[0], []  # steps of the first rows in so many groups, and where the last of them begins
    for _ in range(LENGTH_GROUPS - 1):
        steps = best[:, None] + group
        begins.append(steps.argmin(0))
        best = steps.min(0)
    cuts = [len(needed)]
    for begin in reversed(begins):
        cuts.append(int(begin[cuts[-1]]))
    return np.split(order, cuts[:0:-1])


def hidden_states(model: MultitaskModel, batch: Batch) -> Float[Tensor, "batch time width"]:
    """Of the tokens, and of each sequence's embeddings but the last behind its prompt; 0 behind a row's own steps."""
    x = model.embed(batch["tokens"])
    for task, head in model.heads.items():
        if head.into is None or task not in batch.tensors:
            continue
        rows, at = places(task, batch, offset=0)
        before = torch.arange(at.shape[1], device=at.device) < batch[f"{task}.count"][:, None] - 1
        at = at.clamp(max=x.shape[1] - 1)
        put = before[..., None].to(x.dtype)
        given = torch.zeros_like(x).index_put((rows, at), head.into(batch[task].to(x.dtype)) * put, accumulate=True)
        taken = torch.zeros_like(x[..., :1]).index_put((rows, at), put, accumulate=True)
        x = x * (1 - taken) + given
    hidden = None
    for index in range(LENGTH_GROUPS):
        rows, steps = batch[f"alike{index}.row"][:, None], batch[f"alike{index}.step"]
        if len(rows):
            part = model.transformer(x[rows, steps])
            hidden = part.new_zeros(x.shape) if hidden is None else hidden
            hidden = hidden.index_put((rows, steps), part)
    assert hidden is not None, "a batch has rows"
    return hidden


def places(task: str, batch: Batch, offset: int) -> tuple[Int[Tensor, "k vectors"], Int[Tensor, "k vectors"]]:
    """Where each of a task's vectors is found: ``offset`` -1 the step that foresees it, 0 the one it goes into."""
    rows = batch[f"{task}.row"]
    steps = torch.arange(batch[task].shape[1], device=rows.device)
    at = batch["length"][rows][:, None] + offset + steps
    return rows[:, None].expand_as(at), at


def foreseen(task: str, batch: Batch, hidden: Tensor) -> tuple[Float[Tensor, "k vectors width"], Tensor]:
    """The hidden states that foresee a task's vectors, and which of them there are ``[k, vectors]``."""
    rows, at = places(task, batch, offset=-1)
    there = torch.arange(at.shape[1], device=at.device) < batch[f"{task}.count"][:, None]
    return hidden[rows, at.clamp(max=hidden.shape[1] - 1)], there


def embedding_losses(model: MultitaskModel, task: str, batch: Batch, hidden: Tensor,
                     generator: torch.Generator) -> dict[str, Tensor]:
    """A task's terms."""
    head = model.heads[task]
    states, there = foreseen(task, batch, hidden)
    weight = batch["weight"][batch[f"{task}.row"]][:, None] * there
    error = head.loss(states.flatten(0, 1), batch[task].flatten(0, 1), generator).view(weight.shape)
    losses = {task: (error * weight).sum()}
    if head.end is not None:
        last = torch.arange(there.shape[1], device=there.device) == batch[f"{task}.count"][:, None] - 1
        nats = F.binary_cross_entropy_with_logits(head.end(states)[..., 0].float(), last.float(), reduction="none")
        losses[f"{task}_end"] = (nats * weight).sum()
    if task in model.decoders:
        decoded = model.decoders[task](batch[task][:, 0]).float()
        wrong = (decoded - batch[f"{task}.decoded"]).square().sum((1, 2))
        losses[f"{task}_decoder"] = (wrong * batch[f"{task}.known"]).sum()
    return losses


def bigram_loss(task: str, batch: Batch, fitted: Fitted) -> Tensor:
    """Nats of a written task under the bigram of its training texts, prompts included as contexts."""
    prefix = f"bigram.{task}."
    arrays = {name.removeprefix(prefix): array for name, array in fitted.arrays.items() if name.startswith(prefix)}
    bigram = Bigram(open_tokens(fitted.data["tokens"]).size, **arrays)
    tokens, targets, length, tasks, weight = (batch[name].cpu().numpy()
                                              for name in ("tokens", "targets", "length", "task", "weight"))
    total = 0.0
    for row in np.flatnonzero((tasks == TASKS.index(task)) & (weight > 0)):
        first = length[row] - 1
        written = targets[row, first:][targets[row, first:] >= 0]
        line = np.concatenate([tokens[row, 1 : first + 1], written])[:, None]
        total += float(weight[row]) * float(bigram.nats(line)[first:].sum())
    return torch.tensor(total, dtype=torch.float64)


def mean_losses(task: str, batch: Batch, fitted: Fitted, head: HeadKind, is_sequence: bool) -> dict[str, Tensor]:
    """Of an embedded task under the mean embedding, the mean length and the middle of what a decoder makes."""
    weight = batch["weight"][batch[f"{task}.row"]].cpu().double()
    count = batch[f"{task}.count"].cpu()
    total = (count * weight).sum()
    if head == "flow":
        scale = (fitted.arrays[f"{task}.high"] - fitted.arrays[f"{task}.low"]) / 2
        lost = {task: total * gaussian_flow_loss(fitted.arrays[f"{task}.deviation"] / scale)}
    else:
        mean = torch.from_numpy(scaled(fitted.arrays[f"{task}.mean"], task, fitted))
        there = torch.arange(batch[task].shape[1]) < count[:, None]
        lost = {task: ((batch[task].cpu() - mean).square().sum(-1) * there * weight[:, None]).sum()}
    if is_sequence:
        share = float(weight.sum() / total) if float(total) else 0.0
        lost[f"{task}_end"] = total * -sum(p * math.log(p) for p in (share, 1 - share) if 0 < p < 1)
    if f"{task}.decoded" in batch.tensors:
        known = batch[f"{task}.known"].cpu()[:, None, None]
        lost[f"{task}_decoder"] = (batch[f"{task}.decoded"].cpu().square() * known).double().sum()
    return lost
