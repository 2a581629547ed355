"""Integers of a few bits, scaled block by block: int8, int4, and every width from 1 to 8."""
from __future__ import annotations

from pyfleet.compressors.base import BlockCode, between, check_flag


class Quantize(BlockCode):
    """Integers of num_bits around zero, in steps of the block's largest magnitude over the top one.

    An element is off by at most half a step, largest / (2 ** (num_bits - 1) - 1) / 2, to nearest even; by less than a
    step when `stochastic`, but its expectation is then the element itself. One bit is the sign: see Sign.
    With 2 bits, magnitudes from 2 ** 125 on count as infinite, with 3 bits from 3 * 2 ** 125 on.

    Args:    num_bits: 1 to 8.  stochastic: round up or down at random.  seed: of that, 0 to 2**64 - 1.
    Raises:  ConfigError.
    """

    kind = "quantize"

    def __init__(self, num_bits: int = 8, stochastic: bool = False, seed: int = 0):
        self._code = between(self.kind, "num_bits", num_bits, 1, 8, integer=True)
        seed = between(self.kind, "seed", seed, 0, 2**64 - 1, integer=True)
        self._seed = seed if check_flag(self.kind, "stochastic", stochastic) else None
        super().__init__(num_bits=self._code, stochastic=stochastic, seed=seed)

    @property
    def name(self) -> str:
        return f"int{self._code}" if self._seed is None else super().name
