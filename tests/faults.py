"""Faults of a connection: a relay between two sockets that delays the stream, or cuts, stalls or damages it after k bytes."""
from __future__ import annotations

import collections
import contextlib
import socket
import threading
import time

READ_BYTES = 65536
MAX_HELD = 256              # reads under way in a delayed direction: 16 MB, which last 130 ms at 1 Gbit/s


class Line:
    """Data on its way: what goes in comes out delay_s later, in order."""

    def __init__(self, delay_s: float):
        self.delay_s, self.held, self.closed, self.change = delay_s, collections.deque(), False, threading.Condition()

    def put(self, data: bytes):
        """Send data on its way; waits while too much is. Raises ConnectionError once closed."""
        with self.change:
            self.change.wait_for(lambda: self.closed or len(self.held) < MAX_HELD)
            if self.closed:
                raise ConnectionError("the line is closed")
            self.held.append((time.monotonic() + self.delay_s, data))
            self.change.notify_all()

    def get(self) -> bytes:
        """The next data, when its time has come; b"" once closed."""
        with self.change:
            self.change.wait_for(lambda: self.closed or self.held)
            if not self.closed:
                self.change.wait_for(lambda: self.closed, max(0.0, self.held[0][0] - time.monotonic()))
            if self.closed:
                return b""
            self.change.notify_all()
            return self.held.popleft()[1]

    def close(self):
        """Forget what is on its way. Idempotent."""
        with self.change:
            self.closed = True
            self.change.notify_all()


class Relay:
    """Passes bytes between two connected sockets, both ways, from threads of its own.

    Args:    fault: None, "cut" (close both ends), "stall" (pass nothing more, keep open) or "corrupt" (flip one bit).
             after: bytes from a to b before the fault.
             delay_s: what every byte, and the end of the stream, is held back for, each way.
    """

    def __init__(self, a: socket.socket, b: socket.socket, fault: str | None = None, after: int = 0, delay_s: float = 0.0):
        self.a, self.b, self.fault, self.after = a, b, fault, after
        self.done, self.lines, self.threads = threading.Event(), [], []
        for source, sink, faulty in ((a, b, True), (b, a, False)):
            line = Line(delay_s) if delay_s else None
            if line:
                self.lines.append(line)
                self.threads.append(threading.Thread(target=self._release, args=(line, sink), daemon=True))
            self.threads.append(threading.Thread(target=self._pass, args=(source, sink, line, faulty), daemon=True))
        for thread in self.threads:
            thread.start()

    def _pass(self, source, sink, line, faulty):
        send, passed = line.put if line else sink.sendall, 0
        with contextlib.suppress(OSError):
            while data := source.recv(READ_BYTES):
                if faulty and self.fault and passed + len(data) > self.after:
                    at = max(0, self.after - passed)
                    if self.fault == "corrupt":
                        data = data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1:]
                        self.fault = None
                    else:
                        if at:
                            send(data[:at])
                        if self.fault == "stall":
                            self.done.wait()
                        break
                send(data)
                passed += len(data)
            if line:
                line.put(b"")           # the end comes after what is still on its way
                return
        self.close()

    def _release(self, line, sink):
        with contextlib.suppress(OSError):
            while data := line.get():
                sink.sendall(data)
        self.close()

    def close(self):
        """Cut both connections. Idempotent."""
        self.done.set()
        for line in self.lines:
            line.close()
        for sock in (self.a, self.b):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()


def faulty_pair(fault: str | None = None, after: int = 0, delay_s: float = 0.0):
    """(one end, other end, relay) of a stream in which bytes from the first to the second end meet the fault."""
    near, relay_near = socket.socketpair()
    relay_far, far = socket.socketpair()
    return near, far, Relay(relay_near, relay_far, fault, after, delay_s)
