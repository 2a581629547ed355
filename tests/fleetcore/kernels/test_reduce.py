"""k arrays become one: every dtype, op and count against numpy and torch, bit by bit, on every instruction set."""
import itertools

import numpy as np
import pytest
import torch

from fleetcore.errors import DType, DTypeError, ReduceOp, ShapeError
from fleetcore.kernels import reduce

NUMPY = {
    DType.FLOAT32: np.float32, DType.FLOAT64: np.float64, DType.FLOAT16: np.float16, DType.BFLOAT16: np.uint16,
    DType.INT8: np.int8, DType.INT16: np.int16, DType.INT32: np.int32, DType.INT64: np.int64, DType.UINT8: np.uint8,
    DType.BOOL: np.uint8,
}
FLOATS = (DType.FLOAT32, DType.FLOAT64, DType.FLOAT16, DType.BFLOAT16)
OFFERED = [(dtype, op) for dtype, op in itertools.product(DType, ReduceOp) if op != ReduceOp.MEAN or dtype in FLOATS]
CANONICAL = {DType.FLOAT32: 0x7FC00000, DType.FLOAT64: 0x7FF8000000000000, DType.FLOAT16: 0x7E00,
             DType.BFLOAT16: 0x7FC0}
LENGTHS = (0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 1000, 2100)   # around lanes and blocks


def available():
    names = []
    for name in ("sse2", "avx2", "neon", "generic"):
        try:
            reduce._force_isa(name)
        except ValueError:
            continue
        names.append(name)
    reduce._force_isa()
    return names


@pytest.fixture(params=available())
def isa(request):
    reduce._force_isa(request.param)
    yield request.param
    reduce._force_isa()


def widen(array, dtype):
    """Values as they are summed: float32 for halves, booleans for bool, else unchanged."""
    if dtype == DType.FLOAT16:
        return array.astype(np.float32)
    if dtype == DType.BFLOAT16:
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array != 0 if dtype == DType.BOOL else array


def narrow(values, dtype):
    if dtype == DType.BFLOAT16:
        return torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    return values.astype(NUMPY[dtype])


def oracle(srcs, dtype, op, divisor=1):
    """Left fold by numpy in the contract's precision; every NaN the canonical one."""
    logical = {ReduceOp.SUM: np.logical_or, ReduceOp.MAX: np.logical_or, ReduceOp.MIN: np.logical_and,
               ReduceOp.PRODUCT: np.logical_and}
    numeric = {ReduceOp.SUM: np.add, ReduceOp.MEAN: np.add, ReduceOp.MIN: np.minimum, ReduceOp.MAX: np.maximum,
               ReduceOp.PRODUCT: np.multiply}
    fold = (logical if dtype == DType.BOOL else numeric)[op]
    with np.errstate(all="ignore"):
        value = widen(srcs[0], dtype)
        for src in srcs[1:]:
            value = fold(value, widen(src, dtype))
        if divisor != 1:
            value = value / value.dtype.type(divisor)
        result = np.ascontiguousarray(narrow(value, dtype))
    if dtype in FLOATS and (len(srcs) > 1 or divisor != 1):
        unsigned = result.view(f"u{result.itemsize}")
        unsigned[np.isnan(value)] = CANONICAL[dtype]
    return result


def sample(rng, dtype, count):
    if dtype in FLOATS:
        values = rng.standard_normal(count) * 2.0 ** rng.integers(-6, 6, count)
        return narrow(values.astype(np.float64 if dtype == DType.FLOAT64 else np.float32), dtype)
    if dtype == DType.BOOL:
        return rng.choice(np.array([0, 0, 1, 2, 128, 255], np.uint8), count)
    info = np.iinfo(NUMPY[dtype])
    return rng.integers(info.min, info.max, count, NUMPY[dtype], endpoint=True)


def reduced(srcs, dtype, op, divisor=1, num_dsts=1):
    """Reduce into fresh arrays, one element off alignment, and check that nothing around them is touched."""
    count = len(srcs[0])
    guarded = [np.full(count + 2, 77, srcs[0].dtype) for _ in range(num_dsts)]
    reduce.reduce_arrays([array[1:-1] for array in guarded], srcs, op, dtype, divisor)
    for array in guarded:
        assert array[0] == array[-1] == 77
    return [array[1:-1] for array in guarded]


