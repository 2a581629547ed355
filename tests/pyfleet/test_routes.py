"""Compressed all-reduces between processes: the same bits on all ranks, small errors, few bytes, nothing lost."""
import os
import threading
import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
import torch

import pyfleet
from pyfleet import engines, routes
from pyfleet.compressors import parse_spec
from pyfleet.compressors.feedback import ErrorFeedback
from pyfleet.routes import CompressedAllReduce, bounds, stats
from tests.pyfleet.compressors.test_contract import CODES, encoded, gradients

SPECS = [*CODES, "powersgd(rank=2)"]
GROUPS = [(2, "shm"), (3, "shm"), (5, "shm"), (2, "tcp"), (3, "tcp"), (5, "tcp")]
SIZES = (0, 1, 255, 256, 257, 4099)


def data(n, rank, step=0):
    return gradients(n, 1000 * step + rank)


def expected(spec, xs, op, step):
    """What the routes' definitions make of the ranks' arrays, computed in one process."""
    compressor, n, size = parse_spec(spec), xs[0].size, len(xs)
    result = np.zeros(n, np.float32)
    if compressor.route == "gather":
        for rank, x in enumerate(xs):
            compressor.decode_add(encoded(compressor, x, step=step, stream=rank), result, 1 / size if op == "mean" else 1.0)
        return result
    if compressor.kind == "none":
        for x in xs:
            result += x
        return result / np.float32(size) if op == "mean" else result
    cuts = bounds(n, size, compressor.block)
    for start, stop in pairwise(cuts):
        if stop == start:
            continue
        total = np.zeros(stop - start, np.float32)
        for rank, x in enumerate(xs):
            compressor.decode_add(encoded(compressor, x[start:stop], step=step, offset=start, stream=rank), total)
        total = total / np.float32(size) if op == "mean" else total
        compressor.decode(encoded(compressor, total, step=step, stream=size), result[start:stop])
    return result


def reduce_all(spec, op, sizes):
    """In a rank: the results for arrays of all sizes."""
    results = [data(n, pyfleet.rank()) for n in sizes]
    for x in results:
        pyfleet.all_reduce(x, op, compression=spec)
    return results


def reduce_in_steps(spec, op, sizes):
    """In a rank: one call for each size, as the step 7 of a bucket without feedback."""
    results = []
    for n in sizes:
        way = CompressedAllReduce(engines.current(), spec, n, op, error_feedback=False)
        way.step = 7
        x = data(n, pyfleet.rank())
        way.all_reduce(x)
        results.append(x)
    return results


@pytest.mark.feature("P23", "P24", "P25", "P26", "M20", "S14")
@pytest.mark.parametrize("spec", CODES)
@pytest.mark.parametrize(("size", "transport"), GROUPS)
def test_all_ranks_get_what_the_routes_define_to_the_bit(ranks, size, transport, spec):
    for op in ("sum", "mean"):
        reports = ranks(size, transport).run(reduce_in_steps, spec, op, SIZES)
        for n, *results in zip(SIZES, *reports, strict=True):
            assert all(np.array_equal(results[0].view(np.uint32), result.view(np.uint32)) for result in results)
            want = expected(spec, [data(n, rank) for rank in range(size)], op, 7)
            # A sum of float32 as it is may add up in another order.
            if spec == "none":
                np.testing.assert_allclose(results[0], want, rtol=1e-5, atol=1e-6)
            else:
                np.testing.assert_array_equal(results[0], want, err_msg=f"{op} of {n}")


def largest_error(spec, x):
    """How far an element may be off after one encoding, as the compressors document it."""
    block = parse_spec(spec).block
    pieces = [x[start:start + block] for start in range(0, x.size, block)]
    largest = np.concatenate([np.full(piece.size, np.abs(piece).max()) for piece in pieces])
    if spec == "fp16":
        return np.abs(x) * 2.0**-11 + 2.0**-25
    if spec == "bf16":
        return np.abs(x) * 2.0**-8
    if spec == "fp8":
        return np.maximum(np.abs(x) / 16, largest / 2**17)
    return largest / (2 ** (int(spec[3:]) - 1) - 1) / 2 * 1.02      # the scale is rounded, too


