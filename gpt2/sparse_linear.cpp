// y = W x + b for one vector x and a matrix W of which only the non-zero weights are stored, row after row.
// Compiled on first use by pruning/native.py; threads are those of torch's own OpenMP.

#include <cstdint>
#ifdef __AVX2__
#include <immintrin.h>
#endif

constexpr int64_t AHEAD = 1024;  // floats: a page, beyond which the processor does not ask for memory by itself

#ifdef __AVX2__
// For each byte of a mask: which of the next stored weights each of eight lanes takes; negative where it takes none.
struct Lanes {
    int8_t of[256][8];
    Lanes() {
        for (int byte = 0; byte < 256; byte++)
            for (int bit = 0, taken = 0; bit < 8; bit++) of[byte][bit] = byte >> bit & 1 ? taken++ : -128;
    }
};
static const Lanes lanes;

static inline __m256 spread(uint8_t byte, const float *values) {
    __m256i lane = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)lanes.of[byte]));
    __m256 taken = _mm256_permutevar8x32_ps(_mm256_loadu_ps(values), lane);
    return _mm256_blendv_ps(taken, _mm256_setzero_ps(), _mm256_castsi256_ps(lane));
}

static inline float sum(__m256 v) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

static inline float dot(const uint8_t *mask, const float *values, const float *x, int64_t bytes) {
    __m256 even = _mm256_setzero_ps(), odd = even;
    int64_t i = 0;
    for (; i + 2 <= bytes; i += 2) {
        __builtin_prefetch(values + AHEAD);
        even = _mm256_fmadd_ps(spread(mask[i], values), _mm256_loadu_ps(x + 8 * i), even);
        values += __builtin_popcount(mask[i]);
        odd = _mm256_fmadd_ps(spread(mask[i + 1], values), _mm256_loadu_ps(x + 8 * i + 8), odd);
        values += __builtin_popcount(mask[i + 1]);
    }
    if (i < bytes) even = _mm256_fmadd_ps(spread(mask[i], values), _mm256_loadu_ps(x + 8 * i), even);
    return sum(_mm256_add_ps(even, odd));
}
#else
static inline float dot(const uint8_t *mask, const float *values, const float *x, int64_t bytes) {
    float total = 0;
    for (int64_t i = 0; i < bytes; i++)
        for (unsigned byte = mask[i]; byte; byte &= byte - 1) total += *values++ * x[8 * i + __builtin_ctz(byte)];
    return total;
}
#endif

// mask: a bit a weight, `bytes` bytes a row; values: the non-zero ones, with eight floats to spare behind the last;
// starts: where each row's begin.
extern "C" void bitmask(const uint8_t *mask, const float *values, const int64_t *starts, const float *x,
                        const float *bias, float *y, int64_t rows, int64_t bytes) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; row++)
        y[row] = dot(mask + row * bytes, values + starts[row], x, bytes) + (bias ? bias[row] : 0.0f);
}

// columns: the column of each of `values`; starts: where each row's begin, and one more: where the last row's end.
extern "C" void columns(const uint16_t *columns, const float *values, const int64_t *starts, const float *x,
                        const float *bias, float *y, int64_t rows, int64_t) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        float a = 0, b = 0, c = 0, d = 0;
        int64_t i = starts[row], end = starts[row + 1];
        for (; i + 4 <= end; i += 4) {
            __builtin_prefetch(values + i + AHEAD), __builtin_prefetch(columns + i + AHEAD);
            a += values[i] * x[columns[i]];
            b += values[i + 1] * x[columns[i + 1]];
            c += values[i + 2] * x[columns[i + 2]];
            d += values[i + 3] * x[columns[i + 3]];
        }
        for (; i < end; i++) a += values[i] * x[columns[i]];
        y[row] = (a + b) + (c + d) + (bias ? bias[row] : 0.0f);
    }
}

// weights: all of them, `width` a row: what torch does too, but at the speed of the memory.
extern "C" void dense(const void *, const float *weights, const int64_t *, const float *x, const float *bias, float *y,
                      int64_t rows, int64_t width) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        const float *w = weights + row * width;
        float total = 0;
#pragma omp simd reduction(+ : total)
        for (int64_t i = 0; i < width; i++) total += w[i] * x[i];
        y[row] = total + (bias ? bias[row] : 0.0f);
    }
}
