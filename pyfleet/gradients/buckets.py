"""Gradients that are sent together, in one flat tensor; every parameter's .grad is a view of it."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from pyfleet.errors import ConfigError, DTypeError

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)     # what engines can average


def assign(parameters: Sequence[torch.Tensor], bucket_bytes: float, apart: Sequence[bool] | None = None) -> list[list[int]]:
    """Cut the parameters, last one first, into buckets of one dtype and device each; return their indices.

    Args:    apart: which of them have buckets of their own; None: none.

    A parameter belongs to the bucket in whose range of `bucket_bytes` its last byte falls. So a group of parameters
    none of which is larger than a bucket makes exactly ceil(bytes / bucket_bytes) buckets. Buckets come in the order
    in which a backward pass completes them: by their last parameter.
    """
    groups: dict[tuple[torch.dtype, torch.device, bool, int], list[int]] = {}
    ends: dict[tuple[torch.dtype, torch.device, bool], int] = {}
    for i in reversed(range(len(parameters))):
        parameter = parameters[i]
        kind = (parameter.dtype, parameter.device, apart is not None and apart[i])
        ends[kind] = ends.get(kind, 0) + parameter.numel() * parameter.element_size()
        groups.setdefault((*kind, max(0, int(-(-ends[kind] // bucket_bytes)) - 1)), []).append(i)
    return sorted(groups.values(), key=min, reverse=True)


def make_buckets(named: Iterable[tuple[str, torch.nn.Parameter]], bucket_size_mb: float,
                 allocate: Callable[[int], Any],
                 is_dense: Callable[[str, torch.nn.Parameter], bool] | None = None) -> list[Bucket]:
    """Buckets of at most about `bucket_size_mb` MiB for the parameters that require a gradient.

    Args:    is_dense: says of a name and its parameter whether it belongs into a bucket that is not to be compressed.

    Raises:  ConfigError on a size that is not > 0, DTypeError on a dtype that engines cannot average.
    """
    if not bucket_size_mb > 0:
        raise ConfigError(f"bucket_size_mb must be > 0, got {bucket_size_mb}")
    named = [(name, parameter) for name, parameter in named if parameter.requires_grad]
    for name, parameter in named:
        if parameter.dtype not in DTYPES:
            raise DTypeError(f"parameter {name} is {parameter.dtype}; gradients can be averaged in "
                             + ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES))
    apart = None if is_dense is None else [bool(is_dense(name, parameter)) for name, parameter in named]
    plan = assign([parameter for _, parameter in named], bucket_size_mb * 2**20, apart)
    return [Bucket([named[i] for i in indices], allocate, apart is not None and apart[indices[0]]) for indices in plan]


class Bucket:
    """Parameters of one dtype and device, and the flat tensor through which their gradients travel.

    Attributes:
        flat:    (values + parameters,), in memory from `allocate` on the CPU; `values`, then one flag per parameter.
        values:  the gradients one after the other, each row-major whatever the parameter's strides: strides may differ
                 between ranks, the order on the wire may not.
        dense:   whether it is not to be compressed.
        flags:   1 where this rank had a gradient. Reduced with the values, at no extra message, they tell a parameter
                 that no rank used, whose .grad stays None as without a fleet, from one whose gradient is zero.
        views:   one view of `values` per parameter, in the parameter's shape.
    """

    def __init__(self, named: Sequence[tuple[str, torch.nn.Parameter]], allocate: Callable[[int], Any], dense: bool = False):
        self.dense = dense
        self.names = [name for name, _ in named]
        self.parameters = [parameter for _, parameter in named]
        first = self.parameters[0]
        num_values = sum(parameter.numel() for parameter in self.parameters)
        num_elems = num_values + len(self.parameters)
        if first.device.type == "cpu":
            memory = allocate(num_elems * first.element_size())
            self.flat = torch.frombuffer(memory, dtype=first.dtype, count=num_elems).zero_()
        else:
            self.flat = torch.zeros(num_elems, dtype=first.dtype, device=first.device)
        self.values, self.flags = self.flat[:num_values], self.flat[num_values:]
        self.views = [part.view_as(parameter) for part, parameter in zip(
            self.values.split([parameter.numel() for parameter in self.parameters]), self.parameters, strict=True)]
        self._missing: list[int] = []

    def adopt(self, slot: int) -> None:
        """Let the parameter's .grad, which must not be None, be its view; copies only where autograd made a new one."""
        parameter, view = self.parameters[slot], self.views[slot]
        grad = parameter.grad
        if grad is view:
            return
        if grad.layout is not torch.strided:
            raise DTypeError(f"the gradient of {self.names[slot]} is sparse, and only dense gradients can be averaged: "
                             "build its embedding with sparse=False")
        view.copy_(grad.detach())       # detached, because with create_graph=True the gradient has a graph
        parameter.grad = view

    def seal(self, weight: float) -> None:
        """Make `flat` ready to be reduced: every gradient in its place times `weight`, zeros for the missing ones."""
        self._missing = []
        for slot, (parameter, view) in enumerate(zip(self.parameters, self.views, strict=True)):
            grad = parameter.grad
            if grad is None:
                view.zero_()
                self._missing.append(slot)
            elif grad is not view:
                self.adopt(slot)
        self.flags.fill_(1)
        for slot in self._missing:
            self.flags[slot] = 0
        if weight == 0:
            self.values.zero_()         # not a product: what a rank without samples holds may be NaN
        elif weight != 1:
            self.values.mul_(weight)

    def deliver(self) -> None:
        """After the reduction: give parameters without a gradient here the one that other ranks found."""
        if self._missing:
            used = self.flags.tolist()
            for slot in self._missing:
                if used[slot] != 0:
                    self.parameters[slot].grad = self.views[slot]
