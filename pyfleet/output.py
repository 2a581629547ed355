"""P0: what many ranks print, as one reader sees it: whole lines, marked with their rank, never mixed within a line."""
from __future__ import annotations

import os
import select
import stat
import time
from collections import deque

LONGEST_LINE = 1 << 20      # a line that is longer is cut here, so that a rank that never ends one costs bounded memory
REDRAW_S = 1.0              # a progress bar redrawn in place (by carriage returns) is shown this often
TAIL_BYTES = 1 << 16        # what is kept of a stream to be shown again
TAIL_LINES = 40
QUEUE_BYTES = 1 << 20       # beyond this the ranks wait for the reader
COLOURS = (36, 33, 32, 35, 34, 31)


def rank_prefix(rank: int, colour: bool) -> bytes:
    """The mark before each line of a rank."""
    return b"\x1b[%dm[rank %d]\x1b[0m " % (COLOURS[rank % len(COLOURS)], rank) if colour else b"[rank %d] " % rank


class Lines:
    """Cuts what one stream of a rank prints, in whatever pieces it comes, into whole marked lines; raw: as it comes."""

    def __init__(self, prefix: bytes = b"", raw: bool = False):
        self._prefix = prefix
        self._raw = raw
        self._pending = bytearray()
        self._tail = bytearray()
        self._redrawn_at = 0.0
        self._redrawn = b""

    def feed(self, data: bytes) -> bytes:
        """Take what was printed; return what is ready to be shown, line ends included."""
        self._tail += data
        if len(self._tail) > 2 * TAIL_BYTES:
            del self._tail[:-TAIL_BYTES]
        if self._raw:
            return data
        cut = data.rfind(b"\n") + 1
        if not cut:
            self._pending += data
            return self._long_or_redrawn()
        ready = bytes(self._pending) + data[:cut]
        self._pending = bytearray(data[cut:])
        self._redrawn = b""
        return self._marked(ready) + self._long_or_redrawn()

    def close(self) -> bytes:
        """The last line, if it was left without an end."""
        rest = _as_drawn(bytes(self._pending))
        self._pending.clear()
        return self._marked(rest + b"\n") if rest and rest != self._redrawn else b""

    def tail(self) -> bytes:
        """The last lines as printed; the whole of a last traceback, as far as it is kept."""
        lines = bytes(self._tail[-TAIL_BYTES:]).splitlines(keepends=True)
        start = max(0, len(lines) - TAIL_LINES)
        traceback = next((i for i in range(len(lines) - 1, -1, -1) if lines[i].startswith(b"Traceback (most recent")), start)
        return b"".join(lines[min(start, traceback):])

    def _marked(self, ready: bytes) -> bytes:
        if b"\r" in ready:
            ready = b"\n".join(_as_drawn(line) for line in ready.split(b"\n"))
        return self._prefix + ready[:-1].replace(b"\n", b"\n" + self._prefix) + b"\n" if self._prefix else ready

    def _long_or_redrawn(self) -> bytes:
        """What of the line under way is shown before it ends: all of a line too long, now and then a progress bar."""
        if b"\r" in self._pending:
            drawn = _as_drawn(bytes(self._pending))
            self._pending = bytearray(drawn + (b"\r" if self._pending.endswith(b"\r") else b""))
            now = time.monotonic()
            if drawn and now - self._redrawn_at >= REDRAW_S:
                self._redrawn_at, self._redrawn = now, drawn
                return self._marked(drawn + b"\n")
        return self.close() if len(self._pending) >= LONGEST_LINE else b""


def _as_drawn(line: bytes) -> bytes:
    """What a terminal shows of a line in the end: the text after the last carriage return that has any."""
    return line.rstrip(b"\r").rpartition(b"\r")[2]


class Sink:
    """A file descriptor that is written without ever blocking: what it does not take yet is queued."""

    def __init__(self, fd: int):
        self.fd = fd
        self.broken = False
        self._queue: deque[memoryview] = deque()
        self._queued = 0
        self._is_file = stat.S_ISREG(os.fstat(fd).st_mode)
        self._piece = 1 << 16 if self._is_file else select.PIPE_BUF     # what a pipe that is ready takes without blocking

    @property
    def full(self) -> bool:
        """Whether more should not be queued now."""
        return self._queued > QUEUE_BYTES

    @property
    def empty(self) -> bool:
        """Whether everything has been written, or never can be."""
        return not self._queue

    def write(self, data: bytes) -> None:
        """Queue data; dropped when the reader has gone."""
        if data and not self.broken:
            self._queue.append(memoryview(data))
            self._queued += len(data)

    def pump(self) -> None:
        """Write as much as can be written without waiting."""
        while self._queue and (self._is_file or select.select([], [self.fd], [], 0)[1]):
            head = self._queue[0]
            try:
                done = os.write(self.fd, head[:self._piece])
            except BlockingIOError:     # the descriptor is nonblocking, and less room than announced
                return
            except OSError:             # EPIPE, EIO: nobody reads any more
                self.drop()
                return
            self._queued -= done
            if done == len(head):
                self._queue.popleft()
            else:
                self._queue[0] = head[done:]

    def drop(self) -> None:
        """Take it that nobody reads any more."""
        self.broken = True
        self._queue.clear()
        self._queued = 0


def standard_sinks() -> tuple[Sink, Sink]:
    """Sinks of this process's stdout and stderr; the same one where both are one file, so that lines stay whole there."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:                 # closed by whoever started us: keep its number from meaning something else
            os.open(os.devnull, os.O_RDWR)
    out, err = os.fstat(1), os.fstat(2)
    sink = Sink(1)
    same = (out.st_dev, out.st_ino, out.st_rdev) == (err.st_dev, err.st_ino, err.st_rdev)
    return sink, sink if same else Sink(2)
