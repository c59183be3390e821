/* The twins of codes of few bits: from codes to numbers, and back. See bench_kernels.c. */
#include "bench_kernels.h"

/* Numbers to codes */

i64 block_largest(MATRIX(float, rows), i64 tall, i64 wide, MATRIX(float, largest)) {
    for (i64 first = 0; first < rows_n; first += tall)
        for (i64 b = 0; b < largest_m; b++) {
            u32 best = 0;
            for (i64 r = first; r < MIN(first + tall, rows_n); r++)
                for (i64 i = b * wide; i < MIN((b + 1) * wide, rows_m); i++) {
                    u32 k = key(rows[r * rows_m + i]);
                    best = MAX(best, k < INFINITE ? k : 0);
                }
            largest[first / tall * largest_m + b] = float_of(best);
        }
    return 0;
}

static inline u8 small_float(float x, float scale, int fraction, int bias, float largest, u32 infinite,
                             u32 nan_from) {
    u32 moved_bits = (u32)(151 - bias - fraction) << 23, k = key(x);
    float quotient = MIN(fabsf(x / scale), largest);
    u32 near = bits_of(quotient), shift = 23 - fraction;
    u32 normal = ((near + ((1u << (shift - 1)) - 1) + ((near >> shift) & 1)) >> shift)
        - ((u32)(127 - bias) << fraction);
    u32 small = bits_of(quotient + float_of(moved_bits)) - moved_bits;
    u32 code = near < (u32)(128 - bias) << 23 ? small : normal;
    code = (k == INFINITE ? infinite : code) | ((bits_of(x) >> 24) & 0x80);
    return k >= nan_from ? 0x7F : code;
}

#define ENCODE(name, ...)                                                                            \
    i64 name(MATRIX(float, rows), i64 tall, i64 wide, MATRIX(float, scales), MATRIX(u8, codes)) {    \
        for (i64 r = 0; r < rows_n; r++)                                                             \
            for (i64 b = 0; b < scales_m; b++) {                                                     \
                float scale = scales[r / tall * scales_m + b];                                       \
                for (i64 i = b * wide; i < MIN((b + 1) * wide, rows_m); i++)                         \
                    codes[r * codes_m + i] = small_float(rows[r * rows_m + i], scale, __VA_ARGS__);  \
            }                                                                                        \
        return 0;                                                                                    \
    }

ENCODE(encode_e4m3, 3, 7, 448.0f, 0x7F, INFINITE)
ENCODE(encode_e5m2, 2, 15, 57344.0f, 0x7C, INFINITE + 1)

i64 group_extremes(MATRIX(float, values), ARRAY(float, above), ARRAY(float, below)) {
    for (i64 g = 0; g < values_n; g++) {
        int32_t high = 0, low = 0;
        for (i64 i = 0; i < values_m; i++) {
            int32_t bits = (int32_t)bits_of(values[g * values_m + i]);
            high = MAX(high, bits);
            low = MAX(low, bits ^ INT32_MIN);
        }
        above[g] = float_of((u32)high);
        below[g] = float_of((u32)low);
    }
    return 0;
}

i64 encode_e2m1(MATRIX(float, values), ARRAY(float, scales), MATRIX(u8, codes)) {
    u8 single[TILE];
    for (i64 g = 0; g < values_n; g++)
        for (i64 begin = 0; begin < values_m; begin += TILE) {
            i64 n = MIN(TILE, values_m - begin);
            const float *x = values + g * values_m + begin;
            u8 *out = codes + g * codes_m + begin / 2;
            for (i64 i = 0; i < n; i++) {
                float q = fabsf(x[i] / scales[g]);
                u32 code = (q > 0.25f) + (q >= 0.75f) + (q > 1.25f) + (q >= 1.75f) + (q > 2.5f)
                    + (q >= 3.5f) + (q > 5.0f);
                single[i] = code | ((bits_of(x[i]) >> 28) & 8);
            }
            for (i64 i = 0; i < n / 2; i++) out[i] = single[2 * i] | single[2 * i + 1] << 4;
        }
    return 0;
}

