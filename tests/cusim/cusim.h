// CUDA C++ for g++: included before a .cu file, it runs the kernels in it on the CPU.
//
// Covered is what the kernels of this project use, and a little more. sim.py compiles, appends a
// table of the kernels, and calls cusim_launch. What runs the threads is in fibers.h, what watches
// them in checks.h.
#pragma once

#include <link.h>
#include <math.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "fibers.h"
#ifdef CUSIM_CHECK
#include "checks.h"
#else
namespace cusim {
enum Access { READ, WRITE, ATOMIC };
struct Region;
}
#endif

#define __global__
#define __host__
#ifdef CUSIM_CHECK
#define __device__ __attribute__((always_inline))  // so that it is known who called
#else
#define __device__
#endif
#define __constant__ static const
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __restrict__ __restrict
#define __align__(n) alignas(n)
#define __launch_bounds__(...)
// One block runs at a time: its memory can be static. Being thread-local gathers all of it, also
// that of templates, in one place, the TLS block of the library, which is how it is found.
#define __shared__ thread_local
#define alignas(n) __attribute__((aligned(n)))  // which may stand behind thread_local

static thread_local __attribute__((aligned(64), used)) char cusim_shared_anchor = 0;

// ---- vector types ----

#define CUSIM_VECTORS(name, T, align2, align4)                                    \
    struct name##1 { T x; };                                                      \
    struct alignas(align2) name##2 { T x, y; };                                   \
    struct name##3 { T x, y, z; };                                                \
    struct alignas(align4) name##4 { T x, y, z, w; };                             \
    static inline name##1 make_##name##1(T x) { return {x}; }                     \
    static inline name##2 make_##name##2(T x, T y) { return {x, y}; }             \
    static inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }     \
    static inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
#define uint3 cusim_uint3  // is defined already
CUSIM_VECTORS(uint, unsigned, 8, 16)
#undef uint3
CUSIM_VECTORS(int, int, 8, 16)
CUSIM_VECTORS(float, float, 8, 16)
CUSIM_VECTORS(char, signed char, 2, 4)
CUSIM_VECTORS(uchar, unsigned char, 2, 4)
CUSIM_VECTORS(short, short, 4, 8)
CUSIM_VECTORS(ushort, unsigned short, 4, 8)
CUSIM_VECTORS(longlong, long long, 16, 16)
CUSIM_VECTORS(ulonglong, unsigned long long, 16, 16)
CUSIM_VECTORS(double, double, 16, 16)

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};

namespace cusim {

// A kernel, in the table that sim.py makes.
struct Entry {
    const char* name;
    void (*run)(const void*);
    size_t args;       // bytes
    unsigned threads;  // of a block, at most
};
constexpr unsigned launch_bounds(unsigned threads, unsigned = 0, unsigned = 0) { return threads; }

CUSIM uint3 thread_index() { return current->index; }
CUSIM uint3 block_index() { return block.index; }
CUSIM uint3 block_size() { return block.size; }
CUSIM uint3 grid_size() { return block.grid; }
}  // namespace cusim
#define threadIdx (cusim::thread_index())
#define blockIdx (cusim::block_index())
#define blockDim (cusim::block_size())
#define gridDim (cusim::grid_size())
constexpr int warpSize = 32;

// ---- threads together ----

#define CUSIM_LINE unsigned line = __builtin_LINE()
CUSIM void __syncthreads(CUSIM_LINE) { cusim::barrier(false, line); }
CUSIM int __syncthreads_count(int vote, CUSIM_LINE) { return cusim::barrier(vote != 0, line); }
CUSIM int __syncthreads_or(int vote, CUSIM_LINE) { return cusim::barrier(vote != 0, line) > 0; }
CUSIM int __syncthreads_and(int vote, CUSIM_LINE) { return cusim::barrier(vote == 0, line) == 0; }
CUSIM void __syncwarp(unsigned mask = cusim::FULL, CUSIM_LINE) {
    cusim::collective(cusim::SYNCWARP, mask, 0, line);
}

