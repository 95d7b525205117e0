// bf16 and fp32 in vectors of 16 lanes, for kernels on CPUs with AVX-512 BF16.

#pragma once

#include <immintrin.h>
#include <stdint.h>

#define LANES 16
#define LOG2E 1.44269504088896f

typedef uint16_t bf16;

static inline __m512 widened(const bf16 *x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)x)), 16));
}

static inline __m256i rounded(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }

// Two vectors whose lanes become neighbours: x in the lower half of 32 bits, y in the upper.
static inline __m512i paired(__m256i x, __m256i y) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(x), _mm512_slli_epi32(_mm512_cvtepu16_epi32(y), 16));
}

static inline __m512 exp2_of(__m512 x) {  // to 2e-7; Taylor's coefficients of 2^f, |f| <= 1/2
    x = _mm512_max_ps(_mm512_set1_ps(-200), x);  // the second where one is not a number
    __m512 whole = _mm512_roundscale_ps(x, 0), f = _mm512_sub_ps(x, whole), y = _mm512_set1_ps(1.5403530e-4f);
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(1.3333558e-3f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(9.6181291e-3f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(5.5504109e-2f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(2.4022651e-1f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(6.9314718e-1f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(y, whole);
}
