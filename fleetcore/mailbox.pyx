"""C3: messages between pairs of ranks, as requests that threads wait for.

Nothing moves by itself: a thread that waits drives all requests of the mailbox, its own and others', with the GIL
released. One drives at a time, the others sleep until they are done or have to take over. A thread inside `serve`
drives while nobody waits.
"""
import os
from _thread import get_ident

from cpython.exc cimport PyErr_Occurred
from cpython.ref cimport PyObject
from libc.stdint cimport int64_t, uint32_t
from fleetcore.arena cimport Pin
from fleetcore.check cimport interrupted
from fleetcore.posix cimport add32, allow_reads, cas32, futex_wait, futex_wake, getpid, load32, memcpy, now_ns, store32
from fleetcore.postroom cimport (
    ANY_RANK, NOTE_BYTES, POST_NEW, ST_CANCELLED, ST_DECLINED, ST_WITHDRAWN, Parcel, Post, Postroom,
)
from fleetcore.status cimport (
    OK, ST_CORRUPT, ST_INTERRUPTED, ST_LEFT, ST_NO_MEMORY, ST_PEER_LOST, ST_TIMEOUT,
)

from fleetcore.check import Context
from fleetcore.errors import CommunicationError, ConfigError, CorruptData, FleetError, PeerLost, ShapeError, Timeout

cdef int64_t FOR_EVER = 1 << 62
cdef int64_t NAP_NS = 50_000_000           # longest sleep between two looks at signals
cdef int64_t REST_NS = 5_000_000           # of a server while others drive: it is back this soon after the last of them
MOST_TAG = 2**31 - 1


cdef class Request:
    """A message under way; made by Mailbox.isend and Mailbox.irecv.

    It goes on when nobody holds it any more, for as long as something drives the mailbox.
    """

    def __init__(self):
        raise TypeError("use Mailbox.isend or Mailbox.irecv")

    def wait(self, timeout=None):
        """Block until it is over, driving the mailbox; an isend gives None, an irecv (array, source rank).

        Args:    timeout: seconds to wait here; None waits for the request's own deadline.
        Raises:  PeerLost, Timeout, CorruptData, CommunicationError when the sender gave up half-way, whatever `make`
                 raised, FleetError when the mailbox was closed. Timeout, too, when it is still under way after
                 `timeout`: then it goes on.
        """
        cdef int64_t until = FOR_EVER if timeout is None else now_ns() + nanoseconds(timeout)
        if not self.over:
            self.box.demand_usable()
            if not self.box.wait_for(self, until):
                raise Timeout(f"{self.operation} is still under way after {timeout:g} s", operation=self.operation,
                              rank=self.peer, epoch=self.box.context.epoch)
        if self.error is not None:
            raise self.error
        return self.result

    def done(self):
        """Whether `wait` would return (or raise) at once; moves what can be moved without waiting."""
        if not self.over:
            self.box.progress(0)
        return self.over

    def cancel(self):
        """Give it up; True when that ended it, False when it was over before.

        Its memory is not touched any more. A receive that had begun loses its message; the peer of a half-sent message
        gets CommunicationError. Later messages are not affected.
        """
        if self.over:
            return False
        self.box.demand_usable()
        self.box.withdraw(self)
        return self.post.status == ST_CANCELLED

    @property
    def peer(self):
        """The rank it is about: the destination, the source; None for any source that is not known yet."""
        return None if self.post.peer == ANY_RANK else self.post.peer

    @property
    def operation(self):
        """As a user would write it: send(4096 bytes, dst=1, tag=0), recv(src=None, tag=7)."""
        if self.post.sending:
            return f"send({self.post.nbytes} bytes, dst={self.source_or_dest}, tag={self.post.tag})"
        source = None if self.source_or_dest == ANY_RANK else self.source_or_dest
        return f"recv(src={source}, tag={self.post.tag})"


cdef object nanoseconds(timeout):
    seconds = float(timeout)
    if not seconds >= 0:
        raise ConfigError(f"a timeout cannot be {timeout}")
    return <int64_t>(seconds * 1e9) if seconds < 1e9 else 1 << 61


