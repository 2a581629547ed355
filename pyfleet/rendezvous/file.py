"""P1: a store in a directory that all ranks see (one host, or a shared file system)."""
from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

from pyfleet.errors import ConfigError
from pyfleet.rendezvous.base import Store, decode, encode

LONGEST_LOOK_S = 0.02           # files have no portable event: look again, less and less often


class FileStore(Store):
    """One file per key, complete from the moment it has its name."""

    def __init__(self, place: str, rank: int, size: int, timeout: float, secret: bytes | None = None):
        self.directory = Path(place)
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot meet in {place}: {error.strerror}") from None

    def set(self, key, value):
        handle, name = tempfile.mkstemp(dir=self.directory, prefix=".")
        with os.fdopen(handle, "wb") as file:
            file.write(encode(value))
        os.replace(name, self.directory / key)

    def get(self, key, timeout):
        deadline, pause = time.monotonic() + timeout, 0.0005
        while True:
            try:
                return decode((self.directory / key).read_bytes())
            except FileNotFoundError:
                if time.monotonic() >= deadline:
                    raise KeyError(key) from None
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_LOOK_S)

    def close(self):
        """The directory belongs to whoever started the ranks."""
