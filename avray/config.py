"""Every setting of every command, as frozen dataclasses that check themselves.

One root for each command (``TrainSettings`` for ``pipelines/train.py`` …); the groups inside are shared. They are the
only schema there is: the Hydra groups in ``avray/conf`` start from these defaults, and what Hydra composes becomes one
of these objects through :func:`from_mapping`. A family and a codec stay mappings here (``name`` or ``_target_`` and
their own fields), so that nothing has to import torch to refuse a bad setting.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from avray.settings.convert import (
    absolute,
    check_above_zero,
    check_at_least,
    from_mapping,
    import_target,
    instantiate,
    make_absolute,
    to_mapping,
)
from avray.settings.data import DataSettings, SetSettings
from avray.settings.serve import ServeSettings
from avray.settings.trainer import LoggerSettings, OptimizerSettings, ScheduleSettings, TrainerSettings
from avray.settings.tune import ObjectiveSettings, TuneSettings

__all__ = [
    "AppSettings", "DataSettings", "EvaluateSettings", "GenerateSettings", "LoggerSettings", "LoggingSettings",
    "ObjectiveSettings", "OptimizerSettings", "PrepareSettings", "RunSettings", "ScheduleSettings", "ServeSettings",
    "SetSettings", "SweepSettings", "TrainSettings", "TrainerSettings", "TuneSettings", "absolute", "from_mapping",
    "import_target", "instantiate", "to_mapping",
]

Device = Literal["auto", "cuda", "mps", "cpu"]


@dataclass(frozen=True)
class RunSettings:
    """``run``"""

    dir: str = "runs/run"
    """Where the results go: a folder, made absolute, or a URL. A job of ``--multirun`` gets its number appended."""

    def __post_init__(self) -> None:
        if not self.dir:
            raise ValueError("run.dir is empty: give a folder.")
        make_absolute(self, "dir")


@dataclass(frozen=True)
class LoggingSettings:
    """``logging``: what is printed."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """Of avray's own messages, on stderr."""
    progress: Literal["auto", "on", "off"] = "auto"
    """The progress line; ``auto``: only on a terminal."""


@dataclass(frozen=True)
class CommandSettings:
    """What every command takes."""

    seed: int = 0
    """Of everything drawn at random: weights, order of rows, dropout, samples."""
    cluster: str | None = None
    """null: a Ray of our own on this machine; else an address, or the YAML file that ``ray up`` took."""
    data: DataSettings = field(default_factory=DataSettings)
    logging: LoggingSettings = LoggingSettings()

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be from 0 to 2^63 - 1, got {self.seed}.")


@dataclass(frozen=True)
class PrepareSettings(CommandSettings):
    """``pipelines/prepare.py``: encode a data set into the cache."""

    dry_run: bool = False
    """Report what the data set holds (rows, hours, rates, rejects, splits) and encode nothing."""
    run: RunSettings = RunSettings()
    family: Mapping[str, Any] = field(default_factory=dict)
    """``name`` (or ``_target_``) and the family's own fields."""
    codec: Mapping[str, Any] = field(default_factory=dict)
    """``name`` and the codec's own fields; the family refers to it."""
    trainer: TrainerSettings = field(default_factory=TrainerSettings)
    """Of no effect here; taken so that ``experiment=`` and train.py's command line fit."""
    output_file: str | None = None
    """Also write each window's mean features as the original audio model's ``.pt``, {name: vector}."""
    chunks_dir: str | None = None
    """Also write each window as a WAV and its text as a TXT of the same name into this folder."""

    def __post_init__(self) -> None:
        super().__post_init__()
        make_absolute(self, "output_file", "chunks_dir")


