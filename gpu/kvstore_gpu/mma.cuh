// Products of 16 x 16 by 16 x 8 matrices on tensor cores, and tiles in shared memory that feed them.
//
// Lane l of a warp, with row l / 4 and column pair l % 4, holds of A rows r and r + 8, columns 2c, 2c + 1 and those plus
// 8; of B (given as its transpose, rows of 16) row r, the same columns; of the sum rows r and r + 8, columns 2c, 2c + 1.

#ifndef KVSTORE_EMULATED
__device__ __forceinline__ void mma(float (&sum)[4], const u32 (&a)[4], u32 b0, u32 b1, bf16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma(float (&sum)[4], const u32 (&a)[4], u32 b0, u32 b1, f16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ u32 shared_address(const void* at) {
    u32 out;
    asm("{ .reg .u64 p; cvta.to.shared.u64 p, %1; cvt.u32.u64 %0, p; }" : "=r"(out) : "l"(at));
    return out;
}
// Four 8 x 8 matrices; lane l names row l % 8 of matrix l / 8. Every lane gets two elements of row l / 4 of each.
__device__ __forceinline__ void load_matrices(u32 (&out)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3]) : "r"(shared_address(row)) : "memory");
}
#else
#include "emulated_mma.h"
#endif

constexpr int WARPS = 4, ROWS = 64, KEYS = 64;  // a block's warps; rows of a tile, 16 a warp; keys of a tile

// Element (row, column) of a tile of rows of WIDTH elements in shared memory. Pieces of 16 bytes change places by row, so
// that eight rows of one column lie in different banks.
template <int WIDTH, typename T>
__device__ __forceinline__ T* tile_at(T* tile, int row, int column) {
    return tile + row * WIDTH + ((column / 8 ^ row % 8) * 8 | column % 8);
}

// Rows of A straight from memory: elements 2c, 2c + 1 and those plus 8 of two rows; a row that is not there is null.
template <typename T>
__device__ __forceinline__ void load_rows(u32 (&a)[4], const T* upper, const T* lower, int column) {
    const int at = column + threadIdx.x % 4 * 2;
    a[0] = upper ? *reinterpret_cast<const u32*>(upper + at) : 0;
    a[1] = lower ? *reinterpret_cast<const u32*>(lower + at) : 0;
    a[2] = upper ? *reinterpret_cast<const u32*>(upper + at + 8) : 0;
    a[3] = lower ? *reinterpret_cast<const u32*>(lower + at + 8) : 0;
}

// Keys of one head in pages.
struct Pages {
    u64 base;
    const int* table;
    int page_tokens;
    i64 page_stride;
    int token_stride, head_stride;

    template <typename T>
    __device__ const T* at(int token, int head) const {
        const i64 page = table[token / page_tokens];
        return reinterpret_cast<const T*>(
            base + page * page_stride + i64(token % page_tokens) * token_stride + i64(head) * head_stride);
    }
};

// A tile of KEYS keys from `first` on into shared memory; zeros behind `count`.
template <typename T, int DIM>
__device__ __forceinline__ void load_tile(T* tile, const Pages& pages, int first, int count, int head) {
    typedef Pack<T, 8> Piece;
#pragma unroll 4
    for (int at = threadIdx.x; at < KEYS * DIM / 8; at += WARPS * 32) {
        const int key = at / (DIM / 8), column = at % (DIM / 8) * 8;
        Piece piece = {};
        if (first + key < count) piece = *reinterpret_cast<const Piece*>(pages.at<T>(first + key, head) + column);
        *reinterpret_cast<Piece*>(tile_at<DIM>(tile, key, column)) = piece;
    }
}

// Products of 16 rows with the KEYS rows of a tile: sums[n] are those with keys 8n to 8n + 7.
template <typename T, int DIM>
__device__ __forceinline__ void products(float (&sums)[KEYS / 8][4], const u32 (&rows)[DIM / 16][4], T* tile) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++) {
        sums[n][0] = sums[n][1] = sums[n][2] = sums[n][3] = 0;
#pragma unroll
        for (int k = 0; k < DIM; k += 32) {
            u32 b[4];
            load_matrices(b, tile_at<DIM>(tile, n * 8 + lane % 8, k + lane / 8 * 8));
            mma(sums[n], rows[k / 16], b[0], b[1], T());
            mma(sums[n], rows[k / 16 + 1], b[2], b[3], T());
        }
    }
}
