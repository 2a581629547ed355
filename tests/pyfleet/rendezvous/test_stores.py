"""The contract of a store, over every rendezvous."""
import contextlib
import socket
import threading
import time
from datetime import timedelta

import pytest

from pyfleet.errors import AuthFailed, ConfigError, NotEnoughPeers
from pyfleet.rendezvous import RENDEZVOUS, open_store
from pyfleet.rendezvous.agent import url_of
from pyfleet.rendezvous.tcp import MOST_GUESTS, Channel, Server
from tests.agents import Agents, agree, wait_for
from tests.faults import Relay

SECRET = b"known to the ranks"


@contextlib.contextmanager
def address(kind, tmp_path):
    """A place where `kind` can meet."""
    if kind == "file":
        yield f"file://{tmp_path}/meet"
        return
    if kind == "agent":
        with Agents(tmp_path) as agents:
            node = agents.start(0)
            wait_for(lambda: agree([node]), 30, "a fleet of one", agents)
            yield url_of(node.path, node.status()["fleet"], node.status()["epoch"])
        return
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    if kind == "torch":
        from torch.distributed import TCPStore
        served = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=10))
        yield f"torch://127.0.0.1:{port}"
        del served
    else:
        yield f"tcp://127.0.0.1:{port}"


@pytest.fixture(params=[*((kind, None) for kind in RENDEZVOUS), ("tcp", SECRET)], ids=[*RENDEZVOUS, "tcp-sealed"])
def stores(request, tmp_path):
    """Three ranks' stores at one place."""
    kind, secret = request.param
    with address(kind, tmp_path) as place:
        opened = [open_store(place, rank, 3, 10, secret) for rank in range(3)]
        yield opened
        for store in opened:
            store.close()


def test_what_one_leaves_the_others_find(stores):
    value = {"rank": 1, "addresses": ["192.0.2.1", "::1"], "nested": [1, 2.5, None, True, "ü"]}
    stores[1].set("card", value)
    assert [store.get("card", 5) for store in stores] == [value] * 3


def test_a_get_waits_for_its_key(stores):
    threading.Timer(0.1, stores[0].set, ("late", 7)).start()
    assert stores[2].get("late", 10) == 7


def test_a_missing_key_is_a_key_error_at_the_timeout(stores):
    started = time.monotonic()
    with pytest.raises(KeyError, match="never"):
        stores[1].get("never", 0.2)
    assert 0.15 < time.monotonic() - started < 3


def test_closing_twice_is_fine(stores):
    for store in stores:
        store.close()
        store.close()


def test_a_value_that_is_too_large_is_refused(stores):
    with pytest.raises(ValueError, match="over the limit"):
        stores[0].set("huge", "x" * (2 << 20))


def test_clients_may_come_before_the_server():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        place = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    found = []
    early = threading.Thread(target=lambda: found.append(open_store(place, 1, 2, 10).get("key", 5)))
    early.start()
    time.sleep(0.1)                 # a rank that starts early, not a wait for an event
    server = open_store(place, 0, 2, 10)
    server.set("key", "value")
    early.join(10)
    assert found == ["value"]
    server.close()


def test_a_server_that_dies_is_an_error_not_a_hang():
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        place = f"tcp://127.0.0.1:{deaf.getsockname()[1]}"
        store = open_store(place, 1, 2, 5)
        deaf.accept()[0].close()
        with pytest.raises(NotEnoughPeers, match="went away"):
            store.get("key", 5)


def test_strangers_neither_end_the_serving_nor_prolong_it():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = probe.getsockname()
    server = Server(address)
    for text in (b"GET / HTTP/1.0\r\n\r\n", b"\xff\xff\xff\xff", b"\0\0\0\2\xc1\xc1", b""):
        with socket.create_connection(address) as stranger:
            stranger.sendall(text)                  # as many as there are ranks, before any rank comes
            stranger.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionResetError):
                assert stranger.recv(1) == b""      # the server is done with it
    store = open_store(f"tcp://127.0.0.1:{address[1]}", 1, 2, 10)
    store.set("key", "value")
    silent = socket.create_connection(address)
    server.stop()
    assert store.get("key", 5) == "value"           # who has asked before is served to its end
    store.close()
    server.thread.join(10)
    assert not server.thread.is_alive()
    silent.close()


@pytest.fixture
def served():
    """served(secret) -> (Server, its address)"""
    servers = []

    def serve(secret=SECRET):
        with socket.create_server(("127.0.0.1", 0)) as probe:
            address = probe.getsockname()
        servers.append(Server(address, secret))
        return servers[-1], address
    yield serve
    for server in servers:
        server.stop()


