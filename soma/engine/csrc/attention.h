/* Attention over the paged cache. An item of work is a tile of a sequence's new tokens and one key/value head with the
   G query heads that share it: G x tokens rows, so that keys are read once for all of them. Softmax runs online (arXiv:
   1805.02867) over chunks of KEYS keys, which are read where they lie in the cache: nothing is gathered in memory. */

#define KEYS 64
#define ROWS 128 /* rows of an item, unless one token alone has more heads: keys are packed once for all of them */

/* Key j of the sequence at hand, for one layer and head. */
typedef struct {
    const void *keys, *values;              /* weights, or int8 where there are scales */
    const float *key_scales, *value_scales; /* of each row */
    const int32_t *table;
    int64_t shift, mask, block_stride, before, width;
} Pages;

INLINE int64_t place(const Pages *p, int64_t j) {
    return (int64_t)p->table[j >> p->shift] * p->block_stride + p->before + (j & p->mask) * p->width;
}

/* A row as 8-bit numbers, symmetric; its scale. */
static float round_row(const float *x, int64_t count, int8_t *out) {
    float top = 0;
#pragma omp simd reduction(max : top)
    for (int64_t i = 0; i < count; i++) top = fabsf(x[i]) > top ? fabsf(x[i]) : top;
    float scale = top / 127.0f, inverse = scale > 0 ? 1.0f / scale : 0;
    for (int64_t i = 0; i < count; i++) {
        float value = rintf(x[i] * inverse);
        out[i] = (int8_t)(value > 127.0f ? 127.0f : (value < -127.0f ? -127.0f : value));
    }
    return scale;
}

/* Rows of 8-bit numbers as weights, one behind the other. */
static void widen(const int8_t *rows, const float *scales, const int64_t *at, int64_t from, int64_t to, int64_t width,
                  weight *out) {
    for (int64_t j = from; j < to; j++) {
        const int8_t *row = rows + at[j];
        float scale = scales[at[j] / width];
        int64_t e = 0;
#if NATIVE_BF16
        for (; e + 16 <= width; e += 16) {
            __m512 x = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(row + e))));
            __m256i narrow = (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(x, _mm512_set1_ps(scale)));
            _mm256_storeu_si256((__m256i *)(out + j * width + e), narrow);
        }
#endif
        for (; e < width; e++) out[j * width + e] = store((float)row[e] * scale);
    }
}

/* What a thread works in. padded: head width rounded up to GROUP. */
typedef struct {
    int64_t padded;
    operand *q;           /* (rows, padded) */
    operand *p;           /* (rows, KEYS): shares of the chunk */
    float *scores;        /* (rows, KEYS) */
    float *out;           /* (rows, padded) */
    float *top, *sum;     /* (rows) */
    operand *keys, *values; /* a chunk, packed: lanes of 16 keys, or of 16 columns, side by side */
    weight *wide_keys, *wide_values; /* a chunk of an 8-bit cache */
    void *products;                  /* what `multiply` works in */
} Workspace;

#if NATIVE_BF16
/* Numbers of two rows of 32 side by side: the first 16 of each, the last 16 of each. */
static const uint16_t PAIR_UP[2][32] = {
    {0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47},
    {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
     24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63},
};
#endif

/* c (rows, 16 lanes) += a (rows, depth) times b, `depth` lines of 16 lanes; in bf16 a lane has two neighbours in depth. */
#if NATIVE_BF16
#define DEEP 2
INLINE floats madd_spread(floats sum, const operand *a, const operand *b) {
    int32_t two;
    memcpy(&two, a, 4);
    return madd(sum, (chunk)_mm512_set1_epi32(two), load_chunk(b));
}
#else
#define DEEP 1
INLINE floats madd_spread(floats sum, const operand *a, const operand *b) { return sum + *a * load_chunk(b); }
#endif

INLINE void lanes(const operand *a, int64_t a_stride, const operand *b, int64_t depth, const int rows, float *c,
                  int64_t c_stride) {
    floats sum[8];
    for (int r = 0; r < rows; r++) memcpy(&sum[r], c + r * c_stride, sizeof(floats));
    for (int64_t d = 0; d < depth; d += DEEP, b += 16 * DEEP)
        for (int r = 0; r < rows; r++) sum[r] = madd_spread(sum[r], a + r * a_stride + d, b);
    for (int r = 0; r < rows; r++) memcpy(c + r * c_stride, &sum[r], sizeof(floats));
}

