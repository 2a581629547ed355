"""What every engine promises, as functions that run in each rank over the engine in force; CHECKS lists them.

Numbers are small integers, so that sums are exact in whatever order an engine adds.
"""
import hashlib
import threading
import time
from itertools import product

import numpy as np
import pytest
import torch

from pyfleet import engines
from pyfleet.errors import ConfigError, DTypeError, ShapeError, Timeout

DTYPES = ("float64", "float32", "float16", "bfloat16", "int8", "int16", "int32", "int64", "uint8", "bool", "complex64",
          "complex128")
OPS = {"sum": torch.add, "mean": torch.add, "min": torch.minimum, "max": torch.maximum, "product": torch.mul}
LOGICAL = {"sum": torch.logical_or, "max": torch.logical_or, "min": torch.logical_and, "product": torch.logical_and}
LARGE = 300_007         # elements: too many for what any engine treats as a small message


def part(rank, count, dtype, seed=0):
    """What a rank contributes; every rank can make everyone's."""
    random = np.random.default_rng([seed, rank, DTYPES.index(dtype)])
    values = torch.from_numpy(np.resize(random.integers(-8, 9, 4099), count))
    kind = getattr(torch, dtype)
    if dtype == "bool":
        return values > -4
    if kind.is_complex:
        return torch.complex(values.double(), values.flip(0).double()).to(kind)
    return (values.abs() if dtype == "uint8" else values).to(kind)


def offered(op, dtype):
    return op == "sum" or ("complex" in dtype and op == "mean") or ("complex" not in dtype and (op != "mean" or "float" in dtype))


def folded(op, parts):
    """The reduction; half-width floats in float32, rounded once."""
    dtype = parts[0].dtype
    wide = [p.float() if dtype in (torch.float16, torch.bfloat16) else p for p in parts]
    total = wide[0].clone()
    for p in wide[1:]:
        total = (LOGICAL if dtype == torch.bool else OPS)[op](total, p)
    if op == "mean":                # complex numbers are pairs
        total = torch.view_as_complex(torch.view_as_real(total) / len(parts)) if dtype.is_complex else total / len(parts)
    return total.to(dtype)


def uneven(size, seed=0):
    """Counts per rank: none, few, many; another one has most with another seed."""
    return [(0, 3, 1009, 1)[(rank + seed) % 4] for rank in range(size)]


def bits(tensor):
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype)
    return flat.copy_(tensor.reshape(-1)).view(torch.uint8).numpy().tobytes()


def here():
    engine = engines.current()
    return engine, engine.rank, engine.world_size


# ---- collectives -------------------------------------------------------------------------------------------------------

def all_reduce():
    engine, rank, size = here()
    digest = hashlib.sha256()
    for dtype, op in product(DTYPES, OPS):
        if not offered(op, dtype):
            continue
        for count in (0, 1, size - 1, size + 1, 1009):
            x = part(rank, count, dtype)
            engine.all_reduce(x, op)
            assert torch.equal(x, folded(op, [part(r, count, dtype) for r in range(size)])), (dtype, op, count)
            digest.update(bits(x))
    for dtype in ("float32", "int16", "bfloat16"):
        x = part(rank, LARGE, dtype)
        engine.all_reduce(x)
        assert torch.equal(x, folded("sum", [part(r, LARGE, dtype) for r in range(size)]))
    return digest.hexdigest()


def same_bits():
    """In sums that rounding makes depend on the order."""
    engine, rank, _ = here()
    digest = hashlib.sha256()
    for count, dtype in product((3, 1009, LARGE), (np.float32, np.float64, np.float16)):
        x = (np.random.default_rng(rank).standard_normal(count) * 100).astype(dtype)
        engine.all_reduce(x)
        digest.update(x.tobytes())
    return digest.hexdigest()


def nan_and_infinity():
    engine, rank, size = here()
    nan, inf = float("nan"), float("inf")
    for dtype, op, bad in product((torch.float32, torch.float64, torch.float16, torch.bfloat16), OPS, range(size)):
        x = torch.tensor([nan if rank == bad else 1.0, inf if rank == bad else 1.0, -inf if rank == bad else 1.0, -0.5], dtype=dtype)
        engine.all_reduce(x, op)
        low, high = (1.0 if op == "min" and size > 1 else inf), (1.0 if op == "max" and size > 1 else -inf)
        assert x[0].isnan(), (dtype, op, bad)
        assert x[1:3].tolist() == [low, high], (dtype, op, bad)
        assert op not in ("min", "max") or x[3] == -0.5


