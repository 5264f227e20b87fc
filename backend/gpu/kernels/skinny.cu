// out[m][n] = x[m] · weight[n] (+ bias[n]) for few rows of x, up to 64: as fast as the weights can be read.
//
// A library's matrix product leaves a third of the bandwidth unused here. All (128 rows of the weights, 512 bytes of their
// width) units form one line that one thread block a multiprocessor shares out evenly ("stream-K", Osama et al. 2023), so
// that no shape leaves any idle; what several thread blocks have of one tile goes through `partial` and is summed by
// whoever comes last, in a fixed order. A warp multiplies 16 rows of the weights, loaded straight into the fragments of the
// tensor cores: a product does not care in which order it goes through its width, so a lane takes the 16 bytes that lie
// together as its share of two steps, and x is read from shared memory in the same order. The next unit's weights are
// under way, 64 KiB a multiprocessor, while one is multiplied.
//
// Compile-time: BF16; FP8 (1: x and weight are e4m3 with a scale a row each); WIDTH (bytes of a row, a multiple of 512);
// COLUMNS (rows of x, in eights); KIND (0: plain, 1: ReLU, 2: weight has 2n rows, gates then ups, and out is silu(gate) · up).

#include "half.cuh"

#define THREADS 256
#define PIECES (WIDTH / 16)       // of 16 bytes, a row
#define UNIT 32                   // of those, a unit
#define UNITS (PIECES / UNIT)     // a tile
#define STRIDE (UNIT + 4)         // pieces of a row of x in shared memory: 64 bytes more, so that two rows lie in all banks
#define OUTS (KIND == 2 ? 64 : 128)  // columns of out, a tile
#define SLOT (COLUMNS * 4 * THREADS)  // floats of a partial result

__device__ __forceinline__ uint4 stream(const uint4* from) {  // read once: keep it out of L1
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
  return v;
}

