/* The twins of merge_cli/kernels/compiled in plain C: a yardstick for bench_kernels.py, nothing else.
 *
 * A twin has its kernel's name and arguments. An array is passed as a pointer and its dimensions; a
 * kernel's return value comes back as int64_t, booleans as 0 or 1. Built by the script with
 * gcc -O3 -march=native -ffp-contract=off, so that every operation is rounded by itself.
 */
#include "bench_kernels.h"

/* Storage formats */

static i64 decode_bf16_row(const u16 *restrict raw, float *restrict out, i64 n) {
    u16 largest = 0;
    for (i64 i = 0; i < n; i++) {
        u16 m = raw[i] & 0x7FFF;
        largest = MAX(largest, m);
        out[i] = float_of((u32)raw[i] << 16);
    }
    return largest >= 0x7F80;
}

static i64 decode_f16_row(const u16 *restrict raw, float *restrict out, i64 n) {
    u16 largest = 0;
    for (i64 i = 0; i < n; i++) {
        u16 m = raw[i] & 0x7FFF;
        largest = MAX(largest, m);
        u32 scaled = bits_of(float_of((u32)m << 13) * 0x1p112f);
        u32 special = (m & 0x7C00) == 0x7C00 ? INFINITE : 0;
        out[i] = float_of(scaled | special | (u32)(raw[i] & 0x8000) << 16);
    }
    return largest >= 0x7C00;
}

static i64 copy_row(const float *restrict raw, float *restrict out, i64 n) {
    u32 largest = 0;
    for (i64 i = 0; i < n; i++) {
        u32 m = key(raw[i]);
        largest = MAX(largest, m);
        out[i] = raw[i];
    }
    return largest >= INFINITE;
}

static void encode_bf16_row(const float *restrict x, u16 *restrict raw, i64 n) {
    for (i64 i = 0; i < n; i++) {
        u32 b = bits_of(x[i]);
        u32 rounded = (b + 0x7FFF + ((b >> 16) & 1)) >> 16;
        raw[i] = (b & MAGNITUDE) > INFINITE ? 0x7FC0 : rounded;
    }
}

static i64 encode_f16_row(const float *restrict x, u16 *restrict raw, i64 n) {
    u32 largest = 0;
    for (i64 i = 0; i < n; i++) {
        u32 b = bits_of(x[i]), m = b & MAGNITUDE;
        u32 small = bits_of(fabsf(x[i]) + 0.5f) - 0x3F000000u;
        u32 normal = (m + 0xC8000FFFu + ((m >> 13) & 1)) >> 13;
        u32 half = m < 0x38800000u ? small : normal;
        half = m >= 0x477FF000u ? 0x7C00 : half;
        half = m > INFINITE ? 0x7E00 : half;
        raw[i] = half | ((b >> 16) & 0x8000);
        largest = MAX(largest, m);
    }
    return largest >= 0x477FF000u;
}

i64 decode_bf16(MATRIX(u16, raw), MATRIX(float, rows), ARRAY(float, base), i64 based, i64 deltas) {
    i64 bad = 0, size = raw_m;
    for (i64 begin = 0; begin < size; begin += TILE) {
        i64 n = MIN(TILE, size - begin);
        for (i64 s = 0; s < raw_n; s++) {
            float *out = based && s == 0 ? base + begin : rows + (s - based) * size + begin;
            bad |= decode_bf16_row(raw + s * size + begin, out, n);
            if (deltas && !(based && s == 0))
                for (i64 i = 0; i < n; i++) out[i] -= base[begin + i];
        }
    }
    return bad;
}

i64 decode_f16(ARRAY(u16, raw), ARRAY(float, out)) { return decode_f16_row(raw, out, raw_n); }
i64 encode_bf16(ARRAY(float, x), ARRAY(u16, raw)) { encode_bf16_row(x, raw, x_n); return 0; }
i64 encode_f16(ARRAY(float, x), ARRAY(u16, raw)) { return encode_f16_row(x, raw, x_n); }

i64 non_finite(ARRAY(float, x)) {
    u32 largest = 0;
    for (i64 i = 0; i < x_n; i++) largest = MAX(largest, key(x[i]));
    return largest >= INFINITE;
}

/* Sums */

i64 weighted_sum(MATRIX(float, rows), ARRAY(float, weights), ARRAY(float, out)) {
    for (i64 begin = 0; begin < rows_m; begin += TILE) {
        i64 n = MIN(TILE, rows_m - begin);
        for (i64 s = 0; s < rows_n; s++) {
            const float *restrict row = rows + s * rows_m + begin;
            float *restrict total = out + begin, w = weights[s];
            if (s == 0) for (i64 i = 0; i < n; i++) total[i] = row[i] * w;
            else for (i64 i = 0; i < n; i++) total[i] = total[i] + row[i] * w;
        }
    }
    return 0;
}

