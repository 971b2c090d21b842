// Products of small matrices by a warp, on tensor cores: c += a . b in fragments.
//
// A word is four int8 or one float. Of 16 rows of a, 8 columns of b and 8 words along k,
// lane 4 g + q holds
//   a[0], a[1]   word q of rows g, g + 8;  a[2], a[3]   word q + 4 of them
//   b[0], b[1]   words q, q + 4 of column g
//   c[0], c[1]   columns 2 q, 2 q + 1 of row g;  c[2], c[3]   of row g + 8
// Sums of int8 products are exact. Floats are read as tf32, which has 11 bits of a float's 24:
// their products are exact, but sums are rounded in a way of their own (towards zero).
//
// All lanes of the warp must call these functions.
#pragma once
#include "common.cuh"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr bool HAS_TF32 = false;  // Turing: int8 alone, a quarter at a time
#else
constexpr bool HAS_TF32 = true;
#endif

// A quarter: 8 rows, 8 columns, 4 words.
#ifdef CUSIM
inline void mma_quarter(int& c0, int& c1, int a, int b) { cusim::mma(c0, c1, a, b); }
inline void mma_quarter(float& c0, float& c1, float a, float b) { cusim::mma(c0, c1, a, b); }
#else
__device__ inline void mma_quarter(int& c0, int& c1, int a, int b) {
    asm("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
        : "+r"(c0), "+r"(c1)
        : "r"(a), "r"(b));
}
#endif

// The first half of k, or the second: a[0], a[1] and b[0], or a[2], a[3] and b[1].
__device__ inline void mma_half(int (&c)[4], int a0, int a1, int b) {
#if !defined(CUSIM) && __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 "
        "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a0), "r"(a1), "r"(b));
#else
    mma_quarter(c[0], c[1], a0, b);
    mma_quarter(c[2], c[3], a1, b);
#endif
}

__device__ inline void mma(int (&c)[4], const int (&a)[4], const int (&b)[2]) {
#if !defined(CUSIM) && __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    mma_half(c, a[0], a[1], b[0]);
    mma_half(c, a[2], a[3], b[1]);
#endif
}

__device__ inline void mma(float (&c)[4], const float (&a)[4], const float (&b)[2]) {
#ifdef CUSIM
    for (int h = 0; h < 2; h++) {
        mma_quarter(c[0], c[1], a[2 * h], b[h]);
        mma_quarter(c[2], c[3], a[2 * h + 1], b[h]);
    }
#else
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(__float_as_int(a[0])), "r"(__float_as_int(a[1])), "r"(__float_as_int(a[2])),
          "r"(__float_as_int(a[3])), "r"(__float_as_int(b[0])), "r"(__float_as_int(b[1])));
#endif
}

// x = high + low, two numbers of tf32, but for 2^-21 of x at most. high is rounded to nearest, so
// that most of low fits. Where the carry makes a NaN a number, low is still NaN.
__device__ inline void split(float x, float& high, float& low) {
    high = __uint_as_float((__float_as_uint(x) + 0x1000u) & ~0x1fffu);
    low = __uint_as_float(__float_as_uint(x - high) & ~0x1fffu);
}

// Four matrices of 8 rows of 16 bytes in shared memory: lane l says where row l % 8 of matrix l / 8
// is. x[m]: word q of row g of matrix m.
#ifdef CUSIM
template <class Word> inline void load_matrices(Word (&x)[4], const void* row) {
    for (int m = 0; m < 4; m++) {
        const Word* from = (const Word*)__shfl_sync(ALL_LANES, row, 8 * m + lane_id() / 4);
        x[m] = from[lane_id() % 4];
    }
}
#else
__device__ inline void load_matrices(int (&x)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(unsigned(__cvta_generic_to_shared(row)))
                 : "memory");
}
__device__ inline void load_matrices(float (&x)[4], const void* row) {
    int words[4];
    load_matrices(words, row);
#pragma unroll
    for (int m = 0; m < 4; m++) x[m] = __int_as_float(words[m]);
}
#endif
