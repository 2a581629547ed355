"""P2: pyfleet's own engine: a Group over shared memory or links, its arena, and one communication thread."""
from __future__ import annotations

import queue
import threading
import weakref
from typing import Any

from fleetcore.arena import Arena
from fleetcore.group import Group

from pyfleet.arrays import hold, reduce_op
from pyfleet.engines.base import Engine, Work
from pyfleet.errors import ConfigError, Timeout


class FleetWork(Work):
    """A call on the communication thread."""

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

    def run(self, call, args, kwargs):
        """Make the call and keep what came of it; never raises."""
        try:
            self._result = call(*args, **kwargs)
        except BaseException as error:      # noqa: BLE001 belongs to whoever waits
            self._error = error

    def finish(self):
        """Let the waiters go."""
        self._over.set()


class FleetEngine(Engine):
    """Collectives of one group.

    Args:    group: the established Group.  arena: this rank's arena, from which `allocate` takes.
             local_rank, local_world_size: this rank's place among those of its host.
    """

    name = "fleet"

    def __init__(self, group: Group, arena: Arena, local_rank: int = 0, local_world_size: int = 1):
        self.group, self.arena = group, arena
        self.rank, self.world_size, self.epoch = group.rank, group.size, group.epoch
        self.local_rank, self.local_world_size = local_rank, local_world_size
        self._queue: queue.SimpleQueue | None = None
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._pending = 0               # calls submitted and not yet over
        self._closed = False

    # A synchronous call overtakes nothing: while submitted calls are pending it queues behind them, so that all ranks
    # see one order.
    def _now(self) -> bool:
        return not self._pending or threading.current_thread() is self._thread

    def all_reduce(self, x, op="sum", *, algorithm="auto", timeout=None):
        if not self._now():
            return self.submit("all_reduce", x, op, algorithm=algorithm, timeout=timeout).wait()
        data, bring_back = hold(x)
        self.group.all_reduce(data, op if type(op) is int else reduce_op(op), timeout=timeout, algorithm=algorithm)
        if bring_back is not None:
            bring_back()

    def broadcast(self, x, src=0, *, timeout=None):
        if not self._now():
            return self.submit("broadcast", x, src, timeout=timeout).wait()
        data, bring_back = hold(x, writable=src != self.rank)
        self.group.broadcast(data, src, timeout=timeout)
        if bring_back is not None and src != self.rank:
            bring_back()

    def barrier(self, *, timeout=None):
        if not self._now():
            return self.submit("barrier", timeout=timeout).wait()
        self.group.barrier(timeout=timeout)

    def submit(self, verb, *args, **kwargs):
        if verb not in ("all_reduce", "broadcast", "barrier"):
            raise ConfigError(f"there is no operation {verb!r}")
        work = FleetWork(verb)
        with self._lock:
            if self._thread is None:
                self._queue = queue.SimpleQueue()
                self._thread = threading.Thread(target=_serve, args=(weakref.ref(self), self._queue), daemon=True,
                                                name="pyfleet-comm")
                self._thread.start()
            self._pending += 1
            self._queue.put((work, getattr(self, verb), args, kwargs))
        return work

    def over(self) -> None:
        """One submitted call has ended."""
        with self._lock:
            self._pending -= 1

    def allocate(self, nbytes: int) -> Any:
        return self.arena.allocate(nbytes)

    def stats(self):
        return self.group.stats()

    def close(self):
        if self._closed:
            return
        self._closed = True
        self.group.close()              # ends a call under way in the communication thread, too
        if self._thread is not None:
            self._queue.put(None)
            if threading.current_thread() is not self._thread:
                self._thread.join()


def _serve(engine_ref, calls):
    """The communication thread: submitted calls, one after the other."""
    while (item := calls.get()) is not None:
        work, call, args, kwargs = item
        work.run(call, args, kwargs)
        engine = engine_ref()
        if engine is not None:
            engine.over()
        work.finish()
        del item, work, call, args, kwargs, engine
