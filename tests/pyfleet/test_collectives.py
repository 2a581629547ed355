"""The functional API across real processes, over shared memory and over TCP."""
import ctypes
import gc
import hashlib
import sys
import threading
import time

import numpy as np
import pytest
import torch

import pyfleet
from pyfleet import engines

SIZES = (1, 2, 3, 4, 5, 8)
TRANSPORTS = ("shm", "tcp")
OPS = ("sum", "mean", "min", "max", "product")
DTYPES = ("float64", "float32", "float16", "bfloat16", "int8", "int16", "int32", "int64", "uint8", "bool")
NUMPY = {"sum": np.add, "mean": np.add, "min": np.minimum, "max": np.maximum, "product": np.multiply}
BOOL = {"sum": np.logical_or, "max": np.logical_or, "min": np.logical_and, "product": np.logical_and}


def sample(dtype, shape, rank, seed=0):
    """What rank contributes, as a torch tensor that any other rank can make, too: 4099 random values over and over."""
    random = np.random.default_rng([seed, rank, DTYPES.index(dtype)])
    if dtype == "bool":
        values = random.random(4099) < 0.7
    elif "float" in dtype:
        values = random.standard_normal(4099) * 3
    else:
        info = np.iinfo(dtype)
        values = random.integers(info.min, info.max, 4099, dtype, endpoint=True)
    return torch.from_numpy(np.resize(values, shape)).to(getattr(torch, dtype))


def bits(tensor):
    """The bytes of a tensor."""
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype)
    return flat.copy_(tensor.reshape(-1)).view(torch.uint8).numpy().tobytes()


def expected(op, dtype, parts):
    """The reduction in rank order; half-width floats are folded in float32 and rounded once."""
    if dtype == "bool":
        arrays = [part.numpy() for part in parts]
        total = arrays[0]
        for array in arrays[1:]:
            total = BOOL[op](total, array)
        return torch.from_numpy(np.asarray(total))
    half = dtype in ("float16", "bfloat16")
    arrays = [(part.float() if half else part).numpy() for part in parts]
    total = arrays[0]
    with np.errstate(over="ignore"):
        for array in arrays[1:]:
            total = NUMPY[op](total, array)
    if op == "mean":
        total = total / np.asarray(len(parts), total.dtype)
    total = torch.from_numpy(np.asarray(total))
    return total.to(getattr(torch, dtype)) if half else total


def offered(op, dtype):
    return op != "mean" or "float" in dtype


def grid(dtype):
    """In a rank: every op and length of one dtype; a digest of all result bits, which rank 0 has compared with numpy's."""
    rank, size = pyfleet.rank(), pyfleet.world_size()
    digest = hashlib.sha256()
    for op in OPS:
        if not offered(op, dtype):
            continue
        for shape in ((), 0, 1, size - 1, size + 1, 1009, 1_000_003):
            mine = sample(dtype, shape, rank)
            pyfleet.all_reduce(mine, op)
            if rank == 0:
                assert torch.equal(mine, expected(op, dtype, [sample(dtype, shape, r) for r in range(size)])), (op, shape)
            digest.update(bits(mine))
    return digest.hexdigest()


@pytest.mark.feature("P9", "C13", "C14", "C15", "C16", "C17", "C18", "A16", "A17", "A18", "A19", "M42")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_all_reduce_equals_numpy_with_the_same_bits_on_every_rank(ranks, transport, size, dtype):
    digests = ranks(size, transport).run(grid, dtype)
    assert len(set(digests)) == 1


def staged(dtype):
    assert engines.current().group.domain.path == "staging"
    return grid(dtype)


@pytest.mark.parametrize("dtype", ("float32", "bfloat16", "int8"))
@pytest.mark.parametrize("size", (2, 5))
def test_staging_gives_what_reading_gives(ranks, size, dtype):
    digests = ranks(size, "shm", PYFLEET_SAME_HOST="staging").run(staged, dtype)
    assert len(set(digests)) == 1


def in_arena(count, like):
    """In a rank: the in-place path, results and counters."""
    rank, size = pyfleet.rank(), pyfleet.world_size()
    x = pyfleet.empty(count, "float32", like=like)
    x[...] = 0
    x[:] = rank + 1
    before = pyfleet.fleet.current().stats()["shared_memory"]["read_bytes"]
    pyfleet.all_reduce(x)
    read = pyfleet.fleet.current().stats()["shared_memory"]["read_bytes"] - before
    assert (np.asarray(x) == size * (size + 1) / 2).all()
    return read


@pytest.mark.parametrize("like", ("numpy", "torch"))
@pytest.mark.parametrize("size", (2, 3, 8))
def test_arena_tensors_are_reduced_where_they_lie(ranks, size, like):
    count = 1_000_003
    read = ranks(size, "shm").run(in_arena, count, like)
    assert sum(read) == (size - 1) * count * 4      # every rank reads its share of the others' inputs, once


