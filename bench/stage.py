"""The systems under test, alive side by side in one rank process."""
from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from bench.ranks import Team
from bench.report import human_size
from bench.systems import System, create

SAMPLE_NS = 200_000         # a sample lasts at least so long: the ranks leave their barrier 0.3 us apart (99 of 100 times)
MAX_CALLS = 4096
MIN_REPS, MAX_REPS = 5, 101


class Sample(NamedTuple):
    """What some calls in a row cost."""

    elapsed_ns: int     # of the slowest rank
    cpu_ns: int         # of all ranks and their threads, waiting included
    wire_bytes: int     # of the host whose link carried most in one direction; 0 where there is no link


class Stage:
    """The systems that started, and what all ranks agree on about them. A system that raises is out, on every rank.

    `systems` holds those still in, `reasons` why others are not; `size` is what is being measured, told with every trouble
    (None: nothing yet).
    """

    def __init__(self, team: Team, names: list[str], traffic: Callable[[], tuple[int, int]] | None = None,
                 make: Callable[[str], System] = create) -> None:
        """Start the systems, one after the other; those that cannot start are reported and left out.

        Args:    traffic: bytes that this host's link has carried so far, one direction and the other.
                 make: a new adapter of the system of that name.
        """
        self.team, self._traffic = team, traffic
        self.size: int | None = None
        self.systems: dict[str, System] = {}
        self.reasons: dict[str, str] = {}
        for name in names:
            team.progress(f"the start of {name}")
            folder = team.folder / name
            folder.mkdir(exist_ok=True)
            if self.attempt(name, lambda name=name: self.systems.update({name: make(name)})):
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
            demand_equal(system.read(made[0]), ramp * (team.size * (team.size + 1) // 2), system.tolerance)
            # Zeros stay zeros however often they are summed; ones would be infinite after 128 calls.
            system.write(made[0], np.zeros(num_elems, np.float32))

        return made[0] if self.attempt(name, first_call) and self.attempt(name, check) else None

    def sample(self, name: str, handle: object, num_calls: int) -> Sample | None:
        """What num_calls calls cost; None when a rank failed, and the system is out."""
        call, elapsed, cpu, carried = self.systems[name].call, 0, 0, (0, 0)

        def calls() -> None:
            nonlocal elapsed, cpu
            cpu, start = time.process_time_ns(), time.perf_counter_ns()
            for _ in range(num_calls):
                call(handle)
            elapsed = time.perf_counter_ns() - start
            cpu = time.process_time_ns() - cpu

        self.team.tick()
        if self._traffic:
            carried = self._traffic()
        self.team.exchange()
        if not self.attempt(name, calls):
            return None
        slowest, total = max(self.team.exchange(elapsed)), sum(self.team.exchange(cpu))
        if self._traffic:
            carried = (now - before for now, before in zip(self._traffic(), carried, strict=True))
        return Sample(slowest, total, max(self.team.exchange(max(carried))))

    def rows(self, num_bytes: int, reps: int | None, budget_s: float) -> list[dict]:
        """One row per system for arrays of num_bytes: {"system", "bound", "calls", "seconds", "cpu_s", "wire_bytes"}.

        Systems take turns, sample by sample, so that what disturbs one disturbs them all.
        Args:    reps: samples of each system; None for what budget_s allows.
        """
        handles, num_calls, samples, round_ns = {}, {}, {}, 0
        self.size = num_bytes
        for name, system in list(self.systems.items()):
            if system.largest is not None and num_bytes > system.largest:
                continue
            handle = self.prepare(name)
            if handle is not None and (found := self._calibrate(name, handle)):
                handles[name], (num_calls[name], lasted_ns) = handle, found
                samples[name] = []
                round_ns += lasted_ns
        if not handles:
            return []
        # Every rank computes the same numbers from the same exchanged times, so they agree without asking.
        reps = reps or min(MAX_REPS, max(MIN_REPS, int(budget_s * 1e9 / max(1, round_ns))))
        self.team.progress(f"the samples of {human_size(num_bytes)}")
        for rep in range(reps):
            order = list(handles)
            order = order[rep % len(order):] + order[:rep % len(order)]
            for name in order if rep % 2 == 0 else reversed(order):
                if name in self.systems and (sample := self.sample(name, handles[name], num_calls[name])) is not None:
                    samples[name].append(sample)
        return [{"system": name, "bound": self.systems[name].bound, "calls": num_calls[name],
                 "seconds": [sample.elapsed_ns / num_calls[name] / 1e9 for sample in samples[name]],
                 "cpu_s": [sample.cpu_ns / num_calls[name] / 1e9 for sample in samples[name]],
                 "wire_bytes": [sample.wire_bytes / num_calls[name] for sample in samples[name]]}
                for name in handles if name in self.systems]

    def _calibrate(self, name: str, handle: object) -> tuple[int, int] | None:
        """Calls per sample, and the nanoseconds that one sample lasts; None when the system failed."""
        num_calls = 1
        while True:
            lasted_ns = sys.maxsize
            for _ in range(5):      # the least of them: one that others disturbed would leave the samples too short
                if (sample := self.sample(name, handle, num_calls)) is None:
                    return None
                lasted_ns = min(lasted_ns, sample.elapsed_ns)
                if lasted_ns > 20 * SAMPLE_NS:
                    break
            if lasted_ns >= SAMPLE_NS or num_calls == MAX_CALLS:
                return num_calls, lasted_ns
            wanted = math.ceil(1.25 * num_calls * SAMPLE_NS / max(1, lasted_ns))
            num_calls = min(MAX_CALLS, 16 * num_calls, wanted)

    def close(self) -> None:
        """Leave every system; one that cannot leave does not keep the others."""
        for system in self.systems.values():
            with contextlib.suppress(Exception):
                system.close()


def demand_equal(result: np.ndarray, expected: np.ndarray, tolerance: float = 0.0) -> None:
    """Raises ArithmeticError, naming the first difference; of more than tolerance times the largest expected."""
    if result.shape != expected.shape:
        raise ArithmeticError(f"WRONG RESULT: its shape is {result.shape}, not {expected.shape}")
    differs = ~(np.abs(result - expected) <= (tolerance * np.abs(expected).max() if expected.size else 0.0))
    if (wrong := np.flatnonzero(differs)).size:
        raise ArithmeticError(f"WRONG RESULT in {wrong.size} of {expected.size} elements, first in element {wrong[0]}: "
                              f"{result[wrong[0]]}, not {expected[wrong[0]]}")
