"""``pipelines/evaluate.py``: a checkpoint's loss beside its baselines, what it generates beside the targets, and one
page that shows both. The loss is over every row of the split; what is generated is over a fixed, even choice of it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from avray.checkpoint import Checkpoint
from avray.config import DataSettings, EvaluateSettings, from_mapping
from avray.data.cache import Cache
from avray.data.cluster import Needs, start_ray
from avray.data.dataset import open_dataset
from avray.data.plan import Plan, Shards
from avray.data.rows import gather
from avray.data.shared import check_cache, shared_paths
from avray.data.stream import Pool, prepare
from avray.devices import device_of
from avray.engine import Generator
from avray.errors import DataError
from avray.evaluation.listeners import given_metrics
from avray.evaluation.report import ReportExample, write_report
from avray.family import ByTask, Family, Judged, Merging, Metric, Options
from avray.mirror import mirrored
from avray.registry import saved_family
from avray.store import Store, is_url
from avray.train.loggers import read_metrics
from avray.train.samples import Answer, answer, questions
from avray.train.validation import checkpoint_loss


def evaluate(settings: EvaluateSettings) -> dict[str, Any]:
    """Write the report into ``run.dir`` and return what its ``summary.json`` holds."""
    with mirrored(settings.run.dir) as folder:
        return evaluate_in(folder, settings)


def evaluate_in(run_dir: Path, settings: EvaluateSettings) -> dict[str, Any]:
    """``run_dir`` is a local folder."""
    assert settings.checkpoint is not None
    began = time.perf_counter()
    checkpoint = Checkpoint.open(settings.checkpoint)
    family = saved_family(checkpoint.family, settings.family.get("_target_"))
    data = data_of(settings, checkpoint)
    device = device_of(settings.device)
    dataset = open_dataset(family, data, run_dir / "rejects.jsonl")
    plan = choose(dataset.plans, settings.split)
    columns, cache = family.columns(checkpoint.fitted), Cache(data.cache)
    if cache.missing(plan, columns):
        check_cache(replace(data, mode="stream"))
        start_ray(Needs(1, data.embed_workers, data.embed_num_cpus, data.embed_num_gpus), settings.cluster,
                  data.no_progress_timeout_s, shared=shared_paths(data, settings.run.dir))
        pool = Pool(data.embed_workers, data.embed_num_cpus, data.embed_num_gpus)
        prepare(plan, columns, cache, pool, dataset.limits)
    loss = checkpoint_loss(checkpoint, family, plan, cache, device, settings.batch_size, settings.max_rows)
    foreseen = held_out_figures(checkpoint, family, plan, cache, device, settings.batch_size, settings.max_rows)
    answers = generate_samples(settings, family, plan, device)
    given = given_metrics(settings.recogniser, settings.clap, device)
    measured = measure(family, answers, given)
    by_task = measure_by_task(family, answers, given)
    if by_task:
        print(task_table(by_task))
    opened = settings.checkpoint if is_url(settings.checkpoint) else str(checkpoint.path)
    summary = {
        "family": checkpoint.family.get("name"), "checkpoint": opened, "split": settings.split,
        "validation_loss": loss.loss, "terms": loss.terms, "baselines": loss.baselines,
        "metrics": foreseen | measured.values, **({"tasks": by_task} if by_task else {}),
        "rows": {**dataset.counts(), "examples": plan.num_examples, "generated": len(answers)},
        "seconds": round(time.perf_counter() - began, 1), "device": device,
    }
    Store(str(run_dir)).write("summary.json", json.dumps(summary, indent=2).encode())
    examples = [ReportExample(item.id, item.prompt, item.target, item.generated.media) for item in answers]
    metrics_csv = checkpoint.path.parent.parent / "metrics.csv"
    curves = read_metrics(metrics_csv) if metrics_csv.exists() else None
    write_report(run_dir, summary, examples, details=measured.details, curves=curves,
                 title=f"{summary['family']} at step {checkpoint.step}")
    return summary


def data_of(settings: EvaluateSettings, checkpoint: Checkpoint) -> DataSettings:
    """The data set asked for, or without ``data.path`` the one the checkpoint was trained on, split as it was then."""
    if settings.data.path is not None or "data" not in checkpoint.settings:
        return settings.data
    recorded = from_mapping(DataSettings, checkpoint.settings["data"], "data")
    return replace(recorded, cache=settings.data.cache)


def choose(plans: Mapping[str, Plan], split: str) -> Plan:
    """The split's plan; ``all`` is every split together."""
    if split == "all":
        return Plan("all", Shards.joined([plans[name].shards for name in sorted(plans)]))
    if split not in plans:
        raise DataError(f"The data set has no {split} rows; it has {', '.join(sorted(plans))}: choose one by split=.")
    return plans[split]