def mixed_memory():
    x = pyfleet.zeros(300_001, "float64") if pyfleet.rank() else torch.zeros(300_001, dtype=torch.float64)
    x += pyfleet.rank() + 1
    pyfleet.all_reduce(x)
    return float(x.min()), float(x.max())


def test_arena_and_ordinary_tensors_mix(ranks):
    assert ranks(3, "shm").run(mixed_memory) == [(6.0, 6.0)] * 3


def link_bytes(algorithm, count):
    engine = engines.current()
    x = np.ones(count, np.float32)
    before = {peer: link["sent_bytes"] for peer, link in engine.stats()["links"].items()}
    pyfleet.all_reduce(x, algorithm=algorithm)
    assert (x == pyfleet.world_size()).all()
    return sum(link["sent_bytes"] - before[peer] for peer, link in engine.stats()["links"].items())


@pytest.mark.feature("P10", "C5", "C23")
@pytest.mark.parametrize("size", (2, 3, 4, 5, 8))
@pytest.mark.parametrize("algorithm", ("ring", "direct"))
def test_bytes_at_the_socket_are_the_bandwidth_optimum(ranks, algorithm, size):
    count = 1_000_003
    sent = ranks(size, "tcp").run(link_bytes, algorithm, count)
    optimum = 2 * (size - 1) / size * count * 4
    assert all(0.999 * optimum < one < 1.01 * optimum for one in sent), (sent, optimum)


def forced(algorithm, dtype):
    digest = hashlib.sha256()
    for op in OPS:
        mine = sample(dtype, 50_021, pyfleet.rank())
        pyfleet.all_reduce(mine, op, algorithm=algorithm)
        if pyfleet.rank() == 0:
            parts = [sample(dtype, 50_021, rank) for rank in range(pyfleet.world_size())]
            torch.testing.assert_close(mine.float(), expected(op, dtype, parts).float(), atol=1e-4,
                                       rtol={"bfloat16": 2e-2, "float16": 2e-3}.get(dtype, 1e-5))
        digest.update(bits(mine))
    return digest.hexdigest()


@pytest.mark.parametrize("size", (2, 3, 5, 8))
@pytest.mark.parametrize("algorithm", ("ring", "direct", "tree"))
def test_every_algorithm_can_be_forced(ranks, algorithm, size):
    group = ranks(size, "tcp")
    for dtype in ("float32", "float16", "bfloat16"):
        assert len(set(group.run(forced, algorithm, dtype))) == 1
    assert group.run(chosen)[0][algorithm] > 0


def chosen():
    return engines.current().stats()["algorithms"]


def striped(num):
    digest = grid("float32")
    links = [link for link in engines.current().group.executor.links if link is not None]
    for link in links:
        carried = [stripe.stats()["sent_bytes"] for stripe in link.links]
        assert len(carried) == num and min(carried) > 0.5 * max(carried), carried
    return digest


@pytest.mark.parametrize("encryption", ("off", "on"))
@pytest.mark.parametrize("num", (2, 4))
def test_a_link_may_have_several_connections(ranks, num, encryption):
    group = ranks(3, "tcp", PYFLEET_STRIPES=str(num), PYFLEET_ENCRYPTION=encryption)
    assert len(set(group.run(striped, num))) == 1


def other_layouts():
    rank, size = pyfleet.rank(), pyfleet.world_size()
    total = size * (size + 1) / 2
    x = torch.full((40, 30), float(rank + 1)).t()
    pyfleet.all_reduce(x)
    assert not x.is_contiguous() and (x == total).all()
    base = torch.zeros(10, 10)
    pyfleet.all_reduce(base[:, 3].add_(rank + 1))
    assert (base[:, 3] == total).all() and base.sum() == total * 10
    y = np.zeros((6, 8), np.float32, order="F") + np.float32(rank + 1)
    pyfleet.all_reduce(y[::2])
    assert (y[::2] == total).all() and (y[1::2] == rank + 1).all()
    odd = np.frombuffer(bytearray(41), np.uint8)[1:].view(np.float32)[:9]        # not aligned to its elements
    odd[...] = rank + 1
    pyfleet.all_reduce(odd)
    assert (odd == total).all()
    leaf = torch.full((5,), float(rank), requires_grad=True)
    pyfleet.all_reduce(leaf)
    assert leaf.requires_grad and (leaf == sum(range(size))).all()
    z = torch.full((7,), complex(rank, -rank))
    pyfleet.all_reduce(z)
    assert (z == complex(sum(range(size)), -sum(range(size)))).all()
    conj = torch.full((4,), complex(1, rank)).conj()
    pyfleet.all_reduce(conj)
    assert (conj == complex(size, -sum(range(size)))).all()
    raw = bytearray([1, 2, 3])
    pyfleet.all_reduce(raw, "max")
    assert raw == bytearray([1, 2, 3])


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_layouts_that_are_not_contiguous_work_through_a_copy(ranks, transport):
    ranks(3, transport).run(other_layouts)


