// Tiles of matrix products for several tokens: 64 rows of weights by 128 tokens a block, or by 32
// where there are no more.
//
// A step goes 128 bytes along k (LINE): 128 weights of int8, 32 floats. The block unpacks that much
// of each row and each token into shared memory; a warp then multiplies 32 rows by 32 tokens in
// registers, on tensor cores. While it does, the next step's weights are on their way into
// registers. Sums go along k in steps, in an order fixed by k alone: a token's results depend
// neither on the other tokens nor on how many there are.
//
// What bounds it, for 32 bytes along k of a warp's 32 x 32 sums; an SM has four such warps at a
// time, one in each quarter. Fragments are 2 KiB of shared memory: 16 cycles, 64 for all four.
//   int8: 8 products, each with 12 instructions that make its exact sums floats and scale them;
//     with all else 130 cycles of instructions. Tensor cores take 32 to 52.
//   f16: 16 products of 8 columns, 32 to 52 cycles; 68 of instructions, 32 of which split tokens in
//     two. Shared memory is as busy.
//   others: 24 products, 48 to 78 cycles; 126 of instructions, as weights are split as well.
#pragma once
#include "formats.cuh"
#include "mma.cuh"

constexpr int TILE_THREADS = 256, TILE_ROWS = 64;
constexpr int MANY = 128, FEW = 32;  // tokens of a tile
constexpr int LINE = 8;              // vectors of 16 bytes of a row in a step

template <class Word> struct Vectors;
template <> struct Vectors<int> {
    using Type = int4;
    static constexpr int K = 16 * LINE;  // weights of a row in a step
    __device__ static int4 make(const int* x) { return make_int4(x[0], x[1], x[2], x[3]); }
};
template <> struct Vectors<float> {
    using Type = float4;
    static constexpr int K = 4 * LINE;
    __device__ static float4 make(const float* x) { return make_float4(x[0], x[1], x[2], x[3]); }
};

// One step in shared memory. Paddings put what a warp reads or writes at once on all 32 banks.
template <class Word> struct Tile {
    typename Vectors<Word>::Type rows[TILE_ROWS][LINE + 1];
    typename Vectors<Word>::Type tokens[MANY][LINE + 1];
    float row_scales[LINE][TILE_ROWS + 4];   // int8 only: one for each vector
    float token_scales[LINE / 2][MANY + 8];  // one for each block of 32
};

// How many turns the block's threads take at n jobs: thread t has t, t + TILE_THREADS, ...
__device__ constexpr int turns(int n) { return (n + TILE_THREADS - 1) / TILE_THREADS; }
__device__ inline int job_of(int turn) { return threadIdx.x + turn * TILE_THREADS; }

// Who brings what: fetch(k) loads the thread's share of the step at k into registers, store(tile)
// unpacks it into shared memory.

// Rows of w, from first_row on; rows beyond the last repeat it.
template <class F> struct RowsOf {
    using Word = typename F::Word;
    static constexpr int K = Vectors<Word>::K, UNITS = K / F::UNIT;  // of a row in a step
    // Threads that share a row, side by side, and their units of it, next to each other.
    static constexpr int MOST = TILE_THREADS / TILE_ROWS, SHARING = UNITS < MOST ? UNITS : MOST;
    static constexpr int SHARE = UNITS / SHARING;

    const Matrix& w;
    int row;  // of w
    typename F::Weights weights[SHARE];

    __device__ RowsOf(const Matrix& w, int first_row)
        : w(w), row(min(first_row + my_row(), w.rows - 1)) {}
    __device__ int n_k() const { return w.cols; }
    __device__ static int my_row() { return threadIdx.x / SHARING; }  // of the tile
    __device__ static int my_unit(int i) { return threadIdx.x % SHARING * SHARE + i; }
    __device__ static bool has_row() { return SHARING == MOST || my_row() < TILE_ROWS; }

    __device__ void fetch(int k) {
#pragma unroll
        for (int i = 0; i < SHARE; i++) {
            const int unit = k / F::UNIT + my_unit(i);
            weights[i] = {};
            if (has_row() && unit < units<F>(w.cols)) weights[i] = F::load(w, row, unit);
        }
    }
    __device__ void store(Tile<Word>& tile) const {
        if (!has_row()) return;
#pragma unroll
        for (int i = 0; i < SHARE; i++) {
            Word words[4 * F::VECTORS];
            F::unpack(weights[i], words);
#pragma unroll
            for (int v = 0; v < F::VECTORS; v++) {
                const int place = F::column(my_unit(i), v) * LINE / K;
                tile.rows[my_row()][place] = Vectors<Word>::make(words + 4 * v);
                store_scale(tile, weights[i], my_row(), place, v);
            }
        }
    }
    __device__ static void store_scale(Tile<int>& tile, const typename F::Weights& weights,
                                       int row, int place, int vector) {
        tile.row_scales[place][row] = F::scale(weights, vector * F::GROUPS / F::VECTORS);
    }
    __device__ static void store_scale(Tile<float>&, const typename F::Weights&, int, int, int) {}
};

