"""A network of hosts on one machine: namespaces, a bridge, shaped links, losses, cuts, delays. Linux, root.

    with Network(4, "1gbit") as network:
        network.set_rate(3, "100mbit")
        results = network.ranks(per_host=2).run(function, 10)       # as tests.ranks.Ranks

Host k is a network namespace with lo and eth0 (10.77.0.<k+1>), one end of a veth pair; the other end, p<k>, is a port of
a bridge in one more namespace, the switch. Both ends are shaped by tbf. Nothing outside these namespaces is touched.
"""
from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

from tests.faults import Relay
from tests.ranks import Ranks

NAMESPACES = Path("/run/netns")             # where iproute2 keeps the names
NAME = re.compile(r"pyfleet-(\d+)-\d+-(\w+)")       # pid of the owner, number of the network, host<k> or switch
SUBNET = "10.77.0"
MASTER_PORT = 29500
BURST_BYTES = 80 << 10          # the largest packet that TCP hands down (64 KB, and 45 headers) must fit, or tbf cuts it up
BURST_S = 1e-3                  # and a timer that is late by less must not cost rate; of 20 MB at 1 Gbit/s this is 0.6 %
QUEUE_BYTES = 1 << 20           # of a switch port, as in small switches: 8 ms at 1 Gbit/s
FRAME_BYTES, HEADER_BYTES = 14, 52      # Ethernet around a packet; IP and TCP with time stamps in it
RELAY_MARK = 0x77               # connections of a relay, which must not be sent to it again
CLONE_NEWNET = 0x40000000
SO_ORIGINAL_DST = 80

_numbers = itertools.count()


class NetworkError(RuntimeError):
    """A command that builds the network failed; the message has its own words."""


@functools.cache
def unavailable() -> str | None:
    """Why there can be no Network here; None when there can."""
    if sys.platform != "linux":
        return "network namespaces are Linux's"
    if os.geteuid() != 0:
        return "network namespaces need root"
    if missing := [tool for tool in ("ip", "tc", "nft", "nsenter") if not shutil.which(tool)]:
        return f"not installed: {', '.join(missing)} (iproute2, nftables, util-linux)"
    try:
        with Network(1, "1gbit") as network:
            network.lose(0, 0.5)
    except (NetworkError, OSError) as error:
        return f"not permitted here: {error}"
    return None


def bits_per_s(rate: str) -> float:
    """tc's way to write a rate: "1gbit" is 1e9, "2.5mbit" 2.5e6."""
    number, unit = re.fullmatch(r"([\d.]+)([kmg]?)bit", rate).groups()
    return float(number) * {"": 1, "k": 1e3, "m": 1e6, "g": 1e9}[unit]


def inside(namespace: str | Path, function, *args):
    """function(*args), called by a thread inside a network namespace; sockets made there stay there."""
    with ThreadPoolExecutor(1, initializer=enter, initargs=(namespace,)) as executor:
        return executor.submit(function, *args).result()


def enter(namespace: str | Path):
    """Move the calling thread into a network namespace. Raises OSError."""
    with open(namespace) as file:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(file.fileno(), CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"setns {namespace}")


