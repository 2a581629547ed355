"""Every order of events of a few elections, up to bounds: messages of each pair in order, faults and timers anywhere.

A fault is a crash (the kernel ends the connections behind what was sent; also in the middle of what a step sends), or a
cut of the network in two, or of one pair. Free of charge: silence noticed at each end of a cut, healing, and
reconnecting. Timers fire in the order of their deadlines, before or after any message.

In every state: all views that anybody installed of one epoch are one view, and the epochs of an incarnation grow.
From every `sample`-th state, with the network healed, the dead restarted and everything fair: all end up in one view.
"""
import dataclasses
import functools
import itertools
import math
import random
import time
from typing import NamedTuple

import msgspec

from pyfleet.members import Node
from pyfleet.membership.ballots import Ballots, Send
from pyfleet.membership.election import Election, Installed
from tests.pyfleet.membership.world import node

_CONSTANT = {"own", "min_nodes", "settings", "num_views", "_order", "_now"}
_MESSAGES, _NUMBERS = [], {}                            # under way are numbers: a message is hashed once, and not in every state


class Breach(AssertionError):
    """Something that must never be; `trace` is how it came to be."""

    def __init__(self, what, trace):
        super().__init__(f"{what}\n" + "\n".join(trace))
        self.trace = trace


def number(message):
    if message not in _NUMBERS:
        _NUMBERS[message] = len(_MESSAGES)
        _MESSAGES.append(message)
    return _NUMBERS[message]


def copy(value):
    """A copy as deep as what changes."""
    if isinstance(value, dict):
        return type(value)((key, copy(item)) for key, item in value.items())
    if isinstance(value, set):
        return value.copy()
    if isinstance(value, OPAQUE):
        return value
    if isinstance(value, Election | Ballots) or dataclasses.is_dataclass(value):
        new = object.__new__(type(value))
        for name, item in vars(value).items():
            new.__dict__[name] = item if name in _CONSTANT else copy(item)
        return new
    return value


OPAQUE = (str, int, float, tuple, frozenset, msgspec.Struct, type(None))


def frozen(value):
    """What tells apart two values that may behave differently, hashable."""
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else value
    if isinstance(value, Node):
        return value.incarnation
    if isinstance(value, OPAQUE):
        return value
    if isinstance(value, dict):
        return frozenset((key, frozen(item)) for key, item in value.items())
    if isinstance(value, set):
        return frozenset(value)
    return tuple(frozen(item) for name, item in vars(value).items() if name not in _CONSTANT)


class Local:
    """An election at some moment; never changed. Its steps are remembered, as most orders of events repeat them."""

    __slots__ = ("_next", "election", "key")
    _all: dict = {}                                     # noqa: RUF012

    def __init__(self, election, key):
        self.election, self.key, self._next = election, key, {}

    @classmethod
    def of(cls, election):
        key = (election.own.peer, election.own.incarnation, frozen(election))
        found = cls._all.get(key)
        if found is None:
            found = cls._all[key] = cls(election, hash(key))
        return found

    def step(self, now, event, *args):
        """(the election after it, its sends as (peer, number of the message), the views that it installed)."""
        known = self._next.get((now, event, args))
        if known is None:
            election = copy(self.election)
            peer, *rest = args or (None,)
            if event == "received":
                rest = [_MESSAGES[rest[0]]]
            elif event == "up":
                rest = [node(peer, rest[0])]
            actions = getattr(election, event)(*((peer, *rest) if args else ()), now)
            sends = tuple((action.peer, number(action.message)) for action in actions if isinstance(action, Send))
            views = tuple(action.view for action in actions if isinstance(action, Installed))
            known = self._next[now, event, args] = (Local.of(election), sends, views)
        return known


