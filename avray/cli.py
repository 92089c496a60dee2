"""What every command has in common: Hydra's grammar, help a person can read, one sentence for an error, an exit code.

A script is ``sys.exit``-free: ``run_command(main, TRAIN)``, where ``main`` takes the checked settings and returns the
line that says where the results are. Notable: ``--help`` and most wrong settings are answered without importing torch
or Ray; ``--help`` not even imports Hydra.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from avray.config import (
    AppSettings,
    CheckSettings,
    EvaluateSettings,
    GenerateSettings,
    PrepareSettings,
    RunSettings,
    SweepSettings,
    TrainSettings,
    from_mapping,
)
from avray.errors import CheckpointError, DataError, MissingDependency, SetupFailed, TrainingFailed
from avray.settings.help import Command, help_text

__all__ = ["APP", "CHECK", "EVALUATE", "GENERATE", "PREPARE", "SWEEP", "TRAIN", "Command", "compose", "run_command"]

EXIT_CODES = {KeyboardInterrupt: 130, ValueError: 2, DataError: 3, CheckpointError: 3, MissingDependency: 4,
              TrainingFailed: 5, SetupFailed: 6}
"""Anything else is a bug: its traceback, and 1."""

_RUN_DIR = "Where the results go, a folder or a URL (s3://…); a job of --multirun gets its number appended."
_FAMILY = {"family.segment_s": ("2", "Seconds of one segment; other keys of a family: --cfg job -p family."),
           "run.dir": ("runs/<family>-<date>-<time>", _RUN_DIR)}

TRAIN = Command(
    "train", TrainSettings,
    "Train a model on recordings: the demo set, or a folder of your own.",
    ("run.dir", "seed", "dry_run", "resume", "init_from", "cluster", "data.path", "data.mode", "data.cache",
     "family.segment_s", "trainer.max_steps", "trainer.stop_at_step", "trainer.batch_size", "trainer.num_workers",
     "trainer.use_gpu", "trainer.precision", "trainer.optimizer.lr", "trainer.schedule.name",
     "trainer.validate_every_steps", "trainer.checkpoint_every_steps"),
    ("", "data.path=/my/wavs codec=encodec_24khz trainer=gpu1 trainer.max_steps=20000",
     "experiment=continuation data.path=/my/wavs", "data.path=s3://bucket/wavs data.cache=s3://bucket/cache run.dir=s3://bucket/runs/a",
     "run.dir=runs/x resume=true", "--cfg job trainer=debug"),
    extra_keys=_FAMILY)
CHECK = Command(
    "check", CheckSettings,
    "Say whether what a run needs works here: versions, device, storage, weights, doors, and one training step.",
    ("json", "cluster", "data.path", "data.cache", "family.segment_s", "trainer.device_name", "trainer.num_workers",
     "trainer.use_gpu", "trainer.precision"),
    ("", "family=codec_lm codec=mimi", "trainer=gpu4 json=true", "cluster=cluster.yaml"),
    extra_keys=_FAMILY | {"run.dir": ("runs/check", "Whose storage to try; nothing stays in it.")})
PREPARE = Command(
    "prepare", PrepareSettings,
    "Encode a data set into the cache, or report what it holds (dry_run=true).",
    ("run.dir", "dry_run", "cluster", "data.path", "data.texts", "data.cache", "data.validation_fraction",
     "data.max_reject_fraction", "data.embed_workers", "data.embed_num_gpus", "family.segment_s", "output_file",
     "chunks_dir"),
    ("data.path=/my/wavs dry_run=true", "data.path=/my/wavs codec=mimi data.cache=s3://bucket/cache"),
    extra_keys=_FAMILY | {"run.dir": ("runs/prepare-<family>-<date>-<time>", _RUN_DIR)},
    aliases={"audio_dir": "data.path", "transcripts_dir": "data.texts", "verbose": "logging.progress=on",
             "output_file": "output_file"})
EVALUATE = Command(
    "evaluate", EvaluateSettings,
    "Report on a checkpoint (loss, baselines, metrics, pictures), or on a codec's round trip.",
    ("checkpoint", "run.dir", "data.path", "split", "max_rows", "num_samples", "batch_size", "device",
     "num_codebooks", "recogniser", "clap"),
    ("checkpoint=runs/x/best", "checkpoint=runs/x/best data.path=/other/wavs split=all",
     "codec=spectral data.path=/my/wavs"),
    extra_keys={"run.dir": ("runs/evaluate-<date>-<time>", _RUN_DIR),
                "data.path": ("null", "A folder, a JSONL, CSV or Parquet file, or a URL; null: its own data set.")})
GENERATE = Command(
    "generate", GenerateSettings,
    "Generate from a checkpoint: one request, or one for each row of data.path.",
    ("checkpoint", "prompt", "audio", "output", "seconds", "seed", "include_prompt", "temperature", "top_k", "top_p",
     "num_steps", "guidance_scale", "aligned_guidance_scale", "device", "slots", "data.path", "num_workers"),
    ("checkpoint=runs/x/best audio=in.wav seconds=8 output=out.wav",
     'checkpoint=runs/x/best prompt="a bell, then drums" temperature=0.8 seed=1',
     "checkpoint=runs/x/best data.path=prompts.jsonl output=folder/"),
    extra_keys={"data.path": ("null", "Rows to generate for (JSONL, folder …), a request each; null: a single one.")},
    aliases={"model_path": "checkpoint", "input_text": "prompt", "audio_file": "audio"})
APP = Command(
    "app", AppSettings,
    "Serve checkpoints over HTTP, as clients of OpenAI's API know it; the playground is at /.",
    ("checkpoints", "cluster", "unload", "serve.host", "serve.port", "serve.replica.slots", "serve.replica.num_gpus",
     "serve.replica.min_replicas", "serve.replica.max_replicas", "serve.limits.queue", "serve.limits.audio_seconds_out",
     "serve.limits.request_timeout_s", "serve.jobs.folder"),
    ("", "checkpoints=[runs/a/best,speech:runs/b/best]", "serve=gpu checkpoints=[runs/a]",
     "cluster=auto checkpoints=[runs/c]", "cluster=auto unload=[c]"),
    folder="serve")


SWEEP = Command(
    "sweep", SweepSettings,
    "Search settings: many trials of train.py, the best one's settings and checkpoint kept.",
    ("run.dir", "resume", "dry_run", "seed", "cluster", "data.path", "tune.num_samples", "tune.max_concurrent",
     "tune.search", "tune.scheduler", "tune.space", "tune.objectives", "tune.include_default", "tune.max_failures",
     "trainer.max_steps", "trainer.num_workers", "trainer.use_gpu"),
    ("family=continuation tune=asha tune.num_samples=32 tune.max_concurrent=2",
     "family=codec_lm tune=optuna 'tune.space.trainer.batch_size={choice: [8, 16]}'",
     "'tune.objectives=[{metric: validation_loss}, {metric: parameters}]'", "run.dir=runs/my-sweep resume=true"),
    folder="tune", extra_keys={
        "run.dir": ("runs/sweep-<family>-<date>-<time>", "Where the results go; never over a sweep that is there."),
        "resume": ("false", "Go on with the sweep in run.dir; its own settings count."),
        "dry_run": ("false", "Say what would be searched, and how many trials at a time; train nothing."),
        "tune.space": ("the family's", "key: {loguniform: [1e-5, 1e-2]} …; --help tune says more.")})


def run_command(main: Callable[[Any], str], command: Command, arguments: Sequence[str] | None = None) -> NoReturn:
    """Compose and check the settings of ``arguments`` (the command line), call ``main`` with them, and exit.

    Prints the line that ``main`` returns. Exit codes as in ``EXIT_CODES``; AVRAY_DEBUG=1 adds the traceback.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        arguments = without_aliases(command, arguments)
        if {"-h", "--help"} & set(arguments):
            print(_help(command, arguments))
        else:
            _run_hydra(main, command, arguments)
    except (Exception, KeyboardInterrupt) as error:
        sys.exit(_report(error))
    sys.exit(0)


