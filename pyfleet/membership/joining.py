"""How a rank comes by its membership: from the agent that its launcher started, or by a service of its own process."""
from __future__ import annotations

from dataclasses import dataclass, replace

import msgspec

from fleetcore.schedules.model import Links
from pyfleet.config import ClusterConfig
from pyfleet.contact import Contact, SocketContact
from pyfleet.errors import ConfigError
from pyfleet.members import View
from pyfleet.placement import Placement
from pyfleet.rendezvous.agent import ViewStore, parse
from pyfleet.wiring import Deadline


@dataclass(frozen=True)
class Membership:
    """A view that this rank takes part in, and the contact to its node.

    Attributes:
        links: between the ranks, as the nodes measured them and the leader told all alike; None: not measured.
    """

    contact: Contact
    view: View
    links: Links | None = None

    def store(self, timeout: float) -> ViewStore:
        """Where the ranks of the view meet.

        Args:    timeout: seconds for each value that is left there.
        """
        return ViewStore(self.contact, self.view.fleet, self.view.epoch, timeout)


def find(place: Placement, cluster: ClusterConfig, min_nodes: int | None, deadline: Deadline) -> tuple[Placement, Membership | None]:
    """The membership behind a placement; None where a launcher has said everything, or there is nobody to look for.

    Args:    min_nodes: machines to find, this one included; None is min_peers + 1 where there is a secret to find them by.
    Returns: the placement, completed by what the view says.
    Raises:  NotEnoughPeers, ConfigError, FleetError.
    """
    if place.rendezvous is not None and place.rendezvous.startswith("agent://"):
        path, fleet, epoch = parse(place.rendezvous.removeprefix("agent://"))
        contact = SocketContact(path)
        return place, membership(contact, fleet, epoch)
    if min_nodes is not None and (type(min_nodes) is not int or min_nodes < 1):
        raise ConfigError(f"min_nodes must be an integer >= 1, not {min_nodes!r}")
    if place.source != "alone":
        if min_nodes is not None:
            raise ConfigError(f"min_nodes is for machines that find each other, but {place.source} has said which ranks there "
                              f"are: {place.world_size}")
        return place, None
    if min_nodes is None and not _is_findable(cluster):
        return place, None
    contact = open_contact(cluster, min_nodes or cluster.min_peers + 1)
    try:
        return join(contact, place, min_nodes or cluster.min_peers + 1, deadline)
    except BaseException:
        contact.close()
        raise


def join(contact: Contact, place: Placement, min_nodes: int, deadline: Deadline) -> tuple[Placement, Membership]:
    """Wait for a view of so many nodes, and take this rank's place in it.

    Raises:  NotEnoughPeers("found 1 of 3 ...") at the deadline.
    """
    ready = contact.ask("ready", deadline.left(), min_nodes=min_nodes)
    port = ready["master_port"]
    place = replace(place, rank=ready["first_rank"], world_size=ready["world_size"], local_rank=0, local_world_size=1,
                    node_rank=ready["node_rank"], master_addr=ready["master_addr"], master_port=port, source="discovery",
                    rendezvous=f"tcp://{_bracketed(ready['master_addr'])}:{port}")
    return place, membership(contact, ready["fleet"], ready["epoch"])


def open_contact(cluster: ClusterConfig, min_nodes: int) -> Contact:
    """A service of this process, one rank strong.

    Raises:  ConfigError without a secret, for a key that cannot be used, or for a port in use.
    """
    from pyfleet.membership.service import (  # asyncio, zeroconf: only who looks pays for them
        ServiceContact,
        open_service,
    )

    return ServiceContact(open_service(cluster, min_nodes=min_nodes))


def membership(contact: Contact, fleet: str, epoch: int) -> Membership:
    """The membership of the ranks that were started in a view. Raises: FleetError when this node was not in it."""
    told = contact.ask("view", fleet=fleet, epoch=epoch)
    links = Links(told["links"][0], tuple(told["links"][1]), told["links"][2]) if told["links"] else None
    return Membership(contact, msgspec.convert(told["view"], View), links)


def _is_findable(cluster: ClusterConfig) -> bool:
    """Whether others could find this node, so that looking for them makes sense."""
    return (cluster.psk is not None or cluster.psk_file is not None) and (cluster.discovery_enabled or bool(cluster.static_peers))


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
