/* One step of a Llama-shaped model: any mix of prompt chunks and single tokens in, logits out, in a single call.

   A Python operator costs 5-10 µs and a layer has some twenty, so a small model spends most of its time between
   operators. Here a layer is a few loops that threads share, over weights and cache that stay where they are.
   Everything but weights, cache and what products read is float32.

   Built by build.py with -DWEIGHT_BF16=0 or 1 (weights that are not quantized, and the cache). Keys and values of a layer
   are (blocks, kv_heads, block_size, head); block_size is a power of two. */

#include "numbers.h"

#include "threads.h"

#include "lora.h"

#include "linear.h"

#include "attention.h"

#include "largest.h"

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
static char *room(char **at, int64_t bytes) {
    char *here = *at;
    *at += ROUND_UP(bytes, 64);
    return here;
}

static Input input_room(char **at, int64_t tokens, int64_t columns, int64_t most_rank) {
    int64_t padded = ROUND_UP(columns, GROUP);
    Input in = {padded, 0, 0, 0, 0, 0, 0, {0}};
    tokens = ROUND_UP(tokens, 2 * BLOCK); /* tiles read more than there is */
    in.dense = (operand *)room(at, tokens * padded * (int64_t)sizeof(operand));
    in.values = (int8_t *)room(at, tokens * padded);
    in.scales = (float *)room(at, tokens * padded / GROUP * 4);
    in.sums = (int32_t *)room(at, tokens * padded / GROUP * 4);
    in.low = (float *)room(at, tokens * 3 * most_rank * 4);
    return in;
}

static int64_t lay_out(const Model *m, int64_t tokens, int64_t rows, int64_t most_rank, int threads, char *base,
                       Scratch *s) {
    char *at = base;
    int64_t heads = m->heads * m->head, kv = m->kv_heads * m->head;
    int64_t widest = m->width > heads ? m->width : heads;
    widest = widest > m->inner ? widest : m->inner;
    s->x = (float *)room(&at, tokens * m->width * 4);
    s->qkv = (float *)room(&at, tokens * (heads + 2 * kv) * 4);
    s->attended = (float *)room(&at, tokens * heads * 4);
    s->inner = (float *)room(&at, tokens * m->inner * 4);
    s->tiles = (Tile *)room(&at, tokens * (int64_t)sizeof(Tile));
    s->shared = input_room(&at, tokens > rows ? tokens : rows, widest, most_rank);
    Input *own = (Input *)room(&at, threads * (int64_t)sizeof(Input));
    Workspace *work = (Workspace *)room(&at, threads * (int64_t)sizeof(Workspace));
    int64_t padded = ROUND_UP(m->head, GROUP), most = ROUND_UP(tile_tokens(m) * (m->heads / m->kv_heads), BLOCK);
    for (int i = 0; i < threads; i++) {
        Input in = input_room(&at, 1, widest, most_rank);
        Workspace w = {padded, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0};
        w.q = (operand *)room(&at, most * padded * (int64_t)sizeof(operand));
        w.p = (operand *)room(&at, most * KEYS * (int64_t)sizeof(operand));
        w.scores = (float *)room(&at, most * KEYS * 4);
        w.out = (float *)room(&at, most * padded * 4);
        w.top = (float *)room(&at, most * 4);
        w.sum = (float *)room(&at, most * 4);
        w.keys = (operand *)room(&at, KEYS * padded * (int64_t)sizeof(operand));
        w.values = (operand *)room(&at, KEYS * padded * (int64_t)sizeof(operand));
        w.wide_keys = (weight *)room(&at, KEYS * m->head * (int64_t)sizeof(weight));
        w.wide_values = (weight *)room(&at, KEYS * m->head * (int64_t)sizeof(weight));
        w.products = room(&at, tile_bytes(tokens > rows ? tokens : rows, widest));
        if (base) own[i] = in, work[i] = w;
    }
    s->own = own, s->work = work;
    return at - base;
}

/* What the threads of a step share. */
typedef struct {
    const Model *m;
    const Batch *b;
    Scratch s;
    int64_t tiles;
    int is_single; /* no sequence has several tiles */
    float *hidden, *logits;
} Step;

