"""What a cluster file (of ``ray up``) has to say before it is used: a token, no open door, our versions."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

PYTHONS = ("311", "312", "313")
LOOPBACK = ("127.0.0.1", "localhost", "::1")
SSH = 22
_HOST = re.compile(r"--dashboard-host[= ](\S+)")
_RAY = re.compile(r"(?:rayproject/ray(?:-ml)?:|ray(?:\[[\w,]*\])?==)(\d+\.\d+\.\d+)(?:-py(\d+))?")


def problems(path: str) -> list[str]:
    """One sentence with the cure for each reason not to start it; none for a file that is fit. ValueError for none."""
    import ray

    try:
        config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"cluster={path} is no file: give the one that ray up took.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"cluster={path} cannot be read ({' '.join(str(error).split())[:200]}).") from None
    if not isinstance(config, Mapping) or "provider" not in config:
        raise ValueError(f"cluster={path} is no cluster file: it names no provider.")
    return [*_doors(config), *_ports(config), *_versions(config, ray.__version__)]


def _doors(config: Mapping[str, Any]) -> Iterator[str]:
    for name in ("head_start_ray_commands", "worker_start_ray_commands"):
        starts = [command for command in config.get(name) or [] if "ray start" in str(command)]
        for command in starts:
            if "RAY_AUTH_MODE=token" not in command.partition("ray start")[0]:
                yield (f"{name} starts Ray without a token, so that whoever reaches its ports runs code: put "
                       "RAY_AUTH_MODE=token before ray start.")
            host = _HOST.search(command)
            if host and host.group(1) not in LOOPBACK:
                yield f"{name} opens the dashboard to {host.group(1)}: let it be --dashboard-host=127.0.0.1."
        if not starts:
            yield f"{name} is missing, and Ray's own commands ask for no token: give them as cluster.yaml does."


def _ports(config: Mapping[str, Any]) -> Iterator[str]:
    """Security groups on AWS whose rules let the world in at more than SSH."""
    group = (config["provider"] or {}).get("security_group") or {}
    for rule in group.get("IpPermissions") or []:
        ranges = [one.get("CidrIp", one.get("CidrIpv6")) for name in ("IpRanges", "Ipv6Ranges")
                  for one in rule.get(name) or []]
        first, last = rule.get("FromPort", 0), rule.get("ToPort", 65_535)
        if any(one in ("0.0.0.0/0", "::/0") for one in ranges) and (first, last) != (SSH, SSH):
            yield f"provider.security_group opens ports {first} to {last} to the world: let in no more than {SSH}."


def _versions(config: Mapping[str, Any], ours: str) -> Iterator[str]:
    for said in sorted({match.group(0): match for match in _RAY.finditer(str(config))}.items()):
        ray_version, python = said[1].groups()
        if ray_version != ours:
            yield f"{said[0]} is not the Ray of this machine, {ours}: give every node that one."
        if python is not None and python not in PYTHONS:
            yield f"{said[0]} has Python {python[0]}.{python[1:]}, and avray takes 3.11 to 3.13: take such an image."


def ceiling(path: Path) -> dict[str, float] | None:
    """The logical CPUs and GPUs that a cluster can grow to, from the file that its head was started with; None where
    that is not known: no such file, or a type of node that does not say what it has."""
    if not path.is_file():
        return None
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    most = {"CPU": 0.0, "GPU": 0.0}
    for name, kind in (config.get("available_node_types") or {}).items():
        resources = kind.get("resources") or {}
        number = 1 if name == config.get("head_node_type") else kind.get("max_workers", config.get("max_workers", 0))
        if "CPU" not in resources:
            return None
        for one in most:
            most[one] += number * float(resources.get(one, 0))
    return most
