import struct
import subprocess
import sys

import numpy as np
import pytest
import torch

import pyfleet
from pyfleet.compressors import COMPRESSORS, parse_spec
from pyfleet.errors import ConfigError, CorruptData, DTypeError, ShapeError

KINDS = [kind for kind in COMPRESSORS if parse_spec(kind).route != "own"]
SHAPES = ((), (0,), (1,), (257,), (3, 0, 2), (3, 5, 7), (2, 1, 3, 1, 130))


def normal(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.feature("P29")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_decompress_is_the_inverse_of_compress(kind, shape):
    compressor, g = pyfleet.GradientCompressor(kind), normal(shape)
    before = g.copy()
    payload = compressor.compress(g)
    assert isinstance(payload, bytes)
    back = compressor.decompress(payload)
    assert (back.shape, back.dtype, type(back)) == (g.shape, g.dtype, np.ndarray)
    np.testing.assert_array_equal(g, before)
    plain, data = parse_spec(kind), np.empty(parse_spec(kind).wire_bytes(g.size), np.uint8)
    expected = np.empty(g.size, np.float32)
    plain.decode(data[:plain.encode(g.reshape(-1), data)], expected)
    np.testing.assert_array_equal(back.reshape(-1), expected)
    for other in (bytearray(payload), memoryview(b"x" + payload)[1:], np.frombuffer(payload, np.uint8)):
        np.testing.assert_array_equal(pyfleet.GradientCompressor(kind).decompress(other), back)


@pytest.mark.feature("P29")
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.float16, torch.bfloat16))
def test_tensors_come_back_as_tensors_of_their_dtype(dtype):
    compressor, g = pyfleet.GradientCompressor("int8"), torch.randn(5, 300).to(dtype)
    back = compressor.decompress(compressor.compress(g.requires_grad_()))
    assert (back.shape, back.dtype, back.requires_grad) == (g.shape, dtype, False)
    expected = pyfleet.quantize_gradients(g.detach().float(), num_bits=8)
    assert torch.equal(back, expected.to(dtype))
    turned = g.detach().t()
    assert torch.equal(compressor.decompress(compressor.compress(turned)),
                       compressor.decompress(compressor.compress(turned.contiguous())))
    assert torch.equal(compressor.decompress(compressor.compress(g[:, ::2])),
                       compressor.decompress(compressor.compress(g[:, ::2].contiguous())))


@pytest.mark.parametrize("dtype", (np.float16, np.float32, np.float64))
def test_arrays_come_back_in_their_dtype_whatever_their_layout(dtype):
    compressor, g = pyfleet.GradientCompressor("none"), normal((6, 8)).astype(dtype)
    for view in (g, g.T, g[::2, ::-1], np.asfortranarray(g), g.astype(g.dtype.newbyteorder())):
        back = compressor.decompress(compressor.compress(view))
        assert back.dtype == dtype
        np.testing.assert_array_equal(back, view)


@pytest.mark.feature("P24")
def test_fp16_takes_two_bytes_an_element_and_keeps_eleven_bits():
    compressor, g = pyfleet.GradientCompressor("fp16"), normal(100_000)
    payload = compressor.compress(g)
    assert len(payload) <= 2 * g.size + 64
    normals = np.abs(g) >= 2.0**-14
    back = compressor.decompress(payload)
    assert (np.abs(back - g)[normals] / np.abs(g[normals])).max() < 2.0**-10


@pytest.mark.feature("P25")
def test_bf16_takes_two_bytes_an_element_and_keeps_the_range():
    compressor, g = pyfleet.GradientCompressor("bf16"), np.array([1e38, -1e38, 1e-38, 3.0, 0.0], np.float32)
    payload = compressor.compress(g)
    assert len(payload) <= 2 * g.size + 64
    np.testing.assert_allclose(compressor.decompress(payload), g, rtol=2.0**-8)


