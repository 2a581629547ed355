"""P6, open set: the verbs of the `pyfleet` command, one module each."""
from __future__ import annotations

import importlib
import os
import signal
import sys
from importlib import metadata

from pyfleet.commands.base import refuse
from pyfleet.config import nearest

COMMANDS = {
    "launch": "pyfleet.commands.launch:main",
    "status": "pyfleet.commands.status:main",
    "info": "pyfleet.commands.info:main",
    "discover": "pyfleet.commands.discover:main",
    "doctor": "pyfleet.commands.doctor:main",
    "benchmark": "pyfleet.commands.benchmark:main",
    "keys": "pyfleet.commands.keys:main",
}


def main(argv: list[str] | None = None) -> int:
    """The `pyfleet` command: run one verb and return its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    verb = argv[0] if argv else None
    if verb in COMMANDS:
        module, _, function = COMMANDS[verb].partition(":")
        try:
            return getattr(importlib.import_module(module), function)(argv[1:], prog=f"pyfleet {verb}")
        except BrokenPipeError:     # `pyfleet info | head -1`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 128 + signal.SIGPIPE
    if verb in ("-V", "--version"):
        print(f"pyfleet {version()}")
        return 0
    if verb in ("-h", "--help", "help"):
        print(_usage())
        return 0
    if verb is None:
        print(_usage(), file=sys.stderr)
        return 2
    return refuse("pyfleet", f"unknown command {verb}{nearest(verb, COMMANDS) or '; there is ' + ', '.join(COMMANDS)}")


def version() -> str:
    """The installed version."""
    try:
        return metadata.version("pyfleet")
    except metadata.PackageNotFoundError:
        return "(not installed)"


def _usage() -> str:
    lines = ["usage: pyfleet COMMAND ...", ""]
    for verb, target in COMMANDS.items():
        told = importlib.import_module(target.partition(":")[0]).__doc__.splitlines()[0]
        lines.append(f"  {verb:10} {told}")
    return "\n".join([*lines, "", "pyfleet COMMAND --help tells more."])
