"""Who is alive, and how far away: heartbeats between nodes. Sans-I/O: events and the time in, actions out.

Of a pair, the end with the lesser peer id sends Ping, the other answers Pong: one message each way per ping_every_s
keeps both informed. A Ping carries a new number only once the one before was answered. So a new number tells the end
that answers, too, that its last answer arrived: both ends know up to when the other still heard them (`is_current`).

`now` is in seconds of a clock that goes on while the machine sleeps (CLOCK_BOOTTIME on Linux, CLOCK_MONOTONIC on
macOS; time.monotonic() stands still): one that wakes must not take the end of a connection that the others gave up
long ago for their death.
"""
from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

from pyfleet.membership.messages import Message, Ping, Pong

HEALTHY, LATE, SILENT = "healthy", "late", "silent"
GAPS_KEPT = 32          # the last half minute of a connection


class Beat(NamedTuple):
    """Give a heartbeat to a peer."""

    peer: str
    message: Ping | Pong


class Changed(NamedTuple):
    """A peer's state is another one: "healthy", "late" or "silent". Silent is final: end the connection, and remove()."""

    peer: str
    state: str
    silent_s: float


@dataclass(frozen=True)
class HealthSettings:
    """Attributes:
        ping_every_s: between heartbeats of a pair.
        dead_after_s: silence after which a peer is down, at least;  most_s: at most, where heartbeats come unevenly.
        spread:     how many median deviations above the median gap a silence must be.
        weight:     of a new sample in the average latency.
        jump_s:     when the own clock is later than planned by this much, we slept, and not the others.
        margin_s:   by which proof of being heard must be younger than dead_after_s: what clocks differ in that time.
    """

    ping_every_s: float = 1.3           # a fleet of eight stays below 1 KB/s each, all headers included
    dead_after_s: float = 3.4           # two heartbeats and the answer to the first, and a moment
    most_s: float = 8.0
    spread: float = 8.0
    weight: float = 0.2
    jump_s: float = 2.0
    margin_s: float = 0.25


@dataclass
class _Peer:
    since: float
    heard: float
    is_pinged: bool                                     # by us
    next_ping: float = math.inf
    state: str = HEALTHY
    number: int = 0                                     # of the last Ping sent, or answered
    sent: float = math.nan                              # when that Ping, or the answer to it, was first sent
    is_answered: bool = True
    is_timed: bool = False                              # the answer will tell the latency
    heard_us: float = -math.inf                         # the peer has heard something that was sent then
    latency_ms: float | None = None
    trip_ms: float | None = None                        # of the last answer, if it was timed
    gaps: deque[float] = field(default_factory=lambda: deque(maxlen=GAPS_KEPT))
    last_beat: float = math.nan


