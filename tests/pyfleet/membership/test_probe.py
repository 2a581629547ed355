"""Probes: they tell the truth of a link, end in time, and nobody can make them hang, send without end or believe a stranger."""
import contextlib
import random
import socket
import threading
import time
from statistics import median

import pytest

from pyfleet.errors import AuthFailed, CorruptData, FleetError, PeerLost, Timeout
from pyfleet.membership import probe
from pyfleet.membership.probe import HEADER_BYTES, MOST_BYTES, Meter, probe_initiator, probe_responder
from tests.faults import faulty_pair
from tests.network import bits_per_s
from tests.ranks import PATIENCE_S

SECRET = b"s" * 32


class Other(threading.Thread):
    """A function in a thread; result() returns or raises what it did."""

    def __init__(self, function, *args, **options):
        super().__init__(daemon=True)
        self.call, self.outcome = (function, args, options), None
        self.start()

    def run(self):
        function, args, options = self.call
        try:
            self.outcome = function(*args, **options), None
        except BaseException as error:      # noqa: BLE001 the test wants to see it
            self.outcome = None, error

    def result(self):
        self.join(PATIENCE_S)
        assert self.outcome is not None, "it hangs"
        value, error = self.outcome
        if error is not None:
            raise error
        return value


def test_both_ends_tell_the_same():
    near, far = socket.socketpair()
    near.settimeout(7.0)
    with near, far:
        other = Other(probe_responder, far, SECRET, medium="wifi", address="10.0.0.1")
        own = probe_initiator(near, SECRET, medium="ethernet", address="10.0.0.2")
        theirs = other.result()
        assert near.gettimeout() == 7.0                     # the socket is as it was, and empty
        near.setblocking(False)
        with pytest.raises(BlockingIOError):
            near.recv(1)
    assert own.turned().facts() | {"address": "", "measured_at": 0} == theirs.facts() | {"address": "", "measured_at": 0}
    assert (own.medium, own.peer_medium, own.address, theirs.address) == ("ethernet", "wifi", "10.0.0.2", "10.0.0.1")
    assert own.sent_bytes_s > 1e8 and own.received_bytes_s > 1e8
    assert 0 < own.latency_s < 0.05
    assert abs(own.measured_at - time.time()) < PATIENCE_S


def test_latency_and_time_of_a_long_way():
    near, far, relay = faulty_pair(delay_s=0.02)
    other, began = Other(probe_responder, far, SECRET), time.monotonic()
    edge = probe_initiator(near, SECRET)
    assert other.result().latency_s == edge.latency_s
    assert 0.02 <= edge.latency_s < 0.05
    assert time.monotonic() - began < 3.0
    relay.close()


# ---- between hosts -------------------------------------------------------------------------------------------------------

_listener = None


def listen():
    global _listener
    _listener = socket.create_server(("", 0))
    return _listener.getsockname()[1]


def answer():
    sock, _ = _listener.accept()
    with sock:
        return probe_responder(sock, SECRET)


def ask(address, port):
    with socket.create_connection((address, port)) as sock:
        began = time.monotonic()
        return probe_initiator(sock, SECRET, address=address), time.monotonic() - began


def probed(hosts, group):
    """(edge as host 0 sees it, as host 1 does, seconds) of a probe between the processes of two hosts."""
    (port,) = group.run(listen, only=[1])
    group.start(answer, only=[1])
    ((edge, took),) = group.run(ask, hosts.address(1), port, only=[0])
    (other,) = group.collect(only=[1])
    return edge, other, took