i64 add_scaled(ARRAY(float, base), float scale, ARRAY(float, x)) {
    for (i64 i = 0; i < x_n; i++) x[i] = base[i] + scale * x[i];
    return 0;
}

static void dot_lanes(const float *restrict a, const float *restrict b, i64 n, double *restrict sums) {
    i64 aligned = n / LANES * LANES;
    for (i64 begin = 0; begin < aligned; begin += LANES)
        for (int j = 0; j < LANES; j++) sums[j] += (double)a[begin + j] * (double)b[begin + j];
    for (i64 i = aligned; i < n; i++) sums[i - aligned] += (double)a[i] * (double)b[i];
}

static double sum_lanes(const double *lanes) {
    double total = 0.0;
    for (int j = 0; j < LANES; j++) total += lanes[j];
    return total;
}

i64 dot_runs(ARRAY(float, a), ARRAY(float, b), i64 run, ARRAY(double, sums)) {
    for (i64 r = 0; r < sums_n; r++) {
        double lanes[LANES] = {0};
        dot_lanes(a + r * run, b + r * run, MIN(run, a_n - r * run), lanes);
        sums[r] = sum_lanes(lanes);
    }
    return 0;
}

i64 absolute_runs(ARRAY(float, a), i64 run, ARRAY(double, sums)) {
    for (i64 r = 0; r < sums_n; r++) {
        double lanes[LANES] = {0};
        const float *x = a + r * run;
        i64 n = MIN(run, a_n - r * run), aligned = n / LANES * LANES;
        for (i64 begin = 0; begin < aligned; begin += LANES)
            for (int j = 0; j < LANES; j++) lanes[j] += fabs((double)x[begin + j]);
        for (i64 i = aligned; i < n; i++) lanes[i - aligned] += fabs((double)x[i]);
        sums[r] = sum_lanes(lanes);
    }
    return 0;
}

i64 add_low_rank(MATRIX(float, left), MATRIX(float, right), float scale, MATRIX(float, out)) {
    float sums[TILE];
    for (i64 i = 0; i < out_n; i++)
        for (i64 begin = 0; begin < right_m; begin += TILE) {
            i64 n = MIN(TILE, right_m - begin);
            float *restrict total = out + i * out_m + begin;
            for (i64 j = 0; j < n; j++) sums[j] = 0;
            for (i64 k = 0; k < right_n; k++) {
                const float *restrict row = right + k * right_m + begin;
                float factor = left[i * left_m + k];
                for (i64 j = 0; j < n; j++) sums[j] = sums[j] + row[j] * factor;
            }
            for (i64 j = 0; j < n; j++) total[j] = total[j] + sums[j] * scale;
        }
    return 0;
}

/* Magnitudes */

static i64 count_range_row(const float *x, i64 n, u32 low, u32 high, u32 shift, int32_t *counts) {
    u32 offsets[TILE], inside[TILE], span = high - low, above = 0;
    for (i64 i = 0; i < n; i++) {
        u32 k = key(x[i]);
        above += k > high;
        offsets[i] = k - low;
    }
    i64 size = 0;
    for (i64 i = 0; i < n; i++) {
        inside[size] = offsets[i];
        size += offsets[i] <= span;
    }
    for (i64 i = 0; i < size; i++) counts[inside[i] >> shift]++;
    return above;
}

i64 count_range(ARRAY(float, x), u32 low, u32 high, u32 shift, ARRAY(int32_t, counts)) {
    i64 above = 0;
    for (i64 begin = 0; begin < x_n; begin += TILE)
        above += count_range_row(x + begin, MIN(TILE, x_n - begin), low, high, shift, counts);
    return above;
}

static void count_keys_row(const float *x, i64 n, const u32 *keys, i64 count, i64 *above, i64 *equal) {
    for (i64 c = 0; c < count; c++) {
        u32 larger = 0, same = 0, k = keys[c];
        for (i64 i = 0; i < n; i++) {
            larger += key(x[i]) > k;
            same += key(x[i]) == k;
        }
        above[c] += larger;
        equal[c] += same;
    }
}

i64 count_keys(ARRAY(float, x), ARRAY(u32, keys), ARRAY(i64, above), ARRAY(i64, equal)) {
    for (i64 begin = 0; begin < x_n; begin += TILE)
        count_keys_row(x + begin, MIN(TILE, x_n - begin), keys, keys_n, above, equal);
    return 0;
}

