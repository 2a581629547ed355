"""Nothing is compressed: float32 as it is."""
from __future__ import annotations

import numpy as np

from pyfleet.compressors.base import Compressor, expect, room
from pyfleet.errors import DType


class NoCompression(Compressor):
    """The identity, so that whoever compresses need not ask whether to."""

    kind, route, lossy, wire_dtype = "none", "reduce", False, DType.FLOAT32

    def __init__(self):
        super().__init__()

    def wire_bytes(self, n: int) -> int:
        return 4 * n

    def encode(self, x: np.ndarray, out: np.ndarray, *, step: int = 0, offset: int = 0, stream: int = 0) -> int:
        np.copyto(room(out, x.nbytes), x.view(np.uint8))
        return x.nbytes

    def decode(self, data: np.ndarray, out: np.ndarray) -> None:
        expect(data, out.nbytes)
        np.copyto(out.view(np.uint8), data)

    def decode_add(self, data: np.ndarray, out: np.ndarray, weight: float = 1.0) -> None:
        expect(data, out.nbytes)
        with np.errstate(over="ignore", invalid="ignore"):
            out += data.view(np.float32) if weight == 1.0 else data.view(np.float32) * np.float32(weight)
