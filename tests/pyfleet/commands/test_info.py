"""pyfleet info: what this machine is, for people and for programs."""
import json
import os
import platform
import pty
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from pyfleet.commands import info
from pyfleet.identity import NodeKey, short_id
from pyfleet.profile import profile

ROOT = Path(__file__).parents[3]


@pytest.mark.feature("M16")
def test_json_tells_the_truth(capsys):
    assert info.main(["--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["cores"]["logical"] == psutil.cpu_count()
    assert 1 <= facts["cores"]["usable"] <= facts["cores"]["logical"]
    assert facts["memory"]["total_bytes"] == psutil.virtual_memory().total
    assert facts["versions"]["python"] == platform.python_version()
    loopback = [each for each in facts["interfaces"] if each["kind"] == "loopback"]
    assert "127.0.0.1" in loopback[0]["addresses"]
    assert {each["name"] for each in facts["interfaces"]} <= set(psutil.net_if_addrs())
    assert isinstance(facts["accelerators"], list)
    assert facts["chip"]


@pytest.mark.feature("M16")
def test_the_table_has_a_row_for_every_fact(capsys):
    assert info.main([]) == 0
    table = capsys.readouterr().out
    facts = info.machine()
    for word in ("host", "chip", "cores", "memory", "accelerator", "speed", "interface lo", "identity", "torch", facts["host"], facts["chip"]):
        assert word in table
    assert "\x1b" not in table


def test_facts_that_are_not_known_are_shown_as_such():
    facts = info.machine() | {"chip": None, "accelerators": [{"kind": "cuda", "name": "X", "memory_bytes": 2**30}],
                              "interfaces": [], "cores": {"physical": None, "logical": 2, "usable": 1}}
    table = dict(info.rows(facts | {"versions": {"torch": None}}))
    assert table["chip"] == "unknown"
    assert table["accelerator"] == "cuda: X, 1.0 GiB"
    assert table["cores"] == "2 (? physical, 1 usable here)"
    assert table["torch"] == "not installed"


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("PYFLEET_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_it_tells_the_identity_and_makes_none(home):
    assert info.machine()["identity"] is None
    assert dict(info.rows(info.machine()))["identity"] == "none yet"
    assert [path.name for path in home.iterdir()] == ["profile.json"]
    key = NodeKey.open(home)
    assert info.machine()["identity"] == key.peer_id
    assert dict(info.rows(info.machine()))["identity"] == short_id(key.peer_id)


@pytest.mark.feature("M16")
def test_it_tells_the_profile(home, capsys):
    assert info.main(["--json"]) == 0
    assert json.loads(capsys.readouterr().out)["profile"] == profile(home)
    shown = dict(info.rows(info.machine() | {"profile": {
        "matmul_gflops": 1234.5, "accelerator_gflops": 9000.0, "copy_gb_s": 20.04}}))["speed"]
    assert shown == "1,234.5 GFLOP/s by cores, 9,000 by accelerators; 20.0 GB/s copied"


def test_a_damaged_key_is_one_line(home, capsys):
    NodeKey.open(home)
    (home / "node_keypair").write_text("nonsense")
    assert info.main([]) == 2
    assert capsys.readouterr().err.startswith("pyfleet info: error: the node key ")


def test_wrong_arguments(capsys):
    assert info.main(["--jsn"]) == 2
    assert info.main(["more"]) == 2
    assert capsys.readouterr().err == ("pyfleet info: error: unknown option --jsn; did you mean --json?\n"
                                       "pyfleet info: error: unexpected argument 'more'\n")


def test_on_a_terminal_and_into_a_reader_that_leaves():
    master, slave = pty.openpty()
    subprocess.run([sys.executable, "-m", "pyfleet", "info"], cwd=ROOT, stdout=slave, check=True, timeout=60)
    os.close(slave)
    shown = os.read(master, 1 << 16)
    os.close(master)
    assert b"\x1b[" in shown
    assert b"chip" in shown
    read, write = os.pipe()
    os.close(read)
    ended = subprocess.run([sys.executable, "-m", "pyfleet", "info"], cwd=ROOT, stdout=write, stderr=subprocess.PIPE,
                           timeout=60, check=False)
    os.close(write)
    assert b"Traceback" not in ended.stderr
