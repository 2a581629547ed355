"""The contract of an engine: the thing that moves the bytes of collective calls, and the one in force."""
from __future__ import annotations

import functools
import json
import os
import queue
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from fleetcore.group import ALGORITHMS

from pyfleet.arrays import reduce_op
from pyfleet.errors import (
    CommunicationError,
    ConfigError,
    DTypeError,
    FleetError,
    NotInitialized,
    PeerLost,
    ReduceOp,
    ShapeError,
    Timeout,
)
from pyfleet.flat import FLOATS, Flat, flatten
from pyfleet.wiring import Deadline

# What Engine.submit takes by name.
VERBS = ("all_reduce", "broadcast", "reduce", "all_gather_into", "gather_into", "scatter_into", "reduce_scatter_into",
         "all_to_all_into", "barrier")
MAX_NOTE_BYTES = 256
MAX_TAG = 2**31 - 1


class Work(ABC):
    """A collective call under way on the engine's communication thread."""

    @abstractmethod
    def wait(self, timeout: float | None = None) -> Any:
        """Block until the call is over and return its result.

        Args:    timeout: seconds to wait here; None waits for the call's own deadline.
        Raises:  what the call raised; Timeout when it is still under way after `timeout`.
        """

    @abstractmethod
    def done(self) -> bool:
        """Whether `wait` would return (or raise) at once."""


class Engine(ABC):
    """Collective operations of one group of ranks, for one epoch.

    Every rank calls the same operations in the same order. Arrays are numpy arrays, torch tensors or objects with a
    writable contiguous buffer, as pyfleet.arrays understands them; only their elements in C order matter here, shapes
    are the caller's business. Ranks are numbered within the group. `counts` are elements per rank, the same list on all
    ranks; parts lie one after the other in rank order. Calls from several threads are serialised; inputs that are not
    the output are left as they were.

    Attributes:
        ranks: the group's members, numbered as in the whole fleet.
        quick: None, or quick(x, op, timeout) -> whether it has done all_reduce(x, op): for small arrays, where all there
               is to do costs a microsecond. While it says False, or is None, all_reduce() is what works.
    """

    name: str
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    epoch: int
    ranks: tuple[int, ...]
    quick: Callable[[Any, int, float | None], bool] | None = None

    @abstractmethod
    def all_reduce(self, x: Any, op: Any = "sum", *, algorithm: str = "auto", timeout: float | None = None) -> None:
        """Replace x by the reduction of every rank's x; the same bits everywhere."""

    @abstractmethod
    def broadcast(self, x: Any, src: int = 0, *, timeout: float | None = None) -> None:
        """Replace x by rank src's x."""

    @abstractmethod
    def reduce(self, x: Any, dst: int = 0, op: Any = "sum", *, timeout: float | None = None) -> None:
        """On dst, replace x by the reduction of every rank's x."""

    @abstractmethod
    def all_gather_into(self, out: Any, x: Any, counts: list[int] | None = None, *, timeout: float | None = None) -> None:
        """Fill out with every rank's x; counts None: they are equal. The rank's x may be its own part of out."""

    @abstractmethod
    def gather_into(self, out: Any, x: Any, counts: list[int], dst: int = 0, *, timeout: float | None = None) -> None:
        """On dst, fill out with every rank's x; out is None elsewhere."""

    @abstractmethod
    def scatter_into(self, out: Any, x: Any, counts: list[int], src: int = 0, *, timeout: float | None = None) -> None:
        """Fill out with this rank's part of src's x; x is None elsewhere."""

    @abstractmethod
    def reduce_scatter_into(self, out: Any, x: Any, counts: list[int], op: Any = "sum", *,
                            timeout: float | None = None) -> None:
        """Fill out with this rank's part of the reduction of every rank's x."""

    @abstractmethod
    def all_to_all_into(self, out: Any, x: Any, counts: list[list[int]], *, timeout: float | None = None) -> None:
        """Send part j of x to rank j, and fill out with what came, in rank order.

        Args:    counts: counts[i][j] elements go from rank i to rank j, the same table on all ranks.
        """

    @abstractmethod
    def barrier(self, *, timeout: float | None = None) -> None:
        """Return once every rank has called it."""

    @abstractmethod
    def isend(self, x: Any, dst: int, tag: int = 0, note: bytes = b"", *, timeout: float | None = None) -> Work:
        """Start sending x to dst; messages of one pair and tag arrive in order. x may be used again once it is done.

        Args:    tag: 0 to 2**31 - 1.  note: at most 256 bytes that tell the receiver what x is.
        """

    @abstractmethod
    def irecv(self, make: Callable[[bytes], Any], src: int | None = None, tag: int = 0, *,
              timeout: float | None = None) -> Work:
        """Start receiving a message with this tag from src, or from whoever is first.

        Args:    make: called with the message's note once it is known; returns the array to fill.
        Returns: Work whose result is (what make returned, the sender's rank).
        Raises:  from wait: what make raises (the message is then dropped); ShapeError when its array has another size.
        """

    def send(self, x: Any, dst: int, tag: int = 0, note: bytes = b"", *, timeout: float | None = None) -> None:
        """As isend, done when it returns."""
        self.isend(x, dst, tag, note, timeout=timeout).wait()

    def recv(self, make: Callable[[bytes], Any], src: int | None = None, tag: int = 0, *,
             timeout: float | None = None) -> tuple[Any, int]:
        """As irecv, done when it returns."""
        return self.irecv(make, src, tag, timeout=timeout).wait()

    @abstractmethod
    def submit(self, call: str | Callable[..., Any], *args: Any, **kwargs: Any) -> Work:
        """Start a call on the communication thread; calls run in the order of submission.

        Args:    call: the name of a verb of this engine, or a function that uses it.
        """

    @abstractmethod
    def is_busy(self) -> bool:
        """Whether submitted calls are under way or waiting: a synchronous call from another thread queues behind them."""

    @abstractmethod
    def new_group(self, ranks: list[int], *, timeout: float | None = None) -> Engine | None:
        """An engine for some of this one's ranks, in that order; None on the others. Every rank of this one calls it.

        The new engine can be used concurrently with this one, from another thread. Close it before this one.
        """

    @abstractmethod
    def allocate(self, nbytes: int) -> Any:
        """A writable buffer (buffer protocol, uint8) in memory that this engine moves without a copy."""

    @abstractmethod
    def stats(self) -> dict:
        """Bytes and messages since the start: {"links": {rank: {...}}, "shared_memory": {...}, "operations": {...},
        "messages": of isend and irecv}."""

    def record(self, on: bool = True) -> None:
        """Begin anew to remember every call, or stop."""
        raise ConfigError(f"the {self.name} engine does not record its calls")

    def recorded(self) -> list:
        """[(operation, bytes, began, ended, algorithm)] since record(): seconds of time.monotonic()."""
        return []

    @abstractmethod
    def close(self) -> None:
        """Leave the group; peers that still wait for this rank learn of it. Idempotent."""


    def check_members(self, ranks: list[int]) -> list[int]:
        """The ranks of a group to be made, as numbers of this one.

        Raises:  ConfigError when there is none, one is no rank of this engine, or is there twice.
        """
        places = [int(rank) for rank in ranks]
        if not places or len(set(places)) != len(places) or not all(0 <= place < self.world_size for place in places):
            raise ConfigError(f"a group needs different ranks from 0 to {self.world_size - 1}, not {list(ranks)}")
        return places


