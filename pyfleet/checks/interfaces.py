"""P5: which interfaces there are, and which one this machine would reach the others through."""
from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterator
from pathlib import Path

import psutil

from pyfleet.checks.base import FAIL, OK, WARN, Finding, Subject

SYS_NET = Path("/sys/class/net")
ELSEWHERE = "192.0.2.1"         # RFC 5737: an address behind the default route, never anybody's


def check(subject: Subject) -> Iterator[Finding]:
    """One finding: the candidates, and the one that is preferred."""
    there, chosen = candidates(), subject.cluster.iface
    told = ", ".join(f"{name} ({'WiFi' if is_wireless(name) else 'wired'}: {', '.join(ips)})" for name, ips in there.items())
    if chosen is not None:
        if chosen in there:
            yield Finding("interfaces", OK, f"{chosen}, as iface says; there are {told}")
        else:
            yield Finding("interfaces", FAIL, f"iface is {chosen!r}, which is not up or has no address; there are {told or 'none'}",
                          "correct PYFLEET_IFACE, or leave it out")
        return
    if not there:
        yield Finding("interfaces", FAIL, "no interface but loopback is up and has an address",
                      "plug a cable in or join a WiFi; ranks on this machine alone work all the same")
        return
    preferred = next((name for name, ips in there.items() if leads_out() in ips), None)
    seen = told if preferred is None else f"{preferred} leads out; there are {told}"
    wired = [name for name in there if not is_wireless(name)]
    if preferred is not None and is_wireless(preferred) and wired:
        yield Finding("interfaces", WARN, seen, f"the way out is WiFi, though {wired[0]} is wired: set PYFLEET_IFACE={wired[0]} "
                                                f"if it leads to the other machines")
    elif not wired:
        yield Finding("interfaces", WARN, seen, "WiFi alone: gradients travel several times slower than over a cable")
    elif all(ipaddress.ip_address(ip).is_link_local for ips in there.values() for ip in ips):
        yield Finding("interfaces", WARN, seen, "only self-assigned addresses (169.254...): right for a cable between two "
                                                "machines, else look for the DHCP server")
    else:
        yield Finding("interfaces", OK, seen)


def candidates() -> dict[str, list[str]]:
    """{name: IPv4 addresses} of the interfaces that are up, without loopback."""
    stats, found = psutil.net_if_stats(), {}
    for name, entries in sorted(psutil.net_if_addrs().items()):
        ips = [entry.address for entry in entries if entry.family == socket.AF_INET and not entry.address.startswith("127.")]
        if ips and name in stats and stats[name].isup:
            found[name] = ips
    return found


def is_wireless(name: str) -> bool:
    """Whether an interface is a radio, as far as Linux tells."""
    return (SYS_NET / name / "wireless").exists()


def leads_out() -> str | None:
    """The own address that packets to far away would carry; None without a default route. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect((ELSEWHERE, 9))
        except OSError:
            return None
        return sock.getsockname()[0]