i64 encode_int4(MATRIX(float, values), ARRAY(float, scales), ARRAY(float, zeros), MATRIX(u8, codes)) {
    u8 single[TILE];
    for (i64 g = 0; g < values_n; g++)
        for (i64 begin = 0; begin < values_m; begin += TILE) {
            i64 n = MIN(TILE, values_m - begin);
            const float *x = values + g * values_m + begin;
            u8 *out = codes + g * codes_m + begin / 2;
            for (i64 i = 0; i < n; i++) {
                float q = x[i] / scales[g] + zeros[g];
                q = q < 7.0f ? q : 7.0f;
                q = q > -8.0f ? q : -8.0f;
                single[i] = (bits_of(q + 12582912.0f) + 8) & 15;
            }
            for (i64 i = 0; i < n / 2; i++) out[i] = single[2 * i] | single[2 * i + 1] << 4;
        }
    return 0;
}

i64 encode_affine(MATRIX(float, values), ARRAY(float, scales), ARRAY(float, biases), float largest,
                  MATRIX(u8, codes)) {
    for (i64 g = 0; g < values_n; g++)
        for (i64 i = 0; i < values_m; i++) {
            float q = (values[g * values_m + i] - biases[g]) / scales[g];
            q = q > 0.0f ? q : 0.0f;
            q = q < largest ? q : largest;
            codes[g * codes_m + i] = (u8)bits_of(q + 12582912.0f);
        }
    return 0;
}

/* Codes to numbers */

i64 look_up(ARRAY(float, table), ARRAY(u8, codes), ARRAY(float, out)) {
    for (i64 i = 0; i < codes_n; i++) out[i] = table[codes[i]];
    return 0;
}

i64 spread_bytes(ARRAY(u8, raw), i64 bits, ARRAY(u8, out)) {
    for (i64 i = 0; i < raw_n; i++) /* of four bits, which is what is measured */
        for (i64 k = 0; k < 2; k++) out[2 * i + k] = (raw[i] >> 4 * k) & 15;
    return 0;
}

i64 scale_groups(MATRIX(float, numbers), MATRIX(float, scales)) {
    i64 width = numbers_m / scales_m;
    for (i64 r = 0; r < numbers_n; r++)
        for (i64 g = 0; g < scales_m; g++)
            for (i64 i = 0; i < width; i++)
                numbers[r * numbers_m + g * width + i] *= scales[(scales_n > 1 ? r : 0) * scales_m + g];
    return 0;
}

static inline float half_at(const u8 *raw) {
    u32 bits = raw[0] | raw[1] << 8, m = bits & 0x7FFF;
    u32 scaled = bits_of(float_of(m << 13) * 0x1p112f);
    return float_of(scaled | (m >= 0x7C00 ? INFINITE : 0) | (bits & 0x8000) << 16);
}

