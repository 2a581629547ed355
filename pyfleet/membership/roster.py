"""Whom we know, and whom to connect to. Sans-I/O: sightings, connections and the time in, actions out.

A sighting is a hint and never more: only an authenticated connection proves who is where. Of a pair, the lesser peer id
dials at once and the other a little later, should the first way not work. When both did, the connection that the lesser
one began replaces the other at both ends.

`connected` answers Close(peer, "this", ...) to say that the new connection must not be used, or Close(peer, "other",
...) to say that it replaces the one before: end that (down, not dead), then begin with the new one. Whoever dials
asks `turned_out` once the other end has shown who it is, and hangs up before its own proof when it says no; then
there is nothing to report.
"""
from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from pyfleet.members import Node, Sighting
from pyfleet.membership.messages import MOST_NODES

MOST_DIALS = 32         # at once: announcing thousands of nodes must not make us open thousands of connections
IN, OUT = "in", "out"
Place = tuple[str, int]


class Dial(NamedTuple):
    """Connect to the first of these (host, port) that answers as this peer; "": as any. connected() or failed() ends it."""

    peer: str
    places: tuple[Place, ...]


class Close(NamedTuple):
    """End a connection to this peer: "this", the new one, or the "other", which the new one replaces."""

    peer: str
    which: str
    reason: str


class Discovered(NamedTuple):
    """A node may be found at these places."""

    peer: str
    places: tuple[Place, ...]
    name: str = ""


class Connected(NamedTuple):
    """A node has proved who it is."""

    node: Node


class Expired(NamedTuple):
    """A node is neither connected nor sighted any more."""

    peer: str


class Duplicate(NamedTuple):
    """Several living nodes use one identity: a key was copied."""

    peer: str
    incarnations: tuple[str, ...]
    places: tuple[Place, ...]


class OwnIdentityElsewhere(NamedTuple):
    """Another living node uses our identity: its key, or ours, was copied."""

    incarnation: str
    places: tuple[Place, ...]


Action = Dial | Close | Discovered | Connected | Expired | Duplicate | OwnIdentityElsewhere


@dataclass(frozen=True)
class RosterSettings:
    """All in seconds.

    Attributes:
        backoff_s, backoff_most_s: before the next attempt: doubled with every failure, random from half to all of it.
        yield_s:       the greater peer id lets the lesser one dial first.
        dial_s:        after which a dial that was not reported counts as failed.
        clone_after_s: two incarnations that live side by side for longer are clones; a connection to the dead does not last
                       as long (HealthSettings.most_s).
        remember_s:    a node that was connected is dialled for so long after, sighted or not.
    """

    backoff_s: float = 0.25
    backoff_most_s: float = 5.0
    yield_s: float = 0.5
    dial_s: float = 10.0
    clone_after_s: float = 10.0
    remember_s: float = 3600.0


@dataclass
class _Caller:
    """When to dial somebody."""

    num_failed: int = 0
    due: float = -math.inf
    tried: float = -math.inf
    until: float = -math.inf                            # a dial is under way


@dataclass
class _Spot(_Caller):
    """An address of which nobody knows whose it is; `peer` once it has turned out."""

    peer: str = ""


@dataclass
class _Entry(_Caller):
    """A node."""

    name: str = ""
    incarnation: str = ""
    sighted: dict[str, tuple[Place, ...]] = field(default_factory=dict)         # source -> places
    node: Node | None = None                            # as it proved to be
    connection: tuple[str, str] | None = None           # incarnation, direction
    is_told: bool = False                               # Discovered, and not Expired since
    gone: float = math.inf                              # when the last connection ended
    others: dict[str, tuple[float, float]] = field(default_factory=dict)        # incarnation -> first and last refusal
    num_clones: int = 0


