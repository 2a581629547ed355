"""Ranks on machines that find each other: pyfleet-launch --join, init(min_nodes=...), AutoDiscovery, status."""
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from tests.agents import PSK, Agents, agree, wait_for
from tests.network import Network, unavailable
from tests.ranks import ROOT

pytestmark = pytest.mark.skipif(bool(unavailable()), reason=str(unavailable()))

PATIENCE_S = 90


class Machines:
    """Hosts of a network, each with a home of its own, on which commands are started."""

    def __init__(self, network, folder):
        self.network, self.folder, self.children = network, folder, []

    def start(self, host, *argv, **env):
        settings = {"PYFLEET_HOME": str(self.folder / f"home{host}"), "PYFLEET_PSK": PSK, "PYFLEET_IFACE": "eth0",
                    "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), **env}
        child = self.network.popen(host, [sys.executable, *argv], settings, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                   text=True, cwd=self.folder, start_new_session=True)
        self.children.append(child)
        return child

    def launch(self, host, *argv, **env):
        return self.start(host, "-m", "pyfleet", "launch", "--join", *argv, **env)

    def script(self, text):
        path = self.folder / "script.py"
        path.write_text(text)
        return str(path)


@pytest.fixture
def machines(tmp_path):
    with Network(4, "1gbit") as network:
        yield Machines(network, tmp_path)


def finish(*children):
    """(code, stdout, stderr) of each."""
    found = []
    for child in children:
        out, err = child.communicate(timeout=PATIENCE_S)
        found.append((child.returncode, out, err))
    return found


@pytest.mark.feature("P2", "M7")
def test_the_same_command_on_four_machines_trains_digits_with_encryption(machines):
    jobs = [machines.launch(host, "--min-nodes", "4", "-m", "pyfleet.examples.digits", PYFLEET_TRANSPORT="tcp",
                            PYFLEET_ENCRYPTION="on") for host in range(4)]
    ended = finish(*jobs)
    assert [code for code, _, _ in ended] == [0, 0, 0, 0], ended
    said = "\n".join(out for _, out, _ in ended)
    assert float(re.search(r"accuracy\D*([\d.]+)", said)[1]) >= 0.97, said
    assert all("epoch" in err and "led by" in err for _, _, err in ended)


@pytest.mark.feature("A1")
def test_machines_bring_several_ranks_each(machines):
    script = machines.script("import numpy as np, pyfleet\nf = pyfleet.init()\nx = np.full(3, f.rank + 1.)\n"
                             "pyfleet.all_reduce(x)\n"
                             "print('sum', x[0], 'of', f.world_size, 'local', f.local_rank, 'leads', f.is_leader,"
                             " 'leader', str(f.leader) in f.view.peers, len(f.nodes), f.epoch == f.view.epoch > 0)\n")
    counts = (2, 1, 3)
    jobs = [machines.launch(host, "--min-nodes", "3", "--nproc", str(count), script) for host, count in enumerate(counts)]
    ended = finish(*jobs)
    assert [code for code, _, _ in ended] == [0, 0, 0], ended
    lines = re.findall(r"\[rank (\d)\] (.*)", "\n".join(out for _, out, _ in ended))
    assert sorted(rank for rank, _ in lines) == list("012345")
    assert all(line.startswith("sum 21.0 of 6 local") and line.endswith("leader True 3 True") for _, line in lines), lines
    assert sorted(line.split()[7] for _, line in lines) == ["False"] * 5 + ["True"]


@pytest.mark.parametrize("backend", ["gloo"])
def test_other_engines_meet_at_the_address_that_the_fleet_says(machines, backend):
    script = machines.script(f"import torch, pyfleet\nf = pyfleet.init(backend={backend!r})\nx = torch.ones(3)\n"
                             "pyfleet.all_reduce(x)\nprint('sum', x[0].item())\n")
    ended = finish(*(machines.launch(host, "--min-nodes", "2", script, GLOO_SOCKET_IFNAME="eth0") for host in range(2)))
    assert [(code, "sum 2.0" in out) for code, out, _ in ended] == [(0, True)] * 2, ended


@pytest.mark.feature("P35", "P36")
def test_too_few_machines_are_counted_at_the_timeout(machines):
    began = time.monotonic()
    (code, _, err), = finish(machines.launch(0, "--min-nodes", "3", "-m", "pyfleet.examples.digits",
                                             "--epochs", "1", PYFLEET_PEER_TIMEOUT="3"))
    assert code == 1 and "found 1 of 3 nodes within 3 s" in err and "Traceback" not in err, err
    assert 3 <= time.monotonic() - began < 10


@pytest.mark.feature("P35", "P36")
def test_a_plain_script_finds_the_others(machines):
    script = machines.script("import sys, numpy as np, pyfleet\nf = pyfleet.init(min_nodes=int(sys.argv[1]), timeout=20)\n"
                             "x = np.ones(1000)\npyfleet.all_reduce(x)\nprint('sum', x[0], f.status()['state'])\n"
                             "pyfleet.barrier()\n")
    ended = finish(*(machines.start(host, script, "3") for host in range(3)))
    assert [code for code, _, _ in ended] == [0, 0, 0], ended
    assert sorted(out for _, out, _ in ended) == ["sum 3.0 leading\n", "sum 3.0 member\n", "sum 3.0 member\n"]
    (code, _, err), = finish(machines.start(0, "-c", "import pyfleet; pyfleet.init(timeout=2)"))    # min_peers is 1
    assert code == 1 and "NotEnoughPeers: found 1 of 2 nodes within" in err


@pytest.mark.feature("P3", "P4", "P5")
def test_discovery_step_by_step(machines):
    script = machines.script("""
import threading, time, pyfleet
from pyfleet.errors import NotInitialized
with pyfleet.AutoDiscovery() as nodes:
    try: nodes.rank
    except NotInitialized as error: assert "establish_ring" in str(error)
    began = time.monotonic()
    try: nodes.wait_for_peers(7, timeout=0.5)
    except pyfleet.NotEnoughPeers as error: assert "of 7 peers" in str(error) and time.monotonic() - began < 5, error
    else: raise SystemExit("seven peers?")
    assert nodes.wait_for_peers(2, timeout=20) == 2
    rings = []
    threads = [threading.Thread(target=lambda: rings.append(nodes.establish_ring(timeout=20))) for _ in range(2)]
    [thread.start() for thread in threads]; [thread.join() for thread in threads]
    fleet = nodes.establish_ring()
    assert rings == [fleet, fleet] and fleet is pyfleet.init() and nodes.world_size == 3 == len(nodes.nodes)
    orders = pyfleet.all_gather_object(list(fleet.view.peers))
    assert orders[0] == orders[1] == orders[2] and fleet.view.peers.index(str(fleet.nodes[nodes.rank])) == nodes.rank
    print("rank", nodes.rank)
    pyfleet.barrier()
""")
    ended = finish(*(machines.start(host, script) for host in range(3)))
    assert [code for code, _, _ in ended] == [0, 0, 0], ended
    assert sorted(out for _, out, _ in ended) == ["rank 0\n", "rank 1\n", "rank 2\n"]


@pytest.mark.feature("M2", "M11", "M12", "M13", "M32", "M33")
def test_a_master_and_workers_that_know_its_address(machines):
    done = machines.folder / "done"
    script = machines.script("import pathlib, time, pyfleet\nf = pyfleet.init()\nprint('of', f.world_size, flush=True)\n"
                             f"while not pathlib.Path({str(done)!r}).exists(): time.sleep(0.02)\n")
    quiet = {"PYFLEET_DISCOVERY_ENABLED": "off"}
    address = machines.network.address(0)
    jobs = [machines.start(0, "-m", "pyfleet", "launch", "--role", "master", "--port", "50055", "--min-nodes", "3", script,
                           **quiet)]
    jobs += [machines.start(host, "-m", "pyfleet", "launch", "--role", "worker", "--master", f"{address}:50055",
                            "--min-nodes", "3", script, **quiet) for host in (1, 2)]
    assert re.fullmatch(r"\[rank [012]\] of 3\n", jobs[1].stdout.readline())
    (code, out, err), = finish(machines.start(3, "-m", "pyfleet", "status", "--master", f"{address}:50055", "--json", **quiet))
    assert code == 0, err
    status = json.loads(out)
    assert status["world_size"] == 3 and status["step"] == 0 and len(status["nodes"]) == 3
    assert all(node["health"] in ("self", "healthy") and node["profile"]["weight"] > 0 for node in status["nodes"])
    (code, out, _), = finish(machines.start(3, "-m", "pyfleet", "status", "--master", f"{address}:50055", **quiet))
    assert code == 0 and "3 on 3 nodes" in out and out.count("healthy") == 2
    (code, _, err), = finish(machines.start(3, "-m", "pyfleet", "status", "--master", f"{address}:1", **quiet))
    assert code == 1 and "refused" in err and "Traceback" not in err
    done.touch()
    assert [code for code, _, _ in finish(*jobs)] == [0, 0, 0]


def test_a_failure_on_one_machine_ends_the_job_on_all(machines):
    script = machines.script("import numpy as np, pyfleet, time\nf = pyfleet.init()\npyfleet.barrier()\n"
                             "if f.rank == 1: raise SystemExit('rank 1 has had enough')\n"
                             "pyfleet.all_reduce(np.ones(10))\n")
    ended = finish(*(machines.launch(host, "--min-nodes", "3", script) for host in range(3)))
    assert all(code != 0 for code, _, _ in ended)
    assert sum("rank 1 has had enough" in err for _, _, err in ended) == 1
    assert sum("PeerLost" in err for _, _, err in ended) == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_launcher_that_is_ended_leaves_nothing_behind(machines, number):
    script = machines.script("import time; time.sleep(600)")
    jobs = [machines.launch(host, "--min-nodes", "3", script) for host in range(2)]       # both wait for a third
    with Agents(machines.folder, machines.network) as agents:
        watcher = agents.start(3)
        def are_there():
            ended = [job.communicate() for job in jobs if job.poll() is not None]
            assert not ended, ended
            return (status := watcher.status()) and len(status["nodes"]) == 3
        wait_for(are_there, 20, "all are there", agents)
        os.kill(jobs[0].pid, number)
        assert jobs[0].wait(20) != 0
        wait_for(lambda: len(watcher.status()["nodes"]) == 2, 5, "its agent is gone", agents)
    jobs[1].kill()


@pytest.mark.feature("P34")
def test_the_control_port_is_the_usual_one_or_the_chosen_one(machines):
    with Agents(machines.folder, machines.network) as agents:
        usual, chosen = agents.start(0), agents.start(1, env={"PYFLEET_DISCOVERY_PORT": "7001"})
        wait_for(lambda: agree([usual, chosen]), 20, "a fleet", agents)
        assert (usual.status()["port"], chosen.status()["port"]) == (52415, 7001)
        second = agents.start(0, "second")
        wait_for(lambda: agree([usual, chosen, second]), 20, "a fleet of three on two machines", agents)
        assert second.status()["port"] not in (52415, 7001, 0)
        refused = agents.start(1, "third", env={"PYFLEET_DISCOVERY_PORT": "7001"})
        assert refused.process.wait(20) == 1
        assert "cannot listen for control connections on port 7001" in refused.output and "Traceback" not in refused.output


@pytest.mark.feature("P33")
@pytest.mark.parametrize("port", [52416, 7002])
def test_links_between_machines_use_the_gradient_port(machines, port):
    """Rank 1 connects to rank 0, and rank 2, on rank 1's machine, to both: at the port, and at the next one."""
    script = machines.script("import psutil, pyfleet\nf = pyfleet.init()\nown = psutil.Process().net_connections('tcp')\n"
                             "print('ports', *sorted({c.raddr.port for c in own if c.raddr and c.status == 'ESTABLISHED'}))\n"
                             "pyfleet.barrier()\n")
    env = {"PYFLEET_GRADIENT_PORT": str(port)} if port != 52416 else {}
    ended = finish(*(machines.launch(host, "--min-nodes", "2", "--nproc", str(host + 1), script, **env) for host in range(2)))
    assert [code for code, _, _ in ended] == [0, 0], ended
    ports = dict(re.findall(r"\[rank (\d)\] ports (.*)", "\n".join(out for _, out, _ in ended)))
    assert str(port) in ports["1"].split() and str(port) in ports["2"].split()


@pytest.mark.feature("M46")
def test_two_jobs_share_the_machines_without_interference(machines):
    script = machines.script("import sys, numpy as np, pyfleet\nf = pyfleet.init()\nx = np.full(100_000, float(sys.argv[1]))\n"
                             "for _ in range(20): pyfleet.all_reduce(x, 'mean')\n"
                             "print('mean', x[0], 'of', f.world_size, f.view.fleet)\npyfleet.barrier()\n")
    jobs = [machines.launch(host, "--min-nodes", "2", "--namespace", name, script, value)
            for name, value in (("blue", "3"), ("green", "5")) for host in range(2)]
    ended = finish(*jobs)
    assert [code for code, _, _ in ended] == [0] * 4, ended
    words = [out.split() for _, out, _ in ended]
    assert [line[3] for line in words] == ["3.0", "3.0", "5.0", "5.0"] and {line[5] for line in words} == {"2"}
    assert words[0][6] == words[1][6] != words[2][6] == words[3][6]


@pytest.mark.feature("P37")
def test_a_peer_in_a_black_hole_costs_the_connection_timeout(machines):
    """Packets to it go to a machine that does not forward them: there is no answer of any kind."""
    machines.network.run(0, ["ip", "route", "add", "10.78.0.0/24", "via", machines.network.address(3)])
    began = time.monotonic()
    (code, _, err), = finish(machines.start(0, "-m", "pyfleet", "status", "--master", "10.78.0.9", "--timeout", "2"))
    assert code == 1 and "10.78.0.9:52415: silent for 2 s" in err and 2 <= time.monotonic() - began < 8
    script = machines.script("import time, pyfleet\nfrom pyfleet.connections import *\nfrom pyfleet.identity import *\n"
                             "own = Credentials(NodeKey.generate(), Namespace.from_token(b'x'), bytes(16), 1)\n"
                             "began = time.monotonic()\n"
                             "config = pyfleet.ClusterConfig()\n"
                             "try: dial(own, 0, Address(['10.78.0.9'], 52416, bytes(32)), {1: 1}, num_attempts=1,\n"
                             "          patience_s=config.connection_timeout_ms / 1000, deadline=Deadline(60))\n"
                             "except pyfleet.NotEnoughPeers as error: print('took', time.monotonic() - began, error)\n")
    (code, out, err), = finish(machines.start(0, script))
    assert code == 0 and 4.9 < float(out.split()[1]) < 6.5, err     # connection_timeout_ms is 5000


@pytest.mark.feature("P17", "M3")
def test_order_and_shares_follow_what_was_measured(machines):
    machines.network.set_rate(2, "100mbit")
    script = machines.script("""
import json, numpy as np, pyfleet
f = pyfleet.init()
x = np.ones(2_000_000, np.float32)
pyfleet.all_reduce(x)
if f.rank == 0:
    topology = f.topology
    print("facts", json.dumps({"links": topology["links"], "ring": topology["ring"], "measured": f.stats()["measured"]}))
pyfleet.barrier()
""")
    ended = finish(*(machines.launch(host, "--min-nodes", "4", script) for host in range(4)))
    assert [code for code, _, _ in ended] == [0] * 4, ended
    facts = json.loads(re.search(r"facts (.*)", "\n".join(out for _, out, _ in ended))[1])
    assert len(facts["links"]) == 12 and len(facts["ring"]) == 4
    slow = [link["mbit_s"] for link in facts["links"] if link["mbit_s"] < 200]
    assert len(slow) == 6 and all(75 < rate < 120 for rate in slow), facts["links"]
    assert all(700 < link["mbit_s"] < 1200 for link in facts["links"] if link["mbit_s"] >= 200)
    rates = sorted(facts["measured"]["bandwidths"])
    assert rates[0] < 0.2 * rates[1] and rates[1] == rates[3]


@pytest.mark.parametrize(("spoil", "said"), [
    (lambda home, env: (home / "node_keypair").write_text("rubbish"), "node_keypair"),
    (lambda home, env: env.update(PYFLEET_PSK="", PYFLEET_PSK_FILE=str(home / "none")), "cannot read the PSK file"),
    (lambda home, env: env.update(PYFLEET_PSK="short"), "a PSK of 5 characters"),
    (lambda home, env: env.update(PYFLEET_PSK=""), "pyfleet keys psk"),
    (lambda home, env: env.update(PYFLEET_IFACE="eth7"), "no interface 'eth7'"),
    (lambda home, env: env.update(PYFLEET_CONFIG=str(home / "c.yaml")) or (home / "c.yaml").write_text("cluster: {min_pears: 2}"),
     "min_peers"),
], ids=["key", "PSK file", "short PSK", "no PSK", "interface", "YAML key"])
def test_what_cannot_work_is_told_in_a_line(machines, spoil, said):
    home, env = machines.folder / "home0", {}
    home.mkdir(mode=0o700)
    spoil(home, env)
    for path in home.iterdir():
        path.chmod(0o600)
    (code, out, err), = finish(machines.launch(0, "--min-nodes", "2", "-m", "pyfleet.examples.digits", **env))
    assert code in (1, 2) and not out and said in err and "Traceback" not in err, (code, err)
