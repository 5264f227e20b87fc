// Attention of chunks of prompts over a paged KV cache: each row attends to its sequence's tokens up to itself.
//
// Compile-time: BF16, D (head size: 64, 80, 96, 128), GROUP (query heads a KV head, 1..16), BLOCK (tokens a block: 16, 32),
// STAGES (groups of 64 tokens in flight a thread block).
//
// A step's chunks are *spans*, five integers each: first row in the flat batch, rows, tokens in KV (the span's own
// included), leading tokens of those that are padding, row of the block tables. Their number and lengths are read on the
// device, so one captured launch serves every mix of chunks.
//
// A thread block takes 64 query rows: QT tokens with their GROUP heads of one KV head (FlashAttention 2's loop, Dao 2023,
// over tiles as the cache holds them). Where there are fewer such items than the GPU takes at once, long contexts are split
// (flash-decoding, Dao et al. 2023) and whoever comes last puts the parts together. `plan_chunks` says which items there are.
// Where 16 rows are all there are, as where a sequence verifies its drafts, the four warps take the same rows and a tile of
// KV each, and are put together at the end: so few rows and much KV take what reading takes.

#include "tiles.cuh"

#define WARPS 4
#define HIGH 64                    // query rows of a thread block
#define QT (HIGH / GROUP)          // and tokens
#define WIDTH (4 * TILE)           // tokens of KV a stage
#define STAGE_BYTES (4 * TILE_BYTES)
#define SPAN 5                     // integers of a span
#define ENTRY 8                    // integers of an entry of the plan: span, tile of QT tokens, first and last stage
                                   // (exclusive), part, parts, place of the first part's result
#define LEAST 4                    // stages worth a part of their own
#define SLOT ((D / 2 + 4) * WARPS * 32)  // floats of a part's result: four of O a thread and piece, then m and l of its rows

struct Reach {  // stages of 64 tokens that tile `tile` of a span looks at
  int begin, end;
  __device__ __forceinline__ Reach(const int* span, int tile) {
    const int last = span[2] - span[1] + min((tile + 1) * QT, span[1]);  // tokens that its last row sees
    begin = span[3] / WIDTH;
    end = (last + WIDTH - 1) / WIDTH;
  }
};

// Running sum over the thread block of one number a thread, exclusive; `all` is the sum of all.
__device__ __forceinline__ int before_me(int x, int* sums, int& all) {
  const int lane = threadIdx.x % 32, mine = x;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const int y = __shfl_up_sync(~0u, x, d);
    if (lane >= d) x += y;
  }
  __syncthreads();
  if (lane == 31) sums[threadIdx.x / 32] = x;
  __syncthreads();
  all = 0;
  for (int w = 0; w < blockDim.x / 32; ++w) {
    if (w < threadIdx.x / 32) x += sums[w];
    all += sums[w];
  }
  return x - mine;
}

// Once a step, for the launches of all layers. One thread block; `places` is how many parts' results there is room for.
// plan[0]: entries; then the entries, each of which stands for all KV heads.
extern "C" __global__ void plan_chunks(const int* __restrict__ spans, int* __restrict__ plan, int count, int heads, int grid) {
  __shared__ int sums[32];
  in_order();
  const int each = (count + blockDim.x - 1) / blockDim.x;  // spans a thread
  const int from = min(count, (int)threadIdx.x * each), to = min(count, from + each);
  int tiles = 0, stages = 0;
  for (int i = from; i < to; ++i)
    for (int t = 0; t * QT < spans[i * SPAN + 1]; ++t) {
      const Reach reach(spans + i * SPAN, t);
      ++tiles;
      stages += reach.end - reach.begin;
    }
  int all_tiles, all_stages;
  before_me(tiles, sums, all_tiles);
  before_me(stages, sums, all_stages);
  const int room = 2 * grid;
  const int most = all_tiles * heads >= room ? 1 << 30 : max(LEAST, (all_stages * heads + room - 1) / room);  // stages a part
  int entries = 0, split = 0;
  for (int i = from; i < to; ++i)
    for (int t = 0; t * QT < spans[i * SPAN + 1]; ++t) {
      const Reach reach(spans + i * SPAN, t);
      const int parts = (reach.end - reach.begin + most - 1) / most;
      entries += parts;
      if (parts > 1) split += parts;
    }
  int all_entries, all_split;
  int at = before_me(entries, sums, all_entries);
  int place = before_me(split, sums, all_split);
  if (threadIdx.x == 0) plan[0] = all_entries;
  for (int i = from; i < to; ++i)
    for (int t = 0; t * QT < spans[i * SPAN + 1]; ++t) {
      const Reach reach(spans + i * SPAN, t);
      const int length = reach.end - reach.begin, parts = (length + most - 1) / most;
      for (int p = 0; p < parts; ++p) {
        int* entry = plan + (1 + at++) * ENTRY;
        entry[0] = i;
        entry[1] = t;
        entry[2] = reach.begin + (int)((long long)length * p / parts);
        entry[3] = reach.begin + (int)((long long)length * (p + 1) / parts);
        entry[4] = p;
        entry[5] = parts;
        entry[6] = place;
      }
      if (parts > 1) place += parts;
    }
}

