"""The instruct family: what rows become, sums that stay right, both kinds of conditions, and what it generates."""

import dataclasses
import re

import numpy as np
import pytest
import torch

from avray.engine import Engine
from avray.families.instruct import Instruct
from avray.families.instruct_sampler import Branch, Generation, branches_of
from avray.families.instruct_tasks import TASKS, parse_notes, parse_pitch, piano_roll
from avray.family import Fitted, Options, Request
from avray.media import Audio
from avray.nn.conditioning import AdapterConfig
from avray.nn.dit import DiTConfig
from avray.nn.flow import Walk
from avray.settings.trainer import TrainerSettings
from avray.train.memory import estimate
from tests.tiny_codec import HOP, RATE_HZ, SILENCE, WIDTH, TinyConfig

TINY = Instruct(TinyConfig(), segment_s=2.0, network=DiTConfig(width=16, num_layers=2, num_heads=2), text_layers=1,
                text_heads=2, num_steps=4, guidance_scale=3.0, aligned_guidance_scale=1.5)
ALL = dataclasses.replace(TINY, tasks=tuple(TASKS), adapter=AdapterConfig("cross_attention"))
NOTES = [{"pitch": "C4", "start_s": 0.0, "duration_s": 0.5}, {"pitch": "E4", "start_s": 0.5, "duration_s": 0.5}]


def make_row(index=0, frames=20, task="text_to_audio", weight=1.0, **fields):
    random = np.random.default_rng(index)
    latents = {name: (random.normal(size=(frames, WIDTH)) + SILENCE).astype(np.float16) for name in ("output", "sound")}
    row = {"id": f"row{index}", "weight": weight, "task": task, "instruction": TASKS[task].instruction,
           "output.latents": latents["output"], **fields}
    return row | ({"sound.latents": latents["sound"]} if "sound" in TASKS[task].takes else {})


def make_rows():
    return [make_row(0, 20, text="a bell at C4"), make_row(1, 9, text="noise"),
            make_row(2, 30, "text_to_music", text="two notes", notes=NOTES), make_row(3, 25, "singing", notes=NOTES),
            make_row(4, 17, "speech", text="hello"), make_row(5, 50, "enhancement")]


@pytest.fixture(scope="module")
def fitted():
    return ALL.fit(iter(make_rows()))


def built(family, fitted, seed=0):
    """With every weight away from 0."""
    model = family.build(fitted)
    generator = torch.Generator().manual_seed(seed)
    family.init(model, generator)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    return model.eval()


def losses(family, model, batch, seed=0):
    with torch.no_grad():
        sums = family.loss(model, batch, torch.Generator().manual_seed(seed))
    return {name: float(value) for name, value in sums.items()}


# Rows


def row(**fields):
    return {"id": "a", "audio": "/a.wav", "start_s": 0.0, "duration_s": 1.5, "group": "a", **fields}


def test_a_captioned_sound_is_one_example():
    [example] = TINY.segment([row(text=" a bell ")])
    assert example.units["output"].duration_s == 1.5 and example.fields["text"] == "a bell"
    assert TINY.refusal(row()) == "text is missing: task text_to_audio needs it."
    assert TINY.refusal(row(text="a" * 513)).startswith("its text has 513 bytes")
    assert TINY.refusal(row(task="speech")) is None and TINY.refusal(row(text="a bell")) is None
    assert TINY.refusal(row(text="a bell", duration_s=2.5)).startswith("it lasts 2.5 s, over family.segment_s = 2: ")
    assert not TINY.segment([row(text="a bell", task="speech")]), "of a task that this model does not learn"


def test_a_recording_to_be_enhanced_is_cut_into_pieces():
    examples = ALL.segment([row(task="enhancement", duration_s=4.1, target_audio="/clean.wav")])
    assert [example.units["output"].start_s for example in examples] == [0.0, 2.0]
    assert {unit.source for unit in examples[0].units.values()} == {"/a.wav", "/clean.wav"}


