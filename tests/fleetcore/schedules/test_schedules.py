"""Every verb and algorithm, every size up to 16, simulated: right results, and the bytes and rounds it promises."""
import random
from importlib import import_module
from itertools import chain
from math import ceil, log2

import pytest

from fleetcore.schedules import SCHEDULES, halving, ring, tree
from fleetcore.schedules.base import COPY, FOLD, SEND, Row, cut
from tests.fleetcore.schedules.simulator import races, simulate

SIZES = range(1, 17)
KINDS = [(verb, name) for verb, names in SCHEDULES.items() for name in names if verb != "all_to_all"]
ROOTED = ("broadcast", "reduce", "gather", "scatter")


def load(verb, name):
    module, function = SCHEDULES[verb][name].split(":")
    return getattr(import_module(module), function)


def plan_all(verb, name, size, bounds, root=0):
    schedule = load(verb, name)
    return [schedule(rank, size, bounds, root) for rank in range(size)]


def lengths(size):
    return sorted({0, 1, size - 1, size, size + 1, 61})


def all_bounds(size):
    """Equal segments of awkward lengths, unequal and empty ones, all with one rank, and a stretch of a larger array."""
    dice = random.Random(size)
    yield from (cut(count, size) for count in lengths(size))
    yield from (cut(61, size, [float(rank == owner) for rank in range(size)]) for owner in {0, size // 2, size - 1})
    yield from (sorted([0, 61, *dice.choices(range(62), k=size - 1)]) for _ in range(3))
    yield [7 + bound for bound in cut(29, size)]


def stage(verb, size, bounds, root):
    """(inputs, outputs, what must be there at the end), None where there is nothing or where it does not matter."""
    start, end = bounds[0], bounds[-1]
    nothing = [None] * end
    everyone = frozenset(range(size))

    def filled(value, first=start, stop=end):
        return [value if first <= i < stop else None for i in range(end)]

    def owners(present=range(size)):
        array = list(nothing)
        for rank in present:
            array[bounds[rank]:bounds[rank + 1]] = [frozenset([rank])] * (bounds[rank + 1] - bounds[rank])
        return array
    whole = [filled(frozenset([rank])) for rank in range(size)]
    only_root = [filled(frozenset([root])) if rank == root else nothing for rank in range(size)]
    own = [filled(frozenset([rank]), bounds[rank], bounds[rank + 1]) for rank in range(size)]
    from_root = [filled(frozenset([root]), bounds[rank], bounds[rank + 1]) for rank in range(size)]
    blank = [nothing] * size
    at_root = [rank == root for rank in range(size)]
    return {
        "all_reduce": (whole, None, [filled(everyone)] * size),
        "broadcast": (only_root, None, [filled(frozenset([root]))] * size),
        "reduce": (whole, blank, [filled(everyone) if here else nothing for here in at_root]),
        "reduce_scatter": (whole, blank, [filled(everyone, *bounds[rank:rank + 2]) for rank in range(size)]),
        "all_gather": (own, own, [owners()] * size),
        "gather": (own, own, [owners() if here else nothing for here in at_root]),
        "scatter": (only_root, [from_root[root] if here else nothing for here in at_root], from_root),
    }[verb]


def start(size, count=4):
    return [[frozenset([rank])] * count for rank in range(size)]


def agrees(outputs, wanted):
    return all(want in (None, value) for array, wants in zip(outputs, wanted, strict=True)
               for value, want in zip(array, wants, strict=True))


@pytest.mark.parametrize(("verb", "name"), KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_every_schedule_does_what_its_verb_says(verb, name, size):
    for turn, bounds in enumerate(all_bounds(size)):
        for root in range(turn % 3, size, 3) if verb in ROOTED else [0]:       # each root meets a third of the bounds
            plans = plan_all(verb, name, size, bounds, root)
            inputs, outputs, wanted = stage(verb, size, bounds, root)
            if size == 1 and outputs:
                continue                       # there is nobody to move anything: the caller has put it there
            assert agrees(simulate(plans, inputs, outputs).outputs, wanted), (bounds, root)
            if outputs:
                assert agrees(simulate(plans, inputs).outputs, wanted), ("in place", bounds, root)


@pytest.mark.parametrize(("verb", "name"), KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_no_schedule_needs_buffers_or_luck(verb, name, size):
    """Wires that hold nothing do not stop it, and no element is read or written in an order left to chance."""
    for bounds in (cut(61, size), cut(size // 2, size), [0] * (size // 2 + 1) + [5] * (size - size // 2)):
        for root in {0, size // 3, size - 1} if verb in ROOTED else {0}:
            plans = plan_all(verb, name, size, bounds, root)
            inputs, outputs, wanted = stage(verb, size, bounds, root)
            if size > 1:
                assert agrees(simulate(plans, inputs, outputs, buffers=False).outputs, wanted), (bounds, root)
            assert races(plans, in_place=True) == races(plans, in_place=False) == []


@pytest.mark.parametrize("verb", ("all_reduce", "reduce", "reduce_scatter"))
@pytest.mark.parametrize("size", range(2, 17))
def test_a_mean_is_divided_exactly_once_per_element(verb, size):
    for name in SCHEDULES[verb]:
        for bounds in all_bounds(size):
            finals = [0] * bounds[-1]
            for plan in plan_all(verb, name, size, bounds, size // 2):
                for row in {row.fold: row for row in plan if row.kind == FOLD and row.final}.values():
                    for i in range(row.start, row.stop):
                        finals[i] += 1
            assert finals == [0] * bounds[0] + [1] * (bounds[-1] - bounds[0]), (name, bounds)


@pytest.mark.parametrize("size", SIZES)
def test_all_to_all_brings_every_part_to_its_place(size):
    dice = random.Random(size)
    for counts in ([[3] * size] * size, [[dice.choice((0, 0, 1, 5)) for _ in range(size)] for _ in range(size)],
                   [[i * (j == 0) for j in range(size)] for i in range(size)], [[0] * size] * size):
        plans = [load("all_to_all", "direct")(rank, size, counts) for rank in range(size)]
        parts = [[[frozenset([(i, j, k)]) for k in range(counts[i][j])] for j in range(size)] for i in range(size)]
        inputs = [list(chain.from_iterable(parts[i])) for i in range(size)]
        wanted = [list(chain.from_iterable(parts[i][j] for i in range(size))) for j in range(size)]
        blank = [[value if next(iter(value))[0] == j else None for value in wanted[j]] for j in range(size)]
        for buffers in (True, False):
            found = simulate(plans, inputs, blank, buffers=buffers)
            assert found.outputs == wanted and found.rounds <= 1
        assert found.sent == [sum(counts[i]) - counts[i][i] for i in range(size)]
        assert races(plans, in_place=False) == []


def run(verb, name, size, count, root=0):
    bounds = cut(count, size)
    inputs, outputs, _ = stage(verb, size, bounds, root)
    return simulate(plan_all(verb, name, size, bounds, root), inputs, outputs)


def depth(size):
    return ceil(log2(size))


ROUNDS = {          # of the longest chain of messages; trees of an odd shape may be quicker than the bound
    ("all_reduce", "ring"): lambda n: 2 * (n - 1), ("all_reduce", "direct"): lambda n: 2,
    ("all_reduce", "halving"): lambda n: 2 * depth(n), ("all_reduce", "tree"): lambda n: 2 * depth(n),
    ("all_reduce", "star"): lambda n: 2,
    ("reduce_scatter", "ring"): lambda n: n - 1, ("reduce_scatter", "direct"): lambda n: 1,
    ("reduce_scatter", "halving"): depth,
    ("all_gather", "ring"): lambda n: n - 1, ("all_gather", "direct"): lambda n: 1, ("all_gather", "halving"): depth,
    ("broadcast", "tree"): depth, ("broadcast", "ring"): lambda n: n - 1,
    ("broadcast", "direct"): lambda n: min(2, n - 1), ("broadcast", "star"): lambda n: 1,
    ("reduce", "tree"): depth, ("reduce", "ring"): lambda n: n - 1, ("reduce", "direct"): lambda n: 2,
    ("reduce", "star"): lambda n: 1,
    ("gather", "direct"): lambda n: 1, ("gather", "star"): lambda n: 1,
    ("scatter", "direct"): lambda n: 1, ("scatter", "star"): lambda n: 1,
}


@pytest.mark.feature("C23")
@pytest.mark.parametrize(("verb", "name"), KINDS)
def test_rounds_are_as_promised(verb, name):
    for size in range(2, 17):
        rounds = run(verb, name, size, 2 * size).rounds
        most = ROUNDS[verb, name](size)
        exact = name not in ("tree", "halving") or log2(size).is_integer()
        assert rounds == most or (not exact and rounds < most), size


@pytest.mark.feature("C23")
@pytest.mark.parametrize("size", range(2, 17))
@pytest.mark.parametrize("name", ("ring", "direct"))
def test_ring_and_direct_move_the_optimum_each_way_on_every_rank(name, size):
    count = 12 * size
    for verb, times in (("all_reduce", 2), ("reduce_scatter", 1), ("all_gather", 1)):
        found = run(verb, name, size, count)
        assert found.sent == found.taken == [times * 12 * (size - 1)] * size
    uneven = run("all_reduce", name, size, count - 1)
    slack = 2 * (size - 1)                     # segments differ by at most one element
    assert all(abs(moved - 2 * (size - 1) * (count - 1) / size) <= slack for moved in uneven.sent + uneven.taken)


@pytest.mark.parametrize("size", range(2, 65))
def test_halving_sends_the_optimum_and_takes_at_most_a_segment_more_per_odd_group(size):
    plans = plan_all("reduce_scatter", "halving", size, cut(size, size))
    for rank, plan in enumerate(plans):
        sent = sum(row.stop - row.start for row in plan if row.kind == SEND)
        taken = sum(row.stop - row.start for row in plan if row.kind == FOLD)
        odd = sum((mine[1] - mine[0] + theirs[1] - theirs[0]) % 2 for _, mine, theirs, _ in halving.splits(rank, size))
        assert sent == size - 1 and taken <= size - 1 + odd <= size - 1 + depth(size)
        if log2(size).is_integer():
            assert taken == size - 1
    for rank, plan in enumerate(plan_all("all_gather", "halving", size, cut(size, size))):
        took = [row.start for row in plan if row.kind == COPY]
        assert sorted(took) == [segment for segment in range(size) if segment != rank]


@pytest.mark.parametrize("size", range(2, 17))
@pytest.mark.parametrize("root", (0, 1))
def test_star_root_moves_two_arrays_per_leaf(size, root):
    found = simulate(plan_all("all_reduce", "star", size, cut(10, size), root), start(size, 10))
    assert found.sent[root] + found.taken[root] == 2 * (size - 1) * 10
    assert all(found.sent[rank] == found.taken[rank] == 10 for rank in range(size) if rank != root)


@pytest.mark.parametrize("size", range(2, 17))
def test_a_root_without_a_segment_moves_the_array_once(size):
    count = 12 * (size - 1)
    for root in range(size):
        bounds = cut(count, size, [float(rank != root) for rank in range(size)])
        out = simulate(plan_all("broadcast", "direct", size, bounds, root), stage("broadcast", size, bounds, root)[0])
        assert max(out.sent) == out.sent[root] == max(out.taken) == count
        back = simulate(plan_all("reduce", "direct", size, bounds, root), start(size, count))
        assert max(back.taken) == back.taken[root] == count and max(back.sent) == count


@pytest.mark.feature("C23", "P11")
@pytest.mark.parametrize("size", SIZES)
def test_broadcast_reaches_all_in_log2_rounds(size):
    for root in range(size):
        plans = plan_all("broadcast", "tree", size, cut(3, size), root)
        found = simulate(plans, stage("broadcast", size, cut(3, size), root)[0])
        assert arrival(plans, root) == depth(size) and sum(found.sent) == 3 * (size - 1)


def arrival(plans, rank, now=0):
    """When the last of rank's subtree has the message, if a rank sends one message per round."""
    children = [row.peer for row in plans[rank] if row.kind == SEND]
    return max([now, *(arrival(plans, child, now + k + 1) for k, child in enumerate(children))])


@pytest.mark.parametrize("verb", ("all_reduce", "all_gather", "reduce_scatter"))
def test_partners_rotate_so_that_no_receiver_is_hit_by_all_at_once(verb):
    for size in range(2, 17):
        plans = plan_all(verb, "direct", size, cut(61, size))
        for place in range(size - 1):
            assert len({[row for row in plan if row.kind == SEND][place].peer for plan in plans}) == size
    counts = [[1] * 9] * 9
    firsts = [load("all_to_all", "direct")(rank, 9, counts)[0].peer for rank in range(9)]
    assert sorted(firsts) == list(range(9))


def test_shares_cut_in_proportion_and_lose_nothing():
    assert cut(100, 4, [1, 1, 1, 0]) == [0, 33, 67, 100, 100]
    assert cut(10, 3) == [0, 3, 6, 10]
    for count in lengths(3):
        for shares in ([1, 2, 3], [0, 0, 1], [0.1, 0.7, 0.2]):
            bounds = cut(count, 3, shares)
            assert bounds[0] == 0 and bounds[-1] == count and bounds == sorted(bounds)


def test_the_simulator_notices_a_broken_schedule():
    plans = [ring.all_reduce(rank, 3, [0, 3, 6, 9]) for rank in range(3)]
    plans[1] = [row._replace(peer=0) if row.kind == SEND else row for row in plans[1]]
    with pytest.raises(AssertionError, match="nobody"):
        simulate(plans, start(3, 9))
    twice = [[Row(FOLD, 1, 0, 4, -1, 0), Row(FOLD, 1, 0, 4, 0, 1)], [Row(SEND, 0, 0, 4), Row(SEND, 0, 0, 4)]]
    with pytest.raises(AssertionError, match="final"):
        simulate(twice, start(2))
    twice[0] = [row._replace(final=True) for row in twice[0]]
    with pytest.raises(AssertionError, match="twice"):
        simulate(twice, start(2))
    lacking = [[Row(COPY, 1, 0, 4)], [Row(SEND, 0, 0, 4)]]
    with pytest.raises(AssertionError, match="does not have"):
        simulate(lacking, [[None] * 4] * 2)
    with pytest.raises(AssertionError, match="cannot finish"):
        simulate([[Row(COPY, 1, 0, 4), Row(SEND, 1, 0, 4, 0)], [Row(COPY, 0, 0, 4), Row(SEND, 0, 0, 4, 0)]], start(2))


def test_the_simulator_notices_what_only_buffers_or_luck_would_carry():
    """Both ranks fold in place what the other sends whole: it must wait for the own SEND, which waits for the other."""
    swap = [[Row(SEND, 1 - rank, 0, 4), Row(FOLD, 1 - rank, 0, 4, 0, 1, True)] for rank in range(2)]
    assert races(swap, in_place=True) == []
    assert simulate(swap, start(2)).outputs == [[frozenset([0, 1])] * 4] * 2
    with pytest.raises(AssertionError, match="cannot finish"):
        simulate(swap, start(2), buffers=False)
    hasty = [[row._replace(after=-1) for row in plan] for plan in swap]
    assert simulate(hasty, start(2)).outputs == [[frozenset([0, 1])] * 4] * 2
    with pytest.raises(AssertionError, match="twice"):
        simulate(hasty, start(2), buffers=False)
    assert len(races(hasty, in_place=True)) == 2 and races(hasty, in_place=False) == []


def test_trees_hang_together():
    for size in SIZES:
        for root in range(size):
            relatives = [tree.relatives(rank, size, root) for rank in range(size)]
            assert relatives[root][0] is None and len(relatives[root][1]) == depth(size)
            assert sorted(child for _, children in relatives for child in children) == sorted({*range(size)} - {root})
            assert all(relatives[child][0] == rank for rank in range(size) for child in relatives[rank][1])
