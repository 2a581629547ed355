"""What an interface is made of, on Linux and macOS, and which one leads to an address."""
import socket
import sys

import psutil
import pytest

from pyfleet import interfaces as module
from pyfleet.interfaces import Interface, darwin_medium, hardware_ports, linux_medium, medium_of, sysfs_facts, way_to
from tests.network import inside

# The format of networksetup(8), with devices of our own.
PORTS = """
Hardware Port: Ethernet
Device: en0
Ethernet Address: 02:00:00:00:00:01

Hardware Port: Wi-Fi
Device: en1
Ethernet Address: 02:00:00:00:00:02

Hardware Port: Thunderbolt Bridge
Device: bridge0
Ethernet Address: 02:00:00:00:00:03

Hardware Port: Thunderbolt 1
Device: en2
Ethernet Address: 02:00:00:00:00:04

Hardware Port: Thunderbolt Ethernet Slot 2
Device: en5
Ethernet Address: 02:00:00:00:00:05

Hardware Port: USB 10/100/1000 LAN
Device: en7
Ethernet Address: N/A

VLAN Configurations
===================
"""


@pytest.mark.feature("M3", "M16")
@pytest.mark.parametrize(("name", "medium"), [
    ("lo0", "loopback"), ("en0", "ethernet"), ("en1", "wifi"), ("bridge0", "thunderbolt"), ("en2", "thunderbolt"),
    ("en5", "ethernet"), ("en7", "ethernet"), ("utun3", "virtual"), ("awdl0", "virtual"), ("bridge100", "virtual"),
    ("en9", "virtual"),
])
def test_the_media_of_macos(name, medium):
    assert darwin_medium(name, hardware_ports(PORTS)) == medium


@pytest.mark.parametrize(("name", "medium"), [("lo0", "loopback"), ("bridge0", "thunderbolt"), ("en0", "unknown"),
                                              ("utun0", "virtual")])
def test_the_media_of_a_macos_that_does_not_tell(name, medium):
    assert darwin_medium(name, hardware_ports("")) == medium


def test_ports_without_a_device_are_none():
    assert hardware_ports("Hardware Port: Bluetooth PAN\nDevice:\n\nHardware Port: X: Y\nDevice: en3\n") == {"en3": "X: Y"}


def sysfs(root, **devices):
    """A /sys/class/net of {name: (type, driver or None, extra entries)}."""
    for name, (hardware, driver, extra) in devices.items():
        (root / name).mkdir()
        (root / name / "type").write_text(f"{hardware}\n")
        if driver:
            target = root / "drivers" / driver
            target.mkdir(parents=True, exist_ok=True)
            (root / name / "device").mkdir()
            (root / name / "device" / "driver").symlink_to(target)
        for entry in extra:
            (root / name / entry).mkdir()
    return root


@pytest.mark.feature("M3", "M16")
def test_the_media_of_linux(tmp_path):
    root = sysfs(
        tmp_path, lo=(772, None, ()), eth0=(1, "e1000e", ()), wlan0=(1, "iwlwifi", ("wireless", "phy80211")),
        wlan1=(1, "ath12k", ("phy80211",)), thunderbolt0=(1, "thunderbolt-net", ()), tb1=(1, "thunderbolt_net", ()),
        tun0=(65534, None, ()), veth9=(1, None, ()), docker0=(1, None, ("bridge", "lower_veth9")), empty=(1, None, ("bridge",)),
        br0=(1, None, ("bridge", "lower_eth0", "lower_veth9")), bond0=(1, None, ("lower_eth0", "lower_thunderbolt0")),
        vlan7=(1, None, ("lower_br0",)), ap0=(1, None, ("bridge", "lower_wlan0")), ib0=(32, "mlx5_core", ()),
        tap0=(1, "tun", ()), loop=(1, None, ("lower_loop",)))
    media = {name: module.classify_linux(sysfs_facts(name, root)) for name in
             sorted(path.name for path in root.iterdir() if path.name != "drivers")}
    assert media == {
        "lo": "loopback", "eth0": "ethernet", "wlan0": "wifi", "wlan1": "wifi", "thunderbolt0": "thunderbolt",
        "tb1": "thunderbolt", "tun0": "virtual", "veth9": "virtual", "docker0": "virtual", "empty": "virtual", "br0": "ethernet",
        "bond0": "thunderbolt", "vlan7": "ethernet", "ap0": "wifi", "ib0": "unknown", "tap0": "virtual", "loop": "virtual"}


