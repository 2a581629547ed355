// C1: every fold of one instruction set. Included by fc_reduce.h once per level, with FC_ISA(name) and FC_LEVEL.

// float32 pairs, for float16 and bfloat16

#define F32 FC_ISA(f32v)
#define U32 FC_ISA(u32v)
#define PAIR FC_ISA(pair)

#if FC_LEVEL == 1
FC_INLINE F32 FC_ISA(nan_if)(F32 v, F32 a, F32 b)  // NaN where a or b is
{
    return _mm256_blendv_ps(v, _mm256_set1_ps(__builtin_nanf("")), _mm256_cmp_ps(a, b, _CMP_UNORD_Q));
}
FC_INLINE F32 FC_ISA(min_f32v)(F32 a, F32 b) { return FC_ISA(nan_if)(_mm256_min_ps(a, b), a, b); }
FC_INLINE F32 FC_ISA(max_f32v)(F32 a, F32 b) { return FC_ISA(nan_if)(_mm256_max_ps(a, b), a, b); }
#else
FC_INLINE F32 FC_ISA(nan_if)(F32 v, F32 a, F32 b)
{
    return (F32)FC_ISA(select)((U32)(a == a) & (U32)(b == b), (U32)v, (U32){0} + 0x7fc00000u);
}
FC_INLINE F32 FC_ISA(min_f32v)(F32 a, F32 b)
{
    return FC_ISA(nan_if)((F32)FC_ISA(select)((U32)(a < b), (U32)a, (U32)b), a, b);
}
FC_INLINE F32 FC_ISA(max_f32v)(F32 a, F32 b)
{
    return FC_ISA(nan_if)((F32)FC_ISA(select)((U32)(a > b), (U32)a, (U32)b), a, b);
}
#endif

FC_INLINE PAIR FC_ISA(sum)(PAIR x, PAIR y) { return (PAIR){x.a + y.a, x.b + y.b}; }
FC_INLINE PAIR FC_ISA(product)(PAIR x, PAIR y) { return (PAIR){x.a * y.a, x.b * y.b}; }
FC_INLINE PAIR FC_ISA(min)(PAIR x, PAIR y)
{
    return (PAIR){FC_ISA(min_f32v)(x.a, y.a), FC_ISA(min_f32v)(x.b, y.b)};
}
FC_INLINE PAIR FC_ISA(max)(PAIR x, PAIR y)
{
    return (PAIR){FC_ISA(max_f32v)(x.a, y.a), FC_ISA(max_f32v)(x.b, y.b)};
}
FC_INLINE PAIR FC_ISA(calm)(PAIR v)
{
    return (PAIR){FC_ISA(nan_if)(v.a, v.a, v.a), FC_ISA(nan_if)(v.b, v.b, v.b)};
}
FC_INLINE PAIR FC_ISA(mean)(PAIR v, float by) { return FC_ISA(calm)((PAIR){v.a / by, v.b / by}); }

#undef F32
#undef U32
#undef PAIR

FC_FLOAT(f32, fc_f32, FC_MEAN_F32)
FC_FLOAT(f64, fc_f64, FC_MEAN_F64)
FC_HALVES(f16, FC_ISA(load_f16), FC_ISA(store_f16))
FC_HALVES(bf16, FC_ISA(load_bf16), FC_ISA(store_calm_bf16))
FC_INT(i8, fc_i8, fc_u8)
FC_INT(i16, fc_i16, fc_u16)
FC_INT(i32, fc_i32, fc_u32)
FC_INT(i64, fc_i64, fc_u64)
FC_INT(u8, fc_u8, fc_u8)
FC_FOLD1(or_bool, fc_u8, FC_SAME, FC_TRUE)
FC_FOLD(or_bool, fc_u8, FC_SAME, FC_TRUE, fc_or)
FC_FOLD(and_bool, fc_u8, FC_TRUE, FC_SAME, fc_and)

static const fc_folds FC_ISA(folds) = {{
    [FC_DT_F32] = FC_FLOAT_ROWS(f32),
    [FC_DT_F64] = FC_FLOAT_ROWS(f64),
    [FC_DT_F16] = FC_HALF_ROWS(f16),
    [FC_DT_BF16] = FC_HALF_ROWS(bf16),
    [FC_DT_I8] = FC_INT_ROWS(i8),
    [FC_DT_I16] = FC_INT_ROWS(i16),
    [FC_DT_I32] = FC_INT_ROWS(i32),
    [FC_DT_I64] = FC_INT_ROWS(i64),
    [FC_DT_U8] = FC_INT_ROWS(u8),
    [FC_DT_BOOL] = {[FC_OP_SUM] = FC_BOOL_ROW(or_bool), [FC_OP_MIN] = FC_BOOL_ROW(and_bool),
                    [FC_OP_MAX] = FC_BOOL_ROW(or_bool), [FC_OP_PRODUCT] = FC_BOOL_ROW(and_bool)},
}};
