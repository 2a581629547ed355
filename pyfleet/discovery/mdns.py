"""P1: discovery on the local network by multicast DNS (RFC 6762, 6763), with python-zeroconf.

Each node is an instance of _pyfleet._tcp.local. whose name says which peer in which incarnation it is, so that no two
nodes can claim one name, and nothing has to be probed before it is announced. The library answers questions, keeps the
sockets and reads packets. Who is there is kept here: the library holds every name for at least 19 minutes, and asks again only then.
"""
from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import logging
import random
import re
import socket
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec
import psutil
from zeroconf import (
    DNSAddress,
    DNSOutgoing,
    DNSPointer,
    DNSQuestion,
    DNSService,
    DNSText,
    IPVersion,
    RecordUpdate,
    RecordUpdateListener,
    ServiceInfo,
    Zeroconf,
)
from zeroconf import Error as ZeroconfError
from zeroconf.asyncio import AsyncZeroconf

from pyfleet.config import ClusterConfig
from pyfleet.discovery.base import CLOSING_S, MOST_SIGHTINGS, Announcement, Belonging, Discovery, Gone, Notify, Seen
from pyfleet.members import Sighting

SERVICE = "_pyfleet._tcp.local."
RECORD_S = 30               # how long a record is good: a node that was killed is gone after this at the latest
LONGEST_RECORD_S = 120      # whatever a stranger says of his
ASK_FROM, ASK_TO, ASK_STEP = 0.5, 0.65, 0.1     # of a record's time: asked again from here, at random, up to five times;
                                                # one question and one answer by multicast serve the whole fleet
UNKNOWN_S = 10.0            # a name of which nothing else is heard is forgotten after this
LONGEST_SILENCE_S = 60.0    # the general question is asked at 0, 1, 3, 7, ... s, then this often: RFC 6762 would have it
                            # ever rarer, up to an hour, but a network that has healed must not stay divided so long
TICK_S = 0.5
POLL_S = 2.0                # between two looks at the interfaces of this machine
ECHO_S = 3.0                # our own announcement must come back within this, or multicast is blocked here
REPEAT_S = 1.5              # what is announced is said again after this, and so is what somebody else says in our name: the
                            # library takes equal packets within 0.8 s for one, even when another came between
CHANGE_S = 1.0              # what is known of a node changes at most so often, whoever talks of it
MOST_ADDRESSES = 16         # of one node
MOST_LETTERS = 60           # of a name or a version: with 4 bytes each, still an entry of a TXT record (255 bytes)
MARKED = ("v", "tag", "peer", "inc", "proto", "name")      # entries of the TXT record that its mark covers
MOST_QUESTIONS = 20         # asked at a time, in one packet: 20 names of 50 bytes
MOST_KNOWN = 24             # instances that the general question says not to answer for
PTR, TXT, SRV, IN = 12, 16, 33, 1           # RFC 1035, 2782
APPLE_RADIO = ("awdl", "llw")               # macOS: machine to machine, at the cost of the WiFi's air time
QUERY = 0x0000                              # RFC 1035: the flags of a question

_LABEL = re.compile(r"[a-z2-7]{12}-[0-9a-f]{16}")
_PEER = re.compile(r"[a-z2-7]{52}")
_TAG = re.compile(r"[0-9a-f]{32}")

log = logging.getLogger("pyfleet.discovery")


@dataclass(frozen=True)
class Interface:
    """A network interface that is up: its own addresses, and those by which multicast is sent (at most one of a family)."""

    name: str
    addresses: tuple[str, ...]
    senders: tuple[str, ...]
    is_loopback: bool


@dataclass
class Instance:
    """What has been heard of one name. `seen`: what was reported of it last, None before everything is known."""

    label: str
    expires: float
    ask_at: float
    port: int = 0
    who: dict[str, str] | None = None
    addresses: tuple[str, ...] = ()
    seen: Seen | None = None
    told_at: float = float("-inf")


@dataclass
class _News:
    """What one packet says of one name."""

    bye: bool = False
    service: DNSService | None = None
    text: bytes | None = None
    addresses: list[str] = field(default_factory=list)