cdef class Mailbox(Postroom):
    """Messages between this rank and any other, itself included.

    Messages of one pair and tag arrive in the order in which they were sent. A send is over once the kernel or the peer
    has all of it. While a thread drives, messages that nobody has asked for are taken in up to `unread_bytes` for each
    peer; beyond that the peer's sends stop until something is received. So two ranks may send each other a few large
    messages before either receives; programs that need more than that must post receives first.

    Args:    rank: own place.  links: one Link for each rank, used for nothing else, None at the own place; the mailbox
             closes them.
             epoch, group: stamped on every message.  timeout: default deadline of a request, seconds.
             places: {rank: "host"} for messages to the user.
             pids: per rank the process id of a peer on this host, or None. Large messages are then read out of the
             sender's memory; where the system forbids that, they go through the link.
             unread_bytes, near_bytes, far_bytes, spin_ns: see Postroom.
    Raises:  ConfigError.
    """

    def __init__(self, int rank, list links, *, epoch=0, group=0, double timeout=300.0, dict places=None,
                 list pids=None, **sizes):
        if not timeout > 0:
            raise ConfigError(f"timeout must be positive, not {timeout}")
        self.timeout, self.pid = timeout, getpid()
        self.context = Context(rank, self.size, epoch, places)
        self.live, self.sleepers = set(), []
        if pids is not None:
            allow_reads()

    # ---- verbs --------------------------------------------------------------------------------------------------

    def isend(self, x, int dst, tag=0, bytes note=b"", timeout=None):
        """Start to send x to rank dst; a Request whose wait() returns None.

        Args:    x: a Pin or anything that Pin takes; it must stay as it is until the request is over.
                 tag: 0 to 2**31 - 1.  note: up to 256 bytes that tell the receiver what x is.
                 timeout: seconds until it fails with Timeout.
        Raises:  ConfigError, ShapeError, DTypeError before anything is sent; FleetError after close or fork.
        """
        cdef Request request = self.post_send(x, dst, tag, note, timeout)
        self.nudge(request)
        return request

    def irecv(self, make, src=None, tag=0, timeout=None):
        """Start to receive from rank src, or from any (None); a Request whose wait() returns (array, source rank).

        Among several peers that have sent, each one's messages come in order and no peer is served twice before
        another one that was there first.

        Args:    make: called with the sender's note (bytes) once it is known, in whichever thread drives; it returns
                 the array to fill: a Pin or anything that Pin takes, of exactly the message's size. It must not wait
                 for messages. What it raises ends this request, and the message is lost. It is called again for another
                 message when the sender gives up before any of this one came.
                 tag, timeout: as in isend.
        Raises:  ConfigError; FleetError after close or fork.
        """
        cdef Request request = self.post_receive(make, src, tag, timeout)
        self.nudge(request)
        return request

    def send(self, x, int dst, tag=0, bytes note=b"", timeout=None):
        """isend(...).wait(), given up when the wait is interrupted."""
        cdef Request request = self.post_send(x, dst, tag, note, timeout)
        try:
            return request.wait()
        except BaseException:
            self.withdraw(request)
            raise

    def recv(self, make, src=None, tag=0, timeout=None):
        """irecv(...).wait(), given up when the wait is interrupted."""
        cdef Request request = self.post_receive(make, src, tag, timeout)
        try:
            return request.wait()
        except BaseException:
            self.withdraw(request)
            raise

    cdef Request post_send(self, x, int dst, tag, bytes note, timeout):
        cdef Request request
        cdef Pin pin
        self.demand_usable()
        if not 0 <= dst < self.size:
            raise ConfigError(f"dst is {dst}, but the ranks are 0 to {self.size - 1}")
        if len(note) > NOTE_BYTES:
            raise ConfigError(f"a note has at most {NOTE_BYTES} bytes, not {len(note)}")
        pin = x if type(x) is Pin else Pin(x, False)
        request = Request.__new__(Request)
        request.pin = pin
        request.source_or_dest = dst
        request.post.sending, request.post.peer = 1, dst
        request.post.data, request.post.nbytes = pin.ptr, pin.nbytes
        request.post.note_bytes = len(note)
        memcpy(request.post.note, <const char *>note, len(note))
        self.start(request, tag, timeout)
        return request

    cdef Request post_receive(self, make, src, tag, timeout):
        cdef Request request
        self.demand_usable()
        if src is not None and not 0 <= src < self.size:
            raise ConfigError(f"src is {src}, but the ranks are 0 to {self.size - 1}")
        if not callable(make):
            raise ConfigError(f"make has to be a function of the note, not a {type(make).__name__}")
        request = Request.__new__(Request)
        request.make = make
        request.source_or_dest = request.post.peer = ANY_RANK if src is None else src
        request.post.any_source = src is None
        self.start(request, tag, timeout)
        return request

    cdef int start(self, Request request, tag, timeout) except -1:
        """Check what both directions have in common, and post it."""
        if not 0 <= tag <= MOST_TAG:
            raise ConfigError(f"a tag is a number from 0 to {MOST_TAG}, not {tag}")
        if timeout is not None and not timeout > 0:
            raise ConfigError(f"timeout must be positive, not {timeout}")
        request.post.tag = tag
        request.post.deadline = now_ns() + nanoseconds(self.timeout if timeout is None else timeout)
        request.post.owner = <PyObject *>request
        request.post.state = POST_NEW
        request.box = self
        self.live.add(request)
        self.push_post(&request.post)
        return 0

    cdef int nudge(self, Request request) except -1:
        """Move what can be moved at once; leave the rest to whoever drives."""
        if self.take_wheel():
            try:
                with nogil:
                    self.accept()
                    self.step()
                self.attend()
            finally:
                self.leave_wheel()
            if not request.over and self.servers:
                wake(&self.rest)
        else:
            self.knock()
        return 0

    # ---- driving ------------------------------------------------------------------------------------------------

    def progress(self, timeout=0.0):
        """Move what can be moved, waiting up to `timeout` seconds for something to be over.

        Where another thread drives, only wait. Returns whether requests are still under way.
        """
        cdef int64_t until = now_ns() + nanoseconds(timeout)
        cdef uint32_t seen = load32(&self.bell)
        self.demand_usable()
        if self.take_wheel():
            try:
                self.drive_once(until, False)
            finally:
                self.leave_wheel()
        elif until > now_ns():
            self.dozing += 1
            try:
                self.doze(&self.bell, seen, until - now_ns())
            finally:
                self.dozing -= 1
        return bool(self.live)

    def serve(self):
        """Drive until the mailbox is closed, giving way to threads that wait. For a thread of its own."""
        cdef uint32_t seen
        self.demand_usable()
        self.servers += 1
        try:
            while not self.closed:
                seen = load32(&self.rest)
                if self.wanted == 0 and not self.closing and self.take_wheel():
                    try:
                        self.serving = True
                        while self.wanted == 0 and not self.closing:
                            self.drive_once(FOR_EVER, True)
                    finally:
                        self.serving = False
                        self.leave_wheel()
                else:
                    self.doze(&self.rest, seen, REST_NS)
        finally:
            self.servers -= 1

    cdef bint take_wheel(self):
        if self.closed or not cas32(&self.driving, 0, 1):
            return False
        self.driver = get_ident()
        return True

    cdef int leave_wheel(self) except -1:
        try:
            if self.closing:
                self.shut()
        finally:
            self.driver = None
            store32(&self.driving, 0)
            self.hand_on()
            if self.dozing:
                wake(&self.bell)
        return 0

    cdef int hand_on(self) except -1:
        """Nobody drives: wake one of those who wait, to do it."""
        cdef Request request
        if self.sleepers:
            request = self.sleepers[0]
            wake(&request.bell)
        return 0

    cdef int doze(self, uint32_t *word, uint32_t seen, int64_t most_ns) except -1:
        """Sleep while *word is `seen`, but not for long."""
        with nogil:
            futex_wait(word, seen, NAP_NS if most_ns > NAP_NS else most_ns)
        if interrupted():
            raise_pending()
        return 0

    cdef int drive_once(self, int64_t until, bint yielding) except -1:
        """Drive until something is over, and look after it."""
        cdef int rc
        with nogil:
            rc = self.drive(until, yielding)
        if rc == ST_INTERRUPTED:
            raise_pending()
        self.attend()
        return 0

    cdef int attend(self) except -1:
        """What the driver needs Python for: places for messages, and the end of requests."""
        cdef Post *post
        while self.hands != NULL or self.finished != NULL:
            while self.finished != NULL:
                post, self.finished = self.finished, self.finished.next
                self.settle(<Request><PyObject *>post.owner)
            if self.hands != NULL:
                self.hand_over(<Request><PyObject *>self.hands.owner)
        return 0

    cdef int hand_over(self, Request request) except -1:
        """Ask the first receive in line where its message goes, and let it go there."""
        cdef Post *post = &request.post
        cdef Parcel *parcel = post.parcel
        cdef Pin pin
        try:
            array = request.make((<char *>(parcel + 1))[:parcel.note_bytes])
            pin = array if type(array) is Pin else Pin(array)
            if pin.nbytes != parcel.total:
                raise ShapeError(f"rank {post.peer} sent {parcel.total} bytes, but the place for them has {pin.nbytes}")
        except Exception as error:
            request.error = error
            self.give_up(post, ST_DECLINED, 0)
            return 0
        except BaseException:                      # a Ctrl-C is this thread's, whose request it may not be
            self.give_up(post, ST_CANCELLED, 0)
            raise
        request.pin, request.result = pin, (array, post.peer)
        post.data = pin.ptr
        self.hands = post.next
        post.next = NULL
        with nogil:
            self.deliver(post)
        return 0

    cdef int settle(self, Request request):
        """The request is over: let go of its memory, and of it, and wake who waits for it."""
        if request.post.status != OK:
            request.result = None
            if request.error is None:
                request.error = explain(request)
        request.pin = request.make = None
        request.over = True
        self.live.discard(request)
        if self.sleepers:
            wake(&request.bell)
        return 0

    cdef bint wait_for(self, Request request, int64_t until) except -1:
        """Drive, or let another thread drive, until the request is over; False when `until` has passed before."""
        cdef uint32_t seen
        cdef int64_t now
        self.wanted += 1
        try:
            while not request.over:
                if self.closed:
                    raise FleetError("this mailbox was closed")
                seen = load32(&request.bell)
                if self.take_wheel():
                    try:
                        while not request.over and not self.closing:
                            self.drive_once(until, False)
                            if not request.over and now_ns() >= until:
                                return False
                    finally:
                        self.leave_wheel()
                    continue
                if self.driver == get_ident():
                    raise FleetError("this thread is moving messages already: neither `make` nor a signal handler may "
                                     "wait for others")
                if self.serving:
                    self.knock()
                now = now_ns()
                if now >= until:
                    return False
                self.sleepers.append(request)
                try:
                    self.doze(&request.bell, seen, until - now)
                finally:
                    self.sleepers.remove(request)
            return True
        finally:
            self.wanted -= 1
            if not self.driving:
                self.hand_on()

    cdef int withdraw(self, Request request) except -1:
        """End a request that is not over, and wait until it has ended."""
        if request.over or self.closed or self.pid != getpid():
            return 0
        request.post.cancelled = 1
        store32(&self.attention, 1)
        self.knock()
        if self.driver != get_ident():             # else it ends as soon as this thread drives on
            self.wait_for(request, FOR_EVER)
        return 0

    # ---- the rest -----------------------------------------------------------------------------------------------

    cdef int demand_usable(self) except -1:
        if self.pid != getpid():
            raise FleetError("this mailbox belongs to the parent process: call pyfleet.init() in the child instead")
        if self.closed or self.closing:
            raise FleetError("this mailbox was closed")
        return 0

    def stats(self):
        """Since the start: {"sends", "receives", "sent_bytes", "received_bytes": of whole messages, "read_bytes": taken
        out of other processes' memory, "unread_bytes": {rank: held now for want of a receive}, "links": {rank: as
        counted at the socket}}."""
        cdef int peer
        return {
            "sends": self.messages_sent, "receives": self.messages_received,
            "sent_bytes": self.bytes_sent, "received_bytes": self.bytes_received, "read_bytes": self.read_bytes,
            "unread_bytes": {peer: self.lanes[peer].unread for peer in range(self.size) if self.lanes[peer].unread},
            "links": {peer: link.stats() for peer, link in enumerate(self.links) if link is not None},
        }

    def close(self):
        """End every request with FleetError, say good-bye and close the links. Idempotent; in a forked child, nothing.

        What the kernel has taken still arrives, unless the peer keeps sending into the closed connection (TCP resets).
        """
        if self.closed or self.pid != getpid():
            return
        self.closing = 1
        while not self.closed:
            seen = load32(&self.bell)
            if self.take_wheel():
                self.leave_wheel()
            elif self.closed or self.driver == get_ident():
                return                             # the driver shuts when it leaves
            else:
                self.knock()
                self.dozing += 1
                try:
                    self.doze(&self.bell, seen, NAP_NS)
                finally:
                    self.dozing -= 1

    cdef int shut(self) except -1:
        """For the driver: end everything."""
        cdef Post *post
        if self.closed:
            return 0
        with nogil:
            self.accept()
            while self.all != NULL:
                self.give_up(self.all, ST_CANCELLED, 0)
            self.say_goodbye()
        self.closed = True
        while self.finished != NULL:
            post, self.finished = self.finished, self.finished.next
            request = <Request><PyObject *>post.owner
            if post.status == ST_CANCELLED:
                (<Request>request).error = FleetError(f"this mailbox was closed during {request.operation}")
            self.settle(request)
        for link in self.links:
            if link is not None:
                link.close()
        self.bell_rope.close()
        self.bell_house.close()
        wake(&self.rest)
        return 0


