// One token's matrix-vector products (a few tokens': the same again, for each).
#include "formats.cuh"
#include "pack.cuh"
#include "rope.cuh"

struct gemv_args {
    Matrix w;
    const float* x;      // [n_tok][cols], read by f16 and f32
    Packed x_packed;     // [n_tok][cols], read by q4_0, q8_0, q6_k
    const float* bias;   // [rows] or null
    float* y;            // [n_tok][y_stride]
    int y_stride;
    int op;              // Op
};

// y[t][r] (op) w[r] . x[t] + bias[r]     w [rows][cols], x [n_tok][cols]
// Bytes: w once a token; x comes from the caches: 36 bytes a unit of two rows of q4_0.
//
// A warp takes two rows, and of each two units a lane before it uses the first: 64 bytes a thread
// in flight. To keep a memory of latency L busy, its bandwidth times L must be in flight (Little):
// 1.0 TB/s x 0.6 us / 128 SMs = 5 KiB an SM on an RTX 4090, 3.35 TB/s x 0.7 us / 132 = 18 KiB on an
// H100. At 64 registers or fewer an SM holds 1024 threads: 64 KiB. A matrix of 1024 rows makes 512
// warps: 4 on each SM, 8 KiB: all of it is asked for in two goes, as soon as the kernel starts.
// Two rows share what they read of x, so that the L1 cache, not only memory, keeps up.
//
// launch: grid (ceil(rows / 8), n_tok), block 128
constexpr int GEMV_THREADS = 128, GEMV_ROWS = 2;  // rows of a warp

// Lane r of a warp returns the result of its row r.
template <class F, int THREADS> __device__ inline float gemv(const gemv_args& p) {
    const int t = blockIdx.y;
    const int first = (blockIdx.x * (THREADS / WARP) + warp_id()) * GEMV_ROWS;
    if (first >= p.w.rows) return 0;
    prefetch_rows<F>(p.w, first, min(GEMV_ROWS, p.w.rows - first));
    after_predecessors();
    // Lane r has the result of row first + r, and only it looks at what the result is added to:
    // before the long wait, so that it is there afterwards.
    const int mine = first + lane_id();
    const bool is_mine = lane_id() < GEMV_ROWS && mine < p.w.rows;
    float* y = p.y + (long long)t * p.y_stride + mine;
    float sum = is_mine && p.op == ADD ? *y : 0;
    if (is_mine && p.bias) sum += p.bias[mine];
    int rows[GEMV_ROWS];
#pragma unroll
    for (int r = 0; r < GEMV_ROWS; r++) rows[r] = min(first + r, p.w.rows - 1);
    float sums[GEMV_ROWS];
    dot_rows<F>(p.w, rows, Input{p.x, p.x_packed, p.w.cols}.token(t), sums);
#pragma unroll
    for (int r = 0; r < GEMV_ROWS; r++) sum += lane_id() == r ? sums[r] : 0;
    if (p.op == STORE_RELU && sum < 0) sum = 0;
    if (is_mine) *y = sum;
    return sum;
}

struct gemv_packed_args {
    gemv_args product;  // of rows % 32 == 0
    Packed packed;      // [n_tok][rows]
};

// y as above, and the same packed.   Bytes: 1.25 * rows more, written.
//
// A block of threads has the 32 rows of a block of Packed; else another kernel would have to follow.
// A matrix of 1024 rows then keeps 32 SMs busy. Each reads 72 KiB of q4_0 with 4096 columns, at 64
// bytes a clock from the L2 cache, where they lie when the wait is over: 0.7 us, less than a launch.
//
// launch: grid (rows / 32, n_tok), block 512
constexpr int PACKED_THREADS = QK / GEMV_ROWS * WARP;

template <class F> __device__ inline void gemv_packed(const gemv_packed_args& p) {
    __shared__ float results[QK];
    const float result = gemv<F, PACKED_THREADS>(p.product);
    if (lane_id() < GEMV_ROWS) results[warp_id() * GEMV_ROWS + lane_id()] = result;
    __syncthreads();
    if (warp_id() > 0) return;
    const long long block = (long long)blockIdx.y * gridDim.x + blockIdx.x;
    pack_block<1>({results[lane_id()]}, p.packed, block);
}

struct gemv_rope_args {
    gemv_args product;  // of q, k and v, one behind the other; of y only q is written
    Rope rope;
};

// q, k and v as above, and then as rope.cuh says: else another kernel would have to follow.
// Bytes: w and x as above; q written, k and v in the cache's type.
//
// A warp takes the two rows of a pair. What is needed for them afterwards it asks for before it
// multiplies: that is on its way for as long as the rows are.
//
// launch: grid (ceil(rows / 8), n_tok), block 128
template <class F, class T> __device__ inline void gemv_rope(const gemv_rope_args& p) {
    const gemv_args& product = p.product;
    const Rope& rope = p.rope;
    const int t = blockIdx.y, pairs = rope.head_dim / 2;  // of a head
    const int nth = blockIdx.x * (GEMV_THREADS / WARP) + warp_id(), head = nth / pairs;
    if (head >= rope.n_head + 2 * rope.n_head_kv) return;
    const Pair pair(rope, head, nth - head * pairs);
    const int first = head * rope.head_dim;
    const int rows[GEMV_ROWS] = {first + pair.first, first + pair.second};
#pragma unroll
    for (int r = 0; r < GEMV_ROWS; r++) prefetch_rows<F>(product.w, rows[r], 1);
    int position, sequence;
    after_predecessors();
    if (!find_token(rope.counts, rope.positions, rope.rows, t, position, sequence)) return;
    const PlacedPair<T> placed(rope, pair, position, sequence);
    float sums[GEMV_ROWS], y[GEMV_ROWS];
#pragma unroll
    for (int r = 0; r < GEMV_ROWS; r++) y[r] = product.bias ? product.bias[rows[r]] : 0;
    dot_rows<F>(product.w, rows, Input{product.x, product.x_packed, product.w.cols}.token(t), sums);
#pragma unroll
    for (int r = 0; r < GEMV_ROWS; r++) y[r] += sums[r];
    if (lane_id() == 0) placed.put(y[0], y[1], product.y + (long long)t * product.y_stride + first);
}

#define GEMV(suffix, F)                                                                            \
    extern "C" __global__ void __launch_bounds__(128) gemv_##suffix(const gemv_args p) {           \
        gemv<F, GEMV_THREADS>(p);                                                                  \
    }                                                                                              \
    extern "C" __global__ void __launch_bounds__(512)                                              \
        gemv_packed_##suffix(const gemv_packed_args p) {                                           \
        gemv_packed<F>(p);                                                                         \
    }                                                                                              \
    extern "C" __global__ void __launch_bounds__(128)                                              \
        gemv_rope_##suffix##_f16(const gemv_rope_args p) {                                         \
        gemv_rope<F, unsigned short>(p);                                                           \
    }                                                                                              \
    extern "C" __global__ void __launch_bounds__(128)                                              \
        gemv_rope_##suffix##_f32(const gemv_rope_args p) {                                         \
        gemv_rope<F, float>(p);                                                                    \
    }
GEMV(q4_0, Q4_0)
GEMV(q8_0, Q8_0)
GEMV(q6_k, Q6_K)
GEMV(f16, F16)
GEMV(f32, F32)
