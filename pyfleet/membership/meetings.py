"""The stores in which the ranks of a view meet, kept by the view's leader: write-once keys, and who waits for them. Pure."""
from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

MOST_MEETINGS = 16              # views that may still be meeting; beyond that the oldest is forgotten
MOST_BYTES = 64 << 20           # of one meeting: 1024 ranks with cards of a few KB in a few rounds
Deliver = Callable[[bytes], None]


class Meetings:
    """Values by (fleet, epoch) and key."""

    def __init__(self) -> None:
        self._values: OrderedDict[tuple[str, int], dict[str, bytes]] = OrderedDict()
        self._waiting: dict[tuple[str, int, str], list[Deliver]] = {}

    def put(self, fleet: str, epoch: int, key: str, value: bytes) -> None:
        """Keep a value, unless there is one already, and hand it to who waits.

        Raises:  ValueError when the meeting holds too much.
        """
        values = self._meeting(fleet, epoch)
        if key not in values:
            if sum(map(len, values.values())) + len(value) > MOST_BYTES:
                raise ValueError(f"the ranks of epoch {epoch} have left more than {MOST_BYTES} bytes for each other")
            values[key] = value
        for deliver in self._waiting.pop((fleet, epoch, key), ()):
            deliver(values[key])

    def get(self, fleet: str, epoch: int, key: str, deliver: Deliver) -> None:
        """Have a value delivered: now, or when it comes."""
        values = self._meeting(fleet, epoch)
        if key in values:
            deliver(values[key])
        else:
            self._waiting.setdefault((fleet, epoch, key), []).append(deliver)

    def _meeting(self, fleet: str, epoch: int) -> dict[str, bytes]:
        if (fleet, epoch) not in self._values:
            self._values[fleet, epoch] = {}
            while len(self._values) > MOST_MEETINGS:
                gone, _ = self._values.popitem(last=False)
                for place in [place for place in self._waiting if place[:2] == gone]:
                    del self._waiting[place]
        return self._values[fleet, epoch]
