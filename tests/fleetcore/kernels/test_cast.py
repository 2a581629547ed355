"""float32 <-> float16 / bfloat16, against numpy and torch, on every instruction set."""
import numpy as np
import pytest
import torch

from fleetcore.errors import DType, DTypeError, ShapeError
from fleetcore.kernels import cast

TORCH = {DType.FLOAT16: torch.float16, DType.BFLOAT16: torch.bfloat16}
HALVES = list(TORCH)
CHUNK = 1 << 22


def available():
    names = []
    for name in ("sse2", "avx2", "neon", "generic"):
        try:
            cast._force_isa(name)
        except ValueError:
            continue
        names.append(name)
    cast._force_isa()
    return names


@pytest.fixture(params=available())
def isa(request):
    cast._force_isa(request.param)
    yield request.param
    cast._force_isa()


def narrowed(values, half):
    out = np.empty(values.size, np.uint16)
    cast.cast_array(out, half, values, DType.FLOAT32)
    return out


def widened(bits, half):
    out = np.empty(bits.size, np.float32)
    cast.cast_array(out, DType.FLOAT32, bits, half)
    return out


def by_torch(values, half):
    return torch.from_numpy(values).to(TORCH[half]).view(torch.int16).numpy().view(np.uint16)


def quiet(bits, half):
    """The NaN that a float32 NaN becomes: its sign and upper payload, with the quiet bit."""
    if half == DType.BFLOAT16:
        return (bits >> 16 | 0x0040).astype(np.uint16)
    return (bits >> 16 & 0x8000 | 0x7E00 | bits >> 13 & 0x03FF).astype(np.uint16)


def check_down(bits, half):
    values = bits.view(np.float32)
    nan = np.isnan(values)
    expected = np.where(nan, quiet(bits, half), by_torch(values, half))
    np.testing.assert_array_equal(narrowed(values, half), expected)


def structured():
    """Every sign and exponent with mantissas at and next to every tie, edge and single bit."""
    mantissas = {0, 0x7FFFFF}
    for kept in (7, 10):                                # mantissa bits of bfloat16 and float16
        low = 23 - kept
        for top in (0, 1, 2, 3, (1 << kept) - 2, (1 << kept) - 1, 1 << kept - 1):
            for rest in (0, 1, (1 << low - 1) - 1, 1 << low - 1, (1 << low - 1) + 1, (1 << low) - 1):
                mantissas.add(top << low | rest)
    for one in range(23):                               # float16 denormals round at every position
        for other in range(one + 1):
            mantissas |= {1 << one | 1 << other, 0x7FFFFF ^ (1 << one | 1 << other), (1 << one) - 1, (1 << one) + 1}
    exponents = np.arange(512, dtype=np.uint32)[:, None] << 23
    return (exponents | np.array(sorted(mantissas), np.uint32)).ravel()


@pytest.mark.parametrize("half", HALVES, ids=lambda value: value.name)
def test_all_65536_halves_widen_exactly(isa, half):
    bits = np.arange(1 << 16, dtype=np.uint16)
    wide = widened(bits, half)
    expected = torch.from_numpy(bits.view(np.int16)).view(TORCH[half]).to(torch.float32).numpy()
    nan = np.isnan(expected)
    np.testing.assert_array_equal(wide.view(np.uint32)[~nan], expected.view(np.uint32)[~nan])
    shift = 16 if half == DType.BFLOAT16 else 13
    payload = (bits.astype(np.uint32) << shift & 0x007FFFFF) | 0x7FC00000 | (bits.astype(np.uint32) & 0x8000) << 16
    np.testing.assert_array_equal(wide.view(np.uint32)[nan], payload[nan])
    np.testing.assert_array_equal(narrowed(wide, half)[~nan], bits[~nan])           # and come back as they were


@pytest.mark.parametrize("half", HALVES, ids=lambda value: value.name)
def test_every_exponent_tie_and_edge_narrows_as_in_torch(isa, half):
    bits = structured()
    check_down(bits, half)
    if half == DType.FLOAT16:
        with np.errstate(over="ignore"):
            expected = bits.view(np.float32).astype(np.float16).view(np.uint16)
        finite = ~np.isnan(bits.view(np.float32))
        np.testing.assert_array_equal(narrowed(bits.view(np.float32), half)[finite], expected[finite])


@pytest.mark.parametrize("half", HALVES, ids=lambda value: value.name)
def test_random_bits_narrow_as_in_torch(isa, half):
    check_down(np.random.default_rng(3).integers(0, 1 << 32, 1 << 20, np.uint32), half)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("half", HALVES, ids=lambda value: value.name)
