"""How ``instruct`` generates: slots that each walk from noise to frames on a grid of levels of their own.

What a request asks for is encoded once, when it is admitted: the transformer's share of it, and its norms at every
level of the walk, for each of the branches that guidance weighs. A slot's branches are run abreast and slots by
themselves, so a request's frames are the same bits alone and in company, and no step is spent on padding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from avray.families.instruct_model import ALIGNED, InstructModel
from avray.family import Batch, Options, Piece
from avray.nn.dit import Context
from avray.nn.flow import Walk, guided


@dataclass(frozen=True)
class Generation:
    """A request's options with their defaults filled in. ``text_scale`` and ``aligned_scale`` are how far to go with
    each kind of condition: 1 as trained, 0 without it."""

    walk: Walk
    text_scale: float
    aligned_scale: float
    seconds: float | None

    def __post_init__(self) -> None:
        for name, value in (("guidance_scale", self.text_scale), ("aligned_guidance_scale", self.aligned_scale)):
            if not math.isfinite(value) or value < 0:
                raise ValueError(f"{name} must be a number from 0, got {value}.")


@dataclass(frozen=True)
class Branch:
    """A weight in the direction, and the conditions it is given."""

    weight: float
    with_text: bool
    with_aligned: bool


def branches_of(how: Generation, has_text: bool, has_aligned: bool) -> list[Branch]:
    """From nothing to what lies in time to all of it (Brooks et al. 2023); a branch of weight 0 is not run."""
    text, aligned = how.text_scale, how.aligned_scale
    if has_text and has_aligned:
        found = [Branch(1 - aligned, False, False), Branch(aligned - text, False, True), Branch(text, True, True)]
    elif has_text or has_aligned:
        scale = text if has_text else aligned
        found = [Branch(1 - scale, False, False), Branch(scale, has_text, has_aligned)]
    else:
        found = [Branch(1.0, False, False)]
    return [branch for branch in found if branch.weight]


@dataclass
class _Slot:
    """``modulations`` hold, for each level that the walk asks at, what the transformer's norms take."""

    frames: Tensor
    how: Generation
    branches: list[Branch]
    context: Context
    modulations: dict[float, list[tuple[Tensor, ...]]]
    angles: Tensor
    index: int = 0


class FlowSampler:
    """A ``Sampler`` whose step is one solver step of each busy slot; the last gives latents ``[time, width]``.
    ``most_frames`` bounds what a request may ask for or be foreseen."""

    def __init__(self, model: InstructModel, slots: int, frame_rate_hz: float, most_frames: int,
                 generation: Callable[[Options], Generation]) -> None:
        self.model, self.slots, self.frame_rate_hz = model.eval(), slots, frame_rate_hz
        self.most_frames, self.generation = most_frames, generation
        self.busy: dict[int, _Slot] = {}

    @torch.inference_mode()
    def admit(self, slots: Sequence[int], batch: Batch, seeds: Sequence[int], options: Sequence[Options]) -> None:
        for row, slot in enumerate(slots):
            assert slot not in self.busy, f"slot {slot} is busy"
            one = {name: tensor[row : row + 1] for name, tensor in batch.tensors.items()}
            self.busy[slot] = self._open(one, seeds[row], self.generation(options[row]))

    def drop(self, slot: int) -> None:
        self.busy.pop(slot, None)

    def _open(self, batch: dict[str, Tensor], seed: int, how: Generation) -> _Slot:
        model, device = self.model, next(self.model.parameters()).device
        asked = model.ask(batch)
        given = round(how.seconds * self.frame_rate_hz) if how.seconds is not None else int(batch["lengths"])
        number = given or round(float(asked.log_seconds.exp()) * self.frame_rate_hz)
        number = max(1, min(number, self.most_frames))
        there = [bool(batch[f"{name}_there"]) for name in ALIGNED if f"{name}_there" in batch]
        spoken = asked.spoken is not None and bool(asked.spoken.valid.any())
        branches = branches_of(how, asked.text is not None and bool(asked.text.valid.any()), any(there) or spoken)
        walk, width = how.walk, len(model.mean)
        levels = sorted({level for index in range(walk.num_steps) for level in walk.asked(index)})
        contexts, summaries = [], []
        for branch in branches:
            flags = [torch.tensor([flag], device=device) for flag in (branch.with_text, branch.with_aligned)]
            conditions = model.condition(asked, batch, torch.tensor([number], device=device), number, *flags)
            contexts.append(model.network.context(conditions.compact()))
            summaries.append(conditions.summary)
        abreast = torch.tensor(levels, device=device).repeat_interleave(len(branches))
        found = model.network.modulations(abreast, torch.cat(summaries).repeat(len(levels), 1))
        modulations = {level: [tuple(part[at : at + len(branches)] for part in parts) for parts in found]
                       for at, level in zip(range(0, len(abreast), len(branches)), levels, strict=True)}
        noise = torch.randn(1, number, width, generator=torch.Generator().manual_seed(seed)).to(device)
        return _Slot(noise, how, branches, Context.joined(contexts), modulations, model.network.angles(number, device))

    @torch.inference_mode()
    def step(self) -> list[Piece]:
        pieces = []
        for index, slot in list(self.busy.items()):
            slot.frames = slot.how.walk.step(slot.frames, slot.index, lambda x, level, slot=slot: self._velocity(
                slot, x, level))  # type: ignore[misc]
            slot.index += 1
            if slot.index == slot.how.walk.num_steps:
                frames = self.model.restored(slot.frames[0].float())
                pieces.append(Piece(index, frames.cpu().numpy(), done=True))
                self.drop(index)
        return pieces

    def _velocity(self, slot: _Slot, x: Tensor, level: float) -> Tensor:
        abreast = x.expand(len(slot.branches), -1, -1)
        found = self.model.network.run(abreast, slot.context, slot.modulations[level], None, slot.angles)
        return guided(found, [branch.weight for branch in slot.branches], slot.how.walk.rescale)[None]
