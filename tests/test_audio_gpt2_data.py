"""What audio_gpt2 cannot learn from is rejected with its reason, and the rest goes on; the original's files."""

from __future__ import annotations

import json
import os
import wave
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from avray.cli import GENERATE, PREPARE, TRAIN, compose, without_aliases
from avray.codecs.spectral import Spectral
from avray.config import DataSettings
from avray.data.cache import Cache
from avray.data.dataset import open_dataset
from avray.data.embed import Embedder
from avray.data.embeddings import write_chunks, write_embeddings
from avray.data.manifest import load_manifest
from avray.engine import Engine, Generator, resampled
from avray.errors import DataError
from avray.families.audio_gpt2 import AudioGPT2
from avray.family import Request
from avray.media import read_audio
from tests.test_manifest import sound
from tests.tiny_codec import WIDTH, TinyConfig


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


def test_frames_of_overlapping_windows_are_those_of_the_whole(tmp_path: Path) -> None:
    """A recording over a minute goes through the network as a stream."""
    sound(tmp_path / "talk.wav", 70.0)
    (tmp_path / "talk.ctm").write_text("".join(f"talk 1 {0.37 * i:.3f} 0.37 w{i}\n" for i in range(180)))
    family = AudioGPT2(Spectral(), segment_s=8.0, overlap_s=3.0)
    data = DataSettings(path=str(tmp_path / "talk.wav"), cache=str(tmp_path / "cache"), validation_fraction=0.0)
    plan = open_dataset(family, data).plans["train"]
    cache, column = Cache(data.cache), family.columns(None)[0]
    whole, = Spectral().load("cpu").encode_batch([resampled(read_audio(str(tmp_path / "talk.wav")), 24_000)])
    number = 0
    for shard in plan.shards:
        assert Embedder(column, cache).ensure(shard)
        for unit, frames in zip(shard.units, cache.read(shard, column), strict=True):
            first = round(unit.start_s * 75)
            assert len(frames) == round(unit.duration_s * 75) <= 600
            inner = slice(3, -3)  # where the recording is entered, the resampler's edge differs
            np.testing.assert_allclose(frames[inner], whole[first : first + len(frames)][inner], atol=0.02)
            number += 1
    assert number >= 12


# The original's .pt -------------------------------------------------------------------------------------------------

class Bomb:
    def __reduce__(self):
        return os.system, ("touch /tmp/never",)


