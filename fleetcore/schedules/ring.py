"""C2: the ring (Patarasuk and Yuan 2009): 2(N-1)/N of the array each way per rank, only neighbours talk.

Rooted verbs run along the chain root, root + 1, ...: every link carries the array once, chunk after chunk.
"""
from fleetcore.schedules.base import COPY, FOLD, SEND, Row


def reduce_scatter(rank, size, bounds, root=0):
    """Rank r ends with the reduction of segment r; the rest of its output is partial sums."""
    left, right = (rank - 1) % size, (rank + 1) % size
    rows, folded = [], -1
    for step in range(size - 1):
        out, into = (rank - step - 1) % size, (rank - step - 2) % size
        rows.append(Row(SEND, right, bounds[out], bounds[out + 1], folded))
        folded = len(rows)
        rows.append(Row(FOLD, left, bounds[into], bounds[into + 1], -1, folded, step == size - 2))
    return rows


def all_gather(rank, size, bounds, root=0):
    """Rank r starts with segment r; all end with all segments."""
    return spread(rank, size, bounds, -1, 0)


def all_reduce(rank, size, bounds, root=0):
    """Reduce-scatter, then all-gather; chunks of the second follow the first without a pause."""
    rows = reduce_scatter(rank, size, bounds)
    return rows + spread(rank, size, bounds, len(rows) - 1, len(rows))


def broadcast(rank, size, bounds, root=0):
    """Everyone ends with root's array, handed down the chain: N-1 latencies, the array once over every link."""
    place = (rank - root) % size
    rows = [Row(COPY, (rank - 1) % size, bounds[0], bounds[size])] if place else []
    if place < size - 1:
        rows.append(Row(SEND, (rank + 1) % size, bounds[0], bounds[size], len(rows) - 1))
    return rows


def reduce(rank, size, bounds, root=0):
    """Root ends with the reduction, summed up along the chain that begins after it: N-1 latencies."""
    place = (rank - root - 1) % size           # root comes last
    rows = []
    if place:
        rows.append(Row(FOLD, (rank - 1) % size, bounds[0], bounds[size], -1, 0, place == size - 1))
    if place < size - 1:
        rows.append(Row(SEND, (rank + 1) % size, bounds[0], bounds[size], len(rows) - 1))
    return rows


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
