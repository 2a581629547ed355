// C1: float16 and bfloat16 <-> float32, in vectors, for every instruction set.
//
// Included by reduce, cast and quantize (against the usual rule of one includer): a sum and a cast that disagreed in
// one rounding would break bit identity between ranks, so there is one text of each conversion.
//
// Every path gives the same bits: round to nearest even, denormals kept (also under FTZ/DAZ: no step below meets a
// float32 denormal that it may lose), overflow to Inf, NaN quieted with its sign and upper payload kept.
#ifndef FC_HALF_H
#define FC_HALF_H

#include "fc_isa.h"

// Buffers come from anywhere, and scratch blocks serve several types.
typedef float __attribute__((may_alias)) fc_f32;
typedef double __attribute__((may_alias)) fc_f64;
typedef uint16_t __attribute__((may_alias)) fc_half;

// Clang sees that comparing widened halves is comparing halves, and does that one by one: MIN ran at a twentieth.
#if defined(__clang__)
#define FC_STAY_WIDE(where, v) __asm__("" : "+" where(v))
#else
#define FC_STAY_WIDE(where, v) (void)(v)
#endif

#define FC_ISA(name) fc_base_##name
#define FC_LEVEL 0
#include "fc_half_body.h"
#undef FC_ISA
#undef FC_LEVEL

#if defined(FC_X86)
FC_TARGET_BEGIN(FC_ISA_AVX2)
#define FC_ISA(name) fc_avx2_##name
#define FC_LEVEL 1
#include "fc_half_body.h"
#undef FC_ISA
#undef FC_LEVEL
FC_TARGET_END
#endif

#endif
