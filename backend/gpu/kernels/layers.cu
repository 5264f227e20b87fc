// What surrounds the matrix products of a layer, each one pass over its data, 16 bytes a thread and access.
//
// Compile-time: BF16; D (head size) and BLOCK (tokens a block) for what touches the cache; WIDTH (elements of a row) and EACH
// (pieces of 8 elements a thread) for what a thread block does to a row; RMS (1: RMSNorm, 0: LayerNorm) for the norm.
// SCALED (1: what a product of 8-bit floats gave is still to be multiplied by a scale a row and a scale a column) and QUANT
// (1: the result is e4m3 with a scale a row: its largest element becomes 448) for models whose weights are 8-bit floats.

#include "half.cuh"

struct Eight {
  float x[8];
  __device__ __forceinline__ Eight() {}
  __device__ __forceinline__ explicit Eight(uint4 v) {
    const u32 w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) x[2 * i] = to_float(w[i] & 0xffff), x[2 * i + 1] = to_float(w[i] >> 16);
  }
  __device__ __forceinline__ uint4 packed() const {
    return make_uint4(pack(x[0], x[1]), pack(x[2], x[3]), pack(x[4], x[5]), pack(x[6], x[7]));
  }
};

__device__ __forceinline__ float sum_of_warp(float x) {
#pragma unroll
  for (int i = 16; i; i /= 2) x += __shfl_xor_sync(~0u, x, i);
  return x;
}

__device__ __forceinline__ float sum_of_block(float x, float* shared) {
  x = sum_of_warp(x);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  x = threadIdx.x % 32 < blockDim.x / 32 ? shared[threadIdx.x % 32] : 0.f;
  x = sum_of_warp(x);
  __syncthreads();
  return x;
}

__device__ __forceinline__ float max_of_block(float x, float* shared) {
#pragma unroll
  for (int i = 16; i; i /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, i));
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  x = threadIdx.x % 32 < blockDim.x / 32 ? shared[threadIdx.x % 32] : 0.f;
#pragma unroll
  for (int i = 16; i; i /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, i));
  __syncthreads();
  return x;
}

