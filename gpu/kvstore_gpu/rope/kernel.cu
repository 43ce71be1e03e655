// Blocks to pages, keys turned on the way, values as they are.

template <typename T, bool INTERLEAVED, int VEC>
__global__ void shift(
    const Job* jobs, int count, const u64* bases, int first_layer, int layers, i64 place_stride, i64 view_stride,
    i64 page_stride, int token_stride, int head_stride, int tokens, int heads, int dim, int pairs, const float* cos,
    const float* sin, int one_row, const u8* skipped)
{
    const int items = (INTERLEAVED ? 2 * pairs : pairs) / VEC + (dim - 2 * pairs) / VEC;
    const int each = tokens * heads * items;
    const i64 tiles = i64(count) * layers * 2;
    for (i64 tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const int index = int(tile % count), view = first_layer * 2 + int(tile / count);
        const Job job = jobs[index];
        const bool turn = view % 2 == 0 && !skipped[view / 2];
        char* const page = reinterpret_cast<char*>(bases[view]) + job.page * page_stride;
        const char* const block =
            reinterpret_cast<const char*>(job.block + view * view_stride + job.place * place_stride);
#pragma unroll 4
        for (int at = threadIdx.x; at < each; at += blockDim.x) {
            const int vector = at / items, item = at - vector * items;
            const int token = vector / heads, head = vector - token * heads;
            const i64 row = one_row ? 0 : i64(index) * tokens + token;
            turn_item<T, INTERLEAVED, VEC>(
                reinterpret_cast<const T*>(block) + i64(vector) * dim,
                reinterpret_cast<T*>(page + i64(token) * token_stride + i64(head) * head_stride), item, pairs,
                cos + row * pairs, sin + row * pairs, turn);
        }
    }
}
