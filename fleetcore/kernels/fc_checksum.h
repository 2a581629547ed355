// C1: CRC32C for every instruction set. Oracle: tests/fleetcore/kernels/test_checksum.py.
//
// Bits are reflected throughout: bit 31 of a state is x^0. A state is moved past n bytes by multiplying it with
// x^8n mod P, so streams that ran side by side can be joined. Every constant below is a power x^m mod P:
//     a = 1 << 31; m times: a = (a >> 1) ^ (0x82f63b78 if a & 1 else 0)
// A carry-less product of two reflected numbers comes out one bit low, and the CRC instruction multiplies what it reads
// by x^32: hence the 33 in the exponents (Gopal et al. 2009, Fast CRC Computation Using PCLMULQDQ).
#ifndef FC_CHECKSUM_H
#define FC_CHECKSUM_H

#include "fc_isa.h"

#if defined(FC_ARM64) && defined(__linux__)
#include <sys/auxv.h>
#endif

typedef uint32_t (*fc_crc)(uint32_t state, const uint8_t *p, size_t n);

enum { FC_CRC_TABLE, FC_CRC_INSTRUCTION, FC_CRC_FOLDING, FC_CRC_LEVELS };

// Plain C: eight bytes a step (slicing by 8). The table is filled once, when checksum.pyx is imported.

static uint32_t fc_crc_slices[8][256];

static void fc_crc_fill(void)
{
    for (uint32_t byte = 0; byte < 256; byte++) {
        uint32_t state = byte;
        for (int bit = 0; bit < 8; bit++) state = state >> 1 ^ (0x82f63b78u & (0u - (state & 1u)));
        fc_crc_slices[0][byte] = state;
    }
    for (int slice = 1; slice < 8; slice++) {
        for (uint32_t byte = 0; byte < 256; byte++) {
            uint32_t before = fc_crc_slices[slice - 1][byte];
            fc_crc_slices[slice][byte] = before >> 8 ^ fc_crc_slices[0][before & 0xffu];
        }
    }
}

FC_INLINE uint64_t fc_load_u64(const uint8_t *p)
{
    uint64_t word;
    memcpy(&word, p, sizeof word);
    return word;
}

static uint32_t fc_crc_table(uint32_t state, const uint8_t *p, size_t n)
{
    for (; n >= 8; n -= 8, p += 8) {
        uint64_t word = fc_load_u64(p) ^ state;
        state = 0;
        for (int slice = 0; slice < 8; slice++) state ^= fc_crc_slices[7 - slice][word >> 8 * slice & 0xffu];
    }
    for (; n; n--) state = state >> 8 ^ fc_crc_slices[0][(state ^ *p++) & 0xffu];
    return state;
}

// The CRC instruction takes 3 cycles but starts every cycle: three streams at once. WORD and BYTE advance a state, JOIN
// moves `one` past two stretches, `two` past one, and adds them to `three`.

#define FC_CRC_THREE(STRETCH, JOIN)                                                                                    \
    for (; n >= 3 * (STRETCH); n -= 3 * (STRETCH), p += 3 * (STRETCH)) {                                               \
        uint64_t one = state, two = 0, three = 0;                                                                      \
        for (size_t i = 0; i < (STRETCH); i += 8) {                                                                    \
            one = FC_CRC_WORD(one, fc_load_u64(p + i));                                                                \
            two = FC_CRC_WORD(two, fc_load_u64(p + (STRETCH) + i));                                                    \
            three = FC_CRC_WORD(three, fc_load_u64(p + 2 * (STRETCH) + i));                                            \
        }                                                                                                              \
        state = JOIN;                                                                                                  \
    }

#define FC_CRC_REST                                                                                                    \
    for (; n >= 8; n -= 8, p += 8) state = FC_CRC_WORD(state, fc_load_u64(p));                                         \
    for (; n; n--) state = FC_CRC_BYTE(state, *p++);                                                                   \
    return (uint32_t)state;

#if defined(FC_X86)

