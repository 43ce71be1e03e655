// Rows of tokens to and from slots of one layer's cache. A slot that is not there (padding is -1) is left alone.

struct alignas(16) unit16 { u32 at[4]; };
struct unit4 { u32 at; };
struct unit2 { u16 at; };

template <bool TO_CACHE, typename U>
__global__ void copy_rows(
    u64 rows, u64 base, const i64* slots, i64 count, i64 slots_there, int page_tokens, i64 page_stride,
    int token_stride, int head_stride, int heads, int head_units)
{
    const int each = heads * head_units;
    const i64 total = count * each;
    for (i64 at = blockIdx.x * i64(blockDim.x) + threadIdx.x; at < total; at += i64(gridDim.x) * blockDim.x) {
        const i64 row = at / each;
        const int unit = int(at - row * each), head = unit / head_units, column = unit - head * head_units;
        const i64 slot = slots[row];
        if (slot < 0 || slot >= slots_there) continue;
        const i64 page = slot / page_tokens;
        char* const token = reinterpret_cast<char*>(base) + page * page_stride + (slot - page * page_tokens) * token_stride;
        U* const cached = reinterpret_cast<U*>(token + i64(head) * head_stride) + column;
        U* const dense = reinterpret_cast<U*>(rows) + at;
        if (TO_CACHE) *cached = *dense;
        else *dense = *cached;
    }
}
