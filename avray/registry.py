"""Families by name: avray's own, those of installed packages, and a user's own classes.

The platform reaches a family through here alone. Names lead to ``"module:Class"`` strings that are imported when
asked for, so that refusing a misspelt name costs nothing and no import contract is bent. What ``family_settings``
writes into a checkpoint is data: a name and plain values, never something to call.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any, cast

from avray.config import from_mapping, import_target
from avray.family import Family
from avray.settings.convert import did_you_mean

GROUP = "avray.families"
"""The entry-point group of other packages' families: ``name = "module:Class"``."""
OWN = {
    "continuation": "avray.families.continuation:Continuation",
    "codec_lm": "avray.families.codec_lm:CodecLM",
    "multitask": "avray.families.multitask:Multitask",
    "audio_gpt2": "avray.families.audio_gpt2:AudioGPT2",
    "instruct": "avray.families.instruct:Instruct",
}
_registered: dict[str, type] = {}


def register(name: str, family: type) -> None:
    """Make a class of one's own known by ``name`` in this process. ValueError where the name or the class will not do.

    The class is a dataclass and meets :class:`avray.family.Family`. Registering the same class again is harmless.
    """
    if not (isinstance(family, type) and dataclasses.is_dataclass(family)):
        raise ValueError(f"Family {name} must be a dataclass, got {family!r}.")
    lacking = [method for method in ("segment", "columns", "collate", "build", "loss") if not hasattr(family, method)]
    if lacking:
        raise ValueError(f"{family.__name__} is no family: it lacks {', '.join(lacking)} (see avray.family.Family).")
    if name in _specs() or _registered.get(name, family) is not family:
        raise ValueError(f"A family named {name} exists already: give yours another name.")
    _registered[name] = family


def register_target(path: str) -> str:
    """Import the class at a dotted path, as a person gives it in ``family._target_``, and register it by its own name;
    returns the name. ValueError where there is no such class."""
    family = import_target(path, "family._target_")
    name = _name_of(family)
    if name is None:
        name = family.__name__
        register(name, family)
    return name


def family_class(name: str) -> type:
    """ValueError, naming what there is, for an unknown name; ImportError where an installed family cannot load."""
    specs = _specs()
    if name in _registered:
        return _registered[name]
    if name not in specs:
        hint = did_you_mean(name, {*specs, *_registered})
        raise ValueError(f"family.name={name} is not known{hint} A class of one's own is given as family=own "
                         "family._target_=package.Class.")
    return _load(specs[name])


def family_from_settings(settings: Mapping[str, Any]) -> Family:
    """``{"name": "continuation", "codec": {"name": "spectral"}, "segment_s": 2.0}`` -> the family.

    ``_target_`` in place of ``name`` registers the class it names first. Keys left out take the class's defaults.
    ValueError, with the full key, for an unknown name or key and for a value of the wrong type.
    """
    given = dict(settings)
    name, target = given.pop("name", None), given.pop("_target_", None)
    if target is not None:
        name = register_target(target)
        if "codec" not in {field.name for field in dataclasses.fields(family_class(name))}:
            given.pop("codec", None)  # which the command line always offers
    if name is None:
        known = ", ".join(sorted({*_specs(), *_registered}))
        raise ValueError(f"family.name is missing: give one of {known}, or family._target_ for a class of your own.")
    codec = given.get("codec")
    if isinstance(codec, Mapping):
        given["codec"] = importlib.import_module("avray.codecs").codec_from_settings(codec)
    return cast(Family, from_mapping(family_class(name), given, "family"))


def saved_family(settings: Mapping[str, Any], target: str | None = None) -> Family:
    """The family that a checkpoint names. ``target`` is where a class of the user's own is found
    (``mypackage.MyFamily``): a checkpoint cannot say so itself. ValueError where it is not known."""
    if target is not None:
        register_target(target)
    return family_from_settings(settings)


def family_settings(family: Family) -> dict[str, Any]:
    """The inverse of ``family_from_settings``: a name and plain values, fit for a checkpoint's ``family.json``.

    ValueError for a class that is not registered, or whose settings do not build an equal family again.
    """
    name = _name_of(type(family))
    if name is None:
        raise ValueError(f"{type(family).__name__} has no name to be found by again: call avray.registry.register.")
    settings = {**_plain(family), "name": name}
    if family_from_settings(settings) != family:
        raise ValueError(f"The settings of family {name} do not build it again: each must be a plain value or a "
                         "dataclass of plain values, and a codec one that codec= takes.")
    return settings


def _specs() -> dict[str, str]:
    """avray's own and installed ones; an installed package cannot take one of avray's own names."""
    return {entry.name: entry.value for entry in entry_points(group=GROUP)} | OWN


def _load(spec: str) -> type:
    module, _, name = spec.partition(":")
    return cast(type, getattr(importlib.import_module(module), name))


def _name_of(family: type) -> str | None:
    spec = f"{family.__module__}:{family.__qualname__}"
    names = [name for name, cls in _registered.items() if cls is family]
    return next(iter(names + [name for name, known in _specs().items() if known == spec]), None)


def _plain(value: Any) -> Any:
    """Dataclasses as mappings of what they are built from, and of the ``name`` they are chosen by."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        plain = {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value) if field.init}
        return plain | ({"name": value.name} if hasattr(value, "name") else {})
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
