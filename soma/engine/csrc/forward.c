/* One step of a Llama-shaped model: any mix of prompt chunks and single tokens in, logits out, in a single call.

   A Python operator costs 5-10 µs and a layer has some twenty, so a small model spends most of its time between
   operators. Here a layer is a few loops that OpenMP threads share, over weights and cache that stay where they are.
   Everything but weights, cache and what products read is float32.

   Built by build.py with -DWEIGHT_BF16=0 or 1 (weights that are not quantized, and the cache). Keys and values of a layer
   are (blocks, kv_heads, block_size, head); block_size is a power of two. */

#ifdef _OPENMP
#include <omp.h>
#endif

#include "numbers.h"

#include "lora.h"

#include "linear.h"

#include "attention.h"

/* q_norm and k_norm are NULL where the model has none; window is 0 for full attention. */
typedef struct {
    Linear q, k, v, out, gate, up, down;
    const weight *input_norm, *post_norm, *q_norm, *k_norm;
    void *keys, *values; /* weights, or with scales (blocks, kv_heads, block_size) int8 */
    float *key_scales, *value_scales;
    int64_t window;
} Layer;

/* cosines and sines: (positions, head / 2) */
typedef struct {
    int64_t layers, width, heads, kv_heads, head, inner, vocabulary, block_size, blocks, positions;
    float epsilon;
    const Layer *layer;
    const weight *embedding, *norm;
    Linear lm_head;
    const float *cosines, *sines;
} Model;

/* soma/engine/batch.py: tokens of all sequences one after the other. adapter: of each token, row_adapter: of each row,
   -1 for none, both NULL if there is none at all. updates: (adapters, layers * PLACES + 1), the last is lm_head's. */
typedef struct {
    int64_t tokens, sequences, rows, table_width;
    const int64_t *token, *position, *slot, *row;
    const int32_t *start, *length, *table, *adapter, *row_adapter;
    const Update *updates;
    int64_t adapters, most_rank;
} Batch;

/* A tile of new tokens of one sequence: `count` tokens from `token` on. */
typedef struct {
    int64_t sequence, token, count;
} Tile;

typedef struct {
    float *x, *qkv, *attended, *inner; /* a row a token */
    Tile *tiles;
    Input shared, *own; /* own: a thread's, for one token: cheaper than waiting for one that makes it for all */
    Workspace *work;    /* a thread's */
} Scratch;

static int64_t tile_tokens(const Model *m) {
    int64_t group = m->heads / m->kv_heads;
    return group < ROWS ? ROWS / group : 1;
}

/* Places for everything in one piece of memory; with base NULL only to know its size. */
static char *take(char **at, int64_t bytes) {
    char *here = *at;
    *at += ROUND_UP(bytes, 64);
    return here;
}

static Input take_input(char **at, int64_t tokens, int64_t columns, int64_t most_rank) {
    int64_t padded = ROUND_UP(columns, GROUP);
    Input in = {padded, 0, 0, 0, 0, 0, 0, {0}};
    tokens = ROUND_UP(tokens, 2 * BLOCK); /* tiles read more than there is */
    in.dense = (operand *)take(at, tokens * padded * (int64_t)sizeof(operand));
    in.values = (int8_t *)take(at, tokens * padded);
    in.scales = (float *)take(at, tokens * padded / GROUP * 4);
    in.sums = (int32_t *)take(at, tokens * padded / GROUP * 4);
    in.low = (float *)take(at, tokens * 3 * most_rank * 4);
    return in;
}

