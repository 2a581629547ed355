"""Ranks in tmux: a pane each, a job that survives its terminal, and nothing left when the session ends, however it does."""
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from tests.pyfleet.launchers.conftest import Launched
from tests.pyfleet.launchers.test_local import FOREVER
from tests.pyfleet.launchers.test_ssh import lab, wait_until  # noqa: F401 a fixture

pytestmark = pytest.mark.skipif(not shutil.which("tmux"), reason="needs tmux")

SHOW = "print(f'hello from {rank} of', os.environ['WORLD_SIZE'], flush=True)\n"
UNTIL_GO = SHOW + "while not os.path.exists('go'): time.sleep(0.01)\n"


class Session:
    """The tmux session of a launched job."""

    def __init__(self, job):
        assert wait_until(lambda: re.search(rb"-S (\S+) attach (shows|comes)", job.stderr) or job.process.poll() is not None)
        self.job, self.socket = job, re.search(rb"-S (\S+) attach", job.stderr)[1].decode()

    def tmux(self, *words):
        return subprocess.run(["tmux", "-S", self.socket, *words], capture_output=True, text=True, check=False).stdout

    def panes(self):
        """(window, title) -> pane id"""
        lines = self.tmux("list-panes", "-a", "-F", "#{window_name}\t#{pane_title}\t#{pane_id}").splitlines()
        return {(line.split("\t")[0], line.split("\t")[1]): line.split("\t")[2] for line in lines}

    def shows(self, title, text):
        """Whether the pane of this title shows a text in time."""
        pane = next(pane for (_, name), pane in self.panes().items() if name == title)
        return wait_until(lambda: text in self.tmux("capture-pane", "-p", "-t", pane))

    def launcher(self):
        """The launcher in the session."""
        pids = self.tmux("list-panes", "-t", "pyfleet:launcher", "-F", "#{pane_pid}")
        return psutil.Process(int(pids))


@pytest.mark.feature("S21")
def test_every_rank_has_a_pane_that_shows_what_it_prints(launch, tmp_path):
    job = launch(UNTIL_GO, "--tmux", "--nproc", 10)
    session = Session(job)
    here = os.uname().nodename
    assert [(window, title) for window, title in session.panes() if window != "launcher"] == [
        (f"ranks {rank // 8 * 8}", f"rank {rank} on {here}") for rank in range(10)]
    for rank in range(10):
        assert session.shows(f"rank {rank} on {here}", f"hello from {rank} of 10")
    launcher = next(title for window, title in session.panes() if window == "launcher")
    assert session.shows(launcher, "[rank 9] hello from 9 of 10")
    (tmp_path / "go").touch()
    assert job.finish() == (0, b"")
    job.assert_nothing_left()


def test_a_failure_in_the_session_is_told_outside(launch):
    job = launch("if rank == 1: raise ValueError('boom')" + FOREVER, "--tmux", "--nproc", 2)
    assert job.finish()[0] == 1
    assert b"pyfleet-launch: rank 1 failed with exit code 1; its last output:\nTraceback (most recent" in job.stderr
    assert job.stderr.endswith(b"ValueError: boom\n")
    job.assert_nothing_left()


def test_a_job_that_cannot_start_is_told_outside(launch, tmp_path):
    (tmp_path / "file").touch()
    job = launch(SHOW, "--tmux", "--log-dir", "file/logs")
    assert job.finish()[0] == 1
    assert b"pyfleet-launch: cannot start the ranks: [Errno 20] Not a directory: 'file/logs'\n" in job.stderr
    job.assert_nothing_left()


def test_a_session_that_is_killed_leaves_nothing(launch):
    job = launch(SHOW + FOREVER, "--tmux", "--nproc", 2)
    session = Session(job)
    assert session.shows(f"rank 1 on {os.uname().nodename}", "hello from 1")
    session.tmux("kill-session", "-t", "pyfleet")
    assert job.finish()[0] == 129
    job.assert_nothing_left()


def test_a_launcher_that_is_killed_in_its_pane_leaves_nothing(launch):
    job = launch(SHOW + FOREVER, "--tmux", "--nproc", 2)
    session = Session(job)
    assert session.shows(f"rank 1 on {os.uname().nodename}", "hello from 1")
    session.launcher().kill()
    assert job.finish()[0] == 137
    assert b"the launcher in the session was killed" in job.stderr
    job.assert_nothing_left()