__device__ __forceinline__ void arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Scores of `TILES` tiles of KV from token `base` on, and their share of the values: a warp's 16 query rows.
template <int TILES>
__device__ __forceinline__ void look(u32 tiles_at, int base, int least, int from_token, const int (&sees)[2], float scale,
                                     const u32 (&query)[D / 8], const u32 (&query_high)[D / 8], float (&o)[D / 8][4],
                                     float (&m)[2], float (&l)[2]) {
  const int lane = threadIdx.x % 32, column = lane % 4 * 2;
  float s[2 * TILES][4];
#pragma unroll
  for (int n = 0; n < TILES; ++n) {
    const u32 keys = tiles_at + n * TILE_BYTES;
    const int token = lane / 16 * 8 + lane % 8, piece = lane / 8 % 2;
#pragma unroll
    for (int i = 0; i < 4; ++i) s[2 * n][i] = s[2 * n + 1][i] = 0.f;
#pragma unroll
    for (int e = 0; e < D / 16; ++e) {
      u32 k[4];
      load4(k, keys + token * ROW + place(token, 2 * e + piece) * 16);
      mma(s[2 * n], query[2 * e], query_high[2 * e], query[2 * e + 1], query_high[2 * e + 1], k[0], k[1]);
      mma(s[2 * n + 1], query[2 * e], query_high[2 * e], query[2 * e + 1], query_high[2 * e + 1], k[2], k[3]);
    }
  }
  if (base + TILES * TILE > least || base < from_token) {
#pragma unroll
    for (int n = 0; n < 2 * TILES; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = base + n * 8 + column + (i & 1);
        if (token >= sees[i / 2] || token < from_token) s[n][i] = __int_as_float(0xff800000);
      }
  }
#pragma unroll
  for (int high = 0; high < 2; ++high) {
    float top = fmaxf(s[0][2 * high], s[0][2 * high + 1]);
#pragma unroll
    for (int n = 1; n < 2 * TILES; ++n) top = fmaxf(top, fmaxf(s[n][2 * high], s[n][2 * high + 1]));
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 2)) * scale;
    const float next = fmaxf(m[high], top), shrink = power2(m[high] - next);
    m[high] = next;
    l[high] *= shrink;
#pragma unroll
    for (int i = 0; i < D / 8; ++i) o[i][2 * high] *= shrink, o[i][2 * high + 1] *= shrink;
#pragma unroll
    for (int n = 0; n < 2 * TILES; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float p = power2(s[n][2 * high + i] * scale - next);
        s[n][2 * high + i] = p;
        l[high] += p;
      }
  }
#pragma unroll
  for (int n = 0; n < TILES; ++n) {
    const u32 values = tiles_at + n * TILE_BYTES + TILE * ROW;
    const u32 p0 = pack(s[2 * n][0], s[2 * n][1]), p1 = pack(s[2 * n][2], s[2 * n][3]);
    const u32 p2 = pack(s[2 * n + 1][0], s[2 * n + 1][1]), p3 = pack(s[2 * n + 1][2], s[2 * n + 1][3]);
    const int token = lane / 8 % 2 * 8 + lane % 8, piece = lane / 16;
#pragma unroll
    for (int e = 0; e < D / 16; ++e) {
      u32 v[4];
      load4_transposed(v, values + token * ROW + place(token, 2 * e + piece) * 16);
      mma(o[2 * e], p0, p1, p2, p3, v[0], v[1]);
      mma(o[2 * e + 1], p0, p1, p2, p3, v[2], v[3]);
    }
  }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, 2)
