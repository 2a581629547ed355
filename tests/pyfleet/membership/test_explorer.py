"""Elections of two and three nodes in all orders of events, up to bounds."""
import pytest

from pyfleet.membership import ballots, election
from tests.pyfleet.membership.explorer import Breach, Explorer, Local, changing, joining, starting

STARTS = {
    "founding": lambda: starting("abc", settled=False),
    "founding all": lambda: starting("abc", settled=False, min_nodes=3),
    "settled": lambda: starting("abc", min_nodes=3),
    "joining": lambda: joining("ab", "c"),
    "changing": lambda: changing("abc"),
}


@pytest.fixture(autouse=True)
def _fresh():
    """What is remembered of steps belongs to the code under test."""
    Local._all.clear()
    yield
    Local._all.clear()


@pytest.mark.parametrize("names,bounds,least", [
    ("ab", {"faults": 2, "ticks": 2, "restarts": 1}, 5_000),
    ("abc", {"faults": 1, "ticks": 0, "restarts": 1}, 3_000),
    ("abc", {"faults": 2, "ticks": 0, "restarts": 0}, 10_000),
])
def test_every_state(names, bounds, least):
    explorer = Explorer(starting(names, min_nodes=len(names)), **bounds).run(states=100_000)
    assert explorer.is_complete
    assert explorer.num_states > least
    assert explorer.num_endings > least / 60


@pytest.mark.parametrize("start", STARTS)
def test_many_states_with_two_faults(start):
    explorer = Explorer(STARTS[start](), faults=2, ticks=4, restarts=2, seed=1, sample=100).run(states=40_000)
    assert explorer.num_endings == 400


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("seed", range(3))
def test_more_states_with_two_faults(start, seed):
    explorer = Explorer(STARTS[start](), faults=2, ticks=8, restarts=2, seed=seed, sample=100).run(states=1_000_000)
    assert explorer.num_endings >= 10_000


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_state_with_a_fault_a_timer_and_a_restart():
    explorer = Explorer(starting("abc", min_nodes=3), faults=1, ticks=1, restarts=1, sample=500).run(states=5_000_000)
    assert explorer.is_complete


def test_a_quorum_of_any_half_is_found_out(monkeypatch):
    right = ballots.is_quorum

    def any_half(view, voters, dead=frozenset()):
        return 2 * len(set(voters) & set(view.peers)) >= len(view.peers) or right(view, voters, dead)
    monkeypatch.setattr(ballots, "is_quorum", any_half)
    monkeypatch.setattr(election, "is_quorum", any_half)
    with pytest.raises(Breach, match="two views of one epoch") as breach:
        Explorer(starting("ab", min_nodes=2), faults=1, ticks=2).run(states=50_000)
    assert any("cut" in line for line in breach.value.trace)


@pytest.mark.parametrize("names", ["ab", "abc"])
def test_silence_taken_for_death_is_found_out(monkeypatch, names):
    right = election.Election.down
    monkeypatch.setattr(election.Election, "down", lambda self, peer, incarnation, dead, now:
                        right(self, peer, incarnation, True, now))
    with pytest.raises(Breach, match="two views of one epoch"):
        Explorer(starting(names, min_nodes=len(names)), faults=1, ticks=2, restarts=0, seed=1).run(states=50_000)


def test_a_join_that_is_never_answered_is_found_out(monkeypatch):
    monkeypatch.setattr(election.Election, "_on_join", lambda self, peer, message: [])
    with pytest.raises(Breach, match="a fair ending"):
        Explorer(joining("ab", "c"), faults=0, ticks=2, sample=1).run(states=1_000)
