"""Show the fleet: its nodes and ranks, who leads, how everybody is, and what lies between them."""
from __future__ import annotations

import json
import sys
import time
from typing import Any

from pyfleet.commands.base import Parser, Refused, refuse
from pyfleet.config import load_config
from pyfleet.errors import ConfigError, FleetError
from pyfleet.identity import short_id
from pyfleet.membership.query import find_status

TIMEOUT_S = 5.0
WATCH_S = 1.0

COLUMNS = ("node", "peer", "ranks", "weight", "health", "latency", "slowest link", "address", "")


def main(argv: list[str] | None = None, prog: str = "pyfleet status") -> int:
    """The `pyfleet status` command; exit code 1 when no node can be reached."""
    parser = Parser(prog=prog, description=__doc__)
    add = parser.add_argument
    add("--master", metavar="HOST[:PORT]", help="the node to ask (default: the first that answers in this namespace)")
    add("--namespace", metavar="NAME", help="cluster.namespace")
    add("--psk-file", metavar="FILE", help="cluster.psk_file")
    add("--timeout", metavar="S", type=float, default=TIMEOUT_S, help=f"seconds to look for a node (default: {TIMEOUT_S:g})")
    add("--watch", action="store_true", help="show it again every second, until Ctrl-C")
    add("--json", action="store_true", help="one JSON object; with --watch, one a line")
    try:
        options = parser.parse_args(sys.argv[1:] if argv is None else argv)
        said = [f"cluster.{name}={value}" for name, value in (("namespace", options.namespace), ("psk_file", options.psk_file))
                if value]
        cluster = load_config(None, said)[1]
        if not options.timeout > 0:
            raise Refused(f"--timeout must be a number of seconds > 0, not {options.timeout:g}")
        if not options.watch:
            return _show(find_status(cluster, options.master, options.timeout), options.json)
        while True:
            status = find_status(cluster, options.master, options.timeout)
            if sys.stdout.isatty() and not options.json:
                print("\x1b[H\x1b[2J", end="")
            _show(status, options.json, line=True)
            time.sleep(WATCH_S)
    except (Refused, ConfigError) as error:
        return refuse(prog, error)
    except FleetError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _show(status: dict[str, Any], as_json: bool, line: bool = False) -> int:
    if as_json:
        print(json.dumps(status, indent=None if line else 2), flush=True)
        return 0
    for name, value in headline(status):
        print(f"{name:8}  {value}")
    print()
    _table(COLUMNS, rows(status))
    for trouble in status["troubles"]:
        print(f"trouble: {trouble}")
    sys.stdout.flush()
    return 0


def headline(status: dict[str, Any]) -> list[tuple[str, str]]:
    """What is said of the fleet as a whole."""
    names = {node["peer"]: node["name"] or short_id(node["peer"]) for node in status["nodes"]}
    if status["fleet"] is None:
        return [("fleet", "none yet"), ("state", status["state"])]
    return [("fleet", status["fleet"]), ("epoch", str(status["epoch"])), ("leader", names[status["leader"]]),
            ("ranks", f"{status['world_size']} on {sum(node['in_view'] for node in status['nodes'])} nodes"),
            ("step", str(status["step"])), ("state", f"{status['state']} (as {names[status['peer']]} sees it)")]


def rows(status: dict[str, Any]) -> list[tuple[str, ...]]:
    """A row for each node, under COLUMNS."""
    found = []
    for node in status["nodes"]:
        links = [link for link in status["topology"]["links"] if node["peer"] in (link["from"], link["to"])]
        slowest = min(links, key=lambda link: link["mbit_s"], default=None)
        ranks = (f"{node['first_rank']}-{node['first_rank'] + node['slots'] - 1}" if node["in_view"] and node["slots"] > 1
                 else str(node["first_rank"]) if node["in_view"] else "")
        weight = node["profile"].get("weight")
        marks = [mark for mark, on in (("leader", node["is_leader"]), ("asked", node["is_self"]),
                                       ("not in the fleet", not node["in_view"])) if on]
        found.append((
            node["name"] or "?", short_id(node["peer"]), ranks, f"{weight:.0f}" if isinstance(weight, (int, float)) else "",
            node["health"], f"{node['latency_ms']:.2f} ms" if node["latency_ms"] is not None else "",
            f"{slowest['mbit_s']:.0f} Mbit/s {slowest['medium']}" if slowest else "",
            node["address"] or (node["addresses"] or [""])[0], ", ".join(marks)))
    return found


def _table(columns: tuple[str, ...], table: list[tuple[str, ...]]) -> None:
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
        grid = Table(*columns, box=None, pad_edge=False, header_style="bold cyan")
        for row in table:
            grid.add_row(*map(Text, row))
        Console().print(grid)
        return
    widths = [max(map(len, column)) for column in zip(columns, *table, strict=True)]
    for row in (columns, *table):
        print("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
