"""Half as many bits: float16 and bfloat16, summed on the way as they are."""
from __future__ import annotations

from typing import ClassVar

import numpy as np
from fleetcore.kernels.cast import cast_array
from fleetcore.kernels.quantize import half_feedback_array

from pyfleet.compressors.base import Compressor, expect, room
from pyfleet.errors import DType

_CHUNK = 1 << 16        # elements: what is widened is still in L2 when it is added


class Half(Compressor):
    """Each element rounded to nearest even, denormals kept; NaN stays NaN."""

    route = "reduce"
    wire_dtype: ClassVar[DType]

    def __init__(self):
        super().__init__()

    def wire_bytes(self, n: int) -> int:
        return 2 * n

    def encode(self, x: np.ndarray, out: np.ndarray, *, step: int = 0, offset: int = 0, stream: int = 0) -> int:
        cast_array(room(out, 2 * x.size), self.wire_dtype, x, DType.FLOAT32)
        return 2 * x.size

    def encode_feedback(self, grad: np.ndarray, residual: np.ndarray, out: np.ndarray, *, step: int = 0, offset: int = 0,
                        stream: int = 0) -> int:
        half_feedback_array(self.wire_dtype, grad, residual, room(out, 2 * grad.size).view(np.uint16))
        return 2 * grad.size

    def decode(self, data: np.ndarray, out: np.ndarray) -> None:
        expect(data, 2 * out.size)
        cast_array(out, DType.FLOAT32, data, self.wire_dtype)

    def decode_add(self, data: np.ndarray, out: np.ndarray, weight: float = 1.0) -> None:
        expect(data, 2 * out.size)
        for start in range(0, out.size, _CHUNK):
            piece = out[start:start + _CHUNK]
            super().decode_add(data[2 * start:2 * (start + piece.size)], piece, weight)


class Float16(Half):
    """IEEE half precision: 11 bits of precision up to 65504; what is larger becomes infinite."""

    kind, wire_dtype = "fp16", DType.FLOAT16


class BFloat16(Half):
    """The upper half of a float32: 8 bits of precision over the whole range."""

    kind, wire_dtype = "bf16", DType.BFLOAT16
