"""Paths that another node does not see: a real second node, in a mount namespace where a folder is another."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from avray.data.shared import sign_of, unseen
from tests.commands import BIN, ROOT, TWO_STEPS, free_port, ray_head, running, tones


def can_hide() -> bool:
    """Whether this user may mount over a folder for one process."""
    return sys.platform == "linux" and shutil.which("unshare") is not None and subprocess.run(
        ["unshare", "-m", "true"], capture_output=True, check=False).returncode == 0


def test_what_tells_a_folder_from_another(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("abc")
    paths = {"folder": f"{tmp_path}/a", "file": f"{tmp_path}/a/x", "none": f"{tmp_path}/b"}
    signs = {key: sign_of(path, None) for key, path in paths.items()}
    assert unseen(signs) == []
    (tmp_path / "a" / "y").touch()
    assert unseen(signs) == [], "others may write there meanwhile"
    (tmp_path / "a" / "x").write_text("abcd")
    assert unseen(signs) == ["file"]
    (tmp_path / "a").rename(tmp_path / "elsewhere")
    assert unseen(signs) == ["folder", "file"]


@contextmanager
def second_node(folder: Path, head: int, hidden: Path) -> Iterator[None]:
    """A node that sees nothing in ``hidden``."""
    start = [str(BIN / "ray"), "start", f"--address=127.0.0.1:{head}", "--block", "--node-ip-address=127.0.0.1",
             "--num-cpus=2", f"--dashboard-agent-listen-port={free_port()}", f"--object-store-memory={128 << 20}"]
    hide = f"mount -t tmpfs none {hidden} && exec {' '.join(start)}"
    with running(["unshare", "-m", "sh", "-c", hide], folder) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "Ray runtime started" in line:
                break
        yield


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.skipif(not can_hide(), reason="needs the right to mount in a namespace of its own")
def test_a_path_that_another_node_does_not_see(short_folder: Path) -> None:
    """Of what is read and of what is written, each by its setting, before anything is made; then both are shared."""
    hidden, shared = short_folder / "hidden", short_folder / "shared"
    hidden.mkdir()
    shared.mkdir()
    for folder in (hidden, shared):
        tones(folder / "wavs", 12, 1.0)
    head = free_port()

    def train(**given: Path) -> subprocess.CompletedProcess[str]:
        paths = {"data.path": shared / "wavs", "data.cache": shared / "cache", "run.dir": shared / "run", **given}
        command = [sys.executable, str(ROOT / "pipelines" / "train.py"), f"cluster=127.0.0.1:{head}", *TWO_STEPS,
                   *(f"{key}={path}" for key, path in paths.items())]
        with running(command, short_folder) as process:
            said = process.communicate(timeout=200)[0]
        return subprocess.CompletedProcess(command, process.returncode, said)

    with ray_head(short_folder, head, free_port()), second_node(short_folder, head, hidden):
        for key, path in (("data.path", hidden / "wavs"), ("run.dir", hidden / "run")):
            refused = train(**{key: path})
            assert refused.returncode == 2 and f"{key}={path} is another one, or none, on the node" in refused.stdout
        assert not os.path.exists(shared / "run" / "checkpoints")
        done = train()
        assert done.returncode == 0, done.stdout
        assert not [name for name in os.listdir(shared / "run") if name.startswith(".avray-shared")]
