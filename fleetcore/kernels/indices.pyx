"""C1: ascending indices in few bits: Rice codes of the gaps (Golomb 1966, Rice 1979), a parameter for each block.

A random subset has gaps that are nearly geometric, for which a Rice code takes about 0.03 bits per index more than any
code can (log2 C(n, k) / k); parameters per block follow gradients whose large elements lie together. A block of up to
256 gaps is: a byte b; the lower b bits of every gap, one after the other; the rest of every gap in unary, as that many
0 bits and a 1. Both parts begin at a byte, bits run from the lowest of a byte upwards.
"""
from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from fleetcore.status cimport ST_CORRUPT, ST_NO_MEMORY

from fleetcore.errors import CorruptData, ShapeError


cdef extern from *:
    int lowest_bit "__builtin_ctzll"(uint64_t x) noexcept nogil
    int leading_zeros "__builtin_clzll"(uint64_t x) noexcept nogil

cdef enum:
    BLOCK = 256         # 1.5 bytes of overhead: 0.05 bits per index. Fewer cost more, more follow the data less well
    MOST_BITS = 31
    # A parameter of floor(log2(mean gap)) leaves less than 3 bits of unary per gap; pack chooses none that is worse.
    SCRATCH = 1 + (BLOCK * (MOST_BITS + 3) + 7) // 8 + 1 + 16


cdef inline size_t bytes_for(uint64_t bits) noexcept nogil:
    return (bits + 7) >> 3


cdef inline int log2_floor(uint64_t x) noexcept nogil:      # 0 for 0
    return 63 - leading_zeros(x | 1)


