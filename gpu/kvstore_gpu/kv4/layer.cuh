// kv4 blocks as kvstore/codecs/kv4.py lays them out; `Layer` repeats it for one layer. And keys of a layer, turned.

struct Shape {
    int block_tokens, sinks, group, k_bits, v_bits, planes;  // planes: how many of them are there
    int tokens, heads, dim, pairs;                           // tokens of a page
};

template <typename T>
struct Layer {
    const T* sinks;
    const u16 *k_low, *k_scale, *v_low, *v_scale;
    u8 *k[8], *v[8];  // bit planes; the first in the place of those that are not there

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
            } else {
                k[bit] = k[0];
                v[bit] = v[0];
            }
        }
    }
};

__device__ __forceinline__ float half_value(u16 bits) {
    f16 x;
    x.bits = bits;
    return to_float(x);
}

__device__ __forceinline__ int known_bits(int bits, int planes) { return min(bits, planes + 1); }

// Lows and scales of eight neighbouring channels; a group's are aligned to four bytes.
__device__ __forceinline__ void eight_halves(const u16* from, float (&to)[8]) {
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
        const u32 two = *reinterpret_cast<const u32*>(from + i);
        to[i] = half_value(u16(two)), to[i + 1] = half_value(u16(two >> 16));
    }
}

// Eight neighbouring channels of the keys before the rotation, for the tokens of one group.
struct Octet {
    float start[8], step[8];  // of codes as `Codes::floats` has them

    template <typename T>
    __device__ void at_group(const Layer<T>& part, const Shape& s, int group, int channel) {
        const int known = known_bits(s.k_bits, s.planes);
        const i64 at = i64(group) * s.heads * s.dim + channel;
        const float unknown = float((1 << (s.k_bits - known)) - 1) / 2;  // the middle of what the bits not there could say
        eight_halves(part.k_scale + at, step);
        eight_halves(part.k_low + at, start);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            start[i] += step[i] * unknown;
            step[i] = Codes::step(step[i], s.k_bits, known > 4);
            start[i] -= step[i] * Codes::base(known > 4);
        }
    }
    template <typename T>
    __device__ void value(const Layer<T>& part, int byte, const Known& known, float (&x)[8]) const {
        Codes(part.k, known, byte).floats(x);
#pragma unroll
        for (int i = 0; i < 8; i++) x[i] = start[i] + x[i] * step[i];
    }
};

// Turning by a row of the table. x alone if interleaved, x and its partner y otherwise.
template <bool INTERLEAVED>
__device__ __forceinline__ void turn8(float (&x)[8], float (&y)[8], const float* cos, const float* sin) {
    constexpr int COUNT = INTERLEAVED ? 4 : 8;
    float c[COUNT], n[COUNT];
    load<f32, COUNT>(reinterpret_cast<const f32*>(cos), c);
    load<f32, COUNT>(reinterpret_cast<const f32*>(sin), n);
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        float& a = INTERLEAVED ? x[2 * i] : x[i];
        float& b = INTERLEAVED ? x[2 * i + 1] : y[i];
        const float first = a;
        a = first * c[i] - b * n[i];
        b = b * c[i] + first * n[i];
    }
}

// Turning back, each product rounded as the codec on the CPU does it, so that codes are equal.
template <bool INTERLEAVED>
__device__ __forceinline__ void turn8_back(float (&x)[8], float (&y)[8], const float* cos, const float* sin) {
    constexpr int COUNT = INTERLEAVED ? 4 : 8;
    float c[COUNT], n[COUNT];
    load<f32, COUNT>(reinterpret_cast<const f32*>(cos), c);
    load<f32, COUNT>(reinterpret_cast<const f32*>(sin), n);
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        float& a = INTERLEAVED ? x[2 * i] : x[i];
        float& b = INTERLEAVED ? x[2 * i + 1] : y[i];
        const float first = a;
        a = __fadd_rn(__fmul_rn(first, c[i]), __fmul_rn(b, n[i]));
        b = __fsub_rn(__fmul_rn(b, c[i]), __fmul_rn(first, n[i]));
    }
}

// Which octets a thread turns: one, or (NeoX) two that belong together. Behind the rotary part: one, not turned.
template <bool INTERLEAVED>
struct Item {
    int channel, partner, pair;  // partner is -1 if there is none; pair is -1 where nothing is turned

    __device__ Item(int index, int pairs) {
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
