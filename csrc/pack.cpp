#include "pack.h"

#include <algorithm>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

namespace mmfast {
namespace {

void check(const int32_t* keep_idx, int64_t tokens, const int32_t* cu_seqlens, int64_t sequences) {
  if (cu_seqlens[0] != 0 || cu_seqlens[sequences] != tokens) {
    throw std::invalid_argument("cu_seqlens: runs from " + std::to_string(cu_seqlens[0]) + " to " +
                                std::to_string(cu_seqlens[sequences]) + ", takes 0 to " + std::to_string(tokens) +
                                " (the length of keep_idx)");
  }
  for (int64_t s = 0; s < sequences; ++s) {
    if (cu_seqlens[s + 1] < cu_seqlens[s] || cu_seqlens[s + 1] > tokens) {
      throw std::invalid_argument("cu_seqlens: " + std::to_string(cu_seqlens[s + 1]) + " at " + std::to_string(s + 1) +
                                  " follows " + std::to_string(cu_seqlens[s]) + ", takes ascending bounds");
    }
    for (int64_t i = int64_t{cu_seqlens[s]} + 1; i < cu_seqlens[s + 1]; ++i) {
      if (keep_idx[i] <= keep_idx[i - 1]) {
        throw std::invalid_argument("keep_idx: " + std::to_string(keep_idx[i]) + " at " + std::to_string(i) +
                                    " follows " + std::to_string(keep_idx[i - 1]) +
                                    ", takes ascending ids in every sequence");
      }
    }
  }
}

}  // namespace

int64_t union_rows(const int32_t* keep_idx, int64_t tokens, const int32_t* cu_seqlens, int64_t sequences, int64_t views,
                   int32_t* union_idx, int32_t* union_clip, int32_t* row_of) {
  check(keep_idx, tokens, cu_seqlens, sequences);
  std::vector<int32_t> seen, merged;
  int64_t rows = 0;
  for (int64_t clip = 0; clip * views < sequences; ++clip) {
    const int32_t* const bounds = cu_seqlens + clip * views;
    seen.clear();
    for (int64_t view = 0; view < views; ++view) {
      merged.clear();
      std::set_union(seen.begin(), seen.end(), keep_idx + bounds[view], keep_idx + bounds[view + 1],
                     std::back_inserter(merged));
      seen.swap(merged);
    }
    std::copy(seen.begin(), seen.end(), union_idx + rows);
    std::fill_n(union_clip + rows, seen.size(), static_cast<int32_t>(clip));
    for (int64_t view = 0; view < views; ++view) {
      size_t row = 0;
      for (int64_t i = bounds[view]; i < bounds[view + 1]; ++i) {
        while (seen[row] != keep_idx[i]) ++row;
        row_of[i] = static_cast<int32_t>(rows + row);
      }
    }
    rows += static_cast<int64_t>(seen.size());
  }
  return rows;
}

}  // namespace mmfast
