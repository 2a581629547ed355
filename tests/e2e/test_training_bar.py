"""What is trained with few bytes is as good as what is trained with all of them, in as many steps.

Losses are means over samples that are held out, and over seeds: within a seed they differ by a percent or two from one
rounding to another. The labels of digits are smoothed and the learning rate falls to zero, so that the loss ends at about
0.55; without that it goes to 1e-4, where two per cent say nothing. Top-k uses what its paper says it needs: a warm-up and,
where more than a hundredth of the steps is spent waiting, momentum correction (pyfleet.compressors.topk).
"""
import numpy as np
import pytest
import torch
from torch.nn import functional

import pyfleet
from pyfleet.config import TrainingConfig

WITHIN = 1.02
pytestmark = pytest.mark.timeout(1200)          # a minute for two seeds, where cores have nothing else to do


def digits_loss(compression, seed, epochs):
    """In a rank: the held-out loss of the digits example at the end, with smoothed labels."""
    from pyfleet.data import seed_all
    from pyfleet.examples import digits, gpt
    torch.set_num_threads(1)
    training, held_out = digits.load_digits()
    seed_all(seed)
    config = TrainingConfig(epochs=epochs, seed=seed, compression=compression, device="cpu", progress=False)
    trainer = pyfleet.Trainer(
        digits.make_model(), training, config, eval_dataset=held_out,
        loss_fn=lambda output, target: functional.cross_entropy(output, target, label_smoothing=0.1),
        callbacks=[gpt.Schedule(epochs * -(-len(training[1]) // config.batch_size), config.learning_rate, 0.0, 0)])
    return trainer.fit()[-1]["eval_loss"]


def gpt_loss(compression, seed, steps):
    """In a rank: the held-out loss of the GPT example at the end, in bits per byte."""
    from pyfleet.examples import gpt
    torch.set_num_threads(1)
    options = gpt.parse(["--optimizer", "sgd", "--batch-size", "16", "--warmup", "30", "--min-lr", "0", "--steps", str(steps),
                         "--seed", str(seed), "--compression", compression])
    report = gpt.Report(steps, 1, quiet=True)
    gpt.make_trainer(options, report).fit()
    return report.rows[-1][1]


def means(group, train, methods, seeds, length):
    """The mean loss of every method, the same on both ranks."""
    losses = {}
    for method in methods:
        of_seeds = [group.run(train, method, seed, length) for seed in seeds]
        assert all(one == other for one, other in of_seeds)
        losses[method] = float(np.mean([one for one, _ in of_seeds]))
    return losses


@pytest.mark.feature("S14")
@pytest.mark.parametrize("seeds", [(1,), pytest.param(range(1, 9), marks=pytest.mark.slow)])
def test_digits_reach_the_uncompressed_loss_within_two_percent(ranks, seeds):
    pytest.importorskip("sklearn")
    losses = means(ranks(2, "shm"), digits_loss, ("none", "int8", "topk(ratio=0.01, warmup=100)"), seeds, 40)
    assert 0.5 < losses["none"] < 0.6           # 0.5 is what smoothed labels leave of it
    assert max(losses.values()) <= WITHIN * losses["none"], losses


@pytest.mark.feature("S14", "M39")
@pytest.mark.slow
@pytest.mark.parametrize("seeds", [(1, 2), range(1, 6)])
def test_the_gpt_reaches_the_uncompressed_loss_within_two_percent(ranks, seeds):
    losses = means(ranks(2, "shm"), gpt_loss, ("none", "int8", "topk(ratio=0.01, warmup=100, momentum=0.9)"), seeds, 300)
    assert losses["none"] < 3.8                 # of 7.8: there is something to lose
    assert max(losses.values()) <= WITHIN * losses["none"], losses


@pytest.mark.slow
def test_without_momentum_correction_the_gpt_would_not(ranks):
    losses = means(ranks(2, "shm"), gpt_loss, ("none", "topk(ratio=0.01)"), (1,), 300)
    assert losses["topk(ratio=0.01)"] > 1.1 * losses["none"]