@pytest.mark.feature("P24", "P25", "P26")
@pytest.mark.parametrize("spec", ("fp16", "bf16", "fp8", "int8", "int4"))
@pytest.mark.parametrize(("size", "transport"), GROUPS)
def test_results_are_as_close_to_the_sum_as_two_roundings_leave_it(ranks, size, transport, spec):
    n = 4099
    xs = [data(n, rank).astype(np.float64) for rank in range(size)]
    exact, off = np.sum(xs, axis=0), np.sum([largest_error(spec, x) for x in xs], axis=0)
    off += largest_error(spec, np.abs(exact) + off) + 2.0**-22 * np.sum(np.abs(xs), axis=0)
    for result in ranks(size, transport).run(reduce_all, spec, "sum", [n]):
        assert (np.abs(result[0] - exact) <= off).all()
        assert (result[0] != exact).any()


@pytest.mark.feature("P22", "C78")
def test_top_k_brings_the_largest_elements_of_every_rank_exactly(ranks):
    n, size = 10_000, 3
    result = ranks(size, "tcp").run(reduce_all, "topk(ratio=0.01)", "sum", [n])[0][0]
    total = np.zeros(n, np.float32)
    for rank in range(size):
        x = data(n, rank)
        largest = np.argsort(-np.abs(x), kind="stable")[:100]
        total[largest] += x[largest]
    np.testing.assert_array_equal(result, total)


# ---- bytes at the socket ----------------------------------------------------------------------------------------------

def sent_by(call):
    def sent():
        return sum(link["sent_bytes"] for link in engines.current().stats()["links"].values())
    pyfleet.barrier()
    before = sent()
    call()
    return sent() - before


def wire_bytes(spec, n, far_apart):
    """In a rank: bytes at the socket of an all-reduce as it is, of a compressed one, and what the statistics claim."""
    engine = engines.current()
    if far_apart:
        engine.local_world_size = 1                     # as if each rank had a host of its own
    try:
        x = data(n, engine.rank)
        dense = sent_by(lambda: pyfleet.all_reduce(x.copy()))
        before = stats(engine).get(spec, {}).get("sent_bytes", 0)
        packed = sent_by(lambda: pyfleet.all_reduce(x, compression=spec))
        return dense, packed, pyfleet.fleet.current().stats()["compression"][spec]["sent_bytes"] - before, x
    finally:
        engine.local_world_size = engine.world_size


@pytest.mark.feature("P24", "P25", "P26", "S14")
@pytest.mark.parametrize("size", (2, 3, 5))
@pytest.mark.parametrize(("spec", "most"), [("fp16", 0.505), ("bf16", 0.505), ("fp8", 0.26), ("int8", 0.26), ("int4", 0.135),
                                            ("sign", 0.04)])
def test_sockets_see_the_promised_share_of_float32(ranks, size, spec, most):
    n, results = 1_000_000, []
    for far_apart in (False, True):
        for dense, packed, claimed, x in ranks(size, "tcp").run(wire_bytes, spec, n, far_apart):
            assert dense >= 2 * (size - 1) / size * 4 * n * 0.99
            assert packed <= most * dense
            assert claimed <= packed <= claimed * 1.01 + 10_000         # frames, and no more
            results.append(x)
    assert all(np.array_equal(results[0], x) for x in results)          # halves: whatever way they took


@pytest.mark.feature("P22", "M5", "M20")
@pytest.mark.parametrize("size", (2, 3, 5))
def test_sockets_see_one_percent_of_the_elements_and_their_indices(ranks, size):
    for dense, packed, claimed, _ in ranks(size, "tcp").run(wire_bytes, "topk(ratio=0.01)+fp16", 1_000_000, False):
        assert packed <= 0.004 * size * dense
        assert claimed <= packed