__device__ __forceinline__ Eight scaled(Eight x, float row, const float* column) {
  const float4 a = ((const float4*)column)[0], b = ((const float4*)column)[1];
  const float of[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
  for (int j = 0; j < 8; ++j) x.x[j] *= row * of[j];
  return x;
}

// By the short division: an exact one takes more instructions than all else in a pass over gates and ups.
__device__ __forceinline__ float silu(float x) { return __fdividef(x, 1.f + __expf(-x)); }

// x[row][i] *= the row's scale · the column's (+ bias), in pieces of 8.
extern "C" __global__ void apply_scales(uint4* __restrict__ x, const float* __restrict__ rows, const float* __restrict__ columns,
                                        const uint4* __restrict__ bias, int pieces, u64 count) {
  in_order();
  for (u64 at = (u64)blockIdx.x * blockDim.x + threadIdx.x; at < count; at += (u64)gridDim.x * blockDim.x) {
    const u64 row = at / pieces, i = at - row * pieces;
    Eight y = scaled(Eight(x[at]), rows[row], columns + i * 8);
    if (bias) {
      const Eight more(bias[i]);
#pragma unroll
      for (int j = 0; j < 8; ++j) y.x[j] += more.x[j];
    }
    x[at] = y.packed();
  }
}

#ifdef EACH
__device__ __forceinline__ Eight unpacked(const uint4& v) { return Eight(v); }
__device__ __forceinline__ const Eight& unpacked(const Eight& v) { return v; }

// A row that a thread block holds, written as e4m3 with its scale. Packed it takes half the registers: a wide row's threads
// then leave room for those of other rows, which read while these compute.
template <class Piece>
__device__ __forceinline__ void write_e4m3(const Piece (&held)[EACH], uint2* out, float* scale, float* shared) {
  float top = 0.f;
#pragma unroll
  for (int k = 0; k < EACH; ++k)
    if (threadIdx.x + k * blockDim.x < WIDTH / 8) {
      const Eight x = unpacked(held[k]);
#pragma unroll
      for (int j = 0; j < 8; ++j) top = fmaxf(top, fabsf(x.x[j]));
    }
  top = fmaxf(max_of_block(top, shared), 1e-12f);
  if (threadIdx.x == 0) *scale = top / 448.f;
  const float inverse = 448.f / top;
#pragma unroll
  for (int k = 0; k < EACH; ++k) {
    const int i = threadIdx.x + k * blockDim.x;
    if (i >= WIDTH / 8) continue;
    const Eight all = unpacked(held[k]);
    const float* x = all.x;
    out[i] = make_uint2(pack_e4m3(x[0] * inverse, x[1] * inverse, x[2] * inverse, x[3] * inverse),
                        pack_e4m3(x[4] * inverse, x[5] * inverse, x[6] * inverse, x[7] * inverse));
  }
}

// out = x as e4m3, a thread block a row.
extern "C" __global__ void quantise(const uint4* __restrict__ x, uint2* __restrict__ out, float* __restrict__ scale) {
  __shared__ float shared[32];
  in_order();
  uint4 held[EACH];
#pragma unroll
  for (int k = 0; k < EACH; ++k) {
    const int i = threadIdx.x + k * blockDim.x;
    if (i < WIDTH / 8) held[k] = x[(u64)blockIdx.x * (WIDTH / 8) + i];
  }
  write_e4m3(held, out + (u64)blockIdx.x * (WIDTH / 8), scale + blockIdx.x, shared);
}

#ifdef GATED
// out = silu(x[:WIDTH]) · x[WIDTH:] as e4m3, where x may still have to be scaled; a thread block a row.
extern "C" __global__ void gated_e4m3(const uint4* __restrict__ x, const float* __restrict__ row_scale,
                                      const float* __restrict__ column_scale, uint2* __restrict__ out,
                                      float* __restrict__ scale) {
  __shared__ float shared[32];
  const int pieces = WIDTH / 8;
  in_order();
#if SCALED
  const float of_row = row_scale[blockIdx.x];
#endif
  uint4 held[EACH];
#pragma unroll
  for (int k = 0; k < EACH; ++k) {
    const int i = threadIdx.x + k * blockDim.x;
    if (i >= pieces) continue;
    const u64 at = (u64)blockIdx.x * 2 * pieces + i;
    Eight gate(x[at]), up(x[at + pieces]);
#if SCALED
    gate = scaled(gate, of_row, column_scale + i * 8);
    up = scaled(up, of_row, column_scale + WIDTH + i * 8);
#endif
#pragma unroll
    for (int j = 0; j < 8; ++j) gate.x[j] = silu(gate.x[j]) * up.x[j];
    held[k] = gate.packed();
  }
  write_e4m3(held, out + (u64)blockIdx.x * pieces, scale + blockIdx.x, shared);
}
#endif
#endif

#ifndef PEERS
#define PEERS 1
#endif
#if PEERS > 1
// What every GPU has in the memory that all of them read: whose share lies ready, counted in turns; which turn the last norm
// was of; how many of its thread blocks have begun this one; and which turn was the last that others were told of.
struct Flags {
  u32 ready[PEERS], turn, begun, told;
};

// That this GPU's share lies ready, to all others.
__device__ __forceinline__ void tell(const u64* bases, int rank, int flags_at, u32 turn) {
  for (int p = 0; p < PEERS; ++p)
    if (p != rank)
      asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(((Flags*)(bases[p] + flags_at))->ready + rank), "r"(turn)
                   : "memory");
}

// Wait for what the others tell. Whoever waits for more than 20 s waits for a process that has died.
__device__ __forceinline__ void await(const Flags* mine, int rank, u32 turn) {
  u64 began, now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(began));
  for (int p = 0; p < PEERS; ++p) {
    u32 seen = turn;
    if (p != rank) do {
        asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(seen) : "l"(mine->ready + p) : "memory");
        asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
        if (now - began > 20000000000ull) __trap();
      } while ((int)(seen - turn) < 0);
  }
}