paged_chunks(const half_t* __restrict__ q,      // [rows][q_stride]: query heads, rotated
             const half_t* __restrict__ cache,  // this layer's blocks; the rows' own keys and values are in it
             const int* __restrict__ tables,    // [rows of tables][table_stride]: block numbers
             const int* __restrict__ spans,     // [count][SPAN]
             const int* __restrict__ plan,      // from plan_chunks
             half_t* __restrict__ out,          // [rows][heads · GROUP · D]
             float* __restrict__ partial,       // [parts · heads][SLOT]
             int* __restrict__ arrived,         // [parts · heads], all zero, left all zero
             int heads, int q_stride, int table_stride, float scale) {
  extern __shared__ __align__(128) unsigned char ring[];
  __shared__ __align__(8) u64 barriers[STAGES];
  __shared__ int before;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row = lane / 4, column = lane % 4 * 2;
  const u32 ring_at = (u32)__cvta_generic_to_shared(ring), barrier = (u32)__cvta_generic_to_shared(barriers);
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; ++i)
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 4;" ::"r"(barrier + i * 8) : "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }
  __syncthreads();
  in_order();
  const int total = plan[0] * heads;
  int used = 0;  // stages consumed so far, of all items
  for (int item = blockIdx.x; item < total; item += gridDim.x) {
    const int* entry = plan + (1 + item / heads) * ENTRY;
    const int head = item % heads, tile = entry[1], begin = entry[2], stop = entry[3], part = entry[4], parts = entry[5];
    const int* span = spans + entry[0] * SPAN;
    const int first_row = span[0], rows = span[1], end = span[2], from_token = span[3];
    const int* table = tables + (u64)span[4] * table_stride;

    auto load = [&](int stage, int ring_stage) {  // by the first four threads, a tile each
      const int token = stage * WIDTH + (int)threadIdx.x * TILE;
      const u32 ready = barrier + ring_stage * 8;
      if (token >= end) {
        arrive(ready);
        return;
      }
      const half_t* from = cache + (((u64)table[token / BLOCK] * heads + head) * (BLOCK / TILE) + token % BLOCK / TILE) *
                                       (2 * TILE * D);
      fetch(ring_at + ring_stage * STAGE_BYTES + threadIdx.x * TILE_BYTES, from, ready);
    };
    if (threadIdx.x < 4)
      for (int i = 0; i < STAGES && begin + i < stop; ++i) load(begin + i, (used + i) % STAGES);

    const bool few = min(rows - tile * QT, QT) * GROUP <= 16;
    u32 query[D / 8], query_high[D / 8];
    int sees[2];  // tokens that each of this lane's two rows sees
    half_t* to[2];
#pragma unroll
    for (int high = 0; high < 2; ++high) {
      const int r = (few ? 0 : warp * 16) + row + high * 8, token = tile * QT + r / GROUP;
      const bool live = r < QT * GROUP && token < rows;
      const int mine = live ? token : rows - 1, query_head = head * GROUP + r % GROUP;
      const half_t* from = q + (u64)(first_row + mine) * q_stride + query_head * D;
      u32* into = high ? query_high : query;
#pragma unroll
      for (int e = 0; e < D / 8; ++e) into[e] = *(const u32*)(from + e * 8 + column);
      sees[high] = end - rows + mine + 1;
      to[high] = live && !(few && warp) ? out + ((u64)(first_row + mine) * heads * GROUP + query_head) * D : 0;
    }
    const int least = end - rows + min(tile * QT, rows - 1) + 1;  // tokens that the tile's first row sees

    float o[D / 8][4];
#pragma unroll
    for (int i = 0; i < D / 8; ++i) o[i][0] = o[i][1] = o[i][2] = o[i][3] = 0.f;
    float m[2] = {NEVER, NEVER}, l[2] = {0.f, 0.f};

    for (int stage = begin; stage < stop; ++stage, ++used) {
      const int here = used % STAGES;
      wait(barrier + here * 8, used / STAGES & 1);
      const u32 tiles_at = ring_at + here * STAGE_BYTES;
      const int base = stage * WIDTH;
      if (base + WIDTH > end) {  // values beyond the end: 0 · NaN would be NaN
        half_t* values = (half_t*)(ring + here * STAGE_BYTES);
        for (int i = threadIdx.x; i < WIDTH * PIECES; i += WARPS * 32) {
          const int token = i / PIECES;
          if (base + token >= end)
            ((uint4*)(values + (token / TILE * 2 + 1) * TILE * D + token % TILE * D))[i % PIECES] = make_uint4(0, 0, 0, 0);
        }
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        __syncthreads();
      }

      if (few)
        look<1>(tiles_at + warp * TILE_BYTES, base + warp * TILE, least, from_token, sees, scale, query, query_high, o, m, l);
      else
        look<4>(tiles_at, base, least, from_token, sees, scale, query, query_high, o, m, l);
      __syncthreads();  // all warps have read this stage
      if (threadIdx.x < 4 && stage + STAGES < stop) load(stage + STAGES, here);
    }

#pragma unroll
    for (int high = 0; high < 2; ++high) {
      l[high] += __shfl_xor_sync(~0u, l[high], 1);
      l[high] += __shfl_xor_sync(~0u, l[high], 2);
    }
    if (few) {  // the first warp puts together what each has of the same rows
      float* held = (float*)ring + lane;  // [warp][D / 2 + 4][lane]
      auto of = [&](int w, int i) -> float& { return held[(w * (D / 2 + 4) + i) * 32]; };
      if (warp) {
#pragma unroll
        for (int i = 0; i < D / 8; ++i)
#pragma unroll
          for (int j = 0; j < 4; ++j) of(warp, i * 4 + j) = o[i][j];
#pragma unroll
        for (int high = 0; high < 2; ++high) of(warp, D / 2 + high) = m[high], of(warp, D / 2 + 2 + high) = l[high];
      }
      __syncthreads();
      for (int w = 1; w < WARPS && warp == 0; ++w) {
        float mine[2], other[2];
#pragma unroll
        for (int high = 0; high < 2; ++high) {
          const float theirs = of(w, D / 2 + high), top = fmaxf(m[high], theirs);
          mine[high] = power2(m[high] - top), other[high] = power2(theirs - top);
          m[high] = top;
          l[high] = l[high] * mine[high] + of(w, D / 2 + 2 + high) * other[high];
        }
#pragma unroll
        for (int i = 0; i < D / 8; ++i)
#pragma unroll
          for (int j = 0; j < 4; ++j) o[i][j] = o[i][j] * mine[j / 2] + of(w, i * 4 + j) * other[j / 2];
      }
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // bulk copies of the next item follow
      __syncthreads();
    }
    if (parts > 1) {
      const int place_of_first = entry[6] * heads + head;
      auto result = [&](int p) { return partial + (u64)(place_of_first + p * heads) * SLOT + threadIdx.x; };
      float* mine = result(part);
#pragma unroll
      for (int i = 0; i < D / 8; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) __stcg(mine + (i * 4 + j) * WARPS * 32, o[i][j]);
#pragma unroll
      for (int high = 0; high < 2; ++high)  // four lanes of a row say the same: each keeps its own
        __stcg(mine + (D / 2 + high) * WARPS * 32, m[high]), __stcg(mine + (D / 2 + 2 + high) * WARPS * 32, l[high]);
      __threadfence();
      __syncthreads();
      if (threadIdx.x == 0) before = atomicAdd(arrived + place_of_first, 1);
      __syncthreads();
      const bool last = before == parts - 1;
      __syncthreads();  // `before` may be written again
      if (!last) continue;
      if (threadIdx.x == 0) arrived[place_of_first] = 0;
      __threadfence();
      float top[2] = {NEVER, NEVER};
      for (int p = 0; p < parts; ++p)
#pragma unroll
        for (int high = 0; high < 2; ++high) top[high] = fmaxf(top[high], __ldcg(result(p) + (D / 2 + high) * WARPS * 32));
#pragma unroll
      for (int i = 0; i < D / 8; ++i) o[i][0] = o[i][1] = o[i][2] = o[i][3] = 0.f;
      l[0] = l[1] = 0.f;
      for (int p = 0; p < parts; ++p) {
        const float* from = result(p);
        float weight[2];
#pragma unroll
        for (int high = 0; high < 2; ++high) {
          weight[high] = power2(__ldcg(from + (D / 2 + high) * WARPS * 32) - top[high]);
          l[high] += weight[high] * __ldcg(from + (D / 2 + 2 + high) * WARPS * 32);
        }
#pragma unroll
        for (int i = 0; i < D / 8; ++i)
#pragma unroll
          for (int j = 0; j < 4; ++j) o[i][j] += weight[j / 2] * __ldcg(from + (i * 4 + j) * WARPS * 32);
      }
    }
#pragma unroll
    for (int high = 0; high < 2; ++high) {
      if (!to[high]) continue;
      const float inverse = 1.f / l[high];
#pragma unroll
      for (int i = 0; i < D / 8; ++i)
        *(u32*)(to[high] + i * 8 + column) = pack(o[i][2 * high] * inverse, o[i][2 * high + 1] * inverse);
    }
  }
}
