"""The engine over a family's sampler: admission, company, cancelling, errors; and a checkpoint that generates."""

import dataclasses

import numpy as np
import pytest
import torch

import avray
from avray import checkpoint as checkpoints
from avray.checkpoint import Content
from avray.codecs.spectral import Spectral
from avray.engine import Engine, Generated, Generator, make_request, resampled
from avray.errors import CheckpointError, DataError
from avray.families.continuation import Continuation
from avray.family import Options, Request
from avray.media import Audio, write_audio
from avray.registry import family_settings
from tests.tiny_codec import RATE_HZ, SILENCE, WIDTH, TinyConfig

TINY = Continuation(TinyConfig(), segment_s=1.0, num_layers=1, num_heads=2, feed_forward=16, normalise="scale")


def tone(seconds, rate=RATE_HZ, hz=50.0, channels=1):
    wave = 0.3 * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)
    return Audio(np.tile(wave.astype(np.float32), (channels, 1)), rate)


@pytest.fixture(scope="module")
def parts():
    random = np.random.default_rng(0)
    rows = [{f"{role}.latents": (random.normal(size=(25, WIDTH)) + SILENCE).astype(np.float16)
             for role in ("input", "output")} for _ in range(4)]
    fitted = TINY.fit(iter(rows))
    model = TINY.build(fitted)
    TINY.init(model, torch.Generator().manual_seed(0))
    return model, fitted


def engine(parts, slots=2, family=TINY):
    return Engine(family, *parts, slots=slots)


def drain(made):
    """Every ticket's samples, and the order in which tickets ended."""
    pieces, ended = {}, []
    while made.busy:
        for output in made.step():
            assert output.error is None
            pieces.setdefault(output.ticket, []).append(output.media)
            if output.done:
                ended.append(output.ticket)
    return {ticket: np.concatenate(parts, 1) for ticket, parts in pieces.items()}, ended


def ask(seconds=1.0, prompt_s=1.0, **fields):
    return Request(audio=tone(prompt_s), options=Options(seconds=seconds), **fields)


def test_more_requests_than_slots_are_all_made_at_their_own_length(parts):
    made = engine(parts)
    lengths = [0.4, 2.0, 1.0, 3.2, 0.04]
    tickets = [made.submit(ask(seconds)) for seconds in lengths]
    samples, ended = drain(made)
    assert [samples[ticket].shape for ticket in tickets] == [(1, round(s * RATE_HZ)) for s in lengths]
    assert ended[0] == tickets[0] and sorted(ended) == tickets
    assert made.step() == [] and sorted(made.free) == [0, 1]


def test_alone_and_in_company_are_the_same_bits(parts):
    alone = engine(parts, slots=3)
    ticket = alone.submit(ask(2.4, 0.7))
    expected = drain(alone)[0][ticket]
    crowd = engine(parts, slots=3)
    for seconds in (3.0, 0.4):
        crowd.submit(ask(seconds))
    crowd.step()
    ticket = crowd.submit(ask(2.4, 0.7))
    samples, _ = drain(crowd)
    assert np.array_equal(samples[ticket], expected)


def test_cancelling_frees_the_slot_and_forgets_the_waiting(parts):
    made = engine(parts, slots=1)
    running, waiting, last = (made.submit(ask(seconds)) for seconds in (100.0, 1.0, 1.0))
    made.step()
    made.cancel(running)
    made.cancel(waiting)
    made.cancel(12345)
    samples, _ = drain(made)
    assert list(samples) == [last]


def test_one_request_that_fails_leaves_the_others_alone(parts):
    class Failing(Continuation):
        def collate(self, rows, fitted):
            if len(rows[0]["input.latents"]) < 20:
                raise ValueError("it cannot be")
            return super().collate(rows, fitted)

    made = engine(parts, slots=1, family=Failing(**{f.name: getattr(TINY, f.name) for f in dataclasses.fields(TINY)}))
    bad, good = made.submit(ask(1.0, 0.4)), made.submit(ask())
    outputs = made.step()
    assert [(o.ticket, o.done, str(o.error)) for o in outputs] == [(bad, True, "it cannot be"), (good, True, "None")]
    with pytest.raises(ValueError, match="it cannot be"):
        Generator(made).generate_many([ask(1.0, 0.4), ask()])
    assert not made.busy and len(Generator(made).generate_many([ask()])) == 1


@pytest.mark.parametrize(("audio", "words"), [
    (Audio(np.zeros((1, 0), np.float32), RATE_HZ), "at least one"),
    (Audio(np.zeros(100, np.float32), RATE_HZ), r"\[channels, time\]"),
    (Audio(np.full((1, 500), np.nan, np.float32), RATE_HZ), "not finite"),
    (Audio(np.zeros((1, 500), np.float32), 0), "above 0 Hz"),
    (tone(0.05), "at least 0.08 s")])
def test_prompts_that_are_none(parts, audio, words):
    with pytest.raises(ValueError, match=words):
        engine(parts).submit(Request(audio=audio))


