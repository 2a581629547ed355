"""Two levels: all three phases simulated on even, uneven and interleaved hosts, and the network's bytes counted."""
import random
from math import ceil

import pytest

from fleetcore.schedules import SCHEDULES
from fleetcore.schedules.base import FOLD, cut, shares_for
from fleetcore.schedules.two_level import all_reduce, columns
from tests.fleetcore.schedules.simulator import races, simulate
from tests.fleetcore.schedules.test_schedules import load

HOSTS = [
    [0], [0, 0, 0], [0, 1], [0, 0, 0, 1], [1, 0, 0, 0], [0, 0, 1, 1, 2], [0, 0, 1, 1], [0, 1, 0, 1], [7, 3, 7, 7, 3],
    [0, 0, 0, 1, 1, 1, 2, 2, 2], [rank // 4 for rank in range(16)], [rank % 3 for rank in range(16)], list(range(16)),
    [0] * 13 + [1] * 3, sorted(random.Random(3).choices(range(5), k=16)), random.Random(4).choices(range(4), k=16),
]
INNER = list(SCHEDULES["all_reduce"])


def ends(hosts, plans, count):
    """(arrays after the three phases, what went between hosts): hosts reduce and gather by their bounds."""
    start, local = [], {}
    for rank, host in enumerate(hosts):
        local.setdefault(host, []).append(rank)
    for rank, host in enumerate(hosts):
        k, bounds = local[host].index(rank), plans[rank].bounds
        assert len(bounds) == len(local[host]) + 1 and bounds == sorted(bounds) and (bounds[0], bounds[-1]) == (0, count)
        summed = frozenset(local[host])
        start.append([summed if bounds[k] <= i < bounds[k + 1] else None for i in range(count)])
    crossed = simulate([plan.rows for plan in plans], start)
    arrays = []
    for host in hosts:
        whole = [None] * count
        for k, rank in enumerate(local[host]):
            low, high = plans[rank].bounds[k:k + 2]
            whole[low:high] = crossed.outputs[rank][low:high]
        arrays.append(whole)
    return arrays, crossed


@pytest.mark.parametrize("name", INNER)
@pytest.mark.parametrize("hosts", HOSTS, ids=str)
def test_the_three_phases_make_an_all_reduce(hosts, name):
    size, num_hosts = len(hosts), len(set(hosts))
    for count in sorted({0, 1, size - 1, size, size + 1, 61}):
        for shares in (None, [1.0, *[0.0] * (num_hosts - 1)], shares_for([1 + host for host in range(num_hosts)])):
            plans = [all_reduce(rank, hosts, count, load("all_reduce", name), shares) for rank in range(size)]
            arrays, _ = ends(hosts, plans, count)
            assert arrays == [[frozenset(range(size))] * count] * size
            assert races([plan.rows for plan in plans], in_place=True) == []


def per_host(hosts, moved):
    return {host: sum(each for rank, each in enumerate(moved) if hosts[rank] == host) for host in hosts}


@pytest.mark.parametrize("name", INNER)
@pytest.mark.parametrize("hosts", HOSTS, ids=str)
def test_a_host_sends_and_takes_what_one_rank_per_host_would(hosts, name):
    """Exactly, where the array divides; rows never join two ranks of a host."""
    num_hosts = len(set(hosts))
    drivers = min(hosts.count(host) for host in hosts)
    schedule = load("all_reduce", name)
    count = 2 * drivers * num_hosts
    plans = [all_reduce(rank, hosts, count, schedule) for rank in range(len(hosts))]
    assert all(hosts[row.peer] != hosts[rank] for rank, plan in enumerate(plans) for row in plan.rows)
    alone = simulate([schedule(place, num_hosts, cut(count, num_hosts)) for place in range(num_hosts)],
                     [[frozenset([place])] * count for place in range(num_hosts)])
    _, crossed = ends(hosts, plans, count)
    in_order = list(dict.fromkeys(hosts))
    assert [per_host(hosts, crossed.sent)[host] for host in in_order] == alone.sent
    assert [per_host(hosts, crossed.taken)[host] for host in in_order] == alone.taken
    assert crossed.rounds == alone.rounds
    if name in ("ring", "direct"):
        assert set(alone.sent) == {2 * (num_hosts - 1) * count // num_hosts}


@pytest.mark.parametrize("hosts", HOSTS, ids=str)
def test_columns_take_one_rank_of_every_host_and_drivers_share_the_work(hosts):
    found = columns(hosts)
    assert len(found) == min(hosts.count(host) for host in hosts)
    assert all([hosts[rank] for rank in column] == list(dict.fromkeys(hosts)) for column in found)
    flat = [rank for column in found for rank in column]
    assert len(flat) == len(set(flat))
    count = 61
    plans = [all_reduce(rank, hosts, count, load("all_reduce", "direct")) for rank in range(len(hosts))]
    for rank, plan in enumerate(plans):
        k = [r for r, host in enumerate(hosts) if host == hosts[rank]].index(rank)
        owned = plan.bounds[k + 1] - plan.bounds[k]
        assert (0 < owned <= ceil(count / len(found))) if rank in flat else (owned == 0 and plan.rows == [])


@pytest.mark.parametrize("name", INNER)
def test_a_mean_is_divided_once_between_hosts(name):
    hosts = [0, 0, 1, 1, 2]
    finals = [0] * 61
    for rank in range(5):
        rows = all_reduce(rank, hosts, 61, load("all_reduce", name)).rows
        for row in {row.fold: row for row in rows if row.kind == FOLD and row.final}.values():
            for i in range(row.start, row.stop):
                finals[i] += 1
    assert finals == [1] * 61
