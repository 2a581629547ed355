"""C1: the k largest of many, random subsets, and the way back into a dense array.

The loops are in fc_sparsify.h, one set per instruction set; here is the plan. A gradient of 100 MB fits no cache, so
what counts is how often it is read. A sample gives bounds between which the k-th largest lies almost surely; one pass
over x takes everything above the lower bound; the exact threshold is then found among those few. Where the bounds fail
(ties, bad luck) or there is no room for the surplus, a radix search over x finds the threshold, at a few passes more.
"""
from libc.stddef cimport size_t
from libc.stdint cimport int32_t, uint32_t, uint64_t, uintptr_t
from libc.string cimport memcpy, memset

from fleetcore.status cimport OK, ST_CORRUPT

from fleetcore.errors import ShapeError


cdef extern from "fc_sparsify.h" nogil:
    ctypedef struct fc_cut:
        int32_t floor
        size_t ties
    ctypedef struct fc_sieve:
        size_t (*take)(const uint32_t *x, size_t n, uint32_t first, fc_cut *cut, uint32_t *idx, uint32_t *val,
                       size_t room) noexcept nogil
        size_t (*sift)(uint32_t *idx, uint32_t *val, size_t n, fc_cut *cut) noexcept nogil
        void (*add)(float *out, const float *x, const float *y, size_t n) noexcept nogil
        void (*settle)(float *x, const float *y, size_t n) noexcept nogil
        size_t (*within)(const uint32_t *x, size_t n, uint32_t low, uint32_t width, uint32_t *out) noexcept nogil
        size_t (*count)(const uint32_t *x, size_t n, int32_t floor) noexcept nogil
        size_t (*draw)(uint32_t first, size_t n, uint32_t key0, uint32_t key1, uint32_t last, uint32_t *idx,
                       size_t room) noexcept nogil
    enum:
        FC_KEY_INF, FC_KEY_NAN, FC_KEY_END, FC_NAN_BITS
    void fc_sieve_fill()
    int fc_sieve_best()
    const fc_sieve *fc_sieve_of(int level)
    const char *fc_sieve_name(int level)


cdef extern from *:
    double sqrt "__builtin_sqrt"(double x) noexcept nogil
    int leading_zeros "__builtin_clz"(unsigned int x) noexcept nogil


cdef enum:
    BLOCK = 2048                # elements filtered at a time: 8 KiB, which stay in L1 beside the counters
    RADIX_BITS = 11             # 31 bits of key in three passes
    RADIX = 1 << RADIX_BITS
    WAYS = 4                    # counters of one bucket: equal keys in a row would wait for each other's store
    SAMPLES = 1 << 14           # 64 KiB of stack; bounds within 10 % of k at k = n / 10
    MIN_SAMPLED = 1 << 17       # below, x lies in L2 and passes over it are cheap

cdef double SIGMAS = 4.0        # how far the bounds lie from the sample's quantile: they fail once in 15,000 times

fc_sieve_fill()
cdef int best = fc_sieve_best()
cdef int level = best
cdef const fc_sieve *sieve = fc_sieve_of(level)


cdef struct Source:             # x, or x + y where y is there: never written down as a whole
    const float *x
    const float *y
    size_t n


cdef inline const uint32_t *read(const Source *source, size_t start, size_t num, float *scratch) noexcept nogil:
    if source.y == NULL:
        return <const uint32_t *> (source.x + start)
    sieve.add(scratch, source.x + start, source.y + start, num)
    return <const uint32_t *> scratch


# The threshold: of n elements, which key does the k-th largest have, and how many of that key are among the k?