@pytest.mark.feature("P17")
@pytest.mark.parametrize("rate", ("1gbit", "100mbit", "10mbit"))
def test_the_rate_of_a_link_within_20_percent_in_less_than_a_second(network, rate):
    """The median of five right after each other: a shaper may have saved up for a burst, other work may take a processor."""
    hosts = network(2, rate)
    group, found, times = hosts.ranks(init=False), [], []
    for _ in range(5):
        before = sum(hosts.traffic(0))
        edge, other, took = probed(hosts, group)
        assert sum(hosts.traffic(0)) - before < 2.2 * MOST_BYTES
        found.append((edge.sent_bytes_s, edge.received_bytes_s, other.sent_bytes_s, other.received_bytes_s))
        times.append((took, edge.latency_s))
    for way in map(median, zip(*found, strict=True)):
        assert 8 * way == pytest.approx(bits_per_s(rate), rel=0.2)
    took, latency_s = map(median, zip(*times, strict=True))
    assert took < 1.0
    assert latency_s < 2e-3


@pytest.mark.feature("P17")
def test_each_way_for_itself(network):
    """Host 1 sends at 50 Mbit/s at most, and takes 200."""
    hosts = network(2, "200mbit")
    hosts.run(1, ["tc", "qdisc", "replace", "dev", "eth0", "root", "tbf", "rate", "50mbit", "burst", "81920", "limit", "1200000"])
    group = hosts.ranks(init=False)
    found = [probed(hosts, group)[0] for _ in range(3)]
    assert 8 * median(edge.sent_bytes_s for edge in found) == pytest.approx(200e6, rel=0.2)
    assert 8 * median(edge.received_bytes_s for edge in found) == pytest.approx(50e6, rel=0.2)


@pytest.mark.feature("P17")
@pytest.mark.parametrize(("rate", "delay_s"), [("100mbit", 0.01), ("100mbit", 0.02), ("10mbit", 0.01)])
def test_a_delay_is_seen_and_does_not_hide_the_rate(network, rate, delay_s):
    hosts = network(2, rate)
    hosts.interpose(1, delay_s=delay_s)
    group = hosts.ranks(init=False)
    found = [probed(hosts, group)[0] for _ in range(3)]
    assert median(edge.latency_s for edge in found) == pytest.approx(delay_s, rel=0.2)
    for way in ("sent_bytes_s", "received_bytes_s"):
        assert 8 * median(getattr(edge, way) for edge in found) == pytest.approx(bits_per_s(rate), rel=0.2)


# ---- peers that do not play by the rules -------------------------------------------------------------------------------

@pytest.mark.parametrize("probed_by", (probe_initiator, probe_responder))
def test_a_silent_peer_ends_at_the_deadline(probed_by):
    near, far = socket.socketpair()
    with near, far:
        began = time.monotonic()
        with pytest.raises(Timeout, match=r"0\.3 s"):
            probed_by(near, SECRET, deadline_s=0.3)
        assert 0.3 <= time.monotonic() - began < 1.0


@pytest.mark.parametrize("probed_by", (probe_initiator, probe_responder))
def test_a_peer_that_hangs_up_is_lost_at_once(probed_by):
    near, far = socket.socketpair()
    with near:
        far.close()
        with pytest.raises(PeerLost):
            probed_by(near, SECRET)


@pytest.mark.parametrize("after", (10, 40, 200, 100_000, 3_000_000))
@pytest.mark.parametrize("fault", ("cut", "stall", "corrupt"))
def test_damage_on_the_way_is_an_error_at_both_ends_in_time(fault, after):
    near, far, relay = faulty_pair(fault, after=after)
    other, began = Other(probe_responder, far, SECRET, deadline_s=1.0), time.monotonic()
    with near, far:
        try:
            probe_initiator(near, SECRET, deadline_s=1.0)
        except FleetError:
            near.close()
            with pytest.raises(FleetError):
                other.result()
        else:                               # the bit was one of bulk data, which means nothing
            assert fault == "corrupt" and after >= 100_000
            other.result()
    assert time.monotonic() - began < 3
    relay.close()


def test_whoever_does_not_know_the_secret_is_not_believed():
    near, far = socket.socketpair()
    with near, far:
        other = Other(probe_responder, far, b"another", deadline_s=0.5)
        with pytest.raises(FleetError):
            probe_initiator(near, SECRET, deadline_s=0.5)
        near.close()
        with pytest.raises(AuthFailed):
            other.result()