def broadcast():
    engine, rank, size = here()
    for src, dtype, count in product(range(size), DTYPES, (0, 1, 1009)):
        x = part(rank, count, dtype)
        engine.broadcast(x, src)
        assert torch.equal(x, part(src, count, dtype)), (src, dtype, count)
    frozen = np.arange(LARGE, dtype=np.float32) if rank == size - 1 else np.zeros(LARGE, np.float32)
    frozen.flags.writeable = rank != size - 1       # the source is only read
    engine.broadcast(frozen, size - 1)
    assert frozen[-1] == LARGE - 1


def reduce():
    engine, rank, size = here()
    for dst, dtype, op in product(range(size), DTYPES, OPS):
        if not offered(op, dtype):
            continue
        for count in (0, 1, 1009):
            x = part(rank, count, dtype)
            engine.reduce(x, dst, op)
            whole = folded(op, [part(r, count, dtype) for r in range(size)])
            assert torch.equal(x, whole if rank == dst else part(rank, count, dtype)), (dst, dtype, op, count)


def all_gather():
    engine, rank, size = here()
    for dtype, counts in product(DTYPES, (None, [0] * size, [5] * size, uneven(size), uneven(size, 1), uneven(size, 2))):
        each = [7] * size if counts is None else counts
        expected = torch.cat([part(r, each[r], dtype) for r in range(size)])
        out, mine = torch.zeros(sum(each), dtype=getattr(torch, dtype)), part(rank, each[rank], dtype)
        engine.all_gather_into(out, mine, counts)
        assert torch.equal(out, expected), (dtype, counts)
        assert torch.equal(mine, part(rank, each[rank], dtype))
        out = torch.zeros(sum(each), dtype=getattr(torch, dtype))
        own = out.split(each)[rank]
        own.copy_(mine)
        engine.all_gather_into(out, own, counts)            # in place
        assert torch.equal(out, expected), (dtype, counts)
    out = np.zeros((size, LARGE), np.float32)
    engine.all_gather_into(out, np.full(LARGE, rank, np.float32))
    assert (out == np.arange(size)[:, None]).all()


def gather_and_scatter():
    engine, rank, size = here()
    for root, dtype, counts in product(range(size), DTYPES, ([0] * size, [5] * size, uneven(size), uneven(size, 1))):
        kind, whole = getattr(torch, dtype), torch.cat([part(r, counts[r], dtype) for r in range(size)])
        out, mine = torch.zeros(sum(counts), dtype=kind) if rank == root else None, part(rank, counts[rank], dtype)
        engine.gather_into(out, mine, counts, root)
        assert out is None or torch.equal(out, whole), (root, dtype, counts)
        out = torch.zeros(counts[rank], dtype=kind)
        engine.scatter_into(out, whole if rank == root else None, counts, root)
        assert torch.equal(out, mine), (root, dtype, counts)


def reduce_scatter():
    engine, rank, size = here()
    for dtype, op, counts in product(DTYPES, OPS, ([4] * size, [0] * size, uneven(size), uneven(size, 3))):
        if not offered(op, dtype):
            continue
        x, out = part(rank, sum(counts), dtype), torch.zeros(counts[rank], dtype=getattr(torch, dtype))
        engine.reduce_scatter_into(out, x, counts, op)
        whole = folded(op, [part(r, sum(counts), dtype) for r in range(size)])
        assert torch.equal(out, whole.split(counts)[rank]), (dtype, op, counts)
        assert torch.equal(x, part(rank, sum(counts), dtype))


def all_to_all():
    engine, rank, size = here()
    tables = ([[3] * size] * size, [[0] * size] * size, [uneven(size, r) for r in range(size)],
              [[r * 10 if to == 0 else 0 for to in range(size)] for r in range(size)])
    for dtype, table in product(DTYPES, tables):
        whole = [part(r, sum(table[r]), dtype) for r in range(size)]
        out = torch.zeros(sum(row[rank] for row in table), dtype=getattr(torch, dtype))
        engine.all_to_all_into(out, whole[rank], table)
        assert torch.equal(out, torch.cat([whole[r].split(table[r])[rank] for r in range(size)])), (dtype, table)


