"""The executor over real sockets, with threads of one process as its ranks; faults come from tests.faults."""
import os
import socket
import time

import numpy as np
import pytest
from fleetcore.executor import Executor
from fleetcore.group import Group
from fleetcore.transports.loopback import LoopbackLink
from fleetcore.transports.secure import SecureLink
from fleetcore.transports.tcp import TcpLink

from fleetcore.errors import CommunicationError, ConfigError, CorruptData, OutOfStep, PeerLost, ReduceOp, Timeout
from pyfleet.identity import ciphers
from tests.faults import faulty_pair
from tests.fleetcore.test_domain import everyone
from tests.fleetcore.transports.test_links import PAIRS


def sealed(near, far):
    """The same pair of links, sealed."""
    cipher = ciphers.cipher(ciphers.choose(ciphers.offered(), ciphers.offered()))
    keys = [os.urandom(cipher.key_bytes) for _ in range(2)]
    return SecureLink(near, cipher, *keys), SecureLink(far, cipher, *reversed(keys))


def mesh(size, *, kind="loopback", chunk_bytes=4096, timeout=20.0, fault=None, after=0, on="data"):
    """One Group per rank over a full mesh. `fault` strikes the stream from rank 0 to rank 1 after so many bytes."""
    links = {(a, b, use): None for a in range(size) for b in range(size) for use in ("data", "control")}
    for a in range(size):
        for b in range(a + 1, size):
            for use in ("data", "control"):
                if fault and (a, b, use) == (0, 1, on):
                    near, far, _ = faulty_pair(fault, after)
                    pair = TcpLink(near, b), TcpLink(far, a)
                elif kind in ("secure", "striped"):
                    pair = PAIRS[kind](a, b)
                elif kind == "tcp":
                    with socket.create_server(("127.0.0.1", 0)) as server:
                        near = socket.create_connection(server.getsockname())
                        pair = TcpLink(near, b), TcpLink(server.accept()[0], a)
                else:
                    pair = LoopbackLink.pair(a, b)
                if kind == "secure":
                    pair = sealed(*pair)
                links[a, b, use], links[b, a, use] = pair
    return [Group(rank, size, timeout=timeout, executor=Executor(
        rank, [links[rank, p, "data"] for p in range(size)], [links[rank, p, "control"] for p in range(size)],
        chunk_bytes=chunk_bytes)) for rank in range(size)]


