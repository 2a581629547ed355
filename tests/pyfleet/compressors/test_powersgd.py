"""PowerSGD: bytes, exactness, the same bits everywhere, and convergence."""
from threading import Barrier, Thread

import numpy as np
import pytest
import torch

import pyfleet
from pyfleet.compressors import parse_spec
from pyfleet.compressors.powersgd import PowerSGD, _dot, orthonormal
from pyfleet.errors import ConfigError, ShapeError

SHAPES = [(64, 48), (64,), (8, 6, 3, 3), (10,), (), (0, 5), (40, 30)]
NUM = sum(int(np.prod(shape)) for shape in SHAPES)


def array(n, seed=1):
    return np.random.default_rng(seed).standard_normal(n).astype(np.float32)


def bound(shapes=SHAPES, **params):
    compressor = PowerSGD(**params)
    compressor.bind(shapes)
    return compressor


def meet(compressors, arrays, step=0):
    """exchange() of all at once, as ranks would, in threads that meet in every all-reduce. Returns messages' bytes."""
    parts, sizes, errors = [None] * len(arrays), [], []
    barrier = Barrier(len(arrays), timeout=60)

    def run(rank):
        def all_reduce(part):
            parts[rank] = part.copy()
            barrier.wait()
            total = np.sum(parts, axis=0, dtype=np.float32)
            barrier.wait()
            part[...] = total
            if rank == 0:
                sizes.append(part.nbytes)
        try:
            compressors[rank].exchange(arrays[rank], all_reduce, len(arrays), step=step)
        except Exception as error:  # noqa: BLE001 told to the test below
            errors.append(error)
            barrier.abort()
    threads = [Thread(target=run, args=(rank,)) for rank in range(len(arrays))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    return sizes


@pytest.mark.feature("P27")
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_bytes_are_rank_times_rows_plus_columns(rank):
    compressor = bound(rank=rank)
    low = rank * (64 + 48) + rank * (40 + 30) + min(rank * (8 + 54), 8 * 54)
    assert compressor.wire_bytes(NUM) == 4 * (low + 64 + 10 + 1)
    sizes = meet([compressor], [array(NUM)])
    assert len(sizes) == 2 and sum(sizes) == compressor.wire_bytes(NUM)
    out = np.zeros(compressor.wire_bytes(NUM), np.uint8)
    assert compressor.encode(array(NUM), out) == out.size


@pytest.mark.feature("P27")
@pytest.mark.parametrize("true_rank,rank", [(1, 1), (2, 2), (3, 4), (4, 4), (1, 4)])
@pytest.mark.parametrize("num_ranks", [1, 3])
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_a_matrix_of_that_rank_arrives_but_for_rounding(true_rank, rank, num_ranks, scale):
    rng = np.random.default_rng(4)
    left = rng.standard_normal((60, true_rank))
    arrays = [(scale * left @ rng.standard_normal((true_rank, 50))).astype(np.float32).ravel()
              for _ in range(num_ranks)]
    mean = np.mean(arrays, axis=0, dtype=np.float64)
    for _ in range(2):                                  # a warm start changes nothing
        compressors = [bound([(60, 50)], rank=rank) for _ in range(num_ranks)]
        results = [x.copy() for x in arrays]
        meet(compressors, results)
        for result in results:
            assert np.abs(result - mean).max() < 2e-6 * np.abs(mean).max()


@pytest.mark.feature("P27")
def test_full_rank_is_exact():
    x = array(NUM)
    for rank in (40, 1024):
        result = x.copy()
        compressor = bound(rank=rank)
        meet([compressor], [result])
        assert result.tobytes() == x.tobytes() and compressor.wire_bytes(NUM) == 4 * NUM


def test_tensors_of_one_dimension_travel_as_they_are():
    arrays = [array(NUM, seed) for seed in range(2)]
    results = [x.copy() for x in arrays]
    meet([bound(rank=1) for _ in range(2)], results)
    mean = (arrays[0] + arrays[1]) / np.float32(2)
    for start, size in ((64 * 48, 64), (64 * 48 + 64 + 432, 11)):
        np.testing.assert_array_equal(results[0][start:start + size], mean[start:start + size])
    unbound = PowerSGD()
    result = arrays[0].copy()
    meet([unbound], [result])
    assert result.tobytes() == arrays[0].tobytes() and unbound.wire_bytes(NUM) == 4 * NUM


def test_every_rank_gets_the_same_bits_and_the_best_rank_r_in_the_end():
    rng = np.random.default_rng(2)
    u, _ = np.linalg.qr(rng.standard_normal((64, 64)))
    v, _ = np.linalg.qr(rng.standard_normal((48, 48)))
    matrix = (u[:, :48] * 0.5**np.arange(48)) @ v.T
    compressors = [bound([(64, 48)], rank=3) for _ in range(3)]
    noise = [0.01 * rng.standard_normal((64, 48)) for _ in range(2)]
    parts = [matrix + noise[0], matrix + noise[1], matrix - noise[0] - noise[1]]
    for step in range(12):
        results = [part.astype(np.float32).ravel() for part in parts]
        meet(compressors, results, step)
        assert len({result.tobytes() for result in results}) == 1
    best = (u[:, :3] * 0.5**np.arange(3)) @ v[:, :3].T
    assert np.linalg.norm(results[0].reshape(64, 48) - best) < 0.01 * np.linalg.norm(matrix - best)


def averaged(steps):
    """In a rank: bytes handed to all_reduce, and the result of some steps on this rank's own arrays."""
    compressor, sent = bound(rank=2), []

    def all_reduce(part):
        sent.append(part.nbytes)
        pyfleet.all_reduce(part)
    for step in range(steps):
        x = array(NUM, 100 * step + pyfleet.rank())
        compressor.exchange(x, all_reduce, pyfleet.world_size(), step=step)
    return sum(sent), compressor.wire_bytes(NUM), x


@pytest.mark.feature("P27")
def test_real_ranks_agree_and_send_what_is_said(ranks):
    results = ranks(3).run(averaged, 3)
    for sent, said, x in results:
        assert sent == 3 * said and x.tobytes() == results[0][2].tobytes()
    dense = np.mean([array(NUM, 200 + rank) for rank in range(3)], axis=0)
    np.testing.assert_allclose(results[0][2][64 * 48:64 * 48 + 64], dense[64 * 48:64 * 48 + 64], rtol=1e-5, atol=1e-7)


@pytest.mark.feature("P27")
def test_with_feedback_a_toy_model_learns_as_without_compression():
    """Least squares in 24 x 16 unknowns, two ranks with half the data each, rank 1: 40 of 384 numbers a step."""
    rng = np.random.default_rng(3)
    truth = rng.standard_normal((24, 16))
    inputs = [rng.standard_normal((100, 24)) for _ in range(2)]
    targets = [x @ truth for x in inputs]

    def train(compressed):
        weights, compressors = np.zeros((24, 16)), [bound([(24, 16)], rank=1) for _ in range(2)]
        residuals = [np.zeros(384, np.float32) for _ in range(2)]
        for step in range(400):
            grads = [(x.T @ (x @ weights - y) / 100).astype(np.float32).ravel()
                     for x, y in zip(inputs, targets, strict=True)]
            if compressed:
                given = [grad + residual for grad, residual in zip(grads, residuals, strict=True)]
                results = [x.copy() for x in given]
                meet(compressors, results, step)
                residuals = [x - result for x, result in zip(given, results, strict=True)]
                mean = results[0]
            else:
                mean = (grads[0] + grads[1]) / 2
            weights -= 0.1 * mean.reshape(24, 16)
        return np.linalg.norm(weights - truth) / np.linalg.norm(truth)
    assert train(False) < 1e-4
    assert train(True) < 1e-3


def test_what_is_not_finite_arrives_and_the_next_step_is_good_again():
    compressor = bound([(60, 50)], rank=2)
    for bad in (np.nan, np.inf, -np.inf):
        x = array(3000)
        x[777] = bad
        meet([compressor], [x])
        assert not np.isfinite(x[777])
        rng = np.random.default_rng(0)
        good = np.outer(rng.standard_normal(60), rng.standard_normal(50)).astype(np.float32).ravel()
        result = good.copy()
        meet([compressor], [result])
        assert np.abs(result - good).max() < 1e-5


def test_a_zero_gradient_arrives_as_zero_and_the_next_one_is_good():
    compressor = bound([(60, 50)], rank=2)
    x = np.zeros(3000, np.float32)
    meet([compressor], [x])
    assert not x.any()
    good = np.outer(array(60), array(50, 2)).ravel()
    result = good.copy()
    meet([compressor], [result])
    assert np.abs(result - good).max() < 1e-5


def test_encode_and_decode_are_the_exchange_of_one_rank():
    one, other, x = bound(rank=2, seed=9), bound(rank=2, seed=9), array(NUM)
    for step in range(3):
        out, through = np.zeros(one.wire_bytes(NUM), np.uint8), x.copy()
        one.encode(x, out, step=step)
        back = np.full(NUM, 7, np.float32)
        one.decode(out, back)
        meet([other], [through], step)
        np.testing.assert_allclose(back, through, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("warm", [True, False])
def test_a_restored_state_goes_on_with_the_same_bits(warm):
    one, other = bound(warm_start=warm), bound(warm_start=warm)
    for step in range(3):
        meet([one], [array(NUM, step)], step)
    state = one.state_dict()
    other.load_state_dict(state)
    results = [array(NUM, 50), array(NUM, 50)]
    meet([one], results[:1], 3)
    meet([other], results[1:], 3)
    assert results[0].tobytes() == results[1].tobytes()
    assert (one.state_dict() == {}) == (not warm)
    if warm:
        np.testing.assert_array_equal(other.fresh().state_dict().get("q", 0), 0)
        with pytest.raises(ConfigError, match="bind the same shapes first"):
            PowerSGD().load_state_dict(state)
    with pytest.raises(ConfigError):
        one.load_state_dict({"p": 1})


def test_columns_are_orthonormal_and_dependent_ones_are_replaced():
    a = np.random.default_rng(1).standard_normal((500, 6))
    a[:, 3] = a[:, 0] - 2 * a[:, 1]
    a[:, 5] = 0
    plain = orthonormal(a)
    np.testing.assert_allclose(plain.T @ plain, np.diag([1, 1, 1, 0, 1, 0]), atol=1e-12)
    full = orthonormal(a, instead=np.random.default_rng(2).standard_normal((500, 6)))
    np.testing.assert_allclose(full.T @ full, np.eye(6), atol=1e-12)
    np.testing.assert_allclose(plain @ (plain.T @ a), a, atol=1e-12)


@pytest.mark.parametrize("length", [1, 2, 3, 5, 64, 999])
def test_sums_do_not_depend_on_how_the_machine_adds(length):
    """The order is a tree that the length alone fixes: the same as this one, number by number."""
    a, b = (np.random.default_rng(seed).standard_normal(length) for seed in (1, 2))
    terms = [float(x) * float(y) for x, y in zip(a, b, strict=True)]
    while len(terms) > 1:
        half, last = len(terms) // 2, terms[-1] if len(terms) % 2 else None
        terms = [terms[i] + terms[half + i] for i in range(half)]
        if last is not None:
            terms[0] += last
    assert _dot(a, b) == terms[0]


def test_it_captures_a_gradient_of_torch_as_well_as_its_singular_values_allow():
    model = torch.nn.Linear(40, 30)
    torch.manual_seed(0)
    torch.nn.functional.mse_loss(model(torch.randn(8, 40)), torch.randn(8, 30)).backward()
    grad = model.weight.grad.numpy()
    compressor, best = bound([(30, 40)], rank=8), np.linalg.norm(np.linalg.svd(grad)[1][8:])
    result = grad.ravel().copy()
    meet([compressor], [result])
    assert best < 1e-5 and np.abs(result - grad.ravel()).max() < 1e-5 * np.abs(grad).max()     # 8 samples: rank 8


@pytest.mark.parametrize("params", [{"rank": 0}, {"rank": 1025}, {"rank": 1.5}, {"seed": -1}, {"warm_start": 1}],
                         ids=str)
def test_parameters_out_of_range_are_named(params):
    with pytest.raises(ConfigError, match=f"powersgd: {next(iter(params))} must be"):
        PowerSGD(**params)


def test_other_sizes_than_those_bound_are_refused():
    compressor = bound()
    for call in (lambda: compressor.wire_bytes(NUM + 1), lambda: compressor.encode(array(5), np.zeros(99, np.uint8)),
                 lambda: compressor.decode(np.zeros(7, np.uint8), array(NUM)),
                 lambda: compressor.exchange(array(5), lambda part: None, 1)):
        with pytest.raises(ShapeError):
            call()
    with pytest.raises(ConfigError, match="cannot code the values that topk selects"):
        parse_spec("topk+powersgd")
    assert parse_spec("powersgd(rank=2)").name == "powersgd(rank=2)"
