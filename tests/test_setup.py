"""pipelines/check.py: what works is found by trying it, and what does not has a sentence with its cure."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from avray import setup
from avray.cli import CHECK, compose
from avray.config import CheckSettings
from avray.setup import Finding, as_json, as_text, check_all
from tests.commands import ROOT


def settings(tmp_path: Path, *words: str) -> CheckSettings:
    return compose(CHECK, [f"run.dir={tmp_path}/run", f"data.cache={tmp_path}/cache", *words])  # type: ignore[no-any-return]


def test_what_is_found_is_said_as_text_and_as_json() -> None:
    findings = [Finding("device", "ok", "cpu"), Finding("training step", "failed", "No.")]
    assert as_text(findings).splitlines() == ["ok      device         cpu", "failed  training step  No."]
    assert json.loads(as_json(findings)) == {"ok": False, "checks": [
        {"name": "device", "state": "ok", "said": "cpu"}, {"name": "training step", "state": "failed", "said": "No."}]}


def test_a_check_that_fails_keeps_no_other_from_being_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(given: CheckSettings) -> str:
        raise KeyError("bug")

    monkeypatch.setattr(setup, "CHECKS", {"one": fails, "versions": setup.versions, "storage": setup.storage})
    one, versions, storage = check_all(settings(tmp_path))
    assert one == Finding("one", "failed", "'bug'")
    assert versions.state == "ok" and "ray 2." in versions.said
    assert storage.state == "ok" and not list((tmp_path / "run").iterdir()), "nothing stays"


def test_versions_out_of_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = setup.importlib.metadata.version
    monkeypatch.setattr(setup.importlib.metadata, "version", lambda name: "1.0" if name == "ray" else real(name))
    with pytest.raises(ValueError, match=r"ray is 1.0 and must be ==2"):
        setup.versions(settings(tmp_path))


def test_storage_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="run.dir=.* cannot be written"):
        setup.storage(settings(tmp_path, f"run.dir={tmp_path}/file/run"))
    monkeypatch.setattr(setup, "LEAST_DISK", 1 << 60)
    with pytest.raises(setup.Doubt, match="fills up soon"):
        setup.storage(settings(tmp_path))


def test_encoders_weights_and_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "libopus" in setup.ffmpeg(settings(tmp_path))
    assert setup.weights(settings(tmp_path)) == "latents spectral-v1"
    with pytest.raises(Exception, match="codec.path"):
        setup.weights(settings(tmp_path, "codec=mimi", "codec.path=nobody/nothing"))
    assert setup.device(settings(tmp_path, "trainer.precision=bf16")).startswith("c")
    monkeypatch.setattr(setup, "CODECS", ("libx264", "libnothing"))
    with pytest.raises(ValueError, match="lacks libnothing"):
        setup.ffmpeg(settings(tmp_path))


def test_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert "of our own" in setup.authentication(settings(tmp_path))
    with pytest.raises(ValueError, match="there is no token"):
        setup.authentication(settings(tmp_path, "cluster=10.0.0.1:6379"))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    with pytest.raises(ValueError, match="get-auth-token --generate"):
        setup.authentication(settings(tmp_path))
    monkeypatch.setenv("RAY_AUTH_TOKEN", "5f" * 32)
    assert setup.authentication(settings(tmp_path, "cluster=10.0.0.1:6379")) == "a token is asked for"


LISTENS = """
import socket, sys, time
with socket.create_server((sys.argv[2], 0)) as server:
    print(server.getsockname()[1], flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize(("address", "mode", "is_open"), [("0.0.0.0", "", True), ("0.0.0.0", "token", False),
                                                         ("127.0.0.1", "", False)])
def test_ports_open_to_the_world(address: str, mode: str, is_open: bool, tmp_path: Path) -> None:
    """A process that calls itself a raylet, and really listens."""
    (tmp_path / "raylet.py").write_text(LISTENS)
    process = subprocess.Popen([sys.executable, str(tmp_path / "raylet.py"), "raylet", address], text=True,
                               stdout=subprocess.PIPE, env={"RAY_AUTH_MODE": mode})
    try:
        assert process.stdout is not None
        port = process.stdout.readline().strip()
        try:
            said = setup.ports(settings(tmp_path))
        except ValueError as error:
            said = str(error)
        assert (f"{port} (raylet)" in said) == is_open
    finally:
        process.kill()
        process.communicate()
    assert not psutil.pid_exists(process.pid)


def test_cluster(tmp_path: Path) -> None:
    assert "3 logical CPUs and 0 GPUs are needed" in setup.cluster(settings(tmp_path))
    assert "asks for a token" in setup.cluster(settings(tmp_path, f"cluster={ROOT}/cluster.yaml"))
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        with pytest.raises(ValueError, match="does not answer"):
            setup.cluster(settings(tmp_path, f"cluster=http://127.0.0.1:{nobody.getsockname()[1]}"))


@pytest.mark.ray
def test_a_step_with_the_shared_ray(tmp_path: Path, ray_session: None) -> None:
    said = setup.step(settings(tmp_path, "family.segment_s=0.4", "family.num_layers=1", "trainer.batch_size=4"))
    assert said.startswith("continuation: ") and "a loss of" in said
