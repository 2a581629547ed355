"""What every kind of discovery keeps to."""
import threading
import time

import pytest

from pyfleet.config import ClusterConfig
from pyfleet.discovery import DISCOVERY, Announcement, open_discovery
from pyfleet.discovery.base import CLOSING_S
from pyfleet.errors import ConfigError
from pyfleet.identity.namespace import Namespace
from tests.pyfleet.discovery.nodes import NAME, OURS, peer_id

OWN = Announcement(peer_id("a"), "0" * 16, 52415, "me")
NAMESPACE = Namespace.from_psk(OURS, NAME)
PATIENCE_S = 10


@pytest.fixture
def other():
    """other(kind, letter): what makes this kind see one more on this machine; ended with the test."""
    made = []

    def get(kind, letter):
        if kind == "mdns":          # static sees its peer again and again by itself
            made.append(open_discovery("mdns", cluster(), NAMESPACE))
            made[-1].start(Announcement(peer_id(letter), f"{ord(letter):016x}", 7, "other"), lambda event: None)
    yield get
    for each in made:
        each.close()


def cluster():
    return ClusterConfig(iface="lo", static_peers=["127.0.0.1:7"])


@pytest.mark.parametrize("kind", DISCOVERY)
def test_nobody_is_announced_without_a_namespace(kind):
    with pytest.raises(ConfigError, match="pyfleet keys psk"):
        open_discovery(kind, cluster(), None).start(OWN, print)


@pytest.mark.parametrize("kind", DISCOVERY)
def test_start_and_close_are_quick_and_close_may_be_called_again(kind, other):
    other(kind, "b")
    discovery, seen = open_discovery(kind, cluster(), NAMESPACE), []
    discovery.close()                       # before it was started: nothing
    discovery, some = open_discovery(kind, cluster(), NAMESPACE), threading.Event()
    began = time.monotonic()
    discovery.start(OWN, lambda event: (seen.append(event), some.set()))
    assert time.monotonic() - began < 0.5
    assert some.wait(PATIENCE_S)
    discovery.update(Announcement(OWN.peer, OWN.incarnation, 52416, "me"))
    for _ in range(2):
        began = time.monotonic()
        discovery.close()
        assert time.monotonic() - began < CLOSING_S
    assert not discovery._thread.is_alive()
    count = len(seen)
    discovery.update(OWN)                   # after it has ended: nothing
    assert len(seen) == count
    assert (seen[0].sighting.source, seen[0].sighting.port) == (kind, 7)
    assert discovery.num_strangers == 0


@pytest.mark.parametrize("kind", DISCOVERY)
def test_it_outlives_whoever_fails_to_take_an_event(kind, other, caplog):
    discovery, calls, twice = open_discovery(kind, cluster(), NAMESPACE), [], threading.Event()

    def take(event):
        calls.append(event)
        if len(calls) > 1:
            twice.set()
        raise RuntimeError("no room")
    discovery.start(None, take)
    try:
        for letter in "bcd":
            other(kind, letter)
        assert twice.wait(PATIENCE_S)
        assert "was not taken" in caplog.text
    finally:
        discovery.close()
