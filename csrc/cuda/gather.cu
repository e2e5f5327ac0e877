// Two kernels, both one pass over the kept pixels with aligned accesses as wide as the patch allows.
//
//   lines_kernel   a thread moves a piece of kPiece pixels of a line; for planes (w stride 1), and for odd strides
//   staged_kernel  a block brings a token's interleaved lines into shared memory and writes them out as planes
//
// A thread keeps its piece of the row and walks over tokens, so the divisions that place the piece are made once.
#include <algorithm>

#include "../gather.h"
#include "launch.h"

namespace mmfast {
namespace {

constexpr int kThreads = 128;
constexpr int64_t kMaxTokenBlocks = 4096;
constexpr int64_t kMaxStage = 47 * 1024;

template <class T, int kItems>
struct alignas(sizeof(T) * kItems) Piece {
  T item[kItems];
};

struct Place {
  int32_t x, dy, dt, c;
};

// Where piece number `piece` of a row lies in its patch.
__device__ Place place_of(int64_t piece, int pixels, const Tubes& tubes) {
  const int32_t pieces_a_line = tubes.patch / pixels;
  const int32_t x = static_cast<int32_t>(piece % pieces_a_line) * pixels;
  const int64_t line = piece / pieces_a_line;
  const int32_t lines = tubes.tubelet * tubes.patch, at = static_cast<int32_t>(line % lines);
  return {x, at % tubes.patch, at / tubes.patch, static_cast<int32_t>(line / lines)};
}

// The offset of a token's first pixel, or -1 where its id or clip is out of range.
__device__ int64_t token_offset(int64_t i, const Video& video, const Tubes& tubes, const Grid& grid) {
  const int32_t id = tubes.token[i], clip = tubes.clip[i], cells = grid.h * grid.w;
  if (id < 0 || id >= grid.tokens || clip < 0 || clip >= video.size[0]) return -1;
  const int32_t cell = id % cells;
  const int64_t frame = int64_t{id / cells} * tubes.tubelet, y = int64_t{cell / grid.w} * tubes.patch,
                x = int64_t{cell % grid.w} * tubes.patch;
  return clip * video.stride[0] + frame * video.stride[2] + y * video.stride[3] + x * video.stride[4];
}

// Rounded after the product and after the sum, as on the CPU.
template <class Out, class In>
__device__ Out value(In pixel, bool affine, float scale, float shift) {
  return affine ? static_cast<Out>(__fadd_rn(__fmul_rn(static_cast<float>(pixel), scale), shift))
                : static_cast<Out>(pixel);
}

template <class Out>
__device__ Out bad_value() {
  return 0;
}
template <>
__device__ float bad_value<float>() {
  return __int_as_float(0x7FC00000);
}

template <class Out, class In, int kPiece, bool kPlanes>
__global__ void __launch_bounds__(kThreads)
    lines_kernel(const Video video, const Tubes tubes, const Rows rows, const Grid grid, const int64_t row_size) {
  const int64_t piece = int64_t{blockIdx.y} * kThreads + threadIdx.x;
  if (piece * kPiece >= row_size) return;
  const Place place = place_of(piece, kPiece, tubes);
  const int64_t* const stride = video.stride;
  const int64_t offset = place.c * stride[1] + place.dt * stride[2] + place.dy * stride[3] + place.x * stride[4];
  const bool affine = rows.scale != nullptr;
  const float scale = affine ? rows.scale[place.c] : 1.0f, shift = affine ? rows.shift[place.c] : 0.0f;
  for (int64_t i = blockIdx.x; i < tubes.count; i += gridDim.x) {
    const int64_t first = token_offset(i, video, tubes, grid);
    Piece<Out, kPiece> out;
    if (first < 0) {
      for (int x = 0; x < kPiece; ++x) out.item[x] = bad_value<Out>();
    } else {
      const In* const in = static_cast<const In*>(video.data) + first + offset;
      Piece<In, kPiece> pixels;
      if (kPlanes) {
        pixels = *reinterpret_cast<const Piece<In, kPiece>*>(in);
      } else {
        for (int x = 0; x < kPiece; ++x) pixels.item[x] = in[x * stride[4]];
      }
      for (int x = 0; x < kPiece; ++x) out.item[x] = value<Out>(pixels.item[x], affine, scale, shift);
    }
    static_cast<Piece<Out, kPiece>*>(rows.data)[i * (row_size / kPiece) + piece] = out;
  }
}

// lines: how many; chunks: words in each; stride: bytes from a line to the next, of a frame and of a row.
template <class Word>
__device__ void stage(const char* in, char* shared, const Tubes& tubes, int64_t frame_bytes, int64_t line_bytes,
                      int width_bytes) {
  const int words = width_bytes / sizeof(Word), total = tubes.tubelet * tubes.patch * words;
  for (int k = threadIdx.x; k < total; k += kThreads) {
    const int line = k / words, dt = line / tubes.patch, dy = line % tubes.patch;
    const char* const source = in + dt * frame_bytes + dy * line_bytes;
    reinterpret_cast<Word*>(shared)[k] = reinterpret_cast<const Word*>(source)[k % words];
  }
}

template <class Out, class In, int kPiece>
__global__ void __launch_bounds__(kThreads) staged_kernel(const Video video, const Tubes tubes, const Rows rows,
                                                          const Grid grid, const int64_t row_size, const int word) {
  extern __shared__ __align__(16) char shared[];
  const In* const pixels = reinterpret_cast<const In*>(shared);
  const int32_t channels = static_cast<int32_t>(video.size[1]);
  const int width_bytes = tubes.patch * channels * static_cast<int>(sizeof(In));
  const int64_t frame_bytes = video.stride[2] * sizeof(In), line_bytes = video.stride[3] * sizeof(In);
  const bool affine = rows.scale != nullptr;
  for (int64_t i = blockIdx.x; i < tubes.count; i += gridDim.x) {
    const int64_t first = token_offset(i, video, tubes, grid);
    if (first >= 0) {
      const char* const in = static_cast<const char*>(video.data) + first * sizeof(In);
      if (word == 16) {
        stage<uint4>(in, shared, tubes, frame_bytes, line_bytes, width_bytes);
      } else if (word == 4) {
        stage<uint32_t>(in, shared, tubes, frame_bytes, line_bytes, width_bytes);
      } else {
        stage<uint8_t>(in, shared, tubes, frame_bytes, line_bytes, width_bytes);
      }
    }
    __syncthreads();
    for (int piece = threadIdx.x; piece * kPiece < row_size; piece += kThreads) {
      const Place place = place_of(piece, kPiece, tubes);
      const float scale = affine ? rows.scale[place.c] : 1.0f, shift = affine ? rows.shift[place.c] : 0.0f;
      const int base = ((place.dt * tubes.patch + place.dy) * tubes.patch + place.x) * channels + place.c;
      Piece<Out, kPiece> out;
      for (int x = 0; x < kPiece; ++x) {
        out.item[x] = first < 0 ? bad_value<Out>() : value<Out>(pixels[base + x * channels], affine, scale, shift);
      }
      static_cast<Piece<Out, kPiece>*>(rows.data)[i * (row_size / kPiece) + piece] = out;
    }
    __syncthreads();
  }
}

// Can every access of `bytes` bytes be aligned? unit: strides are counted in elements of this size.
bool aligned(const Video& video, int64_t unit, int64_t bytes) {
  if (reinterpret_cast<uintptr_t>(video.data) % bytes != 0) return false;
  for (int axis = 0; axis < 4; ++axis) {
    if (video.size[axis] > 1 && video.stride[axis] * unit % bytes != 0) return false;
  }
  return true;
}

template <class Out, class In, int kPiece>
bool launch(const Video& video, const Tubes& tubes, const Rows& rows, cudaStream_t stream) {
  const bool fits = tubes.patch % kPiece == 0 && reinterpret_cast<uintptr_t>(rows.data) % (kPiece * sizeof(Out)) == 0;
  const bool planes = video.stride[4] == 1;
  if (!fits || (planes && !aligned(video, sizeof(In), kPiece * sizeof(In)))) return false;
  const Grid grid(video, tubes);
  const int64_t line = video.size[1] * tubes.patch, row_size = line * tubes.tubelet * tubes.patch;
  const unsigned token_blocks = blocks(std::min(tubes.count, kMaxTokenBlocks));
  const dim3 lines_grid(token_blocks, blocks(ceil_div(row_size / kPiece, kThreads)));
  const int64_t stage_bytes = row_size * sizeof(In);
  if (planes) {
    lines_kernel<Out, In, kPiece, true><<<lines_grid, kThreads, 0, stream>>>(video, tubes, rows, grid, row_size);
  } else if (video.stride[1] == 1 && video.stride[4] == video.size[1] && stage_bytes <= kMaxStage) {
    Video by_line = video;
    by_line.size[1] = 1;  // its stride of one element needs no alignment: lines are read across channels
    const int64_t width_bytes = line * sizeof(In);
    const auto word = [&](int64_t bytes) { return width_bytes % bytes == 0 && aligned(by_line, sizeof(In), bytes); };
    staged_kernel<Out, In, kPiece><<<token_blocks, kThreads, stage_bytes, stream>>>(video, tubes, rows, grid, row_size,
                                                                                    word(16)  ? 16
                                                                                    : word(4) ? 4
                                                                                              : 1);
  } else {
    lines_kernel<Out, In, kPiece, false><<<lines_grid, kThreads, 0, stream>>>(video, tubes, rows, grid, row_size);
  }
  check_launch("gather_tubes");
  return true;
}

// 16 bytes a thread on the wider side, or what patch and addresses allow.
template <class Out, class In>
void launch_widest(const Video& video, const Tubes& tubes, const Rows& rows, cudaStream_t stream) {
  if constexpr (sizeof(Out) == 1) {
    if (launch<Out, In, 16>(video, tubes, rows, stream)) return;
  }
  launch<Out, In, 4>(video, tubes, rows, stream) || launch<Out, In, 2>(video, tubes, rows, stream) ||
      launch<Out, In, 1>(video, tubes, rows, stream);
}

}  // namespace

void gather_tubes_cuda(const Video& video, const Tubes& tubes, const Rows& rows, void* stream) {
  if (tubes.count == 0 || video.size[1] == 0) return;
  const auto on = static_cast<cudaStream_t>(stream);
  if (video.type == Pixel::f32) {
    launch_widest<float, float>(video, tubes, rows, on);
  } else if (rows.type == Pixel::f32) {
    launch_widest<float, uint8_t>(video, tubes, rows, on);
  } else {
    launch_widest<uint8_t, uint8_t>(video, tubes, rows, on);
  }
}

}  // namespace mmfast
