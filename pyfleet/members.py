"""P0: what ranks tell each other about themselves before there is a link."""
from __future__ import annotations

from dataclasses import asdict, dataclass

PROTOCOL = 1        # of the meeting, the links and the frames; ranks of another one are refused


@dataclass(frozen=True)
class Member:
    """One rank's card.

    Attributes:
        host:       equal for ranks that can share memory (same kernel, same process and network namespaces).
        addresses:  where its links listen, best first; "" port 0 when it offers none.
        devices:    whether it may hold arrays elsewhere than in host memory.
    """

    rank: int
    host: str
    name: str
    pid: int
    addresses: tuple[str, ...] = ()
    port: int = 0
    protocol: int = PROTOCOL
    devices: bool = False

    def card(self) -> dict:
        """As plain values, for the store."""
        return asdict(self) | {"addresses": list(self.addresses)}

    @classmethod
    def from_card(cls, card: dict) -> Member:
        """The member behind a card. Raises: TypeError for unknown or missing fields."""
        return cls(**{**card, "addresses": tuple(card["addresses"])})
