"""P3: the functional API: collective calls over the fleet in force."""
from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np

from fleetcore.schedules.base import cut
from pyfleet import engines
from pyfleet.arrays import blank, check_shape, describe, dtype_name, from_buffer, is_tensor, item_bytes, join, split
from pyfleet.engines import Engine, Work, base
from pyfleet.engines.base import to_json
from pyfleet.errors import ConfigError, DTypeError, ReduceOp, ShapeError
from pyfleet.routes import one_off


def all_reduce(x: Any, op: Any = ReduceOp.SUM, *, group: Group | None = None, async_op: bool = False, algorithm: str = "auto",
               compression: Any = None, timeout: float | None = None) -> Work | None:
    """Replace x by its reduction over all ranks; the same bits on every rank.

    Args:    x: numpy array, torch tensor or writable contiguous buffer, equal in size and dtype on all ranks. float64,
             float32, float16, bfloat16, int8 to int64, uint8, bool (logical), complex as pairs (sum and mean).
             op: "sum", "mean", "min", "max", "product". float16 and bfloat16 are summed in float32 and rounded once.
             async_op: return a Work at once; x must be left alone until it is done.
             algorithm: "auto", "ring", "direct" or "tree" between hosts.  timeout: seconds for this call.
             compression: None, a specification such as "int8", "fp16" or "topk(ratio=0.01)+fp16", or a Compressor
             (pyfleet.compressors.parse_spec), or "auto": what the measured links and codecs make worth it (pyfleet.choice);
             the same on all ranks, for floating point, sum and mean. By its name a
             compressor remembers nothing from call to call; what it leaves out is sent later only when an ErrorFeedback
             (pyfleet.compressors.feedback) is passed, always the same one from one place.
    Raises:  PeerLost, Timeout, OutOfStep, DTypeError, ShapeError, ConfigError.
    """
    if type(x) is np.ndarray and group is None and compression is None and not async_op and algorithm == "auto":
        engine = base._current                  # microseconds count here: no calls but one
        if engine is not None and engine.quick is not None and type(op) is ReduceOp and engine.quick(x, op, timeout):
            return None
    engine = _engine(group)
    if compression is not None and compression != "none":
        if algorithm != "auto":
            raise ConfigError(f"with compression the algorithm is the compressor's own, not {algorithm!r}")
        work = engine.submit(one_off(engine, x, op, compression), timeout)
        return work if async_op else work.wait()
    if async_op:
        return engine.submit("all_reduce", x, op, algorithm=algorithm, timeout=timeout)
    engine.all_reduce(x, op, algorithm=algorithm, timeout=timeout)


def all_reduce_sum(x: Any) -> Any:
    """A new array: the sum of x over all ranks."""
    return _reduced(x, ReduceOp.SUM, "auto")


def all_reduce_mean(x: Any) -> Any:
    """A new array: the mean of x over all ranks."""
    return _reduced(x, ReduceOp.MEAN, "auto")


def ring_all_reduce(x: Any) -> Any:
    """A new array: the MEAN of x over all ranks, over the ring where there are links."""
    return _reduced(x, ReduceOp.MEAN, "ring")


def broadcast(x: Any, src: int = 0, *, group: Group | None = None, async_op: bool = False,
              timeout: float | None = None) -> Work | None:
    """Replace x by rank src's x, which has the same size and dtype.

    Raises:  PeerLost, Timeout, OutOfStep, DTypeError, ShapeError, ConfigError.
    """
    engine = _engine(group)
    src = _place(engine, src, "src")
    if async_op:
        return engine.submit("broadcast", x, src, timeout=timeout)
    engine.broadcast(x, src, timeout=timeout)


def reduce(x: Any, dst: int = 0, op: Any = ReduceOp.SUM, *, group: Group | None = None, async_op: bool = False,
           timeout: float | None = None) -> Work | None:
    """On rank dst, replace x by its reduction over all ranks; the others' x is left as it was.

    Args, Raises:  as all_reduce.
    """
    engine = _engine(group)
    dst = _place(engine, dst, "dst")
    if async_op:
        return engine.submit("reduce", x, dst, op, timeout=timeout)
    engine.reduce(x, dst, op, timeout=timeout)


def barrier(*, group: Group | None = None, async_op: bool = False, timeout: float | None = None) -> Work | None:
    """Return once every rank has called it.

    Raises:  PeerLost, Timeout, OutOfStep.
    """
    engine = _engine(group)
    if async_op:
        return engine.submit("barrier", timeout=timeout)
    engine.barrier(timeout=timeout)


