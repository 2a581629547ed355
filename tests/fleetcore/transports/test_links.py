"""The contract of a link, over every transport."""
import os
import select
import socket

import pytest
from fleetcore.transports.loopback import LoopbackLink
from fleetcore.transports.secure import SecureLink
from fleetcore.transports.striped import StripedLink
from fleetcore.transports.tcp import TcpLink

from fleetcore.transports import TRANSPORTS
from pyfleet.identity import ciphers


def tcp_pair(a=0, b=1):
    """(the link rank a uses to reach b, the link rank b uses to reach a)."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        return TcpLink(near, b), TcpLink(server.accept()[0], a)


def secure_pair(a=0, b=1):
    near, far = tcp_pair(a, b)
    cipher = ciphers.cipher(ciphers.choose(ciphers.offered(), ciphers.offered()))
    keys = [os.urandom(cipher.key_bytes) for _ in range(2)]
    return SecureLink(near, cipher, *keys), SecureLink(far, cipher, *reversed(keys))


def striped_pair(a=0, b=1):
    pairs = [(secure_pair if k == 1 else tcp_pair)(a, b) for k in range(3)]
    return StripedLink([near for near, _ in pairs]), StripedLink([far for _, far in pairs])


PAIRS = {"striped": striped_pair, "tcp": tcp_pair, "loopback": lambda: LoopbackLink.pair(0, 1), "secure": secure_pair}
pair = pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)


def receive_all(link, size):
    data = b""
    while len(data) < size:
        part = link.receive(size - len(data))
        assert part is not None, "the peer is gone"
        if not part:                                    # only now does the descriptor tell of all that is to come
            select.select([link], [], [], 10)
        data += part
    return data


def test_every_transport_is_under_contract():
    assert set(PAIRS) == set(TRANSPORTS)


@pair
def test_bytes_arrive_in_order_and_are_counted(pair):
    near, far = pair()
    assert (near.rank, far.rank) == (1, 0)
    data = os.urandom(1_000_000)                            # several stripes
    sent = got = b""
    while len(got) < len(data):
        taken = near.send(data[len(sent):len(sent) + 30_000])
        sent += data[len(sent):len(sent) + taken]
        got += far.receive(50_000)
    assert got == data
    sent = near.stats()["sent_bytes"]
    assert sent == far.stats()["received_bytes"]
    assert sent == len(data) if not isinstance(near, (SecureLink, StripedLink)) else len(data) < sent < 1.01 * len(data)


@pair
def test_nothing_blocks(pair):
    near, far = pair()
    assert far.receive(100) == b""
    taken = 1
    while taken:
        taken = near.send(bytes(1 << 20))
    assert near.send(b"more") == 0


@pair
def test_the_end_of_the_peer_is_seen_after_its_last_bytes(pair):
    near, far = pair()
    near.send(b"last words")
    near.close()
    near.close()
    assert near.fileno() == -1
    assert receive_all(far, 10) == b"last words"
    select.select([far], [], [], 10)
    assert far.receive(1) is None
    while far.send(b"x" * 1000) > 0:                    # the kernel may take some before it knows
        select.select([], [], [], 0.001)
    assert far.send(b"x") < 0


def test_congestion_control_can_be_chosen():
    with socket.create_server(("127.0.0.1", 0)) as server:
        sock = socket.create_connection(server.getsockname())
        copy = sock.dup()
        TcpLink(sock, 1, congestion="reno")
        assert copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0") == b"reno"
        with pytest.raises(OSError):
            TcpLink(socket.create_connection(server.getsockname()), 1, congestion="no-such-thing")
