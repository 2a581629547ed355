"""C4: the verbs of one group: check, pin, find the program, cross the GIL once, raise in one place."""
from _thread import allocate_lock
from collections import OrderedDict

from libc.stdint cimport int64_t, uint8_t, uint64_t, uintptr_t
from fleetcore.arena cimport Pin
from fleetcore.check cimport check
from fleetcore.domain cimport Domain
from fleetcore.executor cimport Executor, Program
from fleetcore.kernels.cast cimport cast
from fleetcore.kernels.reduce cimport supports
from fleetcore.posix cimport free, getpid, malloc, memset, now_ns
from fleetcore.status cimport (
    DT_BF16, DT_F16, DT_F32, DT_U8, NUM_OPS, OK, OP_MAX, OP_MEAN, OP_SUM, ST_LEFT, VERB_ALL_REDUCE, VERB_BARRIER, VERB_BROADCAST, Call, Fault, item_bytes,
)

from fleetcore.check import Context
from fleetcore.errors import ConfigError, DType, DTypeError, FleetError, PeerLost, ReduceOp, ShapeError
from fleetcore.schedules import SCHEDULES

cdef int MAX_PROGRAMS = 256        # cached schedules; a training loop repeats a few dozen shapes
cdef int DIRECT_RANKS = 8          # up to here every rank talks to every other one; beyond, the ring
NUM_VERBS = 5
ALGORITHMS = ("auto", *SCHEDULES["all_reduce"])


def load(target):
    """The object named "module:name"."""
    module, name = target.split(":")
    return getattr(__import__(module, fromlist=[name]), name)