@dataclass(frozen=True)
class TrainSettings(CommandSettings):
    """``pipelines/train.py``"""

    dry_run: bool = False
    """Build everything, train one batch, save, reload and sample; still writes ``summary.json``."""
    resume: bool = False
    """Go on with what ``run.dir`` holds."""
    init_from: str | None = None
    """A checkpoint (run, link or folder, or the URL of one) whose weights to start from: fine-tuning."""
    run: RunSettings = RunSettings()
    family: Mapping[str, Any] = field(default_factory=dict)
    """``name`` (or ``_target_``) and the family's own fields."""
    codec: Mapping[str, Any] = field(default_factory=dict)
    """``name`` and the codec's own fields; the family refers to it."""
    trainer: TrainerSettings = field(default_factory=TrainerSettings)

    def __post_init__(self) -> None:
        super().__post_init__()
        make_absolute(self, "init_from")
        if self.resume and self.init_from is not None:
            raise ValueError("resume=true goes on with run.dir and init_from starts a new run; give one of them.")


@dataclass(frozen=True)
class CheckSettings(TrainSettings):
    """``pipelines/check.py``: what ``train.py`` takes, so that its command line can be checked as it stands."""

    json: bool = False
    """Print JSON in place of lines."""


@dataclass(frozen=True)
class SweepSettings(TrainSettings):
    """``tune/sweep.py``: what ``train.py`` takes, and ``tune``. ``resume=true`` goes on with a sweep."""

    tune: TuneSettings = field(default_factory=TuneSettings)


