// What CUDA gives to a kernel, on the CPU: the threads of a block are fibers that take turns, and wait for each other at
// barriers and wherever lanes of a warp exchange. One block runs at a time. For tests: it finds wrong results, barriers
// that not every thread reaches, and reads of what was never written; it knows nothing of speed.

#include <immintrin.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>
#include <utility>
#include <vector>

namespace emulated {
struct Index { unsigned x, y, z; };
struct Exchange { u64 value[2][32][12]; int arrived = 0; unsigned turn = 0; };
struct Fiber { ucontext_t context; std::vector<char> stack; Index thread; bool over; };

inline Index block_index, block_size, grid_size;
inline std::vector<Fiber> fibers;
inline std::vector<Exchange> warps;
inline int current, waiting, alive;
inline unsigned barrier_turn;
inline ucontext_t scheduler;
inline void (*body)(void*);
inline void* body_arguments;

inline void yield() { swapcontext(&fibers[current].context, &scheduler); }
inline void entry() {
    body(body_arguments);
    fibers[current].over = true;
    alive--;
    yield();
}
inline void barrier() {
    const unsigned turn = barrier_turn;
    if (++waiting == alive) { waiting = 0; barrier_turn++; return; }
    while (turn == barrier_turn) {
        if (waiting == alive && waiting) { waiting = 0; barrier_turn++; return; }
        yield();
    }
}
// Every lane gives some words and sees those of all lanes. Two sets of slots in turn, so one meeting is enough.
inline const u64 (*meet(const u64* words, int count))[12] {
    Exchange& warp = warps[current / 32];
    const int lane = current % 32, set = warp.turn % 2;
    const unsigned turn = warp.turn;
    const int lanes = int(fibers.size()) - current / 32 * 32 < 32 ? int(fibers.size()) % 32 : 32;
    memcpy(warp.value[set][lane], words, count * sizeof(u64));
    if (++warp.arrived == lanes) { warp.arrived = 0; warp.turn++; }
    long spins = 0;
    while (turn == warp.turn) {
        if (++spins > 1000000) { fprintf(stderr, "a lane waits for lanes that do not come\n"); abort(); }
        yield();
    }
    return warp.value[set];
}
inline void run(unsigned grid_x, unsigned grid_y, unsigned threads) {
    _mm_setcsr(_mm_getcsr() | 0x8040);  // the smallest numbers are flushed to zero, as CuPy asks for
    grid_size = {grid_x, grid_y, 1};
    block_size = {threads, 1, 1};
    for (unsigned y = 0; y < grid_y; y++)
        for (unsigned x = 0; x < grid_x; x++) {
            block_index = {x, y, 0};
            fibers.resize(threads);
            warps.assign((threads + 31) / 32, Exchange());
            waiting = 0, barrier_turn = 0, alive = int(threads);
            for (unsigned t = 0; t < threads; t++) {
                Fiber& fiber = fibers[t];
                if (fiber.stack.empty()) fiber.stack.resize(1 << 16);
                fiber.thread = {t, 0, 0};
                fiber.over = false;
                getcontext(&fiber.context);
                fiber.context.uc_stack.ss_sp = fiber.stack.data();
                fiber.context.uc_stack.ss_size = fiber.stack.size();
                fiber.context.uc_link = &scheduler;
                makecontext(&fiber.context, entry, 0);
            }
            while (alive)
                for (current = 0; current < int(threads); current++)
                    if (!fibers[current].over) swapcontext(&scheduler, &fibers[current].context);
        }
    _mm_setcsr(_mm_getcsr() & ~0x8040u);
}
template <typename... A, size_t... I>
void call(void (*kernel)(A...), void** values, std::index_sequence<I...>) { kernel(*static_cast<A*>(values[I])...); }
template <typename... A>
void call(void (*kernel)(A...), void** values) { call(kernel, values, std::index_sequence_for<A...>()); }

template <typename T>
u64 bits_of(T x) { u64 word = 0; memcpy(&word, &x, sizeof(T)); return word; }
template <typename T>
T of_bits(u64 word) { T x; memcpy(&x, &word, sizeof(T)); return x; }
}  // namespace emulated

