// Causal attention of bf16 queries to the keys of their document, forward and backward, for AVX-512 with BF16.
//
// All products are one loop: rows of bf16 times 64 columns whose neighbours in the sum lie side by side, as the unit
// for bf16 takes them. Scores are kept turned, keys down and queries across: a query's maximum and sum are then a lane
// of a vector, and the weights are at once the factor that the next products want.
//
//     scores'  (keys, queries)  = k (keys, H) * q' (H, queries)
//     out'     (H, queries)    += v' (H, keys) * weights' (keys, queries)
//     slope_v  (keys, H)       += weights' (keys, queries) * slope_out (queries, H)       and so on
//
// A block is QUERIES columns and at most KEYS rows; softmax goes over blocks with a running maximum, and the backward
// pass finds the weights again from the logarithm of its norm. One task is a key/value head of documents that share no
// key with others, so nobody adds to another's sums. H is a multiple of 64; (T, heads, H) tensors are dense.

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "bf16.h"

#define QUERIES 64
#define KEYS 96

typedef struct { long queries_start, queries_stop, keys_start, keys_stop; } Span;

static inline float dot(const bf16 *x, const bf16 *y, long n) {
    __m512 sum = _mm512_setzero_ps();
    for (long i = 0; i < n; i += LANES) sum = _mm512_fmadd_ps(widened(x + i), widened(y + i), sum);
    return _mm512_reduce_add_ps(sum);
}

// sums (rows, 64) [+]= a (rows, 2 pairs) * b (2 pairs, 64), whose rows 2i and 2i + 1 are paired; rows is a constant.
static inline __attribute__((always_inline)) void tile(
    int rows, float *sums, long stride, const bf16 *a, long a_stride, const int32_t *b, long b_stride, long pairs,
    int adds
) {
    __m512 sum[6][4];
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < 4; c++)
            sum[r][c] = adds ? _mm512_loadu_ps(sums + r * stride + c * LANES) : _mm512_setzero_ps();
    for (long p = 0; p < pairs; p++) {
        __m512i column[4];
        for (int c = 0; c < 4; c++) column[c] = _mm512_loadu_si512(b + p * b_stride + c * LANES);
        for (int r = 0; r < rows; r++) {
            int32_t pair;
            memcpy(&pair, a + r * a_stride + 2 * p, 4);
            __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
            for (int c = 0; c < 4; c++) sum[r][c] = _mm512_dpbf16_ps(sum[r][c], x, (__m512bh)column[c]);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < 4; c++) _mm512_storeu_ps(sums + r * stride + c * LANES, sum[r][c]);
}

// The same for any number of rows and a multiple of 64 columns.
static void multiply(
    float *sums, long stride, const bf16 *a, long a_stride, const int32_t *b, long b_stride, long rows, long columns,
    long pairs, int adds
) {
    for (long c = 0; c < columns; c += 64)
        for (long r = 0; r < rows; r += 6) {
            float *s = sums + r * stride + c;
            const bf16 *x = a + r * a_stride;
            switch (rows - r) {
                case 1: tile(1, s, stride, x, a_stride, b + c, b_stride, pairs, adds); break;
                case 2: tile(2, s, stride, x, a_stride, b + c, b_stride, pairs, adds); break;
                case 3: tile(3, s, stride, x, a_stride, b + c, b_stride, pairs, adds); break;
                case 4: tile(4, s, stride, x, a_stride, b + c, b_stride, pairs, adds); break;
                case 5: tile(5, s, stride, x, a_stride, b + c, b_stride, pairs, adds); break;
                default: tile(6, s, stride, x, a_stride, b + c, b_stride, pairs, adds);
            }
        }
}

// (n, width) rows `step` apart -> dense (n, width)
static void copy_rows(bf16 *to, const bf16 *from, long step, long n, long width) {
    for (long i = 0; i < n; i++) memcpy(to + i * width, from + i * step, 2 * width);
}