def test_each_version_of_a_piece_has_a_noise_of_its_own():
    noisy = row(task="enhancement", duration_s=4.1)
    family = dataclasses.replace(ALL, noisy_versions=3)
    examples = family.segment([noisy])
    assert len(examples) == len({example.id for example in examples}) == 6
    assert len({example.units["sound"].recipe for example in examples}) == 6
    assert {example.units["output"].recipe for example in examples} == {""}
    assert [example for example in examples if "~" not in example.id] == ALL.segment([noisy])
    assert len(family.segment([noisy | {"target_audio": "/clean.wav"}])) == 2, "which has its noise"
    assert len(family.segment([row(task="super_resolution")])) == 1


@pytest.mark.parametrize(("note", "reason"), [
    ({"pitch": "C4", "start_s": 1.6, "duration_s": 1}, r"notes\[1\] begins at 1.6 s, beyond the clip of 1.5 s"),
    ({"pitch": "H4", "start_s": 1, "duration_s": 1}, "pitch 'H4' is no note"),
    ({"pitch": "C4", "start_s": 1, "duration_s": 0}, "duration_s = 0"),
    ({"pitch": "C4", "start_s": float("nan"), "duration_s": 1}, "start_s = nan"),
    ({"start_s": 1, "duration_s": 1}, "neither a pitch nor a frequency"), ("C4", "is no mapping"),
])
def test_notes_that_are_none_name_their_row(note, reason):
    assert re.search(reason, ALL.refusal(row(task="singing", notes=[NOTES[0], note])))
    assert ALL.refusal(row(task="singing", notes=NOTES)) is None


def test_a_roll_holds_pitches_between_keys_and_glides():
    assert parse_pitch("A4") == 69 == parse_notes([{"hz": 440.0, "start_s": 0, "duration_s": 1}], "x")[0].midi
    roll = piano_roll(parse_notes([{"hz": 440 * 2 ** (0.5 / 12), "start_s": 0.2, "duration_s": 9},
                                   {"pitch": "C4", "to_pitch": "C5", "start_s": 0, "duration_s": 1}], "x"), 10, 10.0)
    assert roll[5, 69] == pytest.approx(0.5) == roll[5, 70] and roll[:2, 69].max() == 0
    assert roll[5, 66] == pytest.approx(1) and roll[[0, 2], 128].tolist() == [1, 1] and roll[:, 128].sum() == 2


@pytest.mark.parametrize(("changes", "key"), [
    ({"tasks": ("sing",)}, "family.tasks"), ({"tasks": ()}, "family.tasks"),
    ({"noisy_versions": 0}, "family.noisy_versions"), ({"segment_s": 0.0}, "family.segment_s"),
    ({"segment_s": float("inf")}, "family.segment_s"), ({"guidance_scale": float("nan")}, "guidance_scale"),
    ({"aligned_guidance_scale": -1.0}, "aligned_guidance_scale"), ({"text_heads": 3}, "family.text_heads"),
    ({"tasks": ("enhancement",), "adapter": AdapterConfig("prefix")}, "prefix .* task enhancement has not"),
])
def test_bad_settings_name_their_key(changes, key):
    with pytest.raises(ValueError, match=key):
        dataclasses.replace(TINY, **changes)


# Sums


def test_padding_rows_change_nothing(fitted):
    rows = make_rows()
    alone = ALL.collate(rows, fitted)
    lost = {"id": "", "weight": 0.0}
    padded = ALL.collate([*rows, lost, {**make_row(9, text="x"), "weight": 0.0}], fitted)
    assert padded.counts == alone.counts == {"flow": float((20 + 9 + 30 + 25 + 17 + 50) * WIDTH), "duration": 4.0}
    model = built(ALL, fitted)
    assert losses(ALL, model, padded) == pytest.approx(losses(ALL, model, alone, seed=5), rel=1e-5)
    for name, terms in ALL.baselines(alone, fitted).items():
        torch.testing.assert_close(ALL.baselines(padded, fitted)[name], terms)


