"""P2: collectives of MPI, through mpi4py, for ranks that mpirun or srun has started."""
from __future__ import annotations

import os
import threading
import time
from typing import Any

import numpy as np

from pyfleet.calls import Call, PlainCalls, behind
from pyfleet.config import ClusterConfig
from pyfleet.engines.base import Engine
from pyfleet.errors import CommunicationError, ConfigError, PeerLost, ReduceOp, ShapeError, Timeout
from pyfleet.flat import HEAD, Head, make_room, restore, simplify
from pyfleet.placement import Placement

NATIVE = {"float32", "float64", "int8", "int16", "int32", "int64", "uint8"}
OPS = {ReduceOp.SUM: "SUM", ReduceOp.MIN: "MIN", ReduceOp.MAX: "MAX", ReduceOp.PRODUCT: "PROD"}
PIECE = 2**30                   # elements per call of MPI: its counts have 31 bits
MAX_COUNT = 2**31 - 1
BODY_TAGS = 2**15               # bodies under way at one time between two ranks: the tags that every MPI has
SPIN_S = 0.002                  # looking again at once: MPI moves bytes only while somebody looks
SHORTEST_LOOK_S, LONGEST_LOOK_S = 0.00002, 0.0005

_library = threading.Lock()     # around every call of MPI, so that THREAD_SERIALIZED will do
_abandoned: list[tuple] = []    # requests that ran out of time, and their memory: MPI may still write there


