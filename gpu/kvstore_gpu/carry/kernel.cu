// What recomputed tokens of a chunk differ by, added to the tokens behind them that were not recomputed. Spans are cut
// into segments: `sums` adds up the differences in each, `carry` goes on from those before and shifts the others. A
// thread has VEC rotary pairs, or as many dimensions beside each other, of one head's keys or values. Keys are turned
// back to position zero before they are added, and on to where they are added to; in float32, rounded once.

// Where the two halves of what a thread has are, and whether they turn. The first half of a head's threads has keys.
template <bool INTERLEAVED, int VEC>
struct Item {
    int head, first, second, pair;
    bool values, turned;

    __device__ Item(int item, int dim, int pairs) {
        const int each = dim / (2 * VEC);
        head = item / (2 * each);
        item -= 2 * each * head;
        values = item >= each;
        pair = VEC * (values ? item - each : item);
        turned = !values && pair < pairs;
        first = turned && !INTERLEAVED ? pair : 2 * pair;
        second = turned && !INTERLEAVED ? pair + pairs : 2 * pair + VEC;
    }
};

template <int VEC>
__device__ __forceinline__ void turn(float (&x)[VEC], float (&y)[VEC], const float* cos, const float* sin, float sign) {
    float c[VEC], s[VEC];
    load<f32, VEC>(reinterpret_cast<const f32*>(cos), c);
    load<f32, VEC>(reinterpret_cast<const f32*>(sin), s);
#pragma unroll
    for (int i = 0; i < VEC; i++) {
        const float was = x[i];
        x[i] = was * c[i] - y[i] * s[i] * sign;
        y[i] = y[i] * c[i] + was * s[i] * sign;
    }
}

// How far a recomputed token is from what was kept, weighted, as it would be at position zero.
template <typename T, bool INTERLEAVED, int VEC>
__device__ __forceinline__ void add(const Item<INTERLEAVED, VEC>& item, const T* fresh, const T* kept, i64 angle,
                                    const float* cos, const float* sin, float weight, float (&x)[VEC], float (&y)[VEC]) {
    float a[VEC], b[VEC], c[VEC], d[VEC];
    load<T, VEC>(fresh + item.first, a);
    load<T, VEC>(fresh + item.second, b);
    load<T, VEC>(kept + item.first, c);
    load<T, VEC>(kept + item.second, d);
#pragma unroll
    for (int i = 0; i < VEC; i++) a[i] -= c[i], b[i] -= d[i];
    if (item.turned) turn<VEC>(a, b, cos + angle + item.pair, sin + angle + item.pair, -1.0f);
#pragma unroll
    for (int i = 0; i < VEC; i++) x[i] += weight * a[i], y[i] += weight * b[i];
}

template <typename T, bool INTERLEAVED, int VEC>
__global__ void sums(const T* fresh_keys, const T* fresh_values, int key_row, int value_row, const T* keys,
                     const T* values, const int* row_of, const float* weights, const int* segments, int heads, int dim,
                     int pairs, const float* cos, const float* sin, float* out)
{
    const int segment = blockIdx.x, width = heads * dim, number = blockIdx.y * blockDim.x + threadIdx.x;
    if (number >= width / VEC) return;
    const Item<INTERLEAVED, VEC> item(number, dim, pairs);
    const T* const fresh = (item.values ? fresh_values : fresh_keys) + item.head * dim;
    const T* const kept = (item.values ? values : keys) + item.head * dim;
    const int stride = item.values ? value_row : key_row;
    float x[VEC] = {}, y[VEC] = {};
    for (int at = segments[3 * segment]; at < segments[3 * segment + 1]; at++) {
        const int row = row_of[at];
        if (row >= 0 && weights[at] > 0)
            add<T>(item, fresh + i64(row) * stride, kept + i64(at) * width, i64(at) * pairs, cos, sin, weights[at], x, y);
    }
    f32* const to = reinterpret_cast<f32*>(out) + 2 * (i64(segment) * width + number * VEC);
    store<f32, VEC>(to, x);
    store<f32, VEC>(to + VEC, y);
}

template <typename T, bool INTERLEAVED, int VEC>
__global__ void carry(const T* fresh_keys, const T* fresh_values, int key_row, int value_row, T* keys, T* values,
                      const int* row_of, const float* weights, const float* before, const int* segments, int heads,
                      int dim, int pairs, const float* cos, const float* sin, float strength, float ridge,
                      const float* found)
{
    constexpr int AHEAD = 8;  // tokens that are read together: what is written must not hold up what is read
    const int segment = blockIdx.x, width = heads * dim, number = blockIdx.y * blockDim.x + threadIdx.x;
    if (number >= width / VEC) return;
    const Item<INTERLEAVED, VEC> item(number, dim, pairs);
    const T* const fresh = (item.values ? fresh_values : fresh_keys) + item.head * dim;
    T* const kept = (item.values ? values : keys) + item.head * dim;
    const int stride = item.values ? value_row : key_row, end = segments[3 * segment + 1];
    float x[VEC] = {}, y[VEC] = {}, seen = before[segment];
    for (int one = segments[3 * segment + 2]; one < segment; one++) {
        const f32* const from = reinterpret_cast<const f32*>(found) + 2 * (i64(one) * width + number * VEC);
        float a[VEC], b[VEC];
        load<f32, VEC>(from, a);
        load<f32, VEC>(from + VEC, b);
#pragma unroll
        for (int i = 0; i < VEC; i++) x[i] += a[i], y[i] += b[i];
    }
    for (int some = segments[3 * segment]; some < end; some += AHEAD) {
        Pack<T, VEC> a[AHEAD], b[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; i++)
            if (some + i < end) {
                const T* const from = kept + i64(some + i) * width;
                a[i] = *reinterpret_cast<const Pack<T, VEC>*>(from + item.first);
                b[i] = *reinterpret_cast<const Pack<T, VEC>*>(from + item.second);
            }
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            const int at = some + i;
            if (at >= end || !(weights[at] > 0)) continue;
            T* const here = kept + i64(at) * width;
            const float weight = weights[at];
            if (row_of[at] >= 0) {
                add<T>(item, fresh + i64(row_of[at]) * stride, here, i64(at) * pairs, cos, sin, weight, x, y);
                seen += weight * weight;
            } else if (seen > 0) {
                const float gain = strength * weight / (seen + ridge);
                float u[VEC], v[VEC];
#pragma unroll
                for (int k = 0; k < VEC; k++) u[k] = gain * x[k], v[k] = gain * y[k];
                const i64 angle = i64(at) * pairs + item.pair;
                if (item.turned) turn<VEC>(u, v, cos + angle, sin + angle, 1.0f);
#pragma unroll
                for (int k = 0; k < VEC; k++) u[k] += to_float(a[i].at[k]), v[k] += to_float(b[i].at[k]);
                store<T, VEC>(here + item.first, u);
                store<T, VEC>(here + item.second, v);
            }
        }
    }
}
