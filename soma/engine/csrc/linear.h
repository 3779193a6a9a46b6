/* y = x Wᵀ for any number of tokens, the weights read once: a block of 16 rows is multiplied with all tokens while it is
   in the nearest cache. One token runs at the speed of memory, many at that of the multipliers. Each number is summed in
   the same order however many tokens there are, so a token's result does not depend on its company; but for bf16 tiles
   (tiles.h), which round otherwise. */

#define BLOCK 16  /* rows that a thread takes at a time */
#ifdef __AVX2__
#define TOKENS 6 /* tokens of a tile: 6 x 4 sums leave registers for what is multiplied */
#define QUANTIZED_TOKENS 8
#else /* a vector takes four registers here; larger tiles spill, and take half a minute to compile */
#define TOKENS 2
#define QUANTIZED_TOKENS 2
#endif
#define GROUP 32  /* neighbouring numbers of a row, or of a token, that share a scale */

/* bits 0: `values` are rows of `columns` weights. 8 or 4: blocks of 16 rows as soma/model/quantized.py packs them, with
   `scales` (blocks, groups, 16) in float16. `bias` is NULL where there is none. */
typedef struct {
    const void *values;
    const uint16_t *scales;
    const weight *bias;
    int64_t rows, columns, bits;
} Linear;

/* Activations as products read them: `dense` (tokens, stride), and for quantized weights `values` (tokens, stride) with
   a scale for each group, and its sum, which takes the offset of unsigned weights back. The rest of a row is 0.
   `low` (tokens, readers, shift.most): what the tokens' adapters make of them, see lora.h. */
typedef struct {
    int64_t stride;
    operand *dense;
    int8_t *values;
    float *scales;
    int32_t *sums;
    float *low;
    int readers;
    Shift shift;
} Input;

/* Round one token to 8 bits, a scale for each 32 numbers: a large one spoils only its neighbours. */
static void quantize(const float *x, int64_t columns, int8_t *values, float *scales, int32_t *sums) {
    for (int64_t first = 0; first < columns; first += GROUP) {
        float part[GROUP] = {0}, top = 0;
        int8_t rounded[GROUP];
        int32_t sum = 0;
        memcpy(part, x + first, sizeof(float) * (size_t)MIN(GROUP, columns - first));
#pragma omp simd reduction(max : top)
        for (int i = 0; i < GROUP; i++) top = fabsf(part[i]) > top ? fabsf(part[i]) : top;
        float inverse = top > 0 ? 127.0f / top : 0;
#pragma omp simd reduction(+ : sum)
        for (int i = 0; i < GROUP; i++) {
            int32_t value = (int32_t)rintf(part[i] * inverse);
            rounded[i] = (int8_t)value;
            sum += value;
        }
        memcpy(values + first, rounded, GROUP);
        scales[first / GROUP] = top / 127.0f;
        sums[first / GROUP] = sum;
    }
}

/* Make token `t` of the input from `x`, in the forms that are asked for. */
static void prepare(const Input *in, int64_t t, const float *x, int64_t columns, int dense, int quantized) {
    if (dense) {
        operand *out = in->dense + t * in->stride;
        to_operands(x, columns, out);
        for (int64_t i = columns; i < ROUND_UP(columns, GROUP); i++) out[i] = 0;
    }
    if (quantized) {
        int64_t groups = in->stride / GROUP;
        quantize(x, columns, in->values + t * in->stride, in->scales + t * groups, in->sums + t * groups);
    }
}

