"""P5: whether what pyfleet is made of is there, and whether the others speak the same protocol."""
from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib import import_module, metadata

from pyfleet.checks.base import FAIL, OK, SKIPPED, WARN, Finding, Subject
from pyfleet.identity.keys import short_id
from pyfleet.members import PROTOCOL

CORE = "fleetcore.group"        # imports every compiled module below it


def check(subject: Subject) -> Iterator[Finding]:
    """This machine's, then the peers'."""
    told = f"python {platform.python_version()}, protocol {PROTOCOL}, " + ", ".join(
        f"{package} {version(package) or 'missing'}" for package in ("pyfleet", "torch", "numpy"))
    try:
        import_module(CORE)
    except ImportError as error:
        yield Finding("versions", FAIL, f"fleetcore does not load: {error}; {told}",
                      "it is compiled for one Python: install pyfleet again with this one")
    else:
        missing = version("torch") is None
        yield Finding("versions", WARN if missing else OK, told, "pip install torch to train" if missing else "")
    if subject.nodes is None:
        yield Finding("versions of others", SKIPPED, "no peer was asked")
        return
    strangers = [node for node in subject.nodes if node.protocol != PROTOCOL]
    own = version("pyfleet")
    others = [node for node in subject.nodes if node.protocol == PROTOCOL and own and node.version not in ("", own)]
    if strangers:
        told = ", ".join(f"{node.name or short_id(node.peer)} speaks protocol {node.protocol} (pyfleet {node.version or '?'})"
                         for node in strangers)
        yield Finding("versions of others", FAIL, f"{told}; this one {PROTOCOL}", "install the same pyfleet on all machines")
    elif others:
        told = ", ".join(f"{node.name or short_id(node.peer)} has pyfleet {node.version}" for node in others)
        yield Finding("versions of others", WARN, told, "the protocol is the same, so it works; the same version everywhere is "
                                                        "tested better")
    else:
        yield Finding("versions of others", OK, f"{len(subject.nodes)} peers, the same version")


def version(package: str) -> str | None:
    """The installed version of a package; None when there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
