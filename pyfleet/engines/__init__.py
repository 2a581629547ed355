"""P2, open set: who moves the bytes of a collective call."""
from pyfleet.engines.base import Engine, Work, all_gather_object, broadcast_object, current, is_current, set_current

ENGINES = {
    "fleet": "pyfleet.engines.fleet:FleetEngine",
}

__all__ = ["ENGINES", "Engine", "Work", "all_gather_object", "broadcast_object", "current", "is_current", "set_current"]