/* The input of products from rows of x, normed where there is a gain. One token's is made by every thread for itself. */
static Input make_input(const Step *step, Team *team, int thread, const Product *readers, int count, int64_t tokens,
                        const float *x, const weight *gain, Shift shift) {
    int64_t columns = readers[0].linear->columns;
    float epsilon = step->m->epsilon;
    int dense = 0, quantized = 0;
    for (int i = 0; i < count; i++) {
        int is_dense = readers[i].linear->bits == 0 || path(readers[i].linear, tokens) == BF16_TILES;
        dense |= is_dense;
        quantized |= !is_dense;
    }
    Input in = tokens == 1 ? step->s.own[thread] : step->s.shared;
    in.stride = ROUND_UP(columns, GROUP);
    in.readers = count, in.shift = shift;
    float row[columns];
    if (tokens == 1) {
        if (gain) rms_norm(x, gain, columns, epsilon, row);
        prepare(&in, 0, gain ? row : x, columns, dense, quantized);
        if (shift.of) shrink(&shift, 0, count, gain ? row : x, columns, in.low);
        return in;
    }
    for (Taken some = share(team, thread, tokens, 1); take(team, &some);)
        for (int64_t t = some.from; t < some.to; t++) {
            if (gain) rms_norm(x + t * columns, gain, columns, epsilon, row);
            const float *given = gain ? row : x + t * columns;
            prepare(&in, t, given, columns, dense, quantized);
            if (shift.of) shrink(&shift, t, count, given, columns, in.low + t * count * shift.most);
        }
    meet(team);
    return in;
}

/* Norms and rotates a query or key of a token in place; a key or value goes to its slot of the cache. */
static void rotate(const Step *step, const Layer *layer, int64_t t, int64_t h) {
    const Model *m = step->m;
    const Batch *b = step->b;
    int64_t head = m->head, half = head / 2, heads = m->heads + 2 * m->kv_heads, kv = h - m->heads;
    float *x = step->s.qkv + (t * heads + h) * head;
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
    if (kv < 0) return;
    int64_t block = b->slot[t] / m->block_size, offset = b->slot[t] % m->block_size, k = kv % m->kv_heads;
    void *cache = kv < m->kv_heads ? layer->keys : layer->values;
    float *scales = kv < m->kv_heads ? layer->key_scales : layer->value_scales;
    int64_t row = (block * m->kv_heads + k) * m->block_size + offset;
    if (scales) scales[row] = round_row(x, head, (int8_t *)cache + row * head);
    else to_weights(x, head, (weight *)cache + row * head);
}

/* Attention of a tile of tokens with one key/value head and its group of query heads. */
static void attend_tile(const Step *step, const Layer *layer, Tile tile, int64_t kv, const Workspace *w) {
    const Model *m = step->m;
    const Batch *b = step->b;
    int64_t head = m->head, group = m->heads / m->kv_heads, heads = m->heads + 2 * m->kv_heads, shift = 0;
    while (((int64_t)1 << shift) < m->block_size) shift++;
    Pages pages = {layer->keys, layer->values, layer->key_scales, layer->value_scales,
                   b->table + tile.sequence * b->table_width, shift, m->block_size - 1,
                   m->kv_heads * m->block_size * head, kv * m->block_size * head, head};
    int64_t position = b->length[tile.sequence] - b->start[tile.sequence + 1] + tile.token;
    for (int64_t r = 0; r < tile.count * group; r++) {
        const float *q = step->s.qkv + ((tile.token + r / group) * heads + kv * group + r % group) * head;
        to_operands(q, head, w->q + r * w->padded);
        for (int64_t e = head; e < w->padded; e++) w->q[r * w->padded + e] = 0;
    }
    attend(&pages, position, tile.count, group, layer->window, w);
    for (int64_t r = 0; r < tile.count * group; r++)
        memcpy(step->s.attended + ((tile.token + r / group) * m->heads + kv * group + r % group) * head,
               w->out + r * w->padded, sizeof(float) * (size_t)head);
}

/* Rotation, then attention of all tiles. Where a sequence's new tokens are one tile, nobody else needs what it rotates,
   and the threads need not meet in between. */
