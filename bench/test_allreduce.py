"""All-reduce throughput of two ranks, as pytest-benchmark rows: rank 0 is pytest itself, rank 1 mirrors each call.

Run with `pytest bench --benchmark-only`. Systems are measured one after the other here, so that rows can be compared from
commit to commit (--benchmark-compare); to compare systems, run `python -m bench allreduce --rivals`, which interleaves them.
MPI is not among them: its ranks want mpirun.
"""
from __future__ import annotations

import gc

import pytest

from bench.mirror import MEASURE, STOP
from bench.ranks import Ranks
from bench.report import congestion_control, human_size, parse_size
from bench.stage import Stage
from bench.systems import SYSTEMS, create

NAMES = [name for name in SYSTEMS if name not in ("mpi", "secure")]
# size -> (rounds, calls in a round, warm-up rounds): what makes a round some 100 us or more, and a row about a second or less
PLANS = {"4B": (50, 100, 2), "4KB": (50, 100, 2), "64KB": (50, 20, 2), "1MB": (50, 2, 2), "25MB": (15, 1, 2), "100MB": (7, 1, 1)}


class Pair:
    """Both ranks: this process, and the mirror it leads."""

    def __init__(self, ranks: Ranks) -> None:
        self.team = ranks.team(0)
        self.stage = Stage(self.team, NAMES)

    def call(self, benchmark, name: str, num_bytes: int, plan: tuple[int, int, int]) -> None:
        """Measure one row, or skip it where the system is not available; a wrong sum fails it."""
        rounds, num_calls, warm = plan
        # pytest-benchmark may make a call beyond its rounds, or one alone when disabled: what it leaves over is made up for.
        announced = (rounds + warm) * num_calls + 2
        for word in (MEASURE, NAMES.index(name), num_bytes, announced):
            self.team.exchange(word)
        stage = self.stage
        stage.size = num_bytes
        if name not in stage.systems:
            pytest.skip(f"{name} is not available: {stage.reasons[name]}")
        handle = stage.prepare(name)
        assert handle is not None, f"{name}: {stage.reasons[name]}"
        call, called = stage.systems[name].call, 0

        def counted() -> None:
            nonlocal called
            called += 1
            call(handle)

        def measure() -> None:
            benchmark.pedantic(counted, rounds=rounds, iterations=num_calls, warmup_rounds=warm)
            while called < announced:
                counted()

        assert stage.attempt(name, measure), f"{name}: {stage.reasons[name]}"
        assert called == announced


@pytest.fixture(scope="module")
def pair():
    """The two ranks, which live for all rows."""
    with Ranks("bench.mirror", 2, {"systems": NAMES}, first=1) as ranks:
        pair = Pair(ranks)
        yield pair
        pair.team.exchange(STOP)
        pair.stage.close()


@pytest.mark.parametrize("size", PLANS)
@pytest.mark.parametrize("name", NAMES)
def test_all_reduce(benchmark, pair, name, size):
    num_bytes = parse_size(size)
    largest = create(name).largest if name in pair.stage.systems else None
    if largest is not None and num_bytes > largest:
        pytest.skip(f"{name} says nothing new above {human_size(largest)}")
    benchmark.group = f"all_reduce {human_size(num_bytes)}, 2 ranks"
    pair.call(benchmark, name, num_bytes, PLANS[size])
    benchmark.extra_info |= {"system": name, "bytes": num_bytes, "congestion_control": congestion_control()}
    if not benchmark.disabled:
        benchmark.extra_info["gigabytes_per_s"] = num_bytes / benchmark.stats.stats.median / 1e9
    gc.collect()