// Tell the others that this GPU's share is ready, and wait for theirs; by all thread blocks of a norm.
__device__ __forceinline__ void meet(const u64* bases, int rank, int flags_at) {
  if (threadIdx.x == 0) {
    Flags* mine = (Flags*)(bases[rank] + flags_at);
    const u32 turn = *(volatile u32*)&mine->turn + 1;
    if (blockIdx.x == 0) tell(bases, rank, flags_at, turn);
    await(mine, rank, turn);
    if (atomicAdd(&mine->begun, 1) == gridDim.x - 1) mine->begun = 0, mine->turn = turn;
  }
  __syncthreads();
}

// Of each row the largest of what every GPU found (`largest`), and the column it stands in: of equal ones the first. Scores lie
// `best_at` bytes from the start of each one's memory, columns `column_at`. A thread a row.
extern "C" __global__ void largest_of_all(const u64* __restrict__ bases, int rank, int best_at, int column_at, int flags_at,
                                          int* __restrict__ out, int rows) {
  in_order();
  meet(bases, rank, flags_at);
  const int row = blockIdx.x * blockDim.x + threadIdx.x;
  if (row >= rows) return;
  float top = __ldcg((const float*)(bases[0] + best_at) + row);
  int column = __ldcg((const int*)(bases[0] + column_at) + row);
  for (int p = 1; p < PEERS; ++p) {
    const float other = __ldcg((const float*)(bases[p] + best_at) + row);
    if (other > top) top = other, column = __ldcg((const int*)(bases[p] + column_at) + row);
  }
  out[row] = column;
}

// Tell the others that what was copied to them has arrived; one thread.
extern "C" __global__ void tell_of_copy(const u64* __restrict__ bases, int rank, int flags_at) {
  Flags* mine = (Flags*)(bases[rank] + flags_at);
  in_order();
  tell(bases, rank, flags_at, ++mine->told);
}

// Wait for what the others copy to this GPU; one thread. No other kernel starts meanwhile: its thread blocks would fill the
// GPU, and leave no room for the one that tells the others.
extern "C" __global__ void wait_for_copy(const u64* __restrict__ bases, int rank, int flags_at) {
  Flags* mine = (Flags*)(bases[rank] + flags_at);
  asm volatile("griddepcontrol.wait;" ::: "memory");
  await(mine, rank, ++mine->turn);
}
#endif

