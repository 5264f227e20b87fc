// out[m] = x[m] · weight for the one or two rows of the smallest batches, both e4m3 with a scale a row: a warp a row of the
// weights, as in gemv.cu. Scales are applied if they are given.
//
// A product of two e4m3 has at most 8 bits, so halves hold it exactly; x comes divided by 32, so that four of them together
// stay below what a half can hold, and then go on as floats. x lies in shared memory as halves, the first and the second
// eight of every sixteen apart, so that neighbouring lanes read neighbouring pieces.
// Compile-time: BF16 (of the result), ROWS (of x: 1, 2), K (width, a multiple of 512), AHEAD (pieces of 16 weights that a lane
// asks for before it uses the first; divides K / 512), PER_SM (thread blocks an SM).

#include "half.cuh"

#define THREADS 128
#define DOWN 0x28002800  // 1/32, twice

__device__ __forceinline__ uint4 stream(const uint4* from) {  // read once: keep it out of L1
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
  return v;
}

__device__ __forceinline__ void halves(u32 four, u32& low, u32& high) {  // four e4m3 as two pairs of halves
  asm("{\n.reg .b16 a, b;\nmov.b32 {a, b}, %2;\ncvt.rn.f16x2.e4m3x2 %0, a;\ncvt.rn.f16x2.e4m3x2 %1, b;\n}"
      : "=r"(low), "=r"(high) : "r"(four));
}

__device__ __forceinline__ u32 times(u32 a, u32 b) {  // pairs of halves
  u32 y;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
  return y;
}

__device__ __forceinline__ u32 times_plus(u32 a, u32 b, u32 c) {
  u32 y;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(c));
  return y;
}

__device__ __forceinline__ float eight(u32 a, u32 b, uint4 x) {  // eight weights by eight of x
  u32 w[4];
  halves(a, w[0], w[1]);
  halves(b, w[2], w[3]);
  const u32 sum = times_plus(w[3], x.w, times_plus(w[2], x.z, times_plus(w[1], x.y, times(w[0], x.x))));
  float low, high;
  asm("{\n.reg .b16 a, b;\nmov.b32 {a, b}, %2;\ncvt.f32.f16 %0, a;\ncvt.f32.f16 %1, b;\n}"
      : "=f"(low), "=f"(high) : "r"(sum));
  return low + high;
}

extern "C" __global__ void __launch_bounds__(THREADS, PER_SM)
gemv_e4m3(const uint4* __restrict__ x, const uint4* __restrict__ weight, const half_t* __restrict__ bias,
          const float* __restrict__ x_scale, const float* __restrict__ weight_scale, half_t* __restrict__ out, int n) {
  extern __shared__ __align__(16) uint4 staged[];  // [ROWS][2][K / 16], eight halves each
  in_order();
  for (int i = threadIdx.x; i < ROWS * (K / 16); i += THREADS) {
    const uint4 v = x[i];
    const u32 four[4] = {v.x, v.y, v.z, v.w};
    u32 to[8];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      halves(four[j], to[2 * j], to[2 * j + 1]);
      to[2 * j] = times(to[2 * j], DOWN), to[2 * j + 1] = times(to[2 * j + 1], DOWN);
    }
    uint4* at = staged + i / (K / 16) * (K / 8) + i % (K / 16);
    at[0] = make_uint4(to[0], to[1], to[2], to[3]);
    at[K / 16] = make_uint4(to[4], to[5], to[6], to[7]);
  }
  __syncthreads();
  const int row = blockIdx.x * (THREADS / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= n) return;
  float sum[ROWS] = {};
  const uint4* mine = weight + (u64)row * (K / 16);
#pragma unroll 1
  for (int base = 0; base < K / 16; base += 32 * AHEAD) {
    uint4 w[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) w[i] = stream(mine + base + i * 32 + lane);
#pragma unroll
    for (int i = 0; i < AHEAD; ++i)
#pragma unroll
      for (int m = 0; m < ROWS; ++m) {
        const uint4* at = staged + m * (K / 8) + base + i * 32 + lane;
        sum[m] += eight(w[i].x, w[i].y, at[0]) + eight(w[i].z, w[i].w, at[K / 16]);
      }
  }
#pragma unroll
  for (int m = 0; m < ROWS; ++m) {
#pragma unroll
    for (int i = 16; i; i /= 2) sum[m] += __shfl_xor_sync(~0u, sum[m], i);
    float y = sum[m] * 32.f;
    if (x_scale) y *= x_scale[m] * weight_scale[row];
    if (bias) y += to_float(bias[row]);
    if (lane == 0) out[(u64)m * n + row] = to_half(y);
  }
}
