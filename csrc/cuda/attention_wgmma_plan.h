// How attention is divided among blocks, for attention_wgmma.cu and for the tests: on the host.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>

#include "attention_wgmma.h"
#include "attention_wgmma_block.h"

namespace mmfast {

// Calls f with the narrowest shape that has a column for each key. Each is as wide as 255 registers allow, in multiples
// of 8: 160, 200, 264, 320, 384 and 392 are what masks keep of 1568 tokens, and CLIP's rows, without a column too many.
template <class F>
void with_wgmma_shape(int64_t n_k, const F& f) {
  if (n_k < 1 || n_k > kMaxWgmmaKeys)
    throw std::invalid_argument("n_k must be 1 to " + std::to_string(kMaxWgmmaKeys) + ", got " + std::to_string(n_k));
  if (n_k <= 80) return f(WgmmaShape<0, 80>());
  if (n_k <= 160) return f(WgmmaShape<80, 160>());
  if (n_k <= 200) return f(WgmmaShape<160, 200>());
  if (n_k <= 264) return f(WgmmaShape<200, 136, 128>());
  if (n_k <= 320) return f(WgmmaShape<264, 160, 160>());
  if (n_k <= 384) return f(WgmmaShape<320, 192, 192>());
  if (n_k <= 392) return f(WgmmaShape<384, 200, 192>());
  return f(WgmmaShape<392, 208, 192>());
}

struct WgmmaGrid {
  uint32_t blocks, parts;  // blocks that share the pairs, and parts that a pair's tiles are divided into
};

// `slots` blocks run at once. A part has to fetch K and V anew, which takes about as long as a tile.
inline WgmmaGrid wgmma_grid(int64_t pairs, int64_t tiles, int64_t slots) {
  int64_t parts = 1, best = INT64_MAX;
  for (int64_t p = 1; p <= tiles; ++p) {
    const int64_t run = (tiles + p - 1) / p, cost = (pairs * p + slots - 1) / slots * (run + 1);
    if (cost < best) best = cost, parts = (tiles + run - 1) / run;
  }
  return {static_cast<uint32_t>(std::clamp<int64_t>(slots / parts, 1, pairs)), static_cast<uint32_t>(parts)};
}

inline WgmmaWork wgmma_work(const WgmmaAttention& job, uint32_t parts, void* out, float* lse) {
  const auto part_of = [](const WgmmaRows& rows) {
    return WgmmaPart{static_cast<const char*>(rows.data), rows.row * 2, rows.head * 2};
  };
  const int64_t tiles = (job.n_q + kTileRows - 1) / kTileRows;
  if (job.sequences * job.heads > INT32_MAX || job.n_q > INT32_MAX)
    throw std::invalid_argument("sequences * heads and n_q must be less than 2^31");
  WgmmaWork work{};
  work.q = part_of(job.q), work.k = part_of(job.k), work.v = part_of(job.v);
  work.out = static_cast<char*>(out), work.lse = lse;
  work.tokens = job.sequences * job.n_q;
  work.n_q = static_cast<uint32_t>(job.n_q);
  work.n_k = static_cast<uint32_t>(job.n_k);
  work.heads = static_cast<uint32_t>(job.heads);
  work.pairs = static_cast<uint32_t>(job.sequences * job.heads);
  work.tiles = static_cast<uint32_t>(tiles);
  work.run = static_cast<uint32_t>((tiles + parts - 1) / parts);
  work.scale_log2 = job.scale * 1.44269504088896341f;
  // Exact for pairs below 2^31, since magic * heads exceeds a power of two by less than heads.
  while (job.heads > int64_t{2} << work.halves) ++work.halves;
  if (job.heads > 1)
    work.magic = static_cast<uint32_t>(((uint64_t{1} << (32 + work.halves)) + job.heads - 1) / job.heads);
  return work;
}

}  // namespace mmfast