FC_TARGET_BEGIN("sse4.2,pclmul")

#define FC_CRC_WORD(state, word) _mm_crc32_u64(state, word)
#define FC_CRC_BYTE(state, byte) _mm_crc32_u8((uint32_t)(state), byte)

// `past_two`, `past_one`: x^(8n - 33) for n of two stretches and of one
FC_INLINE uint64_t fc_crc_join(uint64_t one, uint64_t two, uint64_t three, uint32_t past_two, uint32_t past_one)
{
    __m128i factors = _mm_set_epi64x(past_one, past_two);
    __m128i a = _mm_clmulepi64_si128(_mm_cvtsi64_si128((long long)one), factors, 0x00);
    __m128i b = _mm_clmulepi64_si128(_mm_cvtsi64_si128((long long)two), factors, 0x10);
    return three ^ _mm_crc32_u64(0, (uint64_t)_mm_cvtsi128_si64(_mm_xor_si128(a, b)));
}

// Stretches: 2048 bytes make the join (some 12 cycles) vanish; 128 serve what is left and short frames.
static uint32_t fc_crc_sse42(uint32_t seed, const uint8_t *p, size_t n)
{
    uint64_t state = seed;
    FC_CRC_THREE(2048, fc_crc_join(one, two, three, 0x82f89c77u, 0xa51b6135u))
    FC_CRC_THREE(128, fc_crc_join(one, two, three, 0xb9e02b86u, 0x0d3b6092u))
    FC_CRC_REST
}

#undef FC_CRC_WORD
#undef FC_CRC_BYTE

FC_TARGET_END

FC_TARGET_BEGIN("sse4.2,pclmul,avx512f,avx512dq,vpclmulqdq")

FC_INLINE __m512i fc_crc_fold(__m512i v, __m512i factors, __m512i next)
{
    // imm 0x96: exclusive or of all three
    return _mm512_ternarylogic_epi64(_mm512_clmulepi64_epi128(v, factors, 0x00),
                                     _mm512_clmulepi64_epi128(v, factors, 0x11), next, 0x96);
}

// The first eight bytes of a lane are its higher half. To move a lane n bytes on: x^(8n + 31) for them, x^(8n - 33) for
// the other eight.
static uint32_t fc_crc_avx512(uint32_t seed, const uint8_t *p, size_t n)
{
    if (n < 512) return fc_crc_sse42(seed, p, n);
    const __m512i by256 = _mm512_broadcast_i64x2(_mm_set_epi64x(0xb9e02b86, 0xdcb17aa4));
    const __m512i by64 = _mm512_broadcast_i64x2(_mm_set_epi64x(0x9e4addf8, 0x740eef02));
    const __m512i by48_32_16 = _mm512_set_epi64(0, 0, 0x493c7d27, 0xf20c0dfe, 0xba4fc28e, 0x3da6d0cb,
                                                0xddc0152b, 0x1c291d04);
    __m512i a = _mm512_xor_si512(_mm512_loadu_si512(p), _mm512_zextsi128_si512(_mm_cvtsi32_si128((int)seed)));
    __m512i b = _mm512_loadu_si512(p + 64), c = _mm512_loadu_si512(p + 128), d = _mm512_loadu_si512(p + 192);
    for (p += 256, n -= 256; n >= 256; p += 256, n -= 256) {
        a = fc_crc_fold(a, by256, _mm512_loadu_si512(p));
        b = fc_crc_fold(b, by256, _mm512_loadu_si512(p + 64));
        c = fc_crc_fold(c, by256, _mm512_loadu_si512(p + 128));
        d = fc_crc_fold(d, by256, _mm512_loadu_si512(p + 192));
    }
    a = fc_crc_fold(fc_crc_fold(fc_crc_fold(a, by64, b), by64, c), by64, d);
    for (; n >= 64; p += 64, n -= 64) a = fc_crc_fold(a, by64, _mm512_loadu_si512(p));
    __m128i last = _mm512_extracti64x2_epi64(a, 3);
    a = fc_crc_fold(a, by48_32_16, _mm512_setzero_si512());
    __m128i lane = _mm_xor_si128(_mm_xor_si128(_mm512_castsi512_si128(a), _mm512_extracti64x2_epi64(a, 1)),
                                 _mm_xor_si128(_mm512_extracti64x2_epi64(a, 2), last));
    uint64_t state = _mm_crc32_u64(0, (uint64_t)_mm_cvtsi128_si64(lane));
    state = _mm_crc32_u64(state, (uint64_t)_mm_extract_epi64(lane, 1));
    return fc_crc_sse42((uint32_t)state, p, n);
}

