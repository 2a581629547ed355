"""C2: what every link offers, and the stream-socket calls that most of them are made of."""
from fleetcore.posix cimport (
    EAGAIN, EINTR, MSG_DONTWAIT, MSG_NOSIGNAL, SHUT_RDWR, close, iovec, last_errno, memset, msghdr,
    recvmsg, sendmsg, shutdown,
)
from fleetcore.status cimport ST_PEER_LOST


cdef Py_ssize_t stream_send(Wire *wire, iovec *parts, int num_parts) noexcept nogil:
    cdef msghdr message
    cdef Py_ssize_t n
    memset(&message, 0, sizeof(message))
    message.msg_iov, message.msg_iovlen = parts, num_parts
    while True:
        n = sendmsg(wire.fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT)
        if n >= 0:
            wire.sent_bytes += n
            wire.sends += 1
            return n
        wire.error = last_errno()
        if wire.error == EAGAIN:
            return 0
        if wire.error != EINTR:
            return ST_PEER_LOST


cdef Py_ssize_t stream_recv(Wire *wire, iovec *parts, int num_parts) noexcept nogil:
    cdef msghdr message
    cdef Py_ssize_t n
    memset(&message, 0, sizeof(message))
    message.msg_iov, message.msg_iovlen = parts, num_parts
    while True:
        n = recvmsg(wire.fd, &message, MSG_DONTWAIT)
        if n > 0:
            wire.received_bytes += n
            wire.receives += 1
            return n
        wire.error = 0 if n == 0 else last_errno()
        if n == 0:
            return ST_PEER_LOST
        if wire.error == EAGAIN:
            return 0
        if wire.error != EINTR:
            return ST_PEER_LOST


cdef class Link:
    """Bytes to one peer: ordered, reliable, non-blocking. Subclasses fill in `wire`.

    Owns its descriptor. Not for two threads at once.
    """

    def __cinit__(self, *args, **kwargs):
        self.wire.fd = self.wire.send_fd = -1
        self.wire.send_some, self.wire.recv_some = stream_send, stream_recv

    @property
    def rank(self):
        """The peer at the other end."""
        return self.wire.rank

    def fileno(self):
        """The descriptor to poll; -1 once closed."""
        return self.wire.fd

    def send(self, data):
        """Give the kernel some bytes of data (bytes): how many it took, 0 when it would block, -1 when the peer is gone."""
        cdef const unsigned char[::1] view = data
        cdef iovec part
        part.iov_base, part.iov_len = <void *>&view[0] if view.shape[0] else NULL, view.shape[0]
        return self.wire.send_some(&self.wire, &part, 1)

    def receive(self, Py_ssize_t most):
        """Up to `most` bytes that have arrived; b"" when none has, None when the peer is gone."""
        room = bytearray(most)
        cdef unsigned char[::1] view = room
        cdef iovec part
        part.iov_base, part.iov_len = &view[0], most
        cdef Py_ssize_t n = self.wire.recv_some(&self.wire, &part, 1)
        return None if n < 0 else bytes(room[:n])

    def stats(self):
        """Counted at the socket: {"sent_bytes", "received_bytes", "sends", "receives"}."""
        return {"sent_bytes": self.wire.sent_bytes, "received_bytes": self.wire.received_bytes,
                "sends": self.wire.sends, "receives": self.wire.receives}

    def close(self):
        """End the connection in both directions. Idempotent."""
        if self.wire.fd >= 0:
            shutdown(self.wire.fd, SHUT_RDWR)
            close(self.wire.fd)
            self.wire.fd = -1

    def __dealloc__(self):
        if self.wire.fd >= 0:
            close(self.wire.fd)