def barrier():
    """Nobody leaves before the last arrives: (entered, left) of each, on the clock of the host."""
    engine, rank, size = here()
    times = []
    for late in range(size):
        if rank == late:
            time.sleep(0.03)
        entered = time.monotonic()
        engine.barrier()
        times.append((entered, time.monotonic()))
    return times


def layouts():
    engine, rank, size = here()
    total = sum(range(1, size + 1))
    x = torch.full((40, 30), float(rank + 1)).t()
    engine.all_reduce(x)
    assert not x.is_contiguous()
    assert (x == total).all()
    y = np.asfortranarray(np.full((6, 8), rank + 1, np.float32))
    engine.all_reduce(y[::2])
    assert (y[::2] == total).all()
    assert (y[1::2] == rank + 1).all()
    conj = torch.full((4,), complex(1, rank)).conj()
    engine.all_reduce(conj)
    assert (conj == complex(size, -sum(range(size)))).all()
    leaf, scalar, raw = torch.full((5,), rank + 1.0, requires_grad=True), np.array(rank + 1), bytearray([rank + 1, 0])
    for each in (leaf, scalar, raw):
        engine.all_reduce(each)
    assert leaf.requires_grad
    assert (leaf == total).all()
    assert scalar == total
    assert raw == bytearray([total, 0])
    wide = torch.zeros(10, 2 * size)
    engine.all_gather_into(wide[:, ::2].t(), torch.full((10,), float(rank)))
    assert torch.equal(wide[:, ::2], torch.arange(size).float().expand(10, size))
    assert not wide[:, 1::2].any()
    memory = engine.allocate(4096)
    mine = torch.frombuffer(memory, dtype=torch.float64).fill_(rank + 1)
    engine.all_reduce(mine)
    assert mine.tolist() == [total] * 512


# ---- order, groups, counters --------------------------------------------------------------------------------------------

def submissions():
    engine, rank, size = here()
    arrays = [np.full(1000 * (k % 3) + 1, float(rank + k)) for k in range(15)]
    works = [engine.submit("all_reduce", x) for x in arrays]
    called = engine.submit(lambda: (engine.all_reduce(last), engine.barrier(), "done")[-1])
    last = np.ones(2)
    late = np.ones(3)
    engine.all_reduce(late)                         # queues behind all of them
    assert not engine.is_busy()
    assert all(work.done() for work in works)
    assert called.wait() == "done"
    assert last.tolist() == [size] * 2
    assert late.tolist() == [size] * 3
    for k, (x, work) in enumerate(zip(arrays, works, strict=True)):
        assert work.wait() is None
        assert (x == sum(r + k for r in range(size))).all()
    with pytest.raises(ConfigError):
        engine.submit("sing")
    broken = engine.submit("broadcast", np.zeros(1), size)
    with pytest.raises(ConfigError, match=f"src is {size}"):
        broken.wait()


def waiting():
    """A wait has a timeout of its own."""
    engine, rank, _ = here()
    if rank == 0:
        work = engine.submit("barrier")
        with pytest.raises(Timeout, match="still under way"):
            work.wait(0.05)
        assert not work.done()
        return work.wait()
    time.sleep(0.2)
    return engine.barrier()


def groups():
    engine, rank, size = here()
    everyone, evens = list(range(size)), list(range(0, size, 2))
    backwards, some = engine.new_group(everyone[::-1]), engine.new_group(evens)
    assert backwards.ranks == tuple(everyone[::-1])
    assert (backwards.rank, backwards.world_size) == (size - 1 - rank, size)
    out = np.zeros(size)
    backwards.all_gather_into(out, np.array([float(rank)]))
    assert out.tolist() == everyone[::-1]
    assert (some is None) == (rank not in evens)
    if some is not None:
        x = np.full(9, float(rank))
        some.broadcast(x, len(evens) - 1)
        assert (x == evens[-1]).all()
        inner = some.new_group([0])                 # a group of a group
        assert (inner is not None) == (rank == 0)
        if inner is not None:
            assert inner.ranks == (0,)
            inner.all_reduce(x)
            inner.close()
        some.close()
    backwards.close()
    backwards.close()
    engine.barrier()
    for bad in ([], [0, 0], [size], [-1]):
        with pytest.raises(ConfigError):
            engine.new_group(bad)
    engine.barrier()


