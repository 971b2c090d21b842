// The likeliest tokens. Numbers are compared as ranks: a larger logit, or an equal one of a lower
// index, has a larger rank, so that no result depends on the order in which they are met.
//
// Both kernels narrow a list, and are launched again on what they leave until one block is enough:
// at first the list is all logits, then the best that each block has found.
#include "common.cuh"

typedef unsigned long long Rank;

// Upper half: the bits of the logit in an order as integers (NaN: 0); lower half: ~index. No logit
// has rank 0. -0 counts as 0, as it does for floats.
__device__ inline Rank rank_of(float value, int index) {
    const unsigned bits = unsigned(__float_as_int(value == 0 ? 0 : value));
    const unsigned key = value != value ? 0 : bits >> 31 ? ~bits : bits | 0x80000000u;
    return Rank(key) << 32 | ~unsigned(index);
}
__device__ inline int index_of(Rank rank) { return rank ? int(~unsigned(rank)) : -1; }
__device__ inline float value_of(Rank rank) {
    const unsigned key = unsigned(rank >> 32);
    return rank ? __int_as_float(int(key >> 31 ? key & 0x7fffffffu : ~key)) : -infinity();
}

// The rank of entry i of a list of n: values, and their indices (null: i). Indices below 0, and
// what lies beyond the list, are nothing: rank 0.
__device__ inline Rank entry(const float* values, const int* indices, long long row, int i, int n) {
    if (i >= n) return 0;
    const int index = indices ? indices[row * n + i] : i;
    return index < 0 ? 0 : rank_of(values[row * n + i], index);
}

struct argmax_args {
    const int* counts;    // [1]: n_tok, such as the second number of Step.counts
    const float* values;  // [n_tok][n]
    const int* indices;   // [n_tok][n], null at first
    int n;
    float* best_values;   // [n_tok][blocks]
    int* best_indices;    // [n_tok][blocks]
};

// The largest of each block's share of the list; the lowest index of equal ones; NaN only if there
// is nothing else.   Bytes: 4 * n read (8 * n the second time).
//
// launch: grid (ceil(n / 4096), n_tok), then (1, n_tok) on that, block 256
extern "C" __global__ void __launch_bounds__(256) argmax(const argmax_args p) {
    __shared__ Rank bests[256 / WARP];
    after_predecessors();
    const int t = blockIdx.y;
    if (t >= p.counts[0]) return;
    Rank best = 0;
#pragma unroll 4
    for (int i = blockIdx.x * 256 + threadIdx.x; i < p.n; i += gridDim.x * 256) {
        best = max(best, entry(p.values, p.indices, t, i, p.n));
    }
    for (int distance = WARP / 2; distance > 0; distance /= 2) {
        best = max(best, __shfl_xor_sync(ALL_LANES, best, distance));
    }
    if (lane_id() == 0) bests[warp_id()] = best;
    __syncthreads();
    if (threadIdx.x != 0) return;
    for (int w = 1; w < 256 / WARP; w++) best = max(best, bests[w]);
    const long long at = (long long)t * gridDim.x + blockIdx.x;
    p.best_values[at] = value_of(best);
    p.best_indices[at] = index_of(best);
}

struct top_k_args {
    const int* counts;
    const float* values;  // [n_tok][n]
    const int* indices;   // [n_tok][n], null at first
    int n;
    int k;                // at most 1024
    float* best_values;   // [n_tok][blocks][k], descending; where there are fewer: -infinity
    int* best_indices;    // [n_tok][blocks][k]; -1
};

// The k largest of each 4096 of the list, in descending order, equal ones by index: sorted by
// Batcher's bitonic network. While there are several blocks, it is launched again on what they
// found, n = blocks * k: twice for k = 40 of a vocabulary of 256 k, four times for k = 1024.
// Bytes: 4 * n read (8 * n from the second time on), 8 * k written a block.
//
// launch: grid (ceil(n / 4096), n_tok), block 1024
constexpr int SORTED = 4096, SORT_THREADS = 1024;

extern "C" __global__ void __launch_bounds__(1024) top_k(const top_k_args p) {
    __shared__ Rank ranks[SORTED];
    after_predecessors();
    const int t = blockIdx.y;
    if (t >= p.counts[0]) return;
    for (int i = threadIdx.x; i < SORTED; i += SORT_THREADS) {
        ranks[i] = entry(p.values, p.indices, t, blockIdx.x * SORTED + i, p.n);
    }
    // Runs of `size` are sorted, alternately down and up: two of them make one of twice the length.
    for (int size = 2; size <= SORTED; size *= 2) {
        for (int apart = size / 2; apart > 0; apart /= 2) {
            __syncthreads();
            for (int pair = threadIdx.x; pair < SORTED / 2; pair += SORT_THREADS) {
                const int i = 2 * pair - pair % apart;  // the pair is i, i + apart
                const Rank a = ranks[i], b = ranks[i + apart];
                const bool is_down = (i & size) == 0;
                if ((a < b) == is_down) ranks[i] = b, ranks[i + apart] = a;
            }
        }
    }
    __syncthreads();
    const long long at = ((long long)t * gridDim.x + blockIdx.x) * p.k;
    for (int i = threadIdx.x; i < p.k; i += SORT_THREADS) {
        p.best_values[at + i] = value_of(ranks[i]);
        p.best_indices[at + i] = index_of(ranks[i]);
    }
}
