"""C2: the host domain: collectives of ranks that share memory.

An operation starts when each rank announces its call on its own line of the board (a small message rides along) and
reads everyone's. From there all ranks take the same path. Words only grow and have one writer, so a dead process can
hold nothing; every wait has a deadline, sees the board's verdict and the death of the peer it needs.
"""
from libc.stdint cimport uintptr_t
from fleetcore.arena cimport Arena, Buffer
from fleetcore.check cimport adopt, check, interrupted
from fleetcore.kernels.copy cimport copy_out
from fleetcore.kernels.reduce cimport reduce_many
from fleetcore.posix cimport (
    ESRCH, POLLIN, add32, allow_reads, calloc, cas32, close, cpu_pause, fence, free, futex_wait, futex_wake,
    last_errno, load32, load64, memcmp, memcpy, memset, now_ns, open_process, poll, pollfd, posix_memalign,
    read_process, store32, store64,
)
from fleetcore.status cimport (
    DT_U8, OK, OP_MEAN, OP_MIN, ST_INTERRUPTED, ST_NO_MEMORY, ST_OUT_OF_STEP, ST_PEER_LOST, ST_SYSTEM,
    ST_TIMEOUT, VERB_ALL_REDUCE, VERB_BARRIER, Call, Fault, item_bytes,
)

from fleetcore.check import Context
from fleetcore.errors import ConfigError

cdef int64_t PHASE_WORD = 64                   # offset of Line.phase, checked in __cinit__
cdef int64_t FIRST_NAP_NS = 1_000_000          # naps double up to the longest: a death is noticed within one nap
cdef int64_t LONGEST_NAP_NS = 16_000_000
cdef enum:
    DEPTH = 3                                  # slots of each kind; see reduce_by_staging
PIECE_BYTES = 512 * 1024                       # knee of a sweep from 32 KiB to 2 MiB; of 256 KiB with more ranks than cores
LONG_WAIT_PIECE_BYTES = 256 * 1024
cdef size_t LARGE_BYTES = 1024 * 1024          # from here on it pays to compare the ways
cdef uint64_t TRY_CALLS = 8                    # a way that costs 4x then costs 5 % of the time
cdef size_t SCRATCH_BYTES = 512 * 1024         # what one rank holds of its peers' data while reducing: half of an L2
cdef size_t PAGE = 4096
cdef uint64_t PROBE = 0x70796665656C6574       # what peers must find when they try to read this process

PATHS = ("auto", "cma", "staging")


def board_bytes(int size):
    """Bytes of board that a domain of `size` ranks needs."""
    return sizeof(Board) + size * sizeof(Line)


cdef inline size_t smaller(size_t a, size_t b) noexcept nogil:
    return a if a < b else b


cdef inline void lend(void *slot, const void *data, size_t nbytes, bint streaming) noexcept nogil:
    """Copy to where another core will read it: through memory, or leaving it in a cache that the cores may share."""
    if streaming:
        copy_out(slot, data, nbytes)
    else:
        memcpy(slot, data, nbytes)


cdef inline char *carried(Slot *slot, size_t nbytes) noexcept nogil:
    """Where a small message lies in its slot."""
    return <char *>&slot.tiny[0] if nbytes <= TINY_BYTES else <char *>&slot.small[0]


cdef void share(size_t count, size_t itemsize, int size, int rank, size_t *start, size_t *end) noexcept nogil:
    """The elements [start, end) that `rank` owns: equal parts, cut at pages, or at cache lines when there are few."""
    cdef size_t unit = (PAGE if count * itemsize >= 64 * PAGE else 64) // itemsize
    cdef size_t part = (count + size - 1) // size
    part = (part + unit - 1) // unit * unit
    start[0] = smaller(part * rank, count)
    end[0] = smaller(part * (rank + 1), count)


