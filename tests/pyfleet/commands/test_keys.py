"""pyfleet keys: who this node is, and secrets for a namespace."""
import json
import os
import subprocess
import sys

import pytest

from pyfleet.commands import keys
from pyfleet.commands import main as pyfleet
from pyfleet.identity.keys import FILE_NAME
from pyfleet.identity.namespace import Namespace

PSK = "0f" * 32


@pytest.fixture
def home(tmp_path, monkeypatch):
    for name in ("PYFLEET_PSK", "PYFLEET_PSK_FILE", "PYFLEET_NAMESPACE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYFLEET_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.mark.feature("P14")
def test_a_node_is_made_once_and_shown_the_same_by_later_processes(home, capsys):
    assert pyfleet(["keys", "new", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert (home / FILE_NAME).stat().st_mode & 0o777 == 0o600
    for _ in range(2):
        told = subprocess.run([sys.executable, "-m", "pyfleet", "keys", "show", "--json"], check=True, timeout=60,
                              capture_output=True, text=True, env=os.environ)
        assert json.loads(told.stdout) == made
    assert pyfleet(["keys", "show"]) == 0
    table = capsys.readouterr().out
    assert made["peer id"] in table and made["node"] in table and str(home) in table
    seed = (home / FILE_NAME).read_text().split()[1]
    assert seed not in table + told.stdout


def test_new_never_replaces_unless_told_to_and_then_keeps_the_old(home, capsys):
    assert keys.main(["new"]) == 0
    first = (home / FILE_NAME).read_bytes()
    assert keys.main(["new"]) == 1
    assert "exists; --replace puts it aside" in capsys.readouterr().err
    assert (home / FILE_NAME).read_bytes() == first
    assert keys.main(["new", "--replace", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (home / FILE_NAME).read_bytes() != first
    with open(told["put aside"], "rb") as file:
        assert file.read() == first


def test_show_without_a_key_or_with_a_damaged_one(home, capsys):
    assert keys.main(["show"]) == 1
    assert "there is no node key" in capsys.readouterr().err and not home.exists()
    home.mkdir()
    (home / FILE_NAME).write_text("rubbish")
    (home / FILE_NAME).chmod(0o600)
    assert keys.main(["show"]) == 1
    assert "is damaged" in capsys.readouterr().err


def test_show_tells_the_public_tag_and_never_the_psk(home, capsys, monkeypatch):
    assert keys.main(["new"]) == 0
    monkeypatch.setenv("PYFLEET_PSK", PSK)
    monkeypatch.setenv("PYFLEET_NAMESPACE", "lab")
    assert keys.main(["show"]) == 0
    told = capsys.readouterr().out
    assert Namespace.from_psk(PSK, "lab").tag in told and "lab" in told and PSK not in told


def test_psk_prints_a_new_one_alone_or_writes_it_for_this_user_only(home, tmp_path, capsys):
    assert keys.main(["psk"]) == 0 and keys.main(["psk"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first != second and len(bytes.fromhex(first)) == 32
    path = tmp_path / "new folder" / "lab.psk"
    assert keys.main(["psk", "--output", str(path)]) == 0 and path.parent.stat().st_mode & 0o777 == 0o700
    written = path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600 and len(bytes.fromhex(written)) == 32
    assert written.strip() not in capsys.readouterr().out
    assert keys.main(["psk", "--output", str(path)]) == 1
    assert path.read_text() == written and "File exists" in capsys.readouterr().err


@pytest.mark.parametrize("argv", ([], ["sho"], ["show", "--replace"], ["new", "--output", "x"], ["show", "--jsn"], ["show", "x"]))
def test_wrong_arguments(home, argv, capsys):
    assert keys.main(argv) == 2
    assert capsys.readouterr().err.startswith("pyfleet keys: error: ")
    assert not home.exists()