namespace cusim {

CUSIM_SLOW void fail_source(unsigned source) {
    char text[96];
    snprintf(text, sizeof text, "a shuffle reads lane %u, which is not in its mask", source);
    fail_divergence(current->warp, text);
}

template <class T>
CUSIM T shuffle(unsigned mask, T value, unsigned source, unsigned line) {
    static_assert(sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof value);
    const uint64_t* all = collective(SHUFFLE, mask, bits, line);
    if (__builtin_expect(mask != FULL && !(mask >> source & 1), 0)) fail_source(source);
    T result;
    memcpy(&result, &all[source], sizeof result);
    return result;
}

CUSIM unsigned ballot(unsigned mask, int vote, unsigned line) {
    const uint64_t* all = collective(VOTE, mask, vote != 0, line);
    unsigned result = 0;
    for (int i = 0; i < LANES; i++) result |= unsigned(all[i] != 0) << i;
    return result & mask;
}

// A quarter of a product of matrices (mma.cuh): 8 rows, 8 columns, 4 words along k.
CUSIM int multiply_add(int a, int b, int c) {
    for (int i = 0; i < 32; i += 8) c += int8_t(a >> i) * int8_t(b >> i);
    return c;
}
CUSIM float multiply_add(float a, float b, float c) {  // of tf32: the low bits are not looked at
    uint32_t words[2];
    memcpy(&words[0], &a, 4), memcpy(&words[1], &b, 4);
    for (uint32_t& word : words) word &= 0xffffe000u;
    memcpy(&a, &words[0], 4), memcpy(&b, &words[1], 4);
    return c + a * b;
}
template <class T>
CUSIM void mma(T& c0, T& c1, T a, T b, unsigned line = __builtin_LINE()) {
    static_assert(sizeof(T) == 4, "a word");
    T mine[2] = {a, b};
    uint64_t bits;
    memcpy(&bits, mine, sizeof bits);
    const uint64_t* all = collective(SHUFFLE, FULL, bits, line);
    const unsigned g = current->lane / 4, q = current->lane % 4;
    for (int k = 0; k < 4; k++) {
        T row[2], first[2], second[2];
        memcpy(row, &all[4 * g + k], sizeof row);
        memcpy(first, &all[4 * (2 * q) + k], sizeof first);
        memcpy(second, &all[4 * (2 * q + 1) + k], sizeof second);
        c0 = multiply_add(row[0], first[1], c0);
        c1 = multiply_add(row[0], second[1], c1);
    }
}

}  // namespace cusim

// `width` lanes, a power of two, are a group; beyond its edge a lane gets its own value.
template <class T>
CUSIM T __shfl_sync(unsigned mask, T value, int source, int width = 32, CUSIM_LINE) {
    unsigned lane = cusim::current->lane;
    return cusim::shuffle(mask, value, (lane & -width) | (source & (width - 1)), line);
}
template <class T>
CUSIM T __shfl_xor_sync(unsigned mask, T value, int distance, int width = 32, CUSIM_LINE) {
    unsigned lane = cusim::current->lane, source = lane ^ distance;
    return cusim::shuffle(mask, value, source < (lane & -width) + width ? source : lane, line);
}
template <class T>
CUSIM T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = 32, CUSIM_LINE) {
    unsigned lane = cusim::current->lane;
    bool inside = (lane & (width - 1)) >= distance;
    return cusim::shuffle(mask, value, inside ? lane - distance : lane, line);
}
template <class T>
CUSIM T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = 32, CUSIM_LINE) {
    unsigned lane = cusim::current->lane;
    bool inside = (lane & (width - 1)) + distance < unsigned(width);
    return cusim::shuffle(mask, value, inside ? lane + distance : lane, line);
}
CUSIM unsigned __ballot_sync(unsigned mask, int vote, CUSIM_LINE) {
    return cusim::ballot(mask, vote, line);
}
CUSIM int __any_sync(unsigned mask, int vote, CUSIM_LINE) {
    return cusim::ballot(mask, vote, line) != 0;
}
CUSIM int __all_sync(unsigned mask, int vote, CUSIM_LINE) {
    return cusim::ballot(mask, vote, line) == mask;
}
CUSIM unsigned __activemask() = delete;  // says nothing that can be relied on

