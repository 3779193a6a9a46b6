/* One decode step of a Llama-shaped model for one sequence: token in, logits out, in a single call.

   A Python operator costs 5-10 µs and a layer has some twenty, so a small model spends most of its time between
   operators; and torch's bf16 matrix-vector product reads memory at half of its speed. Here a layer is six loops,
   shared by OpenMP threads, over weights that stay where torch put them. Everything but weights and cache is float32.

   Built by native.py with -DWEIGHT_BF16=0 or 1. Rows of a matrix are contiguous; keys and values of a layer are
   (kv_heads, capacity, head). */

#include <math.h>
#include <stdint.h>
#include <string.h>

#if WEIGHT_BF16
typedef uint16_t weight;
static inline float load(weight value) {
    uint32_t bits = (uint32_t)value << 16;
    float result;
    memcpy(&result, &bits, 4);
    return result;
}
static inline weight store(float value) { /* to the nearest, ties to even */
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return value != value ? 0x7FC0 : (weight)((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}
#else
typedef float weight;
static inline float load(weight value) { return value; }
static inline weight store(float value) { return value; }
#endif

/* Biases, q_norm and k_norm are NULL where the model has none; window is 0 for full attention. */
typedef struct {
    const weight *input_norm, *qkv, *qkv_bias, *q_norm, *k_norm, *out, *out_bias;
    const weight *post_norm, *gate_up, *gate_up_bias, *down, *down_bias;
    int64_t window;
} Layer;

/* cosines and sines: (positions, head / 2) */
typedef struct {
    int64_t layers, width, heads, kv_heads, head, inner, vocabulary;
    float epsilon;
    const Layer *layer;
    const weight *embedding, *norm, *lm_head;
    const float *cosines, *sines;
} Model;

/* x·y of `count` numbers for four neighbouring rows: four sums keep the multipliers busy. */
static inline void dot4(const weight *rows, const float *x, int64_t count, float *out) {
    const weight *w0 = rows, *w1 = rows + count, *w2 = rows + 2 * count, *w3 = rows + 3 * count;
    float a = 0, b = 0, c = 0, d = 0;
#pragma omp simd reduction(+ : a, b, c, d)
    for (int64_t i = 0; i < count; i++) {
        a += load(w0[i]) * x[i];
        b += load(w1[i]) * x[i];
        c += load(w2[i]) * x[i];
        d += load(w3[i]) * x[i];
    }
    out[0] = a, out[1] = b, out[2] = c, out[3] = d;
}

static inline float dot(const weight *row, const float *x, int64_t count) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < count; i++) sum += load(row[i]) * x[i];
    return sum;
}

/* out[r] = rows[r]·x for `rows` rows from `first` on. */
static inline void dots(const weight *matrix, const float *x, int64_t count, int64_t first, int64_t rows, float *out) {
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) dot4(matrix + (first + r) * count, x, count, out + r);
    for (; r < rows; r++) out[r] = dot(matrix + (first + r) * count, x, count);
}

/* e^x within 2 units in the last place, without branches so that compilers vectorise it (Cephes' polynomial). */
static inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : (x > 88.0f ? 88.0f : x);
    float n = rintf(x * 1.44269504f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t bits = ((int32_t)n + 127) << 23;
    float scale;
    memcpy(&scale, &bits, 4);
    return p * scale;
}

static inline void rms_norm(const float *x, const weight *gain, int64_t count, float epsilon, float *out) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < count; i++) sum += x[i] * x[i];
    float scale = 1.0f / sqrtf(sum / (float)count + epsilon);
    for (int64_t i = 0; i < count; i++) out[i] = x[i] * scale * load(gain[i]);
}

/* The loops below are shared by the threads of the region around them; each ends at a barrier. */
#define BLOCK 8 /* rows that a thread takes at a time */

static void multiply(const weight *matrix, const weight *bias, const float *x, int64_t rows, int64_t count,
                     int accumulate, float *y) {
#pragma omp for schedule(static)
    for (int64_t first = 0; first < rows; first += BLOCK) {
        float out[BLOCK];
        int64_t here = rows - first < BLOCK ? rows - first : BLOCK;
        dots(matrix, x, count, first, here, out);
        for (int64_t r = 0; r < here; r++)
            y[first + r] = out[r] + (bias ? load(bias[first + r]) : 0) + (accumulate ? y[first + r] : 0);
    }
}

/* silu(gate) * up: the first `inner` rows of the matrix are the gate's. */
static void gate_up(const Layer *layer, const float *x, int64_t inner, int64_t count, float *y) {
#pragma omp for schedule(static)
    for (int64_t first = 0; first < inner; first += BLOCK) {
        float gate[BLOCK], up[BLOCK];
        int64_t here = inner - first < BLOCK ? inner - first : BLOCK;
        dots(layer->gate_up, x, count, first, here, gate);
        dots(layer->gate_up, x, count, inner + first, here, up);
        for (int64_t r = 0; r < here; r++) {
            float g = gate[r], u = up[r];
            if (layer->gate_up_bias) {
                g += load(layer->gate_up_bias[first + r]);
                u += load(layer->gate_up_bias[inner + first + r]);
            }
            y[first + r] = g / (1.0f + exponential(-g)) * u;
        }
    }
}

