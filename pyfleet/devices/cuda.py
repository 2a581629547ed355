"""CUDA, and what torch offers under its name (ROCm)."""
from __future__ import annotations

import contextlib
import os
import threading

from pyfleet.devices.base import Device

# What the drivers of NVIDIA, AMD and WSL leave in the file system. To ask torch would load it, and asking the driver
# makes a process that forks later useless for CUDA.
DRIVER_FILES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
PORTABLE = 1                # cudaHostRegisterPortable: page-locked for every GPU of the process


class Cuda(Device):
    """Two streams per GPU, one for each direction: GPUs have a copy engine for each."""

    def __init__(self):
        self._streams, self._lock = {}, threading.Lock()

    def present(self):
        return any(os.path.exists(path) for path in DRIVER_FILES)

    def mark(self, tensor):
        import torch

        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(tensor.device))
        return event

    def follow(self, mark, tensor):
        import torch

        torch.cuda.current_stream(tensor.device).wait_event(mark)

    def start_copy(self, target, source, mark):
        import torch

        stream = self._stream((target if target.is_cuda else source).device, target.is_cuda)
        with torch.cuda.stream(stream):
            if mark is not None:
                stream.wait_event(mark)
            target.copy_(source, non_blocking=True)
            over = torch.cuda.Event(blocking=True)      # sleeps: a spinning waiter would take a core from autograd
            over.record(stream)
        return over.synchronize

    def lock_pages(self, address, nbytes):
        import torch

        runtime = torch.cuda.cudart()
        if int(runtime.cudaHostRegister(address, nbytes, PORTABLE)) == 0:
            return lambda: runtime.cudaHostUnregister(address)
        # The driver keeps the refusal as its last error, which the next kernel is blamed for: let that be this one.
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device="cuda")
        return None

    def _stream(self, device, inward):
        import torch

        with self._lock:
            if (device, inward) not in self._streams:
                self._streams[device, inward] = torch.cuda.Stream(device)
            return self._streams[device, inward]
