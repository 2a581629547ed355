"""Two to eight ranks on one host, every collective; and connections that are made once."""
import numpy as np
import psutil
import pytest

import pyfleet

COUNTS = (0, 1, 7, 1009, 70_001)


def everything():
    """In a rank: every collective on arrays of awkward sizes, against what numpy says; how many calls that were."""
    rank, size = pyfleet.rank(), pyfleet.world_size()
    calls = 0
    for count in COUNTS:
        own = [np.random.default_rng(seed).integers(-50, 50, count).astype(np.float32) for seed in range(size)]
        total, mine = sum(own), own[rank].copy()
        x = mine.copy()
        pyfleet.all_reduce(x)
        assert np.array_equal(x, total)
        assert np.array_equal(pyfleet.all_reduce_sum(mine), total)
        root = count % size
        x = mine.copy()
        pyfleet.broadcast(x, root)
        assert np.array_equal(x, own[root])
        x = mine.copy()
        pyfleet.reduce(x, dst=root)
        assert rank != root or np.array_equal(x, total)
        assert all(map(np.array_equal, pyfleet.all_gather(mine), own))
        gathered = pyfleet.gather(mine, dst=root)
        assert (gathered is None) if rank != root else all(map(np.array_equal, gathered, own))
        assert np.array_equal(pyfleet.scatter(own if rank == root else None, src=root), own[rank])
        part = total[count * rank // size:count * (rank + 1) // size]
        assert np.array_equal(pyfleet.reduce_scatter(mine), part)
        swapped = pyfleet.all_to_all(np.array_split(mine, size))
        assert all(map(np.array_equal, swapped, [np.array_split(each, size)[rank] for each in own]))
        pyfleet.barrier()
        calls += 10
    return calls


@pytest.mark.feature("P1")
@pytest.mark.parametrize(("size", "transport"), [*((size, "shm") for size in range(2, 9)), *((size, "tcp") for size in (2, 5, 8))])
def test_every_collective_is_right_with_two_to_eight_ranks(fresh_ranks, size, transport):
    assert fresh_ranks(size, transport).run(everything) == [10 * len(COUNTS)] * size


def connections():
    """In a rank: its TCP connections, by both ends' ports."""
    return sorted((each.laddr.port, each.raddr.port) for each in psutil.Process().net_connections("tcp")
                  if each.status == psutil.CONN_ESTABLISHED)


@pytest.mark.feature("P32")
def test_collectives_share_the_connections_that_were_made_at_the_start(ranks):
    group = ranks(3, "tcp")
    before = group.run(connections)
    assert all(len(there) >= 4 for there in before)
    group.run(everything)
    assert group.run(connections) == before
