"""P0: lists of machines, as people write them for mpirun: on a command line or in a hostfile."""
from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from pyfleet.config import nearest
from pyfleet.errors import ConfigError

_NAME = re.compile(r"(?:(?P<user>[^@\s\[\]:]+)@)?(?:\[(?P<v6>[0-9A-Fa-f:.%\w-]+)\]|(?P<host>[^@\s\[\]:,]+))(?::(?P<slots>.*))?")
_KEYS = ("slots", "max_slots", "max-slots")     # Open MPI's
MOST_SLOTS = 1 << 16


@dataclass(frozen=True)
class Host:
    """A machine, and how many ranks it is given; slots None: as many as every other one."""

    name: str
    user: str | None = None
    slots: int | None = None

    @property
    def address(self) -> str:
        """What ssh connects to: user@name."""
        return self.name if self.user is None else f"{self.user}@{self.name}"

    def is_here(self) -> bool:
        """Whether the name, said without a user, is this machine's: all its addresses are ours."""
        if self.user is not None:
            return False
        try:
            found = socket.getaddrinfo(self.name, None, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):         # a name that only ssh's configuration knows
            return False
        return all(_is_ours(family, where) for family, *_, where in found)


def _is_ours(family: int, where: tuple) -> bool:
    """Whether an address is one of this machine's: one can listen there."""
    try:
        with socket.socket(family, socket.SOCK_STREAM) as sock:
            sock.bind(where)
    except OSError:
        return False
    return True


def parse_hosts(text: str) -> list[Host]:
    """The machines of `a,user@b:4,[fe80::1]:2`; the slots of one that is named again add up.

    Raises:  ConfigError naming the entry.
    """
    entries = [entry.strip() for entry in text.split(",")]
    if not all(entries):
        raise ConfigError(f"--hosts {text!r} has an empty entry" if any(entries) else "--hosts names no host")
    return _merged([_parse(entry, f" (in --hosts {text})") for entry in entries])


def read_hostfile(path: str | os.PathLike) -> list[Host]:
    """The machines of a file with one a line: `host slots=4` as for Open MPI, `host:4` as for MPICH; # begins a comment.

    Raises:  ConfigError naming the file and the line.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"cannot read the hostfile {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"the hostfile {path} is not UTF-8 text") from None
    hosts = []
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if words:
            hosts.append(_parse_line(words, f" ({path}, line {number})"))
    if not hosts:
        raise ConfigError(f"the hostfile {path} names no host")
    return _merged(hosts)


def _parse_line(words: list[str], where: str) -> Host:
    host, said = _parse(words[0], where), {}
    for word in words[1:]:
        key, equals, value = word.partition("=")
        if not equals or key not in _KEYS:
            raise ConfigError(f"{word!r} is not slots=N{nearest(key, _KEYS)}{where}")
        if key.replace("-", "_") in said:
            raise ConfigError(f"{key} is said twice{where}")
        said[key.replace("-", "_")] = _slots(value, where)
    slots, most = said.get("slots"), said.get("max_slots")
    if slots is not None and host.slots is not None:
        raise ConfigError(f"{words[0]!r} says its slots already, without slots={slots}{where}")
    slots = host.slots if slots is None else slots
    if slots is not None and most is not None and slots > most:
        raise ConfigError(f"slots={slots} is more than max_slots={most}{where}")
    return replace(host, slots=most if slots is None else slots)


def _parse(entry: str, where: str) -> Host:
    match = _NAME.fullmatch(entry)
    name = match and (match["v6"] or match["host"])
    if match and match["host"] and ":" in (match["slots"] or ""):
        raise ConfigError(f"{entry!r}: an IPv6 address is written in brackets, such as [fe80::1]:4{where}")
    if not match or name.startswith("-") or (match["user"] or "").startswith("-") or (match["v6"] and ":" not in name):
        raise ConfigError(f"{entry!r} is not [user@]host[:slots]{where}")
    slots = None if match["slots"] is None else _slots(match["slots"], where)
    return Host(name, match["user"], slots)


def _slots(text: str, where: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= MOST_SLOTS:
        raise ConfigError(f"slots must be a number from 1 to {MOST_SLOTS}, got {text!r}{where}")
    return int(text)


def _merged(hosts: Iterable[Host]) -> list[Host]:
    """Every machine once, its slots added up: naming one twice gives it one more each time, as for Open MPI."""
    found: dict[str, Host] = {}
    for host in hosts:
        before = found.get(host.address)
        found[host.address] = host if before is None else replace(host, slots=(before.slots or 1) + (host.slots or 1))
    return list(found.values())
