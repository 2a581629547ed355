"""Paxos among the members of one epoch."""
import itertools

from pyfleet.members import Seat, View
from pyfleet.membership import messages
from pyfleet.membership.ballots import Ballots, Send, is_quorum

FLEET = "f" * 16


def view_of(peers, epoch=1, leader=None):
    """A view whose leader is the first one."""
    joined = {peer: 1 + (peer != (leader or peers[0])) for peer in peers}
    return View(fleet=FLEET, epoch=epoch, seats=tuple(Seat(peer=peer, incarnation="1" * 16, joined=joined[peer])
                                                      for peer in peers))


def only(sends, peer):
    return [send.message for send in sends if send.peer == peer]


def subsets(peers):
    return [set(some) for size in range(len(peers) + 1) for some in itertools.combinations(peers, size)]


def test_quorums_meet_or_are_known_to_each_other():
    """Of any two quorums, with any two proofs of death: a common member, or one is dead and known to the other."""
    num_pairs = 0
    for peers in ("a", "ab", "abc", "abcd", "bacde"):
        view = view_of(peers)
        quorums = [(votes, dead) for dead in subsets(peers) for votes in subsets(set(peers) - dead)
                   if is_quorum(view, votes, dead)]
        for (votes, dead), (others, gone) in itertools.combinations_with_replacement(quorums, 2):
            num_pairs += 1
            assert votes & others or votes <= gone or others <= dead, (peers, votes, dead, others, gone)
    assert num_pairs > 2_000


def test_what_is_a_quorum():
    assert is_quorum(view_of("abcd"), "ab") and is_quorum(view_of("abcd"), "bcd")
    assert not is_quorum(view_of("abcd"), "bc") and not is_quorum(view_of("abcd"), "a")
    assert is_quorum(view_of("abcd"), "cd", {"a", "b"}) and not is_quorum(view_of("abcd"), "c", {"a", "b"})
    assert not is_quorum(view_of("ab"), "b") and is_quorum(view_of("ab"), "b", {"a"})
    assert not is_quorum(view_of("ab"), "", {"a", "b"}) and not is_quorum(view_of("abc"), "xyza")


def test_the_leader_decides_without_asking_first():
    old, new = view_of("abc"), view_of("ab", 2)
    a, b, c = (Ballots(name, old) for name in "abc")
    sends = a.propose(new, set())
    assert sends == [Send(peer, messages.Accept((0, "a"), new)) for peer in "bc"]
    sends = b.accept("a", sends[0].message)
    assert sends == [Send("c", messages.Promise(FLEET, 2, (0, "a"), ((0, "a"), new))),      # others hear it first
                     Send("a", messages.Accepted(FLEET, 2, (0, "a")))]
    c.promise("b", sends[0].message, set())
    assert c.votes == {"b": ((0, "a"), new)}
    sends = a.accepted_by("b", sends[1].message, set())
    assert sends == [Send(peer, messages.Decided(new)) for peer in "bc"]
    assert a.decided == new


def test_what_may_be_decided_is_proposed_again():
    old, new = view_of("abcde"), view_of("abcdex", 2)
    b, c, d = (Ballots(name, old) for name in "bcd")
    c.accept("a", messages.Accept((0, "a"), new))                   # and then a is cut off
    prepares = b.propose(view_of("bcde", 2), set())
    for voter in (c, d):
        (answer,) = voter.prepare("b", only(prepares, voter.own)[0])
        sends = b.promise(voter.own, answer.message, set())
    assert only(sends, "c") == [messages.Accept((1, "b"), new)]


def test_a_lower_ballot_is_refused_and_the_next_one_is_higher():
    old = view_of("abc")
    b, c = Ballots("b", old), Ballots("c", old)
    b.prepare("c", only(c.propose(view_of("bc", 2), set()), "b")[0])
    assert b.promised == (1, "c")
    (refusal,) = b.accept("a", messages.Accept((0, "a"), old))
    assert refusal == Send("a", messages.Refused(FLEET, 2, (1, "c")))
    a = Ballots("a", old)
    a.propose(view_of("ab", 2), set())
    assert a.refused("b", refusal.message)
    assert a.attempt is None
    assert only(a.propose(view_of("ab", 2), set()), "b") == [messages.Prepare(FLEET, 2, (2, "a"))]
    assert not a.refused("b", refusal.message)                      # of the ballot before


def test_the_last_of_two_goes_on_only_with_proof_and_with_the_vote_of_the_dead():
    old, theirs = view_of("ab"), view_of("abx", 2)
    b = Ballots("b", old)
    b.propose(view_of("b", 2), set())
    assert b.decided is None
    b = Ballots("b", old)
    b.learn("a", (0, "a"), theirs)
    b.propose(view_of("b", 2), {"a"})
    assert b.decided == theirs


def test_a_higher_vote_of_the_dead_stops_the_survivors():
    old, theirs = view_of("abcd"), view_of("cd", 2)
    b = Ballots("b", old)
    for sends in (b.propose(view_of("bd", 2), {"a"}), b.promise("d", messages.Promise(FLEET, 2, (1, "b")), {"a"})):
        assert b.decided is None, sends
    b.promise("c", messages.Promise(FLEET, 2, (1, "b")), {"a"})
    b.promise("c", messages.Promise(FLEET, 2, (2, "c"), ((2, "c"), theirs)), {"a"})     # it went on, and told so
    assert b.attempt.is_accepting
    b.accepted_by("d", messages.Accepted(FLEET, 2, (1, "b")), {"a", "c"})
    assert b.decided is None
    assert b.attempt is None
    b.propose(view_of("bd", 2), {"a", "c"})
    b.promise("d", messages.Promise(FLEET, 2, (3, "b")), {"a", "c"})
    assert b.attempt.value == theirs