// Columns of w, from first_column on, as rows of a tile of floats. k runs along rows of w:
// row_of(k) says which one; -1: zeros. n_rows is a multiple of 32.
//
// A job is a piece of a row: a unit, but of a format of integers one vector of it. Then several
// threads load the same unit, and none has much more to unpack than others.
template <class F, class RowOf> struct ColumnsOf {
    static constexpr int K = Vectors<float>::K, PIECE = F::UNIT < 16 ? F::UNIT : 16;  // columns
    static constexpr int JOBS = K * TILE_ROWS / PIECE, SHARE = turns(JOBS);

    const Matrix& w;
    const RowOf& row_of;
    int n_rows, first_column;
    typename F::Weights weights[SHARE];

    __device__ ColumnsOf(const Matrix& w, const RowOf& row_of, int n_rows, int first_column)
        : w(w), row_of(row_of), n_rows(n_rows), first_column(first_column) {}
    __device__ int n_k() const { return n_rows; }
    // Lanes take neighbouring k: they store to neighbouring words.
    __device__ static int my_k(int i) { return job_of(i) % K; }
    __device__ static int my_piece(int i) { return job_of(i) / K * PIECE; }  // its first column
    __device__ int my_unit(int i) const {
        const int column = first_column + my_piece(i);
        // Two units of q6_k share 128 columns, 16 by 16 in turns.
        return F::UNIT == 64 ? column / 128 * 2 + column / 16 % 2 : column / F::UNIT;
    }

    __device__ void fetch(int k) {
#pragma unroll
        for (int i = 0; i < SHARE; i++) {
            weights[i] = {};
            if (job_of(i) < JOBS && my_unit(i) < units<F>(w.cols)) {
                const int row = row_of(k + my_k(i));
                if (row >= 0) weights[i] = F::load(w, row, my_unit(i));
            }
        }
    }
    __device__ void store(Tile<float>& tile) const {
#pragma unroll
        for (int i = 0; i < SHARE; i++) {
            if (job_of(i) >= JOBS) continue;
            float x[PIECE];
            unpack(weights[i], my_unit(i), first_column + my_piece(i), x);
#pragma unroll
            for (int c = 0; c < PIECE; c++) {
                float* line = (float*)tile.rows[my_piece(i) + c];
                line[my_k(i)] = x[c];
            }
        }
    }
    // The unit's weights from `column` on.
    __device__ static void unpack(const typename F::Weights& weights, int unit, int column,
                                  float (&x)[PIECE]) {
        typename F::Word words[4 * F::VECTORS];
        F::unpack(weights, words);
        if constexpr (PIECE < 16) {
#pragma unroll
            for (int c = 0; c < PIECE; c++) x[c] = words[c];
        } else {
            float scale = 0;
            int piece[PIECE / 4];
#pragma unroll
            for (int v = 0; v < F::VECTORS; v++) {
                if (v > 0 && F::column(unit, v) != column) continue;
                scale = F::scale(weights, v * F::GROUPS / F::VECTORS);
#pragma unroll
                for (int j = 0; j < PIECE / 4; j++) piece[j] = words[4 * v + j];
            }
#pragma unroll
            for (int c = 0; c < PIECE; c++) x[c] = scale * signed_byte(piece[c / 4], c % 4);
        }
    }
};

// The activations of TOKENS tokens from first_token on, of those that there are; else 0.
template <class Word, int TOKENS> struct TokensOf;

template <int TOKENS> struct TokensOf<float, TOKENS> {
    static constexpr int SHARE = turns(TOKENS * LINE), APART = TILE_THREADS / LINE;

    const float* x;   // of the tile's first token
    int cols, n_tok;  // n_tok: from the first on
    float4 mine[SHARE];

    __device__ TokensOf(const Input& x, int first_token, int n_tok)
        : x(x.x + (long long)first_token * x.cols), cols(x.cols), n_tok(n_tok - first_token) {}
    __device__ static int my_token(int i) { return threadIdx.x / LINE + i * APART; }
    __device__ static int my_vector() { return threadIdx.x % LINE; }

    __device__ void fetch(int k) {
#pragma unroll
        for (int i = 0; i < SHARE; i++) {
            const int t = my_token(i);
            mine[i] = make_float4(0, 0, 0, 0);
            if (t < n_tok) mine[i] = load4(x + t * cols, k + my_vector() * 4, cols);
        }
    }
    __device__ void store(Tile<float>& tile) const {
#pragma unroll
        for (int i = 0; i < SHARE; i++) tile.tokens[my_token(i)][my_vector()] = mine[i];
    }
};

