"""What the death of a rank does to the others: real processes, real signals."""
import os
import resource
import signal
import time
from pathlib import Path

import numpy as np
import pytest

import pyfleet

BOUND_S = 0.25          # the contract: survivors of a kill on the same host are released within this


def reduce_for_ever(count, where):
    """In a rank: all-reduce until the group dies; (type, rank, message, when) of the error."""
    x = pyfleet.zeros(count, like="numpy") if where == "arena" else np.zeros(count, np.float32)
    try:
        while True:
            pyfleet.all_reduce(x)
    except pyfleet.FleetError as error:
        return type(error).__name__, error.rank, str(error), time.monotonic()


def shared_files():
    """Names of shared memory and temporary meeting places that belong to pyfleet."""
    return {path.name for folder in ("/dev/shm", "/tmp") for path in Path(folder).glob("pyfleet*")
            if not path.name.startswith("pyfleet-test-")}


def kill_in_the_middle(group, victim, count, where, wait_s):
    """Start the loop on all ranks, kill the victim after wait_s; what the survivors report and when it died."""
    survivors = [rank for rank in range(group.size) if rank != victim]
    group.start(reduce_for_ever, count, where)
    time.sleep(wait_s)                                    # the instant of the kill is what varies
    group.kill(victim)
    died = time.monotonic()
    return group.collect(survivors), died


@pytest.mark.parametrize("transport", ("shm", "tcp"))
@pytest.mark.parametrize(("size", "count", "where"), [
    (2, 1, "ordinary"), (2, 1_000_000, "arena"), (3, 1_000_000, "ordinary"), (3, 10_000_000, "arena"), (4, 50_000, "ordinary"),
])
def test_survivors_of_a_kill_name_the_dead_in_time(fresh_ranks, transport, size, count, where):
    before = shared_files()
    group = fresh_ranks(size, transport)
    reports, died = kill_in_the_middle(group, size - 1, count, where, 0.3)
    for kind, rank, message, when in reports:
        assert (kind, rank) == ("PeerLost", size - 1), message
        assert when - died < BOUND_S
    group.close()
    assert shared_files() <= before


@pytest.mark.parametrize("transport", ("shm", pytest.param("tcp", marks=pytest.mark.slow)))
def test_a_hundred_kills_in_a_row(fresh_ranks, transport):
    before, worst = shared_files(), 0.0
    for k in range(100):
        group = fresh_ranks(2, transport)
        (report,), died = kill_in_the_middle(group, 1, (1, 1000, 100_000, 3_000_000)[k % 4], "ordinary", 0.05 + 0.001 * k)
        assert report[:2] == ("PeerLost", 1), report
        worst = max(worst, report[3] - died)
        pids = [process.pid for process in group.processes]
        group.close()
        assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert worst < BOUND_S, worst
    assert shared_files() <= before


def stopped_peer():
    try:
        pyfleet.all_reduce(np.zeros(1000), timeout=0.5)
    except pyfleet.Timeout as error:
        return error.rank


@pytest.mark.parametrize("transport", ("shm", "tcp"))
def test_a_stopped_rank_is_a_timeout_that_names_it(fresh_ranks, transport):
    group = fresh_ranks(3, transport)
    group.kill(1, signal.SIGSTOP)
    started = time.monotonic()
    assert group.run(stopped_peer, only=(0, 2)) == [1, 1]
    assert time.monotonic() - started < 3
    group.kill(1, signal.SIGCONT)


def give_up_on_the_slow(count):
    """In a rank: reduce an arena tensor until it fails; then fill it, and watch that it stays as it is."""
    x = pyfleet.empty(count, like="numpy")
    x[:] = 1
    try:
        while True:
            pyfleet.all_reduce(x, "max", timeout=0.3)
    except pyfleet.FleetError as error:
        x[:] = 7
        return type(error).__name__, x


held = {}


def hold_on(count):
    kind, held["x"] = give_up_on_the_slow(count)
    return kind


def unchanged():
    return bool((held["x"] == 7).all())


def test_a_rank_that_was_given_up_on_cannot_write_to_the_others_later(fresh_ranks):
    group = fresh_ranks(2, "shm")
    group.start(hold_on, 20_000_000)
    time.sleep(0.2)                                      # in the middle of a call, most likely in its inner loop
    group.kill(1, signal.SIGSTOP)
    assert group.collect((0,)) == ["Timeout"]
    group.kill(1, signal.SIGCONT)
    group.collect((1,))
    assert group.run(unchanged) == [True, True]


def fail_without_descriptors():
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    kinds = []
    for _ in range(2):
        try:
            pyfleet.barrier(timeout=0.2)
        except pyfleet.Timeout as error:
            kinds.append((error.rank, getattr(error, "__notes__", [])))
    return kinds


def test_memory_that_cannot_be_left_does_not_hide_the_fault(fresh_ranks):
    (first, again), = fresh_ranks(2, "shm").run(fail_without_descriptors, only=(0,))
    assert first[0] == again[0] == 1
    assert "could not be left" in first[1][0] and not again[1]


def wait_for_others():
    try:
        pyfleet.barrier()
    except KeyboardInterrupt:
        try:
            pyfleet.barrier()
        except pyfleet.FleetError as error:
            return "interrupted", str(error)
    except pyfleet.FleetError as error:
        return type(error).__name__, str(error)


@pytest.mark.parametrize("transport", ("shm", "tcp"))
def test_ctrl_c_interrupts_a_wait_and_the_others_learn_of_it(fresh_ranks, transport):
    group = fresh_ranks(3, transport)
    group.start(wait_for_others, only=(0, 1))
    time.sleep(0.3)                                      # let them block; nothing tells when a process sleeps
    group.kill(0, signal.SIGINT)
    (first, why), (second, message) = group.collect((0, 1))
    assert first == "interrupted" and "was interrupted" in why
    assert second == "PeerLost" and "rank 0" in message and "interrupted" in message


def forked():
    pid = os.fork()
    if pid == 0:
        try:
            pyfleet.barrier()
            code = 1
        except pyfleet.NotInitialized:
            code = 0
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    pyfleet.barrier()
    return code


@pytest.mark.parametrize("transport", ("shm", "tcp"))
def test_a_forked_child_is_told_to_init_and_harms_nobody(ranks, transport):
    assert ranks(2, transport).run(forked) == [0, 0]


def idle_then_count():
    before = time.process_time()
    pyfleet.barrier()
    return time.process_time() - before


def come_late():
    time.sleep(1.0)
    pyfleet.barrier()


@pytest.mark.parametrize("transport", ("shm", "tcp"))
def test_waiting_burns_no_cpu(ranks, transport):
    group = ranks(2, transport)
    group.start(idle_then_count, only=(0,))
    group.start(come_late, only=(1,))
    assert group.collect((0,))[0] < 0.03
    group.collect((1,))
