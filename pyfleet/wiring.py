"""P2: from a store where the ranks meet to the memory and the links between them."""
from __future__ import annotations

import contextlib
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
from pathlib import Path

import psutil
from fleetcore.arena import Arena
from fleetcore.domain import Domain, board_bytes
from fleetcore.executor import Executor
from fleetcore.transports.secure import RECORD_BYTES, SecureLink
from fleetcore.transports.tcp import TcpLink

from pyfleet.config import ClusterConfig
from pyfleet.connections import BACKLOG, Address, Credentials, Deadline, Proven, accept, dial
from pyfleet.errors import ConfigError, FleetError, NotEnoughPeers, PeerLost
from pyfleet.identity import Namespace, NodeKey, ciphers
from pyfleet.identity.handshake import MEETING_BYTES, Kind
from pyfleet.identity.keys import Unwritable, home_folder
from pyfleet.identity.namespace import derive
from pyfleet.members import PROTOCOL, Member
from pyfleet.placement import num_cores
from pyfleet.rendezvous.base import Store

SPIN_NS = 20_000                    # about the cost of sleeping and being woken on another core
LARGEST_ARENA = 64 << 30            # address space, not memory
SMALLEST_ARENA = 256 << 20
FDS_PER_MESSAGE = 64                # the kernel takes 253
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


def meet(store: Store, rank: int, size: int, deadline: Deadline) -> list[Member]:
    """Leave this rank's card in the store and read everyone's.

    Raises:  NotEnoughPeers("found k of n ...") at the deadline; FleetError for a rank with another protocol.
    """
    card = Member(rank, host_id(), socket.gethostname(), os.getpid())
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
        raise NotEnoughPeers(f"found {len(members)} of {size} ranks within {deadline.seconds:g} s; "
                             f"missing: {', '.join(map(str, missing))}")
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


# ---- ranks of one host -----------------------------------------------------------------------------------------------


def open_domain(store: Store, members: list[Member], rank: int, arena: Arena, cluster: ClusterConfig,
                deadline: Deadline) -> Domain:
    """Share everyone's arena with everyone: descriptors travel over a socket in a private directory of rank 0.

    Raises:  NotEnoughPeers, PeerLost, ConfigError.
    """
    size = len(members)
    if rank == 0:
        board = arena.allocate(board_bytes(size))
        memoryview(board)[:] = bytes(board.nbytes)
        pids, capacities, fds = _gather_arenas(store, size, arena, board.offset, deadline)
        offset = board.offset
    else:
        board = None
        pids, capacities, fds, offset = _offer_arena(store, rank, arena, deadline)
    try:
        arenas = [arena if peer == rank else Arena.attach(fds[peer], capacities[peer]) for peer in range(size)]
    finally:
        for fd in fds:
            if fd >= 0:
                os.close(fd)
    domain = Domain(arenas, rank, offset, pids, board=board, spin_ns=spin_ns(size), path=cluster.same_host)
    domain.connect(max(deadline.left(), 0.001))
    return domain


def _gather_arenas(store, size, arena, board_offset, deadline):
    """Rank 0: collect (pid, capacity, descriptor) of every rank and send everyone the whole list."""
    token = secrets.token_hex(16)
    pids, capacities, fds, peers = [os.getpid()] + [0] * (size - 1), [arena.capacity] * size, [-1] * size, {}
    with tempfile.TemporaryDirectory(prefix="pyfleet-") as directory, contextlib.ExitStack() as open_sockets:
        listener = open_sockets.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(f"{directory}/arenas")
        listener.listen(size)
        store.set("arenas", {"path": f"{directory}/arenas", "token": token})
        while len(peers) < size - 1:
            listener.settimeout(max(deadline.left(), 0.001))
            try:
                sock = open_sockets.enter_context(listener.accept()[0])
            except TimeoutError:
                missing = sorted(set(range(1, size)) - set(peers))
                raise NotEnoughPeers(f"ranks {missing} did not share their memory within {deadline.seconds:g} s") from None
            sock.settimeout(max(deadline.left(), 0.001))
            data, received, _, _ = socket.recv_fds(sock, 4096, 1)
            hello = json.loads(data) if data else {}
            peer = hello.get("rank", 0)
            if not hmac.compare_digest(hello.get("token", ""), token) or not 0 < peer < size or len(received) != 1:
                for fd in received:
                    os.close(fd)
                continue
            pids[peer], capacities[peer], fds[peer], peers[peer] = hello["pid"], hello["capacity"], received[0], sock
        everything = {"pids": pids, "capacities": capacities, "board": board_offset}
        all_fds = [arena.fd, *fds[1:]]
        for sock in peers.values():
            text = json.dumps(everything).encode()
            sock.sendall(struct.pack("!I", len(text)) + text)
            for start in range(0, size, FDS_PER_MESSAGE):
                socket.send_fds(sock, [b"."], all_fds[start:start + FDS_PER_MESSAGE])
        for sock in peers.values():         # the directory may go only when all have what they need
            sock.recv(1)
    return pids, capacities, fds


def _offer_arena(store, rank, arena, deadline):
    """Other ranks: hand over the own descriptor, take everyone's."""
    try:
        where = store.get("arenas", deadline.left())
    except KeyError:
        raise NotEnoughPeers(f"rank 0 did not share its memory within {deadline.seconds:g} s") from None
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(max(deadline.left(), 0.001))
        try:
            sock.connect(where["path"])
            hello = {"token": where["token"], "rank": rank, "pid": os.getpid(), "capacity": arena.capacity}
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
            raise PeerLost(f"lost rank 0 while sharing memory: {error}", rank=0) from None
    return everything["pids"], everything["capacities"], fds, everything["board"]


