"""`python -m bench links`: the bound of unequal links, and a run on hosts of the test network."""
import json
import os
import subprocess
import sys

import pytest

from bench.links import all_reduce_floor_s
from bench.ranks import ROOT
from tests import network as networks


def run(*arguments, **environment):
    return subprocess.run([sys.executable, "-m", "bench", "links", *arguments], cwd=ROOT, capture_output=True, text=True,
                          timeout=120, check=False, env=os.environ | environment)


@pytest.mark.parametrize("rates,floor_s", [
    ([100.0, 100.0], 1.0),                      # each sends and receives half the array twice
    ([100.0] * 4, 1.5),
    ([100.0] * 4 + [10.0], 10.0),               # the slow one sends its array and receives the sum, and sums nothing up
    ([100.0, 100.0, 100.0, 90.0], 600 / 390),   # sums up a little less than the others
])
def test_the_bound_is_that_of_the_best_division_among_unequal_links(rates, floor_s):
    assert all_reduce_floor_s(100, rates) == pytest.approx(floor_s)


def test_no_division_among_unequal_links_beats_the_bound():
    import numpy as np
    from scipy.optimize import linprog
    draw = np.random.default_rng(5)
    for _ in range(50):
        rates = draw.uniform(1, 20, draw.integers(2, 7))
        size = len(rates)
        # Unknown: shares f, time t. Least t with (1 + (N-2) f_i) <= t B_i, the shares adding up to 1.
        best = linprog([0] * size + [1], A_ub=np.c_[(size - 2) * np.eye(size), -rates], b_ub=-np.ones(size),
                       A_eq=[[1] * size + [0]], b_eq=[1])
        assert all_reduce_floor_s(1, rates) == pytest.approx(best.fun)


@pytest.mark.parametrize("arguments,complaint", [
    (["--hosts", "1"], "2 hosts or more"), (["--rate", "fast"], "'fast' is no rate"), (["--sizes", "6"], "multiple of 4"),
    (["--systems", "pigeon"], "no system called 'pigeon'")])
def test_arguments_that_make_no_sense_are_usage_errors(arguments, complaint):
    refused = run(*arguments)
    assert refused.returncode == 2
    assert complaint in refused.stderr


def test_without_the_tools_it_says_what_is_missing(tmp_path):
    refused = run(PATH=str(tmp_path))
    assert refused.returncode == 2
    assert "no network of hosts: " in refused.stderr


@pytest.mark.parametrize("options,sent", [
    (["--hosts", "2"], 1.0), (["--hosts", "3", "--slow-host-rate", "200mbit"], 4 / 3)])
def test_systems_are_measured_between_hosts_beside_the_bound(tmp_path, options, sent):
    if reason := networks.unavailable():
        pytest.skip(f"no network of hosts: {reason}")
    done = run(*options, "--sizes", "4KB,1MB", "--reps", "3", "--systems", "fleet,ring,gloo", "--json", str(tmp_path / "l.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "l.json").read_text())["runs"][0]
    assert [(row["size"], row["system"]) for row in record["rows"]] == [
        (size, system) for size in (4096, 1 << 20) for system in ("fleet", "ring", "gloo")]
    for row in record["rows"]:
        assert len(row["seconds"]) == len(row["cpu_s"]) == 3
        assert all(0 < cpu_s < 4 * seconds for cpu_s, seconds in zip(row["cpu_s"], row["seconds"], strict=True))
        if row["size"] == 1 << 20:
            # Nothing is faster than the links, but for what their bursts let pass; nothing sends less than it must.
            bound_s = all_reduce_floor_s(row["size"], record["line_bytes_per_s"])
            assert min(row["seconds"]) > 0.6 * bound_s
            assert all(sent <= carried / row["size"] < 2.1 for carried in row["wire_bytes"])
    lines = [line.split() for line in done.stdout.splitlines() if " x 3 " in line]
    assert len(lines) == 6
    assert all(cell in done.stdout for cell in ("of line", "of TCP", "wire/size", "CPU x gloo", "headers leave"))
    assert record["socket_bytes_per_s"] < 1.1 * min(record["payload_bytes_per_s"])


@pytest.mark.slow
def test_compressed_systems_carry_their_share_of_the_bytes(tmp_path):
    if reason := networks.unavailable():
        pytest.skip(f"no network of hosts: {reason}")
    systems = {"fleet": 1.0, "fp16": 0.5, "int8": 0.257, "topk": 0.008, "auto": 0.257}
    done = run("--hosts", "2", "--rate", "200mbit", "--sizes", "4MB", "--reps", "3", "--systems", ",".join(systems),
               "--json", str(tmp_path / "l.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["system"]: row for row in json.loads((tmp_path / "l.json").read_text())["runs"][0]["rows"]}
    assert set(rows) == set(systems)
    for name, share in systems.items():
        for carried in rows[name]["wire_bytes"]:
            assert 0.8 * share < carried / (4 << 20) < 1.15 * share + 0.01
