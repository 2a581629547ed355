"""Arena, Buffer and Pin."""
import array
import ctypes
import gc
import itertools
import mmap
import os
import random

import numpy as np
import pytest
from fleetcore.arena import Arena, Pin

from fleetcore.errors import DType, DTypeError, ShapeError

MIB = 1 << 20


def test_buffers_are_aligned_disjoint_and_writable():
    arena = Arena(64 * MIB)
    buffers = [arena.allocate(n) for n in (1, 63, 64, 65, 4096, 0, 3 * MIB)]
    spans = sorted((b.offset, b.offset + len(b)) for b in buffers)
    assert all(a_end <= b_start for (_, a_end), (b_start, _) in itertools.pairwise(spans))
    assert all(b.address % 64 == 0 for b in buffers) and buffers[-1].address % (2 * MIB) == 0
    for k, buffer in enumerate(buffers):
        memoryview(buffer)[:] = bytes([k]) * len(buffer)
    assert [set(memoryview(b).tolist()) for b in buffers] == [{0}, {1}, {2}, {3}, {4}, set(), {6}]


def test_freed_space_is_found_again_and_merges():
    arena = Arena(8 * MIB)
    rng, live, total = random.Random(7), [], 0
    for _ in range(3000):
        if live and rng.random() < 0.5:
            live.pop(rng.randrange(len(live)))
        else:
            try:
                live.append(arena.allocate(rng.choice((1, 100, 5000, 70_000, 600_000))))
                total += 1
            except MemoryError:
                live.pop(0)
        spans = sorted((b.offset, b.offset + len(b)) for b in live)
        assert all(a <= b for (_, a), (b, _) in itertools.pairwise(spans))
    assert total > 1000
    live.clear()
    gc.collect()
    assert arena.used_bytes == 0
    assert len(arena.allocate(8 * MIB)) == 8 * MIB       # one gap again


def test_a_full_arena_says_so():
    arena = Arena(4 * MIB)
    keep = arena.allocate(3 * MIB)
    with pytest.raises(MemoryError, match="no room for 2097152 bytes"):
        arena.allocate(2 * MIB)
    assert len(keep) == 3 * MIB
    with pytest.raises(ShapeError):
        Arena(0)


def test_memory_comes_with_use_and_large_blocks_go_back():
    arena = Arena(1 << 34)
    assert os.fstat(arena.fd).st_blocks == 0
    buffer = arena.allocate(64 * MIB)
    memoryview(buffer)[::4096] = bytes(64 * MIB // 4096)
    assert os.fstat(arena.fd).st_blocks * 512 >= 64 * MIB
    del buffer
    gc.collect()
    assert os.fstat(arena.fd).st_blocks * 512 < 4 * MIB


def test_another_mapping_sees_the_same_bytes():
    arena = Arena(4 * MIB)
    other = Arena.attach(arena.fd, arena.capacity)
    buffer = arena.allocate(1000)
    memoryview(buffer)[:] = b"x" * 1000
    assert ctypes.string_at(other.address + buffer.offset, 1000) == b"x" * 1000
    with pytest.raises(MemoryError, match="another rank"):
        other.allocate(10)


def test_after_seceding_nobody_else_reaches_the_memory():
    arena = Arena(16 * MIB)
    other = Arena.attach(arena.fd, arena.capacity)
    kept = [arena.allocate(n) for n in (100, 3 * MIB, 5000)]
    del kept[0]
    x = np.frombuffer(kept[0], np.uint8)
    x[:] = 7
    address, used = x.ctypes.data, arena.used_bytes
    arena.secede()
    ctypes.memset(other.address, 0xFF, 16 * MIB)
    assert (x == 7).all() and x.ctypes.data == address and arena.used_bytes == used
    again = Arena.attach(arena.fd, arena.capacity)
    assert ctypes.string_at(again.address + kept[0].offset, 10) == b"\7" * 10
    assert len(arena.allocate(8 * MIB)) == 8 * MIB
    with pytest.raises(MemoryError, match="another rank"):
        other.secede()


def test_an_array_keeps_its_buffer_and_arena_alive():
    x = np.frombuffer(Arena(4 * MIB).allocate(800), np.float64)
    gc.collect()
    x[:] = 1.5
    assert x.sum() == 150.0


@pytest.mark.parametrize(("dtype", "code"), [
    ("f4", DType.FLOAT32), ("f8", DType.FLOAT64), ("f2", DType.FLOAT16), ("i1", DType.INT8), ("i2", DType.INT16),
    ("i4", DType.INT32), ("i8", DType.INT64), ("u1", DType.UINT8), ("?", DType.BOOL), ("c8", DType.FLOAT32),
    ("c16", DType.FLOAT64),
])
def test_pin_knows_dtypes(dtype, code):
    x = np.zeros((3, 5), dtype)
    with Pin(x) as pin:
        assert pin.dtype == code and pin.nbytes == x.nbytes and pin.address == x.ctypes.data
        assert pin.count == 15 * pin.parts and pin.parts == (2 if dtype[0] == "c" else 1)


def test_pin_takes_anything_with_a_buffer():
    assert Pin(array.array("d", [1, 2, 3])).count == 3
    assert Pin(bytearray(7)).dtype == DType.UINT8
    assert Pin(mmap.mmap(-1, 4096)).count == 4096
    assert Pin(b"abc", writable=False).count == 3
    assert Pin(np.float64(3), writable=False).count == 1
    assert Pin(np.zeros(())).count == 1 and Pin(np.zeros(0)).count == 0


def test_pin_refuses_what_it_cannot_hold():
    for bad, error in ((b"abc", ShapeError), (np.zeros(6)[::2], ShapeError), (np.zeros(3, ">i4"), DTypeError),
                       (np.zeros(3, object), DTypeError), (np.zeros(3, "u4"), DTypeError), (object(), DTypeError),
                       (np.zeros(3, [("a", "f4")]), DTypeError),
                       (np.frombuffer(bytearray(17), np.uint8)[1:].view(np.float64), ShapeError)):
        with pytest.raises(error):
            Pin(bad)


def test_a_pinned_buffer_cannot_be_resized():
    data = bytearray(10)
    with Pin(data), pytest.raises(BufferError):
        data.extend(b"more")
    data.extend(b"more")


def test_pin_at_an_address():
    x = np.arange(4, dtype=np.float32)
    pin = Pin.at(x.ctypes.data, 4, DType.FLOAT32, x)
    assert (pin.count, pin.nbytes, pin.address) == (4, 16, x.ctypes.data)
    with pytest.raises(DTypeError):
        Pin.at(x.ctypes.data, 4, 99, x)
    with pytest.raises(ShapeError, match="aligned"):
        Pin.at(x.ctypes.data + 1, 1, DType.FLOAT32, x)
