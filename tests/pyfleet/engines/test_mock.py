"""What only the mock engine promises: init in threads, and misuse told by name."""
import threading
import time

import numpy as np
import pytest

import pyfleet
from pyfleet import engines
from pyfleet.engines.mock import make_world
from pyfleet.errors import ConfigError, NotEnoughPeers, OutOfStep, PeerLost, ShapeError, Timeout


def on_threads(*functions):
    """What the functions returned or raised, each called on a thread of its own."""
    ends = [None] * len(functions)

    def run(number):
        try:
            ends[number] = functions[number]()
        except Exception as error:      # noqa: BLE001 looked at by the test
            ends[number] = error
    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return ends


def in_world(size, function, timeout=20.0):
    """function(engine) on every rank."""
    world = make_world(size, timeout)
    ends = on_threads(*(lambda engine=engine: function(engine) for engine in world))
    for engine in world:
        engine.close()
    return ends


@pytest.mark.feature("A13")
def test_threads_that_call_init_become_ranks():
    def rank(number):
        fleet = pyfleet.init(backend="mock", rank=number, world_size=3)
        x = np.array([fleet.rank + 1.0])
        pyfleet.all_reduce(x)
        assert pyfleet.is_initialized()
        pyfleet.shutdown()
        assert not pyfleet.is_initialized()
        return number, fleet.rank, fleet.world_size, fleet.local_world_size, x[0]
    assert on_threads(*(lambda n=n: rank(n) for n in range(3))) == [(n, n, 3, 3, 6.0) for n in range(3)]
    assert not pyfleet.is_initialized()


def test_ranks_that_do_not_come_are_named():
    started = time.monotonic()
    end, = on_threads(lambda: pyfleet.init(backend="mock", rank=1, world_size=3, timeout=0.2))
    assert isinstance(end, NotEnoughPeers)
    assert str(end) == "found 1 of 3 ranks within 0.2 s; missing: 0, 2"
    assert time.monotonic() - started < 3


def test_a_rank_that_is_taken_is_refused():
    def rank_0():
        return pyfleet.init(backend="mock", rank=0, world_size=2, timeout=1)
    kinds = {type(end) for end in on_threads(rank_0, rank_0)}
    assert kinds == {ConfigError, NotEnoughPeers}


def call_differently(engine):
    if engine.rank == 1:
        engine.broadcast(np.zeros(4, np.float32), 0)
    else:
        engine.all_reduce(np.zeros(4, np.float32))


@pytest.mark.parametrize(("call", "mine", "others"), [
    (call_differently, "broadcast(float32[4], src=0)", "all_reduce(float32[4], sum)"),
    (lambda e: e.all_reduce(np.zeros(3 + (e.rank == 1))), "all_reduce(float64[4], sum)", "all_reduce(float64[3], sum)"),
    (lambda e: e.all_reduce(np.zeros(3), "min" if e.rank == 1 else "max"), "all_reduce(float64[3], min)",
     "all_reduce(float64[3], max)"),
    (lambda e: e.all_reduce(np.zeros(2, np.int8 if e.rank == 1 else np.uint8)), "all_reduce(int8[2], sum)",
     "all_reduce(uint8[2], sum)"),
    (lambda e: e.reduce(np.zeros(2), dst=e.rank == 1), "reduce(float64[2], sum, dst=True)",
     "reduce(float64[2], sum, dst=False)"),
    (lambda e: e.all_gather_into(np.zeros(6), np.zeros(2), [2, 2, 2]) if e.rank == 1
     else e.all_gather_into(np.zeros(5), np.zeros((2, 1, 2)[e.rank]), [2, 1, 2]),
     "all_gather(float64, counts=[2, 2, 2])", "all_gather(float64, counts=[2, 1, 2])"),
    (lambda e: e.new_group([0, 1] if e.rank == 1 else [0]), "new_group([0, 1])", "new_group([0])"),
], ids=("verb", "size", "op", "dtype", "root", "counts", "members"))
def test_mismatched_calls_are_told_by_name_to_every_rank(call, mine, others):
    ends = in_world(3, call)
    assert all(isinstance(end, OutOfStep) for end in ends), ends
    assert str(ends[0]) == f"out of step: rank 0 called {others} while rank 1 called {mine} (operation 1 of epoch 0)"
    assert f"rank 1 called {mine} while rank " in str(ends[1])
    assert [end.rank for end in ends][::2] == [1, 1]


def test_a_late_rank_is_a_timeout_for_all():
    late = threading.Event()

    def barrier(engine):
        try:
            if engine.rank == 1:
                late.wait(10)
            engine.barrier(timeout=0.2)
        finally:
            late.set()
    ends = in_world(3, barrier)
    assert all(isinstance(end, Timeout) for end in ends), ends
    assert [end.rank for end in ends] == [1, 1, 1]
    assert "timed out after 0.2 s waiting for rank 1" in str(ends[0])


