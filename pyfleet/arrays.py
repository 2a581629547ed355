"""P1: from the arrays that users hold to pinned memory, and from the arena to arrays that users hold."""
from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from fleetcore.arena import Pin

from pyfleet.errors import ConfigError, DType, DTypeError, ReduceOp, ShapeError

_TORCH_DTYPES: dict[Any, tuple[int, int]] = {}      # torch dtype -> (DType, elements of it per item), once torch is there
_strided: Any = None                                # torch.strided, likewise
_TORCH_NAMES = {"float32": DType.FLOAT32, "float64": DType.FLOAT64, "float16": DType.FLOAT16,
                "bfloat16": DType.BFLOAT16, "int8": DType.INT8, "int16": DType.INT16, "int32": DType.INT32,
                "int64": DType.INT64, "uint8": DType.UINT8, "bool": DType.BOOL}
_OPS = {op.lower(): code for op, code in ReduceOp.__members__.items()}


def reduce_op(op: Any) -> int:
    """The code of an op: a ReduceOp, its name in any case, or a torch.distributed.ReduceOp.

    Raises:  ConfigError for anything else.
    """
    if type(op) is ReduceOp:
        return op
    if isinstance(op, int) and 0 <= op < len(ReduceOp):
        return int(op)
    code = _OPS.get(str(op).rpartition(".")[2].lower())
    if code is None:
        raise ConfigError(f"unknown reduction {op!r}: one of {', '.join(_OPS)}")
    return int(code)


