"""Families by name, and back to plain data."""

import json
import sys
import types
from dataclasses import dataclass, field

import pytest

from avray import registry
from avray.checkpoint import refuse_code
from avray.codecs.pretrained import Pretrained
from avray.codecs.spectral import Spectral
from avray.families.continuation import Continuation
from avray.registry import family_class, family_from_settings, family_settings, register, register_target
from tests.toy import ToyFamily


@pytest.fixture(autouse=True)
def _own_names(monkeypatch):
    monkeypatch.setattr(registry, "_registered", {})


@dataclass(frozen=True)
class Shape:
    """Stands for a nested choice: known by its name."""

    size: int = 1
    name: str = field(default="round", init=False)


@dataclass(frozen=True)
class Broken(ToyFamily):
    """Its settings do not survive: a set is no plain value."""

    tags: object = frozenset({"a"})


def test_every_own_family_is_found_by_its_name():
    for name in registry.OWN:
        assert family_class(name).__name__.lower() == name.replace("_", "")


def test_settings_build_the_family_and_come_back_as_data():
    family = family_from_settings({"name": "continuation", "codec": {"name": "spectral", "num_codebooks": 2},
                                   "segment_s": 3, "normalise": "change"})
    assert family == Continuation(Spectral(num_codebooks=2), segment_s=3.0, normalise="change")
    data = family_settings(family)
    assert (data["name"], data["codec"]["name"], data["codec"]["num_codebooks"]) == ("continuation", "spectral", 2)
    refuse_code(data)
    assert family_from_settings(json.loads(json.dumps(data))) == family


@pytest.mark.parametrize(("settings", "words"), [
    ({}, "family.name is missing.*codec_lm, continuation"),
    ({"name": "continuaton"}, "did you mean continuation"),
    ({"name": "zzz"}, "zzz is not known"),
    ({"name": "continuation"}, "family.codec is missing"),
    ({"name": "continuation", "codec": {"name": "spectral"}, "segmnt_s": 1}, "family.segmnt_s is not a setting"),
    ({"name": "continuation", "codec": {"name": "spectral"}, "segment_s": "long"}, "family.segment_s must be a number"),
    ({"name": "continuation", "codec": {"name": "spectrol"}}, "spectrol"),
    ({"_target_": "no.such.Family"}, "no module no"),
    ({"_target_": "avray.media.Audio"}, "it lacks segment"),
    ({"_target_": "json.dumps"}, "must be a dataclass")])
def test_what_is_wrong_is_named(settings, words):
    with pytest.raises(ValueError, match=words):
        family_from_settings(settings)


def test_a_class_of_ones_own():
    with pytest.raises(ValueError, match="has no name"):
        family_settings(ToyFamily())
    family = family_from_settings({"name": "own", "_target_": "tests.toy.ToyFamily", "segment_s": 2,
                                   "codec": {"name": "spectral"}})
    assert family == ToyFamily(segment_s=2.0)
    data = family_settings(family)
    assert data["name"] == "ToyFamily" and "_target_" not in data
    assert family_from_settings({"_target_": "tests.toy.ToyFamily"}) == ToyFamily(), "a second time is harmless"
    assert family_from_settings(data) == family


def test_avrays_own_by_target_keep_their_name():
    assert register_target("avray.families.continuation.Continuation") == "continuation"


def test_names_are_taken_once():
    with pytest.raises(ValueError, match="exists already"):
        register("continuation", ToyFamily)
    register("mine", ToyFamily)
    register("mine", ToyFamily)
    with pytest.raises(ValueError, match="exists already"):
        register("mine", Broken)


def test_settings_that_would_not_come_back_are_refused_before_training():
    register("broken", Broken)
    with pytest.raises(ValueError, match="do not build it again"):
        family_settings(Broken(tags=Shape()))


def test_installed_packages_bring_families(monkeypatch):
    module = types.ModuleType("some_plugin")
    module.Plugin = ToyFamily
    monkeypatch.setitem(sys.modules, "some_plugin", module)

    @dataclass
    class Entry:
        name: str
        value: str

    entries = [Entry("plugin", "some_plugin:Plugin"), Entry("continuation", "some_plugin:Plugin")]
    monkeypatch.setattr(registry, "entry_points", lambda group: entries if group == "avray.families" else [])
    assert family_from_settings({"name": "plugin", "segment_s": 4}) == ToyFamily(segment_s=4.0)
    assert family_class("continuation") is Continuation, "avray's own names stay its own"


def test_a_codec_with_weights_is_found_again_from_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    family = Continuation(codec=Pretrained("mimi", path="weights", num_codebooks=4))
    data = family_settings(family)
    monkeypatch.chdir("/")
    assert data["codec"]["path"] == str(tmp_path / "weights") and family_from_settings(data) == family
