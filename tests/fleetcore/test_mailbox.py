"""Messages over real sockets, with threads of one process as ranks, and with processes where they have to be.

Faults come from tests.faults. "near" is a Unix socket between ranks that may read each other's memory.
"""
import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from fleetcore.arena import Pin
from fleetcore.mailbox import Mailbox, Request
from fleetcore.transports.tcp import TcpLink

from fleetcore.errors import (
    CommunicationError,
    ConfigError,
    CorruptData,
    DTypeError,
    FleetError,
    PeerLost,
    ShapeError,
    Timeout,
)
from tests.faults import faulty_pair
from tests.fleetcore.test_domain import everyone

ROOT = Path(__file__).parents[2]
KINDS = ("unix", "tcp", "near")
LETTER, CHUNK, AHEAD, NEAR = 56, 512 * 1024, 16 * 1024, 256 * 1024
MIB = 1 << 20


def connected(kind):
    """Two connected sockets."""
    if kind != "tcp":
        return socket.socketpair()
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        return near, server.accept()[0]


@pytest.fixture
def boxes():
    """boxes(size, kind="unix", fault=None, after=0, **settings): one Mailbox per rank, closed with the test.

    `fault` strikes the stream from rank 0 to rank 1 after so many bytes.
    """
    made, relays = [], []

    def get(size, kind="unix", *, fault=None, after=0, timeout=20.0, **settings):
        links = [[None] * size for _ in range(size)]
        for a in range(size):
            for b in range(a + 1, size):
                if fault and (a, b) == (0, 1):
                    one, other, relay = faulty_pair(fault, after)
                    relays.append(relay)
                else:
                    one, other = connected(kind)
                links[a][b], links[b][a] = TcpLink(one, b), TcpLink(other, a)
        if kind == "near":
            settings["pids"] = [os.getpid()] * size
        group = [Mailbox(rank, links[rank], timeout=timeout, **settings) for rank in range(size)]
        made.extend(group)
        return group
    yield get
    for box in made:
        box.close()
    for relay in relays:
        relay.close()


def note_of(x):
    return f"{x.dtype.str} {' '.join(map(str, x.shape))}".encode()


def empty_from(note):
    dtype, *shape = note.decode().split()
    return np.empty(tuple(map(int, shape)), dtype)


def pattern(count, seed=0):
    return ((np.arange(count, dtype=np.uint32) * 2654435761 + seed) >> 13).astype(np.uint8)


def same(a, b):
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


# ---- what arrives ----------------------------------------------------------------------------------------------------

DTYPES = ("f4", "f8", "f2", "i1", "i2", "i4", "i8", "u1", "?", "c8", "c16")
SHAPES = ((), (0,), (3, 0, 2), (1,), (7, 11), (2, 3, 5, 7), (65_537,))


@pytest.mark.parametrize("kind", KINDS)
def test_every_dtype_and_shape_arrives_as_it_was(boxes, kind):
    members = boxes(2, kind)
    arrays = [np.frombuffer(pattern(int(np.prod(shape)) * np.dtype(dtype).itemsize).tobytes(), dtype).reshape(shape)
              for dtype in DTYPES for shape in SHAPES]

    def work(rank):
        for tag, x in enumerate(arrays):
            if rank == 0:
                members[0].send(x, 1, tag, note_of(x))
            else:
                got, source = members[1].recv(empty_from, 0, tag)
                assert source == 0
                assert same(got, x)
    assert everyone(work, 2) == [None, None]


SIZES = (0, 1, 255, AHEAD - LETTER - 1, AHEAD - LETTER, AHEAD, NEAR - 1, NEAR, NEAR + 1, CHUNK - 1, CHUNK, CHUNK + 1,
         MIB + 1, 2 * MIB, 3 * CHUNK + 12_345, 9 * MIB + 1)


@pytest.mark.parametrize("posted", ("before", "after"))
@pytest.mark.parametrize("kind", KINDS)
def test_sizes_around_every_threshold_both_ways_at_once(boxes, kind, posted):
    members = boxes(2, kind, far_bytes=8 * MIB)
    meet = threading.Barrier(2)

    def work(rank):
        box, peer = members[rank], 1 - rank
        into = [np.zeros(size, np.uint8) for size in SIZES]

        def receive():
            return [box.irecv(lambda note, i=i: into[i], peer, tag=5) for i in range(len(SIZES))]
        receives = receive() if posted == "before" else None
        meet.wait(10)
        sends = [box.isend(pattern(size, rank), peer, tag=5) for size in SIZES]
        receives = receives or receive()
        for i, request in enumerate(receives):
            got, source = request.wait()
            assert source == peer
            assert got is into[i]
        assert [request.wait() for request in sends] == [None] * len(SIZES)
        for size, got in zip(SIZES, into, strict=True):
            assert np.array_equal(got, pattern(size, peer)), size
        stats = box.stats()
        assert stats["sent_bytes"] == stats["received_bytes"] == sum(SIZES)
        assert stats["sends"] == stats["receives"] == len(SIZES)
        assert stats["unread_bytes"] == {}
        meet.wait(10)
    assert everyone(work, 2) == [None, None]


