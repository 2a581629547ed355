"""Control connections: only members get one, messages arrive whole and in order, strangers cost little."""
import asyncio
import contextlib
import os
import socket
import struct

import pytest

from pyfleet.errors import AuthFailed, ConfigError, NotEnoughPeers
from pyfleet.identity import Namespace, NodeKey
from pyfleet.identity.handshake import Kind
from pyfleet.membership import channel as channels
from pyfleet.membership.channel import Channel, Closed, Door, Self, dial
from pyfleet.membership.messages import LARGEST_BYTES, Bye, Ping, Put

FRIENDS = Namespace.from_psk("00" * 32, "tests")
STRANGERS = Namespace.from_psk("11" * 32, "tests")
LOCAL = ("127.0.0.1",)


def node(namespace=FRIENDS):
    return Self(NodeKey.generate(), namespace)


@contextlib.asynccontextmanager
async def open_door(own=None, **options):
    """A door, and a queue of (reader, writer, session) of those let in."""
    guests = asyncio.Queue()
    door = Door(own or node(), (Kind.MEMBER,), lambda *guest: guests.put_nowait(guest), **options)
    await door.open(0, LOCAL)
    try:
        yield door, guests
    finally:
        await door.close()


@contextlib.asynccontextmanager
async def pair():
    """Two ends of one connection."""
    async with open_door() as (door, guests):
        ends = [Channel(*await dial(node(), LOCAL[0], door.port), dialled=True), Channel(*await guests.get(), dialled=False)]
        try:
            yield ends
        finally:
            await asyncio.gather(*(end.close() for end in ends))


def run(scenario):
    return asyncio.run(asyncio.wait_for(scenario, 30))


def test_messages_arrive_whole_and_in_order_both_ways():
    async def scenario():
        async with pair() as (a, b):
            assert a.session.binding == b.session.binding and a.dialled and not b.dialled
            sent = [Ping(1), Put("f", 1, "k", os.urandom(LARGEST_BYTES - 100)), Ping(2), Put("f", 1, "", b"")]
            for message in sent:
                a.send(message)
                b.send(message)
            for end in (a, b):
                assert [await end.receive() for _ in sent] == sent
            assert a.bytes_sent == b.bytes_received == b.bytes_sent
    run(scenario())


def test_both_ends_know_who_the_other_is():
    async def scenario():
        alice, bob = node(), node()
        async with open_door(bob) as (door, guests):
            *_, session = await dial(alice, LOCAL[0], door.port, expects=bob.key.public)
            assert session.peer_id == bob.key.peer_id
            assert (await guests.get())[2].peer_id == alice.key.peer_id
            with pytest.raises(AuthFailed, match=bob.key.peer_id):
                await dial(alice, LOCAL[0], door.port, expects=alice.key.public)
    run(scenario())


def test_a_stranger_is_refused_and_told_nothing():
    async def scenario():
        refused = []
        async with open_door(on_refused=lambda *why: refused.append(why)) as (door, guests):
            with pytest.raises(AuthFailed, match="PSK"):
                await dial(node(STRANGERS), LOCAL[0], door.port)
            assert guests.empty() and refused == [(LOCAL[0], "the peer has another PSK or namespace, or none")]
    run(scenario())


def test_a_connection_for_something_else_is_refused():
    async def scenario():
        async with open_door() as (door, guests):
            with pytest.raises(AuthFailed):
                await dial(node(), LOCAL[0], door.port, kind=Kind.QUERY)
            assert guests.empty()
    run(scenario())


def test_nobody_there_and_somebody_silent():
    async def scenario():
        with socket.create_server((LOCAL[0], 0)) as silent:
            port = silent.getsockname()[1]
            with pytest.raises(NotEnoughPeers, match=r"silent for 0.2 s"):
                await dial(node(), LOCAL[0], port, patience_s=0.2)
        with pytest.raises(NotEnoughPeers, match=f"{port}: .*refused"):
            await dial(node(), LOCAL[0], port)
    run(scenario())


