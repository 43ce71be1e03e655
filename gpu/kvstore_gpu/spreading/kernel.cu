// Spreading activation over equal words of a prompt, a thread a token in every step; sorting is between the steps.
//
// A word's kind is where it would stand in the sorted keys, so that equal words have the same number: no table is
// built. Words outside chunks come before those inside, and these in the order of their places.

__device__ __forceinline__ i64 key_of(i64 word, int window, int place, int bits) {
    return (word * 2 + (window >= 0)) << bits | place;
}
__device__ __forceinline__ int place_of(i64 key, int bits) { return int(key & ((i64(1) << bits) - 1)); }

// The first of the sorted keys that is not less.
__device__ int lower(const i64* keys, int count, i64 key) {
    int first = 0;
    while (count > 0) {
        const int half = count / 2;
        if (keys[first + half] < key) { first += half + 1; count -= half + 1; } else count = half;
    }
    return first;
}

#define EACH(i, n) for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < (n); i += gridDim.x * blockDim.x)

__global__ void words(
    const i64* ids, const i64* owner, int n, int first, int window, int bits, int* windows, i64* keys)
{
    EACH(i, n) {
        windows[i] = owner[i] < 0 ? -1 : (i - first) / window;
        keys[i] = key_of(ids[i], windows[i], i, bits);
    }
}

// Pairs of neighbours by their second word: n + 1, the first and the last of them with nothing.
__global__ void pairs(
    const int* kind, const int* windows, int n, int bits, i64* pair, int* pair_windows, i64* keys)
{
    EACH(i, n + 1) {
        const int left = i > 0 ? kind[i - 1] + 1 : 0, right = i < n ? kind[i] + 1 : 0;
        pair[i] = i64(left) * (n + 1) + right;
        pair_windows[i] = i > 0 ? windows[i - 1] : -1;
        keys[i] = key_of(pair[i], pair_windows[i], i, bits);
    }
}

// Of each word its kind, where the places of its kind begin that are in chunks, how many they are and which of them it
// is; of each kind, in how many windows it stands.
__global__ void kinds(
    const i64* word, const int* windows, const i64* keys, int n, int bits, int* kind, int* first, int* count, int* nth,
    int* within)
{
    EACH(i, n) {
        const i64 key = word[i] * 2 << bits, one = i64(1) << bits;
        const int begin = lower(keys, n, key), inside = lower(keys, n, key + one);
        kind[i] = begin;
        int before = 0;
        if (windows[i] >= 0) {
            before = lower(keys, n, key_of(word[i], windows[i], i, bits)) - inside;
            if (!before || windows[place_of(keys[inside + before - 1], bits)] != windows[i]) atomicAdd(&within[begin], 1);
        }
        if (first) {
            first[i] = inside;
            count[i] = lower(keys, n, key + 2 * one) - inside;
            nth[i] = before;
        }
    }
}

// How rare what stands in so many of all windows is; it stands here besides.
__device__ __forceinline__ float rarity(int within, int windows) {
    return within > 0 ? logf(float(windows) / max(within - 1, 1)) / logf(float(max(windows, 2))) : 0.0f;
}

__global__ void asked(const int* kind, const int* pair, int n, int begin, int* flags)
{
    EACH(i, n - begin) {
        const int at = begin + i;
        flags[kind[at]] = flags[n + 1 + pair[at]] = flags[2 * (n + 1) + pair[at + 1]] = 1;
    }
}

// What each word and each pair tells as a link, and the light of those that the question has, too.
__global__ void tell(
    const i64* ids, const i64* owner, const i64* keys, const int* kind, const int* within, const int* pair,
    const int* pair_within, const int* flags, int n, int bits, int windows, float single, float* alone, float* paired,
    float* lit)
{
    const float most = log1pf(float(max(keys[n - 1] >> (bits + 1), i64(1))));
    const auto common = [&](int i) {
        const float part = log1pf(float(ids[i])) / most, square = part * part;
        return square * square;
    };
    const auto of_pair = [&](int i) {
        const float rare = rarity(pair_within[pair[i]], windows);
        return rare * rare * max(i > 0 ? common(i - 1) : 0.0f, i < n ? common(i) : 0.0f);
    };
    EACH(i, n + 1) {
        paired[i] = of_pair(i);
        if (i == n) continue;
        const float rare = single * rarity(within[kind[i]], windows);
        alone[i] = rare * rare * common(i);
        float found = flags[kind[i]] ? alone[i] : 0.0f;
        if (flags[n + 1 + pair[i]]) found = max(found, paired[i]);
        if (flags[2 * (n + 1) + pair[i + 1]]) found = max(found, of_pair(i + 1));
        lit[i] = owner[i] < 0 ? 0.0f : found;
    }
}