cdef bint narrow(const Source *source, size_t k, uint32_t low, uint32_t high, fc_cut *cut) noexcept nogil:
    # Radix search in keys [low, high), which need not hold the threshold: then False. 1 <= k <= n.
    cdef uint32_t counters[WAYS][RADIX]
    cdef uint32_t found[BLOCK + 16]             # FC_SIEVE_SLACK
    cdef float scratch[BLOCK]
    cdef const uint32_t *block
    cdef size_t start, here, num, i, in_bucket, above = 0
    cdef uint32_t shift, width
    cdef bint first = high < <uint32_t> FC_KEY_END
    cdef int bucket
    while True:
        width = high - low
        shift = 0 if width <= RADIX else 32 - RADIX_BITS - leading_zeros(width - 1)
        memset(counters, 0, sizeof(counters))
        start = 0
        while start < source.n:
            here = min(<size_t> BLOCK, source.n - start)
            block = read(source, start, here, scratch)
            if first:
                above += sieve.count(block, here, <int32_t> high - 1)
            num = sieve.within(block, here, low, width, found)
            for i in range(num):
                counters[i % WAYS][found[i] >> shift] += 1
            start += here
        if above >= k:
            return False
        first = False
        bucket = <int> ((width - 1) >> shift)
        while bucket >= 0:
            in_bucket = <size_t> counters[0][bucket] + counters[1][bucket] + counters[2][bucket] + counters[3][bucket]
            if above + in_bucket >= k:
                break
            above += in_bucket
            bucket -= 1
        if bucket < 0:
            return False
        low += <uint32_t> bucket << shift
        if shift == 0:
            cut.floor, cut.ties = <int32_t> low, k - above
            return True
        high = min(high, low + (<uint32_t> 1 << shift))


cdef void find_cut(const Source *source, size_t k, uint32_t low, uint32_t high, fc_cut *cut) noexcept nogil:
    if not narrow(source, k, low, high, cut):
        narrow(source, k, 0, FC_KEY_END, cut)


cdef inline uint64_t mix(uint64_t z) noexcept nogil:        # splitmix64 (Steele et al. 2014)
    z += <uint64_t> 0x9e3779b97f4a7c15
    z = (z ^ (z >> 30)) * <uint64_t> 0xbf58476d1ce4e5b9
    z = (z ^ (z >> 27)) * <uint64_t> 0x94d049bb133111eb
    return z ^ (z >> 31)


cdef inline double sample_rank(size_t n, size_t k, double sigmas) noexcept nogil:
    cdef double rank = <double> k / n * SAMPLES
    return rank + sigmas * (sqrt(rank) + 1)


cdef void bracket(const Source *source, size_t k, uint32_t *low, uint32_t *high) noexcept nogil:
    # Keys low <= threshold < high, almost surely; [0, end) where a sample tells nothing.
    cdef float sample[SAMPLES]
    cdef double lowest = sample_rank(source.n, k, SIGMAS), highest = sample_rank(source.n, k, -SIGMAS)
    cdef size_t stride = source.n // SAMPLES, i, at
    cdef Source few
    cdef fc_cut cut
    low[0], high[0] = 0, FC_KEY_END
    if source.n < MIN_SAMPLED or lowest >= SAMPLES:
        return
    for i in range(<size_t> SAMPLES):                       # one from each stride: rows of a matrix must not line up
        at = i * stride + <size_t> (mix(i) % stride)
        sample[i] = source.x[at] if source.y == NULL else source.x[at] + source.y[at]
    few.x, few.y, few.n = sample, NULL, SAMPLES
    find_cut(&few, <size_t> lowest, 0, FC_KEY_END, &cut)
    low[0] = <uint32_t> cut.floor
    if highest >= 1:
        find_cut(&few, <size_t> highest, low[0], FC_KEY_END, &cut)
        high[0] = <uint32_t> cut.floor + 1


cdef size_t top_k_room(size_t n, size_t k) noexcept nogil:
    cdef double lowest
    k = min(k, n)
    if n < MIN_SAMPLED or k == 0:
        return k
    lowest = sample_rank(n, k, SIGMAS)
    lowest = (lowest + SIGMAS * (sqrt(lowest) + 1)) / SAMPLES
    return n if lowest >= 1 else max(k, min(n, <size_t> (lowest * n)))


cdef size_t take(const Source *source, fc_cut *cut, uint32_t *indices, float *values, size_t room) noexcept nogil:
    # What the cut keeps; more than room when it does not fit.
    cdef float scratch[BLOCK]
    cdef size_t start = 0, here, num = 0
    while start < source.n and num <= room:
        here = min(<size_t> BLOCK, source.n - start)
        num += sieve.take(read(source, start, here, scratch), here, <uint32_t> start, cut, indices + num,
                          <uint32_t *> values + num, room - num)
        start += here
    return num


