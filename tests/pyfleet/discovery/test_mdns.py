"""Nodes on one network find each other by mDNS, and notice who comes, goes, moves, and does not belong."""
import itertools
import json
import random
import secrets
import socket
import sys
import threading
import time

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from zeroconf import DNSIncoming, DNSOutgoing, DNSQuestion, ServiceInfo

from pyfleet.config import ClusterConfig
from pyfleet.discovery import configured, mdns, open_discovery
from pyfleet.discovery.base import MOST_SIGHTINGS
from pyfleet.discovery.mdns import RECORD_S, SERVICE, read_text
from pyfleet.errors import ConfigError
from pyfleet.identity.namespace import Namespace
from tests.network import SUBNET, inside
from tests.pyfleet.discovery.nodes import MDNS_PORT, NAME, OUR_TAG, OURS, THEIR_TAG, THEIRS, peer_id
from tests.ranks import ROOT

RESPONSE = 0x8400           # flags of an authoritative answer
GROUP = ("224.0.0.251", MDNS_PORT)
BLOCK_MDNS = ("add table inet wall; add chain inet wall in { type filter hook input priority 0; }; "
              "add rule inet wall in udp dport 5353 drop")


def ip(network, host, *words):
    network.run(host, ["ip", *words])


def link_is(network, host, state):
    """Whether eth0 of a host has, or has no, carrier."""
    return state in network.run(host, ["ip", "-br", "link", "show", "eth0"])


# ---- who is there ------------------------------------------------------------------------------------------------------


@pytest.mark.feature("P2", "P15", "M7")
def test_nodes_without_any_address_find_each_other_and_hear_who_leaves(network, start):
    hosts = network(3)
    a, b = start(hosts, 0, "a"), start(hosts, 1, "b")
    ready = max(node.wait(lambda event: event["event"] == "started")["at"] for node in (a, b))
    for one, other in ((a, b), (b, a)):
        seen = one.sees(other)
        assert seen["at"] - ready < 1.5
        assert (seen["peer"], seen["name"], seen["port"]) == (other.peer, other.announce["name"], 52415)
        assert seen["source"] == "mdns"
    assert a.all("seen")[0]["addresses"][0] == hosts.address(1)

    c = start(hosts, 2, "c")
    began = c.wait(lambda event: event["event"] == "started")["at"]
    for one, other in ((a, c), (b, c), (c, a), (c, b)):
        assert one.sees(other)["at"] - began < 1.5
    left = c.ask("close", "closed")
    assert left["seconds"] < 1
    for node in (a, b):
        assert node.loses(c)["at"] - left["at"] < 0.5           # it says good-bye, and says it first
        kinds = [event["event"] for event in node.events if event.get("incarnation") == c.incarnation]
        assert kinds[0] == "seen" and kinds[-1] == "gone" and kinds.count("gone") == 1
    assert not a.all("log")


@pytest.mark.slow
@pytest.mark.feature("P2")
def test_a_killed_node_expires_and_an_idle_fleet_says_next_to_nothing(network, start, capture):
    hosts = network(8)
    nodes = [start(hosts, host, letter) for host, letter in enumerate("abcdefgh")]
    for node in nodes:
        for other in nodes:
            if other is not node:
                node.sees(other, 40)
    captured = [capture(hosts, host) for host in range(7)]
    killed, events = time.monotonic(), [len(node.events) for node in nodes]
    nodes[7].kill()
    for node in nodes[:7]:
        assert node.loses(nodes[7], RECORD_S + 10)["at"] - killed < RECORD_S + 2
    settled, ended = killed + 8, time.monotonic()               # what is said at the start has been said by then
    assert ended - settled > RECORD_S / 4
    for each in captured:
        # Of the 1,000 bytes a second that an idle node may send in all; asking for the dead one is among them.
        assert 0 < sum(size for at, size in each.packets if at > settled) / (ended - settled) < 350
    for node, since in zip(nodes[:7], events, strict=False):
        assert [event for event in node.events[since:] if event["event"] == "gone"
                and event["incarnation"] != nodes[7].incarnation] == []       # who lives was asked in time


