# C1: memory that the ranks of a host share, and the pinning of user memory for the length of a call.
from cpython.buffer cimport Py_buffer
from libc.stddef cimport size_t
from libc.stdint cimport uint64_t


cdef struct Block:
    size_t offset
    size_t nbytes


cdef class Arena:
    cdef readonly int fd
    cdef readonly size_t capacity
    cdef readonly size_t used_bytes
    cdef char *base
    cdef bint owner
    cdef Block *gaps             # free space, sorted by offset, never adjacent
    cdef Py_ssize_t num_gaps, max_gaps
    cdef int reserve(self, Py_ssize_t n) noexcept
    cdef void shift(self, Py_ssize_t start, Py_ssize_t by) noexcept
    cdef int release(self, size_t offset, size_t nbytes) noexcept


cdef class Buffer:
    cdef readonly Arena arena
    cdef readonly size_t offset, nbytes
    cdef size_t block_bytes
    cdef char *ptr


cdef class Pin:
    cdef Py_buffer view
    cdef bint held
    cdef object owner
    cdef char *ptr
    cdef readonly int dtype, parts
    cdef readonly size_t count, nbytes
    cdef int demand_alignment(self) except -1
