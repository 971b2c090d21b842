// Threads together: barriers, exits, shuffles, votes, parts of warps, and in what order all run.

struct test_args {
    const int* x;
    int* y;
    int n;
    int wrong;  // see faults.cu
};

constexpr unsigned ALL = 0xffffffffu;

// y[block] = sum of the 256 of x that are its own, of n in all
extern "C" __global__ void __launch_bounds__(256) sums(const test_args p) {
    __shared__ int partial[8];
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    int sum = i < p.n ? p.x[i] : 0;
    for (int d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(ALL, sum, d);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int w = 1; w < 8; w++) sum += partial[w];
        p.y[blockIdx.x] = sum;
    }
}

// y = x turned by n, one place at a time
extern "C" __global__ void __launch_bounds__(1024) turn(const test_args p) {
    __shared__ int s[1024];
    const int t = threadIdx.x, size = blockDim.x;
    s[t] = p.x[t];
    for (int i = 0; i < p.n; i++) {
        __syncthreads();
        const int next = s[(t + 1) % size];
        __syncthreads();
        s[t] = next;
    }
    p.y[t] = s[t];
}

// y = the first n of x in reverse; the other threads leave, at once or between two barriers
extern "C" __global__ void __launch_bounds__(1024) leave_early(const test_args p) {
    __shared__ int s[1024];
    const int t = threadIdx.x;
    if (t >= 2 * p.n) return;
    s[t] = t < p.n ? p.x[t] : 0;
    __syncthreads();
    if (t >= p.n) return;
    const int mine = s[p.n - 1 - t];
    __syncthreads();
    s[t] = mine;
    __syncthreads();
    p.y[t] = s[t];
}

// y[i][lane]: what shuffle i gives
extern "C" __global__ void __launch_bounds__(32) shuffles(const test_args p) {
    const int lane = threadIdx.x, v = p.x[lane];
    int i = 0;
    for (int width = 32; width >= 8; width /= 4) {
        p.y[32 * i++ + lane] = __shfl_sync(ALL, v, 5, width);
        p.y[32 * i++ + lane] = __shfl_sync(ALL, v, 3 * lane, width);
        p.y[32 * i++ + lane] = __shfl_xor_sync(ALL, v, 6, width);
        p.y[32 * i++ + lane] = __shfl_xor_sync(ALL, v, 16, width);
        p.y[32 * i++ + lane] = __shfl_up_sync(ALL, v, 3, width);
        p.y[32 * i++ + lane] = __shfl_down_sync(ALL, v, 3, width);
    }
    const double wide = __shfl_down_sync(ALL, v + 0.5, 1);
    const long long large = __shfl_xor_sync(ALL, v * 10000000000ll, 1);
    const signed char small = __shfl_sync(ALL, (signed char)v, 31);
    p.y[32 * i++ + lane] = int(2 * wide);
    p.y[32 * i++ + lane] = int(large / 10000000000ll);
    p.y[32 * i++ + lane] = small;
}

// y[i][thread]: what vote i gives
extern "C" __global__ void __launch_bounds__(1024) votes(const test_args p) {
    const int t = threadIdx.x, size = blockDim.x, vote = p.x[t];
    p.y[t] = int(__ballot_sync(ALL, vote));
    p.y[size + t] = __any_sync(ALL, vote);
    p.y[2 * size + t] = __all_sync(ALL, vote);
    p.y[3 * size + t] = __syncthreads_count(vote);
    p.y[4 * size + t] = __syncthreads_or(vote);
    p.y[5 * size + t] = __syncthreads_and(vote);
}

// The first n lanes of a warp and the others each do what a warp does, at the same time.
// y[0] = sum of x over the part, y[1] = votes of the part, y[2] = x of its next lane
extern "C" __global__ void __launch_bounds__(1024) parts(const test_args p) {
    __shared__ int s[1024];
    const int t = threadIdx.x, lane = t % 32, size = blockDim.x;
    const int lanes = min(32, size - t / 32 * 32);  // of the last warp fewer
    const unsigned all = lanes == 32 ? ALL : (1u << lanes) - 1, first = (1u << p.n) - 1;
    const int begin = lane < p.n ? 0 : p.n, end = lane < p.n ? p.n : lanes;
    int sum = 0;
    if (lane < p.n) {
        for (int i = 0; i < p.n; i++) sum += __shfl_sync(first, p.x[t], i);
        p.y[size + t] = int(__ballot_sync(first, p.x[t] % 2));
        s[t] = p.x[t];
        __syncwarp(first);
    } else {
        for (int i = p.n; i < lanes; i++) sum += __shfl_sync(all & ~first, p.x[t], i);
        p.y[size + t] = int(__ballot_sync(all & ~first, p.x[t] % 2));
        s[t] = p.x[t];
        __syncwarp(all & ~first);
    }
    p.y[t] = sum;
    __syncthreads();  // in check mode only a barrier of all lanes orders what they do
    p.y[2 * size + t] = s[t - lane + begin + (lane - begin + 1) % (end - begin)];
}

// y = sum of 48 numbers of each thread, all of which outlive barriers and shuffles
extern "C" __global__ void __launch_bounds__(1024) keep(const test_args p) {
    const int t = threadIdx.x;
    int whole[16], other = 0;
    float real[32];
    for (int i = 0; i < 16; i++) whole[i] = p.x[t] * i;
    for (int i = 0; i < 32; i++) real[i] = float(p.x[t] + i);
    for (int i = 0; i < 4; i++) {
        other += __shfl_xor_sync(ALL, whole[i], 1 << i);
        __syncthreads();
        for (int j = 0; j < 16; j++) whole[j] += 1;
        for (int j = 0; j < 32; j++) real[j] += 2;
    }
    int sum = 0;
    for (int i = 0; i < 16; i++) sum += whole[i];
    for (int i = 0; i < 32; i++) sum += int(real[i]);
    p.y[t] = sum;
    p.y[blockDim.x + t] = other;
}

// y[i] = the number of the thread of the grid that was the i-th to come here
extern "C" __global__ void __launch_bounds__(1024) turns(const test_args p) {
    p.y[1 + atomicAdd(p.y, 1)] = blockIdx.x * blockDim.x + threadIdx.x;
}