class State:
    """Nodes, connections, and what is still allowed to happen. Changed only in a copy."""

    __slots__ = ("cuts", "decided", "epochs", "faults", "nodes", "now", "restarts", "ticks", "wires")

    def copy(self):
        new = State.__new__(State)
        new.nodes, new.wires, new.cuts = self.nodes.copy(), self.wires.copy(), self.cuts
        new.decided, new.epochs = self.decided, self.epochs
        new.now, new.faults, new.ticks, new.restarts = self.now, self.faults, self.ticks, self.restarts
        return new

    def key(self):
        return hash((tuple(local and local.key for local in self.nodes.values()), frozenset(self.wires.items()), self.cuts,
                     self.faults, self.ticks, self.restarts, round(self.now, 6), frozenset(self.decided.items())))


class Wire(NamedTuple):
    """A connection: the ends that hold it, the incarnations between which it was made, what is under way from each end."""

    holds: frozenset
    ends: tuple                                         # ((name, incarnation), (name, incarnation)), sorted
    under_way: tuple                                    # (numbers of messages of the first, of the second)
    crashed: frozenset = frozenset()                    # ends that died while they held it

    def queue(self, name):
        return self.under_way[name != self.ends[0][0]]

    def with_queue(self, name, queue):
        first = name == self.ends[0][0]
        return self._replace(under_way=(queue, self.under_way[1]) if first else (self.under_way[0], queue))


class Explorer:
    """Explores from a start state.

    Args:    faults, ticks, restarts: how many may happen.  sample: every how many states the fair ending is tried; 0: never.
             seed: None takes what may happen next in a fixed order, a number in one drawn from it: for those that stop early.
    """

    def __init__(self, start, *, faults=2, ticks=2, restarts=1, sample=50, seed=None):
        self.random = seed is not None and random.Random(seed)
        self.start = start.copy()
        self.start.faults, self.start.ticks, self.start.restarts = faults, ticks, restarts
        self.sample = sample
        self.num_states = self.num_endings = 0
        self.is_complete = False

    def run(self, *, seconds=math.inf, states=math.inf, depth=math.inf):
        """Visit all states, or as many as the bounds allow, depth first. Raises: Breach."""
        end = time.monotonic() + seconds
        seen = {self.start.key()}
        stack = [(self._moves(self.start), self.start)]
        trace = [""]
        self.num_states, shallow = 1, False
        while stack:
            move = next(stack[-1][0], None)
            if move is None:
                stack.pop()
                trace.pop()
                continue
            what, act = move
            state = stack[-1][1].copy()
            try:
                act(state)
            except AssertionError as breach:
                raise Breach(str(breach), [*trace[1:], str(what)]) from breach
            key = state.key()
            if key in seen:
                continue
            seen.add(key)
            self.num_states += 1
            if self.sample and self.num_states % self.sample == 0:
                self.num_endings += 1
                try:
                    fair_ending(state)
                except AssertionError as breach:
                    raise Breach(str(breach), [*trace[1:], str(what), "a fair ending"]) from breach
            if self.num_states >= states or time.monotonic() > end:
                return self
            if len(stack) < depth:
                stack.append((self._moves(state), state))
                trace.append(str(what))
            else:
                shallow = True
        self.is_complete = not shallow
        return self

    def _moves(self, state):
        found = list(moves(state))
        if self.random:
            self.random.shuffle(found)
        return iter(found)


def starting(names, settled=True, **options):
    """Nodes that are connected with each other; in one view unless `settled` is False."""
    state = State()
    state.nodes = {name: Local.of(Election(node(name), **options)) for name in names}
    state.wires, state.cuts, state.decided, state.epochs = {}, frozenset(), {}, {}
    state.now, state.faults, state.ticks, state.restarts = 0.0, 0, math.inf, 0
    for name in names:
        step(state, None, name, "tick")
    for pair in itertools.combinations(sorted(names), 2):
        connect(state, pair)
    if settled:
        settle(state, lambda: agreed(state))
    return state


def joining(names, newcomer):
    """A view, and a node that has just connected to its members."""
    state = starting(names, min_nodes=len(names))
    state.nodes[newcomer] = Local.of(Election(node(newcomer)))
    for name in names:
        connect(state, tuple(sorted((name, newcomer))))
    return state


