# C3: messages between pairs of ranks, as requests that threads wait for.
from libc.stdint cimport int64_t, uint32_t

from fleetcore.postroom cimport Post, Postroom

cdef class Request:
    cdef Post post
    cdef Mailbox box
    cdef readonly int source_or_dest     # the peer asked for; -1: any
    cdef uint32_t bell                   # what its waiters sleep on
    cdef bint over                       # all below is final
    cdef object make, pin, result, error

cdef class Mailbox(Postroom):
    cdef readonly double timeout
    cdef object context
    cdef set live                        # requests that are not over: their memory stays while bytes may move
    cdef int pid
    cdef uint32_t driving                # 1: some thread drives
    cdef object driver                   # its ident
    cdef bint serving                    # it is a server, and gives way to those who wait
    cdef bint closed
    cdef list sleepers                   # the request of each thread that waits for others to drive
    cdef uint32_t bell                   # what threads sleep on that wait for no request of their own
    cdef uint32_t rest                   # the same, for servers
    cdef int dozing, servers             # threads that may sleep on `bell`, on `rest`

    cdef int demand_usable(self) except -1
    cdef Request post_send(self, x, int dst, tag, bytes note, timeout)
    cdef Request post_receive(self, make, src, tag, timeout)
    cdef int start(self, Request request, tag, timeout) except -1
    cdef int nudge(self, Request request) except -1
    cdef bint take_wheel(self)
    cdef int leave_wheel(self) except -1
    cdef int drive_once(self, int64_t until, bint yielding) except -1
    cdef int attend(self) except -1
    cdef int hand_over(self, Request request) except -1
    cdef int settle(self, Request request)
    cdef int hand_on(self) except -1
    cdef int doze(self, uint32_t *word, uint32_t seen, int64_t most_ns) except -1
    cdef bint wait_for(self, Request request, int64_t until) except -1
    cdef int withdraw(self, Request request) except -1
    cdef int shut(self) except -1
