// Hopper's instructions that attention_wgmma_block.h is written in: asynchronous copies, products of a warpgroup.
#pragma once

#include <cstdint>

namespace mmfast {

// The registers of a product's result, %0 and on, by tens; and the operands that they are.
#define MMFAST_FIVE(t) "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4"
#define MMFAST_TEN(t) MMFAST_FIVE(t) ", %" #t "5, %" #t "6, %" #t "7, %" #t "8, %" #t "9"
#define MMFAST_F2(i) "+f"(d[i]), "+f"(d[(i) + 1])
#define MMFAST_F4(i) MMFAST_F2(i), MMFAST_F2((i) + 2)
#define MMFAST_F8(i) MMFAST_F4(i), MMFAST_F4((i) + 4)
#define MMFAST_F16(i) MMFAST_F8(i), MMFAST_F8((i) + 8)
#define MMFAST_F32(i) MMFAST_F16(i), MMFAST_F16((i) + 16)
#define MMFAST_R40 MMFAST_TEN() ", " MMFAST_TEN(1) ", " MMFAST_TEN(2) ", " MMFAST_TEN(3)
#define MMFAST_R60 MMFAST_R40 ", " MMFAST_TEN(4) ", " MMFAST_TEN(5)
#define MMFAST_R80 MMFAST_R60 ", " MMFAST_TEN(6) ", " MMFAST_TEN(7)

#define MMFAST_WGMMA(SHAPE, TYPE, REGISTERS, A, B, ADD, TRANSPOSED) \
  "{.reg .pred p; setp.ne.b32 p, " ADD ", 0; wgmma.mma_async.sync.aligned." SHAPE ".f32." TYPE "." TYPE " {" REGISTERS \
  "}, " A ", " B ", p, 1, 1, " TRANSPOSED ";}"

template <int kColumns>
struct ScoresOf;

#define MMFAST_SCORES(COLUMNS, REGISTERS, A, B, ADD, ...)                                                           \
  template <>                                                                                                       \
  struct ScoresOf<COLUMNS> {                                                                                        \
    template <bool kBf16>                                                                                           \
    static __device__ __forceinline__ void run(float* d, uint64_t a, uint64_t b, int add) {                         \
      if constexpr (kBf16)                                                                                          \
        asm volatile(MMFAST_WGMMA("m64n" #COLUMNS "k16", "bf16", REGISTERS, A, B, ADD, "0, 0")                      \
                     : __VA_ARGS__                                                                                  \
                     : "l"(a), "l"(b), "r"(add));                                                                   \
      else                                                                                                          \
        asm volatile(MMFAST_WGMMA("m64n" #COLUMNS "k16", "f16", REGISTERS, A, B, ADD, "0, 0")                       \
                     : __VA_ARGS__                                                                                  \
                     : "l"(a), "l"(b), "r"(add));                                                                   \
    }                                                                                                               \
  };

MMFAST_SCORES(80, MMFAST_R40, "%40", "%41", "%42", MMFAST_F32(0), MMFAST_F8(32))
MMFAST_SCORES(128, MMFAST_R60 ", %60, %61, %62, %63", "%64", "%65", "%66", MMFAST_F32(0), MMFAST_F32(32))
MMFAST_SCORES(136, MMFAST_R60 ", %60, %61, %62, %63, %64, %65, %66, %67", "%68", "%69", "%70", MMFAST_F32(0),
              MMFAST_F32(32), MMFAST_F4(64))
MMFAST_SCORES(160, MMFAST_R80, "%80", "%81", "%82", MMFAST_F32(0), MMFAST_F32(32), MMFAST_F16(64))
MMFAST_SCORES(192, MMFAST_R80 ", " MMFAST_TEN(8) ", %90, %91, %92, %93, %94, %95", "%96", "%97", "%98", MMFAST_F32(0),
              MMFAST_F32(32), MMFAST_F32(64))
MMFAST_SCORES(200, MMFAST_R80 ", " MMFAST_TEN(8) ", " MMFAST_TEN(9), "%100", "%101", "%102", MMFAST_F32(0),
              MMFAST_F32(32), MMFAST_F32(64), MMFAST_F4(96))
MMFAST_SCORES(208, MMFAST_R80 ", " MMFAST_TEN(8) ", " MMFAST_TEN(9) ", %100, %101, %102, %103", "%104", "%105", "%106",
              MMFAST_F32(0), MMFAST_F32(32), MMFAST_F32(64), MMFAST_F8(96))

struct Hopper {
  // Volatile, so that it is rather read again than kept in a register.
  static __device__ __forceinline__ uint32_t thread() {
    uint32_t id;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(id));
    return id;
  }
  static __device__ __forceinline__ uint32_t block_x() { return blockIdx.x; }
  static __device__ __forceinline__ uint32_t block_y() { return blockIdx.y; }
  static __device__ __forceinline__ uint32_t high_word(uint32_t x, uint32_t y) { return __umulhi(x, y); }
  static __device__ __forceinline__ uint32_t blocks() { return gridDim.x; }
  static __device__ __forceinline__ void barrier() { __syncthreads(); }
  static __device__ __forceinline__ bool barrier_or(bool x) { return __syncthreads_or(x); }
  static __device__ __forceinline__ float infinity() { return __int_as_float(0x7F800000); }
  static __device__ __forceinline__ float max(float x, float y) { return fmaxf(x, y); }
  static __device__ __forceinline__ float fma(float x, float y, float z) { return fmaf(x, y, z); }
  static __device__ __forceinline__ float log2(float x) { return log2f(x); }
  // 2^x, or x unless `lives`. Below 2^-126 it gives 0, which is what such a weight becomes in 16 bits.
  static __device__ __forceinline__ float exp2_if(bool lives, float x) {
    asm("{.reg .pred p; setp.ne.b32 p, %1, 0; @p ex2.approx.ftz.f32 %0, %0;}" : "+f"(x) : "r"(int{lives}));
    return x;
  }
  template <class Word>
  static __device__ __forceinline__ Word exchange(Word x, int lanes) {
    return __shfl_xor_sync(0xFFFFFFFF, x, lanes);
  }
  template <bool kBf16>
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    uint32_t word;
    if constexpr (kBf16)
      asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    else
      asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
  }

