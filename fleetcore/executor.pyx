"""C3: the only loop that moves bytes between hosts.

One thread drives both directions of all links: it sends every chunk whose bytes are ready, takes what has arrived,
reduces a chunk while the next one is on the wire, and sleeps in poll() when nothing moves. A row is cut into chunks
from its own start, so that it may begin a chunk as soon as the row it depends on has got that far.
"""
from libc.stdint cimport uint32_t, uint64_t
from fleetcore.check cimport adopt, interrupted
from fleetcore.kernels.checksum cimport crc32c
from fleetcore.kernels.reduce cimport reduce_many
from fleetcore.posix cimport (
    EINTR, POLLIN, POLLOUT, SO_RCVLOWAT, SOL_SOCKET, calloc, free, iovec, last_errno, memcmp, memset, now_ns, poll, pollfd,
    posix_memalign, setsockopt,
)
from fleetcore.status cimport (
    OK, OP_MEAN, ST_CORRUPT, ST_INTERRUPTED, ST_LEFT, ST_OUT_OF_STEP, ST_PEER_LOST, ST_SYSTEM, ST_TIMEOUT, Call, Fault,
)
from fleetcore.transports.base cimport Link, Wire

from fleetcore.errors import ConfigError

cdef uint32_t FRAME_MAGIC = 0x31544C46         # "FLT1"
cdef uint32_t NOTICE_MAGIC = 0x314E4C46        # "FLN1"
cdef uint32_t NOTICE_ABORT = 1
cdef uint32_t NOTICE_LEAVE = 2
cdef uint32_t NOTICE_CALL = 3                  # what the sender waits in: ranks that wait for each other in different calls
cdef int ROOMS = 2                             # chunks of a peer that may wait for the other peers of a fold; Lane says 2
cdef size_t SPIN_BYTES = 2 << 20                # beyond, a call waits for bytes, not for news: it sleeps at once
# What must have come of a chunk before the receiver is woken, while so much is missing: half the wake-ups of 4 hosts at
# 1 Gbit/s, where TCP hands over 58 KB at a time; 256 KiB was no better.
cdef int WAKE_BYTES = 128 * 1024
cdef int64_t NAP_NS = 50_000_000               # longest sleep between two looks at the deadline and at signals

CHUNK_BYTES = 512 * 1024                       # knee of a sweep over loopback: 128 KiB 47 ms, 256 43, 512 38, 1 MiB 45


