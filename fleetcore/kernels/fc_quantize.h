// C1: the loops behind quantize.pyx, once per instruction set. Oracle: tests/fleetcore/kernels/test_quantize.py.
//
// An encoding is one record per block of 256 elements: a float32 scale, then one plane for each power of two in the
// number of bits, widest first (6 bits: a plane of the low 4 bits, one of the next 2). A plane of w bits is `rows`
// 32-bit words; word j holds element j + rows * c in bits w * c and up: neighbours in memory lie in neighbouring words,
// so a vector of any width packs and unpacks without a shuffle. rows is 8 for each 256 bits of the plane, begun ones too,
// so a last, shorter block is padded with zeros to whole vectors and not beyond.
//
// Every instruction set gives the same bits: sums have one order, the largest magnitude has none, nothing is fused.
#ifndef FC_QUANTIZE_H
#define FC_QUANTIZE_H

#include "fc_cast.h"

// 256: int8 takes 25.4 % of float32, int4 12.9 %, sign 3.5 %; half as many would cost sign 0.4 % more. In L1 with room.
enum { FC_BLOCK = 256, FC_CODE_SIGN = 1, FC_CODE_INT8 = 8, FC_CODE_FP8 = 9, FC_NUM_CODES = 10 };

typedef struct {
    int stochastic;    // round up with the probability that makes the expectation exact, instead of to nearest even
    uint64_t key;      // what the random numbers are a function of, together with the number of the block
    uint64_t block;    // number of the first block
} fc_rounding;

typedef void (*fc_encode)(uint8_t *out, const fc_f32 *src, size_t count, const fc_rounding *how);
typedef void (*fc_encode_feedback)(uint8_t *out, const fc_f32 *grad, fc_f32 *residual, size_t count,
                                   const fc_rounding *how);
typedef void (*fc_decode)(fc_f32 *dst, const uint8_t *data, size_t count);
typedef void (*fc_decode_add)(fc_f32 *dst, const uint8_t *data, size_t count, float weight);
typedef void (*fc_half_feedback)(fc_half *out, const fc_f32 *grad, fc_f32 *residual, size_t count);
typedef void (*fc_settle)(const fc_f32 *grad, fc_f32 *residual, const fc_f32 *sent, size_t count);

typedef struct {
    fc_encode encode[FC_NUM_CODES];                      // [0] is not used: a code below FP8 is its number of bits
    fc_encode_feedback encode_feedback[FC_NUM_CODES];
    fc_decode decode[FC_NUM_CODES];
    fc_decode_add decode_add[FC_NUM_CODES];
    fc_half_feedback half_feedback[2];                   // float16, bfloat16
    fc_settle settle;
} fc_quantizers;

FC_INLINE int fc_code_bits(int code) { return code == FC_CODE_FP8 ? 8 : code; }
FC_INLINE size_t fc_plane_rows(int width, size_t count) { return 8 * ((count * (size_t)width + 255) / 256); }

FC_INLINE size_t fc_record_bytes(int bits, size_t count)  // of a block of 1 .. 256 elements
{
    size_t words = 1;
    for (int width = 8; width; width >>= 1) words += bits & width ? fc_plane_rows(width, count) : 0;
    return 4 * words;
}

static size_t fc_coded_bytes(int code, size_t count)
{
    size_t whole = count / FC_BLOCK, rest = count % FC_BLOCK;
    int bits = fc_code_bits(code);
    return whole * fc_record_bytes(bits, FC_BLOCK) + (rest ? fc_record_bytes(bits, rest) : 0);
}

FC_INLINE uint32_t fc_bits_of(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

FC_INLINE float fc_float_of(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

#define FC_INF_BITS 0x7f800000u

// Largest magnitudes from here on count as infinite: they, or what they are rounded up to, would not decode to a number.
FC_INLINE uint32_t fc_end(int code, int stochastic)
{
    if (code == FC_CODE_FP8) return 0x7f780000u;         // 248 * 2^120, which rounds to 2^128
    if (code == 2) return 0x7e000000u;                   // 2^125 and 3 * 2^125: the scale's inverse would be a denormal
    if (code == 3) return 0x7ec00000u;
    return stochastic ? 0x7f7fffc0u : FC_INF_BITS;       // room for the wider scale below
}

#define FC_NAN fc_float_of(0x7fc00000u)

// Scales are such that no value is a denormal, which threads that flush them would decode to zero, and that denormals
// round to zero even where they are not flushed. The smallest value above zero is the scale, for fp8 2^-9 of it.
#define FC_LEAST_SCALE 0x1p-125f
#define FC_LEAST_FP8_FIELD 11       // exponent field of 2^-116

FC_INLINE float fc_int_scale(int bits, uint32_t largest, int stochastic)
{
    float top = (float)((1 << (bits - 1)) - 1), scale = fc_float_of(largest) / top;
    if (!(scale > FC_LEAST_SCALE)) return FC_LEAST_SCALE;
    if (stochastic) return scale * (1 + 0x1p-20f);                            // noise must not lift the top code
    return fc_bits_of(scale * top) < FC_INF_BITS ? scale : fc_float_of(fc_bits_of(scale) - 1);
}

// The power of two that brings the largest magnitude to (224, 448]: both products with it are exact.
FC_INLINE float fc_fp8_scale(uint32_t largest)
{
    int exponent = (int)(largest >> 23) - 8 + ((largest & 0x7fffffu) > 0x600000u);
    return fc_float_of((uint32_t)(exponent < FC_LEAST_FP8_FIELD ? FC_LEAST_FP8_FIELD : exponent) << 23);
}

FC_INLINE uint64_t fc_mix64(uint64_t v)  // the finaliser of splitmix64, Steele et al. 2014
{
    v = (v ^ v >> 30) * 0xbf58476d1ce4e5b9u;
    v = (v ^ v >> 27) * 0x94d049bb133111ebu;
    return v ^ v >> 31;
}

#define FC_ISA(name) fc_base_##name
#define FC_LEVEL 0
#include "fc_quantize_body.h"
#undef FC_ISA
#undef FC_LEVEL

#if defined(FC_X86)
FC_TARGET_BEGIN(FC_ISA_AVX2)
#define FC_ISA(name) fc_avx2_##name
#define FC_LEVEL 1
#include "fc_quantize_body.h"
#undef FC_ISA
#undef FC_LEVEL
FC_TARGET_END
#endif

static const fc_quantizers *fc_quantizers_of(int level)
{
#if defined(FC_X86)
    if (level == FC_AVX2) return &fc_avx2_quantizers;
#endif
    return &fc_base_quantizers;
}

#endif
