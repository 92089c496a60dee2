"""Everything between a data set and the first step: plans, what is learnt from the data, and what must be embedded.

``pipelines/prepare.py`` does it for every row; a training run does it for the sample that ``fit`` sees and for the
validation rows, and streams the rest. Both fit on the same rows, so that both name the same columns.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from avray.config import DataSettings, PrepareSettings
from avray.data.cache import Cache
from avray.data.check import describe, render
from avray.data.cluster import Needs, start_ray
from avray.data.dataset import Dataset, open_dataset, read_rows
from avray.data.embeddings import write_chunks, write_embeddings
from avray.data.plan import Plan, Shards
from avray.data.rows import example_row
from avray.data.shared import shared_paths
from avray.data.stream import Pool, prepare
from avray.errors import DataError
from avray.family import Column, Family, Fitted, Row
from avray.mirror import mirrored
from avray.progress import counter
from avray.store import Store


@dataclass(frozen=True)
class Prepared:
    """A data set ready to train on. ``test`` is there where groups are held out altogether."""

    dataset: Dataset
    train: Plan
    validation: Plan
    test: Plan | None
    fitted: Fitted
    columns: list[Column]
    computed: int
    """Shards that had to be embedded for it."""


def prepare_training(family: Family, data: DataSettings, run_dir: Path, progress: str = "off") -> Prepared:
    """Plans, fitted state, and the validation and test rows embedded.

    DataError where a split is empty, too many rows are bad, or ``data.mode=prepared`` and the cache lacks rows.
    """
    dataset = open_dataset(family, data, run_dir / "rejects.jsonl")
    for split in ("train", "validation"):
        if split not in dataset.plans:
            raise DataError(f"The data set has no {split} rows: give more recordings, or another "
                            "data.validation_fraction.")
    train, held_out = dataset.plans["train"], [plan for name, plan in dataset.plans.items() if name != "train"]
    cache = Cache(data.cache)
    before = family.columns(None)
    sample = train.subset(sample_shards(train, data.fit_rows))
    # Where fitting does not change the columns, one pass of the actors serves both.
    together = [sample, *held_out] if family_needs_no_fit(before, family) else [sample]
    computed = embed(together, before, cache, data, dataset, progress, "the first rows")
    fitted = family.fit(iter(sample_rows(sample, cache, before, data.fit_rows)))
    columns = family.columns(fitted)
    computed += embed(held_out, columns, cache, data, dataset, progress, "the held-out rows")
    if data.mode == "prepared":
        require(cache, [train], columns)
    return Prepared(dataset, train, dataset.plans["validation"], dataset.plans.get("test"), fitted, columns,
                    computed)


def prepare_all(settings: PrepareSettings, family: Family) -> str:
    """Every row of every split into the cache; returns the line that says what was done."""
    with mirrored(settings.run.dir) as folder:
        return prepare_in(folder, settings, family)


def prepare_in(run_dir: Path, settings: PrepareSettings, family: Family) -> str:
    data = settings.data
    Store(data.cache).check_writable("data.cache")
    start_ray(embedding_needs(data), settings.cluster, data.no_progress_timeout_s,
              settings.logging.level == "debug", shared_paths(data, settings.run.dir))
    prepared = prepare_training(family, replace(data, mode="stream"), run_dir, settings.logging.progress)
    cache = Cache(data.cache)
    plans = list(prepared.dataset.plans.values())
    computed = prepared.computed + embed(plans, prepared.columns, cache, replace(data, mode="stream"),
                                         prepared.dataset, settings.logging.progress, "all rows")
    lost = {name: reason for plan in plans for name, reason in cache.rejects(plan, prepared.columns).items()}
    total = sum(plan.num_examples for plan in plans)
    summary = {"rows": prepared.dataset.counts(), "examples": total, "examples_rejected": len(lost),
               "shards": sum(len(plan.shards) for plan in plans), "shards_computed": computed,
               "columns": [column.id() for column in prepared.columns], "cache": data.cache}
    Store(str(run_dir)).write("summary.json", json.dumps(summary, indent=2).encode())
    write_lost(lost, run_dir / "rejects.jsonl")
    written = write_copies(settings, plans, cache, prepared.columns)
    enforce(len(lost), total, data.max_reject_fraction, run_dir / "rejects.jsonl")
    return (f"{total} examples in {summary['shards']} shards are in {data.cache} ({computed} computed now, "
            f"{len(lost)} rejected){written} · {settings.run.dir}/summary.json")


def write_copies(settings: PrepareSettings, plans: list[Plan], cache: Cache, columns: list[Column]) -> str:
    """The original's ``.pt`` and its folder of chunks, where asked for; what to say of them."""
    said = ""
    if settings.output_file is not None:
        said += f", {write_embeddings(settings.output_file, plans, cache, columns)} vectors in {settings.output_file}"
    if settings.chunks_dir is not None:
        said += f", {write_chunks(settings.chunks_dir, plans)} chunks in {settings.chunks_dir}"
    return said