class Health:
    """The heartbeats of all connections of one node.

    Attributes:
        deadline: when tick is wanted next; None: never.
        busy_ms:  how late tick has been of late; goes to the others with each Pong.
    """

    def __init__(self, own: str, settings: HealthSettings = HealthSettings()):
        self.own, self.settings = own, settings
        self.deadline: float | None = None
        self.busy_ms = 0.0
        self._peers: dict[str, _Peer] = {}
        self._now = -math.inf

    def add(self, peer: str, now: float) -> list[Beat | Changed]:
        """A connection to this peer stands."""
        self._pass(now)
        pinged = self.own < peer
        self._peers[peer] = _Peer(self._now, self._now, pinged, self._now if pinged else math.inf)
        return self._go_on()

    def remove(self, peer: str, now: float) -> list[Beat | Changed]:
        """The connection is over."""
        self._pass(now)
        self._peers.pop(peer, None)
        return self._go_on()

    def received(self, peer: str, message: Message, now: float) -> list[Beat | Changed]:
        """A message of this peer, of any kind; Ping is answered."""
        self._pass(now)
        known = self._peers.get(peer)
        if known is None:
            return []
        actions: list[Beat | Changed] = []
        known.heard = self._now
        if isinstance(message, Ping | Pong):
            if not math.isnan(known.last_beat):
                known.gaps.append(self._now - known.last_beat)
            known.last_beat = self._now
        if isinstance(message, Ping) and not known.is_pinged:
            if message.number > known.number:
                known.heard_us = known.sent if known.number else -math.inf
                known.number, known.sent = message.number, self._now
            actions.append(Beat(peer, Pong(message.number, self.busy_ms)))
        elif isinstance(message, Pong) and known.is_pinged and not known.is_answered and message.number == known.number:
            known.is_answered, known.heard_us = True, known.sent
            # How long the other end was busy is not the wire's; that is an average, so it may exceed this sample.
            sample = max((self._now - known.sent) * 1000 - max(message.busy_ms, 0.0), 0.0)
            weight = self.settings.weight if known.latency_ms is not None else 1.0
            known.trip_ms = sample if known.is_timed else None
            if known.is_timed:
                known.latency_ms = (1 - weight) * (known.latency_ms or 0.0) + weight * sample
        return actions + self._go_on()

    def tick(self, now: float) -> list[Beat | Changed]:
        """The time has come, or passed."""
        late = max(0.0, now - self.deadline) if self.deadline is not None else 0.0
        self.busy_ms += self.settings.weight * (late * 1000 - self.busy_ms)
        self._pass(now)
        return self._go_on()

    # ---- what is told ------------------------------------------------------------------------------------------------

    def state(self, peer: str) -> str:
        """"healthy", "late" or "silent". Raises: KeyError for who is not connected."""
        return self._peers[peer].state

    def latency_ms(self, peer: str) -> float | None:
        """The moving average of the time to the peer and back; None before the first, and at the end that answers."""
        return self._peers[peer].latency_ms

    def trip_ms(self, peer: str) -> float | None:
        """How long the last heartbeat took to the peer and back; None where that could not be told."""
        return self._peers[peer].trip_ms

    def silent_s(self, peer: str, now: float) -> float:
        """For how long nothing has come."""
        return max(0.0, now - self._peers[peer].heard)

    def patience_s(self, peer: str) -> float:
        """The silence after which this peer is down."""
        settings, gaps = self.settings, self._peers[peer].gaps
        if not gaps:
            return settings.dead_after_s
        median = statistics.median(gaps)
        deviation = statistics.median(abs(gap - median) for gap in gaps)
        return min(max(settings.dead_after_s, median + settings.spread * deviation), settings.most_s)

    def is_current(self, peer: str, now: float) -> bool:
        """Whether the peer cannot yet have given us up for silence.

        It has heard something from us that was sent less than dead_after_s ago. If its kernel ends the connection now, the
        peer did not do it for silence: it is dead, as Election.down(dead=True) means it.
        """
        known = self._peers.get(peer)
        return known is not None and now < known.heard_us + self.settings.dead_after_s - self.settings.margin_s

    # ---- going on ----------------------------------------------------------------------------------------------------

    def _pass(self, now: float) -> None:
        """Time passes. When far more of it has passed than was planned, we were stopped: nobody is to blame."""
        if self.deadline is not None and now >= self.deadline + self.settings.jump_s:
            for known in self._peers.values():
                known.heard, known.last_beat, known.is_timed = now, math.nan, False
        self._now = max(self._now, now)

    def _go_on(self) -> list[Beat | Changed]:
        settings, actions, times = self.settings, [], []
        for peer, known in self._peers.items():
            if known.state == SILENT:
                continue
            if self._now >= known.next_ping:
                if known.is_answered:
                    known.number, known.sent = known.number + 1, self._now
                    known.is_answered, known.is_timed = False, True
                known.next_ping = self._now + settings.ping_every_s
                actions.append(Beat(peer, Ping(known.number)))
            patience = self.patience_s(peer)
            ends = (known.heard + patience / 2, known.heard + patience)
            state = HEALTHY if self._now < ends[0] else LATE if self._now < ends[1] else SILENT
            if state != known.state:
                known.state = state
                actions.append(Changed(peer, state, self._now - known.heard))
            times += [known.next_ping, *(end for end in ends if end > self._now)]
        first = min(times, default=math.inf)
        self.deadline = None if first == math.inf else first
        return actions
