"""Messages survive the wire as they were, and nothing else is a message."""
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyfleet.members import Node, Seat, View
from pyfleet.membership import messages
from pyfleet.membership.messages import LARGEST_BYTES, decode, encode

SEATS = tuple(Seat(peer=f"peer{i}", incarnation=16 * "a", joined=1, slots=i + 1) for i in range(3))
VIEW = View(fleet=16 * "f", epoch=4, seats=SEATS, step=7)
EXAMPLES = [
    messages.Hello(Node(peer="peer0", incarnation=16 * "b", addresses=("192.0.2.1", "fe80::1%eth0"), port=52415,
                        profile={"cores": 4, "accelerators": []})),
    messages.Known(()), messages.Ping(1 << 40), messages.Pong(0, 1.5), messages.Bye("done", for_good=False),
    messages.Status(VIEW.fleet, 4, 3, 7, "peer0"), messages.Found(VIEW), messages.Consent(VIEW.fleet, yes=True),
    messages.Join(VIEW.fleet, SEATS[1]), messages.Prepare(VIEW.fleet, 5, (1, "peer1")),
    messages.Promise(VIEW.fleet, 5, (1, "peer1"), ((0, "peer0"), VIEW)), messages.Promise(VIEW.fleet, 5, (1, "peer1")),
    messages.Accept((1, "peer1"), VIEW), messages.Accepted(VIEW.fleet, 5, (1, "peer1")),
    messages.Refused(VIEW.fleet, 5, (2, "peer2")), messages.Decided(VIEW), messages.Put(VIEW.fleet, 5, "card.1", b"\0\xff"),
    messages.Get(VIEW.fleet, 5, "card.1"), messages.Got(VIEW.fleet, 5, "card.1", b""),
    messages.Told(b"x"), messages.Report({"peer1": {"latency_s": 1e-4}}),
]


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_a_message_comes_back_as_it_was(message):
    assert decode(encode(message)) == message


def test_there_is_an_example_of_every_message():
    assert {type(message) for message in EXAMPLES} == set(messages.ANY.__args__)


@given(st.binary(max_size=300))
def test_anything_else_is_refused(data):
    try:
        assert decode(data) in EXAMPLES or encode(decode(data))
    except ValueError:
        pass


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_a_message_cut_short_is_none(message):
    data = encode(message)
    for end in range(len(data)):
        with pytest.raises(ValueError, match="not a message"):
            decode(data[:end])


def test_sizes_are_bounded():
    with pytest.raises(ValueError, match="over the limit"):
        encode(messages.Put("f", 1, "k", bytes(LARGEST_BYTES)))
    with pytest.raises(ValueError, match="over the limit"):
        decode(bytes(LARGEST_BYTES + 1))
    long = msgspec.msgpack.encode(["get", "f", 1, 257 * "k"])
    with pytest.raises(ValueError, match="not a message"):
        decode(long)


def test_a_view_knows_who_leads_and_which_ranks_are_whose():
    assert VIEW.leader == "peer0" and VIEW.world_size == 6 and VIEW.peers == ("peer0", "peer1", "peer2")
    assert [VIEW.first_rank(peer) for peer in VIEW.peers] == [0, 1, 3]
    assert VIEW.seat("peer2") == SEATS[2] and VIEW.seat("nobody") is None
    older = Seat(peer="peer9", incarnation=16 * "c", joined=0)
    assert View(fleet="f", epoch=5, seats=(*SEATS, older)).leader == "peer9"
