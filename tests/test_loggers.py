"""Each logger is read back with its own tools; a resumed run leaves no row twice; the line a person reads."""

import csv
import io
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avray.errors import MissingDependency
from avray.media import Audio
from avray.progress import Progress, ProgressLine, duration
from avray.settings.trainer import LoggerSettings
from avray.train.loggers import (
    CsvLogger,
    LoggerGroup,
    MlflowLogger,
    TensorBoardLogger,
    WandbLogger,
    open_loggers,
    read_metrics,
    run_name,
)

TONE = Audio(0.5 * np.sin(np.arange(2400, dtype=np.float32) / 8)[None].repeat(2, axis=0), 24_000)
RED = np.full((8, 16, 3), [255, 0, 0], dtype=np.uint8)


def rows(path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_tensorboard_reads_back(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = TensorBoardLogger(tmp_path)
    for step in (1, 2, 3):
        first.scalars(step, {"loss": 10.0 - step})
    first.audio(3, "sample/0", TONE)
    first.image(3, "spectrogram/0", RED)
    first.close()
    resumed = TensorBoardLogger(tmp_path, resume_step=2)
    resumed.scalars(3, {"loss": 5.0})
    resumed.close()
    events = EventAccumulator(str(tmp_path), size_guidance={"audio": 0, "images": 0})
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 9.0), (2, 8.0), (3, 5.0)]

    again = TensorBoardLogger(tmp_path / "media")
    again.audio(0, "sample/0", TONE)
    again.image(0, "spectrogram/0", RED)
    again.close()
    events = EventAccumulator(str(tmp_path / "media"), size_guidance={"audio": 0, "images": 0})
    events.Reload()
    assert events.Audio("sample/0")[0].sample_rate == 24_000
    assert (events.Images("spectrogram/0")[0].width, events.Images("spectrogram/0")[0].height) == (16, 8)


def test_csv_grows_columns_and_merges_a_step(tmp_path):
    logger = CsvLogger(tmp_path / "run" / "metrics.csv")
    logger.scalars(1, {"loss": 1.0})
    logger.scalars(2, {"loss": 0.5})
    logger.scalars(2, {"validation_loss": 0.75})
    logger.scalars(3, {"loss": float("nan")})
    found = rows(logger.path)
    assert found == [
        {"step": "1", "loss": "1", "validation_loss": ""},
        {"step": "2", "loss": "0.5", "validation_loss": "0.75"},
        {"step": "3", "loss": "nan", "validation_loss": ""},
    ]
    logger.close()
    curves = read_metrics(logger.path)
    assert curves["validation_loss"] == [(2, 0.75)] and curves["loss"][:2] == [(1, 1.0), (2, 0.5)]
    assert [path.name for path in logger.path.parent.iterdir()] == ["metrics.csv"]


