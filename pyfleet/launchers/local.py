"""Ranks on this machine: child processes, each the leader of its own session and process group."""
from __future__ import annotations

import contextlib
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Self

from pyfleet.config import environment
from pyfleet.launchers.base import Job, Launcher, Seat, describe, exit_code, is_echo
from pyfleet.output import Lines, Sink, rank_prefix, standard_sinks
from pyfleet.placement import Placement, launch_environment

NAME = "pyfleet-launch"
READ_BYTES = 1 << 16        # what a pipe holds
SETTLE_S = 1.0              # a rank that fails because another did may end first: wait this long for the other
DRAIN_S = 0.5               # for output still in pipes once every rank is gone and a stray holds them open
POLL_S = 0.02               # how often a group that was told to end is looked at
HURRY_S = 0.2               # a second signal counts from here on: some wrappers pass on the Ctrl-C that we got as well
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

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


def _die_with(parent: int) -> None:
    """In a new child on Linux: be killed when the launcher dies, before the guardian even wakes."""
    import ctypes
    pr_set_pdeathsig = 1    # linux/prctl.h
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


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
        with _Run(job) as run:
            return run.to_its_end()


class _Rank:
    """One rank's process, its group, and what it prints."""

    def __init__(self, rank: int, process: subprocess.Popen, lines: tuple[Lines, Lines], log: Sink | None):
        self.rank = rank
        self.process = process
        self.group = process.pid
        self.group_alive = True
        self.lines = dict(zip((process.stdout, process.stderr), lines, strict=True))
        self.open = set(self.lines)
        self.log = log

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

    def last_output(self) -> bytes:
        """What to show again of a rank that failed: its stderr, or its stdout when it wrote nothing there."""
        return self.lines[self.process.stderr].tail() or self.lines[self.process.stdout].tail()


