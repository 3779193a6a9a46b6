/* Products with weights of 8 and 4 bits. A block of 16 rows lies as soma/model/quantized.py packs it: for each group of
   32 columns eight vectors of 16 rows x 4 columns, unsigned (value + 128, or value + 8 as two vectors in the low and high
   halves of one). An instruction multiplies a vector with four numbers of a token and adds to 16 sums of 32 bits; after a
   group these are scaled into float32. The token's scale of the group comes in there, so 8 bits do for activations. */

#define STEPS (GROUP / 4) /* vectors of a group */

/* `dot` adds u·x for vector `step` of a group; `start` is what a sum begins with to take the weights' offset back. */
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
typedef __m512i sums16;
typedef __m512i vector;
INLINE sums16 start(int32_t sum, int bits) { return _mm512_set1_epi32(bits == 8 ? -128 * sum : -8 * sum); }
INLINE vector load_step(const uint8_t *group, int step, const int bits) {
    if (bits == 8) return _mm512_loadu_si512(group + step * 64);
    __m512i both = _mm512_loadu_si512(group + step / 2 * 64);
    return _mm512_and_si512(step % 2 ? _mm512_srli_epi16(both, 4) : both, _mm512_set1_epi8(15));
}
INLINE sums16 dot(sums16 sum, vector u, const int8_t *x, const int bits) {
    int32_t four;
    (void)bits;
    memcpy(&four, x, 4);
    return _mm512_dpbusd_epi32(sum, u, _mm512_set1_epi32(four));
}
INLINE floats to_floats(sums16 sum) { return (floats)_mm512_cvtepi32_ps(sum); }
INLINE floats load_scales(const uint16_t *scales) {
    return (floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)scales));
}
#elif defined(__AVX2__)
/* vpmaddubsw saturates at 16 bits: 8-bit weights are made signed, their sign moved to x, which keeps |u·x| pairs below
   2·127·127. */
typedef struct { __m256i low, high; } sums16;
typedef sums16 vector;
INLINE sums16 start(int32_t sum, int bits) {
    __m256i value = _mm256_set1_epi32(bits == 8 ? 0 : -8 * sum);
    return (sums16){value, value};
}
INLINE __m256i load_half(const uint8_t *from, int step, const int bits) {
    __m256i u = _mm256_loadu_si256((const __m256i *)from);
    if (bits == 8) return _mm256_xor_si256(u, _mm256_set1_epi8(-128));
    return _mm256_and_si256(step % 2 ? _mm256_srli_epi16(u, 4) : u, _mm256_set1_epi8(15));
}
INLINE vector load_step(const uint8_t *group, int step, const int bits) {
    const uint8_t *from = group + (bits == 8 ? step : step / 2) * 64;
    return (vector){load_half(from, step, bits), load_half(from + 32, step, bits)};
}
INLINE __m256i dot_half(__m256i sum, __m256i w, __m256i x, const int bits) {
    if (bits == 8) x = _mm256_sign_epi8(x, w), w = _mm256_abs_epi8(w);
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1)));
}
INLINE sums16 dot(sums16 sum, vector w, const int8_t *x, const int bits) {
    int32_t four;
    memcpy(&four, x, 4);
    __m256i all = _mm256_set1_epi32(four);
    return (sums16){dot_half(sum.low, w.low, all, bits), dot_half(sum.high, w.high, all, bits)};
}
INLINE floats to_floats(sums16 sum) {
    floats result;
    _mm256_storeu_ps((float *)&result, _mm256_cvtepi32_ps(sum.low));
    _mm256_storeu_ps((float *)&result + 8, _mm256_cvtepi32_ps(sum.high));
    return result;
}
INLINE floats load_scales(const uint16_t *scales) {
    floats result;
    for (int i = 0; i < BLOCK; i++) result[i] = half_to_float(scales[i]);
    return result;
}
#else
typedef int32_t sums16 __attribute__((vector_size(64)));
typedef struct { uint8_t bytes[64]; } vector;
INLINE sums16 start(int32_t sum, int bits) { return (sums16){0} + (bits == 8 ? -128 * sum : -8 * sum); }
INLINE vector load_step(const uint8_t *group, int step, const int bits) {
    vector u;
    memcpy(&u, group + (bits == 8 ? step : step / 2) * 64, 64);
    if (bits == 4)
        for (int i = 0; i < 64; i++) u.bytes[i] = step % 2 ? u.bytes[i] >> 4 : u.bytes[i] & 15;
    return u;
}
INLINE sums16 dot(sums16 sum, vector u, const int8_t *x, const int bits) {
    (void)bits;
    for (int r = 0; r < BLOCK; r++)
        sum[r] += u.bytes[4 * r] * x[0] + u.bytes[4 * r + 1] * x[1] + u.bytes[4 * r + 2] * x[2] + u.bytes[4 * r + 3] * x[3];
    return sum;
}
INLINE floats to_floats(sums16 sum) { return __builtin_convertvector(sum, floats); }
INLINE floats load_scales(const uint16_t *scales) {
    floats result;
    for (int i = 0; i < BLOCK; i++) result[i] = half_to_float(scales[i]);
    return result;
}
#endif

INLINE void quantized_tile(const uint8_t *block, const uint16_t *scales, int64_t groups, const Input *in, int64_t token,
                           const int tokens, const int bits, float (*out)[BLOCK]) {
    const int8_t *x = in->values + token * in->stride;
    int64_t all = in->stride / GROUP;
    const float *x_scales = in->scales + token * all;
    const int32_t *x_sums = in->sums + token * all;
    floats total[QUANTIZED_TOKENS];
    for (int t = 0; t < tokens; t++) total[t] = (floats){0};
    for (int64_t g = 0; g < groups; g++) {
        sums16 sum[QUANTIZED_TOKENS];
        for (int t = 0; t < tokens; t++) sum[t] = start(x_sums[t * all + g], bits);
#pragma GCC unroll 8
        for (int step = 0; step < STEPS; step++) {
            vector u = load_step(block, step, bits);
            for (int t = 0; t < tokens; t++) sum[t] = dot(sum[t], u, x + t * in->stride + g * GROUP + step * 4, bits);
        }
        floats scale = load_scales(scales + g * BLOCK);
        for (int t = 0; t < tokens; t++) total[t] += to_floats(sum[t]) * (scale * x_scales[t * all + g]);
        block += bits * BLOCK * GROUP / 8;
    }
    for (int t = 0; t < tokens; t++) memcpy(out[t], &total[t], sizeof total[t]);
}

static void quantized_block(const Linear *linear, int64_t index, const Input *in, int64_t token, int tokens,
                            float (*out)[BLOCK]) {
    int64_t groups = ROUND_UP(linear->columns, GROUP) / GROUP;
    const uint8_t *block = (const uint8_t *)linear->values + index * groups * linear->bits * BLOCK * GROUP / 8;
    const uint16_t *scales = linear->scales + index * groups * BLOCK;
#define TILE(count)                                                                                                    \
    case count:                                                                                                        \
        if (linear->bits == 8) quantized_tile(block, scales, groups, in, token, count, 8, out);                        \
        else quantized_tile(block, scales, groups, in, token, count, 4, out);                                          \
        break;
    switch (tokens) {
        TILE(1) TILE(2)
#if QUANTIZED_TOKENS > 2
        TILE(3) TILE(4) TILE(5) TILE(6) TILE(7) TILE(8)
#endif
    }
#undef TILE
}
