"""P2, open set: who moves the bytes of a collective call."""
from importlib import import_module

from pyfleet.engines.base import (
    Engine,
    Levels,
    Work,
    all_gather_object,
    broadcast_object,
    current,
    forget_all,
    is_current,
    set_current,
)

ENGINES = {
    "fleet": "pyfleet.engines.fleet:FleetEngine",
    "gloo": "pyfleet.engines.torch:GlooEngine",
    "nccl": "pyfleet.engines.torch:NcclEngine",
    "mpi": "pyfleet.engines.mpi:MpiEngine",
    "mock": "pyfleet.engines.mock:MockEngine",
}
PER_THREAD = {"mock"}       # every thread of a process may be another rank

__all__ = ["ENGINES", "PER_THREAD", "Engine", "Levels", "Work", "all_gather_object", "broadcast_object", "current", "engine_class",
           "forget_all", "is_current", "set_current"]


def engine_class(name: str) -> type[Engine]:
    """The class behind a name of ENGINES."""
    module, kind = ENGINES[name].split(":")
    return getattr(import_module(module), kind)
