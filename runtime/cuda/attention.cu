// Attention of a token to its own sequence up to itself, in float32, over the paged cache.
//
//   a[t] = softmax(q[t] . K * scale) V     for each query head; n_head / n_head_kv share a kv head
//
// A token that is the only one of its sequence in a step (decoding) is for attend_split, which cuts
// its context into SPLITs, so that a long one occupies the whole GPU, and attend_combine. Tokens of
// a prompt's chunk are for attend_tile, which reads a page once for many of them. Which of the two
// computes a token, and in what order, follows from its own sequence alone: its neighbours of other
// sequences do not change a bit, nor do, in a chunk, those of its own.
#include "cache.cuh"
#include "pack.cuh"

constexpr int ATTEND_WARPS = 8;
constexpr int ATTEND_THREADS = ATTEND_WARPS * WARP;
constexpr int MAX_HEAD_DIM = 256;

// Whether token t is the only one of its sequence in this step: tokens of one lie side by side.
__device__ inline bool is_alone(const int* rows, int n_tok, int t) {
    return (t == 0 || rows[t - 1] != rows[t]) && (t + 1 == n_tok || rows[t + 1] != rows[t]);
}

// ---- one token, in splits of its context ----

constexpr int SPLIT = ATTEND_WARPS * PAGE;  // positions: a page for each warp
constexpr int HEADS = 8;                    // query heads of a block
constexpr int QUAD = 4;                     // lanes that share the rows of K

struct attend_split_args {
    const int* counts;             // Step.counts
    const int* rows;               // [n_tok]
    const int* positions;          // [n_tok]
    const int* pages;              // [n_seq][pages_cols]
    int pages_cols;
    const float* q;                // [n_tok][q_stride], n_head * head_dim of them
    int q_stride;
    const unsigned char* k_cache;  // the layer's, see cache.cuh
    const unsigned char* v_cache;
    int n_head, n_head_kv;
    int head_dim;                  // at most 256
    float scale;                   // 1 / sqrt(head_dim)
    int alone_only;                // leave tokens that are not alone in the step to attend_tile
    float* sums;                   // [n_tok][n_head][n_splits][head_dim]
    float* peaks;                  // [n_tok][n_head][n_splits]
    float* totals;                 // [n_tok][n_head][n_splits]
};

// Of each split s: peak = max of the scores, total = sum of exp(score - peak), and
// sums = sum of exp(score - peak) * V.   A block is a token, a split, and up to 8 query heads.
// Bytes: K and V of the split, once for each 8 of the query heads that share them (in these, again
// from the L2 cache); 4 * (head_dim + 2) written for each head.
//
// A warp has a page. For K a quad of lanes reads a row, a lane every fourth piece, four rows at a
// time, so that what it reads of q serves four rows: 4 loads of 16 bytes a lane are in flight. For
// V a lane keeps its 8 dimensions of all heads, and as many rows are read at once as fill the warp.
//
// launch: grid (n_splits, n_head_kv * ceil(n_head / n_head_kv / 8), n_tok), block 256
template <class T> __device__ inline void attend_split(const attend_split_args& p) {
    __shared__ alignas(16) float query[HEADS][MAX_HEAD_DIM];
    __shared__ alignas(16) float weights[ATTEND_WARPS][PAGE][HEADS];
    __shared__ alignas(16) float parts[ATTEND_WARPS][WARP * PIECE];  // of a head
    __shared__ float peaks[HEADS][ATTEND_WARPS], totals[HEADS][ATTEND_WARPS];

    const int t = blockIdx.z, n_tok = p.counts[0], begin = blockIdx.x * SPLIT;
    if (t >= n_tok || begin > p.positions[t]) return;
    if (p.alone_only && !is_alone(p.rows, n_tok, t)) return;
    const int group = p.n_head / p.n_head_kv, blocks = (group + HEADS - 1) / HEADS;
    const int kv_head = blockIdx.y / blocks, in_group = blockIdx.y % blocks * HEADS;
    const int first_head = kv_head * group + in_group, heads = min(HEADS, group - in_group);
    const int head_dim = p.head_dim, pieces = n_pieces(head_dim), lane = lane_id();

    const float* q = p.q + (long long)t * p.q_stride + (long long)first_head * head_dim;
    for (int i = threadIdx.x; i < heads * MAX_HEAD_DIM; i += ATTEND_THREADS) {
        const int head = i / MAX_HEAD_DIM, d = i % MAX_HEAD_DIM;
        query[head][d] = d < head_dim ? q[head * head_dim + d] : 0;
    }
    __syncthreads();

    const int start = begin + warp_id() * PAGE;  // of the warp's page
    const int n_seen = min(PAGE, p.positions[t] + 1 - start);  // may be <= 0
    const T *k = nullptr, *v = nullptr;  // [PAGE][head_dim]
    if (n_seen > 0) {
        const int* pages = p.pages + (long long)p.rows[t] * p.pages_cols;
        const long long at = cache_index(pages, start, kv_head, p.n_head_kv, head_dim);
        k = (const T*)p.k_cache + at, v = (const T*)p.v_cache + at;
    }

    // Lane l works on the rows l / 4 + 8 r.
    float scores[HEADS][QUAD];
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
#pragma unroll
        for (int r = 0; r < QUAD; r++) scores[h][r] = 0;
    }
    for (int piece = lane % QUAD; piece < pieces && n_seen > 0; piece += QUAD) {
        float keys[QUAD][PIECE];
#pragma unroll
        for (int r = 0; r < QUAD; r++) {
            // Rows that are not seen may hold anything: the last one that is stands in for them.
            const int row = min(lane / QUAD + r * (WARP / QUAD), n_seen - 1);
            load_piece(k + row * head_dim, piece, head_dim, keys[r]);
        }
#pragma unroll
        for (int h = 0; h < HEADS; h++) {
            if (h >= heads) break;
            float part[PIECE];
            load_wide(&query[h][PIECE * piece], part);
#pragma unroll
            for (int r = 0; r < QUAD; r++) {
#pragma unroll
                for (int i = 0; i < PIECE; i++) {
                    scores[h][r] = fmaf(part[i], keys[r][i], scores[h][r]);
                }
            }
        }
    }
    // From here on lane l has the row l / 4 + 8 (l % 4).
    const int own = lane / QUAD + lane % QUAD * (WARP / QUAD);
    float score[HEADS] = {};  // of heads that are not there: 0
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
        if (h >= heads) break;
