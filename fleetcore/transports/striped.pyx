"""C2: one link over several connections to the same peer, for rates that one connection, or one core's TCP, cannot carry.

The stream is dealt out in stripes of fixed size, in turn, so that both ends know where every byte travels and nothing has
to be put in order: the receiver reads each stripe from the connection it must be on, while the others arrive in their
buffers.
"""
from fleetcore.posix cimport calloc, free, iovec
from fleetcore.transports.base cimport Link, Wire

from fleetcore.errors import ConfigError

cdef enum:
    MOST_PARTS = 8
STRIPE_BYTES = 256 * 1024      # a record of a sealed link, half a chunk of the executor
cdef uint64_t STRIPE = STRIPE_BYTES


cdef int take(iovec *parts, int num_parts, size_t skip, size_t most, iovec *into) noexcept nogil:
    """Describe at most `most` bytes of the parts, from byte `skip` on; how many parts that takes."""
    cdef int i, num = 0
    cdef size_t length
    for i in range(num_parts):
        if skip >= parts[i].iov_len:
            skip -= parts[i].iov_len
            continue
        length = parts[i].iov_len - skip
        if length > most:
            length = most
        if length == 0 or num == MOST_PARTS:
            break
        into[num].iov_base, into[num].iov_len = <char *>parts[i].iov_base + skip, length
        num += 1
        most -= length
        skip = 0
    return num


cdef Py_ssize_t pass_on(Wire *wire, iovec *parts, int num_parts, bint sending) noexcept nogil:
    cdef Stripes *stripes = <Stripes *>wire.state
    cdef uint64_t *at = &stripes.sent if sending else &stripes.received
    cdef iovec some[MOST_PARTS]
    cdef Wire *turn
    cdef size_t offered, total = 0
    cdef Py_ssize_t n
    cdef int i, num
    while True:
        turn = stripes.wires[(at[0] // STRIPE) % stripes.num]
        num = take(parts, num_parts, total, STRIPE - at[0] % STRIPE, some)
        if num == 0:
            break
        offered = 0
        for i in range(num):
            offered += some[i].iov_len
        n = turn.send_some(turn, some, num) if sending else turn.recv_some(turn, some, num)
        if n < 0:
            wire.error = turn.error
            if total == 0:
                return n                           # else it says so again when it is asked again
            break
        at[0] += n
        total += n
        if <size_t>n < offered:
            break
    turn = stripes.wires[(at[0] // STRIPE) % stripes.num]
    if sending:
        wire.send_fd = turn.fd
    else:
        wire.fd = turn.fd
    return total


cdef Py_ssize_t striped_send(Wire *wire, iovec *parts, int num_parts) noexcept nogil:
    return pass_on(wire, parts, num_parts, True)


cdef Py_ssize_t striped_recv(Wire *wire, iovec *parts, int num_parts) noexcept nogil:
    return pass_on(wire, parts, num_parts, False)


cdef class StripedLink(Link):
    """Takes over several links to the same rank; both ends give theirs in the same order.

    Raises:  ConfigError without links.
    """

    def __init__(self, list links):
        cdef Link link
        cdef int i
        if not links:
            raise ConfigError("a striped link needs links")
        self.links = links
        self.stripes.wires = <Wire **>calloc(len(links), sizeof(Wire *))
        if self.stripes.wires == NULL:
            raise MemoryError()
        self.stripes.num = len(links)
        self.wire.authentic = True
        for i, link in enumerate(links):
            self.stripes.wires[i] = &link.wire
            self.wire.authentic = self.wire.authentic and link.wire.authentic
        link = links[0]
        self.wire.rank, self.wire.fd, self.wire.send_fd = link.wire.rank, link.wire.fd, link.wire.fd
        self.wire.send_some, self.wire.recv_some = striped_send, striped_recv
        self.wire.state = &self.stripes

    def stats(self):
        counts = [link.stats() for link in self.links]
        return {name: value if isinstance(value, str) else sum(count[name] for count in counts)
                for name, value in counts[0].items()}

    def close(self):
        for link in self.links:
            link.close()
        self.wire.fd = self.wire.send_fd = -1

    def __dealloc__(self):
        self.wire.fd = -1                          # theirs to close
        free(self.stripes.wires)
