"""Ranks on this machine: child processes, each the leader of its own session and process group."""
from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from pyfleet.config import environment
from pyfleet.jobs import READ_BYTES, STDERR, STDOUT, Job, Run, Screen, die_with
from pyfleet.launchers.base import Launcher
from pyfleet.placement import Placement, launch_environment

# Outlives a launcher that is killed outright: reads the process groups from its stdin, +n started and -n gone, and at the
# end of it kills those that are left and removes the directory where the ranks met. Works wherever there are pipes.
GUARDIAN = """
import os, signal, sys
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
    signal.signal(number, signal.SIG_IGN)
groups = set()
for line in sys.stdin.buffer:
    group = int(line)
    groups.add(group) if group > 0 else groups.discard(-group)
for group in groups:
    try:
        os.killpg(group, signal.SIGKILL)
    except OSError:
        pass
import shutil
shutil.rmtree(sys.argv[1], ignore_errors=True)
"""


def _adopt_orphans() -> None:
    """On Linux: processes that outlive the rank that started them become our children, so that we can reap them."""
    import ctypes
    pr_set_child_subreaper = 36     # linux/prctl.h
    ctypes.CDLL(None).prctl(pr_set_child_subreaper, 1, 0, 0, 0)


def _children() -> set[int]:
    """This process's children, on Linux; elsewhere nothing is known."""
    with contextlib.suppress(OSError):
        return {int(pid) for task in Path("/proc/self/task").iterdir()
                for pid in (task / "children").read_text().split()}
    return set()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class LocalLauncher(Launcher):
    """Starts every rank here; they meet in a private directory that is gone afterwards.

    The process is the launcher's own meanwhile: on Linux, children that appear during a run are taken for its ranks'.
    """

    def run(self, job: Job) -> int:
        with LocalRun(job, Screen(job)) as run:
            return run.to_its_end()


class _Rank:
    """One rank's process, its group, and the pipes to what it prints."""

    def __init__(self, rank: int, process: subprocess.Popen):
        self.rank = rank
        self.process = process
        self.group = process.pid
        self.group_alive = True
        self.open = {process.stdout: STDOUT, process.stderr: STDERR}

    @property
    def status(self) -> int | None:
        return self.process.returncode

    def signal_group(self, number: int) -> None:
        """Send a signal to the rank and all that it started; notice when nobody is there any more."""
        if self.group_alive:
            try:
                os.killpg(self.group, number)
            except (ProcessLookupError, PermissionError):   # macOS says EPERM of a group of zombies
                self.group_alive = self.status is None


