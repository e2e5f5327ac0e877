#include "ted.h"

#include "ted_views.h"

namespace mmfast {
namespace {

struct Job {
  const float* h;
  float* out;
  int64_t width, frames;
  const TedParameters& p;
  const float *time_taps, *space_taps;  // [3, time_width] and [9, space_width]
};

// A site's frames one after another: each row is read once.
template <class M>
MMFAST_INLINE void run_time(const Job& job, const TedView& view, int64_t first, int64_t columns) {
  using Floats = typename M::Floats;
  const int64_t step = view.sites * job.width;
  for (int64_t i = 0; i < view.sites; ++i) {
    for (int64_t c = first; c < first + columns; c += M::kWidth) {
      const float* from = job.h + (view.row + i) * job.width + c;
      float* to = job.out + (view.row + i) * job.width + c;
      Floats tap[3], bias, shift, before{}, here, after;
#pragma GCC unroll 3
      for (int k = 0; k < 3; ++k) load<M>(tap[k], job.time_taps + k * job.p.time_width + c);
      load<M>(bias, job.p.time_bias + c);
      load<M>(shift, job.p.time_shift + c);
      load<M>(here, from);
      here += shift;
      for (int64_t t = 1; t < job.frames; ++t, from += step, to += step) {
        load<M>(after, from + step);
        after += shift;
        store<M>(to, bias + tap[0] * before + tap[1] * here + tap[2] * after);
        before = here;
        here = after;
      }
      store<M>(to, bias + tap[0] * before + tap[1] * here);
    }
  }
}

// What one thread works in, for a frame of a block: planes [vector][sites + 1][lanes].
struct Desk {
  float *differences, *before;  // before: h of the frame before, which out may have taken the place of
};

template <class M>
MMFAST_INLINE void stage(const Job& job, const TedView& view, int64_t t, int64_t first, int64_t columns,
                         const Desk& at) {
  const int64_t plane = (view.sites + 1) * M::kWidth;
  const float* from = job.h + (view.row + t * view.sites) * job.width + job.p.time_width + first;
  for (int64_t i = 0; i < view.sites; ++i, from += job.width) {
    for (int64_t c = 0; c < columns; c += M::kWidth) {
      const int64_t to = c / M::kWidth * plane + i * M::kWidth;
      typename M::Floats value, here, before;
      load<M>(value, job.p.space_shift + first + c);
      load<M>(here, from + c);
      if (t > 0) {
        load<M>(before, at.before + to);
        value += here - before;
      }
      store<M>(at.before + to, here);
      store<M>(at.differences + to, value);
    }
  }
}

template <class M>
MMFAST_INLINE void run_space(const Job& job, const TedView& view, int64_t first, int64_t columns, const Desk& at) {
  using Floats = typename M::Floats;
  const int64_t sites = view.sites, plane = (sites + 1) * M::kWidth;
  for (int64_t c = 0; c < columns; c += M::kWidth) {
    store<M>(at.differences + c / M::kWidth * plane + sites * M::kWidth, Floats{});
  }
  for (int64_t t = 0; t < job.frames; ++t) {
    stage<M>(job, view, t, first, columns, at);
    for (int64_t c = 0; c < columns; c += M::kWidth) {
      const float* const from = at.differences + c / M::kWidth * plane;
      float* to = job.out + (view.row + t * sites) * job.width + job.p.time_width + first + c;
      Floats tap[9], bias, near;
#pragma GCC unroll 9
      for (int k = 0; k < 9; ++k) load<M>(tap[k], job.space_taps + k * job.p.space_width + first + c);
      load<M>(bias, job.p.space_bias + first + c);
      const int32_t* place = view.places;
      for (int64_t i = 0; i < sites; ++i, place += 9, to += job.width) {
        Floats sum = bias;
#pragma GCC unroll 9
        for (int k = 0; k < 9; ++k) {
          load<M>(near, from + place[k] * M::kWidth);
          sum += tap[k] * near;
        }
        store<M>(to, place[4] == sites ? Floats{} : sum);
      }
    }
  }
}

template <class M>
MMFAST_INLINE void run_block(const Job& job, const TedView& view, const TedBlock& block, const Desk& at) {
  const int64_t whole = block.columns / M::kWidth * M::kWidth, rest = block.columns - whole;
  if (block.space) {
    run_space<M>(job, view, block.first, whole, at);
    if (rest) run_space<SingleFloat>(job, view, block.first + whole, rest, at);
  } else {
    run_time<M>(job, view, block.first, whole);
    if (rest) run_time<SingleFloat>(job, view, block.first + whole, rest);
  }
}

using Run = void (*)(const Job&, const TedView&, const TedBlock&, const Desk&);

void run_16(const Job& job, const TedView& view, const TedBlock& block, const Desk& at) {
  run_block<Vectors<16>>(job, view, block, at);
}
#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) void run_32(const Job& job, const TedView& view, const TedBlock& block,
                                                const Desk& at) {
  run_block<Vectors<32>>(job, view, block, at);
}
__attribute__((target("avx512f,fma"))) void run_64(const Job& job, const TedView& view, const TedBlock& block,
                                                   const Desk& at) {
  run_block<Vectors<64>>(job, view, block, at);
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

}  // namespace

void ted_stencil(const float* h, const TedSites& sites, const TedParameters& parameters, float* out, int threads,
                 int widest) {
  const TedViews views(sites);
  const std::vector<TedBlock> blocks = ted_blocks(parameters);
  const int64_t items = views.all.size() * blocks.size();
  if (items == 0 || sites.frames == 0) return;
  const std::vector<float> time_taps = by_tap(parameters.time_taps, parameters.time_width, 3);
  const std::vector<float> space_taps = by_tap(parameters.space_taps, parameters.space_width, 9);
  const Job job{h, out, parameters.width(), sites.frames, parameters, time_taps.data(), space_taps.data()};
  const Run run = run_for(widest);
  const int64_t planes = (views.most_sites + 1) * kTedColumns;
  share_out(items, 2 * planes, sites.rows() * parameters.width(), threads, [&](int64_t item, float* desk) {
    run(job, views.all[item / blocks.size()], blocks[item % blocks.size()], {desk, desk + planes});
  });
}

}  // namespace mmfast
