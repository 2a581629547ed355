// C1: instruction sets: what kernels may be compiled for, and what this machine runs.
//
// Included by several .pyx (against the usual rule of one) because every kernel must agree on what a level means; it
// holds no loops and no state. No -march and no ifunc: each body is compiled once per level inside a target region,
// and the level is looked up once, when the module is imported.
#ifndef FC_ISA_H
#define FC_ISA_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#define FC_X86 1
#include <cpuid.h>
#include <immintrin.h>
#elif defined(__aarch64__)
#define FC_ARM64 1
#include <arm_neon.h>
#endif

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "frames and kernels assume a little-endian machine"
#endif

#define FC_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#pragma clang diagnostic ignored "-Wpass-failed"  // FC_LANES permits; a build without vectors (-O1) need not report it
#define FC_TARGET_BEGIN(isa) FC_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define FC_TARGET_END FC_PRAGMA(clang attribute pop)
#define FC_LANES FC_PRAGMA(clang loop vectorize(assume_safety) interleave(enable))
#else
#define FC_TARGET_BEGIN(isa) FC_PRAGMA(GCC push_options) FC_PRAGMA(GCC target(isa))
#define FC_TARGET_END FC_PRAGMA(GCC pop_options)
#define FC_LANES FC_PRAGMA(GCC ivdep)
#endif
// FC_LANES stands before a loop whose iterations are independent although a destination may be one of the sources:
// element i is read before it is written, by the same iteration, and by no other.

#define FC_INLINE static inline __attribute__((always_inline))

// FC_BASE is SSE2 on x86-64, NEON on arm64, else what the compiler makes of 16-byte vectors. Above it AVX2 with F16C.
// No AVX-512: from L2 outwards these loops wait for memory; on Zen 4 it gained nothing and lost a quarter on bytes.
enum { FC_BASE, FC_AVX2, FC_NUM_LEVELS };
#define FC_ISA_AVX2 "avx2,f16c"

static const char *fc_level_name(int level)
{
#if defined(FC_X86)
    return level == FC_AVX2 ? "avx2" : "sse2";
#elif defined(FC_ARM64)
    return "neon";
#else
    return "generic";
#endif
}

static int fc_best_level(void)
{
#if defined(FC_X86)
    unsigned a, b, c = 0, d;
    __builtin_cpu_init();
    // Clang before 19 rejects "f16c" in __builtin_cpu_supports; AVX2 already vouches for the saved register state.
    if (__builtin_cpu_supports("avx2") && __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C)) return FC_AVX2;
#endif
    return FC_BASE;
}

#endif
