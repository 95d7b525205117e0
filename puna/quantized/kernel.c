/* Products of int4 weights with bf16 activations, for x86 CPUs with AVX-512 VNNI.

   A row of activations becomes whole numbers of two signed digits to the base 256 (as in digits.py), and the units for
   int8 multiply digits with codes: four inputs of 16 outputs at a time. Weights lie in tiles of 16 outputs,

       codes   tile, 8 inputs, output, byte: inputs 0-3 in the lower halves of 4 bytes, inputs 4-7 in the upper
       scales  tile, group, output (bf16); zeros alike;     weight = (code - 8) * scale + zero

   so that a tile is read from its begin to its end, once for all rows that meet it. */

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

enum { TILE = 16, INPUTS = 8, MOST_ROWS = 4, ZERO_CODE = 8, GREATEST = 126 * 257 };

typedef struct {
    const uint8_t *codes;
    const uint16_t *scales, *zeros;
    long width, group, n_out;
} Weight;

typedef struct {
    int8_t *digits;  /* row, digit, width */
    int32_t *sums;   /* row, group, digit: over the group's inputs */
    float *units;    /* row: what a number's 1 stands for */
} Rows;

static inline __m512 widened(const uint16_t *bf16) {
    __m256i values = _mm256_loadu_si256((const void *)bf16);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(values), 16));
}

static inline __m256i rounded(__m512 values) { /* to bf16, the even one of two that are equally near */
    __m512i bits = _mm512_castps_si512(values);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    bits = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16));
}

static inline __m512i four(const int8_t *digits) { /* for every output the same */
    int32_t together;
    memcpy(&together, digits, 4);
    return _mm512_set1_epi32(together);
}

static void find_digits(const uint16_t *x, long row, long width, long group, Rows rows) {
    long groups = width / group;
    int8_t *upper_digits = rows.digits + 2 * row * width, *lower_digits = upper_digits + width;
    __m512 most = _mm512_setzero_ps();
    __mmask16 is_nan = 0;
    for (long i = 0; i < width; i += 16) {
        __m512 values = widened(x + i);
        is_nan |= _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
        most = _mm512_max_ps(most, _mm512_abs_ps(values));
    }
    float greatest = is_nan ? NAN : _mm512_reduce_max_ps(most);
    __m512 factor = _mm512_set1_ps(greatest > 1e-30f ? GREATEST / greatest : 0);
    for (long g = 0; g < groups; g++) {
        __m512i upper_sum = _mm512_setzero_si512(), lower_sum = upper_sum;
        for (long i = g * group; i < (g + 1) * group; i += 16) {
            __m512i number = _mm512_cvtps_epi32(_mm512_mul_ps(widened(x + i), factor));
            __m512i upper = _mm512_srai_epi32(_mm512_add_epi32(number, _mm512_set1_epi32(128)), 8);
            __m512i lower = _mm512_sub_epi32(number, _mm512_slli_epi32(upper, 8));
            _mm_storeu_si128((void *)(upper_digits + i), _mm512_cvtepi32_epi8(upper));
            _mm_storeu_si128((void *)(lower_digits + i), _mm512_cvtepi32_epi8(lower));
            upper_sum = _mm512_add_epi32(upper_sum, upper);
            lower_sum = _mm512_add_epi32(lower_sum, lower);
        }
        rows.sums[2 * (row * groups + g)] = _mm512_reduce_add_epi32(upper_sum);
        rows.sums[2 * (row * groups + g) + 1] = _mm512_reduce_add_epi32(lower_sum);
    }
    rows.units[row] = greatest / GREATEST;
}

