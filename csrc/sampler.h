// Which tokens a view keeps: in every slot the `keep` cells with the smallest (Philox key, cell).
#pragma once

#include <cstdint>

namespace mmfast {

struct MaskDraw {
  int64_t batch;  // clips
  int32_t views;  // masks a clip, below 2^16
  int32_t slots;  // t of the grid, below 2^16 - 1
  int32_t cells;  // h*w of the grid
  int32_t keep;   // cells kept in a slot, 0..cells
  uint64_t seed;
  bool per_slot;  // false: one draw for all slots (tubes). true: each slot on its own
};

// clip_ids [batch] -> keep_idx [batch, views, slots*keep], ascending token ids slot*cells + cell.
void sample_keep(const int64_t* clip_ids, const MaskDraw& draw, int32_t* keep_idx, int threads);

#ifdef MMFAST_WITH_CUDA
// Cells whose keys fit 47 of the 48 KiB of shared memory that any block may have.
constexpr int32_t kMaxCudaCells = 47 * 1024 / 4;

// The same bits on the device; enqueues on `stream` and returns.
void sample_keep_cuda(const int64_t* clip_ids, const MaskDraw& draw, int32_t* keep_idx, void* stream);
#endif

}  // namespace mmfast
