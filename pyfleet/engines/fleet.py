"""P2: pyfleet's own engine: a Group over shared memory or links, its arena, and one communication thread."""
from __future__ import annotations

import queue
import threading
import weakref
import zlib
from typing import Any

from pyfleet.arrays import hold, reduce_op
from pyfleet.calls import DURATION_BOUNDS_S, VERBS, CallWork
from pyfleet.engines.base import Engine, Levels, Work, all_gather_object
from pyfleet.errors import ConfigError
from pyfleet.metrics import REGISTRY, Distribution, Family, traffic
from pyfleet.staging import Staging
from pyfleet.wiring import Deadline, Wired, connect


class Filled:
    """Where a message goes: the array that `make` returns once the message's note is known."""

    def __init__(self, make):
        self.make, self.array, self.bring_back = make, None, None

    def pin(self, note):
        """The array's memory, or that of its copy."""
        self.array = self.make(note)
        data, self.bring_back = hold(self.array)
        return data

    def result(self, received):
        """(array, source) of what the mailbox says."""
        if self.bring_back is not None:
            self.bring_back()
            self.bring_back = None
        return self.array, received[1]


class Message(Work):
    """A message under way."""

    __slots__ = ("_filled", "_request")

    def __init__(self, request, filled: Filled | None = None):
        self._request, self._filled = request, filled

    def wait(self, timeout=None):
        received = self._request.wait(timeout)
        return None if self._filled is None else self._filled.result(received)

    def done(self):
        return self._request.done()


