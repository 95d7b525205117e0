// What the loss does between its products on CPUs with AVX-512 BF16: softmax of logits, and the gradient of the head.

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "../model/bf16.h"

#define ROWS 6
#define COLUMNS 64
#define VECTORS (COLUMNS / LANES)
#define BAND 96
#define DEPTH 1024

// Softmax of (n, width) bf16, in place; log_norms (n): the logarithms of its norms. The width is a multiple of 16.
void softmax(bf16 *x, float *log_norms, long n, long width, int threads) {
#pragma omp parallel for num_threads(threads)
    for (long row = 0; row < n; row++) {
        bf16 *numbers = x + row * width;
        __m512 top = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps(), scale = _mm512_set1_ps(LOG2E);
        for (long i = 0; i < width; i += LANES) top = _mm512_max_ps(top, widened(numbers + i));
        float highest = _mm512_reduce_max_ps(top);
        __m512 less = _mm512_set1_ps(highest * LOG2E);
        for (long i = 0; i < width; i += LANES)
            sum = _mm512_add_ps(sum, exp2_of(_mm512_fmsub_ps(widened(numbers + i), scale, less)));
        float norm = _mm512_reduce_add_ps(sum);
        __m512 share = _mm512_set1_ps(1 / norm);
        for (long i = 0; i < width; i += LANES) {
            __m512 chance = _mm512_mul_ps(exp2_of(_mm512_fmsub_ps(widened(numbers + i), scale, less)), share);
            _mm256_storeu_si256((void *)(numbers + i), rounded(chance));
        }
        log_norms[row] = highest + logf(norm);
    }
}

// total (6, 64) += a (pairs, 6)' * b (pairs, 64)
static void add_tile(float *total, long stride, const int32_t *a, const int32_t *b, long pairs) {
    __m512 sum[ROWS][VECTORS];
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < VECTORS; c++) sum[r][c] = _mm512_loadu_ps(total + r * stride + c * LANES);
    for (long p = 0; p < pairs; p++) {
        __m512i column[VECTORS];
        for (int c = 0; c < VECTORS; c++) column[c] = _mm512_load_si512(b + p * COLUMNS + c * LANES);
        for (int r = 0; r < ROWS; r++) {
            __m512bh x = (__m512bh)_mm512_set1_epi32(a[p * ROWS + r]);
            for (int c = 0; c < VECTORS; c++) sum[r][c] = _mm512_dpbf16_ps(sum[r][c], x, (__m512bh)column[c]);
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < VECTORS; c++) _mm512_storeu_ps(total + r * stride + c * LANES, sum[r][c]);
}

// (n, columns) -> (n / 2, width) pairs along n, zeros beyond what there is
static void pack(int32_t *to, const bf16 *x, long step, long n, long columns, long width) {
    for (long i = 0; i < n; i += 2)
        for (long j = 0; j < width; j += LANES) {
            __mmask16 is_here = columns - j >= LANES ? 0xFFFF : columns <= j ? 0 : (1 << (columns - j)) - 1;
            __m256i first = _mm256_maskz_loadu_epi16(is_here, x + i * step + j), second = _mm256_setzero_si256();
            if (i + 1 < n) second = _mm256_maskz_loadu_epi16(is_here, x + (i + 1) * step + j);
            _mm512_store_si512(to + i / 2 * width + j, paired(first, second));
        }
}

// total (M, N) fp32 += a (T, M)' * b (T, N), N a multiple of 64; 1: no memory.
int add_product(float *total, const bf16 *a, const bf16 *b, long T, long M, long N, int threads) {
    int failed = 0;
    int32_t *panels = aligned_alloc(64, 4 * (DEPTH / 2) * N);
    if (!panels) return 1;
    for (long t = 0; t < T; t += DEPTH) {
        long n = T - t < DEPTH ? T - t : DEPTH, pairs = (n + 1) / 2;
#pragma omp parallel num_threads(threads)
        {
            int32_t *wide = aligned_alloc(64, 8 * (DEPTH / 2) * BAND), *narrow = wide + DEPTH / 2 * BAND;
            if (!wide) failed = 1;
#pragma omp for
            for (long c = 0; c < N; c += COLUMNS) pack(panels + c * pairs, b + t * N + c, N, n, COLUMNS, COLUMNS);
#pragma omp for schedule(dynamic)
            for (long r = 0; r < M; r += BAND) {
                if (!wide) continue;
                long rows = M - r < BAND ? M - r : BAND;
                pack(wide, a + t * M + r, M, n, rows, BAND);
                for (long i = 0; i < BAND; i += ROWS)
                    for (long p = 0; p < pairs; p++)
                        memcpy(narrow + i * pairs + p * ROWS, wide + p * BAND + i, 4 * ROWS);
                for (long c = 0; c < N; c += COLUMNS)
                    for (long i = 0; i < rows; i += ROWS) {
                        float *place = total + (r + i) * N + c, edge[ROWS * COLUMNS] = {0};
                        int is_whole = rows - i >= ROWS;
                        add_tile(is_whole ? place : edge, is_whole ? N : COLUMNS, narrow + i * pairs,
                                 panels + c * pairs, pairs);
                        for (long j = 0; !is_whole && j < (rows - i) * COLUMNS; j++)
                            place[j / COLUMNS * N + j % COLUMNS] += edge[j];
                    }
            }
            free(wide);
        }
    }
    free(panels);
    return failed;
}
