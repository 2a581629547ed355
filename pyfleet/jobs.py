"""P5: a job under way: what its ranks print, whose failure ends it, and which signals reach them; starting them is a launcher's."""
from __future__ import annotations

import contextlib
import os
import re
import selectors
import signal
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pyfleet.config import environment
from pyfleet.output import Lines, Sink, rank_prefix, standard_sinks

NAME = "pyfleet-launch"
GRACE_S = 15.0      # between asking a rank to end and ending it: long enough to write a checkpoint
READ_BYTES = 1 << 16        # what a pipe holds
SETTLE_S = 1.0              # a rank that fails because another did may end first: wait this long for the other
DRAIN_S = 0.5               # for output still in pipes once every rank is gone and a stray holds them open
POLL_S = 0.02               # how often a group that was told to end is looked at
HURRY_S = 0.2               # a second signal counts from here on: some wrappers pass on the Ctrl-C that we got as well
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
STDOUT, STDERR = 1, 2


@dataclass(frozen=True)
class Job:
    """What to start: `command` is the whole argv of every rank.

    Attributes:
        log_dir:     where rank_<n>.log get what each rank printed, byte for byte.
        panes:       a folder of FIFOs rank_<n>, counted from this job's first rank, each of which is shown what its rank
                     prints; a full one misses some. The launcher's own words go to `report` there.
        environment: variables that every rank gets beside those of this process.
        first_rank, total_ranks, node, num_nodes: which part of a larger job this is; total_ranks None: it is the whole.
        master_addr, rendezvous: where the ranks of several machines meet; None: in a private directory here.
        config:      what the ranks read as their config file, in JSON; in place of the file at config_path.
    """

    command: tuple[str, ...]
    num_ranks: int = 1
    grace_s: float = GRACE_S
    master_port: int | None = None      # None: a free one
    log_dir: str | None = None
    prefix: bool = True
    config_path: str | None = None
    overrides: tuple[str, ...] = ()
    panes: str | None = None
    environment: tuple[tuple[str, str], ...] = ()
    first_rank: int = 0
    total_ranks: int | None = None
    node: int = 0
    num_nodes: int = 1
    master_addr: str | None = None
    rendezvous: str | None = None
    config: str | None = None


def exit_code(status: int) -> int:
    """The exit code of a shell for a process's returncode: 128 + n where signal n ended it."""
    return status if status >= 0 else 128 - status


def describe(status: int) -> str:
    """How a process ended: 'failed with exit code 3', 'was killed by SIGKILL'."""
    if status >= 0:
        return f"failed with exit code {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"was killed by signal {-status}"


def is_echo(output: bytes) -> bool:
    """Whether a rank's last words blame another rank: PeerLost, by itself or in the text of another error."""
    start = output.rfind(b"Traceback (most recent call last)")
    words = output[start:] if start >= 0 else output.strip().rpartition(b"\n")[2]
    return re.search(rb"^(?! ).*\bPeerLost\b", words, re.MULTILINE) is not None


def die_with(parent: int) -> None:
    """In a new child on Linux: be killed when the launcher dies, before the guardian even wakes."""
    import ctypes
    pr_set_pdeathsig = 1    # linux/prctl.h
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


