"""Control connections between nodes: proven by the handshake, sealed, one message per record, bounded on both ends.

asyncio only; which messages mean what is for others. A record is its length (4 bytes, little endian, authenticated) and
the sealed message; the nonce is the record's number, so that none can be dropped, repeated or moved.
"""
from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass

from nacl import bindings, exceptions

from pyfleet.errors import AuthFailed, ConfigError, NotEnoughPeers
from pyfleet.identity import Initiator, Namespace, NodeKey, Purpose, Responder, Session, Throttle, ciphers, peer_id
from pyfleet.identity.handshake import Kind
from pyfleet.membership.messages import LARGEST_BYTES, Message, decode, encode
from pyfleet.metrics import CONNECTION_ATTEMPTS, CONNECTIONS_REFUSED, CONTROL_BYTES, HANDSHAKE_FAILURES

SEALED = ciphers.CHACHA20_POLY1305      # messages are small and rare: the cipher that every machine has will do
MOST_STRANGERS = 64         # connections that have not proved anything yet; the oldest goes when one more comes
MOST_QUEUED = 8 << 20       # bytes that a peer has not taken: more, and it is not reading any more
USER_TIMEOUT_MS = 8000      # the kernel gives up on unacknowledged data; health decides long before
BACKLOG = 1024
READ_AHEAD = 16 << 10       # what is read of a connection before anybody asked for it, strangers' too
_LENGTH = struct.Struct("<I")
_TAG_BYTES = bindings.crypto_aead_chacha20poly1305_ietf_ABYTES
_NO_PROOF = {errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN, errno.EHOSTDOWN}

log = logging.getLogger("pyfleet.membership")


@dataclass(frozen=True)
class Self:
    """Who this node is: what every handshake needs."""

    key: NodeKey
    namespace: Namespace


class Closed(ConnectionError):
    """The connection is over.

    Attributes:
        by_peer: the other end closed it, or its kernel did for a process that is gone; False where the way to it was lost
                 or it broke the rules.
    """

    def __init__(self, reason: str, *, by_peer: bool):
        super().__init__(reason)
        self.by_peer = by_peer


