"""P1: metrics as lines of JSON in a file, for whoever has no Prometheus."""
from __future__ import annotations

import json
import logging
import os
import threading
import time

from pyfleet.exporters.base import Exporter
from pyfleet.metrics import Registry

log = logging.getLogger("pyfleet.metrics")


class JsonLinesExporter(Exporter):
    """Adds {"time", "rank", "metrics": {name: samples}} to a file every interval_s seconds, and when it is closed.

    Time is in seconds since 1970, samples are those of Registry.snapshot. All ranks of a host may share a file: a line is
    written at once. "{rank}" in the path is the rank's number.
    """

    def __init__(self, registry: Registry, path: str, interval_s: float, rank: int):
        self._registry, self._rank, self._interval_s = registry, rank, interval_s
        self._path = path.replace("{rank}", str(rank))
        self._file = os.open(os.path.expanduser(self._path), os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="pyfleet-metrics-file")
        self._thread.start()

    @classmethod
    def open(cls, registry, cluster, rank, local_rank):
        try:
            return cls(registry, cluster.metrics_file, cluster.metrics_interval, rank)
        except OSError as error:
            raise OSError(f"cannot write them to {cluster.metrics_file}: {error.strerror}") from None

    def close(self):
        if not self._over.is_set():
            self._over.set()
            self._thread.join()
            os.close(self._file)

    def _run(self):
        ended = False
        while not ended:
            ended = self._over.wait(self._interval_s)
            found = {name: family["samples"] for name, family in self._registry.snapshot().items()}
            line = json.dumps({"time": time.time(), "rank": self._rank, "metrics": found}) + "\n"
            try:
                os.write(self._file, line.encode())
            except OSError as error:
                log.warning("rank %d writes no more metrics to %s: %s", self._rank, self._path, error.strerror)
                return
