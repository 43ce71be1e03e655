// kv4 blocks to pages and back; layer.cuh says where everything lies.

constexpr int IN_A_ROW = 8;  // tokens that a thread decodes with the scales it has loaded

template <typename T, bool INTERLEAVED>
__global__ void unpack_keys(
    const Job* jobs, int count, const u64* bases, const i64* places, int first_layer, int layers, int all_layers,
    i64 page_stride, int token_stride, int head_stride, const Shape* shape, const float* cos, const float* sin, const u8* skipped)
{
    const Shape s = *shape;
    const int items = Item<INTERLEAVED>::count(s.dim, s.pairs);
    const Known known(known_bits(s.k_bits, s.planes));
    const int spans = (s.tokens + IN_A_ROW - 1) / IN_A_ROW, each = spans * s.heads * items, channels = s.heads * s.dim;
    for (int tile = blockIdx.x; tile < count * layers; tile += gridDim.x) {
        const int index = tile % count, layer = first_layer + tile / count;
        const Job job = jobs[index];
        const Layer<T> part(job.block, places, layer, all_layers, s);
        char* const page = reinterpret_cast<char*>(bases[layer * 2]) + job.page * page_stride;
        const int before = job.place * s.tokens, sinks = max(s.sinks - before, 0);  // of this page
        for (int at = threadIdx.x; at < each; at += blockDim.x) {
            const Digits digits(at, items, s.heads);
            const Item<INTERLEAVED> item(digits.first, s.pairs);
            const int head = digits.second, channel = head * s.dim + item.channel, partner = head * s.dim + item.partner;
            const bool two = item.partner >= 0, turned = item.pair >= 0 && !skipped[layer];
            auto finish = [&](int token, float (&x)[8], float (&y)[8]) {
                const i64 entry = (i64(index) * s.tokens + token) * s.pairs + item.pair;
                if (turned) turn8<INTERLEAVED>(x, y, cos + entry, sin + entry);
                T* const to = reinterpret_cast<T*>(page + i64(token) * token_stride + i64(head) * head_stride);
                store<T, 8>(to + item.channel, x);
                if (two) store<T, 8>(to + item.partner, y);
            };
            int token = digits.third * IN_A_ROW;
            const int end = min(token + IN_A_ROW, s.tokens);
            for (; token < min(end, sinks); token++) {
                const T* const sink = part.sinks + i64(before + token) * channels;
                float x[8], y[8] = {};
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    x[i] = to_float(sink[channel + i]);
                    if (two) y[i] = to_float(sink[partner + i]);
                }
                finish(token, x, y);
            }
            Octet a, b;
            int last = 0;  // row behind the group whose scales there are
#pragma unroll 2
            for (; token < end; token++) {
                const int row = before + token - s.sinks;
                if (row >= last) {
                    const int group = row / s.group;
                    last = (group + 1) * s.group;
                    a.at_group(part, s, group, channel);
                    if (two) b.at_group(part, s, group, partner);
                }
                float x[8], y[8] = {};
                a.value(part, (row * channels + channel) >> 3, known, x);
                if (two) b.value(part, (row * channels + partner) >> 3, known, y);
                finish(token, x, y);
            }
        }
    }
}

