"""The k largest, random subsets and sparse sums, against a stable sort in numpy, on every instruction set."""
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fleetcore.errors import ShapeError
from fleetcore.kernels import sparsify

SAMPLED = 300_000           # from 2^17 elements on, a sample narrows the search
GUARD = 0xDEADBEEF


def available():
    names = []
    for name in ("sse2", "neon", "generic", "avx2", "avx512"):
        try:
            sparsify._force_isa(name)
        except ValueError:
            continue
        names.append(name)
    sparsify._force_isa()
    return names


@pytest.fixture(params=available())
def isa(request):
    sparsify._force_isa(request.param)
    yield request.param
    sparsify._force_isa()


def chosen(x, k):
    """Ascending indices of the k largest |x|: NaN before Inf, the lowest index first among equals."""
    keys = np.minimum(x.view(np.uint32) & 0x7FFFFFFF, 0x7F800001).astype(np.int64)
    return np.sort(np.argsort(-keys, kind="stable")[:k])


def top_k(x, k, room=None):
    """(indices, values) of the kernel, which must not write past `room` elements."""
    room = sparsify.room_for(x.size, k) if room is None else room
    indices, values = np.full(room + 20, GUARD, np.uint32), np.full(room + 20, 77, np.float32)
    before = x.tobytes()
    num = sparsify.top_k(x, k, indices[:room], values[:room])
    assert num == min(k, x.size) and x.tobytes() == before
    assert (indices[room:] == GUARD).all() and (values[room:] == 77).all()
    return indices[:num], values[:num]


def check(x, k):
    expected = chosen(x, k)
    for room in {min(k, x.size), sparsify.room_for(x.size, k), sparsify.room_for(x.size, k) + 1}:
        indices, values = top_k(x, k, room)
        np.testing.assert_array_equal(indices, expected)
        assert values.tobytes() == x[expected].tobytes()


def bits(*words):
    return np.array(words, np.uint32).view(np.float32)


AWKWARD = {
    "nothing": np.zeros(0, np.float32),
    "one": np.array([-3], np.float32),
    "one zero": np.zeros(1, np.float32),
    "all zero": np.zeros(1000, np.float32),
    "both zeros": np.tile(np.array([0.0, -0.0], np.float32), 50),
    "all equal": np.full(1000, -2.5, np.float32),
    "two values": np.tile(np.array([1, -1, 2], np.float32), 333),
    "denormals": bits(*range(1, 200), *range(0x80000001, 0x80000100)),
    "infinities": np.array([1, np.inf, -np.inf, 3e38, -3e38, np.inf] * 9, np.float32),
    "NaNs of every kind": np.concatenate([bits(0x7F800001, 0xFF800001, 0x7FC00000, 0xFFFFFFFF, 0x7FFFFFFF, 0x7F800000),
                                          np.arange(20, dtype=np.float32)]),
    "only NaN": np.full(40, np.nan, np.float32),
    "neighbours in bits": bits(*range(0x3F800000, 0x3F800300)),
}


