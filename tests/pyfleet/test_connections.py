"""Dialling and accepting: members find each other at once, whatever strangers do meanwhile."""
import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from pyfleet.connections import MOST_GUESTS, Address, Credentials, Deadline, accept, dial
from pyfleet.errors import AuthFailed, NotEnoughPeers
from pyfleet.identity import Initiator, Namespace, NodeKey, Purpose, ciphers
from pyfleet.identity.handshake import Kind
from pyfleet.identity.throttle import BURST
from pyfleet.metrics import REGISTRY

LAB = Namespace.from_psk("00" * 32, "lab")
KEYS = [NodeKey.generate() for _ in range(3)]
WANTS = {Kind.DATA: ciphers.offered(), Kind.CONTROL: ciphers.offered()}


def credentials(rank, namespace=LAB, meeting=bytes(16)):
    return Credentials(KEYS[rank], namespace, meeting, rank)


class Host:
    """Rank 0, accepting rank 1 (or `ranks`) in a thread; `result` is what came of it."""

    def __init__(self, *, ranks=(1,), seconds=20.0, patience_s=5.0, friends=("127.0.0.1",), namespace=LAB):
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.address = Address(["127.0.0.1"], self.listener.getsockname()[1], KEYS[0].public)
        admits = {(kind, rank): offers for rank in ranks for kind, offers in WANTS.items()}
        pool = ThreadPoolExecutor(1)
        self.result = pool.submit(accept, credentials(0, namespace), self.listener, admits,
                                  {rank: KEYS[rank].public for rank in ranks}, set(friends), patience_s=patience_s,
                                  deadline=Deadline(seconds))
        pool.shutdown(wait=False)

    def connect(self, **how):
        return socket.create_connection(("127.0.0.1", self.address.port), timeout=10, **how)

    def dial(self, rank=1, namespace=LAB, **how):
        how = {"num_attempts": 3, "patience_s": 5.0, "deadline": Deadline(10.0)} | how
        return dial(credentials(rank, namespace), 0, self.address, WANTS, **how)

    def meet(self):
        """Rank 1 connects; how long that took."""
        started = time.monotonic()
        mine = self.dial()
        theirs = self.result.result(10)
        lasted = time.monotonic() - started
        for kind, proven in mine.items():
            assert proven.session.binding == theirs[kind, 1].session.binding
            theirs[kind, 1].sock.setblocking(True)
            proven.sock.sendall(b"hello")
            assert theirs[kind, 1].sock.recv(5) == b"hello"
        return lasted


def test_ranks_meet_and_know_each_other():
    host = Host(ranks=(1, 2))
    with ThreadPoolExecutor(2) as pool:
        mine = list(pool.map(host.dial, (1, 2)))
    theirs = host.result.result(10)
    assert set(theirs) == {(kind, rank) for kind in WANTS for rank in (1, 2)}
    for rank, found in zip((1, 2), mine, strict=True):
        for kind, proven in found.items():
            assert proven.session.peer == KEYS[0].public and theirs[kind, rank].session.peer == KEYS[rank].public
            assert proven.session.purpose == Purpose(kind, rank, 0)
            assert proven.session.send_key == theirs[kind, rank].session.receive_key


@pytest.mark.feature("P30")
@pytest.mark.parametrize("namespace", [Namespace.from_psk("11" * 32, "lab"), Namespace.from_token(bytes(32))])
def test_another_psk_is_refused_and_both_ends_say_why(namespace):
    host = Host(seconds=1.0)
    with pytest.raises(AuthFailed, match="rank 0 in 2 attempts; .*hung up in the handshake: its PSK"):
        host.dial(namespace=namespace, num_attempts=2)
    with pytest.raises(NotEnoughPeers, match=r"ranks \[1\] did not connect within 1 s; 2 connections were refused, the "
                                             r"last from 127.0.0.1: the peer has another PSK or namespace"):
        host.result.result(10)


def test_a_member_that_is_not_the_node_it_should_be_is_refused():
    host = Host(seconds=1.0)
    with pytest.raises(AuthFailed):
        dial(Credentials(KEYS[2], LAB, bytes(16), 1), 0, host.address, WANTS, num_attempts=1, patience_s=5.0,
             deadline=Deadline(5.0))
    with pytest.raises(NotEnoughPeers, match="is on node .* says it is that rank"):
        host.result.result(10)
    host = Host(seconds=1.0)
    with pytest.raises(AuthFailed, match="the peer is node"):
        dial(credentials(1), 0, host.address._replace(node=KEYS[2].public), WANTS, num_attempts=1, patience_s=5.0,
             deadline=Deadline(5.0))
    with pytest.raises(NotEnoughPeers):
        host.result.result(10)


@pytest.mark.feature("P38")
@pytest.mark.parametrize("place", [(1, 0), (0, 7)], ids=["epoch", "group"])
def test_a_member_of_another_epoch_or_group_is_refused(place):
    """The same ranks of the same run: a view later, or in a sub-group that is made at the same time."""
    host = Host(seconds=3.0)
    with pytest.raises(AuthFailed, match="hung up"):
        dial(Credentials(KEYS[1], LAB, bytes(16), 1, *place), 0, host.address, WANTS, num_attempts=1, patience_s=5.0,
             deadline=Deadline(5.0))
    assert host.meet() < 3                      # who means the same is let in


