"""Storage by URL, on an S3 of loopback: what lies there is what a folder would hold, and nobody sees half of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import s3fs

from avray.data.cache import Cache
from avray.data.embed import Embedder
from avray.data.manifest import load_manifest
from avray.data.plan import plan_split
from avray.errors import DataError, MissingDependency
from avray.store import Store
from tests.commands import tones
from tests.objects import BUCKET, s3_on_loopback
from tests.toy import ToyFamily


@pytest.fixture(scope="module")
def s3() -> Iterator[Mapping[str, str]]:
    with s3_on_loopback() as environment:
        yield environment


def test_a_store_sees_what_others_wrote(s3: Mapping[str, str]) -> None:
    ours, theirs = Store(f"s3://{BUCKET}/store"), s3fs.S3FileSystem(skip_instance_cache=True)
    assert ours.list("") == set() and not ours.exists("a/b")
    ours.write("a/b", memoryview(b"123"))
    assert ours.read("a/b") == b"123" and ours.sizes("a") == {"a/b": 3}
    theirs.pipe_file(f"{BUCKET}/store/a/c", b"")  # a listing that was remembered would not have it
    assert ours.list("") == {"a/b", "a/c"} and ours.exists("a/c")
    ours.remove("a/b")
    ours.remove("a/b")
    with pytest.raises(FileNotFoundError):
        ours.read("a/b")


def test_storage_that_cannot_be_written_is_refused(s3: Mapping[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    Store(f"s3://{BUCKET}/x").check_writable("data.cache")
    assert Store(f"s3://{BUCKET}/x").list("") == set(), "nothing stays"
    with pytest.raises(ValueError, match=r"data.cache=s3://nobody/x cannot be written \(.*not exist\): look at the"):
        Store("s3://nobody/x").check_writable("data.cache")
    with pytest.raises(MissingDependency, match=r"pip install \"avray\[gcs\]\""):
        Store("gs://bucket/x").check_writable("run.dir")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(ValueError, match=r"run.dir=s3://bucket/x cannot be written \(Unable to locate credentials\)"):
        Store(f"s3://{BUCKET}/x").check_writable("run.dir")
    s3fs.S3FileSystem.clear_instance_cache()


def test_recordings_and_cache_by_url(s3: Mapping[str, str], tmp_path: Path) -> None:
    """The same rows and the same numbers as from folders; a damaged object is named."""
    s3fs.S3FileSystem().put(str(tones(tmp_path / "wavs", 3, 1.0)), f"{BUCKET}/wavs", recursive=True)
    manifests = [load_manifest(place) for place in (f"s3://{BUCKET}/wavs", tmp_path / "wavs")]
    assert [[row["id"] for row in manifest.rows] for manifest in manifests] == [["tone000", "tone001", "tone002"]] * 2
    column, plans, read = ToyFamily().columns(None)[0], [], []
    for manifest, root in zip(manifests, (f"s3://{BUCKET}/cache", str(tmp_path / "cache")), strict=True):
        plan = plan_split(ToyFamily(), [row | {"split": "train"} for row in manifest.rows], "train")
        assert Cache(root).missing(plan, [column]) == list(range(len(plan.shards)))
        assert all(Embedder(column, Cache(root)).ensure(shard) for shard in plan.shards)
        assert Cache(root).missing(plan, [column]) == []
        assert not any(Embedder(column, Cache(root)).ensure(shard) for shard in plan.shards)
        read.append({unit.source.rpartition("/")[2]: value for shard in plan.shards
                     for unit, value in zip(shard.units, Cache(root).read(shard, column), strict=True)})
        plans.append(plan)
    for name, value in read[0].items():
        np.testing.assert_array_equal(value, read[1][name])
    assert len(read[0]) == 3
    with pytest.raises(DataError, match="s3://bucket/nothing does not exist"):
        load_manifest(f"s3://{BUCKET}/nothing")
    store = Store(f"s3://{BUCKET}/cache")
    name = f"shards/{plans[0].shards[0].name}/{column.id()}.parquet"
    store.write(name, store.read(name)[:-1])
    with pytest.raises(DataError, match="damaged"):
        Cache(store.root).read(plans[0].shards[0], column)
