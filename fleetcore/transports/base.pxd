# C2: the contract of a link, as a C struct so that the executor can call it without the GIL.
from libc.stdint cimport uint64_t

from fleetcore.posix cimport iovec


cdef struct Wire:
    int fd                     # to poll: readable when recv_some may get on, writable when send_some may
    int send_fd                # the latter, when it is another one (they change from call to call); -1: it is fd
    bint patient               # recv_some takes what lies in the kernel and nothing else: SO_RCVLOWAT may delay it
    int rank                   # the peer
    int error                  # errno behind the last ST_SYSTEM or ST_PEER_LOST
    uint64_t sent_bytes, received_bytes, sends, receives
    bint authentic             # the transport itself notices every damaged byte: payloads need no checksum
    void *state                # what the transport keeps for itself
    # Give the kernel (or take from it) some bytes of the parts: > 0 that many, 0 would block, < 0 a Status; the end of
    # the stream is ST_PEER_LOST. Parts must outlive the call only. Never blocks.
    # Bytes that were offered and not taken are offered again, unchanged and first: a transport may have begun to send
    # them in another form. What was taken is the kernel's, so nobody has to flush. Fewer bytes than there was room for:
    # nothing more is to be had before fd is readable.
    Py_ssize_t (*send_some)(Wire *wire, iovec *parts, int num_parts) noexcept nogil
    Py_ssize_t (*recv_some)(Wire *wire, iovec *parts, int num_parts) noexcept nogil


cdef class Link:
    cdef Wire wire


cdef Py_ssize_t stream_send(Wire *wire, iovec *parts, int num_parts) noexcept nogil
cdef Py_ssize_t stream_recv(Wire *wire, iovec *parts, int num_parts) noexcept nogil
