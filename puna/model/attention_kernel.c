// Causal attention of bf16 queries to the keys of their document, forward and backward, for AVX-512 with BF16.
//
// All products are one loop: rows of bf16 times 64 columns whose neighbours in the sum lie side by side, as the unit
// for bf16 takes them. A document's keys and values are laid out so once, for all queries that share them:
//
//     scores  (queries, keys)  = q (queries, H) * k' (H, keys)             k' in panels of 64 keys
//     out     (queries, H)    += weights (queries, keys) * v (keys, H)     v two keys at a time
//     slope_v (keys, H)       += weights' (keys, queries) * slope_out (queries, H)       and so on
//
// A block is QUERIES rows and at most KEYS columns, and ROWS rows of it go from product to product before the next, so
// what lies between stays in the nearest cache. Softmax goes over blocks with a running maximum, and the backward pass
// finds the weights again from the logarithm of its norm. A task is a key/value head of a document: forward with a part
// of its queries, backward with all, so nobody adds to another's sums. H is a multiple of 64; (T, heads, H) tensors are
// dense.

#include <math.h>
#include <omp.h>
#include <stdlib.h>
#include <string.h>

#include "bf16.h"

#define QUERIES 96
#define KEYS 256
#define ROWS 6
#define PANEL 64

typedef struct { long queries_start, queries_stop, keys_start, keys_stop; } Span;

static inline long min(long a, long b) { return a < b ? a : b; }

static inline long up(long n, long step) { return (n + step - 1) / step * step; }

static inline float dot(const bf16 *x, const bf16 *y, long n) {
    __m512 sum = _mm512_setzero_ps();
    for (long i = 0; i < n; i += LANES) sum = _mm512_fmadd_ps(widened(x + i), widened(y + i), sum);
    return _mm512_reduce_add_ps(sum);
}

// The first n of 16 lanes.
static inline __mmask16 first(long n) { return n >= LANES ? 0xFFFF : n <= 0 ? 0 : (1 << n) - 1; }

// sums (rows, 64) [+]= a (rows, pairs) * b (pairs, 64); a's pairs lie `row` and `pair` numbers apart, and the number of
// rows is a constant.
static inline __attribute__((always_inline)) void tile(
    int rows, float *sums, long stride, const bf16 *a, long row, long pair, const int32_t *b, long b_stride, long pairs,
    int adds
) {
    __m512 sum[ROWS][4];
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < 4; c++)
            sum[r][c] = adds ? _mm512_loadu_ps(sums + r * stride + c * LANES) : _mm512_setzero_ps();
    for (long p = 0; p < pairs; p++) {
        __m512i column[4];
        for (int c = 0; c < 4; c++) column[c] = _mm512_load_si512(b + p * b_stride + c * LANES);
        for (int r = 0; r < rows; r++) {
            int32_t both;
            memcpy(&both, a + r * row + p * pair, 4);
            __m512bh x = (__m512bh)_mm512_set1_epi32(both);
            for (int c = 0; c < 4; c++) sum[r][c] = _mm512_dpbf16_ps(sum[r][c], x, (__m512bh)column[c]);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < 4; c++) _mm512_storeu_ps(sums + r * stride + c * LANES, sum[r][c]);
}

// The same for any number of rows and a multiple of 64 columns.
static void multiply(
    float *sums, long stride, const bf16 *a, long row, long pair, const int32_t *b, long b_stride, long rows,
    long columns, long pairs, int adds
) {
    for (long c = 0; c < columns; c += PANEL)
        for (long r = 0; r < rows; r += ROWS) {
            float *s = sums + r * stride + c;
            const bf16 *x = a + r * row;
            switch (rows - r) {
                case 1: tile(1, s, stride, x, row, pair, b + c, b_stride, pairs, adds); break;
                case 2: tile(2, s, stride, x, row, pair, b + c, b_stride, pairs, adds); break;
                case 3: tile(3, s, stride, x, row, pair, b + c, b_stride, pairs, adds); break;
                case 4: tile(4, s, stride, x, row, pair, b + c, b_stride, pairs, adds); break;
                case 5: tile(5, s, stride, x, row, pair, b + c, b_stride, pairs, adds); break;
                default: tile(6, s, stride, x, row, pair, b + c, b_stride, pairs, adds);
            }
        }
}

