"""P5: whether there is a PSK, and whether it can be read and used."""
from __future__ import annotations

from collections.abc import Iterator

from pyfleet.checks.base import FAIL, OK, WARN, Finding, Subject
from pyfleet.errors import ConfigError
from pyfleet.identity import Namespace


def check(subject: Subject) -> Iterator[Finding]:
    """One finding; the secret itself is never shown."""
    try:
        namespace = Namespace.configured(subject.cluster)
    except ConfigError as error:
        yield Finding("secret", FAIL, str(error), "`pyfleet keys psk --output FILE` makes one; copy the file to every machine, "
                                                  "for its user only")
        return
    if namespace is None:
        yield Finding("secret", WARN, "there is no PSK: machines cannot find each other by themselves, and who listens where "
                      "ranks meet can join", "`pyfleet keys psk --output FILE`, and PYFLEET_PSK_FILE=FILE on every machine")
    else:
        yield Finding("secret", OK, f"namespace {namespace.name}, tag {namespace.tag}: equal on all machines that belong "
                                    f"together")
