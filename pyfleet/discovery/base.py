"""P1: the contract of a discovery: it says where nodes can be found, and that this one can be found, too."""
from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from pyfleet.config import ClusterConfig
from pyfleet.errors import ConfigError
from pyfleet.members import PROTOCOL, Sighting

MOST_SIGHTINGS = 1024       # kept at a time by each kind; whatever else is out there, memory stays bounded
CLOSING_S = 1.0             # close() returns within this, good-byes included


@dataclass(frozen=True)
class Announcement:
    """What a node tells everybody on the network of itself.

    Attributes:
        peer:        its full peer id (identity.NodeKey.peer_id).
        incarnation: 16 hexadecimal digits, new at every start.
        port:        where its control connections are taken.
        name:        its host name, for people.
        addresses:   where it can be reached, best first; () for all that this machine has, followed as they change.
        version:     of pyfleet, for people.
    """

    peer: str
    incarnation: str
    port: int
    name: str = ""
    addresses: tuple[str, ...] = ()
    version: str = ""
    protocol: int = PROTOCOL


@dataclass(frozen=True)
class Seen:
    """A node has appeared, or what is known of it has changed; the same peer in two incarnations is two sightings.

    Attributes:
        tag:      of the namespace that it says to belong to; "" where the kind cannot know.
        protocol: that it says to speak; 0 where the kind cannot know.
    """

    sighting: Sighting
    tag: str = ""
    protocol: int = 0
    version: str = ""


@dataclass(frozen=True)
class Gone:
    """A node that was seen has said good-bye, or has not been heard of for too long."""

    peer: str
    incarnation: str
    source: str


Event = Seen | Gone
Notify = Callable[[Event], None]


class Belonging(Protocol):
    """What discovery needs of a namespace; identity.Namespace has it."""

    @property
    def tag(self) -> str:
        """32 hexadecimal digits, the same for all members, for everybody to read."""

    def mark(self, message: bytes) -> str:
        """What only members can say about a message."""


class Discovery(ABC):
    """One way to find nodes. Methods may be called from any thread.

    Args:    namespace: whose nodes are reported; None reports all, and can not announce.
             everybody: report the nodes of other namespaces, too; but never one that only claims to be of ours.
    """

    def __init__(self, cluster: ClusterConfig, namespace: Belonging | None, everybody: bool = False):
        self.cluster, self.namespace, self.everybody = cluster, namespace, everybody or namespace is None

    @abstractmethod
    def start(self, announcement: Announcement | None, notify: Notify) -> None:
        """Look for others from now on, and announce this node unless there is nothing to announce. Returns at once.

        A network that is not there (yet), or blocks us, is logged and tried again: it is no error.

        Args:    notify: called for every event from a thread of this discovery, one at a time; must not block, and may be
                 called once more while close() waits.
        Raises:  ConfigError when there is something to announce and no namespace to announce it in.
        """

    @abstractmethod
    def update(self, announcement: Announcement) -> None:
        """Announce this from now on; peer and incarnation are those of start()."""

    @abstractmethod
    def close(self) -> None:
        """Say good-bye and end, within CLOSING_S. Idempotent."""

    @property
    def num_strangers(self) -> int:
        """How many nodes of other namespaces are in sight, at most MOST_SIGHTINGS."""
        return 0

    def _refuse_without_namespace(self, announcement: Announcement | None) -> None:
        if announcement is not None and self.namespace is None:
            raise ConfigError("a node without a namespace can not be announced: everybody on the network could join it; "
                              "`pyfleet keys psk` makes the secret, psk_file (PYFLEET_PSK_FILE) says where it is")