# ---- verbs that make new arrays: with async_op=True they return a Work whose wait() returns the result ----------------

def all_gather(x: Any, *, group: Group | None = None, async_op: bool = False, timeout: float | None = None) -> Any:
    """Every rank's x, in rank order: a list of arrays like x, which has the same shape and dtype on all ranks.

    Raises:  PeerLost, Timeout, OutOfStep (for different sizes), DTypeError, ShapeError.
    """
    return _start(_all_gather, async_op, group, x, timeout=timeout)


def _all_gather(engine, x, timeout):
    note = describe(x)
    out = blank(note | {"shape": [engine.world_size, *note["shape"]]}, x)
    engine.all_gather_into(out, x, timeout=timeout)
    return list(out) if note["shape"] else split(out, [()] * engine.world_size)


def all_gather_into(out: Any, x: Any, *, group: Group | None = None, async_op: bool = False,
                    timeout: float | None = None) -> Work | None:
    """Fill out with every rank's x, one after the other in rank order; nothing is allocated.

    Args:    out: world_size times as many elements as x, which is equally large on all ranks. x may be its part of out.
    Raises:  PeerLost, Timeout, OutOfStep, DTypeError, ShapeError.
    """
    return _start(_all_gather_into, async_op, group, out, x, timeout=timeout)


def _all_gather_into(engine, out, x, timeout):
    engine.all_gather_into(out, x, timeout=timeout)


def gather(x: Any, dst: int = 0, *, group: Group | None = None, async_op: bool = False,
           timeout: float | None = None) -> Any:
    """On rank dst, every rank's x in rank order: a list of arrays; None elsewhere. Shapes may differ, dtypes may not.

    Raises:  PeerLost, Timeout, OutOfStep, DTypeError, ConfigError.
    """
    return _start(_gather, async_op, group, x, dst, timeout=timeout)


def _gather(engine, x, dst, timeout):
    dst = _place(engine, dst, "dst")
    notes = engines.all_gather_object(engine, describe(x), timeout)
    _demand_one_dtype(notes)
    counts = [check_shape(note["shape"]) for note in notes]
    out = blank(notes[dst] | {"shape": [sum(counts)]}, x) if engine.rank == dst else None
    engine.gather_into(out, x, counts, dst, timeout=timeout)
    return split(out, [note["shape"] for note in notes]) if engine.rank == dst else None


def scatter(xs: Any, src: int = 0, *, group: Group | None = None, async_op: bool = False,
            timeout: float | None = None) -> Any:
    """This rank's one of the arrays that rank src has a list of: a new array. Shapes may differ, dtypes may not.

    Args:    xs: one array per rank, on src; ignored elsewhere (None).
    Raises:  PeerLost, Timeout, OutOfStep, DTypeError, ShapeError for a list of the wrong length, ConfigError.
    """
    return _start(_scatter, async_op, group, xs, src, timeout=timeout)


def _scatter(engine, xs, src, timeout):
    src = _place(engine, src, "src")
    notes = flat = None
    if engine.rank == src:
        if not isinstance(xs, (list, tuple)) or len(xs) != engine.world_size:
            raise ShapeError(f"scatter needs a list of {engine.world_size} arrays on its source")
        flat, notes = join(xs), [describe(x) for x in xs]
    notes = engines.broadcast_object(engine, notes, src, timeout)
    out = blank(notes[engine.rank], flat)
    engine.scatter_into(out, flat, [check_shape(note["shape"]) for note in notes], src, timeout=timeout)
    return out


def reduce_scatter(x: Any, op: Any = ReduceOp.SUM, *, group: Group | None = None, async_op: bool = False,
                   timeout: float | None = None) -> Any:
    """This rank's part of the reduction of x over all ranks: a new array.

    x is cut along its first dimension into world_size parts in rank order, as equal as can be; x itself is left alone.

    Raises:  PeerLost, Timeout, OutOfStep, DTypeError, ShapeError for a 0-d array, ConfigError.
    """
    return _start(_reduce_scatter, async_op, group, x, op, timeout=timeout)


def _reduce_scatter(engine, x, op, timeout):
    note = describe(x)
    if not note["shape"]:
        raise ShapeError("a 0-d array cannot be cut into parts")
    rows, *rest = note["shape"]
    bounds, row = cut(rows, engine.world_size), check_shape(rest)
    counts = [(stop - start) * row for start, stop in pairwise(bounds)]
    out = blank(note | {"shape": [bounds[engine.rank + 1] - bounds[engine.rank], *rest]}, x)
    engine.reduce_scatter_into(out, x, counts, op, timeout=timeout)
    return out


