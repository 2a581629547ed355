"""Data parallelism: every rank has the model, works on its own samples, and applies the same averaged gradient."""
from __future__ import annotations

import hashlib
import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Self

import numpy as np
import torch

from pyfleet.choice import AUTO
from pyfleet.compressors import Compressor, parse_spec
from pyfleet.engines import Engine, current
from pyfleet.errors import ConfigError, DTypeError, ShapeError
from pyfleet.gradients import Bucket, BufferBroadcast, GradientHooks, Reducer, make_buckets
from pyfleet.routes import CompressedAllReduce, chosen, is_auto
from pyfleet.strategies.base import Strategy

log = logging.getLogger("pyfleet.compression")

# The wrapper whose hooks a module has: a second one must not average the same gradients again.
_wrappers: weakref.WeakKeyDictionary[torch.nn.Module, weakref.ref[DistributedDataParallel]] = \
    weakref.WeakKeyDictionary()


class DistributedDataParallel(Strategy):
    """Averages gradients over the ranks during backward(); they are final, and equal to the bit, when it returns.

    Construction is collective: it checks that all ranks wrap the same kind of model the same way, then gives every
    rank the parameters and buffers of rank 0. Parameters that no rank used in a backward pass keep their .grad.
    Wrap after moving the model to its device and freezing what is to stay; a module has one wrapper, the latest.

    Args:    bucket_size_mb: MiB of gradients that travel together.
             broadcast_buffers: whether rank 0's buffers (running statistics) replace the others' with every exchange
             of gradients, so that they are equal at every step's end and forward's start.
             compression: None, a specification such as "int8", "fp16", "topk(ratio=0.01)+fp16" or "powersgd(rank=4)", or
             a Compressor: how gradients travel; see pyfleet.compressors. "topk" and "random" pay while they keep less
             than one element in world_size. "auto": for each bucket none, bf16 or int8, by what the measured links and
             codecs make quickest; within one host none. fleet.stats()["compression_choices"] and the log say which and why.
             error_feedback: send later what a lossy compression leaves out of a step. The residuals are this rank's
             and part of the training state: compression_state.
             dense_below: tensors with fewer elements travel as they are: biases and norms are sensitive and weigh little.
             Or a function of (name, parameter) that says which do.
             engine: who moves the bytes; None means the one of pyfleet.init().
    Raises:  ShapeError on every rank when models or settings differ, DTypeError on sparse or complex gradients,
             ConfigError, NotInitialized, and CommunicationError.
    """

    def __init__(self, model: torch.nn.Module, bucket_size_mb: float = 25.0, broadcast_buffers: bool = True,
                 compression: str | Compressor | None = None, *, error_feedback: bool = True,
                 dense_below: int | Callable[[str, torch.nn.Parameter], bool] = 0, engine: Engine | None = None):
        self._auto = is_auto(compression)
        compressor = parse_spec(None if self._auto else compression)
        is_dense = _rule(dense_below)
        super().__init__(model, current() if engine is None else engine)
        for name, module in model.named_modules():
            if getattr(module, "sparse", False) and isinstance(module, torch.nn.Embedding | torch.nn.EmbeddingBag):
                raise DTypeError(f"{name} makes sparse gradients, and only dense ones can be averaged: "
                                 "build it with sparse=False")
        self._require_same_everywhere(f"bucket_size_mb={bucket_size_mb}, broadcast_buffers={broadcast_buffers}, "
                                      f"compression={AUTO if self._auto else compressor.name}, error_feedback={error_feedback}",
                                      is_dense)
        earlier = _wrappers.pop(model, None)
        if earlier is not None and earlier() is not None:
            earlier()._hooks.release()
        _wrappers[model] = weakref.ref(self)

        self._buckets = make_buckets(model.named_parameters(), bucket_size_mb, self.engine.allocate,
                                     is_dense if self._auto or compressor.kind != "none" else None)
        self._frozen = [name_and_parameter for name_and_parameter in model.named_parameters()
                        if not name_and_parameter[1].requires_grad]
        self._error_feedback = error_feedback
        specs = {bucket: self._choose(bucket) if self._auto else compressor.fresh() for bucket in self._buckets
                 if not bucket.dense}
        self._compressed = {bucket: self._way(bucket, spec) for bucket, spec in specs.items()
                            if parse_spec(spec).kind != "none"}
        self._reducer = Reducer(self.engine, BufferBroadcast(model, self.engine) if broadcast_buffers else None,
                                self._compressed)
        self._hooks = GradientHooks(self._buckets, self._reducer)
        self.synchronize()

    def _choose(self, bucket: Bucket) -> str:
        """The compression that "auto" stands for; told once, by rank 0."""
        choice = chosen(self.engine, bucket.values.numel(), feedback=self._error_feedback)
        if self.engine.rank == 0:
            log.info("bucket %d of %d travels by %s", self._buckets.index(bucket) + 1, len(self._buckets), choice.reason)
        return choice.compression

    def _way(self, bucket: Bucket, compression: str | Compressor) -> CompressedAllReduce:
        return CompressedAllReduce(self.engine, compression, bucket.values.numel(), "mean", error_feedback=self._error_feedback,
                                   shapes=[view.shape for view in bucket.views])

    @staticmethod
    def builder(model: torch.nn.Module) -> Builder:
        """Construction in words: DDP.builder(model).bucket_size_mb(25.0).broadcast_buffers(True).build()."""
        return Builder(model)

    @property
    def num_buckets(self) -> int:
        return len(self._buckets)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward."""
        if not torch.is_grad_enabled():
            return self.module(*args, **kwargs)
        if self._hooks.released:
            raise RuntimeError("the module was wrapped again, so this wrapper does not average its gradients any more")
        for name, parameter in self._frozen:
            if parameter.requires_grad:
                raise RuntimeError(f"{name} was frozen when the model was wrapped; wrap the model again")
        self._hooks.prepare()
        outputs = self.module(*args, **kwargs)
        self._hooks.watch(outputs)
        return outputs

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Within it backward passes only accumulate; the first one after it averages the accumulated sum.

        What counts is where backward() runs.
        """
        before, self._hooks.enabled = self._hooks.enabled, False
        try:
            yield
        finally:
            self._hooks.enabled = before

    def set_samples(self, local: int | None, total: int | None = None) -> AbstractContextManager[None]:
        """Weight this rank's gradients by its samples, until the next call, or the end of the `with` it opens.

        When each rank's accumulated gradient is the mean over its own `local` samples, the result is the mean over
        all `total` samples: sum over ranks of local / total * gradient. A rank with local == 0 calls `participate`
        instead of backward. set_samples(None) goes back to the plain mean over ranks.

        Args:    local: samples of this rank in the exchange, >= 0.  total: of all ranks, > 0, the same on each.
        Raises:  ValueError when these are out of range.
        """
        if local is None:
            weight = 1.0
        elif total is None or total < 1 or not 0 <= local <= total:
            raise ValueError(f"samples must satisfy 0 <= local <= total and total >= 1, got {local} of {total}")
        else:
            weight = local * self.engine.world_size / total
        before, self._reducer.weight = self._reducer.weight, weight
        return _Restore(self._reducer, before)

    def participate(self) -> None:
        """Take part in an exchange without a backward pass: send what .grad holds, zeros where it is None.

        What a rank calls instead of backward() when it has no samples while others do. Gradients are then the same
        here as there.
        """
        self._hooks.prepare()
        self._hooks.flush()

    def compression_state(self) -> list[dict[str, Any]]:
        """What this rank's compression goes on from, one entry per bucket: residuals, numbers of steps, warm starts.

        Plain numbers, strings, lists and numpy arrays. Empty without compression.
        """
        return [{"parameters": bucket.names, **way.state_dict()} for bucket, way in self._compressed.items()]

    def load_compression_state(self, state: list[dict[str, Any]]) -> None:
        """Go on from compression_state of a rank with the same model and settings, perhaps in a group of another size.

        Gradients are accounted for as long as every rank's state is loaded by some rank. With compression="auto" buckets go
        on with the compression of the state, whatever the links are now: what it has kept is of that.

        Raises:  ConfigError, ShapeError when it is of other buckets or another compression.
        """
        if self._auto:
            by_names = {tuple(bucket.names): bucket for bucket in self._buckets if not bucket.dense}
            found = [by_names.get(tuple(entry.get("parameters", ()))) for entry in state]
            if None not in found:
                self._compressed = {bucket: self._way(bucket, entry["compression"])
                                    for bucket, entry in zip(found, state, strict=True)}
                self._reducer.set_compressed(self._compressed)
        if [entry.get("parameters") for entry in state] != [bucket.names for bucket in self._compressed]:
            raise ConfigError("this is a compression state of other buckets: of another model or bucket_size_mb, or of a "
                              "model without compression")
        for way, entry in zip(self._compressed.values(), state, strict=True):
            way.load_state_dict({key: value for key, value in entry.items() if key != "parameters"})

    def synchronize(self) -> None:
        """Give every rank the parameters and buffers of rank 0. Collective."""
        with torch.no_grad():
            for tensor in [*self.module.parameters(), *self.module.buffers()]:
                if tensor.numel():
                    self.engine.broadcast(tensor.detach(), 0)

    def _require_same_everywhere(self, settings: str, is_dense: Callable[[str, torch.nn.Parameter], bool]) -> None:
        facts = [settings] + [
            f"{kind} {name} {str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}" + trained
            + (" (dense)" if kind == "parameter" and is_dense(name, tensor) else "")
            for kind, tensors in (("parameter", self.module.named_parameters()),
                                  ("buffer", self.module.named_buffers()))
            for name, tensor in tensors
            for trained in [" (trained)" if tensor.requires_grad else ""]]
        # First the number of facts: only vectors of equal length can be compared one by one.
        lowest, highest = self._extremes([len(facts)])
        if lowest[0] != highest[0]:
            raise ShapeError(f"the ranks wrap different models: rank {self.engine.rank} has {len(facts) - 1} parameters "
                             f"and buffers, and the ranks have between {lowest[0] - 1} and {highest[0] - 1}")
        lowest, highest = self._extremes(
            [int.from_bytes(hashlib.sha256(fact.encode()).digest()[:7]) for fact in facts])
        differing = [fact for fact, low, high in zip(facts, lowest, highest, strict=True) if low != high]
        if differing:
            raise ShapeError(f"the ranks wrap different models or wrap them differently; rank {self.engine.rank} has "
                             + "; ".join(differing[:3]) + (", ..." if len(differing) > 3 else ""))

    def _extremes(self, numbers: list[int]) -> tuple[list[int], list[int]]:
        lowest, highest = np.array(numbers, dtype=np.int64), np.array(numbers, dtype=np.int64)
        self.engine.all_reduce(lowest, "min")
        self.engine.all_reduce(highest, "max")
        return lowest.tolist(), highest.tolist()


