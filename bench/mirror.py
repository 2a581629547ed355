"""Rank 1 of the pytest-benchmark suite: does with every system what the pytest process, rank 0, does."""
from __future__ import annotations

from bench.ranks import Team
from bench.stage import Stage

STOP, MEASURE = 0, 1


def rank_main(team: Team, options: dict) -> None:
    """Follow rank 0 until it says STOP; the order of words is that of Pair.call in bench/test_allreduce.py."""
    stage = Stage(team, options["systems"])
    while team.exchange()[0] == MEASURE:
        which, num_bytes, num_calls = (team.exchange()[0] for _ in range(3))
        name, stage.size = options["systems"][which], num_bytes
        if name not in stage.systems or (handle := stage.prepare(name)) is None:
            continue
        call = stage.systems[name].call
        stage.attempt(name, lambda call=call, handle=handle, n=num_calls: [call(handle) for _ in range(n)])
    stage.close()
