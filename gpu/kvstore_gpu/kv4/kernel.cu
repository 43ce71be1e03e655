// kv4 blocks to pages and back. kvstore/codecs/kv4.py says where everything lies; `Layer` repeats it for one layer.

struct Shape {
    int block_tokens, sinks, group, k_bits, v_bits, planes;  // planes: how many of them are there
    int tokens, heads, dim, pairs;                           // tokens of a page
};

template <typename T>
struct Layer {
    const T* sinks;
    const u16 *k_low, *k_scale, *v_low, *v_scale;
    u8 *k[8], *v[8];  // bit planes

    __device__ Layer(u64 block, const i64* places, int layer, int layers, const Shape& s) {
        const int rows = s.block_tokens - s.sinks, channels = s.heads * s.dim;
        const i64 plane = i64(rows) * channels / 8;
        const int groups = (rows + s.group - 1) / s.group * channels;
        u8* at = reinterpret_cast<u8*>(block + places[layer]);
        sinks = reinterpret_cast<const T*>(at);
        at += i64(2 * sizeof(T)) * s.sinks * channels;
        k_low = reinterpret_cast<const u16*>(at);
        k_scale = k_low + groups;
        v_low = k_scale + groups;
        v_scale = v_low + rows * s.heads;
        at = reinterpret_cast<u8*>(const_cast<u16*>(v_scale + rows * s.heads));
#pragma unroll
        for (int bit = 0; bit < 8; bit++) {
            if (bit < 2) {
                k[bit] = at + bit * plane;
                v[bit] = at + (2 + bit) * plane;
            } else if (bit - 1 < s.planes) {
                u8* const part = reinterpret_cast<u8*>(block + places[(bit - 1) * layers + layer]);
                k[bit] = part;
                v[bit] = part + (s.k_bits > bit ? plane : 0);
            }
        }
    }
};

__device__ __forceinline__ float half_value(u16 bits) {
    f16 x;
    x.bits = bits;
    return to_float(x);
}

// Eight codes, as short as there are planes, given the byte of each plane that holds them.
__device__ __forceinline__ void codes_at(u8* const (&planes)[8], int known, i64 byte, int (&codes)[8]) {
#pragma unroll
    for (int i = 0; i < 8; i++) codes[i] = 0;
#pragma unroll
    for (int p = 0; p < 8; p++)
        if (p < known) {
            const u32 bits = planes[p][byte];
#pragma unroll
            for (int i = 0; i < 8; i++) codes[i] = codes[i] << 1 | (bits >> i & 1);
        }
}

__device__ __forceinline__ int known_bits(int bits, int planes) { return min(bits, planes + 1); }

// Eight neighbouring channels of the keys before the rotation, for the tokens of one group.
struct Octet {
    float start[8], step[8];

    template <typename T>
    __device__ void at_group(const Layer<T>& part, const Shape& s, int group, int channel, int known) {
        const i64 at = i64(group) * s.heads * s.dim + channel;
        const int rest = s.k_bits - known;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const float scale = half_value(part.k_scale[at + i]);
            step[i] = scale * (1 << rest);
            start[i] = half_value(part.k_low[at + i]) + scale * ((1 << rest) - 1) / 2;
        }
    }
    template <typename T>
    __device__ void value(const Layer<T>& part, const Shape& s, int row, int channel, int known, float (&x)[8]) const {
        int codes[8];
        codes_at(part.k, known, (i64(row) * s.heads * s.dim + channel) / 8, codes);
#pragma unroll
        for (int i = 0; i < 8; i++) x[i] = start[i] + small_float(codes[i]) * step[i];
    }
};

// Turning by a row of the table; `sign` -1 turns back. x alone if interleaved, x and its partner y otherwise.
template <bool INTERLEAVED>
__device__ __forceinline__ void turn8(float (&x)[8], float (&y)[8], const float* cos, const float* sin, float sign) {
#pragma unroll
    for (int i = 0; i < (INTERLEAVED ? 4 : 8); i++) {
        const float c = cos[i], n = sign * sin[i];
        float& a = INTERLEAVED ? x[2 * i] : x[i];
        float& b = INTERLEAVED ? x[2 * i + 1] : y[i];
        const float first = a;
        a = __fsub_rn(__fmul_rn(first, c), __fmul_rn(b, n));
        b = __fadd_rn(__fmul_rn(b, c), __fmul_rn(first, n));
    }
}

// Which octets a thread turns: one, or (NeoX) two that belong together. Behind the rotary part: one, not turned.
template <bool INTERLEAVED>
struct Item {
    int channel, partner, pair;  // partner is -1 if there is none; pair is -1 where nothing is turned

