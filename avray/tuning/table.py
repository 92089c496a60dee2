"""The table that a person watches: redrawn in place on a terminal, a line for each ended trial anywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from avray.config import SweepSettings
from avray.progress import duration, shown
from avray.tuning.journal import Journal, Record
from avray.tuning.results import ranked, value_of
from avray.tuning.space import Space

MAX_ROWS = 20


class Watching:
    """``with Watching(...) as watching: … watching.show(journal)``; the table stays when the block ends."""

    def __init__(self, settings: SweepSettings, space: Space, count: int) -> None:
        self.settings, self.space, self.count = settings, space, count
        self.wanted = settings.logging.progress != "off"
        self.console = Console(stderr=True)
        self.live = Live(console=self.console, auto_refresh=False) if (
            shown(settings.logging.progress) and sys.stderr.isatty()) else None
        self.said: set[int] = set()
        self.began_s = time.monotonic()

    def __enter__(self) -> Watching:
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.live is not None:
            self.live.stop()

    def show(self, journal: Journal) -> None:
        if self.live is not None:
            self.live.update(self.table(journal.trials), refresh=True)
        elif self.wanted:
            for record in journal.trials:
                if record.ended and record.number not in self.said:
                    self.said.add(record.number)
                    print(self.line(record, sum(one.ended for one in journal.trials)), file=sys.stderr, flush=True)

    def line(self, record: Record, ended: int) -> str:
        parts = [f"{ended}/{self.count} trial {record.number} {record.state} at step {record.step}"]
        parts += [f"{name} {value}" for name, value in self.figures(record).items() if value]
        parts += [f"{short(key)}={brief(value)}" for key, value in record.params.items()]
        return " · ".join(parts + ([record.error] if record.error else []))

    def figures(self, record: Record) -> dict[str, str]:
        values = {one.metric: value_of(record, one) for one in self.settings.tune.objectives}
        if "validation_loss" not in values:
            values["validation_loss"] = record.loss
        return {name: "" if value is None else brief(value) for name, value in values.items()}

    def table(self, records: Sequence[Record]) -> Table:
        ended = [record for record in records if record.ended]
        table = Table(title=f"{len(ended)} of {self.count} trials ended in {duration(time.monotonic() - self.began_s)}")
        rows = ranked(records, self.settings.tune.objectives)
        names = list(self.figures(rows[0])) if rows else []
        for name in ["trial", "state", *names, "step", *map(short, self.space.keys)]:
            table.add_column(name, justify="left" if name == "state" else "right")
        for record in rows[:MAX_ROWS]:
            table.add_row(str(record.number), record.state, *self.figures(record).values(), str(record.step),
                          *(brief(record.params.get(key, "")) for key in self.space.keys))
        if len(rows) > MAX_ROWS:
            table.caption = f"and {len(rows) - MAX_ROWS} more in results.csv"
        return table


def short(key: str) -> str:
    return key.rpartition(".")[2]


def brief(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
