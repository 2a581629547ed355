"""Every collective verb as a benchmark calls it: what goes in and must come out, the least it has to move, and who does it.

A party is what a System is in bench/systems.py, with a ready call of one verb for a handle, so that a Stage times it alike.
Our own are called at the engine (pyfleet/engines/base.py), below the functions that describe arrays and make lists; a forced
algorithm at its group, as only all_reduce lets the engine's caller choose. All that the suite expects of pyfleet is in this
file and in bench/systems.py.
"""
from __future__ import annotations

import importlib
import pathlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from bench.ranks import Team
from bench.stage import Stage, demand_equal
from bench.systems import _Fleet
from fleetcore.schedules import SCHEDULES

VERBS = ("all_reduce", "reduce", "broadcast", "all_gather", "gather", "scatter", "reduce_scatter", "all_to_all", "barrier",
         "round_trip", "one_way", "all_gather_object")
LARGEST = {"barrier": 0, "round_trip": 64 << 10, "all_gather_object": 64 << 10}     # above, they would say nothing new
ALGORITHMS = tuple(dict.fromkeys(name for kinds in SCHEDULES.values() for name in kinds))

PARTIES = {
    "arena": "bench.verbs:Arena",
    "ordinary": "bench.verbs:Ordinary",
    "tcp": "bench.verbs:Tcp",
    **dict.fromkeys(ALGORITHMS, "bench.verbs:Forced"),
    "gloo": "bench.rivals.gloo:GlooVerbs",
    "mpi": "bench.rivals.mpi:MpiVerbs",
}
RIVALS = ("gloo", "mpi")
ROOT = 0


