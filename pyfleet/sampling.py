"""P3: the distributed sampler as scripts use it, whose place among the ranks is that of the fleet."""
from __future__ import annotations

from collections.abc import Sequence, Sized

from pyfleet import data
from pyfleet.engines import current


class DistributedSampler(data.DistributedSampler):
    """As pyfleet.data.DistributedSampler; rank and world_size are those of pyfleet.init() unless given."""

    def __init__(self, dataset: Sized | int, weights: Sequence[float] | None = None, seed: int = 0, *,
                 rank: int | None = None, world_size: int | None = None, shuffle: bool = True,
                 batch_size: int | None = None):
        super().__init__(dataset, weights, seed, rank=current().rank if rank is None else rank,
                         world_size=current().world_size if world_size is None else world_size, shuffle=shuffle,
                         batch_size=batch_size)
