"""The membership of a node: one asyncio loop around discovery, channels and the pure machines.

Sightings go to the roster, which says whom to dial; a proven channel whose ends have said Hello makes a neighbour; health
watches neighbours; election agrees with them on the next view; topology says in which order. The machines know no sockets
and no clock: what they want done comes back as actions.

Others ask this node questions through a Contact: where it stands (`status`), for a view to start ranks in (`ready`), for
the place where these meet (`put`, `get`).
"""
from __future__ import annotations

import asyncio
import contextlib
import copy
import functools
import logging
import os
import random
import secrets
import socket
import threading
import time
from collections import deque
from collections.abc import Coroutine, Iterable
from typing import Any

import msgspec

from pyfleet import metrics
from pyfleet.config import ClusterConfig, NodeRole
from pyfleet.contact import Contact
from pyfleet.discovery import Announcement, Discovery, Seen, configured, open_discovery
from pyfleet.discovery.base import CLOSING_S, Event
from pyfleet.errors import AuthFailed, ConfigError, FleetError, NotEnoughPeers
from pyfleet.identity import Namespace, Session, short_id
from pyfleet.identity.handshake import Kind
from pyfleet.identity.keys import home_folder
from pyfleet.interfaces import Interface, interfaces, medium_of, reachable
from pyfleet.members import PROTOCOL, Node, Seat, View
from pyfleet.membership import messages
from pyfleet.membership.channel import Channel, Closed, Door, Self, dial
from pyfleet.membership.election import Election, Installed, Lost, Send
from pyfleet.membership.health import SILENT, Beat, Changed, Health
from pyfleet.membership.meetings import MOST_MEETINGS, Meetings
from pyfleet.membership.probe import probe_initiator, probe_responder
from pyfleet.membership.roster import (
    IN,
    OUT,
    Close,
    Connected,
    Dial,
    Discovered,
    Duplicate,
    Expired,
    OwnIdentityElsewhere,
    Place,
    Roster,
)
from pyfleet.membership.topology import Paths, Topology, rounds
from pyfleet.profile import profile
from pyfleet.wiring import node_key

USUAL_PORT = 52415              # of discovery_port; who did not choose it does not insist on it
HURRY_S = 0.5                   # for each of several addresses in the first round: a dead one must not hold up the others
HELLO_S = 5.0                   # from a proven connection to the first message
ROUND_S = 0.5                   # of probes: one takes 0.3 s, less on a fast link
SETTLED_S = 0.5                 # a leader starts ranks when nobody has come or gone for so long
MOST_TROUBLES = 8               # of the last reasons why somebody could not connect, for people
FAREWELL_S = 0.8                # for the last messages of all channels together

log = logging.getLogger("pyfleet.membership")


def clock() -> float:
    """Seconds that go on while the machine sleeps: see health."""
    return time.clock_gettime(time.CLOCK_BOOTTIME if hasattr(time, "CLOCK_BOOTTIME") else time.CLOCK_MONOTONIC)


