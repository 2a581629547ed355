"""Asking a node of the namespace how things stand, from outside of the fleet."""
from __future__ import annotations

import asyncio
import contextlib
import queue
from typing import Any

import msgspec

from pyfleet.config import ClusterConfig, host_and_port
from pyfleet.discovery import Seen, configured, open_discovery
from pyfleet.discovery.base import Event
from pyfleet.errors import AuthFailed, ConfigError, NotEnoughPeers
from pyfleet.identity import Namespace, NodeKey
from pyfleet.identity.handshake import Kind
from pyfleet.membership.channel import Channel, Closed, Self, dial
from pyfleet.membership.messages import Told
from pyfleet.wiring import Deadline


def own_self(cluster: ClusterConfig) -> Self:
    """Who asks: a member, but no node; its key is for this once.

    Raises:  ConfigError without a secret: nodes answer members only.
    """
    return Self(NodeKey.generate(), Namespace.required(cluster))


def status_at(own: Self, address: str, port: int, timeout: float) -> dict[str, Any]:
    """The status of the node at an address: see Service.status.

    Raises:  NotEnoughPeers when nobody answers, AuthFailed when who is there is of another namespace.
    """
    async def ask() -> dict[str, Any]:
        reader, writer, session = await dial(own, address, port, kind=Kind.QUERY, patience_s=timeout)
        channel = Channel(reader, writer, session, dialled=True)
        try:
            async with asyncio.timeout(timeout):
                told = await channel.receive()
        except (Closed, TimeoutError) as error:
            raise NotEnoughPeers(f"{address} port {port}: it did not answer: {str(error) or 'silent'}") from None
        finally:
            await channel.close(0.0)
        if not isinstance(told, Told):
            raise NotEnoughPeers(f"{address} port {port}: it answered something else")
        return msgspec.msgpack.decode(told.status)
    return asyncio.run(ask())


def find_status(cluster: ClusterConfig, master: str | None, timeout: float) -> dict[str, Any]:
    """The status of a node: the one at `master` (host[:port]), else the first that discovery shows and that answers.

    Raises:  NotEnoughPeers, AuthFailed, ConfigError; within about `timeout` seconds.
    """
    own, deadline = own_self(cluster), Deadline(timeout)
    if master is not None:
        try:
            host, port = host_and_port(master, cluster.discovery_port)
        except ValueError:
            raise ConfigError(f"the address of a node is HOST or HOST:PORT, not {master!r}") from None
        return status_at(own, host, port, timeout)
    if not configured(cluster):
        raise ConfigError("discovery is turned off (PYFLEET_DISCOVERY_ENABLED), and no address is given")
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    trouble = "nobody of this namespace is in sight"
    with contextlib.ExitStack() as looking:
        for kind in configured(cluster):
            discovery = open_discovery(kind, cluster, own.namespace)
            discovery.start(None, events.put)
            looking.callback(discovery.close)
        while deadline.left():
            try:
                event = events.get(timeout=deadline.left())
            except queue.Empty:
                break
            if not isinstance(event, Seen):
                continue
            for address in event.sighting.addresses:
                try:
                    return status_at(own, address, event.sighting.port, max(0.1, min(deadline.left(), 2.0)))
                except (NotEnoughPeers, AuthFailed) as error:
                    trouble = str(error)
    raise NotEnoughPeers(f"no node answered within {timeout:g} s: {trouble}")
