"""The ring, shares and addresses follow what was measured; equal facts give equal decisions."""
import itertools
import json
import math
import random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetcore.schedules.base import shares_for
from pyfleet.interfaces import Interface
from pyfleet.members import Node, Seat
from pyfleet.membership import topology as module
from pyfleet.membership.messages import Report, decode, encode
from pyfleet.membership.topology import MOST_EXACT, Edge, Path, Paths, Topology, alike, ordered, rounds

MBIT = 1e6 / 8


def edge(mbit_s=1000.0, latency_s=1e-4, back=None, **rest):
    return Edge(latency_s=latency_s, sent_bytes_s=mbit_s * MBIT, received_bytes_s=(back or mbit_s) * MBIT, **rest)


def of(edges, names=()):
    """A topology of {(a, b): edge}."""
    found = Topology()
    for name in {name for pair in edges for name in pair} | set(names):
        found.join(Node(peer=name, incarnation="0" * 16))
    for (a, b), each in edges.items():
        found.report(a, {b: each})
    return found


def names(count):
    return [f"n{k:02}" for k in range(count)]


def around(ring):
    return list(zip(ring, ring[1:] + ring[:1], strict=True))


def worth(found, ring):
    """What a ring is rated by, the least the best: pairs on air, slowest edge, sum; like edges count as equal."""
    equal = alike(found.edge(a, b).seconds for a, b in itertools.combinations(ring, 2))
    edges = [found.edge(a, b) for a, b in around(ring)]
    times = [equal[each.seconds] for each in edges]
    return sum(each.on_air for each in edges), max(times), math.fsum(times)


def best_of_all(found, peers):
    leader, *rest = peers
    equal = alike(found.edge(a, b).seconds for a, b in itertools.combinations(peers, 2))
    web = {(a, b): (found.edge(a, b).on_air, equal[found.edge(a, b).seconds]) for a, b in itertools.permutations(peers, 2)}
    best = (len(peers) + 1,)
    for order in itertools.permutations(rest):
        if order[0] < order[-1]:
            edges = [web[pair] for pair in around((leader, *order))]
            best = min(best, (sum(air for air, _ in edges), max(time for _, time in edges), math.fsum(time for _, time in edges)))
    return best


def at_random(count, seed, num_wifi=0):
    chance, peers = random.Random(seed), names(count)
    air = set(chance.sample(peers, num_wifi))
    return of({(a, b): edge(10 ** chance.uniform(1, 3), chance.uniform(1e-5, 1e-3),
                            medium="wifi" if a in air else "ethernet", peer_medium="wifi" if b in air else "ethernet")
               for a, b in itertools.combinations(peers, 2)}), peers


# ---- the ring ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("count", (4, 5, 6, 7, 8))
def test_the_ring_is_the_best_of_all(count, seed):
    found, peers = at_random(count, seed, num_wifi=seed % count)
    ring = found.ring(peers, peers[0])
    assert sorted(ring) == peers
    assert worth(found, ring) == pytest.approx(best_of_all(found, peers))


@pytest.mark.parametrize("seed", range(6))
def test_noise_of_measurements_changes_no_ring(seed):
    """Cables at 1 Gbit/s and 100 Mbit/s, measured twice."""
    chance, peers = random.Random(seed), names(8)
    fast = {pair for pair in itertools.combinations(peers, 2) if chance.random() < 0.5}
    rings = set()
    for _ in range(10):
        found = of({pair: edge((1000 if pair in fast else 100) * chance.uniform(0.9, 1.1), chance.uniform(1e-4, 3e-4))
                    for pair in itertools.combinations(peers, 2)})
        rings.add(found.ring(peers, peers[0]))
    assert len(rings) == 1


def test_what_is_alike():
    assert alike([8.0, 1.0, 1.3, 1.4, 1.8, 9.0]) == {1.0: 1.0, 1.3: 1.0, 1.4: 1.4, 1.8: 1.4, 8.0: 8.0, 9.0: 8.0}
    assert alike([]) == {}


def test_nine_nodes_too():
    found, peers = at_random(9, 1, num_wifi=3)
    assert worth(found, found.ring(peers, peers[0])) == pytest.approx(best_of_all(found, peers))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("count", (10, MOST_EXACT))
