"""pyfleet doctor: every trouble is caused for real where it can be, and must be named; a machine in order passes."""
import contextlib
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pyfleet.commands import doctor
from pyfleet.commands import main as pyfleet
from pyfleet.identity.keys import FILE_NAME, NodeKey
from tests.pyfleet.discovery.conftest import capture, start  # noqa: F401 fixtures

ROOT = Path(__file__).parents[3]
COMMAND = [sys.executable, "-m", "pyfleet", "doctor"]


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder with a key, and a PSK: nothing of whoever runs the tests."""
    for name in [name for name in os.environ if name.startswith("PYFLEET_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PYFLEET_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PYFLEET_PSK", "0f" * 32)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return tmp_path / "home"


def found_by(process):
    """(exit code, {name: finding}) of a doctor --json that has been started."""
    out, error = process.communicate(timeout=120)
    assert process.returncode in (0, 1) and "Traceback" not in error, error
    told = json.loads(out)
    assert told["ok"] == (process.returncode == 0) == all(each["status"] != "fail" for each in told["findings"])
    return process.returncode, {each["name"]: each for each in told["findings"]}


def examine(*arguments, before=()):
    """As found_by, of a doctor with these arguments, started by the command `before`."""
    return found_by(subprocess.Popen([*before, *COMMAND, "--json", *arguments], text=True, stdin=subprocess.DEVNULL,
                                     stdout=subprocess.PIPE, stderr=subprocess.PIPE))


def on_host(net, host, *arguments, **env):
    return found_by(net.popen(host, [*COMMAND, "--json", *arguments], env, text=True, stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE))


def in_own_mounts(command):
    """What to put before a command so that it sees other mounts."""
    inside = ["unshare", "-m", "sh", "-c", f'{command} && exec "$@"', "sh"]
    if sys.platform != "linux" or subprocess.run([*inside, "true"], capture_output=True, check=False).returncode:
        pytest.skip("a mount namespace of its own is not permitted here")
    return inside


# ---- multicast and firewalls ----------------------------------------------------------------------------------------------

FIREWALLS = {
    "output": ("output", "udp dport 5353 drop", r"drops what is sent to the group \(output\)"),
    "group": ("output", "ip daddr 224.0.0.0/4 drop", r"drops what is sent"),
    "reject": ("output", "udp dport 5353 reject", "drops what is sent|does not come back"),
    "input": ("input", "udp dport 5353 drop", "does not come back"),
    "prerouting": ("prerouting", "ip daddr 224.0.0.251 drop", "does not come back"),
    "stateful": ("input", "iif lo accept; add rule inet fw here ct state established,related accept; add rule inet fw here drop",
                 "does not come back"),
}


def block(net, host, hook, rules):
    """Give a host a firewall."""
    chain = f"add chain inet fw here {{ type filter hook {hook} priority 0; }}"
    net.run(host, ["nft", f"add table inet fw; {chain}; add rule inet fw here {rules}"])


@pytest.mark.feature("M10", "S41")
def test_a_network_in_order_passes(network, home):
    net = network(2)
    code, found = on_host(net, 0, "multicast", "interfaces", "ports", "network")
    assert code == 0, found
    assert found["multicast eth0 IPv4"]["status"] == "ok"
    assert f": {net.address(0)})" in found["interfaces"]["seen"]
    assert found["ports discovery_port"]["seen"] == "udp/tcp 52415 is free"


@pytest.mark.feature("S41")
@pytest.mark.parametrize("kind", FIREWALLS)
def test_a_firewall_that_blocks_multicast_is_named(network, home, kind):
    hook, rules, told = FIREWALLS[kind]
    net = network(1)
    block(net, 0, hook, rules)
    code, found = on_host(net, 0, "multicast")
    finding = found["multicast eth0 IPv4"]
    assert code == 1 and finding["status"] == "fail"
    assert re.search(told, finding["seen"])
    assert "let UDP 5353" in finding["advice"] and "as peers" in finding["advice"]


def test_one_interface_that_works_is_enough(network, home):
    net = network(1)
    for line in ("link add v0 type veth peer name v1", "addr add 10.99.0.1/24 dev v0", "link set v0 up", "link set v1 up"):
        net.run(0, ["ip", *line.split()])
    block(net, 0, "output", "oifname v0 udp dport 5353 drop")
    code, found = on_host(net, 0, "multicast")
    assert code == 0
    assert (found["multicast eth0 IPv4"]["status"], found["multicast v0 IPv4"]["status"]) == ("ok", "warn")
    code, found = on_host(net, 0, "multicast", PYFLEET_IFACE="v0")
    assert code == 1 and set(found) <= {"multicast v0 IPv4", "multicast v0 IPv6"}


def test_without_discovery_or_without_a_network(network, home):
    net = network(1)
    assert on_host(net, 0, "multicast", PYFLEET_DISCOVERY_ENABLED="false")[1]["multicast"]["status"] == "skipped"
    net.run(0, ["ip", "link", "set", "eth0", "down"])
    code, found = on_host(net, 0, "multicast", "interfaces")
    assert code == 1
    assert found["multicast"]["seen"] == "no interface that is up can do multicast"
    assert found["interfaces"]["seen"] == "no interface but loopback is up and has an address"


@pytest.mark.feature("S41")
def test_peers_are_reached_or_the_reason_is_named(network, home):
    net = network(3)
    block(net, 2, "input", "tcp dport 52415 drop")
    code = "import socket, sys; s = socket.create_server(('', 52415)); print('up', flush=True); sys.stdin.read()"
    server = net.popen(1, [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert server.stdout.readline() == b"up\n"
    there, refuses, drops = net.address(1), f"{net.address(1)}:9", net.address(2)
    arguments = [word for peer in (there, refuses, drops, "x:y", "203.0.113.1") for word in ("--peer", peer)]
    code, found = on_host(net, 0, "peers", *arguments)
    assert code == 1
    assert found[f"peers {there}"]["status"] == "ok" and "answers on TCP 52415" in found[f"peers {there}"]["seen"]
    assert found[f"peers {refuses}"]["status"] == "warn" and "nobody listens on TCP 9" in found[f"peers {refuses}"]["seen"]
    assert found[f"peers {drops}"]["status"] == "fail" and "let TCP 52415 in" in found[f"peers {drops}"]["advice"]
    assert "is not host:port" in found["peers x:y"]["seen"]
    assert found["peers 203.0.113.1"]["status"] == "fail" and "share no network" in found["peers 203.0.113.1"]["advice"]


# ---- ports -----------------------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def holding(kind, words=()):
    """A process that holds a port: (port, pid)."""
    code = (f"import socket, sys; s = socket.socket(socket.AF_INET, socket.{kind}); s.bind(('127.0.0.1', 0)); "
            f"s.listen() if s.type == socket.SOCK_STREAM else None; print(s.getsockname()[1], flush=True); sys.stdin.read()")
    with subprocess.Popen([sys.executable, "-c", code, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        yield int(process.stdout.readline()), process.pid
        process.stdin.close()


@pytest.mark.feature("S41")
@pytest.mark.parametrize(("setting", "kind"), [("discovery_port", "SOCK_DGRAM"), ("gradient_port", "SOCK_STREAM"),
                                               ("master_port", "SOCK_STREAM"), ("metrics_port", "SOCK_STREAM")])
def test_a_taken_port_is_a_failure_that_names_its_holder(home, setting, kind):
    with holding(kind) as (port, pid):
        code, found = examine("ports", "--override", f"{setting}={port}")
    finding = found[f"ports {setting}"]
    assert code == 1 and finding["status"] == "fail"
    assert f"{'udp' if kind == 'SOCK_DGRAM' else 'tcp'} {port} is taken by python" in finding["seen"] and f"pid {pid}: " in finding["seen"]
    assert f"PYFLEET_{setting.upper()}" in finding["advice"]
    assert [each["status"] for each in found.values()].count("fail") == 1


def test_a_fleet_that_runs_already_is_no_failure(home):
    with holding("SOCK_STREAM", ["pyfleet-launch"]) as (port, _):
        code, found = examine("ports", "--override", f"master_port={port}")
    assert code == 0 and "taken by pyfleet itself" in found["ports master_port"]["seen"]
    assert found["ports master_port"]["status"] == "warn"


# ---- files -----------------------------------------------------------------------------------------------------------------

def test_keys_and_secrets_in_order(home):
    code, found = examine("identity", "secret")
    assert code == 0 and "it is made on first use" in found["identity"]["seen"]
    assert not home.exists()                    # looking changes nothing
    home.mkdir()
    NodeKey.generate().store(home)
    code, found = examine("identity", "secret")
    assert code == 0 and NodeKey.load(home).peer_id[:12] in found["identity"]["seen"]
    assert found["secret"]["seen"].startswith("namespace default, tag ") and "0f0f" not in json.dumps(found)


@pytest.mark.parametrize(("spoil", "told"), [
    (lambda key: key.chmod(0o644), "has mode 0644"), (lambda key: key.write_bytes(b"ed25519 rubbish\n"), "is damaged"),
    (lambda key: key.write_bytes(b""), "is damaged"),
])
def test_a_key_that_cannot_be_used_is_a_failure(home, spoil, told):
    home.mkdir()
    NodeKey.generate().store(home)
    spoil(home / FILE_NAME)
    before = (home / FILE_NAME).read_bytes()
    code, found = examine("identity")
    assert code == 1 and told in found["identity"]["seen"] and "pyfleet keys new --replace" in found["identity"]["advice"]
    assert (home / FILE_NAME).read_bytes() == before


def test_a_home_that_cannot_be_made_is_a_failure(home):
    home.mkdir()
    inside = in_own_mounts(f"mount -t tmpfs -o ro tmpfs '{home}'")
    code, found = examine("identity", "--override", f"home={home}/new", before=inside)
    assert code == 1 and "none can be made there" in found["identity"]["seen"] and "PYFLEET_HOME" in found["identity"]["advice"]


@pytest.mark.parametrize(("content", "mode", "told"), [
    (None, 0, "cannot read the PSK file"), ("0f" * 32, 0o644, "is open to everybody"), ("", 0o600, "is empty"),
    ("short", 0o600, "keeps nobody out"), ("x" * 5000, 0o600, "longer than any PSK"),
])
def test_a_psk_file_that_cannot_be_used_is_a_failure(home, tmp_path, monkeypatch, content, mode, told):
    monkeypatch.delenv("PYFLEET_PSK")
    path = tmp_path / "lab.psk"
    if content is not None:
        path.write_text(content)
        path.chmod(mode)
    code, found = examine("secret", "--override", f"psk_file={path}")
    assert code == 1 and told in found["secret"]["seen"] and "pyfleet keys psk" in found["secret"]["advice"]


def test_two_psks_are_a_failure_and_none_is_a_warning(home, monkeypatch):
    code, found = examine("secret", "--override", "psk_file=/etc/hostname")
    assert code == 1 and "there are two PSKs" in found["secret"]["seen"]
    monkeypatch.delenv("PYFLEET_PSK")
    code, found = examine("secret")
    assert code == 0 and found["secret"]["status"] == "warn" and "PYFLEET_PSK_FILE" in found["secret"]["advice"]


@pytest.mark.parametrize(("arguments", "told"), [
    (["--override", "discovery_prot=1"], "did you mean cluster.discovery_port"), (["--config", "/no/such.yaml"], "cannot read the config file"),
])
def test_settings_that_cannot_be_read_are_the_finding(home, arguments, told):
    code, found = examine(*arguments)
    assert code == 1 and list(found) == ["settings"] and told in found["settings"]["seen"]


@pytest.mark.feature("P2")
def test_two_nodes_with_one_identity_are_named(network, home, start):     # noqa: F811
    hosts = network(3)
    one, twin, other = start(hosts, 0, "a"), start(hosts, 1, "a", port=1234), start(hosts, 2, "b")
    for node in (one, twin):
        node.sees(other)
    tag = {"PYFLEET_PSK": ""}
    code, found = on_host(hosts, 2, "identity", "versions", **tag)
    assert code == 1 and "2 nodes are " in found["identity of others"]["seen"]
    assert hosts.address(0) in found["identity of others"]["seen"] and hosts.address(1) in found["identity of others"]["seen"]
    assert "pyfleet keys new --replace" in found["identity of others"]["advice"]
    assert found["versions of others"]["status"] in ("ok", "warn")
    twin.close()
    assert on_host(hosts, 2, "identity", **tag)[1]["identity of others"]["status"] == "ok"


# ---- the machine -----------------------------------------------------------------------------------------------------------

def test_an_interface_that_is_not_there_and_a_congestion_control_that_is_not(home):
    code, found = examine("interfaces", "network", "--override", "iface=wlan7", "--override", "congestion=carrier_pigeon")
    assert code == 1 and "iface is 'wlan7', which is not up" in found["interfaces"]["seen"]
    if sys.platform == "linux":
        assert found["network congestion"]["status"] == "fail" and "modprobe tcp_carrier_pigeon" in found["network congestion"]["advice"]


def test_small_buffers_of_a_network_namespace_are_seen(network, home):
    net = network(1)
    net.run(0, ["sh", "-c", "echo 4096 16384 262144 > /proc/sys/net/ipv4/tcp_wmem"])
    code, found = on_host(net, 0, "network")
    assert code == 0 and found["network buffers"]["status"] == "warn"
    assert found["network buffers"]["seen"] == "tcp_wmem ends at 262144 bytes"
    assert "sysctl -w net.ipv4.tcp_wmem" in found["network buffers"]["advice"]


def test_few_descriptors_and_too_many_ranks_are_warnings(home):
    code, found = examine("limits", "--nproc", "999", before=["sh", "-c", 'ulimit -n 200; exec "$@"', "sh"])
    assert code == 0
    assert found["limits files"] == {"name": "limits files", "status": "warn", "seen": "200 descriptors",
                                     "advice": "ulimit -n 1024: every connection takes one"}
    assert found["limits cores"]["status"] == "warn" and "999 ranks on" in found["limits cores"]["seen"]


def test_little_shared_memory_is_a_warning(home):
    code, found = examine("limits", before=in_own_mounts("mount -t tmpfs -o size=64m tmpfs /dev/shm"))
    assert code == 0 and found["limits shared memory"]["seen"] == "/dev/shm has 64 MiB"
    assert found["limits shared memory"]["status"] == "warn" and "--shm-size" in found["limits shared memory"]["advice"]


# ---- the command -----------------------------------------------------------------------------------------------------------

@pytest.mark.feature("C87")
def test_the_table_has_every_finding_its_advice_and_a_sum(home, capsys):
    home.touch()
    assert pyfleet(["doctor", "identity", "clock", "--override", f"home={home}/new"]) == 1
    told = capsys.readouterr().out
    lines = told.splitlines()
    assert lines[0].startswith("fail     identity  ") and lines[1].strip().startswith("-> as it says; `pyfleet keys new")
    assert any(line.startswith("ok       clock") for line in lines)
    assert re.fullmatch(r"[12] ok, 1 fail, [12] skipped", lines[-1]) and "\x1b" not in told


def test_on_a_terminal(home):
    master, slave = pty.openpty()
    assert subprocess.run([*COMMAND, "clock"], stdout=slave, timeout=60, check=False).returncode == 0
    os.close(slave)
    shown = os.read(master, 1 << 16)
    os.close(master)
    assert b"\x1b[" in shown and b"clock" in shown


@pytest.mark.parametrize(("argv", "told"), [
    (["multicats"], "there is no check 'multicats'; did you mean multicast?"), (["--jsn"], "jsn"), (["--nproc", "0"], "at least 1"),
    (["--nproc", "x"], "--nproc"),
])
def test_wrong_arguments(argv, told, capsys):
    assert doctor.main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("pyfleet doctor: error: ") and told in error and error.count("\n") == 1
