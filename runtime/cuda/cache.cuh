// The paged KV cache of a layer: K and V each [n_pages][n_head_kv][PAGE][head_dim], of type T:
// unsigned short (half numbers) or float.
#pragma once
#include "common.cuh"

// Where a token is: its position, in which sequence. False if there is no token t, though it has a
// place in the arrays: all three loads are on their way before one is waited for. (No position and
// no sequence is negative. As it is asked, the compiler does not put off their loads until it is
// known whether they are of use.)
__device__ inline bool find_token(const int* counts, const int* positions, const int* rows, int t,
                                  int& position, int& sequence) {
    const int n_tok = counts[0];
    position = positions[t], sequence = rows[t];
    return (t < n_tok) & (position >= 0) & (sequence >= 0);
}

// Index of the first number of a head at a position, which is in this page.
__device__ inline long long index_in(long long page, int position, int head, int n_head_kv,
                                     int head_dim) {
    return ((page * n_head_kv + head) * PAGE + position % PAGE) * head_dim;
}

// The same, given `pages`, its sequence's row of the table.
__device__ inline long long cache_index(const int* pages, int position, int head, int n_head_kv,
                                        int head_dim) {
    return index_in(pages[position / PAGE], position, head, n_head_kv, head_dim);
}

__device__ inline float number(unsigned short h) { return half_to_float(h); }
__device__ inline float number(float x) { return x; }
__device__ inline void put(unsigned short* at, float x) { *at = float_to_half(x); }
__device__ inline void put(float* at, float x) { *at = x; }

// Numbers of type T in a load of 16 bytes; and these as floats.
template <class T> constexpr int IN_LOAD = 16 / sizeof(T);

__device__ inline void widen(const int4& raw, float (&out)[8]) {
    const int words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 8; i++) {
        out[i] = half_to_float((unsigned short)(unsigned(words[i / 2]) >> 16 * (i % 2)));
    }
}

__device__ inline void widen(const int4& raw, float (&out)[4]) {
    out[0] = __int_as_float(raw.x), out[1] = __int_as_float(raw.y);
    out[2] = __int_as_float(raw.z), out[3] = __int_as_float(raw.w);
}

__device__ inline unsigned bits_of(unsigned short h) { return h; }
__device__ inline unsigned bits_of(float x) { return __float_as_uint(x); }

// 16 bytes of a row of `cols` numbers, the `piece`-th; beyond the row are zeros. IS_WHOLE: rows are
// multiples of 16 bytes; else they follow each other without gaps, and pieces are not aligned.
template <bool IS_WHOLE, class T>
__device__ inline int4 load_raw(const T* row, int piece, int cols) {
    constexpr int N = IN_LOAD<T>;
    if (IS_WHOLE) {
        return N * piece < cols ? ((const int4*)row)[piece] : make_int4(0, 0, 0, 0);
    }
    unsigned words[4] = {};
#pragma unroll
    for (int i = 0; i < N; i++) {
        const int col = N * piece + i;
        if (col < cols) words[4 * i / N] |= bits_of(row[col]) << 128 / N * i % 32;
    }
    return make_int4(words[0], words[1], words[2], words[3]);
}

// Numbers are taken in pieces of 8; a last short piece is filled with zeros.
constexpr int PIECE = 8;
__device__ inline int n_pieces(int head_dim) { return (head_dim + PIECE - 1) / PIECE; }

__device__ inline void load_wide(const unsigned short* from, float (&out)[PIECE]) {
    widen(*(const int4*)from, out);
}

template <int N> __device__ inline void load_wide(const float* from, float (&out)[N]) {
#pragma unroll
    for (int i = 0; i < N; i += 4) {
        const float4 x = *(const float4*)(from + i);
        out[i] = x.x, out[i + 1] = x.y, out[i + 2] = x.z, out[i + 3] = x.w;
    }
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