template <int TOKENS> struct TokensOf<int, TOKENS> {
    static constexpr int SHARE = turns(TOKENS * LINE), APART = TILE_THREADS / LINE;
    static constexpr int SCALES = LINE / 2;  // of a token in a step
    static constexpr int SCALE_SHARE = turns(TOKENS * SCALES), SCALES_APART = TILE_THREADS / SCALES;

    const signed char* q;  // of the tile's first token
    const float* d;
    int cols, n_tok;  // n_tok: from the first on
    int4 mine[SHARE];
    float scales[SCALE_SHARE];

    __device__ TokensOf(const Input& x, int first_token, int n_tok)
        : q(x.packed.q + (long long)first_token * x.cols),
          d(x.packed.d + (long long)first_token * (x.cols / QK)),
          cols(x.cols),
          n_tok(n_tok - first_token) {}
    __device__ static int my_token(int i) { return threadIdx.x / LINE + i * APART; }
    __device__ static int my_vector() { return threadIdx.x % LINE; }
    __device__ static int scale_token(int i) { return threadIdx.x / SCALES + i * SCALES_APART; }
    __device__ static bool has_scale(int i) {
        return TOKENS >= SCALES_APART * (i + 1) || scale_token(i) < TOKENS;
    }
    __device__ static int my_scale() { return threadIdx.x % SCALES; }

    __device__ void fetch(int k) {
        const int column = k + my_vector() * 16;
#pragma unroll
        for (int i = 0; i < SHARE; i++) {
            const int t = my_token(i);
            mine[i] = make_int4(0, 0, 0, 0);
            if (t < n_tok && column < cols) mine[i] = *(const int4*)(q + t * cols + column);
        }
        const int block = k / QK + my_scale(), blocks = cols / QK;
#pragma unroll
        for (int i = 0; i < SCALE_SHARE; i++) {
            const int t = scale_token(i);
            scales[i] = 0;
            if (has_scale(i) && t < n_tok && block < blocks) scales[i] = d[t * blocks + block];
        }
    }
    __device__ void store(Tile<int>& tile) const {
#pragma unroll
        for (int i = 0; i < SHARE; i++) tile.tokens[my_token(i)][my_vector()] = mine[i];
#pragma unroll
        for (int i = 0; i < SCALE_SHARE; i++) {
            if (has_scale(i)) tile.token_scales[my_scale()][scale_token(i)] = scales[i];
        }
    }
};

// What of a tile a warp multiplies: M times 16 rows by N times 8 tokens, in fragments of mma.cuh.
template <int TOKENS> struct Part {
    static constexpr int M = TOKENS == MANY ? 2 : 1, N = TOKENS == MANY ? 4 : 2;
    static constexpr int ACROSS = TILE_ROWS / (16 * M);  // warps that share their tokens
    static_assert(TILE_THREADS / WARP / ACROSS * 8 * N == TOKENS, "warps take all of the tile");
    using Sums = float[M][N][4];

    const int first_row = warp_id() % ACROSS * 16 * M, first_token = warp_id() / ACROSS * 8 * N;

    // Of element e of a thread's 4 sums: e / 2 is half, e % 2 is next.
    __device__ int row(int i, int half) const {
        return first_row + 16 * i + 8 * half + lane_id() / 4;
    }
    __device__ int token(int j, int next) const {
        return first_token + 8 * j + lane_id() % 4 * 2 + next;
    }
    // Fragments of 16 rows at vectors v and v + 1.
    template <class Word>
    __device__ void load_rows(const Tile<Word>& tile, int v, int i, Word (&a)[4]) const {
        const int row = first_row + 16 * i + lane_id() % 16;
        load_matrices(a, &tile.rows[row][v + lane_id() / 16]);
    }
    // Of 8 tokens, those of j and those of j + 1.
    template <class Word>
    __device__ void load_tokens(const Tile<Word>& tile, int v, int j, Word (&b)[2][2]) const {
        const int token = first_token + 8 * j + lane_id() / 16 * 8 + lane_id() % 8;
        Word both[4];
        load_matrices(both, &tile.tokens[token][v + lane_id() / 8 % 2]);
        b[0][0] = both[0], b[0][1] = both[1], b[1][0] = both[2], b[1][1] = both[3];
    }
};

