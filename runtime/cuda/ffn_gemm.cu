// The FFN of a prompt's tokens, as matrix products over all rows of a window of storage: what is
// resident, or what of the rest is being streamed through the device.
#include "ffn.cuh"
#include "gemm.cuh"

struct ffn_rows_gemm_args {
    Matrix decider;             // [storage rows][n_embd]; q null: act holds activated deciders
    Matrix up;                  // [storage rows][n_embd]; q null: the model has none
    const float* decider_bias;  // [n_ff] or null
    const float* up_bias;       // [n_ff] or null
    const float* x;             // [n_tok][n_embd], read by f16 and f32
    Packed x_packed;            // [n_tok][n_embd], read by q4_0, q8_0, q6_k
    const int* n_tok;           // [1]
    const unsigned char* mask;  // [n_tok][n_ff]
    const int* block_neuron;    // [n_blocks]: which 64 neurons a block of the window has; -1: none
    float* act;                 // [n_tok][64 * n_blocks]
    unsigned char* fired;       // [n_tok][n_ff] by neuron
    long long* counters;        // [4]: rows of up, rows of down
    int first_block;            // of storage: where the window starts
    int n_blocks;               // of the window
    int n_ff;
    int activation;             // Activation
    float threshold;            // of FATRELU
};

// act[t][r] = mask[t][n] ? activation(decider[r] . x[t] + bias) * (up[r] . x[t] + bias) : 0
// for the rows r of the window and their neurons n; fired[t][n] where mask[t][n], t < n_tok.
// Bytes: two rows of weights a neuron for every 128 tokens, none for 64 neurons that no token of
// the 128 needs.
//
// launch: grid (n_blocks, ceil(most tokens / 128)), block 256
template <class F, int TOKENS>
__device__ inline void ffn_rows_gemm(const ffn_rows_gemm_args& p, int n_tok) {
    static_assert(TILE_ROWS == NEURON_BLOCK, "a tile is a block of neurons");
    const int first_token = blockIdx.y * TOKENS;
    if (first_token >= n_tok) return;
    const int first_row = (p.first_block + blockIdx.x) * NEURON_BLOCK;
    const int first_neuron = p.block_neuron[blockIdx.x] * NEURON_BLOCK;
    const auto wants = [&](int row, int token) {
        const int n = first_neuron + row;
        return n >= 0 && n < p.n_ff && p.mask[(long long)(first_token + token) * p.n_ff + n];
    };
    const auto act_of = [&](int row, int token) -> float& {
        const long long width = (long long)p.n_blocks * NEURON_BLOCK;
        return p.act[(first_token + token) * width + blockIdx.x * NEURON_BLOCK + row];
    };
    // act of a neuron's decider; whether it is not 0.
    const auto decide = [&](int row, int token, float sum) {
        float a = 0;
        if (wants(row, token)) {
            if (!p.decider.q) {
                a = act_of(row, token);
            } else {
                a = sum;
                if (p.decider_bias) a += p.decider_bias[first_neuron + row];
                a = activate(p.activation, a, p.threshold);
            }
        }
        act_of(row, token) = a;
        return a != 0;
    };
    // The same times up; whether the neuron has fired.
    const auto fire = [&](int row, int token, float up) {
        if (!wants(row, token)) return false;
        const int n = first_neuron + row;
        Neuron neuron = {act_of(row, token), FIRED};
        if (neuron.act == 0) {
            neuron = {0, 0};
        } else if (p.up.q) {
            if (p.up_bias) up += p.up_bias[n];
            neuron = with_up(p.activation, neuron.act, up);
        }
        act_of(row, token) = neuron.act;
        p.fired[(long long)(first_token + token) * p.n_ff + n] = neuron.fired;
        return neuron.fired == FIRED;
    };
    const int n_jobs = n_results<TOKENS>(n_tok, first_token);
    int n = 0;  // how many there are by now: wanted, then decided, then fired; of this thread
    for (int job = threadIdx.x; job < n_jobs; job += TILE_THREADS) {
        n += wants(job % TILE_ROWS, job / TILE_ROWS);
    }
    n = block_sum<TILE_THREADS>(n);  // of the block

    // First the decider, then up: one text for both, as registers are few.
#pragma unroll 1
    for (int pass = 0; pass < 2; pass++) {
        const bool is_up = pass == 1;
        const Matrix w = is_up ? p.up : p.decider;
        const Results* sums = nullptr;
        if (n > 0 && w.q) {
            const Input x = {p.x, p.x_packed, w.cols};
            sums = &rows_times_tokens<F, TOKENS>(w, first_row, x, first_token, n_tok);
        }
        n = 0;
        for (int job = threadIdx.x; job < n_jobs; job += TILE_THREADS) {
            const int row = job % TILE_ROWS, token = job / TILE_ROWS;
            const float sum = sums ? (*sums)[token][row] : 0;
            n += is_up ? fire(row, token, sum) : decide(row, token, sum);
        }
        n = block_sum<TILE_THREADS>(n);
        if (threadIdx.x == 0) count(p.counters, is_up ? DOWN_ROWS : UP_ROWS, n);
    }
}

