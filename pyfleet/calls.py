"""P2: the way of a call in engines over somebody else's collectives: checks, one order, a thread of its own, counters."""
from __future__ import annotations

import functools
import os
import queue
import threading
import time
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from fleetcore.group import ALGORITHMS, DURATION_BOUNDS_NS

from pyfleet.arrays import reduce_op
from pyfleet.errors import (
    CommunicationError,
    ConfigError,
    DTypeError,
    FleetError,
    PeerLost,
    ReduceOp,
    ShapeError,
    Timeout,
)
from pyfleet.flat import FLOATS, Flat, flatten
from pyfleet.metrics import REGISTRY, Family, Tally, traffic
from pyfleet.wiring import Deadline

# What Engine.submit takes by name.
VERBS = ("all_reduce", "broadcast", "reduce", "all_gather_into", "gather_into", "scatter_into", "reduce_scatter_into",
         "all_to_all_into", "barrier")
DURATION_BOUNDS_S = tuple(bound / 1e9 for bound in DURATION_BOUNDS_NS)
MAX_NOTE_BYTES = 256
MAX_TAG = 2**31 - 1


class CallWork:
    """A call on another thread; an engines.Work."""

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
        finally:
            del call, args, kwargs          # which the error's traceback would keep

    def finish(self) -> None:
        """Let the waiters go."""
        self._over.set()


def behind(what: str, call: Callable[..., Any], *args: Any) -> CallWork:
    """The call on a thread of its own."""
    work = CallWork(what)
    threading.Thread(target=_make, args=(work, call, args), daemon=True, name=f"pyfleet-{what}").start()
    return work


def _make(work, call, args):
    work.run(call, args, {})
    del call, args                  # an error's traceback leads here, too
    work.finish()


class CallThread:
    """Makes calls one after the other, on a thread that starts with the first.

    Args:    setup, teardown: called on the thread, before the first call and after the last.
    """

    def __init__(self, setup: Callable[[], None] | None = None, teardown: Callable[[], None] | None = None):
        self._setup, self._teardown, self._lock = setup, teardown, threading.Lock()
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
        if self._setup is not None:
            self._setup()
        while (item := self._queue.get()) is not None:
            work, call, args, kwargs = item
            work.run(call, args, kwargs)
            with self._lock:
                self._pending -= 1
            work.finish()
            del item, work, call, args, kwargs      # an engine that only a finished call still holds may go
        if self._teardown is not None:
            self._teardown()


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


class PlainCalls:
    """The verbs of an engine that hands whole calls to somebody else; arguments are checked as fleetcore's Group does.

    To be mixed into an Engine that has the methods at the end: they get flat arrays that fit together, one call at a
    time, and change `data` of what is written. Dead after its first failure, as a Group is: every later call raises the
    same.

    Args:    rank: within the group.  ranks: the members, numbered as in the whole fleet.
             timeout: default deadline of a call, seconds.
             thread: for submitted calls; None: a plain one.
    """

    def __init__(self, rank: int, ranks: Sequence[int], epoch: int = 0, timeout: float = 300.0, *,
                 thread: CallThread | None = None):
        self.rank, self.ranks, self.world_size = rank, tuple(ranks), len(ranks)
        self.local_rank, self.local_world_size = rank, self.world_size      # until somebody knows better
        self.epoch, self.timeout = epoch, timeout
        self.failure: FleetError | None = None      # what ended this group
        self._turn, self._count_lock = threading.Lock(), threading.Lock()
        self._calls = CallThread() if thread is None else thread
        self._operations: dict[str, dict] = {}
        self._durations: dict[str, Tally] = {}
        self._messages = {"sends": 0, "receives": 0, "sent_bytes": 0, "received_bytes": 0}
        self._sequence = 0
        self._pid, self._closed = os.getpid(), False
        REGISTRY.attach(self.families)

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
        self._require_message(tag, note)
        flat, limit = self._flat(x, False), self._limit(timeout)
        self._demand_alive()
        self._count_message("sends", "sent_bytes", flat)
        return self._isend(flat, dst, tag, bytes(note), limit)

    def irecv(self, make, src=None, tag=0, *, timeout=None):
        if src is not None:
            self._require_rank("src", src)
        self._require_message(tag, b"")
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
            operations, messages = {verb: dict(row) for verb, row in self._operations.items()}, dict(self._messages)
        return {"links": {}, "shared_memory": {"read_bytes": 0}, "operations": operations, "algorithms": {},
                "messages": messages | {"read_bytes": 0, "unread_bytes": {}, "links": {}}}

    def families(self) -> list[Family]:
        """What this engine counted, for the metrics of the process."""
        with self._count_lock:
            took = {verb: tally.distribution() for verb, tally in self._durations.items()}
        return traffic(self.stats(), took, self.failure)

    def close(self):
        if self._closed or self._pid != os.getpid():
            return
        self._closed = True
        REGISTRY.detach(self.families)
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
            self._durations.setdefault(verb, Tally(DURATION_BOUNDS_S)).add(seconds)

    def _count_message(self, what, how_much, flat):
        with self._count_lock:
            self._messages[what] += 1
            self._messages[how_much] += flat.data.nbytes

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

    def _require_message(self, tag, note):
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
    def _isend(self, flat: Flat, dst: int, tag: int, note: bytes, limit: Deadline) -> Any: ...

    @abstractmethod
    def _irecv(self, make: Callable[[bytes], Any], src: int | None, tag: int, limit: Deadline) -> Any:
        """As the verb; calls `_count_message` when the message is there."""

    @abstractmethod
    def _new_group(self, call: Call, ranks: tuple[int, ...], limit: Deadline) -> Any: ...

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
