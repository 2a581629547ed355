"""Sends sealed buckets and waits for them."""
from __future__ import annotations

from typing import Any

import torch

from pyfleet.gradients.buckets import Bucket
from pyfleet.gradients.buffers import BufferBroadcast


class Reducer:
    """Averages buckets over the ranks on the engine's communication thread, while backward goes on.

    Attributes:
        weight: what this rank's gradients count for, relative to the mean: the result is sum(weight * gradient) /
                world_size. Every rank submits the same operations whatever its weight.
    """

    def __init__(self, engine: Any, buffers: BufferBroadcast | None = None):
        self._engine, self._buffers = engine, buffers
        self._under_way: list[tuple[Bucket, Any]] = []
        self.weight = 1.0

    def launch(self, bucket: Bucket) -> None:
        """Start the reduction of a bucket; its gradients must not be touched before `finish`."""
        bucket.seal(self.weight)
        if bucket.flat.is_cuda and torch.cuda.current_stream() != torch.cuda.default_stream():
            torch.cuda.current_stream().synchronize()       # the communication thread works on the default stream
        self._under_way.append((bucket, self._engine.submit("all_reduce", bucket.flat, "mean")))

    def finish(self) -> None:
        """Wait until all launched buckets hold the result, and with them the module's buffers.

        Raises:  the first error of the engine, once nothing is under way any more.
        """
        broadcast = self._buffers.submit() if self._buffers is not None else None
        self._wait_for_all([work for _, work in self._under_way] + ([broadcast] if broadcast is not None else []))
        delivered, self._under_way = self._under_way, []
        for bucket, _ in delivered:
            bucket.deliver()
        if broadcast is not None:
            self._buffers.deliver()

    def abandon(self) -> None:
        """Forget a backward pass that failed half-way, once its launched buckets are back."""
        self._wait_for_all([work for _, work in self._under_way])
        self._under_way = []

    def _wait_for_all(self, works: list[Any]) -> None:
        error = None
        for work in works:
            try:
                work.wait()
            except Exception as e:  # noqa: BLE001 raised below; until then the others may still use their memory
                error = error or e
        if error is not None:
            self._under_way = []
            raise error
