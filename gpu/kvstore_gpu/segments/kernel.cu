// Mass that queries put on segments: exp(lse of the segment - lse of all), mean over heads.

__global__ void masses(const float* parts, const float* whole, int segments, int heads, int queries, float* out)
{
    const i64 total = i64(segments) * queries;
    for (i64 at = blockIdx.x * i64(blockDim.x) + threadIdx.x; at < total; at += i64(gridDim.x) * blockDim.x) {
        const i64 segment = at / queries, query = at % queries;
        float sum = 0;
        for (int head = 0; head < heads; head++)
            sum += expf(parts[(segment * heads + head) * queries + query] - whole[i64(head) * queries + query]);
        out[at] = sum / heads;
    }
}
