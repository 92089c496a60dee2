"""The commands as a person runs them: processes with a Ray of their own, some of them killed."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest
import soundfile

from tests.commands import ROOT, SMALL, tones

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]


def command(script, *overrides, cwd):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, str(ROOT / "pipelines" / script), *map(str, overrides)], cwd=cwd,
                            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def result(process):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def test_prepare_killed_halfway_computes_only_what_is_missing(tmp_path):
    wavs = tones(tmp_path / "wavs", 150, 1.0)
    cache = tmp_path / "cache"
    given = [f"data.path={wavs}", f"data.cache={cache}", f"run.dir={tmp_path / 'run'}", *SMALL]

    def commits():
        return {path: path.stat().st_mtime_ns for path in cache.glob("shards/*/*.json")}

    killed = command("prepare.py", *given, cwd=tmp_path)
    while len(commits()) < 10:
        assert killed.poll() is None, killed.communicate()[0]
        time.sleep(0.05)
    actors = psutil.Process(killed.pid).children(recursive=True)
    killed.send_signal(signal.SIGKILL)
    for actor in actors:  # a Ray ends by itself too, but takes more than a minute to see that it is alone
        with contextlib.suppress(psutil.NoSuchProcess):
            actor.kill()
    psutil.wait_procs(actors)
    killed.communicate()
    kept = commits()
    said = re.search(r"in (\d+) shards .*\((\d+) computed now, 0 rejected\)", result(command("prepare.py", *given,
                                                                                          cwd=tmp_path)))
    shards, computed = map(int, said.groups())
    assert shards > len(kept) + 10, "it was killed too late to show anything"
    assert computed == shards - len(kept)
    assert {path: stamp for path, stamp in commits().items() if path in kept} == kept


def test_a_family_of_ones_own(tmp_path):
    """Its module lies beside the user, and is named again for the checkpoint."""
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\n"
        "from avray.families.continuation import Continuation\n"
        "@dataclass(frozen=True)\n"
        "class Louder(Continuation):\n"
        "    emphasis: float = 0.1\n"
        "    def loss(self, model, batch, generator):\n"
        "        return {name: (1 + self.emphasis) * term\n"
        "                for name, term in super(Louder, self).loss(model, batch, generator).items()}\n"
        "class Count:\n"
        "    def on_epoch_end(self, loop):\n"
        f"        with open({str(tmp_path / 'epochs.txt')!r}, 'a') as file:\n"
        "            print(loop.step, file=file)\n")
    wavs = tones(tmp_path / "wavs", 12, 2.0)
    own = ["family=own", "family._target_=mine.Louder"]
    result(command("train.py", *own, "family.emphasis=0.2", *SMALL, f"data.path={wavs}", f"data.cache={tmp_path}/cache",
                   f"run.dir={tmp_path}/run", "trainer.max_steps=2", "trainer.batch_size=4", "trainer.num_samples=1",
                   "trainer.schedule.warmup_steps=0", "trainer.hooks=[{_target_: mine.Count}]", cwd=tmp_path))
    assert (tmp_path / "epochs.txt").read_text() == "2\n"
    assert list((tmp_path / "run" / "samples").rglob("*.generated.wav"))
    ask = ["generate.py", f"checkpoint={tmp_path}/run", f"audio={wavs}/tone001.wav", "seconds=1",
           f"output={tmp_path}/out.wav"]
    unknown = command(*ask, cwd=tmp_path)
    assert "Louder is not known" in unknown.communicate()[0] and unknown.returncode == 2
    result(command(*ask, "family._target_=mine.Louder", cwd=tmp_path))
    assert soundfile.info(tmp_path / "out.wav").frames == 24_000
