// Decode attention over a paged KV cache: one new token a sequence, grouped queries, split along the context.
//
// Compile-time: BF16 (1: bfloat16, 0: float16), D (head size: 64, 80, 96, 128), GROUP (query heads a KV head, 1..16),
// BLOCK (tokens a block: 16, 32), STAGES (tiles in flight a warp), APPEND (1: q, k and v are raw, this kernel writes
// the new token's K and V), ROPE (1: with APPEND, rotate q and k first), MIN_TILES (tiles worth a warp of their own).
//
// The cache holds tiles of 16 tokens as shared memory wants them: [block][KV head][BLOCK / 16], K and V of a
// tile permuted (`place`) so that one bulk copy moves a tile and ldmatrix meets no bank twice.
//
// All tiles of all (sequence, KV head) units form one line that the warps of the grid share out evenly ("stream-K",
// Osama et al. 2023, for flash-decoding's split, Dao et al. 2023): no batch or context leaves SMs idle. A unit that spans
// warps is merged in shared memory, one that spans thread blocks through `partial` by whoever comes last.
// The products run on tensor cores with the query heads as rows of a 16-row tile.

#include "tiles.cuh"

#define WARPS 8
#define WIDE (GROUP > 8)          // rows 8..15 of the query tile are in use
#define ROWS GROUP
#define PART (ROWS * D + 2 * ROWS)  // floats of one partial result: O, then m and l of each row
#define EACH ((D + 31) / 32)        // elements of a row that a lane has when parts are merged
#define MAX_BATCH 4096

// A place on the line of tiles: tile `tile` of `tiles` of unit (sequence, head).
struct Place {
  int sequence, head, tile, tiles, row;

  __device__ __forceinline__ void advance(const int* lengths, const int* rows, int heads) {
    if (++tile < tiles) return;
    tile = 0;
    if (++head < heads) return;
    head = 0;
    do tiles = (lengths[++sequence] + TILE - 1) / TILE; while (tiles == 0);
    row = rows[sequence];
  }
};

// Where warp `w` of `warps` starts on a line of `total` tiles, and which warp has tile `at`.
__device__ __forceinline__ int starts_at(int total, int w, int warps) { return (int)((u64)total * w / warps); }
__device__ __forceinline__ int owner(int total, int at, int warps) {
  return (int)((((u64)at + 1) * warps - 1) / total);
}

// Once a step, for the launches of all layers: where each warp of the grid starts. One thread block.
// plan[0]: tiles on the line; then five integers of `Place` a warp that has any.
extern "C" __global__ void plan_decode(const int* __restrict__ lengths, const int* __restrict__ rows, int* __restrict__ plan,
                                       int batch, int heads, int grid) {
  __shared__ int ends[MAX_BATCH + 1], sums[32];
  in_order();
  if (threadIdx.x == 0) ends[0] = 0;
  int before = 0;
  for (int base = 0; base < batch; base += blockDim.x) {  // running sum of tiles
    const int i = base + threadIdx.x, lane = threadIdx.x % 32;
    int x = i < batch ? (lengths[i] + TILE - 1) / TILE : 0;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const int y = __shfl_up_sync(~0u, x, d);
      if (lane >= d) x += y;
    }
    if (lane == 31) sums[threadIdx.x / 32] = x;
    __syncthreads();
    int all = 0;
    for (int w = 0; w < blockDim.x / 32; ++w) {
      if (w < threadIdx.x / 32) x += sums[w];
      all += sums[w];
    }
    if (i < batch) ends[i + 1] = before + x;
    before += all;
    __syncthreads();
  }
  const int total = before * heads;
  if (threadIdx.x == 0) plan[0] = total;
  if (total == 0) return;
  const int warps = max(1, min(grid * WARPS, total / MIN_TILES));
  for (int w = threadIdx.x; w < warps; w += blockDim.x) {
    const int at = starts_at(total, w, warps);
    int low = 0, high = batch - 1;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (ends[middle + 1] * heads > at) high = middle; else low = middle + 1;
    }
    const int tiles = ends[low + 1] - ends[low], rest = at - ends[low] * heads;
    int* to = plan + 1 + w * 5;
    to[0] = low;
    to[1] = rest / tiles;
    to[2] = rest % tiles;
    to[3] = tiles;
    to[4] = rows[low];
  }
}

