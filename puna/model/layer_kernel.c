/* What a decoding step of a bf16 model does on x86 CPUs with AVX-512 BF16: products of few rows, and the small
   operations between products, each in one pass. All threads call a function together (calls.c).

   The weight of a product lies as oneDNN packs it: tiles of 64 outputs, in each the inputs by two,

       tile, pair of inputs, output, input of the pair        zeros up to a multiple of 64 outputs and of 32 inputs

   so that a tile is read from its begin to its end. All is rounded to bf16 where the plain operations round. */

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "bf16.h"

enum { TILE = 64, INPUTS = 32, VECTORS = TILE / LANES, TOGETHER = 6, MOST_ROWS = 32, PAIRS = 64, NEAR = 64 };

/* Of n numbers that are left, those that a vector holds. */
static inline __mmask16 first(long n) { return n < LANES ? (1u << (n > 0 ? n : 0)) - 1 : 0xFFFF; }

static inline __m512 in_fp32(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }

static inline __m512 load(const bf16 *x, long n) { return in_fp32(_mm256_maskz_loadu_epi16(first(n), x)); }

static inline void store(bf16 *x, __m512 values, long n) { _mm256_mask_storeu_epi16(x, first(n), rounded(values)); }

static inline __m512bh both(const bf16 *pair) { /* for every output the same */
    int32_t together;
    memcpy(&together, pair, 4);
    return (__m512bh)_mm512_set1_epi32(together);
}

