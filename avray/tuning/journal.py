"""What a sweep knows, as lines of JSON: the one thing that a resume reads.

Notable: Ray Tune's own snapshots are pickles, are written every so often and hold no scheduler's rungs. Here each event
is one line, written before anything follows from it, so a driver killed at any moment loses nothing but a half line,
and finished trials, the decisions taken and the values drawn are all there again.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from avray.tuning.space import Params

State = Literal["waiting", "running", "finished", "stopped", "failed"]
ENDED = ("finished", "stopped", "failed")


@dataclass
class Record:
    """One trial. ``results`` are its validations, (step, loss)."""

    number: int
    params: Params
    state: State = "waiting"
    results: list[tuple[int, float]] = field(default_factory=list)
    values: dict[str, float] = field(default_factory=dict)
    error: str = ""
    began_s: float = 0.0
    seconds: float = 0.0
    steps_trained: int = 0
    """Optimiser steps spent on it, those before an exploit included."""
    donors: list[int] = field(default_factory=list)

    @property
    def step(self) -> int:
        return self.results[-1][0] if self.results else 0

    @property
    def loss(self) -> float | None:
        """The best validation loss so far, that of the checkpoint ``best``."""
        finite = [loss for _, loss in self.results if math.isfinite(loss)]
        return self.values.get("validation_loss", min(finite, default=None))

    @property
    def ended(self) -> bool:
        return self.state in ENDED


class Journal:
    """Reads what there is, then appends. ``changed`` is called after each event."""

    def __init__(self, path: Path, changed: Callable[[Journal], None] = lambda journal: None) -> None:
        self.path, self.changed = path, changed
        self.records: dict[int, Record] = {}
        self.events: list[dict[str, Any]] = []
        if path.exists():
            data = path.read_bytes()
            whole = data[: data.rfind(b"\n") + 1]
            if len(whole) < len(data):
                os.truncate(path, len(whole))  # the driver was killed in the middle of a line
            for line in whole.decode().splitlines():
                self._apply(json.loads(line))

    def __getstate__(self) -> dict[str, Any]:
        """Ray Tune pickles and copies what it is given, and never reads it again: there is one journal, this one."""
        return {**vars(self), "changed": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> Journal:
        return self

    def write(self, event: str, number: int, **content: Any) -> Record:
        """Append one event and take it in."""
        entry = {"event": event, "number": number, "at_s": round(time.time(), 3), **content}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        self._apply(entry)
        self.changed(self)
        return self.records[number]

    def _apply(self, entry: dict[str, Any]) -> None:
        self.events.append(entry)
        number = entry["number"]
        if entry["event"] == "start":
            self.records.setdefault(number, Record(number, entry["params"])).state = "running"
            self.records[number].began_s = entry["at_s"]
            return
        record = self.records[number]
        if entry["event"] == "result":
            record.steps_trained += max(0, entry["step"] - record.step)
            record.results.append((entry["step"], entry["loss"] if entry["loss"] is not None else math.nan))
            if entry["decision"] == "STOP":
                self._end(record, "stopped", entry)
        elif entry["event"] == "exploit":
            record.params = entry["params"]
            record.donors.append(entry["donor"])
            record.results.append((entry["step"], entry["loss"]))
        elif entry["event"] == "end":
            record.values = entry.get("values", {})
            record.error = entry.get("error", "")
            self._end(record, entry["state"], entry)

    @staticmethod
    def _end(record: Record, state: State, entry: dict[str, Any]) -> None:
        record.state = state
        record.seconds = entry.get("seconds") or max(0.0, entry["at_s"] - record.began_s)

    @property
    def trials(self) -> list[Record]:
        return [self.records[number] for number in sorted(self.records)]

    @property
    def unfinished(self) -> list[Record]:
        return [record for record in self.trials if not record.ended]
