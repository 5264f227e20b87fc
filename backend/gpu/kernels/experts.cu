// What a layer with experts does around their products: choosing experts for each token, bringing the tokens of one expert
// together, and adding up what a token's experts gave. A *pair* is a token and one of its experts.
//
// Compile-time: BF16; EXPERTS (at most 256), TOP (experts a token, at most 16), NORM (1: a token's weights add up to 1).

#include "half.cuh"

#define EACH ((EXPERTS + 31) / 32)  // experts a lane looks after
#define NEVER -1e30f

__device__ __forceinline__ float uniform(u32 a, u32 b, u32 c) {  // in (0, 1), as if at random: a hash of three numbers
  u32 x = a * 0x9E3779B1u ^ b * 0x85EBCA77u ^ c * 0xC2B2AE3Du;
  x ^= x >> 16, x *= 0x7FEB352Du, x ^= x >> 15, x *= 0x846CA68Bu, x ^= x >> 16;
  return (x + 0.5f) * 2.3283064365386963e-10f;
}

// The TOP experts of each row and their weights; a warp a row. Rows from *live on are nobody's: their pairs are -1, and so are
// pairs with experts of other GPUs than this one, which has `own` of them from `first` on and counts from there.
// skew < 0: by the router's logits. Else experts are drawn with chances ∝ rank^-skew, for measurements (0: all alike); the
// layer's ranks are its own, and the same row draws anew whenever its logits change. Pairs of each of this GPU's experts are
// counted (`counts`, zero before) and numbered in any order (`place`).
extern "C" __global__ void choose(const half_t* __restrict__ logits, int* __restrict__ chosen, float* __restrict__ weights,
                                  const int* __restrict__ live, int rows, float skew, int layer, int first, int own,
                                  int* __restrict__ counts, int* __restrict__ place) {
  const int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
  in_order();
  if (row >= rows) return;
  if (live && row >= *live) {
    if (lane < TOP) chosen[row * TOP + lane] = -1;
    return;
  }
  float mine[EACH], key[EACH];
  float top = NEVER;
  u32 noise = 0;
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    const int expert = i * 32 + lane;
    mine[i] = expert < EXPERTS ? to_float(logits[(u64)row * EXPERTS + expert]) : NEVER;
    key[i] = mine[i];
    top = fmaxf(top, mine[i]);
    noise = noise * 31 + __float_as_uint(mine[i]);
  }
#pragma unroll
  for (int d = 16; d; d /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, d)), noise += __shfl_xor_sync(~0u, noise, d) * 7;
  noise = __shfl_sync(~0u, noise, 0);
  float all = 0.f;
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    all += __expf(mine[i] - top);
    if (skew >= 0.f) {
      const int expert = i * 32 + lane, rank = (expert * 37 + layer * 101) % EXPERTS;
      const float gumbel = -__logf(-__logf(uniform(noise, row * 1024 + expert, layer)));
      key[i] = expert < EXPERTS ? gumbel - skew * __logf(rank + 1.f) : NEVER;
    }
  }
#pragma unroll
  for (int d = 16; d; d /= 2) all += __shfl_xor_sync(~0u, all, d);
  float sum = 0.f, weight = 0.f;  // a lane keeps the weight of the choice that has its number
  int choice = -1;
#pragma unroll
  for (int k = 0; k < TOP; ++k) {
    float best = NEVER;
    int at = 0;
#pragma unroll
    for (int i = 0; i < EACH; ++i)
      if (key[i] > best) best = key[i], at = i * 32 + lane;
#pragma unroll
    for (int d = 16; d; d /= 2) {
      const float other = __shfl_xor_sync(~0u, best, d);
      const int other_at = __shfl_xor_sync(~0u, at, d);
      if (other > best || (other == best && other_at < at)) best = other, at = other_at;
    }
    float logit = 0.f;
#pragma unroll
    for (int i = 0; i < EACH; ++i)
      if (i * 32 + lane == at) logit = mine[i], key[i] = NEVER;
    logit = __shfl_sync(~0u, logit, at % 32);
    const float share = __expf(logit - top) / all;
    sum += share;
    if (lane == k) choice = at, weight = share;
  }
  if (lane < TOP) {
    const int mine = choice >= first && choice < first + own ? choice - first : -1;
    chosen[row * TOP + lane] = mine;
    if (mine >= 0) place[row * TOP + lane] = atomicAdd(counts + mine, 1);  // their order changes no row's result
    weights[row * TOP + lane] = NORM ? weight / sum : weight;
  }
}

