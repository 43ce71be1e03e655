// Attention of some queries at positions of their own over all keys before them (and their own).
//
// A row is a query and one of the heads that share a KV head, so a tile of keys serves all of these. Rows are sorted by
// position: a block stops behind the position of its last row, and only tiles that reach beyond its first are masked.

constexpr float LOG2_E = 1.4426950408889634f;

template <typename T, int DIM>
__global__ void __launch_bounds__(WARPS * 32) attend(
    const T* queries, const int* positions, int count, int heads, int group, u64 keys, u64 values, const int* table,
    int tokens, int page_tokens, i64 page_stride, int token_stride, int head_stride, float scale, T* out, float* lse)
{
    alignas(16) __shared__ T key_tile[KEYS * DIM];
    alignas(16) __shared__ T value_tile[KEYS * DIM];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, head = blockIdx.y;
    const int rows = count * group, first_row = (gridDim.x - 1 - blockIdx.x) * ROWS;  // the longest first
    const Pages key_pages = {keys, table, page_tokens, page_stride, token_stride, head_stride};
    const Pages value_pages = {values, table, page_tokens, page_stride, token_stride, head_stride};

    // This lane's two rows.
    i64 place[2];
    int limit[2];
    const T* query[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int row = first_row + warp * 16 + lane / 4 + i * 8;
        const bool there = row < rows;
        place[i] = there ? i64(row / group) * heads + head * group + row % group : -1;
        limit[i] = there ? min(positions[row / group], tokens - 1) : -1;
        query[i] = there ? queries + place[i] * DIM : nullptr;
    }
    u32 q[DIM / 16][4];
#pragma unroll
    for (int k = 0; k < DIM / 16; k++) load_rows(q[k], query[0], query[1], k * 16);
    const int last_row = min(first_row + ROWS, rows) - 1;
    const int end = min(positions[last_row / group], tokens - 1) + 1, sure = positions[first_row / group];

    float sums[DIM / 8][4] = {}, most[2] = {-INFINITY_, -INFINITY_}, total[2] = {};
    for (int first = 0; first < end; first += KEYS) {
        __syncthreads();  // nobody reads the tile before any more
        load_tile<T, DIM>(key_tile, key_pages, first, tokens, head);
        load_tile<T, DIM>(value_tile, value_pages, first, tokens, head);
        __syncthreads();
        float s[KEYS / 8][4];
        products<T, DIM>(s, q, key_tile);
        const bool masked = first + KEYS - 1 > sure;
        float top[2] = {most[0], most[1]};
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int key = first + n * 8 + lane % 4 * 2 + i % 2;
                s[n][i] = masked && key > limit[i / 2] ? -INFINITY_ : s[n][i] * (scale * LOG2_E);
                top[i / 2] = fmaxf(top[i / 2], s[n][i]);
            }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            top[i] = fmaxf(top[i], __shfl_xor_sync(~0u, top[i], 1));
            top[i] = fmaxf(top[i], __shfl_xor_sync(~0u, top[i], 2));
            const float shrink = most[i] == -INFINITY_ ? 0 : exp2f(most[i] - top[i]);
            most[i] = top[i];
            total[i] *= shrink;
#pragma unroll
            for (int n = 0; n < DIM / 8; n++) {
                sums[n][2 * i] *= shrink;
                sums[n][2 * i + 1] *= shrink;
            }
        }
#pragma unroll
        for (int k = 0; k < KEYS / 16; k++) {
            u32 p[4];
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float (&mine)[4] = s[2 * k + half];
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    mine[i] = most[i / 2] == -INFINITY_ ? 0 : exp2f(mine[i] - most[i / 2]);
                    total[i / 2] += mine[i];
                }
                p[2 * half] = pair_of<T>(mine[0], mine[1]);
                p[2 * half + 1] = pair_of<T>(mine[2], mine[3]);
            }
#pragma unroll
            for (int n = 0; n < DIM / 8; n += 2) {
                u32 v[4];
                load_transposed(v, tile_at<DIM>(value_tile, k * 16 + lane % 16, (n + lane / 16) * 8));
                mma(sums[n], p, v[0], v[1], T());
                mma(sums[n + 1], p, v[2], v[3], T());
            }
        }
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        total[i] += __shfl_xor_sync(~0u, total[i], 1);
        total[i] += __shfl_xor_sync(~0u, total[i], 2);
        if (place[i] < 0) continue;
        const float inverse = total[i] > 0 ? 1 / total[i] : 0;
        T* const to = out + place[i] * DIM + lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < DIM / 8; n++) from_floats(to + n * 8, sums[n][2 * i] * inverse, sums[n][2 * i + 1] * inverse);
        if (lane % 4 == 0) lse[place[i]] = (most[i] + log2f(total[i])) / LOG2_E;
    }
}
