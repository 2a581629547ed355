"""Faults of a connection: a relay between two sockets that cuts, stalls or damages the stream after k bytes."""
from __future__ import annotations

import contextlib
import socket
import threading


class Relay:
    """Passes bytes between two connected sockets, both ways, from threads of its own.

    Args:    fault: None, "cut" (close both ends), "stall" (pass nothing more, keep open) or "corrupt" (flip one bit).
             after: bytes from a to b before the fault.
    """

    def __init__(self, a: socket.socket, b: socket.socket, fault: str | None = None, after: int = 0):
        self.a, self.b, self.fault, self.after = a, b, fault, after
        self.done = threading.Event()
        self.threads = [threading.Thread(target=self._pass, args=pair, daemon=True)
                        for pair in ((a, b, True), (b, a, False))]
        for thread in self.threads:
            thread.start()

    def _pass(self, source, sink, faulty):
        passed = 0
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if faulty and self.fault and passed + len(data) > self.after:
                    at = max(0, self.after - passed)
                    if self.fault == "corrupt":
                        data = data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1:]
                        self.fault = None
                    else:
                        sink.sendall(data[:at])
                        if self.fault == "stall":
                            self.done.wait()
                        break
                sink.sendall(data)
                passed += len(data)
        self.close()

    def close(self):
        """Cut both connections. Idempotent."""
        self.done.set()
        for sock in (self.a, self.b):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()


def faulty_pair(fault: str | None = None, after: int = 0):
    """(one end, other end, relay) of a stream in which bytes from the first to the second end meet the fault."""
    near, relay_near = socket.socketpair()
    relay_far, far = socket.socketpair()
    return near, far, Relay(relay_near, relay_far, fault, after)
