"""Settings: conversion, checks, and every YAML that ships."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st

from avray import cli
from avray.config import (
    DataSettings,
    EvaluateSettings,
    GenerateSettings,
    PrepareSettings,
    TrainerSettings,
    TrainSettings,
    from_mapping,
    instantiate,
    to_mapping,
)
from avray.settings import composing
from avray.settings.describe import describe

COMMANDS = {command.name: command for command in (cli.TRAIN, cli.PREPARE, cli.EVALUATE, cli.GENERATE, cli.SWEEP)}


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (composing.CONF_DIR / group).glob("[!_]*.yaml"))


@dataclass(frozen=True)
class Inner:
    rate: float = 1.0
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Everything:
    number: int
    share: float | None = None
    flag: bool = False
    text: str = ""
    kind: Literal["one", "two"] = "one"
    either: int | str = 0
    pair: tuple[int, float] = (0, 0.0)
    many: list[int] = field(default_factory=list)
    inner: Inner = Inner()
    inners: tuple[Inner, ...] = ()
    table: Mapping[str, float] = field(default_factory=dict)
    anything: Any = None


finite = st.floats(allow_nan=False, allow_infinity=False, min_value=-1e300, max_value=1e300)
inners = st.builds(Inner, rate=finite, names=st.lists(st.text()).map(tuple))
everything = st.builds(
    Everything, number=st.integers(), share=st.none() | finite, flag=st.booleans(), text=st.text(),
    kind=st.sampled_from(["one", "two"]), either=st.integers() | st.text(), pair=st.tuples(st.integers(), finite),
    many=st.lists(st.integers()), inner=inners, inners=st.lists(inners).map(tuple),
    table=st.dictionaries(st.text(), finite), anything=st.none() | st.booleans() | st.text() | st.lists(st.integers()))


@limits(deadline=None)
@given(everything)
def test_round_trip(settings: Everything) -> None:
    mapping = to_mapping(settings)
    assert from_mapping(Everything, mapping) == settings
    assert from_mapping(Everything, json.loads(json.dumps(mapping))) == settings


@limits(deadline=None)
@given(batch_size=st.integers(8, 4096), lr=st.floats(1e-9, 10), steps=st.none() | st.integers(1, 10**9),
       path=st.none() | st.text(st.characters(exclude_characters="\0"), min_size=1),
       groups=st.lists(st.text(), max_size=3), seed=st.integers(0, 2**63 - 1))
def test_real_settings_round_trip(batch_size: int, lr: float, steps: int | None, path: str | None,
                                  groups: list[str], seed: int) -> None:
    settings = from_mapping(TrainSettings, {
        "seed": seed, "data": {"path": path, "holdout_groups": groups},
        "trainer": {"batch_size": batch_size, "optimizer": {"lr": lr}, "stop_at_step": steps}})
    assert from_mapping(TrainSettings, json.loads(json.dumps(to_mapping(settings)))) == settings


@pytest.mark.parametrize(("mapping", "sentence"), [
    ({"trainer": {"batchsize": 3}}, "trainer.batchsize is not a setting; did you mean trainer.batch_size?"),
    ({"trainer": {"optimizer": {"rl": 3}}}, "trainer.optimizer.rl is not a setting"),
    ({"trainr": {}}, "trainr is not a setting; did you mean trainer?"),
    ({"trainer": 3}, "trainer must be a group of keys, got 3."),
    ({"trainer": {"batch_size": 0}}, "trainer.batch_size must be at least 1, got 0."),
    ({"trainer": {"batch_size": "many"}}, "trainer.batch_size must be a whole number, got 'many'."),
    ({"trainer": {"batch_size": 1.5}}, "trainer.batch_size must be a whole number, got 1.5."),
    ({"trainer": {"batch_size": True}}, "trainer.batch_size must be a whole number, got True."),
    ({"trainer": {"batch_size": math.inf}}, "trainer.batch_size must be a whole number, got inf."),
    ({"trainer": {"batch_size": None}}, "trainer.batch_size must be a whole number, got None."),
    ({"trainer": {"use_gpu": 1}}, "trainer.use_gpu must be true or false, got 1."),
    ({"trainer": {"optimizer": {"lr": math.nan}}}, "trainer.optimizer.lr must be a number, got nan."),
    ({"trainer": {"optimizer": {"lr": 0}}}, "trainer.optimizer.lr must be above 0, got 0.0."),
    ({"trainer": {"optimizer": {"betas": [0.9]}}}, "trainer.optimizer.betas must be a list of 2, got 1."),
    ({"trainer": {"optimizer": {"betas": [0.9, "x"]}}}, "trainer.optimizer.betas[1] must be a number, got 'x'."),
    ({"trainer": {"precision": "bf61"}},
     "trainer.precision must be one of fp32, bf16, fp16, got 'bf61'; did you mean bf16?"),
    ({"trainer": {"precision": "fp16"}}, "trainer.precision=fp16 needs a GPU"),
    ({"trainer": {"device": "cuda"}}, "trainer.device=cuda needs trainer.use_gpu=true."),
    ({"trainer": {"device": "cpu", "use_gpu": True}}, "trainer.device=cpu needs trainer.use_gpu=false"),
    ({"trainer": {"max_steps": None}}, "trainer.max_steps and trainer.max_epochs are both null"),
    ({"trainer": {"num_workers": 4, "accumulate": 5}}, "trainer.batch_size (16) must be at least"),
    ({"trainer": {"early_stopping_patience": 1, "validate_every_steps": 0}},
     "trainer.early_stopping_patience needs trainer.validate_every_steps above 0."),
    ({"trainer": {"schedule": {"name": "plateau"}, "validate_every_steps": 0}},
     "trainer.schedule.name=plateau needs trainer.validate_every_steps above 0."),
    ({"trainer": {"schedule": {"warmup_steps": 300}}}, "trainer.schedule.warmup_steps (300) must be below"),
    ({"trainer": {"hooks": [{}]}}, "trainer.hooks[0] needs a _target_"),
    ({"trainer": {"hooks": "x"}}, "trainer.hooks must be a list such as [a,b], got 'x'."),
    ({"data": {"validation_fraction": 1}}, "data.validation_fraction must be from 0 to below 1, got 1.0."),
    ({"data": {"texts": "x"}}, "data.texts needs data.path"),
    ({"data": {"path": ""}}, "path is empty"),
    ({"data": {"path": 1.5}}, "data.path must be text, got 1.5"),
    ({"run": {"dir": ""}}, "run.dir is empty"),
    ({"seed": -1}, "seed must be from 0 to 2^63 - 1, got -1."),
    ({"seed": 2**63}, "seed must be from 0 to 2^63 - 1"),
    ({"resume": True, "init_from": "x"}, "resume=true goes on with run.dir and init_from starts a new run"),
])
def test_error_names_the_key(mapping: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as caught:
        from_mapping(TrainSettings, mapping)
    assert str(caught.value).startswith(sentence)
    assert str(caught.value)[-1] in ".?" and "\n" not in str(caught.value)


@pytest.mark.parametrize(("cls", "mapping", "word"), [
    (GenerateSettings, {}, "checkpoint is missing"),
    (GenerateSettings, {"checkpoint": "x", "top_p": 0.0}, "top_p"),
    (GenerateSettings, {"checkpoint": "x", "seconds": 0}, "seconds must be above 0"),
    (GenerateSettings, {"checkpoint": "x", "prompt": "a", "data": {"path": "b"}}, "data.path gives one request a row"),
    (EvaluateSettings, {}, "Give checkpoint="),
    (EvaluateSettings, {"checkpoint": "x", "codec": {"name": "spectral"}}, "one of the two"),
    (EvaluateSettings, {"checkpoint": "x", "num_codebooks": [0]}, "num_codebooks"),
    (Everything, {}, "number is missing."),
])
def test_commands_check_themselves(cls: type, mapping: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        from_mapping(cls, mapping)


def test_near_types_are_taken() -> None:
    settings = from_mapping(TrainSettings, {"trainer": {"max_steps": 1e4, "clip_norm": 1}, "run": {"dir": 2024}})
    assert settings.trainer.max_steps == 10_000 and isinstance(settings.trainer.max_steps, int)
    assert isinstance(settings.trainer.clip_norm, float)
    assert settings.run.dir.endswith("/2024")


def test_paths_are_absolute_and_urls_stay(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AVRAY_CACHE", str(tmp_path / "cache"))
    data = DataSettings(path="a", texts="~/b")
    assert data.path == str(tmp_path / "a") and not data.texts.startswith("~")
    assert data.cache == str(tmp_path / "cache") and data.demo_dir == str(tmp_path / "cache" / "demo")
    assert DataSettings(path="s3://bucket/a", cache="gs://b").path == "s3://bucket/a"


def test_defaults_that_follow() -> None:
    trainer = TrainerSettings()
    assert (trainer.device_name, trainer.num_threads, trainer.samples_every) == ("cpu", 1, trainer.validate_every_steps)
    trainer = TrainerSettings(use_gpu=True, cpus_per_worker=2.5, sample_every_steps=0)
    assert (trainer.device_name, trainer.num_threads, trainer.samples_every) == ("cuda", 2, 0)
    assert replace(trainer, threads_per_worker=1).num_threads == 1


def test_every_setting_is_explained() -> None:
    for command in COMMANDS.values():
        described = {setting.key: setting.meaning for setting in describe(command.settings)}
        unexplained = [key for key, meaning in described.items() if not meaning]
        assert not unexplained
        assert set(command.keys) <= set(described) | set(command.extra_keys)


# What ships.

@pytest.mark.parametrize("name", COMMANDS)
def test_roots_hold_every_setting(name: str) -> None:
    """So that any setting can be given without a ``+``."""
    command = COMMANDS[name]
    mapping = composing.compose(name, command.settings)
    missing = [key for key in _keys(command.settings) if not _holds(mapping, key)]
    assert not missing
    if command.settings in (TrainSettings, PrepareSettings):
        default = from_mapping(command.settings, {})
        settings = from_mapping(command.settings, mapping)
        assert (settings.trainer, settings.data, settings.logging) == (default.trainer, default.data, default.logging)


def _keys(cls: type) -> list[str]:
    return [setting.key for setting in describe(cls) if setting.key not in ("family", "codec")]


def _holds(mapping: Any, key: str) -> bool:
    for name in key.split("."):
        if name not in mapping:
            return False
        mapping = mapping[name]
    return True


SHIPPED = [f"{group}={option}" for group in ("family", "codec", "data", "trainer", "experiment")
           for option in options(group)]


@pytest.mark.parametrize("choice", SHIPPED)
def test_every_yaml_composes_converts_and_builds(choice: str, tmp_path: Any) -> None:
    from avray.codecs import codec_from_settings
    from avray.registry import family_from_settings

    needed = {"data=folder": f"data.path={tmp_path}", "family=own": "family._target_=avray.families.codec_lm.CodecLM"}
    overrides = [choice, *([needed[choice]] if choice in needed else [])]
    settings = cli.compose(cli.TRAIN, overrides)
    assert settings == from_mapping(TrainSettings, to_mapping(settings))
    codec = codec_from_settings(settings.codec)
    family = family_from_settings(settings.family)
    assert codec.name == settings.codec["name"]
    assert set(settings.codec) == {"name"} | {field.name for field in fields(codec) if field.init}
    assert is_dataclass(family) and family.segment_s > 0
    if choice.startswith("family=") and choice != "family=own":
        listed = {key for key in settings.family if key != "name"}
        assert listed == {field.name for field in fields(family) if field.init}, "family YAML lists each field once"


def test_inner_groups_and_nested_fields() -> None:
    settings = cli.compose(cli.TRAIN, ["trainer=debug", "trainer.optimizer.lr=0.5", "trainer.optimizer.betas=[0.8,0.9]",
                                       "trainer.schedule.name=linear", "data.limits.max_seconds=60",
                                       "data.path=a (live), 1=2", "family.segment_s=3", "codec=spectral"])
    assert settings.trainer.max_steps == 4 and settings.trainer.optimizer.lr == 0.5
    assert settings.trainer.optimizer.betas == (0.8, 0.9) and settings.trainer.schedule.name == "linear"
    assert settings.data.limits == {"max_seconds": 60} and settings.data.path.endswith("/a (live), 1=2")
    assert settings.family["segment_s"] == 3 and settings.family["codec"] == settings.codec


def test_a_family_of_ones_own_on_the_command_line() -> None:
    settings = cli.compose(cli.TRAIN, ["family=own", "family._target_=mine.Mine", "family.width=64", "family.x={a: 1}"])
    assert settings.family == {"name": "own", "_target_": "mine.Mine", "codec": settings.codec, "width": 64,
                               "x": {"a": 1}}


@pytest.mark.parametrize("text", ["a bell, then drums", "it's \\ 'so'", "x=y", "[1]", "${", "true", "1.50", "{", "\"",
                                  "a\nb"])
def test_free_text_needs_no_second_quotes(text: str) -> None:
    override = composing.rewrite(GenerateSettings, [f"prompt={text}"])
    if text == "${":  # an interpolation is the user's own
        assert override == ["prompt=${"]
        return
    settings = cli.compose(cli.GENERATE, [f"prompt={text}", "checkpoint=x"])
    assert settings.prompt == text


def test_text_that_is_quoted_already_or_swept_stays() -> None:
    assert composing.rewrite(GenerateSettings, ["prompt='a, b'", "prompt=null", "seed=1"]) == [
        "prompt='a, b'", "prompt=null", "seed=1"]
    assert composing.rewrite(GenerateSettings, ["prompt=a,b"], multirun=True) == ["prompt=a,b"]


def test_resolvers() -> None:
    from omegaconf import OmegaConf

    composing.register_resolvers()
    composing.register_resolvers()
    config = OmegaConf.create({"items": [1, 2, 3], "n": "${len:${items}}", "m": "${multiply:2,${n}}",
                               "s": "${add:1,2,3}", "d": "${divide:1,4}", "f": "${floor_divide:7,2}"})
    assert (config.n, config.m, config.s, config.d, config.f) == (3, 6, 6, 0.25, 3)


# Objects of one's own.

class Gain:
    def __init__(self, decibels: float, inside: Any = None) -> None:
        self.decibels, self.inside = decibels, inside


def test_instantiate_is_recursive() -> None:
    built = instantiate({"_target_": f"{__name__}.Gain", "decibels": 3,
                         "inside": [{"_target_": f"{__name__}.Inner", "rate": 2}]}, "hook")
    assert isinstance(built, Gain) and built.inside == [Inner(rate=2.0)]
    assert instantiate({"a": [1]}) == {"a": [1]}


@pytest.mark.parametrize(("mapping", "word"), [
    ({"_target_": "no_such_module.X"}, "hook._target_=no_such_module.X: there is no module no_such_module"),
    ({"_target_": f"{__name__}.Gian"}, "has no class or function Gian; did you mean Gain?"),
    ({"_target_": "Gain"}, "hook._target_ must be a dotted name"),
    ({"_target_": 3}, "hook._target_ must be a dotted name"),
    ({"_target_": f"{__name__}.Gain", "decibel": 3}, "hook does not fit Gain"),
    ({"_target_": f"{__name__}.Inner", "rat": 3}, "hook.rat is not a setting; did you mean hook.rate?"),
])
def test_instantiate_says_what_is_wrong(mapping: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError) as caught:
        instantiate(mapping, "hook")
    assert word in str(caught.value)


def test_an_error_inside_the_users_module_is_not_hidden(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_here.py").write_text("import not_installed_at_all\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="not_installed_at_all"):
        instantiate({"_target_": "broken_here.X"})
    assert "broken_here" not in sys.modules
