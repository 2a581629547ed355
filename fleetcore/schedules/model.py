"""C2: the alpha-beta model: what each algorithm would take on measured links, and so which one to use.

    seconds = rounds * latency  +  messages * overhead  +  the time of its stages

Rounds is the longest chain of messages; messages are what the ranks of that chain send and take one after the other. A
stage is what each rank moves in its busier direction, in arrays; it takes max_i volume_i * S / B_i, so that a slow link
counts where it is. Stages run into each other chunk by chunk: the longest takes its full time, the others that of one
chunk. Segments are equal but for direct's all_reduce (shares_for), broadcast and reduce (shares_around). With f_i the
share of rank i, L = ceil(log2 N) and H = sum_k ceil(N / 2^k), down to 1, which is N-1 for powers of 2:

                              rounds    messages         stages
    all_reduce      ring      2(N-1)    4(N-1)           2(N-1)/N on every link
                    direct    2         4(N-1)           1 + (N-2) f_i
                    halving   2L        2(N-1) + 2L      (N-1 + H)/N
                    tree      2L        4L               in, out: L at root
                    star      2         2N               in, out: N-1 at root
    reduce_scatter, ring      N-1       2(N-1)           (N-1)/N on every link
    all_gather      direct    1         2(N-1)           (N-1)/N on every link
                    halving   L         2L or 2(N-1)     H/N
    broadcast       tree      L         2L               L at root
                    ring      N-1       2(N-1)           1 on each of N-1 links
                    direct    2         3N-4             out: 1 at root; then (N-2)/(N-1) elsewhere
                    star      1         N                N-1 at root
    reduce          tree, ring and star as broadcast
                    direct    2         3N-2             1 everywhere; then in: 1 at root
    gather, scatter           1         N                (N-1)/N at root
    all_to_all      direct    1         2(N-1)           (N-1)/N, where S is what one rank holds
"""
from math import fsum
from typing import NamedTuple

from fleetcore.schedules.base import shares_for


class Links(NamedTuple):
    """What was measured of the links. All ranks must hold the same figures, or they would choose differently."""

    latency_s: float                   # from a send to its arrival, for the first byte
    bandwidths: tuple                  # per rank: bytes/s each way while both ways are busy
    overhead_s: float = 0.0            # of a rank, per message that it sends or takes: system call, frame, wake-up
    chunk_bytes: int = 512 * 1024      # as in the executor
    fan_in: int = 8                    # peers that may send to a rank at full speed; beyond, shallow switches drop
    shared_cores: int = 0              # of the one host that all ranks live on; 0: they have machines of their own


class Load(NamedTuple):
    """What an algorithm asks of its ranks."""

    rounds: int
    messages: int
    all_messages: int     # of all ranks, sent and taken
    stages: tuple         # of lists: arrays that each rank moves in its busier direction
    moved: float          # arrays that cross the wires in all
    senders: int          # most peers that send to one rank at the same time


class Choice(NamedTuple):
    """The best algorithm and the predicted seconds of every candidate."""

    name: str
    seconds: dict


def choose(verb, size, nbytes, links, root=0, names=None, slack=0.0) -> Choice:
    """The quickest algorithm for a verb over an array of nbytes; of equally quick ones, the first in LOADS.

    A pure function of its arguments: ranks that hold the same Links choose the same. `direct` is rated with the bounds
    that suit it: cut by shares_for the bandwidths in all_reduce, by shares_around root in broadcast and reduce.

    Args:    nbytes: of the whole array; for all_to_all, of what one rank holds.
             names: the algorithms to choose from; None: all that the verb has.
             slack: by how much of the best time others may be slower and still count as equally quick.
    Raises:  ValueError when bandwidths are not one per rank, or when no candidate is left.
    """
    if len(links.bandwidths) != size:
        raise ValueError(f"{len(links.bandwidths)} bandwidths for {size} ranks")
    seconds = {name: predict(load(size, links, root), nbytes, links) if size > 1 else 0.0
               for name, load in LOADS[verb].items() if names is None or name in names}
    if not seconds:
        raise ValueError(f"{verb} has none of {names}")
    best = min(seconds.values())
    # Formulas that mean the same differ in their last bits; what is told apart must be more than that.
    return Choice(next(name for name, time in seconds.items() if time <= best * (1 + max(slack, 1e-9))), seconds)


def predict(load, nbytes, links) -> float:
    """Seconds that a Load takes for nbytes."""
    crowding = max(1.0, load.senders / links.fan_in)
    chunk = min(nbytes, links.chunk_bytes)

    def lasts(stage, amount):
        return crowding * max(volume * amount / bandwidth
                              for volume, bandwidth in zip(stage, links.bandwidths, strict=True))
    times = [lasts(stage, nbytes) for stage in load.stages]
    messages = load.messages
    if links.shared_cores:             # stages take turns, and so do ranks: what they do at once elsewhere adds up here
        busy = max(fsum(times), load.moved * nbytes / (links.shared_cores * min(links.bandwidths)))
        messages = max(messages, load.all_messages / links.shared_cores)
    else:
        starts = [lasts(stage, chunk) for stage in load.stages]
        busy = fsum(starts) + max(time - start for time, start in zip(times, starts, strict=True))
    return load.rounds * links.latency_s + messages * links.overhead_s + busy


def depth(size):
    """ceil(log2 N), exactly."""
    return (size - 1).bit_length()


# ---- what the algorithms ask for ------------------------------------------------------------------------------------


def ring_pass(size, links, root):
    return Load(size - 1, 2 * (size - 1), 2 * size * (size - 1), ([(size - 1) / size] * size,), size - 1, 1)


