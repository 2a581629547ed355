"""What the machine allows: memory and TCP, measured by the ranks themselves, in the run that they bound."""
from __future__ import annotations

import contextlib
import select
import socket
import time

import numpy as np

from bench.ranks import Team
from bench.verbs import Volume

_SAMPLES = 9
_CHUNK_BYTES = 512 << 10    # what NCCL and hivemind hand to one call


def measure(team: Team, num_bytes: int) -> dict[str, float]:
    """Bytes per second of each bound; the best of a few samples, as a bound is what undisturbed hardware can do.

    copy_one:  memory copied by rank 0 while the others sleep.
    copy_all:  memory copied by all ranks at once, their sum.
    rewrite:   every rank rewrites its own array in place at once; one rank's rate. An all-reduce in place reads and writes as
               much; only stores that go past the cache, which numpy does not use here, can make it faster than this.
    tcp:       every rank sends to the next one and receives from the previous one at once; one direction of one rank.
    """
    team.progress("the memory bounds")
    source = np.ones(num_bytes // 4, np.float32)
    target = np.zeros_like(source)
    alone = _best(team, lambda: np.copyto(target, source), [0])
    copy = _best(team, lambda: np.copyto(target, source), range(team.size))
    rewrite = _best(team, lambda: np.negative(source, out=source), range(team.size))
    team.progress("the TCP bound")
    size = source.nbytes
    return {"copy_one": size / alone, "copy_all": team.size * size / copy, "rewrite": size / rewrite,
            "tcp": measure_tcp(team, source, target, ["127.0.0.1"] * team.size)}


def measure_tcp(team: Team, source: np.ndarray, target: np.ndarray, addresses: list[str], samples: int = _SAMPLES) -> float:
    """Bytes per second of one direction while every rank sends source to the next one and receives target.

    Args:    addresses: each rank's own, where it listens.  samples: of which the best counts.
    """
    with _ring(team, addresses) as (to_next, from_previous):
        best = _best(team, lambda: _pass_on(to_next, from_previous, source, target), range(team.size), samples)
    return source.nbytes / best


def measure_one_way(team: Team, num_bytes: int) -> float:
    """Bytes per second over TCP from rank 0 to rank 1 while nothing goes back and the other ranks sleep."""
    team.progress("the TCP bound of one direction")
    source, target = np.ones(num_bytes // 4, np.float32), np.zeros(num_bytes // 4, np.float32)
    with _ring(team, ["127.0.0.1"] * team.size) as (to_next, from_previous):
        turns = {0: (source, target[:0]), 1: (source[:0], target)}

        def work() -> None:
            if team.rank in turns:
                _pass_on(to_next, from_previous, *turns[team.rank])
        return source.nbytes / _best(team, work, range(min(2, team.size)))


def verb_floor_s(bounds: dict[str, float], kind: str, volume: Volume, num_ranks: int, num_bytes: int) -> float:
    """The least seconds that "memory" or "tcp" leaves to a verb whose whole array has num_bytes.

    Memory: everything is read and written once, at the rate at which all ranks together copied or rewrote. TCP: all ranks
    together send no more than they did both ways at once, and the busiest one no more than it did with the link for itself.

    Args:    bounds: of `measure`, and "tcp_one_way" of `measure_one_way`.
    """
    if kind == "memory":
        rate = 2 * max(bounds["copy_all"], bounds["copy_one"], num_ranks * bounds["rewrite"])
        return num_bytes * (volume.read + volume.written) / rate
    alone = max(bounds["tcp"], bounds["tcp_one_way"])
    return num_bytes * max(volume.sent / (num_ranks * max(bounds["tcp"], alone / num_ranks)), volume.busiest / alone)


def all_reduce_bound(bounds: dict[str, float], kind: str, num_ranks: int) -> float:
    """The rate (array bytes per second) that "memory" or "tcp" leaves to an all-reduce among this many ranks.

    Over TCP each rank must send 2(N-1)/N of its bytes (Patarasuk and Yuan 2009), and receive as many.
    """
    if kind == "memory":
        return bounds["rewrite"]
    return bounds["tcp"] * num_ranks / (2 * (num_ranks - 1))


def _best(team: Team, work, ranks, samples: int = _SAMPLES) -> float:
    """Seconds that the slowest of `ranks` takes, in the best of a few samples."""
    best = float("inf")
    for _ in range(samples + 1):       # the first one maps the pages
        team.tick()
        team.exchange()
        start = time.perf_counter_ns()
        if team.rank in ranks:
            work()
        elif len(ranks) == 1:
            time.sleep(0.1)             # leave memory and cores to the one
        elapsed = time.perf_counter_ns() - start if team.rank in ranks else 0
        best = min(best, max(team.exchange(elapsed)) / 1e9)
    return best


@contextlib.contextmanager
def _ring(team: Team, addresses: list[str]):
    """Connected sockets (to the next rank, from the previous one); of two ranks, one connection for both directions."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server((addresses[team.rank], 0)))
        ports = team.exchange(listener.getsockname()[1])
        listener.settimeout(30)
        pair = team.size == 2
        to_next = from_previous = None
        if not (pair and team.rank == 1):
            peer = (team.rank + 1) % team.size
            to_next = stack.enter_context(socket.create_connection((addresses[peer], ports[peer]), 30))
        if not (pair and team.rank == 0):
            from_previous = stack.enter_context(listener.accept()[0])
        to_next, from_previous = to_next or from_previous, from_previous or to_next
        for link in (to_next, from_previous):
            link.setblocking(False)
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield to_next, from_previous


def _pass_on(to_next: socket.socket, from_previous: socket.socket, source: np.ndarray, target: np.ndarray) -> None:
    """Send all of source while receiving all of target."""
    unsent, missing = memoryview(source).cast("B"), memoryview(target).cast("B")
    poll = select.poll()
    while unsent or missing:
        # A turn gives each direction what it takes at once, and waits only when neither took anything.
        moved = False
        if unsent:
            with contextlib.suppress(BlockingIOError):
                unsent = unsent[to_next.send(unsent[:_CHUNK_BYTES]):]
                moved = True
        if missing:
            with contextlib.suppress(BlockingIOError):
                got = from_previous.recv_into(missing[:_CHUNK_BYTES])
                if got == 0:
                    raise ConnectionResetError("the previous rank hung up")
                missing = missing[got:]
                moved = True
        if not moved:
            _wait(poll, to_next if unsent else None, from_previous if missing else None)


def _wait(poll: select.poll, sending: socket.socket | None, receiving: socket.socket | None) -> None:
    wanted: dict[int, int] = {}
    for link, event in ((sending, select.POLLOUT), (receiving, select.POLLIN)):
        if link is not None:
            wanted[link.fileno()] = wanted.get(link.fileno(), 0) | event
    for fd, events in wanted.items():
        poll.register(fd, events)
    if not poll.poll(30_000):
        raise TimeoutError("a connection between neighbours stands still")
    for fd in wanted:
        poll.unregister(fd)
