# C0: the numbers that cross the floors below group.pyx. Kept equal to errors.py by tests/fleetcore/test_errors.py.
from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint32_t, uint64_t, int32_t


cdef enum Status:            # every noexcept nogil function returns a count >= 0, or one of these
    OK = 0
    ST_PEER_LOST = -1
    ST_TIMEOUT = -2
    ST_OUT_OF_STEP = -3
    ST_INTERRUPTED = -4      # a Python exception (Ctrl-C) is already set
    ST_CORRUPT = -5
    ST_UNSUPPORTED = -6      # dtype x op that no kernel offers
    ST_NO_MEMORY = -7
    ST_SYSTEM = -8           # errno in Fault.error
    ST_LEFT = -9             # the peer shut down in order


cdef enum DTypeCode:
    DT_F32 = 0
    DT_F64 = 1
    DT_F16 = 2
    DT_BF16 = 3
    DT_I8 = 4
    DT_I16 = 5
    DT_I32 = 6
    DT_I64 = 7
    DT_U8 = 8
    DT_BOOL = 9
    NUM_DTYPES = 10


cdef enum OpCode:
    OP_SUM = 0
    OP_MEAN = 1
    OP_MIN = 2
    OP_MAX = 3
    OP_PRODUCT = 4
    NUM_OPS = 5


cdef enum VerbCode:
    VERB_BARRIER = 0
    VERB_ALL_REDUCE = 1
    VERB_BROADCAST = 2
    VERB_REDUCE_SCATTER = 3
    VERB_ALL_GATHER = 4
    VERB_REDUCE = 5
    VERB_GATHER = 6
    VERB_SCATTER = 7
    VERB_ALL_TO_ALL = 8
    NUM_VERBS = 9


cdef struct Call:            # what a rank asked for; 16 bytes, compared byte by byte between ranks
    uint8_t verb
    uint8_t dtype
    uint8_t op
    uint8_t algorithm        # over links: 1 + its place in group.ALGORITHMS; 0: within a host
    uint32_t root            # of rooted verbs; of the others a digest of the counts
    uint64_t count           # elements


cdef struct Fault:           # what went wrong, filled in once, by whoever saw it first
    int32_t status
    int32_t rank             # whom it is about; -1: nobody in particular
    int32_t reporter         # the rank that told us; -1: seen here
    int32_t error            # errno, or 0
    uint64_t sequence        # number of the operation in this group
    uint64_t done_bytes
    Call call                # what this rank (or the reporter) had called
    Call theirs              # ST_OUT_OF_STEP only


cdef inline size_t item_bytes(int dtype) noexcept nogil:
    """Bytes of one element of a DTypeCode; 0 for an unknown code."""
    if dtype == DT_F32 or dtype == DT_I32:
        return 4
    if dtype == DT_F64 or dtype == DT_I64:
        return 8
    if dtype == DT_F16 or dtype == DT_BF16 or dtype == DT_I16:
        return 2
    if dtype == DT_I8 or dtype == DT_U8 or dtype == DT_BOOL:
        return 1
    return 0
