"""The contract of a compressor: how a bucket of gradients becomes wire bytes, and how those bytes combine.

Routes, which the reducer knows and a compressor only names:

* "reduce": the encoding is an array of `wire_dtype`, as many elements as x, that an all-reduce can sum as it is.
* "gather": every rank's encoding goes to every rank, which adds them up with decode_add in rank order.
* "shard":  x is cut at multiples of `block`; each owner adds up the encodings of its segment, encodes the sum once more,
            and everyone, the owner too, decodes those bytes.
* "own":    the compressor makes its own small all-reduces: `exchange`.

One instance serves one bucket: the same n elements, step after step. Where `stateful` is False it may serve many.
"""
from __future__ import annotations

import hashlib
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
from fleetcore.kernels.quantize import (
    BLOCK_ELEMS,
    decode_add_array,
    decode_array,
    encode_array,
    encode_feedback_array,
    encoding_bytes,
    settle_array,
)

from pyfleet.errors import ConfigError, DType, ShapeError

ROUTES = ("reduce", "gather", "shard", "own")


class Compressor(ABC):
    """Turns float32 (n,) into bytes and back. A new kind is one file with a subclass, and one row in COMPRESSORS.

    A subclass names its parameters in its constructor's signature and hands them to this one, so that `name` and `fresh`
    know them. Arrays are numpy, C-contiguous; byte buffers are uint8 arrays that begin at a multiple of 4 bytes; nothing
    overlaps. An encoding needs nothing but n to be decoded: seeds, indices and scales travel in it.

    Not-a-number and infinity never become finite: where x holds one, decoding yields a NaN or an infinity at that element
    at least (a kind may spoil the elements that share a scale with it).

    Attributes:
        kind:       the row in COMPRESSORS.
        route:      one of ROUTES, see above.
        lossy:      whether decoding can differ from what was encoded; error feedback then makes up for it.
        stateful:   whether encodings depend on earlier ones (state_dict holds what they depend on).
        block:      elements that are coded together; x may be cut at multiples of it, and the pieces encode as the whole.
        wire_dtype: of the "reduce" route's arrays; None elsewhere.
        momentum:   what error feedback multiplies the velocity by each step; 0: it has none. Kinds with `sent` may have one.
        takes_values: whether the constructor has a parameter `values`: the Compressor that codes the values it selects.
        params:     the constructor's arguments.
    """

    kind: ClassVar[str]
    route: ClassVar[str]
    lossy: ClassVar[bool] = True
    stateful: ClassVar[bool] = False
    block: ClassVar[int] = 1
    wire_dtype: ClassVar[DType | None] = None
    momentum: float = 0.0
    takes_values: ClassVar[bool] = False

    def __init__(self, **params: Any):
        self.params = params

    @property
    def name(self) -> str:
        """The shortest specification that parse_spec turns into this compressor: "quantize(num_bits=6)", "topk+fp16"."""
        defaults = inspect.signature(type(self)).parameters
        said = [f"{key}={value}" for key, value in self.params.items()
                if key != "values" and value != defaults[key].default]
        values = self.params.get("values")
        return self.kind + (f"({', '.join(said)})" if said else "") + (f"+{values.name}" if values is not None else "")

    def fresh(self) -> Compressor:
        """A compressor with the same parameters and no state, for another bucket."""
        return type(self)(**{key: value.fresh() if isinstance(value, Compressor) else value
                             for key, value in self.params.items()})

    def bind(self, shapes: Sequence[tuple[int, ...]]) -> None:
        """Learn the shapes of the tensors that lie one after the other in x. Kinds that do not care need not be told."""

    @abstractmethod
    def wire_bytes(self, n: int) -> int:
        """Most bytes that encode writes for n elements; exactly those on the routes "reduce" and "shard".

        "own": bytes that exchange hands to its all-reduces.
        """

    def settled_bytes(self, n: int) -> int:
        """As wire_bytes, of encodings late in a training, where early ones are larger."""
        return self.wire_bytes(n)

    @abstractmethod
    def encode(self, x: np.ndarray, out: np.ndarray, *, step: int = 0, offset: int = 0, stream: int = 0) -> int:
        """Write x to out and return the number of bytes written.

        Args:    x: (n,) float32; left as it was.  out: uint8, >= wire_bytes(n).
                 step, offset, stream: what chance may depend on besides the `seed` parameter: the number of the step, the
                 index of x[0] in the bucket (a multiple of `block`), and who encodes (the rank; another number for the
                 owner of a sum). Kinds whose ranks must agree on a choice leave `stream` out of it.
        Raises:  ShapeError for arrays that are not as the class says, or an `out` that is too small.
        """

    @abstractmethod
    def decode(self, data: np.ndarray, out: np.ndarray) -> None:
        """Overwrite out, (n,) float32, with what `data` stands for.

        Args:    data: exactly the bytes that encode wrote for n elements. They may come from anywhere: bytes that no encode
                 wrote give some values or a ShapeError, and never touch memory outside `out`.
        Raises:  ShapeError when `data` cannot be an encoding of n elements.
        """

    def decode_add(self, data: np.ndarray, out: np.ndarray, weight: float = 1.0) -> None:
        """out += weight * decode(data), in float32, two roundings. Arguments and errors as for decode."""
        values = np.empty_like(out)
        self.decode(data, values)
        with np.errstate(over="ignore", invalid="ignore"):
            if weight != 1.0:
                values *= np.float32(weight)
            out += values

    def encode_feedback(self, grad: np.ndarray, residual: np.ndarray, out: np.ndarray, *, step: int = 0, offset: int = 0,
                        stream: int = 0) -> int:
        """encode(grad + residual), then residual = grad + residual - decoded. Arguments and errors as for encode.

        The difference is taken of the exact sum and rounded once (see settle_array), so that nothing drifts: what a step
        sends and what it keeps differ from what it was given by at most half a unit in the last place of what it keeps.
        Elements that decode to no finite number keep the residual they had: after a step that has to be skipped, nothing
        is lost.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            x = grad + residual
        written = self.encode(x, out, step=step, offset=offset, stream=stream)
        self.decode(out[:written], x)
        settle_array(grad, residual, x)
        return written

    def sent(self, data: np.ndarray, n: int) -> np.ndarray:
        """The indices of the elements that an encoding of n carries, for kinds that select.

        Raises:  ConfigError for others; ShapeError as decode.
        """
        raise ConfigError(f"{self.name} does not select elements")

    def exchange(self, x: np.ndarray, all_reduce: Callable[[np.ndarray], None], num_ranks: int, *, step: int = 0) -> None:
        """Route "own": replace x by the mean over all ranks, as far as the compressor carries it; the same bits everywhere.

        Args:    x: (n,) float32.  all_reduce: replaces a float32 array, in place, by its sum over num_ranks ranks.
        """
        raise ConfigError(f"{self.name} takes the route {self.route!r}; only \"own\" has an exchange")

    def state_dict(self) -> dict[str, Any]:
        """What later encodings depend on: plain numbers, strings and arrays; {} without state."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state_dict of a compressor with the same parameters.

        Raises:  ConfigError for a state that is not this kind's.
        """
        if state:
            raise ConfigError(f"{self.name} has no state, got {sorted(state)}")

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}>"


class BlockCode(Compressor):
    """A code of fleetcore.kernels.quantize: blocks of 256 elements that share a scale, error at most half a step of it.

    A block that holds a NaN or an infinity decodes to NaN altogether. Subclasses set `_code`; those that round at random
    set `_seed`, and round as a function of (seed, step, stream, index of the element).
    """

    route, block = "shard", BLOCK_ELEMS
    _code: int
    _seed: int | None = None

    def wire_bytes(self, n: int) -> int:
        return encoding_bytes(self._code, n)

    def encode(self, x: np.ndarray, out: np.ndarray, *, step: int = 0, offset: int = 0, stream: int = 0) -> int:
        return encode_array(self._code, x, out, self._key(step, stream), offset)

    def encode_feedback(self, grad: np.ndarray, residual: np.ndarray, out: np.ndarray, *, step: int = 0, offset: int = 0,
                        stream: int = 0) -> int:
        return encode_feedback_array(self._code, grad, residual, out, self._key(step, stream), offset)

    def decode(self, data: np.ndarray, out: np.ndarray) -> None:
        decode_array(self._code, data, out)

    def decode_add(self, data: np.ndarray, out: np.ndarray, weight: float = 1.0) -> None:
        decode_add_array(self._code, data, out, weight)

    def _key(self, step: int, stream: int) -> int | None:
        return None if self._seed is None else mix_seed(self._seed, step, stream)


def mix_seed(*numbers: int) -> int:
    """64 bits that any of the integers changes altogether; the same on every machine."""
    text = ",".join(str(int(number)) for number in numbers).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def between(kind: str, key: str, value: Any, low: float, high: float, *, integer: bool = False, above: bool = False) -> Any:
    """Return value as an int or a float when low <= value <= high (low < value with above=True).

    Raises:  ConfigError naming the kind, the parameter and the accepted range.
    """
    try:
        if isinstance(value, bool) or (integer and not hasattr(value, "__index__")):
            raise TypeError
        number = int(value) if integer else float(value)
        fits = math.isfinite(number) and low <= number <= high and not (above and number == low)
    except (TypeError, ValueError, OverflowError):
        fits = False
    if not fits:
        what = "an integer" if integer else "a number"
        raise ConfigError(f"{kind}: {key} must be {what} {f'> {low:g}' if above else f'>= {low:g}'} and <= {high:g}, "
                          f"got {value!r}")
    return number


def check_flag(kind: str, key: str, value: Any) -> bool:
    """Return value when it is True or False.

    Raises:  ConfigError for anything else.
    """
    if not isinstance(value, bool):
        raise ConfigError(f"{kind}: {key} must be True or False, got {value!r}")
    return value


def room(out: np.ndarray, needed: int) -> np.ndarray:
    """The first `needed` bytes of out.

    Raises:  ShapeError when there are fewer.
    """
    if out.size < needed:
        raise ShapeError(f"the encoding takes {needed} bytes, out has {out.size}")
    return out[:needed]


def expect(data: np.ndarray, num_bytes: int) -> None:
    """Check that an encoding is as long as it must be.

    Raises:  ShapeError when it is not.
    """
    if data.size != num_bytes:
        raise ShapeError(f"an encoding of these elements takes {num_bytes} bytes, got {data.size}")
