"""Rank processes for benchmarks: start them, keep them in step, hear rank 0, leave none behind.

A benchmark module has `rank_main(team, options)`; `Ranks` runs it in every rank process. The ranks keep in step through a
board of 64-bit words in a mapped file, which needs none of the systems under test and costs no system call while all
are awake. Under mpirun the same processes are an MPI job as well.
"""
from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import mmap
import os
import pathlib
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Self

import psutil

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAYLOAD_BITS = 48
_STRIDE = 32        # words between the slots of two ranks: no cache line, nor the pair that prefetch fetches, is shared
_SPINS = 200        # pure spins before each turn yields the core: 13 us in CPython 3.11, where awake ranks differ by 0.3 us
_AWAKE_S = 0.05     # then sleep between looks: this wait is for something slow, and its core is wanted
_STALL_S = 240.0    # no progress for so long is a hang: four times what any system is given to find its peers


class RanksFailed(Exception):
    """A rank process died or stopped; the message names it, what it was at, and its last words."""


class Team:
    """One rank's side: in step with the others by `exchange`, heard by the parent through `emit` (rank 0)."""

    def __init__(self, folder: pathlib.Path, rank: int, size: int, timeout_s: float = 180.0) -> None:
        self.folder, self.rank, self.size = folder, rank, size
        self._timeout_s = timeout_s
        self._turn = self._notes = 0
        self._spins = _SPINS if size <= usable_cores() else 0
        with open(folder / "board", "r+b") as file:
            self._words = memoryview(mmap.mmap(file.fileno(), 0)).cast("Q")

    def exchange(self, payload: int = 0, patient: bool = False) -> list[int]:
        """Every rank's payload (0 <= payload < 2**48), in rank order, once all have called: a barrier that carries a word.

        Patience leaves the core to ranks that still work, where there are more ranks than cores.

        Value and turn travel in one aligned word, so no memory order is assumed; slots alternate, as a rank can be one turn
        ahead of another and never two.
        Raises:  TimeoutError when a rank does not come.
        """
        self._turn = (self._turn + 1) & 0xFFFF
        turn, words, mask = self._turn, self._words, (1 << PAYLOAD_BITS) - 1
        half = (turn & 1) * (_STRIDE // 2)
        words[self.rank * _STRIDE + half] = turn << PAYLOAD_BITS | payload
        payloads = []
        for peer in range(self.size):
            word = words[peer * _STRIDE + half]
            if word >> PAYLOAD_BITS != turn:
                word = self._await(peer, peer * _STRIDE + half, turn, patient and self._spins == 0)
            payloads.append(word & mask)
        return payloads

    def _await(self, peer: int, index: int, turn: int, patient: bool) -> int:
        words, start, spins = self._words, time.perf_counter(), 0
        while (word := words[index]) >> PAYLOAD_BITS != turn:
            spins += 1
            if spins > self._spins:
                os.sched_yield()
                waited_s = time.perf_counter() - start
                if patient or waited_s > _AWAKE_S:
                    time.sleep(2e-4)
                if waited_s > self._timeout_s:
                    raise TimeoutError(f"rank {peer} did not come to turn {turn} within {self._timeout_s:.0f} s")
        return word

    def agree(self, trouble: str | None) -> str | None:
        """The first rank's trouble, the same text on every rank; None when no rank has any."""
        self._notes += 1
        if trouble:
            self._note(self.rank).write_text(trouble)
        for rank, troubled in enumerate(self.exchange(bool(trouble), patient=True)):
            if troubled:
                return self._note(rank).read_text()
        return None

    def _note(self, rank: int) -> pathlib.Path:
        return self.folder / f"note-{self._notes}-{rank}"

    def progress(self, note: str) -> None:
        """Tell the parent, from rank 0, what comes next: it names that when the ranks die, and waits no longer for it."""
        if self.rank == 0:
            (self.folder / "at.new").write_text(note)
            os.replace(self.folder / "at.new", self.folder / "at")
            self.tick()

    def tick(self) -> None:
        """Show the parent, from rank 0, that work goes on."""
        if self.rank == 0:
            self._words[self.size * _STRIDE] += 1

    def emit(self, **event: object) -> None:
        """Hand an event to the parent, from rank 0; the other ranks' calls do nothing."""
        if self.rank == 0:
            with open(self.folder / "events", "a") as file:
                file.write(json.dumps(event) + "\n")


class Ranks:
    """`size` rank processes that run module.rank_main(team, options); a context manager that leaves no process behind.

    Args:    first: the lowest rank to start; the caller takes the ranks below it with `team(rank)`.
             mpi: start them under mpirun, so that they are one MPI job as well (first must be 0).
             prefix: the command that starts another one where a rank belongs; none: they all start here.
    """

    def __init__(self, module: str, size: int, options: dict, *, mpi: bool = False, first: int = 0,
                 prefix: Callable[[int], list[str]] = lambda rank: []) -> None:
        memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix=f"bench-{secrets.token_hex(3)}-", dir=memory))
        self.size = size
        self._processes: list[subprocess.Popen] = []
        (self.folder / "board").write_bytes(bytes(8 * _STRIDE * (size + 1)))
        (self.folder / "events").touch()
        (self.folder / "options").write_text(json.dumps({"size": size, "module": module, "options": options}))
        command = [sys.executable, "-m", "bench.ranks", str(self.folder)]
        try:
            if mpi:
                assert first == 0, "mpirun starts every rank or none"
                self._start(["mpirun", "--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-n", str(size), *command])
            else:
                for rank in range(first, size):
                    self._start([*prefix(rank), *command, str(rank)])
        except BaseException:
            self.close()
            raise

    def _start(self, command: list[str]) -> None:
        # One thread per rank, as each has one core at most; and the session is its own, so that the parent decides how
        # Ctrl-C ends it.
        environ = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
                                "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
                                "PYTHONUNBUFFERED": "1"}
        with open(self.folder / "said", "ab") as said:
            self._processes.append(subprocess.Popen(
                command, env=environ, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True,
                preexec_fn=_end_with_parent))  # noqa: PLW1509 - nothing else runs in this process yet

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def team(self, rank: int) -> Team:
        """The side of a rank that the calling process takes itself."""
        return Team(self.folder, rank, self.size)

    def events(self) -> Iterator[dict]:
        """What rank 0 emits, as it comes, until all ranks have ended well.

        Raises:  RanksFailed when a process ends badly, or makes no progress for minutes.
        """
        ticks, moved = -1, time.monotonic()
        # Unbuffered: a seek within a buffer reads again what was read before, and the ticks would stand still.
        with open(self.folder / "board", "rb", buffering=0) as board, open(self.folder / "events") as events:
            pending = ""
            while True:
                codes = [process.poll() for process in self._processes]     # first: what ended has said all it will
                pending += events.read()
                *lines, pending = pending.split("\n")
                for line in lines:
                    yield json.loads(line)
                if any(codes):
                    raise RanksFailed(self._obituary(next(code for code in codes if code)))
                if all(code == 0 for code in codes):
                    return
                board.seek(8 * _STRIDE * self.size)
                if (seen := int.from_bytes(board.read(8), sys.byteorder)) != ticks:
                    ticks, moved = seen, time.monotonic()
                elif time.monotonic() - moved > _STALL_S:
                    raise RanksFailed(f"no progress for {_STALL_S:.0f} s {self._place()}{self._last_words()}")
                time.sleep(0.1)

    def _obituary(self, code: int) -> str:
        how = f"exit status {code}" if code > 0 else f"signal {signal.Signals(-code).name}"
        return f"the ranks ended with {how} {self._place()}{self._last_words()}"

    def _place(self) -> str:
        try:
            return f"at {(self.folder / 'at').read_text()}"
        except FileNotFoundError:
            return "before they were under way"

    def _last_words(self) -> str:
        lines = (self.folder / "said").read_text(errors="replace").strip().splitlines()[-15:]
        return "".join(f"\n    | {line}" for line in lines)

    def close(self) -> None:
        """End every rank that still runs, mpirun's included, and remove the folder. Idempotent."""
        for process in self._processes:
            if process.poll() is None:
                process.terminate()                 # mpirun hands it on and clears up its own files
        deadline = time.monotonic() + 3.0
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
            if process.poll() is None:
                process.kill()
                process.wait()
        for pid in self._strays():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _strays(self) -> list[int]:
        """Ranks that outlived mpirun; only a process that still has our folder in its command line is one of ours."""
        strays = []
        for note in self.folder.glob("pid-*"):
            with contextlib.suppress(psutil.Error, ValueError):
                pid = int(note.read_text())
                if str(self.folder) in psutil.Process(pid).cmdline():
                    strays.append(pid)
        return strays


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _end_with_parent() -> None:
    """Have the kernel end this process when its parent goes, also when that is killed (Linux)."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM, 0, 0, 0)


def _rank_process(argv: list[str]) -> None:
    folder = pathlib.Path(argv[0])
    _end_with_parent()
    rank = int(argv[1] if len(argv) > 1 else os.environ["OMPI_COMM_WORLD_RANK"])
    (folder / f"pid-{rank}").write_text(str(os.getpid()))
    job = json.loads((folder / "options").read_text())
    importlib.import_module(job["module"]).rank_main(Team(folder, rank, job["size"]), job["options"])


if __name__ == "__main__":
    _rank_process(sys.argv[1:])