// Parts of one unit put together: acc[r], l[r] = Σ 2^(m_part - m) · (O, l) of part(0 … count - 1), a lane holding
// elements lane, lane + 32, … of each row. All rows at once, so that the parts' latencies overlap.
template <bool GLOBAL, class Part>
__device__ __forceinline__ void merge(Part part, int count, int lane, float (&acc)[ROWS][EACH], float (&m)[ROWS],
                                      float (&l)[ROWS]) {
  auto get = [](const float* at) { return GLOBAL ? __ldcg(at) : *at; };
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    m[r] = NEVER, l[r] = 0.f;
#pragma unroll
    for (int i = 0; i < EACH; ++i) acc[r][i] = 0.f;
  }
  for (int w = lane; w < count; w += 32)
#pragma unroll
    for (int r = 0; r < ROWS; ++r) m[r] = fmaxf(m[r], get(part(w) + ROWS * D + r));
#pragma unroll
  for (int i = 16; i; i /= 2)
#pragma unroll
    for (int r = 0; r < ROWS; ++r) m[r] = fmaxf(m[r], __shfl_xor_sync(~0u, m[r], i));
#pragma unroll 2
  for (int w = 0; w < count; ++w) {
    const float* from = part(w);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const float weight = power2(get(from + ROWS * D + r) - m[r]);
      l[r] += weight * get(from + ROWS * D + ROWS + r);
#pragma unroll
      for (int i = 0; i < EACH; ++i)
        if (i * 32 + lane < D) acc[r][i] += weight * get(from + r * D + i * 32 + lane);
    }
  }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, 1)
