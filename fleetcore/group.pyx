"""C4: the verbs of one group: check, pin, find the program, cross the GIL once, raise in one place."""
import os
import time
from _thread import allocate_lock
from array import array
from collections import OrderedDict
from zlib import crc32

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t, uintptr_t
from fleetcore.arena cimport Pin
from fleetcore.check cimport check
from fleetcore.domain cimport Domain, Want
from fleetcore.executor cimport Executor, Program
from fleetcore.kernels.cast cimport cast
from fleetcore.kernels.reduce cimport supports
from fleetcore.posix cimport calloc, floor_log2, free, malloc, memcpy, memset, now_ns
from fleetcore.status cimport (
    DT_BF16, DT_F16, DT_F32, DT_U8, NUM_OPS, NUM_VERBS, OK, OP_MAX, OP_MEAN, OP_SUM, ST_LEFT, VERB_ALL_GATHER, VERB_ALL_REDUCE,
    VERB_ALL_TO_ALL, VERB_BARRIER, VERB_BROADCAST, VERB_GATHER, VERB_REDUCE, VERB_REDUCE_SCATTER, VERB_SCATTER, Call, Fault,
    item_bytes,
)

from fleetcore.check import Context
from fleetcore.errors import ConfigError, DType, DTypeError, FleetError, PeerLost, ReduceOp, ShapeError, Verb
from fleetcore.schedules import SCHEDULES, model, tree, two_level
from fleetcore.schedules.base import cut, shares_around, shares_for

cdef int forks = 0                 # how many forks this process descends from since the import; cheaper than getpid()
cdef int MAX_PROGRAMS = 256        # cached schedules; a training loop repeats a few dozen shapes
cdef int DIRECT_RANKS = 8          # of one host over links: up to here every rank talks to every other one, beyond the ring
cdef tuple VERBS = tuple(verb.name.lower() for verb in Verb)
TWO_LEVEL = "two_level"            # shared memory within hosts, links between them: for all_reduce and broadcast
ALGORITHMS = ("auto", *dict.fromkeys(name for kinds in SCHEDULES.values() for name in kinds), TWO_LEVEL)
# Links between hosts are measured when a call first moves this much: it pays for it.
cdef size_t MEASURE_BYTES = 256 * 1024
MEASURE_S = 0.015                  # per round: 15 bursts of a shaper that works in milliseconds
MEASURE_ROUNDS = 8                 # partners that each rank tries
LIKE_SPEED = 0.75                  # measurements of like links under load differ by up to this factor
UNMEASURED = (100e-6, 125e6)       # latency (s) and bandwidth (bytes/s) of a wired home network
# Of what the model cannot tell apart, the first of the table is the gentlest: a ring has one sender per receiver, so that
# no switch drops anything, and took 70 ms of CPU where direct took 85 (4 hosts, 1 Gbit/s, 25 MB).
SLACK = 0.01
OVERHEAD_S = 5e-6                  # of a message at one end: system call, frame and checksum, as loopback shows it
# Here a rank folds partial sums of others, so that half-width floats would be rounded at every hop.
cdef tuple FOLDS_PARTIAL_SUMS = ("ring", "tree", "halving", TWO_LEVEL)


def load(target):
    """The object named "module:name"."""
    module, name = target.split(":")
    return getattr(__import__(module, fromlist=[name]), name)


def _forked():
    global forks
    forks += 1


os.register_at_fork(after_in_child=_forked)


# How long calls took is counted in buckets of a quarter of an octave, so that a quantile is off by 25 % at most: from
# 256 ns, which no call between two ranks stays under, to 275 s, the default deadline.
cdef enum:
    FIRST_OCTAVE = 8
    LAST_OCTAVE = 38
    NUM_BUCKETS = 4 * (LAST_OCTAVE - FIRST_OCTAVE) + 2