// sums (rows, KEYS) = a (rows, H) times the panels of some keys
static void meet(float *sums, const bf16 *a, long step, const int32_t *panels, long rows, long keys, long H) {
    for (long c = 0; c < keys; c += PANEL)
        multiply(sums + c, KEYS, a, step, 2, panels + c * H / 2, PANEL, rows, PANEL, H / 2, 0);
}

// Rows become columns: to interleave each with the one eight further turns the eight bits of a place by one, and four
// such turns swap row and lane.
static inline void turn(__m512i x[16]) {
    const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    __m512i y[16];
#pragma GCC unroll 4
    for (int round = 0; round < 4; round++) {
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) {
            y[2 * i] = _mm512_permutex2var_epi32(x[i], low, x[i + 8]);
            y[2 * i + 1] = _mm512_permutex2var_epi32(x[i], high, x[i + 8]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) x[i] = y[i];
    }
}

// (n, H) -> panels of 64 rows, (H / 2, 64) pairs along H each, zeros behind the last
static void lay_panels(int32_t *to, const bf16 *from, long step, long n, long H) {
    for (long i = 0; i < up(n, PANEL); i += LANES)
        for (long j = 0; j < H / 2; j += LANES) {
            __m512i x[LANES];
            for (long r = 0; r < LANES; r++)
                x[r] = i + r < n ? _mm512_loadu_si512(from + (i + r) * step + 2 * j) : _mm512_setzero_si512();
            turn(x);
            for (long r = 0; r < LANES; r++)
                _mm512_store_si512(to + i / PANEL * PANEL * H / 2 + (j + r) * PANEL + i % PANEL, x[r]);
        }
}

// (n, H) -> (n / 2, H) pairs along n, zeros behind an odd end
static void lay_pairs(int32_t *to, const bf16 *from, long step, long n, long H) {
    for (long i = 0; i < n; i += 2)
        for (long j = 0; j < H; j += LANES) {
            __m256i x = _mm256_loadu_si256((const void *)(from + i * step + j)), y = _mm256_setzero_si256();
            if (i + 1 < n) y = _mm256_loadu_si256((const void *)(from + (i + 1) * step + j));
            _mm512_storeu_si512(to + i / 2 * H + j, paired(x, y));
        }
}

// Documents: runs of spans whose keys begin together. Where each begins among the spans; their number.
static long documents_of(const Span *spans, long n_spans, long *starts) {
    long n = 0;
    for (long s = 0; s < n_spans; s++)
        if (!s || spans[s].keys_start != spans[s - 1].keys_start) starts[n++] = s;
    starts[n] = n_spans;
    return n;
}

// Keys that the span which sees most of them sees.
static long keys_of(const Span *spans, long n_spans) {
    long most = 0;
    for (const Span *s = spans; s < spans + n_spans; s++)
        if (s->keys_stop - s->keys_start > most) most = s->keys_stop - s->keys_start;
    return most;
}

// Keys that a query of a span sees.
static long seen_by(const Span *s, long query) { return s->keys_stop - s->keys_start - (s->queries_stop - 1 - query); }

// How many queries see nothing of a block, by whole rows of ROWS, where the first sees `seen` keys of it.
static long unseeing(long seen) { return seen > 0 ? 0 : (1 - seen) / ROWS * ROWS; }

// Scores (rows, columns) become weights; the first row sees `seen` keys of the block, each further one another. Tops
// and norms are of all blocks so far, and `kept` is what earlier sums are multiplied with.
static inline void soften(
    float *tops, __m512 *norms, float *kept, bf16 *weights, const float *scores, long rows, long seen, long columns,
    float scale
) {
    __m512 before = _mm512_loadu_ps(tops), scales = _mm512_set1_ps(scale);
    for (long i = 0; i < rows; i++) {
        __m512 most = _mm512_set1_ps(tops[i]);
        for (long c = 0, here = min(seen + i, columns); c < here; c += LANES)
            most = _mm512_mask_max_ps(most, first(here - c), most, _mm512_load_ps(scores + i * KEYS + c));
        tops[i] = _mm512_reduce_max_ps(most);
    }
    __m512 after = _mm512_loadu_ps(tops), less = _mm512_mul_ps(after, scales);
    __mmask16 is_new = _mm512_cmp_ps_mask(before, after, _CMP_NEQ_UQ);  // not where both are still infinite
    __m512 shrunk = exp2_of(_mm512_fmsub_ps(before, scales, less));
    _mm512_storeu_ps(kept, _mm512_mask_mov_ps(_mm512_set1_ps(1), is_new, shrunk));
    for (long i = 0; i < rows; i++) {
        __m512 norm = _mm512_mul_ps(norms[i], _mm512_set1_ps(kept[i]));
        less = _mm512_set1_ps(tops[i] * scale);
        for (long c = 0; c < columns; c += 2 * LANES) {
            __m512 x[2];
            for (int j = 0; j < 2; j++) {
                long at = c + j * LANES;
                x[j] = exp2_of(_mm512_fmsub_ps(_mm512_load_ps(scores + i * KEYS + at), scales, less));
                x[j] = _mm512_maskz_mov_ps(first(seen + i - at), x[j]);
                norm = _mm512_add_ps(norm, x[j]);
            }
            _mm512_store_si512(weights + i * KEYS + c, rounded_both(x[0], x[1]));
        }
        norms[i] = norm;
    }
}

