"""Commands sent to a cluster: a real Ray head with its Jobs, and terminals that die."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from avray.jobs import exit_code, is_remote, job_of
from tests.commands import ROOT, TOKEN, TWO_STEPS, free_port, ray_head, running, tones


def test_where_a_command_goes() -> None:
    assert not any(map(is_remote, (None, "auto", "10.0.0.1:6379")))
    assert all(map(is_remote, ("cluster.yaml", "http://127.0.0.1:8265")))


def test_what_is_sent() -> None:
    script = ROOT / "pipelines" / "train.py"
    job = job_of(script, ["cluster=cluster.yaml", "run.dir=/shared/a", "data.path=s3://b/c", "note=two words"])
    assert job.folder == ROOT
    assert job.entrypoint == ("python pipelines/train.py run.dir=/shared/a data.path=s3://b/c 'note=two words' "
                              "cluster=auto")
    with pytest.raises(ValueError, match=r"^run\.dir is not given"):
        job_of(script, ["cluster=cluster.yaml"])
    with pytest.raises(ValueError, match=r"^data\.path=wavs is relative to this machine"):
        job_of(script, ["run.dir=/shared/a", "data.path=wavs"])


def test_how_it_ended() -> None:
    assert [exit_code(*end) for end in (("SUCCEEDED", 0), ("STOPPED", None), ("FAILED", 3), ("FAILED", None))] \
        == [0, 130, 3, 5]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_jobs_outlive_the_terminal(short_folder: Path) -> None:
    wavs = tones(short_folder / "wavs", 12, 1.0)
    head, dashboard = free_port(), free_port()
    cluster = f"http://127.0.0.1:{dashboard}"
    train = [sys.executable, str(ROOT / "pipelines" / "train.py"), f"cluster={cluster}", f"data.path={wavs}",
             f"data.cache={short_folder}/cache", f"run.dir={short_folder}/shared/run", *TWO_STEPS]

    def jobs(*words: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | TOKEN | {"PYTHONPATH": str(ROOT)}
        return subprocess.run([sys.executable, "-m", "avray.jobs", *words, cluster], cwd=short_folder, text=True,
                              capture_output=True, timeout=300, check=False, env=environment)

    def sent(terminal: subprocess.Popen[str]) -> str:
        """The id of the job, from the first line that says it."""
        assert terminal.stdout is not None
        for line in terminal.stdout:
            if found := re.match(r"Job (avray-train-\S+) on", line):
                return found.group(1)
            print(line, end="")
        raise AssertionError("no job was sent")

    with ray_head(short_folder, head, dashboard):
        with running(train, short_folder) as terminal:
            submission = sent(terminal)
            terminal.kill()
        followed = jobs("follow", submission)
        assert followed.returncode == 0, followed.stdout + followed.stderr
        assert "The run is in" in followed.stdout
        for folder in ("shared", "runs"):  # where the cluster wrote it, and here
            assert json.loads((short_folder / folder / "run" / "summary.json").read_text())["steps"] == 2

        with running([*train, "trainer.batch_size=0"], short_folder) as terminal:
            said = terminal.communicate(timeout=300)[0]
            assert terminal.returncode == 2 and "trainer.batch_size" in said

        with running([*train[:-1], "resume=true", "trainer.max_steps=100000"], short_folder) as terminal:
            submission = sent(terminal)
            time.sleep(5)
            assert "RUNNING" in jobs("status", submission).stdout
            assert jobs("stop", submission).returncode == 0
            terminal.communicate(timeout=120)
            assert terminal.returncode == 130
        assert jobs("follow", "avray-train-none").returncode != 0