@pytest.mark.feature("P30")
def test_nodes_of_another_namespace_are_counted_and_not_reported(network, start):
    hosts = network(3)
    stranger, a = start(hosts, 0, "x", psk=THEIRS), start(hosts, 1, "a")
    looker = start(hosts, 2, everybody=True)
    for other in (stranger, a):
        looker.sees(other)
    assert looker.sees(stranger)["tag"] == THEIR_TAG
    b = start(hosts, 2, "b")
    a.sees(b)
    b.sees(a)
    for node in (a, b):
        node.until(lambda state: state["strangers"] == 1)
        assert stranger.incarnation not in [event.get("incarnation") for event in node.events]
    assert stranger.all("seen") == []
    stranger.ask("close", "closed")
    looker.loses(stranger)
    a.until(lambda state: state["strangers"] == 0)


@pytest.mark.feature("M23")
def test_any_dns_sd_browser_finds_a_node(network, start):
    hosts = network(2)
    a = start(hosts, 0, "a")
    a.until(lambda state: state["hears_itself"])
    with inside(hosts.namespace(1), socket.socket, socket.AF_INET, socket.SOCK_DGRAM) as browser:
        browser.settimeout(5)
        answers = {}
        for name in ("_services._dns-sd._udp.local.", SERVICE):
            out = DNSOutgoing(0, multicast=False)
            out.add_question(DNSQuestion(name, mdns.PTR, mdns.IN))
            browser.sendto(out.packets()[0], GROUP)
            answers[name] = DNSIncoming(browser.recv(9000)).answers()
    (kind,) = answers["_services._dns-sd._udp.local."]
    assert kind.alias == SERVICE
    told = {type(record).__name__: record for record in answers[SERVICE]}
    assert told["DNSPointer"].alias == told["DNSService"].name == f"{'a' * 12}-{a.incarnation}.{SERVICE}"
    assert told["DNSService"].port == 52415
    assert told["DNSAddress"].name == told["DNSService"].server
    assert b"peer=" + a.peer.encode() in told["DNSText"].text and OUR_TAG.encode() in told["DNSText"].text
    assert OURS.encode() not in told["DNSText"].text


def test_two_nodes_with_one_identity_are_two_sightings(network, start):
    hosts = network(3)
    one, twin = start(hosts, 0, "a"), start(hosts, 1, "a")
    looker = start(hosts, 2)
    for node, other in ((one, twin), (twin, one), (looker, one), (looker, twin)):
        assert node.sees(other)["peer"] == peer_id("a")
    twin.ask("close", "closed")
    looker.loses(twin)
    looker.until(lambda state: state["kept"] == 1)


def test_a_node_that_starts_again_takes_the_place_of_its_former_self(network, start):
    hosts = network(2)
    a, before = start(hosts, 0, "a"), start(hosts, 1, "b")
    a.sees(before)
    before.kill()
    after = start(hosts, 1, "b")
    seen = a.sees(after)
    assert abs(a.loses(before)["at"] - seen["at"]) < 0.5         # and not when its records expire


# ---- addresses and interfaces -------------------------------------------------------------------------------------------


def test_a_changed_address_is_announced(network, start):
    hosts = network(2)
    a, b = start(hosts, 0, "a"), start(hosts, 1, "b")
    a.sees(b)
    ip(hosts, 1, "addr", "del", f"{hosts.address(1)}/24", "dev", "eth0")
    ip(hosts, 1, "addr", "add", f"{SUBNET}.77/24", "dev", "eth0")
    changed = time.monotonic()
    event = a.wait(lambda event: f"{SUBNET}.77" in event.get("addresses", ()))
    assert event["at"] - changed < 5
    assert event["incarnation"] == b.incarnation
    assert a.all("gone") == []
    a.wait(lambda event: event["event"] == "seen" and hosts.address(1) not in event["addresses"])


