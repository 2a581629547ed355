"""P0: who takes part: the card of a rank, the card of a node, and the view on which the nodes of a fleet agree."""
from __future__ import annotations

from dataclasses import asdict, dataclass

import msgspec

PROTOCOL = 1        # of the meeting, the links and the frames; ranks of another one are refused


@dataclass(frozen=True)
class Member:
    """One rank's card.

    Attributes:
        host:       equal for ranks that can share memory (same kernel, same process and network namespaces).
        addresses:  where its links listen, best first; "" port 0 when it offers none.
        devices:    whether it may hold arrays elsewhere than in host memory.
        peer:       the peer id of its node, "" where that has no key.
    """

    rank: int
    host: str
    name: str
    pid: int
    addresses: tuple[str, ...] = ()
    port: int = 0
    protocol: int = PROTOCOL
    devices: bool = False
    peer: str = ""

    def card(self) -> dict:
        """As plain values, for the store."""
        return asdict(self) | {"addresses": list(self.addresses)}

    @classmethod
    def from_card(cls, card: dict) -> Member:
        """The member behind a card. Raises: TypeError for unknown or missing fields."""
        return cls(**{**card, "addresses": tuple(card["addresses"])})


class Node(msgspec.Struct, frozen=True, kw_only=True):
    """What a node says of itself to the others, after both ends have proved who they are.

    Attributes:
        peer:        its full peer id, the one that the handshake proved.
        incarnation: 16 hexadecimal digits, new at every start; two at once under one peer id are a clone.
        name:        its host name, for people.
        addresses, port: where its control connections are taken; best first, IPv6 with a scope where it needs one.
        slots:       how many ranks it runs; 0 for one that only looks on.
        profile:     what it can do, as pyfleet.profile.profile() tells; JSON-like.
        version:     of pyfleet, for people; PROTOCOL is what decides.
    """

    peer: str
    incarnation: str
    name: str = ""
    addresses: tuple[str, ...] = ()
    port: int = 0
    slots: int = 1
    profile: dict = msgspec.field(default_factory=dict)
    version: str = ""
    protocol: int = PROTOCOL

    def __str__(self) -> str:
        return self.peer


class Seat(msgspec.Struct, frozen=True, kw_only=True):
    """A node's place in a view. `joined` is the epoch at which this incarnation came in: seniority."""

    peer: str
    incarnation: str
    joined: int
    slots: int = 1

    @property
    def seniority(self) -> tuple[int, str]:
        """The least leads: who joined first, and of those the least peer id."""
        return self.joined, self.peer


class View(msgspec.Struct, frozen=True, kw_only=True):
    """Who is in; everyone in an epoch of a fleet holds the same view.

    Attributes:
        fleet:  16 hexadecimal digits that the founder drew; views of two fleets have nothing to do with each other.
        epoch:  1 for the founders' view, one more with every change.
        seats:  in the order of the ring; ranks are dealt in this order, `slots` to each.
        step:   the last optimiser step that the members committed together before this view.
    """

    fleet: str
    epoch: int
    seats: tuple[Seat, ...]
    step: int = 0

    @property
    def leader(self) -> str:
        """The peer id of the senior member."""
        return min(self.seats, key=lambda seat: seat.seniority).peer

    @property
    def peers(self) -> tuple[str, ...]:
        """The members' peer ids, in the order of the ring."""
        return tuple(seat.peer for seat in self.seats)

    @property
    def world_size(self) -> int:
        """How many ranks the members run together."""
        return sum(seat.slots for seat in self.seats)

    def seat(self, peer: str) -> Seat | None:
        """A member's seat; None for who is not in."""
        return next((seat for seat in self.seats if seat.peer == peer), None)

    def first_rank(self, peer: str) -> int:
        """The rank of a member's first slot. Raises: ValueError for who is not in."""
        return sum(seat.slots for seat in self.seats[:self.peers.index(peer)])


@dataclass(frozen=True)
class Sighting:
    """A node that somebody or something says can be found somewhere: a hint where to connect, and nothing more.

    Attributes:
        peer:    the full peer id it is said to have; "" where only an address is known.
        source:  the kind of discovery that says so.
    """

    addresses: tuple[str, ...]
    port: int
    peer: str = ""
    incarnation: str = ""
    name: str = ""
    source: str = ""