// The brightest that light leaves which fades onwards to nothing over so many places, or, by a step of -1, backwards.
__device__ float faded(const float* lit, const i64* owner, bool across, int n, int i, int reach, int step) {
    float left = 0;
    for (int away = 0, at = i; away < reach && at >= 0 && at < n; away++, at += step)
        if (across || owner[at] == owner[i]) left = max(left, lit[at] * (float(reach - away) / reach));
    return left;
}

__global__ void spread(
    const float* lit, const i64* owner, int n, int ahead, int back, float* out, float* total)
{
    EACH(i, n) {
        const bool inside = owner[i] >= 0;
        out[i] = inside ? max(faded(lit, owner, true, n, i, ahead, -1), faded(lit, owner, false, n, i, back, 1)) : 0.0f;
        total[i] = max(total[i], out[i]);
    }
}

__device__ __forceinline__ float match(const int* pair, const float* alone, const float* paired, int here, int there) {
    float found = alone[here];
    if (pair[there] == pair[here]) found = max(found, paired[here]);
    if (pair[there + 1] == pair[here + 1]) found = max(found, paired[here + 1]);
    return found;
}

// Light of each word to the other places where it stands; no light is negative, so as integers they have the same order.
__global__ void hop(
    const float* lit, const i64* keys, const int* first, const int* count, const int* pair, const float* alone,
    const float* paired, int n, int bits, int common, float faint, float fade, float backward, int near, int* passed)
{
    EACH(i, n) {
        if (lit[i] < faint || count[i] < 2 || count[i] > common) continue;
        for (int nth = 0; nth < count[i]; nth++) {
            const int there = place_of(keys[first[i] + nth], bits);
            if (there >= i - near && there <= i + near) continue;
            const float weight = i < there ? fade : fade * backward;
            atomicMax(&passed[there], __float_as_int(weight * lit[i] * match(pair, alone, paired, i, there)));
        }
    }
}

// Light of words that have an equal one before, in another chunk.
__global__ void missed(
    const float* lit, const i64* owner, const i64* keys, const int* first, const int* count, const int* nth,
    const int* pair, const float* alone, const float* paired, int n, int bits, int common, float faint, float* needed)
{
    EACH(i, n) {
        float most = 0;
        if (lit[i] >= faint && count[i] > 1 && count[i] <= common)
            for (int earlier = 0; earlier < nth[i]; earlier++) {
                const int there = place_of(keys[first[i] + earlier], bits);
                if (owner[there] != owner[i]) most = max(most, lit[i] * sqrtf(match(pair, alone, paired, i, there)));
            }
        needed[i] = most;
    }
}

// Need of each place by those around, and by light that came over its chunk's beginning; a little of the light itself.
__global__ void around(
    const float* needed, const float* lit, const i64* owner, const int* spans, int n, int ahead, int back, int seam,
    float rest, float* out)
{
    EACH(i, n) {
        if (owner[i] < 0) { out[i] = -INFINITY_; continue; }
        float most = max(faded(needed, owner, false, n, i, ahead, -1), faded(needed, owner, false, n, i, back, 1));
        const int chunk = int(owner[i]), start = spans[2 * chunk];
        if (chunk && spans[2 * chunk - 1] == start && i - start < seam) {
            float thrown = 0;
            for (int away = 1; away < ahead && away <= start; away++)
                thrown = max(thrown, lit[start - away] * (float(ahead - away) / ahead));
            most = max(most, thrown * (float(seam - (i - start)) / seam));
        }
        most += rest * lit[i];
        out[i] = most > 0 ? most : -INFINITY_;
    }
}