def all_gather_object(engine: Engine, obj: Any, timeout: float | None = None) -> list:
    """Every rank's obj, in rank order: values that JSON can carry.

    Raises:  ConfigError for other values.
    """
    data = np.frombuffer(to_json(obj), np.uint8)
    lengths = np.empty(engine.world_size, np.int64)
    engine.all_gather_into(lengths, np.array([data.size]), timeout=timeout)
    out = np.empty(lengths.sum(), np.uint8)
    engine.all_gather_into(out, data, lengths.tolist(), timeout=timeout)
    return [json.loads(part.tobytes()) for part in np.split(out, np.cumsum(lengths)[:-1])]


def broadcast_object(engine: Engine, obj: Any, src: int = 0, timeout: float | None = None) -> Any:
    """Rank src's obj, on every rank; the others' is ignored."""
    data = np.frombuffer(to_json(obj), np.uint8) if engine.rank == src else None
    length = np.array([0 if data is None else data.size])
    engine.broadcast(length, src, timeout=timeout)
    data = np.empty(length[0], np.uint8) if data is None else data
    engine.broadcast(data, src, timeout=timeout)
    return json.loads(data.tobytes())


def to_json(obj: Any) -> bytes:
    """obj as JSON.

    Raises:  ConfigError for values that JSON cannot carry; nothing is ever pickled.
    """
    try:
        return json.dumps(obj).encode()
    except (TypeError, ValueError) as error:
        raise ConfigError(f"only JSON-like values (None, bool, numbers, text, lists, dicts with text keys) can be sent: "
                          f"{error}") from None