def changing(names):
    """A view whose leader is about to propose another order."""
    state = starting(names, min_nodes=len(names), order=lambda seats: sorted(seats, key=lambda seat: seat.peer, reverse=True))
    leader = copy(state.nodes[names[0]].election)
    leader._order = lambda seats: sorted(seats, key=lambda seat: seat.peer)
    leader.want_change(state.now)
    state.nodes[names[0]] = Local.of(leader)
    return state


def agreed(state):
    living = {name: local.election for name, local in state.nodes.items() if local is not None}
    views = {election.view for election in living.values()}
    return len(views) == 1 and None not in views and set(next(iter(views)).peers) == set(living)


def settle(state, holds, seconds=20.0):
    """Deliver everything in order, reconnect, fire timers when due, until this holds and nothing is under way."""
    end, last = state.now + seconds, []
    while True:
        timers = []
        for what, act in moves(state, faults=False):
            if what[0] != "timer":
                last.append(what)
                assert len(last) < 5000, "messages without end:\n" + "\n".join(map(str, last[-20:]))
                act(state)
                break
            timers.append(act)
        else:
            if holds():
                return
            told = {name: local and (local.election.state, local.election.deadline, local.election.view)
                    for name, local in state.nodes.items()}
            assert timers, f"nothing happens any more: {told}"
            last.append("a timer")
            assert len(last) < 5000, f"timers without end at {state.now}: {told}"
            timers[0](state)
            assert state.now < end, f"no agreement within {seconds} s: {told}"


def fair_ending(state):
    """From here on nothing bad happens any more."""
    state = state.copy()
    state.cuts, state.faults, state.ticks = frozenset(), 0, math.inf
    state.restarts = sum(local is None for local in state.nodes.values())
    settle(state, lambda: agreed(state))


# ---- what may happen -----------------------------------------------------------------------------------------------------

def moves(state, faults=True):
    """(in words, function that changes a copy of the state) of everything that may happen next."""
    for what, act, local, event in steps(state):
        yield what, lambda new, act=act: act(new, None)
        if faults and state.faults:                     # the node may crash in the middle of it
            for sent in range(1, len(local.step(*event)[1])):
                yield (*what, "then crashes after sends:", sent), lambda new, act=act, sent=sent: act(new, sent)
    for pair in itertools.combinations(sorted(state.nodes), 2):
        if pair not in state.wires and frozenset(pair) not in state.cuts and None not in map(state.nodes.get, pair):
            yield ("connect", *pair), lambda new, pair=pair: connect(new, pair)
    if state.cuts:
        yield ("heal",), heal
    for name, local in state.nodes.items():
        if local is None and state.restarts:
            yield ("restart", name), lambda new, name=name: restart(new, name)
    if not faults or not state.faults:
        return
    for name, local in state.nodes.items():
        if local is not None:
            yield ("crash", name), lambda new, name=name: crash(new, name)
    if not state.cuts:
        for cut in cuts(tuple(state.nodes)):
            yield ("cut", sorted(map(sorted, cut))), lambda new, cut=cut: cut_network(new, cut)


@functools.cache
def cuts(names):
    """Every way to part the network in two, and every way to part two nodes."""
    pairs = [frozenset(pair) for pair in itertools.combinations(names, 2)]
    groups = [set(group) for size in range(1, len(names)) for group in itertools.combinations(names, size)]
    found = {frozenset(pair for pair in pairs if len(pair & group) == 1) for group in groups}
    return sorted(found | {frozenset([pair]) for pair in pairs}, key=lambda cut: sorted(map(sorted, cut)))


def steps(state):
    """(in words, function(state, sends before a crash or None), Local, its event) of what nodes do by themselves."""
    for pair, wire in state.wires.items():
        is_cut = frozenset(pair) in state.cuts
        for name, other in (pair, pair[::-1]):
            if name not in wire.holds:
                continue
            queue, local = wire.queue(other), state.nodes[name]
            if queue and not is_cut:
                event = (state.now, "received", other, queue[0])
                yield ((name, "<-", other, _MESSAGES[queue[0]]),
                       lambda new, sent, pair=pair, name=name, other=other: deliver(new, sent, pair, name, other), local, event)
            if is_cut or (other not in wire.holds and not queue):
                dead = other in wire.crashed and not is_cut
                event = (state.now, "down", other, dict(wire.ends)[other], dead)
                yield ((name, "loses", other, "dead" if dead else "silent" if is_cut else "hung up"),
                       lambda new, sent, pair=pair, event=event, name=name: hang_up(new, sent, pair, name, event), local, event)
    due = [(local.election.deadline, name) for name, local in state.nodes.items()
           if local is not None and local.election.deadline is not None]
    if due and state.ticks:
        first = min(due)[0]
        for when, name in due:
            if when <= first:
                now = max(state.now, first)
                yield (("timer", name, now), lambda new, sent, name=name, now=now: tick(new, sent, name, now),
                       state.nodes[name], (now, "tick"))


