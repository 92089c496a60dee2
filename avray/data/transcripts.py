"""Transcripts with times, as utterances: STM, SRT, WebVTT, Praat's TextGrid (long and short), and CTM of single words.

What cannot be read is a ``Flaw`` with its line, and the rest goes on. Words are gathered into utterances at pauses, and
keep their own times, so that a long stretch can be cut between any two of them. A stretch that its author set aside
(STM's ``ignore_time_segment_in_scoring``) is an utterance without text: nothing may be joined across it.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

PAUSE_S = 0.6
"""Words further apart than this are not one utterance."""
MAX_UTTERANCE_S = 15.0
"""An utterance made of words is closed at the first word that ends later than this."""


@dataclass(frozen=True)
class Word:
    start_s: float
    end_s: float
    text: str


@dataclass(frozen=True)
class Utterance:
    """Times from the start of the recording; ``recording`` and ``speaker`` as the transcript names them, or empty."""

    start_s: float
    end_s: float
    text: str
    line: int
    speaker: str = ""
    recording: str = ""
    words: tuple[Word, ...] = ()


@dataclass(frozen=True)
class Flaw:
    """A line that is none, or with line 0 the whole file."""

    line: int
    reason: str


Entry = Utterance | Flaw


def parse(name: str, text: str) -> list[Entry]:
    """What a transcript of this name (its suffix is one of ``TIMED_SUFFIXES``) holds, in its own order."""
    entries = []
    for entry in PARSERS["." + name.lower().rpartition(".")[2]](text):
        if isinstance(entry, Utterance) and not 0 <= entry.start_s < entry.end_s:
            entry = Flaw(entry.line, f"its time runs from {entry.start_s:g} to {entry.end_s:g} s")
        entries.append(entry)
    return entries


def _seconds(text: str) -> float:
    """NaN for what is no finite number, which ``parse`` then reports."""
    try:
        number = float(text)
    except ValueError:
        return math.nan
    return number if math.isfinite(number) else math.nan


# NIST's --------------------------------------------------------------------------------------------------------------

_ALTERNATIVES = re.compile(r"\{\s*([^{}/]*?)\s*/[^{}]*\}")
_SET_ASIDE = re.compile(r"ignore_time_segment_in_scoring", re.IGNORECASE)


def parse_stm(text: str) -> Iterator[Entry]:
    """``recording channel speaker start end [<labels>] words``. Of alternatives ``{ a / b }`` the first is taken, and
    what may be left out, ``(%uh)``, is kept as a word."""
    for number, line in _lines(text):
        fields = line.split(None, 5)
        if len(fields) < 5:
            yield Flaw(number, "the line is not recording, channel, speaker, start, end and text")
            continue
        recording, _, speaker, start, end = fields[:5]
        words = re.sub(r"^<[^>]*>\s*", "", fields[5] if len(fields) > 5 else "")
        aside = _SET_ASIDE.search(words) or speaker.lower() == "inter_segment_gap"
        while (simpler := _ALTERNATIVES.sub(r"\1", words)) != words:
            words = simpler
        words = " ".join(word for word in re.sub(r"\(%?([^()]*)\)", r"\1", words).split() if word != "@")
        if not words and not aside:
            yield Flaw(number, "its text is empty")
        else:
            yield Utterance(_seconds(start), _seconds(end), "" if aside else words, number, speaker, recording)


def parse_ctm(text: str) -> Iterator[Entry]:
    """``recording channel start duration word [confidence [type [speaker]]]``."""
    streams: dict[tuple[str, str, str], list[tuple[int, Word]]] = {}
    for number, line in _lines(text):
        fields = line.split()
        if len(fields) < 5:
            yield Flaw(number, "the line is not recording, channel, start, duration and word")
            continue
        recording, channel, start, duration, word = fields[:5]
        kind = fields[6].lower() if len(fields) > 6 else "lex"
        if word.upper().startswith("<ALT") or kind in ("non-lex", "misc", "noscore"):
            continue
        begin, length = _seconds(start), _seconds(duration)
        if not (begin >= 0 and length >= 0):
            yield Flaw(number, f"its time is {start} s and {duration} s of length")
            continue
        speaker = fields[7] if len(fields) > 7 else channel
        streams.setdefault((recording, channel, speaker), []).append((number, Word(begin, begin + length, word)))
    for (recording, _, speaker), words in streams.items():
        for utterance in gathered(words):
            yield replace(utterance, recording=recording, speaker=speaker)


def _lines(text: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip() and not line.startswith(";;"):
            yield number, line.strip()


def gathered(words: Iterable[tuple[int, Word]]) -> Iterator[Utterance]:
    """Words (each with its line) as utterances, parted where nothing is said for ``PAUSE_S``."""
    held: list[tuple[int, Word]] = []
    for line, word in sorted(words, key=lambda one: (one[1].start_s, one[0])):
        if held and (word.start_s - held[-1][1].end_s > PAUSE_S
                     or word.end_s - held[0][1].start_s > MAX_UTTERANCE_S):
            yield _utterance(held)
            held = []
        held.append((line, word))
    if held:
        yield _utterance(held)


def _utterance(held: list[tuple[int, Word]]) -> Utterance:
    words = tuple(word for _, word in held)
    return Utterance(words[0].start_s, max(word.end_s for word in words), " ".join(word.text for word in words),
                     held[0][0], words=words)


# Subtitles -----------------------------------------------------------------------------------------------------------

_CLOCK = r"(?:(\d+):)?(\d{1,2}):(\d{1,2})[.,](\d{1,3})"
_CUE = re.compile(rf"\s*{_CLOCK}\s*-->\s*{_CLOCK}(?:\s.*)?")
_TAGS = re.compile(r"<[^>\n]*>|\{\\[^}\n]*\}")
_VOICE = re.compile(r"<v(?:\.[^\s>]*)?\s+([^>]+)>")


def parse_srt(text: str) -> Iterator[Entry]:
    return _cues(text, skipped=())


def parse_vtt(text: str) -> Iterator[Entry]:
    """Whoever ``<v Name>`` says is speaking is the speaker."""
    if not text.startswith("WEBVTT"):
        yield Flaw(0, "it does not begin with WEBVTT")
        return
    yield from _cues(text, skipped=("WEBVTT", "NOTE", "STYLE", "REGION"))


def _cues(text: str, skipped: tuple[str, ...]) -> Iterator[Entry]:
    """Blocks between blank lines: a number or a name, the times, and the text without its marks."""
    for number, block in _blocks(text):
        if skipped and block[0].startswith(skipped):
            continue
        at = next((index for index, line in enumerate(block[:2]) if "-->" in line), None)
        match = None if at is None else _CUE.fullmatch(block[at])
        if at is None or match is None:
            yield Flaw(number, "the block has no line of times such as 00:00:01,000 --> 00:00:02,500")
            continue
        said = " ".join(block[at + 1:])
        voice = _VOICE.search(said)
        words = " ".join(html.unescape(_TAGS.sub("", said)).split())
        start, end = _clock(match.groups()[:4]), _clock(match.groups()[4:])
        yield Utterance(start, end, words, number, voice[1].strip() if voice else "") if words \
            else Flaw(number, "its text is empty")


def _blocks(text: str) -> Iterator[tuple[int, list[str]]]:
    block: list[str] = []
    for number, line in enumerate([*text.split("\n"), ""], 1):
        if line.strip():
            block.append(line.rstrip("\r"))
        elif block:
            yield number - len(block), block
            block = []


def _clock(parts: tuple[str | None, ...]) -> float:
    hours, minutes, seconds, fraction = parts
    return int(hours or 0) * 3600 + int(minutes or 0) * 60 + int(seconds or 0) + float(f"0.{fraction}")


# Praat's -------------------------------------------------------------------------------------------------------------

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_TOKEN = re.compile(rf'"((?:[^"]|"")*)"|(?<![^\s=])({_NUMBER})(?=\s|$)')
_SILENCE = ("", "sil", "sp", "spn", "<sil>", "<eps>", "<p:>", "<unk>")


class _Tokens:
    """The free-standing numbers and quoted strings of a TextGrid, which are all that Praat itself reads of it."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.found = list(_TOKEN.finditer(text))
        self.at = 0

    def line(self) -> int:
        return self.text.count("\n", 0, self.found[min(self.at, len(self.found) - 1)].start()) + 1

    def string(self) -> str:
        token = self._next()
        if token[1] is None:
            raise ValueError(f"a text is expected in place of {token[0]}")
        return token[1].replace('""', '"')

    def number(self) -> float:
        token = self._next()
        if token[2] is None:
            raise ValueError(f"a number is expected in place of {token[0][:40]}")
        return float(token[2])

    def _next(self) -> re.Match[str]:
        if self.at >= len(self.found):
            raise ValueError("it ends too early")
        self.at += 1
        return self.found[self.at - 1]


