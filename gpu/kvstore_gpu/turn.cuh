// What one thread turns of a key at once: VEC elements and their partners (NeoX: half a rotary part away; interleaved:
// beside them), in float32, rounded once. Dimensions behind the rotary part pass through.

template <typename T, bool INTERLEAVED, int VEC>
__device__ void turn_item(const T* from, T* to, int item, int pairs, const float* cos, const float* sin, bool turn)
{
    const int turned = (INTERLEAVED ? 2 * pairs : pairs) / VEC;
    if (item >= turned) {  // behind the rotary part
        const int at = 2 * pairs + (item - turned) * VEC;
        *reinterpret_cast<Pack<T, VEC>*>(to + at) = *reinterpret_cast<const Pack<T, VEC>*>(from + at);
    } else if (INTERLEAVED) {
        float x[VEC], y[VEC];
        load<T, VEC>(from + item * VEC, x);
#pragma unroll
        for (int i = 0; i < VEC; i += 2) {
            const int pair = (item * VEC + i) / 2;
            const float c = turn ? cos[pair] : 1.0f, s = turn ? sin[pair] : 0.0f;
            y[i] = x[i] * c - x[i + 1] * s;
            y[i + 1] = x[i + 1] * c + x[i] * s;
        }
        store<T, VEC>(to + item * VEC, y);
    } else {
        float x[VEC], y[VEC], c[VEC], s[VEC];
        load<T, VEC>(from + item * VEC, x);
        load<T, VEC>(from + pairs + item * VEC, y);
        if (turn) {
            load<f32, VEC>(reinterpret_cast<const f32*>(cos + item * VEC), c);
            load<f32, VEC>(reinterpret_cast<const f32*>(sin + item * VEC), s);
#pragma unroll
            for (int i = 0; i < VEC; i++) {
                const float first = x[i];
                x[i] = first * c[i] - y[i] * s[i];
                y[i] = y[i] * c[i] + first * s[i];
            }
        }
        store<T, VEC>(to + item * VEC, x);
        store<T, VEC>(to + pairs + item * VEC, y);
    }
}
