// C1: the codes of one instruction set. Included by fc_quantize.h once per level, with FC_ISA(name) and FC_LEVEL.
//
// `code` is a constant wherever these inline; a block is 1 .. 256 elements, in memory padded with zeros to 256.

#define F32 FC_ISA(f32v)
#define U32 FC_ISA(u32v)
#define I32 FC_ISA(i32v)
#define LANES (FC_ISA(step) / 2)

typedef struct {
    float scale, inverse;
    uint32_t add, flip;    // random numbers of this block
} FC_ISA(terms);
#define TERMS FC_ISA(terms)

FC_INLINE F32 FC_ISA(get)(const fc_f32 *p) { return (F32)FC_ISA(load)(p); }
FC_INLINE void FC_ISA(put)(fc_f32 *p, F32 v) { FC_ISA(store)(p, (U32)v); }
FC_INLINE F32 FC_ISA(all)(float value) { return (F32){0} + value; }
FC_INLINE U32 FC_ISA(magnitude)(F32 v) { return (U32)v & 0x7fffffffu; }

FC_INLINE U32 FC_ISA(larger)(U32 a, U32 b)  // as signed integers
{
#if FC_LEVEL == 1
    return (U32)_mm256_max_epi32((__m256i)a, (__m256i)b);
#else
    return FC_ISA(select)((U32)((I32)a > (I32)b), a, b);
#endif
}

// Largest magnitude: as integers infinity is above all numbers, and NaN above infinity.
FC_INLINE uint32_t FC_ISA(largest)(const fc_f32 *x)
{
    U32 a = {0}, b = {0}, c = {0}, d = {0};
    for (size_t i = 0; i < FC_BLOCK; i += 4 * LANES) {
        a = FC_ISA(larger)(a, FC_ISA(magnitude)(FC_ISA(get)(x + i)));
        b = FC_ISA(larger)(b, FC_ISA(magnitude)(FC_ISA(get)(x + i + LANES)));
        c = FC_ISA(larger)(c, FC_ISA(magnitude)(FC_ISA(get)(x + i + 2 * LANES)));
        d = FC_ISA(larger)(d, FC_ISA(magnitude)(FC_ISA(get)(x + i + 3 * LANES)));
    }
    a = FC_ISA(larger)(FC_ISA(larger)(a, b), FC_ISA(larger)(c, d));
    uint32_t found = 0;
    for (size_t lane = 0; lane < LANES; lane++) found = a[lane] > found ? a[lane] : found;
    return found;
}

// Mean magnitude: sixteen sums, element i in sum i % 16, added pairwise, whatever the width of a vector.
FC_INLINE float FC_ISA(mean_magnitude)(const fc_f32 *x, size_t count, float factor)
{
    enum { VECTORS = 16 / LANES };
    float sums[16];
    F32 acc[VECTORS];
    for (int v = 0; v < VECTORS; v++) acc[v] = (F32){0};
    for (size_t i = 0; i < FC_BLOCK; i += 16)
        for (int v = 0; v < VECTORS; v++)
            acc[v] += (F32)FC_ISA(magnitude)(FC_ISA(get)(x + i + v * LANES)) * FC_ISA(all)(factor);
    memcpy(sums, acc, sizeof sums);
    for (int width = 8; width; width >>= 1)
        for (int i = 0; i < width; i++) sums[i] += sums[i + width];
    return sums[0] / (float)count / factor;
}

FC_INLINE float FC_ISA(sign_scale)(const fc_f32 *x, size_t count, uint32_t largest)
{
    float mean = FC_ISA(mean_magnitude)(x, count, 1.0f), most = fc_float_of(largest);
    if (fc_bits_of(mean) >= FC_INF_BITS) mean = FC_ISA(mean_magnitude)(x, count, 0x1p-9f);    // 256 of them overflowed
    mean = mean < most ? mean : most;
    return mean < FC_LEAST_SCALE ? 0.0f : mean;
}

// x in units of the scale, as a code in the low bits

FC_INLINE F32 FC_ISA(noise)(U32 index, const TERMS *t)  // (k + 1/2) / 2^16 - 1/2; hash: lowbias32, C. Wellons 2018
{
    U32 h = index * 0x9e3779b9u + t->add;
    h = (h ^ h >> 16) * 0x21f0aaadu ^ t->flip;
    h = (h ^ h >> 15) * 0xd35a2d97u;
    return __builtin_convertvector((I32)(h >> 16), F32) * FC_ISA(all)(0x1p-16f) + FC_ISA(all)(0x1p-17f - 0.5f);
}

