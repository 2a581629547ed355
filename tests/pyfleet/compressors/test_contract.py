"""What base.Compressor promises, for every kind."""
import numpy as np
import pytest

from pyfleet.arrays import item_bytes
from pyfleet.compressors import COMPRESSORS, ROUTES, parse_spec
from pyfleet.errors import ConfigError, DType, ShapeError

# Every row as it is, and parameters that change what encoding does.
SPECS = [*COMPRESSORS, *(f"int{bits}" for bits in range(1, 8)), "quantize(num_bits=3, stochastic=True, seed=5)",
         "int8(stochastic=True)", "topk+fp16", "topk(k=3)+int8", "random+bf16", "topk(warmup=9)+bf16"]
CODES = [spec for spec in SPECS if parse_spec(spec).route != "own"]
LENGTHS = (0, 1, 7, 255, 256, 257, 512, 5003)


def gradients(n, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(n) * 10.0 ** rng.integers(-4, 1, n)).astype(np.float32)


def encoded(compressor, x, feedback=None, **where):
    """The encoding of x; with `feedback`, of x and that residual."""
    room = np.full(compressor.wire_bytes(x.size) + 64, 0xA5, np.uint8)
    before = x.copy()
    if feedback is None:
        written = compressor.encode(x, room[:-64], **where)
    else:
        written = compressor.encode_feedback(x, feedback, room[:-64], **where)
    assert type(written) is int
    assert (room[-64:] == 0xA5).all()
    np.testing.assert_array_equal(x.view(np.uint32), before.view(np.uint32))
    if compressor.route in ("reduce", "shard"):
        assert written == compressor.wire_bytes(x.size)
    assert written <= compressor.wire_bytes(x.size)
    return room[:written].copy()


def decoded(compressor, data, n):
    room = np.full(n + 2, 77, np.float32)
    compressor.decode(data, room[1:-1])
    assert room[0] == room[-1] == 77
    return room[1:-1]


@pytest.fixture(params=SPECS)
def spec(request):
    return request.param


@pytest.fixture(params=CODES)
def code(request):
    return parse_spec(request.param)


def test_a_kind_is_its_row_and_its_name_gives_it_back(spec):
    compressor = parse_spec(spec)
    assert compressor.kind in COMPRESSORS
    assert compressor.route in ROUTES
    again = parse_spec(compressor.name)
    assert (type(again), again.params.keys(), again.name) == (type(compressor), compressor.params.keys(), compressor.name)
    fresh = compressor.fresh()
    assert (type(fresh), fresh.name) == (type(compressor), compressor.name)
    assert fresh is not compressor
    assert compressor.name in repr(compressor)


def test_a_state_is_what_a_new_instance_goes_on_from(spec):
    compressor = parse_spec(spec)
    state = compressor.state_dict()
    assert bool(state) <= compressor.stateful
    compressor.fresh().load_state_dict(state)
    with pytest.raises(ConfigError):
        compressor.load_state_dict({"no such thing": 1})


def test_only_the_route_own_has_an_exchange(code):
    with pytest.raises(ConfigError, match="exchange"):
        code.exchange(np.zeros(3, np.float32), lambda x: None, 1)


@pytest.mark.parametrize("n", LENGTHS)
def test_encoding_depends_on_its_arguments_alone(code, n):
    x = gradients(n)
    where = {"step": 3, "offset": 2 * code.block, "stream": 1}
    data = encoded(code.fresh(), x, **where)
    np.testing.assert_array_equal(encoded(code.fresh(), x, **where), data)
    unaligned = np.empty(4 * n + 4, np.uint8)[4:].view(np.float32)      # 4 bytes off whatever numpy aligns to
    unaligned[:] = x
    np.testing.assert_array_equal(encoded(code.fresh(), unaligned, **where), data)
    np.testing.assert_array_equal(decoded(code, data, n), decoded(code.fresh(), data, n))


