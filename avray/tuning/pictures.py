"""Three pictures of a sweep: loss by trial, parallel coordinates, importance; a fourth for two objectives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from matplotlib.figure import Figure

from avray.config import SweepSettings
from avray.tuning.journal import Record
from avray.tuning.results import pareto, value_of
from avray.tuning.search import study_of
from avray.tuning.space import Distribution, Space

MIN_TRIALS = 4
"""Finished trials below which an importance would be noise."""


def draw(settings: SweepSettings, space: Space, records: Sequence[Record]) -> list[str]:
    """Write them into the sweep's folder; returns a sentence for each that could not be drawn."""
    folder = Path(settings.run.dir)
    save(losses(records), folder / "loss.png")
    save(parallel(settings, space, records), folder / "parallel.png")
    if len(settings.tune.objectives) > 1:
        save(front(settings, records), folder / "pareto.png")
    weights = importance(settings, space, records)
    if not weights:
        return [f"importance.png needs {MIN_TRIALS} trials that ended with different values; it was left out."]
    save(bars(weights), folder / "importance.png")
    return []


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=120, bbox_inches="tight")


def losses(records: Sequence[Record]) -> Figure:
    """Each trial's validation loss over its steps, on the left; its best one by trial, on the right."""
    figure = Figure(figsize=(11, 4))
    curves, points = figure.subplots(1, 2)
    colours = {"finished": "tab:blue", "stopped": "tab:orange", "failed": "tab:red"}
    for record in records:
        finite = [(step, loss) for step, loss in record.results if math.isfinite(loss)]
        colour = colours.get(record.state, "grey")
        if finite:
            curves.plot(*zip(*finite, strict=True), marker=".", color=colour, alpha=0.7)
        if record.loss is not None:
            points.scatter(record.number, record.loss, color=colour)
    for state, colour in colours.items():
        points.scatter([], [], color=colour, label=state)
    points.legend()
    curves.set(xlabel="step", ylabel="validation loss", title="Loss by step")
    points.set(xlabel="trial", ylabel="best validation loss", title="Loss by trial")
    return figure


def parallel(settings: SweepSettings, space: Space, records: Sequence[Record]) -> Figure:
    """One line a trial through the values it took, coloured by the first objective."""
    objective = settings.tune.objectives[0]
    rows = [(record, value) for record in records if (value := value_of(record, objective)) is not None]
    figure = Figure(figsize=(2.2 * (len(space.keys) + 1), 4))
    axes = figure.subplots()
    shares = [[share(distribution, record.params) for distribution in space.distributions] for record, _ in rows]
    values = np.array([value for _, value in rows])
    spread = (values - values.min()) / max(float(np.ptp(values)), 1e-12) if len(values) else values
    from matplotlib import colormaps

    for line, height in zip(shares, spread.tolist(), strict=True):
        axes.plot(range(len(line) + 1), [*line, height], color=colormaps["viridis"](height), alpha=0.7)
    names = [distribution.key.rpartition(".")[2] for distribution in space.distributions]
    for index, distribution in enumerate(space.distributions):
        low, high = (distribution.choices[0], distribution.choices[-1]) if distribution.choices else (
            distribution.low, distribution.high)
        axes.text(index, -0.06, str(low), ha="center", va="top", fontsize=7)
        axes.text(index, 1.03, str(high), ha="center", va="bottom", fontsize=7)
    if len(values):
        axes.text(len(names), -0.06, f"{values.min():.4g}", ha="center", va="top", fontsize=7)
        axes.text(len(names), 1.03, f"{values.max():.4g}", ha="center", va="bottom", fontsize=7)
    axes.set_xticks(range(len(names) + 1), [*names, objective.metric])
    axes.tick_params(axis="x", pad=14)
    axes.set_yticks([])
    axes.set_ylim(-0.02, 1.02)
    axes.grid(axis="x")
    return figure


def share(distribution: Distribution, params: dict[str, Any]) -> float:
    """Where a value stands in its range, 0 … 1; NaN where the key did not apply, which breaks the line."""
    value = params.get(distribution.key)
    if value is None or (distribution.choices and value not in distribution.choices):
        return math.nan
    if distribution.choices:
        return distribution.choices.index(value) / max(1, len(distribution.choices) - 1)
    if not isinstance(value, int | float):
        return math.nan
    if distribution.is_log:
        if value <= 0:
            return math.nan
        return math.log(value / distribution.low) / math.log(distribution.high / distribution.low)
    return (value - distribution.low) / (distribution.high - distribution.low)


def front(settings: SweepSettings, records: Sequence[Record]) -> Figure:
    """The first two objectives, those on the Pareto front marked."""
    one, two = settings.tune.objectives[:2]
    figure = Figure(figsize=(5, 4))
    axes = figure.subplots()
    best = {record.number for record in pareto(records, settings.tune.objectives)}
    for record in records:
        x, y = value_of(record, one), value_of(record, two)
        if record.state == "finished" and x is not None and y is not None:
            axes.scatter(x, y, color="tab:red" if record.number in best else "tab:grey")
            axes.annotate(str(record.number), (x, y))
    axes.set(xlabel=f"{one.metric} ({one.mode})", ylabel=f"{two.metric} ({two.mode})", title="Pareto front in red")
    return figure


def importance(settings: SweepSettings, space: Space, records: Sequence[Record]) -> dict[str, float]:
    """Each key's share of what separates the better trials from the worse (PED-ANOVA, Watanabe et al. 2023).

    Over trials that ended; a stopped one counts with the loss it had. Empty where there are too few.
    """
    objective = settings.tune.objectives[0]
    told = [record for record in records if record.ended and value_of(record, objective) is not None]
    if len(told) < MIN_TRIALS:
        return {}
    single = type(settings.tune)(objectives=(objective,))
    study = optuna.create_study(direction="minimize")
    for record, trial in zip(told, study_of(told, space, single).trials, strict=True):
        value = value_of(record, objective)
        assert value is not None
        study.add_trial(optuna.trial.create_trial(params=trial.params, distributions=trial.distributions,
                                                  value=value if objective.mode == "min" else -value))
    evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    try:
        found = optuna.importance.get_param_importances(study, evaluator=evaluator)
    except (ValueError, RuntimeError, IndexError):  # all alike in a value or in the loss
        return {}
    return {key: float(weight) for key, weight in found.items() if math.isfinite(weight)}


def bars(weights: dict[str, float]) -> Figure:
    figure = Figure(figsize=(6, 0.5 * len(weights) + 1))
    axes = figure.subplots()
    keys = sorted(weights, key=lambda key: weights[key])
    axes.barh(keys, [weights[key] for key in keys])
    axes.set(xlabel="importance", title="What the loss hangs on")
    return figure
