"""Every form of data set that is read as it lies, and every way in which a row can be bad."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import pickle
import wave
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from avray.data import probing
from avray.data.check import describe, render
from avray.data.formats import decode
from avray.data.manifest import Manifest, load_manifest
from avray.errors import DataError
from avray.media import Audio, Limits, Video, write_audio, write_video

RATE = 8_000


def sound(path: Path, seconds: float = 1.0, seed: int = 0) -> Path:
    """Noise, another for each seed, so that hashes differ."""
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = np.random.default_rng(seed).uniform(-0.5, 0.5, (1, int(seconds * RATE))).astype(np.float32)
    write_audio(path, Audio(samples, RATE))
    return path


def jsonl(path: Path, *rows: Any, encoding: str = "utf-8") -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_bytes("".join(f"{line}\n" for line in lines).encode(encoding))
    return str(path)


def ids(manifest: Manifest) -> list[str]:
    return [row["id"] for row in manifest.rows]


def reasons(manifest: Manifest) -> list[str]:
    return [f"{reject.source}:{reject.line}: {reject.reason}" for reject in manifest.rejects]


# Folders ----------------------------------------------------------------------------------------------------------

def test_folder_with_texts_beside(tmp_path: Path) -> None:
    for index, name in enumerate(("b.wav", "sub/a.flac", "c.ogg", "d.mp3", ".hidden.wav")):
        sound(tmp_path / name, seed=index)
    write_video(str(tmp_path / "e.m4a"), Video(np.zeros((5, 16, 16, 3), np.uint8), 5.0, Audio(
        np.zeros((1, RATE), np.float32), RATE)))
    (tmp_path / "b.txt").write_text("  a bell \n")
    (tmp_path / "README.txt").write_text("not a caption")
    manifest = load_manifest(tmp_path)
    assert manifest.format == "folder" and not manifest.rejects
    assert ids(manifest) == ["b", "c", "d", "e", "sub/a"]
    first = manifest.rows[0]
    assert first["audio"] == str(tmp_path / "b.wav") and first["text"] == "a bell" and first["group"] == "b"
    assert (first["start_s"], first["duration_s"], first["sample_rate_hz"], first["channels"]) == (0.0, 1.0, RATE, 1)
    assert "text" not in manifest.rows[1] and len({row["audio_hash"] for row in manifest.rows}) == 5


@pytest.mark.parametrize("inside", [True, False])
def test_folder_with_texts_in_another_folder(tmp_path: Path, inside: bool) -> None:
    for index, name in enumerate("ab"):
        sound(tmp_path / f"set/wavs/{name}.wav", seed=index)
    texts = tmp_path / ("set/texts" if inside else "words")
    texts.mkdir()
    (texts / "a.txt").write_text("one")
    (texts / "z.txt").write_text("nobody")
    manifest = load_manifest(tmp_path / "set", texts=None if inside else str(texts))
    assert [row.get("text") for row in manifest.rows] == ["one", None]
    assert len(manifest.rejects) == 1 and "no recording" in manifest.rejects[0].reason


def test_one_recording_and_a_folder_of_clips(tmp_path: Path) -> None:
    assert ids(load_manifest(sound(tmp_path / "book.wav"))) == ["book"]
    write_video(tmp_path / "clips.mp4", Video(np.zeros((5, 16, 16, 3), np.uint8), 5.0))
    row = load_manifest(tmp_path / "clips.mp4").rows[0]
    assert row["video"].endswith("clips.mp4") and len(row["video_hash"]) == 32
    assert row["duration_s"] == pytest.approx(1.0)


def test_bad_files_of_a_folder_are_rejected_by_name(tmp_path: Path) -> None:
    sound(tmp_path / "good.wav")
    (tmp_path / "empty.wav").touch()
    (tmp_path / "noise.flac").write_bytes(os.urandom(2000))
    with wave.open(str(tmp_path / "none.wav"), "wb") as file:
        file.setparams((1, 2, RATE, 0, "NONE", ""))
    sound(tmp_path / "latin.wav", seed=1)
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    manifest = load_manifest(tmp_path)
    assert ids(manifest) == ["good"]
    assert {reject.source for reject in manifest.rejects} == {"empty.wav", "noise.flac", "none.wav", "latin.wav"}
    for needle in ("empty", "no samples", "nothing that avray reads", "latin.txt is not valid UTF-8"):
        assert any(needle in reject.reason for reject in manifest.rejects)


def test_limits_apply_and_reach_the_memo_too(tmp_path: Path) -> None:
    sound(tmp_path / "a.wav", 3.0)
    memo = str(tmp_path / "memo/probes.json")
    assert len(load_manifest(tmp_path, memo_path=memo).rows) == 1
    assert "max_seconds" in load_manifest(tmp_path, memo_path=memo, limits=Limits(max_seconds=2)).rejects[0].reason


def test_an_unchanged_file_is_not_opened_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sound(tmp_path / "data/a.wav")
    memo = str(tmp_path / "probes.json")
    first = load_manifest(tmp_path / "data", memo_path=memo)
    opened: list[str] = []
    real = probing.content_hash
    monkeypatch.setattr(probing, "content_hash", lambda path: opened.append(path) or real(path))
    assert load_manifest(tmp_path / "data", memo_path=memo).rows == first.rows and not opened
    sound(tmp_path / "data/a.wav", 2.0, seed=5)
    changed = load_manifest(tmp_path / "data", memo_path=memo)
    assert len(opened) == 1 and changed.rows[0]["audio_hash"] != first.rows[0]["audio_hash"]
    Path(memo).write_text("{broken")
    assert load_manifest(tmp_path / "data", memo_path=memo).rows == changed.rows


# Lists ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("fields", [
    {"audio": "a.wav", "text": "hello", "duration_s": 0.5, "start_s": 0.25},
    {"audio_filepath": "a.wav", "text": "hello", "duration": 0.5, "offset": 0.25},  # NeMo
    {"path": "a.wav", "caption": "hello", "start": 0.25, "end": 0.75, "sample_rate": 8000},  # AudioCraft, and spans
    {"file_name": "a.wav", "transcription": "hello", "start_s": 0.25, "duration": "0.5"},  # Hugging Face
])
def test_jsonl_by_alias(tmp_path: Path, fields: dict[str, Any]) -> None:
    sound(tmp_path / "a.wav")
    row = load_manifest(jsonl(tmp_path / "list.jsonl", fields)).rows[0]
    assert row["text"] == "hello" and row["audio"] == str(tmp_path / "a.wav")
    assert (row["start_s"], row["duration_s"]) == (0.25, 0.5)
    assert row["id"] == "a@0.250-0.750" and row["group"] == "a" and row["manifest_line"] == 1
    assert row.get("sample_rate", 8000) == 8000


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_the_original_multitask_rows_in_any_encoding(tmp_path: Path, encoding: str) -> None:
    rows = [{"task": "audio", "instruction": "a bell, größer", "input": "", "output": "wav", "embedding": [0.5] * 4},
            {"task": "text", "instruction": "say\u2028it", "output": "it"}]
    manifest = load_manifest(jsonl(tmp_path / "mixed.jsonl", json.dumps(rows[0], ensure_ascii=False), "", json.dumps(
        rows[1], ensure_ascii=False), encoding=encoding))
    assert not manifest.rejects
    assert manifest.rows[0]["embedding"] == [0.5] * 4 and manifest.rows[0]["instruction"] == "a bell, größer"
    assert [row["manifest_line"] for row in manifest.rows] == [1, 3]
    assert manifest.rows[1]["instruction"] == "say\u2028it"
    assert len({row["id"] for row in manifest.rows} | {row["group"] for row in manifest.rows}) == 2


def test_every_bad_line_is_rejected_with_its_number(tmp_path: Path) -> None:
    sound(tmp_path / "a.wav")
    bad = ["{not json", "[1]", "[" * 100_000, {"label": "nothing"}, {"audio": 3}, {"audio": "gone.wav"},
           {"audio": "a.wav", "start_s": -1}, {"audio": "a.wav", "start_s": 2}, {"audio": "a.wav", "duration_s": 1.5},
           {"audio": "a.wav", "start_s": "soon"}, '{"audio": "a.wav", "weight": NaN}', '{"text": "\\ud800"}',
           {"audio": "a.wav", "split": "sideways"}, {"audio": "a.wav", "text": ["x"]}, {"audio": {"bytes": "QUJD"}}]
    content = jsonl(tmp_path / "list.jsonl", {"audio": "a.wav", "id": "x"}, *bad, {"audio": "a.wav", "id": "x"})
    with open(content, "ab") as file:
        file.write(b'{"text": "\xff"}\n{"audio": "a.wav", "id": "y"}\n')
    manifest = load_manifest(content)
    assert ids(manifest) == ["x", "y"]
    assert [reject.line for reject in sorted(manifest.rejects, key=lambda reject: reject.line)] == list(range(2, 19))
    by_line = {reject.line: reject.reason for reject in manifest.rejects}
    expected = {2: "not JSON", 3: "object", 5: "names no audio", 7: "does not exist", 9: "does not lie",
                10: "does not lie", 11: "finite", 12: "finite", 14: "sideways", 17: "line 1 already", 18: "UTF-8"}
    for line, needle in expected.items():
        assert needle in by_line[line], (line, by_line[line])


def test_spans_are_clipped_by_a_rounding_only(tmp_path: Path) -> None:
    sound(tmp_path / "a.wav")
    manifest = load_manifest(jsonl(tmp_path / "l.jsonl", {"audio": "a.wav", "duration": 1.004}, {
        "audio": "a.wav", "start_s": 0.5, "duration": 0.55}))
    assert [(row["start_s"], row["duration_s"]) for row in manifest.rows] == [(0.0, 1.0), (0.5, 0.5)]


def test_ids_are_stable_and_unique(tmp_path: Path) -> None:
    sound(tmp_path / "a.wav", seed=1)
    sound(tmp_path / "a.flac", seed=2)
    manifest = load_manifest(jsonl(tmp_path / "l.jsonl", {"audio": "a.wav", "text": "one"}, {"audio": "a.flac"},
                                   {"audio": "a.wav", "text": "two"}, {"audio": "a.wav", "text": "three"}))
    assert ids(manifest) == ["a", "a.flac", "a#2", "a#3"]


def test_given_group_split_and_weight(tmp_path: Path) -> None:
    sound(tmp_path / "a.wav")
    row = load_manifest(jsonl(tmp_path / "l.jsonl", {"audio": "a.wav", "speaker_id": 17, "split": "dev", "weight": 2,
                                                     "key": 5, "mood": "sad"})).rows[0]
    assert (row["group"], row["split"], row["weight"], row["id"], row["mood"]) == ("17", "validation", 2.0, "5", "sad")


def test_csv_with_a_file_column(tmp_path: Path) -> None:
    sound(tmp_path / "wavs/a.wav")
    write_video(str(tmp_path / "wavs/clip.mp4").replace("wavs/", ""), Video(np.zeros((5, 16, 16, 3), np.uint8), 5.0))
    (tmp_path / "MANIFEST.csv").write_text(
        'file,text,label\nwavs/a.wav,"two\nlines, and a comma",x\nclip.mp4,,y\nwavs/a.wav,short\n\n')
    manifest = load_manifest(tmp_path)
    assert manifest.format == "csv" and manifest.rows[0]["text"] == "two\nlines, and a comma"
    assert "video" in manifest.rows[1] and "text" not in manifest.rows[1] and manifest.rows[1]["label"] == "y"
    assert reasons(manifest) == ["MANIFEST.csv:5: the line has 2 fields, not 3"]
    (tmp_path / "odd.csv").write_text("x,y\n1,2\n")
    with pytest.raises(DataError, match="names no field"):
        load_manifest(tmp_path / "odd.csv")


@pytest.mark.parametrize("separator", ["\t", "|", ";"])
def test_tables_with_other_separators(tmp_path: Path, separator: str) -> None:
    sound(tmp_path / "a.wav")
    (tmp_path / "metadata.csv").write_text(f"audio_file{separator}text\na.wav{separator}hi\n")
    manifest = load_manifest(tmp_path)
    assert manifest.format == "csv" and manifest.rows[0]["text"] == "hi"


def test_ljspeech(tmp_path: Path) -> None:
    sound(tmp_path / "wavs/LJ001-0001.wav")
    (tmp_path / "metadata.csv").write_text('LJ001-0001|He said "12|He said "twelve\nLJ001-0002|gone|gone\nbroken\n')
    manifest = load_manifest(tmp_path)
    assert manifest.format == "ljspeech" and ids(manifest) == ["LJ001-0001"]
    assert manifest.rows[0]["text"] == 'He said "twelve'
    assert sorted(reject.line for reject in manifest.rejects) == [2, 3]


def test_librispeech(tmp_path: Path) -> None:
    for index, name in enumerate(("84/121123/84-121123-0000", "84/121123/84-121123-0001", "174/50561/174-50561-0000")):
        sound(tmp_path / f"{name}.flac", seed=index)
    (tmp_path / "84/121123/84-121123.trans.txt").write_text("84-121123-0000 GO DO\n84-121123-0009 NOBODY\n")
    (tmp_path / "174/50561/174-50561.trans.txt").write_text("174-50561-0000 FORGOTTEN TOO\n")
    manifest = load_manifest(tmp_path)
    assert manifest.format == "librispeech"
    assert {(row["id"], row["group"], row.get("text")) for row in manifest.rows} == {
        ("84-121123-0000", "84", "GO DO"), ("84-121123-0001", "84", None), ("174-50561-0000", "174", "FORGOTTEN TOO")}
    assert len(manifest.rejects) == 1 and manifest.rejects[0].line == 2


def test_spoken_digits(tmp_path: Path) -> None:
    for index, name in enumerate(("7_theo_3", "0_jackson_12")):
        sound(tmp_path / f"{name}.wav", seed=index)
    manifest = load_manifest(tmp_path)
    assert manifest.format == "digits"
    assert [(row["id"], row["text"], row["group"], row["split"]) for row in manifest.rows] == [
        ("0_jackson_12", "zero", "jackson", "train"), ("7_theo_3", "seven", "theo", "validation")]
    sound(tmp_path / "other.wav")
    assert load_manifest(tmp_path).format == "folder"
    assert len(load_manifest(tmp_path, format="digits").rejects) == 1


def test_two_lists_joined_on_audio_id(tmp_path: Path) -> None:
    for index, name in enumerate("abc"):
        sound(tmp_path / f"{name}.wav", seed=index)
    jsonl(tmp_path / "content.jsonl", {"audio_id": "a", "caption": "A"}, {"audio_id": "lost", "caption": "?"},
          {"audio_id": "b", "caption": "B"}, {"audio_id": "a", "caption": "again"}, {"caption": "no id"})
    jsonl(tmp_path / "audio.jsonl", {"audio_id": "b", "audio_path": "b.wav"}, {"audio_id": "a", "audio_path": "a.wav"},
          {"audio_id": "c", "audio_path": "c.wav"})
    manifest = load_manifest(tmp_path)
    assert [(row["id"], row["text"]) for row in manifest.rows] == [("a", "A"), ("b", "B")]
    assert sorted(reasons(manifest)) == [
        "audio.jsonl:3: audio_id c is missing from content.jsonl",
        "content.jsonl:2: audio_id lost is missing from audio.jsonl",
        "content.jsonl:4: audio_id a is in line 1 already", "content.jsonl:5: the line has no audio_id"]


def test_pairs_share_a_group_where_one_continues_the_other(tmp_path: Path) -> None:
    for index, name in enumerate(("pair_0000_input", "pair_0000_output", "pair_0002_input", "pair_0002_output")):
        sound(tmp_path / f"{name}.wav", seed=index)
    (tmp_path / "pair_0001_input.wav").write_bytes((tmp_path / "pair_0000_output.wav").read_bytes())
    sound(tmp_path / "pair_0001_output.wav", seed=9)
    sound(tmp_path / "pair_0003_output.wav", seed=10)
    (tmp_path / "metadata.txt").write_text("2,000 pairs of 16 s")
    manifest = load_manifest(tmp_path)
    assert manifest.format == "pairs" and ids(manifest) == ["pair_0000", "pair_0001", "pair_0002"]
    first, second, third = manifest.rows
    assert first["target_audio"].endswith("pair_0000_output.wav") and len(first["target_audio_hash"]) == 32
    assert first["group"] == second["group"] != third["group"]
    assert reasons(manifest) == ["pair_0003:0: its input is missing"]


def test_plain_text_and_parquet(tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("one\n\ntwo\n")
    assert [row["text"] for row in load_manifest(tmp_path / "lines.txt").rows] == ["one", "two"]
    sound(tmp_path / "a.wav")
    pq.write_table(pa.table({"file": ["a.wav", "b.wav"], "caption": ["x", "y"], "embedding": [[1.0], [2.0]]}),
                   tmp_path / "rows.parquet")
    manifest = load_manifest(tmp_path / "rows.parquet")
    assert manifest.rows[0]["text"] == "x" and manifest.rows[0]["embedding"] == [1.0] and manifest.rejects[0].line == 2


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        load_manifest(tmp_path / "none")
    with pytest.raises(DataError, match="holds no recording"):
        load_manifest(tmp_path)
    jsonl(tmp_path / "a.jsonl", {"text": "x"})
    assert load_manifest(tmp_path).format == "jsonl"
    jsonl(tmp_path / "b.jsonl", {"text": "x"})
    with pytest.raises(DataError, match="one of a.jsonl, b.jsonl"):
        load_manifest(tmp_path)
    assert len(load_manifest(tmp_path, format="jsonl").rows) == 2
    with pytest.raises(ValueError, match="it is one of auto, folder, jsonl"):
        load_manifest(tmp_path, format="webdataset")
    (tmp_path / "x.pdf").touch()
    with pytest.raises(DataError, match="no form of data"):
        load_manifest(tmp_path / "x.pdf")


def test_a_url_of_any_file_system() -> None:
    write_audio("memory://manifest/wavs/a.wav", Audio(np.full((1, RATE), 0.1, np.float32), RATE))
    folder = load_manifest("memory://manifest")
    assert folder.rows[0]["audio"] == "memory://manifest/wavs/a.wav" and folder.rows[0]["id"] == "wavs/a"
    with fsspec.open("memory://manifest/list.jsonl", "w") as file:
        file.write('{"audio": "wavs/a.wav"}\n{"audio": "../other/a.wav"}\n{"audio": "/etc/passwd"}\n'
                   '{"audio": "memory://manifest/wavs/%2e%2e/%2e%2e/x.wav"}\n')
    listed = load_manifest("memory://manifest/list.jsonl")
    assert ids(listed) == ["wavs/a"] and len(listed.rejects) == 3
    assert all("outside" in reason for reason in reasons(listed))


# Paths that lead elsewhere ----------------------------------------------------------------------------------------

def test_paths_stay_in_their_folder_unless_allowed(tmp_path: Path) -> None:
    sound(tmp_path / "other/b.wav", seed=1)
    sound(tmp_path / "set/a.wav")
    os.symlink(tmp_path / "other/b.wav", tmp_path / "set/link.wav")
    os.symlink(tmp_path / "other", tmp_path / "set/dir")
    outside = ["../other/b.wav", str(tmp_path / "other/b.wav"), "link.wav", "dir/b.wav", "/etc/passwd",
               f"file://{tmp_path}/other/b.wav", "http://169.254.169.254/latest", "https://x/../b.wav", "s3://bucket/b.wav",
               "zip://a::http://x/y.zip", "a.wav\0.txt"]
    path = jsonl(tmp_path / "set/list.jsonl", {"audio": "a.wav"}, {"audio": f"{tmp_path}/set/./a.wav", "text": "x"},
                 *({"audio": value} for value in outside))
    manifest = load_manifest(path)
    assert len(manifest.rows) == 2 and len(manifest.rejects) == len(outside)
    assert all("outside" in reject.reason or "not a path" in reject.reason for reject in manifest.rejects)
    allowed = load_manifest(path, allowed_roots=[str(tmp_path / "other")])
    assert len(allowed.rows) == 2 + 4
    assert {row["audio"] for row in allowed.rows[2:]} == {str(tmp_path / "other/b.wav")}
    assert allowed.rows[2]["id"] == "other/b"
    assert not load_manifest(path, allowed_roots=[str(tmp_path / "oth")]).rows[2:]


def test_links_out_of_a_folder_are_rejected(tmp_path: Path) -> None:
    sound(tmp_path / "other/b.wav", seed=1)
    sound(tmp_path / "set/a.wav")
    (tmp_path / "secret.txt").write_text("secret")
    os.symlink(tmp_path / "secret.txt", tmp_path / "set/a.txt")
    os.symlink(tmp_path / "other/b.wav", tmp_path / "set/b.wav")
    os.symlink(tmp_path / "set", tmp_path / "linked")
    manifest = load_manifest(tmp_path / "linked")  # the data set itself may be reached by a link
    assert not manifest.rows and {reject.source for reject in manifest.rejects} == {"a.wav", "b.wav"}
    assert all("outside" in reject.reason for reject in manifest.rejects)


def test_a_folder_of_data_sets_is_not_stripped_of_their_texts(tmp_path: Path) -> None:
    sound(tmp_path / "audio/a.wav")
    jsonl(tmp_path / "audio/metadata.jsonl", {"file_name": "a.wav", "text": "a bell"})
    assert load_manifest(tmp_path / "audio").rows[0]["text"] == "a bell"
    with pytest.raises(DataError, match=r"audio/metadata\.jsonl.*data\.format=folder"):
        load_manifest(tmp_path)
    assert len(load_manifest(tmp_path, format="folder").rows) == 1


# Parquet that carries code ----------------------------------------------------------------------------------------

class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.environ["BOMB"],)


def test_pickled_parquet_metadata_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BOMB", str(tmp_path / "boom"))
    payload = pickle.dumps(Bomb())
    names = (b"arrow.py_extension_type", b"ray.data.arrow_tensor", b"ray.data.arrow_pickled_object")
    for index, name in enumerate(names):
        code = base64.b64encode(payload) if index else payload
        metadata = {b"ARROW:extension:name": name, b"ARROW:extension:metadata": code}
        field = pa.field("audio", pa.string(), metadata=metadata)
        path = tmp_path / f"{index}.parquet"
        pq.write_table(pa.table([pa.array(["a.wav"])], schema=pa.schema([field])), path)
        with contextlib.suppress(DataError):  # where Ray has registered its types, it gives plain columns back
            load_manifest(path)
        assert not (tmp_path / "boom").exists()
    nested = pa.field("x", pa.list_(pa.field("item", pa.string(), metadata={b"ARROW:extension:name": b"evil"})))
    pq.write_table(pa.table([pa.array([["a"]], nested.type)], schema=pa.schema([nested])), tmp_path / "n.parquet")
    with pytest.raises(DataError, match="extension type"):
        load_manifest(tmp_path / "n.parquet")
    assert not (tmp_path / "boom").exists()


def test_parquet_with_bytes_or_rubbish(tmp_path: Path) -> None:
    pq.write_table(pa.table({"audio": [{"bytes": b"RIFF", "path": "a.wav"}]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="bytes in column audio"):
        load_manifest(tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes(b"PAR1" + os.urandom(500) + b"PAR1")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        load_manifest(tmp_path / "b.parquet")


# The whole --------------------------------------------------------------------------------------------------------

def test_rejects_are_written_and_too_many_stop_the_run(tmp_path: Path) -> None:
    sound(tmp_path / "a.wav")
    path = jsonl(tmp_path / "l.jsonl", *[{"audio": "a.wav", "text": str(i)} for i in range(9)], {"audio": "gone.wav"})
    manifest = load_manifest(path)
    manifest.write_rejects(tmp_path / "run/rejects.jsonl")
    assert json.loads((tmp_path / "run/rejects.jsonl").read_text())["line"] == 10
    manifest.enforce(0.1)
    message = r"^1 of 10 rows of .*l.jsonl cannot be used \(10.0%.*line 10: .*gone.wav.*rejects"
    with pytest.raises(DataError, match=message):
        manifest.enforce(0.09, tmp_path / "run/rejects.jsonl")


def test_max_samples_takes_the_first(tmp_path: Path) -> None:
    for index in range(4):
        sound(tmp_path / f"{index}.wav", seed=index)
    assert ids(load_manifest(tmp_path, max_samples=2)) == ["0", "1"]


def test_report_of_a_data_set(tmp_path: Path) -> None:
    sound(tmp_path / "a.wav")
    sound(tmp_path / "b.wav")
    (tmp_path / "c.wav").touch()
    manifest = load_manifest(tmp_path)
    assert [(pair.id, pair.same_as) for pair in manifest.duplicates] == [("b", "a")]
    rows = [{**row, "split": split} for row, split in zip(manifest.rows, ("train", "validation"), strict=True)]
    report = describe(manifest, rows)
    assert report["rows"] == {"used": 2, "rejected": 1} and report["duplicates"] == 1
    assert report["sample_rates_hz"] == {"8000": 2} and report["channels"] == {"1": 2}
    assert report["recordings_on_two_sides"] == 1 and report["splits"]["train"]["rows"] == 1
    assert report["hours"] == pytest.approx(2 / 3600) and report["reject_reasons"] == {"… is empty": 1}
    text = render(report)
    assert "2 used, 1 rejected" in text and "8000 (2)" in text and "b = a" in text
    json.dumps(report)


VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.lists(st.integers())
FIELDS = st.sampled_from(["id", "audio", "text", "start_s", "duration", "split", "weight", "group", "embedding"])
LINES = st.dictionaries(FIELDS, VALUES | st.just("a.wav")).map(json.dumps) | st.text(max_size=20)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=st.lists(LINES, max_size=8), tail=st.binary(max_size=12))
def test_every_line_is_used_or_rejected(tmp_path: Path, lines: list[str], tail: bytes) -> None:
    if not (tmp_path / "a.wav").exists():
        sound(tmp_path / "a.wav")
    content = "\n".join([*lines, '{"text": "end"}', ""]).encode("utf-8", "surrogatepass") + tail
    (tmp_path / "l.jsonl").write_bytes(content)
    manifest = load_manifest(tmp_path / "l.jsonl")
    lines_in_file = sum(bool(line.strip()) for line in decode(content)[0].split("\n"))
    assert len(manifest.rows) + len(manifest.rejects) == lines_in_file
    assert len(set(ids(manifest))) == len(manifest.rows)
    for row in manifest.rows:
        assert "audio" not in row or 0 <= row["start_s"] < row["start_s"] + row["duration_s"] <= 1.0 + 1e-9


@pytest.mark.realdata
def test_real_recordings(test_data: Path) -> None:
    music = load_manifest(test_data / "music")
    assert len(music.rows) == 4 and not music.rejects and sum(row["duration_s"] for row in music.rows) > 200
    whole = load_manifest(test_data)
    assert whole.format == "csv" and len(whole.rows) + len(whole.rejects) == 1621
    assert all("avray reads" in reject.reason for reject in whole.rejects) and len(whole.rejects) == 3
    whole.enforce(0.01)
