// The `wanted` highest of `count` scores, as ascending indices. Among equal scores the lower index wins, so every rank
// and every run chooses the same. One thread block: a radix select over four bytes, then a stable compaction.
//
// Scores that are not numbers count as the highest: KV that gives none should be computed anew.

constexpr int SELECT_THREADS = 1024, EACH = 8, CHUNK = SELECT_THREADS * EACH;

__device__ __forceinline__ u32 rank_key(float x, bool forced) {
    if (forced) return ~0u;
    u32 bits = __float_as_uint(x);  // no arithmetic: it would flush the smallest numbers to zero
    if ((bits & 0x7fffffffu) > 0x7f800000u) return ~0u - 1;
    if (bits == 0x80000000u) bits = 0;  // -0 is 0
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Sum of `mine` over the threads before this one; `total` is that of all.
__device__ int before(int mine, int* scratch, int& total) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int sum = mine;
    for (int step = 1; step < 32; step *= 2) {
        const int other = __shfl_up_sync(~0u, sum, step);
        if (lane >= step) sum += other;
    }
    __syncthreads();
    if (lane == 31) scratch[warp] = sum;
    __syncthreads();
    int earlier = 0;
    total = 0;
    for (int w = 0; w < SELECT_THREADS / 32; w++) {
        if (w < warp) earlier += scratch[w];
        total += scratch[w];
    }
    return earlier + sum - mine;
}

__global__ void __launch_bounds__(SELECT_THREADS) select_top(
    const float* scores, const u8* forced, int count, int wanted, int* chosen)
{
    __shared__ u32 bins[256];
    __shared__ u32 prefix;
    __shared__ int left;
    __shared__ int scratch[SELECT_THREADS / 32];
    if (threadIdx.x == 0) { prefix = 0; left = wanted; }
    for (int shift = 24; shift >= 0; shift -= 8) {
        if (threadIdx.x < 256) bins[threadIdx.x] = 0;
        __syncthreads();
        const u32 known = prefix, mask = shift == 24 ? 0 : ~0u << (shift + 8);
        for (int i = threadIdx.x; i < count; i += SELECT_THREADS) {
            const u32 key = rank_key(scores[i], forced && forced[i]);
            if ((key & mask) == known) atomicAdd(&bins[key >> shift & 255], 1);
        }
        __syncthreads();
        if (threadIdx.x == 0) {  // the bin that holds the last one wanted
            int rest = left, bin = 255;
            while (bin > 0 && int(bins[bin]) < rest) rest -= bins[bin--];
            prefix = known | u32(bin) << shift;
            left = rest;
        }
        __syncthreads();
    }
    const u32 threshold = prefix;
    const int ties = left;  // how many that are equal to the threshold are taken
    int out = 0, tied = 0;
    for (int start = 0; start < count; start += CHUNK) {
        u32 keys[EACH];
        int equal = 0;
#pragma unroll
        for (int e = 0; e < EACH; e++) {
            const int i = start + threadIdx.x * EACH + e;
            keys[e] = i < count ? rank_key(scores[i], forced && forced[i]) : 0;
            equal += i < count && keys[e] == threshold;
        }
        int total;
        int rank = tied + before(equal, scratch, total);
        tied += total;
        int mine = 0;
        bool take[EACH];
#pragma unroll
        for (int e = 0; e < EACH; e++) {
            const int i = start + threadIdx.x * EACH + e;
            take[e] = i < count && (keys[e] > threshold || (keys[e] == threshold && rank < ties));
            rank += i < count && keys[e] == threshold;
            mine += take[e];
        }
        int place = out + before(mine, scratch, total);
        out += total;
#pragma unroll
        for (int e = 0; e < EACH; e++)
            if (take[e]) chosen[place++] = start + threadIdx.x * EACH + e;
    }
}
