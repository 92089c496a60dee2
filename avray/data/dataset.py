"""One data set, from ``data.*`` to the plans of its splits."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from avray.config import DataSettings, SetSettings, from_mapping
from avray.data.manifest import Manifest, Reject, load_manifest
from avray.data.packed import Rows
from avray.data.plan import Plan, Shards, plan_split
from avray.data.splits import SplitChoice, assign_splits, choose_split
from avray.errors import DataError
from avray.family import Choosy, Family
from avray.media import Limits
from avray.store import Store


@dataclass(frozen=True)
class Dataset:
    """Rows with their splits, and what was rejected of them before any decoding."""

    manifest: Manifest
    rows: Rows
    limits: Limits
    choice: SplitChoice
    plans: Mapping[str, Plan] = field(default_factory=dict)

    def counts(self) -> dict[str, int]:
        return {"used": len(self.rows), "rejected": len(self.manifest.rejects)}


def read_limits(data: DataSettings) -> Limits:
    return from_mapping(Limits, data.limits, "data.limits")


def data_path(data: DataSettings) -> str:
    """``data.path``, or the demo set, made on first use."""
    if data.path is not None:
        return data.path
    from avray.data.demo import SONG_SHARE, ensure_demo

    assert data.demo_dir is not None
    if data.demo == "tasks":
        from avray.data.demo_tasks import ensure_tasks

        return str(ensure_tasks(Path(data.demo_dir)))
    share = "" if data.demo_songs == SONG_SHARE else f"-{data.demo_songs:g}-songs"
    folder = Path(data.demo_dir) / f"{data.demo_minutes:g}-minutes{share}"  # one set a kind: two runs may want two
    made = ensure_demo(folder, minutes=data.demo_minutes, seed=0, song_share=data.demo_songs)
    return str(made.folder / "audio")


def read_rows(data: DataSettings, segment_s: float = 2.0, family: Family | None = None) -> Dataset:
    """Rows read, probed and split; a held-out span has room for two segments. A row that the family cannot use is
    rejected. DataError where there are none."""
    limits = read_limits(data)
    manifest = mixed_manifest(data, limits) if data.mix else one_manifest(data, limits, SetSettings(
        data_path(data), data.texts, data.format, max_samples=data.max_samples))
    if isinstance(family, Choosy):
        refuse(manifest, family)
    if not manifest.rows:
        rejects = manifest.rejects
        reason = f"; the first of {len(rejects)} rejects: {rejects[0].reason}" if rejects else ""
        raise DataError(f"{manifest.path} holds no recording that can be used{reason}.")
    span_s = 2 * segment_s
    choice = choose_split(manifest.rows, validation_fraction=data.validation_fraction, by=data.split_by,
                          guard_s=data.guard_s, span_s=span_s, holdout_groups=data.holdout_groups)
    rows = assign_splits(manifest.rows, validation_fraction=data.validation_fraction, seed=data.split_seed,
                         by=data.split_by, guard_s=data.guard_s, span_s=span_s, holdout_groups=data.holdout_groups,
                         choice=choice)
    return Dataset(manifest, rows, limits, choice)


def one_manifest(data: DataSettings, limits: Limits, one: SetSettings) -> Manifest:
    return load_manifest(one.path, texts=one.texts, format=one.format, allowed_roots=data.allowed_roots, limits=limits,
                         max_samples=one.max_samples, memo_path=memo_path(data), group_by=data.group_by)


def mixed_manifest(data: DataSettings, limits: Limits) -> Manifest:
    """Several sets as one: a row's ``set`` is its place in ``data.mix`` and begins its id. A recording that two sets
    hold has one group, so that it stands on one side of the split."""
    merged = Manifest(", ".join(one.path for one in data.mix), "mix")
    groups: dict[str, str] = {}
    for index, one in enumerate(data.mix):
        manifest = one_manifest(data, limits, one)
        for row in manifest.rows:
            row |= {"id": f"{index}/{row['id']}", "set": index}
            if one.task is not None:
                row.setdefault("task", one.task)
            if digest := row.get("audio_hash"):
                row["group"] = groups.setdefault(digest, row["group"])
            merged.rows.append(row)
        merged.rejects += manifest.rejects
        merged.duplicates += manifest.duplicates
    return merged


def refuse(manifest: Manifest, family: Choosy) -> None:
    """Rows that a family has no use for become rejects."""
    kept = array("q")
    for place, row in enumerate(manifest.rows):
        reason = family.refusal(row)
        if reason is None:
            kept.append(place)
        else:
            manifest.rejects.append(Reject(manifest.source_of(place, row), row.get("manifest_line", 0), reason))
    manifest.keep(kept)


def open_dataset(family: Family, data: DataSettings, rejects_path: Path | None = None) -> Dataset:
    """The data set with a plan of each split that has rows.

    Writes ``rejects.jsonl`` where asked; DataError when more than ``data.max_reject_fraction`` of the rows are bad.
    """
    dataset = read_rows(data, family.segment_s, family)
    if rejects_path is not None:
        dataset.manifest.write_rejects(rejects_path)
    dataset.manifest.enforce(data.max_reject_fraction, rejects_path)
    plans = {split: plan_parts(family, data, dataset.rows, split)
             for split in sorted({row["split"] for row in dataset.rows})}
    return replace(dataset, plans=plans)


def plan_parts(family: Family, data: DataSettings, rows: Rows, split: str) -> Plan:
    """A split's plan: each set, and with ``data.batches=by_task`` each task, in shards of its own; training sets as
    often as they weigh beside the lightest. DataError where no part has an example."""
    parts: dict[tuple[int, str], array[int]] = {}
    for place, row in enumerate(rows):
        if row["split"] == split:
            task = str(row.get("task") or "") if data.batches == "by_task" else ""
            parts.setdefault((row.get("set", 0), task), array("q")).append(place)
    lightest = min((one.weight for one in data.mix), default=1.0)
    tasks = sorted({task for _, task in parts})
    plans, groups, refused = [], [], None
    for (index, task), own in sorted(parts.items(), key=lambda item: item[0]):
        try:
            plan = plan_split(family, rows.pick(own), split, shard_examples=data.shard_examples,
                              shard_seconds=data.shard_seconds)
        except DataError as error:
            refused = error
            continue
        if data.mix and split == "train":
            plan = plan.repeated(data.mix[index].weight / lightest)
        plans.append(plan)
        groups += [tasks.index(task)] * len(plan.shards)
    if not plans:
        assert refused is not None
        raise refused
    shards = Shards.joined([plan.shards for plan in plans])
    return Plan(split, shards, tuple(groups) if data.batches == "by_task" else ())


def memo_path(data: DataSettings) -> str | None:
    """Where probed headers and content hashes are remembered; nowhere for a cache on an object store."""
    store = Store(data.cache)
    return store.path("probes.json") if store.is_local else None
