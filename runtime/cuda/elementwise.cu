// What is done to the rows of single tokens: embedding, norms, rounding, rope, sums.
// In all kernels `counts` points at the number of tokens: Step.counts, or, where the tokens are
// those whose logits are wanted, its second number. The grid may have more tokens than there are.
#include "formats.cuh"
#include "pack.cuh"
#include "rope.cuh"

struct embed_args {
    const int* counts;
    const int* tokens;     // [n_tok]
    const int* positions;  // [n_tok]
    Matrix embd;           // [n_vocab][n_embd]
    const float* table;    // [positions + offset][n_embd], learned positions; or null
    int offset;            // the table's row of position 0
    float* x;              // [n_tok][n_embd]
};

// x[t] = embd[tokens[t]] + table[positions[t] + offset]
// Bytes: one row of embd (and of the table), 4 * n_embd written.
//
// launch: grid (ceil(n_embd / 1024), n_tok), block 256
template <class F> __device__ inline void embed(const embed_args& p) {
    constexpr int VECTOR = F::UNIT / F::VECTORS;  // weights in columns that follow each other
    const int t = blockIdx.y, n = p.embd.cols;
    after_predecessors();
    if (t >= p.counts[0]) return;
    const float* table =
        p.table ? p.table + (long long)(p.positions[t] + p.offset) * n : nullptr;
    float* x = p.x + (long long)t * n;
    for (int unit = blockIdx.x * 256 + threadIdx.x; unit < units<F>(n); unit += gridDim.x * 256) {
        float row[F::UNIT];
        Meet<F>::floats(F::load(p.embd, p.tokens[t], unit), row);
#pragma unroll
        for (int e = 0; e < F::UNIT; e++) {
            const int col = F::column(unit, e / VECTOR) + e % VECTOR;
            if (col < n) x[col] = table ? row[e] + table[col] : row[e];
        }
    }
}

#define EMBED(suffix, F)                                                                           \
    extern "C" __global__ void __launch_bounds__(256) embed_##suffix(const embed_args p) {         \
        embed<F>(p);                                                                               \
    }
EMBED(q4_0, Q4_0)
EMBED(q8_0, Q8_0)
EMBED(q6_k, Q6_K)
EMBED(f16, F16)
EMBED(f32, F32)

struct norm_rows_args {
    const int* counts;
    const int* index;     // [n_tok] rows of x, such as Step.outputs; null: token t reads row t
    const float* x;       // [rows][n]
    const float* weight;  // [n]
    const float* bias;    // [n] or null
    int n;
    int is_layer;         // layer norm, else RMS norm
    float eps;
    float* h;             // [n_tok][n]
    float* host_h;        // the same, for the CPU; null if not wanted
    Packed packed;        // [n_tok][n]; null if not wanted; n % 32 == 0
};

constexpr int NORM_THREADS = 1024;
constexpr int AT_ONCE = 4 * NORM_THREADS;  // columns

// Columns i to i + 3 of a row of n; 0 beyond it. IS_WHOLE: n % 4 == 0.
template <bool IS_WHOLE>
__device__ inline void load_four(const float* row, int i, int n, float (&out)[4]) {
    if (IS_WHOLE) {
        const float4 x = i < n ? *(const float4*)(row + i) : make_float4(0, 0, 0, 0);
        out[0] = x.x, out[1] = x.y, out[2] = x.z, out[3] = x.w;
    } else {
#pragma unroll
        for (int j = 0; j < 4; j++) out[j] = i + j < n ? row[i + j] : 0;
    }
}