static int64_t lay_out(const Model *m, int64_t tokens, int64_t rows, int64_t most_rank, int threads, char *base,
                       Scratch *s) {
    char *at = base;
    int64_t heads = m->heads * m->head, kv = m->kv_heads * m->head;
    int64_t widest = m->width > heads ? m->width : heads;
    widest = widest > m->inner ? widest : m->inner;
    s->x = (float *)take(&at, tokens * m->width * 4);
    s->qkv = (float *)take(&at, tokens * (heads + 2 * kv) * 4);
    s->attended = (float *)take(&at, tokens * heads * 4);
    s->inner = (float *)take(&at, tokens * m->inner * 4);
    s->tiles = (Tile *)take(&at, tokens * (int64_t)sizeof(Tile));
    s->shared = take_input(&at, tokens > rows ? tokens : rows, widest, most_rank);
    Input *own = (Input *)take(&at, threads * (int64_t)sizeof(Input));
    Workspace *work = (Workspace *)take(&at, threads * (int64_t)sizeof(Workspace));
    int64_t padded = ROUND_UP(m->head, GROUP), most = ROUND_UP(tile_tokens(m) * (m->heads / m->kv_heads), BLOCK);
    for (int i = 0; i < threads; i++) {
        Input in = take_input(&at, 1, widest, most_rank);
        Workspace w = {padded, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0};
        w.q = (operand *)take(&at, most * padded * (int64_t)sizeof(operand));
        w.p = (operand *)take(&at, most * KEYS * (int64_t)sizeof(operand));
        w.scores = (float *)take(&at, most * KEYS * 4);
        w.out = (float *)take(&at, most * padded * 4);
        w.top = (float *)take(&at, most * 4);
        w.sum = (float *)take(&at, most * 4);
        w.keys = (operand *)take(&at, KEYS * padded * (int64_t)sizeof(operand));
        w.values = (operand *)take(&at, KEYS * padded * (int64_t)sizeof(operand));
        w.wide_keys = (weight *)take(&at, KEYS * m->head * (int64_t)sizeof(weight));
        w.wide_values = (weight *)take(&at, KEYS * m->head * (int64_t)sizeof(weight));
        w.products = take(&at, tile_bytes(tokens > rows ? tokens : rows, widest));
        if (base) own[i] = in, work[i] = w;
    }
    s->own = own, s->work = work;
    return at - base;
}

/* The input of `readers` from rows of x, normed where there is a gain. */
static Input make_input(const Model *m, const Scratch *s, const Linear *const *readers, int count, int64_t tokens,
                        const float *x, const weight *gain, Shift shift, int thread) {
    int64_t columns = readers[0]->columns;
    int dense = 0, quantized = 0;
    for (int i = 0; i < count; i++) {
        int is_dense = readers[i]->bits == 0 || path(readers[i], tokens) == BF16_TILES;
        dense |= is_dense;
        quantized |= !is_dense;
    }
    Input in = tokens == 1 ? s->own[thread] : s->shared;
    in.stride = ROUND_UP(columns, GROUP);
    in.readers = count, in.shift = shift;
    float row[columns];
    if (tokens == 1) {
        if (gain) rms_norm(x, gain, columns, m->epsilon, row);
        prepare(&in, 0, gain ? row : x, columns, dense, quantized);
        if (shift.of) shrink(&shift, 0, count, gain ? row : x, columns, in.low);
        return in;
    }
#pragma omp for schedule(static)
    for (int64_t t = 0; t < tokens; t++) {
        if (gain) rms_norm(x + t * columns, gain, columns, m->epsilon, row);
        const float *given = gain ? row : x + t * columns;
        prepare(&in, t, given, columns, dense, quantized);
        if (shift.of) shrink(&shift, t, count, given, columns, in.low + t * count * shift.most);
    }
    return in;
}

/* Norms and rotates queries and keys in place; keys and values go to their slots of the cache. */
static void rotate(const Model *m, const Layer *layer, const Batch *b, float *qkv) {
    int64_t head = m->head, half = head / 2, heads = m->heads + 2 * m->kv_heads;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < b->tokens * heads; i++) {
        int64_t t = i / heads, h = i % heads, kv = h - m->heads;
        float *x = qkv + i * head;
        if (kv < m->kv_heads) {
            const weight *gain = kv < 0 ? layer->q_norm : layer->k_norm;
            const float *cosine = m->cosines + b->position[t] * half, *sine = m->sines + b->position[t] * half;
            if (gain) rms_norm(x, gain, head, m->epsilon, x);
            for (int64_t e = 0; e < half; e++) {
                float first = x[e], second = x[half + e];
                x[e] = first * cosine[e] - second * sine[e];
                x[half + e] = second * cosine[e] + first * sine[e];
            }
        }
        if (kv < 0) continue;
        int64_t block = b->slot[t] / m->block_size, offset = b->slot[t] % m->block_size, k = kv % m->kv_heads;
        void *cache = kv < m->kv_heads ? layer->keys : layer->values;
        float *scales = kv < m->kv_heads ? layer->key_scales : layer->value_scales;
        int64_t row = (block * m->kv_heads + k) * m->block_size + offset;
        if (scales) scales[row] = round_row(x, head, (int8_t *)cache + row * head);
        else
            for (int64_t e = 0; e < head; e++) ((weight *)cache)[row * head + e] = store(x[e]);
    }
}

