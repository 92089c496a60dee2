"""Splits: no group on two sides, no span within a guard of another side's, every second accounted for."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avray.data.check import describe
from avray.data.manifest import load_manifest
from avray.data.splits import assign_splits, choose_split, cut
from avray.family import Row

EPSILON = 1e-6


def row(name: str, seconds: float = 2.0, start_s: float = 0.0, **fields: Any) -> Row:
    return {"id": f"{name}@{start_s}", "audio": f"/data/{name}.wav", "audio_hash": f"hash-{name}", "group": name,
            "start_s": start_s, "duration_s": seconds, **fields}


def many(count: int, **fields: Any) -> list[Row]:
    return [row(f"song{index}", **fields) for index in range(count)]


def groups_of(rows: list[Row], split: str) -> set[str]:
    return {row["group"] for row in rows if row["split"] == split}


# By group ---------------------------------------------------------------------------------------------------------

@settings(max_examples=100, deadline=None)
@given(names=st.lists(st.integers(0, 30), min_size=1, max_size=60), seed=st.integers(0, 2**63),
       fraction=st.floats(0.01, 0.9))
def test_no_group_on_two_sides_and_both_sides_have_one(names: list[int], seed: int, fraction: float) -> None:
    rows = [{"id": str(index), "text": "x", "group": f"g{name}"} for index, name in enumerate(names)]
    split = assign_splits(rows, validation_fraction=fraction, seed=seed)
    assert [part["id"] for part in split] == [part["id"] for part in rows]
    train, validation = groups_of(split, "train"), groups_of(split, "validation")
    assert not train & validation
    if len(set(names)) > 1:
        assert train and validation
    assert split == assign_splits(rows, validation_fraction=fraction, seed=seed)


def test_a_group_stays_where_it_is_when_rows_are_added() -> None:
    small, large = (assign_splits(many(count), seed=7) for count in (40, 400))
    assert groups_of(small, "validation") == groups_of(large, "validation") & groups_of(small, "train").union(
        groups_of(small, "validation"))
    assert 20 < len(groups_of(large, "validation")) < 60
    assert groups_of(large, "validation") != groups_of(assign_splits(many(400), seed=8), "validation")


def test_given_splits_are_kept_and_shared_with_the_group() -> None:
    rows = [row("a", split="validation"), row("a", start_s=2.0), *many(9, split="train"), row("new")]
    split = assign_splits(rows)
    assert groups_of(split, "validation") >= {"a"} and split[1]["split"] == "validation"
    assert all(part["split"] == "train" for part in split[2:11])
    only = assign_splits([row("a", split="train"), row("b")])
    assert groups_of(only, "validation") == {"b"}  # or there would be none
    assert assign_splits([row("a")])[0]["split"] == "train"


def test_held_out_groups_are_a_test_set() -> None:
    split = assign_splits(many(12), holdout_groups=["song3", "song1?"])
    assert groups_of(split, "test") == {"song3", "song10", "song11"}
    assert groups_of(split, "train") and groups_of(split, "validation")
    with pytest.raises(ValueError, match="'nobody', which no row has; there are song0"):
        assign_splits(many(3), holdout_groups=["nobody"])


def test_no_validation_when_none_is_asked_for() -> None:
    assert {part["split"] for part in assign_splits(many(20), validation_fraction=0.0)} == {"train"}
    assert {part["split"] for part in assign_splits([row("a", 1000.0)], validation_fraction=0.0)} == {"train"}


# By span ----------------------------------------------------------------------------------------------------------

@settings(max_examples=200, deadline=None)
@given(low=st.floats(0, 1000), seconds=st.floats(0.5, 50_000), fraction=st.floats(0.01, 0.4), guard_s=st.floats(0, 20),
       span_s=st.floats(0.5, 40), key=st.text(max_size=5))
def test_pieces_cover_a_recording_and_keep_their_distance(low: float, seconds: float, fraction: float, guard_s: float,
                                                          span_s: float, key: str) -> None:
    pieces = cut(low, low + seconds, validation_fraction=fraction, guard_s=guard_s, span_s=span_s, key=key)
    assert pieces[0].start_s == low and pieces[-1].stop_s == low + seconds
    assert all(a.stop_s == b.start_s for a, b in pairwise(pieces))
    spans = [piece for piece in pieces if piece.split == "validation"]
    trains = [piece for piece in pieces if piece.split == "train"]
    assert trains
    for span in spans:
        assert span.stop_s - span.start_s >= span_s - EPSILON
        for train in trains:
            assert train.stop_s <= span.start_s - guard_s + EPSILON or train.start_s >= span.stop_s + guard_s - EPSILON
    held = sum(span.stop_s - span.start_s for span in spans)
    if spans:
        assert held >= fraction * seconds - EPSILON
        assert sum(train.stop_s - train.start_s for train in trains) >= span_s - EPSILON
    if seconds * fraction > 20 * (span_s + guard_s):
        assert len(spans) > 5
        assert spans[0].start_s < low + seconds / 4 and spans[-1].stop_s > low + seconds * 3 / 4


@settings(max_examples=100, deadline=None)
@given(spans=st.lists(st.tuples(st.floats(0, 300), st.floats(1, 200)), min_size=1, max_size=8), seed=st.integers(0, 99),
       guard_s=st.floats(0.1, 5))
def test_overlapping_rows_of_one_recording_are_cut_alike(spans: list[tuple[float, float]], seed: int,
                                                         guard_s: float) -> None:
    rows = [row("book", 400.0), *(row("book", seconds, start_s, id=str(index))
                                  for index, (start_s, seconds) in enumerate(spans))]
    rows[1]["audio"] = "/data/copy-of-book.wav"
    split = assign_splits(rows, seed=seed, guard_s=guard_s)
    assert {part["split"] for part in split} == {"train", "validation"}
    assert len({part["id"] for part in split}) == len(split)
    sides = {side: [(part["start_s"], part["start_s"] + part["duration_s"]) for part in split if part["split"] == side]
             for side in ("train", "validation")}
    for train_start, train_stop in sides["train"]:
        for start, stop in sides["validation"]:
            assert train_stop <= start - guard_s + EPSILON or train_start >= stop + guard_s - EPSILON
    for part in split:
        parent = next(parent for parent in rows
                      if part["id"] == parent["id"] or part["id"].startswith(f"{parent['id']}@"))
        assert parent["start_s"] <= part["start_s"]
        assert part["start_s"] + part["duration_s"] <= parent["start_s"] + parent["duration_s"] + EPSILON


def test_a_few_long_recordings_are_cut_and_many_or_short_ones_are_not() -> None:
    assert choose_split(many(4, seconds=60.0)).by == "span"
    assert choose_split(many(4, seconds=60.0)).reason == "only 4 groups, and recordings of up to 60 s"
    assert choose_split(many(5, seconds=60.0)).by == "group"
    assert choose_split(many(4, seconds=5.0)).by == "group"
    assert choose_split(many(4, seconds=60.0, text="all that is said")).by == "group"
    assert choose_split(many(4, seconds=60.0, target_audio="/data/x.wav")).by == "group"
    assert choose_split(many(6, seconds=60.0), holdout_groups=["song1", "song2"]).by == "span"
    assert choose_split(many(9, seconds=60.0), by="span").by == "span"
    with pytest.raises(ValueError, match=r"data\.split_by=group"):
        assign_splits(many(4, seconds=5.0), by="span")


def test_short_recordings_beside_long_ones_are_trained_on() -> None:
    rows = [row("long", 120.0), row("short", 3.0), row("kept", 120.0)]
    split = assign_splits(rows, holdout_groups=["kept"])
    assert [part["split"] for part in split if part["group"] != "long"] == ["train", "test"]
    assert sum(part["split"] == "validation" for part in split) == 3  # 12 s in spans of 4
    totals = {side: sum(part["duration_s"] for part in split if part["split"] == side)
              for side in ("train", "validation")}
    guards = 3 * 2 * 2.0
    assert totals["train"] + totals["validation"] + guards == pytest.approx(123.0)
    assert totals["validation"] == pytest.approx(12.0, abs=0.01)


def test_a_long_recording_gets_longer_spans_rather_than_more() -> None:
    split = assign_splits([row("book", 11 * 3600.0)])
    held = [part for part in split if part["split"] == "validation"]
    assert len(held) == 16 and held[0]["duration_s"] == pytest.approx(1.1 * 3600 / 16, abs=0.01)


@pytest.mark.realdata
def test_real_music_is_cut_with_a_song_held_out(test_data: Path) -> None:
    manifest = load_manifest(test_data / "music")
    rows = assign_splits(manifest.rows, holdout_groups=["Kevin*"])
    report = describe(manifest, rows, choose_split(manifest.rows, holdout_groups=["Kevin*"]))
    assert report["split_by"].startswith("span (only 3 groups") and report["recordings_on_two_sides"] == 0
    assert report["splits"]["test"]["rows"] == 1 and report["splits"]["validation"]["rows"] == 3


def test_a_group_held_out_goes_to_test_whatever_its_rows_say() -> None:
    rows = [row(name, split=split) for name in "ab" for split in ("train", "validation")]
    assert [r["split"] for r in assign_splits(rows, holdout_groups=["a"])] == ["test", "test", "train", "validation"]