class _Run:
    """One job: ranks running, then (by the first failure, a signal, or their own end) stopping, then gone."""

    def __init__(self, job: Job):
        self.job = job
        self.ranks: list[_Rank] = []
        self.signals: list[int] = []        # that the launcher received
        self.signalled_at = 0.0
        self.child_ended = True
        self.told: set[int] = set()         # strays that have been asked to end
        self.failed: list[_Rank] = []       # in the order of their end, before anybody was told to stop
        self.culprit: _Rank | None = None
        self.settle_at: float | None = None
        self.stopping = False
        self.kill_at: float | None = None
        self.killed = False

    # --- set up and tear down

    def __enter__(self) -> Self:
        self.undo = contextlib.ExitStack()
        try:
            self._set_up()
        except BaseException:
            self.undo.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo.close()

    def _set_up(self) -> None:
        self.out, self.err = standard_sinks()
        self.selector = (selectors.PollSelector if sys.platform == "linux" else selectors.SelectSelector)()
        self.undo.callback(self.selector.close)
        self._watch_signals()
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
        if self.job.log_dir is not None:
            Path(self.job.log_dir).mkdir(parents=True, exist_ok=True)
        port = self.job.master_port or _free_port()
        seat = self.job.seat or Seat(0, 0, self.job.num_ranks, "127.0.0.1", Path(self.meeting).as_uri())
        run_id = Path(self.meeting).name
        for local_rank in range(self.job.num_ranks):
            if self.signals:
                break
            self._start(local_rank, seat, port, run_id)

    def _watch_signals(self) -> None:
        """Signals only leave a note and wake the loop, which never blocks anywhere else."""
        read, write = os.pipe()
        for fd in (read, write):
            os.set_blocking(fd, False)
            self.undo.callback(os.close, fd)
        old_fd = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        self.undo.callback(signal.set_wakeup_fd, old_fd)
        self.selector.register(read, selectors.EVENT_READ, lambda: os.read(read, 4096))
        for number in (*FORWARDED, signal.SIGCHLD):
            if number == signal.SIGCHLD or signal.getsignal(number) is not signal.SIG_IGN:      # nohup ignores SIGHUP
                self.undo.callback(signal.signal, number, signal.signal(number, self._note) or signal.SIG_DFL)

    def _note(self, number: int, _frame: object) -> None:
        if number == signal.SIGCHLD:
            self.child_ended = True
        elif not self.signals or time.monotonic() - self.signalled_at > HURRY_S:
            self.signals.append(number)
            self.signalled_at = time.monotonic()

    def _start(self, local_rank: int, seat: Seat, port: int, run_id: str) -> None:
        job, rank = self.job, seat.first_rank + local_rank
        place = Placement(rank, seat.world_size, local_rank, job.num_ranks, seat.node_rank, seat.master_addr, port,
                          seat.rendezvous, "pyfleet")
        told = launch_environment(place, run_id=run_id, config_path=job.config_path, overrides=job.overrides)
        parent = os.getpid()
        process = subprocess.Popen(
            job.command, env={**environment(), **told}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, bufsize=0, start_new_session=True,
            preexec_fn=(lambda: _die_with(parent)) if sys.platform == "linux" else None)   # noqa: PLW1509 no threads here
        self._tell_guardian(process.pid)
        self.ranks.append(self._watch(rank, process))

    def _watch(self, rank: int, process: subprocess.Popen) -> _Rank:
        lines = tuple(
            Lines(rank_prefix(rank, os.isatty(sink.fd) and not environment().get("NO_COLOR")) if self.job.prefix else b"",
                  raw=not self.job.prefix and self.job.num_ranks == 1)
            for sink in (self.out, self.err))
        log = None
        if self.job.log_dir is not None:
            fd = os.open(Path(self.job.log_dir) / f"rank_{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            self.undo.callback(os.close, fd)
            log = Sink(fd)
        watched = _Rank(rank, process, lines, log)
        for stream, sink in ((process.stdout, self.out), (process.stderr, self.err)):
            os.set_blocking(stream.fileno(), False)
            self.selector.register(stream, selectors.EVENT_READ, lambda s=stream, k=sink: self._read(watched, s, k))
        return watched

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
            for stream in rank.lines:
                stream.close()

    # --- the loop

    def to_its_end(self) -> int:
        drain_until = None
        while True:
            self._reap()
            now = time.monotonic()
            self._advance(now)
            if self.stopping and not self._anybody_left():
                drain_until = drain_until or now + DRAIN_S
                if now >= drain_until or not any(rank.open for rank in self.ranks):
                    break
            self._pass_on(self._patience(now, drain_until))
        return self._report()

    def _pass_on(self, timeout: float) -> None:
        """Wait for something to happen, take what the ranks printed, and hand it to whoever reads us."""
        for sink in {self.out, self.err}:
            self._follow(sink.fd, selectors.EVENT_WRITE, not sink.empty, sink.pump)
        busy = self.out.full or self.err.full
        for rank in self.ranks:
            for stream in rank.open:
                sink = self.out if stream is rank.process.stdout else self.err
                self._follow(stream, selectors.EVENT_READ, not busy, lambda r=rank, s=stream, k=sink: self._read(r, s, k))
        for key, _ in self.selector.select(timeout):
            key.data()

    def _follow(self, file: object, event: int, wanted: bool, act: object) -> None:
        followed = file in self.selector.get_map()
        if wanted and not followed:
            self.selector.register(file, event, act)
        elif followed and not wanted:
            self.selector.unregister(file)

    def _read(self, rank: _Rank, stream: object, sink: Sink) -> bool:
        """Take one piece of a rank's output; False when there is none now."""
        try:
            data = os.read(stream.fileno(), READ_BYTES)
        except BlockingIOError:
            return False
        if rank.log is not None and not rank.log.broken:
            rank.log.write(data)
            rank.log.pump()
            if rank.log.broken:
                self._say(f"rank {rank.rank}: its log in {self.job.log_dir} can not be written any more")
        if data:
            sink.write(rank.lines[stream].feed(data))
            return True
        sink.write(rank.lines[stream].close())
        rank.open.discard(stream)
        self._follow(stream, selectors.EVENT_READ, False, None)
        return False

    def _reap(self) -> None:
        """Notice the ranks that ended since the last look, and what is left of their groups."""
        if not self.child_ended and not self.stopping:
            return
        self.child_ended = False
        ended = [rank for rank in self.ranks if rank.status is None and rank.process.poll() is not None]
        for rank in ended:
            for stream in list(rank.open):      # its last words decide whose fault it was
                for _ in range(64):             # a pipe full, or a grandchild that goes on writing
                    if not self._read(rank, stream, self.out if stream is rank.process.stdout else self.err):
                        break
        if not self.stopping:
            self.failed += [rank for rank in ended if rank.status]
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

    def _advance(self, now: float) -> None:
        """Decide whether the others have to stop, and carry on stopping them."""
        if self.failed and not self.stopping:
            self.culprit = next((rank for rank in self.failed if not is_echo(rank.last_output())), None)
            self.settle_at = self.settle_at or now + SETTLE_S
            if self.culprit or now >= self.settle_at or all(rank.status is not None for rank in self.ranks):
                self.culprit = self.culprit or self.failed[0]
                self._stop(signal.SIGTERM, now)
        if self.out.broken or self.err.broken:
            self.signals = self.signals or [signal.SIGPIPE]
        if self.signals and not self.stopping:
            self._stop(signal.SIGTERM if self.signals[0] == signal.SIGPIPE else self.signals[0], now)
            self._say_how_to_hurry()
        if not self.stopping and all(rank.status is not None for rank in self.ranks):
            self._stop(signal.SIGTERM, now)     # what the ranks left running
        if self.stopping and not self.killed and (now >= self.kill_at or len(self.signals) > 1):
            self.killed = True
            for rank in self.ranks:
                rank.signal_group(signal.SIGKILL)
        if self.stopping:
            self._end_strays()

    def _stop(self, number: int, now: float) -> None:
        self.stopping = True
        self.kill_at = now + self.job.grace_s
        for rank in self.ranks:
            rank.signal_group(number)
            rank.signal_group(signal.SIGCONT)       # a stopped process hears nothing but SIGKILL

    def _end_strays(self) -> None:
        """Ask those that left their rank's group to end, once; when time is up, end them."""
        strays = self._strays()
        for pid in strays if self.killed else strays - self.told:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL if self.killed else signal.SIGTERM)
        self.told |= strays

    def _anybody_left(self) -> bool:
        return any(rank.status is None or rank.group_alive for rank in self.ranks) or bool(self._strays())

    def _patience(self, now: float, drain_until: float | None) -> float:
        if drain_until is not None:
            return max(0.0, drain_until - now)
        if self.stopping:
            return POLL_S
        return max(0.0, self.settle_at - now) if self.settle_at is not None else 1.0

    # --- the end

    def _say(self, text: str) -> None:
        self.err.write(f"{NAME}: {text}\n".encode())

    def _say_how_to_hurry(self) -> None:
        if self.signals[0] == signal.SIGINT and self.ranks:
            self._say(f"interrupted; the ranks have {self.job.grace_s:g} s to end, Ctrl-C again kills them")

    def _report(self) -> int:
        for rank in self.ranks:
            for stream in list(rank.open):
                (self.out if stream is rank.process.stdout else self.err).write(rank.lines[stream].close())
        code = 0
        if self.signals:
            code = 128 + self.signals[0]
        elif self.culprit is not None:
            code = exit_code(self.culprit.status)
        self._flush(self.out)
        if self.culprit is not None and not self.signals:
            output = self.culprit.last_output()
            self._say(f"rank {self.culprit.rank} {describe(self.culprit.status)}; "
                      + ("its last output:" if output else "it printed nothing"))
            self.err.write(output if output.endswith(b"\n") or not output else output + b"\n")
        self._flush(self.err)
        return code

    def _flush(self, sink: Sink) -> None:
        """Wait for the reader to take the rest; a further signal ends the wait."""
        patience = len(self.signals)
        while not sink.empty and len(self.signals) == patience:
            self._follow(sink.fd, selectors.EVENT_WRITE, True, sink.pump)
            for key, _ in self.selector.select(1.0):
                if key.data is not None:
                    key.data()
            sink.pump()
