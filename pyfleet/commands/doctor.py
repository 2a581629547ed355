"""Test this machine, its network and its settings, and say what to do."""
from __future__ import annotations

import contextlib
import json
import sys
import time
from dataclasses import asdict

from pyfleet.checks import CHECKS, FAIL, OK, SKIPPED, WARN, Finding, Subject, run
from pyfleet.commands.base import Parser, Refused, refuse
from pyfleet.config import ClusterConfig, load_config, nearest
from pyfleet.discovery import Seen, look
from pyfleet.errors import ConfigError, FleetError
from pyfleet.identity import Namespace
from pyfleet.members import Node
from pyfleet.membership.query import own_self, status_at

LOOK_S = 2.0                # nodes answer within 0.15 s; a second question follows after 1 s
ASK_S = 1.0                 # for each node that is asked for its clock
MOST_ASKED = 16             # of a large fleet: who else is wrong shows from there
NEED_OTHERS = {"identity", "versions", "clock"}

COLOURS = {OK: "green", WARN: "yellow", FAIL: "bold red", SKIPPED: "dim"}


def main(argv: list[str] | None = None, prog: str = "pyfleet doctor") -> int:
    """The `pyfleet doctor` command: 0 when nothing failed, 1 when something did."""
    parser = Parser(prog=prog, description=f"{__doc__} Checks: {', '.join(CHECKS)}.", usage=f"{prog} [CHECK ...] [options]")
    parser.add_argument("checks", nargs="*", metavar="CHECK", help="only these (default: all)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--nproc", type=int, metavar="N", help="how many ranks are to run on this machine")
    parser.add_argument("--peer", action="append", default=[], metavar="HOST[:PORT]", help="another machine, to be reached by TCP")
    parser.add_argument("--config", metavar="FILE", help="read settings from this YAML or JSON file")
    parser.add_argument("--override", action="append", default=[], metavar="KEY=VALUE", help="change a setting")
    try:
        options = parser.parse_args(sys.argv[1:] if argv is None else argv)
        for name in options.checks:
            if name not in CHECKS:
                raise Refused(f"there is no check {name!r}{nearest(name, CHECKS) or '; there is ' + ', '.join(CHECKS)}")
        if options.nproc is not None and options.nproc < 1:
            raise Refused(f"--nproc must be at least 1, not {options.nproc}")
    except Refused as error:
        return refuse(prog, error)
    try:
        cluster = load_config(options.config, options.override)[1]
    except ConfigError as error:
        findings = [Finding("settings", FAIL, str(error), "correct it where it says; other checks have to wait")]
    else:
        seen = look_around(cluster) if NEED_OTHERS.intersection(options.checks or CHECKS) else None
        findings = run(Subject(
            cluster, num_ranks=options.nproc, peers=[*options.peer, *cluster.static_peers],
            sightings=None if seen is None else [each.sighting for each in seen],
            nodes=None if seen is None else [Node(peer=each.sighting.peer, incarnation=each.sighting.incarnation,
                                                  name=each.sighting.name, version=each.version, protocol=each.protocol)
                                             for each in seen],
            skews_s=skews(cluster, seen)), options.checks or CHECKS)
    failed = any(finding.status == FAIL for finding in findings)
    if options.json:
        print(json.dumps({"ok": not failed, "findings": [asdict(finding) for finding in findings]}, indent=2))
    else:
        show(findings)
    return 1 if failed else 0


def look_around(cluster: ClusterConfig) -> list[Seen] | None:
    """Who is on the network in our namespace, or in any where we have no PSK; None where it cannot be found out."""
    try:
        namespace = Namespace.configured(cluster)
    except ConfigError:             # a finding of its own
        namespace = None
    try:
        return [seen for seen in look(cluster, namespace, LOOK_S) if namespace is None or seen.tag == namespace.tag]
    except (ConfigError, OSError):  # discovery is turned off, or there is no network
        return None


def skews(cluster: ClusterConfig, seen: list[Seen] | None) -> dict[str, float] | None:
    """By how much the clocks of the nodes that answer are ahead of this one; None where none does, or there is no secret to
    ask them with."""
    try:
        own = own_self(cluster)
    except ConfigError:
        return None
    found = {}
    for sighting in [each.sighting for each in seen or []][:MOST_ASKED]:
        for address in sighting.addresses:
            with contextlib.suppress(FleetError):
                began = time.time()
                told = status_at(own, address, sighting.port, ASK_S)
                found[told["peer"]] = told["time"] - (began + time.time()) / 2
                break
    return found or None


def show(findings: list[Finding]) -> None:
    """The findings as a table, advice below what it is about, and a line that sums up."""
    counts = {status: sum(finding.status == status for finding in findings) for status in COLOURS}
    summary = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    width = max(len(finding.name) for finding in findings)
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
        grid = Table(show_header=False, box=None, pad_edge=False)
        for finding in findings:
            told = Text(finding.seen)
            if finding.advice:
                told.append(f"\n-> {finding.advice}", style="italic")
            grid.add_row(Text(finding.status, style=COLOURS[finding.status]), Text(finding.name, style="bold"), told)
        Console().print(grid)
    else:
        for finding in findings:
            print(f"{finding.status:7}  {finding.name:{width}}  {finding.seen}")
            if finding.advice:
                print(f"{'':7}  {'':{width}}  -> {finding.advice}")
    print(summary)
