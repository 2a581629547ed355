"""Every verb of a group against numpy, over every way that its bytes can go; ranks are threads of one process."""
from itertools import pairwise

import numpy as np
import pytest
from fleetcore.group import DURATION_BOUNDS_NS, Group, bucket_of

from fleetcore.errors import ConfigError, DTypeError, OutOfStep, PeerLost, ReduceOp, ShapeError
from fleetcore.schedules import SCHEDULES
from tests.fleetcore.test_domain import domains_of, everyone, groups
from tests.fleetcore.test_executor import mesh

WAYS = ("cma", "staging", "arena", "links")
SIZES = (1, 2, 3, 5, 8)
COUNTS = (0, 1, 5, 6, 7, 1500, 300_007)         # 0 to 28 bytes: around the tiny room; 6000: inline; the last: several pieces
ROOTED = ("reduce", "gather", "scatter", "broadcast")


class Way:
    """Groups over one way, and arrays where that way wants them."""

    def __init__(self, way, size):
        self.arenas = None
        if size == 1:
            self.members = [Group(0, 1)]
        elif way == "links":
            self.members = mesh(size)
        else:
            self.members, arenas = groups(size, "auto" if way == "arena" else way)
            self.arenas = arenas if way == "arena" else None

    def array(self, rank, values):
        """A copy of values."""
        values = np.ascontiguousarray(values)
        if self.arenas is None:
            return values.copy()
        placed = np.frombuffer(self.arenas[rank].allocate(max(1, values.nbytes)), values.dtype, values.size)
        placed[:] = values
        return placed


def two_level(hosts):
    """Groups whose ranks live on these hosts: shared memory within each, links between all."""
    flat = mesh(len(hosts))
    made = [None] * len(hosts)
    for host in set(hosts):
        local = [rank for rank, where in enumerate(hosts) if where == host]
        domains = domains_of(len(local), "auto", names=local)[0] if len(local) > 1 else [None]
        for rank, domain in zip(local, domains, strict=True):
            made[rank] = Group(rank, len(hosts), domain=domain, executor=flat[rank].executor, hosts=list(hosts),
                               two_level=True, timeout=20.0)
    return made


def given(rank, count, dtype="float32"):
    """What a rank contributes: small integers, so that every order of summation gives the same."""
    return ((np.arange(count) * (rank + 3) + rank) % 11).astype(dtype)


@pytest.mark.feature("C65")
@pytest.mark.parametrize("hosts", [(0, 0, 1, 1), (0, 1, 0, 1, 1), (0, 0, 0, 1), (0, 0, 1, 1, 2, 2), (3, 3, 7)], ids=str)
def test_two_levels_give_what_one_gives(hosts):
    size, hosts = len(hosts), [sorted(set(hosts)).index(host) for host in hosts]
    members = two_level(hosts)

    def work(rank):
        me = members[rank]
        for count in (0, 1, 7, 5000, 300_007):
            for dtype, op in (("float32", ReduceOp.SUM), ("float64", ReduceOp.MEAN), ("int64", ReduceOp.MAX),
                              ("float16", ReduceOp.SUM), ("bool", ReduceOp.SUM)):
                parts = np.stack([given(r, count, dtype) for r in range(size)])
                total = {ReduceOp.SUM: parts.any(0) if dtype == "bool" else parts.sum(0), ReduceOp.MAX: parts.max(0) if count else parts[0],
                         ReduceOp.MEAN: parts.sum(0) / size if dtype == "float64" else None}[op]
                x = parts[rank].copy()
                me.all_reduce(x, op)
                assert np.array_equal(x, total), (count, dtype, op)
            for root in range(size):
                x = given(rank, count)
                me.broadcast(x, root)
                assert np.array_equal(x, given(root, count))
            out = np.zeros(count * size, np.float32)
            me.all_gather(out, given(rank, count))
            assert np.array_equal(out, np.concatenate([given(r, count) for r in range(size)]))
            me.barrier()
        return me.stats()["algorithms"]
    for used in everyone(work, size):
        assert not isinstance(used, BaseException), used
        assert used["two_level"] > 0


def test_two_levels_send_what_one_rank_per_host_would():
    members, count = two_level([0, 0, 1, 1]), 1_000_000

    def work(rank):
        for _ in range(2):                                       # the first one measures the links
            members[rank].all_reduce(np.ones(count, np.float32))
            before = {peer: link["sent_bytes"] for peer, link in members[rank].stats()["links"].items()}
            members[rank].barrier()
        members[rank].all_reduce(np.ones(count, np.float32))
        return {peer: link["sent_bytes"] - before[peer] for peer, link in members[rank].stats()["links"].items()}
    sent = everyone(work, 4)
    between = [sum(sent[rank][peer] for rank in host for peer in range(4) if peer not in host) for host in ((0, 1), (2, 3))]
    assert all(count * 4 < one < 1.02 * count * 4 for one in between), between    # 2(H-1)/H of the array, H = 2
    assert all(sent[rank][rank ^ 1] < 1000 for rank in range(4))                 # nothing to speak of within a host


