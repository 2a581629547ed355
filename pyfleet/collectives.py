"""P3: the functional API: collective calls over the fleet in force."""
from __future__ import annotations

from typing import Any

import numpy as np

from pyfleet import engines
from pyfleet.arrays import check_shape, from_buffer, is_tensor, item_bytes
from pyfleet.engines import Work
from pyfleet.errors import ConfigError, ReduceOp, ShapeError


def all_reduce(x: Any, op: Any = ReduceOp.SUM, *, group: Any = None, async_op: bool = False, algorithm: str = "auto",
               compression: Any = None, timeout: float | None = None) -> Work | None:
    """Replace x by its reduction over all ranks; the same bits on every rank.

    Args:    x: numpy array, torch tensor or writable contiguous buffer, equal in size and dtype on all ranks. float64,
             float32, float16, bfloat16, int8 to int64, uint8, bool (logical), complex as pairs (sum and mean).
             op: "sum", "mean", "min", "max", "product". float16 and bfloat16 are summed in float32 and rounded once.
             async_op: return a Work at once; x must be left alone until it is done.
             algorithm: "auto", "ring", "direct" or "tree" between hosts.  timeout: seconds for this call.
    Raises:  PeerLost, Timeout, OutOfStep, DTypeError, ShapeError, ConfigError.
    """
    if compression not in (None, "none"):
        raise ConfigError(f"compression {compression!r} is not one of: none")
    engine = _engine(group)
    if async_op:
        return engine.submit("all_reduce", x, op, algorithm=algorithm, timeout=timeout)
    engine.all_reduce(x, op, algorithm=algorithm, timeout=timeout)


def all_reduce_sum(x: Any) -> Any:
    """A new array: the sum of x over all ranks."""
    return _reduced(x, ReduceOp.SUM, "auto")


def all_reduce_mean(x: Any) -> Any:
    """A new array: the mean of x over all ranks."""
    return _reduced(x, ReduceOp.MEAN, "auto")


def ring_all_reduce(x: Any) -> Any:
    """A new array: the MEAN of x over all ranks, over the ring where there are links."""
    return _reduced(x, ReduceOp.MEAN, "ring")


def broadcast(x: Any, src: int = 0, *, group: Any = None, async_op: bool = False,
              timeout: float | None = None) -> Work | None:
    """Replace x by rank src's x, which has the same size and dtype.

    Raises:  PeerLost, Timeout, OutOfStep, DTypeError, ShapeError, ConfigError.
    """
    engine = _engine(group)
    if async_op:
        return engine.submit("broadcast", x, src, timeout=timeout)
    engine.broadcast(x, src, timeout=timeout)


def barrier(*, group: Any = None, async_op: bool = False, timeout: float | None = None) -> Work | None:
    """Return once every rank has called it.

    Raises:  PeerLost, Timeout, OutOfStep.
    """
    engine = _engine(group)
    if async_op:
        return engine.submit("barrier", timeout=timeout)
    engine.barrier(timeout=timeout)


def empty(shape: Any, dtype: Any = None, *, like: str = "torch") -> Any:
    """An array in memory that the ranks of this host share: collectives on it copy nothing. Contents are unspecified.

    Args:    shape: int or tuple.  dtype: torch or numpy dtype or name; float32 when None.  like: "torch" or "numpy".
    Raises:  MemoryError when the arena is full; DTypeError, ShapeError, ConfigError.
    """
    if like not in ("torch", "numpy"):
        raise ConfigError(f"like must be 'torch' or 'numpy', not {like!r}")
    if like == "numpy" and str(dtype).endswith("bfloat16"):
        raise ConfigError("numpy has no bfloat16: use like='torch'")
    buffer = _engine(None).allocate(max(1, check_shape(shape) * item_bytes(dtype)))
    return from_buffer(buffer, shape, dtype, like)


def zeros(shape: Any, dtype: Any = None, *, like: str = "torch") -> Any:
    """As empty(), filled with zeros."""
    array = empty(shape, dtype, like=like)
    array[...] = 0
    return array


def from_numpy(x: np.ndarray) -> np.ndarray:
    """A copy of x in shared memory."""
    array = empty(x.shape, x.dtype, like="numpy")
    array[...] = x
    return array


def register(x: Any) -> Any:
    """Move a CPU tensor's memory into shared memory, in place, and return it; a numpy array is copied instead.

    Other views of the tensor's old storage keep the old memory.

    Raises:  ShapeError for tensors that are not on the CPU; DTypeError for what is no array.
    """
    if not is_tensor(x):
        return from_numpy(np.asarray(x))
    if x.device.type != "cpu" or x.layout.__str__() != "torch.strided":
        raise ShapeError(f"only dense CPU tensors can be registered, not one on {x.device}")
    shared = empty(tuple(x.shape), x.dtype)
    data = x.detach()
    shared.copy_(data)
    x.data = shared
    return x


def _engine(group):
    if group is not None:
        raise ConfigError("sub-groups are not offered yet: leave group out")
    return engines.current()


def _reduced(x, op, algorithm):
    result = x.detach().clone() if is_tensor(x) else np.array(x)
    _engine(None).all_reduce(result, op, algorithm=algorithm)
    return result
