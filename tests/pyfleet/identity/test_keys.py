"""The node key: made once, the same ever after, never guessed at."""
import os
import subprocess
import sys

import pytest
from nacl import bindings

from pyfleet.errors import ConfigError
from pyfleet.identity.keys import FILE_NAME, NodeKey, Unwritable, home_folder, peer_id, short_id
from tests.ranks import ROOT

WHO = "from pathlib import Path; import sys; from pyfleet.identity import NodeKey; print(NodeKey.open(Path(sys.argv[1])).peer_id)"


def start(folder):
    return subprocess.Popen([sys.executable, "-c", WHO, str(folder)], env={"PYTHONPATH": str(ROOT)}, text=True,
                            stdout=subprocess.PIPE)


@pytest.mark.feature("P14")
def test_processes_that_start_at_once_and_later_ones_are_the_same_node(tmp_path):
    folder = tmp_path / "deep" / "home"
    first = [process.communicate(timeout=60)[0] for process in [start(folder) for _ in range(6)]]
    later = start(folder).communicate(timeout=60)[0]
    assert len({*first, later}) == 1 and len(later.strip()) == 52
    assert (folder / FILE_NAME).stat().st_mode & 0o777 == 0o600
    assert folder.stat().st_mode & 0o777 == 0o700
    assert os.listdir(folder) == [FILE_NAME]


@pytest.mark.parametrize("mask", (0o000, 0o077, 0o777))
def test_the_umask_changes_nothing(tmp_path, mask):
    before = os.umask(mask)
    try:
        key = NodeKey.generate()
        key.store(tmp_path)
    finally:
        os.umask(before)
    assert (tmp_path / FILE_NAME).stat().st_mode & 0o777 == 0o600
    assert NodeKey.load(tmp_path) == key


@pytest.mark.feature("P14")
@pytest.mark.parametrize("damage", [
    lambda text: b"", lambda text: text[:-1], lambda text: text + b"\n", lambda text: text.upper(),
    lambda text: text.replace(b"ed25519", b"x25519"), lambda text: os.urandom(len(text)), lambda text: text[:40],
    lambda text: text[:10] + (b"0" if text[10:11] != b"0" else b"1") + text[11:],       # the halves belong together
    lambda text: text * 100,
])
def test_a_damaged_key_is_an_error_and_stays_as_it_is(tmp_path, damage):
    NodeKey.open(tmp_path)
    path = tmp_path / FILE_NAME
    damaged = damage(path.read_bytes())
    path.write_bytes(damaged)
    for _ in range(2):
        with pytest.raises(ConfigError, match=f"{FILE_NAME} is damaged: restore it"):
            NodeKey.open(tmp_path)
    assert path.read_bytes() == damaged


@pytest.mark.parametrize("mode", (0o640, 0o604, 0o666, 0o611))
def test_a_key_that_others_may_have_read_is_an_error(tmp_path, mode):
    NodeKey.open(tmp_path)
    (tmp_path / FILE_NAME).chmod(mode)
    with pytest.raises(ConfigError, match=f"has mode {mode:04o}, so others may have read it"):
        NodeKey.open(tmp_path)


def test_places_that_can_not_hold_a_key(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError):
            NodeKey.open(folder)
    with pytest.raises(Unwritable, match="PYFLEET_HOME says where else"):
        NodeKey.open(home_folder("/proc/nowhere"))
    (tmp_path / "folder" / FILE_NAME).mkdir(parents=True)
    with pytest.raises(ConfigError, match="cannot read the node key"):
        NodeKey.open(tmp_path / "folder")


def test_storing_never_replaces(tmp_path):
    first = NodeKey.open(tmp_path)
    with pytest.raises(FileExistsError):
        NodeKey.generate().store(tmp_path)
    assert NodeKey.load(tmp_path) == first and os.listdir(tmp_path) == [FILE_NAME]


def test_signatures_and_names():
    key = NodeKey.from_seed(bytes(32))
    assert bindings.crypto_sign_open(key.sign(b"text") + b"text", key.public) == b"text"
    assert key.peer_id == peer_id(key.public) != NodeKey.generate().peer_id
    assert key.peer_id.startswith(short_id(key.peer_id)) and len(short_id(key.peer_id)) == 12
    assert key.seed.hex() not in repr(key) and repr(key.seed) not in repr(key)
