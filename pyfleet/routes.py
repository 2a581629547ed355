"""P2: an all-reduce in compressed form: how encodings travel and combine, route by route.

What the routes are, base.Compressor says. Two things hold on all of them: every rank computes the result from the same
bytes in the same order, so it is the same to the bit; and the array is overwritten only once everything has come.

Where hosts have several ranks, memory carries float32 within them and only what passes between hosts is compressed: each
rank sums up a segment of its host's arrays, the ranks with the same segment take the route, and each host puts its array
together again.

A call is several calls of the engine, so it belongs on the engine's communication thread: engine.submit(all_reduce, ...).
There nothing can come in between, and one call's memory may be the next one's. Between hosts the route "shard" takes large
buckets in pieces, so that another thread codes one while the wire has the next; what is cut where changes no bit.
"""
from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any
from zlib import crc32

import numpy as np

from pyfleet.arrays import dtype_name, from_buffer, is_tensor, reduce_op
from pyfleet.choice import AUTO, WITH_FEEDBACK, WITHOUT_FEEDBACK, Choice, decide
from pyfleet.compressors import Compressor, parse_spec
from pyfleet.compressors.feedback import ErrorFeedback
from pyfleet.connections import Deadline
from pyfleet.errors import ConfigError, DType, DTypeError, OutOfStep, ReduceOp, ShapeError

SLOT_BYTES = 4              # encodings begin at multiples of this: they hold words (see base.Compressor)
PIECE_BYTES = 8 << 20       # of float32: on a gigabit link this takes ten times what coding it does, and what starting does
MAX_PIECES = 8
_FLOATS = ("float16", "float32", "float64", "bfloat16")
_SPARE = 1 / 8              # of a buffer that had to grow: encodings of some kinds differ in length from step to step


