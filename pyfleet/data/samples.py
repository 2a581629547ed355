"""One way to fetch batches from the kinds of dataset that people have."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, TensorDataset, default_collate

from pyfleet.errors import ShapeError


class Samples:
    """Batches by index from a map-style dataset of (input, ..., target) samples, or from a tuple of tensors.

    Tensors and numpy arrays, also those of a TensorDataset, are indexed at once; other datasets sample by sample, and
    collated as torch's DataLoader does.

    Raises:  ShapeError when tensors have unequal lengths or there are fewer than two, TypeError for anything that has
             no length or no items.
    """

    def __init__(self, dataset: Any):
        self._dataset, self._tensors = dataset, None
        if type(dataset) is TensorDataset:
            dataset = dataset.tensors
        if isinstance(dataset, tuple | list) and dataset and all(
                isinstance(part, torch.Tensor | np.ndarray) for part in dataset):
            self._tensors = tuple(torch.as_tensor(part) for part in dataset)
            lengths = [len(tensor) if tensor.ndim else 0 for tensor in self._tensors]
            if len(set(lengths)) != 1 or len(lengths) < 2:
                raise ShapeError(f"a dataset of tensors needs inputs and targets of one length, got lengths {lengths}")
            self._length = lengths[0]
        elif hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__") and not isinstance(dataset, IterableDataset):
            self._length = len(dataset)
        else:
            raise TypeError("a dataset needs a length and items by index, or is a tuple of tensors; got "
                            + type(dataset).__name__)

    def __len__(self) -> int:
        return self._length

    def fetch(self, indices: Sequence[int] | np.ndarray) -> tuple[Any, ...]:
        """The samples of these indices, at least one, as (inputs, ..., targets), batch dimension first."""
        if self._tensors is not None:
            chosen = torch.as_tensor(indices, dtype=torch.int64)
            return tuple(tensor[chosen] for tensor in self._tensors)
        plain = [int(index) for index in indices]
        several = getattr(self._dataset, "__getitems__", None)      # torch's own name for fetching a batch at once
        batch = default_collate(several(plain) if several else [self._dataset[index] for index in plain])
        if not isinstance(batch, tuple | list) or len(batch) < 2:
            raise ShapeError(f"a sample must be (input, target), got {type(batch).__name__}")
        return tuple(batch)
