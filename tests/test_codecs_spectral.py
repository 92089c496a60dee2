"""The spectral codec: the same frames, codes and samples whatever the pieces, and a faithful round trip."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avray.codecs import codec_from_settings
from avray.codecs.base import Codes, Latents, decode_all
from avray.codecs.spectral import Spectral
from tests.decoding import in_pieces, side_by_side

RATE_HZ = 24_000
CODEC = Spectral().load()


def tone(frequency_hz: float, num_harmonics: int, seconds: float = 1.5) -> np.ndarray:
    time_s = np.arange(int(RATE_HZ * seconds)) / RATE_HZ
    parts = [np.sin(2 * np.pi * frequency_hz * n * time_s + n) / n for n in range(1, num_harmonics + 1)]
    return (0.3 * np.sum(parts, axis=0)).astype(np.float32)


def music(seconds: float, seed: int = 0) -> np.ndarray:
    """Notes with decay over a little noise."""
    rng = np.random.default_rng(seed)
    sound = rng.normal(0, 0.003, int(RATE_HZ * seconds))
    for start in np.arange(0, seconds - 0.3, 0.3):
        note = tone(220 * 2 ** (rng.integers(0, 24) / 12), 4, 0.3)
        at = int(start * RATE_HZ)
        sound[at : at + len(note)] += note * np.exp(-np.arange(len(note)) / 3000)
    return sound.astype(np.float32)


def cents_off(samples: np.ndarray, frequency_hz: float, num_harmonics: int) -> float:
    """How far the frequency of the strongest harmonic series lies from ``frequency_hz``."""
    middle = samples[len(samples) // 8 : -len(samples) // 8] * np.hanning(len(samples) * 7 // 8 - len(samples) // 8)
    time_s = np.arange(len(middle)) / RATE_HZ

    def strength(cents: float) -> float:
        f = frequency_hz * 2 ** (cents / 1200)
        waves = np.exp(-2j * np.pi * f * np.outer(np.arange(1, num_harmonics + 1), time_s))
        return float(np.abs(waves @ middle).sum())

    coarse = max(np.arange(-60, 61, 3.0), key=strength)
    return max(np.arange(coarse - 3, coarse + 3.1, 0.5), key=strength)


@pytest.mark.parametrize("num_samples", [0, 1, 319, 320, 321, 40_960, 41_311, 41_312, 41_313, 100_000])
def test_one_frame_for_every_hop_begun(num_samples: int) -> None:
    samples = music(5)[:num_samples]
    latents = CODEC.encode(torch.from_numpy(samples)[None])
    assert latents.shape == (1, 128, -(-num_samples // 320))
    stream = CODEC.stream()
    streamed = np.concatenate([stream.push(samples), stream.finish()])
    np.testing.assert_array_equal(streamed, latents[0].T)


@settings(max_examples=15, deadline=None)
@given(sizes=st.lists(st.integers(1, 60_000), min_size=1, max_size=5), seconds=st.floats(0.01, 6))
def test_frames_do_not_depend_on_the_pieces(sizes: list[int], seconds: float) -> None:
    samples = music(6)[: int(seconds * RATE_HZ)]
    whole = CODEC.encode_batch([music(1, seed=1), samples])[1]
    assert whole.dtype == np.float32
    np.testing.assert_array_equal(in_pieces(CODEC.stream(), samples, [max(s, 400) for s in sizes]), whole)


@settings(max_examples=10, deadline=None)
@given(sizes=st.lists(st.integers(1, 120), min_size=1, max_size=5), num_frames=st.integers(0, 170))
def test_samples_do_not_depend_on_the_pieces(sizes: list[int], num_frames: int) -> None:
    latents = CODEC.encode_batch([music(3)])[0][:num_frames]
    whole = decode_all(CODEC, latents)
    assert whole.dtype == np.float32 and len(whole) == num_frames * 320
    np.testing.assert_array_equal(in_pieces(CODEC.decoder(), latents, sizes), whole)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_requests_decoded_together_sound_as_alone(device: str) -> None:
    codec = Spectral().load(device)
    latents = [codec.encode_batch([music(3, seed)])[0][:length] for seed, length in enumerate((170, 40, 170, 3, 99))]
    alone = [decode_all(codec, one) for one in latents]
    for one, beside in zip(alone, side_by_side(codec, latents), strict=True):
        np.testing.assert_array_equal(beside, one)
    codec.decode_rows = 3  # not on a CPU, whose vector loops round the odd elements at their ends otherwise
    for one, beside in zip(alone, side_by_side(codec, latents), strict=True):
        assert abs(np.std(beside) - np.std(one)) < 0.02 * np.std(one)


@pytest.mark.parametrize(("num_harmonics", "limit_cents"), [(1, 5), (8, 2)])
def test_pitch_survives_the_round_trip(num_harmonics: int, limit_cents: float) -> None:
    for frequency_hz in 130.81 * 2 ** (np.arange(0, 37, 9) / 12):
        sound = decode_all(CODEC, CODEC.encode_batch([tone(frequency_hz, num_harmonics)])[0])
        assert abs(cents_off(sound, frequency_hz, num_harmonics)) <= limit_cents, frequency_hz


@pytest.mark.parametrize("sound", [music(4), np.random.default_rng(0).normal(0, 0.1, 72_000), tone(440, 1)])
def test_level_survives_the_round_trip(sound: np.ndarray) -> None:
    decoded = decode_all(CODEC, CODEC.encode_batch([sound.astype(np.float32)])[0])
    level_db = 10 * np.log10(np.mean(decoded**2) / np.mean(sound**2))
    assert abs(level_db) < 1
    assert np.abs(decoded).max() < 1.5 * np.abs(sound).max()


def test_silence_stays_silent() -> None:
    decoded = decode_all(CODEC, CODEC.encode_batch([np.zeros(24_000, np.float32)])[0])
    assert np.abs(decoded).max() < 1e-3


def test_wild_latents_stay_finite() -> None:
    latents = np.random.default_rng(0).normal(0, 30, (70, 128)).astype(np.float32)
    assert np.isfinite(decode_all(CODEC, latents)).all()


def test_codes_do_not_depend_on_the_pieces() -> None:
    config = Spectral(num_codebooks=3, cardinality=16)
    fitted = config.fit(CODEC.encode_batch([music(6)])[0], seed=1)
    encoder = Codes(config, 2, fitted)
    assert pickle.loads(pickle.dumps(encoder)) == encoder and hash(encoder) is not None
    network = encoder.load("cpu")
    samples = music(5, seed=2)
    whole = network.encode_batch([samples])[0]
    assert whole.dtype == np.uint16 and whole.shape == (375, 2)
    np.testing.assert_array_equal(in_pieces(network.stream(), samples, [7_001, 320, 30_000]), whole)
    codec = config.load("cpu", fitted)
    latents = codec.encode(torch.from_numpy(samples)[None].repeat(2, 1))
    codes = codec.to_codes(latents)
    np.testing.assert_array_equal(codes[1, :2].T, whole)
    errors = [(codec.from_codes(codes[:, :n]) - latents).square().mean() for n in (1, 2, 3)]
    assert errors[0] > errors[1] > errors[2]


def test_what_names_a_column() -> None:
    fitted = [Spectral(cardinality=4).fit(np.random.default_rng(s).normal(size=(50, 128)), 0) for s in (0, 1)]
    ids = {Codes(Spectral(), n, f).column_id() for n in (1, 2) for f in fitted} | {Latents(Spectral()).column_id()}
    assert len(ids) == 5


def test_wrong_use_is_told() -> None:
    with pytest.raises(ValueError, match="fit it before"):
        Codes(Spectral(), 2).load("cpu")
    fitted = Spectral(num_codebooks=2, cardinality=4).fit(np.ones((9, 128), np.float32), 0)
    with pytest.raises(ValueError, match=r"3 codebooks asked for, but the codec has 2"):
        Codes(Spectral(), 3, fitted).load("cpu")
    codec = Spectral().load("cpu", fitted)
    with pytest.raises(ValueError, match=r"3 codebooks asked for, but the codec has 2"):
        codec.to_codes(torch.zeros(1, 128, 5), 3)
    with pytest.raises(ValueError, match="no codes before it is fitted"):
        CODEC.to_codes(torch.zeros(1, 128, 5))
    with pytest.raises(ValueError, match=r"mono samples .* shape \(2, 10\)"):
        CODEC.stream().push(np.zeros((2, 10), np.float32))
    with pytest.raises(ValueError, match=r"latents \[time, 128\]"):
        CODEC.decoder().push(np.zeros((2, 64), np.float32))
    with pytest.raises(ValueError, match="codec.num_codebooks = 0"):
        Spectral(num_codebooks=0)
    with pytest.raises(ValueError, match="codec.name = mp3: it is one of spectral"):
        codec_from_settings({"name": "mp3"})
    with pytest.raises(ValueError, match="codec.hop is no setting of codec spectral"):
        codec_from_settings({"name": "spectral", "hop": 3})
    assert codec_from_settings({"name": "spectral", "num_codebooks": 4}) == Spectral(num_codebooks=4)
