"""Seeding every random generator that training draws from."""
from __future__ import annotations

import operator
import random

import numpy as np


def seed_all(seed: int, rank: int | None = None) -> None:
    """Seed random, numpy's global generator and torch (all devices).

    With the same seed every rank draws the same numbers, which is what building a model wants. With `rank` too, ranks
    draw different but reproducible numbers, which is what dropout and augmentation want.
    """
    import torch

    seed = operator.index(seed) % 2**64
    if rank is not None:
        seed = int(np.random.SeedSequence(seed, spawn_key=(operator.index(rank),)).generate_state(1, np.uint64)[0])
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
