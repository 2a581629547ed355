// C1: the casts of one instruction set. Included by fc_cast.h once per level, with FC_ISA(name) and FC_LEVEL.

#define F32 FC_ISA(f32v)
#define U32 FC_ISA(u32v)
#define I32 FC_ISA(i32v)
#define PAIR FC_ISA(pair)

// Even and odd elements <-> float32 in memory order. Vector by vector: copied whole, a pair would go through the stack.

FC_INLINE PAIR FC_ISA(load_f32)(const fc_f32 *p)
{
    return (PAIR){(F32)FC_ISA(load)(p), (F32)FC_ISA(load)(p + FC_ISA(step) / 2)};
}

FC_INLINE void FC_ISA(store_f32)(fc_f32 *p, PAIR v)
{
    FC_ISA(store)(p, (U32)v.a);
    FC_ISA(store)(p + FC_ISA(step) / 2, (U32)v.b);
}

#if FC_LEVEL == 1
FC_INLINE PAIR FC_ISA(load_split_f32)(const fc_f32 *p)  // AVX2 shuffles within 128 bits: load so that this is enough
{
    const float *q = (const float *)p;
    __m256 x = _mm256_loadu2_m128(q + 8, q), y = _mm256_loadu2_m128(q + 12, q + 4);
    return (PAIR){(F32)_mm256_shuffle_ps(x, y, 0x88), (F32)_mm256_shuffle_ps(x, y, 0xdd)};
}
FC_INLINE void FC_ISA(store_joined_f32)(fc_f32 *p, PAIR v)
{
    float *q = (float *)p;
    _mm256_storeu2_m128(q + 8, q, _mm256_unpacklo_ps((__m256)v.a, (__m256)v.b));
    _mm256_storeu2_m128(q + 12, q + 4, _mm256_unpackhi_ps((__m256)v.a, (__m256)v.b));
}
#else
FC_INLINE PAIR FC_ISA(load_split_f32)(const fc_f32 *p)
{
    PAIR v = FC_ISA(load_f32)(p);
    return (PAIR){FC_SHUFFLE(I32, v.a, v.b, 0, 2, 4, 6), FC_SHUFFLE(I32, v.a, v.b, 1, 3, 5, 7)};
}
FC_INLINE void FC_ISA(store_joined_f32)(fc_f32 *p, PAIR v)
{
    FC_ISA(store_f32)(p, (PAIR){FC_SHUFFLE(I32, v.a, v.b, 0, 4, 1, 5), FC_SHUFFLE(I32, v.a, v.b, 2, 6, 3, 7)});
}
#endif

FC_INLINE void FC_ISA(widen_step_f16)(fc_f32 *dst, const fc_half *src)
{
    if (FC_ISA(ordered_f16)) FC_ISA(store_f32)(dst, FC_ISA(load_f16)(src));
    else FC_ISA(store_joined_f32)(dst, FC_ISA(load_f16)(src));
}

FC_INLINE void FC_ISA(narrow_step_f16)(fc_half *dst, const fc_f32 *src)
{
    if (FC_ISA(ordered_f16)) FC_ISA(store_f16)(dst, FC_ISA(load_f32)(src));
    else FC_ISA(store_f16)(dst, FC_ISA(load_split_f32)(src));
}

FC_INLINE void FC_ISA(widen_step_bf16)(fc_f32 *dst, const fc_half *src)
{
    PAIR v = FC_ISA(load_bf16)(src);
    v.a = (F32)FC_ISA(quiet_bf16)(v.a, (U32)v.a);
    v.b = (F32)FC_ISA(quiet_bf16)(v.b, (U32)v.b);
    FC_ISA(store_joined_f32)(dst, v);
}

FC_INLINE void FC_ISA(narrow_step_bf16)(fc_half *dst, const fc_f32 *src)
{
    FC_ISA(store_bf16)(dst, FC_ISA(load_split_f32)(src));
}

// The rest of a vector goes through the same instructions in padded copies.
#define FC_CAST_LOOP(NAME, D, S, STEP)                                                                                 \
    static void FC_ISA(NAME)(D *dst, const S *src, size_t count)                                                       \
    {                                                                                                                  \
        const size_t whole = count / FC_ISA(step) * FC_ISA(step), rest = count - whole;                                \
        for (size_t i = 0; i < whole; i += FC_ISA(step)) FC_ISA(STEP)(dst + i, src + i);                               \
        if (rest) {                                                                                                    \
            D to[FC_ISA(step)];                                                                                        \
            S from[FC_ISA(step)] = {0};                                                                                \
            memcpy(from, src + whole, rest * sizeof(S));                                                               \
            FC_ISA(STEP)(to, from);                                                                                    \
            memcpy(dst + whole, to, rest * sizeof(D));                                                                 \
        }                                                                                                              \
    }

FC_CAST_LOOP(widen_f16, fc_f32, fc_half, widen_step_f16)
FC_CAST_LOOP(widen_bf16, fc_f32, fc_half, widen_step_bf16)
FC_CAST_LOOP(narrow_f16, fc_half, fc_f32, narrow_step_f16)
FC_CAST_LOOP(narrow_bf16, fc_half, fc_f32, narrow_step_bf16)

#undef FC_CAST_LOOP
#undef F32
#undef U32
#undef I32
#undef PAIR

static const fc_casts FC_ISA(casts) = {
    .widen = {FC_ISA(widen_f16), FC_ISA(widen_bf16)},
    .narrow = {FC_ISA(narrow_f16), FC_ISA(narrow_bf16)},
};
