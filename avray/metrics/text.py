"""Word and character error rates, through jiwer.

Notable: rates are errors over reference length of the whole set, not a mean of rows, so that short rows do
not weigh more. Both texts are lower-cased and lose their punctuation first (apostrophes stay, they tell words
apart), because recognisers differ in both.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

_PUNCTUATION = re.compile(r"[^\w\s']|_")


def normalise(text: str) -> str:
    """Lower case, no punctuation but apostrophes, single spaces."""
    return " ".join(_PUNCTUATION.sub(" ", text.lower().replace("’", "'")).split())


def wer(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    """Substituted, deleted and inserted words over reference words; nan where the references hold none. Above
    1 is possible. ValueError for two lengths."""
    return _rate(TextErrorRate("word"), references, hypotheses)


def cer(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    """As ``wer``, over characters, spaces included."""
    return _rate(TextErrorRate("character"), references, hypotheses)


@dataclass
class TextErrorRate:
    """A Metric over text: ``TextErrorRate("word")`` is WER, ``TextErrorRate("character")`` CER. Rows without
    a target text are skipped."""

    unit: str = "word"
    num_errors: int = 0
    num_units: int = 0
    count: int = 0

    def update(self, generated: object, target: object, row: object = None) -> None:
        if not isinstance(target, str):
            return
        if not isinstance(generated, str):
            raise ValueError(f"An error rate needs generated text, got {type(generated).__name__}.")
        reference, hypothesis = normalise(target), normalise(generated)
        self.count += 1
        self.num_units += len(self._units(reference))
        self.num_errors += self._errors(reference, hypothesis)

    def merge(self, other: TextErrorRate) -> None:
        self.num_errors += other.num_errors
        self.num_units += other.num_units
        self.count += other.count

    def value(self) -> float:
        return self.num_errors / self.num_units if self.num_units else float("nan")

    def details(self) -> dict[str, object]:
        return {"count": self.count, f"{self.unit}s": self.num_units}

    def _units(self, text: str) -> Sequence[str]:
        return text.split() if self.unit == "word" else text

    def _errors(self, reference: str, hypothesis: str) -> int:
        import jiwer

        if not reference:  # jiwer refuses an empty reference
            return len(self._units(hypothesis))
        process = jiwer.process_words if self.unit == "word" else jiwer.process_characters
        found = process(reference, hypothesis)
        return found.substitutions + found.deletions + found.insertions


def _rate(metric: TextErrorRate, references: Sequence[str], hypotheses: Sequence[str]) -> float:
    for reference, hypothesis in zip(references, hypotheses, strict=True):
        metric.update(hypothesis, reference)
    return metric.value()