#ifdef RMS
// residual += x (if x is given), out = norm(residual) · weight (+ bias); a thread block a row.
// PEERS (more than 1): x is the sum of what that many GPUs gave. Each one's lies at its place of `sources`, elements
// `values_at` bytes from there, scales of rows `scales_at`.
extern "C" __global__ void residual_norm(const uint4* __restrict__ x, uint4* __restrict__ residual,
                                         const uint4* __restrict__ weight, const uint4* __restrict__ bias,
                                         void* __restrict__ out, float epsilon, const float* __restrict__ row_scale,
                                         const float* __restrict__ column_scale, float* __restrict__ out_scale,
                                         const u64* __restrict__ bases, const u64* __restrict__ sources, int rank,
                                         int values_at, int scales_at, int flags_at, int ours) {
  __shared__ float shared[32];
  const int pieces = WIDTH / 8;
  in_order();
#if PEERS > 1
  if (ours) meet(bases, rank, flags_at);
#endif
  const u64 row = (u64)blockIdx.x * pieces;
  Eight held[EACH];
  float sum = 0.f;
#pragma unroll
  for (int k = 0; k < EACH; ++k) {
    const int i = threadIdx.x + k * blockDim.x;
    if (i >= pieces) continue;
    held[k] = Eight(residual[row + i]);
#if PEERS > 1
    Eight all;
#pragma unroll
    for (int j = 0; j < 8; ++j) all.x[j] = 0.f;
#pragma unroll
    for (int p = 0; p < PEERS; ++p) {  // in the same order on all GPUs: their residuals stay equal bit for bit
      const char* base = (const char*)sources[p];
      Eight more(__ldcg((const uint4*)(base + values_at) + row + i));
#if SCALED
      more = scaled(more, __ldcg((const float*)(base + scales_at) + blockIdx.x), column_scale + i * 8);
#endif
#pragma unroll
      for (int j = 0; j < 8; ++j) all.x[j] += more.x[j];
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) held[k].x[j] += all.x[j];
    const uint4 rounded = held[k].packed();
    residual[row + i] = rounded;
    held[k] = Eight(rounded);  // what the next layer will read
#else
    if (x) {
#if SCALED
      const Eight more = scaled(Eight(x[row + i]), row_scale[blockIdx.x], column_scale + i * 8);
#else
      const Eight more(x[row + i]);
#endif
#pragma unroll
      for (int j = 0; j < 8; ++j) held[k].x[j] += more.x[j];
      const uint4 rounded = held[k].packed();
      residual[row + i] = rounded;
      held[k] = Eight(rounded);  // what the next layer will read
    }
#endif
#pragma unroll
    for (int j = 0; j < 8; ++j) sum += RMS ? held[k].x[j] * held[k].x[j] : held[k].x[j];
  }
  float mean = 0.f, square = sum_of_block(sum, shared) / WIDTH;
  if (!RMS) {
    mean = square;
    sum = 0.f;
#pragma unroll
    for (int k = 0; k < EACH; ++k)
      if (threadIdx.x + k * blockDim.x < pieces)
#pragma unroll
        for (int j = 0; j < 8; ++j) sum += (held[k].x[j] - mean) * (held[k].x[j] - mean);
    square = sum_of_block(sum, shared) / WIDTH;
  }
  const float scale = rsqrtf(square + epsilon);
#pragma unroll
  for (int k = 0; k < EACH; ++k) {
    const int i = threadIdx.x + k * blockDim.x;
    if (i >= pieces) continue;
    const Eight w(weight[i]);
    Eight b;
    if (!RMS) b = Eight(bias[i]);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      held[k].x[j] = (held[k].x[j] - mean) * scale * w.x[j];
      if (!RMS) held[k].x[j] += b.x[j];
    }
#if !QUANT
    ((uint4*)out)[row + i] = held[k].packed();
#endif
  }
#if QUANT
  write_e4m3(held, (uint2*)out + row, out_scale + blockIdx.x, shared);
#endif
}
#endif

// The largest element of each row and the column it stands in, the first of equal ones; columns are counted from `from`.
// A thread block of 1,024 threads a row. `best` may be missing.
extern "C" __global__ void largest(const uint4* __restrict__ x, float* __restrict__ best, int* __restrict__ column,
                                   int pieces, int from) {
  __shared__ float tops[32];
  __shared__ int columns[32];
  in_order();
  const uint4* row = x + (u64)blockIdx.x * pieces;
  float top = __int_as_float(0xff800000);
  int at = 0;
#pragma unroll 4
  for (int i = threadIdx.x; i < pieces; i += 1024) {
    const Eight v(row[i]);
#pragma unroll
    for (int j = 0; j < 8; ++j)
      if (v.x[j] > top) top = v.x[j], at = i * 8 + j;
  }
  auto best_of_warp = [&] {
#pragma unroll
    for (int d = 16; d; d /= 2) {
      const float other = __shfl_xor_sync(~0u, top, d);
      const int other_at = __shfl_xor_sync(~0u, at, d);
      if (other > top || (other == top && other_at < at)) top = other, at = other_at;
    }
  };
  best_of_warp();
  if (threadIdx.x % 32 == 0) tops[threadIdx.x / 32] = top, columns[threadIdx.x / 32] = at;
  __syncthreads();
  if (threadIdx.x >= 32) return;
  top = tops[threadIdx.x], at = columns[threadIdx.x];
  best_of_warp();
  if (threadIdx.x) return;
  column[blockIdx.x] = from + at;
  if (best) best[blockIdx.x] = top;
}

