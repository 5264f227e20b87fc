// Attention of chunks of prompts over a paged KV cache: each row attends to its sequence's tokens up to itself.
//
// Compile-time: BF16, D (head size: 64, 80, 96, 128), GROUP (query heads a KV head, 1..16), BLOCK (tokens a block: 16, 32),
// GROUPS (of four warps, with 64 query rows each: 1 or 2), STAGES (groups of 64 · GROUPS tokens in flight a thread block).
//
// A step's chunks are *spans*, five integers each: first row in the flat batch, rows, tokens in KV (the span's own
// included), leading tokens of those that are padding, row of the block tables. Their number and lengths are read on the
// device, so one captured launch serves every mix of chunks.
//
// A thread block takes 64 or 128 query rows: QT tokens with their GROUP heads of one KV head (FlashAttention 2's loop, Dao
// 2023, over tiles as the cache holds them). Where there are fewer such items than the GPU takes at once, long contexts are split
// (flash-decoding, Dao et al. 2023) and whoever comes last puts the parts together. `plan_chunks` says which items there are.
// One warp brings tiles in, of the next item too. On Hopper the products of the others are those of warp groups, from shared
// memory, and run while a softmax does (FlashAttention 3, Shah et al. 2024); for other head sizes and GPUs each warp multiplies
// its own 16 rows. Where 16 rows are all there are, as where a sequence verifies its drafts, all warps take the same rows and a
// tile of KV each, and are put together at the end: so few rows and much KV take what reading takes.

#include "tiles.cuh"

#define WARPS (4 * GROUPS)         // that compute; of four more one brings tiles in
#define HIGH (64 * GROUPS)         // query rows of a thread block
#define QT (HIGH / GROUP)          // and tokens
#define WIDTH (64 * GROUPS)        // tokens of KV a stage
#define STAGE_BYTES (WIDTH / TILE * TILE_BYTES)
#define SPAN 5                     // integers of a span
#define ENTRY 8                    // integers of an entry of the plan: span, tile of QT tokens, first and last stage
                                   // (exclusive), part, parts, place of the first part's result
#define LEAST (4 / GROUPS)         // stages worth a part of their own
#define SLOT ((D / 2 + 4) * WARPS * 32)  // floats of a part's result: four of O a thread and piece, then m and l of its rows
#ifdef __CUDA_ARCH_FEAT_SM90_ALL   // the GPU has products of warp groups, and registers move from group to group
#define WARP_GROUPS SWIZZLED
#define REGISTERS(how, count) asm volatile("setmaxnreg." how ".sync.aligned.u32 %0;" ::"n"(count))
#else
#define WARP_GROUPS 0
#define REGISTERS(how, count)
#endif