def test_larger_rings_are_nearly_as_good_as_the_best(count, seed):
    found, peers = at_random(count, seed, num_wifi=count // 2)
    web = found._web(peers)
    exact, improved = ([peers[place] for place in make(web)] for make in (module._exact, module._improved))
    (air, slowest, total), (best_air, best_slowest, best_total) = worth(found, improved), worth(found, exact)
    assert sorted(improved) == peers
    assert air == best_air
    assert slowest <= best_slowest * 1.0001
    assert total <= best_total * 1.25


@pytest.mark.parametrize("count", (16, 33, 64))
def test_a_fast_ring_is_found_among_many_nodes(count):
    peers = names(count)
    hidden = random.Random(count).sample(peers, count)
    fast = {frozenset(pair) for pair in around(hidden)}
    found = of({(a, b): edge(1000 if {a, b} in fast else 100) for a, b in itertools.combinations(peers, 2)})
    assert {frozenset(pair) for pair in around(found.ring(peers, hidden[3]))} == fast


@pytest.mark.parametrize(("count", "num_wifi"), [
    (4, 2), (5, 2), (5, 3), (8, 4), (9, 7), (12, 6), (12, 9), (20, 10), (31, 17), (64, 32)])
def test_two_on_wifi_are_side_by_side_only_where_it_can_not_be_helped(count, num_wifi):
    """Even where WiFi is the fastest that there is."""
    peers = names(count)
    air = set(random.Random(count).sample(peers, num_wifi))
    found = of({(a, b): edge(2000 if {a, b} <= air else 100, medium="wifi" if a in air else "ethernet",
                             peer_medium="wifi" if b in air else "ethernet") for a, b in itertools.combinations(peers, 2)})
    ring = found.ring(peers, peers[0])
    assert sum(set(pair) <= air for pair in around(ring)) == max(0, 2 * num_wifi - count)


def test_nodes_on_wifi_are_told_by_what_else_was_measured_of_them():
    """Between a and b nothing was measured, but both are known to be on WiFi."""
    wifi = {"medium": "wifi", "peer_medium": "ethernet"}
    found = of({("a", "c"): edge(50, **wifi), ("a", "d"): edge(50, **wifi), ("b", "c"): edge(50, **wifi),
                ("b", "d"): edge(50, **wifi), ("c", "d"): edge(50)})
    assert found.ring(["a", "b", "c", "d"], "a") == ("a", "c", "b", "d")


def test_a_cable_between_two_that_are_on_wifi_otherwise_is_used():
    wifi = {"medium": "wifi", "peer_medium": "ethernet"}
    found = of({("a", "c"): edge(50, **wifi), ("a", "d"): edge(50, **wifi), ("b", "c"): edge(50, **wifi),
                ("b", "d"): edge(50, **wifi), ("c", "d"): edge(1000), ("a", "b"): edge(10_000, medium="thunderbolt",
                                                                                      peer_medium="thunderbolt")})
    ring = found.ring(["a", "b", "c", "d"], "a")
    assert {frozenset("ab"), frozenset("cd")} <= {frozenset(pair) for pair in around(ring)}


def test_the_slower_way_of_an_edge_counts():
    fine = edge(100)
    found = of({pair: fine for pair in itertools.combinations("abcd", 2)} | {("a", "b"): edge(1000, back=1)})
    assert {"a", "b"} not in [set(pair) for pair in around(found.ring("abcd", "a"))]


def test_an_edge_that_leads_nowhere_is_avoided_and_one_not_measured_counts_as_the_slowest():
    fine = edge(100)
    edges = {pair: fine for pair in itertools.combinations("abcd", 2)}
    found = of(edges | {("a", "b"): edge(0, back=0)})
    assert {"a", "b"} not in [set(pair) for pair in around(found.ring("abcd", "a"))]
    del edges["a", "b"]
    found = of(edges | {("c", "d"): edge(50)})
    assert {frozenset("ac"), frozenset("ad"), frozenset("bc"), frozenset("bd")} == {
        frozenset(pair) for pair in around(found.ring("abcd", "a"))}


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 14), st.integers(0, 1000), st.randoms(use_true_random=False))
def test_equal_facts_in_any_order_give_the_same_ring(count, seed, chance):
    found, peers = at_random(count, seed, num_wifi=count // 3)
    leader = chance.choice(peers)
    facts = [(a, b, found.edge(a, b)) for a, b in itertools.permutations(peers, 2)]
    chance.shuffle(facts)
    mixed, again = chance.sample(peers, count), Topology()
    for peer in mixed:
        again.join(Node(peer=peer, incarnation="0" * 16))
    for a, b, each in facts:
        again.report(a, {b: each.facts()})
    ring = found.ring(peers, leader)
    assert again.ring(mixed, leader) == ring
    assert ring[0] == leader
    assert sorted(ring) == peers
    assert len(ring) < 3 or ring[1] < ring[-1]


def test_another_leader_turns_an_equal_ring():
    found, peers = at_random(8, 5)
    rings = [found.ring(peers, leader) for leader in peers]
    for ring in rings:
        assert {frozenset(pair) for pair in around(ring)} == {frozenset(pair) for pair in around(rings[0])}


@pytest.mark.parametrize("peers", (["a"], ["a", "b"], ["a", "b", "c"]))
def test_small_rings_need_no_measurement(peers):
    assert Topology().ring(reversed(peers), peers[-1]) == (peers[-1], *peers[:-1])


def test_without_measurements_the_order_is_that_of_peer_ids():
    assert sorted(Topology().ring(names(5), "n02")) == names(5)
    assert Topology().ring(names(5), "n02")[0] == "n02"
    with pytest.raises(ValueError, match="leader"):
        Topology().ring(names(3), "other")


# ---- bandwidths and shares -------------------------------------------------------------------------------------------------

def test_one_slow_node_gets_a_small_share():
    peers = names(4)
    found = of({(a, b): edge(95 if "n02" in (a, b) else 950) for a, b in itertools.combinations(peers, 2)})
    assert found.bandwidths(peers) == (950 * MBIT, 950 * MBIT, 95 * MBIT, 950 * MBIT)
    assert found.shares(peers) == shares_for([950, 950, 95, 950])
    assert found.shares(peers)[2] < 0.01
    assert sum(found.shares(peers)) == pytest.approx(1)


def test_like_links_count_as_equal_and_unknown_ones_as_good():
    found = of({("a", "b"): edge(1000), ("a", "c"): edge(800), ("b", "c"): edge(790)}, names=["d"])
    assert found.bandwidths("abcd") == (1000 * MBIT,) * 4
    assert found.shares("abcd") == [0.25] * 4
    assert Topology().bandwidths("ab") is None
    assert Topology().shares("ab") == [0.5, 0.5]
    assert of({("a", "b"): edge(0, back=0)}).bandwidths("ab") is None


def test_ranks_of_a_node_share_its_link():
    found = of({("a", "b"): edge(1000, 2e-4), ("a", "c"): edge(100, 5e-4), ("b", "c"): edge(100, 1e-4)})
    seats = [Seat(peer=peer, incarnation="", joined=1, slots=slots) for peer, slots in (("c", 1), ("a", 2), ("b", 0))]
    links = found.links(seats)
    assert links.bandwidths == (100 * MBIT, 500 * MBIT, 500 * MBIT)
    assert links.latency_s == 5e-4
    assert Topology().links(seats) is None


def test_weights_follow_the_profiles():
    found = Topology()
    for peer, gflops in (("a", 300.0), ("b", 100.0)):
        found.join(Node(peer=peer, incarnation="0" * 16, profile={"matmul_gflops": gflops}))
    assert found.weights("ab") == (0.75, 0.25)
    assert sum(found.weights("abx")) == pytest.approx(1)


# ---- facts -----------------------------------------------------------------------------------------------------------------

def test_an_edge_is_the_same_from_both_ends_and_through_a_message():
    seen = edge(100, 3e-3, back=20, medium="wifi", peer_medium="ethernet", address="10.0.0.2", measured_at=12.5)
    assert seen.turned().turned().facts() == seen.facts() | {"address": ""}
    assert Edge.from_facts(decode(encode(Report({"b": seen.facts()}))).edges["b"]) == seen
    found = of({("b", "a"): seen})
    assert found.edge("b", "a").sent_bytes_s == found.edge("a", "b").received_bytes_s == 100 * MBIT
    assert found.edge("a", "b").medium == "ethernet"
    assert seen.bytes_s == 20 * MBIT
    assert seen.seconds == pytest.approx(3e-3 + (2 << 20) / (20 * MBIT))


GOOD = edge().facts()


@pytest.mark.parametrize("facts", [
    None, 7, [], {}, {"latency_s": 1}, GOOD | {"more": 1}, GOOD | {"latency_s": -1}, GOOD | {"latency_s": "1"},
    GOOD | {"sent_bytes_s": float("nan")}, GOOD | {"received_bytes_s": float("inf")}, GOOD | {"sent_bytes_s": 1e13},
    GOOD | {"medium": "string"}, GOOD | {"medium": "wifi\n"}, GOOD | {"address": "x" * 65}, GOOD | {"measured_at": float("inf")},
    GOOD | {"latency_s": 1e9},
], ids=range(16))
def test_what_is_no_edge_is_refused_whole(facts):
    found = of({("a", "b"): edge(100)}, names=["c"])
    with pytest.raises(ValueError, match="not an edge"):
        found.report("a", {"b": edge(5), "c": facts})
    assert found.edge("a", "b").bytes_s == 100 * MBIT
    assert found.edge("a", "c") is None


def test_only_edges_between_known_nodes_are_kept_and_the_last_word_counts():
    found = of({("a", "b"): edge(100)})
    found.report("a", {f"stranger{k}": edge() for k in range(1000)} | {"a": edge()})
    found.report("stranger", {"a": edge()})
    assert len(found._edges) == 1
    found.report("b", {"a": edge(7)})
    assert found.edge("a", "b").bytes_s == 7 * MBIT


def test_who_leaves_or_starts_anew_is_measured_again():
    found = of({("a", "b"): edge(), ("b", "c"): edge(), ("a", "c"): edge()})
    found.join(Node(peer="b", incarnation="0" * 16, name="the same, renamed"))
    assert found.edge("a", "b") is not None
    found.join(Node(peer="b", incarnation="1" * 16))
    assert found.edge("a", "b") is found.edge("b", "c") is None
    assert found.to_measure("abc") == [[("a", "b")], [("b", "c")]] or found.to_measure("abc") == [[("b", "c")], [("a", "b")]]
    found.leave("c")
    found.leave("nobody")
    assert found.edge("a", "c") is None
    assert set(found.nodes) == {"a", "b"}


def test_the_form_for_programs_tells_everything():
    found = of({("a", "b"): edge(100, 2e-3, back=50, medium="wifi", peer_medium="ethernet", address="10.0.0.2", measured_at=5.0)})
    found.join(Node(peer="a", incarnation="0" * 16, name="attic", slots=2, addresses=("10.0.0.1",), profile={"cores": 8}))
    told = found.as_json(found.ring("ab", "b"))
    assert json.loads(json.dumps(told)) == told
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(told)) == told
    assert told["nodes"]["a"] == {"name": "attic", "slots": 2, "addresses": ["10.0.0.1"], "profile": {"cores": 8}}
    assert told["links"] == [
        {"from": "a", "to": "b", "latency_ms": 2.0, "mbit_s": 100.0, "medium": "wifi", "peer_medium": "ethernet",
         "address": "10.0.0.2", "measured_at": 5.0},
        {"from": "b", "to": "a", "latency_ms": 2.0, "mbit_s": 50.0, "medium": "ethernet", "peer_medium": "wifi",
         "address": "", "measured_at": 5.0}]
    assert told["ring"] == ["b", "a"]


