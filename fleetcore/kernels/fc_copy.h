/* Streaming stores, which neither Cython nor a compiler's memcpy offers at this size. Included by copy.pyx alone. */
#ifndef FC_COPY_H
#define FC_COPY_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <emmintrin.h>

static void fc_copy_out(void *dst, const void *src, size_t nbytes) {
    char *to = (char *)dst;
    const char *from = (const char *)src;
    size_t head = (size_t)(-(uintptr_t)to & 63);
    if (nbytes < head + 64) {
        memcpy(to, from, nbytes);
        return;
    }
    memcpy(to, from, head);
    to += head; from += head; nbytes -= head;
    for (; nbytes >= 64; nbytes -= 64, to += 64, from += 64) {      /* whole lines, or they are read before written */
        __m128i a = _mm_loadu_si128((const __m128i *)from), b = _mm_loadu_si128((const __m128i *)(from + 16));
        __m128i c = _mm_loadu_si128((const __m128i *)(from + 32)), d = _mm_loadu_si128((const __m128i *)(from + 48));
        _mm_stream_si128((__m128i *)to, a);
        _mm_stream_si128((__m128i *)(to + 16), b);
        _mm_stream_si128((__m128i *)(to + 32), c);
        _mm_stream_si128((__m128i *)(to + 48), d);
    }
    _mm_sfence();                                                   /* streaming stores are not ordered by a release store */
    memcpy(to, from, nbytes);
}
#else
/* arm64 cores of the machines we know share a last-level cache; its streaming stores are hints that most ignore. */
static void fc_copy_out(void *dst, const void *src, size_t nbytes) { memcpy(dst, src, nbytes); }
#endif
#endif
