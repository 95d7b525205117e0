/* Products of int8 and int4 weights with bf16 activations, for x86 CPUs with AVX-512 VNNI.

   A row of activations becomes whole numbers of two signed digits to the base 256 (as in digits.py), and the units for
   int8 multiply digits with codes: four inputs of 16 outputs at a time. Weights are blocks, one for each group of
   inputs of a tile of 32 outputs, all of a tile behind each other, so that it is read from its begin to its end, once
   for all rows that meet it:

       scales (32 bf16), zeros (32 bf16), codes        weight = (code - 2^(bits - 1)) * scale + zero

   Eight inputs of codes stand together. In int4 they are 32 x 4 bytes, with inputs 0-3 in the lower halves and inputs
   4-7 in the upper; in int8 first 32 x 4 bytes of inputs 0-3, then those of inputs 4-7. */

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

enum { LANES = 16, VECTORS = 2, TILE = VECTORS * LANES, VECTOR = 4 * LANES, INPUTS = 8, HEADER = 4 * TILE, };
enum { MOST_ROWS = 4, CHUNK = 16, AHEAD = 8192, GREATEST = 126 * 257 };

typedef struct {
    const uint8_t *blocks;
    long width, group, n_out;
} Weight;

typedef struct {
    int8_t *digits;  /* row, digit, width */
    int32_t *sums;   /* row, group, digit: over the group's inputs */
    float *units;    /* row: what a number's 1 stands for */
} Rows;

static inline __m512 widened(const void *bf16) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(bf16)), 16));
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

/* Adds four products to each output's sum, as _mm512_dpbusd_epi32, for which gcc moves sums to and fro. */
static inline void add_products(__m512i *sums, __m512i codes, __m512i digits) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(*sums) : "v"(codes), "v"(digits));
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

/* Inlined for each number of rows and bits: what a row has then stays in registers. */
static inline __attribute__((always_inline)) void multiply(Weight w, Rows rows, long row, const int n, const int bits,
                                                           long tile, uint16_t *out) {
    const __m512i half = _mm512_set1_epi8(15);
    const int zero_code = 1 << (bits - 1);
    long groups = w.width / w.group;
    const uint8_t *at = w.blocks + tile * groups * (HEADER + TILE * w.group * bits / 8);
    const int8_t *digits = rows.digits + 2 * row * w.width;
    __m512 total[VECTORS][MOST_ROWS];
    for (int v = 0; v < VECTORS; v++)
        for (int r = 0; r < n; r++) total[v][r] = _mm512_setzero_ps();
    for (long g = 0; g < groups; g++) {
        const uint8_t *header = at;
        __m512i upper[VECTORS][MOST_ROWS], lower[VECTORS][MOST_ROWS];
        for (int v = 0; v < VECTORS; v++)
            for (int r = 0; r < n; r++) upper[v][r] = lower[v][r] = _mm512_setzero_si512();
        at += HEADER;
#pragma GCC unroll 4
        for (long i = g * w.group; i < (g + 1) * w.group; i += INPUTS, at += TILE * INPUTS * bits / 8) {
            __m512i codes[2][VECTORS]; /* of inputs 0-3 and 4-7 */
            for (int v = 0; v < VECTORS; v++) {
                const uint8_t *place = at + v * VECTOR;
                __m512i bytes = _mm512_loadu_si512(place);
                _mm_prefetch((const char *)place + AHEAD, _MM_HINT_T0);
                if (bits == 4) {
                    codes[0][v] = _mm512_and_si512(bytes, half);
                    codes[1][v] = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), half);
                } else {
                    codes[0][v] = bytes;
                    codes[1][v] = _mm512_loadu_si512(place + VECTORS * VECTOR);
                    _mm_prefetch((const char *)place + VECTORS * VECTOR + AHEAD, _MM_HINT_T0);
                }
            }
            for (int r = 0; r < n; r++)
                for (int part = 0; part < 2; part++) {
                    const int8_t *of_row = digits + 2 * r * w.width + i + 4 * part;
                    __m512i above = four(of_row), below = four(of_row + w.width);
                    for (int v = 0; v < VECTORS; v++) {
                        add_products(&upper[v][r], codes[part][v], above);
                        add_products(&lower[v][r], codes[part][v], below);
                    }
                }
        }
        for (int v = 0; v < VECTORS; v++) {
            __m512 scale = widened(header + 2 * v * LANES), zero = widened(header + 2 * (TILE + v * LANES));
            for (int r = 0; r < n; r++) { /* up to 65,536 inputs of 255 * 126 each: no overflow */
                const int32_t *sums = rows.sums + 2 * ((row + r) * groups + g);
                __m512i above = _mm512_sub_epi32(upper[v][r], _mm512_set1_epi32(zero_code * sums[0]));
                __m512i below = _mm512_sub_epi32(lower[v][r], _mm512_set1_epi32(zero_code * sums[1]));
                __m512 product = _mm512_cvtepi32_ps(below);
                product = _mm512_fmadd_ps(_mm512_set1_ps(256), _mm512_cvtepi32_ps(above), product);
                total[v][r] = _mm512_fmadd_ps(scale, product, total[v][r]);
                total[v][r] = _mm512_fmadd_ps(zero, _mm512_set1_ps(256 * sums[0] + sums[1]), total[v][r]);
            }
        }
    }
    for (long v = 0, output = tile * TILE; v < VECTORS && output < w.n_out; v++, output += LANES)
        for (int r = 0; r < n; r++) {
            __m512 values = _mm512_mul_ps(total[v][r], _mm512_set1_ps(rows.units[row + r]));
            _mm256_storeu_si256((void *)(out + (row + r) * w.n_out + output), rounded(values));
        }
}

