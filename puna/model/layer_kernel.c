/* What a decoding step of a bf16 model does on x86 CPUs with AVX-512 BF16: products of few rows, and the small
   operations between products, each in one pass.

   The weight of a product lies as oneDNN packs it: tiles of 64 outputs, in each the inputs by two,

       tile, pair of inputs, output, input of the pair        zeros up to a multiple of 64 outputs and of 32 inputs

   so that a tile is read from its begin to its end. All is rounded to bf16 where the plain operations round. */

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

enum { TILE = 64, INPUTS = 32, LANES = 16, VECTORS = TILE / LANES, TOGETHER = 6, MOST_ROWS = 32, PAIRS = 64 };
enum { ALONE = 1 << 14, NEAR = 64 };

static inline float widened(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline uint16_t rounded(float x) { /* the even one of two that are equally near; no number stays none */
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return x != x ? 0x7FC0 : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}

static inline float exponential(float x) { /* e^x, as one polynomial that the compiler can apply to many at once */
    x = x < -87 ? -87 : x > 88 ? 88 : x;
    float power = rintf(x * 1.44269504f);
    float rest = x - power * 0.693359375f + power * 2.12194440e-4f;
    float value = 1.9875691e-4f;
    value = value * rest + 1.3981999e-3f;
    value = value * rest + 8.3334519e-3f;
    value = value * rest + 4.1665795e-2f;
    value = value * rest + 1.6666665e-1f;
    value = value * rest + 5.0000001e-1f;
    value = value * rest * rest + rest + 1;
    uint32_t bits = (uint32_t)((int32_t)power + 127) << 23;
    float scale;
    memcpy(&scale, &bits, 4);
    return value * scale;
}

static inline __m512bh both(const uint16_t *pair) { /* for every output the same */
    int32_t together;
    memcpy(&together, pair, 4);
    return (__m512bh)_mm512_set1_epi32(together);
}

/* Adds the products of some inputs to the sums of n rows. Inlined for each n: what a row has stays in registers. */
static inline __attribute__((always_inline)) void add_products(const uint16_t *weight, const uint16_t *x, long width,
                                                               long pairs, const int n, float *sums) {
    __m512 sum[TOGETHER][VECTORS];
    for (int r = 0; r < n; r++)
        for (int v = 0; v < VECTORS; v++) sum[r][v] = _mm512_loadu_ps(sums + r * TILE + v * LANES);
    for (long p = 0; p < pairs; p++, weight += 2 * TILE) {
        __m512bh part[VECTORS];
        for (int v = 0; v < VECTORS; v++) {
            _mm_prefetch((const char *)(weight + 2 * v * LANES) + 4096, _MM_HINT_T0);
            part[v] = (__m512bh)_mm512_loadu_si512(weight + 2 * v * LANES);
        }
        for (int r = 0; r < n; r++) {
            __m512bh of_row = both(x + r * width + 2 * p);
            for (int v = 0; v < VECTORS; v++) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], part[v], of_row);
        }
    }
    for (int r = 0; r < n; r++)
        for (int v = 0; v < VECTORS; v++) _mm512_storeu_ps(sums + r * TILE + v * LANES, sum[r][v]);
}

/* x (rows, width) to out (rows, n_out); width is even, rows are at most MOST_ROWS, bias (n_out) may be missing. */
void product(const uint16_t *weight, const uint16_t *bias, const uint16_t *x, uint16_t *out, long rows, long width,
             long n_out, int threads) {
    long padded = (width + INPUTS - 1) / INPUTS * INPUTS;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long begin = 0; begin < n_out; begin += TILE) {
        long n = n_out - begin < TILE ? n_out - begin : TILE;
        float sums[MOST_ROWS * TILE];
        memset(sums, 0, rows * TILE * sizeof *sums);
        for (long row = 0; bias && row < rows; row++)
            for (long o = 0; o < n; o++) sums[row * TILE + o] = widened(bias[begin + o]);
        long step = rows > TOGETHER ? 2 * PAIRS : width; /* a part of the tile that stays near for all rows */
        for (long i = 0; i < width; i += step) {
            const uint16_t *part = weight + begin * padded + i * TILE;
            long pairs = (i + step < width ? step : width - i) / 2;
            for (long row = 0; row < rows; row += TOGETHER) {
                const uint16_t *of_rows = x + row * width + i;
                float *sums_of_rows = sums + row * TILE;
                switch (rows - row) {
                    case 1: add_products(part, of_rows, width, pairs, 1, sums_of_rows); break;
                    case 2: add_products(part, of_rows, width, pairs, 2, sums_of_rows); break;
                    case 3: add_products(part, of_rows, width, pairs, 3, sums_of_rows); break;
                    case 4: add_products(part, of_rows, width, pairs, 4, sums_of_rows); break;
                    case 5: add_products(part, of_rows, width, pairs, 5, sums_of_rows); break;
                    default: add_products(part, of_rows, width, pairs, 6, sums_of_rows);
                }
            }
        }
        for (long row = 0; row < rows; row++)
            for (long o = 0; o < n; o++) out[row * n_out + begin + o] = rounded(sums[row * TILE + o]);
    }
}

