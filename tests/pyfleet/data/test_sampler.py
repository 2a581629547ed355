import itertools

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from pyfleet.data import DistributedSampler, global_order

CASES = [(n, weights) for n in (0, 1, 2, 5, 37, 100) for weights in
         ([1], [1, 1], [62, 38], [1, 1, 1], [3, 0, 5], [1] * 7, [0.5, 1.5, 8, 0.01])]


def samplers(n, weights, **options):
    return [DistributedSampler(n, weights, rank=rank, world_size=len(weights), **options)
            for rank in range(len(weights))]


@pytest.mark.feature("S19")
def test_global_order_is_a_function_of_length_seed_and_epoch():
    assert global_order(10, 42, 0).tolist() == [4, 8, 1, 9, 3, 6, 0, 7, 2, 5]   # written down: it must never change
    assert global_order(10, 42, 0).dtype == np.int64
    orders = {tuple(global_order(50, seed, epoch)) for seed in (0, 1, -1, 2**32) for epoch in (0, 1, 2)}
    assert len(orders) == 12
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert global_order(0, 1, 1).tolist() == []


@pytest.mark.feature("M21", "A20")
@pytest.mark.parametrize("n,weights", CASES)
@pytest.mark.parametrize("batch_size", [None, 1, 4, 32, 1000])
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_sample_comes_exactly_once(n, weights, batch_size, shuffle):
    parts = [list(s) for s in samplers(n, weights, batch_size=batch_size, shuffle=shuffle, seed=3)]
    assert sorted(itertools.chain(*parts)) == list(range(n))
    assert parts == [list(s) for s in samplers(n, weights, batch_size=batch_size, shuffle=shuffle, seed=3)]
    assert [len(s) for s in samplers(n, weights, batch_size=batch_size)] == [len(part) for part in parts]


@pytest.mark.feature("M21", "S19")
def test_the_order_changes_with_seed_and_epoch_only():
    def order(seed, epoch):
        sampler = DistributedSampler(100, seed=seed, rank=0, world_size=1)
        sampler.set_epoch(epoch)
        return list(sampler)
    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(2, 0)
    assert order(1, 0) != order(1, 1)


@pytest.mark.feature("M4")
@pytest.mark.parametrize("n", [100, 1000])
def test_shares_follow_the_weights(n):
    first, second = samplers(n, [62, 38])
    assert (len(first), len(second)) == (n * 62 // 100, n * 38 // 100)
    for (mine, count), (theirs, _) in zip(*(s.batches() for s in samplers(n, [62, 38], batch_size=50)), strict=True):
        assert (len(mine), len(theirs), count) == (31, 19, 50)


@pytest.mark.parametrize("n", [1, 7, 64, 65, 131])
@pytest.mark.parametrize("weights", [[1], [1, 1], [62, 38], [1, 1, 1], [1, 0, 5], [1] * 9])
def test_the_kth_global_batch_is_the_same_set_for_any_fleet(n, weights):
    order = global_order(n, 5, 2)
    parts = samplers(n, weights, seed=5, batch_size=16)
    for sampler in parts:
        sampler.set_epoch(2)
    steps = list(zip(*(s.batches() for s in parts), strict=True))
    assert len(steps) == parts[0].num_batches == -(-n // 16)
    for k, step in enumerate(steps):
        batch = order[16 * k:16 * k + 16]
        assert np.concatenate([indices for indices, _ in step]).tolist() == batch.tolist()
        assert {count for _, count in step} == {len(batch)}


def test_a_rank_may_get_none_of_a_batch():
    steps = list(samplers(9, [1, 1, 1], batch_size=4)[2].batches())
    assert [(len(indices), count) for indices, count in steps] == [(1, 4), (1, 4), (0, 1)]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_batches_resume_in_a_fleet_of_another_size(world_size):
    before = samplers(50, [1, 1], seed=9, batch_size=8)
    seen = []
    for sampler in before:
        sampler.set_epoch(4)
        batches = sampler.batches()
        seen += [index for _ in range(3) for index in next(batches)[0]]
    state = before[0].state_dict()
    after = samplers(50, [1] * world_size, seed=9, batch_size=8)
    for sampler in after:
        sampler.load_state_dict(state)
        sampler.set_epoch(4)                                # as a training loop does; the position stays
    assert sum(len(sampler) for sampler in after) == 50 - len(seen)
    rest = [index for sampler in after for indices, _ in sampler.batches() for index in indices]
    assert sorted(seen + rest) == list(range(50))


def test_samples_resume_where_they_stopped():
    sampler = DistributedSampler(20, rank=1, world_size=2)
    whole = list(sampler)
    iterator = iter(sampler)
    head = [next(iterator) for _ in range(4)]
    other = DistributedSampler(20, rank=1, world_size=2)
    other.load_state_dict(sampler.state_dict())
    assert len(other) == 6
    assert head + list(other) == whole
    assert list(other) == whole                             # the position was for one iteration


def test_a_finished_epoch_is_not_repeated_after_resuming():
    sampler = DistributedSampler(10, rank=0, world_size=1, batch_size=4)
    list(sampler.batches())
    other = DistributedSampler(10, rank=0, world_size=1, batch_size=4)
    other.load_state_dict(sampler.state_dict())
    assert len(other) == 0
    assert list(other.batches()) == []
    other.set_epoch(1)
    assert len(list(other.batches())) == 3


def test_a_foreign_state_is_refused():
    sampler = DistributedSampler(10, rank=0, world_size=2, seed=1)
    with pytest.raises(ValueError, match="length was 11 and is 10, seed was 2 and is 1"):
        sampler.load_state_dict(DistributedSampler(11, rank=0, world_size=2, seed=2).state_dict())
    with pytest.raises(ValueError, match="rank was 1 and is 0"):
        sampler.load_state_dict(DistributedSampler(10, rank=1, world_size=2, seed=1).state_dict())


@pytest.mark.feature("A20")
def test_it_serves_a_torch_data_loader():
    data = TensorDataset(torch.arange(23))
    seen = [x for rank in range(2) for batch in
            DataLoader(data, batch_size=4, sampler=DistributedSampler(data, rank=rank, world_size=2))
            for x in batch[0].tolist()]
    assert sorted(seen) == list(range(23))


@pytest.mark.parametrize("arguments,message", [
    ({"rank": 2, "world_size": 2}, "rank 2 is not in 0 .. 1"),
    ({"rank": 0, "world_size": 2, "weights": [1]}, "1 weights for 2 ranks"),
    ({"rank": 0, "world_size": 2, "weights": [0, 0]}, "at least one of them > 0"),
    ({"rank": 0, "world_size": 1, "batch_size": 0}, "batch_size must be >= 1"),
    ({}, "rank and world_size are needed"),
])
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        DistributedSampler(10, **arguments)
