"""Where figures, sounds and pictures of a run go.

Notable: every logger can be opened again at a step. What lies beyond it was written by a process that died
after its last checkpoint; the resumed run will write it anew, so it is dropped (TensorBoard's ``purge_step``,
rows of the CSV). A step is the number of updates done, so a checkpoint of step s keeps the rows of step s.
"""

from __future__ import annotations

import csv
import importlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from avray.errors import MissingDependency
from avray.media import Audio

if TYPE_CHECKING:
    from avray.settings.trainer import LoggerSettings


class Logger(Protocol):
    """Takes figures, float32 sound ``[channels, time]`` and uint8 pictures ``[height, width, 3]`` of a
    step."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    def audio(self, step: int, name: str, audio: Audio) -> None: ...

    def image(self, step: int, name: str, rgb: np.ndarray) -> None: ...

    def close(self, failed: bool = False) -> None: ...


class LoggerGroup:
    """Hands everything to each of several loggers (none is fine)."""

    def __init__(self, loggers: Sequence[Logger]) -> None:
        self.loggers = list(loggers)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for logger in self.loggers:
            logger.scalars(step, values)

    def audio(self, step: int, name: str, audio: Audio) -> None:
        for logger in self.loggers:
            logger.audio(step, name, audio)

    def image(self, step: int, name: str, rgb: np.ndarray) -> None:
        for logger in self.loggers:
            logger.image(step, name, rgb)

    def close(self, failed: bool = False) -> None:
        """``failed``: the run did not come to its end."""
        for logger in self.loggers:
            logger.close(failed)


class TensorBoardLogger:
    """Event files in ``folder``. TensorBoard plays mono only, so channels are averaged."""

    def __init__(self, folder: str | Path, resume_step: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge_step = None if resume_step is None else resume_step + 1
        self.writer = SummaryWriter(str(folder), purge_step=purge_step)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def audio(self, step: int, name: str, audio: Audio) -> None:
        mono = audio.samples.mean(axis=0, keepdims=True).clip(-1.0, 1.0)
        self.writer.add_audio(name, mono, step, sample_rate=audio.sample_rate_hz)

    def image(self, step: int, name: str, rgb: np.ndarray) -> None:
        self.writer.add_image(name, rgb, step, dataformats="HWC")

    def close(self, failed: bool = False) -> None:
        self.writer.close()


class CsvLogger:
    """``metrics.csv``: one row a step, one column a figure, an empty cell where a step has none.

    A figure seen for the first time adds a column (the file is rewritten, atomically); figures of the same
    step, given in several calls, share a row. Each call is on disk when it returns. Sound and pictures are
    ignored.
    """

    def __init__(self, path: str | Path, resume_step: int | None = None) -> None:
        self.path = Path(path)
        self.columns = ["step"]
        self.last: dict[str, str] = {}
        self.last_offset = 0
        rows: list[dict[str, str]] = []
        if resume_step is not None and self.path.exists():
            whole_lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
            reader = csv.DictReader(line for line in whole_lines if line.endswith("\n"))
            self.columns = list(reader.fieldnames or self.columns)
            rows = [row for row in reader if int(row["step"]) <= resume_step]
        self._rewrite(rows)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        new = [name for name in values if name not in self.columns]
        if new:
            self.file.close()
            with self.path.open(encoding="utf-8", newline="") as file:
                rows = list(csv.DictReader(file))
            self.columns += new
            self._rewrite(rows)
        same = self.last.get("step") == str(step)
        row = dict(self.last) if same else {"step": str(step)}
        row |= {name: _cell(value) for name, value in values.items()}
        if same:
            self.file.seek(self.last_offset)
            self.file.truncate()
        self._append(row)

    def audio(self, step: int, name: str, audio: Audio) -> None:
        pass

    def image(self, step: int, name: str, rgb: np.ndarray) -> None:
        pass

    def close(self, failed: bool = False) -> None:
        self.file.close()

    def _append(self, row: dict[str, str]) -> None:
        self.last, self.last_offset = row, self.file.tell()
        csv.DictWriter(self.file, self.columns, restval="", lineterminator="\n").writerow(row)
        self.file.flush()

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(self.path.name + ".partial")
        self.file = partial.open("w", encoding="utf-8", newline="")
        csv.DictWriter(self.file, self.columns, lineterminator="\n").writeheader()
        self.last, self.last_offset = {}, self.file.tell()
        for row in rows:
            self._append(row)
        self.file.flush()
        os.replace(partial, self.path)


def _cell(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.9g}"  # 9 digits tell any two float32 apart


def read_metrics(path: str | Path) -> dict[str, list[tuple[int, float]]]:
    """Each figure of a ``metrics.csv`` as (step, value), for ``avray.metrics.pictures.curve_png``."""
    curves: dict[str, list[tuple[int, float]]] = {}
    with Path(path).open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            step = int(row.pop("step"))
            for name, cell in row.items():
                if cell:
                    curves.setdefault(name, []).append((step, float(cell)))
    return curves


class WandbLogger:
    """Weights & Biases. ``run_id`` is what a resumed run is found by; figures stand over our own ``step``,
    because W&B refuses to go back to an earlier step of its own."""

    def __init__(self, project: str, run_id: str, folder: str | Path, config: Mapping[str, Any]) -> None:
        self.wandb = _optional("wandb")
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.run = self.wandb.init(project=project, id=run_id, name=run_id, resume="allow", dir=str(folder),
                                   config=dict(config))
        self.run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log({"step": step, **values})

    def audio(self, step: int, name: str, audio: Audio) -> None:
        sound = self.wandb.Audio(audio.samples.T, sample_rate=audio.sample_rate_hz)
        self.run.log({"step": step, name: sound})

    def image(self, step: int, name: str, rgb: np.ndarray) -> None:
        self.run.log({"step": step, name: self.wandb.Image(rgb)})

    def close(self, failed: bool = False) -> None:
        self.run.finish(exit_code=int(failed))


class MlflowLogger:
    """MLflow, where MLFLOW_TRACKING_URI says or at ``tracking_uri`` (a server, or a database such as
    ``sqlite:///runs/mlflow.db``). Sound and pictures are artifacts named after the figure and the step."""

    def __init__(self, experiment: str, run_name: str, config: Mapping[str, Any],
                 tracking_uri: str | None = None) -> None:
        mlflow = _optional("mlflow")
        self.client = mlflow.MlflowClient(tracking_uri)
        known = self.client.get_experiment_by_name(experiment)
        experiment_id = known.experiment_id if known else self.client.create_experiment(experiment)
        self.run_id = self.client.create_run(experiment_id, run_name=run_name).info.run_id
        for key, value in config.items():
            self.client.log_param(self.run_id, key, value)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.client.log_metric(self.run_id, name, float(value), step=step)

    def audio(self, step: int, name: str, audio: Audio) -> None:
        import soundfile

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"step-{step:08d}.wav"
            soundfile.write(path, audio.samples.T, audio.sample_rate_hz)
            self.client.log_artifact(self.run_id, str(path), artifact_path=name)

    def image(self, step: int, name: str, rgb: np.ndarray) -> None:
        self.client.log_image(self.run_id, rgb, artifact_file=f"{name}/step-{step:08d}.png")

    def close(self, failed: bool = False) -> None:
        self.client.set_terminated(self.run_id, "FAILED" if failed else "FINISHED")


def open_loggers(settings: LoggerSettings, run_dir: Path, config: Mapping[str, Any],
                 resume_step: int | None = None) -> LoggerGroup:
    """The loggers that ``settings`` names, for the run in ``run_dir``; on rank 0 alone. ``config`` is shown
    by the services. MissingDependency, before anything is written, where one is not installed."""
    if settings.wandb:
        _optional("wandb")
    if settings.mlflow:
        _optional("mlflow")
    loggers: list[Logger] = []
    if settings.csv:
        loggers.append(CsvLogger(run_dir / "metrics.csv", resume_step))
    if settings.tensorboard:
        loggers.append(TensorBoardLogger(run_dir / "tensorboard", resume_step))
    if settings.wandb:
        loggers.append(WandbLogger(settings.wandb_project, run_name(run_dir), run_dir, config))
    if settings.mlflow:
        loggers.append(MlflowLogger("avray", run_name(run_dir), config))
    return LoggerGroup(loggers)


def run_name(run_dir: Path) -> str:
    """What the services call a run: its folder's name, after its sweep's where it is a trial, whose own is a number."""
    return f"{run_dir.parents[1].name}-{run_dir.name}" if run_dir.parent.name == "trials" else run_dir.name


def _optional(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingDependency(
            f'Logging to {module} was asked for and {module} is not installed: pip install "avray[{module}]".'
        ) from error
