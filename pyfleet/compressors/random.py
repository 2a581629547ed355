"""Elements chosen by chance, the same on every rank: no indices travel."""
from __future__ import annotations

import math
import struct

import numpy as np

from fleetcore.kernels import sparsify
from pyfleet.compressors.base import Compressor, between, check_flag, room
from pyfleet.errors import ShapeError

_HEADER = struct.Struct("<QII")         # the key of the draw, the index of the first element, whether all were finite
_LARGEST = float(np.finfo(np.float32).max)


class Random(Compressor):
    """Every element with probability `ratio`, whatever its value; the others decode to 0.

    Which ones is a function of (seed, step, index in the bucket) alone, so that ranks choose the same and sums are as
    sparse as their terms. An encoding is 16 bytes and the values as `values` codes them, float32 without it. When
    anything in x is not finite, chosen or not, all of it decodes to NaN: chance must not hide that the step went wrong.

    Args:    ratio: 0 < ratio <= 1, rounded to a multiple of 2^-32.  seed: the same on every rank, 0 <= seed < 2^64.
             unbiased: send x / ratio, so that the expectation of what arrives is x. Error feedback sends x all the
             same: what is missing is made up for later, and the residual of x / ratio would grow with every step.
             values: what codes the values.
    Source:  Konecny et al. 2016, arXiv:1610.05492 (random masks); Stich et al. 2018, arXiv:1809.07599 (with feedback).
    """

    kind, route, takes_values = "random", "gather", True

    def __init__(self, ratio: float = 0.1, seed: int = 0, unbiased: bool = False, values: Compressor | None = None):
        between(self.kind, "ratio", ratio, 0, 1, above=True)
        between(self.kind, "seed", seed, 0, 2**64 - 1, integer=True)
        super().__init__(ratio=ratio, seed=seed, unbiased=check_flag(self.kind, "unbiased", unbiased), values=values)
        self._p = max(1, math.floor(ratio * 2**32 + 0.5)) / 2**32
        self._values = values

    def most_kept(self, n: int) -> int:
        """More than this many of n elements are never sent. Chance alone would ask for more once in 10^14 times."""
        mean = n * self._p
        return min(n, math.ceil(mean + 8 * math.sqrt(mean * (1 - self._p)) + 8))

    def wire_bytes(self, n: int) -> int:
        return _HEADER.size + self._value_bytes(self.most_kept(n))

    def encode(self, x: np.ndarray, out: np.ndarray, *, step: int = 0, offset: int = 0, stream: int = 0) -> int:
        room(out, self.wire_bytes(x.size))
        key = sparsify.draw_key(self.params["seed"], step)
        chosen = self._chosen(x.size, key, offset)
        values = np.empty(chosen.size, np.float32)
        sparsify.gather_values(x, chosen, values)
        if self.params["unbiased"] and self._p < 1:
            with np.errstate(over="ignore", invalid="ignore"):
                values /= np.float32(self._p)
        return self._write(key, values, out, sparsify.count_above(x, _LARGEST) == 0, step, offset, stream)

    def encode_feedback(self, grad: np.ndarray, residual: np.ndarray, out: np.ndarray, *, step: int = 0,
                        offset: int = 0, stream: int = 0) -> int:
        room(out, self.wire_bytes(grad.size))
        key = sparsify.draw_key(self.params["seed"], step)
        chosen = self._chosen(grad.size, key, offset)
        values = np.zeros(chosen.size, np.float32)
        finite = sparsify.absorb_at(residual, grad, chosen, values) == 0
        written = self._write(key, values, out, finite, step, offset, stream)
        if finite and self._values is not None and self._values.lossy:
            sparsify.settle(residual, grad, chosen, values, self._read_values(out[:written], chosen.size))
        return written

    def decode(self, data: np.ndarray, out: np.ndarray) -> None:
        found = self._read(data, out.size)
        if found is None:
            out.fill(np.nan)
        else:
            sparsify.put_values(out, *found)

    def decode_add(self, data: np.ndarray, out: np.ndarray, weight: float = 1.0) -> None:
        found = self._read(data, out.size)
        if found is None:
            out.fill(np.nan)
            return
        chosen, values = found
        if weight != 1.0:
            with np.errstate(over="ignore", invalid="ignore"):
                values *= np.float32(weight)
        sparsify.add_values(out, chosen, values)

    def _value_bytes(self, k: int) -> int:
        return 4 * k if self._values is None else self._values.wire_bytes(k)

    def _chosen(self, n: int, key: int, offset: int) -> np.ndarray:
        chosen = np.empty(self.most_kept(n), np.uint32)
        return chosen[:sparsify.draw(n, self._p, key, chosen, offset)]

    def _write(self, key: int, values: np.ndarray, out: np.ndarray, finite: bool, step: int, offset: int,
               stream: int) -> int:
        _HEADER.pack_into(out, 0, key, offset, finite)
        used = self._value_bytes(values.size)
        body = out[_HEADER.size:_HEADER.size + used]
        if self._values is None:
            np.copyto(body, values.view(np.uint8))
        else:
            start = offset // self._values.block * self._values.block       # it may begin at its blocks only
            self._values.encode(values, body, step=step, offset=start, stream=stream)
        return _HEADER.size + used

    def _read(self, data: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray] | None:
        """(indices, values), or None when not all of x was finite."""
        if data.size < _HEADER.size:
            raise ShapeError(f"{self.name}: an encoding has at least {_HEADER.size} bytes, got {data.size}")
        key, offset, finite = _HEADER.unpack_from(data)
        chosen = self._chosen(n, key, offset)
        if data.size != _HEADER.size + self._value_bytes(chosen.size):
            raise ShapeError(f"{self.name}: {chosen.size} values take {self._value_bytes(chosen.size)} bytes, "
                             f"got {data.size - _HEADER.size}")
        return (chosen, self._read_values(data, chosen.size)) if finite else None

    def _read_values(self, data: np.ndarray, k: int) -> np.ndarray:
        values, body = np.empty(k, np.float32), data[_HEADER.size:]
        if self._values is None:
            np.copyto(values.view(np.uint8), body)
        else:
            self._values.decode(body, values)
        return values
