"""Random sparsification: the same elements on every rank, the right expectation, nothing lost, nothing hidden."""
import numpy as np
import pytest

import pyfleet
from pyfleet.compressors import parse_spec
from pyfleet.compressors.random import Random
from pyfleet.errors import ConfigError, ShapeError
from tests.pyfleet.compressors.test_topk import array, decoded, encoded


@pytest.mark.feature("P23")
@pytest.mark.parametrize("p", [0.01, 0.25, 0.9, 1.0])
@pytest.mark.parametrize("n", [0, 1, 7, 1000, 50_000])
def test_the_chosen_arrive_divided_by_p_and_the_others_as_zero(p, n):
    x = array(n) + np.float32(10)
    compressor = Random(ratio=p, seed=5, unbiased=True)
    data = encoded(compressor, x, step=3)
    out = decoded(compressor, data, n)
    chosen = np.flatnonzero(out)
    np.testing.assert_array_equal(out[chosen], x[chosen] / np.float32(round(p * 2**32) / 2**32))
    assert len(data) == 16 + 4 * chosen.size <= compressor.wire_bytes(n)
    assert abs(chosen.size - n * p) <= 6 * np.sqrt(n * p * (1 - p))
    plain = Random(ratio=p, seed=5)
    np.testing.assert_array_equal(decoded(plain, encoded(plain, x, step=3), n)[chosen], x[chosen])


@pytest.mark.feature("P23")
def test_the_expectation_is_the_array():
    n, p, steps = 500, 0.2, 4000
    x, total = array(n), np.zeros(n)
    compressor = Random(ratio=p, seed=1, unbiased=True)
    for step in range(steps):
        total += decoded(compressor, encoded(compressor, x, step=step), n)
    sigma = np.abs(x) * np.sqrt((1 - p) / p / steps)
    z = (total / steps - x) / sigma
    assert np.abs(z).max() < 5 and abs(z.mean()) < 5 / np.sqrt(n) and 0.85 < z.std() < 1.15


def mask(seed, step, stream, n, offset=0):
    compressor = Random(ratio=0.1, seed=seed)
    data = encoded(compressor, np.ones(n, np.float32), step=step, stream=stream, offset=offset)
    return decoded(compressor, data, n) != 0


@pytest.mark.feature("P23")
def test_the_mask_is_of_seed_and_step_alone():
    n = 10_000
    first = mask(1, 2, 0, n)
    np.testing.assert_array_equal(first, mask(1, 2, 7, n))              # whoever encodes
    for other in (mask(1, 3, 0, n), mask(2, 2, 0, n), mask(2, 1, 0, n)):
        assert 0.5 < (first & other).sum() / (0.01 * n) < 2
    pieces = np.concatenate([mask(1, 2, 0, 1234), mask(1, 2, 0, n - 1234, offset=1234)])
    np.testing.assert_array_equal(first, pieces)


def summed(n):
    rank, size = pyfleet.rank(), pyfleet.world_size()
    compressor = parse_spec("random(ratio=0.05, unbiased=true)+fp16")
    slot = -(-compressor.wire_bytes(n) // 4) * 4          # encodings begin at multiples of 4 bytes
    slots, used = np.zeros((size, slot), np.uint8), np.zeros(size, np.int64)
    used[rank] = compressor.encode(array(n, rank) + np.float32(20), slots[rank], step=9, stream=rank)
    pyfleet.all_reduce(slots)
    pyfleet.all_reduce(used)
    total = np.zeros(n, np.float32)
    for data, length in zip(slots, used, strict=True):
        compressor.decode_add(data[:length], total)
    return used.tolist(), total


@pytest.mark.feature("P23")
def test_ranks_choose_the_same_elements(ranks):
    n = 20_000
    results = ranks(3).run(summed, n)
    for used, total in results:
        assert len(set(used)) == 1 and total.tobytes() == results[0][1].tobytes()
        assert used[0] == 16 + 2 * np.count_nonzero(total)
        assert (total[total != 0] > 3 * 15 / 0.05).all()                # all three terms met


@pytest.mark.feature("P28")
@pytest.mark.parametrize("spec", ["random", "random(unbiased=True)", "random+fp16", "random(ratio=1.0)"])
def test_feedback_sends_the_values_themselves_and_leaves_nothing_out(spec):
    n, steps = 2000, 60
    compressor, residual = parse_spec(spec), np.zeros(n, np.float32)
    out = np.zeros(compressor.wire_bytes(n), np.uint8)
    for step in range(steps):
        grad, before = array(n, step), residual.copy()
        used = compressor.encode_feedback(grad, residual, out, step=step)
        values = decoded(compressor, out[:used], n)
        np.testing.assert_array_equal(residual, (before.astype(np.float64) + grad - values).astype(np.float32))
        assert np.abs(values).max() < 50                # bounded: x / ratio would have grown without end


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_chance_does_not_hide_what_is_not_finite(bad):
    x = array(1000)
    x[np.flatnonzero(~mask(0, 0, 0, 1000))[5]] = bad    # not chosen
    compressor, residual = Random(), array(1000, 2)
    data, before = encoded(compressor, x), residual.copy()
    assert np.isnan(decoded(compressor, data, 1000)).all()
    total = np.zeros(1000, np.float32)
    compressor.decode_add(data, total)
    assert np.isnan(total).all()
    used = compressor.encode_feedback(x, residual, data := np.zeros(compressor.wire_bytes(1000), np.uint8))
    assert np.isnan(decoded(compressor, data[:used], 1000)).all()
    assert residual.tobytes() == before.tobytes()


@pytest.mark.parametrize("params,told", [
    ({"ratio": 0}, "random: ratio must be a number > 0 and <= 1"), ({"ratio": 1.5}, "<= 1"), ({"ratio": -1}, "> 0"),
    ({"seed": -1}, "seed must be an integer >= 0"), ({"unbiased": 1}, "unbiased must be True or False"),
])
def test_parameters_out_of_range_are_named(params, told):
    with pytest.raises(ConfigError, match=told):
        Random(**params)


def test_bytes_that_are_no_encoding_are_refused():
    compressor = Random(ratio=0.5)
    data = encoded(compressor, array(100))
    for wrong in (data[:0], data[:15], data[:-4], np.append(data, np.zeros(4, np.uint8))):
        with pytest.raises(ShapeError):
            decoded(compressor, wrong, 100)
    with pytest.raises(ShapeError, match="out has 5"):
        compressor.encode(array(100), np.zeros(5, np.uint8))