# ---- the engine in force --------------------------------------------------------------------------------------------

_current: Engine | None = None      # the process's engine, as long as no thread has one of its own: one read finds it
_process: Engine | None = None
_thread = threading.local()         # .engine: the thread's own
_num_threads = 0                    # how many threads have one
_switch = threading.Lock()


def current() -> Engine:
    """The engine that pyfleet.init() put in force, for this thread or else for the process."""
    engine = _current
    if engine is None:
        engine = getattr(_thread, "engine", None) or _process
        if engine is None:
            raise NotInitialized("there is no fleet yet: call pyfleet.init() first")
    return engine


def set_current(engine: Engine | None, *, thread: bool = False) -> None:
    """Put an engine in force, or none: for the whole process, or for the calling thread only."""
    global _current, _num_threads, _process
    with _switch:
        if thread:
            _num_threads += (engine is not None) - (getattr(_thread, "engine", None) is not None)
            _thread.engine = engine
        else:
            _process = engine
        _current = None if _num_threads else _process


def is_current() -> bool:
    """Whether an engine is in force."""
    return (_current or getattr(_thread, "engine", None) or _process) is not None


def forget_all() -> None:
    """In a forked child: no engine is in force, whatever the parent's threads were doing."""
    global _current, _num_threads, _process, _switch, _thread
    _current = _process = None
    _switch, _thread, _num_threads = threading.Lock(), threading.local(), 0


# ---- calls on a thread of their own ----------------------------------------------------------------------------------

class CallWork(Work):
    """A call on another thread."""

    __slots__ = ("_error", "_over", "_result", "_what")

    def __init__(self, what: str):
        self._over, self._result, self._error, self._what = threading.Event(), None, None, what

    def wait(self, timeout=None):
        if not self._over.wait(timeout):
            raise Timeout(f"{self._what} is still under way after {timeout:g} s", operation=self._what)
        if self._error is not None:
            raise self._error
        return self._result

    def done(self):
        return self._over.is_set()

    def run(self, call: Callable[..., Any], args: tuple, kwargs: dict) -> None:
        """Make the call and keep what came of it; never raises."""
        try:
            self._result = call(*args, **kwargs)
        except BaseException as error:      # noqa: BLE001 belongs to whoever waits
            self._error = error

    def finish(self) -> None:
        """Let the waiters go."""
        self._over.set()


def behind(what: str, call: Callable[..., Any], *args: Any) -> CallWork:
    """The call on a thread of its own."""
    work = CallWork(what)

    def run():
        work.run(call, args, {})
        work.finish()
    threading.Thread(target=run, daemon=True, name=f"pyfleet-{what}").start()
    return work


class CallThread:
    """Makes calls one after the other, on a thread that starts with the first.

    Args:    engine: to be in force on the thread; None: the process's.
    """

    def __init__(self, engine: Engine | None = None):
        self._engine, self._lock = engine, threading.Lock()
        self._queue: queue.SimpleQueue = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._pending = 0               # calls submitted and not yet over

    def is_busy(self) -> bool:
        """Whether a call made here and now would overtake one."""
        return self._pending > 0 and threading.current_thread() is not self._thread

    def submit(self, what: str, call: Callable[..., Any], args: tuple, kwargs: dict) -> CallWork:
        """Queue a call."""
        work = CallWork(what)
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, daemon=True, name="pyfleet-comm")
                self._thread.start()
            self._pending += 1
            self._queue.put((work, call, args, kwargs))
        return work

    def close(self) -> None:
        """End the thread, after the calls that are queued. Idempotent."""
        with self._lock:
            thread, self._thread = self._thread, None
        if thread is not None:
            self._queue.put(None)
            if threading.current_thread() is not thread:
                thread.join()

    def _serve(self):
        set_current(self._engine, thread=True)
        while (item := self._queue.get()) is not None:
            work, call, args, kwargs = item
            work.run(call, args, kwargs)
            with self._lock:
                self._pending -= 1
            work.finish()
            del item, work, call, args, kwargs      # an engine that only a finished call still holds may go
        set_current(None, thread=True)


# ---- what engines over somebody else's collectives share ---------------------------------------------------------------

