"""Processes on several hosts measure the ways between them, tell each other, and come to the same decisions."""
import itertools
import json
import socket
import time

import pytest

from fleetcore.schedules.base import shares_for
from pyfleet.identity import Initiator, Namespace, NodeKey, Purpose, Responder, ciphers
from pyfleet.identity.handshake import Kind
from pyfleet.interfaces import interfaces, medium_of
from pyfleet.members import Node
from pyfleet.membership.messages import Hello, Report, decode, encode
from pyfleet.membership.probe import probe_initiator, probe_responder
from pyfleet.membership.topology import Paths, Topology
from pyfleet.profile import profile, weight
from tests.network import bits_per_s
from tests.ranks import PATIENCE_S

NAMESPACE = Namespace.from_token(b"a secret of this test")


class Here:
    """What the process of a host keeps between calls."""

    key = listener = node = None
    topology, edges = Topology(), {}


def begin(host, address):
    """Become a node; (its peer id, where it listens, what it says that it can do)."""
    Here.key = NodeKey.generate()
    Here.listener = socket.create_server(("", 0))
    facts = profile(None) | {"matmul_gflops": 100.0 * (host + 1)}
    Here.node = Node(peer=Here.key.peer_id, incarnation=f"{host:016}", name=f"host{host}", addresses=(address,),
                     port=Here.listener.getsockname()[1], profile=facts | {"weight": weight(facts)})
    Here.topology.join(Here.node)
    return Here.node.peer, Here.node.port, Here.node.profile


def greet(sock, party):
    while party.session is None:
        sock.sendall(party.receive(sock.recv(party.wants)))
    if isinstance(party, Responder):
        sock.sendall(party.welcome())
    return party.session


def read(sock, count):
    data = b""
    while len(data) < count:
        data += sock.recv(count - len(data))
    return data


def meet(where, measure):
    """Connect to (address, port), or be connected to when it is None; prove, measure, and tell each other what is known."""
    purpose = Purpose(Kind.PROBE)
    if where is None:
        sock = Here.listener.accept()[0]
        party, probe = Responder(Here.key, NAMESPACE, {(Kind.PROBE, -1): ciphers.PLAIN}), probe_responder
    else:
        sock = socket.create_connection(where, timeout=PATIENCE_S)
        party, probe = Initiator(Here.key, NAMESPACE, purpose, ciphers.PLAIN), probe_initiator
        sock.sendall(party.hello)
    with sock:
        sock.settimeout(PATIENCE_S)
        session = greet(sock, party)
        if measure:
            own = medium_of(sock.getsockname()[0], interfaces())
            Here.edges[session.peer_id] = probe(sock, session.binding, medium=own, address=sock.getpeername()[0])
            Here.topology.report(Here.node.peer, Here.edges)
        facts = {peer: edge.facts() for peer, edge in Here.edges.items()}
        for message in (Hello(Here.node), Report(facts)):
            data = encode(message)
            sock.sendall(len(data).to_bytes(4, "little") + data)
        hello, report = (decode(read(sock, int.from_bytes(read(sock, 4), "little"))) for _ in range(2))
    assert hello.node.peer == session.peer_id
    Here.topology.join(hello.node)
    Here.topology.report(session.peer_id, report.edges)


def decide(peers, leader):
    ring = Here.topology.ring(peers, leader)
    return ring, Here.topology.shares(ring), Here.topology.bandwidths(ring), Here.topology.as_json(ring)


def all_meet(hosts, group, where, measure):
    """Every pair once, in the rounds that the topology wants."""
    hosts_of = {peer: host for host, (peer, *_) in enumerate(where)}
    for pairs in Topology().to_measure(hosts_of):
        busy = []
        for one, other in ((hosts_of[a], hosts_of[b]) for a, b in pairs):
            group.start(meet, None, measure, only=[other])
            group.start(meet, (hosts.address(other), where[other][1]), measure, only=[one])
            busy += [one, other]
        group.collect(only=busy)


def began(hosts):
    """(group, peer ids, where each listens) of a process on every host."""
    group, where = hosts.ranks(init=False), []
    for host in range(hosts.num_hosts):
        where += group.run(begin, host, hosts.address(host), only=[host])
    return group, [peer for peer, *_ in where], where