// Of a row the first PARTS * 4096 columns are read once, and together. What is beyond them, in a
// row that is not whole, is read each time again.
template <int PARTS, bool IS_WHOLE> __device__ inline void norm_row(const norm_rows_args& p) {
    struct Four {
        float x[4], weight[4], bias[4];
    };
    constexpr bool IS_TOGETHER = PARTS <= 2;  // else there are no registers for the weights
    const int t = blockIdx.x, n = p.n, own = 4 * threadIdx.x;
    const auto load_weights = [&](int i, Four& four) {
        load_four<IS_WHOLE>(p.weight, i, n, four.weight);
        load_four<IS_WHOLE>(p.bias, i, p.bias ? n : 0, four.bias);
    };
    Four fours[PARTS];
#pragma unroll
    for (int k = 0; k < PARTS; k++) {
        if (IS_TOGETHER) load_weights(k * AT_ONCE + own, fours[k]);
    }
    after_predecessors();
    // x where its row is t does not wait for what says whether there is a token t.
    const bool is_there = t < p.counts[0];
    int row = t;
    if (p.index) {
        if (!is_there) return;
        row = p.index[t];
    }
    const float* x = p.x + (long long)row * n;
#pragma unroll
    for (int k = 0; k < PARTS; k++) {
        load_four<IS_WHOLE>(x, k * AT_ONCE + own, n, fours[k].x);
    }
    // f(i, columns i to i + 3) for all that are this thread's; the lanes of a warp keep together.
    const auto each = [&](auto f) {
#pragma unroll
        for (int k = 0; k < PARTS; k++) {
            if (!IS_TOGETHER) load_weights(k * AT_ONCE + own, fours[k]);
            f(k * AT_ONCE + own, fours[k]);
        }
        if (IS_WHOLE) return;
        for (int i = PARTS * AT_ONCE + own; i - 4 * lane_id() < n; i += AT_ONCE) {
            Four four;
            load_weights(i, four);
            load_four<IS_WHOLE>(x, i, n, four.x);
            f(i, four);
        }
    };
    float mean = 0;
    if (p.is_layer) {
        float sum = 0;
        each([&](int, const Four& four) {
#pragma unroll
            for (int j = 0; j < 4; j++) sum += four.x[j];
        });
        mean = block_sum<NORM_THREADS>(sum) / n;
    }
    float squares = 0;
    each([&](int i, const Four& four) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const float centred = i + j < n ? four.x[j] - mean : 0;
            squares = fmaf(centred, centred, squares);
        }
    });
    const float scale = 1 / sqrtf(block_sum<NORM_THREADS>(squares) / n + p.eps);
    const long long at = (long long)t * n;
    each([&](int i, const Four& four) {
        float y[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const bool is_any = is_there && i + j < n;
            y[j] = is_any ? (four.x[j] - mean) * scale * four.weight[j] + four.bias[j] : 0;
            if (!IS_WHOLE && is_any) p.h[at + i + j] = y[j];
            if (!IS_WHOLE && is_any && p.host_h) p.host_h[at + i + j] = y[j];
        }
        const bool is_any = is_there && i < n;
        if (IS_WHOLE && is_any) {
            const float4 all = make_float4(y[0], y[1], y[2], y[3]);
            *(float4*)(p.h + at + i) = all;
            if (p.host_h) *(float4*)(p.host_h + at + i) = all;
        }
        if (p.packed.q) pack_block(y, p.packed, (at + i) / QK, is_any);
    });
}

// h[t] = (x - m) / sqrt(mean((x - m)^2) + eps) * weight + bias, x = x[index[t]], m its mean or 0
// (layer norm, arXiv 1607.06450; RMS norm, arXiv 1910.07467), and the same packed.
// Bytes: 8 * n read, with a bias 12 * n; 5.25 * n written. For one token that is little, and the
// time that of loads that wait for each other: all are made at once.
//
// launch: grid n_tok, block 1024
extern "C" __global__ void __launch_bounds__(1024, 1) norm_rows(const norm_rows_args p) {
    if (p.n % 4 || p.n > 4 * AT_ONCE) {
        norm_row<1, false>(p);
    } else if (p.n <= AT_ONCE) {
        norm_row<1, true>(p);
    } else if (p.n <= 2 * AT_ONCE) {
        norm_row<2, true>(p);
    } else {
        norm_row<4, true>(p);
    }
}

struct pack_args {
    const int* counts;
    const float* x;  // [n_tok][cols]
    int cols;        // a multiple of 32
    Packed packed;   // [n_tok][cols]
};