// 1.5 * 2^23: the bits of this float, plus an integer below 2^22 in magnitude, are the bits of this
// float plus that integer. Sums that begin with it are floats without a conversion.
constexpr int FLOAT_BITS = 0x4b400000;
constexpr float FLOAT_OFFSET = 12582912;

// sums[i][j] += the step's products of the part's rows and tokens.
template <class F, int TOKENS>
__device__ inline void multiply(const Tile<int>& tile, const Part<TOKENS>& part,
                                typename Part<TOKENS>::Sums& sums) {
    constexpr int M = Part<TOKENS>::M, N = Part<TOKENS>::N;
    constexpr int GROUPS = QK / F::PER_SCALE;
#pragma unroll 1
    for (int v = 0; v < LINE; v += 2) {
        int a[M][4], b[2][2];
#pragma unroll
        for (int i = 0; i < M; i++) part.load_rows(tile, v, i, a[i]);
#pragma unroll
        for (int g = 0; g < GROUPS; g++) {
            float scale[M][2];
#pragma unroll
            for (int i = 0; i < 2 * M; i++) {
                scale[i / 2][i % 2] = tile.row_scales[v + g][part.row(i / 2, i % 2)];
            }
#pragma unroll
            for (int j = 0; j < N; j++) {
                if (j % 2 == 0) part.load_tokens(tile, v, j, b);
                const float2 d = *(const float2*)&tile.token_scales[v / 2][part.token(j, 0)];
#pragma unroll
                for (int i = 0; i < M; i++) {
                    int products[4] = {FLOAT_BITS, FLOAT_BITS, FLOAT_BITS, FLOAT_BITS};
                    if (GROUPS == 1) mma(products, a[i], b[j % 2]);
                    else mma_half(products, a[i][2 * g], a[i][2 * g + 1], b[j % 2][g]);
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        const float both = scale[i][e / 2] * (e % 2 ? d.y : d.x);
                        const float exact = __int_as_float(products[e]) - FLOAT_OFFSET;
                        sums[i][j][e] = fmaf(both, exact, sums[i][j][e]);
                    }
                }
            }
        }
    }
}

// Fragments along k that are multiplied before tensor cores' sums are added to ours: as many as
// registers have room for. On Blackwell two of f16 spill.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int DEEPEST = 1;
#else
constexpr int DEEPEST = 2;
#endif

// Splits each x in two: x becomes the high part.
template <int N, int W> __device__ inline void split(float (&x)[N][W], float (&low)[N][W]) {
#pragma unroll
    for (int i = 0; i < N * W; i++) split(x[i / W][i % W], x[i / W][i % W], low[i / W][i % W]);
}

// Tensor cores read the upper 11 bits of a float, so each is split in two, x = high + low:
//     w . x = w_high . x_high + w_high . x_low + w_low . x_high, and at most 2^-20 left out.
// f16 has no w_low. Tensor cores round towards zero when they add, so that the error of a long sum
// would grow with its length: they add no more than 16 columns.
template <class F, int TOKENS>
__device__ inline void multiply_tf32(const Tile<float>& tile, const Part<TOKENS>& part,
                                     typename Part<TOKENS>::Sums& sums) {
    constexpr int M = Part<TOKENS>::M, N = Part<TOKENS>::N;
    constexpr int DEEP = F::IS_TF32 ? DEEPEST : 1;  // times 8 columns
#pragma unroll 1
    for (int v = 0; v < LINE; v += 2 * DEEP) {
        float a[DEEP][M][4], a_low[DEEP][M][4], b[DEEP][2][2], b_low[DEEP][2][2];
#pragma unroll
        for (int k = 0; k < DEEP; k++) {
#pragma unroll
            for (int i = 0; i < M; i++) part.load_rows(tile, v + 2 * k, i, a[k][i]);
            if (!F::IS_TF32) split(a[k], a_low[k]);
        }
#pragma unroll
        for (int j = 0; j < N; j++) {
#pragma unroll
            for (int k = 0; k < DEEP && j % 2 == 0; k++) {
                part.load_tokens(tile, v + 2 * k, j, b[k]);
                split(b[k], b_low[k]);
            }
#pragma unroll
            for (int i = 0; i < M; i++) {
                float products[4] = {};
#pragma unroll
                for (int k = 0; k < DEEP; k++) {
                    if (!F::IS_TF32) mma(products, a_low[k][i], b[k][j % 2]);
                    mma(products, a[k][i], b_low[k][j % 2]);
                    mma(products, a[k][i], b[k][j % 2]);
                }
#pragma unroll
                for (int e = 0; e < 4; e++) sums[i][j][e] += products[e];
            }
        }
    }
}