def generate_samples(settings: EvaluateSettings, family: Family, plan: Plan, device: str) -> list[Answer]:
    asked = questions(family, plan, settings.num_samples)
    if not asked:
        return []
    assert settings.checkpoint is not None
    generator = Generator.open(settings.checkpoint, device=device, slots=min(settings.slots, len(asked)))
    return answer(generator, asked, Options(), settings.seed)


@torch.no_grad()
def held_out_figures(checkpoint: Checkpoint, family: Family, plan: Plan, cache: Cache, device: str, batch_size: int,
                     max_rows: int | None = None) -> dict[str, float]:
    """What a family that judges itself (``family.Judged``) says over the rows that the loss is over."""
    if not isinstance(family, Judged):
        return {}
    fitted = checkpoint.fitted
    model = family.build(fitted)
    checkpoint.load_into(model)
    model = model.to(device).eval()
    order = plan.order(min(batch_size, plan.num_examples), 0, batch_size * 4, shuffle=False)
    last = order.steps_per_epoch if max_rows is None else min(order.steps_per_epoch, -(-max_rows // order.batch_size))
    columns, found = family.columns(fitted), dict[str, Merging]()
    for step in range(last):
        batch = family.collate(gather(plan, cache, columns, order.step(0, step)), fitted).to(device)
        for name, figure in family.figures(model, batch, fitted).items():
            if name in found:
                found[name].merge(figure)
            else:
                found[name] = figure
    return {name: figure.value() for name, figure in found.items()}


@dataclass(frozen=True)
class Measured:
    """Figures by name, and what each must be quoted with."""

    values: dict[str, float]
    details: dict[str, Mapping[str, Any]]


def measure(family: Family, answers: Sequence[Answer],
            given: Mapping[str, Callable[[], Metric]] | None = None) -> Measured:
    """The family's own metrics, and those given, over what was generated."""
    if not answers:
        return Measured({}, {})
    metrics = _fed({**family.metrics(), **(given or {})}, answers)
    return Measured({name: metric.value() for name, metric in metrics.items()},
                    {name: metric.details() for name, metric in metrics.items() if hasattr(metric, "details")})


def measure_by_task(family: Family, answers: Sequence[Answer],
                    given: Mapping[str, Callable[[], Metric]] | None = None) -> dict[str, dict[str, float]]:
    """Task -> figure -> value, with the number of examples; nothing for a family of one kind."""
    if not isinstance(family, ByTask):
        return {}
    found: dict[str, dict[str, float]] = {}
    for task in sorted({str(item.fields["task"]) for item in answers if item.fields.get("task")}):
        own = [item for item in answers if item.fields.get("task") == task]
        builders = {**family.task_metrics(task), **(given or {})}
        figures = {name: metric.value() for name, metric in _fed(builders, own).items()}
        found[task] = {"examples": float(len(own)), **figures}
    return found


def _fed(builders: Mapping[str, Callable[[], Metric]], answers: Sequence[Answer]) -> dict[str, Metric]:
    metrics = {name: build() for name, build in builders.items()}
    for item in answers:
        for metric in metrics.values():
            metric.update(item.generated.media, item.target, {**item.fields, "id": item.id})
    return metrics


def task_table(tasks: Mapping[str, Mapping[str, float]]) -> str:
    """A line a figure and a column a task; what a task has not is left blank."""
    names = list(dict.fromkeys(name for figures in tasks.values() for name in figures))
    rows = [["", *tasks], *([name, *(f"{tasks[task][name]:.4g}" if name in tasks[task] else "" for task in tasks)]
                            for name in names)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(
        row[1:], widths[1:], strict=True))]).rstrip() for row in rows)
