"""P1: a small TCP store that rank 0 serves from a thread while the ranks meet.

With a secret, client and server each begin with a nonce, and every message is sealed with a key of that connection and
direction and a counter: who does not know the secret reads, forges, replays and reorders nothing, and is hung up on.
"""
from __future__ import annotations

import contextlib
import hmac
import secrets
import selectors
import socket
import struct
import threading
import time

import msgspec

from pyfleet.errors import AuthFailed, ConfigError, NotEnoughPeers
from pyfleet.rendezvous.base import MAX_VALUE_BYTES, Store, decode, encode

LENGTH = struct.Struct("!I")
RETRY_S = 0.05                  # between attempts to reach a rank 0 that has not started listening
SEALED = b"\xff" * LENGTH.size  # begins a sealed connection; the length of no message
NONCE_BYTES, TAG_BYTES = 32, 16
MOST_GUESTS = 256               # connections that have asked nothing sensible yet: beyond that, the oldest goes


class Request(msgspec.Struct):
    """What a client asks; `value` only to set."""

    key: str
    value: bytes | None = None


class Channel:
    """One end of a sealed connection: ChaCha20-Poly1305 with a key for each direction, a counter for a nonce."""

    def __init__(self, secret: bytes, client: bytes, server: bytes, *, serves: bool):
        from nacl import bindings, exceptions  # who has no secret need not load it
        self._bindings, self._bad = bindings, exceptions.CryptoError
        keys = [hmac.digest(secret, b"pyfleet store 1 " + towards + client + server, "sha3_256")
                for towards in (b"to the server ", b"to the client ")]
        self._receive_key, self._send_key = keys if serves else reversed(keys)
        self._num_sent = self._num_received = 0

    def seal(self, data: bytes) -> bytes:
        """What to send for data."""
        nonce = self._num_sent.to_bytes(12, "little")
        self._num_sent += 1
        return self._bindings.crypto_aead_chacha20poly1305_ietf_encrypt(data, None, nonce, self._send_key)

    def open(self, sealed: bytes) -> bytes:
        """What the other end has sealed, in order. Raises AuthFailed."""
        nonce = self._num_received.to_bytes(12, "little")
        self._num_received += 1
        if len(sealed) >= TAG_BYTES:
            with contextlib.suppress(self._bad):
                return self._bindings.crypto_aead_chacha20poly1305_ietf_decrypt(sealed, None, nonce, self._receive_key)
        raise AuthFailed("a message is not the other end's, or not the next one")


