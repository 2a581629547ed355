"""P1: the secret that the nodes of a fleet share, and what is derived from it."""
from __future__ import annotations

import base64
import hashlib
import hmac
import os
import secrets
import stat
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path

from nacl import pwhash

from pyfleet.config import ClusterConfig
from pyfleet.errors import ConfigError

DEFAULT_NAME = "default"
KEY_BYTES = 32
LEAST_PASSPHRASE = 8            # characters; below that even a stretched guess is cheap
LARGEST_FILE = 4096
# RFC 9106's second recommendation (64 MiB, 3 passes), which a Raspberry Pi has room for; libsodium has one lane.
STRETCH_PASSES, STRETCH_BYTES = 3, 64 << 20


def new_psk() -> str:
    """A pre-shared key that nobody can guess: 32 random bytes, as 64 hexadecimal digits."""
    return secrets.token_hex(KEY_BYTES)


def derive(key: bytes, purpose: str, *context: bytes, size: int = 32) -> bytes:
    """HMAC-SHA3-256 of a purpose and length-prefixed context: keys for different uses tell nothing of each other.

    Args:    size: bytes wanted, at most 32.
    """
    parts = b"".join(len(part).to_bytes(4, "little") + part for part in (purpose.encode(), *context))
    return hmac.digest(key, b"pyfleet v1" + parts, "sha3_256")[:size]


@dataclass(frozen=True)
class Namespace:
    """A named group of nodes that share a secret.

    Attributes:
        name: what people call it; two namespaces of one secret and different names are strangers, too.
        root: 32 secret bytes; a passphrase has been stretched into them. Never leaves the process.
    """

    name: str
    root: bytes = field(repr=False)

    @property
    def tag(self) -> str:
        """What may be shown in discovery: 32 hexadecimal digits, equal for members. Of a passphrase, it lets a guess be
        tested at the price of stretching it; of a key from `new_psk`, nothing at all."""
        return derive(self.root, "public tag", self.name.encode(), size=16).hex()

    @property
    def key(self) -> bytes:
        """The 32-byte secret that goes into every handshake."""
        return derive(self.root, "handshake", self.name.encode())

    def mark(self, message: bytes) -> str:
        """32 hexadecimal digits that only members can make for a message that everybody may read. As for guesses: as `tag`."""
        return derive(self.root, "mark", self.name.encode(), message, size=16).hex()

    @classmethod
    def from_psk(cls, psk: str, name: str | None = None) -> Namespace:
        """The namespace of a PSK: 32 bytes in hex or base64 as they are, anything else is a passphrase.

        Raises:  ConfigError for a passphrase of fewer than LEAST_PASSPHRASE characters.
        """
        name = unicodedata.normalize("NFC", name or DEFAULT_NAME)
        text = unicodedata.normalize("NFC", psk.strip())
        root = _key_bytes(text)
        if root is None:
            if len(text) < LEAST_PASSPHRASE:
                raise ConfigError(f"a PSK of {len(text)} characters keeps nobody out: take at least "
                                  f"{LEAST_PASSPHRASE}, or what `pyfleet keys psk` makes")
            salt = hashlib.sha3_256(b"pyfleet passphrase\0" + name.encode()).digest()[:pwhash.argon2id.SALTBYTES]
            root = pwhash.argon2id.kdf(KEY_BYTES, text.encode(), salt, STRETCH_PASSES, STRETCH_BYTES)
        return cls(name, derive(root, "root"))

    @classmethod
    def from_token(cls, token: bytes, name: str | None = None) -> Namespace:
        """The namespace of one meeting: its secret is a random token that the meeting place handed out."""
        return cls(unicodedata.normalize("NFC", name or DEFAULT_NAME), derive(token, "meeting token"))

    @classmethod
    def configured(cls, cluster: ClusterConfig) -> Namespace | None:
        """The namespace that the settings say; None without a PSK.

        Raises:  ConfigError for a PSK file that is missing, empty, too large, open to everybody, or beside another PSK.
        """
        if cluster.psk is not None and cluster.psk_file is not None:
            raise ConfigError("there are two PSKs, in psk (PYFLEET_PSK) and in psk_file (PYFLEET_PSK_FILE): keep one")
        if cluster.psk_file is not None:
            return cls.from_psk(read_psk(Path(cluster.psk_file)), cluster.namespace)
        return None if cluster.psk is None else cls.from_psk(cluster.psk, cluster.namespace)


    @classmethod
    def required(cls, cluster: ClusterConfig) -> Namespace:
        """The namespace that the settings say, for nodes that find each other: without a secret, strangers would be in it.

        Raises:  ConfigError without a PSK, and as `configured`.
        """
        found = cls.configured(cluster)
        if found is None:
            raise ConfigError("nodes that find each other by themselves need a secret, or anybody on the network could join "
                              "them: make one with `pyfleet keys psk --output FILE`, copy it to every machine, and name it "
                              "with psk_file (PYFLEET_PSK_FILE, --psk-file)")
        return found


def read_psk(path: Path) -> str:
    """The PSK in a file, without the white space around it."""
    try:
        with open(path.expanduser(), "rb") as file:
            status, content = os.fstat(file.fileno()), file.read(LARGEST_FILE + 1)
        text = content.decode().strip()
    except OSError as error:
        raise ConfigError(f"cannot read the PSK file {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"the PSK file {path} is not UTF-8 text") from None
    if stat.S_IMODE(status.st_mode) & 0o007:        # a group may share a secret, as in a Kubernetes volume
        raise ConfigError(f"the PSK file {path} is open to everybody (mode {stat.S_IMODE(status.st_mode):04o}): "
                          f"chmod 600 it")
    if not text or len(content) > LARGEST_FILE:
        raise ConfigError(f"the PSK file {path} is {'longer than any PSK' if text else 'empty'}")
    return text


def _key_bytes(text: str) -> bytes | None:
    """The 32 bytes that 64 hex digits or 44 characters of padded base64 stand for; None for a passphrase."""
    try:
        if len(text) == 2 * KEY_BYTES:
            return bytes.fromhex(text) if text.isalnum() else None
        if len(text) == 44 and text.endswith("="):      # without padding, a passphrase could look the same
            found = base64.b64decode(text.replace("-", "+").replace("_", "/"), validate=True)
            return found if len(found) == KEY_BYTES else None
    except ValueError:
        return None
    return None