def test_an_announcement_can_be_changed_from_above(network, start):
    hosts = network(2)
    a, b = start(hosts, 0, "a"), start(hosts, 1, "b", addresses=["192.0.2.7"])
    assert a.sees(b)["addresses"] == ["192.0.2.7"]
    b.tell("update " + json.dumps(b.announce | {"addresses": ["192.0.2.8", "2001:db8::8"], "port": 7}))
    event = a.wait(lambda event: event["event"] == "seen" and event["port"] == 7, 5)
    assert event["addresses"] == ["192.0.2.8", "2001:db8::8"]


def test_nodes_find_each_other_by_ipv6_alone(network, start):
    hosts = network(2)
    for host in range(2):
        ip(hosts, host, "addr", "flush", "dev", "eth0", "scope", "global")
    a, b = start(hosts, 0, "a"), start(hosts, 1, "b")
    for one, other in ((a, b), (b, a)):
        (address,) = one.sees(other)["addresses"]
        assert address.startswith("fe80::") and address.endswith("%eth0")


@pytest.mark.parametrize("blocked", ("no carrier", "no interface of that name"))
def test_a_network_that_comes_up_later_is_used_then(network, start, blocked):
    hosts = network(2)
    cluster = {"iface": "lan0"} if blocked != "no carrier" else {}
    if blocked == "no carrier":
        hosts.cut(1)
        while not link_is(hosts, 1, "NO-CARRIER"):
            pass
    a, b = start(hosts, 0, "a"), start(hosts, 1, "b", cluster=cluster)
    assert "waits for it" in b.wait(lambda event: event["event"] == "log")["text"]
    if blocked == "no carrier":
        hosts.restore(1)
    else:
        for order in (("set", "eth0", "down"), ("set", "eth0", "name", "lan0"), ("set", "lan0", "up")):
            ip(hosts, 1, "link", *order)
        ip(hosts, 1, "route", "add", "224.0.0.0/4", "dev", "lan0")
    up = time.monotonic()
    for one, other in ((a, b), (b, a)):
        assert one.sees(other)["at"] - up < 6
    assert len(b.all("log")) == 1


def test_a_link_that_goes_down_and_comes_back_is_taken_up_again(network, start):
    hosts = network(3)
    a, b = start(hosts, 0, "a"), start(hosts, 1, "b")
    a.sees(b)
    hosts.cut(1)
    b.wait(lambda event: event["event"] == "log")
    c = start(hosts, 2, "c")        # comes while b is away
    a.sees(c)
    hosts.restore(1)
    up = time.monotonic()
    for one, other in ((b, c), (c, b)):
        assert one.sees(other)["at"] - up < 6


def test_a_firewall_that_drops_multicast_is_named(network, start):
    hosts = network(2)
    hosts.run(1, ["nft", BLOCK_MDNS])
    a, b = start(hosts, 0, "a"), start(hosts, 1, "b")
    assert "block" in b.wait(lambda event: event["event"] == "log")["text"]
    assert b.ask("state", "state")["hears_itself"] is False
    assert a.ask("state", "state")["hears_itself"] is True
    hosts.run(1, ["nft", "delete table inet wall"])
    b.tell("update " + json.dumps(b.announce | {"name": "renamed"}))
    b.wait(lambda event: "works now" in event.get("text", ""))
    a.wait(lambda event: event.get("name") == "node-b")
    b.sees(a, 70)


@pytest.mark.slow
def test_a_network_that_was_divided_grows_together_again_unasked(network, start):
    hosts = network(2)
    a, b = start(hosts, 0, "a"), start(hosts, 1, "b")
    a.sees(b)
    b.sees(a)
    hosts.lose(1, 0.99999)                  # no interface goes down by this
    for one, other in ((a, b), (b, a)):
        one.loses(other, RECORD_S + 5)
    mark = len(a.events), len(b.events)
    hosts.lose(1, 1e-5)
    a.sees(b, mdns.LONGEST_SILENCE_S, since=mark[0])
    b.sees(a, mdns.LONGEST_SILENCE_S, since=mark[1])


