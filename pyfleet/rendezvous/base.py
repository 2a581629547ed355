"""P1: the contract of a store: a few small values that ranks leave for each other while they meet."""
from __future__ import annotations

from abc import ABC, abstractmethod

import msgspec

MAX_VALUE_BYTES = 1 << 20       # cards and addresses, never tensors


class Store(ABC):
    """Write-once keys. A store is needed only until the links stand; it may go away after that."""

    @abstractmethod
    def set(self, key: str, value: object) -> None:
        """Leave a JSON-like value under key.

        Raises:  NotEnoughPeers when the store is gone.
        """

    @abstractmethod
    def get(self, key: str, timeout: float) -> object:
        """The value under key, waiting for it.

        Raises:  KeyError when it is not there after `timeout` seconds; NotEnoughPeers when the store is gone.
        """

    def refusals(self) -> str:
        """What to add to the news that ranks are missing: how many have been turned away here, and why."""
        return ""

    @abstractmethod
    def close(self) -> None:
        """Let go. Idempotent."""


def encode(value: object) -> bytes:
    """msgpack, bounded."""
    data = msgspec.msgpack.encode(value)
    if len(data) > MAX_VALUE_BYTES:
        raise ValueError(f"a store value of {len(data)} bytes is over the limit of {MAX_VALUE_BYTES}")
    return data


def decode(data: bytes) -> object:
    """The value that `encode` was given."""
    return msgspec.msgpack.decode(data)
