"""P2: ranks as threads of one process, for tests of scripts: deterministic, every misuse told by name."""
from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from pyfleet.calls import Call, CallThread, PlainCalls
from pyfleet.config import ClusterConfig
from pyfleet.engines.base import Engine, Work, set_current
from pyfleet.errors import (
    CommunicationError,
    ConfigError,
    NotEnoughPeers,
    OutOfStep,
    PeerLost,
    Timeout,
)
from pyfleet.flat import Flat, fold, make_room
from pyfleet.placement import Placement
from pyfleet.wiring import Deadline


class MockEngine(PlainCalls, Engine):
    """One rank of a Room. Calls meet there, the last rank to come computes the result for all, in rank order.

    isend copies and is done at once. A rank's threads see its engine only where they are told; the communication
    thread does.
    """

    name = "mock"

    def __init__(self, room: Room, rank: int, epoch: int = 0, timeout: float = 300.0):
        in_force = functools.partial(set_current, thread=True)
        super().__init__(rank, room.ranks, epoch, timeout,
                         thread=CallThread(functools.partial(in_force, self), functools.partial(in_force, None)))
        self.room = room

    @classmethod
    def open(cls, place: Placement, cluster: ClusterConfig, timeout: float) -> MockEngine:
        """This thread's engine, once world_size threads have called.

        Raises:  NotEnoughPeers("found 1 of 3 ...") after `timeout` seconds; ConfigError when the rank is taken.
        """
        return cls(gather(place.rank, place.world_size, timeout), place.rank, timeout=cluster.timeout)

    def lose(self, reason: str) -> None:
        """End this rank for its peers, in all its groups: from here on they get PeerLost where they need it."""
        for room in self.room.family:
            if self.ranks[self.rank] in room.ranks:
                room.leave(room.ranks.index(self.ranks[self.rank]), reason)

    def _meet(self, call, offer, combine, limit):
        return self.room.meet(self.rank, self._sequence, self.epoch, call, offer, combine, limit)

    def _all_reduce(self, call, flat, op, limit):
        np.copyto(flat.data, self._meet(call, flat.data, same_for_all(lambda xs: fold(xs, flat.dtype, op)), limit))

    def _broadcast(self, call, flat, src, limit):
        result = self._meet(call, flat.data, same_for_all(lambda xs: xs[src].copy()), limit)
        if src != self.rank:
            np.copyto(flat.data, result)

    def _reduce(self, call, flat, dst, op, limit):
        result = self._meet(call, flat.data, same_for_all(lambda xs: fold(xs, flat.dtype, op)), limit)
        if dst == self.rank:
            np.copyto(flat.data, result)

    def _all_gather(self, call, out, x, counts, limit):
        np.copyto(out.data, self._meet(call, x.data, same_for_all(np.concatenate), limit))

    def _gather(self, call, out, x, counts, dst, limit):
        result = self._meet(call, x.data, same_for_all(np.concatenate), limit)
        if out is not None:
            np.copyto(out.data, result)

    def _scatter(self, call, out, x, counts, src, limit):
        np.copyto(out.data, self._meet(call, None if x is None else x.data, lambda xs: cut(xs[src].copy(), counts), limit))

    def _reduce_scatter(self, call, out, x, counts, op, limit):
        np.copyto(out.data, self._meet(call, x.data, lambda xs: cut(fold(xs, x.dtype, op), counts), limit))

    def _all_to_all(self, call, out, x, counts, limit):
        def exchange(xs):
            parts = [cut(x, row) for x, row in zip(xs, counts, strict=True)]
            return [np.concatenate([parts[source][rank] for source in range(len(xs))]) for rank in range(len(xs))]
        np.copyto(out.data, self._meet(call, x.data, exchange, limit))

    def _barrier(self, call, limit):
        self._meet(call, None, same_for_all(lambda _: None), limit)

    def _new_group(self, call, ranks, limit):
        members = [self.ranks[rank] for rank in ranks]
        room = self._meet(call, None, same_for_all(lambda _: Room(members, self.room.family)), limit)
        return MockEngine(room, ranks.index(self.rank), self.epoch, self.timeout) if self.rank in ranks else None

    def _isend(self, flat, dst, tag, note, limit):
        self.room.post(Message(self.rank, dst, tag, note, flat._replace(data=flat.data.copy(), owner=None)), self.epoch)
        return Sent()

    def _irecv(self, make, src, tag, limit):
        return Receiving(self, make, src, tag, limit)

    def _leave(self):
        reason = "has left (shut down)"
        if isinstance(self.failure, PeerLost) and self.failure.rank == self.rank:
            reason = "was interrupted"
        self.room.leave(self.rank, reason)


def same_for_all(function):
    """A combiner whose result every rank gets."""
    return lambda offers: [function(offers)] * len(offers)


def cut(array, counts):
    """The parts of a flat array."""
    return np.split(array, np.cumsum(counts)[:-1])


# ---- where ranks meet ------------------------------------------------------------------------------------------------

class Round:
    """One collective call: what has come so far, and the results once all is there."""

    def __init__(self):
        self.calls: dict[int, Call] = {}
        self.offers: dict[int, Any] = {}
        self.results: list | None = None


