// C1: the loops behind cast.pyx, once per instruction set; quantize, too, includes them for its feedback in halves.
// Oracle: tests/fleetcore/kernels/test_cast.py.
#ifndef FC_CAST_H
#define FC_CAST_H

#include "fc_half.h"

typedef void (*fc_widen)(fc_f32 *dst, const fc_half *src, size_t count);
typedef void (*fc_narrow)(fc_half *dst, const fc_f32 *src, size_t count);

typedef struct {
    fc_widen widen[2];    // float16, bfloat16
    fc_narrow narrow[2];
} fc_casts;

#if defined(__clang__)
#define FC_SHUFFLE(IV, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define FC_SHUFFLE(IV, a, b, ...) __builtin_shuffle(a, b, (IV){__VA_ARGS__})
#endif

#define FC_ISA(name) fc_base_##name
#define FC_LEVEL 0
#include "fc_cast_body.h"
#undef FC_ISA
#undef FC_LEVEL

#if defined(FC_X86)
FC_TARGET_BEGIN(FC_ISA_AVX2)
#define FC_ISA(name) fc_avx2_##name
#define FC_LEVEL 1
#include "fc_cast_body.h"
#undef FC_ISA
#undef FC_LEVEL
FC_TARGET_END
#endif

static const fc_casts *fc_casts_of(int level)
{
#if defined(FC_X86)
    if (level == FC_AVX2) return &fc_avx2_casts;
#endif
    return &fc_base_casts;
}

#endif
