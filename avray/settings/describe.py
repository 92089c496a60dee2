"""What ``--help`` prints about a setting: its default from the dataclass, its meaning from the docstring under it.

So a setting is explained once, where it is declared. Field docstrings do not exist at run time; they are parsed out of
the source, which costs a few milliseconds and only when help is asked for.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import re
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any, get_args, get_origin, get_type_hints


@dataclasses.dataclass(frozen=True)
class Described:
    """One setting: full key, default as one types it, meaning."""

    key: str
    default: str
    meaning: str


def describe(cls: type, where: str = "") -> Iterator[Described]:
    """Every setting of ``cls``, groups inside it included, in the order of declaration."""
    meanings, hints = _field_docstrings(cls), get_type_hints(cls)
    for field in dataclasses.fields(cls):
        key = f"{where}.{field.name}" if where else field.name
        if dataclasses.is_dataclass(hints[field.name]):
            yield from describe(hints[field.name], key)
        else:
            yield Described(key, _as_typed(_default(field)), meanings.get(field.name, ""))


def hint_of(cls: type, key: str) -> Any:
    """The type of a dotted ``key`` below ``cls``; Any inside a free mapping, None where there is no such key."""
    hint: Any = cls
    for name in key.split("."):
        if dataclasses.is_dataclass(hint):
            hint = get_type_hints(hint).get(name)
        else:
            hint = Any if hint is Any or is_mapping(hint) else None
    return hint


def is_mapping(hint: Any) -> bool:
    """Whether a setting is a free mapping, whose keys its owner checks."""
    return get_origin(hint) is Mapping


def is_text(hint: Any) -> bool:
    """Whether a setting is free text (``str`` or ``str | None``)."""
    return hint is str or set(get_args(hint)) == {str, type(None)}


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def _as_typed(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(_as_typed, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _field_docstrings(cls: type) -> dict[str, str]:
    meanings: dict[str, str] = {}
    for base in reversed([base for base in cls.__mro__ if dataclasses.is_dataclass(base)]):
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body  # type: ignore[attr-defined]
        for statement, following in itertools.pairwise(body):
            if (isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
                    and isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)):
                meanings[statement.target.id] = re.sub(r"\s+", " ", str(following.value.value)).replace("``", "")
    return meanings
