// C1: the loops behind reduce.pyx, a table per instruction set. Oracle: tests/fleetcore/kernels/test_reduce.py.
//
// A NaN that arithmetic makes or meets leaves as the one positive quiet NaN. Left alone, the payload of NaN + NaN would
// hang on the operand order a compiler picked, and that of Inf - Inf on the processor's maker: ranks would differ.
#ifndef FC_REDUCE_H
#define FC_REDUCE_H

#include "fc_half.h"

typedef int8_t __attribute__((may_alias)) fc_i8;
typedef int16_t __attribute__((may_alias)) fc_i16;
typedef int32_t __attribute__((may_alias)) fc_i32;
typedef int64_t __attribute__((may_alias)) fc_i64;
typedef uint8_t __attribute__((may_alias)) fc_u8;
typedef uint16_t __attribute__((may_alias)) fc_u16;
typedef uint32_t __attribute__((may_alias)) fc_u32;
typedef uint64_t __attribute__((may_alias)) fc_u64;

// DTypeCode and OpCode of status.pxd, whose C names Cython mangles; reduce.pyx refuses to import if they drift.
enum { FC_DT_F32, FC_DT_F64, FC_DT_F16, FC_DT_BF16, FC_DT_I8, FC_DT_I16, FC_DT_I32, FC_DT_I64, FC_DT_U8, FC_DT_BOOL,
       FC_NUM_DTYPES };
enum { FC_OP_SUM, FC_OP_MEAN, FC_OP_MIN, FC_OP_MAX, FC_OP_PRODUCT, FC_NUM_OPS };

// Folds `count` elements of the sources into the destinations. Only MEAN and FC_MANY read `divisor`.
typedef void (*fc_fold)(void **dsts, int num_dsts, const void **srcs, int num_srcs, size_t count, int divisor);

// A row is indexed by the number of sources, 1 to 4, all into one destination; or by one of these. NULL where there is
// nothing to compute (one source: copy it) or no such loop.
enum { FC_TWIN = 0,   // two sources into two destinations
       FC_MANY = 5,   // any into any, divided in the end: float16 and bfloat16, which must not be rounded in between
       FC_NUM_FOLDS };
typedef fc_fold fc_row[FC_NUM_FOLDS];

typedef struct {
    fc_row rows[FC_NUM_DTYPES][FC_NUM_OPS];
} fc_folds;

// How two values become one

#define FC_FLOAT_OPS(S, T, NAN_VALUE)                                                                                  \
    FC_INLINE T fc_sum_##S(T a, T b) { return a + b; }                                                                 \
    FC_INLINE T fc_product_##S(T a, T b) { return a * b; }                                                             \
    FC_INLINE T fc_min_##S(T a, T b)                                                                                   \
    {                                                                                                                  \
        T least = a < b ? a : b;                                                                                       \
        return __builtin_isunordered(a, b) ? NAN_VALUE : least;                                                        \
    }                                                                                                                  \
    FC_INLINE T fc_max_##S(T a, T b)                                                                                   \
    {                                                                                                                  \
        T most = a > b ? a : b;                                                                                        \
        return __builtin_isunordered(a, b) ? NAN_VALUE : most;                                                         \
    }                                                                                                                  \
    FC_INLINE T fc_calm_##S(T a) { return a != a ? NAN_VALUE : a; }

FC_FLOAT_OPS(f32, float, __builtin_nanf(""))
FC_FLOAT_OPS(f64, double, __builtin_nan(""))

// Wrapping is only defined for unsigned types, and 1u keeps uint16_t * uint16_t from being promoted to int.
#define FC_INT_OPS(S, T, U)                                                                                            \
    FC_INLINE U fc_sum_##S(U a, U b) { return (U)(1u * a + b); }                                                       \
    FC_INLINE U fc_product_##S(U a, U b) { return (U)(1u * a * b); }                                                   \
    FC_INLINE T fc_min_##S(T a, T b) { return a < b ? a : b; }                                                         \
    FC_INLINE T fc_max_##S(T a, T b) { return a > b ? a : b; }