template <typename T>
__global__ void unpack_values(
    const Job* jobs, int count, const u64* bases, const i64* places, int first_layer, int layers, int all_layers,
    i64 page_stride, int token_stride, int head_stride, const Shape* shape, int rotated)
{
    const Shape s = *shape;
    const int octets = s.dim / 8, each = s.tokens * s.heads * octets, bits = known_bits(s.v_bits, s.planes);
    const Known known(bits);
    // Of a scale: what one step of the codes is worth after the rotation, and the middle that they lie around.
    const float norm = __frsqrt_rn(float(rotated)), step = Codes::step(1.0f, s.v_bits, known.wide);
    const float middle = step * Codes::middle(known.wide) + float((1 << (s.v_bits - bits)) - 1) / 2;
    const Digits start(threadIdx.x, octets, s.heads), stride(blockDim.x, octets, s.heads);
    for (int tile = blockIdx.x; tile < count * layers; tile += gridDim.x) {
        const Job job = jobs[tile % count];
        const int layer = first_layer + tile / count;
        const Layer<T> part(job.block, places, layer, all_layers, s);
        char* const page = reinterpret_cast<char*>(bases[layer * 2 + 1]) + job.page * page_stride;
        Digits digits = start;
        // All lanes of a warp stay as long as one has work: they exchange.
#pragma unroll 2
        for (int at = threadIdx.x; at - int(threadIdx.x % 32) < each; at += blockDim.x) {
            const int octet = digits.first, head = digits.second, token = min(digits.third, s.tokens - 1);
            const int in_block = job.place * s.tokens + token, vector = max(in_block - s.sinks, 0) * s.heads + head;
            const float scale = half_value(part.v_scale[vector]), low = half_value(part.v_low[vector]);
            u32 pairs[4];
            Codes(part.v, known, vector * octets + octet).halves(pairs);
            float x[8];
            hadamard_of_codes(pairs, rotated / 8, x);
            const float factor = scale * step * norm;
#pragma unroll
            for (int i = 0; i < 8; i++) x[i] *= factor;
            // What all have in common becomes the first element by the rotation.
            if (octet * 8 % rotated == 0) x[0] += (low + scale * middle) * (norm * rotated);
            if (in_block < s.sinks) {
                const T* const sink = part.sinks + (i64(s.sinks + in_block) * s.heads + head) * s.dim + octet * 8;
#pragma unroll
                for (int i = 0; i < 8; i++) x[i] = to_float(sink[i]);
            }
            if (at < each)
                store<T, 8>(reinterpret_cast<T*>(page + i64(token) * token_stride + i64(head) * head_stride) + octet * 8, x);
            digits.add(stride, octets, s.heads);
        }
    }
}

// -- the way in: a block's pages are `jobs[block * block_pages ...]`, in order -----------------------------------------

// Low and scale of a group as float16, and what makes codes of numbers.
struct Range {
    u16 low, scale;
    float base, inverse, magnitude;

    __device__ __forceinline__ Range(float least, float most, int bits) {
        low = half_down(least);
        base = half_value(low);
        magnitude = max_nan(-least, most);
        scale = half_up(__fdiv_rn(__fsub_rn(most, base), float((1 << bits) - 1)));
        inverse = half_value(scale) > 0 ? __frcp_rn(half_value(scale)) : 0.0f;
    }
    // Whether float16 can say them, and they are not too large; they are if anything is not a number.
    __device__ __forceinline__ bool fine(float limit) const {
        return (low & 0x7c00) != 0x7c00 && (scale & 0x7c00) != 0x7c00 && magnitude <= limit;
    }
};

// How large keys before their turn may be, so that nothing that is decoded from them, by however few planes, reaches the
// end of their type: a turn makes a key larger by up to sqrt(2). Values before the rotation back: a quarter of that, since
// it makes one larger by up to sqrt(32).
template <typename T> __device__ __forceinline__ float limit() { return __uint_as_float(254u << 23); }  // 2^127
template <> __device__ __forceinline__ float limit<f16>() { return 32768.0f; }

// Low is not above any number, and the scale not too small: codes need no bounds.
__device__ __forceinline__ u32 code_of(float x, float base, float inverse) {
    return rounded(__fmul_rn(__fsub_rn(x, base), inverse));
}

constexpr int PACKING = 128;  // threads that encode the keys of a head, each some tokens of one item