@pytest.mark.parametrize("n", LENGTHS)
def test_what_is_lossless_comes_back(code, n):
    x = gradients(n)
    got = decoded(code, encoded(code, x), n)
    if not code.lossy:
        np.testing.assert_array_equal(got, x)
    elif n:
        assert np.linalg.norm(got - x) <= np.linalg.norm(x)            # no worse than sending nothing, which chance may
    zeros = np.zeros(n, np.float32)
    np.testing.assert_array_equal(decoded(code, encoded(code, zeros), n), zeros)


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("weight", (1.0, 0.3, -2.0))
def test_decode_add_is_decode_times_weight_and_add(code, n, weight):
    data, before = encoded(code, gradients(n)), gradients(n, 1)
    room = np.concatenate([[77], before, [77]]).astype(np.float32)
    code.decode_add(data, room[1:-1], weight)
    np.testing.assert_array_equal(room[1:-1], before + decoded(code, data, n) * np.float32(weight))
    assert room[0] == room[-1] == 77


@pytest.mark.parametrize("bad", (np.nan, np.inf, -np.inf))
@pytest.mark.parametrize("n", (1, 257, 5003))
def test_what_is_not_finite_never_becomes_finite(code, bad, n):
    for place in {0, n // 2, n - 1}:
        x = gradients(n)
        x[place] = bad
        with np.errstate(invalid="ignore"):
            assert not np.isfinite(decoded(code, encoded(code, x), n)[place])


@pytest.mark.parametrize("n", (1, 256, 5003))
def test_the_wrong_sizes_are_refused(code, n):
    x = gradients(n)
    data = encoded(code, x)
    with pytest.raises(ShapeError):
        code.encode(x, np.empty(len(data) - 1, np.uint8))
    with pytest.raises(ShapeError):
        code.decode(data[:-1].copy(), np.empty(n, np.float32))
    with pytest.raises(ShapeError):
        code.decode(np.concatenate([data, data[:1]]), np.empty(n, np.float32))


def test_pieces_cut_at_blocks_encode_as_the_whole(code):
    if code.route != "shard":
        pytest.skip(f"the route {code.route} does not cut")
    x, where = gradients(5003), {"step": 9, "stream": 2}
    whole = encoded(code, x, offset=code.block, **where)
    cut = 5 * code.block
    pieces = [encoded(code, x[:cut], offset=code.block, **where), encoded(code, x[cut:], offset=code.block + cut, **where)]
    np.testing.assert_array_equal(np.concatenate(pieces), whole)


def test_encodings_of_the_route_reduce_are_arrays_that_can_be_summed(code):
    if code.route != "reduce":
        assert code.wire_dtype is None
        pytest.skip(f"the route {code.route} does not sum encodings")
    x = np.round(gradients(1000) * 8)
    data = encoded(code, x)
    assert data.nbytes == 1000 * item_bytes(DType(code.wire_dtype).name.lower())
    if code.wire_dtype == DType.BFLOAT16:
        summed = (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32) * 2
        data = (summed.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    else:
        array = data.view({DType.FLOAT32: np.float32, DType.FLOAT16: np.float16}[code.wire_dtype])
        data = (array + array).view(np.uint8)
    np.testing.assert_array_equal(decoded(code, data, 1000), 2 * decoded(code, encoded(code, x), 1000))


@pytest.mark.parametrize("n", LENGTHS)
def test_feedback_encodes_the_sum_and_keeps_the_rest(code, n):
    grad, before = gradients(n, 2), gradients(n, 3)
    residual, where = before.copy(), {"step": 4, "stream": 1, "offset": code.block}
    data = encoded(code.fresh(), grad, feedback=residual, **where)
    np.testing.assert_array_equal(data, encoded(code.fresh(), grad + before, **where))
    exact = grad.astype(np.float64) + before - decoded(code, data, n)
    assert (np.abs(residual - exact) <= np.spacing(np.abs(residual)) * 0.5001).all()


def test_feedback_leaves_residuals_where_nothing_finite_was_sent(code):
    grad, before = gradients(600, 4), gradients(600, 5)
    grad[300] = np.nan
    residual = before.copy()
    with np.errstate(invalid="ignore"):
        data = encoded(code, grad, feedback=residual)
    lost = ~np.isfinite(decoded(code, data, 600))
    assert lost[300]
    np.testing.assert_array_equal(residual[lost], before[lost])
    assert np.isfinite(residual).all()
