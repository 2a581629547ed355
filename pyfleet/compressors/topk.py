"""The largest elements, and where they are."""
from __future__ import annotations

import math
from fractions import Fraction

import numpy as np

from fleetcore.kernels import indices, sparsify
from pyfleet.compressors.base import Compressor, between, room
from pyfleet.errors import ConfigError, CorruptData, ShapeError

_FIRST_SHARE = 1 / 4        # of the elements, in the first step of a warm-up: as the source has it


class TopK(Compressor):
    """The k elements with the largest |x|; the others decode to 0. Among equals the lowest index wins.

    An encoding is the k values as `values` codes them (float32 without it), then their indices, packed: about
    log2(n / k) + 1.5 bits each. A NaN counts as larger than Inf; of more than k that are not finite, k are sent.

    Args:    ratio: the share that is kept, 0 < ratio <= 1: k = ceil(ratio * n), of the decimal number as it is written.
             sparsity: the share that is dropped, 0 <= sparsity < 1, instead of ratio.
             k: how many are kept, instead of both; all where n is smaller.
             warmup: steps in which the share falls from a quarter to what is said, by the same factor each: early
             gradients change too fast to come late. The encoding then begins with k, uint32.
             momentum: 0 <= momentum < 1, of error feedback alone: what is kept and sent is the velocity (the sum of
             gradients, each momentum times less per step), of which an element starts anew when it is sent. It stands
             in for the optimiser's momentum, which would work on what comes late.
             values: what codes the values.
    Source:  Lin et al. 2018, arXiv:1712.01887 (momentum correction, factor masking, warm-up training).
    """

    kind, route, takes_values = "topk", "gather", True

    def __init__(self, ratio: float = 0.1, sparsity: float | None = None, k: int | None = None, warmup: int = 0,
                 momentum: float = 0.0, values: Compressor | None = None):
        between(self.kind, "ratio", ratio, 0, 1, above=True)
        if sparsity is not None and between(self.kind, "sparsity", sparsity, 0, 1) == 1:
            raise ConfigError(f"{self.kind}: sparsity must be a number >= 0 and < 1, got {sparsity!r}")
        if k is not None:
            between(self.kind, "k", k, 1, 2**32 - 1, integer=True)
        between(self.kind, "warmup", warmup, 0, 2**32 - 1, integer=True)
        if between(self.kind, "momentum", momentum, 0, 1) == 1:
            raise ConfigError(f"{self.kind}: momentum must be a number >= 0 and < 1, got {momentum!r}")
        super().__init__(ratio=ratio, sparsity=sparsity, k=k, warmup=warmup, momentum=momentum, values=values)
        self.momentum, self._warmup = float(momentum), int(warmup)
        # Decimal, or 0.1 of 30 would be 4: 0.1 as a binary number is a little more than a tenth.
        self._share = Fraction(str(float(ratio))) if sparsity is None else 1 - Fraction(str(float(sparsity)))
        self._k, self._values = k, values
        self._scratch = (np.zeros(0, np.uint32), np.zeros(0, np.float32))

    def num_kept(self, n: int) -> int:
        """How many of n elements are sent."""
        return min(n, math.ceil(self._share * n) if self._k is None else int(self._k))

    def num_kept_at(self, n: int, step: int) -> int:
        """How many of n elements are sent in a step, which a warm-up may still have to do with."""
        k, first = self.num_kept(n), math.ceil(n * _FIRST_SHARE)
        if step >= self._warmup or k >= first:
            return k
        return min(first, math.ceil(k * (first / k) ** (1 - step / self._warmup)))

    def wire_bytes(self, n: int) -> int:
        return self._room(n, self.num_kept_at(n, 0))

    def settled_bytes(self, n: int) -> int:
        return self._room(n, self.num_kept(n))

    def encode(self, x: np.ndarray, out: np.ndarray, *, step: int = 0, offset: int = 0, stream: int = 0) -> int:
        """As the contract; moreover ConfigError with momentum, which is error feedback's."""
        if self.momentum:
            raise ConfigError(f"{self.name}: momentum works on what error feedback keeps, and there is none here")
        room(out, self.wire_bytes(x.size))
        chosen, values = self._room_for(x.size)
        k = sparsify.top_k(x, self.num_kept_at(x.size, step), chosen, values)
        return self._write(chosen[:k], values[:k], out, step, offset, stream)

    def encode_feedback(self, grad: np.ndarray, residual: np.ndarray, out: np.ndarray, *, step: int = 0,
                        offset: int = 0, stream: int = 0) -> int:
        room(out, self.wire_bytes(grad.size))
        chosen, values = self._room_for(grad.size)
        k = sparsify.absorb(residual, grad, self.num_kept_at(grad.size, step), chosen, values)
        chosen, values = chosen[:k], values[:k]
        written = self._write(chosen, values, out, step, offset, stream)
        if self._values is not None and self._values.lossy:
            sparsify.settle(residual, grad, chosen, values, self._read_values(out[self._head_bytes:], k))
        return written

    def sent(self, data: np.ndarray, n: int) -> np.ndarray:
        return self._read(data, n)[0]

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

    @property
    def _head_bytes(self) -> int:
        return 4 if self._warmup else 0

    def _room(self, n: int, k: int) -> int:
        return self._head_bytes + self._value_bytes(k) + indices.room_for(n, k)

    def _room_for(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Memory for a selection out of n, kept from step to step: fresh pages would cost more than the selection."""
        num = sparsify.room_for(n, self.num_kept_at(n, 0))
        if self._scratch[0].size != num:
            self._scratch = (np.empty(num, np.uint32), np.empty(num, np.float32))
        return self._scratch

    def _write(self, chosen: np.ndarray, values: np.ndarray, out: np.ndarray, step: int, offset: int,
               stream: int) -> int:
        head = self._head_bytes
        if head:
            out[:head].view(np.uint32)[0] = values.size
            out = out[head:]
        used = self._value_bytes(values.size)
        if self._values is None:
            np.copyto(out[:used], values.view(np.uint8))
        else:
            start = offset // self._values.block * self._values.block       # it may begin at its blocks only
            self._values.encode(values, out[:used], step=step, offset=start, stream=stream)
        return head + used + indices.encode(chosen, out[used:])

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
        k, head = self.num_kept(n), self._head_bytes
        if head:
            if data.size < head or not k <= (said := int(data[:head].view(np.uint32)[0])) <= self.num_kept_at(n, 0):
                raise ShapeError(f"{self.name}: these bytes do not begin with a number of {n} elements that it sends")
            k, data = said, data[head:]
        values, chosen, rest = self._read_values(data, k), np.empty(k, np.uint32), data[self._value_bytes(k):]
        try:
            used = indices.decode(rest, n, chosen)
        except CorruptData as error:
            raise ShapeError(f"{self.name}: {error}") from None
        if used != rest.size:
            raise ShapeError(f"{self.name}: {rest.size - used} bytes too many for {n} elements")
        return chosen, values
