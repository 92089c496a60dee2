"""Nested state as tensors and JSON, so that an optimiser is kept without pickle.

``torch.optim.Optimizer.state_dict()`` has dictionaries with integer keys, tuples and tensors of no dimension;
Python's and NumPy's random generators have tuples of 625 numbers, arrays and 128-bit integers. All come back
as they were.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from avray.errors import CheckpointError


@dataclass(frozen=True)
class FlatState:
    """Nested state in two parts: the tensors by name, and JSON that holds the rest and names them."""

    tensors: dict[str, Tensor]
    tree: Any


def flatten_state(state: Any) -> FlatState:
    """Take apart an optimiser's, a scheduler's or a random generator's state.

    Holds None, bool, int, float, str, tensors, NumPy arrays and scalars (which come back as Python numbers),
    lists, tuples and dictionaries with any such keys. The tensors are the caller's own, not copies.
    ValueError, naming the place, for anything else.
    """
    tensors: dict[str, Tensor] = {}
    return FlatState(tensors, _flatten(state, "", tensors))


def unflatten_state(tensors: Mapping[str, Tensor], tree: Any) -> Any:
    """What :func:`flatten_state` took apart. CheckpointError for a tree that it did not make."""
    if isinstance(tree, list):
        return [unflatten_state(tensors, value) for value in tree]
    if not isinstance(tree, dict):
        return tree
    if "$" not in tree:
        return {key: unflatten_state(tensors, value) for key, value in tree.items()}
    try:
        match tree["$"]:
            case "tensor":
                return tensors[tree["name"]]
            case "array":
                return tensors[tree["name"]].numpy()
            case "tuple":
                return tuple(unflatten_state(tensors, value) for value in tree["items"])
            case "dict":
                return {unflatten_state(tensors, key): unflatten_state(tensors, value) for key, value in tree["items"]}
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"trainer.json does not fit trainer.safetensors: {error!r}.") from error
    raise CheckpointError(f"trainer.json holds a {tree['$']!r}, which this avray does not know.")


def _flatten(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Tensor | np.ndarray):
        name = re.sub(r"[^\w.-]", "_", path) or "value"
        while name in tensors:  # {"a.b": …, "a": {"b": …}}
            name += "_"
        tensors[name] = value.detach() if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
        return {"$": "tensor" if isinstance(value, Tensor) else "array", "name": name}
    if isinstance(value, list | tuple):
        items = [_flatten(item, f"{path}.{index}".lstrip("."), tensors) for index, item in enumerate(value)]
        return items if isinstance(value, list) else {"$": "tuple", "items": items}
    if isinstance(value, Mapping):
        pairs = [(key, _flatten(item, f"{path}.{key}".lstrip("."), tensors)) for key, item in value.items()]
        if all(isinstance(key, str) and key != "$" for key in value):
            return dict(pairs)
        return {"$": "dict", "items": [[_flatten(key, path, tensors), item] for key, item in pairs]}
    raise ValueError(
        f"{path or 'The state'} is a {type(value).__name__}, which a checkpoint cannot hold: "
        "keep numbers, text, tensors, lists and dictionaries."
    )
