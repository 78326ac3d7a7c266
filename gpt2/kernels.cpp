// What a training step on a CPU spends most of its time on beside matrix products: GELU and causal attention, forward
// and backward. Compiled on first use by gpt2/native.py; threads are those of torch's own OpenMP.
//
// Vectors are GCC's, 32 bytes wide, so the same source serves AVX2, AVX-512 and NEON, float and double.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#define INLINE inline __attribute__((always_inline))

template <typename T> struct Lanes;
template <> struct Lanes<float> { typedef float type __attribute__((vector_size(32), aligned(4))); };
template <> struct Lanes<double> { typedef double type __attribute__((vector_size(32), aligned(8))); };
template <typename T> using Vector = typename Lanes<T>::type;
typedef int32_t Integers __attribute__((vector_size(32)));

template <typename T> constexpr int64_t LANES = 32 / sizeof(T);
template <typename T> static INLINE Vector<T> load(const T *p) { return *(const Vector<T> *)p; }
template <typename T> static INLINE void store(T *p, Vector<T> v) { *(Vector<T> *)p = v; }
template <typename T> static INLINE Vector<T> spread(T x) { return x - Vector<T>{}; }  // 0 + x would be computed: -0
// As many of the `n` numbers from p on as a vector holds; the rest are zeros.
template <typename T> static INLINE Vector<T> load_some(const T *p, int64_t n) {
    if (n >= LANES<T>) return load(p);
    Vector<T> v{};
    std::memcpy(&v, p, n * sizeof(T));
    return v;
}
template <typename T> static INLINE void store_some(T *p, Vector<T> v, int64_t n) {
    if (n >= LANES<T>) return store(p, v);
    std::memcpy(p, &v, n * sizeof(T));
}
static INLINE int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// e^x = 2^n e^r with |r| <= ln(2) / 2, by the polynomial of Cephes' expf: within 2 units in the last place.
static INLINE Vector<float> exp_of(Vector<float> x) {
    auto tiny = x < -87.0f;  // the result is zero, not a denormal number, which would be slow
    x = tiny ? Vector<float>{} : x > 88.0f ? spread(88.0f) : x;
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
template <typename T> static void gelu(const T *x, T *y, T *slope, int64_t n) {
    const T c = 2 * 0.7978845608028654, a = 0.044715;
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < n; i += LANES<T>) {
        Vector<T> v = load_some(x + i, n - i), square = v * v;
        Vector<T> sigmoid = 1 / (1 + exp_of(-c * v * (1 + a * square))), out = v * sigmoid;
        store_some(y + i, out, n - i);
        if (slope) store_some(slope + i, sigmoid + out * (1 - sigmoid) * c * (1 + 3 * a * square), n - i);
    }
}

// ---- matrix products, small ones that stay in the cache ----

// The right-hand matrix lies in panels of PANEL columns, row after row in each.
template <typename T> constexpr int64_t PANEL = 2 * LANES<T>;
constexpr int64_t ROWS = 6;  // of a tile: with two vectors each, 12 sums in registers

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

// c = a b, or c += a b with ADD; panel: elements of a panel of b; rows a multiple of ROWS, columns of PANEL.
template <typename T, bool ADD>
static INLINE void product(Left<T> a, const T *b, int64_t panel, T *c, int64_t ldc, int64_t rows, int64_t columns,
                           int64_t depth) {
    for (int64_t j = 0; j < columns; j += PANEL<T>, b += panel)
        for (int64_t i = 0; i < rows; i += ROWS)
            tile<T, ADD>({a.at + i * a.row, a.row, a.column}, b, c + i * ldc + j, ldc, depth);
}

// ---- causal attention ----

constexpr int64_t BLOCK = 4 * ROWS;  // queries at a time: their scores of all keys before them stay in the cache

// A [time, width] matrix whose rows lie `stride` apart. Reading it asks for the next head's too, which lies beside.
template <typename T> struct Rows {
    const T *at;
    int64_t stride, time, width;
    const T *row(int64_t t) const {
        __builtin_prefetch(at + t * stride + width);
        return at + t * stride;
    }
};

template <typename T> static void copy(Rows<T> from, T *to, int64_t stride) {
    for (int64_t t = 0; t < from.time; t++) std::memcpy(to + t * stride, from.row(t), from.width * sizeof(T));
}

template <typename T> static void to_panels(Rows<T> from, T *to, int64_t panel) {
    for (int64_t t = 0; t < from.time; t++) {
        const T *row = from.row(t);
        for (int64_t d = 0; d < from.width; d += PANEL<T>)
            std::memcpy(to + d / PANEL<T> * panel + t * PANEL<T>, row + d,
                        std::min(PANEL<T>, from.width - d) * sizeof(T));
    }
}

