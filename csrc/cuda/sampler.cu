// One block draws one mask. The key of rank `keep` is found bit by bit, from the top: of the cells that agree with the
// bits decided so far, those with a 0 come first, so counting them decides the next bit. 32 block-wide counts, no sort.
#include "../philox.h"
#include "../sampler.h"
#include "launch.h"

namespace mmfast {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

__global__ void __launch_bounds__(kThreads)
    sample_keep_kernel(const int64_t* __restrict__ clip_ids,  // [batch]
                       const MaskDraw draw,
                       int32_t* __restrict__ keep_idx) {  // [batch, views, slots*keep]
  extern __shared__ uint32_t keys[];                      // [cells]
  __shared__ uint32_t warp_total[kWarps];
  const int draws = draw.per_slot ? draw.slots : 1;
  const int64_t sequence = blockIdx.x / draws;
  const int slot = blockIdx.x % draws;
  const int64_t clip = clip_ids[sequence / draw.views];
  const int view = static_cast<int>(sequence % draw.views);

  for (int group = threadIdx.x; group * 4 < draw.cells; group += kThreads) {
    const Words4 words = cell_keys(draw.seed, clip, view, draw.per_slot ? slot + 1 : 0, group);
    for (int i = 0; i < 4; ++i) {
      if (group * 4 + i < draw.cells) keys[group * 4 + i] = words.word[i];
    }
  }
  __syncthreads();

  uint32_t last = 0;       // becomes the largest key kept
  int wanted = draw.keep;  // becomes how many cells with exactly that key stay
  for (int bit = 31; bit >= 0; --bit) {
    int zeros = 0;
    for (int base = 0; base < draw.cells; base += kThreads) {
      const int cell = base + threadIdx.x;
      zeros += __syncthreads_count(cell < draw.cells && (keys[cell] ^ last) >> bit == 0);
    }
    if (zeros < wanted) {
      wanted -= zeros;
      last |= 1u << bit;
    }
  }

  int32_t* const row = keep_idx + sequence * draw.slots * draw.keep;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t lower_lanes = (1u << lane) - 1;
  uint32_t below_before = 0, ties_before = 0;  // cells before this chunk
  for (int base = 0; base < draw.cells; base += kThreads) {
    const int cell = base + threadIdx.x;
    const bool below = cell < draw.cells && keys[cell] < last;
    const bool tie = cell < draw.cells && keys[cell] == last;
    const uint32_t below_lanes = __ballot_sync(~0u, below), tie_lanes = __ballot_sync(~0u, tie);
    // Both counts travel in one word: a chunk has 256 cells, so neither passes 16 bits.
    if (lane == 0) warp_total[warp] = __popc(below_lanes) | __popc(tie_lanes) << 16;
    __syncthreads();
    uint32_t before = __popc(below_lanes & lower_lanes) | __popc(tie_lanes & lower_lanes) << 16, chunk = 0;
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) before += warp_total[w];
      chunk += warp_total[w];
    }
    __syncthreads();
    const int ties = ties_before + (before >> 16);
    const int position = below_before + (before & 0xFFFF) + min(ties, wanted);
    if (below || (tie && ties < wanted)) {
      const int slots = draw.per_slot ? 1 : draw.slots;
      for (int s = slot; s < slot + slots; ++s) row[int64_t{s} * draw.keep + position] = s * draw.cells + cell;
    }
    below_before += chunk & 0xFFFF;
    ties_before += chunk >> 16;
  }
}

}  // namespace

void sample_keep_cuda(const int64_t* clip_ids, const MaskDraw& draw, int32_t* keep_idx, void* stream) {
  const int64_t draws = draw.batch * draw.views * (draw.per_slot ? draw.slots : 1);
  if (draws == 0 || draw.keep == 0 || draw.slots == 0) return;
  if (draw.cells > kMaxCudaCells) {
    throw std::invalid_argument("grid: " + std::to_string(draw.cells) + " cells a slot, takes at most " +
                                std::to_string(kMaxCudaCells));
  }
  const size_t shared = draw.cells * sizeof(uint32_t);
  sample_keep_kernel<<<blocks(draws), kThreads, shared, static_cast<cudaStream_t>(stream)>>>(clip_ids, draw, keep_idx);
  check_launch("sample_keep");
}

}  // namespace mmfast
