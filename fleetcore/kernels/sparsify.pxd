# C1: which elements of a gradient are sent, and how sparse parts are added up. The same bits on every instruction set.
from libc.stddef cimport size_t
from libc.stdint cimport uint32_t, uint64_t

cdef size_t top_k_room(size_t n, size_t k) noexcept nogil
# Elements of indices and values with which select_top_k reads x once, almost surely; >= min(k, n).

cdef size_t select_top_k(const float *x, size_t n, size_t k, uint32_t *indices, float *values,
                         size_t room) noexcept nogil
# The k elements with the largest |x|: ascending indices, and the values bit by bit. Among equals the lowest index
# wins. Every NaN is larger than Inf and equal to every other, so that none is left behind unseen. min(k, n) <= room,
# n < 2^32. Beyond the result, indices and values are scratch up to room. No overlap. Returns min(k, n).

cdef size_t absorb_top_k(float *residual, const float *gradient, size_t n, size_t k, uint32_t *indices, float *values,
                         size_t room) noexcept nogil
# select_top_k of residual + gradient, rounded to float32 (a NaN becomes the one quiet NaN), both untouched until that
# is done. Then, where the sum is finite, residual = sum, or what its rounding left over where it was selected.

cdef size_t absorb_chosen(float *residual, const float *gradient, size_t n, const uint32_t *indices, float *values,
                          size_t k) noexcept nogil
# The same for k strictly ascending indices below n that the caller has chosen, when every sum is finite. Returns how
# many are not; then nothing was changed.

cdef void settle_sent(float *residual, const float *gradient, const uint32_t *indices, const float *values,
                      const float *sent, size_t k) noexcept nogil
# After absorb_top_k: residual[indices] += values - sent, rounded once; what it was before absorb_top_k where `sent` is
# not finite although the value is.

cdef int gather(const float *x, size_t n, const uint32_t *indices, size_t k, float *out) noexcept nogil
# out[j] = x[indices[j]]. Returns OK; ST_CORRUPT, with nothing written, when an index is not below n.

cdef int scatter_add(float *out, size_t n, const uint32_t *indices, const float *values, size_t k) noexcept nogil
# out[indices[j]] += values[j], in order; an index may come twice. A NaN becomes the one quiet NaN. Returns as gather.

cdef size_t draw_indices(size_t n, uint64_t chances, uint64_t key, uint32_t first, uint32_t *indices,
                         size_t room) noexcept nogil
# Ascending indices i < n, each there with probability chances / 2^32, as a function of (key, first + i) alone; at most
# room of them. 0 <= chances <= 2^32; n < 2^32. Returns how many.
