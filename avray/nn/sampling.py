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

    @property
    def truncates(self) -> bool:
        return self.temperature == 0 or self.top_k is not None or (self.top_p is not None and self.top_p < 1)


def uniforms(seeds: Sequence[int], steps: Sequence[int], num_streams: int) -> np.ndarray:
    """Numbers ``[rows, streams]`` float64 in (0, 1) with 32 random bits, a function of (seed, step, stream) alone:
    two rounds of splitmix64 (Steele et al., 2014)."""
    seed = np.array([s % 2**64 for s in seeds], np.uint64)[:, None]
    counter = np.asarray(steps, np.uint64)[:, None] * np.uint64(num_streams) + np.arange(num_streams, dtype=np.uint64)
    bits = _mix(_mix(seed) ^ _mix(counter + np.uint64(0x632BE59BD9B4E019)))
    return ((bits >> np.uint64(32)).astype(np.float64) + 0.5) / 2**32


def _mix(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def draw(logits: Float[Tensor, "rows streams ids"], numbers: np.ndarray,
         how: Sequence[Draw]) -> Int[Tensor, "rows streams"]:
    """Ids drawn with the uniform ``numbers`` ``[rows, streams]``, row i as ``how[i]`` says."""
    temperatures = torch.tensor([d.temperature or 1.0 for d in how], device=logits.device)
    scaled = logits.float() / temperatures[:, None, None]
    if any(d.truncates for d in how):
        scaled = scaled.masked_fill(scaled < _thresholds(scaled, how), -torch.inf)
    cumulative = torch.softmax(scaled, dim=-1, dtype=torch.float64).cumsum(-1)
    wanted = torch.from_numpy(numbers).to(logits.device)[..., None] * cumulative[..., -1:]
    return (cumulative <= wanted).sum(-1)


def _thresholds(scaled: Tensor, how: Sequence[Draw]) -> Tensor:
    """The least logit ``[rows, streams, 1]`` that each row keeps."""
    num_ids = scaled.shape[-1]
    keep = torch.tensor([1 if d.temperature == 0 else min(d.top_k or num_ids, num_ids) for d in how],
                        device=scaled.device)[:, None, None]
    mass = torch.tensor([2.0 if d.top_p in (None, 1) else d.top_p for d in how], device=scaled.device)[:, None, None]
    ordered = scaled.sort(dim=-1, descending=True).values
    ordered = ordered.masked_fill(torch.arange(num_ids, device=scaled.device) >= keep, -torch.inf)
    probabilities = torch.softmax(ordered, dim=-1)
    before = probabilities.cumsum(-1) - probabilities
    last = ((before < mass) & (ordered > -torch.inf)).sum(-1, keepdim=True).clamp(min=1) - 1
    return ordered.gather(-1, last)
