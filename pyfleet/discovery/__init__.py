"""P1, open set: how nodes come to know of each other. `base` is the contract.

What discovery says is a hint where to connect. Who a node is, and whether it belongs here, the handshake proves.
"""
from __future__ import annotations

import threading
from importlib import import_module

from pyfleet.config import ClusterConfig
from pyfleet.discovery.base import Announcement, Belonging, Discovery, Event, Gone, Seen
from pyfleet.errors import ConfigError

DISCOVERY = {       # kind -> how it is done
    "mdns": "pyfleet.discovery.mdns:MdnsDiscovery",
    "static": "pyfleet.discovery.static:StaticDiscovery",
}

__all__ = ["DISCOVERY", "Announcement", "Belonging", "Discovery", "Gone", "Seen", "configured", "look", "open_discovery"]


def configured(cluster: ClusterConfig) -> list[str]:
    """The kinds that the settings ask for: mdns unless discovery_enabled is off, static where there are static_peers."""
    return ["mdns"] * cluster.discovery_enabled + ["static"] * bool(cluster.static_peers)


def open_discovery(kind: str, cluster: ClusterConfig, namespace: Belonging | None, *, everybody: bool = False) -> Discovery:
    """A discovery of that kind, not started yet.

    Args:    namespace: whose nodes are wanted, as identity.Namespace; None to look at all, without announcing.
             everybody: report the nodes of other namespaces, too.
    Raises:  ConfigError for an unknown kind, and for mdns where discovery_enabled is off: not one packet then.
    """
    if kind not in DISCOVERY:
        raise ConfigError(f"discovery {kind!r} is not one of {', '.join(DISCOVERY)}")
    if kind == "mdns" and not cluster.discovery_enabled:
        raise ConfigError("discovery by mDNS is turned off (cluster.discovery_enabled, PYFLEET_DISCOVERY_ENABLED)")
    module, _, name = DISCOVERY[kind].partition(":")
    return getattr(import_module(module), name)(cluster, namespace, everybody)


def look(cluster: ClusterConfig, namespace: Belonging | None, timeout_s: float) -> list[Seen]:
    """Everybody who is seen on the network within that time and has not left again. Ends early on Ctrl-C.

    Args:    namespace: whose nodes can prove what they say; nodes of others are seen, too.
    Raises:  ConfigError where discovery is turned off.
    """
    found: dict[tuple[str, str], Seen] = {}

    def take(event: Event) -> None:
        if isinstance(event, Gone):
            found.pop((event.peer, event.incarnation), None)
        else:
            found[event.sighting.peer, event.sighting.incarnation] = event

    discovery = open_discovery("mdns", cluster, namespace, everybody=True)
    try:
        discovery.start(None, take)
        threading.Event().wait(timeout_s)
    except KeyboardInterrupt:
        pass
    finally:
        discovery.close()
    return list(found.values())
