// The stencil of a TED-Adapter and its backward. A thread has one site and 16 bytes of a row's columns, and walks over
// the frames, so that its taps and the places of its neighbours stay in registers.
//
// The parameters' gradients are sums over all rows: a fixed number of groups of sites each write theirs, and a last
// kernel adds the groups in their order, so that the result is always the same.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../ted.h"
#include "launch.h"

namespace mmfast {
namespace {

constexpr int kThreads = 128;
constexpr int kTimeSums = 5, kSpaceSums = 18;

__device__ int64_t width_of(const TedParameters& p) {
  return p.time_width + p.space_width;
}

template <class T, int kItems>
struct alignas(sizeof(T) * kItems) Piece {
  T item[kItems];
};

__device__ float wide(float x) {
  return x;
}
__device__ float wide(__half x) {
  return __half2float(x);
}
__device__ float wide(__nv_bfloat16 x) {
  return __bfloat162float(x);
}
__device__ void narrow(float x, float& to) {
  to = x;
}
__device__ void narrow(float x, __half& to) {
  to = __float2half_rn(x);
}
__device__ void narrow(float x, __nv_bfloat16& to) {
  to = __float2bfloat16_rn(x);
}

// kItems neighbouring columns in fp32.
template <int kItems>
struct Columns {
  float at[kItems];

