"""Rows and plans as bytes: what is read back is what was put in, whatever is picked, joined or sent."""

import pickle

import numpy as np
import pytest

from avray.data import naming, plan
from avray.data.packed import Rows
from avray.data.plan import Plan, Shards, by_recording, make_shard, plan_split
from avray.family import Example, Unit
from tests.toy import ToyFamily

ODD = [{"id": "größe \u2028", "text": "\udcff", "embedding": [0.1, 1e-300], "notes": [[60, 0.5]], "weight": 2.0},
       {"id": "b", "audio": "/b.wav", "split": "train", "nested": {"a": [None, True]}}, {}]


def recordings(count):
    return [{"id": f"r{i}", "audio": f"/set/r{i}.wav", "audio_hash": f"{i:032x}", "start_s": 0.0, "duration_s": 2.0,
             "group": f"g{i % 7}", "split": "train"} for i in range(count)]


def test_rows_come_back_as_they_were():
    rows = Rows(ODD)
    assert list(rows) == ODD and rows == ODD and rows[-1] == {} and rows[:2] == ODD[:2] and Rows() == []
    picked = rows.pick([2, 0, 0])
    assert picked == [{}, ODD[0], ODD[0]] and pickle.loads(pickle.dumps(picked)) == picked
    rows[0]["id"] = "other"
    assert rows[0]["id"] == ODD[0]["id"]
    with pytest.raises(IndexError):
        rows[3]


def test_shards_come_back_as_they_were():
    units = {"input": Unit("/\udcff.wav", "audio", 1 / 3, 2.0, "noise:seed=3"), "text": Unit("wörter", "text")}
    hashes = {"/\udcff.wav": "hash"}
    shards = [make_shard([Example(f"{i}", units, {"task": "x", "n": [i]}, 0.5), Example("again", units)], hashes)
              for i in range(3)]
    packed = Shards(shards)
    assert list(packed) == shards and packed[1] == shards[1] and packed[-1] == shards[-1]
    heads = list(packed.heads())
    assert [(h.name, h.num_examples, h.modalities) for h in heads] == [(s.name, 2, {"audio", "text"}) for s in shards]
    other = packed.pick([2, 0])
    assert list(Shards.joined([packed, other])) == [*shards, shards[2], shards[0]]
    sent = pickle.loads(pickle.dumps(Plan("train", other)))
    assert list(sent.shards) == [shards[2], shards[0]] and sent.shard_rows == (2, 2)
    assert list(sent.repeated(1.5).shards) == [shards[2], shards[0], shards[2]]


def test_a_plan_is_sent_as_a_buffer_and_a_part_of_it_as_that_part():
    made = plan_split(ToyFamily(), Rows(recordings(3000)), "train")
    buffers = []
    head = pickle.dumps(made, protocol=5, buffer_callback=buffers.append)
    size = sum(len(buffer.raw()) for buffer in buffers)
    assert len(head) < 1000 and size < 80 * made.num_examples
    assert len(pickle.dumps(made.subset([0, 5]))) < size / 20


def test_recordings_are_told_apart_where_their_hashes_are_equal(monkeypatch):
    rows = recordings(4)
    late = [{**row, "id": f"{row['id']}b", "start_s": start} for row, start in zip(rows, (9.0, 3.0, 1.0, 5.0),
                                                                                   strict=True)]
    mixed = [late[2], *rows, {"id": "t", "text": "x", "split": "train"}, late[0], late[3], late[1]]
    order = [["r2", "r2b"], ["r0", "r0b"], ["r1", "r1b"], ["r3", "r3b"], ["t"]]
    assert [[row["id"] for row in group] for group in by_recording(Rows(mixed), "train")] == order
    monkeypatch.setattr(plan, "hash", lambda name: 7, raising=False)
    groups = [[row["id"] for row in group] for group in by_recording(Rows(mixed), "train")]
    assert sorted(groups) == sorted(order)


@pytest.mark.parametrize("equal", [False, True])
def test_names_and_groups_do_not_hang_on_hashes(monkeypatch, equal):
    if equal:
        monkeypatch.setattr(naming, "hash", lambda name: 7, raising=False)
    media = [("a", None), ("b", "c"), ("c", "d"), ("e", None), ("e", None), ("d", None)]
    rows = [{"audio": f"/set/{i}.wav", "audio_hash": a, "start_s": 0.0, "duration_s": 1.0, naming.SPAN: "",
             **({"target_audio": f"/set/t{i}.wav", "target_audio_hash": b} if b else {})}
            for i, (a, b) in enumerate(media)]
    rows[5]["group"] = "given"
    names = naming.Naming(naming.Roots("/set"))
    names.look(Rows(rows))
    named = list(names.name(Rows(rows)))
    assert [row["id"] for row in named] == list("012345")
    assert [row["group"] for row in named] == ["0", "given", "given", "3", "3", "given"]
    assert names.duplicates == [naming.Duplicate("4", "3")]


def test_a_buffer_that_came_as_memory_of_others_is_read():
    rows = Rows(recordings(3))
    buffers = []
    head = pickle.dumps(rows, protocol=5, buffer_callback=buffers.append)
    frozen = pickle.loads(head, buffers=[bytes(buffer.raw()) for buffer in buffers])
    assert frozen == rows and not np.asarray(frozen._buffer).flags.writeable
