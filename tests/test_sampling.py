"""Draws follow the distribution, truncation keeps what it says, and a row's draw is its own."""

import numpy as np
import pytest
import torch

from avray.nn.sampling import Draw, draw, uniforms


def many(logits: list[float], how: Draw, num: int = 4000) -> np.ndarray:
    """Frequencies of each id over ``num`` seeds."""
    rows = torch.tensor(logits).expand(num, 1, -1)
    ids = draw(rows, uniforms(range(num), [3] * num, 1), [how] * num)
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
    numbers = uniforms(range(5), range(5), 3)
    alone = [draw(logits[i : i + 1], numbers[i : i + 1], [Draw()])[0] for i in range(5)]
    company = [Draw(), Draw(top_k=3), Draw(), Draw(temperature=0.0), Draw(top_p=0.5, temperature=0.7)]
    together = draw(logits, numbers, company)
    assert torch.equal(together[0], alone[0])
    assert torch.equal(together[2], alone[2])


def test_uniforms_are_a_function_of_seed_step_and_stream():
    both = uniforms([7, 8], [5, 5], 4)
    assert np.array_equal(both[:1], uniforms([7], [5], 4))
    assert len(np.unique(np.concatenate([both, uniforms([7, 8], [6, 6], 4)]))) == 16
    assert np.array_equal(uniforms([2**64 + 7], [5], 4), both[:1])
    assert 0 < both.min() and both.max() < 1


def test_uniforms_are_uniform_and_unrelated():
    numbers = uniforms(range(2000), [0] * 2000, 4)
    np.testing.assert_allclose(np.quantile(numbers, [0.1, 0.5, 0.9]), [0.1, 0.5, 0.9], atol=0.02)
    assert np.abs(np.corrcoef(numbers.T) - np.eye(4)).max() < 0.08
    steps = uniforms([1] * 2000, range(2000), 1)[:, 0]
    assert abs(np.corrcoef(steps[:-1], steps[1:])[0, 1]) < 0.08


@pytest.mark.parametrize("wrong", [dict(temperature=-1.0), dict(temperature=float("nan")), dict(top_k=0), 
                                   dict(top_p=0.0), dict(top_p=1.5), dict(top_p=float("nan"))])
def test_bad_options_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Draw(**wrong)
