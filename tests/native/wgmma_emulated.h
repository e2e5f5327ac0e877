// The instructions of csrc/cuda/wgmma.h on the CPU: a block's 128 threads are fibers, which take turns where they meet.
//
// What a product reads and where its results lie is written from the PTX ISA, wgmma.mma_async: "Register Fragments",
// "Shared Memory Matrix Layout" and "Matrix Descriptor Format". CUTLASS gives the same canonical layouts
// in its own words (the comments in cute/arch/mma_sm90_desc.hpp, and on make_gmma_desc in cute/atom/
// mma_traits_sm90_gmma.hpp); and for K and V in rows of 128 bytes Triton's compiler makes the same descriptors: mode 1,
// a stride of 1024 bytes, 32 on for the next 16 columns of K, 2048 for the next 16 rows of V. With T = 8 elements:
//
//   K-major     ((8, m), (T, 2k)) : ((8T, SBO), (1, T))         element (8 i + r, c) at 8T r + SBO i + c
//   MN-major    ((T, 8, m), (8, k)) : ((1, T, LBO), (8T, SBO))  element (8T i + c, 8 j + r) at c + LBO i + 8T r + SBO j
//   Swizzle<3, 4, 3>: bits 4 to 6 of the byte address are exclusive-ored with bits 7 to 9.
//   d: thread t of the warpgroup has in register i row 16 (t / 32) + t % 32 / 4 + 8 (i / 2 % 2), column 8 (i / 4) +
//   2 (t % 4) + i % 2. a, in registers, 16 columns: likewise, two elements a register, the lower one first.
//
// Nothing is done before it must be: copies happen at the wait for them, and a warp's share of a product when that warp
// waits; it reads its registers then, and its results are NaN until then. Or at once (`eager`); the same must come out.
// Errors are exceptions: a product without a fence, one whose registers change in flight or that reads bytes which were
// not published before a barrier, a copy from outside of the operands, threads that do not meet.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace emulated {

constexpr int kThreads = 128, kLanes = 32, kWarps = kThreads / kLanes;
constexpr uint32_t kSharedStart = 1024;  // as on the GPU, where the first KB is the system's

struct Range {
  const char *begin, *end;
};

struct Copy {
  uint32_t to;
  const char* from;  // null for zeros
};

// A warp's share of a product: 16 rows of it.
struct Product {
  int columns;
  bool bf16, add, shared_a;
  uint64_t a, b;
  float* d[kLanes];
  const uint32_t* registers[kLanes];
  std::vector<float> d_before;  // of all lanes
  std::vector<uint32_t> registers_before;
};

// Where some threads wait for each other.
struct Meeting {
  int arrived = 0;
  uint32_t turn = 0;
};

inline float wide(uint16_t x, bool bf16) {
  if (!bf16) {
    const uint32_t exponent = x >> 10 & 31, fraction = x & 1023;
    float size = exponent == 31 ? (fraction ? NAN : INFINITY)
                 : exponent     ? std::ldexp(1024.0f + fraction, int(exponent) - 25)
                                : std::ldexp(float(fraction), -24);
    if (x >> 15) size = -size;
    return size;
  }
  const uint32_t bits = uint32_t{x} << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint16_t narrow(float x, bool bf16) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (bf16) return std::isnan(x) ? 0x7FFF : uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
  const uint16_t sign = bits >> 16 & 0x8000;
  if (std::isnan(x)) return 0x7FFF;
  const float size = std::fabs(x);
  if (size >= 65520.0f) return sign | 0x7C00;
  if (size == 0.0f) return sign;
  int exponent;
  std::frexp(size, &exponent);
  const int unit = std::max(exponent - 11, -24);  // nearbyint rounds to even
  const auto units = uint32_t(std::nearbyint(std::ldexp(size, -unit)));
  return sign | (unit == -24 ? units : (uint32_t(unit + 24) << 10) + units);
}

struct Block {
  std::vector<char> shared;
  std::vector<uint32_t> published;  // of each 16 bytes: in which turn of the barrier, or kNot
  std::vector<Range> readable;
  uint32_t index, index_y, count;
  bool eager;

  std::unique_ptr<char[]> stacks;
  ucontext_t scheduler, fiber[kThreads];
  bool done[kThreads];
  int current;
  std::function<void()> body;
  std::string error;

