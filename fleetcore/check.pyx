"""C1: from Status to exception, in one place."""
import os

from cpython.exc cimport PyErr_Occurred
from libc.stdint cimport uint64_t
from fleetcore.posix cimport memcmp
from fleetcore.status cimport (
    OK, ST_CORRUPT, ST_INTERRUPTED, ST_LEFT, ST_NO_MEMORY, ST_OUT_OF_STEP, ST_PEER_LOST, ST_SYSTEM, ST_TIMEOUT, ST_UNSUPPORTED,
    VERB_ALL_GATHER, VERB_ALL_TO_ALL, VERB_BARRIER, VERB_BROADCAST, VERB_GATHER, VERB_REDUCE, VERB_SCATTER, Call, Fault,
)

from fleetcore.errors import (
    CommunicationError, CorruptData, DType, DTypeError, FleetError, OutOfStep, PeerLost, ReduceOp, Timeout, Verb,
)


cdef extern from "Python.h":
    int check_signals "PyErr_CheckSignals"() noexcept      # leaves the exception set for `check` to let through


class Context:
    """Who is speaking, for messages: the rank, the size and epoch of its group, and where each peer lives."""

    def __init__(self, rank, size, epoch=0, places=None):
        self.rank, self.size, self.epoch = rank, size, epoch
        self.places = places or {}

    def name(self, rank):
        """"rank 3" or "rank 3 (host, 192.0.2.7)"."""
        place = self.places.get(rank)
        return f"rank {rank} ({place})" if place else f"rank {rank}"


cdef int interrupted() noexcept nogil:
    cdef int rc
    with gil:
        rc = check_signals()
    return rc


cdef int adopt(Fault *mine, const Fault *reported, int rank) noexcept nogil:
    cdef Call call = mine.call
    cdef uint64_t done = mine.done_bytes, sequence = mine.sequence
    mine[0] = reported[0]
    mine.call, mine.done_bytes, mine.sequence = call, done, sequence
    if mine.reporter == rank:
        mine.reporter = -1
    if mine.status == ST_OUT_OF_STEP and memcmp(&call, &reported.theirs, sizeof(Call)) == 0:
        mine.rank, mine.theirs = reported.reporter, reported.call      # we are the other side
    return mine.status


cdef str describe(const Call *call):
    """The call as its user would write it: all_reduce(float32[1024], sum)."""
    verb = Verb(call.verb).name.lower() if call.verb < len(Verb) else f"verb {call.verb}"
    if call.verb == VERB_BARRIER:
        return "barrier()"
    dtype = DType(call.dtype).name.lower() if call.dtype < len(DType) else f"dtype {call.dtype}"
    array = f"{dtype}[{call.count}]"
    op = ReduceOp(call.op).name.lower() if call.op < len(ReduceOp) else call.op
    if call.verb in (VERB_BROADCAST, VERB_SCATTER):
        return f"{verb}({array}, src={call.root})"
    if call.verb == VERB_GATHER:
        return f"{verb}({array}, dst={call.root})"
    if call.verb == VERB_REDUCE:
        return f"{verb}({array}, {op}, dst={call.root})"
    if call.verb in (VERB_ALL_GATHER, VERB_ALL_TO_ALL):
        return f"{verb}({array})"
    return f"{verb}({array}, {op})"


cdef int check(int rc, const Fault *fault, object context) except -1:
    if rc >= 0:
        return rc
    if rc == ST_INTERRUPTED and PyErr_Occurred() != NULL:
        return -1
    raise build(fault, context)


cdef object build(const Fault *fault, object context):
    """The exception for a fault; `context` names the peers."""
    cdef int status = fault.status
    mine = describe(&fault.call)
    who = context.name(fault.rank) if fault.rank >= 0 else "a peer"
    told = f" (reported by rank {fault.reporter})" if fault.reporter >= 0 and fault.reporter != fault.rank else ""
    cause = f": {os.strerror(fault.error)}" if fault.error else ""
    where = f"{mine}, operation {fault.sequence} of epoch {context.epoch}"
    if fault.done_bytes:
        where += f", after {fault.done_bytes} bytes"
    kind = CommunicationError
    if status == ST_PEER_LOST:
        kind, text = PeerLost, f"lost {who}{cause}{told} during {where}"
    elif status == ST_LEFT:
        kind, text = PeerLost, f"{who} has left (shut down){told}; needed for {where}"
    elif status == ST_TIMEOUT:
        kind, text = Timeout, f"timed out waiting for {who}{told} during {where}"
    elif status == ST_OUT_OF_STEP:
        kind = OutOfStep
        text = (f"out of step: rank {context.rank} called {mine} while {who} called {describe(&fault.theirs)}"
                f" (operation {fault.sequence} of epoch {context.epoch}){told}")
    elif status == ST_CORRUPT:
        kind, text = CorruptData, f"damaged data from {who}{told} during {where}"
    elif status == ST_INTERRUPTED:
        kind, text = PeerLost, f"lost {who}: it was interrupted{told} during {where}"
    elif status == ST_UNSUPPORTED:
        return DTypeError(f"{mine} is not offered for this dtype")
    elif status == ST_NO_MEMORY:
        return MemoryError(f"no memory for {mine}")
    elif status == ST_SYSTEM:
        text = f"system call failed{cause}{told} during {where}"
    else:
        return FleetError(f"internal error {status} during {where}")
    return kind(text, rank=fault.rank if fault.rank >= 0 else None, operation=mine, epoch=context.epoch,
                done_bytes=fault.done_bytes)
