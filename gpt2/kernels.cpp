// What a training step on a CPU spends most of its time on beside matrix products: GELU and causal attention, forward
// and backward, and the cross entropy of large vocabularies. Compiled on first use by gpt2/native.py; threads are those
// of torch's own OpenMP.
//
// Vectors are GCC's, so the same source serves AVX2, AVX-512 and NEON. Tensors of S are read and written, float, double
// or bfloat16; what is computed is of T = Wide<S>, float for the last.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#ifdef __AVX512F__
#define BYTES 64  // of a vector
#else
#define BYTES 32
#endif
#define INLINE inline __attribute__((always_inline))

template <typename T> struct Lanes;
template <> struct Lanes<float> { typedef float type __attribute__((vector_size(BYTES), aligned(4))); };
template <> struct Lanes<double> { typedef double type __attribute__((vector_size(BYTES), aligned(8))); };
template <typename T> using Vector = typename Lanes<T>::type;
typedef int32_t Integers __attribute__((vector_size(BYTES)));
typedef uint32_t Bits __attribute__((vector_size(BYTES)));
typedef uint16_t Halves __attribute__((vector_size(BYTES / 2), aligned(2)));

struct bfloat16 {  // the higher half of a float's bits
    uint16_t bits;
};
template <typename S> struct Compute { typedef S type; };
template <> struct Compute<bfloat16> { typedef float type; };
template <typename S> using Wide = typename Compute<S>::type;

template <typename S> constexpr int64_t LANES = BYTES / sizeof(Wide<S>);
template <typename T> static INLINE Vector<T> load(const T *p) { return *(const Vector<T> *)p; }
template <typename T> static INLINE void store(T *p, Vector<T> v) { *(Vector<T> *)p = v; }
static INLINE Vector<float> load(const bfloat16 *p) {
    return (Vector<float>)(__builtin_convertvector(*(const Halves *)p, Bits) << 16);
}
static INLINE void store(bfloat16 *p, Vector<float> v) {  // rounded to even
#ifdef __AVX512BF16__
    *(Halves *)p = (Halves)_mm512_cvtneps_pbh((__m512)v);  // denormal numbers are zeros to it
#else
    Bits all = (Bits)v, rounded = (all + 0x7fff + (all >> 16 & 1)) >> 16;
    *(Halves *)p = __builtin_convertvector(v == v ? rounded : Bits{} + 0x7fc0, Halves);
#endif
}
template <typename T> static INLINE Vector<T> spread(T x) { return x - Vector<T>{}; }  // 0 + x would be computed: -0
// As many of the `n` numbers from p on as a vector holds; the rest are zeros.
template <typename S> static INLINE Vector<Wide<S>> load_some(const S *p, int64_t n) {
    if (n >= LANES<S>) return load(p);
    S some[LANES<S>]{};
    std::memcpy(some, p, n * sizeof(S));
    return load(some);
}
template <typename S> static INLINE void store_some(S *p, Vector<Wide<S>> v, int64_t n) {
    if (n >= LANES<S>) return store(p, v);
    S some[LANES<S>];
    store(some, v);
    std::memcpy(p, some, n * sizeof(S));
}
template <typename From, typename To> static INLINE void convert(const From *from, To *to, int64_t n) {
    for (int64_t i = 0; i < n; i += LANES<To>) store_some(to + i, load_some(from + i, n - i), n - i);
}
template <typename T> static INLINE T sum_of(Vector<T> v) {
    T sum = 0;
    for (int l = 0; l < LANES<T>; l++) sum += v[l];
    return sum;
}
template <typename T> static INLINE T highest_of(Vector<T> v) {
    T highest = v[0];
    for (int l = 1; l < LANES<T>; l++) highest = std::max(highest, v[l]);
    return highest;
}
static INLINE int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// e^x = 2^n e^r with |r| <= ln(2) / 2, by the polynomial of Cephes' expf: within 2 units in the last place. x <= 88.
static INLINE Vector<float> exp_of(Vector<float> x) {
    auto tiny = x < -87.0f;  // the result is zero, not a denormal number, which would be slow
    Vector<float> shifted = x * 1.44269504088896341f + 12582912.0f;  // n in the lowest bits
    Vector<float> n = shifted - 12582912.0f;
    Vector<float> r = x - n * 0.693359375f - n * -2.12194440e-4f;
    Vector<float> p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    p = p * (Vector<float>)(((Integers)shifted << 23) + 0x3f800000);  // a product, so that NaN stays NaN
    return tiny ? Vector<float>{} : p;
}

