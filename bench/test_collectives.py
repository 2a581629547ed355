"""Every verb of two ranks as pytest-benchmark rows: shared memory, TCP with each algorithm, and gloo; see bench/test_allreduce.py.

To compare parties with each other, run `python -m bench collectives --rivals`, which interleaves them and shows the bounds.
"""
from __future__ import annotations

import gc

import pytest

from bench.collectives import sizes_of
from bench.mirror import Leader
from bench.ranks import Ranks
from bench.report import human_size, parse_size
from bench.verbs import PARTIES, VERBS, create

NAMES = [name for name in PARTIES if name != "mpi"]        # MPI's ranks want mpirun
# size -> (rounds, calls in a round, warm-up rounds): a row takes about half a second or less
PLANS = {0: (20, 100, 2), parse_size("4KB"): (20, 20, 2), parse_size("4MB"): (10, 1, 2)}
ROWS = [(verb, size, name) for verb in VERBS for size in sizes_of(verb, [size for size in PLANS if size]) for name in NAMES
        if name == "gloo" or verb in create(name).verbs]


@pytest.fixture(scope="module")
def pair():
    """The two ranks, which live for all rows."""
    options = {"systems": NAMES, "verbs": True}
    with Ranks("bench.mirror", 2, options, first=1) as ranks:
        pair = Leader(ranks, options)
        yield pair
        pair.close()


@pytest.mark.parametrize(("verb", "size", "name"), ROWS, ids=[f"{verb}-{human_size(size)}-{name}" for verb, size, name in ROWS])
def test_collective(benchmark, pair, verb, size, name):
    benchmark.group = f"{verb} {human_size(size)}, 2 ranks" if size else f"{verb}, 2 ranks"
    pair.measure(benchmark, name, size, PLANS[size], verb)
    gc.collect()
