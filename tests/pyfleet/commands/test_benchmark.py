"""pyfleet benchmark: what it measures is what moved, between processes and between hosts; and it shows the bound beside it."""
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pyfleet import barrier, init, rank, recv, send
from pyfleet.benchmarks.base import MIN_REPS, Ranks
from pyfleet.benchmarks.compression import METHODS
from pyfleet.commands import benchmark
from pyfleet.compressors import parse_spec
from pyfleet.errors import FleetError
from pyfleet.fleet import current

ROOT = Path(__file__).parents[3]


def run(*arguments, **environment):
    return subprocess.run([sys.executable, "-m", "pyfleet", "benchmark", *arguments], cwd=ROOT, env=os.environ | environment,
                          capture_output=True, text=True, timeout=120, check=False)


def measured(*arguments, **environment):
    done = run(*arguments, "--json", **environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1             # one rank speaks for all
    return json.loads(done.stdout)


def on_hosts(hosts, *arguments):
    """What rank 0 tells when every host runs the command as one rank."""
    command = [sys.executable, "-m", "pyfleet", "benchmark", *arguments, "--json"]
    meet = {"MASTER_ADDR": hosts.address(0), "MASTER_PORT": "29500", "WORLD_SIZE": str(hosts.num_hosts),
            "PYFLEET_IFACE": "eth0", "PYFLEET_ENCRYPTION": "off"}
    processes = [hosts.popen(host, command, meet | {"RANK": str(host)}, cwd=ROOT, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True) for host in range(hosts.num_hosts)]
    told = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), told
    assert all(out == "" for out, _ in told[1:])
    return json.loads(told[0][0])


@pytest.mark.slow
@pytest.mark.feature("M14", "M35")
def test_bandwidth_is_that_of_the_link(network):
    hosts = network(2, "200mbit")
    told = on_hosts(hosts, "bandwidth", "--sizes", "4MB")
    assert (told["ranks"], told["hosts"], told["path"], told["bound"]) == (2, 2, "links over TCP", "plain sockets")
    assert [(row["size"], row["from"], row["to"]) for row in told["rows"]] == [
        (4 << 20, source, 1 - source) for source in (0, 1)]
    for row in told["rows"]:
        assert row["bytes_per_s"] == pytest.approx(row["size"] / statistics.median(row["seconds"]))
        assert row["bytes_per_s"] == pytest.approx(hosts.bytes_per_s(0), rel=0.1)
        assert row["bound_bytes_per_s"] == pytest.approx(hosts.bytes_per_s(0), rel=0.1)
        assert 0 < row["serialize_s"] < 0.01 and 0 <= row["deserialize_s"] < 0.01
    assert 0 < told["latency_s"] < 0.01
    sent, received = hosts.traffic(0)
    moved = sum(row["size"] * len(row["seconds"]) for row in told["rows"]) / 2   # each way
    assert min(sent, received) > moved


@pytest.mark.slow
@pytest.mark.feature("M15")
def test_all_reduce_between_hosts_is_not_faster_than_its_bound(network):
    hosts = network(3, "200mbit")
    told = on_hosts(hosts, "allreduce", "--sizes", "4B,4MB", "--rivals")
    assert [(row["size"], row["system"]) for row in told["rows"]] == [
        (size, system) for size in (4, 4 << 20) for system in ("links", "gloo")]
    bound = hosts.bytes_per_s(0) * 3 / 4
    for row in told["rows"]:
        assert row["bound_bytes_per_s"] == pytest.approx(bound, rel=0.1)
        if row["size"] > 4:
            assert 0.5 * bound < row["bytes_per_s"] < 1.1 * bound


@pytest.mark.feature("M14", "M35")
def test_the_bandwidth_table_has_a_row_for_each_size_and_direction():
    done = run("bandwidth", "--sizes", "64KB,1MB", PYFLEET_TRANSPORT="tcp")
    assert done.returncode == 0, done.stderr
    first, latency, header, *rows = done.stdout.splitlines()
    assert "2 ranks on 1 host(s), links over TCP; the bound is plain sockets" in first
    assert latency.startswith("latency of 4 bytes, one way: ") and latency.endswith(" us")
    assert header.split("  ")[0] == "size" and "GB/s  ser ms" in header and "de ms" in header and "of bound" in header
    assert [" ".join(row.split()[:5]) for row in rows] == [
        "64 KB 0 -> 1", "64 KB 1 -> 0", "1 MB 0 -> 1", "1 MB 1 -> 0"]
    assert all(row.endswith(" %") for row in rows)


