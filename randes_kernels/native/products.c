// y[m][n] = the sum over k of x[m][k] D[n][k], for few rows of x and a D that is packed (packing.py has the layout).
//
// A few rows of D at a time are unpacked to floats, which stay in the first cache, and multiplied with all rows of x.
// Each y is a sum of its own, in one order: no row of x, and no number of threads, changes another row's answer.
// Plain C with the vectors of GCC and Clang, which make them instructions of whatever machine this is compiled for.

#include <stddef.h>
#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))
enum { LANES = 16, SPAN = 128, ROWS = 4, CHUNK = 1024 };

typedef float floats __attribute__((vector_size(64)));

typedef int32_t ints __attribute__((vector_size(64)));
typedef uint8_t bytes_anywhere __attribute__((vector_size(16), aligned(1), may_alias));
typedef float floats_anywhere __attribute__((vector_size(64), aligned(4), may_alias));




INLINE float sum(floats v) {
    float parts[LANES];
    *(floats_anywhere *)parts = v;
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) parts[i] += parts[i + half];
    return parts[0];
}

// Columns [first, first + count) of one row, count a multiple of 64. step: of 64 columns each.
INLINE void unpack_row(const int bits, float *to, const uint8_t *words, const float *step, int64_t first, int64_t count) {
    const int width = LANES * bits, top = (1 << bits) - 1;
    for (int64_t half = 0; half < count; half += 64) {
        const uint8_t *span = words + (first + half) / SPAN * (SPAN * bits / 8);
        const int odd = (first + half) % SPAN != 0;
        const float unit = step[half / 64];
        if (bits == 4) {
            for (int i = 0; i < 64; i++) to[half + i] = (float)(2 * (odd ? span[i] >> 4 : span[i] & 15) - top) * unit;
        } else {
            const int planes = 4 / bits;
            for (int plane = 0; plane < planes; plane++) {
                const int shift = (odd * planes + plane) * bits;
                for (int i = 0; i < width; i++)
                    to[half + plane * width + i] = (float)(2 * ((span[i] >> shift) & top) - top) * unit;
            }
        }
    }
}

INLINE void unpack_row_of_eight(float *to, const int8_t *words, float step, int64_t first, int64_t count, int64_t columns) {
    const int64_t there = columns - first < count ? columns - first : count;
    for (int64_t k = 0; k < there; k++) to[k] = (float)words[first + k] * step;
    for (int64_t k = there; k < count; k++) to[k] = 0;
}

// Of eight columns, each LANES from the next, one is loud.
INLINE void unpack_row_of_half(float *to, const uint8_t *words, float step, int64_t first, int64_t count) {
    const ints unit = (ints)((floats){0} + step);
    for (int64_t k = 0; k < count; k += SPAN) {
        const uint8_t *span = words + (first + k) / SPAN * (LANES / 2);
        uint8_t codes[LANES];
        for (int i = 0; i < LANES / 2; i++) codes[i] = span[i] & 15, codes[i + LANES / 2] = span[i] >> 4;
        const ints code = __builtin_convertvector(*(const bytes_anywhere *)codes, ints), place = code & 7, value = unit ^ ((code & 8) << 28);
#pragma GCC unroll 8
        for (int plane = 0; plane < 8; plane++)
            *(floats_anywhere *)(to + k + LANES * plane) = (floats)(value & (place == plane));
    }
}

// Adds to y (M rows, `wide` apart) what `count` columns of ROWS unpacked rows give.
INLINE void multiply(const int M, float *y, int64_t wide, const float *x, int64_t k, const float *unpacked, int64_t count,
                     int64_t rows) {
    floats sums[M][ROWS];
#pragma GCC unroll 4
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) sums[m][r] = (floats){0};
    for (int64_t column = 0; column < count; column += LANES) {
        floats w[ROWS];
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) w[r] = *(const floats_anywhere *)(unpacked + r * CHUNK + column);
#pragma GCC unroll 4
        for (int m = 0; m < M; m++) {
            const floats own = *(const floats_anywhere *)(x + m * k + column);
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; r++) sums[m][r] += own * w[r];
        }
    }
    for (int m = 0; m < M; m++)
        for (int r = 0; r < ROWS; r++)
            if (r < rows) y[m * wide + r] += sum(sums[m][r]);
}

// x (m, k) floats, k a multiple of 64 with zeros behind D's columns, and of 128 below 8 bits. words (n, w) and
// steps (groups, n) are packed. halves: twice the bits. y (m, n).
void randes_product(float *y, const float *x, const uint8_t *words, const _Float16 *steps, int64_t m, int64_t n, int64_t k,
                    int64_t w, int64_t columns, int64_t halves, int64_t group, int64_t apart, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t first_row = 0; first_row < n; first_row += ROWS) {
        float unpacked[ROWS * CHUNK] __attribute__((aligned(64)));
        const int64_t rows = n - first_row < ROWS ? n - first_row : ROWS;
        for (int64_t row = 0; row < m; row++)
            for (int64_t r = 0; r < rows; r++) y[row * n + first_row + r] = 0;
        for (int64_t first = 0; first < k; first += CHUNK) {
            const int64_t count = k - first < CHUNK ? k - first : CHUNK;
            for (int64_t r = 0; r < rows; r++) {
                float *to = unpacked + r * CHUNK;
                const uint8_t *own = words + (first_row + r) * w;
                float step[CHUNK / 64];
                for (int64_t half = 0; half < count; half += 64)
                    step[half / 64] = (float)steps[first_row + r + (group ? (first + half) / group * apart : 0)];
                switch (halves) {
                    case 16: unpack_row_of_eight(to, (const int8_t *)own, step[0], first, count, columns); break;
                    case 8: unpack_row(4, to, own, step, first, count); break;
                    case 4: unpack_row(2, to, own, step, first, count); break;
                    case 2: unpack_row(1, to, own, step, first, count); break;
                    default: unpack_row_of_half(to, own, step[0], first, count);
                }
            }
            int64_t row = 0;
            for (; row + 4 <= m; row += 4) multiply(4, y + row * n + first_row, n, x + row * k + first, k, unpacked, count, rows);
            for (; row + 2 <= m; row += 2) multiply(2, y + row * n + first_row, n, x + row * k + first, k, unpacked, count, rows);
            for (; row < m; row++) multiply(1, y + row * n + first_row, n, x + row * k + first, k, unpacked, count, rows);
        }
    }
}
