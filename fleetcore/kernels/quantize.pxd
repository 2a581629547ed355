# C1: float32 <-> blocks of 1 to 8 bits an element, with what the encoding leaves out kept for the next step.
#
# A code is a number of bits (1: sign and mean magnitude; 2 to 8: integers of that width, scaled) or FP8 (float8 e4m3,
# scaled). Blocks of 256 elements share a float32 scale; fc_quantize.h has the layout. A block that holds a NaN or an
# infinity has the scale NaN and decodes to NaN altogether. Magnitudes that could not be scaled or would be rounded up to
# infinity count as infinite: FP8 from 31 * 2^123 on, 2 bits from 2^125 on, 3 bits from 3 * 2^125 on, random rounding within
# 2^-17 of float32's end.
from libc.stddef cimport size_t
from libc.stdint cimport uint64_t, uint8_t

cdef enum:
    CODE_SIGN = 1
    CODE_FP8 = 9
    BLOCK = 256

cdef struct Rounding:
    int stochastic     # integers only: up or down at random, so that the expectation is exact; else to nearest even
    uint64_t key       # what chance is a function of, together with the number of the block
    uint64_t block     # number of the first block: pieces cut at blocks give the bytes of the whole

cdef size_t coded_bytes(int code, size_t count) noexcept nogil
# Bytes of an encoding of count elements; 0 for an unknown code.

cdef int encode(int code, uint8_t *out, const float *src, size_t count, const Rounding *how) noexcept nogil
# Writes coded_bytes(code, count) to out. Returns OK or ST_UNSUPPORTED, as do the others. Nothing overlaps.

cdef int encode_feedback(int code, uint8_t *out, const float *grad, float *residual, size_t count,
                         const Rounding *how) noexcept nogil
# encode(grad + residual), then residual = grad + residual - decoded, in one pass. Where decoded is not finite, residual
# stays as it was. The rest is exact to half a unit in the last place of the new residual.

cdef int decode(int code, float *dst, const uint8_t *data, size_t count) noexcept nogil
# dst = values. Any bytes decode to something.

cdef int decode_add(int code, float *dst, const uint8_t *data, size_t count, float weight) noexcept nogil
# dst += values * weight: each value is rounded as decode rounds it, then the product, then the sum.