static void all_lanes(const operand *a, int64_t a_stride, const operand *b, int64_t depth, int64_t rows, float *c,
                      int64_t c_stride) {
    int64_t r = 0;
    for (; r + 8 <= rows; r += 8) lanes(a + r * a_stride, a_stride, b, depth, 8, c + r * c_stride, c_stride);
    for (; r < rows; r++) lanes(a + r * a_stride, a_stride, b, depth, 1, c + r * c_stride, c_stride);
}

#if NATIVE_TILES && NATIVE_BF16
/* c (rows, columns) += a (rows, depth) times b: groups of 16 columns. Works on whole tiles of 16 rows. */
static void all_tiles(const operand *a, int64_t a_stride, const operand *b, int64_t depth, int64_t columns,
                      int64_t rows, float *c, int64_t c_stride) {
    for (int64_t r = 0; r < rows; r += SIDE)
        for (int64_t column = 0; column < columns; column += 2 * SIDE) {
            float *into = c + r * c_stride + column;
            const operand *left = b + column * depth, *right = left + SIDE * depth;
            _tile_loadd(0, into, c_stride * 4);
            _tile_loadd(1, into + SIDE, c_stride * 4);
            for (int64_t d = 0; d < depth; d += LANES) {
                _tile_loadd(4, a + r * a_stride + d, a_stride * 2);
                _tile_loadd(6, left + d * SIDE, 64);
                _tile_dpbf16ps(0, 4, 6);
                _tile_loadd(7, right + d * SIDE, 64);
                _tile_dpbf16ps(1, 4, 7);
            }
            _tile_stored(0, into, c_stride * 4);
            _tile_stored(1, into + SIDE, c_stride * 4);
        }
}
#endif

/* c (rows, columns) += a (rows, depth) times b (columns / 16, depth / DEEP, 16, DEEP). */
static void product(const operand *a, int64_t a_stride, const operand *b, int64_t depth, int64_t columns, int64_t rows,
                    float *c, int64_t c_stride) {
#if NATIVE_TILES && NATIVE_BF16
    if (tiles_allowed()) {
        all_tiles(a, a_stride, b, depth, columns, rows, c, c_stride);
        return;
    }
#endif
    for (int64_t column = 0; column < columns; column += 16)
        all_lanes(a, a_stride, b + column * depth, depth, rows, c + column, c_stride);
}

/* Keys from .. to-1 as (4 groups of 16 keys, padded / DEEP, 16, DEEP), values as (padded / 16, KEYS / DEEP, 16, DEEP).
   What lies outside is 0: memory that no token was written to may hold anything. */
#if NATIVE_BF16
static void pack(const weight *keys, const weight *values, int64_t width, const int64_t *at, int64_t from, int64_t to,
                 const Workspace *w) {
    int64_t padded = w->padded;
    const __m512i first = _mm512_loadu_si512(PAIR_UP[0]), second = _mm512_loadu_si512(PAIR_UP[1]);
    for (int64_t e = 0; e < padded; e += LANES) {
        int64_t count = MIN(LANES, width - e);
        __mmask32 mask = count < LANES ? ((__mmask32)1 << count) - 1 : 0xFFFFFFFF;
        for (int64_t key = 0; key < KEYS; key += 16) {
            __m512i row[16];
            for (int j = 0; j < 16; j++)
                row[j] = _mm512_maskz_loadu_epi16(key + j >= from && key + j < to ? mask : 0, keys + at[key + j] + e);
            transpose(row);
            for (int j = 0; j < 16; j++) _mm512_storeu_si512(w->keys + key * padded + e * 16 + j * 32, row[j]);
        }
        for (int64_t key = 0; key < KEYS; key += 2) {
            __m512i two[2];
            for (int j = 0; j < 2; j++)
                two[j] = _mm512_maskz_loadu_epi16(key + j >= from && key + j < to ? mask : 0, values + at[key + j] + e);
            _mm512_storeu_si512(w->values + e * KEYS + key * 16, _mm512_permutex2var_epi16(two[0], first, two[1]));
            _mm512_storeu_si512(w->values + (e + 16) * KEYS + key * 16, _mm512_permutex2var_epi16(two[0], second, two[1]));
        }
    }
}
#else
static void pack(const weight *keys, const weight *values, int64_t width, const int64_t *at, int64_t from, int64_t to,
                 const Workspace *w) {
    int64_t padded = w->padded;
    memset(w->keys, 0, sizeof(operand) * (size_t)(KEYS * padded));
    memset(w->values, 0, sizeof(operand) * (size_t)(KEYS * padded));
    for (int64_t key = from; key < to; key++) {
        const weight *k = keys + at[key], *v = values + at[key];
        for (int64_t e = 0; e < width; e++) w->keys[key / 16 * 16 * padded + key % 16 + e * 16] = load(k[e]);
        for (int64_t e = 0; e < width; e++) w->values[key * 16 + e / 16 * KEYS * 16 + e % 16] = load(v[e]);
    }
}
#endif

