"""P1: how often an address may fail to authenticate."""
from __future__ import annotations

from collections import OrderedDict

BURST = 8               # failures in a row that may be accidents
REFILL_S = 1.0          # one more per second, so a guess costs a second in the long run
MOST_ADDRESSES = 1024   # remembered; beyond that the longest silent is forgotten


class Throttle:
    """A token bucket of failures per address. The time comes in as an argument; memory is bounded."""

    def __init__(self) -> None:
        self._spent: OrderedDict[str, tuple[float, float]] = OrderedDict()      # address -> (not forgiven yet, when)

    def failed(self, address: str, now: float) -> None:
        """An attempt from this address was no good."""
        self._spent[address] = (min(self._left(address, now) + 1, 2 * BURST), now)
        self._spent.move_to_end(address)
        if len(self._spent) > MOST_ADDRESSES:
            self._spent.popitem(last=False)

    def allows(self, address: str, now: float) -> bool:
        """Whether the next attempt from this address deserves a look."""
        return self._left(address, now) <= BURST - 1

    def _left(self, address: str, now: float) -> float:
        spent, when = self._spent.get(address, (0.0, now))
        return max(0.0, spent - (now - when) / REFILL_S)
