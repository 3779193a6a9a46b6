/* Products on a processor's tile unit (Intel AMX), where it has one: 16 x 16 sums of 32 neighbouring products each in an
   instruction. Used for several tokens at once; a tile's rows are 16 tokens, its columns 16 rows of the weights.

   Few tokens on quantized weights: the same integer sums as quantized.h makes, scaled in the same order, so the result
   is the same to the last bit. What a tile gains is lost again in scaling each group's sums, and many tokens are better
   off with weights that were turned into bf16 once for all of them: 16 rows cost as much as 64 tokens' products. */

#if defined(__AMX_TILE__) && defined(__AMX_INT8__) && defined(__AMX_BF16__) && defined(__AVX512VNNI__) &&              \
    defined(__AVX512BW__) && defined(__linux__)
#define NATIVE_TILES 1
#include <sys/syscall.h>
#include <unistd.h>
#else
#define NATIVE_TILES 0
#endif

enum Path { VECTORS, BYTE_TILES, BF16_TILES };

#define FEW 8      /* tokens from which on tiles of bytes are faster than vectors */
#define SEVERAL 12 /* and tiles of bf16, where the weights are bf16 */
#define MANY 96    /* and where they are quantized */

#if NATIVE_TILES
#define SIDE 16   /* rows of a tile */
#define AT_ONCE 4 /* groups whose sums are made before they are scaled */

/* Linux hands out the tiles' registers only to processes that ask (ARCH_REQ_XCOMP_PERM for XTILEDATA). */
static int tiles_allowed(void) {
    static int known = -1;
    if (known < 0) known = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
    return known;
}

static enum Path path(const Linear *linear, int64_t tokens) {
    if (!tiles_allowed()) return VECTORS;
    if (NATIVE_BF16 && tokens >= (linear->bits ? MANY : SEVERAL)) return BF16_TILES;
    return linear->bits && tokens >= FEW ? BYTE_TILES : VECTORS;
}