class Channel:
    """One control connection after its handshake."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, session: Session, *, dialled: bool):
        self.session, self.peer, self.dialled = session, session.peer_id, dialled
        self.bytes_sent = self.bytes_received = 0
        self._reader, self._writer = reader, writer
        self._num_sent = self._num_received = 0
        self._ended: Closed | None = None

    @property
    def address(self) -> str:
        """Where the other end is, without its port."""
        return (self._writer.get_extra_info("peername") or ("?",))[0]

    @property
    def own_address(self) -> str:
        """The address of this end."""
        return (self._writer.get_extra_info("sockname") or ("?",))[0]

    def send(self, message: Message) -> None:
        """Queue a message; it never blocks. A peer that does not take what it is sent is cut off: receive() says so.

        Raises:  ValueError for a message over the limit.
        """
        if self._ended is not None:
            return
        if self._writer.transport.get_write_buffer_size() > MOST_QUEUED:
            self._end(Closed("it does not read what it is sent", by_peer=False))
            return
        text = encode(message)
        head = _LENGTH.pack(len(text) + _TAG_BYTES)
        sealed = bindings.crypto_aead_chacha20poly1305_ietf_encrypt(text, head, _nonce(self._num_sent), self.session.send_key)
        self._num_sent += 1
        self.bytes_sent += len(head) + len(sealed)
        CONTROL_BYTES.inc(len(head) + len(sealed), direction="sent")
        self._writer.write(head + sealed)

    async def receive(self) -> Message:
        """The next message.

        Raises:  Closed.
        """
        if self._ended is not None:
            raise self._ended
        try:
            head = await self._reader.readexactly(_LENGTH.size)
            size, = _LENGTH.unpack(head)
            if not _TAG_BYTES < size <= LARGEST_BYTES + _TAG_BYTES:
                raise ValueError(f"a record of {size} bytes")
            sealed = await self._reader.readexactly(size)
            text = bindings.crypto_aead_chacha20poly1305_ietf_decrypt(sealed, head, _nonce(self._num_received),
                                                                      self.session.receive_key)
            message = decode(text)
        except asyncio.IncompleteReadError:
            raise self._end(Closed("it closed the connection", by_peer=True)) from None
        except OSError as error:
            raise self._end(Closed(_words(error), by_peer=error.errno not in _NO_PROOF)) from None
        except exceptions.CryptoError:
            raise self._end(Closed("a record was damaged or forged", by_peer=False)) from None
        except ValueError as error:
            raise self._end(Closed(f"it broke the protocol: {error}", by_peer=False)) from None
        self._num_received += 1
        self.bytes_received += _LENGTH.size + size
        CONTROL_BYTES.inc(_LENGTH.size + size, direction="received")
        return message

    def _end(self, reason: Closed) -> Closed:
        """The first reason stands; a reader that waits is woken by the end of the transport."""
        if self._ended is None:
            self._ended = reason
            self._writer.transport.abort()
        return self._ended

    async def close(self, within_s: float = 1.0) -> None:
        """Send what is queued, as far as the peer takes it in time, and hang up. Idempotent."""
        if self._ended is None:
            self._ended = Closed("it was closed here", by_peer=False)
            with contextlib.suppress(OSError, TimeoutError):
                self._writer.close()
                await asyncio.wait_for(self._writer.wait_closed(), within_s)
            self._writer.transport.abort()


def _nonce(number: int) -> bytes:
    return number.to_bytes(12, "little")


async def dial(own: Self, host: str, port: int, *, kind: int = Kind.MEMBER, expects: bytes | None = None,
               patience_s: float = 5.0, wants: Callable[[str], str | None] = lambda peer: None,
               ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, Session]:
    """Connect to a node and prove to each other who we are.

    Args:    expects: the public key the node must have; None takes any node of the namespace.
             wants: asked with the peer id of who has proved itself, before we prove ourselves: why not, or None.
    Raises:  AuthFailed, NotEnoughPeers naming the address and what is wrong.
    """
    where = f"{host}:{port}" if ":" not in host else f"[{host}]:{port}"
    initiator = Initiator(own.key, own.namespace, Purpose(kind), SEALED, expects)
    writer = None
    try:
        async with asyncio.timeout(patience_s):
            reader, writer = await asyncio.open_connection(host, port, limit=READ_AHEAD)
            _tune(writer)
            writer.write(initiator.hello)
            while initiator.session is None:
                data = await reader.read(initiator.wants)
                if not data:
                    raise AuthFailed("it hung up in the handshake: its PSK, namespace or version is another")
                reply = initiator.receive(data)
                if initiator.session is None and initiator.peer and (problem := wants(peer_id(initiator.peer))):
                    raise NotEnoughPeers(f"{where}: {problem}")
                writer.write(reply)
        CONNECTION_ATTEMPTS.inc(outcome="connected")
        return reader, writer, initiator.session
    except BaseException as error:
        if writer is not None:
            writer.transport.abort()
        is_refused = isinstance(error, (AuthFailed, ConnectionResetError))
        CONNECTION_ATTEMPTS.inc(outcome="refused" if is_refused else "unreachable")
        if is_refused:
            HANDSHAKE_FAILURES.inc(side="dialled")
        if isinstance(error, AuthFailed):
            raise AuthFailed(f"{where}: {error}") from None
        if isinstance(error, TimeoutError):
            raise NotEnoughPeers(f"{where}: silent for {patience_s:.3g} s") from None
        if isinstance(error, ConnectionResetError):
            raise AuthFailed(f"{where}: it hung up in the handshake: its PSK, namespace or version is another") from None
        if isinstance(error, OSError):
            raise NotEnoughPeers(f"{where}: {_words(error)}") from None
        raise


def _words(error: OSError) -> str:
    """The system's own words; asyncio puts others in their place."""
    return os.strerror(error.errno) if (error.errno or 0) > 0 else error.strerror or str(error)


def _tune(writer: asyncio.StreamWriter) -> None:
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT_MS)


Guest = Callable[[asyncio.StreamReader, asyncio.StreamWriter, Session], None]