# ---- who probes whom, when -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("count", range(12))
def test_everyone_meets_everyone_once_and_nobody_twice_in_a_round(count):
    peers = names(count)
    schedule = rounds(reversed(peers))
    assert sorted(pair for each in schedule for pair in each) == list(itertools.combinations(peers, 2))
    for each in schedule:
        busy = [peer for pair in each for peer in pair]
        assert len(busy) == len(set(busy))
    assert len(schedule) == (0 if count < 2 else count - 1 + count % 2)


def test_what_was_measured_is_left_out():
    known = list(itertools.combinations(names(7), 2))
    schedule = rounds(names(8), [pair[::-1] for pair in known])
    assert sorted(pair for each in schedule for pair in each) == [(name, "n07") for name in names(7)]
    assert len(schedule) == 7
    assert rounds(names(7), known) == []


# ---- several addresses -----------------------------------------------------------------------------------------------------

THERE = [Interface("eth0", "ethernet", ("10.0.0.7",), (24,), 1500), Interface("wlan0", "wifi", ("10.0.1.7",), (24,), 1500),
         Interface("thunderbolt0", "thunderbolt", ("10.0.2.7",), (24,), 1500),
         Interface("docker0", "virtual", ("172.17.0.1",), (16,), 1500)]
ALL = ["172.17.0.1", "192.0.2.1", "172.17.0.2", "10.0.1.1", "10.0.0.1", "10.0.2.1"]