struct Reach {  // stages of KV that tile `tile` of a span looks at
  int begin, end;
  __device__ __forceinline__ Reach(int rows, int known, int padding, int tile) {
    const int last = known - rows + min((tile + 1) * QT, rows);  // tokens that its last row sees
    begin = padding / WIDTH;
    end = max(begin, (last + WIDTH - 1) / WIDTH);
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

// Call `what(span, tile, reach)` for each tile of the spans `from` to `to`, by all lanes of a warp at once; with a span of -1
// by those for which there is none. A lane takes a span where all have few tiles, else all take the tiles of one together.
template <class What>
__device__ __forceinline__ void for_tiles(const int* spans, int from, int to, What what) {
  const int lane = threadIdx.x % 32;
  for (int base = from; base < to; base += 32) {
    const int* mine = spans + (base + lane) * SPAN;
    const bool any = base + lane < to;
    const int rows = any ? mine[1] : 0, known = any ? mine[2] : 0, padding = any ? mine[3] : 0;
    const int tiles = (rows + QT - 1) / QT, most = __reduce_max_sync(~0u, tiles);
    if (most <= 4) {
      for (int t = 0; t < most; ++t) what(t < tiles ? base + lane : -1, t, Reach(rows, known, padding, t));
      continue;
    }
    for (u32 left = __ballot_sync(~0u, rows > 0); left; left &= left - 1) {
      const int i = __ffs(left) - 1, n = __shfl_sync(~0u, rows, i);
      const int k = __shfl_sync(~0u, known, i), p = __shfl_sync(~0u, padding, i);
      for (int t = lane; t - lane < (n + QT - 1) / QT; t += 32) what(t * QT < n ? base + i : -1, t, Reach(n, k, p, t));
    }
  }
}

// Once a step, for the launches of all layers. One thread block; `grid` is how many there are of `paged_chunks`.
// plan[0]: entries; then the entries, each of which stands for all KV heads.
extern "C" __global__ void plan_chunks(const int* __restrict__ spans, int* __restrict__ plan, int count, int heads, int grid) {
  __shared__ int sums[32];
  in_order();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  const int each = (count + warps - 1) / warps;  // spans a warp
  const int from = min(count, warp * each), to = min(count, from + each);
  int tiles = 0, stages = 0, all_tiles, all_stages;
  for_tiles(spans, from, to, [&](int span, int, Reach reach) {
    if (span >= 0) ++tiles, stages += reach.end - reach.begin;
  });
  before_me(tiles, sums, all_tiles);
  before_me(stages, sums, all_stages);
  // stages a part: the fewest with which the GPU takes all parts at once, or all
  int most = all_tiles * heads >= grid ? 1 << 30 : max(LEAST, (all_stages * heads + grid - 1) / grid);
  int entries, split, all_entries, all_split, before;
  while (true) {
    entries = split = 0;
    for_tiles(spans, from, to, [&](int span, int, Reach reach) {
      const int parts = span < 0 ? 0 : (reach.end - reach.begin + most - 1) / most;
      entries += parts;
      split += parts > 1 ? parts : 0;
    });
    before = before_me(entries, sums, all_entries);
    if (all_entries * heads <= grid || most >= all_stages) break;
    most += (most + 7) / 8;
  }
  int at = __shfl_sync(~0u, before, 0);  // of this warp's next entry
  int place = __shfl_sync(~0u, before_me(split, sums, all_split), 0);
  if (threadIdx.x == 0) plan[0] = all_entries;
  for_tiles(spans, from, to, [&](int span, int tile, Reach reach) {
    const int length = reach.end - reach.begin, parts = span < 0 ? 0 : (length + most - 1) / most;
    int until = parts, until_place = parts > 1 ? parts : 0;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const int x = __shfl_up_sync(~0u, until, d), y = __shfl_up_sync(~0u, until_place, d);
      if (lane >= d) until += x, until_place += y;
    }
    const int mine = at + until - parts, my_place = place + until_place - (parts > 1 ? parts : 0);
    for (int p = 0; p < parts; ++p) {
      int* entry = plan + (1 + mine + p) * ENTRY;
      entry[0] = span;
      entry[1] = tile;
      entry[2] = reach.begin + (int)((long long)length * p / parts);
      entry[3] = reach.begin + (int)((long long)length * (p + 1) / parts);
      entry[4] = p;
      entry[5] = parts;
      entry[6] = my_place;
    }
    at += __shfl_sync(~0u, until, 31);
    place += __shfl_sync(~0u, until_place, 31);
  });
}

__device__ __forceinline__ void arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void init(u32 barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

// Wait for all warps that compute, or for the four of a group.
__device__ __forceinline__ void meet() { asm volatile("bar.sync 1, %0;" ::"n"(WARPS * 32) : "memory"); }
__device__ __forceinline__ void meet_group(int group) { asm volatile("bar.sync %0, 128;" ::"r"(2 + group) : "memory"); }

struct Item {  // an entry of the plan for one KV head, and its span
  int tile, begin, stop, part, parts, place, head, first_row, rows, end, from_token, row;
};

__device__ __forceinline__ Item item_of(const int* plan, const int* spans, int number, int heads) {
  const int* entry = plan + (1 + number / heads) * ENTRY;
  const int4 a = *(const int4*)entry, b = *(const int4*)(entry + 4);
  const int* span = spans + a.x * SPAN;
  return {a.y, a.z, a.w, b.x, b.y, b.z, number % heads, span[0], span[1], span[2], span[3], span[4]};
}

// The number of this thread block's item of a round, the items with most tokens first, and every other round in reverse, so
// that each thread block gets as many tokens as the others; negative: none.
__device__ __forceinline__ int numbered(int round, int total) {
  const int at = round & 1 ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
  return total - 1 - round * (int)gridDim.x - at;
}

// Of four lanes with four numbers each, lane i gets the i-th number of each.
__device__ __forceinline__ void turn(u32 (&x)[4]) {
#pragma unroll
  for (int d = 1; d <= 2; d *= 2) {
    const bool upper = threadIdx.x & d;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & d) continue;
      const u32 got = __shfl_xor_sync(~0u, upper ? x[i] : x[i + d], d);
      if (upper)
        x[i] = got;
      else
        x[i + d] = got;
    }
  }
}