// Adding 1.5 * 2^23 rounds to an integer, to nearest even, and leaves it in the low bits, in two's complement.
#define FC_SHIFTER 12582912.0f

FC_INLINE F32 FC_ISA(shifted)(F32 x, size_t i, int stochastic, const TERMS *t)
{
    F32 y = x * FC_ISA(all)(t->inverse);
    if (stochastic) {
        U32 lanes;
        for (size_t lane = 0; lane < LANES; lane++) lanes[lane] = (uint32_t)lane;
        y += FC_ISA(noise)(lanes + (uint32_t)i, t);
    }
    return y + FC_ISA(all)(FC_SHIFTER);
}

FC_INLINE U32 FC_ISA(down_fp8)(F32 y)  // |y| <= 448; the constants of down_f16 in fc_half_body.h, for 3 bits and bias 7
{
    U32 bits = (U32)y, sign = bits >> 24 & 0x80u, magnitude = bits & 0x7fffffffu;
    U32 normal = (magnitude - 0x3c000000u + 0x7ffffu + (magnitude >> 20 & 1u)) >> 20;
    U32 tiny = (U32)((F32)magnitude + FC_ISA(all)(16384.0f)) - 0x46800000u;              // 2^14 has an ulp of 2^-9
    return sign | FC_ISA(select)((U32)((I32)magnitude < 0x3c800000), tiny, normal);
}

FC_INLINE F32 FC_ISA(up_fp8)(U32 code)
{
    U32 sign = (code & 0x80u) << 24, magnitude = code & 0x7fu;
    U32 normal = (magnitude << 20) + 0x3c000000u;
    U32 tiny = (U32)((F32)(magnitude | 0x46800000u) - FC_ISA(all)(16384.0f));
    U32 number = FC_ISA(select)((U32)((I32)magnitude < 8), tiny, normal);
    return (F32)(sign | FC_ISA(select)((U32)((I32)magnitude == 0x7f), (U32){0} + 0x7fc00000u, number));
}

FC_INLINE U32 FC_ISA(coded)(int code, F32 x, size_t i, int stochastic, const TERMS *t)
{
    if (code == FC_CODE_SIGN) return (U32)x >> 31;
    if (code == FC_CODE_FP8) return FC_ISA(down_fp8)(x * FC_ISA(all)(t->inverse));
    return (U32)FC_ISA(shifted)(x, i, stochastic, t);
}

// The value that a code stands for; high bits of `bits` are not looked at.
FC_INLINE F32 FC_ISA(value)(int code, U32 bits, float scale)
{
    if (code == FC_CODE_SIGN) return (F32)((U32)FC_ISA(all)(scale) ^ bits << 31);
    if (code == FC_CODE_FP8) return FC_ISA(up_fp8)(bits & 0xffu) * FC_ISA(all)(scale);
    const int unused = 32 - code;
    return __builtin_convertvector((I32)(bits << unused) >> unused, F32) * FC_ISA(all)(scale);
}

// grad + residual - sent, to half a unit in the last place: the roundings of both operations are exact in float32
// (two-sum, Knuth) and added at the end. What was not sent as a number leaves the residual as it was.
FC_INLINE F32 FC_ISA(remainder)(F32 grad, F32 residual, F32 sent)
{
    F32 x = grad + residual, part = x - grad, lost = (grad - (x - part)) + (residual - part);
    F32 left = x - sent, gone = left - x, lost_too = (x - (left - gone)) - (sent + gone);
    F32 now = left + (lost + lost_too);
    return (F32)FC_ISA(select)((U32)((I32)FC_ISA(magnitude)(sent) < (int32_t)FC_INF_BITS), (U32)now, (U32)residual);
}

// One plane: bits `from` and up of the codes, `width` of them

FC_INLINE void FC_ISA(pack)(int code, int width, int from, uint8_t *out, const fc_f32 *x, size_t rows, int stochastic,
                            const TERMS *t)
{
    const uint32_t mask = (1u << width) - 1;
    for (size_t j = 0; j < rows; j += LANES) {
        U32 word = {0};
        for (int c = 0; c < 32 / width; c++) {
            size_t i = j + rows * (size_t)c;
            word |= (FC_ISA(coded)(code, FC_ISA(get)(x + i), i, stochastic, t) >> from & mask) << width * c;
        }
        FC_ISA(store)(out + 4 * j, word);
    }
}

