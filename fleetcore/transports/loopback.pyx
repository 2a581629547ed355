"""C2: a link to a rank of the same process (threads as ranks: tests, the mock engine)."""
import socket

from fleetcore.transports.base cimport Link


cdef class LoopbackLink(Link):
    """One end of an in-process pair; make both with `LoopbackLink.pair(a, b)`."""

    def __init__(self, sock, int rank):
        sock.setblocking(False)
        self.wire.rank = rank
        self.wire.fd = sock.detach()

    @staticmethod
    def pair(int a, int b):
        """(the link rank a uses to reach b, the link rank b uses to reach a)."""
        mine, theirs = socket.socketpair()
        return LoopbackLink(mine, b), LoopbackLink(theirs, a)
