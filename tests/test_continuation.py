"""The continuation family: pairs, sums that stay right, the original's size, and what it generates."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avray.codecs.spectral import Spectral
from avray.engine import Engine
from avray.families.continuation import Continuation
from avray.family import Batch, Fitted, Options, Request
from avray.media import Audio
from tests.tiny_codec import HOP, RATE_HZ, SILENCE, WIDTH, TinyConfig

FRAMES = 50
TINY = Continuation(TinyConfig(), segment_s=2.0, num_layers=1, num_heads=2, feed_forward=16)


def make_rows(count, frames=FRAMES, seed=0, weight=1.0):
    random = np.random.default_rng(seed)
    return [{"id": str(i), "weight": weight,
             **{f"{role}.latents": (random.normal(size=(frames, WIDTH)) + SILENCE).astype(np.float16)
                for role in ("input", "output")}} for i in range(count)]


@pytest.fixture(scope="module")
def fitted():
    return TINY.fit(iter(make_rows(8)))


def built(family, fitted, seed=0):
    model = family.build(fitted)
    family.init(model, torch.Generator().manual_seed(seed))
    return model.eval()


def loss(family, model, batch):
    with torch.no_grad():
        return float(family.loss(model, batch, torch.Generator())["mse"])


# Pairs


def test_pairs_are_consecutive_and_do_not_overlap():
    examples = TINY.segment([{"id": "song", "audio": "/a.wav", "start_s": 0.0, "duration_s": 9.9, "group": "song"}])
    spans = [(e.units["input"].start_s, e.units["output"].start_s) for e in examples]
    assert spans == [(0.0, 2.0), (2.0, 4.0), (4.0, 6.0)]
    assert all(unit.duration_s == 2.0 for e in examples for unit in e.units.values())
    assert examples[0].units["output"] == examples[1].units["input"], "encoded once"
    assert not TINY.segment([{"id": "short", "audio": "/a.wav", "duration_s": 3.9}])


@given(start=st.floats(0, 1000), duration=st.floats(0.1, 60), stride=st.sampled_from([None, 0.5, 0.32, 3.0]),
       segment=st.sampled_from([0.4, 1.0, 2.0]), most=st.sampled_from([None, 1, 3, 10]))
def test_pairs_stay_inside_their_span(start, duration, stride, segment, most):
    family = dataclasses.replace(TINY, segment_s=segment, stride_s=stride, max_pairs_per_song=most)
    row = {"id": "x", "audio": "/a.wav", "start_s": start, "duration_s": duration}
    examples = family.segment([row])
    assert len(examples) <= (most or 10**9) and len({e.id for e in examples}) == len(examples)
    if duration >= 2 * segment + 0.08:
        assert examples
    for example in examples:
        one, two = example.units["input"], example.units["output"]
        assert start - 1e-6 <= one.start_s and two.start_s + two.duration_s <= start + duration + 1e-5
        assert two.start_s == pytest.approx(one.start_s + segment, abs=1e-5)


def test_at_most_so_many_pairs_of_a_song_spread_over_it():
    rows = [{"id": f"s{i}", "audio": "/a.wav", "start_s": 100.0 * i, "duration_s": 50.0} for i in range(2)]
    starts = [e.units["input"].start_s for e in TINY.segment(rows)]
    assert len(starts) == 10 and starts[0] == 0 and starts[-1] == 146 and starts == sorted(starts)
    assert len(dataclasses.replace(TINY, max_pairs_per_song=None).segment(rows)) == 48


def test_given_pairs_join_the_end_of_one_with_the_start_of_the_other():
    [example] = TINY.segment([{"id": "pair_0", "audio": "/in.wav", "target_audio": "/out.wav", "duration_s": 5.0}])
    assert (example.units["input"].start_s, example.units["input"].duration_s) == (3.0, 2.0)
    assert (example.units["output"].source, example.units["output"].start_s) == ("/out.wav", 0.0)
    [short] = TINY.segment([{"id": "pair_1", "audio": "/in.wav", "target_audio": "/out.wav", "duration_s": 1.2}])
    assert {unit.duration_s for unit in short.units.values()} == {1.2}


# Sums and counts


def test_padding_rows_change_nothing(fitted):
    rows, lost = make_rows(3), {"id": "", "weight": 0.0}
    for normalise in ("none", "scale", "change"):
        family = dataclasses.replace(TINY, normalise=normalise)
        model = built(family, fitted)
        alone = family.collate(rows, fitted)
        padded = family.collate([lost, *rows, lost, {**make_rows(1, seed=9)[0], "weight": 0.0}], fitted)
        assert padded.counts == alone.counts == {"mse": 3.0 * FRAMES * WIDTH}
        assert loss(family, model, padded) == pytest.approx(loss(family, model, alone), rel=1e-6)
        for name, terms in family.baselines(alone, fitted).items():
            torch.testing.assert_close(family.baselines(padded, fitted)[name], terms)


def test_a_batch_of_nothing_but_padding_has_no_loss_and_finite_gradients(fitted):
    batch = TINY.collate([{"id": "", "weight": 0.0}] * 2, fitted)
    model = built(TINY, fitted)
    TINY.loss(model.train(), batch, torch.Generator())["mse"].backward()
    assert batch.counts == {"mse": 0.0} and batch["input"].shape == (2, FRAMES, WIDTH)
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in model.parameters())


@settings(max_examples=15, deadline=None)
@given(cut=st.integers(1, 4), lengths=st.lists(st.integers(1, FRAMES), min_size=5, max_size=5),
       weights=st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=5, max_size=5))
def test_sums_and_counts_add_up_however_a_batch_is_split(cut, lengths, weights):
    fitted = TINY.fit(iter(make_rows(8)))
    rows = [{**make_rows(1, frames=n, seed=i)[0], "weight": w}
            for i, (n, w) in enumerate(zip(lengths, weights, strict=True))]
    family = dataclasses.replace(TINY, normalise="change")
    model = built(family, fitted)
    whole = family.collate(rows, fitted)
    parts = [family.collate(part, fitted) for part in (rows[:cut], rows[cut:])]
    assert whole.counts["mse"] == pytest.approx(sum(part.counts["mse"] for part in parts))
    expected = sum(loss(family, model, part) for part in parts)
    assert loss(family, model, whole) == pytest.approx(expected, rel=1e-4, abs=1e-4)
    for name in ("repeat", "mean", "silence"):
        sums = [float(family.baselines(batch, fitted)[name]["mse"]) for batch in (whole, *parts)]
        assert sums[0] == pytest.approx(sums[1] + sums[2], rel=1e-5, abs=1e-4)


def test_baselines_are_what_they_say(fitted):
    row = make_rows(1)[0]
    batch = TINY.collate([row], fitted)
    given_, wanted = (row[f"{role}.latents"].astype(np.float32) for role in ("input", "output"))
    sums = {name: float(terms["mse"]) for name, terms in TINY.baselines(batch, fitted).items()}
    assert sums["repeat"] == pytest.approx(((given_ - wanted) ** 2).sum(), rel=1e-5)
    assert sums["mean"] == pytest.approx(((given_.mean(0) - wanted) ** 2).sum(), rel=1e-5)
    assert sums["silence"] == pytest.approx(((SILENCE - wanted) ** 2).sum(), rel=1e-5)


def test_fit_is_the_mean_and_scale_of_all_frames():
    rows = make_rows(4)
    frames = np.concatenate([row[f"{role}.latents"] for row in rows for role in ("input", "output")]).astype(float)
    fitted = TINY.fit(iter(rows))
    np.testing.assert_allclose(fitted.arrays["mean"], frames.mean(0), atol=1e-4)
    np.testing.assert_allclose(fitted.arrays["scale"], frames.std(0), atol=1e-4)
    assert (fitted.arrays["silence"] == SILENCE).all()
    for row in rows:  # each channel's level of its own, of which the next segment keeps half
        level = np.random.default_rng(int(row["id"])).normal(0, 5, WIDTH)
        row["input.latents"], row["output.latents"] = (np.tile(level * share, (FRAMES, 1)) for share in (1, 0.5))
    again = [{**row, "input.latents": -row["input.latents"], "output.latents": -row["output.latents"]} for row in rows]
    np.testing.assert_allclose(TINY.fit(iter(rows + again)).arrays["kept"], 0.5, atol=1e-3)


# Model


def test_the_original_has_exactly_859520_parameters_on_meta():
    family = Continuation(Spectral())
    fitted = Fitted({name: np.ones(128, np.float32) for name in ("mean", "scale", "kept")},
                    {"codec": "spectral-v1", "width": 128, "frame_rate_hz": 75.0})
    with torch.device("meta"):
        model = family.build(fitted)
    assert sum(p.numel() for p in model.parameters()) == 859_520
    assert all(p.is_meta for p in model.parameters()) and not list(model.buffers())


def test_the_generator_alone_decides_the_weights(fitted):
    torch.manual_seed(1)
    one = built(TINY, fitted, seed=3)
    torch.manual_seed(2)
    two = built(TINY, fitted, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.widen.weight, built(TINY, fitted, seed=4).widen.weight)


@pytest.mark.parametrize("kept", [0.0, 1.0])
def test_change_starts_from_what_of_the_mean_frame_is_kept(fitted, kept):
    family = dataclasses.replace(TINY, normalise="change")
    fitted = Fitted({**fitted.arrays, "kept": np.full(WIDTH, kept, np.float32)}, fitted.data)
    batch = family.collate(make_rows(3), fitted)
    expected = float(family.baselines(batch, fitted)["mean"]["mse"])
    if not kept:
        expected = float((batch["output"] - torch.from_numpy(fitted.arrays["mean"])).square().sum())
    assert loss(family, built(family, fitted), batch) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("normalise", ["none", "scale", "change"])
def test_overfits_one_batch(fitted, normalise):
    family = dataclasses.replace(TINY, normalise=normalise, dropout=0.0, segment_s=0.4)
    batch = family.collate(make_rows(2, frames=10), fitted)
    torch.manual_seed(0)
    model = built(family, fitted).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(250):
        optimizer.zero_grad()
        value = family.loss(model, batch, torch.Generator())["mse"]
        (value / batch.counts["mse"]).backward()
        optimizer.step()
    best = min(float(terms["mse"]) for terms in family.baselines(batch, fitted).values())
    assert float(value.detach()) < 0.2 * best


def test_another_codec_is_refused(fitted):
    other = Fitted(fitted.arrays, {**fitted.data, "codec": "other-v1"})
    with pytest.raises(ValueError, match="other-v1"):
        TINY.build(other)
    with pytest.raises(ValueError, match="must divide the codec's width of 8"):
        dataclasses.replace(TINY, num_heads=3).fit(iter(make_rows(1)))


@pytest.mark.parametrize("wrong", [{"segment_s": 0}, {"dropout": 1.0}, {"head": "gan"}, {"normalise": "off"},
                                   {"max_pairs_per_song": 0}, {"stride_s": -1.0}, {"num_layers": 0}])
def test_wrong_settings_name_their_key(wrong):
    with pytest.raises(ValueError, match=f"family.{next(iter(wrong))}"):
        dataclasses.replace(TINY, **wrong)


# Generation


def sampler(fitted, slots=2):
    return TINY.sampler(built(TINY, fitted), fitted, slots)


def request_batch(fitted, frames, seed=0) -> Batch:
    row = make_rows(1, frames=frames, seed=seed)[0]
    del row["output.latents"]
    return TINY.collate([row], fitted)


def run(made, slot):
    pieces = []
    for _ in range(100):
        mine = [piece for piece in made.step() if piece.slot == slot]
        pieces += [piece.data for piece in mine]
        if any(piece.done for piece in mine):
            return pieces
    raise AssertionError("it never ended")


@pytest.mark.parametrize(("frames", "seconds", "sizes"), [
    (FRAMES, 2.0, [50]), (FRAMES, 5.0, [50, 50, 25]), (FRAMES, None, [50]), (80, 2.2, [50, 5]),
    (30, 2.0, [30, 20]), (1, 0.12, [1, 1, 1]), (FRAMES, 0.001, [1])])
def test_windows_are_chained_to_the_length_asked_for(fitted, frames, seconds, sizes):
    made = sampler(fitted)
    made.admit([1], request_batch(fitted, frames), [0], [Options(seconds=seconds)])
    pieces = run(made, 1)
    assert [len(piece) for piece in pieces] == sizes and all(piece.shape[1] == WIDTH for piece in pieces)
    assert not made.step(), "the slot is free"


def test_each_window_follows_from_the_one_before(fitted):
    made = sampler(fitted)
    batch = request_batch(fitted, FRAMES)
    made.admit([0], batch, [0], [Options(seconds=4.0)])
    first, second = (torch.from_numpy(piece)[None] for piece in run(made, 0))
    torch.testing.assert_close(first, made.model(batch["input"]), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(second, made.model(first), atol=1e-5, rtol=1e-4)


def test_alone_and_in_company_are_the_same_bits(fitted):
    def made_with(company):
        made = sampler(fitted, slots=3)
        if company:
            made.admit([0], request_batch(fitted, 20, seed=5), [0], [Options(seconds=8.0)])
            made.step()
            made.admit([2], request_batch(fitted, FRAMES, seed=6), [0], [Options(seconds=2.0)])
        made.admit([1], request_batch(fitted, 37, seed=7), [0], [Options(seconds=6.0)])
        return np.concatenate(run(made, 1))

    assert np.array_equal(made_with(company=False), made_with(company=True))


def test_dropped_slots_give_nothing_more(fitted):
    made = sampler(fitted)
    made.admit([0], request_batch(fitted, FRAMES), [0], [Options(seconds=100.0)])
    made.step()
    made.drop(0)
    made.drop(0)
    assert made.step() == []
    made.admit([0], request_batch(fitted, FRAMES), [0], [Options()])
    assert len(run(made, 0)) == 1


def sound(seconds, rate=RATE_HZ, channels=1):
    return Audio(np.random.default_rng(0).normal(0, 0.1, (channels, round(seconds * rate))).astype(np.float32), rate)


@pytest.mark.parametrize(("request_", "words"), [
    (Request(), "audio is missing"), (Request(audio=sound(0.05)), "at least 0.08 s"),
    (Request(audio=sound(1), text="more"), "text has no meaning"),
    (Request(audio=sound(1), options=Options(temperature=1.0)), "temperature has no meaning"),
    (Request(audio=sound(1), options=Options(seconds=0.0)), "seconds must be above 0"),
    (Request(audio=sound(1), options=Options(seconds=float("nan"))), "seconds must be above 0")])
def test_requests_it_cannot_take(request_, words):
    with pytest.raises(ValueError, match=words):
        TINY.prompt(request_)


def test_a_prompt_ends_where_its_recording_ends(fitted):
    """Whole frames counted from the end, and only as much as is looked at: a segment and 2 s of warm-up."""
    audio = sound(7.93)
    prompt = TINY.prompt(Request(audio=audio)).media["input"]
    assert prompt.samples.shape == (1, 4000) and np.array_equal(prompt.samples[:, -10:], audio.samples[:, -10:])
    for seconds, kept in ((2.0, 2000), (2.05, 2000), (2.1, 2080), (1.0, 960), (0.08, 80)):
        assert TINY.prompt(Request(audio=sound(seconds))).media["input"].samples.shape[1] == kept


@pytest.mark.parametrize("seconds", [0.5, 2.0, 3.04])
def test_renders_as_many_samples_as_frames(fitted, seconds):
    engine = Engine(TINY, built(TINY, fitted), fitted)
    engine.submit(Request(audio=sound(3.0, rate=1600, channels=2), options=Options(seconds=seconds)))
    pieces = []
    while engine.busy:
        pieces += [output.media for output in engine.step()]
    assert sum(piece.shape[1] for piece in pieces) == round(seconds * RATE_HZ / HOP) * HOP
    assert engine.media(pieces).sample_rate_hz == RATE_HZ


def test_questions_ask_for_the_held_out_half():
    [example] = TINY.segment([{"id": "s", "audio": "/a.wav", "start_s": 4.0, "duration_s": 4.0}])
    question = TINY.question(example)
    assert (question.prompt.start_s, question.target.start_s, question.seconds) == (4.0, 6.0, 2.0)
