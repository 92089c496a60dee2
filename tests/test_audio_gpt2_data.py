"""What audio_gpt2 cannot learn from is rejected with its reason, and the rest goes on."""

from __future__ import annotations

import json
import wave
from dataclasses import replace
from pathlib import Path

import pytest

from avray.config import DataSettings
from avray.data.dataset import open_dataset
from avray.errors import DataError
from avray.families.audio_gpt2 import AudioGPT2
from tests.test_manifest import sound
from tests.tiny_codec import TinyConfig


def rejects(path: Path) -> dict[str, str]:
    return {Path(line["source"]).stem: line["reason"] for line in map(json.loads, path.read_text().splitlines())}


@pytest.mark.parametrize("texts", ["beside", "apart"])
def test_bad_rows_are_rejected_and_the_rest_goes_on(tmp_path: Path, texts: str) -> None:
    folder = tmp_path / "set"
    words = folder if texts == "beside" else tmp_path / "words"
    words.mkdir(parents=True)
    for index, (name, seconds) in enumerate({"good0": 1.0, "good1": 2.0, "silent": 1.0, "blank": 1.0,
                                             "click": 0.05, "window": 20.0, "minute": 60.0}.items()):
        sound(folder / f"{name}.wav", seconds, seed=index)
        if name != "silent":
            (words / f"{name}.txt").write_text(" \n" if name == "blank" else f"text of {name}")
    with wave.open(str(folder / "talk.wav"), "wb") as file:  # 3 h at 1 kHz, 8 bits
        file.setparams((1, 1, 1000, 0, "NONE", ""))
        file.writeframes(bytes(range(100, 150)) * (3 * 3600 * 20))
    (words / "talk.txt").write_text("three hours in one text")
    (words / "nobody.txt").write_text("a text alone")
    (words / "nobody.srt").write_text("1\n00:00:00,000 --> 00:00:01,000\nalone\n")
    family = AudioGPT2(TinyConfig(), segment_s=20.0)
    data = DataSettings(path=str(folder), texts=str(words) if texts == "apart" else None, max_reject_fraction=0.9,
                        cache=str(tmp_path / "cache"), validation_fraction=0.3)
    dataset = open_dataset(family, data, tmp_path / "rejects.jsonl")
    examples = [example for plan in dataset.plans.values() for shard in plan.shards for example in shard.examples]
    assert {example.id: example.fields["text"] for example in examples} \
        == {name: f"text of {name}" for name in ("good0", "good1", "window")}
    found = rejects(tmp_path / "rejects.jsonl")
    expected = {"silent": "no text", "blank": "no text", "click": "0.050 s are too short",
                "minute": "60.0 s are longer", "talk": "10800.0 s are longer", "nobody": "no recording"}
    assert found.keys() == expected.keys()
    for name, needle in expected.items():
        assert needle in found[name], found[name]
    with pytest.raises(DataError, match="cannot be used"):
        open_dataset(family, replace(data, max_reject_fraction=0.01))


def test_three_hours_with_times_are_windows(tmp_path: Path) -> None:
    with wave.open(str(tmp_path / "talk.wav"), "wb") as file:
        file.setparams((1, 1, 1000, 0, "NONE", ""))
        file.writeframes(bytes(range(100, 150)) * (3 * 3600 * 20))
    (tmp_path / "talk.stm").write_text("".join(f"talk 1 ann {5 * i} {5 * i + 4} line {i}\n" for i in range(2160)))
    family = AudioGPT2(TinyConfig(), segment_s=20.0, overlap_s=5.0)
    dataset = open_dataset(family, DataSettings(path=str(tmp_path), cache=str(tmp_path / "cache")))
    assert dataset.choice.by == "span" and not dataset.manifest.rejects
    units = [unit for plan in dataset.plans.values() for shard in plan.shards for unit in shard.units]
    assert len(units) > 600 and max(unit.duration_s for unit in units) <= 20
