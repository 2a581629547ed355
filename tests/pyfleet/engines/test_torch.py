"""What only the engines of torch.distributed promise: how they meet, beside what, and errors in pyfleet's words."""
import gc
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from torch import distributed

import pyfleet
from pyfleet import engines
from pyfleet.config import ClusterConfig
from pyfleet.engines.torch import GlooEngine, NcclEngine
from pyfleet.errors import ConfigError, NotEnoughPeers
from pyfleet.placement import Placement
from pyfleet.testing import run_ranks
from tests.pyfleet.test_testing import digits_training, one_thread  # noqa: F401 a fixture
from tests.ranks import ROOT


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def join():
    fleet = pyfleet.init(backend="gloo")
    return fleet.engine.name, fleet.rank, fleet.world_size, fleet.local_rank, fleet.local_world_size


def twice():
    """Joined, used, left, joined again: nothing of the first time is found the second."""
    for k in range(3):
        pyfleet.init(backend="gloo")
        x = np.full(3, float(pyfleet.rank() + k))
        pyfleet.all_reduce(x)
        assert x.tolist() == [1.0 + 2 * k] * 3
        pyfleet.shutdown()
        assert not pyfleet.is_initialized()
    return True


@pytest.mark.feature("A13")
@pytest.mark.parametrize("scheme", ("file", "tcp"))
def test_ranks_meet_where_the_placement_says(fresh_ranks, scheme):
    env = {} if scheme == "file" else {"PYFLEET_RENDEZVOUS": f"tcp://127.0.0.1:{free_port()}"}
    group = fresh_ranks(2, init=False, **env)
    assert group.run(twice) == [True] * 2
    assert group.run(join) == [("gloo", rank, 2, rank, 2) for rank in range(2)]


def beside_the_default_group(directory):
    rank = int(os.environ["PYFLEET_RANK"])
    store = distributed.FileStore(f"{directory}/default", 3)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=3)
    pyfleet.init(backend="gloo")
    x, y = np.full(2, rank + 1.0), torch.full((2,), rank + 1.0)
    work = distributed.all_reduce(y, async_op=True)         # neither gets in the other's way
    pyfleet.all_reduce(x)
    work.wait()
    pyfleet.shutdown()
    distributed.all_reduce(y)                               # the script's own group stays
    distributed.destroy_process_group()
    return x.tolist(), y.tolist()


def test_a_default_process_group_is_used_and_left_alone(fresh_ranks, tmp_path):
    assert fresh_ranks(3, init=False).run(beside_the_default_group, str(tmp_path)) == [([6.0] * 2, [18.0] * 2)] * 3


def alone_in_torch_of_many(directory):
    distributed.init_process_group("gloo", store=distributed.FileStore(f"{directory}/x", 1), rank=0, world_size=1)
    with pytest.raises(ConfigError, match=r"rank 0 of 1 in torch's default process group, but \d of 2 according to pyfleet"):
        pyfleet.init(backend="gloo")
    return not pyfleet.is_initialized()


def test_a_default_group_of_other_ranks_is_refused(fresh_ranks, tmp_path):
    group = fresh_ranks(2, init=False)
    assert group.run(alone_in_torch_of_many, str(tmp_path), only=(1,)) == [True]


def test_torchrun_starts_gloo(tmp_path):
    script = tmp_path / "meet.py"
    script.write_text("import numpy as np, pyfleet; f = pyfleet.init(backend='gloo'); x = np.ones(2)\n"
                      "pyfleet.all_reduce(x); assert x.tolist() == [2, 2]; assert f.world_size == 2; pyfleet.shutdown()")
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)],
                   env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True, timeout=100, capture_output=True)


def test_alone_needs_no_place_to_meet():
    engine = GlooEngine.open(Placement(0, 1), ClusterConfig(), 5.0)
    x = np.array([3.0])
    engine.all_reduce(x, "mean")
    engine.barrier()
    engine.close()
    assert x[0] == 3.0


@pytest.mark.parametrize("scheme", ("file", "tcp"))
def test_missing_ranks_are_named_at_the_timeout(tmp_path, scheme):
    where = f"file://{tmp_path}" if scheme == "file" else f"tcp://127.0.0.1:{free_port()}"
    started = time.monotonic()
    with pytest.raises(NotEnoughPeers, match=r"found 1 of 3 ranks within 0.5 s; missing: 1, 2"):
        GlooEngine.open(Placement(0, 3, rendezvous=where), ClusterConfig(), 0.5)
    assert time.monotonic() - started < 4


@pytest.mark.parametrize(("place", "error", "match"), [
    (Placement(0, 2), ConfigError, "nowhere to meet: set MASTER_ADDR"),
    (Placement(0, 2, rendezvous="carrier://pigeon"), ConfigError, "'carrier://pigeon' is not one of"),
    (Placement(0, 2, rendezvous="tcp://host:port"), ConfigError, "not host:port"),
    (Placement(0, 2, rendezvous="file:///proc/no/where"), ConfigError, "cannot meet in /proc/no/where"),
    (Placement(1, 2, rendezvous="tcp://127.0.0.1:9"), NotEnoughPeers, "did not answer at 127.0.0.1:9 within 0.5 s"),
])
def test_a_place_that_cannot_work_is_refused(place, error, match):
    with pytest.raises(error, match=match):
        GlooEngine.open(place, ClusterConfig(), 0.5)