FC_INLINE uint8_t *FC_ISA(pack_all)(int code, uint8_t *out, const fc_f32 *x, size_t count, int stochastic, const TERMS *t)
{
    const int bits = fc_code_bits(code);
    int from = 0;
    for (int width = 8; width; width >>= 1) {
        if (!(bits & width)) continue;
        size_t rows = fc_plane_rows(width, count);
        FC_ISA(pack)(code, width, from, out, x, rows, stochastic, t);
        out += 4 * rows;
        from += width;
    }
    return out;
}

// x: 256 elements, those from `count` on are zero. Returns the end of the record; t->scale is NaN where x is not finite.
FC_INLINE uint8_t *FC_ISA(encode_block)(int code, uint8_t *out, const fc_f32 *x, size_t count, int stochastic,
                                        const fc_rounding *how, uint64_t block, TERMS *t)
{
    const uint32_t largest = FC_ISA(largest)(x);
    if (largest >= fc_end(code, stochastic)) {
        size_t nbytes = fc_record_bytes(fc_code_bits(code), count);
        t->scale = FC_NAN;
        memset(out, 0, nbytes);
        memcpy(out, &t->scale, 4);
        return out + nbytes;
    }
    if (code == FC_CODE_SIGN) t->scale = FC_ISA(sign_scale)(x, count, largest);
    else if (code == FC_CODE_FP8) t->scale = fc_fp8_scale(largest);
    else t->scale = fc_int_scale(code, largest, stochastic);
    t->inverse = code == FC_CODE_SIGN ? 0.0f : 1.0f / t->scale;
    if (stochastic) {
        uint64_t random = fc_mix64(fc_mix64(how->key + 0x9e3779b97f4a7c15u) + (how->block + block) * 0x9e3779b97f4a7c15u);
        t->add = (uint32_t)random;
        t->flip = (uint32_t)(random >> 32);
    }
    memcpy(out, &t->scale, 4);
    return FC_ISA(pack_all)(code, out + 4, x, count, stochastic, t);
}

FC_INLINE void FC_ISA(encode)(int code, uint8_t *out, const fc_f32 *src, size_t count, int stochastic,
                              const fc_rounding *how)
{
    TERMS t;
    for (size_t block = 0; block < count / FC_BLOCK; block++)
        out = FC_ISA(encode_block)(code, out, src + block * FC_BLOCK, FC_BLOCK, stochastic, how, block, &t);
    if (count % FC_BLOCK) {
        fc_f32 padded[FC_BLOCK] = {0};
        memcpy(padded, src + count / FC_BLOCK * FC_BLOCK, count % FC_BLOCK * sizeof(float));
        FC_ISA(encode_block)(code, out, padded, count % FC_BLOCK, stochastic, how, count / FC_BLOCK, &t);
    }
}

FC_INLINE void FC_ISA(add_block)(fc_f32 *x, const fc_f32 *grad, const fc_f32 *residual)
{
    for (size_t i = 0; i < FC_BLOCK; i += LANES) FC_ISA(put)(x + i, FC_ISA(get)(grad + i) + FC_ISA(get)(residual + i));
}

FC_INLINE uint8_t *FC_ISA(feedback_block)(int code, uint8_t *out, const fc_f32 *grad, fc_f32 *residual, size_t count,
                                          int stochastic, const fc_rounding *how, uint64_t block)
{
    fc_f32 x[FC_BLOCK];
    TERMS t;
    FC_ISA(add_block)(x, grad, residual);
    out = FC_ISA(encode_block)(code, out, x, count, stochastic, how, block, &t);
    if (fc_bits_of(t.scale) >= FC_INF_BITS) return out;
    for (size_t i = 0; i < FC_BLOCK; i += LANES) {
        F32 sent = FC_ISA(value)(code, FC_ISA(coded)(code, FC_ISA(get)(x + i), i, stochastic, &t), t.scale);
        FC_ISA(put)(residual + i, FC_ISA(remainder)(FC_ISA(get)(grad + i), FC_ISA(get)(residual + i), sent));
    }
    return out;
}

