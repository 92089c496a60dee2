"""Which rows are held out: whole groups where there are enough of them, spans of each recording where there are not.

A group's side is a keyed hash of its name, so it stays where it is when rows are added, and no song or speaker stands
on both sides. A handful of long recordings (one audiobook, four songs) cannot be split so: there, stretches spread over
each recording are held out, with guard gaps on both sides that belong to neither, because sound just before a span
says much about it and a network with memory carries it across.
"""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

import numpy as np

from avray.data.packed import Rows
from avray.family import Row

MIN_GROUPS = 5
"""Fewer groups than this are split by span, where their recordings are long enough."""
MAX_SPANS = 16
"""Held-out spans of one recording, at most; a longer recording gets longer spans rather than more gaps."""


@dataclass(frozen=True)
class SplitChoice:
    """How rows are split, and why in words."""

    by: Literal["group", "span"]
    reason: str


@dataclass(frozen=True)
class Piece:
    """A stretch of a recording in seconds, and the side it is on; ``guard`` belongs to none."""

    start_s: float
    stop_s: float
    split: Literal["train", "validation", "guard"]


def assign_splits(
    rows: Sequence[Row], *, validation_fraction: float = 0.1, seed: int = 0,
    by: Literal["auto", "group", "span"] = "auto", guard_s: float = 2.0, span_s: float = 4.0,
    holdout_groups: Sequence[str] = (), choice: SplitChoice | None = None,
) -> Rows:
    """Rows with a ``split`` each: train, validation or test.

    A row that has a split keeps it, and gives it to the rows of its group that have none. ``holdout_groups`` (names, or
    patterns with ``*``) go to ``test`` as a whole, whatever their rows say. The others are drawn by group or, with one
    row for each piece, cut by span (see ``choose_split``); ``span_s`` is the shortest span held out (give it the length
    of a whole example), and ``validation_fraction`` the share of groups, or of each recording's time. By group, both
    sides have at least one if there are two: where the draw left a side empty, the group nearest to it moves there.
    ``choice`` is what ``choose_split`` said of these rows, where it has been asked.

    Raises:
        ValueError: a held-out group that no row has, or ``by="span"`` with nothing long enough to cut.
    """
    sides = _given_sides(rows, holdout_groups)
    choice = choice or choose_split(rows, validation_fraction=validation_fraction, by=by, guard_s=guard_s,
                                    span_s=span_s, holdout_groups=holdout_groups)
    pieces: dict[str, list[Piece]] = {}
    draw = None
    if choice.by == "span":
        pieces = {source: cut(low, high, validation_fraction=validation_fraction, guard_s=guard_s, span_s=span_s,
                              key=f"{seed}:{source}") for source, (low, high) in _extents(_free(rows, sides)).items()}
    else:
        taken = {row.get("split") or sides.get(row["group"], "") for row in rows}
        draw = Draw.of((row["group"] for row in _free(rows, sides)), validation_fraction, seed, taken)
    split_rows = Rows()
    for row in rows:
        group, free = row["group"], _is_free(row, sides)
        if free and _can_be_cut(row) and _source(row) in pieces:
            for part in _parts(row, pieces[_source(row)]):
                split_rows.append(part)
            continue
        given = None if _matches(group, holdout_groups) else row.get("split")
        drawn = draw.side(group) if draw else "train"
        split_rows.append({**row, "split": given or sides.get(group) or drawn})
    return split_rows


def choose_split(
    rows: Sequence[Row], *, validation_fraction: float = 0.1, by: Literal["auto", "group", "span"] = "auto",
    guard_s: float = 2.0, span_s: float = 4.0, holdout_groups: Sequence[str] = (),
) -> SplitChoice:
    """How ``assign_splits`` splits these rows. ``auto`` is by group, unless there are fewer than five, one of them with
    a recording long enough to cut, and none with a text that has no times (it says what a whole recording holds, not
    what a piece does).
    """
    sides = _given_sides(rows, holdout_groups)
    if by == "group":
        return SplitChoice("group", "asked for")
    groups = array("q", (hash(row["group"]) for row in _free(rows, sides)))
    num_groups = len(np.unique(np.asarray(groups)))
    if by == "auto" and not groups:
        return SplitChoice("group", "given by the data")
    if by == "auto" and num_groups >= MIN_GROUPS:
        return SplitChoice("group", f"{num_groups} groups")
    seconds = [high - low for low, high in _extents(_free(rows, sides)).values()]
    can_cut = any(_num_spans(length, validation_fraction, guard_s, span_s) for length in seconds)
    if by == "span":
        if groups and validation_fraction and not can_cut:
            raise ValueError(f"No recording is long enough to hold out {span_s:g} s with guards of {guard_s:g} s on "
                             "both sides; set data.split_by=group or a smaller data.guard_s.")
        return SplitChoice("span", "asked for")
    if not can_cut:
        return SplitChoice("group", f"{num_groups} groups, no recording long enough to cut")
    if any(row.get("text") and "turn" not in row for row in _free(rows, sides)):
        return SplitChoice("group", f"{num_groups} groups, whose recordings carry texts and so stay whole")
    return SplitChoice("span", f"only {num_groups} groups, and recordings of up to {max(seconds):.0f} s")


def _is_free(row: Row, sides: Mapping[str, str]) -> bool:
    return "split" not in row and row["group"] not in sides


def _free(rows: Iterable[Row], sides: Mapping[str, str]) -> Iterator[Row]:
    """Rows whose side nobody gave."""
    return (row for row in rows if _is_free(row, sides))