// A row as four lanes read or write it, 16 bytes each at a time. A product's fragments lie in the row as 4 bytes a lane, and to
// read and write them so took an item 1,700 cycles more, of the 15,400 that one of a prompt of 512 tokens took (H200).
struct Row {
  uint4 pieces[D / 32];
  u32 rest[D / 8 % 4 + 1];  // of a head size that is no multiple of 32, as fragments

  __device__ __forceinline__ void read(const half_t* row) {
#pragma unroll
    for (int k = 0; k < D / 32; ++k) pieces[k] = *(const uint4*)(row + (k * 4 + threadIdx.x % 4) * 8);
#pragma unroll
    for (int j = 0; j < D / 8 % 4; ++j) rest[j] = *(const u32*)(row + (D / 32 * 4 + j) * 8 + threadIdx.x % 4 * 2);
  }
  __device__ __forceinline__ void write(half_t* row) const {
#pragma unroll
    for (int k = 0; k < D / 32; ++k) *(uint4*)(row + (k * 4 + threadIdx.x % 4) * 8) = pieces[k];
#pragma unroll
    for (int j = 0; j < D / 8 % 4; ++j) *(u32*)(row + (D / 32 * 4 + j) * 8 + threadIdx.x % 4 * 2) = rest[j];
  }
  // Elements 8 · e + lane % 4 · 2 and the next, for each e.
  __device__ __forceinline__ void to_fragments(u32 (&x)[D / 8]) const {
#pragma unroll
    for (int k = 0; k < D / 32; ++k) {
      u32 y[4] = {pieces[k].x, pieces[k].y, pieces[k].z, pieces[k].w};
      turn(y);
#pragma unroll
      for (int j = 0; j < 4; ++j) x[k * 4 + j] = y[j];
    }
#pragma unroll
    for (int j = 0; j < D / 8 % 4; ++j) x[D / 32 * 4 + j] = rest[j];
  }
  __device__ __forceinline__ void from_fragments(const u32 (&x)[D / 8]) {
#pragma unroll
    for (int k = 0; k < D / 32; ++k) {
      u32 y[4] = {x[k * 4], x[k * 4 + 1], x[k * 4 + 2], x[k * 4 + 3]};
      turn(y);
      pieces[k] = make_uint4(y[0], y[1], y[2], y[3]);
    }
#pragma unroll
    for (int j = 0; j < D / 8 % 4; ++j) rest[j] = x[D / 32 * 4 + j];
  }
};

// Rotate a row's query by the angles of its pairs, half a row apart: cosine and sine of two pairs for each e.
__device__ __forceinline__ void rotate(u32 (&query)[D / 8], const float4 (&angles)[D / 16]) {
#pragma unroll
  for (int e = 0; e < D / 16; ++e) {
    const float4 t = angles[e];
    const u32 low = query[e], high = query[e + D / 16];
    const float x0 = to_float(low & 0xffff), x1 = to_float(low >> 16), y0 = to_float(high & 0xffff), y1 = to_float(high >> 16);
    query[e] = pack(x0 * t.x - y0 * t.y, x1 * t.z - y1 * t.w);
    query[e + D / 16] = pack(y0 * t.x + x0 * t.y, y1 * t.z + x1 * t.w);
  }
}