cdef class Group:
    """Ranks with established links, for one epoch. Dead after its first failure: every later call raises the same.

    Every rank calls the same verbs in the same order. Calls from several threads are serialised. `data` is a Pin or
    anything that Pin takes; it is changed in place.

    Args:    domain: the Domain when all ranks share this host; else `executor`: the Executor over their links.
             epoch: the view's number.  timeout: default deadline of a call, seconds.
             places: {rank: "host"} for messages.
    """

    cdef readonly int rank, size, epoch
    cdef readonly double timeout
    cdef readonly Domain domain
    cdef readonly Executor executor
    cdef public object failure         # what ended this group, or None
    cdef object lock, context, programs
    cdef int pid
    cdef uint64_t sequence
    cdef uint64_t calls[5]
    cdef uint64_t call_bytes[5]
    cdef uint64_t call_ns[5]
    cdef dict chosen

    def __init__(self, int rank, int size, *, Domain domain=None, Executor executor=None, int epoch=0,
                 double timeout=300.0, dict places=None):
        if not 0 <= rank < size:
            raise ConfigError(f"rank {rank} is not in a group of {size}")
        if size > 1 and (domain is None) == (executor is None):
            raise ConfigError("a group of several ranks needs a domain or an executor, not both")
        self.rank, self.size, self.domain, self.executor = rank, size, domain, executor
        self.epoch, self.timeout = epoch, timeout
        self.lock = allocate_lock()
        self.context = Context(rank, size, epoch, places)
        self.programs = OrderedDict()
        self.chosen = {}
        self.pid = getpid()

    # ---- verbs --------------------------------------------------------------------------------------------------

    def all_reduce(self, data, int op=OP_SUM, *, timeout=None, str algorithm="auto"):
        """Replace data by its reduction over all ranks; the same bits everywhere.

        Args:    data: (n,) of any DType, contiguous, writable.  op: a ReduceOp.  timeout: seconds.
                 algorithm: over links "ring", "direct", "tree" or "auto"; float16 and bfloat16 travel as float32 on
                 "ring" and "tree", so that they are rounded once. Within a host there is only one way.
        Raises:  DTypeError, ConfigError before anything is sent; PeerLost, Timeout, OutOfStep, CorruptData.
        """
        cdef Pin pin = data if type(data) is Pin else Pin(data)
        cdef Call call
        if not 0 <= op < NUM_OPS:
            raise ConfigError(f"unknown reduction {op}")
        if not supports(pin.dtype, op) or (pin.parts == 2 and op != OP_SUM and op != OP_MEAN):
            kind = "complex" if pin.parts == 2 else DType(pin.dtype).name.lower()
            raise DTypeError(f"{ReduceOp(op).name.lower()} is not defined for {kind} arrays")
        if algorithm not in ALGORITHMS:
            raise ConfigError(f"unknown algorithm {algorithm!r}: one of {', '.join(ALGORITHMS)}")
        memset(&call, 0, sizeof(call))
        call.verb, call.dtype, call.op, call.count = VERB_ALL_REDUCE, pin.dtype, op, pin.count
        return self.perform(&call, pin, algorithm, timeout)

    def broadcast(self, data, int src=0, *, timeout=None):
        """Replace data by rank src's.

        Args:    data: (n,) of any DType, the same n and dtype on all ranks, writable on all but src.
        Raises:  ConfigError when src is not a rank; PeerLost, Timeout, OutOfStep, CorruptData.
        """
        cdef Pin pin = data if type(data) is Pin else Pin(data, self.rank != src)
        cdef Call call
        if not 0 <= src < self.size:
            raise ConfigError(f"src is {src}, but the ranks are 0 to {self.size - 1}")
        memset(&call, 0, sizeof(call))
        call.verb, call.dtype, call.root, call.count = VERB_BROADCAST, pin.dtype, src, pin.count
        return self.perform(&call, pin, "tree", timeout)

    def barrier(self, *, timeout=None):
        """Return once every rank has called it.

        Raises:  PeerLost, Timeout, OutOfStep.
        """
        cdef Call call
        cdef uint8_t token = 0
        memset(&call, 0, sizeof(call))
        call.verb, call.dtype, call.op, call.count = VERB_BARRIER, DT_U8, OP_MAX, 1
        return self.perform(&call, Pin.at(<uintptr_t>&token, 1, DT_U8, None), "tree", timeout)

    cdef object perform(self, Call *call, Pin pin, str algorithm, timeout):
        """Carry out a checked call: the one crossing of the GIL, the one place that raises."""
        cdef Program program = None
        cdef Fault fault
        cdef char *data = pin.ptr
        cdef char *wide = NULL
        cdef int rc = OK, narrow = call.dtype
        cdef size_t itemsize = item_bytes(call.dtype)
        cdef double seconds = self.timeout if timeout is None else timeout
        cdef int64_t start, deadline
        if not seconds > 0:
            raise ConfigError(f"timeout must be positive, not {timeout}")
        with self.lock:
            self.demand_alive()
            self.sequence += 1
            start = now_ns()
            deadline = start + <int64_t>(seconds * 1e9) if seconds < 1e9 else 1 << 62
            if self.executor is not None and call.count:
                if algorithm == "auto":
                    algorithm = "ring" if self.size == 2 or self.size > DIRECT_RANKS else "direct"
                if call.verb == VERB_ALL_REDUCE and (narrow == DT_F16 or narrow == DT_BF16) \
                        and (algorithm == "tree" or algorithm == "ring") and self.size > 2:
                    wide = <char *>malloc(call.count * 4)
                    if wide == NULL:
                        raise MemoryError("no memory for a float32 copy")
                    data, itemsize, call.dtype = wide, 4, DT_F32
                program = self.program(call, itemsize, algorithm)
                self.chosen[program.algorithm] = self.chosen.get(program.algorithm, 0) + 1
            with nogil:
                if self.domain is not None:
                    if call.verb == VERB_ALL_REDUCE:
                        rc = self.domain.all_reduce(call, data, deadline, &fault)
                    elif call.verb == VERB_BROADCAST:
                        rc = self.domain.broadcast(call, data, deadline, &fault)
                    else:
                        rc = self.domain.barrier(call, deadline, &fault)
                elif program is not None:
                    if wide != NULL:
                        cast(DT_F32, wide, narrow, pin.ptr, call.count)
                    rc = self.executor.run(program, call, data, self.sequence, deadline, &fault)
                    if wide != NULL:
                        if rc == OK:
                            cast(narrow, pin.ptr, DT_F32, wide, call.count)
                        free(wide)
            self.calls[call.verb] += 1
            self.call_bytes[call.verb] += pin.nbytes
            self.call_ns[call.verb] += now_ns() - start
            fault.sequence = self.sequence
            try:
                check(rc, &fault, self.context)
            except BaseException as error:
                self.failure = error if isinstance(error, FleetError) else PeerLost(
                    f"this rank was interrupted ({type(error).__name__})", rank=self.rank, epoch=self.epoch)
                if self.domain is not None:        # a peer that was only slow must not write to us later
                    try:
                        self.domain.arenas[self.rank].secede()
                    except (OSError, MemoryError) as problem:
                        error.add_note(f"shared memory could not be left ({problem}): a peer that was only slow may "
                                       f"still write to arrays in it")
                raise

    cdef int demand_alive(self) except -1:
        if self.failure is not None:
            again = type(self.failure)(f"the group is dead since an earlier call: {self.failure}",
                                       **{k: v for k, v in vars(self.failure).items() if not k.startswith("_")})
            raise again from self.failure
        if self.pid != getpid():
            raise FleetError("this group belongs to the parent process: call pyfleet.init() in the child instead")
        return 0

    cdef Program program(self, Call *call, size_t itemsize, str algorithm):
        """The compiled schedule for this call, from the cache when it was used before."""
        verb = ("barrier", "all_reduce", "broadcast", "reduce_scatter", "all_gather")[call.verb]
        key = (verb, algorithm, call.count, itemsize, call.root)
        found = self.programs.get(key)
        if found is None:
            schedule = load(SCHEDULES["all_reduce" if call.verb == VERB_BARRIER else verb][algorithm])
            extra = (call.root,) if algorithm == "tree" else ()
            found = Program(schedule(self.rank, self.size, call.count, *extra), itemsize, self.rank, self.size,
                            algorithm)
            self.programs[key] = found
            if len(self.programs) > MAX_PROGRAMS:
                self.programs.popitem(last=False)
        else:
            self.programs.move_to_end(key)
        return found

    # ---- the rest -----------------------------------------------------------------------------------------------

    def stats(self):
        """Since the start: {"operations": {verb: {"calls", "bytes", "seconds"}}, "links": {rank: {...}},
        "shared_memory": {"read_bytes"}, "algorithms": {name: calls}}. Link bytes are counted at the socket."""
        verbs = ("barrier", "all_reduce", "broadcast", "reduce_scatter", "all_gather")
        operations = {verbs[i]: {"calls": self.calls[i], "bytes": self.call_bytes[i], "seconds": self.call_ns[i] / 1e9}
                      for i in range(5) if self.calls[i]}
        links = {}
        if self.executor is not None:
            links = {peer: link.stats() for peer, link in enumerate(self.executor.links) if link is not None}
        return {
            "operations": operations,
            "links": links,
            "shared_memory": {"read_bytes": self.domain.read_bytes if self.domain is not None else 0},
            "algorithms": dict(self.chosen),
        }

    def close(self):
        """Leave in order: peers that still need this rank get PeerLost, and so does a call under way in another thread.

        Idempotent.
        """
        if self.pid != getpid():
            return
        if not self.lock.acquire(False):
            self.leave(busy=True)
            self.lock.acquire()
        try:
            if self.failure is None:
                self.leave(busy=False)
                self.failure = FleetError("this group was closed")
            if self.executor is not None:
                for link in self.executor.links + self.executor.controls:
                    if link is not None:
                        link.close()
        finally:
            self.lock.release()

    cdef int leave(self, bint busy) except -1:
        cdef Fault fault
        memset(&fault, 0, sizeof(fault))
        fault.status, fault.rank, fault.reporter, fault.sequence = ST_LEFT, self.rank, self.rank, self.sequence
        if self.domain is not None:
            fault.sequence = self.domain.sequence + (0 if busy else 1)     # the first operation this rank is missing in
            self.domain.condemn(&fault)
        if self.executor is not None:
            if busy:
                self.executor.aborted = 1          # the call under way tells the peers
            else:
                self.executor.leave(self.sequence)
        return 0
