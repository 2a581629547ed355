"""How large gradients are."""
from __future__ import annotations

from collections.abc import Iterable

import torch


def gradient_norms(named: Iterable[tuple[str, torch.nn.Parameter]]) -> dict[str, float]:
    """The Euclidean norm of every gradient by parameter name; parameters without a gradient are left out."""
    grads = {name: parameter.grad for name, parameter in named if parameter.grad is not None}
    return {name: float(torch.linalg.vector_norm(grad)) for name, grad in grads.items()}
