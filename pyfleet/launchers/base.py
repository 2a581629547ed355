"""The contract of a launcher: start the ranks of a job, show what they print, end together, leave nothing behind."""
from __future__ import annotations

from abc import ABC, abstractmethod

from pyfleet.jobs import GRACE_S, Job

__all__ = ["GRACE_S", "Job", "Launcher"]


class Launcher(ABC):
    """Runs jobs, one at a time, from the main thread."""

    @abstractmethod
    def run(self, job: Job) -> int:
        """Run a job to its end and return its exit code.

        0 when every rank ended well; else the code of the first rank to fail (128 + n for signal n), which ends the
        others and whose last output is the last thing shown; 128 + n when signal n ended the launcher itself.
        Raises:  OSError when the ranks cannot be started; none is left then.
        """
