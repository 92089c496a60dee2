"""Storage by URL, on an S3 of loopback: what lies there is what a folder would hold, and nobody sees half of it."""

from __future__ import annotations

import csv
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import s3fs
import torch

import avray.checkpoint as ck
from avray.checkpoint import Checkpoint, Content, remote
from avray.checkpoint.store import digest
from avray.config import GenerateSettings, RunSettings, SweepSettings
from avray.data.cache import Cache
from avray.data.embed import Embedder
from avray.data.manifest import load_manifest
from avray.data.plan import plan_split
from avray.data.shared import trouble
from avray.errors import CheckpointError, DataError, MissingDependency
from avray.mirror import Mirror, mirrored, working_copy
from avray.serving.launch import Named, named
from avray.store import Store
from avray.train.samples import await_samples, awaited, no_longer_await
from avray.tuning.checks import check_folder
from tests.commands import ROOT, TWO_STEPS, running, tones
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
    assert trouble({"data.path": f"s3://{BUCKET}/no"}) == "data.path=s3://bucket/no does not exist."
    assert "run.dir=s3://nobody/x cannot be written" in str(trouble({"run.dir": "s3://nobody/x"}))
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


# ── checkpoints ──────────────────────────────────────────


@pytest.fixture
def run(s3: Mapping[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """The URL of a run that is not there yet, seen from a node that has nothing local."""
    on_node(tmp_path / "node", monkeypatch)
    return f"s3://{BUCKET}/runs/{request.node.name[:40]}"


def on_node(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on we are a node whose own files lie in ``folder``."""
    monkeypatch.setenv("AVRAY_CACHE", str(folder))


def content(value: float) -> Content:
    tensor = torch.full((3,), value)
    return Content({"w": tensor, "b": torch.ones(2)}, {"name": "toy"}, trainer={"moment": tensor},
                   unchanging=frozenset({"b"}))


def save(run: str, step: int, links: tuple[str, ...] = ("last",), seed: int = 0) -> Path:
    """A checkpoint as rank 0 makes it; the tensor tells which."""
    folder = ck.save(working_copy(run), step, content(float(step + seed)), links)
    remote.publish(run, folder)
    return folder


def opened(path: str) -> float:
    return float(Checkpoint.open(path).weights()["w"][0])


def test_a_checkpoint_by_url_is_opened_anywhere(run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(run, 1, ("last", "best"))
    save(run, 2)
    assert Store(run).read("best") == b"checkpoints/step-00000001\n"
    s3fs.S3FileSystem().copy(f"{run}/checkpoints/step-00000002", f"{BUCKET}/copied/two", recursive=True)
    base = next(name for name in Store(run).list("checkpoints") if "base-" in name)
    s3fs.S3FileSystem().copy(f"{run}/{base}", f"{BUCKET}/copied/{base.rpartition('/')[2]}")
    on_node(tmp_path / "other", monkeypatch)
    assert [opened(run + end) for end in ("", "/", "/best", "/last", "/checkpoints/step-00000002")] == [1, 1, 1, 2, 2]
    assert opened(f"s3://{BUCKET}/copied/two") == 2
    copy = Checkpoint.open(f"{run}/last")
    assert copy.trainer_state() is None, "which generating does not need, and does not fetch"
    assert float(Checkpoint.open(remote.fetch(f"{run}/last", trainer=True)).trainer_state()["moment"][0]) == 2
    assert sorted(copy.weights()) == ["b", "w"]
    save(run, 2, seed=7)  # the same step once more: a copy is not taken for it
    on_node(tmp_path / "node", monkeypatch)
    assert opened(f"{run}/last") == 9
    for path, message in {f"{run}/checkpoints/step-00000003": "does not exist.*step-00000002: give it",
                          f"{run}/nothing": "does not exist", f"s3://{BUCKET}": "has no manifest.json",
                          f"{run}/checkpoints/step-00000002/model.safetensors": "weights without the model"}.items():
        with pytest.raises(CheckpointError, match=message):
            Checkpoint.open(path)


def test_a_writer_killed_at_any_moment_leaves_a_whole_checkpoint(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each put of the second checkpoint fails in its turn: the first stays the newest, until the second is whole."""
    save(run, 1, ("last", "best"))
    before, puts = Store(run).list(""), []

    def put(real):
        def counted(store: Store, name: str, content: object) -> None:
            if len(puts) == allowed:
                raise KeyboardInterrupt
            puts.append(name)
            real(store, name, content)
        return counted

    folder = ck.save(working_copy(run), 2, content(2))
    with monkeypatch.context() as killed:
        killed.setattr(Store, "upload", put(Store.upload))
        killed.setattr(Store, "write", put(Store.write))
        for allowed in (0, 1, 5, 8, 9):  # of 8 files, the manifest and last
            puts.clear()
            with pytest.raises(KeyboardInterrupt):
                remote.publish(run, folder)
            assert len(puts) == allowed
            assert remote.newest(run) == f"checkpoints/step-0000000{2 if allowed > 8 else 1}"
            assert opened(f"{run}/last") == 1
            if allowed <= 8:
                assert remote.sweep(run) == (["checkpoints/step-00000002"] if puts else [])
                assert Store(run).list("") == before
    remote.publish(run, folder)
    assert puts[-1] == "checkpoints/step-00000002/manifest.json"
    assert opened(f"{run}/last") == 2 and remote.sweep(run) == []


def test_damage_is_named_and_nothing_else_taken(run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(run, 1)
    save(run, 2)
    store, name = Store(run), "checkpoints/step-00000002/model.safetensors"
    whole = store.read(name)
    on_node(tmp_path / "other", monkeypatch)
    store.write(name, whole[:-1] + b"!")
    with pytest.raises(CheckpointError, match=f"{name} is damaged"):
        Checkpoint.open(run)
    store.write(name, whole[:-1])
    for call in (lambda: Checkpoint.open(run), lambda: remote.newest(run)):
        with pytest.raises(CheckpointError, match=f"{name} has {len(whole) - 1} bytes in place of {len(whole)}"):
            call()
    store.write(name, whole)
    manifest = json.loads(store.read("checkpoints/step-00000002/manifest.json"))
    manifest["files"]["../../../x"] = manifest["files"]["model.safetensors"]
    manifest["sha256"] = digest(manifest)
    store.write("checkpoints/step-00000002/manifest.json", json.dumps(manifest).encode())
    with pytest.raises(CheckpointError, match="not a file of this folder"):
        Checkpoint.open(run)


def test_pruning_and_going_on_elsewhere(run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the store has is what counts: a copy's own leftovers are no ground to go on from."""
    for step, links in ((1, ("last", "best")), (2, ("last",)), (3, ("last",)), (4, ("last",)), (5, ("last",))):
        folder = save(run, step, links)
    await_samples(run, 3)
    assert remote.prune(run, 1, 4, awaited(run)) == ["step-00000002"]
    no_longer_await(run, 3)
    assert remote.prune(run, 1, 4, awaited(run)) == ["step-00000003"]
    assert {name.split("/")[1] for name in Store(run).list("checkpoints") if "step-" in name} == {
        f"step-0000000{step}" for step in (1, 4, 5)}
    ck.save(working_copy(run), 6, content(6))  # killed before it was published
    remote.restore(run)
    assert ck.newest(working_copy(run)) == folder
    on_node(tmp_path / "other", monkeypatch)
    remote.restore(run)
    found = ck.newest(working_copy(run))
    assert found is not None and found.name == "step-00000005" and Checkpoint.open(found).trainer_state() is not None
    save(run, 6)
    assert opened(f"{run}/best") == 1 and opened(f"{run}/last") == 6


def test_what_a_process_writes_beside_checkpoints(run: str, tmp_path: Path) -> None:
    (working_copy(run) / "old").mkdir(parents=True)
    with pytest.raises(DataError), mirrored(run) as folder:
        assert list(folder.iterdir()) == []
        (folder / "samples").mkdir()
        (folder / "samples" / "a.wav").write_bytes(b"a")
        (folder / ".hidden").write_bytes(b"")
        save(run, 1)
        raise DataError("It failed, and what there is stays to be looked at.")
    assert {name for name in Store(run).list("") if "step-" not in name and "base-" not in name} == {
        "samples/a.wav", "last"}
    mirror = Mirror(run, ("metrics",))
    (folder / "metrics.csv").write_text("step\n")
    (folder / "other").write_text("of another process")
    mirror.push()
    assert Store(run).exists("metrics.csv") and not Store(run).exists("other")
    (folder / "metrics.csv").write_text("step\n1\n2\n")
    remote.restore_file(run, "metrics.csv")
    assert (folder / "metrics.csv").read_text() == "step\n"
    with mirrored(str(tmp_path / "local" / "run")) as local:
        assert local == tmp_path / "local" / "run" and local.is_dir()
    with pytest.raises(ValueError, match=r"run.dir=s3://nobody/run cannot be written"), mirrored("s3://nobody/run"):
        pass


def test_names_of_models_and_a_sweep_by_url(run: str) -> None:
    save(run, 3)
    name = run.rpartition("/")[2]
    url = f"{run}/checkpoints/step-00000003"
    assert named([run, f"a:{run}/last", f"b:{url}"]) == [Named(name, url), Named("a", url), Named("b", url)]
    with pytest.raises(ValueError, match="keeps its journal"):
        check_folder(SweepSettings(run=RunSettings(run)), working_copy(run) / "journal.jsonl")
    with pytest.raises(ValueError, match="output=s3://.* is a URL"):
        GenerateSettings(checkpoint=run, output=f"{run}/a.wav")


RANK_0 = """
import sys
from dataclasses import replace
from pathlib import Path

from avray.checkpoint import remote
from avray.config import RunSettings
from avray.mirror import Mirror, working_copy
from avray.train.loggers import CsvLogger, LoggerGroup
from tests.toy import run_loop, toy_job

run = sys.argv[2]
job = toy_job(Path(sys.argv[1]), {"max_steps": 16, "checkpoint_every_steps": 2, "keep_last": 2})
job = replace(job, settings=replace(job.settings, run=RunSettings(run)))
remote.sweep(run)
remote.restore(run)
remote.restore_file(run, "metrics.csv")
mirror = Mirror(run, ("metrics.csv",))

def saved(checkpoint, step):
    mirror.push()
    remote.publish(run, checkpoint)
    remote.prune(run, 2)

run_loop(job, saved=saved, loggers=lambda step: LoggerGroup([CsvLogger(working_copy(run) / "metrics.csv", step)]))
mirror.push()
"""


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_like_one_that_was_not(s3: Mapping[str, str], tmp_path: Path) -> None:
    """The loop as rank 0 runs it, killed as soon as the store shows a certain checkpoint, and gone on with on a node
    that has nothing: never more than one interval is lost, and the parameters are the same bits in the end."""
    numbers = itertools.count()

    def start(run: str) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "AVRAY_CACHE": str(tmp_path / f"node{next(numbers)}"), "PYTHONPATH": str(ROOT)}
        return subprocess.Popen([sys.executable, "-c", RANK_0, str(tmp_path), run], cwd=tmp_path, env=environment)

    def step_of(run: str) -> int:
        return int((remote.newest(run) or "-1").rpartition("-")[2])

    straight, killed = (f"s3://{BUCKET}/runs/{name}" for name in ("straight", "killed"))
    assert start(straight).wait(120) == 0
    for least in (2, 10):
        process = start(killed)
        while step_of(killed) < least:
            assert process.poll() is None
        process.kill()
        process.wait()
        assert least <= step_of(killed) < 16 and opened_weights(killed)
    assert start(killed).wait(120) == 0
    assert step_of(killed) == 16 and opened_weights(killed) == opened_weights(straight)
    for run in (straight, killed):
        steps = [row["step"] for row in csv.DictReader(Store(run).read("metrics.csv").decode().splitlines())]
        assert steps == ["0", "4", "6", "8", "12", "16"]


def opened_weights(run: str) -> dict[str, list[float]]:
    return {name: tensor.flatten().tolist() for name, tensor in Checkpoint.open(f"{run}/last").weights("model").items()}


# ── the commands ─────────────────────────────────────────

COMMANDS = """
import json, shutil, sys
from pathlib import Path

from avray.cli import EVALUATE, GENERATE, PREPARE, TRAIN, compose
from avray.data.cluster import Needs, start_ray
from avray.data.prepare import prepare_all
from avray.evaluation.evaluate import evaluate
from avray.generation.one import generate
from avray.registry import family_from_settings
from avray.train.trainer import train

copies, words = Path(sys.argv[1]), sys.argv[2:]
start_ray(Needs(trainers=3), None, 120.0)
where = [word for word in words if word.startswith("data.")]
prepared = compose(PREPARE, ["run.dir=s3://bucket/prepared", *[w for w in words if not w.startswith("run.dir")]])
print(prepare_all(prepared, family_from_settings(prepared.family)))
for more in (["trainer.stop_at_step=1"], ["resume=true"]):
    settings = compose(TRAIN, [*words, *more])
    print(train(settings, family_from_settings(settings.family))["checkpoint"])
    shutil.rmtree(copies)  # a node that has nothing local
run = settings.run.dir
made = compose(GENERATE, [f"checkpoint={run}", "audio=s3://bucket/wavs/tone000.wav", "seconds=0.4", "output=out.wav"])
print(generate(made))
report = compose(EVALUATE, [f"checkpoint={run}/last", f"run.dir={run}-report", "num_samples=1", *where])
print(json.dumps(evaluate(report)["checkpoint"]))
"""


@pytest.mark.ray
@pytest.mark.slow
def test_everything_on_s3(s3: Mapping[str, str], short_folder: Path) -> None:
    """Prepared, trained, stopped, gone on with where nothing is local, generated, reported: in one process, for speed,
    whose Ray is its own, since Ray's workers have the environment that it was started with."""
    s3fs.S3FileSystem().put(str(tones(short_folder / "wavs", 12, 1.0)), f"{BUCKET}/wavs", recursive=True)
    run = f"s3://{BUCKET}/runs/a"
    words = [f"data.path=s3://{BUCKET}/wavs", f"data.cache=s3://{BUCKET}/encoded", f"run.dir={run}", *TWO_STEPS,
             "trainer.keep_last=1", "trainer.checkpoint_every_steps=1"]
    command = [sys.executable, "-c", COMMANDS, str(short_folder / "copies"), *words]
    with running(command, short_folder, AVRAY_CACHE=str(short_folder / "copies"), **s3) as process:
        said = process.communicate(timeout=280)[0]
    assert process.returncode == 0, said
    assert (short_folder / "out.wav").stat().st_size > 1000
    there = Store(run).list("")
    assert {"config.yaml", "summary.json", "metrics.csv", "best", "last", "rejects.jsonl",
            "checkpoints/step-00000002/manifest.json"} <= there, there
    assert any(name.endswith(".generated.wav") for name in there) and not any(".waiting" in name for name in there)
    assert len({name.split("/")[1] for name in there if name.startswith("checkpoints/")}) <= 2, "pruned there too"
    assert [row["step"] for row in csv.DictReader(Store(run).read("metrics.csv").decode().splitlines())][-1] == "2"
    assert json.loads(Store(run).read("summary.json"))["checkpoint"] in (f"{run}/best", f"{run}/last")
    assert "report.html" in Store(f"{run}-report").list("") and "summary.json" in Store(f"s3://{BUCKET}/prepared").list("")