@pytest.mark.slow
@pytest.mark.feature("M14", "M35")
def test_every_rank_and_the_next_one_are_a_link():
    told = measured("bandwidth", "--nproc", "3", "--sizes", "64KB", PYFLEET_TRANSPORT="tcp")
    assert told["ranks"] == 3
    assert [(row["from"], row["to"]) for row in told["rows"]] == [(0, 1), (1, 0), (1, 2), (2, 1), (2, 0), (0, 2)]
    assert all(row["bound_bytes_per_s"] > 1e7 and row["latency_s"] > 0 for row in told["rows"])
    assert benchmark._links(2) == [(0, 1), (1, 0)]


@pytest.mark.slow
def test_a_slow_link_is_the_one_whose_rows_are_slow(network):
    hosts = network(3, "1gbit", rates={2: "300mbit"})
    told = on_hosts(hosts, "bandwidth", "--sizes", "4MB")
    for row in told["rows"]:
        slowest = 2 if 2 in (row["from"], row["to"]) else 0
        assert row["bytes_per_s"] == pytest.approx(hosts.bytes_per_s(slowest), rel=0.15), row
        assert row["bound_bytes_per_s"] == pytest.approx(hosts.bytes_per_s(slowest), rel=0.15), row


@pytest.mark.feature("M15")
@pytest.mark.parametrize(("transport", "systems"), [("shm", ["arena", "ordinary"]), ("tcp", ["links"])])
def test_all_reduce_is_measured_on_every_path(transport, systems):
    told = measured("allreduce", "--nproc", "3", "--sizes", "4B,1MB", PYFLEET_TRANSPORT=transport)
    assert told["ranks"] == 3
    assert [(row["size"], row["system"]) for row in told["rows"]] == [(size, name) for size in (4, 1 << 20) for name in systems]
    for row in told["rows"]:
        assert len(row["seconds"]) > MIN_REPS and all(seconds > 0 for seconds in row["seconds"])
        assert row["bytes_per_s"] == pytest.approx(row["size"] / statistics.median(row["seconds"]))
        assert row["bound_bytes_per_s"] > 1e7


def test_bandwidth_of_shared_memory_is_shown_beside_a_copy():
    told = measured("bandwidth", "--sizes", "1MB", PYFLEET_TRANSPORT="shm")
    assert (told["path"], told["bound"]) == ("shared memory", "a copy in memory")
    assert len(told["rows"]) == 2


@pytest.mark.parametrize("rivals", (False, True))
def test_kernels_are_measured_beside_a_copy(rivals):
    told = measured("kernels", "--sizes", "4KB,256KB", *["--rivals"] * rivals)
    names = [row["system"] for row in told["rows"] if row["size"] == 4096]
    assert len(told["rows"]) == 2 * len(names) and len(names) == 5 + 3 * rivals
    assert names[0] == "copy (numpy)" and any(name.startswith("crc32c (") for name in names)
    copy = {row["size"]: row for row in told["rows"] if row["system"] == "copy (numpy)"}
    for row in told["rows"]:
        assert row["bytes_per_s"] > 0
        assert row["bound_bytes_per_s"] == pytest.approx(copy[row["size"]]["bytes_per_s"])


def send_encodings(specs):
    """[bytes that left the socket for the encoding of 64 KB], in rank 0; rank 1 decodes and adds what comes."""
    init()
    sent = []
    for spec in specs:
        compressor = parse_spec(spec)
        compressor.bind([(128, 128)])
        x = np.random.default_rng(0).standard_normal(1 << 14, np.float32)
        before = socket_bytes()
        if rank() == 0:
            out = np.zeros(compressor.wire_bytes(x.size), np.uint8)
            send(out[:compressor.encode(x, out)], 1)
        else:
            total = np.zeros_like(x)
            compressor.decode_add(recv(src=0), total)
            assert np.any(total)
        barrier()
        sent.append(socket_bytes() - before)
    return sent


def socket_bytes():
    return sum(link["sent_bytes"] for link in current().stats()["messages"]["links"].values())


@pytest.mark.feature("M36")
def test_the_ratio_of_a_compressor_is_what_its_encodings_are_at_the_socket(ranks):
    told = measured("compression", "--sizes", "64KB")
    assert (told["benchmark"], [row["size"] for row in told["rows"]]) == ("compression", [1 << 16] * len(told["rows"]))
    sent, _ = ranks(2, "tcp").run(send_encodings, [row["system"] for row in told["rows"]])
    for row, num_bytes in zip(told["rows"], sent, strict=True):
        assert row["encoded_bytes"] <= num_bytes < row["encoded_bytes"] + 400, row["system"]    # frame, note, a barrier
    ratio = {row["system"]: row["encoded_bytes"] / row["size"] for row in told["rows"]}
    error = {row["system"]: row["error"] for row in told["rows"]}
    assert ratio["none"] == 1 and error["none"] == 0
    assert ratio["fp16"] == 0.5 and 0 < error["fp16"] < 2**-11
    # The index of one element in ten takes log2(10) + 1.4 bits or a little less.
    assert 0.1 < ratio["topk"] < 0.1 + 0.1 * (3.33 + 1.5) / 32 + 0.001
    assert 0.05 < ratio["topk+fp16"] < ratio["topk"] - 0.049
    for row in told["rows"]:
        assert len(row["encode_s"]) == len(row["decode_s"]) >= MIN_REPS
        assert len(row["feedback_s"]) == (len(row["encode_s"]) if row["error"] else 0)


