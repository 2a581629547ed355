"""P1: arrays as one row of numbers in numpy's terms, for engines that hand them to somebody else's collectives."""
from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from pyfleet.arrays import hold
from pyfleet.errors import DType, ReduceOp

NUMPY = {DType.FLOAT32: np.float32, DType.FLOAT64: np.float64, DType.FLOAT16: np.float16, DType.BFLOAT16: np.uint16,
         DType.INT8: np.int8, DType.INT16: np.int16, DType.INT32: np.int32, DType.INT64: np.int64,
         DType.UINT8: np.uint8, DType.BOOL: np.bool_}
ARITHMETIC = {ReduceOp.SUM: np.add, ReduceOp.MEAN: np.add, ReduceOp.MIN: np.minimum, ReduceOp.MAX: np.maximum,
              ReduceOp.PRODUCT: np.multiply}
LOGICAL = {ReduceOp.SUM: np.logical_or, ReduceOp.MIN: np.logical_and, ReduceOp.MAX: np.logical_or,
           ReduceOp.PRODUCT: np.logical_and}
FLOATS = {DType.FLOAT32, DType.FLOAT64, DType.FLOAT16, DType.BFLOAT16}


class Flat(NamedTuple):
    """An array as engines see it: its elements in C order, complex ones as pairs.

    Attributes:
        data:  (n,) over the array's memory: a numpy array, bfloat16 as uint16; or a tensor where the kind takes those.
        parts: 2 when pairs of elements are complex numbers, else 1.
        owner: what keeps the memory.
        bring_back: what to call after a change of `data`, or None.
    """

    data: Any
    dtype: DType
    parts: int
    owner: Any
    bring_back: Callable[[], None] | None

    @property
    def count(self) -> int:
        """Elements, as the user counts them."""
        return len(self.data) // self.parts

    @property
    def type(self) -> str:
        """The dtype's name."""
        name = self.dtype.name.lower()
        return name if self.parts == 1 else {"float32": "complex64", "float64": "complex128"}[name]


def flatten(x: Any, writable: bool = True) -> Flat:
    """x in host memory, where it lies or as a copy.

    Raises:  ShapeError, DTypeError as pyfleet.arrays.hold.
    """
    pin, bring_back = hold(x, writable)
    dtype = DType(pin.dtype)
    if not pin.count:
        return Flat(np.empty(0, NUMPY[dtype]), dtype, pin.parts, pin, bring_back)
    memory = (ctypes.c_char * pin.nbytes).from_address(pin.address)
    return Flat(np.frombuffer(memory, NUMPY[dtype]), dtype, pin.parts, pin, bring_back)


def widen(data: np.ndarray, dtype: DType) -> np.ndarray:
    """Half-width floats as new float32 numbers; everything else as it is."""
    if dtype == DType.FLOAT16:
        return data.astype(np.float32)
    if dtype == DType.BFLOAT16:
        return (data.astype(np.uint32) << 16).view(np.float32)
    return data


def narrow(wide: np.ndarray, dtype: DType) -> np.ndarray:
    """The inverse of `widen`: rounded to nearest, ties to even."""
    if dtype == DType.FLOAT16:
        with np.errstate(over="ignore"):
            return wide.astype(np.float16)
    if dtype == DType.BFLOAT16:
        bits = wide.view(np.uint32)
        rounded = (bits + (0x7FFF + (bits >> 16 & 1))) >> 16
        return np.where(np.isnan(wide), bits >> 16 | 0x40, rounded).astype(np.uint16)
    return wide


def fold(arrays: list[np.ndarray], dtype: DType, op: int) -> np.ndarray:
    """A new array: the reduction of flat arrays, one after the other; half-width floats in float32, rounded once.

    Booleans are logical: sum and max are or, product and min are and. MEAN divides once, at the end.
    """
    function = (LOGICAL if dtype == DType.BOOL else ARITHMETIC)[op]
    total = np.array(widen(arrays[0], dtype))
    with np.errstate(over="ignore", invalid="ignore"):
        for array in arrays[1:]:
            function(total, widen(array, dtype), out=total)
        if op == ReduceOp.MEAN:
            total /= total.dtype.type(len(arrays))
    return narrow(total, dtype)
