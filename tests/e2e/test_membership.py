"""Machines that share a secret become one fleet by themselves, and stay one: real processes, sockets and multicast."""
import json
import sys
import time

import pytest

from tests.agents import PSK, Agents, agree, members, wait_for
from tests.network import Network, unavailable

pytestmark = pytest.mark.skipif(bool(unavailable()), reason=str(unavailable()))

FORM_S, JOIN_S, LEAVE_S, KILL_S, CUT_S = 5, 3, 1, 2, 4      # what is promised


@pytest.fixture
def fleet(tmp_path):
    """fleet(n): n nodes on as many hosts that have formed a fleet."""
    with Network(8, None) as network, Agents(tmp_path, network) as agents:
        def form(count, **options):
            nodes = [agents.start(host, **options) for host in range(count)]
            wait_for(lambda: agree(nodes), FORM_S, f"a fleet of {count}", agents)
            return nodes
        form.network, form.agents = network, agents
        yield form


@pytest.mark.feature("P2", "P15", "M7")
@pytest.mark.parametrize("count", [2, 4, 8])
def test_nodes_started_together_agree_on_one_view_and_one_leader(tmp_path, count):
    with Network(count, None) as network, Agents(tmp_path, network) as agents:
        nodes = []
        for host in range(count):
            nodes.append(agents.start(host))
            time.sleep(2 / count)               # they are switched on one after the other
        took = wait_for(lambda: agree(nodes), FORM_S, f"a fleet of {count}", agents)
        print(f"{count} nodes agreed {took:.2f} s after the last start")
        wait_for(lambda: sum(node.status()["is_leading"] for node in nodes) == 1, 1, "one leader")


@pytest.mark.feature("P2", "P20", "M6")
def test_who_comes_later_is_let_in_and_who_goes_is_missed(fleet):
    nodes = fleet(3)
    epoch = agree(nodes)["epoch"]
    late = fleet.agents.start(3)
    print("joined", wait_for(lambda: agree([*nodes, late]), JOIN_S, "a late node is in", fleet.agents))
    assert agree(nodes + [late])["epoch"] > epoch
    late.leave()
    print("left", wait_for(lambda: agree(nodes), LEAVE_S, "the leaver is out", fleet.agents))
    nodes[2].kill()
    print("killed", wait_for(lambda: agree(nodes[:2]), KILL_S, "the killed one is out", fleet.agents))


@pytest.mark.feature("P20")
def test_who_is_cut_off_is_out_and_comes_back_by_itself(fleet):
    nodes = fleet(3)
    fleet.network.cut(2)
    print("cut", wait_for(lambda: agree(nodes[:2]), CUT_S, "the one cut off is out", fleet.agents))
    wait_for(lambda: "waiting for a majority" in nodes[2].status()["state"], CUT_S, "it knows that it is cut off")
    assert not nodes[2].status()["is_leading"] and not nodes[2].status()["has_quorum"]
    fleet.network.restore(2)
    print("back", wait_for(lambda: agree(nodes), JOIN_S + CUT_S, "it is back", fleet.agents))


@pytest.mark.feature("P18", "P19")
def test_a_killed_leader_has_a_successor(fleet):
    nodes = fleet(4)
    took = []
    for _ in range(3):
        leader = next(node for node in nodes if node.status()["is_leading"])
        nodes.remove(leader)
        leader.kill()
        took.append(wait_for(lambda: agree(nodes), KILL_S, "a new leader", fleet.agents))
        nodes.append(fleet.agents.start(leader.host, leader.name))
        wait_for(lambda: agree(nodes), JOIN_S + 1, "the old one is back", fleet.agents)
    print("a new leader after", took)


@pytest.mark.parametrize("minority", [(2, 3), (3,)], ids=["2|2", "3|1"])
@pytest.mark.feature("P19")
def test_a_partition_has_one_leader_and_heals(fleet, minority):
    """Who is the leader is on the side that may go on, when the sides are equal."""
    nodes = fleet(4)
    leader = next(node for node in nodes if node.status()["is_leading"])
    away = [node for node in nodes if node is not leader][:len(minority)]
    rest = [node for node in nodes if node not in away]
    before = agree(nodes)
    with fleet.network.partition([node.host for node in away]):
        epochs = wait_for(lambda: agree(rest), CUT_S, "the others go on", fleet.agents)
        print("went on after", epochs)
        until = time.monotonic() + 3
        while time.monotonic() < until:
            assert not any(node.status()["is_leading"] for node in away)
            assert all(node.status()["epoch"] == before["epoch"] for node in away)
            time.sleep(0.1)
    wait_for(lambda: agree(nodes), JOIN_S + CUT_S, "all are together again", fleet.agents)
    assert agree(nodes)["leader"] == agree(rest + away)["leader"] and len(members(agree(nodes))) == 4


def test_who_was_stopped_for_a_while_is_missed_and_comes_back(fleet):
    """A stopped process's kernel still answers TCP: only heartbeats tell. Its own clock has jumped when it goes on."""
    nodes = fleet(3)
    quiet = next(node for node in nodes if not node.status()["is_leading"])
    rest = [node for node in nodes if node is not quiet]
    quiet.stop()
    print("stopped", wait_for(lambda: agree(rest), CUT_S, "the stopped one is out", fleet.agents))
    quiet.resume()
    print("resumed", wait_for(lambda: agree(nodes), JOIN_S + CUT_S, "it is back", fleet.agents))