cdef class Program:
    """A schedule compiled for arrays of one count and element size; holds the progress of the run in hand."""

    def __cinit__(self, list rows, size_t itemsize, int rank, int size, str algorithm=""):
        cdef int i, k, num = 0
        cdef list last_tx = [-1] * size, last_rx = [-1] * size
        self.itemsize, self.size, self.algorithm = itemsize, size, algorithm
        kept = [i for i, row in enumerate(rows) if row.stop > row.start]       # empty segments move nothing
        index = {old: new for new, old in enumerate(kept)}
        groups = {}
        for i in kept:
            if rows[i].kind == KIND_FOLD:
                groups.setdefault(rows[i].fold, []).append(i)
        numbers = {fold: k for k, fold in enumerate(groups)}
        self.num_steps, self.num_folds = len(kept), len(groups)
        written = [rows[i] for i in kept if rows[i].kind != KIND_SEND]
        self.writes_start = min((row.start for row in written), default=0) * itemsize
        self.writes_stop = max((row.stop for row in written), default=0) * itemsize
        self.num_members = sum(map(len, groups.values()))
        self.steps = <Step *>calloc(max(1, self.num_steps), sizeof(Step))
        self.folds = <Fold *>calloc(max(1, self.num_folds), sizeof(Fold))
        self.members = <int *>calloc(max(1, self.num_members), sizeof(int))
        self.fold_rank = <int *>calloc(max(1, self.num_folds), sizeof(int))
        self.first_tx = <int *>calloc(size, sizeof(int))
        self.first_rx = <int *>calloc(size, sizeof(int))
        if (self.steps == NULL or self.folds == NULL or self.members == NULL or self.fold_rank == NULL
                or self.first_tx == NULL or self.first_rx == NULL):
            raise MemoryError()
        for i in range(size):
            self.first_tx[i] = self.first_rx[i] = -1
        for i in kept:
            row, k = rows[i], index[i]
            self.steps[k].kind, self.steps[k].peer = row.kind, row.peer
            self.steps[k].start, self.steps[k].stop = row.start * itemsize, row.stop * itemsize
            self.steps[k].after = index[row.after] if row.after >= 0 else -1
            self.steps[k].fold = numbers[row.fold] if row.kind == KIND_FOLD else -1
            self.steps[k].next = -1
            last = last_tx if row.kind == KIND_SEND else last_rx
            if last[row.peer] >= 0:
                self.steps[<int>last[row.peer]].next = k
            elif row.kind == KIND_SEND:
                self.first_tx[<int>row.peer] = k
            else:
                self.first_rx[<int>row.peer] = k
            last[row.peer] = k
        num = 0
        for fold, group in groups.items():
            k = numbers[fold]
            group.sort(key=lambda i: rows[i].peer)
            self.folds[k].first, self.folds[k].num = num, len(group)
            self.folds[k].final = rows[group[0]].final
            self.folds[k].start = self.steps[<int>index[group[0]]].start
            self.folds[k].stop = self.steps[<int>index[group[0]]].stop
            self.fold_rank[k] = sum(rows[i].peer < rank for i in group)
            for i in group:
                self.members[num] = index[i]
                num += 1

    def __dealloc__(self):
        free(self.steps)
        free(self.folds)
        free(self.members)
        free(self.fold_rank)
        free(self.first_tx)
        free(self.first_rx)


cdef inline size_t finished(Program program, int i) noexcept nogil:
    """How far (in bytes of the array) step i has got; a FOLD counts when it is reduced."""
    if program.steps[i].kind == KIND_FOLD:
        return program.folds[program.steps[i].fold].done
    return program.steps[i].done


