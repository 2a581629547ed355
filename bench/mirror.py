"""Both sides of the pytest-benchmark suites: rank 0 is pytest itself, rank 1 does with every system what rank 0 does."""
from __future__ import annotations

import pytest

from bench.ranks import Ranks, Team
from bench.report import congestion_control
from bench.stage import Stage
from bench.verbs import VERBS, VerbStage

STOP, MEASURE = 0, 1


def _stage(team: Team, options: dict) -> Stage:
    return (VerbStage if options.get("verbs") else Stage)(team, options["systems"])


def rank_main(team: Team, options: dict) -> None:
    """Follow rank 0 until it says STOP; the order of words is that of Leader.measure."""
    stage = _stage(team, options)
    while team.exchange()[0] == MEASURE:
        which, verb, num_bytes, num_calls = (team.exchange()[0] for _ in range(4))
        name, stage.size, stage.verb = options["systems"][which], num_bytes, VERBS[verb]
        if name not in stage.systems or (handle := stage.prepare(name)) is None:
            continue
        call = stage.systems[name].call
        stage.attempt(name, lambda call=call, handle=handle, n=num_calls: [call(handle) for _ in range(n)])
    stage.close()


class Leader:
    """Rank 0: this process, which leads the mirror.

    Args:    options: {"systems": names, "verbs": whether they are parties of bench/verbs.py}, the same for both ranks.
    """

    def __init__(self, ranks: Ranks, options: dict) -> None:
        self.team, self.names = ranks.team(0), options["systems"]
        self.stage = _stage(self.team, options)

    def measure(self, benchmark, name: str, num_bytes: int, plan: tuple[int, int, int], verb: str = "all_reduce") -> None:
        """Measure one row, or skip it where the system is not available; a wrong result fails it.

        Args:    plan: (rounds, calls in a round, warm-up rounds).
        """
        rounds, num_calls, warm = plan
        # pytest-benchmark may make a call beyond its rounds, or one alone when disabled: what it leaves over is made up for.
        announced = (rounds + warm) * num_calls + 2
        for word in (MEASURE, self.names.index(name), VERBS.index(verb), num_bytes, announced):
            self.team.exchange(word)
        stage = self.stage
        stage.size, stage.verb = num_bytes, verb
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
        benchmark.extra_info |= {"system": name, "verb": verb, "bytes": num_bytes, "congestion_control": congestion_control()}
        if num_bytes and not benchmark.disabled:
            benchmark.extra_info["gigabytes_per_s"] = num_bytes / benchmark.stats.stats.median / 1e9

    def close(self) -> None:
        """Let the mirror go."""
        self.team.exchange(STOP)
        self.stage.close()
