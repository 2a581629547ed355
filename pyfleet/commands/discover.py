"""Say who is on the local network in this namespace; announces nothing."""
from __future__ import annotations

import json
import math
import sys
import threading
from typing import Any

from pyfleet.commands.base import Parser, Refused, refuse
from pyfleet.config import ClusterConfig, load_config
from pyfleet.discovery import Seen, look
from pyfleet.discovery.mdns import interfaces
from pyfleet.errors import ConfigError
from pyfleet.identity import NodeKey, short_id
from pyfleet.identity.keys import home_folder
from pyfleet.identity.namespace import Namespace
from pyfleet.members import PROTOCOL

TIMEOUT_S = 3.0             # nodes answer within 0.15 s; a second question follows after 1 s, for networks that lose packets
HEADINGS = ("node", "name", "addresses", "port", "incarnation", "")


def main(argv: list[str] | None = None, prog: str = "pyfleet discover") -> int:
    """The `pyfleet discover` command."""
    parser = Parser(prog=prog, description=f"{__doc__} Exit code 0 when somebody was found, 1 when nobody.")
    parser.add_argument("--timeout", type=_seconds, default=TIMEOUT_S, metavar="S",
                        help=f"listen for this long (default: {TIMEOUT_S:g})")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--all", action="store_true", help="nodes of other namespaces, too")
    parser.add_argument("--namespace", metavar="NAME", help="instead of the configured one (PYFLEET_NAMESPACE)")
    parser.add_argument("--psk-file", metavar="FILE", help="its secret (PYFLEET_PSK_FILE)")
    try:
        options = parser.parse_args(sys.argv[1:] if argv is None else argv)
    except Refused as error:
        return refuse(prog, error)
    try:
        given = {name: getattr(options, name) for name in ("namespace", "psk_file") if getattr(options, name) is not None}
        cluster = load_config(cluster=given)[1]
        namespace = Namespace.configured(cluster)
        found = look(cluster, namespace, options.timeout)
    except ConfigError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 1
    here = {address for interface in interfaces() for address in interface.addresses}
    everybody = nodes(found, namespace and namespace.tag, _own_peer(cluster), here)
    shown = [node for node in everybody if options.all or namespace is None or node["in_namespace"]]
    if options.json:
        print(json.dumps({"namespace": namespace and namespace.name, "tag": namespace and namespace.tag, "nodes": shown,
                          "num_others": len(everybody) - len(shown)}, indent=2))
    elif shown:
        _show([HEADINGS, *(row(node) for node in shown)])
    if not options.json:
        for line in remarks(namespace, shown, len(everybody) - len(shown), options.timeout):
            print(line, file=sys.stderr)
    return 0 if shown else 1


def nodes(found: list[Seen], tag: str | None, own_peer: str | None, here: set[str]) -> list[dict[str, Any]]:
    """The facts, as --json prints them, by name.

    Args:    tag: of our namespace, None without one.  own_peer: peer id of this machine, None when it has none yet.
             here: its addresses, which tell it from a clone.
    """
    found = sorted(found, key=lambda seen: (seen.sighting.name, seen.sighting.peer, seen.sighting.incarnation))
    return [{
        "node": short_id(seen.sighting.peer), "peer": seen.sighting.peer, "name": seen.sighting.name,
        "addresses": list(seen.sighting.addresses), "port": seen.sighting.port, "incarnation": seen.sighting.incarnation,
        "version": seen.version, "protocol": seen.protocol, "tag": seen.tag,
        "in_namespace": None if tag is None else seen.tag == tag,
        "is_this_node": seen.sighting.peer == own_peer and bool(here.intersection(seen.sighting.addresses)),
        "same_identity_as": [{"name": other.sighting.name, "incarnation": other.sighting.incarnation} for other in found
                             if other.sighting.peer == seen.sighting.peer and other is not seen],
    } for seen in found]


def row(node: dict[str, Any]) -> tuple[str, ...]:
    """A node as a line of the table."""
    notes = [f"same identity as {other['name'] or '?'} ({other['incarnation'][:8]})" for other in node["same_identity_as"]]
    if node["is_this_node"]:
        notes.insert(0, "this node")
    if node["in_namespace"] is False:
        notes.append(f"another namespace ({node['tag'][:8]})")
    elif node["in_namespace"] is None:
        notes.append(f"namespace {node['tag'][:8]}")
    if node["protocol"] != PROTOCOL:
        notes.append(f"speaks protocol {node['protocol']}, this is {PROTOCOL}")
    return (node["node"], node["name"] or "?", ", ".join(node["addresses"]), str(node["port"]), node["incarnation"][:8],
            "; ".join(notes))


def remarks(namespace: Namespace | None, shown: list[dict[str, Any]], num_others: int, timeout_s: float) -> list[str]:
    """What there is to say besides the table."""
    told = []
    if namespace is None:
        told.append("no PSK is set, so this is everybody, of whatever namespace; `pyfleet keys psk` makes one, "
                    "--psk-file (PYFLEET_PSK_FILE) says where it is")
    if not shown:
        where = f"in the namespace {namespace.name} " if namespace else ""
        told.append(f"nobody was found {where}within {timeout_s:g} s")
    if num_others:
        told.append(f"{num_others} of other namespaces; --all shows them")
    if any(node["same_identity_as"] for node in shown):
        told.append("nodes with one identity can not be in one fleet: on all but one of them, `pyfleet keys new --replace`")
    return told


def _own_peer(cluster: ClusterConfig) -> str | None:
    try:
        return NodeKey.load(home_folder(cluster.home)).peer_id
    except (FileNotFoundError, ConfigError):        # to look around, nobody needs a key
        return None


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds <= threading.TIMEOUT_MAX or not math.isfinite(seconds):
        raise ValueError
    return seconds


_seconds.__name__ = "number of seconds"         # as argparse calls it when it is none


def _show(table: list[tuple[str, ...]]) -> None:
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
        grid = Table(box=None, pad_edge=False, header_style="bold cyan")
        for heading in table[0]:
            grid.add_column(heading)
        for line in table[1:]:
            grid.add_row(*map(Text, line))
        Console().print(grid)
        return
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        print("  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)).rstrip())
