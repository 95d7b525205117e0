/* MindRecord's compressed integers, many fields at a time. `integers.py` says how they lie; its `decode_integers` is the
   reference. */

#include <stdint.h>
#include <string.h>

enum { COUNT_BYTES = 4, ALL_OF_TWO = 0x55 };

/* Writes how many values each of n fields has, which lie from places[2 * i] to places[2 * i + 1] of data. Returns the
   number of the first that is too short for its values, of which each takes a byte or more; n: none is. */
long count_values(const uint8_t *data, const int64_t *places, long n, int64_t *counts) {
    for (long i = 0; i < n; i++) {
        const uint8_t *field = data + places[2 * i];
        int64_t size = places[2 * i + 1] - places[2 * i];
        if (size < COUNT_BYTES) return i;
        counts[i] = (int64_t)field[0] << 24 | field[1] << 16 | field[2] << 8 | field[3];
        if (size < COUNT_BYTES + (counts[i] + 3) / 4 + counts[i]) return i;
    }
    return n;
}

static inline int64_t value(const uint8_t *at, int code) {
    int16_t two;
    int32_t four;
    int64_t eight;
    switch (code) {
    case 0: return (int8_t)*at;
    case 1: memcpy(&two, at, 2); return two;
    case 2: memcpy(&four, at, 4); return four;
    default: memcpy(&eight, at, 8); return eight;
    }
}

/* Writes the values of a field as TYPE; returns where they end, NULL if that is after `stop`. */
#define DECODE(name, TYPE)                                                                                             \
    static const uint8_t *name(const uint8_t *codes, int64_t count, const uint8_t *at, const uint8_t *stop, TYPE *out) {\
        for (int64_t i = 0; i < count; i += 4, codes++) {                                                              \
            if (*codes == ALL_OF_TWO && count - i >= 4 && stop - at >= 8) {                                            \
                int16_t four[4];                                                                                       \
                memcpy(four, at, 8);                                                                                   \
                for (int k = 0; k < 4; k++) out[i + k] = four[k];                                                      \
                at += 8;                                                                                               \
                continue;                                                                                              \
            }                                                                                                          \
            for (int64_t k = i; k < i + 4 && k < count; k++) {                                                         \
                int code = *codes >> (6 - 2 * (k - i)) & 3;                                                            \
                if (stop - at < 1 << code) return NULL;                                                                \
                out[k] = (TYPE)value(at, code);                                                                        \
                at += 1 << code;                                                                                       \
            }                                                                                                          \
        }                                                                                                              \
        return at;                                                                                                     \
    }

DECODE(decode_4, int32_t)
DECODE(decode_8, int64_t)

/* Writes the values of fields that `count_values` found long enough, one after the other, each of `size` bytes: 4 or 8.
   Returns the number of the first whose values do not end where it ends; n: none. */
long decode(const uint8_t *data, const int64_t *places, long n, const int64_t *counts, uint8_t *out, long size) {
    for (long i = 0; i < n; out += counts[i] * size, i++) {
        const uint8_t *codes = data + places[2 * i] + COUNT_BYTES, *stop = data + places[2 * i + 1];
        const uint8_t *at = codes + (counts[i] + 3) / 4;
        at = size == 4 ? decode_4(codes, counts[i], at, stop, (int32_t *)out)
                       : decode_8(codes, counts[i], at, stop, (int64_t *)out);
        if (at != stop) return i;
    }
    return n;
}
