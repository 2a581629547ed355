"""Whom to dial, which connection to keep, and what is told of it."""
import random

import pytest

from pyfleet.members import Node, Sighting
from pyfleet.membership.messages import MOST_NODES
from pyfleet.membership.roster import (
    IN,
    MOST_DIALS,
    OUT,
    Close,
    Connected,
    Dial,
    Discovered,
    Duplicate,
    Expired,
    OwnIdentityElsewhere,
    Roster,
    RosterSettings,
)

SETTINGS = RosterSettings()


def node(peer, incarnation="1", host="192.0.2.1"):
    return Node(peer=peer, incarnation=incarnation, addresses=(host,), port=7)


def sighting(peer="", host="192.0.2.1", incarnation="1", source="mdns"):
    return Sighting(addresses=(host,), port=7, peer=peer, incarnation=incarnation, source=source)


def roster(own="b", jitter=lambda: 1.0):
    return Roster(own, "own", jitter)


def see(known, sighting, now):
    """A sighting, and what it leads to if that is to be at once."""
    actions = known.sighted(sighting, now)
    return actions + (known.tick(now) if known.deadline is not None and known.deadline <= now else [])


def dials(actions):
    return [action for action in actions if isinstance(action, Dial)]


def test_discovered_connected_expired_in_order():
    events = []
    known = roster()
    events += see(known, sighting("c"), 0.0)
    events += known.connected("c", node("c"), OUT, 0.1)
    events += known.unsighted("c", "mdns", 1.0)
    events += known.disconnected("c", 2.0)
    place = ("192.0.2.1", 7)
    dial = Dial("c", (place,))
    assert events == [Discovered("c", (place,)), dial, Connected(node("c")), Expired("c"), dial]


def test_a_node_that_nobody_had_sighted_is_discovered_before_it_is_connected():
    assert [type(action) for action in roster().connected("c", node("c"), IN, 0.0)] == [Discovered, Connected]


def test_the_lesser_dials_at_once_and_the_greater_a_little_later():
    assert dials(see(roster("b"), sighting("c"), 0.0)) == [Dial("c", (("192.0.2.1", 7),))]
    known = roster("d")
    assert not dials(see(known, sighting("c"), 0.0))
    assert known.deadline == SETTINGS.yield_s
    assert dials(known.tick(SETTINGS.yield_s))
    assert not dials(known.tick(SETTINGS.yield_s + 0.1))            # it is under way
    known = roster("d")
    see(known, sighting("c"), 0.0)
    known.connected("c", node("c"), IN, 0.2)
    assert not dials(known.tick(60.0))


def test_failures_back_off_and_news_resets_them():
    known = roster()
    (dial,) = dials(see(known, sighting("c"), 0.0))
    now, waits = 0.0, []
    for _ in range(8):
        assert not dials(known.failed(dial, "refused", now))
        waits.append(known.deadline - now)
        now = known.deadline
        (dial,) = dials(known.tick(now))
    assert waits == pytest.approx([0.25, 0.5, 1, 2, 4, 5, 5, 5])
    known.failed(dial, "refused", now)
    (dial,) = dials(see(known, sighting("c", host="192.0.2.9"), now + 1.0))
    assert dial.places == (("192.0.2.9", 7),)
    known.failed(dial, "refused", now + 1.0)
    assert not dials(see(known, sighting("c", host="192.0.2.9"), now + 1.1))         # no faster than the shortest
    assert known.deadline == pytest.approx(now + 1.25)


def test_the_backoff_is_spread():
    spread = random.Random(1)
    waits = set()
    for _ in range(50):
        known = roster(jitter=spread.random)
        (dial,) = dials(see(known, sighting("c"), 0.0))
        known.failed(dial, "refused", 0.0)
        waits.add(known.deadline)
    assert len(waits) == 50
    assert 0.125 <= min(waits) < 0.16
    assert 0.22 < max(waits) <= 0.25


def test_a_dial_that_nobody_reports_is_tried_again():
    known = roster()
    see(known, sighting("c"), 0.0)
    assert known.deadline == SETTINGS.dial_s
    assert not dials(known.tick(SETTINGS.dial_s))
    assert dials(known.tick(known.deadline))


