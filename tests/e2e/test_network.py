"""Ranks on several hosts with links between them; and that the network which plays the hosts is what it says it is."""
import contextlib
import signal
import socket
import struct
import subprocess
import sys
import threading
import time

import numpy as np
import psutil
import pytest

import pyfleet
from tests import network as networks
from tests.faults import faulty_pair
from tests.network import NAMESPACES, Network, bits_per_s, inside
from tests.ranks import PATIENCE_S, ROOT

MB = 1_000_000


def own_array(count, seed):
    """What a rank brings: integers, so that every order of summation gives the same float32."""
    return np.random.default_rng(seed).integers(-1000, 1000, count).astype(np.float32)


def total(count, size):
    return sum(own_array(count, seed) for seed in range(size))


def reduced(count, algorithm):
    x = own_array(count, pyfleet.rank())
    pyfleet.all_reduce(x, algorithm=algorithm)
    return x


def links():
    return pyfleet.init().local_world_size, pyfleet.init().stats()["links"]


# ---- collectives between hosts ------------------------------------------------------------------------------------------


@pytest.mark.feature("P9", "P10", "M19", "M22", "M42")
@pytest.mark.parametrize("per_host", (1, 2))
def test_all_reduce_between_hosts_is_the_sum(network, per_host):
    hosts = network(4)
    group = hosts.ranks(per_host)
    for count in (1, 1023, 2_000_003):
        expected = total(count, group.size)
        for algorithm in ("auto", "ring", "direct", "tree"):
            for result in group.run(reduced, count, algorithm):
                np.testing.assert_array_equal(result, expected)
    for local_world_size, counted in group.run(links):
        assert local_world_size == per_host
        assert set(counted) and all(link["received_bytes"] > 0 for link in counted.values())


@pytest.mark.feature("P10", "C5")
@pytest.mark.parametrize("algorithm", ("ring", "direct"))
def test_no_host_sends_more_than_it_must(network, algorithm):
    hosts, count = network(4), 1_000_000
    group = hosts.ranks()
    group.run(reduced, 10, algorithm)
    before = [hosts.traffic(host) for host in range(4)]
    group.run(reduced, count, algorithm)
    for host in range(4):
        for much, less in zip(hosts.traffic(host), before[host], strict=True):
            assert 1 <= (much - less) / (2 * 3 / 4 * 4 * count) < 1.08      # headers and acknowledgements


def all_reduce_until_it_fails(count, timeout):
    """(kind of error, blamed rank, message, seconds that the failing call took)."""
    x = np.zeros(count, np.float32)
    while True:
        began = time.monotonic()
        try:
            pyfleet.all_reduce(x, timeout=timeout)
        except pyfleet.FleetError as error:
            return type(error).__name__, error.rank, str(error), time.monotonic() - began


def wait_for_traffic(hosts, host, num_bytes):
    """Return once the host has sent num_bytes more."""
    start, deadline = hosts.traffic(host)[0], time.monotonic() + PATIENCE_S
    while hosts.traffic(host)[0] - start < num_bytes:
        assert time.monotonic() < deadline, "the ranks move no bytes"


@pytest.mark.feature("M6")
@pytest.mark.parametrize("per_host", (1, 2))
@pytest.mark.parametrize("count", (1000, 5_000_000))
def test_a_host_that_is_cut_off_is_an_error_on_every_rank_by_the_deadline(network, per_host, count):
    hosts, timeout = network(3), 2.0
    group = hosts.ranks(per_host)
    group.start(all_reduce_until_it_fails, count, timeout)
    wait_for_traffic(hosts, 2, 100_000 if count < 10_000 else 10 * MB)
    hosts.cut(2)
    reports = group.collect()
    for kind, _, message, seconds in reports:
        assert kind in ("PeerLost", "Timeout"), message
        assert seconds < timeout + 0.25, message


@pytest.mark.parametrize("count", (1000, 5_000_000))
def test_a_link_that_comes_back_before_the_deadline_harms_nothing(network, count):
    hosts = network(3)
    group = hosts.ranks()
    group.run(reduced, 10, "auto")
    for _ in range(2):
        hosts.cut(1)
        group.start(reduced, count, "auto")
        hosts.restore(1)
        for result in group.collect():
            np.testing.assert_array_equal(result, total(count, 3))


