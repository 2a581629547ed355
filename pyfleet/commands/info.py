"""Say what this machine has to offer: chip, cores, memory, accelerators, speed, interfaces, identity, versions."""
from __future__ import annotations

import json
import platform
import socket
import sys
from pathlib import Path
from typing import Any

from pyfleet.commands.base import Parser, Refused, refuse
from pyfleet.config import ClusterConfig
from pyfleet.errors import ConfigError
from pyfleet.identity import NodeKey, short_id
from pyfleet.identity.keys import home_folder
from pyfleet.interfaces import interfaces as found_interfaces
from pyfleet.placement import num_cores
from pyfleet.profile import accelerators, chip, profile, versions


def main(argv: list[str] | None = None, prog: str = "pyfleet info") -> int:
    """The `pyfleet info` command."""
    parser = Parser(prog=prog, description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    argv = sys.argv[1:] if argv is None else argv
    try:
        mine, rest = parser.split(argv)
        options = parser.parse_args(mine)
        if rest:
            raise Refused(f"unexpected argument {rest[0]!r}")
        facts = machine()
    except (Refused, ConfigError) as error:
        return refuse(prog, error)
    if options.json:
        print(json.dumps(facts, indent=2))
    else:
        _show(rows(facts))
    return 0


def machine() -> dict[str, Any]:
    """The facts, as --json prints them; None where this system does not tell.

    Raises:  ConfigError.
    """
    import psutil
    memory, folder = psutil.virtual_memory(), home_folder(ClusterConfig().home)
    return {
        "host": socket.gethostname(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "chip": chip(),
        "cores": {"physical": psutil.cpu_count(logical=False), "logical": psutil.cpu_count(), "usable": num_cores()},
        "memory": {"total_bytes": memory.total, "available_bytes": memory.available},
        "accelerators": accelerators(),
        "interfaces": interfaces(),
        "identity": identity(folder),
        "profile": profile(folder),
        "versions": versions(),
    }


def interfaces() -> list[dict[str, Any]]:
    """Network interfaces that are up and have an IP address."""
    return [{"name": each.name, "kind": each.medium, "addresses": list(each.addresses), "mtu": each.mtu,
             "speed_mbps": each.speed_mbps} for each in found_interfaces()]


def identity(folder: Path) -> str | None:
    """The peer id that this machine goes by; None while it has no key, which is made when one is needed, not here.

    Raises:  ConfigError when the key is damaged or others may read it.
    """
    try:
        return NodeKey.load(folder).peer_id
    except FileNotFoundError:
        return None


def rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """The facts as lines of a table."""
    cores, memory = facts["cores"], facts["memory"]
    table = [
        ("host", facts["host"]), ("system", facts["system"]), ("chip", facts["chip"] or "unknown"),
        ("cores", f"{cores['logical']} ({cores['physical'] or '?'} physical, {cores['usable']} usable here)"),
        ("memory", f"{_gib(memory['total_bytes'])} ({_gib(memory['available_bytes'])} available)"),
    ]
    for each in facts["accelerators"] or [None]:
        size = f", {_gib(each['memory_bytes'])}" if each and each["memory_bytes"] else ""
        table.append(("accelerator", f"{each['kind']}: {each['name']}{size}" if each else "none"))
    measured = facts["profile"]
    fast = f", {measured['accelerator_gflops']:,.0f} by accelerators" if measured["accelerator_gflops"] else ""
    speed = f"{measured['matmul_gflops']:,.1f} GFLOP/s by cores{fast}; {measured['copy_gb_s']:.1f} GB/s copied"
    table.append(("speed", speed))
    for each in facts["interfaces"]:
        speed = f", {each['speed_mbps']} Mbit/s" if each["speed_mbps"] else ""
        table.append((f"interface {each['name']}", f"{', '.join(each['addresses'])} ({each['kind']}{speed})"))
    table.append(("identity", short_id(facts["identity"]) if facts["identity"] else "none yet"))
    return table + [(name, version or "not installed") for name, version in facts["versions"].items()]


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"


def _show(table: list[tuple[str, str]]) -> None:
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
        grid = Table(show_header=False, box=None, pad_edge=False)
        for name, value in table:
            grid.add_row(Text(name, style="bold cyan"), Text(value))
        Console().print(grid)
        return
    width = max(len(name) for name, _ in table)
    for name, value in table:
        print(f"{name:{width}}  {value}")
