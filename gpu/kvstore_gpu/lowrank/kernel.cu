// Keys from a low-rank form, at chosen rows, turned to their positions: rope(A[row] B), 64 rows and all of a head a block.

constexpr int STEP = 64;  // columns of A, rows of B, in shared memory at once

template <typename T, int DIM, bool INTERLEAVED>
__global__ void __launch_bounds__(WARPS * 32) reconstruct(
    const bf16* left, int rank, const bf16* right, const int* chosen, int count, int tokens, const float* cos,
    const float* sin, int pairs, T* out)
{
    alignas(16) __shared__ bf16 tile[DIM * STEP];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, head = blockIdx.y;
    int from[2];
    i64 to[2];
    const bf16* row[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int place = blockIdx.x * ROWS + warp * 16 + lane / 4 + i * 8;
        const int found = place < count ? chosen[i64(head) * count + place] : -1;
        const bool there = found >= 0 && found < tokens;
        from[i] = there ? found : -1;
        to[i] = (i64(head) * count + place) * DIM;
        row[i] = there ? left + i64(found) * rank : nullptr;
    }
    float sums[DIM / 8][4] = {};
    for (int start = 0; start < rank; start += STEP) {
        const int width = min(STEP, rank - start);  // a multiple of 16
        __syncthreads();
        for (int at = threadIdx.x; at < DIM * STEP / 8; at += WARPS * 32) {
            const int n = at / (STEP / 8), column = at % (STEP / 8) * 8;
            Pack<bf16, 8> piece = {};
            if (column < width)
                piece = *reinterpret_cast<const Pack<bf16, 8>*>(right + (i64(head) * DIM + n) * rank + start + column);
            *reinterpret_cast<Pack<bf16, 8>*>(tile_at<STEP>(tile, n, column)) = piece;
        }
        __syncthreads();
        for (int k = 0; k < width; k += 16) {
            u32 a[4];
            load_rows(a, row[0], row[1], start + k);
#pragma unroll
            for (int n = 0; n < DIM / 8; n += 2) {
                u32 b[4];
                load_matrices(b, tile_at<STEP>(tile, n * 8 + lane / 16 * 8 + lane % 8, k + lane / 8 % 2 * 8));
                mma(sums[n], a, b[0], b[1], bf16());
                mma(sums[n + 1], a, b[2], b[3], bf16());
            }
        }
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        if (from[i] < 0) continue;
        const float* const c = cos + i64(from[i]) * pairs;
        const float* const s = sin + i64(from[i]) * pairs;
#pragma unroll
        for (int n = 0; n < DIM / 8; n++)
#pragma unroll
            for (int e = 0; e < (INTERLEAVED ? 1 : 2); e++) {
                const int column = n * 8 + lane % 4 * 2 + e, pair = INTERLEAVED ? column / 2 : column;
                // NeoX: the partner is half a head away, in the same lane; only whole heads are turned that way.
                float& x = sums[n][2 * i + e];
                float& y = INTERLEAVED ? sums[n][2 * i + 1] : sums[(n + DIM / 16) % (DIM / 8)][2 * i + e];
                if (pair < pairs && (INTERLEAVED || n < DIM / 16)) {
                    const float first = x;
                    x = first * c[pair] - y * s[pair];
                    y = y * c[pair] + first * s[pair];
                }
            }
#pragma unroll
        for (int n = 0; n < DIM / 8; n++)
            from_floats(out + to[i] + n * 8 + lane % 4 * 2, sums[n][2 * i], sums[n][2 * i + 1]);
    }
}
