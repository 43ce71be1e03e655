// MiniCache's merge of two neighbouring layers: one direction for both vectors, and their two lengths.
//
// A vector lies in LANES lanes, 8 elements in each; the lanes of a warp hold several vectors of one token, and several
// times so many one after the other. What is one number a vector, its angle and weights, costs more than what is one an
// element: each lane computes it for another vector. The angle is 2 atan2(|a - b|, |a + b|): the arc cosine of a product
// says 0 below 3e-4 and is off by percents just above.

constexpr float PARALLEL = 1e-4f;

// What the direction is made of: `a` and `b` are weights of the vectors as they are, `angle` lies between them.
struct Weights { float a, b, angle; };

// For vectors of lengths over 1 `ia` and `ib` (0 of vectors of no length), with the squares of difference and sum of
// their directions.
__device__ __forceinline__ Weights weights(float ia, float ib, float apart, float together, float t) {
    if (ia == 0 || ib == 0) return {ia, ib, 0};  // no direction of its own: the other's
    const float half_sine = sqrtf(apart), half_cosine = sqrtf(together);  // each twice that of half the angle
    const float angle = 2 * atan2f(half_sine, half_cosine), sine = half_sine * half_cosine / 2;
    if (sine >= PARALLEL) return {sinf((1 - t) * angle) / sine * ia, sinf(t * angle) / sine * ib, angle};
    const float length = (1 - t) * (1 - t) + t * t + (1 - t) * t * (together - apart) / 2;  // squared, of their mean
    const float inverse = length > 0 ? rsqrtf(length) : 0;
    return {(1 - t) * inverse * ia, t * inverse * ib, angle};
}

template <typename T, int LANES>
__global__ void merge(
    const T* lower, const T* upper, int tokens, int heads, int dim, float t, T* direction, float* lengths, float* angle)
{
    constexpr int AT_ONCE = 32 / LANES, TIMES = 4;
    const int lane = threadIdx.x % 32, part = lane % LANES, warps = blockDim.x / 32;
    for (int token = blockIdx.x * warps + threadIdx.x / 32; token < tokens; token += gridDim.x * warps) {
        float angles = 0;
        for (int first = lane / LANES; first - lane / LANES < heads; first += AT_ONCE * TIMES) {
            const i64 at = (i64(token) * heads + first) * dim + part * 8;
            float a[TIMES][8], b[TIMES][8], ia = 0, ib = 0, apart = 0, together = 0;
#pragma unroll
            for (int i = 0; i < TIMES; i++) {
                const int head = first + i * AT_ONCE;
#pragma unroll
                for (int k = 0; k < 8; k++) a[i][k] = b[i][k] = 0;
                if (head < heads && part * 8 < dim) {
                    load<T, 8>(lower + at + i * AT_ONCE * dim, a[i]);
                    load<T, 8>(upper + at + i * AT_ONCE * dim, b[i]);
                }
            }
#pragma unroll
            for (int i = 0; i < TIMES; i++) {
                const int head = first + i * AT_ONCE;
                float la = 0, lb = 0, difference = 0, sum = 0;
#pragma unroll
                for (int k = 0; k < 8; k++) la += a[i][k] * a[i][k], lb += b[i][k] * b[i][k];
                la = lane_sum<LANES>(la), lb = lane_sum<LANES>(lb);
                const float over_a = la > 0 ? rsqrtf(la) : 0, over_b = lb > 0 ? rsqrtf(lb) : 0;
#pragma unroll
                for (int k = 0; k < 8; k++) {
                    const float u = a[i][k] * over_a, v = b[i][k] * over_b;
                    difference += (u - v) * (u - v);
                    sum += (u + v) * (u + v);
                }
                difference = lane_sum<LANES>(difference), sum = lane_sum<LANES>(sum);
                if (part == i) ia = over_a, ib = over_b, apart = difference, together = sum;
                if (head < heads && part == 0) {
                    lengths[i64(token) * heads + head] = la * over_a;
                    lengths[(i64(tokens) + token) * heads + head] = lb * over_b;
                }
            }
            const Weights mine = weights(ia, ib, apart, together, t);
            if (part < TIMES && first + part * AT_ONCE < heads) angles += mine.angle;
#pragma unroll
            for (int i = 0; i < TIMES; i++) {
                const float wa = __shfl_sync(~0u, mine.a, i, LANES), wb = __shfl_sync(~0u, mine.b, i, LANES);
                float e[8];
#pragma unroll
                for (int k = 0; k < 8; k++) e[k] = wa * a[i][k] + wb * b[i][k];
                if (first + i * AT_ONCE < heads && part * 8 < dim) store<T, 8>(direction + at + i * AT_ONCE * dim, e);
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
