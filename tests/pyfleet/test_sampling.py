import pytest

from pyfleet.engines import set_current
from pyfleet.errors import NotInitialized
from pyfleet.sampling import DistributedSampler


class Place:
    rank, world_size = 1, 3


@pytest.mark.feature("A20")
def test_the_place_is_that_of_the_fleet_unless_given():
    set_current(Place())
    try:
        sampler = DistributedSampler(range(10), [1, 2, 1], 7)
        assert (sampler.rank, sampler.world_size, sampler.seed, len(sampler)) == (1, 3, 7, 5)
        sampler = DistributedSampler(range(10), rank=0, world_size=2)
        assert (sampler.rank, sampler.world_size) == (0, 2)
    finally:
        set_current(None)


def test_without_a_fleet_it_says_so():
    set_current(None)
    with pytest.raises(NotInitialized, match="pyfleet.init"):
        DistributedSampler(range(10))
    assert len(DistributedSampler(10, rank=0, world_size=1)) == 10
