"""Training with compressed gradients across processes."""
import numpy as np
import pytest
import torch
from torch import nn

import pyfleet
from pyfleet.config import TrainingConfig


def train(compression, ratio, steps, resume_at):
    """In a rank: weights after some steps, whether an unused parameter got a gradient, and weights after a restart."""
    def make():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(30, 40), nn.Tanh(), nn.Linear(40, 5))
        model.register_parameter("unused", nn.Parameter(torch.ones(3)))
        return pyfleet.DistributedDataParallel(model, 0.003, compression=compression)

    def step(ddp, number):
        x = torch.randn(16, 30, generator=torch.Generator().manual_seed(100 * number + pyfleet.rank()))
        ddp.zero_grad()
        (ddp(x) - x[:, :5]).square().mean().backward()
        with torch.no_grad():
            for parameter in ddp.parameters():
                if parameter.grad is not None:
                    parameter -= 0.05 * parameter.grad

    def weights(ddp):
        return torch.cat([p.detach().reshape(-1) for p in ddp.parameters()]).numpy().copy()

    ddp, again = make(), None
    for number in range(steps):
        if number == resume_at:
            again = make()
            again.load_state_dict({name: value.clone() for name, value in ddp.state_dict().items()})
            again.load_compression_state(ddp.compression_state())
        step(ddp, number)
    end, unused = weights(ddp), ddp.module.unused.grad is None
    for number in range(resume_at, steps):
        step(again, number)
    return end, unused, weights(again), ddp.num_buckets


@pytest.mark.feature("M28", "P27", "P28", "S14")
@pytest.mark.parametrize("compression", ("none", "topk", "fp16", "topk_fp16", "int8", "random", "powersgd(rank=2)"))
def test_ranks_train_one_model_and_go_on_from_a_state_to_the_bit(ranks, compression):
    reports = ranks(3, "shm").run(train, compression, 0.1, 8, 4)
    for end, unused, resumed, num_buckets in reports:
        assert num_buckets > 1 and unused
        np.testing.assert_array_equal(end, reports[0][0])
        np.testing.assert_array_equal(resumed, end)


def sent_by_trainer(compression, ratio):
    """In a rank: encoded bytes of a training, and the compressions that its engine knows of."""
    trainer = pyfleet.Trainer(nn.Linear(100, 10), (torch.randn(64, 100), torch.zeros(64, dtype=torch.int64)),
                              training_config=TrainingConfig(epochs=1, batch_size=32, compression=compression,
                                                             topk_ratio=ratio, device="cpu", progress=False))
    trainer.fit()
    return sorted(pyfleet.fleet.current().stats()["compression"])


@pytest.mark.feature("M28", "M29")
def test_the_trainer_honours_compression_and_ratio(fresh_ranks):
    assert fresh_ranks(2, "shm").run(sent_by_trainer, "topk_fp16", 0.03) == [["topk(ratio=0.03)+fp16"]] * 2


def test_an_unknown_compression_is_refused_with_the_nearest_name():
    with pytest.raises(pyfleet.ConfigError, match="did you mean topk"):
        pyfleet.Trainer(nn.Linear(2, 2), (torch.zeros(2, 2), torch.zeros(2)), engine=object(),
                        training_config=TrainingConfig(compression="topkk"))
