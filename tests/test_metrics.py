"""Figures against closed forms, torchmetrics and scipy; merging, mismatches and hopeless input."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avray.media import Audio
from avray.metrics import accumulators, pitch
from avray.metrics.frechet import FrechetDistance, Gaussian, frechet_distance, kernel_distance
from avray.metrics.level import level_error_db, rms_dbfs, silence_fraction
from avray.metrics.signal import si_sdr
from avray.metrics.spectral import (
    log_mel_distance,
    log_spectral_distance,
    magnitudes,
    multi_resolution_stft_distance,
    window_for,
)
from avray.metrics.text import Bleu, RougeL, TextErrorRate, cer, wer

RATES = (16_000, 24_000, 44_100)


def noise(length: int, seed: int = 0, scale: float = 0.1) -> np.ndarray:
    return (scale * np.random.default_rng(seed).standard_normal(length)).astype(np.float32)


def tone(frequency_hz: float, rate: int, seconds: float = 0.5, partials: int = 1) -> np.ndarray:
    time_s = np.arange(int(seconds * rate)) / rate
    parts = [np.sin(2 * np.pi * k * frequency_hz * time_s + k) / k for k in range(1, partials + 1)
             if k * frequency_hz < 0.45 * rate]
    return (0.3 * np.sum(parts, axis=0)).astype(np.float32)


@pytest.mark.parametrize("rate", RATES)
def test_a_change_of_level_is_its_decibels(rate):
    sound = noise(rate)
    for distance in (log_spectral_distance, log_mel_distance):
        assert distance(sound, sound, rate) == 0
        assert distance(sound, sound / 10, rate) == pytest.approx(20, abs=0.01)
        assert distance(sound / 2, sound, rate) == pytest.approx(20 * math.log10(2), abs=0.01)


def test_log_spectral_distance_against_torch():
    a, b = noise(24_000, 1), noise(24_000, 2)
    window = window_for(24_000)
    hann = torch.hann_window(window)
    power_db = [
        10 * torch.log10((torch.stft(torch.from_numpy(x), window, window // 4, window=hann, center=False,
                                     return_complex=True).abs() * 2 / hann.sum()).square().clamp_min(1e-10))
        for x in (a, b)]
    expected = (power_db[0] - power_db[1]).square().mean(dim=0).sqrt().mean().item()
    assert log_spectral_distance(a, b, 24_000) == pytest.approx(expected, rel=1e-4)


def test_full_scale_is_0_db_and_silence_is_finite():
    rate = 24_000
    sine = np.sin(2 * np.pi * 1500 * np.arange(rate) / rate).astype(np.float32)
    assert 20 * math.log10(magnitudes(sine, 1024, 256).max()) == pytest.approx(0, abs=0.01)
    silence = np.zeros(rate, np.float32)
    assert log_spectral_distance(silence, silence, rate) == 0
    assert 0 < log_spectral_distance(sine, silence, rate) <= 100
    assert 0 < log_mel_distance(sine, silence, rate) <= 110
    assert math.isfinite(log_spectral_distance(sine[:10], silence[:10], rate))


def test_multi_resolution_distance():
    sound = noise(8000)
    assert multi_resolution_stft_distance(sound, sound) == 0
    assert multi_resolution_stft_distance(sound / 2, sound) == pytest.approx(0.5 + math.log(2), rel=1e-3)
    assert multi_resolution_stft_distance(sound, 0 * sound) == math.inf
    assert multi_resolution_stft_distance(0 * sound, 0 * sound) == 0


@pytest.mark.parametrize("distance", [lambda a, b: log_spectral_distance(a, b, 16_000),
                                      lambda a, b: log_mel_distance(a, b, 16_000),
                                      multi_resolution_stft_distance, si_sdr])
def test_two_lengths_are_refused(distance):
    with pytest.raises(ValueError, match="100 and 99 samples"):
        distance(np.ones(100), np.ones(99))


def test_levels():
    sine = np.sin(2 * np.pi * np.arange(1000) / 100)
    assert rms_dbfs(sine) == pytest.approx(-3.0103, abs=1e-4)
    assert rms_dbfs(np.ones((2, 10))) == 0
    assert rms_dbfs(np.zeros(10)) == -120 and math.isnan(rms_dbfs(np.zeros(0)))
    assert level_error_db(0.1 * sine, sine) == pytest.approx(-20)
    half = np.concatenate([np.zeros(8000), 0.1 * np.ones(8000)])
    assert silence_fraction(half, 16_000) == 0.5
    assert silence_fraction(np.zeros((2, 10)), 16_000) == 1
    assert math.isnan(silence_fraction(np.zeros(0), 16_000))


def test_si_sdr_is_torchmetrics():
    from torchmetrics.functional.audio import scale_invariant_signal_distortion_ratio

    target = noise(4000, 1) + 0.3
    for scale, level in ((1.0, 0.01), (3.0, 0.1), (-1.0, 1.0)):
        estimate = scale * target + noise(4000, 2, level)
        expected = scale_invariant_signal_distortion_ratio(
            torch.from_numpy(estimate).double(), torch.from_numpy(target).double(), zero_mean=True)
        assert si_sdr(estimate, target) == pytest.approx(expected.item(), abs=1e-5)


def test_si_sdr_of_the_hopeless_and_the_perfect():
    target = noise(1000)
    assert si_sdr(target, target) == 100 and si_sdr(0 * target, target) == -100
    assert math.isnan(si_sdr(target, np.full(1000, 0.1))) and math.isnan(si_sdr(target[:0], target[:0]))


def gaussian(vectors: np.ndarray) -> Gaussian:
    found = Gaussian()
    found.add(vectors)
    return found


def test_frechet_closed_form_and_rotation():
    mean_a, mean_b = np.array([0.0, 1.0, 2.0]), np.array([1.0, 1.0, 0.0])
    variance_a, variance_b = np.array([1.0, 4.0, 9.0]), np.array([4.0, 4.0, 1.0])
    expected = ((mean_a - mean_b) ** 2).sum() + ((np.sqrt(variance_a) - np.sqrt(variance_b)) ** 2).sum()
    rotation = np.linalg.qr(np.random.default_rng(0).standard_normal((3, 3)))[0]
    for turn in (np.eye(3), rotation):
        a = Gaussian(11, turn @ mean_a, 10 * turn @ np.diag(variance_a) @ turn.T)
        b = Gaussian(11, turn @ mean_b, 10 * turn @ np.diag(variance_b) @ turn.T)
        assert frechet_distance(a, b) == pytest.approx(expected) == frechet_distance(b, a)
        assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_frechet_is_scipys_root():
    linalg = pytest.importorskip("scipy.linalg")
    generator = np.random.default_rng(0)
    a = generator.standard_normal((200, 8))
    b = generator.standard_normal((300, 8)) @ np.diag(range(1, 9)) + 0.5
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = linalg.sqrtm(first @ second).real
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(first + second - 2 * root)
    assert frechet_distance(gaussian(a), gaussian(b)) == pytest.approx(expected)


def test_frechet_survives_fewer_vectors_than_dimensions():
    generator = np.random.default_rng(0)
    a, b = generator.standard_normal((5, 128)), generator.standard_normal((6, 128))
    assert frechet_distance(gaussian(a), gaussian(a)) == pytest.approx(0, abs=1e-5)
    assert math.isfinite(frechet_distance(gaussian(a), gaussian(b)))
    with pytest.raises(ValueError, match="at least 2"):
        frechet_distance(gaussian(a[:1]), gaussian(b))
    with pytest.raises(ValueError, match="128 and 2"):
        frechet_distance(gaussian(a), gaussian(b[:, :2]))


@settings(deadline=None)
@given(sizes=st.lists(st.integers(0, 9), min_size=2, max_size=6), seed=st.integers(0, 99))
def test_gaussians_merge_to_the_whole(sizes, seed):
    vectors = 1e3 + np.random.default_rng(seed).standard_normal((sum(sizes) + 2, 4))
    merged = gaussian(vectors[sum(sizes):])
    start = 0
    for size in sizes:
        merged.merge(gaussian(vectors[start:start + size]))
        start += size
    np.testing.assert_allclose(merged.mean, vectors.mean(0))
    np.testing.assert_allclose(merged.covariance(), np.cov(vectors, rowvar=False), atol=1e-8)


def test_kernel_distance():
    generator = np.random.default_rng(0)
    a, b = generator.standard_normal((400, 4)), generator.standard_normal((400, 4))
    near, far = kernel_distance(a, b), kernel_distance(a, b + 1)
    assert abs(near) < 0.2 < far
    x, y, z, w = 1.0, 2.0, 3.0, 5.0
    by_hand = (x * y + 1) ** 3 + (z * w + 1) ** 3 - sum((p * q + 1) ** 3 for p in (x, y) for q in (z, w)) / 2
    assert kernel_distance(np.array([[x], [y]]), np.array([[z], [w]])) == pytest.approx(by_hand)
    with pytest.raises(ValueError, match="at least 2"):
        kernel_distance(a[:1], b)


def frames(audio: Audio) -> np.ndarray:
    return audio.samples[0].reshape(-1, 4)


def test_frechet_metric_carries_what_it_is_quoted_with():
    sounds = [Audio(noise(400, seed)[None], 16_000) for seed in range(6)]
    whole = FrechetDistance(frames, "frames", 16_000)
    parts = [FrechetDistance(frames, "frames", 16_000) for _ in range(2)]
    for index in range(3):
        whole.update(sounds[index], sounds[index + 3], {})
        parts[index % 2].update(sounds[index], sounds[index + 3], {})
    parts[1].merge(pickle.loads(pickle.dumps(parts[0])))
    assert parts[1].value() == pytest.approx(whole.value()) and whole.value() > 0
    assert parts[1].details() == whole.details()
    assert whole.details()["num_generated"] == whole.details()["num_reference"] == 300
    other = copy.deepcopy(whole)
    other.update(sounds[0], sounds[0], {})
    assert other.details()["reference"] != whole.details()["reference"]
    with pytest.raises(ValueError, match="resample"):
        whole.update(Audio(noise(400)[None], 24_000), None, {})
    with pytest.raises(ValueError, match="do not merge"):
        whole.merge(FrechetDistance(frames, "others", 16_000))
    assert math.isnan(FrechetDistance(frames, "frames", 16_000).value())


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("partials", [1, 8])
def test_pitch_from_c3_to_c6(rate, partials):
    for frequency_hz in (130.81, 220.0, 440.5, 659.26, 1046.5):
        track = pitch.f0_hz(tone(frequency_hz, rate, partials=partials), rate)
        assert np.isfinite(track).all()
        assert abs(1200 * np.log2(np.median(track) / frequency_hz)) < (5 if rate == 16_000 else 2)


def test_pitch_of_noise_and_silence_is_absent():
    assert np.isnan(pitch.f0_hz(np.zeros(16_000), 16_000)).all()
    assert np.isnan(pitch.f0_hz(noise(16_000), 16_000)).mean() > 0.95
    assert len(pitch.f0_hz(np.zeros(100), 16_000)) == 0
    with pytest.raises(ValueError, match="half of"):
        pitch.f0_hz(np.zeros(1000), 2000)


def test_pitch_error_is_in_cents():
    silence = np.zeros(8000, np.float32)
    a = np.concatenate([tone(440, 16_000), silence])
    b = np.concatenate([tone(440 * 2 ** (1 / 12), 16_000), tone(440, 16_000)])
    error = pitch.pitch_error(pitch.f0_hz(a, 16_000), pitch.f0_hz(b, 16_000))
    assert error.cents == pytest.approx(100, abs=2) and error.voicing == pytest.approx(0.5, abs=0.05)
    nothing = pitch.pitch_error(np.array([np.nan]), np.array([100.0]))
    assert math.isnan(nothing.cents) and nothing.voicing == 1


def test_text_rates():
    assert wer(["The cat, sat."], ["the cat sat"]) == 0
    assert wer(["one two three four", "five"], ["one too three", "five six"]) == pytest.approx(3 / 5)
    assert cer(["abc"], ["abd"]) == pytest.approx(1 / 3)
    assert wer(["don't"], ["dont"]) == 1 and wer(["don’t"], ["don't"]) == 0
    assert math.isnan(wer([""], ["ghost"])) and wer(["", "a b"], ["x", ""]) == pytest.approx(3 / 2)
    with pytest.raises(ValueError):
        wer(["a"], [])


def test_text_rates_merge():
    one, two = TextErrorRate("word"), TextErrorRate("word")
    one.update("a b", "a c", {})
    two.update("x", "x y z", {})
    two.update("anything", None, {})
    one.merge(two)
    assert one.value() == pytest.approx(3 / 5) and one.details() == {"count": 2, "words": 5}
    with pytest.raises(ValueError, match="generated text"):
        one.update(Audio(noise(4)[None], 16_000), "a", {})


PAIR_METRICS = [*accumulators.audio_metrics().values(), accumulators.SiSdr, accumulators.PitchError]


@pytest.mark.parametrize("metric", PAIR_METRICS)
def test_every_metric_merges_like_one(metric):
    sounds = [Audio(tone(200 + 50 * k, 16_000, 0.25)[None] + noise(4000, k, 0.01), 16_000) for k in range(6)]
    whole, parts = metric(), [metric(), metric()]
    for index in range(3):
        whole.update(sounds[index], sounds[index + 3], {})
        parts[index % 2].update(sounds[index], sounds[index + 3], {})
    parts[0].merge(pickle.loads(pickle.dumps(parts[1])))
    assert parts[0].value() == pytest.approx(whole.value()) and math.isfinite(whole.value())
    assert whole.details()["count"] == 3
    assert math.isnan(metric().value())


def test_pairs_are_cut_mixed_and_checked():
    left = noise(8000)
    stereo = Audio(np.stack([left, -left + 0.25]), 16_000)
    pair = accumulators.common(stereo, Audio(left[None, :6000], 16_000))
    assert pair.generated.shape == pair.target.shape == (6000,)
    np.testing.assert_allclose(pair.generated, 0.125, atol=1e-6)
    distance = accumulators.LogSpectralDistance()
    distance.update(Audio(left[None, :5000], 16_000), Audio(left[None], 16_000), {})
    assert distance.value() == 0
    with pytest.raises(ValueError, match="16000 Hz does not compare"):
        distance.update(Audio(left[None], 16_000), Audio(left[None], 24_000), {})
    with pytest.raises(ValueError, match="got str"):
        distance.update("text", Audio(left[None], 24_000), {})


def test_what_cannot_be_judged_is_skipped_and_counted():
    nothing, sound = Audio(np.zeros((1, 0), np.float32), 16_000), Audio(noise(8000)[None], 16_000)
    for metric in (accumulators.LogSpectralDistance(), accumulators.SiSdr(), accumulators.LevelError()):
        metric.update(sound, None, {})
        metric.update(nothing, sound, {})
        assert math.isnan(metric.value()) and metric.details()["num_skipped"] == 2
    silence = accumulators.SilenceFraction()
    silence.update(sound, None, {})
    assert silence.value() == 0
    length = accumulators.DurationError()
    length.update(nothing, sound, {})
    assert length.value() == 0.5


def test_bleu_is_that_of_torchmetrics_and_merges():
    from torchmetrics.text import BLEUScore

    pairs = [("the cat is on the mat", "there is a cat on the mat"), ("a b c d e", "A b, c d e!")]
    bleu, half = Bleu(), Bleu()
    bleu.update(*pairs[0])
    half.update(*pairs[1])
    half.update("x", None)
    bleu.merge(half)
    given, wanted = [a for a, _ in pairs], [["there is a cat on the mat"], ["a b c d e"]]
    assert bleu.value() == pytest.approx(float(BLEUScore()(given, wanted)))
    assert math.isnan(Bleu().value())


def test_rouge_l_counts_the_longest_common_subsequence():
    rouge = RougeL()
    rouge.update("police killed the gunman", "police kill the gunman")  # Lin's own example
    assert rouge.value() == pytest.approx(0.75)
    other = RougeL()
    other.update("", "")
    other.update("one", None)
    rouge.merge(other)
    assert rouge.value() == pytest.approx((0.75 + 1) / 2) and rouge.count == 2
