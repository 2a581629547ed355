// C1: the loops behind sparsify.pyx, once per instruction set. Oracle: tests/fleetcore/kernels/test_sparsify.py.
//
// float32 values travel as their bits. Elements are ranked by a key, the bits without the sign: for numbers the order
// of |x|. Every NaN has one key, above that of Inf.
#ifndef FC_SPARSIFY_H
#define FC_SPARSIFY_H

#include "fc_isa.h"

typedef float __attribute__((may_alias)) fc_f32;
typedef uint32_t __attribute__((may_alias)) fc_u32;

enum { FC_KEY_INF = 0x7f800000, FC_KEY_NAN = 0x7f800001, FC_KEY_END = 0x7f800002 };
#define FC_NAN_BITS 0x7fc00000u  // the one NaN that our arithmetic makes (fc_reduce.h)
enum { FC_SIEVE_SLACK = 16 };        // lanes that packing may write past what it keeps

typedef struct {
    int32_t floor;    // keep what has a key above it, -1 for everything,
    size_t ties;      // and the first so many whose key equals it; counts down
} fc_cut;

typedef struct {
    size_t (*take)(const fc_u32 *x, size_t n, uint32_t first, fc_cut *cut, fc_u32 *idx, fc_u32 *val, size_t room);
    size_t (*sift)(fc_u32 *idx, fc_u32 *val, size_t n, fc_cut *cut);
    void (*add)(fc_f32 *out, const fc_f32 *x, const fc_f32 *y, size_t n);
    void (*settle)(fc_f32 *x, const fc_f32 *y, size_t n);
    size_t (*within)(const fc_u32 *x, size_t n, uint32_t low, uint32_t width, fc_u32 *out);
    size_t (*count)(const fc_u32 *x, size_t n, int32_t floor);
    size_t (*draw)(uint32_t first, size_t n, uint32_t key0, uint32_t key1, uint32_t last, fc_u32 *idx, size_t room);
} fc_sieve;

// Three levels: packing the lanes of a mask is one instruction of AVX-512, a table look-up in AVX2, and has no cheap
// form in SSE2, where one element a step without a branch is faster.
enum { FC_SIEVE_BASE, FC_SIEVE_AVX2, FC_SIEVE_AVX512, FC_SIEVE_LEVELS };

// The lanes of each mask of 8, packed; filled once, when sparsify.pyx is imported.
static uint8_t fc_sieve_lanes[256][8];

static void fc_sieve_fill(void)
{
    for (unsigned mask = 0; mask < 256; mask++) {
        unsigned count = 0;
        for (unsigned lane = 0; lane < 8; lane++) if (mask >> lane & 1u) fc_sieve_lanes[mask][count++] = (uint8_t)lane;
    }
}

FC_INLINE unsigned fc_lowest(unsigned mask, size_t most)  // the lowest `most` of the bits of mask
{
    unsigned kept = 0;
    for (; most && mask; most--, mask &= mask - 1) kept |= mask & (0u - mask);
    return kept;
}

#define FC_ISA(name) fc_sieve_base_##name
#define FC_LEVEL 0
#include "fc_sparsify_body.h"
#undef FC_ISA
#undef FC_LEVEL

#if defined(FC_X86)
FC_TARGET_BEGIN("avx2,popcnt")
#define FC_ISA(name) fc_sieve_avx2_##name
#define FC_LEVEL 1
#include "fc_sparsify_body.h"
#undef FC_ISA
#undef FC_LEVEL
FC_TARGET_END

FC_TARGET_BEGIN("avx512f,avx2,popcnt")
#define FC_ISA(name) fc_sieve_avx512_##name
#define FC_LEVEL 2
#include "fc_sparsify_body.h"
#undef FC_ISA
#undef FC_LEVEL
FC_TARGET_END
#endif

static const char *fc_sieve_name(int level)
{
    return level == FC_SIEVE_AVX512 ? "avx512" : level == FC_SIEVE_AVX2 ? "avx2" : fc_level_name(FC_BASE);
}

static int fc_sieve_best(void)
{
#if defined(FC_X86)
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("popcnt")) return FC_SIEVE_BASE;
    return __builtin_cpu_supports("avx512f") ? FC_SIEVE_AVX512 : FC_SIEVE_AVX2;
#else
    return FC_SIEVE_BASE;
#endif
}

static const fc_sieve *fc_sieve_of(int level)
{
#if defined(FC_X86)
    if (level == FC_SIEVE_AVX512) return &fc_sieve_avx512_loops;
    if (level == FC_SIEVE_AVX2) return &fc_sieve_avx2_loops;
#endif
    return &fc_sieve_base_loops;
}

#endif