@pytest.mark.slow
def test_who_lives_on_a_network_that_loses_packets_stays_in_sight(network, start):
    hosts = network(3)
    hosts.lose(2, 0.2)
    nodes = [start(hosts, host, letter) for host, letter in enumerate("abc")]
    for node in nodes:
        for other in nodes:
            if other is not node:
                node.sees(other)
    stopped = threading.Event()
    assert not stopped.wait(4 * RECORD_S)   # nothing is waited for: what counts is that nothing happens
    for node in nodes:
        assert node.all("gone") == []


# ---- silence ------------------------------------------------------------------------------------------------------------

ALL_KINDS = """
import threading
from pyfleet.config import ClusterConfig
from pyfleet.discovery import Announcement, configured, open_discovery
from pyfleet.identity import Namespace
cluster = ClusterConfig()
kinds = [open_discovery(kind, cluster, Namespace.from_psk("0a" * 32, "lab")) for kind in configured(cluster)]
seen = threading.Event()
for kind in kinds:
    kind.start(Announcement("a" * 52, "0" * 16, 52415, "quiet"), lambda event: seen.set())
print(len(kinds), seen.wait(3))
for kind in kinds:
    kind.close()
"""


@pytest.mark.feature("M34")
@pytest.mark.parametrize("enabled", (False, True))
def test_discovery_that_is_disabled_sends_not_one_packet(network, start, capture, enabled):
    hosts = network(2)
    start(hosts, 1, "b").wait(lambda event: event["event"] == "started")
    sent = capture(hosts, 0)
    env = {"PYTHONPATH": str(ROOT), "PYFLEET_DISCOVERY_ENABLED": str(enabled)}
    told = hosts.run(0, [sys.executable, "-c", ALL_KINDS], env).split()
    assert told == (["1", "True"] if enabled else ["0", "False"])
    assert bool(sent.packets) == enabled


def test_what_is_opened_is_what_the_settings_say():
    assert configured(ClusterConfig()) == ["mdns"]
    assert configured(ClusterConfig(static_peers="a")) == ["mdns", "static"]
    off = ClusterConfig(discovery_enabled=False, static_peers=["a"])
    assert configured(off) == ["static"]
    with pytest.raises(ConfigError, match="turned off"):
        open_discovery("mdns", off, None)
    with pytest.raises(ConfigError, match="not one of mdns, static"):
        open_discovery("bonjour", ClusterConfig(), None)


# ---- strangers ----------------------------------------------------------------------------------------------------------


def marked(peer, incarnation, psk=THEIRS):
    """The TXT record of a node of our namespace, marked with a secret that may be another."""
    who = {"v": "1", "tag": OUR_TAG, "peer": peer, "inc": incarnation, "proto": "1", "name": "x"}
    return who | {"mark": Namespace.from_psk(psk, NAME).mark(mdns._marked(who))}


class Forger:
    """Whoever can send on the network, which is everybody. shares: let others on that host use the port, too."""

    def __init__(self, network, host, shares=True):
        self.socket = inside(network.namespace(host), socket.socket, socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(network.address(host)))
        self.socket.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, 255)
        if shares:
            for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
                self.socket.setsockopt(socket.SOL_SOCKET, option, 1)
        self.socket.bind(("", MDNS_PORT))

    def send(self, data):
        self.socket.sendto(data, GROUP)

    def claim(self, peer, incarnation, *, port=1, address="10.77.0.200", text=None, ttl=120, label=None):
        """Send the records of a node."""
        label = label or f"{peer[:12]}-{incarnation}"
        text = text if text is not None else marked(peer, incarnation)
        info = ServiceInfo(SERVICE, f"{label}.{SERVICE}", port, server=f"{label}.local.", parsed_addresses=[address],
                           properties=text, host_ttl=ttl, other_ttl=ttl)
        out = DNSOutgoing(RESPONSE)
        for record in (info.dns_pointer(), info.dns_service(), info.dns_text(), *info.dns_addresses()):
            out.add_answer_at_time(record, 0)
        for packet in out.packets():
            self.send(packet)


