"""One contract, every engine: the checks of contract.py over processes (fleet, gloo) and threads (mock)."""
import pytest

import pyfleet
from pyfleet.testing import run_ranks
from tests.pyfleet.engines import contract
from tests.ranks import Ranks

KINDS = ("fleet-shm", "fleet-tcp", "gloo", "mock")
COMPARING = ("fleet-shm", "fleet-tcp", "mock")      # engines that notice ranks out of step


class Threads:
    """As tests.ranks.Ranks, with threads."""

    def __init__(self, size):
        self.size = size

    def run(self, function, *args, errors=False):
        def keep(*given):
            try:
                return function(*given)
            except Exception as error:
                if errors:
                    return error
                raise
        return run_ranks(keep, self.size, *args, timeout=100)


def join(backend):
    pyfleet.init(backend=backend)


@pytest.fixture(scope="module")
def gloo_pool():
    pool = {}
    yield pool
    for group in pool.values():
        group.close()


@pytest.fixture
def crew(ranks, gloo_pool):
    """crew(kind, size): ranks of a fleet, shared between tests."""
    def get(kind, size):
        if kind == "mock":
            return Threads(size)
        if kind != "gloo":
            return ranks(size, kind.removeprefix("fleet-"))
        if size not in gloo_pool:
            for group in gloo_pool.values():        # one at a time: idle processes still cost memory
                group.close()
            gloo_pool.clear()
            gloo_pool[size] = Ranks(size, init=False)
            gloo_pool[size].run(join, "gloo")
        return gloo_pool[size]
    return get


@pytest.fixture
def fresh_crew(fresh_ranks):
    """As crew, made for this test: its ranks may fail."""
    def get(kind, size):
        if kind == "mock":
            return Threads(size)
        group = fresh_ranks(size, kind.removeprefix("fleet-") if kind != "gloo" else "auto", init=kind != "gloo")
        if kind == "gloo":
            group.run(join, "gloo")
        return group
    return get


@pytest.mark.feature("A13", "A14", "A15", "P8")
@pytest.mark.parametrize(("size", "name"), sorted((size, name) for name, size in contract.CASES))
@pytest.mark.parametrize("kind", KINDS)
def test_engine(crew, kind, size, name):
    check, _ = contract.CHECKS[name]
    contract.judge(name, crew(kind, size).run(check))


@pytest.mark.parametrize("size", (2, 3))
@pytest.mark.parametrize("kind", KINDS)
def test_a_late_rank_ends_the_group_at_the_deadline(fresh_crew, kind, size):
    *ends, last = fresh_crew(kind, size).run(contract.late)
    assert last is None
    for first, second, text, took in ends:
        assert first == "Timeout" or (kind == "gloo" and first == "PeerLost"), ends
        assert (second, "dead since an earlier call" in text) == (first, True)
        assert 0.2 < took < 3
    assert "Timeout" in {first for first, *_ in ends}


@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_that_leaves_is_lost(fresh_crew, kind):
    *ends, last = fresh_crew(kind, 3).run(contract.leaving)
    assert last is None
    assert {name for name, _ in ends} == {"PeerLost"}
    assert max(took for _, took in ends) < 10


@pytest.mark.parametrize("mismatch", ("size", "dtype", "op", "root", "counts", "verb"))
@pytest.mark.parametrize("kind", COMPARING)
def test_ranks_out_of_step_are_told_both_calls(fresh_crew, kind, mismatch):
    for error in fresh_crew(kind, 3).run(contract.out_of_step, mismatch, errors=True):
        assert isinstance(error, pyfleet.OutOfStep), error
        mine, _, theirs = str(error).partition(" while ")
        assert "called" in mine
        assert "called" in theirs
        assert error.rank is not None
