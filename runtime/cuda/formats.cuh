// Formats of weights: how a lane loads a piece of a row, and what a piece does with activations.
//
// A row is cut into units: what one lane takes at a time, LOADS loads of 16 bytes each, so that the
// lanes of a warp read consecutive bytes. A unit unpacks into VECTORS vectors of four words. In
// integer formats a word is four signed int8 weights that share the scale of their group; they
// meet activations rounded to int8 (Packed), by dp4a. In f16 and f32 a word is a float, and so are
// the activations.
//
//   Weights               a unit as loaded
//   load(w, row, unit)    from memory, each byte once
//   unpack(weights, out)  out[4 * VECTORS] words
//   scale(weights, group) of the VECTORS / GROUPS vectors of a group
//   column(unit, vector)  the column of the vector's first weight; the others follow it
//   D_BYTES               of the plane d, for 256 columns
//   PER_SCALE, IS_TF32    weights that share a scale; whether tf32 holds a weight exactly
#pragma once
#include "common.cuh"

// Loads of what a kernel reads once: such lines leave the caches first.
#ifdef CUSIM
template <class T> T load_once(const T* p) { return *p; }
#else
template <class T> __device__ inline T load_once(const T* p) { return __ldcs(p); }
#endif

// n as four signed bytes: each byte of `bytes` (below 128) less `offset`, without borrows.
__device__ inline int centred(unsigned bytes, unsigned offset) {
    return int(((bytes | 0x80808080u) - offset * 0x01010101u) ^ 0x80808080u);
}

// Signed byte j of a word as a float: 0x4b000000 | n are the bits of 2^23 + n.
__device__ inline float signed_byte(int word, int j) {
    const unsigned bits = __byte_perm(unsigned(word) ^ 0x80808080u, 0x4b000000u, 0x7540u | j);
    return __int_as_float(int(bits)) - float((1 << 23) + 128);
}

struct Q4_0 {
    using Word = int;
    static constexpr int UNIT = 32, LOADS = 1, VECTORS = 2, GROUPS = 1, D_BYTES = 16;
    static constexpr int PER_SCALE = 32;
    static constexpr bool IS_TF32 = false;
    struct Weights {
        int4 q;
        unsigned short d;
    };

    __device__ static Weights load(const Matrix& w, long long row, int unit) {
        const long long block = row * (w.cols / 32) + unit;
        return {load_once((const int4*)w.q + block), load_once((const unsigned short*)w.d + block)};
    }
    __device__ static void unpack(const Weights& w, int* out) {
        const unsigned q[4] = {unsigned(w.q.x), unsigned(w.q.y), unsigned(w.q.z), unsigned(w.q.w)};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            out[i] = centred(q[i] & 0x0f0f0f0fu, 8);
            out[4 + i] = centred(q[i] >> 4 & 0x0f0f0f0fu, 8);
        }
    }
    __device__ static float scale(const Weights& w, int) { return half_to_float(w.d); }
    __device__ static int column(int unit, int vector) { return 32 * unit + 16 * vector; }
};

struct Q8_0 {  // half a block a unit
    using Word = int;
    static constexpr int UNIT = 16, LOADS = 1, VECTORS = 1, GROUPS = 1, D_BYTES = 16;
    static constexpr int PER_SCALE = 32;
    static constexpr bool IS_TF32 = false;
    struct Weights {
        int4 q;
        unsigned short d;
    };

    __device__ static Weights load(const Matrix& w, long long row, int unit) {
        const long long block = row * (w.cols / 32) + unit / 2;
        return {load_once((const int4*)w.q + 2 * block + unit % 2),
                load_once((const unsigned short*)w.d + block)};
    }
    __device__ static void unpack(const Weights& w, int* out) {
        out[0] = w.q.x, out[1] = w.q.y, out[2] = w.q.z, out[3] = w.q.w;
    }
    __device__ static float scale(const Weights& w, int) { return half_to_float(w.d); }
    __device__ static int column(int unit, int) { return 16 * unit; }
};

