"""Blocks of few bits against an oracle written after the layout, bit by bit, on every instruction set."""
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from fleetcore.errors import DType, DTypeError, ShapeError
from fleetcore.kernels import quantize

BLOCK = 256
FP8, SIGN = quantize.FP8, quantize.SIGN
CODES = range(1, 10)
INTEGERS = range(2, 9)
LENGTHS = (0, 1, 2, 7, 8, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 512, 513, 1000, 2305)
LARGEST = np.finfo(np.float32).max
END = {FP8: 31 * 2.0**123, 2: 2.0**125, 3: 3 * 2.0**125}       # from here on magnitudes count as infinite
LEAST_SCALE = np.float32(2.0**-125)


def available():
    names = []
    for name in ("sse2", "avx2", "neon", "generic"):
        try:
            quantize._force_isa(name)
        except ValueError:
            continue
        names.append(name)
    quantize._force_isa()
    return names


@pytest.fixture(params=available())
def isa(request):
    quantize._force_isa(request.param)
    yield request.param
    quantize._force_isa()


# --- the oracle ---------------------------------------------------------------------------------------------------

def planes(code):
    bits = 8 if code == FP8 else code
    return [width for width in (8, 4, 2, 1) if bits & width]


def rows(width, count):
    return 8 * -(-count * width // 256)


def packed(codes, code):
    """Codes of one block as its planes."""
    words, start = [], 0
    for width in planes(code):
        num_rows = rows(width, len(codes))
        padded = np.zeros(num_rows * (32 // width), np.uint32)
        padded[:len(codes)] = codes >> start & (1 << width) - 1
        columns = padded.reshape(32 // width, num_rows) << np.arange(0, 32, width, dtype=np.uint32)[:, None]
        words.append(np.bitwise_or.reduce(columns, axis=0))
        start += width
    return np.concatenate(words).astype("<u4").view(np.uint8)


def mix64(v):
    v = (v ^ v >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    v = (v ^ v >> 27) * 0x94D049BB133111EB % 2**64
    return v ^ v >> 31


def noise(key, block, count):
    random = mix64((mix64((key + 0x9E3779B97F4A7C15) % 2**64) + block * 0x9E3779B97F4A7C15) % 2**64)
    h = np.arange(count, dtype=np.uint32) * np.uint32(0x9E3779B9) + np.uint32(random & 0xFFFFFFFF)
    h = (h ^ h >> 16) * np.uint32(0x21F0AAAD) ^ np.uint32(random >> 32)
    h = (h ^ h >> 15) * np.uint32(0xD35A2D97)
    return (h >> 16).astype(np.float32) / np.float32(65536) + np.float32(2.0**-17 - 0.5)


def mean_magnitude(x):
    sums = np.zeros(16, np.float32)
    padded = np.zeros(-(-len(x) // 16) * 16, np.float32)
    padded[:len(x)] = np.abs(x)
    for row in padded.reshape(-1, 16):
        sums += row
    while len(sums) > 1:
        sums = sums[:len(sums) // 2] + sums[len(sums) // 2:]
    mean = min(sums[0] / np.float32(len(x)), np.abs(x).max())
    return mean if mean >= LEAST_SCALE else np.float32(0)


def coded_block(code, x, random=None):
    """(scale, codes) of a finite block."""
    most = np.abs(x).max()
    if code == SIGN:
        return mean_magnitude(x), np.signbit(x).astype(np.uint32)
    if code == FP8:
        exponent = max(-116, int(np.ceil(np.log2(float(most) / 448))) if most else -116)
        scale = np.float32(2.0**exponent)
        eighths = torch.from_numpy(x / scale).to(torch.float8_e4m3fn).view(torch.uint8)
        return scale, eighths.numpy().astype(np.uint32)
    top = np.float32(2 ** (code - 1) - 1)
    scale = max(most / top, LEAST_SCALE)
    if random is not None and scale > LEAST_SCALE:
        scale *= np.float32(1 + 2.0**-20)
    y = x * (np.float32(1) / scale)
    if random is not None:
        y = y + random
    return scale, np.rint(y).astype(np.int32).astype(np.uint32)


def values_of(code, scale, codes):
    with np.errstate(all="ignore"):
        if code == SIGN:
            return np.where(codes & 1, -scale, scale).astype(np.float32)
        if code == FP8:
            eighths = torch.from_numpy(codes.astype(np.uint8)).view(torch.float8_e4m3fn)
            return eighths.to(torch.float32).numpy() * scale
        return (codes.astype(np.int32) << 32 - code >> 32 - code).astype(np.float32) * scale


def oracle(code, x, key=None, first=0):
    """(encoding, values) of x."""
    records, values = [np.empty(0, np.uint8)], [np.empty(0, np.float32)]
    for start in range(0, len(x), BLOCK):
        block = x[start:start + BLOCK]
        random = None if key is None or code in (SIGN, FP8) else noise(key, (first + start) // BLOCK, len(block))
        if np.isfinite(block).all():
            scale, codes = coded_block(code, block, random)
        else:
            scale, codes = np.float32(np.nan), np.zeros(len(block), np.uint32)
        records += [np.array([scale], "<f4").view(np.uint8), packed(codes, code)]
        values.append(values_of(code, scale, codes))
    return np.concatenate(records), np.concatenate(values)


def encoded(code, x, key=None, first=0):
    out = np.full(quantize.encoding_bytes(code, len(x)) + 8, 0xA5, np.uint8)
    assert quantize.encode_array(code, x, out[:-8], key, first) == len(out) - 8
    assert (out[-8:] == 0xA5).all()
    return out[:-8]


def decoded(code, data, count):
    out = np.full(count + 2, 77, np.float32)
    quantize.decode_array(code, data, out[1:-1])
    assert out[0] == out[-1] == 77
    return out[1:-1]


def same_bits(got, expected):
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(got), nan)
    np.testing.assert_array_equal(got.view(np.uint32)[~nan], expected.view(np.uint32)[~nan])


def gradients(count, seed=0, scale=1e-2):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(count) * scale * 10.0 ** rng.integers(-3, 3, count)).astype(np.float32)


# --- encoding and decoding ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("count", LENGTHS)
@pytest.mark.parametrize("key", (None, 0, 2**64 - 1), ids=("nearest", "key0", "key-1"))
def test_bytes_and_values_equal_the_oracle(isa, code, count, key):
    x = gradients(count, count)
    data, values = oracle(code, x, key, first=512)
    np.testing.assert_array_equal(encoded(code, x, key, first=512), data)
    same_bits(decoded(code, data, count), values)
    same_bits(decoded(code, data, count), decoded(code, encoded(code, x, key, 512), count))


AWKWARD = {
    "zeros": np.zeros(300), "negative zeros": -np.zeros(300), "equal": np.full(300, 0.3), "negative": -np.arange(1, 301),
    "denormal": np.linspace(-1e-40, 1e-40, 300), "least": np.linspace(-1e-36, 1e-36, 300),
    "largest": np.where(np.arange(300) % 2, LARGEST, -LARGEST), "near largest": np.full(300, LARGEST * (1 - 2.0**-21)),
    "one large": np.eye(1, 300)[0] * 1e38, "one small": np.eye(1, 300)[0] * 1e-30, "integers": np.arange(300) % 255 - 127,
    "halves": (np.arange(300) % 255 - 127) / 2, "wide": 10.0 ** np.linspace(-44, 38, 300),
    "fp8 edges": np.concatenate([np.linspace(-448, 448, 299), [448]]), "fp8 tiny": np.arange(300) * 2.0**-12 / 2,
}


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("x", [x.astype(np.float32) for x in AWKWARD.values()], ids=AWKWARD)
def test_awkward_values_stay_finite_and_close(isa, code, x):
    if np.abs(x).max() >= END.get(code, np.inf):
        x = x * np.float32(END[code] / LARGEST * 0.99)
    got = decoded(code, encoded(code, x), len(x))
    assert np.isfinite(got).all()
    if np.abs(x).max() < 3.4e38:
        same_bits(got, oracle(code, x)[1])
    check_error(code, x, got)


def check_error(code, x, got):
    for start in range(0, len(x), BLOCK):
        block, there = x[start:start + BLOCK].astype(np.float64), got[start:start + BLOCK].astype(np.float64)
        most, error = np.abs(block).max(), np.abs(block - there)
        if code == SIGN:
            np.testing.assert_allclose(np.abs(there), np.abs(block).mean(), rtol=1e-5, atol=2.0**-125)
            assert (np.signbit(there) == np.signbit(block)).all()
        elif code == FP8:                       # three bits after the leading one, or half a step of the smallest numbers
            assert (error <= np.maximum(np.abs(block) / 16, max(most / 224, 2.0**-116) * 2.0**-10)).all()
        else:
            scale = max(most / (2 ** (code - 1) - 1), float(LEAST_SCALE))
            assert (error <= scale / 2 * (1 + 2.0**-14)).all()


@pytest.mark.parametrize("code", INTEGERS)
def test_integers_round_to_nearest_even_within_half_a_step(isa, code):
    x = gradients(5000, code)
    check_error(code, x, decoded(code, encoded(code, x), len(x)))
    top = 2 ** (code - 1) - 1
    x = np.array([top, -top, 0.5, 1.5 % top, -0.5, 0.4999, 0.0], np.float32)        # the scale is 1
    np.testing.assert_array_equal(decoded(code, encoded(code, x), len(x)), np.rint(x))


@pytest.mark.parametrize("code", [SIGN, *range(4, 9)])
def test_numbers_at_the_end_of_float32_never_become_infinite(isa, code):
    for bits in range(0x7F7FFFFF - 200, 0x7F800000, 3):
        x = np.full(40, bits, np.uint32).view(np.float32)
        assert np.isfinite(decoded(code, encoded(code, x), 40)).all()
        chance = decoded(code, encoded(code, x, key=bits), 40)
        assert np.isnan(chance).all() if code > SIGN and bits >= 0x7F7FFFC0 else np.isfinite(chance).all()


@pytest.mark.parametrize("code", END)
@pytest.mark.parametrize("key", (None, 1))
def test_where_a_code_ends_numbers_count_as_infinite(isa, code, key):
    edge = int(np.float32(END[code]).view(np.uint32))
    for bits in (*range(edge - 30, edge + 30), 0x7F7FFFFF):
        got = decoded(code, encoded(code, np.full(40, bits, np.uint32).view(np.float32), key), 40)
        assert np.isnan(got).all() if bits >= edge else np.isfinite(got).all() and got.any()


def test_fp8_has_the_bits_of_torchs_cast_where_both_reach(isa):
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float32).numpy()
    every = np.append(every[np.isfinite(every)], 448).astype(np.float32)              # 448: the scale is 1
    np.testing.assert_array_equal(decoded(FP8, encoded(FP8, every), len(every)).view(np.uint32), every.view(np.uint32))
    x = np.random.default_rng(8).uniform(-448, 448, 100_000).astype(np.float32)
    x[::BLOCK] = 448
    by_torch = torch.from_numpy(x).to(torch.float8_e4m3fn).to(torch.float32).numpy()
    np.testing.assert_array_equal(decoded(FP8, encoded(FP8, x), len(x)).view(np.uint32), by_torch.view(np.uint32))
    data = np.concatenate([np.ones(1, "<f4").view(np.uint8), packed(np.arange(256, dtype=np.uint32), FP8)])
    same_bits(decoded(FP8, data, 256), values_of(FP8, np.float32(1), np.arange(256, dtype=np.uint32)))


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("bad", (np.nan, -np.nan, np.inf, -np.inf))
def test_what_is_not_finite_spoils_its_block_and_no_other(isa, code, bad):
    x = gradients(1000)
    for place in (0, 255, 256, 400, 999):
        spoilt = x.copy()
        spoilt[place] = bad
        for key in (None, 3):
            got = decoded(code, encoded(code, spoilt, key), 1000)
            start = place // BLOCK * BLOCK
            assert np.isnan(got[start:start + BLOCK]).all()
            clean = decoded(code, encoded(code, x, key), 1000)
            outside = np.r_[0:start, start + BLOCK:1000] if start + BLOCK < 1000 else np.arange(start)
            np.testing.assert_array_equal(got[outside], clean[outside])
            np.testing.assert_array_equal(encoded(code, spoilt, key), oracle(code, spoilt, key)[0])


@pytest.mark.parametrize("code", CODES)
def test_any_bytes_decode_within_bounds(isa, code):
    rng = np.random.default_rng(code)
    for count in LENGTHS:
        data = rng.integers(0, 256, quantize.encoding_bytes(code, count), np.uint8)
        decoded(code, data, count)
        for skew in (1, 2, 3):
            room = np.zeros(len(data) + skew, np.uint8)
            room[skew:] = data
            same_bits(decoded(code, room[skew:], count), decoded(code, data, count))


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("count", LENGTHS)
@pytest.mark.parametrize("weight", (1.0, 1 / 3, -2.5, 0.0))
def test_decode_add_rounds_as_its_parts(isa, code, count, weight):
    data = encoded(code, gradients(count, 5), key=1)
    before = gradients(count, 6)
    room = np.concatenate([[77], before, [77]]).astype(np.float32)
    quantize.decode_add_array(code, data, room[1:-1], weight)
    same_bits(room[1:-1], before + decoded(code, data, count) * np.float32(weight))
    assert room[0] == room[-1] == 77


@pytest.mark.parametrize("code", CODES)
def test_flushing_denormals_in_arithmetic_changes_no_value(isa, code):
    inputs = [gradients(1000, seed, 10.0**-exponent) for seed, exponent in enumerate(range(30, 46))]
    inputs += [x.astype(np.float32) for x in AWKWARD.values()]
    data = [encoded(code, x) for x in inputs]
    values = [decoded(code, each, len(x)) for each, x in zip(data, inputs, strict=True)]
    assert all((np.abs(x[x != 0]) >= np.finfo(np.float32).tiny).all() or np.isnan(x).any() for x in values)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        flushed_data = [encoded(code, x) for x in inputs]
        flushed = [decoded(code, each, len(x)) for each, x in zip(data, inputs, strict=True)]
    finally:
        torch.set_flush_denormal(False)
    assert [each.tobytes() for each in flushed] == [each.tobytes() for each in values]
    if code != SIGN:                        # a mean takes denormals for what they are
        assert [each.tobytes() for each in flushed_data] == [each.tobytes() for each in data]


# --- chance -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("code", CODES)
def test_pieces_cut_at_blocks_encode_as_the_whole(isa, code):
    x = gradients(5000, 9)
    whole = encoded(code, x, key=11, first=1024)
    for cut in (256, 1024, 4864):
        pieces = [encoded(code, x[:cut], 11, 1024), encoded(code, x[cut:], 11, 1024 + cut)]
        np.testing.assert_array_equal(np.concatenate(pieces), whole)


@pytest.mark.parametrize("code", INTEGERS)
def test_random_rounding_is_unbiased_and_never_off_by_more_than_a_step(isa, code):
    x = np.random.default_rng(10).uniform(-1, 1, 3 * BLOCK).astype(np.float32)
    x[::BLOCK] = 1
    step, trials = 1 / (2 ** (code - 1) - 1), 2000
    total = np.zeros(len(x), np.float32)
    for key in range(trials):
        got = decoded(code, encoded(code, x, key), len(x))
        assert np.abs(got - x).max() <= step * (1 + 1e-5)
        total += got
    error = (total / trials - x) / step             # standard deviation of one at most 1/2 / sqrt(trials)
    assert np.abs(error).max() < 5 * 0.5 / trials**0.5
    assert abs(error.mean()) < 5 * 0.5 / (trials * len(x))**0.5


def test_random_numbers_differ_between_elements_blocks_and_keys(isa):
    x = np.full(64 * BLOCK, 0.5, np.float32)
    x[::BLOCK] = 1.5                                # 2 bits: a step of 1.5, so 0.5 rounds up one time in three
    ups = np.array([decoded(2, encoded(2, x, key), len(x)) != 0 for key in (0, 1, 2**32, 2**63)])
    ups = np.delete(ups.reshape(4, 64, BLOCK), 0, axis=2)
    assert np.abs(ups.mean(axis=(1, 2)) - 1 / 3).max() < 5 * 0.48 / (64 * 255)**0.5
    centred = ups - 1 / 3
    for other in (np.roll(centred, 1, 0), np.roll(centred, 1, 1), np.roll(centred, 1, 2), np.roll(centred, 8, 2)):
        assert abs((centred * other).mean()) < 5 * (2 / 9) / centred.size**0.5


@pytest.mark.parametrize("code", (SIGN, FP8))
def test_codes_without_chance_ignore_the_key(isa, code):
    x = gradients(1000)
    np.testing.assert_array_equal(encoded(code, x, 1), encoded(code, x))


# --- what is left over --------------------------------------------------------------------------------------------

def check_accounting(grad, before, sent, after):
    """after = grad + before - sent to half a unit in the last place, as float64 sees it; untouched where sent is not finite."""
    fine = np.isfinite(sent)
    np.testing.assert_array_equal(after.view(np.uint32)[~fine], before.view(np.uint32)[~fine])
    exact = grad.astype(np.float64)[fine] + before[fine] - sent[fine]
    assert (np.abs(after[fine] - exact) <= np.spacing(np.abs(after[fine])) * 0.5001).all()


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("count", LENGTHS)
@pytest.mark.parametrize("key", (None, 7), ids=("nearest", "random"))
def test_feedback_encodes_the_sum_and_keeps_the_rest(isa, code, count, key):
    grad, before = gradients(count, 20), gradients(count, 21)
    room = np.concatenate([[77], before, [77]]).astype(np.float32)
    out = np.empty(quantize.encoding_bytes(code, count), np.uint8)
    assert quantize.encode_feedback_array(code, grad, room[1:-1], out, key, 256) == len(out)
    np.testing.assert_array_equal(out, encoded(code, grad + before, key, 256))
    check_accounting(grad, before, decoded(code, out, count), room[1:-1])
    assert room[0] == room[-1] == 77


@pytest.mark.parametrize("code", CODES)
def test_feedback_of_a_spoilt_block_leaves_its_residual(isa, code):
    grad, before = gradients(700, 22), gradients(700, 23)
    grad[300] = np.nan
    residual = before.copy()
    out = np.empty(quantize.encoding_bytes(code, 700), np.uint8)
    quantize.encode_feedback_array(code, grad, residual, out)
    np.testing.assert_array_equal(residual[256:512], before[256:512])
    assert np.isfinite(residual).all()
    assert (residual[:256] != before[:256]).any()


@pytest.mark.parametrize("dtype,torch_dtype", ((DType.FLOAT16, torch.float16), (DType.BFLOAT16, torch.bfloat16)))
@pytest.mark.parametrize("count", LENGTHS)
def test_feedback_of_halves_is_the_cast_of_the_sum(isa, dtype, torch_dtype, count):
    grad, before = gradients(count, 24), gradients(count, 25)
    if count > 40:
        grad[[3, 40]] = [1e38, np.nan]
    room, out = np.concatenate([[77], before, [77]]).astype(np.float32), np.full(count + 1, 7, np.uint16)
    quantize.half_feedback_array(dtype, grad, room[1:-1], out[:-1])
    cast = torch.from_numpy(grad + before).to(torch_dtype)
    sent = cast.to(torch.float32).numpy()
    same_bits(torch.from_numpy(out[:-1].view(np.int16)).view(torch_dtype).to(torch.float32).numpy(), sent)
    check_accounting(grad, before, sent, room[1:-1])
    assert room[0] == room[-1] == 77 and out[-1] == 7


FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-2.0**100, max_value=2.0**100, allow_subnormal=False)


@settings(max_examples=200, deadline=None)
@given(npst.arrays(np.float32, st.tuples(st.just(3), st.integers(0, 40)), elements=FLOATS))
def test_settle_is_exact_to_half_a_unit(parts):
    grad, before, sent = (np.ascontiguousarray(part) for part in parts)
    results = []
    for name in available():
        quantize._force_isa(name)
        residual = before.copy()
        quantize.settle_array(grad, residual, sent)
        results.append(residual)
    quantize._force_isa()
    assert all((result.view(np.uint32) == results[0].view(np.uint32)).all() for result in results)
    exact = np.array([math.fsum([g, b, -s]) for g, b, s in zip(*np.stack([grad, before, sent]).tolist(), strict=True)])
    assert (np.abs(results[0] - exact) <= np.spacing(np.abs(results[0])) * 0.5001).all()


# --- sizes and refusals -------------------------------------------------------------------------------------------

@pytest.mark.feature("P26", "S14")
@pytest.mark.parametrize("code,most", ((8, 0.26), (4, 0.135), (SIGN, 0.04), (FP8, 0.26)))
def test_encodings_are_as_small_as_promised(code, most):
    for count in (100_000, 6_553_600, 25_000_000):
        assert quantize.encoding_bytes(code, count) <= most * 4 * count
    assert quantize.encoding_bytes(code, 0) == 0


def test_wrong_arguments_are_named():
    x, out, half = np.zeros(300, np.float32), np.zeros(400, np.uint8), np.zeros(300, np.uint16)
    for code in (0, 10, -1):
        with pytest.raises(DTypeError, match=f"unknown code {code}"):
            quantize.encode_array(code, x, out)
        with pytest.raises(DTypeError, match="unknown code"):
            quantize.encoding_bytes(code, 4)
    with pytest.raises(ShapeError, match="takes 328 bytes, out has 300"):
        quantize.encode_array(8, x, out[:300])
    with pytest.raises(ShapeError, match="takes 328 bytes, data has 400"):
        quantize.decode_array(8, out, x)
    with pytest.raises(ShapeError, match="multiple of 256 elements, got 100"):
        quantize.encode_array(8, x, out, 1, 100)
    with pytest.raises(ShapeError, match="overlap"):
        quantize.encode_array(8, x, x.view(np.uint8))
    with pytest.raises(ShapeError, match="overlap"):
        quantize.decode_add_array(8, x.view(np.uint8)[:328], x)
    with pytest.raises(ShapeError, match="300 and 200"):
        quantize.encode_feedback_array(8, x, x[:200].copy(), out)
    with pytest.raises(ShapeError, match="overlap"):
        quantize.settle_array(x, x, x)
    with pytest.raises(DTypeError, match="not a half"):
        quantize.half_feedback_array(DType.FLOAT32, x, x.copy(), half)
    with pytest.raises(OverflowError):
        quantize.encode_array(8, x, out, -1)
    with pytest.raises(ValueError):
        quantize.encode_array(8, x.astype(np.float64), out)
    with pytest.raises((ValueError, BufferError)):
        quantize.decode_array(8, bytes(328), np.frombuffer(bytes(1200), np.float32))
    with pytest.raises(ValueError):
        quantize._force_isa("altivec")
    assert quantize.isa() == available()[-1]
