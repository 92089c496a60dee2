"""The cluster files as Ray's own launcher reads them, and what avray wants of them: a token, and no open door."""

from __future__ import annotations

import copy
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from avray.cluster_file import ceiling, problems
from avray.data import cluster as cluster_module
from avray.data.cluster import Needs
from avray.jobs import connected

ROOT = Path(__file__).parents[1]
FILES = ["cluster.yaml", "deploy/gcp.yaml", "deploy/local.yaml"]


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
    if cluster["provider"]["type"] != "local":
        types = cluster["available_node_types"]
        assert types.pop(cluster["head_node_type"])["resources"] == {"CPU": 0}
        assert all(kind["min_workers"] == 0 for kind in types.values())
        spot = {name: "spot" in str(kind["node_config"]).lower() for name, kind in types.items()}
        assert spot["gpu_spot"] and spot["cpu"] and not spot["gpu"], "a spot node, and one that takes its place"


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


def test_what_aws_is_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By Ray's launcher, of a stand-in for AWS: key, role, subnets, doors, and an instance of each kind of node."""
    import boto3
    from moto import mock_aws
    from ray.autoscaler._private import util
    from ray.autoscaler._private.aws import config as aws
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    (tmp_path / ".ssh").mkdir()
    monkeypatch.setattr(aws.time, "sleep", lambda _: None)
    for name, value in {"HOME": str(tmp_path), "AWS_ACCESS_KEY_ID": "none", "AWS_SECRET_ACCESS_KEY": "none"}.items():
        monkeypatch.setenv(name, value)
    with mock_aws(config={"iam": {"load_aws_managed_policies": True}}):
        read = yaml.safe_load((ROOT / "cluster.yaml").read_text())
        config = AWSNodeProvider.bootstrap_config(util.prepare_config(read))
        kinds = AWSNodeProvider.fillout_available_node_types_resources(config)["available_node_types"]
        assert {name: (kind["resources"]["CPU"], kind["resources"].get("GPU")) for name, kind in kinds.items()} == {
            "head": (0, None), "cpu": (16, None), "gpu_spot": (8, 1), "gpu": (8, 1), "gpu8": (192, 8)}
        provider = AWSNodeProvider(config["provider"], config["cluster_name"])
        for name, kind in kinds.items():
            provider.create_node(kind["node_config"], {"ray-user-node-type": name}, 1)
        ec2 = boto3.client("ec2", region_name=read["provider"]["region"])
        started = [one for group in ec2.describe_instances()["Reservations"] for one in group["Instances"]]
        assert sorted((one["InstanceType"], one.get("InstanceLifecycle", "kept")) for one in started) == [
            ("c7i.4xlarge", "spot"), ("g6e.2xlarge", "kept"), ("g6e.2xlarge", "spot"), ("g6e.48xlarge", "kept"),
            ("m7i.xlarge", "kept")]
        assert {group["GroupName"] for one in started for group in one["SecurityGroups"]} == {"avray"}
        group = ec2.describe_security_groups(Filters=[{"Name": "group-name", "Values": ["avray"]}])["SecurityGroups"][0]
        to_the_world = [(rule["FromPort"], rule["ToPort"]) for rule in group["IpPermissions"] if rule["IpRanges"]]
        assert to_the_world == [(22, 22)]


KUBERAY = sorted((ROOT / "deploy" / "kuberay").glob("*.yaml"))


@pytest.mark.parametrize("path", KUBERAY, ids=lambda path: path.stem)
def test_kubernetes(path: Path) -> None:
    """One version, a token, nobody root, every pod with limits; what is served is what Serve's schema takes."""
    read = yaml.safe_load(path.read_text())
    assert read["apiVersion"] == "ray.io/v1" and read["kind"] in ("RayCluster", "RayJob", "RayService")
    spec = read["spec"].get("rayClusterConfig", read["spec"])
    if read["kind"] == "RayJob":
        assert spec["clusterSelector"] == {"ray.io/cluster": "avray"} and " cluster=auto " in spec["entrypoint"]
        return
    assert str(spec["rayVersion"]) == metadata.version("ray") and spec["authOptions"] == {"mode": "token"}
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    pods = [group["template"]["spec"] for group in groups]
    assert all(pod["securityContext"]["runAsNonRoot"] for pod in pods)
    containers = [container for pod in pods for container in pod["containers"]]
    assert all(one["resources"]["limits"] == one["resources"]["requests"] for one in containers)
    assert {one["image"] for one in containers} <= {"avray:cpu", "avray:gpu"}
    assert {name["name"] for pod in pods for name in pod["volumes"]} == {"shared"}
    if read["kind"] == "RayService":
        config = ServeDeploySchema(**yaml.safe_load(read["spec"]["serveConfigV2"]))
        assert config.applications[0].import_path == "serve.app:build"
        assert all(one["envFrom"] == [{"secretRef": {"name": "avray-keys"}}] for one in containers), "keys, or no door"


