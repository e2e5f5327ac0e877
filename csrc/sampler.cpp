#include "sampler.h"

#include <algorithm>
#include <vector>

#include "philox.h"
#include "team.h"

namespace mmfast {
namespace {

// Writes the kept cells of one draw, ascending. keys and ranked are scratch of `cells` elements.
void keep_cells(const MaskDraw& draw, int64_t clip, int32_t view, int32_t slot_field, std::vector<uint64_t>& keys,
                std::vector<uint64_t>& ranked, int32_t* kept) {
  for (int32_t cell = 0; cell < draw.cells; cell += 4) {
    const Words4 words = cell_keys(draw.seed, clip, view, slot_field, cell / 4);
    for (int32_t i = cell; i < std::min(cell + 4, draw.cells); ++i) {
      keys[i] = uint64_t{words.word[i - cell]} << 32 | static_cast<uint32_t>(i);
    }
  }
  ranked = keys;
  const auto last = ranked.begin() + (draw.keep - 1);
  std::nth_element(ranked.begin(), last, ranked.end());
  for (int32_t cell = 0; cell < draw.cells; ++cell) {
    if (keys[cell] <= *last) *kept++ = cell;
  }
}

}  // namespace

void sample_keep(const int64_t* clip_ids, const MaskDraw& draw, int32_t* keep_idx, int threads) {
  if (draw.keep == 0 || draw.slots == 0) return;
  const int64_t cells_a_thread = 4096;
  const int64_t work = int64_t{draw.cells} * (draw.per_slot ? draw.slots : 1);
  share_range(draw.batch * draw.views, cells_a_thread / work + 1, threads, [&](int64_t begin, int64_t end) {
    std::vector<uint64_t> keys(draw.cells), ranked(draw.cells);
    for (int64_t sequence = begin; sequence < end; ++sequence) {
      const int64_t clip = clip_ids[sequence / draw.views];
      const int32_t view = static_cast<int32_t>(sequence % draw.views);
      int32_t* const first = keep_idx + sequence * draw.slots * draw.keep;
      for (int32_t slot = 0; slot < draw.slots; ++slot) {
        int32_t* const row = first + int64_t{slot} * draw.keep;
        if (slot == 0 || draw.per_slot) {
          keep_cells(draw, clip, view, draw.per_slot ? slot + 1 : 0, keys, ranked, row);
          for (int32_t i = 0; i < draw.keep; ++i) row[i] += slot * draw.cells;
        } else {
          for (int32_t i = 0; i < draw.keep; ++i) row[i] = first[i] + slot * draw.cells;
        }
      }
    }
  });
}

}  // namespace mmfast
