"""P2: connections between ranks that have proved to each other who they are and what the connection is for."""
from __future__ import annotations

import contextlib
import errno
import logging
import selectors
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from pyfleet.errors import AuthFailed, NotEnoughPeers
from pyfleet.identity import Initiator, Namespace, NodeKey, Purpose, Responder, Session, Throttle, peer_id, short_id
from pyfleet.metrics import CONNECTION_ATTEMPTS, CONNECTIONS_REFUSED, HANDSHAKE_FAILURES

MOST_GUESTS = 64        # connections that have not shown a valid hello yet: about 1 KB and a descriptor each
BACKLOG = 1024          # a member's connection waits behind what strangers have opened; the kernel takes what it allows
_FULL = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

log = logging.getLogger("pyfleet.links")


class Deadline:
    """A point in time that the steps of a meeting share."""

    def __init__(self, seconds: float):
        self.seconds, self.end = seconds, time.monotonic() + seconds

    def left(self) -> float:
        """Seconds until then, never negative."""
        return max(0.0, self.end - time.monotonic())


@dataclass(frozen=True)
class Credentials:
    """Who this rank is, and to what it belongs.

    Attributes:
        meeting: 16 bytes that the ranks of this run have in common.
        epoch, group: the view and the group that the connections are for.
    """

    key: NodeKey
    namespace: Namespace
    meeting: bytes
    rank: int
    epoch: int = 0
    group: int = 0


class Proven(NamedTuple):
    """A connection after its handshake; the socket is blocking or not, as it comes."""

    sock: socket.socket
    session: Session


class Address(NamedTuple):
    """Where a rank listens, and which node it must be."""

    hosts: list[str]
    port: int
    node: bytes


def dial(own: Credentials, peer: int, where: Address, wants: Mapping[int, int], *, num_attempts: int, patience_s: float,
         deadline: Deadline) -> dict[int, Proven]:
    """One proven connection of each kind to a rank that listens.

    Args:    wants: {kind: sum of the ciphers offered for it}.
             num_attempts: rounds over all its addresses; patience_s: for one attempt, handshake included.
    Raises:  NotEnoughPeers when nobody answers, AuthFailed when who answered would not do, naming the last reason.
    """
    found: dict[int, Proven] = {}
    try:
        for kind, offers in wants.items():
            purpose = Purpose(kind, own.rank, peer, own.epoch, own.group, own.meeting)
            found[kind] = _dial_one(own, purpose, offers, where, num_attempts, patience_s, deadline)
    except BaseException:
        for proven in found.values():
            proven.sock.close()
        raise
    return found


def _dial_one(own, purpose, offers, where, num_attempts, patience_s, deadline):
    problem: Exception = NotEnoughPeers("it has no address")
    for attempt in range(num_attempts):
        time.sleep(min(0.1 * attempt, deadline.left()))
        for host in where.hosts:
            patience = Deadline(max(min(deadline.left(), patience_s), 0.001))
            try:
                sock = socket.create_connection((host, where.port), timeout=patience.left())
            except OSError as error:
                problem = NotEnoughPeers(f"{host}:{where.port}: {error.strerror or error}")
                CONNECTION_ATTEMPTS.inc(outcome="unreachable")
                continue
            outcome = "unreachable"
            try:
                initiator = Initiator(own.key, own.namespace, purpose, offers, where.node)
                session, outcome = _greet(sock, initiator, patience), "connected"
                return Proven(sock, session)
            except AuthFailed as error:
                outcome = "refused"
                HANDSHAKE_FAILURES.inc(side="dialled")
                problem = AuthFailed(f"{host}:{where.port}: {error}")
            except TimeoutError:
                problem = NotEnoughPeers(f"{host}:{where.port} was silent for {patience.seconds:.3g} s")
            except OSError as error:
                problem = NotEnoughPeers(f"{host}:{where.port}: {error.strerror or error}")
            finally:
                CONNECTION_ATTEMPTS.inc(outcome=outcome)
            sock.close()
    raise type(problem)(f"no connection to rank {purpose.to_rank} in {num_attempts} attempts; the last: {problem}")


def _greet(sock, initiator, patience):
    """The initiator's side of the handshake over a blocking socket."""
    sock.settimeout(max(patience.left(), 0.001))
    sock.sendall(initiator.hello)
    while initiator.session is None:
        sock.settimeout(max(patience.left(), 0.001))
        try:
            data = sock.recv(initiator.wants)
        except ConnectionResetError:
            data = b""
        if not data:
            raise AuthFailed("it hung up in the handshake: its PSK, namespace, version or encryption is another")
        sock.sendall(initiator.receive(data))
    return initiator.session


def accept(own: Credentials, listener: socket.socket, admits: Mapping[tuple[int, int], int], nodes: Mapping[int, bytes],
           friends: set[str], *, patience_s: float, deadline: Deadline) -> dict[tuple[int, int], Proven]:
    """The proven connections that other ranks make to this one.

    Strangers cost little and delay nobody: they get no answer, their memory and number are bounded, and an address that
    keeps failing is not listened to for a while, unless a member lives there.

    Args:    admits: {(kind, rank): sum of ciphers}: all of these are awaited.  nodes: {rank: its node's public key}.
             friends: addresses that members have said are theirs.  patience_s: for one handshake.
    Returns: {(kind, rank): connection}.
    Raises:  NotEnoughPeers at the deadline, naming who is missing and why the last one was turned away.
    """
    with _Hall(own, listener, admits, nodes, friends, patience_s) as hall:
        while hall.admits:
            hall.wait(deadline.left())
            if hall.admits and not deadline.left():
                missing = sorted({rank for _, rank in hall.admits})
                refused = (f"; {hall.num_refused} connections were refused, the last from {hall.last_refusal}"
                           if hall.num_refused else "")
                raise NotEnoughPeers(f"ranks {missing} did not connect within {deadline.seconds:g} s{refused}")
        return hall.release()


