#include "ted.h"
#include "ted_views.h"

namespace mmfast {
namespace {

// Sums over rows that the parameters' gradients are made of: of dout times the three frames, of dout, and of dh; of the
// differences of dout times the nine cells, and of dout where there is such a cell.
constexpr int64_t kTimeSums = 5, kSpaceSums = 18;
constexpr int64_t kGroups = 16;  // of views, summed apart: their number must not depend on that of threads

struct Job {
  const float *dout, *h;
  float* dh;
  int64_t width, frames;
  const TedParameters& p;
  const float *time_taps, *space_taps;  // [3, time_width] and [9, space_width]
};

// What one thread works in, for a frame of a block. Planes are [vector][sites + 1][lanes].
struct Desk {
  float* change;  // of dout to the next frame: what the differences' gradient comes to for h
  float* cells;   // h
  float* total;   // of dout, over the frames
};

// Sums of a group's views over all their rows: `sums` rows of the branch's width.
struct Shares {
  float* at;
  int64_t width;
};

template <class M>
MMFAST_INLINE void run_time(const Job& job, const TedView& view, int64_t first, int64_t columns, const Shares& shares) {
  using Floats = typename M::Floats;
  const int64_t step = view.sites * job.width;
  for (int64_t i = 0; i < view.sites; ++i) {
    for (int64_t c = first; c < first + columns; c += M::kWidth) {
      const int64_t row = (view.row + i) * job.width + c;
      const float *grown = job.dout + row, *from = job.h + row;
      float* to = job.dh + row;
      Floats tap[3], sum[kTimeSums], shift, before{}, here, after, h_before{}, h_here, h_after;
#pragma GCC unroll 3
      for (int k = 0; k < 3; ++k) load<M>(tap[k], job.time_taps + k * job.p.time_width + c);
#pragma GCC unroll 5
      for (int k = 0; k < kTimeSums; ++k) load<M>(sum[k], shares.at + k * shares.width + c);
      load<M>(shift, job.p.time_shift + c);
      load<M>(here, grown);
      load<M>(h_here, from);
      h_here += shift;
      for (int64_t t = 0; t < job.frames; ++t, to += step) {
        after = h_after = Floats{};
        if (t + 1 < job.frames) {
          grown += step;
          from += step;
          load<M>(after, grown);
          load<M>(h_after, from);
          h_after += shift;
        }
        const Floats value = tap[0] * after + tap[1] * here + tap[2] * before;
        store<M>(to, value);
        sum[0] += here * h_before;
        sum[1] += here * h_here;
        sum[2] += here * h_after;
        sum[3] += here;
        sum[4] += value;
        before = here;
        here = after;
        h_before = h_here;
        h_here = h_after;
      }
#pragma GCC unroll 5
      for (int k = 0; k < kTimeSums; ++k) store<M>(shares.at + k * shares.width + c, sum[k]);
    }
  }
}

// change = [t > 0] dout_t - [t + 1 < frames] dout_(t+1), 0 for a class token; cells = h_t; total += dout_t.
template <class M>
MMFAST_INLINE void stage(const Job& job, const TedView& view, int64_t t, int64_t first, int64_t columns,
                         const Desk& at) {
  using Floats = typename M::Floats;
  const int64_t step = view.sites * job.width, plane = (view.sites + 1) * M::kWidth;
  const int64_t start = (view.row + t * view.sites) * job.width + job.p.time_width + first;
  const bool last = t + 1 == job.frames;
  for (int64_t i = 0; i < view.sites; ++i) {
    const bool cell = view.places[i * 9 + 4] != view.sites;
    const float *grown = job.dout + start + i * job.width, *from = job.h + start + i * job.width;
    for (int64_t c = 0; c < columns; c += M::kWidth) {
      const int64_t to = c / M::kWidth * plane + i * M::kWidth;
      Floats here{}, after{}, total, cells;
      if (cell) {
        load<M>(here, grown + c);
        if (!last) load<M>(after, grown + step + c);
      }
      load<M>(total, at.total + to);
      store<M>(at.total + to, total + here);
      store<M>(at.change + to, t > 0 ? here - after : -after);
      load<M>(cells, from + c);
      store<M>(at.cells + to, cells);
    }
  }
}

template <class M>
MMFAST_INLINE void run_space(const Job& job, const TedView& view, int64_t first, int64_t columns, const Desk& at,
                             const Shares& shares) {
  using Floats = typename M::Floats;
  const int64_t sites = view.sites, plane = (sites + 1) * M::kWidth, planes = columns / M::kWidth;
  std::fill_n(at.total, planes * plane, 0.0f);
  for (int64_t v = 0; v < planes; ++v) {
    store<M>(at.change + v * plane + sites * M::kWidth, Floats{});
    store<M>(at.cells + v * plane + sites * M::kWidth, Floats{});
  }
  for (int64_t t = 0; t < job.frames; ++t) {
    stage<M>(job, view, t, first, columns, at);
    for (int64_t v = 0; v < planes; ++v) {
      const int64_t c = first + v * M::kWidth;
      const float *const change = at.change + v * plane, *const cells = at.cells + v * plane;
      float* to = job.dh + (view.row + t * sites) * job.width + job.p.time_width + c;
      Floats tap[9], sum[9], near, own;
#pragma GCC unroll 9
      for (int k = 0; k < 9; ++k) {
        load<M>(tap[k], job.space_taps + (8 - k) * job.p.space_width + c);
        load<M>(sum[k], shares.at + k * shares.width + c);
      }
      const int32_t* place = view.places;
      for (int64_t i = 0; i < sites; ++i, place += 9, to += job.width) {
        Floats value{};
        load<M>(own, change + i * M::kWidth);
#pragma GCC unroll 9
        for (int k = 0; k < 9; ++k) {
          const int64_t there = place[k] * M::kWidth;
          load<M>(near, change + there);
          value += tap[k] * near;
          load<M>(near, cells + there);
          sum[k] += own * near;
        }
        store<M>(to, value);
      }
#pragma GCC unroll 9
      for (int k = 0; k < 9; ++k) store<M>(shares.at + k * shares.width + c, sum[k]);
    }
  }
  for (int64_t v = 0; v < planes; ++v) {
    for (int k = 0; k < 9; ++k) {
      float* const share = shares.at + (9 + k) * shares.width + first + v * M::kWidth;
      Floats sum, own;
      load<M>(sum, share);
      for (int64_t i = 0; i < sites; ++i) {
        if (view.places[i * 9 + k] == sites) continue;
        load<M>(own, at.total + v * plane + i * M::kWidth);
        sum += own;
      }
      store<M>(share, sum);
    }
  }
}

template <class M>
MMFAST_INLINE void run_block(const Job& job, const TedView& view, const TedBlock& block, const Desk& at,
                             const Shares& shares) {
  const int64_t whole = block.columns / M::kWidth * M::kWidth, rest = block.columns - whole;
  if (block.space) {
    run_space<M>(job, view, block.first, whole, at, shares);
    if (rest) run_space<SingleFloat>(job, view, block.first + whole, rest, at, shares);
  } else {
    run_time<M>(job, view, block.first, whole, shares);
    if (rest) run_time<SingleFloat>(job, view, block.first + whole, rest, shares);
  }
}

using Run = void (*)(const Job&, const TedView&, const TedBlock&, const Desk&, const Shares&);

void run_16(const Job& job, const TedView& view, const TedBlock& block, const Desk& at, const Shares& shares) {
  run_block<Vectors<16>>(job, view, block, at, shares);
}
#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) void run_32(const Job& job, const TedView& view, const TedBlock& block,
                                                const Desk& at, const Shares& shares) {
  run_block<Vectors<32>>(job, view, block, at, shares);
}
__attribute__((target("avx512f,fma"))) void run_64(const Job& job, const TedView& view, const TedBlock& block,
                                                   const Desk& at, const Shares& shares) {
  run_block<Vectors<64>>(job, view, block, at, shares);
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

// Groups are added in their order, so that the result is always the same.
std::vector<float> joined(const std::vector<float>& shares, int64_t groups) {
  const int64_t each = static_cast<int64_t>(shares.size()) / groups;
  std::vector<float> sums(shares.begin(), shares.begin() + each);
  for (int64_t g = 1; g < groups; ++g) {
    for (int64_t i = 0; i < each; ++i) sums[i] += shares[g * each + i];
  }
  return sums;
}

void write_gradients(const TedParameters& p, const std::vector<float>& time, const std::vector<float>& space,
                     const TedGradients& to) {
  for (int64_t c = 0; c < p.time_width; ++c) {
    for (int64_t k = 0; k < 3; ++k) to.time_taps[c * 3 + k] = time[k * p.time_width + c];
    to.time_bias[c] = time[3 * p.time_width + c];
    to.time_shift[c] = time[4 * p.time_width + c];
  }
  for (int64_t c = 0; c < p.space_width; ++c) {
    float shift = 0.0f;
    for (int64_t k = 0; k < 9; ++k) {
      const float total = space[(9 + k) * p.space_width + c];
      to.space_taps[c * 9 + k] = space[k * p.space_width + c] + p.space_shift[c] * total;
      shift += p.space_taps[c * 9 + k] * total;
    }
    to.space_shift[c] = shift;
    to.space_bias[c] = space[(9 + 4) * p.space_width + c];
  }
}

}  // namespace

void ted_stencil_backward(const float* dout, const float* h, const TedSites& sites, const TedParameters& parameters,
                          float* dh, const TedGradients& gradients, int threads, int widest) {
  const TedViews views(sites);
  const std::vector<TedBlock> blocks = ted_blocks(parameters);
  const int64_t count = views.all.size(), groups = std::clamp<int64_t>(count, 1, kGroups);
  std::vector<float> time(groups * kTimeSums * parameters.time_width);
  std::vector<float> space(groups * kSpaceSums * parameters.space_width);
  if (count > 0 && sites.frames > 0) {
    const std::vector<float> time_taps = by_tap(parameters.time_taps, parameters.time_width, 3);
    const std::vector<float> space_taps = by_tap(parameters.space_taps, parameters.space_width, 9);
    const Job job{dout, h, dh, parameters.width(), sites.frames, parameters, time_taps.data(), space_taps.data()};
    const Run run = run_for(widest);
    const int64_t planes = (views.most_sites + 1) * kTedColumns, elements = sites.rows() * parameters.width();
    const int64_t items = groups * blocks.size();
    share_out(items, 3 * planes, elements, threads, [&](int64_t item, float* desk) {
      const int64_t group = item / blocks.size();
      const TedBlock& block = blocks[item % blocks.size()];
      const Desk at{desk, desk + planes, desk + 2 * planes};
      const int64_t width = block.space ? parameters.space_width : parameters.time_width;
      float* const sums =
          block.space ? space.data() + group * kSpaceSums * width : time.data() + group * kTimeSums * width;
      const Shares shares{sums, width};
      for (int64_t v = group * count / groups; v < (group + 1) * count / groups; ++v) {
        run(job, views.all[v], block, at, shares);
      }
    });
  }
  write_gradients(parameters, joined(time, groups), joined(space, groups), gradients);
}

}  // namespace mmfast
