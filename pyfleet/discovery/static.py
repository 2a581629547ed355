"""P1: nodes whose addresses somebody wrote down, for networks that block multicast: static_peers, `--peer host[:port]`.

Nothing is announced and nothing is asked but the resolver. Every peer is sighted again and again, its name resolved
anew each time, so that whoever could not connect yet tries again where it is now.
"""
from __future__ import annotations

import contextlib
import heapq
import ipaddress
import logging
import socket
import threading
import time

from pyfleet.config import ClusterConfig, host_and_port
from pyfleet.discovery.base import CLOSING_S, Announcement, Belonging, Discovery, Notify, Seen
from pyfleet.members import Sighting

DEFAULT_PORT = 52415            # of discovery_port; where that is 0 the others' is still to be named
FIRST_RETRY_S = 1.0
LONGEST_RETRY_S = 30.0          # a peer that is switched on later is found within this, plus what connecting takes
MOST_ADDRESSES = 16             # of one name

log = logging.getLogger("pyfleet.discovery")


class StaticDiscovery(Discovery):
    """The nodes at cluster.static_peers; their peer ids are not known, and they are never said to be gone."""

    def __init__(self, cluster: ClusterConfig, namespace: Belonging | None, everybody: bool = False):
        super().__init__(cluster, namespace, everybody)
        self._peers = [host_and_port(peer, cluster.discovery_port or DEFAULT_PORT) for peer in cluster.static_peers]
        self._notify: Notify = None
        self._thread: threading.Thread | None = None
        self._lock = threading.Condition()
        self._due: list[tuple[float, float, str, int]] = []     # heap of (when, pause after that, host, port)
        self._troubled: set[str] = set()                        # hosts whose names did not resolve the last time
        self._telling = threading.Lock()                        # events one at a time
        self._closed = False

    def start(self, announcement: Announcement | None, notify: Notify) -> None:
        """As the contract says; there is nothing to announce."""
        self._refuse_without_namespace(announcement)
        self._notify = notify
        now = time.monotonic()
        self._due = [(now, FIRST_RETRY_S, host, port) for host, port in self._peers]
        self._thread = threading.Thread(target=self._serve, name="pyfleet-static-peers", daemon=True)
        self._thread.start()

    def update(self, announcement: Announcement) -> None:
        """Nothing is announced, so nothing changes."""

    def close(self) -> None:
        """As the contract says. A resolver that is still asking ends by itself and is not heard."""
        with self._lock:
            self._closed = True
            self._lock.notify_all()
        if self._thread not in (None, threading.current_thread()):
            self._thread.join(CLOSING_S)

    def _serve(self) -> None:
        """Sight every peer when it is due; names are left to threads, for a resolver may take its time."""
        while True:
            with self._lock:
                while not self._closed and (not self._due or self._due[0][0] > time.monotonic()):
                    self._lock.wait(self._due[0][0] - time.monotonic() if self._due else None)
                if self._closed:
                    return
                _, pause_s, host, port = heapq.heappop(self._due)
            if _is_numeric(host):
                self._sight(host, port, (host,), pause_s)
            else:
                threading.Thread(target=self._resolve, args=(host, port, pause_s), name="pyfleet-resolver",
                                 daemon=True).start()

    def _resolve(self, host: str, port: int, pause_s: float) -> None:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:        # UnicodeError: a label that no name can have
            level = logging.DEBUG if host in self._troubled else logging.WARNING
            log.log(level, "the static peer %s cannot be found yet: %s", host, getattr(error, "strerror", None) or error)
            self._troubled.add(host)
            self._sight(host, port, (), pause_s)
            return
        self._troubled.discard(host)
        self._sight(host, port, tuple(dict.fromkeys(entry[4][0] for entry in found))[:MOST_ADDRESSES], pause_s)

    def _sight(self, host: str, port: int, addresses: tuple[str, ...], pause_s: float) -> None:
        with self._telling:
            if addresses and not self._closed:
                try:
                    self._notify(Seen(Sighting(addresses, port, name=host, source="static")))
                except Exception:
                    log.exception("a sighting of %s was not taken", host)
        with self._lock:
            heapq.heappush(self._due, (time.monotonic() + pause_s, min(2 * pause_s, LONGEST_RETRY_S), host, port))
            self._lock.notify_all()


def _is_numeric(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return bool(ipaddress.ip_address(host))
    return False
