// What a training step on a CPU spends most of its time on beside matrix products: GELU, layer normalisation and causal
// attention, forward and backward, and the cross entropy of large vocabularies. Compiled on first use by
// pruning/native.py; threads are those of torch's own OpenMP.
//
// Vectors are GCC's, so the same source serves AVX2, AVX-512 and NEON. Tensors of S are read and written, float, double
// or bfloat16; what is computed is of T = Wide<S>, float for the last.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <omp.h>
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
typedef uint32_t UnalignedBits __attribute__((vector_size(BYTES), aligned(4), may_alias));
typedef uint16_t Halves __attribute__((vector_size(BYTES / 2), aligned(2), may_alias));

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

// ---- layer normalisation ----

template <typename T, typename Of> static INLINE T sum_over(const T *row, int64_t n, Of of) {
    Vector<T> total{};
    int64_t whole = n / LANES<T> * LANES<T>;
    for (int64_t j = 0; j < whole; j += LANES<T>) total += of(load(row + j));
    T sum = sum_of<T>(total);
    for (int64_t j = whole; j < n; j++) sum += of(row[j]);
    return sum;
}

// y = (x - mean) * inverse * weight + bias of each row, with the inverse of its standard deviation; bias may be null.
template <typename S>
static void layer_norm(S *y, const Wide<S> *x, const Wide<S> *weight, const Wide<S> *bias, Wide<S> *means,
                       Wide<S> *inverses, int64_t rows, int64_t width, double epsilon) {
    using T = Wide<S>;
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        const T *from = x + row * width;
        T mean = sum_over(from, width, [](auto v) { return v; }) / width;
        T variance = sum_over(from, width, [=](auto v) { return (v - mean) * (v - mean); }) / width;
        T inverse = 1 / std::sqrt(variance + (T)epsilon);
        means[row] = mean, inverses[row] = inverse;
        for (int64_t j = 0, n = width; j < width; j += LANES<T>, n -= LANES<T>) {
            Vector<T> out = (load_some(from + j, n) - mean) * inverse * load_some(weight + j, n);
            store_some(y + row * width + j, bias ? out + load_some(bias + j, n) : out, n);
        }
    }
}