/* x (rows, width) bf16 to out (rows, n_out) bf16; `sums` is room for 2 * width + 8 * (width / group) + 4 bytes a row. */
void product(const uint8_t *blocks, const uint16_t *x, uint16_t *out, int32_t *sums, long n_rows, long width,
             long n_out, long group, int bits) {
    Weight w = {blocks, width, group, n_out};
    float *units = (float *)(sums + 2 * n_rows * (width / group));
    Rows rows = {(int8_t *)(units + n_rows), sums, units};
#pragma omp for schedule(static)
    for (long row = 0; row < n_rows; row++) find_digits(x + row * width, row, width, group, rows);
#pragma omp for schedule(static)
    for (long tile = 0; tile < (n_out + TILE - 1) / TILE; tile++)
        for (long row = 0; row < n_rows; row += MOST_ROWS) {
            long left = n_rows - row;
            switch (10 * bits + (left < MOST_ROWS ? left : MOST_ROWS)) {
#define CASE(bits, n) case 10 * bits + n: multiply(w, rows, row, n, bits, tile, out); break;
                CASE(4, 1) CASE(4, 2) CASE(4, 3) CASE(4, 4)
                CASE(8, 1) CASE(8, 2) CASE(8, 3) CASE(8, 4)
#undef CASE
            }
        }
}

/* Some inputs of 16 outputs, dequantised, to rows that are `stride` apart. */
static inline __attribute__((always_inline)) void widen(const uint8_t *codes, const int bits, __m512 scale, __m512 zero,
                                                        uint16_t *out, long stride) {
    for (int i = 0; i < CHUNK; i++, out += stride) {
        __m512i bytes = _mm512_loadu_si512(codes + i * bits / 32 * VECTORS * VECTOR);
        __m512i code = _mm512_srli_epi32(bytes, 8 * (i % 4) + (bits == 4 ? i / 4 % 2 * 4 : 0));
        code = _mm512_and_si512(code, _mm512_set1_epi32((1 << bits) - 1));
        code = _mm512_sub_epi32(code, _mm512_set1_epi32(1 << (bits - 1)));
        __m512 weight = _mm512_fmadd_ps(_mm512_cvtepi32_ps(code), scale, zero);
        _mm256_storeu_si256((void *)out, rounded(weight));
    }
}

/* The transposed weight, out (width, tiles * TILE) bf16. */
void dequantize(const uint8_t *blocks, uint16_t *out, long width, long tiles, long group, int bits) {
    const long stride = tiles * TILE, block = HEADER + TILE * group * bits / 8;
#pragma omp for schedule(static)
    for (long begin = 0; begin < width; begin += CHUNK)
        for (long tile = 0; tile < tiles; tile++) {
            const uint8_t *at = blocks + (tile * (width / group) + begin / group) * block;
            const uint8_t *codes = at + HEADER + begin % group * TILE * bits / 8;
            for (long v = 0; v < VECTORS; v++) {
                __m512 scale = widened(at + 2 * v * LANES), zero = widened(at + 2 * (TILE + v * LANES));
                uint16_t *place = out + begin * stride + tile * TILE + v * LANES;
                if (bits == 4) widen(codes + v * VECTOR, 4, scale, zero, place, stride);
                else widen(codes + v * VECTOR, 8, scale, zero, place, stride);
            }
        }
}
