"""What the workers tell the driver while they train: progress to print, checkpoints to sample.

The driver launches the sampling tasks, not the worker: a task belongs to the process that started it and would end
with it.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import ray

from avray.checkpoint import prune, remote
from avray.mirror import Mirror, working_copy
from avray.progress import Progress, ProgressLine, shown
from avray.train.job import Job
from avray.train.samples import Asked, no_longer_await, questions, sample_folder, write_samples


class Listener(Protocol):
    """Who wants to know more than a progress line does: a sweep. Called in the watching thread, or where the training
    runs in this process, in the training's and in that which saves."""

    def worker(self, handle: Any) -> None:
        """Rank 0's actor, at each start of the group."""

    def figures(self, step: int, figures: Mapping[str, float]) -> None:
        """What was logged after ``step``; ``validation/loss`` among it where it was validated."""

    def saved(self, checkpoint: Path, step: int) -> None:
        """A checkpoint that is whole."""

    def between_steps(self) -> None:
        """What it raises ends the training; asked of a training in this process only."""


@ray.remote(num_cpus=0, max_retries=1)
def sample(checkpoint: str, asked: list[Asked], run_dir: str, tensorboard: bool, step: int,
           family: str | None) -> None:
    """Samples of one checkpoint, beside the training."""
    copy, mirror = working_copy(run_dir), Mirror(run_dir, ("samples/", "tensorboard/"))
    try:
        # A folder of its own: TensorBoard follows one event file a folder, and would lose the trainer's.
        shown = copy / "tensorboard" / "samples" if tensorboard else None
        write_samples(checkpoint, asked, sample_folder(copy, step), shown, step, family)
        mirror.push()
    finally:
        no_longer_await(run_dir, step)


class Watch:
    """Prints progress and has samples made, in a thread beside ``TorchTrainer.fit``."""

    def __init__(self, job: Job, listener: Listener | None = None) -> None:
        self.job, self.listener = job, listener
        self.run_dir = job.settings.run.dir
        self.line = ProgressLine(job.max_steps) if shown(job.settings.logging.progress) else None
        self.asked = questions(job.family, job.validation, job.settings.trainer.num_samples)
        self.sampling: list[ray.ObjectRef] = []
        self.failed_samples: list[str] = []
        self.outcome: dict[str, Any] | None = None

    @contextlib.contextmanager
    def following(self, board: Any) -> Iterator[None]:
        """Read the board twice a second until the block ends."""
        stop = threading.Event()

        def follow() -> None:
            while not stop.wait(0.5):
                self._read(board)

        thread = threading.Thread(target=follow, name="avray-watch", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            with contextlib.suppress(ray.exceptions.RayError):
                self._read(board)
            if self.line is not None:
                self.line.close()

    def _read(self, board: Any) -> None:
        for kind, content in ray.get(board.take.remote()):
            self.hear(kind, content)

    def hear(self, kind: str, content: Any) -> None:
        """What rank 0 has to say."""
        if kind == "progress" and self.line is not None:
            assert isinstance(content, Progress)
            self.line.update(content)
        elif kind == "outcome":
            self.outcome = content
        elif kind in ("worker", "figures", "saved"):
            if self.listener is not None:
                getattr(self.listener, kind)(*content)
        elif kind == "sample":
            checkpoint, step = content
            self.sample(checkpoint, step)

    def sample(self, checkpoint: str, step: int) -> None:
        family, tensorboard = self.job.settings.family.get("_target_"), self.job.settings.trainer.loggers.tensorboard
        self.sampling.append(sample.remote(checkpoint, self.asked, self.run_dir, tensorboard, step, family))

    def finish(self) -> None:
        """Wait for the samples under way, and prune what was kept for them. One that failed is said, not raised."""
        for reference in self.sampling:
            try:
                ray.get(reference)
            except ray.exceptions.RayError as error:
                self.failed_samples.append(str(error).strip().splitlines()[-1])
        trainer = self.job.settings.trainer
        prune(working_copy(self.run_dir), trainer.keep_last, trainer.keep_every_steps)
        remote.prune(self.run_dir, trainer.keep_last, trainer.keep_every_steps)
        for reason in self.failed_samples:
            print(f"A sample could not be made: {reason}", file=sys.stderr)
