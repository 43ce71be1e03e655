// Tensor cores on the CPU: all lanes show their fragments, each computes its own sums.

template <typename T>
float half_of(u32 pair, int which) {
    T x;
    x.bits = u16(pair >> 16 * which);
    return to_float(x);
}
template <typename T>
void mma(float (&sum)[4], const u32 (&a)[4], u32 b0, u32 b1, T) {
    const u64 words[6] = {a[0], a[1], a[2], a[3], b0, b1};
    const auto all = emulated::meet(words, 6);
    const int row = emulated::current % 32 / 4, pair = emulated::current % 4;
    for (int i = 0; i < 4; i++) {
        const int r = row + i / 2 * 8, c = pair * 2 + i % 2;
        for (int k = 0; k < 16; k++) {
            const u64* from_a = all[r % 8 * 4 + k % 8 / 2];
            const u64* from_b = all[c * 4 + k % 8 / 2];
            sum[i] += half_of<T>(u32(from_a[r / 8 + k / 8 * 2]), k % 2) * half_of<T>(u32(from_b[4 + k / 8]), k % 2);
        }
    }
}
inline void load_matrices(u32 (&out)[4], const void* row) {
    const u64 word = u64(row);
    const auto all = emulated::meet(&word, 1);
    const int lane = emulated::current % 32;
    for (int m = 0; m < 4; m++) {
        const u16* const found = reinterpret_cast<const u16*>(all[m * 8 + lane / 4][0]) + lane % 4 * 2;
        out[m] = u32(found[0]) | u32(found[1]) << 16;
    }
}
