"""C2: binomial trees: ceil(log2 N) rounds, for broadcasts and for messages where latency is all."""
from fleetcore.schedules.base import COPY, FOLD, SEND, Row


def relatives(rank, size, root):
    """(parent or None, children from the largest subtree down) of `rank` in the binomial tree at `root`."""
    place = (rank - root) % size
    step, children = 1, []
    while step < size and not place & step:
        if place + step < size:
            children.append((place + step + root) % size)
        step *= 2
    parent = None if place == 0 else (place - step + root) % size
    return parent, children[::-1]


def broadcast(rank, size, bounds, root=0):
    """Everyone ends with root's array."""
    parent, children = relatives(rank, size, root)
    rows = [] if parent is None else [Row(COPY, parent, bounds[0], bounds[size])]
    return rows + [Row(SEND, child, bounds[0], bounds[size], len(rows) - 1) for child in children]


def reduce(rank, size, bounds, root=0):
    """Root ends with the reduction: everyone folds in its children, smallest subtree first, then tells its parent."""
    parent, children = relatives(rank, size, root)
    rows = []
    for k, child in enumerate(reversed(children)):
        last = parent is None and k == len(children) - 1
        rows.append(Row(FOLD, child, bounds[0], bounds[size], len(rows) - 1, len(rows), last))
    if parent is not None:
        rows.append(Row(SEND, parent, bounds[0], bounds[size], len(rows) - 1))
    return rows


def all_reduce(rank, size, bounds, root=0):
    """Fold up the tree, then broadcast down: 2 ceil(log2 N) latencies, the whole array on every hop."""
    parent, children = relatives(rank, size, root)
    rows = reduce(rank, size, bounds, root)
    if parent is not None:
        rows.append(Row(COPY, parent, bounds[0], bounds[size]))
    ready = len(rows) - 1
    return rows + [Row(SEND, child, bounds[0], bounds[size], ready) for child in children]