  // 16 bytes into shared memory; zeros unless `lives`.
  static __device__ __forceinline__ void copy16(uint32_t to, const char* from, bool lives) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(lives ? 16 : 0) : "memory");
  }
  static __device__ __forceinline__ void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
  template <int kPending>
  static __device__ __forceinline__ void copies_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
  }
  // What this thread has written becomes visible to products after the next barrier.
  static __device__ __forceinline__ void publish() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

  // d [64, kColumns] (+)= A B^T, both of them in shared memory and 16 deep.
  template <bool kBf16, int kColumns, int kSize>
  static __device__ __forceinline__ void scores(float (&d)[kSize], uint64_t a, uint64_t b, bool add) {
    ScoresOf<kColumns>::template run<kBf16>(d, a, b, add);
  }
  // d [64, 64] (+)= A B, A 16 deep in registers, B in shared memory.
  template <bool kBf16>
  static __device__ __forceinline__ void weigh(float (&d)[32], const uint32_t (&a)[4], uint64_t b, bool add) {
#define MMFAST_WEIGH(TYPE)                                                                                     \
  asm volatile(MMFAST_WGMMA("m64n64k16", TYPE, MMFAST_TEN() ", " MMFAST_TEN(1) ", " MMFAST_TEN(2) ", %30, %31", \
                            "{%32, %33, %34, %35}", "%36", "%37", "1")                                         \
               : MMFAST_F32(0)                                                                                 \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int{add}))
    if constexpr (kBf16)
      MMFAST_WEIGH("bf16");
    else
      MMFAST_WEIGH("f16");
#undef MMFAST_WEIGH
  }
  static __device__ __forceinline__ void products_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
  static __device__ __forceinline__ void products_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  }
  template <int kPending>
  static __device__ __forceinline__ void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
  }
  // x, which the compiler cannot have before `other`.
  static __device__ __forceinline__ float tied(float x, float other, uint32_t zero) {
    return __uint_as_float(__float_as_uint(x) | (__float_as_uint(other) & zero));
  }
  // After a wait: keeps the compiler from reading the results before it.
  template <int kFrom, int kTo, int kCount>
  static __device__ __forceinline__ void hold(float (&x)[kCount]) {
#pragma unroll
    for (int i = kFrom; i < kTo; ++i) asm volatile("" : "+f"(x[i])::"memory");
  }
};

}  // namespace mmfast
