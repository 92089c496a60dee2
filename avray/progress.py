"""The one line that a person watches: of training, of encoding, of generating many."""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, TextIO


def shown(progress: Literal["auto", "on", "off"]) -> bool:
    """Whether ``logging.progress`` wants a line here; ``auto`` is quiet where nobody watches."""
    return progress == "on" or (progress == "auto" and sys.stderr.isatty())


def counter(progress: Literal["auto", "on", "off"], what: str, unit: str) -> Callable[[int, int], None] | None:
    """A callback ``(done, total)`` that shows a line for work that is counted; None where it is to be quiet."""
    if not shown(progress):
        return None
    lines: list[ProgressLine] = []

    def show(done: int, total: int) -> None:
        if not lines:
            lines.append(ProgressLine(total, unit=unit))
            lines[0].say(f"{what}: {total} {unit}")
        lines[0].update(Progress(done))
        if done == total:
            lines[0].close()

    return show


@dataclass(frozen=True)
class Progress:
    """What is known after ``step`` updates. ``rate`` is in units a second; ``waiting`` the share of time, 0
    to 1, spent waiting for data; None is left out of the line."""

    step: int
    loss: float | None = None
    validation_loss: float | None = None
    learning_rate: float | None = None
    rate: float | None = None
    waiting: float | None = None


class ProgressLine:
    """One line: step, losses, rate, waiting, time left.

    On a terminal it is refreshed in place, at most ten times a second. Anywhere else (a file, a CI log) it is
    a plain line at most every ``every_s`` seconds, the first and the last one always.
    """

    def __init__(self, total_steps: int, unit: str = "rows", every_s: float = 30.0,
                 stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.total_steps, self.unit, self.clock = total_steps, unit, clock
        self.stream = stream or sys.stderr
        self.terminal = self.stream.isatty()
        self.every_s = 0.1 if self.terminal else every_s
        self.began: tuple[float, int] | None = None
        self.shown_s = float("-inf")
        self.shown = self.line = ""

    def update(self, progress: Progress) -> None:
        now = self.clock()
        self.began = self.began or (now, progress.step)
        self.line = self._format(progress, now)
        if now - self.shown_s >= self.every_s or progress.step >= self.total_steps:
            self._show()
            self.shown_s = now

    def say(self, text: str) -> None:
        """A line of its own, above the progress line."""
        self.stream.write(("\r\x1b[2K" if self.terminal else "") + text + "\n")
        if self.terminal:
            self.shown = ""
            self._show()
        self.stream.flush()

    def close(self) -> None:
        self._show()
        if self.terminal and self.line:
            self.stream.write("\n")
            self.stream.flush()

    def _show(self) -> None:
        if self.line == self.shown:
            return
        if self.terminal:
            width = shutil.get_terminal_size().columns
            self.stream.write("\r\x1b[2K" + self.line[: width - 1])
        else:
            self.stream.write(self.line + "\n")
        self.stream.flush()
        self.shown = self.line

    def _format(self, progress: Progress, now: float) -> str:
        step, total = progress.step, self.total_steps
        parts = [f"step {step:,}/{total:,} ({100 * step / max(total, 1):.0f} %)"]
        if progress.loss is not None:
            parts.append(f"loss {progress.loss:.4g}")
        if progress.validation_loss is not None:
            parts.append(f"validation {progress.validation_loss:.4g}")
        if progress.learning_rate is not None:
            parts.append(f"lr {progress.learning_rate:.2g}")
        if progress.rate is not None:
            parts.append(f"{progress.rate:,.0f} {self.unit}/s" if progress.rate >= 10 else
                         f"{progress.rate:.2g} {self.unit}/s")
        if progress.waiting is not None:
            parts.append(f"waiting for data {100 * progress.waiting:.0f} %")
        assert self.began is not None
        began_s, first_step = self.began
        if step > first_step and step < total:
            parts.append(f"{duration((now - began_s) / (step - first_step) * (total - step))} left")
        return " · ".join(parts)


def duration(seconds: float) -> str:
    """``45 s``, ``12 min``, ``3 h 20 min``, ``2 d 4 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    hours = round(minutes / 60)
    return f"{hours // 24} d {hours % 24} h"


@contextlib.contextmanager
def no_weight_bars() -> Iterator[None]:
    """transformers shows no bar of its own while it loads weights."""
    import transformers

    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            transformers.logging.enable_progress_bar()
