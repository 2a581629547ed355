"""P1, open set: memory that the host's processors do not reach, and how it is copied. `base` is the contract."""
from __future__ import annotations

from importlib import import_module
from typing import Any

from pyfleet.devices.base import Device

DEVICES = {         # torch's name of a device type -> how its tensors are copied
    "cuda": "pyfleet.devices.cuda:Cuda",
    "mps": "pyfleet.devices.mps:Mps",
}

__all__ = ["DEVICES", "Device", "any_present", "device_of", "open_device"]

_opened: dict[str, Device] = {}


def open_device(name: str) -> Device:
    """The device type of that name, made once in a process. Raises: KeyError for one that is not in the table."""
    if name not in _opened:
        module, _, kind = DEVICES[name].partition(":")
        _opened[name] = getattr(import_module(module), kind)()
    return _opened[name]


def device_of(tensor: Any) -> Device | None:
    """Where a torch tensor lies; None on the host, and for device types that the table does not have."""
    name = tensor.device.type
    return open_device(name) if name != "cpu" and name in DEVICES else None


def any_present() -> bool:
    """Whether this process may come to hold a tensor on a device. Loads neither torch nor a driver."""
    return any(open_device(name).present() for name in DEVICES)