cdef size_t select(const Source *source, size_t k, uint32_t *indices, float *values, size_t room) noexcept nogil:
    cdef uint32_t low = 0, high = FC_KEY_END
    cdef size_t num
    cdef Source candidates
    cdef fc_cut cut
    if k == 0 or source.n == 0:
        return 0
    cut.floor, cut.ties = -1, 0
    if k >= source.n:
        return take(source, &cut, indices, values, room)
    bracket(source, k, &low, &high)
    if low > 0 and room >= top_k_room(source.n, k):
        cut.floor = <int32_t> low - 1
        num = take(source, &cut, indices, values, room)
        if k <= num <= room:
            candidates.x, candidates.y, candidates.n = values, NULL, num
            find_cut(&candidates, k, low, high, &cut)
            return sieve.sift(indices, <uint32_t *> values, num, &cut)
    find_cut(source, k, low, high, &cut)
    return take(source, &cut, indices, values, room)


cdef size_t select_top_k(const float *x, size_t n, size_t k, uint32_t *indices, float *values,
                         size_t room) noexcept nogil:
    cdef Source source
    source.x, source.y, source.n = x, NULL, n
    return select(&source, k, indices, values, room)


cdef inline bint is_finite(float x) noexcept nogil:
    return x - x == 0


cdef inline float rounding_error(float x, float y, float sum) noexcept nogil:
    # x + y - sum, exactly (TwoSum, Knuth).
    cdef float rest = sum - x
    return (x - (sum - rest)) + (y - rest)


cdef void leave_rest(float *residual, const float *gradient, size_t n, const uint32_t *indices, const float *values,
                     size_t k) noexcept nogil:
    # residual += gradient where that is finite; at the ascending indices, whose sums are `values`, what rounding lost.
    cdef float errors[BLOCK]
    cdef size_t start = 0, here, chosen = 0, i
    cdef uint32_t at
    while start < n:
        here = 0
        while chosen + here < k and indices[chosen + here] < start + BLOCK:
            at = indices[chosen + here]
            errors[here] = rounding_error(residual[at], gradient[at], values[chosen + here])
            here += 1
        sieve.settle(residual + start, gradient + start, min(<size_t> BLOCK, n - start))
        for i in range(chosen, chosen + here):
            if is_finite(values[i]):
                residual[indices[i]] = errors[i - chosen]
        chosen += here
        start += BLOCK


cdef size_t absorb_top_k(float *residual, const float *gradient, size_t n, size_t k, uint32_t *indices, float *values,
                         size_t room) noexcept nogil:
    cdef Source source
    source.x, source.y, source.n = residual, gradient, n
    k = select(&source, k, indices, values, room)
    leave_rest(residual, gradient, n, indices, values, k)
    return k


cdef size_t absorb_chosen(float *residual, const float *gradient, size_t n, const uint32_t *indices, float *values,
                          size_t k) noexcept nogil:
    cdef float scratch[BLOCK]
    cdef size_t start = 0, here, wild = 0, j
    cdef Source source
    source.x, source.y, source.n = residual, gradient, n
    while start < n:
        here = min(<size_t> BLOCK, n - start)
        wild += sieve.count(read(&source, start, here, scratch), here, FC_KEY_INF - 1)
        start += here
    if wild == 0:
        for j in range(k):
            values[j] = residual[indices[j]] + gradient[indices[j]]
        leave_rest(residual, gradient, n, indices, values, k)
    return wild


cdef void settle_sent(float *residual, const float *gradient, const uint32_t *indices, const float *values,
                      const float *sent, size_t k) noexcept nogil:
    cdef size_t j
    cdef uint32_t at
    for j in range(k):
        at = indices[j]
        if not is_finite(values[j]):
            continue
        if is_finite(sent[j]):
            residual[at] = <float> (<double> residual[at] + (<double> values[j] - sent[j]))
        else:
            residual[at] = <float> (<double> values[j] + residual[at] - gradient[at])


cdef inline bint all_below(const uint32_t *indices, size_t k, size_t n) noexcept nogil:
    cdef uint32_t outside = 0
    cdef size_t j
    if n > <size_t> 0xffffffff:
        return True
    for j in range(k):
        outside |= indices[j] >= <uint32_t> n
    return outside == 0


cdef int gather(const float *x, size_t n, const uint32_t *indices, size_t k, float *out) noexcept nogil:
    cdef size_t j
    if not all_below(indices, k, n):
        return ST_CORRUPT
    for j in range(k):
        (<uint32_t *> out)[j] = (<const uint32_t *> x)[indices[j]]      # as bits: a signalling NaN stays one
    return OK


