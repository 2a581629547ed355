"""The contract of a strategy: a module wrapped so that training it on every rank trains one model."""
from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch

from pyfleet.engines import Engine


class Strategy(torch.nn.Module, ABC):
    """Wraps `module`; forward, parameters, state and unknown attributes are the module's own, without a prefix.

    Every rank makes the same calls in the same order: forward and backward (or `participate`), the optimiser's step,
    `after_step`; and `finish` once, after the last step.
    """

    def __init__(self, module: torch.nn.Module, engine: Engine):
        super().__init__()
        self.module = module
        self.engine = engine

    @abstractmethod
    def no_sync(self) -> AbstractContextManager[None]:
        """Within it backward passes only accumulate; the first one after it synchronises the sum."""

    @abstractmethod
    def set_samples(self, local: int | None, total: int | None) -> AbstractContextManager[None]:
        """Tell how many samples this rank's gradients are the mean over, and how many all ranks have together."""

    @abstractmethod
    def participate(self) -> None:
        """Stand in for a backward pass on a rank that has no samples for it."""

    def after_step(self) -> None:
        """Called after the optimiser's step: what the strategy does between steps."""

    def finish(self) -> None:
        """Called after the last step: make all ranks' models equal, if they are not."""

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.load_state_dict(*args, **kwargs)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
        return self.module.named_parameters(*args, **kwargs)

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, torch.Tensor]]:
        return self.module.named_buffers(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "module":        # not wrapped yet
                raise
            return getattr(self.module, name)
