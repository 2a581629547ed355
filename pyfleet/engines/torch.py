"""P2: collectives of torch.distributed: gloo over the network, NCCL between NVIDIA GPUs."""
from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from concurrent.futures import Future
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed
from torch.distributed import PrefixStore, ProcessGroupGloo, distributed_c10d

from pyfleet.arrays import is_tensor, torch_dtype_code
from pyfleet.calls import CallWork, PlainCalls, behind
from pyfleet.config import ClusterConfig
from pyfleet.engines.base import Engine
from pyfleet.errors import (
    CommunicationError,
    ConfigError,
    DType,
    NotEnoughPeers,
    PeerLost,
    ReduceOp,
    Timeout,
)
from pyfleet.flat import HEAD, Flat, Head, make_room, restore, simplify
from pyfleet.placement import Placement
from pyfleet.wiring import Deadline

BODY_TAGS = 2**30                       # bodies under way at one time between two ranks; gloo's tags have 31 bits
GLOO_NATIVE = {"float32", "float64", "int8", "uint8", "int32", "int64"}
OPS = {ReduceOp.SUM: distributed.ReduceOp.SUM, ReduceOp.MIN: distributed.ReduceOp.MIN,
       ReduceOp.MAX: distributed.ReduceOp.MAX, ReduceOp.PRODUCT: distributed.ReduceOp.PRODUCT}
LATE_S = 5.0            # gloo ends a call at its deadline itself; this much later something else is wrong
NCCL_LOOK_S = 0.0002    # between looks at a call on a GPU: NCCL tells nobody that it is done

_stores: dict[str, Any] = {}    # rendezvous -> store: rank 0's serves as long as its process lives
_num_opened = 0                 # engines so far; equal on all ranks, so that no two find each other's keys