// The gradients of x, and each thread's share of those of weight and bias, [threads, 2, width], which were zeros.
template <typename S>
static void layer_norm_backward(const S *grad, const Wide<S> *x, const Wide<S> *weight, const Wide<S> *means,
                                const Wide<S> *inverses, Wide<S> *grad_x, Wide<S> *shares, int64_t rows,
                                int64_t width, int64_t threads) {
    using T = Wide<S>;
#pragma omp parallel num_threads(threads)
    {
        T *of_weight = shares + 2 * omp_get_thread_num() * width, *of_bias = of_weight + width;
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row++) {
            const S *of_y = grad + row * width;
            const T *from = x + row * width, mean = means[row], inverse = inverses[row];
            Vector<T> total{}, along{};
            for (int64_t j = 0, n = width; j < width; j += LANES<T>, n -= LANES<T>) {
                Vector<T> g = load_some(of_y + j, n), normal = (load_some(from + j, n) - mean) * inverse;
                store_some(of_weight + j, load_some(of_weight + j, n) + g * normal, n);
                store_some(of_bias + j, load_some(of_bias + j, n) + g, n);
                g *= load_some(weight + j, n);
                total += g, along += g * normal;
            }
            T all = sum_of<T>(total) / width, slope = sum_of<T>(along) / width;
            for (int64_t j = 0, n = width; j < width; j += LANES<T>, n -= LANES<T>) {
                Vector<T> normal = (load_some(from + j, n) - mean) * inverse;
                Vector<T> g = load_some(of_y + j, n) * load_some(weight + j, n);
                store_some(grad_x + row * width + j, (g - all - normal * slope) * inverse, n);
            }
        }
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
        int64_t whole = columns / LANES<T> * LANES<T>;
        std::vector<T> memory(whole + LANES<T>);
        T *x = memory.data();
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row++) {
            S *place = logits + row * stride;
            T of_target, rest[LANES<T>];
            convert(place + targets[row], &of_target, 1);
            std::fill(rest, rest + LANES<T>, -INFINITY);
            convert(place + whole, rest, columns - whole);
            Vector<T> top = load(rest), total{};
            for (int64_t j = 0; j < whole; j += LANES<T>) top = load(place + j) > top ? load(place + j) : top;
            T highest = highest_of<T>(top);
            for (int64_t j = 0; j < columns; j += LANES<T>) {
                Vector<T> e = exp_of((j < whole ? load(place + j) : load(rest)) - highest);
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

// What they multiply: numbers of T, or, of bfloat16 where the processor has it, pairs of what follows each other in the
// depth of a product, both of which one instruction multiplies and adds.
template <typename S> struct Multiplied {
    typedef Wide<S> number, factor;
};
#ifdef __AVX512BF16__
struct __attribute__((may_alias)) Pair {
    uint32_t bits;  // the first number's are the lower ones
};
template <> struct Compute<Pair> { typedef float type; };
template <> struct Multiplied<bfloat16> {
    typedef bfloat16 number;
    typedef Pair factor;
};
static INLINE Bits load(const Pair *p) { return *(const UnalignedBits *)p; }
static INLINE Bits spread(Pair x) { return x.bits + Bits{}; }
static INLINE Vector<float> multiply_add(Bits a, Bits b, Vector<float> sum) {
    return (Vector<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}
static INLINE void store_joined(Pair *p, Vector<float> first, Vector<float> second) {
    Halves rounded[2];
    store((bfloat16 *)rounded, first), store((bfloat16 *)(rounded + 1), second);
    *(UnalignedBits *)p =
        __builtin_convertvector(rounded[0], Bits) | __builtin_convertvector(rounded[1], Bits) << 16;
}
#endif
template <typename T> static INLINE void store_joined(T *p, Vector<T> only, Vector<T>) { store(p, only); }
template <typename V> static INLINE V multiply_add(V a, V b, V sum) { return sum + a * b; }
template <typename S> using Number = typename Multiplied<S>::number;
template <typename S> using Factor = typename Multiplied<S>::factor;
template <typename S> constexpr int64_t EACH = sizeof(Factor<S>) / sizeof(Number<S>);  // numbers of a factor

// The right-hand matrix lies in panels of PANEL columns, row after row in each.
template <typename S> constexpr int64_t PANEL = 2 * LANES<S>;
constexpr int64_t ROWS = BYTES == 64 ? 8 : 6;  // of a tile: with two vectors each, 16 or 12 sums in registers

// A left-hand matrix: factor (i, k) is at[i * row + k * column].
template <typename F> struct Left {
    const F *at;
    int64_t row, column;
};

template <bool ADD, typename F>
static INLINE void tile(Left<F> a, const F *b, Wide<F> *c, int64_t ldc, int64_t depth) {
    using T = Wide<F>;
    Vector<T> sum[ROWS][2];
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < 2; j++) sum[i][j] = ADD ? load(c + i * ldc + j * LANES<T>) : Vector<T>{};
    for (int64_t k = 0; k < depth; k++) {
        auto left = load(b + k * PANEL<T>), right = load(b + k * PANEL<T> + LANES<T>);
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; i++) {
            auto v = spread(a.at[i * a.row + k * a.column]);
            sum[i][0] = multiply_add(v, left, sum[i][0]);
            sum[i][1] = multiply_add(v, right, sum[i][1]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < 2; j++) store(c + i * ldc + j * LANES<T>, sum[i][j]);
}

struct Range {
    int64_t from, to;
};

// c = a b, or c += a b with ADD; panel: factors of a panel of b; rows a multiple of ROWS, columns of PANEL.
// live(i, j): what counts of the depth in the tile of rows from i and columns from j on; where nothing does, c stays.
template <bool ADD, typename F, typename Live>
static INLINE void product(Left<F> a, const F *b, int64_t panel, Wide<F> *c, int64_t ldc, int64_t rows,
                           int64_t columns, Live live) {
    for (int64_t j = 0; j < columns; j += PANEL<F>, b += panel)
        for (int64_t i = 0; i < rows; i += ROWS) {
            auto [from, to] = live(i, j);
            if (from < to)
                tile<ADD, F>({a.at + i * a.row + from * a.column, a.row, a.column}, b + from * PANEL<F>,
                             c + i * ldc + j, ldc, to - from);
        }
}

// ---- causal attention ----

constexpr int64_t BLOCK = 4 * ROWS;  // queries at a time: their scores of all keys before them stay in the cache

// What counts of the depth, in factors, in the products of a block of queries from `begin` on: no query meets a later
// key.
template <typename S> static INLINE auto of_queries_and_keys(int64_t begin, int64_t width) {
    return [=](int64_t i, int64_t j) { return Range{0, j < begin + i + ROWS ? up(width, EACH<S>) / EACH<S> : 0}; };
}
template <typename S> static INLINE auto over_keys(int64_t begin) {
    return [=](int64_t i, int64_t) { return Range{0, (begin + i + ROWS) / EACH<S>}; };
}
template <typename S> static INLINE auto over_queries(int64_t begin, int64_t end) {
    return [=](int64_t i, int64_t) { return Range{(std::max(begin, i) - begin) / EACH<S>, (end - begin) / EACH<S>}; };
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

template <typename S> static void copy(Rows<S> from, Factor<S> *to, int64_t stride) {
    for (int64_t t = 0; t < from.time; t++) convert(from.row(t), (Number<S> *)(to + t * stride), from.width);
}

template <typename S> static void to_panels(Rows<S> from, Factor<S> *to, int64_t panel) {
    for (int64_t t = 0; t < from.time; t += EACH<S>, to += PANEL<S>) {
        const S *row = from.row(t), *next = t + EACH<S> - 1 < from.time ? from.row(t + EACH<S> - 1) : nullptr;
        for (int64_t d = 0; d < from.width; d += LANES<S>) {
            auto second = next ? load_some(next + d, from.width - d) : Vector<Wide<S>>{};
            store_joined(to + d / PANEL<S> * panel + d % PANEL<S>, load_some(row + d, from.width - d), second);
        }
    }
}

template <typename S> static void transposed_to_panels(Rows<S> from, Factor<S> *to) {
    const int64_t depth = up(from.width, EACH<S>);
    for (int64_t t = 0; t < from.time; t++) {
        const S *row = from.row(t);
        Factor<S> *column = to + t / PANEL<S> * PANEL<S> * (depth / EACH<S>) + t % PANEL<S>;
        for (int64_t d = 0; d < depth; d += LANES<S>) {
            Factor<S> some[LANES<S> / EACH<S>];
            store((Number<S> *)some, load_some(row + d, from.width - d));
            for (int64_t l = 0; l < std::min(LANES<S>, depth - d) / EACH<S>; l++)
                column[(d / EACH<S> + l) * PANEL<S>] = some[l];
        }
    }
}

// Where things lie: qkv is [batch, time, 3, heads, width], y [batch, time, heads, width], and a thread's own matrices
// have padded rows and columns, which stay zero; in those, strides count factors.
template <typename S> struct Shape {
    int64_t batch, time, heads, width;
    int64_t rows = up(up(time, BLOCK), PANEL<S>), columns = up(width, PANEL<S>);
    int64_t size = rows * columns, panel = rows * PANEL<S>, panel_t = up(width, EACH<S>) / EACH<S> * PANEL<S>;
    int64_t ld = rows + PANEL<S>;  // of scores: not a power of two, whose rows would share the cache's sets

    int64_t stride(int parts) const { return parts * heads * width; }
    int64_t offset(int64_t head, int parts, int part) const {
        return head / heads * time * stride(parts) + (part * heads + head % heads) * width;
    }
    Rows<S> of(const S *tensor, int64_t head, int parts = 1, int part = 0) const {
        return {tensor + offset(head, parts, part), stride(parts), time, width};
    }
};

template <typename T> struct Memory {
    std::vector<T> all;
    T *next;
    explicit Memory(int64_t size) : all(size + 64), next((T *)(((uintptr_t)all.data() + 63) & ~(uintptr_t)63)) {}
    template <typename E = T> E *take(int64_t size) { return (E *)((next += size) - size); }  // E: as large as T
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
template <typename S> static void attention(const S *qkv, S *y, Wide<S> *lse, Shape<S> s) {
    using T = Wide<S>;
    const T scale = 1 / std::sqrt((T)s.width);
#pragma omp parallel
    {
        Memory<T> memory(3 * s.size + BLOCK * (s.ld + s.columns));
        Factor<S> *of_inputs[3];
        for (auto &matrix : of_inputs) matrix = memory.template take<Factor<S>>(s.size);
        auto [q, k_t, v] = of_inputs;
        T *scores = memory.take(BLOCK * s.ld), *out = memory.take(BLOCK * s.columns);
#pragma omp for schedule(static)
        for (int64_t head = 0; head < s.batch * s.heads; head++) {
            copy(s.of(qkv, head, 3, 0), q, s.columns);
            transposed_to_panels(s.of(qkv, head, 3, 1), k_t);
            to_panels(s.of(qkv, head, 3, 2), v, s.panel);
            for (int64_t begin = 0; begin < s.time; begin += BLOCK) {
                int64_t rows = std::min(BLOCK, s.time - begin), padded = up(rows, ROWS), end = begin + padded;
                product<false>({q + begin * s.columns, s.columns, 1}, k_t, s.panel_t, scores, s.ld, padded,
                               up(end, PANEL<S>), of_queries_and_keys<S>(begin, s.width));
                T sums[BLOCK];
                for (int64_t i = 0; i < rows; i++) {
                    T highest, *row = scores + i * s.ld;
                    sums[i] = exponentials(row, begin + i + 1, end, scale, &highest);
                    lse[head * s.time + begin + i] = highest * scale + std::log(sums[i]);
                    if constexpr (EACH<S> > 1) convert(row, (Number<S> *)row, end);
                }
                product<false>({(Factor<S> *)scores, s.ld, 1}, v, s.panel, out, s.columns, padded, s.columns,
                               over_keys<S>(begin));
                for (int64_t i = 0; i < rows; i++) {
                    S *row = y + s.offset(head, 1, 0) + (begin + i) * s.stride(1);
                    for (int64_t d = 0; d < s.width; d += LANES<T>)
                        store_some(row + d, load(out + i * s.columns + d) / sums[i], s.width - d);
                }
            }
        }
    }
}

// Two rows of numbers, `ld` apart, become factors of what stands below each other, in place of the first.
template <typename S> static INLINE void join_rows(Wide<S> *row, int64_t ld, int64_t n) {
    for (int64_t j = 0; j < n; j += LANES<S>) store_joined((Factor<S> *)row + j, load(row + j), load(row + ld + j));
}

// The gradient of qkv where `grad` is that of y: the softmax is computed again from lse (Dao et al. 2022,
// "FlashAttention", arXiv:2205.14135, algorithm 4).
template <typename S>
static void attention_backward(const S *qkv, const S *y, const Wide<S> *lse, const S *grad, S *grad_qkv,
                               Shape<S> s) {
    using T = Wide<S>;
    const T scale = 1 / std::sqrt((T)s.width);
#pragma omp parallel
    {
        Memory<T> memory(10 * s.size + 3 * BLOCK * s.ld);
        Factor<S> *of_inputs[7];
        for (auto &matrix : of_inputs) matrix = memory.template take<Factor<S>>(s.size);
        auto [q, q_panels, k, k_t, v_t, g, g_panels] = of_inputs;
        T *grads = memory.take(3 * s.size), *grad_k = grads + s.size, *grad_v = grad_k + s.size;
        T *weights = memory.take(BLOCK * s.ld), *grad_scores = memory.take(BLOCK * s.ld);
        auto *weight_columns = (Factor<S> *)weights, *grad_columns = (Factor<S> *)grad_scores;
        auto *grad_rows = EACH<S> > 1 ? memory.template take<Factor<S>>(BLOCK * s.ld) : grad_columns;
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
                auto live_scores = of_queries_and_keys<S>(begin, s.width);
                product<false>({q + begin * columns, columns, 1}, k_t, s.panel_t, weights, s.ld, padded,
                               up(end, PANEL<S>), live_scores);
                product<false>({g + begin * columns, columns, 1}, v_t, s.panel_t, grad_scores, s.ld, padded,
                               up(end, PANEL<S>), live_scores);
                for (int64_t i = 0, t = begin; t < end; i++, t++) {
                    T *weight = weights + i * s.ld, *slope = grad_scores + i * s.ld;
                    int64_t live = t < s.time ? t + 1 : 0;
                    if (live) {
                        const S *of_y = its_y.row(t);
                        const T of_sum = lse[head * s.time + t];
                        Vector<T> products{};
                        for (int64_t d = 0; d < s.width; d += LANES<T>)
                            products += load((Number<S> *)(g + t * columns) + d) * load_some(of_y + d, s.width - d);
                        const T mean = sum_of<T>(products);
                        for (int64_t j = 0; j < live; j += LANES<T>) {
                            Vector<T> w = exp_of(load(weight + j) * scale - of_sum);
                            store(weight + j, w);
                            store(slope + j, w * (load(slope + j) - mean) * scale);
                        }
                    }
                    std::fill(weight + live, weight + end, T(0));
                    std::fill(slope + live, slope + end, T(0));
                    if constexpr (EACH<S> > 1) {
                        convert(slope, (Number<S> *)(grad_rows + i * s.ld), end);
                        if (i % 2) join_rows<S>(weight - s.ld, s.ld, end), join_rows<S>(slope - s.ld, s.ld, end);
                    }
                }
                int64_t below = EACH<S> * s.ld, first = begin / EACH<S> * PANEL<S>;
                auto live_queries = over_queries<S>(begin, end);
                product<false>({grad_rows, s.ld, 1}, k, s.panel, grads + begin * columns, columns, padded, columns,
                               over_keys<S>(begin));
                product<true>({grad_columns, 1, below}, q_panels + first, s.panel, grad_k, columns, end, columns,
                              live_queries);
                product<true>({weight_columns, 1, below}, g_panels + first, s.panel, grad_v, columns, end, columns,
                              live_queries);
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
    void layer_norm_##S(S *y, const Wide<S> *x, const Wide<S> *weight, const Wide<S> *bias, Wide<S> *means,           \
                        Wide<S> *inverses, int64_t rows, int64_t width, double epsilon) {                             \
        layer_norm(y, x, weight, bias, means, inverses, rows, width, epsilon);                                        \
    }                                                                                                                 \
    void layer_norm_backward_##S(const S *grad, const Wide<S> *x, const Wide<S> *weight, const Wide<S> *means,        \
                                 const Wide<S> *inverses, Wide<S> *grad_x, Wide<S> *shares, int64_t rows,             \
                                 int64_t width, int64_t threads) {                                                    \
        layer_norm_backward(grad, x, weight, means, inverses, grad_x, shares, rows, width, threads);                  \
    }                                                                                                                 \
    void cross_entropy_##S(S *logits, const int64_t *targets, const Wide<S> *shares, Wide<S> *losses, int64_t stride, \
                           int64_t rows, int64_t columns) {                                                           \
        cross_entropy(logits, targets, shares, losses, stride, rows, columns);                                        \
    }                                                                                                                 \
    void attention_##S(const S *qkv, S *y, Wide<S> *lse, int64_t batch, int64_t time, int64_t heads, int64_t width) { \
        attention(qkv, y, lse, Shape<S>{batch, time, heads, width});                                            \
    }                                                                                                                 \
    void attention_backward_##S(const S *qkv, const S *y, const Wide<S> *lse, const S *grad, S *grad_qkv,             \
                                int64_t batch, int64_t time, int64_t heads, int64_t width) {                          \
        attention_backward(qkv, y, lse, grad, grad_qkv, Shape<S>{batch, time, heads, width});                   \
    }

extern "C" {
EXPORT(float)
EXPORT(double)
EXPORT(bfloat16)
}
