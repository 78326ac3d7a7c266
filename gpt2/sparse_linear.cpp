// y = W x + bias for some vectors x and a matrix W, row by row, of which only the non-zero weights are stored.
// Compiled on first use by pruning/native.py; threads are those of torch's own OpenMP.

#include <cstdint>
#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

constexpr int64_t AHEAD = 1024;  // numbers, a page of floats, beyond which the processor does not ask for memory by itself

// Calls dot(row, x) for each row of W and each of the `inputs` vectors, which all meet the row while it is in the cache.
template <class Dot>
void multiply(const float *bias, int64_t rows, int64_t width, const float *x, float *y, int64_t inputs, Dot dot) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; row++)
        for (int64_t input = 0; input < inputs; input++)
            y[input * rows + row] = dot(row, x + input * width) + (bias ? bias[row] : 0.0f);
}

#ifdef __AVX2__
// For each byte of a mask: which of the next stored weights each of eight lanes takes; negative where it takes none.
struct Lanes {
    int8_t of[256][8];
    Lanes() {
        for (int byte = 0; byte < 256; byte++)
            for (int bit = 0, taken = 0; bit < 8; bit++) of[byte][bit] = byte >> bit & 1 ? taken++ : -128;
    }
};
const Lanes lanes;

inline __m256 spread(uint8_t byte, const float *values) {
    __m256i lane = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)lanes.of[byte]));
    __m256 taken = _mm256_permutevar8x32_ps(_mm256_loadu_ps(values), lane);
    return _mm256_blendv_ps(taken, _mm256_setzero_ps(), _mm256_castsi256_ps(lane));
}

inline float sum(__m256 v) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

// The product of a row's bytes of the mask, but the last where they are odd: moves `values` and `i` behind them.
inline float wide(const uint8_t *mask, const float *&values, const float *x, int64_t &i, int64_t bytes) {
    __m256 even = _mm256_setzero_ps(), odd = even;
    for (; i + 2 <= bytes; i += 2) {
        __builtin_prefetch(values + AHEAD);
        even = _mm256_fmadd_ps(spread(mask[i], values), _mm256_loadu_ps(x + 8 * i), even);
        values += __builtin_popcount(mask[i]);
        odd = _mm256_fmadd_ps(spread(mask[i + 1], values), _mm256_loadu_ps(x + 8 * i + 8), odd);
        values += __builtin_popcount(mask[i + 1]);
    }
    return sum(_mm256_add_ps(even, odd));
}
#else
inline float wide(const uint8_t *, const float *&, const float *, int64_t &, int64_t) { return 0; }
#endif

// The product of a row's last bytes, from the i-th on.
inline float narrow(const uint8_t *mask, const float *values, const float *x, int64_t i, int64_t bytes) {
    float total = 0;
    for (; i < bytes; i++)
        for (unsigned byte = mask[i]; byte; byte &= byte - 1) total += *values++ * x[8 * i + __builtin_ctz(byte)];
    return total;
}

}  // namespace

// All: where, values, starts: how W is stored, starts: where in `values` each row begins; x: [inputs, width]; bias:
// [rows], or null; y: [inputs, rows].
extern "C" {

// where: a bit a weight, whole bytes a row; values: the non-zero ones, with eight floats to spare behind the last.
void bitmask(const uint8_t *where, const float *values, const int64_t *starts, const float *bias, int64_t rows,
             int64_t width, const float *x, float *y, int64_t inputs) {
    const int64_t bytes = (width + 7) / 8, full = width / 8;
    multiply(bias, rows, width, x, y, inputs, [=](int64_t row, const float *x) {
        const float *next = values + starts[row];
        int64_t i = 0;
        const float first = wide(where + row * bytes, next, x, i, full);
        return first + narrow(where + row * bytes, next, x, i, bytes);
    });
}

// where: the column of each of `values`; one more of `starts`: where the last row ends.
void columns(const uint16_t *where, const float *values, const int64_t *starts, const float *bias, int64_t rows,
             int64_t width, const float *x, float *y, int64_t inputs) {
    multiply(bias, rows, width, x, y, inputs, [=](int64_t row, const float *x) {
        float a = 0, b = 0, c = 0, d = 0;
        int64_t i = starts[row], end = starts[row + 1];
        for (; i + 4 <= end; i += 4) {
            __builtin_prefetch(values + i + AHEAD), __builtin_prefetch(where + i + AHEAD);
            a += values[i] * x[where[i]];
            b += values[i + 1] * x[where[i + 1]];
            c += values[i + 2] * x[where[i + 2]];
            d += values[i + 3] * x[where[i + 3]];
        }
        for (; i < end; i++) a += values[i] * x[where[i]];
        return (a + b) + (c + d);
    });
}

#ifdef __AVX2__
// As `columns`, by the processor's gather: half the time of it on some, many times that on others.
void gathered(const uint16_t *where, const float *values, const int64_t *starts, const float *bias, int64_t rows,
              int64_t width, const float *x, float *y, int64_t inputs) {
    multiply(bias, rows, width, x, y, inputs, [=](int64_t row, const float *x) {
        __m256 totals[2] = {};
        int64_t i = starts[row], end = starts[row + 1];
        for (; i + 16 <= end; i += 16) {
            __builtin_prefetch(values + i + AHEAD), __builtin_prefetch(where + i + AHEAD);
            for (int part = 0; part < 2; part++) {
                const __m256i from = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(where + i) + part));
                const __m256 value = _mm256_loadu_ps(values + i + 8 * part);
                totals[part] = _mm256_fmadd_ps(value, _mm256_i32gather_ps(x, from, sizeof *x), totals[part]);
            }
        }
        float rest = 0;
        for (; i < end; i++) rest += values[i] * x[where[i]];
        return sum(_mm256_add_ps(totals[0], totals[1])) + rest;
    });
}
#endif

// values: all weights, `width` a row: what torch does too, but at the speed of the memory.
void dense(const void *, const float *values, const int64_t *, const float *bias, int64_t rows, int64_t width,
           const float *x, float *y, int64_t inputs) {
    multiply(bias, rows, width, x, y, inputs, [=](int64_t row, const float *x) {
        const float *weights = values + row * width;
        float total = 0;
#pragma omp simd reduction(+ : total)
        for (int64_t i = 0; i < width; i++) total += weights[i] * x[i];
        return total;
    });
}
}
