"""P2, open set: who moves the bytes of a collective call."""
from pyfleet.engines.base import Engine, Work, current, is_current, set_current

ENGINES = {
    "fleet": "pyfleet.engines.fleet:FleetEngine",
}

__all__ = ["ENGINES", "Engine", "Work", "current", "is_current", "set_current"]
