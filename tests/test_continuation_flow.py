"""continuation with head=flow: sums, what is learnt, and frames drawn one after another."""

import dataclasses

import numpy as np
import pytest
import torch

from avray.engine import Engine
from avray.families.continuation import Continuation
from avray.families.continuation_flow import FlowHeadConfig
from avray.family import Options, Request
from avray.media import Audio
from tests.test_continuation import make_rows
from tests.tiny_codec import HOP, RATE_HZ, SILENCE, WIDTH, TinyConfig

FLOW = FlowHeadConfig(width=16, head_width=16, head_layers=1, context=128, num_steps=3)
TINY = Continuation(TinyConfig(), segment_s=1.0, num_layers=1, num_heads=2, feed_forward=32, dropout=0.0, head="flow",
                    flow=FLOW)


@pytest.fixture(scope="module")
def fitted():
    return TINY.fit(iter(make_rows(8, 25)))


def built(fitted, family=TINY):
    model = family.build(fitted)
    generator = torch.Generator().manual_seed(0)
    family.init(model, generator)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return model.eval()


def loss(model, batch, seed=0):
    with torch.no_grad():
        return float(TINY.loss(model, batch, torch.Generator().manual_seed(seed))["flow"])


def tone(seconds):
    wave = 0.3 * np.sin(2 * np.pi * 50 * np.arange(round(seconds * RATE_HZ)) / RATE_HZ)
    return Audio(wave[None].astype(np.float32), RATE_HZ)


def drain(engine, *tickets):
    pieces = {}
    while engine.busy:
        for output in engine.step():
            pieces.setdefault(output.ticket, []).append(output.media)
    return [np.concatenate(pieces[ticket], 1)[0] for ticket in tickets]


def test_padding_and_company_change_no_sum(fitted):
    model, rows = built(fitted), [*make_rows(2, 25), {**make_rows(1, 11, seed=3)[0]}]
    alone = TINY.collate(rows, fitted)
    padded = TINY.collate([{"id": "", "weight": 0.0}, *rows], fitted)
    assert alone.counts == padded.counts == {"flow": float((4 * 25 + 22) * WIDTH)}
    parts = [TINY.collate([row], fitted) for row in rows]
    assert loss(model, alone) == pytest.approx(loss(model, padded), rel=1e-5)
    assert loss(model, alone) == pytest.approx(sum(loss(model, part) for part in parts), rel=1e-4)
    guess = TINY.baselines(alone, fitted)["best_linear"]["flow"]
    assert float(guess) / alone.counts["flow"] == pytest.approx(1.74, abs=0.01)


def test_a_frame_knows_only_what_came_before(fitted):
    model = built(fitted)
    frames = torch.randn(1, 20, WIDTH)
    changed = frames.clone()
    changed[:, 12:] += 1
    told = [model.foresee(one) for one in (frames, changed)]
    torch.testing.assert_close(told[0][:, :13], told[1][:, :13])
    assert (told[0][:, 13:] - told[1][:, 13:]).abs().max() > 1e-3


def test_it_learns_what_follows(fitted):
    """Each frame is the one before with its sign turned: half of the flow's loss is chance, the rest is learnt."""
    rng = np.random.default_rng(0)
    start = rng.choice([-1.0, 1.0], (16, 1, WIDTH))
    frames = start * np.where(np.arange(24) % 2, 1, -1)[None, :, None] + SILENCE
    rows = [{"id": str(i), "weight": 1.0, "input.latents": one[:12].astype(np.float16),
             "output.latents": one[12:].astype(np.float16)} for i, one in enumerate(frames)]
    own = TINY.fit(iter(rows))
    model = TINY.build(own)
    TINY.init(model, torch.Generator().manual_seed(0))
    batch = TINY.collate(rows, own)
    optimiser = torch.optim.Adam(model.train().parameters(), 5e-3)
    for step in range(150):
        optimiser.zero_grad()
        (TINY.loss(model.train(), batch, torch.Generator().manual_seed(step))["flow"] / batch.counts["flow"]).backward()
        optimiser.step()
    assert loss(model.eval(), batch) / batch.counts["flow"] < 0.6


def test_cached_frames_are_those_of_the_whole_network(fitted):
    model = built(fitted)
    engine = Engine(TINY, model, fitted)
    row = engine.row(Request(audio=tone(0.8)))
    heard = model.normalised(torch.from_numpy(row["input.latents"].astype(np.float32)))
    [made] = drain(engine, engine.submit(Request(audio=tone(0.8), seed=7, options=Options(seconds=0.4))))
    noise, frames, walk = torch.Generator().manual_seed(7), heard, FLOW.walk(3)
    with torch.no_grad():
        for _ in range(10):
            told = model.foresee(frames[None])[:, -1:]
            x = torch.randn(1, 1, WIDTH, generator=noise)
            for index in range(3):
                x = walk.step(x, index, lambda x, level, told=told: model.head(x, torch.full((1, 1), level), told))
            frames = torch.cat([frames, x[0]])
    expected = np.repeat(model.restored(frames[-10:]).numpy() - SILENCE, HOP // WIDTH)
    np.testing.assert_allclose(made, expected, atol=1e-3)


def test_alone_and_in_company_are_the_same_bits_and_a_seed_chooses(fitted):
    model = built(fitted)
    asked = [Request(audio=tone(s), seed=seed, options=Options(seconds=made))
             for s, seed, made in ((0.4, 1, 0.8), (1.6, 2, 0.4), (0.4, 1, 0.8), (0.4, 3, 0.8))]
    engine = Engine(TINY, model, fitted, slots=3)
    company = drain(engine, *[engine.submit(request) for request in asked])
    for request, expected in zip(asked, company, strict=True):
        alone = Engine(TINY, model, fitted, slots=3)
        np.testing.assert_array_equal(drain(alone, alone.submit(request))[0], expected)
    np.testing.assert_array_equal(company[0], company[2])
    assert not np.array_equal(company[0], company[3])


def test_any_length_is_streamed_frame_by_frame_over_the_windows_end(fitted):
    engine = Engine(TINY, built(fitted), fitted)
    ticket = engine.submit(Request(audio=tone(3.0), options=Options(seconds=8.0)))
    first = engine.step()
    assert len(first) == 1 and not first[0].done
    [rest] = drain(engine, ticket)
    assert len(rest) + first[0].media.shape[1] == 8000 and np.isfinite(rest).all()


@pytest.mark.parametrize(("changes", "key"), [
    ({"flow": {"width": 0}}, "family.flow.width"), ({"flow": {"num_steps": 0}}, "num_steps"),
    ({"flow": {"history_noise": float("nan")}}, "family.flow.history_noise"), ({"head": "gan"}, "family.head"),
])
def test_bad_settings_are_named(changes, key):
    with pytest.raises(ValueError, match=key):
        dataclasses.replace(TINY, **{name: FlowHeadConfig(**value) if name == "flow" else value
                                     for name, value in changes.items()})


def test_a_context_too_short_and_an_option_of_the_other_head_are_named(fitted):
    with pytest.raises(ValueError, match="family.flow.context = 40 must hold two segments, which are 50"):
        dataclasses.replace(TINY, flow=dataclasses.replace(FLOW, context=40)).build(fitted)
    with pytest.raises(ValueError, match="temperature has no meaning"):
        dataclasses.replace(TINY, head="mse").prompt(Request(audio=tone(1.0), options=Options(temperature=0.5)))
    TINY.prompt(Request(audio=tone(1.0), options=Options(temperature=0.5, num_steps=4)))
