// What attention and its backward are built from: vectors of three sizes, products in tiles that fit the registers,
// 2^x, and the memory that each thread works in. For attention*.cpp only: the pragma holds for the rest of the file.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <type_traits>
#include <utility>

// The flags of all files forbid to fuse a product with a sum. Here that is half the speed, and no result is promised to
// the last bit.
#if defined(__clang__)
#pragma clang fp contract(fast)
#else
#pragma GCC optimize("fp-contract=fast")
#endif

// All inlined into run_*, each compiled for another instruction set.
#define MMFAST_LAMBDA __attribute__((always_inline))
#define MMFAST_INLINE MMFAST_LAMBDA inline

namespace mmfast {

constexpr int64_t kLanes = 48;         // a whole number of tiles in every instruction set
constexpr float kLog2e = 1.44269504f;  // exp(x) = 2^(x * log2(e))

template <int kBytes>
struct Vectors;
#define MMFAST_VECTORS(bytes)                                                       \
  template <>                                                                       \
  struct Vectors<bytes> {                                                           \
    typedef float Floats __attribute__((vector_size(bytes)));                       \
    typedef float Loose __attribute__((vector_size(bytes), aligned(4), may_alias)); \
    typedef uint32_t Words __attribute__((vector_size(bytes)));                     \
    static constexpr int64_t kWidth = bytes / 4;                                    \
  }
MMFAST_VECTORS(16);
MMFAST_VECTORS(32);
MMFAST_VECTORS(64);

// Tiles that fit the registers: kScoreRows x kScoreWide vectors of scores, kOutRows x kOutWide vectors of what scores
// are multiplied into. Rows, and the lanes of kScoreWide vectors, divide kLanes.
template <int kBytes>
struct Registers16 : Vectors<kBytes> {
  static constexpr int kScoreRows = 4, kScoreWide = 3, kOutRows = 4, kOutWide = 3;
};
template <int kBytes>
struct Registers32 : Vectors<kBytes> {
  static constexpr int kScoreRows = 8, kScoreWide = 3, kOutRows = 6, kOutWide = 4;
};

template <class M>
MMFAST_INLINE void load(typename M::Floats& to, const float* from) {
  to = *reinterpret_cast<const typename M::Loose*>(from);
}

template <class M>
MMFAST_INLINE void store(float* to, const typename M::Floats& from) {
  *reinterpret_cast<typename M::Loose*>(to) = from;
}

// call(n), n a constant: the least of count and kMost.
template <int kMost, class Call>
MMFAST_INLINE void with_constant(int64_t count, const Call& call) {
  if constexpr (kMost > 1) {
    if (count < kMost) return with_constant<kMost - 1>(count, call);
  }
  call(std::integral_constant<int, kMost>{});
}

// sum[r][c] += sum over s of a[r*a_row + s*a_step] * vector c of b[s*b_step]
template <class M, int kRows, int kWide>
MMFAST_INLINE void multiply(typename M::Floats (&sum)[kRows][kWide], const float* a, int64_t a_row, int64_t a_step,
                            const float* b, int64_t b_step, int64_t steps) {
  for (int64_t s = 0; s < steps; ++s, a += a_step, b += b_step) {
    typename M::Floats right[kWide];
#pragma GCC unroll 8
    for (int c = 0; c < kWide; ++c) load<M>(right[c], b + c * M::kWidth);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const float left = a[r * a_row];
#pragma GCC unroll 8
      for (int c = 0; c < kWide; ++c) sum[r][c] += left * right[c];
    }
  }
}

inline int64_t round_up(int64_t x, int64_t step) {
  return (x + step - 1) / step * step;
}

// Rows of a tensor may lie far apart: this calls for one some time before it is read.
MMFAST_INLINE void call_row(const float* from, int64_t stride, int64_t row, int64_t rows, int64_t d) {
  constexpr int64_t kAhead = 12;
  const float* const at = from + std::min(row + kAhead, rows - 1) * stride;
  for (int64_t e = 0; e < d; e += 16) __builtin_prefetch(at + e);
}

// to[e*kTo + i] = from[i*stride + e] for rows i and d columns e; the last row again in the lanes up to the next kLanes.
template <int64_t kTo>
MMFAST_INLINE void transpose(const float* from, int64_t stride, int64_t rows, int64_t d, float* to) {
  using M = Vectors<16>;
  for (int64_t i = 0; i < round_up(rows, kLanes); i += 4) {
    const float* row[4];
    for (int64_t r = 0; r < 4; ++r) {
      const int64_t here = std::min(i + r, rows - 1);
      call_row(from, stride, here, rows, d);
      row[r] = from + here * stride;
    }
    for (int64_t e = 0; e < d; e += 4) {
      M::Floats x[4];
      for (int r = 0; r < 4; ++r) load<M>(x[r], row[r] + e);
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) store<M>(to + (e + c) * kTo + i, M::Floats{x[0][c], x[1][c], x[2][c], x[3][c]});
    }
  }
}

// x = 2^x for x <= 127, by 2^round(x) and a polynomial of the rest (off by 2e-9 at most). 0 below -126.5; NaN for NaN.
template <class M>
MMFAST_INLINE void exp2_of(typename M::Floats& x) {
  using Floats = typename M::Floats;
  using Words = typename M::Words;
  constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: the last bits of a sum with it are the nearest integer
  x = x < -127.0f ? Floats{} - 127.0f : x;
  const Floats shifted = x + kRounder, rest = x - (shifted - kRounder);
  Floats power = rest * 0x1.41fbbcp-13f + 0x1.5f3e54p-10f;
  power = power * rest + 0x1.3b2d4cp-7f;
  power = power * rest + 0x1.c6aee8p-5f;
  power = power * rest + 0x1.ebfbdcp-3f;
  power = power * rest + 0x1.62e430p-1f;
  power = power * rest + 1.0f;
  x = power * (Floats)(((Words)shifted << 23) + (127u << 23));
}

// The bytes of the vector registers to use: `widest` at most, and what the processor has.
inline int register_bytes(int widest) {
#if defined(__x86_64__)
  if (widest >= 64 && __builtin_cpu_supports("avx512f")) return 64;
  if (widest >= 32 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 32;
#else
  static_cast<void>(widest);
#endif
  return 16;
}

// Memory for each thread of a team: parts of the given sizes, each on cache lines of its own.
template <int kParts>
class Desks {
 public:
  Desks(const int64_t (&sizes)[kParts], int64_t team) {
    for (int p = 0; p < kParts; ++p) lines_ += lines_of_[p] = (sizes[p] + kFloatsALine - 1) / kFloatsALine;
    memory_.reset(new Line[lines_ * team]);
  }
  // For each thread to call once.
  void take(float* (&parts)[kParts]) {
    Line* free = memory_.get() + taken_.fetch_add(1) * lines_;
    for (int p = 0; p < kParts; ++p) parts[p] = std::exchange(free, free + lines_of_[p])->at;
  }

 private:
  static constexpr int64_t kFloatsALine = 16;
  struct alignas(64) Line {
    float at[kFloatsALine];
  };
  int64_t lines_of_[kParts], lines_ = 0;
  std::unique_ptr<Line[]> memory_;
  std::atomic<int64_t> taken_{0};
};

}  // namespace mmfast