// (n, width) -> (width, columns), zeros after column n
static void turn(bf16 *to, long columns, const bf16 *from, long step, long n, long width) {
    for (long start = 0; start < n; start += 32)
        for (long j = 0; j < width; j++)
            for (long i = start; i < start + 32 && i < n; i++) to[j * columns + i] = from[i * step + j];
    for (long j = 0; j < width; j++)
        for (long i = n; i < columns; i++) to[j * columns + i] = 0;
}

// (n, width) -> (width / 2, 64) pairs along the width, zeros after column n
static void turn_paired(int32_t *to, const bf16 *from, long step, long n, long width) {
    if (n < QUERIES) memset(to, 0, width / 2 * QUERIES * 4);
    for (long i = 0; i < n; i++)
        for (long j = 0; j < width / 2; j++) memcpy(to + j * QUERIES + i, from + i * step + 2 * j, 4);
}

// (n, width) -> (32, width) pairs along n, zeros after row n
static void pair_rows(int32_t *to, const bf16 *from, long step, long n, long width) {
    for (long i = 0; i < QUERIES; i += 2)
        for (long j = 0; j < width; j += LANES) {
            __m256i zero = _mm256_setzero_si256();
            __m256i x = i < n ? _mm256_loadu_si256((const void *)(from + i * step + j)) : zero;
            __m256i y = i + 1 < n ? _mm256_loadu_si256((const void *)(from + (i + 1) * step + j)) : zero;
            _mm512_storeu_si512(to + i / 2 * width + j, paired(x, y));
        }
}

// (width, 64) fp32 -> n rows of bf16
static void put_turned(bf16 *to, long step, const float *from, long n, long width, const float *scales) {
    bf16 line[QUERIES];
    for (long j = 0; j < width; j++) {
        for (long g = 0; g < QUERIES; g += LANES) {
            __m512 x = _mm512_mul_ps(_mm512_loadu_ps(from + j * QUERIES + g), _mm512_loadu_ps(scales + g));
            _mm256_storeu_si256((void *)(line + g), rounded(x));
        }
        for (long i = 0; i < n; i++) to[i * step + j] = line[i];
    }
}

// Which of the queries g to g + 15 see a key, if the first that does is `first`.
static inline __mmask16 sees(long first, long g) {
    long before = first - g;
    return before <= 0 ? 0xFFFF : before >= LANES ? 0 : (__mmask16)(0xFFFF << before);
}

static void *aligned(char **room, long bytes) {
    void *place = *room;
    *room += (bytes + 63) / 64 * 64;
    return place;
}

// How many tasks the spans make for a head, and where each begins: keys of different tasks are different.
static long tasks_of(const Span *spans, long n_spans, long *starts) {
    long n = 0, seen = 0;
    for (long s = 0; s < n_spans; s++) {
        if (!n || spans[s].keys_start >= seen) starts[n++] = s;
        if (spans[s].keys_stop > seen) seen = spans[s].keys_stop;
    }
    starts[n] = n_spans;
    return n;
}

// What a run of spans reads of the keys.
static Span whole(const Span *spans, long first, long stop) {
    Span all = spans[first];
    for (long s = first; s < stop; s++) {
        if (spans[s].keys_start < all.keys_start) all.keys_start = spans[s].keys_start;
        if (spans[s].keys_stop > all.keys_stop) all.keys_stop = spans[s].keys_stop;
    }
    return all;
}

static long even(long n) { return n + n % 2; }

static long min(long a, long b) { return a < b ? a : b; }

