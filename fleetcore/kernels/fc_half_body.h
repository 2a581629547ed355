// C1: the conversions of one instruction set. Included by fc_half.h once per level, with FC_ISA(name) and FC_LEVEL.
//
// Two vectors of float32 hold one vector of halves. Where that takes no shuffle, they hold its even and odd elements: a
// reduction does not mind, and casts put them in order.

#if FC_LEVEL == 1
#define FC_WIDTH 32
#else
#define FC_WIDTH 16
#endif

#define F32 FC_ISA(f32v)
#define U32 FC_ISA(u32v)
#define I32 FC_ISA(i32v)
#define PAIR FC_ISA(pair)

typedef float F32 __attribute__((vector_size(FC_WIDTH)));
typedef uint32_t U32 __attribute__((vector_size(FC_WIDTH)));
typedef int32_t I32 __attribute__((vector_size(FC_WIDTH)));
typedef struct { F32 a, b; } PAIR;
enum { FC_ISA(step) = FC_WIDTH / 2 };  // halves in a PAIR

FC_INLINE U32 FC_ISA(select)(U32 mask, U32 yes, U32 no)  // mask: all or no bits of each element
{
#if FC_LEVEL == 1
    return (U32)_mm256_blendv_epi8((__m256i)no, (__m256i)yes, (__m256i)mask);
#else
    return (mask & yes) | (~mask & no);
#endif
}

FC_INLINE U32 FC_ISA(load)(const void *p)
{
    U32 bits;
    memcpy(&bits, p, sizeof bits);
    return bits;
}

FC_INLINE void FC_ISA(store)(void *p, U32 bits) { memcpy(p, &bits, sizeof bits); }

// bfloat16: the upper half of a float32

FC_INLINE PAIR FC_ISA(load_bf16)(const fc_half *p)
{
    U32 bits = FC_ISA(load)(p);
    return (PAIR){(F32)(bits << 16), (F32)(bits & 0xffff0000u)};
}

// In integers, because VCVTNEPS2BF16 flushes denormals. The result is in the upper half. NaNs survive only with a lower
// half of zeros, as the one that reductions make.
FC_INLINE U32 FC_ISA(round_bf16)(F32 value)
{
    U32 bits = (U32)value;
    return bits + 0x7fffu + (bits >> 16 & 1u);
}

FC_INLINE U32 FC_ISA(quiet_bf16)(F32 value, U32 rounded)
{
    return FC_ISA(select)((U32)(value != value), (U32)value | 0x00400000u, rounded);
}

FC_INLINE void FC_ISA(store_calm_bf16)(fc_half *p, PAIR v)  // v holds no NaN but the canonical one
{
    FC_ISA(store)(p, FC_ISA(round_bf16)(v.a) >> 16 | (FC_ISA(round_bf16)(v.b) & 0xffff0000u));
}

FC_INLINE void FC_ISA(store_bf16)(fc_half *p, PAIR v)
{
    U32 even = FC_ISA(quiet_bf16)(v.a, FC_ISA(round_bf16)(v.a)), odd = FC_ISA(quiet_bf16)(v.b, FC_ISA(round_bf16)(v.b));
    FC_ISA(store)(p, even >> 16 | (odd & 0xffff0000u));
}

// float16: by the processor where it can (in memory order), else in integers (even and odd)

#if FC_LEVEL == 1
enum { FC_ISA(ordered_f16) = 1 };
FC_INLINE PAIR FC_ISA(load_f16)(const fc_half *p)
{
    const __m128i *q = (const __m128i *)p;
    __m256 a = _mm256_cvtph_ps(_mm_loadu_si128(q)), b = _mm256_cvtph_ps(_mm_loadu_si128(q + 1));
    FC_STAY_WIDE("x", a);
    FC_STAY_WIDE("x", b);
    return (PAIR){(F32)a, (F32)b};
}
FC_INLINE void FC_ISA(store_f16)(fc_half *p, PAIR v)
{
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph((__m256)v.a, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128((__m128i *)p + 1, _mm256_cvtps_ph((__m256)v.b, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(FC_ARM64)
enum { FC_ISA(ordered_f16) = 1 };
FC_INLINE PAIR FC_ISA(load_f16)(const fc_half *p)
{
    float16x8_t halves = vreinterpretq_f16_u32((uint32x4_t)FC_ISA(load)(p));
    float32x4_t a = vcvt_f32_f16(vget_low_f16(halves)), b = vcvt_f32_f16(vget_high_f16(halves));
    FC_STAY_WIDE("w", a);
    FC_STAY_WIDE("w", b);
    return (PAIR){(F32)a, (F32)b};
}
FC_INLINE void FC_ISA(store_f16)(fc_half *p, PAIR v)  // rounds as FPCR says, which is to nearest even
{
    float16x8_t halves = vcombine_f16(vcvt_f16_f32((float32x4_t)v.a), vcvt_f16_f32((float32x4_t)v.b));
    FC_ISA(store)(p, (U32)vreinterpretq_u32_f16(halves));
}
#else
enum { FC_ISA(ordered_f16) = 0 };
FC_INLINE F32 FC_ISA(up_f16)(U32 half)
{
    U32 sign = (half & 0x8000u) << 16, magnitude = half & 0x7fffu;
    U32 normal = (magnitude << 13) + 0x38000000u;                     // exponent bias 15 -> 127
    U32 tiny = (U32)((F32)(magnitude | 0x3f000000u) - 0.5f);          // 0.5 has an ulp of 2^-24: exact
    U32 special = magnitude << 13 | 0x7f800000u | ((U32)((I32)magnitude > 0x7c00) & 0x00400000u);
    U32 finite = FC_ISA(select)((U32)((I32)magnitude < 0x0400), tiny, normal);
    return (F32)(sign | FC_ISA(select)((U32)((I32)magnitude < 0x7c00), finite, special));
}
FC_INLINE U32 FC_ISA(down_f16)(F32 value)  // in the lower half
{
    U32 bits = (U32)value, sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    U32 is_tiny = (U32)((I32)magnitude < 0x38800000);
    U32 normal = (magnitude - 0x38000000u + 0x0fffu + (magnitude >> 13 & 1u)) >> 13;  // may carry into Inf
    U32 tiny = (U32)((F32)(magnitude & is_tiny) + 0.5f) - 0x3f000000u;                // the sum rounds to 2^-24
    U32 nan = (U32)((I32)magnitude > 0x7f800000);
    U32 special = 0x7c00u | (nan & (0x0200u | (magnitude >> 13 & 0x03ffu)));
    U32 finite = FC_ISA(select)(is_tiny, tiny, normal);
    return sign | FC_ISA(select)((U32)((I32)magnitude < 0x47800000), finite, special);
}
FC_INLINE PAIR FC_ISA(load_f16)(const fc_half *p)
{
    U32 bits = FC_ISA(load)(p);
    return (PAIR){FC_ISA(up_f16)(bits & 0xffffu), FC_ISA(up_f16)(bits >> 16)};
}
FC_INLINE void FC_ISA(store_f16)(fc_half *p, PAIR v)
{
    FC_ISA(store)(p, FC_ISA(down_f16)(v.a) | FC_ISA(down_f16)(v.b) << 16);
}
#endif

#undef F32
#undef U32
#undef I32
#undef PAIR
#undef FC_WIDTH
