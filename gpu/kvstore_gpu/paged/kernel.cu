// Pages of the engine's cache to and from blocks, byte for byte.
//
// A tile is one page of one side of one layer. Its units of `sizeof(U)` bytes are taken in the block's order, so that
// the block's side, which may lie across PCIe, is always read or written contiguously, and BATCH of them are under way
// in every thread before the first is stored.

constexpr int BATCH = 8;

struct alignas(16) unit16 { u32 at[4]; };
struct alignas(8) unit8 { u32 at[2]; };
struct unit4 { u32 at; };
struct unit2 { u16 at; };
struct unit1 { u8 at; };

template <bool TO_PAGES, typename U>
__global__ void copy_pages(
    const Job* jobs, int count, const u64* bases, int first_view, int views, i64 place_stride, i64 view_stride,
    i64 page_stride, int outer_stride, int inner, int inner_stride, int row, int units)
{
    const i64 tiles = i64(count) * views;
    for (i64 tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const Job job = jobs[tile % count];
        const int view = first_view + int(tile / count);
        char* const page = reinterpret_cast<char*>(bases[view]) + job.page * page_stride;
        U* const block = reinterpret_cast<U*>(job.block + view * view_stride + job.place * place_stride);
        for (int start = threadIdx.x; start < units; start += BATCH * blockDim.x) {
            U batch[BATCH];
            U* in_page[BATCH];
#pragma unroll
            for (int i = 0; i < BATCH; i++) {
                const int unit = start + i * blockDim.x;
                if (unit < units) {
                    const int line = unit / row, column = unit - line * row;
                    const int out = line / inner, in = line - out * inner;
                    in_page[i] = reinterpret_cast<U*>(page + i64(out) * outer_stride + i64(in) * inner_stride) + column;
                    batch[i] = TO_PAGES ? block[unit] : *in_page[i];
                }
            }
#pragma unroll
            for (int i = 0; i < BATCH; i++) {
                const int unit = start + i * blockDim.x;
                if (unit < units) *(TO_PAGES ? in_page[i] : block + unit) = batch[i];
            }
        }
    }
}
