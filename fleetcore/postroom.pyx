"""C3: messages between pairs of ranks: letters, matching and bounded buffering, all without the GIL.

A message is a letter, a note that tells the receiver what it is, and payload in chunks. Whoever drives (one thread at a
time, see mailbox.pyx) serves all peers in both directions at once. A message that finds no receive posted is buffered,
up to a bound for each peer; beyond it that peer's stream is not read any further, so that its sends stop, too.

Large messages are offered first. A peer on the same host reads them out of the sender's memory, or it asks for them
once it has a place, so they never stand in the way of those behind them.
"""
import os

from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t, uintptr_t
from fleetcore.check cimport interrupted
from fleetcore.kernels.checksum cimport crc32c
from fleetcore.posix cimport (
    EPERM, ENOSYS, POLLIN, POLLOUT, SHUT_RDWR, calloc, cas_pointer, fence, free, iovec, last_errno, load32,
    malloc, memcpy, memset, now_ns, poll, pollfd, read_process, shutdown, store32, store64, swap_pointer,
)
from fleetcore.status cimport (
    OK, ST_CORRUPT, ST_INTERRUPTED, ST_LEFT, ST_NO_MEMORY, ST_PEER_LOST, ST_TIMEOUT,
)
from fleetcore.transports.base cimport Link, Wire
from fleetcore.transports.loopback cimport LoopbackLink

from fleetcore.errors import ConfigError
from fleetcore.transports.loopback import LoopbackLink as _LoopbackLink

cdef uint32_t MAGIC = 0x314D4C46               # "FLM1"
cdef size_t CHUNK_BYTES = 512 * 1024           # as in the executor: the knee of its sweep over loopback
cdef size_t PIECE_BYTES = 1024 * 1024          # read from another process between two looks at the other peers
cdef size_t AHEAD_BYTES = 16 * 1024            # some fifty short messages in one read; copied twice at most this much
cdef size_t SCRATCH_BYTES = 64 * 1024          # where payload goes that nobody wants any more
cdef size_t MOST_BYTES = 1 << 62
cdef int64_t NAP_NS = 50_000_000               # longest sleep between two looks at signals
cdef int64_t SERVER_NAP_NS = 1_000_000_000     # a server is woken by whoever wants something, signals are not for it

UNREAD_BYTES = 64 * 1024 * 1024
NEAR_BYTES = 256 * 1024            # reading overtakes a Unix socket: 3.4 GB/s to 2.5; at 128 KiB it is 2.5 to 3.0
FAR_BYTES = 8 * 1024 * 1024        # 64 ms at 1 Gbit/s: the round trip of an offer is lost in it, WiFi's 5 ms, too


cdef inline size_t smaller(size_t a, size_t b) noexcept nogil:
    return a if a < b else b


