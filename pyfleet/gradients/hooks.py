"""Hears from autograd which gradients are done, and launches buckets while the others are still being computed."""
from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from pyfleet.gradients.buckets import Bucket
from pyfleet.gradients.reducer import Reducer


class GradientHooks:
    """Watches the parameters of the buckets; gradients are final when backward() returns.

    Buckets are launched in their own order on every rank, whatever order gradients come in, so that all ranks submit
    the same operations. At the end of a backward pass that reached at least one parameter the buckets that are still
    incomplete are launched too, zeros standing in for the parameters that it did not reach. torch.autograd.grad()
    leaves .grad alone and starts nothing.

    Attributes:
        enabled: False while gradients are only accumulated. What counts is its value during backward().
        released: whether `release` was called.
    """

    def __init__(self, buckets: list[Bucket], reducer: Reducer):
        self._buckets, self._reducer = buckets, reducer
        self.enabled, self.released = True, False
        self._lock = threading.Lock()       # a model on two devices has an autograd thread for each
        self._reset()
        # A weak reference: the model must not keep a wrapper alive that nobody uses any more.
        me = weakref.ref(self)
        self._handles = [parameter.register_post_accumulate_grad_hook(_announce(me, place, slot))
                         for place, bucket in enumerate(buckets) for slot, parameter in enumerate(bucket.parameters)]

    def prepare(self) -> None:
        """Before a forward pass: clear what a backward pass that failed half-way left behind."""
        if self._expecting and torch._C._current_graph_task_id() == -1:     # else checkpointing runs us in a backward
            self._reset()
            self._reducer.abandon()

    def watch(self, outputs: Any) -> None:
        """After a forward pass: let the backward pass through `outputs` end with `finish`.

        The first parameter's gradient would do, but inside a reentrant checkpoint it belongs to an inner backward
        pass, whose end is not the end. Outputs hidden in objects that torch's pytree does not know are not seen.
        """
        for leaf in tree_leaves(outputs):
            if isinstance(leaf, torch.Tensor) and leaf.grad_fn is not None:
                leaf.register_hook(self._expect_end)

    def flush(self) -> None:
        """Launch every bucket with the gradients there are, zeros for those there are not, and wait."""
        with self._lock:
            self._launch_ready(incomplete_too=True)
        self._finish()

    def release(self) -> None:
        """Stop listening. Idempotent."""
        self.released = True
        for handle in self._handles:
            handle.remove()

    def _reset(self) -> None:
        self._expecting = self._reached = False
        self._next = 0                                                      # the bucket to launch next
        self._pending = [len(bucket.parameters) for bucket in self._buckets]
        self._ready: set[tuple[int, int]] = set()

    def _expect_end(self, _: torch.Tensor | None = None) -> None:
        if self.enabled and not self._expecting and not self.released:
            self._expecting = True
            torch.autograd.Variable._execution_engine.queue_callback(self._end_of_backward)

    def _on_gradient(self, place: int, slot: int) -> None:
        if not self.enabled:
            return
        with self._lock:
            self._expect_end()
            self._reached = True
            bucket = self._buckets[place]
            if place < self._next:
                raise RuntimeError(
                    f"the gradient of {bucket.names[slot]} changed after it had been sent: the parameter is used in "
                    "several reentrant checkpoints; pass use_reentrant=False to torch.utils.checkpoint.checkpoint")
            bucket.adopt(slot)
            if (place, slot) not in self._ready:
                self._ready.add((place, slot))
                self._pending[place] -= 1
                self._launch_ready()

    def _launch_ready(self, incomplete_too: bool = False) -> None:
        while self._next < len(self._buckets) and (incomplete_too or self._pending[self._next] == 0):
            self._next += 1
            self._reducer.launch(self._buckets[self._next - 1])

    def _end_of_backward(self) -> None:
        if self._reached:
            self.flush()
        else:
            self._reset()

    def _finish(self) -> None:
        try:
            self._reducer.finish()
        finally:
            self._reset()


def _announce(owner: weakref.ref[GradientHooks], place: int, slot: int) -> Callable[[torch.Tensor], None]:
    def announce(_: torch.Tensor) -> None:
        hooks = owner()
        if hooks is not None:
            hooks._on_gradient(place, slot)
    return announce