def test_payload_goes_straight_to_its_place_and_headers_are_small(boxes):
    members = boxes(2)
    x = pattern(50_000_000)
    into = np.zeros_like(x)

    def work(rank):
        if rank == 0:
            members[0].send(x, 1)
        else:
            got, _ = members[1].recv(lambda note: into, 0)
            assert got is into
    assert everyone(work, 2) == [None, None]
    assert np.array_equal(into, x)
    sent = members[0].stats()["links"][1]["sent_bytes"]
    assert 50_000_000 < sent < 50_010_000


def test_a_neighbour_reads_large_messages_from_memory(boxes):
    members = boxes(2, "near")
    x = pattern(5_000_000)

    def work(rank):
        if rank == 0:
            return members[0].send(x, 1)
        return members[1].recv(lambda note: np.empty_like(x), 0)[0]
    assert np.array_equal(everyone(work, 2)[1], x)
    assert members[1].stats()["read_bytes"] == 5_000_000
    assert members[0].stats()["links"][1]["sent_bytes"] < 200


def test_memory_that_cannot_be_read_comes_over_the_socket(boxes):
    members = boxes(2, "near")
    child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    with child:                                          # rank 1 believes that rank 0 is this process
        a, b = socket.socketpair()
        members[0], members[1] = (Mailbox(0, [None, TcpLink(a, 1)], pids=[None, os.getpid()], timeout=20),
                                  Mailbox(1, [TcpLink(b, 0), None], pids=[child.pid, None], timeout=20))
        x = pattern(3_000_000)

        def work(rank):
            for _ in range(3):
                if rank == 0:
                    with contextlib.suppress(Timeout):
                        members[0].send(x, 1, timeout=0.2)
                else:
                    with contextlib.suppress(Timeout, CommunicationError):
                        got = members[1].recv(lambda note: np.empty_like(x), 0, timeout=0.3)[0]
                        assert np.array_equal(got, x)
            if rank == 0:
                members[0].send(np.arange(3), 1, tag=9)
            else:
                assert members[1].recv(lambda note: np.empty(3, int), 0, 9)[0].tolist() == [0, 1, 2]
        assert everyone(work, 2) == [None, None]
        child.stdin.close()
    for box in members:
        box.close()


@pytest.mark.parametrize("kind", KINDS)
def test_each_tag_keeps_its_order_and_tags_may_overtake(boxes, kind):
    members = boxes(2, kind)
    sizes = (10, 100_000, 0, 700_000, 33)

    def work(rank):
        if rank == 0:
            requests = [members[0].isend(pattern(size, seed=tag * 10 + turn), 1, tag)
                        for turn, size in enumerate(sizes) for tag in range(4)]
            for request in requests:
                request.wait()
        else:
            for tag in (3, 1, 0, 2):
                for turn, size in enumerate(sizes):
                    got, _ = members[1].recv(lambda note, n=size: np.empty(n, np.uint8), None if tag == 1 else 0, tag)
                    assert np.array_equal(got, pattern(size, seed=tag * 10 + turn)), (tag, turn)
    assert everyone(work, 2) == [None, None]


def test_tags_and_notes_at_their_limits(boxes):
    a, b = boxes(2)
    note = bytes(range(256))
    seen = []
    a.send(np.float32(1.5).reshape(()), 1, 2**31 - 1, note)
    got, _ = b.recv(lambda told: seen.append(told) or np.empty((), np.float32), 0, 2**31 - 1)
    assert (got, seen) == (1.5, [note])


def test_a_pin_can_be_sent_and_filled(boxes):
    a, b = boxes(2)
    x, y = np.arange(1000.0), np.zeros(1000)
    a.send(Pin.at(x.ctypes.data, 1000, Pin(x).dtype, x), 1)
    pin = Pin(y)
    got, _ = b.recv(lambda note: pin)
    assert got is pin
    assert np.array_equal(x, y)


@pytest.mark.parametrize("size", (1, 3))
@pytest.mark.parametrize("count", (0, 5, 100_000, 30_000))
def test_messages_to_oneself(boxes, size, count):
    box = boxes(size, unread_bytes=200_000)[0]
    first, second = pattern(count, 1), pattern(count, 2)
    box.send(first, 0, 7)                                # copied, so nobody has to receive it first
    copy, first[:] = first.copy(), 0
    requests = [box.isend(second, 0, 7), box.irecv(lambda note: np.empty(count, np.uint8), None, 7),
                box.irecv(lambda note: np.empty(count, np.uint8), 0, 7)]
    assert np.array_equal(requests[1].wait()[0], copy)
    assert np.array_equal(requests[2].wait()[0], second)
    assert requests[0].wait() is None
    large = box.isend(pattern(300_000), 0)               # beyond the bound it is lent until it is received
    assert not large.done()
    assert np.array_equal(box.recv(lambda note: np.empty(300_000, np.uint8), 0)[0], pattern(300_000))
    assert large.done()
    with pytest.raises(Timeout, match="rank 0"):
        box.send(pattern(300_000), 0, timeout=0.05)
    assert box.stats()["unread_bytes"] == {}


