"""Apple's GPUs through Metal. Memory is one, but tensors of torch's mps live in buffers that only Metal may touch."""
from __future__ import annotations

import platform
import sys

from pyfleet.devices.base import Device


class Mps(Device):
    """torch (2.13) queues all work of a process, from whatever thread, in one stream: order needs no marks."""

    def present(self):
        return sys.platform == "darwin" and platform.machine() == "arm64"

    def mark(self, tensor):
        return None

    def follow(self, mark, tensor):
        """Nothing to do: there is one stream."""

    def start_copy(self, target, source, mark):
        import torch

        target.copy_(source, non_blocking=True)
        over = torch.mps.Event()
        over.record()
        return over.synchronize

    def lock_pages(self, address, nbytes):
        return None             # Metal wires the pages of a copy itself
