import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from avray.data.cache import Cache
from avray.data.embed import MAX_CRASHES, Embedder, Journal, cuts
from avray.data.order import Order
from avray.data.plan import Plan, Shards, plan_split
from avray.data.rows import from_table, gather, place_of, to_table
from avray.errors import DataError
from avray.family import Column, Unit
from tests.toy import ToyEncoder, ToyFamily


def wav(path, seconds, seed=0, rate=1000):
    random = np.random.default_rng(seed)
    soundfile.write(path, random.uniform(-0.5, 0.5, round(seconds * rate)).astype(np.float32), rate, subtype="FLOAT")
    return {"id": path.stem, "audio": str(path), "audio_hash": f"hash{seed}", "duration_s": seconds, "split": "train"}


@pytest.fixture
def rows(tmp_path):
    return [wav(tmp_path / f"r{i}.wav", 3 + i % 4, i) for i in range(12)]


def column():
    return ToyFamily().columns(None)[0]


def test_units_are_cuts_of_the_whole_recording(tmp_path, rows):
    cache = Cache(str(tmp_path / "cache"))
    plan = plan_split(ToyFamily(), rows, "train", shard_examples=8)
    embedder = Embedder(column(), cache)
    assert all(embedder.ensure(shard) for shard in plan.shards)
    assert plan.num_examples == sum(int(row["duration_s"]) for row in rows)
    network = ToyEncoder().load("cpu")
    for shard in plan.shards:
        for unit, value in zip(shard.units, cache.read(shard, column()), strict=True):
            samples, _ = soundfile.read(unit.source, dtype="float32")
            whole = network.encode_batch([samples])[0]
            first = round(unit.start_s * 10)
            np.testing.assert_allclose(value, whole[first : first + 10], rtol=1e-6)


def test_a_second_pass_opens_no_network_and_computes_nothing(tmp_path, rows):
    cache = Cache(str(tmp_path / "cache"))
    plan = plan_split(ToyFamily(), rows, "train")
    first, second = Embedder(column(), cache), Embedder(column(), cache)
    assert sum(first.ensure(shard) for shard in plan.shards) == len(plan.shards)
    assert not any(second.ensure(shard) for shard in plan.shards)
    assert second._network is None
    assert cache.missing(plan, [column()]) == []


def test_another_file_renames_only_the_shard_it_lands_in(tmp_path, rows):
    many = [{**rows[0], "id": f"x{i}", "audio": f"x{i}.wav", "audio_hash": f"h{i}"} for i in range(200)]
    before = plan_split(ToyFamily(), many, "train", shard_examples=16)
    new = {**many[0], "id": "new", "audio": "n.wav", "audio_hash": "n"}
    after = plan_split(ToyFamily(), [*many[:100], new, *many[100:]], "train", shard_examples=16)
    kept = {shard.name for shard in before.shards} & {shard.name for shard in after.shards}
    assert len(before.shards) > 10
    assert len(kept) >= len(before.shards) - 2


def test_a_bad_file_rejects_its_examples_and_no_others(tmp_path, rows):
    Path(rows[3]["audio"]).write_bytes(b"RIFFnot a wav")
    short = Path(rows[5]["audio"])
    samples, rate = soundfile.read(short)
    soundfile.write(short, samples[:1500], rate)  # shorter than its row says
    cache = Cache(str(tmp_path / "cache"))
    plan = plan_split(ToyFamily(), rows, "train")
    for shard in plan.shards:
        Embedder(column(), cache).ensure(shard)
    lost = cache.rejects(plan, [column()])
    assert {name.split(":")[0] for name in lost} == {"r3", "r5"}
    assert "r5:0" not in lost and "r5:1" in lost and "ends" in lost["r5:1"]
    order = plan.order(4, 0, 64)
    got = [row for e, r, lane in order.blocks(0) for row in gather(plan, cache, [column()], order.block(e, lane, r))]
    assert sum(row["weight"] > 0 for row in got) == plan.num_examples - len(lost)


