"""P2: from a store where the ranks meet to the memory and the links between them."""
from __future__ import annotations

import contextlib
import errno
import hashlib
import hmac
import json
import logging
import os
import secrets
import socket
import struct
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from fleetcore.arena import Arena
from fleetcore.domain import Domain, board_bytes
from fleetcore.executor import Executor
from fleetcore.group import Group
from fleetcore.mailbox import Mailbox
from fleetcore.transports.secure import RECORD_BYTES, SecureLink
from fleetcore.transports.striped import StripedLink
from fleetcore.transports.tcp import TcpLink

from fleetcore.schedules.model import Links
from pyfleet.config import ClusterConfig
from pyfleet.connections import BACKLOG, Address, Credentials, Deadline, accept, dial
from pyfleet.devices import any_present
from pyfleet.errors import ConfigError, FleetError, NotEnoughPeers, PeerLost
from pyfleet.identity import Namespace, NodeKey, ciphers
from pyfleet.identity.handshake import MEETING_BYTES, Kind
from pyfleet.identity.keys import Unwritable, home_folder
from pyfleet.identity.namespace import derive
from pyfleet.interfaces import interfaces, way_to
from pyfleet.members import PROTOCOL, Member
from pyfleet.placement import num_cores
from pyfleet.rendezvous.base import Store

SPIN_NS = 20_000                    # about the cost of sleeping and being woken on another core
LARGEST_ARENA = 64 << 30            # address space, not memory
SMALLEST_ARENA = 256 << 20
FDS_PER_MESSAGE = 64                # the kernel takes 253
DATA_KINDS = (Kind.DATA, Kind.STRIPE_1, Kind.STRIPE_2, Kind.STRIPE_3)
FAST_MBIT_S = 10_000                # up to here one connection fills the wire
NOTICE_RECORD_BYTES = 4096          # control connections carry notices of a few hundred bytes

log = logging.getLogger("pyfleet.links")


def host_id() -> str:
    """Equal for processes that may share memory: same boot of the same kernel, same pid, network and mount namespaces."""
    facts = [socket.gethostname(), str(psutil.boot_time())]
    if sys.platform == "linux":
        facts = [Path("/proc/sys/kernel/random/boot_id").read_text()]
        facts += [os.readlink(f"/proc/self/ns/{kind}") for kind in ("pid", "net", "mnt")]
    return hashlib.sha256("\n".join([*facts, str(os.getuid())]).encode()).hexdigest()[:16]


def own_addresses(iface: str | None) -> list[str]:
    """This host's addresses, the chosen interface's only when one is given, loopback last.

    Raises:  ConfigError naming the interfaces there are.
    """
    there = psutil.net_if_addrs()
    if iface is not None and iface not in there:
        raise ConfigError(f"there is no interface {iface!r}: one of {', '.join(sorted(there))}")
    found = [(entry.address.startswith("127."), entry.address)
             for name, entries in there.items() if iface in (None, name)
             for entry in entries if entry.family == socket.AF_INET]
    return [address for _, address in sorted(found)] or ["127.0.0.1"]


def meet(store: Store, rank: int, size: int, deadline: Deadline, peer: str = "") -> list[Member]:
    """Leave this rank's card in the store and read everyone's.

    Args:    peer: the peer id of this rank's node, where it has one.
    Raises:  NotEnoughPeers("found k of n ...") at the deadline; FleetError for a rank with another protocol.
    """
    card = Member(rank, host_id(), socket.gethostname(), os.getpid(), devices=any_present(), peer=peer)
    store.set(f"card.{rank}", card.card())
    members, missing = [], []
    for other in range(size):
        try:
            members.append(Member.from_card(store.get(f"card.{other}", deadline.left())))
        except KeyError:
            missing.append(other)
        except TypeError:
            raise FleetError(f"rank {other} runs a pyfleet that speaks another protocol than {PROTOCOL}") from None
    if missing:
        raise NotEnoughPeers(f"found {len(members)} of {size} ranks within {deadline.seconds:.3g} s; "
                             f"missing: {', '.join(map(str, missing))}{store.refusals()}")
    for member in members:
        if member.protocol != PROTOCOL:
            raise FleetError(f"rank {member.rank} on {member.name} speaks protocol {member.protocol}, this rank {PROTOCOL}")
    return members


