/* Adapters (LoRA): y += B (A x) for the tokens of each, beside products whose weights all tokens share. In float32: A
   (rank, columns), and B with the scale in it as blocks of 16 rows (blocks, rank, 16). rank is 0 where an adapter leaves
   a layer alone. Layers in the order of `Layer`; a token's numbers do not depend on its company. */

#define PLACES 7 /* q, k, v, out, gate, up, down */

typedef struct {
    const float *a, *b;
    int64_t rank;
} Update;

/* The updates of those products that read the same input. `of`: adapter of each token, -1 for none; NULL if no token has
   one. An adapter has `all` updates; those of these products begin at `place`. */
typedef struct {
    const int32_t *of;
    const Update *updates;
    int64_t all, place, most; /* most: the largest rank */
} Shift;

static const Update *update_of(const Shift *shift, int64_t token, int reader) {
    if (!shift->of || shift->of[token] < 0) return 0;
    const Update *update = shift->updates + shift->of[token] * shift->all + shift->place + reader;
    return update->rank ? update : 0;
}

/* A x of a token for each of `readers` products, to low (readers, most). */
static void shrink(const Shift *shift, int64_t token, int readers, const float *x, int64_t columns, float *low) {
    for (int reader = 0; reader < readers; reader++) {
        const Update *update = update_of(shift, token, reader);
        if (!update) continue;
        for (int64_t k = 0; k < update->rank; k++) {
            const float *a = update->a + k * columns;
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t i = 0; i < columns; i++) sum += a[i] * x[i];
            low[reader * shift->most + k] = sum;
        }
    }
}

/* Adds block `block` of B (A x) to 16 results of a token. */
static void expand(const Shift *shift, int64_t token, int reader, int64_t block, const float *low, float *out) {
    const Update *update = update_of(shift, token, reader);
    if (!update) return;
    const float *b = update->b + block * update->rank * 16;
    floats sum = {0};
    for (int64_t k = 0; k < update->rank; k++) {
        floats column;
        memcpy(&column, b + k * 16, sizeof column);
        sum += column * low[reader * shift->most + k];
    }
    for (int r = 0; r < 16; r++) out[r] += sum[r];
}
