"""Flow matching: what a network is trained to foresee, and how its field is walked from noise to data.

A sample ``x`` and noise ``e`` lie on a straight line, ``x_s = (1 - s) x + s e``, and the network learns its direction
``e - x`` at every level ``s`` (Lipman et al. 2023; Liu et al. 2023, rectified flow). Levels are drawn logit-normal
(Esser et al. 2024), so that most of the work goes where the direction is hardest to tell. Walking from 1 to 0 takes a
solver, a grid of levels (``sway`` -1 makes the first steps small, Chen et al. 2024, F5-TTS) and, for conditions,
weights on what the network says with and without them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

Solver = Literal["euler", "midpoint", "heun"]
Velocity = Callable[[Tensor, float], Tensor]
MAX_STEPS = 1000
_LOWEST_LEVEL = 0.05


def draw_levels(count: int, generator: torch.Generator, device: torch.device | str, mean: float = 0.0,
                spread: float = 1.0) -> Float[Tensor, " count"]:
    """Levels in (0, 1): the logistic function of normal draws. A higher ``mean`` dwells on noise."""
    return torch.sigmoid(mean + spread * torch.randn(count, generator=generator, device=device))


def mixed(data: Float[Tensor, "batch time width"], noise: Float[Tensor, "batch time width"],
          levels: Float[Tensor, " batch"]) -> Float[Tensor, "batch time width"]:
    """Where the lines stand at these levels."""
    return torch.lerp(data, noise, levels[:, None, None])


def towards(noisy: Tensor, data: Tensor, levels: Tensor) -> Tensor:
    """The direction at ``noisy`` if ``data`` lies at its end; ``levels`` of any shape that goes with them.

    So a network may foresee the data, which has a pattern, in place of the direction, which is half noise and passes
    no product narrower than itself (Li and He 2025). Near level 0 the direction is held to 20 times the distance."""
    return (noisy - data) / levels.clamp_min(_LOWEST_LEVEL)


def best_linear_loss(mean: float = 0.0, spread: float = 1.0) -> float:
    """What the best guess loses, a value, if data were white and normal of variance 1: the mean of
    1 / ((1 - s)² + s²) over the levels. What a network is worth begins below it."""
    levels = torch.sigmoid(mean + spread * torch.special.ndtri((torch.arange(4096, dtype=torch.float64) + 0.5) / 4096))
    return float((1 / ((1 - levels) ** 2 + levels**2)).mean())


@dataclass(frozen=True)
class Walk:
    """How to go from noise to data. ``sway`` from -1 (small steps first) to 1 bends the grid of levels; ``rescale``
    (Lin et al. 2024) from 0 to 1 brings guided directions back to the spread of unguided ones."""

    num_steps: int = 20
    solver: Solver = "euler"
    sway: float = -1.0
    rescale: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.num_steps <= MAX_STEPS:
            raise ValueError(f"num_steps must be from 1 to {MAX_STEPS}, got {self.num_steps}.")
        if self.solver not in get_args(Solver):
            raise ValueError(f"solver must be one of {', '.join(get_args(Solver))}, got {self.solver!r}.")
        if not -1 <= self.sway <= 1:
            raise ValueError(f"sway must be from -1 to 1, got {self.sway}.")
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"rescale must be from 0 to 1, got {self.rescale}.")

    def levels(self) -> list[float]:
        """``num_steps + 1`` levels from 1 down to 0."""
        times = [index / self.num_steps for index in range(self.num_steps + 1)]
        return [1 - (t + self.sway * (math.cos(math.pi / 2 * t) - 1 + t)) for t in times]

    def asked(self, index: int) -> list[float]:
        """The levels at which step ``index`` asks for a direction."""
        start, stop = self.levels()[index : index + 2]
        return {"euler": [start], "midpoint": [start, (start + stop) / 2], "heun": [start, stop]}[self.solver]

    def step(self, x: Tensor, index: int, velocity: Velocity) -> Tensor:
        """``x`` after step ``index``."""
        start, stop = self.levels()[index : index + 2]
        first = velocity(x, start)
        if self.solver == "euler":
            return x + (stop - start) * first
        if self.solver == "midpoint":
            middle = (start + stop) / 2
            return x + (stop - start) * velocity(x + (middle - start) * first, middle)
        return x + (stop - start) / 2 * (first + velocity(x + (stop - start) * first, stop))


def guided(branches: Float[Tensor, "branch time width"], weights: Sequence[float],
           rescale: float) -> Float[Tensor, "time width"]:
    """Directions under fewer to all conditions (the last), by weights that sum to 1."""
    total = torch.einsum("b,btw->tw", branches.new_tensor(weights), branches)
    if not rescale or len(weights) == 1:
        return total
    return total * (1 - rescale + rescale * branches[-1].std() / total.std().clamp_min(1e-8))