// A block of 256 weights is two halves of 128. Of half h, for l = 0 to 31:
//   weight l        low nibble of ql[64 h + l],       bits 0-1 of qh[32 h + l]
//   weight l + 32   low nibble of ql[64 h + 32 + l],  bits 2-3
//   weight l + 64   high nibble of ql[64 h + l],      bits 4-5
//   weight l + 96   high nibble of ql[64 h + 32 + l], bits 6-7
// A unit is 16 of the l: four to a block, four groups of 16 weights each.
struct Q6_K {
    using Word = int;
    static constexpr int UNIT = 64, LOADS = 3, VECTORS = 4, GROUPS = 4, D_BYTES = 20;
    static constexpr int PER_SCALE = 16;
    static constexpr bool IS_TF32 = false;
    struct Weights {
        int4 first, second, upper;  // of ql, ql + 32, qh
        int scales[2];              // of the half: int8 [8]
        unsigned short d;
        short part;                // which 16 of the l
    };

    __device__ static Weights load(const Matrix& w, long long row, int unit) {
        const long long block = row * (w.cols / 256) + unit / 4;
        const int half = unit / 2 % 2, part = unit % 2;
        const int4* q = (const int4*)w.q + 12 * block;
        const int* d = (const int*)w.d + 5 * block;
        Weights weights;
        weights.first = load_once(q + 4 * half + part);
        weights.second = load_once(q + 4 * half + 2 + part);
        weights.upper = load_once(q + 8 + 2 * half + part);
        weights.scales[0] = load_once(d + 2 * half);
        weights.scales[1] = load_once(d + 2 * half + 1);
        weights.d = load_once((const unsigned short*)(d + 4));
        weights.part = short(part);
        return weights;
    }
    __device__ static void unpack(const Weights& w, int* out) {
        const int first[4] = {w.first.x, w.first.y, w.first.z, w.first.w};
        const int second[4] = {w.second.x, w.second.y, w.second.z, w.second.w};
        const int upper[4] = {w.upper.x, w.upper.y, w.upper.z, w.upper.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const unsigned a = first[i], b = second[i], u = upper[i];
            out[i] = centred((a & 0x0f0f0f0fu) | (u << 4 & 0x30303030u), 32);
            out[4 + i] = centred((b & 0x0f0f0f0fu) | (u << 2 & 0x30303030u), 32);
            out[8 + i] = centred((a >> 4 & 0x0f0f0f0fu) | (u & 0x30303030u), 32);
            out[12 + i] = centred((b >> 4 & 0x0f0f0f0fu) | (u >> 2 & 0x30303030u), 32);
        }
    }
    __device__ static float scale(const Weights& w, int group) {
        const int shift = 16 * (group % 2) + 8 * w.part;  // scale 2 * group + part of the half
        return half_to_float(w.d) * float((signed char)(w.scales[group / 2] >> shift));
    }
    __device__ static int column(int unit, int vector) {
        return 128 * (unit / 2) + 32 * vector + 16 * (unit % 2);
    }
};

struct F16 {
    using Word = float;
    static constexpr int UNIT = 8, LOADS = 1, VECTORS = 2, D_BYTES = 0;
    static constexpr bool IS_TF32 = true;
    struct Weights {
        int4 q;
    };

    // Rows of cols % 8 != 0 are not aligned: one weight at a time; what lies beyond a row is 0.
    __device__ static Weights load(const Matrix& w, long long row, int unit) {
        const unsigned short* q = (const unsigned short*)w.q + row * w.cols + 8 * unit;
        if (w.cols % 8 == 0) return {load_once((const int4*)q)};
        unsigned words[4] = {0, 0, 0, 0};
#pragma unroll
        for (int i = 0; i < 8; i++) {
            if (8 * unit + i < w.cols) words[i / 2] |= unsigned(load_once(q + i)) << 16 * (i % 2);
        }
        return {make_int4(int(words[0]), int(words[1]), int(words[2]), int(words[3]))};
    }
    __device__ static void unpack(const Weights& w, float* out) {
        const unsigned q[4] = {unsigned(w.q.x), unsigned(w.q.y), unsigned(w.q.z), unsigned(w.q.w)};
#pragma unroll
        for (int i = 0; i < 8; i++) {
            out[i] = half_to_float((unsigned short)(q[i / 2] >> 16 * (i % 2)));
        }
    }
    __device__ static int column(int unit, int vector) { return 8 * unit + 4 * vector; }
};