    __device__ Item(int index, int dim, int pairs) {
        const int turned = (INTERLEAVED ? 2 * pairs : pairs) / 8;
        if (index < turned) {
            channel = index * 8;
            partner = INTERLEAVED ? -1 : pairs + index * 8;
            pair = INTERLEAVED ? index * 4 : index * 8;
        } else {
            channel = 2 * pairs + (index - turned) * 8;
            partner = pair = -1;
        }
    }
    __device__ static int count(int dim, int pairs) { return (INTERLEAVED ? 2 * pairs : pairs) / 8 + (dim - 2 * pairs) / 8; }
};

constexpr int IN_A_ROW = 4;  // tokens that a thread decodes with the scales it has loaded

template <typename T, bool INTERLEAVED>
__global__ void unpack_keys(
    const Job* jobs, int count, const u64* bases, const i64* places, int first_layer, int layers, int all_layers,
    i64 page_stride, int token_stride, int head_stride, const Shape* shape, const float* cos, const float* sin, const u8* skipped)
{
    const Shape s = *shape;
    const int items = Item<INTERLEAVED>::count(s.dim, s.pairs), known = known_bits(s.k_bits, s.planes);
    const int spans = (s.tokens + IN_A_ROW - 1) / IN_A_ROW, each = spans * s.heads * items;
    const i64 tiles = i64(count) * layers;
    for (i64 tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const int index = int(tile % count), layer = first_layer + int(tile / count);
        const Job job = jobs[index];
        const Layer<T> part(job.block, places, layer, all_layers, s);
        char* const page = reinterpret_cast<char*>(bases[layer * 2]) + job.page * page_stride;
        for (int at = threadIdx.x; at < each; at += blockDim.x) {
            const int span = at / (s.heads * items), inner = at - span * s.heads * items, head = inner / items;
            const Item<INTERLEAVED> item(inner - head * items, s.dim, s.pairs);
            const int channel = head * s.dim + item.channel, partner = head * s.dim + item.partner;
            Octet a, b;
            int group = -1;
            for (int token = span * IN_A_ROW; token < min((span + 1) * IN_A_ROW, s.tokens); token++) {
                const int in_block = job.place * s.tokens + token, row = in_block - s.sinks;
                float x[8], y[8] = {};
                if (row < 0) {
                    const T* const sink = part.sinks + i64(in_block) * s.heads * s.dim;
#pragma unroll
                    for (int i = 0; i < 8; i++) x[i] = to_float(sink[channel + i]);
                    if (item.partner >= 0)
#pragma unroll
                        for (int i = 0; i < 8; i++) y[i] = to_float(sink[partner + i]);
                } else {
                    if (row / s.group != group) {
                        group = row / s.group;
                        a.at_group(part, s, group, channel, known);
                        if (item.partner >= 0) b.at_group(part, s, group, partner, known);
                    }
                    a.value(part, s, row, channel, known, x);
                    if (item.partner >= 0) b.value(part, s, row, partner, known, y);
                }
                const i64 entry = (i64(index) * s.tokens + token) * s.pairs + item.pair;
                if (item.pair >= 0 && !skipped[layer]) turn8<INTERLEAVED>(x, y, cos + entry, sin + entry, 1.0f);
                T* const to = reinterpret_cast<T*>(page + i64(token) * token_stride + i64(head) * head_stride);
                store<T, 8>(to + item.channel, x);
                if (item.partner >= 0) store<T, 8>(to + item.partner, y);
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
    const int octets = s.dim / 8, each = s.tokens * s.heads * octets, known = known_bits(s.v_bits, s.planes);
    const int rest = s.v_bits - known, rows = s.block_tokens - s.sinks;
    const float norm = __frsqrt_rn(float(rotated));
    const i64 tiles = i64(count) * layers;
    for (i64 tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const Job job = jobs[tile % count];
        const int layer = first_layer + int(tile / count);
        const Layer<T> part(job.block, places, layer, all_layers, s);
        char* const page = reinterpret_cast<char*>(bases[layer * 2 + 1]) + job.page * page_stride;
        // All lanes of a warp stay as long as one has work: they exchange.
        for (int at = threadIdx.x; at - int(threadIdx.x % 32) < each; at += blockDim.x) {
            const int vector = at / octets, octet = at - vector * octets;
            const int token = vector / s.heads, head = vector - token * s.heads;
            const int in_block = job.place * s.tokens + token, row = in_block - s.sinks;
            const bool there = at < each;
            float x[8] = {};
            if (there && row >= 0) {
                const float scale = norm * half_value(part.v_scale[row * s.heads + head]), step = scale * (1 << rest);
                const float start = norm * half_value(part.v_low[row * s.heads + head]) + scale * ((1 << rest) - 1) / 2;
                int codes[8];
                codes_at(part.v, known, (i64(row) * s.heads + head) * octets + octet, codes);
#pragma unroll
                for (int i = 0; i < 8; i++) x[i] = start + small_float(codes[i]) * step;
            }
            hadamard8(x, rotated / 8);
            if (!there) continue;
            if (row < 0) {
                const T* const sink = part.sinks + (i64(s.sinks + in_block) * s.heads + head) * s.dim + octet * 8;
#pragma unroll
                for (int i = 0; i < 8; i++) x[i] = to_float(sink[i]);
            }
            store<T, 8>(reinterpret_cast<T*>(page + i64(token) * token_stride + i64(head) * head_stride) + octet * 8, x);
        }
    }
}

// -- the way in: a block's pages are `jobs[block * block_pages ...]`, in order -----------------------------------------

// Low and scale of a group as float16, the codes' numbers with them, and whether float16 can say them.
__device__ __forceinline__ bool range_of(float least, float most, int bits, u16& low, u16& scale) {
    low = half_down(least);
    scale = half_up(__fdiv_rn(__fsub_rn(most, half_value(low)), float((1 << bits) - 1)));
    return (low & 0x7c00) != 0x7c00 && (scale & 0x7c00) != 0x7c00;
}

__device__ __forceinline__ int code_of(float x, u16 low, u16 scale, int bits) {
    const float step = half_value(scale);
    const float code = rintf(__fmul_rn(__fsub_rn(x, half_value(low)), step > 0 ? __frcp_rn(step) : 0.0f));
    return int(fminf(fmaxf(code, 0.0f), float((1 << bits) - 1)));
}

__device__ __forceinline__ void write_codes(u8* const (&planes)[8], int bits, i64 byte, const int (&codes)[8]) {
#pragma unroll
    for (int p = 0; p < 8; p++)
        if (p < bits) {
            u32 packed = 0;
#pragma unroll
            for (int i = 0; i < 8; i++) packed |= (codes[i] >> (bits - 1 - p) & 1) << i;
            planes[p][byte] = u8(packed);
        }
}

template <typename T, bool INTERLEAVED>
__global__ void pack_keys(
    const Job* jobs, int blocks, const u64* bases, const i64* places, int layers, i64 page_stride, int token_stride,
    int head_stride, const Shape* shape, const float* cos, const float* sin, const u8* skipped, int* bad)
{
    const Shape s = *shape;
    const int items = Item<INTERLEAVED>::count(s.dim, s.pairs), rows = s.block_tokens - s.sinks;
    const int groups = (rows + s.group - 1) / s.group, block_pages = s.block_tokens / s.tokens;
    const int channels = s.heads * s.dim;
    const i64 tiles = i64(blocks) * layers * groups;
    for (i64 tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const int group = int(tile % groups), layer = int(tile / groups % layers);
        const int block = int(tile / groups / layers);
        const Job* const job = jobs + i64(block) * block_pages;
        const Layer<T> part(job->block, places, layer, layers, s);
        for (int at = threadIdx.x; at < s.heads * items; at += blockDim.x) {
            const int head = at / items;
            const Item<INTERLEAVED> item(at - head * items, s.dim, s.pairs);
            const int channel = head * s.dim + item.channel, partner = head * s.dim + item.partner;
            const bool two = item.partner >= 0;
            auto keys = [&](int token, float (&x)[8], float (&y)[8]) {
                const char* const page =
                    reinterpret_cast<const char*>(bases[layer * 2]) + job[token / s.tokens].page * page_stride;
                const T* const from = reinterpret_cast<const T*>(
                    page + i64(token % s.tokens) * token_stride + i64(head) * head_stride);
                load<T, 8>(from + item.channel, x);
                if (two) load<T, 8>(from + item.partner, y);
                const i64 entry = (i64(block) * s.block_tokens + token) * s.pairs + item.pair;
                if (item.pair >= 0 && !skipped[layer]) turn8<INTERLEAVED>(x, y, cos + entry, sin + entry, -1.0f);
            };
            float x[8], y[8] = {}, low[2][8], high[2][8];
            if (group == 0)
                for (int token = 0; token < s.sinks; token++) {
                    keys(token, x, y);
                    T* const sink = const_cast<T*>(part.sinks) + i64(token) * channels;
#pragma unroll
                    for (int i = 0; i < 8; i++) {
                        from_float(sink[channel + i], x[i]);
                        if (two) from_float(sink[partner + i], y[i]);
                    }
                }
            const int first = s.sinks + group * s.group, last = min(first + s.group, s.block_tokens);
#pragma unroll
            for (int i = 0; i < 8; i++) low[0][i] = low[1][i] = INFINITY_, high[0][i] = high[1][i] = -INFINITY_;
            for (int token = first; token < last; token++) {
                keys(token, x, y);
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    low[0][i] = fminf(low[0][i], x[i]), high[0][i] = fmaxf(high[0][i], x[i]);
                    low[1][i] = fminf(low[1][i], y[i]), high[1][i] = fmaxf(high[1][i], y[i]);
                }
            }
            u16 lows[2][8], scales[2][8];
            bool fine = true;
#pragma unroll
            for (int side = 0; side < 2; side++)
                if (side == 0 || two) {
                    const i64 to = i64(group) * channels + (side ? partner : channel);
#pragma unroll
                    for (int i = 0; i < 8; i++) {
                        fine &= range_of(low[side][i], high[side][i], s.k_bits, lows[side][i], scales[side][i]);
                        const_cast<u16*>(part.k_low)[to + i] = lows[side][i];
                        const_cast<u16*>(part.k_scale)[to + i] = scales[side][i];
                    }
                }
            if (!fine) bad[block] = 1;
            for (int token = first; token < last; token++) {
                keys(token, x, y);
                int codes[8];
#pragma unroll
                for (int i = 0; i < 8; i++) codes[i] = code_of(x[i], lows[0][i], scales[0][i], s.k_bits);
                write_codes(part.k, s.k_bits, (i64(token - s.sinks) * channels + channel) / 8, codes);
                if (two) {
#pragma unroll
                    for (int i = 0; i < 8; i++) codes[i] = code_of(y[i], lows[1][i], scales[1][i], s.k_bits);
                    write_codes(part.k, s.k_bits, (i64(token - s.sinks) * channels + partner) / 8, codes);
                }
            }
        }
    }
}

template <typename T>
__global__ void pack_values(
    const Job* jobs, int blocks, const u64* bases, const i64* places, int layers, i64 page_stride, int token_stride,
    int head_stride, const Shape* shape, int rotated, int* bad)
{
    const Shape s = *shape;
    const int octets = s.dim / 8, each = s.tokens * s.heads * octets, block_pages = s.block_tokens / s.tokens;
    const float norm = __frsqrt_rn(float(rotated));
    const i64 tiles = i64(blocks) * block_pages * layers;
    for (i64 tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const i64 index = tile / layers;
        const int layer = int(tile % layers);
        const Job job = jobs[index];
        const Layer<T> part(job.block, places, layer, layers, s);
        const char* const page = reinterpret_cast<const char*>(bases[layer * 2 + 1]) + job.page * page_stride;
        for (int at = threadIdx.x; at - int(threadIdx.x % 32) < each; at += blockDim.x) {
            const int vector = at / octets, octet = at - vector * octets;
            const int token = vector / s.heads, head = vector - token * s.heads;
            const int in_block = job.place * s.tokens + token, row = in_block - s.sinks;
            float x[8] = {};
            if (at < each)
                load<T, 8>(reinterpret_cast<const T*>(page + i64(token) * token_stride + i64(head) * head_stride) + octet * 8, x);
            if (at < each && row < 0) {
                T* const sink = const_cast<T*>(part.sinks) + (i64(s.sinks + in_block) * s.heads + head) * s.dim + octet * 8;
#pragma unroll
                for (int i = 0; i < 8; i++) from_float(sink[i], x[i]);
            }
            hadamard8(x, rotated / 8);
            float least = INFINITY_, most = -INFINITY_;
#pragma unroll
            for (int i = 0; i < 8; i++) {
                x[i] *= norm;
                least = fminf(least, x[i]), most = fmaxf(most, x[i]);
            }
            for (int step = 1; step < octets; step *= 2) {
                least = fminf(least, __shfl_xor_sync(~0u, least, step));
                most = fmaxf(most, __shfl_xor_sync(~0u, most, step));
            }
            if (at >= each || row < 0) continue;
            u16 low, scale;
            if (!range_of(least, most, s.v_bits, low, scale)) bad[index / block_pages] = 1;
            if (octet == 0) {
                const_cast<u16*>(part.v_low)[row * s.heads + head] = low;
                const_cast<u16*>(part.v_scale)[row * s.heads + head] = scale;
            }
            int codes[8];
#pragma unroll
            for (int i = 0; i < 8; i++) codes[i] = code_of(x[i], low, scale, s.v_bits);
            write_codes(part.v, s.v_bits, (i64(row) * s.heads + head) * octets + octet, codes);
        }
    }
}