class CompressedAllReduce:
    """The all-reduce of one bucket, step after step.

    What the compressor remembers (residuals, its state, the number of the step) is that of this bucket. Every rank makes
    the same calls with the same compression; after one that failed, `rollback` goes back to the last commit.

    Args:    engine: whose ranks take part.  compression: a specification, or a Compressor: it is used itself, and by
             nobody else.  num_elems: of the bucket.  op: "sum" or "mean".
             error_feedback: send later what a lossy compressor leaves out, at the sources and at the owners of sums.
             shapes: of the tensors that make up the bucket.  undo: whether `rollback` is wanted; costs a copy a step.
    Attributes:
        compressor: what encodes; an ErrorFeedback where there is feedback.
        step: how many calls have succeeded.
    Raises:  ConfigError for another op, or a compression that is not there.
    """

    def __init__(self, engine: Any, compression: str | Compressor, num_elems: int, op: Any = "mean", *,
                 error_feedback: bool = True, shapes: Sequence[tuple[int, ...]] | None = None, undo: bool = False):
        self._engine, self._is_mean = engine, demand_op(op)
        self.compressor = parse_spec(compression)
        self.compressor.bind([(num_elems,)] if shapes is None else shapes)
        if self.compressor.momentum and not error_feedback:
            raise ConfigError(f"{self.compressor.name}: momentum works on what error feedback keeps: leave error_feedback on")
        if error_feedback and self.compressor.lossy and not isinstance(self.compressor, ErrorFeedback):
            self.compressor = ErrorFeedback(self.compressor, num_elems, undo)
        self.step = self._committed = 0
        self._inner_before = self._inner_state()

    def all_reduce(self, x: Any, timeout: float | None = None) -> None:
        """Replace x, a numpy array or torch tensor of num_elems floating-point numbers, by its reduction over the ranks.

        Args:    timeout: seconds for all of it.
        Raises:  what the engine raises; ShapeError, DTypeError for another x. x is then as it was.
        """
        _Call(_space_of(self._engine), self.compressor, self._is_mean, self.step, timeout).all_reduce(x)
        self.step += 1

    def commit(self) -> None:
        """The calls so far count."""
        if isinstance(self.compressor, ErrorFeedback):
            self.compressor.commit()
        else:
            self._inner_before = self._inner_state()
        self._committed = self.step

    def rollback(self) -> None:
        """The calls since the last commit never happened.

        Raises:  ConfigError with error feedback made without `undo`.
        """
        if isinstance(self.compressor, ErrorFeedback):
            self.compressor.rollback()
        else:
            self.compressor.load_state_dict(self._inner_before)
        self.step = self._committed

    def state_dict(self) -> dict[str, Any]:
        """What later calls depend on, of this rank: plain numbers, strings and arrays."""
        return {"compression": self.compressor.name, "step": self.step, "state": self.compressor.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state_dict; the group may be another one.

        Raises:  ConfigError, ShapeError when it is of another compression or bucket.
        """
        if state.get("compression") != self.compressor.name:
            raise ConfigError(f"this is a state of {state.get('compression')!r}, not of {self.compressor.name!r}")
        self.compressor.load_state_dict(state["state"])
        self.step = int(state["step"])
        self.commit()

    def _inner_state(self) -> dict[str, Any]:
        return {} if isinstance(self.compressor, ErrorFeedback) else self.compressor.state_dict()


def one_off(engine: Any, x: Any, op: Any, compression: str | Compressor) -> Callable[[float | None], None]:
    """What to submit for a single all-reduce of x: a function of the timeout. Every rank makes the same calls.

    Args:    x: a numpy array, torch tensor or writable buffer of floating-point numbers.
             compression: a specification, for a call that remembers nothing; or a Compressor, whose memory this call
             uses: an ErrorFeedback has the residuals of one call site. "auto": see pyfleet.choice; here, where there is
             no feedback, it is "none" or "bf16".
    Raises:  ConfigError for another op, or a compression that is not there; DTypeError.
    """
    if is_auto(compression):
        return _one_off_chosen(engine, x, op)
    is_mean, space, compressor, x = demand_op(op), _space_of(engine), parse_spec(compression), _demand_floats(x)
    if compressor is not compression and compressor.route == "own":
        compressor.bind([tuple(x.shape)])

    def all_reduce(timeout: float | None = None) -> None:
        _Call(space, compressor, is_mean, space.step, timeout).all_reduce(x)
        space.step += 1
    return all_reduce


def is_auto(compression: Any) -> bool:
    """Whether a specification leaves the choice to the links."""
    return isinstance(compression, str) and compression.strip().lower() == AUTO


def chosen(engine: Any, num_elems: int, *, feedback: bool = True, timeout: float | None = None) -> Choice:
    """What compression="auto" stands for; see pyfleet.choice.decide.

    Args:    feedback: whether there is error feedback.
    """
    ways: dict[str, CompressedAllReduce] = {}

    def attempt(name: str, x: np.ndarray) -> None:
        if name == "none":
            engine.all_reduce(x, "mean", timeout=timeout)
            return
        if name not in ways:
            ways[name] = CompressedAllReduce(engine, name, num_elems, "mean", error_feedback=feedback)
        ways[name].all_reduce(x, timeout)
    return decide(engine, num_elems, attempt, WITH_FEEDBACK if feedback else WITHOUT_FEEDBACK, timeout=timeout)


def _one_off_chosen(engine: Any, x: Any, op: Any) -> Callable[[float | None], None]:
    demand_op(op)
    x = _demand_floats(x)
    num_elems = x.numel() if is_tensor(x) else x.size

    def all_reduce(timeout: float | None = None) -> None:
        name = chosen(engine, num_elems, feedback=False, timeout=timeout).compression
        if name == "none":
            engine.all_reduce(x, op, timeout=timeout)
        else:
            one_off(engine, x, op, name)(timeout)
    return all_reduce


def stats(engine: Any) -> dict[str, dict[str, int]]:
    """What compression has done on this rank, by its name: {"calls", "elements", "sent_bytes", "dense_bytes"}.

    sent_bytes are the encodings that went to other ranks, without frames; dense_bytes what float32 would have taken.
    """
    space = _spaces.get(engine)
    return {} if space is None else {name: dict(counts) for name, counts in list(space.counts.items())}


def demand_op(op: Any) -> bool:
    """Whether an op is the mean.

    Raises:  ConfigError when it is neither that nor the sum.
    """
    code = reduce_op(op)
    if code not in (ReduceOp.SUM, ReduceOp.MEAN):
        raise ConfigError(f"with compression, op is one of sum, mean; not {ReduceOp(code).name.lower()}")
    return code == ReduceOp.MEAN


def bounds(n: int, size: int, block: int) -> list[int]:
    """Where the segments of n elements begin and end: multiples of the block, as level as they go."""
    num_blocks = -(-n // block)
    return [min(n, num_blocks * rank // size * block) for rank in range(size + 1)]


class _Space:
    """What the calls of one engine share: memory, kept from call to call, and counts."""

    def __init__(self, engine: Any):
        self.engine = weakref.proxy(engine)
        self.step = 0                       # of calls that remember nothing themselves
        self.counts: dict[str, Counter] = {}
        self._memory: dict[str, np.ndarray] = {}
        self._worker: ThreadPoolExecutor | None = None

    def bytes(self, role: str, nbytes: int) -> np.ndarray:
        """(nbytes,) uint8 of unspecified contents, the role's own; in the engine's memory while that has room."""
        memory = self._memory.get(role)
        if memory is None or memory.size < nbytes:
            self._memory.pop(role, None)
            memory = None                   # given back before more is taken
            nbytes_taken = nbytes + int(nbytes * _SPARE) + SLOT_BYTES
            try:
                memory = np.frombuffer(self.engine.allocate(nbytes_taken), np.uint8, nbytes_taken)
            except MemoryError:
                memory = np.empty(nbytes_taken, np.uint8)
            self._memory[role] = memory
        return memory[:nbytes]

    def floats(self, role: str, n: int) -> np.ndarray:
        """(n,) float32 of unspecified contents."""
        return self.bytes(role, 4 * n).view(np.float32)

    def worker(self) -> ThreadPoolExecutor:
        """A thread that computes while the calling one waits for the wire."""
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, "pyfleet-codec")
        return self._worker

    def count(self, name: str, num_elems: int, sent_bytes: int) -> None:
        size = self.engine.world_size
        self.counts.setdefault(name, Counter()).update(
            calls=1, elements=num_elems, sent_bytes=sent_bytes, dense_bytes=2 * (size - 1) * 4 * num_elems // size)


_spaces: weakref.WeakKeyDictionary[Any, _Space] = weakref.WeakKeyDictionary()


def _space_of(engine: Any) -> _Space:
    space = _spaces.get(engine)
    return _spaces.setdefault(engine, _Space(engine)) if space is None else space


class _Call:
    """One all-reduce in compressed form.

    Args:    piece: where in the bucket the array begins, a multiple of the block, and how many ranks a mean is of: when
             it is a segment that hosts exchange. None: it is the bucket, and the ranks are those of the engine.
    """

    def __init__(self, space: _Space, compressor: Compressor, is_mean: bool, step: int, timeout: float | None,
                 piece: tuple[int, int] | None = None):
        self.space, self.engine, self.compressor = space, space.engine, compressor
        self.rank, self.size, self.is_mean, self.step = self.engine.rank, self.engine.world_size, is_mean, step
        self.start, num_ranks = piece or (0, self.size)
        self.divisor = num_ranks if is_mean else 1
        self._timeout, self._deadline = timeout, None if timeout is None else Deadline(timeout)

    def all_reduce(self, x: Any) -> None:
        values, bring_back = _flat(x, self.space)
        if values.size:
            levels = self._levels()
            sent_bytes = self._reduced(values) if levels is None else self._by_levels(values, levels)
            self.space.count(self.compressor.name, values.size, sent_bytes)
        else:
            self.engine.all_reduce(values, self._op, timeout=self._left())      # all have nothing, or it is an error
        if bring_back is not None:
            bring_back()

    def _levels(self) -> Any:
        """The engine's groups for a call in two levels; None where one will do.

        Dense sums find their own way between hosts, and so do the small ones of the route "own".
        """
        route = self.compressor.route
        if route == "own" or (route == "reduce" and self.compressor.wire_dtype == DType.FLOAT32):
            return None
        return self.engine.levels(timeout=self._left())

    def _by_levels(self, x: np.ndarray, levels: Any) -> int:
        cuts = bounds(x.size, levels.num_owners, self.compressor.block)
        counts = [stop - start for start, stop in pairwise(cuts)] + [0] * (levels.inside.world_size - levels.num_owners)
        me = levels.inside.rank
        start, stop = (cuts[me], cuts[me + 1]) if levels.across is not None else (0, 0)
        stray = self.compressor.keep_only(start, stop) if isinstance(self.compressor, ErrorFeedback) else None
        given = x if stray is None else np.add(x, stray, out=self.space.floats("given", x.size))
        part, sent_bytes = self.space.floats("part", stop - start), 0
        levels.inside.reduce_scatter_into(part, given, counts, "sum", timeout=self._left())
        if part.size:
            call = _Call(_space_of(levels.across), self.compressor, self.is_mean, self.step, self._left(), (start, self.size))
            sent_bytes = call._reduced(part)
        whole = self.space.floats("whole", x.size)
        levels.inside.all_gather_into(whole, part, counts, timeout=self._left())
        x[:] = whole
        return sent_bytes

    def _reduced(self, x: np.ndarray) -> int:
        """Replace x by the reduction on the compressor's route; return the bytes of encodings that went to others."""
        return getattr(self, f"_{self._route()}")(x)

    def _route(self) -> str:
        """The compressor's own, but for halves that a sum as they are would not serve.

        With feedback, what rounding the sum takes away has to be known to its owner. And on the way between hosts partial
        sums may travel (rings, two levels), as float32 then: twice the bytes.
        """
        route = self.compressor.route
        on_one_host = self.engine.local_world_size == self.size
        if route != "reduce" or self.compressor.wire_dtype == DType.FLOAT32:
            return route
        return route if on_one_host and not isinstance(self.compressor, ErrorFeedback) else "shard"

    def _reduce(self, x: np.ndarray) -> int:
        n, dtype = x.size, self.compressor.wire_dtype
        if dtype == DType.FLOAT32:
            self.engine.all_reduce(x, self._op, timeout=self._left())
            return 2 * (self.size - 1) * x.nbytes // self.size
        wire = self.space.bytes("out", self.compressor.wire_bytes(n))
        self.compressor.encode(x, wire, step=self.step, stream=self.rank)
        self.engine.all_reduce(from_buffer(wire, n, "bfloat16") if dtype == DType.BFLOAT16 else
                               wire.view(dtype_name(dtype.name.lower())), self._op, timeout=self._left())
        self.compressor.decode(wire, x)
        return 2 * (self.size - 1) * wire.size // self.size

    def _shard(self, x: np.ndarray) -> int:
        """Encode and send a piece while the one after it is encoded and the one before it added up, by another thread."""
        compressor, me = self.compressor, self.rank
        cuts = bounds(x.size, self.size, compressor.block)
        owner, own_start = compressor, cuts[me]
        if isinstance(compressor, ErrorFeedback):
            owner = compressor.for_segment(self.start + own_start, self.start + cuts[me + 1], self.divisor)
        pieces = _Piece.cut(cuts, self._num_pieces(x.size), compressor)
        wire = self.space.bytes("out", sum(piece.wire_bytes for piece in pieces))
        came = self.space.bytes("in", sum(piece.slots[me] for piece in pieces) * self.size)

        def encode(piece: _Piece) -> None:
            for segment, place in piece.parts():
                compressor.encode(x[segment], wire[place], step=self.step, offset=self.start + segment.start, stream=me)
                wire[place.stop:place.stop + -place.stop % SLOT_BYTES] = 0

        def add_up(piece: _Piece) -> None:
            segment, place, slot = piece.segments[me], piece.places[me], piece.slots[me]
            if not slot:
                return
            total = self.space.floats("total", segment.stop - segment.start)
            total.fill(0)
            start = sum(each.slots[me] for each in pieces[:piece.number]) * self.size
            for at in range(start, start + slot * self.size, slot):
                compressor.decode_add(came[at:at + place.stop - place.start], total)
            if self.is_mean:
                total /= np.float32(self.divisor)
            owner.encode(total, wire[place], step=self.step, offset=segment.start - own_start, stream=self.size)

        def exchange(piece: _Piece) -> None:
            start = sum(each.slots[me] for each in pieces[:piece.number]) * self.size
            self.engine.all_to_all_into(came[start:start + piece.slots[me] * self.size], wire[piece.whole],
                                        [piece.slots] * self.size, timeout=self._left())

        def spread(piece: _Piece) -> None:
            own = piece.places[me].start
            self.engine.all_gather_into(wire[piece.whole], wire[own:own + piece.slots[me]], piece.slots, timeout=self._left())

        def decode(piece: _Piece) -> None:
            for segment, place in piece.parts():
                compressor.decode(wire[place], x[segment])

        self._in_turn(pieces, encode, exchange, add_up, spread, decode)
        mine = sum(piece.slots[me] for piece in pieces)
        return sum(piece.wire_bytes for piece in pieces) - mine + (self.size - 1) * mine

    def _in_turn(self, pieces: list[_Piece], encode: Callable, exchange: Callable, add_up: Callable, spread: Callable,
                 decode: Callable) -> None:
        """All five for every piece, in this order; what computes beside what waits, where there are several."""
        if len(pieces) == 1:
            for work in (encode, exchange, add_up, spread, decode):
                work(pieces[0])
            return
        worker, under_way = self.space.worker(), []

        def start(work: Callable, piece: _Piece) -> Future:
            under_way.append(worker.submit(work, piece))
            return under_way[-1]

        try:
            encoded, added = start(encode, pieces[0]), None
            for piece in pieces:
                encoded.result()
                if piece is not pieces[-1]:
                    encoded = start(encode, pieces[piece.number + 1])
                exchange(piece)
                before, added = added, start(add_up, piece)
                if before is not None:
                    before.result()
                    spread(pieces[piece.number - 1])
                    start(decode, pieces[piece.number - 1])     # nobody needs that part of the array any more
            added.result()
            spread(pieces[-1])
            decode(pieces[-1])
            for work in under_way:
                work.result()
        finally:
            wait(under_way)         # whatever went wrong, nobody works on this memory any more

    def _num_pieces(self, num_elems: int) -> int:
        """Within a host nothing waits for a wire."""
        on_one_host = self.engine.local_world_size == self.size
        return 1 if on_one_host else max(1, min(MAX_PIECES, 4 * num_elems // PIECE_BYTES))

    def _gather(self, x: np.ndarray) -> int:
        compressor = self.compressor
        wire = self.space.bytes("out", _slot(compressor.wire_bytes(x.size)))
        length = compressor.encode(x, wire, step=self.step, offset=self.start, stream=self.rank)
        wire[length:_slot(length)] = 0
        # The lengths go first, and with them what must be equal: sums of other arrays would go unnoticed.
        facts = np.array([length, x.size, crc32(f"{compressor.name} {self._op}".encode())], np.int64)
        table = np.empty((self.size, facts.size), np.int64)
        self.engine.all_gather_into(table, facts, timeout=self._left())
        if (table[:, 1:] != facts[1:]).any():
            raise OutOfStep(f"ranks reduce other arrays or compress them differently: rank {self.rank} has {x.size} "
                            f"elements, {compressor.name}, {self._op}; the ranks have {table[:, 1].tolist()} elements")
        lengths = table[:, 0].tolist()
        slots = [_slot(each) for each in lengths]
        came = self.space.bytes("in", sum(slots))
        self.engine.all_gather_into(came, wire[:slots[self.rank]], slots, timeout=self._left())
        weight = 1 / self.divisor
        x.fill(0)
        for at, each in zip([0, *accumulate(slots)], lengths, strict=False):
            compressor.decode_add(came[at:at + each], x, weight)
        return (self.size - 1) * slots[self.rank]

    def _own(self, x: np.ndarray) -> int:
        def add_up(part: np.ndarray) -> None:
            self.engine.all_reduce(part, "sum", timeout=self._left())

        self.compressor.exchange(x, add_up, self.size, step=self.step)
        if not self.is_mean:
            x *= np.float32(self.size)
        return 2 * (self.size - 1) * self.compressor.wire_bytes(x.size) // self.size

    @property
    def _op(self) -> str:
        return "mean" if self.is_mean else "sum"

    def _left(self) -> float | None:
        """Seconds for the next step of the call."""
        if self._deadline is None or self._timeout <= 0:        # nonsense is the engine's to refuse
            return self._timeout
        return max(self._deadline.left(), 0.001)                # at least as long as to see that it is too late


@dataclass
class _Piece:
    """A part of every rank's segment, whose encodings travel together: of rank k, `segments[k]` of the array and
    `places[k]` of the wire, which begins a slot of `slots[k]` bytes."""

    number: int
    segments: list[slice]
    places: list[slice]
    slots: list[int]

    @classmethod
    def cut(cls, cuts: list[int], num_pieces: int, compressor: Compressor) -> list[_Piece]:
        """The segments that lie between cuts, in so many pieces each."""
        inner = [[start + each for each in bounds(stop - start, num_pieces, compressor.block)]
                 for start, stop in pairwise(cuts)]
        pieces, at = [], 0
        for number in range(num_pieces):
            piece = cls(number, [], [], [])
            for edges in inner:
                segment = slice(edges[number], edges[number + 1])
                length = compressor.wire_bytes(segment.stop - segment.start) if segment.stop > segment.start else 0
                piece.segments.append(segment)
                piece.places.append(slice(at, at + length))
                piece.slots.append(_slot(length))
                at += _slot(length)
            pieces.append(piece)
        return pieces

    @property
    def wire_bytes(self) -> int:
        return sum(self.slots)

    @property
    def whole(self) -> slice:
        return slice(self.places[0].start, self.places[0].start + self.wire_bytes)

    def parts(self) -> Iterator[tuple[slice, slice]]:
        """What there is of it: (of the array, of the wire)."""
        both = zip(self.segments, self.places, strict=True)
        return ((segment, place) for segment, place in both if place.stop > place.start)


def _slot(length: int) -> int:
    return -(-length // SLOT_BYTES) * SLOT_BYTES


def _demand_floats(x: Any) -> Any:
    """x, or an array over its buffer.

    Raises:  DTypeError when it has none, or its elements are of another kind; ShapeError when it cannot be written to.
    """
    if not is_tensor(x) and not isinstance(x, np.ndarray):
        try:
            x = np.asarray(memoryview(x))
        except TypeError:
            raise DTypeError(f"cannot reduce a {type(x).__name__} in place: pass a numpy array or a torch tensor") from None
    if dtype_name(x.dtype) not in _FLOATS:
        raise DTypeError(f"elements of {x.dtype} cannot be compressed: one of {', '.join(_FLOATS)}")
    if isinstance(x, np.ndarray) and not x.flags.writeable:
        raise ShapeError("the array is read-only")
    return x


def _flat(x: Any, space: _Space) -> tuple[np.ndarray, Callable[[], None] | None]:
    """((n,) float32 in C order, what to call to bring the result back into x): x's own memory where that will do."""
    x = _demand_floats(x)
    if isinstance(x, np.ndarray):
        if x.dtype == np.float32 and x.flags.c_contiguous and x.flags.aligned:
            return x.reshape(-1), None
        values = space.floats("cast", x.size)
        with np.errstate(over="ignore"):
            np.copyto(values.reshape(x.shape), x, casting="same_kind")

        def back() -> None:
            with np.errstate(over="ignore"):
                np.copyto(x, values.reshape(x.shape), casting="same_kind")
        return values, back
    import torch

    if x.layout is not torch.strided or x.is_meta:
        raise ShapeError(f"a {'meta' if x.is_meta else x.layout} tensor has no dense memory: pass x.to_dense()")
    data = x.detach()
    if x.is_cpu and x.dtype is torch.float32 and x.is_contiguous() and not x.is_neg():
        return data.reshape(-1).numpy(), None
    values = space.floats("cast", x.numel())
    wide = torch.from_numpy(values).view(x.shape)
    wide.copy_(data)
    return values, lambda: data.copy_(wide)
