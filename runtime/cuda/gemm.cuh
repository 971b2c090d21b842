// Tiles of matrix products for several tokens: ROWS rows of weights by TOKENS tokens a block.
//
// A step goes 128 bytes along k (LINE): 128 weights of int8, 32 floats. The block unpacks that much
// of each row and each token into shared memory; a thread then multiplies 4 rows by 4 tokens in
// registers, 16 products for every 8 reads of shared memory. While it does, the next step's weights
// are on their way into registers. Sums go along k in steps, in an order fixed by k alone: a
// token's results depend neither on the other tokens nor on how many there are.
#pragma once
#include "formats.cuh"

constexpr int TILE_THREADS = 128, TILE_ROWS = 64, TILE_TOKENS = 32;
constexpr int LINE = 8;        // vectors of 16 bytes of a row in a step
constexpr int MINE = 4;        // rows, and tokens, of a thread: every 16th, every 8th
constexpr int ROWS_APART = 16, TOKENS_APART = 8;

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

// One step in shared memory. A vector of padding a row: neighbours fall on other banks.
template <class Word> struct Tile {
    typename Vectors<Word>::Type rows[TILE_ROWS][LINE + 1];
    typename Vectors<Word>::Type tokens[TILE_TOKENS][LINE + 1];
    float row_scales[TILE_ROWS][LINE];          // int8 only: one for each vector
    float token_scales[TILE_TOKENS][LINE / 2];  // one for each block of 32
};

// Who brings what: fetch(k) loads the thread's share of the step at k into registers, store(tile)
// unpacks it into shared memory.

// Rows of w, from first_row on; rows beyond the last repeat it.
template <class F> struct RowsOf {
    using Word = typename F::Word;
    static constexpr int K = Vectors<Word>::K, UNITS = K / F::UNIT;  // of a row in a step
    static constexpr int SHARE = TILE_ROWS * UNITS / TILE_THREADS;

    const Matrix& w;
    int first_row;
    typename F::Weights weights[SHARE];

    __device__ RowsOf(const Matrix& w, int first_row) : w(w), first_row(first_row) {}
    __device__ int n_k() const { return w.cols; }

    __device__ void fetch(int k) {
#pragma unroll
        for (int i = 0; i < SHARE; i++) {
            const int job = threadIdx.x + i * TILE_THREADS;
            const int row = min(first_row + job / UNITS, w.rows - 1);
            const int unit = k / F::UNIT + job % UNITS;
            weights[i] = {};
            if (unit < units<F>(w.cols)) weights[i] = F::load(w, row, unit);
        }
    }
    __device__ void store(Tile<Word>& tile) const {
#pragma unroll
        for (int i = 0; i < SHARE; i++) {
            const int job = threadIdx.x + i * TILE_THREADS;
            Word words[4 * F::VECTORS];
            F::unpack(weights[i], words);
#pragma unroll
            for (int v = 0; v < F::VECTORS; v++) {
                const int place = F::column(job % UNITS, v) * LINE / K;
                tile.rows[job / UNITS][place] = Vectors<Word>::make(words + 4 * v);
                store_scale(tile, weights[i], job / UNITS, place, v);
            }
        }
    }
    __device__ static void store_scale(Tile<int>& tile, const typename F::Weights& weights,
                                       int row, int place, int vector) {
        tile.row_scales[row][place] = F::scale(weights, vector * F::GROUPS / F::VECTORS);
    }
    __device__ static void store_scale(Tile<float>&, const typename F::Weights&, int, int, int) {}
};