struct ffn_down_gemm_args {
    Matrix down_t;            // [storage rows][n_embd]
    const float* act;         // [n_tok][64 * n_blocks]
    const int* n_tok;         // [1]
    const int* block_neuron;  // [n_blocks]: which 64 neurons a block of the window has; -1: none
    float* y;                 // [n_tok][n_embd]
    int first_block;          // of storage: where the window starts
    int n_blocks;             // of the window
    int n_ff;
    int op;                   // Op
};

// y[t][c] (op) sum of act[t][r] * down_t[r][c] over the rows r of the window, for t < n_tok
// Bytes: the window once for every 128 tokens, act once for every 64 columns.
//
// launch: grid (ceil(n_embd / 64), ceil(most tokens / 128)), block 256
template <class F, int TOKENS>
__device__ inline void ffn_down_gemm(const ffn_down_gemm_args& p, int n_tok) {
    const int first_token = blockIdx.y * TOKENS;
    if (first_token >= n_tok) return;
    const int first_column = blockIdx.x * TILE_ROWS, n_rows = p.n_blocks * NEURON_BLOCK;
    const Input act = {p.act, {}, n_rows};
    // Rows that no neuron has may hold anything, NaN too: they count as 0.
    const auto row_of = [&](int k) {
        const int block = p.block_neuron[k / NEURON_BLOCK], within = k % NEURON_BLOCK;
        const bool exists = block >= 0 && block * NEURON_BLOCK + within < p.n_ff;
        return exists ? p.first_block * NEURON_BLOCK + k : -1;
    };
    using Rows = ColumnsOf<F, decltype(row_of)>;
    const Results& results =
        multiply_all<F>(Rows(p.down_t, row_of, n_rows, first_column),
                        TokensOf<float, TOKENS>(act, first_token, n_tok));
    const int n_jobs = n_results<TOKENS>(n_tok, first_token);
    for (int job = threadIdx.x; job < n_jobs; job += TILE_THREADS) {
        const int column = first_column + job % TILE_ROWS, token = job / TILE_ROWS;
        if (column >= p.down_t.cols) continue;
        float* y = p.y + (long long)(first_token + token) * p.down_t.cols + column;
        const float sum = results[token][job % TILE_ROWS];
        *y = p.op == ADD ? *y + sum : sum;
    }
}

#define FFN_GEMM(suffix, F)                                                                        \
    extern "C" __global__ void __launch_bounds__(256, 2)                                           \
        ffn_rows_gemm_##suffix(const ffn_rows_gemm_args p) {                                       \
        after_predecessors();                                                                      \
        const int n_tok = *p.n_tok;                                                                \
        n_tok > FEW ? ffn_rows_gemm<F, MANY>(p, n_tok) : ffn_rows_gemm<F, FEW>(p, n_tok);          \
    }                                                                                              \
    extern "C" __global__ void __launch_bounds__(256, 2)                                           \
        ffn_down_gemm_##suffix(const ffn_down_gemm_args p) {                                       \
        after_predecessors();                                                                      \
        const int n_tok = *p.n_tok;                                                                \
        n_tok > FEW ? ffn_down_gemm<F, MANY>(p, n_tok) : ffn_down_gemm<F, FEW>(p, n_tok);          \
    }
FFN_GEMM(q4_0, Q4_0)
FFN_GEMM(q8_0, Q8_0)
FFN_GEMM(q6_k, Q6_K)
FFN_GEMM(f16, F16)
FFN_GEMM(f32, F32)
