"""Draws follow the distribution, truncation keeps what it says, and a row's draw is its own."""

import numpy as np
import pytest
import torch

from avray.nn.sampling import Draw, Drawer, uniforms


def numbers_of(seeds, step: int, streams: int) -> np.ndarray:
    return np.concatenate([uniforms(seed, step, 1, streams) for seed in seeds])


def many(logits: list[float], how: Draw, num: int = 4000) -> np.ndarray:
    """Frequencies of each id over ``num`` seeds."""
    rows = torch.tensor(logits).expand(num, 1, -1)
    ids = Drawer([how] * num)(rows, numbers_of(range(num), 3, 1))
    return np.bincount(ids[:, 0].numpy(), minlength=len(logits)) / num


def test_frequencies_are_the_probabilities():
    logits = [0.0, 1.0, -1.0, 2.0]
    np.testing.assert_allclose(many(logits, Draw()), torch.tensor(logits).softmax(0), atol=0.03)
    np.testing.assert_allclose(many(logits, Draw(temperature=2.0)), (torch.tensor(logits) / 2).softmax(0), atol=0.03)


def test_temperature_0_takes_the_likeliest():
    assert many([0.0, 1.0, 3.0, 2.0], Draw(temperature=0.0)).tolist() == [0, 0, 1, 0]


def test_top_k_keeps_the_k_likeliest():
    np.testing.assert_allclose(many([0.0, 1.0, 3.0, 3.0], Draw(top_k=2)), [0, 0, 0.5, 0.5], atol=0.03)


@pytest.mark.parametrize("mass, kept", [(0.45, 1), (0.55, 2), (0.85, 3), (1.0, 4)])
def test_top_p_keeps_the_fewest_that_reach_the_mass(mass, kept):
    logits = np.log([0.5, 0.3, 0.15, 0.05]).tolist()
    assert (many(logits, Draw(top_p=mass)) > 0).sum() == kept


def test_top_p_counts_after_top_k():
    logits = np.log([0.5, 0.3, 0.15, 0.05]).tolist()
    assert (many(logits, Draw(top_k=2, top_p=0.62)) > 0).sum() == 1


def test_a_row_is_drawn_the_same_in_any_company():
    logits = torch.randn(5, 3, 40, generator=torch.Generator().manual_seed(0))
    numbers = numbers_of(range(5), 7, 3)
    company = [Draw(), Draw(top_k=3), Draw(temperature=1.3), Draw(temperature=0.0), Draw(top_p=0.5, temperature=0.7)]
    together = Drawer(company)(logits, numbers)
    for i, how in enumerate(company):
        assert torch.equal(Drawer([how])(logits[i : i + 1], numbers[i : i + 1])[0], together[i])


def test_uniforms_are_a_function_of_seed_step_and_stream():
    run = uniforms(7, 5, 10, 4)
    assert np.array_equal(run[3:4], uniforms(7, 8, 1, 4))
    assert len(np.unique(np.concatenate([run, uniforms(8, 5, 10, 4)]))) == 80
    assert np.array_equal(uniforms(2**64 + 7, 5, 10, 4), run)
    assert run.min() > 0 and run.max() < 1


def test_uniforms_are_uniform_and_unrelated():
    seeds = numbers_of(range(2000), 0, 4)
    np.testing.assert_allclose(np.quantile(seeds, [0.1, 0.5, 0.9]), [0.1, 0.5, 0.9], atol=0.02)
    assert np.abs(np.corrcoef(seeds.T) - np.eye(4)).max() < 0.08
    steps = uniforms(1, 0, 2000, 1)[:, 0]
    assert abs(np.corrcoef(steps[:-1], steps[1:])[0, 1]) < 0.08


@pytest.mark.parametrize("wrong", [dict(temperature=-1.0), dict(temperature=float("nan")), dict(top_k=0),
                                   dict(top_p=0.0), dict(top_p=1.5), dict(top_p=float("nan"))])
def test_bad_options_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Draw(**wrong)