def all_to_all(xs: Any, *, group: Group | None = None, async_op: bool = False, timeout: float | None = None) -> Any:
    """Send xs[j] to rank j; what came, in rank order: a list of new arrays. Shapes may differ, dtypes may not.

    Raises:  PeerLost, Timeout, OutOfStep, DTypeError, ShapeError for a list of the wrong length.
    """
    return _start(_all_to_all, async_op, group, xs, timeout=timeout)


def _all_to_all(engine, xs, timeout):
    if not isinstance(xs, (list, tuple)) or len(xs) != engine.world_size:
        raise ShapeError(f"all_to_all needs a list of {engine.world_size} arrays")
    flat = join(xs)
    notes = engines.all_gather_object(engine, [describe(x) for x in xs], timeout)
    _demand_one_dtype([note for row in notes for note in row])
    came = [row[engine.rank] for row in notes]
    counts = [[check_shape(note["shape"]) for note in row] for row in notes]
    out = blank(came[0] | {"shape": [sum(row[engine.rank] for row in counts)]}, flat)
    engine.all_to_all_into(out, flat, counts, timeout=timeout)
    return split(out, [note["shape"] for note in came])


def broadcast_object(obj: Any, src: int = 0, *, group: Group | None = None, timeout: float | None = None) -> Any:
    """Rank src's obj, on every rank; the others' is ignored. JSON-like values only: nothing is ever unpickled.

    Raises:  ConfigError for other values (before anything is sent); PeerLost, Timeout, OutOfStep.
    """
    engine = _engine(group)
    return engines.broadcast_object(engine, obj, _place(engine, src, "src"), timeout)


def all_gather_object(obj: Any, *, group: Group | None = None, timeout: float | None = None) -> list:
    """Every rank's obj, in rank order. JSON-like values only.

    Raises:  ConfigError for other values (before anything is sent); PeerLost, Timeout, OutOfStep.
    """
    return engines.all_gather_object(_engine(group), obj, timeout)


# ---- from one rank to another ------------------------------------------------------------------------------------------

def send(x: Any, dst: int, tag: int = 0, *, group: Group | None = None, timeout: float | None = None) -> None:
    """Send x to rank dst. Messages of one pair and tag arrive in order; x may be changed once this returns.

    Args:    tag: 0 to 2**31 - 1; the receiver asks for it.
    Raises:  PeerLost, Timeout, DTypeError, ConfigError.
    """
    engine = _engine(group)
    engine.send(x, _place(engine, dst, "dst"), tag, to_json(describe(x)), timeout=timeout)


def recv(x: Any = None, src: int | None = None, tag: int = 0, *, group: Group | None = None, return_source: bool = False,
         timeout: float | None = None) -> Any:
    """Receive an array from rank src, or from whoever is first.

    Args:    x: what to fill and return, of the size and dtype that comes; None for a new array.
             return_source: return (array, the sender's rank).
    Raises:  PeerLost, Timeout; ShapeError, DTypeError when what came does not fit x (it is lost then); ConfigError.
    """
    return irecv(x, src, tag, group=group, return_source=return_source, timeout=timeout).wait()


def isend(x: Any, dst: int, tag: int = 0, *, group: Group | None = None, timeout: float | None = None) -> Work:
    """As send, at once: x must be left alone until the Work is done."""
    engine = _engine(group)
    return engine.isend(x, _place(engine, dst, "dst"), tag, to_json(describe(x)), timeout=timeout)


def irecv(x: Any = None, src: int | None = None, tag: int = 0, *, group: Group | None = None,
          return_source: bool = False, timeout: float | None = None) -> Work:
    """As recv, at once: the Work's wait() returns what recv does."""
    engine = _engine(group)
    if src is not None:
        src = _place(engine, src, "src")

    def make(note):
        what = json.loads(note)
        if x is None:
            return blank(what)
        if dtype_name(x.dtype) != what["dtype"] or int(np.prod(x.shape)) != check_shape(what["shape"]):
            raise ShapeError(f"what came is {what['dtype']} of shape {tuple(what['shape'])}, which does not fit into "
                             f"{dtype_name(x.dtype)} of shape {tuple(x.shape)}")
        return x

    def result(received):
        array, place = received
        return (array, engine.ranks[place]) if return_source else array

    return Then(engine.irecv(make, src, tag, timeout=timeout), result)


class Then(Work):
    """A Work whose result is made of another one's."""

    def __init__(self, work: Work, result: Callable[[Any], Any]):
        self._work, self._made = work, result

    def wait(self, timeout=None):
        return self._made(self._work.wait(timeout))

    def done(self):
        return self._work.done()


