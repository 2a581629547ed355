import random

import numpy as np
import torch

from pyfleet.data import seed_all


def draws(*arguments):
    seed_all(*arguments)
    return random.random(), np.random.rand(), torch.rand(1).item()


def test_the_same_seed_draws_the_same_numbers():
    assert draws(7) == draws(7)
    assert draws(-7) == draws(-7)


def test_ranks_draw_different_but_reproducible_numbers():
    assert draws(7, 1) == draws(7, 1)
    for mine, theirs, neither in zip(draws(7, 0), draws(7, 1), draws(7), strict=True):
        assert len({mine, theirs, neither}) == 3
