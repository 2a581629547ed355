"""C1: k arrays become one, in one pass over memory.

The loops are in fc_reduce.h, one set per instruction set; here is the plan: which loop, over which block.
"""
from libc.stddef cimport size_t
from libc.stdint cimport uintptr_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer

from fleetcore.status cimport (
    DT_BF16, DT_BOOL, DT_F16, DT_F32, DT_F64, DT_I8, DT_I16, DT_I32, DT_I64, DT_U8, NUM_DTYPES, NUM_OPS, OK, OP_MAX,
    OP_MEAN, OP_MIN, OP_PRODUCT, OP_SUM, ST_UNSUPPORTED, item_bytes,
)

from fleetcore.errors import DType, DTypeError, ReduceOp, ShapeError


cdef extern from "fc_reduce.h" nogil:
    ctypedef void (*fc_fold)(void **dsts, int num_dsts, const void **srcs, int num_srcs, size_t count,
                             int divisor) noexcept nogil
    ctypedef struct fc_folds:
        fc_fold rows[10][5][6]
    enum:
        FC_DT_F32, FC_DT_F64, FC_DT_F16, FC_DT_BF16, FC_DT_I8, FC_DT_I16, FC_DT_I32, FC_DT_I64, FC_DT_U8, FC_DT_BOOL
        FC_OP_SUM, FC_OP_MEAN, FC_OP_MIN, FC_OP_MAX, FC_OP_PRODUCT, FC_NUM_DTYPES, FC_NUM_OPS, FC_TWIN, FC_MANY
    const fc_folds *fc_folds_of(int level)
    const char *fc_level_name(int level)
    int fc_best_level()


if ([FC_DT_F32, FC_DT_F64, FC_DT_F16, FC_DT_BF16, FC_DT_I8, FC_DT_I16, FC_DT_I32, FC_DT_I64, FC_DT_U8, FC_DT_BOOL,
     FC_NUM_DTYPES, FC_OP_SUM, FC_OP_MEAN, FC_OP_MIN, FC_OP_MAX, FC_OP_PRODUCT, FC_NUM_OPS]
        != [DT_F32, DT_F64, DT_F16, DT_BF16, DT_I8, DT_I16, DT_I32, DT_I64, DT_U8, DT_BOOL,
            NUM_DTYPES, OP_SUM, OP_MEAN, OP_MIN, OP_MAX, OP_PRODUCT, NUM_OPS]):
    raise ImportError("fc_reduce.h and status.pxd number dtypes or ops differently")

cdef enum:
    BLOCK_BYTES = 2048      # knee of bench.kernels: more starves the prefetcher at 8 sources, less costs calls

cdef int best = fc_best_level()
cdef int level = best
cdef const fc_folds *folds = fc_folds_of(level)


cdef inline bint is_float(int dtype) noexcept nogil:
    return dtype == DT_F32 or dtype == DT_F64 or dtype == DT_F16 or dtype == DT_BF16


cdef bint supports(int dtype, int op) noexcept nogil:
    return item_bytes(dtype) != 0 and 0 <= op < NUM_OPS and (op != OP_MEAN or is_float(dtype))


