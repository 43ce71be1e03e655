// MiniCache's merge of two neighbouring layers: one direction for both vectors, and their two lengths.
//
// A vector lies in LANES lanes, 8 elements in each; the lanes of a warp hold several vectors of one token. The angle is
// 2 atan2(|a - b|, |a + b|): the arc cosine of a product says 0 below 3e-4 and is off by percents just above.

constexpr float PARALLEL = 1e-4f;

template <typename T, int LANES>
__device__ __forceinline__ float unit(const T* from, bool there, float (&x)[8]) {
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] = 0;
    if (there) load<T, 8>(from, x);
    float sum = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) sum += x[i] * x[i];
    const float length = sqrtf(lane_sum<LANES>(sum)), inverse = length > 0 ? 1 / length : 0;
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] *= inverse;
    return length;
}

template <typename T, int LANES>
__global__ void merge(
    const T* lower, const T* upper, int tokens, int heads, int dim, float t, T* direction, float* lengths, float* angle)
{
    constexpr int AT_ONCE = 32 / LANES;
    const int lane = threadIdx.x % 32, part = lane % LANES, warps = blockDim.x / 32;
    for (int token = blockIdx.x * warps + threadIdx.x / 32; token < tokens; token += gridDim.x * warps) {
        float angles = 0;
        for (int first = 0; first < heads; first += AT_ONCE) {
            const int head = first + lane / LANES;
            const bool there = head < heads && part * 8 < dim;
            const i64 at = (i64(token) * heads + head) * dim + part * 8;
            float a[8], b[8], e[8], apart = 0, together = 0;
            const float la = unit<T, LANES>(lower + at, there, a), lb = unit<T, LANES>(upper + at, there, b);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                apart += (a[i] - b[i]) * (a[i] - b[i]);
                together += (a[i] + b[i]) * (a[i] + b[i]);
            }
            apart = lane_sum<LANES>(apart);
            together = lane_sum<LANES>(together);
            const float half_sine = sqrtf(apart), half_cosine = sqrtf(together);  // each twice that of half the angle
            float omega = 2 * atan2f(half_sine, half_cosine), wa, wb;
            const float sine = half_sine * half_cosine / 2;
            if (la == 0 || lb == 0) {  // no direction of its own: the other's
                omega = 0;
                wa = la > 0, wb = lb > 0;
            } else if (sine < PARALLEL) {
                wa = 1 - t, wb = t;
            } else {
                wa = sinf((1 - t) * omega) / sine, wb = sinf(t * omega) / sine;
            }
            float sum = 0;
#pragma unroll
            for (int i = 0; i < 8; i++) {
                e[i] = wa * a[i] + wb * b[i];
                sum += e[i] * e[i];
            }
            sum = lane_sum<LANES>(sum);
            const float inverse = sum > 0 ? rsqrtf(sum) : 0;
#pragma unroll
            for (int i = 0; i < 8; i++) e[i] *= inverse;
            if (there) store<T, 8>(direction + at, e);
            if (head < heads && part == 0) {
                lengths[i64(token) * heads + head] = la;
                lengths[(i64(tokens) + token) * heads + head] = lb;
                angles += omega;
            }
        }
        angles = lane_sum(angles);
        if (lane == 0) angle[token] = angles / heads;
    }
}

template <typename T>
__global__ void restore(
    const T* direction, const float* lengths, i64 vectors, int octets, T* lower, T* upper)
{
    const i64 total = vectors * octets;
    for (i64 at = blockIdx.x * i64(blockDim.x) + threadIdx.x; at < total; at += i64(gridDim.x) * blockDim.x) {
        const i64 vector = at / octets;
        const float la = lengths[vector], lb = lengths[vectors + vector];
        float e[8], x[8];
        load<T, 8>(direction + at * 8, e);
#pragma unroll
        for (int i = 0; i < 8; i++) x[i] = la * e[i];
        store<T, 8>(lower + at * 8, x);
#pragma unroll
        for (int i = 0; i < 8; i++) x[i] = lb * e[i];
        store<T, 8>(upper + at * 8, x);
    }
}
