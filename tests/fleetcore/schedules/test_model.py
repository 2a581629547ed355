"""The model asks what the schedules ask, counted row by row, and chooses as the arithmetic says."""
from math import inf, log2

import pytest

from fleetcore.schedules import SCHEDULES
from fleetcore.schedules.base import FOLD, SEND, cut, shares_around, shares_for
from fleetcore.schedules.model import LOADS, Links, choose, depth, predict
from tests.fleetcore.schedules.simulator import simulate
from tests.fleetcore.schedules.test_schedules import load, plan_all, stage

GIGABIT = 125e6
KINDS = [(verb, name) for verb, names in SCHEDULES.items() for name in names]
KiB, MiB = 1 << 10, 1 << 20


def lan(size, *, slow=(), bandwidth=GIGABIT, **more):
    """A switched network of machines; those in slow have a tenth of the others' bandwidth."""
    bandwidths = tuple(bandwidth / 10 if rank in slow else bandwidth for rank in range(size))
    return Links(**{"latency_s": 100e-6, "overhead_s": 5e-6, "bandwidths": bandwidths} | more)


def test_every_schedule_has_its_load_in_the_same_order():
    assert [(verb, *names) for verb, names in LOADS.items()] == [(verb, *names) for verb, names in SCHEDULES.items()]


def rows_of(verb, name, size, root):
    """(plans, rounds, elements) of an array that is cut as choose() takes for granted."""
    count = 64 * size * max(1, size - 1)
    if verb == "all_to_all":
        plans = [load(verb, name)(rank, size, [[64 * (size - 1)] * size] * size) for rank in range(size)]
        return plans, 1, count
    shares = shares_around(size, root) if name == "direct" and verb in ("broadcast", "reduce") else None
    bounds = cut(count, size, shares)
    plans = plan_all(verb, name, size, bounds, root)
    kept = [[row for row in plan if row.stop > row.start] for plan in plans]
    small = cut(2 * size * max(1, size - 1), size, shares)
    rounds = simulate(plan_all(verb, name, size, small, root), *stage(verb, size, small, root)[:2]).rounds
    return kept, rounds, count


@pytest.mark.parametrize(("verb", "name"), KINDS)
@pytest.mark.parametrize("size", (2, 3, 4, 5, 7, 8, 9, 12, 16))
def test_loads_are_what_the_rows_say(verb, name, size):
    for root in (0, size - 1):
        asked = LOADS[verb][name](size, lan(size), root)
        plans, rounds, count = rows_of(verb, name, size, root)
        sent = [sum(row.stop - row.start for row in plan if row.kind == SEND) / count for plan in plans]
        taken = [sum(row.stop - row.start for row in plan if row.kind != SEND) / count for plan in plans]
        odd = not log2(size).is_integer() and name in ("tree", "halving")
        assert asked.rounds == rounds or (odd and asked.rounds > rounds)
        assert asked.moved == pytest.approx(sum(sent))
        assert asked.all_messages == sum(map(len, plans))
        total = [sum(volumes) for volumes in zip(*asked.stages, strict=True)]
        busier = [max(ways) for ways in zip(sent, taken, strict=True)]
        assert all(all_stages >= one_way - 1e-9 for all_stages, one_way in zip(total, busier, strict=True))
        if len(asked.stages) == 1:
            assert max(total) == pytest.approx(max(busier))
        else:
            assert max(map(max, asked.stages)) <= max(busier) + 1e-9
        # The chain of messages runs over several ranks, but no rank outside it has more to do.
        assert asked.messages >= max(map(len, plans)) * (2 / 3 if name == "tree" else 1)
        assert asked.messages <= sum(sorted(map(len, plans))[-asked.rounds - 1:])