def concurrent_groups():
    """Overlapping groups in two threads, and the whole fleet in a third: none waits for another."""
    engine, rank, size = here()
    left, right = engine.new_group(list(range(size - 1))), engine.new_group(list(range(1, size)))
    errors = []

    def work(group):
        try:
            for k in range(20):
                x = np.full(2000 if k % 2 else 3, float(rank + k), np.float32)
                group.all_reduce(x)
                assert (x == sum(group.ranks) + k * group.world_size).all()
        except BaseException as error:      # noqa: BLE001 raised below
            errors.append(error)
    threads = [threading.Thread(target=work, args=(group,)) for group in (left, right) if group is not None]
    for thread in threads if rank % 2 else threads[::-1]:
        thread.start()
    for _ in range(10):
        x = np.ones(1000)
        engine.all_reduce(x)
        assert (x == size).all()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    engine.barrier()
    for group in (left, right):
        if group is not None:
            group.close()
    if errors:
        raise errors[0]


def threads_take_turns():
    engine, _, size = here()
    ends = []

    def work():
        for _ in range(30):
            x = np.ones(3)
            engine.all_reduce(x)            # the same call from either thread: any order fits
            ends.append(x.tolist() == [size] * 3)
    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert ends == [True] * 60


def counters():
    engine, rank, size = here()

    def calls(verb):
        row = engine.stats()["operations"].get(verb, {"calls": 0, "bytes": 0})
        return row["calls"], row["bytes"]
    before = {verb: calls(verb) for verb in ("all_reduce", "broadcast", "barrier")}
    engine.all_reduce(np.zeros(10, np.float32))
    engine.all_reduce(np.zeros(3, np.float64))
    engine.broadcast(np.zeros(5, np.int8), size - 1)
    assert [now - then for now, then in zip(calls("all_reduce"), before["all_reduce"], strict=True)] == [2, 64]
    assert [now - then for now, then in zip(calls("broadcast"), before["broadcast"], strict=True)] == [1, 5]
    engine.barrier()
    assert calls("barrier")[0] == before["barrier"][0] + 1
    sent = engine.stats()["messages"]
    engine.isend(np.zeros(5), rank, 1).wait()
    engine.recv(lambda _: np.zeros(5), rank, 1)
    messages = engine.stats()["messages"]
    assert [messages[key] - sent[key] for key in ("sends", "receives", "sent_bytes", "received_bytes")] == [1, 1, 40, 40]
    assert {"links", "shared_memory", "operations"} <= set(engine.stats())
    assert (engine.rank, engine.local_rank, engine.local_world_size) == (rank, rank, size)
    assert engine.ranks == tuple(range(size))


def bad_input():
    """Refused before anything is sent: the group lives on."""
    engine, rank, size = here()
    x = np.zeros(4)
    frozen = np.zeros(4)
    frozen.flags.writeable = False
    for call in (lambda: engine.all_reduce(frozen), lambda: engine.all_gather_into(np.zeros(4 * size + 1), x),
                 lambda: engine.all_gather_into(np.zeros(4 * size), x, [4] * (size + 1)),
                 lambda: engine.all_gather_into(np.zeros(4), x, [-1] * size),
                 lambda: engine.gather_into(np.zeros(4 * size), np.zeros(3), [4] * size, rank),
                 lambda: engine.gather_into(np.zeros(1), x, [4] * size, rank),
                 lambda: engine.scatter_into(np.zeros(3), np.zeros(4 * size), [4] * size, rank),
                 lambda: engine.scatter_into(x, np.zeros(1), [4] * size, rank),
                 lambda: engine.reduce_scatter_into(np.zeros(3), np.zeros(4 * size), [4] * size),
                 lambda: engine.all_to_all_into(x, x, [[4] * size] * (size + 1)),
                 lambda: engine.all_to_all_into(np.zeros(1), np.zeros(4 * size), [[4] * size] * size),
                 lambda: engine.all_reduce(torch.zeros(3).to_sparse())):
        with pytest.raises(ShapeError):
            call()
    for call in (lambda: engine.all_reduce([1.0]), lambda: engine.all_reduce(np.zeros(3, ">f4")),
                 lambda: engine.all_reduce(np.zeros(3, np.int64), "mean"), lambda: engine.all_reduce(x > 0, "mean"),
                 lambda: engine.all_reduce(np.zeros(3, np.complex64), "max"), lambda: engine.reduce(np.zeros(3, int), 0, "mean"),
                 lambda: engine.all_gather_into(np.zeros(4 * size, np.float32), x)):
        with pytest.raises(DTypeError):
            call()
    for call in (lambda: engine.all_reduce(x, "median"), lambda: engine.all_reduce(x, algorithm="magic"),
                 lambda: engine.all_reduce(x, timeout=0), lambda: engine.broadcast(x, size), lambda: engine.broadcast(x, -1),
                 lambda: engine.reduce(x, size), lambda: engine.gather_into(x, x, [4] * size, size),
                 lambda: engine.scatter_into(x, x, [4] * size, -1)):
        with pytest.raises(ConfigError):
            call()
    engine.barrier()


