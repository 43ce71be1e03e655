// fp8 blocks to pages and back. A layer's part: scales [K|V][token] or [K|V][token][head], one byte each (an exponent of
// two, plus 127), then E4M3 codes [K|V][token][head][dim]. Keys are after the rotation, as the engine has them.

__device__ __forceinline__ float power(int exponent) { return __uint_as_float(u32(exponent + 127) << 23); }

// Magnitudes are compared as bits: floats without a sign have the order of integers, and what is not a number is above.
__device__ __forceinline__ u32 magnitude(float x) { return __float_as_uint(x) & 0x7fffffffu; }

// Above this a scale can not be said; and of float16 from 248 x 2^8 on a code is 256 x 2^8, which is beyond its end.
template <typename T> __device__ __forceinline__ u32 limit() { return (127u + 119 + 8) << 23 | 0x600000u; }  // 448 x 2^119
template <> __device__ __forceinline__ u32 limit<f16>() { return ((127u + 15) << 23 | 0x780000u) - 1; }

// Exponent of the least power of two above the largest magnitude over 448; that of nothing is 0. 448 is 2^8 times 1.75: a
// mantissa from that on counts as one power more.
__device__ __forceinline__ int exponent_of(u32 largest) {
    return largest == 0 ? 0 : min(max(int((largest + 0x200000u) >> 23) - 135, -126), 119);
}

// Four codes to numbers, times a factor over 256: moved up, a code is a float16 whose exponent bias is 8 larger.
__device__ __forceinline__ void from_e4m3(u32 codes, float factor, float* to) {
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        const u32 two = __byte_perm(codes, 0, i ? 0x3424 : 0x1404);  // the upper bytes of two halves
        const u32 halves = (two >> 1 & 0x3f803f80u) | (two & 0x80008000u);
        f16 low, high;
        low.bits = u16(halves), high.bits = u16(halves >> 16);
        to[i] = to_float(low) * factor;
        to[i + 1] = to_float(high) * factor;
    }
}

#if !defined(KVSTORE_EMULATED) && __CUDA_ARCH__ >= 890
__device__ __forceinline__ u32 two_e4m3(float a, float b) {
    u16 both;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(both) : "f"(b), "f"(a));
    return both;
}
#else
__device__ __forceinline__ u32 one_e4m3(float x) {  // to nearest, ties to even; |x| is at most 448
    const u32 bits = __float_as_uint(x), size = bits & 0x7fffffffu;
    u32 code;
    if (size < 0x3c800000u)  // below 2^-6: steps of 2^-9
        code = u32(rintf(__uint_as_float(size) * 512.0f));
    else
        code = ((size + 0x7ffffu + (size >> 20 & 1)) >> 20) - (120u << 3);
    return code | (bits >> 24 & 0x80u);
}
__device__ __forceinline__ u32 two_e4m3(float a, float b) { return one_e4m3(a) | one_e4m3(b) << 8; }
#endif

struct alignas(8) Codes { u32 at[2]; };  // eight of them

__device__ __forceinline__ Codes to_e4m3(const float (&x)[8], float factor) {
    Codes out;
#pragma unroll
    for (int i = 0; i < 8; i += 4)
        out.at[i / 4] = two_e4m3(x[i] * factor, x[i + 1] * factor) | two_e4m3(x[i + 2] * factor, x[i + 3] * factor) << 16;
    return out;
}

template <typename T>
__global__ void unpack(
    const Job* jobs, int count, const u64* bases, const i64* parts, int first_layer, int layers, i64 page_stride,
    int token_stride, int head_stride, int tokens, int heads, int dim, int block_tokens, int per_head)
{
    const int octets = dim / 8, each = tokens * heads * octets, scales = per_head ? heads : 1;
    const Digits start(threadIdx.x, octets, heads), stride(blockDim.x, octets, heads);
    for (int tile = blockIdx.x; tile < count * layers * 2; tile += gridDim.x) {
        const Job job = jobs[tile % count];
        const int view = first_layer * 2 + tile / count, side = view % 2;
        const char* const part = reinterpret_cast<const char*>(job.block + parts[view / 2]);
        const u8* const scale = reinterpret_cast<const u8*>(part);
        const u8* const codes = scale + i64(2) * block_tokens * scales;
        char* const page = reinterpret_cast<char*>(bases[view]) + job.page * page_stride;
        const i64 first = i64(side) * block_tokens + job.place * tokens;
        Digits digits = start;
#pragma unroll 4
        for (int at = threadIdx.x; at < each; at += blockDim.x) {
            const int octet = digits.first, head = digits.second, token = digits.third;
            digits.add(stride, octets, heads);
            const i64 row = first + token;
            const float factor = power(scale[per_head ? row * heads + head : row] - 127 + 8);
            const Codes packed = *reinterpret_cast<const Codes*>(codes + (row * heads + head) * dim + octet * 8);
            float x[8];
            from_e4m3(packed.at[0], factor, x);
            from_e4m3(packed.at[1], factor, x + 4);
            store<T, 8>(reinterpret_cast<T*>(page + i64(token) * token_stride + i64(head) * head_stride) + octet * 8, x);
        }
    }
}