/* Ask for rows of the cache before they are needed: blocks lie apart, and the processor does not guess the next one.
   Into the second cache: into the first one a thread has too few reads under way at once. */
INLINE void prefetch_chunk(const Pages *pages, int64_t from, int64_t to) {
    int64_t size = pages->key_scales ? 1 : (int64_t)sizeof(weight);
    for (int64_t j = from; j < to; j++)
        for (int64_t b = 0; b < pages->width * size; b += 64) {
            int64_t at = place(pages, j) * size + b;
            __builtin_prefetch((const char *)pages->keys + at, 0, 2);
            __builtin_prefetch((const char *)pages->values + at, 0, 2);
        }
}

/* Few rows: scores straight from the keys' rows in the cache; 4 keys at a time. */
static void scores_in_place(const weight *keys, int64_t width, const int64_t *at, int64_t from, int64_t to,
                            int64_t rows, const Workspace *w) {
    for (int64_t j = from; j < to; j += 4) {
        const weight *k[4];
        for (int i = 0; i < 4; i++) k[i] = keys + at[MIN(j + i, to - 1)];
        for (int64_t r = 0; r < rows; r++) {
            const operand *q = w->q + r * w->padded;
            floats sum[4] = {{0}};
            int64_t e = 0;
            for (; e + LANES <= width; e += LANES)
                for (int i = 0; i < 4; i++) sum[i] = madd(sum[i], load_chunk(q + e), load_weights(k[i] + e));
            if (e < width)
                for (int i = 0; i < 4; i++) sum[i] = madd(sum[i], load_chunk(q + e), load_some(k[i] + e, width - e));
            float four[4];
            sum4(sum[0], sum[1], sum[2], sum[3], four);
            memcpy(w->scores + r * KEYS + j, four, sizeof(float) * (size_t)MIN(4, to - j));
        }
    }
}

/* Up to 4 rows and 64 columns, whose sums stay in registers. */
INLINE void add_values(const weight *values, const int64_t *at, int64_t from, int64_t to, const float *shares,
                       const int rows, const int vectors, float *out, int64_t stride) {
    floats sum[4][4];
    for (int r = 0; r < rows; r++) memcpy(sum[r], out + r * stride, sizeof(floats) * (size_t)vectors);
    for (int64_t j = from; j < to; j++)
        for (int i = 0; i < vectors; i++) {
            floats v = load_floats(values + at[j] + i * 16);
            for (int r = 0; r < rows; r++) sum[r][i] += shares[r * KEYS + j] * v;
        }
    for (int r = 0; r < rows; r++) memcpy(out + r * stride, sum[r], sizeof(floats) * (size_t)vectors);
}

static void values_in_place(const weight *values, int64_t width, const int64_t *at, int64_t from, int64_t to,
                            int64_t rows, const Workspace *w) {
    int64_t whole = width / 16 * 16;
    for (int64_t r = 0; r < rows; r += 4) {
        const float *shares = w->scores + r * KEYS;
        float *out = w->out + r * w->padded;
        for (int64_t e = 0; e < whole; e += 64) {
            const weight *here = values + e;
#define SOME(rows)                                                                                                     \
    if (whole - e >= 64) add_values(here, at, from, to, shares, rows, 4, out + e, w->padded);                        \
    else for (int64_t i = 0; i < whole - e; i += 16)                                                                   \
            add_values(here + i, at, from, to, shares, rows, 1, out + e + i, w->padded);                             \
    break;
            switch (MIN(4, rows - r)) {
                case 1: SOME(1)
                case 2: SOME(2)
                case 3: SOME(3)
                case 4: SOME(4)
            }
#undef SOME
        }
        for (int64_t i = r; i < MIN(r + 4, rows); i++)
            for (int64_t j = from; j < to; j++)
                for (int64_t e = whole; e < width; e++)
                    w->out[i * w->padded + e] += w->scores[i * KEYS + j] * load(values[at[j] + e]);
    }
}