/* Adds the products of some inputs to the sums of n rows. Inlined for each n: what a row has stays in registers. */
static inline __attribute__((always_inline)) void add_products(const bf16 *weight, const bf16 *x, long width,
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
void product(const bf16 *weight, const bf16 *bias, const bf16 *x, bf16 *out, long rows, long width, long n_out) {
    long padded = (width + INPUTS - 1) / INPUTS * INPUTS;
#pragma omp for schedule(static)
    for (long begin = 0; begin < n_out; begin += TILE) {
        long n = n_out - begin < TILE ? n_out - begin : TILE;
        float sums[MOST_ROWS * TILE];
        memset(sums, 0, rows * TILE * sizeof *sums);
        for (long row = 0; bias && row < rows; row++)
            for (long o = 0; o < n; o += LANES)
                _mm512_storeu_ps(sums + row * TILE + o, load(bias + begin + o, n - o));
        long step = rows > TOGETHER ? 2 * PAIRS : width; /* a part of the tile that stays near for all rows */
        for (long i = 0; i < width; i += step) {
            const bf16 *part = weight + begin * padded + i * TILE;
            long pairs = (i + step < width ? step : width - i) / 2;
            for (long row = 0; row < rows; row += TOGETHER) {
                const bf16 *of_rows = x + row * width + i;
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
            for (long o = 0; o < n; o += LANES)
                store(out + row * n_out + begin + o, _mm512_loadu_ps(sums + row * TILE + o), n - o);
    }
}

/* x (rows, width) / its root mean square, rounded, times weight (width). */
void rms_norm(const bf16 *x, const bf16 *weight, const float *eps, bf16 *out, long rows, long width) {
#pragma omp for schedule(static)
    for (long row = 0; row < rows; row++) {
        const bf16 *of_row = x + row * width;
        __m512 squares = _mm512_setzero_ps();
        for (long i = 0; i < width; i += LANES) {
            __m512 values = load(of_row + i, width - i);
            squares = _mm512_fmadd_ps(values, values, squares);
        }
        __m512 scale = _mm512_set1_ps(1 / sqrtf(_mm512_reduce_add_ps(squares) / width + *eps));
        for (long i = 0; i < width; i += LANES) {
            __m512 normed = in_fp32(rounded(_mm512_mul_ps(load(of_row + i, width - i), scale)));
            store(out + row * width + i, _mm512_mul_ps(normed, load(weight + i, width - i)), width - i);
        }
    }
}

/* x (tokens, heads, width) in place: its pairs (i, i + width / 2) turned by tables (tokens, width). */
void rotate(bf16 *x, const float *cosines, const float *sines, long tokens, long heads, long width) {
    long half = width / 2;
#pragma omp for schedule(static)
    for (long head = 0; head < tokens * heads; head++) {
        bf16 *lower = x + head * width, *upper = lower + half;
        const float *c = cosines + head / heads * width, *s = sines + head / heads * width;
        for (long i = 0; i < half; i += LANES) {
            __mmask16 left = first(half - i);
            __m512 a = load(lower + i, half - i), b = load(upper + i, half - i);
            __m512 a_cos = _mm512_mul_ps(a, _mm512_maskz_loadu_ps(left, c + i));
            __m512 b_sin = _mm512_mul_ps(b, _mm512_maskz_loadu_ps(left, s + i));
            __m512 b_cos = _mm512_mul_ps(b, _mm512_maskz_loadu_ps(left, c + half + i));
            __m512 a_sin = _mm512_mul_ps(a, _mm512_maskz_loadu_ps(left, s + half + i));
            store(lower + i, _mm512_sub_ps(a_cos, b_sin), half - i);
            store(upper + i, _mm512_add_ps(b_cos, a_sin), half - i);
        }
    }
}

/* silu(gate), rounded, times up, into gate. */
void swiglu(bf16 *gate, const bf16 *up, long count) {
#pragma omp for schedule(static)
    for (long i = 0; i < count; i += LANES) {
        __m512 x = load(gate + i, count - i), one = _mm512_set1_ps(1);
        __m512 divisor = _mm512_add_ps(one, exp2_of(_mm512_mul_ps(x, _mm512_set1_ps(-LOG2E))));
        __m512 silu = in_fp32(rounded(_mm512_div_ps(x, divisor)));
        store(gate + i, _mm512_mul_ps(silu, load(up + i, count - i)), count - i);
    }
}

void add(const bf16 *x, const bf16 *y, bf16 *out, long count) {
#pragma omp for schedule(static)
    for (long i = 0; i < count; i += LANES)
        store(out + i, _mm512_add_ps(load(x + i, count - i), load(y + i, count - i)), count - i);
}

/* Rows of x (n, width) that places (rows) name, to out; one that is not there is no number. */
void take_rows(const bf16 *x, const int64_t *places, bf16 *out, long n, long rows, long width) {
#pragma omp for schedule(static)
    for (long row = 0; row < rows; row++) {
        long place = places[row], size = width * sizeof *x;
        if (0 <= place && place < n) memcpy(out + row * width, x + place * width, size);
        else memset(out + row * width, 0xFF, size);
    }
}

/* Rows of x (rows, width) to where places (rows) say, in out. */
void put_rows(const bf16 *x, const int64_t *places, bf16 *out, long rows, long width) {
#pragma omp for schedule(static)
    for (long row = 0; row < rows; row++) memcpy(out + places[row] * width, x + row * width, width * sizeof *x);
}

/* Cosines and sines (tokens, 2 * half) of positions (tokens) times frequencies (half), and again. */
void rotary_tables(const int64_t *positions, const double *frequencies, float *cosines, float *sines, long tokens,
                   long half) {
#pragma omp for schedule(static)
    for (long i = 0; i < tokens * half; i++) {
        double angle = positions[i / half] * frequencies[i % half];
        long place = i + i / half * half;
        cosines[place] = cosines[place + half] = cos(angle);
        sines[place] = sines[place + half] = sin(angle);
    }
}

/* Keys or values of a layer: blocks of `size` tokens, in each token its heads. */
typedef struct {
    const bf16 *keys, *values;
    long size, heads, width;
} Pool;

/* q (width) times each of 16 keys. Four times, sums of two vectors become one vector of both's. */
static inline __m512 scores_of_16(const bf16 *q, const bf16 **keys, long width) {
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
static inline void pair_tokens(const bf16 **values, long count, long width, bf16 *pairs) {
    for (long t = 0; t < count; t += 2)
        for (long i = 0; i < width; i += LANES) {
            __m256i a = _mm256_loadu_si256((const void *)(values[t] + i));
            __m256i b = _mm256_loadu_si256((const void *)(values[t + 1] + i));
            _mm512_storeu_si512(pairs + t * width + 2 * i, paired(a, b));
        }
}

/* out (n vectors) = out * factor + weights (count) x pairs, for some of the channels. */
static inline __attribute__((always_inline)) void add_values(float *out, float factor, const bf16 *weights,
                                                             const bf16 *pairs, long count, long width,
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
static void attend_head(const bf16 *q, Pool pool, long head, const int32_t *table, long length, long groups,
                        bf16 *out) {
    long width = pool.width;
    float greatest[groups], total[groups], sums[groups * width], scale = LOG2E / sqrtf(width);
    bf16 weights[NEAR], pairs[NEAR * width];
    const bf16 *keys[NEAR], *values[NEAR];
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
            __m512 scores[NEAR / LANES], most = _mm512_set1_ps(greatest[g]), sum = _mm512_setzero_ps();
            for (long t = 0; t < padded; t += LANES) {
                __m512 of_16 = _mm512_mul_ps(scores_of_16(q + g * width, keys + t, width), _mm512_set1_ps(scale));
                of_16 = _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), first(count - t), of_16);
                most = _mm512_max_ps(of_16, most); /* the second where one is not a number */
                scores[t / LANES] = of_16;
            }
            float now = _mm512_reduce_max_ps(most), before = exp2f(greatest[g] - now);
            for (long t = 0; t < padded; t += LANES) {
                __m512 weight = exp2_of(_mm512_sub_ps(scores[t / LANES], _mm512_set1_ps(now)));
                sum = _mm512_add_ps(sum, weight);
                store(weights + t, weight, LANES);
            }
            for (long i = 0; i < width; i += TILE) {
                float *of_group = sums + g * width + i;
                if (width - i >= TILE)
                    add_values(of_group, before, weights, pairs + 2 * i, padded, width, VECTORS);
                else
                    add_values(of_group, before, weights, pairs + 2 * i, padded, width, VECTORS / 2);
            }
            total[g] = total[g] * before + _mm512_reduce_add_ps(sum);
            greatest[g] = now;
        }
    }
    for (long g = 0; g < groups; g++)
        for (long i = 0; i < width; i += LANES) {
            __m512 mean = _mm512_div_ps(_mm512_loadu_ps(sums + g * width + i), _mm512_set1_ps(length ? total[g] : 1));
            store(out + g * width + i, mean, LANES);
        }
}

/* q (n, heads, width), one query of each sequence, to all that tables (n, most_blocks) and lengths (n) say it has;
   width is a multiple of 32. */
void attend_paged(const bf16 *q, const bf16 *keys, const bf16 *values, const int32_t *tables, const int32_t *lengths,
                  bf16 *out, long n, long heads, long width, long kv_heads, long size, long most_blocks) {
    Pool pool = {keys, values, size, kv_heads, width};
    long groups = heads / kv_heads;
#pragma omp for collapse(2) schedule(dynamic)
    for (long row = 0; row < n; row++)
        for (long head = 0; head < kv_heads; head++) {
            long place = (row * heads + head * groups) * width;
            attend_head(q + place, pool, head, tables + row * most_blocks, lengths[row], groups, out + place);
        }
}
