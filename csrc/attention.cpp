#include "attention.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "team.h"

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
namespace {

constexpr int64_t kLanes = 48;   // queries of a block: each has a lane of a vector
constexpr int64_t kKeys = 512;   // keys of a block: their scores stay in the L2 cache
constexpr int64_t kSlice = 96;   // keys whose values stay in the L1 cache
constexpr int64_t kMaxRows = 8;  // keys of a tile, at most
constexpr float kNone = -std::numeric_limits<float>::infinity();

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

// Tiles that fit the registers: kKeyRows x kScoreWide vectors of scores, kQueryRows x kOutWide vectors of output.
template <int kBytes>
struct Registers16 : Vectors<kBytes> {
  static constexpr int kKeyRows = 4, kScoreWide = 3, kQueryRows = 4, kOutWide = 3;
};
template <int kBytes>
struct Registers32 : Vectors<kBytes> {
  static constexpr int kKeyRows = 8, kScoreWide = 3, kQueryRows = 6, kOutWide = 4;
};

// What one thread works in.
struct Desk {
  float* keys;     // [keys of a block + kMaxRows, d]
  float* values;   // [keys of a block, d]
  float* queries;  // [d, kLanes]
  float* scores;   // [keys of a block + kMaxRows, kLanes], then their exponentials
  float* sums;     // [kLanes, d] exponentials times values
  float* top;      // [queries of a chunk] the largest score so far
  float* weight;   // [queries of a chunk] the exponentials' sum so far
};

// Some queries of one sequence and head.
struct Chunk {
  const float *q, *k, *v;
  float* out;
  int64_t rows, keys;
  int64_t shift;  // row i sees the keys up to i + shift where attention is causal
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

template <class M, int kWide>
MMFAST_INLINE void score_tile(const float* keys, const float* queries, int64_t d, float* scores) {
  typename M::Floats sum[M::kKeyRows][kWide] = {};
  multiply<M, M::kKeyRows, kWide>(sum, keys, d, 1, queries, kLanes, d);
#pragma GCC unroll 8
  for (int r = 0; r < M::kKeyRows; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < kWide; ++c) store<M>(scores + r * kLanes + c * M::kWidth, sum[r][c]);
  }
}

template <class M, int kWide>
MMFAST_INLINE void output_tile(const float* scores, const float* values, int64_t keys, int64_t d, float* sums) {
  typename M::Floats sum[M::kQueryRows][kWide];
#pragma GCC unroll 8
  for (int r = 0; r < M::kQueryRows; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < kWide; ++c) load<M>(sum[r][c], sums + r * d + c * M::kWidth);
  }
  multiply<M, M::kQueryRows, kWide>(sum, scores, 1, kLanes, values, d, keys);
#pragma GCC unroll 8
  for (int r = 0; r < M::kQueryRows; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < kWide; ++c) store<M>(sums + r * d + c * M::kWidth, sum[r][c]);
  }
}

template <class M>
MMFAST_INLINE void all_scores(const Desk& at, int64_t d, int64_t keys, int64_t vectors) {
  for (int64_t c = 0; c < vectors; c += M::kScoreWide) {
    with_constant<M::kScoreWide>(vectors - c, [&](auto wide) MMFAST_LAMBDA {
      for (int64_t j = 0; j < keys; j += M::kKeyRows) {
        score_tile<M, wide>(at.keys + j * d, at.queries + c * M::kWidth, d, at.scores + j * kLanes + c * M::kWidth);
      }
    });
  }
}

// The last tile may take lanes behind the last row, whatever they hold: nobody reads what becomes of them.
template <class M>
MMFAST_INLINE void all_outputs(const Desk& at, int64_t d, int64_t keys, int64_t rows) {
  for (int64_t j = 0; j < keys; j += kSlice) {
    for (int64_t c = 0; c < d; c += M::kOutWide * M::kWidth) {
      with_constant<M::kOutWide>((d - c) / M::kWidth, [&](auto wide) MMFAST_LAMBDA {
        for (int64_t i = 0; i < rows; i += M::kQueryRows) {
          output_tile<M, wide>(at.scores + j * kLanes + i, at.values + j * d + c, std::min(keys - j, kSlice), d,
                               at.sums + i * d + c);
        }
      });
    }
  }
}

