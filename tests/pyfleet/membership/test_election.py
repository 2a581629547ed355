"""Views and leaders, in a made-up world."""
import random

import pytest

from pyfleet.members import Seat, View
from pyfleet.membership import messages
from pyfleet.membership.ballots import Send
from pyfleet.membership.election import Election, ElectionSettings, Installed, Lost
from tests.pyfleet.membership.world import SILENCE_S, World, node

NAMES = "abcdefgh"


def settled(num_nodes, seed=0, **options):
    world = World(seed, num_nodes=num_nodes, min_nodes=num_nodes, **options)
    world.until(world.agreed, 5)
    return world.run(1)


@pytest.mark.parametrize("num_nodes", [1, 2, 4, 8])
@pytest.mark.parametrize("enough", ["one", "all"])
def test_nodes_started_within_2_s_agree_within_5(num_nodes, enough):
    for seed in range(20):
        starts = random.Random(seed)
        world = World(seed, min_nodes=num_nodes if enough == "all" else 1)
        for when, name in sorted((starts.uniform(0, 2), name) for name in NAMES[:num_nodes]):
            world.run(max(0.0, 100 + when - world.now))
            world.start(name)
        world.until(world.agreed, 5)
        world.run(5)
        assert len(world.leaders()) == 1
        assert world.agreed().leader == world.leaders()[0]
        if enough == "all":
            assert {view.epoch for _, _, view in world.installed} == {1}


def test_fewer_than_min_nodes_found_nothing():
    world = World(num_nodes=3, min_nodes=4).run(20)
    assert not world.installed
    assert {election.state for election in world.living.values()} == {"waiting for nodes: found 3 of 4"}
    world.start("d")
    world.until(world.agreed, 5)


def test_a_late_one_is_in_the_next_view_within_3_s():
    world = settled(3)
    world.start("d")
    world.until(world.agreed, 3)
    assert world.agreed().epoch == 2
    assert world.agreed().seat("d").joined == 2
    assert world.agreed().leader == "a"


def test_a_leaver_is_gone_at_once():
    world = settled(4)
    for name in "ca":                                               # a member, and the leader
        world.leave(name)
        world.until(world.agreed, 0.5)
    assert world.leaders() == ["b"]


def test_leaders_killed_50_times_in_a_row():
    """The oldest node leads everywhere; when it is killed, the next oldest does."""
    world = settled(4)
    for _ in range(50):
        (leader,) = world.leaders()
        oldest = min(world.agreed().seats, key=lambda seat: (seat.joined, seat.peer)).peer
        assert leader == oldest
        world.kill(leader)
        world.until(world.agreed, 2)
        world.until(world.leaders, 1)
        world.start(leader)
        world.until(world.agreed, 3)
        world.until(world.leaders, 1)
    assert world.agreed().epoch == 101


def test_all_but_one_killed_at_once():
    world = settled(4)
    for name in "abc":
        world.kill(name)
    world.until(world.agreed, 2)
    assert world.leaders() == ["d"]


@pytest.mark.parametrize("minority,majority", [("d", "abc"), ("a", "bcd"), ("cd", "ab"), ("b", "a")])
def test_a_minority_waits_and_comes_back_by_itself(minority, majority):
    num_nodes = len(minority + majority)
    for seed in range(10):
        world = settled(num_nodes, seed)
        world.cut(minority, majority)
        world.until(lambda: world.agreed(majority), 4.5)            # noqa: B023
        world.run(5)
        epoch = world.agreed(majority).epoch
        assert epoch == 2
        assert {world.living[name].view.epoch for name in minority} == {1}
        found = f"found {len(minority)} of {num_nodes}"
        assert world.living[minority[0]].state == f"waiting for a majority of epoch 1: {found}"
        assert world.leaders() == [majority[0]]
        world.heal()
        world.until(world.agreed, 3)
        assert all(action.reason.endswith("agreed without this node") for _, _, action in world.lost)


def test_a_short_cut_changes_nothing():
    world = settled(4)
    world.cut("ab", "cd")
    world.run(SILENCE_S - 1)
    world.heal()
    world.run(10)
    assert world.agreed().epoch == 1


