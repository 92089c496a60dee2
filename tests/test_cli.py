"""The command line as a person meets it."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

import avray
from avray import cli
from avray.config import to_mapping
from avray.errors import DataError

ENVIRONMENT = os.environ | {"COLUMNS": "100", "PYTHONPATH": str(Path(avray.__file__).parent.parent)}
SCRIPT = """
import sys
from avray.cli import TRAIN, run_command
from avray.errors import CheckpointError, DataError, MissingDependency, TrainingFailed

def main(settings):
    errors = {"value": ValueError("family.head is wrong."), "data": DataError("No rows."), "bug": KeyError("x"),
              "checkpoint": CheckpointError("Damaged."), "weights": MissingDependency("Get them."),
              "failed": TrainingFailed("NaN."), "interrupt": KeyboardInterrupt()}
    name = settings.run.dir.rpartition("/")[2]
    if name in errors:
        raise errors[name]
    assert "torch" not in sys.modules and "ray" not in sys.modules
    return f"Results: {settings.run.dir}"

run_command(main, TRAIN)
"""


@dataclass(frozen=True)
class Ended:
    code: int
    stdout: str
    stderr: str


@pytest.fixture
def script(tmp_path: Path) -> Callable[..., Ended]:
    """A script in a process of its own."""
    (tmp_path / "toy.py").write_text(SCRIPT)

    def call(*arguments: str, **env: str) -> Ended:
        done = subprocess.run([sys.executable, "toy.py", *arguments], cwd=tmp_path, text=True, capture_output=True,
                              timeout=60, env=ENVIRONMENT | env, check=False)
        assert [path.name for path in tmp_path.iterdir()] == ["toy.py"], "a command line leaves nothing behind"
        return Ended(done.returncode, done.stdout, done.stderr)

    return call


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """The same in this process, which is faster; it prints its settings as JSON."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "path", list(sys.path))

    def call(*arguments: str) -> Ended:
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as ended:
            cli.run_command(lambda settings: json.dumps(to_mapping(settings)), cli.TRAIN, arguments)
        assert sorted(tmp_path.rglob("*")) == before, "a command line leaves nothing behind"
        captured = capsys.readouterr()
        return Ended(int(ended.value.code or 0), captured.out, captured.err)

    return call


@pytest.mark.parametrize(("name", "code", "sentence"), [
    ("fine", 0, ""), ("value", 2, "error: family.head is wrong."), ("data", 3, "error: No rows."),
    ("checkpoint", 3, "error: Damaged."), ("weights", 4, "error: Get them."), ("failed", 5, "error: NaN."),
    ("interrupt", 130, "Interrupted."),
])
def test_exit_codes(script, tmp_path: Path, name: str, code: int, sentence: str) -> None:
    done = script(f"run.dir=runs/{name}")
    assert (done.code, done.stderr.strip()) == (code, sentence)
    assert done.stdout == (f"Results: {tmp_path}/runs/fine\n" if name == "fine" else "")


def test_a_bug_keeps_its_traceback(script) -> None:
    done = script("run.dir=runs/bug")
    assert done.code == 1 and "KeyError: 'x'" in done.stderr and "toy.py" in done.stderr
    assert "/hydra/" not in done.stderr


def test_debug_shows_the_traceback(script) -> None:
    done = script("run.dir=runs/data", AVRAY_DEBUG="1")
    assert done.code == 3 and "Traceback" in done.stderr and "error: No rows." in done.stderr
    assert "Traceback" in script("sed=1", AVRAY_DEBUG="1").stderr


def test_an_error_of_a_ray_task_is_its_causes_sentence(toy, capsys: pytest.CaptureFixture[str]) -> None:
    class Wrapped(DataError):
        cause = DataError("No rows.")

    Wrapped.__module__ = "ray.exceptions"

    def main(settings: object) -> str:
        raise Wrapped("a remote traceback\nof many lines")

    with pytest.raises(SystemExit) as ended:
        cli.run_command(main, cli.TRAIN, [])
    assert ended.value.code == 3 and capsys.readouterr().err == "error: No rows.\n"


