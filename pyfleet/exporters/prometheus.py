"""P1: metrics over HTTP, in the formats that Prometheus and its kin scrape."""
from __future__ import annotations

import os
import socket
import socketserver
import threading
import weakref
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from pyfleet.errors import ConfigError
from pyfleet.exporters.base import Exporter
from pyfleet.metrics import Distribution, Registry

CLOSING_S = 0.1         # close() returns within this
PATIENCE_S = 10         # for a request to come; a client that says nothing holds a thread no longer

_open: weakref.WeakSet[Server] = weakref.WeakSet()


class PrometheusExporter(Exporter):
    """Serves http://metrics_host:(metrics_port + local_rank)/metrics.

    Attributes:
        port: where it really listens; differs where metrics_port is 0.
    """

    def __init__(self, registry: Registry, host: str, port: int):
        from prometheus_client import CollectorRegistry, make_wsgi_app
        ours = CollectorRegistry(auto_describe=False)
        ours.register(Collector(registry))
        kind = type("Server", (Server,), {"address_family": socket.AF_INET6 if ":" in host else socket.AF_INET})
        self._server = make_server(host, port, make_wsgi_app(ours), kind, Handler)
        self.port = self._server.server_port
        _open.add(self._server)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(CLOSING_S,), daemon=True,
                                        name="pyfleet-metrics")
        self._thread.start()

    @classmethod
    def check(cls):
        if find_spec("prometheus_client") is None:
            raise ConfigError("metrics_port is set, but prometheus-client is not installed: pip install 'pyfleet[metrics]'")

    @classmethod
    def open(cls, registry, cluster, rank, local_rank):
        port = cluster.metrics_port + local_rank if cluster.metrics_port else 0
        try:
            return cls(registry, cluster.metrics_host, port)
        except (OSError, OverflowError) as error:       # the latter beyond port 65535
            why = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise OSError(f"cannot serve them at {cluster.metrics_host}:{port} (metrics_port {cluster.metrics_port} + local "
                          f"rank {local_rank}): {why}") from None

    def close(self):
        _open.discard(self._server)
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class Server(socketserver.ThreadingMixIn, WSGIServer):
    """A thread per request."""

    daemon_threads = True

    def server_bind(self):
        """As WSGIServer's, without asking DNS for this host's name, which can take many seconds."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]
        self.setup_environ()


class Handler(WSGIRequestHandler):
    """Quiet, and impatient."""

    timeout = PATIENCE_S

    def log_message(self, format: str, *args: Any) -> None:
        """A scrape is no news."""


class Collector:
    """The registry in prometheus_client's terms."""

    def __init__(self, registry: Registry):
        self._registry = registry

    def collect(self) -> Iterator[Any]:
        """Every family, as one of prometheus_client's."""
        from prometheus_client.metrics_core import Metric
        for family in self._registry.collect():
            counter = family.kind == "counter"
            metric = Metric(family.name.removesuffix("_total") if counter else family.name, family.help, family.kind)
            for key, value in sorted(family.samples.items()):
                labels = dict(key)
                if isinstance(value, Distribution):
                    for bound, count in value.cumulative():
                        le = "+Inf" if bound == float("inf") else repr(bound)
                        metric.add_sample(f"{family.name}_bucket", labels | {"le": le}, count)
                    metric.add_sample(f"{family.name}_count", labels, value.count)
                    metric.add_sample(f"{family.name}_sum", labels, value.sum)
                else:
                    metric.add_sample(family.name, labels, value)
            yield metric


def _close_in_child() -> None:
    # A forked child (a worker of a data loader) would keep the port taken after its parent's end.
    for server in list(_open):
        server.socket.close()
    _open.clear()


os.register_at_fork(after_in_child=_close_in_child)