def test_of_two_fleets_the_one_that_has_learnt_more_stays():
    world = World(num_nodes=5, min_nodes=1)
    world.cut("abc", "de")
    world.until(lambda: world.agreed("abc") and world.agreed("de"), 5)
    fleet = world.living["d"].view.fleet
    for name in "abcde":
        world.living[name].committed(7 + (name in "de"))
    world.heal()
    world.until(world.agreed, 3)
    assert world.agreed().fleet == fleet
    assert world.agreed().step == 8
    assert world.agreed().leader == "d"
    assert {(name, action.step) for _, name, action in world.lost} == {("a", 7), ("b", 7), ("c", 7)}
    assert all("gave way to fleet" in action.reason for _, _, action in world.lost)


def test_of_two_new_fleets_the_larger_stays():
    world = World(num_nodes=5, min_nodes=1)
    world.cut("ab", "cde")
    world.until(lambda: world.agreed("ab") and world.agreed("cde"), 5)
    fleet = world.living["d"].view.fleet
    world.heal()
    world.until(world.agreed, 3)
    assert world.agreed().fleet == fleet


def test_whoever_was_left_out_comes_back_though_it_had_committed_more():
    world = settled(3)
    world.living["c"].committed(1000)                               # the others had not heard of it when it was cut off
    for name in "ab":
        world.living[name].committed(999)
    world.cut("c", "ab")
    world.until(lambda: world.agreed("ab"), 5)
    world.heal()
    world.until(world.agreed, 3)
    assert len({view.fleet for _, _, view in world.installed}) == 1


def test_a_fleet_whose_quorum_restarted_unseen_is_founded_anew_at_its_step():
    world = settled(2)
    for election in world.living.values():
        election.committed(1000)
    world.cut("a", "b")
    world.kill("a")                                                 # nobody hears of it
    world.run(6)
    assert world.living["b"].state == "waiting for a majority of epoch 1: found 1 of 2"
    world.heal()
    world.start("a")
    world.until(world.agreed, 5)
    assert world.agreed().step == 1000
    assert [(name, action.step) for _, name, action in world.lost] == [("b", 1000)]
    assert "restarted" in world.lost[0][2].reason


def test_a_slow_network_only_takes_longer():
    """0.8 s there and back is more than a ballot waits at first."""
    world = World(num_nodes=4, min_nodes=4, delay_s=0.4)
    world.until(world.agreed, 5)
    world.run(1)
    world.kill("a")
    world.until(world.agreed, 10)
    world.start("a")
    world.until(world.agreed, 10)


@pytest.mark.parametrize("step", [0, 1])
def test_survivors_on_both_sides_of_a_cut_found_anew(step):
    """Three of five die, seen by one survivor only; the fleet's leader is among those that come back."""
    world = settled(5)
    for election in world.living.values():
        election.committed(step)
    world.kill("a")
    world.cut("ad", "bce")
    world.kill("b")
    world.kill("c")
    world.heal()
    for name in "abc":
        world.start(name)
    world.until(world.agreed, 15)
    assert world.agreed().step == step


def test_the_order_of_the_ring_is_the_proposers():
    world = World(num_nodes=4, min_nodes=4, order=lambda seats: sorted(seats, key=lambda seat: seat.peer, reverse=True))
    world.until(world.agreed, 5)
    assert world.agreed().peers == ("d", "c", "b", "a")
    world.run(1)
    leader = world.living["a"]
    world._act("a", leader.want_change(world.now))                  # as it is
    world.run(2)
    assert world.agreed().epoch == 1
    leader._order = lambda seats: sorted(seats, key=lambda seat: seat.peer)
    world._act("a", leader.want_change(world.now))
    world.run(2)
    assert world.agreed().peers == ("a", "b", "c", "d")
    assert world.agreed().epoch == 2
    leader._order = lambda seats: seats[1:]
    with pytest.raises(ValueError, match="must have the seats"):
        leader.want_change(world.now)


def test_a_quiet_fleet_says_nothing():
    world = settled(8)
    sent = dict(world.num_sent)
    world.run(60)
    assert dict(world.num_sent) == sent


def connected(own, *others, **options):
    election = Election(node(own), **options)
    for other in others:
        election.up(other, node(other), 0.0)
    return election


def installed(own, view, now=0.0):
    """A member of this view that hears all the others."""
    election = connected(own, *(peer for peer in view.peers if peer != own))
    peer = next(peer for peer in view.peers if peer != own)
    assert Installed(view) in election.received(peer, messages.Decided(view), now)
    for peer in view.peers:
        election.received(peer, messages.Status(view.fleet, view.epoch, len(view.seats), 0, view.leader), now)
    return election