// A softmax as it goes on: of two rows a lane, what of O and `l` is left once `s`, the scores of 8 · N tokens, are added.
template <int N>
__device__ __forceinline__ void soften(float (&s)[N][4], float (&m)[2], float (&l)[2], float (&shrink)[2], float scale) {
#pragma unroll
  for (int high = 0; high < 2; ++high) {
    float top = fmaxf(s[0][2 * high], s[0][2 * high + 1]);
#pragma unroll
    for (int n = 1; n < N; ++n) top = fmaxf(top, fmaxf(s[n][2 * high], s[n][2 * high + 1]));
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 2)) * scale;
    const float next = fmaxf(m[high], top);
    shrink[high] = power2(m[high] - next);
    m[high] = next;
    l[high] *= shrink[high];
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float p = power2(s[n][2 * high + i] * scale - next);
        s[n][2 * high + i] = p;
        l[high] += p;
      }
  }
}

__device__ __forceinline__ void shrunk(float (&o)[D / 8][4], const float (&by)[2]) {
#pragma unroll
  for (int i = 0; i < D / 8; ++i) o[i][0] *= by[0], o[i][1] *= by[0], o[i][2] *= by[1], o[i][3] *= by[1];
}

// Scores of tokens that a row does not see become -infinity; `s` are those of 8 · N tokens from `base` on.
template <int N>
__device__ __forceinline__ void hide(float (&s)[N][4], int base, int from_token, const int (&sees)[2]) {
  const int column = threadIdx.x % 4 * 2;
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int token = base + n * 8 + column + (i & 1);
      if (token >= sees[i / 2] || token < from_token) s[n][i] = __int_as_float(0xff800000);
    }
}

// Scores of 16 · TILES tokens of a stage from `at` on, which is token `base`, and their share of the values: of a warp's rows.
template <int TILES>
__device__ __forceinline__ void look(u32 stage, int at, int base, int least, int from_token, const int (&sees)[2],
                                     float scale, const u32 (&query)[D / 8], const u32 (&query_high)[D / 8],
                                     float (&o)[D / 8][4], float (&m)[2], float (&l)[2]) {
  const int lane = threadIdx.x % 32;
  float s[2 * TILES][4], shrink[2];
#pragma unroll
  for (int n = 0; n < TILES; ++n) {
    const int token = lane / 16 * 8 + lane % 8, piece = lane / 8 % 2;
#pragma unroll
    for (int i = 0; i < 4; ++i) s[2 * n][i] = s[2 * n + 1][i] = 0.f;
#pragma unroll
    for (int e = 0; e < D / 16; ++e) {
      u32 k[4];
      load4(k, piece_at(stage + (at / TILE + n) * TILE_BYTES, 0, token, piece, e));
      mma(s[2 * n], query[2 * e], query_high[2 * e], query[2 * e + 1], query_high[2 * e + 1], k[0], k[1]);
      mma(s[2 * n + 1], query[2 * e], query_high[2 * e], query[2 * e + 1], query_high[2 * e + 1], k[2], k[3]);
    }
  }
  if (base + TILES * TILE > least || base < from_token) hide(s, base, from_token, sees);
  soften(s, m, l, shrink, scale);
  shrunk(o, shrink);
#pragma unroll
  for (int n = 0; n < TILES; ++n) {
    const u32 p0 = pack(s[2 * n][0], s[2 * n][1]), p1 = pack(s[2 * n][2], s[2 * n][3]);
    const u32 p2 = pack(s[2 * n + 1][0], s[2 * n + 1][1]), p3 = pack(s[2 * n + 1][2], s[2 * n + 1][3]);
    const int token = lane / 8 % 2 * 8 + lane % 8, piece = lane / 16;
#pragma unroll
    for (int e = 0; e < D / 16; ++e) {
      u32 v[4];
      load4_transposed(v, piece_at(stage + (at / TILE + n) * TILE_BYTES, 1, token, piece, e));
      mma(o[2 * e], p0, p1, p2, p3, v[0], v[1]);
      mma(o[2 * e + 1], p0, p1, p2, p3, v[2], v[3]);
    }
  }
}

#if WARP_GROUPS
#if BF16
#define KIND "f32.bf16.bf16"
#else
#define KIND "f32.f16.f16"
#endif
#define F4(x) "+f"((x)[0]), "+f"((x)[1]), "+f"((x)[2]), "+f"((x)[3])
#define F16(x, i) F4((x)[i]), F4((x)[i + 1]), F4((x)[i + 2]), F4((x)[i + 3])

