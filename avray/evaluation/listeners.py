"""Figures by networks that are given for it: the words that a recogniser hears in what was generated, and how near a
CLAP finds sound and text."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from avray.engine import Generator
from avray.family import Media, Metric, Row
from avray.media import Audio
from avray.metrics.labels import clap_similarity
from avray.metrics.text import TextErrorRate


def given_metrics(recogniser: str | None, clap: str | None, device: str) -> dict[str, Callable[[], Metric]]:
    """By name. ``recogniser`` is a checkpoint that writes what it hears (``audio_gpt2``), ``clap`` a folder of
    transformers'. ValueError for a checkpoint that writes nothing."""
    found: dict[str, Callable[[], Metric]] = {}
    if recogniser is not None:
        listener = Listener(Generator.open(recogniser, device=device), recogniser)
        for unit, name in (("word", "wer"), ("character", "cer")):
            for of in ("generated", "target"):
                found[f"{name}_of_{of}"] = functools.partial(Heard, listener, of, unit)
    if clap is not None:
        found["clap_similarity"] = clap_similarity(clap)
    return found


@dataclass
class Listener:
    """A recogniser; what it heard last is asked for again by the next figure."""

    model: Generator
    name: str
    last: tuple[Audio, str] | None = None

    def __call__(self, sound: Audio) -> str:
        if self.last is None or self.last[0] is not sound:
            text = self.model.generate(audio=sound).media
            if not isinstance(text, str):
                raise ValueError(f"recogniser={self.name} writes no text: give a checkpoint of audio_gpt2.")
            self.last = sound, text
        return self.last[1]


@dataclass
class Heard:
    """A Metric: the error rate of the words heard in sounds whose row has a ``text``."""

    listener: Listener
    of: str
    unit: str
    rate: TextErrorRate = field(init=False)

    def __post_init__(self) -> None:
        self.rate = TextErrorRate(self.unit)

    def update(self, generated: Media, target: Media | None, row: Row) -> None:
        sound = generated if self.of == "generated" else target
        if isinstance(sound, Audio) and row.get("text"):
            self.rate.update(self.listener(sound), str(row["text"]))

    def merge(self, other: Heard) -> None:
        self.rate.merge(other.rate)

    def value(self) -> float:
        return self.rate.value()

    def details(self) -> Mapping[str, object]:
        return {"recogniser": self.listener.name, "count": self.rate.count}
