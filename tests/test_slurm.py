"""The Slurm script, run by bash with stand-ins for Slurm's own commands that start each step on this machine."""

from __future__ import annotations

import json
import os
import random
import subprocess
from pathlib import Path

import pytest

from tests.commands import BIN, ROOT, TWO_STEPS, tones

SCRIPT = ROOT / "deploy" / "slurm" / "train.sbatch"
SRUN = """#!/bin/bash
while [ $# -gt 0 ]; do
    case $1 in -w) shift 2 ;; -*) shift ;; *) break ;; esac
done
[ "$1" = hostname ] && { echo 127.0.0.1; exit; }
exec "$@"
"""


def sbatch(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    for name, text in (("srun", SRUN), ("scontrol", "#!/bin/bash\necho here\n")):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    given = {"PATH": f"{folder}:{BIN}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "SLURM_NNODES": "1",
             "SLURM_JOB_ID": str(random.randrange(10**6)), "SLURM_JOB_NODELIST": "here", "SLURM_CPUS_PER_TASK": "4"}
    return subprocess.run(["bash", str(SCRIPT), *words], cwd=ROOT, text=True, capture_output=True, timeout=280,
                          check=False, env={**environment, **given})


def test_what_it_refuses(tmp_path: Path) -> None:
    assert sbatch(tmp_path).returncode == 2
    answer = sbatch(tmp_path, "pipelines/train.py", "cluster=auto")
    assert answer.returncode == 2 and "Leave cluster= out" in answer.stderr


@pytest.mark.ray
@pytest.mark.slow
def test_it_trains_in_an_allocation(short_folder: Path) -> None:
    """A Ray of its own, with a token, that is gone when the pipeline is done; its exit code is the pipeline's."""
    wavs = tones(short_folder / "wavs", 12, 1.0)
    words = [f"data.path={wavs}", f"data.cache={short_folder}/cache", f"run.dir={short_folder}/run", *TWO_STEPS]
    answer = sbatch(short_folder, "pipelines/train.py", *words)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert json.loads((short_folder / "run" / "summary.json").read_text())["steps"] == 2