def test_an_end_says_whether_the_peer_hung_up():
    async def scenario():
        async with pair() as (a, b):
            a.send(Bye("enough"))
            await a.close()
            assert await b.receive() == Bye("enough")
            with pytest.raises(Closed) as ended:
                await b.receive()
            assert ended.value.by_peer
            with pytest.raises(Closed, match="closed here") as ended:
                await a.receive()
            assert not ended.value.by_peer
    run(scenario())


@pytest.mark.parametrize(("spoil", "reason"), [
    (lambda record: record[:-1] + bytes([record[-1] ^ 1]), "damaged or forged"),
    (lambda record: struct.pack("<I", 0xffffffff) + record[4:], "a record of 4294967295 bytes"),
    (lambda record: struct.pack("<I", 16) + record[4:], "a record of 16 bytes"),
    (lambda record: os.urandom(64), None),
])
def test_what_does_not_fit_ends_the_connection(spoil, reason):
    async def scenario():
        async with pair() as (a, b):
            writer, sent = a._writer, []
            a._writer = type("Tap", (), {"transport": writer.transport, "write": staticmethod(sent.append)})
            a.send(Ping(7))
            a._writer = writer
            writer.write(spoil(sent[0]))
            with pytest.raises(Closed, match=reason) as ended:
                await b.receive()
            assert not ended.value.by_peer or reason is None
    run(scenario())


def test_a_record_cannot_be_repeated():
    async def scenario():
        async with pair() as (a, b):
            writer, sent = a._writer, []
            a._writer = type("Tap", (), {"transport": writer.transport, "write": staticmethod(sent.append)})
            a.send(Ping(7))
            a._writer = writer
            writer.write(2 * sent[0])
            assert await b.receive() == Ping(7)
            with pytest.raises(Closed, match="damaged or forged"):
                await b.receive()
    run(scenario())


def test_a_peer_that_reads_nothing_is_cut_off(monkeypatch):
    async def scenario():
        monkeypatch.setattr(channels, "MOST_QUEUED", 1 << 20)
        async with pair() as (a, _):
            for _ in range(100):
                a.send(Put("f", 1, "k", bytes(LARGEST_BYTES // 2)))
            with pytest.raises(Closed, match="does not read") as ended:
                await a.receive()
            assert not ended.value.by_peer
    run(scenario())


def test_strangers_in_numbers_keep_no_member_out():
    """Ten thousand connections that never say a word, and then a member."""
    async def scenario():
        async with open_door() as (door, guests):
            idle, loop = [], asyncio.get_running_loop()
            for _ in range(10_000):
                sock = socket.socket()
                sock.setblocking(False)
                await loop.sock_connect(sock, (LOCAL[0], door.port))
                idle.append(sock)
                if len(idle) > 500:             # descriptors are scarce at this end, too
                    idle.pop(0).close()
            assert len(door._strangers) <= channels.MOST_STRANGERS
            _, writer, _ = await dial(node(), LOCAL[0], door.port)
            assert (await guests.get())[2] is not None
            writer.transport.abort()
            for sock in idle:
                sock.close()
    run(scenario())


def test_garbage_of_any_kind_gets_nobody_in():
    async def scenario():
        async with open_door() as (door, guests):
            for garbage in (b"GET / HTTP/1.1\r\n\r\n" * 20, os.urandom(4096), b"\xff" * 1000, b""):
                reader, writer = await asyncio.open_connection(LOCAL[0], door.port)
                writer.write(garbage)
                writer.write_eof()
                with contextlib.suppress(ConnectionError):
                    assert await reader.read() == b""
                writer.close()
            assert guests.empty()
            await dial(node(), LOCAL[0], door.port)
    run(scenario())


def test_a_port_in_use_is_told_or_another_is_taken():
    async def scenario():
        async with open_door() as (first, _):
            second = Door(node(), (Kind.MEMBER,), lambda *_: None)
            with pytest.raises(ConfigError, match=rf"port {first.port}.*in use.*discovery_port"):
                await second.open(first.port, LOCAL)
            await second.open(first.port, LOCAL, fallback=True)
            assert second.port not in (0, first.port)
            await second.close()
    run(scenario())
