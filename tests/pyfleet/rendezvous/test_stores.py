"""The contract of a store, over every rendezvous."""
import contextlib
import socket
import threading
import time
from datetime import timedelta

import pytest

from pyfleet.errors import ConfigError, NotEnoughPeers
from pyfleet.rendezvous import RENDEZVOUS, open_store
from pyfleet.rendezvous.tcp import Server


@contextlib.contextmanager
def address(kind, tmp_path):
    """A place where `kind` can meet."""
    if kind == "file":
        yield f"file://{tmp_path}/meet"
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


@pytest.fixture(params=RENDEZVOUS)
def stores(request, tmp_path):
    """Three ranks' stores at one place."""
    with address(request.param, tmp_path) as place:
        opened = [open_store(place, rank, 3, 10) for rank in range(3)]
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


def test_damaged_addresses_are_refused():
    for bad in ("tcp://", "tcp://host", "torch://host", "nowhere", "ftp://x:1"):
        with pytest.raises(ConfigError):
            open_store(bad, 1, 2, 0.2)