def test_a_flipped_bit_in_the_cache_names_the_file(tmp_path, rows):
    cache = Cache(str(tmp_path / "cache"))
    plan = plan_split(ToyFamily(), rows, "train")
    Embedder(column(), cache).ensure(plan.shards[0])
    file = next((tmp_path / "cache" / "shards" / plan.shards[0].name).glob("toy*.parquet"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match=f"{file.name} is damaged"):
        cache.read(plan.shards[0], column())


def test_parquet_with_pickled_metadata_is_refused_and_nothing_runs(tmp_path, rows):
    import hashlib
    import pickle

    import pyarrow as pa
    import pyarrow.parquet as pq

    class Bomb:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/exploded",)

    cache = Cache(str(tmp_path / "cache"))
    plan = plan_split(ToyFamily(), rows, "train")
    Embedder(column(), cache).ensure(plan.shards[0])
    file = next((tmp_path / "cache" / "shards" / plan.shards[0].name).glob("toy*.parquet"))
    field = pa.field("value", pa.binary(), metadata={"ARROW:extension:name": "ray.data.arrow_tensor",
                                                     "ARROW:extension:metadata": pickle.dumps(Bomb())})
    pq.write_table(pa.table([pa.array([pickle.dumps(Bomb())])], schema=pa.schema([field])), file)
    commit = file.with_suffix(".json")
    commit.write_text(json.dumps({**json.loads(commit.read_text()),
                                  "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}))
    with pytest.raises(DataError, match="not a column of flat numbers"):
        cache.read(plan.shards[0], column())
    assert not (tmp_path / "exploded").exists()


def test_a_file_that_kills_its_decoder_is_given_up_after_two_retries(tmp_path, rows):
    cache = Cache(str(tmp_path / "cache"))
    plan = plan_split(ToyFamily(), rows, "train")
    shard = plan.shards[0]
    victim = shard.units[2].source
    script = f"""
import os, signal, pickle, sys
import avray.data.embed as embed
from tests.test_embed import *
decode = embed.stream_audio
def deadly(path, **kwargs):
    if path == {victim!r}: os.kill(os.getpid(), signal.SIGKILL)
    return decode(path, **kwargs)
embed.stream_audio = deadly
plan = pickle.load(open({str(tmp_path / 'plan')!r}, "rb"))
Embedder(column(), Cache({str(tmp_path / 'cache')!r})).ensure(plan.shards[0])
"""
    import pickle

    (tmp_path / "plan").write_bytes(pickle.dumps(plan))
    root = Path(__file__).parents[1]
    codes = []
    for _ in range(MAX_CRASHES + 2):
        codes.append(subprocess.run([sys.executable, "-c", script], cwd=root, check=False).returncode)
    assert codes == [-signal.SIGKILL] * (MAX_CRASHES + 1) + [0]
    lost = cache.rejects(Plan("train", Shards([shard])), [column()])
    assert {name.split(":")[0] for name in lost} == {Path(victim).stem}
    assert "crashed the process" in next(iter(lost.values()))
    assert not Journal(cache.store).crashes(shard, column())


def test_a_dead_process_loses_its_claim(tmp_path, rows):
    cache = Cache(str(tmp_path / "cache"))
    plan = plan_split(ToyFamily(), rows, "train")
    claim = tmp_path / "cache" / "shards" / plan.shards[0].name / f"{column().id()}.claim"
    claim.parent.mkdir(parents=True)
    process = subprocess.Popen(["true"])
    process.wait()
    import socket

    claim.write_text(json.dumps({"host": socket.gethostname(), "pid": process.pid}))
    assert Embedder(column(), cache).ensure(plan.shards[0])
    assert not claim.exists()


def test_cuts_join_units_of_one_source_and_start_on_whole_seconds():
    units = [Unit("a", "audio", 10.4, 1.0), Unit("a", "audio", 11.4, 1.0), Unit("b", "audio", 0.5, 1.0),
             Unit("a", "audio", 500.0, 1.0)]
    found = cuts(units, [0, 1, 2, 3], context_s=2.0)
    assert [(c.source, c.start_s, c.units) for c in found] == [("a", 8.0, (0, 1)), ("a", 498.0, (3,)), ("b", 0.0, (2,))]


def test_a_block_survives_its_journey_as_a_table(tmp_path, rows):
    cache = Cache(str(tmp_path / "cache"))
    plan = plan_split(ToyFamily(), rows, "train")
    for shard in plan.shards:
        Embedder(column(), cache).ensure(shard)
    order: Order = plan.order(4, 0, 64)
    block = gather(plan, cache, [column()], order.block(0, 3, 0))
    table = to_table(block, (0, 0, 3))
    assert place_of(table) == (0, 0, 3)
    for before, after in zip(block, from_table(table), strict=True):
        assert before.keys() == after.keys()
        assert all(np.array_equal(before[name], after[name]) for name in before)


def test_a_long_recording_streams_like_the_whole(tmp_path):
    class Streaming(ToyEncoder):
        def load(self, device):
            network = super().load(device)
            network.stream = lambda: Stream(network)
            return network

    class Stream:
        def __init__(self, network):
            self.network, self.held = network, np.zeros(0, np.float32)

        def push(self, piece):
            self.held = np.concatenate([self.held, piece])
            ready = len(self.held) // 100 * 100
            frames, self.held = self.network.encode_batch([self.held[:ready]])[0], self.held[ready:]
            return frames

        def finish(self):
            return self.network.encode_batch([self.held])[0]

    row = wav(tmp_path / "long.wav", 150.0)
    plan = plan_split(ToyFamily(segment_s=4.0), [row], "train", shard_examples=64)
    streaming = Column("toy", Streaming(), dtype="float32", context_s=0.0)
    samples, _ = soundfile.read(row["audio"], dtype="float32")
    whole = ToyEncoder().load("cpu").encode_batch([samples])[0]
    assert len(plan.shards) > 1
    for shard in plan.shards:
        values = Embedder(streaming, Cache(str(tmp_path / "c"))).compute(shard)
        assert not values.rejects
        for index, unit in enumerate(shard.units):
            np.testing.assert_allclose(values.arrays[index], whole[round(unit.start_s * 10) :][:40], rtol=1e-6)
