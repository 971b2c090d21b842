// What becomes of a token's q, k and v: rotary positions (arXiv 2104.09864), and the cache.
//
//   (a, b) = (a cos - b sin, a sin + b cos)   for pairs of the first 2 * half dimensions of each
//   head of q and k; k and v go into the cache, rounded half to even.
#pragma once
#include "cache.cuh"

// The i-th pair of a head's dimensions, of head_dim / 2. Heads are those of q, then k's, then v's.
struct Pair {
    int i, kv_head, first, second;
    bool is_q, is_v, is_rotated;

    __device__ Pair(const Rope& p, int head, int pair) {
        i = pair;
        is_q = head < p.n_head, is_v = head >= p.n_head + p.n_head_kv;
        kv_head = head - p.n_head - is_v * p.n_head_kv;
        is_rotated = i < p.half && !is_v;
        const bool is_apart = is_rotated && p.is_neox;
        first = is_apart ? i : 2 * i, second = is_apart ? i + p.half : 2 * i + 1;
    }
};

// A pair's cos and sin, and its place in the cache: loaded before there is anything to rotate.
template <class T> struct PlacedPair {
    const Pair& pair;
    float cos, sin;
    T* cache;  // of k and v

    __device__ PlacedPair(const Rope& p, const Pair& pair, int position, int sequence)
        : pair(pair) {
        const float* table = p.table + 2ll * position * p.half;
        cos = pair.is_rotated ? table[pair.i] : 1;
        sin = pair.is_rotated ? table[p.half + pair.i] : 0;
        if (pair.is_q) return;
        const int* pages = p.pages + (long long)sequence * p.pages_cols;
        cache = (T*)(pair.is_v ? p.v_cache : p.k_cache) +
                cache_index(pages, position, pair.kv_head, p.n_head_kv, p.head_dim);
    }

    // `q`: of the head, where it is one of q's.
    __device__ void put(float a, float b, float* q) const {
        if (pair.is_rotated) {
            // Each product rounded, as everywhere else: an fma would make another K of it.
            const float before = a;
            a = __fsub_rn(__fmul_rn(a, cos), __fmul_rn(b, sin));
            b = __fadd_rn(__fmul_rn(before, sin), __fmul_rn(b, cos));
        }
        if (pair.is_q) {
            q[pair.first] = a, q[pair.second] = b;
        } else {
            ::put(cache + pair.first, a), ::put(cache + pair.second, b);
        }
    }
};
