"""Checks the shapes in annotations, ``Float[Tensor, "batch time dim"]``, in every call that a test makes.

jaxtyping's import hook hands each function of avray to :func:`check`, which looks at arrays alone: a general type
checker would stumble over protocols and over ``int`` where ``float`` is meant.
"""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable
from typing import Any

from jaxtyping import AbstractArray


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let ``function`` raise TypeError for an array that is not of the shape or dtype its annotation says."""
    if not any("[" in str(hint) for hint in getattr(function, "__annotations__", {}).values()):
        return function
    signature = inspect.signature(function)

    @functools.cache
    def hints() -> dict[str, Any]:
        """At the first call, when names that annotations use are there; those only for type checkers are not."""
        try:
            found = typing.get_type_hints(function)
        except Exception:
            return {}
        return {name: hint for name, hint in found.items() if any(map(_is_array, _alternatives(hint)))}

    @functools.wraps(function)
    def checked(*given: Any, **named: Any) -> Any:
        if not hints():
            return function(*given, **named)
        for name, value in signature.bind(*given, **named).arguments.items():
            _check(function, name, value, hints().get(name))
        result = function(*given, **named)
        _check(function, "return", result, hints().get("return"))
        return result

    return checked


def _check(function: Callable[..., Any], name: str, value: Any, hint: Any) -> None:
    if hint is not None and not any(isinstance(value, kind) for kind in _alternatives(hint)):
        found = f"{value.dtype}{[*value.shape]}" if hasattr(value, "shape") else type(value).__name__
        raise TypeError(f"{function.__qualname__}: {name} is {found}, which is not {hint}.")


def _alternatives(hint: Any) -> tuple[Any, ...]:
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, type(int | None)) else (hint,)
    return tuple(kind for kind in kinds if isinstance(kind, type))


def _is_array(kind: Any) -> bool:
    return issubclass(kind, AbstractArray)