FC_INT_OPS(i8, int8_t, uint8_t)
FC_INT_OPS(i16, int16_t, uint16_t)
FC_INT_OPS(i32, int32_t, uint32_t)
FC_INT_OPS(i64, int64_t, uint64_t)
FC_INT_OPS(u8, uint8_t, uint8_t)

FC_INLINE uint8_t fc_or(uint8_t a, uint8_t b) { return a | b; }
FC_INLINE uint8_t fc_and(uint8_t a, uint8_t b) { return a & b; }

// Loops over plain types, left to the vectoriser: GET(p) loads, OP(a, b) folds, END(v) finishes. They expand where
// fc_reduce_body.h names an instruction set through FC_ISA.

#define FC_SAME(v) (v)
#define FC_TRUE(v) ((uint8_t)((v) != 0))
#define FC_MEAN_F32(v) fc_calm_f32((v) / (float)divisor)
#define FC_MEAN_F64(v) fc_calm_f64((v) / (double)divisor)

#define FC_HEAD(NAME, T)                                                                                               \
    static void FC_ISA(NAME)(void **dsts, int num_dsts, const void **srcs, int num_srcs, size_t count, int divisor)    \
    {                                                                                                                  \
        T *const out = dsts[0];                                                                                        \
        const T *const a = srcs[0];

#define FC_FOLD1(NAME, T, GET, END)                                                                                    \
    FC_HEAD(NAME##_1, T)                                                                                               \
        FC_LANES                                                                                                       \
        for (size_t i = 0; i < count; i++) out[i] = END(GET(a[i]));                                                    \
    }

#define FC_FOLD(NAME, T, GET, END, OP)                                                                                 \
    FC_HEAD(NAME##_2, T)                                                                                               \
        const T *const b = srcs[1];                                                                                    \
        FC_LANES                                                                                                       \
        for (size_t i = 0; i < count; i++) out[i] = END(OP(GET(a[i]), GET(b[i])));                                     \
    }                                                                                                                  \
    FC_HEAD(NAME##_3, T)                                                                                               \
        const T *const b = srcs[1], *const c = srcs[2];                                                                \
        FC_LANES                                                                                                       \
        for (size_t i = 0; i < count; i++) out[i] = END(OP(OP(GET(a[i]), GET(b[i])), GET(c[i])));                      \
    }                                                                                                                  \
    FC_HEAD(NAME##_4, T)                                                                                               \
        const T *const b = srcs[1], *const c = srcs[2], *const d = srcs[3];                                            \
        FC_LANES                                                                                                       \
        for (size_t i = 0; i < count; i++) out[i] = END(OP(OP(OP(GET(a[i]), GET(b[i])), GET(c[i])), GET(d[i])));       \
    }                                                                                                                  \
    FC_HEAD(NAME##_twin, T)                                                                                            \
        const T *const b = srcs[1];                                                                                    \
        T *const twin = dsts[1];                                                                                       \
        FC_LANES                                                                                                       \
        for (size_t i = 0; i < count; i++) twin[i] = out[i] = END(OP(GET(a[i]), GET(b[i])));                           \
    }

#define FC_FLOAT(S, T, MEAN)                                                                                           \
    FC_FOLD(sum_##S, T, FC_SAME, fc_calm_##S, fc_sum_##S)                                                              \
    FC_FOLD1(mean_##S, T, FC_SAME, MEAN)                                                                               \
    FC_FOLD(mean_##S, T, FC_SAME, MEAN, fc_sum_##S)                                                                    \
    FC_FOLD(min_##S, T, FC_SAME, FC_SAME, fc_min_##S)                                                                  \
    FC_FOLD(max_##S, T, FC_SAME, FC_SAME, fc_max_##S)                                                                  \
    FC_FOLD(product_##S, T, FC_SAME, fc_calm_##S, fc_product_##S)

#define FC_INT(S, T, U)                                                                                                \
    FC_FOLD(sum_##S, U, FC_SAME, FC_SAME, fc_sum_##S)                                                                  \
    FC_FOLD(min_##S, T, FC_SAME, FC_SAME, fc_min_##S)                                                                  \
    FC_FOLD(max_##S, T, FC_SAME, FC_SAME, fc_max_##S)                                                                  \
    FC_FOLD(product_##S, U, FC_SAME, FC_SAME, fc_product_##S)

// Loops over float16 and bfloat16, a vector of halves a step: one text, unrolled where the numbers are constants and
// the pointers local. The rest of a vector goes through the same instructions in padded copies.

#define FC_HALF_FOLD(NAME, LOAD, STORE, END, OP)                                                                       \
    FC_INLINE void FC_ISA(NAME)(void **dsts, int num_dsts, const void **srcs, int num_srcs, size_t count, float by)    \
    {                                                                                                                  \
        const size_t whole = count / FC_ISA(step) * FC_ISA(step), rest = (count - whole) * sizeof(fc_half);            \
        for (size_t i = 0; i < whole; i += FC_ISA(step)) {                                                             \
            FC_ISA(pair) v = LOAD((const fc_half *)srcs[0] + i);                                                       \
            for (int k = 1; k < num_srcs; k++) v = OP(v, LOAD((const fc_half *)srcs[k] + i));                          \
            v = END(v, by);                                                                                            \
            for (int k = 0; k < num_dsts; k++) STORE((fc_half *)dsts[k] + i, v);                                       \
        }                                                                                                              \
        if (rest) {                                                                                                    \
            fc_half pad[FC_ISA(step)] = {0};                                                                           \
            memcpy(pad, (const fc_half *)srcs[0] + whole, rest);                                                       \
            FC_ISA(pair) v = LOAD(pad);                                                                                \
            for (int k = 1; k < num_srcs; k++) {                                                                       \
                memcpy(pad, (const fc_half *)srcs[k] + whole, rest);                                                   \
                v = OP(v, LOAD(pad));                                                                                  \
            }                                                                                                          \
            STORE(pad, END(v, by));                                                                                    \
            for (int k = 0; k < num_dsts; k++) memcpy((fc_half *)dsts[k] + whole, pad, rest);                          \
        }                                                                                                              \
    }

#define FC_HALF_CALL(NAME, INNER, DSTS, SRCS)                                                                          \
    static void FC_ISA(NAME)(void **dsts, int num_dsts, const void **srcs, int num_srcs, size_t count, int divisor)    \
    {                                                                                                                  \
        void *to[DSTS];                                                                                                \
        const void *from[SRCS];                                                                                        \
        memcpy(to, dsts, sizeof to);                                                                                   \
        memcpy(from, srcs, sizeof from);                                                                               \
        FC_ISA(INNER)(to, DSTS, from, SRCS, count, (float)divisor);                                                    \
    }

#define FC_HALF_CALLS(NAME)                                                                                            \
    FC_HALF_CALL(NAME##_twin, NAME, 2, 2)                                                                              \
    FC_HALF_CALL(NAME##_2, NAME, 1, 2)                                                                                 \
    FC_HALF_CALL(NAME##_3, NAME, 1, 3)                                                                                 \
    FC_HALF_CALL(NAME##_4, NAME, 1, 4)

#define FC_CALM_PAIR(v, by) FC_ISA(calm)(v)
#define FC_SAME_PAIR(v, by) (v)

// Dividing by 1 changes nothing and hides behind the loads: one loop of many sources serves with and without a divisor.
#define FC_HALF_OP(S, OP, LOAD, STORE, END)                                                                            \
    FC_HALF_FOLD(OP##_##S, LOAD, STORE, END, FC_ISA(OP))                                                               \
    FC_HALF_CALLS(OP##_##S)                                                                                            \
    FC_HALF_FOLD(OP##_any_##S, LOAD, STORE, FC_ISA(mean), FC_ISA(OP))                                                  \
    static void FC_ISA(OP##_##S##_many)(void **dsts, int num_dsts, const void **srcs, int num_srcs,                    \
                                        size_t count, int divisor)                                                     \
    {                                                                                                                  \
        FC_ISA(OP##_any_##S)(dsts, num_dsts, srcs, num_srcs, count, (float)divisor);                                   \
    }

#define FC_HALVES(S, LOAD, STORE)                                                                                      \
    FC_HALF_OP(S, sum, LOAD, STORE, FC_CALM_PAIR)                                                                      \
    FC_HALF_OP(S, min, LOAD, STORE, FC_SAME_PAIR)                                                                      \
    FC_HALF_OP(S, max, LOAD, STORE, FC_SAME_PAIR)                                                                      \
    FC_HALF_OP(S, product, LOAD, STORE, FC_CALM_PAIR)                                                                  \
    FC_HALF_FOLD(mean_##S, LOAD, STORE, FC_ISA(mean), FC_ISA(sum))                                                     \
    FC_HALF_CALLS(mean_##S)

// The table

#define FC_ROW(NAME, ONE, MANY) {FC_ISA(NAME##_twin), ONE, FC_ISA(NAME##_2), FC_ISA(NAME##_3), FC_ISA(NAME##_4), MANY}
#define FC_INT_ROWS(S)                                                                                                 \
    {[FC_OP_SUM] = FC_ROW(sum_##S, 0, 0), [FC_OP_MIN] = FC_ROW(min_##S, 0, 0), [FC_OP_MAX] = FC_ROW(max_##S, 0, 0),    \
     [FC_OP_PRODUCT] = FC_ROW(product_##S, 0, 0)}
#define FC_FLOAT_ROWS(S)                                                                                               \
    {[FC_OP_SUM] = FC_ROW(sum_##S, 0, 0), [FC_OP_MEAN] = FC_ROW(mean_##S, FC_ISA(mean_##S##_1), 0),                    \
     [FC_OP_MIN] = FC_ROW(min_##S, 0, 0), [FC_OP_MAX] = FC_ROW(max_##S, 0, 0),                                         \
     [FC_OP_PRODUCT] = FC_ROW(product_##S, 0, 0)}
#define FC_HALF_ROWS(S)                                                                                                \
    {[FC_OP_SUM] = FC_ROW(sum_##S, 0, FC_ISA(sum_##S##_many)),                                                         \
     [FC_OP_MEAN] = FC_ROW(mean_##S, FC_ISA(sum_##S##_many), FC_ISA(sum_##S##_many)),                                  \
     [FC_OP_MIN] = FC_ROW(min_##S, 0, FC_ISA(min_##S##_many)),                                                         \
     [FC_OP_MAX] = FC_ROW(max_##S, 0, FC_ISA(max_##S##_many)),                                                         \
     [FC_OP_PRODUCT] = FC_ROW(product_##S, 0, FC_ISA(product_##S##_many))}
#define FC_BOOL_ROW(NAME) FC_ROW(NAME, FC_ISA(or_bool_1), 0)

#define FC_ISA(name) fc_base_##name
#define FC_LEVEL 0
#include "fc_reduce_body.h"
#undef FC_ISA
#undef FC_LEVEL

#if defined(FC_X86)
FC_TARGET_BEGIN(FC_ISA_AVX2)
#define FC_ISA(name) fc_avx2_##name
#define FC_LEVEL 1
#include "fc_reduce_body.h"
#undef FC_ISA
#undef FC_LEVEL
FC_TARGET_END
#endif

static const fc_folds *fc_folds_of(int level)
{
#if defined(FC_X86)
    if (level == FC_AVX2) return &fc_avx2_folds;
#endif
    return &fc_base_folds;
}

#endif
