"""The contract of an engine: the thing that moves the bytes of collective calls, and the one in force."""
from __future__ import annotations

import json
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from pyfleet.calls import CallWork
from pyfleet.errors import ConfigError, NotInitialized


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


Work.register(CallWork)


@dataclass(frozen=True)
class Levels:
    """The groups that a call in two levels goes through: within each host, then among one rank of every host.

    Attributes:
        inside: the ranks of this host, in order.
        across: the ranks of all hosts with this one's place among those of its host; None from num_owners on.
        num_owners: ranks that the host with the fewest has.
    """

    inside: Engine
    across: Engine | None
    num_owners: int


class Engine(ABC):
    """Collective operations of one group of ranks, for one epoch.

    Every rank calls the same operations in the same order. Arrays are numpy arrays, torch tensors or objects with a
    writable contiguous buffer, as pyfleet.arrays understands them; only their elements in C order matter here, shapes
    are the caller's business. Ranks are numbered within the group. `counts` are elements per rank, the same list on all
    ranks; parts lie one after the other in rank order. Calls from several threads are serialised; inputs that are not
    the output are left as they were.

    Attributes:
        ranks: the group's members, numbered as in the whole fleet.
        hosts: a number for the host of every rank, the same on all ranks; () where that is not known. Between hosts, ranks
               that are not to share memory count as on hosts of their own.
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
    hosts: tuple[int, ...] = ()
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

    def levels(self, *, timeout: float | None = None) -> Levels | None:
        """The groups of a call in two levels, made at first use, when all ranks ask; None where hosts have one rank each, or
        all ranks are on one, or who is where is not known."""
        return None

    def measure_links(self, *, timeout: float | None = None) -> Any:
        """fleetcore.schedules.model.Links of the links between hosts, the same on all ranks, which all ask; None on one host,
        or where links are not this engine's own. The first time takes a fraction of a second."""
        return None

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
