// What all kernels share. It stands before every kernel.cu, so that NVRTC needs no header of the toolkit.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define INFINITY_ __int_as_float(0x7f800000)

// Elements as they lie in memory; arithmetic is in float32, rounded once (to nearest, ties to even) on the way back.
struct bf16 { u16 bits; };
struct f16 { u16 bits; };
struct f32 { float bits; };

__device__ __forceinline__ float to_float(bf16 x) { return __uint_as_float(u32(x.bits) << 16); }
__device__ __forceinline__ float to_float(f32 x) { return x.bits; }
__device__ __forceinline__ void from_float(f32& x, float y) { x.bits = y; }

#ifndef KVSTORE_EMULATED  // the emulator of the tests brings its own
__device__ __forceinline__ float to_float(f16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}
__device__ __forceinline__ void from_float(bf16& x, float y) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(x.bits) : "f"(y)); }
__device__ __forceinline__ void from_float(f16& x, float y) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(x.bits) : "f"(y)); }

// Two at a time: half the instructions of the slowest kind.
__device__ __forceinline__ void from_floats(bf16* to, float a, float b) {
    u32 both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(b), "f"(a));
    *reinterpret_cast<u32*>(to) = both;
}
__device__ __forceinline__ void from_floats(f16* to, float a, float b) {
    u32 both;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(b), "f"(a));
    *reinterpret_cast<u32*>(to) = both;
}

// Float16 rounded towards minus (or plus) infinity, as bits.
__device__ __forceinline__ u16 half_down(float x) {
    u16 y;
    asm("cvt.rm.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ u16 half_up(float x) {
    u16 y;
    asm("cvt.rp.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}

// The lesser and the greater of two; what is not a number wins.
__device__ __forceinline__ float min_nan(float a, float b) {
    float y;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
    return y;
}
__device__ __forceinline__ float max_nan(float a, float b) {
    float y;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
    return y;
}

// a & mask | bits, in one instruction.
__device__ __forceinline__ u32 and_or(u32 a, u32 mask, u32 bits) {
    u32 y;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(y) : "r"(a), "r"(mask), "r"(bits));
    return y;
}

// Two float16 at once.
__device__ __forceinline__ u32 add2(u32 a, u32 b) {
    u32 y;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
    return y;
}
__device__ __forceinline__ u32 sub2(u32 a, u32 b) {
    u32 y;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
    return y;
}
__device__ __forceinline__ u32 fma2(u32 a, u32 b, u32 c) {
    u32 y;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(c));
    return y;
}
#else
#include "emulated.h"
#endif
__device__ __forceinline__ void from_floats(f32* to, float a, float b) {
    to[0].bits = a;
    to[1].bits = b;
}

// N elements that travel together: 16 bytes or a part of it, aligned, so that each is one access.
template <typename T, int N>
struct alignas(sizeof(T) * N) Pack { T at[N]; };

template <typename T, int N>
__device__ __forceinline__ void load(const T* from, float (&to)[N]) {
    constexpr int SPLIT = sizeof(T) * N > 16 ? sizeof(T) * N / 16 : 1;
    typedef Pack<T, N / SPLIT> Part;
#pragma unroll
    for (int s = 0; s < SPLIT; s++) {
        Part part = reinterpret_cast<const Part*>(from)[s];
#pragma unroll
        for (int i = 0; i < N / SPLIT; i++) to[s * (N / SPLIT) + i] = to_float(part.at[i]);
    }
}

template <typename T, int N>
__device__ __forceinline__ void store(T* to, const float (&from)[N]) {
    constexpr int SPLIT = sizeof(T) * N > 16 ? sizeof(T) * N / 16 : 1;
    typedef Pack<T, N / SPLIT> Part;
#pragma unroll
    for (int s = 0; s < SPLIT; s++) {
        Part part;
#pragma unroll
        for (int i = 0; i + 1 < N / SPLIT; i += 2)
            from_floats(&part.at[i], from[s * (N / SPLIT) + i], from[s * (N / SPLIT) + i + 1]);
        if ((N / SPLIT) % 2) from_float(part.at[0], from[s]);
        reinterpret_cast<Part*>(to)[s] = part;
    }
}

// Sums and extremes over the lanes of a group of WIDTH lanes; every lane gets the result, always in the same order.
template <int WIDTH = 32>
__device__ __forceinline__ float lane_sum(float x) {
#pragma unroll
    for (int step = WIDTH / 2; step; step /= 2) x += __shfl_xor_sync(~0u, x, step);
    return x;
}

template <int WIDTH = 32>
__device__ __forceinline__ float lane_max(float x) {
#pragma unroll
    for (int step = WIDTH / 2; step; step /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
    return x;
}

// One page of the engine's cache to move: where its block begins in memory, which page, and its place in the block.
struct Job {
    u64 block;
    int page, place;
};

// Where a thread works as it goes on in steps: a number in three digits, the last without bounds. Divisions once, then
// sums that carry.
struct Digits {
    int first, second, third;

    __device__ __forceinline__ Digits(int number, int radix, int next)
        : first(number % radix), second(number / radix % next), third(number / radix / next) {}
    __device__ __forceinline__ void add(const Digits& step, int radix, int next) {
        first += step.first, second += step.second, third += step.third;
        if (first >= radix) first -= radix, second++;
        if (second >= next) second -= next, third++;
    }
};

// Walsh-Hadamard transform over N elements a lane and `lanes` neighbouring lanes (powers of two), unnormalised.
template <int N>
__device__ __forceinline__ void hadamard(float (&x)[N], int lanes) {
#pragma unroll
    for (int half = 1; half < N; half *= 2)
#pragma unroll
        for (int i = 0; i < N; i++)
            if (!(i & half)) {
                const float a = x[i], b = x[i + half];
                x[i] = a + b;
                x[i + half] = a - b;
            }
    for (int step = 1; step < lanes; step *= 2) {
        const float sign = threadIdx.x & step ? -1.0f : 1.0f;
#pragma unroll
        for (int i = 0; i < N; i++) x[i] = fmaf(x[i], sign, __shfl_xor_sync(~0u, x[i], step));
    }
}
