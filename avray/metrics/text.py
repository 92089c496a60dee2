"""Word and character error rates through jiwer, BLEU and ROUGE-L.

Notable: rates are errors over reference length of the whole set, not a mean of rows, so that short rows do
not weigh more. Both texts are lower-cased and lose their punctuation first (apostrophes stay, they tell words
apart), because recognisers differ in both.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

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


@dataclass
class Bleu:
    """BLEU (Papineni et al., 2002) with up to four words, over the whole set, as torchmetrics counts it; a Metric over
    text, normalised as for the error rates. Rows without a target text are skipped."""

    generated: list[str] = field(default_factory=list)
    targets: list[str] = field(default_factory=list)

    def update(self, generated: object, target: object, row: object = None) -> None:
        if isinstance(target, str):
            self.generated.append(normalise(str(generated)))
            self.targets.append(normalise(target))

    def merge(self, other: Bleu) -> None:
        self.generated += other.generated
        self.targets += other.targets

    def value(self) -> float:
        from torchmetrics.functional.text import bleu_score

        longest = max((len(text.split()) for text in self.targets), default=0)
        if not longest:
            return float("nan")
        return float(bleu_score(self.generated, [[text] for text in self.targets], n_gram=min(4, longest)))


@dataclass
class RougeL:
    """ROUGE-L (Lin, 2004): the F1 of the longest common subsequence of words, averaged over rows with a target."""

    total: float = 0.0
    count: int = 0

    def update(self, generated: object, target: object, row: object = None) -> None:
        if isinstance(target, str):
            ours, theirs = normalise(str(generated)).split(), normalise(target).split()
            self.total += 2 * _common(ours, theirs) / (len(ours) + len(theirs)) if ours or theirs else 1.0
            self.count += 1

    def merge(self, other: RougeL) -> None:
        self.total += other.total
        self.count += other.count

    def value(self) -> float:
        return self.total / self.count if self.count else float("nan")


def _common(ours: Sequence[str], theirs: Sequence[str]) -> int:
    """The length of the longest common subsequence."""
    row = [0] * (len(theirs) + 1)
    for word in ours:
        before = 0
        for index, other in enumerate(theirs, 1):
            before, row[index] = row[index], before + 1 if word == other else max(row[index], row[index - 1])
    return row[-1]