static INLINE Vector<double> exp_of(Vector<double> x) {
    for (int i = 0; i < LANES<double>; i++) x[i] = std::exp(x[i]);
    return x;
}

// ---- GELU ----

// y = x sigmoid(2c (x + a x^3)), which is GELU's tanh form, and slope = dy/dx; slope may be null.
template <typename S> static void gelu(const S *x, S *y, S *slope, int64_t n) {
    using T = Wide<S>;
    const T c = 2 * 0.7978845608028654, a = 0.044715;
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < n; i += LANES<T>) {
        Vector<T> v = load_some(x + i, n - i), square = v * v;
        Vector<T> exponent = -c * v * (1 + a * square);
        Vector<T> sigmoid = 1 / (1 + exp_of(exponent > 88 ? spread<T>(88) : exponent)), out = v * sigmoid;
        store_some(y + i, out, n - i);
        if (slope) store_some(slope + i, sigmoid + out * (1 - sigmoid) * c * (1 + 3 * a * square), n - i);
    }
}

// ---- cross entropy ----

// losses of rows of logits, which lie `stride` apart, and in the logits' place the gradient of their sum weighted by
// `shares`: (softmax - 1 at the target) * share.
template <typename S>
static void cross_entropy(S *logits, const int64_t *targets, const Wide<S> *shares, Wide<S> *losses, int64_t stride,
                          int64_t rows, int64_t columns) {
    using T = Wide<S>;
#pragma omp parallel
    {
        int64_t end = up(columns, LANES<T>);
        std::vector<T> memory(end);
        T *x = memory.data();
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row++) {
            S *place = logits + row * stride;
            convert(place, x, columns);
            std::fill(x + columns, x + end, -INFINITY);
            Vector<T> top = load(x), total{};
            for (int64_t j = LANES<T>; j < end; j += LANES<T>) top = load(x + j) > top ? load(x + j) : top;
            T highest = highest_of<T>(top), of_target = x[targets[row]];
            for (int64_t j = 0; j < end; j += LANES<T>) {
                Vector<T> e = exp_of(load(x + j) - highest);
                total += e;
                store(x + j, e);
            }
            T sum = sum_of<T>(total), share = shares[row];
            losses[row] = std::log(sum) + highest - of_target;
            T own = (x[targets[row]] / sum - 1) * share;
            for (int64_t j = 0; j < columns; j += LANES<T>)
                store_some(place + j, load(x + j) * (share / sum), columns - j);
            convert(&own, place + targets[row], 1);
        }
    }
}

// ---- matrix products, small ones that stay in the cache ----

// The right-hand matrix lies in panels of PANEL columns, row after row in each.
template <typename S> constexpr int64_t PANEL = 2 * LANES<S>;
constexpr int64_t ROWS = BYTES == 64 ? 8 : 6;  // of a tile: with two vectors each, 16 or 12 sums in registers

// A left-hand matrix: element (i, k) is at[i * row + k * column].
template <typename T> struct Left {
    const T *at;
    int64_t row, column;
};

template <typename T, bool ADD>
static INLINE void tile(Left<T> a, const T *b, T *c, int64_t ldc, int64_t depth) {
    Vector<T> sum[ROWS][2];
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < 2; j++) sum[i][j] = ADD ? load(c + i * ldc + j * LANES<T>) : Vector<T>{};
    for (int64_t k = 0; k < depth; k++) {
        Vector<T> left = load(b + k * PANEL<T>), right = load(b + k * PANEL<T> + LANES<T>);
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; i++) {
            Vector<T> v = spread(a.at[i * a.row + k * a.column]);
            sum[i][0] += v * left;
            sum[i][1] += v * right;
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < 2; j++) store(c + i * ldc + j * LANES<T>, sum[i][j]);
}

struct Range {
    int64_t from, to;
};

