"""Rows of a block, read from the cache, and the Arrow table they travel in between Ray Data and a trainer.

Both ways into a trainer end here: ``prepared`` calls :func:`gather` on the rank itself, ``stream`` calls it at the end
of the Ray Data pipeline and sends the table. So the same order gives the same rows.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from avray.data.cache import ARROW_TYPES, Cache
from avray.data.order import PADDING
from avray.data.plan import Plan, PlannedExample, Shard, fields_json
from avray.family import Column, Row, role_columns

PADDING_ROW: Row = {"id": "", "weight": 0.0}


def gather(plan: Plan, cache: Cache, columns: Sequence[Column], block: np.ndarray) -> list[Row]:
    """The rows of a block ``[n, 2]``; padding, and examples that lost a unit, come with weight 0."""
    return [PADDING_ROW if shard == PADDING
            else example_row(plan.shards[shard], plan.shards[shard].examples[row], cache, columns)
            for shard, row in block.tolist()]


def example_row(shard: Shard, example: PlannedExample, cache: Cache, columns: Sequence[Column]) -> Row:
    """An example's fields and ``"<role>.<column>"`` arrays ``[time, *shape]``."""
    row: Row = {**example.fields, "id": example.id, "weight": example.weight}
    modalities = {role: shard.units[index].modality for role, index in example.units.items()}
    for column in columns:
        for role in role_columns(column, modalities):
            value = cache.read(shard, column)[example.units[role]]
            if value is None:
                return {"id": example.id, "weight": 0.0}
            row[f"{role}.{column.name}"] = value
    return row


def to_table(rows: Sequence[Row], place: tuple[int, int, int]) -> pa.Table:
    """Rows as flat Arrow columns; ``place`` is the block's (epoch, round, lane): a reader can check its turn."""
    arrays: dict[str, list[np.ndarray | None]] = {}
    for row in rows:
        for name, value in row.items():
            if isinstance(value, np.ndarray):
                arrays.setdefault(name, [])
    plain = [{name: value for name, value in row.items() if not isinstance(value, np.ndarray)} for row in rows]
    table: dict[str, pa.Array] = {
        "row": pa.array([fields_json(fields) for fields in plain]),
        "place": pa.array([list(place)] * len(rows), pa.list_(pa.int64())),
    }
    for name in arrays:
        values = [row.get(name) for row in rows]
        dtype = next(str(value.dtype) for value in values if value is not None)
        lengths = [0 if value is None else value.size for value in values]
        flat = np.concatenate([value.reshape(-1) for value in values if value is not None])
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        mask = pa.array([value is None for value in values])
        table[f"array:{name}"] = pa.ListArray.from_arrays(
            pa.array(offsets), pa.array(flat, ARROW_TYPES[dtype]), mask=mask)
        table[f"shape:{name}"] = pa.array([None if value is None else list(value.shape) for value in values],
                                          pa.list_(pa.int32()))
    return pa.table(table)


def from_table(table: pa.Table) -> list[Row]:
    """The inverse of :func:`to_table`; arrays are views of the table's memory."""
    table = table.combine_chunks()
    rows: list[Row] = [json.loads(text) for text in table["row"].to_pylist()]
    for column in table.column_names:
        kind, _, name = column.partition(":")
        if kind != "array":
            continue
        chunk = table[column].chunk(0)
        flat, offsets = chunk.values.to_numpy(zero_copy_only=True), chunk.offsets.to_numpy()
        for index, shape in enumerate(table[f"shape:{name}"].to_pylist()):
            if shape is not None:
                rows[index][name] = flat[offsets[index] : offsets[index + 1]].reshape(shape)
    return rows


def place_of(table: pa.Table) -> tuple[int, int, int]:
    """(epoch, round, lane) of the block a table holds."""
    epoch, round_index, lane = table["place"][0].as_py()
    return epoch, round_index, lane