// x = 2^x for x <= 0, by 2^round(x) and a polynomial of the rest (off by 2e-9 at most). 0 below -126.5; NaN for NaN.
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

// Scores of kWide vectors of lanes become exponentials below the largest so far, which may rise: decay is what earlier
// exponentials have to be multiplied by.
template <class M, int kWide>
MMFAST_INLINE void softmax(float* scores, int64_t keys, float factor, float* top, float* weight, float* decay) {
  using Floats = typename M::Floats;
  Floats old[kWide], most[kWide], sum[kWide], x;
  for (int c = 0; c < kWide; ++c) {
    load<M>(old[c], top + c * M::kWidth);
    most[c] = old[c];
  }
  for (int64_t j = 0; j < keys; ++j) {
#pragma GCC unroll 8
    for (int c = 0; c < kWide; ++c) {
      load<M>(x, scores + j * kLanes + c * M::kWidth);
      most[c] = most[c] < x ? x : most[c];
    }
  }
  for (int c = 0; c < kWide; ++c) {
    store<M>(top + c * M::kWidth, most[c]);
    most[c] = most[c] == kNone ? Floats{} : most[c];  // no key seen yet: -inf less this must not be NaN
    x = (old[c] - most[c]) * factor;
    exp2_of<M>(x);
    store<M>(decay + c * M::kWidth, x);
    load<M>(sum[c], weight + c * M::kWidth);
    sum[c] *= x;
  }
  for (int64_t j = 0; j < keys; ++j) {
#pragma GCC unroll 8
    for (int c = 0; c < kWide; ++c) {
      float* const here = scores + j * kLanes + c * M::kWidth;
      load<M>(x, here);
      x = (x - most[c]) * factor;
      exp2_of<M>(x);
      sum[c] += x;
      store<M>(here, x);
    }
  }
  for (int c = 0; c < kWide; ++c) store<M>(weight + c * M::kWidth, sum[c]);
}

// Keys and values of a block side by side: in the tensors their rows may be a multiple of the cache's sets apart.
MMFAST_INLINE void pack_keys(const Attention& job, const Chunk& chunk, int64_t first, int64_t count, const Desk& at) {
  constexpr int64_t kAhead = 12;
  const int64_t d = job.d;
  for (int64_t j = 0; j < count; ++j) {
    const int64_t soon = first + std::min(j + kAhead, count - 1);
    for (int64_t e = 0; e < d; e += 16) {
      __builtin_prefetch(chunk.k + soon * job.k.token_stride + e);
      __builtin_prefetch(chunk.v + soon * job.v.token_stride + e);
    }
    std::memcpy(at.keys + j * d, chunk.k + (first + j) * job.k.token_stride, d * sizeof(float));
    std::memcpy(at.values + j * d, chunk.v + (first + j) * job.v.token_stride, d * sizeof(float));
  }
  std::fill_n(at.keys + count * d, kMaxRows * d, 0.0f);
}

MMFAST_INLINE void pack_queries(const float* q, int64_t stride, int64_t d, int64_t rows, float* to) {
  for (int64_t i = 0; i < kLanes; ++i) {
    for (int64_t e = 0; e < d; ++e) to[e * kLanes + i] = i < rows ? q[i * stride + e] : 0.0f;
  }
}