// Four floats of a row of `cols`, from `column` on; what lies beyond the row is 0.
__device__ inline float4 load4(const float* row, int column, int cols) {
    if (cols % 4 == 0) {
        return column < cols ? *(const float4*)(row + column) : make_float4(0, 0, 0, 0);
    }
    float x[4];
#pragma unroll
    for (int i = 0; i < 4; i++) x[i] = column + i < cols ? row[column + i] : 0;
    return make_float4(x[0], x[1], x[2], x[3]);
}

struct F32 {
    using Word = float;
    static constexpr int UNIT = 4, LOADS = 1, VECTORS = 1, D_BYTES = 0;
    static constexpr bool IS_TF32 = false;
    struct Weights {
        float4 q;
    };

    __device__ static Weights load(const Matrix& w, long long row, int unit) {
        const float* q = (const float*)w.q + row * w.cols;
        if (w.cols % 4 == 0) return {load_once((const float4*)q + unit)};
        return {load4(q, 4 * unit, w.cols)};
    }
    __device__ static void unpack(const Weights& w, float* out) {
        out[0] = w.q.x, out[1] = w.q.y, out[2] = w.q.z, out[3] = w.q.w;
    }
    __device__ static int column(int unit, int) { return 4 * unit; }
};

// ---- weights and activations ----

// The activations of all tokens: what integer formats read, and what float formats read.
struct Input {
    const float* x;   // [n_tok][cols]
    Packed packed;
    int cols;

    __device__ Input token(long long t) const {
        const int blocks = cols / QK;
        return {x + t * cols,
                {packed.q + t * cols, packed.d + t * blocks, packed.s + t * blocks},
                cols};
    }
};

// How a unit of format F meets one token's activations, and how it is added to a row of floats.
template <class F, class Word = typename F::Word> struct Meet;

template <class F> struct Meet<F, int> {
    struct Inputs {
        int4 q[F::VECTORS];
        float d[F::GROUPS];
    };
    static constexpr int PER_GROUP = F::VECTORS / F::GROUPS;  // vectors

    __device__ static Inputs inputs(const Input& x, int unit) {
        Inputs in;
#pragma unroll
        for (int v = 0; v < F::VECTORS; v++) {
            in.q[v] = *(const int4*)(x.packed.q + F::column(unit, v));
        }
#pragma unroll
        for (int g = 0; g < F::GROUPS; g++) {
            in.d[g] = x.packed.d[F::column(unit, g * PER_GROUP) / QK];
        }
        return in;
    }
    __device__ static float dot(const typename F::Weights& weights, const Inputs& in) {
        int words[4 * F::VECTORS];
        F::unpack(weights, words);
        float sum = 0;
#pragma unroll
        for (int g = 0; g < F::GROUPS; g++) {
            int products = 0;
#pragma unroll
            for (int v = g * PER_GROUP; v < (g + 1) * PER_GROUP; v++) {
                products = __dp4a(words[4 * v], in.q[v].x, products);
                products = __dp4a(words[4 * v + 1], in.q[v].y, products);
                products = __dp4a(words[4 * v + 2], in.q[v].z, products);
                products = __dp4a(words[4 * v + 3], in.q[v].w, products);
            }
            sum = fmaf(F::scale(weights, g) * in.d[g], float(products), sum);
        }
        return sum;
    }
    __device__ static void add(float a, const typename F::Weights& weights, float* y) {
        int words[4 * F::VECTORS];
        F::unpack(weights, words);
#pragma unroll
        for (int e = 0; e < F::UNIT; e++) {
            const float scale = a * F::scale(weights, e / (F::UNIT / F::GROUPS));
            y[e] = fmaf(scale, signed_byte(words[e / 4], e % 4), y[e]);
        }
    }
    __device__ static void floats(const typename F::Weights& weights, float* out) {
#pragma unroll
        for (int e = 0; e < F::UNIT; e++) out[e] = 0;
        add(1, weights, out);
    }
};

// The same in fewer instructions: a nibble n at bit b of a word, with the bits of 2^23
// above it, is the float 2^23 + n * 2^b. That takes b <= 16.
template <>
__device__ inline void Meet<Q4_0, int>::add(float a, const Q4_0::Weights& w, float* y) {
    const float scale = a * half_to_float(w.d);
    const int q[4] = {w.q.x, w.q.y, w.q.z, w.q.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const unsigned nibbles[2] = {(unsigned(q[i]) & 0xfffffu) | 0x4b000000u,  // five of eight
                                     unsigned(q[i]) >> 20 | 0x4b000000u};
#pragma unroll
        for (int k = 0; k < 8; k++) {  // byte k / 2, low nibble or high
            const int bit = 4 * (k % 5);
            const float power = float(1 << bit);
            const int bits = int(nibbles[k / 5] & (0x4b000000u | 15u << bit));
            const float weight = __int_as_float(bits) - (8388608 + 8 * power);
            float& sum = y[4 * i + k / 2 + 16 * (k % 2)];
            sum = fmaf(scale / power, weight, sum);
        }
    }
}

