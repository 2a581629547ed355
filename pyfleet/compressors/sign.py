"""One bit an element."""
from __future__ import annotations

from fleetcore.kernels.quantize import SIGN

from pyfleet.compressors.base import BlockCode


class Sign(BlockCode):
    """The sign of each element, times the block's mean magnitude; trains only with error feedback.

    Source:  Karimireddy et al. 2019, arXiv:1901.09847, with a scale per block of 256 elements.
    """

    kind, _code = "sign", SIGN

    def __init__(self):
        super().__init__()