template <typename T, bool INTERLEAVED>
__global__ void __launch_bounds__(PACKING, 4) pack_keys(
    const Job* jobs, int blocks, const u64* bases, const i64* places, int layers, i64 page_stride, int token_stride,
    int head_stride, const Shape* shape, const float* cos, const float* sin, const u8* skipped, int* bad)
{
    constexpr int ROW = PACKING + 1, CHOSEN = 20;  // so that few accesses meet in a bank
    __shared__ float least[16 * ROW], most[16 * ROW];
    alignas(16) __shared__ f32 base_of[32 * CHOSEN];
    alignas(16) __shared__ f32 inverse_of[32 * CHOSEN];
    const Shape s = *shape;
    const int items = Item<INTERLEAVED>::count(s.dim, s.pairs), rows = s.block_tokens - s.sinks;
    const int groups = (rows + s.group - 1) / s.group, block_pages = s.block_tokens / s.tokens;
    const int channels = s.heads * s.dim;
    const int mine = threadIdx.x % items, turn = threadIdx.x / items, turns = PACKING / items;
    const Item<INTERLEAVED> item(mine, s.pairs);
    const bool two = item.partner >= 0;
    const Digits stride(turns, s.tokens, block_pages);
    for (int tile = blockIdx.x; tile < blocks * groups * layers; tile += gridDim.x) {
        const Digits digits(tile, layers, groups);
        const int layer = digits.first, group = digits.second, block = digits.third;
        const Job* const job = jobs + i64(block) * block_pages;
        const Layer<T> part(job->block, places, layer, layers, s);
        const bool turned = item.pair >= 0 && !skipped[layer];
        const int first = s.sinks + group * s.group, last = min(first + s.group, s.block_tokens);
        for (int head = 0; head < s.heads; head++) {
            const int channel = head * s.dim + item.channel, partner = head * s.dim + item.partner;
            // Keys before the rotation of this thread's tokens from `begin` on.
            auto each_key = [&](int begin, int end, auto&& use) {
                Digits place(begin + turn, s.tokens, block_pages);
#pragma unroll 2
                for (int token = begin + turn; token < end; token += turns) {
                    const char* const page = reinterpret_cast<const char*>(bases[layer * 2]) + job[place.second].page * page_stride;
                    const T* const from = reinterpret_cast<const T*>(
                        page + i64(place.first) * token_stride + i64(head) * head_stride);
                    float x[8], y[8] = {};
                    load<T, 8>(from + item.channel, x);
                    if (two) load<T, 8>(from + item.partner, y);
                    const i64 entry = (i64(block) * s.block_tokens + token) * s.pairs + item.pair;
                    if (turned) turn8_back<INTERLEAVED>(x, y, cos + entry, sin + entry);
                    use(token, x, y);
                    place.add(stride, s.tokens, block_pages);
                }
            };
            float low[2][8], high[2][8];
            if (turn < turns) {
                if (group == 0)
                    each_key(0, s.sinks, [&](int token, float (&x)[8], float (&y)[8]) {
                        T* const sink = const_cast<T*>(part.sinks) + i64(token) * channels;
#pragma unroll
                        for (int i = 0; i < 8; i++) {
                            from_float(sink[channel + i], x[i]);
                            if (two) from_float(sink[partner + i], y[i]);
                            if (!(max_nan(fabsf(x[i]), fabsf(y[i])) <= limit<T>())) bad[block] = 1;
                        }
                    });
#pragma unroll
                for (int i = 0; i < 8; i++) low[0][i] = low[1][i] = INFINITY_, high[0][i] = high[1][i] = -INFINITY_;
                each_key(first, last, [&](int, float (&x)[8], float (&y)[8]) {
#pragma unroll
                    for (int i = 0; i < 8; i++) {
                        low[0][i] = min_nan(low[0][i], x[i]), high[0][i] = max_nan(high[0][i], x[i]);
                        low[1][i] = min_nan(low[1][i], y[i]), high[1][i] = max_nan(high[1][i], y[i]);
                    }
                });
#pragma unroll
                for (int i = 0; i < 16; i++) {
                    least[i * ROW + threadIdx.x] = low[i / 8][i % 8];
                    most[i * ROW + threadIdx.x] = high[i / 8][i % 8];
                }
            }
            __syncthreads();
            for (int at = threadIdx.x; at < items * 16; at += PACKING) {
                const int i = at % 16, other = at / 16;
                const Item<INTERLEAVED> its(other, s.pairs);
                if (i >= 8 && its.partner < 0) continue;
                float lowest = INFINITY_, highest = -INFINITY_;
                for (int t = 0; t < turns; t++) {
                    lowest = min_nan(lowest, least[i * ROW + t * items + other]);
                    highest = max_nan(highest, most[i * ROW + t * items + other]);
                }
                const Range range(lowest, highest, s.k_bits);
                const i64 to = i64(group) * channels + head * s.dim + (i < 8 ? its.channel : its.partner) + i % 8;
                const_cast<u16*>(part.k_low)[to] = range.low;
                const_cast<u16*>(part.k_scale)[to] = range.scale;
                base_of[other * CHOSEN + i].bits = range.base;
                inverse_of[other * CHOSEN + i].bits = range.inverse;
                if (!range.fine(limit<T>())) bad[block] = 1;
            }
            __syncthreads();
            if (turn >= turns) continue;
            float base[16], inverse[16];
            load<f32, 16>(base_of + mine * CHOSEN, base);
            load<f32, 16>(inverse_of + mine * CHOSEN, inverse);
            each_key(first, last, [&](int token, float (&x)[8], float (&y)[8]) {
                u32 codes[8];
                const int row = (token - s.sinks) * channels;
#pragma unroll
                for (int i = 0; i < 8; i++) codes[i] = code_of(x[i], base[i], inverse[i]);
                write_codes(part.k, s.k_bits, (row + channel) >> 3, codes);
                if (!two) return;
#pragma unroll
                for (int i = 0; i < 8; i++) codes[i] = code_of(y[i], base[8 + i], inverse[8 + i]);
                write_codes(part.k, s.k_bits, (row + partner) >> 3, codes);
            });
        }
    }
}