@pytest.mark.feature("P16", "P17")
def test_one_slow_node_among_fast_ones(network):
    hosts = network(4, "1gbit", rates={2: "100mbit"})
    group, peers, where = began(hosts)
    for _ in range(3):                  # four processes at 1 Gbit/s want two processors, which others may use just now
        all_meet(hosts, group, where, measure=True)
        all_meet(hosts, group, where, measure=False)    # now everybody hears what everybody has measured
        found = group.run(decide, peers, peers[1])
        if all(link["mbit_s"] > 800 for link in found[0][-1]["links"] if peers[2] not in (link["from"], link["to"])):
            break
    ring, shares, bandwidths, told = found[0]
    assert ring[0] == peers[1]
    for ring_there, shares_there, *_, told_there in found[1:]:
        assert (ring_there, shares_there) == (ring, shares)
        assert set(told_there["nodes"]) == set(told["nodes"])
    # What everyone can do, and what lies between everyone, is known everywhere.
    for *_, told in found:
        assert {peer: told["nodes"][peer]["profile"] for peer in peers} == {peer: facts for peer, _, facts in where}
        assert all(told["nodes"][peer]["profile"]["cores"] >= 1 and "accelerators" in told["nodes"][peer]["profile"]
                   and told["nodes"][peer]["profile"]["memory_bytes"] > 0 for peer in peers)
        links = {(link["from"], link["to"]): link for link in told["links"]}
        assert set(links) == set(itertools.permutations(peers, 2))
        for pair, link in links.items():
            rate = 100 if peers[2] in pair else 1000
            assert link["mbit_s"] == pytest.approx(rate, rel=0.2)
            assert link["latency_ms"] < 2
            assert link["medium"] == link["peer_medium"] == "virtual"
        assert json.loads(json.dumps(told)) == told
    slow = ring.index(peers[2])
    assert 8e-6 * bandwidths[slow] == pytest.approx(100, rel=0.2)
    assert shares == shares_for(bandwidths)
    assert shares[slow] < 0.05
    assert [share for place, share in enumerate(shares) if place != slow] == pytest.approx([(1 - shares[slow]) / 3] * 3)


@pytest.mark.feature("P17")
def test_the_ring_follows_the_measurement(network):
    """Every ring has two edges of the slowest node; the best one gives one of them to the next slowest, which has two, too."""
    hosts = network(5, "1gbit", rates={1: "100mbit", 3: "20mbit"})
    group, peers, where = began(hosts)
    all_meet(hosts, group, where, measure=True)
    all_meet(hosts, group, where, measure=False)
    found = group.run(decide, peers, peers[0])
    ring, shares, *_ = found[0]
    assert all(each[:2] == (ring, shares) for each in found)
    around = {frozenset(pair) for pair in zip(ring, ring[1:] + ring[:1], strict=True)}
    assert {peers[1], peers[3]} in around
    assert shares[ring.index(peers[3])] < 0.02          # 100 Mbit/s is as good as any beside that
    assert sum(shares) == pytest.approx(1)


def try_in_order(addresses, port, dead):
    """The addresses that were tried, over interfaces of this host; the last one worked."""
    paths, tried = Paths(addresses, interfaces()), []
    while True:
        address = paths.order()[0]
        tried.append(address)
        try:
            socket.create_connection((address, port), timeout=0.2 if address in dead else PATIENCE_S).close()
        except OSError:
            paths.failed(address)
            continue
        paths.worked(address)
        return tried, paths.order()[0]


def test_a_node_with_two_addresses_one_of_them_dead_is_reached_over_the_other(network):
    hosts = network(2)
    group, _, where = began(hosts)
    for host in range(2):
        hosts.run(host, ["ip", "addr", "add", f"10.78.0.{host + 1}/24", "dev", "eth0"])
    hosts.run(1, ["nft", ("add table ip dead; add chain ip dead in { type filter hook input priority 0; }; "
                          "add rule ip dead in ip daddr 10.78.0.2 drop")])
    dead, alive = "10.78.0.2", hosts.address(1)
    ((tried, first),) = group.run(try_in_order, [dead, alive, "192.0.2.1"], where[1][1], [dead], only=[0])
    assert tried == [dead, alive]
    assert first == alive


def pour(address, port, num_bytes):
    with socket.create_connection((address, port), timeout=PATIENCE_S) as sock:
        sock.sendall(bytes(num_bytes))


def drain():
    """Bytes per second of all that comes over one plain connection."""
    sock, count, room = Here.listener.accept()[0], 0, bytearray(1 << 20)
    with sock:
        began = time.perf_counter()
        while part := sock.recv_into(room):
            count += part
        return count / (time.perf_counter() - began)


@pytest.mark.feature("P17")
@pytest.mark.parametrize("rate", ("200mbit", "50mbit"))
def test_a_probe_agrees_with_what_a_plain_transfer_takes(network, rate):
    hosts = network(2, rate)
    group, peers, where = began(hosts)
    all_meet(hosts, group, where, measure=True)
    (told,) = (each[-1] for each in group.run(decide, peers, peers[0], only=[0]))
    for one, other in ((0, 1), (1, 0)):
        group.start(drain, only=[other])
        group.run(pour, hosts.address(other), where[other][1], 10_000_000, only=[one])
        (plain,) = group.collect(only=[other])
        (probed,) = [link["mbit_s"] * 1e6 / 8 for link in told["links"] if link["from"] == peers[one]]
        assert plain / 2 < probed < plain * 2
        assert probed == pytest.approx(bits_per_s(rate) / 8, rel=0.2)