# ---- both directions, bounds -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_hundred_megabytes_each_way_at_once(boxes, kind):
    members = boxes(2, kind)
    x = pattern(100_000_000)

    def work(rank):
        sent = members[rank].isend(x, 1 - rank)
        got = members[rank].irecv(lambda note: np.empty_like(x), 1 - rank)
        sent.wait()
        assert np.array_equal(got.wait()[0], x)
    assert everyone(work, 2) == [None, None]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", (2, 5))
def test_send_right_then_receive_left_needs_only_the_bound(boxes, kind, size):
    members = boxes(size, kind, far_bytes=2 * MIB)

    def work(rank):
        for count in (100, 1_000_000, 4_000_000):
            members[rank].send(pattern(count, rank), (rank + 1) % size)
            left = (rank - 1) % size
            got, source = members[rank].recv(lambda note, n=count: np.empty(n, np.uint8), left)
            assert source == left
            assert np.array_equal(got, pattern(count, left))
    assert everyone(work, size) == [None] * size


@pytest.mark.parametrize("kind", KINDS)
def test_beyond_the_bound_a_send_waits_for_its_receive_and_names_the_peer(boxes, kind):
    members = boxes(2, kind, unread_bytes=MIB, far_bytes=4 * MIB)
    x = pattern(30 * MIB)

    def work(rank):
        with pytest.raises(Timeout, match=f"rank {1 - rank}") as caught:
            members[rank].send(x, 1 - rank, timeout=0.3)
        assert caught.value.rank == 1 - rank
        assert f"dst={1 - rank}" in caught.value.operation
        # The streams are still in order.
        members[rank].send(np.arange(5), 1 - rank, tag=1)
        assert members[rank].recv(lambda note: np.empty(5, int), 1 - rank, 1)[0].tolist() == [0, 1, 2, 3, 4]
    assert everyone(work, 2) == [None, None]


@pytest.mark.parametrize("kind", KINDS)
def test_a_large_message_that_nobody_asked_for_lets_others_pass(boxes, kind):
    members = boxes(2, kind, unread_bytes=MIB, far_bytes=2 * MIB)
    x = pattern(10 * MIB)

    def work(rank):
        if rank == 0:
            large = members[0].isend(x, 1, tag=0)
            members[0].send(np.arange(3), 1, tag=1)
            assert not large.done()
            members[0].send(np.arange(4), 1, tag=2)
            large.wait()
        else:
            assert members[1].recv(lambda note: np.empty(4, int), 0, 2)[0].tolist() == [0, 1, 2, 3]
            assert members[1].recv(lambda note: np.empty(3, int), None, 1)[0].tolist() == [0, 1, 2]
            assert np.array_equal(members[1].recv(lambda note: np.empty_like(x), 0, 0)[0], x)
    assert everyone(work, 2) == [None, None]


def test_a_receive_behind_what_nobody_asked_for_says_so(boxes):
    a, b = boxes(2, unread_bytes=100_000)
    requests = [a.isend(pattern(60_000), 1, tag=0) for _ in range(3)]
    a.isend(np.arange(2), 1, tag=1)
    stop = threading.Thread(target=lambda: [request.wait() for request in requests])
    stop.start()
    with pytest.raises(Timeout, match="which nobody has asked for"):
        b.recv(lambda note: np.empty(2, int), 0, 1, timeout=0.2)
    for _ in range(3):
        b.recv(lambda note: np.empty(60_000, np.uint8), 0, 0)
    stop.join(10)
    assert b.recv(lambda note: np.empty(2, int), 0, 1)[0].tolist() == [0, 1]


@pytest.mark.parametrize("kind", KINDS)
def test_ten_thousand_small_messages_in_bounded_memory(boxes, kind):
    bound = 400_000
    members = boxes(2, kind, unread_bytes=bound)
    total, held = 10_000, []
    reached = threading.Event()

    def work(rank):
        if rank == 0:
            with pytest.raises(Timeout, match="still under way"):      # nobody receives: it stops, long before the last
                for i in range(total):
                    last = members[0].isend(np.full(125, i), 1)
                    last.wait(0.3)
            reached.set()
            last.wait()
            for k in range(i + 1, total):
                members[0].send(np.full(125, k), 1)
            return i
        while not reached.is_set():
            members[1].progress(0.01)
            held.append(members[1].stats()["unread_bytes"].get(0, 0))
        for i in range(total):
            assert (members[1].recv(lambda note: np.empty(125, int), 0)[0] == i).all()
        return None
    stopped = everyone(work, 2)[0]
    assert 300 < stopped < total
    assert bound / 2 < max(held) <= bound
    assert members[1].stats()["unread_bytes"] == {}


def test_ten_thousand_posted_receives_and_sends(boxes):
    members = boxes(2)

    def work(rank):
        box = members[rank]
        if rank == 0:
            for request in [box.isend(np.array([i]), 1, tag=i % 7) for i in range(10_000)]:
                request.wait()
        else:
            receives = [box.irecv(lambda note: np.empty(1, int), 0, tag=i % 7) for i in range(10_000)]
            assert [int(request.wait()[0][0]) for request in receives] == list(range(10_000))
    assert everyone(work, 2) == [None, None]