def _given_sides(rows: Sequence[Row], holdout_groups: Sequence[str]) -> dict[str, str]:
    """Groups whose side is given: by the user, or by a row of theirs."""
    groups: dict[str, str] = {}
    for row in rows:
        if "split" in row:
            groups.setdefault(row["group"], row["split"])
    names = {row["group"] for row in rows} if holdout_groups else set()
    for pattern in holdout_groups:
        held = {name for name in names if _matches(name, [pattern])}
        if not held:
            raise ValueError(f"data.holdout_groups names {pattern!r}, which no row has; there are "
                             f"{', '.join(sorted(names)[:10])}{' …' if len(names) > 10 else ''}.")
        groups |= dict.fromkeys(held, "test")
    return groups


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(name == pattern or fnmatchcase(name, pattern) for pattern in patterns)


def _unit(key: str) -> float:
    """A number in [0, 1) that is a function of the key."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=7).digest(), "big") / 2**56


@dataclass(frozen=True)
class Draw:
    """A side for each group, by its name alone but for the one that had to be moved; so no list of groups is held."""

    fraction: float
    seed: int
    moved: Mapping[str, str]

    @classmethod
    def of(cls, names: Iterable[str], fraction: float, seed: int, taken: set[str]) -> Draw:
        """``taken`` are the sides that other rows are on already."""
        lowest, highest = (math.inf, ""), (-math.inf, "")
        for name in names:
            draw = _unit(f"{seed}:{name}"), name
            lowest, highest = min(lowest, draw), max(highest, draw)
        moved: dict[str, str] = {}
        if math.isfinite(lowest[0]) and fraction:
            several = lowest != highest
            sides = taken | {"validation" if draw < fraction else "train" for draw, _ in (lowest, highest)}
            if "validation" not in sides and (several or "train" in taken):
                moved[lowest[1]] = "validation"
            elif "train" not in sides and (several or "validation" in taken):
                moved[highest[1]] = "train"
        return cls(fraction, seed, moved)

    def side(self, name: str) -> str:
        return self.moved.get(name) or ("validation" if _unit(f"{self.seed}:{name}") < self.fraction else "train")


# Spans -----------------------------------------------------------------------------------------------------------

def _can_be_cut(row: Row) -> bool:
    return "audio" in row and "target_audio" not in row and "video" not in row


def _source(row: Row) -> str:
    """Equal bytes are one recording, whatever they are called."""
    return str(row.get("audio_hash") or row["audio"])


def _extents(rows: Iterable[Row]) -> dict[str, tuple[float, float]]:
    """From where to where each recording is used. Its rows may overlap, so it is cut once and they are cut by that."""
    extents: dict[str, tuple[float, float]] = {}
    for row in filter(_can_be_cut, rows):
        low, high = extents.get(_source(row), (math.inf, -math.inf))
        extents[_source(row)] = min(low, row["start_s"]), max(high, row["start_s"] + row["duration_s"])
    return extents


def _num_spans(seconds: float, fraction: float, guard_s: float, span_s: float) -> int:
    """How many spans to hold out: as many as the share has room for. None where too little would be left to train on:
    the length of a span beside each, or twice what is held out where one span is more than the share already."""
    most = max(1, min(MAX_SPANS, math.floor(fraction * seconds / span_s))) if fraction else 0
    for count in range(most, 0, -1):
        held_s = max(span_s * count, fraction * seconds)
        left_s = seconds - held_s - 2 * guard_s * count
        if left_s >= (2 * held_s if held_s > fraction * seconds else span_s * count):
            return count
    return 0


def cut(low_s: float, high_s: float, *, validation_fraction: float, guard_s: float, span_s: float,
        key: str) -> list[Piece]:
    """Lay held-out spans and their guards over a recording, spread evenly, each moved a little by the key.

    The pieces join from ``low_s`` to ``high_s`` without a gap. A recording too short to be cut is one train piece.
    """
    seconds = high_s - low_s
    count = _num_spans(seconds, validation_fraction, guard_s, span_s)
    pieces: list[Piece] = []
    position = low_s
    for index in range(count):
        length = max(span_s, validation_fraction * seconds / count)
        cell_s = seconds / count
        room_s = cell_s - length - 2 * guard_s
        # In the middle half of its cell, so that no stretch left to train on is a sliver. Whole milliseconds.
        start = low_s + index * cell_s + guard_s + room_s * (0.25 + 0.5 * _unit(f"{key}:{index}"))
        start, stop = math.floor(start * 1000) / 1000, math.ceil((start + length) * 1000) / 1000
        pieces += [Piece(position, start - guard_s, "train"), Piece(start - guard_s, start, "guard"),
                   Piece(start, stop, "validation"), Piece(stop, stop + guard_s, "guard")]
        position = stop + guard_s
    return [piece for piece in (*pieces, Piece(position, high_s, "train")) if piece.stop_s > piece.start_s]


def _parts(row: Row, pieces: Sequence[Piece]) -> list[Row]:
    """The parts of a row that lie in pieces, each a row of its own; what lies in a guard is dropped, and so is an
    utterance on an edge, whose text says more than a part of it does. Turns end where pieces do."""
    parts: list[Row] = []
    row_stop_s = row["start_s"] + row["duration_s"]
    for piece in pieces:
        start_s, stop_s = max(row["start_s"], piece.start_s), min(row_stop_s, piece.stop_s)
        if piece.split == "guard" or stop_s <= start_s:
            continue
        if (start_s, stop_s) == (row["start_s"], row_stop_s):
            turn = {"turn": f"{row['turn']}@{piece.start_s:.3f}"} if "turn" in row else {}
            return [{**row, **turn, "split": piece.split}]
        if "turn" in row:
            continue
        parts.append({**row, "id": f"{row['id']}@{start_s:.3f}-{stop_s:.3f}", "start_s": start_s,
                      "duration_s": stop_s - start_s, "split": piece.split})
    return parts