class _Guest(NamedTuple):
    sock: socket.socket
    address: str
    responder: Responder
    until: float


class _Hall:
    """Connections on their way from the listener to being proven."""

    def __init__(self, own, listener, admits, nodes, friends, patience_s):
        self.own, self.listener, self.admits, self.nodes = own, listener, dict(admits), nodes
        self.friends, self.patience_s = friends, patience_s
        self.most_proving = 2 * len(self.admits) + 16           # a replayed hello gets as far as this, and no further
        self.strangers, self.proving = {}, {}                   # socket -> _Guest, the oldest first
        self.proven, self.throttle = {}, Throttle()
        self.num_refused, self.last_refusal = 0, ""
        self.selector = selectors.DefaultSelector()

    def __enter__(self):
        self.listener.setblocking(False)
        self.selector.register(self.listener, selectors.EVENT_READ)
        return self

    def __exit__(self, *_):
        for guests in (self.strangers, self.proving):
            while guests:
                self._drop(next(iter(guests)))
        for proven in self.proven.values():
            proven.sock.close()
        self.selector.close()

    def release(self):
        """The proven connections; they are the caller's from here on."""
        proven, self.proven = self.proven, {}
        return proven

    def wait(self, most_s):
        """Serve what happens within most_s seconds, at least once."""
        now = time.monotonic()
        oldest = [next(iter(guests.values())) for guests in (self.strangers, self.proving) if guests]
        for key, _ in self.selector.select(max(0.0, min([most_s, *(guest.until - now for guest in oldest)]))):
            if key.fileobj is self.listener:
                self._open_door()
            elif guest := self.strangers.get(key.fileobj) or self.proving.get(key.fileobj):
                self._hear(guest)
        now = time.monotonic()
        for guests in (self.strangers, self.proving):
            while guests and next(iter(guests.values())).until <= now:
                self._turn_away("silent", next(iter(guests)))

    def _open_door(self):
        for _ in range(MOST_GUESTS):                            # then look after those inside
            try:
                sock, (address, *_) = self.listener.accept()
            except OSError as error:
                if error.errno in _FULL:
                    if not (guests := self.strangers or self.proving):
                        raise
                    self._turn_away("crowded", next(iter(guests)))
                return
            now = time.monotonic()
            if address not in self.friends and not self.throttle.allows(address, now):
                self._turn_away("throttled", sock)
                continue
            if len(self.strangers) >= MOST_GUESTS:
                self._turn_away("crowded", next(iter(self.strangers)))
            sock.setblocking(False)
            responder = Responder(self.own.key, self.own.namespace, self.admits, to_rank=self.own.rank,
                                  epoch=self.own.epoch, group=self.own.group, meeting=self.own.meeting)
            self.strangers[sock] = _Guest(sock, address, responder, now + self.patience_s)
            self.selector.register(sock, selectors.EVENT_READ)

    def _hear(self, guest):
        try:
            data = guest.sock.recv(guest.responder.wants)
            reply = guest.responder.receive(data) if data else b""
            if reply:
                self._say(guest, reply)
                self.proving[guest.sock] = self.strangers.pop(guest.sock)
                if len(self.proving) > self.most_proving:
                    self._turn_away("crowded", next(iter(self.proving)))
            elif not data:
                self._drop(guest.sock)
            elif guest.responder.session is not None:
                self._let_in(guest)
        except AuthFailed as error:
            self._refuse(guest, str(error))
        except BlockingIOError:
            return
        except OSError:
            self._drop(guest.sock)

    def _let_in(self, guest):
        session = guest.responder.session
        place = session.purpose.kind, session.purpose.from_rank
        if place not in self.admits:
            raise AuthFailed(f"rank {place[1]} has connected already")
        if self.nodes[place[1]] != session.peer:
            raise AuthFailed(f"rank {place[1]} is on node {short_id(peer_id(self.nodes[place[1]]))}, "
                             f"but node {short_id(session.peer_id)} says it is that rank")
        self._say(guest, guest.responder.welcome())
        self.selector.unregister(guest.sock)
        del self.proving[guest.sock], self.admits[place]
        self.proven[place] = Proven(guest.sock, session)

    @staticmethod
    def _say(guest, message):
        if guest.sock.send(message) != len(message):            # into an empty buffer: no member arranges that
            raise AuthFailed("the peer takes no answer")

    def _refuse(self, guest, why):
        level = logging.WARNING if self.throttle.allows(guest.address, time.monotonic()) else logging.DEBUG
        log.log(level, "rank %d refused a connection from %s: %s", self.own.rank, guest.address, why)
        self.num_refused, self.last_refusal = self.num_refused + 1, f"{guest.address}: {why}"
        self.throttle.failed(guest.address, time.monotonic())
        HANDSHAKE_FAILURES.inc(side="accepted")
        self._turn_away("handshake", guest.sock)

    def _turn_away(self, reason, sock):
        CONNECTIONS_REFUSED.inc(reason=reason)
        self._drop(sock)

    def _drop(self, sock):
        self.strangers.pop(sock, None)
        self.proving.pop(sock, None)
        with contextlib.suppress(KeyError):
            self.selector.unregister(sock)
        sock.close()
