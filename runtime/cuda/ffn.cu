// The sparse FFN of a token: which neurons it computes, their activations, and the sum of their
// rows of down.
#include "ffn.cuh"
#include "formats.cuh"

struct compact_args {
    const float* scores;      // [n_tok][n_ff] of the predictor; null: every neuron is predicted
    const float* thresholds;  // [rows of the page table][n_layer]
    const int* rows;          // [n_tok] of the page table
    const int* n_tok;         // [1]
    const int* slot;          // [ceil(n_ff / 64)]
    unsigned char* mask;      // [n_tok][n_ff] of all predicted neurons
    int* list;                // [n_tok][n_ff]: the resident ones of them, ascending; null: not wanted
    int* n_list;              // [n_tok], with list
    unsigned char* cold;      // [n_tok][n_ff]: predicted and not resident; null: not wanted
    int* cold_list;           // [n_tok][n_ff]: the same, listed; null: not wanted
    int* n_cold;              // [n_tok], with cold_list
    unsigned char* fired;     // [n_tok][n_ff], cleared for ffn_rows
    long long* counters;      // [4]: tokens, and rows of the decider on this device
    int* heat;                // [ceil(n_ff / 64)]: predicted neurons of a block; null: not wanted
    int n_ff;
    int n_layer;
    int il;                   // the layer
};

// mask[t][n] = scores[t][n] >= thresholds[rows[t]][il]; a score that is NaN is, one of -inf never
// list[t] = the n with mask[t][n] and slot[n / 64] >= 0; heat, which may wrap, += mask
// Bytes a token: n_ff * (4 + 3), and 4 a listed neuron; block b reads 2048 * b more, of the caches.
//
// A thread has one neuron. Where there are lists, how many the blocks before its own have listed every
// block counts again by itself: to wait for another would take longer than to read what that reads. The time is that
// of two loads that wait for each other, rows and thresholds, slots and scores; all others are made
// meanwhile. Larger blocks would have less to count again, but more warps that take turns.
//
// launch: grid (ceil(n_ff / 512), n_tok), block 512
constexpr int COMPACT_THREADS = 512, COMPACT_WARPS = COMPACT_THREADS / WARP;

extern "C" __global__ void __launch_bounds__(512) compact(const compact_args p) {
    // Neurons that a warp counts: resident ones, and cold ones where they are listed.
    __shared__ int before[2][COMPACT_WARPS], own[2][COMPACT_WARPS];
    const int t = blockIdx.y, block = blockIdx.x, n = block * COMPACT_THREADS + threadIdx.x;
    const long long row = (long long)t * p.n_ff;
    const auto score = [&](int b) {  // of this thread's neuron of block b; 0 where nothing predicts
        return p.scores ? p.scores[row + b * COMPACT_THREADS + threadIdx.x] : 0;
    };
    // A warp's neurons of a block are half a block of neurons: all resident, or none.
    const auto slot = [&](int b) {
        return p.slot[(b * COMPACT_THREADS + warp_id() * WARP) / NEURON_BLOCK];
    };
    const auto which_are_resident = [&](int from) {  // bit k: those of block from + k before this
        const int b = from + lane_id();
        return __ballot_sync(ALL_LANES, b < block && slot(b) >= 0);
    };
    const float never = __int_as_float(0xff800000), lowest = -3.402823466e38f;  // -infinity
    after_predecessors();
    // No row is negative: as in find_token, its load does not wait for the number of tokens.
    const int n_tok = *p.n_tok, table_row = p.rows[t];
    unsigned resident = which_are_resident(0);
    if ((t >= n_tok) | (table_row < 0)) return;
    const float threshold =
        p.scores ? fmaxf(p.thresholds[(long long)table_row * p.n_layer + p.il], lowest) : 0;
    const float mine = n < p.n_ff ? score(block) : never;
    const int my_slot = n < p.n_ff ? slot(block) : -1;
    int n_hot = 0, n_not = 0;  // before this block
    const bool is_listed = p.list || p.cold_list;
    for (int from = 0; is_listed && from < block; resident = which_are_resident(from += WARP)) {
        float theirs[WARP];
#pragma unroll
        for (int k = 0; k < WARP; k++) {
            const bool is_wanted = p.cold_list ? from + k < block : resident >> k & 1;
            theirs[k] = is_wanted ? score(from + k) : never;
        }
#pragma unroll
        for (int k = 0; k < WARP; k++) {
            const bool predicted = !(theirs[k] < threshold), is_there = resident >> k & 1;
            n_hot += predicted && is_there;
            n_not += predicted && !is_there;
        }
    }

    const bool predicted = !(mine < threshold), listed = predicted && my_slot >= 0;
    const unsigned all = __ballot_sync(ALL_LANES, listed);
    const unsigned others = __ballot_sync(ALL_LANES, predicted && !listed);
    if (n < p.n_ff) {
        if (p.cold) p.cold[row + n] = predicted && !listed;
        p.mask[row + n] = predicted;
        p.fired[row + n] = 0;
    }
    n_hot = warp_sum(n_hot), n_not = warp_sum(n_not);
    if (lane_id() == 0) {
        before[0][warp_id()] = n_hot, before[1][warp_id()] = n_not;
        own[0][warp_id()] = __popc(all), own[1][warp_id()] = __popc(others);
        const int n_predicted = __popc(all | others);
        if (p.heat && n_predicted) atomicAdd(p.heat + n / NEURON_BLOCK, n_predicted);
    }
    __syncthreads();

    const unsigned lanes_before = (1u << lane_id()) - 1;
    // Writes the neurons of `these` behind all that come before; returns how many there are then.
    const auto append = [&](int kind, unsigned these, int* list) {
        int place = lane_id() < COMPACT_WARPS ? before[kind][lane_id()] : 0;
        if (lane_id() < warp_id()) place += own[kind][lane_id()];
        place = warp_sum(place);
        if (these >> lane_id() & 1) list[row + place + __popc(these & lanes_before)] = n;
        return place + __popc(these);
    };
    const int n_list = p.list ? append(0, all, p.list) : 0;
    const int n_cold = p.cold_list ? append(1, others, p.cold_list) : 0;
    const bool is_last = blockIdx.x == gridDim.x - 1 && warp_id() == COMPACT_WARPS - 1;
    if (is_last && lane_id() == 0) {
        if (p.list) p.n_list[t] = n_list;
        if (p.cold_list) p.n_cold[t] = n_cold;
        count(p.counters, TOKENS, 1);
    }
    if (warp_id() == 0) {
        const int n_own = warp_sum(lane_id() < COMPACT_WARPS ? own[0][lane_id()] : 0);
        if (lane_id() == 0) count(p.counters, DECIDER_ROWS, n_own);
    }
}