/* `tokens` tokens times `rows` (4 or 8) rows, whole sums in registers. */
INLINE void dense_tile(const weight *const *row, int64_t columns, const operand *x, int64_t stride, const int tokens,
                       const int rows, float (*out)[BLOCK]) {
    floats sum[TOKENS][8];
    for (int t = 0; t < tokens; t++)
        for (int r = 0; r < rows; r++) sum[t][r] = (floats){0};
    int64_t i = 0;
    for (; i + LANES <= columns; i += LANES) {
        chunk w[8];
        for (int r = 0; r < rows; r++) w[r] = load_weights(row[r] + i);
        for (int t = 0; t < tokens; t++) {
            chunk here = load_chunk(x + t * stride + i);
            for (int r = 0; r < rows; r++) sum[t][r] = madd(sum[t][r], here, w[r]);
        }
    }
    if (i < columns)
        for (int r = 0; r < rows; r++) {
            chunk w = load_some(row[r] + i, columns - i);
            for (int t = 0; t < tokens; t++) sum[t][r] = madd(sum[t][r], load_chunk(x + t * stride + i), w);
        }
    for (int t = 0; t < tokens; t++)
        for (int r = 0; r < rows; r += 4) sum4(sum[t][r], sum[t][r + 1], sum[t][r + 2], sum[t][r + 3], out[t] + r);
}

static void dense_block(const Linear *linear, int64_t first, const Input *in, int64_t token, int tokens,
                        float (*out)[BLOCK]) {
    const weight *row[BLOCK];
    const operand *x = in->dense + token * in->stride;
    for (int r = 0; r < BLOCK; r++)
        row[r] = (const weight *)linear->values + MIN(first + r, linear->rows - 1) * linear->columns;
#define TILE(count, rows)                                                                                              \
    case count:                                                                                                        \
        for (int r = 0; r < BLOCK; r += rows)                                                                          \
            dense_tile(row + r, linear->columns, x, in->stride, count, rows, (float(*)[BLOCK])(out[0] + r));           \
        break;
    switch (tokens) {
        TILE(1, 8) TILE(2, 4)
#if TOKENS > 2
        TILE(3, 4) TILE(4, 4) TILE(5, 4) TILE(6, 4)
#endif
    }
#undef TILE
}

#include "quantized.h"

#include "tiles.h"

enum Mode { STORE, ADD, GATED }; /* GATED: y = silu(y) · result */

INLINE void finish_some(const Linear *linear, int64_t first, const int64_t count, const float *result, enum Mode mode,
                        float *y) {
    floats sum = some_floats(result, BLOCK), before = {0};
    if (linear->bias) {
        float bias[BLOCK] = {0};
        for (int64_t r = 0; r < count; r++) bias[r] = load(linear->bias[first + r]);
        sum += some_floats(bias, BLOCK);
    }
    if (mode != STORE) before = some_floats(y, count);
    if (mode == ADD) sum += before;
    if (mode == GATED) sum *= before / (1.0f + exponentials(-before));
    memcpy(y, &sum, sizeof(float) * (size_t)count);
}

INLINE void finish(const Linear *linear, int64_t first, const float *result, enum Mode mode, float *y) {
    if (linear->rows - first >= BLOCK) finish_some(linear, first, BLOCK, result, mode, y);
    else finish_some(linear, first, linear->rows - first, result, mode, y);
}

/* What a block of rows gives for a token, with what the token's adapter adds. */
static void deliver(const Linear *linear, int64_t first, const Input *in, int reader, int64_t token, float *result,
                    enum Mode mode, float *y) {
    if (in->shift.of)
        expand(&in->shift, token, reader, first / BLOCK, in->low + token * in->readers * in->shift.most, result);
    finish(linear, first, result, mode, y + first);
}

static void block_in_vectors(const Linear *linear, int64_t first, const Input *in, int reader, int64_t tokens,
                             enum Mode mode, float *y, int64_t stride) {
    int most = linear->bits ? QUANTIZED_TOKENS : TOKENS;
    for (int64_t token = 0; token < tokens; token += most) {
        float out[QUANTIZED_TOKENS][BLOCK] __attribute__((aligned(64)));
        int count = (int)MIN(most, tokens - token);
        if (linear->bits) quantized_block(linear, first / BLOCK, in, token, count, out);
        else dense_block(linear, first, in, token, count, out);
        for (int t = 0; t < count; t++)
            deliver(linear, first, in, reader, token + t, out[t], mode, y + (token + t) * stride);
    }
}