#pragma unroll
        for (int r = 0; r < QUAD; r++) {
            float sum = scores[h][r];
            sum += __shfl_xor_sync(ALL_LANES, sum, 1);
            sum += __shfl_xor_sync(ALL_LANES, sum, 2);
            if (r == lane % QUAD) score[h] = sum * p.scale;
        }
        const float peak = warp_max(own < n_seen ? score[h] : -infinity());
        if (lane == 0) peaks[h][warp_id()] = peak;
    }
    __syncthreads();
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
        if (h >= heads) break;
        float peak = peaks[h][0];  // of the split; the first page always has a position
        for (int w = 1; w < ATTEND_WARPS; w++) peak = fmaxf(peak, peaks[h][w]);
        score[h] = own < n_seen ? expf(score[h] - peak) : 0;  // a weight from here on
        const float total = warp_sum(score[h]);
        if (lane == 0) totals[h][warp_id()] = total;
    }
    store_wide(score, weights[warp_id()][own]);
    __syncwarp();

    // Lane l has the piece l % pieces, of the rows l / pieces + i * at_once.
    const int at_once = WARP / pieces, piece = lane % pieces;
    float sums[HEADS][PIECE];
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
#pragma unroll
        for (int i = 0; i < PIECE; i++) sums[h][i] = 0;
    }
    if (lane < at_once * pieces) {
#pragma unroll 4
        for (int row = lane / pieces; row < n_seen; row += at_once) {
            float values[PIECE], weight[HEADS];
            load_piece(v + row * head_dim, piece, head_dim, values);
            load_wide(weights[warp_id()][row], weight);
#pragma unroll
            for (int h = 0; h < HEADS; h++) {
                if (h >= heads) break;
#pragma unroll
                for (int i = 0; i < PIECE; i++) {
                    sums[h][i] = fmaf(weight[h], values[i], sums[h][i]);
                }
            }
        }
    }
    const long long at = ((long long)t * p.n_head + first_head) * gridDim.x + blockIdx.x;
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
        if (h >= heads) break;
        const long long part = at + (long long)h * gridDim.x;