static void trim_row(const float *restrict x, float *restrict out, i64 n, u32 threshold, i64 ties) {
    for (i64 i = 0; i < ties; i++)
        out[i] = (key(x[i]) >= threshold) & (key(x[i]) <= INFINITE) ? x[i] : 0.0f;
    for (i64 i = ties; i < n; i++)
        out[i] = (key(x[i]) > threshold) & (key(x[i]) <= INFINITE) ? x[i] : 0.0f;
}

i64 trim(MATRIX(float, rows), ARRAY(u32, thresholds), ARRAY(i64, ties), MATRIX(float, out)) {
    for (i64 s = 0; s < rows_n; s++)
        trim_row(rows + s * rows_m, out + s * out_m, rows_m, thresholds[s], ties[s]);
    return 0;
}

static i64 count_kept_row(const float *x, i64 n, u32 threshold, i64 ties) {
    u32 kept = 0;
    for (i64 i = 0; i < ties; i++) kept += (key(x[i]) >= threshold) & (key(x[i]) <= INFINITE);
    for (i64 i = ties; i < n; i++) kept += (key(x[i]) > threshold) & (key(x[i]) <= INFINITE);
    return kept;
}

i64 count_kept(ARRAY(float, x), u32 threshold, i64 ties) { return count_kept_row(x, x_n, threshold, ties); }

i64 distinct_keys(ARRAY(u32, sample), u32 low, u32 high, ARRAY(u32, distinct)) {
    i64 count = 0;
    for (i64 i = 0; i < sample_n; i++) {
        u32 k = sample[i];
        if (k - low > high - low) continue;
        i64 n = 0;
        while (n < count && distinct[n] != k) n++;
        if (n == distinct_n) return n + 1;
        if (n == count) distinct[count++] = k;
    }
    return count;
}

i64 find_tie(ARRAY(float, x), u32 threshold, i64 ordinal) {
    i64 seen = 0;
    for (i64 begin = 0; begin < x_n; begin += TILE) {
        i64 n = MIN(TILE, x_n - begin);
        u32 here = 0;
        for (i64 i = 0; i < n; i++) here += key(x[begin + i]) == threshold;
        if (seen + here >= ordinal)
            for (i64 i = 0; i < n; i++) {
                seen += key(x[begin + i]) == threshold;
                if (seen == ordinal) return begin + i;
            }
        seen += here;
    }
    return -1 - seen;
}

i64 not_empty(ARRAY(int32_t, counts), ARRAY(int32_t, indexes), ARRAY(i64, filled)) {
    i64 size = 0;
    for (i64 begin = 0; begin < counts_n; begin += 64) {
        i64 n = MIN(64, counts_n - begin);
        int32_t any = 0;
        for (i64 i = 0; i < n; i++) any |= counts[begin + i];
        if (any)
            for (i64 i = 0; i < n; i++)
                if (counts[begin + i] > 0) {
                    indexes[size] = begin + i;
                    filled[size++] = counts[begin + i];
                }
    }
    return size;
}

typedef struct { u32 key; i64 rank, count; } Selected;

static Selected select_key(u32 *keys, i64 count, i64 rank, int32_t *counts) {
    for (int digits = 2, shift = 20; digits >= 0; digits--, shift = digits ? 9 : 0) {
        memset(counts, 0, sizeof(int32_t) << 11);
        for (i64 i = 0; i < count; i++) counts[keys[i] >> shift & 2047]++;
        i64 digit = 2047, same = 0;
        while (counts[digit] < rank) rank -= counts[digit--];
        for (i64 i = 0; i < count; i++) {
            u32 k = keys[i];
            keys[same] = k;
            same += (k >> shift & 2047) == digit;
        }
        count = same;
    }
    return (Selected){keys[0], rank, count};
}

i64 kth_largest(MATRIX(float, rows), ARRAY(i64, ks), ARRAY(i64, found), ARRAY(i64, last)) {
    i64 n = rows_m, step = n / 1024;
    u32 *left = malloc(n * sizeof(u32));
    for (i64 s = 0; s < rows_n; s++) {
        const float *x = rows + s * n;
        int32_t counts[1 << 11];
        u32 low = 0, high = 0xFFFFFFFFu;
        i64 k = ks[s], above = 0, count = 0, i;
        if (step >= 16) {
            i64 taken = (n + step - 1) / step;
            for (i = 0; i < taken; i++) left[i] = left[taken + i] = key(x[i * step]);
            double expected = (double)(k * taken) / n;
            double margin = 3 + 3 * sqrt(expected * (1 - expected / taken));
            i64 first_rank = expected - margin, last_rank = expected + margin;
            if (last_rank <= taken) low = select_key(left + taken, taken, last_rank, counts).key;
            if (first_rank >= 1) high = select_key(left, taken, first_rank, counts).key;
        }
        for (i = 0; i < n; i++) above += key(x[i]) > high;
        for (i = 0; i < n; i++) {
            left[count] = key(x[i]);
            count += left[count] - low <= high - low;
        }
        if (k <= above || k > above + count)
            for (i = above = 0, count = n, high = 0xFFFFFFFFu; i < n; i++) left[i] = key(x[i]);
        Selected it = {low, k - above, count};
        if (high != low) it = select_key(left, count, k - above, counts);
        found[s] = it.key;
        last[s] = n - 1;
        for (i = 0; it.rank < it.count && i < n; i++)
            if (key(x[i]) == it.key && --it.rank == 0) {
                last[s] = i;
                break;
            }
    }
    free(left);
    return 0;
}

