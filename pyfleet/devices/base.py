"""The contract of a device: copies between its memory and the host's that run while the host does something else."""
from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any


class Device(ABC):
    """One type of device, all of its numbers. Safe to use from several threads.

    Copies from the device to the host, and those the other way, run in the order they were started; the two directions
    do not wait for each other where the device can do both at once.
    """

    @abstractmethod
    def present(self) -> bool:
        """Whether this machine seems to have one. A wrong yes costs a message before long calls, a wrong no only speed.

        Cheap, and the same before and after torch is imported.
        """

    @abstractmethod
    def mark(self, tensor: Any) -> Any:
        """The point in the calling thread's current stream of the tensor's device up to which work is queued by now."""

    @abstractmethod
    def follow(self, mark: Any, tensor: Any) -> None:
        """Let what this thread queues on the tensor's device from now on come after a mark of that device."""

    @abstractmethod
    def start_copy(self, target: Any, source: Any, mark: Any) -> Callable[[], None]:
        """Start target.copy_(source), after everything before the mark.

        Args:    target, source: (n,) tensors of one dtype, contiguous, at least one of them on this device; both are
                 left alone, and kept alive, until the copy is over. mark: of this device, or None.
        Returns: wait(), which blocks until the copy is over for every stream and the host, and raises what made it fail.
        """

    @abstractmethod
    def lock_pages(self, address: int, nbytes: int) -> Callable[[], None] | None:
        """Keep host memory in place, so that copies of it need no other buffer and run beside the host.

        Returns: what undoes it, to be called before the memory is used for something else; None where the system
                 refuses, or where it brings nothing: copies are right all the same.
        """
