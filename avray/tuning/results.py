"""What a sweep leaves: results.csv, best.yaml, the link ``best``, summary.json."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from avray.checkpoint import follow, newest
from avray.config import ObjectiveSettings, SweepSettings, to_mapping
from avray.store import Store
from avray.tuning.journal import Record
from avray.tuning.space import Space
from avray.tuning.trial import trial_folder, trial_settings


def value_of(record: Record, objective: ObjectiveSettings) -> float | None:
    """The objective's value; of a trial that has not finished only its loss so far is known."""
    value = record.loss if objective.metric == "validation_loss" else record.values.get(objective.metric)
    return value if value is not None and math.isfinite(value) else None


def ranked(records: Sequence[Record], objectives: Sequence[ObjectiveSettings]) -> list[Record]:
    """Finished trials first, the best by the first objective in front; then the stopped ones by their loss.

    A stopped trial lost to others at the same step, so a finished one stands before it whatever the figures."""
    first = objectives[0]
    sign = 1.0 if first.mode == "min" else -1.0

    def key(record: Record) -> tuple[int, float, int]:
        value = value_of(record, first)
        order = {"finished": 0, "stopped": 1, "running": 2, "waiting": 3, "failed": 4}[record.state]
        return order, math.inf if value is None else sign * value, record.number

    return sorted(records, key=key)


def pareto(records: Sequence[Record], objectives: Sequence[ObjectiveSettings]) -> list[Record]:
    """Finished trials that no other one beats in one objective without losing in another."""
    points: dict[int, list[float]] = {}
    for record in records:
        values = [value_of(record, objective) for objective in objectives]
        if record.state == "finished" and None not in values:
            points[record.number] = [value if objective.mode == "min" else -value  # type: ignore[operator, misc]
                                     for value, objective in zip(values, objectives, strict=True)]

    def beaten(point: list[float]) -> bool:
        return any(other != point and all(a <= b for a, b in zip(other, point, strict=True))
                   for other in points.values())

    front = [record for record in records if record.number in points and not beaten(points[record.number])]
    return sorted(front, key=lambda record: points[record.number])


def best_of(records: Sequence[Record], objectives: Sequence[ObjectiveSettings]) -> Record | None:
    """The first of those ranked that has a value. A stopped trial has none but its loss, and comes in only where no
    trial finished."""
    def counts(record: Record) -> bool:
        if record.state == "stopped":
            return record.loss is not None
        return record.state == "finished" and value_of(record, objectives[0]) is not None

    return next(filter(counts, ranked(records, objectives)), None)


def write_results(settings: SweepSettings, space: Space, records: Sequence[Record]) -> None:
    """results.csv, and pareto.csv where there are several objectives."""
    store, objectives = Store(settings.run.dir), settings.tune.objectives
    store.write("results.csv", table_of(ranked(records, objectives), settings, space).encode())
    if len(objectives) > 1:
        store.write("pareto.csv", table_of(pareto(records, objectives), settings, space).encode())


def table_of(records: Sequence[Record], settings: SweepSettings, space: Space) -> str:
    """One line a trial. Values are written in full, so that a row can be trained again."""
    names = list(dict.fromkeys([one.metric for one in settings.tune.objectives] + ["validation_loss"]))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["trial", "state", *names, "steps", "seconds", *space.keys, "error"])
    for record in records:
        values = [value_of(record, ObjectiveSettings(name)) for name in names]
        writer.writerow([record.number, record.state, *("" if value is None else value for value in values),
                         record.step, round(record.seconds, 1),
                         *(written(record.params.get(key, "")) for key in space.keys),
                         record.error])
    return text.getvalue()


def written(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list | dict) else value


def write_best(settings: SweepSettings, best: Record) -> Path:
    """best.yaml and the link ``best``; returns the checkpoint it leads to."""
    sweep_dir = Path(settings.run.dir)
    folder = trial_folder(sweep_dir, best.number)
    mapping = to_mapping(trial_settings(settings, best.params, folder))
    mapping["run"] = {"dir": f"runs/{mapping['family'].get('name', 'best')}-${{now:%Y%m%d-%H%M%S}}"}
    mapping["logging"] = to_mapping(settings.logging)
    head = (f"# Trial {best.number} of the sweep in {sweep_dir.name}. Train it: python pipelines/train.py "
            f"--config-path {sweep_dir} --config-name best\n")
    Store(str(sweep_dir)).write("best.yaml", (head + OmegaConf.to_yaml(OmegaConf.create(mapping))).encode())
    checkpoint = follow(folder, "best") or newest(folder)
    assert checkpoint is not None, "a trial with a result has saved the checkpoint of it"
    link = sweep_dir / f"best.{os.getpid()}"
    link.unlink(missing_ok=True)
    link.symlink_to(os.path.relpath(checkpoint, sweep_dir))
    os.replace(link, sweep_dir / "best")
    return checkpoint


def write_summary(settings: SweepSettings, records: Sequence[Record], best: Record, seconds: float,
                  concurrent: int) -> dict[str, Any]:
    """What the sweep came to, for scripts."""
    objectives = settings.tune.objectives

    def described(record: Record) -> dict[str, Any]:
        return {"trial": record.number, "params": record.params, "steps": record.step,
                "values": {one.metric: value_of(record, one) for one in objectives} | {"validation_loss": record.loss}}

    states = [record.state for record in records]
    default = next((one for one in records if one.number == 0 and settings.tune.include_default), None)
    summary: dict[str, Any] = {
        "family": settings.family.get("name"),
        "objectives": [to_mapping(one) for one in objectives],
        "best": described(best),
        "default": described(default) if default is not None else None,
        "pareto": [described(record) for record in pareto(records, objectives)] if len(objectives) > 1 else None,
        "trials": {state: states.count(state) for state in ("finished", "stopped", "failed")},
        "steps": sum(record.steps_trained for record in records),
        "seconds": round(seconds, 1),
        "trial_seconds": round(sum(record.seconds for record in records), 1),
        "concurrent": concurrent,
        "checkpoint": str(Path(settings.run.dir) / "best"),
    }
    Store(settings.run.dir).write("summary.json", json.dumps(summary, indent=2).encode())
    return summary
