"""Transcripts with times: their parsers, which recording each belongs to, and the windows cut from them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avray.data.manifest import Manifest, load_manifest
from avray.data.splits import assign_splits, choose_split
from avray.data.transcripts import PAUSE_S, TIMED_SUFFIXES, Flaw, Utterance, Word, gathered, parse
from avray.families.audio_gpt2 import AudioGPT2
from avray.families.audio_gpt2_windows import Span, windows
from tests.test_manifest import reasons, sound
from tests.tiny_codec import TinyConfig

WORD = st.text("abcdefgäßж'", min_size=1, max_size=6)


@st.composite
def talks(draw: Any) -> list[Utterance]:
    """Utterances one after another, in whole milliseconds."""
    at, made = 0, []
    for line in range(draw(st.integers(1, 8))):
        at += draw(st.integers(0, 4000))
        end = at + draw(st.integers(1, 9000))
        text = " ".join(draw(st.lists(WORD, min_size=1, max_size=4)))
        made.append(Utterance(at / 1000, end / 1000, text, line + 1, draw(st.sampled_from(["ann", "bo"])), "talk"))
        at = end
    return made


def clock(seconds: float, mark: str) -> str:
    ms = round(seconds * 1000)
    return f"{ms // 3_600_000:02d}:{ms // 60_000 % 60:02d}:{ms // 1000 % 60:02d}{mark}{ms % 1000:03d}"


def as_stm(talk: list[Utterance]) -> str:
    return ";; a comment\n" + "".join(
        f"{one.recording} 1 {one.speaker} {one.start_s:.3f} {one.end_s:.3f} <o,f0,female> {one.text}\n" for one in talk)


def as_srt(talk: list[Utterance]) -> str:
    return "\n".join(f"{i}\n{clock(one.start_s, ',')} --> {clock(one.end_s, ',')}\n<i>{one.text}</i>\n"
                     for i, one in enumerate(talk, 1))


def as_vtt(talk: list[Utterance]) -> str:
    cues = [f"cue {i}\n{clock(one.start_s, '.')} --> {clock(one.end_s, '.')} align:start\n<v {one.speaker}>{one.text}\n"
            for i, one in enumerate(talk)]
    return "\n".join(["WEBVTT - a title\n", "NOTE\nnothing\n", *cues])


def as_textgrid(talk: list[Utterance], short: bool = False) -> str:
    end = talk[-1].end_s + 1
    intervals = []
    at = 0.0
    for one in talk:
        if one.start_s > at:
            intervals.append((at, one.start_s, ""))
        intervals.append((one.start_s, one.end_s, one.text.replace('"', '""')))
        at = one.end_s
    intervals.append((at, end, "sil"))
    if short:
        body = "".join(f'{a}\n{b}\n"{text}"\n' for a, b, text in intervals)
        return (f'File type = "ooTextFile"\nObject class = "TextGrid"\n\n0\n{end}\n<exists>\n1\n"IntervalTier"\n"all"\n'
                f"0\n{end}\n{len(intervals)}\n{body}")
    body = "".join(f'        intervals [{i}]:\n            xmin = {a} \n            xmax = {b} \n'
                   f'            text = "{text}" \n' for i, (a, b, text) in enumerate(intervals, 1))
    return (f'File type = "ooTextFile"\nObject class = "TextGrid"\n\nxmin = 0 \nxmax = {end} \n'
            f'tiers? <exists> \nsize = 1 \nitem []: \n'
            f'    item [1]:\n        class = "IntervalTier" \n        name = "all" \n        xmin = 0 \n'
            f"        xmax = {end} \n        intervals: size = {len(intervals)} \n{body}")


# Parsers ----------------------------------------------------------------------------------------------------------

@settings(max_examples=60, deadline=None)
@given(talks(), st.sampled_from(["stm", "srt", "vtt", "TextGrid", "short.TextGrid"]))
def test_what_is_written_is_read(talk: list[Utterance], form: str) -> None:
    write = {"stm": as_stm, "srt": as_srt, "vtt": as_vtt, "TextGrid": as_textgrid,
             "short.TextGrid": lambda talk: as_textgrid(talk, short=True)}[form]
    found = parse(f"talk.{form}", write(talk))
    assert not [entry for entry in found if isinstance(entry, Flaw)]
    assert [(round(one.start_s, 6), round(one.end_s, 6), one.text) for one in found] \
        == [(one.start_s, one.end_s, one.text) for one in talk]
    if form in ("stm", "vtt"):
        assert [one.speaker for one in found] == [one.speaker for one in talk]


@settings(max_examples=60, deadline=None)
@given(talks())
def test_words_are_gathered_at_pauses_and_keep_their_times(talk: list[Utterance]) -> None:
    words = [(one.line, Word(one.start_s, one.end_s, one.text)) for one in talk]
    found = list(gathered(words))
    assert [word for one in found for word in one.words] == [word for _, word in words]
    for one in found:
        gaps = [b.start_s - a.end_s for a, b in zip(one.words, one.words[1:], strict=False)]
        assert all(gap <= PAUSE_S for gap in gaps) and one.text == " ".join(word.text for word in one.words)
    lines = "".join(f"talk 1 {one.start_s:.3f} {one.end_s - one.start_s:.3f} {one.text.split()[0]} 0.9\n"
                    for one in talk)
    assert sum(len(one.words) for one in parse("x.ctm", lines)) == len(talk)


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from('a1 .:,->"<>\n{}/ WEBVTT00\t=;é'), max_size=200), st.sampled_from(TIMED_SUFFIXES))
def test_no_text_breaks_a_parser(text: str, suffix: str) -> None:
    heads = {".vtt": "WEBVTT\n\n", ".textgrid": '"ooTextFile"\n"TextGrid"\n0\n1\n1\n"IntervalTier"\n"w"\n0\n1\n'}
    for entry in [*parse(f"x{suffix}", text), *parse(f"x{suffix}", heads.get(suffix, "") + text)]:
        assert isinstance(entry, Flaw) or (0 <= entry.start_s < entry.end_s)


def test_flaws_have_their_line_and_the_rest_goes_on() -> None:
    stm = "t 1 ann 0 1 one\nt 1 ann\nt 1 ann 3 2 back\nt 1 ann nan 4 x\nt 1 ann 4 5\nt 1 ann 5 6 two\n"
    assert [entry.line if isinstance(entry, Flaw) else entry.text for entry in parse("a.stm", stm)] \
        == ["one", 2, 3, 4, 5, "two"]
    srt = "1\n00:00:01,000 --> 00:00:02,000\none\n\n2\n00:00:xx --> 1\ntwo\n\n3\n00:00:03,000 --> 00:00:04,000\n\n"
    assert [entry.line if isinstance(entry, Flaw) else entry.text for entry in parse("a.srt", srt)] == ["one", 5, 9]
    assert "WEBVTT" in parse("a.vtt", "1\n")[0].reason
    assert "too early" in parse("a.TextGrid", as_textgrid([Utterance(0, 1, "x", 1)])[:-60])[-1].reason


def test_marks_are_not_words() -> None:
    stm = "t 1 s 0 1 <o> so { one / two { three / four } } (%uh) @ end\nt 1 s 1 2 ignore_time_segment_in_scoring\n"
    first, aside = parse("t.stm", stm)
    assert first.text == "so one uh end" and aside.text == ""
    vtt = "WEBVTT\n\n01:00.500 --> 01:02.000\n<v.loud Ann B><c.x>Salt &amp; <i>bread</i></v>\nhere\n"
    cue, = parse("t.vtt", vtt)
    assert (cue.text, cue.speaker, cue.start_s) == ("Salt & bread here", "Ann B", 60.5)


def test_tiers_of_words_and_of_speakers() -> None:
    def tier(name: str, *said: tuple[float, float, str]) -> str:
        return f'"IntervalTier"\n"{name}"\n0\n9\n{len(said)}\n' + "".join(f'{a}\n{b}\n"{c}"\n' for a, b, c in said)

    def grid(*tiers: str) -> str:
        return f'File type = "ooTextFile"\nObject class = "TextGrid"\n0\n9\n<exists>\n{len(tiers)}\n' + "".join(tiers)

    aligned = grid(tier("ann - words", (0, 1, "one"), (1, 2, "two"), (2, 4, ""), (4, 5, "three")),
                   tier("ann - phones", (0, 1, "W")), tier("bo - words", (6, 7, "four")))
    assert [(one.text, one.speaker, len(one.words)) for one in parse("x.TextGrid", aligned)] \
        == [("one two", "ann", 2), ("three", "ann", 1), ("four", "bo", 1)]
    spoken = grid(tier("Ann", (0, 1, 'say ""so""')), tier("Bo", (2, 3, "no")), '"TextTier"\n"p"\n0\n9\n1\n3\n"bell"\n')
    assert [(one.text, one.speaker) for one in parse("x.textgrid", spoken)] == [('say "so"', "Ann"), ("no", "Bo")]


# Which recording --------------------------------------------------------------------------------------------------

def rows_of(manifest: Manifest) -> list[tuple[str, float, str]]:
    return [(Path(row["audio"]).stem, row["start_s"], row.get("text", "")) for row in manifest.rows]


@pytest.mark.parametrize("place", ["beside", "texts", "apart", "file"])
def test_transcripts_find_their_recordings(tmp_path: Path, place: str) -> None:
    for index, name in enumerate("abc"):
        sound(tmp_path / f"set/{name}.wav", 4.0, seed=index)
    folder = {"beside": tmp_path / "set", "texts": tmp_path / "set/texts"}.get(place, tmp_path / "words")
    folder.mkdir(exist_ok=True)
    talk = [Utterance(0.5, 1.5, "one", 1, "ann", "a"), Utterance(2.0, 3.0, "two", 2, "bo", "a")]
    if place == "file":
        (folder / "all.stm").write_text(as_stm(talk + [replace(one, recording="b.wav") for one in talk]))
    else:
        (folder / "a.stm").write_text(as_stm(talk))
        (folder / "b.srt").write_text(as_srt(talk))
    (folder / ("c.txt" if place != "file" else "unused.md")).write_text("whole")
    texts = {"apart": str(folder), "file": str(folder / "all.stm")}.get(place)
    manifest = load_manifest(tmp_path / "set", texts=texts)
    assert not manifest.rejects
    said = [("a", 0.5, "one"), ("a", 2.0, "two"), ("b", 0.5, "one"), ("b", 2.0, "two")]
    assert rows_of(manifest)[:4] == said and manifest.rows[0]["id"] == "a@0.500-1.500"
    assert manifest.rows[4].get("text") == (None if place == "file" else "whole")
    assert [row["group"] for row in manifest.rows] == ["a", "a", "b", "b", "c"]
    by_speaker = load_manifest(tmp_path / "set", texts=texts, group_by="speaker").rows
    assert [row["group"] for row in by_speaker[:2]] == ["ann", "bo"] and by_speaker[0]["turn"] != by_speaker[1]["turn"]


def test_a_transcript_that_is_the_data_set(tmp_path: Path) -> None:
    sound(tmp_path / "wavs/a.wav", 4.0)
    sound(tmp_path / "wavs/other.wav", 1.0, seed=1)
    (tmp_path / "all.ctm").write_text("a 1 0.5 0.2 one\na 1 0.8 0.2 two\na 1 2.5 0.5 three\nz 1 0 1 lost\n")
    manifest = load_manifest(tmp_path / "all.ctm")
    assert manifest.format == "timed" and rows_of(manifest) == [("a", 0.5, "one two"), ("a", 2.5, "three")]
    assert manifest.rows[0]["word_times"] == [[0.5, 0.7, "one"], [0.8, 1.0, "two"]]
    assert len(manifest.rejects) == 1 and "'z'" in reasons(manifest)[0]


def test_bad_transcripts_shift_no_others_text(tmp_path: Path) -> None:
    """What fails is rejected by its own name; every recording keeps its own words."""
    for index, name in enumerate("abcdef"):
        sound(tmp_path / f"{name}.wav", 2.0, seed=index)
        (tmp_path / f"{name}.srt").write_text(as_srt([Utterance(0.0, 1.0, f"word {name}", 1)]))
    (tmp_path / "a.srt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "b.wav").write_bytes(b"RIFFnothing")
    (tmp_path / "c.srt").write_text(as_srt([Utterance(9.0, 10.0, "after the end", 1)]))
    (tmp_path / "d.vtt").write_text(as_vtt([Utterance(0.0, 1.0, "again", 1)]))
    (tmp_path / "gone.srt").write_text(as_srt([Utterance(0.0, 1.0, "nobody", 1)]))
    manifest = load_manifest(tmp_path)
    assert [(Path(row["audio"]).stem, row.get("text")) for row in manifest.rows] \
        == [("a", None), *((name, f"word {name}") for name in "def")]
    for needle in ("a.srt", "b.wav", "does not lie", "d.wav has a transcript", "'gone'"):
        assert any(needle in reason for reason in reasons(manifest)), (needle, reasons(manifest))


# Windows ----------------------------------------------------------------------------------------------------------

@settings(max_examples=200, deadline=None)
@given(talks(), st.floats(2, 20), st.floats(0, 0.9))
def test_windows(talk: list[Utterance], window_s: float, share: float) -> None:
    spans = [Span(one.start_s, one.end_s, str(index)) for index, one in enumerate(talk)]
    overlap_s = share * window_s
    found = windows(spans, window_s, overlap_s)
    short = [span for span in spans if span.stop_s - span.start_s <= window_s]
    heard = [[int(text) for text in window.text.split()] for window in found]
    assert {index for window in heard for index in window} == {int(span.text) for span in short}, "none is lost"
    for window, inside in zip(found, heard, strict=True):
        assert window.stop_s - window.start_s <= window_s + 1e-6
        assert inside == list(range(inside[0], inside[-1] + 1)), "nothing in it is left out"
        assert (window.start_s, window.stop_s) == (spans[inside[0]].start_s, spans[inside[-1]].stop_s), "nothing is cut"
    for before, after, old, new in zip(found, found[1:], heard, heard[1:], strict=False):
        assert before.stop_s - after.start_s <= overlap_s + 1e-6
        assert new[0] > old[0] and new[-1] > old[-1], "each says something new"


def test_the_originals_windows_of_words() -> None:
    """A word a second for a minute: 20 s, 5 s of overlap."""
    words = [Span(float(second), second + 1.0, str(second)) for second in range(60)]
    found = windows(words, 20.0, 5.0)
    assert [(window.start_s, window.stop_s) for window in found] == [(0, 20), (15, 35), (30, 50), (45, 60)]
    assert found[1].text.split() == [str(second) for second in range(15, 35)]


def test_examples_join_utterances_and_not_across_speakers(tmp_path: Path) -> None:
    sound(tmp_path / "a.wav", 60.0)
    talk = [Utterance(5.0 * i, 5.0 * i + 4, f"w{i}", i + 1, "bo" if i == 6 else "ann", "a") for i in range(12)]
    (tmp_path / "a.stm").write_text(as_stm(talk))
    family = AudioGPT2(TinyConfig(), segment_s=20.0, overlap_s=5.0)
    examples = family.segment(load_manifest(tmp_path).rows)
    assert [(e.fields["text"], e.units["audio"].start_s, e.units["audio"].duration_s) for e in examples] == [
        ("w0 w1 w2 w3", 0, 19), ("w3 w4 w5 w6", 15, 19), ("w6 w7 w8 w9", 30, 19), ("w9 w10 w11", 45, 14)]
    assert examples[1].id == "a@15.000-34.000"
    apart = family.segment(load_manifest(tmp_path, group_by="speaker").rows)
    assert [e.fields["text"] for e in apart] == ["w0 w1 w2 w3", "w3 w4 w5", "w6", "w7 w8 w9 w10", "w10 w11"]


def test_a_long_stretch_is_cut_between_words_or_refused(tmp_path: Path) -> None:
    sound(tmp_path / "a.wav", 30.0)
    family = AudioGPT2(TinyConfig(), segment_s=5.0, overlap_s=1.0)
    (tmp_path / "a.ctm").write_text("".join(f"a 1 {0.5 * i} 0.5 w{i}\n" for i in range(40)))
    rows = load_manifest(tmp_path).rows
    assert max(row["duration_s"] for row in rows) > 5 and all(family.refusal(row) is None for row in rows)
    examples = family.segment(rows)
    assert {word for e in examples for word in e.fields["text"].split()} == {f"w{i}" for i in range(40)}
    assert max(e.units["audio"].duration_s for e in examples) <= 5
    (tmp_path / "a.ctm").rename(tmp_path / "a.old")
    (tmp_path / "a.srt").write_text(as_srt([Utterance(0, 9, "too long", 1), Utterance(9, 12, "fits", 2)]))
    rows = load_manifest(tmp_path).rows
    assert [family.refusal(row) is None for row in rows] == [False, True] and "word" in family.refusal(rows[0])
    assert [e.fields["text"] for e in family.segment(rows)] == ["fits"]


def test_spans_of_one_talk_hold_out_whole_utterances(tmp_path: Path) -> None:
    """No window of training reaches over a held-out span."""
    sound(tmp_path / "a.wav", 300.0)
    (tmp_path / "a.srt").write_text(as_srt([Utterance(3.0 * i, 3.0 * i + 2.5, f"w{i}", i) for i in range(100)]))
    rows = load_manifest(tmp_path).rows
    assert choose_split(rows, span_s=10).by == "span"
    split = assign_splits(rows, span_s=10, guard_s=2)
    assert {row["split"] for row in split} == {"train", "validation"} and len(split) < 100
    family = AudioGPT2(TinyConfig(), segment_s=20.0, overlap_s=5.0)
    spans = {side: [(e.units["audio"].start_s, e.units["audio"].start_s + e.units["audio"].duration_s)
                    for e in family.segment([row for row in split if row["split"] == side])]
             for side in ("train", "validation")}
    assert len(spans["train"]) > 10 and spans["validation"]
    for start_s, stop_s in spans["validation"]:
        assert all(stop + 2 <= start_s or begin >= stop_s + 2 for begin, stop in spans["train"])
