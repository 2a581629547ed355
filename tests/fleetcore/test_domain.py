"""The host domain, with threads of one process as its ranks: every path, awkward sizes, waiting, verdicts.

Processes as ranks, and their deaths, are in tests/pyfleet and tests/e2e.
"""
import os
import threading
import time

import numpy as np
import pytest
from fleetcore.arena import Arena
from fleetcore.domain import Domain, board_bytes
from fleetcore.group import Group

from fleetcore.errors import ConfigError, OutOfStep, PeerLost, ReduceOp, Timeout

MIB = 1 << 20


def groups(size, path="auto", timeout=20.0):
    """One Group per rank over one domain, and the arena of each rank."""
    made, arenas = domains_of(size, path)
    return [Group(rank, size, domain=made[rank], timeout=timeout) for rank in range(size)], arenas


def domains_of(size, path="auto", names=None):
    """The Domains of one host, and the arena of each rank."""
    arenas = [Arena(64 * MIB) for _ in range(size)]
    board = arenas[0].allocate(board_bytes(size))
    memoryview(board)[:] = bytes(len(board))
    made = []
    for rank in range(size):
        mapped = [arenas[p] if p == rank else Arena.attach(arenas[p].fd, 64 * MIB) for p in range(size)]
        made.append(Domain(mapped, rank, board.offset, [os.getpid()] * size, board=board, path=path, names=names))
    everyone(lambda rank: made[rank].connect(20.0), size)
    return made, arenas


def everyone(act, size):
    """act(rank) in a thread per rank; results in rank order, exceptions in place of results."""
    results = [None] * size

    def one(rank):
        try:
            results[rank] = act(rank)
        except BaseException as error:      # noqa: BLE001 pytest's own failures, too
            results[rank] = error
    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a rank hangs"
    for result in results:
        if isinstance(result, (AssertionError, pytest.fail.Exception)):
            raise result
    return results


@pytest.mark.parametrize("path", ("cma", "staging", "arena"))
@pytest.mark.parametrize("size", (1, 2, 3, 5, 8))
def test_all_reduce_around_every_threshold(path, size):
    if size == 1:
        members, arenas = [Group(0, 1)], [Arena(64 * MIB)]
    else:
        members, arenas = groups(size, "auto" if path == "arena" else path)

    def work(rank):
        for nbytes in (0, 4, 24, 28, 8124, 8128, 8132, 64 * 1024, 256 * 1024 - 4, 512 * 1024 + 4, MIB + 12, 2_100_004):
            count = nbytes // 4
            if path == "arena":
                x = np.frombuffer(arenas[rank].allocate(max(1, nbytes)), np.float32, count)
            else:
                x = np.empty(count, np.float32)
            pattern = (np.arange(count) % 251).astype(np.float32)
            x[:] = pattern * (rank + 1)
            members[rank].all_reduce(x, ReduceOp.SUM)
            assert np.array_equal(x, pattern * (size * (size + 1) // 2)), (path, nbytes)
    assert everyone(work, size) == [None] * size


def test_large_calls_try_every_way_and_stay_right():
    members, _ = groups(2)

    def work(rank):
        for turn in range(40):                           # more than it takes to try all ways, in parts and whole
            count = (300_000, 2_500_000)[turn % 2]
            x = np.full(count, rank + turn, np.float32)
            x[-1] = 5
            members[rank].all_reduce(x)
            assert (x[:-1] == 2 * turn + 1).all() and x[-1] == 10, turn
    assert everyone(work, 2) == [None] * 2


@pytest.mark.parametrize("path", ("cma", "staging"))
def test_broadcast_around_every_threshold(path):
    members, _ = groups(3, path)

    def work(rank):
        for src in range(3):
            for count in (0, 1, 24, 25, 8128, 8129, 512 * 1024 + 1, 1_600_001):
                x = np.full(count, rank, np.uint8)
                members[rank].broadcast(x, src)
                assert (x == src).all()
    assert everyone(work, 3) == [None] * 3


def test_the_fold_is_in_rank_order():
    for path in ("cma", "staging"):
        members, _ = groups(3, path)
        values = [np.full(5000, v, np.float32) for v in (1e8, -1e8, 1.0)]
        everyone(lambda rank, members=members, values=values: members[rank].all_reduce(values[rank]), 3)
        assert all((v == 1.0).all() for v in values)     # (1e8 - 1e8) + 1; any other order loses the 1


def test_a_rank_that_does_not_come_is_named_at_the_deadline():
    members, _ = groups(3)

    def work(rank):
        if rank != 1:
            started = time.monotonic()
            with pytest.raises(Timeout, match=r"waiting for rank 1 .*barrier") as caught:
                members[rank].barrier(timeout=0.2)
            assert caught.value.rank == 1 and 0.15 < time.monotonic() - started < 5
            with pytest.raises(Timeout, match="dead since an earlier call"):
                members[rank].barrier()
    everyone(work, 3)
    with pytest.raises(Timeout, match="reported by rank"):
        members[1].barrier()                             # the late one learns what the others decided


def test_leaving_wakes_those_who_wait():
    members, _ = groups(2)

    def work(rank):
        if rank == 0:
            with pytest.raises(PeerLost, match="rank 1 has left") as caught:
                members[0].barrier()
            return caught.value.rank
        threading.Event().wait(0.05)
        members[1].close()
        members[1].close()
        return None
    assert everyone(work, 2) == [1, None]


def test_closing_ends_a_call_of_another_thread():
    members, _ = groups(2)
    waiting = threading.Thread(target=lambda: pytest.raises(PeerLost, members[0].barrier))
    waiting.start()
    threading.Event().wait(0.05)
    members[0].close()
    waiting.join(5)
    assert not waiting.is_alive()


def test_mismatched_calls_name_both_sides():
    members, _ = groups(2)

    def work(rank):
        with pytest.raises(OutOfStep) as caught:
            members[rank].all_reduce(np.zeros(10 + rank), ReduceOp.MAX)
        return str(caught.value)
    messages = everyone(work, 2)
    assert "rank 0 called all_reduce(float64[10], max) while rank 1 called all_reduce(float64[11], max)" in messages[0]
    assert "rank 1 called all_reduce(float64[11], max) while rank 0 called all_reduce(float64[10], max)" in messages[1]


def test_waiting_sleeps():
    members, _ = groups(2)

    def work(rank):
        if rank == 0:
            before = time.thread_time()
            members[0].barrier()
            return time.thread_time() - before
        threading.Event().wait(0.5)
        members[1].barrier()
        return None
    assert everyone(work, 2)[0] < 0.02


def test_an_unknown_path_is_refused():
    arena = Arena(64 * MIB)
    with pytest.raises(ConfigError, match="same_host"):
        Domain([arena], 0, 0, [1], path="telepathy")