def without_aliases(command: Command, arguments: Sequence[str]) -> list[str]:
    """The command line in avray's own words; ``--model_path=x``, ``--model_path x`` and ``model_path=x`` are one."""
    rewritten: list[str] = []
    waiting = ""
    for argument in arguments:
        if waiting:
            rewritten.append(f"{waiting}={argument}")
            waiting = ""
            continue
        name, equals, value = argument.removeprefix("--").partition("=")
        key = command.aliases.get(name)
        if key is None or not (equals or argument.startswith("--")):
            rewritten.append(argument)
        elif "=" in key:
            rewritten += [key] if value.lower() in ("", "true", "1") else []
        elif equals:
            rewritten.append(f"{key}={value}")
        else:
            waiting = key
    if waiting:
        raise ValueError(f"{waiting} is given no value.")
    return rewritten


def compose(command: Command, overrides: Sequence[str] = (), config_dir: str | None = None) -> Any:
    """The settings that ``overrides`` on the command line would give; for sweeps, tests and notebooks."""
    from avray.settings.composing import compose as compose_mapping

    return from_mapping(command.settings, compose_mapping(command.name, command.settings, overrides, config_dir))


def _help(command: Command, arguments: Sequence[str]) -> str:
    words = [argument for argument in arguments if argument not in ("-h", "--help")]
    config_dir = None
    for flag in ("--config-dir", "-cd"):
        if flag in words[:-1]:
            index = words.index(flag)
            config_dir = words[index + 1]
            del words[index : index + 2]
    groups = [word for word in words if "=" not in word and not word.startswith("-")]
    return help_text(command, groups[0] if groups else None, config_dir)


