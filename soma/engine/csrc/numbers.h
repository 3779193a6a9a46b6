/* Numbers in vectors of 16 lanes: GCC's vector types, which every machine's instructions can be made of. */

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __x86_64__
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define ROUND_UP(n, step) (((n) + (step) - 1) / (step) * (step))

typedef float floats __attribute__((vector_size(64)));
typedef int32_t integers __attribute__((vector_size(64)));

INLINE float bf16_to_float(uint16_t value) {
    uint32_t bits = (uint32_t)value << 16;
    float result;
    memcpy(&result, &bits, 4);
    return result;
}
INLINE uint16_t float_to_bf16(float value) { /* to the nearest, ties to even */
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return value != value ? 0x7FC0 : (uint16_t)((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}
INLINE float half_to_float(uint16_t value) { /* not for infinities: scales are finite */
    uint32_t bits = (uint32_t)(value & 0x7FFF) << 13;
    float result;
    memcpy(&result, &bits, 4);
    return (value & 0x8000 ? -0x1p112f : 0x1p112f) * result;
}

#if WEIGHT_BF16
typedef uint16_t weight;
INLINE float load(weight value) { return bf16_to_float(value); }
INLINE weight store(float value) { return float_to_bf16(value); }
#else
typedef float weight;
INLINE float load(weight value) { return value; }
INLINE weight store(float value) { return value; }
#endif

/* What matrix products read on the activations' side: bf16 where the processor multiplies bf16 (two products a lane and
   instruction), else float32. `madd` adds to 16 partial sums the products of LANES neighbouring numbers. */
#if WEIGHT_BF16 && defined(__AVX512BF16__) && defined(__AVX512BW__)
#define NATIVE_BF16 1
#define LANES 32
typedef uint16_t operand;
typedef __m512bh chunk;
INLINE operand to_operand(float value) { return float_to_bf16(value); }
INLINE chunk load_chunk(const operand *from) { return (chunk)_mm512_loadu_si512(from); }
INLINE chunk load_weights(const weight *from) { return (chunk)_mm512_loadu_si512(from); }
INLINE chunk load_some(const weight *from, int64_t count) { /* the rest is 0 */
    return (chunk)_mm512_maskz_loadu_epi16((__mmask32)(((uint64_t)1 << count) - 1), from);
}
INLINE floats madd(floats sum, chunk a, chunk b) { return (floats)_mm512_dpbf16_ps((__m512)sum, a, b); }
#else
#define NATIVE_BF16 0
#define LANES 16
typedef float operand;
typedef floats chunk;
INLINE operand to_operand(float value) { return value; }
INLINE chunk load_chunk(const operand *from) {
    chunk result;
    memcpy(&result, from, sizeof result);
    return result;
}
INLINE chunk load_weights(const weight *from) {
#if WEIGHT_BF16
    typedef uint16_t shorts __attribute__((vector_size(32)));
    typedef uint32_t words __attribute__((vector_size(64)));
    shorts bits;
    memcpy(&bits, from, sizeof bits);
    return (chunk)(__builtin_convertvector(bits, words) << 16);
#else
    return load_chunk(from);
#endif
}
INLINE chunk load_some(const weight *from, int64_t count) {
    weight buffer[LANES] = {0};
    memcpy(buffer, from, sizeof(weight) * (size_t)count);
    return load_weights(buffer);
}
INLINE floats madd(floats sum, chunk a, chunk b) { return sum + a * b; }
#endif

INLINE void to_operands(const float *from, int64_t count, operand *out) {
    int64_t i = 0;
#if NATIVE_BF16
    for (; i + 16 <= count; i += 16)
        _mm256_storeu_si256((__m256i *)(out + i), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(from + i)));
#endif
    for (; i < count; i++) out[i] = to_operand(from[i]);
}

INLINE void to_weights(const float *from, int64_t count, weight *out) {
#if NATIVE_BF16
    to_operands(from, count, out);
#else
    for (int64_t i = 0; i < count; i++) out[i] = store(from[i]);
#endif
}

#if NATIVE_BF16
/* 16 rows of 16 pairs become 16 lines of pairs of the 16 rows: what a tile of weights or keys reads. */
INLINE void transpose(__m512i *v) {
    __m512i a[16];
#define EACH for (int i = 0; i < 16; i += 4)
    for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
    EACH {
        v[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
        v[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
        v[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
        v[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        a[i] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0x88);
        a[i + 4] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0xDD);
        a[i + 8] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0x88);
        a[i + 12] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0xDD);
    }
    for (int i = 0; i < 4; i++) {
        v[i] = _mm512_shuffle_i32x4(a[i], a[i + 8], 0x88);
        v[i + 8] = _mm512_shuffle_i32x4(a[i], a[i + 8], 0xDD);
        v[i + 4] = _mm512_shuffle_i32x4(a[i + 4], a[i + 12], 0x88);
        v[i + 12] = _mm512_shuffle_i32x4(a[i + 4], a[i + 12], 0xDD);
    }
#undef EACH
}
#endif

/* 16 neighbouring weights as floats. */
INLINE floats load_floats(const weight *from) {
#if NATIVE_BF16
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from));
    return (floats)_mm512_slli_epi32(wide, 16);