def parse_textgrid(text: str) -> Iterator[Entry]:
    """Tiers named word or words time words (``Ann - words`` those of Ann, as aligners write it) and are enough; else
    each tier of intervals that is not of phones holds a speaker's utterances, or everybody's where it is the only
    one."""
    try:
        tiers = _tiers(_Tokens(text))
    except (ValueError, IndexError) as error:
        yield Flaw(0, f"it is not a TextGrid in Praat's text form ({error})")
        return
    of_words = {name: said for name, said in tiers.items() if re.search(r"(^|[\s_-])words?$", name, re.IGNORECASE)}
    others = {name: said for name, said in tiers.items()
              if not re.search(r"(^|[\s_-])(phone\w*|segments?|syllables?)$", name, re.IGNORECASE)}
    for name, said in (of_words or others).items():
        speaker = re.sub(r"[\s_-]*words?$", "", name, flags=re.IGNORECASE) if of_words else name
        kept = [(line, Word(start, end, words)) for line, start, end, words in said
                if words.lower() not in _SILENCE and 0 <= start < end]
        utterances = gathered(kept) if of_words else (
            Utterance(word.start_s, word.end_s, word.text, line) for line, word in kept)
        for utterance in utterances:
            yield replace(utterance, speaker=speaker if len(of_words or others) > 1 else "")
    if not (of_words or others):
        yield Flaw(0, "it has no tier of intervals with words or utterances")


