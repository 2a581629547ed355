"""The contract of a launcher: start the ranks of a job, show what they print, end together, leave nothing behind."""
from __future__ import annotations

import re
import signal
from abc import ABC, abstractmethod
from dataclasses import dataclass

GRACE_S = 15.0      # between asking a rank to end and ending it: long enough to write a checkpoint


@dataclass(frozen=True)
class Seat:
    """A node's place among the nodes of a job: its ranks are first_rank, first_rank + 1, ... of world_size.

    Attributes:
        rendezvous: where the ranks meet (see placement.Placement).  master_addr: of rank 0's node, as seen from here.
    """

    node_rank: int
    first_rank: int
    world_size: int
    master_addr: str
    rendezvous: str | None = None


@dataclass(frozen=True)
class Job:
    """What to start: `command` is the whole argv of every rank."""

    command: tuple[str, ...]
    num_ranks: int = 1
    grace_s: float = GRACE_S
    master_port: int | None = None      # None: a free one
    log_dir: str | None = None          # where rank_<n>.log get what each rank printed, byte for byte
    prefix: bool = True
    config_path: str | None = None
    overrides: tuple[str, ...] = ()
    seat: Seat | None = None            # None: all ranks of the job are on this machine


class Launcher(ABC):
    """Runs jobs, one at a time, from the main thread."""

    @abstractmethod
    def run(self, job: Job) -> int:
        """Run a job to its end and return its exit code.

        0 when every rank ended well; else the code of the first rank to fail (128 + n for signal n), which ends the
        others and whose last output is the last thing shown; 128 + n when signal n ended the launcher itself.
        Raises:  OSError when the ranks cannot be started; none is left then.
        """


def exit_code(status: int) -> int:
    """The exit code of a shell for a process's returncode: 128 + n where signal n ended it."""
    return status if status >= 0 else 128 - status


def describe(status: int) -> str:
    """How a process ended: 'failed with exit code 3', 'was killed by SIGKILL'."""
    if status >= 0:
        return f"failed with exit code {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"was killed by signal {-status}"


def is_echo(output: bytes) -> bool:
    """Whether a rank's last words blame another rank: PeerLost, by itself or in the text of another error."""
    start = output.rfind(b"Traceback (most recent call last)")
    words = output[start:] if start >= 0 else output.strip().rpartition(b"\n")[2]
    return re.search(rb"^(?! ).*\bPeerLost\b", words, re.MULTILINE) is not None