class Screen:
    """Shows what ranks print on this process's stdout and stderr, marked line by line, and copies it to logs and panes."""

    def __init__(self, job: Job):
        self.job = job
        self.out, self.err = standard_sinks()
        self._lines: dict[tuple[int, int], Lines] = {}
        self._logs: dict[int, Sink] = {}
        self._panes: dict[int, Sink] = {}
        self._undo = contextlib.ExitStack()
        if job.log_dir is not None:
            Path(job.log_dir).mkdir(parents=True, exist_ok=True)
        self._report = None if job.panes is None else self._open(Path(job.panes) / "report", os.O_CREAT | os.O_TRUNC)

    def close(self) -> None:
        """Let go of logs and panes. Idempotent."""
        self._undo.close()

    @property
    def sinks(self) -> set[Sink]:
        """Where output waits for a reader."""
        return {self.out, self.err, *self._panes.values()}

    @property
    def full(self) -> bool:
        """Whether the ranks have to wait for the reader."""
        return self.out.full or self.err.full

    @property
    def broken(self) -> bool:
        """Whether the reader has gone."""
        return self.out.broken or self.err.broken

    def start(self, rank: int) -> None:
        """A rank begins. Raises OSError when its log can not be written."""
        job, alone = self.job, (self.job.total_ranks or self.job.num_ranks) == 1
        for stream in (STDOUT, STDERR):
            colour = os.isatty(self._sink(stream).fd) and not environment().get("NO_COLOR")
            self._lines[rank, stream] = Lines(rank_prefix(rank, colour) if job.prefix else b"", raw=not job.prefix and alone)
        if job.log_dir is not None:
            self._logs[rank] = self._open(Path(job.log_dir) / f"rank_{rank}.log", os.O_CREAT | os.O_TRUNC)
        if job.panes is not None:       # for reading, too: it opens before anybody looks, and nobody has to
            self._panes[rank] = self._open(Path(job.panes) / f"rank_{rank - job.first_rank}", os.O_NONBLOCK, os.O_RDWR)

    def _open(self, path: Path, flags: int, mode: int = os.O_WRONLY) -> Sink:
        fd = os.open(path, mode | flags, 0o666)
        self._undo.callback(os.close, fd)
        return Sink(fd)

    def _sink(self, stream: int) -> Sink:
        return self.out if stream == STDOUT else self.err

    def take(self, rank: int, stream: int, data: bytes) -> None:
        """A rank has printed; b"" when the stream has ended."""
        log, pane, lines = self._logs.get(rank), self._panes.get(rank), self._lines[rank, stream]
        if log is not None and not log.broken:
            log.write(data)
            log.pump()
            if log.broken:
                self.say(f"rank {rank}: its log in {self.job.log_dir} can not be written any more")
        if pane is not None and not pane.full:
            pane.write(data)
        self._sink(stream).write(lines.feed(data) if data else lines.close())

    def ended(self, rank: int, status: int, told: bool) -> None:
        """A rank has ended; told: after it had been asked to."""
        if pane := self._panes.get(rank):
            pane.write(f"{NAME}: {'ended' if told or not status else describe(status)}\n".encode())

    def last_output(self, rank: int) -> bytes:
        """What to show again of a rank that failed: its stderr, or its stdout when it wrote nothing there."""
        return self._lines[rank, STDERR].tail() or self._lines[rank, STDOUT].tail()

    def say(self, text: str) -> None:
        """A line of the launcher's own."""
        self._write(f"{NAME}: {text}\n".encode())

    def _write(self, words: bytes) -> None:
        self.err.write(words)
        if self._report is not None:
            self._report.write(words)
            self._report.pump()

    def finish_lines(self) -> None:
        """Show the last lines that were left without an end."""
        for (_, stream), lines in self._lines.items():
            self._sink(stream).write(lines.close())

    def accuse(self, rank: int, status: int) -> None:
        """Show whose failure ended the job, and its last output."""
        output = self.last_output(rank)
        self.say(f"rank {rank} {describe(status)}; " + ("its last output:" if output else "it printed nothing"))
        self._write(output if output.endswith(b"\n") or not output else output + b"\n")