def test_unmeasured_addresses_go_by_subnet_and_medium():
    assert Paths(ALL, THERE).order() == ["10.0.2.1", "10.0.0.1", "10.0.1.1", "172.17.0.2", "192.0.2.1", "172.17.0.1"]
    assert Paths(["192.0.2.9", "192.0.2.1"], THERE).order() == ["192.0.2.9", "192.0.2.1"]
    assert Paths().order() == []


def test_what_was_measured_decides():
    paths = Paths(["192.0.2.1", "192.0.2.2", "10.0.1.1"], THERE)
    paths.measured(edge(300, address="10.0.1.1"))
    assert paths.order() == ["10.0.1.1", "192.0.2.1", "192.0.2.2"]
    paths.measured(edge(900, address="192.0.2.2"))
    assert paths.order() == ["192.0.2.2", "10.0.1.1", "192.0.2.1"]
    paths.measured(edge(1000, latency_s=5e-3, address="192.0.2.1"))         # alike: the shorter way
    assert paths.order() == ["192.0.2.2", "192.0.2.1", "10.0.1.1"]
    paths.measured(edge(5000, address="nobody's"))
    assert paths.order() == ["192.0.2.2", "192.0.2.1", "10.0.1.1"]


def test_alike_links_go_by_medium_then_latency():
    paths = Paths(["10.0.1.1", "10.0.0.1"], THERE)
    paths.measured(edge(1000, latency_s=1e-4, address="10.0.1.1"))
    paths.measured(edge(900, latency_s=2e-4, address="10.0.0.1"))
    assert paths.order() == ["10.0.0.1", "10.0.1.1"]
    paths.measured(edge(900, latency_s=2e-4, address="10.0.0.1", peer_medium="wifi"))       # the other end is no better
    assert paths.order() == ["10.0.1.1", "10.0.0.1"]