#define threadIdx (emulated::fibers[emulated::current].thread)
#define blockIdx emulated::block_index
#define blockDim emulated::block_size
#define gridDim emulated::grid_size

inline void __syncthreads() { emulated::barrier(); }
template <typename T>
T __shfl_xor_sync(unsigned, T x, int step) {
    const u64 word = emulated::bits_of(x);
    return emulated::of_bits<T>(emulated::meet(&word, 1)[(emulated::current % 32) ^ step][0]);
}
template <typename T>
T __shfl_up_sync(unsigned, T x, int step) {
    const u64 word = emulated::bits_of(x);
    const int lane = emulated::current % 32;
    const T other = emulated::of_bits<T>(emulated::meet(&word, 1)[lane < step ? lane : lane - step][0]);
    return other;
}
template <typename T>
T __shfl_sync(unsigned, T x, int lane, int width) {
    const u64 word = emulated::bits_of(x);
    const int own = emulated::current % 32;
    return emulated::of_bits<T>(emulated::meet(&word, 1)[own / width * width + lane % width][0]);
}
inline u32 __byte_perm(u32 a, u32 b, u32 selector) {
    const u64 bytes = u64(b) << 32 | a;
    u32 y = 0;
    for (int i = 0; i < 4; i++) y |= u32(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
    return y;
}
template <typename T>
T atomicAdd(T* at, int more) { T old = *at; *at += more; return old; }
inline int atomicMax(int* at, int other) { int old = *at; if (other > old) *at = other; return old; }
inline int __float_as_int(float x) { return emulated::of_bits<int>(emulated::bits_of(x)); }
template <typename T>
T min(T a, T b) { return a < b ? a : b; }
template <typename T>
T max(T a, T b) { return a > b ? a : b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __frsqrt_rn(float a) { return float(1.0 / sqrt(double(a))); }
inline float rsqrtf(float a) { return 1.0f / sqrtf(a); }
inline float __expf(float a) { return expf(a); }

inline float to_float(f16 x) { return _cvtsh_ss(x.bits); }
inline void from_float(f16& x, float y) { x.bits = _cvtss_sh(y, _MM_FROUND_TO_NEAREST_INT); }
inline void from_float(bf16& x, float y) {
    u32 bits = emulated::of_bits<u32>(emulated::bits_of(y));
    x.bits = y != y ? 0x7fff : u16((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
template <typename T>
void from_floats(T* to, float a, float b) { from_float(to[0], a); from_float(to[1], b); }
inline float min_nan(float a, float b) { return a != a || b != b ? NAN : a < b ? a : b; }
inline float max_nan(float a, float b) { return a != a || b != b ? NAN : a > b ? a : b; }
inline u32 and_or(u32 a, u32 mask, u32 bits) { return a & mask | bits; }
template <typename F>
u32 on_halves(F f, u32 a, u32 b, u32 c = 0) {
    u32 y = 0;
    for (int at = 0; at < 32; at += 16)
        y |= u32(_cvtss_sh(f(_cvtsh_ss(a >> at), _cvtsh_ss(b >> at), _cvtsh_ss(c >> at)), 0)) << at;
    return y;
}
inline u32 add2(u32 a, u32 b) { return on_halves([](float x, float y, float) { return x + y; }, a, b); }
inline u32 sub2(u32 a, u32 b) { return on_halves([](float x, float y, float) { return x - y; }, a, b); }
inline u32 fma2(u32 a, u32 b, u32 c) { return on_halves([](float x, float y, float z) { return x * y + z; }, a, b, c); }
inline u16 half_down(float x) { return _cvtss_sh(x, _MM_FROUND_TO_NEG_INF); }
inline u16 half_up(float x) { return _cvtss_sh(x, _MM_FROUND_TO_POS_INF); }