// out[t][i] = silu(x[t][i]) · x[t][pieces + i], in pieces of 8.
extern "C" __global__ void gated(const uint4* __restrict__ x, uint4* __restrict__ out, int pieces, u64 count) {
  in_order();
  for (u64 at = (u64)blockIdx.x * blockDim.x + threadIdx.x; at < count; at += (u64)gridDim.x * blockDim.x) {
    const u64 token = at / pieces, i = at - token * pieces;
    const Eight gate(x[token * 2 * pieces + i]), up(x[(token * 2 + 1) * pieces + i]);
    Eight y;
#pragma unroll
    for (int j = 0; j < 8; ++j) y.x[j] = silu(gate.x[j]) * up.x[j];
    out[at] = y.packed();
  }
}

#ifdef BLOCK
// RMSNorm of every query and key head of a row, in place (Qwen3): a warp a head.
extern "C" __global__ void head_norm(half_t* __restrict__ qkv, const half_t* __restrict__ query_weight,
                                     const half_t* __restrict__ key_weight, int query_heads, int key_heads, int stride,
                                     float epsilon) {
  const int head = blockIdx.y * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
  in_order();
  if (head >= query_heads + key_heads) return;
  u32* x = (u32*)(qkv + (u64)blockIdx.x * stride + head * D);
  const u32* weight = (const u32*)(head < query_heads ? query_weight : key_weight);
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < (D / 2 + 31) / 32; ++i) {
    if (i * 32 + lane >= D / 2) continue;
    const u32 v = x[i * 32 + lane];
    const float a = to_float(v & 0xffff), b = to_float(v >> 16);
    sum += a * a + b * b;
  }
  const float scale = rsqrtf(sum_of_warp(sum) / D + epsilon);
#pragma unroll
  for (int i = 0; i < (D / 2 + 31) / 32; ++i) {
    const int at = i * 32 + lane;
    if (at >= D / 2) continue;
    const u32 v = x[at], w = weight[at];
    x[at] = pack(to_float(v & 0xffff) * scale * to_float(w & 0xffff), to_float(v >> 16) * scale * to_float(w >> 16));
  }
}

// Store the K of a row, rotated if `rotation` is given, and its V: a thread block a row.
// Slots: block · BLOCK + place in it; -1: nowhere.
extern "C" __global__ void rotate_and_store(const half_t* __restrict__ qkv, half_t* __restrict__ cache,
                                            const int* __restrict__ positions, const int* __restrict__ slots,
                                            const float2* __restrict__ rotation, int query_heads, int key_heads, int stride) {
  const half_t* keys = qkv + (u64)blockIdx.x * stride + query_heads * D;
  in_order();
  const int slot = slots[blockIdx.x];
  if (slot < 0) return;
  const int token = slot % TILE;
  half_t* tiles = cache + ((u64)(slot / BLOCK) * key_heads * (BLOCK / TILE) + slot % BLOCK / TILE) * (2 * TILE * D);
  const u64 head_step = (u64)(BLOCK / TILE) * (2 * TILE * D);
  const float2* angle = rotation ? rotation + (u64)positions[blockIdx.x] * (D / 2) : 0;
  const int halves = D / 16;
  const int rotated = key_heads * halves;
  for (int i = threadIdx.x; i < rotated + key_heads * PIECES; i += blockDim.x) {
    if (i >= rotated) {
      const int head = (i - rotated) / PIECES, piece = (i - rotated) % PIECES;
      const uint4 v = ((const uint4*)(keys + (key_heads + head) * D))[piece];
      ((uint4*)(tiles + head * head_step))[place(1, token, piece)] = v;
      continue;
    }
    const int head = i / halves, piece = i % halves;
    const uint4* low = (const uint4*)(keys + head * D) + piece;
    Eight a(*low), b(low[halves]);
    if (rotation) {
#pragma unroll
      for (int j = 0; j < 8; j += 2) {
        const float4 t = ((const float4*)angle)[piece * 4 + j / 2];  // of two pairs
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const float x = a.x[j + k], y = b.x[j + k], cosine = k ? t.z : t.x, sine = k ? t.w : t.y;
          a.x[j + k] = x * cosine - y * sine;
          b.x[j + k] = y * cosine + x * sine;
        }
      }
    }
    uint4* to = (uint4*)(tiles + head * head_step);
    to[place(0, token, piece)] = a.packed();
    to[place(0, token, piece + halves)] = b.packed();
  }
}
#endif
