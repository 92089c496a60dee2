"""Comparing in one run: interleaved, medians and ranges, a table for the README."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


def interleaved(candidates: Mapping[str, Callable[[], float]], repeats: int = 5) -> dict[str, list[float]]:
    """Each candidate's figure, ``repeats`` times, taking turns, so that a neighbour's load falls on all alike."""
    results: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(repeats):
        for name, run in candidates.items():
            results[name].append(run())
            print(f"  {turn + 1}/{repeats} {name}: {results[name][-1]:.4g}", file=sys.stderr, flush=True)
    return results


@dataclass(frozen=True)
class Table:
    """Figures where more is better, as ratios to the candidate named ``against``."""

    title: str
    unit: str
    results: Mapping[str, list[float]]
    against: str

    def ratio(self, name: str) -> float:
        """Median of the ratios turn by turn, which a slow minute of the machine leaves alone."""
        return statistics.median(a / b for a, b in zip(self.results[name], self.results[self.against], strict=True))

    def markdown(self) -> str:
        lines = [f"| {self.title} | {self.unit}, median (range) | ratio |", "|---|---|---|"]
        for name, values in self.results.items():
            lines.append(f"| {name} | {statistics.median(values):,.4g} ({min(values):,.4g} to {max(values):,.4g}) | "
                         f"{self.ratio(name):.2f} |")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        return {name: {"median": statistics.median(values), "values": values, "ratio": self.ratio(name)}
                for name, values in self.results.items()}