#pragma unroll
        for (int i = 0; i < PIECE; i++) parts[warp_id()][PIECE * lane + i] = sums[h][i];
        __syncthreads();
        const int d = threadIdx.x;
        if (d < head_dim) {
            float sum = 0;
            for (int w = 0; w < ATTEND_WARPS; w++) {
                for (int r = 0; r < at_once; r++) sum += parts[w][r * pieces * PIECE + d];
            }
            p.sums[part * head_dim + d] = sum;
        }
        if (d == 0) {
            float peak = peaks[h][0], total = totals[h][0];
            for (int w = 1; w < ATTEND_WARPS; w++) {
                peak = fmaxf(peak, peaks[h][w]);
                total += totals[h][w];
            }
            p.peaks[part] = peak;
            p.totals[part] = total;
        }
        __syncthreads();
    }
}

extern "C" __global__ void __launch_bounds__(256, 2) attend_split_f16(const attend_split_args p) {
    attend_split<unsigned short>(p);
}
extern "C" __global__ void __launch_bounds__(256, 2) attend_split_f32(const attend_split_args p) {
    attend_split<float>(p);
}

struct attend_combine_args {
    const int* counts;
    const int* rows;
    const int* positions;
    const float* sums;    // of attend_split
    const float* peaks;
    const float* totals;
    int n_splits;         // attend_split's grid
    int n_head, head_dim;
    int alone_only;
    float* a;             // [n_tok][n_head * head_dim]
    Packed packed;        // the same rounded; null if not wanted; n_head * head_dim % 32 == 0
};

// a[t] = sum over s of e^(peak[s] - peak) sums[s] / sum over s of e^(peak[s] - peak) totals[s],
// peak their largest; s are the splits that the token's context has, in order.
// Bytes a token: n_splits * n_head * (head_dim + 2) * 4 read, n_head * head_dim * 5.25 written.
//
// launch: grid (ceil(n_head * head_dim / 256), n_tok), block 256
extern "C" __global__ void __launch_bounds__(256) attend_combine(const attend_combine_args p) {
    const int t = blockIdx.y, n_tok = p.counts[0], cols = p.n_head * p.head_dim;
    const int i = blockIdx.x * 256 + threadIdx.x;
    if (t >= n_tok || i - lane_id() >= cols) return;
    if (p.alone_only && !is_alone(p.rows, n_tok, t)) return;
    const int n_splits = p.positions[t] / SPLIT + 1;
    float y = 0;
    if (i < cols) {
        const long long at = ((long long)t * p.n_head + i / p.head_dim) * p.n_splits;
        const float* sums = p.sums + at * p.head_dim + i % p.head_dim;
        float peak = p.peaks[at], sum = 0, total = 0;
        for (int s = 1; s < n_splits; s++) peak = fmaxf(peak, p.peaks[at + s]);
#pragma unroll 4
        for (int s = 0; s < n_splits; s++) {
            const float factor = expf(p.peaks[at + s] - peak);
            sum = fmaf(factor, sums[(long long)s * p.head_dim], sum);
            total = fmaf(factor, p.totals[at + s], total);
        }
        y = sum / total;
        p.a[(long long)t * cols + i] = y;
    }
    if (p.packed.q) pack_block<1>({y}, p.packed, ((long long)t * cols + i) / QK);
}

// ---- several tokens of a sequence ----

constexpr int TILE_FLOATS = 4096;  // of q that a block holds
constexpr int STAGE_DIMS = 128;    // dimensions of a page that it holds at a time

struct attend_tile_args {
    const int* counts;
    const int* rows;
    const int* positions;
    const int* pages;
    int pages_cols;
    const float* q;                // [n_tok][q_stride], n_head * head_dim of them
    int q_stride;
    const unsigned char* k_cache;
    const unsigned char* v_cache;
    int n_head, n_head_kv;
    int head_dim;                  // at most 256
    float scale;
    float* a;                      // [n_tok][n_head * head_dim]
};

// What the warps of a block share.
struct Tile {
    float q[TILE_FLOATS];                      // [queries][dimensions]
    float stage[PAGE][STAGE_DIMS + 4];         // of K or V; the 4 keep rows off each other's banks
    float weights[ATTEND_WARPS][4][PAGE];      // [queries of a warp]
};

