"""Sends sealed buckets and waits for them."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from pyfleet.gradients.buckets import Bucket
from pyfleet.gradients.buffers import BufferBroadcast
from pyfleet.routes import CompressedAllReduce


class Reducer:
    """Averages buckets over the ranks on the engine's communication thread, while backward goes on.

    Args:    compressed: the buckets whose gradients travel in compressed form, and how. Their flags, where a rounded
             number would lie, follow as they are: those of all these buckets in one message at the end.
    Attributes:
        weight: what this rank's gradients count for, relative to the mean: the result is sum(weight * gradient) /
                world_size. Every rank submits the same operations whatever its weight.
    """

    def __init__(self, engine: Any, buffers: BufferBroadcast | None = None,
                 compressed: Mapping[Bucket, CompressedAllReduce] | None = None):
        self._engine, self._buffers = engine, buffers
        self.set_compressed(compressed or {})
        self._under_way: list[tuple[Bucket, Any]] = []
        self.weight = 1.0

    def set_compressed(self, compressed: Mapping[Bucket, CompressedAllReduce]) -> None:
        """From now on compress these buckets, in these ways; every rank the same, while nothing is under way."""
        self.compressed = dict(compressed)
        self._flags = torch.zeros(sum(len(bucket.parameters) for bucket in self.compressed), dtype=torch.uint8)

    def launch(self, bucket: Bucket) -> None:
        """Start the reduction of a bucket; its gradients must not be touched before `finish`."""
        bucket.seal(self.weight)
        if bucket.flat.is_cuda and torch.cuda.current_stream() != torch.cuda.default_stream():
            torch.cuda.current_stream().synchronize()       # the communication thread works on the default stream
        way = self.compressed.get(bucket)
        self._under_way.append((bucket, self._engine.submit("all_reduce", bucket.flat, "mean") if way is None else
                                self._engine.submit(way.all_reduce, bucket.values)))

    def finish(self) -> None:
        """Wait until all launched buckets hold the result, and with them the module's buffers.

        Raises:  the first error of the engine, once nothing is under way any more.
        """
        broadcast = self._buffers.submit() if self._buffers is not None else None
        flags = self._submit_flags()
        self._wait_for_all([work for _, work in self._under_way]
                           + [work for work in (broadcast, flags) if work is not None])
        delivered, self._under_way = self._under_way, []
        if flags is not None:
            self._deliver_flags()
        for bucket, _ in delivered:
            bucket.deliver()
        if broadcast is not None:
            self._buffers.deliver()

    def _submit_flags(self) -> Any:
        if not self.compressed:
            return None
        torch.cat([bucket.flags.to("cpu", torch.uint8) for bucket in self.compressed], out=self._flags)
        return self._engine.submit("all_reduce", self._flags, "max")

    def _deliver_flags(self) -> None:
        parts = self._flags.split([len(bucket.parameters) for bucket in self.compressed])
        for bucket, part in zip(self.compressed, parts, strict=True):
            bucket.flags.copy_(part)

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