def test_a_device_that_is_gone_is_unknown(tmp_path):
    assert module.classify_linux(sysfs_facts("eth7", tmp_path)) == "unknown"


def test_the_interfaces_of_this_machine():
    found = {each.name: each for each in module.interfaces()}
    (loopback,) = [each for each in found.values() if each.medium == "loopback"]
    assert "127.0.0.1" in loopback.addresses
    assert set(found) <= {name for name, stats in psutil.net_if_stats().items() if stats.isup}
    for each in found.values():
        assert each.medium in module.MEDIA
        assert len(each.addresses) == len(each.prefixes) > 0
        for address in each.addresses:
            assert each.reaches(address)
            assert medium_of(address, [each]) == each.medium


def seen_by_a_host():
    return {each.name: (each.medium, each.addresses) for each in module.interfaces()}, linux_medium("eth0")


@pytest.mark.skipif(sys.platform != "linux", reason="network namespaces are Linux's")
def test_a_namespace_is_not_mistaken_for_the_one_that_sysfs_shows(network):
    hosts = network(1)
    found, medium = inside(hosts.namespace(0), seen_by_a_host)
    assert medium == "virtual"                      # a veth, whatever the eth0 of the machine is
    assert found["lo"][0] == "loopback"
    assert found["eth0"][0] == "virtual"
    assert found["eth0"][1][0] == hosts.address(0)


CABLE = Interface("eth0", "ethernet", ("10.0.0.7", "fe80::7%eth0", "fd00::7"), (24, 64, 64), 1500, 1000)
RADIO = Interface("wlan0", "wifi", ("10.0.1.7", "10.0.0.8"), (24, 24), 1500)
DOCKER = Interface("docker0", "virtual", ("172.17.0.1",), (16,), 1500)
THERE = [DOCKER, RADIO, CABLE]


@pytest.mark.parametrize(("address", "name"), [
    ("10.0.0.99", "eth0"),              # both reach it: the cable is the better one
    ("10.0.1.99", "wlan0"), ("172.17.3.4", "docker0"), ("fd00::99", "eth0"), ("fe80::99%eth0", "eth0"),
    ("fe80::99%wlan0", None), ("10.0.2.1", None), ("2001:db8::1", None), ("no address", None), ("", None),
])
def test_the_way_to_an_address(address, name):
    found = way_to(address, THERE)
    assert (found and found.name) == name


@pytest.mark.parametrize(("address", "medium"), [("10.0.0.7", "ethernet"), ("10.0.0.8", "wifi"), ("fe80::7%eth0", "ethernet"),
                                                 ("fe80::7", "ethernet"), ("10.0.0.9", "unknown")])
def test_the_medium_of_an_own_address(address, medium):
    assert medium_of(address, THERE) == medium


def test_odd_speeds_scopes_and_masks():
    assert module._speed(0) is module._speed(4294967295) is module._speed(-1) is None
    assert module._speed(2500) == 2500
    assert module._scoped("fe80::1", "en0") == module._scoped("fe80::1%en0", "en0") == "fe80::1%en0"
    assert module._scoped("fd00::1", "en0") == "fd00::1"
    assert module._prefix("255.255.254.0", socket.AF_INET) == 23
    for mask in ("ffff:ffff:ffff:ffff::", "ffff:ffff:ffff:ffff::/64"):
        assert module._prefix(mask, socket.AF_INET6) == 64
    assert (module._prefix(None, socket.AF_INET), module._prefix(None, socket.AF_INET6)) == (32, 128)