@pytest.mark.parametrize("dtype,op", OFFERED, ids=lambda value: value.name)
def test_every_count_equals_numpy(isa, dtype, op):
    rng = np.random.default_rng(7)
    for count, num_srcs in itertools.product(LENGTHS, range(1, 10)):
        srcs = [sample(rng, dtype, count + 1)[1:] for _ in range(num_srcs)]
        kept = [src.copy() for src in srcs]
        divisor = num_srcs if op == ReduceOp.MEAN else 1
        expected = oracle(srcs, dtype, op, divisor)
        for num_dsts in (1, 2, 3):
            for dst in reduced(srcs, dtype, op, divisor, num_dsts):
                assert dst.tobytes() == expected.tobytes(), (count, num_srcs, num_dsts)
        assert all(np.array_equal(src, copy) for src, copy in zip(srcs, kept, strict=True))


@pytest.mark.parametrize("dtype,op", OFFERED, ids=lambda value: value.name)
@pytest.mark.parametrize("num_srcs,num_dsts", [(2, 1), (2, 2), (5, 2)])
def test_a_million_elements_equal_numpy(isa, dtype, op, num_srcs, num_dsts):
    rng = np.random.default_rng(8)
    block = [sample(rng, dtype, 4099) for _ in range(num_srcs)]      # odd period: blocks and lanes never line up with it
    srcs = [np.resize(src, (1 << 20) + 3) for src in block]
    divisor = 3 if op == ReduceOp.MEAN else 1
    expected = np.resize(oracle(block, dtype, op, divisor), (1 << 20) + 3).tobytes()
    for dst in reduced(srcs, dtype, op, divisor, num_dsts):
        assert dst.tobytes() == expected


@pytest.mark.parametrize("dtype,op", OFFERED, ids=lambda value: value.name)
def test_a_dst_may_be_a_src(isa, dtype, op):
    rng = np.random.default_rng(9)
    divisor = 4 if op == ReduceOp.MEAN else 1
    for count, num_srcs, num_dsts in itertools.product((1, 33, 2500), range(1, 10), (1, 2, 3)):
        srcs = [sample(rng, dtype, count) for _ in range(num_srcs)]
        expected = oracle(srcs, dtype, op, divisor)
        for first in range(num_srcs):
            own = [src.copy() for src in srcs]
            dsts = [own[(first + j) % num_srcs] if j < num_srcs else np.empty_like(own[0]) for j in range(num_dsts)]
            reduce.reduce_arrays(dsts, own, op, dtype, divisor)
            for dst in dsts:
                assert dst.tobytes() == expected.tobytes(), (count, num_srcs, num_dsts, first)


def specials(dtype):
    """NaN of several payloads and both signs, Inf, zeros, denormals, the largest: every pair of them."""
    item = {DType.FLOAT32: (8, 23), DType.FLOAT64: (11, 52), DType.FLOAT16: (5, 10), DType.BFLOAT16: (8, 7)}[dtype]
    exponent = ((1 << item[0]) - 1) << item[1]
    one = (((1 << item[0] - 1) - 1) << item[1])
    magnitudes = [0, 1, 2, (1 << item[1]) - 1, 1 << item[1], one, one + 1, exponent - 1, exponent, exponent + 1,
                  exponent + (1 << item[1] - 1), exponent + (1 << item[1] - 1) + 5, exponent + (1 << item[1]) - 1]
    sign = 1 << item[0] + item[1]
    bits = np.array(magnitudes + [sign | magnitude for magnitude in magnitudes], f"u{np.dtype(NUMPY[dtype]).itemsize}")
    pairs = np.array(list(itertools.product(bits, bits)), bits.dtype)
    return [np.ascontiguousarray(pairs[:, side]).view(NUMPY[dtype]) for side in (0, 1)]


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda value: value.name)
@pytest.mark.parametrize("op", ReduceOp, ids=lambda value: value.name)
@pytest.mark.parametrize("num_srcs", [2, 3, 4, 7])
def test_nan_inf_zeros_and_denormals_as_numpy(isa, dtype, op, num_srcs):
    first, second = specials(dtype)
    srcs = [first, second, first[::-1].copy(), np.roll(second, 5), np.roll(first, 11), second, first][:num_srcs]
    divisor = num_srcs if op == ReduceOp.MEAN else 1
    expected = oracle(srcs, dtype, op, divisor)
    [got] = reduced(srcs, dtype, op, divisor)
    if op in (ReduceOp.MIN, ReduceOp.MAX):                           # of 0.0 and -0.0, which are equal, either may win
        zero = widen(expected, dtype) == 0
        np.testing.assert_array_equal(widen(got, dtype)[zero], 0)
        got, expected = got[~zero], expected[~zero]
    assert got.tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype,op", OFFERED, ids=lambda value: value.name)
