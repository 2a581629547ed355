"""Compressed all-reduces where hosts have several ranks: float32 within a host, encodings between hosts."""
from itertools import pairwise

import numpy as np
import pytest

import pyfleet
from pyfleet import engines
from pyfleet.compressors import parse_spec
from pyfleet.compressors.feedback import ErrorFeedback
from pyfleet.routes import CompressedAllReduce, bounds
from tests.network import MASTER_PORT
from tests.pyfleet.compressors.test_contract import encoded, gradients
from tests.ranks import Ranks

N = 40_000
SPECS = ("int8", "fp16", "topk(ratio=0.01)+fp16", "random(ratio=0.1)", "sign")


def data(rank, step=0, n=N):
    return gradients(n, 1000 * step + rank)


def start(network, ranks_of_hosts):
    """Ranks on hosts with so many each, in order."""
    hosts = network(len(ranks_of_hosts), None)
    places = [host for host, num in enumerate(ranks_of_hosts) for _ in range(num)]
    return Ranks(len(places), namespaces=[hosts.namespace(host) for host in places], env={
        "MASTER_ADDR": hosts.address(0), "MASTER_PORT": str(MASTER_PORT), "PYFLEET_RENDEZVOUS": "", "PYFLEET_IFACE": "eth0",
        "PYFLEET_ENCRYPTION": "off"})


def sent():
    return sum(link["sent_bytes"] for link in engines.current().stats()["links"].values())


def one_step(spec, op, n):
    """In a rank: one call without feedback, as the step 7 of a bucket, and the bytes that it sent to other hosts."""
    way, x = CompressedAllReduce(engines.current(), spec, n, op, error_feedback=False), data(pyfleet.rank(), n=n)
    if n:
        CompressedAllReduce(engines.current(), spec, n, op, error_feedback=False).all_reduce(x.copy())      # makes groups
    way.step = 7
    pyfleet.barrier()
    before = sent()
    way.all_reduce(x)
    return x, sent() - before


def expected(spec, ranks_of_hosts, op, n, step):
    """What the definition gives: segments for as many ranks as every host has, and within each what hosts exchange."""
    compressor, size = parse_spec(spec), sum(ranks_of_hosts)
    cuts = np.cumsum([0, *ranks_of_hosts])
    hosts = [np.sum([data(rank, n=n) for rank in range(first, last)], axis=0, dtype=np.float32) for first, last in pairwise(cuts)]
    result, divisor = np.zeros(n, np.float32), np.float32(size if op == "mean" else 1)
    for start, stop in pairwise(bounds(n, min(ranks_of_hosts), compressor.block)):
        parts, out = [host[start:stop] for host in hosts], result[start:stop]
        if compressor.route == "gather":
            for stream, part in enumerate(parts):
                compressor.decode_add(encoded(compressor, part, step=step, offset=start, stream=stream), out, 1 / float(divisor))
            continue
        for low, high in pairwise(bounds(stop - start, len(hosts), compressor.block)):
            if low == high:
                continue
            total = np.zeros(high - low, np.float32)
            for stream, part in enumerate(parts):
                compressor.decode_add(encoded(compressor, part[low:high], step=step, offset=start + low, stream=stream), total)
            compressor.decode(encoded(compressor, total / divisor, step=step, stream=len(hosts)), out[low:high])
    return result


@pytest.mark.feature("P22", "P24", "P25", "P26")
@pytest.mark.parametrize("ranks_of_hosts", [(2, 2), (2, 1), (1, 3, 2)])
def test_hosts_exchange_encodings_of_their_sums_and_all_ranks_get_the_same_bits(network, ranks_of_hosts):
    ranks = start(network, ranks_of_hosts)
    try:
        for spec in SPECS:
            for op, n in (("mean", N), ("sum", 300), ("sum", 1), ("sum", 0)):
                want = expected(spec, ranks_of_hosts, op, n, 7)
                for x, _ in ranks.run(one_step, spec, op, n):
                    np.testing.assert_array_equal(x, want, err_msg=f"{spec} {op} of {n}")
    finally:
        ranks.close()


@pytest.mark.feature("P24", "P25", "P26")
def test_a_host_sends_the_encodings_that_one_rank_alone_would(network):
    ranks, n = start(network, (2, 2)), 1_000_000
    try:
        for spec, share in (("fp16", 0.5), ("int8", 0.256), ("topk(ratio=0.01)+fp16", 0.005)):
            of_ranks = [sent_bytes for _, sent_bytes in ranks.run(one_step, spec, "mean", n)]
            for host in (of_ranks[:2], of_ranks[2:]):
                assert 0.5 * share * 4 * n < sum(host) < 1.02 * share * 4 * n + 20_000, (spec, of_ranks)
    finally:
        ranks.close()


def account(spec, steps, op):
    """In a rank: the sums of what was given, of what came and of what is kept here, and what rounds.

    At first as if every rank had a host of its own: what is kept then lies outside of the segments that come after.
    """
    engine = engines.current()
    way = CompressedAllReduce(engine, spec, N, op)
    factor = engine.world_size if op == "mean" else 1
    given, came, rounding, levels = np.zeros(N), np.zeros(N), 0.0, engine.levels
    for step in range(steps):
        engine.levels = levels if step > 2 else (lambda *, timeout=None: None)
        x = data(engine.rank, step)
        given += x
        way.all_reduce(x)
        came += x.astype(np.float64) * factor
        rounding += float(np.abs(x).max()) * factor
    feedback, kept = way.compressor, np.zeros(N)
    assert isinstance(feedback, ErrorFeedback)
    kept += feedback.residual
    if feedback.owner is not None:
        first, last, scale = feedback.segment
        kept[first:last] += feedback.owner.residual.astype(np.float64) * scale
    return given, came, kept, rounding, np.count_nonzero(feedback.residual)


@pytest.mark.feature("P28")
@pytest.mark.parametrize("ranks_of_hosts", [(2, 2), (1, 2)])
def test_what_segments_leave_out_is_kept_where_they_are_encoded_and_nothing_is_lost(network, ranks_of_hosts):
    ranks = start(network, ranks_of_hosts)
    try:
        for spec in ("int4", "topk(ratio=0.05)", "bf16"):
            for op in ("sum", "mean"):
                given, came, kept, rounding, num_kept = zip(*ranks.run(account, spec, 40, op), strict=True)
                assert all(np.array_equal(came[0], other) for other in came)
                off = np.abs(came[0] + np.sum(kept, axis=0) - np.sum(given, axis=0)).max()
                assert off <= 4 * 2.0**-23 * rounding[0] < np.abs(np.sum(kept, axis=0)).max()
                assert all(num <= -(-N // min(ranks_of_hosts)) + 256 for num in num_kept)
    finally:
        ranks.close()


def undone(spec):
    """In a rank: the results of steps of which the first in two levels is rolled back, and done again."""
    engine = engines.current()
    way, results, levels = CompressedAllReduce(engine, spec, N, undo=True), [], engine.levels
    engine.levels = lambda *, timeout=None: None
    way.all_reduce(data(engine.rank))
    way.commit()
    engine.levels = levels
    for undo in (True, False, True, False):
        x = data(engine.rank, 1)
        way.all_reduce(x)
        results.append(x)
        way.rollback() if undo else way.commit()
    return results


def test_a_first_step_in_two_levels_can_be_rolled_back(network):
    ranks = start(network, (2, 2))
    try:
        for spec in ("int4", "topk"):
            for first, again, later, last in ranks.run(undone, spec):
                np.testing.assert_array_equal(first, again)
                np.testing.assert_array_equal(later, last)
                assert (first != later).any()
    finally:
        ranks.close()
