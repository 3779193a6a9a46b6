/* Attention over the paged cache. An item of work is a tile of a sequence's new tokens and one key/value head with the
   G query heads that share it: G x tokens rows, so that keys are read once for all of them. Softmax runs online (arXiv:
   1805.02867) over chunks of KEYS keys, which are read where they lie in the cache: nothing is gathered in memory. */

#define KEYS 64
#define ROWS 64 /* rows of an item, unless one token alone has more heads */

/* Key j of the sequence at hand, for one layer and head. */
typedef struct {
    const weight *keys, *values;
    const int32_t *table;
    int64_t shift, mask, block_stride, width;
} Pages;

INLINE int64_t place(const Pages *p, int64_t j) {
    return (int64_t)p->table[j >> p->shift] * p->block_stride + (j & p->mask) * p->width;
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
} Workspace;

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

/* Keys from .. to-1 as (4 groups of 16 keys, padded / DEEP, 16, DEEP), values as (padded / 16, KEYS / DEEP, 16, DEEP).
   What lies outside is 0: memory that no token was written to may hold anything. */
static void pack(const Pages *pages, int64_t first, int64_t from, int64_t to, const Workspace *w) {
    int64_t padded = w->padded, width = pages->width;
    memset(w->keys, 0, sizeof(operand) * (size_t)(KEYS * padded));
    memset(w->values, 0, sizeof(operand) * (size_t)(KEYS * padded));
    for (int64_t j = from; j < to; j++) {
        int64_t key = j - first, at = place(pages, j);
        const weight *k = pages->keys + at, *v = pages->values + at;
        operand *into = w->keys + key / 16 * 16 * padded + key % 16 * DEEP;
        for (int64_t e = 0; e < width; e++) into[e / DEEP * 16 * DEEP + e % DEEP] = NATIVE_BF16 ? (operand)k[e] : load(k[e]);
        into = w->values + key / DEEP * 16 * DEEP + key % DEEP;
        for (int64_t e = 0; e < width; e++)
            into[e / 16 * KEYS * 16 + e % 16 * DEEP] = NATIVE_BF16 ? (operand)v[e] : load(v[e]);
    }
}

/* Few rows: scores straight from the keys' rows in the cache; 4 keys at a time. */
static void scores_in_place(const Pages *pages, int64_t first, int64_t from, int64_t to, int64_t rows,
                            const Workspace *w) {
    int64_t width = pages->width;
    for (int64_t j = from; j < to; j += 4) {
        const weight *k[4];
        for (int i = 0; i < 4; i++) k[i] = pages->keys + place(pages, MIN(j + i, to - 1));
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
            memcpy(w->scores + r * KEYS + (j - first), four, sizeof(float) * (size_t)MIN(4, to - j));
        }
    }
}

static void values_in_place(const Pages *pages, int64_t first, int64_t from, int64_t to, int64_t rows,
                            const Workspace *w) {
    int64_t width = pages->width;
    for (int64_t j = from; j < to; j++) {
        const weight *v = pages->values + place(pages, j);
        for (int64_t r = 0; r < rows; r++) {
            float share = w->scores[r * KEYS + (j - first)], *out = w->out + r * w->padded;
            for (int64_t e = 0; e < width; e++) out[e] += share * load(v[e]);
        }
    }
}

/* Scores of one row in a chunk become shares, e^((s - top)·scale); what was summed before is scaled to the new top. */
static void soften(float *s, int64_t from, int64_t to, float scale, float *top, float *sum, float *out, int64_t width) {
    float best = *top, total = 0;
#pragma omp simd reduction(max : best)
    for (int64_t j = from; j < to; j++) best = s[j] > best ? s[j] : best;
    for (int64_t j = 0; j < from; j++) s[j] = 0;
    for (int64_t j = to; j < KEYS; j++) s[j] = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t j = from; j < to; j++) {
        s[j] = exponential((s[j] - best) * scale);
        total += s[j];
    }
    if (best > *top) {
        float shrink = exponential((*top - best) * scale);
        *sum *= shrink;
        for (int64_t e = 0; e < width; e++) out[e] *= shrink;
        *top = best;
    }
    *sum += total;
}

/* Rows are the G heads of each of `tokens` tokens, the first of which is number `position` of its sequence; their queries
   are in w->q, and w->out becomes the result. */
static void attend(const Pages *pages, int64_t position, int64_t tokens, int64_t group, int64_t window,
                   const Workspace *w) {
    int64_t rows = tokens * group, padded = w->padded, last = position + tokens;
    int64_t begin = window && position + 1 > window ? position + 1 - window : 0;
    float scale = 1.0f / sqrtf((float)pages->width);
    int is_packed = tokens > 1; /* to pack a chunk costs as much as some twenty rows gain */
    for (int64_t r = 0; r < rows; r++) w->top[r] = -INFINITY, w->sum[r] = 0;
    memset(w->out, 0, sizeof(float) * (size_t)(rows * padded));
    for (int64_t first = begin / KEYS * KEYS; first < last; first += KEYS) {
        int64_t from = first < begin ? begin : first, to = MIN(first + KEYS, last);
        if (is_packed) {
            pack(pages, first, from, to, w);
            memset(w->scores, 0, sizeof(float) * (size_t)(rows * KEYS));
            for (int64_t key = 0; key < KEYS; key += 16)
                all_lanes(w->q, padded, w->keys + key * padded, padded, rows, w->scores + key, KEYS);
        } else {
            scores_in_place(pages, first, from, to, rows, w);
        }
        for (int64_t r = 0; r < rows; r++) {
            int64_t end = position + r / group + 1, start = window && end > window ? end - window : 0;
            start = (start > from ? start : from) - first, end = MIN(end, to) - first;
            float *s = w->scores + r * KEYS;
            if (start < end)
                soften(s, start, end, scale, w->top + r, w->sum + r, w->out + r * padded, pages->width);
            else
                memset(s, 0, sizeof(float) * KEYS);
            if (is_packed)
                for (int64_t j = 0; j < KEYS; j++) w->p[r * KEYS + j] = to_operand(s[j]);
        }
        if (is_packed)
            for (int64_t e = 0; e < padded; e += 16)
                all_lanes(w->p, KEYS, w->values + e * KEYS, KEYS, rows, w->out + e, padded);
        else
            values_in_place(pages, first, from, to, rows, w);
    }
    for (int64_t r = 0; r < rows; r++)
        for (int64_t e = 0; e < pages->width; e++) w->out[r * padded + e] /= w->sum[r];
}