def test_we_are_not_dialled():
    known = roster()
    assert see(known, sighting("b", incarnation="own"), 0.0) == []
    assert see(known, sighting("b", incarnation=""), 0.0) == []
    place = ("192.0.2.1", 7)
    assert see(known, sighting(), 1.0) == [Dial("", (place,))]   # an address that turns out to be ours
    assert known.turned_out("b", place, 1.1)
    assert known.connected("b", node("b", "own"), OUT, 1.1, place) == [Close("b", "this", "it is our own identity")]
    assert known.deadline is None
    assert known.tick(100.0) == []


def test_an_address_is_dialled_until_it_turns_out_who_is_there():
    known, place = roster(), ("192.0.2.1", 7)
    (dial,) = see(known, sighting(source="unicast"), 0.0)
    assert dial == Dial("", (place,))
    known.failed(dial, "refused", 0.1)
    (dial,) = known.tick(known.deadline)
    assert known.turned_out("c", place, 1.0)
    known.connected("c", node("c", host="192.0.2.77"), OUT, 1.0, place)
    assert known.tick(1000.0) == []
    actions = known.disconnected("c", 1001.0, left=True)
    assert actions == [Expired("c"), Dial("", (place,))]


def test_an_address_of_somebody_connected_is_no_second_connection():
    known, place = roster(), ("192.0.2.50", 7)
    known.connected("c", node("c"), OUT, 0.0)
    assert dials(see(known, sighting(host="192.0.2.50"), 0.1))
    assert not known.turned_out("c", place, 0.2)
    assert known.tick(1000.0) == []


@pytest.mark.parametrize("own,peer", [("b", "c"), ("c", "b")])
@pytest.mark.parametrize("first,second", [(IN, OUT), (OUT, IN), (OUT, OUT), (IN, IN)])
def test_which_of_two_connections_stays(own, peer, first, second):
    """The one that the lesser began; of two that the same end began, the initiator keeps the old, the other the new."""
    known = roster(own)
    known.connected(peer, node(peer), first, 0.0)
    actions = known.connected(peer, node(peer), second, 0.1)
    assert not any(isinstance(action, Connected) for action in actions)
    if first == second:
        stays = "new" if first == IN else "old"
    else:
        begun_by_us = own < peer
        stays = "new" if (second == OUT) == begun_by_us else "old"
    (close,) = [action for action in actions if isinstance(action, Close)]
    assert close.which == ("other" if stays == "new" else "this")
    assert known.turned_out(peer, ("192.0.2.1", 7), 0.2) == (stays == "new" and second == IN and own < peer
                                                           or stays == "old" and first == IN and own < peer)


def test_both_ends_keep_the_same_connection():
    """Whatever the order in which the ends see two connections that were begun at once."""
    for b_order in ("xy", "yx"):
        for c_order in ("xy", "yx"):                                # x was begun by b, y by c
            kept = []
            for own, peer, order in (("b", "c", b_order), ("c", "b", c_order)):
                known, holds = roster(own), None
                for name in order:
                    direction = OUT if (name == "x") == (own == "b") else IN
                    actions = known.connected(peer, node(peer), direction, 0.0)
                    closes = [action.which for action in actions if isinstance(action, Close)]
                    holds = holds if closes == ["this"] else name
                kept.append(holds)
            assert kept == ["x", "x"]


def test_a_node_that_restarts_is_no_clone():
    known = roster()
    known.connected("c", node("c", "1"), OUT, 0.0)
    known.disconnected("c", 10.0)
    actions = known.connected("c", node("c", "2"), IN, 10.1)
    assert Connected(node("c", "2")) in actions
    assert not any(isinstance(action, Duplicate) for action in (*actions, *known.tick(100.0)))


def test_a_restart_seen_before_the_end_of_the_old_one_is_no_clone():
    known = roster()
    known.connected("c", node("c", "1"), IN, 0.0)
    assert known.connected("c", node("c", "2"), IN, 10.0) == [
        Close("c", "this", "another incarnation of this node is connected")]
    assert known.connected("c", node("c", "2"), IN, 12.0)[0].which == "this"
    assert dials(known.disconnected("c", 13.0))                     # its silence was noticed
    assert Connected(node("c", "2")) in known.connected("c", node("c", "2"), IN, 13.1)
    assert not any(isinstance(action, Duplicate) for action in known.tick(60.0))


