"""Elections in a made-up world: a clock, a network with delays, cuts and deaths, and what must hold at every moment."""
import heapq
import itertools
import math
import random
from collections import defaultdict

from pyfleet.members import Node
from pyfleet.membership.ballots import Send
from pyfleet.membership.election import Election, Installed, Lost

SILENCE_S = 3.0         # HealthSettings.dead_after_s


def node(peer, incarnation="1", slots=1):
    return Node(peer=peer, incarnation=incarnation.rjust(16, "0"), slots=slots)


class Wire:
    """A connection of two nodes: what is under way in each direction, and which ends still hold it."""

    def __init__(self, nodes):
        self.nodes = nodes                              # {name: card at the time}
        self.holds = set(nodes)
        self.last = defaultdict(float)                  # direction -> time of the latest arrival: order is kept
        self.heard = {}


class World:
    """Nodes that talk; time goes on with run(). Breaches of what must always hold raise AssertionError at once."""

    def __init__(self, seed=0, *, delay_s=0.02, num_nodes=0, **options):
        self.random = random.Random(seed)
        self.delay_s, self.options = delay_s, options
        self.now = 100.0
        self.living: dict[str, Election] = {}
        self.wires: dict[frozenset, Wire] = {}
        self.cuts: set[frozenset] = set()
        self.decided = {}                               # (fleet, epoch) -> view
        self.epochs = {}                                # (name, incarnation, fleet) -> epoch
        self.lost = []
        self.installed = []                             # (when, name, view)
        self.num_sent = defaultdict(int)
        self._events, self._numbers = [], itertools.count()
        self._incarnations = defaultdict(int)
        self._at(self.now, self._beat)
        for number in range(num_nodes):
            self.start("abcdefghijklmnop"[number])

    # ---- what a test does --------------------------------------------------------------------------------------------

    def start(self, name, **options):
        """A new incarnation of a node begins."""
        self._incarnations[name] += 1
        card = node(name, str(self._incarnations[name]), options.pop("slots", 1))
        self.living[name] = Election(card, **{**self.options, **options})
        self._act(name, self.living[name].tick(self.now))
        return self.living[name]

    def kill(self, name):
        """It dies; its kernel ends the connections behind what is under way."""
        del self.living[name]
        for pair, wire in list(self.wires.items()):
            if name in pair:
                wire.holds.discard(name)
                other = next(iter(pair - {name}))
                if pair not in self.cuts:
                    self._at(self._arrival(wire, name), self._ended, wire, other, True)

    def leave(self, name):
        self._act(name, self.living[name].leave(self.now))
        self.kill(name)

    def cut(self, *groups):
        """Nothing passes between these groups of names any more."""
        for a, b in itertools.combinations(groups, 2):
            for pair in itertools.product(a, b):
                self.cuts.add(frozenset(pair))

    def heal(self):
        """Everything passes again. What waited behind a cut comes through, where the connection still stands."""
        self.cuts.clear()

    def run(self, seconds):
        """Let time pass."""
        end = self.now + seconds
        while True:
            due = min((e.deadline for e in self.living.values() if e.deadline is not None), default=math.inf)
            if self._events and self._events[0][0] <= min(due, end):
                self.now, _, what, args = heapq.heappop(self._events)
                what(*args)
            elif due <= end:
                self.now = max(self.now, due)
                name = next(name for name, e in self.living.items() if e.deadline == due)
                self._act(name, self.living[name].tick(self.now))
                again = self.living.get(name)
                assert again is None or again.deadline is None or again.deadline > self.now, "a deadline that stays"
            else:
                self.now = end
                break
            self.check()
        return self

    def until(self, holds, seconds):
        """Let time pass until this holds; return how long it took."""
        began = self.now
        while not holds():
            assert self.now < began + seconds, f"not within {seconds} s: {self.told()}"
            self.run(0.01)
        return self.now - began

    # ---- what a test asks --------------------------------------------------------------------------------------------

    def agreed(self, names=None):
        """The one view of these nodes (all by default), if they agree on one with exactly them in it."""
        names = set(self.living if names is None else names)
        views = [self.living[name].view for name in names]
        if None in views or len(set(views)) != 1 or set(views[0].peers) != names:
            return None
        return views[0]

    def leaders(self):
        return [name for name, election in self.living.items() if election.leading]

    def told(self):
        views = {name: election.view for name, election in self.living.items()}
        return {name: (self.living[name].state, view and (view.fleet, view.epoch, view.peers)) for name, view in views.items()}

    def check(self):
        leading = [election.view.fleet for election in self.living.values() if election.leading]
        assert len(leading) == len(set(leading)), f"two leaders: {self.told()}"

    # ---- how it works ------------------------------------------------------------------------------------------------

    def _at(self, when, what, *args):
        heapq.heappush(self._events, (when, next(self._numbers), what, args))

    def _arrival(self, wire, source):
        """Order of one direction is kept."""
        wire.last[source] = max(wire.last[source], self.now + self.random.uniform(0.1, 1.0) * self.delay_s)
        return wire.last[source]

    def _act(self, name, actions):
        election = self.living[name]
        for action in actions:
            if isinstance(action, Send):
                self.num_sent[type(action.message).__name__] += 1
                wire = self.wires.get(frozenset((name, action.peer)))
                if wire is not None and name in wire.holds and wire.nodes[name] == election.own:
                    self._at(self._arrival(wire, name), self._arrive, wire, name, action.peer, action.message)
            elif isinstance(action, Installed):
                view = action.view
                assert self.decided.setdefault((view.fleet, view.epoch), view) == view, "two views of one epoch"
                key = (name, election.own.incarnation, view.fleet)
                assert self.epochs.get(key, 0) < view.epoch, "an epoch that does not grow"
                self.epochs[key] = view.epoch
                self.installed.append((self.now, name, view))
            else:
                assert isinstance(action, Lost)
                self.lost.append((self.now, name, action))

    def _arrive(self, wire, source, target, message):
        pair = frozenset((source, target))
        if target not in wire.holds:
            return
        if pair in self.cuts:                           # sent again until it passes, or is given up
            self._at(self.now + 0.2, self._arrive, wire, source, target, message)
            return
        wire.heard[target] = self.now
        self._act(target, self.living[target].received(source, message, self.now))

    def _ended(self, wire, name, dead):
        """A connection's end reaches this end of it."""
        if name not in wire.holds:
            return
        other = next(peer for peer in wire.nodes if peer != name)
        if frozenset(wire.nodes) in self.cuts:
            return                                      # silence will tell
        wire.holds.discard(name)
        self._act(name, self.living[name].down(other, wire.nodes[other].incarnation, dead, self.now))

    def _beat(self):
        """Once a second: heartbeats, silence, and new connections."""
        for pair, wire in list(self.wires.items()):
            for name in sorted(wire.holds):
                other = next(iter(pair - {name}))
                if pair not in self.cuts and other in wire.holds:
                    wire.heard[name] = self.now
                    self._act(name, self.living[name].heard(other, self.now))
                elif self.now >= wire.heard[name] + SILENCE_S:
                    wire.holds.discard(name)
                    self._act(name, self.living[name].down(other, wire.nodes[other].incarnation, False, self.now))
                    if other in wire.holds:             # its kernel tells the other, who has no proof in that
                        self._at(self._arrival(wire, name), self._ended, wire, other, False)
            if not wire.holds:
                del self.wires[pair]
        self._connect()
        self._at(self.now + self.random.uniform(0.2, 0.4), self._beat)

    def _connect(self):
        for pair in map(frozenset, itertools.combinations(sorted(self.living), 2)):
            if pair not in self.wires and pair not in self.cuts:
                wire = self.wires[pair] = Wire({name: self.living[name].own for name in sorted(pair)})
                for name in wire.nodes:
                    other = next(iter(pair - {name}))
                    wire.heard[name] = self.now
                    wire.last[name] = self.now          # nothing overtakes the news that the connection stands
                for name in wire.nodes:
                    other = next(iter(pair - {name}))
                    self._at(self.now + self.random.uniform(0, 0.05), self._stands, wire, name, other)
                    wire.last[other] = self.now + 0.05

    def _stands(self, wire, name, other):
        if name in wire.holds:
            self._act(name, self.living[name].up(other, wire.nodes[other], self.now))