class Room:
    """What the ranks of a group share. Its first failure ends it for all of them, with the same verdict.

    Args:    ranks: the members, numbered as in the whole fleet.  family: the rooms of the fleet, this one among them.
    """

    def __init__(self, ranks: list[int], family: list[Room] | None = None):
        self.ranks, self.family = tuple(ranks), [] if family is None else family
        self.family.append(self)
        self.changed = threading.Condition()
        self.rounds: dict[int, Round] = {}
        self.mail: list[Message] = []           # sent and claimed by nobody, oldest first
        self.awaited: list[Receiving] = []      # receives that no message fits yet, oldest first
        self.gone: dict[int, str] = {}          # rank -> why
        self.verdict: Callable[[int, int, Call], CommunicationError] | None = None

    def meet(self, rank: int, sequence: int, epoch: int, call: Call, offer: Any, combine: Callable[[list], list],
             limit: Deadline) -> Any:
        """This rank's result of a collective call, once all ranks have made it.

        Args:    sequence: the call's number in this rank's order.
                 combine: from the offers in rank order to the results; called once, while all ranks hold still.
        Raises:  OutOfStep, PeerLost, Timeout.
        """
        with self.changed:
            self._demand_verdict(rank, epoch, call)
            now = self.rounds.setdefault(sequence, Round())
            now.calls[rank], now.offers[rank] = call, offer
            other = next((other for other, theirs in now.calls.items() if theirs != call), None)
            if other is not None:
                self._condemn(mismatch(dict(now.calls), sequence))
            elif len(now.calls) == len(self.ranks):
                try:
                    now.results = combine([now.offers[peer] for peer in range(len(self.ranks))])
                except BaseException as error:
                    self._condemn(loss(rank, f"could not compute the result ({type(error).__name__})"))
                    raise
                now.offers.clear()
                del self.rounds[sequence]
                self.changed.notify_all()
            while now.results is None:
                missing = [peer for peer in range(len(self.ranks)) if peer not in now.calls]
                lost = next((peer for peer in missing if peer in self.gone), None)
                if lost is not None and self.verdict is None:
                    self._condemn(loss(lost, self.gone[lost]))
                self._demand_verdict(rank, epoch, call)
                if not self._wait(limit):
                    self._condemn(lateness(missing[0], limit.seconds, rank))
            return now.results[rank]

    def post(self, message: Message, epoch: int) -> None:
        """Hand over a message.

        Raises:  PeerLost when its receiver has gone.
        """
        with self.changed:
            call = Call("send", f"{message.flat.type}[{message.flat.count}], dst={message.dst}, tag={message.tag}")
            self._demand_verdict(message.src, epoch, call)
            if message.dst in self.gone:
                self._condemn(loss(message.dst, self.gone[message.dst]))
                self._demand_verdict(message.src, epoch, call)
            receiver = next((receiver for receiver in self.awaited if receiver.fits(message)), None)
            if receiver is None:
                self.mail.append(message)
            else:
                self.awaited.remove(receiver)
                receiver.message = message
                self.changed.notify_all()

    def claim(self, receiver: Receiving) -> None:
        """Give the receiver the oldest message that fits, now or when it comes."""
        with self.changed:
            receiver.message = next((message for message in self.mail if receiver.fits(message)), None)
            if receiver.message is None:
                self.awaited.append(receiver)
            else:
                self.mail.remove(receiver.message)

    def await_message(self, receiver: Receiving, limit: Deadline, own: Deadline) -> bool:
        """Wait until the receiver has its message; False when `own` passed first.

        Raises:  PeerLost, Timeout at `limit`.
        """
        engine = receiver.engine
        with self.changed:
            while receiver.message is None:
                senders = range(len(self.ranks)) if receiver.src is None else [receiver.src]
                senders = [peer for peer in senders if peer != engine.rank or len(senders) == 1]
                if all(peer in self.gone for peer in senders) and self.verdict is None:
                    self._condemn(loss(senders[0], self.gone[senders[0]]))
                self._demand_verdict(engine.rank, engine.epoch, receiver.call)
                first = min(limit, own, key=lambda deadline: deadline.end)
                if not self._wait(first):
                    if first is own and own.end < limit.end:
                        return False
                    self._condemn(lateness(receiver.src, limit.seconds, engine.rank))
            return True

    def leave(self, rank: int, reason: str) -> None:
        """The rank will come no more. The first reason stays."""
        with self.changed:
            self.gone.setdefault(rank, reason)
            if any(rank in now.calls for now in self.rounds.values()):     # half-way: what it offered cannot be relied on
                self._condemn(loss(rank, self.gone[rank]))
            self.changed.notify_all()

    def _wait(self, limit):
        """Wait for news; whether there is time left for them."""
        left = limit.left()
        if left > 0:
            self.changed.wait(left)
        return left > 0

    def _condemn(self, verdict):
        self.verdict = self.verdict or verdict
        self.changed.notify_all()

    def _demand_verdict(self, rank, epoch, call):
        if self.verdict is not None:
            raise self.verdict(rank, epoch, call)