def _run_hydra(main: Callable[[Any], str], command: Command, arguments: list[str]) -> None:
    """Hydra's own entry point, given a cleaned command line and made to raise instead of printing."""
    import hydra
    from hydra._internal.utils import get_args_parser
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from avray import jobs
    from avray.settings import composing

    if "--version" in arguments:
        from avray import __version__

        print(f"avray {__version__}")
        return
    parsed = get_args_parser().parse_intermixed_args(arguments)
    if parsed.experimental_rerun is not None:
        raise ValueError("--experimental-rerun reads a pickle, which avray never does; give the overrides again.")
    flags = _flags(arguments, parsed)
    overrides = composing.rewrite(command.settings, parsed.overrides, parsed.multirun)
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # for a _target_ in a file beside the user; a script's own folder is there already

    def job(config: Any) -> None:
        # Left by SystemExit, which Hydra lets through, so that it adds no lines of its own.
        try:
            settings = _settings(command, composing.plain(config))
            if jobs.is_remote(getattr(settings, "cluster", None)) and command not in (APP, CHECK):
                job_sent = jobs.job_of(Path(own_arguments[0]), arguments)
                sys.exit(jobs.run(settings.cluster, command.name, job_sent))
            print(main(settings), flush=True)
        except (OmegaConfBaseException, HydraException) as error:
            sys.exit(_report(ValueError(composing.explain(error, command.name, command.settings))))
        except (Exception, KeyboardInterrupt) as error:
            sys.exit(_report(error))

    composing.register(command.name, command.settings)
    own_arguments, full_error = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    with tempfile.TemporaryDirectory(prefix="avray-") as scratch:
        sweep = [f"hydra.sweep.dir={scratch}"] if parsed.multirun else []
        sys.argv = [own_arguments[0], *composing.with_hydra_choices(overrides + sweep), *flags]
        os.environ["HYDRA_FULL_ERROR"] = "1"
        try:
            # An empty folder: without a path Hydra would search this package, and take avray/checkpoint/ for a group.
            hydra.main(version_base="1.3", config_path=scratch, config_name=command.name)(job)()
        except (HydraException, OmegaConfBaseException) as error:
            if os.environ.get("AVRAY_DEBUG") == "1":
                traceback.print_exc()
            raise ValueError(composing.explain(error, command.name, command.settings, overrides, parsed.config_dir,
                                               parsed.config_name)) from error
        finally:
            sys.argv = own_arguments
            if full_error is None:
                del os.environ["HYDRA_FULL_ERROR"]


def _flags(arguments: Sequence[str], parsed: Any) -> list[str]:
    """The command line without its overrides (which may stand anywhere), ``--config-path`` made absolute: Hydra would
    take it relative to the script."""
    flags = list(arguments)
    for override in parsed.overrides:
        flags.remove(override)
    path = parsed.config_path
    if path and "://" not in path:
        index = next(index for index, flag in enumerate(flags) if flag == path or flag.endswith(f"={path}"))
        flags[index] = flags[index].removesuffix(path) + os.path.abspath(path)
    return flags


def _settings(command: Command, mapping: dict[str, Any]) -> Any:
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    settings: Any = from_mapping(command.settings, mapping)
    hydra_config = HydraConfig.get()
    if hydra_config.mode == RunMode.MULTIRUN and hasattr(settings, "run"):
        settings = replace(settings, run=RunSettings(f"{settings.run.dir}-{hydra_config.job.num}"))
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logging.getLogger("avray").handlers = [handler]
    logging.getLogger("avray").setLevel(settings.logging.level.upper())
    return settings


def _report(error: BaseException) -> int:
    """Print what went wrong on stderr and return the exit code."""
    whole = error
    while type(error).__module__.startswith("ray."):  # a task's error: the class of its cause, a traceback as message
        cause = getattr(error, "cause", None)
        if not isinstance(cause, Exception):
            break
        error = cause
    code = next((code for kind, code in EXIT_CODES.items() if isinstance(error, kind)), 1)
    if code == 1 or os.environ.get("AVRAY_DEBUG") == "1":
        traceback.print_exception(whole)
    if code == 130:
        print("Interrupted.", file=sys.stderr)
    elif code != 1:
        print(f"error: {error}", file=sys.stderr)
    return code