/* x (rows, width) / its root mean square, rounded, times weight (width). */
void rms_norm(const uint16_t *x, const uint16_t *weight, uint16_t *out, long rows, long width, float eps,
              int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * width > ALONE)
    for (long row = 0; row < rows; row++) {
        const uint16_t *of_row = x + row * width;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (long i = 0; i < width; i++) sum += widened(of_row[i]) * widened(of_row[i]);
        float scale = 1 / sqrtf(sum / width + eps);
        for (long i = 0; i < width; i++)
            out[row * width + i] = rounded(widened(rounded(widened(of_row[i]) * scale)) * widened(weight[i]));
    }
}

/* x (tokens, heads, width) in place: its pairs (i, i + width / 2) turned by cos and sin (tokens, width), fp32. */
void rotate(uint16_t *x, const float *cos, const float *sin, long tokens, long heads, long width, int threads) {
    long half = width / 2;
#pragma omp parallel for schedule(static) num_threads(threads) if (tokens * heads * width > ALONE)
    for (long token = 0; token < tokens; token++)
        for (long head = 0; head < heads; head++) {
            uint16_t *first = x + (token * heads + head) * width, *second = first + half;
            const float *c = cos + token * width, *s = sin + token * width;
#pragma omp simd
            for (long i = 0; i < half; i++) {
                float a = widened(first[i]), b = widened(second[i]);
                first[i] = rounded(a * c[i] - b * s[i]);
                second[i] = rounded(b * c[i + half] + a * s[i + half]);
            }
        }
}

/* silu(gate), rounded, times up, into gate. */
void swiglu(uint16_t *gate, const uint16_t *up, long count, int threads) {
#pragma omp parallel for simd schedule(static) num_threads(threads) if (count > ALONE)
    for (long i = 0; i < count; i++) {
        float x = widened(gate[i]);
        gate[i] = rounded(widened(rounded(x / (1 + exponential(-x)))) * widened(up[i]));
    }
}

/* Keys or values of a layer: blocks of `size` tokens, in each token its heads. */
typedef struct {
    const uint16_t *keys, *values;
    long size, heads, width;
} Pool;

/* q (width) times each of 16 keys. Four times, sums of two vectors become one vector of both's. */
static inline __m512 scores_of_16(const uint16_t *q, const uint16_t **keys, long width) {
    __m512 sum[16];
#pragma GCC unroll 16
    for (int t = 0; t < 16; t++) sum[t] = _mm512_setzero_ps();
    for (long i = 0; i < width; i += 2 * LANES) {
        __m512bh part = (__m512bh)_mm512_loadu_si512(q + i);
#pragma GCC unroll 16
        for (int t = 0; t < 16; t++)
            sum[t] = _mm512_dpbf16_ps(sum[t], (__m512bh)_mm512_loadu_si512(keys[t] + i), part);
    }
#pragma GCC unroll 8
    for (int t = 0; t < 8; t++)
        sum[t] = _mm512_add_ps(_mm512_unpacklo_ps(sum[2 * t], sum[2 * t + 1]),
                               _mm512_unpackhi_ps(sum[2 * t], sum[2 * t + 1]));
#pragma GCC unroll 4
    for (int t = 0; t < 4; t++) {
        __m512d a = _mm512_castps_pd(sum[2 * t]), b = _mm512_castps_pd(sum[2 * t + 1]);
        sum[t] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    for (int n = 2; n; n /= 2)
        for (int t = 0; t < n; t++)
            sum[t] = _mm512_add_ps(_mm512_shuffle_f32x4(sum[2 * t], sum[2 * t + 1], 0x88),
                                   _mm512_shuffle_f32x4(sum[2 * t], sum[2 * t + 1], 0xDD));
    return sum[0];
}

/* Lays values (count, width) by two tokens, so that products sum over both: pair of tokens, channel, token. */
static inline void pair_tokens(const uint16_t **values, long count, long width, uint16_t *pairs) {
    for (long t = 0; t < count; t += 2)
        for (long i = 0; i < width; i += LANES) {
            __m512i a = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)(values[t] + i)));
            __m512i b = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)(values[t + 1] + i)));
            _mm512_storeu_si512(pairs + t * width + 2 * i, _mm512_or_si512(a, _mm512_slli_epi32(b, 16)));
        }
}

