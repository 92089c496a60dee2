"""The model that listens: its sizes, its base untouched, learning to stop, its generator, long recordings."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from avray.checkpoint import Checkpoint, Content, save
from avray.encoders.tokens import Bytes, open_tokens, read_tokens
from avray.engine import Generator
from avray.errors import MissingDependency
from avray.families.audio_gpt2 import AudioGPT2
from avray.families.audio_gpt2_model import SlotCache
from avray.families.audio_gpt2_sampler import TextRenderer, Written, joined
from avray.families.audio_gpt2_step import GPT2Step
from avray.family import Options, Request
from avray.media import Audio
from avray.nn.augment import Augment, change_speed, hz_of, mel_of
from avray.nn.listening import Heard
from tests.tiny_codec import RATE_HZ, WIDTH, TinyConfig

WORDS = ("no", "yes", "go")
FRAMES = 10


def tiny(**settings):
    return AudioGPT2(**{"codec": TinyConfig(), "segment_s": 0.4, "overlap_s": 0.2, "context": 24, "width": 32,
                        "num_layers": 2, "num_heads": 2, "stem_layers": 1, "dropout": 0.0, **settings})


def rows_of(number, seed=0):
    """Each word is a channel that is louder than the rest."""
    random = np.random.default_rng(seed)
    rows = []
    for index in range(number):
        which = index % len(WORDS)
        frames = random.normal(0, 0.1, (FRAMES - index % 3, WIDTH)).astype(np.float32)
        frames[:, which] += 1
        rows.append({"id": f"row{index}", "weight": 1.0, "text": WORDS[which], "audio.features": frames})
    return rows


def built(family, seed=0):
    fitted = family.fit(iter(rows_of(12)))
    model = family.build(fitted)
    family.init(model, torch.Generator().manual_seed(seed))
    return model.eval(), fitted


def train(family, model, fitted, steps=60):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 3e-3)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for step in range(steps):
        batch = family.collate(rows_of(12, step), fitted)
        loss = family.loss(model, batch, generator)["text"] / batch.counts["text"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    return float(loss.detach())


def write_texts(family, model, fitted, requests, slots=2):
    """``(features, seed, options, prompt)`` each, through the sampler."""
    sampler, renderer = family.sampler(model, fitted, slots), family.renderer(fitted, "cpu")
    texts, waiting, running = {}, list(enumerate(requests)), {}
    with torch.inference_mode():
        while waiting or running:
            for slot in set(range(slots)) - set(running):
                if waiting:
                    index, (features, seed, options, prompt) = waiting.pop(0)
                    row = {"id": "x", "weight": 1.0, "text": prompt, "audio.features": features}
                    sampler.admit([slot], family.collate([row], fitted), [seed], [options])
                    running[slot] = (index, renderer.open())
                    texts[index] = ""
            for piece in sampler.step():
                index, render = running[piece.slot]
                texts[index] += render.push(piece.data, piece.done)
                if piece.done:
                    del running[piece.slot]
    return [texts[index] for index in range(len(requests))]


def test_the_originals_size():
    base = {"model_type": "gpt2", "n_embd": 1024, "n_layer": 24, "n_head": 16}
    family = tiny(listen="last", stem="linear")
    fitted = family.fit(iter(rows_of(3)))
    fitted = replace(fitted, data={**fitted.data, "base": base},
                     arrays={**fitted.arrays, "mean": np.zeros(768, np.float32), "scale": np.ones(768, np.float32)})
    with torch.device("meta"):
        model = family.build(fitted)
    assert sum(parameter.numel() for parameter in model.parameters()) == 359_811_072


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Tiny checkpoints with random weights, and a tokeniser, as transformers saves them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("bases")
    tokenizer = Tokenizer(models.WordLevel({"<end>": 0, "?": 1, **{word: i + 2 for i, word in enumerate(WORDS)}}, "?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", unk_token="?")
    sizes = {"gpt2": GPT2LMHeadModel(GPT2Config(vocab_size=8, n_positions=24, n_embd=16, n_layer=2, n_head=2,
                                                bos_token_id=0, eos_token_id=0)),
             "llama": LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=16, intermediate_size=32, eos_token_id=0,
                                                   num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
                                                   max_position_embeddings=24, bos_token_id=0))}
    for name, model in sizes.items():
        model.save_pretrained(folder / name)
        fast.save_pretrained(folder / name)
    return folder


def on(bases, name, **settings):
    return tiny(base=str(bases / name), tokenizer=str(bases / name), open_gates=False, **settings)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("adapt", ["all", "frozen", "lora"])
def test_step_0_is_the_base_to_the_bit(bases, name, adapt):
    from transformers import AutoModelForCausalLM

    family = on(bases, name, adapt=adapt)
    model, fitted = built(family)
    batch = family.collate(rows_of(3), fitted)
    with torch.no_grad():
        logits = model(batch["tokens"], batch["audio"], batch["frames"])
        base = AutoModelForCausalLM.from_pretrained(bases / name).eval()
        assert torch.equal(logits, base(batch["tokens"]).logits)
    before = {key: value.clone() for key, value in model.base.state_dict().items()}
    train(family, model, fitted, steps=3)
    same = all(torch.equal(before[key], value) for key, value in model.base.state_dict().items())
    assert same == (adapt != "all")
    with torch.no_grad():
        assert not torch.equal(logits, model(batch["tokens"], batch["audio"], batch["frames"]))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_checkpoint_needs_no_base_to_be_opened(bases, name, tmp_path, monkeypatch):
    family = on(bases, name)
    model, fitted = built(family)
    from avray.registry import family_settings

    monkeypatch.setattr("avray.codecs.codec_from_settings", lambda given: TinyConfig())
    settings = {**family_settings(family), "base": "/nowhere", "tokenizer": "/nowhere"}
    save(tmp_path, 1, Content(model=model.state_dict(), family=settings, fitted=fitted))
    assert Checkpoint.open(tmp_path / "last").step == 1
    again = Generator.open(tmp_path / "last")
    audio = Audio(np.random.default_rng(0).normal(0, 0.3, (1, 400)).astype(np.float32), RATE_HZ)
    assert again.generate(audio=audio, options=Options(max_tokens=4)).media \
        == write_texts(family, model, fitted, [(TinyConfig().load().encode_batch(audio.samples)[0], 0,
                                                Options(max_tokens=4), "")], slots=1)[0]


def test_it_learns_to_write_and_to_stop():
    family = tiny()
    model, fitted = built(family)
    train(family, model, fitted, steps=120)
    rows = rows_of(6, seed=99)
    assert write_texts(family, model, fitted, [(row["audio.features"], 0, Options(), "") for row in rows]) \
        == [row["text"] for row in rows]
    with torch.no_grad():
        batch = family.collate(rows, fitted)
        sums = family.loss(model, batch, torch.Generator())
    heard, alone = (float(sums[name]) / batch.counts[name] for name in ("per_word", "per_word_without_audio"))
    figures = family.figures(model, batch, fitted)
    for name, nats in (("perplexity_per_word", heard), ("perplexity_per_word_without_audio", alone)):
        assert figures[name].value() == pytest.approx(np.exp(nats), rel=1e-4)
    assert heard < 0.3 and 0.8 < alone < 2.0, "without sound it can only guess one of three words, log 3 nats"
    assert float(family.baselines(batch, fitted)["unigram"]["text"]) > float(sums["text"])


def test_a_text_is_gone_on_with_and_frames_beyond_the_end_do_not_matter():
    family = tiny()
    model, fitted = built(family)
    train(family, model, fitted)
    row = rows_of(2)[1]
    assert write_texts(family, model, fitted, [(row["audio.features"], 0, Options(), "y")]) == ["es"]
    short, long = family.collate([row], fitted), family.collate([row, rows_of(1)[0]], fitted)
    with torch.no_grad():
        alone = model(short["tokens"], short["audio"], short["frames"])
        padded = model(long["tokens"][:1], torch.nn.functional.pad(long["audio"][:1], (0, 0, 0, 5), value=9.0),
                       long["frames"][:1])
    torch.testing.assert_close(alone, padded[:, : alone.shape[1]], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [Options(), Options(temperature=1.0), Options(temperature=0.7, top_k=3, top_p=0.9)])
def test_alone_or_in_company_the_same(options):
    family = tiny()
    model, fitted = built(family)
    rows = rows_of(7, seed=3)
    options = replace(options, max_tokens=9)
    asked = [(row["audio.features"], index, options, "") for index, row in enumerate(rows)]
    together = write_texts(family, model, fitted, asked, slots=3)
    assert together == [write_texts(family, model, fitted, [one], slots=3)[0] for one in asked]


def test_cached_steps_are_the_forward_pass():
    family = tiny()
    model, fitted = built(family)
    row = rows_of(1)[0]
    greedy = write_texts(family, model, fitted, [(row["audio.features"], 0, Options(max_tokens=8), "")])[0]
    tokens = open_tokens(fitted.data["tokens"])
    ids = [tokens.end]
    with torch.no_grad():
        for _ in range(8):
            batch = family.collate([row], fitted)
            ids.append(int(model(torch.tensor([ids]), batch["audio"], batch["frames"])[0, -1].argmax()))
            if ids[-1] == tokens.end:
                break
    assert greedy == tokens.decode(ids[1:])


def test_beams_find_the_likeliest_text(bases):
    """With as many beams as there are texts, nothing is lost: all texts of two tokens and an end are scored."""
    family = on(bases, "gpt2")
    model, fitted = built(family)
    for listener in model.listeners:
        torch.nn.init.constant_(listener.gate, 2.0)
    for parameter in model.base.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(1))
    row = rows_of(1)[0]
    batch = family.collate([row], fitted)
    best, scores = None, {}
    with torch.no_grad():
        for length in range(3):
            for text in itertools.product(range(1, 8), repeat=length):
                ids = [0, *text]
                logs = torch.log_softmax(model(torch.tensor([ids]), batch["audio"], batch["frames"])[0], -1)
                nats = [float(logs[i, token]) for i, token in enumerate([*text, 0])]
                scores[text] = sum(nats) / len(nats)
    best = max(scores, key=scores.get)
    sampler = family.sampler(model, fitted, 1)
    sampler.admit([0], family.collate([{**row, "text": ""}], fitted), [0], [Options(beams=64, max_tokens=3)])
    pieces = []
    while not pieces:
        pieces = sampler.step()
    found = pieces[0].data.ids
    assert len(found) > 2 or tuple(found) == best


def test_a_long_recording_is_heard_in_windows():
    family = tiny(segment_s=0.4, overlap_s=0.2)
    model, fitted = built(family)
    sampler = family.sampler(model, fitted, 1)
    audio = torch.arange(27.0)[:, None].expand(27, WIDTH)
    assert [(int(w[0, 0]), len(w)) for w in sampler.windows(audio)] == [(0, 10), (5, 10), (10, 10), (15, 10), (17, 10)]
    assert [len(w) for w in sampler.windows(audio[:7])] == [7]
    train(family, model, fitted)
    frames = np.concatenate([rows_of(2)[1]["audio.features"][:8], rows_of(3)[2]["audio.features"][:8]])
    text, = write_texts(family, model, fitted, [(frames, 0, Options(), "")])
    assert text.startswith("yes") and text.endswith("go")


@pytest.mark.parametrize(("before", "text", "whole"), [
    ("one two three", "two three four", "one two three four"), ("one two", "Two. three", "one two three"),
    ("one two three", "wo three four", "one two three four"), ("one", "two", "one two"),
    ("one two", "one two", "one two"),
    ("a b a b", "a b c", "a b a b c"), ("one", "", "one")])
def test_what_two_windows_heard_is_written_once(before, text, whole):
    assert before + joined(before, text) == whole


def test_letters_come_out_whole():
    render = TextRenderer(Bytes()).open()
    ids = Bytes().encode("é!")
    assert [render.push(Written([i], ends=i == ids[-1]), i == ids[-1]) for i in ids] == ["", "é", "!"]


def test_tokens(bases):
    kept = read_tokens(str(bases / "gpt2"))
    tokens = open_tokens(kept)
    assert tokens.decode(tokens.encode("yes go")) == "yes go" and tokens.end == 0
    with pytest.raises(MissingDependency, match="is not on this machine"):
        read_tokens("nobody/nothing")


@pytest.mark.parametrize(("settings", "words"), [
    ({"adapt": "lora"}, "give family.base"), ({"listen": "loud"}, "family.listen"), ({"overlap_s": 0.4}, "overlap_s"),
    ({"width": 33}, "divide"), ({"beams": 4, "temperature": 1.0}, "beams"), ({"audio_dropout": 1.0}, "audio_dropout"),
    ({"augment": Augment(speed=0.1)}, "log-mel")])
def test_bad_settings_name_the_key(settings, words):
    with pytest.raises(ValueError, match=words):
        tiny(**settings)


def test_bad_requests():
    family = tiny()
    model, fitted = built(family)
    with pytest.raises(ValueError, match="audio is missing.*or a text"):
        family.prompt(Request())
    with pytest.raises(ValueError, match="audio is missing"):
        tiny(audio_dropout=0.0).prompt(Request(text="x"))
    with pytest.raises(ValueError, match="seconds has no meaning"):
        family.prompt(Request(audio=Audio(np.zeros((1, 9), np.float32), 9), options=Options(seconds=1)))
    with pytest.raises(ValueError, match="holds 23"):
        write_texts(family, model, fitted, [(rows_of(1)[0]["audio.features"], 0, Options(max_tokens=24), "")])
    with pytest.raises(ValueError, match="has 30 tokens"):
        family.collate([{**rows_of(1)[0], "text": "x" * 30}], fitted)
    with pytest.raises(MissingDependency, match=r"family\.base"):
        tiny(base="/nowhere").fit(iter(rows_of(1)))


def test_speed_moves_time_and_pitch():
    frames = torch.full((1, 100, 128), -10.0)
    band = int((mel_of(torch.tensor(2000.0)) / mel_of(torch.tensor(12_000.0)) * 129).round()) - 1
    frames[0, 40, band] = 0.0
    faster, lengths = change_speed(frames, torch.tensor([100]), torch.tensor([1.25]))
    assert int(lengths) == 80 and faster.shape == (1, 80, 128)
    time, at = divmod(int(faster[0].argmax()), 128)
    assert time == 32
    hz = hz_of((at + 1) * mel_of(torch.tensor(12_000.0)) / 129)
    assert float(hz) == pytest.approx(2500, rel=0.03)
    same, _ = change_speed(frames, torch.tensor([100]), torch.tensor([1.0]))
    torch.testing.assert_close(same, frames, atol=1e-3, rtol=0)


def test_augmentation_is_seeded_masks_padding_and_off_does_nothing():
    frames = torch.randn(3, 20, 128)
    lengths = torch.tensor([20, 12, 0])
    unchanged, same = Augment()(frames * (torch.arange(20) < lengths[:, None])[..., None], lengths, torch.Generator())
    assert torch.equal(unchanged, frames * (torch.arange(20) < lengths[:, None])[..., None]) and same is lengths
    augment = Augment(speed=0.1, noise_db=20, time_masks=1, frequency_masks=1, gain_db=6)
    one, two = (augment(frames, lengths, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(one[0], two[0]) and torch.isfinite(one[0]).all()
    for row, length in enumerate(one[1]):
        assert (one[0][row, int(length):] == 0).all()
    assert not torch.equal(one[0], augment(frames, lengths, torch.Generator().manual_seed(2))[0][:, : one[0].shape[1]])


@pytest.mark.parametrize("listen", ["gated", "last"])
@pytest.mark.parametrize("rows", [1, 3])
def test_the_lean_step_is_the_networks_own(listen, rows):
    """Against transformers' forward and the hooks, on prompts of several lengths and sounds, one of them absent."""
    family = tiny(listen=listen, listen_every=2 if listen == "gated" else 1)
    model, fitted = built(family)
    torch.nn.init.normal_(model.base.transformer.wpe.weight, std=0.3, generator=torch.Generator().manual_seed(2))
    lean = GPT2Step(model)
    caches = [SlotCache(model.base, rows, 24) for _ in range(2)]
    batch = family.collate(rows_of(rows), fitted)
    frames = batch["frames"].clone()
    if rows > 1:
        frames[1] = 0
    with torch.inference_mode():
        heard = model.hear(batch["audio"], frames)
        lean.listen(heard)
        at = [0] * rows
        for row in range(1, rows):
            at[row] = 2 * row
            for cache in caches:
                own = [Heard(*(part[row : row + 1] for part in vars(one).values())) for one in heard]
                with model.listening(own):
                    cache.prefill(model.base, row, torch.arange(2 * row))
        for step in range(5):
            tokens = torch.arange(rows) * 7 + step
            with model.listening(heard):
                expected = caches[0].step(model.base, tokens, at)
            torch.testing.assert_close(lean(caches[1], tokens, at), expected, atol=1e-5, rtol=1e-4)
            at = [place + 1 for place in at]
