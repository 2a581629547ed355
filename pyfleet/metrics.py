"""P0: what a process counts: counters, gauges and histograms, and the registry that everybody reads them from.

Whoever moves bytes keeps counts of its own, and a source hands them over when somebody asks: calls pay nothing for it.
Names are Prometheus's: pyfleet_ in front, base units, _total for what only grows.
"""
from __future__ import annotations

import logging
import math
import os
import re
import threading
import weakref
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from pyfleet.errors import ConfigError

OWN = "pyfleet_"                # names that begin so are ours
MOST_SERIES = 1000              # of one logged name: a label that never repeats (a step, a time) must not fill the memory
MOST_BUCKETS = 17               # of a histogram, as it is shown
# 100 us to 100 s, as 1-2-5: round trips and phases of the control path.
SECONDS = tuple(digit * 10.0 ** power for power in range(-4, 2) for digit in (1, 2, 5)) + (100.0,)

_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
_LABEL = re.compile(r"(?!__)[a-zA-Z_][a-zA-Z0-9_]*")

log = logging.getLogger("pyfleet.metrics")

Labels = tuple[tuple[str, str], ...]        # (name, value), sorted


@dataclass(frozen=True)
class Distribution:
    """Observed values by size.

    Attributes:
        bounds: rising; the bucket of a bound holds what is at most that and above the bound before.
        counts: one more than bounds: the last is what lies above all.
        sum:    of all values.
    """

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    sum: float = 0.0

    @property
    def count(self) -> int:
        """How many values there were, exactly."""
        return sum(self.counts)

    def quantile(self, q: float) -> float | None:
        """An estimate of the value below which a share q (0 to 1) lies; None when there is no value.

        It is interpolated within a bucket, so it lies in the same bucket as the true one; above all bounds it is the last.
        """
        rank, below = q * self.count, 0
        for k, count in enumerate(self.counts):
            if count and below + count >= rank:
                if k == len(self.bounds):
                    return self.bounds[-1]
                low = self.bounds[k - 1] if k else 0.0
                return low + (self.bounds[k] - low) * max(0.0, rank - below) / count
            below += count
        return None

    def __add__(self, other: Distribution) -> Distribution:
        """Both together; the bounds must be the same."""
        assert self.bounds == other.bounds, "distributions with other bounds cannot be added"
        counts = tuple(a + b for a, b in zip(self.counts, other.counts, strict=True))
        return Distribution(self.bounds, counts, self.sum + other.sum)

    def cumulative(self) -> list[tuple[float, int]]:
        """[(bound, how many values are at most that)]: at most MOST_BUCKETS of them, the last with an infinite bound."""
        step = -(-len(self.bounds) // (MOST_BUCKETS - 1))
        running = list(zip(self.bounds, accumulate(self.counts), strict=False))
        return [*running[::step], (math.inf, self.count)]


@dataclass
class Family:
    """All series of one name. kind: "counter", "gauge" or "histogram"; the values of the last are Distributions."""

    name: str
    kind: str
    help: str
    samples: dict[Labels, Any] = field(default_factory=dict)

    def take(self, other: Family) -> None:
        """Add what another source counts under the same name; of a gauge, the later value stands."""
        for labels, value in other.samples.items():
            here = self.samples.get(labels)
            self.samples[labels] = value if here is None or self.kind == "gauge" else here + value


Source = Callable[[], Iterable[Family]]


class Registry:
    """Every metric of a process. For all threads."""

    def __init__(self) -> None:
        self._metrics: dict[str, _Metric] = {}
        self._forget()

    def _forget(self) -> None:
        """Start anew: a forked child has not done what its parent counted, and holds none of its sources."""
        self._lock = threading.Lock()
        self._sources: list[Callable[[], Source | None]] = []
        self._retired: dict[str, Family] = {}
        self._logged: dict[str, Family] = {}
        for metric in self._metrics.values():
            metric.clear()

    def attach(self, source: Source) -> None:
        """From now on, ask a source, too. A bound method is held weakly: without detach, its counts go with its owner."""
        held = weakref.WeakMethod(source) if hasattr(source, "__self__") else lambda: source
        with self._lock:
            self._sources.append(held)

    def detach(self, source: Source) -> None:
        """Ask a source a last time: what it counted stays, its gauges go. Idempotent."""
        with self._lock:
            held = next((each for each in self._sources if each() == source), None)
            if held is not None:
                self._sources.remove(held)
                _merge(self._retired, [family for family in source() if family.kind != "gauge"])

    def log(self, name: str, value: float, labels: Mapping[str, Any]) -> None:
        """As log_metric()."""
        if not isinstance(name, str) or not _NAME.fullmatch(name) or name.startswith(OWN):
            raise ConfigError(f"a metric's name has letters, digits, _ and :, and does not begin with {OWN}, unlike {name!r}")
        if bad := [label for label in labels if not _LABEL.fullmatch(label)]:
            raise ConfigError(f"a label has letters, digits and _, unlike {bad[0]!r}")
        key, value = _key(labels), float(value)
        with self._lock:
            family = self._logged.setdefault(name, Family(name, "gauge", "Logged by the script."))
            full = key not in family.samples and len(family.samples) >= MOST_SERIES
            if not full:
                family.samples[key] = value
        if full:
            log.warning("metric %s has %d combinations of labels already: %s is left out", name, MOST_SERIES, dict(labels))

    def collect(self) -> list[Family]:
        """What everything counts now, by name."""
        found: dict[str, Family] = {}
        with self._lock:
            _merge(found, [metric.family() for metric in self._metrics.values()])
            _merge(found, self._retired.values())
            self._sources = [held for held in self._sources if held() is not None]
            for held in self._sources:
                if (source := held()) is not None:
                    _merge(found, source())
            _merge(found, self._logged.values())
        return [found[name] for name in sorted(found)]

    def snapshot(self) -> dict[str, dict]:
        """The same as values that JSON can carry: {name: {"type", "help", "samples": [{"labels", "value"}]}}.

        A sample of a histogram has "count", "sum", "p50", "p99" (None where it is empty) and "buckets", [[bound, values
        that are at most that]], in place of "value"; the last bound is "+Inf".
        """
        return {family.name: {"type": family.kind, "help": family.help, "samples": [
            {"labels": dict(labels), **_plain(value)} for labels, value in sorted(family.samples.items())]}
            for family in self.collect()}


def _merge(into: dict[str, Family], families: Iterable[Family]) -> None:
    for family in families:
        into.setdefault(family.name, Family(family.name, family.kind, family.help)).take(family)


def _plain(value):
    if not isinstance(value, Distribution):
        return {"value": value if math.isfinite(value) else str(value)}
    buckets = [[bound if math.isfinite(bound) else "+Inf", count] for bound, count in value.cumulative()]
    return {"count": value.count, "sum": value.sum, "p50": value.quantile(0.5), "p99": value.quantile(0.99),
            "buckets": buckets}


def _key(labels: Mapping[str, Any]) -> Labels:
    return tuple(sorted((name, str(value)) for name, value in labels.items()))


REGISTRY = Registry()
os.register_at_fork(after_in_child=REGISTRY._forget)


# ---- what is counted where it happens: once per event of the control path, never per collective call --------------------

class _Metric:
    """One name; every value of its labels is a series of its own. Without labels there is one, from the start.

    Args:    name: unique.  help: a sentence.  labels: their names; each call gives a value to all of them.
    """

    kind: str

    def __init__(self, name: str, help: str, labels: tuple[str, ...] = (), registry: Registry = REGISTRY):
        assert _NAME.fullmatch(name) and name not in registry._metrics, f"{name} is there already, or is no name"
        self.name, self.help, self.labels = name, help, frozenset(labels)
        self.clear()
        registry._metrics[name] = self

    def clear(self) -> None:
        """Forget all values."""
        self._lock = threading.Lock()
        self._values: dict[Labels, Any] = {} if self.labels else {(): self._zero()}

    def family(self) -> Family:
        """The values now."""
        with self._lock:
            return Family(self.name, self.kind, self.help, {key: self._shown(value) for key, value in self._values.items()})

    def _zero(self):
        return 0

    def _shown(self, value):
        return value

    def _place(self, labels):
        if labels.keys() != self.labels:
            raise ValueError(f"{self.name} has the labels {sorted(self.labels)}, not {sorted(labels)}")
        return _key(labels)


class Counter(_Metric):
    """What only grows, since the process began."""

    kind = "counter"

    def inc(self, amount: float = 1, /, **labels: Any) -> None:
        """Add an amount. Raises: ValueError when it is negative."""
        if not amount >= 0:
            raise ValueError(f"{self.name} only grows; it cannot take {amount}")
        key = self._place(labels)
        with self._lock:
            self._values[key] = self._values.get(key, 0) + amount


class Gauge(_Metric):
    """What goes up and down."""

    kind = "gauge"

    def set(self, value: float, /, **labels: Any) -> None:
        """The value is now this."""
        key = self._place(labels)
        with self._lock:
            self._values[key] = value

    def inc(self, amount: float = 1, /, **labels: Any) -> None:
        """Add an amount, which may be negative."""
        key = self._place(labels)
        with self._lock:
            self._values[key] = self._values.get(key, 0) + amount


class Histogram(_Metric):
    """Values by size.

    Args:    bounds: rising; see Distribution.
    """

    kind = "histogram"

    def __init__(self, name: str, help: str, labels: tuple[str, ...] = (), registry: Registry = REGISTRY, *,
                 bounds: tuple[float, ...] = SECONDS):
        assert list(bounds) == sorted(set(bounds)), f"the bounds of {name} must rise"
        self.bounds = tuple(bounds)
        super().__init__(name, help, labels, registry)

    def observe(self, value: float, /, **labels: Any) -> None:
        """There was this value."""
        key = self._place(labels)
        with self._lock:
            tally = self._values.get(key) or self._values.setdefault(key, self._zero())
            tally.add(value)

    def _zero(self):
        return Tally(self.bounds)

    def _shown(self, value):
        return value.distribution()


class Tally:
    """A Distribution in the making; not for two threads at once."""

    def __init__(self, bounds: tuple[float, ...]):
        self.bounds, self.counts, self.sum = bounds, [0] * (len(bounds) + 1), 0.0

    def add(self, value: float) -> None:
        """There was this value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def distribution(self) -> Distribution:
        """What there was so far."""
        return Distribution(self.bounds, tuple(self.counts), self.sum)


FAILURES = Counter("pyfleet_failures_total", "Groups of ranks, and attempts to form one, that failed, by kind of error.",
                   ("error",))
CONNECTION_ATTEMPTS = Counter("pyfleet_connection_attempts_total", "Attempts to connect to others, by how they ended: "
                              "connected, refused (in the handshake) or unreachable.", ("outcome",))
CONNECTIONS_REFUSED = Counter("pyfleet_connections_refused_total", "Connections of others that were turned away: for their "
                              "handshake, throttled (too many failures before), silent or crowded (too many at once).",
                              ("reason",))
HANDSHAKE_FAILURES = Counter("pyfleet_handshake_failures_total", "Handshakes that proved nothing, by the side this node was "
                             "on: dialled or accepted.", ("side",))
HEARTBEATS = Counter("pyfleet_heartbeats_total", "Heartbeats on control connections, by direction: sent or received.",
                     ("direction",))
HEARTBEAT_LATENCY = Histogram("pyfleet_heartbeat_latency_seconds", "Round trips of heartbeats on control connections.")
CONTROL_BYTES = Counter("pyfleet_control_bytes_total", "Bytes of control messages, by direction: sent or received.",
                        ("direction",))
ELECTIONS = Counter("pyfleet_elections_total", "Elections that this node took part in, by how they ended for it: won, lost "
                    "or failed.", ("outcome",))
VIEW_CHANGES = Counter("pyfleet_view_changes_total", "Views that came into force here.")
PEERS = Gauge("pyfleet_peers", "Nodes that this one knows, by state.", ("state",))


# ---- what engines count by themselves -------------------------------------------------------------------------------------

def traffic(stats: Mapping[str, Any], durations: Mapping[str, Distribution], failure: BaseException | None) -> list[Family]:
    """What one engine counted, as families.

    Args:    stats: as Engine.stats() tells.  durations: of the calls, by operation, in seconds.
             failure: what ended the engine's group, or None.
    """
    operations, messages = stats["operations"], stats.get("messages", {})
    sockets = [("collective", stats["links"]), ("message", messages.get("links", {}))]

    def family(name, kind, help, samples):
        return Family(OWN + name, kind, help, {_key(labels): value for labels, value in samples})

    def per_operation(what):
        return [({"operation": verb}, row[what]) for verb, row in operations.items()]

    def per_socket(what):
        return [({"peer": peer, "channel": channel}, link[what])
                for channel, links in sockets for peer, link in links.items()]

    return [
        family("operations_total", "counter", "Collective calls, failed ones too.", per_operation("calls")),
        family("operation_bytes_total", "counter", "Bytes of the arrays of collective calls.", per_operation("bytes")),
        family("operation_duration_seconds", "histogram", "How long collective calls took.",
               [({"operation": verb}, took) for verb, took in durations.items()]),
        family("messages_total", "counter", "Messages between two ranks, by direction: sent or received.",
               [({"direction": direction}, messages.get(what, 0))
                for direction, what in (("sent", "sends"), ("received", "receives"))]),
        family("message_bytes_total", "counter", "Bytes of whole messages between two ranks.",
               [({"direction": direction}, messages.get(f"{direction}_bytes", 0)) for direction in ("sent", "received")]),
        family("sent_bytes_total", "counter", "Bytes given to sockets, frames included.", per_socket("sent_bytes")),
        family("received_bytes_total", "counter", "Bytes taken from sockets, frames included.", per_socket("received_bytes")),
        family("shared_memory_read_bytes_total", "counter", "Bytes read from other ranks of this host.",
               [({}, stats["shared_memory"]["read_bytes"] + messages.get("read_bytes", 0))]),
        family("failures_total", "counter", FAILURES.help,
               [] if failure is None else [({"error": type(failure).__name__}, 1)]),
    ]


def log_metric(name: str, value: float, /, **labels: Any) -> None:
    """Show a number of the script's own beside pyfleet's: in fleet.metrics(), and wherever metrics are exported.

    The last value counts. Works before init() and without it.

    Args:    name: letters, digits and _; not pyfleet_...  labels: name=value; each combination is a series of its own, so
             they are for what repeats (phase="eval"), not for numbers that grow; beyond MOST_SERIES new ones are left out.
    Raises:  ConfigError for a name or label that Prometheus does not take; TypeError, ValueError when value is no number.
    """
    REGISTRY.log(name, value, labels)
