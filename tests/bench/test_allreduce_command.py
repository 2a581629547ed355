"""`python -m bench allreduce` end to end, and what it makes of systems that misbehave."""
import csv
import json
import subprocess
import sys

import pytest

from bench.ranks import ROOT, Ranks
from bench.systems import SYSTEMS


def run(*arguments):
    return subprocess.run([sys.executable, "-m", "bench", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120,
                          check=False)


def test_the_benchmarks_are_listed_with_their_purpose():
    listed = run()
    assert listed.returncode == 0
    assert "allreduce" in listed.stdout
    assert "CPU time burnt while waiting" in listed.stdout
    assert run("nonsense").returncode == 2


@pytest.mark.parametrize("arguments,complaint", [
    (["--sizes", "6"], "multiple of 4 bytes"), (["--sizes", "many"], "invalid"), (["--ranks", "1"], "2 ranks or more"),
    (["--systems", "pigeon"], "no system called 'pigeon'")])
def test_arguments_that_make_no_sense_are_usage_errors(arguments, complaint):
    refused = run("allreduce", *arguments)
    assert refused.returncode == 2
    assert complaint in refused.stderr


def test_gloo_is_measured_and_every_sample_is_written(tmp_path):
    pytest.importorskip("torch.distributed")
    done = run("allreduce", "--sizes", "4,4096", "--reps", "3", "--ranks", "2", "--systems", "gloo", "--no-bounds",
               "--json", str(tmp_path / "all.json"), "--csv", str(tmp_path / "all.csv"))
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.split() for line in done.stdout.splitlines() if " gloo " in line and " x 3 " in line]
    assert [line[:3] for line in lines] == [["4", "B", "gloo"], ["4", "KB", "gloo"]]
    record = json.loads((tmp_path / "all.json").read_text())
    assert [len(row["seconds"]) for row in record["runs"][0]["rows"]] == [3, 3]
    assert {"cpu", "congestion control", "torch"} <= record["machine"].keys()
    with open(tmp_path / "all.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["size_bytes"] for row in rows] == ["4", "4096"]
    assert all(0 < float(row["min_s"]) <= float(row["median_s"]) <= float(row["max_s"]) for row in rows)


MISBEHAVING = '''
import numpy as np
from bench import allreduce, systems

class Fake(systems._InPlace):
    """Knows every rank's share in advance: all ranks hold the ramp times rank + 1."""
    bound = "memory"
    def start(self, rank, size, folder): self.rank, self.size, self.calls = rank, size, 0
    def array(self, num_elems): return np.empty(num_elems, np.float32)
    def call(self, handle): handle *= self.size * (self.size + 1) // 2 / (self.rank + 1)
    def close(self): pass

class Wrong(Fake):
    def call(self, handle):
        super().call(handle)
        if self.rank == 1 and handle.size == 2: handle[1] += 1

class Absent(Fake):
    def start(self, rank, size, folder):
        if rank == 1: raise RuntimeError("nobody home")

class Tired(Fake):
    def call(self, handle):
        super().call(handle)
        self.calls += 1
        if self.rank == 0 and self.calls == 9: raise OSError("no more")

def rank_main(team, options):
    systems.SYSTEMS |= {kind.__name__.lower(): f"misbehaving:{kind.__name__}" for kind in (Fake, Wrong, Absent, Tired)}
    allreduce.rank_main(team, options)
'''


def test_a_system_that_misbehaves_is_a_row_and_the_others_go_on(tmp_path, monkeypatch):
    (tmp_path / "misbehaving.py").write_text(MISBEHAVING)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    options = {"systems": ["wrong", "absent", "tired", "lost", "fake"], "sizes": [4, 8, 16], "reps": 2, "budget": 1,
               "bounds": False}
    with Ranks("misbehaving", 2, options) as ranks:
        events = list(ranks.events())
    troubles = [(event["system"], event["size"], event["reason"]) for event in events if event["kind"] == "trouble"]
    assert troubles == [
        ("absent", None, "RuntimeError: nobody home"),
        ("lost", None, "KeyError: 'lost'"),
        ("tired", 4, "OSError: no more"),
        ("wrong", 8, "ArithmeticError: WRONG RESULT in 1 of 2 elements, first in element 1: 4.0, not 3.0"),
    ]
    measured = {event["size"]: [row["system"] for row in event["rows"]] for event in events if event["kind"] == "size"}
    assert measured == {4: ["wrong", "fake"], 8: ["fake"], 16: ["fake"]}
    assert "lost" not in SYSTEMS


def test_the_cpu_time_of_a_wait_is_measured(tmp_path):
    pytest.importorskip("torch.distributed")
    done = run("waiting", "--sizes", "4", "--reps", "2", "--delay", "0.3", "--systems", "gloo", "--json", str(tmp_path / "w.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    run_record = json.loads((tmp_path / "w.json").read_text())["runs"][0]
    row, = run_record["rows"]
    assert 0 <= run_record["idle_cpu_s"] < 0.3
    assert (row["system"], row["size"], len(row["cpu_s"])) == ("gloo", 4, 2)
    assert all(0 < cpu_s < 0.3 for cpu_s in row["cpu_s"])       # gloo sleeps while it waits
    assert all(0 < after_s < 0.3 for after_s in row["after_s"])
