// C1: the loops of one instruction set. Included by fc_sparsify.h once per level, with FC_ISA(name) and FC_LEVEL.

#define V FC_ISA(lanes)
#define F FC_ISA(float_lanes)

#if FC_LEVEL == 2
enum { FC_ISA(num) = 16 };
typedef uint32_t V __attribute__((vector_size(64)));
typedef float F __attribute__((vector_size(64)));
FC_INLINE V FC_ISA(least)(V a, V b) { return (V)_mm512_min_epu32((__m512i)a, (__m512i)b); }
FC_INLINE unsigned FC_ISA(above)(V a, V b) { return _mm512_cmpgt_epi32_mask((__m512i)a, (__m512i)b); }
FC_INLINE unsigned FC_ISA(equal)(V a, V b) { return _mm512_cmpeq_epi32_mask((__m512i)a, (__m512i)b); }
FC_INLINE V FC_ISA(blend)(unsigned mask, V no, V yes)
{
    return (V)_mm512_mask_blend_epi32((__mmask16)mask, (__m512i)no, (__m512i)yes);
}
// Through a register: as a store, VPCOMPRESSD takes a hundred cycles on Zen 4.
FC_INLINE void FC_ISA(pack)(fc_u32 *p, V v, unsigned mask)
{
    _mm512_storeu_si512((void *)p, _mm512_maskz_compress_epi32((__mmask16)mask, (__m512i)v));
}
FC_INLINE V FC_ISA(counting)(void) { return (V){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }
FC_INLINE size_t FC_ISA(ones)(unsigned mask) { return (size_t)__builtin_popcount(mask); }
#elif FC_LEVEL == 1
enum { FC_ISA(num) = 8 };
typedef uint32_t V __attribute__((vector_size(32)));
typedef float F __attribute__((vector_size(32)));
FC_INLINE V FC_ISA(least)(V a, V b) { return (V)_mm256_min_epu32((__m256i)a, (__m256i)b); }
FC_INLINE unsigned FC_ISA(sign_bits)(__m256i v) { return (unsigned)_mm256_movemask_ps((__m256)v); }
FC_INLINE unsigned FC_ISA(above)(V a, V b) { return FC_ISA(sign_bits)(_mm256_cmpgt_epi32((__m256i)a, (__m256i)b)); }
FC_INLINE unsigned FC_ISA(equal)(V a, V b) { return FC_ISA(sign_bits)(_mm256_cmpeq_epi32((__m256i)a, (__m256i)b)); }
FC_INLINE V FC_ISA(blend)(unsigned mask, V no, V yes)
{
    const V bit = {1, 2, 4, 8, 16, 32, 64, 128};
    return (V)_mm256_blendv_epi8((__m256i)no, (__m256i)yes, (__m256i)((mask & bit) == bit));
}
FC_INLINE void FC_ISA(pack)(fc_u32 *p, V v, unsigned mask)
{
    __m256i lanes = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)fc_sieve_lanes[mask]));
    _mm256_storeu_si256((__m256i *)p, _mm256_permutevar8x32_epi32((__m256i)v, lanes));
}
FC_INLINE V FC_ISA(counting)(void) { return (V){0, 1, 2, 3, 4, 5, 6, 7}; }
FC_INLINE size_t FC_ISA(ones)(unsigned mask) { return (size_t)__builtin_popcount(mask); }
#else
enum { FC_ISA(num) = 1 };
typedef uint32_t V;
typedef float F;
FC_INLINE V FC_ISA(least)(V a, V b) { return a < b ? a : b; }
FC_INLINE unsigned FC_ISA(above)(V a, V b) { return (int32_t)a > (int32_t)b; }
FC_INLINE unsigned FC_ISA(equal)(V a, V b) { return a == b; }
FC_INLINE V FC_ISA(blend)(unsigned mask, V no, V yes) { return mask ? yes : no; }
FC_INLINE void FC_ISA(pack)(fc_u32 *p, V v, unsigned mask) { *p = v; }
FC_INLINE V FC_ISA(counting)(void) { return 0; }
FC_INLINE size_t FC_ISA(ones)(unsigned mask) { return mask; }
#endif

#define NUM ((size_t)FC_ISA(num))
#define ALL ((unsigned)((1ull << FC_ISA(num)) - 1))

