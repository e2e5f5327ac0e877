// csrc/cuda/attention_wgmma_block.h on the CPU, for tests/test_attention_wgmma.py to call.
#include "cuda/attention_wgmma_plan.h"
#include "wgmma_emulated.h"

namespace {

emulated::Range range_of(const mmfast::WgmmaRows& rows, int64_t tokens, int64_t heads) {
  const char* begin = static_cast<const char*>(rows.data);
  return {begin, begin + ((tokens - 1) * rows.row + (heads - 1) * rows.head + 64) * 2};
}

}  // namespace

// layouts: row and head strides in elements of q, k and v. slots: blocks that run at once. Returns null, or what went
// wrong.
extern "C" const char* attend(const void* q, const void* k, const void* v, const int64_t* layouts, int64_t sequences,
                              int64_t heads, int64_t n_q, int64_t n_k, float scale, int bf16, void* out, float* lse,
                              int64_t slots, int eager) {
  static std::string error;
  const mmfast::WgmmaAttention job{{q, layouts[0], layouts[1]},
                                   {k, layouts[2], layouts[3]},
                                   {v, layouts[4], layouts[5]},
                                   sequences,
                                   heads,
                                   n_q,
                                   n_k,
                                   scale,
                                   bf16 != 0};
  try {
    mmfast::with_wgmma_shape(n_k, [&](auto shape) {
      using Shape = decltype(shape);
      const mmfast::WgmmaGrid grid = mmfast::wgmma_grid(sequences * heads, (n_q + 63) / 64, slots);
      const mmfast::WgmmaWork work = mmfast::wgmma_work(job, grid.parts, out, lse);
      emulated::Block block;
      block.readable = {range_of(job.q, sequences * n_q, heads), range_of(job.k, sequences * n_k, heads),
                        range_of(job.v, sequences * n_k, heads)};
      block.count = grid.blocks;
      block.eager = eager;
      block.body = [&] {
        if (job.bf16)
          mmfast::attend<emulated::Isa, Shape, true>(work, emulated::kSharedStart);
        else
          mmfast::attend<emulated::Isa, Shape, false>(work, emulated::kSharedStart);
      };
      for (block.index_y = 0; block.index_y < grid.parts; ++block.index_y)
        for (block.index = 0; block.index < grid.blocks; ++block.index) emulated::run(block, Shape::shared_bytes);
    });
  } catch (const std::exception& failed) {
    error = failed.what();
    return error.c_str();
  }
  return nullptr;
}

// How many products there have been so far, of 64 rows each.
extern "C" int64_t products_done() {
  return emulated::shares_done / emulated::kWarps;
}