// tile.stage = dimensions from `from` on of the first n rows of a page, then zeros: to the end of
// the page, and to a multiple of WARP dimensions, as many as are read at a time.
template <class T>
__device__ inline void stage(Tile& tile, const T* page, int n, int from, int head_dim) {
    constexpr int AT_ONCE = WARP / PIECE;
    const int first = from / PIECE, there = n_pieces(head_dim) - first;
    const int pieces = min((there + AT_ONCE - 1) / AT_ONCE * AT_ONCE, STAGE_DIMS / PIECE);
    __syncthreads();  // the last one has been read
    for (int i = threadIdx.x; i < PAGE * pieces; i += ATTEND_THREADS) {
        const int row = i / pieces, piece = i % pieces;
        float x[PIECE] = {0};
        if (row < n && piece < there) load_piece(page + row * head_dim, first + piece, head_dim, x);
        store_wide(x, &tile.stage[row][PIECE * piece]);
    }
    __syncthreads();
}

// The tokens first to end - 1, of one sequence, of a block's queries from `begin` on.
// STAGES: ceil(head_dim / STAGE_DIMS). A warp has QUERIES queries.
template <class T, int QUERIES, int STAGES>
__device__ inline void attend_run(const attend_tile_args& p, Tile& tile, int first, int end,
                                  int begin, int kv_head) {
    constexpr int N = ATTEND_WARPS * QUERIES, WIDTH = TILE_FLOATS / N;
    constexpr int SHARES = STAGE_DIMS / WARP;  // dimensions of V that a lane has
    const int head_dim = p.head_dim, group = p.n_head / p.n_head_kv, lane = lane_id();
    const int* pages = p.pages + (long long)p.rows[first] * p.pages_cols;
    const int length = p.positions[end - 1] + 1;
    const int mine = warp_id() * QUERIES;

    int n_seen[QUERIES];  // positions that a query sees; 0: it is of another run
    float peak[QUERIES], total[QUERIES], sums[QUERIES][STAGES][SHARES];
#pragma unroll
    for (int i = 0; i < QUERIES; i++) {
        const int t = (begin + mine + i) / group;
        n_seen[i] = first <= t && t < end ? p.positions[t] + 1 : 0;
        peak[i] = -3.0e38f, total[i] = 0;
#pragma unroll
        for (int s = 0; s < STAGES; s++) {
#pragma unroll
            for (int j = 0; j < SHARES; j++) sums[i][s][j] = 0;
        }
    }
    for (int start = 0; start < length; start += PAGE) {
        const int n = min(PAGE, length - start);
        const long long at = cache_index(pages, start, kv_head, p.n_head_kv, head_dim);
        float scores[QUERIES];  // of row `lane`
#pragma unroll
        for (int i = 0; i < QUERIES; i++) scores[i] = 0;
#pragma unroll
        for (int s = 0; s < STAGES; s++) {
            const int dims = min(PIECE * n_pieces(head_dim) - s * STAGE_DIMS, STAGE_DIMS);
            stage(tile, (const T*)p.k_cache + at, n, s * STAGE_DIMS, head_dim);
#pragma unroll 2  // registers: by four some would spill
            for (int d = 0; d < dims; d += 4) {
                const float4 k = *(const float4*)&tile.stage[lane][d];
#pragma unroll
                for (int i = 0; i < QUERIES; i++) {
                    const int where = (mine + i) * WIDTH + s * STAGE_DIMS + d;
                    const float4 q = *(const float4*)&tile.q[where];
                    scores[i] = fmaf(q.x, k.x, scores[i]);
                    scores[i] = fmaf(q.y, k.y, scores[i]);
                    scores[i] = fmaf(q.z, k.z, scores[i]);
                    scores[i] = fmaf(q.w, k.w, scores[i]);
                }
            }
        }
#pragma unroll
        for (int i = 0; i < QUERIES; i++) {
            // A page of which the query sees nothing leaves all as it is: factor 1, weights 0.
            const bool is_seen = start + lane < n_seen[i];
            const float score = is_seen ? scores[i] * p.scale : -3.0e38f;
            const float before = peak[i];
            peak[i] = fmaxf(before, warp_max(score));
            const float weight = is_seen ? expf(score - peak[i]) : 0;
            const float factor = expf(before - peak[i]);
            total[i] = fmaf(total[i], factor, warp_sum(weight));
            tile.weights[warp_id()][i][lane] = weight;
#pragma unroll
            for (int s = 0; s < STAGES; s++) {
#pragma unroll
                for (int j = 0; j < SHARES; j++) sums[i][s][j] *= factor;
            }
        }
#pragma unroll
        for (int s = 0; s < STAGES; s++) {
            const int dims = min(head_dim - s * STAGE_DIMS, STAGE_DIMS);
            stage(tile, (const T*)p.v_cache + at, n, s * STAGE_DIMS, head_dim);
            for (int row = 0; row < n; row += 4) {
                float4 weight[QUERIES];
#pragma unroll
                for (int i = 0; i < QUERIES; i++) {
                    weight[i] = *(const float4*)&tile.weights[warp_id()][i][row];
                }
#pragma unroll
                for (int j = 0; j < SHARES; j++) {
                    if (j * WARP >= dims) break;
                    const float* v = &tile.stage[row][j * WARP + lane];
                    constexpr int NEXT = STAGE_DIMS + 4;
                    const float v0 = v[0], v1 = v[NEXT], v2 = v[2 * NEXT], v3 = v[3 * NEXT];
#pragma unroll
                    for (int i = 0; i < QUERIES; i++) {
                        float& sum = sums[i][s][j];
                        sum = fmaf(weight[i].x, v0, sum);
                        sum = fmaf(weight[i].y, v1, sum);
                        sum = fmaf(weight[i].z, v2, sum);
                        sum = fmaf(weight[i].w, v3, sum);
                    }
                }
            }
        }
    }
#pragma unroll
    for (int i = 0; i < QUERIES; i++) {
        const int query = begin + mine + i, t = query / group;
        const int head = kv_head * group + query % group;
        float* a = p.a + ((long long)t * p.n_head + head) * head_dim;
        if (n_seen[i] == 0) continue;
#pragma unroll
        for (int s = 0; s < STAGES; s++) {
#pragma unroll
            for (int j = 0; j < SHARES; j++) {
                const int d = s * STAGE_DIMS + j * WARP + lane;
                if (d < head_dim) a[d] = sums[i][s][j] / total[i];
            }
        }
    }
}

