/* The likeliest token of each row of logits. */

#define STRIDE 64 /* numbers that are looked at together */

static int holds(const float *x, float value) {
    int found = 0;
    for (int i = 0; i < STRIDE; i++) found |= x[i] == value;
    return found;
}

/* Of each row of x (rows, columns) the largest number, and the first place where it is. A row with a NaN has a NaN. */
void soma_largest(const float *x, int64_t rows, int64_t columns, float *best, int64_t *place) {
    for (int64_t row = 0; row < rows; row++, x += columns) {
        floats top[STRIDE / 16];
        integers strange[STRIDE / 16] = {{0}};
        int64_t i = 0, found = 0;
        for (int k = 0; k < STRIDE / 16; k++) top[k] = (floats){0} - INFINITY;
        for (; i + STRIDE <= columns; i += STRIDE)
            for (int k = 0; k < STRIDE / 16; k++) {
                floats here = some_floats(x + i + 16 * k, 16);
                top[k] = larger(top[k], here);
                strange[k] |= here != here;
            }
        float each[STRIDE], most = -INFINITY;
        int32_t is_nan[STRIDE], any_nan = 0;
        memcpy(each, top, sizeof each);
        memcpy(is_nan, strange, sizeof is_nan);
        for (int k = 0; k < STRIDE; k++) most = each[k] > most ? each[k] : most, any_nan |= is_nan[k];
        for (; i < columns; i++) most = x[i] > most ? x[i] : most, any_nan |= x[i] != x[i];
        while (found + STRIDE <= columns && !holds(x + found, most)) found += STRIDE;
        while (found < columns - 1 && x[found] != most) found++;
        best[row] = any_nan ? NAN : most;
        place[row] = found;
    }
}
