// Pixels of kept tokens, one row a token, in the order (c, dt, dy, dx) in which a patch embedding's weight is
// flattened.
#pragma once

#include <cstdint>

namespace mmfast {

enum class Pixel : int { u8 = 0, f32 = 1 };

struct Video {
  const void* data;
  Pixel type;
  int64_t size[5];    // B, C, F, H, W
  int64_t stride[5];  // in elements, any
};

struct Tubes {
  const int32_t* token;  // [count] id = (slot*h + y)*w + x over the grid (F/tubelet, H/patch, W/patch)
  const int32_t* clip;   // [count]
  int64_t count;
  int32_t tubelet;
  int32_t patch;
};

struct Rows {
  void* data;          // [count, C*tubelet*patch*patch]
  Pixel type;          // u8 only from u8
  const float* scale;  // [C] or null. value = pixel*scale[c] + shift[c], rounded after each of the two operations
  const float* shift;  // [C] or null together with scale: the pixel as it is
};

// The ids over F, H, W that one clip has.
struct Grid {
  int32_t h, w, tokens;
  Grid(const Video& video, const Tubes& tubes)
      : h(static_cast<int32_t>(video.size[3] / tubes.patch)),
        w(static_cast<int32_t>(video.size[4] / tubes.patch)),
        tokens(static_cast<int32_t>(video.size[2] / tubes.tubelet) * h * w) {}
};

// Throws std::invalid_argument, before it writes, where an id or a clip is out of range.
void gather_tubes(const Video& video, const Tubes& tubes, const Rows& rows, int threads);

#ifdef MMFAST_WITH_CUDA
// The same values on the device; enqueues on `stream` and returns. The video may lie in pinned host memory. Ids are not
// read back, so one out of range gives a row of NaN (of zeros where rows are u8) instead of an exception.
void gather_tubes_cuda(const Video& video, const Tubes& tubes, const Rows& rows, void* stream);
#endif

}  // namespace mmfast
