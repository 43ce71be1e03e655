// Codes in planes of one bit each: the byte of a plane holds one bit of eight neighbours. Eight codes travel as one word
// of eight nibbles, and with more than four bits as two, the higher nibbles and the lower ones; bits that are not there
// are the lowest ones, and zero.
//
// Nibble 4 a + 2 b + c of a word is the code of element 4 c + 2 b + a: two neighbours lie 16 bits apart.

__device__ __forceinline__ int element_of(int nibble) { return (nibble & 1) << 2 | (nibble & 2) | nibble >> 2; }

// Nibbles from bytes, and bytes from nibbles: four rows of eight bits, turned over in two exchanges. The highest plane is
// byte 3, then come 1, 2 and 0.
__device__ __forceinline__ u32 turned_over(u32 word) {
    u32 moved = (word ^ word >> 15) & 0x0000aaaau;
    word ^= moved ^ moved << 15;
    moved = (word ^ word >> 6) & 0x00cc00ccu;
    return word ^ moved ^ moved << 6;
}
__device__ __forceinline__ int byte_of(int plane) { return plane == 0 ? 24 : plane == 1 ? 8 : plane == 2 ? 16 : 0; }

// Which bits of two words of bytes are of planes that are there.
struct Known {
    u32 high, low;
    bool wide;  // more than four

    __device__ __forceinline__ explicit Known(int planes) : high(0), low(0), wide(planes > 4) {
#pragma unroll
        for (int p = 0; p < 8; p++)
            if (p < planes) (p < 4 ? high : low) |= 0xffu << byte_of(p % 4);
    }
};

// Eight codes.
struct Codes {
    u32 high, low;
    bool wide;

    // From a byte of each plane; where a plane is not there any byte is read.
    __device__ __forceinline__ Codes(u8* const (&planes)[8], const Known& known, int byte) : low(0), wide(known.wide) {
        high = turned_over(word(planes, 0, byte) & known.high);
        if (wide) low = turned_over(word(planes, 4, byte) & known.low);
    }
    __device__ __forceinline__ static u32 word(u8* const (&planes)[8], int first, int byte) {
        u32 found = 0;
#pragma unroll
        for (int p = 0; p < 4; p++) found |= u32(planes[first + p][byte]) << byte_of(p);
        return found;
    }

    // What a step of a code is worth, if a step of all `bits` is worth `scale`.
    __device__ __forceinline__ static float step(float scale, int bits, bool wide) {
        return scale * __uint_as_float(u32(127 + bits - (wide ? 8 : 4)) << 23);
    }

    // As floats from 16 to 31, or 256 to 511: a code is put right behind the exponent.
    __device__ __forceinline__ static float base(bool wide) { return wide ? 256.0f : 16.0f; }
    __device__ __forceinline__ void floats(float (&x)[8]) const {
        if (wide) {
#pragma unroll
            for (int n = 0; n < 8; n++)
                x[element_of(n)] = __uint_as_float(nibble(high, n, 19, nibble(low, n, 15, 0x43800000u)));
        } else {
#pragma unroll
            for (int n = 0; n < 8; n++) x[element_of(n)] = __uint_as_float(nibble(high, n, 19, 0x41800000u));
        }
    }
    __device__ __forceinline__ static u32 nibble(u32 word, int n, int to, u32 beside) {
        return and_or(4 * n < to ? word << (to - 4 * n) : word >> (4 * n - to), 15u << to, beside);
    }

    // Around zero, as pairs of float16: of elements 0 and 1, 4 and 5, 2 and 3, 6 and 7.
    __device__ __forceinline__ static float middle(bool wide) { return wide ? 128.0f : 8.0f; }
    __device__ __forceinline__ void halves(u32 (&pairs)[4]) const {
        if (wide) {
#pragma unroll
            for (int n = 0; n < 4; n++)  // behind 1024, and less 1024 and the middle
                pairs[n] = sub2((high >> 4 * n & 0x000f000fu) << 4 | and_or(low >> 4 * n, 0x000f000fu, 0x64006400u), 0x64806480u);
        } else {
#pragma unroll
            for (int n = 0; n < 4; n++) pairs[n] = sub2(and_or(high >> 4 * n, 0x000f000fu, 0x64006400u), 0x64086408u);
        }
    }
};

// Walsh-Hadamard transform of codes around zero, 8 a lane and `lanes` neighbouring lanes. Sums of up to 16 codes are
// integers that float16 says exactly; the last step is in float32.
__device__ __forceinline__ void hadamard_of_codes(u32 (&pairs)[4], int lanes, float (&x)[8]) {
    for (int step = 1; step < lanes; step *= 2) {
        const u32 sign = threadIdx.x & step ? 0xbc00bc00u : 0x3c003c00u;
#pragma unroll
        for (int n = 0; n < 4; n++) pairs[n] = fma2(pairs[n], sign, __shfl_xor_sync(~0u, pairs[n], step));
    }
#pragma unroll
    for (int half = 1; half < 4; half *= 2)
#pragma unroll
        for (int n = 0; n < 4; n++)
            if (!(n & half)) {
                const u32 a = pairs[n], b = pairs[n + half];
                pairs[n] = add2(a, b);
                pairs[n + half] = sub2(a, b);
            }
#pragma unroll
    for (int n = 0; n < 4; n++) {
        f16 a, b;
        a.bits = u16(pairs[n]), b.bits = u16(pairs[n] >> 16);
        const float first = to_float(a), second = to_float(b);
        x[element_of(n)] = first + second;
        x[element_of(n) + 1] = first - second;
    }
}

// A code behind 2^23: the sum rounds it to the nearest integer, ties to even, and has it in its lowest bits.
__device__ __forceinline__ u32 rounded(float x) { return __float_as_uint(__fadd_rn(x, 8388608.0f)); }
constexpr u32 ROUNDED = 0x4b000000u;

// Eight rounded codes of some bits as words of nibbles, turned over: the bytes of planes.
__device__ __forceinline__ void bytes_of(const u32 (&codes)[8], int bits, u32& high, u32& low) {
    high = low = 0;
    if (bits <= 4) {
#pragma unroll
        for (int n = 7; n >= 0; n--) high = high * 16 + codes[element_of(n)];
        high = (high - ROUNDED * 17) << (4 - bits);  // of 2^23 all else has left the word
    } else {
#pragma unroll
        for (int n = 7; n >= 0; n--) {
            const u32 code = (codes[element_of(n)] - ROUNDED) << (8 - bits);
            high = high << 4 | code >> 4;
            low = low << 4 | (code & 15);
        }
        low = turned_over(low);
    }
    high = turned_over(high);
}

// Eight rounded codes into the byte of each plane.
__device__ __forceinline__ void write_codes(u8* const (&planes)[8], int bits, int byte, const u32 (&codes)[8]) {
    u32 high, low;
    bytes_of(codes, bits, high, low);
#pragma unroll
    for (int p = 0; p < 8; p++)
        if (p < bits) planes[p][byte] = u8((p < 4 ? high : low) >> byte_of(p % 4));
}
