// The paged KV cache of a layer: K and V each [n_pages][n_head_kv][PAGE][head_dim], of type T:
// unsigned short (half numbers) or float.
#pragma once
#include "common.cuh"

// Index of the first number of a head at a position; `pages` is its sequence's row of the table.
__device__ inline long long cache_index(const int* pages, int position, int head, int n_head_kv,
                                        int head_dim) {
    const long long page = pages[position / PAGE];
    return ((page * n_head_kv + head) * PAGE + position % PAGE) * head_dim;
}

__device__ inline float number(unsigned short h) { return half_to_float(h); }
__device__ inline float number(float x) { return x; }
__device__ inline void put(unsigned short* at, float x) { *at = float_to_half(x); }
__device__ inline void put(float* at, float x) { *at = x; }

// Numbers are read in pieces of 8, by loads of 16 bytes; a last short piece is filled with zeros.
constexpr int PIECE = 8;
__device__ inline int n_pieces(int head_dim) { return (head_dim + PIECE - 1) / PIECE; }

__device__ inline void load_wide(const unsigned short* from, float (&out)[PIECE]) {
    const int4 raw = *(const int4*)from;
    const int words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < PIECE; i++) {
        out[i] = half_to_float((unsigned short)(unsigned(words[i / 2]) >> 16 * (i % 2)));
    }
}

__device__ inline void load_wide(const float* from, float (&out)[PIECE]) {
    const float4 a = ((const float4*)from)[0], b = ((const float4*)from)[1];
    out[0] = a.x, out[1] = a.y, out[2] = a.z, out[3] = a.w;
    out[4] = b.x, out[5] = b.y, out[6] = b.z, out[7] = b.w;
}

__device__ inline void store_wide(const float (&x)[PIECE], float* to) {
    ((float4*)to)[0] = make_float4(x[0], x[1], x[2], x[3]);
    ((float4*)to)[1] = make_float4(x[4], x[5], x[6], x[7]);
}

// Piece `piece` of a row of `cols` numbers, which follow each other without gaps in memory.
template <class T>
__device__ inline void load_piece(const T* row, int piece, int cols, float (&out)[PIECE]) {
    if (cols % PIECE == 0) {
        load_wide(row + PIECE * piece, out);
    } else {
#pragma unroll
        for (int i = 0; i < PIECE; i++) {
            const int col = PIECE * piece + i;
            out[i] = col < cols ? number(row[col]) : 0;
        }
    }
}
