"""Segment shares for unequal links: the least time there is, found by closed form and checked by trying."""
import random
from itertools import pairwise, product

import pytest

from fleetcore.schedules.base import SAME_SPEED, cut, shares_around, shares_for


def cost(shares, bandwidths):
    return max((1 + (len(shares) - 2) * share) / bandwidth for share, bandwidth in zip(shares, bandwidths, strict=True))


def grid(size, steps):
    """All shares that are multiples of 1 / steps."""
    for parts in product(range(steps + 1), repeat=size - 1):
        if sum(parts) <= steps:
            yield [*(part / steps for part in parts), 1 - sum(parts) / steps]


@pytest.mark.parametrize("bandwidths", [
    (1, 2, 4), (10, 1, 1.5), (100, 1, 1), (3, 2, 2), (8, 7, 6), (1, 1, 1.2),
    (10, 10, 10, 1), (4, 3, 2, 1), (100, 1, 2, 3), (9, 8, 7, 6), (5, 1, 5, 1), (1, 1, 1, 100),
])
def test_no_shares_on_a_grid_are_quicker(bandwidths):
    shares = shares_for(bandwidths)
    assert sum(shares) == pytest.approx(1) and min(shares) >= 0
    best = min(cost(tried, bandwidths) for tried in grid(len(bandwidths), 60 if len(bandwidths) == 3 else 30))
    assert cost(shares, bandwidths) <= best * (1 + 1e-12)
    assert best <= cost(shares, bandwidths) + (len(bandwidths) - 2) / 30 / min(bandwidths)         # the grid comes near


@pytest.mark.parametrize("seed", range(200))
def test_the_time_is_that_of_all_links_together_or_of_the_slowest_alone(seed):
    """Both are lower bounds: 2N-2 arrays cross all links in all, and every rank moves at least one."""
    dice = random.Random(seed)
    size = dice.randrange(3, 65)
    bandwidths = [1.1 ** dice.randrange(1, 40) for _ in range(size)]
    shares = shares_for(bandwidths)
    assert sum(shares) == pytest.approx(1) and min(shares) >= 0
    bound = max((2 * size - 2) / sum(bandwidths), 1 / min(bandwidths))
    slack = SAME_SPEED if len({*bandwidths}) < 2 else 1
    assert cost(shares, bandwidths) <= bound * slack * (1 + 1e-9)
    order = sorted(zip(bandwidths, shares, strict=True))
    assert all(one[1] <= other[1] + 1e-12 for one, other in pairwise(order))       # never more for a slower link


def test_a_slow_link_gets_nothing_and_costs_one_array():
    assert shares_for([1e9, 1e9, 1e9, 1e8]) == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0])
    assert cost(shares_for([1e9, 1e9, 1e9, 1e8]), [1e9, 1e9, 1e9, 1e8]) == 1 / 1e8
    assert shares_for([1, 1000, 1]) == [0, 1, 0]


@pytest.mark.parametrize("size", range(2, 65))
def test_links_that_are_nearly_equal_get_exactly_equal_shares(size):
    dice = random.Random(size)
    for bandwidths in ([7.0] * size, [dice.uniform(100, 104.9) for _ in range(size)]):
        shares = shares_for(bandwidths)
        assert shares == [1 / size] * size
        assert max(shares_for([*bandwidths, 1.0])[:-1]) == pytest.approx(1 / size)
        assert cost(shares, bandwidths) <= SAME_SPEED * max((2 * size - 2) / sum(bandwidths), 1 / min(bandwidths))


def test_two_ranks_share_equally_as_it_makes_no_difference():
    assert shares_for([1, 100]) == [0.5, 0.5] and shares_for([3]) == [1]


def test_order_and_unit_do_not_matter():
    bandwidths = [4.0, 1.0, 9.0, 2.0, 6.0]
    shares = shares_for(bandwidths)
    assert shares_for(bandwidths[::-1]) == shares[::-1]
    assert shares_for([1024 * bandwidth for bandwidth in bandwidths]) == shares


@pytest.mark.parametrize("bandwidths", ([], [1, 0, 1], [1, -1, 1], [1, float("nan"), 1], [1, float("inf"), 1]))
def test_bandwidths_that_are_none_are_refused(bandwidths):
    with pytest.raises(ValueError, match="bandwidths"):
        shares_for(bandwidths)


def test_shares_around_a_root_leave_it_out():
    assert shares_around(4, 2) == [1, 1, 0, 1] and shares_around(1, 0) == [1]
    assert cut(9, 4, shares_around(4, 0)) == [0, 0, 3, 6, 9]
