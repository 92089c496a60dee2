"""Plain mappings ⇄ dataclasses, with errors a person can act on.

The dataclass is the only schema: Hydra composes plain YAML, and everything is checked here, once, with the full key in
the message. Only the standard library is imported, so that a command can refuse a bad setting before it loads torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import math
import os
import types
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


def from_mapping(cls: type[T], mapping: Mapping[str, Any], where: str = "") -> T:
    """Build dataclass ``cls`` from plain values; ``where`` is its own key (``"trainer"``), "" at the root.

    Keys left out take their defaults. An integral float counts as an int (``max_steps=1e4``), an int as a float or a
    str (``prompt=42``). Types it does not know (protocols, classes) are passed through for their owner to check.
    ValueError, naming the key, for an unknown or missing key and for a value of the wrong type.
    """
    if not isinstance(mapping, Mapping):
        raise ValueError(f"{where or 'The configuration'} must be a group of keys, got {mapping!r}.")
    settable = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    for key in mapping:
        if key not in settable:
            raise ValueError(f"{_join(where, key)} is not a setting{did_you_mean(str(key), settable, where)}")
    for name, field in settable.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in mapping:
            raise ValueError(f"{_join(where, name)} is missing.")
    hints = get_type_hints(cls)
    return cls(**{key: _convert(value, hints[key], _join(where, key)) for key, value in mapping.items()})


def to_mapping(settings: Any) -> Any:
    """The inverse of :func:`from_mapping`: nested dicts, lists and scalars, fit for JSON and YAML."""
    if dataclasses.is_dataclass(settings) and not isinstance(settings, type):
        return {field.name: to_mapping(getattr(settings, field.name))
                for field in dataclasses.fields(settings) if field.init}
    if isinstance(settings, Mapping):
        return {key: to_mapping(value) for key, value in settings.items()}
    if isinstance(settings, (list, tuple)):
        return [to_mapping(value) for value in settings]
    return str(settings) if isinstance(settings, Path) else settings


def did_you_mean(word: str, known: Iterable[str], where: str = "") -> str:
    """``"; did you mean x?"`` as the end of a sentence, or what there is to choose from where nothing is near."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {_join(where, near[0])}?"
    if len(known) > 12:
        return f"; --help{' ' + where.partition('.')[0] if where else ''} lists what there is."
    return f"; there is {', '.join(known)}." if known else "."


def instantiate(value: Any, where: str = "") -> Any:
    """Build the object that ``{_target_: package.Class, key: value, …}`` describes, innermost first.

    Only for what a person typed or keeps in YAML: a ``_target_`` is never read out of a checkpoint. Mappings without
    ``_target_``, lists and scalars come back as they are. ValueError where the target or its arguments do not fit.
    """
    if isinstance(value, Mapping):
        built = {key: instantiate(item, _join(where, str(key))) for key, item in value.items()}
        if "_target_" not in built:
            return built
        target = import_target(built.pop("_target_"), _join(where, "_target_"))
        if isinstance(target, type) and dataclasses.is_dataclass(target):
            return from_mapping(target, built, where)
        try:
            inspect.signature(target).bind(**built)
        except TypeError as error:
            raise ValueError(f"{where} does not fit {target.__qualname__}: {error}.") from error
        return target(**built)
    if isinstance(value, (list, tuple)):
        return [instantiate(item, f"{where}[{index}]") for index, item in enumerate(value)]
    return value


def import_target(path: Any, where: str = "_target_") -> Any:
    """The callable at a dotted ``path``. An error inside the module itself is not ours and comes through as it is."""
    module_name, _, name = path.rpartition(".") if isinstance(path, str) else ("", "", "")
    if not module_name or not name:
        raise ValueError(f"{where} must be a dotted name such as mypackage.MyClass, got {path!r}.")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise ValueError(f"{where}={path}: there is no module {error.name}; is its folder on PYTHONPATH?") from error
    target = getattr(module, name, None)
    if not callable(target):
        raise ValueError(f"{where}={path}: {module_name} has no class or function {name}"
                         f"{did_you_mean(name, [key for key in vars(module) if not key.startswith('_')])}")
    return target