paged_decode(const half_t* __restrict__ q,        // [batch][q_stride]: query heads; with APPEND then k and v heads
             half_t* __restrict__ cache,          // this layer's blocks
             const int* __restrict__ tables,      // [rows][table_stride]: block numbers
             const int* __restrict__ rows,        // [batch]: each sequence's row in tables
             const int* __restrict__ lengths,     // [batch]: tokens in KV, the new one included; 0: nothing to do
             const int* __restrict__ first,       // [batch]: leading tokens that are padding: read, never attended to
             const int* __restrict__ plan,        // from plan_decode
             const float2* __restrict__ rotation, // [positions][D / 2]: cosine, sine
             half_t* __restrict__ out,            // [batch][heads · GROUP · D]
             float* __restrict__ partial,         // [2 · thread blocks][PART]
             int* __restrict__ arrived,           // [batch · heads], all zero, left all zero
             int heads, int q_stride, int table_stride, float scale) {
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ __align__(8) u64 barriers[WARPS * STAGES];
  __shared__ int spans[WARPS][2];   // of each warp's two partial results: 0: its unit goes on, 1: it ends, -1: none
  __shared__ int units[WARPS][2][3];  // and its unit: number, first tile on the line, tiles
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  in_order();
  const int total = plan[0];
  if (total == 0) return;
  const int warps = max(1, min((int)gridDim.x * WARPS, total / MIN_TILES));
  const int self = blockIdx.x * WARPS + warp;
  const int begin = self < warps ? starts_at(total, self, warps) : total;
  const int end = self < warps ? starts_at(total, self + 1, warps) : total;

  float* heads_part = (float*)(shared + WARPS * STAGES * TILE_BYTES);  // a warp's first partial result
  unsigned char* ring = shared + warp * STAGES * TILE_BYTES;
  const u32 ring_at = (u32)__cvta_generic_to_shared(ring);
  const u32 barrier = (u32)__cvta_generic_to_shared(&barriers[warp * STAGES]);
  if (lane == 0) {
    spans[warp][0] = spans[warp][1] = -1;
    for (int i = 0; i < STAGES; ++i) asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier + i * 8) : "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }
  __syncwarp();

  if (begin < end) {
    const int* mine = plan + 1 + self * 5;
    Place load = {mine[0], mine[1], mine[2], mine[3], mine[4]}, here = load;
    int loaded = begin;
    auto block_of = [&](const Place& at) { return tables[at.row * table_stride + at.tile / (BLOCK / TILE)]; };
    auto source = [&](const Place& at, int block) {
      return cache + (((u64)block * heads + at.head) * (BLOCK / TILE) + at.tile % (BLOCK / TILE)) * (2 * TILE * D);
    };
    int block = block_of(load);  // of the next tile to load, looked up one tile ahead
    auto load_into = [&](int stage) {
      if (lane == 0) fetch(ring_at + stage * TILE_BYTES, source(load, block), barrier + stage * 8);
      if (++loaded < end) {
        load.advance(lengths, rows, heads);
        block = block_of(load);
      }
    };
    for (int i = 0; i < STAGES && loaded < end; ++i) load_into(i);

    const int row = lane / 4, column = lane % 4 * 2;
    u32 query[D / 8], query_high[WIDE ? D / 8 : 1];
    float o[D / 8][4];
    float m_low, m_high, l_low, l_high;
    int length = 0, from_token = 0, stage = 0, parity = 0, unit_begin = 0;

    for (int at = begin; at < end; ++at) {
      if (at == begin || here.tile == 0) {  // another unit
        unit_begin = here.tile;
        length = lengths[here.sequence];
        from_token = first[here.sequence];
#pragma unroll
        for (int high = 0; high < (WIDE ? 2 : 1); ++high) {
          const int r = row + high * 8;
          const half_t* head = q + (u64)here.sequence * q_stride + (here.head * GROUP + (r < GROUP ? r : 0)) * D;
          u32* into = high ? query_high : query;
#if APPEND && ROPE
          const float2* angle = rotation + (u64)(length - 1 - from_token) * (D / 2);
#pragma unroll
          for (int e = 0; e < D / 16; ++e) {
            const int d = e * 8 + column;
            const u32 a = *(const u32*)(head + d), b = *(const u32*)(head + d + D / 2);
            const float2 t0 = angle[d], t1 = angle[d + 1];
            const float a0 = to_float(a & 0xffff), a1 = to_float(a >> 16), b0 = to_float(b & 0xffff), b1 = to_float(b >> 16);
            into[e] = r < GROUP ? pack(a0 * t0.x - b0 * t0.y, a1 * t1.x - b1 * t1.y) : 0;
            into[e + D / 16] = r < GROUP ? pack(b0 * t0.x + a0 * t0.y, b1 * t1.x + a1 * t1.y) : 0;
          }
#else
#pragma unroll
          for (int e = 0; e < D / 8; ++e) into[e] = r < GROUP ? *(const u32*)(head + e * 8 + column) : 0;
#endif
        }
#pragma unroll
        for (int i = 0; i < D / 8; ++i) o[i][0] = o[i][1] = o[i][2] = o[i][3] = 0.f;
        m_low = m_high = NEVER;
        l_low = l_high = 0.f;
      }
      wait(barrier + stage * 8, parity);
      const u32 tile_at = ring_at + stage * TILE_BYTES;
      const bool last = here.tile == here.tiles - 1;
      if (last) {
        half_t* tile = (half_t*)(ring + stage * TILE_BYTES);
        const int fresh = (length - 1) % TILE;
        for (int i = lane; i < (TILE - 1 - fresh) * PIECES; i += 32)  // beyond the end: 0 · NaN would be NaN
          ((uint4*)tile)[place(1, fresh + 1 + i / PIECES, i % PIECES)] = make_uint4(0, 0, 0, 0);
#if APPEND
        const half_t* k = q + (u64)here.sequence * q_stride + (heads * GROUP + here.head) * D;
        const half_t* v = k + heads * D;
        half_t* stored = (half_t*)source(here, block_of(here));
        for (int d = lane; d < D / 2; d += 32) {
          half_t a = k[d], b = k[d + D / 2];
#if ROPE
          const float2 t = rotation[(u64)(length - 1 - from_token) * (D / 2) + d];
          const float fa = to_float(a), fb = to_float(b);
          a = to_half(fa * t.x - fb * t.y);
          b = to_half(fb * t.x + fa * t.y);
#endif
          const int at = place(0, fresh, d / 8) * 8 + d % 8;
          const int half = D == 128 ? at + 64 * 8 : place(0, fresh, (d + D / 2) / 8) * 8 + d % 8;
          tile[at] = stored[at] = a;
          tile[half] = stored[half] = b;
          tile[at + BEHIND * 8] = stored[at + BEHIND * 8] = v[d];
          tile[half + BEHIND * 8] = stored[half + BEHIND * 8] = v[d + D / 2];
        }
#endif
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // a bulk copy follows these stores
        __syncwarp();
      }

      // scores of 16 tokens: two 8-column tiles
      float s[2][4] = {{0.f, 0.f, 0.f, 0.f}, {0.f, 0.f, 0.f, 0.f}};
      {
        const int token = lane / 16 * 8 + lane % 8, piece = lane / 8 % 2;
#pragma unroll
        for (int e = 0; e < D / 16; ++e) {
          u32 k[4];
          load4(k, piece_at(tile_at, 0, token, piece, e));
          mma(s[0], query[2 * e], WIDE ? query_high[WIDE ? 2 * e : 0] : 0, query[2 * e + 1],
              WIDE ? query_high[WIDE ? 2 * e + 1 : 0] : 0, k[0], k[1]);
          mma(s[1], query[2 * e], WIDE ? query_high[WIDE ? 2 * e : 0] : 0, query[2 * e + 1],
              WIDE ? query_high[WIDE ? 2 * e + 1 : 0] : 0, k[2], k[3]);
        }
      }
      const int base = here.tile * TILE;
      if (last || base < from_token) {
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int token = base + n * 8 + column + (i & 1);
            if (token >= length || token < from_token) s[n][i] = __int_as_float(0xff800000);
          }
      }
      float top = fmaxf(fmaxf(s[0][0], s[0][1]), fmaxf(s[1][0], s[1][1]));
      float top_high = WIDE ? fmaxf(fmaxf(s[0][2], s[0][3]), fmaxf(s[1][2], s[1][3])) : NEVER;
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 2)) * scale;
      if (WIDE) {
        top_high = fmaxf(top_high, __shfl_xor_sync(~0u, top_high, 1));
        top_high = fmaxf(top_high, __shfl_xor_sync(~0u, top_high, 2)) * scale;
      }
      if (__any_sync(~0u, top > m_low || (WIDE && top_high > m_high))) {
        const float next = fmaxf(m_low, top), shrink = power2(m_low - next);
        m_low = next;
        l_low *= shrink;
#pragma unroll
        for (int i = 0; i < D / 8; ++i) o[i][0] *= shrink, o[i][1] *= shrink;
        if (WIDE) {
          const float next = fmaxf(m_high, top_high), shrink = power2(m_high - next);
          m_high = next;
          l_high *= shrink;
#pragma unroll
          for (int i = 0; i < D / 8; ++i) o[i][2] *= shrink, o[i][3] *= shrink;
        }
      }
      u32 p[4];
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const float p0 = power2(s[n][0] * scale - m_low), p1 = power2(s[n][1] * scale - m_low);
        l_low += p0 + p1;
        p[2 * n] = pack(p0, p1);
        if (WIDE) {
          const float p2 = power2(s[n][2] * scale - m_high), p3 = power2(s[n][3] * scale - m_high);
          l_high += p2 + p3;
          p[2 * n + 1] = pack(p2, p3);
        } else {
          p[2 * n + 1] = 0;
        }
      }
      {
        const int token = lane / 8 % 2 * 8 + lane % 8, piece = lane / 16;
#pragma unroll
        for (int e = 0; e < D / 16; ++e) {
          u32 v[4];
          load4_transposed(v, piece_at(tile_at, 1, token, piece, e));
          mma(o[2 * e], p[0], p[1], p[2], p[3], v[0], v[1]);
          mma(o[2 * e + 1], p[0], p[1], p[2], p[3], v[2], v[3]);
        }
      }
      __syncwarp();  // all lanes have read this stage
      if (loaded < end) load_into(stage);
      if (++stage == STAGES) stage = 0, parity ^= 1;

      if (last || at == end - 1) {  // this warp's part of the unit is done
        l_low += __shfl_xor_sync(~0u, l_low, 1);
        l_low += __shfl_xor_sync(~0u, l_low, 2);
        if (WIDE) {
          l_high += __shfl_xor_sync(~0u, l_high, 1);
          l_high += __shfl_xor_sync(~0u, l_high, 2);
        }
#pragma unroll
        for (int high = 0; high < (WIDE ? 2 : 1); ++high) {
          const int r = row + high * 8;
          const float m = high ? m_high : m_low, l = high ? l_high : l_low;
          if (r >= GROUP) continue;
          if (unit_begin == 0 && last) {
            half_t* to = out + ((u64)here.sequence * heads + here.head) * GROUP * D + r * D + column;
            const float inverse = 1.f / l;
#pragma unroll
            for (int i = 0; i < D / 8; ++i) *(u32*)(to + i * 8) = pack(o[i][2 * high] * inverse, o[i][2 * high + 1] * inverse);
          } else {  // the first of two stays clear of the ring, which is still in use
            float* part = unit_begin ? heads_part + warp * PART : (float*)ring;
#pragma unroll
            for (int i = 0; i < D / 8; ++i) {
              part[r * D + i * 8 + column] = o[i][2 * high];
              part[r * D + i * 8 + column + 1] = o[i][2 * high + 1];
            }
            if (lane % 4 == 0) part[ROWS * D + r] = m, part[ROWS * D + ROWS + r] = l;
          }
        }
        if (lane == 0 && !(unit_begin == 0 && last)) {
          const int slot = unit_begin ? 0 : 1;
          spans[warp][slot] = last;
          units[warp][slot][0] = here.sequence * heads + here.head;
          units[warp][slot][1] = at - here.tile;
          units[warp][slot][2] = here.tiles;
        }
      }
      if (at + 1 < end) here.advance(lengths, rows, heads);
    }
  }

  __syncthreads();
  // Merge: the last warp of this thread block that worked on a unit puts its parts together.
