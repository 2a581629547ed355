"""P1: a torch TCPStore that the launcher (torchrun) already serves."""
from __future__ import annotations

from datetime import timedelta

from pyfleet.errors import ConfigError, NotEnoughPeers
from pyfleet.rendezvous.base import Store, decode, encode


class TorchStore(Store):
    """host:port of a listening torch.distributed.TCPStore."""

    def __init__(self, place: str, rank: int, size: int, timeout: float, secret: bytes | None = None):
        from torch.distributed import DistError, PrefixStore, TCPStore

        host, _, port = place.rpartition(":")
        if not port.isdigit():
            raise ConfigError(f"rendezvous address {place!r} is not host:port")
        self.gone = DistError
        try:
            store = TCPStore(host.strip("[]"), int(port), world_size=size, is_master=False,
                             timeout=timedelta(seconds=timeout), wait_for_workers=False)
        except DistError as error:
            raise NotEnoughPeers(f"the launcher's store did not answer at {place} within {timeout:g} s: {error}") from None
        self.store = PrefixStore("pyfleet", store)

    def set(self, key, value):
        self.store.set(key, encode(value))

    def get(self, key, timeout):
        try:
            self.store.wait([key], timedelta(seconds=max(timeout, 0.001)))
            return decode(self.store.get(key))
        except self.gone as error:
            if "timeout" in str(error).lower():
                raise KeyError(key) from None
            raise NotEnoughPeers(f"the launcher's store went away while the ranks met: {error}") from None

    def close(self):
        self.store = None