def test_every_instruction_set_gives_the_same_bytes(dtype, op):
    rng = np.random.default_rng(10)
    raw = [rng.integers(0, 256, 4096 * 8 + 24, np.uint8) for _ in range(6)]      # any bits at all
    seen = {}
    try:
        for name in available():
            reduce._force_isa(name)
            for num_srcs, num_dsts, divisor in itertools.product((1, 2, 3, 4, 6), (1, 2), (1, 3)):
                if divisor == 1 or dtype in FLOATS:
                    dsts = [np.empty_like(raw[0]) for _ in range(num_dsts)]
                    reduce.reduce_arrays(dsts, raw[:num_srcs], op, dtype, divisor)
                    for dst in dsts:
                        assert seen.setdefault((num_srcs, divisor), dst.tobytes()) == dst.tobytes()
    finally:
        reduce._force_isa()


@pytest.mark.parametrize("dtype,values,once,per_step", [
    (DType.FLOAT16, [2048.0, 1.0, 1.0], 2050.0, 2048.0),
    (DType.FLOAT16, [65504.0, 65504.0, -65504.0], 65504.0, np.inf),
    (DType.BFLOAT16, [256.0, 1.0, 1.0], 258.0, 256.0),
], ids=str)
def test_halves_are_rounded_once(isa, dtype, values, once, per_step):
    srcs = [narrow(np.full(37, value, np.float32), dtype) for value in values]
    with np.errstate(over="ignore"):
        steps = narrow(widen(narrow(widen(srcs[0], dtype) + widen(srcs[1], dtype), dtype), dtype) + widen(srcs[2], dtype),
                       dtype)
    assert set(widen(steps, dtype)) == {per_step}                    # the case does tell the two apart
    for extra in range(8):                                           # zeros change nothing but the loop that runs
        padded = srcs + [np.zeros_like(srcs[0])] * extra
        assert set(widen(reduced(padded, dtype, ReduceOp.SUM)[0], dtype)) == {once}


@pytest.mark.parametrize("dtype", [DType.FLOAT16, DType.BFLOAT16], ids=lambda value: value.name)
def test_mean_of_halves_divides_before_it_rounds(isa, dtype):
    big = narrow(np.full(19, 60000.0 if dtype == DType.FLOAT16 else 3e38, np.float32), dtype)
    expected = oracle([big] * 2, dtype, ReduceOp.MEAN, 2)
    if dtype == DType.FLOAT16:
        assert np.array_equal(expected, big)                         # the sum alone would be Inf in float16
    assert reduced([big, big], dtype, ReduceOp.MEAN, 2)[0].tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda value: value.name)
@pytest.mark.parametrize("op", ReduceOp, ids=lambda value: value.name)
def test_divisor_divides_whatever_the_op(isa, dtype, op):
    rng = np.random.default_rng(11)
    for num_srcs, num_dsts, divisor in itertools.product((1, 2, 4, 5, 9), (1, 2, 3), (-2, 3, 7, 49)):
        srcs = [sample(rng, dtype, 1500) for _ in range(num_srcs)]
        expected = oracle(srcs, dtype, op, divisor)
        for dst in reduced(srcs, dtype, op, divisor, num_dsts):
            assert dst.tobytes() == expected.tobytes(), (num_srcs, num_dsts, divisor)


def test_divisor_is_not_a_reciprocal(isa):
    values = np.arange(1, 1000, dtype=np.float32)
    assert np.any(values / np.float32(49) != values * (np.float32(1) / np.float32(49)))
    [mean] = reduced([values, np.zeros_like(values)], DType.FLOAT32, ReduceOp.MEAN, 49)
    assert mean.tobytes() == (values / np.float32(49)).tobytes()


