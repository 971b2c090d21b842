// Kernels that use each thing that the simulator offers, with known answers.

struct sums_args { const float* x; float* y; int n; };
// y[block] = sum of 256 of x
extern "C" __global__ void __launch_bounds__(256) sums(const sums_args p) {
    __shared__ float partial[8];
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    float v = i < p.n ? p.x[i] : 0.0f;
    for (int d = 16; d > 0; d /= 2) v += __shfl_xor_sync(0xffffffffu, v, d);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = v;
    __syncthreads();
    if (threadIdx.x == 0) {
        float s = 0;
        for (int w = 0; w < 8; w++) s += partial[w];
        p.y[blockIdx.x] = s;
    }
}
