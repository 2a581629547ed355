"""Who is in, and who leads: founding, joining, leaving, merging, and the agreement on each next view.

Sans-I/O. Events and the time come in; a list of actions goes out: Send(peer, message), Installed(view), Lost(view,
reason). The shell keeps the order of the messages of a pair, and calls

    up(peer, node, now)         once an authenticated connection stands, before anything is received from it
    received(peer, m, now)      for every message that is not a heartbeat; heard(peer, now) for those
    down(peer, inc, dead, now)  when the last connection to it is over; nothing is received from it until the next up
    tick(now)                   at `deadline`

Fleets. Nodes without a fleet found one; a node that sees a fleet at work joins it through its leader. Of two fleets
that see each other, the lesser gives up: members that see the greater one drop their view and join it. A member
whose view can decide nothing (cut off) shows size 0: it neither attracts anybody nor, when the others have more to
lose, gives up.

Views. The members of a view agree on the next one by Paxos (ballots.py). The most senior member that is up proposes,
the leader without asking first; a voter promises nothing to a junior while it hears a senior one, so that the fleet
does not change hands over one bad link. Cut-off members keep their view; whoever is ahead tells them what was
decided.

A fleet whose other members have all come back as new incarnations, or are dead, can never decide again, for the new
ones must not vote for their predecessors. The survivors drop it, and found anew at their step.
"""
from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from pyfleet.members import Node, Seat, View
from pyfleet.membership import messages
from pyfleet.membership.ballots import Ballots, Send, is_quorum

MOST_LEFT = 256         # fleets remembered whose views must not be taken up again


class Installed(NamedTuple):
    """This view holds from now on."""

    view: View


class Lost(NamedTuple):
    """The view holds no more, and there is none; the reason is for people. `step` > 0: training was going on in it."""

    view: View
    reason: str
    step: int = 0


Action = Send | Installed | Lost


@dataclass(frozen=True)
class ElectionSettings:
    """All in seconds.

    Attributes:
        settle_s, settle_most_s: a founder waits until the nodes in sight have not changed for settle_s, but not longer
                    than settle_most_s once they are enough.
        found_s:    for the answers to a founder;  consent_s: for its decision.
        retry_s:    between requests to join and other repetitions.
        batch_s:    changes that come within it go into one view.
        ballot_s:   for the answers to a proposer, doubled with every failure, as nobody knows how slow the network is;
        backoff_s:  before its next ballot, times its place, and doubled likewise.
        lease_s:    whoever has not heard a quorum for so long no longer leads. Less than the silence after which the
                    others count a peer as down (HealthSettings.dead_after_s), so that there is no second leader before.
        lost_s:     how long a fleet must be beyond help before it is dropped.
    """

    settle_s: float = 0.7
    settle_most_s: float = 2.5
    found_s: float = 1.0
    consent_s: float = 2.0
    retry_s: float = 0.5
    batch_s: float = 0.1
    ballot_s: float = 0.5
    backoff_s: float = 0.1
    lease_s: float = 2.5
    lost_s: float = 1.0


@dataclass
class _Founding:
    """A fleet that this node would found."""

    view: View
    until: float
    yes: set[str] = field(default_factory=set)


@dataclass
class _Request:
    """A node that asks for a seat."""

    seat: Seat
    last: float
    count: int = 1


def by_seniority(seats: list[Seat]) -> list[Seat]:
    """The default order of a ring."""
    return sorted(seats, key=lambda seat: seat.seniority)


def _rank(status: messages.Status) -> tuple:
    """Of two fleets, that with the greater rank stays."""
    return status.step, status.size, tuple(-ord(letter) for letter in status.fleet)


