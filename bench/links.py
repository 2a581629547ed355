"""All-reduce between hosts: network namespaces with links of a known rate; share of the line rate, CPU time, wire bytes."""
from __future__ import annotations

import argparse
import gc
import json
import os
import sys
from collections.abc import Sequence

import numpy as np
import psutil

from bench import bounds
from bench.options import OtherWork, add_systems, ended_by_signals, fits, print_machine, settle_systems
from bench.ranks import Ranks, RanksFailed, Team
from bench.report import human_ratio, human_size, human_time, summary, table, tell_troubles
from bench.stage import MIN_REPS, Stage
from bench.systems import HOSTS
from tests import network as networks
from tests.network import Network, bits_per_s

RIVALS = ("gloo",)
SIZES = "64KB,1MB,25MB,100MB"
PROBE_S = 0.5           # of plain sockets sending over the slowest link: the start of TCP and the burst of the link count little
PROBE_BYTES = 100 << 20     # where no rate says how much that is
PROBE_SAMPLES = 5
SHARE_BYTES = 1 << 20       # below, latency counts, and bursts that a shaped link lets pass


def all_reduce_floor_s(num_bytes: int, rates: Sequence[float]) -> float:
    """The least time that hosts with links of these rates (bytes/s, each way at once) need for an all-reduce.

    Every host has to send its array, or a sum with it in, and to receive a sum: S/B of the slowest. And host i that sums up
    a share f_i moves S (1 + (N-2) f_i) each way; the shares add up to 1, so the links together carry 2(N-1) S each way
    (Patarasuk and Yuan 2009 for equal ones).
    """
    return num_bytes * max(1 / min(rates), 2 * (len(rates) - 1) / sum(rates))


# The ranks' side.

def rank_main(team: Team, options: dict) -> None:
    """Measure what plain sockets reach, then every size; all ranks run this, each on its host."""
    gc.disable()
    os.environ |= {"GLOO_SOCKET_IFNAME": "eth0", "PYFLEET_IFACE": "eth0"}
    stage = Stage(team, options["systems"], traffic=_traffic)
    team.progress("plain sockets")
    source = np.ones(options["probe_bytes"] // 4, np.float32)
    reached = bounds.measure_tcp(team, source, np.zeros_like(source), options["addresses"], PROBE_SAMPLES)
    team.emit(kind="sockets", bytes_per_s=reached)
    del source
    budget_s = options["budget"] / max(1, len(options["sizes"]))
    for num_bytes in options["sizes"]:
        team.emit(kind="size", size=num_bytes, rows=stage.rows(num_bytes, options["reps"], budget_s))
        gc.collect()
    stage.close()


def _traffic() -> tuple[int, int]:
    counted = psutil.net_io_counters(pernic=True, nowrap=False)["eth0"]
    return counted.bytes_sent, counted.bytes_recv


# The parent's side.

def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench links", description=__doc__,
        epilog="Rates are written as tc writes them: 1gbit, 100mbit. Sizes are bytes of float32 array per rank; KB, MB, GB "
               "are powers of 1024.")
    add_systems(parser, SIZES, HOSTS, RIVALS)
    parser.add_argument("--hosts", type=int, default=4, metavar="N", help="default 4")
    parser.add_argument("--ranks-per-host", type=int, default=1, metavar="N", help="default 1")
    parser.add_argument("--rate", default="1gbit", help="of every host's link, each way (default 1gbit); none: unshaped")
    parser.add_argument("--slow-host-rate", metavar="RATE", help="of the last host's link")
    parser.add_argument("--mtu", type=int, default=1500, help="default 1500; 9000 for jumbo frames")
    parser.add_argument("--loss", type=float, default=0.0, metavar="SHARE", help="of packets that the last host's link loses")
    parser.add_argument("--congestion", choices=("machine", "cubic", "reno", "bbr"), default="cubic",
                        help="TCP congestion control of all systems (default cubic)")
    parser.add_argument("--reps", type=int, metavar="N", help="samples of each system and size (default: what the budget "
                        f"allows, {MIN_REPS} at least)")
    parser.add_argument("--budget", type=float, default=60.0, metavar="SECONDS",
                        help="time for the samples, shared evenly by the sizes (default 60)")
    options = parser.parse_args(argv)
    settle_systems(parser, options, HOSTS, RIVALS)
    if options.hosts < 2 or options.ranks_per_host < 1:
        parser.error("links need 2 hosts or more, with a rank on each")
    options.rate = None if options.rate == "none" else options.rate
    for rate in filter(None, (options.rate, options.slow_host_rate)):
        try:
            bits_per_s(rate)
        except AttributeError:
            parser.error(f"{rate!r} is no rate; write 1gbit or 100mbit")
    return options


