"""All-reduce time and bandwidth: pyfleet's data paths beside gloo, MPI and MLX, interleaved in the same processes."""
from __future__ import annotations

import argparse
import csv
import gc
import json
import sys

from bench import bounds, congestion
from bench.options import OtherWork, add_common, ended_by_signals, fits, print_machine, settle, wants_mpirun
from bench.ranks import Ranks, RanksFailed, Team
from bench.report import human_rate, human_ratio, human_size, human_time, summary, table, tell_troubles
from bench.stage import MAX_REPS, MIN_REPS, Stage
from bench.systems import RIVALS, SYSTEMS

LADDER = "4B,64B,1KB,4KB,16KB,64KB,256KB,1MB,4MB,25MB,100MB,256MB"
BOUND_BYTES = 100 << 20     # above every cache; the share of the bound is shown for arrays of 1 MB and more


# The ranks' side.

def rank_main(team: Team, options: dict) -> None:
    """Measure the bounds, then every size; all ranks run this."""
    gc.disable()
    stage = Stage(team, options["systems"])
    if options["bounds"]:
        team.emit(kind="bounds", **bounds.measure(team, BOUND_BYTES))
    budget_s = options["budget"] / max(1, len(options["sizes"]))
    for num_bytes in options["sizes"]:
        team.emit(kind="size", size=num_bytes, rows=stage.rows(num_bytes, options["reps"], budget_s))
        gc.collect()
    if options["bounds"]:
        team.emit(kind="bounds", **bounds.measure(team, BOUND_BYTES))
    stage.close()


# The parent's side.

def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench allreduce", description=__doc__,
        epilog=f"systems: {', '.join(SYSTEMS)}. Sizes are bytes of float32 array per rank; KB, MB, GB are powers of 1024; "
               "GB/s is array size over time, 10^9 bytes.")
    add_common(parser, LADDER)
    parser.add_argument("--reps", type=lambda text: None if text == "auto" else int(text), default=None, metavar="N|auto",
                        help="samples of each system and size (auto: what the budget allows, "
                             f"{MIN_REPS} to {MAX_REPS}; the default)")
    parser.add_argument("--budget", type=float, default=60.0, metavar="SECONDS",
                        help="time for the samples of one number of ranks, shared evenly by the sizes (default 60)")
    parser.add_argument("--no-bounds", action="store_true", help="leave the bounds of memory and TCP unmeasured")
    parser.add_argument("--csv", metavar="FILE", help="write one line per row here")
    return settle(parser, parser.parse_args(argv))


def main(argv: list[str]) -> int:
    """Run the benchmark; 0 when every system that could start summed right."""
    options = _arguments(argv)
    try:
        in_force = congestion.enter(options.congestion, ["allreduce", *argv])
    except OSError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    record = {"benchmark": "allreduce", "machine": print_machine(in_force), "runs": []}
    try:
        with ended_by_signals():
            for num_ranks in options.ranks:
                record["runs"].append({"ranks": num_ranks, "bounds": {}, "rows": [], "troubles": [], "status": 0})
                _run(record["runs"][-1], options)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    finally:
        _write(record, options)
    return max(run["status"] for run in record["runs"])


def _run(run: dict, options: argparse.Namespace) -> None:
    """Fill in the record of one number of ranks, and print it."""
    num_ranks = run["ranks"]
    sizes = [size for size in options.sizes if fits(size, num_ranks, len(options.systems))]
    run["troubles"] += [{"system": human_size(size), "size": None, "reason": "more than the free memory holds"}
                        for size in options.sizes if size not in sizes]
    job = {"systems": options.systems, "sizes": sizes, "reps": options.reps, "budget": options.budget,
           "bounds": not options.no_bounds}
    print(f"\n{num_ranks} ranks, float32, one host. Times are of the slowest rank; GB/s is size over median time; \"x\" is how "
          "many\ntimes faster than a rival's median.", flush=True)
    others = OtherWork()
    try:
        with Ranks("bench.allreduce", num_ranks, job, mpi=wants_mpirun(options.systems)) as ranks:
            for event in ranks.events():
                kind = event.pop("kind")
                if kind == "size":
                    run["rows"] += [{"size": event["size"], **row} for row in event["rows"]]
                    if sys.stderr.isatty():
                        print(f"  {human_size(event['size'])} done ", end="\r", file=sys.stderr, flush=True)
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
        print(_told(run), flush=True)


