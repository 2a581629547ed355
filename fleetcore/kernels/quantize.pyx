"""C1: float32 <-> blocks of 1 to 8 bits an element. The loops are in fc_quantize.h."""
from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint64_t, uintptr_t

from fleetcore.status cimport DT_BF16, DT_F16, OK, ST_UNSUPPORTED

from fleetcore.errors import DTypeError, ShapeError


cdef extern from "fc_quantize.h" nogil:
    ctypedef unsigned short fc_half
    ctypedef struct fc_rounding:
        int stochastic
        uint64_t key
        uint64_t block
    ctypedef void (*fc_encode)(uint8_t *out, const float *src, size_t count, const fc_rounding *how) noexcept nogil
    ctypedef void (*fc_encode_feedback)(uint8_t *out, const float *grad, float *residual, size_t count,
                                        const fc_rounding *how) noexcept nogil
    ctypedef void (*fc_decode)(float *dst, const uint8_t *data, size_t count) noexcept nogil
    ctypedef void (*fc_decode_add)(float *dst, const uint8_t *data, size_t count, float weight) noexcept nogil
    ctypedef void (*fc_half_feedback)(fc_half *out, const float *grad, float *residual, size_t count) noexcept nogil
    ctypedef void (*fc_settle)(const float *grad, float *residual, const float *sent, size_t count) noexcept nogil
    ctypedef struct fc_quantizers:
        fc_encode encode[10]
        fc_encode_feedback encode_feedback[10]
        fc_decode decode[10]
        fc_decode_add decode_add[10]
        fc_half_feedback half_feedback[2]
        fc_settle settle
    enum:
        FC_BLOCK, FC_CODE_SIGN, FC_CODE_FP8, FC_NUM_CODES
    size_t fc_coded_bytes(int code, size_t count)
    const fc_quantizers *fc_quantizers_of(int level)
    const char *fc_level_name(int level)
    int fc_best_level()


if [FC_BLOCK, FC_CODE_SIGN, FC_CODE_FP8, FC_NUM_CODES] != [BLOCK, CODE_SIGN, CODE_FP8, CODE_FP8 + 1]:
    raise ImportError("fc_quantize.h and quantize.pxd number codes differently")

SIGN = CODE_SIGN
FP8 = CODE_FP8
BLOCK_ELEMS = BLOCK

cdef int best = fc_best_level()
cdef int level = best
cdef const fc_quantizers *quantizers = fc_quantizers_of(level)


cdef inline bint offers(int code) noexcept nogil:
    return CODE_SIGN <= code <= CODE_FP8


cdef size_t coded_bytes(int code, size_t count) noexcept nogil:
    return fc_coded_bytes(code, count) if offers(code) else 0


cdef int encode(int code, uint8_t *out, const float *src, size_t count, const Rounding *how) noexcept nogil:
    if not offers(code):
        return ST_UNSUPPORTED
    quantizers.encode[code](out, src, count, <const fc_rounding *> how)
    return OK


cdef int encode_feedback(int code, uint8_t *out, const float *grad, float *residual, size_t count,
                         const Rounding *how) noexcept nogil:
    if not offers(code):
        return ST_UNSUPPORTED
    quantizers.encode_feedback[code](out, grad, residual, count, <const fc_rounding *> how)
    return OK


cdef int decode(int code, float *dst, const uint8_t *data, size_t count) noexcept nogil:
    if not offers(code):
        return ST_UNSUPPORTED
    quantizers.decode[code](dst, data, count)
    return OK


cdef int decode_add(int code, float *dst, const uint8_t *data, size_t count, float weight) noexcept nogil:
    if not offers(code):
        return ST_UNSUPPORTED
    quantizers.decode_add[code](dst, data, count, weight)
    return OK


def isa():
    """Name of the instruction set in use: "sse2" or "avx2" on x86-64, "neon" on arm64, "generic" elsewhere."""
    return fc_level_name(level).decode()


def _force_isa(name=None):
    """Use the named instruction set, or the best one again; ValueError if this machine lacks it. For tests, benches."""
    global level, quantizers
    names = [fc_level_name(one).decode() for one in range(best + 1)]
    level = best if name is None else names.index(name)
    quantizers = fc_quantizers_of(level)


def encoding_bytes(int code, size_t count):
    """Bytes that the encoding of `count` elements takes. Code: 1 to 8 bits (SIGN is 1), or FP8.

    Raises:  DTypeError for another code.
    """
    demand_code(code)
    return coded_bytes(code, count)


def encode_array(int code, const float[::1] src, uint8_t[::1] out, key=None, size_t first=0):
    """Write the encoding of src to the beginning of out, as quantize.pxd says, and return its bytes. GIL released.

    Args:    key: None rounds to nearest even; a number of 64 bits rounds integer codes up or down at random, as a function
             of (key, index of the element) alone.  first: index of src[0]; a multiple of BLOCK_ELEMS.
    Raises:  DTypeError for an unknown code; ShapeError when out is too small, buffers overlap, or `first` is within a block.
    """
    cdef Rounding how = rounding(key, first)
    cdef size_t count = src.shape[0], nbytes = demand_room(code, count, out.shape[0])
    demand_apart(<uintptr_t> &out[0], nbytes, <uintptr_t> &src[0], 4 * count)
    with nogil:
        encode(code, &out[0], &src[0], count, &how)
    return nbytes


