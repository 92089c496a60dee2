"""Saving while training goes on: the caller pays for one copy to CPU memory, a thread for the disk.

One save at a time: a second waits for the first, so at most one copy exists besides the model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from avray.checkpoint.state import flatten_state, unflatten_state
from avray.checkpoint.writing import Content, identity, save


class AsyncSaver:
    """Writes checkpoints in one background thread. A save that failed raises its error at the next ``save``,
    ``wait`` or the end of the ``with`` block."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[Path] | None = None

    def save(
        self,
        run_dir: Path | str,
        step: int,
        content: Content,
        links: Sequence[str] = ("last",),
        then: Callable[[Path], object] = lambda folder: None,
    ) -> None:
        """Copy ``content`` to CPU memory and return; the caller may then change it. ``then`` runs in the
        thread once the checkpoint is whole and linked: the place to prune."""
        self.wait()
        self._pending = self._pool.submit(_save, run_dir, step, snapshot(content), tuple(links), then)

    def wait(self) -> Path | None:
        """Until the save under way is done, and its folder; None if none was."""
        pending, self._pending = self._pending, None
        return None if pending is None else pending.result()

    def close(self) -> None:
        """Finish and end the thread."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def snapshot(content: Content) -> Content:
    """A copy in CPU memory that later steps do not touch; tied tensors stay tied. ``fitted``, ``family`` and
    ``settings`` do not change during a run and are taken as they are."""
    copies: dict[Any, Tensor] = {}

    def kept(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        for tensor in tensors.values():
            if identity(tensor) not in copies:
                copies[identity(tensor)] = tensor.detach().to("cpu", copy=True)
        return {name: copies[identity(tensor)] for name, tensor in tensors.items()}

    trainer = None
    if content.trainer is not None:
        flat = flatten_state(content.trainer)
        trainer = unflatten_state(kept(flat.tensors), flat.tree)
    return replace(
        content,
        model=kept(content.model),
        ema=None if content.ema is None else kept(content.ema),
        trainer=trainer,
        figures=copy.deepcopy(dict(content.figures)),
    )


def _save(
    run_dir: Path | str, step: int, content: Content, links: Sequence[str], then: Callable[[Path], object]
) -> Path:
    folder = save(run_dir, step, content, links)
    then(folder)
    return folder