def test_words_can_not_be_sent_back_or_again():
    """A responder that echoes what it hears, and one that replays."""
    for replayed in (False, True):
        near, far = socket.socketpair()
        with near, far:
            other = Other(probe_initiator, near, SECRET, deadline_s=2.0)
            line = probe._Line(far, SECRET, b"responder", b"initiator", 2.0)
            greeting = line.word(probe.GREETING)
            if replayed:
                far.sendall(greeting + greeting)
            else:
                far.sendall(far.recv(HEADER_BYTES))
            with pytest.raises(AuthFailed):
                other.result()


def liar(sock, say, role=(b"responder", b"initiator")):
    """The other end's line, after a greeting and the words that `say` makes of it."""
    with probe._Line(sock, SECRET, *role, 5.0) as line:
        line.say(probe.GREETING)
        say(line)
        with contextlib.suppress(PeerLost):
            while True:
                line.wait(to_read=True)
                line.read(1 << 16)


def echoes(line):
    """Answer a greeting and echoes as one should; returns at READY."""
    line.hear(probe.GREETING)
    while (word := line.next())[0] == probe.ECHO:
        line.say(probe.ECHO, word[1])


def allows_all_for_ever(line):
    echoes(line)
    line.say(probe.ALLOWED, MOST_BYTES)
    with contextlib.suppress(PeerLost):
        while True:
            line.wait(to_read=True)
            line.counted = getattr(line, "counted", 0) + len(line.read(1 << 18))
            assert line.counted < MOST_BYTES * 1.01


def say_after_echoes(*words):
    def say(line):
        echoes(line)
        for word in words:
            line.say(*word)
    return say


@pytest.mark.parametrize("say", [
    lambda line: line.say(probe.ECHO, 5),
    lambda line: line.say(probe.RESULT),
    say_after_echoes((probe.ALLOWED, MOST_BYTES + 1)), say_after_echoes((probe.ALLOWED, -1)),
    say_after_echoes((probe.ALLOWED, 1000), (probe.ALLOWED, 1000)), say_after_echoes((probe.ALLOWED, float("nan"))),
    say_after_echoes((probe.STOP,), (probe.STOP,)), say_after_echoes((probe.STOP,), (probe.RATE, -1.0)),
    say_after_echoes((probe.STOP,), (probe.RATE, float("inf"))), say_after_echoes((probe.STOP,), (probe.RATE, 1e300)),
    say_after_echoes((probe.GREETING,)), say_after_echoes((77,)),
], ids=range(12))
def test_a_responder_that_says_nonsense(say):
    near, far = socket.socketpair()
    with near, far:
        other = Other(probe_initiator, near, SECRET, deadline_s=3.0)
        lies = Other(liar, far, say)
        with pytest.raises(CorruptData):
            other.result()
        near.close()
        with contextlib.suppress(PeerLost):
            lies.result()


def test_a_responder_that_never_has_enough_gets_a_bounded_amount():
    near, far = socket.socketpair()
    with near, far:
        other = Other(probe_initiator, near, SECRET, deadline_s=1.5)
        Other(liar, far, allows_all_for_ever)
        with pytest.raises(Timeout):
            other.result()


def test_a_peer_that_talks_all_the_time_is_late_too():
    def say(line):
        echoes(line)
        for number in range(1, MOST_BYTES):
            line.say(probe.ALLOWED, number)
    near, far = socket.socketpair()
    with near, far:
        other, began = Other(probe_initiator, near, SECRET, deadline_s=1.0), time.monotonic()
        Other(liar, far, say)
        with pytest.raises(Timeout):
            other.result()
        assert time.monotonic() - began < 2.0


def initiates(*words):
    def say(line):
        line.hear(probe.GREETING)
        for word in words:
            if isinstance(word, int):
                line.sock.setblocking(True)
                line.sock.sendall(bytes(word))
                line.sock.setblocking(False)
            else:
                line.say(*word)
    return say