/* Norms and rotates queries and keys in place; keys and values go into the cache at `position`. */
static void rotate(const Model *m, const Layer *layer, float *qkv, weight *keys, weight *values, int64_t capacity,
                   int64_t position) {
    int64_t head = m->head, half = head / 2;
    const float *cosine = m->cosines + position * half, *sine = m->sines + position * half;
#pragma omp for schedule(static)
    for (int64_t h = 0; h < m->heads + 2 * m->kv_heads; h++) {
        float *x = qkv + h * head;
        int64_t kv = h - m->heads;
        if (kv < m->kv_heads) {
            const weight *gain = kv < 0 ? layer->q_norm : layer->k_norm;
            if (gain) rms_norm(x, gain, head, m->epsilon, x);
            for (int64_t i = 0; i < half; i++) {
                float a = x[i], b = x[half + i];
                x[i] = a * cosine[i] - b * sine[i];
                x[half + i] = b * cosine[i] + a * sine[i];
            }
        }
        if (kv < 0) continue;
        weight *cache = kv < m->kv_heads ? keys + (kv * capacity + position) * head
                                         : values + ((kv - m->kv_heads) * capacity + position) * head;
        for (int64_t i = 0; i < head; i++) cache[i] = store(x[i]);
    }
}

/* Softmax attention of every query head over the cached positions that its layer sees. */
static void attend(const Model *m, const Layer *layer, const float *q, const weight *keys, const weight *values,
                   int64_t capacity, int64_t position, float *scores, float *out) {
    int64_t head = m->head, group = m->heads / m->kv_heads;
    int64_t first = layer->window && position + 1 > layer->window ? position + 1 - layer->window : 0;
    int64_t count = position + 1 - first;
    float scale = 1.0f / sqrtf((float)head);
#pragma omp for schedule(static)
    for (int64_t h = 0; h < m->heads; h++) {
        int64_t offset = h / group * capacity;
        float *p = scores + h * capacity, *y = out + h * head;
        dots(keys, q + h * head, head, offset + first, count, p);
        float top = p[0], sum = 0;
        for (int64_t s = 1; s < count; s++) top = p[s] > top ? p[s] : top;
#pragma omp simd reduction(+ : sum)
        for (int64_t s = 0; s < count; s++) {
            p[s] = exponential((p[s] - top) * scale);
            sum += p[s];
        }
        memset(y, 0, sizeof(float) * (size_t)head);
        for (int64_t s = 0; s < count; s++) {
            const weight *v = values + (offset + first + s) * head;
            float share = p[s] / sum;
            for (int64_t i = 0; i < head; i++) y[i] += share * load(v[i]);
        }
    }
}

/* Floats that `soma_decode` works in. */
int64_t soma_scratch(const Model *m, int64_t capacity) {
    return m->width + (2 * m->heads + 2 * m->kv_heads) * m->head + m->inner + m->heads * capacity;
}

/* Append `token` at `position` to the cache of every layer; scores of the vocabulary for what follows it. */
void soma_decode(const Model *m, weight *const *keys, weight *const *values, int64_t capacity, int64_t token,
                 int64_t position, float *scratch, float *logits, int threads) {
    float *x = scratch, *qkv = x + m->width;
    float *attended = qkv + (m->heads + 2 * m->kv_heads) * m->head, *inner = attended + m->heads * m->head;
    float *scores = inner + m->inner;
    int64_t rows = (m->heads + 2 * m->kv_heads) * m->head;
    for (int64_t i = 0; i < m->width; i++) x[i] = load(m->embedding[token * m->width + i]);
#pragma omp parallel num_threads(threads)
    {
        float h[m->width]; /* every thread norms for itself: cheaper than waiting for one that does it for all */
        for (int64_t l = 0; l < m->layers; l++) {
            const Layer *layer = &m->layer[l];
            rms_norm(x, layer->input_norm, m->width, m->epsilon, h);
            multiply(layer->qkv, layer->qkv_bias, h, rows, m->width, 0, qkv);
            rotate(m, layer, qkv, keys[l], values[l], capacity, position);
            attend(m, layer, qkv, keys[l], values[l], capacity, position, scores, attended);
            multiply(layer->out, layer->out_bias, attended, m->width, m->heads * m->head, 1, x);
            rms_norm(x, layer->post_norm, m->width, m->epsilon, h);
            gate_up(layer, h, m->inner, m->width, inner);
            multiply(layer->down, layer->down_bias, inner, m->width, m->inner, 1, x);
        }
        rms_norm(x, m->norm, m->width, m->epsilon, h);
        multiply(m->lm_head, 0, h, m->vocabulary, m->width, 0, logits);
    }
}
