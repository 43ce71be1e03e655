// Tokens of stored blocks to the rows of a prompt, keys turned on the way by one distance a piece, values as they are.

struct Piece {
    u64 from;    // the first token's key in the first layer, counted from where the blocks lie
    i64 side;    // bytes from a layer's keys to its values, and on to the next layer's keys
    i64 before;  // bytes of one side of all blocks before this one
    int row;     // of the first token
    int tokens;
    int moved;   // whether its keys are turned at all; if not they keep their bits
    int unused;
};

constexpr int TILE = 8;  // tokens that a thread block takes of a piece at once

template <typename T, bool INTERLEAVED, int VEC>
__global__ void place(
    const Piece* pieces, u64 blocks, int count, int tiles, const u64* bases, const u8* skipped, int layers, int row_stride,
    int heads, int dim, int pairs, const float* cos, const float* sin)
{
    const int items = (INTERLEAVED ? 2 * pairs : pairs) / VEC + (dim - 2 * pairs) / VEC;
    const i64 all = i64(count) * tiles * layers * 2;
    for (i64 at = blockIdx.x; at < all; at += gridDim.x) {
        const int view = int(at / (i64(count) * tiles)), inside = int(at % (i64(count) * tiles));
        const int index = inside / tiles, first = inside % tiles * TILE;
        const Piece piece = pieces[index];
        const int each = min(piece.tokens - first, TILE) * heads * items;
        const bool turn = piece.moved && view % 2 == 0 && !skipped[view / 2];
        const u64 sides = blocks + piece.from + 2 * layers * piece.before;
        const T* const from = reinterpret_cast<const T*>(sides + view * piece.side) + i64(first) * heads * dim;
        char* const to = reinterpret_cast<char*>(bases[view]) + i64(piece.row + first) * row_stride;
#pragma unroll 4
        for (int work = threadIdx.x; work < each; work += blockDim.x) {
            const int vector = work / items, item = work - vector * items;
            const int token = vector / heads, head = vector - token * heads;
            turn_item<T, INTERLEAVED, VEC>(
                from + i64(vector) * dim, reinterpret_cast<T*>(to + i64(token) * row_stride) + head * dim, item, pairs,
                cos + i64(index) * pairs, sin + i64(index) * pairs, turn);
        }
    }
}
