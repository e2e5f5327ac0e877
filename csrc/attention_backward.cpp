#include <algorithm>
#include <atomic>
#include <cstring>
#include <thread>
#include <vector>

#include "attention.h"
#include "attention_tiles.h"
#include "team.h"

namespace mmfast {
namespace {

// Lanes of a vector are keys here, and rows are queries.
constexpr int64_t kKeys = 240;   // keys of a block, at most: their scores, values and gradients stay in the L2 cache
constexpr int64_t kRows = 96;    // queries of a block
constexpr int64_t kSlice = 120;  // keys whose rows stay in the L1 cache

// What one thread works in.
struct Desk {
  float *keys_t, *values_t;  // [d, kKeys]
  float* keys;               // [kKeys, d], times the scale
  float *dk, *dv;            // [kKeys, d]
  float *q, *dout;           // [kRows, d]
  float *p, *ds;             // [kRows, kKeys]
  float *lse, *delta;        // [kRows]
};

// One sequence and head.
struct Head {
  const float *q, *k, *v, *dout, *out, *lse;
  float *dq, *dk, *dv;
  int64_t queries, keys;
};

// A block of keys of a head. dq collects over the blocks: of every query, one block after the other. done tells how
// many queries this block is through with; before, the same of the block before it.
struct Block {
  int64_t first, keys;
  const std::atomic<int64_t>* before;  // null for the first block
  std::atomic<int64_t>* done;
};

// The rows of q and dout of a block, the last ones zeros, their lse, and the sums delta of out times dout.
MMFAST_INLINE void pack_queries(const Attention& job, const Head& head, int64_t i0, int64_t rows, const Desk& at) {
  const int64_t d = job.d, q_row = job.q.token_stride, out_row = job.heads * d;
  const float* const q = head.q + i0 * q_row;
  const float *const dout = head.dout + i0 * out_row, *const out = head.out + i0 * out_row;
  for (int64_t i = 0; i < rows; ++i) {
    call_row(q, q_row, i, rows, d);
    call_row(dout, out_row, i, rows, d);
    call_row(out, out_row, i, rows, d);
    std::memcpy(at.q + i * d, q + i * q_row, d * sizeof(float));
    std::memcpy(at.dout + i * d, dout + i * out_row, d * sizeof(float));
    float sum[16] = {};
    for (int64_t e = 0; e < d; e += 16) {
      for (int64_t lane = 0; lane < 16; ++lane) sum[lane] += at.dout[i * d + e + lane] * out[i * out_row + e + lane];
    }
    for (int64_t half = 8; half > 0; half /= 2) {
      for (int64_t lane = 0; lane < half; ++lane) sum[lane] += sum[lane + half];
    }
    at.delta[i] = sum[0];
  }
  std::fill(at.q + rows * d, at.q + kRows * d, 0.0f);
  std::fill(at.dout + rows * d, at.dout + kRows * d, 0.0f);
  std::fill(at.delta + rows, at.delta + kRows, 0.0f);
  std::memcpy(at.lse, head.lse + i0, rows * sizeof(float));
  std::fill(at.lse + rows, at.lse + kRows, 0.0f);
}

MMFAST_INLINE void pack_keys(const Attention& job, const Head& head, const Block& block, const Desk& at) {
  const int64_t d = job.d, padded = round_up(block.keys, kLanes) * d;
  const float* const k = head.k + block.first * job.k.token_stride;
  transpose<kKeys>(k, job.k.token_stride, block.keys, d, at.keys_t);
  transpose<kKeys>(head.v + block.first * job.v.token_stride, job.v.token_stride, block.keys, d, at.values_t);
  for (int64_t j = 0; j < block.keys; ++j) {
    for (int64_t e = 0; e < d; ++e) at.keys[j * d + e] = k[j * job.k.token_stride + e] * job.scale;
  }
  std::fill_n(at.dk, padded, 0.0f);
  std::fill_n(at.dv, padded, 0.0f);
}

// p = exp(scale * q k^T - lse), ds = p * (dout v^T - delta), of kScoreRows queries and kWide vectors of keys.
template <class M, int kWide>
MMFAST_INLINE void score_tile(const Attention& job, const Desk& at, int64_t row, int64_t key) {
  using Floats = typename M::Floats;
  const int64_t d = job.d;
  float *const p = at.p + row * kKeys + key, *const ds = at.ds + row * kKeys + key;
  Floats sum[M::kScoreRows][kWide] = {};
  multiply<M, M::kScoreRows, kWide>(sum, at.q + row * d, d, 1, at.keys_t + key, kKeys, d);
#pragma GCC unroll 8
  for (int r = 0; r < M::kScoreRows; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < kWide; ++c) {
      store<M>(p + r * kKeys + c * M::kWidth, sum[r][c]);
      sum[r][c] = Floats{};
    }
  }
  multiply<M, M::kScoreRows, kWide>(sum, at.dout + row * d, d, 1, at.values_t + key, kKeys, d);
#pragma GCC unroll 8
  for (int r = 0; r < M::kScoreRows; ++r) {
    const float lse = at.lse[row + r], delta = at.delta[row + r];
#pragma GCC unroll 8
    for (int c = 0; c < kWide; ++c) {
      Floats x;
      load<M>(x, p + r * kKeys + c * M::kWidth);
      x = (x * job.scale - lse) * kLog2e;
      exp2_of<M>(x);
      store<M>(p + r * kKeys + c * M::kWidth, x);
      store<M>(ds + r * kKeys + c * M::kWidth, x * (sum[r][c] - delta));
    }
  }
}

template <class M>
MMFAST_INLINE void all_scores(const Attention& job, int64_t rows, int64_t keys, const Desk& at) {
  const int64_t vectors = (keys + M::kWidth - 1) / M::kWidth;
  for (int64_t c = 0; c < vectors; c += M::kScoreWide) {
    with_constant<M::kScoreWide>(vectors - c, [&](auto wide) MMFAST_LAMBDA {
      for (int64_t i = 0; i < rows; i += M::kScoreRows) score_tile<M, wide>(job, at, i, c * M::kWidth);
    });
  }
}

// The first `live` rows of a tile of `to` become what they were (0 if fresh) plus sum over s of
// a[r*a_row + s*a_step] * b[s*b_step].
template <class M, int kWide>
MMFAST_INLINE void out_tile(float* to, int64_t to_row, int64_t live, bool fresh, const float* a, int64_t a_row,
                            int64_t a_step, const float* b, int64_t b_step, int64_t steps) {
  typename M::Floats sum[M::kOutRows][kWide] = {};
#pragma GCC unroll 8
  for (int r = 0; r < M::kOutRows; ++r) {
    if (fresh || r >= live) break;
#pragma GCC unroll 8
    for (int c = 0; c < kWide; ++c) load<M>(sum[r][c], to + r * to_row + c * M::kWidth);
  }
  multiply<M, M::kOutRows, kWide>(sum, a, a_row, a_step, b, b_step, steps);
#pragma GCC unroll 8
  for (int r = 0; r < M::kOutRows; ++r) {
    if (r >= live) break;
#pragma GCC unroll 8
    for (int c = 0; c < kWide; ++c) store<M>(to + r * to_row + c * M::kWidth, sum[r][c]);
  }
}

// to[j] += sum over the rows i of scores[i][j] * values[i]: dv from p and dout, dk from ds and q. The last tile may
// take keys behind the last one, whatever they hold: nobody reads what becomes of them.
template <class M>
MMFAST_INLINE void add_to_keys(float* to, const float* scores, const float* values, int64_t rows, int64_t keys,
                               int64_t d) {
  for (int64_t c = 0; c < d; c += M::kOutWide * M::kWidth) {
    with_constant<M::kOutWide>((d - c) / M::kWidth, [&](auto wide) MMFAST_LAMBDA {
      for (int64_t j = 0; j < keys; j += M::kOutRows) {
        out_tile<M, wide>(to + j * d + c, d, M::kOutRows, false, scores + j, 1, kKeys, values + c, d, rows);
      }
    });
  }
}

// dq[i] += sum over keys j of ds[i][j] * keys[j]
template <class M>
MMFAST_INLINE void add_to_queries(float* dq, int64_t stride, bool fresh, int64_t rows, int64_t keys, int64_t d,
                                  const Desk& at) {
  for (int64_t j = 0; j < keys; j += kSlice) {
    for (int64_t c = 0; c < d; c += M::kOutWide * M::kWidth) {
      with_constant<M::kOutWide>((d - c) / M::kWidth, [&](auto wide) MMFAST_LAMBDA {
        for (int64_t i = 0; i < rows; i += M::kOutRows) {
          out_tile<M, wide>(dq + i * stride + c, stride, rows - i, fresh && j == 0, at.ds + i * kKeys + j, kKeys, 1,
                            at.keys + j * d + c, d, std::min(keys - j, kSlice));
        }
      });
    }
  }
}

void wait_for(const std::atomic<int64_t>& done, int64_t count) {
  while (done.load(std::memory_order_acquire) < count) std::this_thread::yield();
}

template <class M>
MMFAST_INLINE void run_block(const Attention& job, const AttentionGrads& grads, const Head& head, const Block& block,
                             const Desk& at) {
  const int64_t d = job.d, stride = grads.dq.token_stride;
  const int64_t shift = head.keys - head.queries - block.first;  // the last key of the block that query 0 sees
  const int64_t blind = job.causal ? std::clamp<int64_t>(-shift, 0, head.queries) : 0;  // see no key of the block
  const int64_t begin = block.keys > 0 ? blind / kRows * kRows : head.queries;
  pack_keys(job, head, block, at);
  if (!block.before) {
    for (int64_t i = 0; i < begin; ++i) std::fill_n(head.dq + i * stride, d, 0.0f);
  }
  for (int64_t i0 = begin; i0 < head.queries; i0 += kRows) {
    const int64_t rows = std::min(head.queries - i0, kRows), level = i0 + shift;
    const int64_t end = round_up(level + rows, kLanes);  // no tile holds keys from both sides of it
    const int64_t keys = job.causal ? std::min(end, block.keys) : block.keys;
    pack_queries(job, head, i0, rows, at);
    all_scores<M>(job, rows, keys, at);
    if (job.causal) {
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t seen = std::clamp<int64_t>(level + i + 1, 0, keys);
        std::fill_n(at.p + i * kKeys + seen, keys - seen, 0.0f);
        std::fill_n(at.ds + i * kKeys + seen, keys - seen, 0.0f);
      }
    }
    add_to_keys<M>(at.dv, at.p, at.dout, rows, keys, d);
    add_to_keys<M>(at.dk, at.ds, at.q, rows, keys, d);
    if (block.before) wait_for(*block.before, i0 + rows);
    add_to_queries<M>(head.dq + i0 * stride, stride, !block.before, rows, keys, d, at);
    block.done->store(i0 + rows, std::memory_order_release);
  }
  for (int64_t j = 0; j < block.keys; ++j) {
    float* const dk = head.dk + (block.first + j) * grads.dk.token_stride;
    for (int64_t e = 0; e < d; ++e) dk[e] = at.dk[j * d + e] * job.scale;
    std::memcpy(head.dv + (block.first + j) * grads.dv.token_stride, at.dv + j * d, d * sizeof(float));
  }
}

