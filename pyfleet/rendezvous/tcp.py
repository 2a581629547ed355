"""P1: a small TCP store that rank 0 serves from a thread while the ranks meet."""
from __future__ import annotations

import contextlib
import selectors
import socket
import struct
import threading
import time

import msgspec

from pyfleet.errors import ConfigError, NotEnoughPeers
from pyfleet.rendezvous.base import MAX_VALUE_BYTES, Store, decode, encode

LENGTH = struct.Struct("!I")
RETRY_S = 0.05                  # between attempts to reach a rank 0 that has not started listening


class Request(msgspec.Struct):
    """What a client asks; `value` only to set."""

    key: str
    value: bytes | None = None


class TcpStore(Store):
    """host:port, where rank 0 listens; every rank, rank 0 too, is a client."""

    def __init__(self, place: str, rank: int, size: int, timeout: float):
        host, _, port = place.rpartition(":")
        if not port.isdigit():
            raise ConfigError(f"rendezvous address {place!r} is not host:port")
        self.place, self.address, self.timeout = place, (host.strip("[]"), int(port)), timeout
        self.sock = None
        self.server = Server(self.address) if rank == 0 else None
        self._reach(timeout)

    def _reach(self, timeout):
        problem, deadline = None, time.monotonic() + timeout
        while (left := deadline - time.monotonic()) > 0:
            try:
                self.sock = socket.create_connection(self.address, timeout=left)
                self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return
            except socket.gaierror as error:
                raise ConfigError(f"cannot resolve {self.address[0]!r}: {error.strerror}") from None
            except OSError as error:
                problem = error.strerror or str(error) or "timed out"
                time.sleep(max(0.0, min(RETRY_S, deadline - time.monotonic())))
        self.close()
        raise NotEnoughPeers(f"rank 0 did not answer at {self.place} within {timeout:.3g} s (last attempt: {problem})")

    def _ask(self, request, timeout):
        data = msgspec.msgpack.encode(request)
        if self.sock is None:
            self._reach(self.timeout)
        try:
            self.sock.settimeout(timeout)
            self.sock.sendall(LENGTH.pack(len(data)) + data)
            size, = LENGTH.unpack(self._read(LENGTH.size))
            return self._read(size)
        except TimeoutError:
            self.sock.close()               # the answer may still come: the next question needs a new connection
            self.sock = None
            raise
        except OSError as error:
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

    def __init__(self, address: tuple[str, int]):
        self.values, self.waiting, self.clients = {}, {}, set()
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
        unread, stopped = {}, False                 # unread: what each connection has sent of its next question
        with contextlib.closing(self.selector):
            while not stopped or self.clients:
                for key, _ in self.selector.select():
                    if key.fileobj is self.listener:
                        with contextlib.suppress(OSError):
                            sock, _ = self.listener.accept()
                            sock.setblocking(False)
                            unread[sock] = bytearray()
                            self.selector.register(sock, selectors.EVENT_READ, None)
                    elif key.fileobj is self.woken:
                        stopped = True              # rank 0 has left: go on only for those who have asked before
                        self.selector.unregister(self.woken)
                        self.selector.unregister(self.listener)
                    elif not self._hear(key.fileobj, unread[key.fileobj]):
                        self.selector.unregister(key.fileobj)
                        self.clients.discard(key.fileobj)
                        del unread[key.fileobj]
                        key.fileobj.close()
        for sock in (*unread, self.listener, self.wake, self.woken):
            sock.close()

    def _hear(self, sock, pending):
        """Take what a client sent; whether it is to be kept."""
        try:
            data = sock.recv(1 << 16)
        except BlockingIOError:
            return True
        except OSError:
            return False
        pending += data
        while len(pending) >= LENGTH.size:
            size, = LENGTH.unpack_from(pending)
            if size > MAX_VALUE_BYTES + 4096:
                return False
            if len(pending) < LENGTH.size + size:
                break
            try:
                request = msgspec.msgpack.decode(pending[LENGTH.size:LENGTH.size + size], type=Request)
            except msgspec.MsgspecError:
                return False
            del pending[:LENGTH.size + size]
            self.clients.add(sock)
            if request.value is not None:
                self.values.setdefault(request.key, request.value)
                self._answer(sock, b"")
                for waiter in self.waiting.pop(request.key, ()):
                    self._answer(waiter, self.values[request.key])
            elif request.key in self.values:
                self._answer(sock, self.values[request.key])
            else:
                self.waiting.setdefault(request.key, []).append(sock)
        return bool(data)

    @staticmethod
    def _answer(sock, value):
        with contextlib.suppress(OSError):          # a client that died is noticed by its end of file
            sock.setblocking(True)
            sock.settimeout(5.0)
            sock.sendall(LENGTH.pack(len(value)) + value)
            sock.setblocking(False)

    def stop(self):
        """Serve those who have asked something to their end, and nobody else."""
        with contextlib.suppress(OSError):
            self.wake.send(b"x")
