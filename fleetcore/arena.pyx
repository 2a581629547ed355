"""C1: memory that the ranks of a host share (Arena, Buffer), and pinned user memory (Pin)."""
import os

from cpython.buffer cimport (
    PyBUF_C_CONTIGUOUS, PyBUF_FORMAT, PyBUF_WRITABLE, Py_buffer, PyBuffer_FillInfo, PyBuffer_Release,
    PyObject_GetBuffer,
)
from libc.stdint cimport uintptr_t
from fleetcore.posix cimport (
    MAP_ANONYMOUS, MAP_FAILED, MAP_FIXED, MAP_NORESERVE, MAP_PRIVATE, MAP_SHARED, PROT_NONE, PROT_READ, PROT_WRITE,
    advise, close, discard, enlarge_pages, free, memcpy, memory_fd, mmap, munmap,
    realloc,
)
from fleetcore.status cimport (
    DT_BF16, DT_BOOL, DT_F16, DT_F32, DT_F64, DT_I8, DT_I16, DT_I32, DT_I64, DT_U8, NUM_DTYPES, item_bytes,
)

from fleetcore.errors import DTypeError, ShapeError

cdef size_t LINE = 64                    # smallest alignment: a cache line, so that neighbours never share one
cdef size_t HUGE = 2 * 1024 * 1024       # blocks of this size start on a huge page
cdef size_t GIVE_BACK = 32 * 1024 * 1024   # freed blocks this large return to the system at once


cdef size_t round_up(size_t n, size_t unit) noexcept nogil:
    return (n + unit - 1) // unit * unit


