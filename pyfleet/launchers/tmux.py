"""A job inside a tmux session of its own: a pane for what each rank prints, and a window for the launcher.

The session has its own server, and that its environment from here; it goes on when its terminal goes away. Its folder holds
the server's socket, a FIFO per rank, and in the end the exit code and the launcher's own words for whoever waits for them.
"""
from __future__ import annotations

import contextlib
import fcntl
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from pyfleet.config import environment
from pyfleet.errors import FleetError
from pyfleet.jobs import FORWARDED, NAME, POLL_S
from pyfleet.launchers.base import Job, Launcher

SESSION = "pyfleet"
PANES_PER_WINDOW = 8                # on a laptop's screen, 12 lines each
SIZE = ("-x", "200", "-y", "50")    # until a terminal comes, which has its own
VIEWER = ("sh", "-c", 'trap "" INT; exec cat "$0"')     # a Ctrl-C there would end the view alone
OPTIONS = (("remain-on-exit", "off"), ("destroy-unattached", "off"), ("allow-rename", "off"), ("set-titles", "off"),
           ("pane-border-status", "top"), ("pane-border-format", " #{pane_title} "),
           ("status-right", "Ctrl-C in window launcher ends the job"))


class TmuxLauncher(Launcher):
    """Runs a job by running another launcher in the session, and waits for its end, or until the terminal is detached.

    Args:    argv: the command line of the other launcher, up to where the folder of its panes belongs; rest: after that.
             titles: what the pane of each rank is called.
    """

    def __init__(self, argv: Sequence[str], rest: Sequence[str], titles: Sequence[str]):
        self.argv, self.rest, self.titles = argv, rest, titles

    def run(self, job: Job) -> int:
        if shutil.which("tmux") is None:
            raise OSError("--tmux needs tmux, which is not installed")
        with contextlib.ExitStack() as undo:
            folder = Path(tempfile.mkdtemp(prefix="pyfleet-"))
            undo.callback(shutil.rmtree, folder, ignore_errors=True)
            watched = open(folder / "watched", "w")     # noqa: SIM115 closed below, and by our death
            undo.callback(watched.close)
            fcntl.flock(watched, fcntl.LOCK_EX)
            undo.callback(_tmux, folder, "kill-server", check=False)
            launcher = self._make_session(folder)
            code = self._wait(folder, launcher)
            if code is None:
                watched.close()                         # from here on the launcher in there removes the folder
                if not (folder / "code").exists():
                    undo.pop_all()
                    print(f"{NAME}: detached; {_attach(folder)} comes back", file=sys.stderr)
                    return 0
                code = self._wait(folder, launcher, attach=False)
            with contextlib.suppress(FileNotFoundError):
                sys.stderr.write((folder / "report").read_text(errors="replace"))
            return code

    def _make_session(self, folder: Path) -> int:
        """The session with all its panes; the process id of the launcher in it."""
        pane = ""
        for rank, title in enumerate(self.titles):
            fifo, window = folder / f"rank_{rank}", f"ranks {rank // PANES_PER_WINDOW * PANES_PER_WINDOW}"
            os.mkfifo(fifo, 0o600)
            if rank == 0:
                how = ("new-session", "-s", SESSION, *SIZE, "-n", window)
            elif rank % PANES_PER_WINDOW == 0:
                how = ("new-window", "-t", f"{SESSION}:", "-n", window)
            else:
                how = ("split-window", "-t", pane)
            pane = _tmux(folder, *how, "-d", "-P", "-F", "#{pane_id}", *VIEWER, str(fifo))
            if rank == 0:
                for name, value in OPTIONS:
                    _tmux(folder, "set-option", "-g", name, value)
            _tmux(folder, "select-pane", "-t", pane, "-T", title)
            _tmux(folder, "select-layout", "-t", pane, "tiled")
        return int(_tmux(folder, "new-window", "-d", "-t", f"{SESSION}:", "-n", "launcher", "-c", os.getcwd(), "-P", "-F",
                         "#{pane_pid}", *self.argv, str(folder), *self.rest))

    def _wait(self, folder: Path, launcher: int, *, attach: bool = True) -> int | None:
        """The exit code once the launcher in the session has ended; None when the terminal was detached before that."""
        import psutil
        with contextlib.ExitStack() as undo:
            for number in FORWARDED:
                undo.callback(signal.signal, number, signal.signal(number, lambda n, _: _pass_on(launcher, n)))
            try:
                process = psutil.Process(launcher)
                if attach and sys.stdin.isatty() and sys.stdout.isatty():
                    subprocess.run([*_command(folder), "attach", "-t", SESSION], env=_outside(), check=False)
                    if process.is_running() and _tmux(folder, "list-panes", check=False):
                        return None
                elif attach:
                    print(f"{NAME}: {_attach(folder)} shows the ranks", file=sys.stderr, flush=True)
                while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                    time.sleep(POLL_S)
            except psutil.NoSuchProcess:
                pass
        try:
            return int((folder / "code").read_text())
        except FileNotFoundError:
            print(f"{NAME}: the launcher in the session was killed", file=sys.stderr)
            return 128 + signal.SIGKILL


class InTmux(Launcher):
    """Runs a job in the session that a TmuxLauncher has made, by another launcher, and ends the session with it."""

    def __init__(self, launcher: Launcher):
        self.launcher = launcher

    def run(self, job: Job) -> int:
        folder, code = Path(job.panes), 1
        try:
            code = self.launcher.run(job)
        except (OSError, subprocess.SubprocessError) as error:
            (folder / "report").write_text(f"{NAME}: cannot start the ranks: {error}\n")
        except FleetError as error:
            (folder / "report").write_text(f"{NAME}: {error}\n")
        finally:
            self._leave(folder, code)
        return code

    @staticmethod
    def _leave(folder: Path, code: int) -> None:
        """Leave the exit code to whoever waits, else nothing; end the session, and with it this process's own terminal."""
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        (folder / "code.new").write_text(str(code))
        (folder / "code.new").rename(folder / "code")
        with open(folder / "watched", "w") as watched:
            try:
                fcntl.flock(watched, fcntl.LOCK_EX | fcntl.LOCK_NB)
                nobody = True
            except OSError:
                nobody = False
        _tmux(folder, "kill-server", check=False)
        if nobody:
            shutil.rmtree(folder, ignore_errors=True)


def _command(folder: Path) -> list[str]:
    return ["tmux", "-S", str(folder / "tmux")]


def _attach(folder: Path) -> str:
    return shlex.join([*_command(folder), "attach"])


def _outside() -> dict[str, str]:
    """The environment without the session that this process may itself be in."""
    return {name: value for name, value in environment().items() if name not in ("TMUX", "TMUX_PANE")}


def _tmux(folder: Path, *words: str, check: bool = True) -> str:
    """What a tmux command prints. Raises OSError with tmux's own words."""
    done = subprocess.run([*_command(folder), *words], env=_outside(), capture_output=True, text=True, check=False,
                          stdin=subprocess.DEVNULL)
    if check and done.returncode != 0:
        raise OSError(f"tmux {words[0]}: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return done.stdout.strip()


def _pass_on(launcher: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(launcher, number)
