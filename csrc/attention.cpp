#include "attention.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

#include "attention_tiles.h"
#include "team.h"

namespace mmfast {
namespace {

// Lanes of a vector are queries here: kLanes are a block.
constexpr int64_t kKeys = 512;   // keys of a block: their scores stay in the L2 cache
constexpr int64_t kSlice = 96;   // keys whose values stay in the L1 cache
constexpr int64_t kMaxRows = 8;  // keys of a tile, at most
constexpr float kNone = -std::numeric_limits<float>::infinity();

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
  float *out, *lse;
  int64_t rows, keys;
  int64_t shift;  // row i sees the keys up to i + shift where attention is causal
};

template <class M, int kWide>
MMFAST_INLINE void score_tile(const float* keys, const float* queries, int64_t d, float* scores) {
  typename M::Floats sum[M::kScoreRows][kWide] = {};
  multiply<M, M::kScoreRows, kWide>(sum, keys, d, 1, queries, kLanes, d);
#pragma GCC unroll 8
  for (int r = 0; r < M::kScoreRows; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < kWide; ++c) store<M>(scores + r * kLanes + c * M::kWidth, sum[r][c]);
  }
}

template <class M, int kWide>
MMFAST_INLINE void output_tile(const float* scores, const float* values, int64_t keys, int64_t d, float* sums) {
  typename M::Floats sum[M::kOutRows][kWide];
#pragma GCC unroll 8
  for (int r = 0; r < M::kOutRows; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < kWide; ++c) load<M>(sum[r][c], sums + r * d + c * M::kWidth);
  }
  multiply<M, M::kOutRows, kWide>(sum, scores, 1, kLanes, values, d, keys);
#pragma GCC unroll 8
  for (int r = 0; r < M::kOutRows; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < kWide; ++c) store<M>(sums + r * d + c * M::kWidth, sum[r][c]);
  }
}

template <class M>
MMFAST_INLINE void all_scores(const Desk& at, int64_t d, int64_t keys, int64_t vectors) {
  for (int64_t c = 0; c < vectors; c += M::kScoreWide) {
    with_constant<M::kScoreWide>(vectors - c, [&](auto wide) MMFAST_LAMBDA {
      for (int64_t j = 0; j < keys; j += M::kScoreRows) {
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
        for (int64_t i = 0; i < rows; i += M::kOutRows) {
          output_tile<M, wide>(at.scores + j * kLanes + i, at.values + j * d + c, std::min(keys - j, kSlice), d,
                               at.sums + i * d + c);
        }
      });
    }
  }
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
  const int64_t d = job.d, k_row = job.k.token_stride, v_row = job.v.token_stride;
  const float *const k = chunk.k + first * k_row, *const v = chunk.v + first * v_row;
  for (int64_t j = 0; j < count; ++j) {
    call_row(k, k_row, j, count, d);
    call_row(v, v_row, j, count, d);
    std::memcpy(at.keys + j * d, k + j * k_row, d * sizeof(float));
    std::memcpy(at.values + j * d, v + j * v_row, d * sizeof(float));
  }
  std::fill_n(at.keys + count * d, kMaxRows * d, 0.0f);
}

template <class M>
MMFAST_INLINE void run_chunk(const Attention& job, const Chunk& chunk, const Desk& at) {
  const int64_t d = job.d, out_stride = job.heads * d;
  const float factor = job.scale * kLog2e;
  alignas(64) float decay[kLanes];
  const int64_t padded_rows = round_up(chunk.rows, kLanes);
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
      transpose<kLanes>(chunk.q + i0 * job.q.token_stride, job.q.token_stride, rows, d, at.queries);
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
  if (!chunk.lse) return;
  for (int64_t i = 0; i < chunk.rows; ++i) {
    chunk.lse[i] = at.weight[i] == 0.0f ? kNone : at.top[i] * job.scale + std::log(at.weight[i]);
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

void check(const char* name, const Bounds& bounds, int64_t sequences, int64_t tokens) {
  int64_t before = 0;
  for (int64_t s = 0; s <= sequences; ++s) {
    const int64_t next = bounds.start(s);
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
      const int64_t n_q = job.of_q.start(s + 1) - job.of_q.start(s);
      const int64_t n_k = job.of_k.start(s + 1) - job.of_k.start(s);
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

void run_item(const Attention& job, const Plan& plan, Run run, int64_t item, const Desk& at, float* out, float* lse) {
  const int64_t s = item / (job.heads * plan.chunks), h = item / plan.chunks % job.heads;
  const int64_t q0 = job.of_q.start(s), k0 = job.of_k.start(s), skipped = item % plan.chunks * plan.chunk_rows;
  const int64_t queries = job.of_q.start(s + 1) - q0, keys = job.of_k.start(s + 1) - k0;
  if (skipped >= queries) return;
  const int64_t first = q0 + skipped;
  const Chunk chunk{job.q.at(first, h),
                    job.k.at(k0, h),
                    job.v.at(k0, h),
                    out + (first * job.heads + h) * job.d,
                    lse ? lse + h * job.q.tokens + first : nullptr,
                    std::min(queries - skipped, plan.chunk_rows),
                    keys,
                    keys - queries + skipped};
  run(job, chunk, at);
}

}  // namespace

void check_attention(const Attention& job) {
  if (job.d % 16 != 0 || job.d < 16 || job.d > 128) throw std::invalid_argument("d must be 16, 32, .. 128");
  check("cu_seqlens", job.of_q, job.sequences, job.q.tokens);
  check("cu_seqlens_k", job.of_k, job.sequences, std::min(job.k.tokens, job.v.tokens));
}

void attention(const Attention& job, float* out, float* lse, int threads, int widest) {
  constexpr int64_t kProductsAThread = 1 << 20;
  check_attention(job);
  const Plan plan(job, threads);
  if (plan.items == 0) return;
  const int64_t useful = std::min(plan.products / kProductsAThread, plan.items);
  const int64_t team = std::clamp<int64_t>(useful, 1, std::max(threads, 1));
  const int64_t d = job.d, keys = std::min(plan.longest_k, kKeys) + kMaxRows;
  const int64_t sizes[] = {keys * d, keys * d, d * kLanes, keys * kLanes, kLanes * d, plan.chunk_rows, plan.chunk_rows};
  Desks<7> desks(sizes, team);
  const Run run = run_for(widest);
  std::atomic<int64_t> next_item{0};
  on_team(static_cast<int>(team), [&] {
    float* parts[7];
    desks.take(parts);
    const Desk desk{parts[0], parts[1], parts[2], parts[3], parts[4], parts[5], parts[6]};
    for (int64_t item; (item = next_item.fetch_add(1)) < plan.items;) run_item(job, plan, run, item, desk, out, lse);
  });
}

}  // namespace mmfast