cdef class Postroom:
    """The lanes of one rank to all others, and what was posted on them. Everything here is for the one driver.

    Args:    rank: own place.  links: one Link for each rank, None at the own place.
             epoch, group: stamped on every letter; one that carries others is damage.
             pids: per rank the process id of a peer whose memory may be read (same host), None for the others.
             unread_bytes: bound of what is buffered per peer while no receive is posted for it.
             near_bytes, far_bytes: messages from this size on are offered first, within a host and between hosts.
             spin_ns: how long to poll without sleeping; on busy cores it only keeps the peer from running.
    """

    def __cinit__(self, int rank, list links, *, uint32_t epoch=0, uint32_t group=0, list pids=None,
                  size_t unread_bytes=UNREAD_BYTES, size_t near_bytes=NEAR_BYTES, size_t far_bytes=FAR_BYTES,
                  int64_t spin_ns=0, **rest):
        cdef int peer
        cdef Link link
        self.size = len(links)
        if not 0 <= rank < self.size:
            raise ConfigError(f"rank {rank} is not in a group of {self.size}")
        if sizeof(Letter) != LETTER_BYTES or sizeof(Offer) != OFFER_BYTES:
            raise AssertionError("a letter is not laid out as LETTER_BYTES says")
        if near_bytes < 1 or far_bytes < 1:
            raise ConfigError("an empty message cannot be offered: near_bytes and far_bytes start at 1")
        self.rank, self.links, self.epoch, self.group, self.spin_ns = rank, links, epoch, group, spin_ns
        self.unread_bytes, self.near_bytes, self.far_bytes = unread_bytes, near_bytes, far_bytes
        self.lanes = <Lane *>calloc(self.size, sizeof(Lane))
        self.fds = <pollfd *>calloc(self.size + 1, sizeof(pollfd))
        self.scratch = <char *>malloc(SCRATCH_BYTES)
        self.aheads = <char *>malloc(self.size * AHEAD_BYTES)
        if self.lanes == NULL or self.fds == NULL or self.scratch == NULL or self.aheads == NULL:
            raise MemoryError()
        self.bell_rope, self.bell_house = _LoopbackLink.pair(rank, rank)
        self.secret = int.from_bytes(os.urandom(8), "little")
        self.next_deadline = MOST_BYTES
        for peer in range(self.size):
            self.lanes[peer].pid = -1
            self.lanes[peer].ahead = self.aheads + peer * AHEAD_BYTES
            if peer != rank:
                link = links[peer]
                self.lanes[peer].wire = &link.wire
                if pids is not None and pids[peer] is not None:
                    self.lanes[peer].pid, self.lanes[peer].near = pids[peer], 1

    def __dealloc__(self):
        cdef Parcel *parcel
        cdef Lane *lane
        cdef int peer
        if self.lanes != NULL:
            for peer in range(self.size):
                lane = &self.lanes[peer]
                if lane.incoming != NULL and (lane.incoming.discard or lane.incoming.taker != NULL):
                    free(lane.incoming)            # the others stand in the list
                if lane.offered != NULL and (lane.offered.discard or lane.offered.taker != NULL):
                    free(lane.offered)
                while lane.first != NULL:
                    parcel = lane.first
                    lane.first = parcel.next
                    free(parcel.room)
                    free(parcel)
                free(lane.tx_rest)
        free(self.lanes)
        free(self.fds)
        free(self.scratch)
        free(self.aheads)

    # ---- for other threads --------------------------------------------------------------------------------------

    cdef void push_post(self, Post *post) noexcept nogil:
        """Leave a post for the driver; `knock` afterwards."""
        while True:
            post.next = <Post *>self.stack
            if cas_pointer(&self.stack, post.next, post):
                return

    cdef bint knock(self) noexcept nogil:
        """Wake the driver if it sleeps; False when nobody does."""
        cdef iovec part
        cdef char byte = 0
        fence()
        if not load32(&self.asleep):
            return False
        part.iov_base, part.iov_len = &byte, 1
        self.bell_rope.wire.send_some(&self.bell_rope.wire, &part, 1)      # a full pipe wakes just as well
        return True

    # ---- the loop -----------------------------------------------------------------------------------------------

    cdef int drive(self, int64_t until, bint yielding) noexcept nogil:
        """Move bytes until Python has to look at something (1), `until` has passed (0), or ST_INTERRUPTED.

        1: a post is over, one wants a place, or the room is closing. yielding: return 0 as soon as anybody else wants
        to drive. Looks at the sockets at least once.
        """
        cdef bint looked = False, moved
        cdef int64_t now, heard = now_ns()
        cdef int rc
        while True:
            self.accept()
            now = now_ns()
            if load32(&self.attention) or now >= self.next_deadline:
                self.sweep(now)
            moved = self.step()
            if self.finished != NULL or self.hands != NULL or self.closing:
                return 1
            if yielding and self.wanted:
                return 0
            if moved:
                if now - heard > NAP_NS:           # a long transfer need not sleep for a Ctrl-C to be heard
                    heard = now
                    if interrupted():
                        return ST_INTERRUPTED
                if now >= until:
                    return 0
                continue
            if looked and now >= until:
                return 0
            looked = True
            rc = self.sleep(until - now if until > now else 0, yielding)
            if rc != OK:
                return rc

    cdef bint step(self) noexcept nogil:
        """One turn over all peers; whether anything moved."""
        cdef bint moved = False
        cdef int i
        cdef Lane *lane
        for i in range(self.size):
            lane = &self.lanes[(self.turn + i) % self.size]
            if lane.wire == NULL:
                continue
            if lane.tx_status == OK and not lane.tx_full and self.push(lane):
                moved = True
            if lane.rx_status == OK and self.pull(lane):
                moved = True
            if lane.offered != NULL and self.fetch(lane):
                moved = True
                # The receive may be over with this, and nobody drive any more: the sender must hear of it now.
                while lane.answer and lane.tx_status == OK and not lane.tx_full:
                    self.push(lane)
        self.turn = (self.turn + 1) % self.size
        return moved

    cdef int sleep(self, int64_t most_ns, bint yielding) noexcept nogil:
        """Wait until a socket is ready, somebody knocks, or most_ns, the next deadline or a nap has passed."""
        cdef int64_t nap = SERVER_NAP_NS if yielding else NAP_NS, left = self.next_deadline - now_ns()
        cdef int rc = 1
        if left < nap:
            nap = left if left > 0 else 0
        if most_ns < nap:
            nap = most_ns
        store32(&self.asleep, 1)
        fence()
        if self.stack == NULL and not load32(&self.attention) and not self.closing and not (yielding and self.wanted):
            rc = self.listen(<int>((nap + 999_999) // 1_000_000), self.spin_ns if nap else 0)
        store32(&self.asleep, 0)
        return ST_INTERRUPTED if rc <= 0 and interrupted() else OK

    cdef int listen(self, int timeout_ms, int64_t spin_ns) noexcept nogil:
        """Poll, and note what is ready: how many descriptors, 0, or -1 when a signal came."""
        cdef int64_t start
        cdef int i, rc = 0
        cdef char bytes[64]
        cdef iovec part
        cdef Lane *lane
        for i in range(self.size):
            lane = &self.lanes[i]
            self.fds[i].fd = -1
            if lane.wire == NULL:
                continue
            self.fds[i].events = 0
            if lane.tx_status == OK and lane.tx_full and self.sendable(lane):
                self.fds[i].events |= POLLOUT
            if lane.rx_status == OK and lane.rx_dry and not (lane.in_chunk and self.place(lane, lane.incoming) == NULL):
                self.fds[i].events |= POLLIN
            if self.fds[i].events:
                self.fds[i].fd = lane.wire.fd
        self.fds[self.size].fd, self.fds[self.size].events = self.bell_house.wire.fd, POLLIN
        if spin_ns:
            start = now_ns()
            while rc == 0 and now_ns() - start < spin_ns:
                rc = poll(self.fds, self.size + 1, 0)
        if rc == 0:
            rc = poll(self.fds, self.size + 1, timeout_ms)
        if rc <= 0:
            return rc
        for i in range(self.size):
            if self.fds[i].fd >= 0 and self.fds[i].revents:
                self.lanes[i].tx_full = self.lanes[i].rx_dry = 0
        if self.fds[self.size].revents:
            part.iov_base, part.iov_len = bytes, sizeof(bytes)
            self.bell_house.wire.recv_some(&self.bell_house.wire, &part, 1)
        return rc

    cdef void accept(self) noexcept nogil:
        """Take what was posted, in the order of posting."""
        cdef Post *post = <Post *>swap_pointer(<void **>&self.stack, NULL) if self.stack != NULL else NULL
        cdef Post *first = NULL
        cdef Post *next
        cdef bint choice = False
        cdef int i
        while post != NULL:
            next, post.next = post.next, first
            choice = choice or post.any_source
            first, post = post, next
        if choice and self.size > 2:
            # All that has arrived by now is heard before one of it is chosen: else who is read last waits for ever.
            self.listen(0, 0)
            for i in range(self.size):
                if self.lanes[i].wire != NULL and self.lanes[i].rx_status == OK:
                    self.pull(&self.lanes[i])
        while first != NULL:
            next, first.next = first.next, NULL
            self.admit(first)
            first = next

    cdef void admit(self, Post *post) noexcept nogil:
        """Put a new post where it belongs; it may be over at once."""
        cdef Lane *lane
        cdef Parcel *parcel
        post.state = POST_WAITING
        post.before, post.after = NULL, self.all
        if self.all != NULL:
            self.all.before = post
        self.all = post
        if post.deadline < self.next_deadline:
            self.next_deadline = post.deadline
        if post.sending:
            lane = &self.lanes[post.peer]
            if lane.wire == NULL:
                self.keep(post)
            elif lane.tx_status != OK:
                self.finish(post, lane.tx_status, lane.error)
            elif lane.queue == NULL:
                lane.queue = lane.queue_end = post
            else:
                lane.queue_end.next = post
                lane.queue_end = post
            return
        parcel = self.unexpected(post)
        if parcel != NULL:
            self.match(parcel, post)
            return
        if post.any_source:
            if self.size > 1 and not self.anyone_left():
                self.finish(post, ST_PEER_LOST, 0)
                return
        else:
            lane = &self.lanes[post.peer]
            if lane.rx_status != OK:
                self.finish(post, lane.rx_status, lane.error)
                return
        if self.posted == NULL:
            self.posted = post
        else:
            self.posted_end.next = post
        self.posted_end = post

    cdef void finish(self, Post *post, int status, int error) noexcept nogil:
        """The post, which stands in no line any more, is over; its Request learns of it from `finished`."""
        if post.before != NULL:
            post.before.after = post.after
        else:
            self.all = post.after
        if post.after != NULL:
            post.after.before = post.before
        post.before = post.after = NULL
        post.parcel = NULL
        post.word = 0
        post.status, post.error, post.state = status, error, POST_OVER
        if status == OK:
            post.sent = post.nbytes
            if post.sending:
                self.messages_sent += 1
                self.bytes_sent += post.nbytes
            else:
                self.messages_received += 1
                self.bytes_received += post.nbytes
        post.next = self.finished
        self.finished = post

    cdef void sweep(self, int64_t now) noexcept nogil:
        """End what was cancelled or is past its deadline."""
        cdef Post *post
        store32(&self.attention, 0)
        fence()
        self.next_deadline = MOST_BYTES
        post = self.all
        while post != NULL:
            if post.cancelled or post.deadline <= now:
                self.give_up(post, ST_CANCELLED if post.cancelled else ST_TIMEOUT, 0)
                self.next_deadline = MOST_BYTES
                post = self.all                    # others may have ended with it
                continue
            if post.deadline < self.next_deadline:
                self.next_deadline = post.deadline
            post = post.after

    cdef void give_up(self, Post *post, int status, int error) noexcept nogil:
        """End a post at any point of its life. From here on its memory is not touched; the streams stay in order."""
        cdef Lane *lane
        cdef Parcel *parcel = post.parcel
        if post.sending:
            lane = &self.lanes[post.peer]
            if lane.wire == NULL:
                parcel.source = NULL
                self.bury(lane, parcel, ST_WITHDRAWN, 0)
            elif lane.offer == post:
                store64(&post.word, 0)             # before the caller can change what it offered
                fence()
                lane.offer = NULL
                lane.withdrawn[1] = post.sequence
            else:
                if lane.tx_post == post:           # what was begun goes out, from a copy
                    lane.tx_post = NULL
                    lane.tx_rest = <char *>malloc(lane.tx_bytes if lane.tx_bytes else 1)
                    if lane.tx_rest == NULL:
                        unlink_post(&lane.queue, &lane.queue_end, post)
                        self.finish(post, status, error)
                        self.stop_receiving(lane, ST_NO_MEMORY, 0)
                        return
                    memcpy(lane.tx_rest, lane.tx_data, lane.tx_bytes)
                    lane.tx_data = lane.tx_rest
                    post.sent += lane.tx_bytes
                if post.state == POST_MOVING and post.sent < post.nbytes:
                    lane.withdrawn[0 if post.sent else 1] = post.sequence
                unlink_post(&lane.queue, &lane.queue_end, post)
        elif post.state == POST_WAITING:
            unlink_post(&self.posted, &self.posted_end, post)
        else:
            if post.state == POST_HANDED:
                unlink_post(&self.hands, &self.hands_end, post)
            post.sent = parcel.got
            parcel.taker = NULL
            if parcel.source != NULL:              # it is read, only not kept
                self.finish(parcel.source, OK, 0)
                parcel.source = NULL
            self.drop(&self.lanes[parcel.peer], parcel)
        self.finish(post, status, error)

    # ---- matching -----------------------------------------------------------------------------------------------

    cdef Post *expected(self, int peer, uint32_t tag) noexcept nogil:
        """The oldest receive that takes this message, out of its line; NULL when there is none."""
        cdef Post *post = self.posted
        while post != NULL:
            if post.tag == tag and (post.any_source or post.peer == peer):
                unlink_post(&self.posted, &self.posted_end, post)
                return post
            post = post.next
        return NULL

    cdef Parcel *unexpected(self, Post *post) noexcept nogil:
        """The message that this receive takes, out of its list; NULL when there is none.

        From one peer, the oldest. From any, peers queue: each with its oldest message, from that one's arrival or from
        when it was last served, whichever came later. So nobody waits for more than one message of each other peer.
        """
        cdef Parcel *found = NULL
        cdef Parcel *parcel
        cdef uint64_t since, earliest = 0
        cdef int peer, first = 0 if post.any_source else post.peer
        for peer in range(first, self.size if post.any_source else first + 1):
            parcel = self.lanes[peer].first
            while parcel != NULL and parcel.tag != post.tag:
                parcel = parcel.next
            if parcel == NULL:
                continue
            since = parcel.arrival if parcel.arrival > self.lanes[peer].served else self.lanes[peer].served
            if found == NULL or since < earliest:
                found, earliest = parcel, since
        if found != NULL:
            self.strike(&self.lanes[found.peer], found)
        return found

    cdef void match(self, Parcel *parcel, Post *post) noexcept nogil:
        """This receive gets this message; where to, Python has to say."""
        parcel.taker, post.parcel = post, parcel
        post.peer, post.nbytes = parcel.peer, parcel.total
        if post.any_source:
            self.clock += 1
            self.lanes[parcel.peer].served = self.clock
        post.state, post.next = POST_HANDED, NULL
        if self.hands == NULL:
            self.hands = post
        else:
            self.hands_end.next = post
        self.hands_end = post

    cdef void repost(self, Post *post) noexcept nogil:
        """The message that this receive had got was none: it waits again, before those that came after it."""
        cdef Parcel *parcel
        post.state, post.parcel, post.nbytes = POST_WAITING, NULL, 0
        if post.any_source:
            post.peer = ANY_RANK
        parcel = self.unexpected(post)
        if parcel != NULL:
            self.match(parcel, post)
            return
        post.next = self.posted
        self.posted = post
        if post.next == NULL:
            self.posted_end = post

    cdef void deliver(self, Post *post) noexcept nogil:
        """post.data is the place, post.nbytes of it: put there what has come, let the rest come there."""
        cdef Parcel *parcel = post.parcel
        cdef Post *source = parcel.source
        post.state = POST_MOVING
        if source != NULL:
            memcpy(post.data, source.data, parcel.total)
            self.finish(source, OK, 0)
            parcel.complete = 1
        elif parcel.room != NULL:
            memcpy(post.data, parcel.room, parcel.got)
        self.uncharge(parcel)
        parcel.into = post.data if parcel.total else <char *>parcel
        if parcel.complete:
            self.finish(post, OK, 0)
            free(parcel)

    cdef void keep(self, Post *post) noexcept nogil:
        """A message to oneself: to its receive, or a copy of it into the own list, or it waits there to be received."""
        cdef Lane *lane = &self.lanes[self.rank]
        cdef Parcel *parcel = new_parcel(post.peer, post.tag, post.nbytes, post.note, post.note_bytes)
        cdef Post *taker
        cdef char *into
        if parcel == NULL:
            self.finish(post, ST_NO_MEMORY, 0)
            return
        self.clock += 1
        parcel.arrival = self.clock
        taker = self.expected(self.rank, post.tag)
        if taker == NULL:
            self.enlist(lane, parcel)
            into = self.place(lane, parcel)
            if into != NULL:
                if parcel.total:
                    memcpy(into, post.data, parcel.total)
                parcel.got, parcel.complete = parcel.total, 1
                self.finish(post, OK, 0)
                return
        parcel.source, post.parcel = post, parcel
        if taker != NULL:
            self.match(parcel, taker)

    cdef void enlist(self, Lane *lane, Parcel *parcel) noexcept nogil:
        if lane.first == NULL:
            lane.first = parcel
        else:
            lane.last.next = parcel
        lane.last = parcel

    cdef void strike(self, Lane *lane, Parcel *parcel) noexcept nogil:
        """Take a parcel out of the list of unexpected ones."""
        cdef Parcel *before = NULL
        cdef Parcel *at = lane.first
        while at != parcel:
            before, at = at, at.next
        if before == NULL:
            lane.first = parcel.next
        else:
            before.next = parcel.next
        if lane.last == parcel:
            lane.last = before
        parcel.next = NULL

    cdef void uncharge(self, Parcel *parcel) noexcept nogil:
        """Give the own buffer back."""
        free(parcel.room)
        parcel.room = NULL
        self.lanes[parcel.peer].unread -= parcel.charged
        parcel.charged = 0

    cdef void drop(self, Lane *lane, Parcel *parcel) noexcept nogil:
        """Nobody wants this message any more: what is still to come of it goes nowhere."""
        self.uncharge(parcel)
        parcel.into = NULL
        if parcel == lane.incoming or parcel == lane.offered:
            parcel.discard = 1
        else:
            free(parcel)

    cdef void bury(self, Lane *lane, Parcel *parcel, int status, int error) noexcept nogil:
        """Nothing more comes of this message: its receive fails, or waits for another if none of this one came."""
        cdef Post *post = parcel.taker
        if post != NULL:
            if post.state == POST_HANDED:
                unlink_post(&self.hands, &self.hands_end, post)
            if status == ST_WITHDRAWN and parcel.got == 0:
                self.repost(post)
            else:
                post.sent = parcel.got
                self.finish(post, status, error)
        elif not parcel.discard:
            self.strike(lane, parcel)
        if lane.incoming == parcel:
            lane.incoming, lane.in_chunk = NULL, 0
        if lane.offered == parcel:
            lane.offered = NULL
        self.uncharge(parcel)
        free(parcel)

    cdef bint anyone_left(self) noexcept nogil:
        """Whether there is a peer that could still send."""
        cdef int peer
        for peer in range(self.size):
            if peer != self.rank and self.lanes[peer].rx_status == OK:
                return True
        return False

    cdef size_t held_back(self, int peer) noexcept nogil:
        """Bytes of messages nobody has asked for that keep this peer's stream from being read; 0: it is read."""
        cdef Lane *lane = &self.lanes[peer]
        if lane.in_chunk and self.place(lane, lane.incoming) == NULL:
            return lane.unread + lane.incoming.total
        return 0

    # ---- sending ------------------------------------------------------------------------------------------------

    cdef bint needs_offer(self, Lane *lane, Post *post) noexcept nogil:
        return post.nbytes >= (self.near_bytes if lane.near else self.far_bytes)

    cdef bint sendable(self, Lane *lane) noexcept nogil:
        """Whether there is something to send now."""
        if lane.tx_busy or lane.withdrawn[0] or lane.withdrawn[1] or lane.answer:
            return True
        return lane.queue != NULL and (lane.offer == NULL or lane.queue.state == POST_MOVING
                                       or not self.needs_offer(lane, lane.queue))

    cdef bint push(self, Lane *lane) noexcept nogil:
        """Send what the kernel takes of one letter; whether any bytes moved."""
        cdef iovec parts[2]
        cdef int num = 0
        cdef size_t wanted, skip
        cdef Py_ssize_t n
        if not lane.tx_busy and not self.next_letter(lane):
            return False
        skip = lane.tx_sent
        if skip < lane.tx_head_bytes:
            parts[0].iov_base, parts[0].iov_len = <char *>lane.tx_head + skip, lane.tx_head_bytes - skip
            num, skip = 1, 0
        else:
            skip -= lane.tx_head_bytes
        if skip < lane.tx_bytes:
            parts[num].iov_base, parts[num].iov_len = lane.tx_data + skip, lane.tx_bytes - skip
            num += 1
        wanted = lane.tx_head_bytes + lane.tx_bytes - lane.tx_sent
        n = lane.wire.send_some(lane.wire, parts, num)
        if n < 0:
            self.stop_sending(lane, <int>n, lane.wire.error)
            return True
        lane.tx_full = <size_t>n < wanted
        lane.tx_sent += n
        if <size_t>n == wanted:
            self.letter_out(lane)
        return n > 0

    cdef bint next_letter(self, Lane *lane) noexcept nogil:
        """Write the next letter; False when there is none to write. Once written it must go out as it is."""
        cdef Post *post = lane.queue
        cdef Letter *letter
        cdef Offer offer
        cdef int kind, i
        for i in range(2):
            if lane.withdrawn[i]:
                self.write_letter(lane, LETTER_WITHDRAWN, lane.withdrawn[i])
                lane.withdrawn[i] = 0
                seal(lane)
                return True
        if lane.answer:
            self.write_letter(lane, lane.answer_kind, lane.answer)
            lane.answer = 0
            seal(lane)
            return True
        if not self.sendable(lane):
            return False
        if post.state == POST_MOVING:
            kind = LETTER_MORE
        else:
            kind = LETTER_OFFER if self.needs_offer(lane, post) else LETTER_FIRST
            lane.tx_sequence += 1
            post.sequence = lane.tx_sequence
        letter = self.write_letter(lane, kind, post.sequence)
        letter.tag, letter.total, letter.start = post.tag, post.nbytes, post.sent
        if kind != LETTER_MORE:
            letter.note_bytes = post.note_bytes
            memcpy(<char *>lane.tx_head + LETTER_BYTES, post.note, post.note_bytes)
            lane.tx_head_bytes += post.note_bytes
        if kind == LETTER_OFFER:
            memset(&offer, 0, sizeof(offer))
            if lane.near:
                post.word = self.secret + post.sequence
                offer.address, offer.word_at, offer.word = <uintptr_t>post.data, <uintptr_t>&post.word, post.word
            memcpy(<char *>lane.tx_head + lane.tx_head_bytes, &offer, OFFER_BYTES)
            lane.tx_head_bytes += OFFER_BYTES
            unlink_post(&lane.queue, &lane.queue_end, post)
            post.state, lane.offer = POST_OFFERED, post
        else:
            lane.tx_post, post.state = post, POST_MOVING
            lane.tx_data, lane.tx_bytes = post.data + post.sent, smaller(CHUNK_BYTES, post.nbytes - post.sent)
            letter.length = <uint32_t>lane.tx_bytes
        seal(lane)
        return True

    cdef Letter *write_letter(self, Lane *lane, int kind, uint64_t sequence) noexcept nogil:
        cdef Letter *letter = <Letter *>lane.tx_head
        memset(letter, 0, sizeof(Letter))
        letter.magic, letter.epoch, letter.group = MAGIC, self.epoch, self.group
        letter.kind, letter.sequence = kind, sequence
        lane.tx_busy, lane.tx_sent, lane.tx_bytes, lane.tx_head_bytes = 1, 0, 0, LETTER_BYTES
        return letter

    cdef void letter_out(self, Lane *lane) noexcept nogil:
        """The kernel has the whole letter."""
        cdef Post *post = lane.tx_post
        lane.tx_busy = 0
        free(lane.tx_rest)
        lane.tx_rest, lane.tx_post = NULL, NULL
        if post != NULL:
            post.sent += lane.tx_bytes
            if post.sent == post.nbytes:
                unlink_post(&lane.queue, &lane.queue_end, post)
                self.finish(post, OK, 0)

    cdef void stop_sending(self, Lane *lane, int status, int error) noexcept nogil:
        """Nothing can be sent to this peer any more. What it has sent is still read."""
        if lane.tx_status != OK:
            return
        lane.tx_status, lane.error = ST_LEFT if status == ST_PEER_LOST and lane.left else status, error
        free(lane.tx_rest)
        lane.tx_rest, lane.tx_post, lane.tx_busy = NULL, NULL, 0
        if lane.offer != NULL:
            self.give_up(lane.offer, lane.tx_status, error)
        while lane.queue != NULL:
            self.give_up(lane.queue, lane.tx_status, error)

    cdef void say_goodbye(self) noexcept nogil:
        """Tell every peer to whom no letter is half-way that no more will come."""
        cdef int peer
        cdef Lane *lane
        for peer in range(self.size):
            lane = &self.lanes[peer]
            if lane.wire != NULL and lane.tx_status == OK and not lane.tx_busy:
                lane.withdrawn[0] = lane.withdrawn[1] = lane.answer = 0
                self.write_letter(lane, LETTER_BYE, 0)
                seal(lane)
                self.push(lane)

    # ---- receiving ----------------------------------------------------------------------------------------------

    cdef bint pull(self, Lane *lane) noexcept nogil:
        """Take what has arrived, with at most one system call; whether anything moved.

        One call asks for the rest of the chunk where it belongs and for what follows it: the next letter, or after the
        last chunk of a message as many short messages as fit.
        """
        cdef bint moved = False, asked = False
        cdef size_t have, need, size, wanted
        cdef Parcel *parcel
        cdef char *into
        cdef iovec parts[2]
        cdef Py_ssize_t n
        cdef int rc, num
        while lane.rx_status == OK:
            have = lane.ahead_end - lane.ahead_at
            if lane.in_chunk:
                parcel = lane.incoming
                into = self.place(lane, parcel)
                if into == NULL:
                    return moved
                if lane.chunk_left == 0:
                    lane.in_chunk = 0
                    moved = True
                    if lane.crc != lane.rx.payload_crc:
                        self.stop_receiving(lane, ST_CORRUPT, 0)
                    elif parcel.got == parcel.total:
                        lane.incoming = NULL
                        self.complete(lane, parcel)
                    continue
                size = smaller(lane.chunk_left, SCRATCH_BYTES) if parcel.discard else lane.chunk_left
                if have:
                    n = smaller(have, size)
                    memcpy(into, lane.ahead + lane.ahead_at, n)
                    lane.ahead_at += n
                else:
                    if asked or lane.rx_dry:
                        return moved
                    asked = True
                    parts[0].iov_base, parts[0].iov_len = into, size
                    parts[1].iov_base, parts[1].iov_len = lane.ahead, LETTER_BYTES
                    if parcel.got + size == parcel.total:
                        parts[1].iov_len = AHEAD_BYTES
                    num = 2 if size == lane.chunk_left else 1
                    wanted = size + parts[1].iov_len if num == 2 else size
                    n = lane.wire.recv_some(lane.wire, parts, num)
                    if n < 0:
                        self.stop_receiving(lane, <int>n, lane.wire.error)
                        return True
                    lane.rx_dry = <size_t>n < wanted
                    if n == 0:
                        return moved
                    lane.ahead_at = lane.ahead_end = 0
                    if <size_t>n > size:
                        lane.ahead_end = n - size
                        n = size
                lane.crc = crc32c(lane.crc, into, n)
                lane.chunk_left -= n
                parcel.got += n
                moved = True
                continue
            need = LETTER_BYTES
            if have >= LETTER_BYTES:
                if not lane.rx_checked:
                    memcpy(&lane.rx, lane.ahead + lane.ahead_at, LETTER_BYTES)
                    if self.check_letter(lane) != OK:
                        self.stop_receiving(lane, ST_CORRUPT, 0)
                        return True
                    lane.rx_checked = 1
                need += lane.rx.note_bytes + (<size_t>OFFER_BYTES if lane.rx.kind == LETTER_OFFER else 0)
            if have >= need:
                into = lane.ahead + lane.ahead_at + LETTER_BYTES
                lane.ahead_at += need
                lane.rx_checked = 0
                rc = self.open(lane, into)
                if rc != OK:
                    self.stop_receiving(lane, rc, 0)
                moved = True
                continue
            if asked or lane.rx_dry:
                return moved
            asked = True
            # What there is of a letter moves to the front; where it would overlap itself, it is near enough.
            if lane.ahead_at >= have:
                memcpy(lane.ahead, lane.ahead + lane.ahead_at, have)
                lane.ahead_at, lane.ahead_end = 0, have
            wanted = AHEAD_BYTES - lane.ahead_end
            parts[0].iov_base, parts[0].iov_len = lane.ahead + lane.ahead_end, wanted
            n = lane.wire.recv_some(lane.wire, parts, 1)
            if n < 0:
                self.stop_receiving(lane, <int>n, lane.wire.error)
                return True
            lane.rx_dry = <size_t>n < wanted
            if n == 0:
                return moved
            lane.ahead_end += n
        return True

    cdef int check_letter(self, Lane *lane) noexcept nogil:
        """Whether the letter is whole and makes sense by itself."""
        cdef Letter *letter = &lane.rx
        cdef uint32_t crc = letter.header_crc
        cdef bint opens = letter.kind == LETTER_FIRST or letter.kind == LETTER_OFFER
        letter.header_crc = 0
        if letter.magic != MAGIC or crc32c(0, letter, LETTER_BYTES) != crc:
            return ST_CORRUPT
        if (letter.epoch != self.epoch or letter.group != self.group or letter.kind < LETTER_FIRST
                or letter.kind > LETTER_BYE or letter.tag >> 31 or letter.total > MOST_BYTES
                or letter.start > letter.total or letter.length > letter.total - letter.start
                or letter.note_bytes > (NOTE_BYTES if opens else 0)
                or (letter.start and opens) or (letter.length and not opens and letter.kind != LETTER_MORE)):
            return ST_CORRUPT
        return OK

    cdef int open(self, Lane *lane, const char *note) noexcept nogil:
        """Act on a letter that has come with its note: OK, or a Status that ends the connection."""
        cdef Letter *letter = &lane.rx
        cdef Post *post
        cdef Parcel *parcel
        if letter.kind == LETTER_FIRST or letter.kind == LETTER_OFFER:
            return self.open_message(lane, note)
        if letter.kind == LETTER_MORE:
            if lane.incoming == NULL and lane.offered != NULL and lane.offered.asked:
                lane.incoming, lane.offered = lane.offered, NULL
            parcel = lane.incoming
            if parcel == NULL or parcel.sequence != letter.sequence or parcel.total != letter.total \
                    or parcel.got != letter.start or letter.length == 0:
                return ST_CORRUPT
            lane.in_chunk, lane.chunk_left, lane.crc = 1, letter.length, 0
        elif letter.kind == LETTER_WITHDRAWN:
            parcel = lane.incoming
            if parcel == NULL or parcel.sequence != letter.sequence:
                parcel = lane.offered
            if parcel != NULL and parcel.sequence == letter.sequence:
                self.bury(lane, parcel, ST_WITHDRAWN, 0)
        elif letter.kind == LETTER_BYE:
            lane.left = 1
        elif lane.offer != NULL and lane.offer.sequence == letter.sequence:    # else it was withdrawn meanwhile
            post, lane.offer = lane.offer, NULL
            if letter.kind == LETTER_TAKEN:
                self.finish(post, OK, 0)
                return OK
            lane.near = 0                          # who can read never asks
            post.state, post.word = POST_MOVING, 0
            if lane.queue != NULL and lane.queue.state == POST_MOVING:     # not between the chunks of another one
                post.next = lane.queue.next
                lane.queue.next = post
                if post.next == NULL:
                    lane.queue_end = post
            else:
                post.next = lane.queue
                lane.queue = post
                if post.next == NULL:
                    lane.queue_end = post
        return OK

    cdef int open_message(self, Lane *lane, const char *note) noexcept nogil:
        cdef Letter *letter = &lane.rx
        cdef Parcel *parcel
        cdef Post *post
        cdef bint offered = letter.kind == LETTER_OFFER
        cdef uint32_t crc = crc32c(0, note, letter.note_bytes + (<size_t>OFFER_BYTES if offered else 0))
        if letter.sequence != lane.rx_sequence + 1 or lane.incoming != NULL:
            return ST_CORRUPT
        if offered and (lane.offered != NULL or crc != letter.payload_crc or letter.total == 0):
            return ST_CORRUPT
        parcel = new_parcel(lane.wire.rank, letter.tag, letter.total, note, letter.note_bytes)
        if parcel == NULL:
            return ST_NO_MEMORY
        lane.rx_sequence += 1
        self.clock += 1
        parcel.sequence, parcel.arrival = letter.sequence, self.clock
        if offered:
            memcpy(&parcel.offer, note + letter.note_bytes, OFFER_BYTES)
            lane.offered = parcel
        else:
            lane.incoming, lane.in_chunk, lane.chunk_left, lane.crc = parcel, 1, letter.length, crc
        post = self.expected(parcel.peer, parcel.tag)
        if post != NULL:
            self.match(parcel, post)
        else:
            self.enlist(lane, parcel)
        return OK

    cdef char *place(self, Lane *lane, Parcel *parcel) noexcept nogil:
        """Where the next byte of this message goes; NULL as long as it has to wait for a receive."""
        cdef size_t cost
        if parcel.discard:
            return self.scratch
        if parcel.into != NULL:
            return parcel.into + parcel.got
        if parcel.taker != NULL:
            return NULL
        if not parcel.charged:
            cost = sizeof(Parcel) + parcel.note_bytes
            if lane.unread + cost > self.unread_bytes or parcel.total > self.unread_bytes - lane.unread - cost:
                return NULL
            if parcel.total:
                parcel.room = <char *>malloc(parcel.total)
                if parcel.room == NULL:
                    return NULL
            parcel.charged = cost + parcel.total
            lane.unread += parcel.charged
        return parcel.room + parcel.got if parcel.total else <char *>parcel

    cdef bint fetch(self, Lane *lane) noexcept nogil:
        """Get on with the message that the peer offers: read a piece of it, or ask for it; whether anything moved."""
        cdef Parcel *parcel = lane.offered
        cdef char *into
        cdef Py_ssize_t n
        cdef uint64_t word = 0
        if parcel.stale or parcel.asked:
            return False
        into = self.place(lane, parcel)
        if into == NULL:
            return False
        if parcel.discard:
            self.answer(lane, parcel, LETTER_TAKEN)
            free(parcel)
            return True
        if lane.pid >= 0 and parcel.offer.address:
            n = read_process(lane.pid, into, parcel.offer.address + parcel.got,
                             smaller(PIECE_BYTES, parcel.total - parcel.got))
            if n > 0:
                self.read_bytes += n
                parcel.got += n
                if parcel.got < parcel.total:
                    return True
            elif last_errno() == EPERM or last_errno() == ENOSYS:
                lane.pid = -1
            if lane.pid >= 0:
                # The sender clears the word before it lets its caller have the memory back: bytes that were read while
                # it stood are the message.
                fence()
                if (read_process(lane.pid, &word, parcel.offer.word_at, sizeof(word)) != sizeof(word)
                        or word != parcel.offer.word):
                    parcel.stale = 1
                    return True
                if n > 0:
                    self.answer(lane, parcel, LETTER_TAKEN)
                    self.complete(lane, parcel)
                    return True
        parcel.got = 0                             # memory that cannot be read this way: let it come over the stream
        parcel.asked = 1
        lane.answer, lane.answer_kind = parcel.sequence, LETTER_SEND
        return True

    cdef void answer(self, Lane *lane, Parcel *parcel, int kind) noexcept nogil:
        """Answer the standing offer for good. One answer waits at most: the next offer comes after it was heard."""
        lane.offered = NULL
        lane.answer, lane.answer_kind = parcel.sequence, kind

    cdef void complete(self, Lane *lane, Parcel *parcel) noexcept nogil:
        """All of a message is where it goes."""
        parcel.complete = 1
        if parcel.taker != NULL:
            self.finish(parcel.taker, OK, 0)
            free(parcel)
        elif parcel.discard:
            free(parcel)

    cdef void stop_receiving(self, Lane *lane, int status, int error) noexcept nogil:
        """Nothing comes from this peer any more: end what needs it. Whole messages that have come stay."""
        cdef Post *post
        cdef Post *next
        if lane.rx_status != OK:
            return
        lane.error = error
        lane.rx_status = ST_LEFT if status == ST_PEER_LOST and lane.left and lane.incoming == NULL else status
        lane.in_chunk = 0
        if status != ST_PEER_LOST:                 # the peer has to learn of it
            shutdown(lane.wire.fd, SHUT_RDWR)
        if lane.incoming != NULL:
            self.bury(lane, lane.incoming, lane.rx_status, error)
        if lane.offered != NULL:
            self.bury(lane, lane.offered, lane.rx_status, error)
        post = self.posted
        while post != NULL:
            next = post.next
            if not post.any_source and post.peer == lane.wire.rank:
                self.give_up(post, lane.rx_status, error)
            elif post.any_source and not self.anyone_left():
                self.give_up(post, ST_PEER_LOST, 0)
            post = next
        self.stop_sending(lane, lane.rx_status, error)


cdef void seal(Lane *lane) noexcept nogil:
    """Checksums, last of all: payload (note and offer, then the chunk), then the letter itself."""
    cdef Letter *letter = <Letter *>lane.tx_head
    cdef uint32_t crc = crc32c(0, <char *>lane.tx_head + LETTER_BYTES, lane.tx_head_bytes - LETTER_BYTES)
    letter.payload_crc = crc32c(crc, lane.tx_data, lane.tx_bytes) if lane.tx_bytes else crc
    letter.header_crc = crc32c(0, letter, LETTER_BYTES)


cdef Parcel *new_parcel(int peer, uint32_t tag, size_t total, const char *note, size_t note_bytes) noexcept nogil:
    cdef Parcel *parcel = <Parcel *>malloc(sizeof(Parcel) + note_bytes)
    if parcel != NULL:
        memset(parcel, 0, sizeof(Parcel))
        parcel.peer, parcel.tag, parcel.total, parcel.note_bytes = peer, tag, total, <uint16_t>note_bytes
        memcpy(parcel + 1, note, note_bytes)
    return parcel


cdef void unlink_post(Post **first, Post **last, Post *post) noexcept nogil:
    """Take a post out of the line that it stands in."""
    cdef Post *before = NULL
    cdef Post *at = first[0]
    while at != post:
        before, at = at, at.next
    if before == NULL:
        first[0] = post.next
    else:
        before.next = post.next
    if last[0] == post:
        last[0] = before
    post.next = NULL
