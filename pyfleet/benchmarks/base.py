"""Ranks that are measured together: they start each call at once, and the slowest one counts."""
from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

ROW_S = 1.0             # what the samples of one row may take
MIN_REPS, MAX_REPS = 5, 200
SAMPLE_S = 2e-4         # a sample lasts at least so long: ranks leave a barrier microseconds apart
MAX_REPEATS = 200


class Ranks:
    """What the ranks of a benchmark need of each other: to start together, and to tell each other numbers."""

    def __init__(self) -> None:
        from pyfleet import collectives, fleet
        self.fleet = fleet.init()
        self.rank, self.size = self.fleet.rank, self.fleet.world_size
        self.barrier, self.all_reduce = collectives.barrier, collectives.all_reduce
        self.by_memory = self.fleet.engine.group.domain is not None
        self.num_hosts = len({member.host for member in self.fleet.members})

    def most(self, value: float) -> float:
        """The greatest of all ranks' values, on every rank."""
        word = np.array([value])
        self.all_reduce(word, "max")
        return float(word[0])

    def tell(self, text: str) -> list[str]:
        """Every rank's text, of 100 bytes at most."""
        room = np.zeros((self.size, 100), np.uint8)
        room[self.rank, :len(text)] = np.frombuffer(text.encode(), np.uint8)
        self.all_reduce(room)
        return [bytes(row).rstrip(b"\0").decode() for row in room]

    def samples(self, *calls: Callable[[], float | None]) -> list[list[float]]:
        """Seconds that the slowest rank took for each call, in turns; a call may return what it measured itself."""
        taken: list[list[float]] = [[] for _ in calls]
        repeats, reps, rep = [1] * len(calls), 0, -2        # the first turn connects, maps and learns; the second one plans
        while rep <= reps:
            for call, repeat, seconds in zip(calls, repeats, taken, strict=True):
                self.barrier()
                start = time.perf_counter()
                for _ in range(repeat):
                    measured = call()
                elapsed = (time.perf_counter() - start) / repeat if measured is None else measured
                seconds.append(self.most(elapsed))
            if rep == -1:
                planned = [each.pop() for each in taken]
                taken = [[] for _ in calls]
                repeats = [max(1, min(MAX_REPEATS, int(SAMPLE_S / max(1e-9, each)))) for each in planned]
                turn_s = sum(each * repeat for each, repeat in zip(planned, repeats, strict=True))
                reps = max(MIN_REPS, min(MAX_REPS, int(ROW_S * len(calls) / max(1e-9, turn_s))))
            rep += 1
        return taken