def is_tensor(x: Any) -> bool:
    """Whether x is a torch tensor, without importing torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def torch_dtype_code(dtype: Any) -> tuple[int, int] | None:
    """(DType code, elements per item) of a torch dtype; None when it is not offered."""
    global _strided
    if not _TORCH_DTYPES:
        import torch
        _strided = torch.strided
        _TORCH_DTYPES.update({getattr(torch, name): (int(code), 1) for name, code in _TORCH_NAMES.items()})
        _TORCH_DTYPES[torch.complex64] = (int(DType.FLOAT32), 2)
        _TORCH_DTYPES[torch.complex128] = (int(DType.FLOAT64), 2)
    return _TORCH_DTYPES.get(dtype)


def hold(x: Any, writable: bool = True) -> tuple[Any, Callable[[], None] | None]:
    """(what Group verbs take, what to call afterwards to bring the result back into x, or None).

    Contiguous host memory is used where it lies. Other layouts, and tensors on a device, go through a copy.

    Raises:  ShapeError for read-only or sparse arrays; DTypeError for element types that are not offered.
    """
    if type(x) is np.ndarray:
        return _hold_array(x, writable)
    if is_tensor(x):
        return _hold_tensor(x)
    if isinstance(x, np.ndarray):
        return _hold_array(x, writable)
    if isinstance(x, (list, tuple, int, float, complex, str, bytes)) or x is None:
        raise DTypeError(f"cannot communicate a {type(x).__name__} in place: pass a numpy array or a torch tensor")
    return Pin(x, writable), None


def _hold_array(x, writable):
    flags = x.flags
    if flags.c_contiguous and flags.aligned:
        return Pin(x, writable), None
    if writable and not flags.writeable:
        raise ShapeError("the array is read-only")
    copy = np.array(x, order="C")
    return Pin(copy, writable), (lambda: np.copyto(x, copy)) if writable else None


def _hold_tensor(x):
    known = _TORCH_DTYPES.get(x.dtype) or torch_dtype_code(x.dtype)
    if known is None:
        raise DTypeError(f"tensors of {x.dtype} are not offered")
    code, parts = known
    if parts == 1 and x.is_cpu and x.layout is _strided and x.is_contiguous() and not x.is_neg():        # the usual case, where microseconds count
        return Pin.at(x.data_ptr(), x.numel(), code, x, 1), None
    import torch
    if x.layout is not torch.strided or x.is_meta:
        raise ShapeError(f"a {'meta' if x.is_meta else x.layout} tensor has no dense memory: pass x.to_dense()")
    plain = x.device.type == "cpu" and x.is_contiguous() and not x.is_conj() and not x.is_neg()
    data = x.detach()
    copy = data if plain else data.resolve_conj().resolve_neg().to("cpu", copy=True,
                                                                  memory_format=torch.contiguous_format)
    pin = Pin.at(copy.data_ptr(), copy.numel() * parts, code, copy, parts)
    return pin, None if plain else lambda: data.copy_(copy)


def from_buffer(buffer: Any, shape: Any, dtype: Any = None, like: str = "torch") -> Any:
    """An array over an arena buffer, which it keeps alive.

    Args:    shape: an int or a tuple.  dtype: a torch or numpy dtype or a common name; None is float32.
             like: "torch" or "numpy".
    """
    shape = (int(shape),) if np.ndim(shape) == 0 else tuple(int(n) for n in shape)
    if like == "numpy":
        kind = np.dtype(dtype_name(dtype))
        count = int(np.prod(shape, dtype=np.int64))
        return np.frombuffer(buffer, kind, count).reshape(shape)
    import torch
    kind = getattr(torch, dtype_name(dtype))
    count = int(np.prod(shape, dtype=np.int64))
    if count == 0:
        return torch.empty(shape, dtype=kind)
    return torch.frombuffer(buffer, dtype=kind, count=count).reshape(shape)


def dtype_name(dtype: Any) -> str:
    """The common name of a numpy or torch dtype ("float32"); None is float32.

    Raises:  DTypeError for what is not offered.
    """
    if dtype is None:
        return "float32"
    name = str(dtype).rpartition(".")[2] if str(dtype).startswith("torch.") else None
    if name is None and dtype == "bfloat16":
        name = "bfloat16"
    if name is None:
        try:
            name = np.dtype(dtype).name
        except TypeError:
            name = str(dtype)
    if name not in _TORCH_NAMES and name not in ("complex64", "complex128"):
        raise DTypeError(f"dtype {dtype!r} is not offered: one of {', '.join(_TORCH_NAMES)}, complex64, complex128")
    return name


def item_bytes(dtype: Any) -> int:
    """Bytes of one element of a dtype."""
    name = dtype_name(dtype)
    return 2 if name == "bfloat16" else np.dtype(name).itemsize


def check_shape(shape: Any) -> int:
    """The number of elements of a shape.

    Raises:  ShapeError for negative or non-integer sizes.
    """
    try:
        sizes = [shape.__index__()] if hasattr(shape, "__index__") else [n.__index__() for n in shape]
    except (TypeError, AttributeError):
        raise ShapeError(f"a shape is an int or a tuple of ints, not {shape!r}") from None
    if any(n < 0 for n in sizes):
        raise ShapeError(f"a shape has no negative sizes: {shape!r}")
    count = 1
    for n in sizes:
        count *= n
    return count


def kind(x: Any) -> str:
    """"torch" or "numpy": what an array like x is.

    Raises:  DTypeError for what is no array.
    """
    if is_tensor(x):
        return "torch"
    if isinstance(x, np.ndarray):
        return "numpy"
    raise DTypeError(f"cannot communicate a {type(x).__name__}: pass a numpy array or a torch tensor")


def describe(x: Any) -> dict:
    """What another rank must know to make an array like x; JSON-like.

    Raises:  DTypeError for what is no array, or of a dtype that is not offered.
    """
    return {"kind": kind(x), "dtype": dtype_name(x.dtype), "shape": list(x.shape)}


def blank(note: dict, like: Any = None) -> Any:
    """A new array as `describe` said; its contents are unspecified.

    Args:    like: an array whose kind and device it gets; None for the note's kind, on the CPU.
    Raises:  DTypeError, ShapeError for a note that makes no sense.
    """
    name, shape = dtype_name(note["dtype"]), tuple(note["shape"])
    check_shape(shape)
    if (kind(like) if like is not None else note["kind"]) == "numpy" and name != "bfloat16":
        return np.empty(shape, name)
    import torch
    return torch.empty(shape, dtype=getattr(torch, name), device=like.device if is_tensor(like) else "cpu")


def join(parts: list) -> Any:
    """The elements of the arrays one after the other, as one flat array.

    Raises:  DTypeError when they differ in kind or dtype.
    """
    if len({(kind(part), str(part.dtype)) for part in parts}) > 1:
        raise DTypeError(f"the parts differ in dtype: {', '.join(sorted({str(part.dtype) for part in parts}))}")
    if kind(parts[0]) == "numpy":
        return parts[0].reshape(-1) if len(parts) == 1 else np.concatenate([part.reshape(-1) for part in parts])
    import torch
    flat = [part.detach().reshape(-1) for part in parts]
    return flat[0] if len(flat) == 1 else torch.cat(flat)


def split(flat: Any, shapes: list) -> list:
    """Views of a flat array with these shapes, one after the other."""
    parts, start = [], 0
    for shape in shapes:
        count = int(np.prod(shape, dtype=np.int64))
        parts.append(flat[start:start + count].reshape(tuple(shape)))
        start += count
    return parts
