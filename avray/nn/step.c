/* One step of a decoder-only transformer for a few rows: what avray/nn/native.py compiles and calls.

   At one row a step reads every weight once, so it takes as long as the weights take to arrive. Weights lie in panels
   of 16 outputs, [panel][input][16], read front to back; an output is accumulated over its inputs in order and in
   float32, whatever the weights' type. A row's result therefore depends on nothing but the row: not on the others, not
   on how many there are, not on the number of threads. One parallel region spans the step. */

#include <math.h>
#include <sched.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define LANES 16
#define MAX_HEAD 256
#define PANELS 4
#define ROWS 8

typedef float vec __attribute__((vector_size(64), aligned(4)));
typedef int32_t ivec __attribute__((vector_size(64)));
typedef uint16_t half16 __attribute__((vector_size(32), aligned(2)));
typedef uint32_t uvec __attribute__((vector_size(64)));
typedef int32_t wide __attribute__((vector_size(64), aligned(4)));

enum { FLOAT32, BFLOAT16, INT8 };
enum { STORE, ADD, GELU };

typedef struct {
    const void *weight;
    const float *scale; /* of each output, int8 only */
    const float *bias;  /* may be null, as everything below that a setting leaves out */
    int32_t inputs, panels, type, unused;
} Linear;

typedef struct {
    Linear qkv, out, up, down;
    const float *norm1, *norm1_bias, *norm2, *norm2_bias, *query_norm, *key_norm;
    char *cache; /* [rows, 2 x kv heads, context, head] */
} Layer;

typedef struct {
    Layer *layers;
    Linear head;
    const float *norm, *norm_bias;
    float *x, *qkv, *mixed, *hidden, *logits; /* [rows, width] ... */
    float *scratch;                           /* [threads, scratch_size] */
    int32_t num_layers, rows, width, hidden_size, num_heads, kv_heads, head_size, context;
    int32_t qkv_size, up_size, logits_size, scratch_size, threads, rms, gated, cache_type;
    float epsilon;
    int32_t arrived, round;
} Model;

int omp_get_thread_num(void);
int omp_get_num_threads(void);

/* A barrier that gives its core away after some microseconds: OpenMP's own spins for milliseconds, which on a machine
   with other work makes a step a hundred times slower. */
static void meet(Model *m) {
    int32_t round = __atomic_load_n(&m->round, __ATOMIC_ACQUIRE);
    if (__atomic_add_fetch(&m->arrived, 1, __ATOMIC_ACQ_REL) == omp_get_num_threads()) {
        m->arrived = 0;
        __atomic_store_n(&m->round, round + 1, __ATOMIC_RELEASE);
        return;
    }
    for (int spins = 0; __atomic_load_n(&m->round, __ATOMIC_ACQUIRE) == round; spins++)
        if (spins > 20000) sched_yield();
}

static inline vec splat(float a) { return a - (vec){}; }

static const ivec count = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

static inline vec choose(ivec where, vec a, vec b) { return (vec)(((ivec)a & where) | ((ivec)b & ~where)); }

static inline float sum(vec a) {
    float s[LANES];
    memcpy(s, &a, sizeof s);
    for (int step = LANES / 2; step; step /= 2)
        for (int i = 0; i < step; i++) s[i] += s[i + step];
    return s[0];
}

