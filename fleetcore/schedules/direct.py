"""C2: direct exchange: everyone sends everyone its segment, owners reduce in rank order, everyone gathers.

The ring's volume in two latencies instead of 2(N-1), and a sum that does not depend on who is where. The default for
small groups on a switch. Partners rotate, so that no receiver is hit by all senders at once.
"""
from fleetcore.schedules.base import COPY, FOLD, SEND, Row, cut


def all_reduce(rank, size, count, shares=None):
    """Every rank ends with the whole reduction; segment r is reduced by rank r."""
    bounds = cut(count, size, shares)
    own = bounds[rank], bounds[rank + 1]
    others = [(rank + k) % size for k in range(1, size)]
    rows = []
    for peer in others:
        rows.append(Row(SEND, peer, bounds[peer], bounds[peer + 1]))
    for peer in reversed(others):
        rows.append(Row(FOLD, peer, *own, -1, 0, True))
    reduced = len(rows) - 1
    for peer in others:
        rows.append(Row(SEND, peer, *own, reduced))
    for peer in reversed(others):
        rows.append(Row(COPY, peer, bounds[peer], bounds[peer + 1]))
    return rows