class GlooEngine(PlainCalls, Engine):
    """Collectives over gloo. Each engine has process groups of its own, beside the default one of torch.distributed.

    Half-width floats are summed in float32 and rounded once, NaN propagates, and results have the same bits on all
    ranks, but sums are not in rank order. Tensors on a device go through host memory. gloo does not compare calls: ranks
    out of step get wrong data or a Timeout. After one rank's Timeout the others may get PeerLost, which names no rank
    unless it is about a message. A receive from any rank notices neither that a peer died nor, once it waits, what this
    rank sends to itself; it ends at its deadline, and so does a receive under way when the engine is closed.
    """

    name = "gloo"

    def __init__(self, store: Any, rank: int, ranks: tuple[int, ...], timeout: float, limit: Deadline,
                 iface: str | None = None):
        super().__init__(rank, ranks, timeout=timeout)
        self._store, self._iface = store, iface
        self._groups: dict[str, Any] = {"cpu": self._connect("data", limit)}
        self._heads = self._connect("heads", limit)
        self._num_groups, self._num_sent = 0, [0] * self.world_size
        self._mail = threading.Lock()
        self._own: dict[int, tuple[deque, deque]] = {}      # tag -> messages to itself, receives that wait for one
        self._waiting: set[threading.Event] = set()

    @classmethod
    def open(cls, place: Placement, cluster: ClusterConfig, timeout: float) -> GlooEngine:
        """Meet the other ranks where `place` says, or in the default process group if the script has made one.

        Raises:  NotEnoughPeers("found 1 of 3 ...") after `timeout` seconds, ConfigError.
        """
        global _num_opened
        limit = Deadline(timeout)
        cls.require_possible()
        rank, size, store = find_store(place, limit)
        store = PrefixStore(f"pyfleet.{cls.name}.{_num_opened}", store)
        meet(store, rank, size, limit)
        engine = cls(store, rank, tuple(range(size)), cluster.timeout, limit, cluster.iface)
        _num_opened += 1
        return engine

    @classmethod
    def require_possible(cls) -> None:
        """Raises: ConfigError when this machine or this torch cannot do it."""
        if not distributed.is_available() or not distributed.is_gloo_available():
            raise ConfigError(f"this build of torch ({torch.__version__}) has no gloo")

    def _connect(self, name, limit):
        options = ProcessGroupGloo._Options()
        options._timeout = _timedelta(limit)
        options._devices = [ProcessGroupGloo.create_default_device() if self._iface is None
                            else ProcessGroupGloo.create_device(interface=self._iface)]
        try:
            return ProcessGroupGloo(PrefixStore(name, self._store), self.rank, self.world_size, options)
        except RuntimeError as error:
            raise NotEnoughPeers(f"gloo could not connect {self.world_size} ranks: {_text(error)}") from None

    # ---- arrays as tensors ---------------------------------------------------------------------------------------

    def _bytes(self, flat):
        """The array's memory, as a tensor of bytes."""
        return torch.from_numpy(flat.data.view(np.uint8))

    def _none_like(self, flat):
        """No bytes, where the array's are."""
        return torch.empty(0, dtype=torch.uint8)

    def _simplified(self, flat, op):
        """(tensor to reduce, torch's op, how to get from the reduced tensor to what `flat.data` becomes)."""
        work, simple = simplify(flat.data, flat.dtype, op, GLOO_NATIVE)
        return torch.from_numpy(work), OPS[simple], \
            lambda tensor: restore(tensor.numpy(), flat.dtype, op, self.world_size)

    def _copy_simplified(self, flat, op):
        """As _simplified, for reductions that must leave the array alone."""
        tensor, torch_op, finish = self._simplified(flat, op)
        return tensor.clone() if tensor.data_ptr() == self._bytes(flat).data_ptr() else tensor, torch_op, finish

    def _put(self, out, values):
        if values is not out.data:
            out.data[...] = values

    def _run(self, call, tensor, start, limit):
        """Start a collective on a tensor of this device, and wait for it."""
        group = self._groups["cpu" if tensor is None else tensor.device.type]
        try:
            self._await(start(group), group, call, limit)
        except RuntimeError as error:
            raise self._translated(error, call) from None
        finally:
            del group                   # or the traceback of an error would keep its connections, and peers would wait

    def _await(self, work, group, call, limit):
        over = threading.Event()        # work.wait() alone could not be interrupted
        self._waiting.add(over)
        future = work.get_future()
        future.add_done_callback(lambda _: over.set())
        try:
            if not self._closed:
                over.wait(limit.left() + LATE_S)
            if self._closed:
                raise PeerLost(f"this rank has left during {call}", rank=self.rank, operation=str(call), epoch=self.epoch)
            if not future.done():
                raise Timeout(f"timed out after {limit.seconds:g} s during {call}", operation=str(call), epoch=self.epoch)
            work.wait()
        finally:
            self._waiting.discard(over)
            if not future.done():       # a group that goes with a call under way waits for it, and all threads with it
                threading.Thread(target=_outlive, args=(work, group), daemon=True).start()
            del work, group, future     # as in _run

    def _translated(self, error, call, peer=None):
        """The error of ours that says what torch's says."""
        if isinstance(error, CommunicationError):
            return error
        text = _text(error)
        kind = CommunicationError
        if "imed out" in text or "timeout" in text:
            kind = Timeout
        elif any(word in text for word in ("closed", "reset", "refused", "Broken pipe", "aborted")):
            kind = PeerLost
        who = "a peer" if peer is None else f"rank {peer}"
        what = {Timeout: f"timed out waiting for {who}", PeerLost: f"lost {who}"}.get(kind, "failed")
        return kind(f"{what} during {call}: {text}", rank=peer, operation=str(call), epoch=self.epoch)

    # ---- collectives ---------------------------------------------------------------------------------------------

    def _all_reduce(self, call, flat, op, limit):
        if not len(flat.data):
            return
        tensor, torch_op, finish = self._simplified(flat, op)
        options = _options("Allreduce", limit, reduceOp=torch_op)
        self._run(call, tensor, lambda group: group.allreduce([tensor], options), limit)
        self._put(flat, finish(tensor))

    def _broadcast(self, call, flat, src, limit):
        self._broadcast_bytes(call, self._bytes(flat), src, limit)

    def _broadcast_bytes(self, call, tensor, src, limit):
        if tensor.numel():
            options = _options("Broadcast", limit, rootRank=src, rootTensor=0)
            self._run(call, tensor, lambda group: group.broadcast([tensor], options), limit)

    def _reduce(self, call, flat, dst, op, limit):
        if not len(flat.data):
            return
        prepare = self._simplified if self.rank == dst else self._copy_simplified      # torch reduces into everyone's
        tensor, torch_op, finish = prepare(flat, op)
        options = _options("Reduce", limit, reduceOp=torch_op, rootRank=dst, rootTensor=0)
        self._run(call, tensor, lambda group: group.reduce([tensor], options), limit)
        if self.rank == dst:
            self._put(flat, finish(tensor))

    def _all_gather(self, call, out, x, counts, limit):
        mine, everything = self._bytes(x), self._bytes(out)
        if not everything.numel():
            return
        sizes = self._sizes(x, counts)
        own = everything.split(sizes)[self.rank]
        if len(set(sizes)) == 1:
            mine = mine.clone() if own.data_ptr() == mine.data_ptr() else mine
            options = _options("Allgather", limit)
            self._run(call, mine, lambda group: group._allgather_base(everything, mine, options), limit)
            return
        if own.data_ptr() != mine.data_ptr():
            own.copy_(mine)
        for src, part in enumerate(everything.split(sizes)):            # nothing is padded: each part once over the wire
            self._broadcast_bytes(call, part, src, limit)

    def _gather(self, call, out, x, counts, dst, limit):
        send, receive = [0] * self.world_size, [0] * self.world_size
        send[dst] = counts[self.rank]
        self._exchange(call, out, x, send, counts if self.rank == dst else receive, limit, x)

    def _scatter(self, call, out, x, counts, src, limit):
        send, receive = [0] * self.world_size, [0] * self.world_size
        receive[src] = counts[self.rank]
        self._exchange(call, out, x, counts if self.rank == src else send, receive, limit, out)

    def _all_to_all(self, call, out, x, counts, limit):
        self._exchange(call, out, x, counts[self.rank], [row[self.rank] for row in counts], limit, x)

    def _exchange(self, call, out, x, send, receive, limit, like):
        """Part j of x to rank j, and out filled in rank order; either may be None when it has nothing."""
        source, target = (self._none_like(like) if flat is None else self._bytes(flat) for flat in (x, out))
        options = _options("AllToAll", limit)
        self._run(call, source, lambda group: group.alltoall_base(
            target, source, self._sizes(like, receive), self._sizes(like, send), options), limit)

    def _reduce_scatter(self, call, out, x, counts, op, limit):
        if not len(x.data):
            return
        tensor, torch_op, finish = self._copy_simplified(x, op)
        options = _options("Allreduce", limit, reduceOp=torch_op)
        self._run(call, tensor, lambda group: group.allreduce([tensor], options), limit)
        start = sum(counts[:self.rank])
        self._put(out, finish(tensor)[start:start + counts[self.rank]])

    def _barrier(self, call, limit):
        options = _options("Barrier", limit)
        self._run(call, None, lambda group: group.barrier(options), limit)

    def _new_group(self, call, ranks, limit):
        self._num_groups += 1
        if self.rank not in ranks:
            return None
        store = PrefixStore(f"group.{self._num_groups}", self._store)
        engine = type(self)(store, ranks.index(self.rank), tuple(self.ranks[rank] for rank in ranks), self.timeout,
                            limit, self._iface)
        engine.local_rank, engine.local_world_size = self.local_rank, self.local_world_size
        return engine

    @staticmethod
    def _sizes(flat, counts):
        """Bytes of so many elements of `flat.data`."""
        item = flat.data.itemsize
        return [count * item for count in counts]

    # ---- messages: a head with the tag, so that the receiver can make room; then a body with a tag of its own -------

    def _isend(self, flat, dst, tag, note, limit):
        if dst == self.rank:
            return self._send_own(tag, note, flat)
        body = torch.from_numpy(_host(flat).view(np.uint8))
        with self._mail:
            self._demand_alive()
            number = self._num_sent[dst] % BODY_TAGS
            self._num_sent[dst] += 1
            head = Head(number, len(flat.data), flat.dtype, flat.parts, note).pack()
            head = torch.frombuffer(bytearray(head), dtype=torch.uint8)
            try:
                works = [self._heads.send([head], dst, tag)]
                if body.numel():
                    works.append(self._groups["cpu"].send([body], dst, number))
            except RuntimeError as error:
                raise self._lost(error, f"send(dst={dst}, tag={tag})", dst) from None
        # On threads, because gloo's messages can only be waited for one by one, and without interruption.
        return behind("send", self._finish_send, works, (head, body, flat), dst, f"send(dst={dst}, tag={tag})", limit)

    def _finish_send(self, works, memory, dst, call, limit):
        try:
            for work in works:
                work.wait(_timedelta(limit))
        except RuntimeError as error:
            raise self._lost(error, call, dst) from None
        finally:
            del works

    def _irecv(self, make, src, tag, limit):
        call = f"recv(src={'any' if src is None else src}, tag={tag})"
        head = torch.empty(HEAD.size, dtype=torch.uint8)
        with self._mail:
            self._demand_alive()
            if src == self.rank or (src is None and (self.world_size == 1 or self._own.get(tag, ((),))[0])):
                return self._receive_own(make, tag, limit)
            try:
                work = self._heads.recv_anysource([head], tag) if src is None else self._heads.recv([head], src, tag)
            except RuntimeError as error:
                raise self._lost(error, call, src) from None
            data = self._groups["cpu"]
        return behind("recv", self._finish_recv, work, head, data, make, src, call, limit)

    def _finish_recv(self, work, head, data, make, src, call, limit):
        try:
            work.wait(_timedelta(limit))
            src = work._source_rank() if src is None else src
            told, array, problem = Head.unpack(head.numpy().tobytes()), None, None
            flat = sent = told.scratch()
            try:
                array, flat = make_room(make, told.note, sent)
            except Exception as error:      # noqa: BLE001 raised below, when the message is out of the way
                problem = error
            if told.count:
                body = torch.from_numpy(flat.data.view(np.uint8))
                data.recv([body], src, told.number).wait(_timedelta(limit))
        except RuntimeError as error:
            raise self._lost(error, call, src) from None
        finally:
            del work, data              # as in _run
        if problem is not None:
            raise problem
        return self._delivered(array, flat, src)

    def _delivered(self, array, flat, src):
        if flat.bring_back is not None:
            flat.bring_back()
        self._count_message("receives", "received_bytes", flat)
        return array, src

    # gloo does not carry what a rank sends to itself: that waits here, by tag, for a receive, or a receive for it.

    def _send_own(self, tag, note, flat):
        sent = note, flat._replace(data=_host(flat).copy(), owner=None)
        with self._mail:
            mail, receives = self._own.setdefault(tag, (deque(), deque()))
            if receives:
                receives.popleft().set_result(sent)
            else:
                mail.append(sent)
        work = CallWork("send")
        work.finish()                           # x may be used again
        return work

    def _receive_own(self, make, tag, limit):
        ticket = Future()
        mail, receives = self._own.setdefault(tag, (deque(), deque()))
        if mail:
            ticket.set_result(mail.popleft())
        else:
            receives.append(ticket)
        return behind("recv", self._finish_own, make, ticket, f"recv(src={self.rank}, tag={tag})", limit)

    def _finish_own(self, make, ticket, call, limit):
        try:
            note, sent = ticket.result(limit.left())
        except TimeoutError:
            self.failure = self.failure or Timeout(f"timed out waiting for rank {self.rank} itself during {call}",
                                                   rank=self.rank, operation=call, epoch=self.epoch)
            self._leave()
            raise self.failure from None
        array, flat = make_room(make, note, sent)
        np.copyto(flat.data, sent.data)
        return self._delivered(array, flat, self.rank)

    def _lost(self, error, call, peer):
        """The translated error, which has ended this group."""
        error = self._translated(error, call, peer)
        self.failure = self.failure or error
        self._leave()
        return error

    def _leave(self):
        # Without references the groups close their connections, which is what peers notice.
        self._groups, self._heads = {}, None
        for over in list(self._waiting):
            over.set()


