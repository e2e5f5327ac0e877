// The stencil of a TED-Adapter between its two products, and its backward: fp32.
//
// Rows lie [copy][view][frame][site]: a view's sites, an optional class token and then its kept cells, repeat in every
// frame. The first time_width columns of a row get three taps over the frames; of the others, the difference to the
// frame before is taken, plus a bias, and then nine taps over the cells around. kernels/mmfast_kernels/ted.py has the
// equations.
#pragma once

#include <cstdint>

namespace mmfast {

// What the table says of a site, kSiteWords numbers: the distance in rows to each of the 3 x 3 cells around, itself the
// fifth, or kNoSite; the row it has in the first frame of the first copy; and how many rows a frame of its view has.
constexpr int64_t kSiteWords = 12, kSiteFirst = 9, kSiteStep = 10;
constexpr int32_t kNoSite = INT32_MIN;

struct TedSites {
  const int32_t* table;  // [count, kSiteWords], view by view
  int64_t count, frames, copies;

  int64_t rows() const { return count * frames * copies; }
};

struct TedParameters {
  int64_t time_width, space_width;
  const float* time_shift;   // [time_width], added before the taps
  const float* time_taps;    // [time_width, 3]
  const float* time_bias;    // [time_width]
  const float* space_shift;  // [space_width], added to the difference
  const float* space_taps;   // [space_width, 9]
  const float* space_bias;   // [space_width]

  int64_t width() const { return time_width + space_width; }
};

struct TedGradients {
  float *time_shift, *time_taps, *time_bias, *space_shift, *space_taps, *space_bias;
};

// out: [rows, width], which may be h itself. Throws std::invalid_argument, before it writes, for a table that is not as
// above. The result does not depend on `threads`. widest: the most bytes a vector register may have.
void ted_stencil(const float* h, const TedSites& sites, const TedParameters& parameters, float* out, int threads,
                 int widest = 64);

// From dout [rows, width] the gradients of h, [rows, width], which may take dout's place, and of the parameters. The
// rest as above.
void ted_stencil_backward(const float* dout, const float* h, const TedSites& sites, const TedParameters& parameters,
                          float* dh, const TedGradients& gradients, int threads, int widest = 64);

#ifdef MMFAST_WITH_CUDA
enum class TedType : int { f32 = 0, f16 = 1, bf16 = 2 };

// The same on the device, rows of the given type, parameters fp32 with the taps one after another ([3, time_width] and
// [9, space_width]); enqueued on `stream`. The table is not checked.
void ted_stencil_cuda(const void* h, TedType type, const TedSites& sites, const TedParameters& parameters, void* out,
                      void* stream);

// gradients: null where they are not wanted. partials: [groups * (5*time_width + 18*space_width)], to work in; the
// result depends on `groups` and on nothing else beside the input.
void ted_stencil_backward_cuda(const void* dout, const void* h, TedType type, const TedSites& sites,
                               const TedParameters& parameters, void* dh, const TedGradients* gradients,
                               float* partials, int64_t groups, void* stream);
#endif

}  // namespace mmfast