cdef class Executor:
    """The links of one group and the loop over them.

    Args:    links, controls: one Link per rank, None at the own place; controls carry notices of failure only.
             epoch, group: stamped on every frame.  spin_ns: how long to poll without sleeping.
    """

    def __cinit__(self, int rank, list links, list controls, *, uint32_t epoch=0, uint32_t group=0,
                  size_t chunk_bytes=CHUNK_BYTES, int64_t spin_ns=0):
        cdef int peer
        cdef Link link
        if chunk_bytes < 64 or chunk_bytes % 64 or chunk_bytes > 1 << 30:
            raise ConfigError(f"chunk_bytes must be a multiple of 64 up to 1 GiB, not {chunk_bytes}")
        self.rank, self.size, self.links, self.controls = rank, len(links), links, controls
        self.epoch, self.group, self.chunk_bytes, self.spin_ns = epoch, group, chunk_bytes, spin_ns
        self.lanes = <Lane *>calloc(self.size, sizeof(Lane))
        self.fds = <pollfd *>calloc(3 * self.size, sizeof(pollfd))
        self.srcs = <void **>calloc(self.size, sizeof(void *))
        if (self.lanes == NULL or self.fds == NULL or self.srcs == NULL
                or posix_memalign(<void **>&self.rooms, 4096, self.size * ROOMS * chunk_bytes) != 0):
            raise MemoryError()
        for peer in range(self.size):
            self.lanes[peer].rooms = self.rooms + peer * ROOMS * chunk_bytes
            self.lanes[peer].tx = self.lanes[peer].rx = -1
            if peer != rank:
                link = links[peer]
                self.lanes[peer].wire = &link.wire
                link = controls[peer]
                self.lanes[peer].control = &link.wire

    def __dealloc__(self):
        free(self.lanes)
        free(self.fds)
        free(self.srcs)
        free(self.rooms)
        free(self.events)

    # ---- what happened when -------------------------------------------------------------------------------------

    def record(self, size_t capacity):
        """Remember when the newest `capacity` chunks went out, came in and were reduced; 0 stops it."""
        free(self.events)
        self.events, self.max_events, self.num_events = NULL, 0, 0
        if capacity:
            self.events = <Event *>calloc(capacity, sizeof(Event))
            if self.events == NULL:
                raise MemoryError()
            self.max_events = capacity

    def recorded(self):
        """[(what, peer, start, stop, began, ended, sequence)], oldest first: what is "send", "receive" or "fold" (peer
        None); start and stop are bytes of the array, began and ended seconds of time.monotonic()."""
        cdef size_t i, first = self.num_events - self.max_events if self.num_events > self.max_events else 0
        cdef Event *event
        found = []
        for i in range(first, self.num_events):
            event = &self.events[i % self.max_events]
            found.append((("send", "receive", "fold")[event.kind], None if event.peer < 0 else event.peer, event.start,
                          event.stop, event.began / 1e9, event.ended / 1e9, event.sequence))
        return found

    cdef void note(self, int kind, int peer, int64_t began, size_t start, size_t stop) noexcept nogil:
        cdef Event *event = &self.events[self.num_events % self.max_events]
        event.kind, event.peer, event.start, event.stop = kind, peer, start, stop
        event.began, event.ended, event.sequence = began, now_ns(), self.sequence
        self.num_events += 1

    # ---- verdicts -----------------------------------------------------------------------------------------------

    cdef int blame(self, Fault *fault, int status, int rank, int error) noexcept nogil:
        """Fill in the fault, tell all peers, and return its status; a verdict that is already on its way in wins."""
        cdef int rc
        fault.status, fault.rank, fault.error, fault.reporter = status, rank, error, -1
        if status == ST_PEER_LOST or status == ST_TIMEOUT:
            rc = self.poll_controls(fault.sequence, fault)
            if rc != OK:
                return rc
        self.condemn(fault)
        return status

    cdef void condemn(self, const Fault *fault) noexcept nogil:
        """Tell every peer, once, that this group is over and why."""
        cdef int peer
        cdef Fault told = fault[0]
        if self.condemned:
            return
        self.condemned = True
        if told.reporter < 0:
            told.reporter = self.rank
        for peer in range(self.size):
            if peer != self.rank:
                self.notify(peer, NOTICE_ABORT, told.sequence, &told)

    cdef void leave(self, uint64_t sequence) noexcept nogil:
        """Tell every peer that this rank has finished `sequence` operations and is gone."""
        cdef int peer
        cdef Fault none
        memset(&none, 0, sizeof(none))
        if self.condemned:
            return
        self.condemned = True
        for peer in range(self.size):
            if peer != self.rank:
                self.notify(peer, NOTICE_LEAVE, sequence, &none)

    cdef int notify(self, int peer, int kind, uint64_t sequence, const Fault *fault) noexcept nogil:
        cdef Notice notice
        cdef iovec part
        memset(&notice, 0, sizeof(notice))
        notice.magic, notice.kind, notice.epoch, notice.sequence = NOTICE_MAGIC, kind, self.epoch, sequence
        notice.fault = fault[0]
        notice.crc = crc32c(0, &notice, sizeof(notice))
        part.iov_base, part.iov_len = &notice, sizeof(notice)
        # A few dozen bytes on an otherwise silent connection: they fit, or the peer is gone anyway.
        self.lanes[peer].control.send_some(self.lanes[peer].control, &part, 1)
        return OK

    cdef int poll_controls(self, uint64_t sequence, Fault *fault) noexcept nogil:
        """Read what the control connections hold now; the first verdict found, or OK."""
        cdef int peer, rc
        cdef Fault heard
        for peer in range(self.size):
            if peer != self.rank and not self.lanes[peer].left:
                heard = fault[0]
                heard.reporter = -1
                rc = self.read_notice(&self.lanes[peer], sequence, &heard)
                if rc != OK and (rc != ST_PEER_LOST or heard.reporter >= 0):
                    fault[0] = heard
                    return rc
        return OK

    cdef int read_notice(self, Lane *lane, uint64_t sequence, Fault *fault) noexcept nogil:
        """OK when nothing bad has come; ST_PEER_LOST with fault.reporter < 0 when the connection itself has ended."""
        cdef iovec part
        cdef Py_ssize_t n
        cdef uint32_t crc
        while True:
            part.iov_base = <char *>&lane.notice + lane.notice_got
            part.iov_len = sizeof(Notice) - lane.notice_got
            n = lane.control.recv_some(lane.control, &part, 1)
            if n == 0:
                return OK
            if n < 0:
                fault.status, fault.rank, fault.error = <int>n, lane.control.rank, lane.control.error
                fault.reporter = -1
                return <int>n                      # ST_PEER_LOST, or what a sealed link says of damage
            lane.notice_got += n
            if lane.notice_got < sizeof(Notice):
                continue
            lane.notice_got = 0
            crc = lane.notice.crc
            lane.notice.crc = 0
            if lane.notice.magic != NOTICE_MAGIC or crc != crc32c(0, &lane.notice, sizeof(Notice)):
                fault.status, fault.rank = ST_CORRUPT, lane.control.rank
                return ST_CORRUPT
            if lane.notice.kind == NOTICE_LEAVE:
                lane.left, lane.last = 1, lane.notice.sequence
                if lane.last >= sequence:
                    return OK
                fault.status, fault.rank, fault.reporter = ST_LEFT, lane.control.rank, -1
                return ST_LEFT
            if lane.notice.kind == NOTICE_CALL:
                lane.said, lane.said_call = lane.notice.sequence, lane.notice.fault.call
                if self.disagrees(lane, &fault.call, sequence):
                    fault.theirs = lane.said_call
                    return self.blame(fault, ST_OUT_OF_STEP, lane.control.rank, 0)
                continue
            self.condemned = True                  # the reporter has told everyone
            if lane.notice.sequence > sequence:
                # The reporter has finished this operation, so this rank can, too; the verdict is for the next one.
                lane.left, lane.last = 1, lane.notice.sequence - 1
                if self.verdict.status == OK:
                    self.verdict = lane.notice.fault
                return OK
            return adopt(fault, &lane.notice.fault, self.rank)

    cdef bint disagrees(self, const Lane *lane, const Call *call, uint64_t sequence) noexcept nogil:
        """Whether the peer has said that this operation is another call."""
        return lane.said == sequence and memcmp(&lane.said_call, call, sizeof(Call)) != 0

    # ---- the loop -----------------------------------------------------------------------------------------------

    cdef int run(self, Program program, const Call *call, const char *source, char *target, uint64_t sequence,
                 int64_t deadline, Fault *fault) noexcept nogil:
        """Carry out the program from source to target: where element 0 of the whole array lies or would lie.

        Returns OK, or a Status with the fault filled in and all peers told.
        """
        cdef int peer, i, rc, busy
        cdef bint moved
        cdef int64_t now, looked = now_ns()
        cdef Lane *lane
        memset(fault, 0, sizeof(Fault))
        fault.call, fault.sequence, fault.rank, fault.reporter = call[0], sequence, -1, -1
        self.sequence, self.told = sequence, False
        self.spinning = self.spin_ns if call.count * program.itemsize <= SPIN_BYTES else 0
        if self.verdict.status != OK:
            return adopt(fault, &self.verdict, self.rank)
        for i in range(program.num_steps):
            program.steps[i].done = program.steps[i].start
        for i in range(program.num_folds):
            program.folds[i].done = program.folds[i].start
        for peer in range(self.size):
            if peer == self.rank:
                continue
            lane = &self.lanes[peer]
            lane.tx, lane.rx = program.first_tx[peer], program.first_rx[peer]
            lane.tx_full = lane.rx_dry = lane.rx_checked = lane.held = lane.oldest = 0
            lane.tx_sent = lane.rx_got = lane.rx_ahead_got = 0
            lane.rx_first = 1
            lane.rx_room = -1
            if lane.tx >= 0:
                lane.tx_at = program.steps[lane.tx].start
            if lane.rx >= 0:
                lane.rx_at = lane.rx_start = program.steps[lane.rx].start
            if lane.left and lane.last < sequence:
                return self.blame(fault, ST_LEFT, peer, 0)
            if self.disagrees(lane, call, sequence):
                fault.theirs = lane.said_call
                return self.blame(fault, ST_OUT_OF_STEP, peer, 0)
        while True:
            busy = 0
            moved = False
            for i in range(1, self.size):
                lane = &self.lanes[(self.rank + i) % self.size]
                if lane.tx >= 0:
                    busy += 1
                    if not lane.tx_full and self.may_push(program, lane):
                        rc = self.push(program, lane, call, source, target, sequence, fault)
                        if rc < 0:
                            return rc
                        moved = moved or rc > 0
                if lane.rx >= 0:
                    busy += 1
                    if not lane.rx_dry and self.may_pull(program, lane):
                        rc = self.pull(program, lane, call, source, target, sequence, fault)
                        if rc < 0:
                            return rc
                        moved = moved or rc > 0
            if busy == 0:
                return OK
            now = now_ns()
            if self.aborted:
                return self.blame(fault, ST_LEFT, self.rank, 0)
            if moved:
                if now - looked > NAP_NS:          # a long transfer need not sleep for a Ctrl-C to be heard
                    looked = now
                    if interrupted():
                        return self.blame(fault, ST_INTERRUPTED, self.rank, 0)
                continue
            if now >= deadline:
                return self.blame(fault, ST_TIMEOUT, self.awaited(program), 0)
            rc = self.sleep(program, sequence, deadline - now, fault)
            if rc != OK:
                return rc

    cdef int awaited(self, Program program) noexcept nogil:
        """The peer that this rank cannot go on without: best one that has been silent in this operation altogether."""
        cdef int i, peer, found = -1
        cdef Lane *lane
        for i in range(self.size - 1, 0, -1):
            peer = (self.rank + i) % self.size
            lane = &self.lanes[peer]
            if lane.rx >= 0 and lane.rx_first:
                return peer
            if (lane.rx >= 0 and self.may_pull(program, lane)) or (lane.tx >= 0 and lane.tx_full):
                found = peer
        return found

    cdef int sleep(self, Program program, uint64_t sequence, int64_t most_ns, Fault *fault) noexcept nogil:
        """Wait until a socket is ready, most_ns or a nap has passed; note what is ready."""
        cdef int i, rc, num = 0
        cdef int64_t start = now_ns()
        cdef int64_t nap = NAP_NS if most_ns > NAP_NS else most_ns
        cdef Lane *lane
        for i in range(self.size):
            lane = &self.lanes[i]
            self.fds[3 * i].fd = self.fds[3 * i + 1].fd = self.fds[3 * i + 2].fd = -1
            if i == self.rank:
                continue
            if lane.tx >= 0 and lane.tx_full and self.may_push(program, lane):
                self.fds[3 * i + 1].fd = lane.wire.send_fd if lane.wire.send_fd >= 0 else lane.wire.fd
                self.fds[3 * i + 1].events = POLLOUT
            if lane.rx >= 0 and lane.rx_dry and self.may_pull(program, lane):
                self.fds[3 * i].fd = lane.wire.fd
                self.fds[3 * i].events = POLLIN
                self.wake_at(&program.steps[lane.rx], lane)
            if not lane.left:
                self.fds[3 * i + 2].fd = lane.control.fd
                self.fds[3 * i + 2].events = POLLIN
        rc = 0
        while rc == 0 and self.spinning and now_ns() - start < self.spinning:
            rc = poll(self.fds, 3 * self.size, 0)
        if rc == 0:
            rc = poll(self.fds, 3 * self.size, <int>((nap + 999_999) // 1_000_000))
        if rc < 0 and last_errno() != EINTR:
            return self.blame(fault, ST_SYSTEM, self.rank, last_errno())
        if rc == 0 and not self.told:              # a whole nap: say once what this rank is waiting in
            self.told = True
            for i in range(self.size):
                if i != self.rank and not self.lanes[i].left:
                    self.notify(i, NOTICE_CALL, sequence, fault)
        if rc <= 0:
            return self.blame(fault, ST_INTERRUPTED, self.rank, 0) if interrupted() else OK
        for i in range(self.size):
            lane = &self.lanes[i]
            if (self.fds[3 * i].fd >= 0 and self.fds[3 * i].revents) or (self.fds[3 * i + 1].fd >= 0 and self.fds[3 * i + 1].revents):
                lane.tx_full = lane.rx_dry = 0
            if self.fds[3 * i + 2].fd >= 0 and self.fds[3 * i + 2].revents:
                rc = self.read_notice(lane, sequence, fault)
                if rc == ST_PEER_LOST and fault.reporter < 0:
                    return self.blame(fault, ST_PEER_LOST, i, lane.control.error)
                if rc != OK:
                    return rc
        return OK

    cdef void wake_at(self, const Step *step, Lane *lane) noexcept nogil:
        """Have poll() report the lane once it is worth waking up for."""
        cdef size_t missing = FRAME_BYTES + self.chunk_end(step, lane.rx_at) - lane.rx_at - lane.rx_got
        cdef int least = WAKE_BYTES if missing >= <size_t>WAKE_BYTES else 1
        if least != lane.least and lane.wire.patient:
            lane.least = least
            setsockopt(lane.wire.fd, SOL_SOCKET, SO_RCVLOWAT, &least, sizeof(least))

    cdef size_t chunk_end(self, const Step *step, size_t at) noexcept nogil:
        cdef size_t end = step.start + ((at - step.start) // self.chunk_bytes + 1) * self.chunk_bytes
        return end if end < step.stop else step.stop

    cdef bint may_push(self, Program program, Lane *lane) noexcept nogil:
        """Whether the bytes of the lane's next chunk are ready to go."""
        cdef Step *step = &program.steps[lane.tx]
        return lane.tx_sent > 0 or step.after < 0 or finished(program, step.after) >= self.chunk_end(step, lane.tx_at)

    cdef bint may_pull(self, Program program, Lane *lane) noexcept nogil:
        """Whether there is a place for the lane's next chunk."""
        cdef Step *step = &program.steps[lane.rx]
        if lane.rx_got > FRAME_BYTES:              # its payload has begun
            return True
        if step.kind == KIND_FOLD and lane.rx_room < 0 and lane.held == ROOMS:
            return False
        return step.after < 0 or finished(program, step.after) >= self.chunk_end(step, lane.rx_at)

    cdef int push(self, Program program, Lane *lane, const Call *call, const char *source, const char *target,
                  uint64_t sequence, Fault *fault) noexcept nogil:
        """Send what the kernel takes of the current chunk: 1 when bytes moved, 0 when not, or a Status."""
        cdef Step *step = &program.steps[lane.tx]
        cdef const char *data = source if step.after < 0 else target
        cdef Frame *frame = &lane.tx_frame
        cdef iovec parts[2]
        cdef int num = 0
        cdef Py_ssize_t n
        cdef size_t wanted, skip
        if lane.tx_sent == 0:
            if self.events != NULL:
                lane.tx_began = now_ns()
            lane.tx_length = self.chunk_end(step, lane.tx_at) - lane.tx_at
            memset(frame, 0, sizeof(Frame))
            frame.magic, frame.epoch, frame.group, frame.sequence = FRAME_MAGIC, self.epoch, self.group, sequence
            frame.call, frame.start, frame.length = call[0], lane.tx_at - step.start, <uint32_t>lane.tx_length
            if not lane.wire.authentic:
                frame.payload_crc = crc32c(0, data + lane.tx_at, lane.tx_length)
            frame.header_crc = crc32c(0, frame, FRAME_BYTES)
        if lane.tx_sent < FRAME_BYTES:
            parts[0].iov_base = <char *>frame + lane.tx_sent
            parts[0].iov_len = FRAME_BYTES - lane.tx_sent
            num = 1
        skip = lane.tx_sent - FRAME_BYTES if lane.tx_sent > FRAME_BYTES else 0
        parts[num].iov_base = <char *>data + lane.tx_at + skip
        parts[num].iov_len = lane.tx_length - skip
        wanted = FRAME_BYTES + lane.tx_length - lane.tx_sent
        n = lane.wire.send_some(lane.wire, parts, num + 1)
        if n < 0:
            return self.blame(fault, <int>n, lane.wire.rank, lane.wire.error)
        lane.tx_full = <size_t>n < wanted
        if n == 0:
            return 0
        lane.tx_sent += n
        fault.done_bytes += n
        if lane.tx_sent == FRAME_BYTES + lane.tx_length:
            lane.tx_sent = 0
            if self.events != NULL:
                self.note(KIND_SEND, lane.wire.rank, lane.tx_began, lane.tx_at, lane.tx_at + lane.tx_length)
            lane.tx_at += lane.tx_length
            step.done = lane.tx_at
            if lane.tx_at == step.stop:
                lane.tx = step.next
                if lane.tx >= 0:
                    lane.tx_at = program.steps[lane.tx].start
        return 1

    cdef int pull(self, Program program, Lane *lane, const Call *call, const char *source, char *target,
                  uint64_t sequence, Fault *fault) noexcept nogil:
        """Take what has arrived of the current chunk: 1 when bytes moved, 0 when not, or a Status.

        One system call asks for the rest of the header, the payload where it belongs, and the next header. The first
        header of an operation is checked before its payload may touch the caller's array.
        """
        cdef Step *step = &program.steps[lane.rx]
        cdef size_t end = self.chunk_end(step, lane.rx_at), wanted = 0, skip, part
        cdef bint more = end < step.stop or step.next >= 0
        cdef char *into = target + lane.rx_at
        cdef iovec parts[3]
        cdef int num = 0, rc
        cdef Py_ssize_t n
        lane.rx_length = end - lane.rx_at
        if step.kind == KIND_FOLD:
            if lane.rx_room < 0:
                lane.rx_room = 1 - lane.oldest if lane.held else 0
            into = lane.rooms + lane.rx_room * self.chunk_bytes
        if lane.rx_got < FRAME_BYTES:
            parts[0].iov_base = <char *>&lane.rx_frame + lane.rx_got
            parts[0].iov_len = FRAME_BYTES - lane.rx_got
            wanted, num = parts[0].iov_len, 1
        if lane.rx_got >= FRAME_BYTES or step.kind == KIND_FOLD or not lane.rx_first:
            skip = lane.rx_got - FRAME_BYTES if lane.rx_got > FRAME_BYTES else 0
            parts[num].iov_base = into + skip
            parts[num].iov_len = lane.rx_length - skip
            wanted += parts[num].iov_len
            num += 1
            if more:
                parts[num].iov_base = <char *>&lane.rx_ahead + lane.rx_ahead_got
                parts[num].iov_len = FRAME_BYTES - lane.rx_ahead_got
                wanted += parts[num].iov_len
                num += 1
        n = lane.wire.recv_some(lane.wire, parts, num)
        if n < 0:
            return self.blame(fault, <int>n, lane.wire.rank, lane.wire.error)
        lane.rx_dry = <size_t>n < wanted
        if n == 0:
            return 0
        if lane.rx_got == 0 and self.events != NULL:
            lane.rx_began = now_ns()
        part = FRAME_BYTES + lane.rx_length - lane.rx_got
        if <size_t>n < part:
            part = n
        lane.rx_got += part
        lane.rx_ahead_got += n - part
        if lane.rx_got >= FRAME_BYTES and not lane.rx_checked:
            rc = self.check_frame(lane, call, sequence, fault)
            if rc != OK:
                return rc
            lane.rx_checked, lane.rx_first = 1, 0
        if lane.rx_got < FRAME_BYTES + lane.rx_length:
            return 1
        if not lane.wire.authentic and crc32c(0, into, lane.rx_length) != lane.rx_frame.payload_crc:
            return self.blame(fault, ST_CORRUPT, lane.wire.rank, 0)
        if self.events != NULL:
            self.note(KIND_COPY, lane.wire.rank, lane.rx_began, lane.rx_at, end)
            lane.rx_began = now_ns()
        step.done = end
        lane.rx_at = end
        lane.rx_frame, lane.rx_got = lane.rx_ahead, lane.rx_ahead_got
        lane.rx_ahead_got, lane.rx_checked = 0, 0
        if end == step.stop:
            lane.rx = step.next
            if lane.rx >= 0:
                lane.rx_at = lane.rx_start = program.steps[lane.rx].start
        if step.kind == KIND_FOLD:
            if lane.held == 0:
                lane.oldest = lane.rx_room
            lane.held += 1
            lane.rx_room = -1
            rc = self.fold(program, step.fold, call, source, target, fault)
            if rc != OK:
                return rc
        if lane.rx_got == FRAME_BYTES:             # the next header came along
            lane.rx_length = 0 if lane.rx < 0 else self.chunk_end(&program.steps[lane.rx], lane.rx_at) - lane.rx_at
            rc = self.check_frame(lane, call, sequence, fault)
            if rc != OK:
                return rc
            lane.rx_checked = 1
        return 1

    cdef int check_frame(self, Lane *lane, const Call *call, uint64_t sequence, Fault *fault) noexcept nogil:
        """Whether the header that has arrived is the one that must come now."""
        cdef Frame *frame = &lane.rx_frame
        cdef uint32_t crc = frame.header_crc
        frame.header_crc = 0
        if frame.magic != FRAME_MAGIC or crc32c(0, frame, FRAME_BYTES) != crc:
            return self.blame(fault, ST_CORRUPT, lane.wire.rank, 0)
        if memcmp(&frame.call, call, sizeof(Call)) != 0:
            fault.theirs = frame.call
            return self.blame(fault, ST_OUT_OF_STEP, lane.wire.rank, 0)
        if (frame.epoch != self.epoch or frame.group != self.group or frame.sequence != sequence
                or frame.start != lane.rx_at - lane.rx_start or frame.length != lane.rx_length):
            return self.blame(fault, ST_CORRUPT, lane.wire.rank, 0)
        return OK

    cdef int fold(self, Program program, int number, const Call *call, const char *source, char *target,
                  Fault *fault) noexcept nogil:
        """Reduce every chunk of this fold that has arrived from all its peers, with the own data, in rank order."""
        cdef Fold *f = &program.folds[number]
        cdef const char *own = source if program.steps[program.members[f.first]].after < 0 else target
        cdef Lane *lane
        cdef size_t end
        cdef void *dst
        cdef int i, k, rc
        cdef int64_t began = 0
        while f.done < f.stop:
            end = self.chunk_end(&program.steps[program.members[f.first]], f.done)
            for i in range(f.num):
                if program.steps[program.members[f.first + i]].done < end:
                    return OK
            if self.events != NULL:
                began = now_ns()
            k = 0
            for i in range(f.num + 1):
                if i == program.fold_rank[number]:
                    self.srcs[i] = <void *>(own + f.done)
                    continue
                lane = &self.lanes[program.steps[program.members[f.first + k]].peer]
                self.srcs[i] = lane.rooms + lane.oldest * self.chunk_bytes
                lane.held -= 1
                lane.oldest = 1 - lane.oldest
                k += 1
            dst = target + f.done
            rc = reduce_many(call.dtype, call.op, &dst, 1, <const void **>self.srcs, f.num + 1,
                             (end - f.done) // program.itemsize,
                             self.size if f.final and call.op == OP_MEAN else 1)
            if rc != OK:
                return self.blame(fault, rc, self.rank, 0)
            if self.events != NULL:
                self.note(KIND_FOLD, -1, began, f.done, end)
            f.done = end
        return OK