DURATION_BOUNDS_NS = tuple([int(2.0 ** (FIRST_OCTAVE + step // 4) * (1 + step % 4 / 4.0)) for step in range(NUM_BUCKETS - 1)])


cdef struct Job:                   # where a call's arrays lie, as offsets (in elements) of the whole array
    char *source                   # element source_at of the whole input; NULL: this rank has none
    size_t source_at, source_count
    char *target                   # element target_at of the whole output; this rank's part ends at target_stop
    size_t target_at, target_stop
    const char *own_from           # what this rank gives to itself
    char *own_to
    size_t own_bytes
    size_t longest                 # elements of the longest input


cdef class Group:
    """Ranks with established links, for one epoch. Dead after its first failure: every later call raises the same.

    Every rank calls the same verbs in the same order. Calls from several threads are serialised. Arrays are Pins or
    anything that Pin takes. `counts` are elements per rank, the same list on all ranks; parts lie in rank order.

    Args:    domain: the Domain of this host's ranks, when there are several and they may share memory.
             executor: the Executor over the links of all ranks, unless the domain has all of them.
             epoch: the view's number.  timeout: default deadline of a call, seconds.
             hosts: per rank, the number of its host; None: all on one.
             two_level: ranks of one host share memory on every host that has several, and there are links besides.
             places: {rank: "host"} for messages.
             links: model.Links that were measured already, the same on all ranks; None: measured when first of use.
    """

    cdef readonly int rank, size, epoch
    cdef readonly double timeout
    cdef readonly Domain domain
    cdef readonly Executor executor
    cdef public object failure         # what ended this group, or None
    cdef object turn, context, programs    # turn: released to the next thread by the one before it
    cdef int born                      # `forks` when it was made
    cdef Py_ssize_t users              # threads in a call or waiting for their turn
    cdef uint64_t sequence
    cdef uint64_t[9] calls             # per verb
    cdef uint64_t[9] call_bytes
    cdef uint64_t[9] call_ns
    cdef uint64_t[9][NUM_BUCKETS] call_times
    cdef dict chosen
    cdef Want *wants
    cdef char *scratch
    cdef size_t scratch_bytes
    cdef readonly list hosts
    cdef bint two_level
    cdef readonly object links         # model.Links, once measured
    cdef object choices
    cdef bint measuring
    cdef object profile                # None, or a list of what each call was and when

    def __cinit__(self, int rank, int size, **kwargs):
        self.wants = <Want *>calloc(max(1, size), sizeof(Want))
        if self.wants == NULL:
            raise MemoryError()

    def __init__(self, int rank, int size, *, Domain domain=None, Executor executor=None, int epoch=0,
                 double timeout=300.0, list hosts=None, bint two_level=False, dict places=None, links=None):
        if not 0 <= rank < size:
            raise ConfigError(f"rank {rank} is not in a group of {size}")
        if size > 1 and domain is None and executor is None:
            raise ConfigError("a group of several ranks needs a domain or an executor")
        self.rank, self.size, self.domain, self.executor = rank, size, domain, executor
        self.epoch, self.timeout = epoch, timeout
        self.turn = allocate_lock()
        self.turn.acquire()
        self.context = Context(rank, size, epoch, places)
        self.programs = OrderedDict()
        self.choices = OrderedDict()
        self.hosts, self.two_level = hosts or [0] * size, two_level
        if domain is not None and domain.size != self.hosts.count(self.hosts[rank]):
            raise ConfigError(f"the domain has {domain.size} ranks, the host {self.hosts.count(self.hosts[rank])}")
        if links is not None and len(links.bandwidths) != size:
            raise ConfigError(f"there are links of {len(links.bandwidths)} ranks for a group of {size}")
        self.links = links
        self.chosen = {}
        self.born = forks

    def __dealloc__(self):
        free(self.wants)
        free(self.scratch)

    # ---- verbs --------------------------------------------------------------------------------------------------

    def all_reduce(self, data, int op=OP_SUM, *, timeout=None, str algorithm="auto"):
        """Replace data by its reduction over all ranks; the same bits everywhere.

        Args:    data: (n,) of any DType, contiguous, writable.  op: a ReduceOp.  timeout: seconds.
                 algorithm: one of ALGORITHMS that offers all_reduce. Where partial sums travel, float16 and bfloat16
                 travel as float32, so that they are rounded once. Within a host there is only one way.
        Raises:  DTypeError, ConfigError before anything is sent; PeerLost, Timeout, OutOfStep, CorruptData.
        """
        cdef Pin pin = data if type(data) is Pin else Pin(data)
        cdef Call call
        cdef Job job
        self.demand_op(pin, op)
        prepare(&call, &job, VERB_ALL_REDUCE, pin)
        call.op = op
        if self.executor is None and algorithm == "auto":
            return self.reduce_in_memory(&call, pin.ptr, timeout)
        job.target = job.source = pin.ptr
        job.target_stop = pin.count
        return self.perform(&call, &job, None, algorithm, timeout)

    def quick_all_reduce(self, data, int op, timeout, /):
        """As all_reduce; False, with nothing done, when data is not plain writable memory that can be used as it lies."""
        cdef Pin pin
        cdef Call call
        if self.executor is not None:
            return False
        try:
            pin = Pin(data)
        except (ShapeError, DTypeError):
            return False
        self.demand_op(pin, op)
        memset(&call, 0, sizeof(Call))
        call.verb, call.op, call.dtype, call.count = VERB_ALL_REDUCE, op, pin.dtype, pin.count
        self.reduce_in_memory(&call, pin.ptr, timeout)
        return True

    def broadcast(self, data, int src=0, *, timeout=None, str algorithm="auto"):
        """Replace data by rank src's.

        Args:    data: (n,) of any DType, the same n and dtype on all ranks, writable on all but src.
        Raises:  ConfigError when src is not a rank; PeerLost, Timeout, OutOfStep, CorruptData.
        """
        cdef Pin pin = data if type(data) is Pin else Pin(data, self.rank != src)
        cdef Call call
        cdef Job job
        prepare(&call, &job, VERB_BROADCAST, pin)
        call.root = self.demand_rank(src, "src")
        job.source = job.target = pin.ptr
        job.target_stop = pin.count
        return self.perform(&call, &job, None, algorithm, timeout)

    def reduce(self, data, int dst=0, int op=OP_SUM, *, timeout=None, str algorithm="auto"):
        """On rank dst, replace data by its reduction over all ranks.

        Args:    data: (n,) of any DType, writable on dst; the other ranks' is left as it was.
        Raises:  as all_reduce.
        """
        cdef Pin pin = data if type(data) is Pin else Pin(data, self.rank == dst)
        cdef Call call
        cdef Job job
        self.demand_op(pin, op)
        prepare(&call, &job, VERB_REDUCE, pin)
        call.op, call.root = op, self.demand_rank(dst, "dst")
        job.source = pin.ptr
        if self.rank == dst:
            job.target, job.target_stop = pin.ptr, pin.count
        return self.perform(&call, &job, None, algorithm, timeout)

    def reduce_scatter(self, out, data, counts=None, int op=OP_SUM, *, timeout=None, str algorithm="auto"):
        """Fill out with this rank's part of the reduction of all ranks' data.

        Args:    out: (counts[rank],), may be that part of data.  data: (sum(counts),), left as it was otherwise.
                 counts: None for equal parts.
        Raises:  ShapeError; else as all_reduce.
        """
        cdef Pin into = out if type(out) is Pin else Pin(out)
        cdef Pin pin = data if type(data) is Pin else Pin(data, False)
        cdef Call call
        cdef Job job
        bounds = self.bounds_of(counts, into.count, into.parts)
        self.demand_op(pin, op)
        self.demand_same(into, pin)
        self.demand_count(into, bounds[self.rank + 1] - bounds[self.rank], "out")
        self.demand_count(pin, bounds[self.size], "data")
        prepare(&call, &job, VERB_REDUCE_SCATTER, pin)
        call.op, call.root = op, digest(bounds)
        job.source, job.target = pin.ptr, into.ptr
        job.target_at, job.target_stop = bounds[self.rank], bounds[self.rank + 1]
        return self.perform(&call, &job, bounds, algorithm, timeout)

    def all_gather(self, out, data, counts=None, *, timeout=None, str algorithm="auto"):
        """Fill out with every rank's data.

        Args:    out: (sum(counts),).  data: (counts[rank],), may be its part of out.  counts: None for equal parts.
        Raises:  ShapeError, DTypeError; PeerLost, Timeout, OutOfStep, CorruptData.
        """
        cdef Pin into = out if type(out) is Pin else Pin(out)
        cdef Pin pin = data if type(data) is Pin else Pin(data, False)
        cdef Call call
        cdef Job job
        bounds = self.bounds_of(counts, pin.count, pin.parts)
        self.demand_same(into, pin)
        self.demand_count(into, bounds[self.size], "out")
        self.demand_count(pin, bounds[self.rank + 1] - bounds[self.rank], "data")
        prepare(&call, &job, VERB_ALL_GATHER, into)
        call.root = digest(bounds)
        job.source, job.source_at, job.source_count = pin.ptr, bounds[self.rank], pin.count
        job.target, job.target_stop = into.ptr, into.count
        job.own_from, job.own_to, job.own_bytes = pin.ptr, into.ptr + job.source_at * item_bytes(pin.dtype), pin.nbytes
        return self.perform(&call, &job, bounds, algorithm, timeout)

    def gather(self, out, data, counts=None, int dst=0, *, timeout=None, str algorithm="auto"):
        """On rank dst, fill out with every rank's data.

        Args:    out: (sum(counts),) on dst, None elsewhere.  data: (counts[rank],).  counts: None for equal parts.
        Raises:  ShapeError, DTypeError, ConfigError; PeerLost, Timeout, OutOfStep, CorruptData.
        """
        cdef Pin pin = data if type(data) is Pin else Pin(data, False)
        cdef Pin into
        cdef Call call
        cdef Job job
        self.demand_rank(dst, "dst")
        bounds = self.bounds_of(counts, pin.count, pin.parts)
        self.demand_count(pin, bounds[self.rank + 1] - bounds[self.rank], "data")
        prepare(&call, &job, VERB_GATHER, pin)
        call.root, call.count = dst, bounds[self.size]
        job.source, job.source_at, job.source_count = pin.ptr, bounds[self.rank], pin.count
        if self.rank == dst:
            into = out if type(out) is Pin else Pin(out)
            self.demand_same(into, pin)
            self.demand_count(into, bounds[self.size], "out")
            job.target, job.target_stop = into.ptr, into.count
            job.own_from, job.own_to, job.own_bytes = pin.ptr, into.ptr + job.source_at * item_bytes(pin.dtype), pin.nbytes
        return self.perform(&call, &job, bounds, algorithm, timeout)

    def scatter(self, out, data, counts=None, int src=0, *, timeout=None, str algorithm="auto"):
        """Fill out with this rank's part of rank src's data.

        Args:    out: (counts[rank],).  data: (sum(counts),) on src, None elsewhere.  counts: None for equal parts.
        Raises:  ShapeError, DTypeError, ConfigError; PeerLost, Timeout, OutOfStep, CorruptData.
        """
        cdef Pin into = out if type(out) is Pin else Pin(out)
        cdef Pin pin
        cdef Call call
        cdef Job job
        self.demand_rank(src, "src")
        bounds = self.bounds_of(counts, into.count, into.parts)
        self.demand_count(into, bounds[self.rank + 1] - bounds[self.rank], "out")
        prepare(&call, &job, VERB_SCATTER, into)
        call.root, call.count = src, bounds[self.size]
        job.target, job.target_at, job.target_stop = into.ptr, bounds[self.rank], bounds[self.rank + 1]
        job.source_count = 0
        if self.rank == src:
            pin = data if type(data) is Pin else Pin(data, False)
            self.demand_same(into, pin)
            self.demand_count(pin, bounds[self.size], "data")
            job.source, job.source_count = pin.ptr, pin.count
            job.own_from, job.own_to, job.own_bytes = pin.ptr + job.target_at * item_bytes(pin.dtype), into.ptr, into.nbytes
        return self.perform(&call, &job, bounds, algorithm, timeout)

    def all_to_all(self, out, data, counts, *, timeout=None, str algorithm="auto"):
        """Send part j of data to rank j, and fill out with what came, in rank order.

        Args:    counts: counts[i][j] elements go from rank i to rank j; the same table on all ranks.
                 out: (sum of column rank,).  data: (sum of row rank,).
        Raises:  ShapeError, DTypeError; PeerLost, Timeout, OutOfStep, CorruptData.
        """
        cdef Pin into = out if type(out) is Pin else Pin(out)
        cdef Pin pin = data if type(data) is Pin else Pin(data, False)
        cdef Call call
        cdef Job job
        cdef int me = self.rank
        cdef size_t itemsize = item_bytes(pin.dtype)
        self.demand_same(into, pin)
        if len(counts) != self.size:
            raise ShapeError(f"counts has {len(counts)} rows for {self.size} ranks")
        table = tuple(self.bounds_of(row, 0, pin.parts) for row in counts)
        columns = self.bounds_of([row[me] for row in counts], 0, pin.parts)
        self.demand_count(pin, table[me][self.size], "data")
        self.demand_count(into, columns[self.size], "out")
        prepare(&call, &job, VERB_ALL_TO_ALL, pin)
        call.count, call.root = sum(row[self.size] for row in table), digest(table)
        job.source, job.target, job.target_stop = pin.ptr, into.ptr, into.count
        job.own_from = pin.ptr + <size_t>table[me][me] * itemsize
        job.own_to = into.ptr + <size_t>columns[me] * itemsize
        job.own_bytes = (<size_t>columns[me + 1] - <size_t>columns[me]) * itemsize
        return self.perform(&call, &job, table, algorithm, timeout)

    def barrier(self, *, timeout=None):
        """Return once every rank has called it.

        Raises:  PeerLost, Timeout, OutOfStep.
        """
        cdef Call call
        cdef Job job
        cdef uint8_t token = 0
        prepare(&call, &job, VERB_BARRIER, Pin.at(<uintptr_t>&token, 1, DT_U8, None))
        call.op = OP_MAX
        job.source = job.target = <char *>&token
        job.target_stop = 1
        return self.perform(&call, &job, None, "auto", timeout)

    # ---- checks before anything is sent -------------------------------------------------------------------------

    cdef int demand_op(self, Pin pin, int op) except -1:
        if not 0 <= op < NUM_OPS:
            raise ConfigError(f"unknown reduction {op}")
        if not supports(pin.dtype, op) or (pin.parts == 2 and op != OP_SUM and op != OP_MEAN):
            kind = "complex" if pin.parts == 2 else DType(pin.dtype).name.lower()
            raise DTypeError(f"{ReduceOp(op).name.lower()} is not defined for {kind} arrays")
        return 0

    cdef int demand_rank(self, int rank, str role) except -1:
        if not 0 <= rank < self.size:
            raise ConfigError(f"{role} is {rank}, but the ranks are 0 to {self.size - 1}")
        return rank

    cdef int demand_same(self, Pin out, Pin data) except -1:
        if out.dtype != data.dtype or out.parts != data.parts:
            raise DTypeError(f"out is {DType(out.dtype).name.lower()}, but data is {DType(data.dtype).name.lower()}")
        return 0

    cdef int demand_count(self, Pin pin, size_t count, str name) except -1:
        if pin.count != count:
            raise ShapeError(f"{name} has {pin.count // pin.parts} elements, not {count // pin.parts}")
        return 0

    cdef tuple bounds_of(self, counts, size_t equal, int parts):
        """Where the parts of `counts` elements (of `parts` numbers each) begin and end; None: `equal` numbers each."""
        bounds, end = [0], 0
        if counts is None:
            return tuple(range(0, equal * self.size + 1, equal)) if equal else (0,) * (self.size + 1)
        if len(counts) != self.size:
            raise ShapeError(f"counts has {len(counts)} entries for {self.size} ranks")
        for count in counts:
            if count < 0:
                raise ShapeError(f"counts has a negative entry: {count}")
            end += int(count) * parts
            bounds.append(end)
        return tuple(bounds)

    # ---- one call at a time -------------------------------------------------------------------------------------

    cdef int enter(self) except -1:
        """Wait for this thread's turn. The GIL makes `users` consistent; `turn` is passed from thread to thread."""
        self.users += 1
        if self.users > 1:
            try:
                self.turn.acquire()
            except BaseException:                  # Ctrl-C: the turn may have been passed to this thread all the same
                if self.turn.acquire(False):
                    self.leave_turn()
                else:
                    self.users -= 1
                raise
        return 0

    cdef int leave_turn(self) except -1:
        self.users -= 1
        if self.users > 0:
            self.turn.release()
        return 0

    cdef int64_t deadline(self, timeout, int64_t start) except -1:
        cdef double seconds = self.timeout if timeout is None else timeout
        if not seconds > 0:
            raise ConfigError(f"timeout must be positive, not {timeout}")
        return start + <int64_t>(seconds * 1e9) if seconds < 1e9 else 1 << 62

    cdef object reduce_in_memory(self, Call *call, char *data, timeout):
        """all_reduce where there are no links: what perform() does, and nothing else."""
        cdef Fault fault
        cdef int rc = OK
        cdef int64_t start = now_ns(), deadline = self.deadline(timeout, start)
        self.enter()
        try:
            if self.failure is not None or self.born != forks:
                self.demand_alive()
            self.sequence += 1
            if self.domain is not None:
                with nogil:
                    rc = self.domain.all_reduce(call, data, deadline, &fault)
            self.count(call, now_ns() - start)
            if self.profile is not None:
                self.keep(call, start, "shared memory")
            if rc != OK:
                self.fail(rc, &fault)
        finally:
            self.leave_turn()

    cdef void count(self, const Call *call, int64_t took_ns) noexcept:
        self.calls[call.verb] += 1
        self.call_bytes[call.verb] += call.count * item_bytes(call.dtype)
        self.call_ns[call.verb] += took_ns
        self.call_times[call.verb][bucket_of(took_ns)] += 1

    cdef int keep(self, const Call *call, int64_t start, str algorithm) except -1:
        self.profile.append((VERBS[call.verb], call.count * item_bytes(call.dtype), start / 1e9, now_ns() / 1e9, algorithm))
        return 0

    # ---- one call -----------------------------------------------------------------------------------------------

    cdef object perform(self, Call *call, Job *job, object bounds, str algorithm, timeout):
        """Carry out a checked call: the one crossing of the GIL, the one place that raises."""
        cdef Program program = None
        cdef Fault fault
        cdef char *source = job.source
        cdef char *target = job.target
        cdef char *wide = NULL
        cdef char *narrow_target = NULL
        cdef int rc = OK, narrow = call.dtype
        cdef size_t itemsize = item_bytes(call.dtype), first, last, wide_bytes = 0
        cdef int64_t start = now_ns(), deadline = self.deadline(timeout, start)
        cdef bint apart = False            # the program writes outside of this rank's part: to scratch
        cdef bint both = False             # two levels
        cdef size_t own_start = 0, own_stop = 0
        if algorithm != "auto" and algorithm not in self.offered(call.verb):
            self.refuse(call.verb, algorithm)
        if algorithm == "auto" and self.executor is not None and call.count * itemsize >= MEASURE_BYTES:
            self.measure_links(timeout)
        self.enter()
        try:
            self.demand_alive()
            if self.executor is not None and call.count and self.size > 1:
                algorithm = self.choose(call, algorithm)
                call.algorithm = ALGORITHMS.index(algorithm)
                both = algorithm == TWO_LEVEL
                if (narrow == DT_F16 or narrow == DT_BF16) and algorithm in FOLDS_PARTIAL_SUMS and self.size > 2 \
                        and (call.verb == VERB_ALL_REDUCE or call.verb == VERB_REDUCE or call.verb == VERB_REDUCE_SCATTER):
                    wide_bytes = call.count * 4
                    itemsize, call.dtype = 4, DT_F32
                program = self.program(call, itemsize, algorithm, bounds)
                if both and call.verb == VERB_ALL_REDUCE and self.domain is not None:
                    own_start, own_stop = program.own_start * itemsize, program.own_stop * itemsize
                    self.want_segments(program.segments, itemsize)
                first, last = program.writes_start, program.writes_stop
                apart = wide_bytes == 0 and not both and first < last and (first < job.target_at * itemsize or last > job.target_stop * itemsize)
                self.reserve(wide_bytes if wide_bytes else last - first if apart else 0)
                self.chosen[algorithm] = self.chosen.get(algorithm, 0) + 1
            self.sequence += 1
            if self.executor is None and self.domain is not None and call.verb > VERB_BROADCAST:
                self.fill_wants(call, job, bounds, itemsize)
            with nogil:
                if self.executor is None and self.domain is not None:
                    rc = self.run_in_domain(call, job, deadline, &fault)
                elif program is not None:
                    if wide_bytes:
                        wide = self.scratch
                        cast(DT_F32, wide, narrow, source, call.count)
                        source = target = wide
                    else:
                        source -= job.source_at * itemsize
                        target -= job.target_at * itemsize
                        if apart:
                            target = self.scratch - first
                    if both:
                        rc = self.run_two_levels(program, call, target, own_start, own_stop, deadline, &fault)
                    else:
                        rc = self.executor.run(program, call, source, target, self.sequence, deadline, &fault)
                    if rc == OK and wide_bytes and job.target_stop > job.target_at:
                        cast(narrow, job.target, DT_F32, wide + job.target_at * 4, job.target_stop - job.target_at)
                    elif rc == OK and apart and job.target_stop > job.target_at:
                        memcpy(job.target, target + job.target_at * itemsize, (job.target_stop - job.target_at) * itemsize)
                elif self.size == 1 and call.verb == VERB_REDUCE_SCATTER and job.target != job.source:
                    memcpy(job.target, job.source, call.count * itemsize)
                if rc == OK and job.own_bytes and job.own_to != job.own_from:
                    memcpy(job.own_to, job.own_from, job.own_bytes)
            call.dtype = narrow
            self.count(call, now_ns() - start)
            if self.profile is not None:
                self.keep(call, start, algorithm if program is not None else "shared memory")
            if rc != OK:
                self.fail(rc, &fault)
        finally:
            self.leave_turn()

    cdef int fail(self, int rc, Fault *fault) except -1:
        """Raise what the fault says; the group is dead from here on."""
        fault.sequence = self.sequence
        try:
            check(rc, fault, self.context)
        except BaseException as error:
            self.failure = error if isinstance(error, FleetError) else PeerLost(
                f"this rank was interrupted ({type(error).__name__})", rank=self.rank, epoch=self.epoch)
            if self.domain is not None:            # a peer that was only slow must not write to us later
                try:
                    self.domain.arenas[self.domain.rank].secede()
                except (OSError, MemoryError) as problem:
                    error.add_note(f"shared memory could not be left ({problem}): a peer that was only slow may "
                                   f"still write to arrays in it")
            raise
        return 0

    cdef int run_in_domain(self, const Call *call, const Job *job, int64_t deadline, Fault *fault) noexcept nogil:
        cdef size_t itemsize = item_bytes(call.dtype)
        if call.verb == VERB_ALL_REDUCE:
            return self.domain.all_reduce(call, job.source, deadline, fault)
        if call.verb == VERB_BROADCAST:
            return self.domain.broadcast(call, job.source, deadline, fault)
        if call.verb == VERB_BARRIER:
            return self.domain.barrier(call, deadline, fault)
        if call.verb == VERB_REDUCE:
            return self.domain.reduce(call, job.source, deadline, fault)
        if call.verb == VERB_REDUCE_SCATTER:
            return self.domain.combine(call, job.source, job.target_at * itemsize, job.target_stop * itemsize, job.target,
                                  deadline, fault)
        return self.domain.exchange(call, job.source, job.source_count * itemsize, self.wants, job.longest * itemsize,
                               deadline, fault)

    cdef int run_two_levels(self, Program program, const Call *call, char *data, size_t own_start, size_t own_stop,
                            int64_t deadline, Fault *fault) noexcept nogil:
        """all_reduce and broadcast in place: memory within the host, links between hosts. See schedules.two_level."""
        cdef Call here = call[0]
        cdef Fault told
        cdef int peer, rc = OK
        cdef size_t at = 0, longest = 0
        here.algorithm = 0
        if self.domain is None:                    # alone on its host
            return self.executor.run(program, call, data, data, self.sequence, deadline, fault)
        if call.verb == VERB_ALL_REDUCE:
            if here.op == OP_MEAN:
                here.op = OP_SUM                   # the links' last fold divides
            rc = self.domain.combine(&here, data, own_start, own_stop, data + own_start, deadline, fault)
            if rc != OK:
                return self.tell_links(rc, fault)
        if program.num_steps:
            rc = self.executor.run(program, call, data, data, self.sequence, deadline, fault)
            if rc != OK:
                told = fault[0]                    # the ranks of this host wait for this one in the next operation
                told.sequence = self.domain.sequence + 1
                self.domain.condemn(&told)
                return rc
        if call.verb == VERB_ALL_REDUCE:
            here.verb = VERB_ALL_GATHER
            for peer in range(self.domain.size):   # segments lie one after the other
                self.wants[peer].into = data + at
                at += self.wants[peer].whole
                if self.wants[peer].whole > longest:
                    longest = self.wants[peer].whole
            rc = self.domain.exchange(&here, data + own_start, own_stop - own_start, self.wants, longest, deadline, fault)
        else:
            here.root = program.local_root
            rc = self.domain.broadcast(&here, data, deadline, fault)
        return rc if rc == OK else self.tell_links(rc, fault)

    cdef int tell_links(self, int rc, Fault *fault) noexcept nogil:
        """Pass a fault of the host domain on to the ranks of other hosts."""
        cdef Fault told = fault[0]
        told.sequence = self.sequence
        self.executor.condemn(&told)
        return rc

    cdef int want_segments(self, list bounds, size_t itemsize) except -1:
        """For the last phase of a two-level all_reduce: the segment of each local rank."""
        cdef int peer
        for peer in range(self.domain.size):
            self.wants[peer].whole = (<size_t>bounds[peer + 1] - <size_t>bounds[peer]) * itemsize
            self.wants[peer].start, self.wants[peer].stop = 0, self.wants[peer].whole
        return 0

    cdef int fill_wants(self, const Call *call, Job *job, object bounds, size_t itemsize) except -1:
        """What this rank takes of every other one's input, for the verbs that Domain.exchange carries out."""
        cdef int peer, me = self.rank, root = <int>call.root
        cdef Want *want
        cdef size_t whole, first, at
        job.longest = 0
        at = 0
        for peer in range(self.size):
            want = &self.wants[peer]
            want.start = want.stop = 0
            if call.verb == VERB_ALL_GATHER or call.verb == VERB_GATHER:
                first = bounds[peer]
                whole = <size_t>bounds[peer + 1] - first
                if call.verb == VERB_ALL_GATHER or me == root:
                    want.stop, want.into = whole * itemsize, job.target + first * itemsize
            elif call.verb == VERB_SCATTER:
                whole = call.count if peer == root else 0
                if peer == root:
                    want.start, want.stop, want.into = job.target_at * itemsize, job.target_stop * itemsize, job.target
            elif call.verb == VERB_ALL_TO_ALL:
                whole = bounds[peer][self.size]
                want.start, want.stop = <size_t>bounds[peer][me] * itemsize, <size_t>bounds[peer][me + 1] * itemsize
                want.into = job.target + at
                at += want.stop - want.start
            else:
                return 0
            want.whole = whole * itemsize
            if whole > job.longest:
                job.longest = whole
        return 0

    cdef int reserve(self, size_t nbytes) except -1:
        """Have at least nbytes of scratch."""
        if nbytes > self.scratch_bytes:
            free(self.scratch)
            self.scratch, self.scratch_bytes = <char *>malloc(nbytes), nbytes
            if self.scratch == NULL:
                self.scratch_bytes = 0
                raise MemoryError(f"no memory for {nbytes} bytes of partial sums")
        return 0

    cdef object offered(self, int verb):
        """The algorithms that a verb may be forced to use."""
        names = SCHEDULES["all_reduce" if verb == VERB_BARRIER else VERBS[verb]]
        if verb == VERB_ALL_REDUCE or verb == VERB_BROADCAST:
            return (*names, TWO_LEVEL) if self.two_level else names
        return names

    cdef int refuse(self, int verb, str algorithm) except -1:
        if algorithm not in ALGORITHMS:
            raise ConfigError(f"unknown algorithm {algorithm!r}: one of {', '.join(ALGORITHMS)}")
        if algorithm == TWO_LEVEL and (verb == VERB_ALL_REDUCE or verb == VERB_BROADCAST):
            raise ConfigError("two_level needs several hosts, and one with several ranks that share memory")
        raise ConfigError(f"{VERBS[verb]} is not offered by {algorithm!r}: one of auto, {', '.join(self.offered(verb))}")

    cdef int demand_alive(self) except -1:
        if self.failure is not None:
            again = type(self.failure)(f"the group is dead since an earlier call: {self.failure}",
                                       **{k: v for k, v in vars(self.failure).items() if not k.startswith("_")})
            raise again from self.failure
        if self.born != forks:
            raise FleetError("this group belongs to the parent process: call pyfleet.init() in the child instead")
        return 0

    cdef str choose(self, const Call *call, str algorithm):
        """The algorithm that "auto" stands for, the same on all ranks."""
        if call.verb == VERB_BARRIER:
            return "tree"
        if algorithm != "auto":
            return algorithm
        if self.two_level and (call.verb == VERB_ALL_REDUCE or call.verb == VERB_BROADCAST):
            return TWO_LEVEL
        if call.verb == VERB_ALL_REDUCE and max(self.hosts) == 0:      # loopback: what is sent costs more than latency
            return "ring" if self.size == 2 or self.size > DIRECT_RANKS else "direct"
        rooted = call.verb == VERB_BROADCAST or call.verb == VERB_REDUCE or call.verb == VERB_GATHER or call.verb == VERB_SCATTER
        root = call.root if rooted else 0
        nbytes = call.count * item_bytes(call.dtype) // (self.size if call.verb == VERB_ALL_TO_ALL else 1)
        key = (VERBS[call.verb], nbytes, root, self.links)
        found = self.choices.get(key)
        if found is None:
            links = self.links or model.Links(UNMEASURED[0], (UNMEASURED[1],) * self.size, OVERHEAD_S)
            found = self.choices[key] = model.choose(key[0], self.size, nbytes, links, root, None, SLACK)
            if len(self.choices) > MAX_PROGRAMS:
                self.choices.popitem(last=False)
        return found.name

    def measure_links(self, timeout=None):
        """Find latency and bandwidths of the links between hosts, once; every rank of the group calls it.

        Each rank exchanges a few megabytes with up to MEASURE_ROUNDS others in turn, all at the same time. Large calls
        with algorithm="auto" do it first by themselves.

        Returns: model.Links, or None when all ranks are on one host.
        """
        if self.links is not None or self.measuring or max(self.hosts) == 0:
            return self.links
        self.measuring = True
        try:
            self.links = self.measured(timeout)
        finally:
            self.measuring = False
        return self.links

    cdef object measured(self, timeout):
        size, nbytes = self.size, MEASURE_BYTES // 8
        word, words = array("d", [0.0]), array("d", bytes(8 * size))
        latency = []
        for _ in range(5):
            start = time.perf_counter()
            self.all_gather(words, word, algorithm="direct", timeout=timeout)
            latency.append(time.perf_counter() - start)
        word[0] = min(latency)
        seconds = self.shift(1, nbytes, timeout)           # opens the window of TCP, and says how much to send
        worst = array("d", [seconds, word[0]])
        self.all_reduce(worst, OP_MAX, algorithm="tree", timeout=timeout)
        nbytes = min(8 << 20, max(nbytes, int(nbytes * MEASURE_S / worst[0])))
        rates = array("d", bytes(8 * size))
        for k in range(1, min(size - 1, MEASURE_ROUNDS) + 1):
            rates[(self.rank - k) % size] = nbytes / self.shift(k, nbytes, timeout)
        table = array("d", bytes(8 * size * size))
        self.all_gather(table, rates, algorithm="direct", timeout=timeout)
        into = [table[rank * size:(rank + 1) * size] for rank in range(size)]
        # A rank is as fast as the slower direction with its best partner on another host.
        speeds = [max(min(into[a][b] or into[b][a], into[b][a] or into[a][b])
                      for b in range(size) if self.hosts[a] != self.hosts[b]) for a in range(size)]
        top = max(speeds)
        speeds = [speed or top for speed in speeds]        # no partner on another host was tried
        return model.Links(worst[1], tuple(top if speed >= LIKE_SPEED * top else speed for speed in speeds), OVERHEAD_S)

    cdef double shift(self, int k, size_t nbytes, timeout) except -1:
        """Send nbytes to the k-th next rank while the k-th one before sends as much here: the seconds that took."""
        table = [[nbytes if (i + k) % self.size == j else 0 for j in range(self.size)] for i in range(self.size)]
        data, out = bytearray(nbytes), bytearray(nbytes)
        self.barrier(timeout=timeout)
        start = time.perf_counter()
        self.all_to_all(out, data, table, algorithm="direct", timeout=timeout)
        return time.perf_counter() - start

    cdef Program program(self, Call *call, size_t itemsize, str algorithm, object bounds):
        """The compiled schedule for this call, from the cache when it was used before."""
        cdef Program found
        rooted = call.verb == VERB_BROADCAST or call.verb == VERB_REDUCE or call.verb == VERB_GATHER or call.verb == VERB_SCATTER
        root = call.root if rooted else 0
        key = (call.verb, algorithm, call.count, itemsize, root, bounds, self.links)
        found = self.programs.get(key)
        if found is None:
            found = self.compile(call, itemsize, algorithm, bounds, root)
            self.programs[key] = found
            if len(self.programs) > MAX_PROGRAMS:
                self.programs.popitem(last=False)
        else:
            self.programs.move_to_end(key)
        return found

    cdef Program compile(self, Call *call, size_t itemsize, str algorithm, object bounds, int root):
        cdef Program program
        local = [rank for rank in range(self.size) if self.hosts[rank] == self.hosts[self.rank]]
        if algorithm == TWO_LEVEL:
            speakers = list({host: rank for rank, host in reversed(list(enumerate(self.hosts)))}.values())
            speakers = sorted(root if self.hosts[rank] == self.hosts[root] else rank for rank in speakers)
            if call.verb == VERB_BROADCAST:        # root, and one rank of every other host
                rows = []
                if self.rank in speakers:
                    rows = tree.broadcast(speakers.index(self.rank), len(speakers), [0] * len(speakers) + [call.count],
                                          speakers.index(root))
                rows = [row._replace(peer=speakers[row.peer]) for row in rows]
                program = Program(rows, itemsize, self.rank, self.size, algorithm)
                program.local_root = next(i for i, rank in enumerate(local) if rank in speakers)
                return program
            inner = load(SCHEDULES["all_reduce"]["direct" if len(speakers) <= DIRECT_RANKS else "ring"])
            shares = None if self.links is None or len(speakers) > DIRECT_RANKS else shares_for(
                [max(speed for speed, host in zip(self.links.bandwidths, self.hosts) if host == self.hosts[rank])
                 for rank in list(dict.fromkeys(two_level.columns(self.hosts)[0]))])
            plan = two_level.all_reduce(self.rank, self.hosts, call.count, inner, shares)
            program = Program(plan.rows, itemsize, self.rank, self.size, algorithm)
            program.segments = plan.bounds
            program.own_start, program.own_stop = plan.bounds[local.index(self.rank)], plan.bounds[local.index(self.rank) + 1]
            return program
        schedule = load(SCHEDULES["all_reduce" if call.verb == VERB_BARRIER else VERBS[call.verb]][algorithm])
        if call.verb == VERB_ALL_TO_ALL:
            rows = schedule(self.rank, self.size, [[row[i + 1] - row[i] for i in range(self.size)] for row in bounds])
        else:
            shares = None
            if algorithm == "direct" and (call.verb == VERB_BROADCAST or call.verb == VERB_REDUCE):
                shares = shares_around(self.size, root)
            elif algorithm == "direct" and self.links is not None:
                shares = shares_for(self.links.bandwidths)
            rows = schedule(self.rank, self.size, bounds or cut(call.count, self.size, shares), root)
        return Program(rows, itemsize, self.rank, self.size, algorithm)

    def record(self, bint on=True):
        """Begin anew to remember every call, or stop; see recorded()."""
        self.profile = [] if on else None

    def recorded(self):
        """[(verb, bytes, began, ended, algorithm)] of the calls since record(): seconds of time.monotonic()."""
        return list(self.profile or ())

    # ---- the rest -----------------------------------------------------------------------------------------------

    def stats(self):
        """Since the start: {"operations": {verb: {"calls", "bytes", "seconds"}}, "links": {rank: {...}},
        "shared_memory": {"read_bytes"}, "algorithms": {name: calls}, "measured": latency and bandwidths of the links or
        None, "choices": what "auto" stood for, with the predicted seconds of every candidate}. Link bytes are counted
        at the socket."""
        operations = {VERBS[i]: {"calls": self.calls[i], "bytes": self.call_bytes[i], "seconds": self.call_ns[i] / 1e9}
                      for i in range(<int>NUM_VERBS) if self.calls[i]}
        links = {}
        if self.executor is not None:
            links = {peer: link.stats() for peer, link in enumerate(self.executor.links) if link is not None}
        return {
            "operations": operations,
            "links": links,
            "shared_memory": {"read_bytes": self.domain.read_bytes if self.domain is not None else 0},
            "algorithms": dict(self.chosen),
            "measured": self.links._asdict() if self.links is not None else None,
            "choices": [{"operation": verb, "bytes": nbytes, "root": root, "algorithm": choice.name, "predicted_s": choice.seconds}
                        for (verb, nbytes, root, _), choice in self.choices.items()],
        }

    def durations(self):
        """How long the calls took since the start: {verb: (calls of at most DURATION_BOUNDS_NS[0], of more than that and
        at most DURATION_BOUNDS_NS[1], ..., of more than the last)}."""
        return {VERBS[i]: tuple([self.call_times[i][k] for k in range(<int>NUM_BUCKETS)])
                for i in range(<int>NUM_VERBS) if self.calls[i]}

    def close(self):
        """Leave in order: peers that still need this rank get PeerLost, and so does a call under way in another thread.

        Idempotent.
        """
        if self.born != forks:
            return
        if self.users > 0:
            self.leave(busy=True)
        self.enter()
        try:
            if self.failure is None:
                self.leave(busy=False)
                self.failure = FleetError("this group was closed")
            if self.executor is not None:
                for link in self.executor.links + self.executor.controls:
                    if link is not None:
                        link.close()
        finally:
            self.leave_turn()

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


cdef void prepare(Call *call, Job *job, int verb, Pin pin) noexcept:
    memset(call, 0, sizeof(Call))
    memset(job, 0, sizeof(Job))
    call.verb, call.dtype, call.count = verb, pin.dtype, pin.count
    job.source_count = pin.count


cpdef int bucket_of(int64_t ns) noexcept nogil:
    """Where Group.durations() counts a call that took so long."""
    cdef int octave, bucket
    if ns <= 1 << FIRST_OCTAVE:
        return 0
    octave = floor_log2(ns - 1)              # a bound belongs to the bucket below it
    bucket = 4 * (octave - FIRST_OCTAVE) + <int>((ns - 1) >> (octave - 2) & 3) + 1
    return bucket if bucket < NUM_BUCKETS else NUM_BUCKETS - 1


cdef uint32_t digest(object bounds) except? 0:
    """A number that differs between ranks whose counts differ."""
    return crc32(repr(bounds).encode())
