"""P2: all_reduce and broadcast of tensors on a device: copied out, sent and copied in piece by piece, all at once."""
from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from array import array
from collections.abc import Callable
from typing import Any

import numpy as np
from fleetcore.arena import Pin
from fleetcore.group import Group

from pyfleet.arrays import hold, is_tensor, torch_dtype_code
from pyfleet.connections import Deadline
from pyfleet.devices import Device, device_of
from pyfleet.errors import ConfigError, DType, DTypeError, FleetError, OutOfStep, ShapeError

# 4 MiB: the segments of 8 ranks are then one chunk (512 KiB) of the executor, and 14 latencies of 0.2 ms a twentieth of
# their time at 1 Gbit/s. Where the wire is as fast as memory shorter ones are better, but not by much: 25 MB over loopback,
# copies of 3 GB/s: 12.7 ms in pieces of 1 MiB, 16.6 of 4, 34.9 as a whole; in shared memory 12.2, 13.5, 22.2.
PIECE_BYTES = 4 << 20
NUM_TWINS = 3               # one being filled, one on the wire, one being emptied
NOTE_WORDS = 3              # what a rank says before a long call: elements, dtype, whether on a device
SOONEST_S = 0.001           # a deadline that has passed: the group then says for whom it waited
REFUSALS = (ConfigError, DTypeError, ShapeError)        # raised before anything was sent, by every rank alike


