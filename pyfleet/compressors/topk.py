"""The largest elements, and where they are."""
from __future__ import annotations

import math
from fractions import Fraction

import numpy as np

from fleetcore.kernels import indices, sparsify
from pyfleet.compressors.base import Compressor, between, room
from pyfleet.errors import ConfigError, CorruptData, ShapeError


class TopK(Compressor):
    """The k elements with the largest |x|; the others decode to 0. Among equals the lowest index wins.

    An encoding is the k values as `values` codes them (float32 without it), then their indices, packed: about
    log2(n / k) + 1.5 bits each. A NaN counts as larger than Inf; of more than k that are not finite, k are sent.

    Args:    ratio: the share that is kept, 0 < ratio <= 1: k = ceil(ratio * n), of the decimal number as it is written.
             sparsity: the share that is dropped, 0 <= sparsity < 1, instead of ratio.
             k: how many are kept, instead of both; all where n is smaller.
             values: what codes the values.
    Source:  Lin et al. 2018, arXiv:1712.01887, without momentum correction.
    """

    kind, route, takes_values = "topk", "gather", True

    def __init__(self, ratio: float = 0.1, sparsity: float | None = None, k: int | None = None,
                 values: Compressor | None = None):
        between(self.kind, "ratio", ratio, 0, 1, above=True)
        if sparsity is not None and between(self.kind, "sparsity", sparsity, 0, 1) == 1:
            raise ConfigError(f"{self.kind}: sparsity must be a number >= 0 and < 1, got {sparsity!r}")
        if k is not None:
            between(self.kind, "k", k, 1, 2**32 - 1, integer=True)
        super().__init__(ratio=ratio, sparsity=sparsity, k=k, values=values)
        # Decimal, or 0.1 of 30 would be 4: 0.1 as a binary number is a little more than a tenth.
        self._share = Fraction(str(float(ratio))) if sparsity is None else 1 - Fraction(str(float(sparsity)))
        self._k, self._values = k, values
        self._scratch = (np.zeros(0, np.uint32), np.zeros(0, np.float32))

    def num_kept(self, n: int) -> int:
        """How many of n elements are sent."""
        return min(n, math.ceil(self._share * n) if self._k is None else int(self._k))

    def wire_bytes(self, n: int) -> int:
        k = self.num_kept(n)
        return self._value_bytes(k) + indices.room_for(n, k)

    def encode(self, x: np.ndarray, out: np.ndarray, *, step: int = 0, offset: int = 0, stream: int = 0) -> int:
        room(out, self.wire_bytes(x.size))
        chosen, values = self._room_for(x.size)
        k = sparsify.top_k(x, self.num_kept(x.size), chosen, values)
        return self._write(chosen[:k], values[:k], out, step, offset, stream)

    def encode_feedback(self, grad: np.ndarray, residual: np.ndarray, out: np.ndarray, *, step: int = 0,
                        offset: int = 0, stream: int = 0) -> int:
        room(out, self.wire_bytes(grad.size))
        chosen, values = self._room_for(grad.size)
        k = sparsify.absorb(residual, grad, self.num_kept(grad.size), chosen, values)
        chosen, values = chosen[:k], values[:k]
        written = self._write(chosen, values, out, step, offset, stream)
        if self._values is not None and self._values.lossy:
            sparsify.settle(residual, grad, chosen, values, self._read_values(out, k))
        return written

    def decode(self, data: np.ndarray, out: np.ndarray) -> None:
        sparsify.put_values(out, *self._read(data, out.size))

    def decode_add(self, data: np.ndarray, out: np.ndarray, weight: float = 1.0) -> None:
        chosen, values = self._read(data, out.size)
        if weight != 1.0:
            with np.errstate(over="ignore", invalid="ignore"):
                values = values * np.float32(weight)
        sparsify.add_values(out, chosen, values)

    def _value_bytes(self, k: int) -> int:
        return 4 * k if self._values is None else self._values.wire_bytes(k)

    def _room_for(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Memory for a selection out of n, kept from step to step: fresh pages would cost more than the selection."""
        num = sparsify.room_for(n, self.num_kept(n))
        if self._scratch[0].size != num:
            self._scratch = (np.empty(num, np.uint32), np.empty(num, np.float32))
        return self._scratch

    def _write(self, chosen: np.ndarray, values: np.ndarray, out: np.ndarray, step: int, offset: int,
               stream: int) -> int:
        used = self._value_bytes(values.size)
        if self._values is None:
            np.copyto(out[:used], values.view(np.uint8))
        else:
            start = offset // self._values.block * self._values.block       # it may begin at its blocks only
            self._values.encode(values, out[:used], step=step, offset=start, stream=stream)
        return used + indices.encode(chosen, out[used:])

    def _read_values(self, data: np.ndarray, k: int) -> np.ndarray:
        used = self._value_bytes(k)
        if data.size < used:
            raise ShapeError(f"{self.name}: {k} values take {used} bytes, got {data.size}")
        values = np.empty(k, np.float32)
        if self._values is None:
            np.copyto(values.view(np.uint8), data[:used])
        else:
            self._values.decode(data[:used], values)
        return values

    def _read(self, data: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
        k = self.num_kept(n)
        values, chosen, rest = self._read_values(data, k), np.empty(k, np.uint32), data[self._value_bytes(k):]
        try:
            used = indices.decode(rest, n, chosen)
        except CorruptData as error:
            raise ShapeError(f"{self.name}: {error}") from None
        if used != rest.size:
            raise ShapeError(f"{self.name}: {rest.size - used} bytes too many for {n} elements")
        return chosen, values