// K or V of some tokens in shared memory for a product of a warp group, its 128-byte swizzle said: those of eight tokens lie
// half a tile behind those of the eight before, the next 64 columns of V 1,024 bytes behind the first.
__device__ __forceinline__ u64 matrix(u32 at) {
  return (u64)(at >> 4 & 0x3fff) | (u64)(1024 >> 4) << 16 | (u64)(TILE_BYTES / 2 >> 4) << 32 | (u64)1 << 62;
}

__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void end_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT>
__device__ __forceinline__ void await_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}

// The compiler may not move what is done with these registers across this place, where products begin or end.
template <int N>
__device__ __forceinline__ void held(float (&x)[N][4]) {
#pragma unroll
  for (int i = 0; i < N; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) asm volatile("" : "+f"(x[i][j])::"memory");
}

#define R32 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15," \
            "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define R64 R32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47," \
                "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"

// c (+)= 64 rows of 16 numbers of `a` · 128 columns, or 64, of a matrix in shared memory; `more`: they are added. The matrix
// lies column by column, or with TURNED row by row.
template <int TURNED>
__device__ __forceinline__ void multiply(float (&c)[16][4], u32 a0, u32 a1, u32 a2, u32 a3, u64 matrix, int more) {
  asm volatile("{\n.reg .pred more;\nsetp.ne.b32 more, %69, 0;\nwgmma.mma_async.sync.aligned.m64n128k16." KIND
               " {" R64 "}, {%64,%65,%66,%67}, %68, more, 1, 1, %70;\n}"
               : F16(c, 0), F16(c, 4), F16(c, 8), F16(c, 12)
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(matrix), "r"(more), "n"(TURNED));
}

template <int TURNED>
__device__ __forceinline__ void multiply(float (&c)[8][4], u32 a0, u32 a1, u32 a2, u32 a3, u64 matrix, int more) {
  asm volatile("{\n.reg .pred more;\nsetp.ne.b32 more, %37, 0;\nwgmma.mma_async.sync.aligned.m64n64k16." KIND
               " {" R32 "}, {%32,%33,%34,%35}, %36, more, 1, 1, %38;\n}"
               : F16(c, 0), F16(c, 4)
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(matrix), "r"(more), "n"(TURNED));
}

// A stage's scores, begun.
__device__ __forceinline__ void begin_scores(float (&s)[WIDTH / 8][4], u32 stage, const u32 (&query)[D / 8],
                                             const u32 (&query_high)[D / 8]) {
  begin_products();
#pragma unroll
  for (int e = 0; e < D / 16; ++e) {
    const u32 keys = stage + e / 4 * 1024 + e % 4 * 32;
    multiply<0>(s, query[2 * e], query_high[2 * e], query[2 * e + 1], query_high[2 * e + 1], matrix(keys), e > 0);
  }
  end_products();
}

// A stage's share of the values, begun; `p` are the weights of its tokens.
__device__ __forceinline__ void begin_values(float (&o)[D / 8][4], const u32 (&p)[WIDTH / TILE][4], u32 stage) {
  held(o);
  begin_products();
#pragma unroll
  for (int n = 0; n < WIDTH / TILE; ++n)
    multiply<1>(o, p[n][0], p[n][1], p[n][2], p[n][3], matrix(stage + n * TILE_BYTES + TILE_BYTES / 4), 1);
  end_products();
}
#endif