def _read(sock, size):
    data = b""
    while len(data) < size:
        part = sock.recv(size - len(data))
        if not part:
            raise ConnectionError("connection closed")
        data += part
    return data


# ---- ranks of several hosts ------------------------------------------------------------------------------------------


def open_links(store: Store, members: list[Member], rank: int, cluster: ClusterConfig, deadline: Deadline,
               namespace: Namespace | None = None) -> Executor:
    """Connect to every rank: one connection for data, one for notices of failure.

    Args:    namespace: whose secret the ranks must know; None: that of the meeting place will do.
    Raises:  NotEnoughPeers at the deadline, AuthFailed when a peer is no member, ConfigError.
    """
    proven = connect(store, members, rank, cluster, deadline, namespace)
    links = {place: _link(connection, place, cluster) for place, connection in proven.items()}
    places = {kind: [links.get((kind, peer)) for peer in range(len(members))] for kind in (Kind.DATA, Kind.CONTROL)}
    local = sum(member.host == members[rank].host for member in members)
    return Executor(rank, places[Kind.DATA], places[Kind.CONTROL], spin_ns=spin_ns(local))


def connect(store: Store, members: list[Member], rank: int, cluster: ClusterConfig, deadline: Deadline,
            namespace: Namespace | None,
            kinds: tuple[Kind, ...] = (Kind.DATA, Kind.CONTROL)) -> dict[tuple[Kind, int], Proven]:
    """One proven connection of each kind to every other rank: {(kind, rank): connection}.

    Each rank connects to the lower ones and accepts the higher ones. The secret of the handshake is the namespace's; where
    there is none, a random token that rank 0 leaves in the store: then whoever can read the store can be a member.

    Raises:  as `open_links`.
    """
    others = [peer for peer in range(len(members)) if peer != rank]
    near = {peer: members[peer].host == members[rank].host for peer in others}
    own_hosts = ["127.0.0.1"] if all(near.values()) else own_addresses(cluster.iface)
    key = node_key(cluster, strict=namespace is not None)
    if cluster.encryption == "off" and rank == 0 and not all(near.values()):
        log.warning("encryption is off: gradients travel between hosts in the clear; peers still prove who they are")
    if rank == 0:
        store.set("token", secrets.token_hex(32))
    with socket.create_server(("127.0.0.1" if all(near.values()) else "", 0), backlog=BACKLOG) as listener:
        store.set(f"links.{rank}", {"addresses": own_hosts, "port": listener.getsockname()[1], "node": key.public.hex(),
                                    "encryption": cluster.encryption})
        try:
            token = bytes.fromhex(store.get("token", deadline.left()))
            cards = {peer: store.get(f"links.{peer}", deadline.left()) for peer in others}
        except KeyError as error:
            raise NotEnoughPeers(f"a rank did not offer its links within {deadline.seconds:g} s ({error})") from None
        wheres = {peer: _where(card, peer, cluster, near[peer]) for peer, card in cards.items()}
        namespace = namespace or Namespace.from_token(token, cluster.namespace)
        own = Credentials(key, namespace, derive(token, "meeting", size=MEETING_BYTES), rank)
        patience_s = cluster.connection_timeout_ms / 1000
        proven = {}
        try:
            for peer in range(rank):
                made = dial(own, peer, wheres[peer], {kind: _offers(kind, cluster, near[peer]) for kind in kinds},
                            num_attempts=max(1, cluster.max_retries), patience_s=patience_s, deadline=deadline)
                proven |= {(kind, peer): connection for kind, connection in made.items()}
            admits = {(kind, peer): _offers(kind, cluster, near[peer])
                      for peer in others if peer > rank for kind in kinds}
            friends = {host for where in wheres.values() for host in where.hosts}
            return proven | accept(own, listener, admits, {peer: where.node for peer, where in wheres.items()}, friends,
                                   patience_s=patience_s, deadline=deadline)
        except BaseException:
            for connection in proven.values():
                connection.sock.close()
            raise


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


def _where(card, peer, cluster, near):
    """The address on a rank's card."""
    theirs = card["encryption"]
    if {mode == "on" or (mode == "auto" and not near) for mode in (theirs, cluster.encryption)} == {True, False}:
        raise ConfigError(f"encryption is {cluster.encryption!r} here and {theirs!r} on rank {peer}")
    return Address(card["addresses"], card["port"], bytes.fromhex(card["node"]))


def _offers(kind, cluster, near):
    """The ciphers for a connection: control is sealed between hosts whatever the setting, for it costs nothing."""
    sealed = cluster.encryption == "on" or (not near and (cluster.encryption == "auto" or kind != Kind.DATA))
    return ciphers.offered() if sealed else ciphers.PLAIN


def _link(connection, place, cluster):
    """The link over a proven connection."""
    kind, peer = place
    session = connection.session
    link = TcpLink(connection.sock, peer, congestion=cluster.congestion if kind == Kind.DATA else None)
    if session.cipher == ciphers.PLAIN:
        return link
    return SecureLink(link, ciphers.cipher(session.cipher), session.send_key, session.receive_key,
                      record_bytes=NOTICE_RECORD_BYTES if kind == Kind.CONTROL else RECORD_BYTES)