def main(argv: list[str]) -> int:
    """Run the benchmark; 0 when every system that could start summed right."""
    options = _arguments(argv)
    if reason := networks.unavailable():
        print(f"bench: no network of hosts: {reason}", file=sys.stderr)
        return 2
    slow = {options.hosts - 1: options.slow_host_rate} if options.slow_host_rate else {}
    run = {"hosts": options.hosts, "ranks_per_host": options.ranks_per_host, "rows": [], "troubles": [], "status": 0,
           "line_bytes_per_s": None, "payload_bytes_per_s": None, "socket_bytes_per_s": None}
    record = {"benchmark": "links", "runs": [run]}
    try:
        with (ended_by_signals(), Network(options.hosts, options.rate, rates=slow, mtu=options.mtu,
              congestion=None if options.congestion == "machine" else options.congestion) as network):
            record["machine"] = print_machine(f"{options.congestion} (of the route, for every system)")
            record["network"] = _describe(options)
            print(f"{'network:':<20}{record['network']}", flush=True)
            if options.loss:
                network.lose(options.hosts - 1, options.loss)
            _run(run, options, network)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    finally:
        if options.json:
            with open(options.json, "w") as file:
                json.dump(record, file, indent=1)
    return run["status"]


def _describe(options: argparse.Namespace) -> str:
    told = f"{options.hosts} hosts on a switch, {options.rate or 'unshaped'} each way"
    told += f", the last one {options.slow_host_rate}" if options.slow_host_rate else ""
    told += f", MTU {options.mtu}, {human_size(networks.QUEUE_BYTES)} per port of the switch"
    return told + (f", {100 * options.loss:g} % of packets of the last host lost" if options.loss else "")


