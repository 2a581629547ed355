"""C1: CRC32C (Castagnoli), the checksum of every frame. The loops are in fc_checksum.h."""
from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint32_t

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer


cdef extern from "fc_checksum.h" nogil:
    ctypedef uint32_t (*fc_crc)(uint32_t state, const uint8_t *p, size_t n) noexcept nogil
    void fc_crc_fill()
    int fc_crc_best()
    fc_crc fc_crc_of(int level)
    const char *fc_crc_name(int level)


fc_crc_fill()
cdef int best = fc_crc_best()
cdef int level = best
cdef fc_crc advance = fc_crc_of(level)


cdef uint32_t crc32c(uint32_t crc, const void *data, size_t nbytes) noexcept nogil:
    return ~advance(~crc, <const uint8_t *> data, nbytes)


def isa():
    """Name of the loop in use: "table", "sse4.2", "avx512", or "crc" on arm64."""
    return fc_crc_name(level).decode()


def _force_isa(name=None):
    """Use the named loop, or the best one again; ValueError if this machine lacks it. For tests, benches."""
    global level, advance
    names = [fc_crc_name(one).decode() for one in range(best + 1)]
    level = best if name is None else names.index(name)
    advance = fc_crc_of(level)


def checksum(data, uint32_t crc=0):
    """Continue `crc` over the bytes of data, any contiguous buffer, and return the new CRC32C. GIL released."""
    cdef Py_buffer view
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        with nogil:
            crc = crc32c(crc, view.buf, view.len)
    finally:
        PyBuffer_Release(&view)
    return crc