class MpiEngine(PlainCalls, Engine):
    """Collectives over MPI's nonblocking calls, looked at until they are done or out of time.

    Half-width floats are summed in float32 and rounded once, NaN propagates; the order of sums, and whether all ranks
    get the same bits, is up to the MPI library (Open MPI and MPICH give them). MPI compares no calls and tells nobody
    that a rank has left: both end in wrong data or a Timeout, and most launchers end the job when a rank dies.
    """

    name = "mpi"

    def __init__(self, comm: Any, ranks: tuple[int, ...], timeout: float):
        super().__init__(comm.Get_rank(), ranks, timeout=timeout)
        self._mpi = load_mpi()
        with _library:              # three worlds of tags: collectives, heads of messages, bodies
            self._comm, self._heads, self._bodies = comm.Dup(), comm.Dup(), comm.Dup()
        self._num_sent, self._mail = [0] * self.world_size, threading.Lock()

    @classmethod
    def open(cls, place: Placement, cluster: ClusterConfig, timeout: float) -> MpiEngine:
        """The ranks of MPI.COMM_WORLD.

        Raises:  ConfigError without mpi4py or an MPI library, without threads in it, or when the launcher's environment
                 tells another rank than MPI.
        """
        mpi = load_mpi()
        if mpi.Query_thread() < mpi.THREAD_SERIALIZED:
            raise ConfigError("MPI was initialised without threads: backend 'mpi' needs at least MPI_THREAD_SERIALIZED")
        world = mpi.COMM_WORLD
        rank, size = world.Get_rank(), world.Get_size()
        if place.source != "alone" and (place.rank, place.world_size) != (rank, size):
            raise ConfigError(f"this is rank {rank} of {size} in MPI, but {place.rank} of {place.world_size} according to "
                              f"{place.source}: start the ranks with mpirun")
        return cls(world, tuple(range(size)), cluster.timeout)

    # ---- waiting -------------------------------------------------------------------------------------------------

    def _run(self, call, start, limit, *memory):
        """Start a nonblocking call of MPI and wait for it."""
        try:
            with _library:
                request = start()
            self._await(request, call, limit, memory)
        except self._mpi.Exception as error:
            raise self._failed(error, call) from None

    def _await(self, request, call, limit, memory, peer=None, status=None):
        pause, spin_end = SHORTEST_LOOK_S, time.monotonic() + SPIN_S
        try:
            while True:
                with _library:
                    if request.Test(status):
                        return
                if self._closed:
                    raise PeerLost(f"this rank has left during {call}", rank=self.rank, operation=str(call),
                                   epoch=self.epoch)
                if not limit.left():
                    who = "" if peer is None else f" waiting for rank {peer}"
                    raise Timeout(f"timed out after {limit.seconds:g} s{who} during {call}", rank=peer,
                                  operation=str(call), epoch=self.epoch)
                if time.monotonic() < spin_end:
                    os.sched_yield()        # not sleep(0), which takes a timer's slack of 50 us
                else:
                    time.sleep(pause)
                    pause = min(2 * pause, LONGEST_LOOK_S)
        except BaseException:
            _abandoned.append((request, memory))
            raise

    def _failed(self, error, call):
        return CommunicationError(f"MPI failed during {call}: {error.Get_error_string()}", operation=str(call),
                                  epoch=self.epoch)

    # ---- collectives ---------------------------------------------------------------------------------------------

    def _simplified(self, flat, op):
        work, simple = simplify(flat.data, flat.dtype, op, NATIVE)
        return work, getattr(self._mpi, OPS[simple])

    def _put(self, out, reduced, dtype, op):
        values = restore(reduced, dtype, op, self.world_size)
        if values is not out:
            out[...] = values

    def _all_reduce(self, call, flat, op, limit):
        work, mpi_op = self._simplified(flat, op)
        for piece in _pieces(work):
            self._run(call, lambda piece=piece: self._comm.Iallreduce(self._mpi.IN_PLACE, piece, mpi_op), limit, piece)
        self._put(flat.data, work, flat.dtype, op)

    def _broadcast(self, call, flat, src, limit):
        for piece in _pieces(_plain(flat.data)):
            self._run(call, lambda piece=piece: self._comm.Ibcast(piece, src), limit, piece)

    def _reduce(self, call, flat, dst, op, limit):
        work, mpi_op = self._simplified(flat, op)
        for piece in _pieces(work):
            send, receive = (self._mpi.IN_PLACE, piece) if self.rank == dst else (piece, None)
            self._run(call, lambda send=send, receive=receive: self._comm.Ireduce(send, receive, mpi_op, dst), limit, piece)
        if self.rank == dst:
            self._put(flat.data, work, flat.dtype, op)

    def _all_gather(self, call, out, x, counts, limit):
        _require_small(counts)
        mine = x.data.copy() if np.may_share_memory(x.data, out.data) else x.data
        self._run(call, lambda: self._comm.Iallgatherv(_plain(mine), [_plain(out.data), counts]), limit, mine, out)

    def _gather(self, call, out, x, counts, dst, limit):
        _require_small(counts)
        receive = None if out is None else [_plain(out.data), counts]
        self._run(call, lambda: self._comm.Igatherv(_plain(x.data), receive, dst), limit, out, x)

    def _scatter(self, call, out, x, counts, src, limit):
        _require_small(counts)
        send = None if x is None else [_plain(x.data), counts]
        self._run(call, lambda: self._comm.Iscatterv(send, _plain(out.data), src), limit, out, x)

    def _reduce_scatter(self, call, out, x, counts, op, limit):
        _require_small(counts)
        work, mpi_op = self._simplified(x, op)
        part = np.empty(counts[self.rank], work.dtype)
        self._run(call, lambda: self._comm.Ireduce_scatter(work, part, counts, mpi_op), limit, work, part, x)
        self._put(out.data, part, x.dtype, op)

    def _all_to_all(self, call, out, x, counts, limit):
        send, receive = counts[self.rank], [row[self.rank] for row in counts]
        _require_small(send)
        _require_small(receive)
        self._run(call, lambda: self._comm.Ialltoallv([_plain(x.data), send], [_plain(out.data), receive]), limit, out, x)

    def _barrier(self, call, limit):
        self._run(call, self._comm.Ibarrier, limit)

    def _new_group(self, call, ranks, limit):
        self._barrier(call, limit)          # what comes now has no deadline, but all ranks are here
        color = 0 if self.rank in ranks else self._mpi.UNDEFINED
        try:
            with _library:
                comm = self._comm.Split(color, ranks.index(self.rank) if self.rank in ranks else 0)
        except self._mpi.Exception as error:
            raise self._failed(error, call) from None
        if self.rank not in ranks:
            return None
        engine = MpiEngine(comm, tuple(self.ranks[rank] for rank in ranks), self.timeout)
        engine.local_rank, engine.local_world_size = self.local_rank, self.local_world_size
        return engine

    # ---- messages: a head with the tag, so that the receiver can make room; then a body with a tag of its own -------

    def _isend(self, flat, dst, tag, note, limit):
        call = Call("send", f"dst={dst}, tag={tag}")
        _require_small([len(flat.data)])
        with self._mail:
            number = self._num_sent[dst] % BODY_TAGS
            self._num_sent[dst] += 1
            head = np.frombuffer(Head(number, len(flat.data), flat.dtype, flat.parts, note).pack(), np.uint8)
            try:
                with _library:
                    requests = [self._heads.Isend(head, dst, tag), self._bodies.Isend(_plain(flat.data), dst, number)]
            except self._mpi.Exception as error:
                raise self._lost(error, call) from None
        return behind("send", self._finish_send, requests, (head, flat), dst, call, limit)

    def _finish_send(self, requests, memory, dst, call, limit):
        try:
            for request in requests:
                self._await(request, call, limit, memory, dst)
        except (self._mpi.Exception, CommunicationError) as error:
            raise self._lost(error, call) from None

    def _irecv(self, make, src, tag, limit):
        call, head = Call("recv", f"src={'any' if src is None else src}, tag={tag}"), np.empty(HEAD.size, np.uint8)
        try:
            with _library:
                request = self._heads.Irecv(head, self._mpi.ANY_SOURCE if src is None else src, tag)
        except self._mpi.Exception as error:
            raise self._lost(error, call) from None
        return behind("recv", self._finish_recv, request, head, make, src, call, limit)

    def _finish_recv(self, request, head, make, src, call, limit):
        try:
            status = self._mpi.Status()
            self._await(request, call, limit, head, src, status)
            src = status.Get_source() if src is None else src
            told, array, problem = Head.unpack(head.tobytes()), None, None
            flat = sent = told.scratch()
            try:
                array, flat = make_room(make, told.note, sent)
            except Exception as error:      # noqa: BLE001 raised below, when the message is out of the way
                problem = error
            with _library:
                body = self._bodies.Irecv(_plain(flat.data), src, told.number)
            self._await(body, call, limit, flat, src)
        except (self._mpi.Exception, CommunicationError) as error:
            raise self._lost(error, call) from None
        if problem is not None:
            raise problem
        if flat.bring_back is not None:
            flat.bring_back()
        self._count_message("receives", "received_bytes", flat)
        return array, src

    def _lost(self, error, call):
        """The error of ours, which has ended this group."""
        if isinstance(error, self._mpi.Exception):
            error = self._failed(error, call)
        self.failure = self.failure or error
        return error

    def _leave(self):
        """Communicators are left to MPI_Finalize: to free them would take all ranks."""


def load_mpi() -> Any:
    """mpi4py's MPI, which initialises the library on first use.

    Raises:  ConfigError naming what is missing.
    """
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise ConfigError(f"backend 'mpi' needs the package mpi4py: pip install mpi4py ({error})") from None
    except RuntimeError as error:
        raise ConfigError(f"mpi4py found no MPI library, such as Open MPI or MPICH: {error}") from None
    return MPI


def _plain(data):
    """The same memory as integers, which every MPI can move."""
    return data.view(f"i{data.itemsize}")


def _pieces(data):
    return [data[start:start + PIECE] for start in range(0, len(data), PIECE)]


def _require_small(counts):
    if sum(counts) > MAX_COUNT:
        raise ShapeError(f"MPI moves at most {MAX_COUNT} elements in one call, not {sum(counts)}")
