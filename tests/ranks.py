"""Real ranks for tests: N processes that have met, each waiting for functions to run.

    def sum_of(n): ...                          # a module-level function, called in every rank
    results = ranks(3, "tcp").run(sum_of, 10)   # one result per rank, or RankError with the remote traceback
"""
from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import Connection, wait
from pathlib import Path

ROOT = Path(__file__).parent.parent
PATIENCE_S = 120        # for anything that ranks do in a test; a hang ends here with a list of who is missing


class RankError(AssertionError):
    """A function failed in a rank; `.error` is its exception, `.rank` where."""

    def __init__(self, rank, error, trace):
        super().__init__(f"rank {rank}: {trace}")
        self.rank, self.error = rank, error


class Nursery:
    """A process that has imported everything and forks ranks on demand: they start in milliseconds, not seconds.

    Ranks are orphaned at once and adopted by the test's process, which can wait for them like its own children.
    """

    def __init__(self):
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(36, 1, 0, 0, 0) != 0:               # PR_SET_CHILD_SUBREAPER
            raise OSError(ctypes.get_errno(), "prctl")
        self.sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        variables = {name: value for name, value in os.environ.items() if not name.startswith("PYFLEET_")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.worker", "nursery", str(theirs.fileno())], cwd=ROOT, stdin=subprocess.DEVNULL,
            env=variables | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}, pass_fds=[theirs.fileno()])
        theirs.close()

    def start(self, mode, env, pipe, namespace=None):
        """A new rank process that runs tests.worker on the descriptor `pipe`, in a network namespace."""
        socket.send_fds(self.sock, [json.dumps([mode, env, namespace]).encode()], [pipe])
        return Process(int(self.sock.recv(100)))


class Process:
    """An adopted process, with what is needed of subprocess.Popen."""

    def __init__(self, pid):
        self.pid, self.returncode, self.watch = pid, None, os.pidfd_open(pid)

    def wait(self, timeout=None):
        if self.returncode is None:
            if not select.select([self.watch], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(f"rank process {self.pid}", timeout)
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            os.close(self.watch)
        return self.returncode

    def poll(self):
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


_nursery = None


def start_rank(mode, env, pipe, namespace=None):
    """A rank process: from the nursery on Linux, a fresh interpreter elsewhere."""
    global _nursery
    if sys.platform == "linux":
        _nursery = _nursery or Nursery()
        return _nursery.start(mode, env, pipe.fileno(), namespace)
    return subprocess.Popen([sys.executable, "-m", "tests.worker", mode, str(pipe.fileno())], cwd=ROOT,
                            env=os.environ | env, pass_fds=[pipe.fileno()], stdin=subprocess.DEVNULL)


class Ranks:
    """N rank processes. They run tests.worker, which calls pyfleet.init() unless `init` is False.

    Args:    env: extra environment, the same for all ranks.
             namespaces: the network namespace of each rank, see tests.network; None for the caller's own.
    """

    def __init__(self, size: int, transport: str = "auto", *, init: bool = True, env: dict | None = None,
                 namespaces: list[str] | None = None):
        self.size, self.transport = size, transport
        self.directory = tempfile.TemporaryDirectory(prefix="pyfleet-test-")
        self.processes, self.pipes = [], []
        for rank in range(size):
            mine, theirs = socket.socketpair()
            with theirs:
                self.processes.append(start_rank("init" if init else "bare", {
                    "PYFLEET_RANK": str(rank), "PYFLEET_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1",
                    "PYFLEET_RENDEZVOUS": f"file://{self.directory.name}/meet", "PYFLEET_TRANSPORT": transport,
                    "PYFLEET_HOME": os.environ["PYFLEET_HOME"], **(env or {})},
                    theirs, namespaces[rank] if namespaces else None))
            self.pipes.append(Connection(mine.detach()))
        if init:
            self.collect()

    def start(self, function, *args, only=None):
        """Have the ranks (all, or those in `only`) call function(*args); returns at once."""
        for rank in self._chosen(only):
            self.pipes[rank].send((function, args))

    def collect(self, only=None, *, errors: bool = False):
        """What the started functions returned, per rank; with errors=True, exceptions stand in their place."""
        chosen, results = self._chosen(only), {}
        deadline = time.monotonic() + PATIENCE_S
        while len(results) < len(chosen):
            pending = [self.pipes[rank] for rank in chosen if rank not in results]
            ready = wait(pending, max(0, deadline - time.monotonic()))
            if not ready:
                missing = [rank for rank in chosen if rank not in results]
                self.close()
                raise AssertionError(f"ranks {missing} did not answer within {PATIENCE_S} s")
            for pipe in ready:
                rank = self.pipes.index(pipe)
                try:
                    results[rank] = pipe.recv()
                except (EOFError, ConnectionResetError):
                    code = self.processes[rank].wait(PATIENCE_S)
                    results[rank] = (False, ProcessLookupError(f"rank {rank} ended with {code}"), f"ended with {code}")
        if not errors:
            for rank in chosen:
                good, value, trace = results[rank]
                if not good:
                    raise RankError(rank, value, trace)
        return [results[rank][1] for rank in chosen]

    def run(self, function, *args, only=None, errors: bool = False):
        """start, then collect."""
        self.start(function, *args, only=only)
        return self.collect(only, errors=errors)

    def kill(self, rank: int, sig: int = signal.SIGKILL):
        """Send a signal to a rank."""
        self.processes[rank].send_signal(sig)

    def usable(self) -> bool:
        """Whether all processes live and their group does."""
        if any(process.poll() is not None for process in self.processes):
            return False
        return all(self.run(group_lives))

    def close(self):
        """End all processes."""
        for pipe in self.pipes:
            with contextlib.suppress(OSError):
                pipe.send(None)
        deadline = time.monotonic() + 10
        for process in self.processes:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for pipe in self.pipes:
            pipe.close()
        self.directory.cleanup()

    def _chosen(self, only):
        return range(self.size) if only is None else list(only)


def group_lives():
    """In a rank: whether its group can still be used."""
    from pyfleet import engines
    return engines.is_current() and engines.current().group.failure is None