def table(n):
    """In a rank: bytes at the socket, relative to float32 as it is, by compression."""
    x = data(n, pyfleet.rank())
    dense = sent_by(lambda: pyfleet.all_reduce(x.copy()))
    return {spec: sent_by(lambda spec=spec: pyfleet.all_reduce(x.copy(), compression=spec)) / dense
            for spec in ("none", "topk(ratio=0.1)", "fp16", "topk(ratio=0.1)+fp16", "random(ratio=0.1)", "powersgd")}


@pytest.mark.feature("M5", "M36")
def test_the_table_of_ratios_holds_at_the_socket_with_indices(ranks):
    for shares in ranks(2, "tcp").run(table, 1_000_000):
        assert shares["none"] == pytest.approx(1, abs=0.01)
        assert shares["fp16"] == pytest.approx(0.5, abs=0.01)
        assert 0.10 < shares["topk(ratio=0.1)"] < 0.12          # values and about 5 bits an index
        assert 0.05 < shares["topk(ratio=0.1)+fp16"] < 0.07
        assert shares["random(ratio=0.1)"] == pytest.approx(0.1, abs=0.005)     # no indices


def low_rank_bytes(shape):
    engine = engines.current()
    way = CompressedAllReduce(engine, "powersgd(rank=4)", shape[0] * shape[1], error_feedback=False, shapes=[shape])
    x = data(shape[0] * shape[1], engine.rank)
    return sent_by(lambda: way.all_reduce(x)), x


@pytest.mark.feature("P27")
@pytest.mark.parametrize("size", (2, 3))
def test_power_sgd_sends_two_thin_matrices(ranks, size):
    reports = ranks(size, "tcp").run(low_rank_bytes, (600, 400))
    for sent, x in reports:
        assert sent <= 2 * (size - 1) / size * 4 * 4 * (600 + 400) * 1.05 + 4096
        np.testing.assert_array_equal(x, reports[0][1])
        assert np.linalg.matrix_rank(x.reshape(600, 400)) == 4


# ---- error feedback ---------------------------------------------------------------------------------------------------