#pragma unroll 1
  for (int slot = 0; slot < 2; ++slot) {
    const int done = spans[warp][slot];
    if (done < 0) continue;
    if (!done && warp + 1 < WARPS && self + 1 < warps) continue;  // the next warp goes on with this unit
    int from = warp;  // the first warp here with a part of it
    if (slot == 0) while (from > 0 && spans[--from][1] < 0) {}
    const bool begins = slot == 1 || (from < warp && spans[from][1] >= 0);
    const int number = units[warp][slot][0], start = units[warp][slot][1], tiles = units[warp][slot][2];
    half_t* to = out + (u64)number * GROUP * D;
    float acc[ROWS][EACH], m[ROWS], l[ROWS];
    merge<false>([&](int i) -> const float* {
      return i == 0 && begins ? (const float*)(shared + from * STAGES * TILE_BYTES) : heads_part + (from + i) * PART;
    }, warp - from + 1, lane, acc, m, l);
    if (!(begins && done)) {
      float* mine = partial + ((u64)blockIdx.x * 2 + begins) * PART;
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
#pragma unroll
        for (int i = 0; i < EACH; ++i)
          if (i * 32 + lane < D) mine[r * D + i * 32 + lane] = acc[r][i];
        if (lane == 0) mine[ROWS * D + r] = m[r], mine[ROWS * D + ROWS + r] = l[r];
      }
      const int first_block = owner(total, start, warps) / WARPS;
      const int last_block = owner(total, start + tiles - 1, warps) / WARPS;
      __threadfence();
      __syncwarp();
      int before = 0;
      if (lane == 0) before = atomicAdd(arrived + number, 1);
      before = __shfl_sync(~0u, before, 0);
      if (before != last_block - first_block) continue;
      __threadfence();
      if (lane == 0) arrived[number] = 0;
      merge<true>([&](int i) -> const float* { return partial + ((u64)(first_block + i) * 2 + (i == 0)) * PART; },
                  last_block - first_block + 1, lane, acc, m, l);
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const float inverse = 1.f / l[r];
#pragma unroll
      for (int i = 0; i < EACH; ++i)
        if (i * 32 + lane < D) to[r * D + i * 32 + lane] = to_half(acc[r][i] * inverse);
    }
  }
}