  Meeting whole, warps[kWarps];
  uint32_t barriers;
  int64_t meetings;  // of any kind, so that a standstill is seen
  uint32_t slot[kThreads];
  std::deque<std::vector<Copy>> copies[kThreads];  // committed groups, and the open one last
  std::vector<uint32_t> written[kThreads];         // 16-byte pieces that are not published
  bool fenced[kThreads];
  Product next[kWarps];
  std::deque<std::vector<Product>> products[kWarps];  // groups, likewise
};

inline Block* block;
inline int64_t shares_done;  // of products, ever
constexpr uint32_t kNot = UINT32_MAX;
[[noreturn]] inline void fail(const std::string& what) {
  throw std::logic_error(what);
}

inline void yield() {
  const int me = block->current;
  swapcontext(&block->fiber[me], &block->scheduler);
  if (!block->error.empty()) throw std::logic_error(block->error);
}

// Waits for `count` threads; the last one does the work.
template <class Work>
void meet(Meeting& meeting, int count, const Work& work) {
  const uint32_t turn = meeting.turn;
  ++block->meetings;
  if (++meeting.arrived == count) {
    work();
    meeting.arrived = 0;
    ++meeting.turn;
    return;
  }
  while (meeting.turn == turn) yield();
}

template <class Work>
void meet_warp(const Work& work) {
  meet(block->warps[block->current / kLanes], kLanes, work);
}

inline uint32_t swizzled(uint32_t address) {
  return address ^ ((address >> 7 & 7) << 4);
}

struct Descriptor {
  uint32_t start, leading, stride;

  explicit Descriptor(uint64_t bits)
      : start((bits & 0x3FFF) << 4), leading((bits >> 16 & 0x3FFF) << 4), stride((bits >> 32 & 0x3FFF) << 4) {
    if (bits >> 62 != 1) fail("the descriptor's mode is not the 128-byte swizzle");
    if (bits & 0x3FF'FC000'C000'C000 & ~(uint64_t{0x3FFF} << 32 | uint64_t{0x3FFF} << 16))
      fail("bits of the descriptor that are no field, or a base offset");
  }
  uint32_t k_major(int row, int k) const { return start + row % 8 * 128 + row / 8 * stride + k * 2; }
  uint32_t mn_major(int column, int k) const {
    return start + column % 64 * 2 + column / 64 * leading + k % 8 * 128 + k / 8 * stride;
  }
};

inline float element(uint32_t address, bool bf16) {
  const uint32_t at = swizzled(address) - kSharedStart;
  if (at + 2 > block->shared.size()) fail("a product reads outside of shared memory");
  const uint32_t when = block->published[at / 16];
  if (when == kNot || when >= block->barriers) fail("a product reads what was not published before a barrier");
  uint16_t bits;
  std::memcpy(&bits, &block->shared[at], 2);
  return wide(bits, bf16);
}

inline void execute(const Product& product) {
  const int n = product.columns, per_lane = n / 2;
  const int first_row = block->current / kLanes * 16;
  std::vector<float> a(16 * 16), b(n * 16);
  for (int t = 0; t < kLanes; ++t) {
    if (std::memcmp(product.d[t], &product.d_before[t * per_lane], per_lane * 4))
      fail("the results of a product were written to in flight");
    if (product.shared_a) continue;
    if (std::memcmp(product.registers[t], &product.registers_before[t * 4], 16))
      fail("the registers of a product were written to in flight");
    for (int i = 0; i < 8; ++i) {
      const int row = t / 4 + i / 2 % 2 * 8, k = i / 4 * 8 + t % 4 * 2 + i % 2;
      a[row * 16 + k] = wide(uint16_t(product.registers[t][i / 2] >> i % 2 * 16), product.bf16);
    }
  }
  const Descriptor b_at(product.b);
  for (int k = 0; k < 16; ++k) {
    if (product.shared_a)
      for (int row = 0; row < 16; ++row)
        a[row * 16 + k] = element(Descriptor(product.a).k_major(first_row + row, k), product.bf16);
    for (int column = 0; column < n; ++column)
      b[column * 16 + k] =
          element(product.shared_a ? b_at.k_major(column, k) : b_at.mn_major(column, k), product.bf16);
  }
  for (int t = 0; t < kLanes; ++t)
    for (int i = 0; i < per_lane; ++i) {
      const int row = t / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + t % 4 * 2 + i % 2;
      float sum = product.add ? product.d[t][i] : 0.0f;
      for (int k = 0; k < 16; ++k) sum += a[row * 16 + k] * b[column * 16 + k];
      product.d[t][i] = sum;
    }
  ++shares_done;
}

inline void finish_copies(std::vector<Copy>& group) {
  for (const Copy& copy : group) {
    static const char zeros[16] = {};
    const uint32_t at = copy.to - kSharedStart;
    std::memcpy(&block->shared[at], copy.from ? copy.from : zeros, 16);
    block->written[block->current].push_back(at / 16);
  }
  group.clear();
}

// What csrc/cuda/wgmma.h has, in its words.
struct Isa {
  static uint32_t thread() { return block->current; }
  static uint32_t block_x() { return block->index; }
  static uint32_t blocks() { return block->count; }
  static uint32_t block_y() { return block->index_y; }
  static uint32_t high_word(uint32_t x, uint32_t y) { return uint64_t{x} * y >> 32; }
  static float infinity() { return std::numeric_limits<float>::infinity(); }
  static float max(float x, float y) { return std::fmax(x, y); }
  static float fma(float x, float y, float z) { return std::fma(x, y, z); }
  static float log2(float x) { return std::log2(x); }
  static float exp2_if(bool lives, float x) { return lives ? std::exp2(x) : x; }
  static float tied(float x, float, uint32_t) { return x; }

