"""bench.ranks: ranks stay in step, rank 0 is heard, a death is named, and no process is left behind."""
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from bench.ranks import ROOT, Ranks, RanksFailed


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write a rank_main into an importable module and return the module's name."""
    def write(body: str) -> str:
        (tmp_path / "rank_program.py").write_text("import os, signal, time\n\n\ndef rank_main(team, options):\n"
                                                  + "".join(f"    {line}\n" for line in body.splitlines()))
        return "rank_program"
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return write


def ours(folder) -> list[int]:
    return [process.pid for process in psutil.process_iter(["cmdline"]) if str(folder) in (process.info["cmdline"] or ())]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_rank_hears_every_payload_of_its_own_turn(module, size):
    body = """for turn in range(70_000 if team.size == 2 else 500):      # past the wrap of the 16-bit turn
    heard = team.exchange(turn * 10 + team.rank)
    assert heard == [turn * 10 + rank for rank in range(team.size)], (turn, heard)
team.emit(kind="end", options=options, top=team.exchange((1 << 48) - 1))"""
    with Ranks(module(body), size, {"answer": 42}) as ranks:
        assert list(ranks.events()) == [{"kind": "end", "options": {"answer": 42}, "top": [(1 << 48) - 1] * size}]
    assert not ranks.folder.exists()


def test_the_first_trouble_is_known_to_all_and_the_next_turn_is_clean(module):
    body = """first = team.agree(f"rank {team.rank} is out" if team.rank else None)
second = team.agree(None)
assert (first, second) == ("rank 1 is out", None)
team.emit(kind="told", first=first)"""
    with Ranks(module(body), 3, {}) as ranks:
        assert list(ranks.events()) == [{"kind": "told", "first": "rank 1 is out"}]


@pytest.mark.parametrize("end,told", [("raise ValueError('seven')", "exit status 1 at the third act.*ValueError: seven"),
                                      ("os.kill(os.getpid(), signal.SIGKILL)", "signal SIGKILL at the third act")])
def test_a_rank_that_ends_badly_is_reported_and_the_others_are_ended(module, end, told):
    body = f"""team.emit(kind="begun")
team.progress("the third act")
team.exchange()
if team.rank == 1:
    {end}
time.sleep(60)"""
    start = time.monotonic()
    with pytest.raises(RanksFailed, match=f"(?s){told}"), Ranks(module(body), 2, {}) as ranks:
        events = ranks.events()
        assert next(events) == {"kind": "begun"}
        list(events)
    assert not ours(ranks.folder)
    assert time.monotonic() - start < 20


def test_work_that_goes_on_is_waited_for_and_a_hang_is_not(module, monkeypatch):
    monkeypatch.setattr("bench.ranks._STALL_S", 1.0)
    works = """end = time.monotonic() + 3
while max(team.exchange(time.monotonic() < end)):
    team.tick()
team.emit(kind="end")"""
    with Ranks(module(works), 2, {}) as ranks:
        assert list(ranks.events()) == [{"kind": "end"}]
    with pytest.raises(RanksFailed, match="no progress for 1 s at the third act"), \
            Ranks(module("team.progress('the third act')\ntime.sleep(60)"), 2, {}) as ranks:
        list(ranks.events())
    assert not ours(ranks.folder)


def test_ranks_that_ignore_sigterm_are_ended_too(module):
    with Ranks(module("signal.signal(signal.SIGTERM, signal.SIG_IGN)\nteam.emit(kind='deaf')\ntime.sleep(60)"), 1, {}) as ranks:
        assert next(ranks.events()) == {"kind": "deaf"}
    assert not ours(ranks.folder)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_ranks_end_with_a_parent_that_was_killed(module):
    name = module("team.emit(kind='up')\ntime.sleep(60)")
    program = f"from bench.ranks import Ranks; r = Ranks({name!r}, 2, {{}}); print(r.folder, next(r.events()), flush=True); input()"
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                              env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ['PYTHONPATH']}"})
    folder = parent.stdout.readline().split()[0]
    assert len(ours(folder)) == 2
    os.kill(parent.pid, signal.SIGKILL)
    parent.communicate()
    deadline = time.monotonic() + 10
    while ours(folder):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for leftover in os.listdir(folder):
        os.unlink(os.path.join(folder, leftover))
    os.rmdir(folder)
