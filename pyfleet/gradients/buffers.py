"""Module buffers (running statistics and the like) that rank 0 dictates."""
from __future__ import annotations

from typing import Any

import torch

ALIGNMENT = 16      # of each tensor within the flat bytes; the largest element torch has (complex128)


class BufferBroadcast:
    """All buffers of a module as one broadcast of bytes, whatever their dtypes.

    Buffers are looked up by name each time, because .to() and assignment replace them; their shapes and dtypes must
    stay. A module without buffers costs nothing.
    """

    def __init__(self, module: torch.nn.Module, engine: Any):
        self._engine = engine
        self._homes = [(owner, key) for owner in module.modules() for key, buffer in owner._buffers.items()
                       if buffer is not None]
        starts, num_bytes = [], 0
        for buffer in self._tensors():
            starts.append(num_bytes)
            num_bytes += -(-buffer.numel() * buffer.element_size() // ALIGNMENT) * ALIGNMENT
        self._flat = torch.frombuffer(engine.allocate(num_bytes), dtype=torch.uint8, count=num_bytes).zero_() \
            if num_bytes else None
        self._views = [self._flat[start:start + buffer.numel() * buffer.element_size()].view(buffer.dtype)
                       .view(buffer.shape) if buffer.numel() else None
                       for start, buffer in zip(starts, self._tensors(), strict=True)]

    @torch.no_grad()
    def submit(self) -> Any:
        """Start the broadcast and return its Work, or None when there is nothing to send."""
        if self._flat is None:
            return None
        if self._engine.rank == 0:
            for buffer, view in zip(self._tensors(), self._views, strict=True):
                if view is not None:
                    view.copy_(buffer)
        return self._engine.submit("broadcast", self._flat, 0)

    @torch.no_grad()
    def deliver(self) -> None:
        """After the broadcast: take rank 0's values."""
        if self._engine.rank == 0:
            return
        for buffer, view in zip(self._tensors(), self._views, strict=True):
            if view is not None:
                buffer.copy_(view)

    def _tensors(self) -> list[torch.Tensor]:
        return [owner._buffers[key] for owner, key in self._homes]
