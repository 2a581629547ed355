"""Cutting a number of samples into one contiguous part per rank."""
from __future__ import annotations

import operator
from collections.abc import Sequence
from fractions import Fraction

import numpy as np


def split_by_weight(total: int, weights: Sequence[float]) -> list[int]:
    """Cut `total` into len(weights) whole parts proportional to the weights; the parts sum to exactly `total`.

    Largest remainder in exact arithmetic, ties to the lower index: every rank computes the same parts. A weight may
    be zero, which gives a zero part, but not all of them.

    Raises:  ValueError on a negative total, no weights, or a weight that is negative, infinite or NaN.
    """
    total = operator.index(total)
    if total < 0:
        raise ValueError(f"total must be >= 0, got {total}")
    try:
        exact = [Fraction(weight) for weight in weights]
    except (OverflowError, ValueError):
        raise ValueError(f"weights must be finite, got {list(weights)}") from None
    if not exact or min(exact) < 0 or sum(exact) == 0:
        raise ValueError(f"weights must be >= 0 and at least one of them > 0, got {list(weights)}")
    whole = sum(exact)
    quotas = [total * weight / whole for weight in exact]
    parts = [int(quota) for quota in quotas]
    # A zero weight has a zero remainder; fewer ranks than positive remainders are short of one, so it stays zero.
    by_remainder = sorted(range(len(parts)), key=lambda i: (parts[i] - quotas[i], i))
    for i in by_remainder[:total - sum(parts)]:
        parts[i] += 1
    return parts


class DataPartitioner:
    """`total_size` samples over `world_size` ranks: contiguous, disjoint, exhaustive, sizes differ by at most 1.

    Args:    total_size: number of samples, >= 0; `total_samples` is another name for it.  world_size: >= 1.
    Raises:  ValueError on sizes out of range, and by every method for a rank outside 0 .. world_size - 1.
    """

    def __init__(self, total_size: int | None = None, world_size: int | None = None, *,
                 total_samples: int | None = None):
        if (total_size is None) == (total_samples is None):
            raise ValueError("give the number of samples once: total_size or total_samples")
        if world_size is None:
            raise ValueError("world_size is missing")
        self.total_size = operator.index(total_samples if total_size is None else total_size)
        self.world_size = operator.index(world_size)
        if self.total_size < 0:
            raise ValueError(f"total_size must be >= 0, got {self.total_size}")
        if self.world_size < 1:
            raise ValueError(f"world_size must be >= 1, got {self.world_size}")

    def get_partition(self, rank: int) -> tuple[int, int]:
        """(start, end) of the rank's samples; end is not part of them."""
        rank = self._check(rank)
        base, longer = divmod(self.total_size, self.world_size)     # the first `longer` ranks take one more
        return rank * base + min(rank, longer), (rank + 1) * base + min(rank + 1, longer)

    def get_indices(self, rank: int) -> np.ndarray:
        """The rank's samples as an ascending int64 array."""
        return np.arange(*self.get_partition(rank), dtype=np.int64)

    def partition_size(self, rank: int) -> int:
        """How many samples the rank has."""
        start, end = self.get_partition(rank)
        return end - start

    def _check(self, rank: int) -> int:
        rank = operator.index(rank)
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is not in 0 .. {self.world_size - 1}")
        return rank
