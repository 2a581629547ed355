"""P0: the network interfaces of this machine, what each of them is made of, and which one leads to an address."""
from __future__ import annotations

import array
import contextlib
import ipaddress
import re
import socket
import struct
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

LOOPBACK, THUNDERBOLT, ETHERNET = "loopback", "thunderbolt", "ethernet"
WIFI, VIRTUAL, UNKNOWN = "wifi", "virtual", "unknown"
# The order is that of preference where nothing was measured. Virtual ones (of containers and virtual machines, tunnels)
# often lead nowhere but into this machine itself.
MEDIA = (LOOPBACK, THUNDERBOLT, ETHERNET, WIFI, VIRTUAL, UNKNOWN)

SYS_NET = Path("/sys/class/net")
ARPHRD_ETHER, ARPHRD_LOOPBACK = 1, 772              # linux/if_arp.h
SIOCETHTOOL, ETHTOOL_GDRVINFO = 0x8946, 3           # linux/sockios.h, linux/ethtool.h
DRVINFO_BYTES = 196                                 # struct ethtool_drvinfo: command, driver[32], ...
VIRTUAL_DRIVERS = {"veth", "tun", "bridge", "bonding", "dummy", "macvlan", "ipvlan", "vxlan", "wireguard",
                   "openvswitch"}
ASK_S = 5.0                                         # networksetup answers in 50 ms, and in seconds after a wake-up


@dataclass(frozen=True)
class Interface:
    """One that is up and has an address.

    Attributes:
        medium:     one of MEDIA.
        addresses:  IPv4 and IPv6; link-local ones with their scope ("fe80::1%eth0").
        prefixes:   the length of each address's network prefix, in bits.
        speed_mbps: what it calls itself, in Mbit/s; None where it does not say (WiFi, most virtual ones).
    """

    name: str
    medium: str
    addresses: tuple[str, ...]
    prefixes: tuple[int, ...]
    mtu: int
    speed_mbps: int | None = None

    def reaches(self, address: str) -> bool:
        """Whether an address lies in a network of this interface, so that no router is in between."""
        wanted, _, scope = address.partition("%")
        ip = _parsed(wanted)
        if ip is None or (scope and scope not in (self.name, str(_index(self.name)))):
            return False
        return any(ip in ipaddress.ip_network((own.partition("%")[0], prefix), strict=False)
                   for own, prefix in zip(self.addresses, self.prefixes, strict=True))


def interfaces() -> list[Interface]:
    """The interfaces that are up and have an IP address, by name."""
    stats, found = psutil.net_if_stats(), []
    ports = hardware_ports(_networksetup()) if sys.platform == "darwin" else {}
    for name, entries in sorted(psutil.net_if_addrs().items()):
        ips = [(_scoped(entry.address, name), _prefix(entry.netmask, entry.family)) for entry in entries
               if entry.family in (socket.AF_INET, socket.AF_INET6)]
        if name not in stats or not stats[name].isup or not ips:
            continue
        if sys.platform == "linux":
            medium = linux_medium(name)
        elif sys.platform == "darwin":
            medium = darwin_medium(name, ports)
        else:
            medium = LOOPBACK if name.startswith("lo") else UNKNOWN
        found.append(Interface(name, medium, *zip(*ips, strict=True), stats[name].mtu, _speed(stats[name].speed)))
    return found


def way_to(address: str, there: Iterable[Interface]) -> Interface | None:
    """The interface in whose network an address lies, the best medium first; None when it lies behind a router."""
    found = [each for each in there if each.reaches(address)]
    return min(found, key=lambda each: MEDIA.index(each.medium), default=None)


def medium_of(address: str, there: Iterable[Interface]) -> str:
    """The medium of the interface that has this own address; UNKNOWN when none has."""
    wanted = address.partition("%")[0]
    return next((each.medium for each in there if wanted in (own.partition("%")[0] for own in each.addresses)), UNKNOWN)


def reachable(there: Iterable[Interface]) -> list[str]:
    """The addresses of these interfaces at which other machines may find this one: the best medium first, IPv4 before IPv6;
    those of the loopback only where there is nothing else. IPv6 addresses that mean something on one link only are left out.
    """
    found = [(each.medium == LOOPBACK, MEDIA.index(each.medium), ":" in address, address)
             for each in there for address in each.addresses if "%" not in address]
    outside = [entry for entry in found if not entry[0]]
    return [address for *_, address in sorted(outside or found)]


# ---- Linux -----------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class LinuxFacts:
    """What the kernel says of a device.

    Attributes:
        hardware: ARPHRD_ETHER, ARPHRD_LOOPBACK or another type of linux/if_arp.h; None when it can not be told.
        driver:   its name, "" when it has none.
        wireless: whether it has a radio.
        physical: whether there is hardware behind it.
        lower:    the facts of the devices that it is made of: ports of a bridge, members of a bond, the base of a VLAN.
    """

    hardware: int | None = None
    driver: str = ""
    wireless: bool = False
    physical: bool = False
    lower: tuple[LinuxFacts, ...] = field(default=())