@pytest.mark.parametrize(("arguments", "sentence"), [
    (["trainer.batch_size=0"], "trainer.batch_size must be at least 1, got 0."),
    (["trainer.batchsize=1"], "trainer.batchsize is not a setting; did you mean trainer.batch_size?"),
    (["+trainer.batchsize=1"], "trainer.batchsize is not a setting; did you mean trainer.batch_size?"),
    (["trainr.batch_size=1"], "trainr is not a setting; did you mean trainer?"),
    (["famly=codec_lm"], "famly is not a setting; did you mean family?"),
    (["codec=encodek"], "codec=encodek does not exist; choose one of "),
    (["family.segment=1"], "family.segment is not a setting; did you mean family.segment_s?"),
    (["family.codec.name=x"], "family.codec.name cannot be set, as family.codec is ${codec}; set that."),
    (["trainer.max_steps.x=1"], "trainer.max_steps is a single value and has no x in it."),
    (["seed=1,2"], "seed=1,2 names several values; add --multirun"),
    (["seed"], "seed is not a setting: write key=value."),
    (["seed=)"], "seed=) cannot be read: quote"),
    (["seed=${nope}"], "seed cannot be read: Interpolation key 'nope' not found."),
    (["data=folder"], "data.path is missing: give data.path=… on the command line."),
    (["--config-path", "gone"], "Primary config directory not found."),
    (["--config-dir", "gone"], "Additional config directory"),
    (["--config-name", "gone"], "Cannot find primary config 'gone'."),
    (["--experimental-rerun", "x"], "--experimental-rerun reads a pickle"),
    (["--help", "dta"], "There is no group dta; did you mean data?"),
])
def test_a_bad_setting_is_one_sentence(toy, arguments: list[str], sentence: str) -> None:
    done = toy(*arguments)
    assert done.code == 2
    assert done.stderr.startswith(f"error: {sentence}") and done.stderr.count("\n") == 1, done.stderr


def test_hydra_grammar(toy) -> None:
    done = toy("--cfg", "job", "trainer=debug", "trainer.optimizer.lr=0.5")
    assert done.code == 0 and "max_steps: 4" in done.stdout and "lr: 0.5" in done.stdout
    assert toy("--cfg", "job", "-p", "trainer.optimizer").stdout.splitlines()[1] == "name: adamw"
    assert toy("--version").stdout.startswith("avray ")
    done = toy("--foo")
    assert done.code == 2 and "unrecognized arguments" in done.stderr


def test_the_same_command_line_twice_gives_the_same_settings(toy) -> None:
    once, twice = (json.loads(toy("run.dir=x", "trainer=debug").stdout) for _ in range(2))
    assert once == twice and once["trainer"]["max_steps"] == 4


def test_multirun_gives_each_job_its_own_folder(toy, tmp_path: Path) -> None:
    done = toy("seed=1,2", "--multirun", "run.dir=runs/x")
    jobs = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(job["seed"], job["run"]["dir"]) for job in jobs] == [
        (1, f"{tmp_path}/runs/x-0"), (2, f"{tmp_path}/runs/x-1")]


def test_multirun_ends_with_the_code_of_what_failed(toy) -> None:
    assert toy("--multirun", "seed=1,-2").code == 2


def test_help_is_for_people(toy) -> None:
    done = toy("--help")
    assert done.code == 0 and done.stderr == ""
    for word in ("data.path (null)", "trainer.max_steps (200)", "family.segment_s", "Groups", "continuation",
                 "Examples", "--config-dir", "AVRAY_DEBUG", "5 training failed"):
        assert word in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 120
    assert "data.window_rows (1024)" in toy("--help", "data").stdout


@pytest.mark.parametrize("command", [cli.TRAIN, cli.PREPARE, cli.EVALUATE, cli.GENERATE, cli.SWEEP],
                         ids=lambda item: item.name)
def test_the_examples_in_help_compose(command: cli.Command) -> None:
    for example in command.examples:
        words = [word for word in shlex.split(example) if word not in ("--cfg", "job")]
        cli.compose(command, words)


def test_config_dir_brings_groups_and_objects(toy, tmp_path: Path) -> None:
    mine = tmp_path / "mine" / "family"
    mine.mkdir(parents=True)
    (mine / "bell.yaml").write_text("name: bell\n_target_: own_module.Own\ncodec: ${codec}\nsegment_s: 1\n")
    done = toy("--config-dir", "mine", "family=bell", "family.segment_s=7")
    settings = json.loads(done.stdout)
    assert settings["family"] == {"name": "bell", "_target_": "own_module.Own", "codec": settings["codec"],
                                  "segment_s": 7}
    assert "bell" in toy("--help", "--config-dir", "mine").stdout
    failed = toy("--config-dir", "mine", "family=bel").stderr
    assert "choose one of " in failed and "bell" in failed
    assert json.loads(toy("family._target_=own_module.Own").stdout)["family"]["_target_"] == "own_module.Own"


def test_a_root_of_ones_own_uses_our_groups(toy, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "small.yaml").write_text(
        "defaults: [_train, {family: continuation}, {codec: spectral}, {data: demo}, {trainer: debug}, _self_]\n"
        "run: {dir: runs/own}\ntrainer: {max_steps: 7}\n")
    for flag in ("--config-path", "--config-dir"):
        settings = json.loads(toy(flag, "mine", "--config-name", "small").stdout)
        assert (settings["trainer"]["max_steps"], settings["trainer"]["batch_size"]) == (7, 4)
        assert settings["run"]["dir"] == f"{tmp_path}/runs/own"


def test_a_command_line_imports_nothing_heavy() -> None:
    code = ("import sys, avray.cli, avray.config\n"
            "print([name for name in ('torch', 'ray', 'transformers', 'hydra', 'numpy') if name in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, timeout=60, check=True,
                          env=ENVIRONMENT)
    assert done.stdout.strip() == "[]"
