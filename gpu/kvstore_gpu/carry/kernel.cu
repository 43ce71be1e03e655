// What recomputed tokens of a chunk differ by, added to the tokens behind them that were not recomputed. Spans are cut
// into segments: `sums` adds up the differences in each, `carry` goes on from those before and shifts the others. A
// thread has two neighbouring dimensions, or the two of a rotary pair, of one head's keys or values. Keys are turned back
// to position zero before they are added, and on to where they are added to; in float32, rounded once.

// Where the two dimensions of a thread are, and whether they turn. The first half of the threads has keys.
template <bool INTERLEAVED>
struct Two {
    int first, second, pair;
    bool values, turned;

    __device__ Two(int item, int dim, int pairs) {
        values = item >= dim / 2;
        pair = values ? item - dim / 2 : item;
        turned = !values && pair < pairs;
        first = turned && !INTERLEAVED ? pair : 2 * pair;
        second = turned && !INTERLEAVED ? pair + pairs : 2 * pair + 1;
    }
};

__device__ __forceinline__ void turn(float& x, float& y, float c, float s) {
    const float was = x;
    x = was * c - y * s;
    y = y * c + was * s;
}

// How far a recomputed token is from what was kept, weighted, as it would be at position zero.
template <typename T, bool INTERLEAVED>
__device__ __forceinline__ void add(const Two<INTERLEAVED>& two, const T* fresh, const T* kept, int position, int pairs,
                                    const float* cos, const float* sin, float weight, float& x, float& y) {
    float a = to_float(fresh[two.first]) - to_float(kept[two.first]);
    float b = to_float(fresh[two.second]) - to_float(kept[two.second]);
    if (two.turned) turn(a, b, cos[i64(position) * pairs + two.pair], -sin[i64(position) * pairs + two.pair]);
    x += weight * a;
    y += weight * b;
}

template <typename T, bool INTERLEAVED>
__global__ void sums(const T* fresh_keys, const T* fresh_values, int key_row, int value_row, const T* keys,
                     const T* values, const int* row_of, const float* weights, const int* segments, int heads, int dim,
                     int pairs, const float* cos, const float* sin, float* out)
{
    const int segment = blockIdx.x, head = blockIdx.y, width = heads * dim;
    for (int item = threadIdx.x; item < dim; item += blockDim.x) {
        const Two<INTERLEAVED> two(item, dim, pairs);
        const T* const fresh = (two.values ? fresh_values : fresh_keys) + head * dim;
        const int stride = two.values ? value_row : key_row;
        const T* const kept = (two.values ? values : keys) + head * dim;
        float x = 0, y = 0;
        for (int at = segments[3 * segment]; at < segments[3 * segment + 1]; at++) {
            const int row = row_of[at];
            if (row >= 0 && weights[at] > 0)
                add(two, fresh + i64(row) * stride, kept + i64(at) * width, at, pairs, cos, sin, weights[at], x, y);
        }
        float* const to = out + 2 * ((i64(segment) * heads + head) * dim + item);
        to[0] = x;
        to[1] = y;
    }
}

template <typename T, bool INTERLEAVED>
__global__ void carry(const T* fresh_keys, const T* fresh_values, int key_row, int value_row, T* keys, T* values,
                      const int* row_of, const float* weights, const float* before, const int* segments, int heads,
                      int dim, int pairs, const float* cos, const float* sin, float strength, float ridge,
                      const float* found)
{
    constexpr int AHEAD = 8;  // tokens that are read together: what is written must not hold up what is read
    const int segment = blockIdx.x, head = blockIdx.y, width = heads * dim;
    const int begin = segments[3 * segment], end = segments[3 * segment + 1];
    for (int item = threadIdx.x; item < dim; item += blockDim.x) {
        const Two<INTERLEAVED> two(item, dim, pairs);
        const T* const fresh = (two.values ? fresh_values : fresh_keys) + head * dim;
        const int stride = two.values ? value_row : key_row;
        T* const kept = (two.values ? values : keys) + head * dim;
        float x = 0, y = 0, seen = before[segment];
        for (int one = segments[3 * segment + 2]; one < segment; one++) {
            const float* const from = found + 2 * ((i64(one) * heads + head) * dim + item);
            x += from[0];
            y += from[1];
        }
        for (int some = begin; some < end; some += AHEAD) {
            T a[AHEAD], b[AHEAD];
#pragma unroll
            for (int i = 0; i < AHEAD; i++)
                if (some + i < end) {
                    const T* const from = kept + i64(some + i) * width;
                    a[i] = from[two.first];
                    b[i] = from[two.second];
                }
#pragma unroll
            for (int i = 0; i < AHEAD; i++) {
                const int at = some + i;
                if (at >= end || !(weights[at] > 0)) continue;
                if (row_of[at] >= 0) {
                    add(two, fresh + i64(row_of[at]) * stride, kept + i64(at) * width, at, pairs, cos, sin, weights[at],
                        x, y);
                    seen += weights[at] * weights[at];
                } else if (seen > 0) {
                    const float gain = strength * weights[at] / (seen + ridge);
                    float u = gain * x, v = gain * y;
                    if (two.turned) turn(u, v, cos[i64(at) * pairs + two.pair], sin[i64(at) * pairs + two.pair]);
                    T* const to = kept + i64(at) * width;
                    from_float(to[two.first], to_float(a[i]) + u);
                    from_float(to[two.second], to_float(b[i]) + v);
                }
            }
        }
    }
}
