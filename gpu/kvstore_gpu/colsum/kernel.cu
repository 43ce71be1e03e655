// Attention that each key gets from some queries: exp(q k scale - lse), summed over queries and the heads that share a
// KV head, in float32 and in a fixed order. A block has one tile of keys and goes through all rows.

template <typename T, int DIM>
__global__ void __launch_bounds__(WARPS * 32) column_sums(
    const T* queries, const int* positions, const float* lse, int count, int heads, int group, u64 keys,
    const int* table, int tokens, int page_tokens, i64 page_stride, int token_stride, int head_stride, float scale,
    float* out)
{
    alignas(16) __shared__ T key_tile[KEYS * DIM];
    __shared__ float partial[WARPS][KEYS];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, head = blockIdx.y, first = blockIdx.x * KEYS;
    const int rows = count * group;
    const Pages pages = {keys, table, page_tokens, page_stride, token_stride, head_stride};
    load_tile<T, DIM>(key_tile, pages, first, tokens, head);
    __syncthreads();
    float sums[KEYS / 8][2] = {};
    for (int start = 0; start < rows; start += ROWS) {
        if (positions[(min(start + ROWS, rows) - 1) / group] < first) continue;  // sorted: none of them sees these keys
        int limit[2];
        float shift[2];
        const T* query[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int row = start + warp * 16 + lane / 4 + i * 8;
            const bool there = row < rows;
            const i64 place = there ? i64(row / group) * heads + head * group + row % group : 0;
            limit[i] = there ? positions[row / group] : -1;
            shift[i] = there ? lse[place] : 0;
            query[i] = there ? queries + place * DIM : nullptr;
        }
        u32 q[DIM / 16][4];
#pragma unroll
        for (int k = 0; k < DIM / 16; k++) load_rows(q[k], query[0], query[1], k * 16);
        float s[KEYS / 8][4];
        products<T, DIM>(s, q, key_tile);
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int key = first + n * 8 + lane % 4 * 2 + i % 2;
                if (key <= limit[i / 2]) sums[n][i % 2] += __expf(s[n][i] * scale - shift[i / 2]);
            }
    }
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float x = sums[n][i];
            for (int step = 4; step < 32; step *= 2) x += __shfl_xor_sync(~0u, x, step);
            if (lane < 4) partial[warp][n * 8 + lane * 2 + i] = x;
        }
    __syncthreads();
    if (threadIdx.x < KEYS && first + int(threadIdx.x) < tokens) {
        float x = 0;
        for (int w = 0; w < WARPS; w++) x += partial[w][threadIdx.x];
        out[i64(head) * tokens + first + threadIdx.x] = x;
    }
}