// q, out (Tq, heads, H); k, v (T, kv_heads, H); log_norms (heads, Tq): log2 of softmax's norm. 1: no memory.
int forward(
    const bf16 *q, const bf16 *k, const bf16 *v, bf16 *out, float *log_norms, const Span *spans, long n_spans,
    long n_queries, long heads, long kv_heads, long H, long q_step, long k_step, long v_step, int threads
) {
    long *starts = malloc((n_spans + 1) * sizeof(long)), n_tasks = 0;
    int failed = !starts;
    if (!failed) n_tasks = tasks_of(spans, n_spans, starts) * kv_heads;
    const float scale = LOG2E / sqrtf(H);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (long task = 0; task < n_tasks; task++) {
        long head = task % kv_heads, first = starts[task / kv_heads], stop = starts[task / kv_heads + 1];
        Span all = whole(spans, first, stop);
        long n = all.keys_stop - all.keys_start, columns = even(n);
        long bytes = 2 * n * H + 2 * columns * H + 2 * H * QUERIES + 6 * KEYS * QUERIES + 4 * H * QUERIES + 512;
        char *memory = aligned_alloc(64, (bytes + 63) / 64 * 64), *room = memory;
        if (!memory) {
            failed = 1;
            continue;
        }
        bf16 *keys = aligned(&room, 2 * n * H), *values = aligned(&room, 2 * columns * H);
        int32_t *queries = aligned(&room, 2 * H * QUERIES), *weights = aligned(&room, 2 * KEYS * QUERIES);
        float *scores = aligned(&room, 4 * KEYS * QUERIES), *sums = aligned(&room, 4 * H * QUERIES);
        copy_rows(keys, k + all.keys_start * k_step + head * H, k_step, n, H);
        turn(values, columns, v + all.keys_start * v_step + head * H, v_step, n, H);
        for (long s = first; s < stop; s++)
            for (long h = head * heads / kv_heads; h < (head + 1) * heads / kv_heads; h++)
                for (long start = spans[s].queries_start; start < spans[s].queries_stop; start += QUERIES) {
                    long here = min(QUERIES, spans[s].queries_stop - start), from = spans[s].keys_start - all.keys_start;
                    // the first query sees this many keys, each further one another
                    long seen = spans[s].keys_stop - spans[s].keys_start - (spans[s].queries_stop - start) + 1;
                    __m512 top[4], norm[4];
                    for (int g = 0; g < 4; g++) top[g] = _mm512_set1_ps(-INFINITY), norm[g] = _mm512_setzero_ps();
                    memset(sums, 0, 4 * H * QUERIES);
                    turn_paired(queries, q + start * q_step + h * H, q_step, here, H);
                    for (long key = 0; key < seen + here - 1; key += KEYS) {
                        long rows = min(KEYS, seen + here - 1 - key);
                        multiply(scores, QUERIES, keys + (from + key) * H, H, queries, QUERIES, rows, 64, H / 2, 0);
                        for (int g = 0; g < 4; g++) {
                            __m512 highest = top[g];
                            for (long r = 0; r < rows; r++) {
                                __mmask16 is_seen = sees(key + r - seen + 1, g * LANES);
                                __m512 x = _mm512_loadu_ps(scores + r * QUERIES + g * LANES);
                                highest = _mm512_mask_max_ps(highest, is_seen, highest, x);
                            }
                            __m512 scales = _mm512_set1_ps(scale), less = _mm512_mul_ps(highest, scales);
                            __m512 kept = exp2_of(_mm512_fmsub_ps(top[g], scales, less));
                            norm[g] = _mm512_mul_ps(norm[g], kept);
                            top[g] = highest;
                            for (long r = 0; r < rows; r += 2) {
                                __m256i both[2];
                                for (int i = 0; i < 2; i++) {
                                    __mmask16 is_seen = r + i < rows ? sees(key + r + i - seen + 1, g * LANES) : 0;
                                    __m512 x = _mm512_loadu_ps(scores + (r + i) * QUERIES + g * LANES);
                                    x = _mm512_maskz_mov_ps(is_seen, exp2_of(_mm512_fmsub_ps(x, scales, less)));
                                    norm[g] = _mm512_add_ps(norm[g], x);
                                    both[i] = rounded(x);
                                }
                                _mm512_storeu_si512(weights + r / 2 * QUERIES + g * LANES, paired(both[0], both[1]));
                            }
                            if (key)
                                for (long j = 0; j < H; j++) {
                                    float *place = sums + j * QUERIES + g * LANES;
                                    _mm512_storeu_ps(place, _mm512_mul_ps(_mm512_loadu_ps(place), kept));
                                }
                        }
                        multiply(sums, QUERIES, values + from + key, columns, weights, QUERIES, H, 64, even(rows) / 2, 1);
                    }
                    float tops[QUERIES], norms[QUERIES], shares[QUERIES];
                    for (int g = 0; g < 4; g++) {
                        _mm512_storeu_ps(tops + g * LANES, top[g]);
                        _mm512_storeu_ps(norms + g * LANES, norm[g]);
                        _mm512_storeu_ps(shares + g * LANES, _mm512_div_ps(_mm512_set1_ps(1), norm[g]));
                    }
                    put_turned(out + (start * heads + h) * H, heads * H, sums, here, H, shares);
                    for (long i = 0; i < here; i++)
                        log_norms[h * n_queries + start + i] = tops[i] * scale + log2f(norms[i]);
                }
        free(memory);
    }
    free(starts);
    return failed;
}