#else
    return (floats)load_weights(from);
#endif
}

/* Sums over the lanes of four vectors. The order of additions is the same for each, so that a product does not depend on
   which others are made with it. */
INLINE void sum4(floats a, floats b, floats c, floats d, float *out) {
#ifdef __AVX512F__
    __m512 A = (__m512)a, B = (__m512)b, C = (__m512)c, D = (__m512)d;
    __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(A, B), _mm512_unpackhi_ps(A, B));
    __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(C, D), _mm512_unpackhi_ps(C, D));
    __m512 sums = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xEE));
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(sums), _mm512_castps512_ps256(_mm512_shuffle_f32x4(sums, sums, 0x0E)));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
#else
    floats all[4] = {a, b, c, d};
    for (int i = 0; i < 4; i++) {
        float sum[8];
        for (int lane = 0; lane < 8; lane++) sum[lane] = all[i][lane] + all[i][lane + 8];
        out[i] = ((sum[0] + sum[4]) + (sum[2] + sum[6])) + ((sum[1] + sum[5]) + (sum[3] + sum[7]));
    }
#endif
}

/* Sixteen numbers from `from`, of which `count` exist; the rest is 0. */
INLINE floats some_floats(const float *from, int64_t count) {
    floats result = {0};
    if (count >= 16) memcpy(&result, from, sizeof result);
    else memcpy(&result, from, sizeof(float) * (size_t)count);
    return result;
}

/* The larger of two numbers in each lane; b where one of them is none. */
INLINE floats larger(floats a, floats b) {
#ifdef __AVX512F__
    return (floats)_mm512_max_ps((__m512)a, (__m512)b);
#else
    integers is_a = a > b;
    return (floats)(((integers)a & is_a) | ((integers)b & ~is_a));
#endif
}

/* e^x within 2 units in the last place (Cephes' polynomial); 0 below -87, and at most e^88. */
INLINE floats exponentials(floats x) {
    const floats zero = {0};
    integers is_small = x < zero - 87.0f;
    x = larger(zero - 87.0f, x);
    x = -larger(zero - 88.0f, -x);
    floats n = (x * 1.44269504f + 12582912.0f) - 12582912.0f; /* 1.5 * 2^23: rounds to whole numbers */
    floats r = x - n * 0.693359375f + n * 2.12194440e-4f;
    floats p = zero + 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    integers bits = (__builtin_convertvector(n, integers) + 127) << 23;
    return (floats)((integers)(p * (floats)bits) & ~is_small);
}

/* x / sqrt(mean(x²) + epsilon) · gain; `out` may be `x`. */
static inline void rms_norm(const float *x, const weight *gain, int64_t count, float epsilon, float *out) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < count; i++) sum += x[i] * x[i];
    float scale = 1.0f / sqrtf(sum / (float)count + epsilon);
    for (int64_t i = 0; i < count; i++) out[i] = x[i] * scale * load(gain[i]);
}
