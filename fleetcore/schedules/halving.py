"""C2: recursive halving and doubling (Rabenseifner 2004) for any N: the ring's volume in 2 ceil(log2 N) latencies.

A group of ranks splits into a front and a back of equal size, or with one rank more in front. Each rank of the front
has a partner at the back; it sends that one its data of all the back's segments and takes those of the front's, and
so on within the halves. The odd rank in front sends each rank at the back its own segment directly and takes nothing:
so every rank sends just (N-1)/N of the array, as if N were a power of two, and takes at most one segment more for
each odd group that it passes through. Gathering runs the same way backwards.
"""
from fleetcore.schedules.base import COPY, FOLD, SEND, Row


def reduce_scatter(rank, size, bounds, root=0):
    """Rank r ends with the reduction of segment r; the rest of its output is partial sums."""
    rows, folded, late = [], -1, []
    for partner, mine, theirs, strays in splits(rank, size):
        if partner is None:
            rows += [Row(SEND, peer, bounds[peer], bounds[peer + 1], folded) for peer in strays]
            continue
        rows.append(Row(SEND, partner, bounds[theirs[0]], bounds[theirs[1]], folded))
        number, late = len(rows), late + strays
        if mine[1] - mine[0] > 1:
            rows.append(Row(FOLD, partner, bounds[mine[0]], bounds[mine[1]], folded, number))
            folded = number
        else:                                  # down to the own segment: what the odd ranks sent comes in here
            rows += [Row(FOLD, peer, bounds[rank], bounds[rank + 1], folded, number, True)
                     for peer in (partner, *late)]
    return rows


def all_gather(rank, size, bounds, root=0):
    """Rank r starts with segment r; all end with all segments."""
    return spread(rank, size, bounds, -1, 0)


def all_reduce(rank, size, bounds, root=0):
    """Reduce-scatter, then all-gather; chunks of the second follow the first without a pause."""
    rows = reduce_scatter(rank, size, bounds)
    return rows + spread(rank, size, bounds, len(rows) - 1, len(rows))


def splits(rank, size):
    """What befalls `rank` from the whole group down: (partner or None, own half, other half, strays).

    Halves are ranges (first rank, end). For the odd rank in front, partner is None and strays are all ranks at the
    back; for a rank at the back, strays holds the odd rank in front, if there is one; else it is empty.
    """
    first, end, found = 0, size, []
    while end - first > 1:
        middle = (first + end + 1) // 2
        front, back = (first, middle), (middle, end)
        odd = [middle - 1] if (end - first) % 2 else []
        if rank in odd:
            found.append((None, front, back, list(range(*back))))
        elif rank < middle:
            found.append((rank - first + middle, front, back, []))
        else:
            found.append((rank - middle + first, back, front, odd))
        first, end = front if rank < middle else back
    return found


def spread(rank, size, bounds, ready, base):
    """The all-gather half: segment `rank` is complete once row `ready` is; rows are numbered from `base`."""
    rows, held = [], {rank: ready}             # segment -> the row that brings it here
    for partner, mine, theirs, strays in reversed(splits(rank, size)):
        if partner is None:
            arriving = [(segment, segment) for segment in strays]
        else:
            rows += [Row(SEND, peer, bounds[rank], bounds[rank + 1], ready) for peer in strays]
            rows += [Row(SEND, partner, bounds[segment], bounds[segment + 1], held[segment])
                     for segment in starting(rank, mine)]
            arriving = [(partner, segment) for segment in starting(partner, theirs)]
        for peer, segment in arriving:
            held[segment] = base + len(rows)
            rows.append(Row(COPY, peer, bounds[segment], bounds[segment + 1]))
    return rows


def starting(rank, half):
    """The ranks of a half in the order in which `rank` sends their segments: its own first, as it is there first."""
    return [*range(rank, half[1]), *range(half[0], rank)]