def classify_linux(facts: LinuxFacts) -> str:
    """The medium: that of the hardware at the bottom, the best of it where there is more."""
    if facts.hardware == ARPHRD_LOOPBACK:
        return LOOPBACK
    if facts.wireless:
        return WIFI
    if facts.driver.replace("_", "-").startswith("thunderbolt"):
        return THUNDERBOLT
    below = [medium for medium in map(classify_linux, facts.lower) if medium != VIRTUAL]
    if below:
        return min(below, key=MEDIA.index)
    if facts.physical and facts.driver not in VIRTUAL_DRIVERS:
        return ETHERNET if facts.hardware == ARPHRD_ETHER else UNKNOWN
    return VIRTUAL if facts.hardware is not None or facts.driver in VIRTUAL_DRIVERS else UNKNOWN


def linux_medium(name: str) -> str:
    """The medium of a device of the calling thread's network namespace."""
    if read_int(SYS_NET / name / "ifindex") == _index(name):
        return classify_linux(sysfs_facts(name))
    # /sys shows the namespace in which it was mounted, which is another one here; ethtool always asks the own one.
    driver = _ethtool_driver(name)
    if name == "lo":
        return LOOPBACK
    return classify_linux(LinuxFacts(ARPHRD_ETHER if driver else None, driver, physical=driver not in VIRTUAL_DRIVERS))


def sysfs_facts(name: str, root: Path = SYS_NET, depth: int = 4) -> LinuxFacts:
    """What /sys/class/net says of a device, and of what it is made of down to a depth: a VLAN on a bond in a bridge."""
    here, driver = root / name, ""
    with contextlib.suppress(OSError):
        driver = (here / "device" / "driver").resolve(strict=True).name
    if (here / "bridge").is_dir():
        driver = "bridge"
    below = sorted(path.name.removeprefix("lower_") for path in here.glob("lower_*")) if depth else []
    return LinuxFacts(read_int(here / "type"), driver, _is_wireless(here), (here / "device").exists(),
                      tuple(sysfs_facts(each, root, depth - 1) for each in below))


def _is_wireless(here: Path) -> bool:
    return (here / "wireless").exists() or (here / "phy80211").exists()


def read_int(path: Path) -> int | None:
    """The number in a file; None when there is none."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _ethtool_driver(name: str) -> str:
    """The driver as SIOCETHTOOL tells it; "" when it does not."""
    import fcntl
    info = array.array("B", struct.pack("I", ETHTOOL_GDRVINFO) + bytes(DRVINFO_BYTES - 4))
    request = struct.pack("16sP16x", name.encode(), info.buffer_info()[0])
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            fcntl.ioctl(sock, SIOCETHTOOL, request)
    except OSError:
        return ""
    return info[4:36].tobytes().partition(b"\0")[0].decode(errors="replace")


# ---- macOS -----------------------------------------------------------------------------------------------------------

def hardware_ports(text: str) -> dict[str, str]:
    """{device: name of its port} out of what `networksetup -listallhardwareports` prints."""
    ports, port = {}, ""
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if colon and key.strip() == "Hardware Port":
            port = value.strip()
        elif colon and key.strip() == "Device" and value.strip():
            ports[value.strip()] = port
    return ports


def darwin_medium(name: str, ports: dict[str, str]) -> str:
    """The medium of a device of macOS. ports: as hardware_ports(); {} where they are not known."""
    if re.fullmatch(r"lo\d+", name):
        return LOOPBACK
    port = ports.get(name)
    if port is None:
        if name == "bridge0":                       # the one that macOS makes of the Thunderbolt ports
            return THUNDERBOLT
        # Ports that nobody plugs anything into: tunnels (utun), AirDrop (awdl, llw), bridges of virtual machines.
        return UNKNOWN if re.fullmatch(r"en\d+", name) and not ports else VIRTUAL
    if re.search(r"wi-?fi|airport", port, re.IGNORECASE):
        return WIFI
    # "Thunderbolt Bridge", "Thunderbolt 1"; but an adapter is a "Thunderbolt Ethernet", and so is its speed.
    if port.startswith("Thunderbolt") and "Ethernet" not in port:
        return THUNDERBOLT
    return ETHERNET


def _networksetup() -> str:
    try:
        return subprocess.run(["networksetup", "-listallhardwareports"], capture_output=True, text=True, timeout=ASK_S,
                              check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


# ---- addresses -------------------------------------------------------------------------------------------------------

def _parsed(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(text)
    return None


def _index(name: str) -> int | None:
    with contextlib.suppress(OSError):
        return socket.if_nametoindex(name)
    return None


def _scoped(address: str, name: str) -> str:
    ip = _parsed(address.partition("%")[0])
    local = ip is not None and ip.version == 6 and ip.is_link_local
    return f"{address}%{name}" if local and "%" not in address else address


def _prefix(netmask: str | None, family: int) -> int:
    """The length of a prefix out of its mask; a single address's where there is none."""
    bits = 32 if family == socket.AF_INET else 128
    mask = _parsed((netmask or "").partition("/")[0])
    return bits if mask is None else int(mask).bit_count()


def _speed(told: int) -> int | None:
    return told if 0 < told < 10_000_000 else None      # 2^32-1 and the like stand for "not known"