// c = a b, or c += a b with ADD; panel: elements of a panel of b; rows a multiple of ROWS, columns of PANEL.
// live(i, j): what counts of the depth in the tile of rows from i and columns from j on; where nothing does, c stays.
template <typename T, bool ADD, typename Live>
static INLINE void product(Left<T> a, const T *b, int64_t panel, T *c, int64_t ldc, int64_t rows, int64_t columns,
                           Live live) {
    for (int64_t j = 0; j < columns; j += PANEL<T>, b += panel)
        for (int64_t i = 0; i < rows; i += ROWS) {
            auto [from, to] = live(i, j);
            if (from < to)
                tile<T, ADD>({a.at + i * a.row + from * a.column, a.row, a.column}, b + from * PANEL<T>,
                             c + i * ldc + j, ldc, to - from);
        }
}

// ---- causal attention ----

constexpr int64_t BLOCK = 4 * ROWS;  // queries at a time: their scores of all keys before them stay in the cache

// What counts in the products of a block of queries from `begin` on: no query meets a later key.
static INLINE auto of_queries_and_keys(int64_t begin, int64_t width) {
    return [=](int64_t i, int64_t j) { return Range{0, j < begin + i + ROWS ? width : 0}; };
}
static INLINE auto over_keys(int64_t begin) {
    return [=](int64_t i, int64_t) { return Range{0, begin + i + ROWS}; };
}
static INLINE auto over_queries(int64_t begin, int64_t end) {
    return [=](int64_t i, int64_t) { return Range{std::max(begin, i) - begin, end - begin}; };
}

// A [time, width] matrix whose rows lie `stride` apart, too far for the processor to see what comes next.
template <typename S> struct Rows {
    const S *at;
    int64_t stride, time, width;
    const S *row(int64_t t) const {
        for (int64_t d = 0; d < width; d += 64 / (int64_t)sizeof(S)) __builtin_prefetch(at + (t + 16) * stride + d);
        return at + t * stride;
    }
};

template <typename S> static void copy(Rows<S> from, Wide<S> *to, int64_t stride) {
    for (int64_t t = 0; t < from.time; t++) convert(from.row(t), to + t * stride, from.width);
}

template <typename S> static void to_panels(Rows<S> from, Wide<S> *to, int64_t panel) {
    for (int64_t t = 0; t < from.time; t++) {
        const S *row = from.row(t);
        for (int64_t d = 0; d < from.width; d += PANEL<S>)
            convert(row + d, to + d / PANEL<S> * panel + t * PANEL<S>, std::min(PANEL<S>, from.width - d));
    }
}

template <typename S> static void transposed_to_panels(Rows<S> from, Wide<S> *to) {
    for (int64_t t = 0; t < from.time; t++) {
        const S *row = from.row(t);
        Wide<S> *column = to + t / PANEL<S> * PANEL<S> * from.width + t % PANEL<S>;
        for (int64_t d = 0; d < from.width; d += LANES<S>) {
            Vector<Wide<S>> some = load_some(row + d, from.width - d);
            for (int64_t l = 0; l < std::min(LANES<S>, from.width - d); l++) column[(d + l) * PANEL<S>] = some[l];
        }
    }
}

// Where things lie: qkv is [batch, time, 3, heads, width], y [batch, time, heads, width], and a thread's own matrices
// have padded rows and columns, which stay zero.
template <typename T> struct Shape {
    int64_t batch, time, heads, width;
    int64_t rows = up(up(time, BLOCK), PANEL<T>), columns = up(width, PANEL<T>);
    int64_t size = rows * columns, panel = rows * PANEL<T>;
    int64_t ld = rows + PANEL<T>;  // of scores: not a power of two, whose rows would share the cache's sets

    int64_t stride(int parts) const { return parts * heads * width; }
    int64_t offset(int64_t head, int parts, int part) const {
        return head / heads * time * stride(parts) + (part * heads + head % heads) * width;
    }
    template <typename S> Rows<S> of(const S *tensor, int64_t head, int parts = 1, int part = 0) const {
        return {tensor + offset(head, parts, part), stride(parts), time, width};
    }
};

template <typename T> struct Memory {
    std::vector<T> all;
    T *next;
    explicit Memory(int64_t size) : all(size + 64), next((T *)(((uintptr_t)all.data() + 63) & ~(uintptr_t)63)) {}
    T *take(int64_t size) { return (next += size) - size; }
};