def _rule(dense_below: int | Callable[[str, torch.nn.Parameter], bool]) -> Callable[[str, torch.nn.Parameter], bool]:
    """Which parameters are not to be compressed."""
    if callable(dense_below):
        return dense_below
    if isinstance(dense_below, bool) or not isinstance(dense_below, int) or dense_below < 0:
        raise ConfigError("dense_below must be a number of elements >= 0 or a function of (name, parameter), got "
                          f"{dense_below!r}")
    return lambda name, parameter: parameter.numel() < dense_below


DDP = DistributedDataParallel


class Builder:
    """Settings of a DistributedDataParallel, one call each."""

    def __init__(self, model: torch.nn.Module):
        self._model, self._settings = model, {}

    def bucket_size_mb(self, size: float) -> Self:
        self._settings["bucket_size_mb"] = size
        return self

    def broadcast_buffers(self, yes: bool = True) -> Self:
        self._settings["broadcast_buffers"] = yes
        return self

    def compression(self, name: str | Compressor | None) -> Self:
        self._settings["compression"] = name
        return self

    def error_feedback(self, yes: bool = True) -> Self:
        self._settings["error_feedback"] = yes
        return self

    def dense_below(self, rule: int | Callable[[str, torch.nn.Parameter], bool]) -> Self:
        self._settings["dense_below"] = rule
        return self

    def engine(self, engine: Engine) -> Self:
        self._settings["engine"] = engine
        return self

    def build(self) -> DistributedDataParallel:
        return DistributedDataParallel(self._model, **self._settings)


class _Restore(nullcontext):
    """Puts a reducer's weight back when the `with` block ends."""

    def __init__(self, reducer: Reducer, weight: float):
        super().__init__()
        self._reducer, self._weight = reducer, weight

    def __exit__(self, *_: object) -> None:
        self._reducer.weight = self._weight