FC_TARGET_END

#elif defined(FC_ARM64)

// In assembly, because compilers offer the intrinsics only under -march; what the machine has decides.
FC_INLINE uint64_t fc_crc_word(uint64_t state, uint64_t word)
{
    uint32_t next;
    __asm__(".arch_extension crc\n\tcrc32cx %w0, %w1, %x2" : "=r"(next) : "r"((uint32_t)state), "r"(word));
    return next;
}

FC_INLINE uint64_t fc_crc_byte(uint64_t state, uint8_t byte)
{
    uint32_t next;
    __asm__(".arch_extension crc\n\tcrc32cb %w0, %w1, %w2" : "=r"(next) : "r"((uint32_t)state), "r"((uint32_t)byte));
    return next;
}

#define FC_CRC_WORD(state, word) fc_crc_word(state, word)
#define FC_CRC_BYTE(state, byte) fc_crc_byte(state, byte)

// state * power mod P. About 100 cycles, which the stretches below outweigh; PMULL is not on every machine.
static uint32_t fc_crc_times(uint32_t state, uint32_t power)
{
    uint32_t product = 0;
    for (; power; power <<= 1) {
        product ^= state & (0u - (power >> 31));
        state = state >> 1 ^ (0x82f63b78u & (0u - (state & 1u)));
    }
    return product;
}

#define FC_CRC_JOIN(past_two, past_one) \
    (three ^ fc_crc_times((uint32_t)one, past_two) ^ fc_crc_times((uint32_t)two, past_one))

static uint32_t fc_crc_arm64(uint32_t seed, const uint8_t *p, size_t n)
{
    uint64_t state = seed;
    FC_CRC_THREE(8192, FC_CRC_JOIN(0xbf455269u, 0x28461564u))
    FC_CRC_THREE(1024, FC_CRC_JOIN(0x0d65762au, 0xe4172b16u))
    FC_CRC_REST
}

#endif

static int fc_crc_best(void)
{
#if defined(FC_X86)
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("sse4.2") || !__builtin_cpu_supports("pclmul")) return FC_CRC_TABLE;
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("vpclmulqdq") ? FC_CRC_FOLDING : FC_CRC_INSTRUCTION;
#elif defined(FC_ARM64) && defined(__APPLE__)
    return FC_CRC_INSTRUCTION;
#elif defined(FC_ARM64) && defined(__linux__)
    return getauxval(AT_HWCAP) & 1ul << 7 ? FC_CRC_INSTRUCTION : FC_CRC_TABLE;  // HWCAP_CRC32
#else
    return FC_CRC_TABLE;
#endif
}

static const char *fc_crc_name(int level)
{
#if defined(FC_X86)
    return level == FC_CRC_FOLDING ? "avx512" : level == FC_CRC_INSTRUCTION ? "sse4.2" : "table";
#else
    return level == FC_CRC_INSTRUCTION ? "crc" : "table";
#endif
}

static fc_crc fc_crc_of(int level)
{
#if defined(FC_X86)
    if (level == FC_CRC_FOLDING) return fc_crc_avx512;
    if (level == FC_CRC_INSTRUCTION) return fc_crc_sse42;
#elif defined(FC_ARM64)
    if (level == FC_CRC_INSTRUCTION) return fc_crc_arm64;
#endif
    return fc_crc_table;
}

#endif