class LocalRun(Run):
    """A job whose ranks are children of this process."""

    def __init__(self, job: Job, screen: Screen):
        super().__init__(job, screen)
        self.ranks: list[_Rank] = []
        self.told: set[int] = set()         # strays that have been asked to end

    # --- set up and tear down

    def _start(self) -> None:
        job = self.job
        if sys.platform == "linux":
            _adopt_orphans()
        self.strangers = _children()
        self.meeting = tempfile.mkdtemp(prefix="pyfleet-")      # 0700
        self.undo.callback(shutil.rmtree, self.meeting, ignore_errors=True)
        self.guardian = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", GUARDIAN, self.meeting], stdin=subprocess.PIPE, bufsize=0, cwd="/",
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        self.undo.callback(self._dismiss_guardian)
        self.undo.callback(self._kill_everything)
        config_path = job.config_path
        if job.config is not None:
            config_path = f"{self.meeting}/config.json"
            Path(config_path).write_text(job.config)
        port = job.master_port or _free_port()
        run_id = Path(self.meeting).name
        for local_rank in range(job.num_ranks):
            if self.signals:
                break
            place = Placement(job.first_rank + local_rank, job.total_ranks or job.num_ranks, local_rank, job.num_ranks, job.node,
                              job.master_addr or "127.0.0.1", port, job.rendezvous or Path(self.meeting).as_uri(), "pyfleet")
            told = launch_environment(place, run_id=run_id, config_path=config_path, overrides=job.overrides,
                                      num_nodes=job.num_nodes, environ={**environment(), **dict(job.environment)})
            self._start_rank(place.rank, told)

    def _start_rank(self, rank: int, told: dict[str, str]) -> None:
        parent = os.getpid()
        self.screen.start(rank)
        process = subprocess.Popen(
            self.job.command, env={**environment(), **dict(self.job.environment), **told}, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0, start_new_session=True,
            preexec_fn=(lambda: die_with(parent)) if sys.platform == "linux" else None)   # noqa: PLW1509 no threads here
        self._tell_guardian(process.pid)
        self.ranks.append(_Rank(rank, process))
        for stream in (process.stdout, process.stderr):
            os.set_blocking(stream.fileno(), False)

    def _tell_guardian(self, number: int) -> None:
        with contextlib.suppress(OSError):
            self.guardian.stdin.write(b"%d\n" % number)

    def _dismiss_guardian(self) -> None:
        with contextlib.suppress(OSError):
            self.guardian.stdin.close()
        self.guardian.wait()

    def _kill_everything(self) -> None:
        """For the ways out that are no regular end; a regular end finds nobody left here."""
        for rank in self.ranks:
            rank.signal_group(signal.SIGKILL)
            rank.process.wait()
            for stream in (rank.process.stdout, rank.process.stderr):
                stream.close()

    # --- the loop

    def _streams(self) -> Iterable[tuple[object, Callable[[], object]]]:
        return [(stream, lambda r=rank, s=stream: self._read(r, s)) for rank in self.ranks for stream in rank.open]

    def _read(self, rank: _Rank, stream: object) -> bool:
        """Take one piece of a rank's output; False when there is none now."""
        try:
            data = os.read(stream.fileno(), READ_BYTES)
        except BlockingIOError:
            return False
        self.screen.take(rank.rank, rank.open[stream], data)
        if not data:
            del rank.open[stream]
            self._follow(stream, 0, False, None)
        return bool(data)

    def _notice(self, now: float) -> None:
        """Take note of ranks that have ended, and of what they left behind."""
        if not self.child_ended and not self.stopping:
            return
        self.child_ended = False
        ended = [rank for rank in self.ranks if rank.status is None and rank.process.poll() is not None]
        for rank in ended:
            for stream in list(rank.open):      # its last words decide whose fault it was
                for _ in range(64):             # a pipe full, or a grandchild that goes on writing
                    if not self._read(rank, stream):
                        break
            self.screen.ended(rank.rank, rank.status, self.stopping)
        if not self.stopping:
            self.failed += [(rank.rank, rank.status) for rank in ended if rank.status]
        for pid in self._strays():
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        for rank in self.ranks:
            if rank.group_alive and rank.status is not None:
                with contextlib.suppress(ChildProcessError):
                    while os.waitpid(-rank.group, os.WNOHANG)[0]:   # adopted from the rank
                        pass
                rank.signal_group(0)
                if not rank.group_alive:
                    self._tell_guardian(-rank.group)

    def _strays(self) -> set[int]:
        """Adopted processes, in or out of their rank's group."""
        return _children() - self.strangers - {rank.process.pid for rank in self.ranks} - {self.guardian.pid}

    def _signal(self, number: int) -> None:
        for rank in self.ranks:
            rank.signal_group(number)
            rank.signal_group(signal.SIGCONT)       # a stopped process hears nothing but SIGKILL

    def _keep_stopping(self, now: float) -> None:
        """Ask those that left their rank's group to end, once; when time is up, end them."""
        strays = self._strays()
        for pid in strays if self.killed else strays - self.told:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL if self.killed else signal.SIGTERM)
        self.told |= strays

    def _all_ended(self) -> bool:
        return all(rank.status is not None for rank in self.ranks)

    def _anybody_left(self) -> bool:
        return any(rank.status is None or rank.group_alive for rank in self.ranks) or bool(self._strays())
