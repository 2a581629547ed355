"""P2, open set: who works on which samples and tasks."""
import importlib

_HOME = {
    "DataPartitioner": "pyfleet.data.partition",
    "split_by_weight": "pyfleet.data.partition",
    "balance_workload": "pyfleet.data.balance",
    "DistributedSampler": "pyfleet.data.sampler",
    "global_order": "pyfleet.data.sampler",
    "Samples": "pyfleet.data.samples",
    "seed_all": "pyfleet.data.seed",
}

__all__ = ["DataPartitioner", "DistributedSampler", "Samples", "balance_workload", "global_order", "seed_all",
           "split_by_weight"]


def __getattr__(name: str):
    # On use, so that partitioning and balancing do not pay for importing torch.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