# ---- groups ------------------------------------------------------------------------------------------------------------

class Group:
    """Some of the fleet's ranks: pass it as `group` to the collective functions. Ranks keep their numbers of the fleet.

    Attributes:
        ranks:  the members, in the order of their places in the group.
        rank:   this process's place in the group; None when it is not a member.
    """

    def __init__(self, engine: Engine | None, ranks: tuple[int, ...]):
        self.engine, self.ranks = engine, ranks
        self.rank = engine.rank if engine is not None else None

    @property
    def size(self) -> int:
        """How many members it has."""
        return len(self.ranks)

    def close(self) -> None:
        """Leave the group. Idempotent; shutdown() does it, too."""
        if self.engine is not None:
            self.engine.close()

    def __repr__(self) -> str:
        return f"<Group of ranks {list(self.ranks)}>"


def new_group(ranks: Any, *, timeout: float | None = None) -> Group:
    """A group of some ranks. Every rank of the fleet calls it with the same list, members or not.

    Groups may overlap and be used at the same time from different threads.

    Raises:  ConfigError; NotEnoughPeers, PeerLost, Timeout.
    """
    engine = engines.current()
    places = engine.check_members(ranks)
    return Group(engine.new_group(places, timeout=timeout), tuple(places))


# ---- arrays in shared memory -------------------------------------------------------------------------------------------

def empty(shape: Any, dtype: Any = None, *, like: str = "torch") -> Any:
    """An array in memory that the ranks of this host share: collectives on it copy nothing. Contents are unspecified.

    Args:    shape: int or tuple.  dtype: torch or numpy dtype or name; float32 when None.  like: "torch" or "numpy".
    Raises:  MemoryError when the arena is full; DTypeError, ShapeError, ConfigError.
    """
    if like not in ("torch", "numpy"):
        raise ConfigError(f"like must be 'torch' or 'numpy', not {like!r}")
    if like == "numpy" and str(dtype).endswith("bfloat16"):
        raise ConfigError("numpy has no bfloat16: use like='torch'")
    buffer = _engine(None).allocate(max(1, check_shape(shape) * item_bytes(dtype)))
    return from_buffer(buffer, shape, dtype, like)


def zeros(shape: Any, dtype: Any = None, *, like: str = "torch") -> Any:
    """As empty(), filled with zeros."""
    array = empty(shape, dtype, like=like)
    array[...] = 0
    return array


def from_numpy(x: np.ndarray) -> np.ndarray:
    """A copy of x in shared memory."""
    array = empty(x.shape, x.dtype, like="numpy")
    array[...] = x
    return array


def register(x: Any) -> Any:
    """Move a CPU tensor's memory into shared memory, in place, and return it; a numpy array is copied instead.

    Other views of the tensor's old storage keep the old memory.

    Raises:  ShapeError for tensors that are not on the CPU; DTypeError for what is no array.
    """
    if not is_tensor(x):
        return from_numpy(np.asarray(x))
    if x.device.type != "cpu" or x.layout.__str__() != "torch.strided":
        raise ShapeError(f"only dense CPU tensors can be registered, not one on {x.device}")
    shared = empty(tuple(x.shape), x.dtype)
    data = x.detach()
    shared.copy_(data)
    x.data = shared
    return x


def _engine(group):
    if group is None:
        return engines.current()
    if not isinstance(group, Group):
        raise ConfigError(f"group must come from new_group(), not be a {type(group).__name__}")
    if group.engine is None:
        raise ConfigError(f"this rank is not in {group}")
    return group.engine


def _place(engine, rank, role):
    """The place in the engine's group of a rank of the fleet."""
    if rank not in engine.ranks:
        raise ConfigError(f"{role} is {rank}, but the ranks are {', '.join(map(str, engine.ranks))}")
    return engine.ranks.index(rank)


def _start(call, async_op, group, *args, timeout):
    """call(engine, *args), now or on the communication thread."""
    engine = _engine(group)
    if async_op:
        return engine.submit(call, engine, *args, timeout=timeout)
    return engine.submit(call, engine, *args, timeout=timeout).wait() if engine.is_busy() else call(engine, *args, timeout=timeout)


def _demand_one_dtype(notes):
    names = sorted({note["dtype"] for note in notes})
    if len(names) > 1:
        raise DTypeError(f"the ranks' arrays differ in dtype: {', '.join(names)}")


def _reduced(x, op, algorithm):
    result = x.detach().clone() if is_tensor(x) else np.array(x)
    _engine(None).all_reduce(result, op, algorithm=algorithm)
    return result
