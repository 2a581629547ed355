"""Sealed records: what goes in comes out, and nothing else ever does."""
import os
import random
import socket

import numpy as np
import pytest
from fleetcore.transports.loopback import LoopbackLink
from fleetcore.transports.secure import SecureLink
from fleetcore.transports.tcp import TcpLink
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetcore.errors import ConfigError, CorruptData, OutOfStep, PeerLost, Timeout
from pyfleet.identity import ciphers
from tests.fleetcore.test_domain import everyone
from tests.fleetcore.test_executor import POINTS, mesh
from tests.fleetcore.transports.test_links import receive_all

CIPHERS = [ciphers.cipher(chosen) for chosen in (ciphers.AEGIS_128L, ciphers.CHACHA20_POLY1305)]
each_cipher = pytest.mark.parametrize("cipher", CIPHERS, ids=lambda cipher: cipher.name)
HEADER_BYTES = 8
TEXT = b"gradients and gradients and more of them: "


def ends(cipher, *, record_bytes=4096, keys=None):
    """(a link, the raw socket at its other end, its keys)."""
    mine, theirs = socket.socketpair()
    keys = keys or [os.urandom(cipher.key_bytes) for _ in range(2)]
    return SecureLink(LoopbackLink(mine, 1), cipher, *keys, record_bytes=record_bytes), theirs, keys


def records(cipher, texts):
    """([each text as it went over the wire], the keys of who may read it)."""
    link, raw, keys = ends(cipher)
    wire = []
    for text in texts:
        assert link.send(text) == len(text)
        wire.append(raw.recv(1 << 20))
    return wire, keys[::-1]


def read(cipher, keys, wire, most=4):
    """(what a reader of `most` bytes at a time makes of these bytes, whether it then gave the stream up)."""
    link, raw, _ = ends(cipher, keys=keys)
    raw.sendall(wire)
    got = b""
    while (part := link.receive(most)):
        got += part
    return got, part is None


@each_cipher
def test_what_goes_in_comes_out_and_is_not_to_be_seen_between(cipher):
    texts = [TEXT * k for k in (1, 2, 50, 95)]
    wire, keys = records(cipher, texts)
    assert read(cipher, keys, b"".join(wire), 10_000) == read(cipher, keys, b"".join(wire), 7) == (b"".join(texts), False)
    assert all(len(w) == len(t) + HEADER_BYTES + cipher.tag_bytes for w, t in zip(wire, texts, strict=True))
    assert not any(TEXT[k:k + 8] in b"".join(wire) for k in range(len(TEXT) - 7))


@each_cipher
def test_equal_texts_look_different(cipher):
    wire, _ = records(cipher, [bytes(1000)] * 4)
    assert len({w[HEADER_BYTES:] for w in wire}) == 4


@each_cipher
def test_every_flipped_bit_is_noticed_and_nothing_of_that_record_comes_out(cipher):
    (first, second), keys = records(cipher, [b"good", b"bad one"])
    for at in range(len(second)):
        for bit in range(8):
            damaged = bytearray(second)
            damaged[at] ^= 1 << bit
            assert read(cipher, keys, first + damaged) == (b"good", True), (at, bit)


@each_cipher
def test_records_left_out_repeated_moved_or_cut_are_noticed(cipher):
    (a, b, c), keys = records(cipher, [b"aaaa", b"bbbb", b"cccc"])
    assert read(cipher, keys, a + b + c) == (b"aaaabbbbcccc", False)
    assert read(cipher, keys, a + c) == (b"aaaa", True)
    assert read(cipher, keys, a + a) == (b"aaaa", True)
    assert read(cipher, keys, b + a) == (b"", True)
    assert read(cipher, keys, a + b[:-1] + c) == (b"aaaa", True)
    for cut in range(len(b)):
        assert read(cipher, keys, a + b[:cut]) == (b"aaaa", False)      # the rest may still come


@each_cipher
def test_another_key_or_the_own_words_sent_back_are_noticed(cipher):
    (a,), keys = records(cipher, [b"aaaa"])
    assert read(cipher, keys, a) == (b"aaaa", False)
    assert read(cipher, keys[::-1], a) == (b"", True)                   # reflected: keys differ per direction
    assert read(cipher, [keys[0], os.urandom(cipher.key_bytes)], a) == (b"", True)


@each_cipher
@pytest.mark.parametrize("length", (0, 4097, 1 << 20, (1 << 32) - 1))
def test_a_length_out_of_bounds_is_refused_before_anything_more_is_read(cipher, length):
    header = length.to_bytes(4, "little") + (length ^ 0xFFFFFFFF).to_bytes(4, "little")
    link, raw, _ = ends(cipher)
    raw.sendall(header)
    assert link.receive(100) is None
    raw.sendall(b"more" * 10_000)
    assert link.receive(100) is None                                    # for good


def test_noise_is_refused():
    for seed in range(200):
        noise = random.Random(seed).randbytes(200)
        assert read(CIPHERS[0], [bytes(16), bytes([1] * 16)], noise) == (b"", True)