/* The sums of 16 vectors, as one: neighbours are added four times over. */
static inline vec sums(vec *a) {
#pragma GCC unroll 4
    for (int count = LANES / 2; count; count /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < count; i++) {
            vec x = a[2 * i], y = a[2 * i + 1];
            a[i] = __builtin_shufflevector(x, y, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
                   __builtin_shufflevector(x, y, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
        }
    return a[0];
}

/* e^x to 2 units in the last place, 0 below -87 (Cephes' polynomial). */
static inline vec vexp(vec x) {
    x = choose(x < 88.0f, x, splat(88.0f));
    ivec keep = x > -87.0f;
    x = choose(keep, x, splat(0.0f));
    vec n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;
    vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    ivec e = (__builtin_convertvector(n, ivec) + 127) << 23;
    return choose(keep, p * (vec)e, splat(0.0f));
}

/* Not inlined, nor is `scaled`: the compiler might join a product with a sum in one tile and not in another. */
#define APART static __attribute__((noinline))

/* x / 2 (1 + erf(x / sqrt 2)), erf to 1.5e-7 (Abramowitz and Stegun 7.1.26). */
APART vec gelu(vec x) {
    vec z = choose(x < 0.0f, -x, x) * 0.70710678f;
    vec t = 1.0f / (1.0f + 0.3275911f * z);
    vec p = splat(1.061405429f);
    p = p * t - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    vec erf = 1.0f - p * t * vexp(-z * z);
    return 0.5f * x * (1.0f + choose(x < 0.0f, -erf, erf));
}

APART vec scaled(vec a, const float *scale) { return a * *(const vec *)scale; }

#define INLINE static inline __attribute__((always_inline))

/* 16 numbers from number `at` on. */
INLINE vec load(const void *from, size_t at, int type) {
    if (type == FLOAT32) return *(const vec *)((const float *)from + at);
    return (vec)(__builtin_convertvector(*(const half16 *)((const uint16_t *)from + at), uvec) << 16);
}

/* The weights of input k in a panel. int8 has four inputs in the bytes of an int32; one shift brings a byte to the top,
   and the bytes below it, which come along, were reckoned with when it was rounded. */
INLINE vec weights(const void *weight, size_t panel, int k, int inputs, int type) {
    if (type != INT8) return load(weight, (panel * inputs + k) * LANES, type);
    ivec four = *(const wide *)((const int32_t *)weight + (panel * (inputs / 4) + k / 4) * LANES);
    return __builtin_convertvector(four << (24 - k % 4 * 8), vec);
}

/* A tile of y = x W'; `panels`, `rows` and the types are constants where it is inlined. */
INLINE void tile(const Linear *l, int panel, int panels, int rows, int type, const float *x, int x_size, float *y,
                 int y_size, int how) {
    vec acc[PANELS][ROWS] = {};
    for (int first = 0; first < l->inputs; first += 4)
#pragma GCC unroll 4
        for (int k = first; k < first + 4; k++)
            for (int p = 0; p < panels; p++) {
                vec w = weights(l->weight, panel + p, k, l->inputs, type);
                for (int r = 0; r < rows; r++) acc[p][r] += w * x[r * x_size + k];
            }
    for (int p = 0; p < panels; p++)
        for (int r = 0; r < rows; r++) {
            int n = (panel + p) * LANES;
            vec *to = (vec *)(y + (size_t)r * y_size + n), a = acc[p][r];
            if (type == INT8) a = scaled(a, l->scale + n);
            if (l->bias) a += *(const vec *)(l->bias + n);
            *to = how == ADD ? *to + a : how == GELU ? gelu(a) : a;
        }
}

/* Weights pass once for 8 rows (2 panels at a time), 4 panels at a time for fewer: 16 accumulators either way. */
INLINE void tiles(const Linear *l, int panel, int panels, int rows, int type, const float *x, int x_size, float *y,
                  int y_size, int how) {
    int r = 0;
    for (; r + 8 <= rows; r += 8)
        for (int p = 0; p < panels; p += 2)
            tile(l, panel + p, panels > 1 ? 2 : 1, 8, type, x + r * x_size, x_size, y + r * y_size, y_size, how);
    for (; r + 4 <= rows; r += 4) tile(l, panel, panels, 4, type, x + r * x_size, x_size, y + r * y_size, y_size, how);
    for (; r + 2 <= rows; r += 2) tile(l, panel, panels, 2, type, x + r * x_size, x_size, y + r * y_size, y_size, how);
    for (; r < rows; r++) tile(l, panel, panels, 1, type, x + r * x_size, x_size, y + r * y_size, y_size, how);
}

#define TILES(type)                                                                                                  \
    if (panels == PANELS) tiles(l, panel, PANELS, rows, type, x, x_size, y, y_size, how);                            \
    else for (int p = 0; p < panels; p++) tiles(l, panel + p, 1, rows, type, x, x_size, y, y_size, how)

/* y [rows, outputs] = x [rows, inputs] times the weights. */
static void linear(Model *m, const Linear *l, const float *x, int x_size, float *y, int y_size, int how) {
    int rows = m->rows;
#pragma omp for schedule(static) nowait
    for (int group = 0; group < (l->panels + PANELS - 1) / PANELS; group++) {
        int panel = group * PANELS, panels = l->panels - panel < PANELS ? l->panels - panel : PANELS;
        if (l->type == FLOAT32) { TILES(FLOAT32); }
        else if (l->type == BFLOAT16) { TILES(BFLOAT16); }
        else { TILES(INT8); }
    }
    meet(m);
}

static void normalise(const float *x, float *y, int size, const float *weight, const float *bias, int rms, float epsilon) {
    vec total = {}, square = {};
    for (int i = 0; i < size; i += LANES) total += *(const vec *)(x + i);
    float mean = rms ? 0.0f : sum(total) / size;
    for (int i = 0; i < size; i += LANES) {
        vec d = *(const vec *)(x + i) - mean;
        square += d * d;
    }
    float scale = 1.0f / sqrtf(sum(square) / size + epsilon);
    for (int i = 0; i < size; i += LANES) {
        vec d = (*(const vec *)(x + i) - mean) * scale * *(const vec *)(weight + i);
        *(vec *)(y + i) = bias ? d + *(const vec *)(bias + i) : d;
    }
}

/* Every thread normalises all rows for itself: cheaper than waiting for one that does. */
static void normalised(const Model *m, float *to, const float *weight, const float *bias) {
    for (int r = 0; r < m->rows; r++)
        normalise(m->x + r * m->width, to + r * m->width, m->width, weight, bias, m->rms, m->epsilon);
}

/* Norm and rotation of one head, in place; angles are head_size / 2 cosines, then as many sines. */
static void turn(const Model *m, float *head, const float *norm, const float *angles) {
    if (norm) normalise(head, head, m->head_size, norm, NULL, 1, 1e-6f);
    int half = m->head_size / 2;
    for (int i = 0; angles && i < half; i++) {
        float a = head[i], b = head[i + half], c = angles[i], s = angles[i + half];
        head[i] = a * c - b * s;
        head[i + half] = b * c + a * s;
    }
}

/* 16 positions at a time; those past the end are read (the cache is that long) and weigh nothing. */
INLINE void attend(const float *query, const void *keys, const void *values, int length, int size, int type,
                   float *scores, float *out) {
    float scale = 1.0f / sqrtf(size), most = -INFINITY;
    vec greatest = splat(-INFINITY), total = {}, mixed[MAX_HEAD / LANES] = {};
    for (int t = 0; t < length; t += LANES) {
        vec dots[LANES] = {};
#pragma GCC unroll 16
        for (int j = 0; j < LANES; j++)
            for (int i = 0; i < size; i += LANES)
                dots[j] += *(const vec *)(query + i) * load(keys, (size_t)(t + j) * size + i, type);
        vec found = choose(t + count < length, sums(dots) * scale, splat(-INFINITY));
        *(vec *)(scores + t) = found;
        greatest = choose(found > greatest, found, greatest);
    }
    for (int i = 0; i < LANES; i++) most = greatest[i] > most ? greatest[i] : most;
    for (int t = 0; t < length; t += LANES) total += *(vec *)(scores + t) = vexp(*(vec *)(scores + t) - most);
    for (int t = 0; t < length; t++)
        for (int i = 0; i < size; i += LANES) mixed[i / LANES] += scores[t] * load(values, (size_t)t * size + i, type);
    float inverse = 1.0f / sum(total);
    for (int i = 0; i < size; i += LANES) *(vec *)(out + i) = mixed[i / LANES] * inverse;
}

static void attend_any(const float *query, const void *keys, const void *values, int length, int size, int type,
                       float *scores, float *out) {
    if (type == FLOAT32 && size == 64) attend(query, keys, values, length, 64, FLOAT32, scores, out);
    else if (type == FLOAT32) attend(query, keys, values, length, size, FLOAT32, scores, out);
    else if (size == 64) attend(query, keys, values, length, 64, BFLOAT16, scores, out);
    else attend(query, keys, values, length, size, BFLOAT16, scores, out);
}

/* Keep a key or value in the cache's type, bfloat16 rounded to nearest even. */
static void keep(const float *from, char *to, int size, int type) {
    if (type == FLOAT32) memcpy(to, from, size * sizeof(float));
    for (int i = 0; type == BFLOAT16 && i < size; i++) {
        uint32_t bits;
        memcpy(&bits, from + i, sizeof bits);
        ((uint16_t *)to)[i] = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    }
}

/* Write this step's key and value, then attend with every query of the group. */
static void attention(Model *m, const Layer *layer, const int64_t *positions, const float *angles, float *scores) {
    int size = m->head_size, group = m->num_heads / m->kv_heads;
    size_t each = (size_t)size * (m->cache_type == FLOAT32 ? 4 : 2), line = m->context * each;
#pragma omp for schedule(static) nowait collapse(2)
    for (int r = 0; r < m->rows; r++)
        for (int h = 0; h < m->kv_heads; h++) {
            float *qkv = m->qkv + (size_t)r * m->qkv_size, *query = qkv + h * group * size;
            float *key = qkv + (m->num_heads + h) * size, *value = qkv + (m->num_heads + m->kv_heads + h) * size;
            char *keys = layer->cache + (2 * r * m->kv_heads + h) * line, *values = keys + m->kv_heads * line;
            const float *turned = angles ? angles + (size_t)r * size : NULL;
            turn(m, key, layer->key_norm, turned);
            keep(key, keys + positions[r] * each, size, m->cache_type);
            keep(value, values + positions[r] * each, size, m->cache_type);
            for (int q = 0; q < group; q++, query += size) {
                turn(m, query, layer->query_norm, turned);
                attend_any(query, keys, values, positions[r] + 1, size, m->cache_type, scores,
                           m->mixed + (size_t)r * m->width + (h * group + q) * size);
            }
        }
    meet(m);
}

static void gate(Model *m) {
#pragma omp for schedule(static) nowait
    for (int r = 0; r < m->rows; r++)
        for (int i = 0; i < m->hidden_size; i += LANES) {
            vec *a = (vec *)(m->hidden + (size_t)r * m->up_size + i);
            *a = *a / (1.0f + vexp(-*a)) * *(vec *)((float *)a + m->hidden_size);
        }
    meet(m);
}

/* x [rows, width] holds embeddings with their positions; logits [rows, logits_size] comes out. */
void avray_step(Model *m, const int64_t *positions, const float *angles) {
    m->arrived = 0;
#pragma omp parallel num_threads(m->threads)
    {
        float *own = m->scratch + (size_t)omp_get_thread_num() * m->scratch_size, *scores = own + m->rows * m->width;
        for (const Layer *l = m->layers; l < m->layers + m->num_layers; l++) {
            normalised(m, own, l->norm1, l->norm1_bias);
            linear(m, &l->qkv, own, m->width, m->qkv, m->qkv_size, STORE);
            attention(m, l, positions, angles, scores);
            linear(m, &l->out, m->mixed, m->width, m->x, m->width, ADD);
            normalised(m, own, l->norm2, l->norm2_bias);
            linear(m, &l->up, own, m->width, m->hidden, m->up_size, m->gated ? STORE : GELU);
            if (m->gated) gate(m);
            linear(m, &l->down, m->hidden, m->up_size, m->x, m->width, ADD);
        }
        normalised(m, own, m->norm, m->norm_bias);
        linear(m, &m->head, own, m->width, m->logits, m->logits_size, STORE);
    }
}