def _run(run: dict, options: argparse.Namespace, network: Network) -> None:
    """Fill in the record, and print it."""
    size = options.hosts * options.ranks_per_host
    sizes = [num_bytes for num_bytes in options.sizes if fits(num_bytes, size, len(options.systems))]
    run["troubles"] += [{"system": human_size(num_bytes), "size": None, "reason": "more than the free memory holds"}
                        for num_bytes in options.sizes if num_bytes not in sizes]
    rates = [options.slow_host_rate if options.slow_host_rate and host == options.hosts - 1 else options.rate
             for host in range(options.hosts)]
    probe_bytes = PROBE_BYTES
    if all(rates):
        run["line_bytes_per_s"] = [bits_per_s(rate) / 8 for rate in rates]
        run["payload_bytes_per_s"] = [network.bytes_per_s(host) for host in range(options.hosts)]
        probe_bytes = int(PROBE_S * min(run["line_bytes_per_s"])) // 4 * 4
    host_of = [rank // options.ranks_per_host for rank in range(size)]
    job = {"systems": options.systems, "sizes": sizes, "reps": options.reps, "budget": options.budget,
           "probe_bytes": probe_bytes, "addresses": [network.address(host) for host in host_of]}
    others = OtherWork()
    try:
        with Ranks("bench.links", size, job,
                   prefix=lambda rank: ["nsenter", f"--net={network.namespace(host_of[rank])}", "--"]) as ranks:
            for event in ranks.events():
                kind = event.pop("kind")
                if kind == "size":
                    run["rows"] += [{"size": event["size"], **row} for row in event["rows"]]
                    if sys.stderr.isatty():
                        print(f"  {human_size(event['size'])} done ", end="\r", file=sys.stderr, flush=True)
                elif kind == "sockets":
                    run["socket_bytes_per_s"] = event["bytes_per_s"]
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


def floors_s(run: dict, num_bytes: int) -> dict[str, float]:
    """What bounds an all-reduce of num_bytes: {"line": the raw rate, "payload": what headers leave of it, "sockets"}."""
    found = {"sockets": all_reduce_floor_s(num_bytes, [run["socket_bytes_per_s"]] * run["hosts"])}
    if run["line_bytes_per_s"]:
        # Plain sockets have shown the slowest link only.
        found = {"line": all_reduce_floor_s(num_bytes, run["line_bytes_per_s"]),
                 "payload": all_reduce_floor_s(num_bytes, run["payload_bytes_per_s"])}
    return found


def _told(run: dict) -> str:
    """The run as text: a row per size and system, the bounds, and what could not be measured."""
    heading = (f"\n{run['hosts']} hosts, {run['ranks_per_host']} rank(s) on each, float32. Times are of the slowest rank; CPU is "
               "of one call, all ranks\ntogether; wire is what the busiest host's link carried in one direction.")
    parts = [heading]
    if run["socket_bytes_per_s"]:
        parts.append(table(*_table(run)) if run["rows"] else "nothing was measured")
        told = f"Plain sockets, each rank to the next one: {8 * run['socket_bytes_per_s'] / 1e9:.3f} Gbit/s of payload each way"
        if rates := run["payload_bytes_per_s"]:
            told += (f"; headers leave {8 * min(rates) / 1e9:.3f} of {8 * min(run['line_bytes_per_s']) / 1e9:.3f}.\n"
                     "\"line\" is the share of the raw rate, headers for nothing; \"TCP\" of what they leave.")
        parts.append(told)
    return "\n\n".join(filter(None, [*parts, tell_troubles(run["troubles"], run.get("other_work_cores", 0.0))]))


def _table(run: dict) -> tuple[list[str], list[list[str]]]:
    """Header and rows."""
    rows = [{**row, **summary(row["seconds"])._asdict(), "cpu": summary(row["cpu_s"]).median} for row in run["rows"]]
    there = {(row["size"], row["system"]): row for row in rows}
    rivals = [name for name in RIVALS if any(system == name for _, system in there)]
    shares = {"line": "of line", "payload": "of TCP", "sockets": "of sockets"}
    kinds = list(floors_s(run, 1))
    header = ["size", "system", "calls x samples", "min", "median", "max", "bound", *(shares[kind] for kind in kinds), "CPU",
              "wire/size", *(word for name in rivals for word in (f"x {name}", f"CPU x {name}"))]
    lines, last = [], None
    for row in rows:
        floors = floors_s(run, row["size"])
        against = [there.get((row["size"], name)) for name in rivals]
        lines.append([human_size(row["size"]) if row["size"] != last else "", row["system"],
                      f"{row['calls']} x {len(row['seconds'])}", *(human_time(row[key]) for key in ("min", "median", "max")),
                      human_time(floors[kinds[0]]),
                      *(f"{100 * floors[kind] / row['median']:.1f} %" if row["size"] >= SHARE_BYTES else "" for kind in kinds),
                      human_time(row["cpu"]), f"{summary(row['wire_bytes']).median / row['size']:.3f}",
                      *(human_ratio(rival[key] / row[key]) if rival and row["system"] not in RIVALS else ""
                        for rival in against for key in ("median", "cpu"))])
        last = row["size"]
    for trouble in run["troubles"]:
        if trouble["size"] is not None:
            lines.append([human_size(trouble["size"]), trouble["system"], *["" for _ in header[2:-1]], "ERROR"])
    return header, lines