using Run = void (*)(const Attention&, const AttentionGrads&, const Head&, const Block&, const Desk&);

#if defined(__aarch64__)
void run_16(const Attention& job, const AttentionGrads& grads, const Head& head, const Block& block, const Desk& at) {
  run_block<Registers32<16>>(job, grads, head, block, at);
}
#else
void run_16(const Attention& job, const AttentionGrads& grads, const Head& head, const Block& block, const Desk& at) {
  run_block<Registers16<16>>(job, grads, head, block, at);
}
#endif

#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) void run_32(const Attention& job, const AttentionGrads& grads, const Head& head,
                                                const Block& block, const Desk& at) {
  run_block<Registers16<32>>(job, grads, head, block, at);
}
__attribute__((target("avx512f,fma"))) void run_64(const Attention& job, const AttentionGrads& grads, const Head& head,
                                                   const Block& block, const Desk& at) {
  run_block<Registers32<64>>(job, grads, head, block, at);
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

// How the work is divided: into heads, or, where those are few, into blocks of keys. Either gives the same bits, since
// the keys of a block and the order of the blocks do not depend on it.
struct Plan {
  int64_t longest_q = 0, longest_k = 0, products = 0;
  int64_t block_keys = 0, blocks = 0, blocks_an_item = 0, items = 0;

  Plan(const Attention& job, int threads) {
    for (int64_t s = 0; s < job.sequences; ++s) {
      const int64_t n_q = job.of_q.start(s + 1) - job.of_q.start(s);
      const int64_t n_k = job.of_k.start(s + 1) - job.of_k.start(s);
      longest_q = std::max(longest_q, n_q);
      longest_k = std::max(longest_k, n_k);
      products += 5 * n_q * n_k * job.d * job.heads;
    }
    const int64_t heads = job.sequences * job.heads, units = std::max<int64_t>(round_up(longest_k, kLanes) / kLanes, 1);
    const int64_t least = round_up(units * kLanes, kKeys) / kKeys;
    block_keys = round_up(units, least) / least * kLanes;
    blocks = round_up(units * kLanes, block_keys) / block_keys;
    blocks_an_item = heads < 4 * threads ? 1 : blocks;
    items = heads * (blocks / blocks_an_item);
  }
};

void run_item(const Attention& job, const AttentionGrads& grads, const Plan& plan, Run run, int64_t item,
              std::vector<std::atomic<int64_t>>& done, const Desk& at) {
  const int64_t b0 = item * plan.blocks_an_item, s = b0 / (plan.blocks * job.heads), h = b0 / plan.blocks % job.heads;
  const int64_t q0 = job.of_q.start(s), k0 = job.of_k.start(s);
  const int64_t queries = job.of_q.start(s + 1) - q0, keys = job.of_k.start(s + 1) - k0;
  const int64_t of_out = queries > 0 ? (q0 * job.heads + h) * job.d : 0;
  const int64_t of_lse = queries > 0 ? h * job.q.tokens + q0 : 0;
  const Head head{job.q.at(q0, h),
                  job.k.at(k0, h),
                  job.v.at(k0, h),
                  grads.dout + of_out,
                  grads.out + of_out,
                  grads.lse + of_lse,
                  grads.dq.at(q0, h),
                  grads.dk.at(k0, h),
                  grads.dv.at(k0, h),
                  queries,
                  keys};
  for (int64_t b = b0; b < b0 + plan.blocks_an_item; ++b) {
    const int64_t first = b % plan.blocks * plan.block_keys;
    if (first > 0 && first >= keys) return;
    const Block block{first, std::min(keys - first, plan.block_keys), first > 0 ? &done[b - 1] : nullptr, &done[b]};
    run(job, grads, head, block, at);
  }
}

void clear_rows(const HeadsOf<float>& x, int64_t from, int64_t heads, int64_t d) {
  for (int64_t t = from; t < x.tokens; ++t) {
    for (int64_t h = 0; h < heads; ++h) std::fill_n(x.at(t, h), d, 0.0f);
  }
}

}  // namespace