/* Tiles 0-3 hold sums. bf16: 4 and 5 tokens, 6 and 7 weights, 32 columns deep. Bytes: 4 and 6, one group deep. */
static void configure(enum Path which) {
    struct {
        uint8_t palette, start, unused[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } tiles = {.palette = 1};
    for (int i = 0; i < 8; i++) tiles.bytes[i] = 64, tiles.rows[i] = SIDE;
    if (which == BYTE_TILES) tiles.bytes[4] = GROUP, tiles.rows[6] = GROUP / 4;
    _tile_loadconfig(&tiles);
}

/* Unused tiles need not be kept when the thread is interrupted. */
static void release_tiles(void) {
    if (tiles_allowed()) _tile_release();
}

/* Bytes that a thread works in. */
static int64_t tile_bytes(int64_t tokens, int64_t columns) {
    int64_t panel = 2 * BLOCK * ROUND_UP(columns, GROUP) * 2, totals = ROUND_UP(tokens, SIDE) * BLOCK * 4;
    return panel > totals ? panel : totals;
}

#define AHEAD 4096 /* bytes of weights that are asked for before they are needed: 12 % of a step of 64 tokens */

/* Groups of a block as signed bytes, in the order in which they lie: what a tile of weights reads. */
static void unpack_groups(const uint8_t *block, int64_t groups, int64_t bits, int8_t *out) {
    for (int64_t i = 0; i < groups * BLOCK * GROUP * bits / 8; i += 64) __builtin_prefetch(block + i + AHEAD);
    if (bits == 8) {
        for (int64_t i = 0; i < groups * STEPS; i++)
            _mm512_store_si512(out + i * 64, _mm512_xor_si512(_mm512_loadu_si512(block + i * 64), _mm512_set1_epi8(-128)));
        return;
    }
    const __m512i low = _mm512_set1_epi8(15), eight = _mm512_set1_epi8(8);
    for (int64_t i = 0; i < groups * STEPS / 2; i++) {
        __m512i both = _mm512_loadu_si512(block + i * 64);
        _mm512_store_si512(out + i * 128, _mm512_sub_epi8(_mm512_and_si512(both, low), eight));
        _mm512_store_si512(out + i * 128 + 64, _mm512_sub_epi8(_mm512_and_si512(_mm512_srli_epi16(both, 4), low), eight));
    }
}

/* Rows of a block times all tokens, totals (tokens, BLOCK). */
static void byte_tiles(const Linear *linear, int64_t index, const Input *in, int64_t tokens, float *totals) {
    int64_t groups = ROUND_UP(linear->columns, GROUP) / GROUP, all = in->stride / GROUP;
    int64_t group_bytes = linear->bits * BLOCK * GROUP / 8;
    const uint8_t *block = (const uint8_t *)linear->values + index * groups * group_bytes;
    const uint16_t *scales = linear->scales + index * groups * BLOCK;
    int8_t weights[AT_ONCE * BLOCK * GROUP] __attribute__((aligned(64)));
    int32_t sums[AT_ONCE][SIDE][BLOCK] __attribute__((aligned(64)));
    memset(totals, 0, sizeof(float) * (size_t)(tokens * BLOCK));
    for (int64_t g = 0; g < groups; g += AT_ONCE) {
        int count = (int)MIN(AT_ONCE, groups - g);
        floats scale[AT_ONCE];
        unpack_groups(block + g * group_bytes, count, linear->bits, weights);
        for (int i = 0; i < count; i++) scale[i] = load_scales(scales + (g + i) * BLOCK);
        for (int64_t token = 0; token < tokens; token += SIDE) {
            const int8_t *x = in->values + token * in->stride + g * GROUP;
#define SUM(tile)                                                                                                      \
    if (tile < count) {                                                                                                \
        _tile_zero(tile);                                                                                              \
        _tile_loadd(4, x + tile * GROUP, in->stride);                                                                  \
        _tile_loadd(6, weights + tile * BLOCK * GROUP, 64);                                                            \
        _tile_dpbssd(tile, 4, 6);                                                                                      \
        _tile_stored(tile, sums[tile], 64);                                                                            \
    }
            SUM(0) SUM(1) SUM(2) SUM(3)
#undef SUM
            const float *x_scales = in->scales + token * all + g;
            for (int64_t t = 0; t < MIN(SIDE, tokens - token); t++) {
                floats total;
                memcpy(&total, totals + (token + t) * BLOCK, sizeof total);
                for (int i = 0; i < count; i++)
                    total += to_floats(_mm512_load_si512(sums[i][t])) * (scale[i] * x_scales[t * all + i]);
                memcpy(totals + (token + t) * BLOCK, &total, sizeof total);
            }
        }
    }
}

#if NATIVE_BF16
/* 32 columns of 16 rows, of which there are `count` columns and the rest is 0, as a tile of 16 lines. */
INLINE void transpose_rows(const uint16_t *const *row, int64_t at, int64_t count, uint16_t *out) {
    __m512i v[16];
    __mmask32 mask = count < 32 ? ((__mmask32)1 << count) - 1 : 0xFFFFFFFF;
    for (int r = 0; r < 16; r++) v[r] = _mm512_maskz_loadu_epi16(mask, row[r] + at);
    transpose(v);
    for (int r = 0; r < 16; r++) _mm512_storeu_si512(out + r * 32, v[r]);
}

/* Pairs of bf16, rounded to the nearest, from even and odd columns. */
INLINE __m512i to_pairs(__m512 even, __m512 odd) {
    const __m512i half = _mm512_set1_epi32(0x8000);
    __m512i low = _mm512_srli_epi32(_mm512_add_epi32(_mm512_castps_si512(even), half), 16);
    return _mm512_mask_blend_epi16(0xAAAAAAAA, low, _mm512_add_epi32(_mm512_castps_si512(odd), half));
}

/* A group of 16 quantized rows as bf16. A byte b put behind the exponent of 2^15 is the float 2^15 + b; one multiply-add
   with the scale, exact up to its own rounding, makes the weight of it. */
INLINE void dequantize_group(const uint8_t *group, const uint16_t *scales, const int bits, uint16_t *out) {
    const __m512i exponent = _mm512_set1_epi32(0x47000000);
    __m512 scale = (__m512)load_scales(scales);
    __m512 offset = _mm512_mul_ps(scale, _mm512_set1_ps(bits == 8 ? -32768.0f - 128.0f : -32768.0f - 8.0f));
#pragma GCC unroll 8
    for (int step = 0; step < STEPS; step++) {
        __m512i bytes = load_step(group, step, bits);
        __m512 column[4];
#pragma GCC unroll 4
        for (int c = 0; c < 4; c++) {
            __m512i place = _mm512_set_epi32(
                c * 256 + 0xC00, c * 256 + 0x800, c * 256 + 0x400, c * 256, c * 256 + 0xC00, c * 256 + 0x800,
                c * 256 + 0x400, c * 256, c * 256 + 0xC00, c * 256 + 0x800, c * 256 + 0x400, c * 256, c * 256 + 0xC00,
                c * 256 + 0x800, c * 256 + 0x400, c * 256);
            __m512i number = _mm512_mask_shuffle_epi8(exponent, 0x2222222222222222, bytes, place);
            column[c] = _mm512_fmadd_ps(_mm512_castsi512_ps(number), scale, offset);
        }
        _mm512_storeu_si512(out + step * 64, to_pairs(column[0], column[1]));
        _mm512_storeu_si512(out + step * 64 + 32, to_pairs(column[2], column[3]));
    }
}

/* A block of 16 rows as bf16: (columns / 32, 16 pairs, 16 rows, 2). */
static void fill_panel(const Linear *linear, int64_t index, uint16_t *out) {
    int64_t groups = ROUND_UP(linear->columns, GROUP) / GROUP;
    if (linear->bits) {
        const uint8_t *block = (const uint8_t *)linear->values + index * groups * linear->bits * BLOCK * GROUP / 8;
        const uint16_t *scales = linear->scales + index * groups * BLOCK;
        for (int64_t g = 0; g < groups; g++, out += BLOCK * GROUP, scales += BLOCK) {
            if (linear->bits == 8) dequantize_group(block + g * BLOCK * GROUP, scales, 8, out);
            else dequantize_group(block + g * BLOCK * GROUP / 2, scales, 4, out);
        }
        return;
    }
    const uint16_t *row[BLOCK];
    for (int r = 0; r < BLOCK; r++)
        row[r] = (const uint16_t *)linear->values + MIN(index * BLOCK + r, linear->rows - 1) * linear->columns;
    for (int64_t g = 0; g < groups; g++)
        transpose_rows(row, g * GROUP, linear->columns - g * GROUP, out + g * BLOCK * GROUP);
}

/* Up to 32 tokens times 32 rows (two blocks of the panel, `depth` groups each), out (32, 32). */
INLINE void bf16_tile(const uint16_t *x, int64_t stride, const uint16_t *panel, int64_t depth, const int both,
                      float (*out)[2 * BLOCK]) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    const uint16_t *other = panel + depth * BLOCK * GROUP;
    for (int64_t g = 0; g < depth; g++) {
        _tile_loadd(6, panel + g * BLOCK * GROUP, 64);
        _tile_loadd(4, x + g * GROUP, stride * 2);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, other + g * BLOCK * GROUP, 64);
        _tile_dpbf16ps(1, 4, 7);
        if (both) {
            _tile_loadd(5, x + SIDE * stride + g * GROUP, stride * 2);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, out[0], 128);
    _tile_stored(1, out[0] + BLOCK, 128);
    if (both) {
        _tile_stored(2, out[SIDE], 128);
        _tile_stored(3, out[SIDE] + BLOCK, 128);
    }
}
#endif
#endif
