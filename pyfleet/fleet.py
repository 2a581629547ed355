"""P3: where control meets data: from a place among the ranks to an engine, and the fleet that scripts see."""
from __future__ import annotations

import atexit
import contextlib
import copy
import os
import socket
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from pyfleet import choice, engines, exporters, metrics, routes
from pyfleet.config import ClusterConfig, load_config
from pyfleet.contact import Contact
from pyfleet.engines.fleet import FleetEngine
from pyfleet.errors import ConfigError, FleetError, NotInitialized
from pyfleet.identity import Namespace
from pyfleet.identity.namespace import derive
from pyfleet.members import Member, Node, Seat, View
from pyfleet.membership.joining import Membership, find, join
from pyfleet.placement import Placement, placement
from pyfleet.rendezvous import open_store
from pyfleet.wiring import Deadline, Exchange, connect, host_id, make_arena, meet, own_peer

# What a membership counts: in this process, or in the agent beside it.
AGENTS_METRICS = ("pyfleet_heartbeats_total", "pyfleet_heartbeat_latency_seconds", "pyfleet_control_bytes_total",
                  "pyfleet_elections_total", "pyfleet_view_changes_total", "pyfleet_peers")
_lock = threading.Lock()
_fleets: dict[engines.Engine, Fleet] = {}       # one, unless threads are ranks


class Fleet:
    """The ranks that train together, as this rank sees them."""

    def __init__(self, engine: engines.Engine, members: list[Member], cluster: ClusterConfig,
                 membership: Membership | None = None):
        self.engine, self.members, self.cluster, self.membership = engine, members, cluster, membership
        self.exporters: list[exporters.Exporter] = []
        self._nodes = _nodes(members)
        self._view = membership.view if membership else View(fleet="", epoch=engine.epoch, seats=tuple(
            Seat(peer=node.peer, incarnation=node.incarnation, joined=0, slots=node.slots) for node in self._nodes.values()))

    @property
    def rank(self) -> int:
        """This process's number, 0 to world_size - 1."""
        return self.engine.rank

    @property
    def world_size(self) -> int:
        """How many ranks there are."""
        return self.engine.world_size

    @property
    def local_rank(self) -> int:
        """This process's number among the ranks of its host."""
        return self.engine.local_rank

    @property
    def local_world_size(self) -> int:
        """How many ranks this host has."""
        return self.engine.local_world_size

    @property
    def epoch(self) -> int:
        """The number of the view: who is in."""
        return self.engine.epoch

    @property
    def view(self) -> View:
        """Who is in, as it was agreed when these ranks met; of epoch 0 where no membership agreed, but a launcher said it."""
        return self._view

    @property
    def nodes(self) -> list[Node]:
        """The machines of the ranks, in the order of their ranks. They print as peer ids."""
        return list(self._nodes.values())

    @property
    def leader(self) -> Node:
        """The machine that leads: the longest-serving one of the view; that of rank 0 where there is none. Prints as its
        peer id."""
        leader = self._view.seats[0] if self.membership is None else self._view.seat(self._view.leader)
        return self._nodes[leader.peer]

    @property
    def is_leader(self) -> bool:
        """Whether this is the first rank of the leader's machine: one rank of the fleet, and rank 0 to begin with."""
        return self.rank == self.view.first_rank(self.leader.peer)

    def status(self) -> dict:
        """Where the membership of this rank's machine stands now, as `pyfleet status --json` prints it; {} where a launcher
        said who is in.

        Raises:  FleetError when this machine's agent is gone.
        """
        return {} if self.membership is None else self.membership.contact.ask("status")

    @property
    def topology(self) -> dict:
        """What the machines can do, what was measured between them, and the ring they form: {"nodes", "links", "ring"}, as the
        membership of this rank's machine knows it now; {} where a launcher said who is in.

        Raises:  FleetError when this machine's agent is gone.
        """
        return self.status().get("topology", {})

    def close(self) -> None:
        """Leave: peers that still wait for this rank get PeerLost, and its node says good-bye. Idempotent."""
        for exporter in self.exporters:
            exporter.close()
        metrics.REGISTRY.detach(self.families)
        self.engine.close()
        if self.membership is not None:
            self.membership.contact.close()

    def stats(self) -> dict:
        """Bytes and messages, per operation and per link, as counted at the socket: see Engine.stats. Under "compression"
        what compressed all-reduces sent, and what they would have sent: see pyfleet.routes.stats. Under
        "compression_choices" what compression="auto" stood for, and why: see pyfleet.choice.choices."""
        return self.engine.stats() | {"compression": routes.stats(self.engine),
                                      "compression_choices": choice.choices(self.engine)}

    def metrics(self) -> dict[str, dict]:
        """What this process counted, and its node's agent where there is one, as values that JSON can carry: see
        pyfleet.metrics.Registry.snapshot."""
        found = metrics.REGISTRY.snapshot()
        if self.membership is not None:
            with contextlib.suppress(FleetError):           # an agent that is gone counts nothing more
                told = self.membership.contact.ask("metrics")
                found |= {name: told[name] for name in AGENTS_METRICS if name in told}
        return found

    def families(self) -> list[metrics.Family]:
        """What the fleet knows beside what its engine counts, for the metrics of the process."""
        gauges = [("pyfleet_rank", "This process's number.", self.rank), ("pyfleet_world_size", "How many ranks there are.",
                  self.world_size), ("pyfleet_epoch", "The number of the view.", self.epoch),
                  ("pyfleet_is_leader", "1 where this rank leads.", int(self.is_leader))]
        compressed = routes.stats(self.engine)
        return [metrics.Family(name, "gauge", told, {(): value}) for name, told, value in gauges] + [
            metrics.Family(f"pyfleet_compression_{what}_total", "counter", told,
                           {(("compression", name),): counts[what] for name, counts in compressed.items()})
            for what, told in (("sent_bytes", "Bytes of compressed arrays given to other ranks, without frames."),
                               ("dense_bytes", "What the same arrays would have taken as float32."))]

    def __repr__(self) -> str:
        hosts = len({member.host for member in self.members})
        return f"<Fleet rank {self.rank} of {self.world_size} on {hosts} host{'s' * (hosts > 1)}, epoch {self.epoch}>"