/* out (n vectors) = out * factor + weights (count) x pairs, for some of the channels. */
static inline __attribute__((always_inline)) void add_values(float *out, float factor, const uint16_t *weights,
                                                             const uint16_t *pairs, long count, long width,
                                                             const int n) {
    __m512 sum[VECTORS];
    for (int v = 0; v < n; v++) sum[v] = _mm512_mul_ps(_mm512_loadu_ps(out + v * LANES), _mm512_set1_ps(factor));
    for (long t = 0; t < count; t += 2)
        for (int v = 0; v < n; v++)
            sum[v] = _mm512_dpbf16_ps(sum[v], (__m512bh)_mm512_loadu_si512(pairs + t * width + 2 * v * LANES),
                                      both(weights + t));
    for (int v = 0; v < n; v++) _mm512_storeu_ps(out + v * LANES, sum[v]);
}

/* The queries q (groups, width) that share a head of the pool meet it in parts of so many tokens as stay near. */
static void attend_head(const uint16_t *q, Pool pool, long head, const int32_t *table, long length, long groups,
                        uint16_t *out) {
    long width = pool.width;
    float greatest[groups], total[groups], sums[groups * width], scores[NEAR], scale = 1 / sqrtf(width);
    uint16_t weights[NEAR], pairs[NEAR * width];
    const uint16_t *keys[NEAR], *values[NEAR];
    memset(sums, 0, sizeof sums);
    for (long g = 0; g < groups; g++) greatest[g] = -INFINITY, total[g] = 0;
    for (long begin = 0; begin < length; begin += NEAR) {
        long count = length - begin < NEAR ? length - begin : NEAR, padded = (count + 15) / 16 * 16;
        for (long t = 0; t < padded; t++) { /* behind the end the first token stands in, with no weight */
            long place = t < count ? begin + t : begin;
            long slot = (long)table[place / pool.size] * pool.size + place % pool.size;
            keys[t] = pool.keys + (slot * pool.heads + head) * width;
            values[t] = pool.values + (slot * pool.heads + head) * width;
        }
        pair_tokens(values, padded, width, pairs);
        for (long g = 0; g < groups; g++) {
            for (long t = 0; t < padded; t += 16)
                _mm512_storeu_ps(scores + t, scores_of_16(q + g * width, keys + t, width));
            float most = greatest[g], sum = 0;
#pragma omp simd reduction(max : most)
            for (long t = 0; t < count; t++) most = scores[t] * scale > most ? scores[t] * scale : most;
            for (long t = count; t < padded; t++) scores[t] = -INFINITY;
#pragma omp simd reduction(+ : sum)
            for (long t = 0; t < padded; t++) {
                float weight = scores[t] == -INFINITY ? 0 : exponential(scores[t] * scale - most);
                sum += weight;
                weights[t] = rounded(weight);
            }
            float before = begin ? exponential(greatest[g] - most) : 0;
            for (long i = 0; i < width; i += TILE) {
                float *of_group = sums + g * width + i;
                if (width - i >= TILE)
                    add_values(of_group, before, weights, pairs + 2 * i, padded, width, VECTORS);
                else
                    add_values(of_group, before, weights, pairs + 2 * i, padded, width, VECTORS / 2);
            }
            total[g] = total[g] * before + sum;
            greatest[g] = most;
        }
    }
    for (long g = 0; g < groups; g++)
        for (long i = 0; i < width; i++) out[g * width + i] = rounded(length ? sums[g * width + i] / total[g] : 0);
}

/* q (n, heads, width), one query of each sequence, to all that tables (n, most_blocks) and lengths (n) say it has;
   width is a multiple of 32. */
void attend_paged(const uint16_t *q, const uint16_t *keys, const uint16_t *values, const int32_t *tables,
                  const int32_t *lengths, uint16_t *out, long n, long heads, long width, long kv_heads, long size,
                  long most_blocks, int threads) {
    Pool pool = {keys, values, size, kv_heads, width};
    long groups = heads / kv_heads;
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(threads)
    for (long row = 0; row < n; row++)
        for (long head = 0; head < kv_heads; head++) {
            long place = (row * heads + head * groups) * width;
            attend_head(q + place, pool, head, tables + row * most_blocks, lengths[row], groups, out + place);
        }
}