# ---- any source ------------------------------------------------------------------------------------------------------


def test_any_source_takes_whoever_is_first(boxes):
    members = boxes(4)
    members[2].send(np.array([2]), 0)
    got, source = members[0].recv(lambda note: np.empty(1, int))
    assert (got[0], source) == (2, 2)
    for sender in (3, 1):
        members[sender].send(np.array([sender]), 0)
        members[0].progress()                            # heard in this order
    for sender in (3, 1):
        assert members[0].recv(lambda note: np.empty(1, int))[1] == sender


def test_any_source_is_fair_and_keeps_the_order_of_each_pair(boxes):
    members = boxes(4)
    for i in range(200):
        members[1].send(np.array([i]), 0)
    for i in range(3):
        members[2].send(np.array([i]), 0)
        members[3].send(np.array([i]), 0)
    order, heard = defaultdict(list), []
    for _ in range(206):
        got, source = members[0].recv(lambda note: np.empty(1, int))
        order[source].append(int(got[0]))
        heard.append(source)
    assert order == {1: list(range(200)), 2: [0, 1, 2], 3: [0, 1, 2]}
    # Rank 1 was first, but the k-th message of another waits for at most k + 1 of it.
    for peer in (2, 3):
        for k in range(3):
            at = [i for i, source in enumerate(heard) if source == peer][k]
            assert heard[:at].count(1) <= k + 2, heard[:12]


def test_a_flood_does_not_starve_others_while_everything_moves(boxes):
    members = boxes(3)
    stop = threading.Event()

    def work(rank):
        if rank == 1:
            while not stop.is_set():
                with contextlib.suppress(Timeout):
                    members[1].send(np.array([1]), 0, timeout=0.2)
        elif rank == 2:
            for i in range(20):
                members[2].send(np.array([i]), 0)
                members[2].recv(lambda note: np.empty(1, int), 0)
        else:
            sources = []
            while sources.count(2) < 20:
                _, source = members[0].recv(lambda note: np.empty(1, int))
                sources.append(source)
                if source == 2:
                    members[0].send(np.array([0]), 2)
            stop.set()
            return sources.count(1)
        return None
    assert everyone(work, 3)[0] > 5


def test_receives_match_in_the_order_in_which_they_were_posted(boxes):
    members = boxes(3)
    first = members[0].irecv(lambda note: np.empty(1, int), None)
    second = members[0].irecv(lambda note: np.empty(1, int), 1)
    third = members[0].irecv(lambda note: np.empty(1, int), 2)
    for value in (10, 11):
        members[1].send(np.array([value]), 0)
    members[2].send(np.array([20]), 0)
    assert first.wait(10) == (np.array([10]), 1)
    assert second.wait(10) == (np.array([11]), 1)
    assert third.wait(10) == (np.array([20]), 2)


# ---- giving up -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ("timeout", "cancel"))
@pytest.mark.parametrize("count", (700_000, 5_000_000))
def test_a_half_received_message_that_is_given_up_harms_nothing_after_it(boxes, how, count):
    a, b = boxes(2, far_bytes=4 * MIB)
    into = np.zeros(count, np.uint8)
    first = a.isend(pattern(count), 1)                   # some of it is out, or its offer: nobody drives a
    second = a.isend(pattern(1000, 3), 1)
    receive = b.irecv(lambda note: into, 0, timeout=0.1 if how == "timeout" else 20)
    while not b.stats()["links"][0]["received_bytes"]:
        b.progress(0.01)
    if how == "timeout":
        with pytest.raises(Timeout, match="rank 0") as caught:
            receive.wait()
        assert caught.value.done_bytes < count
    else:
        assert receive.cancel()
        assert not receive.cancel()
        with pytest.raises(CommunicationError, match="cancelled"):
            receive.wait()
    into[:] = 77
    sender = threading.Thread(target=lambda: (first.wait(), second.wait()))
    sender.start()
    assert np.array_equal(b.recv(lambda note: np.empty(1000, np.uint8), 0)[0], pattern(1000, 3))
    while sender.is_alive():
        b.progress(0.01)
    assert (into == 77).all()
    assert b.stats()["unread_bytes"] == {}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("posted", (True, False))
@pytest.mark.parametrize("count", (100_000, 3_000_000, 6_000_000))
def test_a_half_sent_message_that_is_given_up_harms_nothing_after_it(boxes, kind, posted, count):
    a, b = boxes(2, kind, near_bytes=65_536, far_bytes=5 * MIB)
    x = pattern(count)
    receive = b.irecv(lambda note: np.empty(count, np.uint8), 0) if posted else None
    first = a.isend(x, 1)
    while not first.done() and not a.stats()["links"][1]["sent_bytes"]:
        a.progress()
    given_up = first.cancel()                            # not when the kernel had room for all of it
    x[:] = 0
    second = a.isend(pattern(1000, 3), 1, tag=1)
    sender = threading.Thread(target=second.wait)
    sender.start()
    assert np.array_equal(b.recv(lambda note: np.empty(1000, np.uint8), 0, 1)[0], pattern(1000, 3))
    sender.join(10)
    last = a.isend(pattern(count, 9), 1)
    sender = threading.Thread(target=last.wait)
    sender.start()
    came = []
    while not came or not np.array_equal(came[-1], pattern(count, 9)):
        receive = receive or b.irecv(lambda note: np.empty(count, np.uint8), 0)
        try:
            came.append(receive.wait()[0])
        except CommunicationError as error:
            assert given_up, error
            assert "rank 0 gave up sending" in str(error)
        receive = None
    sender.join(10)
    assert [got.tobytes() for got in came[:-1]] in ([], [pattern(count).tobytes()])
    if kind == "near" or count > CHUNK:
        assert len(came) == 2 - given_up                 # what was given up is gone
    else:
        assert len(came) == 2                            # all of it was under way in one letter
    a.send(np.arange(3), 1, tag=2)
    assert b.recv(lambda note: np.empty(3, int), 0, 2)[0].tolist() == [0, 1, 2]