class Roster:
    """All nodes that one node has heard of.

    Args:    jitter: gives numbers in [0, 1), so that nodes which lost each other do not all dial at the same moment.

    Attributes:
        deadline: when tick is wanted next; None: never.
    """

    def __init__(self, own_peer: str, own_incarnation: str, jitter: Callable[[], float],
                 settings: RosterSettings = RosterSettings()):
        self.own_peer, self.own_incarnation, self.settings = own_peer, own_incarnation, settings
        self.deadline: float | None = None
        self._jitter = jitter
        self._now = -math.inf
        self._entries: OrderedDict[str, _Entry] = OrderedDict()         # the longest unheard of first
        self._spots: OrderedDict[Place, _Spot] = OrderedDict()
        self._elsewhere: set[str] = set()               # incarnations of our identity
        self._evicted: list[str] = []

    # ---- what is told ------------------------------------------------------------------------------------------------

    @property
    def nodes(self) -> tuple[Node, ...]:
        """Those that have proved who they are and are connected: what the others may be told."""
        return tuple(entry.node for entry in self._entries.values() if entry.connection is not None)

    # ---- what happens ------------------------------------------------------------------------------------------------

    def sighted(self, sighting: Sighting, now: float) -> list[Action]:
        """Somebody or something says that a node can be found somewhere. Whom to dial, tick will say.

        There may be thousands of them, all made up, so one takes no look at all the others.
        """
        self._now = max(self._now, now)
        places = tuple(dict.fromkeys((host, sighting.port) for host in sighting.addresses))
        if sighting.peer == self.own_peer and sighting.incarnation in ("", self.own_incarnation, *self._elsewhere):
            return []
        if not sighting.peer or sighting.peer == self.own_peer:
            for place in places:
                self._spot(place)
            return []
        entry = self._entry(sighting.peer)
        if entry is None:
            return []
        is_new = entry.sighted.get(sighting.source) != places
        entry.sighted[sighting.source] = places
        entry.name, entry.incarnation = sighting.name or entry.name, sighting.incarnation or entry.incarnation
        if entry.connection is None:
            self._encourage(entry, self.settings.yield_s if is_new and self.own_peer > sighting.peer else 0.0)
        if entry.is_told:
            return []
        entry.is_told = True
        return [Discovered(sighting.peer, self._places(entry), entry.name)]

    def unsighted(self, peer: str, source: str, now: float) -> list[Action]:
        """This source says no more that the node can be found."""
        self._now = max(self._now, now)
        entry = self._entries.get(peer)
        if entry is not None:
            entry.sighted.pop(source, None)
        return self._go_on()

    def known(self, nodes: Iterable[Node], now: float) -> list[Action]:
        """A connected node has authenticated these; to us they are sightings."""
        actions: list[Action] = []
        for node in nodes:
            actions += self.sighted(Sighting(addresses=node.addresses, port=node.port, peer=node.peer, source="gossip",
                                             incarnation=node.incarnation, name=node.name), now)
        return actions

    def turned_out(self, peer: str, place: Place, now: float) -> bool:
        """Whoever answers where we dial has shown that it is this peer; whether to go on and show who we are."""
        self._now = max(self._now, now)
        if place in self._spots:
            self._spots[place].peer = peer
            self._end_dial(self._spots[place])
        entry = self._entries.get(peer)
        if entry is None or entry.connection is None:
            return True
        self._end_dial(entry)
        return entry.connection[1] == IN and self.own_peer < peer

    def connected(self, peer: str, node: Node, direction: str, now: float, place: Place | None = None) -> list[Action]:
        """An authenticated connection stands, and Hello came.

        Args:    direction: OUT when we began it.  place: the one that we dialled.
        """
        self._now = max(self._now, now)
        if place in self._spots:
            self._spots[place].peer = peer
            self._end_dial(self._spots[place])
        if peer == self.own_peer:
            return [*self._own(node, place), *self._go_on()]
        entry = self._entry(peer, proven=True)
        if direction == OUT:
            self._end_dial(entry)
        if entry.connection is not None and entry.connection[0] != node.incarnation:
            first = entry.others.get(node.incarnation, (self._now, 0.0))[0]
            entry.others[node.incarnation] = (first, self._now)
            close = Close(peer, "this", "another incarnation of this node is connected")
            return [close, *self._clones(peer, entry), *self._go_on()]
        actions: list[Action] = []
        if entry.connection is not None:
            if direction == OUT and (entry.connection[1] == OUT or self.own_peer > peer) or (
                    direction == IN and entry.connection[1] == OUT and self.own_peer < peer):
                return [Close(peer, "this", "there is one already"), *self._go_on()]
            actions.append(Close(peer, "other", "a new one replaces it"))
        if not entry.is_told:
            entry.is_told = True
            actions.append(Discovered(peer, self._places(entry) or _places(node), node.name))
        if entry.connection is None:
            actions.append(Connected(node))
        entry.others.pop(node.incarnation, None)
        entry.node, entry.connection, entry.gone = node, (node.incarnation, direction), math.inf
        entry.name, entry.incarnation, entry.num_failed = node.name, node.incarnation, 0
        return actions + self._go_on()

    def disconnected(self, peer: str, now: float, *, left: bool = False) -> list[Action]:
        """The connection in use is over; not for one that Close ended.

        Args:    left: it said goodbye: it is not dialled before it is sighted again.
        """
        self._now = max(self._now, now)
        entry = self._entries.get(peer)
        if entry is None or entry.connection is None:
            return self._go_on()
        entry.connection, entry.gone, entry.num_failed = None, self._now, 0
        entry.due = self._now if self.own_peer < peer or entry.others else self._now + self.settings.yield_s
        entry.others.clear()
        if left:
            entry.node = None
            entry.sighted.clear()
        return self._go_on()

    def failed(self, dial: Dial, reason: str, now: float) -> list[Action]:
        """Nobody answered at any of its places, or somebody else, or not as it should; the reason is for the log."""
        self._now = max(self._now, now)
        callers = [self._entries.get(dial.peer)] if dial.peer else [self._spots.get(place) for place in dial.places]
        for caller in callers:
            if caller is not None:
                self._fail(caller)
        return self._go_on()

    def tick(self, now: float) -> list[Action]:
        """The time has come, or passed."""
        self._now = max(self._now, now)
        return self._go_on()

    # ---- going on ----------------------------------------------------------------------------------------------------

    def _go_on(self) -> list[Action]:
        """Forget whom nobody knows any more, and dial whoever is due; those first that we have met."""
        now, actions = self._now, [Expired(peer) for peer in self._evicted]
        self._evicted.clear()
        for peer, entry in list(self._entries.items()):
            if entry.others:
                actions += self._clones(peer, entry)
            if entry.connection is None and not entry.sighted:
                if entry.is_told:
                    entry.is_told = False
                    actions.append(Expired(peer))
                if entry.node is None or now >= entry.gone + self.settings.remember_s:
                    del self._entries[peer]
        away = [(peer, entry) for peer, entry in self._entries.items() if entry.connection is None]
        callers = [(entry, peer, self._places(entry)) for peer, entry in away]
        callers += [(spot, "", (place,)) for place, spot in self._spots.items() if self._is_open(spot)]
        callers = [caller for caller in callers if caller[2]]
        num_dials = 0
        for caller, _, _ in callers:
            if -math.inf < caller.until <= now:
                self._fail(caller)                      # it was never heard of again
            num_dials += caller.until > now
        for caller, peer, places in sorted(callers, key=lambda each: getattr(each[0], "node", None) is None):
            if caller.until <= now and caller.due <= now and num_dials < MOST_DIALS:
                caller.until, caller.tried = now + self.settings.dial_s, now
                num_dials += 1
                actions.append(Dial(peer, places))
        # Those for whom there is no room now get it when a dial ends, and that is told to us.
        times = [max(caller.until, caller.due) for caller, _, _ in callers if max(caller.until, caller.due) > now]
        times += [entry.gone + self.settings.remember_s for _, entry in away if not entry.sighted]
        times += [first + self.settings.clone_after_s for entry in self._entries.values() for first, _ in entry.others.values()
                  if entry.connection is not None and first + self.settings.clone_after_s > now]
        first = min(times, default=math.inf)
        self.deadline = None if first == math.inf else first
        return actions

    def _is_open(self, spot: _Spot) -> bool:
        """Whether an address may lead to somebody who is not connected."""
        entry = self._entries.get(spot.peer)
        return spot.peer != self.own_peer and (entry is None or entry.connection is None)

    def _own(self, node: Node, place: Place | None) -> list[Action]:
        """Who answered has our own identity: it is ourselves, or has our key."""
        close = Close(self.own_peer, "this", "it is our own identity")
        if node.incarnation in (self.own_incarnation, *self._elsewhere):
            return [close]
        self._elsewhere.add(node.incarnation)
        places = ((place,) if place else ()) + _places(node)
        return [close, OwnIdentityElsewhere(node.incarnation, tuple(dict.fromkeys(places)))]

    def _clones(self, peer: str, entry: _Entry) -> list[Action]:
        """Incarnations that still come, though the connected one has had the time to be found dead."""
        settings, now = self.settings, self._now
        for incarnation, (_, last) in list(entry.others.items()):
            if now >= last + settings.clone_after_s + settings.backoff_most_s:
                del entry.others[incarnation]
        living = sorted(incarnation for incarnation, (first, last) in entry.others.items()
                        if last >= first + settings.clone_after_s)
        if entry.connection is None or len(living) <= entry.num_clones:
            return []
        entry.num_clones = len(living)
        return [Duplicate(peer, (entry.connection[0], *living), self._places(entry))]

    def _entry(self, peer: str, proven: bool = False) -> _Entry | None:
        """The entry of a node, as the last heard of; None when there is no room for another unproven one."""
        if peer not in self._entries:
            if len(self._entries) >= MOST_NODES:
                unproven = next((other for other, entry in self._entries.items()
                                 if entry.node is None and entry.until <= self._now), None)
                away = next((other for other, entry in self._entries.items() if entry.connection is None), None)
                evicted = unproven or (away if proven else None)
                if evicted is None and not proven:
                    return None
                if evicted is not None and self._entries.pop(evicted).is_told:
                    self._evicted.append(evicted)
            self._entries[peer] = _Entry()
        self._entries.move_to_end(peer)
        return self._entries[peer]

    def _spot(self, place: Place) -> None:
        spot = self._spots.setdefault(place, _Spot())
        self._spots.move_to_end(place)
        if self._is_open(spot) or spot.peer == self.own_peer:
            spot.peer = ""
            self._encourage(spot, 0.0)
        if len(self._spots) > MOST_NODES:
            del self._spots[next(other for other, spot in self._spots.items() if spot.until <= self._now)]

    def _encourage(self, caller: _Caller, wait_s: float) -> None:
        """News: dial soon, but not more often than the shortest backoff."""
        if caller.until <= self._now:
            caller.num_failed = 0
            soon = max(self._now + wait_s, caller.tried + self.settings.backoff_s)
            caller.due = soon if caller.due == -math.inf else min(max(caller.due, self._now), soon)
            self.deadline = caller.due if self.deadline is None else min(self.deadline, caller.due)

    def _fail(self, caller: _Caller) -> None:
        self._end_dial(caller)
        wait_s = min(self.settings.backoff_s * 2 ** min(caller.num_failed, 16), self.settings.backoff_most_s)
        caller.due = self._now + wait_s * (1 + self._jitter()) / 2
        caller.num_failed += 1

    def _end_dial(self, caller: _Caller) -> None:
        caller.until = -math.inf

    def _places(self, entry: _Entry) -> tuple[Place, ...]:
        """Where to try, what it said itself first."""
        own = _places(entry.node) if entry.node is not None else ()
        return tuple(dict.fromkeys((*own, *(place for places in entry.sighted.values() for place in places))))


def _places(node: Node) -> tuple[Place, ...]:
    return tuple((host, node.port) for host in node.addresses)