class TcpStore(Store):
    """host:port, where rank 0 listens; every rank, rank 0 too, is a client.

    Args:    secret: of those who may take part; None: whoever reaches the place may.
    Raises (everywhere):  AuthFailed when rank 0 knows another secret, or only one end has one.
    """

    def __init__(self, place: str, rank: int, size: int, timeout: float, secret: bytes | None = None):
        host, _, port = place.rpartition(":")
        if not port.isdigit():
            raise ConfigError(f"rendezvous address {place!r} is not host:port")
        self.place, self.address, self.timeout = place, (host.strip("[]"), int(port)), timeout
        self.secret, self.channel, self.proven = secret, None, False
        self.sock = None
        self.server = Server(self.address, secret) if rank == 0 else None
        self._reach(timeout)

    def _reach(self, timeout):
        problem, deadline = None, time.monotonic() + timeout
        while (left := deadline - time.monotonic()) > 0:
            try:
                self.sock = socket.create_connection(self.address, timeout=left)
                self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if self.secret is not None:
                    self._greet()
                return
            except socket.gaierror as error:
                raise ConfigError(f"cannot resolve {self.address[0]!r}: {error.strerror}") from None
            except OSError as error:
                problem = error.strerror or str(error) or "timed out"
                time.sleep(max(0.0, min(RETRY_S, deadline - time.monotonic())))
        self.close()
        raise NotEnoughPeers(f"rank 0 did not answer at {self.place} within {timeout:.3g} s (last attempt: {problem})")

    def _greet(self):
        own = secrets.token_bytes(NONCE_BYTES)
        self.sock.sendall(SEALED + own)
        try:
            head = self._read(LENGTH.size)
        except ConnectionError:
            raise self._refused() from None
        if head != SEALED:
            raise self._refused()
        self.channel = Channel(self.secret, own, self._read(NONCE_BYTES), serves=False)

    def _refused(self):
        self.close()
        return AuthFailed(f"rank 0 at {self.place} hung up: its PSK, namespace or version is another")

    def _ask(self, request, timeout):
        data = msgspec.msgpack.encode(request)
        if self.sock is None:
            self._reach(self.timeout)
        try:
            self.sock.settimeout(timeout)
            data = self.channel.seal(data) if self.channel else data
            self.sock.sendall(LENGTH.pack(len(data)) + data)
            head = self._read(LENGTH.size)
            if head == SEALED:
                raise self._refused()
            answer = self._read(LENGTH.unpack(head)[0])
            answer = self.channel.open(answer) if self.channel else answer
            self.proven = True
            return answer
        except TimeoutError:
            self.sock.close()               # the answer may still come: the next question needs a new connection
            self.sock = None
            raise
        except OSError as error:
            if self.channel and not self.proven:
                raise self._refused() from None
            raise NotEnoughPeers(f"rank 0 at {self.place} went away while the ranks met: {error}") from None

    def _read(self, size):
        data = bytearray()
        while len(data) < size:
            part = self.sock.recv(size - len(data))
            if not part:
                raise ConnectionError("connection closed")
            data += part
        return bytes(data)

    def set(self, key, value):
        try:
            self._ask(Request(key, encode(value)), self.timeout)
        except TimeoutError:
            raise NotEnoughPeers(f"rank 0 did not answer at {self.place} within {self.timeout:.3g} s") from None

    def get(self, key, timeout):
        try:
            return decode(self._ask(Request(key), max(timeout, 0.001)))
        except TimeoutError:
            raise KeyError(key) from None

    def refusals(self):
        count = self.server.num_refused if self.server else 0
        return f"; refused {count}, for another PSK or namespace" if count else ""

    def close(self):
        if self.sock is not None:
            self.sock.close()
            self.sock = None
        if self.server is not None:
            self.server.stop()
            self.server = None