  static void barrier() {
    meet(block->whole, kThreads, [] { ++block->barriers; });
  }
  static bool barrier_or(bool x) {
    block->slot[block->current] = x;
    static uint32_t any;
    meet(block->whole, kThreads, [] {
      any = 0;
      for (const uint32_t one : block->slot) any |= one;
      ++block->barriers;
    });
    return any;
  }
  template <class Word>
  static Word exchange(Word x, int lanes) {
    const int me = block->current;
    std::memcpy(&block->slot[me], &x, 4);
    meet_warp([] {});
    Word got;
    std::memcpy(&got, &block->slot[me ^ lanes], 4);
    meet_warp([] {});
    return got;
  }
  template <bool kBf16>
  static uint32_t pack(float low, float high) {
    return narrow(low, kBf16) | uint32_t{narrow(high, kBf16)} << 16;
  }

  static void copy16(uint32_t to, const char* from, bool lives) {
    const uint32_t at = to - kSharedStart;
    if (at % 16 || at + 16 > block->shared.size()) fail("a copy to outside of shared memory");
    bool known = !lives;
    for (const Range& range : block->readable) known = known || (from >= range.begin && from + 16 <= range.end);
    if (!known || reinterpret_cast<uintptr_t>(from) % 16) fail("a copy from outside of the operands");
    block->published[at / 16] = kNot;
    block->copies[block->current].back().push_back({to, lives ? from : nullptr});
    if (block->eager) finish_copies(block->copies[block->current].back());
  }
  static void copies_commit() { block->copies[block->current].emplace_back(); }
  template <int kPending>
  static void copies_wait() {
    auto& groups = block->copies[block->current];
    while (groups.size() > kPending + 1) {
      finish_copies(groups.front());
      groups.pop_front();
    }
  }
  static void publish() {
    for (const uint32_t piece : block->written[block->current]) block->published[piece] = block->barriers;
    block->written[block->current].clear();
  }

