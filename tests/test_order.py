import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avray.data.order import Order, num_lanes

orders = st.builds(
    Order,
    shard_rows=st.lists(st.integers(1, 40), min_size=1, max_size=12).map(tuple),
    batch_size=st.integers(1, 48),
    seed=st.integers(0, 2**32),
    window_rows=st.integers(1, 200),
)


def all_rows(order):
    return {(shard, row) for shard, count in enumerate(order.shard_rows) for row in range(count)}


@settings(max_examples=60, deadline=None)
@given(orders, st.integers(0, 5))
def test_every_row_once_per_epoch_and_only_the_last_step_is_padded(order, epoch):
    steps = [order.step(epoch, s) for s in range(order.steps_per_epoch)]
    rows = [tuple(row) for step in steps for row in step if row[0] >= 0]
    assert sorted(rows) == sorted(all_rows(order))
    for step in steps[:-1]:
        assert (step >= 0).all()
    assert all(len(step) == order.batch_size for step in steps)


@settings(max_examples=40, deadline=None)
@given(orders)
def test_blocks_are_of_constant_length_and_are_what_steps_read(order):
    for epoch, round_index, lane in order.blocks(0):
        block = order.block(epoch, lane, round_index)
        assert block.shape == (order.block_rows, 2)
        first = round_index * order.steps_per_round
        for offset in range(min(order.steps_per_round, order.steps_per_epoch - first)):
            step = order.step(0, first + offset)
            mine = step[lane * order.rows_per_lane : (lane + 1) * order.rows_per_lane]
            part = block[offset * order.rows_per_lane : (offset + 1) * order.rows_per_lane]
            assert np.array_equal(mine, part)


@settings(max_examples=40, deadline=None)
@given(orders)
def test_dealing_blocks_round_robin_gives_each_rank_its_own_lanes(order):
    for workers in (w for w in range(1, order.lanes + 1) if order.lanes % w == 0):
        for index, (_, _, lane) in enumerate(order.blocks(0)):
            assert index % workers == lane % workers


def test_an_epoch_differs_from_the_next_and_repeats_by_seed():
    order = Order((30, 30, 30), 10, seed=3)
    assert not np.array_equal(order.step(0, 0), order.step(1, 0))
    assert np.array_equal(order.step(1, 4), Order((30, 30, 30), 10, seed=3).step(1, 4))
    assert not np.array_equal(order.step(0, 0), Order((30, 30, 30), 10, seed=4).step(0, 0))


def test_golden_order_is_stable():
    """Changing this order breaks the resume of every run in flight."""
    order = Order((3, 4, 2), 4, seed=7, window_rows=8)
    assert order.step(0, 0).tolist() == GOLDEN


def test_without_shuffling_rows_come_in_order():
    order = Order((3, 3), 2, shuffle=False)
    assert [tuple(r) for s in range(3) for r in order.step(0, s)] == [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2)]


@pytest.mark.parametrize(("batch_size", "lanes"), [(1, 1), (12, 12), (512, 256), (300, 150), (257, 1)])
def test_lanes_divide_the_batch(batch_size, lanes):
    assert num_lanes(batch_size) == lanes


def test_workers_that_cannot_share_the_lanes_are_refused_with_the_cure():
    with pytest.raises(ValueError, match=r"multiple of 3, or trainer.num_workers from \[1, 2, 4, 8, 16\]"):
        Order((100,), 16).check_workers(3)
    with pytest.raises(ValueError, match="trainer.accumulate=3"):
        Order((100,), 16).check_workers(2, accumulate=3)


def test_as_many_workers_as_share_the_lanes():
    order = Order((100,), 24)
    assert order.worker_counts(2, 8) == (2, 3, 4, 6, 8) and order.worker_counts(2, 8, accumulate=4) == (2, 3, 6)
    with pytest.raises(ValueError, match="which 7 workers cannot share evenly"):
        order.worker_counts(7, 7)


def test_a_thousand_million_rows_cost_no_memory():
    order = Order((10_000,) * 100_000, 256, seed=1)
    assert order.num_rows == 10**9
    assert len({tuple(r) for r in order.step(5, 1_000_000)}) == 256


GOLDEN = [[1, 1], [1, 3], [2, 0], [0, 1]]