// x (width) times a number
static inline void scale_row(float *x, long width, float by) {
    for (long j = 0; j < width; j += LANES)
        _mm512_store_ps(x + j, _mm512_mul_ps(_mm512_load_ps(x + j), _mm512_set1_ps(by)));
}

// x (width) times a number, rounded
static inline void put_row(bf16 *to, const float *x, long width, float by) {
    for (long j = 0; j < width; j += LANES)
        _mm256_storeu_si256((void *)(to + j), rounded(_mm512_mul_ps(_mm512_load_ps(x + j), _mm512_set1_ps(by))));
}

// At most QUERIES queries, of which the first sees `seen` keys and each further one another.
static void attend(
    const bf16 *q, long q_step, const int32_t *keys, const int32_t *values, bf16 *out, long out_step, float *log_norms,
    long n, long seen, long H, float *sums
) {
    const float scale = LOG2E / sqrtf(H);
    _Alignas(64) float scores[ROWS * KEYS];
    _Alignas(64) bf16 weights[ROWS * KEYS];
    float tops[QUERIES + LANES], kept[LANES];
    __m512 norms[QUERIES];
    for (long i = 0; i < QUERIES + LANES; i++) tops[i] = -INFINITY;
    for (long i = 0; i < n; i++) norms[i] = _mm512_setzero_ps();
    for (long key = 0; key < seen + n - 1; key += KEYS)
        for (long r = unseeing(seen - key); r < n; r += ROWS) {
            long rows = min(ROWS, n - r), columns = min(KEYS, seen + r + rows - 1 - key);
            meet(scores, q + r * q_step, q_step, keys + key * H / 2, rows, columns, H);
            soften(tops + r, norms + r, kept, weights, scores, rows, seen + r - key, columns, scale);
            for (long i = 0; key && i < rows; i++)
                if (kept[i] != 1) scale_row(sums + (r + i) * H, H, kept[i]);
            multiply(sums + r * H, H, weights, KEYS, 2, values + key / 2 * H, H, rows, H, (columns + 1) / 2, key > 0);
        }
    for (long i = 0; i < n; i++) {
        float norm = _mm512_reduce_add_ps(norms[i]);
        put_row(out + i * out_step, sums + i * H, H, 1 / norm);
        log_norms[i] = tops[i] * scale + log2f(norm);
    }
}

// q, out (Tq, heads, H); k, v (T, kv_heads, H); log_norms (heads, Tq): log2 of softmax's norm. 1: no memory.
int forward(
    const bf16 *q, const bf16 *k, const bf16 *v, bf16 *out, float *log_norms, const Span *spans, long n_spans,
    long n_queries, long heads, long kv_heads, long H, long q_step, long k_step, long v_step, int threads
) {
    long *starts = malloc((n_spans + 1) * sizeof(long));
    if (!starts) return 1;
    const long n_tasks = documents_of(spans, n_spans, starts) * kv_heads, longest = keys_of(spans, n_spans);
    const long groups = heads / kv_heads, parts = (4 * threads + n_tasks) / (n_tasks + 1);  // few tasks are shared
    const long bytes = 2 * up(longest, PANEL) * H + 2 * up(longest, 2) * H + 4 * QUERIES * H;
    char *memory = aligned_alloc(64, threads * bytes);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (long task = 0; task < (memory ? n_tasks * parts : 0); task++) {
        long part = task % parts, head = task / parts % kv_heads, document = task / parts / kv_heads, block = 0;
        const Span *begin = spans + starts[document], *end = spans + starts[document + 1];
        long n = keys_of(begin, end - begin), place = begin->keys_start;
        int32_t *keys = (int32_t *)(memory + omp_get_thread_num() * bytes), *values = keys + up(n, PANEL) * H / 2;
        lay_panels(keys, k + place * k_step + head * H, k_step, n, H);
        lay_pairs(values, v + place * v_step + head * H, v_step, n, H);
        for (const Span *s = begin; s < end; s++)
            for (long h = head * groups; h < (head + 1) * groups; h++)
                for (long start = s->queries_start; start < s->queries_stop; start += QUERIES) {
                    if (block++ % parts != part) continue;
                    attend(q + start * q_step + h * H, q_step, keys, values, out + (start * heads + h) * H, heads * H,
                           log_norms + h * n_queries + start, min(QUERIES, s->queries_stop - start),
                           seen_by(s, start), H, (float *)(values + up(n, 2) * H / 2));
                }
    }
    free(starts);
    free(memory);
    return !memory;
}