def test_a_cable_that_was_plugged_in_is_tried_before_the_radio_that_was_measured():
    paths = Paths(["10.0.1.1"], THERE)
    paths.measured(edge(300, address="10.0.1.1"))
    paths.learn(["10.0.1.1", "192.0.2.1", "10.0.0.1"], THERE)
    assert paths.order() == ["10.0.0.1", "10.0.1.1", "192.0.2.1"]
    paths.failed("10.0.0.1")
    assert paths.order() == ["10.0.1.1", "192.0.2.1", "10.0.0.1"]


def test_after_a_failure_the_next_one_has_its_turn_and_a_success_makes_good():
    paths = Paths(["10.0.2.1", "10.0.0.1", "10.0.1.1"], THERE)
    turns = []
    for _ in range(6):
        turns.append(paths.order()[0])
        paths.failed(turns[-1])
    assert turns == ["10.0.2.1", "10.0.0.1", "10.0.1.1"] * 2
    paths.worked("10.0.1.1")
    assert paths.order()[0] == "10.0.1.1"
    paths.measured(edge(100, address="10.0.0.1"))
    assert paths.order()[0] == "10.0.0.1"
    paths.worked("nobody's")
    paths.failed("nobody's")
    assert len(paths.order()) == 3


def test_addresses_that_stay_keep_what_is_known_and_their_number_is_bounded():
    paths = Paths(["10.0.0.1", "10.0.1.1"], THERE)
    paths.failed("10.0.0.1")
    paths.learn(["10.0.0.1", "192.0.2.1", "192.0.2.1"], THERE[1:])
    assert paths.order() == ["192.0.2.1", "10.0.0.1"]
    paths.learn([f"10.9.{k // 250}.{k % 250}" for k in range(1000)], THERE)
    assert len(paths.order()) == module.MOST_ADDRESSES


def test_the_order_of_paths_is_a_pure_function():
    paths = [Path("a", failures=1), Path("b", own=True), Path("c", near=True, medium="wifi"), Path("d")]
    assert [path.address for path in ordered(paths)] == ["c", "d", "a", "b"]
    assert [path.address for path in paths] == list("abcd")