def absolute(path: str) -> str:
    """A local path made absolute (workers change directory), ``~`` expanded; a URL as it is."""
    return path if "://" in path else os.path.abspath(os.path.expanduser(path))


def make_absolute(settings: Any, *names: str) -> None:
    """:func:`absolute` for fields of a frozen dataclass, from its ``__post_init__``; None stays."""
    for name in names:
        value = getattr(settings, name)
        if value is not None:
            if not value:
                raise ValueError(f"{name} is empty: give a path, or null for the default.")
            object.__setattr__(settings, name, absolute(value))


def check_at_least(where: str, settings: Any, minimum: float, *names: str) -> None:
    """ValueError for a field below ``minimum``; None passes."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and value < minimum:
            raise ValueError(f"{_join(where, name)} must be at least {minimum}, got {value}.")


def check_above_zero(where: str, settings: Any, *names: str) -> None:
    """ValueError for a field that is not above 0; None passes."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and value <= 0:
            raise ValueError(f"{_join(where, name)} must be above 0, got {value}.")


def check_fraction(where: str, settings: Any, *names: str, below_one: bool = False) -> None:
    """ValueError for a field outside [0, 1], or [0, 1) when ``below_one``; None passes."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and not (0 <= value < 1 if below_one else 0 <= value <= 1):
            raise ValueError(f"{_join(where, name)} must be from 0 to {'below 1' if below_one else '1'}, got {value}.")


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else str(key)


def _convert(value: Any, hint: Any, key: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin is Union or origin is types.UnionType:
        return _convert_union(value, args, key)
    if origin is Literal:
        if any(value == choice and type(value) is type(choice) for choice in args):
            return value
        near = difflib.get_close_matches(str(value), [str(choice) for choice in args], n=1)
        hint_text = f"; did you mean {near[0]}?" if near else "."
        raise ValueError(f"{key} must be one of {', '.join(map(str, args))}, got {value!r}{hint_text}")
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else from_mapping(hint, value, key)  # type: ignore[arg-type]
    if origin in (list, tuple, Sequence):
        return _convert_sequence(value, origin, args, key)
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise ValueError(f"{key} must be a group of keys, got {value!r}.")
        return {str(name): _convert(item, args[1], _join(key, name)) for name, item in value.items()}
    return _convert_scalar(value, hint, key)


def _convert_union(value: Any, choices: tuple[Any, ...], key: str) -> Any:
    if value is None and type(None) in choices:
        return None
    choices = tuple(choice for choice in choices if choice is not type(None))
    exact = [choice for choice in choices if type(value) is choice]
    errors = []
    for choice in exact + list(choices):
        try:
            return _convert(value, choice, key)
        except ValueError as error:
            errors.append(error)
    raise errors[0]


def _convert_sequence(value: Any, origin: type, args: tuple[Any, ...], key: str) -> Any:
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{key} must be a list such as [a,b], got {value!r}.")
    if origin is tuple and args[-1] is not Ellipsis:
        if len(value) != len(args):
            raise ValueError(f"{key} must be a list of {len(args)}, got {len(value)}.")
        return tuple(_convert(item, hint, f"{key}[{index}]")
                     for index, (item, hint) in enumerate(zip(value, args, strict=True)))
    items = [_convert(item, args[0], f"{key}[{index}]") for index, item in enumerate(value)]
    return items if origin is list else tuple(items)


def _convert_scalar(value: Any, hint: Any, key: str) -> Any:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is bool:
        if isinstance(value, bool):
            return value
        raise ValueError(f"{key} must be true or false, got {value!r}.")
    if hint is int:
        if is_number and value == value // 1 and math.isfinite(value):
            return int(value)
        raise ValueError(f"{key} must be a whole number, got {value!r}.")
    if hint is float:
        if is_number and abs(value) <= 1e300:  # refuses NaN and infinity too: "no limit" is null everywhere
            return float(value)
        raise ValueError(f"{key} must be a number, got {value!r}.")
    if hint is str:
        if isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool)):
            return str(value)
        raise ValueError(f"{key} must be text, got {value!r}; quote it twice if text it is: {key}='\"{value}\"'.")
    if hint is Path:
        return Path(_convert_scalar(value, str, key))
    return value
