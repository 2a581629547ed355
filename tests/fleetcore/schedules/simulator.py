"""Runs schedules of all ranks without sockets: every message takes one tick, arrays hold sets of contributions."""
from fleetcore.schedules.base import COPY, FOLD, SEND


def simulate(plans, count, own):
    """Carry out plans[rank] (lists of Row) for all ranks, element by element, in the executor's order.

    Args:    own(rank, i) -> the frozenset that rank starts with at element i.
    Returns: (arrays, rounds, sent): the final sets, the length of the longest chain of messages, elements sent per rank.
    Raises:  AssertionError for a plan that breaks a rule of schedules.base or cannot finish.
    """
    size = len(plans)
    arrays = [[own(rank, i) for i in range(count)] for rank in range(size)]
    age = [[0] * count for _ in range(size)]            # ticks after which an element has its value
    wires = {(a, b): [] for a in range(size) for b in range(size)}
    done = [[False] * len(plan) for plan in plans]
    sent = [0] * size
    check_rules(plans, count)
    progress = True
    while progress:
        progress = False
        for rank, plan in enumerate(plans):
            blocked = set()                             # per peer and direction, rows go in order
            folds = {}
            for k, row in enumerate(plan):
                if row.kind == FOLD:
                    folds.setdefault(row.fold, []).append(k)
            for k, row in enumerate(plan):
                lane = (row.peer, row.kind == SEND)
                if done[rank][k]:
                    continue
                ready = lane not in blocked and (row.after < 0 or done[rank][row.after])
                span = range(row.start, row.stop)
                if ready and row.kind == SEND:
                    wires[rank, row.peer].append((row, [(arrays[rank][i], age[rank][i]) for i in span]))
                    sent[rank] += len(span)
                    done[rank][k] = progress = True
                elif ready and row.kind == COPY and wires[row.peer, rank]:
                    took(wires[row.peer, rank], row, arrays[rank], age[rank], lambda mine, theirs: theirs)
                    done[rank][k] = progress = True
                elif ready and row.kind == FOLD:
                    group = folds[row.fold]
                    if all(heads(wires, plan, done[rank], rank, j) for j in group):
                        for j in group:
                            took(wires[plan[j].peer, rank], plan[j], arrays[rank], age[rank], disjoint_union)
                            done[rank][j] = True
                        progress = True
                    else:
                        blocked.add(lane)
                if not done[rank][k]:
                    blocked.add(lane)
    assert all(map(all, done)), "the schedule cannot finish"
    assert not any(wires.values()), "messages that nobody takes"
    return arrays, max((max(ages, default=0) for ages in age), default=0), sent


def heads(wires, plan, done, rank, j):
    """Whether row j is next on its lane and its message is there."""
    earlier = [k for k in range(j) if plan[k].peer == plan[j].peer and plan[k].kind != SEND and not done[k]]
    return not earlier and wires[plan[j].peer, rank]


def took(wire, row, array, age, combine):
    message, content = wire.pop(0)
    assert (message.start, message.stop) == (row.start, row.stop), f"{message} meets {row}"
    for i, (value, when) in zip(range(row.start, row.stop), content, strict=True):
        array[i] = combine(array[i], value)
        age[i] = max(age[i] if combine is disjoint_union else 0, when + 1)


def disjoint_union(mine, theirs):
    assert not mine & theirs, f"contributions of {sorted(mine & theirs)} would count twice"
    return mine | theirs


def check_rules(plans, count):
    for rank, plan in enumerate(plans):
        for k, row in enumerate(plan):
            assert 0 <= row.start <= row.stop <= count and row.peer != rank and 0 <= row.peer < len(plans)
            assert row.after < k
            if row.after >= 0 and row.stop > row.start:
                before = plan[row.after]
                assert before.start <= row.start and row.stop <= before.stop, f"{before} does not cover {row}"
            assert (row.fold >= 0) == (row.kind == FOLD)
