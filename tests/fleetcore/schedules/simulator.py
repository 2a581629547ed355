"""Runs schedules of all ranks without sockets: every message takes one tick, elements hold sets of contributions."""
from itertools import pairwise
from typing import NamedTuple

from fleetcore.schedules.base import COPY, FOLD, SEND


class Outcome(NamedTuple):
    outputs: list         # per rank: what its output holds at the end, element by element
    rounds: int           # length of the longest chain of messages
    sent: list            # elements sent, per rank
    taken: list           # elements received, per rank


def simulate(plans, inputs, outputs=None, *, buffers=True):
    """Carry out plans[rank] (lists of Row) for all ranks.

    Args:    inputs: per rank, the frozenset of contributions at each element; None where there is nothing to read.
             outputs: likewise, what lies there at the start; None: the verb works in place.
             buffers: False for wires that hold nothing: a SEND ends only when the peer is ready to take it, and what is
             folded together arrives together. Whoever finishes so, finishes with buffers of any size.
    Raises:  AssertionError for a plan that breaks a rule of schedules.base or cannot finish.
    """
    in_place = outputs is None
    given = [list(array) for array in inputs]
    inputs = [list(array) for array in inputs]
    outputs = inputs if in_place else [list(array) for array in outputs]
    ages = [[0] * len(array) for array in inputs]       # ticks after which an element has its value
    late = ages if in_place else [[0] * len(array) for array in outputs]
    check_rules(plans, [len(array) for array in inputs], [len(array) for array in outputs])
    order, source, _ = ordered(plans, buffers)
    wires, rounds = {}, 0
    everyone = [frozenset().union(*filter(None, values)) for values in zip(*inputs, strict=False)]
    sent, taken = [0] * len(plans), [0] * len(plans)
    for event in order:
        for rank, k in event:
            row = plans[rank][k]
            if row.kind == SEND:
                memory, age = (inputs, ages) if row.after < 0 else (outputs, late)
                content = memory[rank][row.start:row.stop]
                assert None not in content, f"rank {rank} sends what it does not have: {row}"
                wires[rank, k] = content, age[rank][row.start:row.stop]
                sent[rank] += len(content)
        folded = {}
        for rank, k in event:
            row = plans[rank][k]
            if row.kind == SEND:
                continue
            content, when = wires.pop(source[rank, k])
            span = slice(row.start, row.stop)
            if row.kind == FOLD:
                mine, old = (inputs, ages) if row.after < 0 else (outputs, late)
                before, known = folded.get(rank) or (mine[rank][span], old[rank][span])
                assert None not in before, f"rank {rank} folds into what it does not have: {row}"
                content = [disjoint_union(a, b) for a, b in zip(before, content, strict=True)]
                folded[rank] = content, [max(a, b + 1) for a, b in zip(known, when, strict=True)]
            else:
                folded[rank] = content, [age + 1 for age in when]
            outputs[rank][span], late[rank][span] = folded[rank]
            if row.kind == FOLD and (rank, k) == [each for each in event if plans[each[0]][each[1]].kind == FOLD][-1]:
                complete = {value == whole for value, whole in zip(content, everyone[span], strict=True)}
                assert complete <= {row.final}, f"final must say whether the reduction is complete: {row}"
            taken[rank] += len(content)
            rounds = max([rounds, *late[rank][span]])
    assert not wires, "messages that nobody takes"
    assert in_place or inputs == given, "an input was changed"
    return Outcome(outputs, rounds, sent, taken)


def disjoint_union(mine, theirs):
    assert not mine & theirs, f"contributions of {sorted(mine & theirs)} would count twice"
    return mine | theirs


def ordered(plans, buffers=True):
    """(events in an order in which they can happen, row -> the row that sends to it, row -> (its event, its past)).

    A row is (rank, index); an event is a list of rows that happen together: those of one fold and, without buffers,
    also the SENDs that they take from. The past is a bit set of the events that surely went before, and of its own.
    """
    source, lanes = {}, {}
    for rank, plan in enumerate(plans):
        for k, row in enumerate(plan):
            lanes.setdefault((rank, row.peer, row.kind == SEND), []).append((rank, k))
    for (rank, peer, sends), rows in lanes.items():
        other = lanes.get((peer, rank, not sends), [])
        assert len(rows) == len(other), "messages that nobody takes, or that nobody sends: the schedule cannot finish"
        if not sends:
            source.update(zip(rows, other, strict=True))
    for (rank, k), (peer, j) in source.items():
        here, there = plans[rank][k], plans[peer][j]
        assert here.stop - here.start == there.stop - there.start, f"{there} meets {here}"
    events, group = [], {}
    for rank, plan in enumerate(plans):
        folds = {}
        for k, row in enumerate(plan):
            if row.kind == FOLD:
                folds.setdefault(row.fold, []).append((rank, k))
            elif row.kind == COPY or buffers:
                events.append([(rank, k)])
        events += folds.values()
    if not buffers:
        events = [[*rows, *(source[row] for row in rows)] for rows in events]
    for number, rows in enumerate(events):
        group.update(dict.fromkeys(rows, number))
    needs = [set() for _ in events]
    for (rank, k), number in group.items():
        if plans[rank][k].after >= 0:
            needs[number].add(group[rank, plans[rank][k].after])
        if buffers and (rank, k) in source:
            needs[number].add(group[source[rank, k]])
    for rows in lanes.values():
        for earlier, later in pairwise(rows):
            needs[group[later]].add(group[earlier])
    waiting, then = [len(need) for need in needs], [[] for _ in events]
    for number, need in enumerate(needs):
        for before in need:
            then[before].append(number)
    order, past = [number for number, count in enumerate(waiting) if not count], [0] * len(events)
    for number in order:                                # grows while it is walked
        past[number] |= 1 << number
        for later in then[number]:
            past[later] |= past[number]
            waiting[later] -= 1
            if not waiting[later]:
                order.append(later)
    assert len(order) == len(events), "the schedule cannot finish"
    return [events[number] for number in order], source, {row: (number, past[number]) for row, number in group.items()}


def races(plans, in_place):
    """Pairs of rows of a rank that touch the same element, one writing, in an order that only chance decides."""
    _, _, past = ordered(plans)
    found = []
    for rank, plan in enumerate(plans):
        for j, write in enumerate(plan):
            if write.kind == SEND:
                continue
            for k, row in enumerate(plan):
                apart = row.kind == SEND and row.after < 0 and not in_place
                if k == j or apart or max(row.start, write.start) >= min(row.stop, write.stop):
                    continue
                (one, before_one), (other, before_other) = past[rank, j], past[rank, k]
                if not (before_one >> other & 1 or before_other >> one & 1):
                    found.append((rank, write, row))
    return found


def check_rules(plans, num_in, num_out):
    for rank, plan in enumerate(plans):
        folds = {}
        for k, row in enumerate(plan):
            reads_input = row.kind == SEND and row.after < 0
            assert 0 <= row.start <= row.stop <= (num_in if reads_input else num_out)[rank], row
            assert row.peer != rank and 0 <= row.peer < len(plans)
            assert row.after < k
            if row.after >= 0 and row.stop > row.start:
                before = plan[row.after]
                assert before.start <= row.start and row.stop <= before.stop, f"{before} does not cover {row}"
            assert (row.fold >= 0) == (row.kind == FOLD)
            assert not row.final or row.kind == FOLD
            if row.kind == FOLD:
                folds.setdefault(row.fold, []).append(row)
        for together in folds.values():
            assert len({(row.start, row.stop, row.after, row.final) for row in together}) == 1, together
            assert len({row.peer for row in together}) == len(together), together