def test_a_taken_port_is_a_clear_error():
    with socket.create_server(("0.0.0.0", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}.*choose another MASTER_PORT"):
            GlooEngine.open(Placement(0, 2, rendezvous=f"tcp://127.0.0.1:{port}"), ClusterConfig(), 2.0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_nccl_without_a_gpu_is_a_clear_error():
    with pytest.raises(ConfigError, match="backend 'nccl' needs an NVIDIA GPU and a CUDA build of torch"):
        NcclEngine.open(Placement(0, 1), ClusterConfig(), 1.0)
    with pytest.raises(ConfigError, match="use 'gloo' or 'fleet'"):
        pyfleet.init(backend="nccl")
    assert not pyfleet.is_initialized()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_nccl_moves_tensors_where_they_lie():
    engine = NcclEngine.open(Placement(0, 1), ClusterConfig(), 30.0)
    for dtype in (torch.float32, torch.bfloat16, torch.int16, torch.bool, torch.complex64):
        x = torch.ones(7, 3, device="cuda").to(dtype).t()
        for call in (lambda x=x: engine.all_reduce(x), lambda x=x: engine.broadcast(x), lambda x=x: engine.reduce(x)):
            call()
            assert (x == 1).all()
        out = torch.zeros(21, device="cuda", dtype=dtype)
        engine.all_gather_into(out, x)
        engine.all_to_all_into(out, x, [[21]])
        engine.reduce_scatter_into(out, x, [21])
        assert (out == 1).all()
    engine.barrier()
    engine.close()


# ---- failures ------------------------------------------------------------------------------------------------------------

def until_it_fails():
    started = time.monotonic()
    try:
        while True:
            pyfleet.all_reduce(np.ones(1000), timeout=60)
    except pyfleet.FleetError as error:
        return type(error).__name__, time.monotonic() - started


def test_a_death_reaches_every_rank_soon(fresh_ranks):
    group = fresh_ranks(4, init=False)
    group.run(join)
    group.start(until_it_fails)
    time.sleep(0.3)
    group.kill(2)
    ends = group.collect((0, 1, 3))
    assert {name for name, _ in ends} == {"PeerLost"}
    assert max(took for _, took in ends) < 10


def receive_from_the_dead(src):
    with pytest.raises(pyfleet.PeerLost) as caught:
        engines.current().recv(lambda _: np.zeros(1), src, timeout=30)
    return caught.value.rank


def test_a_message_from_the_dead_names_them(fresh_ranks):
    group = fresh_ranks(2, init=False)
    group.run(join)
    group.start(receive_from_the_dead, 1, only=(0,))
    group.kill(1)
    assert group.collect((0,)) == [1]


def wait_for_nothing():
    engine, started = engines.current(), time.monotonic()
    try:
        if engine.rank == 0:
            engine.recv(lambda _: np.zeros(1), 1, timeout=0.3)
        else:
            engine.barrier(timeout=60)
    except pyfleet.FleetError as error:
        return type(error).__name__, time.monotonic() - started


def test_a_receive_out_of_time_ends_the_group_for_all(fresh_ranks):
    group = fresh_ranks(2, init=False)
    group.run(join)
    (first, _), (second, took) = group.run(wait_for_nothing)
    assert (first, second) == ("Timeout", "PeerLost")
    assert took < 10


def wait_for_ctrl_c(verb):
    try:
        if verb == "recv":
            engines.current().recv(lambda _: np.zeros(1), 1)
        else:
            pyfleet.barrier()
    except KeyboardInterrupt:
        return "interrupted"


@pytest.mark.parametrize("verb", ("barrier", "recv"))
def test_ctrl_c_interrupts_a_wait(fresh_ranks, verb):
    group = fresh_ranks(2, init=False)
    group.run(join)
    group.start(wait_for_ctrl_c, verb, only=(0,))
    time.sleep(0.3)
    group.kill(0, signal.SIGINT)
    started = time.monotonic()
    assert group.collect((0,)) == ["interrupted"]
    assert time.monotonic() - started < 2


def close_under_way():
    engine = engines.current()
    if engine.rank == 1:
        return None
    work = engine.submit("barrier")
    while not engine._waiting:
        threading.Event().wait(0.001)
    started = time.monotonic()
    pyfleet.shutdown()
    gc.collect()
    took = time.monotonic() - started
    with pytest.raises(pyfleet.PeerLost, match="this rank has left"):
        work.wait()
    return took < 2


def test_shutdown_ends_a_call_under_way(fresh_ranks):
    group = fresh_ranks(2, init=False)
    group.run(join)
    assert group.run(close_under_way)[0] is True


# ---- the same training -----------------------------------------------------------------------------------------------------

@pytest.mark.feature("A13")
def test_training_over_gloo_equals_that_of_the_fleet_and_of_threads(ranks, fresh_ranks, one_thread):       # noqa: F811
    group = fresh_ranks(2, init=False)
    group.run(join)
    over_gloo, over_shm = group.run(digits_training, 1), ranks(2, "shm").run(digits_training, 1)
    in_threads = run_ranks(digits_training, 2, 1)
    for losses, weights in (*over_gloo, *over_shm):
        np.testing.assert_allclose(weights, in_threads[0][1], rtol=0, atol=1e-6)
        np.testing.assert_allclose(losses, in_threads[0][0], rtol=1e-6)
