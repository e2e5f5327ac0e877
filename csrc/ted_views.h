// What the stencil and its backward share: the views of a table, and how the work is divided. For ted*.cpp only.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "attention_tiles.h"
#include "team.h"
#include "ted.h"

namespace mmfast {

constexpr int64_t kTedColumns = 64;  // of a block: a frame of it stays in the L2 cache, a vector of that in the L1

// For the columns behind the last whole vector.
struct SingleFloat {
  typedef float Floats;
  typedef float Loose;
  static constexpr int64_t kWidth = 1;
};

struct TedView {
  int64_t row;            // its first
  int64_t sites;          // rows of a frame
  const int32_t* places;  // [sites, 9]: of the cells around each site among the view's; `sites` where there is none
};

struct TedViews {
  std::vector<int32_t> places;
  std::vector<TedView> all;  // of all copies, in the order of their rows
  int64_t most_sites;

  explicit TedViews(const TedSites& sites);
};

inline TedViews::TedViews(const TedSites& sites) : places(sites.count * 9), most_sites(0) {
  for (int64_t u = 0; u < sites.count;) {
    const int32_t* const at = sites.table + u * kSiteWords;
    const int64_t step = at[kSiteStep];
    bool right = step > 0 && u + step <= sites.count;
    for (int64_t i = 0; right && i < step; ++i) {
      const int32_t* const site = at + i * kSiteWords;
      right = site[kSiteStep] == step && site[kSiteFirst] == sites.frames * u + i;
      for (int64_t k = 0; k < 9; ++k) {
        right = right && (site[k] == kNoSite || (i + site[k] >= 0 && i + site[k] < step));
      }
    }
    if (!right) throw std::invalid_argument("sites: the view at " + std::to_string(u) + " is not a table of sites");
    for (int64_t i = 0; i < step; ++i) {
      for (int64_t k = 0; k < 9; ++k) {
        const int32_t away = at[i * kSiteWords + k];
        places[(u + i) * 9 + k] = static_cast<int32_t>(away == kNoSite ? step : i + away);
      }
    }
    if (sites.copies > 0) all.push_back({sites.frames * u, step, places.data() + u * 9});
    most_sites = std::max(most_sites, step);
    u += step;
  }
  const size_t of_a_copy = all.size();
  for (int64_t copy = 1; copy < sites.copies; ++copy) {
    for (size_t v = 0; v < of_a_copy; ++v) {
      all.push_back({all[v].row + copy * sites.count * sites.frames, all[v].sites, all[v].places});
    }
  }
}

// to[k][c] = from[c][k]: taps as the loops over channels read them.
inline std::vector<float> by_tap(const float* from, int64_t width, int64_t taps) {
  std::vector<float> to(width * taps);
  for (int64_t c = 0; c < width; ++c) {
    for (int64_t k = 0; k < taps; ++k) to[k * width + c] = from[c * taps + k];
  }
  return to;
}

// Calls work(item, desk) for each of items on a team, desk being memory of desk_floats for one thread.
template <class Work>
void share_out(int64_t items, int64_t desk_floats, int64_t elements, int threads, const Work& work) {
  constexpr int64_t kElementsAThread = 1 << 16;
  const int64_t team = std::clamp<int64_t>(std::min(elements / kElementsAThread, items), 1, std::max(threads, 1));
  const int64_t sizes[] = {desk_floats};
  Desks<1> desks(sizes, team);
  std::atomic<int64_t> next{0};
  on_team(static_cast<int>(team), [&] {
    float* desk[1];
    desks.take(desk);
    for (int64_t item; (item = next.fetch_add(1)) < items;) work(item, desk[0]);
  });
}

// The blocks of columns of both branches: which one, its first column in the branch, and how many.
struct TedBlock {
  bool space;
  int64_t first, columns;
};

inline std::vector<TedBlock> ted_blocks(const TedParameters& p) {
  std::vector<TedBlock> blocks;
  for (const bool space : {false, true}) {
    const int64_t width = space ? p.space_width : p.time_width;
    for (int64_t c = 0; c < width; c += kTedColumns) blocks.push_back({space, c, std::min(kTedColumns, width - c)});
  }
  return blocks;
}

}  // namespace mmfast