def direct_pass(size, links, root):
    return Load(1, 2 * (size - 1), 2 * size * (size - 1), ([(size - 1) / size] * size,), size - 1, size - 1)


def halving_scatter(size, links, root):
    longest, everyone = halving_messages(size)
    return Load(depth(size), longest, everyone, ([halving_volume(size) / size] * size,), size - 1, 1)


def halving_gather(size, links, root):
    """As many messages as segments: those that came with different messages may not all be there yet."""
    volume = halving_volume(size)
    return Load(depth(size), size - 1 + volume, 2 * size * (size - 1), ([volume / size] * size,), size - 1, 1)


def halving_volume(size):
    """Segments that the busiest rank takes on the way down the halves."""
    total = 0
    while size > 1:
        size = (size + 1) // 2
        total += size
    return total


def halving_messages(size):
    """(messages on the longest way down the halves, messages sent and taken by all)."""
    if size < 2:
        return 0, 0
    half = size // 2
    if size % 2 == 0:
        longest, everyone = halving_messages(half)
        return longest + 2, 2 * everyone + 2 * size
    (front, in_front), (_, at_back) = halving_messages(half + 1), halving_messages(half)
    return front + max(2, half), in_front + at_back + 6 * half         # the odd rank in front has most to send


def ring_all_reduce(size, links, root):
    return both(ring_pass(size, links, root), ring_pass(size, links, root))


def halving_all_reduce(size, links, root):
    """What odd groups cost more is taken in the first half and sent in the second, so that each way has it once."""
    each = (size - 1 + halving_volume(size)) / size
    return both(halving_scatter(size, links, root), halving_gather(size, links, root))._replace(stages=([each] * size,))


def direct_all_reduce(size, links, root):
    volumes = [1 + (size - 2) * share for share in shares_for(links.bandwidths)]
    one_way = direct_pass(size, links, root)
    return both(one_way, one_way)._replace(stages=(volumes,))


def tree_reduce(size, links, root):
    return tree_broadcast(size, links, root)._replace(senders=depth(size))


def tree_broadcast(size, links, root):
    volumes = [0] * size
    for place in range(size):
        lowest = place & -place or size        # children stand at place + 1, 2, 4, ... below the lowest bit of place
        children = sum(place + (1 << k) < size for k in range(depth(lowest)))
        volumes[(root + place) % size] = max(1, children)
    return Load(depth(size), 2 * depth(size), 2 * (size - 1), (volumes,), size - 1, 1)


def tree_all_reduce(size, links, root):
    return chained(tree_reduce(size, links, root), tree_broadcast(size, links, root))


def star_broadcast(size, links, root):
    volumes = [1 if rank != root else size - 1 for rank in range(size)]
    return Load(1, size, 2 * (size - 1), (volumes,), size - 1, 1)


def star_reduce(size, links, root):
    return star_broadcast(size, links, root)._replace(senders=size - 1)


def star_all_reduce(size, links, root):
    return chained(star_reduce(size, links, root), star_broadcast(size, links, root))


def star_scatter(size, links, root):
    volumes = [(1 if rank != root else size - 1) / size for rank in range(size)]
    return Load(1, size, 2 * (size - 1), (volumes,), (size - 1) / size, 1)


def star_gather(size, links, root):
    return star_scatter(size, links, root)._replace(senders=size - 1)


def ring_chain(size, links, root):
    hops = [[float(rank in ((root + hop) % size, (root + hop + 1) % size)) for rank in range(size)]
            for hop in range(size - 1)]
    return Load(size - 1, 2 * (size - 1), 2 * (size - 1), tuple(hops), size - 1, 1)


def ring_chain_up(size, links, root):
    return ring_chain(size, links, (root + 1) % size)


def direct_broadcast(size, links, root):
    dealt = [1 if rank == root else 1 / (size - 1) for rank in range(size)]
    spread = [0 if rank == root else (size - 2) / (size - 1) for rank in range(size)]
    return Load(min(2, size - 1), 3 * size - 4, 2 * (size - 1) ** 2, (dealt, spread), size - 1, max(1, size - 2))


def direct_reduce(size, links, root):
    handed = [1 if rank == root else 1 / (size - 1) for rank in range(size)]
    return Load(2, 3 * size - 2, 2 * size * (size - 1), ([1] * size, handed), size, size - 1)


def both(one, other):
    """One after the other through the same links: the volumes of their single stages add up."""
    volumes = [a + b for a, b in zip(one.stages[0], other.stages[0], strict=True)]
    return chained(one, other)._replace(stages=(volumes,))


def chained(one, other):
    """One after the other, the second in the other direction: their stages run into each other."""
    return Load(one.rounds + other.rounds, one.messages + other.messages, one.all_messages + other.all_messages,
                one.stages + other.stages, one.moved + other.moved, max(one.senders, other.senders))


LOADS = {       # the algorithms of SCHEDULES, in its order
    "all_reduce": {"ring": ring_all_reduce, "direct": direct_all_reduce, "halving": halving_all_reduce,
                   "tree": tree_all_reduce, "star": star_all_reduce},
    "reduce_scatter": {"ring": ring_pass, "direct": direct_pass, "halving": halving_scatter},
    "all_gather": {"ring": ring_pass, "direct": direct_pass, "halving": halving_gather},
    "broadcast": {"tree": tree_broadcast, "ring": ring_chain, "direct": direct_broadcast, "star": star_broadcast},
    "reduce": {"tree": tree_reduce, "ring": ring_chain_up, "direct": direct_reduce, "star": star_reduce},
    "gather": {"direct": star_gather, "star": star_gather},
    "scatter": {"direct": star_scatter, "star": star_scatter},
    "all_to_all": {"direct": direct_pass},
}