class _Ear(RecordUpdateListener):
    """Hands every record that arrives to a function."""

    def __init__(self, hear):
        self._hear = hear

    def async_update_records(self, zc: Zeroconf, now: float, records: list[RecordUpdate]) -> None:
        """Called by the library in its loop."""
        self._hear([update.new for update in records], now)

    def async_update_records_complete(self) -> None:
        """The library's own cache is not used."""


class MdnsDiscovery(Discovery):
    """The nodes that announce themselves on the networks of this machine, or on that of cluster.iface."""

    def __init__(self, cluster: ClusterConfig, namespace: Belonging | None, everybody: bool = False):
        super().__init__(cluster, namespace, everybody)
        self._instances: dict[str, Instance] = {}       # of our namespace, or not known yet of which
        self._strangers: dict[str, float] = {}          # names of others, until when
        self._interfaces: list[Interface] = []
        self._announcement: Announcement | None = None
        self._published: Announcement | None = None
        self._info: ServiceInfo | None = None
        self._notify: Notify = None
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wake: asyncio.Event | None = None
        self._azc: AsyncZeroconf | None = None
        self._tasks: set[asyncio.Future] = set()
        self._next_poll = self._next_ask = 0.0
        self._silence_s = 0.5
        self._first_ask = True
        self._echo_due: float | None = None
        self._num_repeats, self._repeat_at = 0, 0.0     # announcements that are still to be made again, and when
        self._troubles: set[str] = set()                # said once each
        self._closing = threading.Event()

    # ---- called from any thread ----------------------------------------------------------------------------------

    def start(self, announcement: Announcement | None, notify: Notify) -> None:
        """As the contract says."""
        self._refuse_without_namespace(announcement)
        self._announcement, self._notify = announcement, notify
        self._thread = threading.Thread(target=self._run, name="pyfleet-mdns", daemon=True)
        self._thread.start()

    def update(self, announcement: Announcement) -> None:
        """As the contract says."""
        self._announcement = announcement
        self._rouse()

    def close(self) -> None:
        """As the contract says."""
        self._closing.set()
        self._rouse()
        if self._thread not in (None, threading.current_thread()):
            self._thread.join(CLOSING_S)

    @property
    def num_strangers(self) -> int:
        """As the contract says."""
        return len(self._strangers)

    @property
    def interfaces(self) -> list[Interface]:
        """The interfaces that are in use now."""
        return list(self._interfaces)

    @property
    def hears_itself(self) -> bool | None:
        """Whether our own announcement came back to us, as multicast does; None when it is too early to say."""
        if self._info is None or (self._echo_due is not None and time.monotonic() < self._echo_due):
            return None
        return self._echo_due is None

    def _rouse(self) -> None:
        with contextlib.suppress(RuntimeError):         # the loop has ended
            if self._loop is not None and self._wake is not None:
                self._loop.call_soon_threadsafe(self._wake.set)

    # ---- the thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except Exception:
            log.exception("discovery by mDNS has ended")

    async def _serve(self) -> None:
        self._loop, self._wake = asyncio.get_running_loop(), asyncio.Event()
        try:
            while not self._closing.is_set():
                now = time.monotonic()
                if now >= self._next_poll:
                    self._next_poll = now + POLL_S
                    await self._follow_interfaces()
                if self._azc is not None:
                    await self._publish()
                    self._look_around(time.monotonic())
                self._wake.clear()
                if not self._closing.is_set():
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self._wake.wait(), TICK_S)
        finally:
            self._hush()
            if self._azc is not None:
                await self._azc.async_close()           # good-byes, three of them, 0.25 s

    async def _follow_interfaces(self) -> None:
        """Send and listen on the interfaces that there are now."""
        wanted = self._cluster_interfaces()
        if wanted == self._interfaces and self._azc is not None:
            return
        senders = [address for interface in wanted for address in interface.senders]
        if not senders or (not self.cluster.iface and all(each.is_loopback for each in wanted)):
            which = f"interface {self.cluster.iface}" if self.cluster.iface else "network interface"
            self._say("no interface", f"no {which} is up: mDNS discovery waits for it, and finds nobody on other machines")
        else:
            self._troubles.discard("no interface")
        try:
            if self._azc is None:
                if not senders:
                    return
                await self._open(senders)
            else:
                gone_before, self._interfaces = self._interfaces, wanted
                await self._publish()           # first, so that who hears us on a new interface hears the new addresses
                if gone_before != wanted:
                    await self._azc.zeroconf.async_update_interfaces(interfaces=senders)
        except (OSError, RuntimeError, ZeroconfError) as error:      # RuntimeError: an address has gone since we looked
            self._say("open", f"mDNS discovery cannot listen yet: {getattr(error, 'strerror', None) or error}")
            return
        self._interfaces = wanted
        self._troubles.discard("open")
        self._ask_soon()

    def _cluster_interfaces(self) -> list[Interface]:
        found = interfaces()
        if self.cluster.iface:
            return [each for each in found if each.name == self.cluster.iface]
        return [each for each in found if not each.is_loopback] or found

    async def _open(self, senders: list[str]) -> None:
        try:
            zc = Zeroconf(senders, ip_version=IPVersion.All)
        except OSError:
            if socket.has_dualstack_ipv6() and Path("/proc/net/if_inet6").exists():
                raise                           # IPv6 is there: it was something else
            zc = Zeroconf([address for address in senders if ":" not in address], ip_version=IPVersion.V4Only)
        azc = AsyncZeroconf(zc=zc)
        try:
            await zc.async_wait_for_start()
        except BaseException:
            await azc.async_close()
            raise
        self._azc = azc
        zc.async_add_listener(_Ear(self._hear), None)

    async def _publish(self) -> None:
        """Announce what there is to announce, if it is not what was announced last."""
        if self._announcement is None or self._azc is None:
            return
        own = self._announcement
        if not own.addresses:
            own = replace(own, addresses=tuple(address for each in self._interfaces for address in each.addresses))
        if own == self._published:
            return
        info, zc = self._service_info(own), self._azc.zeroconf
        self._hush()
        if self._info is None:
            # Our name is ours alone, so there is nobody to be asked first: that would take 1.2 to 1.7 s.
            self._keep(await zc.async_register_service(info, cooperating_responders=True, strict=False))
            self._echo_due = time.monotonic() + ECHO_S
        else:
            self._keep(await zc.async_update_service(info))
        self._info, self._published = info, own
        self._num_repeats, self._repeat_at = max(self._num_repeats, 1), time.monotonic() + REPEAT_S

    def _service_info(self, own: Announcement) -> ServiceInfo:
        label = own_label(own)
        text = {"v": own.version[:MOST_LETTERS], "tag": self.namespace.tag, "peer": own.peer, "inc": own.incarnation,
                "proto": str(own.protocol), "name": own.name[:MOST_LETTERS]}
        text["mark"] = self.namespace.mark(_marked(text))
        packed = [ipaddress.ip_address(address.partition("%")[0]).packed for address in own.addresses[:MOST_ADDRESSES]]
        return ServiceInfo(SERVICE, f"{label}.{SERVICE}", own.port, server=f"{label}.local.", addresses=packed,
                           properties=text, host_ttl=RECORD_S, other_ttl=RECORD_S)

    def _hush(self) -> None:
        """End announcements under way: said after what follows, the old would be believed again."""
        for task in list(self._tasks):
            task.cancel()

    def _keep(self, task: asyncio.Future) -> None:
        self._tasks.add(task)                   # the loop itself does not
        task.add_done_callback(self._tasks.discard)

    def _say(self, about: str, message: str) -> None:
        if about not in self._troubles:
            self._troubles.add(about)
            log.warning("%s", message)

    # ---- questions -----------------------------------------------------------------------------------------------

    def _look_around(self, now: float) -> None:
        """Forget who was silent too long, and ask for those who are about to be."""
        for label in [label for label, until in self._strangers.items() if until <= now]:
            del self._strangers[label]
        for instance in [each for each in self._instances.values() if each.expires <= now]:
            self._forget(instance)
            if instance.seen is not None:
                self._ask_soon()                # perhaps it is the network that has gone
        for instance in [each for each in self._instances.values() if each.seen is not None]:
            self._report(instance)
        due = [each for each in self._instances.values() if each.ask_at <= now]
        if due:
            out = DNSOutgoing(QUERY)
            for instance in sorted(due, key=lambda each: each.seen is None)[:MOST_QUESTIONS]:
                out.add_question(DNSQuestion(f"{instance.label}.{SERVICE}", SRV, IN))
                if instance.who is None:
                    out.add_question(DNSQuestion(f"{instance.label}.{SERVICE}", TXT, IN))
                instance.ask_at = now + (ASK_STEP * RECORD_S if instance.seen else 1.0)
            self._azc.zeroconf.async_send(out)
        if self._num_repeats and now >= self._repeat_at:
            self._num_repeats, self._repeat_at = self._num_repeats - 1, now + REPEAT_S
            self._azc.zeroconf.async_send(self._azc.zeroconf.generate_service_broadcast(self._info, None))
        if now >= self._next_ask and any(each.senders for each in self._interfaces):
            self._ask(now)
        if self._echo_due is not None and now >= self._echo_due:
            self._say("echo", "nothing that this node announces by multicast comes back to it: a firewall, or the network, "
                              "seems to block mDNS (UDP port 5353); static_peers finds nodes without it")

    def _ask_soon(self) -> None:
        """The network may have changed: ask at once, and often at first."""
        self._next_ask, self._silence_s, self._first_ask = 0.0, 0.5, True

    def _ask(self, now: float) -> None:
        question = DNSQuestion(SERVICE, PTR, IN)
        question.unicast = self._first_ask      # RFC 6762 5.4: answered at once, and to us alone where others know already
        out = DNSOutgoing(QUERY)
        out.add_question(question)
        known = [each for each in self._instances.values() if each.seen is not None]
        labels = [each.label for each in random.sample(known, min(len(known), MOST_KNOWN))]
        if self._published is not None:
            labels.append(own_label(self._published))
        for label in labels:
            out.add_answer_at_time(DNSPointer(SERVICE, PTR, IN, RECORD_S, f"{label}.{SERVICE}", 0.0), 0)
        self._azc.zeroconf.async_send(out)
        self._silence_s = min(2 * self._silence_s, LONGEST_SILENCE_S)
        self._next_ask, self._first_ask = now + self._silence_s, False

    # ---- answers -------------------------------------------------------------------------------------------------

    def _hear(self, records: Iterable[object], library_now: float) -> None:
        """Take what a packet says; called in the loop."""
        news: dict[str, _News] = {}
        for record in records:
            bye = record.ttl == 0
            if not bye and record.is_expired(library_now):
                continue                        # the library clears its cache
            if isinstance(record, DNSPointer):
                label = _label(record.alias, SERVICE) if record.name.lower() == SERVICE else None
            else:
                label = _label(record.name, "local." if isinstance(record, DNSAddress) else SERVICE)
            if label is None:
                continue
            told = news.setdefault(label, _News())
            if isinstance(record, DNSAddress):
                if not bye and (address := self._address(record)):
                    told.addresses.append(address)
            elif bye:
                told.bye = told.bye or not isinstance(record, DNSText)
            elif isinstance(record, DNSService):
                told.service = record
            elif isinstance(record, DNSText):
                told.text = record.text
        now = time.monotonic()
        for label, told in news.items():
            if self._published is not None and label == own_label(self._published):
                self._hear_own(told)
            else:
                self._hear_of(label, told, now)

    def _is_wanted(self, who: dict[str, str]) -> bool:
        """Whether a node is to be reported. Who has listened can repeat what a member has said of itself, and no more."""
        if self.namespace is not None and who["tag"] == self.namespace.tag:
            return hmac.compare_digest(self.namespace.mark(_marked(who)), who["mark"])
        return self.everybody

    def _address(self, record: DNSAddress) -> str | None:
        """The address of a record as text, with its scope; None when nothing can be reached there."""
        try:
            address = ipaddress.ip_address(record.address)
        except ValueError:
            return None
        if address.is_multicast or address.is_unspecified or address.is_reserved:
            return None
        if address.is_loopback and not all(each.is_loopback for each in self._interfaces):
            return None                         # nobody else can speak for this machine
        if address.version == 6 and address.is_link_local:
            try:
                return f"{address}%{socket.if_indextoname(record.scope_id)}"
            except (OSError, TypeError):        # the interface has gone; or heard by IPv4, which has no scopes
                return None
        return str(address)

    def _hear_own(self, told: _News) -> None:
        if self._echo_due is not None:
            self._echo_due = None
            if "echo" in self._troubles:
                self._troubles.discard("echo")
                log.warning("multicast works now: this node hears its own announcement")
        own = {address.partition("%")[0] for address in self._published.addresses}
        forged = (told.bye or (told.service is not None and told.service.port != self._published.port)
                  or any(address.partition("%")[0] not in own for address in told.addresses))
        if forged:
            self._num_repeats = 2

    def _hear_of(self, label: str, told: _News, now: float) -> None:
        who = None if told.text is None else read_text(told.text, label)
        if who is not None and not self._is_wanted(who):
            who = None
        if label in self._strangers:
            if told.bye or who is not None:     # who: somebody else had used the name of one of ours
                del self._strangers[label]
            elif told.service is not None:
                self._strangers[label] = now + _lifetime(told.service.ttl)
            if who is None:
                return
        instance = self._instances.get(label)
        if told.bye:
            if instance is not None:
                self._forget(instance)
            return
        if instance is None:
            if len(self._instances) >= MOST_SIGHTINGS:
                self._make_room()
            instance = self._instances[label] = Instance(label, now + UNKNOWN_S, now)
        if told.text is not None:
            if who is not None:
                instance.who = who
            elif instance.who is None:
                del self._instances[label]
                if len(self._strangers) < MOST_SIGHTINGS:
                    self._strangers[label] = now + (_lifetime(told.service.ttl) if told.service else RECORD_S)
                return
        if told.service is not None and told.service.port:
            instance.port = told.service.port
            lifetime = _lifetime(told.service.ttl)
            instance.expires = now + lifetime
            instance.ask_at = now + lifetime * random.uniform(ASK_FROM, ASK_TO)
        if told.addresses:
            instance.addresses = self._merged(instance.addresses, told.addresses)
        self._report(instance)

    def _make_room(self) -> None:
        """Forget one: of those who have not proved to be ours the oldest, else by lot, so that no flood keeps all others out."""
        unproven = next((each for each in self._instances.values() if each.who is None), None)
        self._forget(unproven or random.choice(list(self._instances.values())))

    @staticmethod
    def _merged(before: tuple[str, ...], told: list[str]) -> tuple[str, ...]:
        """A packet names all addresses of a node, but a link-local one is of use only where its scope is known."""
        scoped = [address for address in before if "%" in address] if not any("%" in address for address in told) else []
        ranked = sorted(dict.fromkeys([*told, *scoped]), key=lambda address: (":" in address, "%" in address, address))
        return tuple(ranked[:MOST_ADDRESSES])

    def _report(self, instance: Instance) -> None:
        if instance.who is None or not instance.port or not instance.addresses:
            instance.ask_at = min(instance.ask_at, time.monotonic() + TICK_S)
            return
        who = instance.who
        sighting = Sighting(instance.addresses, instance.port, who["peer"], who["inc"], _shown(who["name"]), "mdns")
        seen = Seen(sighting, who["tag"], int(who["proto"]), _shown(who["v"]))
        now = time.monotonic()
        if seen == instance.seen or now - instance.told_at < CHANGE_S:
            return                              # a change that comes too soon is told by _look_around
        is_new, instance.seen, instance.told_at = instance.seen is None, seen, now
        if is_new:
            for other in [each for each in self._instances.values() if _is_successor(seen, each.seen)]:
                self._forget(other)
        self._tell(seen)

    def _forget(self, instance: Instance) -> None:
        del self._instances[instance.label]
        if instance.seen is not None:
            self._tell(Gone(instance.seen.sighting.peer, instance.seen.sighting.incarnation, "mdns"))

    def _tell(self, event: Seen | Gone) -> None:
        try:
            self._notify(event)
        except Exception:
            log.exception("%s was not taken", event)