template <class M>
MMFAST_INLINE void run_chunk(const Attention& job, const Chunk& chunk, const Desk& at) {
  const int64_t d = job.d, out_stride = job.heads * d;
  const float factor = job.scale * 1.44269504f;  // log2(e): exp(x) = 2^(x * log2(e))
  alignas(64) float decay[kLanes];
  const int64_t padded_rows = (chunk.rows + kLanes - 1) / kLanes * kLanes;
  std::fill_n(at.top, padded_rows, kNone);
  std::fill_n(at.weight, padded_rows, 0.0f);
  for (int64_t first = 0; first == 0 || first < chunk.keys; first += kKeys) {
    const int64_t keys = std::min(chunk.keys - first, kKeys);
    const bool last = first + kKeys >= chunk.keys;
    pack_keys(job, chunk, first, keys, at);
    for (int64_t i0 = 0; i0 < chunk.rows; i0 += kLanes) {
      const int64_t rows = std::min(chunk.rows - i0, kLanes), vectors = (rows + M::kWidth - 1) / M::kWidth;
      const int64_t level = i0 + chunk.shift - first;  // the last key that the block's first row sees
      const int64_t seen = job.causal ? std::clamp<int64_t>(level + rows, 0, keys) : keys;
      pack_queries(chunk.q + i0 * job.q.token_stride, job.q.token_stride, d, rows, at.queries);
      all_scores<M>(at, d, seen, vectors);
      for (int64_t j = job.causal ? std::max<int64_t>(level + 1, 0) : seen; j < seen; ++j) {
        std::fill_n(at.scores + j * kLanes, std::min(j - level, kLanes), kNone);
      }
      for (int64_t c = 0; c < vectors; c += M::kScoreWide) {
        const int64_t lane = c * M::kWidth;
        with_constant<M::kScoreWide>(vectors - c, [&](auto wide) MMFAST_LAMBDA {
          softmax<M, wide>(at.scores + lane, seen, factor, at.top + i0 + lane, at.weight + i0 + lane, decay + lane);
        });
      }
      for (int64_t i = 0; i < kLanes; ++i) {
        const bool begun = first > 0 && i < rows;
        const float* const out = chunk.out + (begun ? i0 + i : 0) * out_stride;
        for (int64_t e = 0; e < d; ++e) at.sums[i * d + e] = begun ? out[e] * decay[i] : 0.0f;
      }
      all_outputs<M>(at, d, seen, rows);
      for (int64_t i = 0; i < rows; ++i) {
        const float weight = at.weight[i0 + i], by = !last ? 1.0f : weight == 0.0f ? 0.0f : 1.0f / weight;
        float* const out = chunk.out + (i0 + i) * out_stride;
        for (int64_t e = 0; e < d; ++e) out[e] = at.sums[i * d + e] * by;
      }
    }
  }
}

using Run = void (*)(const Attention&, const Chunk&, const Desk&);

#if defined(__aarch64__)
void run_16(const Attention& job, const Chunk& chunk, const Desk& at) {
  run_chunk<Registers32<16>>(job, chunk, at);
}
#else
void run_16(const Attention& job, const Chunk& chunk, const Desk& at) {
  run_chunk<Registers16<16>>(job, chunk, at);
}
#endif

#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) void run_32(const Attention& job, const Chunk& chunk, const Desk& at) {
  run_chunk<Registers16<32>>(job, chunk, at);
}
__attribute__((target("avx512f,fma"))) void run_64(const Attention& job, const Chunk& chunk, const Desk& at) {
  run_chunk<Registers32<64>>(job, chunk, at);
}

