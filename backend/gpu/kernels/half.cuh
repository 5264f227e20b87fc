// Halves (the bits of a bfloat16 or float16, as BF16 says) and, where D is given, where a tile of the KV cache keeps them.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short half_t;

// Kernels are launched before the one ahead of them in the stream has ended (programmatic dependent launch): each of their
// threads calls this before it reads or writes anything that another kernel writes or reads.
__device__ __forceinline__ void in_order() {
  asm volatile("griddepcontrol.wait;\ngriddepcontrol.launch_dependents;" ::: "memory");
}

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

// Four floats as e4m3 (8-bit floats up to 448), the first in the lowest byte.
__device__ __forceinline__ u32 pack_e4m3(float a, float b, float c, float d) {
  unsigned short low, high;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(low) : "f"(b), "f"(a));
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(high) : "f"(d), "f"(c));
  return (u32)low | (u32)high << 16;
}

#ifdef D
// A tile holds K and V of TILE tokens in 16-byte pieces. They lie as the tensor cores of Hopper read many tiles at once
// without meeting a bank twice: K, then V of eight tokens, of each the first 128 bytes of all eight, then the next, and
// a token's pieces permuted (the "128-byte swizzle" of the PTX manual). Where a row is no multiple of 128 bytes, K of all
// tokens lies before V, token by token, permuted for ldmatrix.
#define TILE 16
#define PIECES (D / 8)
#define SWIZZLED (D % 64 == 0)
#define SHIFT (D == 80 ? 2 : 1)
#define MASK (D == 80 ? 1 : 3)
#define BEHIND (SWIZZLED ? D : TILE * PIECES)  // so many pieces behind a token's K is its V

// Where in a tile a piece of a token's K (`of` 0) or V (1) is, in pieces.
__device__ __forceinline__ int place(int of, int token, int piece) {
#if SWIZZLED
  return ((token / 8 * 2 + of) * (D / 64) + piece / 8) * 64 + token % 8 * 8 + ((piece ^ token) & 7);
#else
  return (of * TILE + token) * PIECES + (piece ^ ((token >> SHIFT) & MASK));
#endif
}
#endif