cdef inline void wake(uint32_t *word) noexcept nogil:
    add32(word, 1)
    futex_wake(word)


cdef int raise_pending() except -1:
    """Let the exception through that a signal handler has set."""
    if PyErr_Occurred() == NULL:
        raise KeyboardInterrupt
    return -1


cdef object explain(Request request):
    """The exception for a request that failed."""
    cdef Mailbox box = request.box
    cdef int status = request.post.status
    cdef size_t held
    context, operation = box.context, request.operation
    who = "any rank" if request.post.peer == ANY_RANK else context.name(request.post.peer)
    where = f"{operation} of epoch {context.epoch}"
    if request.post.sent:
        where += f", after {request.post.sent} of {request.post.nbytes} bytes"
    if status == ST_NO_MEMORY:
        return MemoryError(f"no memory for {where}")
    if status == ST_TIMEOUT:
        kind, text = Timeout, f"timed out waiting for {who} during {where}"
        held = 0 if request.post.sending or request.post.peer == ANY_RANK else box.held_back(request.post.peer)
        if held:
            text += f"; {held} bytes of its messages, which nobody has asked for, stand before what it waits for"
    elif status == ST_LEFT:
        kind, text = PeerLost, f"{who} has left (shut down); needed for {where}"
    elif status == ST_PEER_LOST and request.post.peer == ANY_RANK:
        kind, text = PeerLost, f"lost every rank that could have sent, during {where}"
    elif status == ST_PEER_LOST:
        cause = f": {os.strerror(request.post.error)}" if request.post.error else ""
        kind, text = PeerLost, f"lost {who}{cause} during {where}"
    elif status == ST_CORRUPT:
        kind, text = CorruptData, f"damaged data from {who} during {where}"
    elif status == ST_WITHDRAWN:
        kind, text = CommunicationError, f"{who} gave up sending during {where}"
    elif status == ST_CANCELLED:
        kind, text = CommunicationError, f"{where} was cancelled"
    else:
        kind, text = CommunicationError, f"internal error {status} during {where}"
    return kind(text, rank=request.peer, operation=operation, epoch=context.epoch, done_bytes=request.post.sent)