def test_attempts_are_counted_and_end_in_time():
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(NotEnoughPeers, match="no connection to rank 0 in 3 attempts; the last: 127.0.0.1"):
        dial(credentials(1), 0, Address(["127.0.0.1"], port, KEYS[0].public), WANTS, num_attempts=3, patience_s=1.0,
             deadline=Deadline(5.0))
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        started, heard = time.monotonic(), []
        with pytest.raises(NotEnoughPeers, match="was silent for 0.2 s"):
            dial(credentials(1), 0, Address(["127.0.0.1"], deaf.getsockname()[1], KEYS[0].public), WANTS, num_attempts=3,
                 patience_s=0.2, deadline=Deadline(5.0))
        assert 0.6 < time.monotonic() - started < 3
        deaf.settimeout(0.2)
        while len(heard) < 4:
            try:
                heard.append(deaf.accept()[0])
            except TimeoutError:
                break
        assert len(heard) == 3


ATTACK = """
import resource, socket, sys
port, count, text = int(sys.argv[1]), int(sys.argv[2]), bytes.fromhex(sys.argv[3])
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
held = []
for k in range(count):
    try:
        sock = socket.create_connection(("127.0.0.1", port), timeout=30)
        sock.sendall(text)
        held.append(sock)
    except (ConnectionError, TimeoutError):
        pass
    if k in (count // 2, count - 1):
        print(k, flush=True)
sys.stdin.read()
"""
RECORDED = Initiator(KEYS[1], LAB, Purpose(Kind.DATA, 1, 0), ciphers.offered()).hello


@pytest.mark.skipif(sys.platform != "linux", reason="counts descriptors in /proc")
@pytest.mark.parametrize(("count", "text"), [
    (10_000, b""), (2000, b"F"), (1000, os.urandom(300)), (500, b"\xff" * 8), (500, b"GET / HTTP/1.1\r\n\r\n" * 20),
    (500, RECORDED), (200, RECORDED * 100),
], ids=["half-open", "one byte", "noise", "4 GiB length", "http", "replayed hello", "and more"])
def test_strangers_delay_nobody_and_cost_little(count, text):
    host = Host(seconds=60.0)
    attack = subprocess.Popen([sys.executable, "-c", ATTACK, str(host.address.port), str(count), text.hex()],
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    before, worst, over = len(os.listdir("/proc/self/fd")), [0], threading.Event()

    def watch():
        while not over.wait(0.005):
            worst[0] = max(worst[0], len(os.listdir("/proc/self/fd")) - before)
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        assert attack.stdout.readline() == f"{count // 2}\n"            # in the thick of it
        assert host.meet() < 3.0
    finally:
        over.set()
        watcher.join()
        attack.kill()
        attack.communicate()
    assert 0 < worst[0] < 2 * MOST_GUESTS + 32


@pytest.mark.skipif(sys.platform != "linux", reason="needs a second loopback address")
def test_an_address_that_keeps_failing_is_not_listened_to_for_a_while():
    host = Host(patience_s=60.0)
    for _ in range(BURST):
        with host.connect(source_address=("127.0.0.2", 0)) as stranger:
            stranger.sendall(bytes(200))
            assert gone(stranger)
    with host.connect(source_address=("127.0.0.2", 0)) as stranger:     # hung up on before it says a word
        assert gone(stranger)
    with host.connect(source_address=("127.0.0.3", 0)) as another:
        another.settimeout(0.2)
        with pytest.raises(TimeoutError):
            another.recv(1)
        assert host.meet() < 3.0


def gone(sock):
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:
        return True


def test_nobody_is_waited_for_longer_than_a_handshake_may_take():
    host = Host(patience_s=0.3)
    silent, slow = host.connect(), host.connect()
    started = time.monotonic()
    slow.sendall(RECORDED)
    assert len(slow.recv(1000)) > 100                                   # an answer, and then nothing more is said
    assert gone(silent) and gone(slow)
    assert 0.2 < time.monotonic() - started < 3
    host.meet()


def counts():
    """{(name, label values): value} of what connections count."""
    return {(family.name.removeprefix("pyfleet_"), *(value for _, value in key)): value for family in REGISTRY.collect()
            if family.name.startswith(("pyfleet_connection", "pyfleet_handshake")) for key, value in family.samples.items()}


@pytest.mark.feature("P31")
def test_attempts_refusals_and_failed_handshakes_are_counted():
    before, host = counts(), Host()
    with pytest.raises(AuthFailed):
        host.dial(namespace=Namespace.from_psk("11" * 32, "lab"), num_attempts=2)
    with socket.create_server(("127.0.0.1", 0)) as gone:
        nobody = Address(["127.0.0.1"], gone.getsockname()[1], KEYS[0].public)
    with pytest.raises(NotEnoughPeers):
        dial(credentials(1), 0, nobody, WANTS, num_attempts=3, patience_s=5.0, deadline=Deadline(10.0))
    host.meet()
    assert {key: value - before.get(key, 0) for key, value in counts().items() if value != before.get(key, 0)} == {
        ("connection_attempts_total", "refused"): 2, ("connection_attempts_total", "unreachable"): 3,
        ("connection_attempts_total", "connected"): 2, ("connections_refused_total", "handshake"): 2,
        ("handshake_failures_total", "dialled"): 2, ("handshake_failures_total", "accepted"): 2}
