// Memory and numbers: atomics, shared memory, indices, and the functions that CUDA has built in.

struct test_args {
    const int* x;
    int* y;
    int n;
    int wrong;  // see faults.cu
};

// y[0..7]: what is left of as many atomics of all threads; y[8..]: the old values of the first
extern "C" __global__ void __launch_bounds__(1024) atomics(const test_args p) {
    __shared__ int s;
    __shared__ float f;
    __shared__ unsigned turn;
    const int t = threadIdx.x, x = p.x[t];
    if (t == 0) s = 0, f = 0, turn = 0;
    __syncthreads();
    atomicAdd(&s, 1);
    atomicAdd(&f, 0.5f);
    atomicInc(&turn, 6);
    p.y[8 + t] = atomicAdd(&p.y[0], 3);
    atomicSub(&p.y[1], x);
    atomicMax(&p.y[2], x);
    atomicMin(&p.y[3], x);
    atomicOr((unsigned*)&p.y[4], 1u << t % 32);
    atomicXor((unsigned*)&p.y[5], unsigned(x));
    for (int old = 0, seen; (seen = atomicCAS(&p.y[6], old, old + 2)) != old;) old = seen;
    __syncthreads();
    if (t == 0) p.y[7] = s + int(2 * f) + atomicExch(&s, 0) + atomicAnd(&s, 0) + int(turn);
}

// y = running sums of x
extern "C" __global__ void __launch_bounds__(1024) scan(const test_args p) {
    extern __shared__ int room[];
    const int t = threadIdx.x;
    room[t] = p.x[t];
    for (int d = 1; d < blockDim.x; d *= 2) {
        __syncthreads();
        const int sum = room[t] + (t >= d ? room[t - d] : 0);
        __syncthreads();
        room[t] = sum;
    }
    p.y[t] = room[t];
}

// y = block index, thread index, and sizes of both, of every thread of a grid
extern "C" __global__ void __launch_bounds__(1024) indices(const test_args p) {
    const int threads = blockDim.x * blockDim.y * blockDim.z;
    const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    int* y = p.y + 12 * (block * threads + thread);
    y[0] = blockIdx.x, y[1] = blockIdx.y, y[2] = blockIdx.z;
    y[3] = threadIdx.x, y[4] = threadIdx.y, y[5] = threadIdx.z;
    y[6] = gridDim.x, y[7] = gridDim.y, y[8] = gridDim.z;
    y[9] = blockDim.x, y[10] = blockDim.y, y[11] = blockDim.z;
}

__constant__ int SQUARES[4] = {0, 1, 4, 9};

// y[i][thread] = built-in function i of two x
extern "C" __global__ void __launch_bounds__(1024) integers(const test_args p) {
    const int t = threadIdx.x, size = blockDim.x, a = p.x[t], b = p.x[size + t];
    const unsigned u = unsigned(a), v = unsigned(b);
    int i = 0;
    p.y[size * i++ + t] = __dp4a(a, b, 7);
    p.y[size * i++ + t] = int(__dp4a(u, v, 7u));
    p.y[size * i++ + t] = int(__byte_perm(u, v, 0x6385));
    p.y[size * i++ + t] = int(__byte_perm(u, v, 0xc19f));
    p.y[size * i++ + t] = int(__vsub4(u, v));
    p.y[size * i++ + t] = int(__vadd4(u, v));
    p.y[size * i++ + t] = int(__vsubss4(u, v));
    p.y[size * i++ + t] = int(__funnelshift_l(u, v, 5));
    p.y[size * i++ + t] = int(__funnelshift_r(u, v, 5));
    p.y[size * i++ + t] = __popc(u);
    p.y[size * i++ + t] = __clz(a);
    p.y[size * i++ + t] = __ffs(a);
    p.y[size * i++ + t] = int(__brev(u));
    p.y[size * i++ + t] = __mulhi(a, b);
    p.y[size * i++ + t] = int(__umulhi(u, v));
    p.y[size * i++ + t] = min(a, b);
    p.y[size * i++ + t] = max(a, b);
    p.y[size * i++ + t] = int(max(u, v));
    p.y[size * i++ + t] = SQUARES[t % 4];
}

// y[i][thread] = bits of built-in function i of two floats
extern "C" __global__ void __launch_bounds__(1024) floats(const test_args p) {
    const int t = threadIdx.x, size = blockDim.x;
    const float a = __int_as_float(p.x[t]), b = __int_as_float(p.x[size + t]);
    int i = 0;
    p.y[size * i++ + t] = __float_as_int(fmaf(a, b, -a));
    p.y[size * i++ + t] = __float_as_int(fminf(a, b));
    p.y[size * i++ + t] = __float_as_int(max(a, b));
    p.y[size * i++ + t] = __float_as_int(rintf(a));
    p.y[size * i++ + t] = __float2int_rn(a);
    p.y[size * i++ + t] = __float2int_rz(a);
    const float4 wide = make_float4(a, b, a, b);
    ((float4*)(p.y + size * i))[t] = wide;
}

// y = x, and what shared memory, and y, hold at first
extern "C" __global__ void __launch_bounds__(1024) leftovers(const test_args p) {
    __shared__ int s[1024];
    const int t = threadIdx.x;
    p.y[t] = s[t];
    s[t] = p.x[t];
}
