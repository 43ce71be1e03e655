// How far KV computed anew is from KV that was kept: squared distance of each token, summed in float32 in a fixed order.
// One warp a token; `relative` divides by the squared length of the new KV.

template <typename T, int VEC>
__global__ void deviation(const T* fresh, const T* kept, int tokens, int width, int relative, float* out)
{
    const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
    for (int token = blockIdx.x * warps + threadIdx.x / 32; token < tokens; token += gridDim.x * warps) {
        const T* const a = fresh + i64(token) * width;
        const T* const b = kept + i64(token) * width;
        float distance = 0, length = 0;
#pragma unroll 4
        for (int at = lane * VEC; at < width; at += 32 * VEC) {
            float x[VEC], y[VEC];
            load<T, VEC>(a + at, x);
            load<T, VEC>(b + at, y);
#pragma unroll
            for (int i = 0; i < VEC; i++) {
                distance += (x[i] - y[i]) * (x[i] - y[i]);
                length += x[i] * x[i];
            }
        }
        distance = lane_sum(distance);
        length = lane_sum(length);
        if (lane == 0) out[token] = relative ? distance / fmaxf(length, 1e-30f) : distance;
    }
}