@pytest.mark.parametrize("say", [
    initiates((probe.READY, -1.0)), initiates((probe.READY, 1e9)), initiates((probe.RESULT,)),
    initiates(*[(probe.ECHO, number) for number in range(100)]),
    initiates((probe.READY, 0.0), (probe.PIECE, 0)), initiates((probe.READY, 0.0), (probe.PIECE, 4 << 30)),
    initiates((probe.READY, 0.0), (probe.PIECE, 1.5)), initiates((probe.READY, 0.0), (probe.DONE, 0)),
    initiates((probe.READY, 0.0), (probe.PIECE, 5000), 5000, (probe.PIECE, 62_000)),      # more than was allowed
    initiates((probe.GREETING, 99.0)),
], ids=range(10))
def test_an_initiator_that_says_nonsense(say):
    near, far = socket.socketpair()
    with near, far:
        other = Other(probe_responder, near, SECRET, deadline_s=3.0)
        lies = Other(liar, far, say, (b"initiator", b"responder"))
        with pytest.raises(CorruptData):
            other.result()
        near.close()
        with contextlib.suppress(PeerLost, BrokenPipeError, ConnectionResetError):
            lies.result()


def test_a_medium_that_there_is_not():
    near, far = socket.socketpair()
    with near, far:
        other = Other(probe_responder, near, SECRET, deadline_s=3.0)
        with probe._Line(far, SECRET, b"initiator", b"responder", 3.0) as line:
            line.say(probe.GREETING, 99)
        with pytest.raises(CorruptData, match="medium 99"):
            other.result()


@pytest.mark.parametrize("seed", range(20))
def test_random_bytes_are_no_peer(seed):
    chance = random.Random(seed)
    for probed_by in (probe_initiator, probe_responder):
        near, far = socket.socketpair()
        with near, far:
            other = Other(probed_by, near, SECRET, deadline_s=2.0)
            far.sendall(chance.randbytes(chance.randrange(HEADER_BYTES, 5000)))
            with pytest.raises(AuthFailed):
                other.result()


# ---- the meter ---------------------------------------------------------------------------------------------------------

def metered(arrivals, trip=0.0):
    """A meter after (seconds, bytes) until it has enough; the bytes it had then."""
    meter = Meter(trip)
    for now, count in arrivals:
        meter.arrived(count, 100.0 + now)
        if meter.enough:
            return meter
    raise AssertionError("it never has enough")


def steady(bytes_s, lump=1448, start=0.0, burst=0):
    yield start, burst + lump
    for k in range(1, 10_000_000):
        yield start + k * lump / bytes_s, lump


@pytest.mark.parametrize("burst", (0, 80 << 10))
@pytest.mark.parametrize("lump", (1448, 65536))
@pytest.mark.parametrize("bytes_s", (1e6, 1.25e6, 1.25e7, 1.25e8, 1.25e9))
def test_a_burst_and_lumps_do_not_count(bytes_s, lump, burst):
    meter = metered(steady(bytes_s, lump, burst=burst))
    assert meter.bytes_s() == pytest.approx(bytes_s, rel=0.03)
    assert meter.num_bytes < MOST_BYTES + lump


def test_a_window_that_opens_does_not_count():
    """Of a round trip of 40 ms: 64 KB, then twice that, until 10 MB/s."""
    def slow_start():
        for trip in range(100):
            amount = min(64 << 10 << trip, 400_000)
            for k in range(10):
                yield trip * 0.04 + k * 0.04 * amount / 4_000_000, amount // 10
    assert metered(slow_start(), 0.04).bytes_s() == pytest.approx(10e6, rel=0.05)


def test_what_comes_at_once_is_fast_and_finite():
    meter = metered((0.0, 1 << 20) for _ in range(1000))
    assert 1e9 < meter.bytes_s() < 1e12


def test_never_more_is_allowed_than_a_moment_brings():
    meter = Meter(0.0)
    for now, count in steady(1.25e6):
        meter.arrived(count, now)
        assert meter.num_bytes + (64 << 10) <= meter.allows() <= meter.num_bytes + (64 << 10) + 1.25e6 * 0.06
        if meter.enough:
            break
