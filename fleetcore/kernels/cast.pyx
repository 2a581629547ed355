"""C1: float32 <-> float16 / bfloat16. The loops are in fc_half.h, which reduce shares."""
from libc.stddef cimport size_t
from libc.stdint cimport uintptr_t
from libc.string cimport memcpy

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer

from fleetcore.status cimport DT_BF16, DT_F16, DT_F32, OK, ST_UNSUPPORTED, item_bytes

from fleetcore.errors import DTypeError, ShapeError


cdef extern from "fc_cast.h" nogil:
    ctypedef unsigned short fc_half
    ctypedef void (*fc_widen)(float *dst, const fc_half *src, size_t count) noexcept nogil
    ctypedef void (*fc_narrow)(fc_half *dst, const float *src, size_t count) noexcept nogil
    ctypedef struct fc_casts:
        fc_widen widen[2]
        fc_narrow narrow[2]
    const fc_casts *fc_casts_of(int level)
    const char *fc_level_name(int level)
    int fc_best_level()


cdef int best = fc_best_level()
cdef int level = best
cdef const fc_casts *casts = fc_casts_of(level)


cdef inline bint is_half(int dtype) noexcept nogil:
    return dtype == DT_F16 or dtype == DT_BF16


cdef inline bint offers(int dst_dtype, int src_dtype) noexcept nogil:
    if dst_dtype == src_dtype:
        return item_bytes(dst_dtype) != 0
    return (dst_dtype == DT_F32 and is_half(src_dtype)) or (src_dtype == DT_F32 and is_half(dst_dtype))


cdef int cast(int dst_dtype, void *dst, int src_dtype, const void *src, size_t count) noexcept nogil:
    if not offers(dst_dtype, src_dtype):
        return ST_UNSUPPORTED
    if dst_dtype == src_dtype:
        if dst != src:
            memcpy(dst, src, count * item_bytes(dst_dtype))
    elif dst_dtype == DT_F32:
        casts.widen[src_dtype == DT_BF16](<float *> dst, <const fc_half *> src, count)
    else:
        casts.narrow[dst_dtype == DT_BF16](<fc_half *> dst, <const float *> src, count)
    return OK


def isa():
    """Name of the instruction set in use: "sse2" or "avx2" on x86-64, "neon" on arm64, "generic" elsewhere."""
    return fc_level_name(level).decode()


def _force_isa(name=None):
    """Use the named instruction set, or the best one again; ValueError if this machine lacks it. For tests, benches."""
    global level, casts
    names = [fc_level_name(one).decode() for one in range(best + 1)]
    level = best if name is None else names.index(name)
    casts = fc_casts_of(level)


def cast_array(dst, int dst_dtype, src, int src_dtype):
    """Write src, an array of src_dtype, into dst as dst_dtype (see cast.pxd). GIL released.

    Args:    contiguous buffers of equal element counts, aligned to their elements; dtypes: codes.
    Raises:  DTypeError for a pair that is not offered; ShapeError for buffers that break the above or overlap.
    """
    cdef Py_buffer to, from_
    if not offers(dst_dtype, src_dtype):
        raise DTypeError(f"no cast from dtype {src_dtype} to {dst_dtype}")
    PyObject_GetBuffer(dst, &to, PyBUF_WRITABLE)
    try:
        PyObject_GetBuffer(src, &from_, PyBUF_SIMPLE)
        try:
            check_buffers(&to, item_bytes(dst_dtype), &from_, item_bytes(src_dtype))
            with nogil:
                cast(dst_dtype, to.buf, src_dtype, from_.buf, <size_t> to.len // item_bytes(dst_dtype))
        finally:
            PyBuffer_Release(&from_)
    finally:
        PyBuffer_Release(&to)


cdef check_buffers(Py_buffer *dst, size_t dst_item, Py_buffer *src, size_t src_item):
    cdef Py_ssize_t apart = <char *> src.buf - <char *> dst.buf
    if dst.len % dst_item or src.len % src_item or <size_t> dst.len // dst_item != <size_t> src.len // src_item:
        raise ShapeError(f"dst has {dst.len} bytes in elements of {dst_item}, src {src.len} in elements of {src_item}")
    if <uintptr_t> dst.buf % dst_item or <uintptr_t> src.buf % src_item:
        raise ShapeError("a buffer is not aligned to its elements")
    if -src.len < apart < dst.len and not (apart == 0 and dst_item == src_item):
        raise ShapeError("dst and src overlap")
