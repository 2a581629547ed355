"""Ascending indices in few bits: there and back, how few, and what hostile bytes can do."""
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetcore.errors import CorruptData, ShapeError
from fleetcore.kernels import indices

MOST = (1 << 32) - 1


def packed(chosen, n):
    out = np.full(indices.room_for(n, len(chosen)) + 8, 0xA5, np.uint8)
    used = indices.encode(np.asarray(chosen, np.uint32), out[:len(out) - 8])
    assert (out[used:] == 0xA5).all()
    return out[:used]


def unpacked(data, n, k):
    out = np.full(k + 8, 0xDEADBEEF, np.uint32)
    used = indices.decode(data, n, out[:k])
    assert (out[k:] == 0xDEADBEEF).all()
    return out[:k], used


def check(chosen, n):
    data = packed(chosen, n)
    back, used = unpacked(data, n, len(chosen))
    np.testing.assert_array_equal(back, chosen)
    assert used == len(data)
    longer, _ = unpacked(np.concatenate([data, np.full(20, 255, np.uint8)]), n, len(chosen))
    np.testing.assert_array_equal(longer, chosen)       # what follows does not matter
    return data


def entropy_bits(n, k):
    """log2 of the number of ways to choose k of n."""
    return (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)) / math.log(2)


@pytest.mark.parametrize("chosen,n", [
    ([], 0), ([], 10), ([0], 1), ([9], 10), ([MOST - 1], MOST), ([0, MOST - 1], MOST), (range(1000), 1000),
    (range(1, 1000, 2), 1000), ([*range(255), MOST - 1], MOST), ([*range(256), MOST - 1], MOST),
    ([*range(5), *range(10**9, 10**9 + 300)], 2**31), (range(0, MOST - 1, MOST // 700), MOST),
], ids=str)
def test_awkward_sets_come_back(chosen, n):
    check(np.array(chosen, np.uint32), n)


@pytest.mark.parametrize("k", [1, 2, 127, 255, 256, 257, 511, 512, 513, 2000])
def test_every_block_length_comes_back(k):
    n = 100_000
    check(np.sort(np.random.default_rng(k).choice(n, k, replace=False)).astype(np.uint32), n)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, MOST - 1), unique=True, max_size=700), st.sampled_from([1, 1 << 8, 1 << 20]))
def test_any_set_comes_back(chosen, divisor):
    chosen = np.unique(np.array(chosen, np.uint32) // np.uint32(divisor))
    check(chosen, MOST)


@pytest.mark.parametrize("n,k,most", [(1_000_000, 10_000, 1.02), (1_000_000, 100_000, 1.03), (4_000_000, 4_000, 1.02),
                                      (1_000_000, 500_000, 1.10), (1_000_000, 1_000, 1.02)])
def test_a_random_set_takes_hardly_more_than_the_entropy(n, k, most):
    chosen = np.sort(np.random.default_rng(1).choice(n, k, replace=False)).astype(np.uint32)
    bits, bound = 8 * len(check(chosen, n)), entropy_bits(n, k)
    assert bound < bits < most * bound
    assert bits / k < math.log2(n / k) + 1.6 or k * 4 > n


def test_indices_that_lie_together_take_less():
    rng = np.random.default_rng(3)
    n = 10_000_000
    together = np.concatenate([start + np.sort(rng.choice(20_000, 5000, replace=False)) for start in (0, n // 2, n // 3 * 2)])
    apart = np.sort(rng.choice(n, together.size, replace=False))
    assert len(check(together.astype(np.uint32), n)) < 0.4 * len(check(apart.astype(np.uint32), n))


@pytest.mark.parametrize("seed", range(6))
def test_the_promised_room_is_enough_for_the_worst(seed):
    rng = np.random.default_rng(seed)
    for n, k in ((300, 299), (1000, 10), (10_000, 700), (MOST, 3000)):
        spread = np.cumsum(rng.pareto(0.3, k) + 1e-6)
        for chosen in (np.unique((spread / spread[-1] * (n - 1)).astype(np.uint32)), np.arange(min(k, n)),
                       np.arange(min(k, n)) + (n - k), np.arange(k) * (n // k)):
            check(chosen.astype(np.uint32), n)


def test_hostile_bytes_give_ascending_indices_below_n_or_an_error():
    rng = np.random.default_rng(8)
    outcomes = set()
    for trial in range(3000):
        n, k = int(rng.choice([1, 5, 1000, 100_000, MOST])), int(rng.integers(0, 600))
        data = rng.integers(0, 256, int(rng.integers(0, 900)), np.uint8)
        if trial % 2 and data.size:
            data[0] = rng.integers(0, 12)                # a plausible parameter
        out = np.full(k + 8, 0xDEADBEEF, np.uint32)
        try:
            used = indices.decode(data, n, out[:k])
        except CorruptData:
            outcomes.add("refused")
        else:
            outcomes.add("read")
            assert used <= data.size and (k == 0 or out[k - 1] < n) and (np.diff(out[:k].astype(np.int64)) > 0).all()
        assert (out[k:] == 0xDEADBEEF).all()
    assert outcomes == {"refused", "read"}


def test_every_cut_and_every_flipped_bit_is_refused_or_harmless():
    n, chosen = 5000, np.sort(np.random.default_rng(4).choice(5000, 300, replace=False)).astype(np.uint32)
    data = check(chosen, n)
    for length in range(len(data)):
        with pytest.raises(CorruptData, match="no 300 ascending indices below 5000"):
            unpacked(data[:length], n, 300)
    for bit in range(8 * len(data)):
        hurt = data.copy()
        hurt[bit // 8] ^= 1 << bit % 8
        try:
            back, _ = unpacked(hurt, n, 300)
        except CorruptData:
            continue
        assert back[-1] < n and (np.diff(back.astype(np.int64)) > 0).all()


def test_indices_of_a_larger_array_are_refused():
    data = check(np.array([3, 70], np.uint32), 71)
    with pytest.raises(CorruptData):
        unpacked(data, 70, 2)


@pytest.mark.parametrize("data", [[], [32, 0, 0, 0, 0, 1], [255], [31, 255, 255, 255, 255, 1], [0, 0, 0], [0]], ids=str)
def test_crafted_headers_are_refused(data):
    with pytest.raises(CorruptData):
        unpacked(np.array(data, np.uint8), 1000, 1)


def test_wrong_arguments_are_named():
    for wrong in ([3, 3], [4, 3], [1, 2, 9, 9]):
        with pytest.raises(ShapeError, match="ascend strictly"):
            packed(wrong, 100)
    with pytest.raises(ShapeError, match="1 bytes are too few for 2 indices"):
        indices.encode(np.array([1, 2], np.uint32), np.zeros(1, np.uint8))
    for n in (-1, 1 << 32):
        with pytest.raises(ShapeError, match="n must be in"):
            unpacked(np.zeros(8, np.uint8), n, 1)
    with pytest.raises(ValueError, match="dtype"):
        indices.encode(np.array([1, 2], np.int64), np.zeros(10, np.uint8))
