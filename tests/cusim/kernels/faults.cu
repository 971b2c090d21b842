// One fault a kernel, in the line marked with its name, and only if `wrong` is not 0.
// Blocks have 64 threads; x has n = 64 numbers.

struct test_args {
    const int* x;
    int* y;
    int n;
    int wrong;
};

constexpr unsigned ALL = 0xffffffffu;
#define KERNEL extern "C" __global__ void __launch_bounds__(64)

// ---- out of bounds ----

KERNEL read_beyond(const test_args p) {
    const int i = blockIdx.x * 64 + threadIdx.x;
    if (i < p.n) p.y[i] = p.x[i + p.wrong];  // read_beyond
}
KERNEL write_before(const test_args p) {
    const int i = blockIdx.x * 64 + threadIdx.x;
    if (i < p.n) p.y[i - p.wrong] = p.x[i];  // write_before
}
KERNEL guard_off_by_one(const test_args p) {
    const int i = blockIdx.x * 64 + threadIdx.x;
    if (i < p.n + p.wrong) atomicAdd(&p.y[i], 1);  // guard_off_by_one
}
KERNEL index_beyond_shared(const test_args p) {
    __shared__ int s[64];
    s[threadIdx.x + p.wrong] = p.x[threadIdx.x];  // index_beyond_shared
    p.y[threadIdx.x] = s[threadIdx.x + p.wrong];
}
KERNEL beyond_dynamic(const test_args p) {
    extern __shared__ int room[];
    room[threadIdx.x + p.wrong] = p.x[threadIdx.x];  // beyond_dynamic
    p.y[threadIdx.x] = room[threadIdx.x + p.wrong];
}
KERNEL null_pointer(const test_args p) {
    const int* x = p.wrong ? nullptr : p.x;
    p.y[threadIdx.x] = x[threadIdx.x];  // null_pointer
}

// ---- uninitialised ----

KERNEL global_unwritten(const test_args p) {
    int* y = p.y + threadIdx.x;
    if (!p.wrong) *y = 0;
    *y += p.x[threadIdx.x];  // global_unwritten
}
KERNEL shared_unwritten(const test_args p) {
    __shared__ int s[64];
    if (threadIdx.x >= p.wrong) s[threadIdx.x] = p.x[threadIdx.x];
    p.y[threadIdx.x] = s[threadIdx.x];  // shared_unwritten
}
KERNEL shared_of_the_last_block(const test_args p) {
    __shared__ int s[64];
    if (blockIdx.x == 0 || !p.wrong) s[threadIdx.x] = p.x[threadIdx.x];
    p.y[blockIdx.x * 64 + threadIdx.x] = s[threadIdx.x];  // shared_of_the_last_block
}

// ---- races ----

