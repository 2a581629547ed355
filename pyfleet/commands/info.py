"""Say what this machine has to offer: chip, cores, memory, accelerators, interfaces, versions."""
from __future__ import annotations

import ipaddress
import json
import platform
import re
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from pyfleet.commands.base import Parser, Refused, refuse
from pyfleet.placement import num_cores

PACKAGES = ("pyfleet", "torch", "numpy")


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
    except Refused as error:
        return refuse(prog, error)
    facts = machine()
    if options.json:
        print(json.dumps(facts, indent=2))
    else:
        _show(rows(facts))
    return 0


def machine() -> dict[str, Any]:
    """The facts, as --json prints them; None where this system does not tell."""
    import psutil
    memory = psutil.virtual_memory()
    return {
        "host": socket.gethostname(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "chip": chip(),
        "cores": {"physical": psutil.cpu_count(logical=False), "logical": psutil.cpu_count(), "usable": num_cores()},
        "memory": {"total_bytes": memory.total, "available_bytes": memory.available},
        "accelerators": accelerators(),
        "interfaces": interfaces(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
    }


def chip() -> str | None:
    """The processor's name, as its maker gives it."""
    if sys.platform == "darwin":
        told = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False)
        return told.stdout.strip() or None
    for path, pattern in (("/proc/cpuinfo", r"^model name\s*:\s*(.+)$"), ("/proc/device-tree/model", r"^([^\0]+)"),
                          ("/proc/cpuinfo", r"^Model\s*:\s*(.+)$")):
        try:
            found = re.search(pattern, Path(path).read_text(errors="replace"), re.MULTILINE)
        except OSError:
            continue
        if found:
            return found[1].strip()
    return platform.processor() or None


def accelerators() -> list[dict[str, Any]]:
    """What torch could use; torch is asked only where the machine shows a sign of one, for importing it takes seconds."""
    apple = sys.platform == "darwin" and platform.machine() == "arm64"
    if not apple and not any(Path("/dev").glob("nvidia[0-9]*")) and not Path("/dev/kfd").exists():
        return []
    try:
        import torch
        found = [{"kind": "cuda", "name": torch.cuda.get_device_name(index),
                  "memory_bytes": torch.cuda.get_device_properties(index).total_memory}
                 for index in range(torch.cuda.device_count())]
        if torch.backends.mps.is_available():
            found.append({"kind": "mps", "name": chip(), "memory_bytes": None})
    except Exception as error:      # noqa: BLE001 a broken driver or torch is itself a fact about this machine
        return [{"kind": "unusable", "name": " ".join(str(error).split()), "memory_bytes": None}]
    return found


def interfaces() -> list[dict[str, Any]]:
    """Network interfaces that are up and have an IP address."""
    import psutil
    stats, found = psutil.net_if_stats(), []
    for name, addresses in sorted(psutil.net_if_addrs().items()):
        ips = [entry.address for entry in addresses if entry.family in (socket.AF_INET, socket.AF_INET6)]
        if name in stats and stats[name].isup and ips:
            found.append({"name": name, "kind": _kind(name, ips), "addresses": ips, "mtu": stats[name].mtu,
                          "speed_mbps": stats[name].speed or None})
    return found


def _kind(name: str, ips: list[str]) -> str:
    if any(ipaddress.ip_address(ip.partition("%")[0]).is_loopback for ip in ips):
        return "loopback"
    if Path(f"/sys/class/net/{name}/wireless").exists():
        return "wifi"
    if name.startswith("thunderbolt") or (sys.platform == "darwin" and name.startswith("bridge")):
        return "thunderbolt"
    return "ethernet"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
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
    for each in facts["interfaces"]:
        speed = f", {each['speed_mbps']} Mbit/s" if each["speed_mbps"] else ""
        table.append((f"interface {each['name']}", f"{', '.join(each['addresses'])} ({each['kind']}{speed})"))
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