static void attention(const Model *m, const Layer *layer, const Batch *b, const Scratch *s, int64_t tiles, int thread) {
    int64_t head = m->head, group = m->heads / m->kv_heads, heads = m->heads + 2 * m->kv_heads;
    const Workspace *w = &s->work[thread];
#if NATIVE_TILES && NATIVE_BF16
    if (tiles_allowed()) configure(BF16_TILES);
#endif
    int64_t shift = 0;
    while (((int64_t)1 << shift) < m->block_size) shift++;
    /* From the last on: later tiles of a prompt see more keys, and are better not begun at the end. */
#pragma omp for schedule(dynamic)
    for (int64_t i = tiles * m->kv_heads - 1; i >= 0; i--) {
        Tile tile = s->tiles[i / m->kv_heads];
        int64_t kv = i % m->kv_heads, before = kv * m->block_size * head;
        Pages pages = {layer->keys, layer->values, layer->key_scales, layer->value_scales,
                       b->table + tile.sequence * b->table_width, shift, m->block_size - 1,
                       m->kv_heads * m->block_size * head, before, head};
        int64_t position = b->length[tile.sequence] - b->start[tile.sequence + 1] + tile.token;
        for (int64_t r = 0; r < tile.count * group; r++) {
            const float *q = s->qkv + ((tile.token + r / group) * heads + kv * group + r % group) * head;
            to_operands(q, head, w->q + r * w->padded);
            for (int64_t e = head; e < w->padded; e++) w->q[r * w->padded + e] = 0;
        }
        attend(&pages, position, tile.count, group, layer->window, w);
        for (int64_t r = 0; r < tile.count * group; r++)
            memcpy(s->attended + ((tile.token + r / group) * m->heads + kv * group + r % group) * head,
                   w->out + r * w->padded, sizeof(float) * (size_t)head);
    }
}

/* Bytes that `soma_step` works in. */
int64_t soma_scratch(const Model *m, int64_t tokens, int64_t rows, int64_t most_rank, int threads) {
    Scratch s;
    return lay_out(m, tokens, rows, most_rank, threads, 0, &s);
}

/* 0 if every number of the batch lies where it should, else which does not. */
static int check(const Model *m, const Batch *b) {
    for (int64_t t = 0; t < b->tokens; t++) {
        if (b->token[t] < 0 || b->token[t] >= m->vocabulary) return 1;
        if (b->position[t] < 0 || b->position[t] >= m->positions) return 2;
        if (b->slot[t] < 0 || b->slot[t] >= m->blocks * m->block_size) return 3;
        if (b->adapter && (b->adapter[t] < -1 || b->adapter[t] >= b->adapters)) return 8;
    }
    for (int64_t r = 0; r < b->rows; r++)
        if (b->row[r] < 0 || b->row[r] >= b->tokens) return 4;
    for (int64_t r = 0; b->adapter && r < b->rows; r++)
        if (b->row_adapter[r] != b->adapter[b->row[r]]) return 8;
    if (b->start[0] != 0 || b->start[b->sequences] != b->tokens) return 5;
    for (int64_t i = 0; i < b->sequences; i++) {
        int64_t used = ((int64_t)b->length[i] + m->block_size - 1) / m->block_size;
        if (b->start[i + 1] < b->start[i] || b->length[i] < b->start[i + 1] - b->start[i] || used > b->table_width) return 6;
        for (int64_t j = 0; j < used; j++) {
            int32_t block = b->table[i * b->table_width + j];
            if (block < 0 || block >= m->blocks) return 7;
        }
    }
    return 0;
}