def _nodes(members: list[Member]) -> dict[str, Node]:
    """The machines of ranks, by peer id; one without a key goes by what tells it from others."""
    found: dict[str, Node] = {}
    for member in members:
        peer = member.peer or f"host-{member.host or 'alone'}"
        slots = found[peer].slots + 1 if peer in found else 1
        found[peer] = Node(peer=peer, incarnation="", name=member.name, addresses=member.addresses, slots=slots)
    return found


def open_engine(place: Placement, cluster: ClusterConfig, timeout: float | None = None,
                membership: Membership | None = None) -> tuple[FleetEngine, list[Member]]:
    """Meet the other ranks and build an engine, without putting it in force.

    Args:    timeout: seconds for the whole meeting; None is cluster.peer_timeout.
             membership: where the ranks meet, when a view says who they are.
    Raises:  NotEnoughPeers, AuthFailed, ConfigError, PeerLost; never waits past the timeout.
    """
    deadline = Deadline(cluster.peer_timeout if timeout is None else timeout)
    namespace = Namespace.configured(cluster)       # a secret that cannot be used is told before anybody is met
    arena = make_arena(cluster)
    if place.world_size == 1:
        member = Member(0, "", "localhost", os.getpid())
        return FleetEngine(connect([member], 0, arena, cluster, deadline, lambda card: [card])), [member]
    if place.rendezvous is None and membership is None:
        raise ConfigError(f"{place.world_size} ranks have nowhere to meet: set MASTER_ADDR (and MASTER_PORT) to an "
                          f"address of rank 0's machine, or PYFLEET_RENDEZVOUS")
    secret = None if namespace is None else derive(namespace.key, "store")
    store = (open_store(place.rendezvous, place.rank, place.world_size, deadline.left(), secret) if membership is None else
             membership.store(deadline.left()))
    try:
        members = meet(store, place.rank, place.world_size, deadline, own_peer(cluster))
        wired = connect(members, place.rank, arena, cluster, deadline,
                        Exchange(store, place.rank, place.world_size, deadline), namespace=namespace,
                        epoch=membership.view.epoch if membership else 0, measured=membership.links if membership else None)
    finally:
        store.close()
    return FleetEngine(wired), members