KERNEL no_barrier(const test_args p) {
    __shared__ int s[64];
    s[threadIdx.x] = 0;
    __syncthreads();
    s[threadIdx.x] = p.x[threadIdx.x];  // no_barrier, the other
    if (!p.wrong) __syncthreads();
    p.y[threadIdx.x] = s[63 - threadIdx.x];  // no_barrier
}
KERNEL no_barrier_before_writing(const test_args p) {
    __shared__ int s;
    for (int i = 0; i < 4; i++) {
        if (threadIdx.x == 40) s = p.x[i];  // no_barrier_before_writing
        __syncthreads();
        p.y[64 * i + threadIdx.x] = s;  // no_barrier_before_writing, the other
        if (!p.wrong) __syncthreads();
    }
}
// Of those that meet, the simulator lets the last one, thread 63, go on first, and so 31 last.
KERNEL write_after_reads(const test_args p) {
    __shared__ int s;
    if (threadIdx.x == 0) s = p.x[0];
    __syncthreads();
    const int x = s;  // write_after_reads, the other
    if (!p.wrong) __syncthreads();
    if (threadIdx.x == 31) s = x + 1;  // write_after_reads
    __syncthreads();
    p.y[threadIdx.x] = x + s;
}
// Here 31 goes on first.
KERNEL write_of_the_first_reader(const test_args p) {
    __shared__ int s[2];
    int& mine = s[threadIdx.x / 32];
    if (threadIdx.x % 32 == 0) mine = p.x[0];
    __syncwarp();
    const int x = mine;  // write_of_the_first_reader, the other
    const int sum = __any_sync(ALL, x);
    if (!p.wrong) __syncwarp();
    if (threadIdx.x % 32 == 31) mine = sum;  // write_of_the_first_reader
    __syncwarp();
    p.y[threadIdx.x] = x + mine;
}
KERNEL no_syncwarp(const test_args p) {
    __shared__ int s[64];
    s[threadIdx.x] = 0;
    __syncwarp();
    s[threadIdx.x] = p.x[threadIdx.x];  // no_syncwarp, the other
    if (!p.wrong) __syncwarp();
    p.y[threadIdx.x] = s[threadIdx.x ^ 1];  // no_syncwarp
}
// CUDA does not promise that shuffles order memory.
KERNEL shuffle_for_syncwarp(const test_args p) {
    __shared__ int s[64];
    s[threadIdx.x] = p.x[threadIdx.x];  // shuffle_for_syncwarp, the other
    const int x = __shfl_xor_sync(ALL, p.x[threadIdx.x], 1);
    if (!p.wrong) __syncwarp();
    if (threadIdx.x % 2) s[threadIdx.x ^ 1] = x;  // shuffle_for_syncwarp
    __syncwarp();
    p.y[threadIdx.x] = s[threadIdx.x];
}
KERNEL wrong_slot(const test_args p) {
    p.y[blockIdx.x * (64 - p.wrong) + threadIdx.x] = p.x[threadIdx.x];  // wrong_slot
}
KERNEL add_without_atomic(const test_args p) {
    if (p.wrong) p.y[0] += p.x[threadIdx.x];  // add_without_atomic
    else atomicAdd(&p.y[0], p.x[threadIdx.x]);
}
KERNEL add_over_blocks(const test_args p) {
    if (threadIdx.x != 0) return;
    if (p.wrong) p.y[0] += p.x[blockIdx.x];  // add_over_blocks
    else atomicAdd(&p.y[0], p.x[blockIdx.x]);
}
KERNEL read_beside_atomics(const test_args p) {
    atomicAdd(&p.y[0], 1);  // read_beside_atomics, the other
    if (!p.wrong) __syncthreads();
    if (threadIdx.x == 63) p.y[1] = p.y[0];  // read_beside_atomics
}
// The last block to arrive adds up what each has left; with five faults in the way it finds out.
enum TicketFault { BARRIER, FENCE, TICKET, SAME_TICKET, FENCE_AFTER };
template <TicketFault FAULT> __device__ inline void sum_of_the_last(const test_args& p) {
    __shared__ bool is_last;
    const auto is_fine = [&](TicketFault fault) { return !p.wrong || fault != FAULT; };
    const int last = gridDim.x - 1;
    if (threadIdx.x == 40) p.y[8 + blockIdx.x] = p.x[blockIdx.x];
    if (is_fine(BARRIER)) __syncthreads();
    if (threadIdx.x == 0) {
        if (is_fine(FENCE)) __threadfence();
        is_last = int(blockIdx.x) == last;
        if (!is_fine(SAME_TICKET)) atomicAdd(&p.y[blockIdx.x], 1);
        else if (is_fine(TICKET)) is_last = atomicAdd(&p.y[0], 1) == last;
        if (is_fine(FENCE_AFTER)) __threadfence();
    }
    __syncthreads();
    if (!is_last || threadIdx.x != 33) return;
    for (int i = 0; i <= last; i++) p.y[32] += p.y[8 + i];
}
KERNEL no_barrier_before_a_ticket(const test_args p) { sum_of_the_last<BARRIER>(p); }
KERNEL no_fence_before_a_ticket(const test_args p) { sum_of_the_last<FENCE>(p); }
KERNEL no_ticket(const test_args p) { sum_of_the_last<TICKET>(p); }
KERNEL not_the_same_ticket(const test_args p) { sum_of_the_last<SAME_TICKET>(p); }
KERNEL no_fence_after_a_ticket(const test_args p) { sum_of_the_last<FENCE_AFTER>(p); }