class Run(ABC):
    """One job: ranks running, then (by the first failure, a signal, or their own end) stopping, then gone.

    A context manager; to be used once, from the main thread, whose signals are its own meanwhile.
    """

    def __init__(self, job: Job, screen: Screen):
        self.job, self.screen = job, screen
        self.signals: list[int] = []        # that the launcher received
        self.signalled_at = 0.0
        self.child_ended = True
        self.failed: list[tuple[int, int]] = []         # (rank, status) in order, before anybody was told to stop
        self.culprit: tuple[int, int] | None = None
        self.settle_at: float | None = None
        self.stopping = False
        self.kill_at: float | None = None
        self.killed = False

    # --- what a kind of run does

    @abstractmethod
    def _start(self) -> None:
        """Start everything; what is to be undone goes to self.undo. Signals that come meanwhile are in self.signals."""

    @abstractmethod
    def _notice(self, now: float) -> None:
        """Find out who has ended; put failures of ranks that were not told to into self.failed."""

    @abstractmethod
    def _streams(self) -> Iterable[tuple[object, Callable[[], object]]]:
        """The files from which output is still to come, each with what to do when it is there."""

    @abstractmethod
    def _signal(self, number: int) -> None:
        """Pass a signal on to all that runs."""

    @abstractmethod
    def _all_ended(self) -> bool:
        """Whether no rank is left."""

    @abstractmethod
    def _anybody_left(self) -> bool:
        """Whether a rank, or anything that one started, is left."""

    def _keep_stopping(self, now: float) -> None:
        """While stopping: what is to be done again and again."""

    # --- set up and tear down

    def __enter__(self) -> Self:
        self.undo = contextlib.ExitStack()
        try:
            self.selector = (selectors.PollSelector if sys.platform == "linux" else selectors.SelectSelector)()
            self.undo.callback(self.selector.close)
            self.undo.callback(self.screen.close)
            self._watch_signals()
            self._start()
        except BaseException:
            self.undo.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo.close()

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

    # --- the loop

    def to_its_end(self) -> int:
        """The job's exit code, once nobody is left; see Launcher.run."""
        drain_until = None
        while True:
            now = time.monotonic()
            self._notice(now)
            self._advance(now)
            if self.stopping and not self._anybody_left():
                drain_until = drain_until or now + DRAIN_S
                if now >= drain_until or not any(True for _ in self._streams()):
                    break
            self._pass_on(self._patience(now, drain_until))
        return self._report()

    def _pass_on(self, timeout: float) -> None:
        """Wait for something to happen, take what the ranks printed, and hand it to whoever reads us."""
        self._offer()
        full = self.screen.full
        for file, act in self._streams():
            self._follow(file, selectors.EVENT_READ, not full, act)
        for key, _ in self.selector.select(timeout):
            key.data()

    def _offer(self) -> None:
        """Look out for readers of what is waiting to be shown."""
        for sink in self.screen.sinks:
            self._follow(sink.fd, selectors.EVENT_WRITE, not sink.empty, sink.pump)

    def _follow(self, file: object, event: int, wanted: bool, act: object) -> None:
        followed = file in self.selector.get_map()
        if wanted and not followed:
            self.selector.register(file, event, act)
        elif followed and not wanted:
            self.selector.unregister(file)

    def _advance(self, now: float) -> None:
        """Decide whether the others have to stop, and carry on stopping them."""
        if self.failed and not self.stopping:
            self.culprit = next((each for each in self.failed if not is_echo(self.screen.last_output(each[0]))), None)
            self.settle_at = self.settle_at or now + SETTLE_S
            if self.culprit or now >= self.settle_at or self._all_ended():
                self.culprit = self.culprit or self.failed[0]
                self._stop(signal.SIGTERM, now)
        if self.screen.broken:
            self.signals = self.signals or [signal.SIGPIPE]
        if self.signals and not self.stopping:
            self._stop(signal.SIGTERM if self.signals[0] == signal.SIGPIPE else self.signals[0], now)
            if self.signals[0] == signal.SIGINT and not self._all_ended():
                self.screen.say(f"interrupted; the ranks have {self.job.grace_s:g} s to end, Ctrl-C again kills them")
        if not self.stopping and self._all_ended():
            self._stop(signal.SIGTERM, now)     # what the ranks left running
        if self.stopping and not self.killed and (now >= self.kill_at or len(self.signals) > 1):
            self.killed = True
            self._signal(signal.SIGKILL)
        if self.stopping:
            self._keep_stopping(now)

    def _stop(self, number: int, now: float) -> None:
        self.stopping = True
        self.kill_at = now + self.job.grace_s
        self._signal(number)

    def _patience(self, now: float, drain_until: float | None) -> float:
        if drain_until is not None:
            return max(0.0, drain_until - now)
        if self.stopping:
            return POLL_S
        return max(0.0, self.settle_at - now) if self.settle_at is not None else 1.0

    # --- the end

    def _report(self) -> int:
        self.screen.finish_lines()
        self._flush()
        if self.signals:
            return 128 + self.signals[0]
        code = 0
        if self.culprit is not None:
            self.screen.accuse(*self.culprit)
            code = exit_code(self.culprit[1])
        self._flush()
        return code

    def _flush(self) -> None:
        """Wait for the reader to take the rest; a further signal ends the wait."""
        patience = len(self.signals)
        sinks = {sink for sink in (self.screen.out, self.screen.err)}
        while len(self.signals) == patience and not all(sink.empty for sink in sinks):
            self._offer()
            for key, _ in self.selector.select(1.0):
                if key.data is not None:
                    key.data()
