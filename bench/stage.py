"""The systems under test, alive side by side in one rank process."""
from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

import numpy as np

from bench.ranks import Team
from bench.report import human_size
from bench.systems import System, create


class Stage:
    """The systems that started, and what all ranks agree on about them. A system that raises is out, on every rank.

    `systems` holds those still in, `reasons` why others are not; `size` is what is being measured, told with every trouble
    (None: nothing yet).
    """

    def __init__(self, team: Team, names: list[str]) -> None:
        """Start the systems, one after the other; those that cannot start are reported and left out."""
        self.team = team
        self.size: int | None = None
        self.systems: dict[str, System] = {}
        self.reasons: dict[str, str] = {}
        for name in names:
            team.progress(f"the start of {name}")
            folder = team.folder / name
            folder.mkdir(exist_ok=True)
            if self.attempt(name, lambda name=name: self.systems.update({name: create(name)})):
                self.attempt(name, lambda name=name, folder=folder: self.systems[name].start(team.rank, team.size, folder))

    def attempt(self, name: str, work: Callable[[], object]) -> bool:
        """Do work on every rank; whether it went well on all. Where it did not, say why, and the system is out."""
        trouble = None
        try:
            work()
        except Exception as error:  # noqa: BLE001 - whatever a system raises becomes its row in the report
            trouble = f"{type(error).__name__}: {error}".partition("\n")[0]
        trouble = self.team.agree(trouble)
        if trouble:
            self.team.emit(kind="trouble", system=name, size=self.size, reason=trouble)
            self.reasons[name] = trouble
            self.systems.pop(name, None)
        return trouble is None

    def prepare(self, name: str) -> object | None:
        """A handle of self.size bytes for which the system is shown to sum right; None, and a reported trouble, else."""
        assert self.size is not None
        system, team, num_elems = self.systems[name], self.team, self.size // 4
        team.progress(f"the first call of {name} with {human_size(self.size)}")
        made: list = []
        ramp = (np.arange(num_elems, dtype=np.int32) % 1021).astype(np.float32)     # sums of small integers are exact

        def first_call() -> None:
            made.append(system.array(num_elems))
            system.write(made[0], ramp * (team.rank + 1))
            system.call(made[0])

        def check() -> None:
            _check(system.read(made[0]), ramp * (team.size * (team.size + 1) // 2))
            # Zeros stay zeros however often they are summed; ones would be infinite after 128 calls.
            system.write(made[0], np.zeros(num_elems, np.float32))

        return made[0] if self.attempt(name, first_call) and self.attempt(name, check) else None

    def sample(self, name: str, handle: object, num_calls: int) -> int | None:
        """Nanoseconds that num_calls calls took the slowest rank; None when a rank failed, and the system is out."""
        call, elapsed = self.systems[name].call, 0

        def calls() -> None:
            nonlocal elapsed
            start = time.perf_counter_ns()
            for _ in range(num_calls):
                call(handle)
            elapsed = time.perf_counter_ns() - start

        self.team.tick()
        self.team.exchange()
        return max(self.team.exchange(elapsed)) if self.attempt(name, calls) else None

    def close(self) -> None:
        """Leave every system; one that cannot leave does not keep the others."""
        for system in self.systems.values():
            with contextlib.suppress(Exception):
                system.close()


def _check(result: np.ndarray, expected: np.ndarray) -> None:
    if result.shape != expected.shape:
        raise ArithmeticError(f"WRONG SUM: its shape is {result.shape}, not {expected.shape}")
    if (wrong := np.flatnonzero(result != expected)).size:
        raise ArithmeticError(f"WRONG SUM in {wrong.size} of {expected.size} elements, first in element {wrong[0]}: "
                              f"{result[wrong[0]]}, not {expected[wrong[0]]}")