/* Masks and elections */

static inline u32 mixed_word(u32 x, u32 k0, u32 k1) {
    x ^= k0;
    x = (x ^ x >> 16) * 0x21F0AAADu;
    x = (x ^ x >> 15) + k1;
    x *= 0xD35A2D97u;
    x = (x ^ x >> 15) * 0x31848BABu;
    return x ^ x >> 14;
}

static void drop_row(const float *x, float *out, i64 n, const u32 *words, u32 low, float factor) {
    u32 k0 = words[0], k1 = words[1], limit = words[2];
    for (i64 i = 0; i < n; i++) out[i] = mixed_word(low + (u32)i, k0, k1) < limit ? x[i] * factor : 0.0f;
}

i64 drop(MATRIX(float, rows), MATRIX(u32, words), u32 low, ARRAY(float, factors), MATRIX(float, out)) {
    for (i64 s = 0; s < rows_n; s++)
        drop_row(rows + s * rows_m, out + s * out_m, rows_m, words + s * words_m, low, factors[s]);
    return 0;
}

i64 count_masked(i64 size, u32 k0, u32 k1, u32 low, u32 limit) {
    u32 kept = 0;
    for (i64 i = 0; i < size; i++) kept += mixed_word(low + (u32)i, k0, k1) < limit;
    return kept;
}

static void elect_row(const float *rows, i64 stride, i64 sources, i64 n, const float *weights,
                      i64 weighted, i64 divide_by, float zero_sign, float least, float *restrict total) {
    float elected[TILE], divisor[TILE];
    for (i64 s = 0; s < sources; s++) {
        const float *restrict row = rows + s * stride;
        float vote = weighted ? weights[s] : 1.0f;
        if (s == 0) for (i64 i = 0; i < n; i++) elected[i] = row[i] * vote;
        else for (i64 i = 0; i < n; i++) elected[i] = elected[i] + row[i] * vote;
    }
    for (i64 i = 0; i < n; i++) {
        float sign = elected[i] > 0 ? 1.0f : zero_sign;
        elected[i] = elected[i] < 0 ? -1.0f : sign;
        total[i] = 0.0f;
        divisor[i] = 0.0f;
    }
    for (i64 s = 0; s < sources; s++) {
        const float *restrict row = rows + s * stride;
        float weight = weights[s], vote = weighted ? weight : 1.0f, share = divide_by == 2 ? 1.0f : weight;
        for (i64 i = 0; i < n; i++) {
            int agrees = row[i] * vote * elected[i] > 0;
            total[i] = total[i] + (agrees ? row[i] * weight : 0.0f);
            divisor[i] = divisor[i] + (agrees ? share : 0.0f);
        }
    }
    if (divide_by == 0) return;
    if (least > 0) for (i64 i = 0; i < n; i++) total[i] /= divisor[i] < least ? least : divisor[i];
    else for (i64 i = 0; i < n; i++) total[i] /= fabsf(divisor[i]) < 1e-8f ? 1.0f : divisor[i];
}

i64 disjoint_mean(MATRIX(float, rows), ARRAY(float, weights), i64 weighted, i64 divide_by,
                  float zero_sign, float least, ARRAY(float, out)) {
    for (i64 begin = 0; begin < rows_m; begin += TILE)
        elect_row(rows + begin, rows_m, rows_n, MIN(TILE, rows_m - begin), weights, weighted, divide_by,
                  zero_sign, least, out + begin);
    return 0;
}

/* Measures; sums in sixteen parts, since their order is free */

static double dot_quick(const float *restrict a, const float *restrict b, i64 n) {
    float lanes[16] = {0}, total = 0.0f;
    i64 aligned = n / 16 * 16;
    for (i64 i = 0; i < aligned; i += 16)
        for (int j = 0; j < 16; j++) lanes[j] += a[i + j] * b[i + j];
    for (i64 i = aligned; i < n; i++) lanes[0] += a[i] * b[i];
    for (int j = 0; j < 16; j++) total += lanes[j];
    return total;
}

