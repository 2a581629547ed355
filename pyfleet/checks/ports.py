"""P5: whether the ports that the settings name are free, and who holds those that are not."""
from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator

import psutil

from pyfleet.checks.base import FAIL, OK, SKIPPED, WARN, Finding, Subject

SETTINGS = {"discovery_port": ("udp", "tcp"), "gradient_port": ("tcp",), "master_port": ("tcp",), "metrics_port": ("tcp",)}
OWN = "pyfleet itself"
_TYPES = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}


def check(subject: Subject) -> Iterator[Finding]:
    """One finding per setting: the port is taken for a moment, as the fleet would take it."""
    for setting, kinds in SETTINGS.items():
        port, name = getattr(subject.cluster, setting), f"ports {setting}"
        if port is None:
            continue
        if port == 0:
            yield Finding(name, SKIPPED, f"{setting} is 0: any free port will do")
            continue
        problems = [problem for kind in kinds if (problem := trouble(kind, port))]
        if problems and all(OWN in problem for problem in problems):
            yield Finding(name, WARN, "; ".join(problems), "nothing, if a fleet is meant to run here now")
        elif problems:
            yield Finding(name, FAIL, "; ".join(problems), f"end what holds it, or set PYFLEET_{setting.upper()} to another "
                                                           f"port, the same one on every machine")
        else:
            yield Finding(name, OK, f"{'/'.join(kinds)} {port} is free")


def trouble(kind: str, port: int) -> str | None:
    """Why nobody can listen on a port now; None when one can. kind: "tcp" or "udp"."""
    with socket.socket(socket.AF_INET, _TYPES[kind]) as sock:
        if kind == "tcp":                       # what a listener that has just ended leaves behind is no obstacle
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("", port))
            if kind == "tcp":
                sock.listen(1)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return f"{kind} {port} is taken by {holder(kind, port) or 'a process of another user'}"
            return f"{kind} {port}: {error.strerror}"
    return None


def holder(kind: str, port: int) -> str | None:
    """The process that has a port, as far as this user may know."""
    try:
        there = psutil.net_connections(kind)
    except psutil.Error:                        # macOS shows others' sockets to root alone
        there = []
    for each in there:
        if each.laddr and each.laddr.port == port and each.pid and each.status in (psutil.CONN_LISTEN, psutil.CONN_NONE):
            try:
                process = psutil.Process(each.pid)
                words = process.cmdline()
                own = any(word.startswith("pyfleet.") or os.path.basename(word).startswith("pyfleet") for word in words[:4])
                return f"{OWN if own else process.name()} (pid {each.pid}: {' '.join(words)[:100].strip()})"
            except psutil.Error:
                return f"pid {each.pid}"
    return None
