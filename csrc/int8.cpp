#include "int8.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

#include "attention_tiles.h"
#include "team.h"

namespace mmfast {
namespace {

constexpr float kLevels = 127.0f;    // of one sign: -128 is not used
constexpr float kSmallest = 1e-30f;  // kLevels / x is finite for x above
constexpr int32_t kInfinity = 0x7f800000, kNoSign = 0x7fffffff;

template <int kBytes>
struct Lanes : Vectors<kBytes> {
  typedef int32_t Ints __attribute__((vector_size(kBytes)));
};

template <class M>
MMFAST_INLINE float sum_of(const typename M::Floats& x) {
  float sum = 0.0f;
  for (int64_t i = 0; i < M::kWidth; ++i) sum += x[i];
  return sum;
}

template <class M>
MMFAST_INLINE void read_row(const Int8Pass& pass, int64_t row, float* x) {
  const int64_t at = row * pass.width;
  for (int64_t c = 0; c < pass.width; c += M::kWidth) {
    typename M::Floats value, scale, other;
    if (pass.product) {
      typename M::Ints sums;
      std::memcpy(&sums, pass.product + at + c, sizeof(sums));
      value = __builtin_convertvector(sums, typename M::Floats);
      load<M>(scale, pass.column_scale + c);
      value *= scale * pass.row_scale[row];
      if (pass.bias) {
        load<M>(other, pass.bias + c);
        value += other;
      }
    } else {
      load<M>(value, pass.values + at + c);
    }
    if (pass.residual) {
      load<M>(other, pass.residual + at + c);
      value += other;
    }
    if (pass.total) store<M>(pass.total + at + c, value);
    store<M>(x + c, value);
  }
}

// The normal distribution's lower tail Phi(-a), a in 0..5.5, by a polynomial for its log2: gelu(x) is then within
// 3e-7 of the exact. Behind 5.5 the tail stays at 2e-8.
template <class M>
MMFAST_INLINE void tail_of(typename M::Floats& a) {
  a = a > 5.5f ? typename M::Floats{} + 5.5f : a;
  typename M::Floats power = a * -0x1.9f43cep-21f + 0x1.715bbep-15f;
  power = power * a - 0x1.addbe0p-11f;
  power = power * a + 0x1.0be652p-7f;
  power = power * a - 0x1.b6073ep-5f;
  power = power * a - 0x1.d5cda2p-2f;
  power = power * a - 0x1.26b340p+0f;
  a = power * a - 0x1.ffffc6p-1f;
  exp2_of<M>(a);
}

template <class M>
MMFAST_INLINE void gelu_erf(float* x, int64_t width) {
  using Floats = typename M::Floats;
  for (int64_t c = 0; c < width; c += M::kWidth) {
    Floats value, tail;
    load<M>(value, x + c);
    tail = (Floats)((typename M::Words)value & uint32_t{kNoSign});
    tail_of<M>(tail);
    tail *= value;
    store<M>(x + c, value > 0.0f ? value - tail : tail);
  }
}

// x sigmoid(1.702 x)
template <class M>
MMFAST_INLINE void gelu_quick(float* x, int64_t width) {
  using Floats = typename M::Floats;
  for (int64_t c = 0; c < width; c += M::kWidth) {
    Floats value, power;
    load<M>(value, x + c);
    power = value * (-1.702f * kLog2e);
    power = power > 127.0f ? Floats{} + 127.0f : power;
    exp2_of<M>(power);
    store<M>(x + c, value / (1.0f + power));
  }
}

template <class M>
MMFAST_INLINE void norm_row(const Int8Pass& pass, float* x) {
  using Floats = typename M::Floats;
  const float width = static_cast<float>(pass.width);
  Floats sum{}, squares{}, value, weight, bias;
  for (int64_t c = 0; c < pass.width; c += M::kWidth) {
    load<M>(value, x + c);
    sum += value;
  }
  const float mean = sum_of<M>(sum) / width;
  for (int64_t c = 0; c < pass.width; c += M::kWidth) {
    load<M>(value, x + c);
    value -= mean;
    squares += value * value;
    store<M>(x + c, value);
  }
  const float factor = 1.0f / std::sqrt(sum_of<M>(squares) / width + pass.eps);
  for (int64_t c = 0; c < pass.width; c += M::kWidth) {
    load<M>(value, x + c);
    load<M>(weight, pass.norm_weight + c);
    load<M>(bias, pass.norm_bias + c);
    store<M>(x + c, value * factor * weight + bias);
  }
}

template <class M>
MMFAST_INLINE void round_row(const Int8Pass& pass, int64_t row, const float* x) {
  using Floats = typename M::Floats;
  using Ints = typename M::Ints;
  constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: the last bits of a sum with it are the nearest integer
  Floats value;
  // As integers, NaN is larger than infinity, and infinity than any number.
  Ints top{};
  for (int64_t c = 0; c < pass.width; c += M::kWidth) {
    load<M>(value, x + c);
    const Ints size = (Ints)value & kNoSign;
    top = size > top ? size : top;
  }
  int32_t bits = 0;
  for (int64_t i = 0; i < M::kWidth; ++i) bits = std::max(bits, static_cast<int32_t>(top[i]));
  float most;
  std::memcpy(&most, &bits, sizeof(most));
  const bool finite = bits < kInfinity, some = finite && most >= kSmallest;
  pass.out_scale[row] = !finite ? std::numeric_limits<float>::quiet_NaN() : some ? most / kLevels : 0.0f;
  int8_t* to = pass.out + row * pass.width;
  if (!some) {
    std::memset(to, 0, pass.width);
    return;
  }
  const float factor = kLevels / most;
  const int64_t width = pass.width;
#pragma GCC ivdep
  for (int64_t c = 0; c < width; ++c) {  // the compiler narrows vectors better itself
    const float shifted = x[c] * factor + kRounder;
    int32_t last_bits;
    std::memcpy(&last_bits, &shifted, sizeof(last_bits));
    to[c] = static_cast<int8_t>(last_bits);
  }
}

template <class M>
MMFAST_INLINE void run_rows(const Int8Pass& pass, int64_t first, int64_t last, float* x) {
  for (int64_t row = first; row < last; ++row) {
    read_row<M>(pass, row, x);
    if (pass.gelu == Gelu::erf) gelu_erf<M>(x, pass.width);
    if (pass.gelu == Gelu::quick) gelu_quick<M>(x, pass.width);
    if (pass.norm_weight) norm_row<M>(pass, x);
    if (pass.out) round_row<M>(pass, row, x);
  }
}

using Run = void (*)(const Int8Pass&, int64_t, int64_t, float*);

void run_16(const Int8Pass& pass, int64_t first, int64_t last, float* x) {
  run_rows<Lanes<16>>(pass, first, last, x);
}
#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) void run_32(const Int8Pass& pass, int64_t first, int64_t last, float* x) {
  run_rows<Lanes<32>>(pass, first, last, x);
}
__attribute__((target("avx512f,fma"))) void run_64(const Int8Pass& pass, int64_t first, int64_t last, float* x) {
  run_rows<Lanes<64>>(pass, first, last, x);
}
#endif

Run run_for(int widest) {
  switch (register_bytes(widest)) {
#if defined(__x86_64__)
    case 64:
      return run_64;
    case 32:
      return run_32;
#endif
    default:
      return run_16;
  }
}

}  // namespace

void int8_pass(const Int8Pass& pass, int threads, int widest) {
  constexpr int64_t kElementsAThread = 1 << 15, kRows = 8;
  if (pass.width < 1 || pass.width % kInt8Columns != 0) {
    throw std::invalid_argument("width must be a multiple of " + std::to_string(kInt8Columns) + ", got " +
                                std::to_string(pass.width));
  }
  const int64_t items = (pass.rows + kRows - 1) / kRows;
  if (items == 0) return;
  const int64_t useful = std::min(pass.rows * pass.width / kElementsAThread, items);
  const int64_t team = std::clamp<int64_t>(useful, 1, std::max(threads, 1));
  const int64_t sizes[] = {pass.width};
  Desks<1> desks(sizes, team);
  const Run run = run_for(widest);
  std::atomic<int64_t> next{0};
  on_team(static_cast<int>(team), [&] {
    float* x[1];
    desks.take(x);
    for (int64_t item; (item = next.fetch_add(1)) < items;) {
      run(pass, item * kRows, std::min((item + 1) * kRows, pass.rows), x[0]);
    }
  });
}

}  // namespace mmfast