static double square_change(const float *restrict a, const float *restrict b, i64 n) {
    float lanes[16] = {0}, total = 0.0f;
    i64 aligned = n / 16 * 16;
    for (i64 i = 0; i < aligned; i += 16)
        for (int j = 0; j < 16; j++) lanes[j] += (b[i + j] - a[i + j]) * (b[i + j] - a[i + j]);
    for (i64 i = aligned; i < n; i++) lanes[0] += (b[i] - a[i]) * (b[i] - a[i]);
    for (int j = 0; j < 16; j++) total += lanes[j];
    return total;
}

static void gram_rows(const float *rows, i64 stride, i64 sources, i64 n, i64 pairs, double *out) {
    for (i64 s = 0; s < sources; s++)
        for (i64 t = s; t < (pairs ? sources : s + 1); t++) {
            double product = dot_quick(rows + s * stride, rows + t * stride, n);
            out[s * sources + t] += product;
            if (s != t) out[t * sources + s] += product;
        }
}

i64 gram(MATRIX(float, rows), MATRIX(double, out)) {
    for (i64 begin = 0; begin < rows_m; begin += TILE)
        gram_rows(rows + begin, rows_m, rows_n, MIN(TILE, rows_m - begin), 1, out);
    return 0;
}

i64 quick_change(ARRAY(float, base), ARRAY(float, merged), ARRAY(double, result)) {
    result[0] = result[1] = 0.0;
    for (i64 begin = 0; begin < base_n; begin += TILE) {
        i64 n = MIN(TILE, base_n - begin);
        result[0] += dot_quick(base + begin, base + begin, n);
        result[1] += square_change(base + begin, merged + begin, n);
    }
    return 0;
}

static i64 sign_rows(const float *rows, i64 stride, i64 sources, i64 n, i64 *both, i64 *agree) {
    static _Thread_local int32_t signs[64][TILE];
    int32_t low[TILE], high[TILE], mixed = 0;
    memset(low, 0, sizeof low);
    memset(high, 0, sizeof high);
    for (i64 s = 0; s < sources; s++)
        for (i64 i = 0; i < n; i++) {
            float x = rows[s * stride + i];
            int32_t sign = (x > 0) - (x < 0);
            signs[s][i] = sign;
            low[i] = MIN(low[i], sign);
            high[i] = MAX(high[i], sign);
        }
    for (i64 i = 0; i < n; i++) mixed += high[i] & -low[i];
    for (i64 s = 0; s < sources; s++)
        for (i64 t = s; t < sources; t++) {
            int32_t present = 0, product = 0;
            for (i64 i = 0; i < n; i++) {
                int32_t p = signs[s][i] * signs[t][i];
                product += p;
                present += p * p;
            }
            both[s * sources + t] += present;
            agree[s * sources + t] += (present + product) / 2;
            if (s != t) {
                both[t * sources + s] += present;
                agree[t * sources + s] += (present + product) / 2;
            }
        }
    return mixed;
}

i64 count_signs(MATRIX(float, rows), MATRIX(i64, both), MATRIX(i64, agree)) {
    i64 conflict = 0;
    for (i64 begin = 0; begin < rows_m; begin += TILE)
        conflict += sign_rows(rows + begin, rows_m, rows_n, MIN(TILE, rows_m - begin), both, agree);
    return conflict;
}

i64 count_relations(MATRIX(float, rows), ARRAY(u32, thresholds), MATRIX(i64, both), MATRIX(i64, agree),
                    MATRIX(i64, equal), MATRIX(i64, large), ARRAY(i64, steps), ARRAY(i64, contest)) {
    i64 sources = rows_n - 1, size = rows_m;
    static _Thread_local int32_t tops[64][TILE];
    for (i64 begin = 0; begin < size; begin += TILE) {
        i64 n = MIN(TILE, size - begin);
        u32 step[TILE];
        int32_t changed[TILE] = {0}, balance[TILE] = {0}, shared = 0, mixed = 0;
        for (i64 i = 0; i < n; i++) {
            u32 exponent = bits_of(rows[begin + i]) & INFINITE;
            step[i] = exponent > 7u << 23 ? exponent - (7u << 23) : 0;
        }
        for (i64 s = 0; s < sources; s++) {
            const float *row = rows + (s + 1) * size + begin;
            int32_t small = 0;
            for (i64 i = 0; i < n; i++) {
                int32_t sign = (row[i] > 0) - (row[i] < 0);
                changed[i] += sign * sign;
                balance[i] += sign;
                tops[s][i] = key(row[i]) >= thresholds[s];
                small += (key(row[i]) <= step[i]) & (key(row[i]) > 0);
            }
            steps[s] += small;
        }
        for (i64 i = 0; i < n; i++) {
            int32_t several = changed[i] > 1;
            shared += several;
            mixed += several & (abs(balance[i]) != changed[i]);
        }
        contest[0] += shared;
        contest[1] += mixed;
        sign_rows(rows + size + begin, size, sources, n, both, agree);
        for (i64 s = 0; s < sources; s++)
            for (i64 t = s; t < sources; t++) {
                const float *a = rows + (s + 1) * size + begin, *b = rows + (t + 1) * size + begin;
                int32_t together = 0, alike = 0;
                for (i64 i = 0; i < n; i++) {
                    together += tops[s][i] & tops[t][i];
                    alike += a[i] == b[i];
                }
                large[s * sources + t] += together;
                equal[s * sources + t] += alike;
                if (s != t) {
                    large[t * sources + s] += together;
                    equal[t * sources + s] += alike;
                }
            }
    }
    return 0;
}