  static void multiply(bool bf16, int columns, float* d, const uint32_t* registers, uint64_t a, uint64_t b, bool add) {
    const int warp = block->current / kLanes, lane = block->current % kLanes;
    if (!block->fenced[block->current]) fail("a product without a fence before it");
    Product& next = block->next[warp];
    if (block->warps[warp].arrived && (next.a != a || next.b != b || next.columns != columns || next.add != add))
      fail("threads do not take part in the same product");
    next.columns = columns, next.bf16 = bf16, next.add = add, next.shared_a = !registers, next.a = a, next.b = b;
    next.d[lane] = d, next.registers[lane] = registers;
    if (!add) std::fill(d, d + columns / 2, NAN);
    meet_warp([&next, warp] {
      next.d_before.clear(), next.registers_before.clear();
      for (int t = 0; t < kLanes; ++t) {
        next.d_before.insert(next.d_before.end(), next.d[t], next.d[t] + next.columns / 2);
        if (!next.shared_a)
          next.registers_before.insert(next.registers_before.end(), next.registers[t], next.registers[t] + 4);
      }
      if (block->eager)
        execute(next);
      else
        block->products[warp].back().push_back(next);
    });
  }
  template <bool kBf16, int kColumns, int kSize>
  static void scores(float (&d)[kSize], uint64_t a, uint64_t b, bool add) {
    static_assert(kSize >= kColumns / 2);
    multiply(kBf16, kColumns, d, nullptr, a, b, add);
  }
  template <bool kBf16>
  static void weigh(float (&d)[32], const uint32_t (&a)[4], uint64_t b, bool add) {
    multiply(kBf16, 64, d, a, 0, b, add);
  }
  static void products_fence() { block->fenced[block->current] = true; }
  static void products_commit() {
    block->fenced[block->current] = false;
    meet_warp([] { block->products[block->current / kLanes].emplace_back(); });
  }
  template <int kPending>
  static void products_wait() {
    meet_warp([] {
      auto& groups = block->products[block->current / kLanes];
      while (groups.size() > kPending + 1) {
        for (Product& product : groups.front()) {
          execute(product);
          // Later ones that add to the same results find them as they are now.
          for (auto& group : groups)
            for (Product& later : group)
              for (int t = 0; t < kLanes; ++t)
                if (later.d[t] == product.d[t])
                  std::copy(later.d[t], later.d[t] + later.columns / 2, &later.d_before[t * later.columns / 2]);
        }
        groups.pop_front();
      }
    });
  }
  template <int kFrom, int kTo, int kCount>
  static void hold(float (&)[kCount]) {}
};

inline void fiber_main() {
  try {
    block->body();
  } catch (const std::exception& error) {
    if (block->error.empty()) block->error = error.what();
  }
  block->done[block->current] = true;
  for (;;) swapcontext(&block->fiber[block->current], &block->scheduler);
}

// Runs body() on every thread of one block. std::logic_error says what a thread did wrong.
inline void run(Block& given, uint32_t shared_bytes) {
  constexpr size_t kStack = 128 * 1024;
  block = &given;
  given.shared.assign(shared_bytes, char(0xFF));  // NaN
  given.published.assign(shared_bytes / 16, kNot);
  given.stacks.reset(new char[kThreads * kStack]);
  given.whole = Meeting(), given.barriers = 0, given.meetings = 0;
  for (int w = 0; w < kWarps; ++w) given.warps[w] = Meeting(), given.products[w].assign(1, {});
  for (int t = 0; t < kThreads; ++t) {
    given.done[t] = given.fenced[t] = false;
    given.copies[t].assign(1, {});
    given.written[t].clear();
    getcontext(&given.fiber[t]);
    given.fiber[t].uc_stack.ss_sp = &given.stacks[t * kStack];
    given.fiber[t].uc_stack.ss_size = kStack;
    given.fiber[t].uc_link = nullptr;
    makecontext(&given.fiber[t], fiber_main, 0);
  }
  // A warp goes as far as it can before the next one begins, so that what a barrier has to prevent does happen.
  for (int left = kThreads; left;) {
    const int64_t meetings = given.meetings, before = left;
    for (int warp = 0; warp < kWarps; ++warp)
      for (int64_t then = -1; then != given.meetings;) {
        then = given.meetings;
        for (int t = warp * kLanes; t < (warp + 1) * kLanes; ++t) {
          if (given.done[t]) continue;
          given.current = t;
          swapcontext(&given.scheduler, &given.fiber[t]);
          left -= given.done[t];
        }
      }
    if (given.meetings == meetings && left == before && given.error.empty())
      given.error = "threads wait for others that do not come";
  }
  for (const auto& groups : given.products)
    if (given.error.empty() && groups.size() > 1) given.error = "products that nobody waits for";
  if (!given.error.empty()) throw std::logic_error(given.error);
}

}  // namespace emulated
