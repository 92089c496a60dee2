"""The five-task model: the original's size, what a row may hold, what can be drawn, its generator, its figures."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from avray.checkpoint import Content, save
from avray.cli import GENERATE, compose
from avray.codecs import clip_dct
from avray.codecs.spectral import Spectral
from avray.data.demo_tasks import audio_prompts, clip, task_rows, tone, video_prompts
from avray.data.demo_video import draw_clip
from avray.encoders.tokens import open_tokens, read_characters
from avray.engine import Engine, Generator
from avray.families.multitask import Multitask, TaskWeights
from avray.families.multitask_figures import Retrieval
from avray.families.multitask_losses import LENGTH_GROUPS, alike, hidden_states
from avray.families.multitask_model import TASKS, gaussian_flow_loss
from avray.family import Options, Request
from avray.generation.one import generate
from avray.media import Audio, Video, probe_video
from avray.registry import family_settings
from tests.tiny_codec import RATE_HZ, WIDTH, TinyConfig

PROMPTS = {"text": "say aa", "code": "add b", "image": "draw cc", "audio": "play low", "video": "show up"}


def tiny(**settings):
    return Multitask(**{"codec": TinyConfig(), "audio_width": WIDTH, "video_width": 256, "width": 32, "num_layers": 1,
                        "num_heads": 2, "context": 32, "segment_s": 0.4, "temperature": 0.0, **settings})


def rows_of(number=10, vectors=1, seed=0):
    """The tasks in turn; each has one prompt, so that its answer can be learnt by heart."""
    random = np.random.default_rng(seed)
    rows = []
    for index in range(number):
        task = TASKS[index % len(TASKS)]
        row = {"id": f"row{index}", "weight": 1.0, "task": task, "prompt": PROMPTS[task]}
        if task in ("audio", "video"):
            width = WIDTH if task == "audio" else 256
            wave = np.sin(np.arange(width) + np.arange(vectors)[:, None])
            row["embedding"] = (wave + random.normal(0, 0.01, wave.shape)).tolist()
        else:
            row["output"] = PROMPTS[task][::-1]
        rows.append(row)
    return rows


def built(family, rows=None, seed=0):
    fitted = family.fit(iter(rows or rows_of()))
    model = family.build(fitted)
    family.init(model, torch.Generator().manual_seed(seed))
    return model.eval(), fitted


def train(family, model, fitted, rows, steps=150, lr=5e-3):
    optimizer = torch.optim.AdamW(model.parameters(), lr)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(steps):
        batch = family.collate(rows, fitted)
        losses = family.loss(model, batch, generator)
        total = sum(losses[name] / batch.counts[name] for name in losses if batch.counts[name])
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    model.eval()
    return {name: float(losses[name].detach()) / batch.counts[name] for name in losses if batch.counts[name]}


def engine(family, model, fitted, slots=2):
    return Generator(Engine(family, model, fitted, slots))


# The model

@pytest.mark.parametrize("num_characters", [65, 96])
def test_the_originals_size(num_characters):
    """Without a task that is embedded there is nothing but the transformer."""
    family = Multitask(TinyConfig(), task="text")
    text = "".join(chr(33 + index) for index in range(num_characters))
    fitted = family.fit(iter([{"id": "a", "weight": 1.0, "task": "text", "prompt": text, "output": "!"}]))
    ids = num_characters + 2 + len(TASKS)  # the end, an unseen character, the tasks
    assert sum(parameter.numel() for parameter in family.build(fitted).parameters()) == 199_296 + 129 * ids


def test_no_task_and_no_unseen_character_can_be_drawn():
    family = tiny()
    model, fitted = built(family)
    tokens = open_tokens(fitted.data["tokens"])
    batch = family.collate(rows_of(5), fitted)
    logits = model.text_logits(hidden_states(model, batch))
    assert logits.shape[-1] == tokens.end + 1 == tokens.size - 1
    first = batch["tokens"][:, 0].tolist()
    assert first == [tokens.size + index for index in range(5)] and min(first) >= logits.shape[-1]


def test_only_the_answer_is_scored_and_padding_changes_nothing():
    family = tiny()
    model, fitted = built(family)
    rows = rows_of(5)
    batch = family.collate(rows, fitted)
    assert batch.counts["text"] == len("say aa") + 1 and (batch["targets"] >= 0).sum() == sum(
        len(PROMPTS[task]) + 1 for task in ("text", "code", "image"))
    padding = {"id": "", "weight": 0.0}
    alone = [family.collate([row, padding], fitted) for row in rows]
    generator = torch.Generator()
    together = family.loss(model, batch, generator)
    for name in family.terms:
        apart = sum(float(family.loss(model, one, generator)[name].detach()) for one in alone)
        assert float(together[name].detach()) == pytest.approx(apart, rel=1e-4)
        assert batch.counts[name] == sum(one.counts[name] for one in alone)


@pytest.mark.parametrize("needed", [[5], [3, 3, 3], [9, 1, 5, 5, 1, 9, 2], [*range(40, 0, -1)], []])
def test_rows_of_like_length_go_together(needed):
    groups = alike(needed)
    assert len(groups) == LENGTH_GROUPS and sorted(np.concatenate(groups).tolist()) == [*range(len(needed))]
    steps = sum(len(group) * max(needed[row] for row in group) for group in groups if len(group))
    ordered = np.sort(np.array(needed, int))
    equal = sum(len(part) * part.max() for part in np.array_split(ordered, LENGTH_GROUPS) if len(part))
    assert sum(needed) <= steps <= equal


@pytest.mark.parametrize("head", ["mse", "flow"])
def test_each_task_is_learnt_and_generated(head):
    family = tiny(head=head)
    rows = rows_of()
    model, fitted = built(family, rows)
    lost = train(family, model, fitted, rows)
    simple = family.baselines(family.collate(rows, fitted), fitted)["simple"]
    counts = family.collate(rows, fitted).counts
    for task in ("text", "code", "image"):
        assert lost[task] < 0.2 < float(simple[task]) / counts[task]
    generator = engine(family, model, fitted)
    for task in ("text", "code", "image"):
        assert generator.generate(PROMPTS[task], task=task).media == PROMPTS[task][::-1]
    sound = generator.generate(PROMPTS["audio"], task="audio", seconds=0.4).media
    clip_made = generator.generate(PROMPTS["video"], task="video").media
    assert isinstance(sound, Audio) and sound.samples.shape == (1, round(0.4 * RATE_HZ))
    assert isinstance(clip_made, Video) and clip_made.frames.shape == (20, 64, 64, 3)
    [numbers] = generator.generate_many([Request(PROMPTS["audio"], task="audio", fields={"embedding": True})])
    made = json.loads(numbers.media)
    assert made["task"] == "audio"
    np.testing.assert_allclose(made["embedding"], np.sin(np.arange(WIDTH)), atol=0.15)


def test_sequences_of_vectors_end_where_they_learnt_to():
    family = tiny(vector_s=0.1)
    rows = [row for row in rows_of(10, vectors=3) if row["task"] == "audio"]
    family = replace(family, task="audio")
    model, fitted = built(family, rows)
    lost = train(family, model, fitted, rows, 200)
    assert lost["audio_end"] < 0.1
    generator = engine(family, model, fitted)
    [result] = generator.generate_many([Request("play low", fields={"embedding": True})])
    vectors = np.array(json.loads(result.media)["embedding"])
    assert vectors.shape == (3, WIDTH)
    np.testing.assert_allclose(vectors, np.sin(np.arange(WIDTH) + np.arange(3)[:, None]), atol=0.2)
    assert len(list(generator.stream("play low"))) == 3
    assert generator.generate("play low").media.seconds == pytest.approx(3 * 0.08)  # 0.1 s is 2 frames of 0.04 s
    assert generator.generate("play low", options=Options(max_tokens=2)).media.seconds == pytest.approx(2 * 0.08)


def test_a_flow_draws_by_its_seed_and_the_mean_does_not():
    for head, differs in (("flow", True), ("mse", False)):
        family = tiny(head=head, temperature=1.0)
        model, fitted = built(family)
        train(family, model, fitted, rows_of(), 10)
        generator = engine(family, model, fitted)
        first, again, other = (generator.generate("play low", task="audio", seed=seed).media.samples
                               for seed in (1, 1, 2))
        assert np.array_equal(first, again) and np.array_equal(first, other) != differs


def test_a_request_is_the_same_alone_and_in_company():
    family = tiny(head="flow", temperature=0.9)
    model, fitted = built(family)
    generator = engine(family, model, fitted, slots=3)
    requests = [Request(PROMPTS[task], task=task, seed=index) for index, task in enumerate(TASKS)]
    together = [result.media for result in generator.generate_many(requests)]
    for request, media in zip(requests, together, strict=True):
        [alone] = generator.generate_many([request])
        if isinstance(media, str):
            assert alone.media == media
        else:
            name = "samples" if isinstance(media, Audio) else "frames"
            assert np.array_equal(getattr(alone.media, name), getattr(media, name))


def test_streams_joined_are_the_whole():
    family = tiny(vector_s=0.1, temperature=0.9)
    model, fitted = built(family, rows_of(vectors=3))
    generator = engine(family, model, fitted)
    for task in TASKS:
        options = Options(max_tokens=6)
        whole = generator.generate(PROMPTS[task], task=task, options=options, seed=3).media
        pieces = list(generator.stream(PROMPTS[task], task=task, options=options, seed=3))
        if isinstance(whole, str):
            assert "".join(pieces) == whole
        else:
            name, axis = ("samples", 1) if isinstance(whole, Audio) else ("frames", 0)
            joined = np.concatenate([getattr(piece, name) for piece in pieces], axis)
            assert np.array_equal(joined, getattr(whole, name))


@pytest.mark.parametrize("vector_s", [None, 0.1])
def test_a_clip_with_the_sound_of_the_same_prompt(vector_s):
    family = tiny(vector_s=vector_s, head="flow", temperature=0.9, segment_s=2.0)
    model, fitted = built(family, rows_of(vectors=1 if vector_s is None else 3))
    for head in model.heads.values() if vector_s else ():
        head.end.bias.data.fill_(-9.0)
    generator = engine(family, model, fitted)
    options = Options(max_tokens=2)
    asked = Request(PROMPTS["video"], task="video", options=options, seed=4, fields={"sound": True})
    silent = generator.generate(PROMPTS["video"], task="video", options=options, seed=4).media
    [result] = generator.generate_many([asked])
    made = result.media
    assert silent.audio is None and np.array_equal(made.frames, silent.frames)
    assert made.audio.seconds == len(made.frames) / made.frame_rate_hz == (2.0 if vector_s is None else 4.0)
    alone = generator.generate(PROMPTS["video"], task="audio", seed=4, options=options if vector_s is None else
                               Options(max_tokens=40), seconds=2.0 if vector_s is None else None).media.samples
    number = min(alone.shape[1], made.audio.samples.shape[1])
    assert np.array_equal(made.audio.samples[:, :number], alone[:, :number])
    assert not made.audio.samples[:, number:].any()
    pieces = list(generator.stream_request(asked))
    assert np.array_equal(np.concatenate([piece.audio.samples for piece in pieces], 1), made.audio.samples)
    both = generator.generate_many([asked, Request(PROMPTS["text"], task="text", seed=1, options=options)])
    assert np.array_equal(both[0].media.audio.samples, made.audio.samples)


def test_golden_output():
    """What this seed has always given; a change here changes what every checkpoint generates."""
    family = tiny(temperature=1.0)
    model, fitted = built(family, seed=5)
    generator = engine(family, model, fitted)
    assert generator.generate("say aa", task="text", options=Options(max_tokens=8), seed=5).media == GOLDEN_TEXT
    [result] = generator.generate_many([Request("play low", task="audio", seed=5, fields={"embedding": True})])
    np.testing.assert_allclose(json.loads(result.media)["embedding"][:3], GOLDEN_NUMBERS, atol=1e-3)


def test_scales_are_kept_and_undone():
    family = tiny()
    model, fitted = built(family)
    batch = family.collate(rows_of(), fitted)
    assert float(batch["audio"].abs().max()) <= 1 + 1e-6
    plain = model.unscale("audio", batch["audio"])[0, 0].numpy()
    np.testing.assert_allclose(plain, rows_of()[3]["embedding"][0], atol=1e-5)


# Rows and requests

@pytest.mark.parametrize(("row", "reason"), [
    ({"task": "audio", "instruction": "a", "embedding": [0.0] * 6}, "the embedding has 6 numbers, and audio has 8"),
    ({"task": "audio", "instruction": "a", "embedding": [float("nan")] * WIDTH}, "not finite"),
    ({"task": "audio", "instruction": "a", "embedding": ["1"] * WIDTH}, "must be a list of numbers"),
    ({"task": "audio", "instruction": "a", "embedding": [[0.0] * WIDTH] * 2}, "set family.vector_s"),
    ({"instruction": "a", "output": "b"}, "the task is missing"),
    ({"task": "smell", "instruction": "a", "output": "b"}, "task 'smell' is not known"),
    ({"task": "text", "instruction": "a", "output": " "}, "the output is empty"),
    ({"task": "video", "instruction": "a"}, "neither an embedding nor a video file"),
    ({"task": "text", "instruction": "a" * 40, "output": "b"}, "it has 42 tokens, .* family.context = 32"),
])
def test_rows_that_cannot_be_used_say_why(row, reason):
    assert re.search(reason, tiny().refusal({"id": "a", **row}))


def test_rows_of_every_kind_become_examples():
    family = tiny()
    rows = [{"id": "plain", "text": "a line"}, {"id": "song", "audio": "/a.wav", "duration_s": 1.0, "text": "a song"},
            {"id": "film", "task": "video", "instruction": "show", "input": "up", "video": "/a.mp4", "duration_s": 5.0},
            {"id": "seed", "task": "audio", "instruction": "Play", "input": "low", "output": "for people",
             "embedding": [0.5] * WIDTH}]
    examples = family.segment(rows)
    assert [(example.id, example.fields["task"], example.fields["prompt"]) for example in examples] == [
        ("plain", "text", ""), ("song@0.000", "audio", "a song"), ("song@0.400", "audio", "a song"),
        ("film@0.000", "video", "show up"), ("film@2.000", "video", "show up"), ("seed", "audio", "Play low")]
    assert "output" not in examples[-1].fields
    assert {example.fields["task"] for example in replace(family, task="audio").segment(rows)} == {"audio"}
    weights = TaskWeights(text=0.0, video=2.0)
    family = replace(family, task_weights=weights)
    assert len(family.segment(rows)) == 5 and family.terms["video"] == 2.0 and "text" not in family.terms


@pytest.mark.parametrize(("request_", "reason"), [
    (Request("say", task="smell"), "task 'smell' is none of this model's"),
    (Request("say"), "task is missing"),
    (Request("say é", task="text"), "prompt holds 'é'"),
    (Request("a" * 40, task="text"), "prompt has 41 tokens"),
    (Request(None, task="audio"), "prompt is missing"),
    (Request("a", task="text", options=Options(seconds=1.0)), "seconds has no meaning"),
    (Request("a", task="text", fields={"embedding": True}), "embedding has no meaning for task text"),
    (Request("a", task="audio", options=Options(num_steps=4)), "num_steps has no meaning"),
    (Request("a", task="audio", fields={"sound": True}), "sound has no meaning"),
])
def test_requests_that_cannot_be_answered_say_why(request_, reason):
    family = tiny()
    model, fitted = built(family)
    with pytest.raises(ValueError, match=reason):
        engine(family, model, fitted).generate_many([request_])


def test_unseen_characters_of_held_out_rows_are_marked_and_not_scored():
    family = tiny()
    model, fitted = built(family)
    row = {"id": "a", "weight": 1.0, "task": "text", "prompt": "é", "output": "éa"}
    batch = family.collate([row], fitted)
    assert batch.counts["text"] == 2  # a and the end
    assert torch.isfinite(family.loss(model, batch, torch.Generator())["text"])
    assert torch.isfinite(family.baselines(batch, fitted)["simple"]["text"])
    assert open_tokens(read_characters(["ab"])).decode([0, 1, 3, 2]) == "ab"


# Figures

def test_retrieval_counts_what_is_nearer():
    targets = np.eye(6)
    guesses = targets.copy()
    guesses[0] = targets[1]
    metric = Retrieval(1)
    for guess, target in zip(guesses, targets, strict=True):
        metric.merge(Retrieval(1, [guess], [target]))
    assert metric.value() == pytest.approx(5 / 6)
    assert Retrieval(5, list(guesses), list(targets)).value() == 1.0


def test_figures_of_every_task():
    family = tiny()
    rows = rows_of()
    model, fitted = built(family, rows)
    before = {name: figure.value() for name, figure in
              family.figures(model, family.collate(rows, fitted), fitted).items()}
    train(family, model, fitted, rows)
    after = {name: figure.value() for name, figure in
             family.figures(model, family.collate(rows, fitted), fitted).items()}
    assert before.keys() == after.keys() and {f"{task}_perplexity" for task in TASKS[:3]} <= after.keys()
    assert after["text_accuracy"] == 1.0 and after["text_perplexity"] < 1.2 < before["text_perplexity"]
    for name in ("mse", "cosine", "retrieval_top_1", "retrieval_top_5"):
        assert {f"audio_{name}", f"video_mean_embedding_{name}"} <= after.keys()
    assert after["video_cosine"] > before["video_cosine"]


def test_the_gaussian_baseline_is_what_the_best_affine_guess_loses():
    random = np.random.default_rng(0)
    deviation = np.array([0.3, 1.0])
    x, noise = random.normal(0, deviation, (200_000, 2)), random.normal(0, 1, (200_000, 2))
    time = random.uniform(0, 1, (200_000, 1))
    noisy, velocity = (1 - time) * x + time * noise, noise - x
    slope = (time - (1 - time) * deviation**2) / ((1 - time) ** 2 * deviation**2 + time**2)
    assert gaussian_flow_loss(deviation) == pytest.approx(((velocity - slope * noisy) ** 2).sum(1).mean(), rel=0.02)


# The demo set

def test_the_dct_of_a_clip_shows_what_moved_where():
    clip_frames = draw_clip(clip("large", "red", "circle", "left", "dark"))
    numbers = clip_dct.encode_clip(clip_frames)
    back = clip_dct.decode_clip(numbers)
    assert back.shape == clip_frames.shape and numbers.shape == (256,)
    bright = np.abs(back.astype(float) - np.median(back, (0, 1, 2))).sum(-1)
    centres = (bright.sum(1) * np.arange(64)).sum(-1) / bright.sum((1, 2))
    assert centres[0] > centres[-1] + 10
    np.testing.assert_allclose(clip_dct.encode_clip(back), numbers, atol=0.03)


def test_held_out_prompts_are_new_combinations_of_known_words():
    rows = task_rows()
    for task, size in (("audio", 128), ("video", 256)):
        mine = [row for row in rows if row["task"] == task]
        train_, held = ([row["input"] for row in mine if row["split"] == split] for split in ("train", "validation"))
        assert not set(train_) & set(held) and len(held) == len(mine) // 5
        assert set(" ".join(held).split()) <= set(" ".join(train_).split())
        assert all(len(row["embedding"]) == size for row in mine)
    assert len(list(audio_prompts())) == 200 and len(list(video_prompts())) == 240
    family = Multitask(TinyConfig(), audio_width=128)
    assert not [reason for row in rows if (reason := family.refusal(row))]
    assert np.abs(tone("soft", "organ", 60)).max() == pytest.approx(0.1, rel=1e-5)


# Checkpoints

def test_a_checkpoint_generates_what_the_model_did(tmp_path):
    family = Multitask(Spectral(), width=32, num_layers=1, num_heads=2, segment_s=0.4, head="flow")
    rows = [row | ({"embedding": [[0.1 * index] * 128]} if row["task"] == "audio" else {})
            for index, row in enumerate(rows_of())]
    model, fitted = built(family, rows)
    save(tmp_path / "run", 1, Content(model=model.state_dict(), family=family_settings(family), fitted=fitted))
    want = engine(family, model, fitted).generate("play low", task="audio", seed=1).media
    have = Generator.open(tmp_path / "run").generate("play low", task="audio", seed=1).media
    assert want.sample_rate_hz == have.sample_rate_hz == 24_000
    np.testing.assert_allclose(have.samples, want.samples, atol=1e-4)


def test_what_is_written_while_it_is_made_is_what_is_written_whole(tmp_path, capsys):
    family = Multitask(Spectral(), width=32, num_layers=1, num_heads=2, vector_s=0.4, context=32, head="flow")
    rows = [row | ({"embedding": [[-4.0 + index] * 128] * 2} if row["task"] == "audio" else {})
            for index, row in enumerate(rows_of())]
    model, fitted = built(family, rows)
    save(tmp_path / "run", 1, Content(model=model.state_dict(), family=family_settings(family), fitted=fitted))
    made = {}
    for stream in ("false", "true"):
        for task, suffix in (("audio", "wav"), ("video", "mp4"), ("text", "txt")):
            path = tmp_path / f"{stream}.{suffix}"
            said = generate(compose(GENERATE, [f"checkpoint={tmp_path / 'run'}", f"task={task}", "prompt=play low",
                                               "count=3", f"stream={stream}", f"output={path}",
                                               f"sound={str(task == 'video').lower()}"]))
            assert said.startswith(str(path)) and said.endswith("seed 0")
            made[stream, suffix] = path
    assert made["false", "wav"].read_bytes() == made["true", "wav"].read_bytes()
    assert made["false", "txt"].read_text() == made["true", "txt"].read_text()
    whole, streamed = (probe_video(str(made[stream, "mp4"])) for stream in ("false", "true"))
    assert whole.num_frames == streamed.num_frames and whole.has_audio and streamed.has_audio
    said = generate(compose(GENERATE, [f"checkpoint={tmp_path / 'run'}", "task=text", "prompt=say aa", "count=3",
                                       "stream=true"]))
    assert f"{len(capsys.readouterr().out)} characters" in said
    for wrong, reason in (("output=a.mp3", "written as .wav"), ("include_prompt=true", "leave include_prompt out")):
        with pytest.raises(ValueError, match=reason):
            generate(compose(GENERATE, [f"checkpoint={tmp_path / 'run'}", "task=audio", "prompt=play low",
                                        "stream=true", wrong]))


GOLDEN_TEXT = "dp"
GOLDEN_NUMBERS = [5e-05, 0.841649, 0.899889]