def functional():
    rank, size = pyfleet.rank(), pyfleet.world_size()
    x = np.arange(10, dtype=np.float64) + rank
    total = sum(np.arange(10.0) + r for r in range(size))
    assert (pyfleet.all_reduce_sum(x) == total).all()
    assert (pyfleet.all_reduce_mean(torch.from_numpy(x)).numpy() == total / size).all()
    assert np.allclose(pyfleet.ring_all_reduce(x), total / size)
    assert (x == np.arange(10) + rank).all()


@pytest.mark.feature("A8", "A9", "C19")
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_functional_forms_return_new_arrays(ranks, transport):
    ranks(3, transport).run(functional)


def broadcast_from(src):
    rank = pyfleet.rank()
    for count in (0, 1, 5, 3000, 1_000_003):
        x = np.full(count, rank, np.int32)
        if rank == src:
            x.flags.writeable = False           # the source is only read
        pyfleet.broadcast(x, src)
        assert (x == src).all()
        shared = pyfleet.empty(count, torch.bfloat16)
        shared[...] = rank
        pyfleet.broadcast(shared, src)
        assert (shared == src).all()


@pytest.mark.feature("C10", "A10")
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("size", (1, 2, 5, 8))
def test_broadcast_from_any_source(ranks, transport, size):
    group = ranks(size, transport)
    for src in range(size):
        group.run(broadcast_from, src)


def test_broadcast_through_staging(ranks):
    ranks(3, "shm", PYFLEET_SAME_HOST="staging").run(broadcast_from, 1)


def pass_barrier(late):
    if pyfleet.rank() == late:
        time.sleep(0.15)
    entered = time.monotonic()
    pyfleet.barrier()
    return entered, time.monotonic()


@pytest.mark.feature("C20", "A11")
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_nobody_leaves_a_barrier_before_the_last_arrives(ranks, transport):
    for late in range(3):
        times = ranks(3, transport).run(pass_barrier, late)
        assert min(left for _, left in times) >= max(entered for entered, _ in times)


def asynchronous():
    rank, size = pyfleet.rank(), pyfleet.world_size()
    tensors = [torch.full((1000 * (k + 1),), float(rank + k)) for k in range(20)]
    works = [pyfleet.all_reduce(x, async_op=True) for x in tensors]
    last = torch.ones(3)
    pyfleet.all_reduce(last)                    # a synchronous call queues behind them
    assert all(work.done() for work in works) and (last == size).all()
    for k, (x, work) in enumerate(zip(tensors, works, strict=True)):
        assert work.wait() is None and (x == sum(r + k for r in range(size))).all()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_asynchronous_calls_keep_their_order(ranks, transport):
    ranks(3, transport).run(asynchronous)


def wait_too_short():
    x = torch.ones(4)
    if pyfleet.rank() == 1:
        work = pyfleet.all_reduce(x, async_op=True)
        with pytest.raises(pyfleet.Timeout, match="still under way"):
            work.wait(0.05)
        assert not work.done()
        return work.wait() is None and float(x[0])
    threading.Event().wait(0.3)
    pyfleet.all_reduce(x)
    return float(x[0])


def test_waiting_has_its_own_timeout(ranks):
    assert ranks(2, "shm").run(wait_too_short) == [2.0, 2.0]


def from_two_threads():
    done = []

    def work():
        for _ in range(200):
            pyfleet.all_reduce(np.ones(3))      # the same call from either thread: any order fits
        done.append(True)
    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(done)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_calls_from_two_threads_are_serialised(ranks, transport):
    assert ranks(2, transport).run(from_two_threads) == [2, 2]


class MallInfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks",
                                                     "uordblks", "fordblks", "keepcost")]


def in_use():
    """(Python's memory blocks, bytes of C's heap in use)."""
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = MallInfo
    info = libc.mallinfo2()
    return sys.getallocatedblocks(), info.uordblks + info.hblkhd


def ten_thousand_calls(count, like, dtype):
    x = np.zeros(count, dtype) if like == "numpy" else torch.zeros(count, dtype=getattr(torch, dtype))
    for _ in range(200):
        pyfleet.all_reduce(x, "max")
    gc.collect()
    gc.disable()
    in_use()                                    # loads what it needs itself
    before = in_use()
    for _ in range(10_000):
        pyfleet.all_reduce(x, "max")
    after = in_use()
    gc.enable()
    return after[0] - before[0], after[1] - before[1]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="mallinfo2 is the GNU C library's")