@pytest.mark.parametrize("victim", (0, 3))
def test_a_rank_that_leaves_is_lost_to_both_levels(victim):
    members = two_level([0, 0, 1, 1])

    def work(rank):
        members[rank].all_reduce(np.ones(5000))
        if rank == victim:
            members[rank].close()
            return victim
        with pytest.raises(PeerLost) as caught:
            while True:
                members[rank].all_reduce(np.ones(5000))
        return caught.value.rank
    assert everyone(work, 4) == [victim] * 4


def uneven(size, count):
    """Parts of about count elements in all, some of them empty."""
    return [0 if rank % 3 == 1 else (count // size + rank) * (count > 0) for rank in range(size)]


@pytest.fixture(params=[(way, size) for way in WAYS for size in SIZES if size > 1 or way == "links"],
                ids=lambda p: f"{p[0]}-{p[1]}")
def way(request):
    return Way(*request.param)


def test_reduce_leaves_the_sum_at_the_root_and_the_rest_alone(way):
    size = len(way.members)

    def work(rank):
        for count in COUNTS:
            for dst in {0, size - 1}:
                for op in (ReduceOp.SUM, ReduceOp.MAX, ReduceOp.MEAN):
                    x = way.array(rank, given(rank, count))
                    way.members[rank].reduce(x, dst, op)
                    parts = np.stack([given(r, count) for r in range(size)])
                    total = {ReduceOp.SUM: parts.sum(0), ReduceOp.MAX: parts.max(0),
                             ReduceOp.MEAN: parts.sum(0) / np.float32(size)}[op]
                    assert np.array_equal(x, total if rank == dst else given(rank, count)), (count, dst, op)
    assert everyone(work, size) == [None] * size


def test_all_gather_concatenates(way):
    size = len(way.members)

    def work(rank):
        for count in COUNTS:
            for counts in (None, uneven(size, count)):
                sizes = counts or [count] * size
                out, x = way.array(rank, np.full(sum(sizes), -1, np.float32)), way.array(rank, given(rank, sizes[rank]))
                way.members[rank].all_gather(out, x, counts)
                assert np.array_equal(out, np.concatenate([given(r, sizes[r]) for r in range(size)])), (count, counts)
                out[:] = -1
                start = sum(sizes[:rank])
                own = out[start:start + sizes[rank]]
                own[:] = x                                       # in place: the rank's part of the output is the input
                way.members[rank].all_gather(out, own, counts)
                assert np.array_equal(out, np.concatenate([given(r, sizes[r]) for r in range(size)])), (count, counts)
    assert everyone(work, size) == [None] * size


def test_gather_and_scatter_are_inverse(way):
    size = len(way.members)

    def work(rank):
        for count in COUNTS:
            for counts in (None, uneven(size, count)):
                sizes = counts or [count] * size
                whole = np.concatenate([given(r, sizes[r], "int64") for r in range(size)])
                for root in {0, size - 1}:
                    x = way.array(rank, given(rank, sizes[rank], "int64"))
                    out = way.array(rank, np.zeros(sum(sizes), np.int64)) if rank == root else None
                    way.members[rank].gather(out, x, counts, root)
                    assert rank != root or np.array_equal(out, whole), (count, counts)
                    x[:] = -1
                    way.members[rank].scatter(x, out, counts, root)
                    assert np.array_equal(x, given(rank, sizes[rank], "int64")), (count, counts)
    assert everyone(work, size) == [None] * size


def test_reduce_scatter_gives_everyone_its_part(way):
    size = len(way.members)

    def work(rank):
        for count in COUNTS:
            for counts in (None, uneven(size, count)):
                sizes = counts or [count] * size
                start, stop = sum(sizes[:rank]), sum(sizes[:rank + 1])
                parts = [given(r, sum(sizes), "float64") for r in range(size)]
                for op, total in ((ReduceOp.SUM, sum(parts)), (ReduceOp.MEAN, sum(parts) / size)):
                    x, out = way.array(rank, parts[rank]), way.array(rank, np.zeros(sizes[rank]))
                    way.members[rank].reduce_scatter(out, x, counts, op)
                    assert np.array_equal(out, total[start:stop]) and np.array_equal(x, parts[rank]), (count, counts, op)
                    way.members[rank].reduce_scatter(x[start:stop], x, counts, op)
                    assert np.array_equal(x[start:stop], total[start:stop]), "in place"
    assert everyone(work, size) == [None] * size


def test_all_to_all_is_a_transposition(way):
    size = len(way.members)

    def work(rank):
        for count in COUNTS:
            for table in ([[count // size] * size for _ in range(size)],
                          [[(i + 2 * j) % 3 * (count // size) for j in range(size)] for i in range(size)]):
                parts = [given(7 * rank + j, table[rank][j], "int16") for j in range(size)]
                came = [given(7 * i + rank, table[i][rank], "int16") for i in range(size)]
                x = way.array(rank, np.concatenate(parts))
                out = way.array(rank, np.zeros(sum(map(len, came)), np.int16))
                way.members[rank].all_to_all(out, x, table)
                assert np.array_equal(out, np.concatenate(came)) and np.array_equal(x, np.concatenate(parts)), (count, table)
    assert everyone(work, size) == [None] * size


@pytest.mark.parametrize("dtype", ("float16", "bool", "uint8", "complex64"))
@pytest.mark.parametrize("way", [("staging", 3), ("links", 3)], ids=str, indirect=True)
def test_other_dtypes(way, dtype):
    size = len(way.members)
    counts = [2000, 0, 3001]

    def work(rank):
        parts = [given(r, 5001, dtype) for r in range(size)]
        total = parts[0] | parts[1] | parts[2] if dtype == "bool" else sum(parts[1:], parts[0])
        x, out = parts[rank].copy(), np.zeros(counts[rank], dtype)
        way.members[rank].reduce_scatter(out, x, counts)
        assert np.array_equal(out, total[sum(counts[:rank]):sum(counts[:rank + 1])])
        whole = np.zeros(5001, dtype)
        way.members[rank].all_gather(whole, out, counts)
        assert np.array_equal(whole, total)
        way.members[rank].reduce(x, 1)
        assert np.array_equal(x, total if rank == 1 else parts[rank])
    assert everyone(work, size) == [None] * size


def test_inputs_of_different_memory_mix():
    members, arenas = groups(3, "staging")

    def work(rank):
        x = given(rank, 700_000)
        if rank == 1:
            placed = np.frombuffer(arenas[1].allocate(x.nbytes), x.dtype)
            placed[:] = x
            x = placed
        total = sum(given(r, 700_000) for r in range(3))
        out = np.empty(2_100_000, np.float32)
        members[rank].all_gather(out, x)
        assert np.array_equal(out, np.concatenate([given(r, 700_000) for r in range(3)]))
        part = np.empty(100_000 * (rank + 1) + 100_000 * (rank == 2), np.float32)
        counts = [100_000, 200_000, 400_000]
        members[rank].reduce_scatter(part, x, counts)
        assert np.array_equal(part, total[sum(counts[:rank]):sum(counts[:rank + 1])])
        members[rank].reduce(x, 2)
        assert np.array_equal(x, total if rank == 2 else given(rank, 700_000))
    assert everyone(work, 3) == [None] * 3


@pytest.mark.parametrize("size", (2, 3, 4, 7))
@pytest.mark.parametrize("verb", [verb for verb in SCHEDULES if verb not in ("all_reduce", "broadcast")])
def test_every_algorithm_of_every_verb_gives_the_same(verb, size):
    members = mesh(size)

    def work(rank):
        me = members[rank]
        for algorithm in SCHEDULES[verb]:
            for count in (1, 3000, 20_011):
                sizes = uneven(size, count)
                parts = [given(r, sum(sizes)) for r in range(size)]
                start, stop = sum(sizes[:rank]), sum(sizes[:rank + 1])
                for root in range(size) if verb in ROOTED else (0,):
                    x, out = parts[rank].copy(), np.zeros(sizes[rank], np.float32)
                    if verb == "reduce":
                        me.reduce(x, root, algorithm=algorithm)
                        assert np.array_equal(x, sum(parts) if rank == root else parts[rank])
                    elif verb == "reduce_scatter":
                        me.reduce_scatter(out, x, sizes, algorithm=algorithm)
                        assert np.array_equal(out, sum(parts)[start:stop]) and np.array_equal(x, parts[rank])
                    elif verb == "all_gather":
                        me.all_gather(x, parts[0][start:stop].copy(), sizes, algorithm=algorithm)
                        assert np.array_equal(x, parts[0])
                    elif verb == "gather":
                        me.gather(x if rank == root else None, parts[0][start:stop].copy(), sizes, root, algorithm=algorithm)
                        assert np.array_equal(x, parts[0] if rank == root else parts[rank])
                    elif verb == "scatter":
                        me.scatter(out, parts[root] if rank == root else None, sizes, root, algorithm=algorithm)
                        assert np.array_equal(out, parts[root][start:stop])
                    else:
                        table = [[(count // size) * ((i + j) % 2 + 1) for j in range(size)] for i in range(size)]
                        came = [given(10 * i + rank, table[i][rank]) for i in range(size)]
                        sent = [given(10 * rank + j, table[rank][j]) for j in range(size)]
                        got = np.zeros(sum(map(len, came)), np.float32)
                        me.all_to_all(got, np.concatenate(sent), table, algorithm=algorithm)
                        assert np.array_equal(got, np.concatenate(came))
    assert everyone(work, size) == [None] * size


@pytest.mark.parametrize("way", [("cma", 2), ("links", 2)], ids=str, indirect=True)
def test_bad_arguments_are_refused_before_anything_is_sent(way):
    def work(rank):
        me, x = way.members[rank], np.zeros(4, np.float32)
        for call, error in (
            (lambda: me.reduce(x, 2), ConfigError),
            (lambda: me.reduce(x, 0, ReduceOp.SUM, algorithm="magic"), ConfigError),
            (lambda: me.gather(np.zeros(8, np.float32), x, None, 0, algorithm="halving"), ConfigError),
            (lambda: me.all_gather(x, x), ShapeError),
            (lambda: me.all_gather(x, x, [4, 4]), ShapeError),
            (lambda: me.all_gather(x, x[:2], [2, 2, 2]), ShapeError),
            (lambda: me.all_gather(x, x[:2], [-2, 6]), ShapeError),
            (lambda: me.all_gather(np.zeros(8), x), DTypeError),
            (lambda: me.reduce_scatter(x, x), ShapeError),
            (lambda: me.reduce_scatter(np.zeros(2, int), np.zeros(4, int), None, ReduceOp.MEAN), DTypeError),
            (lambda: me.scatter(x, x, [2, 2], 5), ConfigError),
            (lambda: me.all_to_all(x, x, [[1, 1]]), ShapeError),
            (lambda: me.all_to_all(x, x, [[1, 2], [1, 2]]), ShapeError),
        ):
            with pytest.raises(error):
                call()
        me.barrier()
    assert everyone(work, 2) == [None] * 2


@pytest.mark.parametrize("way", [("cma", 2), ("links", 2)], ids=str, indirect=True)
@pytest.mark.parametrize("kind", ("counts", "root", "verb", "algorithm"))
def test_calls_that_do_not_match_are_out_of_step(way, kind):
    def work(rank):
        me, x, out = way.members[rank], np.zeros(4, np.float32), np.zeros(8, np.float32)
        with pytest.raises(OutOfStep) as caught:
            if kind == "counts":
                me.all_gather(out, x[:4], [4, 4]) if rank else me.all_gather(out[:6], x[:4], [4, 2])
            elif kind == "root":
                me.reduce(x, rank)
            elif kind == "algorithm":
                me.all_reduce(x, algorithm=("ring", "direct")[rank]) if way.members[0].executor else me.reduce(x, rank)
            else:
                me.reduce(x, 0) if rank else me.all_reduce(x)
            me.barrier()
        return str(caught.value)
    assert all("out of step" in text for text in everyone(work, 2))


def test_a_duration_is_counted_in_the_bucket_that_ends_at_or_above_it():
    bounds = DURATION_BOUNDS_NS
    assert bounds[0] == 256 and bounds[-1] == 1 << 38 and list(bounds) == sorted(set(bounds))
    assert max(b / a for a, b in pairwise(bounds)) == 1.25
    for k, bound in enumerate(bounds):
        assert [bucket_of(ns) for ns in (bound - 1, bound, bound + 1)] == [k, k, k + 1]
    assert [bucket_of(ns) for ns in (-1, 0, 1 << 62)] == [0, 0, len(bounds)]


@pytest.mark.parametrize("way", WAYS)
def test_every_call_has_its_duration(way):
    group = Way(way, 2)

    def work(rank):
        me = group.members[rank]
        for _ in range(7):
            me.all_reduce(group.array(rank, np.ones(10, np.float32)))
        me.barrier()
        return {verb: sum(counts) for verb, counts in me.durations().items()}, {len(counts) for counts in me.durations().values()}

    assert everyone(work, 2) == [({"all_reduce": 7, "barrier": 1}, {len(DURATION_BOUNDS_NS) + 1})] * 2
