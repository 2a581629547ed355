"""Tensors on a device: the same results as on the host, copies beside the wire, nothing left behind."""
import ctypes
import gc
import threading
from array import array

import numpy as np
import pytest
import torch

import pyfleet
from pyfleet import devices, engines
from pyfleet.errors import DTypeError, FleetError, OutOfStep, PeerLost, ReduceOp, ShapeError
from pyfleet.staging import NUM_TWINS, PIECE_BYTES, Staging, Twins, pieces
from tests.pyfleet.devices.fake import NAME, PATIENCE_S, on_device, plain, register, unregister
from tests.ranks import Ranks

PIECE = PIECE_BYTES // 4            # float32 elements


# ---- in one process ---------------------------------------------------------------------------------------------------


class Alone:
    """A group of two ranks of which the other does as this one: sums are doubles. on_call comes with each piece."""

    rank, size, epoch, timeout, failure = 0, 2, 1, 30.0, None

    def __init__(self, theirs=None):
        self.theirs, self.calls, self.closed, self.on_call = theirs, [], 0, lambda number: None

    def all_gather(self, out, data, counts, *, timeout):
        assert counts == [len(data), len(data) - 1]
        out[:len(data)] = data
        out[len(data):] = array("q", self.theirs or data[:-1])

    def all_reduce(self, pin, op, *, timeout, algorithm):
        if op != ReduceOp.SUM:
            raise DTypeError("sums only")
        self.on_call(len(self.calls))
        self.calls.append((pin.count, pin.address))
        if pin.count:
            values = np.ctypeslib.as_array(ctypes.cast(pin.address, ctypes.POINTER(ctypes.c_float)), (pin.count,))
            values *= 2

    def close(self):
        self.closed += 1


@pytest.fixture
def fake():
    device = register()
    yield device
    unregister()


def ramp(count):
    return (torch.arange(count) % 1009).float()