namespace cusim {
CUSIM void wait_for_predecessors() { current->has_waited = true; }
}

// ---- memory ----

#ifdef CUSIM_CHECK
#define CUSIM_TOUCH(p, access) cusim::touch(p, sizeof *(p), cusim::access, CUSIM_CALLER)
#else
#define CUSIM_TOUCH(p, access) (void)0
#endif

// Threads switch only where they wait: nothing comes between.
namespace cusim {
template <class T>
struct Same { using type = T; };  // a parameter that has no say in what T is
}
#define CUSIM_ATOMIC(name, combined)                      \
    template <class T>                                    \
    CUSIM T name(T* p, typename cusim::Same<T>::type x) { \
        CUSIM_TOUCH(p, ATOMIC);                           \
        T old = *p;                                       \
        *p = combined;                                    \
        return old;                                       \
    }
CUSIM_ATOMIC(atomicAdd, old + x)
CUSIM_ATOMIC(atomicSub, old - x)
CUSIM_ATOMIC(atomicExch, x)
CUSIM_ATOMIC(atomicMax, old < x ? x : old)
CUSIM_ATOMIC(atomicMin, x < old ? x : old)
CUSIM_ATOMIC(atomicOr, old | x)
CUSIM_ATOMIC(atomicAnd, old & x)
CUSIM_ATOMIC(atomicXor, old ^ x)
CUSIM_ATOMIC(atomicInc, old < x ? old + 1 : 0)
template <class T>
CUSIM T atomicCAS(T* p, typename cusim::Same<T>::type expected, typename cusim::Same<T>::type x) {
    CUSIM_TOUCH(p, ATOMIC);
    T old = *p;
    if (old == expected) *p = x;
    return old;
}
#ifdef CUSIM_CHECK
CUSIM void __threadfence() { cusim::fence(); }
#else
CUSIM void __threadfence() {}
#endif
CUSIM void __threadfence_block() {}
CUSIM void __threadfence_system() { __threadfence(); }
CUSIM void __nanosleep(unsigned) {}
template <class T> static __forceinline__ T __ldg(const T* p) { return *p; }
template <class T> static __forceinline__ T __ldcg(const T* p) { return *p; }
template <class T> static __forceinline__ T __ldcs(const T* p) { return *p; }

// ---- integers ----

CUSIM int __popc(unsigned x) { return __builtin_popcount(x); }
CUSIM int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
CUSIM int __ffs(int x) { return __builtin_ffs(x); }
CUSIM int __clz(int x) { return x ? __builtin_clz(x) : 32; }
CUSIM unsigned __brev(unsigned x) {
    unsigned result = 0;
    for (int i = 0; i < 32; i++) result |= (x >> i & 1) << (31 - i);
    return result;
}
template <class A, class B> CUSIM int cusim_dp4a(unsigned a, unsigned b, unsigned c) {
    for (int i = 0; i < 32; i += 8) c += unsigned(A(a >> i) * B(b >> i));
    return int(c);
}
CUSIM int __dp4a(int a, int b, int c) { return cusim_dp4a<signed char, signed char>(a, b, c); }
CUSIM unsigned __dp4a(unsigned a, unsigned b, unsigned c) {
    return cusim_dp4a<unsigned char, unsigned char>(a, b, c);
}
CUSIM unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
    uint64_t bytes = uint64_t(high) << 32 | low;
    unsigned result = 0;
    for (int i = 0; i < 4; i++) {
        unsigned s = selector >> 4 * i & 15, byte = bytes >> 8 * (s & 7) & 255;
        if (s & 8) byte = byte & 128 ? 255 : 0;  // its sign, repeated
        result |= byte << 8 * i;
    }
    return result;
}
template <class Op> CUSIM unsigned cusim_bytes(unsigned a, unsigned b, Op op) {
    unsigned result = 0;
    for (int i = 0; i < 32; i += 8) result |= (op(a >> i & 255, b >> i & 255) & 255u) << i;
    return result;
}
CUSIM unsigned __vsub4(unsigned a, unsigned b) {
    return cusim_bytes(a, b, [](unsigned x, unsigned y) { return x - y; });
}
CUSIM unsigned __vadd4(unsigned a, unsigned b) {
    return cusim_bytes(a, b, [](unsigned x, unsigned y) { return x + y; });
}
CUSIM unsigned __vsubss4(unsigned a, unsigned b) {
    return cusim_bytes(a, b, [](unsigned x, unsigned y) {
        int d = int(static_cast<signed char>(x)) - static_cast<signed char>(y);
        return unsigned(d < -128 ? -128 : d > 127 ? 127 : d);
    });
}
CUSIM unsigned __funnelshift_l(unsigned low, unsigned high, unsigned n) {
    return (uint64_t(high) << 32 | low) << (n & 31) >> 32;
}
CUSIM unsigned __funnelshift_r(unsigned low, unsigned high, unsigned n) {
    return (uint64_t(high) << 32 | low) >> (n & 31);
}
CUSIM int __mulhi(int a, int b) { return int((long long)a * b >> 32); }
CUSIM unsigned __umulhi(unsigned a, unsigned b) { return (uint64_t)a * b >> 32; }

