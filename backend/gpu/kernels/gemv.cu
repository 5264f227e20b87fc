// out[m][n] = x[m] · weight[n] (+ bias[n]), for the one or two rows of the smallest batches: a warp a row of the weights.
//
// Such a product only reads the weights, so all that counts is to keep loads in flight: each lane asks for AHEAD pieces of
// 16 bytes before it uses the first. Compile-time: BF16, ROWS (of x: 1, 2), K (width, a multiple of 256), AHEAD (divides
// K / 256), PER_SM (thread blocks an SM), KIND (0: plain, 1: ReLU, 2: weight has 2n rows, gates then ups, and out is silu(gate) · up).

#include "half.cuh"

__device__ __forceinline__ float product_of(u32 a, u32 b) {  // of two pairs
  return to_float(a & 0xffff) * to_float(b & 0xffff) + to_float(a >> 16) * to_float(b >> 16);
}

__device__ __forceinline__ float rounded(float x) { return to_float(to_half(x)); }

__device__ __forceinline__ uint4 stream(const uint4* from) {  // read once: keep it out of L1
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
  return v;
}

__device__ __forceinline__ void dot(const uint4* __restrict__ weight, const uint4* x, int lane,
                                    float (&sum)[ROWS]) {
#pragma unroll 1
  for (int base = 0; base < K / 8; base += 32 * AHEAD) {
    uint4 w[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) w[i] = stream(weight + base + i * 32 + lane);
    in_order();  // nobody writes weights: only x is to be waited for
#pragma unroll
    for (int i = 0; i < AHEAD; ++i)
#pragma unroll
      for (int m = 0; m < ROWS; ++m) {
        const uint4 v = x[m * (K / 8) + base + i * 32 + lane];
        sum[m] += product_of(w[i].x, v.x);
        sum[m] += product_of(w[i].y, v.y);
        sum[m] += product_of(w[i].z, v.z);
        sum[m] += product_of(w[i].w, v.w);
      }
  }
#pragma unroll
  for (int m = 0; m < ROWS; ++m)
#pragma unroll
    for (int i = 16; i; i /= 2) sum[m] += __shfl_xor_sync(~0u, sum[m], i);
}

extern "C" __global__ void __launch_bounds__(128, PER_SM)
gemv(const uint4* x, const uint4* __restrict__ weight, const half_t* __restrict__ bias,
     half_t* __restrict__ out, int n) {
  const int row = blockIdx.x * 4 + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= n) {
    in_order();
    return;
  }
  float sum[ROWS] = {};
  dot(weight + (u64)row * (K / 8), x, lane, sum);
#if KIND == 2
  float up[ROWS] = {};
  dot(weight + (u64)(row + n) * (K / 8), x, lane, up);
#pragma unroll
  for (int m = 0; m < ROWS; ++m) {
    const float gate = rounded(sum[m]);
    sum[m] = gate / (1.f + __expf(-gate)) * rounded(up[m]);
  }
#endif
  if (lane == 0) {
    const float more = bias ? to_float(bias[row]) : 0.f;
#pragma unroll
    for (int m = 0; m < ROWS; ++m) {
      const float y = sum[m] + more;
      out[(u64)m * n + row] = to_half(KIND == 1 ? fmaxf(y, 0.f) : y);
    }
  }
}