@dataclass(frozen=True)
class EvaluateSettings(CommandSettings):
    """``pipelines/evaluate.py``: a checkpoint's report, or with ``codec=`` alone a codec's round trip."""

    checkpoint: str | None = None
    """A run, a link in it, or a checkpoint folder; or the URL of one."""
    run: RunSettings = RunSettings()
    codec: Mapping[str, Any] = field(default_factory=dict)
    """``name`` and fields of the codec whose round trip to report, instead of a checkpoint."""
    family: Mapping[str, Any] = field(default_factory=dict)
    """Only for a family of one's own: its ``_target_``."""
    split: Literal["validation", "train", "test", "all"] = "validation"
    """The rows to look at; ``test`` are the groups that ``data.holdout_groups`` left out."""
    max_rows: int | None = None
    """Rows for the loss; null: all."""
    num_samples: int = 16
    """Rows to generate for, compare with their targets and show; 0: the loss alone."""
    batch_size: int = 16
    """Rows at a time for the loss."""
    slots: int = 4
    """Requests generated side by side."""
    device: Device = "auto"
    """``auto``: cuda where there is one, else cpu."""
    num_codebooks: tuple[int, ...] = (1, 2, 4, 8)
    """Round trips of a codec: the continuous latents, and these many codebooks as far as it has them."""
    recogniser: str | None = None
    """A checkpoint of ``audio_gpt2``: the word and character errors of what it hears, for rows with a text."""
    clap: str | None = None
    """A folder of transformers' with a CLAP: how near sounds are to their texts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        make_absolute(self, "checkpoint", "recogniser", "clap")
        check_at_least("", self, 1, "max_rows", "batch_size", "slots")
        check_at_least("", self, 0, "num_samples")
        if any(number < 1 for number in self.num_codebooks):
            raise ValueError(f"num_codebooks must be at least 1 each, got {list(self.num_codebooks)}.")
        if (self.checkpoint is None) == (not self.codec):
            raise ValueError("Give checkpoint=runs/<name>/best to evaluate a model, or codec=<name> for a codec's "
                             "round trip, one of the two.")


@dataclass(frozen=True)
class GenerateSettings(CommandSettings):
    """``pipelines/generate.py``: one request, or with ``data.path`` one for each of its rows."""

    checkpoint: str | None = None
    """A run, a link in it, or a checkpoint folder; or the URL of one."""
    family: Mapping[str, Any] = field(default_factory=dict)
    """Only for a family of one's own: its ``_target_``."""
    prompt: str | None = None
    """Text to generate from."""
    audio: str | None = None
    """A recording to generate from."""
    video: str | None = None
    """A clip to generate from."""
    task: str | None = None
    """For families that have several."""
    output: str | None = None
    """The file to write, or the folder where there are many; null: ``generated.wav`` (.mp4, .txt) or ``generated/``."""
    embedding: str | None = None
    """A JSON file to write the predicted embedding to, beside the output."""
    sound: bool = False
    """Of a clip: put under it what task audio makes of the same prompt."""
    stream: bool = False
    """Write the output while it is made: WAV, text (printed where output is null), or an MP4 in fragments."""
    include_prompt: bool = False
    """Put the given recording in front of what was generated."""

    seconds: float | None = None
    """How long; null: the family's default, as for all that follow."""
    max_tokens: int | None = None
    """How long at most, in tokens or vectors."""
    count: int | None = None
    """The same as max_tokens, by the original multitask's name."""
    temperature: float | None = None
    """0 always takes the likeliest."""
    top_k: int | None = None
    """Draw among the k likeliest."""
    top_p: float | None = None
    """Draw among the likeliest that together reach this probability."""
    guidance_scale: float | None = None
    """Classifier-free guidance; 1: none."""
    aligned_guidance_scale: float | None = None
    """The same for what lies along the sound's time: notes, a recording."""
    num_steps: int | None = None
    """Solver steps of a flow."""
    beams: int | None = None
    """Beam search over text."""

    slots: int = 1
    """Requests generated side by side."""
    num_workers: int = 1
    """Actors that generate, where there are many requests."""
    device: Device = "auto"
    """``auto``: cuda where there is one, else cpu."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.checkpoint is None:
            raise ValueError("checkpoint is missing: give a run or a checkpoint, such as checkpoint=runs/<name>/best.")
        make_absolute(self, "checkpoint", "audio", "video", "output", "embedding")
        if self.output is not None and "://" in self.output:
            raise ValueError(f"output={self.output} is a URL: give a local or shared path, and copy it there after.")
        check_above_zero("", self, "seconds")
        check_at_least("", self, 0, "temperature")
        check_at_least("", self, 1, "max_tokens", "count", "top_k", "num_steps", "beams", "slots", "num_workers")
        if self.count is not None and self.max_tokens is not None:
            raise ValueError("count and max_tokens are the same: give one of them.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}.")
        given = [name for name in ("prompt", "audio", "video") if getattr(self, name) is not None]
        if self.data.path is not None and given:
            raise ValueError(f"data.path gives one request a row; {' and '.join(given)} is for a single one.")
        if self.data.path is not None and (self.sound or self.stream):
            raise ValueError("sound and stream are for a single request; with data.path a row says \"sound\": true.")
        if self.stream and self.include_prompt:
            raise ValueError("stream=true writes what is made and nothing else: leave include_prompt out.")


@dataclass(frozen=True)
class AppSettings:
    """``serve/app.py``: checkpoints behind one HTTP server."""

    checkpoints: tuple[str, ...] = ()
    """Runs, links or checkpoint folders, or URLs of them, each a model by its run's name, or ``name:path``; empty: the
    newest run."""
    checkpoint: str | None = None
    """The same for a single one."""
    unload: tuple[str, ...] = ()
    """Names of models to take out of the server that ``cluster`` runs."""
    cluster: str | None = None
    """null: a Ray of our own on this machine; else an address (auto: the one that runs here), whose server gets these
    models beside its others."""
    logging: LoggingSettings = LoggingSettings()
    serve: ServeSettings = field(default_factory=ServeSettings)

    def __post_init__(self) -> None:
        if self.checkpoint is not None and self.checkpoints:
            raise ValueError("checkpoint= is one model and checkpoints=[…] several: give one of them.")
        if self.unload and (self.cluster is None or self.checkpoint or self.checkpoints):
            raise ValueError("unload=[name] takes models out of a running server: give cluster= and nothing to load.")
