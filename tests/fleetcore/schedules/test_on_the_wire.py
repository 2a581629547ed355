"""What schedules promise, counted at the sockets of real ranks."""
import numpy as np
import pytest

import pyfleet
from fleetcore.errors import ReduceOp
from fleetcore.schedules import SCHEDULES
from pyfleet import engines
from tests.fleetcore.test_domain import everyone
from tests.fleetcore.test_executor import mesh

COUNT = 200_003


def star(count):
    """(sent, received) bytes of this rank during one all-reduce round root 0, once its result has been checked."""
    def totals():
        links = engines.current().stats()["links"].values()
        return np.array([sum(link[way] for link in links) for way in ("sent_bytes", "received_bytes")])
    x = np.arange(count, dtype=np.float32) % 17 * (pyfleet.rank() + 1)
    before = totals()
    pyfleet.all_reduce(x, algorithm="star")
    size = pyfleet.world_size()
    assert np.array_equal(x, np.arange(count, dtype=np.float32) % 17 * (size * (size + 1) // 2))
    return tuple(totals() - before)


@pytest.mark.feature("P12")
@pytest.mark.parametrize("size", (2, 3, 5))
def test_the_star_loads_its_root_with_two_arrays_per_leaf_and_each_leaf_with_one(ranks, size):
    root, *leaves = ranks(size, "tcp").run(star, COUNT)
    assert 1 <= sum(root) / (2 * (size - 1) * 4 * COUNT) < 1.01
    assert all(1 <= moved / (4 * COUNT) < 1.01 for leaf in leaves for moved in leaf)


@pytest.mark.parametrize("size", (2, 3, 5, 7))
@pytest.mark.parametrize("verb", ("all_reduce", "broadcast"))
def test_every_algorithm_crosses_chunk_boundaries(verb, size):
    members = mesh(size, chunk_bytes=4096)

    def work(rank):
        for algorithm in SCHEDULES[verb]:
            for count in (1, size - 1, size + 1, 1024, 1025, 1024 * size + 1, 30_011):
                pattern = (np.arange(count) % 251).astype(np.float32)
                x = pattern * (rank + 1)
                if verb == "broadcast":
                    members[rank].broadcast(x, size - 1, algorithm=algorithm)
                    assert np.array_equal(x, pattern * size), (algorithm, count)
                    continue
                members[rank].all_reduce(x, algorithm=algorithm)
                assert np.array_equal(x, pattern * (size * (size + 1) // 2)), (algorithm, count)
                x[:] = pattern * size * (rank + 1)
                members[rank].all_reduce(x, ReduceOp.MEAN, algorithm=algorithm)
                assert np.array_equal(x, pattern * (size * (size + 1) // 2)), (algorithm, count)
    assert everyone(work, size) == [None] * size


@pytest.mark.parametrize("algorithm", SCHEDULES["all_reduce"])
def test_half_floats_are_rounded_once(algorithm):
    # 2048 + 1 is not a float16: hop by hop each 1 would be lost, in float32 the sum of them all is 2054.
    members = mesh(5)
    values = [np.full(101, value, np.float16) for value in (2048, 1, 1, 2, 2)]
    everyone(lambda rank: members[rank].all_reduce(values[rank], algorithm=algorithm), 5)
    assert all((value == 2054).all() for value in values)
