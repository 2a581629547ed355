# C1: k arrays become one, in one pass over memory.
from libc.stddef cimport size_t

cdef bint supports(int dtype, int op) noexcept nogil
# Whether reduce_many offers dtype x op (OP_MEAN only for floating point).

cdef int reduce_many(int dtype, int op, void **dsts, int num_dsts, const void **srcs, int num_srcs,
                     size_t count, int divisor) noexcept nogil
# dsts[j][i] = srcs[0][i] op srcs[1][i] op ... (left fold, in that order), divided by `divisor` when it is not 1.
# Every dst gets the same bytes. A dst may be one of the srcs (same address); otherwise nothing overlaps.
# float16 and bfloat16 are folded in float32 and rounded once (nearest even). NaN and Inf propagate, also through MIN and MAX.
# Integers wrap. bool: SUM and MAX are OR, PRODUCT and MIN are AND; any non-zero byte is true, results are 0 or 1.
# Pointers are aligned to the element. num_dsts >= 1, num_srcs >= 1. Returns OK or ST_UNSUPPORTED.