class NcclEngine(GlooEngine):
    """As GlooEngine; CUDA tensors are reduced and moved by NCCL, where they lie, each rank on a GPU of its own.

    Half-width sums are NCCL's: rounded at every addition. Minima and maxima follow NCCL where there are NaN. Arrays in
    host memory, messages and barriers go over gloo. A call returns when the GPU is done with it.
    """

    name = "nccl"

    def __init__(self, store: Any, rank: int, ranks: tuple[int, ...], timeout: float, limit: Deadline,
                 iface: str | None = None):
        super().__init__(store, rank, ranks, timeout, limit, iface)
        options = distributed.ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=timeout)
        self._groups["cuda"] = distributed.ProcessGroupNCCL(PrefixStore("cuda", store), rank, len(ranks), options)

    @classmethod
    def require_possible(cls):
        super().require_possible()
        if not torch.cuda.is_available() or not distributed.is_nccl_available():
            raise ConfigError(f"backend 'nccl' needs an NVIDIA GPU and a CUDA build of torch; torch {torch.__version__} sees "
                              f"{'no GPU' if torch.version.cuda is None else 'no usable GPU'} here: use 'gloo' or 'fleet'")

    def _flat(self, x, writable=True):
        if not (is_tensor(x) and x.is_cuda and torch_dtype_code(x.dtype) and x.layout is torch.strided):
            return super()._flat(x, writable)
        code, parts = torch_dtype_code(x.dtype)
        data = x.detach()
        whole = data.resolve_conj().resolve_neg().contiguous()
        row = torch.view_as_real(whole).reshape(-1) if parts == 2 else whole.reshape(-1)
        return Flat(row, DType(code), parts, whole, None if whole.data_ptr() == data.data_ptr() and data.is_contiguous()
                    else lambda: data.copy_(whole))

    def _bytes(self, flat):
        return flat.data.view(torch.uint8) if is_tensor(flat.data) else super()._bytes(flat)

    def _none_like(self, flat):
        return flat.data.new_empty(0, dtype=torch.uint8) if is_tensor(flat.data) else super()._none_like(flat)

    def _simplified(self, flat, op):
        if not is_tensor(flat.data):
            return super()._simplified(flat, op)
        tensor, torch_op = flat.data, distributed.ReduceOp.AVG if op == ReduceOp.MEAN else OPS[op]
        if flat.dtype == DType.BOOL:
            torch_op = OPS[ReduceOp.MAX if op in (ReduceOp.SUM, ReduceOp.MAX) else ReduceOp.MIN]
            return tensor.view(torch.uint8), torch_op, lambda reduced: reduced.view(torch.bool)
        if flat.dtype == DType.INT16:
            return tensor.int(), torch_op, lambda reduced: reduced.short()
        return tensor, torch_op, lambda reduced: reduced

    def _put(self, out, values):
        if not is_tensor(out.data):
            super()._put(out, values)
        elif values.data_ptr() != out.data.data_ptr():
            out.data.copy_(values)

    def _await(self, work, group, call, limit):
        if group is not self._groups.get("cuda"):
            super()._await(work, group, call, limit)
            return
        work.wait()                     # for the stream, not for this thread
        done = torch.cuda.Event()
        done.record()
        while not done.query():
            if not limit.left():
                group.abort()
                raise Timeout(f"timed out after {limit.seconds:g} s during {call}", operation=str(call), epoch=self.epoch)
            time.sleep(NCCL_LOOK_S)


