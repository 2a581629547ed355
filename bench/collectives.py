"""Every collective verb and algorithm: pyfleet's shared memory and TCP beside gloo and MPI, and the least each verb can take."""
from __future__ import annotations

import argparse
import gc
import json
import sys

from bench import bounds, congestion
from bench.options import OtherWork, ended_by_signals, fits, print_machine, wants_mpirun
from bench.ranks import Ranks, RanksFailed, Team
from bench.report import (
    human_rate,
    human_ratio,
    human_size,
    human_time,
    parse_list,
    parse_size,
    summary,
    table,
    tell_troubles,
)
from bench.stage import MIN_REPS
from bench.verbs import ALGORITHMS, LARGEST, PARTIES, RIVALS, VERBS, VerbStage, volume

SIZES = "4KB,256KB,25MB"
TRANSPORTS = {"shm": ["arena", "ordinary"], "tcp": ["tcp"]}
BOUND_BYTES = 64 << 20      # above every cache
SHARE_BYTES = 1 << 20       # below, it is latency that counts


# The ranks' side.

def rank_main(team: Team, options: dict) -> None:
    """Measure the bounds, then every verb in every size; all ranks run this."""
    gc.disable()
    stage = VerbStage(team, options["parties"])
    if options["bounds"]:
        _emit_bounds(team)
    plan = [(verb, num_bytes) for verb in options["verbs"] for num_bytes in sizes_of(verb, options["sizes"])]
    for verb, num_bytes in plan:
        stage.verb = verb
        rows = stage.rows(num_bytes, options["reps"], options["budget"] / len(plan))
        team.emit(kind="rows", verb=verb, size=num_bytes, rows=rows)
        gc.collect()
    if options["bounds"]:
        _emit_bounds(team)
    stage.close()


def _emit_bounds(team: Team) -> None:
    team.emit(kind="bounds", **bounds.measure(team, BOUND_BYTES), tcp_one_way=bounds.measure_one_way(team, BOUND_BYTES))


def sizes_of(verb: str, sizes: list[int]) -> list[int]:
    """The sizes in which a verb is worth measuring: up to LARGEST, the least one where all are larger; 0 for a barrier."""
    if verb == "barrier":
        return [0]
    return [size for size in sizes if size <= LARGEST.get(verb, size)] or [min(sizes)]


# The parent's side.