def test_an_offer_that_was_given_up_is_never_read(boxes):
    a, b = boxes(2, "near", unread_bytes=1000)
    x = pattern(MIB)
    for _ in range(5):
        with pytest.raises(Timeout):
            a.send(x, 1, timeout=0.02)
        x[:] = 0                                         # the caller has it back
    a.isend(pattern(MIB, 5), 1)
    got = b.irecv(lambda note: np.empty(MIB, np.uint8), 0)
    while not got.done():
        a.progress()
    assert np.array_equal(got.wait()[0], pattern(MIB, 5))


def test_a_wait_shorter_than_the_request_leaves_it_under_way(boxes):
    a, b = boxes(2)
    request = b.irecv(lambda note: np.empty(3, int), 0)
    with pytest.raises(Timeout, match="still under way after 0.02 s") as caught:
        request.wait(0.02)
    assert caught.value.rank == 0
    assert not request.done()
    a.send(np.arange(3), 1)
    assert request.wait(10)[0].tolist() == [0, 1, 2]
    assert request.wait(0)[1] == 0                       # as often as one likes


def test_a_timeout_names_whom_it_waited_for(boxes):
    members = boxes(3, places={1: "kitchen"})
    with pytest.raises(Timeout, match=r"rank 1 \(kitchen\) during recv\(src=1, tag=4\)") as caught:
        members[0].recv(lambda note: None, 1, 4, timeout=0.02)
    assert (caught.value.rank, caught.value.operation) == (1, "recv(src=1, tag=4)")
    with pytest.raises(Timeout, match="any rank") as caught:
        members[0].recv(lambda note: None, timeout=0.02)
    assert caught.value.rank is None


