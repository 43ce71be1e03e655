// Attention that each key gets from some queries: exp(q k scale - lse), summed over queries and the heads that share a
// KV head, in float32 and in a fixed order. A block has one tile of keys and goes through all rows. With values each sum
// is multiplied by the length of its key's value.

// Sum of squares of half a row; two neighbouring threads have one row.
template <typename T, int DIM>
__device__ __forceinline__ float half_squares(const T* row) {
    float sum = 0;
#pragma unroll
    for (int column = 0; column < DIM / 2; column += 8) {
        float x[8];
        load(row + threadIdx.x % 2 * (DIM / 2) + column, x);
#pragma unroll
        for (int i = 0; i < 8; i++) sum += x[i] * x[i];
    }
    return sum;
}

template <typename T, int DIM>
__global__ void __launch_bounds__(WARPS * 32) column_sums(
    const T* queries, const int* positions, const float* lse, i64 query_stride, int lse_stride, int lse_head, int count,
    int group, u64 keys, const int* table, int tokens, int page_tokens, i64 page_stride, int token_stride, int head_stride,
    u64 values, i64 value_page_stride, int value_token_stride, int value_head_stride, float scale, float* out)
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
            const int asked = row / group, by = head * group + row % group;
            limit[i] = there ? positions[asked] : -1;
            shift[i] = there ? lse[i64(asked) * lse_stride + i64(by) * lse_head] : 0;
            query[i] = there ? queries + asked * query_stride + by * DIM : nullptr;
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
    const int key = threadIdx.x / 2;
    const bool there = first + key < tokens;
    float squares = 0;
    if (values) {
        const Pages fetched = {values, table, page_tokens, value_page_stride, value_token_stride, value_head_stride};
        if (there) squares = half_squares<T, DIM>(fetched.at<T>(first + key, head));
        squares += __shfl_xor_sync(~0u, squares, 1);
    }
    if (there && threadIdx.x % 2 == 0) {
        float x = 0;
        for (int w = 0; w < WARPS; w++) x += partial[w][key];
        out[i64(head) * tokens + first + key] = values ? x * sqrtf(squares) : x;
    }
}