@pytest.mark.parametrize("kind", ("loopback", "tcp"))
@pytest.mark.parametrize("algorithm", ("ring", "direct", "tree"))
@pytest.mark.parametrize("size", (2, 3, 4, 7))
def test_all_reduce_around_every_chunk_boundary(kind, algorithm, size):
    members = mesh(size, kind=kind)

    def work(rank):
        for count in (0, 1, size - 1, size, size + 1, 1023, 1024, 1025, 1024 * size, 1024 * size + 1, 100_003):
            pattern = (np.arange(count) % 251).astype(np.float32)
            x = pattern * (rank + 1)
            members[rank].all_reduce(x, ReduceOp.SUM, algorithm=algorithm)
            assert np.array_equal(x, pattern * (size * (size + 1) // 2)), count
            x[:] = pattern * size * (rank + 1)
            members[rank].all_reduce(x, ReduceOp.MEAN, algorithm=algorithm)
            assert np.array_equal(x, pattern * (size * (size + 1) // 2)), count
    assert everyone(work, size) == [None] * size


@pytest.mark.parametrize("size", (2, 5))
def test_broadcast_and_barrier(size):
    members = mesh(size)

    def work(rank):
        for src in range(size):
            for count in (0, 1, 4096, 4097, 50_001):
                x = np.full(count, rank, np.uint8)
                members[rank].broadcast(x, src)
                assert (x == src).all()
            members[rank].barrier()
    assert everyone(work, size) == [None] * size


def test_half_floats_are_rounded_once_on_every_algorithm():
    # 2048 + 1 is not a float16: hop by hop each 1 would be lost, in float32 three of them make 2052.
    for algorithm in ("ring", "direct", "tree"):
        members = mesh(4)
        values = [np.full(100, v, np.float16) for v in (2048, 1, 1, 2)]
        everyone(lambda rank, m=members, v=values, a=algorithm: m[rank].all_reduce(v[rank], algorithm=a), 4)
        assert all((v == 2052).all() for v in values), algorithm


def test_direct_folds_in_rank_order():
    members = mesh(3)
    values = [np.full(5000, v, np.float32) for v in (1e8, -1e8, 1.0)]
    everyone(lambda rank: members[rank].all_reduce(values[rank], algorithm="direct"), 3)
    assert all((v == 1.0).all() for v in values)


def test_headers_are_under_one_percent():
    members = mesh(2, chunk_bytes=256 * 1024)
    x = [np.ones(1_000_000, np.float32) for _ in range(2)]
    everyone(lambda rank: members[rank].all_reduce(x[rank]), 2)
    sent = members[0].stats()["links"][1]["sent_bytes"]
    assert 4_000_000 < sent < 4_040_000


POINTS = (0, 1, 63, 64, 65, 64 + 4095, 64 + 4096, 2 * (64 + 4096) + 100, 200_000)


@pytest.mark.parametrize("after", POINTS)
@pytest.mark.parametrize("size", (2, 3))
def test_a_cut_link_is_a_lost_peer_wherever_it_is_cut(size, after):
    members = mesh(size, fault="cut", after=after)

    def work(rank):
        x = np.ones(300_000, np.float32)
        with pytest.raises(PeerLost) as caught:
            for _ in range(3):
                members[rank].all_reduce(x)
        return caught.value.rank
    assert set(everyone(work, size)[:2]) <= {0, 1}       # each end names the other, or what the other end reported


@pytest.mark.parametrize("after", POINTS)
def test_a_damaged_byte_is_noticed_wherever_it_is(after):
    members = mesh(2, fault="corrupt", after=after)

    def work(rank):
        x = np.ones(300_000, np.float32)
        with pytest.raises((CorruptData, OutOfStep)) as caught:
            for _ in range(3):
                members[rank].all_reduce(x)
        return type(caught.value)
    assert everyone(work, 2)[0] in (CorruptData, OutOfStep)


def test_a_damaged_notice_is_noticed():
    members = mesh(2, fault="corrupt", after=20, on="control")
    with pytest.raises(Timeout):
        members[0].barrier(timeout=0.1)                  # tells rank 1 so
    with pytest.raises(CorruptData, match="rank 0"):
        members[1].barrier(timeout=10)


@pytest.mark.parametrize("after", (0, 100, 5000, 150_000))
def test_a_stalled_link_is_a_timeout_that_names_the_peer(after):
    members = mesh(3, fault="stall", after=after, timeout=0.3)

    def work(rank):
        x = np.ones(300_000, np.float32)
        with pytest.raises(Timeout) as caught:
            members[rank].all_reduce(x)
        return caught.value.rank is not None
    started = time.monotonic()
    assert everyone(work, 3) == [True] * 3
    assert time.monotonic() - started < 5


def test_a_verdict_reaches_ranks_that_are_not_neighbours():
    members = mesh(5, timeout=20)

    def work(rank):
        if rank == 2:
            members[2].close()
            return 2
        with pytest.raises(PeerLost, match="rank 2") as caught:
            members[rank].all_reduce(np.ones(100_000), algorithm="ring")
        return caught.value.rank
    assert everyone(work, 5) == [2] * 5


def test_a_rank_that_leaves_after_its_last_call_harms_nobody():
    members = mesh(4)

    def work(rank):
        for count in (1, 10_000, 100_000):
            x = np.ones(count, np.float32)
            members[rank].all_reduce(x, algorithm="ring")
            assert (x == 4).all()
        members[rank].close()
    for _ in range(20):
        members = mesh(4)
        assert everyone(work, 4) == [None] * 4


def test_inputs_survive_a_call_that_never_matched():
    members = mesh(2)

    def work(rank):
        x = np.full(100_000 + rank, 7, np.float32)
        with pytest.raises(OutOfStep):
            members[rank].all_reduce(x)
        assert (x == 7).all()
    assert everyone(work, 2) == [None] * 2


def test_ranks_that_only_wait_for_each_other_learn_that_they_are_out_of_step():
    members = mesh(3)

    def work(rank):
        members[rank].barrier()
        with pytest.raises(OutOfStep, match=f"dst={rank}"):      # roots of their own trees: all receive, nobody sends
            members[rank].reduce(np.ones(3), rank, algorithm="tree", timeout=20)
    started = time.monotonic()
    assert everyone(work, 3) == [None] * 3
    assert time.monotonic() - started < 5


def test_a_dead_group_keeps_saying_why():
    members = mesh(2)
    members[1].close()
    for _ in range(2):
        with pytest.raises(CommunicationError, match="rank 1"):
            members[0].all_reduce(np.ones(10))
    members[0].close()


def test_waiting_sleeps():
    members = mesh(2)

    def work(rank):
        if rank == 0:
            before = time.thread_time()
            members[0].barrier()
            return time.thread_time() - before
        time.sleep(0.5)                                  # the rank that is late, not a wait for an event
        members[1].barrier()
        return None
    assert everyone(work, 2)[0] < 0.02


def test_chunks_are_reduced_and_passed_on_while_others_are_on_the_wire():
    chunk, num_chunks = 64 * 1024, 32
    members = mesh(2, kind="tcp", chunk_bytes=chunk)
    count = 2 * num_chunks * chunk // 4                          # each rank owns num_chunks of them

    def work(rank):
        x = np.ones(count, np.float32)
        members[rank].all_reduce(x, algorithm="ring")
        members[rank].executor.record(1000)
        members[rank].all_reduce(x, algorithm="ring")
        events = members[rank].executor.recorded()
        members[rank].executor.record(0)
        assert members[rank].executor.recorded() == []
        return events
    for events in everyone(work, 2):
        sends, receives, folds = ([event for event in events if event[0] == what] for what in ("send", "receive", "fold"))
        assert len(sends) == len(receives) == 2 * num_chunks and len(folds) == num_chunks
        assert sum(stop - start for _, _, start, stop, *_ in sends) == count * 4
        assert all(began <= ended for *_, began, ended, _ in events) and {event[1] for event in folds} == {None}
        # Full duplex: neither direction waits for the other to end. A chunk is reduced before the next but one is in, and
        # only what is reduced goes on.
        assert sends[0][5] < receives[-1][5] and receives[0][5] < sends[-1][5]
        assert all(fold[5] <= later[5] for fold, later in zip(folds, receives[2:], strict=False))
        assert all(any(fold[2:4] == send[2:4] and fold[5] <= send[5] for fold in folds) for send in sends[num_chunks:])


@pytest.mark.parametrize("kind", ("tcp", "secure", "striped"))
def test_a_short_chunk_after_long_ones_wakes_the_receiver(kind):
    members = mesh(3, kind=kind, chunk_bytes=512 * 1024, timeout=20)

    def work(rank):
        for count in (300_000, 131_073, 131_072 * 3 + 5, 400_001):            # 512 KiB chunks and a rest of a few bytes
            for _ in range(20):
                x = np.ones(count, np.float32)
                members[rank].broadcast(x, algorithm="ring")
                members[rank].all_reduce(x, algorithm="tree")
                members[rank].all_reduce(x, algorithm="ring")
                assert (x == 9).all()
    assert everyone(work, 3) == [None] * 3


def test_chunk_sizes_are_checked():
    for chunk in (0, 63, 100, 2 << 30):
        with pytest.raises(ConfigError, match="chunk_bytes"):
            Executor(0, [None], [None], chunk_bytes=chunk)
