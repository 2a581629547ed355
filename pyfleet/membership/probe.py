"""Measuring what lies between two nodes, over a connection that has proved itself and carries nothing else.

The initiator leads: a greeting, echoes, a bulk transfer to the responder, one back, the result. Every word is one
header (kind, two numbers, a MAC under a secret of this connection); bulk data follows headers that say how much. The
receiver of bulk data allows so much at a time that no queue on the way holds more than a moment's worth, and stops the
sender as soon as it has seen enough: after 0.1 s on a quiet link, LONGEST_S at most, and never more than MOST_BYTES.
"""
from __future__ import annotations

import hashlib
import hmac
import math
import os
import select
import socket
import statistics
import struct
import time
from collections import deque

from pyfleet.errors import AuthFailed, CorruptData, PeerLost, Timeout
from pyfleet.interfaces import MEDIA, UNKNOWN
from pyfleet.membership.topology import FASTEST, Edge

DEADLINE_S = 5.0                # for the whole probe; at 1 Mbit/s what is on its way lasts a second
ECHOES, LEAST_ECHOES = 9, 2     # besides the first one, which wakes the other end up and is not counted
ECHOES_S = 0.1
MOST_BYTES = 48 << 20           # of bulk data each way: 0.4 s at 1 Gbit/s
PIECE_BYTES = 64 << 10          # after one header
LEAST_PIECE_BYTES = 16 << 10    # it is not worth a header to send less, as long as more will be allowed
HEAD_START_BYTES = 64 << 10     # may be on its way at the start
AHEAD_S = 0.05                  # and later on: what a receiver that sleeps or a timer costs,
AHEAD_TRIPS = 3                 # and so many round trips, so that a long way fills within a few of them
# A shaper that was idle lets a burst pass at full speed (80 KB is usual), and a window has to open: neither is counted.
SKIP_BYTES, SKIP_S, SKIP_TRIPS = 128 << 10, 0.03, 2
WINDOW_BYTES, WINDOW_S = 96 << 10, 0.04     # two windows in a row that agree are enough; packets come in lumps of 64 KB
AGREE = 0.05
LUMP_S = 0.002                  # what comes within that came together: 64 KB take no longer to read on any machine
LONGEST_S, LONGEST_TRIPS = 0.25, 6      # of one bulk transfer, as the receiver sees it
_WORD = struct.Struct("<Bdd")
_MAC_BYTES = 16
HEADER_BYTES = _WORD.size + _MAC_BYTES
GREETING, ECHO, READY, ALLOWED, PIECE, STOP, DONE, RATE, RESULT = range(1, 10)


def probe_initiator(sock: socket.socket, secret: bytes, *, medium: str = UNKNOWN, address: str = "",
                    deadline_s: float = DEADLINE_S) -> Edge:
    """Measure the way to the peer of a connected stream socket and back: in less than 1 s where there are 10 Mbit/s and
    round trips of 10 ms or better; a round trip that is longer counts about 20 times.

    Args:    secret: known to both ends of this connection alone: Session.binding.
             medium: of the own end's interface.  address: the peer's, for the edge.
    Returns: what lies between, as this end sees it.
    Raises:  Timeout at deadline_s; PeerLost when the peer hangs up; CorruptData, AuthFailed for what it may not say.
             Whatever is raised, the connection is of no more use; the socket remains the caller's, blocking as before.
    """
    with _Line(sock, secret, b"initiator", b"responder", deadline_s) as line:
        line.say(GREETING, MEDIA.index(medium))
        peer_medium = _medium(line.hear(GREETING)[0])
        trips, end = [], time.monotonic() + ECHOES_S
        for number in range(1 + ECHOES):
            began = time.perf_counter()
            line.say(ECHO, number)
            if line.hear(ECHO)[0] != number:
                raise CorruptData("the peer answers another echo than the last")
            trips.append(time.perf_counter() - began)
            if number >= LEAST_ECHOES and time.monotonic() > end:
                break
        trip = statistics.median(trips[1:])
        line.say(READY, trip)
        sent = _pour(line)
        received = _catch(line, trip)
        line.say(RESULT, trip / 2)
        line.hear(RESULT)
    return Edge(latency_s=trip / 2, sent_bytes_s=sent, received_bytes_s=received, medium=medium,
                peer_medium=peer_medium, address=address, measured_at=time.time())


