"""P3: finding the other machines step by step, where init(min_nodes=...) does it at once."""
from __future__ import annotations

import threading
from typing import Any, Self

from pyfleet import fleet as fleets
from pyfleet.config import ClusterConfig, load_config
from pyfleet.errors import NotInitialized
from pyfleet.fleet import Fleet
from pyfleet.members import Node
from pyfleet.membership.joining import open_contact
from pyfleet.placement import Placement
from pyfleet.wiring import Deadline


class AutoDiscovery:
    """A node that looks for others from the moment it is made. A context manager.

    Args:    namespace, psk_file, config: as for init().
    Raises:  ConfigError without a secret (psk_file, PYFLEET_PSK_FILE), by which nodes know each other.
    """

    def __init__(self, namespace: str | None = None, psk_file: str | None = None, config: Any = None):
        cluster = config if isinstance(config, ClusterConfig) else load_config(config)[1]
        self.cluster = fleets.with_secrets(cluster, namespace, psk_file)
        self.contact = open_contact(self.cluster, 1)
        self._lock, self._fleet = threading.Lock(), None
        self._wanted = self.cluster.min_peers

    def wait_for_peers(self, count: int, timeout: float = 30.0) -> int:
        """Wait until that many other nodes are there, proven and connected; how many there are then.

        Raises:  NotEnoughPeers("found 1 of 3 peers ...") after `timeout` seconds.
        """
        found = self.contact.ask("peers", float(timeout), count=count)
        self._wanted = max(self._wanted, count)
        return found

    def establish_ring(self, timeout: float | None = None) -> Fleet:
        """Agree with the others who is in, and in which order, and connect to them; the fleet, which is then in force.

        Idempotent; of several threads that call it at once, one connects.

        Args:    timeout: seconds; None is peer_timeout.
        Raises:  NotEnoughPeers, AuthFailed, ConfigError, PeerLost.
        """
        with self._lock:
            if self._fleet is None:
                deadline = Deadline(self.cluster.peer_timeout if timeout is None else timeout)
                self._fleet = fleets.enter_by(self.contact, Placement(0, 1, 0, 1, 0), self._wanted + 1, self.cluster, deadline)
            return self._fleet

    @property
    def nodes(self) -> list[Node]:
        """This node and those that it has found, as they introduced themselves."""
        return [Node(peer=told["peer"], incarnation=told["incarnation"], name=told["name"], port=told["port"],
                     addresses=tuple(told["addresses"]), slots=told["slots"], profile=told["profile"], version=told["version"])
                for told in self.contact.ask("status")["nodes"] if told["incarnation"]]

    @property
    def rank(self) -> int:
        """This process's number. Raises: NotInitialized before there is a ring."""
        return self._established().rank

    @property
    def world_size(self) -> int:
        """How many ranks the ring has. Raises: NotInitialized before there is one."""
        return self._established().world_size

    def _established(self) -> Fleet:
        if self._fleet is None:
            raise NotInitialized("there is no ring yet: call establish_ring() first")
        return self._fleet

    def close(self) -> None:
        """Leave; shuts the fleet down, too, when it is the one in force. Idempotent."""
        if self._fleet is not None:
            if fleets.is_initialized() and fleets.current() is self._fleet:
                fleets.shutdown()
            self._fleet.close()
        self.contact.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