static void attention(const Step *step, const Layer *layer, Team *team, int thread) {
    const Model *m = step->m;
    int64_t group = m->heads / m->kv_heads, heads = m->heads + 2 * m->kv_heads;
    if (!step->is_single) {
        for (Taken some = share(team, thread, step->b->tokens * heads, 1); take(team, &some);)
            for (int64_t i = some.from; i < some.to; i++) rotate(step, layer, i / heads, i % heads);
        meet(team);
    }
#if NATIVE_TILES && NATIVE_BF16
    if (tiles_allowed()) configure(BF16_TILES);
#endif
    int64_t items = step->tiles * m->kv_heads;
    Taken some = share(team, thread, items, 1);
    for (some.piece = 1; take(team, &some);) {
        /* From the last on: later tiles of a prompt see more keys, and are better not begun at the end. Heads of a tile
           in the order in which they lie in memory. */
        int64_t item = items - 1 - some.from, kv = m->kv_heads - 1 - item % m->kv_heads;
        Tile tile = step->s.tiles[item / m->kv_heads];
        if (step->is_single)
            for (int64_t t = tile.token; t < tile.token + tile.count; t++) {
                for (int64_t h = kv * group; h < (kv + 1) * group; h++) rotate(step, layer, t, h);
                rotate(step, layer, t, m->heads + kv);
                rotate(step, layer, t, m->heads + m->kv_heads + kv);
            }
        attend_tile(step, layer, tile, kv, &step->s.work[thread]);
    }
    meet(team);
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

static void layer_forward(const Step *step, int64_t l, Team *team, int thread) {
    const Model *m = step->m;
    const Layer *layer = &m->layer[l];
    const Scratch *s = &step->s;
    int64_t queries = m->heads * m->head, kv = m->kv_heads * m->head, all = queries + 2 * kv, T = step->b->tokens;
    void *memory = s->work[thread].products;
    Shift shift = {step->b->adapter, step->b->updates, m->layers * PLACES + 1, l * PLACES, step->b->most_rank};
    const Product qkv[] = {{&layer->q, STORE, s->qkv, all}, {&layer->k, STORE, s->qkv + queries, all},
                           {&layer->v, STORE, s->qkv + queries + kv, all}};
    const Product out[] = {{&layer->out, ADD, s->x, m->width}}, down[] = {{&layer->down, ADD, s->x, m->width}};
    const Product up[] = {{&layer->gate, STORE, s->inner, m->inner}, {&layer->up, GATED, s->inner, m->inner}};

    Input in = make_input(step, team, thread, qkv, 3, T, s->x, layer->input_norm, shift);
    multiply(team, thread, qkv, 3, &in, T, memory);
    meet(team);
    attention(step, layer, team, thread);
    shift.place = l * PLACES + 3;
    in = make_input(step, team, thread, out, 1, T, s->attended, 0, shift);
    multiply(team, thread, out, 1, &in, T, memory);
    meet(team);
    shift.place = l * PLACES + 4;
    in = make_input(step, team, thread, up, 2, T, s->x, layer->post_norm, shift);
    multiply(team, thread, up, 2, &in, T, memory);
    meet(team);
    shift.place = l * PLACES + 6;
    in = make_input(step, team, thread, down, 1, T, s->inner, 0, shift);
    multiply(team, thread, down, 1, &in, T, memory);
    meet(team);
}

static void run(void *given, Team *team, int thread) {
    const Step *step = given;
    const Model *m = step->m;
    const Batch *b = step->b;
    for (Taken some = share(team, thread, b->tokens, 1); take(team, &some);)
        for (int64_t t = some.from; t < some.to; t++)
            for (int64_t e = 0; e < m->width; e++)
                step->s.x[t * m->width + e] = load(m->embedding[b->token[t] * m->width + e]);
    meet(team);
    for (int64_t l = 0; l < m->layers; l++) layer_forward(step, l, team, thread);
    if (!b->rows) return;
    for (Taken some = share(team, thread, b->rows, 1); take(team, &some);)
        for (int64_t r = some.from; r < some.to; r++)
            rms_norm(step->s.x + b->row[r] * m->width, m->norm, m->width, m->epsilon, step->hidden + r * m->width);
    meet(team);
    int64_t before = m->layers * PLACES;
    Shift shift = {b->row_adapter, b->updates, before + 1, before, b->most_rank};
    const Product head[] = {{&m->lm_head, STORE, step->logits, m->vocabulary}};
    Input in = make_input(step, team, thread, head, 1, b->rows, step->hidden, 0, shift);
    multiply(team, thread, head, 1, &in, b->rows, step->s.work[thread].products);
}

static void run_and_release(void *given, Team *team, int thread) {
    run(given, team, thread);
    release_tiles();
}

/* Append the batch's tokens to the cache of every layer. hidden (rows, width) after the final norm and logits (rows,
   vocabulary) of the tokens that b->row names. Gives what `check` says; if that is not 0, nothing was done. `base` has
   room for the team's threads; a team makes one step at a time. */
int soma_step(const Model *m, const Batch *b, char *base, float *hidden, float *logits, Team *team) {
    int wrong = check(m, b);
    if (wrong) return wrong;
    Step step = {.m = m, .b = b, .is_single = 1, .hidden = hidden, .logits = logits};
    lay_out(m, b->tokens, b->rows, b->most_rank, team->threads, base, &step.s);
    int64_t most = tile_tokens(m);
    for (int64_t i = 0; i < b->sequences; i++) {
        step.is_single &= b->start[i + 1] - b->start[i] <= most;
        for (int64_t t = b->start[i]; t < b->start[i + 1]; t += most)
            step.s.tiles[step.tiles++] = (Tile){i, t, MIN(most, b->start[i + 1] - t)};
    }
    together(team, run_and_release, &step);
    return 0;
}
