"""Gradients of matrices as products of two thin ones."""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from pyfleet.compressors.base import Compressor, between, check_flag, room
from pyfleet.errors import ConfigError, ShapeError

# A column that the others explain to within this share of its length is rounding noise: products are float32.
_NOISE = 1e-6


class _Matrix(NamedTuple):
    start: int      # of its elements in x
    rows: int
    columns: int
    rank: int
    off_p: int      # of its part of the first and of the second message
    off_q: int

    def of(self, x: np.ndarray) -> np.ndarray:
        return x[self.start:self.start + self.rows * self.columns].reshape(self.rows, self.columns)

    def p_of(self, flat: np.ndarray) -> np.ndarray:
        return flat[self.off_p:self.off_p + self.rows * self.rank].reshape(self.rows, self.rank)

    def q_of(self, flat: np.ndarray) -> np.ndarray:
        return flat[self.off_q:self.off_q + self.columns * self.rank].reshape(self.columns, self.rank)


class PowerSGD(Compressor):
    """A tensor (m, ...) seen as a matrix M (m, c) travels as P (m, rank) and Q (c, rank), and arrives as P Q^T.

    P is an orthonormal basis of M times the Q of the step before: one step of a power iteration, which follows the
    gradient from step to step. Tensors of one dimension, and those for which rank * (m + c) saves nothing, travel as
    they are. What `bind` did not tell is one tensor of one dimension. A matrix of at most `rank` arrives but for
    rounding.

    `exchange` works on the mean over the ranks: two all-reduces, of all P and the other tensors, then of all Q. What
    follows an all-reduce is done element by element in a fixed order, so that different machines get the same bits.

    Args:    rank: 1 to 1024.  seed: of the first Q, the same on every rank.
             warm_start: go on from the Q of the step before, instead of a new one each step.
    Source:  Vogels et al. 2019, arXiv:1905.13727.
    """

    kind, route, stateful = "powersgd", "own", True

    def __init__(self, rank: int = 4, seed: int = 0, warm_start: bool = True):
        between(self.kind, "rank", rank, 1, 1024, integer=True)
        between(self.kind, "seed", seed, 0, 2**64 - 1, integer=True)
        super().__init__(rank=rank, seed=seed, warm_start=check_flag(self.kind, "warm_start", warm_start))
        self._shapes: list[tuple[int, ...]] | None = None
        self._plan(())

    def bind(self, shapes: Sequence[tuple[int, ...]]) -> None:
        self._shapes = [tuple(shape) for shape in shapes]
        self._plan(self._shapes)

    def wire_bytes(self, n: int) -> int:
        if self._shapes is not None and n != self._num_bound:
            raise ShapeError(f"{self.name} is bound to {self._num_bound} elements, got {n}")
        return 4 * (n - self._num_low + self._num_p + self._num_q)

    def encode(self, x: np.ndarray, out: np.ndarray, *, step: int = 0, offset: int = 0, stream: int = 0) -> int:
        nbytes = self.wire_bytes(x.size)
        message = room(out, nbytes).view(np.float32)
        first, second = np.split(message, [message.size - self._num_q])
        self._project(x, first, step)
        for one in self._matrices:
            p = one.p_of(first)
            p[...] = orthonormal(p)
        self._complete(x, first, second)
        self._keep(second)
        return nbytes

    def decode(self, data: np.ndarray, out: np.ndarray) -> None:
        if data.size != self.wire_bytes(out.size):
            raise ShapeError(f"{self.name}: an encoding takes {self.wire_bytes(out.size)} bytes, got {data.size}")
        message = data.view(np.float32)
        self._expand(*np.split(message, [message.size - self._num_q]), out)

    def exchange(self, x: np.ndarray, all_reduce: Callable[[np.ndarray], None], num_ranks: int, *,
                 step: int = 0) -> None:
        first = np.empty(self.wire_bytes(x.size) // 4 - self._num_q, np.float32)
        second = np.empty(self._num_q, np.float32)
        self._project(x, first, step)
        all_reduce(first)
        first[self._num_p:] /= np.float32(num_ranks)
        for one in self._matrices:
            p = one.p_of(first)
            p[...] = orthonormal(p)
        self._complete(x, first, second)
        if second.size:
            all_reduce(second)
            second /= np.float32(num_ranks)
        self._keep(second)
        self._expand(first, second, x)

    def state_dict(self) -> dict[str, Any]:
        return {"q": self._q.copy()} if self._q is not None else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        q = state.get("q")
        if set(state) - {"q"} or (q is not None and np.shape(q) != (self._num_q,)):
            raise ConfigError(f"{self.name}: this is no state of {self._num_q} elements; bind the same shapes first")
        self._q = None if q is None else np.array(q, np.float32)

    def _plan(self, shapes: Sequence[tuple[int, ...]]) -> None:
        self._matrices: list[_Matrix] = []
        self._q: np.ndarray | None = None
        self._num_low = self._num_p = self._num_q = start = 0
        for shape in shapes:
            size = math.prod(shape)
            rows, columns = (shape[0], size // shape[0]) if len(shape) > 1 and size else (size, 1)
            rank = min(self.params["rank"], rows, columns)
            if rank * (rows + columns) < size:
                self._matrices.append(_Matrix(start, rows, columns, rank, self._num_p, self._num_q))
                self._num_low += size
                self._num_p += rows * rank
                self._num_q += columns * rank
            start += size
        self._num_bound = start

    def _dense(self, x: np.ndarray) -> list[np.ndarray]:
        """The parts of x that travel as they are."""
        ends = [(one.start, one.start + one.rows * one.columns) for one in self._matrices]
        edges = [0, *(edge for pair in ends for edge in pair), x.size]
        return [x[low:high] for low, high in zip(edges[::2], edges[1::2], strict=True)]

    def _project(self, x: np.ndarray, first: np.ndarray, step: int) -> None:
        """first = every M Q, then the rest of x."""
        basis = self._basis(step)
        with np.errstate(over="ignore", invalid="ignore"):
            for one in self._matrices:
                np.matmul(one.of(x), one.q_of(basis), out=one.p_of(first))
        np.concatenate([*self._dense(x), first[:0]], out=first[self._num_p:])

    def _complete(self, x: np.ndarray, first: np.ndarray, second: np.ndarray) -> None:
        with np.errstate(over="ignore", invalid="ignore"):
            for one in self._matrices:
                np.matmul(one.of(x).T, one.p_of(first), out=one.q_of(second))

    def _expand(self, first: np.ndarray, second: np.ndarray, x: np.ndarray) -> None:
        with np.errstate(over="ignore", invalid="ignore"):
            for one in self._matrices:
                matrix, p, q = one.of(x), one.p_of(first), one.q_of(second)
                np.multiply.outer(p[:, 0], q[:, 0], out=matrix)
                for j in range(1, one.rank):        # not matmul, whose order of additions is the library's own
                    matrix += np.multiply.outer(p[:, j], q[:, j])
        rest, start = first[self._num_p:], 0
        for part in self._dense(x):
            part[...] = rest[start:start + part.size]
            start += part.size

    def _basis(self, step: int) -> np.ndarray:
        """Orthonormal columns for every matrix: of the last step's Q, or fresh ones where that is of no use."""
        warm = self.params["warm_start"] and self._q is not None
        key = self.params["seed"] + (0 if self.params["warm_start"] else step << 64)
        words = np.random.Philox(key=key).random_raw(self._num_q)       # raw: the same in every version of numpy
        fresh = ((words >> np.uint64(40)).astype(np.float32) + 0.5) / np.float32(2**23) - 1
        basis = np.array(self._q if warm else fresh)
        for one in self._matrices:
            q = one.q_of(basis)
            if not np.isfinite(q).all():            # a gradient was not: start again
                q[...] = one.q_of(fresh)
            q[...] = orthonormal(q, instead=one.q_of(fresh))
        return basis

    def _keep(self, second: np.ndarray) -> None:
        if self.params["warm_start"]:
            self._q = second.copy()


def orthonormal(a: np.ndarray, instead: np.ndarray | None = None) -> np.ndarray:
    """Columns that span those of a (m, r), orthonormal, in float64; the same bits on every machine.

    A column that the earlier ones explain becomes zero, or is made from the same column of `instead`. NaN stays NaN.
    Source:  modified Gram-Schmidt, done twice (Giraud et al. 2005: twice is enough).
    """
    columns = [np.array(column, np.float64) for column in a.T]
    with np.errstate(over="ignore", invalid="ignore"):
        for j, column in enumerate(columns):
            if not _orthogonalise(column, columns[:j]) and instead is not None:
                column[...] = instead[:, j]
                _orthogonalise(column, columns[:j])
    return np.stack(columns, axis=1)


def _orthogonalise(column: np.ndarray, others: list[np.ndarray]) -> bool:
    length = math.sqrt(_dot(column, column))
    for _ in range(2):
        for other in others:
            column -= _dot(column, other) * other
    rest = math.sqrt(_dot(column, column))
    if rest <= _NOISE * length:
        column[...] = 0
        return False
    column /= rest
    return True


def _dot(a: np.ndarray, b: np.ndarray) -> float:
    """The sum of a * b in an order that depends on the length alone: a BLAS picks its own on every machine."""
    terms = a * b
    while terms.size > 1:
        half = terms.size // 2
        sums = terms[:half] + terms[half:2 * half]
        if terms.size % 2:
            sums[0] += terms[-1]
        terms = sums
    return float(terms[0]) if terms.size else 0.0