@pytest.fixture
def forger(network):
    """forger(hosts, host): a Forger on that host."""
    made = []

    def get(*args, **options):
        made.append(Forger(*args, **options))
        return made[-1]
    yield get
    for each in made:
        each.socket.close()


def resident(node):
    return psutil.Process(node.process.pid).memory_info().rss


@pytest.mark.feature("P30")
def test_garbage_floods_and_clones_change_nothing_for_the_honest(network, start, forger):
    hosts = network(3)
    a, b = start(hosts, 0, "a"), start(hosts, 1, "b")
    a.sees(b)
    b.sees(a)
    mallory, rng = forger(hosts, 2), random.Random(7)
    before = resident(a)
    for size in [0, 1, 11, 12, 13] + [rng.randrange(9000) for _ in range(500)]:
        mallory.send(rng.randbytes(size))
    for size in (12, 60, 400):
        for _ in range(200):                                        # what looks like an answer, and is none
            mallory.send(b"\0\0\x84\0\0\0" + rng.randbytes(size))
    peer = peer_id("m")
    for text in ({"tag": OUR_TAG}, {}, b"\xff" * 255, {"tag": OUR_TAG, "peer": peer, "inc": "0" * 16, "proto": "9" * 200},
                 {"tag": "g" * 32, "peer": peer}, {f"k{i}": "v" * 200 for i in range(30)}):
        mallory.claim(peer, secrets.token_hex(8), text=text)
    mallory.claim(peer, "0" * 16, label="x" * 60)
    for _ in range(6000):                                           # clones of the tag, each a node of its own
        mallory.claim(peer, secrets.token_hex(8), port=rng.randrange(1, 65536))
    for _ in range(3000):
        mallory.claim(peer, secrets.token_hex(8), text={"tag": THEIR_TAG, "peer": peer, "proto": "1"})
    c = start(hosts, 2, "c")
    for one, other in ((a, c), (b, c), (c, a), (c, b)):
        one.sees(other, 60)
    state = a.ask("state", "state")
    assert state["kept"] == 2                                       # nobody without our secret is ever taken for one of us
    assert 0 < state["strangers"] <= MOST_SIGHTINGS
    assert resident(a) - before < 64 << 20
    for node in (a, b, c):
        assert not any(event["trouble"] for event in node.all("log"))
        assert not any(event["peer"] == peer for event in node.all("seen"))
        assert node.process.poll() is None


def test_a_port_that_another_program_keeps_for_itself_is_waited_for(network, start, forger):
    hosts = network(2)
    selfish = forger(hosts, 1, shares=False)
    a, b = start(hosts, 0, "a"), start(hosts, 1, "b")
    assert "in use" in b.wait(lambda event: event["event"] == "log")["text"]
    selfish.socket.close()
    a.sees(b, 5)
    b.sees(a)
    assert len(b.all("log")) == 1


def test_who_speaks_in_a_members_name_first_or_loudest_is_not_believed_for_long(network, start, forger):
    hosts = network(3)
    a, mallory = start(hosts, 0, "a"), forger(hosts, 2)
    a.until(lambda state: state["hears_itself"])
    b = start(hosts, 1, "b", addresses=["192.0.2.1"])
    a.sees(b)
    since = len(a.events)
    number = 0
    while len(a.all("seen")) < 5:                                   # says that b has moved, again and again
        mallory.claim(b.peer, b.incarnation, port=52415, address=f"198.51.100.{number % 250}", ttl=4500)
        number += 1
    a.wait(lambda event: event["event"] == "seen" and event["addresses"] == ["192.0.2.1"], since=since)
    seen = [event["at"] for event in a.events if event["event"] == "seen"]
    assert min(later - sooner for sooner, later in itertools.pairwise(seen)) > 0.9 * mdns.CHANGE_S     # however fast it says so
    assert number > 100 * len(seen)

    own = {"peer": peer_id("c"), "incarnation": "c" * 16, "port": 7, "name": "node-c"}
    for _ in range(10):                                             # takes a name before its owner does
        mallory.claim(own["peer"], own["incarnation"])
    a.until(lambda state: state["strangers"] == 1)
    node = start(hosts, 1)
    node.wait(lambda event: event["event"] == "seen")
    c = start(hosts, 1, "c", incarnation=own["incarnation"])
    assert a.sees(c)["port"] == 52415
    a.until(lambda state: state["strangers"] == 0)


