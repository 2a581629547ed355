"""Metrics: what is counted is what happened, and quantiles are where they must be."""
import gc
import json
import os
import threading

import numpy as np
import pytest
import torch

import pyfleet
from pyfleet import metrics
from pyfleet.calls import DURATION_BOUNDS_S
from pyfleet.errors import ConfigError
from pyfleet.metrics import Counter, Distribution, Family, Gauge, Histogram, Registry, Tally


@pytest.fixture
def registry():
    return Registry()


def values(registry, name):
    """{labels: value} of one name."""
    return next(family.samples for family in registry.collect() if family.name == name)


def test_counters_and_gauges_keep_a_value_per_combination_of_labels(registry):
    plain = Counter("a_total", "A.", registry=registry)
    counter = Counter("b_total", "B.", ("kind", "side"), registry)
    gauge = Gauge("c", "C.", ("state",), registry)
    assert values(registry, "a_total") == {(): 0} and values(registry, "b_total") == {}
    plain.inc()
    counter.inc(kind="x", side="in")
    counter.inc(2.5, side="in", kind="x")
    counter.inc(kind="y", side="in")
    gauge.set(3, state="up")
    gauge.inc(-1, state="up")
    assert values(registry, "a_total") == {(): 1}
    assert values(registry, "b_total") == {(("kind", "x"), ("side", "in")): 3.5, (("kind", "y"), ("side", "in")): 1}
    assert values(registry, "c") == {(("state", "up"),): 2}
    for wrong in (lambda: counter.inc(kind="x"), lambda: plain.inc(kind="x"), lambda: plain.inc(-1), lambda: gauge.set(1)):
        with pytest.raises(ValueError, match=r"has the labels|only grows"):
            wrong()
    with pytest.raises(AssertionError, match="is there already"):
        Counter("a_total", "Again.", registry=registry)


def test_threads_lose_no_count(registry):
    counter = Counter("a_total", "A.", ("worker",), registry)
    histogram = Histogram("b_seconds", "B.", registry=registry, bounds=(1.0, 2.0))
    gate = threading.Barrier(8)

    def work(number):
        gate.wait(30)
        for _ in range(2000):
            counter.inc(worker=number % 2)
            histogram.observe(number)
            registry.collect()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert values(registry, "a_total") == {(("worker", "0"),): 8000, (("worker", "1"),): 8000}
    assert values(registry, "b_seconds")[()] == Distribution((1.0, 2.0), (4000, 2000, 10000), 56000.0)


@pytest.mark.feature("P31")
@pytest.mark.parametrize("seed", range(5))
def test_quantiles_are_within_a_quarter_of_the_true_ones_and_counts_are_exact(seed):
    times = np.random.default_rng(seed).lognormal(-9 + 2 * seed, 1.5, 20_000)      # 100 us to 0.4 s
    tally = Tally(DURATION_BOUNDS_S)
    for value in times:
        tally.add(value)
    found = tally.distribution()
    assert found.count == 20_000 and found.sum == pytest.approx(times.sum())
    for q in (0.01, 0.5, 0.9, 0.99, 0.999):
        assert found.quantile(q) == pytest.approx(np.quantile(times, q), rel=0.25)
    shown = found.cumulative()
    assert len(shown) <= metrics.MOST_BUCKETS and shown[-1] == (float("inf"), 20_000)
    assert shown == [(bound, int((times <= bound).sum())) for bound, _ in shown]


def test_quantiles_at_the_edges():
    assert Distribution((1.0, 2.0), (0, 0, 0)).quantile(0.5) is None
    assert Distribution((1.0, 2.0), (0, 0, 7), 99.0).quantile(0.5) == 2.0          # above all bounds
    assert Distribution((1.0, 2.0), (0, 4, 0), 6.0).quantile(0.5) == 1.5
    assert Distribution((1.0, 2.0), (4, 0, 0), 2.0).quantile(0.0) == 0.0
    exact = Tally((1.0, 2.0))
    exact.add(1.0)                              # a bound is the end of its bucket
    assert exact.distribution().counts == (1, 0, 0)


class Engine:
    """A source: a counter, a gauge and a histogram that follow `calls`."""

    def __init__(self, calls):
        self.calls = calls

    def families(self):
        return [Family("calls_total", "counter", "C.", {(): self.calls}), Family("epoch", "gauge", "E.", {(): self.calls}),
                Family("took_seconds", "histogram", "T.", {(): Distribution((1.0,), (self.calls, 0), self.calls / 2)})]


