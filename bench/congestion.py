"""One TCP congestion control for every system of a run, without touching the machine's own.

Some machines default to BBR, whose pacing timers say more about the host than about the code under test, and no system
here lets it be set from outside. So the run moves into a private network namespace that has nothing but a loopback
interface, and sets the default of that namespace: all sockets of the run get it, ours and the rivals', and nothing needs
to be put back.
"""
from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys

from bench.report import congestion_control

CHOICES = ("auto", "machine", "cubic", "reno", "bbr")
_SETTING = pathlib.Path("/proc/sys/net/ipv4/tcp_congestion_control")
INSIDE = "--inside-namespace"


def enter(choice: str, argv: list[str]) -> str:
    """Put a congestion control in force for this process and its children; return one line that says what is in force.

    "auto" asks for cubic, else reno (a namespace may only choose what the machine allows to everyone), and stays with the
    machine's own where namespaces are refused. Replaces this process by itself inside the namespace on the way, so call it
    before anything has been started; argv is the benchmark's name and options.
    Raises:  OSError when a control chosen by name cannot be had.
    """
    if choice == "machine" or (choice == "auto" and congestion_control() in ("", "cubic", "reno")):
        return f"{congestion_control() or 'unknown'} (the machine's own)"
    if INSIDE not in argv:
        prefix = _private_namespace()
        if prefix:
            os.execvp(prefix[0], [*prefix, sys.executable, "-m", "bench", *argv, INSIDE])
        if choice != "auto":
            raise OSError(f"no private network namespace to set {choice} in; --congestion machine goes without")
        return f"{congestion_control()} (the machine's own; no private network namespace to be had)"
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    for control in ("cubic", "reno") if choice == "auto" else (choice,):
        try:
            _SETTING.write_text(control)
        except OSError as error:
            refusal = error
        else:
            return f"{congestion_control()} (private network namespace, for every system)"
    raise OSError(f"{choice} cannot be set here: {refusal}; the machine allows "
                  + pathlib.Path("/proc/sys/net/ipv4/tcp_allowed_congestion_control").read_text().strip()) from refusal


def _private_namespace() -> list[str]:
    """The command prefix that runs a program in a network namespace of its own; [] where that is refused."""
    if not (_SETTING.exists() and shutil.which("unshare") and shutil.which("ip")):
        return []
    for prefix in (["unshare", "--net"], ["unshare", "--net", "--map-root-user"]):
        if subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode == 0:
            return prefix
    return []
