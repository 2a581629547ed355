"""P4: what tests of distributed scripts need: ranks without processes."""
from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from pyfleet.config import ClusterConfig
from pyfleet.engines.mock import MockEngine, make_world
from pyfleet.errors import ConfigError, Timeout
from pyfleet.fleet import Fleet, enter, exchange_cards, shutdown
from pyfleet.wiring import Deadline

GRACE_S = 5.0       # for ranks that are told to end: they wake at once, and then run their finally blocks


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 60.0) -> list[Any]:
    """fn(*args) on every rank of a fleet of threads; what it returned, in rank order.

    Within fn pyfleet is initialised with backend="mock": pyfleet.rank(), pyfleet.all_reduce() and so on are those of
    the thread's rank. Results are deterministic: reductions go in rank order. Threads share the process's globals, such
    as torch's generator and its number of threads.

    Args:    timeout: seconds for everything.
    Raises:  the first failure of a rank, which a note on it names; the other ranks get PeerLost naming that rank.
             Timeout when ranks are not done in time: they get it too, and a rank that still does not end is left behind.
    """
    if not timeout > 0:
        raise ConfigError(f"timeout must be positive, not {timeout}")
    world, results, failures = make_world(world_size, timeout), [None] * world_size, []
    threads = [threading.Thread(target=_run, args=(engine, fn, args, results, failures), daemon=True,
                                name=f"rank {engine.rank}") for engine in world]
    try:
        for thread in threads:
            thread.start()
        running = _join(threads, timeout)
    except BaseException as error:
        _lose_all(world, f"was stopped ({type(error).__name__})")
        raise
    failed = failures[:1]
    if running:
        _lose_all(world, f"was stopped: the ranks were not done within {timeout:g} s")
        _join(threads, GRACE_S)
    if running and not failed:
        raise Timeout(f"ranks {', '.join(map(str, running))} of {world_size} were not done within {timeout:g} s",
                      rank=running[0])
    for rank, error in failed:
        error.add_note(f"in rank {rank} of {world_size}")
        raise error
    return results


def _join(threads, seconds):
    """Wait for the threads, together for so many seconds; the numbers of those that still run."""
    deadline = Deadline(seconds)
    for thread in threads:
        thread.join(deadline.left())
    return [number for number, thread in enumerate(threads) if thread.is_alive()]


def _lose_all(world, reason):
    for engine in world:
        engine.lose(reason)


def _run(engine: MockEngine, fn, args, results, failures):
    """One rank, from beginning to end; never raises."""
    try:
        enter(Fleet(engine, exchange_cards(engine, engine.timeout), ClusterConfig()))
        results[engine.rank] = fn(*args)
    except BaseException as error:      # noqa: BLE001 raised by run_ranks
        failures.append((engine.rank, error))
        engine.lose(f"failed with {type(error).__name__}: {error}")
    finally:
        shutdown()
        engine.close()