@pytest.mark.parametrize("share", (0.01, 0.05))
def test_packets_may_be_lost(network, share):
    hosts = network(3, offload=False)
    hosts.lose(1, share)
    for result in hosts.ranks().run(reduced, 500_000, "auto"):
        np.testing.assert_array_equal(result, total(500_000, 3))
    dropped = hosts.run(1, ["nstat", "-az", "TcpRetransSegs"])
    assert int(dropped.split()[-2]) > 0             # the rig did lose some


def barrier_seconds():
    pyfleet.barrier()
    began = time.monotonic()
    pyfleet.barrier()
    return time.monotonic() - began


def test_a_link_may_be_slow_to_answer(network):
    hosts = network(4)
    hosts.interpose(2, delay_s=0.05)
    group = hosts.ranks()
    for algorithm in ("auto", "ring", "direct", "tree"):
        for result in group.run(reduced, 1_000_003, algorithm):
            np.testing.assert_array_equal(result, total(1_000_003, 4))
    # What any other rank knows of rank 2 is 50 ms old, and the reverse.
    assert all(0.05 <= seconds < 1 for seconds in group.run(barrier_seconds))


def test_damage_on_the_way_is_an_error_on_every_rank(network):
    hosts = network(3)
    hosts.interpose(0, fault="corrupt", after=1 * MB)       # the bits that hosts 1 and 2 send to host 0
    reports = hosts.ranks().run(all_reduce_until_it_fails, 100_000, 10.0)
    assert "CorruptData" in {kind for kind, *_ in reports}
    for kind, _, message, seconds in reports:
        assert kind in ("CorruptData", "PeerLost"), message
        assert seconds < 5, message


# ---- the rig ------------------------------------------------------------------------------------------------------------


def transfer(hosts, sender, receiver, num_bytes):
    """Bytes per second of one plain connection."""
    listener = inside(hosts.namespace(receiver), socket.create_server, ("", 0))
    where = hosts.address(receiver), listener.getsockname()[1]
    with listener, inside(hosts.namespace(sender), socket.create_connection, where) as source:
        sink, got, room = listener.accept()[0], 0, bytearray(1 << 20)
        with sink:
            def send():
                source.sendall(bytes(num_bytes))
                source.shutdown(socket.SHUT_WR)
            thread = threading.Thread(target=send)
            thread.start()
            began = time.perf_counter()
            while part := sink.recv_into(room):
                got += part
            seconds = time.perf_counter() - began
            thread.join()
    assert got == num_bytes
    return got / seconds


@pytest.mark.parametrize("mtu", (1500, 9000))
def test_the_rate_is_honest(network, mtu):
    hosts = network(3, "1gbit", rates={1: "200mbit"}, mtu=mtu)
    rates = {(0, 2): "1gbit", (0, 1): "200mbit", (1, 2): "200mbit"}         # full speed, slow to receive, slow to send
    for pair, rate in rates.items():
        payload = (mtu - 52) / (mtu + 14)                   # what is no header: IP, TCP, time stamps; Ethernet
        assert transfer(hosts, *pair, 20 * MB) == pytest.approx(bits_per_s(rate) / 8 * payload, rel=0.05)
    assert hosts.bytes_per_s(1) == pytest.approx(2e8 / 8 * payload)
    hosts.set_rate(1, "500mbit")
    assert transfer(hosts, 1, 0, 20 * MB) == pytest.approx(5e8 / 8 * payload, rel=0.05)
    for host in range(2):
        hosts.set_rate(host, None)
    assert transfer(hosts, 1, 0, 20 * MB) > 1e9 / 8


@pytest.mark.parametrize(("rate", "bits"), [("1gbit", 1e9), ("2.5mbit", 2.5e6), ("100kbit", 1e5), ("9bit", 9)])
def test_rates_are_read_as_tc_reads_them(rate, bits):
    assert bits_per_s(rate) == bits


def test_every_connection_has_the_congestion_control_asked_for(network):
    for congestion in ("cubic", "reno"):
        hosts = network(2, congestion=congestion)
        listener = inside(hosts.namespace(0), socket.create_server, ("", 0))
        where = hosts.address(0), listener.getsockname()[1]
        with listener, inside(hosts.namespace(1), socket.create_connection, where) as opened, listener.accept()[0] as accepted:
            for sock in (opened, accepted):
                assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0") == congestion.encode()


