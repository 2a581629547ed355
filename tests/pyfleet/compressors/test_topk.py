"""Top-k: which elements survive, what they become, what it costs on the wire, and what feedback keeps."""
import math
from fractions import Fraction

import numpy as np
import pytest

import pyfleet
from pyfleet.compressors import parse_spec
from pyfleet.compressors.topk import TopK
from pyfleet.errors import ConfigError, ShapeError

CHAINS = ["topk", "topk+none", "topk_fp16", "topk+bf16", "topk+int8", "topk+int4", "topk+fp8", "topk+sign"]


def array(n, seed=1):
    return np.random.default_rng(seed).standard_normal(n).astype(np.float32)


def encoded(compressor, x, **chance):
    out = np.full(compressor.wire_bytes(x.size) + 8, 0xA5, np.uint8)
    used = compressor.encode(x, out[:len(out) - 8], **chance)
    assert (out[len(out) - 8:] == 0xA5).all()
    return out[:used].copy()


def decoded(compressor, data, n):
    out = np.full(n, 7, np.float32)
    compressor.decode(data, out)
    return out


def largest(x, k):
    return np.sort(np.argsort(-np.abs(x), kind="stable")[:k])


@pytest.mark.feature("P22")
@pytest.mark.parametrize("ratio", [1e-6, 0.001, 0.01, 0.1, 1 / 3, 0.5, 1.0])
@pytest.mark.parametrize("n", [1, 2, 30, 999, 10_000, 200_003])
def test_exactly_the_ceiling_of_ratio_times_n_largest_survive_exactly(ratio, n):
    x, compressor = array(n), parse_spec("topk", ratio=ratio)
    k = math.ceil(Fraction(str(ratio)) * n)
    data = encoded(compressor, x)
    out = decoded(compressor, data, n)
    expected = np.zeros(n, np.float32)
    expected[largest(x, k)] = x[largest(x, k)]
    assert out.tobytes() == expected.tobytes()
    assert compressor.num_kept(n) == k and len(data) <= compressor.wire_bytes(n)