def test_the_image_has_this_ray_and_nobody_root() -> None:
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    assert f"ARG RAY={metadata.version('ray')}" in lines and "USER ray" in lines
    torch = next(line for line in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
                 if line.startswith("torch>"))
    assert any(f'"{torch}"' in line for line in lines)


def test_the_files_here_are_fit() -> None:
    assert [problems(str(ROOT / name)) for name in FILES] == [[], [], []]


OPEN = {"security_group": {"IpPermissions": [
    {"FromPort": 22, "ToPort": 22, "IpRanges": [{"CidrIp": "0.0.0.0/0"}]},
    {"FromPort": 8265, "ToPort": 8265, "IpRanges": [{"CidrIp": "0.0.0.0/0"}]}]}}


@pytest.mark.parametrize(("change", "words"), [
    (("RAY_AUTH_MODE=token ray start --head", "ray start --head"), "head_start_ray_commands starts Ray without"),
    (("--dashboard-host=127.0.0.1", "--dashboard-host 0.0.0.0"), "opens the dashboard to 0.0.0.0"),
    (("ray:2.60.0-py311-gpu", "ray:2.59.1-py311-gpu"), "is not the Ray of this machine"),
    (("ray:2.60.0-py311-cpu", "ray:2.60.0-py310-cpu"), "has Python 3.10"),
    (("worker_start_ray_commands:", "other:"), "worker_start_ray_commands is missing"),
    (("GroupName: avray # SSH from outside, all ports between the nodes; nothing else",
      f"IpPermissions: {OPEN['security_group']['IpPermissions']}"), "opens ports 8265 to 8265 to the world")])
def test_a_file_that_is_not_fit(change: tuple[str, str], words: str, tmp_path: Path) -> None:
    """By each of the doors that a file can leave open; the jobs of that cluster are refused with the same sentence."""
    text = (ROOT / "cluster.yaml").read_text()
    assert change[0] in text
    (tmp_path / "c.yaml").write_text(text.replace(*change))
    found = problems(str(tmp_path / "c.yaml"))
    assert len(found) == 1 and words in found[0]
    with pytest.raises(ValueError, match="is not fit to be used"), connected(str(tmp_path / "c.yaml")):
        pass


@pytest.mark.parametrize("text", ["", "a: [", "[]", "a: 1"])
def test_what_is_no_cluster_file(text: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    for path in (tmp_path / "c.yaml", tmp_path / "none.yaml"):
        with pytest.raises(ValueError, match="^cluster=.*c.yaml|none.yaml is no file"):
            problems(str(path))


def test_how_far_a_cluster_can_grow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head without work of its own has no CPU yet: what it may start counts, on the head alone."""
    kinds = {"head": {"resources": {"CPU": 0}}, "gpu": {"max_workers": 3, "resources": {"CPU": 8, "GPU": 1}},
             "cpu": {"resources": {"CPU": 16}}}
    file = tmp_path / "bootstrap.yaml"
    file.write_text(yaml.safe_dump({"max_workers": 5, "head_node_type": "head", "available_node_types": kinds}))
    assert ceiling(file) == {"CPU": 3 * 8 + 5 * 16, "GPU": 3} and ceiling(tmp_path / "none") is None
    monkeypatch.setattr(cluster_module.ray, "cluster_resources", lambda: {"CPU": 2.0})
    for path, expected in ((file, {"CPU": 104, "GPU": 3}), (tmp_path / "none", {"CPU": 2.0})):
        monkeypatch.setattr(cluster_module, "BOOTSTRAP", path)
        assert cluster_module.available() == expected
    file.write_text(yaml.safe_dump({"available_node_types": {"own": {"resources": {}}}}))
    monkeypatch.setattr(cluster_module, "BOOTSTRAP", file)
    assert Needs(trainers=500, trainer_gpus=8).refusal(cluster_module.available()) is None, "nobody knows: Ray will say"