#if NATIVE_TILES
/* Two blocks of rows, if there are two. */
static void blocks_in_tiles(const Linear *linear, int64_t first, const Input *in, int reader, int64_t tokens,
                            enum Mode mode, float *y, int64_t stride, void *memory, enum Path path) {
    int blocks = first + BLOCK < linear->rows ? 2 : 1;
    if (path == BYTE_TILES) {
        for (int64_t row = first; row < first + blocks * BLOCK; row += BLOCK) {
            byte_tiles(linear, row / BLOCK, in, tokens, memory);
            for (int64_t t = 0; t < tokens; t++)
                deliver(linear, row, in, reader, t, (float *)memory + t * BLOCK, mode, y + t * stride);
        }
        return;
    }
#if NATIVE_BF16
    int64_t depth = ROUND_UP(linear->columns, GROUP) / GROUP;
    for (int b = 0; b < blocks; b++)
        fill_panel(linear, first / BLOCK + b, (uint16_t *)memory + b * depth * BLOCK * GROUP);
    for (int64_t token = 0; token < tokens; token += 2 * SIDE) {
        float out[2 * SIDE][2 * BLOCK] __attribute__((aligned(64)));
        const uint16_t *x = in->dense + token * in->stride;
        if (tokens - token > SIDE) bf16_tile(x, in->stride, memory, depth, 1, out);
        else bf16_tile(x, in->stride, memory, depth, 0, out);
        for (int64_t t = 0; t < MIN(2 * SIDE, tokens - token); t++)
            for (int b = 0; b < blocks; b++)
                deliver(linear, first + b * BLOCK, in, reader, token + t, out[t] + b * BLOCK, mode,
                        y + (token + t) * stride);
    }
#endif
}
#else
static void release_tiles(void) {}
static int64_t tile_bytes(int64_t tokens, int64_t columns) { return 0 * tokens * columns; }
static enum Path path(const Linear *linear, int64_t tokens) { return (void)linear, (void)tokens, VECTORS; }
#endif

/* One of the products that read an input. y: (tokens, stride). */
typedef struct {
    const Linear *linear;
    enum Mode mode;
    float *y;
    int64_t stride;
} Product;

/* Rows `first` to `first + unit - 1` of a product; `set`: what the tile unit is set up for. */
static void multiply_rows(const Product *p, int reader, int64_t first, int64_t unit, const Input *in, int64_t tokens,
                          void *memory, enum Path *set) {
#if NATIVE_TILES
    enum Path which = path(p->linear, tokens);
    if (which != VECTORS) {
        if (which != *set) configure(which);
        *set = which;
        blocks_in_tiles(p->linear, first, in, reader, tokens, p->mode, p->y, p->stride, memory, which);
        return;
    }
#else
    (void)memory, (void)set;
#endif
    for (int64_t row = first; row < MIN(first + unit, p->linear->rows); row += BLOCK)
        block_in_vectors(p->linear, row, in, reader, tokens, p->mode, p->y, p->stride);
}

/* Products that read one input, between two meetings of the team. GATED ones are made with the one before them, rows by
   rows. memory: a thread's own `tile_bytes`. */
static void multiply(Team *team, int thread, const Product *products, int count, const Input *in, int64_t tokens,
                     void *memory) {
    int64_t unit = tokens < FEW ? BLOCK : 2 * BLOCK, units = 0;
    enum Path set = VECTORS;
    for (int p = 0; p < count; p++)
        if (products[p].mode != GATED) units += ROUND_UP(products[p].linear->rows, unit) / unit;
    for (Taken t = share(team, thread, units, 1); take(team, &t);)
        for (int64_t i = t.from; i < t.to; i++) {
            int64_t at = i, p = 0;
            for (int64_t mine; at >= (mine = ROUND_UP(products[p].linear->rows, unit) / unit); p++) at -= mine;
            multiply_rows(&products[p], (int)p, at * unit, unit, in, tokens, memory, &set);
            if (p + 1 < count && products[p + 1].mode == GATED)
                multiply_rows(&products[p + 1], (int)p + 1, at * unit, unit, in, tokens, memory, &set);
        }
}