def test_what_a_source_counted_outlives_it_and_its_gauges_do_not(registry):
    first, second = Engine(3), Engine(4)
    registry.attach(first.families)
    registry.attach(second.families)
    assert values(registry, "calls_total") == {(): 7}
    first.calls = 5
    registry.detach(first.families)
    registry.detach(first.families)
    first.calls = 1000
    second.calls = 6
    assert values(registry, "calls_total") == {(): 11}
    assert values(registry, "epoch") == {(): 6}
    assert values(registry, "took_seconds") == {(): Distribution((1.0,), (11, 0), 5.5)}
    registry.detach(second.families)
    assert "epoch" not in registry.snapshot() and values(registry, "calls_total") == {(): 11}


def test_a_source_that_is_forgotten_is_no_leak(registry):
    engine = Engine(3)
    registry.attach(engine.families)
    del engine
    gc.collect()
    assert registry.collect() == []


def test_a_snapshot_is_json_and_says_what_a_reader_needs(registry):
    Histogram("b_seconds", "B.", ("verb",), registry, bounds=(1.0, 3.0)).observe(2.0, verb="x")
    Gauge("a", "A.", registry=registry).set(float("nan"))
    assert json.loads(json.dumps(registry.snapshot(), allow_nan=False)) == {
        "a": {"type": "gauge", "help": "A.", "samples": [{"labels": {}, "value": "nan"}]},
        "b_seconds": {"type": "histogram", "help": "B.", "samples": [
            {"labels": {"verb": "x"}, "count": 1, "sum": 2.0, "p50": 2.0, "p99": 2.98, "buckets": [[1.0, 0], [3.0, 1], ["+Inf", 1]]}]}}


def test_a_forked_child_counts_for_itself():
    """What its parent counted is not its own, and a lock that another thread of the parent held is not held for ever."""
    metrics.VIEW_CHANGES.inc()
    with metrics.REGISTRY._lock, metrics.VIEW_CHANGES._lock:
        child = os.fork()
        if child == 0:
            try:
                before = values(metrics.REGISTRY, "pyfleet_view_changes_total")
                metrics.VIEW_CHANGES.inc()
                after = values(metrics.REGISTRY, "pyfleet_view_changes_total")
                os._exit(0 if (before, after) == ({(): 0}, {(): 1}) else 1)
            finally:
                os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# ---- what a script logs -----------------------------------------------------------------------------------------------

def test_logged_metrics_keep_the_last_value_of_each_combination(registry):
    for value in (1, 2.5, torch.tensor(0.25)):
        registry.log("loss", value, {"phase": "train"})
    registry.log("loss", 7, {})
    assert values(registry, "loss") == {(("phase", "train"),): 0.25, (): 7.0}


@pytest.mark.parametrize(("name", "labels", "told"), [
    ("pyfleet_epoch", {}, "does not begin with pyfleet_"), ("train loss", {}, "unlike 'train loss'"), ("", {}, "unlike ''"),
    (3, {}, "unlike 3"), ("loss", {"__name__": 1}, "unlike '__name__'"), ("loss", {"a-b": 1}, "unlike 'a-b'"),
])
def test_names_that_prometheus_would_not_take_are_refused(name, labels, told):
    with pytest.raises(ConfigError, match=told):
        pyfleet.log_metric(name, 1.0, **labels)


def test_what_is_no_number_is_refused():
    with pytest.raises(ValueError, match="could not convert"):
        pyfleet.log_metric("loss", "low")


def test_labels_that_never_repeat_do_not_fill_the_memory(registry, caplog):
    for step in range(metrics.MOST_SERIES + 5):
        registry.log("loss", step, {"step": step})
    registry.log("loss", 99, {"step": 0})
    assert len(values(registry, "loss")) == metrics.MOST_SERIES and values(registry, "loss")[("step", "0"),] == 99
    assert "{'step': 1004} is left out" in caplog.text


@pytest.mark.feature("C85")
def test_a_callback_reports_every_epoch_once():
    seen = []

    def report(epoch, loss):
        pyfleet.log_metric("reported_loss", loss, phase="train")
        seen.append((epoch, loss))

    data = torch.utils.data.TensorDataset(torch.arange(8.0)[:, None], torch.zeros(8, 1))
    pyfleet.Trainer(torch.nn.Linear(1, 1), data, pyfleet.TrainingConfig(epochs=3, batch_size=4, progress=False, learning_rate=1e-3),
                    loss_fn=torch.nn.functional.mse_loss, callbacks=[report]).fit()
    try:
        assert [epoch for epoch, _ in seen] == [0, 1, 2]
        assert pyfleet.init().metrics()["reported_loss"]["samples"] == [{"labels": {"phase": "train"}, "value": seen[-1][1]}]
    finally:
        pyfleet.shutdown()


