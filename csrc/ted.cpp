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

constexpr int64_t kRowsAhead = 8;  // no hardware prefetcher follows pieces of rows

// A site's frames one after another, kWide vectors at a time: each row is read once, the next site's called for
// meanwhile.
template <class M, int kWide>
MMFAST_INLINE void run_time(const Job& job, const TedView& view, int64_t c) {
  using Floats = typename M::Floats;
  const int64_t step = view.sites * job.width;
  Floats tap[3][kWide], bias[kWide], shift[kWide];
#pragma GCC unroll 8
  for (int v = 0; v < kWide; ++v) {
    const int64_t at = c + v * M::kWidth;
#pragma GCC unroll 3
    for (int k = 0; k < 3; ++k) load<M>(tap[k][v], job.time_taps + k * job.p.time_width + at);
    load<M>(bias[v], job.p.time_bias + at);
    load<M>(shift[v], job.p.time_shift + at);
  }
  for (int64_t i = 0; i < view.sites; ++i) {
    const float* from = job.h + (view.row + i) * job.width + c;
    float* to = job.out + (view.row + i) * job.width + c;
    const int64_t ahead = i + 1 < view.sites ? job.width : 0;
    Floats before[kWide]{}, here[kWide];
#pragma GCC unroll 8
    for (int v = 0; v < kWide; ++v) {
      load<M>(here[v], from + v * M::kWidth);
      here[v] += shift[v];
    }
    for (int64_t t = 1; t < job.frames; ++t, from += step, to += step) {
#pragma GCC unroll 8
      for (int v = 0; v < kWide; ++v) {
        Floats after;
        load<M>(after, from + step + v * M::kWidth);
        __builtin_prefetch(from + step + ahead + v * M::kWidth);
        after += shift[v];
        store<M>(to + v * M::kWidth, bias[v] + tap[0][v] * before[v] + tap[1][v] * here[v] + tap[2][v] * after);
        before[v] = here[v];
        here[v] = after;
      }
    }
#pragma GCC unroll 8
    for (int v = 0; v < kWide; ++v) {
      store<M>(to + v * M::kWidth, bias[v] + tap[0][v] * before[v] + tap[1][v] * here[v]);
    }
  }
}

// What one thread works in, for a frame of a block: planes [sites + 1][kTedColumns].
struct Desk {
  float *differences, *before;  // before: h of the frame before, which out may have taken the place of
};

template <class M>
MMFAST_INLINE void stage(const Job& job, const TedView& view, int64_t t, int64_t first, int64_t columns,
                         const Desk& at) {
  const float* from = job.h + (view.row + t * view.sites) * job.width + job.p.time_width + first;
  const float* const shift = job.p.space_shift + first;
  float *to = at.differences, *before = at.before;
  for (int64_t i = 0; i < view.sites; ++i, from += job.width, to += kTedColumns, before += kTedColumns) {
    const int64_t ahead = std::min(kRowsAhead, view.sites - 1 - i) * job.width;
    for (int64_t c = 0; c < columns; c += M::kWidth) {
      typename M::Floats value, here, past;
      load<M>(value, shift + c);
      load<M>(here, from + c);
      __builtin_prefetch(from + ahead + c);
      if (t > 0) {
        load<M>(past, before + c);
        value += here - past;
      }
      store<M>(before + c, here);
      store<M>(to + c, value);
    }
  }
}

// kWide vectors together, so that a site's places are read once for all of them.
template <class M, int kWide>
MMFAST_INLINE void around(const Job& job, const TedView& view, int64_t t, int64_t first, int64_t c, const Desk& at) {
  using Floats = typename M::Floats;
  const float* const from = at.differences + c;
  float* to = job.out + (view.row + t * view.sites) * job.width + job.p.time_width + first + c;
  Floats tap[9][kWide], bias[kWide];
#pragma GCC unroll 4
  for (int v = 0; v < kWide; ++v) {
    const int64_t column = first + c + v * M::kWidth;
#pragma GCC unroll 9
    for (int k = 0; k < 9; ++k) load<M>(tap[k][v], job.space_taps + k * job.p.space_width + column);
    load<M>(bias[v], job.p.space_bias + column);
  }
  const int32_t* place = view.places;
  for (int64_t i = 0; i < view.sites; ++i, place += 9, to += job.width) {
    Floats sum[kWide];
#pragma GCC unroll 4
    for (int v = 0; v < kWide; ++v) sum[v] = bias[v];
#pragma GCC unroll 9
    for (int k = 0; k < 9; ++k) {
      const float* const near = from + place[k] * kTedColumns;
#pragma GCC unroll 4
      for (int v = 0; v < kWide; ++v) {
        Floats value;
        load<M>(value, near + v * M::kWidth);
        sum[v] += tap[k][v] * value;
      }
    }
    const bool outside = place[4] == view.sites;
#pragma GCC unroll 4
    for (int v = 0; v < kWide; ++v) store<M>(to + v * M::kWidth, outside ? Floats{} : sum[v]);
  }
}

template <class M>
MMFAST_INLINE void run_space(const Job& job, const TedView& view, int64_t first, int64_t columns, const Desk& at) {
  constexpr int kWide = M::kWidth == 16 ? 2 : 1;  // as many as have registers
  for (int64_t c = 0; c < columns; ++c) at.differences[view.sites * kTedColumns + c] = 0.0f;
  for (int64_t t = 0; t < job.frames; ++t) {
    stage<M>(job, view, t, first, columns, at);
    int64_t c = 0;
    for (; c + kWide * M::kWidth <= columns; c += kWide * M::kWidth) around<M, kWide>(job, view, t, first, c, at);
    for (; c < columns; c += M::kWidth) around<M, 1>(job, view, t, first, c, at);
  }
}

template <class M>
MMFAST_INLINE void run_block(const Job& job, const TedView& view, const TedBlock& block, const Desk& at) {
  const int64_t whole = block.columns / M::kWidth * M::kWidth, rest = block.columns - whole;
  if (block.space) {
    run_space<M>(job, view, block.first, whole, at);
    if (rest) run_space<SingleFloat>(job, view, block.first + whole, rest, at);
  } else {
    constexpr int kWide = M::kWidth == 16 ? 4 : 1;
    int64_t c = 0;
    for (; c + kWide * M::kWidth <= whole; c += kWide * M::kWidth) run_time<M, kWide>(job, view, block.first + c);
    for (; c < whole; c += M::kWidth) run_time<M, 1>(job, view, block.first + c);
    for (; c < block.columns; ++c) run_time<SingleFloat, 1>(job, view, block.first + c);
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