cdef int scatter_add(float *out, size_t n, const uint32_t *indices, const float *values, size_t k) noexcept nogil:
    cdef size_t j
    cdef float total
    if not all_below(indices, k, n):
        return ST_CORRUPT
    for j in range(k):
        total = out[indices[j]] + values[j]
        out[indices[j]] = total
        if total != total:
            (<uint32_t *> out)[indices[j]] = FC_NAN_BITS
    return OK


cdef size_t draw_indices(size_t n, uint64_t chances, uint64_t key, uint32_t first, uint32_t *indices,
                         size_t room) noexcept nogil:
    if chances == 0:
        return 0
    return sieve.draw(first, n, <uint32_t> key, <uint32_t> (key >> 32), <uint32_t> (chances - 1), indices, room)


def isa():
    """Name of the instruction set in use: "sse2", "avx2", "avx512"; on arm64 "neon"; "generic" elsewhere."""
    return fc_sieve_name(level).decode()


def _force_isa(name=None):
    """Use the named instruction set, or the best one again; ValueError if this machine lacks it. For tests, benches."""
    global level, sieve
    names = [fc_sieve_name(one).decode() for one in range(best + 1)]
    level = best if name is None else names.index(name)
    sieve = fc_sieve_of(level)


cdef size_t check_sizes(Py_ssize_t n, Py_ssize_t k, Py_ssize_t num_indices, Py_ssize_t num_values) except? 0:
    if n > <Py_ssize_t> 0xffffffff:
        raise ShapeError(f"indices are 32 bits wide: at most {0xffffffff} elements, got {n}")
    if k < 0:
        raise ShapeError(f"k must be >= 0, got {k}")
    if min(num_indices, num_values) < min(k, n):
        raise ShapeError(f"{min(k, n)} results do not fit into {num_indices} indices and {num_values} values")
    return min(num_indices, num_values)


cdef check_apart(const void *a, size_t a_bytes, const void *b, size_t b_bytes):
    if a_bytes and b_bytes and <uintptr_t> a < <uintptr_t> b + b_bytes and <uintptr_t> b < <uintptr_t> a + a_bytes:
        raise ShapeError("buffers overlap")


def room_for(Py_ssize_t n, Py_ssize_t k):
    """Elements of `indices` and `values` with which `top_k` and `absorb` are fastest; never less than min(k, n)."""
    return top_k_room(max(n, 0), max(k, 0))


def top_k(const float[::1] x, Py_ssize_t k, uint32_t[::1] indices, float[::1] values):
    """Find the k largest |x|, the lowest index first among equals; return how many: min(k, n). GIL released.

    Args:    x: (n,) float32, n < 2^32, left as it was. A NaN counts as larger than Inf.
             indices, values: (>= min(k, n),) uint32 and float32, no overlap with anything: the result in ascending
             order of index; what lies behind it is scratch. With room_for(n, k) elements x is read once.
    Raises:  ShapeError for sizes that break the above, or overlap; ValueError for another dtype or layout.
    """
    cdef size_t room = check_sizes(x.shape[0], k, indices.shape[0], values.shape[0]), n = x.shape[0]
    check_apart(&x[0], n * 4, &indices[0], room * 4)
    check_apart(&x[0], n * 4, &values[0], room * 4)
    check_apart(&indices[0], room * 4, &values[0], room * 4)
    with nogil:
        n = select_top_k(&x[0], n, k, &indices[0], &values[0], room)
    return n


def absorb(float[::1] residual, const float[::1] gradient, Py_ssize_t k, uint32_t[::1] indices, float[::1] values):
    """top_k of residual + gradient into indices and values; the residual keeps what is not chosen. GIL released.

    The sum is rounded once, to float32. Where it is chosen, the residual becomes what that rounding left over, so that
    value + residual is the exact sum; elsewhere it becomes the sum. Where the sum is no finite number, the residual
    stays as it was: after a step that has to be skipped, it is still good.

    Args:    residual, gradient: (n,) float32, the same n.  indices, values: as for top_k.
    Returns: min(k, n).
    Raises:  as top_k.
    """
    cdef size_t room = check_sizes(residual.shape[0], k, indices.shape[0], values.shape[0]), n = residual.shape[0]
    if gradient.shape[0] != residual.shape[0]:
        raise ShapeError(f"residual has {residual.shape[0]} elements, gradient {gradient.shape[0]}")
    check_apart(&residual[0], n * 4, &gradient[0], n * 4)
    check_apart(&residual[0], n * 4, &indices[0], room * 4)
    check_apart(&residual[0], n * 4, &values[0], room * 4)
    check_apart(&gradient[0], n * 4, &indices[0], room * 4)
    check_apart(&gradient[0], n * 4, &values[0], room * 4)
    check_apart(&indices[0], room * 4, &values[0], room * 4)
    with nogil:
        n = absorb_top_k(&residual[0], &gradient[0], n, k, &indices[0], &values[0], room)
    return n