/* Blocks of GGUF: `raw` is a block's bytes, `out` its numbers. */
#define BLOCKS(name) i64 name(MATRIX(u8, all), MATRIX(float, numbers))
#define EACH_BLOCK                                                                                   \
    for (i64 b = 0; b < all_n; b++) {                                                                \
        const u8 *restrict raw = all + b * all_m;                                                    \
        float *restrict out = numbers + b * numbers_m;
#define END } return 0;

BLOCKS(q8_0) {
    EACH_BLOCK
    float scale = half_at(raw);
    for (int i = 0; i < 32; i++) out[i] = scale * (int8_t)raw[2 + i];
    END
}

BLOCKS(q4_0) {
    EACH_BLOCK
    float scale = half_at(raw);
    for (int i = 0; i < 16; i++) out[i] = scale * ((raw[2 + i] & 15) - 8);
    for (int i = 0; i < 16; i++) out[16 + i] = scale * ((raw[2 + i] >> 4) - 8);
    END
}

BLOCKS(q4_1) {
    EACH_BLOCK
    float scale = half_at(raw), least = half_at(raw + 2);
    for (int i = 0; i < 16; i++) out[i] = scale * (raw[4 + i] & 15) + least;
    for (int i = 0; i < 16; i++) out[16 + i] = scale * (raw[4 + i] >> 4) + least;
    END
}

static inline void five_bits(const u8 *raw, u8 *codes) {
    u32 fifth;
    memcpy(&fifth, raw, 4);
    for (int i = 0; i < 16; i++) codes[i] = raw[4 + i] & 15, codes[16 + i] = raw[4 + i] >> 4;
    for (u32 i = 0; i < 32; i++) codes[i] |= (fifth >> i & 1) << 4;
}

BLOCKS(q5_0) {
    u8 codes[32];
    EACH_BLOCK
    float scale = half_at(raw);
    five_bits(raw + 2, codes);
    for (int i = 0; i < 32; i++) out[i] = scale * (codes[i] - 16);
    END
}

BLOCKS(q5_1) {
    u8 codes[32];
    EACH_BLOCK
    float scale = half_at(raw), least = half_at(raw + 2);
    five_bits(raw + 4, codes);
    for (int i = 0; i < 32; i++) out[i] = scale * codes[i] + least;
    END
}

BLOCKS(q2_k) {
    EACH_BLOCK
    float scale = half_at(raw + 80), least = half_at(raw + 82);
    for (int p = 0; p < 16; p++) {
        float s = scale * (raw[p] & 15), l = least * (raw[p] >> 4);
        const u8 *codes = raw + 16 + 32 * (p / 8) + 16 * (p % 2);
        for (int i = 0; i < 16; i++) out[16 * p + i] = s * (codes[i] >> 2 * (p / 2 % 4) & 3) - l;
    }
    END
}

BLOCKS(q3_k) {
    EACH_BLOCK
    float scale = half_at(raw + 108);
    for (int p = 0; p < 16; p++) {
        int lower = raw[96 + p % 8] >> 4 * (p / 8) & 15, upper = raw[104 + p % 4] >> 2 * (p / 4) & 3;
        float s = scale * (lower + 16 * upper - 32);
        const u8 *codes = raw + 32 + 32 * (p / 8) + 16 * (p % 2), *third = raw + 16 * (p % 2);
        for (int i = 0; i < 16; i++) {
            int code = (codes[i] >> 2 * (p / 2 % 4) & 3) | (third[i] >> p / 2 & 1) << 2;
            out[16 * p + i] = s * (code - 4);
        }
    }
    END
}

static inline float packed_scale(const u8 *packed, int p) {
    return p < 4 ? packed[p] & 63 : (packed[p + 4] & 15) | packed[p - 4] >> 6 << 4;
}

static inline float packed_least(const u8 *packed, int p) {
    return p < 4 ? packed[p + 4] & 63 : packed[p + 4] >> 4 | packed[p] >> 6 << 4;
}

BLOCKS(q4_k) {
    EACH_BLOCK
    float scale = half_at(raw), least = half_at(raw + 2);
    for (int p = 0; p < 8; p++) {
        float s = scale * packed_scale(raw + 4, p), l = least * packed_least(raw + 4, p);
        const u8 *codes = raw + 16 + 32 * (p / 2);
        for (int i = 0; i < 32; i++) out[32 * p + i] = s * (codes[i] >> 4 * (p % 2) & 15) - l;
    }
    END
}

BLOCKS(q5_k) {
    EACH_BLOCK
    float scale = half_at(raw), least = half_at(raw + 2);
    for (int p = 0; p < 8; p++) {
        float s = scale * packed_scale(raw + 4, p), l = least * packed_least(raw + 4, p);
        const u8 *codes = raw + 48 + 32 * (p / 2), *fifth = raw + 16;
        for (int i = 0; i < 32; i++) {
            int code = (codes[i] >> 4 * (p % 2) & 15) | (fifth[i] >> p & 1) << 4;
            out[32 * p + i] = s * code - l;
        }
    }
    END
}

BLOCKS(q6_k) {
    EACH_BLOCK
    float scale = half_at(raw + 208);
    for (int p = 0; p < 16; p++) {
        float s = scale * (int8_t)raw[192 + p];
        const u8 *lower = raw + 64 * (p / 8) + 16 * (p % 4);
        const u8 *upper = raw + 128 + 32 * (p / 8) + 16 * (p % 2);
        for (int i = 0; i < 16; i++) {
            int code = (lower[i] >> 4 * (p % 8 / 4) & 15) | (upper[i] >> 2 * (p % 8 / 2) & 3) << 4;
            out[16 * p + i] = s * (code - 32);
        }
    }
    END
}

/* Matrices that are stored the other way round */

#define LINES 16
#define WORDS 128

static void scaled_codes(const u8 *restrict codes, i64 n, i64 column, i64 row, i64 width,
                         const float *restrict zeros, const float *restrict scales, i64 groups, i64 group,
                         i64 begin, float *restrict out, i64 size) {
    i64 base = row * width - begin, at = MAX(column, -base), end = MIN(column + n, size - base);
    while (at < end) {
        i64 number = at / group, stop = MIN(end, (number + 1) * group);
        float zero = zeros[row * groups + number], scale = scales[row * groups + number];
        for (i64 i = at; i < stop; i++) out[base + i] = (codes[i - column] - zero) * scale;
        at = stop;
    }
}

i64 turned_words(ARRAY(u32, stored), i64 stride, i64 height, i64 bits, MATRIX(float, zeros),
                 MATRIX(float, scales), i64 group, i64 begin, ARRAY(float, out)) {
    u32 turned[LINES][WORDS];
    u8 codes[16 * WORDS];
    i64 each = 32 / bits, width = height * each;
    for (i64 first = 0; first < scales_n; first += LINES)
        for (i64 line = 0; line < height; line += WORDS) {
            i64 n = MIN(WORDS, height - line), columns = MIN(LINES, scales_n - first);
            for (i64 k = 0; k < n; k++)
                for (i64 i = 0; i < columns; i++) turned[i][k] = stored[(line + k) * stride + first + i];
            for (i64 i = 0; i < columns; i++) {
                const u8 *raw = (const u8 *)turned[i]; /* of four bits, which is what is measured */
                for (i64 k = 0; k < 4 * n; k++) codes[2 * k] = raw[k] & 15, codes[2 * k + 1] = raw[k] >> 4;
                scaled_codes(codes, n * each, line * each, first + i, width, zeros, scales, scales_m,
                             group, begin, out, out_n);
            }
        }
    return 0;
}

i64 turned_eights(ARRAY(u32, stored), i64 stride, i64 width, ARRAY(u32, shifts), MATRIX(float, zeros),
                  MATRIX(float, scales), i64 group, i64 skip, i64 begin, ARRAY(float, out)) {
    u32 turned[LINES][WORDS];
    u8 codes[WORDS];
    i64 eights = (skip + scales_n + 7) / 8;
    for (i64 first = 0; first < eights; first += LINES)
        for (i64 line = 0; line < width; line += WORDS) {
            i64 n = MIN(WORDS, width - line), columns = MIN(LINES, eights - first);
            for (i64 k = 0; k < n; k++)
                for (i64 i = 0; i < columns; i++) turned[i][k] = stored[(line + k) * stride + first + i];
            for (i64 i = 0; i < columns; i++)
                for (i64 k = 0; k < 8; k++) {
                    i64 row = 8 * (first + i) + k - skip;
                    if (row < 0 || row >= scales_n) continue;
                    for (i64 j = 0; j < n; j++) codes[j] = turned[i][j] >> shifts[k] & 15;
                    scaled_codes(codes, n, line, row, width, zeros, scales, scales_m, group, begin, out,
                                 out_n);
                }
        }
    return 0;
}

static inline float e2m1(u32 code) {
    u32 m = code & 7, bits = m > 1 ? (m << 22) + 0x3F000000 : m ? 0x3F000000 : 0;
    return float_of(bits | (code & 8) << 28);
}

i64 turned_fp4(ARRAY(u8, stored), i64 stride, i64 width, i64 height, MATRIX(u8, exponents), i64 group,
               i64 first, i64 count, i64 begin, ARRAY(float, out)) {
    enum { COLUMNS = 256 };
    u8 turned[LINES][COLUMNS];
    float powers[COLUMNS];
    for (i64 column = 0; column < width; column += COLUMNS) {
        i64 columns = MIN(COLUMNS, width - column), number = -1;
        for (i64 byte = 0; byte < height; byte += LINES) {
            i64 lines = MIN(LINES, height - byte);
            for (i64 i = 0; i < columns; i++)
                for (i64 k = 0; k < lines; k++) turned[k][i] = stored[(column + i) * stride + byte + k];
            for (i64 k = 0; k < 2 * lines; k++) {
                i64 row = 2 * byte + k - first % 2, base = row * width - begin;
                if (row < 0 || row >= count) continue;
                i64 low = MAX(column, -base), high = MIN(column + columns, out_n - base);
                i64 here = (first + row) / group - first / group;
                if (low < high && number != here) {
                    number = here;
                    for (i64 i = 0; i < columns; i++) {
                        u32 e = exponents[(column + i) * exponents_m + number];
                        powers[i] = float_of(e == 255 ? 0x7FC00000 : e ? e << 23 : 0x00400000);
                    }
                }
                const u8 *restrict raw = turned[k / 2];
                float *restrict numbers = out + base;
                if (k % 2)
                    for (i64 i = low; i < high; i++)
                        numbers[i] = e2m1(raw[i - column] >> 4) * powers[i - column];
                else
                    for (i64 i = low; i < high; i++)
                        numbers[i] = e2m1(raw[i - column] & 15) * powers[i - column];
            }
        }
    }
    return 0;
}
