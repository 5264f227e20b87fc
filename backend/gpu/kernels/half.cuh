// Halves (the bits of a bfloat16 or float16, as BF16 says) and, where D is given, where a tile of the KV cache keeps them.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short half_t;

__device__ __forceinline__ float to_float(u32 bits) {
#if BF16
  return __uint_as_float(bits << 16);
#else
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"((half_t)bits));
  return f;
#endif
}

__device__ __forceinline__ u32 pack(float low, float high) {
  u32 r;
#if BF16
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
#else
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
#endif
  return r;
}

__device__ __forceinline__ half_t to_half(float x) { return (half_t)(pack(x, 0.f) & 0xffff); }

// c += a · b, tensor cores: a [16][16] row by row, b [16][8] column by column, as PTX lays fragments out.
__device__ __forceinline__ void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if BF16
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
#else
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
#endif
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Ask for this thread block's share of `bytes` at `next`, the weights that the next product reads: they are on their way to
// the L2 cache while this kernel, which leaves the memory idle, runs. By one warp; sizes and places are multiples of 16.
__device__ __forceinline__ void ask_for(const void* next, u32 bytes) {
  const u32 piece = 8192, pieces = (bytes + piece - 1) / piece;
  for (u32 i = blockIdx.x * 32 + threadIdx.x % 32; i < pieces; i += gridDim.x * 32) {
    const u32 at = i * piece, size = min(piece, bytes - at);
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"((const char*)next + at), "r"(size) : "memory");
  }
}

#ifdef D
// A tile is [K, V][TILE tokens][D]; the 16-byte pieces of a token's row are permuted so that ldmatrix meets no bank twice.
#define TILE 16
#define PIECES (D / 8)
#define SHIFT (D == 80 ? 2 : D == 96 ? 1 : 0)
#define MASK (D == 80 ? 1 : D == 96 ? 3 : 7)

__device__ __forceinline__ int place(int token, int piece) { return piece ^ ((token >> SHIFT) & MASK); }
#endif
