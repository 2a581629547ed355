"""The order of the samples, and which of them this rank works on."""
from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence, Sized
from functools import lru_cache
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from pyfleet.data.partition import split_by_weight


def global_order(length: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of 0 .. length-1, int64, that is a function of (length, seed, epoch) alone.

    The stable argsort of `length` raw 64-bit words of numpy's PCG64 keyed by SeedSequence over (seed, epoch), each
    modulo 2**64. numpy promises these words for ever (NEP 19), unlike the stream of Generator.permutation, so ranks
    with different numpy versions agree on the order.
    """
    # Four words of fixed width: SeedSequence would take the numbers (2**32, 0) and (0, 1) for the same.
    key = [number % 2**64 >> shift & 0xFFFFFFFF for number in (seed, epoch) for shift in (0, 32)]
    words = np.random.PCG64(np.random.SeedSequence(key)).random_raw(length)
    return np.argsort(words, kind="stable").astype(np.int64, copy=False)


class DistributedSampler(Sampler[int]):
    """The samples of one rank. Over all ranks every sample of the dataset comes exactly once per epoch.

    Nothing is padded and nothing dropped: lengths that do not divide give ranks of unequal length. Without
    `batch_size` each rank takes one contiguous share of the global order. With `batch_size`, the *global* one, the
    order is cut into global batches first and each rank takes its contiguous share of every batch, so that the union
    over ranks of batch k is the same set for any number of ranks and any weights; a rank may get none of a batch.

    Args:    dataset_or_length: something with a length, or the length.
             weights: one per rank, >= 0, not all zero; a rank's share is proportional to its own. None: equal.
             rank, world_size: this rank and how many there are.
             shuffle: False keeps the dataset's own order.
    Raises:  ValueError when these do not fit together.
    """

    def __init__(self, dataset_or_length: Sized | int, weights: Sequence[float] | None = None, seed: int = 0, *,
                 rank: int | None = None, world_size: int | None = None, shuffle: bool = True,
                 batch_size: int | None = None):
        if rank is None or world_size is None:
            raise ValueError("rank and world_size are needed")
        sized = hasattr(dataset_or_length, "__len__")
        self.length = len(dataset_or_length) if sized else operator.index(dataset_or_length)
        self.rank, self.world_size = operator.index(rank), operator.index(world_size)
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank {self.rank} is not in 0 .. {self.world_size - 1}")
        self.weights = [1] * self.world_size if weights is None else list(weights)
        if len(self.weights) != self.world_size:
            raise ValueError(f"{len(self.weights)} weights for {self.world_size} ranks")
        self._split = lru_cache(maxsize=8)(lambda total: split_by_weight(total, self.weights))
        self._split(self.length)                        # complains about bad lengths and weights now rather than later
        self.batch_size = None if batch_size is None else operator.index(batch_size)
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"batch_size must be >= 1, got {self.batch_size}")
        self.seed, self.shuffle = operator.index(seed), shuffle
        self.epoch = 0
        self.position = 0                               # handed out so far: global batches, or this rank's samples
        self._start = 0                                 # where the next iteration begins

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, and with it the order. Another epoch than the current one starts at its beginning."""
        epoch = operator.index(epoch)
        if epoch != self.epoch:
            self.epoch, self.position, self._start = epoch, 0, 0

    @property
    def num_batches(self) -> int:
        """Global batches per epoch, the last and possibly shorter one included."""
        if self.batch_size is None:
            raise ValueError("the sampler was made without batch_size")
        return -(-self.length // self.batch_size)

    def batches(self) -> Iterator[tuple[np.ndarray, int]]:
        """This rank's indices (int64, possibly none) and the number of samples over all ranks, per global batch.

        A batch counts as handed out (see state_dict) when it is yielded.
        """
        order, num_batches = self._order(), self.num_batches
        self.position, self._start = self._start, 0
        while self.position < num_batches:
            batch = order[self.position * self.batch_size:(self.position + 1) * self.batch_size]
            self.position += 1
            yield self._share(batch), len(batch)

    def __iter__(self) -> Iterator[int]:
        if self.batch_size is not None:
            for indices, _ in self.batches():
                yield from indices.tolist()
            return
        share = self._share(self._order())
        self.position, self._start = self._start, 0
        while self.position < len(share):
            self.position += 1
            yield int(share[self.position - 1])

    def __len__(self) -> int:
        """How many samples the next iteration yields on this rank."""
        if self.batch_size is None:
            return max(0, self._split(self.length)[self.rank] - self._start)
        full, rest = divmod(self.length, self.batch_size)
        left = [self.batch_size] * max(0, full - self._start) + [rest] * (self._start < self.num_batches)
        return sum(self._split(count)[self.rank] for count in left)

    def state_dict(self) -> dict[str, Any]:
        """What is needed to go on later. With `batch_size` it may be loaded whatever the number of ranks is then."""
        state = {"length": self.length, "seed": self.seed, "shuffle": self.shuffle, "batch_size": self.batch_size,
                 "epoch": self.epoch, "position": self.position}
        if self.batch_size is None:                     # then the position is one of this very share
            state |= {"rank": self.rank, "weights": [float(weight) for weight in self.weights]}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration begin after the last sample or batch that had been handed out.

        Raises:  ValueError when the state belongs to another dataset, seed, batch size or share.
        """
        mine = self.state_dict()
        differing = [key for key in mine if key not in ("epoch", "position") and mine[key] != state.get(key)]
        if differing:
            raise ValueError("the saved position does not fit this sampler: " + ", ".join(
                f"{key} was {state.get(key)!r} and is {mine[key]!r}" for key in differing))
        self.epoch = operator.index(state["epoch"])
        self.position = self._start = operator.index(state["position"])

    def _order(self) -> np.ndarray:
        if self.shuffle:
            return global_order(self.length, self.seed, self.epoch)
        return np.arange(self.length, dtype=np.int64)

    def _share(self, samples: np.ndarray) -> np.ndarray:
        parts = self._split(len(samples))
        start = sum(parts[:self.rank])
        return samples[start:start + parts[self.rank]]