void attention_backward(const Attention& job, const AttentionGrads& grads, int threads, int widest) {
  constexpr int64_t kProductsAThread = 1 << 20;
  check_attention(job);
  clear_rows(grads.dq, job.of_q.start(job.sequences), job.heads, job.d);
  clear_rows(grads.dk, job.of_k.start(job.sequences), job.heads, job.d);
  clear_rows(grads.dv, job.of_k.start(job.sequences), job.heads, job.d);
  const Plan plan(job, threads);
  if (plan.items == 0) return;
  const int64_t useful = std::min(plan.products / kProductsAThread, plan.items);
  const int64_t team = std::clamp<int64_t>(useful, 1, std::max(threads, 1));
  const int64_t of_lanes = kKeys * job.d, of_keys = plan.block_keys * job.d, of_rows = kRows * job.d;
  const int64_t sizes[] = {of_lanes, of_lanes,      of_keys,       of_keys, of_keys, of_rows,
                           of_rows,  kRows * kKeys, kRows * kKeys, kRows,   kRows};
  Desks<11> desks(sizes, team);
  const Run run = run_for(widest);
  std::vector<std::atomic<int64_t>> done(job.sequences * job.heads * plan.blocks);  // zeros, by std::vector
  std::atomic<int64_t> next_item{0};
  on_team(static_cast<int>(team), [&] {
    float* p[11];
    desks.take(p);
    const Desk desk{p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7], p[8], p[9], p[10]};
    // In order: a block waits only for blocks that some thread has begun before it.
    for (int64_t item; (item = next_item.fetch_add(1)) < plan.items;) {
      run_item(job, grads, plan, run, item, done, desk);
    }
  });
}

}  // namespace mmfast