def account(spec, n, steps, op, grid):
    """In a rank: the sums of what was given and of what came, what is kept here in units of a sum, and what rounds."""
    engine = engines.current()
    way = CompressedAllReduce(engine, spec, n, op, shapes=[(n // 20, 20)])
    factor = engine.world_size if op == "mean" else 1
    given, came, rounding = np.zeros(n), np.zeros(n), 0.0
    for step in range(steps):
        if grid:
            rng = np.random.default_rng(1000 * step + engine.rank)
            x = rng.integers(-2**12, 2**12, n).astype(np.float32) / 2**12
        else:
            x = data(n, engine.rank, step)
        given += x
        way.all_reduce(x)
        came += x.astype(np.float64) * factor
        rounding += float(np.abs(x).max()) * factor
    feedback = way.compressor
    if not isinstance(feedback, ErrorFeedback):
        return given, came, np.zeros(n), rounding
    kept = feedback.residual.astype(np.float64)
    if feedback.owner is not None:
        start, stop, scale = feedback.segment
        kept[start:stop] += feedback.owner.residual.astype(np.float64) * scale
    return given, came, kept, rounding


@pytest.mark.feature("P28", "C79")
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("op", ("sum", "mean"))
def test_a_thousand_steps_of_three_ranks_neither_lose_nor_invent(ranks, spec, op):
    given, came, kept, rounding = zip(*ranks(3, "shm").run(account, spec, 700, 1000, op, False), strict=True)
    assert all(np.array_equal(came[0], other) for other in came)
    off = np.abs(came[0] + np.sum(kept, axis=0) - np.sum(given, axis=0)).max()
    assert off <= 3 * 2.0**-23 * rounding[0]               # what sums of three float32 and their mean round
    if parse_spec(spec).lossy:
        assert off < np.abs(np.sum(kept, axis=0)).max()


@pytest.mark.feature("P28")
@pytest.mark.parametrize("transport", ("shm", "tcp"))
@pytest.mark.parametrize("spec", ("fp16", "bf16", "topk(ratio=0.05)", "topk(ratio=0.05)+fp16", "random+bf16"))
def test_on_a_grid_the_accounts_of_all_ranks_balance_to_the_last_bit(ranks, spec, transport):
    given, came, kept, _ = zip(*ranks(2, transport).run(account, spec, 700, 200, "sum", True), strict=True)
    np.testing.assert_array_equal(came[0] + np.sum(kept, axis=0), np.sum(given, axis=0))


def interrupted(spec, n, order):
    """In a rank: results of six steps, of the last three after a restart from the state, and the accounts of those in a
    group in another order."""
    engine = engines.current()
    grads = [data(n, engine.rank, step) for step in range(6)]
    way, results = CompressedAllReduce(engine, spec, n, "sum", shapes=[(n // 20, 20)]), []
    for step in range(6):
        if step == 3:
            state = way.state_dict()
        results.append(grads[step].copy())
        way.all_reduce(results[-1])
    again, group = CompressedAllReduce(engine, spec, n, "sum", shapes=[(n // 20, 20)]), pyfleet.new_group(order)
    elsewhere = CompressedAllReduce(group.engine, spec, n, "sum", shapes=[(n // 20, 20)])
    again.load_state_dict(state)
    elsewhere.load_state_dict(state)
    resumed, came = [], sum(result.astype(np.float64) for result in results[:3])
    for step in range(3, 6):
        resumed.append(grads[step].copy())
        again.all_reduce(resumed[-1])
        x = grads[step].copy()
        elsewhere.all_reduce(x)
        came = came + x
    kept = np.zeros(n)
    if isinstance(elsewhere.compressor, ErrorFeedback):
        kept += elsewhere.compressor.residual
        if elsewhere.compressor.owner is not None:
            start, stop, _ = elsewhere.compressor.segment
            kept[start:stop] += elsewhere.compressor.owner.residual
    group.close()
    return results[3:], resumed, came, kept, np.sum(grads, axis=0, dtype=np.float64)


@pytest.mark.feature("P28")
@pytest.mark.parametrize("spec", ("fp16", "int4", "topk+int8", "random", "powersgd(rank=2)", "int8(stochastic=True)"))
def test_a_state_goes_on_to_the_bit_and_in_another_group_loses_nothing(ranks, spec):
    reports = ranks(3, "shm").run(interrupted, spec, 2000, [2, 0, 1])
    for straight, resumed, *_ in reports:
        assert all(np.array_equal(a, b) for a, b in zip(straight, resumed, strict=True))
    came, kept, given = (list(column) for column in zip(*(report[2:] for report in reports), strict=True))
    np.testing.assert_array_equal(came[0], came[1])
    np.testing.assert_allclose(came[0] + np.sum(kept, axis=0), np.sum(given, axis=0), rtol=0, atol=1e-4)


def rolled_back(spec):
    engine = engines.current()
    way = CompressedAllReduce(engine, spec, 3000, undo=True, shapes=[(60, 50)])
    results = []
    for step, undone in ((0, False), (1, True), (1, True), (1, False)):
        x = data(3000, engine.rank, step)
        way.all_reduce(x)
        results.append(x)
        way.rollback() if undone else way.commit()
    return results, way.step


@pytest.mark.parametrize("spec", ("bf16", "int4", "topk+fp16", "powersgd", "int8(stochastic=True)"))
def test_a_step_that_is_rolled_back_never_happened(ranks, spec):
    for (first, second, again, last), step in ranks(2, "shm").run(rolled_back, spec):
        assert step == 2
        np.testing.assert_array_equal(second, again)
        np.testing.assert_array_equal(second, last)
        assert (first != second).any()


def one_site(n):
    """In a rank: the mean of what an array comes to over 200 calls that pass the same feedback, and over 200 that do not."""
    feedback, sums = ErrorFeedback(parse_spec("sign"), n), np.zeros((2, n))
    for _ in range(200):
        for total, compression in zip(sums, (feedback, "sign"), strict=True):
            x = data(n, pyfleet.rank())
            pyfleet.all_reduce(x, compression=compression)
            total += x
    return sums / 200


@pytest.mark.feature("P28", "P29")
def test_a_call_site_with_feedback_of_its_own_approaches_the_sum(ranks):
    exact = np.sum([data(1000, rank) for rank in range(2)], axis=0, dtype=np.float64)
    for fed, plain in ranks(2, "shm").run(one_site, 1000):
        assert np.linalg.norm(fed - exact) < np.linalg.norm(plain - exact) / 5


# ---- arrays, groups, handles ------------------------------------------------------------------------------------------

def other_arrays():
    """In a rank: arrays of other kinds, with what they should come to by way of float32."""
    rank, found = pyfleet.rank(), []
    plain = data(600, rank).reshape(20, 30)
    reference = plain.copy()
    pyfleet.all_reduce(reference, "mean", compression="int8")
    wide = torch.from_numpy(plain.astype(np.float64))
    columns = torch.from_numpy(plain.copy()).t().contiguous().t()
    strided = np.repeat(plain, 2, axis=1)[:, ::2]
    shared = pyfleet.from_numpy(plain)
    leaf = torch.from_numpy(plain.copy()).requires_grad_()
    for x in (wide, columns, strided, np.asfortranarray(plain), shared, leaf, plain.astype(np.float64)):
        pyfleet.all_reduce(x, pyfleet.ReduceOp.MEAN, compression="int8")
        found.append(np.array_equal(np.asarray(x.detach() if isinstance(x, torch.Tensor) else x, np.float32), reference))
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.from_numpy(plain).to(dtype)
        y = x.float()
        pyfleet.all_reduce(x, "mean", compression="int8")
        pyfleet.all_reduce(y, "mean", compression="int8")
        found.append(torch.equal(x, y.to(dtype)))
    point = torch.tensor(rank + 1.0)
    pyfleet.all_reduce(point, compression="fp16")
    return found, float(point), bool(np.array_equal(np.asarray(strided.base)[:, 1::2], plain))


def test_any_array_of_floats_will_do(ranks):
    for found, point, left_alone in ranks(2, "shm").run(other_arrays):
        assert found == [True] * 9
        assert point == 3.0
        assert left_alone


def groups_and_handles(specs):
    """In a rank: results in a group of two, then of handles for calls that were all started at once."""
    rank, group, inside = pyfleet.rank(), pyfleet.new_group([2, 0]), []
    if group.engine is not None:
        for spec in specs:
            x = data(1000, rank)
            pyfleet.all_reduce(x, compression=spec, group=group)
            inside.append(x)
        group.close()
    xs = [data(1000, rank, step) for step in range(len(specs))]
    works = [pyfleet.all_reduce(x, compression=spec, async_op=True) for x, spec in zip(xs, specs, strict=True)]
    late = data(1000, rank, 99)
    pyfleet.all_reduce(late, compression="int8")           # queues behind them
    assert all(work.done() for work in works)
    assert [work.wait(10) for work in works] == [None] * len(works)
    return inside, xs, late


@pytest.mark.parametrize("transport", ("shm", "tcp"))
def test_groups_and_handles(ranks, transport):
    specs = ("fp16", "int8", "topk+fp16")
    reports = ranks(3, transport).run(groups_and_handles, specs)
    assert reports[1][0] == []
    for place, spec in enumerate(specs):
        pair = [data(1000, 2), data(1000, 0)]
        for rank in (0, 2):
            np.testing.assert_array_equal(reports[rank][0][place], expected(spec, pair, "sum", 0))
        for rank in range(3):
            np.testing.assert_array_equal(reports[rank][1][place],
                                          expected(spec, [data(1000, r, place) for r in range(3)], "sum", 0))
    for _, _, late in reports:
        np.testing.assert_array_equal(late, expected("int8", [data(1000, r, 99) for r in range(3)], "sum", 0))


def broken_numbers(spec):
    """In a rank: where results are not finite when rank 1 has a NaN at 700 and an infinity at 1500, with feedback and
    without; and what the step after that looks like with feedback."""
    engine, found = engines.current(), []
    for feedback in (False, True):
        way = CompressedAllReduce(engine, spec, 3000, error_feedback=feedback, shapes=[(60, 50)])
        x = data(3000, engine.rank)
        if engine.rank == 1:
            x[700], x[1500] = np.nan, np.inf
        way.all_reduce(x)
        found.append(~np.isfinite(x[[700, 1500]]))
        x = data(3000, engine.rank, 1)
        way.all_reduce(x)
        found.append(np.isfinite(x).all())
    return found


@pytest.mark.parametrize("spec", SPECS)
def test_what_is_not_finite_reaches_every_rank_and_passes(ranks, spec):
    for lost, sound, lost_with_feedback, sound_with_feedback in ranks(2, "shm").run(broken_numbers, spec):
        assert lost.all() and lost_with_feedback.all()
        assert sound and sound_with_feedback


def steady(spec, n):
    """In a rank: the most memory that a call takes for itself, after the first ones."""
    way = CompressedAllReduce(engines.current(), spec, n, error_feedback=True)
    x = data(n, pyfleet.rank())
    for _ in range(3):
        way.all_reduce(x.copy())
    arena = engines.current().wired.arena.used_bytes
    tracemalloc.start()
    way.all_reduce(x)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak, engines.current().wired.arena.used_bytes - arena


@pytest.mark.parametrize("spec", ("bf16", "int8", "sign"))
def test_calls_reuse_their_memory(ranks, spec):
    for peak, more in ranks(2, "shm").run(steady, spec, 1_000_000):
        assert peak < 400_000           # of 4 MB: a chunk that bfloat16 is widened in
        assert more == 0


# ---- what goes wrong --------------------------------------------------------------------------------------------------

def refusals():
    x, said = np.zeros(5, np.float32), []
    for call in (lambda: pyfleet.all_reduce(x, "max", compression="int8"),
                 lambda: pyfleet.all_reduce(x, compression="itn8"),
                 lambda: pyfleet.all_reduce(x, compression="int8", algorithm="ring"),
                 lambda: pyfleet.all_reduce(x, compression="int8", timeout=-1),
                 lambda: pyfleet.all_reduce(np.zeros(5, np.int64), compression="int8"),
                 lambda: pyfleet.all_reduce(np.zeros(5, np.complex64), compression="int8"),
                 lambda: pyfleet.all_reduce([1.0, 2.0], compression="int8"),
                 lambda: pyfleet.all_reduce(np.frombuffer(bytes(20), np.float32), compression="int8"),
                 lambda: CompressedAllReduce(engines.current(), "int8", 5, undo=False).rollback(),
                 lambda: CompressedAllReduce(engines.current(), "int8", 5).load_state_dict({"compression": "int4"})):
        try:
            call()
            said.append("nothing")
        except Exception as error:      # noqa: BLE001 the test looks at it
            said.append(f"{type(error).__name__}: {error}")
    pyfleet.all_reduce(x, compression="int8")               # nothing was sent, nothing is broken
    return said


def test_refusals_name_what_is_offered_and_break_nothing(ranks):
    for said in ranks(2, "shm").run(refusals):
        for message, words in zip(said, (
                "ConfigError: with compression, op is one of sum, mean; not max", "did you mean int8", "algorithm", "timeout",
                "DTypeError: elements of int64", "DTypeError: elements of complex64", "DTypeError: cannot reduce a list",
                "ShapeError: the array is read-only", "undo=True", "ConfigError: this is a state of 'int4'"), strict=True):
            assert words in message


def unequal():
    x = np.ones(100 + pyfleet.rank(), np.float32)
    with pytest.raises(pyfleet.OutOfStep, match=r"\[100, 101\] elements"):
        pyfleet.all_reduce(x, compression="topk")
    return (x == 1).all()


def test_arrays_of_different_sizes_are_noticed_before_anything_is_added(ranks):
    assert ranks(2, "shm").run(unequal) == [True, True]


def until_a_peer_dies(spec):
    engine, step = engines.current(), 0
    way = CompressedAllReduce(engine, spec, 5000, undo=True)
    try:
        while True:
            if engine.rank == 1 and step == 4:
                os.kill(os.getpid(), 9)
            way.commit()
            kept, x = way.compressor.residual.copy(), data(5000, engine.rank, step)
            way.all_reduce(x, timeout=30)
            step += 1
    except pyfleet.PeerLost as error:
        way.rollback()
        return (error.rank, step, way.step, np.array_equal(x, data(5000, engine.rank, step)),
                np.array_equal(kept, way.compressor.residual))


@pytest.mark.parametrize("transport", ("shm", "tcp"))
@pytest.mark.parametrize("spec", ("fp16", "int8", "topk"))
def test_a_lost_peer_leaves_the_array_and_after_a_rollback_the_residual(fresh_ranks, spec, transport):
    group = fresh_ranks(3, transport)
    group.start(until_a_peer_dies, spec)
    assert group.collect((0, 2)) == [(1, 4, 4, True, True)] * 2


# ---- pieces -----------------------------------------------------------------------------------------------------------

def in_pieces(spec, n, op, piece_bytes):
    """In a rank: results and accounts of three steps in pieces of so many bytes, and which threads have encoded."""
    engine, usual, threads = engines.current(), routes.PIECE_BYTES, set()
    engine.local_world_size, routes.PIECE_BYTES = 1, piece_bytes           # as if each rank had a host of its own
    way = CompressedAllReduce(engine, spec, n, op, undo=True)
    inner, encode = way.compressor.inner, way.compressor.inner.encode_feedback
    inner.encode_feedback = lambda *args, **kwargs: (threads.add(threading.current_thread().name), encode(*args, **kwargs))[1]
    try:
        results = []
        for step in range(3):
            x = data(n, engine.rank, step)
            way.all_reduce(x)
            results.append(x)
        feedback = way.compressor
        return results, feedback.residual, feedback.owner.residual, threads
    finally:
        engine.local_world_size, routes.PIECE_BYTES = engine.world_size, usual


@pytest.mark.parametrize("spec", ("int8", "fp16", "int4", "fp8", "int8(stochastic=True)"))
@pytest.mark.parametrize("size", (2, 3))
def test_pieces_that_travel_one_after_the_other_change_no_bit(ranks, size, spec):
    for op, n in (("mean", 5000), ("sum", 257 * size), ("sum", 3)):
        whole, pieces = (ranks(size, "tcp").run(in_pieces, spec, n, op, nbytes) for nbytes in (1 << 30, 512))
        for one, other in zip(whole, pieces, strict=True):
            for a, b in zip([*one[0], *one[1:3]], [*other[0], *other[1:3]], strict=True):
                np.testing.assert_array_equal(a, b)
            assert {name.partition("_")[0] for name in other[3]} == ({"pyfleet-codec"} if n > 300 else {"MainThread"})
            assert one[3] == {"MainThread"}


def failing_in_a_piece(n):
    """In a rank: what a codec that fails in the third piece raises, what the array holds then, and a call after it."""
    engine, usual, calls = engines.current(), routes.PIECE_BYTES, []
    engine.local_world_size, routes.PIECE_BYTES = 1, 4096
    try:
        way = CompressedAllReduce(engine, "int8", n, "sum", error_feedback=False)
        encode = way.compressor.encode

        def fail(*args, **kwargs):
            calls.append(args)
            if len(calls) > 2 * engine.world_size:
                raise ArithmeticError("no more")
            return encode(*args, **kwargs)
        way.compressor.encode = fail
        x = data(n, engine.rank)
        with pytest.raises(ArithmeticError, match="no more"):
            way.all_reduce(x)
        engine.barrier()
        after = data(n, engine.rank)
        CompressedAllReduce(engine, "int8", n, "sum", error_feedback=False).all_reduce(after)
        return x, after
    finally:
        engine.local_world_size, routes.PIECE_BYTES = engine.world_size, usual


def test_a_codec_that_fails_between_pieces_leaves_the_array_as_it_was(fresh_ranks):
    reports = fresh_ranks(2, "tcp").run(failing_in_a_piece, 20_000)
    for rank, (x, after) in enumerate(reports):
        np.testing.assert_array_equal(x, data(20_000, rank))
        np.testing.assert_array_equal(after, reports[0][1])