class Election:
    """What one node knows and does about who is in.

    Args:    own: the node's own card.
             min_nodes: no fleet is founded with fewer.
             order: puts the seats of a proposed view in the order of the ring; gives back the same seats.

    Attributes:
        view:     the view that holds here, or None.
        step:     the last optimiser step committed here.
        deadline: when tick is wanted next; None: never.
        num_views: installed so far.
    """

    def __init__(self, own: Node, min_nodes: int = 1, order: Callable[[list[Seat]], list[Seat]] = by_seniority,
                 settings: ElectionSettings = ElectionSettings()):
        self.own, self.min_nodes, self.settings = own, min_nodes, settings
        self.view: View | None = None
        self.step = 0
        self.deadline: float | None = 0.0
        self.num_views = 0
        self._order = order
        self._now = -math.inf
        self._gone = False
        self._up: dict[str, Node] = {}
        self._heard: dict[str, float] = {}
        self._statuses: dict[str, messages.Status] = {}
        self._dead: set[tuple[str, str]] = set()                # (peer, incarnation) of members, proven dead
        self._votes: dict[str, messages.Promise] = {}           # of epochs after the next one, until that is the next
        self._left: OrderedDict[str, int] = OrderedDict()       # fleet -> epoch up to which its views are over here
        self._told: messages.Status | None = None
        # without a fleet
        self._num_founded = 0
        self._founding: _Founding | None = None
        self._consent: tuple[str, str, float] | None = None     # founder, fleet, until
        self._free: frozenset[str] = frozenset()
        self._free_since = self._enough_since = self._ready_since = math.inf
        self._next_join = -math.inf
        # in a fleet
        self._ballots: Ballots | None = None
        self._joins: dict[str, _Request] = {}
        self._resigned: set[str] = set()                        # members that are connected and have dropped the view
        self._wants_change = False
        self._wanted_since = self._attempt_until = self._lost_since = self._next_retry = math.inf
        self._not_before = -math.inf
        self._num_failed = 0

    # ---- what is told ------------------------------------------------------------------------------------------------

    @property
    def has_quorum(self) -> bool:
        """Whether this node is in a view, and heard a quorum of it within the lease, as of the last event.

        Only those count that have said, since they are connected, that they are in this fleet and not ahead.
        """
        if self.view is None or not self._can_decide():
            return False
        fresh = {peer for peer in self._present() if peer not in self._up or (
            self._now < self._heard[peer] + self.settings.lease_s
            and peer in self._statuses and self._statuses[peer].fleet == self.view.fleet)}
        return is_quorum(self.view, fresh, self._dead_peers())

    @property
    def leading(self) -> bool:
        """Whether this node leads its view, as far as it can know."""
        return self.view is not None and self.view.leader == self.own.peer and self.has_quorum

    @property
    def state(self) -> str:
        """In words, for people."""
        if self._gone:
            return "left"
        if self.view is not None:
            if self._can_decide():
                return "leading" if self.leading else "member"
            found = len(self._present())
            return f"waiting for a majority of epoch {self.view.epoch}: found {found} of {len(self.view.seats)}"
        if target := self._target():
            return f"joining fleet {target[0]}"
        if self._founding is not None or self._consent is not None:
            return "founding"
        if (found := max(len(self._free), 1)) < self._needed():
            return f"waiting for nodes: found {found} of {self._needed()}"
        return "gathering" if len(self._free) > 1 else "alone"

    # ---- what happens ------------------------------------------------------------------------------------------------

    def up(self, peer: str, node: Node, now: float) -> list[Action]:
        """An authenticated connection to this peer stands and is healthy."""
        actions = self.down(peer, self._up[peer].incarnation, False, now) if peer in self._up else []
        self._up[peer], self._heard[peer] = node, now
        self._dead.discard((peer, node.incarnation))            # what was taken for its end was none
        if self._told is not None:                              # else it is told with all others, now
            actions.append(Send(peer, self._told))
        if self._ballots is not None and self._ballots.accepted is not None and self.view.seat(peer):
            actions.append(Send(peer, self._ballots.history()))
        return actions + self._advance(now)

    def down(self, peer: str, incarnation: str, dead: bool, now: float) -> list[Action]:
        """The last connection to this peer is over.

        Args:    dead: proof that this incarnation will never speak again: the peer's kernel ended (FIN or reset) a
                 connection on which the peer had shown by an answer, less than dead_after_s ago, that it still heard us
                 (Health.is_current). A peer that lives ends a connection only after a silence of dead_after_s, and then
                 this does not hold. False for anything else: silence, unreachable, closed by ourselves.
        """
        node = self._up.get(peer)
        if node is None or node.incarnation != incarnation:
            return self._advance(now)
        fresh = now - self._heard[peer] <= self.settings.lease_s
        ahead = self.view is not None and self._is_ahead(self._statuses.get(peer))
        if dead and fresh and not ahead:                        # one that is ahead had a part in what we do not know
            self._dead.add((peer, incarnation))
        for known in (self._up, self._heard, self._statuses, self._joins):
            known.pop(peer, None)
        self._resigned.discard(peer)
        return self._count() + self._advance(now)

    def heard(self, peer: str, now: float) -> list[Action]:
        """A heartbeat of this peer has come."""
        if peer in self._up:
            self._heard[peer] = now
        self._now = max(self._now, now)
        return []

    def received(self, peer: str, message: messages.Message, now: float) -> list[Action]:
        """A message of this peer; those that are not about views are no news here."""
        if peer not in self._up or self._gone:
            return []
        self._heard[peer] = now
        self._now = max(self._now, now)
        if isinstance(message, messages.Bye):
            return self.down(peer, self._up[peer].incarnation, True, now)
        return self._take(peer, message) + self._advance(now)

    def tick(self, now: float) -> list[Action]:
        """The time has come, or passed."""
        return self._advance(now)

    def want_change(self, now: float) -> list[Action]:
        """The order of the ring should be looked at again; matters where this node proposes."""
        self._wants_change = True
        return self._advance(now)

    def leave(self, now: float, reason: str = "") -> list[Action]:
        """Say goodbye to all; nothing is done or answered after that."""
        self._now, self._gone, self.deadline = max(self._now, now), True, None
        actions: list[Action] = [Send(peer, messages.Bye(reason)) for peer in self._up]
        if self.view is not None:
            actions += self._drop(reason or "this node leaves")
        return actions

    def committed(self, step: int) -> None:
        """The members have committed this optimiser step together."""
        self.step = max(self.step, step)

    # ---- messages ----------------------------------------------------------------------------------------------------

    def _take(self, peer, message):
        match message:
            case messages.Status():
                return self._on_status(peer, message)
            case messages.Found():
                return self._on_found(peer, message)
            case messages.Consent():
                return self._on_consent(peer, message)
            case messages.Join():
                return self._on_join(peer, message)
            case messages.Decided():
                return self._on_decided(peer, message)
            case messages.Accept():
                return self._on_ballot(peer, message, message.view.fleet, message.view.epoch)
            case messages.Prepare() | messages.Promise() | messages.Accepted() | messages.Refused():
                return self._on_ballot(peer, message, message.fleet, message.epoch)
        return []

    def _on_status(self, peer, message):
        before, self._statuses[peer] = self._statuses.get(peer), message
        if self.view is None:
            return []
        if message.fleet == self.view.fleet:
            self._resigned.discard(peer)
        elif before is not None and before.fleet == self.view.fleet:
            self._resigned.add(peer)                    # it has dropped the view, and does not take it up again
        behind = message.fleet == self.view.fleet and message.epoch < self.view.epoch
        # A founder's or proposer's decision that was lost with a connection: a member without a fleet gets it again.
        unseated = not message.fleet and self.view.seat(peer) is not None and self._is_present(peer)
        return [Send(peer, messages.Decided(self.view))] if behind or unseated else []

    def _on_found(self, peer, message):
        view = message.view
        yes = (self.view is None and self._is_in(view) and view.epoch == 1 and not self._target()
               and (self._consent is None or self._consent[0] == peer or self._consent[0] not in self._up)
               and (self._founding is None or peer < self.own.peer))
        if yes:
            self._founding = None
            self._consent = (peer, view.fleet, self._now + self.settings.consent_s)
        return [Send(peer, messages.Consent(view.fleet, yes))]

    def _on_consent(self, peer, message):
        if self._founding is None or message.fleet != self._founding.view.fleet:
            return []
        if not message.yes:                             # it waits for another founder, or is in a fleet: see what comes
            self._founding = None
            self._free_since = self._enough_since = self._now
            return []
        self._founding.yes.add(peer)
        return []

    def _on_join(self, peer, message):
        if self.view is None or message.fleet != self.view.fleet or message.seat.peer != peer:
            return [Send(peer, self._status())]
        request = self._joins.get(peer)
        count = request.count + 1 if request is not None and request.seat.incarnation == message.seat.incarnation else 1
        self._joins[peer] = _Request(message.seat, self._now, count)
        seat = self.view.seat(peer)
        if seat is not None and seat.incarnation == message.seat.incarnation and count == 1:
            return [Send(peer, messages.Decided(self.view))]     # it may just not know; else it asks again
        return [] if self._proposes() else [Send(peer, self._status())]

    def _on_decided(self, peer, message):
        view = message.view
        told = messages.Status(view.fleet, view.epoch, len(view.seats), view.step, view.leader)
        known = self._statuses.get(peer)
        if known is None or known.fleet != view.fleet or known.epoch < view.epoch:
            self._statuses[peer] = told
        if view.epoch <= self._left.get(view.fleet, 0):         # said as a change, so that it is believed
            mine = self._status()
            was = messages.Status(view.fleet, view.epoch, 0, mine.step, "")
            return [Send(peer, was), Send(peer, mine)] if self.view is None and self._is_in(view) else []
        if self.view is None:
            return self._install(view) if self._is_in(view) else []
        if view.fleet == self.view.fleet:
            if view.epoch <= self.view.epoch:
                return [Send(peer, messages.Decided(self.view))] if view.epoch < self.view.epoch else []
            if self._is_in(view):
                return self._install(view)
            return self._drop(f"epoch {view.epoch} of the fleet was agreed without this node")
        if self._is_in(view) and _rank(told) > _rank(self._status()):
            return [*self._drop(self._greater(told)), *self._install(view)]
        return [Send(peer, self._status())]

    def _on_ballot(self, peer, message, fleet, epoch):
        """Only between members, about the next epoch."""
        asks = isinstance(message, messages.Prepare | messages.Accept)
        if self.view is None or fleet != self.view.fleet:
            return [Send(peer, self._status())] if asks else []
        if epoch <= self.view.epoch:
            return [Send(peer, messages.Decided(self.view))] if asks else []
        if epoch > self.view.epoch + 1:                 # it is ahead; what it voted is not to be forgotten
            if isinstance(message, messages.Promise):
                self._votes[peer] = message
            return [Send(peer, self._status())]
        seat = self.view.seat(peer)
        if seat is None or seat.incarnation != self._up[peer].incarnation:
            return []
        dead = self._dead_peers()
        if isinstance(message, messages.Prepare):
            senior = any(other.seniority < seat.seniority and self._is_present(other.peer)
                         for other in self.view.seats if other.peer != self.own.peer)
            return [self._ballots.refuse(peer)] if senior else self._ballots.prepare(peer, message)
        if isinstance(message, messages.Accept):
            return self._ballots.accept(peer, message)
        if isinstance(message, messages.Refused):
            if self._ballots.refused(peer, message):
                self._failed()
            return []
        if isinstance(message, messages.Promise):
            return self._ballots.promise(peer, message, dead) + self._take_decision()
        return self._ballots.accepted_by(peer, message, dead) + self._take_decision()

    # ---- going on ----------------------------------------------------------------------------------------------------

    def _advance(self, now: float) -> list[Action]:
        """Whatever is due, until nothing is; then where we stand, to all, when it has changed."""
        self._now = max(self._now, now)
        if self._gone:
            return []
        actions: list[Action] = []
        while True:
            before = self.view
            actions += self._go_free() if before is None else self._go_on()
            if self.view is before:
                break
        status = self._status()
        if self._is_news(status):
            self._told = status
            actions += [Send(peer, status) for peer in self._up]
        self.deadline = self._next()
        return actions

    def _is_news(self, status: messages.Status) -> bool:
        """A step alone is news only where it is compared: without a fleet, and for another fleet in sight."""
        told = self._told
        if told is None or status.step == told.step or self.view is None or self._others():
            return status != told
        return (status.fleet, status.epoch, status.size) != (told.fleet, told.epoch, told.size)

    def _next(self) -> float | None:
        """When something is due if nothing happens before."""
        settings, times = self.settings, [math.inf]
        if self.view is None:
            if self._consent is not None:
                times.append(self._consent[2])
            elif self._target():
                times.append(self._next_join)
            elif self._founding is not None:
                times.append(self._founding.until)
            else:
                times.append(self._founds_at())
        else:
            times += [self._lost_since + settings.lost_s, self._next_retry]
            if self._ballots.attempt is not None:
                times.append(self._attempt_until)
            elif self._proposes() and self._can_decide():
                times.append(max(self._wanted_since + self._batch_s(), self._not_before))
            times += [self._heard[peer] + settings.lease_s for peer in self._present() if peer in self._heard
                      and self._now < self._heard[peer] + settings.lease_s]
        first = min(times)
        return None if first == math.inf else first

    # ---- without a fleet ---------------------------------------------------------------------------------------------

    def _go_free(self) -> list[Action]:
        now = self._now
        if self._consent is not None:
            founder, fleet, until = self._consent
            if now < until and founder in self._up and fleet not in self._others():
                return []                               # it may decide any moment
            self._consent = None
            self._free_since = now
        if target := self._target():
            self._founding = None
            if now < self._next_join:
                return []
            self._next_join = now + self.settings.retry_s
            return [Send(target[1], messages.Join(target[0], self._seat(0)))]
        if self._founding is not None:
            return self._go_founding()
        free = frozenset([self.own.peer, *(peer for peer, status in self._statuses.items() if not status.fleet)])
        if free != self._free:
            self._free, self._free_since = free, now
        if len(free) < self._needed():
            self._enough_since = math.inf
        elif self._enough_since == math.inf:
            self._enough_since = now
        return self._found(free) if now >= self._founds_at() else []

    def _founds_at(self) -> float:
        """When this node founds a fleet: the one with the least peer id first, the next ones should it fail to."""
        ready = min(self._free_since + self.settings.settle_s, self._enough_since + self.settings.settle_most_s)
        if self._enough_since == math.inf:
            return math.inf
        return ready + sorted(self._free).index(self.own.peer) * self.settings.consent_s

    def _found(self, peers) -> list[Action]:
        """Ask these nodes to found a fleet."""
        self._num_founded += 1
        drawn = f"{self.own.peer} {self.own.incarnation} {self._num_founded}"      # the incarnation is random
        fleet = hashlib.sha256(b"pyfleet fleet\0" + drawn.encode()).hexdigest()[:16]
        seats = [self._seat(1), *(Seat(peer=peer, incarnation=node.incarnation, joined=1, slots=node.slots)
                                  for peer, node in self._up.items() if peer in peers)]
        step = max([self.step, *(self._statuses[seat.peer].step for seat in seats[1:])])
        view = View(fleet=fleet, epoch=1, seats=self._in_order(seats), step=step)
        self._founding = _Founding(view, self._now + self.settings.found_s, {self.own.peer})
        return [*(Send(seat.peer, messages.Found(view)) for seat in view.seats if seat.peer != self.own.peer),
                *self._go_founding()]

    def _go_founding(self) -> list[Action]:
        """Decide when all have consented; without those who did not in time."""
        founding = self._founding
        awaited = {peer for peer in founding.view.peers if peer not in founding.yes}
        if not awaited:
            others = [peer for peer in founding.view.peers if peer != self.own.peer]
            return [*(Send(peer, messages.Decided(founding.view)) for peer in others), *self._install(founding.view)]
        if self._now < founding.until and awaited & self._up.keys():
            return []
        self._founding = None
        if len(founding.yes) >= self._needed():
            return self._found(founding.yes)
        self._free_since = self._now
        return []

    def _needed(self) -> int:
        """A survivor does not wait for others: what it has learnt is to be saved."""
        return 1 if self.step else self.min_nodes

    def _target(self) -> tuple[str, str] | None:
        """(fleet, member to ask): the greatest fleet at work in sight; none that would lose what we have."""
        fleets = [status for status in self._others().values() if status.step >= self.step
                  or status.epoch > self._left.get(status.fleet, status.epoch)]         # our own fleet went on
        if self.view is not None or not fleets:
            return None
        best = max(fleets, key=_rank)
        members = [peer for peer, status in self._statuses.items() if status.fleet == best.fleet]
        return best.fleet, best.leader if best.leader in members else min(members)

    def _others(self) -> dict[str, messages.Status]:
        """The other fleets in sight that are at work: fleet -> what its latest view is like."""
        found: dict[str, messages.Status] = {}
        own = self.view.fleet if self.view is not None else ""
        for status in self._statuses.values():
            known = found.get(status.fleet)
            if status.size and status.fleet not in ("", own) and (known is None or status.epoch > known.epoch):
                found[status.fleet] = status
        return found

    # ---- in a fleet --------------------------------------------------------------------------------------------------

    def _go_on(self) -> list[Action]:
        now, settings, actions = self._now, self.settings, []
        others = self._others().values()
        greater = max(others, key=_rank, default=None)
        if greater is not None and _rank(greater) > _rank(self._status()):
            return self._drop(self._greater(greater))
        ahead = [peer for peer, status in self._statuses.items() if self._is_ahead(status)]
        if not ahead and not others:
            self._next_retry = math.inf
        elif self._next_retry == math.inf or now >= self._next_retry:
            self._next_retry = now + settings.retry_s
            actions += [Send(peer, self._status()) for peer in ahead]       # answered by what was decided
        if not self._is_beyond_help() or ahead:
            self._lost_since = math.inf
        elif self._lost_since == math.inf:
            self._lost_since = now
        elif now >= self._lost_since + settings.lost_s:
            return actions + self._drop("too many of its members have restarted: it can agree on nothing any more")
        for peer, request in list(self._joins.items()):
            if now >= request.last + 4 * settings.retry_s:
                del self._joins[peer]
        if self._ballots.attempt is not None and now >= self._attempt_until:
            self._ballots.attempt = None
            self._failed()
        return actions + self._go_propose()

    def _go_propose(self) -> list[Action]:
        """Once changes are wanted, and as many as come together are in: a ballot."""
        proposes = self._proposes()
        seats = self._wanted(proposes)
        if seats is None:
            self._wanted_since = math.inf
            return []
        if self._wanted_since == math.inf:
            self._wanted_since = self._now
        if (self._ballots.attempt is not None or not proposes or not self._can_decide()
                or self._now < max(self._wanted_since + self._batch_s(), self._not_before)):
            return []
        self._attempt_until = self._now + self.settings.ballot_s * 2 ** min(self._num_failed, 4)
        view = View(fleet=self.view.fleet, epoch=self.view.epoch + 1, seats=self._in_order(seats),
                    step=max(self.step, self.view.step))
        return [*self._ballots.propose(view, self._dead_peers()), *self._take_decision()]

    def _wanted(self, proposes: bool) -> list[Seat] | None:
        """The seats of the next view as it should be, None when this one is as good."""
        epoch = self.view.epoch + 1
        seats = [seat for seat in self.view.seats if self._is_present(seat.peer)]
        seats += [Seat(peer=peer, incarnation=request.seat.incarnation, joined=epoch, slots=request.seat.slots)
                  for peer, request in sorted(self._joins.items()) if self._is_welcome(peer, request)]
        if len(seats) != len(self.view.seats) or any(seat.joined == epoch for seat in seats):
            return seats
        if self._wants_change and proposes:
            if self._in_order(seats) != self.view.seats:
                return seats
            self._wants_change = False
        return None

    def _is_welcome(self, peer, request) -> bool:
        """Whether who asks for a seat is here to take it, and has none."""
        return self._up[peer].incarnation == request.seat.incarnation and not self._is_present(peer)

    def _batch_s(self) -> float:
        return 0.0 if self.view.leader in self._dead_peers() else self.settings.batch_s

    def _failed(self) -> None:
        """A ballot came to nothing: the next one later, and at another time than those of the others."""
        place = sorted(self.view.peers).index(self.own.peer)
        self._not_before = self._now + self.settings.backoff_s * (1 + place) * 2 ** min(self._num_failed, 3)
        self._num_failed += 1

    def _count(self) -> list[Action]:
        if self._ballots is None:
            return []
        return [*self._ballots.count(self._dead_peers()), *self._take_decision()]

    def _take_decision(self) -> list[Action]:
        view = self._ballots.decided
        if view is None:
            return []
        if self._is_in(view):
            return self._install(view)
        return self._drop(f"epoch {view.epoch} of the fleet was agreed without this node")

    def _install(self, view: View) -> list[Action]:
        self.view, self._ballots = view, Ballots(self.own.peer, view)
        self.num_views += 1
        self._founding = self._consent = None
        self._enough_since, self._free = math.inf, frozenset()
        members = {(seat.peer, seat.incarnation) for seat in view.seats}
        self._dead &= members
        self._resigned.clear()
        for peer, request in list(self._joins.items()):
            if (peer, request.seat.incarnation) in members:
                del self._joins[peer]
        for peer, promise in list(self._votes.items()):
            if promise.fleet != view.fleet or promise.epoch <= view.epoch + 1:
                del self._votes[peer]
            if promise.fleet == view.fleet and promise.epoch == view.epoch + 1 and promise.accepted is not None:
                self._ballots.learn(peer, *promise.accepted)
        self._wants_change, self._num_failed, self._not_before = False, 0, -math.inf
        self._wanted_since = self._lost_since = self._next_retry = math.inf
        return [Installed(view)]

    def _drop(self, reason: str) -> list[Action]:
        """Give up the view. Nothing of it is taken up again: its next one may have been voted for here."""
        view, self.view, self._ballots = self.view, None, None
        self._left[view.fleet] = max(view.epoch, self._left.get(view.fleet, 0))
        self._left.move_to_end(view.fleet)
        if len(self._left) > MOST_LEFT:
            self._left.popitem(last=False)
        self._joins.clear()
        self._dead.clear()
        self._resigned.clear()
        self._free_since, self._next_join = self._now, -math.inf
        return [Lost(view, reason, max(self.step, view.step))]

    # ---- facts -------------------------------------------------------------------------------------------------------

    def _status(self) -> messages.Status:
        if self.view is None:
            return messages.Status("", 0, 0, self.step, "")
        works = self._can_decide()
        return messages.Status(self.view.fleet, self.view.epoch, len(self.view.seats) if works else 0,
                      max(self.step, self.view.step), self.view.leader if works else "")

    def _greater(self, status: messages.Status) -> str:
        own = self._status()
        return (f"gave way to fleet {status.fleet} (step {status.step}, {status.size} nodes), which is greater than "
                f"{own.fleet} (step {own.step}, {own.size} nodes)")

    def _is_ahead(self, status: messages.Status | None) -> bool:
        return status is not None and status.fleet == self.view.fleet and status.epoch > self.view.epoch

    def _is_in(self, view: View) -> bool:
        seat = view.seat(self.own.peer)
        return seat is not None and seat.incarnation == self.own.incarnation

    def _is_present(self, peer: str) -> bool:
        """Whether a member is here: connected, and not known to have lost its view."""
        if peer == self.own.peer:
            return True
        seat, node, request = self.view.seat(peer), self._up.get(peer), self._joins.get(peer)
        if seat is None or node is None or node.incarnation != seat.incarnation or peer in self._resigned:
            return False
        return (request is None or request.seat.incarnation != seat.incarnation or request.count < 2)

    def _present(self) -> set[str]:
        return {peer for peer in self.view.peers if self._is_present(peer)}

    def _dead_peers(self) -> set[str]:
        """The members that are proven dead."""
        if self.view is None or not self._dead:
            return set()
        return {seat.peer for seat in self.view.seats if (seat.peer, seat.incarnation) in self._dead}

    def _can_decide(self) -> bool:
        """Whether a quorum is connected, and none of those in sight knows of a later view."""
        if any(self._is_ahead(status) for status in self._statuses.values()):
            return False
        return is_quorum(self.view, self._present(), self._dead_peers())

    def _is_beyond_help(self) -> bool:
        """Whether no member that could still come back would make a quorum."""
        if self._can_decide():
            return False
        dead = self._dead_peers()               # the connected that are not present have restarted, or lost the view
        return all(peer == self.own.peer or peer in dead or peer in self._up for peer in self.view.peers)

    def _proposes(self) -> bool:
        """Whether this node is the most senior member that is here."""
        present = [seat for seat in self.view.seats if self._is_present(seat.peer)]
        return min(present, key=lambda seat: seat.seniority).peer == self.own.peer

    def _seat(self, joined: int) -> Seat:
        return Seat(peer=self.own.peer, incarnation=self.own.incarnation, joined=joined, slots=self.own.slots)

    def _in_order(self, seats: list[Seat]) -> tuple[Seat, ...]:
        ordered = self._order(list(seats))
        if sorted(ordered, key=str) != sorted(seats, key=str):
            raise ValueError("the order of a ring must have the seats that it was given")
        return tuple(ordered)