@pytest.mark.parametrize("number,code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_to_the_one_who_waits_reach_the_ranks(launch, tmp_path, number, code):
    job = launch(f"signal.signal({int(number)}, lambda *_: (open(f'told_{{rank}}', 'w').close(), os._exit(0)))\n" + SHOW + FOREVER,
                 "--tmux", "--nproc", 2)
    session = Session(job)
    for rank in range(2):
        assert session.shows(f"rank {rank} on {os.uname().nodename}", f"hello from {rank}")
    job.process.send_signal(number)
    assert job.finish()[0] == code
    assert sorted(path.name for path in tmp_path.glob("told_*")) == ["told_0", "told_1"]
    job.assert_nothing_left()


def test_a_closed_view_does_not_stop_its_rank(launch, tmp_path):
    job = launch("""
while not os.path.exists('closed'): time.sleep(0.01)
for _ in range(300): os.write(1, b'x' * 1023 + b'\\n')
print('done')""", "--tmux", "--nproc", 2, "--log-dir", "logs")
    session = Session(job)
    session.tmux("kill-pane", "-t", session.panes()["ranks 0", f"rank 1 on {os.uname().nodename}"])
    (tmp_path / "closed").touch()
    assert job.finish()[0] == 0
    assert (tmp_path / "logs/rank_1.log").read_bytes().endswith(b"done\n")
    job.assert_nothing_left()


class Terminal:
    """A terminal whose screen nobody reads but this."""

    def __init__(self):
        self.master, self.slave = pty.openpty()
        self.shown = b""
        threading.Thread(target=self._drain, daemon=True).start()

    def _drain(self):
        while True:
            try:
                self.shown += os.read(self.master, 4096)
            except OSError:
                return


@pytest.mark.feature("S21")
def test_a_job_goes_on_while_its_terminal_is_detached(launch, tmp_path):
    terminal = Terminal()
    job = launch(UNTIL_GO, "--tmux", "--nproc", 2, stdin=terminal.slave, stdout=terminal.slave, environ={"TERM": "xterm"})
    assert wait_until(lambda: b"hello from 1" in terminal.shown), "attached by itself"
    os.write(terminal.master, b"\x02d")         # Ctrl-b d
    assert job.process.wait(30) == 0
    session = Session(job)
    assert b"pyfleet-launch: detached; tmux -S " in job.stderr
    again = Terminal()
    attached = subprocess.Popen(["tmux", "-S", session.socket, "attach"], stdin=again.slave, stdout=again.slave,
                                env=os.environ | {"TERM": "xterm"})
    assert wait_until(lambda: b"hello from 0" in again.shown)
    (tmp_path / "go").touch()
    attached.wait(30)
    job.assert_nothing_left()


def test_without_tmux_it_is_one_line(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "script.py").touch()
    job = Launched(["--tmux", "script.py"], tmp_path, {"PATH": str(tmp_path / "bin")})
    assert job.finish() == (1, b"")
    assert job.stderr == b"pyfleet launch: cannot start the ranks: --tmux needs tmux, which is not installed\n"
    job.assert_nothing_left()


@pytest.mark.feature("S20", "S21")
def test_ranks_of_several_hosts_have_panes_here(lab, tmp_path):  # noqa: F811
    lab = lab()
    job = lab.launch(UNTIL_GO, "--tmux", "--nproc", 2)
    session = Session(job)
    titles = [f"rank {rank} on {lab.address(1 + rank // 2)}" for rank in range(4)]
    assert [title for window, title in session.panes() if window != "launcher"] == titles
    for rank, title in enumerate(titles):
        assert session.shows(title, f"hello from {rank} of 4")
    (tmp_path / "go").touch()
    assert job.finish() == (0, b"")
    job.assert_nothing_left()


def test_secrets_stay_off_command_lines(launch):
    job = launch(SHOW + FOREVER, "--tmux", environ={"PYFLEET_PSK": "5ec7e7" * 10 + "abcd"})
    session = Session(job)
    assert session.shows(f"rank 0 on {os.uname().nodename}", "hello from 0")
    lines = [" ".join(process.cmdline()) for process in job.processes()]
    assert any(sys.executable in line for line in lines) and not any("5ec7e7" in line for line in lines)
    assert not any("5ec7e7" in path.read_text(errors="replace") for path in Path(session.socket).parent.iterdir()
                   if path.is_file())
    job.process.send_signal(signal.SIGTERM)
    assert job.finish()[0] == 143
    job.assert_nothing_left()
