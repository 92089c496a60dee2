"""A checkpoint is whole or invisible: kills at every step of writing, a full or read-only store, flipped
bits, and folders made to do harm."""

from __future__ import annotations

import errno
import json
import os
import pickle
import resource
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from avray import checkpoint as ck
from avray.checkpoint import Checkpoint
from avray.errors import CheckpointError

from .test_checkpoint import content, reseal

KILLED_AT_EACH_STEP = """
import os, shutil, signal, sys
from pathlib import Path

import torch

from avray import checkpoint as ck
from tests.test_checkpoint import content

EVENTS = {"open", "os.mkdir", "os.rename", "os.symlink", "os.remove", "os.rmdir"}


def die_at(moment, root):
    '''SIGKILL at the moment-th change to the store: before it is made.'''
    seen = 0

    def count(path):
        nonlocal seen
        if str(path).startswith(root + "/"):
            if seen == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1

    fsync = os.fsync
    os.fsync = lambda descriptor: (count(os.readlink(f"/proc/self/fd/{descriptor}")), fsync(descriptor))
    sys.addaudithook(lambda event, given: count(given[0]) if event in EVENTS else None)


def run(root, saving):
    base = Path(root) / "base"
    for step in (1, 2):
        ck.save(base, step, content(float(step)), links=("best", "last"))
    for moment in range(200):
        folder = Path(root) / str(moment)
        shutil.copytree(base, folder, symlinks=True)
        child = os.fork()
        if child == 0:
            die_at(moment, str(folder))
            saving(folder)
            os._exit(0)
        if os.waitpid(child, 0)[1] == 0:
            return
    raise SystemExit("it never finished")


def in_the_foreground(folder):
    ck.save(folder, 3, content(3.0), links=("best", "last"))
    ck.prune(folder, keep_last=1)


def again(folder):
    ck.save(folder, 2, content(3.0), links=("best", "last"))


def in_the_background(folder):
    with ck.AsyncSaver() as saver:
        saver.save(folder, 3, content(3.0), ("best", "last"), lambda _: ck.prune(folder, keep_last=1))


torch.set_num_threads(1)
WAYS = {"foreground": in_the_foreground, "again": again, "background": in_the_background}
run(sys.argv[1], WAYS[sys.argv[2]])
"""


@pytest.fixture(scope="module", params=["foreground", "background", "again"])
def killed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[Path]]:
    """Runs with two checkpoints and a third on its way, the writer killed before its n-th change to the
    store."""
    root = tmp_path_factory.mktemp(request.param)
    command = [sys.executable, "-c", KILLED_AT_EACH_STEP, str(root), request.param]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return request.param, sorted(
        (path for path in root.iterdir() if path.name != "base"), key=lambda path: int(path.name)
    )


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(killed: tuple[str, list[Path]]) -> None:
    kind, runs = killed
    outcomes = set()
    assert len(runs) > 20
    for run in runs:
        before = {path.name for path in ck.checkpoints(run)}
        if kind != "again":  # there the links lead nowhere between two renames, until the sweep
            for link in ("best", "last"):
                opened = Checkpoint.open(run / link)
                assert opened.step in (2, 3) and opened.figures["validation_loss"] == opened.step
            assert before >= {"step-00000002"} or opened.step == 3
            if opened.step == 2:
                assert "step-00000001" in before, "pruned before `last` was updated"
        ck.sweep(run)
        names = sorted(path.name for path in run.iterdir())
        assert names == ["best", "checkpoints", "last"]
        assert sorted((run / "checkpoints").iterdir()) == ck.checkpoints(run), "something half-written or half-removed"
        newest = ck.newest(run)
        assert newest is not None
        opened = Checkpoint.open(newest)
        assert opened.trainer_state() is not None
        assert torch.equal(opened.weights("model")["weight"], torch.full((3, 2), opened.figures["validation_loss"]))
        assert Checkpoint.open(run / "last").step in (2, 3)
        outcomes.add((opened.step, opened.figures["validation_loss"]))
        ck.save(run, 4, content(4.0))
        assert Checkpoint.open(run / "last").step == 4
    assert outcomes == ({(2, 2.0), (2, 3.0)} if kind == "again" else {(2, 2.0), (3, 3.0)})


def test_sweeping_leaves_a_living_writer_alone(tmp_path: Path) -> None:
    ck.save(tmp_path, 1, content())
    here, there = os.uname().nodename, "another-host"
    parent = tmp_path / "checkpoints"
    with subprocess.Popen(["sleep", "60"]) as living:
        names = {f"step-00000002.tmp-{here}-{living.pid}": True, f"step-00000002.tmp-{there}-7": True}
        names |= {f"step-00000003.tmp-{there}-7": False, f"step-00000002.tmp-{here}-{os.getpid()}": False}
        for name in names:
            (parent / name).mkdir()
            (parent / name / "model.safetensors").write_bytes(b"half")
        stale = parent / f"step-00000003.tmp-{there}-7"
        for path in (stale / "model.safetensors", stale):
            os.utime(path, (time.time() - 4000,) * 2)
        (tmp_path / f"notes.tmp-{here}-{os.getpid()}").mkdir()  # not ours: only links stand beside checkpoints/
        swept = {path.name for path in ck.sweep(tmp_path)}
        living.kill()
    assert swept == {name for name, kept in names.items() if not kept}
    assert {path.name for path in parent.iterdir()} == {"step-00000001", *names} - swept
    assert len([*tmp_path.iterdir()]) == 3