  __device__ Columns() {
    for (int i = 0; i < kItems; ++i) at[i] = 0.0f;
  }
  template <class T>
  __device__ void load(const T* from) {
    const Piece<T, kItems> piece = *reinterpret_cast<const Piece<T, kItems>*>(from);
    for (int i = 0; i < kItems; ++i) at[i] = wide(piece.item[i]);
  }
  template <class T>
  __device__ void store(T* to) const {
    Piece<T, kItems> piece;
    for (int i = 0; i < kItems; ++i) narrow(at[i], piece.item[i]);
    *reinterpret_cast<Piece<T, kItems>*>(to) = piece;
  }
  __device__ void add(const Columns& x) {
    for (int i = 0; i < kItems; ++i) at[i] += x.at[i];
  }
  __device__ void add_product(const Columns& x, const Columns& y) {
    for (int i = 0; i < kItems; ++i) at[i] = fmaf(x.at[i], y.at[i], at[i]);
  }
  __device__ void subtract(const Columns& x) {
    for (int i = 0; i < kItems; ++i) at[i] -= x.at[i];
  }
};

// Where a thread works: which site of which copy, and which columns of which branch.
struct Place {
  const int32_t* site;
  int64_t row, step;  // the site's first row, and rows from frame to frame
  int64_t column;     // in the branch
  bool space;
};

template <int kItems>
__device__ bool place_of(int64_t index, const TedSites& sites, const TedParameters& p, Place& place) {
  const int64_t time_pieces = p.time_width / kItems, pieces = width_of(p) / kItems;
  const int64_t piece = index % pieces, u = index / pieces;
  if (u >= sites.count * sites.copies) return false;
  place.site = sites.table + u % sites.count * kSiteWords;
  place.step = place.site[kSiteStep];
  place.row = place.site[kSiteFirst] + u / sites.count * sites.count * sites.frames;
  place.space = piece >= time_pieces;
  place.column = (place.space ? piece - time_pieces : piece) * kItems;
  return true;
}

template <class T, int kItems>
__device__ void around(const T* from, int64_t width, const int32_t (&away)[9], const Columns<kItems> (&taps)[9],
                       Columns<kItems>& sum) {
#pragma unroll
  for (int k = 0; k < 9; ++k) {
    if (away[k] == kNoSite) continue;
    Columns<kItems> near;
    near.load(from + away[k] * width);
    sum.add_product(taps[k], near);
  }
}

template <class T, int kItems>
__device__ void run_time(const T* from, T* to, const Place& place, const TedSites& sites, const TedParameters& p,
                         bool backward) {
  using Some = Columns<kItems>;
  const int64_t width = width_of(p);
  Some tap[3], bias, shift, before, here, after;
#pragma unroll
  for (int k = 0; k < 3; ++k) tap[k].load(p.time_taps + (backward ? 2 - k : k) * p.time_width + place.column);
  if (!backward) {
    bias.load(p.time_bias + place.column);
    shift.load(p.time_shift + place.column);
  }
  from += place.row * width + place.column;
  to += place.row * width + place.column;
  here.load(from);
  here.add(shift);
  for (int64_t t = 0; t < sites.frames; ++t) {
    after = Some();
    if (t + 1 < sites.frames) {
      from += place.step * width;
      after.load(from);
      after.add(shift);
    }
    Some value = bias;
    value.add_product(tap[0], before);
    value.add_product(tap[1], here);
    value.add_product(tap[2], after);
    value.store(to);
    to += place.step * width;
    before = here;
    here = after;
  }
}

// Forward: what nine taps give of frame t less what they gave of the frame before, plus what the added bias comes to.
// Backward: what they give, turned around, of frame t (not of the first) less of the frame behind it.
template <class T, int kItems>
__device__ void run_space(const T* from, T* to, const Place& place, const TedSites& sites, const TedParameters& p,
                          bool backward) {
  using Some = Columns<kItems>;
  const int64_t width = width_of(p), start = place.row * width + p.time_width + place.column, step = place.step * width;
  Some tap[9], constant, before, here;
  int32_t away[9];
#pragma unroll
  for (int k = 0; k < 9; ++k) {
    away[k] = place.site[k];
    tap[k].load(p.space_taps + (backward ? 8 - k : k) * p.space_width + place.column);
  }
  from += start;
  to += start;
  if (backward) {
    for (int64_t t = 0; t < sites.frames; ++t, to += step) {
      here = Some();
      from += step;
      if (t + 1 < sites.frames) around(from, width, away, tap, here);
      before.subtract(here);
      before.store(to);
      before = here;
    }
    return;
  }
  if (away[4] != kNoSite) {
    Some shift;
    shift.load(p.space_shift + place.column);
    constant.load(p.space_bias + place.column);
#pragma unroll
    for (int k = 0; k < 9; ++k) {
      if (away[k] != kNoSite) constant.add_product(tap[k], shift);
    }
  }
  for (int64_t t = 0; t < sites.frames; ++t, from += step, to += step) {
    here = Some();
    around(from, width, away, tap, here);
    Some value = constant;
    if (t > 0) {
      value.add(here);
      value.subtract(before);
    }
    value.store(to);
    before = here;
  }
}

template <class T, int kItems>
__global__ void __launch_bounds__(kThreads)
    rows_kernel(const T* from, const TedSites sites, const TedParameters p, T* to, const bool backward) {
  Place place;
  if (!place_of<kItems>(int64_t{blockIdx.x} * kThreads + threadIdx.x, sites, p, place)) return;
  if (place.space) {
    run_space<T, kItems>(from, to, place, sites, p, backward);
  } else {
    run_time<T, kItems>(from, to, place, sites, p, backward);
  }
}

// Group blockIdx.x has every gridDim.x-th site. A thread has kItems columns of all of the group's sites; its sums are
// row after row of the group's partials [5, time_width] and [18, space_width].
template <class T, int kItems>
__global__ void __launch_bounds__(kThreads, 3)
    sums_kernel(const T* dout, const T* h, const TedSites sites, const TedParameters p, float* partials) {
  using Some = Columns<kItems>;
  const int64_t pieces = width_of(p) / kItems, piece = int64_t{blockIdx.y} * kThreads + threadIdx.x;
  if (piece >= pieces) return;
  const int64_t width = width_of(p);
  float* const time = partials + blockIdx.x * (kTimeSums * p.time_width);
  float* const space = partials + gridDim.x * (kTimeSums * p.time_width) + blockIdx.x * (kSpaceSums * p.space_width);
  Place place;
  if (piece * kItems < p.time_width) {
    Some sum[kTimeSums], tap[3], shift;
    for (int64_t u = blockIdx.x; place_of<kItems>(u * pieces + piece, sites, p, place); u += gridDim.x) {
      shift.load(p.time_shift + place.column);
#pragma unroll
      for (int k = 0; k < 3; ++k) tap[k].load(p.time_taps + k * p.time_width + place.column);
      int64_t at = place.row * width + place.column;
      Some before, here, after, h_before, h_here, h_after;
      here.load(dout + at);
      h_here.load(h + at);
      h_here.add(shift);
      for (int64_t t = 0; t < sites.frames; ++t) {
        after = h_after = Some();
        at += place.step * width;
        if (t + 1 < sites.frames) {
          after.load(dout + at);
          h_after.load(h + at);
          h_after.add(shift);
        }
        sum[0].add_product(here, h_before);
        sum[1].add_product(here, h_here);
        sum[2].add_product(here, h_after);
        sum[3].add(here);
        sum[4].add_product(tap[0], after);
        sum[4].add_product(tap[1], here);
        sum[4].add_product(tap[2], before);
        before = here;
        here = after;
        h_before = h_here;
        h_here = h_after;
      }
    }
#pragma unroll
    for (int k = 0; k < kTimeSums; ++k) sum[k].store(time + k * p.time_width + piece * kItems);
    return;
  }
  Some sum[9], count[9];
  for (int64_t u = blockIdx.x; place_of<kItems>(u * pieces + piece, sites, p, place); u += gridDim.x) {
    if (place.site[4] == kNoSite) continue;
    int64_t at = place.row * width + p.time_width + place.column;
    Some total, here, after;
    here.load(dout + at);
    for (int64_t t = 0; t < sites.frames; ++t) {
      after = Some();
      if (t + 1 < sites.frames) after.load(dout + at + place.step * width);
      total.add(here);
      Some change;
      if (t > 0) change = here;
      change.subtract(after);
#pragma unroll
      for (int k = 0; k < 9; ++k) {
        const int32_t away = place.site[k];
        if (away == kNoSite) continue;
        Some near;
        near.load(h + at + away * width);
        sum[k].add_product(change, near);
      }
      here = after;
      at += place.step * width;
    }
#pragma unroll
    for (int k = 0; k < 9; ++k) {
      if (place.site[k] != kNoSite) count[k].add(total);
    }
  }
  float* const mine = space + piece * kItems - p.time_width;
#pragma unroll
  for (int k = 0; k < 9; ++k) {
    sum[k].store(mine + k * p.space_width);
    count[k].store(mine + (9 + k) * p.space_width);
  }
}

__device__ float joined(const float* partials, int64_t each, int64_t groups) {
  float sum = 0.0f;
  for (int64_t g = 0; g < groups; ++g) sum += partials[g * each];
  return sum;
}

__global__ void __launch_bounds__(kThreads)
    join_kernel(const float* partials, const int64_t groups, const TedParameters p, const TedGradients to) {
  const int64_t c = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (c < p.time_width) {
    const int64_t each = kTimeSums * p.time_width;
    for (int k = 0; k < 3; ++k) to.time_taps[c * 3 + k] = joined(partials + k * p.time_width + c, each, groups);
    to.time_bias[c] = joined(partials + 3 * p.time_width + c, each, groups);
    to.time_shift[c] = joined(partials + 4 * p.time_width + c, each, groups);
  } else if (c < width_of(p)) {
    const int64_t column = c - p.time_width, each = kSpaceSums * p.space_width;
    const float* const space = partials + groups * kTimeSums * p.time_width + column;
    float shift = 0.0f;
    for (int k = 0; k < 9; ++k) {
      const float count = joined(space + (9 + k) * p.space_width, each, groups);
      const float sum = joined(space + k * p.space_width, each, groups);
      to.space_taps[column * 9 + k] = fmaf(p.space_shift[column], count, sum);
      shift = fmaf(p.space_taps[k * p.space_width + column], count, shift);
      if (k == 4) to.space_bias[column] = count;
    }
    to.space_shift[column] = shift;
  }
}

template <int kItems>
bool fits(const TedParameters& p, std::initializer_list<const void*> rows, int size) {
  if (p.time_width % kItems != 0 || p.space_width % kItems != 0) return false;
  for (const void* at : rows) {
    if (reinterpret_cast<uintptr_t>(at) % (kItems * size) != 0) return false;
  }
  for (const void* at : {p.time_shift, p.time_taps, p.time_bias, p.space_shift, p.space_taps, p.space_bias}) {
    if (reinterpret_cast<uintptr_t>(at) % (kItems * sizeof(float)) != 0) return false;
  }
  return true;
}

template <class T, int kItems>
void launch_rows(const void* from, const TedSites& sites, const TedParameters& p, void* to, bool backward,
                 cudaStream_t stream) {
  const int64_t pieces = sites.count * sites.copies * (p.width() / kItems);
  rows_kernel<T, kItems><<<blocks(ceil_div(pieces, kThreads)), kThreads, 0, stream>>>(
      static_cast<const T*>(from), sites, p, static_cast<T*>(to), backward);
  check_launch("ted_stencil");
}

// call(T(), std::integral_constant<int, items>()): 16 bytes of a row a thread, or one column where that does not fit.
template <class Call>
void with_type(TedType type, const TedParameters& p, std::initializer_list<const void*> rows, const Call& call) {
  const auto widest = [&](auto zero) {
    constexpr int kItems = 16 / sizeof(zero);
    if (fits<kItems>(p, rows, sizeof(zero))) {
      call(zero, std::integral_constant<int, kItems>());
    } else {
      call(zero, std::integral_constant<int, 1>());
    }
  };
  if (type == TedType::f32) return widest(float());
  if (type == TedType::f16) return widest(__half());
  widest(__nv_bfloat16());
}

}  // namespace

void ted_stencil_cuda(const void* h, TedType type, const TedSites& sites, const TedParameters& parameters, void* out,
                      void* stream) {
  if (sites.rows() == 0 || parameters.width() == 0) return;
  with_type(type, parameters, {h, out}, [&](auto zero, auto items) {
    launch_rows<decltype(zero), items>(h, sites, parameters, out, false, static_cast<cudaStream_t>(stream));
  });
}

void ted_stencil_backward_cuda(const void* dout, const void* h, TedType type, const TedSites& sites,
                               const TedParameters& parameters, void* dh, const TedGradients* gradients,
                               float* partials, int64_t groups, void* stream) {
  if (sites.rows() == 0 || parameters.width() == 0) return;
  const auto on = static_cast<cudaStream_t>(stream);
  with_type(type, parameters, {dout, h, dh, partials}, [&](auto zero, auto items) {
    using T = decltype(zero);
    launch_rows<T, items>(dout, sites, parameters, dh, true, on);
    if (!gradients) return;
    // Sums take 4 columns a thread, so that all of them stay in registers.
    constexpr int kItems = items < 4 ? items : 4;
    const dim3 grid(blocks(groups), blocks(ceil_div(parameters.width() / kItems, kThreads)));
    sums_kernel<T, kItems>
        <<<grid, kThreads, 0, on>>>(static_cast<const T*>(dout), static_cast<const T*>(h), sites, parameters, partials);
    check_launch("ted_stencil_backward");
    join_kernel<<<blocks(ceil_div(parameters.width(), kThreads)), kThreads, 0, on>>>(partials, groups, parameters,
                                                                                     *gradients);
    check_launch("ted_stencil_backward");
  });
}

}  // namespace mmfast