Run run_for(int widest) {
  if (widest >= 64 && __builtin_cpu_supports("avx512f")) return run_64;
  if (widest >= 32 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return run_32;
  return run_16;
}
#else
Run run_for(int) {
  return run_16;
}
#endif

int64_t start(const Bounds& bounds, int64_t s) {
  return bounds.starts ? bounds.starts[s] : s * bounds.length;
}

void check(const char* name, const Bounds& bounds, int64_t sequences, int64_t tokens) {
  int64_t before = 0;
  for (int64_t s = 0; s <= sequences; ++s) {
    const int64_t next = start(bounds, s);
    if (next < before || next > tokens) {
      throw std::invalid_argument(std::string(name) + " must ascend within 0.." + std::to_string(tokens) + ", got " +
                                  std::to_string(next) + " at " + std::to_string(s) + " after " +
                                  std::to_string(before));
    }
    before = next;
  }
}

// How the work is divided. Where sequences and heads are few, their queries are divided too.
struct Plan {
  int64_t longest_q = 0, longest_k = 0, products = 0;
  int64_t chunk_rows = 0, chunks = 0, items = 0;

  Plan(const Attention& job, int threads) {
    for (int64_t s = 0; s < job.sequences; ++s) {
      const int64_t n_q = start(job.of_q, s + 1) - start(job.of_q, s);
      const int64_t n_k = start(job.of_k, s + 1) - start(job.of_k, s);
      longest_q = std::max(longest_q, n_q);
      longest_k = std::max(longest_k, n_k);
      products += 2 * n_q * n_k * job.d * job.heads;
    }
    if (longest_q == 0 || job.heads == 0) return;
    const int64_t blocks = (longest_q + kLanes - 1) / kLanes;
    const int64_t parts = std::clamp<int64_t>(4 * threads / (job.sequences * job.heads), 1, blocks);
    chunk_rows = (blocks + parts - 1) / parts * kLanes;
    chunks = (longest_q + chunk_rows - 1) / chunk_rows;
    items = job.sequences * job.heads * chunks;
  }
};

void run_item(const Attention& job, const Plan& plan, Run run, int64_t item, const Desk& at, float* out) {
  const int64_t s = item / (job.heads * plan.chunks), h = item / plan.chunks % job.heads;
  const int64_t q0 = start(job.of_q, s), k0 = start(job.of_k, s), skipped = item % plan.chunks * plan.chunk_rows;
  const int64_t queries = start(job.of_q, s + 1) - q0, keys = start(job.of_k, s + 1) - k0;
  if (skipped >= queries) return;
  const auto at_head = [h](const Heads& x, int64_t t) { return x.data + t * x.token_stride + h * x.head_stride; };
  const int64_t first = q0 + skipped;
  const Chunk chunk{at_head(job.q, first),
                    keys > 0 ? at_head(job.k, k0) : nullptr,
                    keys > 0 ? at_head(job.v, k0) : nullptr,
                    out + (first * job.heads + h) * job.d,
                    std::min(queries - skipped, plan.chunk_rows),
                    keys,
                    keys - queries + skipped};
  run(job, chunk, at);
}

}  // namespace

void attention(const Attention& job, float* out, int threads, int widest) {
  constexpr int64_t kProductsAThread = 1 << 20, kFloatsALine = 16;
  if (job.d % 16 != 0 || job.d < 16 || job.d > 128) throw std::invalid_argument("d must be 16, 32, .. 128");
  check("cu_seqlens", job.of_q, job.sequences, job.q.tokens);
  check("cu_seqlens_k", job.of_k, job.sequences, std::min(job.k.tokens, job.v.tokens));
  const Plan plan(job, threads);
  if (plan.items == 0) return;
  const int64_t useful = std::min(plan.products / kProductsAThread, plan.items);
  const int64_t team = std::clamp<int64_t>(useful, 1, std::max(threads, 1));
  struct alignas(64) Line {
    float at[kFloatsALine];
  };
  const int64_t d = job.d, keys = std::min(plan.longest_k, kKeys) + kMaxRows;
  const int64_t sizes[] = {keys * d, keys * d, d * kLanes, keys * kLanes, kLanes * d, plan.chunk_rows, plan.chunk_rows};
  int64_t lines = 0;  // every size is a multiple of a line: d and kLanes are
  for (const int64_t size : sizes) lines += size / kFloatsALine;
  const std::unique_ptr<Line[]> memory(new Line[lines * team]);
  const Run run = run_for(widest);
  std::atomic<int64_t> next_desk{0}, next_item{0};
  const auto work = [&] {
    float* parts[7];
    float* free = memory[next_desk.fetch_add(1) * lines].at;
    for (int p = 0; p < 7; ++p) parts[p] = std::exchange(free, free + sizes[p]);
    const Desk desk{parts[0], parts[1], parts[2], parts[3], parts[4], parts[5], parts[6]};
    for (int64_t item; (item = next_item.fetch_add(1)) < plan.items;) run_item(job, plan, run, item, desk, out);
  };
  on_team(static_cast<int>(team), work);
}

}  // namespace mmfast
