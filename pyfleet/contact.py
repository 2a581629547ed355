"""P1: how a rank asks the node it belongs to: the membership service of its own process, or of the agent beside it."""
from __future__ import annotations

import socket
import struct
from abc import ABC, abstractmethod
from typing import Any

import msgspec

from pyfleet import errors

LENGTH = struct.Struct("<I")
LARGEST_BYTES = 8 << 20         # the status of a fleet of a thousand nodes
ANSWER_S = 5.0                  # for what needs no waiting; an agent that takes longer is stuck
SLACK_S = 2.0                   # the agent keeps the time; this much later we no longer believe that it does


class Contact(ABC):
    """Questions to a node. The service (pyfleet.membership.service) says which there are."""

    @abstractmethod
    def ask(self, what: str, timeout: float | None = None, **details: Any) -> Any:
        """The answer, JSON-like.

        Args:    timeout: seconds that the node may take to answer; None where it answers at once.
        Raises:  the FleetError that the node says, or KeyError for a value that is not there in time; FleetError when the
                 node is gone.
        """

    @abstractmethod
    def close(self) -> None:
        """Let go; a service of this process leaves its fleet. Idempotent."""


class SocketContact(Contact):
    """An agent on this machine, by the path of its socket, which only this user can reach."""

    def __init__(self, path: str):
        self.path = path

    def ask(self, what, timeout=None, **details):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(ANSWER_S if timeout is None else timeout + SLACK_S)
            try:
                sock.connect(self.path)
                sock.sendall(pack({"ask": what, "timeout": timeout, **details}))
                size, = LENGTH.unpack(_read(sock, LENGTH.size))
                return unpack(_read(sock, size))
            except TimeoutError:
                raise errors.FleetError(f"the agent of this node did not answer {what!r}") from None
            except OSError as error:
                raise errors.FleetError(f"the agent of this node is gone: {error.strerror or error}") from None

    def close(self):
        """Nothing is held between questions."""


def pack(value: dict) -> bytes:
    """A question or an answer with its length."""
    data = msgspec.msgpack.encode(value)
    return LENGTH.pack(len(data)) + data


def answer_of(value: Any = None, error: BaseException | None = None) -> dict:
    """What a node says to a question."""
    return {"ok": value} if error is None else {"error": type(error).__name__, "text": str(error.args[0] if error.args else "")}


def unpack(data: bytes) -> Any:
    """The value in an answer. Raises: what the node said."""
    said = msgspec.msgpack.decode(data)
    if "error" not in said:
        return said["ok"]
    kind = getattr(errors, said["error"], None)
    if said["error"] == "KeyError":
        raise KeyError(said["text"])
    raise (kind if isinstance(kind, type) and issubclass(kind, errors.FleetError) else errors.FleetError)(said["text"])


def _read(sock: socket.socket, size: int) -> bytes:
    if size > LARGEST_BYTES:
        raise OSError(f"an answer of {size} bytes")
    data = bytearray()
    while len(data) < size:
        part = sock.recv(size - len(data))
        if not part:
            raise ConnectionError("connection closed")
        data += part
    return bytes(data)