/* Small matrices */

i64 own_products(MATRIX(double, a), MATRIX(double, out)) {
    for (i64 i = 0; i < a_n; i++)
        for (i64 j = 0; j <= i; j++) {
            double lanes[8] = {0}, total = 0.0;
            i64 aligned = a_m / 8 * 8;
            for (i64 k = 0; k < aligned; k += 8)
                for (int l = 0; l < 8; l++) lanes[l] += a[i * a_m + k + l] * a[j * a_m + k + l];
            for (i64 k = aligned; k < a_m; k++) lanes[0] += a[i * a_m + k] * a[j * a_m + k];
            for (int l = 0; l < 8; l++) total += lanes[l];
            out[i * out_m + j] = out[j * out_m + i] = total;
        }
    return 0;
}

i64 tridiagonal(MATRIX(double, s), ARRAY(double, diagonal), ARRAY(double, off),
                MATRIX(double, reflectors)) { /* none are kept */
    i64 n = s_n;
    double *v = calloc(n, sizeof(double)), *w = calloc(n, sizeof(double));
    for (i64 k = 0; k < n - 2; k++) {
        double square = 0.0, along = 0.0;
        for (i64 i = k + 1; i < n; i++) {
            v[i] = s[k * n + i];
            square += v[i] * v[i];
        }
        if (square == 0.0) {
            off[k] = 0.0;
            continue;
        }
        double alpha = -copysign(sqrt(square), v[k + 1]), length;
        off[k] = alpha;
        length = 2.0 * (square - alpha * v[k + 1]);
        v[k + 1] -= alpha;
        for (i64 i = k + 1; i < n; i++) {
            double lanes[8] = {0}, total = 0.0;
            i64 j = k + 1;
            for (; j + 8 <= n; j += 8)
                for (int l = 0; l < 8; l++) lanes[l] += s[i * n + j + l] * v[j + l];
            for (; j < n; j++) lanes[0] += s[i * n + j] * v[j];
            for (int l = 0; l < 8; l++) total += lanes[l];
            w[i] = 2.0 * total / length;
            along += w[i] * v[i];
        }
        for (i64 i = k + 1; i < n; i++) w[i] -= along / length * v[i];
        for (i64 i = k + 1; i < n; i++)
            for (i64 j = k + 1; j < n; j++) s[i * n + j] -= v[i] * w[j] + w[i] * v[j];
    }
    for (i64 i = 0; i < n; i++) diagonal[i] = s[i * n + i];
    off[n - 1] = 0.0;
    if (n > 1) off[n - 2] = s[(n - 2) * n + n - 1];
    free(v);
    free(w);
    return 0;
}

i64 eigenvalues(ARRAY(double, d), ARRAY(double, e), MATRIX(double, rows)) { /* none are turned */
    double largest = 0.0, tolerance;
    for (i64 i = 0; i < d_n; i++) largest = MAX(largest, fabs(d[i]) + fabs(e[i]));
    tolerance = 0x1p-52 * largest;
    i64 high = d_n - 1, turns = 0;
    while (high > 0) {
        i64 low = high;
        while (low > 0 && fabs(e[low - 1]) > tolerance) low--;
        if (low == high) {
            high--;
            continue;
        }
        if (++turns > 60 * d_n) return 0;
        double half = (d[high - 1] - d[high]) / 2, corner = e[high - 1];
        double root = copysign(sqrt(half * half + corner * corner), half);
        double x = d[low] - (d[high] - corner * corner / (half + root)), z = e[low];
        for (i64 k = low; k < high; k++) {
            double length = sqrt(x * x + z * z);
            double c = length > 0.0 ? x / length : 1.0, t = length > 0.0 ? z / length : 0.0;
            if (k > low) e[k - 1] = length;
            double a = d[k], b = d[k + 1], off = e[k];
            d[k] = c * c * a + 2.0 * c * t * off + t * t * b;
            d[k + 1] = t * t * a - 2.0 * c * t * off + c * c * b;
            e[k] = c * t * (b - a) + (c * c - t * t) * off;
            if (k < high - 1) {
                x = e[k];
                z = t * e[k + 1];
                e[k + 1] = c * e[k + 1];
            }
        }
    }
    return 1;
}