@pytest.mark.parametrize("verb", SCHEDULES)
@pytest.mark.parametrize("size", (1, 2, 3, 13, 64))
@pytest.mark.parametrize("nbytes", (0, 1, 300 * KiB, 1 << 40))
def test_the_choice_is_the_quickest_and_the_first_of_equals(verb, size, nbytes):
    for links in (lan(size), lan(size, slow={size // 2}), lan(size, shared_cores=2)):
        choice = choose(verb, size, nbytes, links, root=size - 1)
        assert list(choice.seconds) == list(SCHEDULES[verb])
        assert all(0 <= seconds < inf for seconds in choice.seconds.values())
        quickest = min(choice.seconds.values())
        assert choice.seconds[choice.name] == pytest.approx(quickest)
        ahead = list(choice.seconds)[:list(choice.seconds).index(choice.name)]
        assert all(choice.seconds[name] > quickest for name in ahead)
        assert choose(verb, size, nbytes, links, root=size - 1) == choice


def test_the_candidates_can_be_restricted():
    assert choose("all_reduce", 8, 4, lan(8), names=("ring", "tree")).name == "tree"
    assert list(choose("all_reduce", 8, 4, lan(8), names=["ring"]).seconds) == ["ring"]
    with pytest.raises(ValueError, match="none of"):
        choose("gather", 8, 4, lan(8), names=["ring"])
    with pytest.raises(ValueError, match="bandwidths"):
        choose("gather", 8, 4, lan(7))


def seconds(name, size, nbytes, links=None):
    return choose("all_reduce", size, nbytes, links or lan(size)).seconds[name]


def crossover(quicker, size):
    """Bytes from which the ring is at least as quick; the other algorithm must win below and never again."""
    wins = [seconds(quicker, size, 1 << k) < seconds("ring", size, 1 << k) for k in range(34)]
    assert wins == sorted(wins, reverse=True)
    return 1 << wins.index(False)


@pytest.mark.feature("P11")
@pytest.mark.parametrize("size", range(4, 65))
def test_the_tree_beats_the_ring_below_one_crossover(size):
    assert seconds("ring", size, 0) == pytest.approx(2 * (size - 1) * 110e-6)
    assert seconds("tree", size, 0) == pytest.approx(2 * depth(size) * 110e-6)
    assert 1 * KiB < crossover("tree", size) <= 1 * MiB


@pytest.mark.parametrize("size", range(3, 65))
def test_halving_beats_the_ring_below_a_crossover_and_for_powers_of_two_always(size):
    links = lan(size, overhead_s=0.0)
    if log2(size).is_integer():
        assert all(seconds("halving", size, 1 << k, links) < seconds("ring", size, 1 << k, links) for k in range(34))
    elif size > 4:
        assert seconds("halving", size, 1 * KiB, links) < seconds("ring", size, 1 * KiB, links)
        assert seconds("halving", size, 1 << 34, links) > seconds("ring", size, 1 << 34, links)


@pytest.mark.parametrize("size", range(2, 65))
def test_small_arrays_take_few_rounds_and_large_ones_the_least_volume(size):
    small, large = (choose("all_reduce", size, nbytes, lan(size)).name for nbytes in (4, 1 << 30))
    assert small in (("ring",) if size == 2 else ("star", "tree", "direct"))
    assert large in (("ring",) if size == 2 else ("direct",) if size <= 9 else ("ring", "halving"))
    assert (large == "halving") == (size > 9 and log2(size).is_integer())


def test_the_star_is_for_two_or_three_and_a_few_bytes():
    for size in (2, 3):
        found = choose("all_reduce", size, 4, lan(size)).seconds
        assert found["star"] <= 1.001 * min(found.values())
    for size in range(3, 65):
        found = choose("all_reduce", size, 1 << 30, lan(size)).seconds
        assert found["star"] > (size - 1) / 2 * min(found.values())
    costly = lan(64, overhead_s=100e-6)                         # where messages cost most, a tree shares them out
    assert choose("all_reduce", 64, 4, costly).name == "tree"


def test_a_slow_link_costs_direct_one_array_and_the_ring_nearly_two():
    nbytes, links = 100 * 10 ** 6, lan(4, slow={2}, latency_s=0.0, overhead_s=0.0)
    found = choose("all_reduce", 4, nbytes, links)
    assert found.name == "direct"
    assert found.seconds["direct"] == pytest.approx(nbytes / (GIGABIT / 10))
    assert found.seconds["ring"] == pytest.approx(1.5 * nbytes / (GIGABIT / 10))
    shares = shares_for(links.bandwidths)
    plans = plan_all("all_reduce", "direct", 4, cut(3000, 4, shares))
    moved = [sum(row.stop - row.start for row in plan if row.kind == SEND) for plan in plans]
    assert moved == [5000, 5000, 3000, 5000]


def test_broadcast_fits_the_root_s_link():
    """A root on a slow link sends its array once, whatever the size of the fleet, not once per child."""
    links = lan(8, slow={3}, latency_s=0.0, overhead_s=0.0)
    for verb in ("broadcast", "reduce"):
        found = choose(verb, 8, 1 << 30, links, root=3)
        slowest = (1 << 30) / (GIGABIT / 10)
        assert found.name in ("ring", "direct") and found.seconds[found.name] == pytest.approx(slowest, rel=0.02)
        assert found.seconds["star"] == pytest.approx(7 * slowest)
        assert found.seconds["tree"] == pytest.approx(3 * slowest)


def test_on_one_host_bytes_and_messages_of_all_ranks_add_up():
    apart, together = lan(8, bandwidth=1e9), lan(8, bandwidth=1e9, shared_cores=2)
    for name in LOADS["all_reduce"]:
        asked = LOADS["all_reduce"][name](8, apart, 0)
        assert predict(asked, 1 << 30, together) >= predict(asked, 1 << 30, apart)
        assert predict(asked, 1 << 30, together) > 14 * (1 << 30) / 2e9
    roomy = lan(8, bandwidth=1e9, shared_cores=64)
    assert seconds("direct", 8, 1 << 30, roomy) == pytest.approx(seconds("direct", 8, 1 << 30, apart))
    assert choose("all_reduce", 8, 4, lan(8, shared_cores=2)).name in ("star", "tree")      # the fewest messages in all


def test_many_senders_crowd_a_port():
    wide, shallow = lan(16, fan_in=15), lan(16)
    assert choose("all_reduce", 16, 1 << 30, wide).name == "direct"
    assert choose("all_reduce", 16, 1 << 30, shallow).name == "halving"
    crowded, free = (seconds("direct", 16, 1 << 30, links) for links in (shallow, wide))
    assert crowded == pytest.approx(15 / 8 * free, rel=0.01)


def test_reductions_counted_are_the_promised_ones():
    """Every contribution but one is folded once per element, whatever the algorithm: none hides work in its rows."""
    for name in SCHEDULES["all_reduce"]:
        for size in (2, 5, 8):
            plans = plan_all("all_reduce", name, size, cut(40, size))
            assert sum(row.stop - row.start for plan in plans for row in plan if row.kind == FOLD) == 40 * (size - 1)


def test_with_slack_the_first_of_those_that_are_nearly_as_quick():
    links = lan(4)
    assert choose("all_reduce", 4, 100 << 20, links).name == "direct"
    assert choose("all_reduce", 4, 100 << 20, links, slack=0.01).name == "ring"
    assert choose("all_reduce", 4, 1 << 10, links, slack=0.01).name != "ring"
