"""Search spaces as they stand in YAML: which keys, which values, under which conditions.

Notable: a draw is a function of (seed, trial, key) alone, not of the draws before it. So a sweep that was killed goes
on with the very trials it would have had, whatever was under way, and adding a key leaves the others' values alone.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

RANGES = ("uniform", "loguniform", "int", "logint")
FORMS = (*RANGES, "choice")
Params = dict[str, Any]
"""Dotted key -> value, of the keys that apply."""


@dataclass(frozen=True)
class Distribution:
    """The values of one key. A range is closed; ``step`` puts it on a raster from ``low`` on."""

    key: str
    kind: Literal["uniform", "loguniform", "int", "logint", "choice"]
    low: float = 0.0
    high: float = 0.0
    step: float | None = None
    choices: tuple[Any, ...] = ()
    when: tuple[tuple[str, tuple[Any, ...]], ...] = ()
    """Other keys, and the values of each under which this one applies."""

    @property
    def is_log(self) -> bool:
        return self.kind.startswith("log")

    @property
    def is_int(self) -> bool:
        return self.kind in ("int", "logint")

    def applies(self, params: Mapping[str, Any]) -> bool:
        return all(key in params and params[key] in values for key, values in self.when)

    def at(self, share: float) -> Any:
        """The value at 0 … 1 of the range (of its logarithm where it is one), or of the list."""
        if self.kind == "choice":
            return self.choices[min(int(share * len(self.choices)), len(self.choices) - 1)]
        low, high = (self.low, self.high + 1) if self.is_int and not self.step else (self.low, self.high)
        value = math.exp(math.log(low) + share * (math.log(high) - math.log(low))) if self.is_log else (
            low + share * (high - low))
        return self.fit(math.floor(value) if self.is_int and not self.step else value)

    def fit(self, value: float) -> float | int:
        """Into the range, onto the raster."""
        if self.step:
            value = self.low + round((value - self.low) / self.step) * self.step
            value = min(value, self.low + math.floor((self.high - self.low) / self.step + 1e-9) * self.step)
        value = min(max(value, self.low), self.high)
        return round(value) if self.is_int else float(f"{value:.12g}")

    def holds(self, value: Any) -> bool:
        if self.kind == "choice":
            return value in self.choices
        return isinstance(value, int | float) and not isinstance(value, bool) and self.low <= value <= self.high

    def grid(self, points: int) -> list[Any]:
        """Every choice, or ``points`` values from end to end."""
        if self.kind == "choice":
            return list(self.choices)
        steps = np.linspace(0, 1, points)
        span = [math.exp(math.log(self.low) + s * math.log(self.high / self.low)) if self.is_log
                else self.low + s * (self.high - self.low) for s in steps.tolist()]
        return list(dict.fromkeys(self.fit(value) for value in span))

    def ends(self) -> list[Any]:
        """The values to try the settings' own checks with."""
        return list(self.choices) if self.kind == "choice" else [self.fit(self.low), self.fit(self.high)]

    def nudge(self, value: Any, rng: np.random.Generator) -> Any:
        """PBT's explore: a fifth up or down, or the neighbouring choice."""
        if not self.holds(value):
            return self.at(rng.random())
        up = rng.random() < 0.5
        if self.kind == "choice":
            index = self.choices.index(value) + (1 if up else -1)
            return self.choices[min(max(index, 0), len(self.choices) - 1)]
        moved = value * (1.2 if up else 0.8) if value else self.at(rng.random())
        if self.is_int and round(moved) == value:
            moved = value + (1 if up else -1)
        return self.fit(moved)


