"""What nodes say to each other on a control connection: msgpack with a schema, bounded in size.

A connection carries Hello first, in both directions, then anything else. What is not listed here, is longer than
LARGEST_BYTES or does not fit its schema ends the connection.
"""
from __future__ import annotations

from typing import Annotated

import msgspec

from pyfleet.members import Node, Seat, View

LARGEST_BYTES = 1 << 20         # a view of 64 nodes takes 12 KB; the cards of ranks pass through as values of a store
MOST_NODES = 1024

Key = Annotated[str, msgspec.Meta(max_length=256)]
Word = Annotated[str, msgspec.Meta(max_length=64)]


class Message(msgspec.Struct, frozen=True, tag_field="is", array_like=True):
    """Any of the messages below."""


# ---- at any time -----------------------------------------------------------------------------------------------------

class Hello(Message, tag="hello"):
    """The first message of each end: who speaks."""

    node: Node


class Known(Message, tag="known"):
    """Nodes that the sender has authenticated, so that one address is enough to find all."""

    nodes: Annotated[tuple[Node, ...], msgspec.Meta(max_length=MOST_NODES)]


class Ping(Message, tag="ping"):
    """To be answered by Pong with the same number; both also count as a heartbeat."""

    number: int


class Pong(Message, tag="pong"):
    """The answer to Ping. `busy_ms`: how late the sender's own loop has been of late."""

    number: int
    busy_ms: float = 0.0


class Bye(Message, tag="bye"):
    """The last message of a connection: the sender leaves for good, or only has no use for this connection."""

    reason: Annotated[str, msgspec.Meta(max_length=512)] = ""
    for_good: bool = True


# ---- the views -------------------------------------------------------------------------------------------------------

Ballot = tuple[int, str]        # (round, peer id of the proposer); (0, leader) is the leader's own, without Prepare


class Status(Message, tag="status"):
    """Where the sender stands; sent when it changes and to a new neighbour. fleet "" and epoch 0: in no fleet yet."""

    fleet: Word
    epoch: int
    size: int
    step: int
    leader: Word


class Found(Message, tag="found"):
    """The sender would found a fleet with this view (epoch 1); answered by Consent."""

    view: View


class Consent(Message, tag="consent"):
    """Whether the sender, who is in no fleet, awaits that the founder of `fleet` decides."""

    fleet: Word
    yes: bool


class Join(Message, tag="join"):
    """The sender asks the fleet for a seat, with this seat's incarnation and slots."""

    fleet: Word
    seat: Seat


class Prepare(Message, tag="prepare"):
    """Phase 1 of choosing the view of an epoch among the members of the one before."""

    fleet: Word
    epoch: int
    ballot: Ballot


class Promise(Message, tag="promise"):
    """No ballot below this one will be accepted any more; `accepted` is the last that was, with its view."""

    fleet: Word
    epoch: int
    ballot: Ballot
    accepted: tuple[Ballot, View] | None = None


class Accept(Message, tag="accept"):
    """Phase 2: accept this view in this ballot."""

    ballot: Ballot
    view: View


class Accepted(Message, tag="accepted"):
    """The sender has accepted the view of this epoch in this ballot."""

    fleet: Word
    epoch: int
    ballot: Ballot


class Refused(Message, tag="refused"):
    """The sender has promised a higher ballot."""

    fleet: Word
    epoch: int
    ballot: Ballot


class Decided(Message, tag="decided"):
    """This view is chosen; also the answer to whoever is behind."""

    view: View


# ---- a store that the leader keeps for the ranks of a view ---------------------------------------------------------------

class Put(Message, tag="put"):
    """A value for a key of the store of this epoch; the first one stands."""

    fleet: Word
    epoch: int
    key: Key
    value: bytes


class Get(Message, tag="get"):
    """Ask for a key; answered by Got when it is there."""

    fleet: Word
    epoch: int
    key: Key


class Got(Message, tag="got"):
    """The value of a key."""

    fleet: Word
    epoch: int
    key: Key
    value: bytes


class Told(Message, tag="told"):
    """The status of the sender, as msgpack: the answer to a connection of kind QUERY."""

    status: bytes


# ---- measuring the way to a neighbour ------------------------------------------------------------------------------------

class Report(Message, tag="report"):
    """What the sender measured to its neighbours: {peer id: JSON-like facts of the edge}."""

    edges: dict[Word, dict]


ANY = (Hello | Known | Ping | Pong | Bye | Status | Found | Consent | Join | Prepare | Promise | Accept | Accepted | Refused
       | Decided | Put | Get | Got | Told | Report)
_decoder = msgspec.msgpack.Decoder(ANY)
_encoder = msgspec.msgpack.Encoder()


def encode(message: Message) -> bytes:
    """The bytes of a message.

    Raises:  ValueError when it would be longer than any receiver takes.
    """
    data = _encoder.encode(message)
    if len(data) > LARGEST_BYTES:
        raise ValueError(f"a {type(message).__name__} of {len(data)} bytes is over the limit of {LARGEST_BYTES}")
    return data


def decode(data: bytes) -> Message:
    """The message in these bytes.

    Raises:  ValueError for anything that is none.
    """
    if len(data) > LARGEST_BYTES:
        raise ValueError(f"a message of {len(data)} bytes is over the limit of {LARGEST_BYTES}")
    try:
        return _decoder.decode(data)
    except msgspec.MsgspecError as error:
        raise ValueError(f"not a message: {error}") from None