@pytest.mark.feature("P14", "P18")
def test_a_node_keeps_its_peer_id_over_a_restart_and_loses_its_seniority(fleet):
    nodes = fleet(2)
    leader = next(node for node in nodes if node.status()["is_leading"])
    other = next(node for node in nodes if node is not leader)
    peer = leader.status()["peer"]
    leader.leave()
    wait_for(lambda: agree([other]), KILL_S, "the other leads", fleet.agents)
    again = fleet.agents.start(leader.host, leader.name)
    wait_for(lambda: agree([other, again]), JOIN_S, "it is back", fleet.agents)
    assert again.status()["peer"] == peer and again.status()["leader"] == other.status()["peer"]


@pytest.mark.feature("P14")
def test_a_copied_key_is_named(fleet):
    nodes = fleet(2)
    copy = fleet.agents.start(2, env={"PYFLEET_HOME": str(nodes[1].home)})
    wait_for(lambda: any("identity" in text for text in copy.status()["clones"]) if copy.status() else False, 15,
             "the copy is noticed", fleet.agents)
    assert "pyfleet keys new --replace" in copy.output
    assert agree(nodes)


def test_doctor_asks_the_others_for_their_clocks(fleet, tmp_path):
    fleet(2)
    env = {"PYFLEET_PSK": PSK, "PYFLEET_HOME": str(tmp_path / "doctor"), "PYFLEET_IFACE": "eth0"}
    told = json.loads(fleet.network.run(2, [sys.executable, "-m", "pyfleet", "doctor", "clock", "--json"], env))
    finding, = [each for each in told["findings"] if each["name"] == "clock of others"]
    assert finding["status"] == "ok" and finding["seen"].startswith("2 peers, at most 0.0")


@pytest.mark.feature("S4")
def test_a_node_with_a_dead_address_is_reached_at_the_other(fleet):
    """It announces both; nobody has a way to the first: packets to it vanish."""
    command = ["ip", "addr", "add", "10.78.0.1/24", "dev", "eth0"]
    fleet.network.run(1, command)
    fleet.network.run(0, ["ip", "route", "add", "10.78.0.0/24", "via", fleet.network.address(7)])     # who does not forward
    dead = {"PYFLEET_DISCOVERY_ENABLED": "off"}
    nodes = [fleet.agents.start(1, env=dead), fleet.agents.start(0, env=dead | {"PYFLEET_STATIC_PEERS": fleet.network.address(1)})]
    wait_for(lambda: agree(nodes), FORM_S, "they meet", fleet.agents)
    own, = [node for node in nodes[0].status()["nodes"] if node["is_self"]]
    assert set(own["addresses"]) >= {"10.78.0.1", fleet.network.address(1)}
    late = fleet.agents.start(2, env=dead | {"PYFLEET_STATIC_PEERS": fleet.network.address(0)})     # hears of both by gossip
    fleet.network.run(2, ["ip", "route", "add", "10.78.0.0/24", "via", fleet.network.address(7)])
    wait_for(lambda: agree([*nodes, late]), JOIN_S, "the third meets both", fleet.agents)


@pytest.mark.feature("P21")
def test_a_longer_way_shows_in_the_average_latency(fleet):
    nodes = fleet(2)

    def latency():
        return next((node["latency_ms"] for each in nodes for node in each.status()["nodes"] if node["latency_ms"] is not None),
                    None)
    wait_for(latency, 5, "the first heartbeat")
    before = latency()
    nodes[1].leave()
    wait_for(lambda: agree(nodes[:1]), KILL_S, "the second is gone")
    fleet.network.interpose(1, delay_s=0.01)            # 10 ms each way
    nodes[1] = fleet.agents.start(1, "node1")
    wait_for(lambda: agree(nodes), JOIN_S + 1, "it is back", fleet.agents)
    wait_for(latency, 5, "the first heartbeat over the longer way")
    assert before + 15 < latency() < before + 40


@pytest.mark.slow
def test_fifty_leaders_are_killed_in_a_row(fleet):
    nodes, took = fleet(4), []
    for _ in range(50):
        leader = next(node for node in nodes if node.status()["is_leading"])
        nodes.remove(leader)
        leader.kill()
        took.append(wait_for(lambda: agree(nodes), KILL_S, "a new leader", fleet.agents))
        nodes.append(fleet.agents.start(leader.host, leader.name))
        wait_for(lambda: agree(nodes), JOIN_S + 2, "the old one is back", fleet.agents)
    print(f"a new leader everywhere after {sorted(took)[25]:.2f} s, at most {max(took):.2f} s, 50 times")


@pytest.mark.slow
def test_an_idle_fleet_of_eight_is_quiet(fleet):
    """Everything counts that leaves the machine, Ethernet headers and discovery included."""
    nodes = fleet(8)
    time.sleep(8)                       # until every way has been measured
    before = [fleet.network.traffic(host)[0] for host in range(8)]
    time.sleep(60)
    rates = [(fleet.network.traffic(host)[0] - sent) / 60 for host, sent in enumerate(before)]
    print("bytes/s sent by each node:", [round(rate) for rate in rates])
    assert agree(nodes) and max(rates) < 1000
