"""P1: the contract of an exporter: it shows the metrics of a process to the world outside, until it is closed."""
from __future__ import annotations

from abc import ABC, abstractmethod

from pyfleet.config import ClusterConfig
from pyfleet.metrics import Registry


class Exporter(ABC):
    """One per rank; reads the registry from a thread of its own and never delays a call."""

    @classmethod
    def check(cls) -> None:
        """Whether it can work here at all. Raises: ConfigError naming what is not installed."""

    @classmethod
    @abstractmethod
    def open(cls, registry: Registry, cluster: ClusterConfig, rank: int, local_rank: int) -> Exporter:
        """Begin, as the settings say.

        Raises:  OSError, saying what is in the way; the rank goes on without this exporter.
        """

    @abstractmethod
    def close(self) -> None:
        """Stop. Idempotent."""
