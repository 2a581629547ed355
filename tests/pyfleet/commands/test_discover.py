"""pyfleet discover: who is there, for people and for programs, and what to do about it."""
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from pyfleet.commands import discover
from pyfleet.discovery import Seen
from pyfleet.identity.keys import NodeKey
from pyfleet.identity.namespace import Namespace, new_psk
from pyfleet.members import PROTOCOL, Sighting
from tests.pyfleet.discovery.conftest import capture, start  # noqa: F401 fixtures
from tests.pyfleet.discovery.nodes import OUR_TAG, THEIR_TAG, THEIRS, peer_id

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch):
    for name in ("PSK", "PSK_FILE", "NAMESPACE", "DISCOVERY_ENABLED", "IFACE"):
        monkeypatch.delenv(f"PYFLEET_{name}", raising=False)


@pytest.fixture
def lab(tmp_path):
    """A PSK file, what is in it, and the tag of its namespace "lab"."""
    path = tmp_path / "psk"
    path.write_text(new_psk())
    path.chmod(0o600)
    return str(path), path.read_text(), Namespace.from_psk(path.read_text(), "lab").tag


def command(network, host, *options, env=None):
    """(exit code, stdout, stderr) of `pyfleet discover` on a host."""
    process = network.popen(host, [sys.executable, "-m", "pyfleet", "discover", *options], env, cwd=ROOT, text=True,
                            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


@pytest.mark.feature("P2", "M7", "P30")
def test_the_nodes_of_a_namespace_and_those_with_one_identity(network, start, lab):     # noqa: F811
    psk_file, psk, tag = lab
    hosts = network(4)
    one, twin = start(hosts, 0, "a", psk=psk), start(hosts, 1, "a", psk=psk, port=1234)
    other, stranger = start(hosts, 2, "b", psk=psk), start(hosts, 3, "x", psk=THEIRS)
    for node in (one, twin):
        node.sees(other)
    stranger.wait(lambda event: event["event"] == "started")
    ours = ["--namespace", "lab", "--psk-file", psk_file]

    code, out, err = command(hosts, 3, *ours)
    assert code == 0
    lines = out.splitlines()
    assert lines[0].split() == ["node", "name", "addresses", "port", "incarnation"]
    found = {line.split()[0]: line for line in lines[1:] if "node-b" in line}
    assert len(lines) == 4 and "x" * 12 not in out and "\x1b" not in out
    assert hosts.address(2) in found["b" * 12] and "same identity" not in found["b" * 12]
    assert {line for line in lines if hosts.address(0) in line and f"same identity as node-a ({twin.incarnation[:8]})" in line}
    assert {line for line in lines if hosts.address(1) in line and " 1234 " in line
            and f"same identity as node-a ({one.incarnation[:8]})" in line}
    assert "1 of other namespaces" in err and "keys new --replace" in err

    code, out, _ = command(hosts, 3, *ours, "--all", "--json")
    facts = json.loads(out)
    assert code == 0 and facts["namespace"] == "lab" and facts["tag"] == tag and facts["num_others"] == 0
    assert [(node["name"], node["in_namespace"]) for node in facts["nodes"]] == [
        ("node-a", True), ("node-a", True), ("node-b", True), ("node-x", False)]

    code, out, err = command(hosts, 3, "--json")
    assert code == 0 and {node["in_namespace"] for node in json.loads(out)["nodes"]} == {None}

    code, out, err = command(hosts, 3, "--namespace", "elsewhere", "--psk-file", psk_file, "--timeout", "1.5")
    assert (code, out) == (1, "")
    assert "nobody was found in the namespace elsewhere within 1.5 s" in err and "4 of other namespaces" in err
    for node in (one, twin, other, stranger):
        assert len({event["incarnation"] for event in node.all("seen")}) < 3       # who looks around is seen by nobody


@pytest.mark.feature("M34")
def test_it_is_silent_where_discovery_is_disabled(network, capture):        # noqa: F811
    hosts = network(1)
    sent = capture(hosts, 0)
    code, out, err = command(hosts, 0, env={"PYFLEET_DISCOVERY_ENABLED": "no"})
    assert (code, out) == (1, "") and "turned off" in err
    assert sent.packets == []
    code, _, err = command(hosts, 0, "--timeout", "0.5")
    assert code == 1 and "nobody was found within 0.5 s" in err and "pyfleet keys psk" in err
    assert sent.packets != []


def seen(letter, incarnation, addresses=("192.0.2.1",), tag=OUR_TAG, protocol=PROTOCOL):
    return Seen(Sighting(addresses, 7, peer_id(letter), incarnation * 16, f"node-{letter}", "mdns"), tag, protocol, "0.1")


def test_the_table_tells_this_node_from_its_clone_and_other_versions():
    found = [seen("a", "1"), seen("a", "2", ("192.0.2.2",)), seen("b", "3", protocol=PROTOCOL + 1), seen("c", "4", tag=THEIR_TAG)]
    listed = discover.nodes(found, OUR_TAG, peer_id("a"), {"192.0.2.2", "127.0.0.1"})
    notes = [discover.row(node)[-1] for node in listed]
    assert notes == ["same identity as node-a (22222222)", "this node; same identity as node-a (11111111)",
                     f"speaks protocol {PROTOCOL + 1}, this is {PROTOCOL}", f"another namespace ({THEIR_TAG[:8]})"]
    assert discover.row(discover.nodes(found[2:3], None, None, set())[0])[-1].startswith(f"namespace {OUR_TAG[:8]}")


def test_wrong_arguments_and_settings(capsys, tmp_path, monkeypatch):
    for argv in (["--jsn"], ["--timeout", "0"], ["--timeout", "inf"], ["more"]):
        assert discover.main(argv) == 2
    assert discover.main(["--psk-file", str(tmp_path / "none")]) == 1
    assert "cannot read the PSK file" in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.setenv("PYFLEET_HOME", str(tmp_path))
    monkeypatch.setattr(discover, "look", lambda *_: [])
    assert discover.main([]) == 1
    assert list(tmp_path.iterdir()) == []               # to look around makes no key
    monkeypatch.setattr(discover, "look", lambda *_: [seen("a", "1")])
    NodeKey.generate().store(tmp_path)
    assert discover.main([]) == 0


def test_on_a_terminal():
    code = ("from pyfleet.commands import discover; from tests.pyfleet.commands.test_discover import seen;"
            "discover.look = lambda *_: [seen('a', '1')]; discover.main([])")
    master, slave = pty.openpty()
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "200", "TERM": "xterm"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=slave, stderr=subprocess.DEVNULL, env=env, check=True, timeout=60)
    os.close(slave)
    shown = os.read(master, 1 << 16)
    os.close(master)
    assert b"\x1b[" in shown and b"node-a" in shown and b"192.0.2.1" in shown