class Server:
    """Serves set and get on one thread until told to stop, then until every client has gone; a get waits for its key.

    Who connects without ever asking something sensible is no client: it neither ends the serving nor prolongs it.

    Raises:  ConfigError when the address is taken or not this machine's.
    """

    def __init__(self, address: tuple[str, int], secret: bytes | None = None):
        self.secret = secret
        self.values, self.waiting, self.num_refused = {}, {}, 0
        self.guests, self.clients = {}, {}              # socket -> _Peer; a guest becomes a client by what it asks
        self.listener = self._listen(address)
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.listener, selectors.EVENT_READ, None)
        self.wake, self.woken = socket.socketpair()
        self.selector.register(self.woken, selectors.EVENT_READ, None)
        self.thread = threading.Thread(target=self._serve, name="pyfleet-store", daemon=True)
        self.thread.start()

    @staticmethod
    def _listen(address):
        try:
            info = socket.getaddrinfo(*address, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        except socket.gaierror as error:
            raise ConfigError(f"cannot resolve {address[0]!r}: {error.strerror}") from None
        problem = None
        for family, kind, protocol, _, where in info:
            sock = socket.socket(family, kind, protocol)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                sock.bind(where)
                sock.listen(512)
                sock.setblocking(False)
                return sock
            except OSError as error:
                sock.close()
                problem = error.strerror
        raise ConfigError(f"rank 0 cannot listen on {address[0]}:{address[1]}: {problem}; "
                          f"choose another MASTER_PORT, or an address of this machine")

    def _serve(self):
        stopped = False
        with contextlib.closing(self.selector):
            while not stopped or self.clients:
                for key, _ in self.selector.select():
                    if key.fileobj is self.listener:
                        with contextlib.suppress(OSError):
                            self._admit(self.listener.accept()[0])
                    elif key.fileobj is self.woken:
                        stopped = True              # rank 0 has left: go on only for those who have asked before
                        self.selector.unregister(self.woken)
                        self.selector.unregister(self.listener)
                    else:
                        peer = self.guests.get(key.fileobj) or self.clients.get(key.fileobj)
                        if peer is not None and not self._hear(peer):
                            self._drop(peer.sock)
        for sock in (*self.guests, self.listener, self.wake, self.woken):
            sock.close()

    def _admit(self, sock):
        sock.setblocking(False)
        if len(self.guests) >= MOST_GUESTS:
            self._drop(next(iter(self.guests)))
        self.guests[sock] = _Peer(sock)
        self.selector.register(sock, selectors.EVENT_READ, None)

    def _drop(self, sock):
        self.guests.pop(sock, None)
        self.clients.pop(sock, None)
        self.selector.unregister(sock)
        sock.close()

    def _hear(self, peer):
        """Take what a peer sent; whether it is to be kept."""
        try:
            data = peer.sock.recv(1 << 16)
        except BlockingIOError:
            return True
        except OSError:
            return False
        peer.pending += data
        if self.secret is not None and peer.channel is None and not self._greet(peer):
            return False
        while len(peer.pending) >= LENGTH.size and (self.secret is None or peer.channel is not None):
            size, = LENGTH.unpack_from(peer.pending)
            if size > MAX_VALUE_BYTES + 4096:
                return False
            if len(peer.pending) < LENGTH.size + size:
                break
            message = bytes(peer.pending[LENGTH.size:LENGTH.size + size])
            del peer.pending[:LENGTH.size + size]
            try:
                request = msgspec.msgpack.decode(peer.channel.open(message) if peer.channel else message, type=Request)
            except AuthFailed:
                self.num_refused += 1
                return False
            except msgspec.MsgspecError:
                return False
            self.guests.pop(peer.sock, None)
            self.clients[peer.sock] = peer
            if request.value is not None:
                self.values.setdefault(request.key, request.value)
                self._answer(peer, b"")
                for waiter in self.waiting.pop(request.key, ()):
                    self._answer(waiter, self.values[request.key])
            elif request.key in self.values:
                self._answer(peer, self.values[request.key])
            else:
                self.waiting.setdefault(request.key, []).append(peer)
        return bool(data)

    def _greet(self, peer):
        """Exchange nonces with a new peer; whether it wants a sealed connection, as far as it has said."""
        size = len(SEALED) + NONCE_BYTES
        if not SEALED.startswith(peer.pending[:len(SEALED)]):
            self._send(peer.sock, SEALED)           # to a rank without the secret, which can say so then
            self.num_refused += 1
            return False
        if len(peer.pending) >= size:
            own = secrets.token_bytes(NONCE_BYTES)
            peer.channel = Channel(self.secret, bytes(peer.pending[len(SEALED):size]), own, serves=True)
            del peer.pending[:size]
            self._send(peer.sock, SEALED + own)
        return True

    def _answer(self, peer, value):
        data = peer.channel.seal(value) if peer.channel else value
        self._send(peer.sock, LENGTH.pack(len(data)) + data)

    @staticmethod
    def _send(sock, data):
        with contextlib.suppress(OSError):          # a client that died is noticed by its end of file
            sock.setblocking(True)
            sock.settimeout(5.0)
            sock.sendall(data)
            sock.setblocking(False)

    def stop(self):
        """Serve those who have asked something to their end, and nobody else."""
        with contextlib.suppress(OSError):
            self.wake.send(b"x")


class _Peer:
    """A connection to the server, what it has sent of its next question, and how it is sealed."""

    def __init__(self, sock):
        self.sock, self.pending, self.channel = sock, bytearray(), None