// Columns of w, from first_column on, as rows of a tile of floats. k runs along rows of w:
// row_of(k) says which one; -1: zeros. n_rows is a multiple of 32.
template <class F, class RowOf> struct ColumnsOf {
    static constexpr int K = Vectors<float>::K;
    // Units that hold the tile's columns: of q6_k they hold twice as many.
    static constexpr int SPAN = F::UNIT == 64 ? 128 : TILE_ROWS, UNITS = SPAN / F::UNIT;
    static constexpr int SHARE = (K * UNITS + TILE_THREADS - 1) / TILE_THREADS;
    static constexpr int PER_VECTOR = F::UNIT / F::VECTORS;  // columns

    const Matrix& w;
    const RowOf& row_of;
    int n_rows, first_column;
    typename F::Weights weights[SHARE];

    __device__ ColumnsOf(const Matrix& w, const RowOf& row_of, int n_rows, int first_column)
        : w(w), row_of(row_of), n_rows(n_rows), first_column(first_column) {}
    __device__ int n_k() const { return n_rows; }
    // Lanes take neighbouring k: they store to neighbouring words.
    __device__ static int my_k(int i) { return (threadIdx.x + i * TILE_THREADS) % K; }
    __device__ int my_unit(int i) const {
        return first_column / SPAN * UNITS + (threadIdx.x + i * TILE_THREADS) / K;
    }
    __device__ static bool has(int i) { return threadIdx.x + i * TILE_THREADS < K * UNITS; }

    __device__ void fetch(int k) {
#pragma unroll
        for (int i = 0; i < SHARE; i++) {
            weights[i] = {};
            if (has(i) && my_unit(i) < units<F>(w.cols)) {
                const int row = row_of(k + my_k(i));
                if (row >= 0) weights[i] = F::load(w, row, my_unit(i));
            }
        }
    }
    __device__ void store(Tile<float>& tile) const {
#pragma unroll
        for (int i = 0; i < SHARE; i++) {
            float x[F::UNIT];
            Meet<F>::floats(weights[i], x);
#pragma unroll
            for (int v = 0; v < F::VECTORS; v++) {
                const int column = F::column(my_unit(i), v) - first_column;
                if (!has(i) || column < 0 || column >= TILE_ROWS) continue;
#pragma unroll
                for (int c = 0; c < PER_VECTOR; c++) {
                    float* line = (float*)tile.rows[column + c];
                    line[my_k(i)] = x[v * PER_VECTOR + c];
                }
            }
        }
    }
};

// The activations of the tokens from first_token on; 0 for what is no token.
template <class Word> struct TokensOf;

template <> struct TokensOf<float> {
    static constexpr int SHARE = TILE_TOKENS * LINE / TILE_THREADS;

    const Input& x;
    int first_token, n_tok;
    float4 mine[SHARE];

    __device__ TokensOf(const Input& x, int first_token, int n_tok)
        : x(x), first_token(first_token), n_tok(n_tok) {}

    __device__ void fetch(int k) {
#pragma unroll
        for (int i = 0; i < SHARE; i++) {
            const int job = threadIdx.x + i * TILE_THREADS;
            const long long t = first_token + job / LINE;
            mine[i] = make_float4(0, 0, 0, 0);
            if (t < n_tok) mine[i] = load4(x.x + t * x.cols, k + job % LINE * 4, x.cols);
        }
    }
    __device__ void store(Tile<float>& tile) const {
#pragma unroll
        for (int i = 0; i < SHARE; i++) {
            const int job = threadIdx.x + i * TILE_THREADS;
            tile.tokens[job / LINE][job % LINE] = mine[i];
        }
    }
};

template <> struct TokensOf<int> {
    static constexpr int SHARE = TILE_TOKENS * LINE / TILE_THREADS, SCALES = LINE / 2;

    const Input& x;
    int first_token, n_tok;
    int4 mine[SHARE];
    float scale;  // TILE_TOKENS * SCALES are TILE_THREADS: one a thread

    __device__ TokensOf(const Input& x, int first_token, int n_tok)
        : x(x), first_token(first_token), n_tok(n_tok) {}

    __device__ void fetch(int k) {
#pragma unroll
        for (int i = 0; i < SHARE; i++) {
            const int job = threadIdx.x + i * TILE_THREADS;
            const long long t = first_token + job / LINE;
            const int column = k + job % LINE * 16;
            mine[i] = make_int4(0, 0, 0, 0);
            if (t < n_tok && column < x.cols) {
                mine[i] = *(const int4*)(x.packed.q + t * x.cols + column);
            }
        }
        const long long t = first_token + threadIdx.x / SCALES;
        const int block = k / QK + threadIdx.x % SCALES, blocks = x.cols / QK;
        scale = t < n_tok && block < blocks ? x.packed.d[t * blocks + block] : 0;
    }
    __device__ void store(Tile<int>& tile) const {
#pragma unroll
        for (int i = 0; i < SHARE; i++) {
            const int job = threadIdx.x + i * TILE_THREADS;
            tile.tokens[job / LINE][job % LINE] = mine[i];
        }
        tile.token_scales[threadIdx.x / SCALES][threadIdx.x % SCALES] = scale;
    }
};

// Where in the tile a thread's 4 x 4 sums lie.
__device__ inline int my_row(int i) { return threadIdx.x / TOKENS_APART + i * ROWS_APART; }
__device__ inline int my_token(int j) { return threadIdx.x % TOKENS_APART + j * TOKENS_APART; }

using Sums = float[MINE][MINE];  // [row][token]