@pytest.mark.feature("P26")
def test_int8_takes_a_byte_an_element_and_rounds():
    compressor, g = pyfleet.GradientCompressor("int8"), normal(100_000)
    payload = compressor.compress(g)
    assert len(payload) <= 1.02 * g.size + 64
    error = np.abs(compressor.decompress(payload) - g)[:99_840].reshape(-1, 256)
    step = np.abs(g[:99_840].reshape(-1, 256)).max(axis=1, keepdims=True) / 127
    assert (error <= step / 2 * (1 + 2.0**-14)).all()
    assert abs(np.mean(compressor.decompress(payload) - g)) < step.max() / 100      # truncation would be off by half a step


@pytest.mark.feature("C77")
@pytest.mark.parametrize("num_bits", range(2, 9))
def test_quantize_gradients_is_off_by_half_a_step_at_most(num_bits):
    g = normal((40, 256))
    step = np.abs(g).max(axis=1, keepdims=True) / (2 ** (num_bits - 1) - 1)
    back = pyfleet.quantize_gradients(g, num_bits=num_bits)
    assert (np.abs(back - g) <= step / 2 * (1 + 2.0**-14)).all()
    assert len(np.unique(back[0])) <= 2**num_bits - 1
    same = pyfleet.quantize_gradients(torch.from_numpy(g), num_bits)
    np.testing.assert_array_equal(same.numpy(), back)
    np.testing.assert_array_equal(pyfleet.quantize_gradients(g), pyfleet.quantize_gradients(g, num_bits=8))


@pytest.mark.feature("C77")
@pytest.mark.feature("C78")
@pytest.mark.parametrize("sparsity,kept", [(0.99, 20), (0.9, 200), (0.0, 2000), (0.9999, 1)])
def test_sparsify_gradients_keeps_the_largest_and_nothing_else(sparsity, kept):
    g = normal(2000).reshape(40, 50)
    back = pyfleet.sparsify_gradients(g, sparsity)
    largest = np.sort(np.argsort(-np.abs(g.ravel()), kind="stable")[:kept])
    np.testing.assert_array_equal(np.flatnonzero(back), largest)
    np.testing.assert_array_equal(back.ravel()[largest], g.ravel()[largest])
    tensor = pyfleet.sparsify_gradients(torch.from_numpy(g).requires_grad_(), sparsity)
    assert tensor.shape == (40, 50) and tensor.numpy().tobytes() == back.tobytes()
    np.testing.assert_array_equal(pyfleet.sparsify_gradients(g), pyfleet.sparsify_gradients(g, sparsity=0.99))


def test_quantize_gradients_refuses_other_widths():
    for num_bits in (0, 9, 2.5, "8"):
        with pytest.raises(ConfigError, match="num_bits must be an integer >= 1 and <= 8"):
            pyfleet.quantize_gradients(normal(4), num_bits)
    one = pyfleet.quantize_gradients(normal(256), num_bits=1)
    np.testing.assert_allclose(np.abs(one), np.abs(normal(256)).mean(), rtol=1e-6)


@pytest.mark.feature("P28", "C79", "P29")
@pytest.mark.parametrize("kind", [kind for kind in KINDS if parse_spec(kind).lossy])
def test_with_feedback_nothing_is_lost(kind):
    compressor, total, given = pyfleet.GradientCompressor(kind, error_feedback=True), 0.0, 0.0
    assert compressor.residual().size == 0
    for step in range(200):
        g = normal((30, 11), step)
        total = total + compressor.decompress(compressor.compress(g)).astype(np.float64)
        given = given + g.astype(np.float64)
    np.testing.assert_allclose(total.reshape(-1) + compressor.residual(), given.reshape(-1), rtol=0, atol=2e-5)


