"""C2: two levels: shared memory within each host, links between hosts, which carry what one rank per host would send.

1. On each host, the local ranks reduce: local rank k ends with the host's sum of segment k.
2. Column k is made of local rank k of every host: it all-reduces segment k over the links, with any schedule.
3. On each host, the local ranks gather: everyone ends with all segments.

Every host drives as many segments as the smallest host has ranks, so that all columns reach all hosts and a host's
link is fed by several processes at once; the ranks beyond that own nothing and only take part within their host.
The sum is complete in phase 2 (where its rows are `final`), and in phase 1 when there is but one host.
"""
from typing import NamedTuple

from fleetcore.schedules.base import cut


class Plan(NamedTuple):
    """One rank's part."""

    bounds: list      # local rank k owns [bounds[k], bounds[k + 1]) in phases 1 and 3; one more than the host has ranks
    rows: list        # phase 2, in place, peers as ranks of the group; empty for a rank that drives nothing


def all_reduce(rank, hosts, count, inner, shares=None) -> Plan:
    """What `rank` does in each phase of an all-reduce in place.

    Args:    hosts: per rank, the number of its host; any numbers, ranks of a host need not be neighbours.
             inner: the all_reduce schedule of a column, (place, number of hosts, bounds, root) -> rows.
             shares: sizes of the segments within a column, one per host in order of first rank; None: equal ones.
    """
    found = columns(hosts)
    drives = cut(count, len(found))
    num_local = hosts.count(hosts[rank])
    bounds = drives + [count] * (num_local - len(found))
    for k, column in enumerate(found):
        if rank in column:
            within = [drives[k] + bound for bound in cut(drives[k + 1] - drives[k], len(column), shares)]
            rows = inner(column.index(rank), len(column), within, 0)
            return Plan(bounds, [row._replace(peer=column[row.peer]) for row in rows])
    return Plan(bounds, [])


def columns(hosts) -> list[tuple]:
    """The ranks that drive each segment between them: column k has local rank k of every host, in order of hosts."""
    members = {}                               # host -> its ranks; hosts in order of their first rank
    for rank, host in enumerate(hosts):
        members.setdefault(host, []).append(rank)
    return list(zip(*members.values(), strict=False))      # as many as the smallest host has ranks
