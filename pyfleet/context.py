"""P3: the collective calls as methods of one object, with counters and a timeline."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pyfleet import collectives, fleet
from pyfleet.errors import ConfigError


class DistributedContext:
    """This process among the ranks: every collective function as a method, and what they cost.

    Uses the fleet that pyfleet.init() joined; joins one otherwise.

    Args:    world_size, rank: as in init(); from the environment when not given.  options: more arguments of init().
    Raises:  ConfigError (a ValueError) when rank is not below world_size, or the fleet in force is another one.
    """

    def __init__(self, world_size: int | None = None, rank: int | None = None, **options: Any):
        if world_size is not None and world_size < 1:
            raise ConfigError(f"world_size must be at least 1, not {world_size}")
        if rank is not None and not 0 <= rank < (world_size or rank + 1):
            raise ConfigError(f"rank is {rank}, but world_size is {world_size}")
        self.fleet = fleet.init(rank=rank, world_size=world_size, **options)
        if rank not in (None, self.fleet.rank) or world_size not in (None, self.fleet.world_size):
            raise ConfigError(f"this process is already rank {self.fleet.rank} of {self.fleet.world_size}")

    def rank(self) -> int:
        """This process's number, 0 to world_size() - 1."""
        return self.fleet.rank

    def world_size(self) -> int:
        """How many ranks there are."""
        return self.fleet.world_size

    def is_master(self) -> bool:
        """Whether this rank leads."""
        return self.fleet.is_leader

    all_reduce = staticmethod(collectives.all_reduce)
    all_reduce_sum = staticmethod(collectives.all_reduce_sum)
    all_reduce_mean = staticmethod(collectives.all_reduce_mean)
    ring_all_reduce = staticmethod(collectives.ring_all_reduce)
    broadcast = staticmethod(collectives.broadcast)
    reduce = staticmethod(collectives.reduce)
    all_gather = staticmethod(collectives.all_gather)
    all_gather_into = staticmethod(collectives.all_gather_into)
    gather = staticmethod(collectives.gather)
    scatter = staticmethod(collectives.scatter)
    reduce_scatter = staticmethod(collectives.reduce_scatter)
    all_to_all = staticmethod(collectives.all_to_all)
    broadcast_object = staticmethod(collectives.broadcast_object)
    all_gather_object = staticmethod(collectives.all_gather_object)
    send = staticmethod(collectives.send)
    recv = staticmethod(collectives.recv)
    isend = staticmethod(collectives.isend)
    irecv = staticmethod(collectives.irecv)
    barrier = staticmethod(collectives.barrier)
    new_group = staticmethod(collectives.new_group)

    def receive(self, source: int = -1, tag: int = 0, *, return_source: bool = False, timeout: float | None = None) -> Any:
        """A new array from rank source, or with -1 from whoever is first; see recv()."""
        return collectives.recv(None, None if source == -1 else source, tag, return_source=return_source, timeout=timeout)

    def enable_profiling(self, on: bool = True) -> None:
        """Begin anew to remember every call of this rank and when it was made, or stop."""
        self.fleet.engine.record(on)

    def get_communication_stats(self) -> dict:
        """What communication has cost this rank since init().

        Returns: bytes_sent, bytes_received, messages_sent, messages_received: as counted at the sockets;
                 messages_count: the last two together; shared_memory_bytes: read from other ranks of this host;
                 operations: {verb: {"calls", "bytes", "seconds"}}; algorithms: {name: calls};
                 events: [{"operation", "bytes", "start", "seconds", "algorithm"}] since enable_profiling().
        """
        stats = self.fleet.stats()
        links = stats["links"].values()
        total = {name: sum(link[name] for link in links) for name in ("sent_bytes", "received_bytes", "sends", "receives")}
        return {
            "bytes_sent": total["sent_bytes"], "bytes_received": total["received_bytes"],
            "messages_sent": total["sends"], "messages_received": total["receives"],
            "messages_count": total["sends"] + total["receives"],
            "shared_memory_bytes": stats["shared_memory"]["read_bytes"],
            "operations": stats["operations"], "algorithms": stats["algorithms"],
            "events": [{"operation": verb, "bytes": size, "start": began, "seconds": ended - began, "algorithm": algorithm}
                       for verb, size, began, ended, algorithm in self.fleet.engine.recorded()],
        }

    def export_trace(self, path: str | Path) -> None:
        """Write the calls since enable_profiling() as a JSON trace for chrome://tracing or Perfetto."""
        events = [{"name": event["operation"], "ph": "X", "pid": self.rank(), "tid": 0, "ts": event["start"] * 1e6,
                   "dur": event["seconds"] * 1e6, "args": {"bytes": event["bytes"], "algorithm": event["algorithm"]}}
                  for event in self.get_communication_stats()["events"]]
        Path(path).write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))