/* From stored bytes: tiles that stay in cache */

static i64 decode_tile(const u8 *stored, i64 start, i64 kind, i64 begin, i64 n, float *out) {
    const u8 *raw = stored + start + begin * (kind == 2 ? 4 : 2);
    if (kind == 0) return decode_bf16_row((const u16 *)raw, out, n);
    if (kind == 1) return decode_f16_row((const u16 *)raw, out, n);
    return copy_row((const float *)raw, out, n);
}

static i64 encode_tile(const float *x, i64 kind, u8 *out, i64 begin, i64 n) {
    if (kind == 0) return encode_bf16_row(x, (u16 *)out + begin, n), 0;
    if (kind == 1) return encode_f16_row(x, (u16 *)out + begin, n);
    memcpy((float *)out + begin, x, 4 * n);
    return 0;
}

static void subtract(const float *restrict base, float *restrict x, i64 n) {
    for (i64 i = 0; i < n; i++) x[i] -= base[i];
}

i64 merge_linear(ARRAY(u8, stored), ARRAY(i64, starts), ARRAY(i64, kinds), i64 size, i64 based,
                 ARRAY(float, weights), float divisor, float scale, MATRIX(u32, masks),
                 ARRAY(float, factors), u32 low, ARRAY(u8, out), i64 out_kind) {
    float base[TILE], row[TILE], total[TILE];
    i64 seen = 0;
    for (i64 begin = 0; begin < size; begin += TILE) {
        i64 n = MIN(TILE, size - begin);
        if (based) seen |= decode_tile(stored, starts[0], kinds[0], begin, n, base);
        for (i64 s = 0; s < weights_n; s++) {
            float w = weights[s];
            const u16 *halves = (const u16 *)(stored + starts[s + based]) + begin;
            if (kinds[s + based] == 0 && !based && !masks_n && factors[s] == 1.0f) {
                u16 largest = 0;
                for (i64 i = 0; i < n; i++) {
                    u16 m = halves[i] & 0x7FFF;
                    float x = float_of((u32)halves[i] << 16) * w;
                    largest = MAX(largest, m);
                    total[i] = s == 0 ? x : total[i] + x;
                }
                seen |= largest >= 0x7F80;
                continue;
            }
            seen |= decode_tile(stored, starts[s + based], kinds[s + based], begin, n, row);
            if (based) subtract(base, row, n);
            if (masks_n && !masks[4 * s + 3])
                drop_row(row, row, n, masks + 4 * s, low + (u32)begin, factors[s]);
            else if (factors[s] != 1.0f)
                for (i64 i = 0; i < n; i++) row[i] *= factors[s];
            if (s == 0) for (i64 i = 0; i < n; i++) total[i] = row[i] * w;
            else for (i64 i = 0; i < n; i++) total[i] = total[i] + row[i] * w;
        }
        if (divisor != 1.0f) for (i64 i = 0; i < n; i++) total[i] /= divisor;
        if (based) for (i64 i = 0; i < n; i++) total[i] = base[i] + scale * total[i];
        seen |= encode_tile(total, out_kind, out, begin, n) << 1;
    }
    return seen;
}

i64 merge_disjoint(ARRAY(u8, stored), ARRAY(i64, starts), ARRAY(i64, kinds), i64 size,
                   ARRAY(float, weights), i64 weighted, i64 divide_by, float zero_sign, float scale,
                   MATRIX(u32, rules), ARRAY(i64, ties), ARRAY(float, factors), u32 low, ARRAY(u8, out),
                   i64 out_kind) {
    static _Thread_local float rows[64][TILE];
    float base[TILE], total[TILE];
    i64 seen = 0;
    for (i64 begin = 0; begin < size; begin += TILE) {
        i64 n = MIN(TILE, size - begin);
        seen |= decode_tile(stored, starts[0], kinds[0], begin, n, base);
        for (i64 s = 0; s < weights_n; s++) {
            const u32 *rule = rules + 4 * s;
            seen |= decode_tile(stored, starts[s + 1], kinds[s + 1], begin, n, rows[s]);
            subtract(base, rows[s], n);
            if (!rule[3] && !ties_n) drop_row(rows[s], rows[s], n, rule, low + (u32)begin, factors[s]);
            if (!rule[3] && ties_n) {
                i64 here = MIN(MAX(ties[s] - begin, 0), n);
                for (i64 i = 0; i < n; i++) {
                    u32 k = key(rows[s][i]), least = rule[0] + (i >= here);
                    rows[s][i] = (k >= least) & (k <= INFINITE) ? rows[s][i] : 0.0f;
                }
            }
            if ((rule[3] || ties_n) && factors[s] != 1.0f)
                for (i64 i = 0; i < n; i++) rows[s][i] *= factors[s];
        }
        elect_row(rows[0], TILE, weights_n, n, weights, weighted, divide_by, zero_sign, 0.0f, total);
        for (i64 i = 0; i < n; i++) total[i] = base[i] + scale * total[i];
        seen |= encode_tile(total, out_kind, out, begin, n) << 1;
    }
    return seen;
}