def open_other(backend: str, place: Placement, cluster: ClusterConfig, timeout: float | None = None,
               membership: Membership | None = None) -> tuple[engines.Engine, list[Member]]:
    """As open_engine, over an engine that finds the other ranks by itself, where the placement says: every kind but "fleet".

    Raises:  as open_engine, and ConfigError when the backend cannot work here.
    """
    if cluster.encryption == "on" and backend not in engines.PER_THREAD:
        raise ConfigError(f"encryption is 'on', but what backend {backend!r} sends is neither sealed nor proven: use 'fleet'")
    deadline = Deadline(cluster.peer_timeout if timeout is None else timeout)
    engine = engines.engine_class(backend).open(place, cluster, deadline.seconds)
    try:
        members = exchange_cards(engine, max(deadline.left(), 1.0))
    except BaseException:
        engine.close()
        raise
    own = [member.rank for member in members if member.host == members[engine.rank].host]
    engine.local_rank, engine.local_world_size = own.index(engine.rank), len(own)
    return engine, members


def exchange_cards(engine: engines.Engine, timeout: float) -> list[Member]:
    """Everyone's card, over the engine itself."""
    card = Member(engine.rank, host_id(), socket.gethostname(), os.getpid()).card()
    return [Member.from_card(each) for each in engines.all_gather_object(engine, card, timeout)]


# How to get from a place to an engine; what is not listed finds its peers by itself.
OPENERS: dict[str, Callable[..., tuple[engines.Engine, list[Member]]]] = {"fleet": open_engine}


def init(backend: str = "fleet", rank: int | None = None, world_size: int | None = None, peers: list[str] | None = None,
         namespace: str | None = None, psk_file: str | None = None, min_nodes: int | None = None,
         timeout: float | None = None, config: Any = None) -> Fleet:
    """Join the other ranks; from here on the collective functions work. Idempotent.

    Args:    backend: who moves the bytes. "fleet": pyfleet itself; "gloo", "nccl": torch.distributed, beside the default
             process group when the script has made one; "mpi": mpi4py, under mpirun; "mock": the ranks are threads of
             this process, each of which calls init with its rank (see pyfleet.testing.run_ranks).
             rank, world_size: this process's place; from the environment when not given (see README), else alone.
             peers: "host:port" of every rank in rank order; the first is where they meet. No discovery then.
             namespace, psk_file: with whom, and the file that holds the secret shared with them; ranks on other hosts
             that can not prove that they know it are refused. They stand above the settings of the same names.
             min_nodes: machines to find, this one included, when nothing says which ranks there are: they find each other
             by the namespace's secret. None is min_peers + 1 where there is a secret (psk_file), else there is no looking.
             timeout: seconds to find everyone; None is peer_timeout (30 s).
             config: path of a YAML or JSON file, or a ClusterConfig.
    Raises:  NotEnoughPeers("found 1 of 3 ..."), AuthFailed, ConfigError, PeerLost; never hangs.
    """
    if backend not in engines.ENGINES:
        raise ConfigError(f"backend {backend!r} is not one of {', '.join(engines.ENGINES)}")
    per_thread = backend in engines.PER_THREAD
    with contextlib.nullcontext() if per_thread else _lock:
        joined = _joined()
        if joined is not None and (not per_thread or joined.engine.name == backend):
            return joined
        if timeout is not None and not timeout > 0:
            raise ConfigError(f"timeout must be positive, not {timeout}")
        cluster = config if isinstance(config, ClusterConfig) else load_config(config)[1]
        cluster = with_secrets(cluster, namespace, psk_file)
        place = placement(rank, world_size) if peers is None else _place_among(peers, rank, world_size)
        deadline = Deadline(cluster.peer_timeout if timeout is None else timeout)
        opener, membership = OPENERS.get(backend) or partial(open_other, backend), None
        wanted = exporters.wanted(cluster)
        try:
            place, membership = find(place, cluster, min_nodes, deadline)
            left = timeout if membership is None else max(deadline.left(), 1.0)     # who has just met answers within that
            engine, members = opener(place, cluster, left, membership)
        except BaseException as error:
            if isinstance(error, FleetError):
                metrics.FAILURES.inc(error=type(error).__name__)
            if membership is not None:
                membership.contact.close()
            raise
        return enter(Fleet(engine, members, cluster, membership), wanted)


