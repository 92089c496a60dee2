"""Whether every node of a cluster sees the same files at a path, and reaches the stores that URLs name: asked before
work starts that would fail there."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from avray.config import DataSettings
from avray.errors import DataError, MissingDependency
from avray.store import MARK, Store, is_url

WRITTEN = ("run.dir", "data.cache", "data.demo_dir", "output")
"""Settings that name a folder to write to."""
NAMES = 1000
T = TypeVar("T")


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
        signs: dict[str, Sign] = {}
        for key, path in local.items():
            mark = None
            if key in WRITTEN:
                os.makedirs(path, exist_ok=True)
                mark = marks.enter_context(tempfile.NamedTemporaryFile(prefix=f"{MARK}shared-", dir=path)).name
            signs[key] = sign_of(path, mark)
        found = on_each(nodes, unseen, signs)
        troubles = on_each(nodes, trouble, urls) if urls else []
    for address, said in troubles:
        if said is not None:
            raise ValueError(f"On the node {address}: {said}")
    for address, missing in found:
        for key in missing:
            raise ValueError(f"{key}={local[key]} is another one, or none, on the node {address}: put it on a file "
                             "system that every node shares, or give a URL (s3://…).")


def on_each(nodes: Sequence[Mapping[str, Any]], function: Callable[[Any], T], argument: object) -> list[tuple[str, T]]:
    """What it says on each node, with the node's address; a node that is lost meanwhile is left out."""
    task = ray.remote(num_cpus=0)(function)
    asked = [(node["NodeManagerAddress"], task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(
        node["NodeID"], soft=False)).remote(argument)) for node in nodes]
    found = []
    for address, answer in asked:
        with contextlib.suppress(ray.exceptions.TaskUnschedulableError, ray.exceptions.NodeDiedError):
            found.append((address, ray.get(answer)))
    return found


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


@dataclass(frozen=True)
class Sign:
    """What tells a file or a folder from another, wherever it is mounted: ``files`` that are in it, or its size. Others
    may write to a folder meanwhile, so that more may be in it."""

    path: str
    files: tuple[str, ...] = ()
    size: int | None = None


def sign_of(path: str, mark: str | None) -> Sign:
    """Of what lies here: the mark, or the first names; a path that is not there has neither."""
    if mark is not None:
        return Sign(path, (os.path.basename(mark),))
    try:
        if os.path.isdir(path):
            return Sign(path, tuple(sorted(os.listdir(path))[:NAMES]))
        return Sign(path, size=os.path.getsize(path))
    except OSError:
        return Sign(path)


def unseen(signs: Mapping[str, Sign]) -> list[str]:
    """The settings whose paths are not the same here."""
    def same(sign: Sign) -> bool:
        if sign.size is not None:
            return os.path.isfile(sign.path) and os.path.getsize(sign.path) == sign.size
        return all(os.path.exists(os.path.join(sign.path, name)) for name in sign.files)

    return [key for key, sign in signs.items() if not same(sign)]
