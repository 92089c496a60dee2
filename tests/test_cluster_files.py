"""The cluster files as Ray's own launcher reads them, and what avray wants of them: a token, and no open door."""

from __future__ import annotations

import copy
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
FILES = ["cluster.yaml", "deploy/local.yaml"]


@pytest.fixture(params=FILES)
def cluster(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    from ray.autoscaler._private import util
    from ray.autoscaler._private.local import config

    monkeypatch.setattr(config, "get_lock_path", lambda name: str(tmp_path / f"{name}.lock"))
    monkeypatch.setattr(config, "get_state_path", lambda name: str(tmp_path / f"{name}.state"))
    read = yaml.safe_load((ROOT / request.param).read_text())
    prepared: dict[str, Any] = util.prepare_config(copy.deepcopy(read))
    util.validate_config(prepared)
    return prepared


def test_work_is_started_with_a_token_and_seen_on_loopback(cluster: dict[str, Any]) -> None:
    starts = [command for name in ("head_start_ray_commands", "worker_start_ray_commands") for command in cluster[name]
              if "ray start" in command]
    assert len(starts) == 2 and all("RAY_AUTH_MODE=token" in command for command in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert "~/.ray/auth_token" in cluster["file_mounts"]


def test_machines_go_when_nothing_is_to_be_done(cluster: dict[str, Any]) -> None:
    assert 0 < cluster["idle_timeout_minutes"] <= 15
    if cluster["provider"]["type"] == "aws":
        types = cluster["available_node_types"]
        assert types.pop(cluster["head_node_type"])["resources"] == {"CPU": 0}
        assert all(kind["min_workers"] == 0 for kind in types.values())
        markets = [kind["node_config"].get("InstanceMarketOptions", {}).get("MarketType") for kind in types.values()
                   if kind["node_config"]["InstanceType"] == "g6e.2xlarge"]
        assert sorted(markets, key=str) == [None, "spot"]


def test_one_version_of_ray_everywhere(cluster: dict[str, Any]) -> None:
    wanted = next(line for line in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
                  if line.startswith("ray["))
    version = wanted.partition("==")[2]
    assert version
    images = [kind["docker"]["worker_image"] for kind in cluster.get("available_node_types", {}).values()
              if "docker" in kind] + [cluster["docker"][name] for name in ("head_image", "worker_image")
                                      if name in cluster["docker"]]
    assert all(image.startswith(f"rayproject/ray:{version}-py311-") for image in images)
    assert any("~/avray" in command and "pip install" in command for command in cluster["setup_commands"])