# ---- what engines count -----------------------------------------------------------------------------------------------

def counted(name, **labels):
    """The sum of this process's samples that have these labels; of a histogram, how many values."""
    samples = metrics.REGISTRY.snapshot().get(name, {"samples": []})["samples"]
    return sum(each.get("value", each.get("count")) for each in samples if labels.items() <= each["labels"].items())


NAMES = [("pyfleet_operations_total", {"operation": "all_reduce"}), ("pyfleet_operation_bytes_total", {"operation": "all_reduce"}),
         ("pyfleet_operation_duration_seconds", {"operation": "all_reduce"}), ("pyfleet_operations_total", {"operation": "barrier"}),
         ("pyfleet_operations_total", {"operation": "broadcast"}), ("pyfleet_messages_total", {"direction": "sent"}),
         ("pyfleet_message_bytes_total", {"direction": "sent"}), ("pyfleet_failures_total", {})]
BYTES = [("pyfleet_sent_bytes_total", {}), ("pyfleet_received_bytes_total", {}), ("pyfleet_shared_memory_read_bytes_total", {})]


def known_workload(num_elems):
    """What the counters moved by: NAMES, then BYTES."""
    pyfleet.barrier()
    x = np.ones(num_elems, np.float32)
    before = [counted(name, **labels) for name, labels in NAMES + BYTES]
    for _ in range(5):
        pyfleet.all_reduce(x)
    pyfleet.broadcast(x, 1)
    if pyfleet.rank() == 0:
        pyfleet.send(np.ones(25), 1)
    else:
        pyfleet.recv(np.ones(25), 0)
    after = [counted(name, **labels) for name, labels in NAMES + BYTES]
    pyfleet.barrier()           # nobody counts on before all have read
    return [now - then for now, then in zip(after, before, strict=True)]


@pytest.mark.feature("P31")
@pytest.mark.parametrize("transport", ["tcp", "shm"])
def test_counters_move_by_exactly_the_traffic(ranks, transport):
    payload = 400_000 * 6               # of two ranks, each sends an array's worth per all_reduce; the broadcast goes one way
    for rank, moved in enumerate(pair := ranks(2, transport).run(known_workload, 100_000)):
        sent = (1, 200) if rank == 0 else (0, 0)
        assert moved[:len(NAMES)] == [5, 2_000_000, 5, 0, 1, *sent, 0]
    (sent0, received0, read0), (sent1, received1, read1) = (moved[len(NAMES):] for moved in pair)
    if transport == "tcp":
        assert (sent0, sent1) == (received1, received0) and (read0, read1) == (0, 0)
        assert payload - 400_000 + 200 <= sent0 <= 1.01 * payload and payload <= sent1 <= 1.01 * payload
    else:
        assert 200 <= sent0 == received1 < 400 and (sent1, received0) == (0, 0)       # the message alone takes a socket


def durations_agree():
    """The histogram against the timeline of the same calls."""
    engine = pyfleet.fleet.current().engine
    pyfleet.barrier()

    def histogram():
        family = next(family for family in engine.families() if family.name == "pyfleet_operation_duration_seconds")
        return family.samples[("operation", "all_gather"),]

    pyfleet.all_gather(np.ones(1))
    before = histogram()
    engine.record()
    for n in (1, 10, 1000, 100_000, 1_000_000) * 8:
        pyfleet.all_gather_into(np.empty(2 * n), np.ones(n))
    took = np.array([ended - began for verb, _, began, ended, _ in engine.recorded() if verb == "all_gather"])
    engine.record(False)
    after = histogram()
    moved = Distribution(after.bounds, tuple(a - b for a, b in zip(after.counts, before.counts, strict=True)), after.sum - before.sum)
    assert moved.count == len(took) == 40
    assert moved.sum == pytest.approx(took.sum(), rel=0.05, abs=1e-5)       # the timeline reads the clock a little later
    for q in (0.1, 0.5, 0.99):
        assert moved.quantile(q) == pytest.approx(np.quantile(took, q, method="inverted_cdf"), rel=0.3, abs=2e-6)
    return True


