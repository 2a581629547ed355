"""The contract of a launcher: start the ranks of a job, show what they print, end together, leave nothing behind.

And what the two ends of a launch on another machine say to each other. From here: an Order as a line of JSON, then signal
numbers, a byte each, and ALIVE now and then. From there: BEGIN, then frames, a Hello first. Either end takes the other for gone when it is silent.
"""
from __future__ import annotations

import struct
from abc import ABC, abstractmethod

import msgspec

from pyfleet.jobs import GRACE_S, READ_BYTES, Job

__all__ = ["GRACE_S", "Job", "Launcher"]

BEGIN = b"pyfleet frames 1\n"       # after whatever a login shell prints; the number changes with the frames
ALIVE = 0
LENGTH = struct.Struct("!I")
MOST_BYTES = READ_BYTES + 4096      # of a frame: one piece of output and its envelope


class Launcher(ABC):
    """Runs jobs, one at a time, from the main thread."""

    @abstractmethod
    def run(self, job: Job) -> int:
        """Run a job to its end and return its exit code.

        0 when every rank ended well; else the code of the first rank to fail (128 + n for signal n), which ends the
        others and whose last output is the last thing shown; 128 + n when signal n ended the launcher itself.
        Raises:  OSError when the ranks cannot be started; none is left then.
        """


class Order(msgspec.Struct, forbid_unknown_fields=True):
    """What a machine is to run: a command, in which None stands for its own Python; the other settings of its Job; and how
    long its orders may be silent before it takes the one who gives them for gone."""

    command: list[str | None]
    job: dict
    silence_s: float


class Hello(msgspec.Struct, tag=True, array_like=True):
    """Who is there; connection: SSH_CONNECTION; port: one that is free there."""

    name: str
    connection: str
    addresses: list[str]
    port: int


class Printed(msgspec.Struct, tag=True, array_like=True):
    """What a rank has printed; b"" at the stream's end."""

    rank: int
    stream: int
    data: bytes


class Ended(msgspec.Struct, tag=True, array_like=True):
    """A rank has ended; told: after it had been asked to."""

    rank: int
    status: int
    told: bool


class Failed(msgspec.Struct, tag=True, array_like=True):
    """The ranks could not be started."""

    why: str


class Alive(msgspec.Struct, tag=True, array_like=True):
    """There was nothing else to say for a while."""


class Over(msgspec.Struct, tag=True, array_like=True):
    """Nobody is left there."""


Frame = Hello | Printed | Ended | Failed | Alive | Over


def frame(content: Frame) -> bytes:
    """A frame as it travels."""
    data = msgspec.msgpack.encode(content)
    return LENGTH.pack(len(data)) + data


class Unframer:
    """Cuts frames out of a stream that comes in any pieces and begins with anything up to BEGIN."""

    def __init__(self):
        self._pending, self._begun = bytearray(), False

    def feed(self, data: bytes) -> list[Frame]:
        """The frames that are complete now. Raises ValueError for what is none."""
        pending = self._pending
        pending += data
        if not self._begun:
            start = pending.find(BEGIN)
            del pending[:start + len(BEGIN) if start >= 0 else -len(BEGIN)]
            self._begun = start >= 0
        found = []
        while self._begun and len(pending) >= LENGTH.size:
            size, = LENGTH.unpack_from(pending)
            if size > MOST_BYTES:
                raise ValueError(f"a frame of {size} bytes")
            if len(pending) < LENGTH.size + size:
                break
            found.append(msgspec.msgpack.decode(pending[LENGTH.size:LENGTH.size + size], type=Frame))
            del pending[:LENGTH.size + size]
        return found
