"""Whether every node of a cluster sees the same files at a path, and reaches the stores that URLs name: asked before
work starts that would fail there."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Mapping

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from avray.config import DataSettings
from avray.errors import DataError, MissingDependency
from avray.store import Store, is_url

WRITTEN = ("run.dir", "data.cache", "data.demo_dir", "output")
"""Settings that name a folder to write to."""
NAMES = 1000


def shared_paths(data: DataSettings, run_dir: str) -> dict[str, str | None]:
    """What the nodes of one run read and write in common, by setting."""
    demo = {"data.demo_dir": data.demo_dir} if data.path is None else {"data.path": data.path, "data.texts": data.texts}
    only_read = is_url(data.cache) and data.mode == "prepared"
    return {"run.dir": run_dir, "data.cache": None if only_read else data.cache, **demo}


def check_cache(data: DataSettings) -> None:
    """ValueError where the cache cannot be written, unless nothing will be."""
    if data.mode != "prepared":
        Store(data.cache).check_writable("data.cache")


def check_shared(paths: Mapping[str, str | None]) -> None:
    """ValueError, naming the setting, where a node that is there now does not see what lies here at a local path, or
    cannot use a URL (its own credentials are what counts there).

    Folders that are written to are made, and marked for the moment, so that another of the same name is not taken for
    them.
    """
    local = {key: path for key, path in paths.items() if path is not None and not is_url(path)}
    urls = {key: path for key, path in paths.items() if path is not None and is_url(path)}
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) < 2:
        return
    with contextlib.ExitStack() as marks:
        for path in (path for key, path in local.items() if key in WRITTEN):
            os.makedirs(path, exist_ok=True)
            marks.enter_context(tempfile.NamedTemporaryFile(prefix=".avray-shared-", dir=path))
        here = seen(local)
        look, use = ray.remote(num_cpus=0)(seen), ray.remote(num_cpus=0)(trouble)
        places = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in nodes]
        found = ray.get([look.options(scheduling_strategy=place).remote(local) for place in places])
        troubles = ray.get([use.options(scheduling_strategy=place).remote(urls) for place in places if urls])
    for node, said in zip(nodes, troubles, strict=False):
        if said is not None:
            raise ValueError(f"On the node {node['NodeManagerAddress']}: {said}")
    for node, there in zip(nodes, found, strict=True):
        for key, path in local.items():
            if there[key] != here[key]:
                raise ValueError(f"{key}={path} is another one, or none, on the node {node['NodeManagerAddress']}: put "
                                 "it on a file system that every node shares, or give a URL (s3://…).")


def trouble(urls: Mapping[str, str]) -> str | None:
    """Why this node cannot use one of them, if it cannot: a sentence that names the setting."""
    for key, url in urls.items():
        try:
            if key in WRITTEN:
                Store(url).check_writable(key)
            elif Store(url).kind() is None:
                return f"{key}={url} does not exist."
        except (ValueError, DataError, MissingDependency) as error:
            return str(error)
    return None


def seen(paths: Mapping[str, str]) -> dict[str, list[str] | int | None]:
    """What tells a file or a folder from another, wherever it is mounted: its size, or the first names in it; None for
    what is not there."""
    found: dict[str, list[str] | int | None] = {}
    for key, path in paths.items():
        try:
            found[key] = sorted(os.listdir(path))[:NAMES] if os.path.isdir(path) else os.path.getsize(path)
        except OSError:
            found[key] = None
    return found