@pytest.mark.feature("P31")
@pytest.mark.parametrize("transport", ["tcp", "shm"])
def test_durations_are_those_of_the_calls(ranks, transport):
    assert ranks(2, transport).run(durations_agree) == [True, True]


def sub_group_and_shutdown():
    before = counted("pyfleet_operations_total", operation="all_reduce")
    group = pyfleet.new_group([1, 0])
    for _ in range(3):
        pyfleet.all_reduce(np.ones(10), group=group)
    steps = [counted("pyfleet_operations_total", operation="all_reduce") - before]
    group.close()
    steps.append(counted("pyfleet_operations_total", operation="all_reduce") - before)
    gauges = [metrics.REGISTRY.snapshot()[f"pyfleet_{name}"]["samples"][0]["value"] for name in ("rank", "world_size", "epoch", "is_leader")]
    pyfleet.shutdown()
    steps.append(counted("pyfleet_operations_total", operation="all_reduce") - before)
    return steps, gauges, "pyfleet_rank" in metrics.REGISTRY.snapshot(), counted("pyfleet_failures_total")


def test_counts_outlive_their_groups_and_an_orderly_end_is_no_failure(fresh_ranks):
    assert fresh_ranks(2).run(sub_group_and_shutdown) == [
        ([3, 3, 3], [0, 2, 0, 1], False, 0), ([3, 3, 3], [1, 2, 0, 0], False, 0)]


def peers_of_a_group():
    """Whose bytes are counted while a group in another order works."""
    group, peer = pyfleet.new_group([1, 0]), 1 - pyfleet.rank()
    before = [counted("pyfleet_sent_bytes_total", peer=other) for other in ("0", "1")]
    pyfleet.all_reduce(np.ones(10_000), group=group)
    after = [counted("pyfleet_sent_bytes_total", peer=other) for other in ("0", "1")]
    group.close()
    return after[peer] - before[peer] >= 80_000, after[1 - peer] - before[1 - peer]


def test_peers_have_their_number_in_the_fleet(ranks):
    assert ranks(2, "tcp").run(peers_of_a_group) == [(True, 0), (True, 0)]


def survive():
    with pytest.raises(pyfleet.PeerLost):
        pyfleet.all_reduce(np.ones(10))
    with pytest.raises(pyfleet.PeerLost):           # the group is dead already: no failure of its own
        pyfleet.all_reduce(np.ones(10))
    during = counted("pyfleet_failures_total", error="PeerLost")
    pyfleet.shutdown()
    return during, counted("pyfleet_failures_total", error="PeerLost"), counted("pyfleet_failures_total")


@pytest.mark.feature("P31")
@pytest.mark.parametrize("transport", ["tcp", "shm"])
def test_a_failure_is_counted_once_by_its_kind(fresh_ranks, transport):
    group = fresh_ranks(2, transport)
    group.kill(1)
    assert group.run(survive, only=[0]) == [(1, 1, 1)]


def compressed():
    before = [counted(f"pyfleet_compression_{what}_bytes_total", compression="bf16") for what in ("sent", "dense")]
    pyfleet.all_reduce(np.ones(1000, np.float32), compression="bf16")
    return [counted(f"pyfleet_compression_{what}_bytes_total", compression="bf16") - then
            for what, then in zip(("sent", "dense"), before, strict=True)]


def test_compression_is_counted_by_its_name(ranks):
    for sent, dense in ranks(2, "tcp").run(compressed):
        assert sent * 2 == dense > 0


def test_an_attempt_that_found_nobody_is_a_failure():
    before = counted("pyfleet_failures_total", error="NotEnoughPeers")
    with pytest.raises(pyfleet.NotEnoughPeers):
        pyfleet.init(peers=["127.0.0.1:1", "127.0.0.1:2"], rank=1, timeout=0.1)
    assert counted("pyfleet_failures_total", error="NotEnoughPeers") == before + 1


def test_other_engines_count_too(thread_ranks):
    from pyfleet.testing import run_ranks

    def work():
        x = np.ones(10)
        pyfleet.all_reduce(x)
        return x[0]

    before = [counted(name, operation="all_reduce") for name in ("pyfleet_operations_total", "pyfleet_operation_duration_seconds")]
    assert run_ranks(work, world_size=3) == [3.0] * 3
    after = [counted(name, operation="all_reduce") for name in ("pyfleet_operations_total", "pyfleet_operation_duration_seconds")]
    assert [now - then for now, then in zip(after, before, strict=True)] == [3, 3]      # of all ranks in the process