def test_the_table_is_full_of_members_only_when_there_are_that_many(network, start, forger):
    hosts = network(3)
    a, b, mallory = start(hosts, 0, "a"), start(hosts, 1, "b"), forger(hosts, 2)
    a.sees(b)
    for _ in range(1500):                                           # names of which nothing else is to be heard
        mallory.claim(peer_id("m"), secrets.token_hex(8), text=b"")
    for number in range(20 * MOST_SIGHTINGS):                       # a member that has gone mad can do more
        mallory.claim(peer_id("m"), f"{number:016x}", text=marked(peer_id("m"), f"{number:016x}", OURS), port=1 + number)
        if number % 200 == 0 and a.ask("state", "state")["kept"] == MOST_SIGHTINGS:
            break
    assert a.ask("state", "state")["kept"] == MOST_SIGHTINGS
    c = start(hosts, 2, "c")
    a.sees(c)
    c.sees(b)
    assert a.ask("state", "state")["kept"] == MOST_SIGHTINGS


def test_a_forged_good_bye_is_contradicted(network, start, forger):
    hosts = network(3)
    a, b = start(hosts, 0, "a"), start(hosts, 1, "b")
    a.sees(b)
    b.sees(a)
    since = len(a.events)
    forger(hosts, 2).claim(b.peer, b.incarnation, port=52415, address=hosts.address(1), ttl=0)
    a.loses(b, since=since)
    assert a.sees(b, 5, since=since)["addresses"][0] == hosts.address(1)


def test_addresses_at_which_no_other_machine_can_be_are_left_out(network, start, forger):
    hosts = network(2)
    a, mallory = start(hosts, 0, "a"), forger(hosts, 1)
    a.until(lambda state: state["hears_itself"])
    for number, address in enumerate(("127.0.0.1", "224.0.0.1", "0.0.0.0", "192.0.2.1")):
        incarnation = f"{number:016x}"
        mallory.claim(peer_id("m"), incarnation, address=address, text=marked(peer_id("m"), incarnation, OURS))
    assert a.wait(lambda event: event["event"] == "seen")["addresses"] == ["192.0.2.1"]
    assert len(a.all("seen")) == 1


@given(st.binary(max_size=600))
def test_any_text_record_is_read_or_is_not_ours(text):
    assert read_text(text, "a" * 12 + "-" + "0" * 16) is None


@given(st.text(max_size=100), st.text(max_size=100))
def test_names_for_people_are_harmless_on_their_terminals(name, version):
    peer, incarnation = peer_id("a"), "0" * 16
    entries = [f"peer={peer}", f"inc={incarnation}", f"tag={OUR_TAG}", "proto=1", f"name={name}", f"v={version}"]
    text = b"".join(bytes([len(entry)]) + entry for entry in (entry.encode()[:255] for entry in entries))
    who = read_text(text, f"{peer[:12]}-{incarnation}")
    for word in (mdns._shown(who["name"]), mdns._shown(who["v"])):
        assert word.isprintable() and len(word) <= mdns.MOST_LETTERS


# ---- on this machine alone ----------------------------------------------------------------------------------


def test_nodes_of_one_machine_find_each_other_on_its_loopback(start):
    a, b = (start(None, None, letter, cluster={"iface": "lo"}) for letter in "ab")
    if not any(each.is_loopback and "127.0.0.1" in each.senders and each.name == "lo" for each in mdns.interfaces()):
        pytest.skip("there is no loopback interface of the name lo")
    assert a.sees(b)["addresses"] == ["127.0.0.1"]
    assert b.sees(a)["port"] == 52415
    b.ask("close", "closed")
    a.loses(b)
    assert b.ask("close", "closed")["seconds"] < 0.1            # again: nothing happens