/* Inlined for each number of rows: what a row has then stays in registers. */
static inline __attribute__((always_inline)) void multiply(Weight w, Rows rows, long row, const int n, long tile,
                                                           uint16_t *out) {
    const __m512i half = _mm512_set1_epi8(15);
    long groups = w.width / w.group;
    const uint8_t *code = w.codes + tile * TILE * w.width / 2;
    const int8_t *digits = rows.digits + 2 * row * w.width;
    __m512 total[MOST_ROWS];
    for (int r = 0; r < n; r++) total[r] = _mm512_setzero_ps();
    for (long g = 0; g < groups; g++) {
        __m512i upper[MOST_ROWS], lower[MOST_ROWS];
        for (int r = 0; r < n; r++) upper[r] = lower[r] = _mm512_setzero_si512();
        for (long i = g * w.group; i < (g + 1) * w.group; i += INPUTS, code += TILE * INPUTS / 2) {
            _mm_prefetch((const char *)code + 4096, _MM_HINT_T0);
            __m512i bytes = _mm512_loadu_si512(code);
            __m512i first = _mm512_and_si512(bytes, half);
            __m512i second = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), half);
            for (int r = 0; r < n; r++) {
                const int8_t *of_row = digits + 2 * r * w.width + i;
                upper[r] = _mm512_dpbusd_epi32(upper[r], first, four(of_row));
                lower[r] = _mm512_dpbusd_epi32(lower[r], first, four(of_row + w.width));
                upper[r] = _mm512_dpbusd_epi32(upper[r], second, four(of_row + 4));
                lower[r] = _mm512_dpbusd_epi32(lower[r], second, four(of_row + w.width + 4));
            }
        }
        __m512 scale = widened(w.scales + (tile * groups + g) * TILE);
        __m512 zero = widened(w.zeros + (tile * groups + g) * TILE);
        for (int r = 0; r < n; r++) { /* at most 128 inputs of 15 * 32,382 each: no overflow */
            const int32_t *sums = rows.sums + 2 * ((row + r) * groups + g);
            int32_t sum = 256 * sums[0] + sums[1];
            __m512i products = _mm512_add_epi32(_mm512_slli_epi32(upper[r], 8), lower[r]);
            products = _mm512_sub_epi32(products, _mm512_set1_epi32(ZERO_CODE * sum));
            total[r] = _mm512_fmadd_ps(scale, _mm512_cvtepi32_ps(products), total[r]);
            total[r] = _mm512_fmadd_ps(zero, _mm512_set1_ps(sum), total[r]);
        }
    }
    for (int r = 0; r < n; r++) {
        __m512 values = _mm512_mul_ps(total[r], _mm512_set1_ps(rows.units[row + r]));
        _mm256_storeu_si256((void *)(out + (row + r) * w.n_out + tile * TILE), rounded(values));
    }
}

/* x (rows, width) bf16 to out (rows, n_out) bf16; `scratch` has room for Rows: 2 * width + 8 * groups + 4 bytes a row. */
void product(const uint8_t *codes, const uint16_t *scales, const uint16_t *zeros, const uint16_t *x, uint16_t *out,
             uint8_t *scratch, long n_rows, long width, long n_out, long group, int threads) {
    Weight w = {codes, scales, zeros, width, group, n_out};
    int32_t *sums = (int32_t *)scratch;
    float *units = (float *)(sums + 2 * n_rows * (width / group));
    Rows rows = {(int8_t *)(units + n_rows), sums, units};
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (long row = 0; row < n_rows; row++) find_digits(x + row * width, row, width, group, rows);
#pragma omp for schedule(static)
        for (long tile = 0; tile < n_out / TILE; tile++)
            for (long row = 0; row < n_rows; row += MOST_ROWS) switch (n_rows - row) {
                case 1: multiply(w, rows, row, 1, tile, out); break;
                case 2: multiply(w, rows, row, 2, tile, out); break;
                case 3: multiply(w, rows, row, 3, tile, out); break;
                default: multiply(w, rows, row, 4, tile, out);
            }
    }
}

/* The transposed weight, out (width, n_out) bf16. */
void dequantize(const uint8_t *codes, const uint16_t *scales, const uint16_t *zeros, uint16_t *out, long width,
                long n_out, long group, int threads) {
    const long chunk = 16; /* inputs, whose outputs are written side by side: a tile's alone fill half a cache line */
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long begin = 0; begin < width; begin += chunk)
        for (long tile = 0; tile < n_out / TILE; tile++) {
            long place = (tile * (width / group) + begin / group) * TILE;
            __m512 scale = widened(scales + place), zero = widened(zeros + place);
            for (long i = begin; i < begin + chunk; i++) {
                __m512i bytes = _mm512_loadu_si512(codes + (tile * width + i / INPUTS * INPUTS) * TILE / 2);
                __m512i code = _mm512_srlv_epi32(bytes, _mm512_set1_epi32(8 * (i % 4) + i / 4 % 2 * 4));
                code = _mm512_sub_epi32(_mm512_and_si512(code, _mm512_set1_epi32(15)), _mm512_set1_epi32(ZERO_CODE));
                __m512 weight = _mm512_fmadd_ps(_mm512_cvtepi32_ps(code), scale, zero);
                _mm256_storeu_si256((void *)(out + i * n_out + tile * TILE), rounded(weight));
            }
        }
}