def test_a_group_is_dead_after_its_first_failure():
    def twice(engine):
        if engine.rank == 0:
            engine.close()
            with pytest.raises(pyfleet.FleetError, match="closed"):
                engine.barrier()
            return "left"
        with pytest.raises(PeerLost) as first:
            engine.barrier()
        with pytest.raises(PeerLost, match="dead since an earlier call: rank 0 has left") as second:
            engine.all_reduce(np.zeros(1))
        return first.value.rank, second.value.rank
    assert in_world(2, twice) == ["left", (0, 0)]


def test_an_operation_all_have_joined_succeeds_though_a_rank_leaves_next():
    def leave(engine):
        x = np.ones(3)
        engine.all_reduce(x)
        engine.close()
        return x.tolist()
    for _ in range(50):
        assert in_world(3, leave) == [[3.0] * 3] * 3


def test_receiving_from_a_rank_that_left_is_told():
    def receive(engine):
        if engine.rank == 0:
            engine.isend(np.ones(1), 1, 5)
            engine.close()
            return
        assert engine.recv(lambda _: np.zeros(1), 0, 5)[1] == 0         # what was sent before still arrives
        engine.recv(lambda _: np.zeros(1), 0, 5)
    end = in_world(2, receive)[1]
    assert isinstance(end, PeerLost)
    assert end.rank == 0


def test_a_receive_times_out_at_its_own_deadline_and_a_wait_at_its():
    def receive(engine):
        if engine.rank == 0:
            over.wait(10)
            return None
        work = engine.irecv(lambda _: np.zeros(1), 0, timeout=0.3)
        assert not work.done()
        with pytest.raises(Timeout, match="recv is still under way after 0.05 s"):
            work.wait(0.05)
        try:
            with pytest.raises(Timeout, match=r"timed out after 0.3 s waiting for rank 0 during recv\(src=0, tag=0\)"):
                work.wait()
        finally:
            over.set()
        with pytest.raises(Timeout, match="dead since"):
            engine.barrier()
        return work.done()
    over = threading.Event()
    assert in_world(2, receive) == [None, True]


def test_counts_that_do_not_fit_are_refused_before_anybody_is_told():
    def misuse(engine):
        x = np.zeros(4)
        for call in (lambda: engine.all_gather_into(np.zeros(5), x), lambda: engine.all_gather_into(np.zeros(8), x, [4]),
                     lambda: engine.all_gather_into(np.zeros(8), x, [3, 5]),
                     lambda: engine.all_gather_into(np.zeros(8), x, [9, -1]),
                     lambda: engine.gather_into(np.zeros(9), x, [4, 4], engine.rank),
                     lambda: engine.gather_into(None, x, [4, 4], engine.rank),
                     lambda: engine.scatter_into(x, None, [4, 4], src=engine.rank),
                     lambda: engine.reduce_scatter_into(np.zeros(3), x, [2, 2]),
                     lambda: engine.all_to_all_into(x, x, [[2, 2]]),
                     lambda: engine.all_to_all_into(x, x, [[2, 1], [2, 2]])):
            with pytest.raises(ShapeError):
                call()
        for call in (lambda: engine.broadcast(x, 2), lambda: engine.isend(x, 1 - engine.rank, -1),
                     lambda: engine.isend(x, 1 - engine.rank, 0, bytes(257)),
                     lambda: engine.barrier(timeout=0), lambda: engine.submit("_leave"), lambda: engine.submit("sing"),
                     lambda: engine.new_group([]), lambda: engine.new_group([0, 0]), lambda: engine.new_group([2])):
            with pytest.raises(ConfigError):
                call()
        engine.all_reduce(x)
        return x.tolist()
    assert in_world(2, misuse) == [[0.0] * 4] * 2


def test_counters_say_what_was_called():
    def count(engine):
        engine.all_reduce(np.zeros(10, np.float32))
        engine.all_reduce(np.zeros(5))
        engine.barrier()
        return engine.stats()
    for stats in in_world(2, count):
        calls = {verb: (row["calls"], row["bytes"]) for verb, row in stats["operations"].items()}
        assert calls == {"all_reduce": (2, 80), "barrier": (1, 0)}
        assert stats["links"] == {}


def test_nobody_pays_once_the_mocks_are_gone():
    in_world(2, lambda engine: engine.submit("barrier").wait())
    marker = object()
    engines.set_current(marker)
    try:
        assert engines.base._current is marker
    finally:
        engines.set_current(None)
