// The inner loops of the CPU gather: one token's pixels into one row. All inlined into the functions of gather.cpp,
// which are compiled once for every instruction set.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "gather.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#if defined(__GNUC__)
#define MMFAST_LAMBDA __attribute__((always_inline))
#define MMFAST_INLINE MMFAST_LAMBDA inline
#else
#define MMFAST_LAMBDA
#define MMFAST_INLINE inline
#endif

namespace mmfast {

// planes: the pixels of a line are neighbours. colours: three interleaved channels, as decoders write them.
enum class Layout { planes, colours, any };

struct Job {
  Video video;
  Tubes tubes;
  Rows rows;
  Grid grid;
  int64_t row_size;
  bool streams;  // rows go past the caches
};

template <bool kAffine, class Out, class In>
MMFAST_INLINE Out value(In pixel, float scale, float shift) {
  return kAffine ? static_cast<Out>(static_cast<float>(pixel) * scale + shift) : static_cast<Out>(pixel);
}

// `width` pixels of one channel, `step` elements apart.
template <bool kAffine, class Out, class In>
MMFAST_INLINE void line(const In* in, int64_t step, int32_t width, float scale, float shift, Out* out) {
  for (int32_t x = 0; x < width; ++x) out[x] = value<kAffine, Out>(in[x * step], scale, shift);
}

// Sixteen bytes at a time in vector registers: compilers do not find these by themselves, as bytes may alias anything.
using Bytes = uint8_t __attribute__((vector_size(16)));
using Halves = uint16_t __attribute__((vector_size(16)));
using Words = int32_t __attribute__((vector_size(16)));
using Floats = float __attribute__((vector_size(16)));

MMFAST_INLINE Bytes load(const uint8_t* in) {
  Bytes bytes;
  std::memcpy(&bytes, in, sizeof bytes);
  return bytes;
}

// kStream: past the caches, which spares the reading of lines that are about to be overwritten. `to` is a multiple
// of 16.
template <bool kStream, class T, class V>
MMFAST_INLINE void put(T* to, V vector) {
  static_assert(sizeof vector == 16);
#if defined(__SSE2__)
  if constexpr (kStream) return _mm_stream_si128(reinterpret_cast<__m128i*>(to), reinterpret_cast<__m128i>(vector));
#endif
  std::memcpy(to, &vector, sizeof vector);
}

// What was streamed is seen by other threads from here on.
inline void end_stream() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

template <bool kAffine, bool kStream, class Out>
MMFAST_INLINE void store(Bytes bytes, float scale, float shift, Out* out) {
  if constexpr (std::is_same_v<Out, uint8_t>) {
    put<kStream>(out, bytes);
  } else {
    // Zeros between bytes make little-endian words, in two steps that every instruction set has.
    const Bytes zero{};
    const Bytes low = __builtin_shufflevector(bytes, zero, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const Bytes high =
        __builtin_shufflevector(bytes, zero, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    const Halves none{}, half[2] = {reinterpret_cast<Halves>(low), reinterpret_cast<Halves>(high)};
    for (int k = 0; k < 2; ++k) {
      const Halves words[2] = {__builtin_shufflevector(half[k], none, 0, 8, 1, 9, 2, 10, 3, 11),
                               __builtin_shufflevector(half[k], none, 4, 12, 5, 13, 6, 14, 7, 15)};
      for (int i = 0; i < 2; ++i) {
        Floats floats = __builtin_convertvector(reinterpret_cast<Words>(words[i]), Floats);
        if constexpr (kAffine) floats = floats * scale + shift;
        put<kStream>(out + 8 * k + 4 * i, floats);
      }
    }
  }
}

// Sixteen pixels r g b r g b ... to three lines that lie `plane` elements apart.
template <bool kAffine, bool kStream, class Out>
MMFAST_INLINE void split_colours(const uint8_t* in, const float* scale, const float* shift, int64_t plane, Out* out) {
  const Bytes a = load(in), b = load(in + 16), c = load(in + 32);
  const Bytes red = __builtin_shufflevector(a, b, 0, 3, 6, 9, 12, 15, 18, 21, 24, 27, 30, 0, 0, 0, 0, 0);
  const Bytes green = __builtin_shufflevector(a, b, 1, 4, 7, 10, 13, 16, 19, 22, 25, 28, 31, 0, 0, 0, 0, 0);
  const Bytes blue = __builtin_shufflevector(a, b, 2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 0, 0, 0, 0, 0, 0);
  const Bytes lines[3] = {
      __builtin_shufflevector(red, c, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 17, 20, 23, 26, 29),
      __builtin_shufflevector(green, c, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 18, 21, 24, 27, 30),
      __builtin_shufflevector(blue, c, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 19, 22, 25, 28, 31),
  };
  for (int k = 0; k < 3; ++k) {
    store<kAffine, kStream>(lines[k], scale[k], shift[k], out + k * plane);
  }
}

// in: the token's first pixel. ahead: that of a later token, whose lines are fetched meanwhile: short lines far apart
// are what no hardware prefetcher follows. kPatch: the patch width, or 0 to read it at run time.
template <bool kAffine, bool kStream, Layout kLayout, int kPatch, class Out, class In>
MMFAST_INLINE void gather_token(const Job& job, const In* in, const In* ahead, Out* out) {
  constexpr bool kSixteen = kPatch == 16 && std::is_same_v<In, uint8_t>;
  constexpr int64_t kLineFetch = 64 / sizeof(In);
  const int64_t* const stride = job.video.stride;
  const int64_t channels = kLayout == Layout::colours ? 3 : job.video.size[1];
  const int32_t tubelet = job.tubes.tubelet, patch = kPatch ? kPatch : job.tubes.patch;
  const int64_t plane = int64_t{tubelet} * patch * patch;
  const auto fetch = [&](int64_t offset, int64_t pixels) MMFAST_LAMBDA {
    for (int64_t x = 0; x < pixels; x += kLineFetch) __builtin_prefetch(ahead + offset + x, 0, 0);  // read once
    if (kLayout == Layout::colours) __builtin_prefetch(ahead + offset + pixels - 1, 0, 0);  // 48 bytes often lie in two
  };
  if constexpr (kLayout == Layout::planes) {
    for (int64_t c = 0; c < channels; ++c) {
      const float scale = kAffine ? job.rows.scale[c] : 1.0f, shift = kAffine ? job.rows.shift[c] : 0.0f;
      for (int32_t dt = 0; dt < tubelet; ++dt) {
        for (int32_t dy = 0; dy < patch; ++dy, out += patch) {
          const int64_t offset = c * stride[1] + dt * stride[2] + dy * stride[3];
          if constexpr (kSixteen) {
            store<kAffine, kStream>(load(in + offset), scale, shift, out);
          } else if constexpr (!kAffine && std::is_same_v<In, Out>) {
            std::memcpy(out, in + offset, patch * sizeof(In));
          } else {
            line<kAffine>(in + offset, 1, patch, scale, shift, out);
          }
          fetch(offset, patch);
        }
      }
    }
  } else {
    // Channels innermost: where they are interleaved, one line brings them all.
    float scale[3], shift[3];  // copies that stay in registers
    for (int c = 0; kLayout == Layout::colours && c < 3; ++c) {
      scale[c] = kAffine ? job.rows.scale[c] : 1.0f;
      shift[c] = kAffine ? job.rows.shift[c] : 0.0f;
    }
    // Frames in turn, so that no prefetcher follows one down past the patch: up to a fifth faster than one by one.
    for (int32_t dy = 0; dy < patch; ++dy) {
      for (int32_t dt = 0; dt < tubelet; ++dt) {
        const int64_t offset = dt * stride[2] + dy * stride[3];
        Out* const to = out + (dt * patch + dy) * patch;
        if constexpr (kSixteen && kLayout == Layout::colours) {
          split_colours<kAffine, kStream>(in + offset, scale, shift, plane, to);
        } else {
          for (int64_t c = 0; c < channels; ++c) {
            line<kAffine>(in + offset + c * stride[1], kLayout == Layout::colours ? 3 : stride[4], patch,
                          kAffine ? job.rows.scale[c] : 1.0f, kAffine ? job.rows.shift[c] : 0.0f, to + c * plane);
          }
        }
        if (kLayout == Layout::colours) fetch(offset, 3 * patch);
      }
    }
  }
}

}  // namespace mmfast
