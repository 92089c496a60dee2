"""Hydra, tamed: where its YAML lies, what its groups start from, and its errors as one sentence.

Notable: the YAML in ``avray/conf`` holds only what differs from the dataclasses. Each group starts from a node named
``_defaults`` (``_train`` … for the roots) that is made from the dataclass, so that a setting has one home and a new one
needs no YAML. ``avray/conf`` is always on the search path, so that a root of one's own (``--config-path``,
``--config-name``) can use its groups. Hydra itself is told to leave the working directory, ``outputs/`` and logs alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.core.plugins import Plugins
from hydra.errors import ConfigCompositionException, MissingConfigException, OverrideParseException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from avray.config import DataSettings, ServeSettings, TrainerSettings, TuneSettings, to_mapping
from avray.settings.convert import did_you_mean
from avray.settings.describe import hint_of, is_mapping, is_text

CONF_DIR = Path(__file__).resolve().parent.parent / "conf"
GROUPS = {"data": DataSettings, "trainer": TrainerSettings, "serve": ServeSettings, "tune": TuneSettings}
"""Groups that start from a dataclass."""
BUILT = ("family", "codec")
"""Groups that are built elsewhere, and list their fields in their own YAML."""
HYDRA_CHOICES = {"hydra/output": "avray", "hydra/hydra_logging": "avray", "hydra/job_logging": "none",
                 "hydra.output_subdir": "null"}  # the last outweighs its group in Hydra's own order


class AvrayConf(SearchPathPlugin):
    """Puts ``avray/conf`` on the search path, after the user's folders."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append(provider="avray", path=str(CONF_DIR))