class Service:
    """One node's part in its fleet. Methods belong to the loop that opened it; other threads use a ServiceContact.

    Args:    slots: ranks that this node runs.
             min_nodes: no fleet is founded with fewer.
    """

    def __init__(self, own: Self, cluster: ClusterConfig, discoveries: Iterable[Discovery] = (), *, slots: int = 1,
                 min_nodes: int = 1, profile: dict | None = None, version: str = ""):
        self.own, self.cluster, self.discoveries = own, cluster, list(discoveries)
        self.slots, self.min_nodes, self.profile, self.version = slots, min_nodes, profile or {}, version
        self.meetings, self.topology = Meetings(), Topology()
        self.door = Door(own, (Kind.MEMBER, Kind.QUERY, Kind.PROBE), self._let_in, patience_s=cluster.connection_timeout_ms / 1000,
                         on_refused=self._refused)
        self.channels: dict[str, Channel] = {}              # peer id -> the connection that stands to it
        self.paths: dict[str, Paths] = {}                   # what is known of their addresses
        self.nodes: dict[str, Node] = {}                    # what neighbours, and this node, say of themselves
        self.views: dict[tuple[str, int], View] = {}        # the last ones, for the meetings of their ranks
        self._starts: dict[tuple[str, int], dict] = {}      # what leaders said when ranks were to start
        self._installed_at, self._last_leader = 0.0, ""
        self.num_refused = 0
        self.clones: deque[str] = deque(maxlen=MOST_TROUBLES)
        self.troubles: deque[str] = deque(maxlen=MOST_TROUBLES)
        self._tasks: set[asyncio.Task] = set()
        self._alarm: asyncio.TimerHandle | None = None
        self._is_closing = False
        self._measuring: asyncio.Task | None = None
        self._changed = asyncio.Event()
        self._changed_at = 0.0
        self._wanted: dict[tuple[str, int, str], list[asyncio.Future]] = {}     # values asked of a leader

    # ---- from the first packet to the last ---------------------------------------------------------------------------

    async def open(self) -> None:
        """Listen, look for others, and be found.

        Raises:  ConfigError when a port that was chosen is taken, or the interface is not there.
        """
        self._loop = asyncio.get_running_loop()
        cluster = self.cluster
        addresses = reachable(chosen(cluster.iface))
        # A port that was asked for is taken or refused; the usual one may be another node's, and discovery tells ours.
        port = cluster.master_port if cluster.role is NodeRole.MASTER else cluster.discovery_port
        hosts = tuple(dict.fromkeys([*addresses, "127.0.0.1"])) if cluster.iface else None
        await self.door.open(port, hosts, fallback=port == USUAL_PORT)
        self.node = Node(peer=self.own.key.peer_id, incarnation=secrets.token_hex(8), name=socket.gethostname(),
                         addresses=tuple(addresses), port=self.door.port, slots=self.slots, profile=self.profile,
                         version=self.version)
        self.nodes[self.node.peer] = self.node
        self.roster = Roster(self.node.peer, self.node.incarnation, random.random)
        self.health = Health(self.node.peer)
        self.election = Election(self.node, self.min_nodes, self._order)
        self.topology.join(self.node)
        announcement = Announcement(self.node.peer, self.node.incarnation, self.door.port, self.node.name,
                                    tuple(addresses) if cluster.iface else (), self.version)
        for discovery in self.discoveries:
            discovery.start(announcement, self._notify)
        self._turn()

    async def close(self, reason: str = "") -> None:
        """Leave: say good-bye to everybody, and end within a second or two."""
        self._is_closing = True
        self._act(self.election.leave(clock(), reason))
        # Threads of our own: an interpreter that ends has no executor any more.
        closing = [threading.Thread(target=discovery.close, daemon=True) for discovery in self.discoveries]
        for thread in closing:
            thread.start()
        channels, self.channels = list(self.channels.values()), {}
        if self._alarm is not None:
            self._alarm.cancel()
        await asyncio.gather(*(channel.close(FAREWELL_S) for channel in channels), self.door.close())
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for thread in closing:
            thread.join(CLOSING_S)

    def _spawn(self, work: Coroutine) -> asyncio.Task:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("a fault of pyfleet's own, in %s", task.get_coro().__qualname__, exc_info=task.exception())

    # ---- connections -------------------------------------------------------------------------------------------------

    def _notify(self, event: Event) -> None:
        """Called by threads of a discovery."""
        with contextlib.suppress(RuntimeError):             # the loop has ended
            self._loop.call_soon_threadsafe(self._hear_of, event)

    def _hear_of(self, event: Event) -> None:
        now = clock()
        if isinstance(event, Seen):
            if event.protocol in (0, PROTOCOL):
                self._act(self.roster.sighted(event.sighting, now))
            else:
                self._trouble(f"{event.sighting.name} runs pyfleet {event.version}, which speaks protocol {event.protocol}, "
                              f"not {PROTOCOL}")
        else:
            self._act(self.roster.unsighted(event.peer, event.source, now))
        self._turn()

    async def _dial(self, target: Dial) -> None:
        """Try the places of a node one after the other, until at one of them it is."""
        reason, is_wanted = "it has no address", True

        def why_not(peer: str, place: Place) -> str | None:
            nonlocal is_wanted
            if target.peer and peer != target.peer:
                return f"there is node {short_id(peer)}, not {short_id(target.peer)}"
            is_wanted = self.roster.turned_out(peer, place, clock())
            return None if is_wanted else "it has connected meanwhile"

        patience_s = self.cluster.connection_timeout_ms / 1000
        paths = self.paths.setdefault(target.peer, Paths()) if target.peer else Paths()
        paths.learn([host for host, _ in target.places], interfaces())
        order = paths.order()
        places = sorted(target.places, key=lambda place: order.index(place[0]) if place[0] in order else len(order))
        hurried = [(place, min(HURRY_S, patience_s)) for place in places] if len(places) > 1 else []
        for place, most_s in [*hurried, *((place, patience_s) for place in places)]:
            try:
                reader, writer, session = await dial(self.own, *place, patience_s=most_s,
                                                     wants=functools.partial(why_not, place=place))
            except (AuthFailed, NotEnoughPeers) as error:
                reason = str(error)
                if not is_wanted:
                    self._turn()
                    return
                paths.failed(place[0])
                continue
            paths.worked(place[0])
            await self._serve(Channel(reader, writer, session, dialled=True), place)
            return
        if target.peer not in self.channels:
            self._trouble(reason)
        self._act(self.roster.failed(target, reason, clock()))
        self._turn()

    def _let_in(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, session: Session) -> None:
        if session.purpose.kind == Kind.PROBE:
            writer.transport.pause_reading()        # before the first word of the probe can come
            self._spawn(self._answer_probe(writer, session))
            return
        channel = Channel(reader, writer, session, dialled=False)
        self._spawn(self._serve(channel) if session.purpose.kind == Kind.MEMBER else self._answer_query(channel))

    def _refused(self, address: str, reason: str) -> None:
        self.num_refused += 1
        self._trouble(f"{address}: {reason}")

    def _trouble(self, reason: str) -> None:
        if reason not in self.troubles:
            self.troubles.append(reason)

    async def _serve(self, channel: Channel, place: Place | None = None) -> None:
        """A connection from its first message to its end."""
        channel.send(messages.Hello(self.node))
        try:
            async with asyncio.timeout(HELLO_S):
                hello = await channel.receive()
        except (Closed, TimeoutError) as error:
            self._trouble(f"{channel.address}: no hello: {str(error) or 'silent'}")
            await channel.close()
            return
        problem = _unfit(hello, channel, self.node)
        if problem:
            log.warning("node %s at %s is not let in: %s", short_id(channel.peer), channel.address, problem)
            self._trouble(f"{channel.address}: {problem}")
            channel.send(messages.Bye(problem, for_good=False))
            await channel.close()
            return
        if not self._adopt(channel, hello.node, place):
            channel.send(messages.Bye("another connection stands", for_good=False))
            await channel.close()
            return
        is_dead = has_left = False
        try:
            while True:
                message = await channel.receive()
                if isinstance(message, messages.Bye):
                    is_dead = has_left = message.for_good
                    break
                if self.channels.get(channel.peer) is channel:
                    self._take(channel, message)
        except Closed as end:
            is_dead = end.by_peer and self.health.is_current(channel.peer, clock())
            log.debug("the connection to %s ended: %s", hello.node.name, end)
        finally:
            if self.channels.get(channel.peer) is channel:
                self._lose(channel, hello.node, is_dead=is_dead, has_left=has_left)
            await channel.close()

    def _adopt(self, channel: Channel, node: Node, place: Place | None) -> bool:
        """Make this the connection to its peer, unless another one is to stay; whether it is."""
        now, peer = clock(), channel.peer
        actions = self.roster.connected(peer, node, OUT if channel.dialled else IN, now, place)
        closes = [action.which for action in actions if isinstance(action, Close)]
        if "other" in closes and (old := self.channels.pop(peer, None)) is not None:
            old.send(messages.Bye("another connection stands", for_good=False))
            self._spawn(old.close())
            self._act(self.health.remove(peer, now))
            self._act(self.election.down(peer, self.nodes[peer].incarnation, False, now))
        if "this" not in closes:
            self.channels[peer], self.nodes[peer] = channel, node
            self._act(self.health.add(peer, now))
            channel.send(messages.Known(tuple(each for each in self.roster.nodes if each.peer != peer)))
            self.topology.join(node)
            if own := {other: edge.facts() for other in self.channels
                       if self.node.peer < other and (edge := self.topology.edge(self.node.peer, other))}:
                channel.send(messages.Report(own))
            self._act(self.election.up(peer, node, now))
            self._ask_again(peer)
        self._act(actions)
        self._turn(changed="this" not in closes)
        return "this" not in closes

    def _lose(self, channel: Channel, node: Node, *, is_dead: bool, has_left: bool = False) -> None:
        """The connection to a neighbour is over."""
        now = clock()
        del self.channels[channel.peer]
        self._act(self.health.remove(channel.peer, now))
        self._act(self.roster.disconnected(channel.peer, now, left=has_left))
        self._act(self.election.down(channel.peer, node.incarnation, is_dead, now))
        self._turn(changed=True)

    def _take(self, channel: Channel, message: messages.Message) -> None:
        """A message of a neighbour."""
        now, peer = clock(), channel.peer
        self._act(self.health.received(peer, message, now))
        match message:
            case messages.Ping() | messages.Pong():
                metrics.HEARTBEATS.inc(direction="received")
                if isinstance(message, messages.Pong) and self.health.trip_ms(peer) is not None:
                    metrics.HEARTBEAT_LATENCY.observe(self.health.trip_ms(peer) / 1000)
                self._act(self.election.heard(peer, now))
            case messages.Known(nodes):
                self._act(self.roster.known(nodes, now))
            case messages.Put() | messages.Get() | messages.Got():
                self._meet(channel, message)
            case messages.Report(edges):
                self._learn(peer, edges)
            case messages.Hello() | messages.Told():
                channel.send(messages.Bye("that was not the time for it", for_good=False))
                self._spawn(channel.close())
            case _:
                self._act(self.election.received(peer, message, now))
        self._turn()

    # ---- what the machines want --------------------------------------------------------------------------------------

    def _act(self, actions: Iterable[object]) -> None:
        for action in actions:
            match action:
                case Send(peer, message) | Beat(peer, message):
                    if peer in self.channels:
                        self.channels[peer].send(message)
                        if isinstance(action, Beat):
                            metrics.HEARTBEATS.inc(direction="sent")
                case Changed(peer, state, silent_s) if state == SILENT:
                    log.warning("%s has been silent for %.1f s", self._name(peer), silent_s)
                    channel = self.channels[peer]
                    self._lose(channel, self.nodes[peer], is_dead=False)
                    self._spawn(channel.close(0.0))
                case Dial():
                    self._spawn(self._dial(action))
                case Discovered(peer, places, name):
                    log.debug("discovered %s at %s", name or short_id(peer), ", ".join(host for host, _ in places))
                case Connected(node):
                    log.info("%s is here", self._name(node.peer))
                case Expired(peer):
                    self.paths.pop(peer, None)
                    self.topology.leave(peer)
                    log.debug("%s is not in sight any more", self._name(peer))
                case Duplicate(peer, incarnations, _):
                    self._warn_of_clone(f"{len(incarnations)} machines, {self._name(peer)} one of them, share one identity: a "
                                        f"key file was copied; `pyfleet keys new --replace` on all but one")
                case OwnIdentityElsewhere(_, places):
                    self._warn_of_clone(f"the machine at {', '.join(host for host, _ in places) or '?'} has this machine's "
                                        f"identity: a key file was copied, or pyfleet runs here twice; `pyfleet keys new "
                                        f"--replace` on one of them")
                case Installed(view):
                    self._install(view)
                case Lost(_, reason):
                    if not self._is_closing:
                        log.warning("this node has left its fleet: %s", reason)
                    self._has_changed()

    def _warn_of_clone(self, text: str) -> None:
        log.warning("%s", text)
        self._trouble(text)
        self.clones.append(text)

    def _install(self, view: View) -> None:
        if view.leader != self._last_leader:
            metrics.ELECTIONS.inc(outcome="won" if view.leader == self.node.peer else "lost")
            self._last_leader = view.leader
        metrics.VIEW_CHANGES.inc()
        self.views[view.fleet, view.epoch], self._installed_at = view, clock()
        while len(self.views) > MOST_MEETINGS:
            oldest = next(iter(self.views))
            del self.views[oldest]
            self._starts.pop(oldest, None)
        log.info("epoch %d: %s, led by %s", view.epoch, ", ".join(self._name(peer) for peer in view.peers),
                 self._name(view.leader))
        if self._measuring is not None:
            self._measuring.cancel()
        self._measuring = self._spawn(self._measure(view))
        self._has_changed()

    def _has_changed(self) -> None:
        view = self.election.view
        metrics.PEERS.set(len(self.channels), state="connected")
        metrics.PEERS.set(len(view.seats) - 1 if view is not None else 0, state="in_view")
        self._changed_at = clock()
        self._changed.set()
        self._changed = asyncio.Event()

    def _name(self, peer: str) -> str:
        name = self.nodes[peer].name if peer in self.nodes else ""
        return f"{name} ({short_id(peer)})" if name else short_id(peer)

    def _turn(self, changed: bool = False) -> None:
        """Do what is due now, and set the alarm for what is due next."""
        if self._alarm is not None:
            self._alarm.cancel()
        if self._is_closing:
            return
        now = clock()
        if changed:
            self._has_changed()
        self._act(self.roster.tick(now))
        self._act(self.health.tick(now))
        self._act(self.election.tick(now))
        deadlines = [at for at in (self.roster.deadline, self.health.deadline, self.election.deadline) if at is not None]
        self._alarm = self._loop.call_later(max(0.0, min(deadlines) - now), self._turn) if deadlines else None

    # ---- measuring the ways between nodes ----------------------------------------------------------------------------

    def _order(self, seats: list[Seat]) -> list[Seat]:
        """The ring in which a view's nodes are put: by what was measured between them."""
        places = {seat.peer: seat for seat in seats}
        leader = min(seats, key=lambda seat: seat.seniority).peer
        return [places[peer] for peer in self.topology.ring(places, leader)]

    async def _measure(self, view: View) -> None:
        """Probe the ways to the other members that were not measured yet, in rounds that all members keep alike."""
        start = self._loop.time()
        for number, pairs in enumerate(rounds(view.peers)):
            responder = next((b for a, b in pairs if a == self.node.peer), None)
            if responder is None or self.topology.edge(self.node.peer, responder) is not None:
                continue
            await asyncio.sleep(start + number * ROUND_S - self._loop.time())
            if responder in self.channels:
                await self._probe(self.channels[responder].address, self.nodes[responder])
        await asyncio.sleep(start + measuring_s(len(view.seats)) - self._loop.time())
        if self.election.view is view and self.election.leading:
            self._act(self.election.want_change(clock()))
        self._turn(changed=True)

    async def _probe(self, address: str, node: Node) -> None:
        """Measure the way to a node, and tell everybody."""
        try:
            _, writer, session = await dial(self.own, address, node.port, kind=Kind.PROBE)
        except (AuthFailed, NotEnoughPeers) as error:
            log.info("the way to %s could not be measured: %s", node.name, error)
            return
        medium = medium_of(writer.get_extra_info("sockname")[0], interfaces())
        edge = await self._probing(writer, session, probe_initiator, medium, address)
        if edge is not None and session.peer_id == node.peer:
            self._learn(self.node.peer, {node.peer: edge.facts()})
            self.paths.setdefault(node.peer, Paths()).measured(edge)
            for channel in self.channels.values():
                channel.send(messages.Report({node.peer: edge.facts()}))

    async def _answer_probe(self, writer: asyncio.StreamWriter, session: Session) -> None:
        if session.peer_id in self.channels:
            medium = medium_of(writer.get_extra_info("sockname")[0], interfaces())
            await self._probing(writer, session, probe_responder, medium, "")
        writer.transport.abort()

    async def _probing(self, writer, session, side, medium, address):
        """One end of a probe, on a thread, over a socket of its own: asyncio has nothing to do with it any more."""
        writer.transport.pause_reading()
        sock = socket.socket(fileno=os.dup(writer.get_extra_info("socket").fileno()))
        try:
            return await asyncio.to_thread(side, sock, session.binding, medium=medium, address=address)
        except (FleetError, OSError) as error:
            log.info("a probe with %s failed: %s", short_id(session.peer_id), error)
            return None
        finally:
            sock.close()
            writer.transport.abort()

    def _learn(self, peer: str, edges: dict) -> None:
        """What a node measured."""
        try:
            self.topology.report(peer, edges)
        except ValueError as error:
            log.warning("%s reports nonsense: %s", self._name(peer), error)

    # ---- where the ranks of a view meet ------------------------------------------------------------------------------

    def _meet(self, channel: Channel, message: messages.Put | messages.Get | messages.Got) -> None:
        match message:
            case messages.Put(fleet, epoch, key, value):
                with contextlib.suppress(ValueError):
                    self.meetings.put(fleet, epoch, key, value)
            case messages.Get(fleet, epoch, key):
                self.meetings.get(fleet, epoch, key, lambda value: channel.send(messages.Got(fleet, epoch, key, value)))
            case messages.Got(fleet, epoch, key, value):
                for future in self._wanted.pop((fleet, epoch, key), ()):
                    if not future.done():
                        future.set_result(value)

    def _host_of(self, fleet: str, epoch: int) -> str:
        """The leader of a view, who keeps its meeting."""
        view = self.views.get((fleet, epoch))
        if view is None:
            raise NotEnoughPeers(f"this node was never in epoch {epoch} of fleet {fleet}")
        return view.leader

    def _put(self, fleet: str, epoch: int, key: str, value: bytes) -> None:
        host = self._host_of(fleet, epoch)
        if host == self.node.peer:
            self.meetings.put(fleet, epoch, key, value)
        elif host in self.channels:
            self.channels[host].send(messages.Put(fleet, epoch, key, value))
        else:
            raise NotEnoughPeers(f"{self._name(host)}, who led epoch {epoch}, is gone")

    async def _get(self, fleet: str, epoch: int, key: str, timeout: float) -> bytes:
        host, future = self._host_of(fleet, epoch), self._loop.create_future()
        if host == self.node.peer:
            self.meetings.get(fleet, epoch, key, lambda value: future.done() or future.set_result(value))
        else:
            self._wanted.setdefault((fleet, epoch, key), []).append(future)
            if host in self.channels:
                self.channels[host].send(messages.Get(fleet, epoch, key))
        try:
            async with asyncio.timeout(timeout):
                return await future
        except TimeoutError:
            raise KeyError(key) from None

    def _ask_again(self, peer: str) -> None:
        """What was asked of a leader, once more over its new connection."""
        for fleet, epoch, key in self._wanted:
            if (view := self.views.get((fleet, epoch))) is not None and view.leader == peer:
                self.channels[peer].send(messages.Get(fleet, epoch, key))

    # ---- questions ---------------------------------------------------------------------------------------------------

    async def answer(self, question: dict) -> Any:
        """The answer to a question of this node's own ranks and of its user.

        Raises:  FleetError of any kind, KeyError for a value that is not there in time.
        """
        if isinstance(question.get("timeout"), int):
            question = {**question, "timeout": float(question["timeout"])}
        match question:
            case {"ask": "status"}:
                return self.status()
            case {"ask": "view", "fleet": str(fleet), "epoch": int(epoch)} if (fleet, epoch) in self.views:
                return {"view": msgspec.to_builtins(self.views[fleet, epoch]),
                        "links": self._starts.get((fleet, epoch), {}).get("links")}
            case {"ask": "metrics"}:
                return metrics.REGISTRY.snapshot()
            case {"ask": "peers", "count": int(count), "timeout": float(timeout)}:
                return await self._peers(count, timeout)
            case {"ask": "ready", "min_nodes": int(min_nodes), "timeout": float(timeout)}:
                return await self._ready(min_nodes, timeout)
            case {"ask": "put", "fleet": str(fleet), "epoch": int(epoch), "key": str(key), "value": bytes(value)}:
                return self._put(fleet, epoch, key, value)
            case {"ask": "get", "fleet": str(fleet), "epoch": int(epoch), "key": str(key), "timeout": float(timeout)}:
                return await self._get(fleet, epoch, key, timeout)
        raise ConfigError(f"there is no question {question.get('ask')!r}, or not with these details")

    async def _answer_query(self, channel: Channel) -> None:
        """Tell a member's user, who asks from elsewhere, how things stand here."""
        channel.send(messages.Told(msgspec.msgpack.encode(self.status())))
        await channel.close()

    def status(self) -> dict:
        """Where this node, and the fleet as seen from it, stand; JSON-like."""
        view = self.election.view
        members = {}
        for peer in dict.fromkeys([*(view.peers if view else ()), self.node.peer, *self.channels]):
            node, seat = self.nodes.get(peer), view.seat(peer) if view else None
            members[peer] = {
                "peer": peer, "name": node.name if node else "", "addresses": list(node.addresses) if node else [],
                "port": node.port if node else 0, "incarnation": node.incarnation if node else "",
                "version": node.version if node else "", "profile": node.profile if node else {},
                "is_self": peer == self.node.peer, "is_leader": view is not None and view.leader == peer,
                "in_view": seat is not None, "slots": seat.slots if seat else node.slots if node else 0,
                "joined": seat.joined if seat else None, "first_rank": view.first_rank(peer) if seat else None,
                "address": self.channels[peer].address if peer in self.channels else None,
                "health": "self" if peer == self.node.peer else self.health.state(peer) if peer in self.channels
                          else "unreachable",
                "latency_ms": self.health.latency_ms(peer) if peer in self.channels else None,
                "bytes_sent": self.channels[peer].bytes_sent if peer in self.channels else 0,
                "bytes_received": self.channels[peer].bytes_received if peer in self.channels else 0,
            }
        return {
            "peer": self.node.peer, "incarnation": self.node.incarnation, "state": self.election.state,
            "is_leading": self.election.leading, "has_quorum": self.election.has_quorum,
            "fleet": view.fleet if view else None, "epoch": view.epoch if view else 0,
            "leader": view.leader if view else None, "step": self.election.step,
            "world_size": view.world_size if view else 0, "num_views": self.election.num_views,
            "nodes": list(members.values()), "topology": self.topology.as_json(view.peers if view else ()), "troubles": list(self.troubles), "num_refused": self.num_refused,
            "clones": list(self.clones),
            "port": self.door.port, "time": time.time(),
        }

    async def _peers(self, count: int, timeout: float) -> int:
        """Wait for as many neighbours.

        Raises:  NotEnoughPeers("found 1 of 3 ...") at the deadline.
        """
        limit = _Limit(timeout)
        while len(self.channels) < count:
            if not await limit.wait(self._changed):
                raise NotEnoughPeers(self._shortage(len(self.channels), count, "peers", timeout))
        return len(self.channels)

    async def _ready(self, min_nodes: int, timeout: float) -> dict:
        """A view with at least so many nodes, in which every member starts its ranks now.

        The leader says when, in the meeting of the view; who comes later finds the fleet at work and waits for its end.
        """
        limit = _Limit(timeout)
        while True:
            changed, view = self._changed, self.election.view
            if view is None or len(view.seats) < min_nodes:
                if not await limit.wait(changed):
                    raise NotEnoughPeers(self._shortage(len(self.channels) + 1, min_nodes, "nodes", timeout))
                continue
            start = await self._start_of(view, changed, limit)
            if start is not None:
                return self._place_in(view, start)
            if limit.is_over:
                raise NotEnoughPeers(f"{len(view.seats)} nodes met, but {self._name(view.leader)}, who leads them, did "
                                     f"not start anything within {timeout:g} s: the fleet may be at work already")

    def _is_in_order(self, view: View) -> bool:
        """Whether the ring is the one that the measurements ask for; else a next view is on its way."""
        return [seat.peer for seat in self._order(list(view.seats))] == list(view.peers)

    async def _start_of(self, view: View, changed: asyncio.Event, limit: _Limit) -> dict | None:
        """What the leader says of the start in this view; None when the view changes before that, or time is up."""
        asked = asyncio.ensure_future(self._get(view.fleet, view.epoch, "start", max(limit.left_s, 0.001)))
        try:
            if view.leader == self.node.peer:
                quiet = max(self._changed_at + SETTLED_S, self._installed_at + measuring_s(len(view.seats))) - clock()
                if quiet > 0 and await limit.wait(changed, quiet):
                    return None
                if self.election.leading and self.election.view is view and self._is_in_order(view):
                    start = {"master_port": _free_port(), "links": self.topology.links(view.seats)}
                    self._put(view.fleet, view.epoch, "start", msgspec.msgpack.encode(start))
            gone = asyncio.ensure_future(changed.wait())
            await asyncio.wait((asked, gone), return_when=asyncio.FIRST_COMPLETED)
            gone.cancel()
            with contextlib.suppress(KeyError):
                if asked.done():
                    self._starts[view.fleet, view.epoch] = start = msgspec.msgpack.decode(asked.result())
                    return start
            return None
        finally:
            asked.cancel()

    def _place_in(self, view: View, start: dict) -> dict:
        """This node's share of the ranks of a view."""
        first = view.seats[0].peer
        if first == self.node.peer:
            others = [self.channels[peer].own_address for peer in view.peers if peer in self.channels]
            address = (others or self.node.addresses or ("127.0.0.1",))[0]
        else:
            address = self.channels[first].address if first in self.channels else self.nodes[first].addresses[0]
        return {"fleet": view.fleet, "epoch": view.epoch, "leader": view.leader, "peers": list(view.peers),
                "node_rank": view.peers.index(self.node.peer), "first_rank": view.first_rank(self.node.peer),
                "world_size": view.world_size, "master_addr": address, "master_port": start["master_port"]}

    def _shortage(self, found: int, wanted: int, what: str, timeout: float) -> str:
        """Why nobody came, as far as it is known."""
        strangers = sum(discovery.num_strangers for discovery in self.discoveries)
        text = f"found {found} of {wanted} {what} within {timeout:g} s"
        if strangers:
            text += f"; {strangers} in sight belong to other namespaces"
        if self.troubles:
            text += f"; the last trouble: {self.troubles[-1]}"
        return text if found >= wanted or self.troubles else f"{text}; `pyfleet doctor` may tell why"