def pt(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def test_vectors_by_name(tmp_path: Path) -> None:
    """Each name has its own text, whatever fails beside it."""
    vectors: dict[str, object] = {f"talk{i // 4}_chunk_{i % 4}": torch.full((6,), float(i)) for i in range(20)}
    vectors |= {"talk0_chunk_1.wav": torch.zeros(6), "number": 3, "wide": torch.zeros(7),
                "nan": torch.full((6,), float("nan")), "none": torch.zeros(0), "frames": torch.ones(5, 6).half()}
    pt(tmp_path / "embeddings.pt", vectors)
    words = tmp_path / "words"
    words.mkdir()
    for name in [*vectors, "lost"]:
        if name not in ("talk0_chunk_2", "talk0_chunk_1.wav"):
            (words / f"{name}.txt").write_text(f"text of {name}")
    manifest = load_manifest(tmp_path / "embeddings.pt", texts=str(words))
    assert manifest.format == "embeddings" and len(manifest.rows) == 21
    for row in manifest.rows:
        assert row.get("text") == (None if row["id"] == "talk0_chunk_2" else f"text of {row['id']}")
    assert manifest.rows[5]["embedding"] == [5.0] * 6 and np.shape(manifest.rows[-1]["embedding"]) == (5, 6)
    assert {row["group"] for row in manifest.rows} == {"frames", *(f"talk{i}" for i in range(5))}
    reasons = {reject.source.partition(":")[2] or reject.source: reject.reason for reject in manifest.rejects}
    assert reasons.keys() == {"talk0_chunk_1.wav", "number", "wide", "nan", "none", "lost.txt"}
    for name, needle in {"number": "a int", "wide": "7 numbers", "nan": "finite", "none": "shape",
                         "lost.txt": "no vector", "talk0_chunk_1.wav": "already"}.items():
        assert needle in reasons[name]


def test_a_pt_of_more_than_tensors_is_rejected_and_the_rest_goes_on(tmp_path: Path) -> None:
    pt(tmp_path / "good.pt", {"a": torch.zeros(3)})
    pt(tmp_path / "bomb.pt", {"a": torch.zeros(3), "b": Bomb()})
    pt(tmp_path / "model.pt", torch.nn.Linear(2, 2))
    pt(tmp_path / "list.pt", [torch.zeros(3)])
    (tmp_path / "junk.pt").write_bytes(b"PK\x03\x04junk")
    with zipfile.ZipFile(tmp_path / "good.pt") as good, zipfile.ZipFile(tmp_path / "tight.pt", "w",
                                                                       zipfile.ZIP_DEFLATED) as tight:
        for entry in good.infolist():
            tight.writestr(entry.filename, good.read(entry))
    manifest = load_manifest(tmp_path)
    assert [row["id"] for row in manifest.rows] == ["a"]
    found = {reject.source: reject.reason for reject in manifest.rejects}
    needles = {"bomb.pt": "more than tensors", "model.pt": "more than tensors", "list.pt": "not a dictionary",
               "junk.pt": "cannot be read", "tight.pt": "compressed"}
    assert found.keys() == needles.keys() and not Path("/tmp/never").exists()
    for name, needle in needles.items():
        assert needle in found[name], (name, found[name])
    assert "system" in found["bomb.pt"]


def test_it_learns_from_vectors(tmp_path: Path) -> None:
    """segment → the column → fit → collate, and a request with a vector of its own."""
    words = ("no", "yes", "go")
    (tmp_path / "texts").mkdir()
    for index in range(12):
        (tmp_path / f"texts/row{index}x.txt").write_text(words[index % 3])
    pt(tmp_path / "e.pt", {f"row{i}x": torch.eye(3)[i % 3] for i in range(12)})
    rows = load_manifest(tmp_path / "e.pt", texts=str(tmp_path / "texts")).rows
    family = AudioGPT2(TinyConfig(), hears="embedding", stem="linear", context=8, width=32, num_layers=1, num_heads=2,
                       dropout=0.0)
    assert family.refusal({"text": "x", "audio": "a.wav", "duration_s": 1.0}) is not None
    examples = [example for row in rows for example in family.segment([row])]
    column, = family.columns(None)
    given = column.encoder.load("cpu").encode_batch([e.units["audio"].source for e in examples])
    made = [{**e.fields, "id": e.id, "weight": 1.0, "audio.features": frames}
            for e, frames in zip(examples, given, strict=True)]
    fitted = family.fit(iter(made))
    model = family.build(fitted)
    family.init(model, torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    batch = family.collate(made, fitted)
    for _ in range(60):
        optimizer.zero_grad()
        family.loss(model, batch, torch.Generator())["text"].div(batch.counts["text"]).backward()
        optimizer.step()
    generator = Generator(Engine(family, model.eval(), fitted, 2))
    question = family.question(examples[1])
    assert generator.generate_many([Request(fields=question.fields)])[0].media == question.target.source == "yes"
    with pytest.raises(ValueError, match="embedding is missing"):
        generator.generate(prompt="x")


@pytest.mark.parametrize("given", ["--audio_dir=/a --transcripts_dir /t --output_file o.pt --verbose",
                                   "audio_dir=/a transcripts_dir=/t output_file=o.pt verbose=true"])
def test_the_originals_words(given: str) -> None:
    words = without_aliases(PREPARE, given.split())
    settings = compose(PREPARE, words)
    assert (settings.data.path, settings.data.texts, settings.logging.progress) == ("/a", "/t", "on")
    assert settings.output_file == str(Path("o.pt").absolute())
    asked = compose(GENERATE, without_aliases(GENERATE, ["--model_path", "/m", "--input_text=so, then",
                                                         "audio_file=/x.wav", "seed=1"]))
    assert (asked.checkpoint, asked.prompt, asked.audio, asked.seed) == ("/m", "so, then", "/x.wav", 1)
    assert without_aliases(TRAIN, given.split()) == given.split()


def test_windows_are_written_as_the_originals_files(tmp_path: Path) -> None:
    """Vectors, sounds and texts have the same names, and are read back as they were; a window that was lost shifts no
    other's name."""
    sound(tmp_path / "set/a/talk.wav", 9.0)
    sound(tmp_path / "set/b/talk.wav", 3.0, seed=1)
    for folder, count in (("a", 9), ("b", 3)):
        (tmp_path / f"set/{folder}/talk.srt").write_text("\n".join(
            f"{i}\n00:00:0{i},000 --> 00:00:0{i},900\n{folder} {i}\n" for i in range(count)))
    family = AudioGPT2(TinyConfig(), segment_s=3.0, overlap_s=1.0)
    data = DataSettings(path=str(tmp_path / "set"), cache=str(tmp_path / "cache"), split_by="group")
    plans = list(open_dataset(family, data).plans.values())
    cache, columns = Cache(data.cache), family.columns(None)
    for plan in plans:
        for shard in plan.shards:
            frames = [None if abs(unit.start_s - 2.0) < 0.1 and "/a/" in unit.source
                      else np.full((4, WIDTH), index, np.float16) for index, unit in enumerate(shard.units)]
            lost = {index: "it broke" for index, one in enumerate(frames) if one is None}
            cache.write(shard, columns[0], frames, lost)
    assert write_embeddings(str(tmp_path / "out.pt"), plans, cache, columns) == 4
    assert write_chunks(str(tmp_path / "chunks"), plans) == 5
    read = {row["id"]: row for row in load_manifest(tmp_path / "out.pt", texts=str(tmp_path / "chunks")).rows}
    chunks = {row["id"]: row for row in load_manifest(tmp_path / "chunks").rows}
    assert set(chunks) - set(read) == {"a_talk@2.000-4.900"}
    for name, row in read.items():
        assert row["text"] == chunks[name]["text"] and row["text"].startswith(name[0])
        assert chunks[name]["duration_s"] == pytest.approx(2.9, abs=0.01) and len(row["embedding"]) == WIDTH
    assert {row["group"] for row in read.values()} == {"a_talk", "b_talk"}