FC_INLINE V FC_ISA(fetch)(const void *p)
{
    V v;
    memcpy(&v, p, sizeof v);
    return v;
}
FC_INLINE V FC_ISA(fetch_some)(const void *p, size_t num)
{
    V v = (V){0};
    memcpy(&v, p, num * sizeof(uint32_t));
    return v;
}
FC_INLINE V FC_ISA(every)(uint32_t value) { return (V){0} + value; }
FC_INLINE V FC_ISA(key)(V bits) { return FC_ISA(least)(bits & 0x7fffffffu, FC_ISA(every)(FC_KEY_NAN)); }

FC_INLINE V FC_ISA(bits_of)(F v)
{
    V bits;
    memcpy(&bits, &v, sizeof bits);
    return bits;
}
FC_INLINE V FC_ISA(sum)(V a, V b)  // of two float32, a NaN as the one NaN
{
    F x, y;
    memcpy(&x, &a, sizeof x);
    memcpy(&y, &b, sizeof y);
    V total = FC_ISA(bits_of)(x + y);
    unsigned nan = FC_ISA(equal)(FC_ISA(key)(total), FC_ISA(every)(FC_KEY_NAN));
    return FC_ISA(blend)(nan, total, FC_ISA(every)(FC_NAN_BITS));
}

FC_INLINE unsigned FC_ISA(keep)(V key, V floor, size_t *ties, unsigned valid)
{
    unsigned mask = FC_ISA(above)(key, floor) & valid;
    if (*ties) {
        unsigned equal = FC_ISA(equal)(key, floor) & valid;
        size_t num = FC_ISA(ones)(equal);
        if (num > *ties) {
            equal = fc_lowest(equal, *ties);
            num = *ties;
        }
        *ties -= num;
        mask |= equal;
    }
    return mask;
}

// Append the lanes of mask to p, at `count` of `room`. The caller has seen that they fit.
FC_INLINE void FC_ISA(append)(fc_u32 *p, size_t count, size_t room, V v, unsigned mask)
{
    if (count + NUM <= room) {
        FC_ISA(pack)(p + count, v, mask);
    } else {
        fc_u32 pad[FC_ISA(num)];
        FC_ISA(pack)(pad, v, mask);
        memcpy(p + count, pad, FC_ISA(ones)(mask) * sizeof *pad);
    }
}

// Append index and bits of what the cut keeps; return how many, or room + 1 when that many do not fit.
static size_t FC_ISA(take)(const fc_u32 *x, size_t n, uint32_t first, fc_cut *cut, fc_u32 *idx, fc_u32 *val,
                           size_t room)
{
    const V floor = FC_ISA(every)((uint32_t)cut->floor);
    size_t count = 0, ties = cut->ties;
    for (size_t i = 0; i < n; i += NUM) {
        unsigned valid = n - i >= NUM ? ALL : ALL >> (NUM - (n - i));
        V bits = valid == ALL ? FC_ISA(fetch)(x + i) : FC_ISA(fetch_some)(x + i, n - i);
        unsigned mask = FC_ISA(keep)(FC_ISA(key)(bits), floor, &ties, valid);
        size_t num = FC_ISA(ones)(mask);
        if (num > room - count) return room + 1;
        FC_ISA(append)(idx, count, room, FC_ISA(counting)() + (first + (uint32_t)i), mask);
        FC_ISA(append)(val, count, room, bits, mask);
        count += num;
    }
    cut->ties = ties;
    return count;
}

// Of n pairs, leave what the cut keeps, at the front; return how many.
static size_t FC_ISA(sift)(fc_u32 *idx, fc_u32 *val, size_t n, fc_cut *cut)
{
    const V floor = FC_ISA(every)((uint32_t)cut->floor);
    size_t count = 0, ties = cut->ties;
    for (size_t i = 0; i < n; i += NUM) {  // writes reach no further than what has been read
        unsigned valid = n - i >= NUM ? ALL : ALL >> (NUM - (n - i));
        V bits = valid == ALL ? FC_ISA(fetch)(val + i) : FC_ISA(fetch_some)(val + i, n - i);
        V index = valid == ALL ? FC_ISA(fetch)(idx + i) : FC_ISA(fetch_some)(idx + i, n - i);
        unsigned mask = FC_ISA(keep)(FC_ISA(key)(bits), floor, &ties, valid);
        FC_ISA(append)(idx, count, n, index, mask);
        FC_ISA(append)(val, count, n, bits, mask);
        count += FC_ISA(ones)(mask);
    }
    cut->ties = ties;
    return count;
}

