"""P1, open set: where ranks that share nothing but an address meet. `base` is the contract."""
from importlib import import_module

RENDEZVOUS = {      # URL scheme -> store
    "agent": "pyfleet.rendezvous.agent:AgentStore",
    "file": "pyfleet.rendezvous.file:FileStore",
    "tcp": "pyfleet.rendezvous.tcp:TcpStore",
    "torch": "pyfleet.rendezvous.torch:TorchStore",
}


def open_store(url, rank, size, timeout, secret=None):
    """The store at `url`; rank 0 makes it where somebody has to.

    Args:    timeout: seconds to reach it.
             secret: bytes that all ranks know and nobody else; what goes through a tcp store is sealed with it. Of the
             others, a directory has its owner, an agent its own seal, and a torch store no such thing.
    Raises:  ConfigError for an unknown scheme or an address in use; NotEnoughPeers when it cannot be reached in time;
             AuthFailed when rank 0 knows another secret.
    """
    from pyfleet.errors import ConfigError

    scheme, _, place = url.partition("://")
    if scheme not in RENDEZVOUS or not place:
        raise ConfigError(f"rendezvous {url!r} is not one of {', '.join(f'{name}://...' for name in RENDEZVOUS)}")
    module, name = RENDEZVOUS[scheme].split(":")
    return getattr(import_module(module), name)(place, rank, size, timeout, secret)