@pytest.mark.parametrize("name", AWKWARD)
def test_awkward_arrays_give_the_same_set_as_a_stable_sort(isa, name):
    x = AWKWARD[name]
    for k in {0, 1, 2, 3, 7, 8, 9, x.size // 10, x.size // 2, max(x.size - 1, 0), x.size, x.size + 1}:
        check(x, k)


@pytest.mark.parametrize("n", [*range(1, 40), 2047, 2048, 2049, 4097])
def test_every_length_around_lanes_and_blocks(isa, n):
    x = np.random.default_rng(n).standard_normal(n).astype(np.float32)
    for k in {1, n // 3, n - 1}:
        check(x, k)


@settings(max_examples=150, deadline=None)
@given(arrays(np.uint32, st.integers(0, 300)), st.integers(0, 300), st.sampled_from([0xFFFFFFFF, 0xFF800000, 0x3]))
@example(np.array([0xFFFFFFFF, 0x7F800000], np.uint32), 1, 0xFFFFFFFF)
def test_any_bits_at_all(words, k, mask):
    x = (words & np.uint32(mask)).view(np.float32)
    expected = chosen(x, k)
    try:
        for name in available():
            sparsify._force_isa(name)
            indices, values = top_k(x, k)
            np.testing.assert_array_equal(indices, expected)
            assert values.tobytes() == x[expected].tobytes()
    finally:
        sparsify._force_isa()


def large(kind):
    rng = np.random.default_rng(7)
    x = rng.standard_normal(SAMPLED).astype(np.float32)
    if kind == "heavy tail":
        x = (x / rng.standard_normal(SAMPLED)).astype(np.float32)
    elif kind == "mostly zero":
        x[rng.random(SAMPLED) < 0.97] = 0
    elif kind == "ascending":
        x = np.sort(np.abs(x))
    elif kind == "descending":
        x = -np.sort(-np.abs(x))
    elif kind == "few values":
        x = np.round(x)
    elif kind == "constant":
        x[:] = 3
    elif kind == "large elements together":
        x[1000:31_000] *= 1e6
    elif kind == "NaN and infinities":
        x[::9], x[::7], x[::11] = np.nan, np.inf, -np.inf
    elif kind == "zeros where the sample looks":
        # The sampled positions hold nothing, so that both bounds are far too low.
        stride = SAMPLED // 16384
        x[:stride * 16384].reshape(16384, stride)[np.arange(16384), sampled_offsets(stride)] = 0
    elif kind == "giants where the sample looks":
        stride = SAMPLED // 16384
        x[:stride * 16384].reshape(16384, stride)[np.arange(16384), sampled_offsets(stride)] = 1e9
    return x


def sampled_offsets(stride):
    """Where in each stride the kernel takes its sample: splitmix64 of the stride's number."""
    with np.errstate(over="ignore"):
        z = np.arange(16384, dtype=np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) % np.uint64(stride)).astype(np.int64)


LARGE = ["normal", "heavy tail", "mostly zero", "ascending", "descending", "few values", "constant",
         "NaN and infinities", "large elements together", "zeros where the sample looks", "giants where the sample looks"]


@pytest.mark.parametrize("kind", LARGE)
def test_the_sample_changes_the_speed_and_never_the_set(isa, kind):
    x = large(kind)
    for k in (1, 20, SAMPLED // 100, SAMPLED // 10, SAMPLED // 2, SAMPLED * 95 // 100, SAMPLED - 1):
        check(x, k)


def test_room_is_never_less_than_the_result_and_little_more():
    for n in (0, 1, 1000, 1 << 17, 1 << 20, 25_000_000, (1 << 32) - 1):
        for k in (0, 1, n // 100, n // 10, n // 2, n, n + 5):
            assert min(k, n) <= sparsify.room_for(n, k) <= n
    assert sparsify.room_for(25_000_000, 2_500_000) < 1.25 * 2_500_000


@pytest.mark.parametrize("kind", ["normal", "few values", "NaN and infinities", "mostly zero"])
def test_threshold_and_counts_agree_with_numpy(isa, kind):
    for x in (large(kind), large(kind)[:999]):
        magnitudes = np.abs(x)
        for k in (1, x.size // 100, x.size // 2, x.size):
            magnitude, ties = sparsify.threshold(x, k)
            expected = np.sort(np.where(np.isnan(x), np.inf, magnitudes))[-k]
            if np.isnan(magnitude):
                assert k <= np.isnan(x).sum() and ties == k
                continue
            assert magnitude == expected
            above = int((magnitudes > magnitude).sum() + np.isnan(x).sum())
            assert sparsify.count_above(x, magnitude) == above == k - ties
            assert 1 <= ties <= (magnitudes == magnitude).sum()


# Error feedback

def exact_sum(*terms):
    return sum(np.asarray(term, np.float64) for term in terms)


@pytest.mark.parametrize("n", [0, 1, 7, 2047, 2049, 5000, SAMPLED])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.6, 1.0])
def test_absorb_chooses_from_the_sum_and_loses_nothing_that_is_sent(isa, n, share):
    rng = np.random.default_rng(n)
    residual, gradient = (np.ldexp(rng.standard_normal(n), rng.integers(-9, 9, n)).astype(np.float32) for _ in range(2))
    k, before = int(n * share), residual.copy()
    total = residual + gradient
    expected = chosen(total, k)
    for room in {k, sparsify.room_for(n, k)}:
        residual = before.copy()
        indices, values = np.zeros(room, np.uint32), np.zeros(room, np.float32)
        assert sparsify.absorb(residual, gradient, k, indices, values) == k
        np.testing.assert_array_equal(indices[:k], expected)
        np.testing.assert_array_equal(values[:k], total[expected])
        kept = total.copy()
        kept[expected] = exact_sum(before, gradient)[expected] - values[:k]         # what rounding left over, exactly
        np.testing.assert_array_equal(residual, kept)
        np.testing.assert_array_equal(exact_sum(residual[expected], values[:k]), exact_sum(before, gradient)[expected])


def test_a_sum_that_is_not_finite_is_sent_and_leaves_the_residual_as_it_was(isa):
    residual = np.arange(40, dtype=np.float32)
    gradient = np.ones(40, np.float32)
    gradient[[3, 17, 39]] = np.nan, np.inf, -np.inf
    residual[20], gradient[20] = 3e38, 3e38                             # overflows
    before = residual.copy()
    indices, values = np.zeros(5, np.uint32), np.zeros(5, np.float32)
    sparsify.absorb(residual, gradient, 5, indices, values)
    np.testing.assert_array_equal(indices, [3, 17, 20, 38, 39])
    np.testing.assert_array_equal(values, np.array([np.nan, np.inf, np.inf, 39, -np.inf], np.float32))
    np.testing.assert_array_equal(residual[[3, 17, 20, 39]], before[[3, 17, 20, 39]])
    assert residual[38] == 0 and residual[4] == 5


def test_settle_takes_back_what_rounding_for_the_wire_lost(isa):
    rng = np.random.default_rng(5)
    residual, gradient = (rng.standard_normal(500).astype(np.float32) for _ in range(2))
    gradient[7], residual[7] = 1e6, 0.25                                 # more than float16 holds
    before = residual.copy()
    indices, values = np.zeros(50, np.uint32), np.zeros(50, np.float32)
    sparsify.absorb(residual, gradient, 50, indices, values)
    with np.errstate(over="ignore"):
        sent = values.astype(np.float16).astype(np.float32)
    sparsify.settle(residual, gradient, indices, values, sent)
    finite = np.isfinite(sent)
    assert not finite[np.searchsorted(indices, 7)] and finite.sum() == 49
    kept = (exact_sum(before, gradient)[indices] - sent).astype(np.float32)
    np.testing.assert_array_equal(residual[indices[finite]], kept[finite])
    assert residual[7] == before[7]


@pytest.mark.parametrize("n", [0, 1, 2049, 5000])
def test_absorb_at_is_absorb_with_the_choice_made(isa, n):
    residual, gradient = (np.random.default_rng(seed).standard_normal(n).astype(np.float32) for seed in (1, 2))
    other, k = residual.copy(), n // 7
    indices, values, again = np.zeros(k, np.uint32), np.zeros(k, np.float32), np.zeros(k, np.float32)
    sparsify.absorb(residual, gradient, k, indices, values)
    assert sparsify.absorb_at(other, gradient, indices, again) == 0
    assert other.tobytes() == residual.tobytes() and again.tobytes() == values.tobytes()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
def test_absorb_at_changes_nothing_when_any_sum_is_not_finite(isa, bad):
    residual, gradient = np.full(3000, 3e38, np.float32), np.zeros(3000, np.float32)
    gradient[[5, 2999]] = bad
    before, values = residual.copy(), np.full(2, 7, np.float32)
    assert sparsify.absorb_at(residual, gradient, np.array([1, 2], np.uint32), values) == 2
    assert residual.tobytes() == before.tobytes() and (values == 7).all()


# Into a dense array and out of it

def test_put_values_clears_the_rest_and_keeps_every_bit():
    out = np.full(9, 7, np.float32)
    sparsify.put_values(out, np.array([8, 2, 3], np.uint32), bits(0x80000000, 0x7F800001, 1))
    assert out.view(np.uint32).tolist() == [0, 0, 0x7F800001, 1, 0, 0, 0, 0, 0x80000000]


def test_gather_and_sparse_sum_in_order_with_repeats():
    x = np.random.default_rng(2).standard_normal(100).astype(np.float32)
    indices = np.array([99, 0, 5, 5, 5, 0], np.uint32)
    out = np.zeros(6, np.float32)
    sparsify.gather_values(x, indices, out)
    np.testing.assert_array_equal(out, x[indices])
    expected, values = x.copy(), np.array([1e8, 1, 1e8, 1, -1e8, 3], np.float32)
    np.add.at(expected, indices, values)
    sparsify.add_values(x, indices, values)
    np.testing.assert_array_equal(x, expected)


def test_a_signalling_nan_is_gathered_as_it_is_and_a_sum_makes_the_one_quiet_nan():
    x, indices = bits(0x7F800001, 0xFFC12345, 0x3F800000), np.array([0, 1], np.uint32)
    out = np.zeros(2, np.float32)
    sparsify.gather_values(x, indices, out)
    assert out.tobytes() == x[:2].tobytes()
    sparsify.add_values(x, indices, out)
    assert x.view(np.uint32).tolist() == [0x7FC00000, 0x7FC00000, 0x3F800000]


@pytest.mark.parametrize("bad", [3, 4, 0xFFFFFFFF])
def test_an_index_outside_writes_nothing(bad):
    x, indices = np.ones(3, np.float32), np.array([0, bad, 1], np.uint32)
    out = np.full(3, 7, np.float32)
    for call in (lambda: sparsify.gather_values(x, indices, out), lambda: sparsify.add_values(x, indices, out),
                 lambda: sparsify.put_values(x, indices, out),
                 lambda: sparsify.settle(x, x.copy(), indices, out, out),
                 lambda: sparsify.absorb_at(x, x.copy(), np.sort(indices), out)):
        with pytest.raises(ShapeError, match="an index is not below 3"):
            call()
    assert (out == 7).all() and (x == 1).all()


# Random subsets

def drawn(n, p, key, first=0, room=None):
    indices = np.full((n if room is None else room) + 20, GUARD, np.uint32)
    num = sparsify.draw(n, p, key, indices[:len(indices) - 20], first)
    assert (indices[len(indices) - 20:] == GUARD).all()
    return indices[:num]


def stirred(h):
    h = h ^ h >> np.uint32(16)
    h = h * np.uint32(0x7FEB352D)
    h = h ^ h >> np.uint32(15)
    h = h * np.uint32(0x846CA68B)
    return h ^ h >> np.uint32(16)


@pytest.mark.feature("P23")
@pytest.mark.parametrize("n", [0, 1, 5, 16, 17, 1000, 70_001])
def test_the_subset_is_a_function_of_key_and_index_alone(isa, n):
    key, p = sparsify.draw_key(42, 3), 0.3
    index = np.arange(n, dtype=np.uint32) + np.uint32(11)
    hashes = stirred(stirred(index + np.uint32(key & 0xFFFFFFFF)) ^ np.uint32(key >> 32))
    expected = np.flatnonzero(hashes < round(p * 2**32))
    np.testing.assert_array_equal(drawn(n, p, key, 11), expected)
    np.testing.assert_array_equal(drawn(n, p, key, 11, room=len(expected) // 2), expected[:len(expected) // 2])
    cut = n // 3
    np.testing.assert_array_equal(drawn(cut, p, key, 11), expected[expected < cut])
    np.testing.assert_array_equal(drawn(n - cut, p, key, 11 + cut), expected[expected >= cut] - cut)


def test_probability_0_chooses_none_and_1_all(isa):
    assert drawn(1000, 0.0, 1).size == 0
    np.testing.assert_array_equal(drawn(1000, 1.0, 1), np.arange(1000))


@pytest.mark.feature("P23")
def test_every_index_is_chosen_equally_often_and_steps_are_independent():
    n, p, steps = 2000, 0.25, 2000
    times, together = np.zeros(n), 0
    before = np.zeros(n, bool)
    for step in range(steps):
        now = np.zeros(n, bool)
        now[drawn(n, p, sparsify.draw_key(9, step))] = True
        times += now
        together += int((now & before).sum())
        before = now
    sigma = np.sqrt(steps * p * (1 - p))
    z = (times - steps * p) / sigma
    assert np.abs(z).max() < 5 and abs(z.mean()) < 5 / np.sqrt(n) and 0.9 < z.std() < 1.1
    pairs = n * (steps - 1)
    assert abs(together - pairs * p * p) < 5 * np.sqrt(pairs * p * p)


def test_keys_differ_by_seed_and_step():
    assert len({sparsify.draw_key(seed, step) for seed in range(100) for step in range(100)}) == 10_000


def test_wrong_arguments_are_named():
    x, indices, values = np.ones(10, np.float32), np.zeros(4, np.uint32), np.zeros(4, np.float32)
    with pytest.raises(ShapeError, match="5 results do not fit into 4 indices and 4 values"):
        sparsify.top_k(x, 5, indices, values)
    with pytest.raises(ShapeError, match="k must be >= 0"):
        sparsify.top_k(x, -1, indices, values)
    for call in (lambda: sparsify.top_k(x, 4, indices, x[2:6]),
                 lambda: sparsify.top_k(x, 4, values.view(np.uint32), values),
                 lambda: sparsify.absorb(x, x, 4, indices, values),
                 lambda: sparsify.absorb(x, np.ones(10, np.float32), 4, indices, x[:4]),
                 lambda: sparsify.gather_values(x, indices, x[:4]), lambda: sparsify.add_values(x, indices, x[:4])):
        with pytest.raises(ShapeError, match="overlap"):
            call()
    with pytest.raises(ShapeError, match="residual has 10 elements, gradient 4"):
        sparsify.absorb(x, values, 4, indices, values)
    with pytest.raises(ShapeError, match="4 indices, but 3 values"):
        sparsify.add_values(x, indices, values[:3])
    with pytest.raises(ShapeError, match="4 indices, but room for 3 values"):
        sparsify.gather_values(x, indices, values[:3])
    with pytest.raises(ShapeError, match="residual has 10 elements, gradient 4"):
        sparsify.settle(x, values, indices, values, values)
    with pytest.raises(ShapeError, match="4 indices, but 4 values and 3 sent"):
        sparsify.settle(x, x.copy(), indices, values, values[:3])
    for wrong in ([1, 1, 2, 3], [1, 3, 2, 4]):
        with pytest.raises(ShapeError, match="indices must ascend strictly"):
            sparsify.absorb_at(x, x.copy(), np.array(wrong, np.uint32), values)
    for k in (0, 11):
        with pytest.raises(ShapeError, match="k must be in 1..10"):
            sparsify.threshold(x, k)
    for magnitude in (-1.0, float("nan")):
        with pytest.raises(ShapeError, match="a magnitude is >= 0"):
            sparsify.count_above(x, magnitude)
    for n, p in ((-1, 0.5), (1 << 32, 0.5), (10, -0.1), (10, 1.1), (10, float("nan"))):
        with pytest.raises(ShapeError):
            sparsify.draw(n, p, 1, indices)
    with pytest.raises(ValueError, match="dtype"):
        sparsify.top_k(x.astype(np.float64), 4, indices, values)
    with pytest.raises(ValueError):
        sparsify._force_isa("altivec")
    assert sparsify.isa() == available()[-1]
