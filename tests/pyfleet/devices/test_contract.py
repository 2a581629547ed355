"""What base.Device promises, for every kind whose hardware is there, and for the fake that stands in for it."""
import contextlib
import ctypes
import threading
import types

import pytest
import torch

import pyfleet
from pyfleet.devices import DEVICES, any_present, device_of, open_device
from pyfleet.devices.cuda import DRIVER_FILES, Cuda
from pyfleet.devices.mps import Mps
from pyfleet.staging import PIECE_BYTES
from tests.pyfleet.devices.fake import NAME, PATIENCE_S, on_device, plain, register, unregister

THERE = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
KINDS = [*DEVICES, NAME]


@pytest.fixture(params=KINDS)
def kind(request):
    """(the device, a function that brings a host tensor there as a new tensor)."""
    if request.param == NAME:
        yield register(), lambda x: on_device(x.clone())
        unregister()
        return
    if not THERE[request.param]():
        pytest.skip(f"torch sees no {request.param} device on this machine")
    yield open_device(request.param), lambda x: x.to(request.param)


def host_memory(nbytes):
    """Page-aligned memory of whole pages."""
    room = torch.empty(nbytes + 4096, dtype=torch.uint8)
    start = -room.data_ptr() % 4096
    return room[start:start + nbytes]


def values(count, dtype):
    return ((torch.arange(count) * 7) % 101).to(dtype)


