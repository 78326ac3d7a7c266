// Keys, their counting and comparing on a CPU: to the bit what the torch operations of select.py give. Compiled on
// first use by native.py; threads are those of torch's own OpenMP.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <omp.h>
#include <vector>

namespace {

constexpr int32_t PRUNED = INT32_MIN, EXCLUDED = INT32_MAX;
constexpr int64_t BUCKETS = 1 << 16;
constexpr int64_t BLOCK = 64;        // keys that are looked at together
constexpr int64_t WORTH_IT = 1 << 15;  // numbers that are worth a second thread

inline int32_t key_of(float score) {
    float number = score + 0.0f;
    int32_t bits;
    std::memcpy(&bits, &number, sizeof bits);
    return std::clamp(bits ^ (bits >> 31 & INT32_MAX), PRUNED + 1, EXCLUDED - 1);
}

}  // namespace

extern "C" {

// The key of each of the n scores, PRUNED where the weight is zero.
void order_keys(const float *scores, const float *weights, int32_t *keys, int64_t n) {
#pragma omp parallel for simd schedule(static) if (n > WORTH_IT)
    for (int64_t i = 0; i < n; i++) keys[i] = weights[i] == 0 ? PRUNED : key_of(scores[i]);
}

// Adds to counts, of BUCKETS numbers, how many of the n keys are in each bucket.
void count_buckets(const int32_t *keys, int64_t *counts, int64_t n) {
    for (int64_t i = 0; i < n; i++) counts[(keys[i] >> 16) + BUCKETS / 2]++;
}

// Looks for keys in the window of `width` keys from `first` on: adds to *most how many of the n keys are not above it,
// raises *worst to the largest magnitude plus one, leaves how far those inside are from the first at the beginning of
// `inside`, which has room for n, and returns how many they are.
int64_t window(const int32_t *keys, int64_t first, int64_t width, int64_t *most, int64_t *worst, int32_t *inside,
               int64_t n) {
    const int32_t low = first, last = first + width - 1;
    const int64_t pieces = n > WORTH_IT ? omp_get_max_threads() : 1;
    const int64_t share = (n + pieces * BLOCK - 1) / (pieces * BLOCK) * BLOCK;
    std::vector<int64_t> counts(pieces);
    int64_t lower = 0, total = 0;
    int32_t highest = INT32_MIN;
#pragma omp parallel for schedule(static) reduction(+ : lower) reduction(max : highest) if (pieces > 1)
    for (int64_t piece = 0; piece < pieces; piece++) {
        const int64_t begin = std::min(n, piece * share), end = std::min(n, begin + share);
        int32_t *out = inside + begin;
        for (int64_t i = begin; i < end; i += BLOCK) {
            const int size = std::min(BLOCK, end - i);
            int32_t not_above = 0, hits = 0;
            for (int j = 0; j < size; j++) {
                const int32_t key = keys[i + j];
                not_above += key <= last;
                hits += key >= low && key <= last;
                highest = std::max(highest, (int32_t)((uint32_t)(key ^ key >> 31) + 1));
            }
            lower += not_above;
            for (int j = 0; hits && j < size; j++) {
                const int32_t key = keys[i + j];
                *out = (uint32_t)key - (uint32_t)low;
                out += key >= low && key <= last;
            }
        }
        counts[piece] = out - (inside + begin);
    }
    for (int64_t piece = 0; piece < pieces; piece++) {
        std::memmove(inside + total, inside + std::min(n, piece * share), counts[piece] * sizeof(int32_t));
        total += counts[piece];
    }
    *most += lower, *worst = std::max<int64_t>(*worst, highest);
    return total;
}

// How many of the n numbers are zero.
int64_t count_zeros(const float *numbers, int64_t n) {
    int64_t zeros = 0;
#pragma omp parallel for simd schedule(static) reduction(+ : zeros) if (n > WORTH_IT)
    for (int64_t i = 0; i < n; i++) zeros += numbers[i] == 0;
    return zeros;
}

// Sets live to whether each of the n scores reaches `at`; returns how many are equal to it at weights that are not
// zero.
int64_t divide(const float *scores, const float *weights, double at, float *live, int64_t n) {
    const float limit = at;
    int32_t ties = 0;
#pragma omp parallel for simd schedule(static) reduction(+ : ties) if (n > WORTH_IT)
    for (int64_t i = 0; i < n; i++) {
        ties += (scores[i] == limit) & (weights[i] != 0);
        live[i] = scores[i] >= limit ? 1.0f : 0.0f;
    }
    return ties;
}
}