# ---- messages ------------------------------------------------------------------------------------------------------------

def zeros(note):
    """An array as the note says: b"float32 5"."""
    dtype, count = note.decode().split()
    return torch.zeros(int(count), dtype=getattr(torch, dtype))


def note_of(x):
    return f"{str(x.dtype).removeprefix('torch.')} {x.numel()}".encode()


def messages():
    """Everyone to everyone, every dtype and size; the receiver knows from the note what comes."""
    engine, rank, size = here()
    others = [(rank + k) % size for k in range(size)]           # and to itself
    for tag, (dtype, count) in enumerate(product(DTYPES, (0, 1, 1009))):
        x = part(rank, count, dtype)
        works = [engine.isend(x, other, tag, note_of(x)) for other in others]
        for other in others[::-1]:
            got, src = engine.recv(zeros, other, tag)
            assert src == other
            assert torch.equal(got, part(other, count, dtype)), (dtype, count, other)
        assert [work.wait() for work in works] == [None] * len(works)
    engine.barrier()


def order():
    """Messages of one pair and tag arrive in order; tags do not wait for each other."""
    engine, rank, size = here()
    to, source = (rank + 1) % size, (rank - 1) % size
    works = [engine.isend(np.array([k]), to, tag, str(k).encode()) for k in range(10) for tag in (5, 2**31 - 1)]
    told = []

    def make(note):
        told.append(int(note))
        return np.zeros(1, int)
    for tag in (2**31 - 1, 5):
        assert [int(engine.recv(make, source, tag)[0][0]) for _ in range(10)] == list(range(10))
    assert told == 2 * list(range(10))
    for work in works:
        work.wait()
    engine.barrier()


def from_anyone():
    engine, rank, size = here()
    engine.isend(np.array([rank]), rank, 8)
    assert engine.recv(lambda _: np.zeros(1, int), None, 8)[1] == rank
    if rank == 0:
        got = [engine.recv(zeros, None, 7) for _ in range(3 * (size - 1))]
        assert sorted((src, int(x[0])) for x, src in got) == [(src, k) for src in range(1, size) for k in range(3)]
        for sender in range(1, size):           # of one sender, in order
            assert [int(x[0]) for x, src in got if src == sender] == [0, 1, 2]
    else:
        for k in range(3):
            x = torch.full((rank,), k, dtype=torch.int32)
            engine.send(x, 0, 7, note_of(x))
    engine.barrier()


def receives_first():
    """Receives under way on both sides let large sends through, whoever waits first."""
    engine, rank, size = here()
    to, source = (rank + 1) % size, (rank - 1) % size
    incoming = [engine.irecv(zeros, source, tag) for tag in (1, 2)]
    x = part(rank, LARGE, "float32")
    for tag in (2, 1):
        engine.send(x, to, tag, note_of(x))
    for work in incoming:
        got, src = work.wait()
        assert work.done()
        assert src == source
        assert torch.equal(got, part(source, LARGE, "float32"))
    engine.barrier()


def unwanted_messages():
    """What does not fit is dropped, and told to the receiver alone; the next message arrives."""
    engine, rank, size = here()
    to, source = (rank + 1) % size, (rank - 1) % size

    def refuse(note):
        raise KeyError(note.decode())
    works = [engine.isend(np.full(n, float(n)), to, 3, b"see") for n in (1000, 1000, 1000, 0, 2)]
    with pytest.raises(KeyError, match="see"):
        engine.recv(refuse, source, 3)
    with pytest.raises(ShapeError):
        engine.recv(lambda _: np.zeros(999), source, 3)
    got = np.zeros(1000)
    assert engine.recv(lambda _: got, source, 3)[0] is got
    assert (got == 1000).all()
    with pytest.raises(ShapeError):
        engine.recv(lambda _: np.zeros(1), source, 3)
    assert engine.recv(lambda _: np.zeros((1, 2)), source, 3)[0].tolist() == [[2.0, 2.0]]
    for work in works:
        work.wait()
    engine.barrier()
    for call in (lambda: engine.isend(got, size), lambda: engine.isend(got, to, -1), lambda: engine.isend(got, to, 2**31),
                 lambda: engine.isend(got, to, 0, bytes(257)), lambda: engine.irecv(zeros, -1), lambda: engine.irecv(zeros, to, -1)):
        with pytest.raises(ConfigError):
            call()
    engine.barrier()


