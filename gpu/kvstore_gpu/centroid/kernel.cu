// Scores of centroids for a query: exp(q c scale) over the sum of n exp(q c scale), n the keys of a centroid; the most of
// the heads that share a KV head. A centroid of no keys has no score.

// One warp a centroid: the products with all heads of its group.
template <typename T>
__global__ void logits(const T* query, const T* centroids, int kv_heads, int group, int count, int dim, float scale, float* out)
{
    const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
    const i64 total = i64(kv_heads) * count;
    for (i64 at = blockIdx.x * i64(warps) + threadIdx.x / 32; at < total; at += i64(gridDim.x) * warps) {
        const i64 kv_head = at / count, centroid = at % count;
        for (int member = 0; member < group; member++) {
            const i64 head = kv_head * group + member;
            float sum = 0;
            for (int d = lane * 8; d < dim; d += 256) {
                float x[8], y[8];
                load<T, 8>(query + head * dim + d, x);
                load<T, 8>(centroids + at * dim + d, y);
#pragma unroll
                for (int i = 0; i < 8; i++) sum += x[i] * y[i];
            }
            sum = lane_sum(sum);
            if (lane == 0) out[head * count + centroid] = sum * scale;
        }
    }
}

constexpr int NORMAL_THREADS = 256;

__device__ float over_block(float x, bool most, float* scratch) {
    x = most ? lane_max(x) : lane_sum(x);
    __syncthreads();
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
    __syncthreads();
    float all = scratch[0];
    for (int w = 1; w < NORMAL_THREADS / 32; w++) all = most ? fmaxf(all, scratch[w]) : all + scratch[w];
    return all;
}

// One block a KV head.
__global__ void __launch_bounds__(NORMAL_THREADS) normalise(const float* found, const float* sizes, int group, int count, float* out)
{
    __shared__ float scratch[NORMAL_THREADS / 32];
    const i64 kv_head = blockIdx.x;
    const float* const size = sizes + kv_head * count;
    for (int member = 0; member < group; member++) {
        const float* const mine = found + (kv_head * group + member) * count;
        float most = -INFINITY_, sum = 0;
        for (int j = threadIdx.x; j < count; j += NORMAL_THREADS)
            if (size[j] > 0) most = fmaxf(most, mine[j]);
        most = over_block(most, true, scratch);
        for (int j = threadIdx.x; j < count; j += NORMAL_THREADS)
            if (size[j] > 0) sum += size[j] * expf(mine[j] - most);
        sum = over_block(sum, false, scratch);
        for (int j = threadIdx.x; j < count; j += NORMAL_THREADS) {
            const float score = size[j] > 0 ? expf(mine[j] - most) / sum : 0;
            float& to = out[kv_head * count + j];
            to = member ? fmaxf(to, score) : score;
        }
    }
}
