"""Error feedback: what a lossy compressor leaves out of one step, it gets to send in the next."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from fleetcore.kernels.quantize import settle_array

from pyfleet.compressors.base import Compressor
from pyfleet.errors import ConfigError, ShapeError


class ErrorFeedback(Compressor):
    """A compressor that encodes x + residual, and keeps as residual what decoding will not give back.

    Over any number of steps the sum of what was sent plus the residual is the sum of what was to be sent, to half a unit
    in the last place of the residual a step. Where the compressor has momentum, what is to be sent is the velocity.
    It wraps any compressor and is used in its place. A piece of the bucket uses the residual at its `offset`; in one step
    every element is encoded at most once.

    Between two commits everything can be undone, for steps that fail or are skipped: `rollback`.

    On the route "shard" a rank encodes twice: its own gradient, and the sum of the segment it owns. `for_segment` is the
    feedback of the latter, and part of this one's commit, rollback and state.

    Args:    inner: the compressor to wrap.  num_elems: elements of the bucket.
             undo: keep a copy of what a step overwrites, for rollback; without it only `commit` may be called.
    Attributes:
        residual: (num_elems,) float32.
        velocity: the same of a compressor with momentum, None of others.
        owner: the feedback of the owned segment, once there is one.
        segment: (start, stop, scale) of it: what it keeps counts `scale` times in the sum of gradients.
        home: (start, stop) outside of which nothing is kept, or None: see keep_only.
    """

    stateful = True

    def __init__(self, inner: Compressor, num_elems: int, undo: bool = False):
        super().__init__(inner=inner, num_elems=num_elems, undo=undo)
        self.inner = inner
        self.residual = np.zeros(num_elems, np.float32)
        self.velocity = np.zeros(num_elems, np.float32) if inner.momentum else None
        self._before = np.empty(num_elems, np.float32) if undo else None
        self._velocity_before = np.empty(num_elems, np.float32) if undo and inner.momentum else None
        self._touched: list[slice] = []
        self._inner_before: dict[str, Any] | None = None
        self.owner: ErrorFeedback | None = None
        self.segment: tuple[int, int, int] | None = None
        self.home: tuple[int, int] | None = None
        self._home_before: tuple[int, int] | None = None

    # What a class states, the inner compressor states for this one.
    kind = property(lambda self: self.inner.kind)
    route = property(lambda self: self.inner.route)
    lossy = property(lambda self: self.inner.lossy)
    block = property(lambda self: self.inner.block)
    wire_dtype = property(lambda self: self.inner.wire_dtype)
    momentum = property(lambda self: self.inner.momentum)

    @property
    def name(self) -> str:
        return self.inner.name

    def bind(self, shapes: Sequence[tuple[int, ...]]) -> None:
        self.inner.bind(shapes)

    def wire_bytes(self, n: int) -> int:
        return self.inner.wire_bytes(n)

    def encode(self, x: np.ndarray, out: np.ndarray, *, step: int = 0, offset: int = 0, stream: int = 0) -> int:
        """As the contract; moreover ShapeError when x reaches beyond the residual."""
        residual = self._residual_of(offset, x.size)
        if self.velocity is None:
            return self.inner.encode_feedback(x, residual, out, step=step, offset=offset, stream=stream)
        velocity = self.velocity[offset:offset + x.size]
        with np.errstate(over="ignore", invalid="ignore"):
            velocity *= np.float32(self.inner.momentum)
            moved = velocity + x
        written = self.inner.encode_feedback(moved, residual, out, step=step, offset=offset, stream=stream)
        moved[self.inner.sent(out[:written], x.size)] = 0
        np.copyto(velocity, moved, where=np.isfinite(moved))    # what is not finite is gone with its step
        return written

    def decode(self, data: np.ndarray, out: np.ndarray) -> None:
        self.inner.decode(data, out)

    def decode_add(self, data: np.ndarray, out: np.ndarray, weight: float = 1.0) -> None:
        self.inner.decode_add(data, out, weight)

    def encode_feedback(self, grad: np.ndarray, residual: np.ndarray, out: np.ndarray, *, step: int = 0, offset: int = 0,
                        stream: int = 0) -> int:
        """Not offered: one feedback is enough.

        Raises:  ConfigError.
        """
        raise ConfigError(f"{self.name} has error feedback already")

    def exchange(self, x: np.ndarray, all_reduce: Callable[[np.ndarray], None], num_ranks: int, *, step: int = 0) -> None:
        """As the contract. The residual is what this rank gave less the mean that all got: summed over the ranks, exact."""
        residual = self._residual_of(0, x.size)
        grad = x.copy()
        with np.errstate(over="ignore", invalid="ignore"):
            x += residual
        self.inner.exchange(x, all_reduce, num_ranks, step=step)
        settle_array(grad, residual, x)

    def for_segment(self, start: int, stop: int, scale: int) -> ErrorFeedback:
        """The feedback for the sum of the elements from start to stop, which this rank owns.

        When it was for others (the ranks are not those of before, or another op), what it kept joins the residual, where
        it counts for as much, and the step so far is committed: ask before anything is encoded.

        Args:    scale: what the encoded sum was divided by: the number of ranks for a mean, else 1.
        """
        if self.segment != (start, stop, scale):
            self._take_back()
            self.owner = ErrorFeedback(self.inner.fresh(), stop - start, self._before is not None)
            self.segment = (start, stop, scale)
        return self.owner

    def keep_only(self, start: int, stop: int) -> np.ndarray | None:
        """From now on encode only elements from start to stop. What is kept of others is forgotten, and the caller's to send.

        Returns: (num_elems,) of it; None when there is nothing, as whenever this has been said before.
        """
        if self.home == (start, stop):
            return None
        self._take_back()
        stray = self._residual_of(0, self.residual.size).copy()
        stray[start:stop] = 0
        self.residual[:start] = self.residual[stop:] = 0
        if self.velocity is not None:
            self.velocity[:start] = self.velocity[stop:] = 0    # those who encode them now have one of their own
        self.home = (start, stop)
        return stray if stray.any() else None

    def commit(self) -> None:
        """The step counts: forget what it overwrote."""
        self._touched, self._inner_before, self._home_before = [], None, self.home
        if self.owner is not None:
            self.owner.commit()

    def rollback(self) -> None:
        """The step never happened: the residual, and the inner compressor's state, are as the last commit left them.

        Raises:  ConfigError for an instance without `undo`.
        """
        if self._before is None:
            raise ConfigError("this error feedback keeps nothing to go back to: pass undo=True")
        for piece in self._touched:
            self.residual[piece] = self._before[piece]
            if self.velocity is not None:
                self.velocity[piece] = self._velocity_before[piece]
        if self._inner_before is not None:
            self.inner.load_state_dict(self._inner_before)
        if self.owner is not None:
            self.owner.rollback()
        self.home = self._home_before
        self.commit()

    def state_dict(self) -> dict[str, Any]:
        state = {"residual": self.residual.copy(), "inner": self.inner.state_dict()}
        if self.velocity is not None:
            state["velocity"] = self.velocity.copy()
        if self.owner is not None:
            state |= {"segment": list(self.segment), "owner": self.owner.state_dict()}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        needed = {"residual", "inner"} | ({"velocity"} if self.velocity is not None else set())
        if set(state) - {"segment", "owner"} != needed or ("segment" in state) != ("owner" in state):
            raise ConfigError(f"this is no state of error feedback: {sorted(state)}")
        residual = np.asarray(state["residual"], np.float32)
        if residual.shape != self.residual.shape:
            raise ShapeError(f"the residual has shape {residual.shape}, the bucket {self.residual.shape}")
        if self.velocity is not None:
            velocity = np.asarray(state["velocity"], np.float32)
            if velocity.shape != self.velocity.shape:
                raise ShapeError(f"the velocity has shape {velocity.shape}, the bucket {self.velocity.shape}")
            self.velocity[:] = velocity
        self.owner = self.segment = self.home = None
        if "owner" in state:
            start, stop, scale = state["segment"]
            if not 0 <= start <= stop <= residual.size:
                raise ShapeError(f"a segment from {start} to {stop} of a bucket of {residual.size}")
            owner = ErrorFeedback(self.inner.fresh(), stop - start, self._before is not None)
            owner.load_state_dict(state["owner"])
            self.owner, self.segment = owner, (start, stop, scale)
        self.inner.load_state_dict(state["inner"])
        self.residual[:] = residual
        self.commit()

    def _take_back(self) -> None:
        """Let what an owned segment keeps count as this rank's own, and commit."""
        if self.owner is not None:
            first, last, factor = self.segment
            self.residual[first:last] += self.owner.residual * np.float32(factor)
            self.owner = self.segment = None
            self.commit()

    def _residual_of(self, offset: int, num_elems: int) -> np.ndarray:
        piece = slice(offset, offset + num_elems)
        if not 0 <= offset <= self.residual.size - num_elems:
            raise ShapeError(f"elements {offset} to {piece.stop} of a bucket of {self.residual.size}")
        if self.home is not None and not self.home[0] <= offset <= piece.stop <= self.home[1]:
            self.home = None
        if self._before is not None:
            if self._inner_before is None and self.inner.stateful:
                self._inner_before = self.inner.state_dict()
            self._before[piece] = self.residual[piece]
            if self.velocity is not None:
                self._velocity_before[piece] = self.velocity[piece]
            self._touched.append(piece)
        return self.residual[piece]
