"""P5: which interfaces there are, and which one this machine would reach the others through."""
from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterator

from pyfleet import interfaces
from pyfleet.checks.base import FAIL, OK, WARN, Finding, Subject

ELSEWHERE = "192.0.2.1"         # RFC 5737: an address behind the default route, never anybody's


def check(subject: Subject) -> Iterator[Finding]:
    """One finding: the candidates, and the one that is preferred."""
    there, chosen = candidates(), subject.cluster.iface
    told = ", ".join(f"{each.name} ({each.medium}: {', '.join(v4(each))})" for each in there)
    if chosen is not None:
        if any(each.name == chosen for each in there):
            yield Finding("interfaces", OK, f"{chosen}, as iface says; there are {told}")
        else:
            yield Finding("interfaces", FAIL, f"iface is {chosen!r}, which is not up or has no address; there are {told or 'none'}",
                          "correct PYFLEET_IFACE, or leave it out")
        return
    if not there:
        yield Finding("interfaces", FAIL, "no interface but loopback is up and has an address",
                      "plug a cable in or join a WiFi; ranks on this machine alone work all the same")
        return
    out = leads_out()
    preferred = next((each for each in there if out in v4(each)), None)
    seen = told if preferred is None else f"{preferred.name} leads out; there are {told}"
    wired = [each.name for each in there if each.medium in (interfaces.THUNDERBOLT, interfaces.ETHERNET)]
    wireless = [each for each in there if each.medium == interfaces.WIFI]
    if preferred is not None and preferred.medium == interfaces.WIFI and wired:
        yield Finding("interfaces", WARN, seen, f"the way out is WiFi, though {wired[0]} is wired: set PYFLEET_IFACE={wired[0]} "
                                                f"if it leads to the other machines")
    elif wireless and not wired:
        yield Finding("interfaces", WARN, seen, "WiFi alone: gradients travel several times slower than over a cable")
    elif all(ipaddress.ip_address(ip).is_link_local for each in there for ip in v4(each)):
        yield Finding("interfaces", WARN, seen, "only self-assigned addresses (169.254...): right for a cable between two "
                                                "machines, else look for the DHCP server")
    else:
        yield Finding("interfaces", OK, seen)


def candidates() -> list[interfaces.Interface]:
    """The interfaces that are up and have an IPv4 address, without loopback."""
    return [each for each in interfaces.interfaces() if each.medium != interfaces.LOOPBACK and v4(each)]


def v4(interface: interfaces.Interface) -> list[str]:
    """Its IPv4 addresses."""
    return [address for address in interface.addresses if ":" not in address]


def leads_out() -> str | None:
    """The own address that packets to far away would carry; None without a default route. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect((ELSEWHERE, 9))
        except OSError:
            return None
        return sock.getsockname()[0]
