"""Residual k-means: deterministic, no dead centroids, as many as the data carries, the same codes in any batch."""

import time

import numpy as np
import pytest
import torch

from avray.codecs.rvq import ResidualKMeans, ResidualQuantizer


def clusters(num_frames: int, num_clusters: int, width: int = 16, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres = rng.normal(0, 5, (num_clusters, width))
    return (centres[rng.integers(0, num_clusters, num_frames)] + rng.normal(0, 0.1, (num_frames, width))).astype("f4")


@pytest.mark.parametrize(("num_frames", "expected"), [(1, 1), (10, 10), (100, 16), (3_000, 16), (10_000, 64),
                                                      (200_000, 1024)])
def test_as_many_centroids_as_the_data_carries(num_frames: int, expected: int) -> None:
    assert ResidualKMeans(8, 1024, 128).size_for(num_frames) == expected


def test_the_same_seed_gives_the_same_codebooks() -> None:
    data, fit = clusters(2_000, 40), ResidualKMeans(3, 32, 20).fit
    assert fit(data, 1).digest() == fit(data, 1).digest() != fit(data, 2).digest()


def test_every_centroid_is_used_and_stages_refine() -> None:
    data = clusters(4_000, 16)
    fitted = ResidualKMeans(4, 64, 8).fit(data, 0)
    quantizer = ResidualQuantizer.of(fitted, torch.device("cpu"))
    latents = torch.from_numpy(data.T.copy())[None]
    codes = quantizer.encode(latents)
    assert len(codes[0, 0].unique()) == 64
    error = [float((quantizer.decode(codes[:, :n]) - latents).square().mean()) for n in range(1, 5)]
    assert error == sorted(error, reverse=True) and error[0] < 0.05 * data.var()


def test_codes_are_the_nearest_centroids() -> None:
    data = clusters(300, 30)
    fitted = ResidualKMeans(2, 16, 1).fit(data, 0)
    codes = ResidualQuantizer.of(fitted, torch.device("cpu")).encode(torch.from_numpy(data.T.copy())[None])[0].numpy()
    residual = data.astype("f8")
    for stage, codebook in enumerate(fitted.arrays["codebooks"]):
        distances = ((residual[:, None] - codebook[None]) ** 2).sum(-1)
        np.testing.assert_array_equal(codes[stage], distances.argmin(1))
        residual = residual - codebook[codes[stage]]


def test_codes_are_the_same_in_any_batch() -> None:
    fitted = ResidualKMeans(3, 64, 4).fit(clusters(1_000, 300), 0)
    quantizer = ResidualQuantizer.of(fitted, torch.device("cpu"))
    latents = torch.randn(5, 16, 333, generator=torch.Generator().manual_seed(0)) * 5
    together = quantizer.encode(latents)
    for row in range(5):
        assert torch.equal(quantizer.encode(latents[row : row + 1, :, :200])[0], together[row, :, :200])
    assert quantizer.encode(latents[:, :, :0]).shape == (5, 3, 0)


def test_equal_frames_are_no_obstacle() -> None:
    fitted = ResidualKMeans(2, 8, 1).fit(np.ones((50, 4), np.float32), 0)
    assert np.isfinite(fitted.arrays["codebooks"]).all()


def test_no_frames_is_an_error() -> None:
    with pytest.raises(ValueError, match="No frames to learn codes from"):
        ResidualKMeans(2, 8, 1).fit(np.zeros((0, 4), np.float32), 0)


@pytest.mark.slow
def test_a_hundred_thousand_frames_take_seconds() -> None:
    data = np.random.default_rng(0).normal(size=(100_000, 128)).astype("f4")
    start = time.monotonic()
    ResidualKMeans(8, 1024, 256).fit(data, 0)
    assert time.monotonic() - start < 60


def test_a_round_trip_gets_better_with_codebooks() -> None:
    from avray.codecs.round_trip import round_trip_table
    from avray.codecs.spectral import Spectral
    from avray.media import Audio

    time_s = np.arange(3 * 16_000) / 16_000
    sweep = 0.3 * np.sin(2 * np.pi * (200 + 300 * time_s) * time_s).astype("f4")
    audio = Audio(np.stack([sweep, sweep]), 16_000)
    config = Spectral(num_codebooks=4, cardinality=16)
    latents = config.load().encode_batch([np.random.default_rng(0).normal(0, 0.1, 9_000).astype("f4"), sweep])
    codec = config.load("cpu", config.fit(np.concatenate(latents), 0))
    rows = round_trip_table(codec, audio)
    assert [row.codebooks for row in rows] == [1, 2, 4]
    assert [row.bits_per_second for row in rows] == [300, 600, 1200]
    distances = [row.spectral_distance_db for row in [*rows, *round_trip_table(codec, audio, [0])]]
    assert distances == sorted(distances, reverse=True) and len(set(distances)) == 4
    assert rows[0].audio.samples.shape == (1, 72_000) and rows[0].audio.sample_rate_hz == 24_000
    with pytest.raises(ValueError, match="5 codebooks asked for, but the codec has 4"):
        round_trip_table(codec, audio, [5])
    with pytest.raises(ValueError, match="no codes before it is fitted"):
        round_trip_table(config.load(), audio)
