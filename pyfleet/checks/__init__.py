"""P5, open set: what `pyfleet doctor` looks at. `base` is the contract."""
from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module

from pyfleet.checks.base import FAIL, OK, SKIPPED, STATUSES, WARN, Finding, Subject

CHECKS = {
    "versions": "pyfleet.checks.versions:check",
    "clock": "pyfleet.checks.clock:check",
    "identity": "pyfleet.checks.identity:check",
    "secret": "pyfleet.checks.secret:check",
    "ports": "pyfleet.checks.ports:check",
    "interfaces": "pyfleet.checks.interfaces:check",
    "multicast": "pyfleet.checks.multicast:check",
    "peers": "pyfleet.checks.peers:check",
    "network": "pyfleet.checks.network:check",
    "limits": "pyfleet.checks.limits:check",
}

__all__ = ["CHECKS", "FAIL", "OK", "SKIPPED", "STATUSES", "WARN", "Finding", "Subject", "run"]


def run(subject: Subject, names: Iterable[str] = tuple(CHECKS)) -> list[Finding]:
    """What these checks find, in their order. A check that breaks is a finding, too; the others go on."""
    found: list[Finding] = []
    for name in names:
        module, function = CHECKS[name].split(":")
        try:
            found += getattr(import_module(module), function)(subject)
        except Exception as error:      # noqa: BLE001 a machine may be broken in ways that nobody thought of
            found.append(Finding(name, WARN, f"could not be checked: {type(error).__name__}: {error}", "please report this"))
    return found
