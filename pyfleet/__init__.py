"""pyfleet: one training cluster out of the machines you own.

Names are imported on first use, so that `import pyfleet` costs little and a script without torch never loads it.
"""
from importlib import import_module

__version__ = "0.1.0"

_HOMES = {
    "pyfleet.errors": (
        "AuthFailed", "CommunicationError", "ConfigError", "CorruptData", "DTypeError", "Evicted", "FleetError",
        "NotEnoughPeers", "NotInitialized", "OutOfStep", "PeerLost", "ReduceOp", "ShapeError", "Timeout",
    ),
    "pyfleet.config": ("ClusterConfig", "NodeRole", "TrainingConfig", "load_config"),
    "pyfleet.fleet": (
        "Fleet", "init", "is_initialized", "is_leader", "local_rank", "rank", "shutdown", "world_size",
    ),
    "pyfleet.autodiscovery": ("AutoDiscovery",),
    "pyfleet.collectives": (
        "Group", "all_gather", "all_gather_into", "all_gather_object", "all_reduce", "all_reduce_mean", "all_reduce_sum",
        "all_to_all", "barrier", "broadcast", "broadcast_object", "empty", "from_numpy", "gather", "irecv", "isend",
        "new_group", "recv", "reduce", "reduce_scatter", "register", "ring_all_reduce", "scatter", "send", "zeros",
    ),
    "pyfleet.compression": ("GradientCompressor", "quantize_gradients", "sparsify_gradients"),
    "pyfleet.context": ("DistributedContext",),
    "pyfleet.data": ("DataPartitioner", "balance_workload", "seed_all"),
    "pyfleet.metrics": ("log_metric",),
    "pyfleet.sampling": ("DistributedSampler",),
    "pyfleet.strategies": ("DDP", "DistributedDataParallel"),
    "pyfleet.trainer": ("Callback", "Trainer"),
}
_NAMES = {name: module for module, names in _HOMES.items() for name in names}

__all__ = list(_NAMES)


def __getattr__(name):
    if name not in _NAMES:
        raise AttributeError(f"module 'pyfleet' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_NAMES[name]), name)
    return value


def __dir__():
    return sorted({*globals(), *__all__})
