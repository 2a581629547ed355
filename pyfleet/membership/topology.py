"""What the nodes can do, what was measured between them, and what follows: the ring, shares, best addresses.

Pure: facts in, decisions out. Equal facts give equal decisions, in whatever order they came.
"""
from __future__ import annotations

import math
import random
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Annotated, Any

import msgspec
from fleetcore.group import LIKE_SPEED, OVERHEAD_S

from fleetcore.schedules.base import shares_for
from fleetcore.schedules.model import Links
from pyfleet.interfaces import MEDIA, UNKNOWN, VIRTUAL, WIFI, Interface, way_to
from pyfleet.members import Node, Seat
from pyfleet.profile import weight

SEGMENT_BYTES = 2 << 20         # what an edge is rated by: a segment of a 25 MB bucket in a ring of a dozen nodes
MOST_EXACT = 11                 # up to here every ring is looked at, in 50 ms; each further node makes it 3 times that
KICKS = 300                     # over the number of nodes: starts of the search for a ring of more; 64 nodes take 1 s
MOST_ADDRESSES = 32             # of one peer
FASTEST = 1e12                  # bytes/s; what claims to be faster is nonsense
SLOWEST_S = 1e6                 # what an edge counts that leads nowhere

Rate = Annotated[float, msgspec.Meta(ge=0, le=FASTEST)]
Medium = Annotated[str, msgspec.Meta(pattern=rf"\A({'|'.join(MEDIA)})\Z")]


