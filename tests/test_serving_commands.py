"""The server as a person starts it: ``serve/app.py``, and Serve's own ``run`` and ``deploy`` on a Ray of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import requests
import yaml

from tests.commands import BIN, ROOT, TOKEN, free_port, ray_head, running
from tests.serving import save_continuation
from tests.test_serving import wav

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]
SECRET = "an old violin nobody plays"


def wait_ready(address: str, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0]
        try:
            if requests.get(f"{address}/v1/health/ready", timeout=5).status_code == 200:
                return
        except (requests.ConnectionError, requests.Timeout):
            pass
        time.sleep(0.5)
    raise AssertionError("it never got ready")


def ask(address: str, model: str, **fields: str) -> requests.Response:
    return requests.post(f"{address}/v1/audio/continuations", data={"model": model, "response_format": "pcm", **fields},
                         files={"file": wav()}, headers={"x-request-id": "asked-here"}, timeout=60)


def test_the_newest_run_its_figures_and_its_log(short_folder: Path) -> None:
    save_continuation(short_folder / "runs" / "next")
    port, metrics = free_port(), free_port()
    command = [sys.executable, str(ROOT / "serve" / "app.py"), "serve.proxy=haproxy", f"serve.port={port}",
               f"serve.metrics_port={metrics}"]
    with running(command, short_folder, RAY_TMPDIR=str(short_folder), RAY_metrics_report_interval_ms="1000") as process:
        wait_ready(f"http://127.0.0.1:{port}", process)
        assert process.stdout is not None
        assert "serving the newest run, " in process.stdout.readline()
        assert ask(f"http://127.0.0.1:{port}", "next").status_code == 200
        refused = ask(f"http://127.0.0.1:{port}", "next", input=SECRET)
        assert refused.status_code == 400

        deadline, counted = time.monotonic() + 60, ""
        while not all(name in counted for name in ("avray_requests", "avray_engine_steps", "avray_generation_s")):
            assert time.monotonic() < deadline, counted[:2000]
            counted = requests.get(f"http://127.0.0.1:{metrics}/metrics", timeout=10).text
            time.sleep(0.5)
        assert any('Model="next"' in line or 'model="next"' in line for line in counted.splitlines()
                   if "avray_requests" in line and 'status="200"' in line)
        logs = [path.read_text(errors="replace") for path in short_folder.rglob("*.log") if path.is_file()]
        assert any("asked-here" in log and "/v1/audio/continuations" in log for log in logs)
        assert not any(SECRET in log for log in logs)


def test_serve_deploy_and_serve_run(short_folder: Path) -> None:
    """On one Ray head; the file is ``serve/config.yaml`` with its checkpoint and port put in."""
    save_continuation(short_folder / "next")
    port, head, dashboard = free_port(), free_port(), free_port()
    address, environment = f"http://127.0.0.1:{port}", {"RAY_ADDRESS": f"127.0.0.1:{head}", "PYTHONPATH": str(ROOT)}
    config = yaml.safe_load((ROOT / "serve" / "config.yaml").read_text())
    config["http_options"]["port"] = port
    config["applications"][1]["args"] = {"checkpoint": f"music:{short_folder}/next"}
    (short_folder / "config.yaml").write_text(yaml.safe_dump(config))

    def serve(*arguments: str) -> None:
        done = subprocess.run([BIN / "serve", *arguments], cwd=ROOT, env=os.environ | TOKEN | environment, text=True,
                              capture_output=True, timeout=120, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    with ray_head(short_folder, head, dashboard) as process:
        serve("deploy", str(short_folder / "config.yaml"), "--address", f"http://127.0.0.1:{dashboard}")
        wait_ready(address, process)
        deployed = ask(address, "music")
        assert deployed.status_code == 200
        serve("shutdown", "-y", "--address", f"http://127.0.0.1:{dashboard}")

        serve("start", "--http-host", "127.0.0.1", "--http-port", str(port))
        run = [str(BIN / "serve"), "run", "serve.app:build", f"checkpoint={short_folder}/next"]
        with running(run, ROOT, **environment) as command:
            wait_ready(address, command)
            assert ask(address, "next").content == deployed.content