def view_of(peers, epoch=1):
    return View(fleet="f" * 16, epoch=epoch, seats=tuple(Seat(peer=peer, incarnation=node(peer).incarnation, joined=1)
                                                         for peer in peers))


def test_a_leader_without_a_quorum_in_the_lease_leads_no_more():
    election = installed("a", view_of("abc"))
    lease_s = ElectionSettings().lease_s
    assert lease_s < SILENCE_S
    assert election.leading
    election.tick(lease_s - 0.01)
    assert election.leading
    election.tick(lease_s)
    assert not election.leading
    assert not election.has_quorum
    election.heard("b", lease_s + 0.1)
    assert election.leading


def test_a_voter_promises_nothing_to_a_junior_while_it_hears_a_senior():
    election = installed("c", view_of("abc"))
    prepare = messages.Prepare("f" * 16, 2, (1, "b"))
    assert isinstance(election.received("b", prepare, 0.1)[0].message, messages.Refused)
    election.down("a", node("a").incarnation, False, 0.2)
    assert election.received("b", prepare, 0.3)[0] == Send("b", messages.Promise("f" * 16, 2, (1, "b")))


@pytest.mark.parametrize("dead,silent_s,ahead,proven", [
    (True, 0.0, False, True), (False, 0.0, False, False), (True, 2.6, False, False), (True, 0.0, True, False)])
def test_what_counts_as_proof_of_death(dead, silent_s, ahead, proven):
    election = installed("b", view_of("ab"))
    if ahead:
        election.received("a", messages.Status("f" * 16, 2, 1, 0, "a"), 0.0)
    actions = election.down("a", node("a").incarnation, dead, silent_s)
    assert any(isinstance(action, Installed) for action in actions) == proven
    assert election.has_quorum == proven


def test_a_restarted_node_has_no_vote_for_its_predecessors_seat():
    election = installed("a", view_of("abc"))
    election.down("b", node("b").incarnation, False, 0.1)
    election.down("c", node("c").incarnation, False, 0.1)
    election.up("b", node("b", "2"), 0.2)
    assert not election.has_quorum
    assert election.received("b", messages.Prepare("f" * 16, 2, (1, "b")), 0.3) == []


def test_who_is_behind_is_told():
    election = installed("a", view_of("abc", 5))
    old = messages.Status("f" * 16, 4, 3, 0, "a")
    assert Send("b", messages.Decided(election.view)) in election.received("b", old, 0.1)
    assert Send("b", messages.Decided(election.view)) in election.received(
        "b", messages.Prepare("f" * 16, 5, (1, "b")), 0.1)
    older = messages.Decided(view_of("abc", 4))
    assert Send("b", messages.Decided(election.view)) in election.received("b", older, 0.1)


def test_a_view_given_up_is_not_taken_up_again():
    election = installed("a", view_of("ab"))
    greater = messages.Status("e" * 16, 1, 3, 0, "x")
    election.up("x", node("x"), 0.1)
    actions = election.received("x", greater, 0.1)
    assert isinstance(actions[0], Lost)
    assert Send("x", messages.Join("e" * 16, Seat(peer="a", incarnation=node("a").incarnation, joined=0))) in actions
    election.received("b", messages.Decided(view_of("ab")), 0.2)
    assert election.view is None
    assert Installed(view_of("ab", 2)) in election.received("b", messages.Decided(view_of("ab", 2)), 0.2)


def test_after_leaving_nothing_is_done():
    election = installed("a", view_of("ab"))
    actions = election.leave(0.1, "done")
    assert actions[0] == Send("b", messages.Bye("done"))
    assert isinstance(actions[1], Lost)
    assert election.deadline is None
    assert election.state == "left"
    assert election.received("b", messages.Status("", 0, 0, 0, ""), 0.2) == election.tick(9.0) == []


def test_states_in_words():
    assert connected("a").state == "alone"
    assert connected("a", min_nodes=3).state == "waiting for nodes: found 1 of 3"
    election = connected("b", "a")
    election.received("a", messages.Status("e" * 16, 1, 1, 0, "a"), 0.1)
    assert election.state == "joining fleet " + "e" * 16
    assert installed("a", view_of("ab")).state == "leading"
    assert installed("b", view_of("ab")).state == "member"