def absorb_at(float[::1] residual, const float[::1] gradient, const uint32_t[::1] indices, float[::1] values):
    """As absorb, at indices that the caller has chosen; return how many sums are not finite. GIL released.

    With such a sum, anywhere, nothing is changed: a step that has to be skipped must say so, and the caller see to it.

    Args:    residual, gradient: (n,) float32.  indices: (k,) uint32, strictly ascending.  values: (k,) float32.
    Raises:  ShapeError when indices do not ascend or are not below n, or for sizes or overlap; ValueError for dtypes.
    """
    cdef size_t n = residual.shape[0], k = indices.shape[0], j
    if gradient.shape[0] != residual.shape[0]:
        raise ShapeError(f"residual has {residual.shape[0]} elements, gradient {gradient.shape[0]}")
    if values.shape[0] != indices.shape[0]:
        raise ShapeError(f"{indices.shape[0]} indices, but room for {values.shape[0]} values")
    for j in range(1, k):
        if indices[j - 1] >= indices[j]:
            raise ShapeError("indices must ascend strictly")
    if k and indices[k - 1] >= n:
        raise ShapeError(f"an index is not below {n}")
    check_apart(&residual[0], n * 4, &gradient[0], n * 4)
    check_apart(&values[0], k * 4, &residual[0], n * 4)
    check_apart(&values[0], k * 4, &gradient[0], n * 4)
    check_apart(&values[0], k * 4, &indices[0], k * 4)
    with nogil:
        n = absorb_chosen(&residual[0], &gradient[0], n, &indices[0], &values[0], k)
    return n


def settle(float[::1] residual, const float[::1] gradient, const uint32_t[::1] indices, const float[::1] values,
           const float[::1] sent):
    """After absorb, when what is sent differs from `values`: residual[indices] += values - sent. GIL released.

    Where `sent` is no finite number although the value was one (float16 overflows), the residual becomes again what it
    was before absorb.

    Args:    residual, gradient, indices, values: (n,), (n,), (k,), (k,), as absorb left them.  sent: (k,) float32.
    Raises:  ShapeError when an index is not below n, or sizes differ, and nothing was written; ValueError for dtypes.
    """
    cdef size_t n = residual.shape[0], k = indices.shape[0]
    if gradient.shape[0] != residual.shape[0]:
        raise ShapeError(f"residual has {residual.shape[0]} elements, gradient {gradient.shape[0]}")
    if values.shape[0] != indices.shape[0] or sent.shape[0] != indices.shape[0]:
        raise ShapeError(f"{indices.shape[0]} indices, but {values.shape[0]} values and {sent.shape[0]} sent")
    if not all_below(&indices[0], k, n):
        raise ShapeError(f"an index is not below {n}")
    with nogil:
        settle_sent(&residual[0], &gradient[0], &indices[0], &values[0], &sent[0], k)


def threshold(const float[::1] x, Py_ssize_t k):
    """(magnitude of the k-th largest |x|, how many of exactly that magnitude are among the k largest). GIL released.

    Args:    x: (n,) float32; 1 <= k <= n. The magnitude is NaN when it belongs to a NaN.
    Raises:  ShapeError for another k; ValueError for another dtype or layout.
    """
    cdef Source source
    cdef fc_cut cut
    cdef uint32_t low, high, bits
    cdef float magnitude
    cdef size_t n = x.shape[0]
    if not 1 <= k <= x.shape[0]:
        raise ShapeError(f"k must be in 1..{x.shape[0]}, got {k}")
    source.x, source.y, source.n = &x[0], NULL, n
    with nogil:
        bracket(&source, k, &low, &high)
        find_cut(&source, k, low, high, &cut)
    bits = <uint32_t> cut.floor if cut.floor != FC_KEY_NAN else FC_NAN_BITS
    memcpy(&magnitude, &bits, 4)
    return magnitude, cut.ties