class _Limit:
    """The time that an answer may take."""

    def __init__(self, seconds: float):
        self._until = asyncio.get_running_loop().time() + seconds

    @property
    def left_s(self) -> float:
        """Seconds until then; negative when it is over."""
        return self._until - asyncio.get_running_loop().time()

    @property
    def is_over(self) -> bool:
        """Whether there is no time left."""
        return self.left_s <= 0

    async def wait(self, event: asyncio.Event, most_s: float | None = None) -> bool:
        """Whether the event came in time."""
        try:
            async with asyncio.timeout(max(0.0, self.left_s if most_s is None else min(self.left_s, most_s))):
                await event.wait()
        except TimeoutError:
            return False
        return True


def _unfit(hello: messages.Message, channel: Channel, own: Node) -> str | None:
    """Why a proven connection can be none of a neighbour; None when it can."""
    if not isinstance(hello, messages.Hello):
        return "it did not begin with a hello"
    node = hello.node
    if node.peer != channel.peer:
        return f"it says to be node {short_id(node.peer)}, but proved to be {short_id(channel.peer)}"
    if node.protocol != PROTOCOL:
        return f"it runs pyfleet {node.version}, which speaks protocol {node.protocol}, not {PROTOCOL}"
    return None


def chosen(iface: str | None) -> list[Interface]:
    """The interfaces to be used: all of them, or the one of the settings.

    Raises:  ConfigError naming those that there are.
    """
    there = interfaces()
    if iface is None:
        return there
    if iface not in {each.name for each in there}:
        raise ConfigError(f"there is no interface {iface!r} that is up: one of {', '.join(each.name for each in there)}")
    return [each for each in there if each.name == iface]