FC_INLINE void FC_ISA(encode_feedback)(int code, uint8_t *out, const fc_f32 *grad, fc_f32 *residual, size_t count,
                                       int stochastic, const fc_rounding *how)
{
    const size_t whole = count / FC_BLOCK, rest = count % FC_BLOCK;
    for (size_t block = 0; block < whole; block++)
        out = FC_ISA(feedback_block)(code, out, grad + block * FC_BLOCK, residual + block * FC_BLOCK, FC_BLOCK,
                                     stochastic, how, block);
    if (rest) {
        fc_f32 some[FC_BLOCK] = {0}, kept[FC_BLOCK] = {0};
        memcpy(some, grad + whole * FC_BLOCK, rest * sizeof(float));
        memcpy(kept, residual + whole * FC_BLOCK, rest * sizeof(float));
        FC_ISA(feedback_block)(code, out, some, kept, rest, stochastic, how, whole);
        memcpy(residual + whole * FC_BLOCK, kept, rest * sizeof(float));
    }
}

// A record of `count` elements: dst = values, or dst += values * weight. Writes up to the next multiple of 32 elements.
FC_INLINE const uint8_t *FC_ISA(decode_block)(int code, fc_f32 *dst, const uint8_t *data, size_t count, int add,
                                              float weight)
{
    const int bits = fc_code_bits(code);
    float scale;
    memcpy(&scale, data, 4);
    data += 4;
    for (size_t i = 0; i < count; i += 32) {                // rows are multiples of 8: see below
        for (size_t lane = 0; lane < 32; lane += LANES) {
            U32 found = {0};
            const uint8_t *plane = data;
            int from = 0;
            for (int width = 8; width; width >>= 1) {
                if (!(bits & width)) continue;
                const size_t rows = fc_plane_rows(width, count), at = i + lane;
                const size_t column = at / rows, row = at % rows;
                U32 word = FC_ISA(load)(plane + 4 * row) >> (uint32_t)(column * (size_t)width);
                found |= (word & ((1u << width) - 1)) << from;
                plane += 4 * rows;
                from += width;
            }
            F32 values = FC_ISA(value)(code, found, scale);
            if (add) values = FC_ISA(get)(dst + i + lane) + values * FC_ISA(all)(weight);
            FC_ISA(put)(dst + i + lane, values);
        }
    }
    return data + fc_record_bytes(bits, count) - 4;
}

FC_INLINE void FC_ISA(decode)(int code, fc_f32 *dst, const uint8_t *data, size_t count, int add, float weight)
{
    const size_t whole = count / FC_BLOCK, rest = count % FC_BLOCK;
    for (size_t block = 0; block < whole; block++)
        data = FC_ISA(decode_block)(code, dst + block * FC_BLOCK, data, FC_BLOCK, add, weight);
    if (rest) {
        fc_f32 padded[FC_BLOCK] = {0};
        memcpy(padded, dst + whole * FC_BLOCK, rest * sizeof(float));
        FC_ISA(decode_block)(code, padded, data, rest, add, weight);
        memcpy(dst + whole * FC_BLOCK, padded, rest * sizeof(float));
    }
}

FC_INLINE void FC_ISA(settle_block)(const fc_f32 *grad, fc_f32 *residual, const fc_f32 *sent)
{
    for (size_t i = 0; i < FC_BLOCK; i += LANES)
        FC_ISA(put)(residual + i, FC_ISA(remainder)(FC_ISA(get)(grad + i), FC_ISA(get)(residual + i),
                                                    FC_ISA(get)(sent + i)));
}

static void FC_ISA(settle)(const fc_f32 *grad, fc_f32 *residual, const fc_f32 *sent, size_t count)
{
    const size_t whole = count / FC_BLOCK * FC_BLOCK, rest = count - whole;
    for (size_t i = 0; i < whole; i += FC_BLOCK) FC_ISA(settle_block)(grad + i, residual + i, sent + i);
    if (rest) {
        fc_f32 some[FC_BLOCK] = {0}, kept[FC_BLOCK] = {0}, gone[FC_BLOCK] = {0};
        memcpy(some, grad + whole, rest * sizeof(float));
        memcpy(kept, residual + whole, rest * sizeof(float));
        memcpy(gone, sent + whole, rest * sizeof(float));
        FC_ISA(settle_block)(some, kept, gone);
        memcpy(residual + whole, kept, rest * sizeof(float));
    }
}