def _tiers(tokens: _Tokens) -> dict[str, list[tuple[int, float, float, str]]]:
    """Interval tiers by name: (line, start, end, text) of each interval. ValueError for what is no TextGrid."""
    if tokens.string() != "ooTextFile" or tokens.string() != "TextGrid":
        raise ValueError("its first lines do not say ooTextFile and TextGrid")
    tokens.number(), tokens.number()
    tiers: dict[str, list[tuple[int, float, float, str]]] = {}
    for _ in range(int(tokens.number())):
        kind, name = tokens.string(), tokens.string()
        tokens.number(), tokens.number()
        count = int(tokens.number())
        if kind == "TextTier":
            for _ in range(count):
                tokens.number(), tokens.string()
            continue
        if kind != "IntervalTier":
            raise ValueError(f"a tier is of the kind {kind[:40]!r}")
        intervals = tiers.setdefault(name.strip(), [])
        for _ in range(count):
            line = tokens.line()
            intervals.append((line, tokens.number(), tokens.number(), " ".join(tokens.string().split())))
    return tiers


PARSERS: dict[str, Callable[[str], Iterator[Entry]]] = {
    ".stm": parse_stm, ".ctm": parse_ctm, ".srt": parse_srt, ".vtt": parse_vtt, ".textgrid": parse_textgrid}
TIMED_SUFFIXES = tuple(PARSERS)
