"""Which view follows a view: single-decree Paxos among the members of one epoch. Pure: messages in, messages out.

Two quorums of an epoch always meet in a living voter, or in dead ones whose votes the survivors know:

* the ordinary quorum: more than half of the members, or exactly half of them with the view's leader among them;
* the survivors' quorum: every member that is not proven dead. Proof (see Election.down) means two things. The dead
  one is really gone, and all its votes are known here: whoever accepts a view tells every other member so, before it
  answers the proposer, and again on every new connection. So the votes of the dead count when a proposer asks what
  was accepted before, and a vote of theirs in a higher ballot stops a decision of the survivors.

A mere majority of those not proven dead is not enough. Seven members, X and Y promise C's ballot 2 and die, A knows
that and decides in ballot 0 with two of the five others, while C, who does not know it, goes on to decide in ballot
2 with four of seven who had not heard of A's decision: two views. With every survivor in the quorum, C is in it or
proven dead.
"""
from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import NamedTuple

from pyfleet.members import View
from pyfleet.membership.messages import Accept, Accepted, Ballot, Decided, Message, Prepare, Promise, Refused

NO_BALLOT: Ballot = (-1, "")


class Send(NamedTuple):
    """Give a message to a peer; when no connection to it stands, drop it."""

    peer: str
    message: Message


def is_quorum(view: View, voters: Iterable[str], dead: AbstractSet[str] = frozenset()) -> bool:
    """Whether these members may speak for the whole view, `dead` being the members that are proven dead."""
    members, votes = set(view.peers), set(voters) & set(view.peers)
    if 2 * len(votes) > len(members) or (2 * len(votes) == len(members) and view.leader in votes):
        return True
    return bool(votes) and votes | dead >= members


@dataclass
class Attempt:
    """One own ballot."""

    ballot: Ballot
    value: View
    is_accepting: bool = False
    promised: set[str] = field(default_factory=set)
    accepted: set[str] = field(default_factory=set)


