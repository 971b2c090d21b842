// Attention of a token to its own sequence up to itself, in float32, over the paged cache.
//
//   a[t] = softmax(q[t] . K * scale) V     for each query head; n_head / n_head_kv share a kv head
//
// A token that is the only one of its sequence in a step (decoding) is for attend_split, which cuts
// its context into splits that occupy the whole GPU, and adds them up in the end. Tokens of
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
//
// What takes the time here is waiting: of a 7b model a token's K and V in a layer, 520 positions
// long, are worth 3 us of an H100's memory, which is as long as a few loads that wait for each
// other. So the work is cut such that a warp asks at once for all that it will read (16 rows of 128
// halves of each), and threads meet once, at the end; and so do blocks, of which the last to arrive
// adds up what the splits of its heads came to. Which one that is changes nothing: it adds in the
// order of splits. (A kernel of its own for this took 4.4 us and a boundary.)
//
// A context is cut into at most n_splits splits, which are longer in a longer context. footprint.py
// has so many that there are 256 blocks, two for each of 132 multiprocessors. With 32 heads these
// are 8 splits: at a length of 520 of 80 positions each, in 224 blocks; at 2048 of 256, in 256; at
// 32768 of 4096, in 256 blocks that have 128 KiB in flight on each multiprocessor. What is summed
// up again afterwards does not grow with the context. (Splits of 256 positions at any length would
// be 96 blocks of work at 520, a third of them for 8 positions, and 4096 blocks at 32768.)

constexpr int SPLIT_UNIT = 16;  // positions; what a warp has at once divides it, and it PAGE
constexpr int LOADS = 4;        // loads of 16 bytes that a lane has in flight from each of its rows

// Positions of a split, in a context of `length`.
__device__ inline int split_span(int length, int n_splits) {
    const unsigned unit = n_splits * SPLIT_UNIT;
    return (length + unit - 1) / unit * SPLIT_UNIT;
}

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
    int group;                     // n_head / n_head_kv: given, as a division is 100 cycles of wait
    int head_dim;                  // at most 256
    float scale;                   // 1 / sqrt(head_dim)
    float* sums;                   // [n_seq][n_head][n_splits][head_dim]
    float* peaks;                  // [n_seq][n_head][n_splits]
    float* totals;                 // [n_seq][n_head][n_splits]
    int* tickets;                  // [n_seq][grid y]: blocks that have arrived; 0 between launches
    float* a;                      // [n_tok][n_head * head_dim]
    Packed packed;                 // the same rounded; null if not wanted; head_dim % 32 == 0
};

// sum and total of some positions: of V and of 1, each times exp(score - peak).
struct Weighted {
    float peak, total, sum;
};

// All n of them together, which are eight at most: their loads do not wait for each other.
__device__ inline Weighted together(const float* peaks, const float* totals, const float* sums,
                                    int n) {
    constexpr int MOST = ATTEND_WARPS;
    Weighted each[MOST], all = {-infinity(), 0, 0};
#pragma unroll
    for (int i = 0; i < MOST; i++) {
        each[i].peak = i < n ? peaks[i] : -infinity();
        each[i].total = i < n ? totals[i] : 0;
        each[i].sum = i < n ? sums[i * MAX_HEAD_DIM] : 0;
    }
#pragma unroll
    for (int i = 0; i < MOST; i++) all.peak = fmaxf(all.peak, each[i].peak);
#pragma unroll
    for (int i = 0; i < MOST; i++) {
        const float factor = expf(each[i].peak - all.peak);
        all.total = fmaf(factor, each[i].total, all.total);
        all.sum = fmaf(factor, each[i].sum, all.sum);
    }
    return all;
}

// What the warps of a block leave in shared memory, each in its own part.
struct Shares {
    float query[ATTEND_WARPS][MAX_HEAD_DIM];  // of the warp's head, then zeros
    float sums[ATTEND_WARPS][MAX_HEAD_DIM];
    float peaks[ATTEND_WARPS], totals[ATTEND_WARPS];
};

