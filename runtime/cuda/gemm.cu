// Matrix products for the tokens of a prompt.
#include "gemm.cuh"

struct gemm_args {
    Matrix w;
    const float* x;      // [n_tok][cols], read by f16 and f32
    Packed x_packed;     // [n_tok][cols], read by q4_0, q8_0, q6_k
    const float* bias;   // [rows] or null
    float* y;            // [n_tok][y_stride]
    const int* n_tok;    // [1]
    int y_stride;
    int op;              // Op
};

// y[t][r] (op) w[r] . x[t] + bias[r]     w [rows][cols], x [n_tok][cols], for t < n_tok
// Bytes: w once for every 128 tokens, x once for every 64 rows; mostly from the L2 cache.
//
// launch: grid (ceil(rows / 64), ceil(most tokens / 128)), block 256
template <class F, int TOKENS> __device__ inline void gemm(const gemm_args& p, int n_tok) {
    const int first_row = blockIdx.x * TILE_ROWS, first_token = blockIdx.y * TOKENS;
    if (first_token >= n_tok) return;
    const Input x = {p.x, p.x_packed, p.w.cols};
    const Results& results = rows_times_tokens<F, TOKENS>(p.w, first_row, x, first_token, n_tok);
    const int n_jobs = n_results<TOKENS>(n_tok, first_token);
    for (int job = threadIdx.x; job < n_jobs; job += TILE_THREADS) {
        const int row = first_row + job % TILE_ROWS, token = job / TILE_ROWS;
        if (row >= p.w.rows) continue;
        float* y = p.y + (long long)(first_token + token) * p.y_stride + row;
        float sum = results[token][job % TILE_ROWS];
        if (p.bias) sum += p.bias[row];
        if (p.op == ADD) sum += *y;
        *y = p.op == STORE_RELU && sum < 0 ? 0 : sum;
    }
}

#define GEMM(suffix, F)                                                                            \
    extern "C" __global__ void __launch_bounds__(256, 2) gemm_##suffix(const gemm_args p) {        \
        after_predecessors();                                                                      \
        const int n_tok = *p.n_tok;                                                                \
        n_tok > FEW ? gemm<F, MANY>(p, n_tok) : gemm<F, FEW>(p, n_tok);                            \
    }
GEMM(q4_0, Q4_0)
GEMM(q8_0, Q8_0)
GEMM(q6_k, Q6_K)
GEMM(f16, F16)
GEMM(f32, F32)