def test_each_name_has_a_residual_of_its_own():
    compressor = pyfleet.GradientCompressor("int4", error_feedback=True)
    alone = pyfleet.GradientCompressor("int4", error_feedback=True)
    for step in range(3):
        compressor.compress(normal(10, step), name="bias")
        assert compressor.compress(normal((3, 4), step), name="weight") == alone.compress(normal((3, 4), step))
    np.testing.assert_array_equal(compressor.residual("weight"), alone.residual())
    with pytest.raises(ShapeError, match="'bias' had 10 elements and now has 11"):
        compressor.compress(normal(11), name="bias")


@pytest.mark.parametrize("compression", ("sign", "quantize(num_bits=3, stochastic=True)"))
@pytest.mark.parametrize("feedback", (False, True))
def test_a_state_goes_on_elsewhere(compression, feedback):
    here = pyfleet.GradientCompressor(compression, error_feedback=feedback)
    payloads = [here.compress(normal(300)) for _ in range(3)]
    assert (len(set(payloads)) == 1) == (compression == "sign" and not feedback)
    there = pyfleet.GradientCompressor(compression, error_feedback=feedback)
    there.load_state_dict(here.state_dict())
    assert there.compress(normal(300, 5)) == here.compress(normal(300, 5))
    with pytest.raises(ConfigError, match="this is a state of"):
        pyfleet.GradientCompressor("int8", error_feedback=feedback).load_state_dict(here.state_dict())


def test_feedback_of_what_is_lossless_is_no_feedback():
    compressor = pyfleet.GradientCompressor("none", error_feedback=True)
    with pytest.raises(ConfigError, match="keeps no residual"):
        compressor.residual()


def test_what_is_wrong_is_named():
    new = pyfleet.GradientCompressor
    with pytest.raises(ConfigError, match="did you mean"):
        new("fp61")
    with pytest.raises(ConfigError, match="int8 takes no parameter 'ratio'"):
        new("int8", ratio=0.5)
    with pytest.raises(ConfigError, match="'numbits'; did you mean num_bits?"):
        new("quantize", numbits=3)
    with pytest.raises(ConfigError, match="takes no parameter 'num_bits'"):
        new(parse_spec("int8"), num_bits=3)
    with pytest.raises(ConfigError, match="error_feedback must be"):
        new("int8", error_feedback=1)
    for bad in ([1.0], 3.0, np.arange(3), torch.ones(3, dtype=torch.int64), np.ones(2, np.complex64)):
        with pytest.raises(DTypeError, match="cannot compress"):
            new("int8").compress(bad)
    with pytest.raises(ShapeError, match="pass g.to_dense"):
        new("int8").compress(torch.eye(3).to_sparse())


def test_foreign_and_damaged_payloads_are_refused():
    compressor = pyfleet.GradientCompressor("int8")
    payload = compressor.compress(normal((20, 30)))
    with pytest.raises(ConfigError, match="compressed with 'int8', this is 'int4'"):
        pyfleet.GradientCompressor("int4").decompress(payload)
    for length in range(len(payload)):
        with pytest.raises(CorruptData):
            compressor.decompress(payload[:length])
    with pytest.raises(CorruptData):
        compressor.decompress(payload + b"\0")
    huge = bytearray(payload)
    for size in (2**63, 2**40, 601):
        struct.pack_into("<Q", huge, 9, size)
        with pytest.raises(CorruptData):
            compressor.decompress(bytes(huge))
    rng = np.random.default_rng(0)
    for _ in range(2000):                                   # any one byte of the head
        damaged = bytearray(payload)
        damaged[rng.integers(0, 32)] = rng.integers(0, 256)
        try:
            num_elems = compressor.decompress(bytes(damaged)).size          # another shape that takes as many bytes
            assert parse_spec("int8").wire_bytes(num_elems) == parse_spec("int8").wire_bytes(600)
        except (CorruptData, ConfigError):
            continue


def test_numpy_alone_never_loads_torch():
    code = ("import sys, numpy, pyfleet; c = pyfleet.GradientCompressor('int8', error_feedback=True); "
            "c.decompress(c.compress(numpy.ones(3))); assert 'torch' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