@cache
def register_resolvers() -> None:
    """``${len:…}``, ``${add:…}``, ``${multiply:…}``, ``${divide:…}``, ``${floor_divide:…}`` in any YAML, and
    ``${required:key}``, an error unless the key is given (``???`` cannot take a default away again)."""

    def required(key: str) -> NoReturn:
        raise ValueError(f"{key} is missing: give {key}=… on the command line.")

    resolvers: dict[str, Callable[..., Any]] = {
        "required": required, "len": len, "add": lambda *numbers: sum(numbers),
        "multiply": lambda *numbers: prod(numbers), "divide": lambda a, b: a / b, "floor_divide": lambda a, b: a // b}
    for name, function in resolvers.items():
        OmegaConf.register_new_resolver(name, function, replace=True)


def register(name: str, settings: type) -> None:
    """Make root ``_<name>`` and the groups' ``_defaults`` out of their dataclasses, and the resolvers. Idempotent."""
    register_resolvers()
    Plugins.instance().register(AvrayConf)
    store = ConfigStore.instance()
    for group, cls in GROUPS.items():
        store.store(group=group, name="_defaults", node=default_mapping(cls))
    composed = (*GROUPS, *BUILT)
    store.store(name=f"_{name}", node={key: value for key, value in default_mapping(settings).items()
                                       if key not in composed})


def default_mapping(cls: type) -> dict[str, Any]:
    """A dataclass's defaults as they are written, before its checks make paths absolute."""
    mapping = {}
    for field in fields(cls):
        value = field.default_factory() if callable(field.default_factory) else field.default
        mapping[field.name] = default_mapping(type(value)) if is_dataclass(value) else to_mapping(value)
    return mapping


def plain(config: DictConfig) -> dict[str, Any]:
    """What Hydra composed, resolved, as dicts and lists."""
    mapping = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(mapping, dict)
    return {str(key): value for key, value in mapping.items()}


def compose(name: str, settings: type, overrides: Sequence[str] = (), config_dir: str | Path | None = None,
            config_name: str | None = None) -> dict[str, Any]:
    """What ``overrides`` on the command line would give, as a plain mapping for ``from_mapping``.

    For tests, sweeps and notebooks. Hydra's own exceptions come through; :func:`explain` makes sentences of them.
    """
    return plain(_compose(name, settings, overrides, config_dir, config_name))


def _compose(name: str, settings: type, overrides: Sequence[str], config_dir: str | Path | None,
             config_name: str | None) -> DictConfig:
    register(name, settings)
    primary = str(Path(config_dir).resolve()) if config_dir is not None else str(CONF_DIR)
    with hydra.initialize_config_dir(primary, version_base="1.3"):
        return hydra.compose(config_name or name, with_hydra_choices(rewrite(settings, overrides)))


def with_hydra_choices(overrides: Sequence[str]) -> list[str]:
    """Overrides with avray's choices of Hydra's own groups, unless they are chosen already."""
    given = {override.partition("=")[0].lstrip("+") for override in overrides}
    return [f"{key}={value}" for key, value in HYDRA_CHOICES.items() if key not in given] + list(overrides)


def rewrite(settings: type, overrides: Sequence[str], multirun: bool = False) -> list[str]:
    """Spare the user two corners of Hydra's grammar.

    Free text (``prompt=a bell, then (softly) drums``, paths with blanks or brackets) is quoted for him, except under
    ``--multirun``, where a comma separates jobs. ``x._target_=`` and keys of a free mapping (``data.limits.…``) need
    no ``++``. A family and a codec list their keys in YAML, where an unknown one is an error, unless they have a
    ``_target_``.
    """
    closed = {group for group in BUILT if not any(override.startswith(f"{group}._target_=") for override in overrides)}
    return [_rewrite_one(settings, override, closed, multirun) for override in overrides]


def _rewrite_one(settings: type, override: str, closed: set[str], multirun: bool) -> str:
    match = re.fullmatch(r"([\w.]+)=(.*)", override, re.DOTALL)
    if match is None:
        return override
    key, value = match.groups()
    hint = hint_of(settings, key)
    group = key.partition(".")[0]
    if key.endswith("._target_") or ("." in key and group not in closed and (hint is Any or is_mapping(hint))):
        return f"++{override}"
    is_quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    if multirun or not value or value == "null" or is_quoted or "${" in value or not is_text(hint):
        return override
    return f"{key}={QuotedString(value, Quote.single).with_quotes()}"


def explain(error: Exception, name: str, settings: type, overrides: Sequence[str] = (),
            config_dir: str | None = None, config_name: str | None = None) -> str:
    """One sentence, with the key and the cure, for an error of Hydra or OmegaConf while composing."""
    message = str(error) or str(error.__cause__ or type(error).__name__)
    if isinstance(error, MissingConfigException) and error.options and error.missing_cfg_file:
        group, _, option = error.missing_cfg_file.rpartition("/")
        options = ", ".join(option for option in error.options if not option.startswith("_"))
        return f"{group}={option} does not exist; choose one of {options}."
    if isinstance(error, OverrideParseException):
        key, equals, value = error.override.partition("=")
        if not equals:
            return f"{error.override} is not a setting: write key=value."
        return f"{error.override} cannot be read: quote a value with signs in it twice, '{key}=\"{value}\"'."
    if match := re.match(r"Ambiguous value for argument '(.*?)'\n", message):
        key, _, value = match.group(1).partition("=")
        return (f"{match.group(1)} names several values; add --multirun to run each, or write {key}=[{value}] for a "
                "list.")
    if match := re.match(r"Could not override '([^']+)'", message):
        key = match.group(1)
        others = [override for override in overrides if override.partition("=")[0] != key]
        with suppress(Exception):  # made only to find a near match, it may fail for another reason
            return _unknown_key(_compose(name, settings, others, config_dir, config_name), key)
        return f"{key} is not a setting."
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} is missing: give {error.full_key}=… on the command line."
    if match := re.match(r"ValueError raised while resolving interpolation: (.*)", message):
        return match.group(1)  # from a resolver of ours
    if isinstance(error, OmegaConfBaseException):
        return f"{error.full_key or 'The configuration'} cannot be read: {message.splitlines()[0]}."
    cause = f": {str(error.__cause__).splitlines()[0]}" if isinstance(error, ConfigCompositionException) and str(
        error) and error.__cause__ is not None else ""
    return re.sub(r"\s+", " ", message.partition("\nConfig search path:")[0]).strip().rstrip(".") + cause + "."


def _unknown_key(config: Any, key: str) -> str:
    """Which part of a dotted ``key`` is not in ``config``, and what is near it."""
    node = config
    walked: list[str] = []
    for part in key.split("."):
        if not isinstance(node, (Mapping, DictConfig)):
            return f"{'.'.join(walked)} is a single value and has no {part} in it."
        if part not in node:
            near = did_you_mean(part, [str(name) for name in node], ".".join(walked))
            return f"{'.'.join([*walked, part])} is not a setting{near}"
        walked.append(part)
        if OmegaConf.is_interpolation(node, part):
            given = OmegaConf.to_container(node, resolve=False)[part]  # type: ignore[index, call-overload]
            return f"{key} cannot be set, as {'.'.join(walked)} is {given}; set that."
        node = node[part]
    return f"{key} cannot be set."