def test_a_batch_of_nothing_but_padding_has_no_loss_and_finite_gradients(fitted):
    batch = ALL.collate([{"id": "", "weight": 0.0}] * 2, fitted)
    model = built(ALL, fitted).train()
    sum(ALL.loss(model, batch, torch.Generator()).values()).backward()
    assert batch.counts == {"flow": 0.0, "duration": 0.0}
    assert all(p.grad is None or torch.equal(p.grad, torch.zeros_like(p)) for p in model.parameters())


def test_a_new_model_loses_what_the_data_hold(fitted):
    """It foresees silence; where all is noise, nobody could do better."""
    noise = dataclasses.replace(ALL, level_mean=8.0)
    model = noise.build(fitted)
    noise.init(model, torch.Generator().manual_seed(0))
    batch = noise.collate(make_rows() * 20, fitted)
    assert losses(noise, model, batch)["flow"] / batch.counts["flow"] == pytest.approx(1.0, rel=0.05)
    guess = noise.baselines(batch, fitted)["best_linear"]
    assert float(guess["flow"]) / batch.counts["flow"] == pytest.approx(1.0, abs=0.01)
    assert float(guess["duration"]) > 0


def test_it_learns_one_batch(fitted):
    model = TINY.build(fitted)
    TINY.init(model, torch.Generator().manual_seed(0))
    batch = TINY.collate([make_row(index, 20, text="ab"[index]) for index in range(2)] * 4, fitted)
    optimiser = torch.optim.Adam(model.train().parameters(), 5e-3)
    begin = losses(TINY, model.eval(), batch)
    for step in range(150):
        optimiser.zero_grad()
        sums = TINY.loss(model.train(), batch, torch.Generator().manual_seed(step))
        (sums["flow"] / batch.counts["flow"] + 0.1 * sums["duration"] / batch.counts["duration"]).backward()
        optimiser.step()
    end = losses(TINY, model.eval(), batch)
    assert end["flow"] < 0.75 * begin["flow"] and end["duration"] < 0.05


def test_all_weights_that_a_task_uses_are_trained(fitted):
    model = built(ALL, fitted).train()
    sum(ALL.loss(model, ALL.collate(make_rows(), fitted), torch.Generator().manual_seed(1)).values()).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


# Guidance


def test_branches_take_conditions_in_turn():
    def weights(text, aligned, *has):
        made = branches_of(Generation(Walk(), text, aligned, None), *has)
        assert sum(branch.weight for branch in made) == pytest.approx(1)
        return [(branch.weight, branch.with_text, branch.with_aligned) for branch in made]

    assert weights(3, 2, True, True) == [(-1, False, False), (-1, False, True), (3, True, True)]
    assert weights(3, 3, True, True) == [(-2, False, False), (3, True, True)]
    assert weights(3, 1, True, True) == [(-2, False, True), (3, True, True)]
    assert weights(3, 2, True, False) == [(-2, False, False), (3, True, False)]
    assert weights(3, 2, False, True) == [(-1, False, False), (2, False, True)]
    assert weights(1, 1, True, True) == [(1, True, True)] and weights(0, 0, True, True) == [(1, False, False)]
    assert branches_of(Generation(Walk(), 3, 2, None), False, False) == [Branch(1.0, False, False)]


# Generation


def drain(engine, *tickets):
    pieces = {}
    while engine.busy:
        for output in engine.step():
            assert output.error is None, output.error
            pieces.setdefault(output.ticket, []).append(output.media)
    return [np.concatenate(pieces[ticket], 1)[0] for ticket in tickets]


def requests():
    sound = Audio(np.random.default_rng(0).normal(0, 0.1, (1, 800)).astype(np.float32), RATE_HZ)
    return [Request(text="a bell", seed=1), Request(text="a bell", seed=2, options=Options(seconds=0.4)),
            Request(text="two notes", task="text_to_music", fields={"notes": NOTES}, options=Options(num_steps=3)),
            Request(task="singing", fields={"notes": NOTES}), Request(text="hello", task="speech"),
            Request(audio=sound, task="enhancement"),
            Request(text="a bell", seed=1, options=Options(guidance_scale=1.0))]