def encode_feedback_array(int code, const float[::1] grad, float[::1] residual, uint8_t[::1] out, key=None,
                          size_t first=0):
    """encode_array(grad + residual), then residual = grad + residual - decoded, as quantize.pxd says. GIL released.

    Raises:  as encode_array; ShapeError also when grad and residual differ in size.
    """
    cdef Rounding how = rounding(key, first)
    cdef size_t count = grad.shape[0], nbytes = demand_room(code, count, out.shape[0])
    demand_equal(count, residual.shape[0])
    demand_apart(<uintptr_t> &residual[0], 4 * count, <uintptr_t> &grad[0], 4 * count)
    demand_apart(<uintptr_t> &out[0], nbytes, <uintptr_t> &grad[0], 4 * count)
    demand_apart(<uintptr_t> &out[0], nbytes, <uintptr_t> &residual[0], 4 * count)
    with nogil:
        encode_feedback(code, &out[0], &grad[0], &residual[0], count, &how)
    return nbytes


def decode_array(int code, const uint8_t[::1] data, float[::1] out):
    """Overwrite out with what data, exactly the encoding of as many elements, stands for. GIL released.

    Raises:  DTypeError for an unknown code; ShapeError when the sizes do not fit each other or the buffers overlap.
    """
    cdef size_t count = out.shape[0]
    demand_encoding(code, count, data.shape[0])
    demand_apart(<uintptr_t> &out[0], 4 * count, <uintptr_t> &data[0], data.shape[0])
    with nogil:
        decode(code, &out[0], &data[0], count)


def decode_add_array(int code, const uint8_t[::1] data, float[::1] out, float weight=1.0):
    """out += decoded data * weight, as quantize.pxd says. GIL released. Errors as decode_array."""
    cdef size_t count = out.shape[0]
    demand_encoding(code, count, data.shape[0])
    demand_apart(<uintptr_t> &out[0], 4 * count, <uintptr_t> &data[0], data.shape[0])
    with nogil:
        decode_add(code, &out[0], &data[0], count, weight)


def half_feedback_array(int dtype, const float[::1] grad, float[::1] residual, unsigned short[::1] out):
    """out = grad + residual in float16 or bfloat16, as cast rounds; residual = what the rounding left. GIL released.

    Args:    dtype: code of the half; out: its bits, as many elements.
    Raises:  DTypeError for another dtype; ShapeError for unequal sizes or buffers that overlap.
    """
    cdef size_t count = grad.shape[0]
    if dtype != DT_F16 and dtype != DT_BF16:
        raise DTypeError(f"dtype {dtype} is not a half")
    demand_equal(count, residual.shape[0])
    demand_equal(count, out.shape[0])
    demand_apart(<uintptr_t> &residual[0], 4 * count, <uintptr_t> &grad[0], 4 * count)
    demand_apart(<uintptr_t> &out[0], 2 * count, <uintptr_t> &grad[0], 4 * count)
    demand_apart(<uintptr_t> &out[0], 2 * count, <uintptr_t> &residual[0], 4 * count)
    with nogil:
        quantizers.half_feedback[dtype == DT_BF16](&out[0], &grad[0], &residual[0], count)


def settle_array(const float[::1] grad, float[::1] residual, const float[::1] sent):
    """residual = grad + residual - sent, exact to half a unit in the last place; as it was where sent is not finite.

    Raises:  ShapeError for unequal sizes, or a residual that overlaps another buffer. GIL released.
    """
    cdef size_t count = grad.shape[0]
    demand_equal(count, residual.shape[0])
    demand_equal(count, sent.shape[0])
    demand_apart(<uintptr_t> &residual[0], 4 * count, <uintptr_t> &grad[0], 4 * count)
    demand_apart(<uintptr_t> &residual[0], 4 * count, <uintptr_t> &sent[0], 4 * count)
    with nogil:
        quantizers.settle(&grad[0], &residual[0], &sent[0], count)


cdef Rounding rounding(key, size_t first) except *:
    cdef Rounding how
    how.stochastic = key is not None
    how.key = key if key is not None else 0
    how.block = first // BLOCK
    if first % BLOCK:
        raise ShapeError(f"a piece begins at a multiple of {BLOCK} elements, got {first}")
    return how


cdef int demand_code(int code) except -1:
    if not offers(code):
        raise DTypeError(f"unknown code {code}: 1 to 8 bits, or FP8 ({CODE_FP8})")
    return 0


cdef size_t demand_room(int code, size_t count, size_t room) except? 0:
    demand_code(code)
    cdef size_t nbytes = coded_bytes(code, count)
    if room < nbytes:
        raise ShapeError(f"the encoding of {count} elements takes {nbytes} bytes, out has {room}")
    return nbytes


cdef int demand_encoding(int code, size_t count, size_t nbytes) except -1:
    demand_code(code)
    if nbytes != coded_bytes(code, count):
        raise ShapeError(f"the encoding of {count} elements takes {coded_bytes(code, count)} bytes, data has {nbytes}")
    return 0


cdef int demand_equal(size_t count, size_t other) except -1:
    if count != other:
        raise ShapeError(f"buffers of {count} and {other} elements; they must be equal")
    return 0


cdef int demand_apart(uintptr_t dst, size_t dst_bytes, uintptr_t src, size_t src_bytes) except -1:
    if dst < src + src_bytes and src < dst + dst_bytes:
        raise ShapeError("buffers overlap")
    return 0