extern "C" __global__ void __launch_bounds__(WARPS * 32 + 128, 2 / GROUPS)
paged_chunks(const half_t* __restrict__ q,      // [rows][q_stride]: query heads
             const half_t* __restrict__ cache,  // this layer's blocks; the rows' own keys and values are in it
             const int* __restrict__ tables,    // [rows of tables][table_stride]: block numbers
             const int* __restrict__ spans,     // [count][SPAN]
             const int* __restrict__ plan,      // from plan_chunks
             const float2* __restrict__ rotation,  // [positions][D / 2], by which queries are still to be rotated; or null
             half_t* __restrict__ out,          // [rows][heads · GROUP · D]
             float* __restrict__ partial,       // [parts · heads][SLOT]
             int* __restrict__ arrived,         // [parts · heads], all zero, left all zero
             int heads, int q_stride, int table_stride, float scale) {
  extern __shared__ __align__(1024) unsigned char ring[];  // stages; then what GROUPS warps hand to others
  __shared__ __align__(8) u64 barriers[3 * STAGES + 1];    // of each stage: it is there; all have read it; items are known
  __shared__ Item items[STAGES + 1];  // as many as can be under way, for each has a stage
  __shared__ int before;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = warp / 4;
  const u32 ring_at = (u32)__cvta_generic_to_shared(ring), there = (u32)__cvta_generic_to_shared(barriers);
  const u32 read = there + STAGES * 8, known = read + STAGES * 8;
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; ++i) {
      init(there + i * 8, WIDTH / TILE);
      init(read + i * 8, WARPS);
    }
    for (int i = 0; i <= STAGES; ++i) init(known + i * 8, 1);
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }
  __syncthreads();
  in_order();
  const int total = plan[0] * heads;
  int used = 0, taken = 0;  // stages so far, of all items; items

  if (warp >= WARPS) {
    REGISTERS("dec", 40);
    if (warp > WARPS) return;
    // bring tiles in
    for (int round = 0; round * (int)gridDim.x < total; ++round) {
      const int number = numbered(round, total);
      if (number < 0) continue;
      const Item item = item_of(plan, spans, number, heads);
      if (lane == 0) {
        items[taken % (STAGES + 1)] = item;
        arrive(known + taken++ % (STAGES + 1) * 8);
      }
      const int* table = tables + (u64)item.row * table_stride;
      const int first = item.tile * QT, count = min(item.rows - first, QT) * GROUP;
      for (int i = lane; i < count; i += 32) {  // the queries are read soon: let them be in the L2 cache
        const half_t* row = q + (u64)(item.first_row + first + i / GROUP) * q_stride + (item.head * GROUP + i % GROUP) * D;
        asm volatile("prefetch.global.L2 [%0];\nprefetch.global.L2 [%1];" ::"l"(row), "l"(row + D / 2));
      }
      for (int stage = item.begin; stage < item.stop; ++stage, ++used) {
        const int here = used % STAGES, token = stage * WIDTH + lane * TILE;
        const u32 ready = there + here * 8;
        const bool any = lane < WIDTH / TILE && token < item.end;
        const int block = any ? table[token / BLOCK] : 0;
        wait(read + here * 8, used / STAGES & 1 ^ 1);
        if (any)
          fetch(ring_at + here * STAGE_BYTES + lane * TILE_BYTES,
                cache + (((u64)block * heads + item.head) * (BLOCK / TILE) + token % BLOCK / TILE) * (2 * TILE * D), ready);
        else if (lane < WIDTH / TILE)
          arrive(ready);
      }
    }
    return;
  }

  REGISTERS("inc", GROUPS == 1 ? 216 : 232);  // what the other warps leave
  for (int round = 0; round * (int)gridDim.x < total; ++round) {
    const int number = numbered(round, total);
    if (number < 0) continue;
    wait(known + taken % (STAGES + 1) * 8, taken / (STAGES + 1) & 1);
    const Item item = items[taken++ % (STAGES + 1)];
    const int start = used;
    used += item.stop - item.begin;
    auto await = [&](int i) { wait(there + i % STAGES * 8, i / STAGES & 1); };
    const int rows = item.rows, end = item.end, from_token = item.from_token, parts = item.parts;
    const int first = item.tile * QT;  // the tile's first row
    const bool few = min(rows - first, QT) * GROUP <= 16;
    const int mine = few ? 0 : group * 64;  // this group's first row of the tile, heads counted
    const bool idle = !few && mine >= min(rows - first, QT) * GROUP;
    auto row = [&](int high) { return mine + (few ? 0 : warp % 4 * 16) + lane / 4 + high * 8; };  // of this lane's two
    auto token = [&](int r) { return r < QT * GROUP && first + r / GROUP < rows ? first + r / GROUP : -1; };
    u32 query[D / 8], query_high[D / 8];
    int sees[2];  // tokens that each row sees
    Row raw[2];
#pragma unroll
    for (int high = 0; high < 2; ++high) {
      const int r = row(high), one = token(r) < 0 ? rows - 1 : token(r);
      raw[high].read(q + (u64)(item.first_row + one) * q_stride + (item.head * GROUP + r % GROUP) * D);
      sees[high] = end - rows + one + 1;
    }
#pragma unroll
    for (int high = 0; high < 2; ++high) {
      u32(&into)[D / 8] = high ? query_high : query;
      float4 angles[D / 16];  // cosine and sine of two pairs
      const float4* of = (const float4*)(rotation + (u64)max(0, sees[high] - 1 - from_token) * (D / 2)) + lane % 4;
#pragma unroll
      for (int e = 0; e < D / 16; ++e) angles[e] = rotation ? of[e * 4] : make_float4(1.f, 0.f, 1.f, 0.f);
      raw[high].to_fragments(into);
      if (rotation) rotate(into, angles);
    }
    const int least = end - rows + min(first + mine / GROUP, rows - 1) + 1;  // tokens that the group's first row sees
    const int most = end - rows + min(first + (few ? QT : min(mine + 63, QT * GROUP - 1) / GROUP + 1), rows);  // its last

    float o[D / 8][4];
#pragma unroll
    for (int i = 0; i < D / 8; ++i) o[i][0] = o[i][1] = o[i][2] = o[i][3] = 0.f;
    float m[2] = {NEVER, NEVER}, l[2] = {0.f, 0.f};

    // Values beyond the sequence's end become 0, for 0 · NaN would be NaN: of a stage's tokens from `at` up to `to`.
    auto clear = [&](int i, int at, int to, int thread, int threads) {
      uint4* stage = (uint4*)(ring + i % STAGES * STAGE_BYTES);
      for (int n = thread; n < (to - at) * PIECES; n += threads)
        stage[(at + n / PIECES) / TILE * (TILE_BYTES / 16) + place(1, (at + n / PIECES) % TILE, n % PIECES)] =
            make_uint4(0, 0, 0, 0);
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    };
    auto done = [&](int i) {  // this warp has read it
      __syncwarp();
      if (lane == 0) arrive(read + i % STAGES * 8);
    };
    if (few) {
      for (int i = start; i < used; ++i) {
        await(i);
        const int at = warp * TILE, stage = (item.begin + i - start) * WIDTH, base = stage + at;
        if (base < most) {
          if (base + TILE > end) {
            clear(i, end - stage, at + TILE, lane, 32);
            __syncwarp();
          }
          const u32 tiles = ring_at + i % STAGES * STAGE_BYTES;
          look<1>(tiles, at, base, least, from_token, sees, scale, query, query_high, o, m, l);
        }
        done(i);
      }
    } else {
      const int last = idle ? start : start + min(item.stop, (most + WIDTH - 1) / WIDTH) - item.begin;  // and no more stages
      auto ready = [&](int i) {  // wait for a stage
        const int base = (item.begin + i - start) * WIDTH;
        await(i);
        if (base + WIDTH > end) {
          clear(i, end - base, WIDTH, threadIdx.x % 128, 128);
          meet_group(group);
        }
        return ring_at + i % STAGES * STAGE_BYTES;
      };
      int i = start;
#if WARP_GROUPS
      float s[WIDTH / 8][4] = {}, shrink[2];
      u32 p[WIDTH / TILE][4];
      auto soft = [&](int i) {
        const int base = (item.begin + i - start) * WIDTH;
        if (base + WIDTH > least || base < from_token) hide(s, base, from_token, sees);
        soften(s, m, l, shrink, scale);
      };
      auto packed = [&]() {
#pragma unroll
        for (int n = 0; n < WIDTH / TILE; ++n)
#pragma unroll
          for (int j = 0; j < 4; ++j) p[n][j] = pack(s[2 * n + j / 2][j % 2 * 2], s[2 * n + j / 2][j % 2 * 2 + 1]);
      };
      if (i < last) {
        u32 stage = ready(i);
        begin_scores(s, stage, query, query_high);
        await_products<0>();
        held(s);
        soft(i);
        packed();
        for (; i + 1 < last; ++i) {
          const u32 next = ready(i + 1);
          begin_scores(s, next, query, query_high);
          begin_values(o, p, stage);
          await_products<1>();
          held(s);
          soft(i + 1);
          await_products<0>();
          held(o);
          done(i);
          shrunk(o, shrink);
          packed();
          stage = next;
        }
        begin_values(o, p, stage);
        await_products<0>();
        held(o);
        done(i++);
      }
#else
      for (; i < last; ++i) {
        const u32 stage = ready(i);
        for (int at = 0; at < WIDTH; at += 64) {
          const int base = (item.begin + i - start) * WIDTH + at;
          if (base < most) look<4>(stage, at, base, least, from_token, sees, scale, query, query_high, o, m, l);
        }
        done(i);
      }
#endif
      for (; i < used; ++i) await(i), done(i);
    }

#pragma unroll
    for (int high = 0; high < 2; ++high) {
      l[high] += __shfl_xor_sync(~0u, l[high], 1);
      l[high] += __shfl_xor_sync(~0u, l[high], 2);
    }
    if (few) {  // each warp has a part of the same rows: the last GROUPS hand theirs over to those before them, and so on
      float* handed = (float*)(ring + STAGES * STAGE_BYTES) + lane;  // [warp][D / 2 + 4][lane]
      for (int last = WARPS - GROUPS; last; last = last > GROUPS ? last - GROUPS : last / 2) {
        const int count = min(GROUPS, last);
        auto of = [&](int i) -> float& { return handed[(warp % count * (D / 2 + 4) + i) * 32]; };
        if (warp >= last && warp < last + count) {
#pragma unroll
          for (int i = 0; i < D / 8; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j) of(i * 4 + j) = o[i][j];
#pragma unroll
          for (int high = 0; high < 2; ++high) of(D / 2 + high) = m[high], of(D / 2 + 2 + high) = l[high];
        }
        meet();
        if (warp >= last - count && warp < last) {
          float kept[2], other[2];
#pragma unroll
          for (int high = 0; high < 2; ++high) {
            const float theirs = of(D / 2 + high), top = fmaxf(m[high], theirs);
            kept[high] = power2(m[high] - top), other[high] = power2(theirs - top);
            m[high] = top;
            l[high] = l[high] * kept[high] + of(D / 2 + 2 + high) * other[high];
          }
#pragma unroll
          for (int i = 0; i < D / 8; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j) o[i][j] = o[i][j] * kept[j / 2] + of(i * 4 + j) * other[j / 2];
        }
        meet();
      }
    }
    if (parts > 1) {
      const int place_of_first = item.place * heads + item.head;
      auto result = [&](int p) { return partial + (u64)(place_of_first + p * heads) * SLOT + threadIdx.x; };
      float* mine = result(item.part);
#pragma unroll
      for (int i = 0; i < D / 8; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) __stcg(mine + (i * 4 + j) * WARPS * 32, o[i][j]);
#pragma unroll
      for (int high = 0; high < 2; ++high)  // four lanes of a row say the same: each keeps its own
        __stcg(mine + (D / 2 + high) * WARPS * 32, m[high]), __stcg(mine + (D / 2 + 2 + high) * WARPS * 32, l[high]);
      __threadfence();
      meet();
      if (threadIdx.x == 0) before = atomicAdd(arrived + place_of_first, 1);
      meet();
      const bool last = before == parts - 1;
      meet();  // `before` may be written again
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
    if (few && warp) continue;
#pragma unroll
    for (int high = 0; high < 2; ++high) {
      const int r = row(high), one = token(r);
      const float inverse = 1.f / l[high];
      u32 x[D / 8];
#pragma unroll
      for (int i = 0; i < D / 8; ++i) x[i] = pack(o[i][2 * high] * inverse, o[i][2 * high + 1] * inverse);
      Row row;
      row.from_fragments(x);
      if (one >= 0) row.write(out + ((u64)(item.first_row + one) * heads * GROUP + item.head * GROUP + r % GROUP) * D);
    }
  }
}
