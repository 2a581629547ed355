"""The contract of an engine: the thing that moves the bytes of collective calls, and the one in force."""
from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from pyfleet.errors import NotInitialized


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
    writable contiguous buffer, as pyfleet.arrays understands them. Calls from several threads are serialised.
    """

    name: str
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    epoch: int

    @abstractmethod
    def all_reduce(self, x: Any, op: Any = "sum", *, algorithm: str = "auto", timeout: float | None = None) -> None:
        """Replace x by the reduction of every rank's x; the same bits everywhere."""

    @abstractmethod
    def broadcast(self, x: Any, src: int = 0, *, timeout: float | None = None) -> None:
        """Replace x by rank src's x."""

    @abstractmethod
    def barrier(self, *, timeout: float | None = None) -> None:
        """Return once every rank has called it."""

    @abstractmethod
    def submit(self, verb: str, *args: Any, **kwargs: Any) -> Work:
        """Start self.<verb>(*args, **kwargs) on the communication thread; calls run in the order of submission."""

    @abstractmethod
    def allocate(self, nbytes: int) -> Any:
        """A writable buffer (buffer protocol, uint8) in memory that this engine moves without a copy."""

    @abstractmethod
    def stats(self) -> dict:
        """Bytes and messages since the start: {"links": {rank: {...}}, "shared_memory": {...}, "operations": {...}}."""

    @abstractmethod
    def close(self) -> None:
        """Leave the group; peers that still wait for this rank learn of it. Idempotent."""


_current: Engine | None = None


def current() -> Engine:
    """The engine that pyfleet.init() put in force."""
    if _current is None:
        raise NotInitialized("there is no fleet yet: call pyfleet.init() first")
    return _current


def set_current(engine: Engine | None) -> None:
    """Put an engine in force, or none."""
    global _current
    _current = engine


def is_current() -> bool:
    """Whether an engine is in force."""
    return _current is not None