def test_every_task_generates_the_same_bits_alone_and_in_company(fitted):
    model = built(ALL, fitted)
    together = Engine(ALL, model, fitted, slots=3)
    company = drain(together, *[together.submit(request) for request in requests()])
    for request, expected in zip(requests(), company, strict=True):
        single = Engine(ALL, model, fitted, slots=1)
        np.testing.assert_array_equal(drain(single, single.submit(request))[0], expected)
    assert len(company[1]) == 400 and len(company[2]) == len(company[3]) == 1000 and len(company[5]) == 800
    assert not np.array_equal(company[0], company[-1]), "guidance changes it"


def test_requests_come_and_go_at_every_solver_step(fitted):
    engine = Engine(ALL, built(ALL, fitted), fitted, slots=2)
    first = engine.submit(Request(text="a", seed=1))
    engine.step()
    second = engine.submit(Request(text="b", seed=2))
    engine.step()
    assert set(engine.sampler.busy) == {0, 1}
    engine.cancel(first)
    third = engine.submit(Request(text="c", seed=3))
    assert len(drain(engine, second, third)) == 2


@pytest.mark.parametrize("solver", ["euler", "midpoint", "heun"])
def test_what_is_worked_out_beforehand_is_what_a_plain_loop_gives(fitted, solver):
    """Classifier-free guidance of two conditions with the whole network at every step."""
    family = dataclasses.replace(ALL, solver=solver, rescale=0.5)
    model = built(family, fitted)
    engine = Engine(family, model, fitted)
    request = requests()[2]
    batch = family.collate([engine.row(request)], fitted)
    [frames] = drain(engine, engine.submit(request))
    with torch.no_grad():
        asked, number = model.ask(batch.tensors), len(frames) // HOP
        x = torch.randn(1, number, WIDTH, generator=torch.Generator().manual_seed(request.seed))

        def velocity(x, level):
            found = [model.network(x, torch.tensor([level]), model.condition(
                asked, batch.tensors, torch.tensor([number]), number, torch.tensor([text]), torch.tensor([aligned])))
                for text, aligned in ((False, False), (False, True), (True, True))]
            guided = found[0] + 1.5 * (found[1] - found[0]) + 3.0 * (found[2] - found[1])
            return guided * (0.5 + 0.5 * found[2].std() / guided.std())

        walk = Walk(3, solver)
        for index in range(3):
            x = walk.step(x, index, velocity)
    made = np.repeat(model.restored(x)[0].numpy() - SILENCE, HOP // WIDTH)
    np.testing.assert_allclose(frames, made, atol=1e-3)


def test_a_length_is_given_or_follows_or_is_foreseen(fitted):
    engine = Engine(ALL, built(ALL, fitted), fitted)
    foreseen, given, followed = drain(engine, *[engine.submit(requests()[i]) for i in (0, 1, 3)])
    assert len(given) == 400 and len(followed) == 1000 and 0 < len(foreseen) <= 2000


@pytest.mark.parametrize(("request_", "reason"), [
    (Request(), "text is missing: task text_to_audio needs it"),
    (Request(text="a", task="sing"), "task = sing is not one of this model's"),
    (Request(text="a", options=Options(guidance_scale=float("nan"))), "guidance_scale must be a number"),
    (Request(text="a", options=Options(aligned_guidance_scale=float("inf"))), "aligned_guidance_scale must be"),
    (Request(text="a", options=Options(seconds=0.0)), "seconds must be above 0 and at most 2"),
    (Request(text="a", options=Options(seconds=1e9)), "seconds must be above 0 and at most 2"),
    (Request(text="a", options=Options(num_steps=0)), "num_steps"),
    (Request(text="a", options=Options(temperature=1.0)), "temperature has no meaning"),
    (Request(text="a" * 600), "600 bytes, over family.max_text"),
    (Request(text="a", task="text_to_audio", fields={"notes": NOTES}), "notes has no meaning for task text_to_audio"),
    (Request(task="singing", fields={"notes": [{"pitch": "C4", "start_s": 3.0, "duration_s": 1}]}), "beyond the clip"),
    (Request(task="enhancement"), "audio is missing"),
    (Request(task="enhancement", audio=Audio(np.zeros((1, 9 * RATE_HZ), np.float32), RATE_HZ)), "audio holds 9 s"),
])
def test_a_bad_request_is_refused_by_name(fitted, request_, reason):
    with pytest.raises(ValueError, match=reason):
        ALL.prompt(request_)


def test_golden_output(fitted):
    """Figures of one seeded generation, to three digits: another torch may differ in the last bits."""
    [samples] = drain(engine := Engine(TINY, built(TINY, fitted), fitted), engine.submit(requests()[1]))
    figures = [float(samples.mean()), float(samples.std()), float(samples[0]), float(samples[-1])]
    assert figures == pytest.approx(GOLDEN, abs=2e-3)


GOLDEN = [-0.3076, 0.3962, -0.2233, 0.7121]


def test_its_memory_is_foreseen(fitted):
    """As a dry run does, on tensors without values."""
    assert estimate(ALL, fitted, ALL.collate(make_rows(), fitted), TrainerSettings()).activations > 0


def test_durations_are_judged(fitted):
    model, batch = built(ALL, fitted), ALL.collate(make_rows(), fitted)
    found = ALL.figures(model, batch, fitted)
    assert found["duration_within_10_percent"].count == 4 and found["duration_error_percent"].value() > 0
    assert ALL.figures(model, ALL.collate([make_row(3, 25, "singing", notes=NOTES)], fitted), fitted) == {}


def test_another_codec_is_refused(fitted):
    with pytest.raises(ValueError, match="ask for that one"):
        TINY.build(Fitted(fitted.arrays, {**fitted.data, "codec": "other"}))


@pytest.mark.parametrize(("choice", "parameters"), [
    ("instruct", 4_588_673), ("instruct_small", 211_052_034), ("instruct_base", 744_944_770),
    ("instruct_large", 1_550_148_354)])
def test_presets_have_the_sizes_they_say(choice, parameters):
    from avray.cli import TRAIN, compose
    from avray.registry import family_from_settings

    family = family_from_settings(compose(TRAIN, [f"family={choice}"]).family)
    data = {"codec": family.codec.column_id(), "width": 128, "frame_rate_hz": 75.0, "log_seconds": [0.0, 1.0]}
    with torch.device("meta"):
        model = family.build(Fitted({"mean": np.zeros(128, np.float32), "scale": np.ones(128, np.float32)}, data))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_a_model_made_without_weights_generates_once_it_has_them(fitted):
    model = built(ALL, fitted)
    with torch.device("meta"):
        empty = ALL.build(fitted)
    empty.load_state_dict(model.state_dict(), assign=True)
    ours, theirs = (Engine(ALL, one, fitted) for one in (model, empty.eval()))
    np.testing.assert_array_equal(*(drain(one, one.submit(requests()[5]))[0] for one in (ours, theirs)))


def test_figures_are_told_task_by_task():
    from avray.engine import Generated
    from avray.evaluation.evaluate import measure_by_task, task_table
    from avray.train.samples import Answer

    rng = np.random.default_rng(0)
    sounds = [Audio(rng.normal(0, 0.1, (1, 12_000)).astype(np.float32), 24_000) for _ in range(2)]
    answers = [Answer(task, None, sounds[0], Generated(sounds[1], 0, Options()), {"task": task})
               for task in ("enhancement", "singing", "enhancement")]
    tasks = measure_by_task(ALL, answers)
    assert tasks["enhancement"]["examples"] == 2 and set(tasks["singing"]) >= {"pitch_error_cents"}
    assert tasks["enhancement"]["si_sdr_db"] < -10
    lines = task_table(tasks).splitlines()
    assert lines[0].split() == ["enhancement", "singing"] and lines[1].split() == ["examples", "2", "1"]
    assert all(ALL.task_metrics(task) for task in TASKS)