// Softmax of scores[0 .. live), times the sum, which is returned; zeros from there to `end`. highest: of the scores.
template <typename T> static INLINE T exponentials(T *scores, int64_t live, int64_t end, T scale, T *highest) {
    std::fill(scores + live, scores + up(live, LANES<T>), -INFINITY);
    Vector<T> top = load(scores), total{};
    for (int64_t j = LANES<T>; j < live; j += LANES<T>) {
        Vector<T> x = load(scores + j);
        top = x > top ? x : top;
    }
    *highest = highest_of<T>(top);
    for (int64_t j = 0; j < live; j += LANES<T>) {
        Vector<T> e = exp_of((load(scores + j) - *highest) * scale);
        total += e;
        store(scores + j, e);
    }
    std::fill(scores + live, scores + end, T(0));
    return sum_of<T>(total);
}

// y = softmax(q k^T / sqrt(width)) v over the keys up to each query; lse: the logarithm of each softmax's divisor.
template <typename S> static void attention(const S *qkv, S *y, Wide<S> *lse, Shape<Wide<S>> s) {
    using T = Wide<S>;
    const T scale = 1 / std::sqrt((T)s.width);
#pragma omp parallel
    {
        Memory<T> memory(3 * s.size + BLOCK * (s.ld + s.columns));
        T *q = memory.take(s.size), *k_t = memory.take(s.size), *v = memory.take(s.size);
        T *scores = memory.take(BLOCK * s.ld), *out = memory.take(BLOCK * s.columns);
#pragma omp for schedule(static)
        for (int64_t head = 0; head < s.batch * s.heads; head++) {
            copy(s.of(qkv, head, 3, 0), q, s.columns);
            transposed_to_panels(s.of(qkv, head, 3, 1), k_t);
            to_panels(s.of(qkv, head, 3, 2), v, s.panel);
            for (int64_t begin = 0; begin < s.time; begin += BLOCK) {
                int64_t rows = std::min(BLOCK, s.time - begin), padded = up(rows, ROWS), end = begin + padded;
                product<T, false>({q + begin * s.columns, s.columns, 1}, k_t, PANEL<T> * s.width, scores, s.ld, padded,
                                  up(end, PANEL<T>), of_queries_and_keys(begin, s.width));
                T sums[BLOCK];
                for (int64_t i = 0; i < rows; i++) {
                    T highest;
                    sums[i] = exponentials(scores + i * s.ld, begin + i + 1, end, scale, &highest);
                    lse[head * s.time + begin + i] = highest * scale + std::log(sums[i]);
                }
                product<T, false>({scores, s.ld, 1}, v, s.panel, out, s.columns, padded, s.columns, over_keys(begin));
                for (int64_t i = 0; i < rows; i++) {
                    S *row = y + s.offset(head, 1, 0) + (begin + i) * s.stride(1);
                    for (int64_t d = 0; d < s.width; d += LANES<T>)
                        store_some(row + d, load(out + i * s.columns + d) / sums[i], s.width - d);
                }
            }
        }
    }
}

