"""Several sets at once: how often each comes, whose turn a step is, and two files joined."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from avray.cli import TRAIN, compose
from avray.config import DataSettings, SetSettings
from avray.data.dataset import open_dataset
from avray.data.manifest import load_manifest
from avray.data.order import PADDING, GroupedOrder, Order
from avray.families.instruct import Instruct
from avray.media import Audio, write_audio
from avray.nn.dit import DiTConfig
from tests.tiny_codec import TinyConfig

FAMILY = Instruct(TinyConfig(), tasks=("text_to_audio", "speech"), network=DiTConfig(16, 2, 2), text_heads=2)


def make_set(folder, count, **fields):
    folder.mkdir()
    rng = np.random.default_rng(len(folder.name) + count)
    lines = []
    for index in range(count):
        write_audio(folder / f"{index}.wav", Audio(rng.normal(0, 0.1, (1, 4000)).astype(np.float32), 8000))
        lines.append({"file_name": f"{index}.wav", "text": f"sound {index}", **fields})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return str(folder)


def settings(tmp_path, *sets, **fields):
    return DataSettings(mix=tuple(sets), cache=str(tmp_path / "cache"), validation_fraction=0.25, **fields)


def test_sets_come_as_often_as_they_weigh(tmp_path):
    a, b = make_set(tmp_path / "a", 40), make_set(tmp_path / "bb", 30)
    plain = open_dataset(FAMILY, settings(tmp_path, SetSettings(a), SetSettings(b)))
    mixed = open_dataset(FAMILY, settings(tmp_path, SetSettings(a, weight=1.0, task="speech"),
                                          SetSettings(b, weight=2.5, max_samples=20)))

    def share(dataset, split, index):
        return sum(example.id.startswith(f"{index}/") for shard in dataset.plans[split].shards
                   for example in shard.examples)

    assert share(plain, "train", 0) + share(plain, "validation", 0) == 40
    once = 20 - share(mixed, "validation", 1)
    assert share(mixed, "train", 1) == pytest.approx(2.5 * once, abs=4)
    assert share(mixed, "train", 0) == 40 - share(mixed, "validation", 0)
    tasks = {example.id[0]: example.fields["task"] for shard in mixed.plans["train"].shards
             for example in shard.examples}
    assert tasks == {"0": "speech", "1": "text_to_audio"}


def test_batches_hold_one_task(tmp_path):
    a, b = make_set(tmp_path / "a", 40, task="speech"), make_set(tmp_path / "bb", 30)
    plan = open_dataset(FAMILY, settings(tmp_path, SetSettings(a), SetSettings(b), batches="by_task")).plans["train"]
    order = plan.order(8, 0, 64)
    seen = []
    for step in range(order.steps_per_epoch):
        rows = [plan.shards[shard].examples[row] for shard, row in order.step(0, step).tolist() if shard != PADDING]
        assert len({row.fields["task"] for row in rows}) == 1
        seen += [row.id for row in rows]
    assert len(seen) == len(set(seen)) == plan.num_examples


@given(rows=st.lists(st.integers(1, 9), min_size=2, max_size=12), batch=st.sampled_from([1, 4, 6]),
       seed=st.integers(0, 5), shuffle=st.booleans())
def test_grouped_steps_cover_every_row_once(rows, batch, seed, shuffle):
    groups = tuple(index % 3 for index in range(len(rows)))
    order = GroupedOrder(tuple(rows), batch, seed, 64, shuffle, groups)
    for epoch in (0, 1):
        found = []
        for step in range(order.steps_per_epoch):
            places = [tuple(place) for place in order.step(epoch, step).tolist() if place[0] != PADDING]
            assert len({groups[shard] for shard, _ in places}) == 1
            found += places
        assert sorted(found) == [(shard, row) for shard, count in enumerate(rows) for row in range(count)]
    assert order.lanes == Order(tuple(rows), batch).lanes and order.rounds == order.steps_per_epoch


def test_a_mix_on_the_command_line():
    made = compose(TRAIN, ["family=instruct", "data.mix=[{path: /a, weight: 2, task: singing}, {path: /b}]",
                           "data.batches=by_task"])
    assert [one.path for one in made.data.mix] == ["/a", "/b"] and made.data.mix[0].weight == 2


def test_a_mix_beside_a_path_is_refused():
    with pytest.raises(ValueError, match=r"data\.mix names several sets"):
        DataSettings(mix=(SetSettings("/a"),), path="/b")


@pytest.mark.parametrize("fields", [{"path": ""}, {"path": "/a", "weight": 0.0}, {"path": "/a", "weight": float("nan")},
                                    {"path": "/a", "max_samples": 0}])
def test_bad_sets_are_named(fields):
    with pytest.raises(ValueError, match=r"data\.mix"):
        SetSettings(**fields)


def test_two_files_that_disagree_or_lack_each_other_are_rejected(tmp_path):
    for index in range(4):
        write_audio(tmp_path / f"{index}.wav", Audio(np.full((1, 8000), 0.1, np.float32), 8000))
    content = [{"audio_id": "a", "content": "one", "duration": 1.0}, {"audio_id": "b", "content": "two", "duration": 9},
               {"audio_id": "b", "content": "again"}, {"audio_id": "c", "content": "three"}, {"content": "nothing"},
               {"audio_id": "e", "content": "five"}]
    audio = [{"audio_id": name, "audio_path": f"{index}.wav", "duration": duration}
             for index, (name, duration) in enumerate([("a", 1.0), ("b", 1.0), ("d", 1.0), ("e", 1e9)])]
    for name, lines in (("content", content), ("audio", audio)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    manifest = load_manifest(tmp_path)
    assert [row["text"] for row in manifest.rows] == ["one"]
    reasons = {(reject.source, reject.line): reject.reason for reject in manifest.rejects}
    assert reasons[("content.jsonl", 2)] == "content.jsonl and line 2 of audio.jsonl disagree on duration"
    assert reasons[("content.jsonl", 3)] == "audio_id b is in line 2 already"
    assert reasons[("content.jsonl", 4)] == "audio_id c is missing from audio.jsonl"
    assert reasons[("content.jsonl", 5)] == "the line has no audio_id"
    assert "does not lie in the 1.000 s" in reasons[("content.jsonl", 6)]
    assert reasons[("audio.jsonl", 3)] == "audio_id d is missing from content.jsonl"
