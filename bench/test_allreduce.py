"""All-reduce throughput of two ranks, as pytest-benchmark rows: rank 0 is pytest itself, rank 1 mirrors each call.

Run with `pytest bench --benchmark-only`. Systems are measured one after the other here, so that rows can be compared from
commit to commit (--benchmark-compare); to compare systems, run `python -m bench allreduce --rivals`, which interleaves them.
MPI is not among them: its ranks want mpirun.
"""
from __future__ import annotations

import gc

import pytest

from bench.mirror import Leader
from bench.ranks import Ranks
from bench.report import human_size, parse_size
from bench.systems import SYSTEMS, create

NAMES = [name for name in SYSTEMS if name not in ("mpi", "secure")]
# size -> (rounds, calls in a round, warm-up rounds): what makes a round some 100 us or more, and a row about a second or less
PLANS = {"4B": (50, 100, 2), "4KB": (50, 100, 2), "64KB": (50, 20, 2), "1MB": (50, 2, 2), "25MB": (15, 1, 2), "100MB": (7, 1, 1)}


@pytest.fixture(scope="module")
def pair():
    """The two ranks, which live for all rows."""
    options = {"systems": NAMES}
    with Ranks("bench.mirror", 2, options, first=1) as ranks:
        pair = Leader(ranks, options)
        yield pair
        pair.close()


@pytest.mark.parametrize("size", PLANS)
@pytest.mark.parametrize("name", NAMES)
def test_all_reduce(benchmark, pair, name, size):
    num_bytes = parse_size(size)
    largest = create(name).largest if name in pair.stage.systems else None
    if largest is not None and num_bytes > largest:
        pytest.skip(f"{name} says nothing new above {human_size(largest)}")
    benchmark.group = f"all_reduce {human_size(num_bytes)}, 2 ranks"
    pair.measure(benchmark, name, num_bytes, PLANS[size])
    gc.collect()