// Adds x up over the lanes that differ in bit FROM, and those below it down to DISTANCE. Each step
// leaves a lane half of the numbers: in the end it has N * DISTANCE / WARP, at the start of x.
// Returns which of the N its first one is.
template <int DISTANCE, int FROM = WARP / 2, int N>
__device__ inline int share_sums(float (&x)[N]) {
    if constexpr (FROM < DISTANCE) {
        return 0;
    } else {
        constexpr int HALF = N * FROM / WARP;
        const bool is_upper = lane_id() & FROM;
#pragma unroll
        for (int i = 0; i < HALF; i++) {
            const float kept = is_upper ? x[HALF + i] : x[i], given = is_upper ? x[i] : x[HALF + i];
            x[i] = kept + __shfl_xor_sync(ALL_LANES, given, FROM);
        }
        return is_upper * HALF + share_sums<DISTANCE, FROM / 2>(x);
    }
}

// What the warp has of its head from `begin` to `end`: of chunks of rows every n_shares-th, from
// number `share` on. LANES lanes share a row, each has every LANES-th piece of DEEP rows, of K and
// of V alike, so that the weights that a lane needs for V are those of its own rows.
template <class T, int LANES, bool IS_WHOLE>
__device__ inline void attend_rows(const attend_split_args& p, Shares& shares, const int* pages,
                                   const float* q, int kv_head, int begin, int end, int share,
                                   int n_shares) {
    constexpr int DEEP = IS_WHOLE ? 2 : 1;  // rows whose pieces are no loads take registers
    constexpr int AT_ONCE = WARP / LANES, CHUNK = DEEP * AT_ONCE;
    constexpr int EACH = IN_LOAD<T>, N = LOADS * EACH;
    const int head_dim = p.head_dim, warp = warp_id(), lane = lane_id(), part = lane % LANES;
    const int first = begin + share * CHUNK, step = n_shares * CHUNK;
    int page = first < end ? pages[first / PAGE] : 0;  // arrives with q; the next ones with K
#pragma unroll
    for (int d = lane; d < MAX_HEAD_DIM; d += WARP) {
        shares.query[warp][d] = d < head_dim ? q[d] : 0;
    }
    float peak = -3.0e38f, total = 0, sums[N];
#pragma unroll
    for (int i = 0; i < N; i++) sums[i] = 0;

    for (int start = first; start < end; start += step) {
        const long long at = index_in(page, start, kv_head, p.n_head_kv, head_dim);
        const T *k = (const T*)p.k_cache + at, *v = (const T*)p.v_cache + at;
        int4 keys[DEEP][LOADS], values[DEEP][LOADS];
        int rows[DEEP];
#pragma unroll
        for (int r = 0; r < DEEP; r++) {
            // Rows that are not seen may hold anything: the last one that is stands in for them.
            rows[r] = min(lane / LANES + r * AT_ONCE, end - 1 - start) * head_dim;
#pragma unroll
            for (int j = 0; j < LOADS; j++) {
                keys[r][j] = load_raw<IS_WHOLE>(k + rows[r], part + j * LANES, head_dim);
            }
        }
#pragma unroll
        for (int r = 0; r < DEEP; r++) {
#pragma unroll
            for (int j = 0; j < LOADS; j++) {
                values[r][j] = load_raw<IS_WHOLE>(v + rows[r], part + j * LANES, head_dim);
            }
        }
        if (start + step < end) page = pages[(start + step) / PAGE];
        __syncwarp();  // the query is there; and no load comes after what waits for others

        float scores[DEEP] = {};
#pragma unroll
        for (int j = 0; j < LOADS; j++) {
            float query[EACH];
            load_wide(&shares.query[warp][EACH * (part + j * LANES)], query);
#pragma unroll
            for (int r = 0; r < DEEP; r++) {
                float key[EACH];
                widen(keys[r][j], key);
#pragma unroll
                for (int i = 0; i < EACH; i++) scores[r] = fmaf(query[i], key[i], scores[r]);
            }
        }
        const float before = peak;
#pragma unroll
        for (int r = 0; r < DEEP; r++) {
#pragma unroll
            for (int distance = 1; distance < LANES; distance *= 2) {
                scores[r] += __shfl_xor_sync(ALL_LANES, scores[r], distance);
            }
            const bool is_seen = start + lane / LANES + r * AT_ONCE < end;
            scores[r] = is_seen ? scores[r] * p.scale : -infinity();
            peak = fmaxf(peak, scores[r]);
        }
#pragma unroll
        for (int distance = LANES; distance < WARP; distance *= 2) {
            peak = fmaxf(peak, __shfl_xor_sync(ALL_LANES, peak, distance));
        }
        const float factor = expf(before - peak);  // 0 at first
        total *= factor;
#pragma unroll
        for (int i = 0; i < N; i++) sums[i] *= factor;
#pragma unroll
        for (int r = 0; r < DEEP; r++) {
            const float weight = expf(scores[r] - peak);
            total += weight;
#pragma unroll
            for (int j = 0; j < LOADS; j++) {
                float value[EACH];
                widen(values[r][j], value);
#pragma unroll
                for (int i = 0; i < EACH; i++) {
                    sums[j * EACH + i] = fmaf(weight, value[i], sums[j * EACH + i]);
                }
            }
        }
    }
#pragma unroll
    for (int distance = LANES; distance < WARP; distance *= 2) {
        total += __shfl_xor_sync(ALL_LANES, total, distance);
    }
    const int own = share_sums<LANES>(sums);
#pragma unroll
    for (int i = 0; i < N / AT_ONCE; i++) {
        const int piece = part + (own + i) / EACH * LANES;
        shares.sums[warp][EACH * piece + (own + i) % EACH] = sums[i];
    }
    if (lane == 0) shares.peaks[warp] = peak, shares.totals[warp] = total;
}