@pytest.mark.parametrize(("count", "width", "plan"), [
    (0, 4, [(0, 0)]), (1, 4, [(0, 1)]), (PIECE, 4, [(0, PIECE)]), (PIECE + 1, 4, [(0, PIECE), (PIECE, PIECE + 1)]),
    (2 * PIECE, 2, [(0, 2 * PIECE)]), (3 * PIECE, 8, [(at, at + PIECE // 2) for at in range(0, 3 * PIECE, PIECE // 2)]),
])
def test_pieces_depend_on_count_and_width_alone(count, width, plan):
    assert pieces(count, width) == plan


def test_copy_out_wire_and_copy_in_of_three_pieces_run_at_the_same_time(fake):
    """Each of the three waits for the other two: one after the other they would wait for ever."""
    group, num_pieces, met = Alone(), 7, []
    meetings = [threading.Barrier(3) for _ in range(num_pieces)]

    def meet(k):
        if 1 <= k < num_pieces - 1:
            meetings[k].wait(PATIENCE_S)
            met.append(k)

    fake.reset(on_copy=lambda direction, number: meet(number - 1 if direction == "out" else number + 1))
    group.on_call = meet
    x = on_device(ramp(num_pieces * PIECE - 5))
    assert Staging(group, bytearray).all_reduce(x, ReduceOp.SUM)
    assert sorted(met) == sorted(3 * list(range(1, num_pieces - 1)))
    assert torch.equal(plain(x), 2 * ramp(num_pieces * PIECE - 5))
    assert [count for count, _ in group.calls] == (num_pieces - 1) * [PIECE] + [PIECE - 5]


def test_twins_are_kept_locked_and_given_back(fake):
    group, allocated = Alone(), []

    def allocate(nbytes):
        allocated.append(nbytes)
        return bytearray(nbytes)

    staging = Staging(group, allocate)
    for count in (1, 3):                                            # what is small needs one twin only
        staging.all_reduce(on_device(ramp(count)), ReduceOp.SUM)
    assert allocated == [PIECE_BYTES]
    for _ in range(3):
        for count in (9 * PIECE, 0, PIECE + 1, 7):
            x = on_device(ramp(count))
            staging.all_reduce(x, ReduceOp.SUM)
            assert torch.equal(plain(x), 2 * ramp(count))
    assert allocated == NUM_TWINS * [PIECE_BYTES]
    assert sorted(fake.locked.values()) == allocated
    assert {address for count, address in group.calls if count == PIECE} == set(fake.locked)
    staging.close()
    staging.close()
    assert not fake.locked


def test_twins_that_nobody_closes_are_unlocked_when_they_go(fake):
    twins = Twins(fake, bytearray)
    twins.room(2, torch.float16, 5)
    assert len(fake.locked) == 3
    del twins
    gc.collect()
    assert not fake.locked


def test_a_full_arena_is_no_reason_to_fail(fake):
    def allocate(nbytes):
        raise MemoryError
    x = on_device(ramp(4 * PIECE))
    assert Staging(Alone(), allocate).all_reduce(x, ReduceOp.SUM)
    assert torch.equal(plain(x), 2 * ramp(4 * PIECE))


@pytest.mark.parametrize(("direction", "number", "through"), [("out", 0, 0), ("out", 3, 2), ("in", 0, 1), ("in", 5, 6)])
def test_a_copy_that_fails_ends_the_group_and_leaves_nothing_under_way(fake, direction, number, through):
    group, count = Alone(), 6 * PIECE
    fake.reset(fail=(direction, number))
    x, staging = on_device(ramp(count)), Staging(group, bytearray)
    with pytest.raises(RuntimeError, match="the fake device is broken"):
        staging.all_reduce(x, ReduceOp.SUM)
    assert group.closed == 1
    assert isinstance(group.failure, FleetError)
    assert "rank 0 could not finish a call: the fake device is broken" in str(group.failure)
    assert not fake.locked                                          # the twins of a dead group are given up
    started = {lane.name: lane.num_started for lane in fake.lanes.values()}
    assert {name: sum(copy[0] == name for copy in fake.copies) for name in started} == started      # all are over
    assert len(group.calls) >= through
    pieces_now = plain(x).split(PIECE)
    for k, (piece, before) in enumerate(zip(pieces_now, ramp(count).split(PIECE), strict=True)):
        came_in = k < started["in"] and (direction, number) != ("in", k)
        assert torch.equal(piece, 2 * before if came_in else before)


def test_refusals_leave_the_group_alive(fake):
    group = Alone()
    staging = Staging(group, bytearray)
    x = on_device(ramp(3 * PIECE))
    with pytest.raises(DTypeError, match="sums only"):
        staging.all_reduce(x, ReduceOp.MAX)
    with pytest.raises(DTypeError, match="not offered"):
        staging.all_reduce(on_device(torch.zeros(3, dtype=torch.uint16)), ReduceOp.SUM)
    assert group.failure is None
    assert torch.equal(plain(x), ramp(3 * PIECE))
    assert staging.all_reduce(x, ReduceOp.SUM)


def test_ranks_with_other_arrays_are_named_before_anything_is_sent(fake):
    group = Alone(theirs=[3 * PIECE + 1, 0, 0])
    x = on_device(ramp(3 * PIECE))
    with pytest.raises(OutOfStep, match=rf"float32\[{3 * PIECE}\] while rank 1 called with float32\[{3 * PIECE + 1}\]") as caught:
        Staging(group, bytearray).all_reduce(x, ReduceOp.SUM)
    assert (caught.value.rank, group.calls, group.failure) == (1, [], caught.value)
    assert torch.equal(plain(x), ramp(3 * PIECE))


def test_host_arrays_are_left_to_the_group_unless_a_peer_has_a_device(fake):
    group = Alone()
    staging = Staging(group, bytearray)
    for x in (ramp(PIECE), ramp(PIECE).numpy(), bytearray(7), 5):
        assert not staging.all_reduce(x, ReduceOp.SUM)
    assert group.calls == []
    long = ramp(2 * PIECE + 1)
    assert staging.all_reduce(long, ReduceOp.SUM)
    assert [count for count, _ in group.calls] == [2 * PIECE + 1]   # everyone on the host: one call
    group = Alone(theirs=[2 * PIECE + 1, 0, 1])
    assert Staging(group, bytearray).all_reduce(long, ReduceOp.SUM)
    assert group.calls == [(PIECE, long.data_ptr()), (PIECE, long.data_ptr() + PIECE_BYTES),
                           (1, long.data_ptr() + 2 * PIECE_BYTES)]
    with pytest.raises(ShapeError, match="to_dense"):
        staging.all_reduce(torch.ones(2 * PIECE).to_sparse(), ReduceOp.SUM)


def test_a_submitted_call_comes_after_what_its_thread_had_queued(fake):
    staging = Staging(Alone(), bytearray)
    x = on_device(ramp(8))

    def call(*args, **kwargs):
        return args, kwargs
    assert staging.in_order(call, (ramp(8), "sum")) is call
    wrapped = staging.in_order(call, ([x, ramp(3)], x, 0))
    assert (fake.marks, fake.followed) == ([0, 1], [])
    assert wrapped(1, key=2) == ((1,), {"key": 2})
    assert fake.followed == [0, 1]


# ---- across processes ----------------------------------------------------------------------------------------------------

SIZES = (0, 1, 1000, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE + 17)


def join():
    register()
    pyfleet.init()


def join_without():
    """Also on a machine that has devices."""
    devices.DEVICES.clear()
    pyfleet.init()


@pytest.fixture(scope="module", params=[(2, "shm"), (3, "shm"), (3, "tcp")], ids=lambda param: f"{param[0]}-{param[1]}")
def fleet(request):
    group = Ranks(*request.param, init=False)
    group.run(join)
    yield group
    group.close()


def placed(values, where):
    """Values where each rank has them: all on the device, all on the host (torch, then numpy), or the first on the device."""
    on = where == "device" or (where == "mixed" and pyfleet.rank() == 0)
    return on_device(values) if on else values.numpy() if where == "numpy" and values.dtype != torch.bfloat16 else values


def mine(count, dtype, rank):
    values = (torch.arange(count) * 3 + 5 * rank) % 31
    return values.to(dtype)


def as_tensor(x):
    return torch.from_numpy(x) if isinstance(x, np.ndarray) else plain(x)


def reduce_all(where, dtype_name):
    rank, size, dtype = pyfleet.rank(), pyfleet.world_size(), getattr(torch, dtype_name)
    for count in SIZES:
        count = count * 4 // dtype.itemsize
        x = placed(mine(count, dtype, rank), where)
        pyfleet.all_reduce(x)
        wanted = sum(mine(count, torch.int64, r) for r in range(size)).to(dtype)
        assert torch.equal(as_tensor(x), wanted), (where, dtype, count)


@pytest.mark.parametrize("where", ["device", "mixed", "numpy"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int64"])
def test_all_reduce_is_that_of_the_host(fleet, dtype, where):
    fleet.run(reduce_all, where, dtype)


def broadcast_all(where):
    rank, size = pyfleet.rank(), pyfleet.world_size()
    for src in (0, size - 1):
        for count in SIZES:
            x = placed(mine(count, torch.float32, rank), where)
            pyfleet.broadcast(x, src)
            assert torch.equal(as_tensor(x), mine(count, torch.float32, src))


@pytest.mark.parametrize("where", ["device", "mixed", "numpy"])
def test_broadcast_is_that_of_the_host(fleet, where):
    fleet.run(broadcast_all, where)


def odd_layouts():
    rank, size = pyfleet.rank(), pyfleet.world_size()
    total = size * (size - 1) // 2
    base = torch.zeros(3000, 1400)
    x = on_device(base)[:, ::2].t()                                 # 8.4 MB, not contiguous
    x += rank
    pyfleet.all_reduce(x, "max")
    assert torch.equal(plain(x), torch.full((700, 3000), float(size - 1)))
    assert torch.count_nonzero(base[:, 1::2]) == 0
    pyfleet.broadcast(on_device(base)[:, ::2].t().mul_(0).add_(rank), size - 1)
    assert torch.equal(base[:, ::2], torch.full((3000, 700), float(size - 1)))
    z = on_device(torch.full((PIECE,), complex(rank, 1)))           # two pieces
    pyfleet.all_reduce(z.conj())
    assert torch.equal(plain(z), torch.full((PIECE,), complex(total, size)))
    scalar = on_device(torch.tensor(2.0, requires_grad=True))
    pyfleet.all_reduce(scalar)
    assert plain(scalar).item() == 2 * size


def test_any_layout_on_a_device(fleet):
    fleet.run(odd_layouts)


def other_verbs():
    rank, size = pyfleet.rank(), pyfleet.world_size()
    x = on_device(torch.full((PIECE + 3,), float(rank)))
    out = on_device(torch.empty(size * (PIECE + 3)))
    pyfleet.all_gather_into(out, x)
    assert torch.equal(plain(out).view(size, -1), torch.arange(size)[:, None].expand(-1, PIECE + 3).float())
    pyfleet.reduce(x, size - 1)
    assert plain(x)[7].item() == (size * (size - 1) // 2 if rank == size - 1 else rank)
    part = on_device(torch.empty(5))
    engines.current().reduce_scatter_into(part, on_device(torch.ones(size * 5)), [5] * size)
    assert torch.equal(plain(part), torch.full((5,), float(size)))
    ones = [torch.ones(PIECE + k) for k in range(3)]
    works = [pyfleet.all_reduce(on_device(y), async_op=True) for y in ones]
    for work, y in zip(works, ones, strict=True):
        work.wait()
        assert torch.equal(y, torch.full(y.shape, float(size)))


def test_other_verbs_and_submitted_calls(fleet):
    fleet.run(other_verbs)


def steady():
    from pyfleet.devices import open_device
    device, arena = open_device(NAME), engines.current().wired.arena
    x = on_device(torch.ones(5 * PIECE))
    seen = set()
    for _ in range(4):
        pyfleet.all_reduce(x, "max")
        seen.add((arena.used_bytes, device.num_locks, tuple(device.locked)))
    assert len(seen) == 1
    assert set(device.locked.values()) == {PIECE_BYTES}
    assert len(device.locked) == NUM_TWINS


def test_the_steady_state_allocates_nothing(fleet):
    fleet.run(steady)


def spans_of(call):
    """(what call returns, when this rank's all_reduce calls of the group began and ended meanwhile)."""
    engine = engines.current()
    pyfleet.barrier()
    engine.record()
    result = call()
    wire = [(began, ended) for verb, _, began, ended, _ in engine.recorded() if verb == "all_reduce"]
    engine.record(False)
    return result, wire


def seconds_of(spans):
    return sum(ended - began for began, ended in spans)


def timed(num_pieces):
    from pyfleet.devices import open_device
    device, x = open_device(NAME), on_device(torch.zeros(num_pieces * PIECE))
    device.reset()
    pyfleet.all_reduce(x)                               # twins exist, links are warm
    _, wire = spans_of(lambda: pyfleet.all_reduce(x))
    slowest = torch.tensor([seconds_of(wire)])
    pyfleet.all_reduce(slowest, "max")
    # Copies as fast as the wire show most; 5 ms a piece, so that the scheduler of a busy machine does not.
    copy_s = max(slowest.item() / num_pieces, 0.005)
    device.reset(bytes_per_s=PIECE_BYTES / copy_s)
    _, wire = spans_of(lambda: pyfleet.all_reduce(x))
    spans = {name: [copy[2:] for copy in device.copies if copy[0] == name] for name in ("out", "in")} | {"wire": wire}
    device.reset()
    return spans


def test_a_long_call_takes_far_less_than_its_parts(fleet):
    num_pieces = 12
    for spans in fleet.run(timed, num_pieces):
        assert {name: len(each) for name, each in spans.items()} == dict.fromkeys(spans, num_pieces)
        total = spans["in"][-1][1] - spans["out"][0][0]
        parts = {name: seconds_of(each) for name, each in spans.items()}
        print(f"total {1e3 * total:.0f} ms;", ", ".join(f"{name} {1e3 * s:.0f}" for name, s in parts.items()))
        assert total < 0.75 * sum(parts.values())


def in_groups():
    rank = pyfleet.rank()
    for count in (5, 2 * PIECE + 1):
        x = on_device(torch.ones(count)) if rank == 0 else np.ones(count, np.float32)
        pyfleet.all_reduce(x)
        assert torch.equal(as_tensor(x), torch.full((count,), 3.0))
    hosts, both = pyfleet.new_group([1, 2]), pyfleet.new_group([2, 0])
    for group in (hosts, both):
        if group.engine is not None:
            x = on_device(torch.ones(2 * PIECE + 1)) if rank == 0 else np.ones(2 * PIECE + 1, np.float32)
            pyfleet.all_reduce(x, group=group)
            assert torch.equal(as_tensor(x), torch.full((2 * PIECE + 1,), 2.0))
    return [engine is not None and engine._staging is not None for engine in (engines.current(), hosts.engine, both.engine)]


def test_ranks_without_a_device_learn_from_the_cards_who_has_one(fresh_ranks):
    group = fresh_ranks(3, "shm", init=False)
    group.start(join, only=[0])
    group.start(join_without, only=[1, 2])
    group.collect()
    assert group.run(in_groups) == [[True, False, True], [True, False, False], [True, False, True]]


def untouched():
    x = np.ones(2 * PIECE + 1, np.float32)
    pyfleet.all_reduce(torch.from_numpy(x))
    engine = engines.current()
    return engine._staging is None, engine.quick == engine.group.quick_all_reduce, list(engine.stats()["operations"])


def test_a_fleet_without_devices_says_nothing_more(fresh_ranks):
    group = fresh_ranks(2, "shm", init=False)
    group.run(join_without)
    assert group.run(untouched) == 2 * [(True, True, ["all_reduce"])]


# ---- ranks that fail ---------------------------------------------------------------------------------------------------


def copy_fails(rank, fail):
    from pyfleet.devices import open_device
    if pyfleet.rank() == rank:
        open_device(NAME).reset(fail=fail)
    x = on_device(torch.ones(5 * PIECE))
    try:
        pyfleet.all_reduce(x, timeout=PATIENCE_S)
    except Exception as error:      # noqa: BLE001 the test looks at it
        caught = error
    before_or_after = {1.0, float(pyfleet.world_size())}
    assert set(plain(x).unique().tolist()) <= before_or_after
    with pytest.raises(FleetError, match="the group is dead"):
        pyfleet.all_reduce(x)
    return type(caught), str(caught), getattr(caught, "rank", None)


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("fail", [("out", 0), ("out", 3), ("in", 0)])
def test_peers_learn_at_once_that_a_copy_failed(fresh_ranks, transport, fail):
    group = fresh_ranks(3, transport, init=False)
    group.run(join)
    told = group.run(copy_fails, 1, fail)
    assert told[1][:2] == (RuntimeError, "the fake device is broken")
    assert all(issubclass(told[rank][0], PeerLost) and told[rank][2] == 1 for rank in (0, 2))


def out_of_step(counts):
    x = on_device(torch.ones(counts[pyfleet.rank()]))
    with pytest.raises((OutOfStep, PeerLost)) as caught:
        pyfleet.all_reduce(x, timeout=PATIENCE_S)
    assert torch.count_nonzero(plain(x) - 1) == 0
    return caught.type.__name__


@pytest.mark.parametrize("counts", [(2 * PIECE, 3 * PIECE), (PIECE, 2 * PIECE), (5, PIECE + 1)])
def test_other_sizes_are_out_of_step_never_garbage(fresh_ranks, counts):
    group = fresh_ranks(2, "shm", init=False)
    group.run(join)
    assert "OutOfStep" in group.run(out_of_step, counts)