def measuring_s(num_nodes: int) -> float:
    """How long the members of a view measure the ways between them: as many rounds as pairs need, and one to settle."""
    return ROUND_S * (num_nodes + num_nodes % 2) if num_nodes > 1 else 0.0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def open_service(cluster: ClusterConfig, *, slots: int = 1, min_nodes: int = 1) -> Service:
    """The service of this node as the settings say, not opened yet.

    Raises:  ConfigError without a PSK: whoever is on the network could join; for a key or PSK that cannot be used.
    """
    namespace = Namespace.required(cluster)
    if cluster.role is NodeRole.WORKER and cluster.master_addr is not None:
        host = f"[{cluster.master_addr}]" if ":" in cluster.master_addr else cluster.master_addr
        cluster = copy.copy(cluster)
        cluster.static_peers = (*cluster.static_peers, f"{host}:{cluster.master_port}")
    discoveries = [open_discovery(kind, cluster, namespace) for kind in configured(cluster)]
    key, facts = node_key(cluster, strict=True), profile(home_folder(cluster.home))
    return Service(Self(key, namespace), cluster, discoveries, slots=slots, min_nodes=min_nodes, profile=facts,
                   version=str(facts["versions"]["pyfleet"] or ""))


class ServiceContact(Contact):
    """A service on a thread of this process.

    Raises (when made):  as open_service() and Service.open().
    """

    def __init__(self, service: Service):
        self._service, self._loop = service, asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="pyfleet-membership", daemon=True)
        self._thread.start()
        try:
            self._run(service.open(), None)
        except BaseException:
            self._end()
            raise

    def ask(self, what, timeout=None, **details):
        return self._run(self._service.answer({"ask": what, "timeout": timeout, **details}), timeout)

    def _run(self, work: Coroutine, timeout: float | None) -> Any:
        if self._loop.is_closed():
            work.close()
            raise FleetError("this node has left its fleet")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def close(self):
        if not self._loop.is_closed():
            with contextlib.suppress(FleetError):
                self._run(self._service.close(), None)
            self._end()

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
