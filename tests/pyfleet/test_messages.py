"""send and recv between real processes."""
import time

import numpy as np
import pytest
import torch

import pyfleet

TRANSPORTS = ("shm", "tcp")
ARRAYS = (
    lambda: np.array(3.5, np.float32), lambda: np.zeros((0, 3), np.int8), lambda: np.arange(7, dtype=np.int64),
    lambda: torch.arange(12.).reshape(3, 4).t(), lambda: torch.full((5, 2), 1.5, dtype=torch.bfloat16),
    lambda: torch.tensor([True, False]), lambda: np.arange(1_000_003, dtype=np.float64), lambda: torch.ones(3, dtype=torch.complex64),
    lambda: np.zeros((2, 3, 4), np.uint8)[:, ::2],
)


def same(a, b):
    return type(a) is type(b) and a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all())


def any_array():
    rank, size = pyfleet.rank(), pyfleet.world_size()
    for k, make in enumerate(ARRAYS):
        if rank == 0:
            pyfleet.send(make(), 1, tag=k)
        elif rank == 1:
            assert same(pyfleet.recv(src=0, tag=k), make()), k
        pyfleet.barrier()
    x = np.full(1000, rank, np.float32)
    y = torch.zeros(2000)[::2]                                      # filled in place, though not contiguous
    work = pyfleet.isend(x, (rank + 1) % size)
    assert pyfleet.recv(y, (rank - 1) % size) is y and (y == (rank - 1) % size).all()
    work.wait()
    pyfleet.send(x, rank, tag=9)                                    # to oneself
    assert same(pyfleet.recv(src=rank, tag=9), x)


@pytest.mark.feature("M22", "C8")
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_any_array_arrives_as_it_was(ranks, transport):
    ranks(3, transport).run(any_array)


def from_whoever_is_first():
    rank, size = pyfleet.rank(), pyfleet.world_size()
    if rank:
        for k in range(20):
            pyfleet.send(np.array([rank, k]), 0)
        pyfleet.send(torch.tensor(rank), 0, tag=1)
        return None
    seen = {source: [] for source in range(1, size)}
    for _ in range(20 * (size - 1)):
        x, source = pyfleet.recv(return_source=True)
        assert x[0] == source
        seen[source].append(int(x[1]))
    assert all(numbers == list(range(20)) for numbers in seen.values())          # in order per pair
    ctx = pyfleet.DistributedContext()
    assert int(ctx.receive(source=size - 1, tag=1)) == size - 1                  # a chosen one, though others came first
    return sorted(int(ctx.receive(tag=1)) for _ in range(size - 2))


@pytest.mark.feature("C9")
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_any_source_takes_whoever_is_first(ranks, transport):
    assert ranks(4, transport).run(from_whoever_is_first)[0] == [1, 2]


def both_ways(count):
    rank = pyfleet.rank()
    x = pyfleet.zeros(count, like="numpy") + np.float32(rank)
    for _ in range(3):
        sent, received = pyfleet.isend(x, 1 - rank), pyfleet.irecv(src=1 - rank)
        y = np.ones(1000)
        pyfleet.all_reduce(y)                                       # collectives go on meanwhile
        assert (received.wait() == 1 - rank).all() and (y == 2).all()
        sent.wait()


@pytest.mark.parametrize("count", (1, 10_000, 5_000_000))
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_large_messages_both_ways_at_once(ranks, transport, count):
    ranks(2, transport).run(both_ways, count)


def misfits():
    rank = pyfleet.rank()
    for call in (lambda: pyfleet.send(np.ones(3), 2), lambda: pyfleet.recv(src=-1), lambda: pyfleet.send(np.ones(3), 0, tag=-1),
                 lambda: pyfleet.send([1, 2], 0), lambda: pyfleet.recv(timeout=-1)):
        with pytest.raises((pyfleet.ConfigError, pyfleet.DTypeError)):
            call()
    pyfleet.barrier()
    if rank == 0:
        for _ in range(2):
            pyfleet.send(np.ones(3), 1)
        pyfleet.send(np.arange(4.), 1)
    else:
        with pytest.raises(pyfleet.ShapeError, match="does not fit"):
            pyfleet.recv(np.zeros(4), 0)
        with pytest.raises(pyfleet.ShapeError, match="does not fit"):
            pyfleet.recv(np.zeros(3, np.float32), 0)
        assert (pyfleet.recv(src=0) == np.arange(4)).all()          # the misfits are lost, nothing else
    started = time.monotonic()
    with pytest.raises(pyfleet.Timeout):
        pyfleet.recv(src=1 - rank, tag=77, timeout=0.2)
    assert time.monotonic() - started < 2
    pyfleet.barrier()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_what_does_not_fit_is_refused(ranks, transport):
    ranks(2, transport).run(misfits)


def wait_for_the_dead():
    try:
        pyfleet.recv(src=2)
    except pyfleet.PeerLost as error:
        return error.rank


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_dead_sender_is_a_lost_peer(fresh_ranks, transport):
    group = fresh_ranks(3, transport)
    group.start(wait_for_the_dead, only=(0, 1))
    time.sleep(0.1)
    group.kill(2)
    assert group.collect((0, 1)) == [2, 2]


def in_a_group():
    rank = pyfleet.rank()
    group = pyfleet.new_group([2, 0])
    if rank == 0:
        pyfleet.send(np.array([5]), 2, group=group)
    elif rank == 2:
        x, source = pyfleet.recv(group=group, return_source=True)
        assert x[0] == 5 and source == 0                            # ranks keep their numbers of the fleet
    pyfleet.barrier()
    group.close()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_groups_have_their_own_messages(ranks, transport):
    ranks(3, transport).run(in_a_group)