// ---- numbers ----

// As in CUDA: of a number and a NaN, the number.
CUSIM float max(float a, float b) { return fmaxf(a, b); }
CUSIM float min(float a, float b) { return fminf(a, b); }
template <class A, class B> CUSIM auto max(A a, B b) {
    decltype(a + b) x = a, y = b;
    return x < y ? y : x;
}
template <class A, class B> CUSIM auto min(A a, B b) {
    decltype(a + b) x = a, y = b;
    return y < x ? y : x;
}
CUSIM float rsqrtf(float x) { return float(1.0 / sqrt(double(x))); }
// The C library has functions of these names, of its own.
#define __expf(x) expf(x)
#define __exp10f(x) powf(10.0f, x)
#define __logf(x) logf(x)
#define __log2f(x) log2f(x)
#define __log10f(x) log10f(x)
#define __powf(x, y) powf(x, y)
#define __sinf(x) sinf(x)
#define __cosf(x) cosf(x)
#define __tanhf(x) tanhf(x)
CUSIM float __fdividef(float a, float b) { return a / b; }
CUSIM float __fdiv_rn(float a, float b) { return a / b; }
CUSIM float __fadd_rn(float a, float b) { return a + b; }
CUSIM float __fsub_rn(float a, float b) { return a - b; }
CUSIM float __fmul_rn(float a, float b) { return a * b; }
CUSIM float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
CUSIM float __frcp_rn(float x) { return 1.0f / x; }
CUSIM float __fsqrt_rn(float x) { return sqrtf(x); }
CUSIM float __frsqrt_rn(float x) { return rsqrtf(x); }
CUSIM float __saturatef(float x) { return x > 0 ? (x < 1 ? x : 1) : 0; }
CUSIM float __int2float_rn(int x) { return float(x); }
CUSIM float __uint2float_rn(unsigned x) { return float(x); }
// Beyond the range of int: its end; NaN: 0.
CUSIM int cusim_int(float x) {
    return x >= 0x1p31f ? 0x7fffffff : x <= -0x1p31f ? int(0x80000000u) : x == x ? int(x) : 0;
}
CUSIM int __float2int_rn(float x) { return cusim_int(nearbyintf(x)); }
CUSIM int __float2int_rz(float x) { return cusim_int(x); }
CUSIM int __float2int_rd(float x) { return cusim_int(floorf(x)); }
CUSIM int __float2int_ru(float x) { return cusim_int(ceilf(x)); }
CUSIM float __int_as_float(int x) { return __builtin_bit_cast(float, x); }
CUSIM float __uint_as_float(unsigned x) { return __builtin_bit_cast(float, x); }
CUSIM int __float_as_int(float x) { return __builtin_bit_cast(int, x); }
CUSIM unsigned __float_as_uint(float x) { return __builtin_bit_cast(unsigned, x); }