def count_above(const float[::1] x, float magnitude):
    """How many |x| are larger than `magnitude`, NaNs among them. GIL released.

    Args:    x: (n,) float32.  magnitude: >= 0, not NaN.
    Raises:  ShapeError for another magnitude; ValueError for another dtype or layout.
    """
    cdef int32_t key
    cdef size_t n = x.shape[0]
    if not magnitude >= 0:
        raise ShapeError(f"a magnitude is >= 0, got {magnitude}")
    memcpy(&key, &magnitude, 4)
    key &= 0x7fffffff                                       # -0.0 >= 0, too
    with nogil:
        n = sieve.count(<const uint32_t *> &x[0], n, key)
    return n


def draw_key(uint64_t seed, uint64_t step):
    """The key under which `draw` chooses in this step: any two (seed, step) have keys as good as independent."""
    return mix(mix(seed) + step)


def draw(Py_ssize_t n, double probability, uint64_t key, uint32_t[::1] indices, uint32_t first=0):
    """Write ascending indices below n, each chosen with `probability`, and return how many. GIL released.

    Whether i is chosen depends on (probability, key, first + i) alone: ranks that agree on these choose the same, and
    the pieces of an array, each with its own `first`, choose as the whole. The probability is rounded to a multiple of
    2^-32. Once `indices` is full, the rest is left out.

    Raises:  ShapeError for n outside 0..2^32-1 or a probability outside 0..1; ValueError for another dtype or layout.
    """
    cdef size_t num, room = indices.shape[0]
    cdef uint64_t chances
    if not 0 <= n <= <Py_ssize_t> 0xffffffff:
        raise ShapeError(f"n must be in 0..{0xffffffff}, got {n}")
    if not 0 <= probability <= 1:
        raise ShapeError(f"a probability lies in 0..1, got {probability}")
    chances = <uint64_t> (probability * 4294967296.0 + 0.5)
    with nogil:
        num = draw_indices(n, chances, key, first, &indices[0], room)
    return num


def gather_values(const float[::1] x, const uint32_t[::1] indices, float[::1] out):
    """out[j] = x[indices[j]], bit by bit. GIL released.

    Raises:  ShapeError when an index is not below n, or sizes differ, and nothing was written; ValueError for dtypes.
    """
    cdef size_t n = x.shape[0], k = indices.shape[0]
    cdef int rc
    if out.shape[0] != indices.shape[0]:
        raise ShapeError(f"{indices.shape[0]} indices, but room for {out.shape[0]} values")
    check_apart(&out[0], k * 4, &x[0], n * 4)
    check_apart(&out[0], k * 4, &indices[0], k * 4)
    with nogil:
        rc = gather(&x[0], n, &indices[0], k, &out[0])
    if rc != OK:
        raise ShapeError(f"an index is not below {n}")


def add_values(float[::1] out, const uint32_t[::1] indices, const float[::1] values):
    """out[indices[j]] += values[j], one after the other; an index may come twice. GIL released.

    Raises:  ShapeError when an index is not below n, or sizes differ, and nothing was written; ValueError for dtypes.
    """
    cdef size_t n = out.shape[0], k = indices.shape[0]
    cdef int rc
    if values.shape[0] != indices.shape[0]:
        raise ShapeError(f"{indices.shape[0]} indices, but {values.shape[0]} values")
    check_apart(&out[0], n * 4, &indices[0], k * 4)
    check_apart(&out[0], n * 4, &values[0], k * 4)
    with nogil:
        rc = scatter_add(&out[0], n, &indices[0], &values[0], k)
    if rc != OK:
        raise ShapeError(f"an index is not below {n}")


def put_values(float[::1] out, const uint32_t[::1] indices, const float[::1] values):
    """out = 0; out[indices[j]] = values[j], bit by bit. GIL released.

    Raises:  ShapeError when an index is not below n, or sizes differ, and nothing was written; ValueError for dtypes.
    """
    cdef size_t n = out.shape[0], k = indices.shape[0], j
    cdef uint32_t *words = <uint32_t *> &out[0]
    cdef bint fits
    if values.shape[0] != indices.shape[0]:
        raise ShapeError(f"{indices.shape[0]} indices, but {values.shape[0]} values")
    check_apart(&out[0], n * 4, &indices[0], k * 4)
    check_apart(&out[0], n * 4, &values[0], k * 4)
    with nogil:
        fits = all_below(&indices[0], k, n)
        if fits:
            memset(words, 0, n * 4)
            for j in range(k):
                words[indices[j]] = (<const uint32_t *> &values[0])[j]
    if not fits:
        raise ShapeError(f"an index is not below {n}")