def _told(run: dict) -> str:
    """The run as text: the table, the bounds, and what could not be measured."""
    parts = [table(*_table(run)) if run["rows"] else "nothing was measured"]
    if limits := run["bounds"]:
        num_ranks = run["ranks"]
        memory, tcp = (human_rate(bounds.all_reduce_bound(limits, kind, num_ranks)) for kind in ("memory", "tcp"))
        parts.append("\n".join([
            f"Bounds, measured in the same processes with arrays of {human_size(BOUND_BYTES)}, in GB/s:",
            f"  memory copy, one rank               {human_rate(limits['copy_one']):>6}",
            f"  memory copy, {num_ranks} ranks at once, sum    {human_rate(limits['copy_all']):>6}",
            f"  rewrite in place, {num_ranks} at once, each    {human_rate(limits['rewrite']):>6}"
            + f"   bound of an all-reduce in memory: {memory} (streaming stores may pass it)",
            f"  TCP loopback, each way at once      {human_rate(limits['tcp']):>6}"
            + f"   bound of an all-reduce over TCP: {tcp}"]))
    return "\n\n".join(filter(None, [*parts, tell_troubles(run["troubles"], run["other_work_cores"])]))


def _table(run: dict) -> tuple[list[str], list[list[str]]]:
    """Header and rows; a fleet row tells how many times faster its median is than each rival's."""
    rows = [{**row, **summary(row["seconds"])._asdict()} for row in run["rows"]]
    medians = {(row["size"], row["system"]): row["median"] for row in rows}
    rivals = [name for name in RIVALS if any(system == name for _, system in medians)]
    header = ["size", "system", "calls x samples", "min", "median", "max", "GB/s", "of bound", *(f"x {name}" for name in rivals)]
    lines, last = [], None
    for row in rows:
        rate = row["size"] / row["median"]
        share = ""
        if run["bounds"] and row["size"] >= 1 << 20:
            bound = bounds.all_reduce_bound(run["bounds"], row["bound"], run["ranks"])
            share = f"{100 * rate / bound:.0f} %"
        ratios = [human_ratio(medians[row["size"], name] / row["median"])
                  if row["system"] not in RIVALS and (row["size"], name) in medians else "" for name in rivals]
        lines.append([human_size(row["size"]) if row["size"] != last else "", row["system"],
                      f"{row['calls']} x {len(row['seconds'])}", human_time(row["min"]), human_time(row["median"]),
                      human_time(row["max"]), human_rate(rate), share, *ratios])
        last = row["size"]
    for trouble in run["troubles"]:
        if trouble["size"] is not None:
            lines.append([human_size(trouble["size"]), trouble["system"], *["" for _ in header[2:-1]], "ERROR"])
    return header, lines


def _write(record: dict, options: argparse.Namespace) -> None:
    if options.json:
        with open(options.json, "w") as file:
            json.dump(record, file, indent=1)
    if options.csv:
        with open(options.csv, "w", newline="") as file:
            out = csv.writer(file)
            out.writerow(["ranks", "size_bytes", "system", "calls", "samples", "min_s", "median_s", "max_s", "bytes_per_s"])
            for run in record["runs"]:
                for row in run["rows"]:
                    told = summary(row["seconds"])
                    out.writerow([run["ranks"], row["size"], row["system"], row["calls"], len(row["seconds"]), *told,
                                  row["size"] / told.median])
