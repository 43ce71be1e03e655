// Every `size` elements (a power of two of at least 8) of a dense array, over the square root of `size`.

template <typename T>
__global__ void rotate(const T* from, T* to, i64 octets, int size)
{
    const float norm = __frsqrt_rn(float(size));
    const i64 step = i64(gridDim.x) * blockDim.x;
    // All lanes of a warp stay in the loop as long as one of them has work: they exchange.
    for (i64 at = blockIdx.x * i64(blockDim.x) + threadIdx.x; at - threadIdx.x % 32 < octets; at += step) {
        float x[8] = {};
        if (at < octets) load<T, 8>(from + at * 8, x);
        hadamard(x, size / 8);
#pragma unroll
        for (int i = 0; i < 8; i++) x[i] *= norm;
        if (at < octets) store<T, 8>(to + at * 8, x);
    }
}