// What the backward pass of a document's head holds.
typedef struct {
    int32_t *keys, *values, *key_pairs, *q_pairs, *slope_pairs, *weights, *slopes;
    float *sums_k, *sums_v, *sums_q;
} Room;

static void *take(char **from, long bytes) {
    void *taken = *from;
    *from += bytes;
    return taken;
}

// Shares memory out for n keys; its end.
static char *share_out(char *memory, Room *room, long n, long H) {
    room->keys = take(&memory, 2 * up(n, PANEL) * H), room->values = take(&memory, 2 * up(n, PANEL) * H);
    room->key_pairs = take(&memory, 2 * up(n, 2) * H);
    room->q_pairs = take(&memory, 2 * QUERIES * H), room->slope_pairs = take(&memory, 2 * QUERIES * H);
    room->weights = take(&memory, 2 * QUERIES * KEYS), room->slopes = take(&memory, 2 * QUERIES * KEYS);
    room->sums_k = take(&memory, 4 * n * H), room->sums_v = take(&memory, 4 * n * H);
    room->sums_q = take(&memory, 4 * QUERIES * H);
    return memory;
}

// The weights of two queries (rows of KEYS) again, and the slopes of their scores: in pairs, and by rows as well.
static inline void slope_of_two(
    int32_t *weights, int32_t *slopes, bf16 *by_row, const float *scores, const float *of_weights, const float *norms,
    const float *means, long seen, int is_alone, long columns, float scale
) {
    for (long c = 0; c < columns; c += LANES) {
        __m512 x[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()}, dx[2] = {x[0], x[0]};
        for (int i = 0; i < 2 - is_alone; i++) {
            __m512 score = _mm512_load_ps(scores + i * KEYS + c), of_weight = _mm512_load_ps(of_weights + i * KEYS + c);
            __mmask16 is_seen = first(seen + i - c);
            x[i] = exp2_of(_mm512_fmsub_ps(score, _mm512_set1_ps(scale), _mm512_set1_ps(norms[i])));
            x[i] = _mm512_maskz_mov_ps(is_seen, x[i]);
            dx[i] = _mm512_maskz_mul_ps(is_seen, x[i], _mm512_sub_ps(of_weight, _mm512_set1_ps(means[i])));
        }
        __m512i both = rounded_both(dx[0], dx[1]);
        _mm512_store_si512(weights + c, interleaved(rounded_both(x[0], x[1])));
        _mm512_store_si512(slopes + c, interleaved(both));
        _mm256_store_si256((void *)(by_row + c), _mm512_castsi512_si256(both));
        _mm256_store_si256((void *)(by_row + KEYS + c), _mm512_extracti64x4_epi64(both, 1));
    }
}