template <typename T> static void transposed_to_panels(Rows<T> from, T *to) {
    for (int64_t t = 0; t < from.time; t++) {
        const T *row = from.row(t);
        T *column = to + t / PANEL<T> * PANEL<T> * from.width + t % PANEL<T>;
        for (int64_t d = 0; d < from.width; d++) column[d * PANEL<T>] = row[d];
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
    Rows<T> of(const T *tensor, int64_t head, int parts = 1, int part = 0) const {
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
    std::fill(scores + live, scores + end, -INFINITY);
    Vector<T> top = load(scores), total{};
    for (int64_t j = LANES<T>; j < end; j += LANES<T>) {
        Vector<T> x = load(scores + j);
        top = x > top ? x : top;
    }
    *highest = top[0];
    for (int l = 1; l < LANES<T>; l++) *highest = std::max(*highest, top[l]);
    for (int64_t j = 0; j < end; j += LANES<T>) {
        Vector<T> e = exp_of((load(scores + j) - *highest) * scale);
        total += e;
        store(scores + j, e);
    }
    std::fill(scores + live, scores + end, T(0));
    T sum = 0;
    for (int l = 0; l < LANES<T>; l++) sum += total[l];
    return sum;
}

// y = softmax(q k^T / sqrt(width)) v over the keys up to each query; lse: the logarithm of each softmax's divisor.
template <typename T> static void attention(const T *qkv, T *y, T *lse, Shape<T> s) {
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
                int64_t end = up(begin + BLOCK, PANEL<T>), rows = std::min(BLOCK, s.time - begin);
                product<T, false>({q + begin * s.columns, s.columns, 1}, k_t, PANEL<T> * s.width, scores, s.ld, BLOCK,
                                  end, s.width);
                T sums[BLOCK];
                for (int64_t i = 0; i < rows; i++) {
                    T highest;
                    sums[i] = exponentials(scores + i * s.ld, begin + i + 1, end, scale, &highest);
                    lse[head * s.time + begin + i] = highest * scale + std::log(sums[i]);
                }
                product<T, false>({scores, s.ld, 1}, v, s.panel, out, s.columns, BLOCK, s.columns, end);
                for (int64_t i = 0; i < rows; i++)
                    for (int64_t d = 0; d < s.width; d++)
                        y[s.offset(head, 1, 0) + (begin + i) * s.stride(1) + d] = out[i * s.columns + d] / sums[i];
            }
        }
    }
}

// The gradient of qkv where `grad` is that of y: the softmax is computed again from lse (Dao et al. 2022,
// "FlashAttention", arXiv:2205.14135, algorithm 4).
template <typename T>
static void attention_backward(const T *qkv, const T *y, const T *lse, const T *grad, T *grad_qkv, Shape<T> s) {
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
            Rows<T> its_y = s.of(y, head);
            for (int64_t begin = 0; begin < s.time; begin += BLOCK) {
                int64_t until = begin + BLOCK, end = up(until, PANEL<T>), ld = s.ld, rows = s.columns;
                product<T, false>({q + begin * rows, rows, 1}, k_t, PANEL<T> * s.width, weights, ld, BLOCK, end, s.width);
                product<T, false>({g + begin * rows, rows, 1}, v_t, PANEL<T> * s.width, grad_scores, ld, BLOCK, end,
                                  s.width);
                for (int64_t i = 0, t = begin; i < BLOCK; i++, t++) {
                    T *weight = weights + i * ld, *slope = grad_scores + i * ld, mean = 0;
                    int64_t live = t < s.time ? t + 1 : 0;
                    if (live) {
                        const T *of_y = its_y.row(t), of_sum = lse[head * s.time + t];
                        for (int64_t d = 0; d < s.width; d++) mean += g[t * rows + d] * of_y[d];
                        for (int64_t j = 0; j < live; j += LANES<T>) {
                            Vector<T> w = exp_of(load(weight + j) * scale - of_sum);
                            store(weight + j, w);
                            store(slope + j, w * (load(slope + j) - mean) * scale);
                        }
                    }
                    std::fill(weight + live, weight + end, T(0));
                    std::fill(slope + live, slope + end, T(0));
                }
                product<T, false>({grad_scores, ld, 1}, k, s.panel, grads + begin * rows, rows, BLOCK, rows, end);
                product<T, true>({grad_scores, 1, ld}, q_panels + begin * PANEL<T>, s.panel, grad_k, rows, until, rows, BLOCK);
                product<T, true>({weights, 1, ld}, g_panels + begin * PANEL<T>, s.panel, grad_v, rows, until, rows, BLOCK);
            }
            for (int part = 0; part < 3; part++)
                for (int64_t t = 0; t < s.time; t++)
                    std::memcpy(grad_qkv + s.offset(head, 3, part) + t * s.stride(3),
                                grads + part * s.size + t * s.columns, s.width * sizeof(T));
        }
    }
}

// ---- what Python calls ----

#define EXPORT(T)                                                                                                     \
    void gelu_##T(const T *x, T *y, T *slope, int64_t n) { gelu(x, y, slope, n); }                                    \
    void attention_##T(const T *qkv, T *y, T *lse, int64_t batch, int64_t time, int64_t heads, int64_t width) {       \
        attention(qkv, y, lse, Shape<T>{batch, time, heads, width});                                                  \
    }                                                                                                                 \
    void attention_backward_##T(const T *qkv, const T *y, const T *lse, const T *grad, T *grad_qkv, int64_t batch,    \
                                int64_t time, int64_t heads, int64_t width) {                                         \
        attention_backward(qkv, y, lse, grad, grad_qkv, Shape<T>{batch, time, heads, width});                         \
    }

extern "C" {
EXPORT(float)
EXPORT(double)
}
