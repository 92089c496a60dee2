"""What a checkpoint makes of a fixed set of held-out examples: sound, pictures, TensorBoard. No Ray in it.

Called in a process of its own while training goes on, from a checkpoint on disk: the trainers never wait for it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from avray.data import recipes
from avray.data.plan import Plan, Shard
from avray.engine import Generated, Generator, resampled
from avray.family import Example, Family, Media, Options, Question, Request, Unit
from avray.media import Audio, Video, read_audio, read_video, write_audio, write_video
from avray.metrics.pictures import comparison_png, spectrogram_rgb
from avray.store import Store, is_url

WAITING = ".waiting"
"""A file in a step's samples folder: they are still to be made, so the checkpoint of that step must stay."""


def await_samples(run_dir: str, step: int) -> None:
    """Keep the checkpoint of ``step`` from being pruned until its samples are made. Runs may be URLs here."""
    Store(run_dir).write(_marker(step), b"")


def no_longer_await(run_dir: str, step: int) -> None:
    Store(run_dir).remove(_marker(step))


def awaited(run_dir: str) -> list[Path]:
    """Checkpoints whose samples are still to be made."""
    store = Store(run_dir)
    markers = [Path(name) for name in store.list("samples")] if is_url(run_dir) else [
        *Path(run_dir).glob(f"samples/*/{WAITING}")]
    return [Path(run_dir) / "checkpoints" / marker.parent.name for marker in markers if marker.name == WAITING]


def sample_folder(run_dir: Path, step: int) -> Path:
    return run_dir / Path(_marker(step)).parent


def _marker(step: int) -> str:
    return f"samples/step-{step:08d}/{WAITING}"


@dataclass(frozen=True)
class Asked:
    """A question with its name."""

    id: str
    question: Question


@dataclass(frozen=True)
class Answer:
    """What was given, what the answer was, and what the model made of it. ``fields`` are the example's own."""

    id: str
    prompt: Media | None
    target: Media | None
    generated: Generated
    fields: Mapping[str, Any] = field(default_factory=dict)


def questions(family: Family, plan: Plan, count: int) -> list[Asked]:
    """``count`` examples spread evenly over a split: always the same ones for the same data."""
    ends = np.cumsum(plan.shard_rows)
    chosen = np.unique(np.linspace(0, plan.num_examples - 1, min(count, plan.num_examples)).round().astype(int))
    shards = np.searchsorted(ends, chosen, side="right")
    within = chosen - (ends - plan.shard_rows)[shards]
    examples = [example_at(plan.shards[shard], index)
                for shard, index in zip(shards.tolist(), within.tolist(), strict=True)]
    return [Asked(example.id, family.question(example)) for example in examples]


def example_at(shard: Shard, index: int) -> Example:
    """The example as it was before planning."""
    planned = shard.examples[index]
    return Example(planned.id, {role: shard.units[unit] for role, unit in planned.units.items()}, planned.fields,
                   planned.weight)


def read_unit(unit: Unit | None) -> Media | None:
    """The sound (or text) a unit is cut from, at its own rate, changed as its recipe says."""
    if unit is None:
        return None
    if unit.modality == "text":
        return unit.source
    if unit.modality == "video":
        return even(read_video(unit.source, unit.start_s, unit.duration_s))
    sound = read_audio(unit.source, start_s=unit.start_s, duration_s=unit.duration_s)
    if not unit.recipe:
        return sound
    return Audio(recipes.apply(unit.recipe, sound.samples.mean(0), sound.sample_rate_hz)[None], sound.sample_rate_hz)


def answer(generator: Generator, asked: Sequence[Asked], options: Options, seed: int = 0) -> list[Answer]:
    """Generate for every question, through the engine's slots."""
    prompts = [read_unit(item.question.prompt) for item in asked]
    requests = [
        Request(text=item.question.text, audio=prompt if isinstance(prompt, Audio) else None,
                video=prompt if isinstance(prompt, Video) else None, fields=item.question.fields,
                options=with_seconds(options, item.question.seconds), seed=seed + index)
        for index, (item, prompt) in enumerate(zip(asked, prompts, strict=True))
    ]
    generated = generator.generate_many(requests)
    return [Answer(item.id, prompt, comparable(read_unit(item.question.target), result.media), result,
                   item.question.fields)
            for item, prompt, result in zip(asked, prompts, generated, strict=True)]


def comparable(target: Media | None, generated: Media) -> Media | None:
    """The target at the rate of what was generated; metrics compare like with like alone."""
    if not (isinstance(target, Audio) and isinstance(generated, Audio)):
        return target
    return Audio(resampled(target, generated.sample_rate_hz)[None], generated.sample_rate_hz)


def with_seconds(options: Options, seconds: float | None) -> Options:
    return Options(**{**options.given(), **({"seconds": seconds} if seconds is not None else {})})  # type: ignore[arg-type]


def write_samples(checkpoint: str, asked: Sequence[Asked], folder: Path, tensorboard: Path | None, step: int,
                  family: str | None = None) -> None:
    """``folder`` gets each sample as WAV, the target beside it and a page of spectrograms; TensorBoard the same."""
    answers = answer(Generator.open(checkpoint, slots=min(4, len(asked)), family=family), asked, Options())
    folder.mkdir(parents=True, exist_ok=True)
    heard = [item for item in answers if isinstance(item.generated.media, Audio)]
    for item in answers:
        name = re.sub(r"[^\w.-]+", "_", item.id)[-80:]
        write_media(folder / f"{name}.generated", item.generated.media)
        if item.target is not None:
            write_media(folder / f"{name}.target", item.target)
    if heard:
        comparison_png(folder / "spectrograms.png",
                       [(item.id, item.prompt, item.target, item.generated.media) for item in heard])
    if tensorboard is not None:
        _log(heard, tensorboard, step)


def write_media(stem: Path, media: Media) -> Path:
    """Sound as ``.wav``, pictures as ``.mp4``, text as ``.txt``."""
    if isinstance(media, str):
        path = stem.with_name(stem.name + ".txt")
        path.write_text(media, encoding="utf-8")
        return path
    if isinstance(media, Video):
        path = stem.with_name(stem.name + ".mp4")
        write_video(path, media)
        return path
    path = stem.with_name(stem.name + ".wav")
    write_audio(str(path), media)
    return path


def even(video: Video) -> Video:
    """Without the last row or column where H.264, which halves both for colour, could not have it."""
    _, height, width, _ = video.frames.shape
    return replace(video, frames=video.frames[:, : height - height % 2, : width - width % 2])


def _log(answers: Sequence[Answer], folder: Path, step: int) -> None:
    from avray.train.loggers import TensorBoardLogger

    logger = TensorBoardLogger(folder)
    for index, item in enumerate(answers):
        assert isinstance(item.generated.media, Audio)
        logger.audio(step, f"sample {index}/generated", item.generated.media)
        logger.image(step, f"sample {index}/generated", spectrogram_rgb(item.generated.media))
        if isinstance(item.target, Audio):
            logger.audio(step, f"sample {index}/target", item.target)
            logger.image(step, f"sample {index}/target", spectrogram_rgb(item.target))
    logger.close()