// The slopes of queries as `attend` has them; what they add to those of keys and values.
static void attend_back(
    const bf16 *q, long q_step, const bf16 *out, const bf16 *slope, bf16 *slope_q, long step, const float *log_norms,
    long n, long seen, long H, const Room *room
) {
    const float scale = 1 / sqrtf(H);
    _Alignas(64) float scores[ROWS * KEYS], of_weights[ROWS * KEYS];
    _Alignas(64) bf16 by_row[ROWS * KEYS];
    float means[QUERIES];
    for (long i = 0; i < n; i++) means[i] = dot(slope + i * step, out + i * step, H);
    lay_pairs(room->q_pairs, q, q_step, n, H);
    lay_pairs(room->slope_pairs, slope, step, n, H);
    for (long key = 0; key < seen + n - 1; key += KEYS) {
        long keys = min(KEYS, seen + n - 1 - key);
        for (long r = unseeing(seen - key); r < n; r += ROWS) {
            long rows = min(ROWS, n - r), columns = min(KEYS, seen + r + rows - 1 - key);
            meet(scores, q + r * q_step, q_step, room->keys + key * H / 2, rows, columns, H);
            meet(of_weights, slope + r * step, step, room->values + key * H / 2, rows, columns, H);
            for (long i = r; i < r + rows; i += 2) {
                long to = i / 2 * KEYS, from = (i - r) * KEYS;
                slope_of_two(room->weights + to, room->slopes + to, by_row + from, scores + from, of_weights + from,
                             log_norms + i, means + i, seen + i - key, i + 1 == n, up(columns, PANEL), scale * LOG2E);
            }
            multiply(room->sums_q + r * H, H, by_row, KEYS, 2, room->key_pairs + key / 2 * H, H, rows, H,
                     (columns + 1) / 2, key > 0);
        }
        for (long c = 0; c < keys; c += PANEL) {
            long r = unseeing(seen - key - c), rows = min(PANEL, keys - c), pairs = (n - r + 1) / 2;
            const int32_t *weights = room->weights + r / 2 * KEYS + c, *slopes = room->slopes + r / 2 * KEYS + c;
            multiply(room->sums_v + (key + c) * H, H, (const bf16 *)weights, 2, 2 * KEYS,
                     room->slope_pairs + r / 2 * H, H, rows, H, pairs, 1);
            multiply(room->sums_k + (key + c) * H, H, (const bf16 *)slopes, 2, 2 * KEYS,
                     room->q_pairs + r / 2 * H, H, rows, H, pairs, 1);
        }
    }
    for (long i = 0; i < n; i++) put_row(slope_q + i * step, room->sums_q + i * H, H, scale);
}

// Slopes of q, k and v from that of out; the rest as for `forward`. Keys that no query sees are not written.
int backward(
    const bf16 *q, const bf16 *k, const bf16 *v, const bf16 *out, const float *log_norms, const bf16 *slope,
    bf16 *slope_q, bf16 *slope_k, bf16 *slope_v, const Span *spans, long n_spans, long n_queries, long heads,
    long kv_heads, long H, long q_step, long k_step, long v_step, int threads
) {
    long *starts = malloc((n_spans + 1) * sizeof(long));
    if (!starts) return 1;
    const long n_tasks = documents_of(spans, n_spans, starts) * kv_heads, groups = heads / kv_heads;
    Room sizes;
    const long bytes = share_out(NULL, &sizes, keys_of(spans, n_spans), H) - (char *)NULL;
    char *memory = aligned_alloc(64, threads * bytes);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (long task = 0; task < (memory ? n_tasks : 0); task++) {
        long head = task % kv_heads;
        const Span *begin = spans + starts[task / kv_heads], *end = spans + starts[task / kv_heads + 1];
        long n = keys_of(begin, end - begin), place = begin->keys_start;
        const bf16 *k_ = k + place * k_step + head * H, *v_ = v + place * v_step + head * H;
        Room room;
        share_out(memory + omp_get_thread_num() * bytes, &room, n, H);
        lay_panels(room.keys, k_, k_step, n, H);
        lay_panels(room.values, v_, v_step, n, H);
        lay_pairs(room.key_pairs, k_, k_step, n, H);
        memset(room.sums_k, 0, 4 * n * H);
        memset(room.sums_v, 0, 4 * n * H);
        for (const Span *s = begin; s < end; s++)
            for (long h = head * groups; h < (head + 1) * groups; h++)
                for (long start = s->queries_start; start < s->queries_stop; start += QUERIES) {
                    long at = (start * heads + h) * H;
                    attend_back(q + start * q_step + h * H, q_step, out + at, slope + at, slope_q + at, heads * H,
                                log_norms + h * n_queries + start, min(QUERIES, s->queries_stop - start),
                                seen_by(s, start), H, &room);
                }
        for (long i = 0; i < n; i++) {
            long to = ((place + i) * kv_heads + head) * H;
            put_row(slope_k + to, room.sums_k + i * H, H, 1 / sqrtf(H));
            put_row(slope_v + to, room.sums_v + i * H, H, 1);
        }
    }
    free(starts);
    free(memory);
    return !memory;
}
