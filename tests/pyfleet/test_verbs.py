"""The verbs beyond all_reduce, across real processes: arrays of any kind and shape, objects, groups, errors."""
import signal
import threading
import time

import numpy as np
import pytest
import torch

import pyfleet
from pyfleet import engines

TRANSPORTS = ("shm", "tcp")
SIZES = (1, 2, 3, 5, 8)
KINDS = ("float64", "float32", "float16", "bfloat16", "int8", "int16", "int32", "int64", "uint8", "bool", "complex64")


def made(rank, shape, dtype="float32", like="torch"):
    """An array that only rank makes, and everyone can make, too."""
    count = int(np.prod(shape))
    values = torch.from_numpy((np.arange(count) * 7 + 13 * rank + count) % 101).reshape(shape)
    values = (values > 50) if dtype == "bool" else values.to(getattr(torch, dtype))
    return values if like == "torch" or dtype == "bfloat16" else values.numpy()


def same(a, b):
    """Equal in kind, dtype, shape and content."""
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a, b)
    return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


def shape_of(rank):
    return ((), (0,), (3, 2), (1, 5, 2), (4001,), (2, 1500))[rank % 6]


def every_verb(dtype, like):
    rank, size = pyfleet.rank(), pyfleet.world_size()
    for shape in ((), (0,), (1,), (3, 5), (30_011,)):
        mine = made(rank, shape, dtype, like)
        assert all(map(same, pyfleet.all_gather(mine), [made(r, shape, dtype, like) for r in range(size)]))
        assert same(mine, made(rank, shape, dtype, like))
    for root in {0, size - 1}:
        gathered = pyfleet.gather(made(rank, shape_of(rank), dtype, like), root)
        assert (gathered is None) == (rank != root)
        if rank == root:
            assert all(map(same, gathered, [made(r, shape_of(r), dtype, like) for r in range(size)]))
        parts = [made(10 * root + r, shape_of(r + 1), dtype, like) for r in range(size)] if rank == root else None
        assert same(pyfleet.scatter(parts, root), made(10 * root + rank, shape_of(rank + 1), dtype, like))
    came = pyfleet.all_to_all([made(rank * size + j, shape_of(rank + 2 * j), dtype, like) for j in range(size)])
    assert all(map(same, came, [made(i * size + rank, shape_of(i + 2 * rank), dtype, like) for i in range(size)]))
    op = "max" if dtype != "complex64" else "sum"
    for rows in (0, 1, size + 2, 5000):
        mine = made(rank, (rows, 3), dtype, like)
        part = pyfleet.reduce_scatter(mine, op)
        pyfleet.all_reduce(mine, op)
        bounds = [rows * r // size for r in range(size + 1)]
        assert same(part, mine[bounds[rank]:bounds[rank + 1]])
        whole = made(rank, (rows, 3), dtype, like)
        pyfleet.reduce(whole, size - 1, op)
        assert same(whole, mine if rank == size - 1 else made(rank, (rows, 3), dtype, like))


@pytest.mark.feature("M19", "C11", "C12")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_every_verb_of_every_dtype_equals_what_it_says(ranks, transport, size):
    group = ranks(size, transport)
    for dtype in KINDS:
        group.run(every_verb, dtype, "torch" if dtype in ("bfloat16", "int16", "float32") else "numpy")


def test_every_verb_through_staging(ranks):
    ranks(3, "shm", PYFLEET_SAME_HOST="staging").run(every_verb, "float32", "torch")


def layouts():
    rank, size = pyfleet.rank(), pyfleet.world_size()
    x = torch.arange(12.).reshape(3, 4).t() + rank                   # not contiguous
    assert all(torch.equal(part, torch.arange(12.).reshape(3, 4).t() + r) for r, part in enumerate(pyfleet.all_gather(x)))
    out = torch.zeros(4, 3 * size)[:, ::3]
    pyfleet.all_gather_into(out, torch.full((4,), float(rank)))
    assert torch.equal(out.reshape(-1), torch.arange(size).repeat_interleave(4).float())
    y = pyfleet.zeros(size * 1000, like="numpy")
    y[rank * 1000:(rank + 1) * 1000] = rank
    pyfleet.all_gather_into(y, y[rank * 1000:(rank + 1) * 1000])
    assert (y == np.arange(size).repeat(1000)).all()
    frozen = np.arange(5.)
    frozen.flags.writeable = False                                    # inputs are only read
    assert (pyfleet.all_gather(frozen)[rank] == frozen).all()
    leaf = torch.ones(6, requires_grad=True)
    assert not pyfleet.reduce_scatter(leaf).requires_grad


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_layouts_and_places(ranks, transport):
    ranks(3, transport).run(layouts)


def objects():
    rank, size = pyfleet.rank(), pyfleet.world_size()
    mine = {"rank": rank, "text": "ü" * rank, "nested": [1, 2.5, None, True, {"a": [rank]}]}
    everyone = [{"rank": r, "text": "ü" * r, "nested": [1, 2.5, None, True, {"a": [r]}]} for r in range(size)]
    assert pyfleet.all_gather_object(mine) == everyone
    for src in range(size):
        assert pyfleet.broadcast_object(mine if rank == src else object(), src) == everyone[src]
    with pytest.raises(pyfleet.ConfigError, match="JSON-like"):
        pyfleet.all_gather_object(object())
    with pytest.raises(pyfleet.ConfigError, match="JSON-like"):
        pyfleet.all_gather_object({1j: 2})
    assert pyfleet.all_gather_object("x" * 100_000 * rank)[size - 1] == "x" * 100_000 * (size - 1)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_objects_travel_as_json_and_nothing_else_does(ranks, transport):
    ranks(3, transport).run(objects)


def asynchronous():
    rank, size = pyfleet.rank(), pyfleet.world_size()
    x = torch.full((5000,), float(rank))
    works = [pyfleet.all_gather(x, async_op=True), pyfleet.gather(x, 1, async_op=True), pyfleet.reduce_scatter(x, async_op=True),
             pyfleet.scatter([x + r for r in range(size)] if rank == 0 else None, async_op=True),
             pyfleet.all_to_all([x + r for r in range(size)], async_op=True), pyfleet.barrier(async_op=True)]
    late = pyfleet.all_gather(x)                                    # queues behind them
    assert all(work.done() for work in works) and len(late) == size
    gathered, to_one, part, own, came, _ = [work.wait() for work in works]
    assert [float(g[0]) for g in gathered] == list(range(size)) and (to_one is None) == (rank != 1)
    assert (part == sum(range(size))).all() and (own == rank).all() and [float(c[0]) for c in came] == [r + rank for r in range(size)]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_works_of_all_verbs_return_their_results(ranks, transport):
    ranks(3, transport).run(asynchronous)


# ---- groups ------------------------------------------------------------------------------------------------------------

def even_and_odd():
    rank, size = pyfleet.rank(), pyfleet.world_size()
    even, odd = pyfleet.new_group(range(0, size, 2)), pyfleet.new_group(range(1, size, 2))
    mine, other = (odd, even) if rank % 2 else (even, odd)
    assert mine.rank == rank // 2 and other.rank is None and mine.size == len(mine.ranks)
    x = np.full(1000, float(rank))
    pyfleet.all_reduce(x, group=mine)
    assert (x == sum(mine.ranks)).all()
    root = mine.ranks[-1]
    y = np.full(10, rank)
    pyfleet.broadcast(y, root, group=mine)                          # ranks keep their numbers of the fleet
    assert (y == root).all()
    assert pyfleet.all_gather_object(rank, group=mine) == list(mine.ranks)
    for bad in (lambda: pyfleet.all_reduce(x, group=other), lambda: pyfleet.broadcast(y, other.ranks[0], group=mine),
                lambda: pyfleet.new_group([]), lambda: pyfleet.new_group([0, 0]), lambda: pyfleet.new_group([size]),
                lambda: pyfleet.all_reduce(x, group="even")):
        with pytest.raises(pyfleet.ConfigError):
            bad()
    back = pyfleet.new_group(reversed(range(size)))
    assert back.rank == size - 1 - rank and pyfleet.all_gather_object(rank, group=back) == list(range(size))[::-1]
    alone = pyfleet.new_group([1])
    if rank == 1:
        pyfleet.all_reduce(x, group=alone)
    pyfleet.barrier()
    for group in (even, odd, back, alone):
        group.close()
    pyfleet.barrier()


@pytest.mark.feature("A3", "A12")
@pytest.mark.parametrize("size", (3, 4))
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_groups_of_even_and_odd_ranks(ranks, transport, size):
    ranks(size, transport).run(even_and_odd)


def two_groups_at_once(count):
    """Overlapping groups used by two threads in opposite order of creation: neither waits for the other."""
    rank, size = pyfleet.rank(), pyfleet.world_size()
    left, right = pyfleet.new_group(range(size - 1)), pyfleet.new_group(range(1, size))
    errors = []

    def work(group):
        try:
            for k in range(40):
                x = np.full(count, float(rank + k), np.float32)
                pyfleet.all_reduce(x, group=group)
                assert (x == sum(group.ranks) + k * group.size).all()
                assert pyfleet.all_gather_object(k, group=group) == [k] * group.size
        except BaseException as error:      # noqa: BLE001 the test wants to see it, whatever it is
            errors.append(error)
    threads = [threading.Thread(target=work, args=(group,)) for group in (left, right) if group.rank is not None]
    for thread in threads if rank % 2 else threads[::-1]:
        thread.start()
    for k in range(20):                                             # and the whole fleet goes on meanwhile
        x = np.full(count, 1.0)
        pyfleet.all_reduce(x)
        assert (x == size).all()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    pyfleet.barrier()
    left.close()
    right.close()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("count", (3, 40_000))
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_two_groups_at_once_never_deadlock(ranks, transport, count):
    ranks(3, transport).run(two_groups_at_once, count)


def lose_a_group_member():
    rank = pyfleet.rank()
    group = pyfleet.new_group([1, 2])
    if rank == 1:
        with pytest.raises(pyfleet.PeerLost) as caught:
            while True:
                pyfleet.all_reduce(np.ones(1000), group=group)
        return caught.value.rank
    if rank == 2:
        time.sleep(0.2)
        pyfleet.shutdown()
    return None


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_member_that_leaves_is_lost_to_its_groups(fresh_ranks, transport):
    group = fresh_ranks(3, transport)
    group.start(lose_a_group_member)
    assert group.collect()[1] is not None


# ---- faults ------------------------------------------------------------------------------------------------------------

VERBS = {
    "reduce": lambda: pyfleet.reduce(np.ones(100_000)),
    "all_gather": lambda: pyfleet.all_gather(np.ones(100_000)),
    "gather": lambda: pyfleet.gather(np.ones(100_000)),
    "scatter": lambda: pyfleet.scatter([np.ones(1000)] * 3 if pyfleet.rank() == 0 else None),
    "reduce_scatter": lambda: pyfleet.reduce_scatter(np.ones(100_000)),
    "all_to_all": lambda: pyfleet.all_to_all([np.ones(10_000)] * 3),
    "broadcast": lambda: pyfleet.broadcast(np.ones(100_000)),
    "all_reduce": lambda: pyfleet.all_reduce(np.ones(100_000)),
    "barrier": lambda: pyfleet.barrier(),
    "all_gather_object": lambda: pyfleet.all_gather_object("x"),
}


def until_it_fails(verb):
    try:
        while True:
            VERBS[verb]()
            if verb in ("gather", "scatter", "broadcast", "reduce"):
                pyfleet.barrier()                                   # a source that is never waited for runs ahead
    except pyfleet.FleetError as error:
        return type(error).__name__, error.rank


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_death_in_any_verb_names_the_dead(fresh_ranks, transport, verb):
    group = fresh_ranks(3, transport)
    group.start(until_it_fails, verb)
    time.sleep(0.15)
    group.kill(2)
    died = time.monotonic()
    assert group.collect((0, 1)) == [("PeerLost", 2)] * 2
    assert time.monotonic() - died < 2


WAITS = VERBS | {"recv": lambda: pyfleet.recv(src=1), "irecv": lambda: pyfleet.irecv().wait(),
                 "async": lambda: pyfleet.all_reduce(np.ones(3), async_op=True).wait()}


def wait_for_ctrl_c(verb):
    try:
        WAITS[verb]()
        VERBS["barrier"]()
    except KeyboardInterrupt:
        return "interrupted"


@pytest.mark.parametrize("verb", WAITS)
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_ctrl_c_interrupts_every_verb(fresh_ranks, transport, verb):
    group = fresh_ranks(3, transport)
    group.start(wait_for_ctrl_c, verb, only=(0,))                   # the others never come
    time.sleep(0.2)
    group.kill(0, signal.SIGINT)
    started = time.monotonic()
    assert group.collect((0,)) == ["interrupted"]
    assert time.monotonic() - started < 1


def bad_input():
    rank, size = pyfleet.rank(), pyfleet.world_size()
    for call, error in (
        (lambda: pyfleet.all_gather([1, 2]), pyfleet.DTypeError),
        (lambda: pyfleet.all_gather(np.array(["a"])), pyfleet.DTypeError),
        (lambda: pyfleet.reduce(np.zeros(3), size), pyfleet.ConfigError),
        (lambda: pyfleet.reduce(np.zeros(3), op="median"), pyfleet.ConfigError),
        (lambda: pyfleet.reduce_scatter(np.float64(3)), pyfleet.DTypeError),
        (lambda: pyfleet.reduce_scatter(np.zeros(())), pyfleet.ShapeError),
        (lambda: pyfleet.reduce_scatter(np.zeros(4, int), "mean"), pyfleet.DTypeError),
        (lambda: pyfleet.all_gather_into(np.zeros(3), np.zeros(3)), pyfleet.ShapeError),
        (lambda: pyfleet.all_gather_into(np.zeros(3 * size, np.float32), np.zeros(3)), pyfleet.DTypeError),
        (lambda: pyfleet.all_to_all([np.zeros(3)] * (size + 1)), pyfleet.ShapeError),
        (lambda: pyfleet.all_to_all(np.zeros(3)), pyfleet.ShapeError),
        (lambda: pyfleet.all_to_all([np.zeros(3)] * (size - 1) + [np.zeros(3, int)]), pyfleet.DTypeError),
        (lambda: pyfleet.gather(np.zeros(3), -1), pyfleet.ConfigError),
        (lambda: pyfleet.gather(np.zeros(3, ("f4", "f8")[rank % 2])), pyfleet.DTypeError),
    ):
        with pytest.raises(error):
            call()
    if rank == 0:
        with pytest.raises(pyfleet.ShapeError):
            pyfleet.scatter([np.zeros(3)] * (size - 1))
    assert engines.current().group.failure is None
    pyfleet.barrier()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_bad_input_is_refused_and_the_group_lives_on(ranks, transport):
    ranks(2, transport).run(bad_input)