// One scale a head, and heads of 8 x 2^n elements: a vector lies in `dim / 8` neighbouring lanes, and is read once.
template <typename T>
__global__ void pack_heads(
    const Job* jobs, int count, const u64* bases, const i64* parts, int first_layer, int layers, i64 page_stride,
    int token_stride, int head_stride, int tokens, int heads, int dim, int block_tokens, int per_head, int* bad)
{
    const int octets = dim / 8, each = tokens * heads * octets;
    const Digits start(threadIdx.x, octets, heads), stride(blockDim.x, octets, heads);
    for (int tile = blockIdx.x; tile < count * layers * 2; tile += gridDim.x) {
        const int index = tile % count;
        const Job job = jobs[index];
        const int view = first_layer * 2 + tile / count, side = view % 2;
        u8* const scale = reinterpret_cast<u8*>(job.block + parts[view / 2]);
        u8* const codes = scale + i64(2) * block_tokens * heads;
        const char* const page = reinterpret_cast<const char*>(bases[view]) + job.page * page_stride;
        const i64 first = i64(side) * block_tokens + job.place * tokens;
        Digits digits = start;
        // All lanes of a warp stay as long as one has work: they exchange.
#pragma unroll 4
        for (int at = threadIdx.x; at - int(threadIdx.x % 32) < each; at += blockDim.x) {
            const int octet = digits.first, head = digits.second, token = digits.third;
            digits.add(stride, octets, heads);
            float x[8] = {};
            u32 largest = 0;
            if (at < each)
                load<T, 8>(reinterpret_cast<const T*>(page + i64(token) * token_stride + i64(head) * head_stride) + octet * 8, x);
#pragma unroll
            for (int i = 0; i < 8; i++) largest = max(largest, magnitude(x[i]));
            for (int step = 1; step < octets; step *= 2) largest = max(largest, __shfl_xor_sync(~0u, largest, step));
            if (at >= each) continue;
            const int exponent = exponent_of(largest);
            const float inverse = power(-exponent);
            const i64 row = (first + token) * heads + head;
            if (octet == 0) scale[row] = u8(exponent + 127);
            if (largest > limit<T>()) bad[index / (block_tokens / tokens)] = 1;  // also if it is not a number
            *reinterpret_cast<Codes*>(codes + row * dim + octet * 8) = to_e4m3(x, inverse);
        }
    }
}

// One warp a row that shares a scale.
template <typename T>
__global__ void pack(
    const Job* jobs, int count, const u64* bases, const i64* parts, int first_layer, int layers, i64 page_stride,
    int token_stride, int head_stride, int tokens, int heads, int dim, int block_tokens, int per_head, int* bad)
{
    const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
    const int scales = per_head ? heads : 1, octets = dim / 8, each = per_head ? octets : heads * octets;
    for (int tile = blockIdx.x; tile < count * layers * 2; tile += gridDim.x) {
        const int index = tile % count;
        const Job job = jobs[index];
        const int view = first_layer * 2 + tile / count, side = view % 2;
        char* const part = reinterpret_cast<char*>(job.block + parts[view / 2]);
        u8* const scale = reinterpret_cast<u8*>(part);
        u8* const codes = scale + i64(2) * block_tokens * scales;
        const char* const page = reinterpret_cast<const char*>(bases[view]) + job.page * page_stride;
        const i64 first = i64(side) * block_tokens + job.place * tokens;
        for (int row = threadIdx.x / 32; row < tokens * scales; row += warps) {
            const int token = row / scales, head0 = row - token * scales;
            float x[8];
            u32 largest = 0;
            for (int at = lane; at < each; at += 32) {
                const int head = head0 + at / octets;
                load<T, 8>(reinterpret_cast<const T*>(page + i64(token) * token_stride + i64(head) * head_stride) + at % octets * 8, x);
#pragma unroll
                for (int i = 0; i < 8; i++) largest = max(largest, magnitude(x[i]));
            }
#pragma unroll
            for (int step = 16; step; step /= 2) largest = max(largest, __shfl_xor_sync(~0u, largest, step));
            const int exponent = exponent_of(largest);
            const float inverse = power(-exponent);
            if (lane == 0) scale[(first + token) * scales + head0] = u8(exponent + 127);
            if (largest > limit<T>()) bad[index / (block_tokens / tokens)] = 1;  // also if it is not a number
            for (int at = lane; at < each; at += 32) {
                const int head = head0 + at / octets;
                load<T, 8>(reinterpret_cast<const T*>(page + i64(token) * token_stride + i64(head) * head_stride) + at % octets * 8, x);
                *reinterpret_cast<Codes*>(codes + ((first + token) * heads + head) * dim + at % octets * 8) = to_e4m3(x, inverse);
            }
        }
    }
}