class Edge(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What lies between two nodes, as one of them sees it.

    Attributes:
        latency_s:      from a send to its arrival, for the first byte: half of the median round trip.
        sent_bytes_s, received_bytes_s: what TCP carries to the peer and from it, one way at a time; 0: nothing.
        medium, peer_medium: of the interface at the own and at the other end, one of interfaces.MEDIA.
        address:        the peer's that was used, "" for the own.
        measured_at:    seconds since 1970, by the clock of whoever measured.
    """

    latency_s: Annotated[float, msgspec.Meta(ge=0, le=SLOWEST_S)]
    sent_bytes_s: Rate
    received_bytes_s: Rate
    medium: Medium = UNKNOWN
    peer_medium: Medium = UNKNOWN
    address: Annotated[str, msgspec.Meta(max_length=64)] = ""
    measured_at: float = 0.0

    def facts(self) -> dict[str, Any]:
        """As plain values, for messages.Report."""
        return msgspec.to_builtins(self)

    @classmethod
    def from_facts(cls, facts: Any) -> Edge:
        """The edge behind plain values. Raises: ValueError for what is none."""
        try:
            edge = msgspec.convert(facts, cls)
        except msgspec.ValidationError as error:
            raise ValueError(f"not an edge: {error}") from None
        if not all(map(math.isfinite, (edge.latency_s, edge.sent_bytes_s, edge.received_bytes_s, edge.measured_at))):
            raise ValueError("not an edge: its figures are not finite")
        return edge

    def turned(self) -> Edge:
        """The same as the peer sees it."""
        return Edge(latency_s=self.latency_s, sent_bytes_s=self.received_bytes_s, received_bytes_s=self.sent_bytes_s,
                    medium=self.peer_medium, peer_medium=self.medium, measured_at=self.measured_at)

    @property
    def bytes_s(self) -> float:
        """Of the slower way."""
        return min(self.sent_bytes_s, self.received_bytes_s)

    @property
    def seconds(self) -> float:
        """How long SEGMENT_BYTES take, the slower way."""
        return min(SLOWEST_S, self.latency_s + SEGMENT_BYTES / self.bytes_s) if self.bytes_s else SLOWEST_S

    @property
    def on_air(self) -> bool:
        """Whether both ends are on WiFi: everything crosses the air twice then, and in everybody's way."""
        return self.medium == self.peer_medium == WIFI


class Topology:
    """The graph of nodes and measured edges."""

    def __init__(self):
        self.nodes: dict[str, Node] = {}
        self._edges: dict[tuple[str, str], Edge] = {}       # (a, b) with a < b, as a sees it

    def join(self, node: Node) -> None:
        """Take in a node, or what it says of itself by now; another incarnation has to be measured anew."""
        known = self.nodes.get(node.peer)
        if known is not None and known.incarnation != node.incarnation:
            self.leave(node.peer)
        self.nodes[node.peer] = node

    def leave(self, peer: str) -> None:
        """Forget a node and its edges; an unknown one is no error."""
        self.nodes.pop(peer, None)
        self._edges = {pair: edge for pair, edge in self._edges.items() if peer not in pair}

    def report(self, peer: str, edges: Mapping[str, Any]) -> None:
        """Take what a node has measured: {peer: Edge, or its facts}. The last report of an edge counts.

        Edges to nodes that are not known are left out, so that a liar can not fill the memory.

        Raises:  ValueError when one of them is none; then nothing was taken.
        """
        found = {other: edge if isinstance(edge, Edge) else Edge.from_facts(edge) for other, edge in edges.items()}
        for other, edge in found.items():
            if peer in self.nodes and other in self.nodes and other != peer:
                self._edges[min(peer, other), max(peer, other)] = edge if peer < other else edge.turned()

    def edge(self, a: str, b: str) -> Edge | None:
        """What lies between two nodes as `a` sees it; None when it was not measured."""
        found = self._edges.get((min(a, b), max(a, b)))
        return found if found is None or a < b else found.turned()

    def to_measure(self, peers: Iterable[str]) -> list[list[tuple[str, str]]]:
        """The rounds in which to probe what is not measured between these nodes; see rounds()."""
        return rounds(peers, self._edges)

    def ring(self, peers: Iterable[str], leader: str) -> tuple[str, ...]:
        """The order of these nodes in a ring, the leader first: no two on WiFi side by side where that can be helped;
        of those orders one whose slowest edge is the fastest, and of those the one with the least sum.

        Exact up to MOST_EXACT nodes, found by improvement beyond. Edges that are like each other count as equal, for no
        two measurements agree; see alike(). One that was not measured counts as the slowest that was. Of rings that are
        equal, the one that peer ids say, and of its two ways around the one with the lesser second peer id.

        Raises:  ValueError when the leader is not one of them.
        """
        everyone = set(peers)
        if leader not in everyone:
            raise ValueError(f"the leader {leader!r} is not one of the nodes")
        order = [leader, *sorted(everyone - {leader})]
        if len(order) <= 3:
            return tuple(order)
        web = self._web(order)
        path = _exact(web) if len(order) <= MOST_EXACT else _improved(web)
        at = path.index(0)
        path = path[at:] + path[:at]
        if path[1] > path[-1]:
            path[1:] = path[:0:-1]
        return tuple(order[place] for place in path)

    def bandwidths(self, peers: Sequence[str]) -> tuple[float, ...] | None:
        """Bytes/s each way of each of these nodes: the slower way to its best partner among them; None when nothing was
        measured. Who was not measured counts as the best; so does who is within LIKE_SPEED of it, as in Group."""
        speeds = [max((edge.bytes_s for other in peers if (edge := self.edge(peer, other))), default=0.0)
                  for peer in peers]
        top = max(speeds, default=0.0)
        return tuple(top if not speed or speed >= LIKE_SPEED * top else speed for speed in speeds) if top else None

    def shares(self, peers: Sequence[str]) -> list[float]:
        """Which part of an array each of these nodes should reduce, as shares_for; equal ones without measurements."""
        return shares_for(self.bandwidths(peers) or (1.0,) * len(peers))

    def links(self, seats: Sequence[Seat]) -> Links | None:
        """The links of the ranks of these seats, as Group would measure them; None when nothing was measured.

        Ranks of one node share its bandwidth. The latency is the longest between two of the nodes.
        """
        peers = [seat.peer for seat in seats]
        speeds = self.bandwidths(peers)
        if speeds is None:
            return None
        edges = [edge for a, b in combinations(peers, 2) if (edge := self.edge(a, b)) and edge.bytes_s]
        ranks = [speed / seat.slots for speed, seat in zip(speeds, seats, strict=True) for _ in range(seat.slots)]
        return Links(max(edge.latency_s for edge in edges), tuple(ranks), OVERHEAD_S)

    def weights(self, peers: Sequence[str]) -> tuple[float, ...]:
        """How much of a batch each of these nodes should begin with; they add up to 1."""
        found = [weight(self.nodes[peer].profile) if peer in self.nodes else 1.0 for peer in peers]
        return tuple(each / math.fsum(found) for each in found)

    def as_json(self, ring: Sequence[str] = ()) -> dict[str, Any]:
        """For people and programs: nodes with their profiles, edges in both directions, and the ring they form now."""
        return {
            "nodes": {peer: {"name": node.name, "slots": node.slots, "addresses": list(node.addresses),
                             "profile": node.profile} for peer, node in sorted(self.nodes.items())},
            "links": [{"from": a, "to": b, "latency_ms": round(edge.latency_s * 1e3, 4),
                       "mbit_s": round(edge.sent_bytes_s * 8e-6, 3), "medium": edge.medium,
                       "peer_medium": edge.peer_medium, "address": edge.address, "measured_at": edge.measured_at}
                      for pair, own in sorted(self._edges.items())
                      for (a, b), edge in ((pair, own), (pair[::-1], own.turned()))],
            "ring": list(ring),
        }

    def _web(self, order):
        """{(i, j): (whether both are on WiFi, nanoseconds)} of places in `order`, for both directions."""
        air = {peer for peer in order
               if (own := [edge.medium for other in order if (edge := self.edge(peer, other))]) and set(own) == {WIFI}}
        edges = {(i, j): self.edge(order[i], order[j]) for i, j in combinations(range(len(order)), 2)}
        # Whole nanoseconds: sums of equal edges are equal then, in whatever order they are added up.
        known = alike(edge.seconds for edge in edges.values() if edge)
        equal = {each: round(least * 1e9) for each, least in known.items()}
        slowest = max(equal.values(), default=0)
        web = {}
        for (i, j), edge in edges.items():
            rated = (edge.on_air, equal[edge.seconds]) if edge else ({order[i], order[j]} <= air, slowest)
            web[i, j] = web[j, i] = rated
        return web


def alike(seconds: Iterable[float]) -> dict[float, float]:
    """{time: the least time that it is like}: those within LIKE_SPEED of the least of them are alike."""
    found, least = {}, None
    for each in sorted(seconds):
        least = each if least is None or least < LIKE_SPEED * each else least
        found[each] = least
    return found


def rounds(peers: Iterable[str], done: Collection[tuple[str, str]] = ()) -> list[list[tuple[str, str]]]:
    """Pair everyone with everyone, in as few rounds as can be, nobody twice in one: probes do not disturb each other.

    Args:    done: pairs, in either order, that are left out.
    Returns: rounds of pairs (initiator, responder); empty rounds are left out.
    Source:  the circle method of round-robin tournaments: one stands still, the others move on by one place a round.
    """
    seats = sorted(set(peers))
    known = {frozenset(pair) for pair in done}
    if len(seats) % 2:
        seats.append("")                # who meets it has a rest
    found = []
    for _ in range(len(seats) - 1):
        pairs = zip(seats[:len(seats) // 2], reversed(seats), strict=False)
        found.append([(min(pair), max(pair)) for pair in pairs if "" not in pair and frozenset(pair) not in known])
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return [each for each in found if each]


# ---- the ring --------------------------------------------------------------------------------------------------------

def _exact(web):
    """The best cycle over the places of a web: least pairs on air, then the least slowest edge, then the least sum."""
    costs = sorted({time for _, time in web.values()})
    best = _least(web, costs[-1])
    low, high = 0, len(costs) - 1
    while low < high:                   # the lowest limit under which as few pairs are on air as without one
        middle = (low + high) // 2
        found = _least(web, costs[middle])
        if found is not None and found[0] == best[0]:
            high = middle
        else:
            low = middle + 1
    return _least(web, costs[low])[2]


def _least(web, limit):
    """(pairs on air, sum of times, cycle from place 0) of the least cycle without an edge over the limit, or None.

    Source:  Held and Karp 1962: the least path from 0 through a set of places to one of them, set by set.
    """
    size = 1 + max(i for i, _ in web)
    rest = range(1, size)
    paths = {(1 << i, i): (*web[0, i], 0) for i in rest if web[0, i][1] <= limit}
    for visited in range(1, 1 << size):
        if visited & 1:
            continue
        for last in rest:
            path = paths.get((visited, last))
            if path is None:
                continue
            for place in rest:
                air, time = web[last, place] if place != last else (0, 0)
                if visited >> place & 1 or time > limit:
                    continue
                longer = path[0] + air, path[1] + time, last
                if longer < paths.get((visited | 1 << place, place), (size + 1,)):
                    paths[visited | 1 << place, place] = longer
    everyone = (1 << size) - 2
    ends = [(path[0] + web[last, 0][0], path[1] + web[last, 0][1], last)
            for last in rest if (path := paths.get((everyone, last))) and web[last, 0][1] <= limit]
    if not ends:
        return None
    air, time, last = min(ends)
    cycle, visited = [], everyone
    while visited:
        cycle.append(last)
        visited, last = visited & ~(1 << last), paths[visited, last][2]
    return int(air), time, [0, *reversed(cycle)]


def _improved(web):
    """A good cycle: the best edges that fit together, then exchanges of edges as long as one helps, then the same again
    from cycles a little beside the best one, as other starts find other ends."""
    size = 1 + max(i for i, _ in web)

    def rating(pairs):
        edges = [web[pair] for pair in pairs]
        return sum(air for air, _ in edges), sorted((time for _, time in edges), reverse=True)

    def better(old, new):
        # Edges that stay cancel out of the comparison of what is sorted, so an exchange that makes its own edges better
        # makes the whole ring better: less on air, then a faster slowest edge, then a faster second slowest.
        return rating(new) < rating(old)

    best, chance = _greedy(web, size), random.Random(size)      # of a fixed seed: the same everywhere
    _exchange(best, better)
    for _ in range(KICKS // size):
        a, b, c = sorted(chance.sample(range(1, size), 3))
        other = best[:a] + best[b:c] + best[a:b] + best[c:]
        _exchange(other, better)
        if better(_pairs(best), _pairs(other)):
            best = other
    slowest = max(web[pair][1] for pair in _pairs(best))

    def shorter(old, new):
        (air_old, times_old), (air_new, times_new) = rating(old), rating(new)
        return times_new[0] <= slowest and (air_new, sum(times_new)) < (air_old, sum(times_old))
    _exchange(best, shorter)
    return best


def _pairs(cycle):
    return list(zip(cycle, cycle[1:] + cycle[:1], strict=True))


def _greedy(web, size):
    """A cycle of the best edges: each joins two ends of paths, until one path is left."""
    ends, path_of = [0] * size, {i: [i] for i in range(size)}
    for _, (i, j) in sorted((edge, pair) for pair, edge in web.items() if pair[0] < pair[1]):
        if ends[i] == 2 or ends[j] == 2 or path_of[i] is path_of[j]:
            continue
        ends[i], ends[j] = ends[i] + 1, ends[j] + 1
        front, back = path_of[i], path_of[j]
        front = front if front[-1] == i else front[::-1]
        joined = front + (back if back[0] == j else back[::-1])
        path_of.update((place, joined) for place in joined)
    return list(path_of[0])


def _exchange(cycle, better):
    """Improve a cycle in place: turn a stretch around, or move up to 3 places elsewhere, while better(old, new)."""
    size, improved = len(cycle), True
    while improved:
        improved = False
        for i, j in combinations(range(size), 2):
            a, b, c, d = cycle[i - 1], cycle[i], cycle[j], cycle[(j + 1) % size]
            if a != c and b != d and better([(a, b), (c, d)], [(a, c), (b, d)]):
                cycle[i:j + 1] = cycle[i:j + 1][::-1]
                improved = True
        for length, i in ((length, i) for length in (1, 2, 3) for i in range(size)):
            turned = cycle[i:] + cycle[:i]
            part, rest = turned[:length], turned[length:]
            a, b, x, y = rest[-1], rest[0], part[0], part[-1]
            for k in range(len(rest) - 1):
                c, d = rest[k], rest[k + 1]
                if better([(a, x), (y, b), (c, d)], [(a, b), (c, y), (x, d)]):
                    cycle[:] = rest[:k + 1] + part[::-1] + rest[k + 1:]
                    improved = True
                    break


# ---- several addresses of one peer -----------------------------------------------------------------------------------

@dataclass
class Path:
    """What is known of one address of a peer.

    Attributes:
        medium:     of the interface here that leads there, or of the other end where that is known to be a worse one.
        near:       whether it lies in a network of this machine, so that no router is in between.
        own:        whether this machine has the same address, as every one has that of its bridge for containers.
        edge:       as measured over it; None: not yet.
        failures:   attempts in a row that came to nothing.
    """

    address: str
    medium: str = UNKNOWN
    near: bool = False
    own: bool = False
    edge: Edge | None = None
    failures: int = 0


class Paths:
    """The addresses of one peer, in the order in which to try them."""

    def __init__(self, addresses: Iterable[str] = (), there: Sequence[Interface] = ()):
        self._paths: dict[str, Path] = {}
        self.learn(addresses, there)

    def learn(self, addresses: Iterable[str], there: Sequence[Interface]) -> None:
        """Take the addresses that the peer has now, the most MOST_ADDRESSES first ones, and the interfaces that this
        machine has; what was measured of addresses that stay, stays."""
        known, own = self._paths, {address for each in there for address in each.addresses}
        self._paths = {}
        for address in list(dict.fromkeys(addresses))[:MOST_ADDRESSES]:
            path, way = known.get(address) or Path(address), way_to(address, there)
            path.near, path.own = way is not None, address in own
            path.medium = way.medium if way is not None else UNKNOWN
            self._paths[address] = path

    def measured(self, edge: Edge) -> None:
        """An edge was measured over its address: that works, then."""
        if path := self._paths.get(edge.address):
            path.edge, path.failures = edge, 0

    def worked(self, address: str) -> None:
        """A connection was made."""
        if path := self._paths.get(address):
            path.failures = 0

    def failed(self, address: str) -> None:
        """No connection could be made, or the one there was broke."""
        if path := self._paths.get(address):
            path.failures += 1

    def order(self) -> list[str]:
        """All addresses, the best first."""
        return [path.address for path in ordered(list(self._paths.values()))]


def ordered(paths: Sequence[Path]) -> list[Path]:
    """Paths in the order in which to try them, a pure function.

    The fewest failures in a row come first. Among those: the fastest as measured (within LIKE_SPEED of each other: the
    better medium, then the shorter latency); then those not measured, near ones first, by medium: cable, WiFi, unknown.
    But one that is near and on a better medium than any that was measured comes before: a cable that was just plugged
    in. Addresses that this machine has itself come last. What is still equal stays in the order it came.
    """
    def medium(path):
        theirs = path.edge.peer_medium if path.edge and path.edge.peer_medium != UNKNOWN else path.medium
        return max(MEDIA.index(path.medium), MEDIA.index(theirs))
    measured = sorted((path for path in paths if path.edge), key=lambda path: -path.edge.bytes_s)
    classes, top = {}, None
    for path in measured:
        top = path.edge.bytes_s if top is None or path.edge.bytes_s < LIKE_SPEED * top else top
        classes[path.address] = top
    best = min(map(medium, measured), default=-1)

    def key(path):
        if path.edge:
            return path.own, path.failures, 1, -classes[path.address], medium(path), path.edge.latency_s
        promising = path.near and medium(path) < min(best, MEDIA.index(VIRTUAL))
        return path.own, path.failures, 0 if promising else 2, not path.near, medium(path), 0.0
    return sorted(paths, key=key)
