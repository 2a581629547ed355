"""What a node says that it can do, and that saying so is cheap after the first time."""
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import psutil
import pytest

from pyfleet import profile as module
from pyfleet.placement import num_cores
from pyfleet.profile import FILE_NAME, LARGEST_BYTES, profile, weight


def test_a_profile_tells_what_this_machine_is(tmp_path):
    facts = profile(tmp_path)
    assert facts["cores"] == num_cores()
    assert facts["memory_bytes"] == psutil.virtual_memory().total
    assert facts["versions"]["numpy"] == np.__version__
    assert facts["chip"] and facts["arch"] and facts["system"]
    assert isinstance(facts["accelerators"], list)
    assert facts["matmul_gflops"] > 0.1 and facts["copy_gb_s"] > 0.1
    assert facts["weight"] == weight(facts)
    assert len(json.dumps(facts)) < LARGEST_BYTES
    assert json.loads(json.dumps(facts)) == facts


def test_it_is_measured_once_per_boot(tmp_path, monkeypatch):
    home = tmp_path / "not" / "there"
    facts = profile(home)
    assert [path.name for path in home.iterdir()] == [FILE_NAME]
    with monkeypatch.context() as patch:
        patch.setattr(module, "_measure", lambda: pytest.fail("measured again"))
        assert profile(home) == facts
    key = module._key()
    for change in ({"boot": "another"}, {"cores": 1000}, {"versions": {}}, {"machine": "elsewhere"}):
        with monkeypatch.context() as patch:
            patch.setattr(module, "_key", lambda change=change: key | change)
            patch.setattr(module, "_measure", lambda change=change: facts | {"chip": str(change)})
            assert profile(home)["chip"] == str(change)
            assert profile(home)["chip"] == str(change)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'{"key": 1}', b"\xff\xfe", b"[" * 20_000, b'"' + b"x" * 20_000,
                                     b'{"key": null, "profile": {}}'])
def test_a_damaged_one_is_measured_again(tmp_path, monkeypatch, content):
    (tmp_path / FILE_NAME).write_bytes(content)
    facts = {"chip": "X", "cores": 1, "memory_bytes": 1, "matmul_gflops": 1.0, "copy_gb_s": 1.0, "weight": 1.0}
    monkeypatch.setattr(module, "_measure", lambda: facts)
    assert profile(tmp_path) == facts
    assert json.loads((tmp_path / FILE_NAME).read_text())["profile"] == facts


def test_a_kept_one_that_lacks_facts_is_measured_again(tmp_path, monkeypatch):
    facts = profile(tmp_path)
    (tmp_path / FILE_NAME).write_text(json.dumps({"key": module._key(), "profile": {"chip": "X"}}))
    monkeypatch.setattr(module, "_measure", lambda: facts)
    assert profile(tmp_path) == facts


def test_where_nothing_can_be_kept_it_still_tells(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(module, "_measure", lambda: {"chip": "X"})
    assert profile(tmp_path / "file") == profile(tmp_path / "file" / "home") == profile(None) == {"chip": "X"}
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_processes_that_start_together_do_not_disturb_each_other(tmp_path):
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(profile, [tmp_path] * 4))
    assert profile(tmp_path) in found
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


def test_long_names_and_many_accelerators_do_not_make_it_long(monkeypatch):
    many = [{"kind": "cuda", "name": "\u00e9\U0001f600" * 500, "memory_bytes": 2**40}] * 100
    monkeypatch.setattr(module, "accelerators", lambda: many)
    monkeypatch.setattr(module, "_torch_gflops", lambda device, budget_s: 1e4)
    monkeypatch.setattr(module, "chip", lambda: "\u00fc" * 10_000)
    monkeypatch.setattr(module.platform, "release", lambda: "6" * 10_000)
    facts = profile(None)
    assert len(json.dumps(facts)) < LARGEST_BYTES
    assert facts["accelerator_gflops"] == facts["weight"] == 1e6


def test_speed_is_that_of_the_machine_and_not_of_the_moment():
    """Two other processes that compute all the time change it by less than a half; a BLAS with threads loses nine tenths."""
    quiet = max(module.matmul_gflops() for _ in range(3))
    program = "print(flush=True)\nwhile True: pass"
    others = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) for _ in range(num_cores())]
    try:
        for each in others:
            each.stdout.readline()
        assert max(module.matmul_gflops() for _ in range(3)) > quiet / 2
    finally:
        for each in others:
            each.kill()
            each.communicate()


def test_products_are_counted_truly(monkeypatch):
    """Against one plain product of one core."""
    monkeypatch.setattr(module, "num_cores", lambda: 1)
    a = np.full((64, 64), 0.5, np.float32)
    times = []
    for _ in range(300):
        began = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - began)
    assert module.matmul_gflops() > 0.5 * 2 * 64 ** 3 / min(times) / 1e9
    assert module.matmul_gflops() < 4 * 2 * 64 ** 3 / min(times) / 1e9


@pytest.mark.parametrize(("facts", "expected"), [
    ({"matmul_gflops": 100.0, "accelerator_gflops": None}, 100.0), ({"matmul_gflops": 100, "accelerator_gflops": 9000.0}, 9000.0),
    ({}, 1.0), ({"matmul_gflops": -1}, 1.0), ({"matmul_gflops": float("nan")}, 1.0), ({"matmul_gflops": "fast"}, 1.0),
    ({"matmul_gflops": True}, 1.0), ({"matmul_gflops": float("inf"), "accelerator_gflops": 0}, 1.0),
])
def test_the_weight_follows_whatever_is_faster(facts, expected):
    assert weight(facts) == expected


def test_accelerators_add_up_and_broken_ones_count_nothing(monkeypatch):
    asked = []

    def full(shape, value, dtype, device):
        asked.append(device)
        if device == "cuda:1":
            raise RuntimeError("it fell off the bus")
        return np.full((8, 8), value, np.float32)
    torch = SimpleNamespace(
        float32=None, full=full, empty_like=np.empty_like, mm=np.matmul,
        cuda=SimpleNamespace(synchronize=lambda device: None), mps=SimpleNamespace(synchronize=lambda: None))
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setattr(module, "_best_rate", lambda call, amount, budget_s: call() or 5e9)
    found = [{"kind": kind} for kind in ("cuda", "cuda", "cuda", "mps", "unusable")]
    assert module.accelerator_gflops(found) == 15.0
    assert asked == ["cuda:0", "cuda:1", "cuda:2", "mps"]
    assert module.accelerator_gflops([]) is module.accelerator_gflops([{"kind": "unusable"}]) is None


def test_a_broken_torch_is_a_fact_and_no_failure(monkeypatch):
    monkeypatch.setattr(module.Path, "exists", lambda path: True)   # a machine that shows a sign of an accelerator
    monkeypatch.setitem(sys.modules, "torch", None)
    (found,) = module.accelerators()
    assert found["kind"] == "unusable"
    assert "torch" in found["name"]