def check(settings: PrepareSettings, family: Family | None = None) -> str:
    """Print what the data set holds, and what of it a family cannot use; encode nothing."""
    with mirrored(settings.run.dir) as run_dir:
        dataset = read_rows(settings.data, settings.family.get("segment_s", 2.0), family)
        described = describe(dataset.manifest, dataset.rows, dataset.choice)
        print(render(described))
        dataset.manifest.write_rejects(run_dir / "rejects.jsonl")
        Store(str(run_dir)).write("summary.json", json.dumps(described, indent=2).encode())
        dataset.manifest.enforce(settings.data.max_reject_fraction, run_dir / "rejects.jsonl")
    return f"The data set was checked, nothing was encoded · {settings.run.dir}/summary.json, rejects.jsonl"


def embed(plans: list[Plan], columns: list[Column], cache: Cache, data: DataSettings, dataset: Dataset, progress: str,
          what: str) -> int:
    """The missing shards of these plans, through Ray Data's actors; how many were computed."""
    if data.mode == "prepared":
        require(cache, plans, columns)
        return 0
    shards = Shards.joined([plan.shards for plan in plans])
    once = {head.name: index for index, head in enumerate(shards.heads())}
    work = prepare(Plan("together", shards.pick(once.values())), columns, cache, pool_of(data), dataset.limits,
                   counter(progress, f"Encoding {what}", "shards"))  # type: ignore[arg-type]
    return work.computed


def require(cache: Cache, plans: list[Plan], columns: list[Column]) -> None:
    """DataError where the cache lacks a shard: ``data.mode=prepared`` encodes nothing."""
    missing = sum(len(cache.missing(plan, columns)) for plan in plans)
    if missing:
        total = sum(len(plan.shards) for plan in plans)
        raise DataError(f"data.mode=prepared and the cache lacks {missing} of {total} shards: "
                        "run pipelines/prepare.py with the same settings, or take data.mode=stream.")


def family_needs_no_fit(before: list[Column], family: Family) -> bool:
    """Whether the columns are known before ``fit``: an empty Fitted names the same ones."""
    try:
        return [column.id() for column in family.columns(Fitted())] == [column.id() for column in before]
    except (KeyError, ValueError):
        return False


def sample_shards(plan: Plan, rows: int) -> list[int]:
    """Shards, in an order that depends on the plan alone, until they hold ``rows`` examples."""
    permutation = np.random.Generator(np.random.Philox(key=[0, len(plan.shards)])).permutation(len(plan.shards))
    chosen: list[int] = []
    for index in permutation.tolist():
        if rows <= 0:
            break
        chosen.append(index)
        rows -= plan.shard_rows[index]
    return chosen


def sample_rows(plan: Plan, cache: Cache, columns: list[Column], limit: int) -> list[Row]:
    """The first ``limit`` rows that were not rejected."""
    rows = (example_row(shard, example, cache, columns) for shard in plan.shards for example in shard.examples)
    return [row for row in rows if row["weight"] > 0][:limit]


def enforce(lost: int, total: int, max_fraction: float, rejects: Path) -> None:
    """DataError when more examples were lost in decoding than is allowed."""
    if total and lost / total > max_fraction:
        raise DataError(f"{lost} of {total} examples could not be decoded, over "
                        f"data.max_reject_fraction={max_fraction:g}; the reasons are in {rejects}: mend the files, or "
                        "raise the threshold.")


def write_lost(lost: dict[str, str], path: Path) -> None:
    """Add examples that were rejected while decoding to ``rejects.jsonl``."""
    with open(path, "a", encoding="utf-8") as file:
        for name, reason in sorted(lost.items()):
            file.write(json.dumps({"source": name, "line": None, "reason": reason}) + "\n")


def pool_of(data: DataSettings) -> Pool:
    return Pool(data.embed_workers, data.embed_num_cpus, data.embed_num_gpus)


def embedding_needs(data: DataSettings, pools: int = 1) -> Needs:
    return Needs(pools, data.embed_workers, data.embed_num_cpus, data.embed_num_gpus)