template <class T, int QUERIES, int STAGES>
__device__ inline void attend_tile(const attend_tile_args& p, Tile& tile) {
    constexpr int N = ATTEND_WARPS * QUERIES, WIDTH = TILE_FLOATS / N;
    const int n_tok = p.counts[0], group = p.n_head / p.n_head_kv, kv_head = blockIdx.y;
    // The last tiles have most to read: they go first, so that none runs on alone at the end.
    const int begin = (gridDim.x - 1 - blockIdx.x) * N;
    if (begin >= n_tok * group) return;
    const int end = min(begin + N, n_tok * group);
    for (int i = threadIdx.x; i < TILE_FLOATS; i += ATTEND_THREADS) {
        const int query = begin + i / WIDTH, d = i % WIDTH;
        const long long t = query / group, head = kv_head * group + query % group;
        const bool is_any = query < end && d < p.head_dim;
        tile.q[i] = is_any ? p.q[t * p.q_stride + head * p.head_dim + d] : 0;
    }
    // A tile may hold tokens of several sequences: each run of one is done by itself. (The first
    // barrier of stage() stands between this and the first look at tile.q.)
    const int last = (end - 1) / group;
    for (int t = begin / group; t <= last;) {
        int next = t + 1;
        while (next <= last && p.rows[next] == p.rows[t]) next++;
        if (!is_alone(p.rows, n_tok, t)) {
            attend_run<T, QUERIES, STAGES>(p, tile, t, next, begin, kv_head);
        }
        t = next;
    }
}

// a[t] = softmax(q[t] . K * scale) V, one page after the other: sums so far are scaled to each new
// peak (Milakov and Gimelshein, arXiv 1805.02867). A block is 32 queries (16 where head_dim > 128)
// of a kv head: tokens times the heads that share it, heads of a token side by side.
// Bytes: K and V of the sequence up to the tile's last token, once a tile; q read, a written once.
//
// launch: grid (ceil(n_tok * n_head / n_head_kv / queries), n_head_kv), block 256
template <class T> __device__ inline void attend_tile(const attend_tile_args& p) {
    __shared__ alignas(16) Tile tile;
    if (p.head_dim <= STAGE_DIMS) {
        attend_tile<T, 4, 1>(p, tile);
    } else {
        attend_tile<T, 2, 2>(p, tile);
    }
}

extern "C" __global__ void __launch_bounds__(256, 2) attend_tile_f16(const attend_tile_args p) {
    attend_tile<unsigned short>(p);
}
extern "C" __global__ void __launch_bounds__(256, 2) attend_tile_f32(const attend_tile_args p) {
    attend_tile<float>(p);
}
