"""CPU time burnt while waiting: the last rank comes late to an all-reduce; what do the others spend meanwhile?"""
from __future__ import annotations

import argparse
import json
import sys
import time

from bench import congestion
from bench.options import OtherWork, add_common, ended_by_signals, print_machine, settle, wants_mpirun
from bench.ranks import PAYLOAD_BITS, Ranks, RanksFailed, Team
from bench.report import human_size, human_time, summary, table, tell_troubles
from bench.stage import Stage
from bench.systems import SYSTEMS

WARM_CALLS = 20     # past the first calls, in which systems still connect, map and learn


def rank_main(team: Team, options: dict) -> None:
    """Measure one system after the other, as a wait cannot be shared; all ranks run this."""
    stage = Stage(team, options["systems"])
    team.exchange()
    idle = time.process_time_ns()
    time.sleep(options["delay"])    # what the threads of all these systems burn when nobody calls them
    team.emit(kind="idle", cpu_s=max(team.exchange(time.process_time_ns() - idle)) / 1e9)
    for stage.size in options["sizes"]:
        for name in list(stage.systems):
            handle = stage.prepare(name)
            if handle is None or stage.sample(name, handle, WARM_CALLS) is None:
                continue
            waits = [wait for _ in range(options["reps"]) if (wait := _wait(stage, name, handle, options["delay"]))]
            if name in stage.systems:
                team.emit(kind="row", system=name, size=stage.size, cpu_s=[wait[0] for wait in waits],
                          after_s=[wait[1] for wait in waits])
    stage.close()


def _wait(stage: Stage, name: str, handle: object, delay_s: float) -> tuple[float, float] | None:
    """Seconds of CPU that the waiting rank which burnt most burnt, and from the late rank's entry to the last one's return."""
    if name not in stage.systems:
        return None
    team, mask = stage.team, (1 << PAYLOAD_BITS) - 1
    late = team.size - 1
    entered = cpu = left = 0

    def call() -> None:
        nonlocal entered, cpu, left
        if team.rank == late:
            time.sleep(delay_s)
        entered, cpu = time.perf_counter_ns(), time.process_time_ns()   # the CPU time of all threads
        stage.systems[name].call(handle)
        cpu, left = time.process_time_ns() - cpu, time.perf_counter_ns()

    team.tick()
    team.exchange()
    if not stage.attempt(name, call):
        return None
    burnt = max(team.exchange(cpu)[:late])
    # The ranks share one monotonic clock; its low bits are enough for a difference.
    entered = team.exchange(entered & mask)[late]
    after = max((moment - entered) & mask for moment in team.exchange(left & mask))
    return burnt / 1e9, after / 1e9


def main(argv: list[str]) -> int:
    """Run the benchmark; 0 when every system that could start summed right."""
    parser = argparse.ArgumentParser(prog="python -m bench waiting", description=__doc__,
                                     epilog=f"systems: {', '.join(SYSTEMS)}")
    add_common(parser, "4B,1MB")
    parser.add_argument("--delay", type=float, default=2.0, metavar="SECONDS", help="how late the last rank is (default 2)")
    parser.add_argument("--reps", type=int, default=3, help="waits for each system and size (default 3)")
    options = settle(parser, parser.parse_args(argv))
    try:
        in_force = congestion.enter(options.congestion, ["waiting", *argv])
    except OSError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    record = {"benchmark": "waiting", "machine": print_machine(in_force), "runs": []}
    try:
        with ended_by_signals():
            for num_ranks in options.ranks:
                record["runs"].append({"ranks": num_ranks, "delay_s": options.delay, "rows": [], "troubles": [], "status": 0})
                _run(record["runs"][-1], options)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    finally:
        if options.json:
            with open(options.json, "w") as file:
                json.dump(record, file, indent=1)
    return max(run["status"] for run in record["runs"])


def _run(run: dict, options: argparse.Namespace) -> None:
    """Fill in the record of one number of ranks, and print it."""
    num_ranks = run["ranks"]
    job = {"systems": options.systems, "sizes": options.sizes, "reps": options.reps, "delay": options.delay}
    others = OtherWork()
    try:
        with Ranks("bench.waiting", num_ranks, job, mpi=wants_mpirun(options.systems)) as ranks:
            for event in ranks.events():
                kind = event.pop("kind")
                if kind == "idle":
                    run["idle_cpu_s"] = event["cpu_s"]
                else:
                    run["rows" if kind == "row" else "troubles"].append(event)
    except RanksFailed as error:
        run["troubles"].append({"system": "all", "size": None, "reason": str(error)})
        run["status"] = 1
    finally:    # an interrupted run still tells what it knows
        run["other_work_cores"] = others.cores()
        if not run["rows"] or any(trouble["size"] is not None for trouble in run["troubles"]):
            run["status"] = 1
        print(_told(run, options.reps), flush=True)


def _told(run: dict, reps: int) -> str:
    """The run as text: a row per size and system, and what could not be measured."""
    lines = []
    for row in run["rows"]:
        burnt = summary(row["cpu_s"])
        lines.append([human_size(row["size"]), row["system"], *map(human_time, burnt),
                      f"{100 * burnt.median / run['delay_s']:.1f} %", human_time(summary(row["after_s"]).median)])
    return "\n".join([
        f"\n{run['ranks']} ranks; the last one enters {run['delay_s']:g} s late, {reps} times. CPU is of the rank that spent most;",
        "\"back after\" is from the late rank's entry to the last return, the median. With nobody in a call, a rank spends "
        + human_time(run.get("idle_cpu_s", 0.0)) + ".",
        table(["size", "system", "CPU min", "median", "max", "of a core", "back after"], lines),
        tell_troubles(run["troubles"], run["other_work_cores"])])