cdef class Domain:
    """The ranks of one host.

    Args:    arenas: one Arena per rank in rank order, the own one allocatable, the others attached.
             rank: own position.  board_offset: where rank 0's arena holds the (zeroed) board.
             board: the Buffer behind it, on rank 0 only, kept alive here.
             pids: process id per rank, as this process sees them.
             spin_ns: how long to spin before sleeping; 0 when there are more ranks than cores.
             path: how ordinary memory is read: "cma" (process_vm_readv), "staging", or "auto", which measures.
             piece_bytes: of staging; 0 is the measured default.
    """

    def __cinit__(self, list arenas, int rank, size_t board_offset, list pids, *, Buffer board=None,
                  int64_t spin_ns=0, str path="auto", size_t piece_bytes=0):
        cdef Arena arena
        cdef int i
        if path not in PATHS:
            raise ConfigError(f"same_host must be one of {', '.join(PATHS)}, not {path!r}")
        self.size, self.rank, self.arenas, self.board_buffer = len(arenas), rank, arenas, board
        self.spin_ns, self.path = spin_ns, path
        self.bases = <char **>calloc(self.size, sizeof(char *))
        self.capacities = <size_t *>calloc(self.size, sizeof(size_t))
        self.pids = <int *>calloc(self.size, sizeof(int))
        self.watched = <pollfd *>calloc(self.size, sizeof(pollfd))
        self.srcs = <void **>calloc(self.size, sizeof(void *))
        self.dsts = <void **>calloc(self.size, sizeof(void *))
        if (self.bases == NULL or self.capacities == NULL or self.pids == NULL or self.watched == NULL or self.srcs == NULL or self.dsts == NULL
                or posix_memalign(<void **>&self.scratch, 2 * 1024 * 1024, SCRATCH_BYTES) != 0):
            raise MemoryError()
        for i in range(self.size):
            self.watched[i].fd = -1
            self.watched[i].events = POLLIN
        for i in range(self.size):
            arena = arenas[i]
            self.bases[i], self.capacities[i] = arena.base, arena.capacity
            self.pids[i] = pids[i]
            if i != rank:
                self.watched[i].fd = open_process(pids[i])
        self.board = <Board *>(self.bases[0] + board_offset)
        self.lines = <Line *>(<char *>self.board + sizeof(Board))
        self.me = &self.lines[rank]
        if <char *>&self.me.phase - <char *>self.me != PHASE_WORD or sizeof(Board) % 64 or sizeof(Line) % 64:
            raise AssertionError("the layout of the board is not what PHASE_WORD says")
        arena = arenas[rank]
        self.piece_bytes = piece_bytes or (PIECE_BYTES if spin_ns else LONG_WAIT_PIECE_BYTES)
        self.stage_buffer = arena.allocate(2 * DEPTH * self.piece_bytes)
        self.me.stage = self.stage_buffer.offset

    def __dealloc__(self):
        cdef int i
        if self.watched != NULL:
            for i in range(self.size):
                if self.watched[i].fd >= 0:
                    close(self.watched[i].fd)
        free(self.bases)
        free(self.capacities)
        free(self.pids)
        free(self.watched)
        free(self.srcs)
        free(self.dsts)
        free(self.scratch)

    def connect(self, double timeout):
        """Meet all ranks once and agree whether ordinary memory can be read across processes.

        Raises:  PeerLost, Timeout, ConfigError when path is "cma" and some rank cannot be read.
        """
        cdef Fault fault
        cdef Call call
        cdef uint64_t probe = PROBE, seen
        cdef uint8_t ok = self.path != "staging"
        cdef int peer, rc
        cdef int64_t deadline = now_ns() + <int64_t>(timeout * 1e9)
        context = Context(self.rank, self.size)
        memset(&call, 0, sizeof(call))
        call.verb = VERB_BARRIER
        allow_reads()
        with nogil:
            rc = self.announce(&call, <char *>&probe, 0, deadline, &fault)
        check(rc, &fault, context)
        for peer in range(self.size):
            if peer != self.rank and ok:
                seen = 0
                ok = (read_process(self.pids[peer], &seen, self.lines[peer].slots[self.sequence & 1].address, 8) == 8
                      and seen == PROBE)
        call.verb, call.dtype, call.op, call.count = VERB_ALL_REDUCE, DT_U8, OP_MIN, 1
        with nogil:
            rc = self.all_reduce(&call, <char *>&ok, deadline, &fault)
        check(rc, &fault, context)
        if self.path == "cma" and not ok:
            raise ConfigError("same_host is 'cma', but this system does not let ranks read each other's memory")
        self.allowed[<int>WAY_READ] = ok
        self.allowed[<int>WAY_STAGE] = self.allowed[<int>WAY_STREAM] = self.path != "cma"
        if not ok:
            self.path = "staging"

    # ---- waiting ------------------------------------------------------------------------------------------------

    cdef int blame(self, Fault *fault, int status, int rank, int error) noexcept nogil:
        """Fill in the fault, put it on the board, and return its status; an earlier verdict on the board wins."""
        cdef int rc
        fault.status, fault.rank, fault.error, fault.reporter = status, rank, error, -1
        fault.sequence = self.sequence
        self.condemn(fault)
        rc = self.verdict(fault) if status == ST_TIMEOUT or status == ST_PEER_LOST else OK
        return status if rc == OK else rc

    cdef void condemn(self, const Fault *fault) noexcept nogil:
        """End every operation of this domain, for all ranks, with this fault. The first verdict stands."""
        cdef int peer
        if not cas32(&self.board.verdict, 0, 1):
            return
        self.board.fault = fault[0]
        self.board.fault.reporter = self.rank
        store32(&self.board.verdict, 2)
        fence()
        for peer in range(self.size):
            self.ring(peer)

    cdef int verdict(self, Fault *fault) noexcept nogil:
        """The board's verdict as this rank's own fault; OK when there is none for this operation.

        A verdict on a later operation means that its reporter has done its part of this one, which can be completed.
        """
        if load32(&self.board.verdict) != 2 or self.board.fault.sequence > self.sequence:
            return OK
        return adopt(fault, &self.board.fault, self.rank)

    cdef void ring(self, int peer) noexcept nogil:
        add32(&self.lines[peer].bell, 1)
        futex_wake(&self.lines[peer].bell)

    cdef void publish(self, uint64_t *word, uint64_t value) noexcept nogil:
        """Store value and wake those who sleep on this rank."""
        cdef int peer
        cdef uint32_t mine = self.rank + 1
        store64(word, value)
        fence()
        for peer in range(self.size):
            if peer != self.rank and load32(&self.lines[peer].waits_for) == mine:
                if cas32(&self.lines[peer].waits_for, mine, 0):
                    self.ring(peer)

    cdef int dead_peer(self, int64_t word_offset, uint64_t target) noexcept nogil:
        """A rank whose process ended before its word reached target; -1 when there is none."""
        cdef int peer
        if poll(self.watched, self.size, 0) <= 0:
            return -1
        for peer in range(self.size):
            if peer != self.rank and self.watched[peer].fd >= 0 and self.watched[peer].revents:
                if load64(<uint64_t *>(<char *>&self.lines[peer] + word_offset)) < target:
                    return peer
        return -1

    cdef int wait_for(self, int peer, int64_t word_offset, uint64_t target, int64_t deadline,
                      Fault *fault) noexcept nogil:
        """Return OK once the peer's word has reached target; else a verdict, a death, the deadline or a signal."""
        cdef uint64_t *word = <uint64_t *>(<char *>&self.lines[peer] + word_offset)
        cdef int64_t start, now, nap = FIRST_NAP_NS
        cdef uint32_t seen
        cdef int i, dead, rc
        if load64(word) >= target:
            return OK
        start = now_ns()
        if self.spin_ns:
            now = start
            while now - start < self.spin_ns:
                for i in range(64):
                    if load64(word) >= target:
                        return OK
                    cpu_pause()
                now = now_ns()
        while True:
            seen = load32(&self.me.bell)
            store32(&self.me.waits_for, peer + 1)
            fence()
            if load64(word) < target and self.verdict(fault) == OK:
                now = now_ns()
                futex_wait(&self.me.bell, seen, smaller(nap, deadline - now if deadline > now else 1))
            store32(&self.me.waits_for, 0)
            if load64(word) >= target:
                return OK
            rc = self.verdict(fault)
            if rc != OK:
                return rc
            if load32(&self.me.bell) != seen:
                continue
            # The nap ran its length, or a signal cut it short.
            dead = self.dead_peer(word_offset, target)
            if dead >= 0:
                return self.blame(fault, ST_PEER_LOST, dead, 0)
            now = now_ns()
            if now >= deadline:
                return self.blame(fault, ST_TIMEOUT, peer, 0)
            if interrupted():
                return self.blame(fault, ST_INTERRUPTED, self.rank, 0)
            nap = smaller(2 * nap, LONGEST_NAP_NS)

    cdef int step(self) noexcept nogil:
        """Tell the others that this rank has finished its part of the current step."""
        self.phase += 1
        self.publish(&self.me.phase, self.phase)
        return OK

    cdef int wait_phase_of_all(self, uint64_t target, int64_t deadline, Fault *fault) noexcept nogil:
        cdef int i, rc
        for i in range(1, self.size):
            rc = self.wait_for((self.rank + i) % self.size, PHASE_WORD, target, deadline, fault)
            if rc != OK:
                return rc
        return OK

    # ---- operations ---------------------------------------------------------------------------------------------

    cdef int announce(self, const Call *call, char *data, size_t nbytes, int64_t deadline, Fault *fault) noexcept nogil:
        """Publish this rank's call (nbytes of data inline when they fit, else where data lies); read all others'.

        Slots alternate between two: to start operation s a rank has finished s - 1, so all have announced s - 1, so
        all are done reading s - 2, whose slot s takes over. No closing barrier is needed.
        """
        cdef Slot *slot
        cdef Slot *theirs
        cdef int i, peer, rc
        cdef int64_t word
        self.sequence += 1
        memset(fault, 0, sizeof(Fault))
        fault.call, fault.sequence, fault.rank, fault.reporter = call[0], self.sequence, -1, -1
        rc = self.verdict(fault)
        if rc != OK:
            return rc
        slot = &self.me.slots[self.sequence & 1]
        slot.call = call[0]
        slot.address = <uintptr_t>data
        slot.place = PLACE_PROCESS
        if nbytes <= INLINE_BYTES:
            slot.place = PLACE_INLINE
            if nbytes:                             # data may be NULL without
                memcpy(carried(slot, nbytes), data, nbytes)
        elif self.bases[self.rank] <= data and data + nbytes <= self.bases[self.rank] + self.capacities[self.rank]:
            slot.place = PLACE_ARENA
            slot.address = data - self.bases[self.rank]
        self.publish(&slot.sequence, self.sequence)
        word = <char *>&slot.sequence - <char *>self.me
        for i in range(1, self.size):
            peer = (self.rank + i) % self.size
            rc = self.wait_for(peer, word, self.sequence, deadline, fault)
            if rc != OK:
                return rc
        for peer in range(self.size):
            theirs = &self.lines[peer].slots[self.sequence & 1]
            if memcmp(&theirs.call, call, sizeof(Call)) != 0:
                fault.theirs = theirs.call
                return self.blame(fault, ST_OUT_OF_STEP, peer, 0)
        return OK

    cdef int barrier(self, const Call *call, int64_t deadline, Fault *fault) noexcept nogil:
        """Return OK once every rank has called it."""
        return self.announce(call, NULL, 0, deadline, fault)

    cdef int all_reduce(self, const Call *call, char *data, int64_t deadline, Fault *fault) noexcept nogil:
        """Replace data (call.count elements) by the reduction over all ranks, in rank order, the same bytes everywhere."""
        cdef size_t nbytes = call.count * item_bytes(call.dtype)
        cdef Slot *slot
        cdef size_t head
        cdef int peer, rc, way
        cdef bint all_arena = True
        self.me.slots[(self.sequence + 1) & 1].way = self.choose_way(nbytes)
        rc = self.announce(call, data, nbytes, deadline, fault)
        if rc != OK or nbytes == 0:
            return rc
        if nbytes <= INLINE_BYTES:
            for peer in range(self.size):
                slot = &self.lines[peer].slots[self.sequence & 1]
                self.srcs[peer] = carried(slot, nbytes)
            self.read_bytes += nbytes * (self.size - 1)
            return reduce_many(call.dtype, call.op, <void **>&data, 1, <const void **>self.srcs, self.size,
                               call.count, self.size if call.op == OP_MEAN else 1)
        for peer in range(self.size):
            slot = &self.lines[peer].slots[self.sequence & 1]
            if slot.place != PLACE_ARENA or slot.address + nbytes > self.capacities[peer]:
                all_arena = False
        if all_arena:
            share(call.count, item_bytes(call.dtype), self.size, self.rank, &self.own_start, &self.own_end)
            return self.reduce_in_place(call, deadline, fault)
        way = self.lines[0].slots[self.sequence & 1].way
        head = 0
        if way >> 8:                               # try another way on the first part
            head = call.count if nbytes < 8 * LARGE_BYTES else call.count // 8 // PAGE * PAGE
            rc = self.reduce_part(call, data, 0, head, (way >> 8) - 1, deadline, fault)
            if rc != OK:
                return rc
        return self.reduce_part(call, data, head, call.count, way & 0xFF, deadline, fault) if head < call.count else OK

    cdef int reduce_part(self, const Call *call, char *data, size_t first, size_t last, int way, int64_t deadline,
                         Fault *fault) noexcept nogil:
        """Reduce elements [first, last) of ordinary memory in one of the ways, and remember what it cost."""
        cdef Call part = call[0]
        cdef size_t itemsize = item_bytes(call.dtype), nbytes = (last - first) * itemsize
        cdef int64_t start = now_ns()
        cdef double took
        cdef int rc
        part.count = last - first
        self.part_start = first * itemsize
        share(part.count, itemsize, self.size, self.rank, &self.own_start, &self.own_end)
        if way == WAY_READ:
            rc = self.reduce_by_reading(&part, data + self.part_start, deadline, fault)
        else:
            rc = self.reduce_by_staging(&part, data + self.part_start, way == WAY_STREAM, deadline, fault)
        self.part_start = 0
        if nbytes >= LARGE_BYTES:
            took = <double>(now_ns() - start) / nbytes
            self.cost[way] = (self.cost[way] + took) / 2 if self.cost[way] else took
        return rc

    cdef int choose_way(self, size_t nbytes) noexcept nogil:
        """How ordinary memory will be reduced, and 256 * (1 + a way to try first); rank 0's word counts.

        Which way is fastest depends on which cores the ranks run on, and that changes under a running job. So large
        calls use the fastest way and now and then try another on their first eighth.
        """
        cdef int way, best = -1, num = 0
        for way in range(<int>NUM_WAYS):
            if self.allowed[way]:
                num += 1
                if best < 0 or self.cost[way] < self.cost[best]:
                    best = way
        if nbytes < LARGE_BYTES:
            return WAY_STREAM if self.allowed[<int>WAY_STREAM] else best
        self.num_large += 1
        if num > 1 and self.num_large % TRY_CALLS == 0:
            while True:                            # the next one in turn
                self.tried = (self.tried + 1) % <int>NUM_WAYS
                if self.allowed[self.tried] and self.tried != best:
                    return best | (1 + self.tried) << 8
        return best

    cdef int reduce_in_place(self, const Call *call, int64_t deadline, Fault *fault) noexcept nogil:
        """Every rank reduces its own share where all the inputs lie, and writes the result into all of them."""
        cdef size_t itemsize = item_bytes(call.dtype), offset = self.own_start * itemsize
        cdef int peer, rc
        for peer in range(self.size):
            self.srcs[peer] = self.bases[peer] + self.lines[peer].slots[self.sequence & 1].address + offset
            self.dsts[peer] = self.srcs[peer]
        rc = reduce_many(call.dtype, call.op, self.dsts, self.size, <const void **>self.srcs, self.size,
                         self.own_end - self.own_start, self.size if call.op == OP_MEAN else 1)
        if rc != OK:
            return self.blame(fault, rc, self.rank, 0)
        self.read_bytes += (self.own_end - self.own_start) * itemsize * (self.size - 1)
        self.step()
        return self.wait_phase_of_all(self.phase, deadline, fault)

    cdef int fetch(self, int peer, size_t start, size_t nbytes, char *into, Fault *fault) noexcept nogil:
        """Copy bytes [start, start + nbytes) of what the peer announced."""
        cdef Slot *slot = &self.lines[peer].slots[self.sequence & 1]
        cdef Py_ssize_t got
        cdef size_t done = 0
        self.read_bytes += nbytes
        if slot.place == PLACE_ARENA:
            memcpy(into, self.bases[peer] + slot.address + self.part_start + start, nbytes)
            return OK
        while done < nbytes:
            got = read_process(self.pids[peer], into + done, slot.address + self.part_start + start + done, nbytes - done)
            if got <= 0:
                got = last_errno()
                return self.blame(fault, ST_PEER_LOST if got == ESRCH else ST_SYSTEM, peer, <int>got)
            done += got
        return OK

    cdef int reduce_by_reading(self, const Call *call, char *data, int64_t deadline, Fault *fault) noexcept nogil:
        """Every rank pulls its share of all inputs chunk by chunk, reduces in place, then pulls the others' results.

        Only the owner of memory ever writes to it: a rank that was given up on cannot damage anybody later.
        """
        cdef size_t itemsize = item_bytes(call.dtype)
        cdef size_t chunk = SCRATCH_BYTES // (self.size - 1) // 2 // 64 * 64
        cdef size_t at = self.own_start * itemsize, end = self.own_end * itemsize, n, start, stop
        cdef int i, peer, rc
        cdef char *room
        cdef void *dst
        while at < end:
            n = smaller(chunk, end - at)
            room = self.scratch
            for peer in range(self.size):
                if peer == self.rank:
                    self.srcs[peer] = data + at
                    continue
                rc = self.fetch(peer, at, n, room, fault)
                if rc != OK:
                    return rc
                self.srcs[peer] = room
                room += chunk
            dst = data + at
            rc = reduce_many(call.dtype, call.op, &dst, 1, <const void **>self.srcs, self.size, n // itemsize,
                             self.size if call.op == OP_MEAN else 1)
            if rc != OK:
                return self.blame(fault, rc, self.rank, 0)
            at += n
        self.step()
        for i in range(1, self.size):
            peer = (self.rank + i) % self.size
            rc = self.wait_for(peer, PHASE_WORD, self.phase, deadline, fault)
            if rc != OK:
                return rc
            share(call.count, itemsize, self.size, peer, &start, &stop)
            rc = self.fetch(peer, start * itemsize, (stop - start) * itemsize, data + start * itemsize, fault)
            if rc != OK:
                return rc
        self.step()
        return self.wait_phase_of_all(self.phase, deadline, fault)

    cdef int reduce_by_staging(self, const Call *call, char *data, bint streaming, int64_t deadline,
                               Fault *fault) noexcept nogil:
        """A pipeline of pieces through shared slots that stay in cache; every byte is copied in and out once.

        In turn t a rank copies in what others own of piece t, reduces its share of piece t - 1 into its own memory and
        an out slot, and copies out what others reduced of piece t - 2. `phase` is 2t + 1 after the first, 2t + 2 after
        the second. A slot is reused DEPTH = 3 turns later: its readers have then passed a step that this rank waited for.
        """
        cdef size_t itemsize = item_bytes(call.dtype), per_piece = self.piece_bytes // itemsize
        cdef size_t turns = (call.count + per_piece - 1) // per_piece
        cdef size_t t, first, n, start, stop
        cdef uint64_t base = self.phase
        cdef int peer, rc
        cdef void *dst
        for t in range(turns + 2):
            if t < turns:
                first = t * per_piece
                n = smaller(per_piece, call.count - first)
                share(n, itemsize, self.size, self.rank, &start, &stop)
                lend(self.stage_in(self.rank, t), data + first * itemsize, start * itemsize, streaming)
                lend(self.stage_in(self.rank, t) + stop * itemsize, data + (first + stop) * itemsize,
                     (n - stop) * itemsize, streaming)
            self.step()
            if 1 <= t <= turns:
                rc = self.wait_phase_of_all(base + 2 * (t - 1) + 1, deadline, fault)
                if rc != OK:
                    return rc
                first = (t - 1) * per_piece
                n = smaller(per_piece, call.count - first)
                share(n, itemsize, self.size, self.rank, &start, &stop)
                for peer in range(self.size):
                    self.srcs[peer] = self.stage_in(peer, t - 1) + start * itemsize
                self.srcs[self.rank] = data + (first + start) * itemsize
                dst = self.srcs[self.rank]
                rc = reduce_many(call.dtype, call.op, &dst, 1, <const void **>self.srcs, self.size, stop - start,
                                 self.size if call.op == OP_MEAN else 1)
                if rc != OK:
                    return self.blame(fault, rc, self.rank, 0)
                lend(self.stage_out(self.rank, t - 1) + start * itemsize, dst, (stop - start) * itemsize, streaming)
            self.step()
            if t >= 2:
                rc = self.wait_phase_of_all(base + 2 * (t - 1) + 2, deadline, fault)
                if rc != OK:
                    return rc
                first = (t - 2) * per_piece
                n = smaller(per_piece, call.count - first)
                for peer in range(self.size):
                    if peer != self.rank:
                        share(n, itemsize, self.size, peer, &start, &stop)
                        memcpy(data + (first + start) * itemsize, self.stage_out(peer, t - 2) + start * itemsize,
                               (stop - start) * itemsize)
                self.read_bytes += n * itemsize * (self.size - 1) * 2 // self.size
                fault.done_bytes = (first + n) * itemsize
        return OK

    cdef char *stage_in(self, int peer, size_t turn) noexcept nogil:
        return self.bases[peer] + self.lines[peer].stage + (turn % DEPTH) * self.piece_bytes

    cdef char *stage_out(self, int peer, size_t turn) noexcept nogil:
        return self.bases[peer] + self.lines[peer].stage + (DEPTH + turn % DEPTH) * self.piece_bytes

    cdef int broadcast(self, const Call *call, char *data, int64_t deadline, Fault *fault) noexcept nogil:
        """Replace data by the root's (call.root is a rank of this domain)."""
        cdef size_t nbytes = call.count * item_bytes(call.dtype), turns, t, n
        cdef int root = call.root, rc
        cdef uint64_t base
        cdef Slot *slot
        rc = self.announce(call, data, nbytes, deadline, fault)
        if rc != OK or nbytes == 0:
            return rc
        slot = &self.lines[root].slots[self.sequence & 1]
        if slot.place == PLACE_INLINE:
            if self.rank != root:
                memcpy(data, carried(slot, nbytes), nbytes)
                self.read_bytes += nbytes
            return OK
        if slot.place == PLACE_ARENA or not self.allowed[<int>WAY_STREAM]:
            if self.rank != root:
                rc = self.fetch(root, 0, nbytes, data, fault)
                if rc != OK:
                    return rc
            self.step()
            return self.wait_phase_of_all(self.phase, deadline, fault) if self.rank == root else OK
        # The root may be DEPTH pieces ahead of the slowest reader.
        base = self.phase
        turns = (nbytes + self.piece_bytes - 1) // self.piece_bytes
        for t in range(turns):
            n = smaller(self.piece_bytes, nbytes - t * self.piece_bytes)
            if self.rank == root:
                rc = self.wait_phase_of_all(base + t + 1 - DEPTH, deadline, fault) if t >= DEPTH else OK
                if rc == OK:
                    copy_out(self.stage_in(root, t), data + t * self.piece_bytes, n)
            else:
                rc = self.wait_for(root, PHASE_WORD, base + t + 1, deadline, fault)
                if rc == OK:
                    memcpy(data + t * self.piece_bytes, self.stage_in(root, t), n)
                    self.read_bytes += n
            if rc != OK:
                return rc
            self.step()
            fault.done_bytes = t * self.piece_bytes + n
        return self.wait_phase_of_all(self.phase, deadline, fault) if self.rank == root else OK

    # ---- verbs that pull: every rank takes what it wants of the others' inputs --------------------------------------

    cdef Slot *said(self, int peer) noexcept nogil:
        """What the peer announced for the operation in hand."""
        return &self.lines[peer].slots[self.sequence & 1]

    cdef bint is_staged(self, int peer) noexcept nogil:
        """Whether the peer's input can be had only through its staging slots."""
        return self.said(peer).place == PLACE_PROCESS and not self.allowed[<int>WAY_READ]

    cdef int finish(self, int64_t deadline, Fault *fault) noexcept nogil:
        """Tell the others that this rank needs nothing of them any more, and wait until none needs anything of it."""
        self.step()
        return self.wait_phase_of_all(self.phase, deadline, fault)

    cdef int exchange(self, const Call *call, const char *data, size_t nbytes, const Want *wants, size_t longest,
                      int64_t deadline, Fault *fault) noexcept nogil:
        """Copy wants[peer] out of every peer's input (not out of the own one).

        Args:    data, nbytes: the own input.  wants: one per rank.  longest: the most bytes of input that a rank has.
        """
        cdef const Want *want
        cdef size_t turns = 0, t, start, stop
        cdef uint64_t base
        cdef int i, peer, rc
        cdef bint pulled = False
        rc = self.announce(call, <char *>data, nbytes, deadline, fault)
        if rc != OK or longest == 0:
            return rc
        for i in range(self.size):
            peer = (self.rank + i) % self.size
            want = &wants[peer]
            if self.said(peer).place != PLACE_INLINE:
                pulled = True
            if self.is_staged(peer):
                turns = (longest + self.piece_bytes - 1) // self.piece_bytes
            elif peer != self.rank and want.stop > want.start:
                if self.said(peer).place == PLACE_INLINE:
                    self.read_bytes += want.stop - want.start
                    memcpy(want.into, carried(self.said(peer), want.whole) + want.start, want.stop - want.start)
                else:
                    rc = self.fetch(peer, want.start, want.stop - want.start, want.into, fault)
                    if rc != OK:
                        return rc
        if not pulled:
            return OK                              # all of it rode along; slots alternate, see announce
        base = self.phase
        for t in range(turns):
            if self.is_staged(self.rank) and t * self.piece_bytes < nbytes:
                copy_out(self.stage_in(self.rank, t), data + t * self.piece_bytes,
                         smaller(self.piece_bytes, nbytes - t * self.piece_bytes))
            self.step()                            # piece t is there, piece t - 1 of all others has been read
            rc = self.wait_phase_of_all(base + t + 1, deadline, fault)
            if rc != OK:
                return rc
            for peer in range(self.size):
                want = &wants[peer]
                if peer == self.rank or not self.is_staged(peer):
                    continue
                start, stop = t * self.piece_bytes, (t + 1) * self.piece_bytes
                start, stop = start if start > want.start else want.start, smaller(stop, want.stop)
                if start < stop:
                    memcpy(want.into + (start - want.start),
                           self.stage_in(peer, t) + (start - t * self.piece_bytes), stop - start)
                    self.read_bytes += stop - start
        return self.finish(deadline, fault)

    cdef int reduce_range(self, const Call *call, size_t nbytes, char *into, Fault *fault) noexcept nogil:
        """Reduce what self.srcs point at, in rank order."""
        cdef void *dst = into
        cdef int rc = reduce_many(call.dtype, call.op, &dst, 1, <const void **>self.srcs, self.size,
                                  nbytes // item_bytes(call.dtype), self.size if call.op == OP_MEAN else 1)
        self.read_bytes += nbytes * (self.size - 1)
        return rc if rc == OK else self.blame(fault, rc, self.rank, 0)

    cdef int combine(self, const Call *call, const char *data, size_t start, size_t stop, char *into, int64_t deadline,
                     Fault *fault) noexcept nogil:
        """Reduce bytes [start, stop) of all ranks' inputs, in rank order, into `into`; start == stop: only lend data.

        Args:    data: call.count elements.  into: may be data + start, if no other rank wants that range.
        """
        cdef int rc = self.announce(call, <char *>data, call.count * item_bytes(call.dtype), deadline, fault)
        if rc != OK or call.count == 0:
            return rc
        return self.combine_announced(call, data, start, stop, into, deadline, fault)

    cdef int reduce(self, const Call *call, char *data, int64_t deadline, Fault *fault) noexcept nogil:
        """On call.root (a rank of this domain), replace data by the reduction of all ranks' data."""
        cdef size_t itemsize = item_bytes(call.dtype), nbytes = call.count * itemsize, start, stop
        cdef int peer, rc
        cdef bint all_arena = nbytes > INLINE_BYTES
        cdef void *dst
        rc = self.announce(call, data, nbytes, deadline, fault)
        if rc != OK or nbytes == 0:
            return rc
        for peer in range(self.size):
            all_arena = all_arena and self.said(peer).place == PLACE_ARENA
        if not all_arena:
            return self.combine_announced(call, data, 0, nbytes if self.rank == <int>call.root else 0, data, deadline, fault)
        # Everyone reduces its share of all inputs and writes it where root's array lies.
        share(call.count, itemsize, self.size, self.rank, &start, &stop)
        for peer in range(self.size):
            self.srcs[peer] = self.bases[peer] + self.said(peer).address + start * itemsize
        dst = self.srcs[<int>call.root]
        rc = self.reduce_range(call, (stop - start) * itemsize, <char *>dst, fault)
        return rc if rc != OK else self.finish(deadline, fault)

    cdef int combine_announced(self, const Call *call, const char *data, size_t start, size_t stop, char *into,
                               int64_t deadline, Fault *fault) noexcept nogil:
        cdef size_t nbytes = call.count * item_bytes(call.dtype), turns, t, at, n, end
        cdef size_t chunk = SCRATCH_BYTES // self.size // 64 * 64
        cdef uint64_t base
        cdef int peer, rc
        cdef bint staged = False, fetched = False
        if nbytes <= INLINE_BYTES:
            for peer in range(self.size):
                self.srcs[peer] = carried(self.said(peer), nbytes) + start
            return self.reduce_range(call, stop - start, into, fault) if start < stop else OK
        for peer in range(self.size):
            staged = staged or self.is_staged(peer)
            fetched = fetched or (peer != self.rank and self.said(peer).place == PLACE_PROCESS)
        base = self.phase
        turns = (nbytes + self.piece_bytes - 1) // self.piece_bytes if staged else 0
        if not staged and not fetched:
            chunk = nbytes
        at = start
        while not staged and at < stop:
            n = smaller(chunk, stop - at)
            for peer in range(self.size):
                if peer == self.rank:
                    self.srcs[peer] = <void *>(data + at)
                elif self.said(peer).place == PLACE_ARENA:
                    self.srcs[peer] = self.bases[peer] + self.said(peer).address + at
                else:
                    self.srcs[peer] = self.scratch + peer * chunk
                    rc = self.fetch(peer, at, n, <char *>self.srcs[peer], fault)
                    if rc != OK:
                        return rc
            rc = self.reduce_range(call, n, into + (at - start), fault)
            if rc != OK:
                return rc
            at += n
        for t in range(turns):
            at = t * self.piece_bytes
            if self.is_staged(self.rank):
                copy_out(self.stage_in(self.rank, t), data + at, smaller(self.piece_bytes, nbytes - at))
            self.step()
            rc = self.wait_phase_of_all(base + t + 1, deadline, fault)
            if rc != OK:
                return rc
            end = smaller(at + self.piece_bytes, stop)
            n = at if at > start else start
            if n < end:
                for peer in range(self.size):
                    if peer == self.rank:
                        self.srcs[peer] = <void *>(data + n)
                    elif self.is_staged(peer):
                        self.srcs[peer] = self.stage_in(peer, t) + (n - at)
                    else:
                        self.srcs[peer] = self.bases[peer] + self.said(peer).address + n
                rc = self.reduce_range(call, end - n, into + (n - start), fault)
                if rc != OK:
                    return rc
        return self.finish(deadline, fault)