def test_all_4294967296_floats_narrow_as_in_torch(isa, half):
    for start in range(0, 1 << 32, CHUNK):
        check_down(np.arange(start, start + CHUNK, dtype=np.uint64).astype(np.uint32), half)


@pytest.mark.parametrize("half", HALVES, ids=lambda value: value.name)
def test_ties_go_to_even_and_overflow_to_inf(isa, half):
    unit, largest = (2.0**-10, 65504.0) if half == DType.FLOAT16 else (2.0**-7, float(np.float32(3.3895314e38)))
    values = np.array([1 + unit / 2, 1 + unit * 1.5, 1 + unit * 0.501, largest, -largest, 3.4e38, -3.4e38,
                       np.inf, -np.inf, 0.0, -0.0], np.float32)
    got = widened(narrowed(values, half), half)
    expected = [1, 1 + 2 * unit, 1 + unit, largest, -largest, np.inf, -np.inf, np.inf, -np.inf, 0, 0]
    np.testing.assert_array_equal(got, np.array(expected, np.float32))
    assert np.signbit(got[10]) and not np.signbit(got[9])


@pytest.mark.parametrize("half", HALVES, ids=lambda value: value.name)
@pytest.mark.parametrize("count", [*range(35), 1000, (1 << 20) + 3])
def test_every_length_and_offset_stays_in_bounds(isa, half, count):
    values = np.random.default_rng(count).standard_normal(count + 1).astype(np.float32)[1:]
    out, wide = np.full(count + 2, 77, np.uint16), np.full(count + 2, 77, np.float32)
    cast.cast_array(out[1:-1], half, values, DType.FLOAT32)
    cast.cast_array(wide[1:-1], DType.FLOAT32, out[1:-1], half)
    np.testing.assert_array_equal(out[1:-1], by_torch(values, half))
    np.testing.assert_array_equal(wide[1:-1], torch.from_numpy(values).to(TORCH[half]).to(torch.float32).numpy())
    assert out[0] == out[-1] == wide[0] == wide[-1] == 77


@pytest.mark.parametrize("half", HALVES, ids=lambda value: value.name)
def test_flushing_denormals_in_arithmetic_does_not_touch_casts(isa, half):
    bits = np.arange(1 << 16, dtype=np.uint16)
    small = structured()
    wide, narrow = widened(bits, half), narrowed(small.view(np.float32), half)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        flushed_wide, flushed_narrow = widened(bits, half), narrowed(small.view(np.float32), half)
    finally:
        torch.set_flush_denormal(False)
    assert flushed_wide.tobytes() == wide.tobytes()
    assert flushed_narrow.tobytes() == narrow.tobytes()


@pytest.mark.parametrize("dtype", DType, ids=lambda value: value.name)
def test_same_type_is_a_copy(dtype):
    data = np.random.default_rng(4).integers(0, 256, 240, np.uint8)
    out = np.zeros_like(data)
    cast.cast_array(out, dtype, data, dtype)
    assert out.tobytes() == data.tobytes()
    cast.cast_array(data, dtype, data, dtype)           # onto itself: allowed, nothing happens
    assert out.tobytes() == data.tobytes()


def test_wrong_arguments_are_named():
    wide, narrow = np.zeros(4, np.float32), np.zeros(4, np.uint16)
    for dst, src in ((DType.FLOAT16, DType.BFLOAT16), (DType.FLOAT64, DType.FLOAT32), (10, 10), (-1, 0)):
        with pytest.raises(DTypeError, match="no cast"):
            cast.cast_array(wide, dst, wide, src)
    with pytest.raises(ShapeError, match="dst has 6 bytes in elements of 2, src 16 in elements of 4"):
        cast.cast_array(narrow[:3], DType.FLOAT16, wide, DType.FLOAT32)
    with pytest.raises(ShapeError, match="overlap"):
        cast.cast_array(wide.view(np.uint16)[:4], DType.FLOAT16, wide, DType.FLOAT32)
    with pytest.raises(ShapeError, match="not aligned"):
        cast.cast_array(np.zeros(9, np.uint8)[1:], DType.FLOAT16, wide, DType.FLOAT32)
    with pytest.raises(BufferError):
        cast.cast_array(bytes(8), DType.FLOAT16, wide, DType.FLOAT32)
    with pytest.raises(ValueError):
        cast._force_isa("altivec")
    assert cast.isa() == available()[-1]
