"""P1: arrays as one row of numbers in numpy's terms, for engines that hand them to somebody else's collectives."""
from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from pyfleet.arrays import hold
from pyfleet.errors import DType, DTypeError, ReduceOp, ShapeError

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


HEAD = struct.Struct("<QQBBH256s")


class Head(NamedTuple):
    """What goes ahead of a message's elements, so that its receiver can make room.

    Attributes:
        number: of the message among those from its sender to its receiver.
        count:  of `Flat.data`.
    """

    number: int
    count: int
    dtype: DType
    parts: int
    note: bytes

    def pack(self) -> bytes:
        """HEAD.size bytes."""
        return HEAD.pack(self.number, self.count, self.dtype, self.parts, len(self.note), self.note)

    @classmethod
    def unpack(cls, data: bytes) -> Head:
        """The head that was packed."""
        number, count, dtype, parts, size, note = HEAD.unpack(data)
        return cls(number, count, DType(dtype), parts, note[:size])

    def scratch(self) -> Flat:
        """Memory for the elements of a message that nobody wants."""
        return Flat(np.empty(self.count, NUMPY[self.dtype]), self.dtype, self.parts, None, None)


def make_room(make: Callable[[bytes], Any], note: bytes, sent: Flat) -> tuple[Any, Flat]:
    """(what make returns for a message like `sent`, its elements).

    Raises:  what make raises; DTypeError, ShapeError when the message does not fit.
    """
    array = make(note)
    flat = flatten(array)
    if flat.type != sent.type:
        raise DTypeError(f"the array holds {flat.type}, and the message {sent.type}")
    if flat.count != sent.count:
        raise ShapeError(f"the array has {flat.count} elements, and the message {sent.count}")
    return array, flat


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


def simplify(data: np.ndarray, dtype: DType, op: int, native: set[str]) -> tuple[np.ndarray, int]:
    """Numbers and an op that lead to the same end where only SUM, MIN, MAX and PRODUCT of `native` dtypes are known.

    Returns data itself where nothing has to change. Minima and maxima of floats become those of integers in the same
    order, NaN beyond all: libraries compare floats in an order of their own, which loses NaN. `restore` goes back.
    """
    if op == ReduceOp.MEAN:
        op = ReduceOp.SUM
    if dtype == DType.BOOL:
        return data.view(np.uint8), ReduceOp.MAX if op in (ReduceOp.SUM, ReduceOp.MAX) else ReduceOp.MIN
    data = widen(data, dtype)
    if data.dtype.kind == "f" and op in (ReduceOp.MIN, ReduceOp.MAX):
        integer = np.int32 if data.itemsize == 4 else np.int64
        nan, limits = np.isnan(data), np.iinfo(integer)
        data = _mirror(data.view(integer))
        data[nan] = limits.max if op == ReduceOp.MAX else limits.min        # both are bits of a NaN when mirrored back
    if data.dtype.name not in native:
        data = data.astype(np.int32)        # a narrow integer: low bits of sums and products are the same
    return data, op


def restore(reduced: np.ndarray, dtype: DType, op: int, num_ranks: int) -> np.ndarray:
    """The result in the dtype's own form, from the reduction of what `simplify` gave; op is the one asked for."""
    if dtype == DType.BOOL:
        return reduced.view(np.bool_)
    if dtype in FLOATS and op in (ReduceOp.MIN, ReduceOp.MAX):
        reduced = _mirror(reduced).view(np.float32 if reduced.itemsize == 4 else np.float64)
    if op == ReduceOp.MEAN:
        reduced /= reduced.dtype.type(num_ranks)
    return narrow(reduced, dtype).astype(NUMPY[dtype], copy=False)


def _mirror(bits):
    """Between the bits of floats and integers in the same order; its own inverse."""
    return bits ^ ((bits >> (8 * bits.itemsize - 1)) & np.iinfo(bits.dtype).max)
