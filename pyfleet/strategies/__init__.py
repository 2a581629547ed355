"""P3, open set: when and what the ranks synchronise."""
from importlib import import_module

from pyfleet.strategies.base import Strategy

STRATEGIES = {
    "data_parallel": "pyfleet.strategies.data_parallel:DistributedDataParallel",
}

__all__ = ["DDP", "STRATEGIES", "DistributedDataParallel", "Strategy"]


def __getattr__(name: str):
    # On use, as everything in the table: which kinds there are is no business of the table's importer.
    if name not in ("DDP", "DistributedDataParallel"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("pyfleet.strategies.data_parallel"), name)