// The gradient of qkv where `grad` is that of y: the softmax is computed again from lse (Dao et al. 2022,
// "FlashAttention", arXiv:2205.14135, algorithm 4).
template <typename S>
static void attention_backward(const S *qkv, const S *y, const Wide<S> *lse, const S *grad, S *grad_qkv,
                               Shape<Wide<S>> s) {
    using T = Wide<S>;
    const T scale = 1 / std::sqrt((T)s.width);
#pragma omp parallel
    {
        Memory<T> memory(10 * s.size + 2 * BLOCK * s.ld);
        T *q = memory.take(s.size), *q_panels = memory.take(s.size), *k = memory.take(s.size);
        T *k_t = memory.take(s.size), *v_t = memory.take(s.size);
        T *g = memory.take(s.size), *g_panels = memory.take(s.size);
        T *grads = memory.take(3 * s.size), *grad_k = grads + s.size, *grad_v = grad_k + s.size;
        T *weights = memory.take(BLOCK * s.ld), *grad_scores = memory.take(BLOCK * s.ld);
#pragma omp for schedule(static)
        for (int64_t head = 0; head < s.batch * s.heads; head++) {
            copy(s.of(qkv, head, 3, 0), q, s.columns);
            to_panels(s.of(qkv, head, 3, 0), q_panels, s.panel);
            to_panels(s.of(qkv, head, 3, 1), k, s.panel);
            transposed_to_panels(s.of(qkv, head, 3, 1), k_t);
            transposed_to_panels(s.of(qkv, head, 3, 2), v_t);
            copy(s.of(grad, head), g, s.columns);
            to_panels(s.of(grad, head), g_panels, s.panel);
            std::fill(grad_k, grad_k + 2 * s.size, T(0));
            Rows<S> its_y = s.of(y, head);
            for (int64_t begin = 0; begin < s.time; begin += BLOCK) {
                int64_t end = std::min(begin + BLOCK, up(s.time, ROWS)), padded = end - begin, columns = s.columns;
                product<T, false>({q + begin * columns, columns, 1}, k_t, PANEL<T> * s.width, weights, s.ld, padded,
                                  up(end, PANEL<T>), of_queries_and_keys(begin, s.width));
                product<T, false>({g + begin * columns, columns, 1}, v_t, PANEL<T> * s.width, grad_scores, s.ld, padded,
                                  up(end, PANEL<T>), of_queries_and_keys(begin, s.width));
                for (int64_t i = 0, t = begin; t < end; i++, t++) {
                    T *weight = weights + i * s.ld, *slope = grad_scores + i * s.ld;
                    int64_t live = t < s.time ? t + 1 : 0;
                    if (live) {
                        const S *of_y = its_y.row(t);
                        const T of_sum = lse[head * s.time + t];
                        Vector<T> products{};
                        for (int64_t d = 0; d < s.width; d += LANES<T>)
                            products += load(g + t * columns + d) * load_some(of_y + d, s.width - d);
                        const T mean = sum_of<T>(products);
                        for (int64_t j = 0; j < live; j += LANES<T>) {
                            Vector<T> w = exp_of(load(weight + j) * scale - of_sum);
                            store(weight + j, w);
                            store(slope + j, w * (load(slope + j) - mean) * scale);
                        }
                    }
                    std::fill(weight + live, weight + end, T(0));
                    std::fill(slope + live, slope + end, T(0));
                }
                product<T, false>({grad_scores, s.ld, 1}, k, s.panel, grads + begin * columns, columns, padded, columns,
                                  over_keys(begin));
                product<T, true>({grad_scores, 1, s.ld}, q_panels + begin * PANEL<T>, s.panel, grad_k, columns, end,
                                 columns, over_queries(begin, end));
                product<T, true>({weights, 1, s.ld}, g_panels + begin * PANEL<T>, s.panel, grad_v, columns, end,
                                 columns, over_queries(begin, end));
            }
            for (int part = 0; part < 3; part++)
                for (int64_t t = 0; t < s.time; t++)
                    convert(grads + part * s.size + t * s.columns,
                            grad_qkv + s.offset(head, 3, part) + t * s.stride(3), s.width);
        }
    }
}

// ---- what Python calls ----

#define EXPORT(S)                                                                                                     \
    void gelu_##S(const S *x, S *y, S *slope, int64_t n) { gelu(x, y, slope, n); }                                    \
    void cross_entropy_##S(S *logits, const int64_t *targets, const Wide<S> *shares, Wide<S> *losses, int64_t stride, \
                           int64_t rows, int64_t columns) {                                                           \
        cross_entropy(logits, targets, shares, losses, stride, rows, columns);                                        \
    }                                                                                                                 \
    void attention_##S(const S *qkv, S *y, Wide<S> *lse, int64_t batch, int64_t time, int64_t heads, int64_t width) { \
        attention(qkv, y, lse, Shape<Wide<S>>{batch, time, heads, width});                                            \
    }                                                                                                                 \
    void attention_backward_##S(const S *qkv, const S *y, const Wide<S> *lse, const S *grad, S *grad_qkv,             \
                                int64_t batch, int64_t time, int64_t heads, int64_t width) {                          \
        attention_backward(qkv, y, lse, grad, grad_qkv, Shape<Wide<S>>{batch, time, heads, width});                   \
    }

extern "C" {
EXPORT(float)
EXPORT(double)
EXPORT(bfloat16)
}
