"""Ray Data against the plain loader: the same order must give the same rows, whoever computes them."""

import numpy as np
import pytest

from avray.data.cache import Cache
from avray.data.loader import Loader, PreparedSource
from avray.data.plan import plan_split
from avray.data.stream import InOrder, Pool, StreamedSource, block_dataset, prepare
from avray.media import Limits
from tests.test_embed import column, wav
from tests.toy import ToyFamily

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    rows = [wav(folder / f"r{i}.wav", 3 + i % 5, i) for i in range(40)]
    return plan_split(ToyFamily(), rows, "train", shard_examples=8)


def steps(loader, source, epoch, first=0):
    return [(step.step, [b["x"].numpy() for b in step.micro_batches]) for step in loader.epoch(source, epoch, first)]


def same(a, b):
    return len(a) == len(b) and all(i == j and all(np.array_equal(x, y) for x, y in zip(p, q, strict=True))
                                    for (i, p), (j, q) in zip(a, b, strict=True))


@pytest.mark.parametrize(("workers", "actors"), [(1, 1), (3, 2)])
def test_streamed_rows_are_the_prepared_rows_in_the_same_order(ray_session, tmp_path, plan, workers, actors):
    cache = Cache(str(tmp_path / "cache"))
    order = plan.order(12, 5, 24)
    loaders = [Loader(order, lambda rows: ToyFamily().collate(rows, None), rank, workers, accumulate=2)
               for rank in range(workers)]
    dataset = block_dataset(plan, order, [column()], cache, Pool(size=actors, num_cpus=0.5), Limits(), 0, 0)
    iterators = InOrder().configure({"train": dataset}, workers)
    import concurrent.futures

    with concurrent.futures.ThreadPoolExecutor(workers) as ranks:
        streamed = list(ranks.map(lambda rank: steps(loaders[rank], StreamedSource(iterators[rank]["train"]), 0),
                                  range(workers)))
    assert cache.missing(plan, [column()]) == []
    prepared = PreparedSource(plan, order, cache, [column()])
    for rank in range(workers):
        assert same(streamed[rank], steps(loaders[rank], prepared, 0))
    assert sum(len(micro) for rank in streamed for _, micro in rank) == order.steps_per_epoch * workers * 2


def test_a_start_in_the_middle_streams_the_rest_and_the_next_epoch(ray_session, tmp_path, plan):
    cache = Cache(str(tmp_path / "cache"))
    order = plan.order(6, 1, 12)
    first = order.steps_per_epoch // 2
    loader = Loader(order, lambda rows: ToyFamily().collate(rows, None))
    dataset = block_dataset(plan, order, [column()], cache, Pool(num_cpus=0.5), Limits(), 2,
                            first // order.steps_per_round)
    source = StreamedSource(InOrder().configure({"train": dataset}, 1)[0]["train"])
    streamed = [steps(loader, source, 2, first), steps(loader, source, 3)]
    prepared = PreparedSource(plan, order, cache, [column()])
    assert same(streamed[0], steps(loader, prepared, 2, first))
    assert same(streamed[1], steps(loader, prepared, 3))


def test_preparing_twice_computes_once(ray_session, tmp_path, plan):
    cache = Cache(str(tmp_path / "cache"))
    told = []
    work = prepare(plan, [column()], cache, Pool(size=2, num_cpus=0.5), Limits(), lambda d, t: told.append((d, t)))
    assert work.computed == len(plan.shards) and work.seconds > 0
    assert told[-1] == (len(plan.shards), len(plan.shards))
    assert prepare(plan, [column()], cache, Pool(size=2, num_cpus=0.5), Limits()).computed == 0