def probe_responder(sock: socket.socket, secret: bytes, *, medium: str = UNKNOWN, address: str = "",
                    deadline_s: float = DEADLINE_S) -> Edge:
    """The other end of probe_initiator: answers it, and returns the edge as seen from here. Args, raises: the same."""
    with _Line(sock, secret, b"responder", b"initiator", deadline_s) as line:
        peer_medium = _medium(line.hear(GREETING)[0])
        line.say(GREETING, MEDIA.index(medium))
        for _ in range(2 + ECHOES):
            kind, number, _ = line.next()
            if kind != ECHO:
                break
            line.say(ECHO, number)
        if kind != READY or not 0 <= number <= deadline_s:
            raise CorruptData("the peer ends its echoes with nonsense")
        received = _catch(line, number)
        sent = _pour(line)
        latency, _ = line.hear(RESULT)
        line.say(RESULT)
    if not 0 <= latency <= deadline_s:
        raise CorruptData("the peer says that it measured nonsense")
    return Edge(latency_s=latency, sent_bytes_s=sent, received_bytes_s=received, medium=medium, peer_medium=peer_medium,
                address=address, measured_at=time.time())


def _medium(number):
    if number not in range(len(MEDIA)):
        raise CorruptData(f"the peer is on medium {number:g}, which there is none")
    return MEDIA[int(number)]


class _Line:
    """Words and bulk data over a socket, each wait bounded by the one deadline."""

    def __init__(self, sock, secret, mine, theirs, deadline_s):
        self.sock, self.deadline_s, self.end = sock, deadline_s, time.monotonic() + deadline_s
        self._keys = [hashlib.sha3_256(b"pyfleet probe\0" + role + secret).digest() for role in (mine, theirs)]
        self._said = self._heard = 0
        self._pending = bytearray()             # of what arrives, less than a header
        self._room = memoryview(bytearray(256 << 10))
        self._poll = select.poll()

    def __enter__(self):
        self._timeout = self.sock.gettimeout()
        self.sock.setblocking(False)
        if self.sock.family in (socket.AF_INET, socket.AF_INET6):
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return self

    def __exit__(self, *_):
        self.sock.settimeout(self._timeout)

    def wait(self, *, to_read=False, to_write=False):
        """(whether there is something to read, whether there is room to write), once one of what was asked is so."""
        self._poll.register(self.sock, (select.POLLIN if to_read else 0) | (select.POLLOUT if to_write else 0))
        left = self.end - time.monotonic()
        for _, events in self._poll.poll(max(0.0, left) * 1000) if left > 0 else ():
            broken = events & ~(select.POLLIN | select.POLLOUT)         # the call that follows says how
            return bool(events & select.POLLIN or broken), bool(events & select.POLLOUT)
        raise self._late()

    def _late(self):
        return Timeout(f"the peer did not keep up with the probe within {self.deadline_s:g} s")

    def word(self, kind, first=0.0, second=0.0):
        """The bytes of a word."""
        text = _WORD.pack(kind, first, second)
        self._said += 1
        return text + self._mac(0, self._said, text)

    def _mac(self, end, number, text):
        return hmac.digest(self._keys[end], number.to_bytes(8, "little") + text, "sha256")[:_MAC_BYTES]

    def say(self, kind, first=0.0, second=0.0):
        """Send a word."""
        data = self.word(kind, first, second)
        while data:
            data = data[self.write(data):]
            if data:
                self.wait(to_write=True)

    def write(self, data):
        """Give the kernel some of it; how much it took."""
        try:
            return self.sock.send(data)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise PeerLost(f"the peer of a probe is gone: {error.strerror or error}") from None

    def read(self, most):
        """Up to `most` bytes of what has arrived, as a view that lasts until the next call; empty when nothing has."""
        try:
            count = self.sock.recv_into(self._room[:most])
        except BlockingIOError:
            return self._room[:0]
        except OSError as error:
            raise PeerLost(f"the peer of a probe is gone: {error.strerror or error}") from None
        if not count:
            raise PeerLost("the peer of a probe hung up")
        return self._room[:count]

    def take(self):
        """A word if all of it has arrived, else None: (kind, first, second)."""
        if time.monotonic() > self.end:             # who talks all the time is late, too
            raise self._late()
        self._pending += self.read(HEADER_BYTES - len(self._pending))
        if len(self._pending) < HEADER_BYTES:
            return None
        text, mac = bytes(self._pending[:_WORD.size]), bytes(self._pending[_WORD.size:])
        self._pending.clear()
        self._heard += 1
        if not hmac.compare_digest(mac, self._mac(1, self._heard, text)):
            raise AuthFailed("what came over the connection of a probe is not the peer's")
        kind, first, second = _WORD.unpack(text)
        if not math.isfinite(first) or not math.isfinite(second):
            raise CorruptData("the peer says numbers that are not finite")
        return kind, first, second

    def next(self):
        """The next word, waited for."""
        while (word := self.take()) is None:
            self.wait(to_read=True)
        return word

    def hear(self, kind):
        """The two numbers of the next word, which must be of this kind."""
        found, *numbers = self.next()
        if found != kind:
            raise CorruptData(f"the peer said {found} in a probe where {kind} was due")
        return numbers