// packed = x, rounded to int8.   Bytes: 4 * cols read, 1.25 * cols written a token.
//
// launch: grid (ceil(cols / 256), n_tok), block 256
extern "C" __global__ void __launch_bounds__(256) pack(const pack_args p) {
    const int first = blockIdx.x * 256 + warp_id() * WARP;
    after_predecessors();
    if (int(blockIdx.y) >= p.counts[0] || first >= p.cols) return;
    const long long at = (long long)blockIdx.y * p.cols + first;
    pack_block<1>({p.x[at + lane_id()]}, p.packed, at / QK);
}

struct rope_append_args {
    Rope rope;
    float* q;        // [n_tok][q_stride]; its first n_head * head_dim are rotated in place
    const float* k;  // [n_tok][k_stride], n_head_kv * head_dim of them
    const float* v;  // [n_tok][v_stride], n_head_kv * head_dim of them
    int q_stride, k_stride, v_stride;
};

// q, k and v as rope.cuh says. Of a single token gemv_rope makes them so.
// Bytes a token: q read and written, k and v read, once more written in the cache's type.
//
// launch: grid (n_head + 2 * n_head_kv, n_tok), block 128
template <class T> __device__ inline void rope_append(const rope_append_args& p) {
    const int t = blockIdx.y, head = blockIdx.x, i = threadIdx.x;  // of a pair; head_dim <= 256
    const Pair pair(p.rope, head, i);
    int position, sequence;
    after_predecessors();
    const Rope& rope = p.rope;
    if (!find_token(rope.counts, rope.positions, rope.rows, t, position, sequence)) return;
    if (i >= rope.head_dim / 2) return;
    float* q = p.q + (long long)t * p.q_stride + head * rope.head_dim;
    const float* kv = (pair.is_v ? p.v + (long long)t * p.v_stride
                                 : p.k + (long long)t * p.k_stride) +
                      pair.kv_head * rope.head_dim;
    const float* from = pair.is_q ? q : kv;
    const float a = from[pair.first], b = from[pair.second];
    PlacedPair<T>(rope, pair, position, sequence).put(a, b, q);
}

extern "C" __global__ void __launch_bounds__(128) rope_append_f16(const rope_append_args p) {
    rope_append<unsigned short>(p);
}
extern "C" __global__ void __launch_bounds__(128) rope_append_f32(const rope_append_args p) {
    rope_append<float>(p);
}

struct add_parts_args {
    const int* counts;
    float* x;               // [n_tok][n]
    const float* parts;     // [n_parts][part_stride], n_tok rows of n each
    int n_parts;
    long long part_stride;  // floats
    const float* bias;      // [n] or null
    const float* other;     // [n_tok][n] or null: the CPU's part in the hybrid, in host memory
    int n;
};

// x[t] += parts[0][t] + parts[1][t] + ... + bias + other[t], summed in this order.
// Bytes: 4 * n * (n_parts + 3) read, 4 * n written a token.
//
// Blocks are small, so that a row of 4096 is on 64 SMs, and a thread asks for 32 parts before it
// adds the first; and before them for what lies in host memory, though that is added last. (Without
// the second bound the compiler keeps to 32 registers, and asks for 10 at once.)
//
// launch: grid (ceil(n / 64), n_tok), block 64
extern "C" __global__ void __launch_bounds__(64, 16) add_parts(const add_parts_args p) {
    const int i = blockIdx.x * 64 + threadIdx.x;
    if (i >= p.n) return;
    const long long at = (long long)blockIdx.y * p.n + i;
    after_predecessors();
    const bool is_there = int(blockIdx.y) < p.counts[0];
    const float other = p.other ? load_fresh(p.other + at) : 0;
    const float bias = p.bias ? p.bias[i] : 0, x = p.x[at];
    float sum = 0;
#pragma unroll 32
    for (int s = 0; s < p.n_parts; s++) sum += p.parts[s * p.part_stride + at];
    if (is_there) p.x[at] = x + (sum + bias + other);
}