class Network:
    """Hosts on a switch; a context manager that leaves no namespace and no process in one behind.

    Args:    rate: of every host's link, each way, in tc's words; None for as fast as it goes.
             rates: {host: rate} where it differs.  mtu: of all links.
             congestion: TCP congestion control of all connections between hosts, None for the system's own.
             offload: let TCP hand down packets of up to 64 KB, as network cards do; False makes each loss that of one
             packet of mtu bytes, for several times the CPU time.
    Raises:  NetworkError; ask unavailable() first.
    """

    def __init__(self, num_hosts: int, rate: str | None = "1gbit", *, rates: dict[int, str | None] | None = None,
                 mtu: int = 1500, queue_bytes: int = QUEUE_BYTES, congestion: str | None = "cubic", offload: bool = True):
        _remove_stale()
        prefix = f"pyfleet-{os.getpid()}-{next(_numbers)}"
        self.num_hosts, self.mtu, self.queue_bytes = num_hosts, mtu, queue_bytes
        self.switch = f"{prefix}-switch"
        self.names = [f"{prefix}-host{host}" for host in range(num_hosts)]
        self._rates: list[str | None] = [None] * num_hosts
        self._children: list = []               # what runs on the hosts: Ranks, Gateways, Popens
        self._finalizer = weakref.finalize(self, _remove, [*self.names, self.switch])
        try:
            self._build(congestion, offload)
            for host in range(num_hosts):
                self.set_rate(host, (rates or {}).get(host, rate))
        except BaseException:
            self.close()
            raise

    def _build(self, congestion, offload):
        for name in (self.switch, *self.names):
            _command("ip", "netns", "add", name)
        # Multicast goes everywhere, as on a plain switch: snooping would wait for reports that nobody sends here.
        lines = ["link add name br0 type bridge stp_state 0 mcast_snooping 0", f"link set br0 mtu {self.mtu} up"]
        for host, name in enumerate(self.names):
            lines += [f"link add p{host} mtu {self.mtu} type veth peer name eth0 mtu {self.mtu} netns {name}",
                      f"link set p{host} master br0 up"]
        _batch("ip", self.switch, lines)
        tcp = f"congctl {congestion}" if congestion else ""     # for every socket: a rival's cannot be asked to set it
        for host, name in enumerate(self.names):
            _batch("ip", name, [
                "link set lo up", f"addr add {self.address(host)}/24 brd + dev eth0",
                "link set eth0 up" + ("" if offload else " gso_max_segs 1"),
                f"route change {SUBNET}.0/24 dev eth0 src {self.address(host)} {tcp}", "route add 224.0.0.0/4 dev eth0"])
            # What one connection learnt of the path must not slow the next one.
            inside(self.namespace(host), Path("/proc/sys/net/ipv4/tcp_no_metrics_save").write_text, "1")

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()

    # ---- the links ----------------------------------------------------------------------------------------------

    def address(self, host: int) -> str:
        """The host's address on the network."""
        return f"{SUBNET}.{host + 1}"

    def namespace(self, host: int) -> str:
        """The file that stands for the host's network namespace; see setns(2), nsenter(1)."""
        return str(NAMESPACES / self.names[host])

    def set_rate(self, host: int, rate: str | None):
        """Shape the host's link, each way, from now on; None for as fast as it goes."""
        if rate is None and self._rates[host] is None:
            return
        self._rates[host] = rate
        for name, device in ((self.names[host], "eth0"), (self.switch, f"p{host}")):
            if rate is None:
                _command("tc", "-n", name, "qdisc", "del", "dev", device, "root")
            else:
                burst = max(BURST_BYTES, int(bits_per_s(rate) / 8 * BURST_S))
                _command("tc", "-n", name, "qdisc", "replace", "dev", device, "root", "tbf", "rate", rate,
                         "burst", str(burst), "limit", str(self.queue_bytes + burst))

    def bytes_per_s(self, host: int) -> float:
        """What TCP can carry over the host's link, each way, when every packet is full: the rate less all headers."""
        rate = self._rates[host]
        if rate is None:
            return float("inf")
        return bits_per_s(rate) / 8 * (self.mtu - HEADER_BYTES) / (self.mtu + FRAME_BYTES)

    def lose(self, host: int, share: float):
        """From now on lose a share (0 to 1) of the packets that the host sends, and of those that it is sent, at random."""
        drop = f"numgen random mod 100000 < {round(share * 100000)} drop"
        _nft(self.switch, f"""
            table bridge loss{host}
            delete table bridge loss{host}
            table bridge loss{host} {{
                chain passing {{
                    type filter hook forward priority 0
                    iifname p{host} {drop}
                    oifname p{host} {drop}
                }}
            }}""")

    def cut(self, host: int):
        """Take the host off the network; its addresses and its connections stay, and hear nothing."""
        _command("ip", "-n", self.switch, "link", "set", f"p{host}", "down")

    def restore(self, host: int):
        """Put a cut host back."""
        _command("ip", "-n", self.switch, "link", "set", f"p{host}", "up")

    @contextlib.contextmanager
    def partition(self, hosts: list[int]):
        """While in this context, these hosts and the others hear nothing of each other, but each side all of its own."""
        ports = ", ".join(f'"p{host}"' for host in hosts)
        others = ", ".join(f'"p{host}"' for host in range(self.num_hosts) if host not in hosts)
        _nft(self.switch, f"""
            table bridge partition {{
                chain passing {{
                    type filter hook forward priority 0
                    iifname {{ {ports} }} oifname {{ {others} }} drop
                    iifname {{ {others} }} oifname {{ {ports} }} drop
                }}
            }}""")
        try:
            yield
        finally:
            _nft(self.switch, "delete table bridge partition")

    def traffic(self, host: int) -> tuple[int, int]:
        """Bytes that the host has sent to and received from the network, headers included, as its eth0 counts them."""
        counters = inside(self.namespace(host), Path("/proc/thread-self/net/dev").read_text)
        counted = re.search(r"^\s*eth0:(.*)$", counters, re.MULTILINE)[1].split()
        return int(counted[8]), int(counted[0])

    def interpose(self, host: int, *, delay_s: float = 0.0, fault: str | None = None, after: int = 0) -> Gateway:
        """From now on pass every new TCP connection between the host and others through a relay; see Gateway."""
        gateway = Gateway(self.namespace(host), self.address(host), delay_s, fault, after)
        self._children.append(gateway)
        return gateway

    # ---- what runs on the hosts ---------------------------------------------------------------------------------

    def popen(self, host: int, argv: list[str], env: dict | None = None, **options) -> subprocess.Popen:
        """Start a program on a host. env: extra environment; options: subprocess.Popen's."""
        process = subprocess.Popen(["nsenter", f"--net={self.namespace(host)}", "--", *argv],
                                   env=os.environ | (env or {}), **options)
        self._children.append(process)
        return process

    def run(self, host: int, argv: list[str], env: dict | None = None, timeout: float = 60.0) -> str:
        """What a program on a host prints. Raises subprocess.CalledProcessError, TimeoutExpired."""
        return subprocess.run(["nsenter", f"--net={self.namespace(host)}", "--", *argv], env=os.environ | (env or {}),
                              timeout=timeout, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL).stdout

    def ranks(self, per_host: int = 1, transport: str = "auto", *, init: bool = True, env: dict | None = None) -> Ranks:
        """Ranks on all hosts: the first per_host ones on host 0, and so on; they meet where rank 0 listens."""
        meet = {"MASTER_ADDR": self.address(0), "MASTER_PORT": str(MASTER_PORT), "PYFLEET_RENDEZVOUS": "",
                "PYFLEET_IFACE": "eth0", "PYFLEET_ENCRYPTION": "off"}
        group = Ranks(per_host * self.num_hosts, transport, init=init, env=meet | (env or {}),
                      namespaces=[self.namespace(rank // per_host) for rank in range(per_host * self.num_hosts)])
        self._children.append(group)
        return group

    def close(self):
        """End what runs on the hosts and remove them. Idempotent."""
        while self._children:
            child = self._children.pop()
            if isinstance(child, subprocess.Popen):
                child.kill()
                child.communicate()
            else:
                child.close()
        self._finalizer()


class Gateway:
    """Relays every new TCP connection of a host: what it opens to others, and what others open to it.

    The peers see the addresses they expect. Connections to and from MASTER_PORT pass as they are, for the relay accepts
    before it knows whether anybody listens. Args as of tests.faults.Relay; a fault meets the bytes that go to whoever
    accepted, in every connection.
    """

    def __init__(self, namespace: str, address: str, delay_s: float, fault: str | None, after: int):
        self.namespace, self.relays, self._plan = namespace, [], (fault, after, delay_s)
        self.listener = inside(namespace, functools.partial(socket.create_server, ("", 0), backlog=128))
        port = self.listener.getsockname()[1]
        _nft(Path(namespace).name, f"""
            table ip relay {{
                chain leaving {{
                    type nat hook output priority -100
                    meta mark != {RELAY_MARK} ip daddr {SUBNET}.0/24 ip daddr != {address} tcp dport != {MASTER_PORT} redirect to :{port}
                }}
                chain coming {{
                    type nat hook prerouting priority -100
                    iifname eth0 tcp dport != {MASTER_PORT} redirect to :{port}
                }}
            }}""")
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self):
        while True:
            try:
                near = self.listener.accept()[0]
            except OSError:
                return
            try:
                _, port, address, _ = struct.unpack("!HH4s8s", near.getsockopt(socket.SOL_IP, SO_ORIGINAL_DST, 16))
                far = inside(self.namespace, socket.socket)
                far.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, RELAY_MARK)
                far.settimeout(10)
                far.connect((socket.inet_ntoa(address), port))
                far.settimeout(None)
                for sock in (near, far):
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            except OSError:
                near.close()            # nobody listens there: the one who asked learns it a little later
                continue
            self.relays.append(Relay(near, far, *self._plan))

    def close(self):
        """Cut all relayed connections and accept no more. Idempotent."""
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self._thread.join()
        for relay in self.relays:
            relay.close()


# ---- commands -----------------------------------------------------------------------------------------------------------


def _command(*argv, text=None):
    done = subprocess.run(argv, input=text, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise NetworkError(f"{' '.join(argv)}: {(done.stderr or done.stdout).strip() or done.returncode}")
    return done.stdout


def _batch(tool, namespace, lines):
    _command(tool, "-n", namespace, "-batch", "-", text="\n".join(lines))


def _nft(namespace, rules):
    _command("nsenter", f"--net={NAMESPACES / namespace}", "--", "nft", "-f", "-", text=rules)


def _remove(names):
    """Remove namespaces, and end whatever still runs in them."""
    for name in names:
        if not (NAMESPACES / name).exists():
            continue
        for pid in subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False).stdout.split():
            if int(pid) != os.getpid():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _remove_stale():
    """Remove what owners that did not live to do it have left."""
    if NAMESPACES.is_dir():
        found = [NAME.fullmatch(path.name) for path in NAMESPACES.iterdir()]
        _remove([match[0] for match in found if match and not psutil.pid_exists(int(match[1]))])