def make_arena(cluster: ClusterConfig) -> Arena:
    """This rank's arena: arena_bytes of address space, or as much as the machine has memory, or what there is room for.

    Raises:  MemoryError when not even the smallest fits.
    """
    if cluster.arena_bytes is not None:
        return Arena(cluster.arena_bytes)
    capacity = min(LARGEST_ARENA, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    while True:
        try:
            return Arena(capacity)
        except MemoryError:
            capacity //= 2
            if capacity < SMALLEST_ARENA:
                raise


def spin_ns(num_local: int) -> int:
    """How long a waiting rank may spin: not at all when ranks outnumber cores, for it would spin on its peer's core."""
    return SPIN_NS if num_local <= num_cores() else 0


class Exchange:
    """Rounds in which every rank of a meeting leaves a value in the store and reads everyone's.

    Raises (when called):  NotEnoughPeers naming the missing ranks at the deadline.
    """

    def __init__(self, store: Store, rank: int, size: int, deadline: Deadline):
        self.store, self.rank, self.size, self.deadline, self.round = store, rank, size, deadline, 0

    def __call__(self, value: Any) -> list:
        """Everyone's value, in rank order. Values are JSON-like."""
        self.round += 1
        self.store.set(f"{self.round}.{self.rank}", value)
        values, missing = [], []
        for rank in range(self.size):
            try:
                values.append(self.store.get(f"{self.round}.{rank}", self.deadline.left()))
            except KeyError:
                missing.append(rank)
        if missing:
            raise NotEnoughPeers(f"ranks {missing} met the others, but did not offer a connection within "
                                 f"{self.deadline.seconds:g} s")
        return values


@dataclass
class Wired:
    """Ranks that can call collectives: what connect() makes.

    Attributes:
        members:    cards in rank order; a member's `rank` is its number in the whole fleet.
        shared:     {rank in the whole fleet: (its Arena as seen here, its pid)} of the ranks that share memory.
        mailbox:    for messages between two ranks.
    """

    group: Group
    mailbox: Mailbox
    members: list[Member]
    cluster: ClusterConfig
    arena: Arena
    shared: dict[int, tuple[Arena, int]]
    namespace: Namespace | None


def connect(members: list[Member], rank: int, arena: Arena, cluster: ClusterConfig, deadline: Deadline,
            exchange: Callable[[Any], list], *, namespace: Namespace | None = None, shared: dict | None = None,
            number: int = 0, epoch: int = 0, measured: Links | None = None) -> Wired:
    """Tie ranks into a group: shared memory within hosts, links between them, connections for messages.

    Args:    members, rank: the group's ranks in order, and the own place among them.
             exchange: a round among the ranks, as Exchange.
             namespace: whose secret the ranks must know; None: that of the meeting place will do.
             shared: arenas that are mapped here already.
             number: of this group among those of the fleet, the same on all members.
             epoch: of the view that the group belongs to; frames and connections of another one are refused.
             measured: the links between the hosts, as they were found before, the same on all members; None: not yet.
    Raises:  NotEnoughPeers, AuthFailed when a peer is no member, PeerLost, ConfigError; never waits past the deadline.
    """
    size = len(members)
    if size == 1:
        return Wired(Group(0, 1, timeout=cluster.timeout, epoch=epoch), Mailbox(0, [None], timeout=cluster.timeout, epoch=epoch),
                     members, cluster, arena, shared or {}, namespace)
    local = [place for place, member in enumerate(members) if member.host == members[rank].host]
    if cluster.transport == "shm" and len(local) < size:
        raise ConfigError(f"transport is 'shm', but the ranks are on {len({member.host for member in members})} hosts")
    in_memory = cluster.transport != "tcp" and len(local) > 1
    by_links = cluster.transport == "tcp" or len(local) < size
    with contextlib.ExitStack() as meeting:
        card: dict = {"token": secrets.token_hex(32)}
        board = directory = None
        if in_memory and rank == local[0]:
            board = arena.allocate(board_bytes(len(local)))
            memoryview(board)[:] = bytes(board.nbytes)
            directory = meeting.enter_context(tempfile.TemporaryDirectory(prefix="pyfleet-"))
            arenas = meeting.enter_context(socket.socket(socket.AF_UNIX))
            arenas.bind(f"{directory}/arenas")
            arenas.listen(size)
            card |= {"board": board.offset, "arenas": f"{directory}/arenas"}
        key = _key_for(cluster, namespace, one_host=len(local) == size)
        where = "127.0.0.1" if len(local) == size else ""
        port = cluster.gradient_port + local.index(rank) if cluster.gradient_port and not where else 0
        listener = meeting.enter_context(_listen(where, port))
        card |= {"addresses": [where] if where else own_addresses(cluster.iface), "port": listener.getsockname()[1],
                 "node": key.public.hex(), "encryption": cluster.encryption, "stripes": num_stripes(cluster),
                 "striped": cluster.stripes is not None}
        cards = exchange(card)
        domain = executor = None
        if in_memory:
            leader = cards[local[0]]
            if shared is None or any(members[place].rank not in shared for place in local):
                shared = _share_arenas(arenas if board is not None else None, leader, members, local, rank, arena, deadline)
            mapped = [shared[members[place].rank] for place in local]
            domain = Domain([there for there, _ in mapped], local.index(rank), leader["board"], [pid for _, pid in mapped],
                            board=board, spin_ns=spin_ns(len(local)), path=cluster.same_host, names=local)
        kinds = (Kind.DATA, Kind.CONTROL, Kind.MESSAGE) if by_links else (Kind.MESSAGE,)
        stripes = [_kinds_of_data(cards[rank], cards[place], members[rank], members[place]) for place in range(size)]
        proven = _connect_all(listener, cards, members, rank,
                              [(*stripes[place], *kinds[1:]) if by_links else kinds for place in range(size)], cluster, deadline,
                              namespace, key, (epoch, number))
        single = {place: _link(connection, place, cluster) for place, connection in proven.items()}
        links = {kind: [single.get((kind, place)) for place in range(size)] for kind in kinds}
        if by_links:
            links[Kind.DATA] = [link if link is None or len(stripes[place]) == 1 else
                                StripedLink([single[kind, place] for kind in stripes[place]])
                                for place, link in enumerate(links[Kind.DATA])]
            # Between hosts an answer takes longer than it pays to spin.
            executor = Executor(rank, links[Kind.DATA], links[Kind.CONTROL], epoch=epoch, group=number,
                                spin_ns=spin_ns(size) if len(local) == size else 0)
        if domain is not None:
            domain.connect(max(deadline.left(), 0.001))
    hosts = list(dict.fromkeys(member.host for member in members))
    group = Group(rank, size, domain=domain, executor=executor, timeout=cluster.timeout, epoch=epoch,
                  hosts=[hosts.index(member.host) for member in members],
                  two_level=cluster.transport != "tcp" and 1 < len(hosts) < size, links=measured if len(hosts) > 1 else None,
                  places={place: member.name for place, member in enumerate(members)})
    pids = None
    if domain is not None and cluster.same_host != "staging":
        pids = [shared[member.rank][1] if member.rank in shared else None for member in members]
    mailbox = Mailbox(rank, links[Kind.MESSAGE], epoch=epoch, group=number, timeout=cluster.timeout, pids=pids,
                      places={place: member.name for place, member in enumerate(members)})
    if cluster.encryption == "off" and rank == 0 and len(hosts) > 1:
        log.warning("encryption is off: gradients travel between hosts in the clear; peers still prove who they are")
    return Wired(group, mailbox, members, cluster, arena, shared or {}, namespace)


# ---- ranks of one host -----------------------------------------------------------------------------------------------


def _share_arenas(listener, leader, members, local, rank, arena, deadline):
    """Share everyone's arena with everyone of this host: descriptors travel over a socket in the leader's directory."""
    if listener is not None:
        pids, capacities, fds = _gather_arenas(listener, leader["token"], members, local, arena, deadline)
    else:
        pids, capacities, fds = _offer_arena(leader, rank, arena, deadline)
    try:
        return {members[place].rank: (arena if place == rank else Arena.attach(fds[i], capacities[i]), pids[i])
                for i, place in enumerate(local)}
    finally:
        for fd in fds:
            if fd >= 0:
                os.close(fd)


def _gather_arenas(listener, token, members, local, arena, deadline):
    """The host's first rank: collect (pid, capacity, descriptor) of the others and send everyone the whole list."""
    size = len(local)
    pids, capacities, fds, peers = [os.getpid()] + [0] * (size - 1), [arena.capacity] * size, [-1] * size, {}
    with contextlib.ExitStack() as open_sockets:
        while len(peers) < size - 1:
            listener.settimeout(max(deadline.left(), 0.001))
            try:
                sock = open_sockets.enter_context(listener.accept()[0])
            except TimeoutError:
                missing = [members[place].rank for i, place in enumerate(local) if i and i not in peers]
                raise NotEnoughPeers(f"ranks {missing} did not share their memory within {deadline.seconds:g} s") from None
            sock.settimeout(max(deadline.left(), 0.001))
            data, received, _, _ = socket.recv_fds(sock, 4096, 1)
            hello = json.loads(data) if data else {}
            peer = local.index(hello["rank"]) if hello.get("rank") in local else 0
            if not hmac.compare_digest(hello.get("token", ""), token) or not peer or peer in peers or len(received) != 1:
                for fd in received:
                    os.close(fd)
                continue
            pids[peer], capacities[peer], fds[peer], peers[peer] = hello["pid"], hello["capacity"], received[0], sock
        text = json.dumps({"pids": pids, "capacities": capacities}).encode()
        all_fds = [arena.fd, *fds[1:]]
        for sock in peers.values():
            sock.sendall(struct.pack("!I", len(text)) + text)
            for start in range(0, size, FDS_PER_MESSAGE):
                socket.send_fds(sock, [b"."], all_fds[start:start + FDS_PER_MESSAGE])
        for sock in peers.values():         # the directory may go only when all have what they need
            sock.recv(1)
    return pids, capacities, fds


def _offer_arena(leader, rank, arena, deadline):
    """Other ranks: hand over the own descriptor, take everyone's."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(max(deadline.left(), 0.001))
        try:
            sock.connect(leader["arenas"])
            hello = {"token": leader["token"], "rank": rank, "pid": os.getpid(), "capacity": arena.capacity}
            socket.send_fds(sock, [json.dumps(hello).encode()], [arena.fd])
            length, = struct.unpack("!I", _read(sock, 4))
            everything = json.loads(_read(sock, length))
            fds = []
            while len(fds) < len(everything["pids"]):
                data, received, _, _ = socket.recv_fds(sock, 1, FDS_PER_MESSAGE)
                if not data:
                    raise ConnectionError("connection closed")
                fds += received
            sock.sendall(b".")
        except OSError as error:
            raise PeerLost(f"lost the first rank of this host while sharing memory: {error}") from None
    return everything["pids"], everything["capacities"], fds


def _read(sock, size):
    data = b""
    while len(data) < size:
        part = sock.recv(size - len(data))
        if not part:
            raise ConnectionError("connection closed")
        data += part
    return data


# ---- connections -----------------------------------------------------------------------------------------------------


def num_stripes(cluster: ClusterConfig) -> int:
    """How many connections this host would make of one link: several where its interface is too fast for one."""
    if cluster.stripes is not None:
        return cluster.stripes
    speeds = [stats.speed for name, stats in psutil.net_if_stats().items() if stats.isup and cluster.iface in (None, name)]
    return len(DATA_KINDS) if max(speeds, default=0) > FAST_MBIT_S else 1


def _kinds_of_data(card, other, member, peer):
    """The connections that carry data between two ranks; within a host several are made only when asked for."""
    num = min(card["stripes"], other["stripes"])
    return DATA_KINDS[:num] if member.host != peer.host or card["striped"] or other["striped"] else DATA_KINDS[:1]


def _connect_all(listener, cards, members, rank, kinds, cluster, deadline, namespace, key, place_of_group):
    """A proven connection of each of kinds[place] to every other rank: {(kind, place): Proven}.

    Each rank connects to the lower ones and accepts the higher ones. The secret of the handshake is the namespace's;
    where there is none, the token on the first rank's card: then whoever can read the cards can be a member.
    """
    others = [place for place in range(len(members)) if place != rank]
    near = {place: members[place].host == members[rank].host for place in others}
    token = bytes.fromhex(cards[0]["token"])
    there = interfaces()
    wheres = {place: _where(cards[place], members[place].rank, cluster, near[place], there) for place in others}
    own = Credentials(key, namespace or Namespace.from_token(token, cluster.namespace),
                      derive(token, "meeting", size=MEETING_BYTES), rank, *place_of_group)
    patience_s = cluster.connection_timeout_ms / 1000
    proven = {}
    try:
        for place in range(rank):
            made = dial(own, place, wheres[place], {kind: _offers(kind, cluster, near[place]) for kind in kinds[place]},
                        num_attempts=max(1, cluster.max_retries), patience_s=patience_s, deadline=deadline)
            proven |= {(kind, place): connection for kind, connection in made.items()}
        admits = {(kind, place): _offers(kind, cluster, near[place])
                  for place in others if place > rank for kind in kinds[place]}
        friends = {host for where in wheres.values() for host in where.hosts}
        return proven | accept(own, listener, admits, {place: where.node for place, where in wheres.items()}, friends,
                               patience_s=patience_s, deadline=deadline)
    except BaseException:
        for connection in proven.values():
            connection.sock.close()
        raise


def _listen(where, port):
    """A listener at the port, or at any free one where somebody has it: the cards say which."""
    try:
        return socket.create_server((where, port), backlog=BACKLOG)
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES) or not port:
            raise
        log.info("port %d is taken: links use another one", port)
        return socket.create_server((where, 0), backlog=BACKLOG)


def _key_for(cluster, namespace, *, one_host):
    """Who this rank is: its node, or nobody in particular among ranks of one host that need no secret but the token."""
    if one_host and namespace is None and cluster.encryption != "on":
        return NodeKey.generate()
    return node_key(cluster, strict=namespace is not None)


def node_key(cluster: ClusterConfig, *, strict: bool) -> NodeKey:
    """This node's key; one for this process only where none can be stored and, not being strict, none need be.

    Raises:  ConfigError.
    """
    try:
        return NodeKey.open(home_folder(cluster.home))
    except Unwritable:
        if strict:
            raise
        return NodeKey.generate()


def own_peer(cluster: ClusterConfig) -> str:
    """This node's peer id; "" where it has no key that can be read, for who needs none must not need to make one."""
    try:
        return NodeKey.load(home_folder(cluster.home)).peer_id
    except (OSError, ConfigError):
        return ""


def _where(card, peer, cluster, near, there):
    """The address on a rank's card, as seen from a host with these interfaces."""
    theirs = card["encryption"]
    if {mode == "on" or (mode == "auto" and not near) for mode in (theirs, cluster.encryption)} == {True, False}:
        raise ConfigError(f"encryption is {cluster.encryption!r} here and {theirs!r} on rank {peer}")
    near_first = sorted(card["addresses"], key=lambda address: way_to(address, there) is None)      # no router in between
    return Address(near_first, card["port"], bytes.fromhex(card["node"]))


def _offers(kind, cluster, near):
    """The ciphers for a connection: control is sealed between hosts whatever the setting, for it costs nothing."""
    sealed = cluster.encryption == "on" or (not near and (cluster.encryption == "auto" or kind not in DATA_KINDS))
    return ciphers.offered() if sealed else ciphers.PLAIN


def _link(connection, place, cluster):
    """The link over a proven connection."""
    kind, peer = place
    session = connection.session
    link = TcpLink(connection.sock, peer, congestion=cluster.congestion if kind != Kind.CONTROL else None)
    if session.cipher == ciphers.PLAIN:
        return link
    return SecureLink(link, ciphers.cipher(session.cipher), session.send_key, session.receive_key,
                      record_bytes=NOTICE_RECORD_BYTES if kind == Kind.CONTROL else RECORD_BYTES)
