"""Peers whose addresses were written down: sighted at once, again and again, wherever their names lead at the time."""
import itertools
import json
import queue
import socket
import threading
import time

import pytest

from pyfleet.config import ClusterConfig
from pyfleet.discovery import open_discovery, static
from pyfleet.discovery.base import CLOSING_S
from tests.network import inside
from tests.pyfleet.discovery.test_mdns import BLOCK_MDNS

PATIENCE_S = 10


@pytest.fixture
def sightings(monkeypatch):
    """sightings(peers, ...): a queue of (when, sighting) of these static peers."""
    monkeypatch.setattr(static, "FIRST_RETRY_S", 0.02)
    monkeypatch.setattr(static, "LONGEST_RETRY_S", 0.1)
    made = []

    def get(peers, **settings):
        found = queue.Queue()
        made.append(open_discovery("static", ClusterConfig(static_peers=peers, **settings), None))
        made[-1].start(None, lambda event: found.put((time.monotonic(), event.sighting)))
        return found
    get.made = made
    yield get
    for each in made:
        each.close()


def answers(*addresses):
    return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 7)) for address in addresses]


def test_peers_are_sighted_with_ever_longer_pauses(sightings):
    found = sightings(["192.0.2.1", "[2001:db8::1]:7"], discovery_port=1234)
    times = {}
    while min(map(len, times.values()), default=0) < 6 or len(times) < 2:
        when, sighting = found.get(timeout=PATIENCE_S)
        times.setdefault((sighting.addresses, sighting.port), []).append(when)
        assert (sighting.peer, sighting.incarnation, sighting.source) == ("", "", "static")
    assert set(times) == {(("192.0.2.1",), 1234), (("2001:db8::1",), 7)}
    for when in times.values():
        pauses = [later - sooner for sooner, later in itertools.pairwise(when)]
        assert all(pause > 0.9 * expected for pause, expected in zip(pauses, (0.02, 0.04, 0.08, 0.1, 0.1), strict=False))


def test_a_name_is_resolved_anew_each_time(sightings, monkeypatch, caplog):
    told = iter([socket.gaierror(socket.EAI_NONAME, "Name or service not known"), socket.gaierror(-3, "Temporary failure"),
                 answers("192.0.2.1"), answers("192.0.2.1", "192.0.2.1", "192.0.2.9"), UnicodeError("label too long")])

    def resolve(host, port, **hints):
        assert (host, port) == ("mini.local", 7)
        answer = next(told, answers("192.0.2.5"))
        if isinstance(answer, Exception):
            raise answer
        return answer
    monkeypatch.setattr(static.socket, "getaddrinfo", resolve)
    found = sightings("mini.local:7")
    assert [found.get(timeout=PATIENCE_S)[1].addresses for _ in range(4)] == [
        ("192.0.2.1",), ("192.0.2.1", "192.0.2.9"), ("192.0.2.5",), ("192.0.2.5",)]
    assert caplog.text.count("cannot be found yet") == 2            # once for each time that it became unknown


def test_a_resolver_that_hangs_delays_neither_other_peers_nor_the_end(sightings, monkeypatch):
    hangs, asked = threading.Event(), []

    def resolve(host, port, **hints):
        asked.append(host)
        hangs.wait(PATIENCE_S)
        return answers("192.0.2.1")
    monkeypatch.setattr(static.socket, "getaddrinfo", resolve)
    found = sightings(["slow.example", "192.0.2.7"])
    for _ in range(5):
        assert found.get(timeout=PATIENCE_S)[1].addresses == ("192.0.2.7",)
    assert asked == ["slow.example"]                # and not asked again before it has answered
    began = time.monotonic()
    sightings.made[0].close()
    assert time.monotonic() - began < CLOSING_S
    hangs.set()
    for thread in threading.enumerate():
        if thread.name == "pyfleet-resolver":
            thread.join(PATIENCE_S)
    while not found.empty():
        assert found.get()[1].addresses != ("192.0.2.1",)           # what comes after close is not told


def test_nobody_to_look_for(sightings):
    assert sightings([]).empty()
    began = time.monotonic()
    sightings.made[0].close()
    assert time.monotonic() - began < CLOSING_S


def test_a_peer_is_reached_where_multicast_is_not(network, start):
    hosts = network(2)
    for host in range(2):
        hosts.run(host, ["nft", BLOCK_MDNS])
    with inside(hosts.namespace(1), socket.create_server, ("", 52415)) as server:
        deaf = start(hosts, 0, "a")
        node = start(hosts, 0, kind="static", cluster={"static_peers": [hosts.address(1)], "discovery_enabled": False})
        seen = node.wait(lambda event: event["event"] == "seen")
        assert (seen["addresses"], seen["port"], seen["source"]) == ([hosts.address(1)], 52415, "static")
        with inside(hosts.namespace(0), socket.create_connection, (seen["addresses"][0], seen["port"]), PATIENCE_S) as dialled:
            assert server.accept()[1] == dialled.getsockname()
        deaf.wait(lambda event: "static_peers" in event.get("text", ""))
        assert json.dumps(deaf.all("seen")) == "[]"