@given(st.lists(st.integers(1, 9000), min_size=1, max_size=8), st.integers(1, 5000), st.integers(0, 1 << 30))
@settings(max_examples=60, deadline=None)
def test_any_pieces_give_the_same_stream(sizes, most, seed):
    data = random.Random(seed).randbytes(sum(sizes))
    near, raw, keys = ends(CIPHERS[0])
    far = SecureLink(LoopbackLink(raw, 0), CIPHERS[0], *keys[::-1], record_bytes=4096)
    at, got = 0, b""
    for size in sizes:
        sent = 0
        while sent < size:
            sent += near.send(data[at + sent:at + size])
            got += far.receive(most)
        at += size
    assert got + receive_all(far, len(data) - len(got)) == data
    near.close()
    assert far.receive(1) is None


def test_a_full_kernel_takes_back_no_byte_and_repeats_none():
    mine, theirs = socket.socketpair()
    for sock in (mine, theirs):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)      # most records go in several pieces
    keys = [os.urandom(16) for _ in range(2)]
    near = SecureLink(LoopbackLink(mine, 1), CIPHERS[0], *keys, record_bytes=100_000)
    far = SecureLink(LoopbackLink(theirs, 0), CIPHERS[0], *keys[::-1], record_bytes=100_000)
    data, at, got, waited = os.urandom(1_000_000), 0, b"", 0
    while len(got) < len(data):
        taken = near.send(data[at:])
        waited += taken == 0 and at < len(data)
        at += taken
        got += far.receive(30_000)
    assert got == data
    assert waited > 10


def test_offering_less_than_before_is_an_error_and_no_guess():
    near, raw, _ = ends(CIPHERS[0], record_bytes=1 << 20)
    raw.setblocking(False)
    assert near.send(bytes(1 << 20)) == 0                               # sealed, and partly in the kernel
    result = 0
    while result == 0:
        raw.recv(1 << 20)
        result = near.send(b"less")
    assert result < 0


def test_wrong_keys_and_sizes_are_refused():
    cipher, key = CIPHERS[0], bytes(16)
    for keys, size, match in (((key, key), 4096, "must differ"), ((key, key + b"1"), 4096, "keys of 16 bytes"),
                              ((key, b"1" * 16), 63, "record_bytes"), ((key, b"1" * 16), 2 << 20, "record_bytes")):
        mine, _ = socket.socketpair()
        with pytest.raises(ConfigError, match=match):
            SecureLink(LoopbackLink(mine, 1), cipher, *keys, record_bytes=size)


def test_the_link_below_is_left_empty_and_closed_once():
    mine, theirs = socket.socketpair()
    below = TcpLink(mine, 3)
    link = SecureLink(below, CIPHERS[0], bytes(16), b"1" * 16)
    assert (below.fileno(), link.rank, link.stats()["cipher"]) == (-1, 3, "aegis128l")
    link.close()
    assert theirs.recv(1) == b""
    del link
    below.close()


# ---- under the executor ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("algorithm", ("ring", "direct", "tree"))
@pytest.mark.parametrize("size", (2, 3, 5))
def test_all_reduce_over_sealed_links(algorithm, size):
    members = mesh(size, kind="secure")

    def work(rank):
        for count in (0, 1, size - 1, 1023, 1025, 1024 * size + 1, 200_003):
            x = (np.arange(count) % 251).astype(np.float32) * (rank + 1)
            members[rank].all_reduce(x, algorithm=algorithm)
            assert np.array_equal(x, (np.arange(count) % 251).astype(np.float32) * (size * (size + 1) // 2)), count
        members[rank].barrier()
    assert everyone(work, size) == [None] * size


def test_chunks_larger_and_smaller_than_records():
    for chunk_bytes in (64, 1 << 16, 1 << 20):
        members = mesh(2, kind="secure", chunk_bytes=chunk_bytes)

        def work(rank, members=members):
            x = np.ones(700_001, np.float32) if members[0].executor.chunk_bytes > 64 else np.ones(7001, np.float32)
            members[rank].all_reduce(x)
            assert (x == 2).all()
        assert everyone(work, 2) == [None] * 2


@pytest.mark.parametrize("after", POINTS)
def test_a_damaged_byte_on_a_sealed_link_is_noticed_wherever_it_is(after):
    members = mesh(2, kind="secure", fault="corrupt", after=after)

    def work(rank):
        x = np.ones(300_000, np.float32)
        with pytest.raises((CorruptData, OutOfStep)) as caught:
            for _ in range(3):
                members[rank].all_reduce(x)
        return type(caught.value)
    assert everyone(work, 2) == [CorruptData] * 2


@pytest.mark.parametrize("after", POINTS)
def test_a_cut_sealed_link_is_a_lost_peer(after):
    members = mesh(2, kind="secure", fault="cut", after=after)

    def work(rank):
        with pytest.raises(PeerLost) as caught:
            for _ in range(3):
                members[rank].all_reduce(np.ones(300_000, np.float32))
        return caught.value.rank
    assert set(everyone(work, 2)) <= {0, 1}


def test_a_damaged_sealed_notice_is_noticed():
    members = mesh(2, kind="secure", fault="corrupt", after=20, on="control")
    with pytest.raises(Timeout):
        members[0].barrier(timeout=0.1)
    with pytest.raises(CorruptData, match="rank 0"):
        members[1].barrier(timeout=10)