struct ffn_rows_args {
    Matrix decider;             // [storage rows][n_embd]; q null: act holds activated deciders
    Matrix up;                  // [storage rows][n_embd]; q null: the model has none
    const float* decider_bias;  // [n_ff] or null
    const float* up_bias;       // [n_ff] or null
    const float* x;             // [n_tok][n_embd], read by f16 and f32
    Packed x_packed;            // [n_tok][n_embd], read by q4_0, q8_0, q6_k
    const int* slot;            // [ceil(n_ff / 64)]
    const int* list;            // [n_tok][n_ff]
    const int* n_list;          // [n_tok]
    float* act;                 // [n_tok][n_ff] by place in the list
    unsigned char* fired;       // [n_tok][n_ff] by neuron
    long long* counters;        // [4]: rows of up, rows of down
    int n_ff;
    int activation;             // Activation
    float threshold;            // of FATRELU
};

// For the neurons n = list[t][i], r their storage rows:
//   a = activation(decider[r] . x[t] + decider_bias[n])
//   act[t][i] = a == 0 ? 0 : a * (up[r] . x[t] + up_bias[n])
//   fired[t][n] as in reference._activations
// Bytes: a decider row a listed neuron, an up row each that fires.
//
// A warp takes a neuron at a time, and asks for a whole row of 4096 q4_0 weights at once. Where the
// two matrices have different formats, the host launches one kernel of each: first the decider's
// with no up and no counters, then the up's with no decider.
//
// launch: grid (any number, n_tok), block 256
constexpr int ROWS_THREADS = 256;

template <class F> __device__ inline void ffn_rows(const ffn_rows_args& p) {
    constexpr int WARPS = ROWS_THREADS / WARP;
    after_predecessors();
    const int t = blockIdx.y, n_list = p.n_list[t];
    const long long row = (long long)t * p.n_ff;
    const Matrix& any = p.decider.q ? p.decider : p.up;
    const Input x = Input{p.x, p.x_packed, any.cols}.token(t);
    int n_decided = 0, n_fired = 0;  // by this warp
    for (int i = blockIdx.x * WARPS + warp_id(); i < n_list; i += gridDim.x * WARPS) {
        const int n = p.list[row + i];
        const int rows[1] = {storage_row(p.slot, n)};
        float a;
        if (p.decider.q) {
            float sum[1];
            dot_rows<F>(p.decider, rows, x, sum);
            if (p.decider_bias) sum[0] += p.decider_bias[n];
            a = activate(p.activation, sum[0], p.threshold);
        } else {
            a = p.act[row + i];
        }
        Neuron neuron = {0, 0};
        if (a != 0) {
            neuron = {a, FIRED};
            if (p.up.q) {
                float sum[1];
                dot_rows<F>(p.up, rows, x, sum);
                if (p.up_bias) sum[0] += p.up_bias[n];
                neuron = with_up(p.activation, a, sum[0]);
            }
            n_decided++;
            n_fired += neuron.fired == FIRED;
        }
        if (lane_id() == 0) {
            p.act[row + i] = neuron.act;
            p.fired[row + n] = neuron.fired;
        }
    }
    n_decided = block_sum<ROWS_THREADS>(lane_id() == 0 ? n_decided : 0);
    n_fired = block_sum<ROWS_THREADS>(lane_id() == 0 ? n_fired : 0);
    if (threadIdx.x == 0) {
        count(p.counters, UP_ROWS, n_decided);
        count(p.counters, DOWN_ROWS, n_fired);
    }
}