#define FC_HALF_FEEDBACK(S)                                                                                            \
    static void FC_ISA(feedback_##S)(fc_half *out, const fc_f32 *grad, fc_f32 *residual, size_t count)                 \
    {                                                                                                                  \
        fc_f32 x[FC_BLOCK], some[FC_BLOCK] = {0}, kept[FC_BLOCK] = {0};                                                \
        for (size_t i = 0; i < count; i += FC_BLOCK) {                                                                 \
            const size_t n = count - i < FC_BLOCK ? count - i : FC_BLOCK;                                              \
            const fc_f32 *here = grad + i;                                                                             \
            fc_f32 *back = residual + i;                                                                               \
            if (n < FC_BLOCK) {                                                                                        \
                here = memcpy(some, here, n * sizeof(float));                                                          \
                back = memcpy(kept, back, n * sizeof(float));                                                          \
            }                                                                                                          \
            FC_ISA(add_block)(x, here, back);                                                                          \
            FC_ISA(narrow_##S)(out + i, x, n);                                                                         \
            FC_ISA(widen_##S)(x, out + i, n);                                                                          \
            FC_ISA(settle_block)(here, back, x);                                                                       \
            if (n < FC_BLOCK) memcpy(residual + i, kept, n * sizeof(float));                                           \
        }                                                                                                              \
    }

// Calls per code; fp8 and sign know no chance.
#define FC_CODE(C)                                                                                                     \
    static void FC_ISA(encode_##C)(uint8_t *out, const fc_f32 *src, size_t count, const fc_rounding *how)              \
    {                                                                                                                  \
        if ((C) > FC_CODE_SIGN && (C) <= FC_CODE_INT8 && how->stochastic)                                              \
            FC_ISA(encode)(C, out, src, count, 1, how);                                                                \
        else FC_ISA(encode)(C, out, src, count, 0, how);                                                               \
    }                                                                                                                  \
    static void FC_ISA(feedback_##C)(uint8_t *out, const fc_f32 *grad, fc_f32 *residual, size_t count,                 \
                                     const fc_rounding *how)                                                           \
    {                                                                                                                  \
        if ((C) > FC_CODE_SIGN && (C) <= FC_CODE_INT8 && how->stochastic)                                              \
            FC_ISA(encode_feedback)(C, out, grad, residual, count, 1, how);                                            \
        else FC_ISA(encode_feedback)(C, out, grad, residual, count, 0, how);                                           \
    }                                                                                                                  \
    static void FC_ISA(decode_##C)(fc_f32 *dst, const uint8_t *data, size_t count)                                     \
    {                                                                                                                  \
        FC_ISA(decode)(C, dst, data, count, 0, 1.0f);                                                                  \
    }                                                                                                                  \
    static void FC_ISA(decode_add_##C)(fc_f32 *dst, const uint8_t *data, size_t count, float weight)                   \
    {                                                                                                                  \
        FC_ISA(decode)(C, dst, data, count, 1, weight);                                                                \
    }

FC_HALF_FEEDBACK(f16)
FC_HALF_FEEDBACK(bf16)
FC_CODE(1)
FC_CODE(2)
FC_CODE(3)
FC_CODE(4)
FC_CODE(5)
FC_CODE(6)
FC_CODE(7)
FC_CODE(8)
FC_CODE(9)

#define FC_ALL_CODES(NAME)                                                                                             \
    {0, FC_ISA(NAME##_1), FC_ISA(NAME##_2), FC_ISA(NAME##_3), FC_ISA(NAME##_4), FC_ISA(NAME##_5), FC_ISA(NAME##_6),    \
     FC_ISA(NAME##_7), FC_ISA(NAME##_8), FC_ISA(NAME##_9)}

static const fc_quantizers FC_ISA(quantizers) = {
    .encode = FC_ALL_CODES(encode),
    .encode_feedback = FC_ALL_CODES(feedback),
    .decode = FC_ALL_CODES(decode),
    .decode_add = FC_ALL_CODES(decode_add),
    .half_feedback = {FC_ISA(feedback_f16), FC_ISA(feedback_bf16)},
    .settle = FC_ISA(settle),
};

#undef FC_ALL_CODES
#undef FC_CODE
#undef FC_HALF_FEEDBACK
#undef FC_SHIFTER
#undef F32
#undef U32
#undef I32
#undef LANES
#undef TERMS