// Whether this block is the last of n to come here; then it sees what the others have written.
__device__ inline bool is_last(int* ticket, int n) {
    __shared__ bool is_it;
    __syncthreads();  // all of the block's is written
    if (threadIdx.x == 0) {
        __threadfence();
        is_it = atomicInc((unsigned*)ticket, n - 1) == n - 1;  // which makes it 0 again
        __threadfence();
    }
    __syncthreads();
    return is_it;
}

// Of each split s: peak = max of the scores, total = sum of exp(score - peak), and
// sums = sum of exp(score - peak) * V; then, with peak the largest of them,
//
//   a[t] = sum over s of e^(peak[s] - peak) sums[s] / sum over s of e^(peak[s] - peak) totals[s]
//
// A block is a token, a split, and up to 8 query heads of a kv head. A warp has one head; where heads
// are few, several warps share one. There are 32 splits at most.
// Bytes: K and V of the split, once for each 8 of the query heads that share them (for these 8,
// again from the L1 cache); for each head and split that there is, if it is not the only one,
// 4 * (head_dim + 2) written and read again; 5.25 * n_head * head_dim written.
//
// launch: grid (n_splits, n_head_kv * ceil(n_head / n_head_kv / 8), n_tok), block 256
template <class T> __device__ inline void attend_split(const attend_split_args& p) {
    __shared__ alignas(16) Shares shares;
    const int t = blockIdx.z, n_splits = gridDim.x;
    int position, sequence;
    after_predecessors();
    if (!find_token(p.counts, p.positions, p.rows, t, position, sequence)) return;
    const int length = position + 1, span = split_span(length, n_splits);
    const int begin = blockIdx.x * span, end = min(begin + span, length);
    if (begin >= length || !is_alone(p.rows, p.counts[0], t)) return;

    const int blocks = (p.group + ATTEND_WARPS - 1) / ATTEND_WARPS;  // of a kv head
    const int kv_head = blocks == 1 ? blockIdx.y : blockIdx.y / blocks;
    const int in_group = (blockIdx.y - kv_head * blocks) * ATTEND_WARPS;
    const int heads = min(ATTEND_WARPS, p.group - in_group);
    const int n_shares = heads == 1 ? 8 : heads == 2 ? 4 : heads <= 4 ? 2 : 1;  // of a head: warps
    const int in_block = warp_id() / n_shares, share = warp_id() % n_shares;
    const int head = kv_head * p.group + in_group + in_block, head_dim = p.head_dim;
    if (in_block < heads) {
        const int* pages = p.pages + (long long)sequence * p.pages_cols;
        const float* q = p.q + (long long)t * p.q_stride + head * head_dim;
        // So many lanes to a row that their loads reach its end.
        constexpr int MOST = MAX_HEAD_DIM * sizeof(T) / (16 * LOADS);
        const int bytes = head_dim * int(sizeof(T));
        if (bytes % 16) {
            attend_rows<T, MOST, false>(p, shares, pages, q, kv_head, begin, end, share, n_shares);
        } else if (bytes <= 4 * 16 * LOADS) {
            attend_rows<T, 4, true>(p, shares, pages, q, kv_head, begin, end, share, n_shares);
        } else if (MOST == 8 || bytes <= 8 * 16 * LOADS) {
            attend_rows<T, 8, true>(p, shares, pages, q, kv_head, begin, end, share, n_shares);
        } else {
            attend_rows<T, MOST, true>(p, shares, pages, q, kv_head, begin, end, share, n_shares);
        }
    }
    __syncthreads();
    const int n = unsigned(position) / span + 1;  // splits that there are
    const long long a = ((long long)t * p.n_head + head) * head_dim;
    const long long parts = ((long long)sequence * p.n_head + head) * n_splits;
    // Of dimensions that its warps share a head has f(d), d of each lane; those of a warp together.
    const auto each = [&](auto f) {
        if (in_block >= heads) return;
        for (int d = share * WARP; d < head_dim; d += n_shares * WARP) f(d + lane_id());
    };
    const auto finish = [&](int d, float y) {
        if (d < head_dim) p.a[a + d] = y;
        if (p.packed.q) pack_block<1>({y}, p.packed, (a + d) / QK);
    };
    each([&](int d) {
        const int first = in_block * n_shares;
        const long long part = parts + blockIdx.x;
        const Weighted all = together(shares.peaks + first, shares.totals + first,
                                      &shares.sums[first][d], d < head_dim ? n_shares : 0);
        if (n == 1) {
            finish(d, all.sum / all.total);
        } else if (d < head_dim) {
            p.sums[part * head_dim + d] = all.sum;
            if (d == 0) p.peaks[part] = all.peak, p.totals[part] = all.total;
        }
    });
    if (n == 1 || !is_last(p.tickets + sequence * gridDim.y + blockIdx.y, n)) return;
    if (in_block >= heads) return;
    // A lane has the weight of a split. Of sums as many are on their way at once as will be of use.
    const bool is_any = lane_id() < n;
    const float peak = is_any ? p.peaks[parts + lane_id()] : -infinity();
    const float total = is_any ? p.totals[parts + lane_id()] : 0;
    const float part = expf(peak - warp_max(peak)), weight = part / warp_sum(part * total);
    each([&](int d) {
        constexpr int AT_ONCE = 16;
        float y = 0;
        for (int s = 0; s < n; s += AT_ONCE) {
            float sums[AT_ONCE];
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                const bool is_there = s + i < n && d < head_dim;
                sums[i] = is_there ? p.sums[(parts + s + i) * head_dim + d] : 0;
            }
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                y = fmaf(__shfl_sync(ALL_LANES, weight, s + i), sums[i], y);
            }
        }
        finish(d, y);
    });
}

extern "C" __global__ void __launch_bounds__(256, 2) attend_split_f16(const attend_split_args p) {
    attend_split<unsigned short>(p);
}
extern "C" __global__ void __launch_bounds__(256, 2) attend_split_f32(const attend_split_args p) {
    attend_split<float>(p);
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
    after_predecessors();
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