cdef int reduce_many(int dtype, int op, void **dsts, int num_dsts, const void **srcs, int num_srcs,
                     size_t count, int divisor) noexcept nogil:
    cdef size_t item = item_bytes(dtype), start, n
    cdef const fc_fold *row
    cdef fc_fold fold = NULL
    cdef int j
    if not supports(dtype, op) or num_dsts < 1 or num_srcs < 1 or (divisor != 1 and not is_float(dtype)):
        return ST_UNSUPPORTED
    if op == OP_SUM and divisor != 1:
        op = OP_MEAN
    elif op == OP_MEAN and divisor == 1:
        op = OP_SUM
    row = folds.rows[dtype][op]

    # One loop does it all, or several do it block by block, so that what one leaves for the next is still in L1.
    if num_dsts == 1 and num_srcs <= 4 and (divisor == 1 or op == OP_MEAN):
        fold = row[num_srcs]
    elif num_dsts == 2 and num_srcs == 2 and (divisor == 1 or op == OP_MEAN):
        fold = row[<int> FC_TWIN]
    elif num_srcs > 1 or divisor != 1:
        fold = row[<int> FC_MANY]
    if fold != NULL:
        fold(dsts, num_dsts, srcs, num_srcs, count, divisor)
        return OK
    start = 0
    while start < count:
        n = min(<size_t> BLOCK_BYTES // item, count - start)
        fold_block(dtype, op, <char *> dsts[0] + start * item, srcs, num_srcs, start * item, n, divisor)
        for j in range(1, num_dsts):
            copy(<char *> dsts[j] + start * item, <char *> dsts[0] + start * item, n * item)
        start += n
    return OK


cdef inline void copy(void *dst, const void *src, size_t nbytes) noexcept nogil:
    if dst != src:
        memcpy(dst, src, nbytes)


cdef void fold_block(int dtype, int op, void *dst, const void **srcs, int num_srcs, size_t offset, size_t n,
                     int divisor) noexcept nogil:
    # Any number of sources, up to four at a time. dst may be one of them, so nothing but the last fold writes it.
    cdef char scratch[BLOCK_BYTES + 64]
    cdef void *acc = scratch + (64 - (<uintptr_t> scratch & 63))
    cdef int partial = OP_SUM if op == OP_MEAN else op
    cdef const void *here[4]
    cdef int done = 0, used = 0
    cdef fc_fold fold
    while done < num_srcs:
        if done > 0:
            here[0] = acc
            used = 1
        while used < 4 and done < num_srcs:
            here[used] = <const char *> srcs[done] + offset
            used += 1
            done += 1
        if done < num_srcs:
            folds.rows[dtype][partial][used](&acc, 1, here, used, n, 1)
            continue
        fold = folds.rows[dtype][op][used]
        if fold != NULL:
            fold(&dst, 1, here, used, n, divisor)
        else:
            copy(dst, here[0], n * item_bytes(dtype))
    if divisor != 1 and op != OP_MEAN:
        here[0] = dst
        folds.rows[dtype][<int> OP_MEAN][1](&dst, 1, here, 1, n, divisor)


def isa():
    """Name of the instruction set in use: "sse2" or "avx2" on x86-64, "neon" on arm64, "generic" elsewhere."""
    return fc_level_name(level).decode()


def _force_isa(name=None):
    """Use the named instruction set, or the best one again; ValueError if this machine lacks it. For tests, benches."""
    global level, folds
    names = [fc_level_name(one).decode() for one in range(best + 1)]
    level = best if name is None else names.index(name)
    folds = fc_folds_of(level)


def reduce_arrays(dsts, srcs, int op, int dtype, int divisor=1):
    """Fold `srcs` into every one of `dsts` as reduce_many does (see reduce.pxd). GIL released.

    Args:    contiguous buffers of equal bytes, aligned to the element; a dst may be one of the srcs. op, dtype: codes.
    Raises:  DTypeError for an op that the dtype does not offer; ShapeError for buffers that break the above.
    """
    cdef int num_dsts = len(dsts), num_srcs = len(srcs), held = 0, rc
    cdef size_t item = item_bytes(dtype)
    cdef Py_ssize_t nbytes
    if not supports(dtype, op) or (divisor != 1 and not is_float(dtype)):
        known = item != 0 and 0 <= op < NUM_OPS
        raise DTypeError(f"no {ReduceOp(op).name} over {DType(dtype).name} with divisor {divisor}" if known
                         else f"unknown dtype {dtype} or op {op}")
    if num_dsts < 1 or num_srcs < 1:
        raise ShapeError("reduce_arrays needs at least one dst and one src")
    cdef Py_buffer *views = <Py_buffer *> malloc((num_dsts + num_srcs) * (sizeof(Py_buffer) + sizeof(void *)))
    if views == NULL:
        raise MemoryError
    cdef void **ptrs = <void **> (views + num_dsts + num_srcs)
    try:
        for buffer in [*dsts, *srcs]:
            PyObject_GetBuffer(buffer, &views[held], PyBUF_WRITABLE if held < num_dsts else PyBUF_SIMPLE)
            ptrs[held] = views[held].buf
            held += 1
        nbytes = views[0].len
        check_buffers(views, num_dsts, held, nbytes, item)
        with nogil:
            rc = reduce_many(dtype, op, ptrs, num_dsts, <const void **> (ptrs + num_dsts), num_srcs,
                             <size_t> nbytes // item, divisor)
        assert rc == OK
    finally:
        while held > 0:
            held -= 1
            PyBuffer_Release(&views[held])
        free(views)


cdef check_buffers(Py_buffer *views, int num_dsts, int num_views, Py_ssize_t nbytes, size_t item):
    cdef int i, j
    cdef Py_ssize_t apart
    for i in range(num_views):
        if views[i].len != nbytes or nbytes % item:
            raise ShapeError(f"buffer {i} has {views[i].len} bytes; expected {nbytes}, in elements of {item}")
        if <uintptr_t> views[i].buf % item:
            raise ShapeError(f"buffer {i} is not aligned to its elements of {item} bytes")
        for j in range(min(i, num_dsts)):
            apart = <char *> views[i].buf - <char *> views[j].buf
            if -nbytes < apart < nbytes and (apart != 0 or i < num_dsts):
                raise ShapeError(f"buffers {j} and {i} overlap; only a dst that is exactly a src may")