def test_two_living_incarnations_are_clones():
    known = roster()
    known.connected("c", node("c", "1"), IN, 0.0)
    told = []
    for second in range(10, 40):
        told += [action for action in known.connected("c", node("c", "2"), IN, float(second))
                 if isinstance(action, Duplicate)]
    assert told == [Duplicate("c", ("1", "2"), (("192.0.2.1", 7),))]


def test_our_own_identity_elsewhere():
    known, place = roster(), ("192.0.2.66", 7)
    (dial,) = see(known, sighting("b", "192.0.2.66", "other"), 0.0)
    assert dial == Dial("", (place,))                               # a stale record of our past would lead nowhere
    close, found = known.connected("b", node("b", "other", "192.0.2.66"), OUT, 0.1, place)
    assert close.which == "this"
    assert found == OwnIdentityElsewhere("other", (place,))
    assert known.connected("b", node("b", "other"), IN, 5.0) == [close]
    assert known.tick(1000.0) == []


def test_gossip_is_a_hint_like_others():
    known = roster()
    actions = known.known([node("c"), node("b", "own"), node("a", host="192.0.2.3")], 0.0)
    assert [action.peer for action in actions] == ["c", "a"]
    assert [dial.peer for dial in known.tick(0.0)] == ["c"]
    assert known.nodes == ()
    known.connected("a", node("a"), IN, 0.1)
    assert known.nodes == (node("a"),)


def test_who_leaves_is_not_dialled_and_who_is_cut_off_is():
    known = roster()
    known.connected("c", node("c"), IN, 0.0)
    known.connected("d", node("d"), IN, 0.0)
    assert known.disconnected("c", 1.0, left=True) == [Expired("c")]
    assert known.disconnected("d", 1.0) == [Expired("d"), Dial("d", (("192.0.2.1", 7),))]
    now = 1.0
    while now < SETTINGS.remember_s - 100:
        known.failed(Dial("d", ()), "unreachable", now)
        now = known.deadline
        assert dials(known.tick(now))
    known.failed(Dial("d", ()), "unreachable", now)
    assert known.tick(2.0 + SETTINGS.remember_s) == []
    assert known.deadline is None


def test_thousands_of_announced_nodes_cost_little():
    known = roster("0")
    known.connected("friend", node("friend"), IN, 0.0)
    under_way, events = set(), []
    for number in range(10 * MOST_NODES):
        actions = known.sighted(sighting(f"x{number:06}", f"198.51.100.{number % 250}"), number / 1000)
        actions += known.tick(number / 1000) if number % 100 == 99 else []
        events += [action for action in actions if not isinstance(action, Dial)]
        under_way |= {dial.peer for dial in dials(actions)}
    assert len(under_way) <= 2 * MOST_DIALS                         # each lasts 10 s
    assert len(known._entries) == MOST_NODES
    assert [peer.peer for peer in known.nodes] == ["friend"]
    events += known.tick(12.0)
    num_expired = sum(isinstance(event, Expired) for event in events)
    assert num_expired == 9 * MOST_NODES + 1
    for number in range(10 * MOST_NODES):
        known.sighted(sighting("", f"198.51.{number // 250}.{number % 250}"), 20.0)
    assert len(known._spots) == MOST_NODES
    for number in range(MOST_NODES + 10):                           # but those that prove themselves all have room
        known.connected(f"y{number:06}", node(f"y{number:06}"), IN, 21.0)
    assert len(known.nodes) == MOST_NODES + 11


def test_who_was_met_is_dialled_before_strangers():
    known = roster("0")
    known.connected("friend", node("friend"), IN, 0.0)
    for number in range(100):
        see(known, sighting(f"x{number:06}"), 1.0)
    known.disconnected("friend", 1.0)
    after = known.tick(1.0 + SETTINGS.dial_s)
    assert len(dials(after)) <= MOST_DIALS
    assert dials(after)[0].peer == "friend"
