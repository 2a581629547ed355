"""C2: direct exchange: everyone sends everyone its segment, owners reduce in rank order, everyone gathers.

The ring's volume in two latencies instead of 2(N-1), and a sum that does not depend on who is where. The default for
small groups on a switch. Partners rotate, so that no receiver is hit by all senders at once.
"""
from fleetcore.schedules.base import COPY, FOLD, SEND, Row


def reduce_scatter(rank, size, bounds, root=0):
    """Rank r ends with the reduction of segment r; one latency, nothing else of its output is touched."""
    others = partners(rank, size)
    rows = [Row(SEND, peer, bounds[peer], bounds[peer + 1]) for peer in others]
    return rows + [Row(FOLD, peer, bounds[rank], bounds[rank + 1], -1, 0, True) for peer in reversed(others)]


def all_gather(rank, size, bounds, root=0):
    """Rank r starts with segment r; all end with all segments, one latency later."""
    return spread(rank, size, bounds, -1)


def all_reduce(rank, size, bounds, root=0):
    """Every rank ends with the whole reduction; segment r is reduced by rank r."""
    rows = reduce_scatter(rank, size, bounds)
    return rows + spread(rank, size, bounds, len(rows) - 1)


def broadcast(rank, size, bounds, root=0):
    """Everyone ends with root's array: root deals out the segments, then all exchange them.

    Root sends its own segment to everyone itself: give it none, and it sends the array once, not nearly twice.
    """
    others = partners(rank, size)
    own = bounds[rank], bounds[rank + 1]
    if rank == root:
        return ([Row(SEND, peer, bounds[peer], bounds[peer + 1]) for peer in others]
                + [Row(SEND, peer, *own) for peer in others])
    rows = [Row(COPY, root, *own)]
    rows += [Row(SEND, peer, *own, 0) for peer in others if peer != root]
    return rows + [Row(COPY, peer, bounds[peer], bounds[peer + 1]) for peer in reversed(others)]


def reduce(rank, size, bounds, root=0):
    """Root ends with the reduction: segment r is reduced by rank r, which hands it to root.

    Root reduces its own segment itself: give it none, and it takes the array once, not nearly twice.
    """
    rows = reduce_scatter(rank, size, bounds)
    if rank == root:
        return rows + [Row(COPY, peer, bounds[peer], bounds[peer + 1]) for peer in reversed(partners(rank, size))]
    return [*rows, Row(SEND, root, bounds[rank], bounds[rank + 1], len(rows) - 1)]


def all_to_all(rank, size, counts):
    """Rank i ends with what every j has for it; counts[i][j] elements go from i to j.

    Input and output are laid out by rank and hold the own part, too, which the caller copies.
    """
    def place_in(parts, peer):
        start = sum(parts[:peer])
        return start, start + parts[peer]
    others = partners(rank, size)
    theirs = [row[rank] for row in counts]
    rows = [Row(SEND, peer, *place_in(counts[rank], peer)) for peer in others]
    return rows + [Row(COPY, peer, *place_in(theirs, peer)) for peer in reversed(others)]


def partners(rank, size):
    """The other ranks, nearest successor first: at the k-th place of their lists, all ranks have different ones."""
    return [(rank + k) % size for k in range(1, size)]


def spread(rank, size, bounds, ready):
    """The all-gather half: the own segment is complete once row `ready` is."""
    others = partners(rank, size)
    rows = [Row(SEND, peer, bounds[rank], bounds[rank + 1], ready) for peer in others]
    return rows + [Row(COPY, peer, bounds[peer], bounds[peer + 1]) for peer in reversed(others)]
