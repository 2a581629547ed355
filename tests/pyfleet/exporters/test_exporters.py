"""Exporters: what a scrape or a line shows is what the process counted; what is in the way is told and harms nothing."""
import json
import logging
import os
import socket
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic

import numpy as np
import psutil
import pytest
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

import pyfleet
from pyfleet import exporters, metrics
from pyfleet.config import ClusterConfig
from pyfleet.errors import ConfigError
from pyfleet.exporters.jsonl import JsonLinesExporter
from pyfleet.exporters.prometheus import PrometheusExporter
from pyfleet.metrics import Counter, Gauge, Histogram, Registry


@pytest.fixture
def registry():
    return Registry()


@pytest.fixture
def serve(registry):
    """serve(**settings): the exporters that these settings open, closed with the test."""
    opened = []

    def get(local_rank=0, **settings):
        cluster = ClusterConfig(**settings)
        opened.extend(made := exporters.open_all(exporters.wanted(cluster), registry, cluster, 5, local_rank))
        return made
    yield get
    for each in opened:
        each.close()


FORMATS = {"text/plain": text_string_to_metric_families,        # as curl asks, and as Prometheus does
           "application/openmetrics-text": openmetrics.text_string_to_metric_families}


def scrape(port, form="text/plain"):
    """{(sample name, labels): value} of one scrape."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers={"Accept": f"{form};version=1.0.0"})
    with urllib.request.urlopen(request, timeout=20) as answer:
        assert answer.headers["Content-Type"].startswith(form)
        text = answer.read().decode()
    return {(sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in FORMATS[form](text) for sample in family.samples}


def free_ports(count):
    """The first of some ports in a row that are free now."""
    for first in range(20_000, 30_000, count):
        socks = []
        try:
            for port in range(first, first + count):
                socks.append(socket.create_server(("127.0.0.1", port)))
            return first
        except OSError:
            continue
        finally:
            for sock in socks:
                sock.close()
    raise AssertionError("no free ports")


@pytest.mark.parametrize("form", FORMATS)
def test_a_scrape_shows_every_kind(registry, serve, form):
    Counter("pyfleet_a_total", "A.", ("kind",), registry).inc(2, kind='odd "\\\n')
    Gauge("pyfleet_b", "B.", registry=registry).set(-1.5)
    histogram = Histogram("pyfleet_c_seconds", "C.", registry=registry, bounds=(0.1, 1.0))
    for value in (0.0625, 0.5, 7.0, 0.1):
        histogram.observe(value)
    registry.log("loss", 0.25, {"phase": "train"})
    registry.log("loss", 0.5, {})
    (exporter,) = serve(metrics_port=0)
    assert scrape(exporter.port, form) == {
        ("pyfleet_a_total", (("kind", 'odd "\\\n'),)): 2, ("pyfleet_b", ()): -1.5,
        ("pyfleet_c_seconds_bucket", (("le", "0.1"),)): 2, ("pyfleet_c_seconds_bucket", (("le", "1.0"),)): 3,
        ("pyfleet_c_seconds_bucket", (("le", "+Inf"),)): 4, ("pyfleet_c_seconds_count", ()): 4, ("pyfleet_c_seconds_sum", ()): 7.6625,
        ("loss", (("phase", "train"),)): 0.25, ("loss", ()): 0.5}


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_it_is_served_where_the_settings_say_and_only_there(serve, host):
    (exporter,) = serve(metrics_port=0, metrics_host=host)
    listens = {each.laddr.ip for each in psutil.Process().net_connections("tcp") if each.status == "LISTEN"
               and each.laddr.port == exporter.port}
    assert listens == {host}
    exporter.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, exporter.port), timeout=5).close()


def test_a_port_in_use_is_a_warning_that_names_it(serve, caplog):
    with socket.create_server(("127.0.0.1", 0)) as taken, caplog.at_level(logging.WARNING):
        port = taken.getsockname()[1]
        assert serve(local_rank=2, metrics_port=port - 2) == []
        assert f"rank 5 goes on without metrics: cannot serve them at 127.0.0.1:{port} (metrics_port {port - 2} + local rank 2): " \
               f"Address already in use" in caplog.text
        assert serve(local_rank=2, metrics_port=65535) == []
        assert "127.0.0.1:65537" in caplog.text


def test_without_the_package_the_setting_is_refused(monkeypatch):
    monkeypatch.setattr("pyfleet.exporters.prometheus.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"prometheus-client is not installed: pip install 'pyfleet\[metrics\]'"):
        pyfleet.init(config=ClusterConfig(metrics_port=0))
    assert not pyfleet.is_initialized()


def test_a_silent_client_does_not_keep_others_waiting(serve, registry):
    Gauge("pyfleet_b", "B.", registry=registry).set(1)
    (exporter,) = serve(metrics_port=0)
    with socket.create_connection(("127.0.0.1", exporter.port)) as silent:
        silent.sendall(b"GET /metr")
        assert scrape(exporter.port) == {("pyfleet_b", ()): 1}


def test_what_is_no_scrape_is_refused_politely(serve):
    (exporter,) = serve(metrics_port=0)
    with pytest.raises(urllib.error.HTTPError, match="405"):
        urllib.request.urlopen(f"http://127.0.0.1:{exporter.port}/metrics", data=b"x", timeout=20)
    with socket.create_connection(("127.0.0.1", exporter.port)) as rude:
        rude.sendall(bytes(100) + b"\r\n\r\n")
        assert b"400" in rude.recv(1000)
    assert scrape(exporter.port) == {}


def test_a_forked_child_lets_go_of_the_port(serve):
    (exporter,) = serve(metrics_port=0)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(write)
        os.read(read, 1)                # lives until the parent has looked
        os._exit(0)
    try:
        exporter.close()
        with socket.create_server(("127.0.0.1", exporter.port)):
            pass                        # nobody listens there any more
    finally:
        os.close(write)
        os.close(read)
        os.waitpid(child, 0)


# ---- lines in a file ------------------------------------------------------------------------------------------------------

def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_lines_come_in_time_and_at_the_end(registry, tmp_path):
    counter = Counter("pyfleet_a_total", "A.", ("kind",), registry)
    counter.inc(kind="x")
    exporter = JsonLinesExporter(registry, str(tmp_path / "m{rank}.jsonl"), 0.01, 3)
    assert wait_for(lambda: (tmp_path / "m3.jsonl").read_text().count("\n") >= 2)
    counter.inc(kind="x")
    exporter.close()
    exporter.close()
    found = lines(tmp_path / "m3.jsonl")
    assert found[-1] == {"time": found[-1]["time"], "rank": 3,
                         "metrics": {"pyfleet_a_total": [{"labels": {"kind": "x"}, "value": 2}]}}
    assert found[0]["metrics"]["pyfleet_a_total"][0]["value"] == 1
    assert [each["time"] for each in found] == sorted(each["time"] for each in found)


def wait_for(true):
    """Whether something becomes true within 20 s; looks as often as it can."""
    until = monotonic() + 20
    while not true():
        if monotonic() > until:
            return False
        os.sched_yield()
    return True


def test_a_file_that_cannot_be_written_is_a_warning(serve, tmp_path, caplog):
    assert serve(metrics_file=str(tmp_path / "no" / "m.jsonl")) == []
    assert "no/m.jsonl: No such file or directory" in caplog.text
    if sys.platform == "linux":
        (exporter,) = serve(metrics_file="/dev/full")
        exporter.close()
        assert "rank 5 writes no more metrics to /dev/full: No space left on device" in caplog.text


# ---- between processes ----------------------------------------------------------------------------------------------------

def work(count):
    for _ in range(count):
        pyfleet.all_reduce(np.ones(1000, np.float32))
    pyfleet.log_metric("loss", pyfleet.rank() + 0.5)
    snapshot = pyfleet.fleet.current().metrics()
    return {name: sum(each.get("value", each.get("count")) for each in family["samples"]) for name, family in snapshot.items()}


@pytest.mark.feature("P31")
def test_all_that_a_real_rank_counts_is_well_formed(fresh_ranks):
    """The parser of OpenMetrics is strict: names, types, rising buckets, counts that agree."""
    port = free_ports(2)
    group = fresh_ranks(2, "tcp", PYFLEET_METRICS_PORT=str(port))
    told = group.run(work, 2)
    for rank in range(2):
        names = {name for name, _ in scrape(port + rank, "application/openmetrics-text")}
        assert {"pyfleet_heartbeat_latency_seconds_count", "pyfleet_view_changes_total",
                "pyfleet_operation_duration_seconds_bucket"} <= names
        assert ("pyfleet_connection_attempts_total" in names) == (rank == 1)       # who dials the lower ranks
        assert {name for name in told[rank] if name.endswith("_total") and told[rank][name]} <= names


@pytest.mark.feature("P31")
def test_every_rank_of_two_is_scraped_over_http(fresh_ranks):
    port = free_ports(2)
    group = fresh_ranks(2, "tcp", PYFLEET_METRICS_PORT=str(port))
    verb = (("operation", "all_reduce"),)
    for total, count in ((3, 3), (10, 7)):
        told = group.run(work, count)
        for rank in range(2):
            found = scrape(port + rank)
            assert found["pyfleet_operations_total", verb] == total
            assert found["pyfleet_operation_bytes_total", verb] == 4000 * total
            assert found["pyfleet_operation_duration_seconds_count", verb] == total
            assert found["pyfleet_operation_duration_seconds_bucket", (("le", "+Inf"), *verb)] == total
            assert 0 < found["pyfleet_operation_duration_seconds_sum", verb] < 60
            assert (found["pyfleet_rank", ()], found["pyfleet_world_size", ()], found["loss", ()]) == (rank, 2, rank + 0.5)
            sent = sum(value for (name, _), value in found.items() if name == "pyfleet_sent_bytes_total")
            assert sent == told[rank]["pyfleet_sent_bytes_total"] > 4000 * total
    assert group.run(shut, port) == [True, True]


def shut(port):
    """The port is free again after shutdown()."""
    rank = pyfleet.rank()
    pyfleet.shutdown()
    with socket.create_server(("127.0.0.1", port + rank)):
        return True


def start_and_listen():
    """What the rank was warned of while it joined."""
    told = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    logging.getLogger("pyfleet").addHandler(handler)
    pyfleet.init()
    return told


@pytest.mark.feature("P31")
def test_a_taken_port_costs_one_rank_its_metrics_and_nothing_else(fresh_ranks):
    port = free_ports(2)
    with socket.create_server(("127.0.0.1", port + 1)):
        group = fresh_ranks(2, init=False, PYFLEET_METRICS_PORT=str(port))
        quiet, (told,) = group.run(start_and_listen)
        group.run(work, 2)
        assert scrape(port)["pyfleet_operations_total", (("operation", "all_reduce"),)] == 2
    assert quiet == [] and f"rank 1 goes on without metrics: cannot serve them at 127.0.0.1:{port + 1}" in told


@pytest.mark.feature("P31")
def test_ranks_share_a_file_of_lines(fresh_ranks, tmp_path):
    path = tmp_path / "m.jsonl"
    group = fresh_ranks(2, PYFLEET_METRICS_FILE=str(path), PYFLEET_METRICS_INTERVAL="0.01")
    group.run(work, 4)
    group.run(pyfleet.shutdown)
    found = lines(path)
    for rank in range(2):
        last = [line for line in found if line["rank"] == rank][-1]["metrics"]
        (reduced,) = [each for each in last["pyfleet_operations_total"] if each["labels"] == {"operation": "all_reduce"}]
        assert reduced["value"] == 4 and last["loss"][0]["value"] == rank + 0.5


def test_threads_as_ranks_have_one_endpoint():
    def one(rank):
        fleet = pyfleet.init(backend="mock", rank=rank, world_size=3, config=ClusterConfig(metrics_port=0))
        pyfleet.barrier()
        found = len(fleet.exporters)
        pyfleet.shutdown()
        return found

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(one, range(3))) == [1, 0, 0]
    assert "pyfleet_rank" not in metrics.REGISTRY.snapshot()


def test_an_exporter_per_setting():
    assert exporters.wanted(ClusterConfig()) == []
    assert exporters.wanted(ClusterConfig(metrics_port=1, metrics_file="x")) == [PrometheusExporter, JsonLinesExporter]
    assert {target.split(":")[0].removeprefix("pyfleet.exporters.") for target in exporters.EXPORTERS.values()} == {
        path.stem for path in Path(exporters.__file__).parent.glob("*.py")} - {"__init__", "base"}
