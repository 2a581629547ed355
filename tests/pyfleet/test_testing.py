"""run_ranks: scripts' tests without processes."""
import threading
import time

import numpy as np
import pytest
import torch
from torch import nn

import pyfleet
from pyfleet import engines
from pyfleet.config import TrainingConfig
from pyfleet.testing import run_ranks


def mean_of_ranks(scale):
    x = np.full(5, pyfleet.rank() * scale)
    pyfleet.all_reduce(x, "mean")
    return pyfleet.rank(), pyfleet.world_size(), pyfleet.local_rank(), pyfleet.is_leader(), x.tolist()


@pytest.mark.feature("A13", "P8")
@pytest.mark.parametrize("size", (1, 2, 5))
def test_every_thread_is_a_rank(size):
    mean = 2.0 * (size - 1) / 2
    assert run_ranks(mean_of_ranks, size, 2.0) == [(r, size, r, r == 0, [mean] * 5) for r in range(size)]
    assert not pyfleet.is_initialized()


def test_results_are_the_same_every_time():
    def sums():
        out = []
        for seed in range(20):
            x = np.random.default_rng([seed, pyfleet.rank()]).standard_normal(100).astype(np.float32) * 1e3
            pyfleet.all_reduce(x)
            out.append(x.tobytes())
        return b"".join(out)
    first = run_ranks(sums, 4)
    parts = [np.random.default_rng([0, r]).standard_normal(100).astype(np.float32) * 1e3 for r in range(4)]
    assert first[0][:400] == (((parts[0] + parts[1]) + parts[2]) + parts[3]).tobytes()      # rank order
    assert all(run == [first[0]] * 4 for run in (first, run_ranks(sums, 4)))


def test_initialising_in_a_rank_gives_the_fleet_it_has():
    def again():
        assert pyfleet.init() is pyfleet.init(backend="mock") is pyfleet.fleet.current()
        return repr(pyfleet.init())
    assert run_ranks(again, 2) == [f"<Fleet rank {rank} of 2 on 1 host, epoch 0>" for rank in range(2)]


def test_the_processs_own_engine_is_untouched():
    class Place:
        rank, world_size = 7, 8
    engines.set_current(Place())
    try:
        seen = run_ranks(lambda: (engines.current().world_size, pyfleet.world_size()), 3)
        assert seen == [(3, 3)] * 3
        assert engines.current().rank == 7
        assert engines.base._current is not None         # one read finds it again
    finally:
        engines.set_current(None)


def test_asynchronous_calls_know_their_rank():
    def submit():
        return engines.current().submit(lambda: (pyfleet.rank(), threading.current_thread().name)).wait()
    assert run_ranks(submit, 3) == [(rank, "pyfleet-comm") for rank in range(3)]


def test_the_first_failure_is_raised_and_the_others_learn_who():
    told = {}

    def fail():
        if pyfleet.rank() == 1:
            raise ValueError("no data")
        try:
            pyfleet.barrier()
        except pyfleet.PeerLost as error:
            told[pyfleet.rank()] = (error.rank, str(error))
            raise
    with pytest.raises(ValueError, match="no data") as failure:
        run_ranks(fail, 3)
    assert failure.value.__notes__ == ["in rank 1 of 3"]
    assert told == {rank: (1, "rank 1 failed with ValueError: no data; needed for barrier()") for rank in (0, 2)}


def test_a_failure_reaches_ranks_that_wait_in_a_sub_group():
    def fail():
        engine = engines.current()
        group = engine.new_group([2, 1])
        if pyfleet.rank() == 2:
            raise KeyError("gone")
        if pyfleet.rank() == 1:
            group.barrier()
    with pytest.raises(KeyError, match="gone"):
        run_ranks(fail, 3)


def test_a_rank_that_returns_early_is_missed_by_name():
    with pytest.raises(pyfleet.PeerLost, match=r"rank 0 has left \(shut down\); needed for barrier\(\)") as failure:
        run_ranks(lambda: pyfleet.rank() and pyfleet.barrier(), 2)
    assert failure.value.rank == 0
    assert failure.value.__notes__ == ["in rank 1 of 2"]


def test_it_ends_even_if_a_rank_does_not():
    leave, started = threading.Event(), time.monotonic()
    with pytest.raises(pyfleet.Timeout):
        run_ranks(lambda: pyfleet.barrier() if pyfleet.rank() else leave.wait(2), 2, timeout=0.3)
    leave.set()
    assert time.monotonic() - started < 2 + 5 + 1
    assert run_ranks(pyfleet.rank, 2) == [0, 1]


@pytest.mark.parametrize(("size", "timeout"), ((0, 1.0), (2, 0), (2, -1)))
def test_impossible_fleets_are_refused(size, timeout):
    with pytest.raises(pyfleet.ConfigError):
        run_ranks(pyfleet.rank, size, timeout=timeout)


def test_sampler_shares_cover_the_data():
    shares = run_ranks(lambda: list(pyfleet.DistributedSampler(37, seed=3)), 3)
    assert sorted(index for share in shares for index in share) == list(range(37))


# ---- the same training as on real ranks ------------------------------------------------------------------------------

def digits_training(epochs):
    """In a rank: losses and final weights of a small network in float64."""
    from pyfleet.examples import digits
    (pictures, labels), _ = digits.load_digits()
    generator = torch.Generator().manual_seed(3)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 8)
    trainer = pyfleet.Trainer(model, (pictures.double(), labels),
                              training_config=TrainingConfig(epochs=epochs, batch_size=101, progress=False))
    losses = [record["loss"] for record in trainer.fit()]
    return losses, torch.cat([p.detach().reshape(-1) for p in model.parameters()]).numpy()


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.feature("A13", "C1", "M1")
def test_training_ends_the_same_with_any_number_of_ranks(one_thread):
    (losses, weights), = run_ranks(digits_training, 1, 2)
    for size in (2, 3):
        ends = run_ranks(digits_training, size, 2)
        for other_losses, other in ends:
            assert np.array_equal(other, ends[0][1])
            np.testing.assert_allclose(other, weights, rtol=0, atol=1e-6)
            np.testing.assert_allclose(other_losses, losses, rtol=1e-6)


def test_ddp_averages_gradients_over_threads(one_thread):
    def gradients():
        ddp = pyfleet.DistributedDataParallel(nn.Linear(3, 2, bias=False).double())
        ddp(torch.full((1, 3), pyfleet.rank() + 1.0, dtype=torch.float64)).sum().backward()
        return ddp.module.weight.grad.tolist()
    assert run_ranks(gradients, 3) == [[[2.0] * 3] * 2] * 3