def _pour(line):
    """Send bulk data as it is allowed, until the receiver has seen enough; the bytes/s that it saw."""
    rubbish = memoryview(os.urandom(PIECE_BYTES))       # nothing that a radio or a tunnel could compress
    allowed = sent = 0
    stopped, pending = False, deque()
    while pending or not stopped:
        due = min(PIECE_BYTES, allowed - sent)
        if not pending and not stopped and due >= min(LEAST_PIECE_BYTES, MOST_BYTES - sent) and due > 0:
            pending.extend((memoryview(line.word(PIECE, due)), rubbish[:due]))
            sent += due
        readable, writable = line.wait(to_read=True, to_write=bool(pending))
        if writable:
            count = line.write(pending[0])
            pending[0] = pending[0][count:]
            if not pending[0]:
                pending.popleft()
        while readable and (word := line.take()) is not None:
            kind, number, _ = word
            if kind == STOP and not stopped:
                stopped = True
            elif kind == ALLOWED and not stopped and allowed < number <= MOST_BYTES:
                allowed = int(number)
            else:
                raise CorruptData(f"the peer said {kind} in the midst of a transfer")
    line.say(DONE, sent)
    rate, _ = line.hear(RATE)
    if not 0 < rate <= FASTEST:
        raise CorruptData("the peer says that it measured nonsense")
    return rate


def _catch(line, trip):
    """Take bulk data, and say how much may come and when it is enough; the bytes/s, which the peer is told, too."""
    meter = Meter(trip)
    allowed, expected, stopped = HEAD_START_BYTES, 0, False
    line.say(ALLOWED, allowed)
    while True:
        while expected:
            line.wait(to_read=True)
            count = len(line.read(min(expected, len(line._room))))
            if not count:
                continue
            expected -= count
            meter.arrived(count, time.perf_counter())
            if stopped:
                continue
            more = min(meter.allows(), MOST_BYTES)
            if meter.enough:
                stopped = True
                line.say(STOP)
            elif more - allowed >= LEAST_PIECE_BYTES or more == MOST_BYTES > allowed:
                allowed = more
                line.say(ALLOWED, allowed)
        kind, number, _ = line.next()
        if kind == DONE and stopped and number == meter.num_bytes:
            break
        due = min(PIECE_BYTES, allowed - meter.num_bytes)
        if kind != PIECE or not 0 < number <= due or number != int(number):
            raise CorruptData(f"the peer said {kind} ({number:g}) in the midst of a transfer")
        expected = int(number)
    rate = meter.bytes_s()
    line.say(RATE, rate)
    return rate