cdef size_t encoded_bound(size_t n, size_t k) noexcept nogil:
    # The mean of log2(gap + 1) is largest when all gaps are alike; the floor per block only takes away.
    cdef size_t mean = (n + k - 1) // k if k else 0
    return bytes_for(<uint64_t> k * (log2_floor(mean) + 4)) + 3 * ((k + BLOCK - 1) // BLOCK)


cdef inline uint64_t quotient_bits(const uint32_t *gaps, size_t num, int b) noexcept nogil:
    cdef uint64_t total = num
    cdef size_t j
    for j in range(num):
        total += gaps[j] >> b
    return total


cdef inline size_t pack_block(const uint32_t *gaps, size_t num, uint64_t sum, uint8_t *out) noexcept nogil:
    cdef int b = log2_floor(sum // num), fill = 0
    cdef uint64_t unary = quotient_bits(gaps, num, b), fewer, held = 0, at = 0
    cdef size_t j, low_bytes
    cdef uint32_t mask
    cdef uint8_t *p = out + 1
    while b > 0:
        fewer = quotient_bits(gaps, num, b - 1)
        if fewer > unary + num:
            break
        b, unary = b - 1, fewer
    mask = (<uint32_t> 1 << b) - 1
    out[0] = <uint8_t> b
    low_bytes = bytes_for(<uint64_t> num * b)
    if b > 0:
        for j in range(num):
            held |= <uint64_t> (gaps[j] & mask) << fill     # fill <= 7, so nothing falls out
            memcpy(p, &held, 8)
            fill += b
            p += fill >> 3
            held >>= fill & ~7
            fill &= 7
    p = out + 1 + low_bytes
    memset(p, 0, bytes_for(unary))
    for j in range(num):
        at += gaps[j] >> b
        p[at >> 3] |= <uint8_t> (1 << (at & 7))
        at += 1
    return 1 + low_bytes + bytes_for(unary)


cdef Py_ssize_t pack(const uint32_t *indices, size_t k, uint8_t *out, size_t room) noexcept nogil:
    cdef uint32_t gaps[BLOCK]
    cdef uint8_t block[SCRATCH]
    cdef uint32_t before = <uint32_t> -1
    cdef size_t start = 0, num, j, nbytes, used = 0
    while start < k:
        num = min(<size_t> BLOCK, k - start)
        gaps[0] = indices[start] - before - 1
        for j in range(1, num):
            gaps[j] = indices[start + j] - indices[start + j - 1] - 1
        nbytes = pack_block(gaps, num, <uint64_t> <uint32_t> (indices[start + num - 1] - before) - num, block)
        if nbytes > room - used:
            return ST_NO_MEMORY
        memcpy(out + used, block, nbytes)
        used += nbytes
        before = indices[start + num - 1]
        start += num
    return used


cdef inline uint64_t load(const uint8_t *data, size_t nbytes, size_t at) noexcept nogil:
    # Eight bytes from `at`, zeros past the end.
    cdef uint64_t word = 0
    if at + 8 <= nbytes:
        memcpy(&word, data + at, 8)
    elif at < nbytes:
        memcpy(&word, data + at, nbytes - at)
    return word


cdef Py_ssize_t unpack(const uint8_t *data, size_t nbytes, size_t k, size_t n, uint32_t *indices) noexcept nogil:
    cdef uint64_t word, quotient, next_index = 0, bit
    cdef size_t at = 0, start = 0, num, j, low, unary, here
    cdef int64_t last, place
    cdef uint32_t mask
    cdef int b
    while start < k:
        num = min(<size_t> BLOCK, k - start)
        if at >= nbytes:
            return ST_CORRUPT
        b = data[at]
        low = at + 1
        if b > MOST_BITS:
            return ST_CORRUPT
        unary = low + bytes_for(<uint64_t> num * b)
        mask = (<uint32_t> 1 << b) - 1
        bit, here, last = 0, unary, -1
        word = load(data, nbytes, here)
        for j in range(num):
            while word == 0:
                here += 8
                if here >= nbytes:
                    return ST_CORRUPT
                word = load(data, nbytes, here)
            place = <int64_t> ((here - unary) << 3) + lowest_bit(word)
            word &= word - 1
            quotient = <uint64_t> (place - last - 1)
            last = place
            if quotient > <uint64_t> n >> b:
                return ST_CORRUPT
            next_index += quotient << b | ((load(data, nbytes, low + (bit >> 3)) >> (bit & 7)) & mask)
            bit += b
            if next_index >= n:
                return ST_CORRUPT
            indices[start + j] = <uint32_t> next_index
            next_index += 1
        at = unary + <size_t> (last >> 3) + 1
        start += num
    return at


def room_for(Py_ssize_t n, Py_ssize_t k):
    """Bytes that encode never exceeds for k indices below n, 0 <= k <= n < 2^32."""
    return encoded_bound(max(n, 0), max(k, 0))


def encode(const uint32_t[::1] indices, uint8_t[::1] out):
    """Write strictly ascending indices into out as few bytes and return their number. GIL released.

    Args:    indices: (k,) uint32.  out: uint8; room_for(n, k) bytes always suffice.
    Raises:  ShapeError when they do not ascend, or out is too small; ValueError for another dtype or layout.
    """
    cdef size_t k = indices.shape[0], room = out.shape[0], j
    cdef const uint32_t *p = &indices[0]
    cdef uint32_t falls = 0
    cdef Py_ssize_t rc
    with nogil:
        for j in range(1, k):
            falls |= p[j - 1] >= p[j]
        rc = -1 if falls else pack(p, k, &out[0], room)
    if falls:
        raise ShapeError("indices must ascend strictly")
    if rc < 0:
        raise ShapeError(f"{room} bytes are too few for {k} indices")
    return rc


def decode(const uint8_t[::1] data, Py_ssize_t n, uint32_t[::1] indices):
    """Read len(indices) indices from data and return how many bytes they took. GIL released.

    Whatever the bytes are, the indices ascend strictly and are below n, and nothing else is written.

    Args:    data: uint8, as encode wrote it; more may follow.  indices: (k,) uint32.  0 <= n < 2^32.
    Raises:  CorruptData when encode did not write this; ValueError for another dtype or layout.
    """
    cdef size_t nbytes = data.shape[0], k = indices.shape[0]
    cdef Py_ssize_t rc
    if not 0 <= n <= <Py_ssize_t> 0xffffffff:
        raise ShapeError(f"n must be in 0..{0xffffffff}, got {n}")
    with nogil:
        rc = unpack(&data[0], nbytes, k, n, &indices[0])
    if rc < 0:
        raise CorruptData(f"these bytes are no {k} ascending indices below {n}")
    return rc