def own_label(own: Announcement) -> str:
    """The name of an instance: short enough for DNS (63 bytes), and nobody else's."""
    return f"{own.peer[:12]}-{own.incarnation}"


def read_text(text: bytes, label: str) -> dict[str, str] | None:
    """Who a node says it is in its TXT record; None when that is not what one of ours would say under this name."""
    found: dict[str, str] = {}
    while text:
        entry, text = text[1:1 + text[0]], text[1 + text[0]:]
        name, _, value = entry.decode("utf-8", "replace").partition("=")
        found.setdefault(name, value)
    who = {name: found.get(name, "") for name in (*MARKED, "mark")}
    good = (_PEER.fullmatch(who["peer"]) and _TAG.fullmatch(who["tag"]) and re.fullmatch(r"[0-9]{1,5}", who["proto"])
            and who["mark"].isascii() and label == f"{who['peer'][:12]}-{who['inc']}")
    return who if good else None


def _marked(who: dict[str, str]) -> bytes:
    """What a member vouches for with its mark."""
    return msgspec.msgpack.encode([who[name] for name in MARKED])


def _shown(text: str) -> str:
    """What people will see on their terminals, harmless and not too long."""
    return "".join(filter(str.isprintable, text))[:MOST_LETTERS]


def interfaces() -> list[Interface]:
    """The interfaces of this machine that are up, run, and can do multicast."""
    found, stats, unready = [], psutil.net_if_stats(), _unready_addresses()
    for name, entries in sorted(psutil.net_if_addrs().items()):
        state = stats.get(name)
        flags = (getattr(state, "flags", "") or "").split(",")
        if state is None or not state.isup or ("running" not in flags and flags != [""]) or name.startswith(APPLE_RADIO):
            continue
        four = [entry.address for entry in entries if entry.family == socket.AF_INET]
        six = [entry.address for entry in entries if entry.family == socket.AF_INET6
               and (name, entry.address.partition("%")[0]) not in unready]
        is_loopback = any(ipaddress.ip_address(address).is_loopback for address in four)
        if "multicast" not in flags and flags != [""] and not is_loopback:
            continue
        links = [address for address in six if ipaddress.ip_address(address).is_link_local]
        others = [address for address in six if address not in links]
        if four or six:
            found.append(Interface(name, (*four, *others, *links), (*four[:1], *links[:1]), is_loopback))
    return found