cdef char *map_shared(int fd, size_t capacity) except NULL:
    """Map the whole file on a huge-page boundary (file offsets and addresses must agree modulo 2 MiB for huge pages)."""
    cdef void *room = mmap(NULL, capacity + HUGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
    if room == MAP_FAILED:
        raise MemoryError(f"no address space for {capacity} bytes of shared memory")
    cdef char *start = <char *><uintptr_t>round_up(<size_t><uintptr_t>room, HUGE)
    cdef void *base = mmap(start, capacity, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED | MAP_NORESERVE, fd, 0)
    if base == MAP_FAILED:
        munmap(room, capacity + HUGE)
        raise MemoryError(f"cannot map {capacity} bytes of shared memory")
    cdef size_t head = start - <char *>room
    if head:
        munmap(room, head)
    munmap(start + capacity, HUGE - head)
    advise(base, capacity)
    return <char *>base


cdef class Arena:
    """One file descriptor's worth of page-aligned memory; pages exist from their first use on.

    A rank allocates only in its own arena and maps those of the other ranks on its host (`Arena.attach`), so that no
    allocation needs a lock that a dead process could hold. The file has no name: nothing survives its processes.

    Args:    capacity: bytes of address space; memory is used only as touched.
    Raises:  MemoryError, OSError.
    """

    def __cinit__(self, size_t capacity, int fd=-1):
        self.fd = -1
        self.capacity = round_up(capacity, HUGE)
        if capacity == 0:
            raise ShapeError("an arena needs a capacity of at least one byte")
        self.owner = fd < 0
        self.fd = memory_fd(self.capacity) if self.owner else os.dup(fd)
        if self.fd < 0:
            raise OSError("cannot create shared memory")
        self.base = map_shared(self.fd, self.capacity)
        if self.owner:
            if self.reserve(1) != 0:
                raise MemoryError()
            self.gaps[0] = Block(0, self.capacity)
            self.num_gaps = 1

    def secede(self):
        """Keep the contents and the addresses, but share them with nobody any more: other mappings keep the old memory.

        After a failed call a peer that was only slow may still write to what it has mapped; from here on it cannot reach
        this rank. Costs a copy of what is in use. The descriptor is a new one.

        Raises:  OSError, MemoryError; the arena is as it was then.
        """
        cdef int fd
        cdef char *copy
        cdef Py_ssize_t i
        cdef size_t at = 0, end
        if not self.owner:
            raise MemoryError("this arena belongs to another rank")
        fd = memory_fd(self.capacity)
        if fd < 0:
            raise OSError("cannot create shared memory")
        try:
            copy = map_shared(fd, self.capacity)
        except MemoryError:
            close(fd)
            raise
        for i in range(self.num_gaps + 1):         # what lies between the gaps is in use
            end = self.gaps[i].offset if i < self.num_gaps else self.capacity
            memcpy(copy + at, self.base + at, end - at)
            at = end + self.gaps[i].nbytes if i < self.num_gaps else end
        munmap(copy, self.capacity)
        if mmap(self.base, self.capacity, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED | MAP_NORESERVE, fd,
                0) == MAP_FAILED:
            close(fd)
            raise MemoryError("cannot map shared memory")
        advise(self.base, self.capacity)
        close(self.fd)
        self.fd = fd

    @staticmethod
    def attach(int fd, size_t capacity):
        """Map another rank's arena. The descriptor is duplicated; nothing can be allocated from the result."""
        return Arena(capacity, fd)

    def __dealloc__(self):
        if self.base != NULL:
            munmap(self.base, self.capacity)
        if self.fd >= 0:
            close(self.fd)
        free(self.gaps)

    @property
    def address(self):
        """Where this process sees the first byte."""
        return <uintptr_t>self.base

    def allocate(self, size_t nbytes):
        """A Buffer of nbytes (its contents are unspecified), on a cache line, or on a huge page from 2 MiB up.

        Raises:  MemoryError when the arena is full or not one's own.
        """
        cdef size_t unit = HUGE if nbytes >= HUGE else LINE
        cdef size_t want = round_up(nbytes if nbytes else 1, LINE), start, head, tail
        cdef Py_ssize_t i
        if not self.owner:
            raise MemoryError("this arena belongs to another rank")
        for i in range(self.num_gaps):
            start = round_up(self.gaps[i].offset, unit)
            head = start - self.gaps[i].offset
            if head + want <= self.gaps[i].nbytes:
                tail = self.gaps[i].nbytes - head - want
                if head and tail:
                    if self.reserve(self.num_gaps + 1) != 0:
                        raise MemoryError()
                    self.shift(i, 1)
                    self.gaps[i].nbytes = head
                    self.gaps[i + 1] = Block(start + want, tail)
                elif head:
                    self.gaps[i].nbytes = head
                elif tail:
                    self.gaps[i] = Block(start + want, tail)
                else:
                    self.shift(i + 1, -1)
                break
        else:
            raise MemoryError(f"the arena has no room for {nbytes} bytes ({self.used_bytes} of {self.capacity} in use)")
        self.used_bytes += want
        cdef Buffer buffer = Buffer.__new__(Buffer)
        buffer.arena, buffer.offset, buffer.nbytes, buffer.block_bytes = self, start, nbytes, want
        buffer.ptr = self.base + start
        if want >= HUGE:
            with nogil:
                enlarge_pages(buffer.ptr, want // HUGE * HUGE)
        return buffer

    cdef int reserve(self, Py_ssize_t n) noexcept:
        cdef Block *grown
        if n > self.max_gaps:
            grown = <Block *>realloc(self.gaps, 2 * n * sizeof(Block))
            if grown == NULL:
                return -1
            self.gaps, self.max_gaps = grown, 2 * n
        return 0

    cdef void shift(self, Py_ssize_t start, Py_ssize_t by) noexcept:
        """Move gaps[start:] by one place up (by = 1) or down (by = -1)."""
        cdef Py_ssize_t i
        if by > 0:
            for i in range(self.num_gaps, start, -1):
                self.gaps[i] = self.gaps[i - 1]
        else:
            for i in range(start, self.num_gaps):
                self.gaps[i - 1] = self.gaps[i]
        self.num_gaps += by

    # Runs in Buffer.__dealloc__, perhaps inside a garbage collection that allocate() set off: no Python objects here.
    cdef int release(self, size_t offset, size_t nbytes) noexcept:
        cdef Py_ssize_t i = 0
        cdef bint left, right
        while i < self.num_gaps and self.gaps[i].offset < offset:
            i += 1
        left = i > 0 and self.gaps[i - 1].offset + self.gaps[i - 1].nbytes == offset
        right = i < self.num_gaps and offset + nbytes == self.gaps[i].offset
        if not left and not right and self.reserve(self.num_gaps + 1) != 0:
            return -1                    # the space is lost to the arena, nothing worse
        self.used_bytes -= nbytes
        if nbytes >= GIVE_BACK:
            discard(self.base + offset, nbytes)
        if left and right:
            self.gaps[i - 1].nbytes += nbytes + self.gaps[i].nbytes
            self.shift(i + 1, -1)
        elif left:
            self.gaps[i - 1].nbytes += nbytes
        elif right:
            self.gaps[i].offset, self.gaps[i].nbytes = offset, nbytes + self.gaps[i].nbytes
        else:
            self.shift(i, 1)
            self.gaps[i] = Block(offset, nbytes)
        return 0


cdef class Buffer:
    """Bytes in an arena, writable through the buffer protocol; the space is free again when the last user is gone."""

    def __init__(self):
        raise TypeError("use Arena.allocate")

    def __getbuffer__(self, Py_buffer *view, int flags):
        PyBuffer_FillInfo(view, self, self.ptr, self.nbytes, 0, flags)

    def __releasebuffer__(self, Py_buffer *view):
        pass

    def __dealloc__(self):
        if self.arena is not None:
            self.arena.release(self.offset, self.block_bytes)

    def __len__(self):
        return self.nbytes

    @property
    def address(self):
        """Where this process sees the first byte."""
        return <uintptr_t>self.ptr


cdef int dtype_of(const char *format, Py_ssize_t itemsize, size_t *per_item) noexcept:
    """The DTypeCode of a struct-style format; -1 when there is none. per_item: 2 for complex numbers, else 1."""
    cdef char kind
    per_item[0] = 1
    if format == NULL:
        return DT_U8
    if format[0] in (c'@', c'=', c'<'):
        format += 1
    if format[0] == c'Z':
        per_item[0] = 2
        format += 1
        itemsize //= 2
    kind = format[0]
    if format[1] != 0:
        return -1
    if kind == c'f':
        return DT_F32
    if kind == c'd':
        return DT_F64
    if per_item[0] == 2:
        return -1
    if kind == c'e':
        return DT_F16
    if kind == c'?':
        return DT_BOOL
    if kind == c'B':
        return DT_U8
    if kind in (c'b', c'h', c'i', c'l', c'q'):
        return DT_I8 if itemsize == 1 else DT_I16 if itemsize == 2 else DT_I32 if itemsize == 4 else DT_I64
    return -1


cdef class Pin:
    """User memory held still for the length of a call: address, count of elements, dtype.

    Args:    obj: anything with a C-contiguous buffer (numpy array, array.array, bytearray, Buffer), complex as pairs.
             writable: whether the call will write to it.
    Raises:  ShapeError when it is read-only or not contiguous, or not aligned to its element; DTypeError for element
             types that have no DType.
    """

    def __cinit__(self, obj=None, bint writable=True):
        cdef size_t per_item
        if obj is None:
            return
        try:
            PyObject_GetBuffer(obj, &self.view, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT | (PyBUF_WRITABLE if writable else 0))
        except (ValueError, BufferError) as error:
            raise ShapeError(f"cannot use this {type(obj).__name__}: {error}") from None
        except TypeError:
            raise DTypeError(f"a {type(obj).__name__} has no buffer: pass a numpy array or a torch tensor") from None
        self.held = True
        self.dtype = dtype_of(self.view.format, self.view.itemsize, &per_item)
        if self.dtype < 0:
            raise DTypeError(f"elements of format {(<bytes>self.view.format).decode()!r} are not offered")
        self.ptr = <char *>self.view.buf
        self.nbytes = self.view.len
        self.parts = per_item
        self.count = (self.view.len // self.view.itemsize if self.view.itemsize else 0) * per_item
        self.demand_alignment()

    @staticmethod
    def at(uintptr_t address, size_t count, int dtype, owner, int parts=1):
        """Pin `count` elements at an address that `owner` keeps alive (torch tensors have no buffer protocol).

        parts: 2 when pairs of elements are complex numbers.
        """
        if not 0 <= dtype < NUM_DTYPES:
            raise DTypeError(f"unknown dtype code {dtype}")
        cdef Pin pin = Pin.__new__(Pin)
        pin.owner, pin.ptr, pin.count, pin.dtype = owner, <char *>address, count, dtype
        pin.nbytes = count * item_bytes(dtype)
        pin.parts = parts
        pin.demand_alignment()
        return pin

    cdef int demand_alignment(self) except -1:
        if self.count and <uintptr_t>self.ptr % item_bytes(self.dtype):
            raise ShapeError("the memory is not aligned to its elements: pass a copy")
        return 0

    @property
    def address(self):
        """Where the first element lies."""
        return <uintptr_t>self.ptr

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.release()

    def release(self):
        """Let go of the memory. Idempotent."""
        if self.held:
            self.held = False
            PyBuffer_Release(&self.view)
        self.owner = None
        self.ptr = NULL

    def __dealloc__(self):
        if self.held:
            PyBuffer_Release(&self.view)
