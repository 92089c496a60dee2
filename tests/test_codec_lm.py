"""The codec language model on a codec made here: windows, masks, conditioning, baselines, and its generator."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
import torch

from avray import cli
from avray.codecs.spectral import Spectral
from avray.codecs.together import decode
from avray.engine import Engine, Generator
from avray.families.codec_lm import CodecLM, codec_state, without_text
from avray.family import Family, Fitted, Options, Request
from avray.media import Audio
from avray.nn.patterns import Delay, Flatten, Parallel
from avray.registry import family_from_settings

FRAME_S, HOP, WIDTH = 0.1, 100, 3


@dataclass(frozen=True)
class ToyCodec:
    """10 frames of 100 samples a second; a code is a bin of a latent channel, its edges fitted if ``needs_fit``."""

    cardinality: int = 8
    needs_fit: bool = False
    name: str = "toy"

    def column_id(self):
        return f"toy{self.cardinality}"

    def fit(self, latents, seed=0):
        quantiles = np.quantile(latents, np.linspace(0, 1, self.cardinality + 1)[1:-1])
        return Fitted({"edges": quantiles.astype(np.float32)}, {"fitted": True})

    def load(self, device="cpu", fitted=None):
        edges = fitted.arrays["edges"] if self.needs_fit else np.linspace(-1, 1, self.cardinality + 1)[1:-1]
        return LoadedToy(self.cardinality, torch.tensor(edges, dtype=torch.float32))


@dataclass
class LoadedToy:
    cardinality: int
    edges: torch.Tensor
    sample_rate_hz = 1000
    frame_rate_hz = 10.0
    hop_samples = HOP
    width = num_codebooks = WIDTH

    def to_codes(self, latents, num_codebooks=None):
        return torch.bucketize(latents, self.edges)[:, :num_codebooks]

    def from_codes(self, codes):
        return codes.float() / self.cardinality

    def decoder(self):
        return ToyDecoder()


class ToyDecoder:
    """Holds back its last frame, as a network with look-ahead would."""

    def __init__(self):
        self.held = np.zeros((0, WIDTH), np.float32)

    def push(self, piece):
        frames = np.concatenate([self.held, np.pad(piece, ((0, 0), (0, WIDTH - piece.shape[1])))])
        self.held = frames[-1:]
        return np.repeat(frames[:-1, 0], HOP)

    def finish(self):
        return np.repeat(self.held[:, 0], HOP)


def tiny(**settings) -> CodecLM:
    return CodecLM(**{"codec": ToyCodec(), "num_codebooks": 3, "segment_s": 1.0, "context": 64, "width": 32,
                      "num_layers": 2, "num_heads": 2} | settings)


def walk(num_frames: int, seed: int = 0) -> np.ndarray:
    """Codes in which each follows from the one before: codebook k is codebook 0 plus k, which walks up by 0 or 1."""
    steps = np.random.default_rng(seed).integers(0, 2, num_frames).cumsum()
    return ((steps[:, None] + np.arange(3)) % 8).astype(np.uint16)


def rows_of(num: int = 20, num_frames: int = 10, **more) -> list[dict]:
    return [{"id": str(i), "weight": 1.0, "text": "", "ends": False, "audio.codes": walk(num_frames, i)} | more
            for i in range(num)]


def built(family: CodecLM, seed: int = 0):
    fitted = family.fit(iter(rows_of()))
    model = family.build(fitted)
    family.init(model, torch.Generator().manual_seed(seed))
    return model.eval(), fitted


def nats(family, model, rows, fitted) -> float:
    batch = family.collate(rows, fitted)
    with torch.no_grad():
        return float(family.loss(model, batch, torch.Generator())["ce"]) / batch.counts["ce"]


def train(family, model, rows, fitted, steps=150, lr=3e-3) -> None:
    batch, generator = family.collate(rows, fitted), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    model.train()
    for _ in range(steps):
        loss = family.loss(model, batch, generator)["ce"] / batch.counts["ce"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()


@cache
def trained(pattern):
    """A model of the walk, for each pattern once."""
    family = tiny(pattern=pattern)
    model, fitted = built(family)
    train(family, model, rows_of(24), fitted)
    return family, model, fitted


def generate(family, model, fitted, requests: list[tuple[dict, int, Options]], slots: int = 2) -> list[np.ndarray]:
    """The codes of each (row, seed, options), all admitted at once."""
    sampler = family.sampler(model, fitted, slots)
    rows, seeds, options = zip(*requests, strict=True)
    sampler.admit(range(len(rows)), family.collate(list(rows), fitted), seeds, options)
    pieces = {slot: [] for slot in range(len(rows))}
    open_slots = set(pieces)
    while open_slots:
        for piece in sampler.step():
            pieces[piece.slot].append(piece.data)
            open_slots -= {piece.slot} if piece.done else set()
    return [np.concatenate(pieces[slot]) for slot in range(len(rows))]


PATTERNS = [Flatten(), Flatten(offsets=False), Delay(), Delay(by=2), Parallel()]
patterns = pytest.mark.parametrize("pattern", PATTERNS, ids=str)


# Windows

def test_is_a_family():
    assert isinstance(tiny(), Family)


def test_consecutive_windows_and_a_remainder():
    row = {"id": "a", "audio": "a.wav", "start_s": 2.0, "duration_s": 3.7}
    examples = tiny().segment([row])
    spans = [(e.units["audio"].start_s, round(e.units["audio"].duration_s, 6), e.fields["ends"]) for e in examples]
    assert spans == [(2.0, 1.0, False), (3.0, 1.0, False), (4.0, 1.0, False), (5.0, 0.7, True)]
    assert len({e.id for e in examples}) == 4
    assert len(tiny().segment([row | {"duration_s": 3.4}])) == 3
    assert [round(e.units["audio"].duration_s, 6) for e in tiny().segment([row | {"duration_s": 0.4}])] == [0.4]
    assert tiny().segment([row | {"duration_s": 0.09}]) == []


def test_windows_of_a_very_long_recording_have_names_of_their_own():
    examples = tiny().segment([{"id": "a", "audio": "a.wav", "start_s": 0.0, "duration_s": 200_000.0}])
    assert len({e.id for e in examples}) == len(examples) == 200_000


def test_a_transcript_belongs_to_the_beginning_a_caption_to_every_window():
    row = {"id": "a", "audio": "a.wav", "start_s": 0.0, "duration_s": 3.0, "text": "hello"}
    assert len(tiny(text="caption").segment([row])) == 3
    assert len(tiny(text="transcript").segment([row])) == 1
    assert tiny(text="transcript").segment([row | {"text": None}]) == []
    with pytest.raises(ValueError, match="text_bytes = 4"):
        tiny(text="caption", text_bytes=4).segment([row])


def test_a_codec_without_codes_is_fitted_first():
    family = tiny(codec=ToyCodec(needs_fit=True))
    assert [c.name for c in family.columns(None)] == ["latents"]
    latents = [np.random.default_rng(i).normal(size=(10, WIDTH)).astype(np.float16) for i in range(5)]
    fitted = family.fit({"audio.latents": sample} for sample in [*latents, None])
    column, = family.columns(fitted)
    assert (column.name, column.dtype) == ("codes", "uint16")
    assert set(codec_state(fitted).arrays) == {"edges"}
    assert codec_state(fitted).data == {"fitted": True}
    assert family.build(fitted) is not None


# Loss

@patterns
def test_padding_and_weights_change_nothing(pattern):
    family = tiny(pattern=pattern)
    model, fitted = built(family)
    rows = rows_of(3)
    rows[1]["audio.codes"] = rows[1]["audio.codes"][:6]
    parts = [family.collate([row], fitted) for row in rows]
    whole = family.collate([*rows, {"id": "", "weight": 0.0}, rows[0] | {"weight": 0.0}], fitted)
    generator = torch.Generator()
    with torch.no_grad():
        sums = [family.loss(model, batch, generator)["ce"] for batch in [*parts, whole]]
    assert whole.counts["ce"] == sum(part.counts["ce"] for part in parts) == 3 * (10 + 6 + 10)
    torch.testing.assert_close(sums[-1], sum(sums[:-1]))
    half = family.collate([rows[0] | {"weight": 0.5}], fitted)
    assert half.counts["ce"] == 15
    with torch.no_grad():
        torch.testing.assert_close(family.loss(model, half, generator)["ce"], sums[0] / 2)


@patterns
def test_learns_beyond_the_bigram(pattern):
    family, model, fitted = trained(pattern)
    rows = rows_of(24)
    fresh, _ = built(family)
    assert nats(family, fresh, rows, fitted) == pytest.approx(np.log(24 if pattern == Flatten() else 8), abs=0.1)
    baselines = family.baselines(family.collate(rows, fitted), fitted)
    count = 24 * 30
    assert baselines["uniform"]["ce"] / count == pytest.approx(np.log(8))
    assert baselines["bigram"]["ce"] < 0.9 * baselines["unigram"]["ce"] < baselines["uniform"]["ce"]
    assert nats(family, model, rows, fitted) < baselines["bigram"]["ce"] / count


def test_dropped_text_leaves_the_unconditional_batch():
    family = tiny(text="caption", text_bytes=16)
    _, fitted = built(family)
    rows = rows_of(3)
    texts = ["abc", "", "é"]
    batch = family.collate([row | {"text": text} for row, text in zip(rows, texts, strict=True)], fitted)
    bare = family.collate(rows, fitted)
    assert batch["start"].tolist() == [3, 0, 2]
    dropped = without_text(batch.tensors, torch.tensor([True, True, False]))
    steps = bare["inputs"].shape[1]
    for name in ("inputs", "targets", "text"):
        assert torch.equal(dropped[name][:2, :steps], bare[name][:2])
        assert (dropped[name][:2, steps:] == -1).all()
        assert torch.equal(dropped[name][2], batch[name][2])
    assert dropped["start"].tolist() == [0, 0, 2]


@patterns
def test_figures_are_the_loss_by_codebook(pattern):
    """Their bits are the loss, padding and weight 0 left out; what a trained model foresees, it hits; and a text in
    front or a stop behind moves no codebook."""
    family, model, fitted = trained(pattern)
    rows = [*rows_of(4), rows_of(1, 6)[0] | {"weight": 0.5}, {"id": "", "weight": 0.0}]
    figures = family.figures(model, family.collate(rows, fitted), fitted)
    assert set(figures) == {f"{name}{end}" for name in ("bits_per_token", "token_accuracy")
                            for end in ("", "_codebook_1", "_codebook_2", "_codebook_3")}
    assert figures["bits_per_token"].value() == pytest.approx(nats(family, model, rows, fitted) / np.log(2), rel=1e-4)
    assert figures["bits_per_token"].count == 3 * (4 * 10 + 0.5 * 6)
    assert figures["token_accuracy_codebook_2"].count == 43
    if pattern != Parallel():  # codebooks 2 and 3 follow from the first
        assert figures["token_accuracy_codebook_3"].value() > 0.95 > 0.9 > figures["token_accuracy_codebook_1"].value()

    family = tiny(pattern=pattern, text="caption", text_bytes=16, stop=True)
    model, fitted = built(family)
    rows = [row | {"text": text, "ends": True} for row, text in zip(rows_of(3), ("", "abc", "é"), strict=True)]
    batch = family.collate(rows, fitted)
    counts = {name: mean.count for name, mean in family.figures(model, batch, fitted).items()}
    assert counts["token_accuracy"] == 90 and counts["token_accuracy_codebook_1"] == 30


def test_metrics_tell_a_silent_model():
    """Distance in the codec's latents, level and silence, each of what was generated against held-out sound."""
    class Listening(LoadedToy):
        def encode_batch(self, recordings):
            return [np.abs(r[: len(r) // 30 * 30].reshape(-1, 3)).astype(np.float32) for r in recordings]

    @dataclass(frozen=True)
    class Codec(ToyCodec):
        def load(self, device="cpu", fitted=None):
            return Listening(8, torch.zeros(7))

    random = np.random.default_rng(0)
    sounds = [Audio(random.normal(0, 0.2, (1, 3000)).astype(np.float32), 1000) for _ in range(4)]
    values = {}
    for name, gain in (("alike", 1.0), ("quiet", 1e-5)):
        metrics = {key: make() for key, make in tiny(codec=Codec()).metrics().items()}
        for ours, theirs in zip(sounds[:2], sounds[2:], strict=True):
            for metric in metrics.values():
                metric.update(Audio(ours.samples * np.float32(gain), 1000), theirs, {})
        values[name] = {key: metric.value() for key, metric in metrics.items()}
    alike, quiet = values["alike"], values["quiet"]
    assert alike["frechet_distance_codec_latents"] < 0.01 < 0.05 < quiet["frechet_distance_codec_latents"]
    assert alike["silence_fraction"] == 0 and quiet["silence_fraction"] == 1
    assert abs(alike["level_error_db"]) < 1 and quiet["level_error_db"] == pytest.approx(-100, abs=1)
    assert metrics["frechet_distance_codec_latents"].details()["embedding"].startswith("latents of toy8")


# Generation

@patterns
def test_cached_steps_are_the_whole_model(pattern):
    """The likeliest continuation, token by token through the cache, is the one the whole model gives."""
    family, model, fitted = trained(pattern)
    prompt = rows_of(1, 4)[0]
    codes, = generate(family, model, fitted, [(prompt, 0, Options(seconds=0.6, temperature=0.0))], slots=3)
    assert codes.shape == (6, 3)
    layout = family.layout(fitted)
    whole = prompt | {"audio.codes": np.concatenate([prompt["audio.codes"], codes])}
    batch = family.collate([whole], fitted)
    with torch.no_grad():
        x = model.embed(batch["inputs"], batch["text"], batch["start"])
        logits = model.transformer.logits(model.transformer(x))[0]
    for t in range(4, 10):
        for k in range(3):
            step, stream = t * layout.stride + layout.delays[k], layout.streams[k]
            row = logits[step, stream]
            begin = layout.offsets[k] if layout.num_streams == 1 else 0
            assert row[begin : begin + 8].argmax() == whole["audio.codes"][t, k], (t, k)


@patterns
def test_a_learnt_walk_goes_on(pattern):
    family, model, fitted = trained(pattern)
    start = rows_of(1, 5)[0]
    codes, = generate(family, model, fitted, [(start, 3, Options(seconds=0.5, temperature=0.0))])
    joined = np.concatenate([start["audio.codes"], codes]).astype(int)
    if pattern != Parallel():
        assert np.array_equal(joined, (joined[:, :1] + np.arange(3)) % 8)
    assert set((np.diff(joined[:, 0]) % 8).tolist()) <= {0, 1}


@pytest.mark.parametrize("settings", [dict(), dict(positions="rotary", norm="rms", mlp="swiglu", num_kv_heads=1,
                                                   qk_norm=True), dict(pattern=Flatten())],
                         ids=["gpt", "llama", "flat"])
def test_alone_and_in_company_are_the_same(settings):
    """Same seed, same number of slots: the same tokens, whoever else is there and whenever they come and go; across
    several slides of the window and with blocks of the cache that only the others need."""
    family = tiny(context=320, **settings)
    model, fitted = built(family)
    request = (rows_of(1, 2)[0], 5, Options(seconds=3.0, top_p=0.9))
    alone, = generate(family, model, fitted, [request], slots=4)

    sampler = family.sampler(model, fitted, 4)
    others = family.collate([rows_of(1, n)[0] for n in (90, 300, 1)], fitted)
    how = [Options(seconds=9.0, temperature=0.0), Options(seconds=2.0, top_k=3), Options(seconds=9.0)]
    sampler.admit([3, 0], others, [1, 2], how[:2])
    for _ in range(7):
        sampler.step()
    sampler.drop(3)
    sampler.admit([2], family.collate([request[0]], fitted), [request[1]], [request[2]])
    pieces, ended = [], False
    for i in range(2000):
        if i == 5:
            sampler.admit([3], others, [9], how[2:])
        for piece in sampler.step():
            if piece.slot == 2:
                pieces.append(piece.data)
                ended = piece.done
        if ended:
            break
    assert np.array_equal(np.concatenate(pieces), alone)


def test_the_first_codebook_alone():
    """Semantic codes, say: one stream, and what it makes is codes of one codebook."""
    for pattern in PATTERNS:
        family = tiny(num_codebooks=1, pattern=pattern)
        assert family.columns(Fitted())[0].encoder.num_codebooks == 1
        rows = [row | {"audio.codes": row["audio.codes"][:, :1]} for row in rows_of()]
        fitted = family.fit(iter(rows))
        model = family.build(fitted)
        family.init(model, torch.Generator().manual_seed(0))
        codes, = generate(family, model, fitted, [(rows[0], 0, Options(seconds=1.0))])
        assert codes.shape == (10, 1) and codes.max() < 8


def test_seeds_and_options_matter():
    family = tiny()
    model, fitted = built(family)
    row = rows_of(1, 2)[0]
    how = Options(seconds=2.0)
    same, other, again = (generate(family, model, fitted, [(row, seed, how)])[0] for seed in (1, 2, 1))
    assert np.array_equal(same, again)
    assert not np.array_equal(same, other)
    assert same.shape == (20, 3)
    assert same.min() >= 0 and same.max() < 8


@patterns
def test_longer_than_the_context_slides_by_frames(pattern):
    """A full window goes on with the later half of its frames, every codebook in its own range: with flattened
    codebooks exactly as a request would that is given those frames. A prompt over the context begins there, too."""
    family = tiny(pattern=pattern, context=pattern.layout(3, 8).num_steps(10))
    model, fitted = built(family)
    greedy = Options(seconds=2.5, temperature=0.0)
    codes, = generate(family, model, fitted, [(rows_of(1, 0)[0], 0, greedy)])
    assert codes.shape == (25, 3) and codes.min() >= 0 and codes.max() < 8
    given = rows_of(1, 40)[0]
    long, = generate(family, model, fitted, [(given, 0, greedy)])
    assert long.shape == (25, 3) and long.min() >= 0 and long.max() < 8
    if pattern.layout(3, 8).lag < pattern.layout(3, 8).stride:
        for prompt, expected in ((codes[5:10], codes[10:15]), (given["audio.codes"][-5:], long[:5])):
            row = rows_of(1)[0] | {"audio.codes": prompt}
            again, = generate(family, model, fitted, [(row, 0, Options(seconds=0.5, temperature=0.0))])
            assert np.array_equal(again, expected)


def test_stops_by_itself():
    family = tiny(stop=True)
    model, fitted = built(family)
    train(family, model, rows_of(16, 6, ends=True), fitted, steps=100)
    for slots in (1, 3):
        codes, = generate(family, model, fitted, [(rows_of(1, 0)[0], 0, Options(seconds=5.0))], slots=slots)
        assert codes.shape == (6, 3)
        assert codes.max() < 8
    assert nats(family, model, rows_of(2, 6, ends=True), fitted) < 1.5


def test_text_in_front_is_heeded_and_guidance_follows_it_further():
    """Two texts and none, three constant sounds: each gives its own, alone and together, and with guidance."""
    family = tiny(text="caption", text_bytes=8, condition_dropout=0.0)
    model, fitted = built(family)
    sounds = {"low": 1, "high": 4, "": 6}
    rows = [row | {"text": text, "audio.codes": np.full((10, 3), sounds[text], np.uint16)}
            for text, row in zip(["low", "high", ""] * 6, rows_of(18), strict=True)]
    train(family, model, rows, fitted, steps=120)
    low, high, none = (rows_of(1, 0)[0] | {"text": text} for text in sounds)
    options = Options(seconds=1.0, temperature=0.0, guidance_scale=1.0)
    guided = Options(seconds=1.0, temperature=0.0, guidance_scale=3.0)
    asked = [(low, 0, options), (high, 0, options), (none, 0, Options(seconds=1.0, temperature=0.0)), (low, 0, guided)]
    one, two, three, four = generate(family, model, fitted, asked, slots=4)
    assert (one == 1).all() and (two == 4).all() and (three == 6).all() and (four == 1).all()
    plain, = generate(family, model, fitted, [(low, 7, Options(seconds=1.0, guidance_scale=1.0))], slots=3)
    beside = generate(family, model, fitted, [(low, 7, Options(seconds=1.0, guidance_scale=1.0)),
                                              (low, 7, Options(seconds=1.0, guidance_scale=4.0))], slots=3)
    assert np.array_equal(plain, beside[0])


def test_renders_what_it_drew():
    family = tiny()
    _, fitted = built(family)
    renderer = family.renderer(fitted, "cpu")
    codes = walk(7).astype(np.int64)
    whole, pieces = renderer.open(), renderer.open()
    one = decode([whole.push(codes, True)])[0]
    parts = [decode([pieces.push(codes[i : i + 1], False)])[0] for i in range(7)]
    many = np.concatenate([*parts, decode([pieces.push(codes[:0], True)])[0]])
    assert renderer.modality == "audio" and renderer.sample_rate_hz == 1000
    assert one.shape == (7 * HOP,) and one.dtype == np.float32
    assert np.array_equal(one, many)


# What it refuses

SILENCE = Audio(np.zeros((1, 500), np.float32), 1000)


@pytest.mark.parametrize("request_, named", [
    (Request(text="a song"), "text"),
    (Request(audio=Audio(np.zeros((1, 0), np.float32), 1000)), "audio"),
    (Request(options=Options(top_k=0)), "top_k"),
    (Request(options=Options(seconds=float("nan"))), "seconds"),
    (Request(options=Options(num_steps=4)), "num_steps"),
    (Request(options=Options(guidance_scale=2.0)), "guidance_scale"),
])
def test_requests_it_cannot_take(request_, named):
    with pytest.raises(ValueError, match=named):
        tiny().prompt(request_)


def test_requests_it_can_take():
    assert tiny().prompt(Request()).media == {}
    assert tiny().prompt(Request(audio=SILENCE)).media == {"audio": SILENCE}
    assert tiny(text="caption").prompt(Request(text="a song")).fields["text"] == "a song"


def test_more_codebooks_than_the_codec_has():
    with pytest.raises(ValueError, match="num_codebooks = 4, but codec toy has 3"):
        tiny(num_codebooks=4).fit(iter(rows_of()))


def test_a_window_longer_than_the_context():
    with pytest.raises(ValueError, match="at most 6.2 s"):
        tiny(segment_s=6.3).fit(iter(rows_of()))
    tiny(segment_s=6.2).fit(iter(rows_of()))


def test_a_context_too_small_for_the_pattern():
    with pytest.raises(ValueError, match="leaves 5 steps"):
        tiny(context=5, segment_s=0.2).fit(iter(rows_of()))


def test_another_codec_than_the_checkpoints():
    _, fitted = built(tiny())
    with pytest.raises(ValueError, match="toy9.*toy8"):
        tiny(codec=ToyCodec(cardinality=9)).build(fitted)


def test_the_originals_model():
    """With shared ids, as the original has them, both of its counts; built on the meta device."""
    for tied, count in ((False, 12_213_504), (True, 11_820_288)):
        family = CodecLM(ToyCodec(cardinality=1024), 4, Flatten(offsets=False), segment_s=51.2, tied=tied)
        with torch.device("meta"):
            model = family.build(Fitted({}, {"codec": "toy1024", "cardinality": 1024, "frame_rate_hz": 10.0}))
        assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize("preset,millions", [("small", 1.77), ("gpt2", 86.6), ("medium", 265.9), ("large", 1189.2)])
def test_presets_of_every_size(preset, millions):
    """By their parameters but for the embeddings, the sizes their files name."""
    family = family_from_settings(cli.compose(cli.TRAIN, [f"family=codec_lm_{preset}"]).family)
    with torch.device("meta"):
        model = family.build(Fitted({}, {"codec": "spectral-v1", "cardinality": 1024, "frame_rate_hz": 75.0}))
    tables = model.transformer.embedding.weight.numel() + model.transformer.head.weight.numel()
    assert sum(p.numel() for p in model.parameters()) - tables == pytest.approx(millions * 1e6, rel=0.01)


# Through the engine, with the codec that is always there

@pytest.fixture(scope="module")
def spoken():
    family = CodecLM(Spectral(num_codebooks=2, cardinality=16, frames_per_centroid=8), 2, segment_s=0.5, context=96,
                     width=32, num_layers=1, num_heads=2)
    latents = np.random.default_rng(0).normal(-4, 2, (400, 128)).astype(np.float32)
    fitted = family.fit(iter([{"audio.latents": latents}]))
    model = family.build(fitted)
    family.init(model, torch.Generator().manual_seed(0))
    return Engine(family, model, fitted, slots=2)


def tone(seconds: float, rate_hz: int, level: float = 0.3) -> Audio:
    wave = level * np.sin(np.arange(round(seconds * rate_hz)) * 2 * np.pi * 440 / rate_hz)
    return Audio(wave[None].astype(np.float32), rate_hz)


@pytest.mark.parametrize("prompt", [
    pytest.param(None, id="none"), pytest.param(tone(0.5, 24_000, 0.0), id="silent"),
    pytest.param(tone(0.2, 24_000), id="shorter than a window"), pytest.param(tone(0.001, 24_000), id="within a frame"),
    pytest.param(tone(4, 24_000), id="longer than the context"), pytest.param(tone(0.7, 8_000), id="another rate"),
    pytest.param(Audio(tone(0.5, 44_100).samples.repeat(2, 0), 44_100), id="stereo")])
def test_prompts_of_every_kind_and_the_stream_is_the_file(spoken, prompt):
    generator = Generator(spoken)
    how = Options(seconds=2.0)
    whole = generator.generate(audio=prompt, options=how, seed=3).audio
    assert whole.sample_rate_hz == 24_000 and whole.samples.shape == (1, 48_000) and np.isfinite(whole.samples).all()
    pieces = [piece.samples for piece in generator.stream(audio=prompt, options=how, seed=3)]
    assert len(pieces) > 2
    assert np.array_equal(np.concatenate(pieces, axis=1), whole.samples)


def test_no_samples_and_nothing_left_behind(spoken):
    with pytest.raises(ValueError, match="at least one"):
        Generator(spoken).generate(audio=Audio(np.zeros((1, 0), np.float32), 24_000))
    with pytest.raises(ValueError, match="not finite"):
        Generator(spoken).generate(audio=Audio(np.full((1, 9), np.nan, np.float32), 24_000))
    assert not spoken.busy


def test_a_stream_closed_between_steps_frees_its_slot(spoken):
    stream = Generator(spoken).stream(options=Options(seconds=30.0))
    next(stream)
    assert len(spoken.free) == 1
    stream.close()
    assert len(spoken.free) == 2 and not spoken.sampler.busy