template <class F> struct Meet<F, float> {
    struct Inputs {
        float4 x[F::VECTORS];
    };

    __device__ static Inputs inputs(const Input& x, int unit) {
        Inputs in;
#pragma unroll
        for (int v = 0; v < F::VECTORS; v++) in.x[v] = load4(x.x, F::column(unit, v), x.cols);
        return in;
    }
    __device__ static float dot(const typename F::Weights& weights, const Inputs& in) {
        float words[F::UNIT];
        F::unpack(weights, words);
        float sum = 0;
#pragma unroll
        for (int v = 0; v < F::VECTORS; v++) {
            sum = fmaf(words[4 * v], in.x[v].x, sum);
            sum = fmaf(words[4 * v + 1], in.x[v].y, sum);
            sum = fmaf(words[4 * v + 2], in.x[v].z, sum);
            sum = fmaf(words[4 * v + 3], in.x[v].w, sum);
        }
        return sum;
    }
    __device__ static void add(float a, const typename F::Weights& weights, float* y) {
        float words[F::UNIT];
        F::unpack(weights, words);
#pragma unroll
        for (int e = 0; e < F::UNIT; e++) y[e] = fmaf(a, words[e], y[e]);
    }
    __device__ static void floats(const typename F::Weights& weights, float* out) {
        F::unpack(weights, out);
    }
};

template <class F> __device__ inline int units(int cols) { return (cols + F::UNIT - 1) / F::UNIT; }

// Asks for `count` rows, from `first` on, before their time: each lane for other lines of caches.
template <class F> __device__ inline void prefetch_rows(const Matrix& w, int first, int count) {
#if !defined(CUSIM) && __CUDA_ARCH__ >= 900  // elsewhere there is nothing to do meanwhile
    const auto ask = [&](const unsigned char* plane, long long row_bytes) {
        const unsigned char* rows = plane + first * row_bytes;
        for (int at = 128 * lane_id(); at < count * row_bytes; at += 128 * WARP) {
            asm volatile("prefetch.global.L2 [%0];" ::"l"(rows + at));
        }
    };
    ask(w.q, (long long)w.cols * 16 * F::LOADS / F::UNIT);
    if (F::D_BYTES) ask(w.d, (long long)w.cols * F::D_BYTES / 256);
#endif
}

// How many units of each of ROWS rows a lane loads before it uses the first: 64 bytes in flight.
template <class F, int ROWS>
constexpr int AHEAD = ROWS * F::LOADS < 4 ? 4 / (ROWS * F::LOADS) : 1;

// sums[r] = w[rows[r]] . x, in every lane of the warp. Lane l takes the units l, l + 32, ... in
// turn, so the order of the sum depends on cols alone.
template <class F, int ROWS>
__device__ inline void dot_rows(const Matrix& w, const int (&rows)[ROWS], const Input& x,
                                float (&sums)[ROWS]) {
    constexpr int N = AHEAD<F, ROWS>;
    const int n_units = units<F>(w.cols);
#pragma unroll
    for (int r = 0; r < ROWS; r++) sums[r] = 0;
    for (int first = lane_id(); first < n_units; first += WARP * N) {
        typename F::Weights weights[N][ROWS];
#pragma unroll
        for (int i = 0; i < N; i++) {
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                const int unit = first + i * WARP;
                if (unit < n_units) weights[i][r] = F::load(w, rows[r], unit);
            }
        }
#pragma unroll
        for (int i = 0; i < N; i++) {
            const int unit = first + i * WARP;
            if (unit < n_units) {
                const auto in = Meet<F>::inputs(x, unit);
#pragma unroll
                for (int r = 0; r < ROWS; r++) sums[r] += Meet<F>::dot(weights[i][r], in);
            }
        }
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) sums[r] = warp_sum(sums[r]);
}