def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench collectives", description=__doc__,
        epilog="A size is that of the verb's whole float32 array: what a rank has of it in a sum or a broadcast, all parts "
               "together elsewhere. KB, MB, GB are powers of 1024. Calls are the engine's: no descriptions, no lists.")
    parser.add_argument("--ranks", type=lambda text: parse_list(text, int), default=[2], metavar="N,M",
                        help="numbers of ranks, one run each (default 2)")
    parser.add_argument("--verbs", type=parse_list, default=list(VERBS), metavar="A,B", help=f"default {','.join(VERBS)}")
    parser.add_argument("--sizes", type=lambda text: parse_list(text, parse_size), default=parse_list(SIZES, parse_size),
                        metavar="A,B", help=f"default {SIZES}")
    parser.add_argument("--transport", choices=tuple(TRANSPORTS), help="ours over this only (default: both)")
    parser.add_argument("--algorithms", action="store_true", help=f"over TCP, each of {', '.join(ALGORITHMS)} too")
    parser.add_argument("--rivals", action="store_true", help=f"measure {', '.join(RIVALS)} too")
    parser.add_argument("--parties", type=parse_list, metavar="A,B", help=f"exactly these of {', '.join(PARTIES)}")
    parser.add_argument("--reps", type=int, metavar="N", help="samples of each row (default: what the budget allows, "
                        f"{MIN_REPS} at least)")
    parser.add_argument("--budget", type=float, default=60.0, metavar="SECONDS",
                        help="time for the samples of one number of ranks, shared evenly by verbs and sizes (default 60)")
    parser.add_argument("--no-bounds", action="store_true", help="leave the bounds of memory and TCP unmeasured")
    parser.add_argument("--json", metavar="FILE", help="write everything here, every sample included")
    parser.add_argument("--congestion", choices=congestion.CHOICES, default="auto",
                        help="TCP congestion control of all parties (default: cubic or reno, in a private network namespace)")
    parser.add_argument(congestion.INSIDE, action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    for known, given, what in ((VERBS, options.verbs, "verb"), (PARTIES, options.parties or (), "party")):
        if unknown := [name for name in given if name not in known]:
            parser.error(f"no {what} called {unknown[0]!r}; there are: {', '.join(known)}")
    if any(ranks < 2 for ranks in options.ranks):
        parser.error("a collective wants 2 ranks or more")
    if any(size < 4 or size % 4 for size in options.sizes):
        parser.error("a size is a positive number of float32s: a multiple of 4 bytes")
    if not options.parties:
        transports = [options.transport] if options.transport else list(TRANSPORTS)
        options.parties = [name for transport in transports for name in TRANSPORTS[transport]]
        options.parties += ALGORITHMS if options.algorithms and "tcp" in transports else ()
        options.parties += RIVALS if options.rivals else ()
    return options


def main(argv: list[str]) -> int:
    """Run the benchmark; 0 when every party that could start gave right results."""
    options = _arguments(argv)
    try:
        in_force = congestion.enter(options.congestion, ["collectives", *argv])
    except OSError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    record = {"benchmark": "collectives", "machine": print_machine(in_force), "runs": []}
    try:
        with ended_by_signals():
            for num_ranks in options.ranks:
                record["runs"].append({"ranks": num_ranks, "bounds": {}, "rows": [], "troubles": [], "status": 0})
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
    sizes = [size for size in options.sizes if fits(size, 2 * num_ranks, len(options.parties))]
    run["troubles"] += [{"system": human_size(size), "size": None, "reason": "more than the free memory holds"}
                        for size in options.sizes if size not in sizes]
    job = {"parties": options.parties, "verbs": options.verbs, "sizes": sizes, "reps": options.reps, "budget": options.budget,
           "bounds": not options.no_bounds}
    print(f"\n{num_ranks} ranks, float32, one host, calls of the engine. Times are of the slowest rank; GB/s is size over median "
          "time;\n\"x\" is how many times faster than a rival, by medians / by minima; roots are rank 0, and nothing makes them wait "
          "for\nthe others between calls.", flush=True)
    others = OtherWork()
    try:
        with Ranks("bench.collectives", num_ranks, job, mpi=wants_mpirun(options.parties)) as ranks:
            for event in ranks.events():
                kind = event.pop("kind")
                if kind == "rows":
                    run["rows"] += [{"verb": event["verb"], "size": event["size"], **row} for row in event["rows"]]
                    if sys.stderr.isatty():
                        print(f"  {event['verb']} {human_size(event['size'])} done      ", end="\r", file=sys.stderr, flush=True)
                elif kind == "bounds":
                    # Taken at both ends of the run: the better one is nearer to what the machine can do.
                    run["bounds"] = {key: max(rate, run["bounds"].get(key, 0.0)) for key, rate in event.items()}
                else:
                    run["troubles"].append(event)
    except RanksFailed as error:
        run["troubles"].append({"system": "all", "size": None, "reason": str(error)})
        run["status"] = 1
    finally:    # an interrupted run still tells what it knows
        run["other_work_cores"] = others.cores()
        if not run["rows"] or any(trouble["size"] is not None for trouble in run["troubles"]):
            run["status"] = 1
        for row in run["rows"]:
            row["floor_s"] = floor_s(run, row)
        print(_told(run), flush=True)


def floor_s(run: dict, row: dict) -> float | None:
    """The least seconds that the bounds of the run leave to a row; None where none says anything."""
    moved = volume(row["verb"], run["ranks"])
    if not run["bounds"] or moved is None or row["size"] < SHARE_BYTES:
        return None
    return bounds.verb_floor_s(run["bounds"], row["bound"], moved, run["ranks"], row["size"])


def _told(run: dict) -> str:
    """The run as text: the table, the bounds, and what could not be measured."""
    parts = [table(*_table(run), left=3) if run["rows"] else "nothing was measured"]
    if limits := run["bounds"]:
        parts.append("\n".join([
            f"Bounds, measured in the same processes with arrays of {human_size(BOUND_BYTES)}, in GB/s:",
            f"  memory copy, all ranks at once, sum       {human_rate(limits['copy_all']):>6}",
            f"  memory rewritten in place, all, each      {human_rate(limits['rewrite']):>6}",
            f"  TCP loopback, each way at once, one rank  {human_rate(limits['tcp']):>6}",
            f"  TCP loopback, rank 0 to rank 1 alone      {human_rate(limits['tcp_one_way']):>6}",
            "A bound in memory is every input read and every output written once; what fits into caches may pass it. Over TCP",
            "it is what the verb must send. gloo's is that of TCP, MPI's that of memory."]))
    return "\n\n".join(filter(None, [*parts, tell_troubles(run["troubles"], run["other_work_cores"])]))


def _table(run: dict) -> tuple[list[str], list[list[str]]]:
    """Header and rows; a row of ours tells how many times faster it is than each rival."""
    rows = [{**row, **summary(row["seconds"])._asdict()} for row in run["rows"]]
    there = {(row["verb"], row["size"], row["system"]): row for row in rows}
    rivals = [name for name in RIVALS if any(party == name for *_, party in there)]
    header = ["verb", "size", "party", "calls x samples", "min", "median", "max", "GB/s", "bound", "of bound",
              *(f"x {name}" for name in rivals)]
    lines, last = [], (None, None)
    for row in rows:
        place, floor = (row["verb"], row["size"]), row["floor_s"]
        against = [there.get((*place, name)) if row["system"] not in RIVALS else None for name in rivals]
        ratios = [" / ".join(human_ratio(rival[key] / row[key]) for key in ("median", "min")) if rival else ""
                  for rival in against]
        lines.append([row["verb"] if row["verb"] != last[0] else "", human_size(row["size"]) if place != last else "", row["system"],
                      f"{row['calls']} x {len(row['seconds'])}", *(human_time(row[key]) for key in ("min", "median", "max")),
                      human_rate(row["size"] / row["median"]) if row["size"] else "",
                      human_time(floor) if floor else "", f"{100 * floor / row['median']:.0f} %" if floor else "", *ratios])
        last = place
    return header, lines