class Staging:
    """all_reduce and broadcast for a group in which some rank may hold tensors on a device.

    All ranks must make the same calls of the group, whatever their arrays lie on. A call of up to PIECE_BYTES is one call
    of the group everywhere. Before a longer one the ranks tell each other what they are about to do, in one message
    each; if any of them has a tensor on a device, all go through the array in the same pieces, which depend on its size
    and dtype alone. Ranks that disagree raise OutOfStep before anything of the array was sent.

    Tensors on a device travel through twins, page-locked host memory from the arena that is kept for the next call:
    while a piece is on the wire, the next one is copied out and the one before is copied in. A call sees what was queued
    on the current stream before it, and when it returns the result is there for every stream. After an error no copy is
    under way; pieces of the tensor that were through hold the result, the others what they held. What fails after the
    first message ends the group, so that no peer waits for the rest.

    Args:    group: of more than one rank; its other calls are made elsewhere.  allocate: nbytes -> arena buffer.
    """

    def __init__(self, group: Group, allocate: Callable[[int], Any]):
        self._group, self._allocate = group, allocate
        self._twins: dict[Device, Twins] = {}
        self._lock = threading.Lock()               # over the twins and the order of pieces

    def all_reduce(self, x: Any, op: int, *, algorithm: str = "auto", timeout: float | None = None) -> bool:
        """As Group.all_reduce; False, with nothing done, where one call with x in host memory is all there is to do.

        Which rank adds first may differ between pieces: the same bits everywhere, not those of an uncut call.

        Raises:  as Group.all_reduce; what the device raises; ShapeError, DTypeError for tensors that hold() refuses.
        """
        return self._run(x, functools.partial(self._group.all_reduce, op=op, algorithm=algorithm), timeout, True, True)

    def broadcast(self, x: Any, src: int = 0, *, timeout: float | None = None) -> bool:
        """As Group.broadcast; False as all_reduce. Raises: as all_reduce."""
        mine = src == self._group.rank
        return self._run(x, functools.partial(self._group.broadcast, src=src), timeout, mine, not mine)

    def quick_all_reduce(self, x: np.ndarray, op: int, timeout: float | None) -> bool:
        """As Group.quick_all_reduce, for what needs no word among the ranks."""
        return x.nbytes <= PIECE_BYTES and self._group.quick_all_reduce(x, op, timeout)

    def in_order(self, call: Callable[..., Any], args: tuple) -> Callable[..., Any]:
        """`call`, to be made by another thread, after what this one has queued for the tensors among args by now."""
        marks = []
        for each in args:
            for x in each if isinstance(each, (list, tuple)) else (each,):
                device = device_of(x) if is_tensor(x) else None
                if device is not None:
                    marks.append((device, device.mark(x), x))
        if not marks:
            return call

        def after(*args, **kwargs):
            for device, mark, x in marks:
                device.follow(mark, x)
            return call(*args, **kwargs)
        return after

    def close(self) -> None:
        """Give the twins back. Idempotent; waits for a call under way, so end the group first."""
        with self._lock:
            for twins in self._twins.values():
                twins.close()
            self._twins = {}

    def _run(self, x, call, timeout, reads, writes):
        device = device_of(x) if is_tensor(x) else None
        if device is None and _nbytes(x) <= PIECE_BYTES:
            return False
        deadline = Deadline(self._group.timeout if timeout is None else timeout)
        with self._lock:
            if device is None:
                self._through_host(x, call, timeout, deadline, writes)
            else:
                self._through_twins(device, x, call, timeout, deadline, reads, writes)
        return True

    def _through_host(self, x, call, timeout, deadline, writes):
        """A long call with an array in host memory: whole, or in pieces where they lie."""
        pin, bring_back = hold(x, writes)
        if self._agree(pin.count, pin.dtype, False, timeout):
            width = pin.nbytes // pin.count
            for done, (start, stop) in enumerate(pieces(pin.count, width)):
                with self._ending_the_group(done):
                    call(Pin.at(pin.address + start * width, stop - start, pin.dtype, x, pin.parts), timeout=_left(deadline))
        else:
            call(pin, timeout=_left(deadline))
        if bring_back is not None and writes:
            bring_back()

    def _through_twins(self, device, x, call, timeout, deadline, reads, writes):
        """A call with a tensor on a device."""
        code, parts = _checked(x)
        flat, bring_back = _flat(x)
        plan = pieces(flat.numel(), flat.element_size())
        if device not in self._twins:
            self._twins[device] = Twins(device, self._allocate)
        rooms = [self._twins[device].room(k, flat.dtype, stop - start) for k, (start, stop) in enumerate(plan)]
        mark = device.mark(flat)
        if len(plan) > 1:
            self._agree(flat.numel(), code, True, timeout)
        under_way: dict[tuple[str, int], Callable[[], None]] = {}

        def wait_for(copy):
            if copy in under_way:
                under_way.pop(copy)()

        def start_out(k):
            vacate(k)
            under_way["out", k] = device.start_copy(rooms[k], flat[slice(*plan[k])], mark)

        def vacate(k):                  # the twin of piece k, which held that of k - NUM_TWINS
            wait_for(("in", k - NUM_TWINS))

        done = 0
        try:
            with self._ending_the_group(lambda: done):
                if reads:
                    start_out(0)
                for k in range(len(plan)):
                    if not reads:
                        vacate(k)
                    elif k + 1 < len(plan):
                        start_out(k + 1)
                    wait_for(("out", k))
                    pin = Pin.at(rooms[k].data_ptr(), rooms[k].numel(), code, rooms[k], parts)
                    call(pin, timeout=timeout if len(plan) == 1 else _left(deadline))
                    done += 1
                    if writes:
                        under_way["in", k] = device.start_copy(flat[slice(*plan[k])], rooms[k], mark)
                while under_way:
                    wait_for(next(iter(under_way)))
                if bring_back is not None and writes:
                    bring_back(device)
        except BaseException:
            for wait in under_way.values():             # what they raise adds nothing to what is raised already
                with contextlib.suppress(Exception):
                    wait()
            if self._group.failure is not None:
                self._twins.pop(device).close()         # a dead group may have moved the arena to other pages
            raise

    @contextlib.contextmanager
    def _ending_the_group(self, done):
        """A failure in here leaves the peers without the rest of a call: end the group, unless nothing was sent."""
        try:
            yield
        except BaseException as error:
            if not (isinstance(error, REFUSALS) and (done() if callable(done) else done) == 0):
                self._end(FleetError(f"rank {self._group.rank} could not finish a call: {error}"))
            raise

    def _end(self, why):
        if self._group.failure is None:
            self._group.close()
            self._group.failure = why

    def _agree(self, count, code, on_device, timeout):
        """Whether any rank has the array of the coming call on a device.

        Raises:  OutOfStep when the ranks' arrays differ in size or dtype.
        """
        group = self._group
        # Rank 0 says a word more: with equal counts this could be taken for an all_gather of the caller.
        counts = [NOTE_WORDS + (rank == 0) for rank in range(group.size)]
        mine, said = array("q", [count, code, on_device]), array("q", bytes(8 * sum(counts)))
        if group.rank == 0:
            mine.append(0)
        group.all_gather(said, mine, counts, timeout=timeout)
        notes = [said[:NOTE_WORDS], *(said[at:at + NOTE_WORDS] for at in range(NOTE_WORDS + 1, len(said), NOTE_WORDS))]
        own = f"{DType(code).name.lower()}[{count}]"
        for rank, (elems, dtype, _) in enumerate(notes):
            if (elems, dtype) != (count, code):
                error = OutOfStep(f"out of step: rank {group.rank} called with {own} while rank {rank} called with "
                                  f"{DType(dtype).name.lower()}[{elems}]", rank=rank, operation=own, epoch=group.epoch)
                self._end(error)
                raise error
        return any(note[2] for note in notes)