// For `pairs` pairs, once `choose` has counted them (`counts`) and numbered those of each expert (`place`): where each one's
// row is once the pairs of an expert lie together (`place`, -1 of nobody's), which row it is of (`source`), where each
// expert's rows end (`ends`), and the tiles of at most `high` rows that they make: expert (-1: no tile), first row, end of the
// expert's rows, three arrays of `most`. All thread blocks add up the counts; the first says what there is but one of.
extern "C" __global__ void arrange(const int* __restrict__ chosen, const int* __restrict__ counts, int* __restrict__ place,
                                   int* __restrict__ source, int* __restrict__ ends, int* __restrict__ tiles, int pairs,
                                   int high, int most) {
  __shared__ int starts[EXPERTS], first_tile[EXPERTS + 1];
  in_order();
  if (threadIdx.x < 32) {  // running sums of rows and of tiles over the experts, by one warp
    int rows = 0, tile = 0;
    for (int base = 0; base < EXPERTS; base += 32) {
      const int e = base + threadIdx.x, n = e < EXPERTS ? counts[e] : 0;
      int a = n, b = (n + high - 1) / high;
#pragma unroll
      for (int d = 1; d < 32; d *= 2) {
        const int x = __shfl_up_sync(~0u, a, d), y = __shfl_up_sync(~0u, b, d);
        if (threadIdx.x >= d) a += x, b += y;
      }
      if (e < EXPERTS) {
        starts[e] = rows + a - n;
        first_tile[e] = tile + b - (n + high - 1) / high;
      }
      rows += __shfl_sync(~0u, a, 31);
      tile += __shfl_sync(~0u, b, 31);
    }
    if (threadIdx.x == 0) first_tile[EXPERTS] = tile;
  }
  __syncthreads();
  if (blockIdx.x == 0) {
    for (int e = threadIdx.x; e < EXPERTS; e += blockDim.x) {
      const int n = counts[e];
      ends[e] = starts[e] + n;
      for (int i = 0; i * high < n; ++i) {
        const int t = first_tile[e] + i;
        tiles[t] = e;
        tiles[most + t] = starts[e] + i * high;
        tiles[2 * most + t] = starts[e] + n;
      }
    }
    for (int t = first_tile[EXPERTS] + threadIdx.x; t < most; t += blockDim.x) tiles[t] = -1;
  }
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < pairs; i += gridDim.x * blockDim.x) {
    const int e = chosen[i], at = e < 0 ? -1 : starts[e] + place[i];
    place[i] = at;
    if (e >= 0) source[at] = i / TOP;
  }
}

// out[row] = Σ of its pairs: weight · y[place]; a thread block a row. A row that is nobody's becomes zero.
extern "C" __global__ void combine(const uint4* __restrict__ y, const int* __restrict__ place,
                                   const float* __restrict__ weights, uint4* __restrict__ out, int pieces) {
  int at[TOP];
  float weight[TOP];
  in_order();
#pragma unroll
  for (int k = 0; k < TOP; ++k) at[k] = place[blockIdx.x * TOP + k], weight[k] = weights[blockIdx.x * TOP + k];
  for (int i = threadIdx.x; i < pieces; i += blockDim.x) {
    float sum[8] = {};
#pragma unroll
    for (int k = 0; k < TOP; ++k) {
      if (at[k] < 0) continue;
      const uint4 v = y[(u64)at[k] * pieces + i];
      const u32 w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        sum[2 * j] += weight[k] * to_float(w[j] & 0xffff);
        sum[2 * j + 1] += weight[k] * to_float(w[j] >> 16);
      }
    }
    out[(u64)blockIdx.x * pieces + i] = make_uint4(pack(sum[0], sum[1]), pack(sum[2], sum[3]), pack(sum[4], sum[5]),
                                                   pack(sum[6], sum[7]));
  }
}
