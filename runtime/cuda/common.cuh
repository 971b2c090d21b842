// What all kernels share: constants, argument types, half numbers, sums over warps and blocks.
//
// No CUDA header is included (NVRTC has none at hand). With CUSIM defined the same text is compiled
// for the CPU by the simulator of the tests; what needs a PTX instruction has a twin there.
#pragma once

constexpr int WARP = 32;                      // threads
constexpr unsigned ALL_LANES = 0xffffffffu;   // the mask of every shuffle and vote
constexpr int QK = 32;                        // activations in a block of Packed
constexpr int NEURON_BLOCK = 64;              // neurons that are resident, or not, together
constexpr int N_SPLITS = 32;                  // parts into which ffn_down cuts a list of neurons
constexpr int PAGE = 32;                      // positions in a page of the KV cache

// What a computed neuron is in Buffers.fired: 0 silent, FIRED, or HALF_FIRED (drelu: the gate
// fired, up did not).
constexpr unsigned char FIRED = 1, HALF_FIRED = 2;

// FFN activations, of the decider x. Of the first four a neuron is exactly silent for most tokens.
//   relu max(x, 0); fatrelu x < threshold ? 0 : x; drelu relu(gate) * relu(up); relu2 relu(x)^2
enum Activation { RELU, FATRELU, DRELU, RELU2, SILU, GELU };

// What becomes of a result r: y = r, y += r, y = max(r, 0).
enum Op { STORE, ADD, STORE_RELU };

// Weights [rows][cols] in two planes. d is null for f16 and f32.
//   q4_0  q [rows][cols / 32][16]: low nibble of byte j is weight j, its high one is j + 16;
//         d half [rows][cols / 32]
//   q8_0  q int8 [rows][cols / 32][32]; d half [rows][cols / 32]
//   q6_k  q [rows][cols / 256][192]: 128 bytes of low nibbles, 64 of upper bit pairs (formats.cuh);
//         d [rows][cols / 256][20]: 16 int8 scales, half d, 2 zero
//   f16, f32  q [rows][cols]
struct Matrix {
    const unsigned char* q;
    const unsigned char* d;
    int rows;
    int cols;
};

// Activations rounded to int8 in blocks of 32: x = q * d; s = sum of the block's q.
struct Packed {
    signed char* q;  // [n_tok][cols]
    float* d;        // [n_tok][cols / 32]
    int* s;          // [n_tok][cols / 32]
};

// Where q, k and v of tokens go, rotated: rope.cuh.
struct Rope {
    const int* counts;
    const int* rows;          // [n_tok]
    const int* positions;     // [n_tok]
    const int* pages;         // [n_seq][pages_cols]
    int pages_cols;
    int n_head, n_head_kv, head_dim;
    const float* table;       // [context][2][half]: cos and sin
    int half;                 // rope_dim / 2; 0: nothing is rotated
    int is_neox;              // pairs are (i, i + half), else (2i, 2i + 1)
    unsigned char* k_cache;   // the layer's, see cache.cuh
    unsigned char* v_cache;
};

__device__ inline int lane_id() { return threadIdx.x % WARP; }
__device__ inline int warp_id() { return threadIdx.x / WARP; }
__device__ inline float infinity() { return __int_as_float(0x7f800000); }

// Every kernel calls it before it looks at what other kernels write, or writes itself. From compute
// capability 9.0 on a kernel may begin while its predecessor still runs (programmatic dependent
// launch): here it waits for the end of that, which has waited for its own; and lets its successor
// begin. What lies before the call hides latency: of the launch, and of memory that never changes.
__device__ inline void after_predecessors() {
#ifdef CUSIM
    cusim::wait_for_predecessors();
#elif __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// A float in host memory, as it is now: not as a cache has it.
#ifdef CUSIM
inline float load_fresh(const float* p) { return *p; }
#else
__device__ inline float load_fresh(const float* p) { return __ldcv(p); }
#endif

// ---- half numbers, stored as unsigned short; rounding is to nearest even ----

#ifdef CUSIM

inline float half_to_float(unsigned short h) {
    // Exponents differ by 112; the product also makes subnormal halves normal.
    float magnitude = __builtin_bit_cast(float, (h & 0x7fffu) << 13) * 0x1p112f;
    unsigned bits = __builtin_bit_cast(unsigned, magnitude);
    if ((h & 0x7c00) == 0x7c00) bits |= 0x7f800000u;  // infinity, NaN
    return __builtin_bit_cast(float, bits | (h & 0x8000u) << 16);
}

inline unsigned short float_to_half(float x) {
    unsigned bits = __builtin_bit_cast(unsigned, x);
    unsigned sign = bits >> 16 & 0x8000u;
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u) return sign | 0x7fffu;   // NaN
    if (bits >= 0x477ff000u) return sign | 0x7c00u;  // from 65520 on: infinity
    if (bits < 0x38800000u) {  // a multiple of 2^-24, which is what the last bit of 0.5 is worth
        float sum = __builtin_bit_cast(float, bits) + 0.5f;
        return sign | (__builtin_bit_cast(unsigned, sum) - 0x3f000000u);
    }
    bits += 0xfffu + (bits >> 13 & 1);
    return sign | (bits - 0x38000000u) >> 13;
}

#else

__device__ inline float half_to_float(unsigned short h) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(h));
    return x;
}

__device__ inline unsigned short float_to_half(float x) {
    unsigned short h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(x));
    return h;
}

#endif

// ---- reductions: the same order every time, the result in every thread ----

__device__ inline float warp_sum(float x) {
    for (int distance = WARP / 2; distance > 0; distance /= 2) {
        x += __shfl_xor_sync(ALL_LANES, x, distance);
    }
    return x;
}

__device__ inline int warp_sum(int x) {
    for (int distance = WARP / 2; distance > 0; distance /= 2) {
        x += __shfl_xor_sync(ALL_LANES, x, distance);
    }
    return x;
}

__device__ inline float warp_max(float x) {
    for (int distance = WARP / 2; distance > 0; distance /= 2) {
        x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, distance));
    }
    return x;
}

// Sum over a block of THREADS threads, all of which must call it.
template <int THREADS, class T>
__device__ inline T block_sum(T x) {
    __shared__ T partial[THREADS / WARP];
    x = warp_sum(x);
    if (lane_id() == 0) partial[warp_id()] = x;
    __syncthreads();
    const T sum = warp_sum(lane_id() < THREADS / WARP ? partial[lane_id()] : T(0));
    __syncthreads();  // before the next call writes partial
    return sum;
}
