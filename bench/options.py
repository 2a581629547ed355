"""What the benchmarks of systems have in common on the command line, and around their runs."""
from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence

import psutil

from bench import congestion
from bench.report import machine, parse_list, parse_size
from bench.systems import FLEET, RIVALS, SYSTEMS


def add_common(parser: argparse.ArgumentParser, sizes: str) -> None:
    """The options that benchmarks of systems on one host share."""
    add_systems(parser, sizes, FLEET, RIVALS)
    parser.add_argument("--ranks", type=lambda text: parse_list(text, int), default=[2], metavar="N,M",
                        help="numbers of ranks, one run each (default 2)")
    parser.add_argument("--congestion", choices=congestion.CHOICES, default="auto",
                        help="TCP congestion control of all systems (default: cubic or reno, in a private network namespace)")
    parser.add_argument(congestion.INSIDE, action="store_true", help=argparse.SUPPRESS)


def add_systems(parser: argparse.ArgumentParser, sizes: str, ours: Sequence[str], rivals: Sequence[str]) -> None:
    """Which systems, which sizes, and where the samples go."""
    parser.add_argument("--rivals", action="store_true", help=f"measure {', '.join(rivals)} too")
    parser.add_argument("--systems", type=lambda text: parse_list(text), metavar="A,B",
                        help="exactly these (default: " + ",".join(ours) + ")")
    parser.add_argument("--sizes", type=lambda text: parse_list(text, parse_size), default=parse_list(sizes, parse_size),
                        metavar="A,B", help=f"default {sizes}")
    parser.add_argument("--json", metavar="FILE", help="write everything here, every sample included")


def settle(parser: argparse.ArgumentParser, options: argparse.Namespace) -> argparse.Namespace:
    """The options with systems filled in, once they make sense; ends the program with a usage error when they do not."""
    settle_systems(parser, options, FLEET, RIVALS)
    if any(ranks < 2 for ranks in options.ranks):
        parser.error("an all-reduce wants 2 ranks or more")
    return options


def settle_systems(parser: argparse.ArgumentParser, options: argparse.Namespace, ours: Sequence[str],
                   rivals: Sequence[str]) -> None:
    """As settle, for the options of add_systems."""
    options.systems = options.systems or [*ours, *(rivals if options.rivals else ())]
    if unknown := [name for name in options.systems if name not in SYSTEMS]:
        parser.error(f"no system called {unknown[0]!r}; there are: {', '.join(SYSTEMS)}")
    if any(size < 4 or size % 4 for size in options.sizes):
        parser.error("a size is a positive number of float32s: a multiple of 4 bytes")


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does, so that the ranks are ended with it."""
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def wants_mpirun(systems: list[str]) -> bool:
    """Whether the ranks should be an MPI job: MPI is to be measured, and is here."""
    if "mpi" not in systems:
        return False
    try:
        from bench.rivals import mpi
    except ImportError:
        return False
    return mpi.can_start_ranks()


def fits(num_bytes: int, num_ranks: int, num_systems: int) -> bool:
    """Whether free memory holds arrays of that size for all systems of all ranks, and those that check the sums."""
    return num_ranks * (num_systems + 6) * num_bytes < 0.8 * psutil.virtual_memory().available


class OtherWork:
    """How busy the machine was with other things than this process and its ended children, since this object was made."""

    def __init__(self) -> None:
        self._start, self._busy, self._own = time.monotonic(), _busy_s(), _own_s()

    def cores(self) -> float:
        """Cores that others kept busy, on average."""
        others_s = _busy_s() - self._busy - (_own_s() - self._own)
        return max(0.0, others_s / (time.monotonic() - self._start))


def _busy_s() -> float:
    times = psutil.cpu_times()
    return times.user + times.system + times.nice


def _own_s() -> float:
    return sum(os.times()[:4])


def print_machine(in_force: str) -> dict[str, str]:
    """Print and return what the timings depend on."""
    facts = machine() | {"congestion control": in_force}
    for key, value in facts.items():
        print(f"{key + ':':<20}{value}")
    return facts
