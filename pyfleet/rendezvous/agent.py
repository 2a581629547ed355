"""P1: the store that the leader of a view keeps for the view's ranks; they reach it through their own node, sealed."""
from __future__ import annotations

from pyfleet.contact import Contact, SocketContact
from pyfleet.errors import ConfigError
from pyfleet.rendezvous.base import Store, decode, encode


class ViewStore(Store):
    """A view's store, through any contact. Keys of different views have nothing to do with each other."""

    def __init__(self, contact: Contact, fleet: str, epoch: int, timeout: float):
        self.contact, self.fleet, self.epoch, self.timeout = contact, fleet, epoch, timeout

    def set(self, key, value):
        self.contact.ask("put", self.timeout, fleet=self.fleet, epoch=self.epoch, key=key, value=encode(value))

    def get(self, key, timeout):
        return decode(self.contact.ask("get", max(timeout, 0.001), fleet=self.fleet, epoch=self.epoch, key=key))

    def close(self):
        """The contact belongs to the fleet."""


class AgentStore(ViewStore):
    """/path/of/the/agent's/socket#fleet.epoch"""

    def __init__(self, place: str, rank: int, size: int, timeout: float, secret: bytes | None = None):
        path, fleet, epoch = parse(place)
        super().__init__(SocketContact(path), fleet, epoch, timeout)


def parse(place: str) -> tuple[str, str, int]:
    """(socket, fleet, epoch) of SOCKET#FLEET.EPOCH. Raises: ConfigError."""
    path, _, view = place.rpartition("#")
    fleet, _, epoch = view.rpartition(".")
    if not path or not fleet or not epoch.isdigit():
        raise ConfigError(f"rendezvous address {place!r} is not SOCKET#FLEET.EPOCH")
    return path, fleet, int(epoch)


def url_of(path: str, fleet: str, epoch: int) -> str:
    """The rendezvous of a view at an agent's socket."""
    return f"agent://{path}#{fleet}.{epoch}"