class Door:
    """Listens for control connections and lets in who proves to be of the namespace.

    Strangers cost little and delay nobody: they get no answer, their number, memory and time are bounded, and an address
    that keeps failing is not listened to for a while.

    Args:    let_in: called with each proven connection, in the loop; session.purpose.kind says what it wants.
             on_refused(address, reason): called for each that would not do.
    """

    def __init__(self, own: Self, kinds: tuple[int, ...], let_in: Guest, *, patience_s: float = 5.0,
                 on_refused: Callable[[str, str], None] = lambda address, reason: None):
        self._own, self._let_in, self._patience_s, self._on_refused = own, let_in, patience_s, on_refused
        self._admits = {(kind, -1): SEALED for kind in kinds}
        self._strangers: dict[asyncio.Task, asyncio.StreamWriter] = {}      # the oldest first
        self._throttle = Throttle()
        self._servers: list[asyncio.Server] = []
        self.port = 0

    async def open(self, port: int, hosts: tuple[str, ...] | None = None, *, fallback: bool = False) -> None:
        """Listen on a port of these addresses, None for all of this machine, IPv4 and IPv6.

        Args:    fallback: take any free port when this one is taken.
        Raises:  ConfigError naming the port, and that somebody else has it.
        """
        try:
            self.port = await self._listen(port, hosts)
        except OSError as error:
            if error.errno == errno.EADDRINUSE and fallback:
                self.port = await self._listen(0, hosts)
                return
            raise ConfigError(f"cannot listen for control connections on port {port}: {error.strerror}; another port can be "
                              f"chosen with cluster.discovery_port (PYFLEET_DISCOVERY_PORT)") from None

    async def _listen(self, port: int, hosts: tuple[str, ...] | None) -> int:
        sockets = []
        try:
            for family, host in _families(hosts):
                try:
                    sock = socket.socket(family, socket.SOCK_STREAM)
                except OSError:                 # a kernel without IPv6
                    if family == socket.AF_INET6 and hosts is None:
                        continue
                    raise
                sockets.append(sock)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                try:
                    sock.bind(socket.getaddrinfo(host, port, family, socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][4])
                except OSError as error:
                    if hosts is None and family == socket.AF_INET6 and error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                        sockets.pop().close()   # IPv6 is switched off
                        continue
                    raise
                port = sock.getsockname()[1]
                sock.listen(BACKLOG)
            for sock in sockets:
                self._servers.append(await asyncio.start_server(self._welcome, sock=sock, limit=READ_AHEAD))
        except BaseException:
            for sock in sockets:
                sock.close()
            raise
        return port

    async def close(self) -> None:
        """Stop listening, and drop who has not proved anything."""
        for server in self._servers:
            server.close()
        for task in list(self._strangers):
            task.cancel()
        for server in self._servers:
            await server.wait_closed()

    async def _welcome(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        address = (writer.get_extra_info("peername") or ("?",))[0]
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        if not self._throttle.allows(address, loop.time()):
            CONNECTIONS_REFUSED.inc(reason="throttled")
            writer.transport.abort()
            return
        if len(self._strangers) >= MOST_STRANGERS:
            CONNECTIONS_REFUSED.inc(reason="crowded")
            oldest = next(iter(self._strangers))
            self._strangers.pop(oldest).transport.abort()
            oldest.cancel()
        self._strangers[task] = writer
        session = None
        try:
            async with asyncio.timeout(self._patience_s):
                session = await self._prove(reader, writer)
        except (AuthFailed, TimeoutError) as error:
            self._throttle.failed(address, loop.time())
            level = logging.WARNING if self._throttle.allows(address, loop.time()) else logging.DEBUG
            reason = str(error) or f"silent for {self._patience_s:g} s"
            CONNECTIONS_REFUSED.inc(reason="handshake" if str(error) else "silent")
            if str(error):
                HANDSHAKE_FAILURES.inc(side="accepted")
            log.log(level, "refused a control connection from %s: %s", address, reason)
            self._on_refused(address, reason)
        except (OSError, EOFError, asyncio.CancelledError):
            pass                                # it went away, or made room for another one: nothing follows in this task
        finally:
            self._strangers.pop(task, None)
            if session is None:
                writer.transport.abort()
        if session is not None:
            _tune(writer)
            self._let_in(reader, writer, session)

    async def _prove(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Session:
        responder = Responder(self._own.key, self._own.namespace, self._admits)
        while responder.session is None:
            data = await reader.read(responder.wants)
            if not data:
                raise EOFError
            writer.write(responder.receive(data))
        writer.write(responder.welcome())
        return responder.session


def _families(hosts: tuple[str, ...] | None) -> list[tuple[socket.AddressFamily, str]]:
    if hosts is None:
        return [(socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")]
    return [(socket.AF_INET6 if ":" in host else socket.AF_INET, host) for host in hosts]
