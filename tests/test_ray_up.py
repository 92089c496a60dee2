"""``ray up deploy/local.yaml``, a training job, ``ray down``, as a person types them, over SSH, between machines that
have all of their own but the kernel."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.commands import ROOT, TWO_STEPS, tones
from tests.machines import USER, Machine, cannot, machines

CLUSTER = "deploy/local.yaml"
CHECKOUT = f"/home/{USER}/avray"
ADDRESSES = {"laptop": "192.0.2.1", "head": "192.0.2.10", "worker": "192.0.2.11"}
ASK = """
import socket, sys, urllib.request
try:
    urllib.request.urlopen(f"http://{sys.argv[1]}:8265/api/version", timeout=5)
except OSError as error:
    print(error)
"""


def typed(laptop: Machine, *words: str) -> subprocess.CompletedProcess[str]:
    """What a command says on the laptop, in the checkout."""
    command = laptop.command(words, CHECKOUT, PYTHONPATH=CHECKOUT, OMP_NUM_THREADS="1")
    answer = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True, timeout=300, check=False)
    print("$", *words, answer.stdout, sep="\n", flush=True)
    return answer


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_up_train_down(short_folder: Path) -> None:
    """With the file as it stands, but for one worker less. No other Ray on this host is touched."""
    if reason := cannot():
        pytest.skip(reason)
    with machines(short_folder, ADDRESSES) as found:
        laptop, head = found["laptop"], found["head"]
        tones(short_folder / "shared" / "music", 12, 1.0)
        text = (ROOT / CLUSTER).read_text()
        assert "worker_ips: [192.0.2.11, 192.0.2.12]" in text
        (short_folder / "shared" / "local.yaml").write_text(text.replace(", 192.0.2.12", ""))
        laptop.run("rsync", "-a", "--exclude=.?*", "--exclude=/runs", "--exclude=/cache", "--exclude=__pycache__",
                   f"{ROOT}/", f"{CHECKOUT}/")
        laptop.run("cp", "/shared/local.yaml", f"{CHECKOUT}/{CLUSTER}")
        train = ["python", "pipelines/train.py", f"cluster={CLUSTER}", "data.path=/shared/music",
                 "data.cache=/shared/cache", "run.dir=/shared/runs/a", *TWO_STEPS, "trainer.num_samples=0"]

        assert typed(laptop, "ray", "get-auth-token", "--generate").returncode == 0
        assert typed(laptop, "bash", "deploy/tls.sh", "authority").returncode == 0
        assert typed(laptop, "ray", "up", "--yes", CLUSTER).returncode == 0
        assert "refused" in laptop.run("python", "-c", ASK, ADDRESSES["head"]), "the dashboard is open to the network"
        # Ends with 0 or 1: the head wants a certificate of its caller too, and may say so before openssl has gone.
        asked = laptop.run("bash", "-c", f"openssl s_client -connect {ADDRESSES['head']}:6379 "
                           "-CAfile ~/.ray/tls/ca.crt -verify_return_error </dev/null 2>&1 || true")
        assert "Verification: OK" in asked and "avray" in asked, "no TLS"
        assert "401" in head.run("python", "-c", ASK, "127.0.0.1"), "the dashboard asks for no token"

        done = typed(laptop, *train)
        assert done.returncode == 0 and "The run is in /shared/runs/a" in done.stdout
        assert json.loads(laptop.run("cat", f"{CHECKOUT}/runs/a/summary.json"))["steps"] == 2
        assert (short_folder / "shared" / "runs" / "a" / "last" / "manifest.json").is_file()
        assert "2 local.cluster.node" in typed(laptop, "ray", "exec", CLUSTER, "ray status").stdout

        assert typed(laptop, "ray", "down", "--yes", CLUSTER).returncode == 0
        assert "raylet" not in head.run("ps", "ax")
        refused = typed(laptop, *train)
        assert refused.returncode == 2 and f"cluster={CLUSTER}" in refused.stdout
