"""Training across real processes: the same weights as one process with the whole batch, whatever the split."""
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

import pyfleet
from pyfleet import engines
from pyfleet.config import TrainingConfig
from tests.ranks import ROOT, Ranks


def digits_weights(epochs, batch_size, weights=None):
    """In a rank: train on digits in float64; the final weights as one numpy array."""
    from pyfleet.examples import digits
    torch.set_num_threads(1)
    (pictures, labels), _ = digits.load_digits()
    torch.manual_seed(3 + pyfleet.rank())           # rank 0's numbers count, so the others may start anywhere
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)).double()
    trainer = pyfleet.Trainer(model, (pictures.double(), labels),
                              training_config=TrainingConfig(epochs=epochs, batch_size=batch_size, progress=False))
    trainer.weights = weights
    trainer.fit()
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()]).numpy()


@pytest.fixture(scope="module")
def one_process():
    """one_process(epochs, batch_size): the weights that one process ends with."""
    group, found = Ranks(1), {}

    def weights(*args):
        if args not in found:
            found[args] = group.run(digits_weights, *args)[0]
        return found[args]
    yield weights
    group.close()


def difference(mine, theirs):
    return np.linalg.norm(mine - theirs) / np.linalg.norm(theirs)


@pytest.mark.feature("C1", "M1", "A4", "A5")
@pytest.mark.parametrize("batch_size", (128, 101, 1437))
@pytest.mark.parametrize(("size", "transport"), [(2, "shm"), (2, "tcp"), (3, "shm"), (5, "tcp")])
def test_ranks_end_with_the_weights_of_one_process(ranks, one_process, size, transport, batch_size):
    expected = one_process(2, batch_size)
    ends = ranks(size, transport).run(digits_weights, 2, batch_size)
    assert all(np.array_equal(ends[0], end) for end in ends)
    assert difference(ends[0], expected) < 1e-9


def test_unequal_shares_change_nothing_but_who_computes(ranks, one_process):
    expected = one_process(2, 128)
    ends = ranks(2, "shm").run(digits_weights, 2, 128, [16, 10])
    assert all(difference(end, expected) < 1e-9 for end in ends)


def ddp_step(micro_batches):
    """In a rank: gradients of one step over several backward passes, and how many collectives it took."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 50), nn.BatchNorm1d(50), nn.ReLU(), nn.Linear(50, 3)).double()
    ddp = pyfleet.DistributedDataParallel(model, bucket_size_mb=0.001)
    x = torch.randn(60, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(pyfleet.rank()))

    def calls():
        return engines.current().stats()["operations"]["all_reduce"]["calls"]
    before = calls()
    for k in range(micro_batches):
        if k < micro_batches - 1:
            with ddp.no_sync():
                (ddp(x).square().mean() / micro_batches).backward()
            assert calls() == before
        else:
            (ddp(x).square().mean() / micro_batches).backward()
    return ([p.grad.numpy() for p in model.parameters()], calls() - before, ddp.num_buckets,
            [b.numpy() for b in model.buffers()])


@pytest.mark.feature("A24", "C63", "M18")
@pytest.mark.parametrize("transport", ("shm", "tcp"))
def test_ddp_synchronises_once_per_update_and_buffers_agree(ranks, transport):
    group = ranks(3, transport)
    once, four = group.run(ddp_step, 1), group.run(ddp_step, 4)
    for reports in (once, four):
        grads, collectives, buckets, buffers = zip(*reports, strict=True)
        assert set(collectives) == {buckets[0]} and buckets[0] > 1
        for other in range(1, 3):
            assert all(np.array_equal(a, b) for a, b in zip(grads[0], grads[other], strict=True))
            assert all(np.array_equal(a, b) for a, b in zip(buffers[0], buffers[other], strict=True))
    for a, b in zip(once[0][0], four[0][0], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


def train_until_peer_dies():
    torch.manual_seed(0)
    ddp = pyfleet.DistributedDataParallel(nn.Linear(500, 500))
    step = 0
    try:
        while True:
            if pyfleet.rank() == 1 and step == 5:
                os.kill(os.getpid(), 9)
            ddp(torch.ones(8, 500)).sum().backward()
            step += 1
    except pyfleet.PeerLost as error:
        return error.rank, step


@pytest.mark.parametrize("transport", ("shm", "tcp"))
def test_a_lost_peer_comes_out_of_backward(fresh_ranks, transport):
    group = fresh_ranks(3, transport)
    group.start(train_until_peer_dies)
    assert group.collect((0, 2)) == [(1, 5), (1, 5)]


def different_models():
    try:
        pyfleet.DistributedDataParallel(nn.Linear(4, 4 + (pyfleet.rank() == 1)))
    except pyfleet.FleetError as error:
        return str(error)


def test_different_models_are_noticed_on_every_rank(ranks):
    assert all(message for message in ranks(3, "shm").run(different_models))


@pytest.mark.parametrize("transport", ("auto", "tcp"))
def test_the_main_job_reaches_its_accuracy(tmp_path, transport):
    end = subprocess.run(
        [sys.executable, "-m", "pyfleet", "launch", "--nproc", "2", "-m", "pyfleet.examples.digits", "--output",
         str(tmp_path / "digits.pt")], check=True, text=True, capture_output=True, timeout=150, cwd=tmp_path,
        env=os.environ | {"PYFLEET_TRANSPORT": transport, "PYTHONPATH": str(ROOT)})
    assert len(re.findall(r"^\[rank 0\] epoch +\d+ +loss [\d.]+ +[\d,]+ samples/s +[\d.]+ MB", end.stdout, re.MULTILINE)) == 20
    assert float(re.search(r"test accuracy ([\d.]+)", end.stdout)[1]) >= 0.97
    assert "[rank 1]" not in end.stdout
    assert torch.load(tmp_path / "digits.pt")