def test_what_make_raises_is_the_receives_and_only_its(boxes):
    a, b = boxes(2)
    sends = [a.isend(pattern(count), 1) for count in (10, 300_000, 10)]
    with pytest.raises(ZeroDivisionError):
        b.recv(lambda note: 1 // 0, 0)
    sender = threading.Thread(target=lambda: [request.wait() for request in sends])
    sender.start()
    with pytest.raises(ShapeError, match="rank 0 sent 300000 bytes, but the place for them has 8"):
        b.recv(lambda note: np.empty(8, np.uint8), 0)
    assert np.array_equal(b.recv(lambda note: np.empty(10, np.uint8), 0)[0], pattern(10))
    sender.join(10)
    a.send(np.arange(3), 1)
    with pytest.raises(DTypeError):
        b.recv(lambda note: "text", 0)
    read_only = np.zeros(3, int)
    read_only.flags.writeable = False
    a.send(np.arange(3), 1)
    with pytest.raises(ShapeError):
        b.recv(lambda note: read_only, 0)
    assert not read_only.any()


def test_make_may_post_but_not_wait(boxes):
    a, b = boxes(2)
    answers = []

    def make(note):
        answers.append(b.isend(np.array([7]), 0))
        return np.empty(1, int)
    a.send(np.array([1]), 1)
    assert b.recv(make, 0)[0] == [1]
    assert a.recv(lambda note: np.empty(1, int), 1)[0] == [7]
    answers[0].wait()
    a.send(np.array([1]), 1)
    with pytest.raises(FleetError, match="moving messages already"):
        b.recv(lambda note: b.recv(lambda other: np.empty(1, int), 0), 0)


def test_misuse_is_refused_before_anything_is_sent(boxes):
    a, _ = boxes(2)
    x = np.arange(3)
    for call in (lambda: a.send(x, 2), lambda: a.send(x, -1), lambda: a.send(x, 1, -1), lambda: a.send(x, 1, 2**31),
                 lambda: a.send(x, 1, note=bytes(257)), lambda: a.send(x, 1, timeout=0),
                 lambda: a.recv(lambda note: x, 2), lambda: a.recv(lambda note: x, 0, 2**31), lambda: a.recv(x),
                 lambda: a.recv(lambda note: x, timeout=-1), lambda: Mailbox(2, [None, None]),
                 lambda: Mailbox(0, [None], timeout=0), lambda: Mailbox(0, [None], far_bytes=0)):
        with pytest.raises(ConfigError):
            call()
    with pytest.raises(DTypeError):
        a.send("text", 1)
    with pytest.raises(ShapeError):
        a.send(np.zeros((4, 4))[:, 1], 1)
    with pytest.raises(TypeError):
        Request()
    assert a.stats()["links"][1]["sent_bytes"] == 0


# ---- faults ----------------------------------------------------------------------------------------------------------

TRAIN = (10, 0, 100_000, 700_000, 5_000_000, 10)
FIRST_TWO = 2 * LETTER + 10 + 6
POINTS = (0, 1, LETTER - 1, LETTER, LETTER + 1, LETTER + 3, LETTER + 3 + 10, FIRST_TWO, FIRST_TWO + LETTER + 50_000,
          FIRST_TWO + 2 * (LETTER + 3) + 100_000 + CHUNK, FIRST_TWO + 2 * (LETTER + 3) + 100_000 + CHUNK + 20,
          900_000, 2_000_000)


def receive_until_it_fails(box, kinds):
    """Receive the TRAIN, checking each message; (how many came, the error that ended it)."""
    for i, count in enumerate(TRAIN):
        try:
            got, _ = box.recv(lambda note, n=count: np.empty(n, np.uint8), 0)
        except kinds as error:
            return i, error
        assert np.array_equal(got, pattern(count, i))
    return len(TRAIN), None


@pytest.mark.parametrize("after", POINTS)
@pytest.mark.parametrize("fault", ("cut", "corrupt", "stall"))
def test_a_fault_anywhere_is_noticed_and_what_came_before_is_right(boxes, fault, after):
    members = boxes(2, fault=fault, after=after, timeout=20 if fault != "stall" else 0.5, far_bytes=4 * MIB)
    kind = {"cut": PeerLost, "corrupt": CorruptData, "stall": Timeout}[fault]

    def work(rank):
        if rank == 0:
            for i, count in enumerate(TRAIN):
                try:
                    members[0].send(pattern(count, i), 1, note=b"abc")
                except (PeerLost, Timeout) as error:
                    assert error.rank == 1
                    break
            return
        came, error = receive_until_it_fails(members[1], kind)
        assert error is not None
        assert error.rank == 0
        assert came == sum(after >= end for end in np.cumsum([LETTER + 3 + n for n in TRAIN[:4]])
                           + np.array([0, 0, 0, LETTER])), came
        if fault != "stall":                             # and it stays that way
            with pytest.raises(kind):
                members[1].recv(lambda note: np.empty(1), 0)
            with pytest.raises(CommunicationError):
                members[1].send(np.zeros(1), 0)
    assert everyone(work, 2) == [None, None]


@pytest.mark.parametrize("after", (3, LETTER + 2, LETTER + 10, 2 * (LETTER + 24) - 1))
def test_a_damaged_offer_is_noticed(boxes, after):
    members = boxes(2, "near", fault="corrupt", after=after)

    def work(rank):
        if rank == 0:
            with pytest.raises((PeerLost, CorruptData)):
                for _ in range(3):
                    members[0].send(pattern(MIB), 1)
        else:
            with pytest.raises(CorruptData, match="rank 0"):
                for _ in range(3):
                    members[1].recv(lambda note: np.empty(MIB, np.uint8), 0)
    assert everyone(work, 2) == [None, None]


@pytest.mark.parametrize("setting", ("epoch", "group"))
def test_messages_of_another_epoch_or_group_are_refused(setting):
    one, other = socket.socketpair()
    a = Mailbox(0, [None, TcpLink(one, 1)], timeout=10, **{setting: 1})
    b = Mailbox(1, [TcpLink(other, 0), None], timeout=10)
    a.isend(np.zeros(3), 1)
    with pytest.raises(CorruptData, match="rank 0"):
        b.recv(lambda note: np.empty(3), 0)
    a.close()
    b.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_peer_that_leaves_ends_what_needs_it_and_nothing_else(boxes, kind):
    members = boxes(4, kind)
    for i in range(5):
        members[1].send(np.array([i]), 0)
    waiting = members[0].irecv(lambda note: np.empty(1, int), 1, tag=9)
    anyone = members[0].irecv(lambda note: np.empty(1, int), None, tag=8)
    members[1].close()
    with pytest.raises(PeerLost, match=r"rank 1 has left.*recv\(src=1, tag=9\)") as caught:
        waiting.wait()
    assert caught.value.rank == 1
    for i in range(5):                                   # these had arrived
        assert members[0].recv(lambda note: np.empty(1, int), 1)[0] == [i]
    for call in (lambda: members[0].recv(lambda note: None, 1), lambda: members[0].send(np.zeros(1), 1)):
        with pytest.raises(PeerLost):
            call()
    members[2].send(np.array([5]), 0, tag=8)
    assert anyone.wait() == (np.array([5]), 2)
    anyone = members[0].irecv(lambda note: np.empty(1, int), None, tag=8)
    members[2].close()
    members[3].close()
    with pytest.raises(PeerLost, match="every rank that could have sent") as caught:
        anyone.wait()
    assert caught.value.rank is None
    with pytest.raises(PeerLost):
        members[0].recv(lambda note: None)
    members[0].send(np.array([1]), 0)                    # oneself is always there
    assert members[0].recv(lambda note: np.empty(1, int))[1] == 0


def test_closing_ends_all_waits(boxes):
    members = boxes(2)
    started = threading.Barrier(5)

    def work(rank):
        if rank == 4:
            started.wait(10)
            while members[0].stats()["receives"] < 1:
                pass
            members[0].close()
            members[0].close()
            return
        request = members[0].irecv(lambda note: np.empty(1), 1, tag=rank)
        started.wait(10)
        if rank == 3:
            members[1].send(np.zeros(1), 0, tag=3)       # so that all are surely waiting or about to
            assert request.wait()[1] == 1
            return
        with pytest.raises(FleetError, match="closed"):
            request.wait()
    assert everyone(work, 5) == [None] * 5
    for call in (lambda: members[0].send(np.zeros(1), 1), lambda: members[0].recv(lambda note: None),
                 lambda: members[0].isend(np.zeros(1), 0), members[0].progress, members[0].serve):
        with pytest.raises(FleetError, match="closed"):
            call()


def test_a_forked_child_gets_a_clear_error_and_disturbs_nothing(boxes):
    a, b = boxes(2)
    request = b.irecv(lambda note: np.empty(3, int), 0)
    child = os.fork()
    if child == 0:
        code = 0
        for call in (lambda: a.send(np.zeros(1), 1), lambda: b.recv(lambda note: None), request.wait, request.cancel,
                     b.progress, a.serve):
            try:
                call()
                code = 1
            except FleetError as error:
                code = code or 2 * ("parent" not in str(error))
        a.close()
        b.close()
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    a.send(np.arange(3), 1)
    assert request.wait(10)[0].tolist() == [0, 1, 2]


# ---- threads ---------------------------------------------------------------------------------------------------------


def test_many_threads_share_a_mailbox(boxes):
    members = boxes(2)
    turns = 300

    def work(thread):
        box, peer, tag = members[thread % 2], 1 - thread % 2, thread // 2
        for i in range(turns):
            if thread % 2:
                got, _ = box.recv(lambda note: np.empty(2, int), peer if tag % 2 else None, tag)
                assert got.tolist() == [tag, i]
                box.send(got, peer, tag)
            else:
                box.send(np.array([tag, i]), peer, tag)
                assert box.recv(lambda note: np.empty(2, int), peer, tag)[0].tolist() == [tag, i]
    assert everyone(work, 12) == [None] * 12


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_moves_messages_while_nobody_waits(boxes, kind):
    members = boxes(2, kind)
    servers = [threading.Thread(target=box.serve) for box in members]
    for server in servers:
        server.start()
    x = pattern(3_000_000)
    arrived = threading.Event()

    def make(note):
        arrived.set()
        return np.empty_like(x)
    receive = members[1].irecv(make, 0)
    send = members[0].isend(x, 1)
    assert arrived.wait(10)
    deadline = time.monotonic() + 10
    while not members[0].stats()["sends"] and time.monotonic() < deadline:
        time.sleep(0.001)                                # nobody drives but the servers
    assert members[0].stats()["sends"] == 1
    assert np.array_equal(receive.wait()[0], x)
    send.wait()
    for i in range(200):                                 # beside waits
        members[0].send(np.array([i]), 1)
        assert members[1].recv(lambda note: np.empty(1, int), 0)[0] == [i]
    for box in members:
        box.close()
    for server in servers:
        server.join(10)
        assert not server.is_alive()


def test_waiting_sleeps(boxes):
    members = boxes(2)

    def work(thread):
        box = members[thread % 2]
        if thread == 3:
            time.sleep(0.5)                              # the rank that is late, not a wait for an event
            for tag in (0, 2):
                box.send(np.zeros(1), 0, tag)
            return 0
        if thread == 1:
            return 0
        before = time.thread_time()
        box.recv(lambda note: np.empty(1), 1, tag=thread)
        return time.thread_time() - before
    assert max(everyone(work, 4)) < 0.03


# ---- processes -------------------------------------------------------------------------------------------------------

PEER = """
import os, signal, socket, sys
import numpy as np
from fleetcore.mailbox import Mailbox
from fleetcore.transports.tcp import TcpLink
near = sys.argv[2] == "near"
sock = socket.socket(fileno=int(sys.argv[1]))
box = Mailbox(1, [TcpLink(sock, 0), None], timeout=30, pids=[os.getppid(), None] if near else None)
def place(note):
    return np.empty(int(note), np.uint8)
def receive(src=0, tag=0):
    return box.recv(place, src, tag)[0]
"""


@contextlib.contextmanager
def process(kind, code):
    """(mailbox of rank 0 here, Popen of rank 1, which runs the code with `box`, `receive` and `place`)."""
    mine, theirs = connected(kind)
    child = subprocess.Popen([sys.executable, "-c", PEER + textwrap.dedent(code), str(theirs.fileno()), kind], cwd=ROOT,
                             pass_fds=[theirs.fileno()], env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    theirs.close()
    box = Mailbox(0, [None, TcpLink(mine, 1)], timeout=30, pids=[None, child.pid] if kind == "near" else None)
    try:
        yield box, child
    finally:
        box.close()
        child.kill()
        child.wait()


@pytest.mark.parametrize("kind", KINDS)
def test_between_processes(kind):
    with process(kind, """
        while True:
            x = receive()
            if not x.size:
                break
            box.send(x[::-1].copy(), 0, tag=1, note=str(x.size).encode())
        """) as (box, child):
        for count in (1, 1000, 100_000, 3_000_000, 70_000_000):
            x = pattern(count)
            box.send(x, 1, note=str(count).encode())
            assert np.array_equal(box.recv(lambda note: np.empty(int(note), np.uint8), 1, 1)[0], x[::-1])
        if kind == "near":
            assert box.stats()["read_bytes"] == 73_000_000
        box.send(x[:0], 1, note=b"0")
        assert child.wait(30) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_peer_is_lost_in_the_middle_of_a_message(kind):
    with process(kind, """
        def place(note):
            os.kill(os.getpid(), signal.SIGKILL)
        receive()
        """) as (box, child):
        with pytest.raises(PeerLost, match="rank 1") as caught:
            box.send(pattern(20_000_000), 1, note=b"20000000")
        assert caught.value.rank == 1
        with pytest.raises(PeerLost):
            box.recv(lambda note: None)
        assert child.wait(30) == -signal.SIGKILL


@pytest.mark.parametrize("others", (0, 1))
def test_ctrl_c_interrupts_a_wait_and_the_mailbox_goes_on(boxes, others):
    a, b = boxes(2)
    drivers = [threading.Thread(target=b.serve) for _ in range(others)]
    for thread in drivers:
        thread.start()
    ring = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
    into = np.zeros(3, int)
    ring.start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        b.recv(lambda note: into, 0)
    assert time.monotonic() - began < 5
    ring.join()
    a.send(np.arange(1, 4), 1)
    assert b.recv(lambda note: np.empty(3, int), 0)[0].tolist() == [1, 2, 3]
    assert not into.any()
    b.close()
    for thread in drivers:
        thread.join(10)


def test_a_signal_handler_may_close_but_not_wait(boxes):
    a, b = boxes(2)
    told = []

    def handler(number, frame):
        with pytest.raises(FleetError, match="moving messages already"):
            b.recv(lambda note: None, 0)
        told.append(number)
        b.close()
    before = signal.signal(signal.SIGUSR1, handler)
    try:
        ring = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGUSR1))
        ring.start()
        with pytest.raises(FleetError, match="closed"):
            b.recv(lambda note: None, 0)
        ring.join()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert told == [signal.SIGUSR1]
    with pytest.raises(PeerLost):
        a.recv(lambda note: None, 1)