// The same one by one, for GPUs whose tensor cores have no tf32.
template <int TOKENS>
__device__ inline void multiply_floats(const Tile<float>& tile, const Part<TOKENS>& part,
                                       typename Part<TOKENS>::Sums& sums) {
    constexpr int M = Part<TOKENS>::M, N = Part<TOKENS>::N;
#pragma unroll 1
    for (int v = 0; v < LINE; v++) {
        float4 w[M][2];
#pragma unroll
        for (int i = 0; i < 2 * M; i++) w[i / 2][i % 2] = tile.rows[part.row(i / 2, i % 2)][v];
#pragma unroll
        for (int j = 0; j < 2 * N; j++) {
            const float4 x = tile.tokens[part.token(j / 2, j % 2)][v];
#pragma unroll
            for (int i = 0; i < 2 * M; i++) {
                const float4& row = w[i / 2][i % 2];
                float& sum = sums[i / 2][j / 2][i % 2 * 2 + j % 2];
                sum = fmaf(row.x, x.x, sum);
                sum = fmaf(row.y, x.y, sum);
                sum = fmaf(row.z, x.z, sum);
                sum = fmaf(row.w, x.w, sum);
            }
        }
    }
}

template <class F, int TOKENS>
__device__ inline void multiply(const Tile<float>& tile, const Part<TOKENS>& part,
                                typename Part<TOKENS>::Sums& sums) {
    if constexpr (HAS_TF32) multiply_tf32<F>(tile, part, sums);
    else multiply_floats(tile, part, sums);
}

// What the block has computed, where each of its threads can read it: [token][row]. The padding
// puts the 4 x 2 tokens by 8 rows that a warp writes together on all banks.
using Results = float[MANY][TILE_ROWS + 4];

// A block's shared memory, the same for tiles of many tokens and of few.
template <class Word> union TileMemory {
    Tile<Word> tile;
    Results results;
};
template <class Word> __device__ inline TileMemory<Word>& tile_memory() {
    __shared__ TileMemory<Word> shared;
    return shared;
}

// Returns rows . tokens over all of k. The whole block calls it; the next call overwrites. F says
// what the weights are.
template <class F, class Word, int TOKENS, class Rows>
__device__ inline const Results& multiply_all(Rows rows, TokensOf<Word, TOKENS> tokens) {
    TileMemory<Word>& memory = tile_memory<Word>();
    Tile<Word>& tile = memory.tile;
    const Part<TOKENS> part;
    const bool has_tokens = part.first_token < tokens.n_tok;  // the warp
    typename Part<TOKENS>::Sums sums = {};
    constexpr int K = Vectors<Word>::K;
    // Weights come from memory, tokens from a cache. With many tokens there are no registers for
    // these a step ahead, nor for more than 32 bytes of those (q8_0, q6_k).
    constexpr bool IS_AHEAD = TOKENS == FEW || sizeof rows.weights <= 32;
    const int n_k = rows.n_k();
    if (IS_AHEAD) rows.fetch(0);
    for (int k = 0; k < n_k; k += K) {
        if (!IS_AHEAD) rows.fetch(k);
        tokens.fetch(k);
        __syncthreads();  // what was there before has been read
        rows.store(tile);
        tokens.store(tile);
        __syncthreads();
        if (IS_AHEAD && k + K < n_k) rows.fetch(k + K);
        if (has_tokens) multiply<F>(tile, part, sums);
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < Part<TOKENS>::M; i++) {
#pragma unroll
        for (int j = 0; j < Part<TOKENS>::N; j++) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                memory.results[part.token(j, e % 2)][part.row(i, e / 2)] = sums[i][j][e];
            }
        }
    }
    __syncthreads();
    return memory.results;
}

// Returns [t][r] = w[first_row + r] . x[first_token + t].
template <class F, int TOKENS>
__device__ inline const Results& rows_times_tokens(const Matrix& w, int first_row, const Input& x,
                                                   int first_token, int n_tok) {
    using Word = typename F::Word;
    return multiply_all<F>(RowsOf<F>(w, first_row),
                           TokensOf<Word, TOKENS>(x, first_token, n_tok));
}

// How a block goes through its results: neighbouring threads have neighbouring rows of one token.
//     for (int job = threadIdx.x; job < n_results<TOKENS>(n_tok, first_token); job += TILE_THREADS)
//         const int row = job % TILE_ROWS, token = job / TILE_ROWS;
template <int TOKENS> __device__ inline int n_results(int n_tok, int first_token) {
    return min(n_tok - first_token, TOKENS) * TILE_ROWS;
}