class Meter:
    """How fast bytes arrive, and when that is known well enough; pure.

    Args:    trip: seconds of a round trip.
    """

    def __init__(self, trip: float):
        self.num_bytes, self.enough = 0, False
        self._trip, self._skip_s, self._window_s = trip, max(SKIP_S, SKIP_TRIPS * trip), max(WINDOW_S, trip)
        self._longest_s = max(LONGEST_S, LONGEST_TRIPS * trip)
        self._began, self._agreed = 0.0, False
        self._arrivals: list[tuple[float, int]] = []    # (when a lump came, bytes at its end)
        self._marks: list[int] = []                     # arrivals that end windows; at the first one counting begins
        self._past = 0                                  # the first arrival that counts for what is allowed

    def arrived(self, count: int, now: float) -> None:
        """So many more bytes are here, at a time in seconds of any clock."""
        self.num_bytes += count
        if self._arrivals and now - self._arrivals[-1][0] < LUMP_S:
            self._arrivals[-1] = self._arrivals[-1][0], self.num_bytes
        else:
            if not self._arrivals:
                self._began = now
            else:
                self._consider(len(self._arrivals) - 1)
            self._arrivals.append((now, self.num_bytes))
        self.enough = self._agreed or now - self._began >= self._longest_s or self.num_bytes >= MOST_BYTES

    def _consider(self, at):
        """Whether a window ends with this arrival, which is complete by now."""
        now, there = self._arrivals[at]
        if not self._marks:
            if there >= SKIP_BYTES and now - self._began >= self._skip_s:
                self._marks.append(at)
        elif not self._agreed:
            then, before = self._arrivals[self._marks[-1]]
            if now - then >= self._window_s and there - before >= WINDOW_BYTES:
                self._marks.append(at)
                if len(self._marks) >= 3:
                    one, other = self._rate(*self._marks[-3:-1]), self._rate(*self._marks[-2:])
                    self._agreed = abs(one - other) <= AGREE * max(one, other)

    def allows(self) -> int:
        """How many bytes the sender may have sent by now: what is here, and what comes in the next moment. A round trip
        counts several times as much, for as long as it may be that a window still opens."""
        now, window_s = self._arrivals[-1][0], AHEAD_S + self._trip
        while self._arrivals[self._past][0] < now - window_s:
            self._past += 1
        recent = self.num_bytes - (self._arrivals[self._past - 1][1] if self._past else 0)
        return self.num_bytes + HEAD_START_BYTES + int(recent * (AHEAD_S + AHEAD_TRIPS * self._trip) / window_s)

    def bytes_s(self) -> float:
        """The rate at which bytes have arrived: in the windows that agree, else in the later part of all; where too few
        came to skip a start, in the later half of them."""
        if self._agreed:
            return self._rate(self._marks[-3], self._marks[-1])
        last = max(0, len(self._arrivals) - 2)          # of the last one there may be more
        first = self._marks[len(self._marks) // 3] if self._marks else last
        if self._arrivals[last][1] - self._arrivals[first][1] < WINDOW_BYTES:
            first = next(at for at, (_, there) in enumerate(self._arrivals) if there >= self._arrivals[last][1] / 2)
        return self._rate(first, last) if first < last else self.num_bytes / LUMP_S         # all came at once

    def _rate(self, first, last):
        (then, before), (now, there) = self._arrivals[first], self._arrivals[last]
        return (there - before) / (now - then)