# ---- everything at once ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
def test_random_traffic_against_a_model(boxes, seed):
    """Every rank sends a random script; what is received is, per pair and tag, exactly what was sent, in order."""
    chance = random.Random(seed)
    size, kind = chance.choice((2, 3, 5)), KINDS[seed % 3]
    members = boxes(size, kind, unread_bytes=chance.choice((20_000, 300_000, 64 * MIB)),
                    near_bytes=chance.choice((1, 5000, 200_000)), far_bytes=chance.choice((1, 100_000, 8 * MIB)))
    limit = chance.choice((300, 30_000, 1_000_000))
    script = [[(chance.randrange(size), chance.randrange(3), chance.choice((0, 1, chance.randrange(limit))))
               for _ in range(60)] for _ in range(size)]
    model = defaultdict(list)                            # (source, destination, tag) -> what comes, in this order
    for src in range(size):
        for number, (dst, tag, count) in enumerate(script[src]):
            model[src, dst, tag].append((number, count))

    def work(rank):
        dice, box = random.Random(seed * 100 + rank), members[rank]
        # Tag 2 is received from any source, the others from one.
        wanted = [(src, tag) for src in range(size) for tag in range(3) for _ in model[src, rank, tag]]
        dice.shuffle(wanted)
        sends, receives = [], []
        while len(sends) < len(script[rank]) or wanted:
            if len(sends) < len(script[rank]) and (not wanted or dice.random() < 0.5):
                number = len(sends)
                dst, tag, count = script[rank][number]
                sends.append(box.isend(pattern(count, rank * 1000 + number), dst, tag, f"{number} {count}".encode()))
            else:
                src, tag = wanted.pop()
                notes = []

                def make(note, notes=notes):
                    notes.append(tuple(map(int, note.split())))
                    return np.empty(notes[0][1], np.uint8)
                receives.append((box.irecv(make, None if tag == 2 else src, tag), src, tag, notes))
            if dice.random() < 0.2:
                dice.choice((box.progress, lambda: [done for done in sends if done.done()]))()
        came = defaultdict(list)
        for request, src, tag, notes in receives:
            got, source = request.wait()
            assert source == src or tag == 2
            came[source, rank, tag] += notes
            assert np.array_equal(got, pattern(notes[0][1], source * 1000 + notes[0][0]))
        for request in sends:
            request.wait()
        for src in range(size):
            for tag in range(3):
                assert came[src, rank, tag] == model[src, rank, tag]
        assert box.stats()["unread_bytes"] == {}
    assert everyone(work, size) == [None] * size