__device__ __forceinline__ void multiply(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if FP8
  asm volatile("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#else
  mma(c, a0, a1, a2, a3, b0, b1);
#endif
}

__device__ __forceinline__ int starts_at(int total, int block) { return (int)((u64)total * block / gridDim.x); }
__device__ __forceinline__ int owner(int total, int unit) { return (int)((((u64)unit + 1) * gridDim.x - 1) / total); }

template <int VALUE> struct Constant { static constexpr int value = VALUE; };  // a number known to the compiler, as an argument

__device__ __forceinline__ float rounded(float x) { return to_float(to_half(x)); }

extern "C" __global__ void __launch_bounds__(THREADS, 1)
skinny(const uint4* __restrict__ x, const uint4* __restrict__ weight, const half_t* __restrict__ bias,
       const float* __restrict__ x_scale, const float* __restrict__ weight_scale, half_t* __restrict__ out,
       float* __restrict__ partial,  // [2 · thread blocks][SLOT]
       int* __restrict__ arrived,    // [tiles], all zero, left all zero
       int rows, int n) {
  extern __shared__ __align__(128) uint4 staged[];  // [2][8 · COLUMNS][STRIDE]
  __shared__ int before;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, c = lane % 4;
  const int tiles = (n + OUTS - 1) / OUTS, total = tiles * UNITS;
  const int begin = starts_at(total, blockIdx.x), end = starts_at(total, blockIdx.x + 1);
  if (begin == end) return;
  for (int i = threadIdx.x; i < 2 * 8 * COLUMNS * STRIDE; i += THREADS) staged[i] = make_uint4(0, 0, 0, 0);
  __syncthreads();

  auto load_x = [&](int unit, int buffer) {
    const int chunk = unit % UNITS;
    for (int i = threadIdx.x; i < rows * UNIT; i += THREADS) {
      const int row = i / UNIT, piece = i % UNIT;
      const u32 to = (u32)__cvta_generic_to_shared(staged + (buffer * 8 * COLUMNS + row) * STRIDE + piece);
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(x + (u64)row * PIECES + chunk * UNIT + piece)
                   : "memory");
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  };
  auto load_weights = [&](int unit, uint4 (&low)[8], uint4 (&high)[8]) {
    const int tile = unit / UNITS, chunk = unit % UNITS;
    int first = tile * OUTS + warp * (OUTS / 8) + g, second = first + 8;  // rows of the weights
    if (KIND == 2) second = first + n;
    const int last = KIND == 2 ? 2 * n - 1 : n - 1;
    const uint4* a = weight + (u64)min(first, last) * PIECES + chunk * UNIT + c;
    const uint4* b = weight + (u64)min(second, last) * PIECES + chunk * UNIT + c;
#pragma unroll
    for (int i = 0; i < 8; ++i) low[i] = stream(a + i * 4), high[i] = stream(b + i * 4);
  };

  float sum[COLUMNS][4];
  auto clear = [&] {
#pragma unroll
    for (int m = 0; m < COLUMNS; ++m) sum[m][0] = sum[m][1] = sum[m][2] = sum[m][3] = 0.f;
  };
  auto finish = [&](int tile) {  // what one tile comes to, or this thread block's part of it
    const int from = max(begin, tile * UNITS), to = min(end, (tile + 1) * UNITS);
    if (to - from < UNITS) {
      const int first = owner(total, tile * UNITS), last = owner(total, (tile + 1) * UNITS - 1);
      auto result = [&](int block) {
        const bool second = block == first && starts_at(total, block) < tile * UNITS;
        return partial + (u64)(2 * block + second) * SLOT + threadIdx.x;
      };
      float* mine = result(blockIdx.x);
#pragma unroll
      for (int m = 0; m < COLUMNS; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) __stcg(mine + (m * 4 + i) * THREADS, sum[m][i]);
      __threadfence();
      __syncthreads();
      if (threadIdx.x == 0) before = atomicAdd(arrived + tile, 1);
      __syncthreads();
      const bool done = before == last - first;
      __syncthreads();  // `before` may be written again
      if (!done) return;
      if (threadIdx.x == 0) arrived[tile] = 0;
      __threadfence();
      clear();
      for (int block = first; block <= last; ++block) {
        const float* part = result(block);
#pragma unroll
        for (int m = 0; m < COLUMNS; ++m)
#pragma unroll
          for (int i = 0; i < 4; ++i) sum[m][i] += __ldcg(part + (m * 4 + i) * THREADS);
      }
    }
    const int column = tile * OUTS + warp * (OUTS / 8) + g;
#pragma unroll
    for (int m = 0; m < COLUMNS; ++m)
#pragma unroll
      for (int i = 0; i < (KIND == 2 ? 2 : 4); ++i) {
        const int row = m * 8 + c * 2 + (i & 1), at = column + i / 2 * 8;
        if (row >= rows || at >= n) continue;
        float y = sum[m][i];
#if FP8
        const float of_x = x_scale[row];
        y *= of_x * weight_scale[at];
#endif
#if KIND == 2
        float up = sum[m][i + 2];
#if FP8
        up *= of_x * weight_scale[at + n];
#endif
        const float gate = rounded(y);
        y = gate / (1.f + __expf(-gate)) * rounded(up);
#else
        if (bias) y += to_float(bias[at]);
        if (KIND == 1) y = fmaxf(y, 0.f);
#endif
        out[(u64)row * n + at] = to_half(y);
      }
  };

  uint4 low[2][8], high[2][8];
  clear();
  load_x(begin, 0);
  load_weights(begin, low[0], high[0]);
  auto step = [&](int unit, auto here) {
    constexpr int now = decltype(here)::value;
    if (unit + 1 < end) {
      load_x(unit + 1, 1 - now);
      load_weights(unit + 1, low[1 - now], high[1 - now]);
      asm volatile("cp.async.wait_group 1;" ::: "memory");
    } else {
      asm volatile("cp.async.wait_group 0;" ::: "memory");
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint4 a = low[now][i], b = high[now][i];
#pragma unroll
      for (int m = 0; m < COLUMNS; ++m) {
        const uint4 v = staged[(now * 8 * COLUMNS + m * 8 + g) * STRIDE + i * 4 + c];
        multiply(sum[m], a.x, b.x, a.y, b.y, v.x, v.y);
        multiply(sum[m], a.z, b.z, a.w, b.w, v.z, v.w);
      }
    }
    __syncthreads();  // the next but one is staged here
    if ((unit + 1) % UNITS == 0 || unit + 1 == end) {
      finish(unit / UNITS);
      clear();
    }
  };
  for (int unit = begin; unit < end; unit += 2) {
    step(unit, Constant<0>());
    if (unit + 1 < end) step(unit + 1, Constant<1>());
  }
}