def enter(fleet: Fleet, wanted: Sequence[type[exporters.Exporter]] = ()) -> Fleet:
    """Put a fleet in force; for the calling thread alone where threads are ranks.

    Args:    wanted: kinds of exporters to open for it.
    """
    _fleets[fleet.engine] = fleet
    metrics.REGISTRY.attach(fleet.families)
    per_thread = fleet.engine.name in engines.PER_THREAD
    engines.set_current(fleet.engine, thread=per_thread)
    if not per_thread or fleet.local_rank == 0:         # what threads count is the process's
        fleet.exporters = exporters.open_all(wanted, metrics.REGISTRY, fleet.cluster, fleet.rank, fleet.local_rank)
    return fleet


def enter_by(contact: Contact, place: Placement, min_nodes: int, cluster: ClusterConfig, deadline: Deadline) -> Fleet:
    """Put the fleet in force that the node behind a contact forms with others.

    Raises:  as init().
    """
    with _lock:
        wanted = exporters.wanted(cluster)
        place, membership = join(contact, place, min_nodes, deadline)
        engine, members = open_engine(place, cluster, max(deadline.left(), 1.0), membership)
        return enter(Fleet(engine, members, cluster, membership), wanted)


def with_secrets(cluster: ClusterConfig, namespace: str | None, psk_file: str | None) -> ClusterConfig:
    """The settings, with the arguments of init that say with whom."""
    cluster = copy.copy(cluster)
    if namespace is not None:
        cluster.namespace = namespace
    if psk_file is not None:
        cluster.psk_file, cluster.psk = psk_file, None
    return cluster


def _place_among(peers, rank, world_size):
    """The placement that a list of peers says."""
    if not peers or len(set(peers)) != len(peers):
        raise ConfigError("peers must list every rank's host:port once, in rank order" if peers else "peers is empty")
    if rank is None or not 0 <= rank < len(peers):
        raise ConfigError(f"with peers, rank must be given, from 0 to {len(peers) - 1}, not {rank}")
    if world_size not in (None, len(peers)):
        raise ConfigError(f"world_size is {world_size}, but peers lists {len(peers)}")
    bad = [peer for peer in peers if not peer.rpartition(":")[2].isdigit() or not peer.rpartition(":")[0]]
    if bad:
        raise ConfigError(f"{bad[0]!r} is not host:port")
    return Placement(rank, len(peers), rendezvous=f"tcp://{peers[0]}", source="peers")


def shutdown() -> None:
    """Leave the fleet: peers that still wait for this rank get PeerLost. Idempotent; also runs at exit."""
    with _lock:
        fleet = _joined()
        if fleet is not None:
            fleet.close()
            engines.set_current(None, thread=fleet.engine.name in engines.PER_THREAD)
            del _fleets[fleet.engine]


def current() -> Fleet:
    """The fleet that init() joined.

    Raises:  NotInitialized.
    """
    fleet = _joined()
    if fleet is None:
        raise NotInitialized("there is no fleet yet: call pyfleet.init() first")
    return fleet


def is_initialized() -> bool:
    """Whether init() has joined a fleet that shutdown() has not left."""
    return _joined() is not None


def _joined():
    """The fleet in force, for this thread or else for the process, or None."""
    return _fleets.get(engines.current()) if engines.is_current() else None


def rank() -> int:
    """This process's number, 0 to world_size() - 1."""
    return current().rank


def world_size() -> int:
    """How many ranks there are."""
    return current().world_size


def local_rank() -> int:
    """This process's number among the ranks of its host."""
    return current().local_rank


def is_leader() -> bool:
    """Whether this rank leads."""
    return current().is_leader


def _forget_in_child() -> None:
    # A forked child shares the parent's sockets and board: it must touch neither, not even to say good-bye.
    global _lock
    _lock = threading.Lock()
    _fleets.clear()
    engines.forget_all()


os.register_at_fork(after_in_child=_forget_in_child)
atexit.register(shutdown)
