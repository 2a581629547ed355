"""Every algorithm, every size up to 16, simulated: right results, the bytes and the rounds that it promises."""
from math import ceil, log2

import pytest

from fleetcore.schedules import SCHEDULES, direct, ring, tree
from fleetcore.schedules.base import FOLD, SEND, Row, cut
from tests.fleetcore.schedules.simulator import simulate

SIZES = range(1, 17)
COUNTS = (0, 1, 2, 7, 16, 61)


def single(rank, i):
    return frozenset([rank])


@pytest.mark.parametrize("algorithm", SCHEDULES["all_reduce"])
@pytest.mark.parametrize("size", SIZES)
def test_all_reduce_collects_every_contribution_once_everywhere(algorithm, size):
    schedule = {"ring": ring, "direct": direct, "tree": tree}[algorithm].all_reduce
    for count in COUNTS:
        arrays, _, _ = simulate([schedule(rank, size, count) for rank in range(size)], count, single)
        assert arrays == [[frozenset(range(size))] * count] * size


@pytest.mark.parametrize("size", SIZES)
def test_ring_moves_the_optimum_in_2n_minus_2_rounds(size):
    count = 16 * 15 * 14 * 13
    for module, rounds in ((ring, 2 * (size - 1)), (direct, 2 * (size > 1))):
        plans = [module.all_reduce(rank, size, count) for rank in range(size)]
        optimum = 2 * (size - 1) * count / size
        sent = [sum(row.stop - row.start for row in plan if row.kind == 0) for plan in plans]
        assert all(abs(one - optimum) <= 2 * size for one in sent)
        small = [module.all_reduce(rank, size, 32) for rank in range(size)]
        assert simulate(small, 32, single)[1] == rounds


@pytest.mark.parametrize("size", SIZES)
def test_reduce_scatter_and_all_gather_are_the_halves_of_the_ring(size):
    for count in COUNTS:
        bounds = cut(count, size)
        plans = [ring.reduce_scatter(rank, size, count) for rank in range(size)]
        arrays, _, _ = simulate(plans, count, single)
        for rank in range(size):
            segment = arrays[rank][bounds[rank]:bounds[rank + 1]]
            assert segment == [frozenset(range(size))] * len(segment)
        plans = [ring.all_gather(rank, size, count) for rank in range(size)]
        arrays, _, _ = simulate(plans, count, single)
        owners = [frozenset([rank]) for rank in range(size) for _ in range(bounds[rank], bounds[rank + 1])]
        assert arrays == [owners] * size


@pytest.mark.feature("C23")
@pytest.mark.parametrize("size", SIZES)
def test_broadcast_reaches_all_in_log2_rounds(size):
    for root in range(size):
        plans = [tree.broadcast(rank, size, 3, root) for rank in range(size)]
        arrays, _, sent = simulate(plans, 3, single)
        assert arrays == [[frozenset([root])] * 3] * size
        assert arrival(plans, root) == ceil(log2(size)) and sum(sent) == 3 * (size - 1)


def arrival(plans, rank, now=0):
    """When the last of rank's subtree has the message, if a rank sends one message per round."""
    children = [row.peer for row in plans[rank] if row.kind == SEND]
    return max([now, *(arrival(plans, child, now + k + 1) for k, child in enumerate(children))])


@pytest.mark.parametrize("size", SIZES)
def test_tree_all_reduce_takes_twice_log2_rounds(size):
    plans = [tree.all_reduce(rank, size, 2) for rank in range(size)]
    assert simulate(plans, 2, single)[1] <= 2 * ceil(log2(size))


@pytest.mark.parametrize("algorithm", SCHEDULES["all_reduce"])
@pytest.mark.parametrize("size", range(2, 17))
def test_a_mean_is_divided_exactly_once_per_element(algorithm, size):
    module = {"ring": ring, "direct": direct, "tree": tree}[algorithm]
    finals = [0] * 61
    for rank in range(size):
        folds = {row.fold: row for row in module.all_reduce(rank, size, 61) if row.kind == FOLD and row.final}
        for row in folds.values():
            for i in range(row.start, row.stop):
                finals[i] += 1
    assert finals == [1] * 61


def test_shares_cut_in_proportion_and_lose_nothing():
    assert cut(100, 4, [1, 1, 1, 0]) == [0, 33, 67, 100, 100]
    assert cut(10, 3) == [0, 3, 6, 10]
    for count in COUNTS:
        for shares in ([1, 2, 3], [0, 0, 1], [0.1, 0.7, 0.2]):
            bounds = cut(count, 3, shares)
            assert bounds[0] == 0 and bounds[-1] == count and bounds == sorted(bounds)
    shares = [3, 1, 0, 2]
    arrays, _, _ = simulate([ring.all_reduce(rank, 4, 40, shares) for rank in range(4)], 40, single)
    assert arrays == [[frozenset(range(4))] * 40] * 4


def test_the_simulator_notices_a_broken_schedule():
    plans = [ring.all_reduce(rank, 3, 9) for rank in range(3)]
    plans[1] = [row._replace(peer=0) if row.kind == 0 else row for row in plans[1]]
    with pytest.raises(AssertionError):
        simulate(plans, 9, single)
    with pytest.raises(AssertionError, match="twice"):
        simulate([[Row(FOLD, 1, 0, 4, -1, 0), Row(FOLD, 1, 0, 4, 0, 1)], [Row(SEND, 0, 0, 4), Row(SEND, 0, 0, 4)]], 4, single)
