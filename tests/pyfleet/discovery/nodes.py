"""Nodes of a test: processes that run tests.pyfleet.discovery.peer, and what they have said so far."""
import contextlib
import json
import os
import secrets
import socket
import struct
import subprocess
import sys
import threading
import time

from pyfleet.identity.namespace import Namespace
from tests.network import inside
from tests.ranks import ROOT

PATIENCE_S = 20
OURS, THEIRS = "0a" * 32, "0b" * 32         # PSKs of two namespaces, both of the name NAME
NAME = "lab"
OUR_TAG, THEIR_TAG = (Namespace.from_psk(psk, NAME).tag for psk in (OURS, THEIRS))
MDNS_PORT = 5353
ETH_P_ALL = 3
ETHERNET_BYTES = 14


def peer_id(letter):
    return letter * 52


class Node:
    """One process. `events` is everything it has printed; wait() waits for something that it will print."""

    def __init__(self, network, host, letter=None, *, kind="mdns", psk=OURS, everybody=False, cluster=None, port=52415, addresses=(),
                 incarnation=None):
        self.incarnation = incarnation or secrets.token_hex(8)
        self.peer, self.events, self._grown = letter and peer_id(letter), [], threading.Condition()
        self.announce = letter and {"peer": self.peer, "incarnation": self.incarnation, "port": port, "name": f"node-{letter}",
                                    "addresses": addresses}
        plan = {"kind": kind, "psk": psk, "name": NAME, "everybody": everybody, "cluster": cluster or {},
                "announce": self.announce}
        argv = [sys.executable, "-m", "tests.pyfleet.discovery.peer", json.dumps(plan)]
        options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "cwd": ROOT, "text": True}
        env = {"PYTHONPATH": os.pathsep.join(sys.path)}
        self.process = (network.popen(host, argv, env, **options) if network else
                        subprocess.Popen(argv, env=os.environ | env, **options))
        self._own_pipes = network is None
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _listen(self):
        for line in self.process.stdout:
            with self._grown:
                self.events.append(json.loads(line))
                self._grown.notify_all()

    def tell(self, order):
        self.process.stdin.write(order + "\n")
        self.process.stdin.flush()

    def ask(self, order, answer, timeout=PATIENCE_S):
        """Give an order, and wait for its answer."""
        since = len(self.events)
        self.tell(order)
        return self.wait(lambda event: event["event"] == answer, timeout, since=since)

    def wait(self, wanted, timeout=PATIENCE_S, since=0):
        """The first event for which wanted(event) holds, of those from number `since` on."""
        with self._grown:
            def found():
                return next((event for event in self.events[since:] if wanted(event)), None)
            self._grown.wait_for(lambda: found() is not None, timeout)
            result = found()
            assert result is not None, f"not within {timeout} s; the last events: {self.events[since:][-8:]}"
            return result

    def until(self, holds, timeout=PATIENCE_S):
        """Ask for the state until holds(state)."""
        deadline = time.monotonic() + timeout
        while not holds(state := self.ask("state", "state")):
            assert time.monotonic() < deadline, f"not within {timeout} s; the last state: {state}"

    def sees(self, other, timeout=PATIENCE_S, since=0):
        """Wait until another one is seen; the event."""
        return self.wait(lambda event: event["event"] == "seen" and event["incarnation"] == other.incarnation, timeout, since)

    def loses(self, other, timeout=PATIENCE_S, since=0):
        """Wait until another one is gone; the event."""
        return self.wait(lambda event: event["event"] == "gone" and event["incarnation"] == other.incarnation, timeout, since)

    def all(self, kind):
        """All events of a kind so far."""
        return [event for event in list(self.events) if event["event"] == kind]

    def kill(self):
        self.process.kill()
        self.process.wait()

    def close(self):
        """End the process, if it is not; the network closes the pipes of its own."""
        self.kill()
        self._listener.join()
        if self._own_pipes:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
            self.process.stdout.close()


class Capture:
    """Counts what a host sends of mDNS: packets to or from UDP port 5353, and memberships of its groups.

    A packet socket inside the host's namespace sees all that it sends, before anybody else does.
    """

    def __init__(self, network, host):
        self._socket = inside(network.namespace(host), socket.socket, socket.AF_PACKET, socket.SOCK_DGRAM,
                              socket.htons(ETH_P_ALL))
        self._socket.bind(("eth0", ETH_P_ALL))
        self._socket.settimeout(0.2)
        self.packets, self._ended = [], threading.Event()       # (when, bytes on the wire) of each
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self):
        while not self._ended.is_set():
            with contextlib.suppress(TimeoutError):
                data, (_, protocol, kind, *_) = self._socket.recvfrom(65536)
                if kind == socket.PACKET_OUTGOING and self._is_mdns(data, protocol):
                    self.packets.append((time.monotonic(), len(data) + ETHERNET_BYTES))

    @staticmethod
    def _is_mdns(data, protocol):
        if protocol == 0x0800:
            start, number = 4 * (data[0] & 15), data[9]
            if number == socket.IPPROTO_IGMP:
                return socket.inet_aton("224.0.0.251") in data
        elif protocol == 0x86DD:
            start, number = 40, data[6]
            if number == 0:                 # hop-by-hop options: a report of multicast listeners
                return socket.inet_pton(socket.AF_INET6, "ff02::fb") in data
        else:
            return False
        return number == socket.IPPROTO_UDP and MDNS_PORT in struct.unpack_from("!HH", data, start)

    def close(self):
        self._ended.set()
        self._thread.join()
        self._socket.close()