struct ffn_down_args {
    Matrix down_t;      // [storage rows][n_embd]
    const int* slot;    // [ceil(n_ff / 64)]
    const int* list;    // [n_tok][n_ff]
    const int* n_list;  // [n_tok]
    const float* act;   // [n_tok][n_ff] by place in the list
    float* parts;       // [N_SPLITS][n_tok][n_embd]
    int n_ff;
};

// parts[s][t][c] = sum of act[t][i] * down_t[r][c] over the places i of split s,
// r the storage row of list[t][i]
// Bytes: a row of down_t a neuron with act != 0; N_SPLITS * n_embd floats written.
//
// A block has one split and 32 units of columns, a unit a lane. Of the N_SPLITS * 8 warps that have
// the same columns, warp w takes the places w, w + 256, ...: 32 of them at a time, one a lane, of
// which it skips the silent ones and loads the rows of up to four others before it uses the first.
// At the end the block adds its warps' sums in their order.
//
// launch: grid (ceil(n_embd / columns), N_SPLITS, n_tok), block 256, columns 1024 of q4_0, 512
// of q8_0, 2048 of q6_k, 256 of f16, 128 of f32
constexpr int DOWN_THREADS = 256;

template <class F> __device__ inline void ffn_down(const ffn_down_args& p) {
    constexpr int WARPS = DOWN_THREADS / WARP, WORKERS = N_SPLITS * WARPS, AT_ONCE = AHEAD<F, 1>;
    after_predecessors();
    const int t = blockIdx.z, n_list = p.n_list[t];
    const long long list = (long long)t * p.n_ff;
    const int unit = blockIdx.x * WARP + lane_id();
    const bool has_unit = unit < units<F>(p.down_t.cols);
    float y[F::UNIT] = {};
    for (int first = blockIdx.y * WARPS + warp_id(); first < n_list; first += WORKERS * WARP) {
        const int i = first + lane_id() * WORKERS;
        const float my_act = i < n_list ? p.act[list + i] : 0;
        int my_row = 0;
        if (my_act != 0) {
            const int n = p.list[list + i];
            my_row = storage_row(p.slot, n);
        }
        unsigned left = __ballot_sync(ALL_LANES, my_act != 0);
        while (left) {
            float act[AT_ONCE];
            typename F::Weights weights[AT_ONCE];
#pragma unroll
            for (int j = 0; j < AT_ONCE; j++) {
                const int lane = left ? __ffs(int(left)) - 1 : 0;
                const int row = __shfl_sync(ALL_LANES, my_row, lane);
                act[j] = __shfl_sync(ALL_LANES, my_act, lane);
                if (!left) act[j] = 0;
                if (left && has_unit) weights[j] = F::load(p.down_t, row, unit);
                left &= left - 1;
            }
#pragma unroll
            for (int j = 0; j < AT_ONCE; j++) {
                if (act[j] != 0 && has_unit) Meet<F>::add(act[j], weights[j], y);
            }
        }
    }

    // Up to 16 elements of the units at a time: registers, not shared memory, say how many blocks
    // an SM has room for. The padding puts the E elements of 32 / E lanes, which a warp reads
    // together, on 32 banks.
    constexpr int E = F::UNIT < 16 ? F::UNIT : 16, PER_VECTOR = F::UNIT / F::VECTORS;
    __shared__ float sums[WARPS][E][WARP + WARP / E];
#pragma unroll
    for (int from = 0; from < F::UNIT; from += E) {
        __syncthreads();  // what the elements before left has been read
#pragma unroll
        for (int e = 0; e < E; e++) sums[warp_id()][e][lane_id()] = y[from + e];
        __syncthreads();
        for (int i = threadIdx.x; i < E * WARP; i += DOWN_THREADS) {
            const int lane = i / E, e = i % E;  // neighbours write neighbouring columns
            const int vector = (from + e) / PER_VECTOR;
            const int column =
                F::column(blockIdx.x * WARP + lane, vector) + (from + e) % PER_VECTOR;
            float sum = 0;
#pragma unroll
            for (int w = 0; w < WARPS; w++) sum += sums[w][e][lane];
            if (column < p.down_t.cols) {
                const long long part = (long long)blockIdx.y * gridDim.z + t;
                p.parts[part * p.down_t.cols + column] = sum;
            }
        }
    }
}

#define FFN(suffix, F)                                                                             \
    extern "C" __global__ void __launch_bounds__(256, 3)                                           \
        ffn_rows_##suffix(const ffn_rows_args p) {                                                 \
        ffn_rows<F>(p);                                                                            \
    }                                                                                              \
    extern "C" __global__ void __launch_bounds__(256, 2)                                           \
        ffn_down_##suffix(const ffn_down_args p) {                                                 \
        ffn_down<F>(p);                                                                            \
    }
FFN(q4_0, Q4_0)
FFN(q8_0, Q8_0)
FFN(q6_k, Q6_K)
FFN(f16, F16)
FFN(f32, F32)