i64 measure_stored(ARRAY(u8, stored), ARRAY(i64, starts), ARRAY(i64, kinds), i64 first, i64 last,
                   i64 based, ARRAY(float, merged), i64 pairs, MATRIX(u32, rules), ARRAY(i64, ties),
                   u32 low, MATRIX(double, gram), MATRIX(i64, both), MATRIX(i64, agree),
                   ARRAY(i64, counts), ARRAY(double, squares)) {
    static _Thread_local float rows[64][TILE];
    float base[TILE];
    i64 sources = starts_n - based;
    for (i64 at = first; at < last; at += TILE) {
        i64 n = MIN(TILE, last - at);
        if (based) {
            decode_tile(stored, starts[0], kinds[0], at, n, base);
            squares[0] += dot_quick(base, base, n);
            squares[1] += square_change(base, merged + at - first, n);
        }
        for (i64 s = 0; s < sources; s++) {
            const u32 *rule = rules + 4 * s;
            decode_tile(stored, starts[s + based], kinds[s + based], at, n, rows[s]);
            if (based) subtract(base, rows[s], n);
            if (!rules_n) continue;
            if (rule[3]) counts[1 + s] += n;
            else if (ties_n)
                counts[1 + s] += count_kept_row(rows[s], n, rule[0], MIN(MAX(ties[s] - at, 0), n));
            else counts[1 + s] += count_masked(n, rule[0], rule[1], low + (u32)at, rule[2]);
        }
        gram_rows(rows[0], TILE, sources, n, pairs, gram);
        if (pairs && sources > 1) counts[0] += sign_rows(rows[0], TILE, sources, n, both, agree);
    }
    return 0;
}

i64 count_stored(ARRAY(u8, stored), ARRAY(i64, starts), ARRAY(i64, kinds), i64 size, i64 based,
                 ARRAY(i64, operands), MATRIX(u32, ranges), MATRIX(u32, candidates), MATRIX(i64, above),
                 MATRIX(i64, equal), MATRIX(int32_t, counts)) {
    float base[TILE], row[TILE];
    for (i64 begin = 0; begin < size; begin += TILE) {
        i64 n = MIN(TILE, size - begin);
        if (based) decode_tile(stored, starts[0], kinds[0], begin, n, base);
        for (i64 k = 0; k < operands_n; k++) {
            const u32 *range = ranges + 4 * k;
            i64 s = operands[k] + based;
            decode_tile(stored, starts[s], kinds[s], begin, n, row);
            if (based) subtract(base, row, n);
            if (range[3])
                count_keys_row(row, n, candidates + k * candidates_m, range[3], above + k * above_m,
                               equal + k * equal_m);
            else above[k * above_m] += count_range_row(row, n, range[0], range[1], range[2],
                                                       counts + k * counts_m);
        }
    }
    return 0;
}

i64 dot_stored(ARRAY(u8, stored), ARRAY(i64, starts), ARRAY(i64, kinds), i64 size, i64 based, i64 run,
               MATRIX(double, sums)) {
    static _Thread_local float rows[64][TILE];
    static _Thread_local double lanes[2080][LANES];
    float base[TILE];
    i64 sources = starts_n - based;
    for (i64 r = 0; r < sums_m; r++) {
        memset(lanes, 0, sums_n * sizeof lanes[0]);
        for (i64 begin = r * run, end = MIN((r + 1) * run, size); begin < end; begin += TILE) {
            i64 n = MIN(TILE, end - begin), pair = 0;
            if (based) decode_tile(stored, starts[0], kinds[0], begin, n, base);
            for (i64 s = 0; s < sources; s++) {
                decode_tile(stored, starts[s + based], kinds[s + based], begin, n, rows[s]);
                if (based) subtract(base, rows[s], n);
            }
            for (i64 s = 0; s < sources; s++)
                for (i64 t = s; t < sources; t++) dot_lanes(rows[s], rows[t], n, lanes[pair++]);
        }
        for (i64 pair = 0; pair < sums_n; pair++) sums[pair * sums_m + r] = sum_lanes(lanes[pair]);
    }
    return 0;
}
