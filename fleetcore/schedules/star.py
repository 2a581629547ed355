"""C2: the star: one rank takes from all and gives to all. Two latencies and the fewest messages; root carries it all.

Sensible for two or three ranks, for small arrays, and for verbs whose data lie at root anyway.
"""
from fleetcore.schedules.base import COPY, FOLD, SEND, Row


def all_reduce(rank, size, bounds, root=0):
    """Root reduces all arrays in rank order and sends the result to all: 2(N-1) arrays pass it."""
    rows = reduce(rank, size, bounds, root)
    if rank != root:
        return [*rows, Row(COPY, root, bounds[0], bounds[size])]
    ready = len(rows) - 1
    return rows + [Row(SEND, peer, bounds[0], bounds[size], ready) for peer in leaves(size, root)]


def reduce(rank, size, bounds, root=0):
    """Root ends with the reduction, summed in rank order; one latency."""
    if rank != root:
        return [Row(SEND, root, bounds[0], bounds[size])]
    return [Row(FOLD, peer, bounds[0], bounds[size], -1, 0, True) for peer in leaves(size, root)]


def broadcast(rank, size, bounds, root=0):
    """Everyone ends with root's array; one latency."""
    if rank != root:
        return [Row(COPY, root, bounds[0], bounds[size])]
    return [Row(SEND, peer, bounds[0], bounds[size]) for peer in leaves(size, root)]


def gather(rank, size, bounds, root=0):
    """Root ends with every rank's segment."""
    if rank != root:
        return [Row(SEND, root, bounds[rank], bounds[rank + 1])]
    return [Row(COPY, peer, bounds[peer], bounds[peer + 1]) for peer in leaves(size, root)]


def scatter(rank, size, bounds, root=0):
    """Every rank ends with its segment of root's array."""
    if rank != root:
        return [Row(COPY, root, bounds[rank], bounds[rank + 1])]
    return [Row(SEND, peer, bounds[peer], bounds[peer + 1]) for peer in leaves(size, root)]


def leaves(size, root):
    return [(root + k) % size for k in range(1, size)]