def test_multicast_reaches_every_host(network):
    hosts, group = network(3), "239.77.0.1"
    listeners = []
    for host in (1, 2):
        sock = inside(hosts.namespace(host), socket.socket, socket.AF_INET, socket.SOCK_DGRAM)
        sock.bind((group, 5353))
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP,
                        struct.pack("4s4s", socket.inet_aton(group), socket.inet_aton(hosts.address(host))))
        sock.settimeout(PATIENCE_S)
        listeners.append(sock)
    with inside(hosts.namespace(0), socket.socket, socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.sendto(b"who is there?", (group, 5353))
    for sock in listeners:
        data, (sender, _) = sock.recvfrom(100)
        assert (data, sender) == (b"who is there?", hosts.address(0))
        sock.close()


def root_devices():
    return set(socket.if_nameindex())


def test_nothing_stays_behind_and_nothing_else_is_touched(network):
    before = root_devices()
    hosts = network(2)
    assert root_devices() == before
    names = [*hosts.names, hosts.switch]
    assert all((NAMESPACES / name).exists() for name in names)
    sleeper = hosts.popen(1, ["sleep", "1000"])
    assert hosts.run(1, ["sh", "-c", "echo $WHO; cat /proc/net/dev"], env={"WHO": "me"}).startswith("me\n")
    group = hosts.ranks()
    hosts.close()
    assert sleeper.returncode == -signal.SIGKILL
    assert all(process.returncode == 0 for process in group.processes)
    assert not any((NAMESPACES / name).exists() for name in names)
    assert root_devices() == before


def runs(pid):
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def test_what_a_crash_left_is_removed_by_the_next_network(network):
    program = ("import sys\nfrom tests.network import Network\nnetwork = Network(2)\n"
               "child = network.popen(0, ['sleep', '1000'])\nprint(child.pid, network.switch, flush=True)\nsys.stdin.read()\n")
    owner = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    pid, switch = owner.stdout.readline().split()
    owner.kill()
    owner.wait()
    assert (NAMESPACES / switch).exists() and runs(int(pid))
    network(1)
    assert not (NAMESPACES / switch).exists()
    deadline = time.monotonic() + PATIENCE_S
    while runs(int(pid)):
        assert time.monotonic() < deadline, "what ran on a host outlived it"


def test_it_says_why_there_can_be_no_network(monkeypatch):
    networks.unavailable.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(networks.shutil, "which", lambda tool: None if tool == "nft" else f"/usr/sbin/{tool}")
        patch.setattr(networks.os, "geteuid", lambda: 0)
        assert networks.unavailable() == "not installed: nft (iproute2, nftables, util-linux)"
    networks.unavailable.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(networks.os, "geteuid", lambda: 1000)
        assert networks.unavailable() == "network namespaces need root"
    networks.unavailable.cache_clear()


def test_a_network_that_cannot_be_built_leaves_nothing(network):
    before = set(NAMESPACES.iterdir())
    network(1).close()
    with pytest.raises(networks.NetworkError, match="congctl|congestion"):
        Network(2, congestion="none-such")
    assert set(NAMESPACES.iterdir()) == before


# ---- the relay ----------------------------------------------------------------------------------------------------------


def test_a_delayed_stream_keeps_its_order_and_its_end():
    near, far, relay = faulty_pair(delay_s=0.1)
    data, began = np.random.default_rng(1).bytes(3_000_000), time.monotonic()
    sender = threading.Thread(target=lambda: (near.sendall(data), near.shutdown(socket.SHUT_WR)))
    sender.start()
    received = bytearray(far.recv(1))
    assert time.monotonic() - began >= 0.1
    while part := far.recv(1 << 16):
        received += part
    sender.join()
    assert received == data
    relay.close()


def test_both_ways_are_delayed_and_waiting_burns_nothing():
    near, far, relay = faulty_pair(delay_s=0.3)
    began, cpu = time.monotonic(), time.process_time()
    near.sendall(b"ping")
    assert far.recv(10) == b"ping"
    far.sendall(b"pong")
    assert near.recv(10) == b"pong"
    assert 0.6 <= time.monotonic() - began < 1.5
    assert time.process_time() - cpu < 0.1
    relay.close()
    assert near.recv(1) == far.recv(1) == b""


def test_a_cut_comes_after_what_was_on_its_way():
    near, far, _ = faulty_pair("cut", after=1000, delay_s=0.1)
    near.sendall(bytes(range(250)) * 8)
    received = b""
    while part := far.recv(4096):
        received += part
    assert received == bytes(range(250)) * 4