# ---- where ranks meet ------------------------------------------------------------------------------------------------

def find_store(place: Placement, limit: Deadline) -> tuple[int, int, Any]:
    """(rank, world_size, store): those of the default process group, if there is one, else what the placement says.

    Raises:  ConfigError, NotEnoughPeers.
    """
    if distributed.is_initialized():
        rank, size = distributed.get_rank(), distributed.get_world_size()
        if place.source != "alone" and (place.rank, place.world_size) != (rank, size):
            raise ConfigError(f"this is rank {rank} of {size} in torch's default process group, but {place.rank} of "
                              f"{place.world_size} according to {place.source}")
        return rank, size, distributed_c10d._get_default_store()
    if place.world_size == 1:
        return 0, 1, distributed.HashStore()
    if place.rendezvous is None:
        raise ConfigError(f"{place.world_size} ranks have nowhere to meet: set MASTER_ADDR (and MASTER_PORT) to an "
                          f"address of rank 0's machine, or PYFLEET_RENDEZVOUS")
    if place.rendezvous not in _stores:
        scheme, _, where = place.rendezvous.partition("://")
        if scheme == "file":
            return place.rank, place.world_size, _file_store(where, place)      # one file per engine
        if scheme == "agent":                       # a store of pyfleet's own; torch needs one that it can listen at
            host = f"[{place.master_addr}]" if ":" in place.master_addr else place.master_addr
            scheme, where = "tcp", f"{host}:{place.master_port}"
        _stores[place.rendezvous] = _tcp_store(scheme, where, place, limit)
    return place.rank, place.world_size, _stores[place.rendezvous]