def test_a_silent_prompt_is_continued_like_any_other(parts):
    made = Generator(engine(parts)).generate(audio=Audio(np.zeros((1, 2000), np.float32), RATE_HZ), seconds=1.0)
    assert made.audio.samples.shape == (1, 1000) and np.isfinite(made.audio.samples).all()


@pytest.mark.parametrize("rate", [500, 1000, 11025, 44100])
def test_any_rate_and_any_channels_are_brought_to_the_codecs(parts, rate):
    made = engine(parts)
    expected = made.row(Request(audio=tone(1.24)))["input.latents"]
    frames = made.row(Request(audio=tone(1.24, rate, channels=2)))["input.latents"]
    assert frames.dtype == np.float16 and frames.shape == expected.shape == (31, WIDTH)
    assert np.abs(frames[5:-5].astype(float) - expected[5:-5]).max() < 0.02


@pytest.mark.parametrize("length", [1, 441, 12345])
def test_resampling_keeps_the_length_every_reader_keeps(length):
    audio = Audio(np.ones((2, length), np.float32), 44100)
    assert len(resampled(audio, 24000)) == round(length * 24000 / 44100)


def test_streams_are_what_generate_gives_and_may_run_side_by_side(parts):
    generator = Generator(engine(parts))
    whole = generator.generate(audio=tone(1.0), seconds=3.0).audio.samples
    one, two = (generator.stream(audio=tone(1.0), seconds=3.0) for _ in range(2))
    pieces = [[], []]
    for first, second in zip(one, two, strict=True):
        pieces[0].append(first.samples)
        pieces[1].append(second.samples)
    assert len(pieces[0]) == 3
    assert all(np.array_equal(np.concatenate(part, 1), whole) for part in pieces)


def test_closing_a_stream_stops_its_work(parts):
    generator = Generator(engine(parts, slots=1))
    stream = generator.stream(audio=tone(1.0), seconds=1000.0)
    next(stream)
    stream.close()
    assert not generator.engine.busy
    with pytest.raises(ValueError, match="audio is missing"):
        generator.stream()


def test_a_bad_request_among_many_starts_none(parts):
    generator = Generator(engine(parts))
    with pytest.raises(ValueError, match="audio is missing"):
        generator.generate_many([ask(), Request()])
    assert not generator.engine.busy


def test_the_prompt_goes_in_front_at_the_outputs_rate():
    made = Generated(tone(1.0), 0, Options(), tone(0.5, rate=4000, channels=2))
    joined = made.with_prompt().audio
    assert joined.samples.shape == (1, 1500) and joined.sample_rate_hz == RATE_HZ
    assert np.array_equal(joined.samples[:, 500:], made.audio.samples)
    with pytest.raises(ValueError, match="needs a recording"):
        Generated(tone(1.0), 0, Options()).with_prompt()
    with pytest.raises(ValueError, match="no audio but text"):
        Generated("words", 0, Options()).audio  # noqa: B018


def test_options_of_a_request():
    request = make_request("hello", None, None, "task", 2.0, None, Options(seconds=1.0, top_k=5), 7)
    assert request.options == Options(seconds=2.0, top_k=5)
    assert (request.text, request.task, request.seed) == ("hello", "task", 7)
    with pytest.raises(DataError):
        make_request(None, "/no/such/file.wav", None, None, None, None, None, 0)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run with one checkpoint of a small model over the codec that needs no weights."""
    family = Continuation(Spectral(num_rounds=2), segment_s=0.4, num_layers=1, num_heads=2, feed_forward=16)
    random = np.random.default_rng(1)
    fitted = family.fit(iter([{f"{role}.latents": random.normal(-6, 2, (30, 128)) for role in ("input", "output")}]))
    model = family.build(fitted)
    family.init(model, torch.Generator().manual_seed(0))
    run = tmp_path_factory.mktemp("runs") / "a"
    content = Content(model=model.state_dict(), family=family_settings(family), fitted=fitted, settings={}, ema=None,
                      trainer=None, figures={}, card="")
    checkpoints.save(run, 3, content, ("last", "best"))
    return run, Generator(Engine(family, model, fitted))


def test_a_checkpoint_generates_what_its_model_did(saved, tmp_path):
    run, before = saved
    write_audio(tmp_path / "in.wav", tone(1.0, 16000, 440.0))
    made = avray.load(str(run / "best")).generate(audio=tmp_path / "in.wav", seconds=1.0)
    assert made.audio.samples.shape == (1, 24000) and made.audio.sample_rate_hz == 24000
    expected = before.generate(audio=str(tmp_path / "in.wav"), seconds=1.0)
    assert np.array_equal(made.audio.samples, expected.audio.samples)
    assert made.prompt.sample_rate_hz == 16000 and made.with_prompt().audio.seconds == pytest.approx(2.0)


def test_what_is_no_checkpoint_is_an_error(tmp_path):
    with pytest.raises(CheckpointError):
        Generator.open(tmp_path / "nothing")