def test_the_table_says_where_a_tensor_lies(kind):
    device, there = kind
    assert device_of(there(torch.ones(3))) is device
    assert device_of(torch.ones(3)) is None
    assert device_of(torch.ones(3, device="meta")) is None
    assert device.present()
    assert any_present()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("count", [0, 1, 1023, PIECE_BYTES // 8])
def test_copies_arrive_both_ways(kind, count, dtype):
    device, there = kind
    near, far = host_memory(PIECE_BYTES), there(values(count, dtype))
    room = near[:count * dtype.itemsize].view(dtype)
    device.start_copy(room, far, device.mark(far))()
    assert torch.equal(room, values(count, dtype))
    target = there(torch.zeros(count, dtype=dtype))
    device.start_copy(target, room, device.mark(target))()
    back = torch.empty(count, dtype=dtype)
    device.start_copy(back, target, None)()
    assert torch.equal(back, values(count, dtype))


def test_many_copies_under_way_on_locked_pages(kind):
    device, there = kind
    near = host_memory(PIECE_BYTES)
    unlock = device.lock_pages(near.data_ptr(), PIECE_BYTES)
    rooms, sources = near.view(torch.float32).chunk(8), [there(values(PIECE_BYTES // 32, torch.float32) + k) for k in range(8)]
    targets = [there(torch.zeros(PIECE_BYTES // 32)) for _ in range(8)]
    for wait in [device.start_copy(room, source, device.mark(source)) for room, source in zip(rooms, sources, strict=True)]:
        wait()
    for wait in [device.start_copy(target, room, None) for target, room in zip(targets, rooms, strict=True)]:
        wait()
    for k, (room, target) in enumerate(zip(rooms, targets, strict=True)):
        assert torch.equal(room, values(PIECE_BYTES // 32, torch.float32) + k)
        assert torch.equal(plain(target).cpu(), room)
    if unlock is not None:
        unlock()
        again = device.lock_pages(near.data_ptr(), PIECE_BYTES)     # what is unlocked can be locked again
        assert again is not None
        again()


# ---- what needs the hardware --------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device on this machine")
def test_copies_come_after_the_marked_work_of_another_stream():
    device, stream = open_device("cuda"), torch.cuda.Stream()
    x, room = torch.zeros(1 << 20, device="cuda"), torch.empty(1 << 20)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)                  # about 0.1 s of the GPU
        x.fill_(3)
        mark = device.mark(x)
    device.start_copy(room, x, mark)()
    assert torch.equal(room, torch.full((1 << 20,), 3.0))
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        x.fill_(4)
        mark = device.mark(x)
    device.follow(mark, x)
    assert torch.equal(x.cpu(), torch.full((1 << 20,), 4.0))


def on_hardware(name):
    rank, size, elems = pyfleet.rank(), pyfleet.world_size(), PIECE_BYTES // 4
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for count in (0, 1, elems - 1, elems, elems + 1, 5 * elems + 3):
            x = (torch.arange(count) % 50 + rank).to(dtype)
            x = x.to(name) if rank == 0 or count % 2 else x             # sizes of both kinds in one call
            pyfleet.all_reduce(x)
            assert torch.equal(x.cpu(), (size * (torch.arange(count) % 50) + size * (size - 1) // 2).to(dtype))
            pyfleet.all_reduce(x.zero_().add_(rank), "max", async_op=True).wait()
            pyfleet.broadcast(x.add_(rank), size - 1)
            assert torch.equal(x.cpu(), torch.full((count,), 2.0 * (size - 1), dtype=dtype))
    wide = torch.full((3000, 1400), float(rank), device=name)
    pyfleet.all_reduce(wide[:, ::2].t())
    assert torch.equal(wide[:, ::2].cpu(), torch.full((3000, 700), float(size * (size - 1) // 2)))
    assert torch.equal(wide[:, 1::2].cpu(), torch.full((3000, 700), float(rank)))


@pytest.mark.parametrize("name", list(THERE))
@pytest.mark.parametrize(("size", "transport"), [(2, "shm"), (3, "tcp")])
def test_calls_with_tensors_on_the_hardware(ranks, size, transport, name):
    if not THERE[name]():
        pytest.skip(f"torch sees no {name} device on this machine")
    ranks(size, transport).run(on_hardware, name)


# ---- what does not --------------------------------------------------------------------------------------------------------


class Recorder:
    """A torch.cuda or torch.mps that keeps what is asked of it."""

    def __init__(self):
        self.said, self.current, self.num_streams = [], "caller's", 0

    def Event(self, blocking=False):
        return types.SimpleNamespace(record=lambda *stream: self.said.append(("record", *map(self.name, stream))),
                                     synchronize=lambda: self.said.append(("wait",)))

    def Stream(self, device):
        self.num_streams += 1
        return self.made(f"{device}/{self.num_streams}")

    def made(self, name):
        return types.SimpleNamespace(name=name, wait_event=lambda event: self.said.append((name, "waits")))

    def name(self, stream):
        return stream.name

    def current_stream(self, device):
        return self.made(f"{device}/caller's")

    @contextlib.contextmanager
    def stream(self, stream):
        self.current = stream.name
        yield
        self.current = "caller's"

    def tensor(self, device):
        def copy_(source, non_blocking):
            assert non_blocking
            self.said.append((self.current, "copies to", device))
        return types.SimpleNamespace(device=device, is_cuda=device.startswith("cuda"), copy_=copy_)


def test_cuda_copies_on_a_stream_per_direction_after_the_mark(monkeypatch):
    recorder = Recorder()
    for name in ("Event", "Stream", "stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, getattr(recorder, name))
    device, far, near = Cuda(), recorder.tensor("cuda:1"), recorder.tensor("cpu")
    mark = device.mark(far)
    waits = [device.start_copy(near, far, mark), device.start_copy(far, near, None), device.start_copy(near, far, mark)]
    device.follow(mark, far)
    waits[0]()
    assert recorder.said == [
        ("record", "cuda:1/caller's"),
        ("cuda:1/1", "waits"), ("cuda:1/1", "copies to", "cpu"), ("record", "cuda:1/1"),
        ("cuda:1/2", "copies to", "cuda:1"), ("record", "cuda:1/2"),
        ("cuda:1/1", "waits"), ("cuda:1/1", "copies to", "cpu"), ("record", "cuda:1/1"),
        ("cuda:1/caller's", "waits"), ("wait",)]


def test_mps_copies_are_over_when_an_event_behind_them_is(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(torch.mps, "Event", recorder.Event)
    wait = Mps().start_copy(recorder.tensor("mps:0"), recorder.tensor("cpu"), Mps().mark(recorder.tensor("mps:0")))
    assert recorder.said == [("caller's", "copies to", "mps:0"), ("record",)]
    wait()
    assert recorder.said[2:] == [("wait",)]


def test_page_locking_that_the_driver_refuses_is_tolerated(monkeypatch):
    """The driver's last error is spent on work that nobody waits for."""
    locked, spent = {}, []

    def register_pages(address, nbytes, flags):
        if locked:
            return 712                                  # cudaErrorHostMemoryAlreadyRegistered
        locked[address] = (nbytes, flags)
        return 0

    def blamed(count, device):
        spent.append(device)
        raise RuntimeError("already registered")
    runtime = types.SimpleNamespace(cudaHostRegister=register_pages, cudaHostUnregister=locked.pop)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch, "zeros", blamed)
    unlock = Cuda().lock_pages(4096, 100)
    assert (locked, spent) == ({4096: (100, 1)}, [])
    assert Cuda().lock_pages(4096, 100) is None
    assert spent == ["cuda"]
    unlock()
    assert not locked


@pytest.mark.parametrize("path", DRIVER_FILES)
def test_a_driver_is_seen_without_loading_it(monkeypatch, path):
    monkeypatch.setattr("os.path.exists", lambda asked: asked == path)
    assert Cuda().present()
    monkeypatch.setattr("os.path.exists", lambda asked: False)
    assert not Cuda().present()


@pytest.mark.parametrize(("system", "machine", "there"), [
    ("darwin", "arm64", True), ("darwin", "x86_64", False), ("linux", "arm64", False)])
def test_apple_silicon_has_a_gpu(monkeypatch, system, machine, there):
    monkeypatch.setattr("sys.platform", system)
    monkeypatch.setattr("platform.machine", lambda: machine)
    assert Mps().present() is there


def test_the_fake_delivers_at_the_end_of_a_copy():
    """So that a pipeline that does not wait would be seen: until then the target holds what it held."""
    device, hold_on, begun = register(), threading.Event(), threading.Event()

    def on_copy(direction, number):
        begun.set()
        assert hold_on.wait(PATIENCE_S)
    device.reset(on_copy=on_copy)
    target = torch.zeros(4)
    wait = device.start_copy(target, on_device(torch.ones(4)), None)
    assert begun.wait(PATIENCE_S)
    assert ctypes.c_float.from_address(target.data_ptr()).value == 0
    hold_on.set()
    wait()
    assert torch.equal(target, torch.ones(4))
    unregister()