def _file_store(directory, place):
    try:
        Path(directory).mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot meet in {directory}: {error.strerror}") from None
    return distributed.FileStore(str(Path(directory) / f"torch.{_num_opened}"), place.world_size)


def _tcp_store(scheme, where, place, limit):
    host, _, port = where.rpartition(":")
    if scheme not in ("tcp", "torch"):
        raise ConfigError(f"rendezvous '{scheme}://{where}' is not one of file://..., tcp://..., torch://...")
    if not port.isdigit():
        raise ConfigError(f"rendezvous address {where!r} is not host:port")
    try:
        return distributed.TCPStore(host.strip("[]"), int(port), is_master=scheme == "tcp" and place.rank == 0,
                                    timeout=_timedelta(limit), wait_for_workers=False)
    except RuntimeError as error:
        if "EADDRINUSE" in str(error) or "EADDRNOTAVAIL" in str(error):
            raise ConfigError(f"rank 0 cannot listen on {where}: {_text(error)}; choose another MASTER_PORT, or an "
                              f"address of this machine") from None
        raise NotEnoughPeers(f"rank 0 did not answer at {where} within {limit.seconds:g} s: {_text(error)}") from None


def meet(store: Any, rank: int, size: int, limit: Deadline) -> None:
    """Wait until all ranks are at the store.

    Raises:  NotEnoughPeers naming those that are not.
    """
    store.set(f"here.{rank}", b"1")
    missing = []
    for peer in range(size):
        try:
            store.wait([f"here.{peer}"], _timedelta(limit))
        except RuntimeError:
            missing.append(peer)
    if missing:
        with contextlib.suppress(RuntimeError):
            store.delete_key(f"here.{rank}")
        raise NotEnoughPeers(f"found {size - len(missing)} of {size} ranks within {limit.seconds:g} s; "
                             f"missing: {', '.join(map(str, missing))}")


def _outlive(work, group):
    """Keep a group until its call is over."""
    with contextlib.suppress(RuntimeError):
        work.wait()
    del group


def _host(flat):
    """The array's numbers in host memory."""
    return flat.data.cpu().numpy() if is_tensor(flat.data) else flat.data


def _options(kind, limit, **values):
    options = getattr(distributed_c10d, f"{kind}Options")()
    options.timeout = _timedelta(limit)
    for name, value in values.items():
        setattr(options, name, value)
    return options


def _timedelta(limit):
    return timedelta(seconds=max(limit.left(), 0.001))      # torch takes 0 for no limit at all


def _text(error):
    """The first line of what torch says, without the place in its sources."""
    return str(error).partition("\n")[0].rpartition("] ")[2].partition(". This is")[0]