class Ballots:
    """The voter and, in its turn, proposer of one member for the epoch after `view`.

    Attributes:
        promised:  no lower ballot will be accepted any more.
        accepted:  (ballot, view) of the own last vote, or None.
        votes:     {peer: (ballot, view)}: the last vote that each other member made known.
        attempt:   the own ballot under way, or None.
        decided:   the view that an own ballot has decided, or None.
        round:     the highest round heard of.
    """

    def __init__(self, own: str, view: View):
        self.own, self.view, self.epoch = own, view, view.epoch + 1
        self.others = tuple(peer for peer in view.peers if peer != own)
        self.promised: Ballot = NO_BALLOT
        self.accepted: tuple[Ballot, View] | None = None
        self.votes: dict[str, tuple[Ballot, View]] = {}
        self.attempt: Attempt | None = None
        self.decided: View | None = None
        self.round = -1

    # ---- the voter ---------------------------------------------------------------------------------------------------

    def prepare(self, peer: str, message: Prepare) -> list[Send]:
        """A member asks for a promise."""
        self._heard_of(message.ballot)
        if message.ballot <= self.promised:
            return [self.refuse(peer)]
        self.promised = message.ballot
        return [Send(peer, self.history())]

    def accept(self, peer: str, message: Accept) -> list[Send]:
        """A member asks for a vote, and by asking has voted itself. The other members hear of the vote before it does."""
        self.learn(peer, message.ballot, message.view)
        if message.ballot < self.promised:
            return [self.refuse(peer)]
        self.promised, self.accepted = message.ballot, (message.ballot, message.view)
        return [*(Send(other, self.history()) for other in self.others if other != peer),
                Send(peer, Accepted(self.view.fleet, self.epoch, message.ballot))]

    def refuse(self, peer: str) -> Send:
        """Not in this ballot."""
        return Send(peer, Refused(self.view.fleet, self.epoch, max(self.promised, (0, ""))))

    def history(self) -> Promise:
        """All that others must know of the votes made here; goes to every member on every new connection, too."""
        return Promise(self.view.fleet, self.epoch, max(self.promised, (0, "")), self.accepted)

    def learn(self, peer: str, ballot: Ballot, view: View) -> None:
        """A member has voted for a view."""
        self._heard_of(ballot)
        if ballot >= self.votes.get(peer, (NO_BALLOT, None))[0]:
            self.votes[peer] = (ballot, view)

    # ---- the proposer ------------------------------------------------------------------------------------------------

    def propose(self, value: View, dead: AbstractSet[str]) -> list[Send]:
        """Begin an own ballot for this view, or for what earlier ballots may have decided already."""
        if self.own == self.view.leader and self.promised == NO_BALLOT and self.round < 0:
            self.attempt = Attempt((0, self.own), value)        # the lowest ballot: there is nothing to ask before
            return self._ask_votes(dead)
        ballot = (max(self.round, 0) + 1, self.own)
        self._heard_of(ballot)
        self.promised = ballot
        self.attempt = Attempt(ballot, value, promised={self.own})
        return [*(Send(peer, Prepare(self.view.fleet, self.epoch, ballot)) for peer in self.others), *self.count(dead)]

    def promise(self, peer: str, message: Promise, dead: AbstractSet[str]) -> list[Send]:
        """What a member has promised, to us or to another, and what it voted for last."""
        if message.accepted is not None:
            self.learn(peer, *message.accepted)
        if self.attempt is not None and message.ballot == self.attempt.ballot:
            self.attempt.promised.add(peer)
        return self.count(dead)

    def accepted_by(self, peer: str, message: Accepted, dead: AbstractSet[str]) -> list[Send]:
        """A member's vote for the own ballot."""
        if self.attempt is not None and self.attempt.is_accepting and message.ballot == self.attempt.ballot:
            self.attempt.accepted.add(peer)
        return self.count(dead)

    def refused(self, peer: str, message: Refused) -> bool:
        """A member has promised another ballot, or sees a senior one; whether that ends the own ballot.

        It does not when it comes from fewer than would matter: without a higher ballot, the others may still be enough.
        """
        self._heard_of(message.ballot)
        if self.attempt is None or message.ballot < self.attempt.ballot:
            return False
        self.attempt = None
        return True

    def count(self, dead: AbstractSet[str]) -> list[Send]:
        """Go as far as the promises and votes so far, and the proofs of death, allow."""
        attempt = self.attempt
        if attempt is None:
            return []
        if not attempt.is_accepting:
            return self._ask_votes(dead) if is_quorum(self.view, attempt.promised, dead) else []
        if not is_quorum(self.view, attempt.accepted, dead):
            return []
        if not is_quorum(self.view, attempt.accepted) and any(
                peer in self.votes and self.votes[peer][0] > attempt.ballot for peer in dead):
            self.attempt = None                 # a dead one may have helped to decide in a higher ballot: ask again
            return []
        self.attempt, self.decided = None, attempt.value
        joiners = [peer for peer in attempt.value.peers if peer not in self.view.peers]
        return [Send(peer, Decided(attempt.value)) for peer in (*self.others, *joiners)]

    def _ask_votes(self, dead: AbstractSet[str]) -> list[Send]:
        attempt = self.attempt
        known = [*self.votes.values(), *([self.accepted] if self.accepted else [])]
        if attempt.ballot[0] and known:
            attempt.value = max(known, key=lambda vote: vote[0])[1]
        attempt.is_accepting, attempt.accepted = True, {self.own}
        self._heard_of(attempt.ballot)
        self.promised, self.accepted = attempt.ballot, (attempt.ballot, attempt.value)
        return [*(Send(peer, Accept(attempt.ballot, attempt.value)) for peer in self.others), *self.count(dead)]

    def _heard_of(self, ballot: Ballot) -> None:
        self.round = max(self.round, ballot[0])