def parts(verb: str, num_bytes: int, size: int) -> int:
    """Elements of one rank's part of a float32 array of about num_bytes, one at least; none for a barrier."""
    return 0 if verb == "barrier" else max(1, num_bytes // 4 // size)


@dataclass(frozen=True)
class Volume:
    """The least that a verb moves, in sizes of its whole array.

    read, written:  in memory by all ranks together, every input and output once.
    sent:           by all ranks together, over links.
    busiest:        by the busiest rank in one direction, over links.
    """

    read: float
    written: float
    sent: float
    busiest: float


def volume(verb: str, size: int) -> Volume | None:
    """What `size` ranks must move at least; None for a barrier, and for objects, which are text before they move.

    Sums are bandwidth-optimal as Patarasuk and Yuan 2009 count them; a root receives or sends every other rank's part.
    """
    n, others = size, size - 1
    return {
        "all_reduce": Volume(n, n, 2 * others, 2 * others / n),
        "reduce": Volume(n, 1, others, 1),
        "broadcast": Volume(1, others, others, 1),
        "all_gather": Volume(1, n, others, others / n),
        "gather": Volume(1, 1, others / n, others / n),
        "scatter": Volume(1, 1, others / n, others / n),
        "reduce_scatter": Volume(n, 1, others, others / n),
        "all_to_all": Volume(n, n, others, others / n),
        "round_trip": Volume(2, 2, 2, 2),       # one after the other, so both count in the one direction
        "one_way": Volume(1, 1, 1, 1),
    }.get(verb)


class Arrays:
    """One rank's arrays for a verb, filled so that the result can be told: x goes in; out, where there is one, is filled.

    all_reduce, reduce and broadcast replace x. Attributes are None where the rank has no part in them.
    """

    def __init__(self, verb: str, rank: int, size: int, num_elems: int, make: Callable[[int], np.ndarray]):
        """Args:    num_elems: of one rank's part.  make: a float32 array of so many elements, where the party likes it."""
        self.verb, self.rank, self.size, self.num_elems = verb, rank, size, num_elems
        whole, part = num_elems * size, num_elems
        takes = {"all_gather": part, "gather": part, "scatter": whole if rank == ROOT else 0}.get(verb, whole)
        fills = {"all_gather": whole, "gather": whole if rank == ROOT else 0, "scatter": part, "reduce_scatter": part,
                 "all_to_all": whole}.get(verb, 0)
        if verb in ("barrier", "all_gather_object") or (verb in ("round_trip", "one_way") and rank > 1):
            takes = 0
        self.x, self.out = (make(count) if count else None for count in (takes, fills))
        self.text = "x" * (4 * part) if verb == "all_gather_object" else ""
        if self.x is not None:
            self.x[:] = self._ramp(self.x.size) * (rank + 1)

    @staticmethod
    def _ramp(num_elems: int) -> np.ndarray:
        return (np.arange(num_elems, dtype=np.int32) % 1021).astype(np.float32)     # sums of small integers are exact

    def check(self, returned: Any) -> None:
        """Raises ArithmeticError unless the arrays hold what the verb promises; then makes all of them zeros, which stay so."""
        verb, rank, size, n = self.verb, self.rank, self.size, self.num_elems
        ramp, all_ranks = self._ramp(size * n), range(1, size + 1)
        result = self.x if self.out is None else self.out
        mine = slice(rank * n, (rank + 1) * n)
        expected = {
            "all_reduce": lambda: ramp * sum(all_ranks),
            "reduce": lambda: ramp * (sum(all_ranks) if rank == ROOT else 0),
            "broadcast": lambda: ramp,
            "all_gather": lambda: np.concatenate([ramp[:n] * each for each in all_ranks]),
            "gather": lambda: np.concatenate([ramp[:n] * each for each in all_ranks]),
            "scatter": lambda: ramp[mine],
            "reduce_scatter": lambda: ramp[mine] * sum(all_ranks),
            "all_to_all": lambda: np.concatenate([ramp[mine] * each for each in all_ranks]),
            "round_trip": lambda: ramp,
            "one_way": lambda: ramp,
        }.get(verb)
        # Where a rank has no result there is nothing to hold against the promise; gloo even spoils the others' x in a reduce.
        nothing = result is None or (verb == "gather" and rank != ROOT) or (verb == "reduce" and rank != ROOT)
        if expected is not None and not nothing:
            demand_equal(result, expected())
        if verb == "all_gather_object" and returned != [self.text] * size:
            raise ArithmeticError("WRONG RESULT: the objects are not those that the ranks gave")
        for array in (self.x, self.out):
            if array is not None:
                array[:] = 0


class Party(ABC):
    """One way to do verbs. As a System, but for what a handle is: the ready call of one verb, over its Arrays."""

    bound: ClassVar[str]
    largest: ClassVar[int | None] = None
    verbs: tuple[str, ...] = VERBS

    @abstractmethod
    def start(self, rank: int, size: int, folder: pathlib.Path) -> None:
        """As System.start."""

    def array(self, num_elems: int) -> np.ndarray:
        """A new float32 array, in the memory this party likes best."""
        return np.empty(num_elems, np.float32)

    @abstractmethod
    def ready(self, verb: str, arrays: Arrays) -> Callable[[], Any]:
        """The call that does the verb over the arrays, complete on return, with nothing left to prepare."""

    def call(self, handle: Callable[[], Any]) -> None:
        """Do what is ready."""
        handle()

    @abstractmethod
    def close(self) -> None:
        """As System.close."""


class VerbStage(Stage):
    """A Stage on which `verb` is what all parties do; those that do not offer it have no row."""

    verb = "all_reduce"

    def __init__(self, team: Team, names: list[str]):
        super().__init__(team, names, make=create)

    def prepare(self, name: str) -> object | None:
        """As Stage.prepare, for the verb; None without a trouble where the party does not offer it."""
        party, team, verb = self.systems[name], self.team, self.verb
        if verb not in party.verbs:
            return None
        team.progress(f"the first {verb} of {name}")
        made: list = []

        def first_call() -> None:
            arrays = Arrays(verb, team.rank, team.size, parts(verb, self.size, team.size), party.array)
            call = party.ready(verb, arrays)
            made.extend((call, arrays, call()))

        if self.attempt(name, first_call) and self.attempt(name, lambda: made[1].check(made[2])):
            return made[0]
        return None


class _Engine(Party, _Fleet):
    """pyfleet's engine over one transport."""

    start, close = _Fleet.start, _Fleet.close

    def ready(self, verb: str, arrays: Arrays) -> Callable[[], Any]:
        from pyfleet.engines.base import all_gather_object
        engine, x, out, n, size = self.engine, arrays.x, arrays.out, arrays.num_elems, arrays.size
        counts = [n] * size
        if verb in ("round_trip", "one_way"):
            return self._message(verb, x)
        return {
            "all_reduce": lambda: engine.all_reduce(x),
            "reduce": lambda: engine.reduce(x, ROOT),
            "broadcast": lambda: engine.broadcast(x, ROOT),
            "all_gather": lambda: engine.all_gather_into(out, x),
            "gather": lambda: engine.gather_into(out, x, counts, ROOT),
            "scatter": lambda: engine.scatter_into(out, x, counts, ROOT),
            "reduce_scatter": lambda: engine.reduce_scatter_into(out, x, counts),
            "all_to_all": lambda table=[counts] * size: engine.all_to_all_into(out, x, table),
            "barrier": engine.barrier,
            "all_gather_object": lambda: all_gather_object(engine, arrays.text),
        }[verb]

    def _message(self, verb: str, x: np.ndarray | None) -> Callable[[], Any]:
        engine = self.engine

        def send_first() -> None:
            engine.send(x, 1)
            if verb == "round_trip":
                engine.recv(lambda note: x, 1)

        def receive_first() -> None:
            engine.recv(lambda note: x, 0)
            if verb == "round_trip":
                engine.send(x, 0)

        return {0: send_first, 1: receive_first}.get(engine.rank, lambda: None)


class Ordinary(_Engine):
    """Shared memory; arrays lie wherever numpy put them."""

    transport = "shm"
    bound = "memory"


class Arena(Ordinary):
    """Shared memory; arrays lie in the arena."""

    def array(self, num_elems: int) -> np.ndarray:
        return np.frombuffer(self.engine.allocate(4 * num_elems), np.float32, num_elems)


class Tcp(_Engine):
    """TCP over the loopback interface, the algorithm as pyfleet chooses, in the clear as the rivals are."""

    transport = "tcp"
    bound = "tcp"


class Forced(Tcp):
    """As Tcp, every verb by one of the algorithms that have it."""

    def __init__(self, algorithm: str):
        self.algorithm = algorithm
        self.verbs = tuple(verb for verb in VERBS if algorithm in SCHEDULES.get(verb, ()))

    def ready(self, verb: str, arrays: Arrays) -> Callable[[], Any]:
        group, algorithm, x, out = self.engine.group, self.algorithm, arrays.x, arrays.out
        counts = [arrays.num_elems] * arrays.size
        return {
            "all_reduce": lambda: group.all_reduce(x, algorithm=algorithm),
            "reduce": lambda: group.reduce(x, ROOT, algorithm=algorithm),
            "broadcast": lambda: group.broadcast(x, ROOT, algorithm=algorithm),
            "all_gather": lambda: group.all_gather(out, x, algorithm=algorithm),
            "gather": lambda: group.gather(out, x, counts, ROOT, algorithm=algorithm),
            "scatter": lambda: group.scatter(out, x, counts, ROOT, algorithm=algorithm),
            "reduce_scatter": lambda: group.reduce_scatter(out, x, counts, algorithm=algorithm),
            "all_to_all": lambda table=[counts] * arrays.size: group.all_to_all(out, x, table, algorithm=algorithm),
        }[verb]


def create(name: str) -> Party:
    """A new party; raises ImportError where what it adapts is not installed."""
    if name in ALGORITHMS:
        return Forced(name)
    module, _, kind = PARTIES[name].partition(":")
    return getattr(importlib.import_module(module), kind)()
