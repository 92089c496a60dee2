"""Recipes: what they do to a sound, and that they reach the frozen network."""

import numpy as np
import pytest
import torch

from avray.data import recipes
from avray.data.cache import Cache
from avray.data.embed import Embedder
from avray.data.plan import make_shard
from avray.family import Column, Example, Unit
from avray.media import Audio, write_audio
from tests.tiny_codec import RATE_HZ, TinyConfig

RATE = 24_000
TONE = (0.3 * np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE)).astype(np.float32)


def snr_db(noisy, clean):
    return 10 * np.log10(np.mean(clean**2) / np.mean((noisy - clean) ** 2))


@pytest.mark.parametrize("wanted", [-5.0, 0.0, 12.5])
def test_noise_is_as_loud_as_it_says_and_the_same_again(wanted):
    made = [recipes.apply(f"noise:snr_db={wanted:g}:seed={seed}", TONE, RATE) for seed in (1, 1, 2)]
    assert snr_db(made[0], TONE) == pytest.approx(wanted, abs=1e-3) and made[0].dtype == np.float32
    assert np.array_equal(made[0], made[1]) and not np.array_equal(made[0], made[2])


def test_another_recording_as_noise(tmp_path):
    write_audio(tmp_path / "a:b=c.wav", Audio(np.sign(TONE[None, :5000]) * 0.1, 12_000))
    made = recipes.apply(f"noise:snr_db=0:seed=3:source={tmp_path / 'a:b=c.wav'}", TONE, RATE)
    assert len(made) == len(TONE) and snr_db(made, TONE) == pytest.approx(0, abs=1e-3)


def test_a_low_rate_keeps_what_lies_below_half_of_it():
    high = (0.3 * np.sin(2 * np.pi * 6000 * np.arange(RATE) / RATE)).astype(np.float32)
    made = recipes.apply("lowpass:rate_hz=8000", TONE + high, RATE)
    assert len(made) == RATE and np.abs(made - TONE)[1000:-1000].max() < 1e-3


@pytest.mark.parametrize("wrong", ["reverb:x=1", "noise:snr_db=0", "noise:snr_db=loud:seed=1", "lowpass:rate_hz=0"])
def test_a_recipe_that_cannot_be_followed_is_named(wrong):
    with pytest.raises(ValueError, match=wrong.partition(":")[0]):
        recipes.apply(wrong, TONE, RATE)


def test_units_of_one_span_with_and_without_a_recipe_are_two(tmp_path):
    write_audio(tmp_path / "tone.wav", Audio(TONE[None, :RATE_HZ], RATE_HZ))
    clean = Unit(str(tmp_path / "tone.wav"), "audio", 0.0, 1.0)
    noisy = Unit(clean.source, "audio", 0.0, 1.0, "noise:snr_db=0:seed=1")
    shard = make_shard([Example("a", {"output": clean, "sound": noisy})], {clean.source: "hash"})
    column, cache = Column("latents", TinyConfigEncoder()), Cache(str(tmp_path / "cache"))
    assert Embedder(column, cache).ensure(shard) and len(set(shard.keys)) == 2
    first, second = (cache.read(shard, column)[index] for index in (0, 1))
    assert first.shape == second.shape and np.abs(first.astype(float) - second.astype(float)).max() > 0.05


class TinyConfigEncoder:
    def column_id(self):
        return "tiny"

    def load(self, device: torch.device | str):
        return TinyConfig().load(device)