# ── a store that refuses ─────────────────────────────────


def test_a_limit_on_file_sizes(tmp_path: Path) -> None:
    """What a full disk does, in earnest: the system stops a write in the middle of the weights."""
    kept = ck.save(tmp_path, 1, content())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(CheckpointError, match="Saving .*step-00000002 failed: File too large; raise the limit"):
            ck.save(tmp_path, 2, content(model={"weight": torch.zeros(1_000_000)}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [*kept.parent.iterdir()] == [kept] and Checkpoint.open(tmp_path / "last").step == 1


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize("call", ["mkdir", "fsync", "rename", "symlink", "replace"])
def test_a_full_or_read_only_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int) -> None:
    ck.save(tmp_path, 1, content(1.0))
    ck.save(tmp_path, 2, content(2.0))

    def refuse(*given: Any, **named: Any) -> None:
        raise OSError(code, os.strerror(code))

    for step in (2, 3):
        with monkeypatch.context() as patch, pytest.raises(CheckpointError, match=os.strerror(code)):
            patch.setattr(os, call, refuse)
            ck.save(tmp_path, step, content(9.0))
        opened = Checkpoint.open(tmp_path / "last")
        assert opened.step == 2
        assert not [path for path in (tmp_path / "checkpoints").iterdir() if "." in path.name]
        assert ck.newest(tmp_path) is not None
        if call in ("mkdir", "fsync", "rename"):
            assert opened.figures == {"validation_loss": 2.0}
            assert len(ck.checkpoints(tmp_path)) == 2


def test_a_script_that_cannot_save_does_not_exit_0(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("in the way")
    script = "from avray import checkpoint as ck; from tests.test_checkpoint import content; import sys\n"
    script += "with ck.AsyncSaver() as saver: saver.save(sys.argv[1], 1, content())"
    command = [sys.executable, "-c", script, str(tmp_path / "run")]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode != 0 and "CheckpointError: Saving" in done.stderr


# ── damage ───────────────────────────────────────────────


def test_a_flipped_bit_names_its_file_and_offers_the_one_before(tmp_path: Path) -> None:
    older = ck.save(tmp_path, 1, content())
    folder = ck.save(tmp_path, 2, content(ema={"weight": torch.ones(3, 2)}), links=("best", "last"))
    names = sorted(path.name for path in folder.iterdir())
    assert len(names) == 10
    for name in names:
        whole = (folder / name).read_bytes()
        for place in {0, 8, len(whole) // 2, len(whole) - 1}:
            damaged = bytearray(whole)
            damaged[place] ^= 1 << (place % 8)
            (folder / name).write_bytes(damaged)
            with pytest.raises(CheckpointError, match=rf"(?s){folder / name}.*intact is {older}"):
                Checkpoint.open(tmp_path / "best").trainer_state()
        (folder / name).write_bytes(whole[:-1])
        with pytest.raises(CheckpointError, match=f"{folder / name}.*{older}"):
            Checkpoint.open(tmp_path / "best")
        with pytest.raises(CheckpointError, match=f"{folder / name}.*{older}"):  # nor does a resumed run lose its steps
            ck.newest(tmp_path)
        assert ck.checkpoints(tmp_path) == [older]
        (folder / name).write_bytes(whole)
    assert Checkpoint.open(tmp_path).step == 2


def test_a_damaged_one_is_not_offered(tmp_path: Path) -> None:
    folders = [ck.save(tmp_path, step, content(), links=("best", "last")) for step in (1, 2, 3)]
    for folder in folders[1:]:
        damaged = bytearray((folder / "model.safetensors").read_bytes())
        damaged[-1] ^= 1
        (folder / "model.safetensors").write_bytes(damaged)
    with pytest.raises(CheckpointError, match=f"{folders[0]}: give it as checkpoint="):
        Checkpoint.open(tmp_path)
    assert Checkpoint.open(tmp_path, verify=False).step == 3
    (folders[0] / "README.md").write_text("# Another\n")
    with pytest.raises(CheckpointError, match="manifest's[.]$"):
        Checkpoint.open(tmp_path)


def test_every_bit_of_the_manifest_counts(tmp_path: Path) -> None:
    folder = ck.save(tmp_path, 1, content())
    whole = (folder / "manifest.json").read_bytes()
    for bit in range(0, 8 * len(whole), 11):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << (bit % 8)
        (folder / "manifest.json").write_bytes(damaged)
        assert ck.checkpoints(tmp_path) == [], f"bit {bit}"
    with pytest.raises(CheckpointError, match="manifest.json"):
        ck.newest(tmp_path)
    (folder / "manifest.json").unlink()
    assert ck.newest(tmp_path) is None


# ── harm ─────────────────────────────────────────────────


class Trap:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["model.pt", "model.pt2", "model.bin", "model.ckpt", "model.th", "best", "last.pkl"])
@pytest.mark.parametrize("kind", ["pickle", "zip"])
def test_a_pickle_is_refused_before_it_is_opened(tmp_path: Path, name: str, kind: str) -> None:
    if kind == "pickle":
        (tmp_path / name).write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    else:
        torch.save({"weight": Trap(tmp_path / "sprung")}, tmp_path / name)
    with pytest.raises(CheckpointError, match="may be a pickle, which can run code"):
        Checkpoint.open(tmp_path / name)
    folder = ck.save(tmp_path / "run", 1, content())
    for target in (
        "model.safetensors",
        "family.json",
        "trainer.json",
        "trainer.safetensors",
        "fitted.safetensors",
    ):
        whole = (folder / target).read_bytes()
        (folder / target).write_bytes((tmp_path / name).read_bytes())
        reseal(folder)
        with pytest.raises(CheckpointError, match=target):
            opened = Checkpoint.open(folder)
            opened.weights()
            opened.trainer_state()
        (folder / target).write_bytes(whole)
    assert not (tmp_path / "sprung").exists()


def test_a_target_in_the_settings_of_a_family(tmp_path: Path) -> None:
    folder = ck.save(tmp_path, 1, content())
    for family in (
        {"name": "toy", "codec": {"_target_": "os.system", "command": "id"}},
        {"name": "${oc.env:HOME}"},
    ):
        (folder / "family.json").write_text(json.dumps(family))
        reseal(folder)
        with pytest.raises(CheckpointError, match="family.json is refused: family: "):
            Checkpoint.open(folder)


def test_a_header_that_lies(tmp_path: Path) -> None:
    folder = ck.save(tmp_path, 1, content())
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    header_bytes = struct.unpack("<Q", whole[:8])[0]
    many = json.dumps({f"{n:040}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(200_000)})
    for data in (
        struct.pack("<Q", 2**63) + whole[8:],
        struct.pack("<Q", len(whole)) + whole[8:],
        struct.pack("<Q", len(many)) + many.encode(),
        whole[:8] + whole[8 : 8 + header_bytes].replace(b"[3,2]", b"[3,9]") + whole[8 + header_bytes :],
        whole[:8] + whole[8 : 8 + header_bytes].replace(b'"{}"', b'"[]"') + whole[8 + header_bytes :],
        b"",
        b"\x01",
    ):
        path.write_bytes(data)
        reseal(folder)
        with pytest.raises(CheckpointError, match="model.safetensors"):
            Checkpoint.open(folder).weights()


def test_a_manifest_that_leads_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "secret.json").write_text("{}")
    folder = ck.save(tmp_path, 1, content())
    whole = json.loads((folder / "manifest.json").read_text())
    for name in (
        "../../secret.json",
        str(tmp_path / "secret.json"),
        "..",
        "",
        "model.pt",
        "sub/model.safetensors",
    ):
        reseal(folder, files=whole["files"] | {name: {"bytes": 2, "sha256": ""}})
        with pytest.raises(CheckpointError):
            Checkpoint.open(folder)
    reseal(folder, files={name: entry for name, entry in whole["files"].items() if name != "fitted.json"})
    with pytest.raises(CheckpointError, match="lacks fitted.json"):
        Checkpoint.open(folder)
    for manifest in ("[]", "{}", "[" * 100_000, '{"sha256": 3, "files": []}', "\udcff"):
        (folder / "manifest.json").write_bytes(manifest.encode(errors="surrogateescape"))
        with pytest.raises(CheckpointError, match="manifest.json"):
            Checkpoint.open(folder)
    reseal_files: dict[str, Any] = {"files": [1], "step": 1, "format_version": 2}
    (folder / "manifest.json").write_text(json.dumps(reseal_files | {"sha256": ck.store.digest(reseal_files)}))
    with pytest.raises(CheckpointError, match="no manifest of avray"):
        Checkpoint.open(folder)


def test_a_pipe_or_an_endless_file_in_place_of_a_file(tmp_path: Path) -> None:
    folder = ck.save(tmp_path, 1, content())
    for make in (os.mkfifo, lambda path: os.symlink("/dev/zero", path)):
        for name in ("manifest.json", "family.json", "model.safetensors"):
            whole = (folder / name).read_bytes()
            (folder / name).unlink()
            make(folder / name)
            with pytest.raises(CheckpointError, match=f"{name}"):
                Checkpoint.open(folder)
            (folder / name).unlink()
            (folder / name).write_bytes(whole)