def test_ratios_mean_the_decimal_numbers_that_they_are_written_as():
    for n in range(1, 500):
        assert TopK(ratio=0.1).num_kept(n) == -(-n // 10)
        assert TopK(ratio=0.07).num_kept(100 * n) == 7 * n
        assert TopK(sparsity=0.99).num_kept(100 * n) == n


@pytest.mark.feature("C78")
@pytest.mark.parametrize("n", [100, 1000, 250_000])
def test_sparsity_of_99_percent_keeps_1_percent(n):
    x, compressor = array(n), parse_spec("topk(sparsity=0.99)", ratio=0.1)
    out = decoded(compressor, encoded(compressor, x), n)
    kept = np.flatnonzero(out)
    assert kept.size == n // 100
    np.testing.assert_array_equal(kept, largest(x, n // 100))
    np.testing.assert_array_equal(out[kept], x[kept])


def test_k_is_a_number_or_everything():
    assert [TopK(k=5).num_kept(n) for n in (0, 4, 5, 6, 10**6)] == [0, 4, 5, 5, 5]
    assert TopK(ratio=0.5, sparsity=0.9, k=3).num_kept(100) == 3


def test_minus_zero_and_denormals_come_back_as_they_were():
    x = np.array([-0.0, 1e-45, -1e-40, 0.0], np.float32)
    assert decoded(TopK(ratio=1.0), encoded(TopK(ratio=1.0), x), 4).tobytes() == x.tobytes()


def test_what_is_not_finite_is_sent_first():
    x = array(1000)
    x[[3, 500, 999]] = np.inf, np.nan, -np.inf
    for chain in ("topk(k=3)", "topk(k=5)", "topk(k=4)+fp16", "topk(k=4)+int8"):
        out = decoded(parse_spec(chain), encoded(parse_spec(chain), x), 1000)
        assert not np.isfinite(out[[3, 500, 999]]).any(), chain


def entropy_bytes(n, k):
    return (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)) / math.log(2) / 8


@pytest.mark.feature("P22", "M5")
def test_one_percent_in_float16_costs_little_more_than_the_bound():
    """An all-gather sends N - 1 encodings, a dense all-reduce 2 (N - 1) / N arrays: a share of N bytes / (2 dense)."""
    n = 1_000_000
    size = len(encoded(parse_spec("topk_fp16", ratio=0.01), array(n)))
    assert size < 1.01 * (2 * 10_000 + entropy_bytes(n, 10_000))
    assert size / (2 * 4 * n) < 0.0038                  # times N: of a dense all-reduce. The bound is 0.00376


@pytest.mark.parametrize("chain", CHAINS)
def test_a_chain_codes_the_values_and_leaves_the_places_alone(chain):
    n, x = 10_000, array(10_000)
    compressor = parse_spec(chain, ratio=0.05)
    data = encoded(compressor, x)
    out = decoded(compressor, data, n)
    places = largest(x, 500)
    assert set(np.flatnonzero(out)) <= set(places)
    if compressor.params["values"] is None:
        expected = x[places]
    else:
        inner = parse_spec(chain.replace("_", "+").partition("+")[2])
        expected = decoded(inner, encoded(inner, x[places]), 500)
    np.testing.assert_array_equal(out[places], expected)
    total = array(n, 2)
    expected = total + np.float32(0.5) * out
    compressor.decode_add(data, total, 0.5)
    np.testing.assert_array_equal(total, expected)
    assert parse_spec(compressor.name).name == compressor.name and compressor.fresh().name == compressor.name


@pytest.mark.feature("P28")
@pytest.mark.parametrize("chain", CHAINS)
def test_feedback_leaves_nothing_out(chain):
    n, steps = 3000, 60
    compressor, residual = parse_spec(chain, ratio=0.02), np.zeros(n, np.float32)
    given, sent = np.zeros(n), np.zeros(n)
    out = np.zeros(compressor.wire_bytes(n), np.uint8)
    most = np.zeros(n)
    for step in range(steps):
        grad = array(n, step)
        before = residual.copy()
        used = compressor.encode_feedback(grad, residual, out, step=step)
        values = decoded(compressor, out[:used], n)
        given += grad
        sent += values
        # The difference of the exact sum, rounded once: what is kept is as good as float32 can hold.
        np.testing.assert_array_equal(residual, (before.astype(np.float64) + grad - values).astype(np.float32))
        most = np.maximum(most, np.abs(residual))
    assert (np.abs(given - sent - residual) <= steps * np.spacing(most.astype(np.float32)) / 2).all()
    assert np.count_nonzero(sent) > 0.5 * n


def test_feedback_goes_on_after_a_step_that_was_not_finite():
    compressor, residual = parse_spec("topk(k=3)+fp16"), array(100)
    before, grad = residual.copy(), np.zeros(100, np.float32)
    grad[[5, 6]] = np.nan, 1e9                          # more than float16 holds
    out = np.zeros(compressor.wire_bytes(100), np.uint8)
    used = compressor.encode_feedback(grad, residual, out)
    values = decoded(compressor, out[:used], 100)
    assert np.isnan(values[5]) and np.isinf(values[6])
    np.testing.assert_array_equal(residual[[5, 6]], before[[5, 6]])
    third = np.flatnonzero(np.isfinite(values) & (values != 0))
    assert third.size == 1 and residual[third] == before[third] - values[third]


def exchanged(chain, n, ratio):
    """In a rank: all encodings to all, added up in rank order; (bytes of mine, the sum)."""
    rank, size = pyfleet.rank(), pyfleet.world_size()
    compressor = parse_spec(chain, ratio=ratio)
    slot = -(-compressor.wire_bytes(n) // 4) * 4          # encodings begin at multiples of 4 bytes
    slots, used = np.zeros((size, slot), np.uint8), np.zeros(size, np.int64)
    used[rank] = compressor.encode(array(n, rank), slots[rank])
    pyfleet.all_reduce(slots)
    pyfleet.all_reduce(used)
    total = np.zeros(n, np.float32)
    for data, length in zip(slots, used, strict=True):
        compressor.decode_add(data[:length], total)
    return int(used[rank]), total


@pytest.mark.feature("P22", "M5")
@pytest.mark.parametrize("size", [2, 3])
def test_ranks_add_up_the_same_sum(ranks, size):
    n = 50_000
    results = ranks(size).run(exchanged, "topk_fp16", n, 0.01)
    expected = np.zeros(n, np.float32)
    for rank in range(size):
        x = array(n, rank)
        places = largest(x, n // 100)
        expected[places] += x[places].astype(np.float16)
    for used, total in results:
        assert total.tobytes() == expected.tobytes()
        assert used <= 0.0077 * 4 * n


@pytest.mark.parametrize("params,told", [
    ({"ratio": 0}, "topk: ratio must be a number > 0 and <= 1, got 0"),
    ({"ratio": 1.01}, "> 0 and <= 1"), ({"ratio": -0.1}, "> 0 and <= 1"), ({"ratio": float("nan")}, "> 0 and <= 1"),
    ({"ratio": "half"}, "> 0 and <= 1"), ({"sparsity": 1}, "topk: sparsity must be a number >= 0 and < 1, got 1"),
    ({"sparsity": -0.5}, "sparsity must be"), ({"k": 0}, "topk: k must be an integer >= 1"),
    ({"k": 1.5}, "k must be an integer"),
])
def test_parameters_out_of_range_are_named(params, told):
    with pytest.raises(ConfigError, match=told):
        TopK(**params)


def test_bytes_that_are_no_encoding_are_refused_or_harmless():
    n, compressor = 1000, parse_spec("topk_fp16", ratio=0.05)
    data = encoded(compressor, array(n))
    for wrong in (data[:0], data[:99], data[:-1], np.append(data, np.uint8(0)), np.zeros(0, np.uint8)):
        with pytest.raises(ShapeError):
            decoded(compressor, wrong, n)
    rng = np.random.default_rng(1)
    for _ in range(500):
        hurt = data.copy()
        hurt[rng.integers(0, data.size)] ^= 1 << rng.integers(0, 8)
        out = np.full(n + 16, 7, np.float32)
        try:
            compressor.decode(hurt, out[:n])
        except ShapeError:
            assert (out == 7).all()
        assert (out[n:] == 7).all()
    with pytest.raises(ShapeError, match="out has 5"):
        compressor.encode(array(n), np.zeros(5, np.uint8))


def test_an_out_that_is_too_small_leaves_the_residual_alone():
    residual = array(100)
    before = residual.copy()
    with pytest.raises(ShapeError):
        TopK().encode_feedback(array(100, 2), residual, np.zeros(3, np.uint8))
    assert residual.tobytes() == before.tobytes()


# ---- warm-up and momentum ------------------------------------------------------------------------------------------------

def test_a_warm_up_goes_from_a_quarter_to_the_share_by_the_same_factor_each_step():
    n, x, compressor = 100_000, array(100_000), TopK(ratio=0.01, warmup=4)
    kept = [compressor.num_kept_at(n, step) for step in range(6)]
    assert kept == [25_000, math.ceil(1000 * 25**0.75), 5000, math.ceil(1000 * 25**0.25), 1000, 1000]
    for step, k in enumerate(kept):
        data = encoded(compressor, x, step=step)
        expected = np.zeros(n, np.float32)
        expected[largest(x, k)] = x[largest(x, k)]
        assert decoded(compressor, data, n).tobytes() == expected.tobytes()
        assert len(data) <= 4 + compressor.wire_bytes(n) * k / kept[0] * 1.6
    assert len(encoded(compressor, x, step=4)) == len(encoded(TopK(ratio=0.01), x)) + 4
    assert TopK(ratio=0.5, warmup=4).num_kept_at(n, 0) == n // 2                # there is nothing to fall to
    assert [TopK(ratio=0.01, warmup=4).num_kept_at(n, 0) for n in (0, 1, 2, 5)] == [0, 1, 1, 2]


@pytest.mark.parametrize("said", [0, 9, 251, 2**32 - 1])
def test_a_number_of_elements_that_no_step_sends_is_damage(said):
    compressor, x = TopK(ratio=0.01, warmup=4), array(1000)
    data = encoded(compressor, x)
    data[:4].view(np.uint32)[0] = said
    for damaged in (data, data[:3], data[:0]):
        with pytest.raises(ShapeError, match="do not begin with a number"):
            decoded(compressor, damaged, 1000)


def test_late_payloads_of_a_warm_up_are_no_damage():
    compressor = pyfleet.GradientCompressor("topk(ratio=0.0001, warmup=2)+int8")
    for _ in range(4):
        g = array(100_000)
        assert np.count_nonzero(compressor.decompress(compressor.compress(g))) >= 10


@pytest.mark.parametrize("wrong", [{"warmup": -1}, {"warmup": 1.5}, {"momentum": -0.1}, {"momentum": 1.0}, {"momentum": "x"}])
def test_warm_up_and_momentum_have_a_range(wrong):
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))} must be"):
        TopK(**wrong)


def test_momentum_without_feedback_is_refused():
    x = array(100)
    with pytest.raises(ConfigError, match="momentum works on what error feedback keeps"):
        encoded(TopK(momentum=0.9), x)
