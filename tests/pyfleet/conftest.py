"""Ranks as threads of this process, for tests of what stands on an engine rather than of the engine."""
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from pyfleet.engines import Work
from pyfleet.errors import OutOfStep

PATIENCE_S = 30


class ThreadWork(Work):
    def __init__(self, future):
        self.future = future

    def wait(self, timeout=None):
        return self.future.result(PATIENCE_S if timeout is None else timeout)

    def done(self):
        return self.future.done()


class ThreadEngine:
    """One rank of a group of threads. `calls` lists what it was asked: (verb, dtype, number of elements, op)."""

    name, epoch = "threads", 1

    def __init__(self, rank, world_size, barrier, offers):
        self.rank = self.local_rank = rank
        self.world_size = self.local_world_size = world_size
        self.meet, self.offers = barrier, offers
        self.calls, self.allocated = [], []
        self.pool = ThreadPoolExecutor(1)

    def all_reduce(self, x, op="sum", *, algorithm="auto", timeout=None):
        self.submit("all_reduce", x, op).wait()

    def broadcast(self, x, src=0, *, timeout=None):
        self.submit("broadcast", x, src).wait()

    def barrier(self, *, timeout=None):
        self.submit("barrier").wait()

    def submit(self, verb, *args, **kwargs):
        return ThreadWork(self.pool.submit(self._run, verb, *args, **kwargs))

    def allocate(self, nbytes):
        self.allocated.append(bytearray(b"\xa5" * nbytes))      # not zeros: nobody may rely on them
        return self.allocated[-1]

    def stats(self):
        sent = sum(dtype.itemsize * num_elems for _, dtype, num_elems, _ in self.calls)
        return {"links": {}, "shared_memory": {"read_bytes": sent}, "operations": {}}

    def close(self):
        self.pool.shutdown(wait=False)

    def _run(self, verb, x=None, how=None):
        mine = torch.as_tensor([] if x is None else x)
        call = (verb, mine.dtype, mine.numel(), how)
        self.calls.append(call)
        self.offers[self.rank] = (call, mine)
        self.meet.wait(PATIENCE_S)
        offers = list(self.offers)
        if {other for other, _ in offers} != {call}:
            self.meet.wait(PATIENCE_S)
            raise OutOfStep(f"ranks called {[other for other, _ in offers]}")
        inputs = [tensor for _, tensor in offers]
        result = None
        if verb == "broadcast":
            result = inputs[how].clone()
        elif verb == "all_reduce":
            result = self._reduce(torch.stack(inputs), how)
        self.meet.wait(PATIENCE_S)
        if result is not None:
            mine.copy_(result)
        self.meet.wait(PATIENCE_S)

    @staticmethod
    def _reduce(stacked, op):
        if op in ("min", "max"):
            return getattr(stacked, f"a{op}")(0)
        wide = stacked.float() if stacked.dtype in (torch.float16, torch.bfloat16) else stacked
        return {"sum": wide.sum, "mean": wide.mean}[op](0).to(stacked.dtype)


def run_ranks(world_size, function):
    """function(engine) on every rank, each a thread; the results in rank order, or the first rank's error."""
    barrier, offers = threading.Barrier(world_size), [None] * world_size
    engines = [ThreadEngine(rank, world_size, barrier, offers) for rank in range(world_size)]
    results, errors = [None] * world_size, []

    def work(rank):
        try:
            results[rank] = function(engines[rank])
        except BaseException as e:  # noqa: BLE001 raised by run_ranks
            errors.append(e)
            barrier.abort()             # the others would wait for ever
        finally:
            engines[rank].close()

    threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * PATIENCE_S)
        assert not thread.is_alive(), "a rank hangs"
    if errors:
        raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
    return results


@pytest.fixture
def thread_ranks():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield run_ranks
    torch.set_num_threads(before)
