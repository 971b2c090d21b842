// What is done to the rows of single tokens: embedding, norms, rounding, rope, sums.
// In all kernels `counts` points at the number of tokens: Step.counts, or, where the tokens are
// those whose logits are wanted, its second number. The grid may have more tokens than there are.
#include "cache.cuh"
#include "formats.cuh"
#include "pack.cuh"

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
    Packed packed;        // [n_tok][n]; null if not wanted; n % 32 == 0
};

// h[t] = (x - m) / sqrt(mean((x - m)^2) + eps) * weight + bias, x = x[index[t]], m its mean or 0
// (layer norm, arXiv 1607.06450; RMS norm, arXiv 1910.07467), and the same packed.
// Bytes: 8 * n read (x again from the L1 cache), 5.25 * n written.
//
// launch: grid n_tok, block 1024
constexpr int NORM_THREADS = 1024;

extern "C" __global__ void __launch_bounds__(1024, 1) norm_rows(const norm_rows_args p) {
    const int t = blockIdx.x;
    if (t >= p.counts[0]) return;
    const float* x = p.x + (long long)(p.index ? p.index[t] : t) * p.n;
    float* h = p.h + (long long)t * p.n;
    float mean = 0;
    if (p.is_layer) {
        float sum = 0;
        for (int i = threadIdx.x; i < p.n; i += NORM_THREADS) sum += x[i];
        mean = block_sum<NORM_THREADS>(sum) / p.n;
    }
    float squares = 0;
    for (int i = threadIdx.x; i < p.n; i += NORM_THREADS) {
        const float centred = x[i] - mean;
        squares = fmaf(centred, centred, squares);
    }
    const float scale = 1 / sqrtf(block_sum<NORM_THREADS>(squares) / p.n + p.eps);
    // A warp takes 32 columns at a time: one block of packed.
    for (int first = warp_id() * WARP; first < p.n; first += NORM_THREADS) {
        const int i = first + lane_id();
        float y = 0;
        if (i < p.n) {
            y = (x[i] - mean) * scale * p.weight[i];
            if (p.bias) y += p.bias[i];
            h[i] = y;
        }
        if (p.packed.q) pack_block(y, p.packed, ((long long)t * p.n + first) / QK);
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
    if (int(blockIdx.y) >= p.counts[0] || first >= p.cols) return;
    const long long at = (long long)blockIdx.y * p.cols + first;
    pack_block(p.x[at + lane_id()], p.packed, at / QK);
}

struct rope_append_args {
    const int* counts;
    const int* rows;          // [n_tok]
    const int* positions;     // [n_tok]
    const int* pages;         // [n_seq][pages_cols]
    int pages_cols;
    float* q;                 // [n_tok][q_stride]; its first n_head * head_dim are rotated in place
    const float* k;           // [n_tok][k_stride], n_head_kv * head_dim of them
    const float* v;           // [n_tok][v_stride], n_head_kv * head_dim of them
    int q_stride, k_stride, v_stride;
    int n_head, n_head_kv, head_dim;
    const float* table;       // [context][2][half]: cos and sin
    int half;                 // rope_dim / 2; 0: nothing is rotated
    int is_neox;              // pairs are (i, i + half), else (2i, 2i + 1)
    unsigned char* k_cache;   // the layer's, see cache.cuh
    unsigned char* v_cache;
};

// (a, b) = (a cos - b sin, a sin + b cos) for the pairs of the first 2 * half dimensions of each
// head of q and k (arXiv 2104.09864); k and v go into the cache, rounded half to even.
// Bytes a token: q read and written, k and v read, once more written in the cache's type.
//
// launch: grid (n_head + 2 * n_head_kv, n_tok), block 64
template <class T> __device__ inline void rope_append(const rope_append_args& p) {
    const int t = blockIdx.y;
    if (t >= p.counts[0]) return;
    const int position = p.positions[t], head = blockIdx.x;
    const bool is_q = head < p.n_head, is_v = head >= p.n_head + p.n_head_kv;
    const int kv_head = head - p.n_head - is_v * p.n_head_kv;  // of k and v
    float* q = p.q + (long long)t * p.q_stride + head * p.head_dim;
    const float* kv = (is_v ? p.v + (long long)t * p.v_stride : p.k + (long long)t * p.k_stride) +
                      kv_head * p.head_dim;
    const float* from = is_q ? q : kv;
    T* cache = nullptr;
    if (!is_q) {
        const int* pages = p.pages + (long long)p.rows[t] * p.pages_cols;
        cache = (T*)(is_v ? p.v_cache : p.k_cache) +
                cache_index(pages, position, kv_head, p.n_head_kv, p.head_dim);
    }
    const float* table = p.table + 2ll * position * p.half;
    for (int i = threadIdx.x; i < p.head_dim / 2; i += 64) {
        const bool is_rotated = i < p.half && !is_v;
        const bool is_apart = is_rotated && p.is_neox;
        const int first = is_apart ? i : 2 * i, second = is_apart ? i + p.half : 2 * i + 1;
        float a = from[first], b = from[second];
        if (is_rotated) {
            const float cos = table[i], sin = table[p.half + i], before = a;
            a = a * cos - b * sin;
            b = before * sin + b * cos;
        }
        if (is_q) {
            q[first] = a, q[second] = b;
        } else {
            put(cache + first, a), put(cache + second, b);
        }
    }
}

extern "C" __global__ void __launch_bounds__(64) rope_append_f16(const rope_append_args p) {
    rope_append<unsigned short>(p);
}
extern "C" __global__ void __launch_bounds__(64) rope_append_f32(const rope_append_args p) {
    rope_append<float>(p);
}

struct add_parts_args {
    const int* counts;
    float* x;               // [n_tok][n]
    const float* parts;     // [n_parts][part_stride], n_tok rows of n each
    int n_parts;
    long long part_stride;  // floats
    const float* bias;      // [n] or null
    const float* other;     // [n_tok][n] or null: the CPU's part in the hybrid
    int n;
};

// x[t] += parts[0][t] + parts[1][t] + ... + bias + other[t], summed in this order.
// Bytes: 4 * n * (n_parts + 3) read, 4 * n written a token.
//
// launch: grid (ceil(n / 256), n_tok), block 256
extern "C" __global__ void __launch_bounds__(256) add_parts(const add_parts_args p) {
    const int i = blockIdx.x * 256 + threadIdx.x;
    if (int(blockIdx.y) >= p.counts[0] || i >= p.n) return;
    const long long at = (long long)blockIdx.y * p.n + i;
    float sum = 0;
#pragma unroll 8
    for (int s = 0; s < p.n_parts; s++) sum += p.parts[s * p.part_stride + at];
    if (p.bias) sum += p.bias[i];
    if (p.other) sum += p.other[at];
    p.x[at] += sum;
}
