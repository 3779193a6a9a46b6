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

/* A x of a token for each of `readers` products, to low (readers, most). Four sums at a time, so that none waits for the
   addition before it. */
static void shrink(const Shift *shift, int64_t token, int readers, const float *x, int64_t columns, float *low) {
    for (int reader = 0; reader < readers; reader++) {
        const Update *update = update_of(shift, token, reader);
        if (!update) continue;
        for (int64_t k = 0; k < update->rank; k += 4) {
            const float *row[4];
            floats sum[4] = {{0}};
            float four[4];
            for (int r = 0; r < 4; r++) row[r] = update->a + MIN(k + r, update->rank - 1) * columns;
            int64_t i = 0;
            for (; i + 16 <= columns; i += 16) {
                floats here = some_floats(x + i, 16);
                for (int r = 0; r < 4; r++) sum[r] += here * some_floats(row[r] + i, 16);
            }
            if (i < columns)
                for (int r = 0; r < 4; r++)
                    sum[r] += some_floats(x + i, columns - i) * some_floats(row[r] + i, columns - i);
            sum4(sum[0], sum[1], sum[2], sum[3], four);
            memcpy(low + reader * shift->most + k, four, sizeof(float) * (size_t)MIN(4, update->rank - k));
        }
    }
}

/* Adds block `block` of B (A x) to 16 results of a token. */
static void expand(const Shift *shift, int64_t token, int reader, int64_t block, const float *low, float *out) {
    const Update *update = update_of(shift, token, reader);
    if (!update) return;
    const float *b = update->b + block * update->rank * 16;
    floats sum[4] = {{0}}, result;
    low += reader * shift->most;
    int64_t k = 0;
    for (; k + 4 <= update->rank; k += 4)
        for (int r = 0; r < 4; r++) sum[r] += some_floats(b + (k + r) * 16, 16) * low[k + r];
    for (; k < update->rank; k++) sum[0] += some_floats(b + k * 16, 16) * low[k];
    memcpy(&result, out, sizeof result);
    result += (sum[0] + sum[1]) + (sum[2] + sum[3]);
    memcpy(out, &result, sizeof result);
}