@pytest.mark.parametrize("theirs,mine", [(SECRET, b"another"), (SECRET, None), (None, SECRET)])
def test_who_knows_another_secret_or_none_learns_nothing_and_is_told(served, theirs, mine):
    server, (host, port) = served(theirs)
    server.values["key"] = b"value"
    with pytest.raises(AuthFailed, match="its PSK, namespace or version is another"):
        open_store(f"tcp://{host}:{port}", 1, 2, 10, mine).get("key", 5)
    with pytest.raises(AuthFailed):
        open_store(f"tcp://{host}:{port}", 1, 2, 10, mine).set("mine", 1)
    assert server.values == {"key": b"value"}
    assert server.num_refused == (0 if theirs is None else 2)


def test_rank_0_says_that_it_has_turned_somebody_away():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        place = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    store = open_store(place, 0, 2, 10, SECRET)
    assert store.refusals() == ""
    with pytest.raises(AuthFailed):
        open_store(place, 1, 2, 10, b"another").get("key", 5)
    assert store.refusals() == "; refused 1, for another PSK or namespace"
    store.close()


class Tap:
    """A relay to a server that keeps what passes."""

    def __init__(self, address):
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.place = f"tcp://127.0.0.1:{self.listener.getsockname()[1]}"
        self.sent, self.came = bytearray(), bytearray()
        self.ends = []
        threading.Thread(target=self._serve, args=(address,), daemon=True).start()

    def _serve(self, address):
        near, far = self.listener.accept()[0], socket.create_connection(address)
        self.ends = [threading.Thread(target=self._carry, args=ends, daemon=True)
                     for ends in ((near, far, self.sent), (far, near, self.came))]
        for thread in self.ends:
            thread.start()

    @staticmethod
    def _carry(source, sink, kept):
        while data := source.recv(1 << 16):
            kept += data
            sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

    def finish(self):
        for thread in self.ends:
            thread.join(10)
        self.listener.close()


def test_nothing_can_be_read_on_the_wire_or_sent_again(served):
    server, address = served()
    tap = Tap(address)
    store = open_store(tap.place, 1, 2, 10, SECRET)
    store.set("a key of mine", "a token to be kept")
    assert store.get("a key of mine", 5) == "a token to be kept"
    store.close()
    tap.finish()
    assert len(tap.sent) > 100 and len(tap.came) > 50
    assert b"token" not in tap.sent + tap.came and b"mine" not in tap.sent + tap.came
    del server.values["a key of mine"]
    with socket.create_connection(address) as replay:
        replay.sendall(tap.sent)
        answer = b""
        while data := replay.recv(1 << 16):
            answer += data
    assert server.values == {}, "the other nonce makes it void"
    assert len(answer) == 36, "a nonce, and no answer"


def test_a_changed_byte_ends_the_connection(served):
    server, address = served()
    near, far = socket.create_server(("127.0.0.1", 0)), socket.create_connection(address)
    stores = []
    opened = threading.Thread(target=lambda: stores.append(
        open_store(f"tcp://127.0.0.1:{near.getsockname()[1]}", 1, 2, 10, SECRET)))
    opened.start()
    relay = Relay(near.accept()[0], far, "corrupt", 36 + 4 + 1, 0.0)        # in the first sealed message
    opened.join(10)
    with pytest.raises(AuthFailed):
        stores[0].set("key", "value")
    assert server.values == {} and server.num_refused == 1
    relay.close()
    near.close()


def channels():
    return [Channel(SECRET, b"client", b"server", serves=serves) for serves in (False, True)]


@pytest.mark.parametrize("wrong", ["again", "later", "cut", "short", "mirrored"])
def test_messages_that_are_not_the_next_one_are_refused(wrong):
    client, server = channels()
    first, second = client.seal(b"first"), client.seal(b"second")
    assert server.open(first) == b"first"
    assert client.open(server.seal(b"")) == b""
    with pytest.raises(AuthFailed):
        server.open({"again": first, "later": client.seal(b"third"), "cut": second[:-1], "short": second[:5],
                     "mirrored": channels()[1].seal(b"second")}[wrong])


def test_many_silent_strangers_cost_little_and_delay_nobody(served):
    server, address = served()
    strangers = [socket.create_connection(address) for _ in range(MOST_GUESTS + 50)]
    store = open_store(f"tcp://{address[0]}:{address[1]}", 1, 2, 10, SECRET)
    store.set("key", "value")
    assert store.get("key", 5) == "value"
    assert len(server.guests) <= MOST_GUESTS
    store.close()
    for stranger in strangers:
        stranger.close()


def test_damaged_addresses_are_refused():
    for bad in ("tcp://", "tcp://host", "torch://host", "nowhere", "ftp://x:1"):
        with pytest.raises(ConfigError):
            open_store(bad, 1, 2, 0.2)