def _unready_addresses() -> set[tuple[str, str]]:
    """(interface, IPv6 address) of those that the kernel still checks for duplicates, or has found to be one. Linux."""
    with contextlib.suppress(OSError):
        lines = [line.split() for line in Path("/proc/thread-self/net/if_inet6").read_text().splitlines()]
        # RFC 4862; linux/if_addr.h: IFA_F_TENTATIVE 0x40, IFA_F_DADFAILED 0x08
        return {(line[5], str(ipaddress.IPv6Address(bytes.fromhex(line[0])))) for line in lines if int(line[4], 16) & 0x48}
    return set()


def _is_successor(new: Seen, old: Seen | None) -> bool:
    """Whether a node can be seen only because another incarnation of it has ended: two can not have one port."""
    if old is None or old.sighting.incarnation == new.sighting.incarnation or old.sighting.peer != new.sighting.peer:
        return False
    return old.sighting.port == new.sighting.port and bool(set(old.sighting.addresses) & set(new.sighting.addresses))


def _label(name: str, end: str) -> str | None:
    """The first label of one of our names; None for any other name."""
    label, _, rest = name.lower().partition(".")
    return label if rest == end and _LABEL.fullmatch(label) else None


def _lifetime(ttl: int) -> float:
    return min(ttl, LONGEST_RECORD_S)
