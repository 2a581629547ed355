"""P1: the key that makes a node the same node after a restart."""
from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import re
import secrets
import stat
from dataclasses import dataclass, field
from pathlib import Path

from nacl import bindings

from pyfleet.errors import ConfigError

FILE_NAME = "node_keypair"
SHORT_ID = 12               # characters: 60 bits, enough to tell nodes apart, too few to trust
_PATTERN = re.compile(rb"ed25519 ([0-9a-f]{64}) ([0-9a-f]{64})\n")


class Unwritable(ConfigError):
    """The folder of the key can not be made or written."""


def home_folder(home: str | None) -> Path:
    """Where this node keeps what makes it itself: the setting `home` (PYFLEET_HOME), else ~/.pyfleet.

    Raises:  ConfigError when this user has no home directory.
    """
    try:
        return Path(home or "~/.pyfleet").expanduser()
    except RuntimeError:
        raise ConfigError("this user has no home directory: say with PYFLEET_HOME where the node key may be") from None


def peer_id(public: bytes) -> str:
    """The full name of a node: base32 of SHA3-256 of its public key (32 bytes), 52 characters."""
    digest = hashlib.sha3_256(b"pyfleet peer id\0" + public).digest()
    return base64.b32encode(digest).decode().rstrip("=").lower()


def short_id(full: str) -> str:
    """The form for people: the first characters of a peer id."""
    return full[:SHORT_ID]


@dataclass(frozen=True)
class NodeKey:
    """An Ed25519 key pair: seed and public are 32 bytes each."""

    seed: bytes = field(repr=False)
    public: bytes

    @classmethod
    def generate(cls) -> NodeKey:
        """A new key that is stored nowhere."""
        return cls.from_seed(secrets.token_bytes(32))

    @classmethod
    def from_seed(cls, seed: bytes) -> NodeKey:
        """The key pair that a seed stands for."""
        return cls(seed, bindings.crypto_sign_seed_keypair(seed)[0])

    @property
    def peer_id(self) -> str:
        """The full peer id of the node that holds this key."""
        return peer_id(self.public)

    def sign(self, message: bytes) -> bytes:
        """The 64-byte signature of a message."""
        return bindings.crypto_sign(message, self.seed + self.public)[:64]

    @classmethod
    def load(cls, folder: Path) -> NodeKey:
        """The key in a folder.

        Raises:  FileNotFoundError; ConfigError when others may read it, or when it is damaged. It is never changed.
        """
        path = folder / FILE_NAME
        try:
            with open(path, "rb") as file:
                status, content = os.fstat(file.fileno()), file.read(1024)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise ConfigError(f"cannot read the node key {path}: {error.strerror}") from None
        if stat.S_IMODE(status.st_mode) & 0o077:
            raise ConfigError(f"the node key {path} has mode {stat.S_IMODE(status.st_mode):04o}, so others may have read "
                              f"it: chmod 600 it if you are sure that nobody has, else remove it to become a new node")
        found = _PATTERN.fullmatch(content)
        key = found and cls.from_seed(bytes.fromhex(found[1].decode()))
        if not found or key.public.hex().encode() != found[2]:
            raise ConfigError(f"the node key {path} is damaged: restore it from a copy, or remove it to become a new "
                              f"node")
        return key

    @classmethod
    def open(cls, folder: Path) -> NodeKey:
        """The key in a folder, made on first use; processes that start at the same time agree on one.

        Raises:  ConfigError as `load`; Unwritable when there is none and none can be made.
        """
        with contextlib.suppress(FileNotFoundError):
            return cls.load(folder)
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            cls.generate().store(folder)
        except FileExistsError:
            pass                        # somebody was faster: theirs counts
        except OSError as error:
            raise Unwritable(f"cannot make a node key in {folder}: {error.strerror}; "
                             f"PYFLEET_HOME says where else it may be") from None
        return cls.load(folder)

    def store(self, folder: Path) -> None:
        """Write the key where there is none; it has its name only once it is complete.

        Raises:  FileExistsError, OSError.
        """
        temporary = folder / f".{FILE_NAME}.{os.getpid()}.{secrets.token_hex(4)}"
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(handle, "wb") as file:
                os.fchmod(file.fileno(), 0o600)         # whatever the umask
                file.write(b"ed25519 %s %s\n" % (self.seed.hex().encode(), self.public.hex().encode()))
                file.flush()
                os.fsync(file.fileno())
            os.link(temporary, folder / FILE_NAME)      # unlike rename, never replaces
        finally:
            os.unlink(temporary)