@pytest.mark.parametrize(("transport", "size", "count", "like", "dtype"), [
    ("shm", 2, 1, "numpy", "float32"), ("shm", 2, 20_000, "torch", "float32"), ("tcp", 2, 1, "torch", "float64"),
    ("tcp", 3, 5000, "numpy", "float16"),
])
def test_ten_thousand_calls_leave_nothing_behind(ranks, transport, size, count, like, dtype):
    for blocks, heap in ranks(size, transport).run(ten_thousand_calls, count, like, dtype):
        assert blocks < 50 and heap < 4096, (blocks, heap)


# ---- bad input: an error before anything is sent, and the group lives on ---------------------------------------------

def bad_input():
    frozen = np.zeros(4, np.float32)
    frozen.flags.writeable = False
    for bad, error in (
        (frozen, pyfleet.ShapeError),
        (frozen[::2], pyfleet.ShapeError),
        (np.array([{}, None], object), pyfleet.DTypeError),
        (np.zeros(3, ">f4"), pyfleet.DTypeError),
        (np.zeros(3, "U5"), pyfleet.DTypeError),
        (np.zeros(3, np.uint16), pyfleet.DTypeError),
        ([1.0, 2.0], pyfleet.DTypeError),
        (3.5, pyfleet.DTypeError),
        (None, pyfleet.DTypeError),
        ("text", pyfleet.DTypeError),
        (b"bytes", pyfleet.DTypeError),
        (torch.zeros(3).to_sparse(), pyfleet.ShapeError),
        (torch.zeros(3, device="meta"), pyfleet.ShapeError),
        (torch.zeros(3, dtype=torch.uint16), pyfleet.DTypeError),
    ):
        with pytest.raises(error):
            pyfleet.all_reduce(bad)
    with pytest.raises(TypeError, match="mean is not defined for int64"):
        pyfleet.all_reduce(np.zeros(3, np.int64), "mean")
    with pytest.raises(TypeError, match="max is not defined for complex"):
        pyfleet.all_reduce(np.zeros(3, np.complex64), "max")
    for call in (
        lambda: pyfleet.all_reduce(np.zeros(3), "median"),
        lambda: pyfleet.all_reduce(np.zeros(3), 17),
        lambda: pyfleet.all_reduce(np.zeros(3), algorithm="magic"),
        lambda: pyfleet.all_reduce(np.zeros(3), timeout=0),
        lambda: pyfleet.all_reduce(np.zeros(3), compression="zip"),
        lambda: pyfleet.broadcast(np.zeros(3), src=99),
        lambda: pyfleet.broadcast(np.zeros(3), src=-1),
        lambda: pyfleet.empty((2, -1)),
        lambda: pyfleet.empty("many"),
        lambda: pyfleet.empty(3, like="jax"),
        lambda: pyfleet.empty(3, torch.bfloat16, like="numpy"),
    ):
        with pytest.raises(ValueError):
            call()
    x = np.ones(3)
    pyfleet.all_reduce(x)
    return x.tolist()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_bad_input_is_refused_and_the_group_lives_on(ranks, transport):
    assert ranks(2, transport).run(bad_input) == [[2.0] * 3] * 2


def mismatch(kind):
    rank = pyfleet.rank()
    if kind == "size":
        pyfleet.all_reduce(np.zeros(10 + rank))
    elif kind == "large":
        pyfleet.all_reduce(np.zeros(100_000 + rank))
    elif kind == "dtype":
        pyfleet.all_reduce(np.zeros(10, (np.float32, np.int32, np.float64)[rank]))
    elif kind == "op":
        pyfleet.all_reduce(np.zeros(10), "sum" if rank else "max")
    elif kind == "root":
        pyfleet.broadcast(np.zeros(10), rank)
    elif kind == "verb":
        pyfleet.barrier() if rank else pyfleet.all_reduce(np.zeros(10))
    pyfleet.barrier()           # a broadcast's source learns of it here at the latest


@pytest.mark.parametrize("kind", ("size", "large", "dtype", "op", "root", "verb"))
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_mismatched_calls_are_out_of_step_on_every_rank(fresh_ranks, transport, kind):
    errors = fresh_ranks(3, transport).run(mismatch, kind, errors=True)
    for good, error in ((isinstance(error, pyfleet.OutOfStep), error) for error in errors):
        assert good, errors
        ours, _, theirs = str(error).partition(" while ")
        assert "called" in ours and "called" in theirs and error.rank is not None
        assert ours.split("called ")[1] != theirs.split("called ")[1].split(" (operation")[0]


def test_nothing_works_before_init():
    for call in (pyfleet.rank, pyfleet.barrier, lambda: pyfleet.all_reduce(np.zeros(2)), lambda: pyfleet.empty(3)):
        with pytest.raises(pyfleet.NotInitialized, match="call pyfleet.init"):
            call()