// A lane takes what is rotated as one, SIZE elements; a head lies in `dim / SIZE` neighbouring lanes.
template <typename T, int SIZE>
__global__ void pack_values(
    const Job* jobs, int blocks, const u64* bases, const i64* places, int layers, i64 page_stride, int token_stride,
    int head_stride, const Shape* shape, int* bad)
{
    struct alignas(SIZE / 8) Bytes { u8 at[SIZE / 8]; };
    const Shape s = *shape;
    const int parts = s.dim / SIZE, each = s.tokens * s.heads * parts, block_pages = s.block_tokens / s.tokens;
    const float norm = __frsqrt_rn(float(SIZE));
    const Digits start(threadIdx.x, parts, s.heads), stride(blockDim.x, parts, s.heads);
    for (int tile = blockIdx.x; tile < blocks * block_pages * layers; tile += gridDim.x) {
        const int index = tile / layers, layer = tile % layers;
        const Job job = jobs[index];
        const Layer<T> part(job.block, places, layer, layers, s);
        const char* const page = reinterpret_cast<const char*>(bases[layer * 2 + 1]) + job.page * page_stride;
        Digits digits = start;
        // All lanes of a warp stay as long as one has work: they exchange.
        for (int at = threadIdx.x; at - int(threadIdx.x % 32) < each; at += blockDim.x) {
            const int piece = digits.first, head = digits.second, token = min(digits.third, s.tokens - 1);
            const int in_block = job.place * s.tokens + token, vector = (in_block - s.sinks) * s.heads + head;
            const T* const from = reinterpret_cast<const T*>(page + i64(token) * token_stride + i64(head) * head_stride) + piece * SIZE;
            digits.add(stride, parts, s.heads);
            float x[SIZE];
            load<T, SIZE>(from, x);
            if (at < each && in_block < s.sinks) {
                T* const sink = const_cast<T*>(part.sinks) + (i64(s.sinks + in_block) * s.heads + head) * s.dim + piece * SIZE;
#pragma unroll
                for (int i = 0; i < SIZE; i++) {
                    from_float(sink[i], x[i]);
                    if (!(fabsf(x[i]) < INFINITY_)) bad[index / block_pages] = 1;
                }
            }
            hadamard(x, 1);
            float least = INFINITY_, most = -INFINITY_;
#pragma unroll
            for (int i = 0; i < SIZE; i++) {
                x[i] *= norm;
                least = min_nan(least, x[i]), most = max_nan(most, x[i]);
            }
            for (int step = 1; step < parts; step *= 2) {
                least = min_nan(least, __shfl_xor_sync(~0u, least, step));
                most = max_nan(most, __shfl_xor_sync(~0u, most, step));
            }
            if (at >= each || in_block < s.sinks) continue;
            const Range range(least, most, s.v_bits);
            if (!range.fine(limit<T>() / 4)) bad[index / block_pages] = 1;
            if (piece == 0) {
                const_cast<u16*>(part.v_low)[vector] = range.low;
                const_cast<u16*>(part.v_scale)[vector] = range.scale;
            }
            u32 high[SIZE / 8], low[SIZE / 8];
#pragma unroll
            for (int octet = 0; octet < SIZE / 8; octet++) {
                u32 codes[8];
#pragma unroll
                for (int i = 0; i < 8; i++) codes[i] = code_of(x[octet * 8 + i], range.base, range.inverse);
                bytes_of(codes, s.v_bits, high[octet], low[octet]);
            }
#pragma unroll
            for (int p = 0; p < 8; p++)
                if (p < s.v_bits) {
                    Bytes bytes;
#pragma unroll
                    for (int octet = 0; octet < SIZE / 8; octet++)
                        bytes.at[octet] = u8((p < 4 ? high : low)[octet] >> byte_of(p % 4));
                    *reinterpret_cast<Bytes*>(part.v[p] + (vector * parts + piece) * (SIZE / 8)) = bytes;
                }
        }
    }
}