@dataclass(frozen=True)
class Space:
    """Distributions, conditions before what hangs on them."""

    distributions: tuple[Distribution, ...]

    @property
    def keys(self) -> list[str]:
        return [distribution.key for distribution in self.distributions]

    def __getitem__(self, key: str) -> Distribution:
        return next(distribution for distribution in self.distributions if distribution.key == key)

    def applying(self, params: Params) -> Iterator[Distribution]:
        """One after another; the caller adds each one's value to ``params`` before it asks for the next."""
        for distribution in self.distributions:
            if distribution.applies(params):
                yield distribution

    def draw(self, seed: int, number: int) -> Params:
        params: Params = {}
        for distribution in self.applying(params):
            params[distribution.key] = distribution.at(generator(seed, number, distribution.key).random())
        return params

    def grid(self, points: int) -> list[Params]:
        """Every combination, those that differ only in keys that do not apply counted once."""
        found: dict[str, Params] = {}
        for values in itertools.product(*(distribution.grid(points) for distribution in self.distributions)):
            params: Params = {}
            chosen = dict(zip(self.keys, values, strict=True))
            for distribution in self.applying(params):
                params[distribution.key] = chosen[distribution.key]
            found.setdefault(json.dumps(params, sort_keys=True), params)
        return list(found.values())

    def explore(self, params: Params, seed: int, number: int, step: int, resample: float) -> Params:
        """New values near a donor's (Jaderberg et al. 2017, Population Based Training of Neural Networks)."""
        new: Params = {}
        for distribution in self.applying(new):
            rng = generator(seed, number, f"{distribution.key}@{step}")
            anew = distribution.key not in params or rng.random() < resample
            new[distribution.key] = (distribution.at(rng.random()) if anew
                                     else distribution.nudge(params[distribution.key], rng))
        return new


def generator(*key: Any) -> np.random.Generator:
    digest = hashlib.blake2b(":".join(map(str, key)).encode(), digest_size=8).digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))


def read_space(space: Mapping[str, Any]) -> Space:
    """``{"trainer.optimizer.lr": {"loguniform": [1e-5, 1e-2]}}``, dotted or nested, to a Space.

    What the command line nests (``tune.space.a.b={…}``) outweighs a dotted key of the YAML; null takes a key out.
    ValueError, naming the key, for bounds reversed, an unknown form, a condition on nothing, and nothing to search.
    """
    flat: dict[str, Any] = {}
    for key, value, _ in sorted(_flatten(space), key=lambda item: item[2]):
        flat[key] = value
    found = {key: _distribution(key, value) for key, value in flat.items() if value is not None}
    if not found:
        raise ValueError("tune.space has nothing to search in it: give a key and its values, such as "
                         "'tune.space.trainer.optimizer.lr={loguniform: [1e-4, 1e-2]}'.")
    return Space(tuple(_ordered(found)))


def _flatten(space: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, Any, int]]:
    """Key, description, and how deep it was nested."""
    for key, value in space.items():
        name = f"{where}.{key}" if where else str(key)
        if isinstance(value, Mapping) and not set(value) & {*FORMS, "when", "step"}:
            yield from _flatten(value, name) if value else [(name, value, name.count("."))]
        else:
            yield name, value, where.count(".") + bool(where)


def _distribution(key: str, value: Any) -> Distribution:
    name = f"tune.space.{key}"
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} must be a distribution such as {{loguniform: [1e-5, 1e-2]}}, got {value!r}; a value "
                         f"that is not searched is given as {key}=….")
    kinds = [kind for kind in FORMS if kind in value]
    unknown = set(value) - {*FORMS, "when", "step"}
    if len(kinds) != 1 or unknown:
        raise ValueError(f"{name} must have one of {', '.join(FORMS)}, and when and step besides, got "
                         f"{', '.join(map(str, value)) or 'nothing'}.")
    kind, given = kinds[0], value[kinds[0]]
    when = value.get("when") or {}
    if not isinstance(when, Mapping):
        raise ValueError(f"{name}.when must be {{other.key: value}}, got {when!r}.")
    conditions = tuple((str(other), tuple(values) if isinstance(values, list | tuple) else (values,))
                       for other, values in when.items())
    if kind == "choice":
        if not isinstance(given, list | tuple) or not given:
            raise ValueError(f"{name}: choice must be a list of values, got {given!r}.")
        return Distribution(key, "choice", choices=tuple(given), when=conditions)
    low, high = _bounds(name, kind, given)
    step = value.get("step")
    if step is not None and not (isinstance(step, int | float) and 0 < step <= high - low):
        raise ValueError(f"{name}.step must be above 0 and at most {high - low:g}, got {step!r}.")
    return Distribution(key, kind, low, high, step, when=conditions)  # type: ignore[arg-type]