@pytest.mark.feature("M36")
def test_the_compression_table_names_ratio_error_and_overhead():
    done = run("compression", "--sizes", "16KB")
    assert done.returncode == 0, done.stderr
    first, header, *rows = done.stdout.splitlines()
    assert first.startswith("compression: one thread")
    assert header.split() == ["size", "method", "of", "float32", "error", "encode", "GB/s", "decode", "GB/s", "feedback", "GB/s",
                              "overhead", "ms"]
    assert rows[0].split()[:6] == ["16", "KB", "none", "100.00", "%", "0"] and len(rows) == len(METHODS)
    assert rows[1].split()[2:5] == ["fp16", "50.00", "%"]


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_a_training_step_is_measured_on_one_to_all_ranks(transport):
    told = measured("step", "--nproc", "3", "--sizes", "64KB", PYFLEET_TRANSPORT=transport)
    assert [(row["size"], row["ranks"]) for row in told["rows"]] == [(8 * (90 * 90 + 90), n) for n in (1, 2, 3)]
    for row in told["rows"]:
        assert len(row["seconds"]) == len(row["compute_s"]) == len(row["communication_s"]) >= MIN_REPS
        assert row["samples_per_s"] == pytest.approx(row["ranks"] * told["batch"] / statistics.median(row["seconds"]))
        assert row["efficiency"] == pytest.approx(row["samples_per_s"] / told["rows"][0]["samples_per_s"] / row["ranks"])
        assert all(seconds > 0 for seconds in row["compute_s"])
    busy = [statistics.median(row["communication_s"]) for row in told["rows"]]
    assert min(busy[1:]) > busy[0]


def sum_wrongly():
    ranks = Ranks()
    x = benchmark.np.zeros(10, benchmark.np.float32)
    benchmark._demand_right("fine", x, lambda: ranks.all_reduce(x), ranks)
    try:
        benchmark._demand_right("idle", x, lambda: None if ranks.rank else ranks.barrier, ranks)
    except FleetError as error:
        return str(error)


def test_a_system_that_sums_wrongly_is_not_measured(ranks):
    assert ranks(2).run(sum_wrongly) == ["idle: WRONG SUM of 40 bytes"] * 2


def samples_of_unequal_ranks():
    ranks, calls = Ranks(), [0]

    def call():
        calls[0] += 1
        return 0.1 * (ranks.rank + 1)
    (seconds,) = ranks.samples(call)
    return len(seconds), set(seconds), calls[0], ranks.tell(f"I am {ranks.rank}")


def test_the_slowest_rank_counts_and_all_take_as_many_samples(ranks):
    (first, *others) = ranks(3).run(samples_of_unequal_ranks)
    assert all(other == first for other in others)
    number, seconds, calls, told = first
    assert seconds == {0.1 * 3} and number == MIN_REPS + 1 and calls == number + 2
    assert told == ["I am 0", "I am 1", "I am 2"]


@pytest.mark.parametrize(("arguments", "complaint"), [
    ([], "what is to be measured: bandwidth, allreduce, compression, kernels, step"),
    (["kernel"], "cannot measure 'kernel'; did you mean kernels?"),
    (["bandwidth", "more"], "cannot measure 'more': one of bandwidth, allreduce, compression, kernels, step"),
    (["bandwidth", "--nproc", "1"], "--nproc must be a number >= 2, got 1"),
    (["allreduce", "--nproc", "1"], "--nproc must be a number >= 2, got 1"),
    (["allreduce", "--sizes", "3"], "--sizes must be bytes such as 4B, 64KB or 25MB, multiples of 4, got '3'"),
    (["allreduce", "--sizes", "1MB,fast"], "multiples of 4, got 'fast'"),
    (["allreduce", "--rival"], "unknown option --rival; did you mean --rivals?"),
])
def test_wrong_arguments(capsys, arguments, complaint):
    assert benchmark.main(arguments) == 2
    told = capsys.readouterr()
    assert told.out == "" and complaint in told.err and told.err.count("\n") == 1