// ---- threads that do not meet ----

KERNEL barrier_in_a_branch(const test_args p) {
    const int half = p.wrong ? 32 : 64;
    if (threadIdx.x < half) {
        __syncthreads();
    } else {
        __syncthreads();  // barrier_in_a_branch
    }
    p.y[threadIdx.x] = p.x[threadIdx.x];
}
KERNEL barrier_beside_shuffle(const test_args p) {
    int x = p.x[threadIdx.x];
    if (threadIdx.x % 32 < 16 && p.wrong) {
        __syncthreads();
    } else {
        x = __shfl_xor_sync(ALL, x, 1);  // barrier_beside_shuffle
    }
    p.y[threadIdx.x] = x;
}
KERNEL shuffle_in_a_branch(const test_args p) {
    int x = p.x[threadIdx.x];
    if (threadIdx.x < 64 - p.wrong) x = __shfl_down_sync(ALL, x, 1);  // shuffle_in_a_branch
    p.y[threadIdx.x] = x;
}
KERNEL lanes_in_different_places(const test_args p) {
    int x = p.x[threadIdx.x];
    if (threadIdx.x % 2 && p.wrong) {
        x = __shfl_xor_sync(ALL, x, 2);
    } else {
        x = __shfl_xor_sync(ALL, x, 2);  // lanes_in_different_places
    }
    p.y[threadIdx.x] = x;
}
KERNEL not_in_its_own_mask(const test_args p) {
    const unsigned mask = ALL << p.wrong;
    p.y[threadIdx.x] = __shfl_xor_sync(mask, p.x[threadIdx.x], 1);  // not_in_its_own_mask
}
KERNEL source_not_in_the_mask(const test_args p) {
    const int x = p.x[threadIdx.x], source = 16 * p.wrong;
    if (threadIdx.x % 32 < 16) {
        p.y[threadIdx.x] = __shfl_sync(0xffffu, x, source);  // source_not_in_the_mask
    }
}

// ---- one thread's own ----

KERNEL misaligned(const test_args p) {
    if (threadIdx.x < 8) {
        const int4 x = *(const int4*)(p.x + 4 * threadIdx.x + p.wrong);  // misaligned
        p.y[threadIdx.x] = x.w;
    }
}
KERNEL misaligned_shared(const test_args p) {
    __shared__ __align__(16) float s[68];
    s[threadIdx.x] = 1;
    if (threadIdx.x < 4) s[64 + threadIdx.x] = 1;
    __syncthreads();
    if (threadIdx.x < 32) {
        const float2 x = *(const float2*)(s + 2 * threadIdx.x + p.wrong);  // misaligned_shared
        p.y[threadIdx.x] = int(x.x + x.y);
    }
}
KERNEL product_too_large(const test_args p) {
    const int x = p.wrong ? 1 << 30 : 1;
    p.y[threadIdx.x] = x * (p.x[threadIdx.x] + 2);  // product_too_large
}
KERNEL sum_too_large(const test_args p) {
    const int x = p.wrong ? 0x7fffffff : 1;
    p.y[threadIdx.x] = x + (p.x[threadIdx.x] + 1);  // sum_too_large
}
KERNEL shift_too_far(const test_args p) {
    p.y[threadIdx.x] = p.x[threadIdx.x] << 32 * p.wrong;  // shift_too_far
}
KERNEL division_by_zero(const test_args p) {
    p.y[threadIdx.x] = p.x[threadIdx.x] / (1 - p.wrong);  // division_by_zero
}
KERNEL endless(const test_args p) {
    if (threadIdx.x != 40) return;
    volatile int* flag = p.y;
    *flag = !p.wrong;
    while (*flag == 0) continue;  // for what no other thread does
}
