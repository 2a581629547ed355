"""P5: whether multicast gets out of this machine and in again: discovery depends on it."""
from __future__ import annotations

import contextlib
import secrets
import select
import socket
import struct
import time
from collections.abc import Iterator

import psutil

from pyfleet.checks.base import FAIL, OK, SKIPPED, WARN, Finding, Subject

PORT = 5353                                     # of mDNS: a firewall's rules are about this one
GROUPS = {socket.AF_INET: "224.0.0.251", socket.AF_INET6: "ff02::fb"}
ATTEMPTS, PATIENCE_S = 3, 0.3                   # what comes back at all comes back within microseconds
ADVICE = ("let UDP 5353 to 224.0.0.251 and ff02::fb pass in and out (ufw allow 5353/udp; firewall-cmd --add-service=mdns; "
          "nft add rule inet filter input udp dport 5353 accept), or do without: name the other machines as peers, host:port")


def check(subject: Subject) -> Iterator[Finding]:
    """A finding per interface: a question that nobody can answer is sent to the group of mDNS, and must come back.

    What a host sends to a group that it is in passes its own output and input rules, so a rule that would drop others'
    packets drops this one; a switch or an access point that drops them is seen from another machine only.
    """
    if not subject.cluster.discovery_enabled:
        yield Finding("multicast", SKIPPED, "discovery_enabled is false")
        return
    there = ways(subject.cluster.iface)
    if not there:
        yield Finding("multicast", FAIL, "no interface that is up can do multicast", "connect this machine to a network; "
                      "see `ip link` or the network settings")
    problems = {way: round_trip(*way[1:]) for way in there}
    # IPv4 alone will do, and so will one interface.
    works = any(problem is None for (_, family, *_), problem in problems.items() if family == socket.AF_INET)
    for (name, family, _), problem in problems.items():
        version = "IPv4" if family == socket.AF_INET else "IPv6"
        if problem is None:
            yield Finding(f"multicast {name} {version}", OK, f"{GROUPS[family]} goes out and comes back")
        else:
            yield Finding(f"multicast {name} {version}", WARN if works else FAIL, problem, ADVICE)


def ways(iface: str | None = None) -> list[tuple[str, int, str]]:
    """[(interface, family, own address)] over which multicast might go; for IPv6 the address is the interface's index."""
    stats, found = psutil.net_if_stats(), []
    for name, entries in sorted(psutil.net_if_addrs().items()):
        flags = stats[name].flags.split(",") if name in stats else []
        if iface not in (None, name) or "up" not in flags or "multicast" not in flags or "loopback" in flags:
            continue
        by_family = {entry.family: entry.address for entry in reversed(entries)}
        if socket.AF_INET in by_family:
            found.append((name, socket.AF_INET, by_family[socket.AF_INET]))
        if socket.AF_INET6 in by_family:
            found.append((name, socket.AF_INET6, str(socket.if_nametoindex(name))))
    return found


def round_trip(family: int, own: str) -> str | None:
    """Send to the group of mDNS over one interface and listen there: what went wrong, None when it came back."""
    label = f"pyfleet-doctor-{secrets.token_hex(8)}"
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as ear, socket.socket(family, socket.SOCK_DGRAM) as mouth:
            _join(ear, family, own)
            _aim(mouth, family, own)
            for _ in range(ATTEMPTS):
                try:
                    mouth.sendto(question(label), (GROUPS[family], PORT))
                except PermissionError:
                    return "a firewall of this machine drops what is sent to the group (output)"
                if _hears(ear, label):
                    return None
    except OSError as error:
        return f"{GROUPS[family]} port {PORT}: {error.strerror}"
    return "what is sent to the group does not come back: a firewall of this machine drops it (input, or later in output)"


def question(label: str) -> bytes:
    """An mDNS query for the address of label.local, which does not exist."""
    name = b"".join(struct.pack("B", len(part)) + part for part in (label.encode(), b"local")) + b"\0"
    return struct.pack("!6H", 0, 0, 1, 0, 0, 0) + name + struct.pack("!2H", 1, 1)


def _join(ear, family, own):
    ear.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    with contextlib.suppress(AttributeError, OSError):      # macOS wants this one where mDNSResponder listens, too
        ear.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    group = socket.inet_pton(family, GROUPS[family])
    if family == socket.AF_INET:
        ear.bind(("", PORT))
        ear.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, group + socket.inet_aton(own))
    else:
        ear.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        ear.bind(("", PORT))
        ear.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, group + struct.pack("@I", int(own)))


def _aim(mouth, family, own):
    if family == socket.AF_INET:
        mouth.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(own))
        mouth.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_LOOP, 1)
        mouth.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, 255)
    else:
        mouth.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, struct.pack("@I", int(own)))
        mouth.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_LOOP, 1)
        mouth.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, 255)


def _hears(ear, label):
    until = time.monotonic() + PATIENCE_S
    while select.select([ear], [], [], max(0.0, until - time.monotonic()))[0]:
        if label.encode() in ear.recv(9000):
            return True
    return False
