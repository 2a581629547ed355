# C1: ascending indices <-> few bits: gaps between neighbours, in blocks of 256 with the Rice parameter that suits each.
from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint32_t

cdef size_t encoded_bound(size_t n, size_t k) noexcept nogil
# Bytes that pack never exceeds for k indices below n: k (log2(n / k) + 3) bits and 3 bytes a block.

cdef Py_ssize_t pack(const uint32_t *indices, size_t k, uint8_t *out, size_t room) noexcept nogil
# Write k strictly ascending indices. Returns the bytes written, or ST_NO_MEMORY when room is too small. No overlap.

cdef Py_ssize_t unpack(const uint8_t *data, size_t nbytes, size_t k, size_t n, uint32_t *indices) noexcept nogil
# Read k indices, all below n and strictly ascending whatever the bytes are. Returns the bytes read, or ST_CORRUPT (the
# indices are then half written). Never reads past nbytes.