def test_csv_resume_drops_later_and_torn_rows(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("step,loss\n10,1.5\n20,1.25\n30,1.0\n40,0.7")
    logger = CsvLogger(path, resume_step=20)
    assert [row["step"] for row in rows(path)] == ["10", "20"]
    logger.scalars(20, {"validation_loss": 2.0})
    logger.scalars(30, {"loss": 0.9})
    assert rows(path)[1:] == [{"step": "20", "loss": "1.25", "validation_loss": "2"},
                              {"step": "30", "loss": "0.9", "validation_loss": ""}]
    logger.close()
    path.write_text("step,loss\n10,1.5\n20,1.2")
    CsvLogger(path, resume_step=20).close()
    assert [row["step"] for row in rows(path)] == ["10"]
    CsvLogger(path).close()
    assert rows(path) == []


CALLS = st.lists(st.tuples(st.integers(0, 3), st.sets(st.sampled_from("abcd"), min_size=1)), max_size=12)


@settings(deadline=None)
@given(calls=CALLS, cut=st.integers(0, 12), resume_step=st.integers(0, 8))
def test_csv_holds_what_a_dictionary_would(tmp_path_factory, calls, cut, resume_step):
    path = tmp_path_factory.mktemp("csv") / "metrics.csv"
    expected: dict[int, dict[str, float]] = {}
    logger, step = CsvLogger(path), 0
    for index, (advance, names) in enumerate(calls):
        if index == cut:
            logger.close()
            logger = CsvLogger(path, resume_step)
            expected = {key: row for key, row in expected.items() if key <= resume_step}
            step = max(expected, default=0)
        step += advance
        logger.scalars(step, dict.fromkeys(sorted(names), index))
        expected.setdefault(step, {}).update(dict.fromkeys(names, index))
    logger.close()
    found = {int(row["step"]): {name: float(cell) for name, cell in row.items() if name != "step" and cell}
             for row in rows(path)}
    assert found == expected and len(rows(path)) == len(expected)


def test_group_hands_on(tmp_path):
    one, two = CsvLogger(tmp_path / "1.csv"), CsvLogger(tmp_path / "2.csv")
    group = LoggerGroup([one, two])
    group.scalars(1, {"loss": 1.0})
    group.audio(1, "sample", TONE)
    group.image(1, "picture", RED)
    group.close()
    assert rows(one.path) == rows(two.path) == [{"step": "1", "loss": "1"}]
    assert one.file.closed and two.file.closed


def test_absent_extras_name_the_cure(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(MissingDependency, match=r'pip install "avray\[wandb\]"'):
        WandbLogger("project", "run", tmp_path, {})
    with pytest.raises(MissingDependency, match=r'pip install "avray\[mlflow\]"'):
        MlflowLogger("experiment", "run", {}, "sqlite:///x.db")
    with pytest.raises(MissingDependency):
        open_loggers(LoggerSettings(mlflow=True), tmp_path / "run", {})
    assert not (tmp_path / "run").exists()


def test_settings_open_what_they_name(tmp_path):
    for resume_step in (None, 1):
        loggers = open_loggers(LoggerSettings(), tmp_path, {"seed": 0}, resume_step)
        loggers.scalars(1 if resume_step is None else 2, {"loss": 1.0})
        loggers.close()
    assert [row["step"] for row in rows(tmp_path / "metrics.csv")] == ["1", "2"]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
    assert open_loggers(LoggerSettings(tensorboard=False, csv=False), tmp_path, {}).loggers == []


def test_wandb_is_given_our_step(tmp_path, monkeypatch):
    logged = []
    run = types.SimpleNamespace(log=logged.append, finish=lambda exit_code: logged.append(exit_code),
                                define_metric=lambda *_args, **_kwargs: None)
    fake = types.SimpleNamespace(init=lambda **_kwargs: run, Image=lambda rgb: ("image", rgb.shape),
                                 Audio=lambda samples, sample_rate: ("audio", samples.shape, sample_rate))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    logger = WandbLogger("project", "run", tmp_path / "wandb", {"seed": 0})
    logger.scalars(7, {"loss": 0.5})
    logger.audio(7, "sample", TONE)
    logger.image(7, "picture", RED)
    logger.close()
    assert logged == [{"step": 7, "loss": 0.5}, {"step": 7, "sample": ("audio", (2400, 2), 24_000)},
                      {"step": 7, "picture": ("image", (8, 16, 3))}, 0]
    logger.close(failed=True)
    assert logged[-1] == 1


def test_trials_of_two_sweeps_are_not_one_run_of_a_service():
    assert run_name(Path("runs/a/trials/0003")) == "a-0003" != run_name(Path("runs/b/trials/0003"))
    assert run_name(Path("runs/mine")) == "mine"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_lines_are_rare_and_end_with_the_last():
    now, stream = [0.0], io.StringIO()
    line = ProgressLine(1000, unit="frames", every_s=30, stream=stream, clock=lambda: now[0])
    for step in range(501):
        line.update(Progress(step, loss=1 / (step + 1), learning_rate=1e-4, rate=1234.5, waiting=0.031))
        now[0] += 0.2
    line.say("Saved a checkpoint.")
    line.close()
    line.close()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 1 + 3 + 1 + 1
    assert lines[0] == "step 0/1,000 (0 %) · loss 1 · lr 0.0001 · 1,234 frames/s · waiting for data 3 %"
    assert lines[-1].startswith("step 500/1,000 (50 %) · loss 0.001996")
    assert lines[-1].endswith("2 min left")
    assert lines[-2] == "Saved a checkpoint."
    assert "\r" not in stream.getvalue() and "\x1b" not in stream.getvalue()


def test_terminal_line_is_refreshed_in_place(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    now, stream = [0.0], Terminal()
    line = ProgressLine(100, stream=stream, clock=lambda: now[0])
    for step in range(101):
        line.update(Progress(step, loss=0.5, validation_loss=0.25, rate=2.5))
        now[0] += 0.01
    line.say("Done.")
    line.close()
    text = stream.getvalue()
    assert text.count("\n") == 2 and text.endswith("\n")
    assert 10 <= text.count("\r") <= 15
    assert all(len(piece) < 40 for piece in text.replace("\x1b[2K", "").replace("\n", "\r").split("\r"))
    assert "step 100/100 (100 %)" in text and "left" not in text.rsplit("\r", 1)[1]


def test_durations():
    assert [duration(s) for s in (0, 45, 89, 600, 3 * 3600 + 1200, 52 * 3600)] == [
        "0 s", "45 s", "89 s", "10 min", "3 h 20 min", "2 d 4 h"]