def mismatch(calls: dict[int, Call], sequence: int):
    """The verdict on ranks that called different operations: every rank hears its own and one that differs."""
    def verdict(rank, epoch, call):
        mine = calls.get(rank, call)
        other = next((peer for peer, theirs in calls.items() if theirs != mine and peer != rank), None)
        if other is None:
            return PeerLost(f"the group ended with operation {sequence}, before this rank called {call}",
                            operation=str(call), epoch=epoch)
        return OutOfStep(f"out of step: rank {rank} called {mine} while rank {other} called {calls[other]} "
                         f"(operation {sequence} of epoch {epoch})", rank=other, operation=str(mine), epoch=epoch)
    return verdict


def loss(lost: int, reason: str):
    """The verdict on a rank that has gone."""
    return lambda rank, epoch, call: PeerLost(f"rank {lost} {reason}; needed for {call}", rank=lost, operation=str(call),
                                              epoch=epoch)


def lateness(late: int | None, seconds: float, waiting: int):
    """The verdict on a rank (None: nobody in particular) that did not come in time."""
    def verdict(rank, epoch, call):
        who = "a peer" if late is None else f"rank {late}"
        told = f" (reported by rank {waiting})" if rank != waiting else ""
        return Timeout(f"timed out after {seconds:g} s waiting for {who}{told} during {call}", rank=late,
                       operation=str(call), epoch=epoch)
    return verdict


# ---- messages ----------------------------------------------------------------------------------------------------------

class Message:
    """A message under way; `flat` is its own copy of the data."""

    def __init__(self, src: int, dst: int, tag: int, note: bytes, flat: Flat):
        self.src, self.dst, self.tag, self.note, self.flat = src, dst, tag, note, flat


class Sent(Work):
    """A message that has been handed over."""

    def wait(self, timeout=None):
        return None

    def done(self):
        return True


class Receiving(Work):
    """A receive under way; its array is filled when somebody looks and the message is there."""

    def __init__(self, engine: MockEngine, make: Callable[[bytes], Any], src: int | None, tag: int, limit: Deadline):
        self.engine, self.make, self.src, self.tag, self.limit = engine, make, src, tag, limit
        self.call = Call("recv", f"src={'any' if src is None else src}, tag={tag}")
        self.message: Message | None = None
        self._lock, self._result, self._error = threading.Lock(), None, None
        engine.room.claim(self)

    def fits(self, message: Message) -> bool:
        """Whether this is a message that is waited for."""
        return message.dst == self.engine.rank and message.tag == self.tag and self.src in (None, message.src)

    def wait(self, timeout=None):
        try:
            there = self.engine.room.await_message(self, self.limit, Deadline(1e9 if timeout is None else timeout))
        except CommunicationError as error:
            self.engine.failure = self.engine.failure or error
            raise
        if not there:
            raise Timeout(f"recv is still under way after {timeout:g} s", operation=str(self.call))
        self._fill()
        if self._error is not None:
            raise self._error
        return self._result

    def done(self):
        try:
            there = self.engine.room.await_message(self, self.limit, Deadline(0))
        except CommunicationError:
            return True
        if there:
            self._fill()
        return there

    def _fill(self):
        with self._lock:
            if self._result is not None or self._error is not None:
                return
            sent = self.message.flat
            try:
                array, flat = make_room(self.make, self.message.note, sent)
                np.copyto(flat.data, sent.data)
                if flat.bring_back is not None:
                    flat.bring_back()
                self.engine._count_message("receives", "received_bytes", flat)
                self._result = array, self.message.src
            except Exception as error:      # noqa: BLE001 raised by wait
                self._error = error


# ---- how threads become ranks ------------------------------------------------------------------------------------------

_news = threading.Condition()
_gathering: dict[int, tuple[Room, set[int]]] = {}       # world_size -> the room that fills, and who is in it


def gather(rank: int, size: int, seconds: float) -> Room:
    """The room of `size` ranks, once they are all there.

    Raises:  NotEnoughPeers, ConfigError.
    """
    end = time.monotonic() + seconds
    with _news:
        room, present = _gathering.setdefault(size, (Room(list(range(size))), set()))
        if rank in present:
            raise ConfigError(f"rank {rank} of {size} is there already, in another thread")
        present.add(rank)
        if len(present) == size:
            del _gathering[size]
            _news.notify_all()
        while len(present) < size:
            left = end - time.monotonic()
            if left > 0:
                _news.wait(left)
                continue
            missing = ", ".join(str(peer) for peer in range(size) if peer not in present)
            problem = f"found {len(present)} of {size} ranks within {seconds:g} s; missing: {missing}"
            present.discard(rank)
            raise NotEnoughPeers(problem)
        return room


def make_world(size: int, timeout: float = 300.0) -> list[MockEngine]:
    """The engines of a whole fleet, in rank order, without a meeting."""
    if size < 1:
        raise ConfigError(f"world_size must be at least 1, not {size}")
    room = Room(list(range(size)))
    return [MockEngine(room, rank, timeout=timeout) for rank in range(size)]