// sums[i][j] += the step's products of row i and token j. PER_SCALE: vectors that share a scale.
template <int PER_SCALE> __device__ inline void multiply(const Tile<int>& tile, Sums& sums) {
#pragma unroll 1
    for (int first = 0; first < LINE; first += PER_SCALE) {
        int products[MINE][MINE] = {};
#pragma unroll 1  // registers: with both vectors' reads ahead some would spill
        for (int v = first; v < first + PER_SCALE; v++) {
            int4 w[MINE];
#pragma unroll
            for (int i = 0; i < MINE; i++) w[i] = tile.rows[my_row(i)][v];
#pragma unroll
            for (int j = 0; j < MINE; j++) {
                const int4 x = tile.tokens[my_token(j)][v];
#pragma unroll
                for (int i = 0; i < MINE; i++) {
                    products[i][j] = __dp4a(w[i].x, x.x, products[i][j]);
                    products[i][j] = __dp4a(w[i].y, x.y, products[i][j]);
                    products[i][j] = __dp4a(w[i].z, x.z, products[i][j]);
                    products[i][j] = __dp4a(w[i].w, x.w, products[i][j]);
                }
            }
        }
#pragma unroll
        for (int i = 0; i < MINE; i++) {
            const float scale = tile.row_scales[my_row(i)][first];
#pragma unroll
            for (int j = 0; j < MINE; j++) {
                const float both = scale * tile.token_scales[my_token(j)][first / 2];
                sums[i][j] = fmaf(both, float(products[i][j]), sums[i][j]);
            }
        }
    }
}

template <int> __device__ inline void multiply(const Tile<float>& tile, Sums& sums) {
#pragma unroll 2
    for (int v = 0; v < LINE; v++) {
        float4 w[MINE];
#pragma unroll
        for (int i = 0; i < MINE; i++) w[i] = tile.rows[my_row(i)][v];
#pragma unroll
        for (int j = 0; j < MINE; j++) {
            const float4 x = tile.tokens[my_token(j)][v];
#pragma unroll
            for (int i = 0; i < MINE; i++) {
                sums[i][j] = fmaf(w[i].x, x.x, sums[i][j]);
                sums[i][j] = fmaf(w[i].y, x.y, sums[i][j]);
                sums[i][j] = fmaf(w[i].z, x.z, sums[i][j]);
                sums[i][j] = fmaf(w[i].w, x.w, sums[i][j]);
            }
        }
    }
}

// What the block has computed, where each of its threads can read it: [token][row]. The padding
// puts the 8 x 4 results that a warp writes together on 32 banks.
using Results = float[TILE_TOKENS][TILE_ROWS + 4];

// Returns rows . tokens over all of k. The whole block calls it; the next call overwrites.
template <class Word, int PER_SCALE, class Rows>
__device__ inline const Results& multiply_all(Rows rows, TokensOf<Word> tokens) {
    __shared__ union {
        Tile<Word> tile;
        Results results;
    } shared;
    Sums sums = {};
    rows.fetch(0);
    tokens.fetch(0);
    const int n_k = rows.n_k();
    for (int k = 0; k < n_k; k += Vectors<Word>::K) {
        __syncthreads();  // what was there before has been read
        rows.store(shared.tile);
        tokens.store(shared.tile);
        __syncthreads();
        if (k + Vectors<Word>::K < n_k) {
            rows.fetch(k + Vectors<Word>::K);
            tokens.fetch(k + Vectors<Word>::K);
        }
        multiply<PER_SCALE>(shared.tile, sums);
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < MINE; i++) {
#pragma unroll
        for (int j = 0; j < MINE; j++) shared.results[my_token(j)][my_row(i)] = sums[i][j];
    }
    __syncthreads();
    return shared.results;
}

// Returns [t][r] = w[first_row + r] . x[first_token + t].
template <class F>
__device__ inline const Results& rows_times_tokens(const Matrix& w, int first_row, const Input& x,
                                                   int first_token, int n_tok) {
    constexpr int PER_SCALE = F::UNIT == 64 ? 1 : 2;  // q6_k has a scale for every 16 weights
    using Word = typename F::Word;
    return multiply_all<Word, PER_SCALE>(RowsOf<F>(w, first_row),
                                         TokensOf<Word>(x, first_token, n_tok));
}

// How a block goes through its results: neighbouring threads have neighbouring rows of one token.
//     for (int job = threadIdx.x; job < TILE_RESULTS; job += TILE_THREADS) {
//         const int row = job % TILE_ROWS, token = job / TILE_ROWS;
constexpr int TILE_RESULTS = TILE_ROWS * TILE_TOKENS;