// Slopes of q, k and v from that of out; the rest as for `forward`. Keys that no query sees are not written.
int backward(
    const bf16 *q, const bf16 *k, const bf16 *v, const bf16 *out, const float *log_norms, const bf16 *slope,
    bf16 *slope_q, bf16 *slope_k, bf16 *slope_v, const Span *spans, long n_spans, long n_queries, long heads,
    long kv_heads, long H, long q_step, long k_step, long v_step, int threads
) {
    long *starts = malloc((n_spans + 1) * sizeof(long)), n_tasks = 0;
    int failed = !starts;
    if (!failed) n_tasks = tasks_of(spans, n_spans, starts) * kv_heads;
    const float scale = 1 / sqrtf(H);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (long task = 0; task < n_tasks; task++) {
        long head = task % kv_heads, first = starts[task / kv_heads], stop = starts[task / kv_heads + 1];
        Span all = whole(spans, first, stop);
        long n = all.keys_stop - all.keys_start, columns = even(n);
        long bytes = 4 * n * H + 2 * columns * H + 8 * n * H + 8 * H * QUERIES + 14 * KEYS * QUERIES + 4 * H * QUERIES + 1024;
        char *memory = aligned_alloc(64, (bytes + 63) / 64 * 64), *room = memory;
        if (!memory) {
            failed = 1;
            continue;
        }
        bf16 *keys = aligned(&room, 2 * n * H), *values = aligned(&room, 2 * n * H);
        bf16 *turned_keys = aligned(&room, 2 * columns * H);
        float *sums_k = aligned(&room, 4 * n * H), *sums_v = aligned(&room, 4 * n * H);
        int32_t *turned_q = aligned(&room, 2 * H * QUERIES), *turned_slope = aligned(&room, 2 * H * QUERIES);
        int32_t *paired_q = aligned(&room, 2 * H * QUERIES), *paired_slope = aligned(&room, 2 * H * QUERIES);
        float *scores = aligned(&room, 4 * KEYS * QUERIES), *slopes = aligned(&room, 4 * KEYS * QUERIES);
        bf16 *weights = aligned(&room, 2 * KEYS * QUERIES), *rows_ds = aligned(&room, 2 * KEYS * QUERIES);
        int32_t *paired_ds = aligned(&room, 2 * KEYS * QUERIES);
        float *sums_q = aligned(&room, 4 * H * QUERIES);
        copy_rows(keys, k + all.keys_start * k_step + head * H, k_step, n, H);
        copy_rows(values, v + all.keys_start * v_step + head * H, v_step, n, H);
        turn(turned_keys, columns, keys, H, n, H);
        memset(sums_k, 0, 4 * n * H);
        memset(sums_v, 0, 4 * n * H);
        for (long s = first; s < stop; s++)
            for (long h = head * heads / kv_heads; h < (head + 1) * heads / kv_heads; h++)
                for (long start = spans[s].queries_start; start < spans[s].queries_stop; start += QUERIES) {
                    long here = min(QUERIES, spans[s].queries_stop - start), from = spans[s].keys_start - all.keys_start;
                    long seen = spans[s].keys_stop - spans[s].keys_start - (spans[s].queries_stop - start) + 1;
                    const bf16 *q_ = q + start * q_step + h * H, *slope_ = slope + (start * heads + h) * H;
                    const bf16 *out_ = out + (start * heads + h) * H;
                    float norms[QUERIES], means[QUERIES], scales[QUERIES];
                    for (long i = 0; i < QUERIES; i++) {
                        scales[i] = scale;
                        means[i] = i < here ? dot(slope_ + i * heads * H, out_ + i * heads * H, H) : 0;
                        norms[i] = i < here ? log_norms[h * n_queries + start + i] : INFINITY;
                    }
                    turn_paired(turned_q, q_, q_step, here, H);
                    turn_paired(turned_slope, slope_, heads * H, here, H);
                    pair_rows(paired_q, q_, q_step, here, H);
                    pair_rows(paired_slope, slope_, heads * H, here, H);
                    memset(sums_q, 0, 4 * H * QUERIES);
                    for (long key = 0; key < seen + here - 1; key += KEYS) {
                        long rows = min(KEYS, seen + here - 1 - key), place = from + key;
                        multiply(scores, QUERIES, keys + place * H, H, turned_q, QUERIES, rows, 64, H / 2, 0);
                        multiply(slopes, QUERIES, values + place * H, H, turned_slope, QUERIES, rows, 64, H / 2, 0);
                        for (long r = 0; r < rows; r += 2)
                            for (int g = 0; g < QUERIES; g += LANES) {
                                __m256i both[2];
                                for (int i = 0; i < 2; i++) {
                                    long at = (r + i) * QUERIES + g;
                                    __mmask16 is_seen = r + i < rows ? sees(key + r + i - seen + 1, g) : 0;
                                    __m512 x = _mm512_fmsub_ps(_mm512_loadu_ps(scores + at), _mm512_set1_ps(scale * LOG2E),
                                                               _mm512_loadu_ps(norms + g));
                                    x = _mm512_maskz_mov_ps(is_seen, exp2_of(x));
                                    __m512 dx = _mm512_sub_ps(_mm512_loadu_ps(slopes + at), _mm512_loadu_ps(means + g));
                                    both[i] = rounded(_mm512_maskz_mul_ps(is_seen, x, dx));
                                    if (r + i < rows) {
                                        _mm256_storeu_si256((void *)(weights + at), rounded(x));
                                        _mm256_storeu_si256((void *)(rows_ds + at), both[i]);
                                    }
                                }
                                _mm512_storeu_si512(paired_ds + r / 2 * QUERIES + g, paired(both[0], both[1]));
                            }
                        multiply(sums_v + place * H, H, weights, QUERIES, paired_slope, H, rows, H, QUERIES / 2, 1);
                        multiply(sums_k + place * H, H, rows_ds, QUERIES, paired_q, H, rows, H, QUERIES / 2, 1);
                        multiply(sums_q, QUERIES, turned_keys + place, columns, paired_ds, QUERIES, H, 64, even(rows) / 2, 1);
                    }
                    put_turned(slope_q + (start * heads + h) * H, heads * H, sums_q, here, H, scales);
                }
        for (long i = 0; i < n; i++)
            for (long j = 0; j < H; j += LANES) {
                long to = ((all.keys_start + i) * kv_heads + head) * H + j;
                __m512 dk = _mm512_mul_ps(_mm512_loadu_ps(sums_k + i * H + j), _mm512_set1_ps(scale));
                _mm256_storeu_si256((void *)(slope_k + to), rounded(dk));
                _mm256_storeu_si256((void *)(slope_v + to), rounded(_mm512_loadu_ps(sums_v + i * H + j)));
            }
        free(memory);
    }
    free(starts);
    return failed;
}
