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

// x and y rounded, one behind the other.
static inline __m512i rounded_both(__m512 x, __m512 y) { return (__m512i)_mm512_cvtne2ps_pbh(y, x); }

// The halves of a vector as neighbours, as `paired` has two.
static inline __m512i interleaved(__m512i x) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,
                                           23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, x);
}

static inline __m512 exp2_of(__m512 x) {  // to 3e-7; the polynomial of 2^f that errs least for |f| <= 1/2
    x = _mm512_max_ps(_mm512_set1_ps(-200), x);  // the second where one is not a number
    __m512 whole = _mm512_roundscale_ps(x, 0), f = _mm512_sub_ps(x, whole), y = _mm512_set1_ps(1.3276472e-3f);
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(9.6755414e-3f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(5.5507133e-2f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(2.4022120e-1f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(6.9314697e-1f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(1.0000001f));
    return _mm512_scalef_ps(y, whole);
}
