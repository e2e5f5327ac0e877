#include "gather.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "gather_token.h"
#include "team.h"

// One build for every x86-64 processor: the loader picks the widest copy of a function that this one can run.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__) && \
    !defined(__SANITIZE_THREAD__)
#define MMFAST_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define MMFAST_CLONES
#endif

namespace mmfast {
namespace {

constexpr int64_t kTokensAhead = 3;
constexpr int64_t kPixelsAThread = 128 * 1024;
constexpr int64_t kCachedBytes = 1 << 20;  // of rows: more than a core's own cache keeps until they are read
constexpr int64_t kPage = 4096;

template <class In>
MMFAST_INLINE const In* first_pixel(const Job& job, int64_t i) {
  const int64_t* const stride = job.video.stride;
  const int32_t id = job.tubes.token[i], cells = job.grid.h * job.grid.w, cell = id % cells;
  const int64_t frame = int64_t{id / cells} * job.tubes.tubelet, y = int64_t{cell / job.grid.w} * job.tubes.patch,
                x = int64_t{cell % job.grid.w} * job.tubes.patch;
  return static_cast<const In*>(job.video.data) + job.tubes.clip[i] * stride[0] + frame * stride[2] + y * stride[3] +
         x * stride[4];
}

// Looks up the pages that a row's successors come to after two more: streamed stores wait for a page's address one by
// one. Past the last row it does no harm, as a prefetch never faults.
MMFAST_INLINE void touch_pages(const void* row, int64_t bytes) {
  const uintptr_t from = reinterpret_cast<uintptr_t>(row) + 2 * kPage;
  for (uintptr_t page = (from + kPage - 1) / kPage * kPage; page < from + bytes; page += kPage) {
    __builtin_prefetch(reinterpret_cast<const void*>(page), 0, 3);
  }
}

template <bool kAffine, bool kStream, Layout kLayout, int kPatch, class Out, class In>
MMFAST_INLINE void tokens(const Job& shared, int64_t begin, int64_t end) {
  const Job job = shared;  // a copy that no store through a byte pointer can change: it stays in registers
  for (int64_t i = begin; i < end; ++i) {
    Out* const row = static_cast<Out*>(job.rows.data) + i * job.row_size;
    if constexpr (kStream) touch_pages(row, job.row_size * sizeof(Out));
    gather_token<kAffine, kStream, kLayout, kPatch>(
        job, first_pixel<In>(job, i), first_pixel<In>(job, std::min(i + kTokensAhead, end - 1)), row);
  }
  if constexpr (kStream) end_stream();
}

template <bool kAffine, Layout kLayout, class Out, class In>
MMFAST_INLINE void any_patch(const Job& job, int64_t begin, int64_t end) {
  switch (job.tubes.patch) {
    case 16:
      if constexpr (std::is_same_v<In, uint8_t>) {
        if (job.streams) return tokens<kAffine, true, kLayout, 16, Out, In>(job, begin, end);
      }
      return tokens<kAffine, false, kLayout, 16, Out, In>(job, begin, end);
    case 14:
      return tokens<kAffine, false, kLayout, 14, Out, In>(job, begin, end);
    case 4:
      return tokens<kAffine, false, kLayout, 4, Out, In>(job, begin, end);
    default:
      return tokens<kAffine, false, kLayout, 0, Out, In>(job, begin, end);
  }
}

template <bool kAffine, class Out, class In>
MMFAST_INLINE void any_layout(const Job& job, int64_t begin, int64_t end) {
  const Video& video = job.video;
  if (video.stride[4] == 1) return any_patch<kAffine, Layout::planes, Out, In>(job, begin, end);
  if (video.stride[4] == 3 && video.size[1] == 3 && video.stride[1] == 1) {
    return any_patch<kAffine, Layout::colours, Out, In>(job, begin, end);
  }
  return any_patch<kAffine, Layout::any, Out, In>(job, begin, end);
}

MMFAST_CLONES void copy_u8(const Job& job, int64_t begin, int64_t end) {
  any_layout<false, uint8_t, uint8_t>(job, begin, end);
}
MMFAST_CLONES void widen_u8(const Job& job, int64_t begin, int64_t end) {
  any_layout<false, float, uint8_t>(job, begin, end);
}
MMFAST_CLONES void scale_u8(const Job& job, int64_t begin, int64_t end) {
  any_layout<true, float, uint8_t>(job, begin, end);
}
MMFAST_CLONES void copy_f32(const Job& job, int64_t begin, int64_t end) {
  any_layout<false, float, float>(job, begin, end);
}
MMFAST_CLONES void scale_f32(const Job& job, int64_t begin, int64_t end) {
  any_layout<true, float, float>(job, begin, end);
}

void check_ids(const char* name, const int32_t* ids, int64_t count, int64_t limit) {
  for (int64_t i = 0; i < count; ++i) {
    if (ids[i] < 0 || ids[i] >= limit) {
      throw std::invalid_argument(std::string(name) + ": got " + std::to_string(ids[i]) + " at " + std::to_string(i) +
                                  ", takes 0.." + std::to_string(limit - 1));
    }
  }
}

}  // namespace

void gather_tubes(const Video& video, const Tubes& tubes, const Rows& rows, int threads) {
  const Grid grid(video, tubes);
  check_ids("token_idx", tubes.token, tubes.count, grid.tokens);
  check_ids("clip_idx", tubes.clip, tubes.count, video.size[0]);
  const int64_t row_size = video.size[1] * tubes.tubelet * tubes.patch * tubes.patch;
  const int64_t bytes = tubes.count * row_size * (rows.type == Pixel::f32 ? 4 : 1);
  const bool streams = bytes > kCachedBytes && reinterpret_cast<uintptr_t>(rows.data) % 16 == 0;
  const Job job{video, tubes, rows, grid, row_size, streams};
  auto* const run = video.type == Pixel::f32  ? (rows.scale ? scale_f32 : copy_f32)
                    : rows.type == Pixel::f32 ? (rows.scale ? scale_u8 : widen_u8)
                                              : copy_u8;
  share_range(tubes.count, kPixelsAThread / std::max<int64_t>(row_size, 1) + 1, threads,
              [&](int64_t begin, int64_t end) { run(job, begin, end); });
}

}  // namespace mmfast
