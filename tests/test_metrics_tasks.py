"""Figures of single tasks against pystoi, torchmetrics, closed forms and the demo set, which says what it plays."""

import math
import sys

import numpy as np
import pytest
import torch
from torchmetrics.functional.audio import short_time_objective_intelligibility

from avray.data.demo import short_recording
from avray.data.demo_sound import SAMPLE_RATE_HZ
from avray.errors import MissingDependency
from avray.media import Audio
from avray.metrics.cepstral import mel_cepstral_distortion
from avray.metrics.intelligibility import pesq, stoi
from avray.metrics.labels import LabelDivergence, TextAudioSimilarity, clap_similarity, kl_divergence
from avray.metrics.rhythm import onset_f1, onsets_s, tempo_bpm, tempo_error


def speech_like(rate: int, seconds: float = 2.0) -> np.ndarray:
    """Noise that comes and goes four times a second."""
    time_s = np.arange(round(seconds * rate)) / rate
    rng = np.random.default_rng(0)
    return rng.standard_normal(len(time_s)) * (0.02 + np.maximum(0, np.sin(2 * np.pi * 4 * time_s))) * 0.1


@pytest.mark.parametrize(("rate", "off"), [(10_000, 1e-9), (16_000, 2e-3), (24_000, 2e-3)])
@pytest.mark.parametrize("noise", [0.0, 0.02, 0.2])
def test_stoi_against_pystoi(rate, off, noise):
    clean = speech_like(rate)
    noisy = clean + noise * np.random.default_rng(1).standard_normal(len(clean))
    theirs = short_time_objective_intelligibility(torch.from_numpy(noisy), torch.from_numpy(clean), rate)
    assert stoi(noisy, clean, rate) == pytest.approx(float(theirs), abs=max(off, 1e-7))


def test_stoi_of_what_cannot_be_judged():
    assert math.isnan(stoi(np.zeros(100), np.zeros(100), 10_000))
    assert math.isnan(stoi(np.ones(3000), np.ones(3000), 10_000)), "0.3 s"
    with pytest.raises(ValueError, match="do not compare"):
        stoi(np.zeros(100), np.zeros(99), 10_000)


def test_pesq_says_what_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "pesq", None)
    with pytest.raises(MissingDependency, match="pip install pesq"):
        pesq(np.zeros(16_000), np.zeros(16_000), 16_000)


def test_mel_cepstra_ignore_the_level_and_measure_the_envelope():
    sound = speech_like(24_000).astype(np.float32) + 0.01
    assert mel_cepstral_distortion(sound, sound, 24_000) == 0
    assert mel_cepstral_distortion(sound, sound / 2, 24_000) == pytest.approx(0, abs=0.05)
    brighter = np.diff(sound, prepend=0.0)
    assert mel_cepstral_distortion(sound, brighter, 24_000) > 5
    slower = np.repeat(sound.reshape(-1, 240), 2, 0).ravel()
    aligned = mel_cepstral_distortion(sound, slower, 24_000, align=True)
    assert aligned < mel_cepstral_distortion(sound, slower[: len(sound)], 24_000)
    with pytest.raises(ValueError, match="do not compare"):
        mel_cepstral_distortion(sound, slower, 24_000)


def test_one_cepstral_coefficient_is_its_decibels():
    """A cosine of 1 neper over the mel bands is √(64 / 2) of one coefficient alone."""
    from avray.metrics import cepstral

    bands = np.cos(math.pi * 3 * (np.arange(64) + 0.5) / 64)
    basis = math.sqrt(2 / 64) * np.cos(math.pi * np.arange(1, 14)[:, None] * (np.arange(64) + 0.5) / 64)
    made = basis @ bands
    assert made[2] == pytest.approx(math.sqrt(32)) and np.abs(np.delete(made, 2)).max() < 1e-12
    assert len(made) == cepstral.NUM_COEFFICIENTS


def drums(count: int):
    """Drum recordings of the demo set, with the rows that say what is in them."""
    made = [short_recording(index, 0) for index in range(4, 4 + 7 * count, 7)]
    assert {one.row["kind"] for one in made} == {"drums"}
    return made


def test_onsets_and_tempo_of_the_demo_sets_drums():
    f1, errors = [], []
    for one in drums(8):
        found = onsets_s(one.samples, SAMPLE_RATE_HZ)
        notes = np.unique([note["start_s"] for note in one.row["notes"]])
        f1.append(onset_f1(found, notes))
        errors.append(tempo_error(tempo_bpm(one.samples, SAMPLE_RATE_HZ), one.row["tempo_bpm"]))
    assert np.mean(f1) > 0.95
    assert np.median(errors) < 0.02


def test_onsets_match_once_and_in_time():
    assert onset_f1(np.array([0.1, 0.5]), np.array([0.12, 0.5])) == 1
    assert onset_f1(np.array([0.1, 0.11, 0.5]), np.array([0.1, 0.6])) == pytest.approx(0.4)
    assert onset_f1(np.array([]), np.array([])) == 1 and onset_f1(np.array([]), np.array([1.0])) == 0


def test_steady_sound_has_no_tempo():
    assert not len(onsets_s(np.zeros(24_000), 24_000))
    assert math.isnan(tempo_bpm(np.random.default_rng(0).standard_normal(48_000) * 0.1, 24_000))
    assert math.isnan(tempo_error(math.nan, 120)) and tempo_error(60, 120) == 0


def test_divergence_of_labels():
    p, q = np.array([0.5, 0.5]), np.array([0.9, 0.1])
    expected = torch.nn.functional.kl_div(torch.log(torch.tensor(q)), torch.tensor(p), reduction="sum")
    assert kl_divergence(q, p) == pytest.approx(float(expected)) and kl_divergence(p, 3 * p) == 0
    with pytest.raises(ValueError, match="labels do not compare"):
        kl_divergence(p, np.ones(3))


def test_label_metrics_merge_and_say_what_they_stand_on():
    def classify(sound):
        loud = float(np.abs(sound.samples).mean())
        return np.array([loud, 1 - loud])

    quiet, loud = (Audio(np.full((1, 10), level, np.float32), 8000) for level in (0.2, 0.9))
    metrics = [LabelDivergence(classify, "loudness") for _ in range(2)]
    metrics[0].update(quiet, quiet, {})
    metrics[1].update(quiet, loud, {})
    metrics[0].merge(metrics[1])
    assert metrics[0].details()["agreement"] == 0.5 and metrics[0].details()["classifier"] == "loudness"
    assert metrics[0].value() == pytest.approx(kl_divergence(classify(quiet), classify(loud)) / 2)
    text = TextAudioSimilarity(lambda sound: sound.samples[0, :2], lambda words: np.array([1.0, 0.0]), "two numbers")
    text.update(loud, None, {"text": "loud"})
    text.update(loud, None, {})
    assert text.value() == pytest.approx(math.sqrt(0.5)) and text.details()["count"] == 1


def test_a_folder_without_clap_is_refused(tmp_path):
    with pytest.raises(MissingDependency, match="holds no CLAP"):
        clap_similarity(tmp_path)
