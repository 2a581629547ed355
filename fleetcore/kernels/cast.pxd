# C1: float32 <-> float16 / bfloat16, round to nearest even, denormals kept, the same bits on every instruction set.
from libc.stddef cimport size_t

cdef int cast(int dst_dtype, void *dst, int src_dtype, const void *src, size_t count) noexcept nogil
# dst[i] = (dst type) src[i]. Overflow becomes Inf, NaN stays NaN (quiet). No overlap unless the types are equal.
# Returns OK, or ST_UNSUPPORTED for a pair that is not offered.
