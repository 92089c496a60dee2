"""Flow matching: levels, grids, solvers on a field with a known answer, and guidance."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from avray.nn.flow import Walk, best_linear_loss, draw_levels, guided, mixed


@given(steps=st.integers(1, 60), sway=st.floats(-1, 1), solver=st.sampled_from(["euler", "midpoint", "heun"]))
def test_grids_fall_from_one_to_nothing(steps, sway, solver):
    walk = Walk(steps, solver, sway)
    levels = walk.levels()
    assert len(levels) == steps + 1 and levels[0] == 1 and levels[-1] == pytest.approx(0, abs=1e-12)
    assert all(a > b for a, b in itertools.pairwise(levels))
    assert all(0 <= level <= 1 for index in range(steps) for level in walk.asked(index))


def test_sway_makes_the_first_steps_small():
    assert Walk(10, sway=0.0).levels()[1] == pytest.approx(0.9)
    assert Walk(10, sway=-1.0).levels()[1] == pytest.approx(math.cos(math.pi / 20))


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("midpoint", 2), ("heun", 2)])
def test_solvers_have_their_order(solver, order):
    """Data N(0, 0.5²) and noise N(0, 1): the exact field carries x(1) to 0.5 x(1)."""

    def velocity(x, s):
        variance = (1 - s) ** 2 * 0.25 + s**2
        return x * (s - (1 - s) * 0.25) / variance

    def error(steps):
        walk, x = Walk(steps, solver, sway=0.0), torch.ones(1, 1, 1, dtype=torch.float64)
        for index in range(steps):
            x = walk.step(x, index, velocity)
        return abs(float(x) - 0.5)

    assert error(64) < 0.02
    assert math.log2(error(64) / error(128)) > order - 0.2


def test_a_solver_asks_only_where_it_says():
    for solver in ("euler", "midpoint", "heun"):
        walk, asked = Walk(3, solver), []

        def velocity(x, level, asked=asked):
            asked.append(level)
            return x

        for index in range(3):
            walk.step(torch.zeros(1, 2, 2), index, velocity)
        assert asked == [level for index in range(3) for level in walk.asked(index)]


def test_the_best_linear_guess_is_the_best():
    generator = torch.Generator().manual_seed(0)
    data, noise = (torch.randn(20_000, 4, 2, generator=generator) for _ in range(2))
    levels = draw_levels(20_000, generator, "cpu")
    x, s = mixed(data, noise, levels), levels[:, None, None]
    guess = (s - (1 - s)) / ((1 - s) ** 2 + s**2) * x
    assert float((guess - (noise - data)).square().mean()) == pytest.approx(best_linear_loss(), rel=0.02)


def test_guidance_weighs_and_rescales():
    branches = torch.randn(3, 5, 2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(guided(branches, [1 - 2.0, 2.0 - 3.0, 3.0], 0.0),
                               branches[0] + 2 * (branches[1] - branches[0]) + 3 * (branches[2] - branches[1]))
    assert float(guided(branches, [-2, 1, 2], 1.0).std()) == pytest.approx(float(branches[2].std()), rel=1e-5)
    torch.testing.assert_close(guided(branches[:1], [1.0], 0.7), branches[0])


@pytest.mark.parametrize("wrong", [{"num_steps": 0}, {"num_steps": 10**6}, {"solver": "rk4"}, {"sway": math.nan},
                                   {"rescale": 2.0}])
def test_a_bad_walk_is_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Walk(**wrong)