/* Scores of one row in a chunk become shares, e^((s - top)·scale); what was summed before is scaled to the new top. */
static void soften(float *s, int64_t from, int64_t to, float scale, float *top, float *sum, float *out, int64_t width) {
    floats part[KEYS / 16], most, total = {0};
    float lanes[16], best = *top, added = 0;
    for (int64_t j = 0; j < from; j++) s[j] = -INFINITY;
    for (int64_t j = to; j < KEYS; j++) s[j] = -INFINITY;
    memcpy(part, s, sizeof part);
    most = larger(larger(part[0], part[1]), larger(part[2], part[3]));
    memcpy(lanes, &most, sizeof lanes);
    for (int i = 0; i < 16; i++) best = lanes[i] > best ? lanes[i] : best;
    for (int i = 0; i < KEYS / 16; i++) total += part[i] = exponentials((part[i] - best) * scale);
    memcpy(s, part, sizeof part);
    memcpy(lanes, &total, sizeof lanes);
    for (int i = 0; i < 16; i++) added += lanes[i];
    if (best > *top) {
        floats shrink = exponentials((floats){0} + (*top - best) * scale);
        *sum *= shrink[0];
        for (int64_t e = 0; e < width; e++) out[e] *= shrink[0];
        *top = best;
    }
    *sum += added;
}

/* Rows are the G heads of each of `tokens` tokens, the first of which is number `position` of its sequence; their queries
   are in w->q, and w->out becomes the result. */
static void attend(const Pages *pages, int64_t position, int64_t tokens, int64_t group, int64_t window,
                   const Workspace *w) {
    int64_t rows = tokens * group, padded = w->padded, width = pages->width, last = position + tokens;
    int64_t begin = window && position + 1 > window ? position + 1 - window : 0;
    float scale = 1.0f / sqrtf((float)pages->width);
    int is_packed = tokens > 1; /* to pack a chunk costs as much as some twenty rows gain */
    for (int64_t r = 0; r < rows; r++) w->top[r] = -INFINITY, w->sum[r] = 0;
    memset(w->out, 0, sizeof(float) * (size_t)(ROUND_UP(rows, 16) * padded));
    if (!is_packed) prefetch_chunk(pages, begin, MIN(begin / KEYS * KEYS + KEYS, last));
    for (int64_t first = begin / KEYS * KEYS; first < last; first += KEYS) {
        int64_t from = first < begin ? begin : first, to = MIN(first + KEYS, last);
        int64_t at[KEYS];
        for (int64_t j = 0; j < KEYS; j++) at[j] = place(pages, first + j < from ? from : MIN(first + j, to - 1));
        const weight *keys = pages->keys, *values = pages->values;
        if (pages->key_scales) {
            widen(pages->keys, pages->key_scales, at, from - first, to - first, width, w->wide_keys);
            widen(pages->values, pages->value_scales, at, from - first, to - first, width, w->wide_values);
            keys = w->wide_keys, values = w->wide_values;
            for (int64_t j = 0; j < KEYS; j++) at[j] = j * width;
        }
        if (is_packed) {
            pack(keys, values, width, at, from - first, to - first, w);
            memset(w->scores, 0, sizeof(float) * (size_t)(ROUND_UP(rows, 16) * KEYS));
            product(w->q, padded, w->keys, padded, KEYS, rows, w->scores, KEYS);
        } else {
            scores_in_place(keys, width, at, from - first, to - first, rows, w);
        }
        for (int64_t r = 0; r < rows; r++) {
            int64_t end = position + r / group + 1, start = window && end > window ? end - window : 0;
            start = (start > from ? start : from) - first, end = MIN(end, to) - first;
            float *s = w->scores + r * KEYS;
            if (start < end)
                soften(s, start, end, scale, w->top + r, w->sum + r, w->out + r * padded, pages->width);
            else
                memset(s, 0, sizeof(float) * KEYS);
            if (is_packed) to_operands(s, KEYS, w->p + r * KEYS);
        }
        if (is_packed) product(w->p, KEYS, w->values, KEYS, padded, rows, w->out, padded);
        else {
            prefetch_chunk(pages, first + KEYS, MIN(first + 2 * KEYS, last));
            values_in_place(values, width, at, from - first, to - first, rows, w);
        }
    }
    for (int64_t r = 0; r < rows; r++)
        for (int64_t e = 0; e < pages->width; e++) w->out[r * padded + e] /= w->sum[r];
}
