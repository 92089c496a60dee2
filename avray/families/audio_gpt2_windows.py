"""Windows of sound and what is said in them, from timed utterances or words: nothing in a window is cut.

A window begins where something begins to be said and takes in all that ends within its length. The next one begins at
the first start in the last ``overlap_s`` of it, or after it, so that what is said at a window's edge is heard with what
comes before and with what comes after.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from avray.family import Row


@dataclass(frozen=True)
class Span:
    """Something said: an utterance, or a word of one. Times in the recording."""

    start_s: float
    stop_s: float
    text: str


@dataclass(frozen=True)
class Window:
    start_s: float
    stop_s: float
    text: str


def spans_of(row: Row) -> list[Span]:
    """A row's words where they have times, else the row as it is; all within the row."""
    start_s = row.get("start_s") or 0.0
    stop_s = start_s + row["duration_s"]
    words: Sequence[Any] = row.get("word_times") or [(start_s, stop_s, str(row["text"]).strip())]
    spans = [Span(max(begin, start_s), min(end, stop_s), text) for begin, end, text in words]
    return [span for span in spans if span.stop_s >= span.start_s]


def windows(spans: Sequence[Span], window_s: float, overlap_s: float) -> list[Window]:
    """What ``spans``, in order of start, are heard in. One longer than ``window_s`` is in none, and nothing is joined
    across it; every other is in at least one."""
    found: list[Window] = []
    first = 0
    while first < len(spans):
        start_s = spans[first].start_s
        stop_s, after = start_s, first
        while after < len(spans) and (longer := max(stop_s, spans[after].stop_s)) - start_s <= window_s + 1e-6:
            stop_s, after = longer, after + 1
        if after == first:
            first += 1
            continue
        found.append(Window(start_s, stop_s, " ".join(span.text for span in spans[first:after])))
        if after == len(spans):
            break
        # As far back as the overlap reaches, and no further than where the next span still fits in.
        again = after
        while (again - 1 > first and spans[again - 1].start_s >= stop_s - overlap_s
               and spans[after].stop_s - spans[again - 1].start_s <= window_s):
            again -= 1
        first = again
    return found
