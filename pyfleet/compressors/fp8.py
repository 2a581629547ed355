"""float8 e4m3: four bits of precision over a wide range, scaled block by block."""
from __future__ import annotations

from fleetcore.kernels.quantize import FP8

from pyfleet.compressors.base import BlockCode


class Float8(BlockCode):
    """float8_e4m3fn as torch casts to it, times the power of two that brings the block's largest magnitude to 224 .. 448.

    An element is off by at most a sixteenth of itself, or, where that is more, the block's largest magnitude over 2 ** 17.
    Blocks that reach into the last 1/32 of float32's range count as infinite.
    """

    kind, _code = "fp8", FP8

    def __init__(self):
        super().__init__()