class Twins:
    """Host memory through which tensors of one type of device travel: NUM_TWINS times PIECE_BYTES, made as needed."""

    def __init__(self, device: Device, allocate: Callable[[int], Any]):
        self._device, self._allocate, self._memory, self._undo = device, allocate, [], []
        # Also where no one closes it: the arena must not hand out memory that a device still holds locked.
        self.close = weakref.finalize(self, _unlock, self._undo, self._memory)
        self.close.atexit = False

    def room(self, k: int, dtype: Any, count: int) -> Any:
        """(count,) of a torch dtype in the twin of piece k; its contents are unspecified."""
        import torch

        k %= NUM_TWINS
        while len(self._memory) <= k:
            try:
                memory = torch.frombuffer(self._allocate(PIECE_BYTES), dtype=torch.uint8)
            except MemoryError:         # the arena is full: memory that is not shared will do, at the cost of a copy
                memory = torch.empty(PIECE_BYTES, dtype=torch.uint8)
            undo = self._device.lock_pages(memory.data_ptr(), PIECE_BYTES)
            self._memory.append(memory)
            if undo is not None:
                self._undo.append(undo)
        return self._memory[k][:count * dtype.itemsize].view(dtype)


def pieces(count: int, width: int) -> list[tuple[int, int]]:
    """Where the pieces of `count` elements of `width` bytes begin and end; one, perhaps empty, up to PIECE_BYTES."""
    most = PIECE_BYTES // width
    return [(start, min(start + most, count)) for start in range(0, max(count, 1), most)]


def _unlock(undo, memory):
    while undo:
        undo.pop()()
    memory.clear()


def _left(deadline):
    return max(deadline.left(), SOONEST_S)


def _nbytes(x):
    if is_tensor(x):
        return x.numel() * x.element_size()
    try:
        return x.nbytes if isinstance(x, np.ndarray) else memoryview(x).nbytes
    except TypeError:
        return 0                        # hold() says what is wrong with it


def _checked(x):
    """(DType code, numbers per element) of a tensor. Raises: as hold()."""
    import torch

    known = torch_dtype_code(x.dtype)
    if known is None:
        raise DTypeError(f"tensors of {x.dtype} are not offered")
    if x.layout is not torch.strided:
        raise ShapeError(f"a {x.layout} tensor has no dense memory: pass x.to_dense()")
    return known


def _flat(x):
    """(the numbers of a tensor in C order, on its device; what brings them back into it, or None)."""
    import torch

    data = x.detach()
    is_plain = data.is_contiguous() and not data.is_conj() and not data.is_neg()
    whole = data if is_plain else data.resolve_conj().resolve_neg().contiguous()
    numbers = (torch.view_as_real(whole) if whole.is_complex() else whole).reshape(-1)
    return numbers, None if is_plain else lambda device: device.start_copy(data, whole, None)()