class Call(NamedTuple):
    """What a rank asked for; equal on all ranks that are in step.

    Attributes:
        detail: as its user would write it: 'float32[1024], sum'.
    """

    verb: str
    detail: str = ""
    counts: tuple = ()

    def __str__(self) -> str:
        counts = f", counts={list(self.counts)}" if self.counts else ""
        if len(counts) > 200:               # a table of many ranks would bury the rest of the message
            counts = counts[:200] + "...]"
        return f"{self.verb}({self.detail}{counts})"


def in_order(verb):
    """A verb that overtakes nothing: while submitted calls are pending it queues behind them, so ranks see one order."""
    @functools.wraps(verb)
    def method(self, *args, **kwargs):
        if self.is_busy():
            return self._calls.submit(verb.__name__, verb, (self, *args), kwargs).wait()
        return verb(self, *args, **kwargs)
    return method


class PlainEngine(Engine):
    """An engine that hands whole calls to somebody else; arguments are checked as fleetcore's Group does.

    A kind has the methods at the end: they get flat arrays that fit together, one call at a time, and change `data` of
    what is written. Dead after its first failure, as a Group is: every later call raises the same.

    Args:    rank: within the group.  ranks: the members, numbered as in the whole fleet.
             timeout: default deadline of a call, seconds.
             per_thread: other threads of this process are other ranks.
    """

    def __init__(self, rank: int, ranks: Sequence[int], epoch: int = 0, timeout: float = 300.0, *,
                 per_thread: bool = False):
        self.rank, self.ranks, self.world_size = rank, tuple(ranks), len(ranks)
        self.local_rank, self.local_world_size = rank, self.world_size      # until somebody knows better
        self.epoch, self.timeout = epoch, timeout
        self.failure: FleetError | None = None      # what ended this group
        self._turn, self._count_lock = threading.Lock(), threading.Lock()
        self._calls = CallThread(self if per_thread else None)
        self._operations: dict[str, dict] = {}
        self._sequence = 0
        self._pid, self._closed = os.getpid(), False

    # ---- verbs ---------------------------------------------------------------------------------------------------

    @in_order
    def all_reduce(self, x, op="sum", *, algorithm="auto", timeout=None):
        flat, op = self._flat(x), reduce_op(op)
        _require_op(flat, op)
        if algorithm not in ALGORITHMS:
            raise ConfigError(f"unknown algorithm {algorithm!r}: one of {', '.join(ALGORITHMS)}")
        call = Call("all_reduce", f"{flat.type}[{flat.count}], {_name(op)}")
        self._perform(call, timeout, flat, flat, self._all_reduce, flat, op)

    @in_order
    def broadcast(self, x, src=0, *, timeout=None):
        self._require_rank("src", src)
        flat = self._flat(x, src != self.rank)
        call = Call("broadcast", f"{flat.type}[{flat.count}], src={src}")
        self._perform(call, timeout, flat, flat if src != self.rank else None, self._broadcast, flat, src)

    @in_order
    def reduce(self, x, dst=0, op="sum", *, timeout=None):
        self._require_rank("dst", dst)
        flat, op = self._flat(x, dst == self.rank), reduce_op(op)
        _require_op(flat, op)
        call = Call("reduce", f"{flat.type}[{flat.count}], {_name(op)}, dst={dst}")
        self._perform(call, timeout, flat, flat if dst == self.rank else None, self._reduce, flat, dst, op)

    @in_order
    def all_gather_into(self, out, x, counts=None, *, timeout=None):
        out, x = self._flat(out), self._flat(x, False)
        counts = self._counts([x.count] * self.world_size if counts is None else counts)
        _require_fit(out, sum(counts), "out", x)
        _require_fit(x, counts[self.rank], "x")
        self._perform(Call("all_gather", x.type, counts), timeout, x, out, self._all_gather, out, x, _scaled(counts, x))

    @in_order
    def gather_into(self, out, x, counts, dst=0, *, timeout=None):
        self._require_rank("dst", dst)
        x, counts = self._flat(x, False), self._counts(counts)
        out = self._at_root(out, "out", dst, True)
        if out is not None:
            _require_fit(out, sum(counts), "out", x)
        _require_fit(x, counts[self.rank], "x")
        call = Call("gather", f"{x.type}, dst={dst}", counts)
        self._perform(call, timeout, x, out, self._gather, out, x, _scaled(counts, x), dst)

    @in_order
    def scatter_into(self, out, x, counts, src=0, *, timeout=None):
        self._require_rank("src", src)
        out, counts = self._flat(out), self._counts(counts)
        x = self._at_root(x, "x", src, False)
        if x is not None:
            _require_fit(x, sum(counts), "x", out)
        _require_fit(out, counts[self.rank], "out")
        call = Call("scatter", f"{out.type}, src={src}", counts)
        self._perform(call, timeout, out, out, self._scatter, out, x, _scaled(counts, out), src)

    @in_order
    def reduce_scatter_into(self, out, x, counts, op="sum", *, timeout=None):
        out, x, counts, op = self._flat(out), self._flat(x, False), self._counts(counts), reduce_op(op)
        _require_op(x, op)
        _require_fit(x, sum(counts), "x", out)
        _require_fit(out, counts[self.rank], "out")
        call = Call("reduce_scatter", f"{x.type}, {_name(op)}", counts)
        self._perform(call, timeout, x, out, self._reduce_scatter, out, x, _scaled(counts, x), op)

    @in_order
    def all_to_all_into(self, out, x, counts, *, timeout=None):
        out, x = self._flat(out), self._flat(x, False)
        if len(counts) != self.world_size:
            raise ShapeError(f"counts has {len(counts)} rows for {self.world_size} ranks")
        table = tuple(self._counts(row) for row in counts)
        _require_fit(x, sum(table[self.rank]), "x")
        _require_fit(out, sum(row[self.rank] for row in table), "out", x)
        scaled = [_scaled(row, x) for row in table]
        self._perform(Call("all_to_all", x.type, table), timeout, x, out, self._all_to_all, out, x, scaled)

    @in_order
    def barrier(self, *, timeout=None):
        self._perform(Call("barrier"), timeout, None, None, self._barrier)

    def isend(self, x, dst, tag=0, note=b"", *, timeout=None):
        self._require_rank("dst", dst)
        self._require_message(dst, tag, note)
        flat, limit = self._flat(x, False), self._limit(timeout)
        self._demand_alive()
        self._count("send", flat.data.nbytes, 0.0)
        return self._isend(flat, dst, tag, bytes(note), limit)

    def irecv(self, make, src=None, tag=0, *, timeout=None):
        if src is not None:
            self._require_rank("src", src)
        self._require_message(src, tag, b"")
        limit = self._limit(timeout)
        self._demand_alive()
        return self._irecv(make, src, tag, limit)

    def submit(self, call, *args, **kwargs):
        if isinstance(call, str):
            if call not in VERBS:
                raise ConfigError(f"there is no operation {call!r}")
            call = getattr(self, call)
        return self._calls.submit(call.__name__, call, args, kwargs)

    def is_busy(self):
        return self._calls.is_busy()

    @in_order
    def new_group(self, ranks, *, timeout=None):
        ranks, made = tuple(self.check_members(ranks)), []
        self._perform(Call("new_group", str(list(ranks))), timeout, None, None,
                      lambda call, limit: made.append(self._new_group(call, ranks, limit)))
        return made[0]

    def allocate(self, nbytes):
        return np.empty(nbytes, np.uint8)

    def stats(self):
        with self._count_lock:
            operations = {verb: dict(row) for verb, row in self._operations.items()}
        return {"links": {}, "shared_memory": {"read_bytes": 0}, "operations": operations, "algorithms": {}}

    def close(self):
        if self._closed or self._pid != os.getpid():
            return
        self._closed = True
        if self.failure is None:
            self.failure = FleetError("this group was closed")
        self._leave()
        self._calls.close()

    # ---- the way of a call -----------------------------------------------------------------------------------------

    def _perform(self, call, timeout, counted, written, action, *args):
        """Carry out a checked call, and bring the result to where the user has it."""
        limit = self._limit(timeout)
        with self._turn:
            self._demand_alive()
            self._sequence += 1
            start = time.perf_counter()
            try:
                action(call, *args, limit)
            except BaseException as error:
                self.failure = error if isinstance(error, CommunicationError) else PeerLost(
                    f"this rank was interrupted ({type(error).__name__})", rank=self.rank, operation=str(call),
                    epoch=self.epoch)
                self._leave()           # the others must not wait for it
                raise
            finally:
                self._count(call.verb, counted.data.nbytes if counted is not None else 0, time.perf_counter() - start)
        if written is not None and written.bring_back is not None:
            written.bring_back()

    def _demand_alive(self):
        if self._pid != os.getpid():
            raise FleetError("this group belongs to the parent process: call pyfleet.init() in the child instead")
        if self.failure is not None:
            again = type(self.failure)(f"the group is dead since an earlier call: {self.failure}",
                                       **{k: v for k, v in vars(self.failure).items() if not k.startswith("_")})
            raise again from self.failure

    def _count(self, verb, nbytes, seconds):
        with self._count_lock:
            row = self._operations.setdefault(verb, {"calls": 0, "bytes": 0, "seconds": 0.0})
            row["calls"] += 1
            row["bytes"] += nbytes
            row["seconds"] += seconds

    def _limit(self, timeout):
        seconds = self.timeout if timeout is None else timeout
        if not seconds > 0:
            raise ConfigError(f"timeout must be positive, not {timeout}")
        return Deadline(min(seconds, 1e9))

    def _flat(self, x, writable=True):
        return flatten(x, writable)

    def _at_root(self, x, name, root, writable):
        if root != self.rank:
            return None
        if x is None:
            raise ShapeError(f"{name} is None, but this is rank {root}, which has it")
        return self._flat(x, writable)

    def _counts(self, counts):
        counts = tuple(int(count) for count in counts)
        if len(counts) != self.world_size:
            raise ShapeError(f"{len(counts)} counts for {self.world_size} ranks")
        if min(counts) < 0:
            raise ShapeError(f"counts must not be negative: {list(counts)}")
        return counts

    def _require_rank(self, name, rank):
        if not 0 <= rank < self.world_size:
            raise ConfigError(f"{name} is {rank}, but the ranks are 0 to {self.world_size - 1}")

    def _require_message(self, peer, tag, note):
        if peer == self.rank:
            raise ConfigError(f"rank {peer} cannot send to itself")
        if not 0 <= tag <= MAX_TAG:
            raise ConfigError(f"tag must be from 0 to {MAX_TAG}, not {tag}")
        if len(note) > MAX_NOTE_BYTES:
            raise ConfigError(f"a note has at most {MAX_NOTE_BYTES} bytes, not {len(note)}")

    # ---- what a kind provides: counts are of `data`, and fit ---------------------------------------------------------

    @abstractmethod
    def _all_reduce(self, call: Call, flat: Flat, op: int, limit: Deadline) -> None:
        """As the verb without its underscore, and so the ones below."""

    @abstractmethod
    def _broadcast(self, call: Call, flat: Flat, src: int, limit: Deadline) -> None: ...

    @abstractmethod
    def _reduce(self, call: Call, flat: Flat, dst: int, op: int, limit: Deadline) -> None: ...

    @abstractmethod
    def _all_gather(self, call: Call, out: Flat, x: Flat, counts: list[int], limit: Deadline) -> None: ...

    @abstractmethod
    def _gather(self, call: Call, out: Flat | None, x: Flat, counts: list[int], dst: int, limit: Deadline) -> None: ...

    @abstractmethod
    def _scatter(self, call: Call, out: Flat, x: Flat | None, counts: list[int], src: int, limit: Deadline) -> None: ...

    @abstractmethod
    def _reduce_scatter(self, call: Call, out: Flat, x: Flat, counts: list[int], op: int, limit: Deadline) -> None: ...

    @abstractmethod
    def _all_to_all(self, call: Call, out: Flat, x: Flat, counts: list[list[int]], limit: Deadline) -> None: ...

    @abstractmethod
    def _barrier(self, call: Call, limit: Deadline) -> None: ...

    @abstractmethod
    def _isend(self, flat: Flat, dst: int, tag: int, note: bytes, limit: Deadline) -> Work: ...

    @abstractmethod
    def _irecv(self, make: Callable[[bytes], Any], src: int | None, tag: int, limit: Deadline) -> Work: ...

    @abstractmethod
    def _new_group(self, call: Call, ranks: tuple[int, ...], limit: Deadline) -> Engine | None: ...

    @abstractmethod
    def _leave(self) -> None:
        """Let peers that wait for this rank know that it will not come. May be called more than once."""


def _name(op):
    return ReduceOp(op).name.lower()


def _scaled(counts, flat):
    """counts of `flat.data`."""
    return [count * flat.parts for count in counts]


def _require_op(flat, op):
    if op == ReduceOp.MEAN and flat.dtype not in FLOATS or flat.parts == 2 and op not in (ReduceOp.SUM, ReduceOp.MEAN):
        raise DTypeError(f"{_name(op)} is not defined for {flat.type if flat.parts == 1 else 'complex'} arrays")


def _require_fit(flat, count, name, like=None):
    if like is not None and flat.type != like.type:
        raise DTypeError(f"one array holds {like.type}, the other {flat.type}")
    if flat.count != count:
        raise ShapeError(f"{name} has {flat.count} elements, and the counts say {count}")
