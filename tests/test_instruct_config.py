"""The forms of configuration that the original's users know, under our names: each line of its README has a test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from avray.cli import TRAIN, compose
from avray.config import TrainSettings, from_mapping
from avray.families.instruct import Instruct
from avray.registry import family_from_settings, family_settings, saved_family
from avray.settings import composing


def family(*overrides: str) -> Any:
    return family_from_settings(compose(TRAIN, ["family=instruct", *overrides]).family)


@pytest.mark.parametrize("name", ["prefix", "cross_attention", "plain"])
def test_an_inner_group(name: str) -> None:
    """model/content_adapter=prefix_adapter"""
    assert family(f"family/adapter={name}").adapter.name == name


def test_an_inner_group_that_is_not_there_names_those_that_are() -> None:
    with pytest.raises(Exception) as caught:
        family("family/adapter=prefx")
    said = composing.explain(caught.value, "train", TrainSettings, ["family/adapter=prefx"])
    assert "family/adapter=prefx does not exist; choose one of cross_attention, plain, prefix" in said


def test_nested_fields() -> None:
    """model.backbone.depth=8, +data_dict.x.test.max_samples=100"""
    made = family("family.network.width=64", "family.network.num_heads=2", "family.text_heads=2",
                  "family.network.patch=4", "family.adapter.num_layers=3",
                  "family.tasks=[text_to_music,singing]", "family.adapter.name=plain")
    assert (made.network.width, made.network.patch, made.adapter.num_layers) == (64, 4, 3)
    assert made.tasks == ("text_to_music", "singing")
    settings = compose(TRAIN, ["data.mix=[{path: /a, max_samples: 100}]", "trainer.optimizer.lr=5e-5"])
    assert settings.data.mix[0].max_samples == 100 and settings.trainer.optimizer.lr == 5e-5


def own_folder(tmp_path: Path) -> Path:
    """A root of one's own, as --config-path and --config-name take it: packages, resolvers and avray's groups."""
    (tmp_path / "mine.yaml").write_text(
        "defaults:\n"
        "  - _train\n"
        "  - family: instruct\n"
        "  - codec: spectral\n"
        "  - data: demo\n"
        "  - trainer: default\n"
        "  - setup@trainer: quick\n"
        "  - _self_\n"
        "  - override family/adapter: cross_attention\n"
        "family:\n"
        "  tasks: [singing, enhancement]\n"
        "  segment_s: ${multiply:1.5,2}\n"
        "trainer:\n"
        "  max_steps: ${multiply:${len:${family.tasks}},50}\n")
    (tmp_path / "setup").mkdir()
    (tmp_path / "setup" / "quick.yaml").write_text(
        "batch_size: 4\noptimizer: {name: radam, lr: 1e-3}\nschedule: {name: linear, warmup_steps: 7}\n"
        "hooks: [{_target_: tests.test_pipelines.KillOnce}]\n")
    return tmp_path


def test_packages_resolvers_and_training_objects_in_a_root_of_ones_own(tmp_path: Path) -> None:
    """defaults: a@b: c, ${len:…}, ${multiply:…}, optimizer, lr_scheduler, warm-up, epochs and callbacks in YAML"""
    given = ["trainer.schedule.warmup_steps=9"]
    mapping = composing.compose("train", TrainSettings, given, own_folder(tmp_path), "mine")
    settings = from_mapping(TrainSettings, mapping)
    made = family_from_settings(settings.family)
    assert isinstance(made, Instruct) and made.adapter.name == "cross_attention" and made.segment_s == 3.0
    assert settings.trainer.max_steps == 100 and settings.trainer.batch_size == 4
    assert settings.trainer.optimizer.name == "radam" and settings.trainer.schedule.warmup_steps == 9
    assert settings.trainer.hooks[0]["_target_"] == "tests.test_pipelines.KillOnce"


@pytest.mark.parametrize(("overrides", "reason"), [
    (["trainer.optimizer=null"], "trainer.optimizer"), (["trainer.schedule=null"], "trainer.schedule"),
    (["trainer.optimizer.name=lion"], "trainer.optimizer.name"), (["trainer.hooks=[{}]"], r"trainer.hooks\[0\] needs"),
    (["family.name=null"], "family.name"), (["family.network=null"], "family.network"),
    (["family.adapter=null"], "family.adapter"), (["family.network.depth=3"], "depth"),
])
def test_a_training_object_that_is_missing_or_unknown_is_named(overrides: list[str], reason: str) -> None:
    with pytest.raises(Exception, match=reason):
        family(*overrides)


def test_a_checkpoint_holds_plain_values_and_builds_an_equal_family() -> None:
    made = family("family/adapter=prefix", "family.num_steps=7")
    saved = family_settings(made)
    assert saved_family(saved) == made and "_target_" not in str(saved)
