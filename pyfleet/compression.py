"""P2: gradients to bytes and back on their own, for scripts that do their own sending."""
from __future__ import annotations

import struct
from typing import Any

import numpy as np

from pyfleet.arrays import dtype_name, is_tensor
from pyfleet.compressors import Compressor, parse_spec
from pyfleet.compressors.feedback import ErrorFeedback
from pyfleet.config import nearest
from pyfleet.errors import ConfigError, CorruptData, DTypeError, ShapeError

# A payload: magic, version, what it came from (0 numpy, 1 torch), dtype, dimensions, characters of the compressor's name;
# sizes (u64); the name; zeros up to a multiple of 8, because encodings begin aligned; the encoding. Little-endian.
_HEAD = struct.Struct("<4sBBBBB")
_MAGIC, _VERSION = b"pfgc", 1
_DTYPES = ("float32", "float64", "float16", "bfloat16")     # in the order of errors.DType; the last one only torch has
_MAX_DIMS = 32              # numpy before 2.0 has no more
_MAX_ELEMS = 2**48          # more than any memory holds, and no sum of bytes overflows 64 bits
_LEAST_FILL = 1 / 64        # of the most that a selection may take; its indices pack to a fifth of that at best


class GradientCompressor:
    """Turns gradients into bytes with a shape and a dtype, and back.

    compress(g) -> bytes and decompress(b) -> array are each other's inverse, as far as the compressor is lossless. With
    error feedback the sum of everything decompressed, plus `residual(name)`, is the sum of everything compressed.
    Computes in float32, whatever the gradient's dtype.

    Args:    compression: a specification ("topk", "int8", "topk+fp16": see pyfleet.compressors.parse_spec), or a
             Compressor. error_feedback: send later what a lossy compressor leaves out.  parameters: as the kind has them,
             such as ratio=0.1.
    Raises:  ConfigError naming the nearest known kind or parameter, or the accepted range.
    """

    def __init__(self, compression: str | Compressor = "none", error_feedback: bool = False, **parameters: Any):
        if not isinstance(error_feedback, bool):
            raise ConfigError(f"error_feedback must be True or False, got {error_feedback!r}")
        self._compressor = parse_spec(compression, **parameters)
        offered = {key for each in _chain(self._compressor) for key in each.params if key != "values"}
        for key in parameters:
            if key not in offered or isinstance(compression, Compressor):
                raise ConfigError(f"the compression {self.name} takes no parameter {key!r}{nearest(key, offered)}")
        if self._compressor.route == "own":
            raise ConfigError(f"{self.name} compresses within an all-reduce: there are no bytes to hand out")
        self.error_feedback = error_feedback and self._compressor.lossy
        self._slots: dict[str, tuple[Compressor, int]] = {}     # by name: what compresses it, and steps so far

    @property
    def name(self) -> str:
        """The compressor's specification; only payloads of the same one are decompressed."""
        return self._compressor.name

    def compress(self, g: Any, name: str = "") -> bytes:
        """The bytes of one gradient.

        Args:    g: a numpy array or torch tensor of floating point, any shape and layout; left as it was.
                 name: which gradient this is, where there are several: each has its own residual and random numbers.
        Raises:  DTypeError for other elements; ShapeError when a gradient with a residual comes in another size.
        """
        values, shape, dtype, from_torch = _flat(g)
        compressor, step = self._slot(name, values.size)
        title = self.name.encode()
        head = _HEAD.pack(_MAGIC, _VERSION, from_torch, _DTYPES.index(dtype), len(shape), len(title))
        head += struct.pack(f"<{len(shape)}Q", *shape) + title
        head += bytes(-len(head) % 8)
        payload = np.empty(len(head) + compressor.wire_bytes(values.size), np.uint8)
        payload[:len(head)] = np.frombuffer(head, np.uint8)
        written = compressor.encode(values, payload[len(head):], step=step)
        self._slots[name] = (compressor, step + 1)
        return payload[:len(head) + written].tobytes()

    def decompress(self, payload: Any) -> Any:
        """The gradient that a payload of the same compression stands for: shape, dtype and library are those of the original.

        Args:    payload: bytes or any contiguous buffer. A tensor comes back on the CPU.
        Raises:  ConfigError for a payload of another compression; CorruptData for what is no payload.
        """
        data = np.frombuffer(payload, np.uint8)
        shape, dtype, from_torch, title, start = _read_head(data)
        if title != self.name:
            raise ConfigError(f"the payload was compressed with {title!r}, this is {self.name!r}")
        num_elems = 1
        for size in shape:
            num_elems *= size
        encoding = data[start:]
        if encoding.ctypes.data % 4:
            encoding = encoding.copy()
        _demand_plausible(self._compressor, num_elems, encoding.size)
        values = np.empty(num_elems, np.float32)
        try:
            self._compressor.decode(encoding, values)
        except ShapeError as error:
            raise CorruptData(f"the payload of a {dtype}{list(shape)} is damaged: {error}") from None
        return _restored(values, shape, dtype, from_torch)

    def residual(self, name: str = "") -> np.ndarray:
        """What has not been sent yet of a gradient: (n,) float32, flat; empty before its first compress.

        Raises:  ConfigError without error feedback.
        """
        if not self.error_feedback:
            raise ConfigError(f"{self.name} keeps no residual: pass error_feedback=True to a lossy compression")
        slot = self._slots.get(name)
        return slot[0].residual.copy() if slot is not None else np.empty(0, np.float32)

    def state_dict(self) -> dict[str, Any]:
        """Residuals and numbers of steps by name: plain numbers, strings and arrays."""
        return {"compression": self.name, "error_feedback": self.error_feedback,
                "slots": {name: {"num_elems": compressor.residual.size if self.error_feedback else 0, "step": step,
                                 "state": compressor.state_dict()}
                          for name, (compressor, step) in self._slots.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state_dict.

        Raises:  ConfigError when it is of another compression.
        """
        said = (state.get("compression"), state.get("error_feedback"))
        if said != (self.name, self.error_feedback):
            raise ConfigError(f"this is a state of {said[0]!r} with error_feedback={said[1]}, not of {self.name!r} with "
                              f"error_feedback={self.error_feedback}")
        self._slots = {}
        for name, slot in state["slots"].items():
            compressor, _ = self._slot(name, slot["num_elems"])
            compressor.load_state_dict(slot["state"])
            self._slots[name] = (compressor, slot["step"])

    def _slot(self, name: str, num_elems: int) -> tuple[Compressor, int]:
        slot = self._slots.get(name)
        if slot is None:
            inner = self._compressor.fresh()
            return (ErrorFeedback(inner, num_elems) if self.error_feedback else inner), 0
        if self.error_feedback and slot[0].residual.size != num_elems:
            raise ShapeError(f"the gradient {name!r} had {slot[0].residual.size} elements and now has {num_elems}: give each "
                             "gradient a name of its own")
        return slot


def quantize_gradients(g: Any, num_bits: int = 8) -> Any:
    """g as it looks after num_bits per element: a new array of the same library, shape and dtype.

    Per block of 256 elements the error is at most half a step of largest / (2 ** (num_bits - 1) - 1); one bit is the sign
    times the block's mean magnitude.

    Args:    g: a numpy array or torch tensor of floating point.  num_bits: 1 to 8.
    Raises:  ConfigError, DTypeError.
    """
    compressor = GradientCompressor("quantize", num_bits=num_bits)
    return compressor.decompress(compressor.compress(g))


def sparsify_gradients(g: Any, sparsity: float = 0.99) -> Any:
    """g with all but its largest elements set to 0: a new array of the same library, shape and dtype.

    Args:    g: a numpy array or torch tensor of floating point.
             sparsity: the share that is dropped, 0 <= sparsity < 1; ceil((1 - sparsity) * n) of n elements stay.
    Raises:  ConfigError, DTypeError.
    """
    compressor = GradientCompressor("topk", sparsity=sparsity)
    return compressor.decompress(compressor.compress(g))


def _chain(compressor: Compressor) -> list[Compressor]:
    values = compressor.params.get("values")
    return [compressor] + (_chain(values) if values is not None else [])


def _flat(g: Any) -> tuple[np.ndarray, tuple[int, ...], str, bool]:
    """((n,) float32 in C order, shape, dtype name, whether it is a tensor)."""
    if not is_tensor(g) and not isinstance(g, np.ndarray):
        raise DTypeError(f"cannot compress a {type(g).__name__}: pass a numpy array or a torch tensor")
    dtype, shape = dtype_name(g.dtype), tuple(g.shape)
    if dtype not in _DTYPES or (dtype == "bfloat16" and not is_tensor(g)):
        raise DTypeError(f"cannot compress elements of {g.dtype}: one of float16, float32, float64, torch.bfloat16")
    if len(shape) > _MAX_DIMS:
        raise ShapeError(f"at most {_MAX_DIMS} dimensions, got {len(shape)}")
    if is_tensor(g):
        import torch

        if g.layout is not torch.strided or g.is_meta:
            raise ShapeError(f"a {'meta' if g.is_meta else g.layout} tensor has no dense memory: pass g.to_dense()")
        return g.detach().to("cpu", torch.float32).contiguous().reshape(-1).numpy(), shape, dtype, True
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(g, np.float32).reshape(-1), shape, dtype, False


def _restored(values: np.ndarray, shape: tuple[int, ...], dtype: str, from_torch: bool) -> Any:
    if not from_torch:
        with np.errstate(over="ignore"):
            return values.reshape(shape).astype(dtype, copy=False)
    import torch

    return torch.from_numpy(values).reshape(shape).to(getattr(torch, dtype))


def _read_head(data: np.ndarray) -> tuple[tuple[int, ...], str, bool, str, int]:
    """(shape, dtype name, whether it was a tensor, the compressor's name, where the encoding begins)."""
    start = data[:_HEAD.size].tobytes()
    if len(start) < _HEAD.size or not start.startswith(_MAGIC):
        raise CorruptData("this is no payload of a GradientCompressor")
    _, version, from_torch, dtype, num_dims, num_chars = _HEAD.unpack(start)
    if version != _VERSION:
        raise CorruptData(f"the payload has version {version}, this is {_VERSION}")
    end = _HEAD.size + 8 * num_dims + num_chars
    known = len(_DTYPES) if from_torch else len(_DTYPES) - 1
    if from_torch > 1 or dtype >= known or num_dims > _MAX_DIMS or end + -end % 8 > data.size:
        raise CorruptData("the head of the payload is damaged")
    rest = data[_HEAD.size:end].tobytes()
    title = rest[8 * num_dims:].decode("ascii", "replace")
    return struct.unpack(f"<{num_dims}Q", rest[:8 * num_dims]), _DTYPES[dtype], bool(from_torch), title, end + -end % 8


def _demand_plausible(compressor: Compressor, num_elems: int, num_bytes: int) -> None:
    """Refuse a shape that the encoding cannot fill before memory is taken for it: heads may come from anywhere."""
    most = compressor.wire_bytes(num_elems) if num_elems <= _MAX_ELEMS else -1
    least = compressor.settled_bytes(num_elems) * _LEAST_FILL - 64 if most >= 0 and compressor.route == "gather" else most
    if not least <= num_bytes <= most:
        raise CorruptData(f"{num_bytes} bytes are no encoding of {num_elems} elements")
