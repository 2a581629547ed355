"""P1, open set: how the metrics of a process leave it. `base` is the contract."""
from __future__ import annotations

import logging
from importlib import import_module

from pyfleet.config import ClusterConfig
from pyfleet.exporters.base import Exporter
from pyfleet.metrics import Registry

EXPORTERS = {       # the setting that asks for it -> the kind
    "metrics_port": "pyfleet.exporters.prometheus:PrometheusExporter",
    "metrics_file": "pyfleet.exporters.jsonl:JsonLinesExporter",
}

__all__ = ["EXPORTERS", "Exporter", "kind_of", "open_all", "wanted"]

log = logging.getLogger("pyfleet.metrics")


def wanted(cluster: ClusterConfig) -> list[type[Exporter]]:
    """The kinds that the settings ask for.

    Raises:  ConfigError when one of them cannot work here.
    """
    kinds = [kind_of(setting) for setting in EXPORTERS if getattr(cluster, setting) is not None]
    for kind in kinds:
        kind.check()
    return kinds


def kind_of(setting: str) -> type[Exporter]:
    """The kind that a setting asks for."""
    module, name = EXPORTERS[setting].split(":")
    return getattr(import_module(module), name)


def open_all(kinds: list[type[Exporter]], registry: Registry, cluster: ClusterConfig, rank: int,
             local_rank: int) -> list[Exporter]:
    """The exporters that could begin; what stood in the way of the others is a warning."""
    opened = []
    for kind in kinds:
        try:
            opened.append(kind.open(registry, cluster, rank, local_rank))
        except OSError as error:
            log.warning("rank %d goes on without metrics: %s", rank, error)
    return opened