/* Append the batch's tokens to the cache of every layer. hidden (rows, width) after the final norm and logits (rows,
   vocabulary) of the tokens that b->row names. Gives what `check` says; if that is not 0, nothing was done. */
int soma_step(const Model *m, const Batch *b, char *base, float *hidden, float *logits, int threads) {
    int wrong = check(m, b);
    if (wrong) return wrong;
    Scratch scratch, *s = &scratch;
    lay_out(m, b->tokens, b->rows, b->most_rank, threads, base, s);
    int64_t queries = m->heads * m->head, kv = m->kv_heads * m->head, T = b->tokens, tiles = 0;
    for (int64_t i = 0; i < b->sequences; i++)
        for (int64_t t = b->start[i]; t < b->start[i + 1]; t += tile_tokens(m))
            s->tiles[tiles++] = (Tile){i, t, MIN(tile_tokens(m), b->start[i + 1] - t)};
#pragma omp parallel num_threads(threads)
    {
        int thread = 0;
#ifdef _OPENMP
        thread = omp_get_thread_num();
#endif
        void *memory = s->work[thread].products;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < T * m->width; i++)
            s->x[i] = load(m->embedding[b->token[i / m->width] * m->width + i % m->width]);
        for (int64_t l = 0; l < m->layers; l++) {
            const Layer *layer = &m->layer[l];
            Shift shift = {b->adapter, b->updates, m->layers * PLACES + 1, l * PLACES, b->most_rank};
            Input in = make_input(m, s, (const Linear *[]){&layer->q, &layer->k, &layer->v}, 3, T, s->x,
                                  layer->input_norm, shift, thread);
            multiply(&layer->q, &in, 0, T, STORE, s->qkv, queries + 2 * kv, memory);
            multiply(&layer->k, &in, 1, T, STORE, s->qkv + queries, queries + 2 * kv, memory);
            multiply(&layer->v, &in, 2, T, STORE, s->qkv + queries + kv, queries + 2 * kv, memory);
#pragma omp barrier
            rotate(m, layer, b, s->qkv);
            attention(m, layer, b, s, tiles, thread);
            shift.place = l * PLACES + 3;
            in = make_input(m, s, (const Linear *[]){&layer->out}, 1, T, s->attended, 0, shift, thread);
            multiply(&layer->out, &in, 0, T, ADD, s->x, m->width, memory);
#pragma omp barrier
            shift.place = l * PLACES + 4;
            in = make_input(m, s, (const Linear *[]){&layer->gate, &layer->up}, 2, T, s->x, layer->post_norm, shift,
                            thread);
            multiply(&layer->gate, &in, 0, T, STORE, s->inner, m->inner, memory);
            multiply(&layer->up, &in, 1, T, GATED, s->inner, m->inner, memory);
#pragma omp barrier
            shift.place = l * PLACES + 6;
            in = make_input(m, s, (const Linear *[]){&layer->down}, 1, T, s->inner, 0, shift, thread);
            multiply(&layer->down, &in, 0, T, ADD, s->x, m->width, memory);
#pragma omp barrier
        }
#pragma omp for schedule(static)
        for (int64_t r = 0; r < b->rows; r++)
            rms_norm(s->x + b->row[r] * m->width, m->norm, m->width, m->epsilon, hidden + r * m->width);
        if (b->rows) {
            int64_t before = m->layers * PLACES;
            Shift shift = {b->row_adapter, b->updates, before + 1, before, b->most_rank};
            Input in = make_input(m, s, (const Linear *[]){&m->lm_head}, 1, b->rows, hidden, 0, shift, thread);
            multiply(&m->lm_head, &in, 0, b->rows, STORE, logits, m->vocabulary, memory);
        }
        release_tiles();
    }
    return 0;
}

/* End the OpenMP threads that wait for the calling thread. libgomp counts those of all threads: with more of them than
   processors it no longer spins at barriers, and each of a step's some two hundred then costs 30 microseconds. */
void soma_release_threads(void) {
#if defined(_OPENMP) && (__GNUC__ >= 9 || _OPENMP >= 201811) /* GCC 9 had it before it said so */
    omp_pause_resource_all(omp_pause_soft);
#endif
}