static void FC_ISA(add)(fc_f32 *out, const fc_f32 *x, const fc_f32 *y, size_t n)
{
    for (size_t i = 0; i < n; i += NUM) {
        if (n - i >= NUM) {
            V total = FC_ISA(sum)(FC_ISA(fetch)(x + i), FC_ISA(fetch)(y + i));
            memcpy(out + i, &total, sizeof total);
        } else {
            V total = FC_ISA(sum)(FC_ISA(fetch_some)(x + i, n - i), FC_ISA(fetch_some)(y + i, n - i));
            memcpy(out + i, &total, (n - i) * sizeof(uint32_t));
        }
    }
}

// x += y where the sum is finite.
static void FC_ISA(settle)(fc_f32 *x, const fc_f32 *y, size_t n)
{
    const V most = FC_ISA(every)(0x7f7fffffu);
    for (size_t i = 0; i < n; i += NUM) {
        size_t num = n - i >= NUM ? NUM : n - i;
        V a = num == NUM ? FC_ISA(fetch)(x + i) : FC_ISA(fetch_some)(x + i, num);
        V b = num == NUM ? FC_ISA(fetch)(y + i) : FC_ISA(fetch_some)(y + i, num);
        V total = FC_ISA(sum)(a, b);
        total = FC_ISA(blend)(FC_ISA(above)(FC_ISA(key)(total), most), total, a);
        if (num == NUM) memcpy(x + i, &total, sizeof total);
        else memcpy(x + i, &total, num * sizeof(uint32_t));
    }
}

// key - low of every key in [low, low + width); low + width <= 2^31. `out` holds n + FC_SIEVE_SLACK.
static size_t FC_ISA(within)(const fc_u32 *x, size_t n, uint32_t low, uint32_t width, fc_u32 *out)
{
    const V limit = FC_ISA(every)(width);
    size_t count = 0;
    for (size_t i = 0; i < n; i += NUM) {
        unsigned valid = n - i >= NUM ? ALL : ALL >> (NUM - (n - i));
        V bits = valid == ALL ? FC_ISA(fetch)(x + i) : FC_ISA(fetch_some)(x + i, n - i);
        V off = FC_ISA(key)(bits) - low;                           // wraps below low, to 2^31 or more: negative
        unsigned mask = FC_ISA(above)(limit, off) & ~FC_ISA(above)(FC_ISA(every)(0), off) & valid;
        FC_ISA(pack)(out + count, off, mask);
        count += FC_ISA(ones)(mask);
    }
    return count;
}

static size_t FC_ISA(count)(const fc_u32 *x, size_t n, int32_t floor)
{
    const V least = FC_ISA(every)((uint32_t)floor);
    size_t count = 0;
    for (size_t i = 0; i < n; i += NUM) {
        unsigned valid = n - i >= NUM ? ALL : ALL >> (NUM - (n - i));
        V bits = valid == ALL ? FC_ISA(fetch)(x + i) : FC_ISA(fetch_some)(x + i, n - i);
        count += FC_ISA(ones)(FC_ISA(above)(FC_ISA(key)(bits), least) & valid);
    }
    return count;
}

FC_INLINE V FC_ISA(stir)(V h)  // a bijection of 32 bits with little bias (Wellons 2018, Prospecting for Hash Functions)
{
    h ^= h >> 16;
    h *= 0x7feb352du;
    h ^= h >> 15;
    h *= 0x846ca68bu;
    return h ^ h >> 16;
}

// Append every i < n for which the hash of first + i is at most `last`; return how many, stopping at room.
static size_t FC_ISA(draw)(uint32_t first, size_t n, uint32_t key0, uint32_t key1, uint32_t last, fc_u32 *idx,
                           size_t room)
{
    const V most = FC_ISA(every)(last);
    size_t count = 0;
    for (size_t i = 0; i < n && count < room; i += NUM) {
        unsigned valid = n - i >= NUM ? ALL : ALL >> (NUM - (n - i));
        V index = FC_ISA(counting)() + (uint32_t)i;
        V hash = FC_ISA(stir)(FC_ISA(stir)(index + (first + key0)) ^ key1);
        unsigned mask = FC_ISA(equal)(FC_ISA(least)(hash, most), hash) & valid;
        if (FC_ISA(ones)(mask) > room - count) mask = fc_lowest(mask, room - count);
        FC_ISA(append)(idx, count, room, index, mask);
        count += FC_ISA(ones)(mask);
    }
    return count;
}

static const fc_sieve FC_ISA(loops) = {
    .take = FC_ISA(take), .sift = FC_ISA(sift), .add = FC_ISA(add), .settle = FC_ISA(settle),
    .within = FC_ISA(within), .count = FC_ISA(count), .draw = FC_ISA(draw),
};

#undef V
#undef F
#undef NUM
#undef ALL