class FleetEngine(Engine):
    """Collectives of one group.

    Args:    wired: the group and what it was made of; `allocate` takes from its arena.
             number: which group it is; that of the whole fleet is 0.
             parent: the ranks' places in the engine that it is a group of.
    """

    name = "fleet"

    def __init__(self, wired: Wired, number: int = 0, parent: tuple[int, ...] = ()):
        self.wired, self.group, self.mailbox, self.parent = wired, wired.group, wired.mailbox, parent
        self._number, self._num_groups = number, 0
        self.rank, self.world_size, self.epoch = self.group.rank, self.group.size, self.group.epoch
        self.ranks = tuple(member.rank for member in wired.members)
        local = [place for place, member in enumerate(wired.members) if member.host == wired.members[self.rank].host]
        self.local_rank, self.local_world_size = local.index(self.rank), len(local)
        places = list(dict.fromkeys(member.host for member in wired.members))
        self.hosts = tuple(places.index(member.host) for member in wired.members)
        if len(places) > 1 and wired.cluster.transport == "tcp":
            self.hosts = tuple(range(self.world_size))
        self._queue: queue.SimpleQueue | None = None
        self._thread: threading.Thread | None = None
        self._driver: threading.Thread | None = None
        self._lock = threading.Lock()
        self._pending = 0               # calls submitted and not yet over
        self._closed = False
        self._staging = None            # where no rank has a device, calls take the shortest way
        if self.world_size > 1 and any(member.devices for member in wired.members):
            self._staging = Staging(self.group, wired.arena.allocate)
        self._quick = (self._staging or self.group).quick_all_reduce
        self.quick = self._quick
        self._groups: list[FleetEngine] = []        # made of this one
        self._levels: Levels | None = None
        REGISTRY.attach(self.families)

    # A synchronous call overtakes nothing: while submitted calls are pending it queues behind them, so that all ranks
    # see one order.
    def is_busy(self) -> bool:
        return self._pending > 0 and threading.current_thread() is not self._thread

    def all_reduce(self, x, op="sum", *, algorithm="auto", timeout=None):
        if self.is_busy():
            return self.submit("all_reduce", x, op, algorithm=algorithm, timeout=timeout).wait()
        code = op if type(op) is int else reduce_op(op)
        if self._staging is not None and self._staging.all_reduce(x, code, algorithm=algorithm, timeout=timeout):
            return
        data, bring_back = hold(x)
        self.group.all_reduce(data, code, timeout=timeout, algorithm=algorithm)
        if bring_back is not None:
            bring_back()

    def broadcast(self, x, src=0, *, timeout=None):
        if self.is_busy():
            return self.submit("broadcast", x, src, timeout=timeout).wait()
        if self._staging is not None and self._staging.broadcast(x, src, timeout=timeout):
            return
        data, bring_back = hold(x, writable=src != self.rank)
        self.group.broadcast(data, src, timeout=timeout)
        if bring_back is not None and src != self.rank:
            bring_back()

    def reduce(self, x, dst=0, op="sum", *, timeout=None):
        if self.is_busy():
            return self.submit("reduce", x, dst, op, timeout=timeout).wait()
        data, bring_back = hold(x, writable=dst == self.rank)
        self.group.reduce(data, dst, reduce_op(op), timeout=timeout)
        if bring_back is not None and dst == self.rank:
            bring_back()

    def all_gather_into(self, out, x, counts=None, *, timeout=None):
        self._fill("all_gather", out, x, counts, timeout=timeout)

    def gather_into(self, out, x, counts, dst=0, *, timeout=None):
        self._fill("gather", out if dst == self.rank else None, x, counts, dst, timeout=timeout)

    def scatter_into(self, out, x, counts, src=0, *, timeout=None):
        self._fill("scatter", out, x if src == self.rank else None, counts, src, timeout=timeout)

    def reduce_scatter_into(self, out, x, counts, op="sum", *, timeout=None):
        self._fill("reduce_scatter", out, x, counts, reduce_op(op), timeout=timeout)

    def all_to_all_into(self, out, x, counts, *, timeout=None):
        self._fill("all_to_all", out, x, counts, timeout=timeout)

    def _fill(self, verb, out, x, *args, timeout):
        """A verb of the group that reads x (or nothing) and fills out (or nothing)."""
        if self.is_busy():
            return self.submit(self._fill, verb, out, x, *args, timeout=timeout).wait()
        into, bring_back = hold(out) if out is not None else (None, None)
        data = hold(x, writable=False)[0] if x is not None else None
        getattr(self.group, verb)(into, data, *args, timeout=timeout)
        if bring_back is not None:
            bring_back()

    def barrier(self, *, timeout=None):
        if self.is_busy():
            return self.submit("barrier", timeout=timeout).wait()
        self.group.barrier(timeout=timeout)

    def isend(self, x, dst, tag=0, note=b"", *, timeout=None):
        work = Message(self.mailbox.isend(hold(x, writable=False)[0], dst, tag, note, timeout))
        self._drive()
        return work

    def irecv(self, make, src=None, tag=0, *, timeout=None):
        filled = Filled(make)
        work = Message(self.mailbox.irecv(filled.pin, src, tag, timeout), filled)
        self._drive()
        return work

    def send(self, x, dst, tag=0, note=b"", *, timeout=None):
        self.mailbox.send(hold(x, writable=False)[0], dst, tag, note, timeout)

    def recv(self, make, src=None, tag=0, *, timeout=None):
        filled = Filled(make)
        return filled.result(self.mailbox.recv(filled.pin, src, tag, timeout))

    def _drive(self):
        """Have messages move while nobody waits for them, from the first one that may be left alone."""
        with self._lock:
            if self._driver is None and not self._closed:
                self._driver = threading.Thread(target=self.mailbox.serve, daemon=True, name="pyfleet-messages")
                self._driver.start()

    def new_group(self, ranks, *, timeout=None):
        places = self.check_members(ranks)
        seconds = self.wired.cluster.peer_timeout if timeout is None else timeout
        deadline = Deadline(seconds)
        self._num_groups += 1
        number = zlib.crc32(f"{self._number}.{self._num_groups}".encode())

        def exchange(card):
            cards = all_gather_object(self, card, timeout=max(deadline.left(), 0.001))
            return [cards[place] for place in places]

        if self.rank not in places or len(places) == 1:
            exchange(None)              # every rank of this engine takes part in the round
        if self.rank not in places:
            return None
        members = [self.wired.members[place] for place in places]
        engine = FleetEngine(connect(members, places.index(self.rank), self.wired.arena, self.wired.cluster, deadline,
                                     exchange, namespace=self.wired.namespace, shared=self.wired.shared, number=number,
                                     epoch=self.epoch),
                             number, tuple(places))
        self._groups.append(engine)
        return engine

    def levels(self, *, timeout=None):
        if not 1 < len(set(self.hosts)) < self.world_size:
            return None
        if self.is_busy():
            return self.submit(self.levels, timeout=timeout).wait()
        if self._levels is None:
            hosts = [[place for place, host in enumerate(self.hosts) if host == each] for each in range(max(self.hosts) + 1)]
            num_owners = min(map(len, hosts))
            inside = [self.new_group(places, timeout=timeout) for places in hosts]
            across = [self.new_group([places[i] for places in hosts], timeout=timeout) for i in range(num_owners)]
            self._levels = Levels(next(filter(None, inside)), next(filter(None, across), None), num_owners)
        return self._levels

    def measure_links(self, *, timeout=None):
        if self.is_busy():
            return self.submit(self.measure_links, timeout=timeout).wait()
        return self.group.measure_links(timeout)

    def submit(self, call, *args, **kwargs):
        if isinstance(call, str):
            if call not in VERBS:
                raise ConfigError(f"there is no operation {call!r}")
            call = getattr(self, call)
        work = CallWork(call.__name__)
        if self._staging is not None:
            call = self._staging.in_order(call, args)
        with self._lock:
            if self._thread is None:
                self._queue = queue.SimpleQueue()
                self._thread = threading.Thread(target=_serve, args=(weakref.ref(self), self._queue), daemon=True,
                                                name="pyfleet-comm")
                self._thread.start()
            self._pending += 1
            self.quick = None           # synchronous calls queue behind this one
            self._queue.put((work, call, args, kwargs))
        return work

    def over(self) -> None:
        """One submitted call has ended."""
        with self._lock:
            self._pending -= 1
            if not self._pending:
                self.quick = self._quick

    def allocate(self, nbytes: int) -> Any:
        return self.wired.arena.allocate(nbytes)

    def stats(self):
        stats = self.group.stats() | {"messages": self.mailbox.stats()}
        for level in (self._levels.inside, self._levels.across) if self._levels is not None else ():
            if level is not None:           # its bytes are this engine's: nobody else knows of it
                _add_counts(stats, level)
        return stats

    def families(self) -> list[Family]:
        """What this engine counted, for the metrics of the process."""
        stats = self.stats()
        took = {verb: Distribution(DURATION_BOUNDS_S, counts, stats["operations"][verb]["seconds"])
                for verb, counts in self.group.durations().items()}
        for counts in (stats, stats["messages"]):       # peers by their number in the whole fleet
            counts["links"] = {self.ranks[place]: link for place, link in counts["links"].items()}
        return traffic(stats, took, self.group.failure)

    def record(self, on=True):
        self.group.record(on)

    def recorded(self):
        return self.group.recorded()

    def close(self):
        if self._closed:
            return
        self._closed = True
        REGISTRY.detach(self.families)
        for group in self._groups:
            group.close()
        self.mailbox.close()
        self.group.close()              # ends a call under way in the communication thread, too
        if self._thread is not None:
            self._queue.put(None)
            if threading.current_thread() is not self._thread:
                self._thread.join()
        if self._driver is not None and threading.current_thread() is not self._driver:
            self._driver.join()
        if self._staging is not None:
            self._staging.close()


def _add_counts(stats, level):
    """Let what a group has moved count in the statistics of the engine whose ranks they are."""
    counted = level.stats()
    stats["shared_memory"]["read_bytes"] += counted["shared_memory"]["read_bytes"]
    for place, link in counted["links"].items():
        own = stats["links"][level.parent[place]]
        for name, count in link.items():
            if isinstance(count, int):
                own[name] += count


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
