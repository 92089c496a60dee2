"""Drawing a token from logits, each row with its own temperature, truncation and seed.

Randomness is a hash of (seed, step, stream), not a generator's state: a request's draws do not depend on who else is
in the batch, on when it was admitted, or on how often it was moved. Each draw is one uniform number put through the
inverse of the cumulative distribution in float64; truncation only sets probabilities to 0, so that a row that wants
none draws the same token beside a row that does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Draw:
    """How a row is drawn: ``temperature`` 0 takes the likeliest id; ``top_k`` keeps the k likeliest ids (those that
    tie with the last included), ``top_p`` (Holtzman et al., 2020) then the fewest of them that reach this mass."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature = {self.temperature} must be 0 (the likeliest) or more.")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k = {self.top_k} must be at least 1.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p = {self.top_p} must be above 0 and at most 1.")

def uniforms(seed: int, first_step: int, num_steps: int, num_streams: int) -> np.ndarray:
    """Numbers ``[steps, streams]`` float64 in (0, 1) with 32 random bits, a function of (seed, step, stream) alone:
    two rounds of splitmix64 (Steele et al., 2014)."""
    counter = np.arange(first_step * num_streams, (first_step + num_steps) * num_streams, dtype=np.uint64)
    counter = counter.reshape(num_steps, num_streams) + np.uint64(0x632BE59BD9B4E019)
    bits = _mix(_mix(np.array([seed % 2**64], np.uint64)) ^ _mix(counter))
    return ((bits >> np.uint64(32)).astype(np.float64) + 0.5) / 2**32


def _mix(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Drawer:
    """Draws for rows whose settings stay the same for a while, row i as ``how[i]`` says."""

    def __init__(self, how: Sequence[Draw], device: torch.device | str = "cpu"):
        def column(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, device=device)[:, None, None]

        self.how = list(how)
        kept = [1 if d.temperature == 0 else d.top_k or 0 for d in how]
        self._temperature = column([d.temperature or 1.0 for d in how])
        self._kept, self._most_kept = column(kept), max(kept)
        self._mass = column([d.top_p or 1.0 for d in how])
        self._nucleus = any((d.top_p or 1) < 1 for d in how)

    def __call__(self, logits: Float[Tensor, "rows streams ids"], numbers: np.ndarray) -> Int[Tensor, "rows streams"]:
        """Ids drawn with the uniform ``numbers`` ``[rows, streams]``."""
        scaled = logits.float() / self._temperature
        if self._most_kept:
            scaled = scaled.masked_fill(scaled < self._kth(scaled), -torch.inf)
        if self._nucleus:
            scaled = scaled.masked_fill(scaled < self._least(scaled), -torch.inf)
        cumulative = torch.softmax(scaled, dim=-1).cumsum(-1, dtype=torch.float64)
        wanted = torch.from_numpy(numbers).to(logits.device).unsqueeze(-1) * cumulative[..., -1:]
        return torch.searchsorted(cumulative, wanted, right=True).squeeze(-1)

    def _kth(self, scaled: Tensor) -> Tensor:
        """Each row's k-th greatest logit ``[rows, streams, 1]``, -inf for a row that keeps all."""
        greatest = scaled.topk(min(self._most_kept, scaled.shape[-1])).values
        at = (self._kept - 1).clamp(0, greatest.shape[-1] - 1).expand(*scaled.shape[:2], 1)
        return greatest.gather(-1, at).masked_fill(self._kept == 0, -torch.inf)

    def _least(self, scaled: Tensor) -> Tensor:
        """The least logit ``[rows, streams, 1]`` among those that reach each row's mass, -inf for one without."""
        ordered = scaled.sort(dim=-1, descending=True).values
        probabilities = torch.softmax(ordered, dim=-1)
        before = probabilities.cumsum(-1) - probabilities
        last = (before < self._mass).sum(-1, keepdim=True) - 1
        return ordered.gather(-1, last).masked_fill(self._mass == 1, -torch.inf)
