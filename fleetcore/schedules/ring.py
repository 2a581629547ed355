"""C2: the ring (Patarasuk and Yuan 2009): 2(N-1)/N of the array each way per rank, only neighbours talk."""
from fleetcore.schedules.base import COPY, FOLD, SEND, Row, cut


def reduce_scatter(rank, size, count, shares=None):
    """Rank r ends with the reduction of segment r in place; the rest of its array is partial sums."""
    bounds = cut(count, size, shares)
    left, right = (rank - 1) % size, (rank + 1) % size
    rows, folded = [], -1
    for step in range(size - 1):
        out, into = (rank - step - 1) % size, (rank - step - 2) % size
        rows.append(Row(SEND, right, bounds[out], bounds[out + 1], folded))
        folded = len(rows)
        rows.append(Row(FOLD, left, bounds[into], bounds[into + 1], -1, folded, step == size - 2))
    return rows


def all_gather(rank, size, count, shares=None):
    """Rank r starts with segment r in place; all end with all segments."""
    return spread(rank, size, cut(count, size, shares), -1, 0)


def all_reduce(rank, size, count, shares=None):
    """Reduce-scatter, then all-gather; chunks of the second follow the first without a pause."""
    rows = reduce_scatter(rank, size, count, shares)
    return rows + spread(rank, size, cut(count, size, shares), len(rows) - 1, len(rows))


def spread(rank, size, bounds, ready, base):
    """The all-gather half: segment `rank` is complete once row `ready` is; rows are numbered from `base`."""
    left, right = (rank - 1) % size, (rank + 1) % size
    rows = []
    for step in range(size - 1):
        out, into = (rank - step) % size, (rank - step - 1) % size
        rows.append(Row(SEND, right, bounds[out], bounds[out + 1], ready))
        ready = base + len(rows)
        rows.append(Row(COPY, left, bounds[into], bounds[into + 1]))
    return rows