@pytest.mark.parametrize("dtype,a,b,op,expected", [
    (DType.INT8, 127, 1, ReduceOp.SUM, -128), (DType.INT8, -128, -1, ReduceOp.PRODUCT, -128),
    (DType.UINT8, 255, 2, ReduceOp.SUM, 1), (DType.UINT8, 200, 200, ReduceOp.PRODUCT, 64),
    (DType.INT16, -1, -32768, ReduceOp.SUM, 32767), (DType.INT16, -1, -1, ReduceOp.PRODUCT, 1),
    (DType.INT32, 2**31 - 1, 1, ReduceOp.SUM, -(2**31)), (DType.INT32, 65536, 65536, ReduceOp.PRODUCT, 0),
    (DType.INT64, 2**63 - 1, 1, ReduceOp.SUM, -(2**63)), (DType.INT64, 2**32 + 1, 2**32 + 1, ReduceOp.PRODUCT, 2**33 + 1),
], ids=str)
def test_integers_wrap(isa, dtype, a, b, op, expected):
    srcs = [np.full(21, value, NUMPY[dtype]) for value in (a, b)]
    assert set(reduced(srcs, dtype, op)[0]) == {expected}


@pytest.mark.parametrize("op,either,both", [(ReduceOp.SUM, 1, 1), (ReduceOp.MAX, 1, 1), (ReduceOp.MIN, 0, 1),
                                            (ReduceOp.PRODUCT, 0, 1)])
def test_any_nonzero_byte_is_true(isa, op, either, both):
    odd = np.tile(np.array([1, 2, 4, 128, 254, 255], np.uint8), 9)
    assert set(reduced([odd], DType.BOOL, op)[0]) == {1}
    assert set(reduced([odd, np.roll(odd, 1)], DType.BOOL, op)[0]) == {both}      # 1 & 2 is 0, but both are true
    assert set(reduced([odd, np.zeros_like(odd)], DType.BOOL, op)[0]) == {either}
    assert set(reduced([odd * 0, odd * 0], DType.BOOL, op)[0]) == {0}


def test_one_source_is_copied_bit_by_bit(isa):
    signalling = np.full(9, 0x7F800001, np.uint32)
    [copy] = reduced([signalling], DType.FLOAT32, ReduceOp.SUM)
    assert np.array_equal(copy, signalling)


def test_wrong_arguments_are_named():
    four, three = np.zeros(4, np.float32), np.zeros(3, np.float32)
    with pytest.raises(DTypeError, match="MEAN over INT32"):
        reduce.reduce_arrays([four], [four], ReduceOp.MEAN, DType.INT32)
    with pytest.raises(DTypeError, match="INT32 with divisor 2"):
        reduce.reduce_arrays([four], [four], ReduceOp.SUM, DType.INT32, 2)
    for dtype, op in ((10, 0), (-1, 0), (0, 5), (0, -1)):
        with pytest.raises(DTypeError, match="unknown"):
            reduce.reduce_arrays([four], [four], op, dtype)
    with pytest.raises(ShapeError, match="buffer 2 has 12 bytes; expected 16"):
        reduce.reduce_arrays([four], [four, three], ReduceOp.SUM, DType.FLOAT32)
    with pytest.raises(ShapeError, match="elements of 8"):
        reduce.reduce_arrays([three], [three], ReduceOp.SUM, DType.FLOAT64)
    with pytest.raises(ShapeError, match="not aligned"):
        reduce.reduce_arrays([np.zeros(17, np.uint8)[1:]], [four], ReduceOp.SUM, DType.FLOAT32)
    with pytest.raises(ShapeError, match="overlap"):
        longer = np.zeros(5, np.float32)
        reduce.reduce_arrays([longer[:4]], [longer[1:], four], ReduceOp.SUM, DType.FLOAT32)
    with pytest.raises(ShapeError, match="overlap"):
        reduce.reduce_arrays([four, four], [four], ReduceOp.SUM, DType.FLOAT32)
    with pytest.raises(ShapeError, match="at least one"):
        reduce.reduce_arrays([], [four], ReduceOp.SUM, DType.FLOAT32)
    with pytest.raises(BufferError):
        reduce.reduce_arrays([bytes(16)], [four], ReduceOp.SUM, DType.FLOAT32)
    with pytest.raises((BufferError, ValueError)):
        reduce.reduce_arrays([np.zeros(8, np.float32)[::2]], [four], ReduceOp.SUM, DType.FLOAT32)


def test_only_this_machines_instruction_sets_can_be_forced():
    best = reduce.isa()
    assert best == available()[-1]
    with pytest.raises(ValueError):
        reduce._force_isa("altivec")
    assert reduce.isa() == best