def messages_in_a_group():
    """A group's messages are its own: the same pair and tag elsewhere is another matter."""
    engine, rank, size = here()
    group = engine.new_group(list(range(size))[::-1])
    to, source = (rank + 1) % size, (rank - 1) % size
    works = [engine.isend(np.array([1.0]), to, 0), group.isend(np.array([2.0]), size - 1 - to, 0)]
    assert group.recv(lambda _: np.zeros(1), size - 1 - source)[0][0] == 2.0
    assert engine.recv(lambda _: np.zeros(1), source)[0][0] == 1.0
    for work in works:
        work.wait()
    engine.barrier()
    group.close()


# ---- failures: these end the group -----------------------------------------------------------------------------------------

def late():
    """A rank that does not come: an error for the others at their deadline, and for ever after."""
    engine, rank, size = here()
    if rank == size - 1:
        time.sleep(1.0)
        return None
    started = time.monotonic()
    try:
        engine.all_reduce(np.zeros(100), timeout=0.3)
    except Exception as error:          # noqa: BLE001 looked at by the test
        took, again = time.monotonic() - started, None
        try:
            engine.barrier()
        except Exception as second:     # noqa: BLE001 looked at by the test
            again = second
        return type(error).__name__, type(again).__name__, str(again), took
    return "nothing"


def leaving():
    """A rank that leaves is lost to the others, soon."""
    engine, rank, size = here()
    if rank == size - 1:
        engine.close()
        engine.close()
        return None
    started = time.monotonic()
    try:
        while True:
            engine.all_reduce(np.zeros(100), timeout=60)
    except Exception as error:          # noqa: BLE001 looked at by the test
        return type(error).__name__, time.monotonic() - started


def out_of_step(kind):
    engine, rank, _ = here()
    odd = rank == 1
    x = np.zeros(10)
    {"size": lambda: engine.all_reduce(np.zeros(10 + odd)),
     "dtype": lambda: engine.all_reduce(x.astype(np.float32) if odd else x),
     "op": lambda: engine.all_reduce(x, "max" if odd else "sum"),
     "root": lambda: engine.reduce(x, odd),
     "counts": lambda: engine.all_gather_into(np.zeros(3 + odd), np.zeros(1), [1, 1, 1 + odd]),
     "verb": lambda: engine.barrier() if odd else engine.all_reduce(x)}[kind]()
    engine.barrier()                # a source that waits for nobody learns of it here at the latest


# name -> (check, fewest ranks)
CHECKS = {
    "all_reduce": (all_reduce, 1), "same_bits": (same_bits, 2), "nan_and_infinity": (nan_and_infinity, 1),
    "broadcast": (broadcast, 1), "reduce": (reduce, 1), "all_gather": (all_gather, 1),
    "gather_and_scatter": (gather_and_scatter, 1), "reduce_scatter": (reduce_scatter, 1),
    "all_to_all": (all_to_all, 1), "barrier": (barrier, 1), "layouts": (layouts, 1),
    "submissions": (submissions, 1), "waiting": (waiting, 2), "groups": (groups, 1),
    "concurrent_groups": (concurrent_groups, 3), "threads_take_turns": (threads_take_turns, 2),
    "counters": (counters, 1), "bad_input": (bad_input, 1),
    "messages": (messages, 1), "order": (order, 1), "from_anyone": (from_anyone, 1),
    "receives_first": (receives_first, 1), "unwanted_messages": (unwanted_messages, 1),
    "messages_in_a_group": (messages_in_a_group, 1),
}
SIZES = (1, 2, 3, 4)
CASES = [(name, size) for name, (_, fewest) in CHECKS.items() for size in SIZES if size >= fewest]


def judge(name, results):
    """What the results of all ranks must be together."""
    if name in ("all_reduce", "same_bits"):
        assert len(set(results)) == 1
    if name == "barrier":
        for times in zip(*results, strict=True):
            assert min(left for _, left in times) >= max(entered for entered, _ in times)