def step(state, sent, name, *event):
    """One step of a node, or the part of it until so many sends."""
    local, sends, views = state.nodes[name].step(state.now, *event)
    state.nodes[name] = local
    for other, message in sends[:sent]:
        pair = (name, other) if name < other else (other, name)
        wire = state.wires.get(pair)
        if wire is not None and len(wire.holds) == 2 and (name, local.election.own.incarnation) in wire.ends:
            state.wires[pair] = wire.with_queue(name, (*wire.queue(name), message))
    if sent is not None:
        crash(state, name)
        return
    for view in views:
        known = state.decided.get((view.fleet, view.epoch), view)
        assert known == view, f"two views of one epoch: {known}, {view}"
        key = (name, local.election.own.incarnation, view.fleet)
        assert state.epochs.get(key, 0) < view.epoch, f"an epoch that does not grow: {view}"
        state.decided = state.decided | {(view.fleet, view.epoch): view}
        state.epochs = state.epochs | {key: view.epoch}


def deliver(state, sent, pair, name, other):
    wire = state.wires[pair]
    message, *rest = wire.queue(other)
    state.wires[pair] = wire.with_queue(other, tuple(rest))
    step(state, sent, name, "received", other, message)


def hang_up(state, sent, pair, name, event):
    """The connection is over at this end; what was under way to it is lost."""
    wire, other = state.wires[pair], event[2]
    if wire.holds == {name}:
        del state.wires[pair]
    else:
        state.wires[pair] = wire._replace(holds=wire.holds - {name}).with_queue(other, ())
    step(state, sent, name, *event[1:])


def connect(state, pair):
    ends = tuple((name, state.nodes[name].election.own.incarnation) for name in pair)
    state.wires[pair] = Wire(frozenset(pair), ends, ((), ()))
    for (name, _), (other, incarnation) in (ends, ends[::-1]):
        step(state, None, name, "up", other, incarnation.lstrip("0"))


def tick(state, sent, name, now):
    state.ticks -= 1
    state.now = now
    for pair, wire in state.wires.items():              # heartbeats go on meanwhile
        if len(wire.holds) == 2 and frozenset(pair) not in state.cuts:
            for one, other in (pair, pair[::-1]):
                step(state, None, one, "heard", other)
    step(state, sent, name, "tick")


def crash(state, name):
    """Its kernel sends what was written, and then the end of each connection."""
    state.faults -= 1
    state.nodes[name] = None
    for pair, wire in list(state.wires.items()):
        if name in pair:
            other = pair[pair[0] == name]
            if other not in wire.holds:
                del state.wires[pair]
            elif name in wire.holds:
                state.wires[pair] = wire._replace(holds=wire.holds - {name}, crashed=wire.crashed | {name}).with_queue(other, ())


def cut_network(state, cut):
    state.faults -= 1
    state.cuts = cut


def heal(state):
    state.cuts = frozenset()


def restart(state, name):
    """A new incarnation, with a number that its predecessors had not."""
    state.restarts -= 1
    used = [1, *(int(incarnation) for known, incarnation, _ in state.epochs if known == name)]
    used += [int(dict(wire.ends)[name]) for pair, wire in state.wires.items() if name in pair]
    used += [int(local.election._up[name].incarnation) for local in state.nodes.values()
             if local is not None and name in local.election._up]
    state.nodes[name] = Local.of(Election(node(name, str(1 + max(used)))))
    step(state, None, name, "tick")