def _bounds(name: str, kind: str, given: Any) -> tuple[float, float]:
    numbers = isinstance(given, list | tuple) and len(given) == 2 and all(
        isinstance(bound, int | float) and not isinstance(bound, bool) and math.isfinite(bound) for bound in given)
    if not numbers:
        raise ValueError(f"{name}: {kind} must be two numbers [low, high], got {given!r}.")
    low, high = given
    if low > high:
        raise ValueError(f"{name}: {kind} has its bounds reversed: write [{high:g}, {low:g}].")
    if low == high:
        raise ValueError(f"{name}: {kind} from {low:g} to {high:g} searches nothing: widen it, or take it out.")
    if kind.startswith("log") and low <= 0:
        raise ValueError(f"{name}: {kind} must begin above 0, got {low:g}.")
    if kind.endswith("int") and (low != round(low) or high != round(high)):
        raise ValueError(f"{name}: {kind} must have whole numbers as bounds, got [{low:g}, {high:g}].")
    return low, high


def _ordered(found: dict[str, Distribution]) -> list[Distribution]:
    """Those that others hang on first. ValueError for a condition on an unsearched key, or in a circle."""
    ordered: list[Distribution] = []
    waiting = dict(found)
    while waiting:
        ready = [one for one in waiting.values() if all(key not in waiting for key, _ in one.when)]
        if not ready:
            raise ValueError(f"tune.space: the conditions of {', '.join(waiting)} run in a circle.")
        for one in ready:
            for key, values in one.when:
                if key not in found:
                    raise ValueError(f"tune.space.{one.key} hangs on {key}, which is not searched: search it too.")
                impossible = [value for value in values if not found[key].holds(value)]
                if impossible:
                    raise ValueError(f"tune.space.{one.key}: {key} never takes the value {impossible[0]!r}.")
            ordered.append(waiting.pop(one.key))
    return ordered


def put(mapping: dict[str, Any], params: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as a mapping with these values in it. The codec stands in the family too."""
    changed: dict[str, Any] = json.loads(json.dumps(mapping))
    for key, value in params.items():
        for path in [key, *([f"family.{key}"] if key.startswith("codec.") else [])]:
            *folders, name = path.split(".")
            node = changed
            for folder in folders:
                node = node.setdefault(folder, {})
            node[name] = value
    return changed


def look_up(mapping: Mapping[str, Any], key: str) -> Any:
    """The value at a dotted key; KeyError where there is none."""
    node: Any = mapping
    for name in key.split("."):
        if not isinstance(node, Mapping):
            raise KeyError(key)
        node = node[name]
    return node


def default_params(space: Space, mapping: Mapping[str, Any]) -> Params:
    """The settings as they stand, in the space's keys."""
    params: Params = {}
    for distribution in space.applying(params):
        params[distribution.key] = look_up(mapping, distribution.key)
    return params


def candidates(space: Space, search: str, seed: int, count: int | None, points: int,
               default: Params | None) -> Sequence[Params]:
    """The trials of random and grid search, all known beforehand."""
    first = [default] if default is not None else []
    if search == "grid":
        every = first + [params for params in space.grid(points) if params not in first]
        return every if count is None else every[:count]
    assert count is not None
    return (first + [space.draw(seed, number) for number in range(len(first), count)])[:count]
